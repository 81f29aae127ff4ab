//! The sending half of a migration.

use std::time::Duration;

use godwit_launcher::rpc::{MigrationFacts, MigrationRole};

use super::{Action, Change, Plan};
use crate::channel;
use crate::facts::{Facts, Go, Launcher, MigrationView, PodView, SourceView, is_alive, migration};

/// How long the target's handler may take to prepare a pod that is ready.
const PREPARE_WITHIN: Duration = Duration::from_secs(180);
/// How long the target's handler may be out of reach before the start is given up.
const REACH_WITHIN: Duration = Duration::from_secs(30);
/// Between two attempts to reach it.
const REDIAL_AFTER: Duration = Duration::from_millis(500);
/// How long no byte may move before the link counts as cut (unless `progressTimeout` is shorter).
const STILL_LIMIT: Duration = Duration::from_secs(12);
/// Between two progress reports in the API.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// KubeVirt's words for every migration that was cancelled.
const ABORTED: &str = "Live migration has been aborted";

/// Decides about migration `m` away from `pod`; returns whether the guest's own life is to be looked after as well.
pub(super) fn decide(facts: &Facts, m: &MigrationView, pod: &PodView, plan: &mut Plan) -> bool {
    let link = facts.source.as_ref().filter(|s| s.uid == m.uid);
    if facts.source.is_some() && link.is_none() {
        plan.act(Action::CloseSource);
        return true;
    }
    let Some(state) = pod.launcher.last() else { return false };
    let sent = migration(state, &m.uid, MigrationRole::Source);
    if let Some(f) = sent.filter(|f| f.status == "completed") {
        hand_over(facts, m, pod, f, link, plan);
        return false;
    }
    if facts.vmi.is_final() {
        return false;
    }
    if matches!(pod.launcher, Launcher::Gone(_)) {
        // QEMU went with it before it had handed over.
        fail(m, "the source's launcher is gone, and the guest with it".into(), plan);
        return true;
    }
    match sent {
        None if !is_alive(state) => {
            fail(m, "the guest ended before the migration began".into(), plan);
            true
        }
        None => {
            begin(facts, m, pod, link, plan);
            true
        }
        Some(f) if matches!(f.status.as_str(), "failed" | "cancelled") => {
            let wanted = m.abort_requested || m.abort_status.is_some();
            let reason = match (link.and_then(|l| l.cancelled.as_ref()), wanted, f.error.as_ref()) {
                (Some(why), _, _) => format!("{ABORTED}: {why}"),
                (None, true, _) => ABORTED.to_owned(),
                (None, false, _) if f.status == "cancelled" => ABORTED.to_owned(),
                (None, false, Some(error)) => format!("Live migration failed: {error}"),
                (None, false, None) => "Live migration failed: QEMU gave no reason".to_owned(),
            };
            fail(m, reason, plan);
            true
        }
        Some(f) => {
            under_way(facts, m, pod, f, link, plan);
            true
        }
    }
}

/// Not started yet: reach the target, then start.
fn begin(facts: &Facts, m: &MigrationView, pod: &PodView, link: Option<&SourceView>, plan: &mut Plan) {
    if m.abort_requested {
        fail(m, ABORTED.into(), plan);
        return;
    }
    if facts.vmi.deleting {
        fail(m, format!("{ABORTED}: the VirtualMachineInstance is being deleted"), plan);
        return;
    }
    if m.start.is_some() {
        fail(m, "the launcher has no record of the migration that was started".into(), plan);
        return;
    }
    // The target publishes both ports at once; without them it is not ready.
    if m.target_address.is_none() || m.port(channel::CONTROL).is_none() || m.port(channel::MEMORY).is_none() {
        if facts.known_for >= PREPARE_WITHIN {
            let seconds = PREPARE_WITHIN.as_secs();
            let node = &m.target_node;
            fail(m, format!("Live migration failed: node {node} has not prepared the target within {seconds} s"), plan);
        } else {
            plan.wake(PREPARE_WITHIN - facts.known_for);
        }
        return;
    }
    let Some(link) = link else {
        plan.act(Action::Dial { pod: pod.name.clone(), memory: true });
        return;
    };
    if let Some(reason) = &link.start_error {
        fail(m, format!("Live migration failed: {reason}"), plan);
    } else if link.ready {
        plan.act(Action::Migrate { pod: pod.name.clone() });
    } else if let Some(error) = &link.error {
        if link.age >= REACH_WITHIN {
            fail(m, format!("Live migration failed: {error}"), plan);
        } else {
            plan.act(Action::Dial { pod: pod.name.clone(), memory: true });
            plan.wake(REDIAL_AFTER);
        }
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
        plan.write(vec![Change::Started(f.start_us.unwrap_or_else(|| facts.now.as_microsecond()))]);
        plan.event("Migrating", "VirtualMachineInstance is migrating.");
        return;
    }
    if m.abort_requested && m.abort_status.is_none() {
        plan.act(Action::Cancel { pod: pod.name.clone(), uid: m.uid.clone(), why: None });
        plan.write(vec![Change::Abort("Aborting")]);
        plan.event("Migrating", "VirtualMachineInstance is aborting migration.");
        return;
    }
    let cancelled = m.abort_status.is_some() || link.is_some_and(|l| l.cancelled.is_some());
    if !cancelled
        && f.status != "cancelling"
        && let Some(why) = hopeless(facts, m, link)
    {
        plan.warn("Migrating", format!("VirtualMachineInstance is aborting migration: {why}"));
        plan.act(Action::Cancel { pod: pod.name.clone(), uid: m.uid.clone(), why: Some(why) });
        return;
    }
    if let Some(link) = link {
        let since = link.reported.map(|at| facts.now.duration_since(at).unsigned_abs());
        match since {
            Some(since) if since < REPORT_EVERY => plan.wake(REPORT_EVERY - since),
            _ => plan.write(vec![Change::Progress { pod: pod.name.clone() }]),
        }
    }
    plan.wake(REPORT_EVERY);
}

