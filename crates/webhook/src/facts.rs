//! What the rules want to know of other objects, read from the API server.
//!
//! The rules are pure functions that look things up; reading takes time. So a rule is asked, what it looked for and is not
//! known yet is read, and it is asked again, until nothing is missing.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use godwit_api::Installation;
use godwit_api::admission::{Lookup, resource_of};
use kube::Api;
use kube::api::{ApiResource, DynamicObject, ListParams};
use serde_json::Value;

/// The API server waits ten seconds for a webhook.
const READ_TIMEOUT: Duration = Duration::from_secs(4);
/// What is only worth a warning may not make the review late.
const READ_TO_WARN_TIMEOUT: Duration = Duration::from_secs(1);
/// A rule asks for two or three things in turn.
const ROUNDS: usize = 8;

/// One thing to look up.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Question {
    /// One object.
    Get {
        /// Its kind.
        kind: String,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// All objects, or those with the label.
    List {
        /// Their kind.
        kind: String,
        /// Their namespace, empty for all.
        namespace: String,
        /// A label and its value.
        label: Option<(String, String)>,
    },
}

/// What the answer to a question is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Purpose {
    /// To allow, refuse or change the request: without it there is no verdict.
    Verdict,
    /// To warn whoever asks: what cannot be read is not warned of.
    Warning,
}

/// Why something could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or could not be reached.
    #[error("cannot read {what} from the API server: {source}")]
    Read {
        /// What.
        what: String,
        /// Why.
        source: Box<kube::Error>,
    },
    /// It did not answer.
    #[error("cannot read {0} from the API server: no answer in {1:?}")]
    Late(String, Duration),
    /// A rule asks on and on.
    #[error("the rule does not come to an end")]
    Endless,
}

/// What has been read so far.
#[derive(Debug, Default)]
pub struct Facts(BTreeMap<(Question, Purpose), Vec<Value>>);

/// Where objects are read, and of which installation.
#[derive(Clone)]
pub struct Cluster {
    /// Its API server.
    pub client: kube::Client,
    /// Where godwit is installed.
    pub installation: Installation,
}

/// The facts as a rule sees them; notes what is missing.
struct Known<'a> {
    installation: &'a Installation,
    facts: &'a Facts,
    missing: RefCell<BTreeSet<(Question, Purpose)>>,
}

impl Known<'_> {
    fn answer(&self, question: Question, purpose: Purpose) -> Vec<Value> {
        let asked = (question, purpose);
        self.facts.0.get(&asked).cloned().unwrap_or_else(|| {
            self.missing.borrow_mut().insert(asked);
            Vec::new()
        })
    }
}

impl Lookup for Known<'_> {
    fn installation(&self) -> &Installation {
        self.installation
    }

    fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let question = Question::Get { kind: kind.to_owned(), namespace: namespace.to_owned(), name: name.to_owned() };
        self.answer(question, Purpose::Verdict).into_iter().next()
    }

    fn list(&self, kind: &str, namespace: &str, label: Option<(&str, &str)>) -> Vec<Value> {
        let label = label.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let question = Question::List { kind: kind.to_owned(), namespace: namespace.to_owned(), label };
        self.answer(question, Purpose::Verdict)
    }

    fn list_to_warn(&self, kind: &str) -> Vec<Value> {
        let question = Question::List { kind: kind.to_owned(), namespace: String::new(), label: None };
        self.answer(question, Purpose::Warning)
    }
}

/// Asks a rule until it has seen all that it looks for.
///
/// # Errors
/// When something could not be read, but for what is only worth a warning; the rule's verdict is then worth nothing.
pub async fn ask<T>(cluster: &Cluster, mut rule: impl FnMut(&dyn Lookup) -> T) -> Result<T, Error> {
    let mut facts = Facts::default();
    for _ in 0..ROUNDS {
        let (verdict, missing) = {
            let known = Known { installation: &cluster.installation, facts: &facts, missing: RefCell::default() };
            (rule(&known), known.missing.into_inner())
        };
        if missing.is_empty() {
            return Ok(verdict);
        }
        for (question, purpose) in missing {
            let limit = match purpose {
                Purpose::Verdict => READ_TIMEOUT,
                Purpose::Warning => READ_TO_WARN_TIMEOUT,
            };
            let found = tokio::time::timeout(limit, read(&cluster.client, &question))
                .await
                .unwrap_or_else(|_| Err(Error::Late(question.what(), limit)));
            let found = match (found, purpose) {
                (Err(error), Purpose::Warning) => {
                    tracing::warn!(%error, "what would be warned of is not known");
                    Vec::new()
                }
                (found, _) => found?,
            };
            facts.0.insert((question, purpose), found);
        }
    }
    Err(Error::Endless)
}

