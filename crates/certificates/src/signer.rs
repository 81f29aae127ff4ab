//! Who gets a node's certificate: decided on a CertificateSigningRequest alone, and carried out by the controllers. Each of them
//! does; every write carries the revision that was read, and what is signed stays as it is.
//!
//! A request is granted when kubevirt-handler's account made it with a token that is bound to a node, and it is for that node. What
//! the account and its node are is what the API server writes into the request, so nobody can say it for another.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use godwit_api::Installation;
use godwit_api::access::HANDLER;
use godwit_api::names::EXTRA_NODE_NAME;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestStatus,
};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use x509_parser::prelude::{FromDer, ParsedExtension, X509CertificationRequest};

use crate::authority::Authority;
use crate::keeper::{Authorities, SECRET};
use crate::node::{SIGNER, USAGES, subject};
use crate::schedule::Lifetimes;

/// Before what failed is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// How long requests are kept when they are done, as kube-controller-manager keeps them.
const KEPT: i64 = 60 * 60;
/// Between two looks for those that may go.
const SWEEP: Duration = Duration::from_secs(10 * 60);

/// What is to become of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing: it is another signer's, or done.
    Nothing,
    /// A certificate of this node.
    Sign(String),
    /// It is refused, for this reason.
    Refuse(String),
}

/// Judges a request to an installation.
pub fn judge(request: &CertificateSigningRequest, installation: &Installation) -> Verdict {
    let (spec, status) = (&request.spec, request.status.as_ref());
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let is = |type_: &str| conditions.iter().any(|condition| condition.type_ == type_);
    let signed = status.and_then(|status| status.certificate.as_ref()).is_some_and(|pem| !pem.0.is_empty());
    if spec.signer_name != SIGNER || signed || is("Denied") || is("Failed") {
        return Verdict::Nothing;
    }
    match node_of(request, installation) {
        Ok(node) => Verdict::Sign(node),
        Err(why) => Verdict::Refuse(why),
    }
}

/// The node that a request may be granted for.
fn node_of(request: &CertificateSigningRequest, installation: &Installation) -> Result<String, String> {
    let spec = &request.spec;
    let handler = installation.user(HANDLER);
    let user = spec.username.as_deref().unwrap_or_default();
    if user != handler {
        return Err(format!("{user} is not {handler}: nobody else gets a node's certificate"));
    }
    let node = match spec.extra.as_ref().and_then(|extra| extra.get(EXTRA_NODE_NAME)).map(Vec::as_slice) {
        Some([node]) if !node.is_empty() => node,
        _ => return Err(format!("the token of {user} does not say on which node its pod is ({EXTRA_NODE_NAME})")),
    };
    let usages = spec.usages.as_deref().unwrap_or_default();
    if let Some(odd) = usages.iter().find(|usage| !USAGES.contains(&usage.as_str())) {
        return Err(format!("a node's certificate is not for {odd:?}, but for {USAGES:?}"));
    }
    let names = names(&spec.request.0)?;
    let wanted = subject(node).common_name;
    if names != [wanted.as_str()] {
        return Err(format!("the request is for {names:?}; a handler on node {node} gets {wanted:?} and nothing else"));
    }
    Ok(node.clone())
}

/// All that a request wants to be called, its common name first.
fn names(pem: &[u8]) -> Result<Vec<String>, String> {
    let unreadable = |why: String| format!("the request cannot be read: {why}");
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem).map_err(|error| unreadable(error.to_string()))?;
    let (_, request) =
        X509CertificationRequest::from_der(&pem.contents).map_err(|error| unreadable(error.to_string()))?;
    let subject = &request.certification_request_info.subject;
    let mut names = Vec::new();
    for attribute in subject.iter_attributes() {
        let text = attribute.as_str().map_err(|error| unreadable(error.to_string()))?;
        let is_common_name = *attribute.attr_type() == x509_parser::oid_registry::OID_X509_COMMON_NAME;
        names.push(if is_common_name { text.to_owned() } else { format!("{}={text}", attribute.attr_type()) });
    }
    for extension in request.requested_extensions().into_iter().flatten() {
        match extension {
            ParsedExtension::SubjectAlternativeName(alternative) => {
                names.extend(alternative.general_names.iter().map(ToString::to_string));
            }
            // What it is for is decided by the signer.
            ParsedExtension::KeyUsage(_) | ParsedExtension::ExtendedKeyUsage(_) => {}
            other => names.push(format!("{other:?}")),
        }
    }
    Ok(names)
}

