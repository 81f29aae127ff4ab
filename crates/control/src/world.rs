//! What the controllers know: every watched object, with the indexes that decisions need.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_api::{
    KubeVirt, MigrationPolicy, MigrationRecord, NetworkAttachmentDefinition, VirtualMachine, VirtualMachineInstance,
    VirtualMachineInstanceMigration,
};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, ResourceQuota,
};
use k8s_openapi::api::storage::v1::StorageClass;

use crate::names;
use crate::object::{Kind, Name, Object, Stored};

/// All objects of one type, by name.
#[derive(Clone, Debug)]
pub struct Table<T>(BTreeMap<Name, Arc<T>>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Table<T> {
    /// The object of this name.
    pub fn get(&self, name: &Name) -> Option<&Arc<T>> {
        self.0.get(name)
    }

    /// All objects, in order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<T>> {
        self.0.values()
    }

    /// All names in order.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.0.keys()
    }

    /// The objects of these names that exist.
    pub fn pick<'a>(&'a self, names: Option<&'a BTreeSet<Name>>) -> impl Iterator<Item = &'a Arc<T>> {
        names.into_iter().flatten().filter_map(|name| self.0.get(name))
    }
}

/// Where a piece of news comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A watch or list of the API server: in order within a kind, possibly behind what we have written ourselves.
    Watch,
    /// The answer to a write or read of our own: possibly behind the watch.
    Answer,
}

/// One change of the world.
#[derive(Clone, Debug)]
pub struct Change {
    /// The object before, `None` when it is new.
    pub before: Option<Object>,
    /// The object after, `None` when it is gone.
    pub after: Option<Object>,
}

impl Change {
    /// The object as last known: after the change, or before it when it is gone.
    pub fn latest(&self) -> Option<&Object> {
        self.after.as_ref().or(self.before.as_ref())
    }

    /// Both sides of the change that exist.
    pub fn sides(&self) -> impl Iterator<Item = &Object> {
        self.before.iter().chain(self.after.iter())
    }
}

/// A map from something objects refer to, to the objects that refer to it.
type Index = BTreeMap<String, BTreeSet<Name>>;

/// A typed, indexed cache of the cluster. It never goes back: news older than what is held is ignored.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// VirtualMachines.
    pub vms: Table<VirtualMachine>,
    /// VirtualMachineInstances.
    pub vmis: Table<VirtualMachineInstance>,
    /// VirtualMachineInstanceMigrations.
    pub migrations: Table<VirtualMachineInstanceMigration>,
    /// KubeVirt installations.
    pub kubevirts: Table<KubeVirt>,
    /// NetworkAttachmentDefinitions.
    pub networks: Table<NetworkAttachmentDefinition>,
    /// Pods.
    pub pods: Table<Pod>,
    /// Nodes.
    pub nodes: Table<Node>,
    /// PersistentVolumeClaims.
    pub claims: Table<PersistentVolumeClaim>,
    /// PersistentVolumes.
    pub volumes: Table<PersistentVolume>,
    /// StorageClasses.
    pub classes: Table<StorageClass>,
    /// ConfigMaps.
    pub config_maps: Table<ConfigMap>,
    /// Namespaces.
    pub namespaces: Table<Namespace>,
    /// ResourceQuotas.
    pub quotas: Table<ResourceQuota>,
    /// MigrationPolicies.
    pub policies: Table<MigrationPolicy>,
    /// What remains of finished migrations.
    pub records: Table<MigrationRecord>,
    /// Leases.
    pub leases: Table<Lease>,

    /// Newest revision that the watch of a kind has shown.
    horizon: BTreeMap<Kind, u64>,
    pods_by_node: Index,
    pods_by_vmi_uid: Index,
    pods_by_migration_uid: Index,
    pods_by_claim: Index,
    vmis_by_node: Index,
    vmis_by_uid: Index,
    migrations_by_vmi: Index,
}

/// What an object is indexed under.
#[derive(Default)]
struct Terms {
    pods_by_node: Vec<String>,
    pods_by_vmi_uid: Vec<String>,
    pods_by_migration_uid: Vec<String>,
    pods_by_claim: Vec<String>,
    vmis_by_node: Vec<String>,
    vmis_by_uid: Vec<String>,
    migrations_by_vmi: Vec<String>,
}

impl World {
    /// Takes in an object as seen at its revision. Returns the change, or `None` when this was already known or is older
    /// than what is held.
    pub fn apply(&mut self, object: Object, source: Source) -> Option<Change> {
        let (kind, name, seen) = (object.kind(), object.name(), object.revision());
        let horizon = self.horizon.entry(kind).or_default();
        let behind = seen != 0 && seen <= *horizon;
        if source == Source::Watch {
            *horizon = seen.max(*horizon);
        }
        let before = self.get(kind, &name);
        match &before {
            Some(held) if seen != 0 && held.revision() >= seen => return None,
            // The watch has already passed this revision without the object being here: it was deleted since.
            None if source == Source::Answer && behind => return None,
            _ => {}
        }
        let change = Change { before, after: Some(object.clone()) };
        self.index(&change);
        self.put(object);
        Some(change)
    }

