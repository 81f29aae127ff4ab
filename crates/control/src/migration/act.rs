//! Carries out the actions of the table.

use godwit_api::migration::VirtualMachineInstanceMigration;
use godwit_api::names::FINISHED_MIGRATIONS_KEPT;
use godwit_api::names::events::{self, reason};
use godwit_api::vmi::{
    AbortStatus, MigrationSourceState, MigrationTargetState, VirtualMachineInstanceMigrationState as State,
};
use godwit_api::{MigrationPhase as Phase, Quantity, VirtualMachineInstance, config};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::observe::Situation;
use super::table::{Action, Blame, Fact};
use super::{explain, mirror};
use crate::launcher_pod::{self, Role};
use crate::object::{Name, Stored};
use crate::plan::{EventType, Plan, VM_CONTROLLER};
use crate::{evacuation, history, hotplug, migration_network, names, persistent_state, vmi};

/// Carries out one action: writes to other objects go into `plan`, to the migration itself into `after`, events (which
/// come last, when everything has been written) into `tell`.
pub fn carry_out(
    action: Action,
    fact: Fact,
    situation: &Situation<'_>,
    after: &mut VirtualMachineInstanceMigration,
    plan: &mut Plan,
    tell: &mut Plan,
) {
    let migration = situation.migration.as_ref();
    let normal = EventType::Normal;
    match action {
        Action::NoteSourcePod => {
            let pod = situation.vmi.and_then(|vmi| vmi::current_pod(vmi, situation.view.world));
            let source_pod = pod.map(|pod| pod.name().to_owned());
            after.status.migration_state = Some(State { source_pod, ..State::default() });
        }
        Action::CreateTargetPod => {
            let Some(vmi) = situation.vmi else { return };
            let pod = launcher_pod::build(vmi, Role::Receive(migration), &situation.view);
            tell.record(
                migration,
                VM_CONTROLLER,
                normal,
                reason::SUCCESSFUL_CREATE,
                events::created_target_pod(pod.name()),
            );
            plan.create(pod);
            let class = persistent_state::provide(vmi, Role::Receive(migration), &situation.view, plan);
            if let Err(why) = class {
                // The pod waits for its claim, and says so until its time is over.
                tell.record(migration, VM_CONTROLLER, EventType::Warning, "FailedBackendStorageCreate", why);
            }
        }
        Action::DeleteTargetPod | Action::GiveUpTargetPod => {
            let Some(pod) = situation.pod.filter(|pod| !pod.deleting()) else { return };
            plan.delete(pod.as_ref());
            let text = match fact {
                Fact::Cancelled => events::deleted_canceled_pod(pod.namespace(), pod.name()),
                Fact::TargetPodUnschedulableTooLong => events::deleted_unschedulable_pod(pod.namespace(), pod.name()),
                Fact::TargetPodPendingTooLong => events::deleted_pending_pod(pod.namespace(), pod.name()),
                _ => return,
            };
            tell.record(migration, VM_CONTROLLER, normal, reason::SUCCESSFUL_DELETE, text);
        }
        Action::HandOver => hand_over(situation, plan),
        Action::FailOnVmi => fail_on_vmi(fact, situation, plan, tell),
        Action::RequestAbort => {
            let Some(vmi) = situation.vmi else { return };
            let mut told = vmi.as_ref().clone();
            told.status.migration_state.get_or_insert_default().abort_requested = Some(true);
            plan.update(vmi.as_ref(), &told);
        }
        Action::NoteLateAbort => {
            let Some(vmi) = situation.vmi else { return };
            let mut told = vmi.as_ref().clone();
            let state = told.status.migration_state.get_or_insert_default();
            state.abort_requested = Some(true);
            state.abort_status = Some(AbortStatus::Failed);
            after.status.migration_state = Some(state.clone());
            plan.update(vmi.as_ref(), &told);
        }
        Action::WarnUnschedulable => {
            if migration.status.reason.as_deref() != Some(fact.word().as_str()) {
                let text = events::target_pod_unschedulable(migration.namespace(), migration.vmi_name());
                let reason = reason::MIGRATION_TARGET_POD_UNSCHEDULABLE;
                tell.record(migration, VM_CONTROLLER, EventType::Warning, reason, text);
            }
        }
        Action::WarnVmi(reason, text) => {
            let Some(vmi) = situation.vmi else { return };
            tell.record(vmi.as_ref(), VM_CONTROLLER, EventType::Warning, reason, text);
        }
        Action::Tell(type_, reason, text) => tell.record(migration, VM_CONTROLLER, type_, reason, text),
    }
}

