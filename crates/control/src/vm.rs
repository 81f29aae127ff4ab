//! VMs: when there shall be a VMI, and what the VM says of it.

use godwit_api::names::conditions;
use godwit_api::names::events::{self, reason};
use godwit_api::vm::{PrintableStatus, StartFailure, StateChangeRequest};
use godwit_api::vmi::START_PAUSED;
use godwit_api::{Condition, RunStrategy, VirtualMachine, VirtualMachineInstance, VmiPhase, condition};
use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

use crate::launcher_pod::owner;
use crate::names;
use crate::object::{Name, Stored};
use crate::placement;
use crate::plan::{EventType, Plan, VM_CONTROLLER, View};
use crate::volume_update;

/// The longest pause between two starts that fail.
const MAX_BACK_OFF_SECONDS: i64 = 300;
const START: &str = "Start";
const STOP: &str = "Stop";

/// What a VM's run strategy makes of the moment.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// There shall be a VMI.
    Start,
    /// There shall be none.
    Stop,
    /// The VMI has ended and shall run again.
    Restart,
    /// It is well as it is.
    Leave,
}

/// Decides about one VM.
pub fn decide(name: &Name, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let Some(vm) = view.world.vms.get(name) else { return plan };
    let mut after = vm.as_ref().clone();
    let mut events = Plan::nothing();
    let found = view.world.vmis.get(name);
    let vmi = found.filter(|vmi| is_owned_by(vmi, vm));
    let mut starting = false;

    if vm.is_deleting() {
        let orphan = vm.has_finalizer("orphan");
        if let Some(vmi) = vmi {
            volume_update::conclude(&mut after, vmi, &mut events);
        }
        match vmi.filter(|_| !orphan) {
            Some(vmi) if !vmi.is_deleting() => plan.delete(vmi.as_ref()),
            Some(_) => {}
            None => drop_finalizer(&mut after),
        }
    } else {
        if !vm.has_finalizer(names::FINALIZER_VM) {
            after.metadata.finalizers.get_or_insert_default().push(names::FINALIZER_VM.to_owned());
        }
        note_start(&mut after, vmi.map(AsRef::as_ref), view);
        settle_requests(&mut after, vmi.map(AsRef::as_ref));
        if vmi.is_none()
            && after.spec.effective_run_strategy() == RunStrategy::Halted
            && asked_to_start(&after).is_some_and(|request| !request.data.is_empty())
        {
            // Only a start with a wish of its own is left to us; it turns the VM on as any other does. One without is what a
            // restart has left that a stop came after.
            match after.spec.running.as_mut().filter(|_| after.spec.run_strategy.is_none()) {
                Some(running) => *running = true,
                None => after.spec.run_strategy = Some(RunStrategy::Always),
            }
        }
        let wish = wish(&after, vmi.map(AsRef::as_ref));
        if let Some(vmi) = vmi {
            // Written after the VM: its status has to say where the data is before the VMI says where it goes.
            volume_update::decide(&mut after, vmi, view, &mut events);
        }
        let held = vmi.is_none() && volume_update::holds_up_start(&mut after, view.now);
        match (wish, vmi) {
            (Wish::Start, None) if held => {}
            (Wish::Start, None) if found.is_none() => {
                let retry =
                    after.status.start_failure.as_ref().and_then(|failure| failure.retry_after_timestamp.as_ref());
                match retry.filter(|retry| retry.0 > view.now) {
                    Some(retry) => plan.wake(retry.0),
                    None => {
                        starting = true;
                        plan.create(new_vmi(vm, asked_to_start(&after)));
                        let text = events::started_vm(&name.name);
                        events.record(vm.as_ref(), VM_CONTROLLER, EventType::Normal, reason::SUCCESSFUL_CREATE, text);
                    }
                }
            }
            (Wish::Stop | Wish::Restart, Some(vmi)) if !vmi.is_deleting() => {
                if wish == Wish::Restart && after.spec.effective_run_strategy() == RunStrategy::RerunOnFailure {
                    request(&mut after, START, None);
                }
                plan.delete(vmi.as_ref());
                let text = events::stopped_vm(&name.name);
                events.record(vm.as_ref(), VM_CONTROLLER, EventType::Normal, reason::SUCCESSFUL_DELETE, text);
            }
            _ => {}
        }
        after.status.run_strategy = Some(after.spec.effective_run_strategy());
    }

    let foreign = found.is_some() && vmi.is_none();
    describe(&mut after, vmi.map(AsRef::as_ref), foreign, starting, view);
    plan.update(vm.as_ref(), &after);
    plan.effects.append(&mut events.effects);
    if let Some(at) = events.wake_at {
        plan.wake(at);
    }
    plan
}

