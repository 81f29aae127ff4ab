//! Taking and renewing the node's lease.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use godwit_api::names::fence::{DURATION, LEASE_PREFIX, RENEW_EVERY};
use godwit_api::names::{ANNOTATION_FENCE_ADDRESS, ANNOTATION_FENCE_PEERS, ANNOTATION_NODE_LOST, FENCE_NO_PEERS};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::Resource;
use kube::api::{Api, PostParams};

use super::Surroundings;
use super::enforce::{NotDead, Whom, strike};
use super::peers::Others;
use super::report;
use super::rules::Peers;

/// How long a renewal may take before it counts as not answered.
const LIMIT: Duration = Duration::from_secs(4);
/// How long the API may take to show the node.
const OWNER_LIMIT: Duration = Duration::from_millis(500);
/// After a failure, before the next attempt.
const RETRY: Duration = Duration::from_millis(500);

/// Why the lease was not renewed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Api(#[from] kube::Error),
    #[error("the API does not answer within {LIMIT:?}")]
    Late,
    #[error("the controller counts this node's guests as dead, and not all of them are: {0}")]
    LostNotDead(NotDead),
    #[error("the node's lease is gone, and not all that it covered is dead: {0}")]
    GoneNotDead(NotDead),
    #[error("what the next handler of this node would have to know cannot be written down: {0}")]
    NotKept(#[from] std::io::Error),
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
    /// Its node.
    owner: Option<OwnerReference>,
}

/// Renews the lease for ever.
pub(super) async fn keep(around: Arc<Surroundings>, others: Arc<Others>, address: Option<String>) {
    let mut keeper = Keeper {
        api: Api::namespaced(around.client.clone(), &around.namespace),
        name: format!("{LEASE_PREFIX}{}", around.node),
        identity: format!("{}/{}-{}", around.node, std::process::id(), around.fence.now().as_millis()),
        acquired: Timestamp::now(),
        address,
        lease: None,
        owner: None,
        around,
    };
    let began = std::time::Instant::now();
    let mut said = String::new();
    loop {
        let sent = keeper.around.fence.now();
        let (peers, addresses) = others.to_name();
        let wait = match keeper.renew(peers, addresses).await {
            Ok(()) => {
                if !std::mem::take(&mut said).is_empty() {
                    tracing::info!(lease = keeper.name, "the node's lease is renewed again");
                }
                RENEW_EVERY.saturating_sub(keeper.around.fence.now().saturating_sub(sent))
            }
            Err(failure) => {
                keeper.lease = None;
                let early = matches!(&failure, Failure::Api(error) if crate::is_early(error, began.elapsed()));
                let what = failure.to_string();
                if said != what && !early {
                    tracing::warn!(lease = keeper.name, error = what, "the node's lease is not renewed; trying again");
                    if let Failure::LostNotDead(not_dead) | Failure::GoneNotDead(not_dead) = &failure {
                        let (around, guests) = (keeper.around.clone(), not_dead.guests());
                        let why = format!(
                            "{what}. This node's lease is renewed, and guests are started here, when they are gone"
                        );
                        // The API may take its time, and the next attempt may not.
                        tokio::spawn(async move { report::not_dead(&around, &why, &guests).await });
                    }
                    said = what;
                }
                RETRY
            }
        };
        tokio::time::sleep(wait).await;
    }
}

impl Keeper {
    async fn renew(&mut self, peers: Peers, addresses: BTreeMap<String, String>) -> Result<(), Failure> {
        if self.lease.is_none() {
            self.lease = limited(self.api.get_opt(&self.name)).await?;
            self.owner = self.lease.as_ref().and_then(|lease| lease.metadata.owner_references.clone()?.pop());
            let revision = self.lease.as_ref().and_then(|lease| lease.metadata.resource_version.clone());
            self.around.fence.reads(revision);
        }
        let (root, met) = (&self.around.kubelet_root, self.around.fence.met());
        match &self.lease {
            // Whatever was here may run elsewhere by now, and what has no guest yet must not get one.
            Some(lease) if is_lost(lease) => {
                self.around.fence.found_lost();
                strike(root, met, Whom::Launchers).await.map_err(Failure::LostNotDead)?;
            }
            // It may have gone with its node, and with it what the controllers had written there.
            None if !self.around.fence.is_held() => {
                strike(root, met, Whom::Leased).await.map_err(Failure::GoneNotDead)?;
            }
            _ => {}
        }
        if self.owner.is_none() {
            self.owner = self.find_owner().await;
        }
        let lease = self.next(&peers);
        self.around.fence.sends(peers.clone(), addresses)?;
        let sent = self.around.fence.now();
        let params = PostParams::default();
        let written = match &self.lease {
            // On the revision that was last heard of here: whoever sees this renewal knows that the one before it was.
            Some(_) => limited(self.api.replace(&self.name, &params, &lease)).await?,
            None => limited(self.api.create(&params, &lease)).await?,
        };
        self.around.fence.answered(sent, peers, written.metadata.resource_version.clone());
        self.lease = Some(written);
        Ok(())
    }

