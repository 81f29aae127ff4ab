//! Post-copy: the guest runs at the target before its memory is there, and has no way back.

use godwit_launcher::rpc::Cause;

use super::*;

fn running_there() -> SourceView {
    SourceView { go: Go::Running(us() + 2500), ..link() }
}

fn sending(status: &str) -> State {
    let mut state = with_stop(sent(status), us());
    state.migration.as_mut().unwrap().mode = MigrationMode::PostCopy;
    state
}

/// The launcher of the target after the go.
fn serving(status: &str, phase: DomainPhase) -> State {
    let mut state = received(phase, true);
    let f = state.migration.as_mut().unwrap();
    (f.status, f.mode) = (status.into(), MigrationMode::PostCopy);
    state
}

fn arrived() -> MigrationView {
    MigrationView {
        source_node: OTHER.into(),
        target_node: ME.into(),
        target_ready: true,
        target_address: Some("10.88.0.11".into()),
        mode: Some(MigrationMode::PostCopy),
        ..started()
    }
}

fn at_target(m: MigrationView, state: State) -> Facts {
    let mut facts = target_facts(m, answers(state), true);
    facts.vmi.node_name = Some(ME.into());
    facts
}

#[test]
fn the_source_waits_for_the_go_and_then_for_the_memory() {
    let plan = decide(&source_facts(started(), answers(sending("postcopy-active")), Some(link())));
    assert!(plan.actions.is_empty() && plan.wake.is_some(), "the go is the link's affair: {plan:?}");
    let facts = source_facts(started(), answers(sending("postcopy-active")), Some(running_there()));
    let plan = decide(&facts);
    assert_eq!(writes(&plan), [Change::Mode(MigrationMode::PostCopy), Change::Progress { pod: "old".into() }]);
    assert!(plan.wake.is_some() && orders(&plan).is_empty());
    let m = MigrationView { mode: Some(MigrationMode::PostCopy), ..started() };
    let plan = decide(&source_facts(m.clone(), answers(sending("completed")), Some(running_there())));
    assert_eq!(writes(&plan), [Change::Progress { pod: "old".into() }, Change::Completed { downtime_us: Some(2500) }]);
    assert_eq!(events(&plan), [("Migrated", "The VirtualMachineInstance migrated to node node2.")]);
}

#[test]
fn no_deadline_and_no_abort_ends_it() {
    let m = MigrationView { abort_requested: true, ..started() };
    let mut facts = source_facts(m, answers(sending("postcopy-active")), Some(running_there()));
    facts.running_for = Some(Duration::from_secs(100_000));
    facts.vmi.deleting = true;
    let plan = decide(&facts);
    assert!(orders(&plan).is_empty(), "{plan:?}");
    assert_eq!(writes(&plan)[0], Change::Abort("Failed"), "who aborts is told that it is too late");
    let m = MigrationView { abort_requested: true, abort_status: Some("Failed".into()), ..started() };
    let plan = decide(&source_facts(m, answers(sending("postcopy-active")), Some(running_there())));
    assert!(!writes(&plan).contains(&Change::Abort("Failed")), "once");
    // The same between QEMU's last word and the go.
    let m = MigrationView { abort_requested: true, abort_status: Some("Aborting".into()), ..started() };
    let plan = decide(&source_facts(m, answers(sent("completed")), Some(link())));
    assert_eq!(writes(&plan), [Change::Abort("Failed")]);
}

#[test]
fn a_source_whose_link_broke_leaves_the_verdict_to_the_target() {
    let mut facts = source_facts(started(), answers(sending("postcopy-paused")), Some(running_there()));
    let plan = decide(&facts);
    assert_eq!(failed(&plan), None, "the guest may run there");
    assert!(plan.wake.is_some());
    // Unless that is gone, with a part of the memory or all of what had come.
    facts.peer_ended = Some("the target's pod new has ended (Failed)".into());
    let plan = decide(&facts);
    assert_eq!(writes(&plan)[0], Change::Phase("Failed"));
    assert_eq!(cause(&plan), FailureCause::TargetLost);
}