/// Why a request is not answered yet.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{what}: {source}")]
    Api { what: &'static str, source: kube::Error },
    #[error("there is no CA in Secret {SECRET} yet: `godwit api` makes it")]
    NoAuthority,
    #[error(transparent)]
    Keeper(#[from] crate::keeper::Error),
}

fn api_error(what: &'static str) -> impl FnOnce(kube::Error) -> Error {
    move |source| Error::Api { what, source }
}

/// Answers an installation's requests, for as long as it is polled.
pub async fn run(client: kube::Client, installation: Installation, lifetimes: Lifetimes) {
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let secrets: Api<Secret> = Api::namespaced(client, installation.namespace());
    let config = watcher::Config::default().fields(&format!("spec.signerName={SIGNER}"));
    let mut found = std::pin::pin!(watcher(api.clone(), config.clone()).default_backoff().applied_objects());
    let mut open: BTreeMap<String, CertificateSigningRequest> = BTreeMap::new();
    let mut sweep = tokio::time::interval(SWEEP);
    loop {
        tokio::select! {
            next = found.next() => match next {
                Some(Ok(request)) => drop(open.insert(request.metadata.name.clone().unwrap_or_default(), request)),
                Some(Err(error)) => tracing::warn!(%error, "CertificateSigningRequests cannot be watched; trying again"),
                None => return,
            },
            () = tokio::time::sleep(RETRY), if !open.is_empty() => {}
            _ = sweep.tick() => forget(&api, &installation).await,
        }
        let waiting: Vec<String> = open.keys().cloned().collect();
        for name in waiting {
            let Some(request) = open.get(&name) else { continue };
            match answer(&api, &secrets, (&installation, &lifetimes), request).await {
                // A change that was not seen is seen by the watch.
                Ok(()) => drop(open.remove(&name)),
                Err(Error::Api { source: kube::Error::Api(status), .. }) if matches!(status.code, 404 | 409) => {
                    open.remove(&name);
                }
                Err(error) => tracing::warn!(request = name, "not answered: {error}; trying again"),
            }
        }
    }
}

async fn answer(
    api: &Api<CertificateSigningRequest>,
    secrets: &Api<Secret>,
    (installation, lifetimes): (&Installation, &Lifetimes),
    request: &CertificateSigningRequest,
) -> Result<(), Error> {
    let name = request.metadata.name.as_deref().unwrap_or_default();
    let approved = |request: &CertificateSigningRequest| {
        let conditions = request.status.as_ref().and_then(|status| status.conditions.as_deref());
        conditions.unwrap_or_default().iter().any(|condition| condition.type_ == "Approved")
    };
    match judge(request, installation) {
        Verdict::Nothing => Ok(()),
        Verdict::Refuse(why) => {
            tracing::warn!(request = name, why, "a node's certificate is refused");
            // Who approved it by hand cannot have it denied as well; that it failed can be said.
            let (type_, part) = if approved(request) { ("Failed", "status") } else { ("Denied", "approval") };
            put(api, request, part, |status| add(status, type_, "NotThisNode", &why)).await.map(drop)
        }
        Verdict::Sign(node) => {
            let authority = authority(secrets).await?;
            let pem = String::from_utf8_lossy(&request.spec.request.0);
            let signed = authority.sign(&pem, &subject(&node), crate::now(), lifetimes.certificate);
            let approval = "kubevirt-handler asks for the certificate of the node that it is on";
            let request = if approved(request) {
                request.clone()
            } else {
                put(api, request, "approval", |status| add(status, "Approved", "HandlerOfThisNode", approval)).await?
            };
            let sign = |status: &mut CertificateSigningRequestStatus| match &signed {
                Ok(pem) => status.certificate = Some(ByteString(pem.clone().into_bytes())),
                Err(error) => add(status, "Failed", "NotSigned", &error.to_string()),
            };
            put(api, &request, "status", sign).await?;
            tracing::info!(request = name, node, "a node's certificate is signed");
            Ok(())
        }
    }
}

/// The CA that signs.
async fn authority(secrets: &Api<Secret>) -> Result<Authority, Error> {
    let secret = secrets.get_opt(SECRET).await.map_err(api_error("read the CA"))?.ok_or(Error::NoAuthority)?;
    Authorities::read(&secret)?.current.ok_or(Error::NoAuthority)
}

fn add(status: &mut CertificateSigningRequestStatus, type_: &str, reason: &str, message: &str) {
    status.conditions.get_or_insert_default().push(CertificateSigningRequestCondition {
        type_: type_.to_owned(),
        status: "True".to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        ..CertificateSigningRequestCondition::default()
    });
}

/// Writes a request's status, through one of its subresources, as it was read.
async fn put(
    api: &Api<CertificateSigningRequest>,
    request: &CertificateSigningRequest,
    subresource: &str,
    change: impl FnOnce(&mut CertificateSigningRequestStatus),
) -> Result<CertificateSigningRequest, Error> {
    let mut request = request.clone();
    change(request.status.get_or_insert_default());
    let name = request.metadata.name.clone().unwrap_or_default();
    let params = PostParams::default();
    let written = api.replace_subresource(subresource, &name, &params, &request).await;
    written.map_err(api_error("write the request"))
}

/// Takes away what was answered long ago.
async fn forget(api: &Api<CertificateSigningRequest>, installation: &Installation) {
    let ours = kube::api::ListParams::default().fields(&format!("spec.signerName={SIGNER}"));
    let Ok(all) = api.list(&ours).await else { return };
    for request in all {
        let made = request.metadata.creation_timestamp.as_ref().map(|made| made.0.as_second());
        if judge(&request, installation) == Verdict::Nothing
            && made.is_some_and(|made| crate::now().saturating_sub(made) > KEPT)
            && let Some(name) = &request.metadata.name
            && let Err(error) = api.delete(name, &DeleteParams::default()).await
        {
            tracing::debug!(%error, request = name, "not taken away");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::{self, Authority};
    use crate::node;
    use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, SanType};

    const USER: &str = "system:serviceaccount:kubevirt:kubevirt-handler";

    /// As the API server shows the request that the handler of a node makes for a node.
    fn asked(by: &str, of: &str) -> CertificateSigningRequest {
        let mut request = node::request(of, &KeyPair::generate().unwrap()).unwrap();
        request.spec.username = Some(USER.to_owned());
        request.spec.extra = Some(BTreeMap::from([(EXTRA_NODE_NAME.to_owned(), vec![by.to_owned()])]));
        request
    }

    fn with(change: impl FnOnce(&mut CertificateSigningRequest)) -> Verdict {
        let mut request = asked("node1", "node1");
        change(&mut request);
        judge(&request, &Installation::USUAL)
    }

    fn refusal(change: impl FnOnce(&mut CertificateSigningRequest)) -> String {
        match with(change) {
            Verdict::Refuse(why) => why,
            other => panic!("{other:?}"),
        }
    }

    /// A request for other names, or for more.
    fn pem(change: impl FnOnce(&mut CertificateParams)) -> ByteString {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "system:node:node1");
        change(&mut params);
        let request = params.serialize_request(&KeyPair::generate().unwrap()).unwrap();
        ByteString(request.pem().unwrap().into_bytes())
    }

    #[test]
    fn a_handler_gets_the_certificate_of_its_own_node() {
        let judge = |request, namespace: &str| judge(&request, &Installation::new(namespace));
        assert_eq!(judge(asked("node1", "node1"), "kubevirt"), Verdict::Sign("node1".to_owned()));
        let Verdict::Refuse(why) = judge(asked("node1", "node1"), "elsewhere") else { panic!() };
        assert!(why.contains("is not system:serviceaccount:elsewhere:kubevirt-handler"), "{why}");
        let Verdict::Refuse(why) = judge(asked("node1", "node2"), "kubevirt") else { panic!() };
        assert!(why.contains("\"system:node:node1\" and nothing else"), "{why}");
    }

    #[test]
    fn nobody_else_gets_one() {
        for user in
            ["", "admin", "system:serviceaccount:default:kubevirt-handler", "system:serviceaccount:kubevirt:other"]
        {
            let why = refusal(|request| request.spec.username = Some(user.to_owned()));
            assert!(why.contains("nobody else"), "{why}");
        }
        assert!(refusal(|request| request.spec.extra = None).contains("does not say on which node"));
        let two = vec!["node1".to_owned(), "node2".to_owned()];
        let extra = BTreeMap::from([(EXTRA_NODE_NAME.to_owned(), two)]);
        assert!(refusal(|request| request.spec.extra = Some(extra)).contains("does not say on which node"));
        let usages = Some(vec!["cert sign".to_owned()]);
        assert!(refusal(|request| request.spec.usages = usages).contains("\"cert sign\""));
    }

    #[test]
    fn a_request_for_more_than_the_node_is_refused() {
        let more: [fn(&mut CertificateParams); 5] = [
            |params| params.distinguished_name.push(DnType::OrganizationName, "system:masters"),
            |params| params.distinguished_name.push(DnType::CommonName, "kubevirt.io:system:client:virt-handler"),
            |params| params.subject_alt_names.push(SanType::DnsName("node2".try_into().unwrap())),
            |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained),
            |params| params.distinguished_name = DistinguishedName::new(),
        ];
        for change in more {
            let wanted = pem(change);
            let why = refusal(|request| request.spec.request = wanted);
            assert!(why.contains("and nothing else"), "{why}");
        }
        let junk = ByteString(b"junk".to_vec());
        assert!(refusal(|request| request.spec.request = junk).contains("cannot be read"));
    }

    #[test]
    fn what_is_done_or_anothers_is_left_alone() {
        assert_eq!(
            with(|request| request.spec.signer_name = "kubernetes.io/kubelet-serving".to_owned()),
            Verdict::Nothing
        );
        for type_ in ["Denied", "Failed"] {
            let denied = with(|request| add(request.status.get_or_insert_default(), type_, "x", "y"));
            assert_eq!(denied, Verdict::Nothing);
        }
        let certificate = Some(ByteString(b"pem".to_vec()));
        assert_eq!(with(|request| request.status.get_or_insert_default().certificate = certificate), Verdict::Nothing);
        let approved = with(|request| add(request.status.get_or_insert_default(), "Approved", "x", "y"));
        assert_eq!(approved, Verdict::Sign("node1".to_owned()));
    }

    #[test]
    fn what_is_signed_has_the_requests_key_and_the_signers_names() {
        let authority = Authority::make(1_800_000_000, Duration::from_secs(3600)).unwrap();
        let request = asked("node1", "node1");
        let text = String::from_utf8(request.spec.request.0.clone()).unwrap();
        let signed = authority.sign(&text, &subject("node1"), 1_800_000_000, Duration::from_secs(60)).unwrap();
        assert_eq!(authority::validity(&signed, "x").unwrap().not_after, 1_800_000_060);
        let (_, pem) = x509_parser::pem::parse_x509_pem(signed.as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        let (_, asked) = x509_parser::pem::parse_x509_pem(text.as_bytes()).unwrap();
        let (_, asked) = X509CertificationRequest::from_der(&asked.contents).unwrap();
        let key = &asked.certification_request_info.subject_pki.subject_public_key.data;
        assert_eq!(&certificate.public_key().subject_public_key.data, key);
        assert_eq!(certificate.subject().to_string(), "CN=system:node:node1");
        assert!(!certificate.is_ca());
    }
}
