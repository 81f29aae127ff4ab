//! Taking and renewing the node's lease.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use godwit_api::names::fence::{DURATION, LEASE_PREFIX, RENEW_EVERY};
use godwit_api::names::{
    ANNOTATION_FENCE_ADDRESS, ANNOTATION_FENCE_PEERS, ANNOTATION_NODE_LOST, FENCE_NO_PEERS, KUBEVIRT_NAMESPACE,
};
use godwit_launcher::fence::now;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Api, PostParams};

use super::Surroundings;
use super::enforce::{Whom, strike};
use super::peers::Others;
use super::rules::Peers;

/// How long a renewal may take before it counts as not answered.
const LIMIT: Duration = Duration::from_secs(4);
/// After a failure, before the next attempt.
const RETRY: Duration = Duration::from_millis(500);

/// Why the lease was not renewed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Api(#[from] kube::Error),
    #[error("the API does not answer within {LIMIT:?}")]
    Late,
    #[error("the controller counts this node's guests as dead, and not all of them are")]
    NotDead,
}

struct Keeper {
    around: Arc<Surroundings>,
    api: Api<Lease>,
    name: String,
    identity: String,
    acquired: Timestamp,
    address: Option<String>,
    /// As it was last read or written here; none: not known.
    lease: Option<Lease>,
    /// The last revision of it that was seen here.
    seen: Option<String>,
}

/// Renews the lease for ever.
pub(super) async fn keep(around: Arc<Surroundings>, others: Arc<Others>, address: Option<String>) {
    let mut keeper = Keeper {
        api: Api::namespaced(around.client.clone(), KUBEVIRT_NAMESPACE),
        name: format!("{LEASE_PREFIX}{}", around.node),
        identity: format!("{}/{}-{}", around.node, std::process::id(), now().as_millis()),
        acquired: Timestamp::now(),
        address,
        lease: None,
        seen: None,
        around,
    };
    let began = std::time::Instant::now();
    let mut said = String::new();
    loop {
        let sent = now();
        let wait = match keeper.renew(others.to_name()).await {
            Ok(()) => {
                if !std::mem::take(&mut said).is_empty() {
                    tracing::info!(lease = keeper.name, "the node's lease is renewed again");
                }
                RENEW_EVERY.saturating_sub(now().saturating_sub(sent))
            }
            Err(failure) => {
                keeper.lease = None;
                let early = matches!(&failure, Failure::Api(error) if crate::is_early(error, began.elapsed()));
                let what = failure.to_string();
                if said != what && !early {
                    tracing::warn!(lease = keeper.name, error = what, "the node's lease is not renewed; trying again");
                    said = what;
                }
                RETRY
            }
        };
        tokio::time::sleep(wait).await;
    }
}

impl Keeper {
    async fn renew(&mut self, peers: Peers) -> Result<(), Failure> {
        if self.lease.is_none() {
            self.lease = limited(self.api.get_opt(&self.name)).await?;
            let revision = self.lease.as_ref().and_then(|lease| lease.metadata.resource_version.clone());
            // Not any reading: where nothing can be written for anybody, all of them read the same again and again, and may say
            // that they have no contact.
            if revision.is_none() || revision != self.seen {
                self.around.fence.finds_news();
            }
            self.seen = revision;
        }
        if self.lease.as_ref().is_some_and(is_lost) {
            // Whatever was here may run elsewhere by now, and what has no guest yet must not get one.
            self.around.fence.found_lost();
            if !strike(&self.around.kubelet_root, self.around.fence.met(), Whom::Launchers).await {
                return Err(Failure::NotDead);
            }
        }
        let lease = self.next(&peers);
        self.around.fence.sends(peers.clone());
        let sent = now();
        let params = PostParams::default();
        let written = match &self.lease {
            // On the revision that was last heard of here: whoever sees this renewal knows that the one before it was.
            Some(_) => limited(self.api.replace(&self.name, &params, &lease)).await?,
            None => limited(self.api.create(&params, &lease)).await?,
        };
        self.around.fence.answered(sent, peers);
        self.seen.clone_from(&written.metadata.resource_version);
        self.lease = Some(written);
        Ok(())
    }