/// Why the migration should be given up, if it should.
fn hopeless(facts: &Facts, m: &MigrationView, link: Option<&SourceView>) -> Option<String> {
    if facts.vmi.deleting {
        return Some("the VirtualMachineInstance is being deleted".into());
    }
    let elapsed = m.start.map(|s| facts.now.duration_since(s)).filter(|d| d.is_positive()).map(|d| d.unsigned_abs());
    // KubeVirt's budget: decimal gigabytes, rounded up.
    let budget = facts.vmi.memory_bytes.div_ceil(1_000_000_000).max(1).saturating_mul(m.completion_timeout_per_gib);
    if budget > 0 && elapsed.is_some_and(|e| e > Duration::from_secs(budget)) {
        return Some(format!("not completed after {budget} seconds (completionTimeoutPerGiB)"));
    }
    let link = link?;
    let progress = Duration::from_secs(m.progress_timeout);
    let still = if progress.is_zero() { STILL_LIMIT } else { progress.min(STILL_LIMIT) };
    if link.still >= still {
        return Some(format!(
            "no byte has moved for {} seconds; the link to the target may be cut",
            link.still.as_secs()
        ));
    }
    if !progress.is_zero() && link.stuck >= progress {
        return Some(format!(
            "stuck for {} seconds: the guest writes faster than the link carries",
            link.stuck.as_secs()
        ));
    }
    None
}

/// QEMU here is in postmigrate and is never continued: from now on the guest can live at the target only.
fn hand_over(
    facts: &Facts,
    m: &MigrationView,
    pod: &PodView,
    f: &MigrationFacts,
    link: Option<&SourceView>,
    plan: &mut Plan,
) {
    let go = link.map(|l| &l.go).unwrap_or(&Go::NotDue);
    match go {
        Go::Running(resume_us) => {
            let mut changes = Vec::new();
            if m.start.is_none() {
                changes.push(Change::Started(f.start_us.unwrap_or_else(|| facts.now.as_microsecond())));
            }
            if m.abort_requested && m.abort_status.as_deref() != Some("Failed") {
                changes.push(Change::Abort("Failed"));
            }
            changes.push(Change::Progress { pod: pod.name.clone() });
            changes.push(Change::Completed { downtime_us: f.stop_us.map(|stop| resume_us.saturating_sub(stop)) });
            plan.write(changes);
            if m.start.is_none() {
                plan.event("Migrating", "VirtualMachineInstance is migrating.");
            }
            plan.event("Migrated", format!("The VirtualMachineInstance migrated to node {}.", m.target_node));
        }
        Go::Lost(reason) => lost(facts, m, reason, plan),
        // The controller has given the guest up (the target's pod is gone, say): nobody is left to be told.
        Go::NotDue | Go::Trying(_) if facts.vmi.is_final() => {
            if link.is_some() {
                plan.act(Action::CloseSource);
            }
            fail(m, "the target was lost after the guest had been handed over".into(), plan);
        }
        // Its handler cannot say so any more: QEMU has ended with the pod, whether the go had reached it or not.
        Go::NotDue | Go::Trying(_) if let Some(why) = ended_unseen(facts, m) => lost(facts, m, why, plan),
        Go::NotDue | Go::Trying(_) => {
            // With a link the go is on its way, without waiting for this decision; it is repeated by the link itself.
            if link.is_none() && m.target_address.is_some() && m.port(channel::CONTROL).is_some() {
                plan.act(Action::Dial { pod: pod.name.clone(), memory: false });
            }
            plan.wake(REDIAL_AFTER);
        }
    }
}

/// Why the target has ended, unless the API says that the guest has lived there: then its end is its own affair.
fn ended_unseen<'a>(facts: &'a Facts, m: &MigrationView) -> Option<&'a str> {
    let arrived = m.target_ready || facts.vmi.node_name.as_deref() == Some(&m.target_node);
    facts.target_ended.as_deref().filter(|_| !arrived)
}

/// The guest was handed over and is nowhere. The memory here is stale by then, for all that is known, and is not run.
fn lost(facts: &Facts, m: &MigrationView, why: &str, plan: &mut Plan) {
    let reason = format!("the guest was handed over and is lost: {why}");
    let mut changes = Vec::new();
    if !facts.vmi.is_final() {
        changes.push(Change::Phase("Failed"));
        changes.push(Change::Unsynchronized(reason.clone()));
    }
    if m.abort_requested {
        changes.push(Change::Abort("Failed"));
    }
    let event = failed_message(&m.uid, &reason);
    changes.push(Change::Failed(reason));
    plan.write(changes);
    plan.warn("Migrated", event);
}

/// The guest stays; say so.
fn fail(m: &MigrationView, reason: String, plan: &mut Plan) {
    let mut changes = Vec::new();
    if m.abort_requested || m.abort_status.is_some() {
        changes.push(Change::Abort("Succeeded"));
    }
    changes.push(Change::Failed(reason.clone()));
    plan.write(changes);
    plan.warn("Migrated", failed_message(&m.uid, &reason));
}

fn failed_message(uid: &str, reason: &str) -> String {
    format!("VirtualMachineInstance migration uid {uid} failed. reason:{reason}")
}
