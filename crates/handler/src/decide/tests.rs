//! Each situation that a handler meets, and what it does then.

use godwit_launcher::rpc::{MigrationFacts, MigrationRole, State};
use jiff::Timestamp;

use super::*;
use crate::facts::{Go, SourceView, TargetView, VmiView};

const ME: &str = "node1";
const OTHER: &str = "node2";
const UID: &str = "mig-1";

fn now() -> Timestamp {
    "2026-11-20T20:00:00Z".parse().unwrap()
}

fn us() -> i64 {
    now().as_microsecond()
}

fn state(phase: DomainPhase) -> State {
    State { vmi_uid: "vmi".into(), phase, ..State::default() }
}

fn answers(state: State) -> Launcher {
    Launcher::Answers(Box::new(state))
}

fn pod(name: &str, launcher: Launcher) -> PodView {
    PodView { name: name.into(), migration_uid: None, terminal: false, shutdown_ordered: None, launcher }
}

fn facts(phase: &str, pods: Vec<PodView>) -> Facts {
    Facts {
        target_ended: None,
        node: ME.into(),
        now: now(),
        vmi: VmiView { phase: phase.into(), grace_seconds: 30, node_name: Some(ME.into()), ..VmiView::default() },
        known_for: Duration::ZERO,
        pods: pods.into_iter().map(|p| (p.name.clone(), p)).collect(),
        target: None,
        source: None,
    }
}

/// A migration away from this node, handed over by the controller.
fn leaving() -> MigrationView {
    MigrationView {
        uid: UID.into(),
        source_node: ME.into(),
        target_node: OTHER.into(),
        source_pod: "old".into(),
        target_pod: "new".into(),
        completion_timeout_per_gib: 800,
        progress_timeout: 150,
        ..MigrationView::default()
    }
}

/// The same once the target has published where it listens.
fn published() -> MigrationView {
    MigrationView {
        target_address: Some("10.88.0.12".into()),
        ports: [("4000".to_owned(), 0), ("4001".to_owned(), 49152)].into(),
        detected: true,
        ..leaving()
    }
}

fn started() -> MigrationView {
    MigrationView { start: Some(now()), ..published() }
}

fn sent(status: &str) -> State {
    let mut facts = MigrationFacts::new(UID, MigrationRole::Source);
    facts.status = status.into();
    facts.start_us = Some(us());
    // As the launcher does it: with `completed` the guest has left.
    let phase = if status == "completed" { DomainPhase::MigratedAway } else { DomainPhase::Running };
    State { migration: Some(facts), ..state(phase) }
}

fn with_stop(mut state: State, stop_us: i64) -> State {
    state.migration.as_mut().unwrap().stop_us = Some(stop_us);
    state
}

fn source_facts(m: MigrationView, launcher: Launcher, link: Option<SourceView>) -> Facts {
    let mut facts = facts("Running", vec![pod("old", launcher)]);
    facts.vmi.migration = Some(m);
    facts.source = link;
    facts
}

fn link() -> SourceView {
    SourceView { uid: UID.into(), ready: true, ..SourceView::default() }
}

/// A migration to this node.
fn coming() -> MigrationView {
    MigrationView { source_node: OTHER.into(), target_node: ME.into(), ..leaving() }
}

fn received(phase: DomainPhase, gone: bool) -> State {
    let mut facts = MigrationFacts::new(UID, MigrationRole::Target);
    facts.gone = gone;
    facts.resume_us = gone.then(us);
    State { migration: Some(facts), ..state(phase) }
}

fn target_facts(m: MigrationView, launcher: Launcher, open: bool) -> Facts {
    let mut new = pod("new", launcher);
    new.migration_uid = Some(UID.into());
    let mut facts = facts("Running", vec![new]);
    facts.vmi.node_name = Some(OTHER.into());
    facts.vmi.migration = Some(m);
    facts.target = open.then(|| TargetView {
        uid: UID.into(),
        address: "10.88.0.11".into(),
        ports: [("4000".to_owned(), 0), ("4001".to_owned(), 49152)].into(),
    });
    facts
}

