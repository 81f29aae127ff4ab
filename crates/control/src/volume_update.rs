//! `updateVolumesStrategy: Migration`: a running guest's disks move to the claims that its VM names now.
//!
//! The VM's template is what is wanted, `VMI.spec.volumes` is what target pods are made with, and `VMI.status.migratedVolumes`
//! says which of them the guest has not got yet. These two are written in one patch; the target's handler takes the second out
//! in the patch that says that the guest is there. So whoever reads the VMI knows on which claims the guest's data is.

use godwit_api::migration::MigrationPriority;
use godwit_api::names::conditions;
use godwit_api::names::keys::LABEL_VMI_NAME;
use godwit_api::vm::{UpdateVolumesStrategy, VolumeMigrationState, VolumeUpdateState};
use godwit_api::vmi::{PersistentVolumeClaimInfo, StorageMigratedVolumeInfo, Volume};
use godwit_api::{
    Condition, VirtualMachine, VirtualMachineInstance, VirtualMachineInstanceMigration, VmiPhase, condition,
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::names;
use crate::object::{Name, Stored};
use crate::plan::{Plan, View, later};
use crate::{hotplug, quantity, selector, vm, volumes};

/// Label of the migrations that move volumes; its value is the VM's name (KubeVirt's).
pub const LABEL_IN_PROGRESS: &str = "kubevirt.io/volume-update-in-progress";
/// How their names begin (KubeVirt's).
const PREFIX: &str = "kubevirt-workload-update-";
/// The longest pause after a migration that failed.
const MAX_BACK_OFF_SECONDS: i64 = 300;
/// What the condition `VolumesChange` says while they move (KubeVirt's).
const MIGRATE_VOLUMES: &str = "migrate volumes";
/// Its reason while the change is taken back (KubeVirt's).
const CANCELLATION: &str = "VolumesChangeCancellation";
/// Condition of a VM whose volumes may be half copied (KubeVirt's).
pub const MANUAL_RECOVERY_REQUIRED: &str = "ManualRecoveryRequired";

/// What a change of volumes makes necessary now. `after` is the VM as it will be written; `plan` is carried out after that.
pub fn decide(after: &mut VirtualMachine, vmi: &VirtualMachineInstance, view: &View<'_>, plan: &mut Plan) {
    if vmi.is_final() || vmi.is_deleting() {
        return conclude(after, vmi, plan);
    }
    let moving = &vmi.status.migrated_volumes;
    let mut wanted = vmi.clone();
    let now = Time(view.now);
    let mut restart = None;
    if moving.is_empty() {
        after.status.volume_update_state = None;
        condition::remove(&mut after.status.conditions, MANUAL_RECOVERY_REQUIRED);
        condition::remove(&mut wanted.status.conditions, conditions::VOLUMES_CHANGE);
        if differ(after, &vmi.spec.volumes) {
            match prepare(after, vmi, view) {
                Ok(_) if is_busy(vmi, view) => plan.wake(view.now + SignedDuration::from_secs(5)),
                Ok(moves) => {
                    after.status.volume_update_state = Some(state(&moves));
                    put(&mut wanted.spec.volumes, &moves, false);
                    wanted.status.migrated_volumes = moves;
                    let told = Condition::new(conditions::VOLUMES_CHANGE, true).because("", MIGRATE_VOLUMES);
                    condition::set(&mut wanted.status.conditions, told, &now);
                }
                Err(why) => restart = Some(why),
            }
        }
    } else {
        after.status.volume_update_state = Some(state(moving));
        if is_reverted(after, moving) {
            revert(vmi, view, &mut wanted, plan);
        } else {
            if differ(after, &vmi.spec.volumes) {
                restart = Some("The volume can only be reverted to the previous version during the update".to_owned());
            }
            let told = Condition::new(conditions::VOLUMES_CHANGE, true).because("", migrate(after, vmi, view, plan));
            condition::set(&mut wanted.status.conditions, told, &now);
        }
    }
    bring_late_disks(after, vmi, &mut wanted);
    plan.update(vmi, &wanted);
    match restart {
        Some(why) => {
            let told = Condition::new(conditions::RESTART_REQUIRED, true).because("RestartRequired", why);
            condition::set(&mut after.status.conditions, told, &now);
        }
        None => {
            condition::remove(&mut after.status.conditions, conditions::RESTART_REQUIRED);
        }
    }
}

/// The guest ends, and soon the VMI with it: whether its data has arrived is noted in the VM, which lives on. The VMI waits for that
/// ([`is_to_be_concluded`]).
pub fn conclude(after: &mut VirtualMachine, vmi: &VirtualMachineInstance, plan: &mut Plan) {
    // Until it has ended, its handlers may still say that it has arrived.
    if !vmi.is_final() || vmi.condition(conditions::VOLUMES_CHANGE).is_none() {
        return;
    }
    let moving = &vmi.status.migrated_volumes;
    let arrived = moving.is_empty() || is_arriving(vmi);
    after.status.volume_update_state = (!arrived).then(|| state(moving));
    let mut wanted = vmi.clone();
    condition::remove(&mut wanted.status.conditions, conditions::VOLUMES_CHANGE);
    plan.update(vmi, &wanted);
}

/// Whether the VM of a VMI that has ended has yet to note where the guest's data is.
pub fn is_to_be_concluded(vmi: &VirtualMachineInstance, view: &View<'_>) -> bool {
    let owner = view.world.vms.get(&vmi.key());
    vmi.condition(conditions::VOLUMES_CHANGE).is_some() && owner.is_some_and(|vm| vm::is_owned_by(vmi, vm))
}

/// Whether the VM must not be started: it names claims that its data has not come to.
pub fn holds_up_start(after: &mut VirtualMachine, now: Timestamp) -> bool {
    let moves = after.status.volume_update_state.as_ref().and_then(|state| state.volume_migration_state.as_ref());
    let Some(moves) = moves.map(|state| state.migrated_volumes.clone()) else { return false };
    if is_reverted(after, &moves) {
        after.status.volume_update_state = None;
        condition::remove(&mut after.status.conditions, MANUAL_RECOVERY_REQUIRED);
        return false;
    }
    let names: Vec<&str> = moves.iter().map(|moved| moved.volume_name.as_str()).collect();
    let text = format!(
        "The guest ended before its volumes were copied: {}. Set them back to the claims that it had, which \
         status.volumeUpdateState names, to start it.",
        names.join(", ")
    );
    let told = Condition::new(MANUAL_RECOVERY_REQUIRED, true).because("VolumesUpdateError", text);
    condition::set(&mut after.status.conditions, told, &Time(now));
    true
}

fn template(vm: &VirtualMachine) -> &[Volume] {
    vm.spec.template.as_ref().map(|template| template.spec.volumes.as_slice()).unwrap_or_default()
}

/// Volumes whose disks are there from the guest's start.
fn cold(volumes: &[Volume]) -> impl Iterator<Item = &Volume> {
    volumes.iter().filter(|volume| !volume.is_hotpluggable())
}

/// Makes the disks that come and go while the guest runs those of the VM's template (KubeVirt's declarative hot-plugging). One
/// that names another claim is taken out first, and put in again when nothing is left of it.
fn bring_late_disks(vm: &VirtualMachine, vmi: &VirtualMachineInstance, wanted: &mut VirtualMachineInstance) {
    let Some(template) = vm.spec.template.as_ref().map(|template| &template.spec) else { return };
    if vmi.status.phase != VmiPhase::Running || hotplug::is_moving(vmi) {
        return;
    }
    let late = |volumes: &'_ [Volume], name: &str| volumes.iter().find(|one| one.name == name).cloned();
    let goes = |volume: &Volume| {
        let same = late(&template.volumes, &volume.name).is_some_and(|one| claim_of(&one) == claim_of(volume));
        volume.is_hotpluggable() && !same
    };
    let gone: Vec<String> =
        wanted.spec.volumes.iter().filter(|volume| goes(volume)).map(|volume| volume.name.clone()).collect();
    wanted.spec.volumes.retain(|volume| !gone.contains(&volume.name));
    wanted.spec.domain.devices.disks.retain(|disk| !gone.contains(&disk.name));
    for volume in template.volumes.iter().filter(|volume| volume.is_hotpluggable()) {
        let there = vmi.spec.volumes.iter().any(|one| one.name == volume.name)
            || vmi.status.volume_status.iter().any(|one| one.name == volume.name);
        let disk = template.domain.devices.disks.iter().find(|disk| disk.name == volume.name);
        if let Some(disk) = disk.filter(|_| !there && vmi.takes_disks()) {
            wanted.spec.volumes.push(volume.clone());
            wanted.spec.domain.devices.disks.push(disk.clone());
        }
    }
}

/// Whether the VM names other volumes or claims. Nothing else of a volume counts: admission fills in defaults.
fn differ(vm: &VirtualMachine, volumes: &[Volume]) -> bool {
    let named = |volume: &Volume| (volume.name.clone(), claim_of(volume).map(str::to_owned));
    !cold(template(vm)).map(named).eq(cold(volumes).map(named))
}

/// Puts these volumes onto these claims.
fn put(volumes: &mut [Volume], moves: &[StorageMigratedVolumeInfo], back: bool) {
    for moved in moves {
        let info = if back { &moved.source_pvc_info } else { &moved.destination_pvc_info };
        let claim = info.as_ref().and_then(|info| info.claim_name.clone());
        let volume = volumes.iter_mut().find(|volume| volume.name == moved.volume_name);
        if let (Some(source), Some(claim)) = (volume.and_then(|v| v.persistent_volume_claim.as_mut()), claim) {
            source.claim_name = claim;
        }
    }
}

fn state(moves: &[StorageMigratedVolumeInfo]) -> VolumeUpdateState {
    let state = VolumeMigrationState { migrated_volumes: moves.to_vec() };
    VolumeUpdateState { volume_migration_state: Some(state) }
}

fn claim_of(volume: &Volume) -> Option<&str> {
    volume.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.as_str())
}

