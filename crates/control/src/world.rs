//! What the controllers know: every watched object, with the indexes that decisions need.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use godwit_api::maintenance::{kubevirt as nm_kubevirt, medik8s as nm_medik8s, oldest as nm_oldest};
use godwit_api::{
    Installation, KubeVirt, MigrationConfiguration, MigrationPolicy, MigrationRecord, NetworkAttachmentDefinition,
    VirtualMachine, VirtualMachineInstance, VirtualMachineInstanceMigration, VmiPhase,
};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, ResourceQuota,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::storage::v1::StorageClass;
use smol_str::SmolStr;

use crate::fence::{self, Heard};
use crate::object::{Kind, Name, Object, Stored};
use crate::ordered::Ordered;
use crate::table::{Names, Table};
use crate::{
    evacuation, homecoming, hotplug, kubevirt, names, node, persistent_state, placement, pod_security, turns, volumes,
    workloads,
};

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
type Index = BTreeMap<String, Names>;

/// That the server would not make a pod, or evict it.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// Why, in the server's words.
    pub message: String,
    /// When it was first refused.
    pub first: Timestamp,
    /// When it was last refused.
    pub last: Timestamp,
}

impl Refusal {
    /// Whether a ResourceQuota is the reason.
    pub fn is_quota(&self) -> bool {
        self.message.contains("exceeded quota")
    }
}

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
    /// NodeMaintenances of `nodemaintenance.medik8s.io`.
    pub maintenances: Table<nm_medik8s::NodeMaintenance>,
    /// NodeMaintenances of `nodemaintenance.kubevirt.io`.
    pub kubevirt_maintenances: Table<nm_kubevirt::NodeMaintenance>,
    /// NodeMaintenances of `kubevirt.io`.
    pub oldest_maintenances: Table<nm_oldest::NodeMaintenance>,
    /// Leases.
    pub leases: Table<Lease>,
    /// PodDisruptionBudgets.
    pub budgets: Table<PodDisruptionBudget>,

    installation: Installation,
    /// Newest revision that the watch of a kind has shown.
    horizon: BTreeMap<Kind, u64>,
    pods_by_node: Index,
    pods_by_vmi_uid: Index,
    pods_by_migration_uid: Index,
    attachments_by_launcher: Index,
    pods_by_claim: Index,
    pods_by_guest: Index,
    vmis_by_node: Index,
    vmis_by_uid: Index,
    migrations_by_vmi: Index,
    migrations_by_uid: Index,
    vmis_by_claim: Index,
    volumes_by_claim: Index,
    pods_by_label: Index,
    pods_by_repelled: Index,
    pods_without_node: Index,
    claims_unbound: Index,
    claims_by_guest: Index,
    records_by_vmi: Index,
    vmis_by_home: Index,
    vmis_to_evacuate: Index,
    vmis_unstarted: Index,
    vmis_outdated: Index,
    migrations_unfinished: Index,
    nodes_that_keep_files: Index,

    /// Target pods that the server would not make.
    refusals: BTreeMap<Name, Refusal>,
    /// Pods that the server would not evict, by their UIDs.
    unevicted: BTreeMap<SmolStr, Refusal>,
    /// Who waits for a turn, and who has it.
    turns: turns::Index,
    /// What the pods of each node ask for.
    loads: placement::Loads,
    /// The migration configuration in force; `None` before anything was said about it.
    configuration: Option<MigrationConfiguration>,
    /// The time, by the clock of whoever keeps this world.
    clock: Timestamp,
    /// When a node last gave a sign of life, by that clock.
    heard: Ordered<SmolStr, Timestamp>,
    /// When the fence lease of a node was renewed, by that clock.
    fences: Ordered<SmolStr, Heard>,
}

