//! What a decision yields: effects as data, and when to look again.

use godwit_api::access::Right;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value};

use crate::Settings;
use crate::object::{Kind, Object, Ref, Stored};
use crate::world::World;

/// Everything that a decision may depend on.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The time of the decision.
    pub now: Timestamp,
    /// The cluster as far as it is known.
    pub world: &'a World,
    /// How this installation is set up.
    pub settings: &'a Settings,
}

/// What to do, and when to decide again if nothing changes before.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Carried out in order; the first that fails ends the plan and the decision is taken again.
    pub effects: Vec<Effect>,
    /// Decide again at this time at the latest.
    pub wake_at: Option<Timestamp>,
}

/// So long after a time that an object says, or the last time there is: anybody may have written any time there.
pub(crate) fn later(time: Timestamp, pause: SignedDuration) -> Timestamp {
    time.checked_add(pause).unwrap_or(Timestamp::MAX)
}

/// One write to the API server.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Create an object. That it exists already under our name is fine.
    Create(Box<Object>),
    /// Merge patch of an object; carries `metadata.resourceVersion` of the state it was decided on.
    Patch(Ref, Value),
    /// Merge patch of the status subresource; carries `metadata.resourceVersion` likewise.
    PatchStatus(Ref, Value),
    /// Delete an object if it still has this UID, and the revision that was decided on.
    Delete {
        /// Which object.
        target: Ref,
        /// Its UID; empty deletes whatever has the name.
        uid: String,
        /// Overrides the object's own grace period, in seconds.
        grace_seconds: Option<u32>,
    },
    /// Bind a pod to a node.
    Bind {
        /// The pod.
        pod: Ref,
        /// Its UID.
        uid: String,
        /// The node's name.
        node: String,
    },
    /// Read an object: the plan goes on only if it has this revision, or does not exist when none is given.
    Confirm {
        /// Which object.
        target: Ref,
        /// The revision that was decided on.
        revision: Option<String>,
    },
    /// Ask for the eviction of a pod.
    Evict {
        /// The pod.
        pod: Ref,
        /// Its UID.
        uid: String,
        /// The server may say no, or not now: that is learned ([`World::refuse_eviction`]) and the plan goes on.
        or_learn: bool,
    },
    /// Tell people about it.
    Record(EventRecord),
}

impl Effect {
    /// What the writer needs to be allowed for it.
    pub fn right(&self) -> Right<'_> {
        match self {
            Effect::Create(object) => {
                let namespace = object.metadata().namespace.as_deref().unwrap_or_default();
                Right { namespace, ..right(object.kind(), "create", "") }
            }
            Effect::Patch(target, _) => right_to(target, "patch", ""),
            Effect::PatchStatus(target, _) => right_to(target, "patch", "status"),
            Effect::Delete { target, .. } => right_to(target, "delete", ""),
            Effect::Bind { pod, .. } => right_to(pod, "create", "binding"),
            Effect::Confirm { target, .. } => right_to(target, "get", ""),
            Effect::Evict { pod, .. } => right_to(pod, "create", "eviction"),
            Effect::Record(event) => {
                let namespace = event.target.name.namespace.as_str();
                Right { verb: "create", group: "", resource: "events", subresource: "", namespace }
            }
        }
    }
}

fn right(kind: Kind, verb: &'static str, subresource: &'static str) -> Right<'static> {
    Right { verb, group: kind.group(), resource: kind.plural(), subresource, namespace: "" }
}

fn right_to<'a>(target: &'a Ref, verb: &'static str, subresource: &'static str) -> Right<'a> {
    Right { namespace: target.name.namespace.as_str(), ..right(target.kind, verb, subresource) }
}

/// Severity of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EventType {
    /// As it should be.
    Normal,
    /// Somebody may want to look.
    Warning,
}

impl EventType {
    /// As `kubectl describe` prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            EventType::Normal => "Normal",
            EventType::Warning => "Warning",
        }
    }
}

/// An event to record on an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRecord {
    /// The object it is about.
    pub target: Ref,
    /// Its UID, by which `kubectl describe` finds the event.
    pub uid: String,
    /// Its revision at the time.
    pub resource_version: String,
    /// Severity.
    pub type_: EventType,
    /// One word in CamelCase.
    pub reason: String,
    /// A sentence.
    pub message: String,
    /// Who says so, e.g. `virtualmachine-controller`.
    pub component: &'static str,
}

/// Source of the events of the VM, VMI and migration controllers (KubeVirt's name).
pub const VM_CONTROLLER: &str = "virtualmachine-controller";
/// Source of the events of the node controller (KubeVirt's name).
pub const NODE_CONTROLLER: &str = "node-controller";
/// Source of the events of placement (Kubernetes' name).
pub const SCHEDULER: &str = "default-scheduler";
/// Source of the events of volume binding (Kubernetes' name).
pub const VOLUME_CONTROLLER: &str = "persistentvolume-controller";

impl Plan {
    /// A plan that does nothing.
    pub fn nothing() -> Self {
        Self::default()
    }

