//! What is decided about, which changes touch it, and which decisions must not run at the same time.

use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::coordination::v1::Lease;

use smol_str::SmolStr;

use crate::garbage::Owner;
use crate::names;
use crate::object::{Kind, Name, Object, Stored};
use crate::plan::{Plan, View};
use crate::world::{Change, World, claims_of, vmi_of_pod};
use crate::{
    confirm, disruption, evacuation, fence, garbage, history, homecoming, hotplug, kubevirt, maintenance, migration,
    migration_network, node, placement, processor, turns, vm, vmi, volumes, workloads,
};

/// A group of decisions that can be switched on and off: cluster mode leaves placement and volumes to Kubernetes, and of nodes
/// all that is not about their handlers ([`Settings::tells_of_nodes`](crate::Settings::tells_of_nodes)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Noun {
    /// VirtualMachines.
    Vm,
    /// VirtualMachineInstances.
    Vmi,
    /// Migrations.
    Migration,
    /// VMIs that are to leave their node.
    Evacuation,
    /// Nodes that are to be empty.
    Maintenance,
    /// Records of migrations.
    History,
    /// Pods that need a node.
    Placement,
    /// Claims and volumes.
    Volumes,
    /// Nodes.
    Node,
    /// Nodes whose guests have ended.
    Fence,
    /// The installation's own object.
    KubeVirt,
    /// Objects whose owners are gone.
    Garbage,
    /// PodDisruptionBudgets.
    Disruption,
}

impl Noun {
    /// Those of the standalone mode, whose API server collects garbage and counts budgets itself.
    pub const STANDALONE: &'static [Noun] = &[
        Noun::Vm,
        Noun::Vmi,
        Noun::Migration,
        Noun::Evacuation,
        Noun::Maintenance,
        Noun::History,
        Noun::Placement,
        Noun::Volumes,
        Noun::Node,
        Noun::Fence,
        Noun::KubeVirt,
    ];

    /// All of them: those beside an API server alone, without kube-controller-manager and kube-scheduler.
    pub const BARE: &'static [Noun] = &[
        Noun::Vm,
        Noun::Vmi,
        Noun::Migration,
        Noun::Evacuation,
        Noun::Maintenance,
        Noun::History,
        Noun::Placement,
        Noun::Volumes,
        Noun::Node,
        Noun::Fence,
        Noun::KubeVirt,
        Noun::Garbage,
        Noun::Disruption,
    ];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Noun::Vm => "vm",
            Noun::Vmi => "vmi",
            Noun::Migration => "migration",
            Noun::Evacuation => "evacuation",
            Noun::Maintenance => "maintenance",
            Noun::History => "history",
            Noun::Placement => "placement",
            Noun::Volumes => "volumes",
            Noun::Node => "node",
            Noun::Fence => "fence",
            Noun::KubeVirt => "kubevirt",
            Noun::Garbage => "garbage",
            Noun::Disruption => "disruption",
        }
    }

    /// Those of a Kubernetes cluster.
    pub const CLUSTER: &'static [Noun] = &[
        Noun::Vm,
        Noun::Vmi,
        Noun::Migration,
        Noun::Evacuation,
        Noun::Maintenance,
        Noun::History,
        Noun::Node,
        Noun::Fence,
        Noun::KubeVirt,
    ];
}

