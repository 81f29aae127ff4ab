//! The claim that keeps a guest's TPM and EFI variables beyond the life of its VMI (KubeVirt's backend storage).
//!
//! The label `persistent-state-for` says whose it is. It belongs to the VM, so it is there when the guest is started again. A claim
//! that many nodes can use goes with the guest; in place of any other one a migration gets a claim of its own, which the
//! state comes to with the guest, and which is the guest's from then on.

use std::collections::BTreeMap;
use std::sync::Arc;

use godwit_api::vmi::{PersistentVolumeClaimInfo, VolumeStatus};
use godwit_api::{VirtualMachineInstance, VirtualMachineInstanceMigration};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec, VolumeResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::launcher_pod::{self, Role};
use crate::names;
use crate::object::{Name, Stored};
use crate::plan::{Plan, View};
use crate::volumes;
use crate::world::World;

/// KubeVirt's size: a TPM's state has some KiB, EFI variables have half a MiB.
const SIZE: &str = "10Mi";
const MANY_NODES: &str = "ReadWriteMany";
const ONE_NODE: &str = "ReadWriteOnce";
/// The default class for virtual machines, which wins over the cluster's (KubeVirt's annotation).
const IS_DEFAULT_VIRT_CLASS: &str = "storageclass.kubevirt.io/is-default-virt-class";

/// The value of the label of a guest's claim.
fn label_of(vmi: &Name) -> String {
    names::label_value(&vmi.name)
}

/// Whose state a claim keeps, as `namespace/label`: by its label, or by the name that KubeVirt gave before there was the label.
pub fn guest_of(claim: &PersistentVolumeClaim) -> Option<String> {
    let label = claim.label(names::LABEL_PERSISTENT_STATE).map(str::to_owned).or_else(|| {
        let made_for = claim.label(names::LABEL_MIGRATION_NAME).is_none().then_some(claim.name())?;
        let name = made_for.strip_prefix(names::LABEL_PERSISTENT_STATE)?.strip_prefix('-')?;
        Some(names::label_value(name))
    })?;
    Some(Name::new(claim.namespace(), label).to_string())
}

/// The term under which the world finds the claims of a guest.
pub(crate) fn term(vmi: &Name) -> String {
    Name::new(vmi.namespace.as_str(), label_of(vmi)).to_string()
}

/// The claim with the guest's state: the one with the label, the newest where a migration has just brought another.
pub fn claim_of<'a>(vmi: &Name, world: &'a World) -> Option<&'a Arc<PersistentVolumeClaim>> {
    let age = |claim: &PersistentVolumeClaim| claim.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let labelled = |claim: &PersistentVolumeClaim| claim.label(names::LABEL_PERSISTENT_STATE).is_some();
    let living = world.claims_keeping(vmi).filter(|claim| !claim.deleting());
    living.max_by_key(|claim| (labelled(claim), age(claim)))
}

fn is_shared(claim: &PersistentVolumeClaim) -> bool {
    let status = claim.status.as_ref().and_then(|status| status.access_modes.as_ref());
    let spec = claim.spec.as_ref().and_then(|spec| spec.access_modes.as_ref());
    status.or(spec).into_iter().flatten().any(|mode| mode == MANY_NODES)
}

/// The name of the claim that a pod of this role gets, whether or not it is there yet. `None`: the guest keeps nothing.
pub fn claim_name(vmi: &VirtualMachineInstance, role: Role<'_>, world: &World) -> Option<String> {
    if !vmi.spec.domain.has_persistent_state() {
        return None;
    }
    let held = claim_of(&vmi.key(), world);
    let name = |claim: &Arc<PersistentVolumeClaim>| claim.name().to_owned();
    Some(match (role, held) {
        (Role::Start, Some(claim)) => name(claim),
        (Role::Receive(_), Some(claim)) if is_shared(claim) => name(claim),
        (Role::Start, None) => names::persistent_state(vmi.name(), vmi.uid()),
        (Role::Receive(migration), _) => target_name(migration),
    })
}

/// The name of the claim that the state comes to with a migration, where it needs another one.
fn target_name(migration: &VirtualMachineInstanceMigration) -> String {
    names::persistent_state(migration.vmi_name(), migration.uid())
}

