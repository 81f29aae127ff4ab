//! VMIs: from the wish for a running guest to its launcher pod, and what the pod's life means for the VMI.
//!
//! The controller drives a VMI up to `Scheduled`; from then on the handler of its node says what the guest does. What the
//! controller still does later: it notices that the launcher pod is gone, keeps conditions in step with the pod, removes
//! pods that a migration has left behind, and takes everything away when the VMI is deleted.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use godwit_api::names::conditions::{self, ready};
use godwit_api::names::events::{self, reason};
use godwit_api::subresources::place;
use godwit_api::vmi::{MemoryStatus, VmiPhaseTransitionTimestamp};
use godwit_api::{Condition, Quantity, VirtualMachineInstance, VmiPhase, condition};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::fence;
use crate::hotplug;
use crate::launcher_pod::{self, Role};
use crate::migration;
use crate::names;
use crate::object::{Name, Stored};
use crate::persistent_state;
use crate::placement;
use crate::plan::{EventType, Plan, VM_CONTROLLER, View, later};
use crate::quota;
use crate::volume_update;
use crate::volumes;
use crate::workloads;
use crate::world::{World, vmi_of_pod};

/// When the source pod of a handed-over migration ends, its guest may already run at the target: the handlers have this
/// long to say so before the VMI counts as lost. It counts only while the target's node can be reached.
const HAND_OVER_GRACE: SignedDuration = SignedDuration::from_secs(60);
/// The target's handler has this long to end a target that is not needed any more.
const ABANDON_LIMIT: SignedDuration = SignedDuration::from_secs(15);
/// `Ready` is `False` with this reason when the launcher pod has ended.
const POD_ENDED: (&str, &str) = ("PodCompleted", "virt-launcher pod has terminated");

/// Why Kubernetes' kubelet says that a pod is not ready whose containers are.
const GATES_SHUT: &str = "ReadinessGatesNotReady";

/// [`place::pod_name`]: the name of the pod that holds the guest, or shall hold it.
pub fn current_pod_name(vmi: &VirtualMachineInstance) -> String {
    place::pod_name(vmi)
}

/// The pod of [`current_pod_name`], if there is one.
pub fn current_pod<'a>(vmi: &VirtualMachineInstance, world: &'a World) -> Option<&'a Arc<Pod>> {
    let pod = world.pods.get(&Name::new(vmi.namespace(), current_pod_name(vmi)))?;
    (pod.label(names::LABEL_CREATED_BY) == Some(vmi.uid())).then_some(pod)
}

/// Decides about one VMI.
pub fn decide(name: &Name, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let Some(vmi) = view.world.vmis.get(name) else {
        remove_orphans(name, view.world, &mut plan);
        return plan;
    };
    let mut after = vmi.as_ref().clone();
    let mut events = Plan::nothing();
    if vmi.is_deleting() {
        take_down(vmi, &mut after, view, &mut plan);
    } else if vmi.is_final() {
        end_pods(vmi, view.world, &mut plan);
        hotplug::release(vmi, view, &mut plan, &mut events);
    } else {
        drive(vmi, &mut after, view, &mut plan, &mut events);
        hotplug::decide(vmi, &mut after, view, &mut plan, &mut events);
        sweep(vmi, view, &mut plan);
        mark_pods(vmi, view, &mut plan);
    }
    unlabel(&mut after, view.world);
    let outdated = workloads::is_outdated(&after, view);
    if outdated != workloads::is_labelled(vmi) {
        workloads::label(&mut after, outdated);
    }
    mirror(&mut after, view);
    persistent_state::show(&mut after, view.world);
    if after.status.phase != vmi.status.phase {
        note_phase(&mut after, view.now);
    }
    plan.update(vmi.as_ref(), &after);
    plan.effects.append(&mut events.effects);
    plan
}

