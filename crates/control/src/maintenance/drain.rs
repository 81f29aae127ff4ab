//! The pods of a node in maintenance: which are to go, their evictions, and what each VM waits for.

use std::sync::Arc;

use godwit_api::maintenance::{NodeMaintenanceStatus, PodReference, VmProgress, VmStatus};
use godwit_api::names::conditions::{EVACUATION_STOPPED, LIVE_MIGRATABLE};
use godwit_api::vmi::EvictionStrategy;
use godwit_api::{Condition, FailureCause, MigrationPhase, VirtualMachineInstance, VirtualMachineInstanceMigration};
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{Node, Pod};

use super::{AGAIN, Held};
use crate::object::Stored;
use crate::plan::{Effect, Plan, View};
use crate::world::{World, vmi_of_pod};
use crate::{evacuation, homecoming, kubevirt, names, placement, vmi};

/// A VM that was told to leave is on its way; its pod is asked for so often only in case it was told otherwise.
const ON_ITS_WAY: SignedDuration = SignedDuration::from_mins(1);
/// So many evictions are asked for in one plan.
const BATCH: usize = 32;
/// Of pods that the node's own kubelet made.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// How many pods a node has, and those that are to go: all but mirror pods and those of DaemonSets, as `kubectl drain
/// --force --ignore-daemonsets --delete-emptydir-data` has it.
pub fn pods<'a>(node: &str, world: &'a World) -> (usize, Vec<&'a Arc<Pod>>) {
    let of_daemon_set = |pod: &Pod| {
        let owners = pod.metadata.owner_references.iter().flatten();
        owners.into_iter().any(|owner| owner.controller == Some(true) && owner.kind == "DaemonSet")
    };
    let goes = |pod: &&Arc<Pod>| pod.annotation(MIRROR).is_none() && !of_daemon_set(pod);
    (world.pods_on(node).count(), world.pods_on(node).filter(goes).collect())
}

/// Names the pods that are still to go.
pub fn list(pending: &[&Arc<Pod>], status: &mut NodeMaintenanceStatus) {
    let text = str::to_owned;
    status.pending_pods = pending.iter().map(|pod| text(Stored::name(pod.as_ref()))).collect();
    let reference =
        |pod: &&Arc<Pod>| PodReference { namespace: text(pod.namespace()), name: text(Stored::name(pod.as_ref())) };
    status.pending_pods_refs = pending.iter().map(reference).collect();
}

/// How much of the work is done, in percent. Pods that came later count as work that was there from the start.
pub fn progress(at_start: Option<i32>, pending: usize) -> i32 {
    let all = i64::from(at_start.unwrap_or(0));
    let pending = i64::try_from(pending).unwrap_or(i64::MAX);
    let gone = all.saturating_sub(pending).max(0);
    if all == 0 { 0 } else { i32::try_from(gone * 100 / all).unwrap_or(0).min(99) }
}

/// Whether a VM stays where it is for now, whoever asks it to leave: it takes nobody's turn.
fn rests(vmi: &VirtualMachineInstance, view: &View<'_>) -> bool {
    let stopped = vmi.condition(EVACUATION_STOPPED).is_some_and(Condition::is_true);
    let next = vmi.status.evacuation.as_ref().and_then(|state| state.next_attempt_timestamp.as_ref());
    stopped
        || next.is_some_and(|next| view.now < next.0)
        || match evacuation::strategy(vmi, view.world) {
            EvictionStrategy::LiveMigrate => vmi.condition(LIVE_MIGRATABLE).is_some_and(Condition::is_false),
            EvictionStrategy::External => true,
            _ => false,
        }
}

/// The VMs whose turn it is to leave: those that are leaving, and as many more as `maxParallel` lets. Without a bound it is
/// nobody's turn, and everybody may go.
pub fn turns(one: &Held<'_>, view: &View<'_>, plan: &mut Plan) -> Vec<String> {
    let Some(most) = one.spec.max_parallel else { return Vec::new() };
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let here: Vec<_> = view.world.vmis_on(&one.spec.node_name).filter(|vmi| !vmi.is_final()).collect();
    let moves = |vmi: &VirtualMachineInstance| {
        vmi.is_deleting() || view.world.migrations_of(&vmi.key()).any(|migration| !migration.is_final())
    };
    let told = |vmi: &VirtualMachineInstance| one.status.leaving.contains(&vmi.key().to_string());
    let (mut turns, mut waiting): (Vec<_>, Vec<_>) = here.into_iter().partition(|vmi| moves(vmi));
    for vmi in &waiting {
        let next = vmi.status.evacuation.as_ref().and_then(|state| state.next_attempt_timestamp.as_ref());
        if let Some(next) = next.filter(|next| view.now < next.0) {
            plan.wake(next.0);
        }
    }
    waiting.retain(|vmi| !rests(vmi, view));
    waiting.sort_by_key(|vmi| !told(vmi));
    let room = most.saturating_sub(turns.len());
    turns.extend(waiting.into_iter().take(room));
    let mut names: Vec<String> = turns.iter().map(|vmi| vmi.key().to_string()).collect();
    names.sort();
    names
}

