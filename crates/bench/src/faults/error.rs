//! Why a night of faults could not be carried out. What went wrong with a guest is no error but a verdict.

use std::path::PathBuf;

/// Why a night of faults could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cluster does not come up, or does not let itself be started again.
    #[error(transparent)]
    Cluster(#[from] godwit_standalone::Error),
    /// Namespaces and links.
    #[error(transparent)]
    Network(#[from] godwit_network::Error),
    /// The guest's image cannot be made.
    #[error("the guest's image: {0}")]
    Image(#[from] godwit_images::Error),
    /// The API refuses what the bench asks for.
    #[error("{what}: {source}")]
    Api {
        /// What was asked for.
        what: String,
        /// The answer.
        source: kube::Error,
    },
    /// A file or folder.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// Something did not happen in time that no fault was in the way of.
    #[error("{what} did not happen within {seconds} s; it is {last}")]
    Late {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
        /// What was there instead.
        last: String,
    },
    /// Somebody has ended it before its time.
    #[error("interrupted; the runs that had ended are in the table")]
    Interrupted,
    /// A program that shapes the links.
    #[error("tc (Debian package iproute2) cannot narrow {link} in {namespace}: {message}")]
    Tc {
        /// The link.
        link: &'static str,
        /// Where.
        namespace: String,
        /// What it said.
        message: String,
    },
}