impl Question {
    fn what(&self) -> String {
        match self {
            Self::Get { kind, namespace, name } => format!("{kind} {namespace}/{name}"),
            Self::List { kind, namespace, .. } => format!("the objects of kind {kind} in {namespace:?}"),
        }
    }
}

async fn read(client: &kube::Client, question: &Question) -> Result<Vec<Value>, Error> {
    let failed = |source| Error::Read { what: question.what(), source: Box::new(source) };
    let value = |object: DynamicObject| serde_json::to_value(object).unwrap_or_default();
    match question {
        // an object without a name cannot exist, and its path would be that of the list
        Question::Get { name, .. } if name.is_empty() => Ok(Vec::new()),
        Question::Get { kind, namespace, name } => {
            match api(client, kind, namespace).get_opt(name).await {
                Ok(found) => Ok(found.map(value).into_iter().collect()),
                // Kubernetes asks who may see a thing before it looks whether there is one, and only OpenShift has these: whose
                // account may see none of them has none, or could have no maintenance of any control plane.
                Err(kube::Error::Api(status)) if status.code == 403 && kind == "ClusterVersion" => {
                    tracing::debug!(%status, "not allowed to read {}: this is taken to be no OpenShift", question.what());
                    Ok(Vec::new())
                }
                Err(error) => Err(failed(error)),
            }
        }
        Question::List { kind, namespace, label } => {
            let parameters = match label {
                Some((key, value)) => ListParams::default().labels(&format!("{key}={value}")),
                None => ListParams::default(),
            };
            let found = api(client, kind, namespace).list(&parameters).await.map_err(failed)?;
            Ok(found.items.into_iter().map(value).collect())
        }
    }
}

/// The objects of a kind that the rules look up.
pub(crate) fn api(client: &kube::Client, kind: &str, namespace: &str) -> Api<DynamicObject> {
    let (group, version, plural) = resource_of(kind);
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    let kind = kind.split('.').next().unwrap_or(kind).to_owned();
    let resource = ApiResource { group: group.to_owned(), version: version.to_owned(), api_version, kind, plural };
    match namespace {
        "" => Api::all_with(client.clone(), &resource),
        _ => Api::namespaced_with(client.clone(), namespace, &resource),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::SocketAddr;

    use bytes::Bytes;
    use http::{Request, Response};
    use http_body_util::Full;
    use hyper::body::Incoming;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use serde_json::json;

    use super::*;

    /// An API server that has these objects, by their paths, and else answers with this code.
    async fn server(objects: Vec<(String, Value)>, code: u16) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = move |request: Request<Incoming>| {
            let found = objects.iter().find(|(path, _)| path == request.uri().path()).map(|(_, object)| object.clone());
            let reason = if code == 404 { "NotFound" } else { "" };
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "code": code, "reason": reason});
            let (code, body) = found.map_or((code, status), |object| (200, object));
            std::future::ready(Response::builder().status(code).body(Full::new(Bytes::from(body.to_string()))))
        };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let served = hyper::server::conn::http1::Builder::new();
                tokio::spawn(served.serve_connection(TokioIo::new(stream), service_fn(answer.clone())));
            }
        });
        address
    }

    /// The cluster of such a server.
    pub(crate) async fn cluster(objects: Vec<(String, Value)>, code: u16) -> Cluster {
        at(server(objects, code).await)
    }

    /// The cluster of the server at this address.
    pub(crate) fn at(address: SocketAddr) -> Cluster {
        let uri = format!("http://{address}").parse().unwrap();
        let client = kube::Client::try_from(kube::Config::new(uri)).unwrap();
        Cluster { client, installation: Installation::default() }
    }

    #[tokio::test]
    async fn who_may_not_see_openshifts_version_is_on_none() {
        let forbidden = cluster(Vec::new(), 403).await;
        let version = ask(&forbidden, |lookup| lookup.get("ClusterVersion", "", "version")).await;
        assert_eq!(version.unwrap(), None);
        // Of what every cluster has, that is an error.
        let node = ask(&forbidden, |lookup| lookup.get("Node", "", "node1")).await;
        assert!(node.unwrap_err().to_string().starts_with("cannot read Node /node1 from the API server"));
        let broken = cluster(Vec::new(), 500).await;
        assert!(ask(&broken, |lookup| lookup.get("ClusterVersion", "", "version")).await.is_err());
    }
}
