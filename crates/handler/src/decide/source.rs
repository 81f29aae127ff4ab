//! The sending half of a migration.

use std::time::Duration;

use godwit_api::FailureCause as Cause;
use godwit_launcher::rpc::{Ability, DomainPhase, MigrationFacts, MigrationMode, MigrationRole, State};

use super::causes::{self, ABORTED};
use super::limits::{Overdue, overdue};
use super::target::link_broken;
use super::{Action, Change, Disruption, Failure, Plan, end};
use crate::channel;
use crate::facts::{
    Facts, Go, Launcher, MigrationView, PodView, SourceView, TargetSays, has_left, is_alive, is_broken, is_recoverable,
    migration,
};

/// How long the target's handler may take to prepare a pod that is ready.
const PREPARE_WITHIN: Duration = Duration::from_secs(180);
/// How long the target's handler may be out of reach before the start is given up.
const REACH_WITHIN: Duration = Duration::from_secs(30);
/// Between two attempts to reach it.
const REDIAL_AFTER: Duration = Duration::from_millis(500);
/// How long the target may be out of reach over the network for migrations, before the start or when the guest has left for good, until
/// it is asked to listen in its node's own; and in the latter case the other way round, where there are both.
const OVER_ONE_NETWORK_FOR: Duration = Duration::from_secs(10);
/// How long the target's end is waited for to say why the migration failed.
const EXPLAIN_WITHIN: Duration = Duration::from_secs(8);
/// Between two progress reports in the API.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// Decides about migration `m` away from `pod`; returns whether the guest's own life is to be looked after as well.
pub(super) fn decide(facts: &Facts, m: &MigrationView, pod: &PodView, plan: &mut Plan) -> bool {
    let link = facts.source.as_ref().filter(|s| s.uid == m.uid);
    if facts.source.is_some() && link.is_none() {
        plan.act(Action::CloseSource);
        return true;
    }
    let Some(state) = pod.launcher.last() else { return false };
    let sent = migration(state, &m.uid, MigrationRole::Source);
    if let Some(f) = sent.filter(|f| has_left(f)) {
        hand_over(facts, m, pod, f, link, plan);
        return false;
    }
    if facts.vmi.is_final() {
        return false;
    }
    if matches!(pod.launcher, Launcher::Gone(_)) {
        // QEMU went with it before it had handed over.
        fail(m, Failure::new(Cause::SourceLost, "the source's launcher is gone, and the guest with it"), plan);
        return true;
    }
    match sent {
        None if !is_alive(state) => {
            fail(m, Failure::new(Cause::GuestEnded, "the guest ended before the migration began"), plan);
            true
        }
        None => {
            begin(facts, m, pod, link, plan);
            true
        }
        Some(f) if matches!(f.status.as_str(), "failed" | "cancelled") => {
            let ended = (!is_alive(state)).then(|| guest_ended(state));
            match why_ended(facts, m, f, link, ended) {
                // How far it had come belongs to the end.
                Some(failure) => {
                    let mut changes = vec![Change::Progress { pod: pod.name.clone() }];
                    if was_aborted(m, link) {
                        changes.push(Change::Abort("Succeeded"));
                    }
                    fail_with(m, changes, failure, plan);
                }
                None => {
                    follow(m, pod, link, plan);
                    plan.wake(REDIAL_AFTER);
                }
            }
            true
        }
        Some(_) if !is_alive(state) => {
            fail(m, guest_ended(state), plan);
            true
        }
        Some(f) => {
            under_way(facts, m, pod, f, link, plan);
            true
        }
    }
}

/// The guest is not there any more, and had not left.
fn guest_ended(state: &State) -> Failure {
    let cause = if state.phase == DomainPhase::Shutdown { Cause::GuestEnded } else { Cause::SourceLost };
    let why = state.exit_reason.as_deref().unwrap_or("QEMU has ended");
    Failure::new(cause, format!("the guest ended while it was being moved: {why}"))
}