/// Whether the VM names the claims again that the guest's data is on.
fn is_reverted(vm: &VirtualMachine, moves: &[StorageMigratedVolumeInfo]) -> bool {
    moves.iter().all(|moved| {
        let source = moved.source_pvc_info.as_ref().and_then(|info| info.claim_name.as_deref());
        let volume = template(vm).iter().find(|volume| volume.name == moved.volume_name);
        source.is_some() && volume.and_then(claim_of) == source
    })
}

/// Which volumes move, or why they cannot.
fn prepare(
    vm: &VirtualMachine,
    vmi: &VirtualMachineInstance,
    view: &View<'_>,
) -> Result<Vec<StorageMigratedVolumeInfo>, String> {
    if vm.spec.update_volumes_strategy != Some(UpdateVolumesStrategy::Migration) {
        return Err("the volumes have changed; they are replaced when the VM is started again".into());
    }
    if vmi.status.phase != VmiPhase::Running {
        return Err("the volumes have changed before the guest ran".into());
    }
    let (new, old) = (template(vm), &vmi.spec.volumes);
    if !cold(new).map(|volume| &volume.name).eq(cold(old).map(|volume| &volume.name)) {
        return Err("volumes were added, removed or put in another order".into());
    }
    let mut moves = Vec::new();
    let mut others = Vec::new();
    for (new, old) in cold(new).zip(cold(old)).filter(|(new, old)| claim_of(new) != claim_of(old)) {
        match (claim_of(old), claim_of(new)) {
            (Some(from), Some(to)) => moves.push((new.name.as_str(), from, to)),
            _ => others.push(new.name.as_str()),
        }
    }
    if !others.is_empty() {
        return Err(format!("invalid volumes to update with migration: not claims: {others:?}"));
    }
    let disks = &vmi.spec.domain.devices.disks;
    let fixed = |name: &str| disks.iter().filter(|disk| disk.name == name).all(|disk| disk.is_read_only());
    let fixed: Vec<&str> = moves.iter().map(|(name, ..)| *name).filter(|name| fixed(name)).collect();
    if !fixed.is_empty() {
        return Err(format!("invalid volumes to update with migration: not written to by the guest: {fixed:?}"));
    }
    for condition in vmi.status.conditions.iter().filter(|c| c.type_ == conditions::LIVE_MIGRATABLE && c.is_false()) {
        if condition.reason.as_deref() != Some(conditions::live_migratable::DISKS) {
            let message = condition.message.as_deref().unwrap_or_default();
            return Err(format!("cannot migrate the volumes as the VMI isn't migratable: {message}"));
        }
    }
    let claim = |name: &str| view.world.claims.get(&Name::new(vmi.namespace(), name));
    for volume in old {
        let Some(name) = claim_of(volume).filter(|_| moves.iter().all(|(moved, ..)| *moved != volume.name)) else {
            continue;
        };
        if !claim(name).is_some_and(|claim| modes(claim).iter().any(|mode| mode == "ReadWriteMany")) {
            let name = &volume.name;
            return Err(format!(
                "cannot migrate the VM. The volume {name} is RWO and not included in the migration volumes"
            ));
        }
    }
    let mut infos = Vec::new();
    for (name, from, to) in moves {
        let Some(there) = claim(to) else { return Err(format!("claim {to} of volume {name} does not exist")) };
        // Whoever else uses it would find another's data on it.
        if let Some(other) = view.world.vmis_using(&Name::new(vmi.namespace(), to)).next() {
            return Err(format!("claim {to} of volume {name} is used by VirtualMachineInstance {}", other.name()));
        }
        check_destination(name, there, vmi)?;
        infos.push(StorageMigratedVolumeInfo {
            volume_name: name.to_owned(),
            source_pvc_info: Some(info(from, claim(from))),
            destination_pvc_info: Some(info(to, Some(there))),
            receiving: None,
        });
    }
    Ok(infos)
}

