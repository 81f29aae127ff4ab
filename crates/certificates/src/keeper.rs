//! The CA in its Secret, and its certificate wherever it has to be known.
//!
//! Any number of processes may keep it at the same time: each write carries the revision that was read, and whoever comes late
//! reads again.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::authority::{self, Authority};
use crate::schedule::{Held, Lifetimes, Step, Validity, due};

/// The Secret with the CA.
pub const SECRET: &str = "godwit-ca";
/// The ConfigMap with the certificates of all CAs that count.
pub const BUNDLE: &str = "godwit-ca-bundle";
/// The ConfigMap's only key.
pub const BUNDLE_KEY: &str = "ca-bundle.crt";

const CURRENT: [&str; 2] = ["ca.crt", "ca.key"];
const NEXT: [&str; 2] = ["next.crt", "next.key"];
const PREVIOUS: &str = "previous.crt";

/// Why the CA is not kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or could not be reached.
    #[error("{what}: {source}")]
    Api {
        /// What was tried.
        what: String,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// The Secret holds something else.
    #[error("{0}; delete the Secret, and a new CA is made")]
    Secret(authority::Error),
    /// A certificate cannot be made.
    #[error(transparent)]
    Make(authority::Error),
    /// Others write all the time.
    #[error("Secret {SECRET} was changed by others each time; trying again")]
    Busy,
}

impl Error {
    /// Whether somebody else was faster.
    fn is_overtaken(&self) -> bool {
        // 422: the test of the revision in a JSON patch.
        matches!(self, Self::Api { source, .. } if is(source, 409) || is(source, 422))
    }
}

fn api_error(what: impl Into<String>) -> impl FnOnce(kube::Error) -> Error {
    let what = what.into();
    move |source| Error::Api { what, source: Box::new(source) }
}

fn is(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

/// The CAs in the Secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Authorities {
    /// The one that signs.
    pub current: Option<Authority>,
    next: Option<Authority>,
    /// PEM certificates of those that have signed.
    previous: Vec<(String, Validity)>,
}

impl Authorities {
    pub(crate) fn read(secret: &Secret) -> Result<Self, Error> {
        let text = |key: &str| {
            let bytes = secret.data.as_ref()?.get(key)?;
            Some(String::from_utf8_lossy(&bytes.0).into_owned()).filter(|text| !text.is_empty())
        };
        let pair = |[certificate, key]: [&str; 2]| {
            let what = format!("{certificate} in Secret {SECRET}");
            match (text(certificate), text(key)) {
                (Some(certificate), Some(key)) => Authority::read(&certificate, &key, &what).map(Some),
                _ => Ok(None),
            }
        };
        let previous = authority::split(&text(PREVIOUS).unwrap_or_default());
        let previous = previous.into_iter().map(|pem| {
            let validity = authority::validity(&pem, &format!("{PREVIOUS} in Secret {SECRET}"))?;
            Ok::<_, authority::Error>((pem, validity))
        });
        let read =
            || Ok(Self { current: pair(CURRENT)?, next: pair(NEXT)?, previous: previous.collect::<Result<_, _>>()? });
        read().map_err(Error::Secret)
    }

    fn data(&self) -> BTreeMap<String, ByteString> {
        let mut data = BTreeMap::new();
        let mut set = |key: &str, text: &str| data.insert(key.to_owned(), ByteString(text.as_bytes().to_vec()));
        for ([certificate, key], authority) in [(CURRENT, &self.current), (NEXT, &self.next)] {
            if let Some(authority) = authority {
                set(certificate, &authority.certificate);
                set(key, &authority.key);
            }
        }
        if !self.previous.is_empty() {
            set(PREVIOUS, &self.previous.iter().map(|(pem, _)| pem.as_str()).collect::<String>());
        }
        data
    }

    fn held(&self) -> Held {
        Held {
            current: self.current.as_ref().map(|one| one.validity),
            next: self.next.as_ref().map(|one| one.validity),
            previous: self.previous.iter().map(|(_, validity)| *validity).collect(),
        }
    }

    /// The certificates of all of them, the one that signs first.
    pub fn bundle(&self) -> String {
        let pairs = self.current.iter().chain(&self.next).map(|one| one.certificate.as_str());
        pairs.chain(self.previous.iter().map(|(pem, _)| pem.as_str())).collect()
    }

    fn advance(mut self, step: Step, now: i64, lifetimes: &Lifetimes) -> Result<Self, Error> {
        let make = || Authority::make(now, lifetimes.authority).map_err(Error::Make);
        match step {
            Step::Begin => self = Self { current: Some(make()?), ..Self::default() },
            Step::Prepare => self.next = Some(make()?),
            Step::Promote => {
                let before = std::mem::replace(&mut self.current, self.next.take());
                self.previous.extend(before.map(|one| (one.certificate, one.validity)));
            }
            Step::Forget => {}
        }
        self.previous.retain(|(_, validity)| !validity.is_over(now));
        Ok(self)
    }
}