/// What an object is indexed under.
#[derive(Default)]
struct Terms {
    pods_by_node: Vec<String>,
    pods_by_vmi_uid: Vec<String>,
    pods_by_migration_uid: Vec<String>,
    attachments_by_launcher: Vec<String>,
    pods_by_claim: Vec<String>,
    pods_by_guest: Vec<String>,
    vmis_by_node: Vec<String>,
    vmis_by_uid: Vec<String>,
    migrations_by_vmi: Vec<String>,
    migrations_by_uid: Vec<String>,
    vmis_by_claim: Vec<String>,
    volumes_by_claim: Vec<String>,
    pods_by_label: Vec<String>,
    pods_by_repelled: Vec<String>,
    pods_without_node: Vec<String>,
    claims_unbound: Vec<String>,
    claims_by_guest: Vec<String>,
    records_by_vmi: Vec<String>,
    vmis_by_home: Vec<String>,
    vmis_to_evacuate: Vec<String>,
    vmis_unstarted: Vec<String>,
    vmis_outdated: Vec<String>,
    migrations_unfinished: Vec<String>,
    nodes_that_keep_files: Vec<String>,
}

impl World {
    /// What is known of a cluster where godwit is installed there: nothing yet.
    pub fn of(installation: Installation) -> Self {
        Self { installation, ..Self::default() }
    }

    /// Where godwit is installed.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// The installation's KubeVirt object.
    pub fn kubevirt(&self) -> Option<&Arc<KubeVirt>> {
        self.kubevirts.get(&kubevirt::name_in(&self.installation))
    }

    /// From now on news are taken in at this time.
    pub fn set_clock(&mut self, now: Timestamp) {
        self.clock = now;
    }

    /// When the news of a node's last sign of life came: its lease renewed, or its status posted. The times that are written
    /// there are those of the node's clock, which may be wrong; like Kubernetes' node controller, only that they have
    /// changed counts. `None` when it has never given one.
    pub fn heard_of(&self, node: &str) -> Option<Timestamp> {
        self.heard.get(node).copied()
    }

    /// The time when the last news were taken in.
    pub fn clock(&self) -> Timestamp {
        self.clock
    }

    /// When a node's fence lease was heard of; `None` when it has none.
    pub fn fence_heard(&self, node: &str) -> Option<Heard> {
        self.fences.get(node).copied()
    }

    /// The nodes with a fence lease.
    pub fn fenced_nodes(&self) -> impl Iterator<Item = &SmolStr> {
        self.fences.keys()
    }

    /// Whether an object is held in this state or a newer one.
    pub fn knows(&self, object: &Object) -> bool {
        let seen = object.revision();
        seen != 0 && self.get(object.kind(), &object.name()).is_some_and(|held| held.revision() >= seen)
    }

    /// Takes in that the watch or list of a kind has shown what is known at this revision.
    pub fn shown(&mut self, kind: Kind, revision: u64) {
        let horizon = self.horizon.entry(kind).or_default();
        *horizon = revision.max(*horizon);
    }

