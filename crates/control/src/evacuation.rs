//! Evacuations: VMIs that are to leave their node are moved, again after a pause when it fails, and not for ever.
//!
//! A VMI is to leave when an eviction has marked it (`status.evacuationNodeName`, `api::admission::eviction`) or when its node
//! carries the drain taint. `VMI.status.evacuation` holds what has to outlive migrations and controllers: since when, the
//! attempt under way, how many have failed, and when the next may begin. One attempt is one migration, named before it is
//! made; a failed one is counted by [`count`] before its object may go, so that each counts once.

use std::collections::{BTreeSet, btree_set};
use std::sync::Arc;

use godwit_api::config::MAX_ATTEMPTS;
use godwit_api::migration::MigrationPriority;
use godwit_api::names::conditions::{self, EVACUATION_STOPPED, EVICTION_REQUESTED, EVICTION_REQUESTED_REASON};
use godwit_api::names::events::{self, reason};
use godwit_api::vmi::{EvacuationStatus, EvictionStrategy};
use godwit_api::{
    Condition, FailureCause, MigrationConfiguration, MigrationPhase, VirtualMachineInstance,
    VirtualMachineInstanceMigration, VmiPhase, condition,
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

use crate::object::{Name, Object, Stored};
use crate::plan::{EventType, Plan, VM_CONTROLLER, View, later};
use crate::world::{Change, World};
use crate::{kubevirt, maintenance, names, placement, turns};

/// The pause after the first failure; each further one doubles it (KubeVirt's).
const FIRST_PAUSE: SignedDuration = SignedDuration::from_secs(20);
/// The longest pause. With the default number of attempts it is never reached.
const LONGEST_PAUSE: SignedDuration = SignedDuration::from_hours(2);
/// The pause when the target's node was put into maintenance. A scheduler of somebody else's needs a moment to learn that it is closed.
const AFTER_CLOSED: SignedDuration = SignedDuration::from_secs(5);
/// The pause when no other node offers the guest's processor: nodes join and are upgraded.
const AFTER_NO_NODE: SignedDuration = SignedDuration::from_mins(1);
/// A migration that is named and not there was not made, or is not seen yet: it is tried again after this long.
const ASK_AGAIN: SignedDuration = SignedDuration::from_secs(10);
/// The reason of `EvacuationStopped` when there were attempts enough.
pub const ATTEMPTS_USED_UP: &str = "AttemptsUsedUp";
/// The reason of `EvacuationStopped` when the VMI cannot be migrated at all.
pub const NOT_LIVE_MIGRATABLE: &str = "NotLiveMigratable";

/// Why, and from where, a VMI is to leave.
struct Wish<'a> {
    node: &'a str,
    /// An eviction has marked it.
    marked: bool,
    /// The node takes no new pods: it is cordoned or being drained.
    closed: bool,
    /// The node carries the drain taint.
    drained: bool,
}

/// Whether a VMI is being evacuated or was asked to go, wherever it is.
pub fn is_touched(vmi: &VirtualMachineInstance) -> bool {
    vmi.status.evacuation_node_name.is_some()
        || vmi.status.evacuation.is_some()
        || vmi.condition(EVICTION_REQUESTED).is_some()
        || vmi.condition(EVACUATION_STOPPED).is_some()
}

/// Whether there may be something to decide about the evacuation of this VMI.
fn concerns(vmi: &VirtualMachineInstance, world: &World) -> bool {
    is_touched(vmi) || {
        let node = vmi.status.node_name.as_deref().and_then(|node| world.nodes.get(&Name::cluster(node)));
        node.is_some_and(|node| taints(node).next().is_some())
    }
}

/// All VMIs whose evacuation there may be something to decide about.
pub fn all(world: &World) -> btree_set::IntoIter<Name> {
    let closed = world.nodes.iter().filter(|node| taints(node).next().is_some());
    let there = closed.flat_map(|node| world.vmis_on(node.name()));
    world.vmis_to_evacuate().chain(there).map(|vmi| vmi.key()).collect::<BTreeSet<_>>().into_iter()
}