/// What is told which CAs count.
#[derive(Clone, Debug, Default)]
pub struct Trusting {
    /// Names of MutatingWebhookConfigurations.
    pub mutating: Vec<String>,
    /// Names of ValidatingWebhookConfigurations.
    pub validating: Vec<String>,
    /// Names of APIServices.
    pub api_services: Vec<String>,
}

/// Keeps the CA.
pub struct Keeper {
    client: kube::Client,
    namespace: String,
    lifetimes: Lifetimes,
    trusting: Trusting,
    /// The bundle that is known to be published everywhere, and since when.
    published: Option<(String, i64)>,
}

/// How often a write is tried when others write, too.
const ATTEMPTS: usize = 8;

impl Keeper {
    /// Of the CA in a namespace.
    pub fn new(client: kube::Client, namespace: &str, lifetimes: Lifetimes, trusting: Trusting) -> Self {
        Self { client, namespace: namespace.to_owned(), lifetimes, trusting, published: None }
    }

    /// Does what is due now: makes the CA or replaces it, and publishes it. Says which CAs there are; when that could not be
    /// told to all that have to know it, also why.
    ///
    /// # Errors
    /// The Secret cannot be read or written.
    pub async fn tend(&mut self, now: i64) -> Result<(Authorities, Result<(), Error>), Error> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        for attempt in 1..=ATTEMPTS {
            let found = secrets.get_opt(SECRET).await.map_err(api_error(format!("read Secret {SECRET}")))?;
            let known = found.as_ref().map(Authorities::read).transpose()?.unwrap_or_default();
            let bundle = known.bundle();
            let told = if known.current.is_some() { self.publish(&bundle).await } else { Ok(()) };
            // Others tell it, too; what they have told is read again.
            if attempt < ATTEMPTS && told.as_ref().is_err_and(Error::is_overtaken) {
                continue;
            }
            match (&told, &self.published) {
                (Ok(()), Some((before, _))) if *before == bundle => {}
                (Ok(()), _) => self.published = Some((bundle, now)),
                (Err(_), _) => self.published = None,
            }
            let since = self.published.as_ref().map(|(_, since)| *since);
            let Some(step) = due(&known.held(), since, now, &self.lifetimes) else { return Ok((known, told)) };
            let next = known.advance(step, now, &self.lifetimes)?;
            match self.write(&secrets, found, &next).await {
                Ok(()) => tracing::info!(?step, "the CA in Secret {}/{SECRET} has been changed", self.namespace),
                // Somebody else was first.
                Err(error) if is(&error, 409) => {}
                Err(error) => return Err(api_error(format!("write Secret {SECRET}"))(error)),
            }
        }
        Err(Error::Busy)
    }

    async fn write(&self, api: &Api<Secret>, found: Option<Secret>, next: &Authorities) -> Result<(), kube::Error> {
        let params = PostParams::default();
        match found {
            Some(mut secret) => {
                secret.data = Some(next.data());
                api.replace(SECRET, &params, &secret).await.map(drop)
            }
            None => {
                let metadata = ObjectMeta { name: Some(SECRET.to_owned()), ..ObjectMeta::default() };
                let secret = Secret { metadata, data: Some(next.data()), ..Secret::default() };
                api.create(&params, &secret).await.map(drop)
            }
        }
    }

    /// Tells all that have to know which CAs count.
    async fn publish(&self, bundle: &str) -> Result<(), Error> {
        // First of all: what is written later may be put to these webhooks.
        let encoded = BASE64_STANDARD.encode(bundle);
        let mutating: Api<MutatingWebhookConfiguration> = Api::all(self.client.clone());
        for name in &self.trusting.mutating {
            let what = format!("tell MutatingWebhookConfiguration {name} the CA");
            inject(&mutating, name, |object| in_webhooks(object, &encoded)).await.map_err(api_error(what))?;
        }
        let validating: Api<ValidatingWebhookConfiguration> = Api::all(self.client.clone());
        for name in &self.trusting.validating {
            let what = format!("tell ValidatingWebhookConfiguration {name} the CA");
            inject(&validating, name, |object| in_webhooks(object, &encoded)).await.map_err(api_error(what))?;
        }
        let services: Api<APIService> = Api::all(self.client.clone());
        for name in &self.trusting.api_services {
            let what = format!("tell APIService {name} the CA");
            let set = |object: &Value| in_api_service(object, &encoded);
            inject(&services, name, set).await.map_err(api_error(what))?;
        }
        self.publish_bundle(bundle).await
    }

    async fn publish_bundle(&self, bundle: &str) -> Result<(), Error> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let failed = || api_error(format!("publish the CA in ConfigMap {BUNDLE}"));
        let data = BTreeMap::from([(BUNDLE_KEY.to_owned(), bundle.to_owned())]);
        let Some(found) = maps.get_opt(BUNDLE).await.map_err(failed())? else {
            let metadata = ObjectMeta { name: Some(BUNDLE.to_owned()), ..ObjectMeta::default() };
            let map = ConfigMap { metadata, data: Some(data), ..ConfigMap::default() };
            return maps.create(&PostParams::default(), &map).await.map(drop).map_err(failed());
        };
        if found.data.as_ref() == Some(&data) {
            return Ok(());
        }
        let patch = json!({ "metadata": { "resourceVersion": found.metadata.resource_version }, "data": data });
        maps.patch(BUNDLE, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop).map_err(failed())
    }
}