    /// Takes in that an object is gone. `object` is its last state; what was created again under the name stays.
    pub fn delete(&mut self, object: &Object, source: Source) -> Option<Change> {
        let (kind, name, seen) = (object.kind(), object.name(), object.revision());
        if source == Source::Watch {
            let horizon = self.horizon.entry(kind).or_default();
            *horizon = seen.max(*horizon);
        }
        let held = self.get(kind, &name)?;
        if held.metadata().uid != object.metadata().uid && held.revision() > seen {
            return None;
        }
        self.forget(kind, &name)
    }

    /// Drops an object whatever its revision (a read answered "not found", or a list no longer has it).
    pub fn forget(&mut self, kind: Kind, name: &Name) -> Option<Change> {
        let change = Change { before: Some(self.get(kind, name)?), after: None };
        self.index(&change);
        self.remove(kind, name);
        Some(change)
    }

    fn index(&mut self, change: &Change) {
        let empty = Terms::default();
        let name = match change.latest() {
            Some(object) => object.name(),
            None => return,
        };
        let old = change.before.as_ref().map(terms);
        let new = change.after.as_ref().map(terms);
        let (old, new) = (old.as_ref().unwrap_or(&empty), new.as_ref().unwrap_or(&empty));
        for (index, old, new) in [
            (&mut self.pods_by_node, &old.pods_by_node, &new.pods_by_node),
            (&mut self.pods_by_vmi_uid, &old.pods_by_vmi_uid, &new.pods_by_vmi_uid),
            (&mut self.pods_by_migration_uid, &old.pods_by_migration_uid, &new.pods_by_migration_uid),
            (&mut self.pods_by_claim, &old.pods_by_claim, &new.pods_by_claim),
            (&mut self.vmis_by_node, &old.vmis_by_node, &new.vmis_by_node),
            (&mut self.vmis_by_uid, &old.vmis_by_uid, &new.vmis_by_uid),
            (&mut self.migrations_by_vmi, &old.migrations_by_vmi, &new.migrations_by_vmi),
        ] {
            for term in old.iter().filter(|term| !new.contains(term)) {
                if let Some(names) = index.get_mut(term) {
                    names.remove(&name);
                    if names.is_empty() {
                        index.remove(term);
                    }
                }
            }
            for term in new {
                index.entry(term.clone()).or_default().insert(name.clone());
            }
        }
    }

    /// Pods bound to a node.
    pub fn pods_on(&self, node: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.pick(self.pods_by_node.get(node))
    }

    /// Launcher pods made for a VMI, by its UID.
    pub fn pods_of_vmi(&self, uid: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.pick(self.pods_by_vmi_uid.get(uid))
    }

    /// Target pods made for a migration, by its UID.
    pub fn pods_of_migration(&self, uid: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.pick(self.pods_by_migration_uid.get(uid))
    }

    /// Pods that use a claim.
    pub fn pods_using(&self, claim: &Name) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.pick(self.pods_by_claim.get(&claim.to_string()))
    }

    /// VMIs whose `status.nodeName` is this node.
    pub fn vmis_on(&self, node: &str) -> impl Iterator<Item = &Arc<VirtualMachineInstance>> {
        self.vmis.pick(self.vmis_by_node.get(node))
    }

    /// The VMI with this UID.
    pub fn vmi_by_uid(&self, uid: &str) -> Option<&Arc<VirtualMachineInstance>> {
        self.vmis.pick(self.vmis_by_uid.get(uid)).next()
    }

    /// Migrations of a VMI, by its name.
    pub fn migrations_of(&self, vmi: &Name) -> impl Iterator<Item = &Arc<VirtualMachineInstanceMigration>> {
        self.migrations.pick(self.migrations_by_vmi.get(&vmi.to_string()))
    }
}

macro_rules! tables {
    ($($variant:ident $field:ident),* $(,)?) => {
        impl World {
            /// The object of this kind and name.
            pub fn get(&self, kind: Kind, name: &Name) -> Option<Object> {
                match kind { $(Kind::$variant => self.$field.get(name).cloned().map(Stored::wrap),)* }
            }

            /// The names of all objects of a kind.
            pub fn names_of(&self, kind: Kind) -> Vec<Name> {
                match kind { $(Kind::$variant => self.$field.names().cloned().collect(),)* }
            }

            fn put(&mut self, object: Object) {
                let name = object.name();
                match object { $(Object::$variant(object) => { self.$field.0.insert(name, object); })* }
            }

            fn remove(&mut self, kind: Kind, name: &Name) {
                match kind { $(Kind::$variant => { self.$field.0.remove(name); })* }
            }
        }
    };
}

