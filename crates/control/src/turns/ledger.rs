//! The ledger of slots: one ConfigMap that says which migrations may be under way.
//!
//! It is written before a target pod is made, each time on the revision that the decision has seen. So the number of
//! slots is exact whatever a controller has missed: of two that decide on the same state, one is refused.

use std::collections::{BTreeMap, BTreeSet};

use godwit_api::Installation;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::object::{Kind, Name, Ref, revision};
use crate::plan::Effect;

/// The name of the ledger's ConfigMap, in the installation's namespace.
pub const LEDGER: &str = "godwit-migration-slots";

/// The ledger as an object to write to.
pub fn reference(installation: &Installation) -> Ref {
    Ref::new(Kind::ConfigMap, Name::new(installation.namespace(), LEDGER))
}

/// Whether this is the ledger's name.
pub fn is_ledger(name: &Name, installation: &Installation) -> bool {
    name.name == LEDGER && name.namespace == installation.namespace()
}

/// One migration's right to be under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Slot {
    /// The migration, `namespace/name`; for people, and for its namespace.
    pub migration: String,
    /// The name of its VMI.
    pub vmi: String,
    /// The node that it leaves.
    pub source: String,
    /// The node that it goes to, as far as is known: reserved when the slot is given, final when the pod is bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Nodes that it was to go to before. They count as long as somebody may still bind the pod there, which is until
    /// it is bound.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<String>,
    /// The migration's revision when the slot was given: who has seen less of the migrations cannot say that it is gone.
    pub seen: String,
}

impl Slot {
    /// The nodes where its pod may be bound.
    pub fn targets(&self) -> impl Iterator<Item = &String> {
        self.target.iter().chain(&self.also)
    }

    /// The slot with another target; the old ones count on.
    pub fn moved_to(&self, node: &str) -> Self {
        let mut also: Vec<String> = self.targets().filter(|other| *other != node).cloned().collect();
        also.sort();
        also.dedup();
        Self { target: Some(node.to_owned()), also, ..self.clone() }
    }

    /// The revision in `seen`; 0 when there is none.
    pub fn seen(&self) -> u64 {
        self.seen.parse().unwrap_or(0)
    }

    fn to_text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// The ledger as it was read.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// The ConfigMap's metadata; `None` when there is none.
    pub meta: Option<ObjectMeta>,
    /// The slots, by the migration's UID.
    pub slots: BTreeMap<String, Slot>,
}

impl Ledger {
    /// Reads the ConfigMap. What cannot be read as a slot counts as one all the same.
    pub fn read(map: Option<&ConfigMap>) -> Self {
        let data = map.and_then(|map| map.data.as_ref()).into_iter().flatten();
        let slots = data.map(|(uid, text)| (uid.clone(), serde_json::from_str(text).unwrap_or_default())).collect();
        Self { meta: map.map(|map| map.metadata.clone()), slots }
    }

    /// The UIDs whose slots differ between two readings.
    pub fn differences(&self, other: &Self) -> BTreeSet<String> {
        let uids = self.slots.keys().chain(other.slots.keys());
        uids.filter(|uid| self.slots.get(*uid) != other.slots.get(*uid)).cloned().collect()
    }

    /// The write that gives and takes (`None`) slots, refused when the ledger is not as it was read any more.
    pub fn write(&self, changes: &BTreeMap<String, Option<Slot>>, installation: &Installation) -> Effect {
        let revision = self.meta.as_ref().and_then(|meta| meta.resource_version.clone());
        let data: Map<String, Value> = changes
            .iter()
            .map(|(uid, slot)| (uid.clone(), slot.as_ref().map_or(Value::Null, |slot| Value::String(slot.to_text()))))
            .collect();
        Effect::Patch(reference(installation), json!({"metadata": {"resourceVersion": revision}, "data": data}))
    }

    /// Whether what it says can be relied on: its revision is known.
    pub fn is_there(&self) -> bool {
        self.meta.as_ref().is_some_and(|meta| revision(meta) != 0 || meta.resource_version.is_some())
    }
}

/// A ledger that begins with these slots.
pub fn begin(slots: &BTreeMap<String, Slot>, installation: &Installation) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta {
            namespace: Some(installation.namespace().to_owned()),
            name: Some(LEDGER.to_owned()),
            ..ObjectMeta::default()
        },
        data: Some(slots.iter().map(|(uid, slot)| (uid.clone(), slot.to_text())).collect()),
        ..ConfigMap::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let slot = Slot { migration: "ns/m".into(), vmi: "v".into(), source: "node1".into(), ..Slot::default() };
        let moved = slot.moved_to("a").moved_to("b").moved_to("a");
        assert_eq!((moved.target.as_deref(), &moved.also[..]), (Some("a"), &["b".to_owned()][..]));
        let slots = BTreeMap::from([("u".to_owned(), slot), ("w".to_owned(), moved)]);
        let map = begin(&slots, &Installation::USUAL);
        assert_eq!(Ledger::read(Some(&map)).slots, slots);
    }

    #[test]
    fn what_cannot_be_read_counts() {
        let map = ConfigMap { data: Some(BTreeMap::from([("u".to_owned(), "?".to_owned())])), ..ConfigMap::default() };
        assert_eq!(Ledger::read(Some(&map)).slots["u"], Slot::default());
    }
}
