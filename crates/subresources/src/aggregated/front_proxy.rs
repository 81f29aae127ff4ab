//! Who asks, as kube-apiserver says it.
//!
//! kube-apiserver authenticates its clients itself and tells an aggregated API in headers who they are. That counts only from a
//! client that shows the front proxy's certificate. Which CA has signed that and what the headers are called stands in the
//! ConfigMap `extension-apiserver-authentication`, which kube-apiserver keeps up to date (Kubernetes, "Configure the Aggregation
//! Layer").

use godwit_serving::request::decode;
use godwit_serving::user::{AUTHENTICATED, User};
use http::{HeaderMap, HeaderName};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The namespace of the ConfigMap.
pub const NAMESPACE: &str = "kube-system";
/// The ConfigMap.
pub const CONFIG_MAP: &str = "extension-apiserver-authentication";

const CA: &str = "requestheader-client-ca-file";
const ALLOWED_NAMES: &str = "requestheader-allowed-names";
const USERNAME_HEADERS: &str = "requestheader-username-headers";
const UID_HEADERS: &str = "requestheader-uid-headers";
const GROUP_HEADERS: &str = "requestheader-group-headers";
const EXTRA_PREFIXES: &str = "requestheader-extra-headers-prefix";

/// Why nobody can be authenticated.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The API server was not told who its front proxy is.
    #[error(
        "{CA} is missing in ConfigMap {NAMESPACE}/{CONFIG_MAP}: kube-apiserver runs without \
         --requestheader-client-ca-file, so that it can aggregate no API"
    )]
    NoProxy,
    /// A value cannot be read.
    #[error("{key} in ConfigMap {NAMESPACE}/{CONFIG_MAP} cannot be used: {why}")]
    Value {
        /// The key.
        key: &'static str,
        /// Why not.
        why: String,
    },
}

/// Why a request is nobody's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Stranger {
    /// No certificate was shown.
    #[error("no client certificate: only kube-apiserver's front proxy is let in")]
    NoCertificate,
    /// The certificate is not the front proxy's.
    #[error("the client certificate is not the front proxy's: {0}")]
    Certificate(String),
    /// The front proxy does not say who asks.
    #[error("the front proxy does not say who asks")]
    NoUser,
}

/// How the front proxy is known, and what it says.
#[derive(Debug)]
pub struct FrontProxy {
    clients: Arc<dyn ClientCertVerifier>,
    /// Common names; empty for any.
    allowed_names: Vec<String>,
    username: Vec<HeaderName>,
    uid: Vec<HeaderName>,
    groups: Vec<HeaderName>,
    extra: Vec<String>,
}

impl FrontProxy {
    /// Reads the ConfigMap's data.
    ///
    /// # Errors
    /// It names no CA, or something in it cannot be read.
    pub fn read(data: &BTreeMap<String, String>) -> Result<Self, ConfigError> {
        let failed = |key, why: String| ConfigError::Value { key, why };
        let pem = data.get(CA).filter(|pem| !pem.trim().is_empty()).ok_or(ConfigError::NoProxy)?;
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let certificate = certificate.map_err(|error| failed(CA, error.to_string()))?;
            roots.add(certificate).map_err(|error| failed(CA, error.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        let clients = clients.build().map_err(|error| failed(CA, error.to_string()))?;
        let list = |key: &'static str| -> Result<Vec<String>, ConfigError> {
            let Some(text) = data.get(key).filter(|text| !text.trim().is_empty()) else { return Ok(Vec::new()) };
            serde_json::from_str::<Option<Vec<String>>>(text)
                .map(Option::unwrap_or_default)
                .map_err(|error| failed(key, error.to_string()))
        };
        let headers = |key: &'static str| -> Result<Vec<HeaderName>, ConfigError> {
            let names = list(key)?;
            names.iter().map(|name| name.parse().map_err(|_| failed(key, format!("{name:?} is no header")))).collect()
        };
        Ok(Self {
            clients,
            allowed_names: list(ALLOWED_NAMES)?,
            username: headers(USERNAME_HEADERS)?,
            uid: headers(UID_HEADERS)?,
            groups: headers(GROUP_HEADERS)?,
            extra: list(EXTRA_PREFIXES)?.into_iter().map(|prefix| prefix.to_ascii_lowercase()).collect(),
        })
    }

    /// Who asks, by the certificates of the connection (the client's own first) and the headers of the request.
    ///
    /// # Errors
    /// It is not the front proxy that says it.
    pub fn authenticate(
        &self,
        certificates: &[CertificateDer<'_>],
        headers: &HeaderMap,
        now: UnixTime,
    ) -> Result<User, Stranger> {
        let (own, chain) = certificates.split_first().ok_or(Stranger::NoCertificate)?;
        self.clients.verify_client_cert(own, chain, now).map_err(|error| Stranger::Certificate(error.to_string()))?;
        if !self.allowed_names.is_empty() {
            let (_, parsed) =
                X509Certificate::from_der(own).map_err(|error| Stranger::Certificate(error.to_string()))?;
            let names: Vec<&str> = parsed.subject().iter_common_name().filter_map(|name| name.as_str().ok()).collect();
            if !names.iter().any(|name| self.allowed_names.iter().any(|allowed| allowed == name)) {
                let why = format!("its name is {names:?}, and {:?} are allowed", self.allowed_names);
                return Err(Stranger::Certificate(why));
            }
        }
        let first = |names: &[HeaderName]| names.iter().flat_map(|name| values(headers, name)).find(|v| !v.is_empty());
        let mut groups: Vec<String> = self.groups.iter().flat_map(|name| values(headers, name)).collect();
        let name = first(&self.username).ok_or(Stranger::NoUser)?;
        // kube-apiserver says this itself; whoever it lets through is one.
        if groups.is_empty() {
            groups.push(AUTHENTICATED.to_owned());
        }
        let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for header in headers.keys() {
            let key = self.extra.iter().find_map(|prefix| header.as_str().strip_prefix(prefix.as_str()));
            if let Some(key) = key.filter(|key| !key.is_empty()) {
                extra.entry(decode(key)).or_default().extend(values(headers, header));
            }
        }
        Ok(User { name, groups, uid: first(&self.uid).unwrap_or_default(), extra })
    }
}

/// Where whoever asks does so from. kube-apiserver puts that behind whatever its client has said; `proxy` is the address of kube-apiserver
/// itself, which has to do where it does not.
#[must_use]
pub fn asker(headers: &HeaderMap, proxy: SocketAddr) -> String {
    let said = headers.get_all("x-forwarded-for").iter().next_back().and_then(|value| value.to_str().ok());
    let last = said.and_then(|all| all.rsplit(',').next()?.trim().parse::<IpAddr>().ok());
    last.map_or_else(|| proxy.to_string(), |address| address.to_string())
}

fn values(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    headers.get_all(name).iter().filter_map(|value| String::from_utf8(value.as_bytes().to_vec()).ok()).collect()
}
