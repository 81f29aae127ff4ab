//! The verdict over one run, from what the witness heard and from what was done: pure.

use super::plan::{Deed, Strike, Victim};
use std::time::Duration;

/// A link that is silent for longer may be given up (docs/hand-over.md: 10 s), and memory goes on over another one.
const LINK_HOLDS: Duration = Duration::from_secs(8);

/// What became of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It runs at the target.
    Moved,
    /// It runs where it was.
    Stayed,
    /// It went with the process that was killed and alone had the right to run it.
    Lost,
}

impl Outcome {
    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Moved => "moved",
            Outcome::Stayed => "stayed",
            Outcome::Lost => "lost with the victim",
        }
    }
}

/// What is known when a run is over.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// The strike had a victim.
    pub landed: bool,
    /// The source's launcher has written down that the guest has left.
    pub left: bool,
    /// It left in post-copy, and when the fault came not all of its memory had followed.
    pub follows: bool,
    /// It left in post-copy, and its migration had failed before the fault came.
    pub failed_before: bool,
    /// The link over which its memory came was broken, by this run or by another one beside it, before the target's QEMU had read
    /// the devices' state.
    pub early: bool,
    /// It was broken once more before memory had gone on over another one, and this QEMU does not get over that.
    pub again: bool,
    /// It was broken when all had been sent and not all had arrived, and this QEMU does not get over that.
    pub spent: bool,
    /// It was fenced: its node, or the control plane, was away for too long, by this run's fault or by those beside it
    /// (docs/fencing.md).
    pub fenced: bool,
    /// The witness heard it again after everything was mended.
    pub beats: bool,
    /// Where it has a disk: it has not been through all of it since.
    pub unread: bool,
    /// What the API says in the end that came of the cancellation (`abortStatus`), if this migration was cancelled.
    pub cancelled: Option<String>,
    /// From the place where it was before.
    pub at_source: bool,
    /// What the witness complains of.
    pub complaint: Option<String>,
    /// The API says in the end that the migration is over.
    pub over: bool,
    /// The API says in the end that the guest runs where it runs, or that it has ended.
    pub told: bool,
    /// The VMI's and the migration's last state, for people.
    pub words: String,
}

/// Whether a fault breaks the link that carries memory. It goes through the launchers, not through the handlers.
#[must_use]
pub fn breaks_link(strike: &Strike) -> bool {
    strike.deed == Deed::Cut && strike.lasts >= LINK_HOLDS
}

/// Whether the fault itself took the guest: it killed the one process that had the right to run it, or kept its node from renewing
/// its lease.
///
/// The right passes when the source's launcher has written down that the guest has left (docs/hand-over.md). A source that dies
/// without that takes the guest with it, and one that has must not; a target the other way round. In post-copy each end has a
/// part of the guest until all of its memory has followed, so the death of either takes it; that of the link between them does not.
#[must_use]
pub fn is_excused(strike: &Strike, evidence: &Evidence) -> bool {
    if evidence.fenced {
        return true;
    }
    let killed = evidence.landed && strike.deed == Deed::Kill;
    let link_lost_it = evidence.early || evidence.again || evidence.spent;
    // Whatever this fault hit, it came too late to take the guest; those of other runs did not.
    if evidence.failed_before && evidence.left {
        return link_lost_it;
    }
    if evidence.follows && evidence.left {
        let needed = [Victim::SourceQemu, Victim::TargetQemu, Victim::SourceLauncher, Victim::TargetLauncher];
        return link_lost_it || killed && needed.contains(&strike.victim);
    }
    match strike.victim {
        Victim::SourceQemu | Victim::SourceLauncher => killed && !evidence.left,
        Victim::TargetQemu | Victim::TargetLauncher => killed && evidence.left,
        _ => false,
    }
}

/// Whether a fault keeps a node, or all of them, from renewing its lease.
#[must_use]
pub fn silences(strike: &Strike) -> bool {
    use Victim::{ControlPlane, SourceHandler, SourceUplink, TargetHandler, TargetUplink};
    matches!(strike.victim, SourceHandler | TargetHandler | ControlPlane | SourceUplink | TargetUplink)
}

/// Whether a cancellation, if there was one, is answered with what came of it: the guest, which lives, stayed or was gone.
#[must_use]
pub fn answers(evidence: &Evidence) -> bool {
    match evidence.cancelled.as_deref() {
        None => true,
        Some(said) => said == if evidence.at_source { "Succeeded" } else { "Failed" },
    }
}

/// What became of the guest, and every promise that was broken.
#[must_use]
pub fn judge(strike: &Strike, evidence: &Evidence) -> (Outcome, Vec<String>) {
    let mut broken = Vec::new();
    if let Some(complaint) = &evidence.complaint {
        broken.push(format!("never two: {complaint}"));
    }
    let outcome = match (evidence.beats, evidence.at_source) {
        (true, true) => Outcome::Stayed,
        (true, false) => Outcome::Moved,
        (false, _) => Outcome::Lost,
    };
    if outcome == Outcome::Lost && !is_excused(strike, evidence) {
        broken.push(format!("never none: nobody runs the guest, and no fault took it; {}", evidence.words));
    }
    if !evidence.over {
        broken.push(format!("never stuck: the migration does not end; {}", evidence.words));
    }
    if outcome != Outcome::Lost && evidence.unread {
        broken.push(format!("kept: the guest has not been through its disk in time; {}", evidence.words));
    }
    if outcome != Outcome::Lost && !answers(evidence) {
        let said = evidence.cancelled.as_deref().unwrap_or_default();
        broken.push(format!(
            "never silent: the API says {said:?} of the cancellation, and the guest has {}; {}",
            outcome.name(),
            evidence.words
        ));
    }
    if !evidence.told {
        broken.push(format!("never silent: the API does not say what is true; {}", evidence.words));
    }
    (outcome, broken)
}