fn hand_over(situation: &Situation<'_>, plan: &mut Plan) {
    let (Some(vmi), Some(pod)) = (situation.vmi, situation.pod) else { return };
    let uid = Some(situation.migration.uid().to_owned());
    let source_node = vmi.status.node_name.clone();
    let source_pod = vmi::current_pod(vmi, situation.view.world).map(|pod| pod.name().to_owned());
    let target_node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let target_pod = Some(pod.name().to_owned());
    let network = migration_network::between(source_node.as_deref(), target_node.as_deref(), situation.view.world);
    let (domain_name, domain_namespace) = (Some(Stored::name(vmi.as_ref()).to_owned()), vmi.metadata.namespace.clone());
    let overhead = launcher_pod::overhead(&vmi.spec);
    let world = situation.view.world;
    let state_from = persistent_state::claim_name(vmi, Role::Start, world);
    let state_to = persistent_state::claim_name(vmi, Role::Receive(situation.migration), world);
    let Ok(attachment) = hotplug::for_target(vmi, pod, situation.view.world) else { return };
    let attachment = attachment.map(|pod| pod.uid().to_owned());
    let mut told = vmi.as_ref().clone();
    told.status.migration_state = Some(State {
        target_attachment_pod_uid: attachment.clone(),
        migration_uid: uid.clone(),
        source_node: source_node.clone(),
        source_pod: source_pod.clone(),
        target_node: target_node.clone(),
        target_pod: target_pod.clone(),
        migration_policy_name: situation.policy.clone(),
        migration_configuration: Some(situation.configuration.clone()),
        migration_network_type: Some(network.to_owned()),
        source_state: Some(MigrationSourceState {
            node: source_node,
            pod: source_pod,
            migration_uid: uid.clone(),
            domain_name: domain_name.clone(),
            domain_namespace: domain_namespace.clone(),
            virtual_machine_instance_uid: vmi.metadata.uid.clone(),
            persistent_state_pvc_name: state_from.clone(),
            ..MigrationSourceState::default()
        }),
        target_state: Some(MigrationTargetState {
            attachment_pod_uid: attachment,
            node: target_node.clone(),
            pod: target_pod,
            migration_uid: uid,
            domain_name,
            domain_namespace,
            virtual_machine_instance_uid: vmi.metadata.uid.clone(),
            persistent_state_pvc_name: state_to.clone(),
            ..MigrationTargetState::default()
        }),
        source_persistent_state_pvc_name: state_from,
        target_persistent_state_pvc_name: state_to,
        target_memory_overhead: u64::try_from(overhead).ok().map(Quantity::from_bytes),
        ..State::default()
    });
    let labels = told.metadata.labels.get_or_insert_default();
    labels.insert(names::LABEL_MIGRATION_TARGET_NODE_NAME.to_owned(), target_node.unwrap_or_default());
    plan.update(vmi.as_ref(), &told);
}

/// The bandwidth may be changed on the way: tells the VMI, from which the source's handler has it.
pub fn set_bandwidth(situation: &Situation<'_>, plan: &mut Plan) {
    let (Some(vmi), Some(state)) = (situation.vmi, situation.own_state()) else { return };
    let Some(told) = &state.migration_configuration else { return };
    let ended = state.completed == Some(true) || state.failed == Some(true);
    if ended || config::bandwidth_bytes(told) == config::bandwidth_bytes(&situation.configuration) {
        return;
    }
    let mut told = vmi.as_ref().clone();
    let configuration = told.status.migration_state.as_mut().and_then(|state| state.migration_configuration.as_mut());
    if let Some(configuration) = configuration {
        configuration.bandwidth_per_migration = situation.configuration.bandwidth_per_migration.clone();
        plan.update(vmi.as_ref(), &told);
    }
}

/// The source has not started (the write is refused if it has since): the migration can be failed from here.
fn fail_on_vmi(fact: Fact, situation: &Situation<'_>, plan: &mut Plan, tell: &mut Plan) {
    let Some(vmi) = situation.vmi else { return };
    let mut told = vmi.as_ref().clone();
    let state = told.status.migration_state.get_or_insert_default();
    state.failed = Some(true);
    state.completed = Some(true);
    state.end_timestamp = Some(Time(situation.view.now));
    // Whoever has cancelled it meanwhile gets an answer: the guest has stayed, whatever the end was due to.
    if state.abort_requested == Some(true) {
        state.abort_status = Some(AbortStatus::Succeeded);
    }
    state.failure_cause = match fact.blame() {
        Some(Blame::Cause(cause)) => Some(cause),
        Some(Blame::Reported) | None => state.failure_cause.take(),
    };
    let reason = match fact {
        Fact::TargetPodDown => names::FAILURE_TARGET_POD_DOWN.to_owned(),
        Fact::AbortBeforeStartUnanswered => {
            state.abort_status = Some(AbortStatus::Succeeded);
            names::FAILURE_ABORTED.to_owned()
        }
        other => explain::sentence(other, situation),
    };
    let text = if fact == Fact::TargetPodDown {
        events::migration_failed_target_pod_down(situation.migration.uid())
    } else {
        format!("VirtualMachineInstance migration uid {} failed. reason: {reason}", situation.migration.uid())
    };
    state.failure_reason = Some(reason);
    plan.update(vmi.as_ref(), &told);
    tell.record(vmi.as_ref(), VM_CONTROLLER, EventType::Warning, reason::FAILED_MIGRATION, text);
}

