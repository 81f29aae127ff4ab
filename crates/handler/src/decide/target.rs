//! The receiving half of a migration.

use std::time::Duration;

use godwit_api::FailureCause as Cause;
use godwit_launcher::rpc::{self, DomainPhase, MigrationFacts, MigrationRole, State};

use super::source::{failed_message, lost_because};
use super::{Action, Change, Failure, Plan, end};
use crate::facts::{
    Facts, Launcher, MigrationView, PodView, TargetView, is_alive, is_broken, is_recoverable, migration,
};

/// How long after the guest resumed here the source's handler may take to report the end; then this end does it.
const SOURCE_REPORTS_WITHIN: Duration = Duration::from_secs(30);

pub(super) fn decide(facts: &Facts, m: &MigrationView, pod: &PodView, plan: &mut Plan) {
    let open = listening(facts, m);
    if facts.target.is_some() && open.is_none() {
        plan.act(Action::CloseTarget);
    }
    let Some(state) = pod.launcher.last() else { return };
    let received = migration(state, &m.uid, MigrationRole::Target);
    if let Some(f) = received.filter(|f| f.gone) {
        here(facts, m, pod, state, f, plan);
        return;
    }
    if matches!(pod.launcher, Launcher::Gone(_)) {
        return;
    }

    if facts.vmi.is_final() || facts.vmi.deleting && received.is_none() {
        if state.phase == DomainPhase::Incoming {
            plan.act(Action::Abandon { pod: pod.name.clone(), uid: m.uid.clone() });
        }
        return;
    }
    if facts.vmi.blocks_target {
        return;
    }
    match (state.phase, received, open) {
        (DomainPhase::Undefined, _, _) => {
            plan.act(Action::Wire { pod: pod.name.clone() });
            plan.act(Action::PrepareTarget { pod: pod.name.clone(), uid: m.uid.clone() });
        }
        // QEMU waits and nobody has connected yet: the order is repeated without harm and opens the channels.
        (DomainPhase::Incoming, Some(f), None) if f.status == "none" || f.status == "setup" => {
            plan.act(Action::PrepareTarget { pod: pod.name.clone(), uid: m.uid.clone() });
        }
        (DomainPhase::Incoming, Some(_), None) => {
            plan.act(Action::OpenControl { pod: pod.name.clone(), uid: m.uid.clone() });
        }
        (DomainPhase::Incoming, _, Some(open)) if !is_published(m, open) => {
            plan.write(vec![Change::Published]);
            if !m.detected {
                plan.event("PreparingTarget", "VirtualMachineInstance Migration Target Prepared.");
            }
            let ports = open.ports.keys().cloned().collect::<Vec<_>>().join(",");
            plan.event(
                "PreparingTarget",
                format!("Migration Target is listening at {}, on ports: {ports}", open.address),
            );
        }
        _ => {}
    }
}

