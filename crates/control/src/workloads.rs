//! Workload updates: guests whose launcher is older than this installation's get a new one.
//!
//! A launcher is outdated when its pod was made with another image than new ones are, or for another version of godwit
//! ([`names::ANNOTATION_LAUNCHER_VERSION`]; a pod that says none is older than that). Its VMI is labelled, the KubeVirt object
//! counts such VMIs, and does with them what its `spec.workloadUpdateStrategy` says.

use std::sync::Arc;

use godwit_api::config::PARALLEL_MIGRATIONS_PER_CLUSTER;
use godwit_api::kubevirt::WorkloadUpdateStrategy;
use godwit_api::migration::MigrationPriority;
use godwit_api::names::conditions;
use godwit_api::names::events::{self, reason};
use godwit_api::{
    Condition, KubeVirt, MigrationPhase, VirtualMachineInstance, VirtualMachineInstanceMigration, VmiPhase,
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::object::Stored;
use crate::plan::{Effect, EventType, Plan, View, later};
use crate::world::World;
use crate::{kubevirt, names, placement, turns, vmi};

/// Between two looks while outdated launchers are left (KubeVirt's).
const LOOK_EVERY: SignedDuration = SignedDuration::from_secs(5);
/// The pause after a migration that failed; each further one in a row doubles it (KubeVirt's).
const FIRST_PAUSE: SignedDuration = SignedDuration::from_secs(20);
/// How many doublings there are at most: finished migrations are not kept for ever.
const MOST_DOUBLINGS: u32 = 5;
/// How many pods are evicted at once when the strategy says nothing (KubeVirt's).
const BATCH: i32 = 10;
/// How long the next batch waits then (KubeVirt's).
const INTERVAL: SignedDuration = SignedDuration::from_secs(60);
/// On the KubeVirt object: when the last batch was evicted.
const ANNOTATION_LAST_BATCH: &str = "godwit.io/last-eviction-batch";

const LIVE_MIGRATE: &str = "LiveMigrate";
const EVICT: &str = "Evict";

/// Whether the VMI's guest runs in a launcher that is older than new ones.
pub fn is_outdated(vmi: &VirtualMachineInstance, view: &View<'_>) -> bool {
    let Some(pod) = vmi::current_pod(vmi, view.world).filter(|_| vmi.status.phase == VmiPhase::Running) else {
        return false;
    };
    let containers = pod.spec.as_ref().map(|spec| spec.containers.as_slice()).unwrap_or_default();
    let compute = containers.iter().find(|container| container.name == names::COMPUTE_CONTAINER);
    let image = compute.and_then(|compute| compute.image.as_deref());
    image != Some(view.settings.launcher_image.as_str())
        || pod.annotation(names::ANNOTATION_LAUNCHER_VERSION) != Some(view.settings.version.as_str())
}

/// Says on the VMI whether its launcher is outdated.
pub fn label(after: &mut VirtualMachineInstance, outdated: bool) {
    let labels = after.metadata.labels.get_or_insert_default();
    match outdated {
        true => drop(labels.insert(names::LABEL_OUTDATED_LAUNCHER_IMAGE.to_owned(), String::new())),
        false => drop(labels.remove(names::LABEL_OUTDATED_LAUNCHER_IMAGE)),
    }
    if labels.is_empty() {
        after.metadata.labels = None;
    }
}

/// Whether the VMI says of itself that its launcher is outdated.
pub fn is_labelled(vmi: &VirtualMachineInstance) -> bool {
    vmi.label(names::LABEL_OUTDATED_LAUNCHER_IMAGE).is_some()
}

/// Whether a guest gets memory that its next launcher on the same node can map: where its VMI says so, or, where that says
/// nothing, in clusters whose launchers are updated by live migration. Elsewhere it would cost something for nothing
/// (docs/updates.md).
pub fn wants_shareable_memory(vmi: &VirtualMachineInstance, world: &World) -> bool {
    match vmi.annotation(names::ANNOTATION_GUEST_MEMORY) {
        Some(names::GUEST_MEMORY_SHAREABLE) => true,
        Some(names::GUEST_MEMORY_PRIVATE) => false,
        _ => world.kubevirt().is_some_and(|kubevirt| uses(&kubevirt.spec.workload_update_strategy, LIVE_MIGRATE)),
    }
}

fn uses(strategy: &Option<WorkloadUpdateStrategy>, method: &str) -> bool {
    strategy.iter().flat_map(|strategy| &strategy.workload_update_methods).any(|known| known == method)
}

/// Counts the outdated and moves, or evicts, as many as may be now.
pub fn update(before: &Arc<KubeVirt>, after: &mut KubeVirt, view: &View<'_>, plan: &mut Plan) {
    let outdated: Vec<_> = view.world.outdated_vmis().filter(|vmi| !vmi.is_final()).collect();
    let count = i64::try_from(outdated.len()).unwrap_or(i64::MAX);
    after.status.outdated_virtual_machine_instance_workloads = Some(count);
    let strategy = &before.spec.workload_update_strategy;
    if outdated.is_empty() || !(uses(strategy, LIVE_MIGRATE) || uses(strategy, EVICT)) {
        return;
    }
    plan.wake(view.now + LOOK_EVERY);
    let still = |vmi: &&&Arc<VirtualMachineInstance>| {
        let busy = view.world.migrations_of(&vmi.key()).any(|migration| !migration.is_final());
        let pods = view.world.pods_of_vmi(vmi.uid()).filter(|pod| !placement::is_finished(pod)).count();
        vmi.status.phase == VmiPhase::Running
            && !(vmi.is_deleting() || busy || pods > 1 || turns::is_on_its_way(vmi))
            && vmi.status.evacuation_node_name.is_none()
    };
    let (movable, stuck): (Vec<_>, Vec<_>) = outdated.iter().filter(still).partition(|vmi| {
        uses(strategy, LIVE_MIGRATE) && vmi.condition(conditions::LIVE_MIGRATABLE).is_some_and(Condition::is_true)
    });
    migrate(&movable, view, plan);
    if uses(strategy, EVICT) {
        evict(&stuck, strategy.clone().unwrap_or_default(), after, view, plan);
    }
}

/// As many migrations as the cluster has room for beside those that are under way.
fn migrate(vmis: &[&&Arc<VirtualMachineInstance>], view: &View<'_>, plan: &mut Plan) {
    let most = kubevirt::migration_configuration(view.world).parallel_migrations_per_cluster;
    let most = most.unwrap_or(PARALLEL_MIGRATIONS_PER_CLUSTER);
    let mut room = usize::try_from(most).unwrap_or(usize::MAX).saturating_sub(view.world.unfinished_migrations());
    for vmi in vmis {
        let (last, next) = history(vmi, view);
        if let Some(next) = next.filter(|next| view.now < *next) {
            plan.wake(next);
            continue;
        }
        if room == 0 {
            return;
        }
        room -= 1;
        let seed = format!("{}/{}/{}", vmi.uid(), vmi::current_pod_name(vmi), last.unwrap_or_default());
        let migration = attempt(vmi, &names::workload_update(&seed));
        let text = events::created_workload_update(Stored::name(&migration));
        plan.create(migration);
        plan.record(
            vmi.as_ref(),
            events::COMPONENT_WORKLOAD_UPDATE,
            EventType::Normal,
            reason::SUCCESSFUL_CREATE,
            text,
        );
    }
}

/// The UID of the VMI's last such migration, and when the next may begin, if those before have failed.
fn history(vmi: &VirtualMachineInstance, view: &View<'_>) -> (Option<String>, Option<Timestamp>) {
    let mut ours: Vec<_> = view
        .world
        .migrations_of(&vmi.key())
        .filter(|migration| migration.annotation(names::ANNOTATION_WORKLOAD_UPDATE_MIGRATION).is_some())
        .collect();
    ours.sort_by_key(|migration| (migration.metadata.creation_timestamp.clone(), migration.key()));
    let failed = ours.iter().rev().take_while(|migration| migration.status.phase == MigrationPhase::Failed).count();
    let last = ours.last();
    let ended = last.and_then(|migration| {
        let mut stamps = migration.status.phase_transition_timestamps.iter();
        stamps
            .find(|entry| entry.phase == MigrationPhase::Failed)?
            .phase_transition_timestamp
            .as_ref()
            .map(|time| time.0)
    });
    let doublings = u32::try_from(failed.saturating_sub(1)).unwrap_or(MOST_DOUBLINGS).min(MOST_DOUBLINGS);
    let next = ended.filter(|_| failed > 0).map(|ended| later(ended, FIRST_PAUSE * 2_i32.pow(doublings)));
    (last.map(|migration| migration.uid().to_owned()), next)
}

fn attempt(vmi: &VirtualMachineInstance, name: &str) -> VirtualMachineInstanceMigration {
    let mut migration = VirtualMachineInstanceMigration {
        metadata: ObjectMeta {
            namespace: vmi.metadata.namespace.clone(),
            name: Some(name.to_owned()),
            annotations: Some([(names::ANNOTATION_WORKLOAD_UPDATE_MIGRATION.to_owned(), String::new())].into()),
            ..ObjectMeta::default()
        },
        ..VirtualMachineInstanceMigration::default()
    };
    migration.spec.vmi_name = vmi.metadata.name.clone();
    migration.spec.priority = Some(MigrationPriority::SystemCritical);
    migration
}

/// The next batch of those that cannot be moved, when it is time.
fn evict(
    vmis: &[&&Arc<VirtualMachineInstance>],
    strategy: WorkloadUpdateStrategy,
    after: &mut KubeVirt,
    view: &View<'_>,
    plan: &mut Plan,
) {
    let interval = strategy.batch_eviction_interval.as_deref().and_then(|text| text.parse::<SignedDuration>().ok());
    let interval = interval.filter(|interval| interval.is_positive()).unwrap_or(INTERVAL);
    let last = after.metadata.annotations.as_ref().and_then(|all| all.get(ANNOTATION_LAST_BATCH));
    let last = last.and_then(|text| text.parse::<Timestamp>().ok());
    if let Some(next) = last.map(|last| later(last, interval)).filter(|next| view.now < *next) {
        return plan.wake(next);
    }
    let most = usize::try_from(strategy.batch_eviction_size.unwrap_or(BATCH)).unwrap_or(0);
    let pods = vmis.iter().filter_map(|vmi| Some((vmi, vmi::current_pod(vmi, view.world)?)));
    let batch: Vec<_> = pods.filter(|(_, pod)| !pod.deleting()).take(most).collect();
    for (vmi, pod) in &batch {
        plan.push(Effect::Evict { pod: pod.reference(), uid: pod.uid().to_owned(), or_learn: false });
        let text = events::evicted_for_update(Stored::name(vmi.as_ref()));
        plan.record(vmi.as_ref(), events::COMPONENT_WORKLOAD_UPDATE, EventType::Normal, reason::SUCCESSFUL_EVICT, text);
    }
    if !batch.is_empty() {
        let annotations = after.metadata.annotations.get_or_insert_default();
        annotations.insert(ANNOTATION_LAST_BATCH.to_owned(), view.now.to_string());
    }
}