/// One thing to decide about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A migration.
    Migration(Name),
    /// Which migrations may begin.
    Turns,
    /// A VMI.
    Vmi(Name),
    /// Whether a VMI leaves its node.
    Evacuation(Name),
    /// A NodeMaintenance of one of its groups.
    Maintenance(Kind, SmolStr),
    /// Whether what a maintenance did to a node is anybody's still.
    Closure(SmolStr),
    /// Who comes back to a node after its maintenance.
    Homecoming(SmolStr),
    /// The records of a VMI's migrations.
    History(Name),
    /// A VM.
    Vm(Name),
    /// A pod that needs a node.
    Placement(Name),
    /// A claim.
    Claim(Name),
    /// A volume.
    Volume(Name),
    /// A node.
    Node(SmolStr),
    /// Whether a node's guests have ended.
    Fence(SmolStr),
    /// The installation.
    KubeVirt(Name),
    /// What an owner has, once it goes.
    Garbage(Owner),
    /// A PodDisruptionBudget.
    Budget(Name),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Migration(name) => write!(f, "migration {name}"),
            Key::Turns => write!(f, "turns of migrations"),
            Key::Vmi(name) => write!(f, "vmi {name}"),
            Key::Evacuation(name) => write!(f, "evacuation of vmi {name}"),
            Key::Maintenance(kind, name) => write!(f, "maintenance {name} of {}", kind.group()),
            Key::Closure(node) => write!(f, "closure of node {node}"),
            Key::Homecoming(node) => write!(f, "homecoming to {node}"),
            Key::History(name) => write!(f, "history of vmi {name}"),
            Key::Vm(name) => write!(f, "vm {name}"),
            Key::Placement(name) => write!(f, "placement of pod {name}"),
            Key::Claim(name) => write!(f, "claim {name}"),
            Key::Volume(name) => write!(f, "volume {name}"),
            Key::Node(name) => write!(f, "node {name}"),
            Key::Fence(name) => write!(f, "fence of node {name}"),
            Key::KubeVirt(name) => write!(f, "kubevirt {name}"),
            Key::Garbage(owner) => write!(f, "garbage of {}", owner.object),
            Key::Budget(name) => write!(f, "budget {name}"),
        }
    }
}

/// Decisions of one lane are carried out one after another, each knowing what the one before has written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// Which migrations may begin: the limits count what has just begun.
    Turns,
    /// Which pod takes which room on the nodes.
    Placement,
    /// All that writes to one VMI.
    Vmi(Name),
    /// This decision alone.
    Own(Key),
}

impl Key {
    /// The group that the decision belongs to.
    pub fn noun(&self) -> Noun {
        match self {
            Key::Migration(_) | Key::Turns => Noun::Migration,
            Key::Vmi(_) => Noun::Vmi,
            Key::Evacuation(_) => Noun::Evacuation,
            Key::Maintenance(..) | Key::Closure(_) | Key::Homecoming(_) => Noun::Maintenance,
            Key::History(_) => Noun::History,
            Key::Vm(_) => Noun::Vm,
            Key::Placement(_) => Noun::Placement,
            Key::Claim(_) | Key::Volume(_) => Noun::Volumes,
            Key::Node(_) => Noun::Node,
            Key::Fence(_) => Noun::Fence,
            Key::KubeVirt(_) => Noun::KubeVirt,
            Key::Garbage(_) => Noun::Garbage,
            Key::Budget(_) => Noun::Disruption,
        }
    }

    /// The lane of the decision.
    pub fn lane(&self, world: &World) -> Lane {
        match self {
            Key::Turns => Lane::Turns,
            Key::Placement(_) => Lane::Placement,
            Key::Vmi(name) | Key::Evacuation(name) => Lane::Vmi(name.clone()),
            Key::Migration(name) => match world.migrations.get(name) {
                Some(migration) => Lane::Vmi(Name::new(migration.namespace(), migration.vmi_name())),
                None => Lane::Own(self.clone()),
            },
            _ => Lane::Own(self.clone()),
        }
    }

    /// Decides.
    pub fn decide(&self, view: &View<'_>) -> Plan {
        let plan = match self {
            Key::Migration(name) => migration::decide(name, view),
            Key::Turns => turns::decide(view),
            Key::Vmi(name) => vmi::decide(name, view),
            Key::Evacuation(name) => evacuation::decide(name, view),
            Key::Maintenance(kind, name) => maintenance::decide(*kind, name, view),
            Key::Closure(node) => maintenance::decide_closure(node, view),
            Key::Homecoming(node) => homecoming::decide(node, view),
            Key::History(name) => history::decide(name, view),
            Key::Vm(name) => vm::decide(name, view),
            Key::Placement(name) => placement::decide(name, view),
            Key::Claim(name) => volumes::decide_claim(name, view),
            Key::Volume(name) => volumes::decide_volume(name, view),
            Key::Node(name) => node::decide(name, view),
            Key::Fence(name) => fence::decide(name, view),
            Key::KubeVirt(name) => kubevirt::decide(name, view),
            Key::Garbage(owner) => garbage::decide(owner, view),
            Key::Budget(name) => disruption::decide(name, view),
        };
        confirm::confirmed(self, view, plan)
    }