/// The VMIs whose evacuation a change touches.
pub fn affected(change: &Change, world: &World) -> btree_set::IntoIter<Name> {
    let maintained = change.latest().and_then(maintenance::node_of);
    let vmis: Vec<_> = match change.latest() {
        // Each guest's progress is written there.
        _ if maintained.is_some() && !maintenance::changes_turns(change) => Vec::new(),
        _ if maintained.is_some() => maintained.into_iter().flat_map(|node| world.vmis_on(node)).collect(),
        Some(Object::VirtualMachineInstance(vmi)) => vec![vmi],
        Some(Object::Migration(migration)) => {
            world.vmis.get(&Name::new(migration.namespace(), migration.vmi_name())).into_iter().collect()
        }
        Some(Object::Pod(pod)) => {
            pod.label(names::LABEL_CREATED_BY).and_then(|uid| world.vmi_by_uid(uid)).into_iter().collect()
        }
        Some(Object::Node(node)) if opens_or_closes(change) => world.vmis_on(node.name()).collect(),
        Some(Object::KubeVirt(_)) => return all(world),
        Some(Object::ConfigMap(map)) if map.name() == names::CONFIG_MAP_NAME => return all(world),
        _ => Vec::new(),
    };
    vmis.into_iter().filter(|vmi| concerns(vmi, world)).map(|vmi| vmi.key()).collect::<BTreeSet<_>>().into_iter()
}

/// The effects `NoSchedule` of a node's taints, by their keys.
fn taints(node: &Node) -> impl Iterator<Item = &str> {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    taints.into_iter().flatten().filter(|taint| taint.effect == "NoSchedule").map(|taint| taint.key.as_str())
}

/// Whether a change of a node may begin or end evacuations from it.
fn opens_or_closes(change: &Change) -> bool {
    let of = |side: &Option<Object>| match side {
        Some(Object::Node(node)) => (taints(node).map(str::to_owned).collect(), is_cordoned(node)),
        _ => (Vec::new(), false),
    };
    of(&change.before) != of(&change.after)
}

/// Whether somebody has closed the node.
pub(crate) fn is_cordoned(node: &Node) -> bool {
    node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true)
}

/// Whether the node carries the drain taint.
pub(crate) fn is_drained(node: &Node, configuration: &MigrationConfiguration) -> bool {
    let key = configuration.node_drain_taint_key.as_deref().unwrap_or(names::TAINT_DRAIN);
    taints(node).any(|taint| taint == key)
}

/// Decides about the evacuation of one VMI.
pub fn decide(name: &Name, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let Some(vmi) = view.world.vmis.get(name).filter(|vmi| !vmi.is_deleting() && !vmi.is_final()) else { return plan };
    let configuration = kubevirt::migration_configuration(view.world);
    let mut after = vmi.as_ref().clone();
    let mut then = Plan::nothing();
    match wish(vmi, &configuration, view.world) {
        Some(wish) => pursue(vmi, &wish, &configuration, view, &mut after, &mut then),
        None => call_off(&mut after),
    }
    // The pods first: as long as the VMI tells of an evacuation, it is looked at again.
    announce(vmi, after.condition(EVICTION_REQUESTED).is_some(), view.world, &mut plan);
    plan.update(vmi.as_ref(), &after);
    plan.effects.append(&mut then.effects);
    plan.wake_at = then.wake_at;
    plan
}

