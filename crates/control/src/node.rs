//! Nodes that have gone quiet, and nodes that are cordoned: what Kubernetes' node lifecycle controller says of them.
//!
//! A node whose lease is not renewed becomes `Ready=Unknown` and gets Kubernetes' `unreachable` taints; a node whose
//! handler is silent takes no new VMs. Both are taken back when the node speaks again. A cordoned node has a taint that says so.

use std::borrow::Cow;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use smol_str::SmolStr;

use crate::names;
use crate::object::{Name, Object, Stored};
use crate::plan::{EventType, NODE_CONTROLLER, Plan, View, later};
use crate::world::Change;

/// How long a node may be silent when its lease does not say (Kubernetes' node-monitor-grace-period).
const GRACE: SignedDuration = SignedDuration::from_secs(40);
/// How long a handler may be silent (KubeVirt's virt-handler timeout).
const HANDLER_GRACE: SignedDuration = SignedDuration::from_mins(5);
/// Between two looks at a node that cannot be reached, where something waits for it.
pub const LOOK_AGAIN: SignedDuration = SignedDuration::from_secs(10);
/// Namespace of the nodes' leases.
pub const LEASES: &str = "kube-node-lease";

/// Decides about one node.
pub fn decide(name: &str, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let Some(node) = view.world.nodes.get(&Name::cluster(name)).filter(|node| !node.deleting()) else { return plan };
    // Most decisions change nothing, so the node is copied only when one may.
    let mut after = Cow::Borrowed(node.as_ref());

    let tells = view.settings.tells_of_nodes;
    if let Some(silent_from) = silence(node, view).filter(|_| tells) {
        if view.now >= silent_from {
            mark_unreachable(after.to_mut(), view.now);
        } else {
            plan.wake(silent_from);
            if is_marked(node) {
                unmark_unreachable(after.to_mut());
            }
        }
    }
    if tells && is_cordon_untold(node) {
        tell_cordon(after.to_mut(), view.now);
    }
    if tells && is_ready_untold(node) {
        tell_ready(after.to_mut());
    }
    let mut handler_silent = false;
    if let Some(heartbeat) =
        node.annotation(names::ANNOTATION_HEARTBEAT).and_then(|text| text.parse::<Timestamp>().ok())
    {
        let silent_from = later(heartbeat, HANDLER_GRACE);
        if view.now < silent_from {
            plan.wake(silent_from);
        } else if node.label(names::LABEL_SCHEDULABLE) != Some("false") {
            handler_silent = true;
            let labels = after.to_mut().metadata.labels.get_or_insert_default();
            labels.insert(names::LABEL_SCHEDULABLE.to_owned(), "false".to_owned());
        }
    }
    if let Cow::Owned(after) = &after {
        plan.update(node.as_ref(), after);
    }
    if handler_silent {
        let message = "virt-handler is not responsive, marking node as unresponsive";
        plan.record(node.as_ref(), NODE_CONTROLLER, EventType::Normal, "NodeUnresponsive", message);
    }
    plan
}

/// From when on the node counts as silent; `None` when it has never said anything.
fn silence(node: &Node, view: &View<'_>) -> Option<Timestamp> {
    let lease = view.world.leases.get(&Name::new(LEASES, node.name())).and_then(|lease| lease.spec.as_ref());
    let allowed = lease
        .and_then(|spec| spec.lease_duration_seconds)
        .filter(|seconds| *seconds > 0)
        .map_or(GRACE, |seconds| SignedDuration::from_secs(i64::from(seconds)));
    view.world.heard_of(node.name()).map(|heard| heard + allowed)
}

/// The node that has given a sign of life with a change: it has renewed its lease or posted its status.
pub fn sign_of_life(change: &Change) -> Option<SmolStr> {
    let renewed = |lease: &Lease| lease.spec.as_ref().and_then(|spec| spec.renew_time.as_ref()).map(|time| time.0);
    let posted = |node: &Node| {
        ready_condition(node).and_then(|condition| condition.last_heartbeat_time.as_ref()).map(|time| time.0)
    };
    match (&change.before, change.after.as_ref()?) {
        (before, Object::Lease(after)) if after.namespace() == LEASES => {
            let before = match before {
                Some(Object::Lease(before)) => renewed(before),
                _ => None,
            };
            (renewed(after).is_some() && renewed(after) != before).then(|| SmolStr::new(after.name()))
        }
        (before, Object::Node(after)) => {
            let before = match before {
                Some(Object::Node(before)) => posted(before),
                _ => None,
            };
            (posted(after).is_some() && posted(after) != before).then(|| SmolStr::new(after.name()))
        }
        _ => None,
    }
}

