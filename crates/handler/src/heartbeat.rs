//! The node's sign of life and what it can do, as labels and annotations of the Node.

use std::time::Duration;

use godwit_api::{MigrationNetwork, names};
use godwit_launcher::Processors;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Map, Value, json};

use crate::processors;

/// Between two heartbeats (KubeVirt: about a minute).
const EVERY: Duration = Duration::from_secs(60);
/// Before the next attempt when the API does not answer.
const RETRY: Duration = Duration::from_secs(2);
/// The same while the cluster is starting.
const SOON: Duration = Duration::from_millis(200);
/// How long the farewell may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// Label and annotation that name what executes guests on this node: `kvm` or `tcg`.
pub const ACCELERATOR: &str = names::LABEL_ACCELERATOR;
/// Annotation with the reason for that choice, in a sentence.
pub const ACCELERATOR_REASON: &str = "godwit.dev/accelerator-reason";
/// Annotation with QEMU's version.
pub const QEMU_VERSION: &str = "godwit.dev/qemu-version";
/// Annotation with what this accelerator cannot do in this version of QEMU and what mends it, in a sentence.
pub const SHORTCOMING: &str = "godwit.dev/qemu-shortcoming";

/// Annotation with the models that guests can have here and how many features each has, in JSON: the greatest common model of several
/// nodes follows from it.
pub const CPU_MODELS: &str = names::ANNOTATION_CPU_MODELS;

/// What this node offers to guests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// `kvm` or `tcg`.
    pub accelerator: Option<String>,
    /// Why, in a sentence.
    pub reason: Option<String>,
    /// For example `7.2.22`.
    pub qemu_version: Option<String>,
    /// What is missing in that version, in a sentence.
    pub shortcoming: Option<String>,
    /// The processors that guests can have, once known.
    pub processors: Option<Processors>,
    /// The network that migrations go over, if the node has one for that.
    pub migration_network: Option<MigrationNetwork>,
}

/// Beats until `shutdown` is done, then marks the node as not schedulable.
pub async fn run(
    client: Client,
    node: String,
    offer: tokio::sync::watch::Receiver<Offer>,
    shutdown: impl Future<Output = ()>,
) {
    let api: Api<Node> = Api::all(client);
    let mut shutdown = std::pin::pin!(shutdown);
    let mut offer = offer;
    let began = std::time::Instant::now();
    loop {
        let now = offer.borrow_and_update().clone();
        let next = match beat(&api, &node, true, &now).await {
            Ok(()) => EVERY,
            Err(error) if crate::is_early(&error, began.elapsed()) => {
                tracing::debug!(node, "waiting for the node's object");
                SOON
            }
            Err(error) => {
                tracing::warn!(%error, node, "heartbeat not written; trying again");
                RETRY
            }
        };
        let changed = async {
            if offer.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = &mut shutdown => break,
            () = tokio::time::sleep(next) => {}
            () = changed => {}
        }
    }
    let nothing = Offer::default();
    let farewell = beat(&api, &node, false, &nothing);
    match tokio::time::timeout(FAREWELL, farewell).await {
        Ok(Ok(())) => tracing::info!(node, "node marked as not schedulable"),
        Ok(Err(error)) => tracing::warn!(%error, node, "node not marked as not schedulable"),
        Err(_) => tracing::warn!(node, "node not marked as not schedulable: the API does not answer"),
    }
}

async fn beat(api: &Api<Node>, node: &str, schedulable: bool, offer: &Offer) -> Result<(), kube::Error> {
    let patch = patch(schedulable, offer, Timestamp::now());
    let node: Node = api.patch(node, &PatchParams::default(), &Patch::Merge(patch)).await?;
    let Some(processors) = &offer.processors else { return Ok(()) };
    let wanted: Vec<String> = processors::labels(processors).collect();
    let has = node.metadata.labels.unwrap_or_default();
    let stale: Map<String, Value> =
        processors::stale(&has, &wanted).map(|label| (label.clone(), Value::Null)).collect();
    if !stale.is_empty() {
        let patch = json!({ "metadata": { "labels": stale } });
        let name = node.metadata.name.unwrap_or_default();
        api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await?;
    }
    Ok(())
}