/// What can be known of a bound claim before anything is done: that it is large enough.
fn check_destination(volume: &str, claim: &PersistentVolumeClaim, vmi: &VirtualMachineInstance) -> Result<(), String> {
    if !volumes::is_bound(claim) {
        return Ok(());
    }
    let name = claim.name();
    let capacity = claim.status.as_ref().and_then(|status| status.capacity.as_ref()).and_then(|all| all.get("storage"));
    let size = vmi.status.volume_status.iter().find(|status| status.name == volume).and_then(|status| status.size);
    if let (Some(capacity), Some(size)) = (capacity, size)
        && quantity::whole(Some(capacity)) < i128::from(size)
    {
        // KubeVirt's words, up to the numbers.
        return Err(format!(
            "Volume migration cannot be performed because the destination volume is smaller than the source volume: claim \
             {name} of volume {volume} has {} bytes, the guest's disk {size}",
            quantity::whole(Some(capacity))
        ));
    }
    Ok(())
}

/// Whether the guest can move to its new claims only by staying on its node: one of them can be reached from there only, or there is no
/// other node for guests.
fn stays(vmi: &VirtualMachineInstance, view: &View<'_>) -> bool {
    let here = vmi.status.node_name.as_deref().unwrap_or_default();
    let others = || view.world.nodes.iter().filter(|node| node.name() != here);
    if !others().any(|node| node.label(names::LABEL_SCHEDULABLE) == Some("true")) {
        return true;
    }
    let mut destinations = vmi
        .status
        .migrated_volumes
        .iter()
        .filter_map(|moved| moved.destination_pvc_info.as_ref()?.claim_name.as_deref());
    destinations.any(|claim| {
        let claim = view.world.claims.get(&Name::new(vmi.namespace(), claim));
        let bound = claim.and_then(|claim| claim.spec.as_ref()?.volume_name.as_deref()).unwrap_or_default();
        let volume = view.world.volumes.get(&Name::cluster(bound));
        let affinity = volume.and_then(|volume| volume.spec.as_ref()?.node_affinity.as_ref());
        let required = affinity.and_then(|affinity| affinity.required.as_ref());
        required.is_some_and(|required| !others().any(|node| selector::node_matches(required, node)))
    })
}