fn wish<'a>(
    vmi: &'a VirtualMachineInstance,
    configuration: &MigrationConfiguration,
    world: &World,
) -> Option<Wish<'a>> {
    let node = vmi.status.node_name.as_deref().filter(|node| !node.is_empty())?;
    let marked = vmi.status.evacuation_node_name.as_deref() == Some(node);
    let object = world.nodes.get(&Name::cluster(node));
    let drained = object.is_some_and(|object| is_drained(object, configuration));
    let closed = drained || object.is_some_and(|object| is_cordoned(object));
    let known = vmi.status.evacuation.as_ref().filter(|known| known.node_name.as_deref() == Some(node));
    let reopened = object.is_some() && !closed && known.is_some_and(|known| known.cordoned == Some(true));
    (drained || marked && !reopened).then_some(Wish { node, marked, closed, drained })
}

/// It has left, or shall not leave any more.
pub(crate) fn call_off(after: &mut VirtualMachineInstance) {
    if after.status.evacuation_node_name.take().is_some()
        && let Some(annotations) = &mut after.metadata.annotations
    {
        annotations.remove(names::ANNOTATION_EVICTION_SOURCE);
    }
    after.status.evacuation = None;
    condition::remove(&mut after.status.conditions, EVICTION_REQUESTED);
    condition::remove(&mut after.status.conditions, EVACUATION_STOPPED);
}

/// Moves it, unless something stands in the way.
fn pursue(
    vmi: &Arc<VirtualMachineInstance>,
    wish: &Wish<'_>,
    configuration: &MigrationConfiguration,
    view: &View<'_>,
    after: &mut VirtualMachineInstance,
    then: &mut Plan,
) {
    let now = Time(view.now);
    if wish.marked {
        let (reason, message) = EVICTION_REQUESTED_REASON;
        condition::set(
            &mut after.status.conditions,
            Condition::new(EVICTION_REQUESTED, true).because(reason, message),
            &now,
        );
    } else {
        condition::remove(&mut after.status.conditions, EVICTION_REQUESTED);
    }
    let migratable = vmi.condition(conditions::LIVE_MIGRATABLE);
    let ours = match strategy(vmi, view.world) {
        EvictionStrategy::LiveMigrate => true,
        EvictionStrategy::LiveMigrateIfPossible => migratable.is_some_and(Condition::is_true),
        // Not moved, or moved by somebody else.
        _ => false,
    };
    if !ours && !wish.marked {
        after.status.evacuation = None;
        condition::remove(&mut after.status.conditions, EVACUATION_STOPPED);
        return;
    }
    let state = after.status.evacuation.get_or_insert_default();
    if state.node_name.as_deref() != Some(wish.node) {
        *state = EvacuationStatus { node_name: Some(wish.node.to_owned()), ..EvacuationStatus::default() };
    }
    if wish.closed {
        state.cordoned = Some(true);
    }
    if !ours {
        // When the node is open again its mark goes as well. Attempts begin anew if it is to be moved after all.
        *state = EvacuationStatus {
            node_name: state.node_name.take(),
            cordoned: state.cordoned,
            ..EvacuationStatus::default()
        };
        condition::remove(&mut after.status.conditions, EVACUATION_STOPPED);
        return;
    }
    state.start_timestamp.get_or_insert_with(|| now.clone());
    let state = state.clone();
    let stop = match migratable.filter(|migratable| migratable.is_false()) {
        Some(blocked) => {
            let why = blocked.message.as_deref().unwrap_or("LiveMigratable is False");
            let text = format!("It cannot be migrated away from {}: {why}", wish.node);
            Some((NOT_LIVE_MIGRATABLE, text))
        }
        None => used_up(&state, configuration).map(|text| (ATTEMPTS_USED_UP, text)),
    };
    match stop {
        Some((reason, text)) => {
            let told = Condition::new(EVACUATION_STOPPED, true).because(reason, text.clone());
            if condition::set(&mut after.status.conditions, told, &now) {
                let component = events::COMPONENT_EVACUATION;
                then.record(vmi.as_ref(), component, EventType::Warning, EVACUATION_STOPPED, text);
            }
        }
        None => {
            condition::remove(&mut after.status.conditions, EVACUATION_STOPPED);
            if migratable.is_some_and(Condition::is_true) {
                attempt(vmi, wish, state, view, after, then);
            }
        }
    }
}

