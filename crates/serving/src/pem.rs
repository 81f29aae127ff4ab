//! Certificates and keys from PEM files.

use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::path::{Path, PathBuf};

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {path}: {why}")]
pub struct PemError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: String,
}

impl PemError {
    fn new(path: &Path, why: impl std::fmt::Display) -> Self {
        Self { path: path.to_owned(), why: why.to_string() }
    }
}

/// The certificates in a file, at least one.
///
/// # Errors
/// The file is missing, malformed, or has none.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let list: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|e| PemError::new(path, e))?.collect();
    let list = list.map_err(|e| PemError::new(path, e))?;
    if list.is_empty() { Err(PemError::new(path, "no certificate in it")) } else { Ok(list) }
}

/// The certificates in a file, as those that are trusted.
///
/// # Errors
/// As of [`certificates`].
pub fn authority(path: &Path) -> Result<RootCertStore, PemError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|e| PemError::new(path, e))?;
    }
    Ok(roots)
}

/// The private key in a file.
///
/// # Errors
/// The file is missing, malformed, or has none.
pub fn key(path: &Path) -> Result<PrivateKeyDer<'static>, PemError> {
    PrivateKeyDer::from_pem_file(path).map_err(|e| PemError::new(path, e))
}