fn note_phase(vmi: &mut VirtualMachineInstance, now: Timestamp) {
    let status = &mut vmi.status;
    if !status.phase_transition_timestamps.iter().any(|entry| entry.phase == status.phase) {
        status.phase_transition_timestamps.push(VmiPhaseTransitionTimestamp {
            phase: status.phase.clone(),
            phase_transition_timestamp: Some(Time(now)),
        });
    }
}

/// Moves the phase on.
fn drive(
    vmi: &Arc<VirtualMachineInstance>,
    after: &mut VirtualMachineInstance,
    view: &View<'_>,
    plan: &mut Plan,
    events: &mut Plan,
) {
    let now = Time(view.now);
    let pod = current_pod(vmi, view.world);
    match (&vmi.status.phase, pod) {
        (VmiPhase::Unset | VmiPhase::Pending, None) => {
            after.status.phase = VmiPhase::Pending;
            start(vmi, after, view, plan, events);
        }
        (VmiPhase::Unset | VmiPhase::Pending, Some(_)) => after.status.phase = VmiPhase::Scheduling,
        (VmiPhase::Scheduling | VmiPhase::Scheduled | VmiPhase::Running | VmiPhase::Unknown, None) => {
            lose(vmi, after, VmiPhase::Failed, ready::POD_NOT_EXISTS, view, plan, events);
        }
        (_, Some(pod)) if placement::is_finished(pod) => {
            let ended_well = pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Succeeded");
            let ran = vmi.status.phase == VmiPhase::Running;
            let phase = if ended_well && ran { VmiPhase::Succeeded } else { VmiPhase::Failed };
            lose(vmi, after, phase, POD_ENDED, view, plan, events);
        }
        (VmiPhase::Scheduling, Some(pod)) => {
            if migration::is_ready(pod)
                && let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone())
            {
                after.metadata.labels.get_or_insert_default().insert(names::LABEL_NODE_NAME.to_owned(), node.clone());
                after.status.node_name = Some(node);
                after.status.phase = VmiPhase::Scheduled;
            }
            match trouble(pod).or_else(|| left_behind(vmi, pod, view.world)) {
                Some((reason, message)) => {
                    let told = Condition::new(conditions::SYNCHRONIZED, false).because(&reason, message.clone());
                    if condition::set(&mut after.status.conditions, told, &now) {
                        events.record(vmi.as_ref(), VM_CONTROLLER, EventType::Warning, reason, message);
                    }
                }
                None => {
                    condition::remove(&mut after.status.conditions, conditions::SYNCHRONIZED);
                }
            }
        }
        (_, Some(pod)) => tell_of_silence(vmi, after, pod, view),
        _ => {}
    }
}

/// A guest on a node that cannot be reached is not given up before it is known to have ended; the VMI says what that waits for.
fn tell_of_silence(vmi: &VirtualMachineInstance, after: &mut VirtualMachineInstance, pod: &Pod, view: &View<'_>) {
    let told = vmi.condition(conditions::SYNCHRONIZED);
    let ours = told.is_some_and(|told| told.reason.as_deref() == Some(names::REASON_NODE_UNRESPONSIVE));
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
    let silent = view.world.nodes.get(&Name::cluster(node)).is_some_and(|node| crate::node::is_silent(node));
    if silent && !fence::is_lost(node, view.world) && (ours || told.is_none()) {
        let why = fence::waits_for(node, pod.name(), view.world);
        let condition = Condition::new(conditions::SYNCHRONIZED, false).because(names::REASON_NODE_UNRESPONSIVE, why);
        condition::set(&mut after.status.conditions, condition, &Time(view.now));
    } else if ours && !silent {
        condition::remove(&mut after.status.conditions, conditions::SYNCHRONIZED);
    }
}