/// The JSON patch that tells the webhooks of a configuration the CA; those that are reached by an URL are not ours.
fn in_webhooks(object: &Value, bundle: &str) -> Vec<Value> {
    let webhooks = object.get("webhooks").and_then(Value::as_array);
    let differs = |webhook: &Value| {
        let client = webhook.get("clientConfig");
        let ours = client.and_then(|client| client.get("service")).is_some_and(|service| !service.is_null());
        ours && client.and_then(|client| client.get("caBundle")).and_then(Value::as_str) != Some(bundle)
    };
    let wrong = webhooks.into_iter().flatten().enumerate().filter(|(_, webhook)| differs(webhook));
    wrong
        .map(|(at, _)| json!({ "op": "add", "path": format!("/webhooks/{at}/clientConfig/caBundle"), "value": bundle }))
        .collect()
}

/// The JSON patch that tells an APIService the CA.
fn in_api_service(object: &Value, bundle: &str) -> Vec<Value> {
    let spec = object.get("spec");
    if spec.and_then(|spec| spec.get("caBundle")).and_then(Value::as_str) == Some(bundle) {
        return Vec::new();
    }
    let mut patch = vec![json!({ "op": "add", "path": "/spec/caBundle", "value": bundle })];
    if spec.and_then(|spec| spec.get("insecureSkipTLSVerify")).is_some() {
        patch.push(json!({ "op": "remove", "path": "/spec/insecureSkipTLSVerify" }));
    }
    patch
}

/// Changes an object that is there, as it was read.
async fn inject<K>(api: &Api<K>, name: &str, change: impl Fn(&Value) -> Vec<Value>) -> Result<(), kube::Error>
where
    K: Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned + kube::Resource,
{
    // Whoever has not installed it yet, or without it, is not waited for.
    let Some(object) = api.get_opt(name).await? else { return Ok(()) };
    let value = serde_json::to_value(&object).map_err(kube::Error::SerdeError)?;
    let mut patch = change(&value);
    if patch.is_empty() {
        return Ok(());
    }
    let revision = object.meta().resource_version.clone();
    patch.insert(0, json!({ "op": "test", "path": "/metadata/resourceVersion", "value": revision }));
    let patch: json_patch::Patch = serde_json::from_value(Value::Array(patch)).map_err(kube::Error::SerdeError)?;
    api.patch(name, &PatchParams::default(), &Patch::Json::<()>(patch)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_webhooks_of_a_service_are_told_and_only_what_is_new() {
        let configuration = json!({ "webhooks": [
            { "name": "a", "clientConfig": { "service": { "name": "virt-api" } } },
            { "name": "b", "clientConfig": { "service": { "name": "virt-api" }, "caBundle": "new" } },
            { "name": "c", "clientConfig": { "url": "https://elsewhere", "caBundle": "theirs" } },
            { "name": "d", "clientConfig": { "service": { "name": "virt-api" }, "caBundle": "old" } },
        ]});
        let paths: Vec<Value> = in_webhooks(&configuration, "new").iter().map(|one| one["path"].clone()).collect();
        assert_eq!(paths, ["/webhooks/0/clientConfig/caBundle", "/webhooks/3/clientConfig/caBundle"]);
        assert!(in_webhooks(&json!({}), "new").is_empty() && in_webhooks(&Value::Null, "new").is_empty());
        assert!(in_api_service(&json!({ "spec": { "caBundle": "new" } }), "new").is_empty());
        let unsafe_one = json!({ "spec": { "insecureSkipTLSVerify": true } });
        assert_eq!(in_api_service(&unsafe_one, "new")[1]["op"], "remove");
    }

    #[test]
    fn what_is_kept_in_the_secret_is_read_again() {
        let lifetimes = Lifetimes::default();
        let first = Authorities::default().advance(Step::Begin, 1_800_000_000, &lifetimes).unwrap();
        let second = first.clone().advance(Step::Prepare, 1_806_000_000, &lifetimes).unwrap();
        let third = second.clone().advance(Step::Promote, 1_806_010_000, &lifetimes).unwrap();
        for one in [&first, &second, &third] {
            let secret = Secret { data: Some(one.data()), ..Secret::default() };
            assert_eq!(&Authorities::read(&secret).unwrap(), one);
        }
        assert_eq!(third.current, second.next);
        assert_eq!(authority::split(&third.bundle()).len(), 2);
        let last = third.advance(Step::Forget, 1_900_000_000, &lifetimes).unwrap();
        assert_eq!(authority::split(&last.bundle()).len(), 1);
        let data = BTreeMap::from([
            ("ca.crt".to_owned(), ByteString(b"rubbish".to_vec())),
            ("ca.key".to_owned(), ByteString(b"rubbish".to_vec())),
        ]);
        let error = Authorities::read(&Secret { data: Some(data), ..Secret::default() }).unwrap_err().to_string();
        assert!(error.contains("Secret godwit-ca") && error.contains("delete the Secret"), "{error}");
    }
}