/// Whether the VMI is this VM's.
pub(crate) fn is_owned_by(vmi: &VirtualMachineInstance, vm: &VirtualMachine) -> bool {
    let owners = vmi.metadata.owner_references.as_deref().unwrap_or_default();
    owners.iter().any(|owner| owner.kind == "VirtualMachine" && owner.uid == vm.uid())
}

fn drop_finalizer(vm: &mut VirtualMachine) {
    if let Some(finalizers) = &mut vm.metadata.finalizers {
        finalizers.retain(|finalizer| finalizer != names::FINALIZER_VM);
        if finalizers.is_empty() {
            vm.metadata.finalizers = None;
        }
    }
}

/// What the run strategy wants. `status.runStrategy` is the strategy that was in force at the last decision.
fn wish(vm: &VirtualMachine, vmi: Option<&VirtualMachineInstance>) -> Wish {
    let strategy = vm.spec.effective_run_strategy();
    let asked = |action: &str| vm.status.state_change_requests.iter().any(|request| request.action == action);
    let failed = vmi.is_some_and(|vmi| vmi.status.phase == VmiPhase::Failed);
    let ended = vmi.is_some_and(VirtualMachineInstance::is_final);
    if vmi.is_some() && asked(STOP) {
        return Wish::Stop;
    }
    match (&strategy, vmi) {
        (RunStrategy::Always, None) => Wish::Start,
        (RunStrategy::Always, Some(_)) if ended => Wish::Restart,
        (RunStrategy::RerunOnFailure, Some(_)) if failed => Wish::Restart,
        // Strategies that start once do so when they come into force.
        (RunStrategy::RerunOnFailure | RunStrategy::Once, None)
            if asked(START) || vm.status.run_strategy.as_ref() != Some(&strategy) =>
        {
            Wish::Start
        }
        (RunStrategy::Manual, None) if asked(START) => Wish::Start,
        (RunStrategy::Manual, Some(_)) if ended && asked(START) => Wish::Restart,
        (RunStrategy::Halted, Some(_)) => Wish::Stop,
        _ => Wish::Leave,
    }
}

fn request(vm: &mut VirtualMachine, action: &str, uid: Option<String>) {
    let requests = &mut vm.status.state_change_requests;
    if !requests.iter().any(|request| request.action == action) {
        requests.push(StateChangeRequest { action: action.to_owned(), uid, ..StateChangeRequest::default() });
    }
}

/// Drops requests that have been met: a stop when its VMI is gone, a start when a VMI is there and no stop goes before it.
fn settle_requests(vm: &mut VirtualMachine, vmi: Option<&VirtualMachineInstance>) {
    let requests = &mut vm.status.state_change_requests;
    requests.retain(|request| {
        request.action != STOP
            || vmi.is_some_and(|vmi| request.uid.as_deref().is_none_or(|uid| uid.is_empty() || uid == vmi.uid()))
    });
    let stopping = requests.iter().any(|request| request.action == STOP);
    if !stopping && vmi.is_some_and(|vmi| !vmi.is_final() && !vmi.is_deleting()) {
        requests.retain(|request| request.action != START);
    }
}

