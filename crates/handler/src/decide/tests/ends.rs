//! Migrations that end with the guest where it was.

use godwit_launcher::rpc::{CarriedFacts, Cause};

use super::*;
use crate::facts::TargetSays;

fn told(ended: bool, words: Option<&str>, cause: Option<Cause>) -> TargetSays {
    TargetSays::Told { ended, words: words.map(str::to_owned), cause }
}

/// QEMU at the source says `failed`, as it mostly does, because the stream broke.
fn broken() -> State {
    let mut state = sent("failed");
    let facts = state.migration.as_mut().unwrap();
    facts.error = Some("Unable to write to socket: Broken pipe".into());
    facts.cause = Some(Cause::LinkLost);
    facts.end_us = Some(us());
    state
}

fn ends_with(state: State, target: TargetSays) -> Plan {
    decide(&source_facts(started(), answers(state), Some(SourceView { target, ..link() })))
}

#[test]
fn a_failed_migration_leaves_the_guest_and_says_why() {
    let plan = ends_with(broken(), told(false, None, None));
    assert_eq!(failure(&plan), "Live migration failed: Unable to write to socket: Broken pipe");
    assert!(orders(&plan).is_empty());
    assert!(writes(&plan).contains(&Change::Report { pod: "old".into() }), "the guest's life goes on");
}

#[test]
fn what_the_target_knows_makes_the_cause() {
    for (says, expected) in [
        (told(true, Some("QEMU was killed by signal 9"), Some(Cause::Killed)), FailureCause::TargetLost),
        (told(true, Some("QEMU has ended"), None), FailureCause::TargetLost),
        (told(false, Some("Length mismatch: pc.ram"), Some(Cause::RefusedMachine)), FailureCause::TargetRefusedMachine),
        (told(true, Some("load of 'cpu'"), Some(Cause::RefusedCpu)), FailureCause::TargetRefusedCpu),
        (told(true, Some("Could not open"), Some(Cause::RefusedStorage)), FailureCause::TargetRefusedStorage),
        (told(false, None, None), FailureCause::LinkLost),
        (told(true, Some("Connection reset"), Some(Cause::LinkLost)), FailureCause::LinkLost),
        (TargetSays::NoHandler("connection refused".into()), FailureCause::TargetUnresponsive),
        (TargetSays::Unreachable("no route to host".into()), FailureCause::LinkLost),
    ] {
        let plan = ends_with(broken(), says.clone());
        assert_eq!(cause(&plan), expected, "{says:?}");
        let words = match says {
            TargetSays::Told { words, .. } => words,
            TargetSays::NoHandler(words) | TargetSays::Unreachable(words) => Some(words),
            TargetSays::Nothing => None,
        };
        let reason = failure(&plan);
        assert!(reason.starts_with("Live migration failed: Unable to write to socket"), "{reason}");
        assert!(words.is_none_or(|words| reason.contains(&words)), "{reason}");
    }
    // The source's own trouble, and the target waits in vain.
    let mut own = broken();
    let facts = own.migration.as_mut().unwrap();
    (facts.error, facts.cause) = (Some("Could not allocate memory".into()), Some(Cause::Other));
    assert_eq!(cause(&ends_with(own, told(false, None, None))), FailureCause::HypervisorError);
}

#[test]
fn a_stream_that_nobody_acknowledged_was_cut_whatever_became_of_the_target_then() {
    let ended = |timed_out| {
        let mut state = broken();
        let carried = CarriedFacts { timed_out, error: Some("it broke".into()), ..CarriedFacts::default() };
        state.migration.as_mut().unwrap().carried = Some(carried);
        let mut facts = source_facts(started(), answers(state), Some(link()));
        facts.peer_ended = Some("the target's pod new has ended (Failed)".into());
        cause(&decide(&facts))
    };
    assert_eq!((ended(true), ended(false)), (FailureCause::LinkLost, FailureCause::TargetLost));
}