#[cfg(test)]
mod tests {
    use super::super::plan::{Manner, Moment};
    use super::*;

    fn strike(victim: Victim, deed: Deed) -> Strike {
        Strike {
            manner: Manner::PreCopy,
            victim,
            deed,
            moment: Moment::Sending,
            delay: Duration::ZERO,
            lasts: Duration::ZERO,
            cancelled: None,
        }
    }

    fn well() -> Evidence {
        Evidence { landed: true, beats: true, over: true, told: true, ..Evidence::default() }
    }

    #[test]
    fn a_guest_that_beats_at_one_place_is_right() {
        let link = strike(Victim::Link, Deed::Cut);
        assert_eq!(judge(&link, &well()), (Outcome::Moved, vec![]));
        assert_eq!(judge(&link, &Evidence { at_source: true, ..well() }), (Outcome::Stayed, vec![]));
        let twice = Evidence { complaint: Some("twice".into()), ..well() };
        assert!(judge(&link, &twice).1.concat().contains("never two"));
    }

    #[test]
    fn only_the_death_of_who_had_the_right_to_run_excuses_a_loss() {
        let lost = |left| Evidence { beats: false, left, ..well() };
        let broken = |victim, deed, evidence| !judge(&strike(victim, deed), &evidence).1.is_empty();
        for victim in [Victim::SourceQemu, Victim::SourceLauncher] {
            assert!(!broken(victim, Deed::Kill, lost(false)));
            assert!(broken(victim, Deed::Kill, lost(true)), "the target had the right");
            assert!(broken(victim, Deed::Stop, lost(false)));
        }
        for victim in [Victim::TargetQemu, Victim::TargetLauncher] {
            assert!(broken(victim, Deed::Kill, lost(false)), "the source had the right");
            assert!(!broken(victim, Deed::Kill, lost(true)));
            assert!(broken(victim, Deed::Stop, lost(true)));
        }
        for victim in [Victim::SourceHandler, Victim::TargetHandler, Victim::ControlPlane] {
            assert!(broken(victim, Deed::Kill, lost(true)));
        }
        assert!(broken(Victim::Link, Deed::Cut, lost(true)));
        assert!(!broken(Victim::TargetHandler, Deed::Stop, Evidence { fenced: true, ..lost(true) }));
        let missed = Evidence { landed: false, ..lost(false) };
        assert!(broken(Victim::SourceQemu, Deed::Kill, missed), "nobody was hit");
    }

    #[test]
    fn in_post_copy_both_ends_are_needed_and_the_link_is_not() {
        let lost = |follows| Evidence { beats: false, left: true, follows, ..well() };
        let broken = |victim, deed, evidence| !judge(&strike(victim, deed), &evidence).1.is_empty();
        for victim in [Victim::SourceQemu, Victim::SourceLauncher] {
            assert!(!broken(victim, Deed::Kill, lost(true)));
            assert!(broken(victim, Deed::Kill, lost(false)), "all had followed");
            assert!(broken(victim, Deed::Stop, lost(true)));
        }
        for (victim, deed) in
            [(Victim::SourceHandler, Deed::Kill), (Victim::Link, Deed::Cut), (Victim::Migration, Deed::Cancel)]
        {
            assert!(broken(victim, deed, lost(true)), "it goes on over another link");
            let (early, again) = (Evidence { early: true, ..lost(true) }, Evidence { again: true, ..lost(true) });
            assert!(!broken(victim, deed, early.clone()), "the target may not have read the devices' state");
            assert!(!broken(victim, deed, again), "this QEMU may have been comparing");
            let spent = Evidence { spent: true, ..lost(true) };
            assert!(!broken(victim, deed, spent), "this QEMU does not hear of a break then");
            assert!(broken(victim, deed, Evidence { follows: false, ..early }));
        }
    }

    #[test]
    fn a_guest_that_was_lost_before_the_fault_is_excused_by_the_link_alone() {
        let lost = Evidence { beats: false, left: true, failed_before: true, ..well() };
        for (victim, deed) in [(Victim::TargetHandler, Deed::Stop), (Victim::TargetQemu, Deed::Kill)] {
            let broken = |evidence| !judge(&strike(victim, deed), &evidence).1.is_empty();
            assert!(broken(lost.clone()), "{victim:?}");
            assert!(!broken(Evidence { again: true, ..lost.clone() }), "{victim:?}");
        }
    }

    #[test]
    fn a_cancellation_is_answered_with_what_came_of_it() {
        let cancel = strike(Victim::Migration, Deed::Cancel);
        let told = |said: &str, at_source| {
            let evidence = Evidence { cancelled: Some(said.into()), at_source, ..well() };
            judge(&cancel, &evidence).1.concat()
        };
        assert_eq!(told("Succeeded", true) + &told("Failed", false), "");
        for (said, at_source) in [("Succeeded", false), ("Failed", true), ("Aborting", true), ("", false)] {
            assert!(told(said, at_source).contains("never silent"), "{said} {at_source}");
        }
    }

    #[test]
    fn a_disk_that_is_not_read_through_is_broken() {
        let disk = Strike { manner: Manner::Disk, ..strike(Victim::Link, Deed::Cut) };
        assert!(judge(&disk, &Evidence { unread: true, ..well() }).1.concat().contains("kept"));
    }

    #[test]
    fn what_does_not_end_or_is_not_told_is_broken() {
        let link = strike(Victim::Link, Deed::Cut);
        assert!(judge(&link, &Evidence { over: false, ..well() }).1.concat().contains("never stuck"));
        assert!(judge(&link, &Evidence { told: false, ..well() }).1.concat().contains("never silent"));
    }
}
