//! From the point of no return to the end.

use super::*;

#[test]
fn the_end_is_written_when_the_go_is_confirmed_and_not_before() {
    let completed = || answers(with_stop(sent("completed"), us()));
    for go in [Go::NotDue, Go::Trying("no route to host".into())] {
        let waiting = SourceView { go, ..link() };
        let plan = decide(&source_facts(started(), completed(), Some(waiting)));
        assert!(plan.actions.is_empty() && plan.wake.is_some(), "{plan:?}");
    }
    let running = SourceView { go: Go::Running(us() + 2500), ..link() };
    let plan = decide(&source_facts(started(), completed(), Some(running)));
    assert_eq!(writes(&plan), [Change::Progress { pod: "old".into() }, Change::Completed { downtime_us: Some(2500) }]);
    assert_eq!(events(&plan), [("Migrated", "The VirtualMachineInstance migrated to node node2.")]);
}

#[test]
fn a_migration_quicker_than_the_api_still_has_a_start() {
    let running = SourceView { go: Go::Running(us()), ..link() };
    let plan = decide(&source_facts(published(), answers(sent("completed")), Some(running)));
    assert_eq!(writes(&plan)[0], Change::Started(us()));
    assert_eq!(events(&plan).len(), 2);
}

#[test]
fn a_restarted_source_handler_gives_the_go_again() {
    for launcher in [answers(sent("completed")), Launcher::Gone(Box::new(sent("completed")))] {
        let plan = decide(&source_facts(started(), launcher, None));
        assert_eq!(orders(&plan), ["dial old false"]);
        assert!(writes(&plan).is_empty());
    }
}

#[test]
fn a_source_that_handed_over_is_never_run_or_ended_before_the_go() {
    for phase in ["Running", "Failed"] {
        for link in [None, Some(link())] {
            let mut facts = source_facts(started(), answers(sent("completed")), link);
            facts.vmi.phase = phase.into();
            facts.vmi.deleting = true;
            let orders = orders(&decide(&facts));
            assert!(orders.iter().all(|o| o == "dial old false" || o == "close source"), "{orders:?}");
        }
    }
}

#[test]
fn a_guest_lost_at_the_target_is_failed() {
    let lost = SourceView { go: Go::Lost("QEMU was killed".into()), ..link() };
    let plan = decide(&source_facts(started(), answers(sent("completed")), Some(lost)));
    assert_eq!(writes(&plan)[0], Change::Phase("Failed"));
    assert!(failure(&plan).contains("QEMU was killed"));
    assert!(matches!(plan.actions.last(), Some(Action::Event { warning: true, .. })), "told after it is written");
}

#[test]
fn a_target_pod_that_ended_before_the_go_was_confirmed_is_a_lost_guest() {
    let completed = || answers(sent("completed"));
    for link in [None, Some(SourceView { go: Go::Trying("no route to host".into()), ..link() })] {
        let mut facts = source_facts(started(), completed(), link);
        facts.peer_ended = Some("its pod has failed".into());
        let plan = decide(&facts);
        assert_eq!(writes(&plan)[0], Change::Phase("Failed"));
        assert!(failure(&plan).contains("its pod has failed"));
        assert!(orders(&plan).is_empty(), "the source's memory is not run again");
    }
    // It ran there before: how it ended is not for this node to say.
    let mut facts = source_facts(MigrationView { target_ready: true, ..started() }, completed(), None);
    facts.peer_ended = Some("its pod has failed".into());
    assert!(writes(&decide(&facts)).is_empty());
    let running = SourceView { go: Go::Running(us()), ..link() };
    let mut facts = source_facts(started(), completed(), Some(running));
    facts.peer_ended = Some("its pod has failed".into());
    assert_eq!(failure(&decide(&facts)), "");
}

#[test]
fn a_guest_that_the_controller_gave_up_ends_the_waiting() {
    let mut facts = source_facts(started(), answers(sent("completed")), Some(link()));
    facts.vmi.phase = "Failed".into();
    let plan = decide(&facts);
    assert_eq!(orders(&plan), ["close source"]);
    assert!(!failure(&plan).is_empty());
}
