//! KubeVirt's admission webhooks for a real Kubernetes: `AdmissionReview` in, `AdmissionReview` out, over TLS.
//!
//! The rules are those of [`godwit_api::admission`], which the embedded API server calls as well; here they are asked through
//! reviews, and what they want to know of other objects is read from the API server ([`facts`]). Paths and webhooks' names are
//! KubeVirt's ([`routes::ROUTES`]).

pub mod answer;
pub mod facts;
mod judge;
mod listen;
pub mod review;
pub use godwit_api::admission::routes;

pub use facts::Cluster;
pub use judge::judge;
pub use listen::{answer as answer_request, serve};

use std::net::TcpListener;
use std::path::PathBuf;

/// What the server needs.
pub struct Options {
    /// Where it listens.
    pub listener: TcpListener,
    /// PEM file of its certificate, and the chain.
    pub certificate: PathBuf,
    /// PEM file of its private key.
    pub key: PathBuf,
    /// Where it reads other objects (and marks VMIs for evacuation).
    pub cluster: Cluster,
}

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A certificate or key could not be read.
    #[error(transparent)]
    Pem(#[from] godwit_serving::pem::PemError),
    /// Certificate and key do not go together, or TLS cannot be set up with them.
    #[error("TLS cannot be served with this certificate and key: {0}")]
    Tls(#[from] rustls::Error),
    /// The socket.
    #[error("cannot listen: {0}")]
    Listen(#[from] std::io::Error),
}