    /// Takes in an object as seen at its revision. Returns the change, or `None` when this was already known or is older
    /// than what is held.
    pub fn apply(&mut self, object: Object, source: Source) -> Option<Change> {
        let (kind, name, seen) = (object.kind(), object.name(), object.revision());
        let behind = seen != 0 && self.horizon.get(&kind).is_some_and(|horizon| seen <= *horizon);
        if source == Source::Watch {
            self.shown(kind, seen);
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
        self.follow(&change);
        Some(change)
    }

    /// Takes in that an object is gone. `object` is its last state; what was created again under the name stays.
    pub fn delete(&mut self, object: &Object, source: Source) -> Option<Change> {
        let (kind, name, seen) = (object.kind(), object.name(), object.revision());
        if source == Source::Watch {
            self.shown(kind, seen);
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
        self.follow(&change);
        Some(change)
    }

    /// Packs all objects when more than so many have been read or have come since the last time. They stay what they are, and are
    /// unpacked when they are asked for: this gives memory for time.
    pub fn pack(&mut self, beyond: usize) {
        if self.unpacked() > beyond {
            self.pack_all();
        }
    }

    /// Takes in that the server would not make the target pod of a migration, and why.
    pub fn refuse(&mut self, pod: Name, message: String, now: Timestamp) {
        let first = self.refusals.get(&pod).map_or(now, |before| before.first);
        self.refusals.insert(pod, Refusal { message, first, last: now });
    }

    /// Why the server would not make a pod when it was last asked to, unless something has changed since that may matter.
    pub fn refusal(&self, pod: &Name) -> Option<&Refusal> {
        self.refusals.get(pod)
    }

    /// Takes in that the server would not evict a pod now, and why.
    pub fn refuse_eviction(&mut self, pod: &Name, uid: &str, message: String, now: Timestamp) {
        if self.pods.get(pod).is_some_and(|pod| pod.uid() == uid) {
            let first = self.unevicted.get(uid).map_or(now, |before| before.first);
            self.unevicted.insert(SmolStr::new(uid), Refusal { message, first, last: now });
        }
    }

    /// Why the server would not evict the pod with this UID when it was last asked to.
    pub fn eviction_refusal(&self, uid: &str) -> Option<&Refusal> {
        self.unevicted.get(uid)
    }

    /// Brings everything that is derived from the objects up to date after a change of one of them.
    fn follow(&mut self, change: &Change) {
        match change.latest() {
            Some(Object::Pod(pod)) => {
                self.refusals.remove(&pod.key());
                // Whoever is over may go by now.
                if change.after.is_none() || placement::is_finished(pod) {
                    self.unevicted.remove(pod.uid());
                }
            }
            // It is not made any more.
            Some(Object::Migration(migration)) if change.after.is_none() || migration.is_final() => {
                let pod = names::launcher_pod(migration.vmi_name(), migration.uid());
                self.refusals.remove(&Name::new(migration.namespace(), pod));
            }
            // There may be room by now.
            Some(Object::ResourceQuota(quota)) => {
                let namespace = quota.namespace();
                self.refusals.retain(|pod, refusal| pod.namespace != namespace || !refusal.is_quota());
            }
            _ => {}
        }
        match node::sign_of_life(change) {
            Some(node) => {
                self.heard.insert(node, self.clock);
            }
            None => {
                if let (Some(Object::Node(node)), None) = (&change.before, &change.after) {
                    self.heard.remove(&SmolStr::new(node.name()));
                }
            }
        }
        if let Some(node) = fence::renewal(change, &self.installation) {
            let heard = Heard::again(self.fence_heard(&node), self.clock);
            self.fences.insert(node, heard);
        } else if let (Some(Object::Lease(lease)), None) = (&change.before, &change.after)
            && let Some(node) = fence::node_of(lease, &self.installation)
        {
            self.fences.remove(&SmolStr::new(node));
        }
        self.loads.refresh(change);
        let mut turns = std::mem::take(&mut self.turns);
        turns.refresh(change, self);
        self.turns = turns;
        let configures = match change.latest() {
            Some(Object::KubeVirt(_)) => true,
            Some(Object::ConfigMap(map)) => kubevirt::is_configuration(&map.key(), self),
            _ => false,
        };
        if configures {
            self.configuration = Some(kubevirt::read_configuration(self));
        }
    }

    /// All that is known, kind by kind.
    pub fn objects(&self) -> impl Iterator<Item = Object> {
        let of = move |kind: &Kind| {
            let kind = *kind;
            self.names_of(kind).into_iter().filter_map(move |name| self.get(kind, &name))
        };
        Kind::ALL.iter().flat_map(of)
    }

    /// The newest revision that the watch of a kind has shown: everything up to it is known.
    pub fn horizon(&self, kind: Kind) -> u64 {
        self.horizon.get(&kind).copied().unwrap_or(0)
    }

    /// Who waits for a turn to migrate, and who has it.
    pub fn turns(&self) -> &turns::Index {
        &self.turns
    }

    /// What nodes have and what their pods ask for.
    pub fn loads(&self) -> &placement::Loads {
        &self.loads
    }

    /// The migration configuration in force in the cluster, every field with a default set.
    pub fn configuration(&self) -> &MigrationConfiguration {
        static DEFAULTS: LazyLock<MigrationConfiguration> = LazyLock::new(|| godwit_api::config::effective(None, None));
        self.configuration.as_ref().unwrap_or_else(|| &DEFAULTS)
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
            (&mut self.attachments_by_launcher, &old.attachments_by_launcher, &new.attachments_by_launcher),
            (&mut self.pods_by_claim, &old.pods_by_claim, &new.pods_by_claim),
            (&mut self.pods_by_guest, &old.pods_by_guest, &new.pods_by_guest),
            (&mut self.vmis_by_node, &old.vmis_by_node, &new.vmis_by_node),
            (&mut self.vmis_by_uid, &old.vmis_by_uid, &new.vmis_by_uid),
            (&mut self.migrations_by_vmi, &old.migrations_by_vmi, &new.migrations_by_vmi),
            (&mut self.migrations_by_uid, &old.migrations_by_uid, &new.migrations_by_uid),
            (&mut self.vmis_by_claim, &old.vmis_by_claim, &new.vmis_by_claim),
            (&mut self.volumes_by_claim, &old.volumes_by_claim, &new.volumes_by_claim),
            (&mut self.pods_by_label, &old.pods_by_label, &new.pods_by_label),
            (&mut self.pods_by_repelled, &old.pods_by_repelled, &new.pods_by_repelled),
            (&mut self.pods_without_node, &old.pods_without_node, &new.pods_without_node),
            (&mut self.claims_unbound, &old.claims_unbound, &new.claims_unbound),
            (&mut self.claims_by_guest, &old.claims_by_guest, &new.claims_by_guest),
            (&mut self.records_by_vmi, &old.records_by_vmi, &new.records_by_vmi),
            (&mut self.vmis_by_home, &old.vmis_by_home, &new.vmis_by_home),
            (&mut self.vmis_to_evacuate, &old.vmis_to_evacuate, &new.vmis_to_evacuate),
            (&mut self.vmis_unstarted, &old.vmis_unstarted, &new.vmis_unstarted),
            (&mut self.vmis_outdated, &old.vmis_outdated, &new.vmis_outdated),
            (&mut self.migrations_unfinished, &old.migrations_unfinished, &new.migrations_unfinished),
            (&mut self.nodes_that_keep_files, &old.nodes_that_keep_files, &new.nodes_that_keep_files),
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

    /// Pods that hold claims for a launcher's pod, by its UID.
    pub fn attachments_of(&self, launcher_uid: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.pick(self.attachments_by_launcher.get(launcher_uid))
    }

    /// Pods that use a claim.
    pub fn pods_using(&self, claim: &Name) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.pick(self.pods_by_claim.get(&claim.to_string()))
    }

    /// Launcher pods of a guest by its VMI's name, whichever VMI of that name they were made for, and pods that hold its claims.
    pub fn pods_of_guest(&self, vmi: &Name) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.pick(self.pods_by_guest.get(&vmi.to_string()))
    }

    /// The names of the VMIs that there are such pods for.
    pub fn guests_with_pods(&self) -> impl Iterator<Item = Name> {
        self.pods_by_guest.keys().map(|guest| Name::parse(guest))
    }

    /// The names of the VMIs that there are records of.
    pub fn guests_with_records(&self) -> impl Iterator<Item = Name> {
        self.records_by_vmi.keys().map(|guest| Name::parse(guest))
    }

    /// VMIs whose `status.nodeName` is this node.
    pub fn vmis_on(&self, node: &str) -> impl Iterator<Item = &Arc<VirtualMachineInstance>> {
        self.vmis.pick(self.vmis_by_node.get(node))
    }

    /// VMIs that are to come back to a node after its maintenance.
    pub fn expected_at(&self, home: &str) -> impl Iterator<Item = &Arc<VirtualMachineInstance>> {
        self.vmis.pick(self.vmis_by_home.get(home))
    }

    /// VMIs that are being evacuated or were asked to go, wherever they are.
    pub fn vmis_to_evacuate(&self) -> impl Iterator<Item = &Arc<VirtualMachineInstance>> {
        self.vmis.pick(self.vmis_to_evacuate.get(""))
    }

    /// VMIs that have not got their first pod yet.
    pub fn unstarted_vmis(&self) -> impl Iterator<Item = &Arc<VirtualMachineInstance>> {
        self.vmis.pick(self.vmis_unstarted.get(""))
    }

    /// VMIs that run in another launcher than new ones would.
    pub fn outdated_vmis(&self) -> impl Iterator<Item = &Arc<VirtualMachineInstance>> {
        self.vmis.pick(self.vmis_outdated.get(""))
    }

    /// How many migrations are not over.
    pub fn unfinished_migrations(&self) -> usize {
        self.migrations_unfinished.get("").map_or(0, Names::len)
    }

    /// Whether wherever guests may run their pods are given what they must open.
    pub fn all_handlers_give_files(&self) -> bool {
        self.nodes_that_keep_files.is_empty()
    }

    /// Nodes that VMIs are to come back to.
    pub fn homes(&self) -> impl Iterator<Item = &str> {
        self.vmis_by_home.keys().map(String::as_str)
    }

    /// The VMI with this UID.
    pub fn vmi_by_uid(&self, uid: &str) -> Option<&Arc<VirtualMachineInstance>> {
        self.vmis.pick(self.vmis_by_uid.get(uid)).next()
    }

    /// The migration with this UID.
    pub fn migration_by_uid(&self, uid: &str) -> Option<&Arc<VirtualMachineInstanceMigration>> {
        self.migrations.pick(self.migrations_by_uid.get(uid)).next()
    }

    /// The name of the migration with this UID.
    pub fn migration_name(&self, uid: &str) -> Option<&Name> {
        self.migrations_by_uid.get(uid)?.iter().next()
    }

    /// VMIs with a volume of this claim.
    pub fn vmis_using(&self, claim: &Name) -> impl Iterator<Item = &Arc<VirtualMachineInstance>> {
        self.vmis.pick(self.vmis_by_claim.get(&claim.to_string()))
    }

    /// Volumes that are reserved for a claim or bound to it.
    pub fn volumes_for(&self, claim: &Name) -> impl Iterator<Item = &Arc<PersistentVolume>> {
        self.volumes.pick(self.volumes_by_claim.get(&claim.to_string()))
    }

    /// Volumes that nobody has claimed.
    pub fn free_volumes(&self) -> impl Iterator<Item = &Arc<PersistentVolume>> {
        self.volumes.pick(self.volumes_by_claim.get(""))
    }

    /// Claims without a volume.
    pub fn unbound_claims(&self) -> impl Iterator<Item = &Arc<PersistentVolumeClaim>> {
        self.claims.pick(self.claims_unbound.get(""))
    }

    /// Claims that keep the persistent state of a guest.
    pub fn claims_keeping(&self, vmi: &Name) -> impl Iterator<Item = &Arc<PersistentVolumeClaim>> {
        self.claims.pick(self.claims_by_guest.get(&persistent_state::term(vmi)))
    }

    /// Unfinished pods without a node.
    pub fn pods_without_node(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.pick(self.pods_without_node.get(""))
    }

    /// Pods with a label, written `key=value`.
    pub fn pods_with(&self, label: &str) -> impl Iterator<Item = &Arc<Pod>> + use<'_> {
        self.pods.pick(self.pods_by_label.get(label))
    }