/// Why the migration ended without the guest having left. `None` while the target's end has yet to be heard.
fn why_ended(
    facts: &Facts,
    m: &MigrationView,
    f: &MigrationFacts,
    link: Option<&SourceView>,
    guest_ended: Option<Failure>,
) -> Option<Failure> {
    if let Some(failure) = link.and_then(|l| l.cancelled.as_ref()) {
        return Some(Failure::new(failure.cause.clone(), format!("{ABORTED}: {}", failure.reason)));
    }
    if let Some(cause) = &m.cause {
        return Some(causes::remembered(cause));
    }
    // Nobody but a user would have cancelled it.
    if m.abort_requested || m.abort_status.is_some() || f.status == "cancelled" {
        return Some(Failure::new(Cause::Cancelled, ABORTED));
    }
    if guest_ended.is_some() {
        return guest_ended;
    }
    let own = f.error.as_deref().unwrap_or("QEMU gave no reason");
    let since = f.end_us.map(|end| facts.now.as_microsecond().saturating_sub(end)).unwrap_or(i64::MAX);
    let since = Duration::from_micros(u64::try_from(since).unwrap_or(0));
    let Some(link) = link else {
        if f.carried.is_some() && since < EXPLAIN_WITHIN {
            // It can still be heard from the target.
            return None;
        }
        // The stream went through this handler, and it has begun anew.
        let broke = if f.carried.is_some() { "" } else { ", and the stream broke" };
        let reason = format!("Live migration failed: {own}; the source node's handler restarted{broke}");
        return Some(Failure::new(Cause::SourceUnresponsive, reason));
    };
    let heard = match &link.target {
        TargetSays::Nothing if since >= EXPLAIN_WITHIN => {
            TargetSays::Unreachable("the target's handler does not answer".into())
        }
        heard => heard.clone(),
    };
    causes::of_failure(f, &heard, facts.peer_ended.as_deref())
}

/// Not started yet: reach the target, then start.
fn begin(facts: &Facts, m: &MigrationView, pod: &PodView, link: Option<&SourceView>, plan: &mut Plan) {
    if m.abort_requested {
        fail(m, Failure::new(Cause::Cancelled, ABORTED), plan);
        return;
    }
    if facts.vmi.deleting {
        let reason = format!("{ABORTED}: the VirtualMachineInstance is being deleted");
        fail(m, Failure::new(Cause::GuestEnded, reason), plan);
        return;
    }
    if m.start.is_some() {
        let reason = "the launcher has no record of the migration that was started";
        fail(m, Failure::new(Cause::HypervisorError, reason), plan);
        return;
    }
    // While the target is prepared, so that nobody waits for it.
    if !facts.measure_asked {
        plan.act(Action::Measure { pod: pod.name.clone() });
    }
    // The target publishes both ports at once; without them it is not ready.
    if m.target_address.is_none() || m.port(channel::CONTROL).is_none() || m.port(channel::MEMORY).is_none() {
        if facts.known_for >= PREPARE_WITHIN {
            let seconds = PREPARE_WITHIN.as_secs();
            let node = &m.target_node;
            let reason = format!("Live migration failed: node {node} has not prepared the target within {seconds} s");
            fail(m, Failure::new(Cause::TargetUnresponsive, reason), plan);
        } else {
            plan.wake(PREPARE_WITHIN - facts.known_for);
        }
        return;
    }
    if facts.vmi.fails_migration {
        let reason = "Live migration failed: Failed migration to satisfy functional test condition";
        fail(m, Failure::new(Cause::HypervisorError, reason), plan);
        return;
    }
    let Some(link) = link else {
        plan.act(Action::Dial { pod: pod.name.clone(), memory: true });
        return;
    };
    if let Some(refused) = &link.start_error {
        let reason = format!("Live migration failed: {}", refused.reason);
        fail(m, Failure::new(refused.cause.clone(), reason), plan);
    } else if link.ready && pod.launcher.state().is_some_and(State::is_rebooting) {
        // Its launcher gives it up in time; what changes wakes this up.
        plan.wake(REDIAL_AFTER);
    } else if link.ready {
        plan.act(Action::Migrate { pod: pod.name.clone() });
    } else if let Some(error) = &link.error {
        if m.over_own_network && link.age >= OVER_ONE_NETWORK_FOR && link.age < REACH_WITHIN {
            // Not dialled once more where it is about to listen no longer.
            plan.write(vec![Change::Network { own: false }]);
            plan.warn("Migrating", changed_network(&m.target_node, false));
            plan.wake(REDIAL_AFTER);
            return;
        }
        if link.age >= REACH_WITHIN {
            let (cause, why) = match facts.peer_ended.as_deref() {
                Some(ended) => (Cause::TargetLost, ended),
                None => (Cause::LinkLost, error.as_str()),
            };
            fail(m, Failure::new(cause, format!("Live migration failed: {why}")), plan);
        } else {
            plan.act(Action::Dial { pod: pod.name.clone(), memory: true });
            plan.wake(REDIAL_AFTER);
        }
    }
}

