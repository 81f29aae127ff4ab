//! What is decided about, which changes touch it, and which decisions must not run at the same time.

use std::fmt;

use godwit_api::MigrationPhase;

use crate::names;
use crate::object::{Kind, Name, Object, Stored};
use crate::plan::{Plan, View};
use crate::world::{Change, World, claims_of};
use crate::{kubevirt, migration, node, placement, vm, vmi, volumes};

/// A group of decisions that can be switched on and off: cluster mode leaves placement, volumes and nodes to Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Noun {
    /// VirtualMachines.
    Vm,
    /// VirtualMachineInstances.
    Vmi,
    /// Migrations.
    Migration,
    /// Pods that need a node.
    Placement,
    /// Claims and volumes.
    Volumes,
    /// Nodes.
    Node,
    /// The installation's own object.
    KubeVirt,
}

impl Noun {
    /// All of them, as the standalone mode has it.
    pub const ALL: &'static [Noun] =
        &[Noun::Vm, Noun::Vmi, Noun::Migration, Noun::Placement, Noun::Volumes, Noun::Node, Noun::KubeVirt];
}

/// One thing to decide about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A migration.
    Migration(Name),
    /// A VMI.
    Vmi(Name),
    /// A VM.
    Vm(Name),
    /// A pod that needs a node.
    Placement(Name),
    /// A claim.
    Claim(Name),
    /// A volume.
    Volume(Name),
    /// A node.
    Node(String),
    /// The installation.
    KubeVirt(Name),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Migration(name) => write!(f, "migration {name}"),
            Key::Vmi(name) => write!(f, "vmi {name}"),
            Key::Vm(name) => write!(f, "vm {name}"),
            Key::Placement(name) => write!(f, "placement of pod {name}"),
            Key::Claim(name) => write!(f, "claim {name}"),
            Key::Volume(name) => write!(f, "volume {name}"),
            Key::Node(name) => write!(f, "node {name}"),
            Key::KubeVirt(name) => write!(f, "kubevirt {name}"),
        }
    }
}