#[test]
fn the_target_says_when_the_guest_is_there_but_not_that_all_is_over() {
    let m = MigrationView { target_ready: false, ..arrived() };
    let mut facts = at_target(m, serving("postcopy-active", DomainPhase::Running));
    facts.vmi.node_name = Some(OTHER.into());
    let plan = decide(&facts);
    assert_eq!(writes(&plan)[0], Change::Arrived { resume_us: us() });
    assert_eq!(events(&plan), [("Created", "VirtualMachineInstance defined.")]);
    let mut facts = at_target(arrived(), serving("postcopy-active", DomainPhase::Running));
    facts.now = now() + jiff::SignedDuration::from_hours(1);
    assert_eq!(writes(&decide(&facts)), [Change::Report { pod: "new".into() }]);
    // The 30 s of the source's handler count from the end.
    let mut done = serving("completed", DomainPhase::Running);
    done.migration.as_mut().unwrap().end_us = Some(facts.now.as_microsecond());
    let mut facts = at_target(arrived(), done);
    facts.now = now() + jiff::SignedDuration::from_hours(1);
    assert!(writes(&decide(&facts)).is_empty());
    facts.now += jiff::SignedDuration::from_secs(31);
    assert_eq!(writes(&decide(&facts)), [Change::Completed { downtime_us: None }]);
}

/// The same with a link that broke; launchers of now can take another one.
fn cut(mut state: State) -> State {
    let f = state.migration.as_mut().unwrap();
    f.recoverable = true;
    f.broken_us = Some(us());
    state
}

fn says_link_broken(node: &str) -> Change {
    Change::LinkBroken { node: node.into() }
}

#[test]
fn a_guest_whose_link_broke_waits_for_it_however_long_and_says_so() {
    for status in ["postcopy-paused", "postcopy-recover", "postcopy-recover-setup"] {
        let mut facts = at_target(arrived(), cut(serving(status, DomainPhase::Running)));
        facts.now = now() + jiff::SignedDuration::from_hours(1000);
        facts.running_for = Some(Duration::from_secs(3_600_000));
        let plan = decide(&facts);
        assert_eq!((orders(&plan), failed(&plan)), (vec![], None), "{status}");
        assert_eq!(writes(&plan), [says_link_broken(OTHER)]);
        let said = events(&plan);
        assert!(said.len() == 1 && said[0].1.starts_with("The link to node node2 broke in post-copy"), "{said:?}");
        facts.vmi.link_broken = true;
        assert!(events(&decide(&facts)).is_empty(), "once");
    }
    // When it is back that is said as well.
    let mut state = cut(serving("postcopy-active", DomainPhase::Running));
    state.migration.as_mut().unwrap().broken_us = None;
    let mut facts = at_target(arrived(), state);
    facts.vmi.link_broken = true;
    let plan = decide(&facts);
    assert_eq!(writes(&plan), [Change::Report { pod: "new".into() }]);
    assert_eq!(events(&plan), [("Migrating", "The link is back: post-copy goes on.")]);
}

#[test]
fn a_handler_that_restarts_in_post_copy_opens_its_channels_again_while_the_link_is_broken() {
    let mut facts = at_target(arrived(), cut(serving("postcopy-paused", DomainPhase::Running)));
    facts.target = None;
    assert_eq!(orders(&decide(&facts)), ["control new"]);
    let open = |facts: &mut Facts| {
        let ports = [("5000".to_owned(), 0), ("5001".to_owned(), 49152)].into();
        facts.target =
            Some(TargetView { uid: UID.into(), address: "10.88.0.11".into(), over_own_network: false, ports });
    };
    open(&mut facts);
    assert_eq!(writes(&decide(&facts)), [Change::Published]);
    // Also before the go.
    let mut before = cut(serving("postcopy-paused", DomainPhase::Incoming));
    before.migration.as_mut().unwrap().gone = false;
    let mut facts = target_facts(MigrationView { target_ready: false, ..arrived() }, answers(before), false);
    assert_eq!(orders(&decide(&facts)), ["control new"]);
    open(&mut facts);
    assert_eq!(writes(&decide(&facts)), [Change::Published]);
    // The source's dials and gives the go again, which is where it goes on from.
    let state = cut(sending("postcopy-paused"));
    let m = MigrationView { mode: Some(MigrationMode::PostCopy), ..started() };
    assert_eq!(orders(&decide(&source_facts(m, answers(state), None))), ["dial old false"]);
}

#[test]
fn a_source_whose_link_broke_before_the_go_says_so_and_waits() {
    let link = SourceView { go: Go::Trying("no route".into()), ..link() };
    let mut facts = source_facts(started(), answers(cut(sending("postcopy-paused"))), Some(link));
    facts.running_for = Some(Duration::from_secs(3_600_000));
    let plan = decide(&facts);
    assert_eq!(writes(&plan), [says_link_broken(OTHER)]);
    assert_eq!((orders(&plan), events(&plan).len()), (vec![], 1));
    facts.vmi.link_broken = true;
    assert!(events(&decide(&facts)).is_empty());
}