/// That a pod finds no node because a volume of its guest is on a lost one.
fn left_behind(vmi: &VirtualMachineInstance, pod: &Pod, world: &World) -> Option<(String, String)> {
    if !migration::is_unschedulable(pod) {
        return None;
    }
    let claims = vmi.spec.volumes.iter().filter_map(|volume| volume.persistent_volume_claim.as_ref());
    let (claim, node) = claims.into_iter().find_map(|claim| {
        let claim = claim.claim_name.as_str();
        let node = volumes::only_node(world.claims.get(&Name::new(vmi.namespace(), claim))?, world)?;
        fence::is_lost(node, world).then_some((claim, node))
    })?;
    let message = format!(
        "PVC {claim} is on node {node} alone, which is lost: the VMI starts when that node is back, or when the claim is \
         replaced by one with a copy of its data"
    );
    Some((names::REASON_NODE_UNRESPONSIVE.to_owned(), message))
}

/// Makes the launcher pod, unless something stands in the way.
fn start(
    vmi: &Arc<VirtualMachineInstance>,
    after: &mut VirtualMachineInstance,
    view: &View<'_>,
    plan: &mut Plan,
    events: &mut Plan,
) {
    // Never a second pod that starts the guest while a migration may be bringing it somewhere.
    let migrating = vmi.status.migration_state.as_ref().is_some_and(migration::is_unresolved);
    if migrating || view.world.pods_of_vmi(vmi.uid()).any(|pod| !placement::is_finished(pod)) {
        return;
    }
    let cold = vmi.spec.volumes.iter().filter(|volume| !volume.is_hotpluggable());
    let claims = cold.filter_map(|volume| volume.persistent_volume_claim.as_ref());
    let missing = claims
        .map(|claim| Name::new(vmi.namespace(), claim.claim_name.as_str()))
        .find(|claim| view.world.claims.get(claim).is_none());
    if let Some(claim) = missing {
        let message = format!("PVC {claim} does not exist, waiting for it to appear");
        let told = Condition::new(conditions::SYNCHRONIZED, false).because("FailedPvcNotFound", message.clone());
        if condition::set(&mut after.status.conditions, told, &Time(view.now)) {
            events.record(vmi.as_ref(), VM_CONTROLLER, EventType::Warning, "FailedPvcNotFound", message);
        }
        return;
    }
    // Which claim has its state is known soon: the migration's last decision says so.
    if persistent_state::is_undecided(vmi, view) {
        return;
    }
    let mut claims = Plan::nothing();
    if let Err(why) = persistent_state::provide(vmi, Role::Start, view, &mut claims) {
        let told = Condition::new(conditions::SYNCHRONIZED, false).because("FailedBackendStorageCreate", why);
        if condition::set(&mut after.status.conditions, told, &Time(view.now)) {
            events.record(vmi.as_ref(), VM_CONTROLLER, EventType::Warning, "FailedBackendStorageCreate", why);
        }
        return;
    }
    let pod = launcher_pod::build(vmi, Role::Start, view);
    if let Some(refusal) = quota::exceeded(&pod, view.world) {
        let message = format!("failed to create virtual machine pod: {refusal}");
        let told = Condition::new(conditions::SYNCHRONIZED, false).because(reason::FAILED_CREATE, message);
        if condition::set(&mut after.status.conditions, told, &Time(view.now)) {
            let text = events::failed_to_create_pod(&refusal);
            events.record(vmi.as_ref(), VM_CONTROLLER, EventType::Warning, reason::FAILED_CREATE, text);
        }
        // It is looked at again when a quota of its namespace changes.
        return;
    }
    condition::remove(&mut after.status.conditions, conditions::SYNCHRONIZED);
    events.record(
        vmi.as_ref(),
        VM_CONTROLLER,
        EventType::Normal,
        reason::SUCCESSFUL_CREATE,
        events::created_pod(pod.name()),
    );
    plan.effects.append(&mut claims.effects);
    plan.create(pod);
}