/// The eviction strategy that counts: the VMI's own, or the cluster's.
pub(crate) fn strategy(vmi: &VirtualMachineInstance, world: &World) -> EvictionStrategy {
    strategy_and_source(vmi, world).0
}

/// The eviction strategy that counts, and whether it is the VMI's own.
pub(crate) fn strategy_and_source(vmi: &VirtualMachineInstance, world: &World) -> (EvictionStrategy, bool) {
    if let Some(own) = &vmi.spec.eviction_strategy {
        return (own.clone(), true);
    }
    let kubevirt = world.kubevirt();
    let of_cluster = kubevirt.and_then(|kubevirt| kubevirt.spec.configuration.eviction_strategy.clone());
    (of_cluster.unwrap_or(EvictionStrategy::None), false)
}

/// Says why there is no further attempt, if so.
fn used_up(state: &EvacuationStatus, configuration: &MigrationConfiguration) -> Option<String> {
    let most = configuration.max_attempts.unwrap_or(MAX_ATTEMPTS);
    let failed = state.failed_attempts.unwrap_or(0);
    if failed < most {
        return None;
    }
    let node = state.node_name.as_deref().unwrap_or_default();
    let cause = state.last_failure.as_ref().map_or("no reason was given", FailureCause::as_str);
    let sentence = state.last_failure_message.as_deref().map(|text| format!(": {text}")).unwrap_or_default();
    let sentence = sentence.trim_end_matches('.');
    let what = match failed {
        1 => format!("The only attempt to move it away from {node} has failed, with"),
        _ => format!("All {failed} attempts to move it away from {node} have failed, the last one with"),
    };
    Some(format!(
        "{what} {cause}{sentence}. Remove the cause, \
         then uncordon {node} and drain it again, or raise maxAttempts, or move it with a migration of your own."
    ))
}

/// Makes the next migration, when it is time.
fn attempt(
    vmi: &Arc<VirtualMachineInstance>,
    wish: &Wish<'_>,
    mut state: EvacuationStatus,
    view: &View<'_>,
    after: &mut VirtualMachineInstance,
    then: &mut Plan,
) {
    let key = vmi.key();
    // As long as a finalizer holds a migration, what became of it has not been counted.
    let open = |one: &VirtualMachineInstanceMigration| !one.is_final() || one.has_finalizer(names::FINALIZER_MIGRATION);
    let busy = view.world.migrations_of(&key).any(|one| open(one));
    let pods = view.world.pods_of_vmi(vmi.uid()).filter(|pod| !placement::is_finished(pod)).count();
    if busy || pods > 1 || vmi.status.phase != VmiPhase::Running || turns::is_on_its_way(vmi) {
        return;
    }
    if maintenance::holds_back(vmi, wish.node, view.world) {
        // A change of the maintenance wakes it.
        after.status.evacuation = Some(state);
        return;
    }
    let named = state.migration_name.as_ref().map(|name| Name::new(vmi.namespace(), name.as_str()));
    if let Some(over) = named.and_then(|name| view.world.migrations.get(&name)) {
        // Its finalizer was taken away by somebody else.
        settle(&mut state, over, view.now);
    }
    if let Some(next) = state.next_attempt_timestamp.as_ref().map(|time| time.0).filter(|next| view.now < *next) {
        after.status.evacuation = Some(state);
        return then.wake(next);
    }
    // What the server refuses is not asked for again at once, which each write to the VMI would bring about.
    let asked = state.attempt_timestamp.as_ref().filter(|_| state.migration_name.is_some());
    if let Some(again) = asked.map(|asked| later(asked.0, ASK_AGAIN)).filter(|again| view.now < *again) {
        return then.wake(again);
    }
    let name = state.migration_name.get_or_insert_with(|| {
        let start = state.start_timestamp.as_ref().map(|time| time.0.to_string()).unwrap_or_default();
        let failed = state.failed_attempts.unwrap_or(0);
        let last = state.last_migration_uid.as_deref().unwrap_or_default();
        names::evacuation(&format!("{}/{}/{start}/{failed}/{last}", vmi.uid(), wish.node))
    });
    let migration = attempt_of(vmi, wish, name);
    // Changes each time: who decides on an old state is stopped at this write, before it makes what has been and gone.
    state.attempt_timestamp = Some(Time(view.now));
    let text = events::created_migration(Stored::name(&migration));
    after.status.evacuation = Some(state);
    then.create(migration);
    then.record(vmi.as_ref(), events::COMPONENT_EVACUATION, EventType::Normal, reason::SUCCESSFUL_CREATE, text);
}

