//! The verdict over one run, from what the witness heard and from what was done: pure.

use super::plan::{Deed, Strike, Victim};

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
    /// The witness heard it again after everything was mended.
    pub beats: bool,
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

/// Whether the fault itself took the guest: it killed the one process that had the right to run it.
///
/// The right passes when the source's launcher has written down that the guest has left (docs/hand-over.md). A source that dies
/// without that takes the guest with it, and one that has must not; a target the other way round.
#[must_use]
pub fn is_excused(strike: &Strike, evidence: &Evidence) -> bool {
    let killed = evidence.landed && strike.deed == Deed::Kill;
    match strike.victim {
        Victim::SourceQemu | Victim::SourceLauncher => killed && !evidence.left,
        Victim::TargetQemu | Victim::TargetLauncher => killed && evidence.left,
        _ => false,
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
    if !evidence.told {
        broken.push(format!("never silent: the API does not say what is true; {}", evidence.words));
    }
    (outcome, broken)
}

#[cfg(test)]
mod tests {
    use super::super::plan::Moment;
    use super::*;
    use std::time::Duration;

    fn strike(victim: Victim, deed: Deed) -> Strike {
        Strike { victim, deed, moment: Moment::Sending, delay: Duration::ZERO, lasts: Duration::ZERO }
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
        let missed = Evidence { landed: false, ..lost(false) };
        assert!(broken(Victim::SourceQemu, Deed::Kill, missed), "nobody was hit");
    }

    #[test]
    fn what_does_not_end_or_is_not_told_is_broken() {
        let link = strike(Victim::Link, Deed::Cut);
        assert!(judge(&link, &Evidence { over: false, ..well() }).1.concat().contains("never stuck"));
        assert!(judge(&link, &Evidence { told: false, ..well() }).1.concat().contains("never silent"));
    }
}