fn modes(claim: &PersistentVolumeClaim) -> &[String] {
    claim.spec.as_ref().and_then(|spec| spec.access_modes.as_deref()).unwrap_or_default()
}

fn info(name: &str, claim: Option<&Arc<PersistentVolumeClaim>>) -> PersistentVolumeClaimInfo {
    let mode = claim.and_then(|claim| claim.spec.as_ref()?.volume_mode.clone());
    PersistentVolumeClaimInfo {
        claim_name: Some(name.to_owned()),
        access_modes: claim.map(|claim| modes(claim).to_vec()).unwrap_or_default(),
        volume_mode: Some(mode.unwrap_or_else(|| "Filesystem".into())),
        ..PersistentVolumeClaimInfo::default()
    }
}

/// The VMI's migrations that are not over.
fn under_way<'a>(vmi: &VirtualMachineInstance, view: &View<'a>) -> Vec<&'a Arc<VirtualMachineInstanceMigration>> {
    view.world.migrations_of(&vmi.key()).filter(|migration| !migration.status.phase.is_final()).collect()
}

/// Whether a migration may still be made from the volumes as they are, or the guest is between two nodes.
fn is_busy(vmi: &VirtualMachineInstance, view: &View<'_>) -> bool {
    !under_way(vmi, view).is_empty() || vmi.is_migrating() || is_arriving(vmi)
}

