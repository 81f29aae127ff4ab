//! What can go wrong with images. The texts are what a user reads in a pod's events.

use std::io;
use std::path::PathBuf;

/// Shorthand of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with images.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an image reference.
    #[error("couldn't parse image name {reference:?}: {reason}")]
    Reference {
        /// What was given.
        reference: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The image is not here, and must not or cannot be pulled.
    #[error("image {0:?} is not in the local store; add it with `godwit image build` or `godwit image import`")]
    Absent(String),
    /// A registry did not give the image.
    #[error("failed to pull image {reference:?}: {reason}")]
    Pull {
        /// The image.
        reference: String,
        /// What the registry or the network said.
        reason: String,
    },
    /// A file or folder could not be read or written.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A blob is not what its digest says.
    #[error("blob {digest} of the image store is damaged ({reason}); remove the image and add it again")]
    Damaged {
        /// The blob.
        digest: String,
        /// How it shows.
        reason: String,
    },
    /// A layer holds something that must not be unpacked.
    #[error("layer entry {entry:?} is refused: {reason}")]
    Layer {
        /// Path in the layer.
        entry: String,
        /// The rule it breaks.
        reason: String,
    },
    /// An archive is no image.
    #[error("{} is no image archive: {reason}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// An image is of a kind that is not supported.
    #[error("image {reference:?}: {reason}")]
    Unsupported {
        /// The image.
        reference: String,
        /// What is not supported.
        reason: String,
    },
}

impl Error {
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }

    /// The cause without the image's name, for messages that have it already.
    pub fn cause(&self) -> String {
        match self {
            Self::Pull { reason, .. } => reason.clone(),
            other => other.to_string(),
        }
    }

    /// The reason that Kubernetes gives in `status.containerStatuses[].state.waiting.reason` when it happens while a
    /// container's image is fetched.
    pub fn waiting_reason(&self) -> &'static str {
        match self {
            Self::Reference { .. } => "InvalidImageName",
            Self::Absent(_) => "ErrImageNeverPull",
            _ => "ErrImagePull",
        }
    }
}