    /// What has to be decided again after a change.
    pub fn affected(change: &Change, world: &World) -> Vec<Key> {
        let mut keys = Vec::new();
        let Some(object) = change.latest() else { return keys };
        let name = object.name();
        match object {
            Object::VirtualMachine(_) => {
                // A VMI that has ended may wait for its note.
                if change.after.is_none() {
                    keys.push(Key::Vmi(name.clone()));
                }
                keys.push(Key::Vm(name));
            }
            Object::VirtualMachineInstance(vmi) => {
                keys.extend(fence::lost_source(vmi, world).map(|node| Key::Fence(SmolStr::new(node))));
                for migration in world.migrations_of(&name) {
                    keys.push(Key::Migration(migration.key()));
                    if !migration.is_final() {
                        keys.push(Key::Turns);
                    }
                }
                let outdated = |object: &Option<Object>| matches!(object, Some(Object::VirtualMachineInstance(vmi)) if workloads::is_labelled(vmi));
                if outdated(&change.before) || outdated(&change.after) {
                    keys.extend(world.kubevirts.names().cloned().map(Key::KubeVirt));
                }
                keys.push(Key::Vm(name.clone()));
                keys.push(Key::Vmi(name));
            }
            Object::Migration(migration) => {
                let vmi = Name::new(migration.namespace(), migration.vmi_name());
                keys.push(Key::Migration(name));
                // A slot may have become free, or a finished one too many.
                let standing = |object: &Option<Object>| match object {
                    Some(Object::Migration(migration)) => {
                        Some((migration.status.phase.clone(), migration.is_deleting(), migration.spec.priority.clone()))
                    }
                    _ => None,
                };
                if standing(&change.before) != standing(&change.after) {
                    keys.push(Key::Turns);
                    // Somebody has come into the line or left it: the first of those behind have another place.
                    keys.extend(turns::to_tell(world.turns()).cloned().map(Key::Migration));
                    keys.extend(world.migrations_of(&vmi).map(|migration| Key::Migration(migration.key())));
                    keys.push(Key::Vmi(vmi));
                }
            }
            Object::KubeVirt(_) => {
                let spec = |object: &Option<Object>| match object {
                    Some(Object::KubeVirt(kubevirt)) => Some(kubevirt.clone()),
                    _ => None,
                };
                let (before, after) = (spec(&change.before), spec(&change.after));
                if before.as_ref().map(|one| &one.spec) != after.as_ref().map(|one| &one.spec) {
                    keys.extend(configured(world));
                    keys.extend(world.unstarted_vmis().map(|vmi| Key::Vmi(vmi.key())));
                }
                keys.push(Key::KubeVirt(name));
            }
            Object::ConfigMap(_) if kubevirt::is_configuration(&name, world) => {
                // the KubeVirt object's condition says what of the ConfigMap is applied
                keys.extend(world.kubevirts.names().cloned().map(Key::KubeVirt));
                keys.extend(configured(world));
            }
            Object::ConfigMap(_) if turns::is_ledger(&name, world.installation()) => {
                affected_by_ledger(change, world, &mut keys)
            }
            Object::ResourceQuota(_) => {
                // Those that have a slot and cannot make their pod, and those that would be next.
                let holders = world.turns().holders().values().filter_map(|holder| holder.migration.as_ref());
                let holders = holders.filter(|migration| migration.namespace == name.namespace);
                let waiting = world.turns().waiting_in(&name.namespace).take(TOLD_OF_QUOTA);
                keys.extend(holders.chain(waiting).cloned().map(Key::Migration));
                keys.push(Key::Turns);
                let unstarted = world.unstarted_vmis().filter(|vmi| vmi.namespace() == name.namespace);
                keys.extend(unstarted.map(|vmi| Key::Vmi(vmi.key())));
            }
            Object::MigrationPolicy(_) => keys.extend(under_way(world)),
            Object::Pod(_) => affected_by_pod(change, &name, world, &mut keys),
            Object::Node(node) => {
                keys.push(Key::Node(SmolStr::new(node.name())));
                if maintenance::is_closure(node) {
                    keys.push(Key::Closure(SmolStr::new(node.name())));
                }
                if changes_room(change) {
                    keys.extend(unplaced(world));
                    keys.push(Key::Turns);
                }
                let side = |object: &Option<Object>| match object {
                    Some(Object::Node(node)) => Some(node.clone()),
                    _ => None,
                };
                let (before, after) = (side(&change.before), side(&change.after));
                if processor::changes_baseline(before.as_deref(), after.as_deref())
                    || migration_network::changes(before.as_deref(), after.as_deref())
                {
                    keys.extend(world.kubevirts.names().cloned().map(Key::KubeVirt));
                }
                if is_lost(&change.before) != is_lost(&change.after) {
                    keys.extend(world.vmis_on(node.name()).map(|vmi| Key::Vmi(vmi.key())));
                }
            }
            Object::Lease(lease) if fence::node_of(lease, world.installation()).is_some() => {
                affected_by_fence(change, lease, world, &mut keys);
                return keys;
            }
            Object::Lease(_) if name.namespace == node::LEASES => {
                let (before, after) = leases_of(change);
                let node = world.nodes.get(&Name::cluster(name.name.as_str()));
                if node::is_told_by(before, after, node.map(Arc::as_ref)) {
                    keys.push(Key::Node(name.name));
                }
                return keys;
            }
            Object::PersistentVolumeClaim(claim) => {
                keys.extend(world.pods_using(&name).map(|pod| Key::Placement(pod.key())));
                let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone());
                keys.extend(
                    volume.filter(|volume| !volume.is_empty()).map(|volume| Key::Volume(Name::cluster(volume))),
                );
                let users: Vec<Name> = world.vmis_using(&name).map(|vmi| vmi.key()).collect();
                for vmi in users {
                    keys.push(Key::Vmi(vmi.clone()));
                    keys.push(Key::Vm(vmi));
                }
                // Those whose TPM or EFI variables it keeps have it in a pod.
                for pod in world.pods_using(&name) {
                    let Some(vmi) = vmi_of_pod(pod) else { continue };
                    keys.extend(world.migrations_of(&vmi).map(|migration| Key::Migration(migration.key())));
                    keys.push(Key::Vmi(vmi));
                }
                keys.push(Key::Claim(name));
            }
            Object::PersistentVolume(volume) => {
                let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
                match reference {
                    Some(reference) => {
                        let namespace = reference.namespace.clone().unwrap_or_default();
                        keys.push(Key::Claim(Name::new(namespace, reference.name.clone().unwrap_or_default())));
                    }
                    None => keys.extend(world.unbound_claims().map(|claim| Key::Claim(claim.key()))),
                }
                keys.push(Key::Volume(name));
            }
            Object::StorageClass(_) => {
                keys.extend(world.unbound_claims().map(|claim| Key::Claim(claim.key())));
                keys.extend(world.unstarted_vmis().map(|vmi| Key::Vmi(vmi.key())));
            }
            Object::NodeMaintenance(_) | Object::KubeVirtNodeMaintenance(_) | Object::OldestNodeMaintenance(_) => {
                // What was done to the node may be nobody's any more, also when another took its place and does nothing more.
                if change.after.is_none() || maintenance::changes_room(change) {
                    keys.extend(maintenance::node_of(object).map(|node| Key::Closure(SmolStr::new(node))));
                }
                if maintenance::changes_room(change) {
                    keys.extend(unplaced(world));
                    keys.push(Key::Turns);
                    // What is on its way to the node turns back.
                    let node = maintenance::node_of(object).unwrap_or_default();
                    let uids = world.pods_on(node).filter_map(|pod| pod.label(names::LABEL_MIGRATION_JOB_UID));
                    let coming = uids.filter_map(|uid| world.migration_by_uid(uid)).filter(|one| !one.is_final());
                    keys.extend(coming.map(|one| Key::Migration(one.key())));
                }
            }
            Object::Lease(_)
            | Object::ConfigMap(_)
            | Object::NetworkAttachmentDefinition(_)
            | Object::Namespace(_)
            | Object::PodDisruptionBudget(_)
            | Object::MigrationRecord(_) => {}
        }
        keys.extend(evacuation::affected(change, world).map(Key::Evacuation));
        keys.extend(history::affected(change).map(Key::History));
        keys.extend(maintenance::affected(change, world));
        keys.extend(homecoming::affected(change, world).into_iter().map(Key::Homecoming));
        keys.sort();
        keys.dedup();
        keys
    }

    /// What has to be decided again of what API servers do not do alone: garbage and budgets. It is not among [`Self::affected`],
    /// since mostly somebody else decides about it.
    pub fn affected_beside_a_bare_server(change: &Change, world: &World) -> impl Iterator<Item = Key> {
        let owners = garbage::affected(change).into_iter().map(Key::Garbage);
        owners.chain(disruption::affected(change, world).into_iter().map(Key::Budget))
    }

    /// The same for the first look at the world.
    pub fn all_beside_a_bare_server(world: &World) -> impl Iterator<Item = Key> {
        let budgets: Vec<Name> = world.budgets.names().cloned().collect();
        garbage::all(world).into_iter().map(Key::Garbage).chain(budgets.into_iter().map(Key::Budget))
    }

    /// Everything there is to decide about, for the first look at the world.
    pub fn all(world: &World) -> Vec<Key> {
        let mut keys = vec![Key::Turns];
        keys.extend(world.kubevirts.names().cloned().map(Key::KubeVirt));
        for node in world.nodes.iter() {
            keys.push(Key::Node(SmolStr::new(node.name())));
            if maintenance::is_closure(node) {
                keys.push(Key::Closure(SmolStr::new(node.name())));
            }
        }
        keys.extend(world.fenced_nodes().cloned().map(Key::Fence));
        keys.extend(world.vms.names().cloned().map(Key::Vm));
        keys.extend(world.vmis.names().cloned().map(Key::Vmi));
        keys.extend(evacuation::all(world).map(Key::Evacuation));
        keys.extend(history::all(world).map(Key::History));
        keys.extend(maintenance::all(world));
        keys.extend(homecoming::all(world).map(Key::Homecoming));
        keys.extend(world.migrations.names().cloned().map(Key::Migration));
        keys.extend(world.claims.names().cloned().map(Key::Claim));
        keys.extend(world.volumes.names().cloned().map(Key::Volume));
        keys.extend(world.pods.names().cloned().map(Key::Placement));
        keys.extend(world.guests_with_pods().map(Key::Vmi));
        keys.sort();
        keys.dedup();
        keys
    }
}

