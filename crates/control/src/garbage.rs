//! Objects whose owners are gone, and owners that go with or without what they own: what Kubernetes' garbage collector does,
//! for the kinds that are known here. Only where there is no kube-controller-manager.

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use serde_json::{Value, json};
use smol_str::SmolStr;

use crate::object::{Kind, Name, Object, Ref};
use crate::plan::{Effect, Plan, View};
use crate::world::{Change, World};

/// Finalizer of an owner that goes after what says that it blocks it (Kubernetes').
const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of an owner that goes alone (Kubernetes').
const ORPHAN: &str = "orphan";

/// An owner: which object, by its UID, since its name may be another's by now.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// What it is or was.
    pub object: Ref,
    /// Its UID.
    pub uid: SmolStr,
}

impl Owner {
    /// The owner that an object in this namespace names, if it is of a kind that is known.
    fn of(reference: &OwnerReference, namespace: &str) -> Option<Self> {
        let same = |kind: &Kind| {
            let group = reference.api_version.split_once('/').map_or("", |(group, _)| group);
            kind.kind() == reference.kind && kind.group() == group
        };
        let kind = Kind::ALL.iter().copied().find(same)?;
        let name = Name::new(if kind.namespaced() { namespace } else { "" }, reference.name.as_str());
        Some(Self { object: Ref::new(kind, name), uid: SmolStr::new(&reference.uid) })
    }

    fn itself(object: &Object) -> Self {
        Self { object: object.reference(), uid: object.metadata().uid.as_deref().map(SmolStr::new).unwrap_or_default() }
    }

    /// As it is known, if it still is.
    fn held(&self, world: &World) -> Option<Object> {
        let held = world.get(self.object.kind, &self.object.name)?;
        (held.metadata().uid.as_deref() == Some(self.uid.as_str())).then_some(held)
    }
}

fn references(meta: &ObjectMeta) -> &[OwnerReference] {
    meta.owner_references.as_deref().unwrap_or_default()
}

fn owners(object: &Object) -> impl Iterator<Item = Owner> {
    let meta = object.metadata();
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    references(meta).iter().filter_map(move |reference| Owner::of(reference, namespace))
}

fn has(meta: &ObjectMeta, finalizer: &str) -> bool {
    meta.finalizers.iter().flatten().any(|one| one == finalizer)
}

fn is_deleting(object: &Object) -> bool {
    object.metadata().deletion_timestamp.is_some()
}

/// The owners that are to be looked at after a change.
pub fn affected(change: &Change) -> Vec<Owner> {
    let mut found = Vec::new();
    match (&change.before, &change.after) {
        // It may have come after its owner went.
        (None, Some(object)) => found.extend(owners(object)),
        (_, None) => {
            found.extend(change.before.iter().map(Owner::itself));
            // An owner may wait for it.
            found.extend(change.before.iter().flat_map(owners));
        }
        _ => {}
    }
    let waits = |object: &&Object| {
        is_deleting(object) && [FOREGROUND, ORPHAN].iter().any(|finalizer| has(object.metadata(), finalizer))
    };
    found.extend(change.after.iter().filter(waits).map(Owner::itself));
    found
}

/// Every owner there is to look at.
pub fn all(world: &World) -> BTreeSet<Owner> {
    world.objects().flat_map(|object| owners(&object).chain([Owner::itself(&object)]).collect::<Vec<_>>()).collect()
}