    /// Adds an effect.
    pub fn push(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    /// Decide again at `at` at the latest; the earliest of several wins.
    pub fn wake(&mut self, at: Timestamp) {
        self.wake_at = Some(self.wake_at.map_or(at, |other| other.min(at)));
    }

    /// Creates an object.
    pub fn create(&mut self, object: impl Into<Object>) {
        self.push(Effect::Create(Box::new(object.into())));
    }

    /// Deletes an object of this UID with its own grace period.
    pub fn delete<T: Stored>(&mut self, object: &T) {
        self.push(Effect::Delete { target: object.reference(), uid: object.uid().to_owned(), grace_seconds: None });
    }

    /// Records an event about an object.
    pub fn record<T: Stored>(
        &mut self,
        object: &T,
        component: &'static str,
        type_: EventType,
        reason: impl Into<String>,
        message: impl Into<String>,
    ) {
        self.push(Effect::Record(EventRecord {
            target: object.reference(),
            uid: object.uid().to_owned(),
            resource_version: object.meta().resource_version.clone().unwrap_or_default(),
            type_,
            reason: reason.into(),
            message: message.into(),
            component,
        }));
    }

    /// Writes the difference between two states of one object, if there is any: the status through the status
    /// subresource where the kind has one, everything else (and all of a VMI) as a patch of the object.
    pub fn update<T: Stored + serde::Serialize + PartialEq>(&mut self, before: &T, after: &T) {
        // Most decisions change nothing; comparing is a tenth of the work of writing both down.
        if before == after {
            return;
        }
        let (Ok(old), Ok(new)) = (serde_json::to_value(before), serde_json::to_value(after)) else { return };
        let Some(Value::Object(mut difference)) = merge_difference(&old, &new) else { return };
        let target = before.reference();
        let revision = before.meta().resource_version.clone();
        let status = if has_status_subresource(T::KIND) { difference.remove("status") } else { None };
        if !difference.is_empty() {
            // A status patch of the same plan must not fail on the revision that this one makes, so the second of two
            // writes goes without; both are decided on the same state and the first one guards them.
            self.push(Effect::Patch(target.clone(), guarded(difference, revision.as_deref())));
            if let Some(status) = status {
                self.push(Effect::PatchStatus(target, Value::Object(Map::from_iter([("status".to_owned(), status)]))));
            }
        } else if let Some(status) = status {
            let body = Map::from_iter([("status".to_owned(), status)]);
            self.push(Effect::PatchStatus(target, guarded(body, revision.as_deref())));
        }
    }

    /// Whether the plan writes nothing but events.
    pub fn is_quiet(&self) -> bool {
        self.effects.iter().all(|effect| matches!(effect, Effect::Record(_)))
    }
}

fn guarded(mut body: Map<String, Value>, revision: Option<&str>) -> Value {
    if let Some(revision) = revision {
        let metadata = body.entry("metadata").or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(metadata) = metadata {
            metadata.insert("resourceVersion".to_owned(), revision.into());
        }
    }
    Value::Object(body)
}

/// Kinds whose status is written through `/status`. A VMI has none (KubeVirt's contract).
pub fn has_status_subresource(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::VirtualMachine
            | Kind::Migration
            | Kind::KubeVirt
            | Kind::Pod
            | Kind::Node
            | Kind::PersistentVolume
            | Kind::PersistentVolumeClaim
            | Kind::NodeMaintenance
            | Kind::KubeVirtNodeMaintenance
            | Kind::OldestNodeMaintenance
            | Kind::PodDisruptionBudget
    )
}

/// The merge patch (RFC 7386) that turns `old` into `new`; `None` when they are equal. Lists are replaced whole.
pub fn merge_difference(old: &Value, new: &Value) -> Option<Value> {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            let mut patch = Map::new();
            for (key, value) in new {
                match old.get(key) {
                    None if value.is_null() => {}
                    None => {
                        patch.insert(key.clone(), value.clone());
                    }
                    Some(before) => {
                        if let Some(difference) = merge_difference(before, value) {
                            patch.insert(key.clone(), difference);
                        }
                    }
                }
            }
            for (key, value) in old {
                if !new.contains_key(key) && !value.is_null() {
                    patch.insert(key.clone(), Value::Null);
                }
            }
            (!patch.is_empty()).then_some(Value::Object(patch))
        }
        (old, new) if old == new => None,
        (_, new) => Some(new.clone()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn no_time_that_somebody_wrote_is_too_late_to_count_from() {
        let pause = SignedDuration::from_secs(60);
        assert_eq!(later(Timestamp::UNIX_EPOCH, pause), Timestamp::from_second(60).unwrap());
        assert_eq!(later(Timestamp::MAX, pause), Timestamp::MAX);
        assert_eq!(later(Timestamp::UNIX_EPOCH, SignedDuration::MAX), Timestamp::MAX);
    }

    #[test]
    fn difference_sets_changes_and_removes() {
        let old = json!({"a": 1, "b": {"c": 1, "d": 2}, "list": [1, 2], "same": {"x": 1}});
        let new = json!({"a": 2, "b": {"c": 1, "e": 3}, "list": [1], "same": {"x": 1}});
        assert_eq!(merge_difference(&old, &new), Some(json!({"a": 2, "b": {"d": null, "e": 3}, "list": [1]})));
        assert_eq!(merge_difference(&old, &old), None);
    }
}