tables! {
    VirtualMachine vms,
    VirtualMachineInstance vmis,
    Migration migrations,
    KubeVirt kubevirts,
    NetworkAttachmentDefinition networks,
    Pod pods,
    Node nodes,
    PersistentVolumeClaim claims,
    PersistentVolume volumes,
    StorageClass classes,
    ConfigMap config_maps,
    Namespace namespaces,
    ResourceQuota quotas,
    MigrationPolicy policies,
    MigrationRecord records,
    Lease leases,
}

fn terms(object: &Object) -> Terms {
    let mut terms = Terms::default();
    match object {
        Object::Pod(pod) => {
            let spec = pod.spec.as_ref();
            terms.pods_by_node.extend(spec.and_then(|spec| spec.node_name.clone()).filter(|node| !node.is_empty()));
            terms.pods_by_vmi_uid.extend(pod.label(names::LABEL_CREATED_BY).map(str::to_owned));
            terms.pods_by_migration_uid.extend(pod.label(names::LABEL_MIGRATION_JOB_UID).map(str::to_owned));
            terms.pods_by_claim.extend(claims_of(pod).map(|claim| claim.to_string()));
        }
        Object::VirtualMachineInstance(vmi) => {
            terms.vmis_by_uid.extend(vmi.metadata.uid.clone());
            let node = vmi.status.node_name.clone();
            terms.vmis_by_node.extend(node.filter(|node| !node.is_empty()));
        }
        Object::Migration(migration) => {
            terms.migrations_by_vmi.push(Name::new(migration.namespace(), migration.vmi_name()).to_string());
        }
        _ => {}
    }
    terms
}

/// The claims that a pod's volumes name.
pub fn claims_of(pod: &Pod) -> impl Iterator<Item = Name> {
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
    volumes.into_iter().flatten().filter_map(|volume| {
        let source = volume.persistent_volume_claim.as_ref()?;
        Some(Name::new(pod.namespace(), &source.claim_name))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(uid: &str, revision: u64, node: Option<&str>) -> Object {
        let value = json!({
            "metadata": {
                "name": "p", "namespace": "ns", "uid": uid, "resourceVersion": revision.to_string(),
                "labels": {"kubevirt.io/created-by": "vmi"},
            },
            "spec": {"nodeName": node, "containers": []},
        });
        Object::from_value(Kind::Pod, value).unwrap()
    }

    fn name() -> Name {
        Name::new("ns", "p")
    }

    #[test]
    fn old_news_are_ignored() {
        let mut world = World::default();
        assert!(world.apply(pod("a", 5, None), Source::Watch).is_some());
        assert!(world.apply(pod("a", 9, Some("node1")), Source::Answer).is_some(), "our own write");
        assert!(world.apply(pod("a", 7, None), Source::Watch).is_none(), "the watch is behind");
        assert!(world.apply(pod("a", 9, Some("node1")), Source::Watch).is_none(), "known already");
        assert_eq!(world.get(Kind::Pod, &name()).unwrap().revision(), 9);
    }

    #[test]
    fn an_answer_does_not_bring_back_what_was_deleted_since() {
        let mut world = World::default();
        world.apply(pod("a", 5, None), Source::Watch);
        assert!(world.delete(&pod("a", 8, None), Source::Watch).is_some());
        assert!(world.apply(pod("a", 6, None), Source::Answer).is_none());
        assert!(world.get(Kind::Pod, &name()).is_none());
        assert!(world.apply(pod("b", 9, None), Source::Answer).is_some(), "a new one is ahead of the watch");
    }

    #[test]
    fn a_late_deletion_leaves_the_successor_alone() {
        let mut world = World::default();
        world.apply(pod("b", 9, None), Source::Answer);
        assert!(world.delete(&pod("a", 8, None), Source::Watch).is_none());
        assert!(world.get(Kind::Pod, &name()).is_some());
    }

    #[test]
    fn indexes_follow_the_objects() {
        let mut world = World::default();
        world.apply(pod("a", 1, None), Source::Watch);
        assert_eq!((world.pods_on("node1").count(), world.pods_of_vmi("vmi").count()), (0, 1));
        world.apply(pod("a", 2, Some("node1")), Source::Watch);
        assert_eq!(world.pods_on("node1").count(), 1);
        world.apply(pod("a", 3, Some("node2")), Source::Watch);
        assert_eq!((world.pods_on("node1").count(), world.pods_on("node2").count()), (0, 1));
        world.forget(Kind::Pod, &name());
        assert_eq!((world.pods_on("node2").count(), world.pods_of_vmi("vmi").count()), (0, 0));
    }
}