/// So many that wait in a namespace are looked at again when one of its quotas changes.
const TOLD_OF_QUOTA: usize = 64;

/// Migrations that are under way.
fn under_way(world: &World) -> impl Iterator<Item = Key> {
    let holders = world.turns().holders().values();
    holders.filter_map(|holder| holder.migration.clone()).map(Key::Migration)
}

/// What the configuration counts for: those under way, who may begin, and what the first of those that wait are told.
fn configured(world: &World) -> impl Iterator<Item = Key> {
    let told = turns::to_tell(world.turns()).cloned().map(Key::Migration);
    under_way(world).chain(told).chain([Key::Turns])
}

/// A lease before and after a change.
fn leases_of(change: &Change) -> (Option<&Lease>, Option<&Lease>) {
    let lease = |side| match side {
        &Some(Object::Lease(ref lease)) => Some(Arc::as_ref(lease)),
        _ => None,
    };
    (lease(&change.before), lease(&change.after))
}

/// A node has renewed its fence lease, or counts as lost. Nearly all of these change nothing.
fn affected_by_fence(change: &Change, lease: &Lease, world: &World, keys: &mut Vec<Key>) {
    let Some(node) = fence::node_of(lease, world.installation()) else { return };
    let (before, after) = leases_of(change);
    if fence::is_told_by(before, after) {
        keys.push(Key::Fence(SmolStr::new(node)));
        keys.extend(world.vmis_on(node).map(|vmi| Key::Vmi(vmi.key())));
    }
    if fence::makes_room(before, node, world) {
        keys.extend(unplaced(world));
        keys.push(Key::Turns);
    }
}