/// Decisions of one lane are carried out one after another, each knowing what the one before has written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Who may migrate next: the limits count what the others have just begun.
    Admission,
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
            Key::Migration(_) => Noun::Migration,
            Key::Vmi(_) => Noun::Vmi,
            Key::Vm(_) => Noun::Vm,
            Key::Placement(_) => Noun::Placement,
            Key::Claim(_) | Key::Volume(_) => Noun::Volumes,
            Key::Node(_) => Noun::Node,
            Key::KubeVirt(_) => Noun::KubeVirt,
        }
    }

    /// The lane of the decision.
    pub fn lane(&self, world: &World) -> Lane {
        match self {
            Key::Placement(_) => Lane::Placement,
            Key::Vmi(name) => Lane::Vmi(name.clone()),
            Key::Migration(name) => match world.migrations.get(name) {
                Some(migration) => match migration.status.phase {
                    MigrationPhase::Unset | MigrationPhase::Pending => Lane::Admission,
                    _ => Lane::Vmi(Name::new(migration.namespace(), migration.vmi_name())),
                },
                None => Lane::Own(self.clone()),
            },
            _ => Lane::Own(self.clone()),
        }
    }

    /// Decides.
    pub fn decide(&self, view: &View<'_>) -> Plan {
        match self {
            Key::Migration(name) => migration::decide(name, view),
            Key::Vmi(name) => vmi::decide(name, view),
            Key::Vm(name) => vm::decide(name, view),
            Key::Placement(name) => placement::decide(name, view),
            Key::Claim(name) => volumes::decide_claim(name, view),
            Key::Volume(name) => volumes::decide_volume(name, view),
            Key::Node(name) => node::decide(name, view),
            Key::KubeVirt(name) => kubevirt::decide(name, view),
        }
    }

    /// What has to be decided again after a change.
    pub fn affected(change: &Change, world: &World) -> Vec<Key> {
        let mut keys = Vec::new();
        let Some(object) = change.latest() else { return keys };
        let name = object.name();
        match object {
            Object::VirtualMachine(_) => keys.push(Key::Vm(name)),
            Object::VirtualMachineInstance(_) => {
                keys.extend(world.migrations_of(&name).map(|migration| Key::Migration(migration.key())));
                keys.push(Key::Vm(name.clone()));
                keys.push(Key::Vmi(name));
            }
            Object::Migration(migration) => {
                let vmi = Name::new(migration.namespace(), migration.vmi_name());
                keys.push(Key::Migration(name));
                // A place may have become free, or a finished one too many.
                let phase = |object: &Option<Object>| match object {
                    Some(Object::Migration(migration)) => Some(migration.status.phase.clone()),
                    _ => None,
                };
                if phase(&change.before) != phase(&change.after) {
                    keys.extend(waiting(world));
                    keys.extend(world.migrations_of(&vmi).map(|migration| Key::Migration(migration.key())));
                    keys.push(Key::Vmi(vmi));
                }
            }
            Object::KubeVirt(_) => {
                keys.push(Key::KubeVirt(name));
                keys.extend(waiting(world));
            }
            Object::ConfigMap(_) => {
                if name.namespace == names::KUBEVIRT_NAMESPACE && name.name == names::CONFIG_MAP_NAME {
                    keys.extend(waiting(world));
                }
            }
            Object::Pod(_) => affected_by_pod(change, &name, world, &mut keys),
            Object::Node(node) => {
                keys.push(Key::Node(node.name().to_owned()));
                if changes_room(change) {
                    keys.extend(unplaced(world));
                }
                if is_lost(&change.before) != is_lost(&change.after) {
                    keys.extend(world.vmis_on(node.name()).map(|vmi| Key::Vmi(vmi.key())));
                }
            }
            Object::Lease(_) if name.namespace == node::LEASES => keys.push(Key::Node(name.name)),
            Object::PersistentVolumeClaim(claim) => {
                keys.extend(world.pods_using(&name).map(|pod| Key::Placement(pod.key())));
                let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone());
                keys.extend(
                    volume.filter(|volume| !volume.is_empty()).map(|volume| Key::Volume(Name::cluster(volume))),
                );
                let users = world.vmis.iter().filter(|vmi| {
                    vmi.namespace() == name.namespace
                        && vmi.spec.volumes.iter().any(|volume| {
                            volume.persistent_volume_claim.as_ref().is_some_and(|user| user.claim_name == name.name)
                        })
                });
                for vmi in users {
                    keys.push(Key::Vmi(vmi.key()));
                    keys.push(Key::Vm(vmi.key()));
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
                    None => keys.extend(world.claims.names().cloned().map(Key::Claim)),
                }
                keys.push(Key::Volume(name));
            }
            Object::StorageClass(_) => keys.extend(world.claims.names().cloned().map(Key::Claim)),
            Object::Lease(_)
            | Object::NetworkAttachmentDefinition(_)
            | Object::Namespace(_)
            | Object::ResourceQuota(_)
            | Object::MigrationPolicy(_)
            | Object::MigrationRecord(_) => {}
        }
        keys.sort();
        keys.dedup();
        keys
    }

    /// Everything there is to decide about, for the first look at the world.
    pub fn all(world: &World) -> Vec<Key> {
        let mut keys = Vec::new();
        keys.extend(world.kubevirts.names().cloned().map(Key::KubeVirt));
        keys.extend(world.nodes.iter().map(|node| Key::Node(node.name().to_owned())));
        keys.extend(world.vms.names().cloned().map(Key::Vm));
        keys.extend(world.vmis.names().cloned().map(Key::Vmi));
        keys.extend(world.migrations.names().cloned().map(Key::Migration));
        keys.extend(world.claims.names().cloned().map(Key::Claim));
        keys.extend(world.volumes.names().cloned().map(Key::Volume));
        keys.extend(world.pods.names().cloned().map(Key::Placement));
        keys.extend(world.pods.iter().filter_map(|pod| vmi_of(&Object::Pod(pod.clone()))).map(Key::Vmi));
        keys.sort();
        keys.dedup();
        keys
    }
}

/// Migrations that wait for their turn.
fn waiting(world: &World) -> impl Iterator<Item = Key> {
    let waiting = world.migrations.iter().filter(|migration| migration.status.phase == MigrationPhase::Pending);
    waiting.map(|migration| Key::Migration(migration.key()))
}

/// Pods without a node.
fn unplaced(world: &World) -> impl Iterator<Item = Key> {
    let without = world.pods.iter().filter(|pod| {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
        node.is_empty() && !placement::is_finished(pod)
    });
    without.map(|pod| Key::Placement(pod.key()))
}

/// The VMI that a launcher pod is of.
fn vmi_of(object: &Object) -> Option<Name> {
    let Object::Pod(pod) = object else { return None };
    (pod.label(names::LABEL_APP) == Some(names::APP_VIRT_LAUNCHER))
        .then(|| Name::new(pod.namespace(), pod.annotation(names::ANNOTATION_DOMAIN).unwrap_or_default()))
}

fn affected_by_pod(change: &Change, name: &Name, world: &World, keys: &mut Vec<Key>) {
    keys.push(Key::Placement(name.clone()));
    for side in change.sides() {
        if let Some(vmi) = vmi_of(side) {
            keys.extend(world.migrations_of(&vmi).map(|migration| Key::Migration(migration.key())));
            keys.push(Key::Vmi(vmi));
        }
        if let Object::Pod(pod) = side {
            keys.extend(claims_of(pod).map(Key::Claim));
        }
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
        Kind::StorageClass | Kind::PersistentVolume => {
            nouns.contains(&Noun::Volumes) || nouns.contains(&Noun::Placement)
        }
        Kind::Lease => nouns.contains(&Noun::Node),
        Kind::NetworkAttachmentDefinition => false,
        _ => true,
    };
    Kind::ALL.iter().copied().filter(|kind| needed(*kind)).collect()
}