/// Sees to it that the claim for a pod of this role is there, before the pod is made.
///
/// Errors: in KubeVirt's words, where no StorageClass can be told.
pub fn provide(
    vmi: &VirtualMachineInstance,
    role: Role<'_>,
    view: &View<'_>,
    plan: &mut Plan,
) -> Result<(), &'static str> {
    let Some(name) = claim_name(vmi, role, view.world) else { return Ok(()) };
    if view.world.claims.get(&Name::new(vmi.namespace(), name.as_str())).is_some() {
        return Ok(());
    }
    let asked = kubevirt_class(view.world);
    let class = match asked.clone() {
        Some(class) => class,
        None => default_class(view.world).ok_or("no default storage class found")?,
    };
    // Whoever names a class knows that nodes share it; KubeVirt assumes the same, unless a storage profile says otherwise.
    let mode = match asked {
        Some(_) if !volumes::is_of_one_node(&class, view.world) => MANY_NODES,
        _ => ONE_NODE,
    };
    let label = match role {
        Role::Start => (names::LABEL_PERSISTENT_STATE.to_owned(), label_of(&vmi.key())),
        Role::Receive(migration) => {
            (names::LABEL_MIGRATION_NAME.to_owned(), names::label_value(Stored::name(migration)))
        }
    };
    // The VM's, so that it outlives the VMI; a VMI without a VM is never started again.
    let owners = vmi.metadata.owner_references.clone().filter(|owners| !owners.is_empty());
    plan.create(PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: vmi.metadata.namespace.clone(),
            labels: Some(BTreeMap::from([label])),
            owner_references: Some(owners.unwrap_or_else(|| vec![launcher_pod::owner(vmi)])),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec![mode.to_owned()]),
            resources: Some(VolumeResourceRequirements {
                requests: Some(BTreeMap::from([("storage".to_owned(), Quantity(SIZE.to_owned()))])),
                limits: None,
            }),
            storage_class_name: Some(class),
            volume_mode: Some("Filesystem".to_owned()),
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    });
    Ok(())
}

/// The StorageClass that the installation names for it.
pub(crate) fn kubevirt_class(world: &World) -> Option<String> {
    let kubevirt = world.kubevirt()?;
    kubevirt.spec.configuration.vm_state_storage_class.clone().filter(|class| !class.is_empty())
}

fn default_class(world: &World) -> Option<String> {
    let marked = |mark: &str| world.classes.iter().find(|class| class.annotation(mark) == Some("true"));
    let class = marked(IS_DEFAULT_VIRT_CLASS).or_else(|| marked(volumes::IS_DEFAULT_CLASS))?;
    Some(class.name().to_owned())
}

/// Whether a migration of an earlier life of the guest has yet to say which of two claims its state is on.
pub fn is_undecided(vmi: &VirtualMachineInstance, view: &View<'_>) -> bool {
    let there = |migration: &VirtualMachineInstanceMigration| {
        view.world.claims.get(&Name::new(vmi.namespace(), target_name(migration))).is_some()
    };
    vmi.spec.domain.has_persistent_state()
        && view
            .world
            .migrations_of(&vmi.key())
            .any(|migration| migration.has_finalizer(names::FINALIZER_MIGRATION) && there(migration))
}

/// A migration is over: if the guest has come to run at the target, its state is on the claim that was made for that, and the old one
/// goes. Otherwise the new one does. `idle`: the target's pod surely does not need it any more.
pub fn conclude(
    migration: &VirtualMachineInstanceMigration,
    arrived: bool,
    idle: bool,
    view: &View<'_>,
    plan: &mut Plan,
) {
    let claim = |name: &str| view.world.claims.get(&Name::new(migration.namespace(), name));
    let Some(target) = claim(&target_name(migration)).filter(|claim| !claim.deleting()) else { return };
    if !arrived {
        if idle && target.label(names::LABEL_PERSISTENT_STATE).is_none() {
            plan.delete(target.as_ref());
        }
        return;
    }
    let mut kept = target.as_ref().clone();
    let labels = kept.metadata.labels.get_or_insert_default();
    let guest = Name::new(migration.namespace(), migration.vmi_name());
    labels.insert(names::LABEL_PERSISTENT_STATE.to_owned(), label_of(&guest));
    labels.remove(names::LABEL_MIGRATION_NAME);
    plan.update(target.as_ref(), &kept);
    for old in view.world.claims_keeping(&guest).filter(|old| old.name() != target.name() && !old.deleting()) {
        plan.delete(old.as_ref());
    }
}

/// Shows the claim among the VMI's volumes, as KubeVirt does.
pub fn show(vmi: &mut VirtualMachineInstance, world: &World) {
    if !vmi.spec.domain.has_persistent_state() {
        return;
    }
    let Some(claim) = claim_of(&vmi.key(), world) else { return };
    let info = PersistentVolumeClaimInfo {
        claim_name: Some(claim.name().to_owned()),
        access_modes: claim.spec.as_ref().and_then(|spec| spec.access_modes.clone()).unwrap_or_default(),
        ..PersistentVolumeClaimInfo::default()
    };
    let volumes = &mut vmi.status.volume_status;
    let shown = volumes.iter_mut().find(|volume| volume.name == names::PERSISTENT_STATE_VOLUME);
    match shown {
        Some(shown) => shown.persistent_volume_claim_info = Some(info),
        None => volumes.push(VolumeStatus {
            name: names::PERSISTENT_STATE_VOLUME.to_owned(),
            persistent_volume_claim_info: Some(info),
            ..VolumeStatus::default()
        }),
    }
}

#[cfg(test)]
#[path = "persistent_state_tests.rs"]
mod tests;
