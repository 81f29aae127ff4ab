//! The sending half, up to the progress it reports.

use godwit_launcher::rpc::forecast::Forecast;
use godwit_launcher::rpc::{Ability, CarriedFacts, RebootFacts};

use super::*;

#[test]
fn a_source_waits_for_the_target_then_dials_then_starts() {
    let running = || answers(state(DomainPhase::Running));
    assert!(orders(&decide(&source_facts(leaving(), running(), None))).is_empty());
    assert_eq!(orders(&decide(&source_facts(published(), running(), None))), ["dial old true"]);
    let dialling = SourceView { ready: false, ..link() };
    assert!(orders(&decide(&source_facts(published(), running(), Some(dialling)))).is_empty());
    assert_eq!(orders(&decide(&source_facts(published(), running(), Some(link())))), ["migrate old"]);
}

#[test]
fn a_guest_that_is_rebooting_is_sent_when_it_has_started_over() {
    let told = |given_up_us| {
        let reboot = Some(RebootFacts { asked_us: us(), given_up_us });
        decide(&source_facts(published(), answers(State { reboot, ..state(DomainPhase::Running) }), Some(link())))
    };
    assert!(orders(&told(None)).is_empty() && told(None).wake.is_some());
    assert_eq!(orders(&told(Some(us()))), ["migrate old"]);
}

#[test]
fn a_target_that_is_never_prepared_is_not_waited_for_for_ever() {
    let mut facts = source_facts(leaving(), answers(state(DomainPhase::Running)), None);
    assert_eq!(decide(&facts).wake, Some(Duration::from_secs(180)));
    facts.known_for = Duration::from_secs(181);
    let plan = decide(&facts);
    assert_eq!(failure(&plan), "Live migration failed: node node2 has not prepared the target within 180 s");
    assert_eq!(cause(&plan), FailureCause::TargetUnresponsive);
}

#[test]
fn a_target_out_of_reach_is_dialled_again_then_given_up() {
    let error = SourceView { ready: false, error: Some("no route to host".into()), ..link() };
    let plan = decide(&source_facts(published(), answers(state(DomainPhase::Running)), Some(error.clone())));
    assert_eq!(orders(&plan), ["dial old true"]);
    let late = SourceView { age: Duration::from_secs(31), ..error };
    let mut facts = source_facts(published(), answers(state(DomainPhase::Running)), Some(late));
    let plan = decide(&facts);
    assert_eq!(failure(&plan), "Live migration failed: no route to host");
    assert_eq!(cause(&plan), FailureCause::LinkLost);
    facts.peer_ended = Some("the target's pod new is gone".into());
    assert_eq!(cause(&decide(&facts)), FailureCause::TargetLost);
    assert_eq!(
        events(&plan),
        [(
            "Migrated",
            "VirtualMachineInstance migration uid mig-1 failed. reason:Live migration failed: no route to host"
        )]
    );
}

#[test]
fn a_start_that_the_launcher_refuses_fails_the_migration() {
    let refused = SourceView {
        start_error: Some(Failure::new(FailureCause::HypervisorError, "this uid has run before")),
        ..link()
    };
    let plan = decide(&source_facts(published(), answers(state(DomainPhase::Running)), Some(refused)));
    assert_eq!(failure(&plan), "Live migration failed: this uid has run before");
}

#[test]
fn the_start_and_then_progress_are_written() {
    let plan = decide(&source_facts(published(), answers(sent("active")), Some(link())));
    assert_eq!(writes(&plan)[0], Change::Started(us()));
    assert_eq!(events(&plan), [("Migrating", "VirtualMachineInstance is migrating.")]);
    let plan = decide(&source_facts(started(), answers(sent("active")), Some(link())));
    assert_eq!(writes(&plan)[0], Change::Progress { pod: "old".into() });
    let reported = SourceView { reported: Some(Duration::ZERO), ..link() };
    let plan = decide(&source_facts(started(), answers(sent("active")), Some(reported)));
    assert!(!writes(&plan).iter().any(|c| matches!(c, Change::Progress { .. })));
    assert_eq!(plan.wake, Some(REPORT));
}
const REPORT: Duration = Duration::from_secs(1);