/// The launcher pod is gone or has ended, and the handler has not said that the guest has ended.
fn lose(
    vmi: &Arc<VirtualMachineInstance>,
    after: &mut VirtualMachineInstance,
    mut phase: VmiPhase,
    why: (&str, &str),
    view: &View<'_>,
    plan: &mut Plan,
    events: &mut Plan,
) {
    let told = vmi.condition(conditions::READY).filter(|told| told.reason.as_deref() == Some(why.0));
    let since = told.and_then(|told| told.last_transition_time.as_ref()).map_or(view.now, |time| time.0);
    match at_target(vmi, view) {
        AtTarget::No => {}
        // It has left the pod that ended well; what happened to the pod where it went is what happened to it.
        AtTarget::Ended => phase = VmiPhase::Failed,
        AtTarget::Yes => return,
        AtTarget::OutOfReach => return plan.wake(view.now + crate::node::LOOK_AGAIN),
        AtTarget::Perhaps { reachable_since } => {
            let end = later(since.max(reachable_since), HAND_OVER_GRACE);
            if view.now < end {
                plan.wake(end);
                let mut told = Condition::new(conditions::READY, false).because(why.0, why.1);
                // This time is the beginning of the grace period: it counts from now, not from an earlier "not ready".
                told.last_transition_time = Some(Time(since));
                condition::remove(&mut after.status.conditions, conditions::READY);
                after.status.conditions.push(told);
                return;
            }
        }
    }
    let node = vmi.status.node_name.as_deref().unwrap_or_default();
    let lost = || crate::node::is_lost(node, view) || fence::is_lost(node, view.world);
    if !node.is_empty() && phase == VmiPhase::Failed && lost() {
        after.status.reason = Some(names::REASON_NODE_UNRESPONSIVE.to_owned());
        let text = events::vmi_node_unresponsive(node);
        events.record(vmi.as_ref(), crate::NODE_CONTROLLER, EventType::Normal, reason::NODE_UNRESPONSIVE, text);
    }
    after.status.phase = phase;
}

/// Whether a guest that is not at the source any more may be at the target of its migration.
enum AtTarget {
    /// There is no target, or it has ended.
    No,
    /// It was handed over to a target that has failed since, or is gone.
    Ended,
    /// The source's handler says so; the target's has yet to.
    Yes,
    /// Only the target's node knows, and it cannot be reached: what runs there is not to be ended meanwhile.
    OutOfReach,
    /// Its handler has not said so, and could have since then.
    Perhaps { reachable_since: Timestamp },
}

fn at_target(vmi: &VirtualMachineInstance, view: &View<'_>) -> AtTarget {
    let Some(state) = vmi.status.migration_state.as_ref().filter(|_| !vmi.has_arrived()) else {
        return AtTarget::No;
    };
    let arrives = state.completed == Some(true) && state.failed != Some(true);
    if !arrives && !migration::is_unresolved(state) {
        return AtTarget::No;
    }
    let target = state.target_pod.as_deref().and_then(|pod| view.world.pods.get(&Name::new(vmi.namespace(), pod)));
    let ended_well =
        target.and_then(|pod| pod.status.as_ref()).is_some_and(|status| status.phase.as_deref() == Some("Succeeded"));
    if target.is_none_or(|pod| pod.deleting() || placement::is_finished(pod)) {
        return if arrives && !ended_well { AtTarget::Ended } else { AtTarget::No };
    }
    if arrives {
        return AtTarget::Yes;
    }
    let node = state.target_node.as_deref().and_then(|node| view.world.nodes.get(&Name::cluster(node)));
    match node {
        Some(node) if crate::node::is_silent(node) => AtTarget::OutOfReach,
        _ => {
            let since = node.and_then(|node| crate::node::reachable_since(node));
            AtTarget::Perhaps { reachable_since: since.unwrap_or(Timestamp::MIN) }
        }
    }
}

/// What keeps the pod from starting, as the kubelet says it.
fn trouble(pod: &Pod) -> Option<(String, String)> {
    let status = pod.status.as_ref()?;
    let containers = status.init_container_statuses.iter().chain(status.container_statuses.iter()).flatten();
    let waiting = containers
        .filter_map(|container| container.state.as_ref()?.waiting.as_ref())
        .find(|waiting| !matches!(waiting.reason.as_deref(), None | Some("ContainerCreating" | "PodInitializing")))?;
    Some((waiting.reason.clone().unwrap_or_default(), waiting.message.clone().unwrap_or_default()))
}

