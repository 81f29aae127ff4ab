//! What the two ends of one migration know each other's streams by.
//!
//! For every migration each handler makes a key pair and a certificate for it, which lie in its memory only. Over the control
//! channel, on which both have shown the certificates of their nodes, they tell each other those certificates' fingerprints.
//! From then on the streams of memory and blocks are open to the two that were told, and to nothing else that any CA has
//! signed. An identity is never written down; with its migration it is over, whatever the clocks say.
//!
//! Where the migration's configuration asks for it (`disableTLS`), streams go in the clear. Then each connection proves that it
//! knows a secret that was told over the control channel, by an answer to a question that is asked once.

use std::sync::Arc;

use ring::{digest, hmac};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};

use crate::channel::Place;
use crate::tls::{self, TlsError};

/// SHA-256 of a certificate, in lower-case hexadecimal digits.
pub type Fingerprint = String;

fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    hex(digest::digest(&digest::SHA256, certificate).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One end's key pair for one migration.
pub struct MigrationIdentity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl MigrationIdentity {
    /// Makes one. `end` ("source", "target") and the migration's UID stand in the certificate, for the log of whoever refuses it.
    ///
    /// # Errors
    /// When there is no randomness to make a key of.
    pub fn new(uid: &str, end: &str) -> Result<Self, TlsError> {
        let setup = |e: rcgen::Error| TlsError::Setup(e.to_string());
        let key = rcgen::KeyPair::generate().map_err(setup)?;
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, format!("migration {uid} {end}"));
        let certificate = params.self_signed(&key).map_err(setup)?.der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(Self { certificate, key, provider: Arc::new(tls::fast_provider()) })
    }

    /// What the other end has to know.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.certificate)
    }

    /// The listening half's configuration, which lets in `peer` alone.
    ///
    /// # Errors
    /// When the key cannot be used.
    pub fn server(&self, peer: &str) -> Result<Arc<ServerConfig>, TlsError> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|b| {
                b.with_client_cert_verifier(self.only(peer))
                    .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())
            })
            .map_err(|e| TlsError::Setup(e.to_string()))?;
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// The dialling half's configuration, which talks to `peer` alone.
    ///
    /// # Errors
    /// When the key cannot be used.
    pub fn client(&self, peer: &str) -> Result<Arc<ClientConfig>, TlsError> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|b| {
                b.dangerous()
                    .with_custom_certificate_verifier(self.only(peer))
                    .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())
            })
            .map_err(|e| TlsError::Setup(e.to_string()))?;
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }

    fn only(&self, peer: &str) -> Arc<Only> {
        Arc::new(Only { peer: peer.to_owned(), provider: self.provider.clone() })
    }
}

/// Lets in the one certificate that was told.
#[derive(Debug)]
struct Only {
    peer: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl Only {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let shown = fingerprint(certificate);
        if shown == self.peer {
            return Ok(());
        }
        let names = tls::names(certificate).unwrap_or_else(|malformed| malformed);
        let short = shown.get(..16).unwrap_or(&shown);
        Err(rustls::Error::General(format!(
            "peer is [{names}] (SHA-256 {short}…), which is not the identity that was made for this migration"
        )))
    }
}

impl ClientCertVerifier for Only {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity)?;
        Ok(ClientCertVerified::assertion())
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

impl ServerCertVerifier for Only {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ClientCertVerifier::verify_tls12_signature(self, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ClientCertVerifier::verify_tls13_signature(self, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ClientCertVerifier::supported_verify_schemes(self)
    }
}

/// Something nobody can guess, in hexadecimal digits: a secret, or a question that was never asked before.
///
/// # Errors
/// When there is no randomness.
pub fn unguessable() -> Result<String, TlsError> {
    let mut bytes = [0; 32];
    let random = tls::fast_provider().secure_random;
    random.fill(&mut bytes).map_err(|_| TlsError::Setup("there is no randomness".into()))?;
    Ok(hex(&bytes))
}

/// What a connection in the clear says of itself; whoever knows the secret can prove it.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// Who says it: "source" or "target".
    pub end: &'a str,
    /// UID of the migration.
    pub uid: &'a str,
    /// Which stream, by its inner port.
    pub inner: i32,
    /// Which connection of it.
    pub place: Place,
    /// What the target asked when the connection came.
    pub question: &'a str,
}

impl Claim<'_> {
    fn words(&self) -> String {
        let Self { end, uid, inner, place: Place { stream, recovery }, question } = self;
        format!("godwit stream {end} {uid} {inner} {stream} {recovery:?} {question}")
    }

    /// The proof: HMAC-SHA256 of the claim.
    #[must_use]
    pub fn proof(&self, secret: &str) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        hex(hmac::sign(&key, self.words().as_bytes()).as_ref())
    }

    /// Whether `proof` is that of somebody who knows the secret.
    #[must_use]
    pub fn is_proven(&self, secret: &str, proof: &str) -> bool {
        // Compared by what nobody can see into: the tag of either.
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        let expected = self.proof(secret);
        hmac::verify(&key, expected.as_bytes(), hmac::sign(&key, proof.as_bytes()).as_ref()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_good_for_one_claim_and_one_secret() {
        let claim = Claim { end: "source", uid: "uid-1", inner: 49152, place: 0.into(), question: "q1" };
        let proof = claim.proof("secret");
        assert!(claim.is_proven("secret", &proof));
        assert!(!claim.is_proven("another", &proof));
        assert!(!claim.is_proven("secret", ""));
        for other in [
            Claim { end: "target", ..claim },
            Claim { uid: "uid-2", ..claim },
            Claim { inner: 49153, ..claim },
            Claim { place: 1.into(), ..claim },
            Claim { place: Place { stream: 0, recovery: Some(1) }, ..claim },
            Claim { question: "q2", ..claim },
        ] {
            assert!(!other.is_proven("secret", &proof), "{other:?}");
        }
    }

    #[test]
    fn identities_and_secrets_are_all_different() {
        let one = MigrationIdentity::new("uid-1", "source").unwrap();
        let again = MigrationIdentity::new("uid-1", "source").unwrap();
        assert_ne!(one.fingerprint(), again.fingerprint());
        assert_eq!(one.fingerprint().len(), 64);
        assert_ne!(unguessable().unwrap(), unguessable().unwrap());
    }
}
