//! Who is at the other end of a migration channel.
//!
//! Both ends show the certificate of their node, signed by the cluster's CA, and each names the node that it expects.
//! A node certificate is what Kubernetes calls one: common name `system:node:<node>`; a DNS subject alternative name
//! that equals the node's name does as well, so that a serving certificate of a kubelet can be used.
//! Files are read at every listen and connect, so a rotated certificate is used from the next migration on.

use std::path::PathBuf;
use std::sync::Arc;

use godwit_launcher::carry::identity::{IdentityError, fast_provider, names};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Common-name prefix of a node's certificate (Kubernetes, "Node authorization").
const NODE_PREFIX: &str = "system:node:";

/// Where the certificates of this node are (PEM files).
#[derive(Clone, Debug)]
pub struct TlsPaths {
    /// The cluster's certificate authority: the only one trusted for peers.
    pub ca: PathBuf,
    /// This node's certificate, followed by intermediates if there are any.
    pub cert: PathBuf,
    /// Its private key. It may be in the same file.
    pub key: PathBuf,
}

/// Why a certificate could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file is missing or malformed.
    #[error("cannot read {what} from {path}: {reason}; check the handler's TLS options")]
    File {
        /// CA, certificate or key.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The parser's words.
        reason: String,
    },
    /// The parts do not fit together.
    #[error("cannot use the node's certificate: {0}")]
    Setup(String),
    /// What is made for one migration.
    #[error(transparent)]
    Migration(#[from] IdentityError),
}

/// The node's certificate, key and trust anchor, ready for both roles.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    clients: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
}

impl Identity {
    /// Reads the three files.
    ///
    /// # Errors
    /// [`TlsError::File`] names the file that is missing or malformed.
    pub fn load(paths: &TlsPaths) -> Result<Self, TlsError> {
        let file = |what, path: &PathBuf, reason: String| TlsError::File { what, path: path.clone(), reason };
        let read = |what, path: &PathBuf| std::fs::read(path).map_err(|e| file(what, path, e.to_string()));
        let ca = read("the CA", &paths.ca)?;
        let cert = read("the certificate", &paths.cert)?;
        // In one file both are of the same time, whenever that is replaced.
        let key = if paths.key == paths.cert { cert.clone() } else { read("the key", &paths.key)? };
        Self::from_pem(&ca, &cert, &key).map_err(|(what, reason)| match what {
            "the CA" => file(what, &paths.ca, reason),
            "the certificate" => file(what, &paths.cert, reason),
            _ => file(what, &paths.key, reason),
        })
    }

    /// Reads three PEM texts.
    ///
    /// # Errors
    /// Which of them is malformed, and how.
    pub fn from_pem(ca: &[u8], cert: &[u8], key: &[u8]) -> Result<Self, (&'static str, String)> {
        let chain = read_certificates(cert).map_err(|e| ("the certificate", e))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| ("the key", e.to_string()))?;
        let mut roots = RootCertStore::empty();
        for cert in read_certificates(ca).map_err(|e| ("the CA", e))? {
            roots.add(cert).map_err(|e| ("the CA", e.to_string()))?;
        }
        let provider = Arc::new(fast_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|e| ("the CA", e.to_string()))?;
        Ok(Self { chain, key, clients, provider })
    }

    /// The configuration of the listening half; who the client is must be checked with [`node_of`] after the handshake.
    ///
    /// # Errors
    /// When key and certificate do not match.
    pub fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|b| {
                b.with_client_cert_verifier(self.clients.clone())
                    .with_single_cert(self.chain.clone(), self.key.clone_key())
            })
            .map_err(|e| TlsError::Setup(e.to_string()))?;
        // No session is taken up again, by whomever.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// The configuration of the dialling half, which accepts only the node `expected`.
    ///
    /// # Errors
    /// When key and certificate do not match.
    pub fn client(&self, expected: &str) -> Result<Arc<ClientConfig>, TlsError> {
        let verifier = NodeVerifier {
            expected: expected.to_owned(),
            certificates: self.clients.clone(),
            provider: self.provider.clone(),
        };
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|b| {
                b.dangerous()
                    .with_custom_certificate_verifier(Arc::new(verifier))
                    .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            })
            .map_err(|e| TlsError::Setup(e.to_string()))?;
        // A resumed session would skip the check of the peer's certificate.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }
}

fn read_certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certs: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
    if certs.is_empty() { Err("no certificate in it".to_owned()) } else { Ok(certs) }
}

/// Whether `cert` is the certificate of `node`; otherwise the names that it carries.
///
/// # Errors
/// A sentence for the log, naming what the certificate says.
pub fn check_node(cert: &CertificateDer<'_>, node: &str) -> Result<(), String> {
    let (_, parsed) = X509Certificate::from_der(cert).map_err(malformed)?;
    let is_node = common_names(&parsed).any(|cn| cn.strip_prefix(NODE_PREFIX) == Some(node))
        || dns_names(&parsed).any(|dns| dns == node);
    if is_node { Ok(()) } else { Err(format!("peer is [{}], expected node {node}", names(cert)?)) }
}

/// Whether `cert` has this common name; otherwise the names that it carries.
///
/// # Errors
/// A sentence for the log, naming what the certificate says.
pub(crate) fn check_name(cert: &CertificateDer<'_>, name: &str) -> Result<(), String> {
    let (_, parsed) = X509Certificate::from_der(cert).map_err(malformed)?;
    let is_it = common_names(&parsed).any(|common| common == name);
    if is_it { Ok(()) } else { Err(format!("peer is [{}], expected CN={name}", names(cert)?)) }
}

fn malformed(error: impl std::fmt::Display) -> String {
    format!("peer's certificate is malformed: {error}")
}

fn common_names<'a>(cert: &'a X509Certificate<'_>) -> impl Iterator<Item = &'a str> {
    cert.subject().iter_common_name().filter_map(|cn| cn.as_str().ok())
}

fn dns_names<'a>(cert: &'a X509Certificate<'_>) -> impl Iterator<Item = &'a str> {
    let names = cert.subject_alternative_name().ok().flatten().map(|san| &san.value.general_names);
    names.into_iter().flatten().filter_map(|name| match name {
        GeneralName::DNSName(dns) => Some(*dns),
        _ => None,
    })
}

/// Accepts a server that has a node certificate of the cluster and is the expected node. Migration endpoints are dialled
/// by address, so the name in the certificate is the node's, not the address's.
#[derive(Debug)]
struct NodeVerifier {
    expected: String,
    certificates: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // Kubernetes issues node certificates for client authentication; they are peers here, so that use is enough.
        self.certificates.verify_client_cert(end_entity, intermediates, now)?;
        check_node(end_entity, &self.expected).map_err(rustls::Error::General)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