/// The VMI is being deleted: end its pods, and let it go when they are gone.
fn take_down(vmi: &Arc<VirtualMachineInstance>, after: &mut VirtualMachineInstance, view: &View<'_>, plan: &mut Plan) {
    let mut remaining = 0;
    for pod in view.world.pods_of_vmi(vmi.uid()) {
        remaining += 1;
        if !pod.deleting() {
            plan.delete(pod.as_ref());
        }
    }
    if remaining > 0 {
        return;
    }
    if !vmi.is_final() {
        after.status.phase = VmiPhase::Succeeded;
    }
    // What its VM has yet to learn of it goes first.
    if volume_update::is_to_be_concluded(vmi, view) {
        return;
    }
    if let Some(finalizers) = &mut after.metadata.finalizers {
        finalizers.retain(|finalizer| finalizer != names::FINALIZER_VMI);
        if finalizers.is_empty() {
            after.metadata.finalizers = None;
        }
    }
}

/// The guest has ended: so do pods that still run.
fn end_pods(vmi: &VirtualMachineInstance, world: &World, plan: &mut Plan) {
    for pod in world.pods_of_vmi(vmi.uid()).filter(|pod| !pod.deleting() && !placement::is_finished(pod)) {
        plan.delete(pod.as_ref());
    }
}

/// Removes the pods that finished migrations have left behind: where the guest came from, where it never went. A controller that
/// is behind may have made one for a migration that is over.
fn sweep(vmi: &VirtualMachineInstance, view: &View<'_>, plan: &mut Plan) {
    let state = vmi.status.migration_state.as_ref();
    // As long as it is not plain where the guest lives, nothing is removed. Without a hand-over it is.
    if let Some(state) = state.filter(|state| state.migration_uid.as_deref().is_some_and(|uid| !uid.is_empty())) {
        let succeeded = state.failed != Some(true);
        if migration::is_unresolved(state) || (succeeded && !vmi.has_arrived()) {
            return;
        }
    }
    let Some(current) = current_pod(vmi, view.world).map(|pod| pod.uid().to_owned()) else { return };
    let name = vmi.key();
    for pod in view.world.pods_of_vmi(vmi.uid()) {
        let awaited = pod.label(names::LABEL_MIGRATION_JOB_UID).is_some_and(|uid| {
            view.world.migrations_of(&name).any(|migration| migration.uid() == uid && !migration.is_final())
        });
        if !pod.deleting() && !awaited && pod.uid() != current {
            match quits_by_itself_until(vmi, pod, view.now) {
                Some(end) => plan.wake(end),
                None => plan.delete(pod.as_ref()),
            }
        }
    }
}

/// Tells others, on the launcher pods, what they have to know of the VMI.
fn mark_pods(vmi: &VirtualMachineInstance, view: &View<'_>, plan: &mut Plan) {
    let current = current_pod_name(vmi);
    for pod in view.world.pods_of_vmi(vmi.uid()).filter(|pod| !pod.deleting() && !placement::is_finished(pod)) {
        let mut after = Cow::Borrowed(pod.as_ref());
        name_node(&mut after);
        announce_arrival(vmi, &mut after);
        // One write at a time: the conditions are also the kubelet's, so theirs must be made on the state that was read.
        if pod.name() == current && matches!(after, Cow::Borrowed(_)) {
            open_gate(vmi, view.now, &mut after);
        }
        if let Cow::Owned(after) = &after {
            plan.update(pod.as_ref(), after);
        }
    }
}

/// KubeVirt's selectors find launcher pods by their node.
fn name_node(pod: &mut Cow<'_, Pod>) {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
    if !node.is_empty() && pod.label(names::LABEL_NODE_NAME) != Some(node.as_str()) {
        pod.to_mut().metadata.labels.get_or_insert_default().insert(names::LABEL_NODE_NAME.to_owned(), node);
    }
}

