//! When the lease has passed: seeing to it that nothing runs, and saying so when the API is there again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use godwit_api::names::ANNOTATION_FENCED;
use godwit_api::names::events::reason;
use godwit_api::names::fence::DURATION;
use godwit_launcher::fence::now;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use super::Surroundings;
use super::enforce::{self, Whom};

/// The launchers' own time to kill; this is for those that do not.
const GRACE: Duration = Duration::from_secs(1);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// At most so many guests are named.
const NAMED: usize = 10;

/// Looks for ever.
pub(super) async fn enforce_and_tell(around: Arc<Surroundings>) {
    let began = now();
    let root = &around.kubelet_root;
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    let mut told: BTreeMap<String, String> = enforce::fenced(root);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        // Whatever a predecessor was allowed had been sent before this one began.
        let until = around.fence.until().unwrap_or(began + DURATION);
        if now() >= until + GRACE {
            enforce::strike(root, around.fence.met(), Whom::Guests).await;
            found.extend(enforce::fenced(root));
        } else if let Some(since) = around.fence.lapsed()
            && around.fence.is_held()
            && now() >= since + GRACE
        {
            found.extend(enforce::fenced(root));
            found.retain(|pod, _| !told.contains_key(pod));
            if tell(&around, &found).await {
                around.fence.told();
                told.append(&mut found);
            }
        }
    }
}

/// Says that these guests were fenced. Whether that is done.
async fn tell(around: &Surroundings, found: &BTreeMap<String, String>) -> bool {
    if found.is_empty() {
        tracing::info!("the node's lease had passed; no guest ran");
        return true;
    }
    let api: Api<Node> = Api::all(around.client.clone());
    let patch = json!({"metadata": {"annotations": {ANNOTATION_FENCED: Timestamp::now().to_string()}}});
    if let Err(error) = api.patch(&around.node, &PatchParams::default(), &Patch::Merge(patch)).await {
        tracing::warn!(%error, "that guests were fenced is not written yet");
        return false;
    }
    let mut names: Vec<&str> = found.values().map(String::as_str).take(NAMED).collect();
    if found.len() > NAMED {
        names.push("…");
    }
    let message = format!(
        "virt-handler could not renew this node's lease in time and stopped {} before they may be started elsewhere: {}",
        if found.len() == 1 { "1 guest".to_owned() } else { format!("{} guests", found.len()) },
        names.join(", ")
    );
    around.events.record_node(reason::NODE_FENCED, message);
    true
}