/// What is left to do when a migration is over.
pub fn finish(situation: &Situation<'_>, plan: &mut Plan) {
    let migration = situation.migration.as_ref();
    let mut after = migration.clone();

    mirror::take(&mut after, situation);
    after.status.fill_columns();
    // What is still told of it comes first, in a write of its own: only one write of a plan to an object is guarded by its
    // revision, and another controller may have more to tell.
    plan.update(migration, &after);
    if !plan.effects.is_empty() {
        return;
    }
    // What the finalizer holds it for: it is written down, and counted as an attempt.
    let held = migration.has_finalizer(names::FINALIZER_MIGRATION);
    let mut tell = Plan::nothing();
    if held {
        let from = situation.vmi.and_then(|vmi| vmi.status.node_name.as_deref());
        let to = situation.pod.and_then(|pod| pod.spec.as_ref()).and_then(|spec| spec.node_name.as_deref());
        history::write_down(&after, from, to, &situation.view, plan);
    }
    let labelled = |vmi: &VirtualMachineInstance| vmi.label(names::LABEL_MIGRATION_TARGET_NODE_NAME).is_some();
    if let Some(vmi) = situation.vmi.filter(|vmi| held || labelled(vmi)) {
        let mut told = vmi.as_ref().clone();
        if let Some(state) = situation.own_state() {
            unlabel(&mut told, state);
        }
        if held {
            evacuation::note_end(vmi, &mut told, migration, &situation.view, &mut tell);
        }
        plan.update(vmi.as_ref(), &told);
    }
    if migration.status.phase == Phase::Failed
        && let Some(pod) = situation.pod.filter(|pod| !pod.deleting())
        && may_drop(situation, pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()))
    {
        match situation.vmi.and_then(|vmi| vmi::quits_by_itself_until(vmi, pod, situation.view.now)) {
            Some(end) => plan.wake(end),
            None => plan.delete(pod.as_ref()),
        }
    }
    if held {
        let state = situation.own_state().or(after.status.migration_state.as_ref());
        // In post-copy a guest may have come there and be lost after it.
        let came = state.is_some_and(|state| state.target_node_domain_ready_timestamp.is_some());
        let arrived = came || migration.status.phase == Phase::Succeeded;
        let node = situation.pod.and_then(|pod| pod.spec.as_ref()).and_then(|spec| spec.node_name.as_deref());
        persistent_state::conclude(migration, arrived, may_drop(situation, node), &situation.view, plan);
    }
    if let Some(finalizers) = &mut after.metadata.finalizers {
        finalizers.retain(|finalizer| finalizer != names::FINALIZER_MIGRATION);
        if finalizers.is_empty() {
            after.metadata.finalizers = None;
        }
    }
    plan.update(migration, &after);
    plan.effects.append(&mut tell.effects);
    if !migration.is_deleting() {
        if situation.vmi.is_none() {
            plan.delete(migration);
        } else {
            collect_garbage(situation, plan);
        }
    }
}

/// Whether the target pod of a failed migration surely does not run the guest.
fn may_drop(situation: &Situation<'_>, pod_node: Option<&str>) -> bool {
    let Some(vmi) = situation.vmi else { return true };
    // On its own node the name of the pod tells.
    let current = situation.pod.is_none_or(|pod| vmi::current_pod_name(vmi) == pod.name());
    let lives_there = pod_node.is_some() && vmi.status.node_name.as_deref() == pod_node && current;
    let unresolved = situation.own_state().is_some_and(|state| state.failed != Some(true));
    vmi.is_final() || !(lives_there || unresolved)
}

/// The VMI is not on its way any more.
fn unlabel(vmi: &mut VirtualMachineInstance, state: &State) {
    let arrived = state.failed == Some(true) || vmi.has_arrived();
    if state.completed == Some(true)
        && arrived
        && let Some(labels) = &mut vmi.metadata.labels
    {
        labels.remove(names::LABEL_MIGRATION_TARGET_NODE_NAME);
    }
}

/// Keeps the newest few finished migrations of a VMI.
fn collect_garbage(situation: &Situation<'_>, plan: &mut Plan) {
    let migration = situation.migration.as_ref();
    let name = Name::new(migration.namespace(), migration.vmi_name());
    let mut finished: Vec<_> = situation.view.world.migrations_of(&name).filter(|other| other.is_final()).collect();
    finished.sort_by_key(|other| (other.metadata.creation_timestamp.clone(), other.key()));
    let surplus = finished.len().saturating_sub(FINISHED_MIGRATIONS_KEPT);
    // Each migration drops itself: the decision about one never fights with the decision about another.
    if finished.iter().take(surplus).any(|other| other.uid() == migration.uid()) {
        plan.delete(migration);
    }
}