/// Its memory goes through the launchers, and this process, which has begun since, knows of it: the control channel is all that it
/// lacks.
fn follow(m: &MigrationView, pod: &PodView, link: Option<&SourceView>, plan: &mut Plan) {
    if link.is_none() && m.target_address.is_some() && m.port(channel::CONTROL).is_some() {
        plan.act(Action::Dial { pod: pod.name.clone(), memory: false });
    }
}

/// QEMU is sending.
fn under_way(
    facts: &Facts,
    m: &MigrationView,
    pod: &PodView,
    f: &MigrationFacts,
    link: Option<&SourceView>,
    plan: &mut Plan,
) {
    if m.start.is_none() {
        plan.write([started(facts, f)].into_iter().chain(forecast(m, link)).collect());
        plan.event("Migrating", "VirtualMachineInstance is migrating.");
        if let Some(single) = link.and_then(|l| l.single) {
            plan.event("Migrating", format!("VirtualMachineInstance is migrating: {}.", single.as_str()));
        }
        for unused in unused(m, pod, link) {
            plan.event("Migrating", unused);
        }
        if link.is_some_and(|l| l.plain) {
            plan.event("Migrating", "VirtualMachineInstance is migrating in the clear: disableTLS is set.");
        }
        return;
    }
    if m.abort_requested && m.abort_status.is_none() {
        plan.act(Action::Cancel { pod: pod.name.clone(), uid: m.uid.clone(), why: None });
        plan.write(vec![Change::Abort("Aborting")]);
        plan.event("Migrating", "VirtualMachineInstance is aborting migration.");
        return;
    }
    if f.carried.is_some() {
        follow(m, pod, link, plan);
    }
    let given_up = link.and_then(|l| l.cancelled.as_ref());
    // A predecessor of this process may have given it up.
    let cancelled = m.abort_status.is_some() || given_up.is_some() || m.cause.is_some();
    if !cancelled && f.status != "cancelling" {
        match overdue(facts, m, f, link) {
            Some(Overdue::GiveUp(why)) => {
                plan.warn("Migrating", format!("VirtualMachineInstance is aborting migration: {}", why.reason));
                let changes = vec![Change::Abort("Aborting"), Change::GivingUp(why.cause.clone())];
                plan.act(Action::Cancel { pod: pod.name.clone(), uid: m.uid.clone(), why: Some(why) });
                plan.write(changes);
                return;
            }
            Some(Overdue::Disrupt(how)) => {
                let what = match how {
                    Disruption::PostCopy => {
                        "goes on in post-copy: the guest runs at the target while its memory follows"
                    }
                    Disruption::Pause => "goes on with the guest paused",
                };
                plan.event("Migrating", format!("Live migration does not end by itself and {what}."));
                plan.act(Action::Disrupt { pod: pod.name.clone(), uid: m.uid.clone(), how });
                return;
            }
            None => {}
        }
    }
    let mut changes = Vec::new();
    if let Some(why) = given_up.filter(|why| m.cause.as_ref() != Some(&why.cause)) {
        changes.push(Change::Abort("Aborting"));
        changes.push(Change::GivingUp(why.cause.clone()));
    }
    changes.extend(mode(m, f));
    changes.extend(forecast(m, link));
    changes.extend(progress(pod, link, plan));
    plan.write(changes);
    if !cancelled {
        limit(m, pod, f, plan);
    }
    plan.wake(REPORT_EVERY);
}

/// What the configuration allows and this migration cannot use, in words (docs/data-plane.md, "What goes with what").
fn unused(m: &MigrationView, pod: &PodView, link: Option<&SourceView>) -> Vec<&'static str> {
    let mut said = Vec::new();
    if m.allow_post_copy && !m.allow_workload_disruption {
        said.push("Post-copy is allowed and is not used: allowWorkloadDisruption is off.");
    } else if m.allow_post_copy && link.is_some_and(|link| !link.post_copy_offered) {
        said.push(
            "Post-copy is allowed and cannot be used: the target cannot receive so (userfaultfd), or disks are copied.",
        );
    }
    // A launcher that says nothing of its abilities is older.
    let ability = pod.launcher.last().map(|state| state.ability).unwrap_or_default();
    if m.allow_auto_converge && ability != Ability::default() && !ability.tracks_writes {
        said.push("Auto-converge is allowed and has no effect: this guest's QEMU sends its memory in one pass.");
    }
    said
}

