//! `godwit plan drain` and `godwit drain`: reads a cluster, shows what emptying nodes would do to each VM, and does it.
//!
//! The plan is [`godwit_control::drain`]'s; here the world for it is read ([`read`]), with lists and nothing else, and shown
//! ([`show`]). [`run`] then empties the nodes the way `kubectl drain` does, by evictions, and takes it back when told to.

/// Prints a line. That nobody reads it any more ends no drain in the middle.
macro_rules! tell {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

mod abort;
mod connect;
mod course;
#[cfg(test)]
mod course_tests;
mod lines;
pub mod read;
#[cfg(test)]
mod read_tests;
mod run;
#[cfg(test)]
mod run_tests;
pub mod show;
mod watch;

pub use connect::connect;
pub use godwit_control::drain::Manner;
pub use run::{Ending, Options, run};

/// Why nothing could be planned or done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No cluster could be found.
    #[error("no cluster to talk to: {0}; give --kubeconfig, or set KUBECONFIG")]
    NoCluster(String),
    /// The cluster has no VMs.
    #[error("the cluster does not serve kubevirt.io/v1, so there are no VMs whose leaving could be planned")]
    NoKubeVirt,
    /// A node does not exist.
    #[error("there is no node {name}; the cluster has {}", .known.join(", "))]
    NoSuchNode {
        /// As it was asked for.
        name: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// Something could not be read.
    #[error("cannot list {what}: {why}")]
    Read {
        /// The kind, in the plural.
        what: String,
        /// In the server's words.
        why: String,
    },
    /// Something could not be written.
    #[error("cannot {what}: {why}")]
    Write {
        /// What was to be done, and to what.
        what: String,
        /// In the server's words.
        why: String,
    },
}

/// What the server said, without the client's wrapping.
fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// The HTTP status of a refusal.
fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}