/// Counts starts that failed before the guest ever ran, and forgets them when it does run.
fn note_start(vm: &mut VirtualMachine, vmi: Option<&VirtualMachineInstance>, view: &View<'_>) {
    let Some(vmi) = vmi else { return };
    let ran = vmi.status.phase == VmiPhase::Running
        || vmi.status.phase_transition_timestamps.iter().any(|entry| entry.phase == VmiPhase::Running);
    if ran {
        vm.status.start_failure = None;
        return;
    }
    let before = vm.status.start_failure.as_ref();
    let counted = before.and_then(|failure| failure.last_failed_vmi_uid.as_deref()) == Some(vmi.uid());
    if vmi.status.phase != VmiPhase::Failed || counted {
        return;
    }
    let count = before.and_then(|failure| failure.consecutive_fail_count).unwrap_or(0).max(0).saturating_add(1);
    vm.status.start_failure = Some(StartFailure {
        consecutive_fail_count: Some(count),
        last_failed_vmi_uid: Some(vmi.uid().to_owned()),
        retry_after_timestamp: Some(Time(view.now + back_off(count))),
    });
}

/// The pause before the next start after `count` failed ones: 10·n² seconds, at most 300 (KubeVirt's).
fn back_off(count: i32) -> SignedDuration {
    let count = i64::from(count);
    SignedDuration::from_secs(count.saturating_mul(count).saturating_mul(10).clamp(0, MAX_BACK_OFF_SECONDS))
}

fn asked_to_start(vm: &VirtualMachine) -> Option<&StateChangeRequest> {
    vm.status.state_change_requests.iter().find(|request| request.action == START)
}

