//! What a maintenance does to its node: label, taints, cordon; and what it remembers of it.
//!
//! The annotation [`ANNOTATION_MAINTENANCE`](names::ANNOTATION_MAINTENANCE) says what was done, and is written with it in one
//! patch: so only that is taken back, and a node that somebody had cordoned before stays cordoned.

use godwit_api::names::events::{COMPONENT_MAINTENANCE, maintenance as told};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::{Deserialize, Serialize};

use super::Held;
use crate::names::{self, TAINT_UNSCHEDULABLE};
use crate::object::{Kind, Stored};
use crate::plan::{EventType, Plan, later};
use crate::world::World;

/// So long may news of a maintenance be on their way when those of its node have come.
const UNKNOWN: SignedDuration = SignedDuration::from_mins(1);

/// What was done to the node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Marks {
    /// Who did it: the maintenance's UID.
    uid: String,
    /// It closed the node.
    cordoned: bool,
    /// It put these taints there.
    taints: Vec<String>,
    /// It put the label there.
    labelled: bool,
    /// When it began to, or took over what another had done.
    since: Option<Timestamp>,
}

/// The taints of a maintenance, by its group.
fn taints_of(kind: Kind) -> [&'static str; 2] {
    match kind {
        Kind::NodeMaintenance => [TAINT_UNSCHEDULABLE, names::TAINT_DRAIN_MEDIK8S],
        _ => [TAINT_UNSCHEDULABLE, names::TAINT_DRAIN],
    }
}

fn marks_of(node: &Node) -> Option<Marks> {
    // What cannot be read was written by somebody else, and says nothing of what is ours.
    node.annotation(names::ANNOTATION_MAINTENANCE).map(|text| serde_json::from_str(text).unwrap_or_default())
}

/// Whether it is this maintenance that has closed the node.
pub fn are_of(node: &Node, one: &Held<'_>) -> bool {
    marks_of(node).is_some_and(|marks| !marks.uid.is_empty() && Some(&marks.uid) == one.meta.uid.as_ref())
}

/// From when on a node counts as closed by nobody: its maintenance does not exist. An earlier leader, who did not know of the end, may
/// have closed it once more.
pub fn orphaned_from(node: &Node, world: &World) -> Option<Timestamp> {
    let marks = marks_of(node).filter(|marks| !marks.uid.is_empty())?;
    let known = super::every(world).any(|one| one.meta.uid.as_ref() == Some(&marks.uid));
    // Another maintenance of the node takes over what was done.
    let taken_over = super::of(Stored::name(node), world).is_some();
    (!known && !taken_over).then(|| marks.since.map_or(Timestamp::MIN, |since| later(since, UNKNOWN)))
}

/// Closes the node, as far as it is not. Says whether it was closed already.
pub fn set(node: &Node, one: &Held<'_>, now: Timestamp, plan: &mut Plan) -> bool {
    // Of a maintenance that left no other trace, what it did is taken over.
    let mut marks = marks_of(node).unwrap_or_default();
    let mut after = node.clone();
    let uid = one.meta.uid.clone().unwrap_or_default();
    if marks.uid != uid {
        marks.uid = uid;
        marks.since = None;
    }
    marks.since.get_or_insert(now);
    if one.kind == Kind::NodeMaintenance {
        let labels = after.metadata.labels.get_or_insert_default();
        if !labels.contains_key(names::LABEL_EXCLUDE_FROM_REMEDIATION) {
            labels.insert(names::LABEL_EXCLUDE_FROM_REMEDIATION.to_owned(), "true".to_owned());
            marks.labelled = true;
        }
    }
    let spec = after.spec.get_or_insert_default();
    let taints = spec.taints.get_or_insert_default();
    for key in taints_of(one.kind) {
        if !taints.iter().any(|taint| taint.key == key && taint.effect == "NoSchedule") {
            let time_added = Some(Time(now));
            let effect = "NoSchedule".to_owned();
            taints.push(Taint { key: key.to_owned(), effect, time_added, value: None });
            if !marks.taints.iter().any(|known| known == key) {
                marks.taints.push(key.to_owned());
            }
        }
    }
    if spec.unschedulable != Some(true) {
        spec.unschedulable = Some(true);
        marks.cordoned = true;
    }
    let text = serde_json::to_string(&marks).unwrap_or_default();
    after.metadata.annotations.get_or_insert_default().insert(names::ANNOTATION_MAINTENANCE.to_owned(), text);
    let closed = after == *node;
    plan.update(node, &after);
    closed
}

/// Takes back what was done to the node, with the event for it. Says what the node will be.
pub fn clear(node: &Node, plan: &mut Plan) -> Node {
    let mut after = node.clone();
    let Some(marks) = marks_of(node) else { return after };
    if let Some(annotations) = &mut after.metadata.annotations {
        annotations.remove(names::ANNOTATION_MAINTENANCE);
    }
    if let Some(labels) = after.metadata.labels.as_mut().filter(|_| marks.labelled) {
        labels.remove(names::LABEL_EXCLUDE_FROM_REMEDIATION);
    }
    let spec = after.spec.get_or_insert_default();
    if let Some(taints) = &mut spec.taints {
        taints.retain(|taint| !(taint.effect == "NoSchedule" && marks.taints.contains(&taint.key)));
        if taints.is_empty() {
            spec.taints = None;
        }
    }
    if marks.cordoned {
        spec.unschedulable = None;
    }
    plan.update(node, &after);
    if marks.cordoned {
        let (reason, message) = told::UNCORDON;
        plan.record(node, COMPONENT_MAINTENANCE, EventType::Normal, reason, message);
    }
    after
}
