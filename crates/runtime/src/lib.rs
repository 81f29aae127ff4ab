//! The shell around `godwit_control`: watches the cluster, keeps the [`World`](godwit_control::World), asks for decisions and
//! carries them out over `kube::Client`.
//!
//! One task owns the world. News come in from one watch per kind and from the answers to our own writes (so that a decision
//! always knows what the one before it has written); whatever a change touches is decided again at once; writes run
//! beside it, one plan a lane at a time. The clock is read here and nowhere in the decisions.

mod events;
mod execute;
mod intake;
mod leader;
mod run;
#[cfg(test)]
mod tests;

use godwit_control::{Kind, Noun, Settings};

pub use run::run;

/// What to run.
#[derive(Clone)]
pub struct Options {
    /// Who this is, as reported in events (`reportingInstance`): a pod's or a host's name.
    pub identity: String,
    /// How the installation is set up.
    pub settings: Settings,
    /// What to decide about. [`Noun::ALL`] for the standalone mode.
    pub nouns: Vec<Noun>,
    /// Under which name to hold the lease of the controllers; decides only while it holds it. No two running controllers may
    /// have the same name, and one that is restarted goes on faster with the name it had. `None` decides without a lease.
    pub lease_holder: Option<String>,
    /// Another identity for placement (`system:kube-scheduler`); the main client places when there is none.
    pub scheduler: Option<kube::Client>,
}

impl Options {
    /// Everything on, for the standalone mode with this data directory.
    pub fn standalone(identity: impl Into<String>, data_dir: &str) -> Self {
        let identity = identity.into();
        Self {
            // The store is open in one process only.
            lease_holder: Some(identity.clone()),
            identity,
            settings: Settings::standalone(data_dir),
            nouns: Noun::ALL.to_vec(),
            scheduler: None,
        }
    }
}

/// Why the controllers stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A watch ended for good, which watches never do by themselves.
    #[error("the watch of {} ended unexpectedly; restart the controllers", .0.plural())]
    WatchEnded(Kind),
}
