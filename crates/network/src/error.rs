//! What can go wrong with links and namespaces.

use std::io;

/// Shorthand of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with links and namespaces.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No namespace of this name or path exists.
    #[error("network namespace {0} does not exist")]
    NoNamespace(String),
    /// A namespace of this name exists already.
    #[error("network namespace {0} exists already; delete it first or choose another name")]
    NamespaceExists(String),
    /// A name that the kernel or a path cannot carry.
    #[error("{what} name {name:?} is not usable: {why}")]
    Name {
        /// What was to be named.
        what: &'static str,
        /// The name.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// The link is not in the namespace that was looked at.
    #[error("no link {link} in namespace {namespace}")]
    NoLink {
        /// The link's name.
        link: String,
        /// Where it was looked for.
        namespace: String,
    },
    /// The kernel refused a netlink request.
    #[error("{what} in namespace {namespace}: {source}")]
    Netlink {
        /// What was asked for.
        what: String,
        /// Where.
        namespace: String,
        /// The answer.
        source: rtnetlink::Error,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// The reason.
        source: io::Error,
    },
    /// `nft` refused a rule set.
    #[error("nft refused the rules for namespace {namespace}: {message}")]
    Nft {
        /// Where.
        namespace: String,
        /// What nft said.
        message: String,
    },
    /// A value from outside is not what it should be.
    #[error("{0}")]
    Invalid(String),
    /// The thread inside the namespace died.
    #[error("the thread working in namespace {0} panicked")]
    Panicked(String),
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { what: what.into(), source: source.into() }
    }

    /// The kernel's error number, when the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Netlink { source: rtnetlink::Error::NetlinkError(message), .. } => {
                message.code.map(|code| code.get().abs())
            }
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the thing to be made is there already (`EEXIST`).
    pub fn is_exists(&self) -> bool {
        matches!(self, Self::NamespaceExists(_)) || self.errno() == Some(nix::libc::EEXIST)
    }

    /// Whether the thing to be changed is not there.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::NoNamespace(_) | Self::NoLink { .. })
            || matches!(self.errno(), Some(nix::libc::ENOENT | nix::libc::ENODEV | nix::libc::ESRCH))
    }
}
