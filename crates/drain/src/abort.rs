//! Takes a drain back: no mark, no migration and no cordon of ours remains.

use std::collections::BTreeSet;

use godwit_api::{VirtualMachineInstance, VirtualMachineInstanceMigration};
use godwit_control::{Name, Stored};
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use serde_json::json;

use crate::course::is_evacuation;
use crate::{code, words};

/// What was there before the drain began, and stays.
#[derive(Clone, Debug, Default)]
pub struct Before {
    /// Nodes that were cordoned.
    pub cordoned: BTreeSet<String>,
    /// VMIs that were marked.
    pub marked: BTreeSet<Name>,
    /// Migrations, by UID.
    pub migrations: BTreeSet<String>,
}

/// What a look at what is to be taken back has found.
#[derive(Debug, Default)]
pub struct Left {
    /// What is still to be taken back, in sentences.
    pub remains: Vec<String>,
    /// Something has just been written: whoever decided before that may act on it yet, so it is looked at once more.
    pub touched: bool,
}

impl Left {
    fn push(&mut self, text: String) {
        self.remains.push(text);
    }
}

/// Takes back what can be at this moment, and says what remains; it is called until nothing does.
pub async fn take_back(client: &Client, nodes: &[String], before: &Before) -> Left {
    let mut left = Left::default();
    // The marks first: whoever is marked gets another migration.
    unmark(client, nodes, before, &mut left).await;
    cancel(client, nodes, before, &mut left).await;
    uncordon_all(client, nodes.iter(), before, &mut left.remains).await;
    left
}

/// Opens nodes that were open before; where that cannot be done, `remains` says so.
pub async fn uncordon_all(
    client: &Client,
    nodes: impl Iterator<Item = &String>,
    before: &Before,
    remains: &mut Vec<String>,
) {
    for node in nodes.filter(|node| !before.cordoned.contains(*node)) {
        if let Err(error) = uncordon(client, node).await {
            remains.push(format!("node {node} is cordoned: {}", words(&error)));
        }
    }
}

async fn unmark(client: &Client, nodes: &[String], before: &Before, left: &mut Left) {
    let vmis: Api<VirtualMachineInstance> = Api::all(client.clone());
    let listed = match vmis.list(&ListParams::default()).await {
        Ok(listed) => listed.items,
        Err(error) => return left.push(format!("VMIs may be marked, they cannot be listed: {}", words(&error))),
    };
    for vmi in listed.iter().filter(|vmi| !before.marked.contains(&vmi.key())) {
        let Some(node) = vmi.status.evacuation_node_name.as_ref().filter(|node| nodes.contains(node)) else { continue };
        let key = vmi.key();
        match cancel_evacuation(client, &key, node).await {
            Ok(()) => left.touched = true,
            // A server without the subresource clears the marks when the node is opened again.
            Err(error) => left.push(format!("VMI {key} is marked to leave {node}: {}", words(&error))),
        }
    }
}

/// `evacuate/cancel`, as `virtctl evacuate-cancel` asks for it: the mark goes if it still names this node.
async fn cancel_evacuation(client: &Client, vmi: &Name, node: &str) -> Result<(), kube::Error> {
    let path = format!(
        "/apis/subresources.kubevirt.io/v1/namespaces/{}/virtualmachineinstances/{}/evacuate/cancel",
        vmi.namespace, vmi.name
    );
    let request = http::Request::put(path).header(http::header::CONTENT_TYPE, "application/json");
    let request =
        request.body(json!({"evacuationNodeName": node}).to_string().into_bytes()).map_err(kube::Error::HttpError)?;
    client.request_text(request).await.map(|_| ())
}

async fn cancel(client: &Client, nodes: &[String], before: &Before, left: &mut Left) {
    let all: Api<VirtualMachineInstanceMigration> = Api::all(client.clone());
    let listed = match all.list(&ListParams::default()).await {
        Ok(listed) => listed.items,
        Err(error) => {
            return left.push(format!("migrations may be under way, they cannot be listed: {}", words(&error)));
        }
    };
    let ours = |one: &&VirtualMachineInstanceMigration| {
        is_evacuation(one, nodes) && !one.status.phase.is_final() && !before.migrations.contains(one.uid())
    };
    for migration in listed.iter().filter(ours) {
        let key = migration.key();
        let phase = migration.status.phase.as_str();
        if !migration.is_deleting() {
            left.touched = true;
            let api: Api<VirtualMachineInstanceMigration> = Api::namespaced(client.clone(), &key.namespace);
            let same = Preconditions { uid: migration.metadata.uid.clone(), resource_version: None };
            let params = DeleteParams { preconditions: Some(same), ..DeleteParams::default() };
            match api.delete(&key.name, &params).await {
                Ok(_) => {}
                Err(error) if code(&error) == Some(404) => continue,
                Err(error) => {
                    left.push(format!("migration {key} goes on ({phase}): {}", words(&error)));
                    continue;
                }
            }
        }
        left.push(format!("migration {key} is being cancelled ({phase})"));
    }
}

/// Closes a node for new pods. Says whether it was closed already.
pub async fn cordon(client: &Client, node: &str) -> Result<bool, kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    let found = nodes.get(node).await?;
    if found.spec.and_then(|spec| spec.unschedulable) == Some(true) {
        return Ok(true);
    }
    set(&nodes, node, Some(true)).await.map(|()| false)
}

async fn uncordon(client: &Client, node: &str) -> Result<(), kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    match nodes.get_opt(node).await? {
        Some(found) if found.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) => {
            set(&nodes, node, None).await
        }
        _ => Ok(()),
    }
}

async fn set(nodes: &Api<Node>, node: &str, closed: Option<bool>) -> Result<(), kube::Error> {
    let patch = Patch::Merge(json!({"spec": {"unschedulable": closed}}));
    nodes.patch(node, &PatchParams::default(), &patch).await.map(|_| ())
}