fn attempt_of(vmi: &VirtualMachineInstance, wish: &Wish<'_>, name: &str) -> VirtualMachineInstanceMigration {
    let tidied = vmi.annotation(names::ANNOTATION_EVICTION_SOURCE) == Some(names::DESCHEDULER) && !wish.drained;
    let priority = if tidied { MigrationPriority::SystemMaintenance } else { MigrationPriority::SystemCritical };
    let mut migration = VirtualMachineInstanceMigration {
        metadata: ObjectMeta {
            namespace: vmi.metadata.namespace.clone(),
            name: Some(name.to_owned()),
            // Admission would add it, too; what becomes of the attempt is counted by way of it.
            finalizers: Some(vec![names::FINALIZER_MIGRATION.to_owned()]),
            annotations: Some([(names::ANNOTATION_EVACUATION_MIGRATION.to_owned(), wish.node.to_owned())].into()),
            ..ObjectMeta::default()
        },
        ..VirtualMachineInstanceMigration::default()
    };
    migration.spec.vmi_name = vmi.metadata.name.clone();
    migration.spec.priority = Some(priority);
    migration
}

/// Counts a migration that is over as an attempt of the VMI's evacuation, if it is one. To be written before the
/// migration's finalizer goes, and only as long as it is there: then it counts once, whatever happens in between. Says what
/// to tell people.
pub fn count(
    after: &mut VirtualMachineInstance,
    migration: &VirtualMachineInstanceMigration,
    now: Timestamp,
) -> Option<String> {
    let (namespace, name) = after.namespaced_name();
    let text = events::migration_backoff(namespace, name);
    let state = after.status.evacuation.as_mut()?;
    let node = migration.annotation(names::ANNOTATION_EVACUATION_MIGRATION);
    // Creation times are in whole seconds. One that is older was made for another VMI of this name.
    let second = |time: &Option<Time>| time.as_ref().map(|time| time.0.as_second());
    let since = second(&migration.metadata.creation_timestamp) >= second(&state.start_timestamp);
    let own = since && node.is_some() && node == state.node_name.as_deref();
    (own && settle(state, migration, now)).then_some(text)
}