fn writes(plan: &Plan) -> Vec<Change> {
    plan.actions
        .iter()
        .filter_map(|a| if let Action::Write(c) = a { Some(c.clone()) } else { None })
        .flatten()
        .collect()
}

fn events(plan: &Plan) -> Vec<(&str, &str)> {
    plan.actions
        .iter()
        .filter_map(|a| {
            if let Action::Event { reason, message, .. } = a { Some((*reason, message.as_str())) } else { None }
        })
        .collect()
}

/// What would touch a launcher, in short.
fn orders(plan: &Plan) -> Vec<String> {
    plan.actions
        .iter()
        .filter_map(|a| match a {
            Action::Write(_) | Action::Event { .. } | Action::Wire { .. } => None,
            Action::Start { pod } => Some(format!("start {pod}")),
            Action::PrepareTarget { pod, .. } => Some(format!("prepare {pod}")),
            Action::OpenControl { pod, .. } => Some(format!("control {pod}")),
            Action::CloseTarget => Some("close target".into()),
            Action::Abandon { pod, uid } => Some(format!("abandon {pod} {uid}")),
            Action::Dial { pod, memory } => Some(format!("dial {pod} {memory}")),
            Action::Migrate { pod } => Some(format!("migrate {pod}")),
            Action::Cancel { pod, .. } => Some(format!("cancel {pod}")),
            Action::CloseSource => Some("close source".into()),
            Action::Shutdown { pod, grace_seconds } => Some(format!("shutdown {pod} {grace_seconds}")),
        })
        .collect()
}

fn failure(plan: &Plan) -> String {
    writes(plan)
        .into_iter()
        .find_map(|c| if let Change::Failed(reason) = c { Some(reason) } else { None })
        .unwrap_or_default()
}

// A guest's own life.

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

// The receiving half.

#[test]
fn a_target_is_prepared_and_published() {
    let plan = decide(&target_facts(coming(), answers(state(DomainPhase::Undefined)), false));
    assert_eq!(plan.actions[0], Action::Wire { pod: "new".into() });
    assert_eq!(orders(&plan), ["prepare new"]);

    let plan = decide(&target_facts(coming(), answers(received(DomainPhase::Incoming, false)), true));
    assert_eq!(writes(&plan), [Change::Published]);
    assert_eq!(
        events(&plan),
        [
            ("PreparingTarget", "VirtualMachineInstance Migration Target Prepared."),
            ("PreparingTarget", "Migration Target is listening at 10.88.0.11, on ports: 4000,4001"),
        ]
    );

    let m = MigrationView { source_node: OTHER.into(), target_node: ME.into(), ..published() };
    let m = MigrationView { target_address: Some("10.88.0.11".into()), ..m };
    let plan = decide(&target_facts(m, answers(received(DomainPhase::Incoming, false)), true));
    assert_eq!(plan, Plan::default(), "nothing to do until the go");
}

#[test]
fn a_restarted_target_handler_opens_its_channels_again() {
    let plan = decide(&target_facts(coming(), answers(received(DomainPhase::Incoming, false)), false));
    assert_eq!(orders(&plan), ["prepare new"], "nobody has connected: all of it");
    let mut loaded = received(DomainPhase::Incoming, false);
    loaded.migration.as_mut().unwrap().status = "completed".into();
    let plan = decide(&target_facts(coming(), answers(loaded), false));
    assert_eq!(orders(&plan), ["control new"], "the stream is over: the go can still be received");
    let plan = decide(&target_facts(coming(), answers(received(DomainPhase::Running, true)), false));
    assert_eq!(orders(&plan), ["control new"], "the source may not know yet that the guest runs");
}

#[test]
fn a_target_never_runs_the_guest_or_gives_it_up_by_itself() {
    for launcher in [
        answers(received(DomainPhase::Incoming, false)),
        answers(state(DomainPhase::Crashed)),
        Launcher::Gone(Box::new(received(DomainPhase::Incoming, false))),
    ] {
        for open in [true, false] {
            let orders = orders(&decide(&target_facts(started(), launcher.clone(), open)));
            assert!(orders.iter().all(|o| !o.starts_with("abandon") && !o.starts_with("shutdown")), "{orders:?}");
        }
    }
}