/// Asks for the pods' evictions, each again after a pause when it was refused. `leaving` are the VMs whose turn it is.
pub fn evict(pending: &[&Arc<Pod>], one: &Held<'_>, leaving: &[String], view: &View<'_>, plan: &mut Plan) {
    let mut asked = 0;
    for pod in pending.iter().filter(|pod| !pod.deleting()) {
        let vmi = vmi_of_pod(pod).and_then(|vmi| view.world.vmis.get(&vmi));
        let vmi = vmi.filter(|_| !placement::is_finished(pod));
        let bound = vmi.filter(|_| one.spec.max_parallel.is_some());
        if bound.is_some_and(|vmi| !rests(vmi, view) && !leaving.contains(&vmi.key().to_string())) {
            continue;
        }
        if let Some(refusal) = view.world.eviction_refusal(pod.uid()) {
            let leaving = vmi.is_some_and(|vmi| {
                vmi.status.evacuation_node_name.is_some() && vmi.condition(EVACUATION_STOPPED).is_none()
            });
            let next = refusal.last + if leaving { ON_ITS_WAY } else { AGAIN };
            if view.now < next {
                plan.wake(next);
                continue;
            }
        }
        if asked == BATCH {
            plan.wake(view.now);
            return;
        }
        asked += 1;
        plan.push(Effect::Evict { pod: pod.reference(), uid: pod.uid().to_owned(), or_learn: true });
        // What the server answers is looked at then, and what it did not answer is asked again.
        plan.wake(view.now + AGAIN);
    }
}

/// Says what every VM on the node waits for, and as the last error what stands in the way.
pub fn tell(pending: &[&Arc<Pod>], one: &Held<'_>, view: &View<'_>, status: &mut NodeMaintenanceStatus) {
    let vmis = view.world.vmis_on(&one.spec.node_name).filter(|vmi| !vmi.is_final());
    let leaving = std::mem::take(&mut status.leaving);
    status.virtual_machine_instances = vmis.map(|vmi| vm(vmi, one, &leaving, view)).collect();
    status.leaving = leaving;
    let blocked = status.virtual_machine_instances.iter().find(|vm| vm.state == VmProgress::Blocked);
    let blocked = blocked.map(|vm| {
        format!("{}/{} cannot leave: {}", vm.namespace, vm.name, vm.message.as_deref().unwrap_or("it is blocked"))
    });
    let refused = || {
        let others = pending.iter().filter(|pod| vmi_of_pod(pod).is_none());
        let mut refused = others.filter_map(|pod| Some((pod, view.world.eviction_refusal(pod.uid())?)));
        refused.next().map(|(pod, why)| format!("pod {} cannot be evicted: {}", pod.key(), why.message))
    };
    if let Some(why) = blocked.or_else(refused) {
        status.last_error = Some(why);
    }
}

fn vm(vmi: &VirtualMachineInstance, one: &Held<'_>, leaving: &[String], view: &View<'_>) -> VmStatus {
    let mut said =
        VmStatus { namespace: vmi.namespace().to_owned(), name: Stored::name(vmi).to_owned(), ..VmStatus::default() };
    let pod = vmi::current_pod(vmi, view.world);
    let migratable = vmi.condition(LIVE_MIGRATABLE);
    let (state, message) = if vmi.is_deleting() || pod.is_some_and(|pod| pod.deleting()) {
        (VmProgress::ShuttingDown, None)
    } else if let Some(migration) = view.world.migrations_of(&vmi.key()).find(|migration| !migration.is_final()) {
        said.migration_name = migration.metadata.name.clone();
        under_way(migration, &mut said)
    } else if let Some(stopped) = vmi.condition(EVACUATION_STOPPED).filter(|stopped| stopped.is_true()) {
        (VmProgress::Blocked, stopped.message.clone())
    } else {
        match (evacuation::strategy(vmi, view.world), migratable.filter(|migratable| migratable.is_false())) {
            (EvictionStrategy::LiveMigrate, Some(blocked)) => (VmProgress::Blocked, blocked.message.clone()),
            (EvictionStrategy::External, _) => {
                (VmProgress::Waiting, Some("somebody else is to move it: its evictionStrategy is External".to_owned()))
            }
            _ if one.spec.max_parallel.is_some() && !leaving.contains(&vmi.key().to_string()) && !rests(vmi, view) => {
                (VmProgress::Waiting, Some("it waits for its turn (maxParallel)".to_owned()))
            }
            _ => (VmProgress::Waiting, pause(vmi).or_else(|| refusal(pod, view))),
        }
    };
    said.state = state;
    said.message = message;
    said
}