/// The bandwidth may be changed on the way.
fn limit(m: &MigrationView, pod: &PodView, f: &MigrationFacts, plan: &mut Plan) {
    if f.bandwidth_limit.unwrap_or(0) != m.bandwidth {
        plan.act(Action::Limit { pod: pod.name.clone() });
    }
}

/// What was expected, unless the API has it: it is written once.
fn forecast(m: &MigrationView, link: Option<&SourceView>) -> Option<Change> {
    let made = link?.prediction.as_ref().filter(|_| !m.has_forecast)?;
    Some(Change::Forecast(Box::new(made.clone())))
}

fn started(facts: &Facts, f: &MigrationFacts) -> Change {
    Change::Started(f.start_us.unwrap_or_else(|| facts.now.as_microsecond()))
}

/// The mode, where the API has another one. It never goes back to pre-copy.
fn mode(m: &MigrationView, f: &MigrationFacts) -> Option<Change> {
    (f.mode != MigrationMode::PreCopy && m.mode != Some(f.mode)).then_some(Change::Mode(f.mode))
}

/// Progress, when it is due again.
fn progress(pod: &PodView, link: Option<&SourceView>, plan: &mut Plan) -> Option<Change> {
    match link?.reported {
        Some(since) if since < REPORT_EVERY => {
            plan.wake(REPORT_EVERY - since);
            None
        }
        _ => Some(Change::Progress { pod: pod.name.clone() }),
    }
}

/// The guest is never run here again: from now on it can live at the target only. QEMU here is in postmigrate and is never
/// continued, or, in post-copy, still serves the guest's memory.
fn hand_over(
    facts: &Facts,
    m: &MigrationView,
    pod: &PodView,
    f: &MigrationFacts,
    link: Option<&SourceView>,
    plan: &mut Plan,
) {
    let mut changes = Vec::new();
    let begins = m.start.is_none();
    if was_aborted(m, None) && m.abort_status.as_deref() != Some("Failed") {
        changes.push(Change::Abort("Failed"));
    }
    let go = link.map(|l| &l.go).unwrap_or(&Go::NotDue);
    let other = other_network(m, link, plan);
    let to_other = other.map(|own| Change::Network { own });
    match go {
        Go::Lost(reason) if f.status == "failed" => {
            let reason = format!("VMI is irrecoverable due to failed post-copy migration: {reason}");
            lost_because(facts, m, Failure::new(Cause::SourceLost, reason), plan);
        }
        Go::Lost(reason) => lost(facts, m, reason, plan),
        // The controller has given the guest up (the target's pod is gone, say): nobody is left to be told.
        Go::NotDue | Go::Trying(_) if facts.vmi.is_final() => {
            if link.is_some() {
                plan.act(Action::CloseSource);
            }
            let reason = "the target was lost after the guest had been handed over";
            fail(m, Failure::new(Cause::TargetLost, reason), plan);
        }
        // Its handler cannot say so any more: QEMU has ended with the pod, whether the go had reached it or not.
        _ if let Some(why) = ended_unseen(facts, m, f, go) => lost(facts, m, why, plan),
        Go::Running(resume_us) => {
            if begins {
                changes.push(started(facts, f));
            }
            changes.extend(forecast(m, link));
            changes.extend(mode(m, f));
            if f.status == "completed" {
                changes.push(Change::Progress { pod: pod.name.clone() });
                // A guest that was paused before stood still anyway.
                let stop = f.stop_us.filter(|_| !f.guest_paused);
                changes.push(Change::Completed { downtime_us: stop.map(|stop| resume_us.saturating_sub(stop)) });
            } else {
                // Post-copy. If it breaks, the target's handler says so: the guest is there.
                changes.extend(progress(pod, link, plan));
                changes.extend(to_other);
                plan.wake(REPORT_EVERY);
                // What is missing there is nowhere any more, or nobody here knows how to send it. The target learns it by the
                // end of this pod.
                if is_broken(f) && !is_recoverable(f) && !pod.terminal {
                    end(pod, 0, plan);
                }
            }
            plan.write(changes);
            if let Some(own) = other.filter(|_| f.status != "completed") {
                plan.warn("Migrating", changed_network(&m.target_node, own));
            }
            if f.status == "postcopy-active" {
                limit(m, pod, f, plan);
            }
            if begins {
                plan.event("Migrating", "VirtualMachineInstance is migrating.");
            }
            if f.status == "completed" {
                plan.event("Migrated", format!("The VirtualMachineInstance migrated to node {}.", m.target_node));
            }
        }
        Go::NotDue | Go::Trying(_) => {
            // With a link the go is on its way, without waiting for this decision; it is repeated by the link itself.
            if link.is_none() && m.target_address.is_some() && m.port(channel::CONTROL).is_some() {
                plan.act(Action::Dial { pod: pod.name.clone(), memory: false });
            }
            if is_broken(f) && is_recoverable(f) {
                if !facts.vmi.link_broken {
                    plan.warn("Migrating", link_broken(&m.target_node));
                }
                changes.push(Change::LinkBroken { node: m.target_node.clone() });
            }
            changes.extend(to_other);
            plan.write(changes);
            if let Some(own) = other {
                plan.warn("Migrating", changed_network(&m.target_node, own));
            }
            plan.wake(REDIAL_AFTER);
        }
    }
}