/// In post-copy and for the go nothing else will do than to reach the target: another network may be whole.
#[test]
fn a_source_that_does_not_reach_the_target_over_one_network_asks_for_the_other_where_it_has_both() {
    let m = || MigrationView { over_own_network: true, mode: Some(MigrationMode::PostCopy), ..started() };
    let completed = sent("completed");
    for (state, go) in [
        (completed, Go::Trying("no route".into())),
        (cut(sending("postcopy-paused")), Go::Trying("no route".into())),
        (cut(sending("postcopy-paused")), Go::Running(us())),
    ] {
        let asks = |over_own_network: bool, own_network: bool, unreached: Option<u64>| {
            let unreached = unreached.map(Duration::from_secs);
            let link = SourceView { go: go.clone(), unreached, own_network, ..link() };
            let m = MigrationView { over_own_network, ..m() };
            let plan = decide(&source_facts(m, answers(state.clone()), Some(link)));
            let other = if over_own_network { "the nodes' own network" } else { "the network for migrations" };
            let told = events(&plan).iter().any(|(_, text)| text.ends_with(&format!("{other} is tried.")));
            assert_eq!(writes(&plan).contains(&Change::Network { own: !over_own_network }), told);
            told
        };
        for (over_own_network, own_network) in [(true, true), (true, false), (false, true)] {
            assert!(!asks(over_own_network, own_network, None), "{go:?}");
            assert!(!asks(over_own_network, own_network, Some(9)), "{go:?}");
            assert!(asks(over_own_network, own_network, Some(10)), "{go:?}");
        }
        assert!(!asks(false, false, Some(3600)), "{go:?}");
    }
}

#[test]
fn a_migration_does_not_wait_for_a_network_over_which_it_cannot_begin() {
    let unreached = |over_own_network, seconds| {
        let m = MigrationView { over_own_network, ..published() };
        let error = Some("cannot reach 10.99.0.2".to_owned());
        let link = SourceView { ready: false, error, age: Duration::from_secs(seconds), ..link() };
        let plan = decide(&source_facts(m, answers(state(DomainPhase::Running)), Some(link)));
        let leaves = writes(&plan).contains(&Change::Network { own: false });
        // Where it listens no longer in a moment it is not dialled.
        assert_eq!(leaves, orders(&plan).is_empty(), "{plan:?}");
        leaves
    };
    assert!(!unreached(true, 9) && unreached(true, 10) && !unreached(false, 10));
    // The target's QEMU waits and nobody has come yet: it is prepared anew, where it is reached.
    let mut facts = target_facts(
        MigrationView { detected: true, ..published() },
        answers(received(DomainPhase::Incoming, false)),
        true,
    );
    facts.target.as_mut().unwrap().over_own_network = true;
    facts.vmi.migration.as_mut().unwrap().target_node = ME.into();
    assert_eq!(orders(&decide(&facts))[0], "close target");
}

#[test]
fn a_target_that_is_not_reached_over_the_network_for_migrations_listens_in_the_nodes_own() {
    let over = |own: bool, facts: &mut Facts| {
        facts.target.as_mut().unwrap().over_own_network = own;
    };
    // The guest is there, in post-copy; and before the go.
    let mut before = cut(serving("postcopy-paused", DomainPhase::Incoming));
    before.migration.as_mut().unwrap().gone = false;
    let waits = MigrationView { target_ready: false, ..arrived() };
    for mut facts in [
        at_target(arrived(), cut(serving("postcopy-paused", DomainPhase::Running))),
        target_facts(waits, answers(before), true),
    ] {
        over(true, &mut facts);
        let m = facts.vmi.migration.as_mut().unwrap();
        m.over_own_network = true;
        assert!(orders(&decide(&facts)).is_empty(), "{:?}", decide(&facts));
        facts.vmi.migration.as_mut().unwrap().over_own_network = false;
        assert_eq!(orders(&decide(&facts)), ["close target", "control new"]);
        // The source reaches it there no more, and asks for the other again.
        over(false, &mut facts);
        facts.vmi.migration.as_mut().unwrap().over_own_network = true;
        assert_eq!(orders(&decide(&facts)), ["close target", "control new"]);
        // What it listens on, and has not published yet, it does with its own word: its interface is not there.
        facts.target.as_mut().unwrap().address = "10.88.0.99".into();
        assert!(orders(&decide(&facts)).is_empty());
    }
}