/// The VMI for a run, which somebody may have asked for with a wish of its own.
fn new_vmi(vm: &VirtualMachine, asked: Option<&StateChangeRequest>) -> VirtualMachineInstance {
    let mut template = vm.spec.template.clone().unwrap_or_default();
    if asked.and_then(|request| request.data.get("paused")).is_some_and(|paused| paused == "true") {
        template.spec.start_strategy = Some(START_PAUSED.to_owned());
    }
    // What godwit alone sets on a VMI, nobody sets by way of a template.
    if let Some(annotations) = &mut template.metadata.annotations {
        annotations.remove(names::ANNOTATION_HOME);
    }
    VirtualMachineInstance {
        metadata: ObjectMeta {
            name: vm.metadata.name.clone(),
            namespace: vm.metadata.namespace.clone(),
            labels: template.metadata.labels,
            annotations: template.metadata.annotations,
            owner_references: Some(vec![owner(vm)]),
            finalizers: Some(vec![names::FINALIZER_VMI.to_owned()]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        ..VirtualMachineInstance::default()
    }
}

fn describe(
    vm: &mut VirtualMachine,
    vmi: Option<&VirtualMachineInstance>,
    foreign: bool,
    starting: bool,
    view: &View<'_>,
) {
    let now = Time(view.now);
    let printable = printable(vm, vmi, starting, view);
    let status = &mut vm.status;
    status.printable_status = printable;
    status.created = Some(vmi.is_some());
    status.ready = Some(vmi.is_some_and(|vmi| condition::is_true(&vmi.status.conditions, conditions::READY)));
    status.observed_generation = vm.metadata.generation;
    status.desired_generation = vm.metadata.generation;

    // The VM's own conditions stay, all others are the VMI's.
    let own = [conditions::FAILURE, conditions::RESTART_REQUIRED, "ManualRecoveryRequired"];
    let mirrored = vmi.map(|vmi| vmi.status.conditions.as_slice()).unwrap_or_default();
    status.conditions.retain(|held| {
        own.contains(&held.type_.as_str())
            || held.type_ == conditions::READY
            || mirrored.iter().any(|condition| condition.type_ == held.type_)
    });
    for condition in mirrored {
        condition::set(&mut status.conditions, condition.clone(), &now);
    }
    if !condition_exists(mirrored, conditions::READY) {
        let told = Condition::new(conditions::READY, false).because("VMINotExists", "VMI does not exist");
        condition::set(&mut status.conditions, told, &now);
    }
    if foreign {
        let text = "A VMI of the same name exists that does not belong to this VM; delete it or rename the VM.";
        let told = Condition::new(conditions::FAILURE, true).because("VMINameTaken", text);
        condition::set(&mut status.conditions, told, &now);
    } else if status.conditions.iter().any(|held| held.reason.as_deref() == Some("VMINameTaken")) {
        condition::remove(&mut status.conditions, conditions::FAILURE);
    }
}

fn condition_exists(conditions: &[Condition], type_: &str) -> bool {
    condition::find(conditions, type_).is_some()
}

/// What `kubectl get vm` shows; the first that applies.
fn printable(
    vm: &VirtualMachine,
    vmi: Option<&VirtualMachineInstance>,
    starting: bool,
    view: &View<'_>,
) -> PrintableStatus {
    if vm.is_deleting() {
        return PrintableStatus::Terminating;
    }
    let Some(vmi) = vmi else {
        let retrying = vm.status.start_failure.is_some() && wish(vm, None) == Wish::Start;
        return match (starting, retrying) {
            (true, _) => PrintableStatus::Starting,
            (false, true) => PrintableStatus::CrashLoopBackOff,
            _ => PrintableStatus::Stopped,
        };
    };
    let synchronized = vmi.condition(conditions::SYNCHRONIZED).filter(|condition| condition.is_false());
    let trouble = synchronized.and_then(|condition| condition.reason.as_deref());
    let unplaced = vmi
        .condition(conditions::POD_SCHEDULED)
        .is_some_and(|condition| condition.is_false() && condition.reason.as_deref() == Some(placement::UNSCHEDULABLE));
    if vmi.is_deleting() && !vmi.is_final() {
        return PrintableStatus::Stopping;
    }
    if vmi.is_migrating() {
        return PrintableStatus::Migrating;
    }
    if condition::is_true(&vmi.status.conditions, conditions::PAUSED) {
        return PrintableStatus::Paused;
    }
    match vmi.status.phase {
        VmiPhase::Running => PrintableStatus::Running,
        VmiPhase::Succeeded | VmiPhase::Failed if vm.status.start_failure.is_some() => {
            PrintableStatus::CrashLoopBackOff
        }
        VmiPhase::Succeeded | VmiPhase::Failed => PrintableStatus::Stopped,
        _ if trouble == Some("FailedPvcNotFound") => PrintableStatus::ErrorPvcNotFound,
        _ if waits_for_binding(vmi, view) && !unplaced => PrintableStatus::WaitingForVolumeBinding,
        _ if unplaced => PrintableStatus::ErrorUnschedulable,
        VmiPhase::Unset | VmiPhase::Pending | VmiPhase::Scheduling | VmiPhase::Scheduled => match trouble {
            Some("ErrImagePull") => PrintableStatus::ErrImagePull,
            Some("ImagePullBackOff") => PrintableStatus::ImagePullBackOff,
            _ => PrintableStatus::Starting,
        },
        _ => PrintableStatus::Unknown,
    }
}

fn waits_for_binding(vmi: &VirtualMachineInstance, view: &View<'_>) -> bool {
    let cold = vmi.spec.volumes.iter().filter(|volume| !volume.is_hotpluggable());
    cold.filter_map(|volume| volume.persistent_volume_claim.as_ref()).any(|claim| {
        let claim = view.world.claims.get(&Name::new(vmi.namespace(), claim.claim_name.as_str()));
        claim.is_some_and(|claim| !crate::volumes::is_bound(claim))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_grows_and_is_capped() {
        let seconds: Vec<i64> = [1, 2, 3, 5, 6, 1_000_000].iter().map(|n| back_off(*n).as_secs()).collect();
        assert_eq!(seconds, [10, 40, 90, 250, 300, 300]);
    }
}