/// Over which network the target is to be reached from now on (whether that for migrations), when nothing will do any more but to reach
/// it and the one in hand has failed: the other may be whole, or whole again.
fn other_network(m: &MigrationView, link: Option<&SourceView>, plan: &mut Plan) -> Option<bool> {
    let link = link.filter(|link| m.over_own_network || link.own_network)?;
    let unreached = link.unreached?;
    if unreached < OVER_ONE_NETWORK_FOR {
        plan.wake(OVER_ONE_NETWORK_FOR - unreached);
        return None;
    }
    Some(!m.over_own_network)
}

fn changed_network(node: &str, own: bool) -> String {
    let (failed, other) = match own {
        false => ("the network for migrations", "the nodes' own network"),
        true => ("the nodes' own network", "the network for migrations"),
    };
    format!("Node {node} is not reached over {failed}: {other} is tried.")
}

/// Why the target has ended, unless the guest lived there with all its memory: then its end is its own affair.
fn ended_unseen<'a>(facts: &'a Facts, m: &MigrationView, f: &MigrationFacts, go: &Go) -> Option<&'a str> {
    let arrived =
        m.target_ready || facts.vmi.node_name.as_deref() == Some(&m.target_node) || matches!(go, Go::Running(_));
    facts.peer_ended.as_deref().filter(|_| !arrived || f.status != "completed")
}

/// The guest was handed over and is nowhere. The memory here is stale by then, for all that is known, and is not run.
fn lost(facts: &Facts, m: &MigrationView, why: &str, plan: &mut Plan) {
    lost_because(
        facts,
        m,
        Failure::new(Cause::TargetLost, format!("the guest was handed over and is lost: {why}")),
        plan,
    );
}

/// The same for any cause; the target's end says it as well.
pub(super) fn lost_because(facts: &Facts, m: &MigrationView, failure: Failure, plan: &mut Plan) {
    let mut changes = Vec::new();
    if !facts.vmi.is_final() {
        changes.push(Change::Phase("Failed"));
        changes.push(Change::Unsynchronized(failure.reason.clone()));
    }
    if m.abort_requested {
        changes.push(Change::Abort("Failed"));
    }
    let event = failed_message(&m.uid, &failure.reason);
    changes.push(Change::Failed(failure));
    plan.write(changes);
    plan.warn("Migrated", event);
}

/// The guest stays; say so.
fn fail(m: &MigrationView, failure: Failure, plan: &mut Plan) {
    let aborted = was_aborted(m, None).then_some(Change::Abort("Succeeded"));
    fail_with(m, aborted.into_iter().collect(), failure, plan);
}

/// Whether somebody, or a deadline, has ended it. As in KubeVirt, a deadline's end counts as an abort that nobody requested.
fn was_aborted(m: &MigrationView, link: Option<&SourceView>) -> bool {
    m.abort_requested || m.abort_status.is_some() || link.is_some_and(|link| link.cancelled.is_some())
}

fn fail_with(m: &MigrationView, mut changes: Vec<Change>, failure: Failure, plan: &mut Plan) {
    let event = failed_message(&m.uid, &failure.reason);
    changes.push(Change::Failed(failure));
    plan.write(changes);
    plan.warn("Migrated", event);
}

pub(super) fn failed_message(uid: &str, reason: &str) -> String {
    godwit_api::names::events::migration_failed(uid, reason)
}