#[test]
fn a_guest_whose_memory_nobody_has_any_more_is_given_up() {
    // At the target: the source's pod has ended.
    let mut facts = at_target(arrived(), cut(serving("postcopy-paused", DomainPhase::Running)));
    facts.peer_ended = Some("the source's pod old has ended (Failed)".into());
    assert_eq!(orders(&decide(&facts)), ["shutdown new 0"]);
    // At the source: QEMU has ended. The target learns it by the end of the pod.
    let mut dead = cut(sending("postcopy-paused"));
    dead.migration.as_mut().unwrap().status = "failed".into();
    let plan = decide(&source_facts(started(), answers(dead.clone()), Some(running_there())));
    assert_eq!((orders(&plan), failed(&plan)), (vec!["shutdown old 0".to_owned()], None));
    // Before the go the link has ended the target: it never ran there.
    let gone = SourceView { go: Go::Lost("the source's QEMU ended".into()), ..link() };
    let plan = decide(&source_facts(started(), answers(dead), Some(gone)));
    assert_eq!((cause(&plan), &writes(&plan)[0]), (FailureCause::SourceLost, &Change::Phase("Failed")));
    // A launcher of the source that is older knows no other link.
    let mut older = sending("postcopy-paused");
    older.migration.as_mut().unwrap().recoverable = false;
    let plan = decide(&source_facts(started(), answers(older), Some(running_there())));
    assert_eq!(orders(&plan), ["shutdown old 0"]);
}

#[test]
fn the_loss_of_a_guest_is_said_only_when_it_does_not_run() {
    // A launcher of the target that is older, or a QEMU that has given up.
    for status in ["postcopy-paused", "failed"] {
        let plan = decide(&at_target(arrived(), serving(status, DomainPhase::Running)));
        assert_eq!(orders(&plan), ["shutdown new 0"]);
        assert_eq!(failed(&plan), None, "another one must not start beside it");
        let mut facts = at_target(arrived(), serving(status, DomainPhase::Shutdown));
        let plan = decide(&facts);
        assert_eq!(writes(&plan)[0], Change::Phase("Failed"));
        assert_eq!(cause(&plan), FailureCause::LinkLost);
        assert!(failure(&plan).starts_with("VMI is irrecoverable due to failed post-copy migration"));
        // QEMU 7.2's words for it sound like a refusal.
        let mut state = serving(status, DomainPhase::Crashed);
        let f = state.migration.as_mut().unwrap();
        (f.error, f.cause) = (Some("Read section footer failed: -5".into()), Some(Cause::RefusedMachine));
        assert_eq!(cause(&decide(&at_target(arrived(), state))), FailureCause::LinkLost);
        facts.peer_ended = Some("the source's pod old has ended (Failed)".into());
        assert_eq!(cause(&decide(&facts)), FailureCause::SourceLost);
        // Also when its launcher has gone after that.
        let last = Launcher::Gone(Box::new(serving(status, DomainPhase::Shutdown)));
        facts.pods.get_mut("new").unwrap().launcher = last;
        assert_eq!(cause(&decide(&facts)), FailureCause::SourceLost);
        facts.vmi.phase = "Failed".into();
        assert_eq!(failed(&decide(&facts)), None, "said once");
    }
}

#[test]
fn a_target_that_dies_in_post_copy_takes_the_guest_with_it() {
    let mut state = serving("postcopy-active", DomainPhase::Crashed);
    state.exit_reason = Some("QEMU was killed by signal 9".into());
    state.migration.as_mut().unwrap().cause = Some(Cause::Killed);
    let plan = decide(&at_target(arrived(), state));
    assert_eq!(cause(&plan), FailureCause::TargetLost);
    assert!(failure(&plan).contains("signal 9"));
    assert_eq!(writes(&plan)[0], Change::Phase("Failed"));
}

#[test]
fn a_guest_that_shuts_itself_down_in_post_copy_has_ended_well() {
    let plan = decide(&at_target(arrived(), serving("postcopy-active", DomainPhase::Shutdown)));
    assert_eq!(writes(&plan)[0], Change::Phase("Succeeded"));
    assert_eq!(cause(&plan), FailureCause::GuestEnded);
    let mut facts = at_target(arrived(), serving("postcopy-active", DomainPhase::Running));
    facts.vmi.deleting = true;
    assert_eq!(orders(&decide(&facts)), ["shutdown new 30"], "deleted while its memory follows");
}

#[test]
fn a_guest_with_all_its_memory_that_ends_is_the_owners_affair() {
    let plan = decide(&at_target(arrived(), serving("completed", DomainPhase::Crashed)));
    assert_eq!(failed(&plan), None, "the migration was a success: the source says so");
}

#[test]
fn a_guest_that_was_paused_moves_without_a_standstill_of_its_own() {
    let mut state = with_stop(sent("completed"), us());
    state.migration.as_mut().unwrap().guest_paused = true;
    let plan = decide(&source_facts(started(), answers(state), Some(running_there())));
    assert!(writes(&plan).contains(&Change::Completed { downtime_us: None }));
    let m = MigrationView { target_ready: false, mode: None, ..arrived() };
    let plan = decide(&at_target(m, received(DomainPhase::Paused, true)));
    assert!(writes(&plan).contains(&Change::Report { pod: "new".into() }), "its condition with it: {plan:?}");
}
