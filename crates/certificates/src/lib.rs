//! Certificates of a Godwit on a real Kubernetes.
//!
//! The CA is in the Secret `godwit-ca` ([`keeper`] makes, publishes and replaces it; when, says [`schedule`]). `godwit api` has its
//! serving certificate from it ([`serving`]), and shows another one to handlers. Handlers ask for their node's by a
//! CertificateSigningRequest ([`node`]), which a controller signs ([`signer`]). docs/certificates.md tells the whole.

pub mod authority;
pub mod keeper;
pub mod node;
pub mod schedule;
pub mod serving;
pub mod signer;

use std::time::{SystemTime, UNIX_EPOCH};

/// The time, in seconds since 1970.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