/// Takes in what became of an attempt. Says whether it failed and was not counted before.
fn settle(state: &mut EvacuationStatus, migration: &VirtualMachineInstanceMigration, now: Timestamp) -> bool {
    let uid = Some(migration.uid().to_owned());
    if state.last_migration_uid == uid {
        return false;
    }
    state.last_migration_uid = uid;
    if state.migration_name.as_deref() == Some(Stored::name(migration)) {
        state.migration_name = None;
    }
    if migration.status.phase != MigrationPhase::Failed {
        return false;
    }
    let closed = migration.status.reason.as_deref() == Some(FailureCause::TargetInMaintenance.as_str());
    // No fault of this attempt: the next one goes to another node. Where it does not, its scheduler does not learn, and
    // that may go on for ever: only the first in a row is excused.
    if closed && state.last_failure != Some(FailureCause::TargetInMaintenance) {
        state.last_failure = Some(FailureCause::TargetInMaintenance);
        state.last_failure_message = migration.status.message.clone();
        state.next_attempt_timestamp = Some(Time(later(now, AFTER_CLOSED)));
        return false;
    }
    // Nothing was attempted: it is looked for a node again, for as long as it is to leave.
    if found_no_node(migration) {
        state.last_failure = Some(FailureCause::TargetRefusedCpu);
        state.last_failure_message = migration.status.message.clone();
        state.next_attempt_timestamp = Some(Time(later(now, AFTER_NO_NODE)));
        return false;
    }
    let failed = state.failed_attempts.unwrap_or(0).saturating_add(1);
    let entered = migration.status.phase_transition_timestamps.iter();
    let entered = entered.filter(|entry| entry.phase == MigrationPhase::Failed);
    let at = entered.filter_map(|entry| entry.phase_transition_timestamp.as_ref()).next().map_or(now, |time| time.0);
    let pause = match migration.annotation(names::ANNOTATION_TEST_IGNORE_BACKOFF) {
        Some(_) => SignedDuration::ZERO,
        None => pause(failed),
    };
    state.failed_attempts = Some(failed);
    state.last_failure_timestamp = Some(Time(at));
    state.last_failure = migration.status.reason.as_deref().map(FailureCause::from);
    state.last_failure_message = migration.status.message.clone();
    state.next_attempt_timestamp = at.checked_add(pause).ok().map(Time);
    true
}

/// Whether a migration ended before a target pod was made, since no other node offers what the guest has.
fn found_no_node(migration: &VirtualMachineInstanceMigration) -> bool {
    let status = &migration.status;
    let begun = status.phase_transition_timestamps.iter().any(|entry| entry.phase == MigrationPhase::Scheduling);
    status.reason.as_deref() == Some(FailureCause::TargetRefusedCpu.as_str()) && !begun
}

/// How long after this many failures in a row the next attempt has to wait.
pub fn pause(failures: u32) -> SignedDuration {
    let doubled = 1_i32.checked_shl(failures.saturating_sub(1)).filter(|factor| *factor > 0);
    doubled.and_then(|factor| FIRST_PAUSE.checked_mul(factor)).unwrap_or(LONGEST_PAUSE).min(LONGEST_PAUSE)
}

/// Tells the descheduler, in its way, that the eviction of a launcher pod is under way.
fn announce(vmi: &VirtualMachineInstance, under_way: bool, world: &World, then: &mut Plan) {
    let key = names::ANNOTATION_DESCHEDULER_EVICTION_IN_PROGRESS;
    for pod in world.pods_of_vmi(vmi.uid()).filter(|pod| !placement::is_finished(pod) && !pod.deleting()) {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        let leaves = under_way && node.is_some() && node == vmi.status.node_name.as_deref();
        if leaves == pod.annotation(key).is_some() {
            continue;
        }
        let mut told = pod.as_ref().clone();
        let annotations = told.metadata.annotations.get_or_insert_default();
        match leaves {
            true => annotations.insert(key.to_owned(), "true".to_owned()),
            false => annotations.remove(key),
        };
        then.update(pod.as_ref(), &told);
    }
}

/// Counts an attempt in a plan that ends a migration (see [`count`]) and tells of the pause that follows.
pub fn note_end(
    vmi: &VirtualMachineInstance,
    after: &mut VirtualMachineInstance,
    migration: &VirtualMachineInstanceMigration,
    view: &View<'_>,
    tell: &mut Plan,
) {
    let Some(text) = count(after, migration, view.now) else { return };
    let configuration = kubevirt::migration_configuration(view.world);
    // When it was the last one, `EvacuationStopped` tells.
    if after.status.evacuation.as_ref().is_some_and(|state| used_up(state, &configuration).is_none()) {
        tell.record(vmi, VM_CONTROLLER, EventType::Warning, reason::MIGRATION_BACKOFF, text);
    }
}