/// Decides about what an owner has.
pub fn decide(owner: &Owner, view: &View<'_>) -> Plan {
    let world = view.world;
    let mut plan = Plan::nothing();
    let dependents = world
        .objects()
        .filter(|object| references(object.metadata()).iter().any(|reference| reference.uid == owner.uid.as_str()));
    let Some(held) = owner.held(world) else {
        // What the cache does not know may be there all the same.
        let another = world.get(owner.object.kind, &owner.object.name);
        let revision = another.and_then(|another| another.metadata().resource_version.clone());
        plan.push(Effect::Confirm { target: owner.object.clone(), revision });
        for object in dependents.filter(|object| !is_deleting(object)) {
            let meta = object.metadata();
            let namespace = meta.namespace.as_deref().unwrap_or_default();
            // Of what is not known here nobody here can say that it is gone.
            let lives = |one: &&OwnerReference| Owner::of(one, namespace).is_none_or(|one| one.held(world).is_some());
            let left: Vec<&OwnerReference> = references(meta).iter().filter(lives).collect();
            match left.is_empty() {
                true => plan.push(delete(&object)),
                false => plan.push(forget(&object, &left)),
            }
        }
        // A confirmation alone is none.
        return if plan.effects.len() > 1 { plan } else { Plan::nothing() };
    };
    let meta = held.metadata();
    if !is_deleting(&held) {
        return plan;
    }
    if has(meta, ORPHAN) {
        for object in dependents {
            let others = references(object.metadata()).iter().filter(|one| one.uid != owner.uid.as_str()).collect();
            plan.push(forget(&object, &others));
        }
        plan.push(without(&held, ORPHAN));
    } else if has(meta, FOREGROUND) {
        let mut blocked = false;
        for object in dependents {
            let blocks = |one: &OwnerReference| one.uid == owner.uid.as_str() && one.block_owner_deletion == Some(true);
            blocked |= references(object.metadata()).iter().any(blocks);
            let others = owners(&object).any(|other| other != *owner && other.held(world).is_some());
            if !is_deleting(&object) && !others {
                plan.push(delete(&object));
            }
        }
        if !blocked {
            plan.push(without(&held, FOREGROUND));
        }
    }
    plan
}

fn delete(object: &Object) -> Effect {
    let uid = object.metadata().uid.clone().unwrap_or_default();
    Effect::Delete { target: object.reference(), uid, grace_seconds: None }
}

fn patch(object: &Object, mut metadata: Value) -> Effect {
    metadata["resourceVersion"] = object.metadata().resource_version.clone().into();
    Effect::Patch(object.reference(), json!({"metadata": metadata}))
}

/// The object forgets all its owners but these.
fn forget(object: &Object, left: &Vec<&OwnerReference>) -> Effect {
    let left = if left.is_empty() { Value::Null } else { json!(left) };
    patch(object, json!({"ownerReferences": left}))
}