/// Whether a change of a node's lease asks for a decision. A renewal of a node that counts as alive does not: the decision
/// before has asked to be woken when the node would count as silent, and that is soon enough to find that it does not.
/// Ten thousand nodes renew thousands of leases each second.
pub fn is_told_by(before: Option<&Lease>, after: Option<&Lease>, node: Option<&Node>) -> bool {
    let said = |lease: Option<&Lease>| {
        let spec = lease?.spec.as_ref()?;
        spec.renew_time.as_ref().map(|_| spec.lease_duration_seconds)
    };
    match (said(before), said(after)) {
        (Some(before), Some(after)) => before != after || node.is_some_and(is_marked),
        _ => true,
    }
}

/// Whether anything about the node says that it was found silent.
fn is_marked(node: &Node) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    is_silent(node) || taints.into_iter().flatten().any(|taint| taint.key == names::TAINT_UNREACHABLE)
}

fn ready_condition(node: &Node) -> Option<&NodeCondition> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == "Ready")
}

fn mark_unreachable(node: &mut Node, now: Timestamp) {
    let conditions = node.status.get_or_insert_default().conditions.get_or_insert_default();
    if let Some(ready) = conditions.iter_mut().find(|condition| condition.type_ == "Ready")
        && ready.status != "Unknown"
    {
        ready.status = "Unknown".to_owned();
        ready.reason = Some("NodeStatusUnknown".to_owned());
        ready.message = Some("Kubelet stopped posting node status.".to_owned());
        ready.last_transition_time = Some(Time(now));
    }
    let taints = node.spec.get_or_insert_default().taints.get_or_insert_default();
    for effect in ["NoSchedule", "NoExecute"] {
        if !taints.iter().any(|taint| taint.key == names::TAINT_UNREACHABLE && taint.effect == effect) {
            taints.push(Taint {
                key: names::TAINT_UNREACHABLE.to_owned(),
                effect: effect.to_owned(),
                time_added: Some(Time(now)),
                value: None,
            });
        }
    }
}

/// Whether the taint of cordoned nodes is not as the cordon is.
fn is_cordon_untold(node: &Node) -> bool {
    let spec = node.spec.as_ref();
    let cordoned = spec.and_then(|spec| spec.unschedulable) == Some(true);
    cordoned != spec.and_then(|spec| spec.taints.as_ref()).into_iter().flatten().any(tells_cordon)
}

fn tells_cordon(taint: &Taint) -> bool {
    taint.key == names::TAINT_UNSCHEDULABLE && taint.effect == "NoSchedule"
}

/// A cordoned node carries a taint that says so (as Kubernetes' node lifecycle controller has it).
fn tell_cordon(node: &mut Node, now: Timestamp) {
    let spec = node.spec.get_or_insert_default();
    let mut taints = spec.taints.take().unwrap_or_default();
    taints.retain(|taint| !tells_cordon(taint));
    if spec.unschedulable == Some(true) {
        taints.push(Taint {
            key: names::TAINT_UNSCHEDULABLE.to_owned(),
            effect: "NoSchedule".to_owned(),
            time_added: Some(Time(now)),
            value: None,
        });
    }
    spec.taints = (!taints.is_empty()).then_some(taints);
}

/// Whether a node that is ready still has the taint with which kube-apiserver lets every node begin.
fn is_ready_untold(node: &Node) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    ready_condition(node).is_some_and(|condition| condition.status == "True")
        && taints.into_iter().flatten().any(|taint| taint.key == names::TAINT_NOT_READY)
}

fn tell_ready(node: &mut Node) {
    let spec = node.spec.get_or_insert_default();
    let mut taints = spec.taints.take().unwrap_or_default();
    taints.retain(|taint| taint.key != names::TAINT_NOT_READY);
    spec.taints = (!taints.is_empty()).then_some(taints);
}

fn unmark_unreachable(node: &mut Node) {
    // Only when the kubelet has said that it is ready again; a renewed lease alone is not the node's status.
    if ready_condition(node).is_some_and(|condition| condition.status == "Unknown") {
        return;
    }
    if let Some(taints) = node.spec.as_mut().and_then(|spec| spec.taints.as_mut()) {
        taints.retain(|taint| taint.key != names::TAINT_UNREACHABLE);
        if taints.is_empty()
            && let Some(spec) = node.spec.as_mut()
        {
            spec.taints = None;
        }
    }
}

/// Whether the node is known to be out of reach, or is gone.
pub fn is_lost(name: &str, view: &View<'_>) -> bool {
    view.world.nodes.get(&Name::cluster(name)).is_none_or(|node| is_silent(node))
}

/// Whether the node is known to be out of reach.
pub fn is_silent(node: &Node) -> bool {
    ready_condition(node).is_some_and(|condition| condition.status == "Unknown")
}

