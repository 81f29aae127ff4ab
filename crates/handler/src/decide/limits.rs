//! The deadlines of a migration under way, and what is done when one has passed.
//!
//! In KubeVirt's order: a migration in post-copy has none (the guest runs at the target, there is no way back). When the time
//! for it is over (`completionTimeoutPerGiB`), or nothing has come nearer for `progressTimeout`, the guest may be disturbed if
//! that is allowed: it goes on in post-copy, or stands still until the rest is over, and has twice the time for that.
//! Otherwise, or when that does not help either, the migration is given up.
//!
//! KubeVirt compares what remains with the last look, so that a guest whose remainder goes up and down "progresses" for ever;
//! here only a new low counts. That is why a standstill of progress may disturb the guest as well: there it would have gone on
//! until its time was over.

use std::time::Duration;

use godwit_api::FailureCause;
use godwit_launcher::rpc::{MigrationFacts, MigrationMode};

use super::{Disruption, Failure};
use crate::expect;
use crate::facts::{Facts, MigrationView, Ordered, SourceView};

/// How long no byte may move before the link counts as cut (unless `progressTimeout` is shorter).
const STILL_LIMIT: Duration = Duration::from_secs(12);
/// Below this many bytes a second QEMU, which sends in bursts, is silent for as long without any fault of the link's.
const TRICKLE: u64 = 128 << 10;
/// How long QEMU may take to switch over after it was ordered to.
const SWITCH_WITHIN: Duration = Duration::from_secs(60);

/// What has to be done about a migration that does not end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Overdue {
    /// This.
    Disrupt(Disruption),
    /// Nothing helps.
    GiveUp(Failure),
}

/// Whether a deadline has passed, and what to do then. `link` is missing after a restart of the handler.
pub(super) fn overdue(
    facts: &Facts,
    m: &MigrationView,
    f: &MigrationFacts,
    link: Option<&SourceView>,
) -> Option<Overdue> {
    if facts.vmi.deleting {
        let reason = "the VirtualMachineInstance is being deleted";
        return Some(Overdue::GiveUp(Failure::new(FailureCause::GuestEnded, reason)));
    }
    if let Some(link) = link {
        let still = m.progress_limit.map_or(STILL_LIMIT, |limit| limit.min(STILL_LIMIT));
        let trickles = m.bandwidth > 0 && m.bandwidth < TRICKLE;
        if link.still >= still && !trickles {
            let seconds = link.still.as_secs();
            let reason = format!("no byte has moved for {seconds} seconds; the link to the target may be cut");
            return Some(Overdue::GiveUp(Failure::new(FailureCause::LinkLost, reason)));
        }
        if let Ordered::Given(since) = link.post_copy
            && since < SWITCH_WITHIN
        {
            return None;
        }
    }
    let held = MigrationMode::Paused == f.mode || link.is_some_and(|link| matches!(link.pause, Ordered::Given(_)));
    let limit = m.completion_limit.map(|limit| if held { limit * 2 } else { limit });
    let spent = limit.filter(|limit| facts.running_for.is_some_and(|elapsed| elapsed > *limit));
    let stuck = link.map(|link| link.stuck).filter(|stuck| m.progress_limit.is_some_and(|limit| *stuck >= limit));
    if spent.is_none() && stuck.is_none() {
        return if held { None } else { early(facts, m, f, link?) };
    }
    // Post-copy is of memory: disks that are still being copied may take the time of the pause, but not more.
    let may_follow = f.status == "setup" && link.is_some_and(|l| l.post_copy_offered && l.post_copy == Ordered::Not);
    if may_follow
        && m.allow_workload_disruption
        && m.allow_post_copy
        && stuck.is_none()
        && limit.is_none_or(|limit| facts.running_for.is_none_or(|elapsed| elapsed <= limit * 2))
    {
        return None;
    }
    if let Some(how) = link.filter(|_| !held).and_then(|link| disruption(m, f, link)) {
        return Some(Overdue::Disrupt(how));
    }
    let failure = match (stuck, spent) {
        (Some(stuck), _) => Failure::new(
            FailureCause::NoProgress,
            format!(
                "stuck for {} seconds: what remains to be sent has become no less (progressTimeout)",
                stuck.as_secs()
            ),
        ),
        (None, spent) => out_of_time(f, spent.unwrap_or_default()),
    };
    Some(Overdue::GiveUp(failure))
}

/// What cannot end is known before its time is over. Then the guest is disturbed at once where that is allowed, since it would
/// be in the end; and the migration is given up only where that is asked for: without either it goes on until its time is over,
/// as in KubeVirt, for the guest may become quieter.
fn early(facts: &Facts, m: &MigrationView, f: &MigrationFacts, link: &SourceView) -> Option<Overdue> {
    let state = facts.pods.get(&m.source_pod)?.launcher.last()?;
    if !(m.allow_workload_disruption || m.fail_when_not_converging) || !expect::is_hopeless(state, f, m, link.link_rate)
    {
        return None;
    }
    if let Some(how) = disruption(m, f, link) {
        return Some(Overdue::Disrupt(how));
    }
    let last = f.written.last().filter(|_| m.fail_when_not_converging)?;
    let reason = format!(
        "it would not end: during its last pass, which took {} ms, the guest wrote to {} MiB (failWhenNotConverging)",
        last.within_ms,
        last.bytes >> 20
    );
    Some(Overdue::GiveUp(Failure::new(FailureCause::NotConverging, reason)))
}

/// What may be done to the guest, the milder first.
fn disruption(m: &MigrationView, f: &MigrationFacts, link: &SourceView) -> Option<Disruption> {
    if !m.allow_workload_disruption {
        return None;
    }
    if m.allow_post_copy && f.post_copy_possible && link.post_copy == Ordered::Not {
        return Some(Disruption::PostCopy);
    }
    (link.pause == Ordered::Not).then_some(Disruption::Pause)
}

/// More time would have helped, or not: that is known once a whole pass was measured.
fn out_of_time(f: &MigrationFacts, limit: Duration) -> Failure {
    let seconds = limit.as_secs();
    if f.iteration >= 2 && f.bytes_per_second > 0 && f.dirty_bytes_per_second >= f.bytes_per_second {
        let reason = format!(
            "not completed after {seconds} seconds, and it would not be: the guest writes {} bytes a second, the link \
             carries {}",
            f.dirty_bytes_per_second, f.bytes_per_second
        );
        return Failure::new(FailureCause::NotConverging, reason);
    }
    Failure::new(FailureCause::OutOfTime, format!("not completed after {seconds} seconds (completionTimeoutPerGiB)"))
}