/// The go was given: the guest is here, in post-copy before its memory.
fn here(facts: &Facts, m: &MigrationView, pod: &PodView, state: &State, f: &MigrationFacts, plan: &mut Plan) {
    let whole = f.status == "completed";
    if !is_alive(state) {
        // With all its memory here its end is its own affair, once the migration is over.
        if !whole && !facts.vmi.is_final() {
            ended_in_between(facts, m, pod, state, f, plan);
        }
        return;
    }
    if !matches!(pod.launcher, Launcher::Answers(_)) {
        return;
    }
    let broken = !whole && is_broken(f);
    if broken && (!is_recoverable(f) || facts.peer_ended.is_some()) {
        // Pages that it touches never come. Whoever says that the guest is lost must know that it does not run.
        end(pod, 0, plan);
        return;
    }
    // While both QEMUs may live it is waited for the link, however long: what is missing exists nowhere else.
    if broken && !facts.vmi.link_broken {
        plan.warn("Migrating", link_broken(&m.source_node));
    }
    if !broken && facts.vmi.link_broken {
        plan.event("Migrating", LINK_BACK);
    }
    let open = listening(facts, m);
    // The control channel stays open until the source's handler has written the end: it may ask again.
    if open.is_none() {
        plan.act(Action::OpenControl { pod: pod.name.clone(), uid: m.uid.clone() });
    }
    let at = f.resume_us.unwrap_or_else(|| facts.now.as_microsecond());
    let report = match broken {
        true => Change::LinkBroken { node: m.source_node.clone() },
        false => Change::Report { pod: pod.name.clone() },
    };
    if !m.target_ready || facts.vmi.node_name.as_deref() != Some(&facts.node) {
        plan.write(vec![Change::Arrived { resume_us: at }, report]);
        plan.event("Created", "VirtualMachineInstance defined.");
    } else if open.is_some_and(|open| !is_published(m, open)) {
        plan.write(vec![Change::Published]);
    } else if whole {
        let since = f.end_us.map_or(at, |end| end.max(at));
        let waited = Duration::from_micros(facts.now.as_microsecond().saturating_sub(since).max(0) as u64);
        if waited >= SOURCE_REPORTS_WITHIN {
            // The source's node is gone; that the guest runs here is the proof of success.
            // A cancellation that the source could not answer any more came too late.
            let late = m.abort_requested && m.abort_status.as_deref() != Some("Failed");
            let mut changes: Vec<Change> = late.then_some(Change::Abort("Failed")).into_iter().collect();
            changes.push(Change::Completed { downtime_us: None });
            plan.write(changes);
            plan.event("Migrated", format!("The VirtualMachineInstance migrated to node {}.", facts.node));
        } else {
            plan.wake(SOURCE_REPORTS_WITHIN - waited);
        }
    } else {
        plan.write(vec![report]);
        if facts.vmi.deleting {
            end(pod, facts.vmi.grace_seconds, plan);
        }
    }
}

/// What is said of a post-copy whose link broke.
pub(super) fn link_broken(node: &str) -> String {
    format!(
        "The link to node {node} broke in post-copy: the guest stands still when it needs memory that is not there yet, and \
         goes on when the link is back."
    )
}

/// What is said when it goes on.
const LINK_BACK: &str = "The link is back: post-copy goes on.";

/// The guest has ended here while a part of its memory was still at the source.
fn ended_in_between(
    facts: &Facts,
    m: &MigrationView,
    pod: &PodView,
    state: &State,
    f: &MigrationFacts,
    plan: &mut Plan,
) {
    let why = state.exit_reason.as_deref().unwrap_or("QEMU has ended");
    // This handler ends it at once only because it broke, whatever QEMU's last word is then.
    let broken = is_broken(f) || pod.shutdown_ordered == Some(0) && !facts.vmi.deleting;
    if state.phase == DomainPhase::Shutdown && !broken {
        let failure = Failure::new(Cause::GuestEnded, format!("the guest ended in post-copy: {why}"));
        let event = failed_message(&m.uid, &failure.reason);
        plan.write(vec![Change::Phase("Succeeded"), Change::Failed(failure)]);
        plan.event("Stopped", "The VirtualMachineInstance was shut down.");
        plan.warn("Migrated", event);
        return;
    }
    let (cause, what) = match facts.peer_ended.as_deref() {
        Some(ended) => (Cause::SourceLost, ended.to_owned()),
        // Whatever QEMU says of the stream that it could not read on: it had taken the guest.
        None if broken && f.cause != Some(rpc::Cause::Killed) => {
            (Cause::LinkLost, f.error.clone().unwrap_or_else(|| "the link broke".into()))
        }
        None => (Cause::TargetLost, why.to_owned()),
    };
    let reason = format!("VMI is irrecoverable due to failed post-copy migration: {what}");
    lost_because(facts, m, Failure::new(cause, reason), plan);
}

/// The listening half, unless it is another migration's, or where the source does not reach it: it says so by the kind of network.
fn listening<'a>(facts: &'a Facts, m: &MigrationView) -> Option<&'a TargetView> {
    let is_reached = |open: &TargetView| match (m.over_own_network, open.over_own_network) {
        (false, true) => false,
        // Of its own accord, as its interface is not there; the kind is published with the place, so only afterwards it is the source's word.
        (true, false) => !is_published(m, open),
        _ => true,
    };
    facts.target.as_ref().filter(|open| open.uid == m.uid && is_reached(open))
}

fn is_published(m: &MigrationView, open: &TargetView) -> bool {
    m.detected && m.target_address.as_deref() == Some(open.address.as_str()) && m.ports == open.ports
}