/// Since when the node has been in reach, if it says so.
pub fn reachable_since(node: &Node) -> Option<Timestamp> {
    let ready = ready_condition(node).filter(|condition| condition.status != "Unknown")?;
    ready.last_transition_time.as_ref().map(|time| time.0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::Cluster;
    use crate::{Key, Kind};

    /// The node renews its lease, at this second of its own clock.
    fn renew(cluster: &mut Cluster, second: i64) {
        let time = Timestamp::from_second(second).unwrap();
        cluster.put(
            Kind::Lease,
            json!({
                "metadata": {"namespace": LEASES, "name": "node1"},
                "spec": {"renewTime": format!("{time:.6}"), "leaseDurationSeconds": 40},
            }),
        );
        cluster.settle();
    }

    fn counts_as_silent(cluster: &Cluster) -> bool {
        is_lost("node1", &View { now: cluster.now, world: &cluster.world, settings: &cluster.settings })
    }

    #[test]
    fn a_heartbeat_at_the_end_of_time_is_no_silence() {
        let mut cluster = Cluster::new();
        cluster.add_node("node1");
        let name = Name::cluster("node1");
        for time in ["9999-12-30T22:00:00Z", "9999-12-30T21:59:00Z"] {
            let annotations = json!({names::ANNOTATION_HEARTBEAT: time});
            cluster.patch(Kind::Node, &name, json!({"metadata": {"annotations": annotations}}));
            cluster.settle();
            let node = cluster.get(Kind::Node, &name).unwrap();
            assert_eq!(node["metadata"]["labels"]["kubevirt.io/schedulable"], "true");
        }
    }

    #[test]
    fn a_cordon_has_its_taint() {
        let mut cluster = Cluster::new();
        cluster.add_node("node1");
        let name = Name::cluster("node1");
        let other = json!({"key": "rack", "effect": "NoSchedule"});
        cluster.patch(Kind::Node, &name, json!({"spec": {"unschedulable": true, "taints": [other]}}));
        cluster.settle();
        let taints = |cluster: &Cluster| cluster.get(Kind::Node, &name).unwrap()["spec"]["taints"].clone();
        let told = taints(&cluster);
        assert_eq!((&told[0], &told[1]["key"]), (&other, &json!("node.kubernetes.io/unschedulable")), "{told}");
        assert!(told[1]["effect"] == "NoSchedule" && told[1]["timeAdded"].is_string(), "{told}");
        cluster.patch(Kind::Node, &name, json!({"spec": {"unschedulable": null}}));
        cluster.settle();
        assert_eq!(taints(&cluster), json!([other]));
        cluster.patch(Kind::Node, &name, json!({"spec": {"unschedulable": true, "taints": null}}));
        cluster.settle();
        cluster.patch(Kind::Node, &name, json!({"spec": {"unschedulable": false}}));
        cluster.settle();
        assert!(taints(&cluster).is_null());
    }

    #[test]
    fn a_ready_node_loses_the_taint_with_which_it_began() {
        let mut cluster = Cluster::new();
        cluster.add_node("node1");
        let name = Name::cluster("node1");
        let other = json!({"key": "rack", "effect": "NoSchedule"});
        let began = json!({"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"});
        let taints = json!({"spec": {"taints": [began, other]}});
        let ready = |status: &str| json!({"status": {"conditions": [{"type": "Ready", "status": status}]}});
        let of = |cluster: &Cluster| cluster.get(Kind::Node, &name).unwrap()["spec"]["taints"].clone();
        cluster.settings.tells_of_nodes = false;
        cluster.patch(Kind::Node, &name, taints);
        cluster.patch(Kind::Node, &name, ready("True"));
        cluster.settle();
        assert_eq!(of(&cluster), json!([began, other]), "kube-controller-manager says it");
        cluster.settings.tells_of_nodes = true;
        cluster.patch(Kind::Node, &name, ready("False"));
        cluster.settle();
        assert_eq!(of(&cluster), json!([began, other]));
        cluster.patch(Kind::Node, &name, ready("True"));
        cluster.settle();
        assert_eq!(of(&cluster), json!([other]));
    }

    #[test]
    fn a_wrong_clock_is_no_silence_and_silence_is_seen_whatever_the_clock_says() {
        for wrong_by in [-3600, 0, 3600] {
            let mut cluster = Cluster::new();
            cluster.add_node("node1");
            for round in 0..10 {
                renew(&mut cluster, 1_000_000 + wrong_by + 10 * round);
                cluster.pass(10);
                cluster.settle();
                assert!(!counts_as_silent(&cluster), "it renews each 10 s, on a clock {wrong_by} s off");
            }
            let woken = cluster.decide(&Key::Node("node1".into())).wake_at;
            assert_eq!(woken, Some(cluster.now + SignedDuration::from_secs(30)), "40 s after it was last heard of");
            cluster.pass(29);
            cluster.settle();
            assert!(!counts_as_silent(&cluster));
            cluster.pass(1);
            cluster.settle();
            assert!(counts_as_silent(&cluster), "nothing was heard for 40 s, on a clock {wrong_by} s off");
        }
    }
}
