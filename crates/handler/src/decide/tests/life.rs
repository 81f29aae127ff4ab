//! A guest's own life.

use godwit_launcher::rpc::{RebootFacts, VolumeState};

use super::*;

#[test]
fn a_scheduled_vm_is_wired_then_started() {
    let plan = decide(&facts("Scheduled", vec![pod("a", answers(state(DomainPhase::Undefined)))]));
    assert_eq!(plan.actions[0], Action::Wire { pod: "a".into() });
    assert_eq!(plan.actions[1], Action::Start { pod: "a".into() });
    assert_eq!(events(&plan), [("Created", "VirtualMachineInstance defined.")]);
}

#[test]
fn a_launcher_that_does_not_answer_yet_is_waited_for() {
    assert_eq!(decide(&facts("Scheduled", vec![pod("a", Launcher::Waiting)])), Plan::default());
    assert_eq!(decide(&facts("Scheduled", vec![])), Plan::default());
}

#[test]
fn a_started_vm_becomes_running_once() {
    let mut facts = facts("Scheduled", vec![pod("a", answers(state(DomainPhase::Running)))]);
    let plan = decide(&facts);
    assert_eq!(writes(&plan), [Change::Phase("Running"), Change::Report { pod: "a".into() }]);
    assert_eq!(events(&plan), [("Started", "VirtualMachineInstance started.")]);
    facts.vmi.phase = "Running".into();
    let plan = decide(&facts);
    assert_eq!(writes(&plan), [Change::Report { pod: "a".into() }]);
    assert!(events(&plan).is_empty() && orders(&plan).is_empty());
}

#[test]
fn a_running_vm_is_never_started_again() {
    let plan = decide(&facts("Running", vec![pod("a", answers(state(DomainPhase::Undefined)))]));
    assert!(orders(&plan).is_empty());
    assert_eq!(writes(&plan), [Change::Phase("Failed")]);
}

#[test]
fn the_end_of_a_guest_is_told() {
    for launcher in [answers, |s| Launcher::Gone(Box::new(s))] {
        let plan = decide(&facts("Running", vec![pod("a", launcher(state(DomainPhase::Shutdown)))]));
        assert_eq!(writes(&plan), [Change::Phase("Succeeded")]);
        let plan = decide(&facts("Running", vec![pod("a", launcher(state(DomainPhase::Crashed)))]));
        assert_eq!(writes(&plan), [Change::Phase("Failed")]);
        let plan = decide(&facts("Failed", vec![pod("a", launcher(state(DomainPhase::Crashed)))]));
        assert_eq!(plan, Plan::default(), "told once");
        let plan = decide(&facts("Running", vec![pod("a", launcher(state(DomainPhase::MigratedAway)))]));
        assert!(writes(&plan).is_empty(), "a guest that has left has not ended");
    }
}

#[test]
fn a_deleted_vmi_is_shut_down_with_its_grace_once() {
    let mut facts = facts("Running", vec![pod("a", answers(state(DomainPhase::Running)))]);
    facts.vmi.deleting = true;
    let plan = decide(&facts);
    assert_eq!(orders(&plan), ["shutdown a 30"]);
    assert_eq!(events(&plan), [("ShuttingDown", "Signaled Graceful Shutdown")]);
    facts.pods.get_mut("a").unwrap().shutdown_ordered = Some(30);
    assert!(orders(&decide(&facts)).is_empty());
    facts.vmi.grace_seconds = 0;
    let plan = decide(&facts);
    assert_eq!(orders(&plan), ["shutdown a 0"], "a shorter grace counts");
    assert_eq!(events(&plan), [("Deleted", "Signaled Deletion")]);
}

#[test]
fn another_nodes_vmi_is_left_alone() {
    let mut facts = facts("Scheduled", vec![pod("a", answers(state(DomainPhase::Undefined)))]);
    facts.vmi.node_name = Some(OTHER.into());
    assert_eq!(decide(&facts), Plan::default());
}

#[test]
fn disks_come_and_go_while_the_guest_runs_but_not_while_it_moves() {
    let with = |disks: &[(&str, Option<u32>)]| {
        let disk = |(name, place): &(&str, Option<u32>)| VolumeState {
            name: (*name).into(),
            place: *place,
            ..VolumeState::default()
        };
        State { volumes: disks.iter().map(disk).collect(), ..state(DomainPhase::Running) }
    };
    let mut facts = facts("Running", vec![pod("a", answers(with(&[("root", None)])))]);
    let changes = |facts: &Facts| {
        let change = |action: Action| match action {
            Action::ChangeDisks { missing, .. } => Some(missing),
            _ => None,
        };
        decide(facts).actions.into_iter().find_map(change)
    };
    facts.vmi.hotpluggable = vec!["late".into()];
    assert_eq!(changes(&facts), None, "its claim is not there yet");
    facts.vmi.attached = vec!["late".into()];
    assert_eq!(changes(&facts), Some(vec!["late".into()]));
    facts.vmi.migration = Some(MigrationView { source_pod: "a".into(), ..leaving() });
    assert_eq!(changes(&facts), None, "both ends have the same disks");
    facts.vmi.migration = None;
    facts.pods = [("a".to_owned(), pod("a", answers(with(&[("root", None), ("late", Some(0))]))))].into();
    assert_eq!(changes(&facts), None, "it is there");
    facts.vmi.hotpluggable = Vec::new();
    facts.vmi.attached = Vec::new();
    assert_eq!(changes(&facts), Some(Vec::new()), "it is to go");
    facts.vmi.deleting = true;
    assert_eq!(changes(&facts), None);
}

#[test]
fn a_guest_that_did_not_hear_its_power_button_is_told_of_once() {
    let asked_us = us() - 120_000_000;
    let reboot = |given_up_us| Some(RebootFacts { asked_us, given_up_us });
    let with = |reboot| vec![pod("a", answers(State { reboot, ..state(DomainPhase::Running) }))];
    assert!(events(&decide(&facts("Running", with(reboot(None))))).is_empty());
    let mut facts = facts("Running", with(reboot(Some(us()))));
    let plan = decide(&facts);
    let said = "The guest has not powered down within 120 s of its power button, and runs on. Restart its VM, reset the \
                VirtualMachineInstance, or run a guest agent in it.";
    assert_eq!(events(&plan), [("SoftRebootFailed", said)]);
    assert!(plan.actions.contains(&Action::RebootTold { pod: "a".into(), asked_us }));
    facts.pods.get_mut("a").unwrap().reboot_told = Some(asked_us);
    assert!(events(&decide(&facts)).is_empty());
    // Another one, which the handler's predecessor has told of.
    facts.pods.get_mut("a").unwrap().reboot_told = None;
    facts.now += Duration::from_secs(61);
    assert!(events(&decide(&facts)).is_empty());
}