    /// How many pods have a label, written `key=value`.
    pub fn pods_labelled(&self, label: &str) -> usize {
        self.pods_by_label.get(label).map_or(0, Names::len)
    }

    /// Pods with a term of anti-affinity that asks for this label (empty: for none by its value).
    pub fn pods_repelling(&self, label: &str) -> impl Iterator<Item = &Arc<Pod>> + use<'_> {
        self.pods.pick(self.pods_by_repelled.get(label))
    }

    /// Migrations of a VMI, by its name.
    pub fn migrations_of(&self, vmi: &Name) -> impl Iterator<Item = &Arc<VirtualMachineInstanceMigration>> {
        self.migrations.pick(self.migrations_by_vmi.get(&vmi.to_string()))
    }

    /// Records of a VMI's migrations, by its name.
    pub fn records_of(&self, vmi: &Name) -> impl Iterator<Item = &Arc<MigrationRecord>> {
        self.records.pick(self.records_by_vmi.get(&vmi.to_string()))
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
                match object { $(Object::$variant(object) => self.$field.insert(name, object),)* }
            }

            fn remove(&mut self, kind: Kind, name: &Name) {
                match kind { $(Kind::$variant => self.$field.remove(name),)* }
            }

            fn unpacked(&self) -> usize {
                [$(self.$field.unpacked()),*].iter().sum()
            }

            fn pack_all(&mut self) {
                $(self.$field.pack();)*
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
    NodeMaintenance maintenances,
    KubeVirtNodeMaintenance kubevirt_maintenances,
    OldestNodeMaintenance oldest_maintenances,
    Lease leases,
    PodDisruptionBudget budgets,
}

