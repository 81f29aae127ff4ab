//! What can go wrong with a standalone cluster, in words for the person who runs it.

use std::path::{Path, PathBuf};

/// Failure of a standalone operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not run as root.
    #[error("godwit up needs root (it makes network namespaces and runs QEMU): try again with sudo")]
    NeedsRoot,
    /// Programs that are not installed.
    #[error("not installed: {}; run `make deps`, or install the Debian packages {}", .programs.join(", "), .packages.join(" "))]
    MissingPrograms {
        /// Names of the programs.
        programs: Vec<String>,
        /// Debian packages that carry them.
        packages: Vec<String>,
    },
    /// A program that an environment variable names, and that is not there.
    #[error("{variable} names {}, which is no file: correct it, or unset it to use the installed one", .program.display())]
    NamedProgram {
        /// The variable.
        variable: &'static str,
        /// What it names.
        program: PathBuf,
    },
    /// File or system call.
    #[error("cannot {what} {}: {source}", .path.display())]
    Io {
        /// The attempted action.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Certificates.
    #[error("cannot make the certificate of {identity}: {source}")]
    Certificate {
        /// Whose.
        identity: String,
        /// Why not.
        source: rcgen::Error,
    },
    /// Namespaces and links.
    #[error("cannot build the cluster's network: {0}")]
    Network(#[from] godwit_network::Error),
    /// Images.
    #[error("cannot prepare the guest's image: {0}")]
    Image(String),
    /// The Kubernetes client.
    #[error("the cluster's API does not answer as expected: {0}")]
    Api(#[from] Box<kube::Error>),
    /// A process died or did not become ready.
    #[error("{process} {what}; its last words are in {}:\n{tail}", .log.display())]
    Process {
        /// Which process.
        process: String,
        /// What it did.
        what: String,
        /// Where its log is.
        log: PathBuf,
        /// The end of its log.
        tail: String,
    },
    /// A killed process that does not go.
    #[error(
        "{process} has been killed, but process {pid} is not gone after {seconds} seconds and may still hold its port; \
         see what it waits for with `cat /proc/{pid}/task/*/stack`, then run `godwit up` again"
    )]
    Ending {
        /// Which process.
        process: String,
        /// Its number.
        pid: i32,
        /// How long it was waited for.
        seconds: u64,
    },
    /// No cluster in the data directory.
    #[error("no cluster in {}: start one with `godwit up --data-dir {}`", .0.display(), .0.display())]
    NoCluster(PathBuf),
    /// Wrong use.
    #[error("{0}")]
    Usage(String),
    /// The demo did not show what it must.
    #[error("the demo failed: {0}")]
    Demo(String),
}

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { what, path: path.to_owned(), source }
    }
}

impl From<kube::Error> for Error {
    fn from(error: kube::Error) -> Self {
        Self::Api(Box::new(error))
    }
}