/// How far its migration is.
fn under_way(migration: &VirtualMachineInstanceMigration, said: &mut VmStatus) -> (VmProgress, Option<String>) {
    let state = migration.status.migration_state.as_ref();
    said.target_node = state.and_then(|state| state.target_node.clone()).filter(|node| !node.is_empty());
    if migration.status.phase == MigrationPhase::Running {
        let percent = state.and_then(|state| state.progress.as_ref()).and_then(|progress| progress.percent);
        // In tens: each figure is a write.
        said.progress_percent = percent.map(|percent| percent / 10 * 10);
        return (VmProgress::Migrating, None);
    }
    let phase = migration.status.phase.as_str();
    let phase = if phase.is_empty() { "new" } else { phase };
    let why = migration.status.message.clone().unwrap_or_else(|| format!("its migration is {phase}"));
    (VmProgress::Waiting, Some(why))
}

/// The pause after a failed attempt.
fn pause(vmi: &VirtualMachineInstance) -> Option<String> {
    let state = vmi.status.evacuation.as_ref()?;
    let cause = state.last_failure.as_ref().map_or("no reason was given", FailureCause::as_str);
    let next = state.next_attempt_timestamp.as_ref()?.0;
    Some(format!("the last attempt failed with {cause}, the next one is made at {next}"))
}

fn refusal(pod: Option<&Arc<Pod>>, view: &View<'_>) -> Option<String> {
    pod.and_then(|pod| view.world.eviction_refusal(pod.uid())).map(|refusal| refusal.message.clone())
}

/// The VMs of the node are to come back when it is over (`returnHome`). One that is here because it fled from another home
/// keeps that one.
pub fn mark_home(node: &str, world: &World, plan: &mut Plan) {
    for vmi in world.vmis_on(node).filter(|vmi| !vmi.is_final() && !vmi.is_deleting()) {
        if homecoming::home_of(vmi).is_none() {
            let mut after = vmi.as_ref().clone();
            let annotations = after.metadata.annotations.get_or_insert_default();
            annotations.insert(names::ANNOTATION_HOME.to_owned(), node.to_owned());
            plan.update(vmi.as_ref(), &after);
        }
    }
}

/// Nobody has to leave the node any more: marks are taken off, and evacuations that wait for their turn, for a node or for
/// their target pod are taken back. So are those that nobody is marked for: the taint alone has sent them off. `node` is as
/// it will be; where somebody else's drain taint stays, only marks are taken off.
pub fn call_off(node: &Node, world: &World, plan: &mut Plan) {
    let drained = evacuation::is_drained(node, &kubevirt::migration_configuration(world));
    let node = Stored::name(node);
    for vmi in world.vmis_on(node) {
        let marked = vmi.status.evacuation_node_name.as_deref() == Some(node);
        if !marked && drained {
            continue;
        }
        let evacuated = vmi.status.evacuation.as_ref().is_some_and(|state| state.node_name.as_deref() == Some(node));
        if marked || evacuated {
            let mut after = vmi.as_ref().clone();
            evacuation::call_off(&mut after);
            plan.update(vmi.as_ref(), &after);
        }
        // Whatever the VMI says: the open node may have ended its evacuation by now.
        let waits = |one: &&Arc<VirtualMachineInstanceMigration>| {
            let of_this = one.annotation(names::ANNOTATION_EVACUATION_MIGRATION) == Some(node);
            of_this && !one.is_final() && !one.is_deleting() && !one.status.phase.target_is_handed_off()
        };
        for migration in world.migrations_of(&vmi.key()).filter(waits) {
            plan.delete(migration.as_ref());
        }
    }
}