/// Slots have been given or taken back, or their targets are others.
fn affected_by_ledger(change: &Change, world: &World, keys: &mut Vec<Key>) {
    let slots = |side: &Option<Object>| match side {
        Some(Object::ConfigMap(map)) => turns::Ledger::read(Some(map)),
        _ => turns::Ledger::default(),
    };
    for uid in slots(&change.before).differences(&slots(&change.after)) {
        keys.extend(world.migration_by_uid(&uid).map(|migration| Key::Migration(migration.key())));
    }
    // A node may have room for another target.
    let targets = world.pods_without_node().filter(|pod| pod.label(names::LABEL_MIGRATION_JOB_UID).is_some());
    keys.extend(targets.map(|pod| Key::Placement(pod.key())));
    keys.extend(turns::to_tell(world.turns()).cloned().map(Key::Migration));
    keys.push(Key::Turns);
}

/// Pods without a node.
fn unplaced(world: &World) -> impl Iterator<Item = Key> {
    world.pods_without_node().map(|pod| Key::Placement(pod.key()))
}

fn affected_by_pod(change: &Change, name: &Name, world: &World, keys: &mut Vec<Key>) {
    keys.push(Key::Placement(name.clone()));
    for side in change.sides() {
        let Object::Pod(pod) = side else { continue };
        if let Some(vmi) = vmi_of_pod(pod) {
            for migration in world.migrations_of(&vmi) {
                keys.push(Key::Migration(migration.key()));
                if !migration.is_final() {
                    keys.push(Key::Turns);
                }
            }
            keys.push(Key::Vmi(vmi));
        }
        if let Some(vmi) = hotplug::vmi_of_attachment(pod) {
            keys.extend(world.migrations_of(&vmi).map(|migration| Key::Migration(migration.key())));
            keys.push(Key::Vmi(vmi));
        }
        keys.extend(claims_of(pod).map(Key::Claim));
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        keys.extend(node.filter(|node| fence::is_lost(node, world)).map(|node| Key::Fence(SmolStr::new(node))));
    }
    // Room has become free.
    let holds = |side: &Option<Object>| match side {
        Some(Object::Pod(pod)) => {
            !placement::is_finished(pod) && pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())
        }
        _ => false,
    };
    if holds(&change.before) && !holds(&change.after) {
        keys.extend(unplaced(world));
    }
}