    fn next(&self, peers: &Peers) -> Lease {
        let mut annotations = BTreeMap::new();
        if let Some(peers) = peers {
            let names = peers.iter().map(String::as_str).collect::<Vec<_>>().join(",");
            let names = if names.is_empty() { FENCE_NO_PEERS.to_owned() } else { names };
            annotations.insert(ANNOTATION_FENCE_PEERS.to_owned(), names);
        }
        if let Some(address) = &self.address {
            annotations.insert(ANNOTATION_FENCE_ADDRESS.to_owned(), address.clone());
        }
        let known = self.lease.as_ref();
        let metadata = ObjectMeta {
            name: Some(self.name.clone()),
            namespace: Some(KUBEVIRT_NAMESPACE.to_owned()),
            annotations: Some(annotations),
            resource_version: known.and_then(|lease| lease.metadata.resource_version.clone()),
            ..ObjectMeta::default()
        };
        let spec = LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: Some(MicroTime(self.acquired)),
            renew_time: Some(MicroTime(Timestamp::now())),
            ..LeaseSpec::default()
        };
        Lease { metadata, spec: Some(spec) }
    }
}

/// Whether the controller has written that it counts the node's guests as dead.
fn is_lost(lease: &Lease) -> bool {
    lease.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(ANNOTATION_NODE_LOST))
}

async fn limited<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Failure> {
    match tokio::time::timeout(LIMIT, call).await {
        Ok(answer) => answer.map_err(Failure::Api),
        Err(_) => Err(Failure::Late),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::net::Ipv4Addr;
    use std::sync::atomic::{AtomicU32, Ordering};

    use http::{Method, Request, Response};
    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;
    use crate::events::Events;
    use crate::fence::Fence;
    use crate::tls::TlsPaths;

    /// An API that holds one lease, of this revision, takes what is written to it if it shall, and never says so.
    fn mute(revision: Arc<AtomicU32>, takes: bool) -> kube::Client {
        let service = tower::service_fn(move |request: Request<Body>| {
            let write = request.method() == Method::PUT;
            if write && takes {
                revision.fetch_add(1, Ordering::Relaxed);
            }
            let now = revision.load(Ordering::Relaxed).to_string();
            let lease =
                json!({"metadata": {"name": "virt-handler-a", "namespace": "kubevirt", "resourceVersion": now}});
            let error = json!({"kind": "Status", "status": "Failure", "reason": "InternalError", "code": 500});
            let (code, body): (u16, Value) = if write { (500, error) } else { (200, lease) };
            let answer = Response::builder().status(code).body(Body::from(serde_json::to_vec(&body).unwrap()));
            async move { Ok::<_, Infallible>(answer.unwrap()) }
        });
        kube::Client::new(service, "default")
    }

    /// Whether a renewal that nobody answers, after one that nobody answered, counts as contact all the same.
    async fn is_contact(takes: bool) -> bool {
        let client = mute(Arc::new(AtomicU32::new(1)), takes);
        let folder = tempfile::tempdir().unwrap();
        let pem = folder.path().join("none.pem");
        let around = Arc::new(Surroundings {
            client: client.clone(),
            node: "a".to_owned(),
            node_ip: Ipv4Addr::LOCALHOST.into(),
            kubelet_root: folder.path().to_owned(),
            tls: TlsPaths { ca: pem.clone(), cert: pem.clone(), key: pem },
            events: Events::start(client.clone(), "a".to_owned()),
            fence: Fence::begin(),
        });
        let mut keeper = Keeper {
            api: Api::namespaced(client, KUBEVIRT_NAMESPACE),
            name: "virt-handler-a".to_owned(),
            identity: "a/1".to_owned(),
            acquired: Timestamp::now(),
            address: None,
            lease: None,
            seen: None,
            around: around.clone(),
        };
        assert!(keeper.renew(None).await.is_err());
        let before = around.fence.lock().rules.clone();
        keeper.lease = None;
        assert!(keeper.renew(None).await.is_err());
        let after = around.fence.lock().rules.clone();
        assert!(after.until().is_none(), "guests get no time by it");
        after != before
    }

    #[tokio::test]
    async fn a_renewal_that_was_taken_is_contact_even_if_only_the_lease_tells_and_reading_alone_is_not() {
        assert!(is_contact(true).await, "the next one that is taken shows that this node knew of it");
        assert!(!is_contact(false).await, "where nobody can write, everybody is silent");
    }
}
