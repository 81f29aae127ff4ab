//! What stops a kubelet.

use std::path::PathBuf;

/// What stops a kubelet, or keeps it from starting.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused something that cannot be done without.
    #[error("{what}: {source}")]
    Api {
        /// What was asked for.
        what: String,
        /// The answer.
        source: Box<kube::Error>,
    },
    /// The node's network cannot be set up.
    #[error("set up the node's network: {0}")]
    Network(#[from] godwit_network::Error),
    /// A file or folder.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The certificates cannot be used.
    #[error("TLS of the kubelet's server: {0}")]
    Tls(String),
    /// A value that cannot be used.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