/// Tells the target pod when the guest began to run in it: networks that carry addresses over wait for this (KubeVirt's
/// contract with them).
fn announce_arrival(vmi: &VirtualMachineInstance, pod: &mut Cow<'_, Pod>) {
    let Some(state) = &vmi.status.migration_state else { return };
    let Some(ready) = &state.target_node_domain_ready_timestamp else { return };
    if state.target_pod.as_deref() == Some(pod.name())
        && pod.annotation(names::ANNOTATION_MIGRATION_TARGET_READY).is_none()
    {
        let annotations = pod.to_mut().metadata.annotations.get_or_insert_default();
        annotations.insert(names::ANNOTATION_MIGRATION_TARGET_READY.to_owned(), ready.0.to_string());
    }
}

/// The readiness gate of the pod that holds the guest: services do not send anybody to a guest that is paused, nor to a pod
/// that it has not come to yet. KubeVirt's condition, with its texts.
fn open_gate(vmi: &VirtualMachineInstance, now: Timestamp, pod: &mut Cow<'_, Pod>) {
    if vmi.status.phase != VmiPhase::Running {
        return;
    }
    let (status, reason, message) = match is_paused(vmi) {
        true => ("False", "Paused", "the virtual machine is paused"),
        false => ("True", "NotPaused", "the virtual machine is not paused"),
    };
    if pod_condition(pod, names::READINESS_GATE_UNPAUSED).is_some_and(|told| told.status == status) {
        return;
    }
    let conditions = pod.to_mut().status.get_or_insert_default().conditions.get_or_insert_default();
    conditions.retain(|one| one.type_ != names::READINESS_GATE_UNPAUSED);
    conditions.push(PodCondition {
        type_: names::READINESS_GATE_UNPAUSED.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_transition_time: Some(Time(now)),
        ..PodCondition::default()
    });
}

fn is_paused(vmi: &VirtualMachineInstance) -> bool {
    condition::is_true(&vmi.status.conditions, conditions::PAUSED)
}

/// Takes the target's label away when the guest is not on its way any more, and no migration is left that would do it.
fn unlabel(vmi: &mut VirtualMachineInstance, world: &World) {
    if vmi.label(names::LABEL_MIGRATION_TARGET_NODE_NAME).is_none() {
        return;
    }
    let uid = vmi.status.migration_state.as_ref().and_then(|state| state.migration_uid.as_deref());
    let settled = vmi.status.migration_state.as_ref().is_none_or(|state| {
        let arrived = state.failed == Some(true) || vmi.has_arrived();
        uid.is_none_or(str::is_empty) || state.completed == Some(true) && arrived
    });
    let cared_for =
        |world: &World| world.migrations_of(&vmi.key()).any(|one| Some(one.uid()) == uid && !one.is_final());
    if settled
        && !cared_for(world)
        && let Some(labels) = &mut vmi.metadata.labels
    {
        labels.remove(names::LABEL_MIGRATION_TARGET_NODE_NAME);
    }
}

/// The target pod of a failed migration that was handed over is ended by its handler, which knows better than anybody
/// whether the guest may have arrived after all. Only when that has not happened for a while is the pod removed from here.
pub fn quits_by_itself_until(vmi: &VirtualMachineInstance, pod: &Pod, now: Timestamp) -> Option<Timestamp> {
    let state = vmi.status.migration_state.as_ref().filter(|state| state.failed == Some(true))?;
    if vmi.is_final() || placement::is_finished(pod) || state.target_pod.as_deref() != Some(pod.name()) {
        return None;
    }
    let end = state.end_timestamp.as_ref()?.0.checked_add(ABANDON_LIMIT).ok()?;
    (now < end).then_some(end)
}

/// Launcher pods whose VMI is gone for good.
fn remove_orphans(name: &Name, world: &World, plan: &mut Plan) {
    let launchers = world.pods_of_guest(name).filter(|pod| vmi_of_pod(pod).is_some());
    let attachments = world.pods_of_guest(name).filter(|pod| hotplug::vmi_of_attachment(pod).is_some());
    for pod in launchers.chain(attachments).filter(|pod| !pod.deleting()) {
        plan.delete(pod.as_ref());
    }
}

