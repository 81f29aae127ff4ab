//! OCI images: a local store, building, importing and pulling.
//!
//! The store is an OCI image layout (`oci-layout`, `index.json`, `blobs/sha256/…`) with a folder `unpacked/` beside it, in
//! which every image that was ever needed lies as a read-only tree, named by its manifest's digest. Several processes may
//! use one store: changes are made under a file lock, everything appears by rename.

mod archive;
mod error;
mod layer;
mod manifest;
mod pull;
mod store;
mod tree;

pub use error::{Error, Result};
pub use manifest::{Descriptor, ImageConfig, ImageManifest};
pub use pull::{Auth, PullPolicy};
pub use store::{FileEntry, ImageInfo, Store, Unpacked};
pub use tree::find_disk;

/// The full form of an image reference: `fedora` → `docker.io/library/fedora:latest`.
///
/// # Errors
/// [`Error::Reference`] when it is none, in the words of Kubernetes' reason `InvalidImageName`.
pub fn normalize(reference: &str) -> Result<String> {
    use std::str::FromStr;
    oci_client::Reference::from_str(reference)
        .map(|parsed| parsed.whole())
        .map_err(|e| Error::Reference { reference: reference.into(), reason: e.to_string() })
}