    /// The node, so that its lease goes with it; none where the API does not show it yet.
    async fn find_owner(&self) -> Option<OwnerReference> {
        let nodes: Api<Node> = Api::all(self.around.client.clone());
        let node = tokio::time::timeout(OWNER_LIMIT, nodes.get_opt(&self.around.node)).await.ok()?.ok()??;
        node.owner_ref(&())
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
            namespace: Some(self.around.namespace.clone()),
            annotations: Some(annotations),
            owner_references: self.owner.clone().map(|owner| vec![owner]),
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

    fn keeper(client: kube::Client, folder: &std::path::Path) -> Keeper {
        let pem = folder.join("none.pem");
        let around = Arc::new(Surroundings {
            client: client.clone(),
            namespace: "elsewhere".to_owned(),
            node: "a".to_owned(),
            node_ip: Ipv4Addr::LOCALHOST.into(),
            kubelet_root: folder.to_owned(),
            tls: TlsPaths { ca: pem.clone(), cert: pem.clone(), key: pem },
            events: Events::start(client.clone(), "a".to_owned()),
            fence: Fence::begin(),
        });
        Keeper {
            api: Api::namespaced(client, "elsewhere"),
            name: "virt-handler-a".to_owned(),
            identity: "a/1".to_owned(),
            acquired: Timestamp::now(),
            address: None,
            lease: None,
            owner: None,
            around,
        }
    }

    /// Whether a renewal that nobody answers, after one that nobody answered, counts as contact all the same.
    async fn is_contact(takes: bool) -> bool {
        let folder = tempfile::tempdir().unwrap();
        let mut keeper = keeper(mute(Arc::new(AtomicU32::new(1)), takes), folder.path());
        let around = keeper.around.clone();
        assert!(keeper.renew(None, BTreeMap::new()).await.is_err());
        let before = around.fence.lock().kept.rules.clone();
        keeper.lease = None;
        assert!(keeper.renew(None, BTreeMap::new()).await.is_err());
        let after = around.fence.lock().kept.rules.clone();
        assert!(after.until().is_none(), "guests get no time by it");
        after != before
    }

    #[tokio::test]
    async fn a_renewal_that_was_taken_is_contact_even_if_only_the_lease_tells_and_reading_alone_is_not() {
        assert!(is_contact(true).await, "the next one that is taken shows that this node knew of it");
        assert!(!is_contact(false).await, "where nobody can write, everybody is silent");
    }

    #[tokio::test]
    async fn a_lease_goes_with_its_node_and_one_that_has_gone_is_made_anew_when_nothing_is_left_that_it_covered() {
        let (api, folder) = (crate::testing::api::Api::default(), tempfile::tempdir().unwrap());
        let mut keeper = keeper(api.client(), folder.path());
        let owner = || api.get("leases", "virt-handler-a").unwrap()["metadata"]["ownerReferences"][0]["uid"].clone();
        keeper.renew(None, BTreeMap::new()).await.unwrap();
        assert_eq!(owner(), Value::Null, "its node is not there yet");
        assert_eq!(api.get("leases", "virt-handler-a").unwrap()["metadata"]["namespace"], "elsewhere");
        api.put("nodes", json!({"metadata": {"name": "a", "uid": "first"}}));
        keeper.renew(None, BTreeMap::new()).await.unwrap();
        assert_eq!(owner(), "first");
        keeper.lease = None;
        api.put("nodes", json!({"metadata": {"name": "a", "uid": "second"}}));
        keeper.renew(None, BTreeMap::new()).await.unwrap();
        assert_eq!(owner(), "first", "whoever collects it finds that its node is gone");
    }
}