/// Whether a change of a node may change where pods can go; heartbeats do not.
fn changes_room(change: &Change) -> bool {
    let (Some(Object::Node(before)), Some(Object::Node(after))) = (&change.before, &change.after) else { return true };
    let allocatable =
        |node: &k8s_openapi::api::core::v1::Node| node.status.as_ref().and_then(|status| status.allocatable.clone());
    before.spec != after.spec
        || before.metadata.labels != after.metadata.labels
        || allocatable(before) != allocatable(after)
        || placement::is_ready(before) != placement::is_ready(after)
}

fn is_lost(side: &Option<Object>) -> bool {
    match side {
        Some(Object::Node(node)) => node::is_silent(node),
        _ => true,
    }
}

/// Kinds whose objects decisions read, for a set of nouns.
pub fn kinds_for(nouns: &[Noun]) -> Vec<Kind> {
    let needed = |kind: Kind| match kind {
        Kind::PersistentVolume => nouns.contains(&Noun::Volumes) || nouns.contains(&Noun::Placement),
        // VMIs are given claims of one.
        Kind::StorageClass => {
            nouns.iter().any(|noun| matches!(noun, Noun::Volumes | Noun::Placement | Noun::Vmi | Noun::Migration))
        }
        Kind::Lease => nouns.iter().any(|noun| matches!(noun, Noun::Node | Noun::Fence | Noun::Maintenance)),
        // Ours alone: beside another KubeVirt they need not exist.
        Kind::MigrationRecord | Kind::ConfigMap => nouns.iter().any(|noun| *noun != Noun::Maintenance),
        Kind::NetworkAttachmentDefinition => false,
        Kind::PodDisruptionBudget => nouns.contains(&Noun::Disruption),
        _ => true,
    };
    Kind::ALL.iter().copied().filter(|kind| needed(*kind)).collect()
}
