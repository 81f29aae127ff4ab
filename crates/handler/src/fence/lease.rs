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
        }
        if self.lease.as_ref().is_some_and(is_lost) {
            // Whatever was here may run elsewhere by now, and what has no guest yet must not get one.
            self.around.fence.found_lost();
            if !strike(&self.around.kubelet_root, Whom::Launchers).await {
                return Err(Failure::NotDead);
            }
        }
        let lease = self.next(&peers);
        self.around.fence.sends(peers.clone());
        let sent = now();
        let params = PostParams::default();
        let written = match &self.lease {
            // On the revision that was answered: whoever sees this renewal knows that the one before was heard of here.
            Some(_) => limited(self.api.replace(&self.name, &params, &lease)).await?,
            None => limited(self.api.create(&params, &lease)).await?,
        };
        self.around.fence.answered(sent, peers);
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