/// Whether the last migration was a success that the target's handler has not written down yet.
fn is_arriving(vmi: &VirtualMachineInstance) -> bool {
    let state = vmi.status.migration_state.as_ref();
    state.is_some_and(|state| state.completed == Some(true) && state.failed != Some(true)) && !vmi.has_arrived()
}

/// Takes the change back: first the migration, and when that is over the volumes.
fn revert(vmi: &VirtualMachineInstance, view: &View<'_>, wanted: &mut VirtualMachineInstance, plan: &mut Plan) {
    if is_busy(vmi, view) {
        for migration in under_way(vmi, view).into_iter().filter(|migration| !migration.is_deleting()) {
            plan.delete(migration.as_ref());
        }
        let told = Condition::new(conditions::VOLUMES_CHANGE, false).because(CANCELLATION, "");
        condition::set(&mut wanted.status.conditions, told, &Time(view.now));
        return;
    }
    put(&mut wanted.spec.volumes, &vmi.status.migrated_volumes, true);
    wanted.status.migrated_volumes = Vec::new();
    condition::remove(&mut wanted.status.conditions, conditions::VOLUMES_CHANGE);
}

/// Sees to it that there is a migration: the first at once, further ones after pauses that grow. Says how it stands.
fn migrate(vm: &VirtualMachine, vmi: &VirtualMachineInstance, view: &View<'_>, plan: &mut Plan) -> String {
    let change = condition::find(&vmi.status.conditions, conditions::VOLUMES_CHANGE);
    let since = change.and_then(|condition| condition.last_transition_time.as_ref()).map(|time| time.0);
    let created =
        |migration: &VirtualMachineInstanceMigration| migration.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let ours = |migration: &&Arc<VirtualMachineInstanceMigration>| {
        migration.label(LABEL_IN_PROGRESS) == Some(vm.name()) && created(migration) >= since
    };
    let tries: Vec<_> = view.world.migrations_of(&vmi.key()).filter(ours).collect();
    let count = i64::try_from(tries.len()).unwrap_or(i64::MAX);
    let last = tries.iter().max_by_key(|migration| created(migration));
    let migratable = vmi.status.conditions.iter().any(|c| c.type_ == conditions::LIVE_MIGRATABLE && c.is_true());
    if is_busy(vmi, view) || !migratable {
        // What was said of the last try stays until the next has an end.
        return change
            .filter(|c| c.is_true())
            .and_then(|c| c.message.clone())
            .unwrap_or_else(|| MIGRATE_VOLUMES.into());
    }
    let mut told = MIGRATE_VOLUMES.to_owned();
    if let Some((last, at)) = last.and_then(|last| Some((last, created(last)?))) {
        let pause = count.saturating_mul(count).saturating_mul(10).min(MAX_BACK_OFF_SECONDS);
        let next = later(at, SignedDuration::from_secs(pause));
        let state = last.status.migration_state.as_ref();
        let why = state.and_then(|state| state.failure_reason.as_deref()).unwrap_or("it gave no reason");
        told = format!("{told}; the last migration failed, and the guest stays where it was: {why}");
        if next > view.now {
            plan.wake(next);
            return told;
        }
    }
    // The same for the same try, so that a decision that is taken twice makes one.
    let seed = format!("{} {since:?} {count}", vmi.uid());
    let digest: String = Sha256::digest(seed).iter().take(5).map(|byte| format!("{byte:02x}")).collect();
    let metadata = ObjectMeta {
        name: Some(format!("{PREFIX}{digest}")),
        namespace: vmi.metadata.namespace.clone(),
        labels: Some(BTreeMap::from([
            (LABEL_IN_PROGRESS.to_owned(), vm.name().to_owned()),
            (LABEL_VMI_NAME.to_owned(), vmi.name().to_owned()),
        ])),
        finalizers: Some(vec![names::FINALIZER_MIGRATION.to_owned()]),
        ..ObjectMeta::default()
    };
    let mut migration = VirtualMachineInstanceMigration { metadata, ..Default::default() };
    migration.spec.vmi_name = Some(vmi.name().to_owned());
    if stays(vmi, view)
        && let Some(node) = &vmi.status.node_name
    {
        migration.spec.added_node_selector.insert(names::HOSTNAME.to_owned(), node.clone());
    }
    migration.spec.priority = Some(MigrationPriority::UserTriggered);
    plan.create(migration);
    told
}