#[test]
fn the_arrival_is_written() {
    let plan = decide(&target_facts(coming(), answers(received(DomainPhase::Running, true)), true));
    assert_eq!(writes(&plan), [Change::Arrived { resume_us: us() }, Change::Report { pod: "new".into() }]);

    // The source has written the end before this node wrote the arrival.
    let m = MigrationView { completed: true, ..coming() };
    let plan = decide(&target_facts(m.clone(), answers(received(DomainPhase::Running, true)), true));
    assert_eq!(writes(&plan)[0], Change::Arrived { resume_us: us() });
    assert!(orders(&plan).contains(&"close target".to_owned()));

    let m = MigrationView { target_ready: true, ..m };
    let mut facts = target_facts(m, answers(received(DomainPhase::Running, true)), false);
    facts.vmi.node_name = Some(ME.into());
    assert_eq!(writes(&decide(&facts)), [Change::Report { pod: "new".into() }], "an ordinary life begins");
}

#[test]
fn a_target_reports_the_end_itself_when_the_source_does_not() {
    let m = MigrationView {
        target_ready: true,
        target_address: Some("10.88.0.11".into()),
        ports: published().ports,
        detected: true,
        ..coming()
    };
    let mut facts = target_facts(m, answers(received(DomainPhase::Running, true)), true);
    facts.vmi.node_name = Some(ME.into());
    let plan = decide(&facts);
    assert!(writes(&plan).is_empty() && plan.wake.is_some());
    facts.now = now() + jiff::SignedDuration::from_secs(31);
    assert_eq!(writes(&decide(&facts)), [Change::Completed { downtime_us: None }]);
}

#[test]
fn a_target_of_a_failed_migration_is_abandoned() {
    let m = MigrationView { completed: true, failed: true, ..coming() };
    let plan = decide(&target_facts(m.clone(), answers(received(DomainPhase::Incoming, false)), true));
    assert_eq!(orders(&plan), ["close target", &format!("abandon new {UID}")]);
    let plan = decide(&target_facts(m.clone(), answers(state(DomainPhase::Undefined)), false));
    assert_eq!(orders(&plan), ["shutdown new 0"]);
    // Whatever the API says: a guest that runs is not killed here.
    let plan = decide(&target_facts(m, answers(received(DomainPhase::Running, true)), false));
    assert!(orders(&plan).is_empty());
    // Another migration has begun meanwhile.
    let m = MigrationView { uid: "mig-2".into(), ..leaving() };
    let mut facts = target_facts(m, answers(received(DomainPhase::Incoming, false)), false);
    facts.vmi.node_name = Some(ME.into());
    assert_eq!(orders(&decide(&facts)), [format!("abandon new {UID}")]);
}

// The sending half.

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
fn a_target_that_is_never_prepared_is_not_waited_for_for_ever() {
    let mut facts = source_facts(leaving(), answers(state(DomainPhase::Running)), None);
    assert_eq!(decide(&facts).wake, Some(Duration::from_secs(180)));
    facts.known_for = Duration::from_secs(181);
    assert_eq!(failure(&decide(&facts)), "Live migration failed: node node2 has not prepared the target within 180 s");
}