#[test]
fn kubevirts_test_hooks_are_obeyed() {
    let mut facts = source_facts(published(), answers(state(DomainPhase::Running)), Some(link()));
    facts.vmi.fails_migration = true;
    let plan = decide(&facts);
    assert!(failure(&plan).contains("Failed migration to satisfy functional test condition"));
    assert!(orders(&plan).is_empty());
    let mut facts = target_facts(coming(), answers(state(DomainPhase::Undefined)), false);
    facts.vmi.blocks_target = true;
    assert_eq!(decide(&facts), Plan::default());
}

#[test]
fn what_was_asked_for_and_is_not_used_is_said() {
    let said = |m: MigrationView, post_copy_offered, tracks_writes| {
        let mut state = sent("active");
        state.ability = Ability { channels: 2, tracks_writes, ..Ability::default() };
        let link = SourceView { post_copy_offered, ..link() };
        let plan = decide(&source_facts(m, answers(state), Some(link)));
        events(&plan).into_iter().skip(1).map(|(_, said)| said.to_owned()).collect::<Vec<_>>()
    };
    let all = MigrationView {
        allow_post_copy: true,
        allow_workload_disruption: true,
        allow_auto_converge: true,
        ..published()
    };
    assert_eq!(said(all.clone(), true, true), [""; 0]);
    let told = said(all.clone(), false, false);
    assert!(told.len() == 2 && told[0].starts_with("Post-copy is allowed and cannot be used"), "{told:?}");
    assert!(told[1].starts_with("Auto-converge is allowed and has no effect"), "{told:?}");
    let told = said(MigrationView { allow_workload_disruption: false, ..all }, true, true);
    assert_eq!(told, ["Post-copy is allowed and is not used: allowWorkloadDisruption is off."]);
    assert_eq!(said(published(), false, false), [""; 0], "nothing was asked for");
}

#[test]
fn the_guest_is_measured_once_while_the_target_is_prepared() {
    let mut facts = source_facts(leaving(), answers(state(DomainPhase::Running)), None);
    facts.measure_asked = false;
    assert_eq!(orders(&decide(&facts)), ["measure old"]);
    facts.measure_asked = true;
    assert_eq!(orders(&decide(&facts)), [""; 0]);
}

#[test]
fn what_was_expected_is_written_once_with_the_start_or_as_soon_as_it_is_known() {
    let made = Prediction { at: now(), forecast: Forecast::default(), dirty: 1, rate: 2 };
    let known = SourceView { prediction: Some(made.clone()), ..link() };
    let told = |m: MigrationView, link: SourceView| {
        writes(&decide(&source_facts(m, answers(sent("active")), Some(link))))
            .contains(&Change::Forecast(Box::new(made.clone())))
    };
    assert!(told(published(), known.clone()));
    assert!(told(started(), known.clone()), "measured too late for the start");
    assert!(!told(published(), link()));
    assert!(!told(MigrationView { has_forecast: true, ..started() }, known));
}

/// What the launchers carry outlives the handler that opened its way; all that the next one lacks is the control channel.
#[test]
fn a_restarted_source_handler_follows_what_its_launcher_carries() {
    let carried = |status: &str| {
        let mut state = sent(status);
        state.migration.as_mut().unwrap().carried = Some(CarriedFacts { flows: true, ..CarriedFacts::default() });
        answers(state)
    };
    let dials = |launcher, link| {
        let plan = decide(&source_facts(started(), launcher, link));
        plan.actions.contains(&Action::Dial { pod: "old".into(), memory: false })
    };
    assert!(dials(carried("active"), None));
    assert!(!dials(carried("active"), Some(link())), "it has");
    assert!(!dials(answers(sent("active")), None), "its stream goes through the handlers, and is over");
    // It is asked what the target knows of a failure, as long as that is of use.
    let failed = |ago: i64| {
        let mut state = sent("failed");
        let facts = state.migration.as_mut().unwrap();
        (facts.carried, facts.end_us) = (Some(CarriedFacts::default()), Some(us() - ago));
        answers(state)
    };
    assert!(dials(failed(1_000_000), None));
    let plan = decide(&source_facts(started(), failed(60_000_000), None));
    let ended = plan.actions.iter().find_map(|action| match action {
        Action::Write(changes) => changes.iter().find_map(|change| match change {
            Change::Failed(failure) => Some(failure.reason.clone()),
            _ => None,
        }),
        _ => None,
    });
    assert!(ended.is_some_and(|reason| !reason.contains("stream broke")), "{plan:?}");
}
