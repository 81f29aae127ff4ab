//! A node's certificate, as its handler comes by it: a CertificateSigningRequest of its own account, which the leading controller
//! signs ([`crate::signer`]), and which is asked for anew in time.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::PostParams;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::RootCertStore;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::authority::{self, Subject};
use crate::keeper::{BUNDLE, BUNDLE_KEY};
use crate::schedule::Validity;

/// The signer of node certificates.
pub const SIGNER: &str = "godwit.io/node";
/// What a node certificate is for, as a request says it.
pub const USAGES: [&str; 3] = ["client auth", "digital signature", "server auth"];

/// How long one waits for a signature before asking again.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks whether it is there.
const LOOK: Duration = Duration::from_millis(500);
/// Before another attempt, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How long the API server may take for one answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Between two looks whether something is due, at most: much less than a new CA is known before it signs.
const ROUND: Duration = Duration::from_secs(60);

/// Whose certificate it is, and where it is kept.
#[derive(Clone)]
pub struct Node {
    /// The API, as the handler's account, by a token that is bound to this node.
    pub client: kube::Client,
    /// The namespace of the CA.
    pub namespace: String,
    /// The node's name.
    pub name: String,
    /// A folder for the files; best in memory.
    pub folder: PathBuf,
}

/// Files that are replaced in place, each at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The certificates of all CAs that count.
    pub bundle: PathBuf,
    /// The node's certificate and its key.
    pub identity: PathBuf,
}