#[test]
fn a_target_out_of_reach_is_dialled_again_then_given_up() {
    let error = SourceView { ready: false, error: Some("no route to host".into()), ..link() };
    let plan = decide(&source_facts(published(), answers(state(DomainPhase::Running)), Some(error.clone())));
    assert_eq!(orders(&plan), ["dial old true"]);
    let late = SourceView { age: Duration::from_secs(31), ..error };
    let plan = decide(&source_facts(published(), answers(state(DomainPhase::Running)), Some(late)));
    assert_eq!(failure(&plan), "Live migration failed: no route to host");
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
    let refused = SourceView { start_error: Some("this uid has run before".into()), ..link() };
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
    let reported = SourceView { reported: Some(now()), ..link() };
    let plan = decide(&source_facts(started(), answers(sent("active")), Some(reported)));
    assert!(!writes(&plan).iter().any(|c| matches!(c, Change::Progress { .. })));
    assert_eq!(plan.wake, Some(REPORT));
}
const REPORT: Duration = Duration::from_secs(1);

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
        facts.target_ended = Some("its pod has failed".into());
        let plan = decide(&facts);
        assert_eq!(writes(&plan)[0], Change::Phase("Failed"));
        assert!(failure(&plan).contains("its pod has failed"));
        assert!(orders(&plan).is_empty(), "the source's memory is not run again");
    }
    // It ran there before: how it ended is not for this node to say.
    let mut facts = source_facts(MigrationView { target_ready: true, ..started() }, completed(), None);
    facts.target_ended = Some("its pod has failed".into());
    assert!(writes(&decide(&facts)).is_empty());
    let running = SourceView { go: Go::Running(us()), ..link() };
    let mut facts = source_facts(started(), completed(), Some(running));
    facts.target_ended = Some("its pod has failed".into());
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

#[test]
fn a_failed_migration_leaves_the_guest_and_says_why() {
    let mut failed = sent("failed");
    failed.migration.as_mut().unwrap().error = Some("Unable to write to socket: Broken pipe".into());
    let plan = decide(&source_facts(started(), answers(failed), Some(link())));
    assert_eq!(failure(&plan), "Live migration failed: Unable to write to socket: Broken pipe");
    assert!(orders(&plan).is_empty());
    assert!(writes(&plan).contains(&Change::Report { pod: "old".into() }), "the guest's life goes on");
}

#[test]
fn an_abort_before_the_start_needs_no_cancel() {
    let m = MigrationView { abort_requested: true, ..published() };
    let plan = decide(&source_facts(m, answers(state(DomainPhase::Running)), Some(link())));
    assert_eq!(
        writes(&plan)[..2],
        [Change::Abort("Succeeded"), Change::Failed("Live migration has been aborted".into())]
    );
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
    assert_eq!(
        writes(&plan)[..2],
        [Change::Abort("Succeeded"), Change::Failed("Live migration has been aborted".into())]
    );
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
fn a_cut_link_a_hopeless_guest_and_a_spent_budget_are_cancelled_with_the_reason() {
    let case = |m: MigrationView, link: SourceView| {
        let plan = decide(&source_facts(m, answers(sent("active")), Some(link)));
        match plan.actions.iter().find(|a| matches!(a, Action::Cancel { .. })) {
            Some(Action::Cancel { why: Some(why), .. }) => why.clone(),
            _ => String::new(),
        }
    };
    assert_eq!(case(started(), link()), "");
    let why = case(started(), SourceView { still: Duration::from_secs(12), ..link() });
    assert!(why.contains("no byte has moved for 12 seconds"), "{why}");
    let why = case(started(), SourceView { stuck: Duration::from_secs(150), ..link() });
    assert!(why.starts_with("stuck for 150 seconds"), "{why}");
    let m = MigrationView { start: Some(now() - jiff::SignedDuration::from_secs(801)), ..started() };
    assert!(case(m.clone(), link()).contains("not completed after 800 seconds"));
    assert_eq!(case(MigrationView { completion_timeout_per_gib: 0, ..m }, link()), "", "0 is no limit");
    // Once.
    let cancelled = SourceView { cancelled: Some("x".into()), still: Duration::from_secs(99), ..link() };
    assert_eq!(case(started(), cancelled.clone()), "");
    let plan = decide(&source_facts(started(), answers(sent("cancelled")), Some(cancelled)));
    assert_eq!(failure(&plan), "Live migration has been aborted: x");
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
    assert_eq!(orders(&plan), ["shutdown old 30"]);
}

#[test]
fn a_source_whose_launcher_died_before_the_hand_over_fails_the_migration() {
    let plan = decide(&source_facts(started(), Launcher::Gone(Box::new(sent("active"))), Some(link())));
    assert!(failure(&plan).contains("launcher is gone"));
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