/// Keeps `activePods`, `Ready` and `PodScheduled` in step with the pods.
fn mirror(vmi: &mut VirtualMachineInstance, view: &View<'_>) {
    let now = Time(view.now);
    let active: BTreeMap<String, String> = view
        .world
        .pods_of_vmi(vmi.uid())
        .filter(|pod| !placement::is_finished(pod))
        .map(|pod| {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
            (pod.uid().to_owned(), node)
        })
        .collect();
    vmi.status.active_pods = active;

    let pod = current_pod(vmi, view.world);
    if let Some(pod) = pod {
        let status = pod.status.as_ref();
        vmi.status.qos_class = status.and_then(|status| status.qos_class.clone()).or(vmi.status.qos_class.take());
        let image = pod.spec.as_ref().and_then(|spec| spec.containers.first()).and_then(|one| one.image.clone());
        vmi.status.launcher_container_image_version = image;
        match pod_condition(pod, conditions::POD_SCHEDULED).filter(|scheduled| scheduled.status != "True") {
            Some(scheduled) => {
                let told = copy(conditions::POD_SCHEDULED, scheduled);
                condition::set(&mut vmi.status.conditions, told, &now);
            }
            None => {
                condition::remove(&mut vmi.status.conditions, conditions::POD_SCHEDULED);
            }
        }
    }
    memory(vmi);
    let not = |why: (&str, &str)| Condition::new(conditions::READY, false).because(why.0, why.1);
    let told = match pod {
        None => not(ready::POD_NOT_EXISTS),
        Some(pod) if placement::is_finished(pod) => not(POD_ENDED),
        Some(pod) if pod.deleting() => not(ready::POD_TERMINATING),
        Some(_) if vmi.status.phase != VmiPhase::Running => not(ready::GUEST_NOT_RUNNING),
        Some(pod) => match pod_condition(pod, conditions::READY) {
            // The gate of a pod that the guest has just come to opens in a moment; nobody has to be told of that moment.
            Some(ready) if ready.reason.as_deref() == Some(GATES_SHUT) && !is_paused(vmi) => {
                Condition::new(conditions::READY, true)
            }
            Some(ready) => copy(conditions::READY, ready),
            None => not(ready::POD_CONDITION_MISSING),
        },
    };
    condition::set(&mut vmi.status.conditions, told, &now);
}

/// Says how much memory the guest has, and its launcher beside it.
fn memory(vmi: &mut VirtualMachineInstance) {
    let guest = u64::try_from(launcher_pod::guest_memory(&vmi.spec)).unwrap_or(0);
    if guest == 0 || vmi.status.node_name.as_deref().unwrap_or_default().is_empty() {
        return;
    }
    let overhead = launcher_pod::overhead(&vmi.spec);
    let state = vmi.status.migration_state.as_ref();
    let arrived =
        state.filter(|state| state.completed == Some(true) && state.failed != Some(true) && vmi.has_arrived());
    let arrived = arrived.and_then(|state| state.target_memory_overhead.clone());
    let memory = vmi.status.memory.get_or_insert_with(|| {
        let guest = Some(Quantity::from_bytes(guest));
        let overhead = u64::try_from(overhead).ok().map(Quantity::from_bytes);
        MemoryStatus {
            guest_at_boot: guest.clone(),
            guest_current: guest.clone(),
            guest_requested: guest,
            memory_overhead: overhead,
        }
    });
    // The pod that it has moved to may have been made with another overhead.
    memory.memory_overhead = arrived.or(memory.memory_overhead.take());
}

fn pod_condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == type_)
}

fn copy(type_: &str, from: &PodCondition) -> Condition {
    Condition {
        type_: type_.to_owned(),
        status: from.status.clone(),
        reason: from.reason.clone(),
        message: from.message.clone(),
        ..Condition::default()
    }
}