fn terms(object: &Object) -> Terms {
    let mut terms = Terms::default();
    match object {
        Object::Pod(pod) => {
            let spec = pod.spec.as_ref();
            terms.pods_by_node.extend(spec.and_then(|spec| spec.node_name.clone()).filter(|node| !node.is_empty()));
            terms.pods_by_vmi_uid.extend(pod.label(names::LABEL_CREATED_BY).map(str::to_owned));
            terms.pods_by_migration_uid.extend(pod.label(names::LABEL_MIGRATION_JOB_UID).map(str::to_owned));
            terms.attachments_by_launcher.extend(hotplug::launcher_of(pod).map(str::to_owned));
            terms.pods_by_claim.extend(claims_of(pod).map(|claim| claim.to_string()));
            let guest = vmi_of_pod(pod).or_else(|| hotplug::vmi_of_attachment(pod));
            terms.pods_by_guest.extend(guest.map(|guest| guest.to_string()));
            let labels = pod.metadata.labels.iter().flatten();
            terms.pods_by_label.extend(labels.map(|(key, value)| placement::label(key, value)));
            terms.pods_by_repelled.extend(placement::repelled(pod));
            if terms.pods_by_node.is_empty() && !placement::is_finished(pod) {
                terms.pods_without_node.push(String::new());
            }
        }
        Object::VirtualMachineInstance(vmi) => {
            terms.vmis_by_uid.extend(vmi.metadata.uid.clone());
            terms.vmis_by_home.extend(homecoming::home_of(vmi).map(str::to_owned));
            let all = |is_one: bool| is_one.then(String::new);
            terms.vmis_to_evacuate.extend(all(evacuation::is_touched(vmi)));
            terms.vmis_unstarted.extend(all(matches!(vmi.status.phase, VmiPhase::Unset | VmiPhase::Pending)));
            terms.vmis_outdated.extend(all(workloads::is_labelled(vmi)));
            let node = vmi.status.node_name.clone();
            terms.vmis_by_node.extend(node.filter(|node| !node.is_empty()));
            let claims = vmi.spec.volumes.iter().filter_map(|volume| volume.persistent_volume_claim.as_ref());
            terms.vmis_by_claim.extend(claims.map(|claim| Name::new(vmi.namespace(), &claim.claim_name).to_string()));
        }
        Object::Node(node) => {
            terms.nodes_that_keep_files.extend(pod_security::keeps_files(node).then(String::new));
        }
        Object::Migration(migration) => {
            terms.migrations_by_uid.extend(migration.metadata.uid.clone());
            terms.migrations_unfinished.extend((!migration.is_final()).then(String::new));
            terms.migrations_by_vmi.push(Name::new(migration.namespace(), migration.vmi_name()).to_string());
        }
        Object::PersistentVolume(volume) => {
            let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
            let claim = reference.map(|reference| {
                let name = |part: &Option<String>| part.clone().unwrap_or_default();
                Name::new(name(&reference.namespace), name(&reference.name)).to_string()
            });
            terms.volumes_by_claim.push(claim.unwrap_or_default());
        }
        Object::PersistentVolumeClaim(claim) => {
            terms.claims_by_guest.extend(persistent_state::guest_of(claim));
            if !volumes::is_bound(claim) {
                terms.claims_unbound.push(String::new());
            }
        }
        Object::MigrationRecord(record) => {
            terms.records_by_vmi.push(Name::new(record.namespace(), record.spec.vmi_name.as_str()).to_string());
        }
        _ => {}
    }
    terms
}

/// The VMI that a launcher pod is of.
pub fn vmi_of_pod(pod: &Pod) -> Option<Name> {
    (pod.label(names::LABEL_APP) == Some(names::APP_VIRT_LAUNCHER))
        .then(|| Name::new(pod.namespace(), pod.annotation(names::ANNOTATION_DOMAIN).unwrap_or_default()))
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