#[test]
fn the_targets_word_is_waited_for_but_not_for_ever() {
    let mut facts = source_facts(started(), answers(broken()), Some(link()));
    let plan = decide(&facts);
    assert_eq!(failed(&plan), None);
    assert!(plan.wake.is_some());
    facts.now = now() + jiff::SignedDuration::from_secs(9);
    assert_eq!(cause(&decide(&facts)), FailureCause::LinkLost);
    // The API may know more than the link.
    facts.now = now();
    facts.peer_ended = Some("the target's pod new has ended (Failed)".into());
    let plan = decide(&facts);
    assert_eq!(cause(&plan), FailureCause::TargetLost);
    assert!(failure(&plan).contains("has ended (Failed)"));
}

#[test]
fn a_stream_that_broke_with_its_own_handler_is_the_sources_fault() {
    let plan = decide(&source_facts(started(), answers(broken()), None));
    assert_eq!(cause(&plan), FailureCause::SourceUnresponsive);
}

#[test]
fn a_guest_that_ends_on_the_way_is_no_failure_of_the_target() {
    for (status, phase, expected) in [
        ("failed", DomainPhase::Crashed, FailureCause::SourceLost),
        ("active", DomainPhase::Crashed, FailureCause::SourceLost),
        ("active", DomainPhase::Shutdown, FailureCause::GuestEnded),
    ] {
        let state = State { phase, ..sent(status) };
        let plan = ends_with(state, TargetSays::Nothing);
        assert_eq!(cause(&plan), expected, "{status} {phase:?}");
        let end = if phase == DomainPhase::Shutdown { "Succeeded" } else { "Failed" };
        assert!(writes(&plan).contains(&Change::Phase(end)));
    }
}

#[test]
fn what_a_predecessor_gave_up_keeps_its_cause() {
    let m = MigrationView { cause: Some(FailureCause::OutOfTime), ..started() };
    // It is not cancelled again, and a guest that is quicker is not called failed.
    assert!(orders(&decide(&source_facts(m.clone(), answers(sent("active")), None))).is_empty());
    for status in ["cancelled", "failed"] {
        let plan = decide(&source_facts(m.clone(), answers(sent(status)), None));
        assert_eq!(cause(&plan), FailureCause::OutOfTime);
        assert!(failure(&plan).starts_with("Live migration has been aborted"));
    }
}

#[test]
fn an_abort_before_the_start_needs_no_cancel() {
    let m = MigrationView { abort_requested: true, ..published() };
    let plan = decide(&source_facts(m, answers(state(DomainPhase::Running)), Some(link())));
    assert_eq!(writes(&plan)[..2], [Change::Abort("Succeeded"), Change::Failed(aborted())]);
    assert!(orders(&plan).is_empty());
}

#[test]
fn an_abort_under_way_is_cancelled_once_and_confirmed() {
    let m = MigrationView { abort_requested: true, ..started() };
    let plan = decide(&source_facts(m.clone(), answers(sent("active")), Some(link())));
    assert_eq!(orders(&plan), ["cancel old"]);
    assert_eq!(writes(&plan)[0], Change::Abort("Aborting"));
    assert_eq!(events(&plan), [("Migrating", "VirtualMachineInstance is aborting migration.")]);
    let m = MigrationView { abort_status: Some("Aborting".into()), ..m };
    assert!(orders(&decide(&source_facts(m.clone(), answers(sent("cancelling")), Some(link())))).is_empty());
    let plan = decide(&source_facts(m, answers(sent("cancelled")), Some(link())));
    let progress = Change::Progress { pod: "old".into() };
    assert_eq!(writes(&plan)[..3], [progress, Change::Abort("Succeeded"), Change::Failed(aborted())]);
}

#[test]
fn an_abort_that_comes_too_late_lets_the_migration_succeed() {
    let m = MigrationView { abort_requested: true, abort_status: Some("Aborting".into()), ..started() };
    let running = SourceView { go: Go::Running(us()), ..link() };
    let plan = decide(&source_facts(m, answers(sent("completed")), Some(running)));
    assert!(writes(&plan).contains(&Change::Abort("Failed")));
    assert!(writes(&plan).iter().any(|c| matches!(c, Change::Completed { .. })));
    assert_eq!(failure(&plan), "");
}