fn patch(schedulable: bool, offer: &Offer, now: Timestamp) -> Value {
    let whole = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let mut labels = Map::new();
    labels.insert(names::LABEL_SCHEDULABLE.into(), json!(schedulable.to_string()));
    let mut annotations = Map::new();
    let whole = whole.to_string();
    annotations.insert(names::ANNOTATION_HEARTBEAT.into(), json!(whole));
    // Of a handler before this one it may be there, and one after it may know nothing of it: null takes it away.
    let network = offer.migration_network.as_ref().filter(|_| schedulable);
    let network = network.and_then(|network| network.told_at(&whole));
    annotations.insert(names::ANNOTATION_MIGRATION_NETWORK.into(), json!(network));
    if schedulable {
        annotations.insert(names::ANNOTATION_GIVES_FILES.into(), json!(whole));
        for machine in ["q35", "pc"] {
            labels.insert(format!("{}{machine}", names::LABEL_PREFIX_MACHINE_TYPE), json!("true"));
        }
        if let Some(vendor) = cpu_vendor().filter(|_| offer.processors.is_none()) {
            labels.insert(format!("{}{vendor}", names::LABEL_PREFIX_CPU_VENDOR), json!("true"));
        }
    }
    if let Some(known) = &offer.processors {
        labels.extend(processors::labels(known).map(|label| (label, json!("true"))));
        annotations.insert(CPU_MODELS.into(), json!(json!(processors::ranks(known)).to_string()));
    }
    if let Some(accelerator) = &offer.accelerator {
        labels.insert(ACCELERATOR.into(), json!(accelerator));
        annotations.insert(ACCELERATOR.into(), json!(accelerator));
    }
    if let Some(reason) = &offer.reason {
        annotations.insert(ACCELERATOR_REASON.into(), json!(reason));
    }
    if let Some(version) = &offer.qemu_version {
        annotations.insert(QEMU_VERSION.into(), json!(version));
        // With another QEMU it may be gone: null takes it away.
        annotations.insert(SHORTCOMING.into(), json!(offer.shortcoming));
    }
    json!({ "metadata": { "labels": labels, "annotations": annotations } })
}

/// The processor's vendor as KubeVirt's labels name it.
fn cpu_vendor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("vendor_id"))?;
    match line.split(':').nth(1)?.trim() {
        "GenuineIntel" => Some("Intel".into()),
        "AuthenticAMD" => Some("AMD".into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_says_when_and_what() {
        let offer = Offer { accelerator: Some("tcg".into()), reason: Some("no KVM".into()), ..Offer::default() };
        let now = "2026-11-20T20:00:00.123Z".parse().unwrap();
        let beat = patch(true, &offer, now);
        assert_eq!(beat["metadata"]["annotations"]["kubevirt.io/heartbeat"], "2026-11-20T20:00:00Z");
        assert_eq!(beat["metadata"]["labels"]["kubevirt.io/schedulable"], "true");
        assert_eq!(beat["metadata"]["labels"]["godwit.dev/accelerator"], "tcg");
        let annotations = &beat["metadata"]["annotations"];
        assert_eq!(annotations["godwit.io/gives-files"], annotations["kubevirt.io/heartbeat"]);
        assert_eq!(beat["metadata"]["labels"]["machine-type.node.kubevirt.io/q35"], "true");
        let offer = Offer { qemu_version: Some("7.2.22".into()), shortcoming: Some("old".into()), ..offer };
        let old = patch(true, &offer, now);
        assert_eq!(old["metadata"]["annotations"][SHORTCOMING], "old");
        let newer = patch(true, &Offer { shortcoming: None, ..offer }, now);
        assert!(newer["metadata"]["annotations"].get(SHORTCOMING).is_some_and(Value::is_null));
        let network = MigrationNetwork {
            interface: "eth1".into(),
            network: None,
            address: Some("10.99.0.1".parse().unwrap()),
            problem: None,
        };
        let offer = Offer { migration_network: Some(network), ..Offer::default() };
        let told = patch(true, &offer, now);
        let told = told["metadata"]["annotations"]["godwit.io/migration-network"].as_str().map(str::to_owned);
        let beat = "2026-11-20T20:00:00Z";
        let wanted = format!(r#"{{"interface":"eth1","address":"10.99.0.1","heartbeat":"{beat}"}}"#);
        assert_eq!(told, Some(wanted));
        assert!(newer["metadata"]["annotations"].get("godwit.io/migration-network").is_some_and(Value::is_null));
        let farewell = patch(false, &offer, now);
        assert_eq!(farewell["metadata"]["labels"], json!({ "kubevirt.io/schedulable": "false" }));
        let wanted = json!({ "kubevirt.io/heartbeat": beat, "godwit.io/migration-network": null });
        assert_eq!(farewell["metadata"]["annotations"], wanted);
    }
}
