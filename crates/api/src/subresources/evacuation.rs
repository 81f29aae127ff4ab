//! `evacuate/cancel`: a VMI need not leave its node any more.

use serde::Deserialize;
use serde_json::json;

use super::{Deed, Found, INSTANCES, MACHINES, Refusal, Request, bad, conflict, dry_run};
use crate::VirtualMachineInstance;
use crate::config::effective;
use crate::kubevirt::KubeVirt;
use crate::names::TAINT_DRAIN;
use k8s_openapi::api::core::v1::{ConfigMap, Node};

/// What the client says (KubeVirt's `EvacuateCancelOptions`).
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Options {
    dry_run: Vec<String>,
    /// The mark goes only when it names this node.
    evacuation_node_name: String,
}

/// Takes the mark of an eviction back. What the evacuation had begun besides is the controller's to call off; a migration that
/// is under way goes on.
pub(super) fn cancel(request: &Request<'_>) -> Result<Deed, Refusal> {
    let vmi = instance_of(request)?;
    let marked = vmi.read.status.evacuation_node_name.clone().unwrap_or_default();
    let node = if marked.is_empty() { vmi.read.status.node_name.clone().unwrap_or_default() } else { marked.clone() };
    may_stay_on(&node, request)?;
    let mut deed = Deed { code: 200, writes: Vec::new(), dry_run: false };
    if marked.is_empty() {
        return Ok(deed);
    }
    if request.body.is_null() {
        return Err(bad("No body"));
    }
    let options: Options = request.options()?;
    deed.dry_run = dry_run(&options.dry_run)?;
    if options.evacuation_node_name != marked {
        return Err(conflict(format!(
            "the VMI is to leave node {marked:?}, and not {:?} as evacuationNodeName says",
            options.evacuation_node_name
        )));
    }
    deed.writes.push(vmi.patch(INSTANCES, false, json!({ "status": {"evacuationNodeName": null} })));
    Ok(deed)
}

/// The VMI that is asked about, by its own name or its VM's.
fn instance_of(request: &Request<'_>) -> Result<Found<VirtualMachineInstance>, Refusal> {
    if request.resource != MACHINES {
        return request.instance();
    }
    let vm = request.machine()?;
    if vm.read.status.created != Some(true) {
        return Err(conflict("VMI is not started"));
    }
    let vmi = request.instance()?;
    let uid = vm.read.metadata.uid.as_deref().unwrap_or_default();
    if !vmi.read.metadata.owner_references.iter().flatten().any(|owner| owner.uid == uid) {
        return Err(Refusal::Internal(format!("the VMI {:?} is not the VM's", request.name)));
    }
    Ok(vmi)
}

/// A node with the drain taint evacuates whatever is on it: there a mark means nothing, and taking it back would not help.
fn may_stay_on(node: &str, request: &Request<'_>) -> Result<(), Refusal> {
    let kubevirt = request.lookup.kubevirt();
    let kubevirt: Option<KubeVirt> = kubevirt.and_then(|object| serde_json::from_value(object).ok());
    let map = request.lookup.config_map();
    let map: Option<ConfigMap> = map.and_then(|object| serde_json::from_value(object).ok());
    let data = map.and_then(|map| map.data);
    let key = effective(kubevirt.as_ref(), data.as_ref()).node_drain_taint_key;
    let key = key.as_deref().unwrap_or(TAINT_DRAIN);
    let object: Option<Node> =
        request.lookup.get("Node", "", node).and_then(|object| serde_json::from_value(object).ok());
    let taints = object.and_then(|object| object.spec).and_then(|spec| spec.taints).unwrap_or_default();
    if taints.iter().any(|taint| taint.key == key && taint.effect == "NoSchedule") {
        return Err(bad(format!("Node {node:?} has NodeDrainTaintKey \"{key}:NoSchedule\"")));
    }
    Ok(())
}