fn without(object: &Object, finalizer: &str) -> Effect {
    let left: Vec<&String> = object.metadata().finalizers.iter().flatten().filter(|one| *one != finalizer).collect();
    patch(object, json!({"finalizers": left}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Cluster;
    use crate::{Key, Stored};

    fn put(cluster: &mut Cluster, kind: Kind, name: &str, uid: &str, owners: &[(&str, &str)]) {
        let owners: Vec<Value> = owners
            .iter()
            .map(|(name, uid)| {
                json!({"apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": uid, "blockOwnerDeletion": true})
            })
            .collect();
        let meta = json!({"namespace": "default", "name": name, "uid": uid, "ownerReferences": owners});
        cluster.put(kind, json!({"metadata": meta, "spec": {"containers": []}}));
    }

    fn owner(name: &str, uid: &str) -> Key {
        let object = Ref::new(Kind::ConfigMap, Name::new("default", name));
        Key::Garbage(Owner { object, uid: uid.into() })
    }

    fn effects(cluster: &Cluster, key: &Key) -> Vec<String> {
        let tell = |effect: &Effect| match effect {
            Effect::Confirm { target, .. } => format!("confirm {target}"),
            Effect::Delete { target, uid, .. } => format!("delete {target} {uid}"),
            Effect::Patch(target, patch) => {
                let meta = &patch["metadata"];
                assert!(meta["resourceVersion"].is_string(), "{patch}");
                match meta.get("finalizers") {
                    Some(left) => format!("{target} keeps {left}"),
                    None => format!("{target} forgets all but {}", meta["ownerReferences"]),
                }
            }
            other => panic!("{other:?}"),
        };
        cluster.decide(key).effects.iter().map(tell).collect()
    }

    #[test]
    fn what_nobody_owns_any_more_goes_and_the_rest_forgets() {
        let mut cluster = Cluster::new();
        put(&mut cluster, Kind::ConfigMap, "one", "u1", &[]);
        put(&mut cluster, Kind::ConfigMap, "two", "u2", &[]);
        put(&mut cluster, Kind::Pod, "a", "pa", &[("one", "u1")]);
        put(&mut cluster, Kind::Pod, "b", "pb", &[("one", "u1"), ("two", "u2")]);
        put(&mut cluster, Kind::Pod, "c", "pc", &[]);
        assert!(effects(&cluster, &owner("one", "u1")).is_empty(), "it lives");
        cluster.remove(Kind::ConfigMap, &Name::new("default", "one"));
        let found = effects(&cluster, &owner("one", "u1"));
        assert_eq!(found[..2], ["confirm ConfigMap default/one", "delete Pod default/a pa"]);
        assert!(found[2].starts_with("Pod default/b forgets all but") && found[2].contains("u2"), "{found:?}");
        // Another of its name is not it.
        put(&mut cluster, Kind::ConfigMap, "one", "u9", &[]);
        assert_eq!(effects(&cluster, &owner("one", "u1")).len(), 3);
    }

    #[test]
    fn what_somebody_unknown_owns_stays() {
        let mut cluster = Cluster::new();
        let owner_references = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "ur"},
            {"apiVersion": "v1", "kind": "ConfigMap", "name": "one", "uid": "u1"}]);
        let meta = json!({"namespace": "default", "name": "a", "uid": "pa", "ownerReferences": owner_references});
        cluster.put(Kind::Pod, json!({"metadata": meta, "spec": {"containers": []}}));
        let found = effects(&cluster, &owner("one", "u1"));
        assert!(
            found.len() == 2 && found[1].contains("forgets all but") && found[1].contains("ReplicaSet"),
            "{found:?}"
        );
    }

    #[test]
    fn an_owner_goes_after_what_blocks_it_or_without_what_it_owns() {
        let mut cluster = Cluster::new();
        put(&mut cluster, Kind::ConfigMap, "one", "u1", &[]);
        put(&mut cluster, Kind::Pod, "a", "pa", &[("one", "u1")]);
        let name = Name::new("default", "one");
        let going = |finalizer: &str| json!({"metadata": {"deletionTimestamp": "2026-11-22T10:00:00Z", "finalizers": [finalizer, "x"]}});
        cluster.patch(Kind::ConfigMap, &name, going(FOREGROUND));
        assert_eq!(effects(&cluster, &owner("one", "u1")), ["delete Pod default/a pa"]);
        cluster.remove(Kind::Pod, &Name::new("default", "a"));
        assert_eq!(effects(&cluster, &owner("one", "u1")), ["ConfigMap default/one keeps [\"x\"]"]);
        put(&mut cluster, Kind::Pod, "a", "pa", &[("one", "u1")]);
        cluster.patch(Kind::ConfigMap, &name, going(ORPHAN));
        let found = effects(&cluster, &owner("one", "u1"));
        assert_eq!(found, ["Pod default/a forgets all but null", "ConfigMap default/one keeps [\"x\"]"]);
    }

    #[test]
    fn changes_that_matter_are_looked_at() {
        let mut cluster = Cluster::new();
        put(&mut cluster, Kind::Pod, "a", "pa", &[("one", "u1")]);
        let pod = cluster.world.pods.get(&Name::new("default", "a")).unwrap().clone();
        let pod = Stored::wrap(pod);
        let keys = |before: Option<&Object>, after: Option<&Object>| {
            let change = Change { before: before.cloned(), after: after.cloned() };
            affected(&change).into_iter().map(Key::Garbage).collect::<Vec<_>>()
        };
        assert_eq!(keys(None, Some(&pod)), [owner("one", "u1")]);
        assert_eq!(keys(Some(&pod), Some(&pod)), []);
        let gone = keys(Some(&pod), None);
        assert!(gone.len() == 2 && gone.contains(&owner("one", "u1")), "itself may own something: {gone:?}");
    }
}