impl Files {
    fn of(folder: &Path) -> Self {
        Self { bundle: folder.join("ca.crt"), identity: folder.join("node.pem") }
    }
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or could not be reached.
    #[error("{what}: {source}")]
    Api {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// It does not answer.
    #[error("{0}: no answer within {LIMIT:?}")]
    Late(&'static str),
    /// There is no CA yet.
    #[error("ConfigMap {0} has no CA yet: `godwit api` makes it")]
    NoAuthority(&'static str),
    /// The request was refused.
    #[error("CertificateSigningRequest {name} was refused: {why}")]
    Refused {
        /// Its name.
        name: String,
        /// Why.
        why: String,
    },
    /// Nobody signs.
    #[error("CertificateSigningRequest {0} is not signed after {PATIENCE:?}: does a controller run?")]
    NotSigned(String),
    /// The key or the certificate.
    #[error(transparent)]
    Certificate(#[from] authority::Error),
    /// The files.
    #[error("cannot write {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// The name that a node's certificate has.
pub fn subject(node: &str) -> Subject {
    Subject { common_name: format!("system:node:{node}"), names: Vec::new(), serves: true, calls: true }
}

/// Waits for as long as it takes until there is a certificate, then keeps it new in the background, for as long as the runtime
/// lives. One that an earlier process has left is there at once, whether or not the API server answers, and even if it is over or
/// of a CA that is no more: then it is asked for another one in the background.
pub async fn obtain(node: Node) -> Files {
    let files = Files::of(&node.folder);
    let mut keeper = Keeper { files: files.clone(), held: None, bundle: String::new(), node };
    if keeper.resume() {
        tokio::spawn(keep(keeper));
        return files;
    }
    let mut retry = RETRY.0;
    while let Err(error) = keeper.tend(crate::now()).await {
        tracing::warn!(node = keeper.node.name, "there is no certificate for this node yet: {error}; trying again");
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(RETRY.1);
    }
    tokio::spawn(keep(keeper));
    files
}

async fn keep(mut keeper: Keeper) {
    let mut retry = RETRY.0;
    loop {
        match keeper.tend(crate::now()).await {
            Ok(()) => {
                retry = RETRY.0;
                tokio::time::sleep(keeper.pause()).await;
            }
            Err(error) => {
                tracing::warn!(node = keeper.node.name, "the node's certificate is not renewed: {error}; trying again");
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(RETRY.1);
            }
        }
    }
}

struct Keeper {
    node: Node,
    files: Files,
    /// What is in the files.
    held: Option<Held>,
    bundle: String,
}

struct Held {
    /// PEM.
    certificate: String,
    validity: Validity,
}

impl Keeper {
    /// Takes what an earlier process has left; whether a handler can start with it. One that waits does not renew its node's lease,
    /// so guests end: a certificate that is over, or that nobody knows, is better than none until the next is there.
    fn resume(&mut self) -> bool {
        let left = std::fs::read_to_string(&self.files.identity).unwrap_or_default();
        self.bundle = std::fs::read_to_string(&self.files.bundle).unwrap_or_default();
        self.held = match authority::validity(&left, "what is left") {
            Ok(validity) if can_be_shown(&self.bundle, &left) => Some(Held { certificate: left, validity }),
            _ => None,
        };
        self.held.is_some()
    }

    fn pause(&self) -> Duration {
        let validity = self.held.as_ref().map(|held| held.validity);
        let life = validity.map_or(0, |validity| validity.not_after.saturating_sub(validity.not_before));
        let life = Duration::from_secs(u64::try_from(life).unwrap_or_default());
        (life / 20).clamp(Duration::from_millis(250), ROUND)
    }

    /// Does what is due.
    async fn tend(&mut self, now: i64) -> Result<(), Error> {
        let bundle = self.read_bundle().await?;
        if bundle != self.bundle {
            // First: whoever has a certificate of the new CA by now is to be known.
            write(&self.files.bundle, &bundle)?;
            self.bundle = bundle;
        }
        // When the CA was made anew, nobody knows what the one before has signed, however long that would count.
        let is_good =
            |held: &Held| now < held.validity.renew_at() && authority::is_signed_by(&held.certificate, &self.bundle);
        if self.held.as_ref().is_some_and(is_good) {
            return Ok(());
        }
        let key = KeyPair::generate().map_err(authority::Error::Make)?;
        let certificate = self.ask(&key).await?;
        let validity = authority::validity(&certificate, "what was signed")?;
        write(&self.files.identity, &format!("{certificate}\n{}", key.serialize_pem()))?;
        tracing::info!(node = self.node.name, until = validity.not_after, "the node has a new certificate");
        self.held = Some(Held { certificate, validity });
        Ok(())
    }

    async fn read_bundle(&self) -> Result<String, Error> {
        let maps: Api<ConfigMap> = Api::namespaced(self.node.client.clone(), &self.node.namespace);
        let found = limited("read the CA", maps.get_opt(BUNDLE)).await?;
        let bundle =
            found.and_then(|map| map.data?.remove(BUNDLE_KEY)).filter(|bundle| !authority::split(bundle).is_empty());
        bundle.ok_or(Error::NoAuthority(BUNDLE))
    }

    /// Has a certificate signed for a key.
    async fn ask(&self, key: &KeyPair) -> Result<String, Error> {
        let api: Api<CertificateSigningRequest> = Api::all(self.node.client.clone());
        let request = request(&self.node.name, key)?;
        let made = limited("ask for a certificate", api.create(&PostParams::default(), &request)).await?;
        let name = made.metadata.name.unwrap_or_default();
        let asked = tokio::time::Instant::now();
        loop {
            tokio::time::sleep(LOOK).await;
            let found = limited("look for the certificate", api.get_opt(&name)).await?;
            let status = found.and_then(|found| found.status).unwrap_or_default();
            if let Some(ByteString(pem)) = status.certificate.filter(|pem| !pem.0.is_empty()) {
                return Ok(String::from_utf8_lossy(&pem).into_owned());
            }
            let refusal =
                status.conditions.unwrap_or_default().into_iter().find(|c| c.type_ == "Denied" || c.type_ == "Failed");
            if let Some(refusal) = refusal {
                return Err(Error::Refused { name, why: refusal.message.or(refusal.reason).unwrap_or_default() });
            }
            if asked.elapsed() > PATIENCE {
                return Err(Error::NotSigned(name));
            }
        }
    }
}

/// The request for a node's certificate.
///
/// # Errors
/// The key cannot sign it.
pub fn request(node: &str, key: &KeyPair) -> Result<CertificateSigningRequest, authority::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, subject(node).common_name);
    let pem = params.serialize_request(key)?.pem()?;
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some("godwit-node-".to_owned()), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: SIGNER.to_owned(),
            usages: Some(USAGES.map(str::to_owned).into()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    })
}

async fn limited<T>(what: &'static str, call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Error> {
    match tokio::time::timeout(LIMIT, call).await {
        Ok(answer) => answer.map_err(|source| Error::Api { what, source: Box::new(source) }),
        Err(_) => Err(Error::Late(what)),
    }
}

/// Whether these are CAs and a certificate with its key, whatever they are worth.
fn can_be_shown(bundle: &str, identity: &str) -> bool {
    let mut roots = RootCertStore::empty();
    let mut authorities = CertificateDer::pem_slice_iter(bundle.as_bytes());
    if !authorities.all(|one| one.is_ok_and(|one| roots.add(one).is_ok())) || roots.is_empty() {
        return false;
    }
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(identity.as_bytes()).collect();
    let (Ok(chain), Ok(key)) = (chain, PrivateKeyDer::from_pem_slice(identity.as_bytes())) else { return false };
    CertifiedKey::from_der(chain, key, &rustls::crypto::ring::default_provider()).is_ok()
}

/// Replaces a file at once, for this account's eyes only.
fn write(path: &Path, text: &str) -> Result<(), Error> {
    let failed = |source| Error::File { path: path.to_owned(), source };
    let replace = || {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let new = path.with_extension("new");
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        io::Write::write_all(&mut file, text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    };
    replace().map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    use http::{Method, Request, Response};
    use http_body_util::BodyExt;
    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;
    use crate::authority::Authority;

    /// An API server with a CA, and a controller that signs whatever is asked for, or refuses it.
    fn server(authority: Option<Authority>) -> kube::Client {
        let asked = Arc::new(Mutex::new(Value::Null));
        let answer = move |request: Request<Body>| {
            let (asked, authority) = (asked.clone(), authority.clone());
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect().await.unwrap().to_bytes();
                let (code, said) = match (&authority, parts.method, parts.uri.path()) {
                    (Some(authority), Method::GET, path) if path.ends_with("/configmaps/godwit-ca-bundle") => {
                        (200, json!({ "metadata": {}, "data": { BUNDLE_KEY: authority.certificate } }))
                    }
                    (Some(_), Method::POST, _) => {
                        let mut object: Value = serde_json::from_slice(&body).unwrap();
                        object["metadata"]["name"] = json!("godwit-node-x");
                        asked.lock().unwrap().clone_from(&object);
                        (201, object)
                    }
                    (Some(authority), Method::GET, path) if path.ends_with("/godwit-node-x") => {
                        let object = asked.lock().unwrap().clone();
                        let mut object: CertificateSigningRequest = serde_json::from_value(object).unwrap();
                        let pem = String::from_utf8(object.spec.request.0.clone()).unwrap();
                        let signed = authority.sign(&pem, &subject("node1"), crate::now(), Duration::from_secs(3600));
                        object.status.get_or_insert_default().certificate =
                            Some(ByteString(signed.unwrap().into_bytes()));
                        (200, serde_json::to_value(object).unwrap())
                    }
                    _ => (503, json!({ "kind": "Status", "status": "Failure", "code": 503, "message": "away" })),
                };
                let response = Response::builder().status(code).body(Body::from(said.to_string().into_bytes()));
                Ok::<_, Infallible>(response.unwrap())
            }
        };
        kube::Client::new(tower::service_fn(answer), "default")
    }

    #[tokio::test]
    async fn a_handler_has_its_certificate_and_its_successor_finds_it() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::make(crate::now(), Duration::from_secs(7200)).unwrap();
        let node = |client| Node {
            client,
            namespace: "kubevirt".to_owned(),
            name: "node1".to_owned(),
            folder: folder.path().join("certificates"),
        };
        let files = obtain(node(server(Some(authority.clone())))).await;
        let identity = std::fs::read_to_string(&files.identity).unwrap();
        assert!(identity.contains("BEGIN CERTIFICATE") && identity.contains("PRIVATE KEY"), "{identity}");
        assert_eq!(std::fs::read_to_string(&files.bundle).unwrap(), authority.certificate);
        let (_, pem) = x509_parser::pem::parse_x509_pem(identity.as_bytes()).unwrap();
        assert_eq!(pem.parse_x509().unwrap().subject().to_string(), "CN=system:node:node1");
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&files.identity).unwrap().permissions().mode() & 0o777, 0o600);
        // While nobody answers.
        assert_eq!(obtain(node(server(None))).await, files);
        assert_eq!(std::fs::read_to_string(&files.identity).unwrap(), identity);
    }

    #[tokio::test]
    async fn a_new_ca_makes_a_new_certificate_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::of(folder.path());
        let make = || Authority::make(crate::now(), Duration::from_secs(7200)).unwrap();
        let (one, other) = (make(), make());
        let keeper = |authority: &Authority| Keeper {
            node: Node {
                client: server(Some(authority.clone())),
                namespace: "kubevirt".to_owned(),
                name: "node1".to_owned(),
                folder: folder.path().to_owned(),
            },
            files: files.clone(),
            held: None,
            bundle: String::new(),
        };
        let identity = || std::fs::read_to_string(&files.identity).unwrap();
        let mut first = keeper(&one);
        first.tend(crate::now()).await.unwrap();
        let before = identity();
        first.tend(crate::now()).await.unwrap();
        assert_eq!(identity(), before, "it is good for an hour");
        // Somebody deletes the Secret.
        first.node.client = server(Some(other.clone()));
        first.tend(crate::now()).await.unwrap();
        assert!(authority::is_signed_by(&identity(), &other.certificate), "in the process that was there");
        let mut next = keeper(&one);
        assert!(next.resume());
        next.tend(crate::now()).await.unwrap();
        assert!(authority::is_signed_by(&identity(), &one.certificate), "in the one after it");
    }

    /// What is left in a folder: a CA's certificate, and what it has signed, which counts from two hours ago on.
    fn leave(files: &Files, lifetime: Duration) -> Authority {
        let then = crate::now() - 7200;
        let authority = Authority::make(then, Duration::from_secs(90_000)).unwrap();
        let pair = authority.issue(&subject("node1"), then, lifetime).unwrap();
        write(&files.bundle, &authority.certificate).unwrap();
        write(&files.identity, &format!("{}{}", pair.certificate, pair.key)).unwrap();
        authority
    }

    #[tokio::test]
    async fn a_certificate_that_is_over_keeps_no_handler_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::of(folder.path());
        let authority = leave(&files, Duration::from_secs(60));
        let node = |client| Node {
            client,
            namespace: "kubevirt".to_owned(),
            name: "node1".to_owned(),
            folder: folder.path().to_owned(),
        };
        assert_eq!(obtain(node(server(None))).await, files, "while nobody answers");
        let client = server(Some(authority));
        let mut keeper = Keeper { node: node(client), files: files.clone(), held: None, bundle: String::new() };
        assert!(keeper.resume());
        keeper.tend(crate::now()).await.unwrap();
        let identity = std::fs::read_to_string(&files.identity).unwrap();
        assert!(!authority::validity(&identity, "x").unwrap().is_over(crate::now()), "it is replaced");
    }

    #[tokio::test]
    async fn what_is_no_certificate_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::of(folder.path());
        let node = Node {
            client: server(None),
            namespace: "kubevirt".to_owned(),
            name: "node1".to_owned(),
            folder: folder.path().to_owned(),
        };
        let mut keeper = Keeper { node, files: files.clone(), held: None, bundle: String::new() };
        assert!(!keeper.resume(), "there is none");
        let authority = leave(&files, Duration::from_secs(9000));
        assert!(keeper.resume());
        let identity = std::fs::read_to_string(&files.identity).unwrap();
        let certificate = authority::split(&identity).concat();
        let other = KeyPair::generate().unwrap().serialize_pem();
        for broken in ["rubbish", &certificate, &format!("{certificate}{other}")] {
            write(&files.identity, broken).unwrap();
            assert!(!keeper.resume(), "{broken}");
        }
        write(&files.identity, &identity).unwrap();
        write(&files.bundle, "rubbish").unwrap();
        assert!(!keeper.resume());
        write(&files.bundle, &authority.certificate).unwrap();
        assert!(keeper.resume());
    }
}
