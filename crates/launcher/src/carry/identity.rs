//! What the two ends of one migration know each other's streams by: a key pair and a certificate each, which are made for that
//! migration. Each end is told the other's fingerprint; whoever shows another certificate is refused.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::digest;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::rpc::Secured;

/// Why an identity cannot be made or used.
#[derive(Debug, thiserror::Error)]
#[error("cannot secure the migration's streams: {0}")]
pub struct IdentityError(String);

fn failed(error: impl std::fmt::Display) -> IdentityError {
    IdentityError(error.to_string())
}

/// Ring's suites with AES-128 first: the stream is bulk data, and 128 bits cost a third less than 256.
#[must_use]
pub fn fast_provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| match suite.suite() {
        rustls::CipherSuite::TLS13_AES_128_GCM_SHA256 => 0,
        rustls::CipherSuite::TLS13_AES_256_GCM_SHA384 => 1,
        _ => 2,
    });
    provider
}

/// The names that a certificate carries, for the log.
///
/// # Errors
/// A sentence for the log.
pub fn names(certificate: &CertificateDer<'_>) -> Result<String, String> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|e| format!("peer's certificate is malformed: {e}"))?;
    let common = parsed.subject().iter_common_name().filter_map(|cn| cn.as_str().ok()).map(|cn| format!("CN={cn}"));
    let alternative = parsed.subject_alternative_name().ok().flatten().map(|san| &san.value.general_names);
    let dns = alternative.into_iter().flatten().filter_map(|name| match name {
        GeneralName::DNSName(dns) => Some(format!("DNS={dns}")),
        _ => None,
    });
    Ok(common.chain(dns).collect::<Vec<_>>().join(", "))
}

/// SHA-256 of a certificate, in lower-case hexadecimal digits.
pub type Fingerprint = String;

fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    hex(digest::digest(&digest::SHA256, certificate).as_ref())
}

/// Bytes in lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
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
    pub fn new(uid: &str, end: &str) -> Result<Self, IdentityError> {
        let key = rcgen::KeyPair::generate().map_err(failed)?;
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, format!("migration {uid} {end}"));
        let certificate = params.self_signed(&key).map_err(failed)?.der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(Self { certificate, key, provider: Arc::new(fast_provider()) })
    }

    /// This identity, for whoever carries the streams in its place, to talk to `peer` alone.
    #[must_use]
    pub fn lend(&self, peer: &str) -> Secured {
        Secured {
            certificate: STANDARD.encode(&self.certificate),
            key: STANDARD.encode(self.key.secret_der()),
            peer: peer.to_owned(),
        }
    }

    /// The identity that was lent.
    ///
    /// # Errors
    /// When it is none.
    pub fn lent(secured: &Secured) -> Result<Self, IdentityError> {
        let certificate = CertificateDer::from(STANDARD.decode(&secured.certificate).map_err(failed)?);
        let key = PrivatePkcs8KeyDer::from(STANDARD.decode(&secured.key).map_err(failed)?);
        Ok(Self { certificate, key: PrivateKeyDer::Pkcs8(key), provider: Arc::new(fast_provider()) })
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
    pub fn server(&self, peer: &str) -> Result<Arc<ServerConfig>, IdentityError> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|b| {
                b.with_client_cert_verifier(self.only(peer))
                    .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())
            })
            .map_err(failed)?;
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// The dialling half's configuration, which talks to `peer` alone.
    ///
    /// # Errors
    /// When the key cannot be used.
    pub fn client(&self, peer: &str) -> Result<Arc<ClientConfig>, IdentityError> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|b| {
                b.dangerous()
                    .with_custom_certificate_verifier(self.only(peer))
                    .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())
            })
            .map_err(failed)?;
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
        let names = names(certificate).unwrap_or_else(|malformed| malformed);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_all_different_and_one_that_is_lent_is_the_same() {
        let one = MigrationIdentity::new("uid-1", "source").unwrap();
        let again = MigrationIdentity::new("uid-1", "source").unwrap();
        assert_ne!(one.fingerprint(), again.fingerprint());
        assert_eq!(one.fingerprint().len(), 64);
        let lent = one.lend(&again.fingerprint());
        assert_eq!(MigrationIdentity::lent(&lent).unwrap().fingerprint(), one.fingerprint());
        assert!(!format!("{lent:?}").contains(&lent.key), "it is in no log");
    }
}