#[test]
fn deleting_a_migrating_vmi_cancels_first_and_shuts_down_afterwards() {
    let mut facts = source_facts(started(), answers(sent("active")), Some(link()));
    facts.vmi.deleting = true;
    assert!(orders(&decide(&facts)).contains(&"cancel old".to_owned()));
    let mut facts = source_facts(published(), answers(state(DomainPhase::Running)), None);
    facts.vmi.deleting = true;
    let plan = decide(&facts);
    assert!(failure(&plan).contains("is being deleted"));
    assert_eq!(cause(&plan), FailureCause::GuestEnded);
    assert_eq!(orders(&plan), ["shutdown old 30"]);
}

#[test]
fn a_source_whose_launcher_died_before_the_hand_over_fails_the_migration() {
    let plan = decide(&source_facts(started(), Launcher::Gone(Box::new(sent("active"))), Some(link())));
    assert!(failure(&plan).contains("launcher is gone"));
    assert_eq!(cause(&plan), FailureCause::SourceLost);
}

#[test]
fn what_the_api_started_and_the_launcher_does_not_know_has_failed() {
    let plan = decide(&source_facts(started(), answers(state(DomainPhase::Running)), None));
    assert!(failure(&plan).contains("no record"));
}

#[test]
fn facts_of_an_earlier_migration_do_not_count() {
    let mut old = sent("failed");
    old.migration.as_mut().unwrap().uid = "mig-0".into();
    let plan = decide(&source_facts(published(), answers(old.clone()), None));
    assert_eq!(orders(&plan), ["dial old true"]);
    // Nor does the migration by which the guest came here.
    old.migration.as_mut().unwrap().uid = UID.into();
    old.migration.as_mut().unwrap().role = MigrationRole::Target;
    let plan = decide(&source_facts(published(), answers(old), None));
    assert_eq!(orders(&plan), ["dial old true"]);
}

#[test]
fn channels_of_another_migration_are_closed_first() {
    let stale = SourceView { uid: "mig-0".into(), ..link() };
    let plan = decide(&source_facts(published(), answers(state(DomainPhase::Running)), Some(stale)));
    assert_eq!(orders(&plan), ["close source"]);
}

#[test]
fn a_source_is_ended_after_the_guest_has_left() {
    let m = MigrationView { completed: true, ..started() };
    let mut facts = source_facts(m, answers(sent("completed")), Some(link()));
    facts.vmi.node_name = Some(OTHER.into());
    let plan = decide(&facts);
    assert_eq!(orders(&plan), ["close source", "shutdown old 0"]);
    assert_eq!(events(&plan), [("Deleted", "Signaled Deletion")]);
    facts.pods.get_mut("old").unwrap().shutdown_ordered = Some(0);
    facts.source = None;
    assert_eq!(decide(&facts), Plan::default());
    // A launcher that has not handed over is not touched, whatever the API says.
    facts.pods.insert("old".into(), pod("old", answers(state(DomainPhase::Running))));
    assert_eq!(decide(&facts), Plan::default());
}

#[test]
fn after_a_failed_migration_the_guest_lives_on_in_the_source_pod() {
    let m = MigrationView { completed: true, failed: true, ..started() };
    let plan = decide(&source_facts(m, answers(sent("failed")), Some(link())));
    assert_eq!(orders(&plan), ["close source"]);
    assert_eq!(writes(&plan), [Change::Report { pod: "old".into() }]);
}

#[test]
fn what_is_left_of_a_guest_that_was_lost_on_the_way_is_ended() {
    let m = MigrationView { completed: true, failed: true, ..started() };
    let mut facts = source_facts(m, answers(sent("postcopy-paused")), None);
    facts.vmi.phase = "Failed".into();
    assert_eq!(orders(&decide(&facts)), ["shutdown old 0"]);
    facts.pods.insert("old".into(), pod("old", answers(sent("cancelled"))));
    assert!(orders(&decide(&facts)).is_empty(), "a guest that stayed is not touched");
}
