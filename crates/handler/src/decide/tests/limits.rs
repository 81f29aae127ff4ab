//! Deadlines of a migration under way.

use godwit_launcher::rpc::{MemoryFacts, Written};

use super::*;
use crate::facts::Ordered;

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// The plan for a migration under way that has run for so long.
fn after(elapsed: u64, m: MigrationView, state: State, link: SourceView) -> Plan {
    let mut facts = source_facts(m, answers(state), Some(link));
    facts.running_for = Some(seconds(elapsed));
    decide(&facts)
}

/// Why it is cancelled, if it is.
fn given_up(plan: &Plan) -> Option<Failure> {
    plan.actions.iter().find_map(|a| if let Action::Cancel { why, .. } = a { why.clone() } else { None })
}

fn stuck(for_seconds: u64) -> SourceView {
    SourceView { stuck: seconds(for_seconds), ..link() }
}

/// Post-copy is allowed and can be.
fn post_copy() -> (MigrationView, State) {
    let mut state = sent("active");
    state.migration.as_mut().unwrap().post_copy_possible = true;
    (MigrationView { allow_post_copy: true, allow_workload_disruption: true, ..started() }, state)
}

fn disruptive() -> MigrationView {
    MigrationView { allow_workload_disruption: true, ..started() }
}

#[test]
fn nothing_is_cancelled_before_its_time() {
    for (elapsed, link) in [(0, link()), (800, link()), (799, stuck(149))] {
        let plan = after(elapsed, started(), sent("active"), link);
        assert!(orders(&plan).is_empty() && plan.wake.is_some());
    }
}

#[test]
fn a_spent_budget_ends_the_migration() {
    let plan = after(801, started(), sent("active"), link());
    let why = given_up(&plan).unwrap();
    assert_eq!(why.cause, FailureCause::OutOfTime);
    assert_eq!(why.reason, "not completed after 800 seconds (completionTimeoutPerGiB)");
    let begun = [Change::Abort("Aborting"), Change::GivingUp(FailureCause::OutOfTime)];
    assert_eq!(writes(&plan)[..2], begun, "known after a restart as well");
    // 0 is no limit.
    let endless = MigrationView { completion_limit: None, ..started() };
    assert_eq!(orders(&after(100_000, endless, sent("active"), link())), [""; 0]);
}

#[test]
fn a_budget_is_also_spent_without_a_link_in_hand() {
    let mut facts = source_facts(started(), answers(sent("active")), None);
    facts.running_for = Some(seconds(801));
    assert_eq!(given_up(&decide(&facts)).unwrap().cause, FailureCause::OutOfTime, "the handler has restarted");
}

#[test]
fn more_time_that_would_not_have_helped_is_called_so() {
    let mut state = sent("active");
    let f = state.migration.as_mut().unwrap();
    (f.iteration, f.bytes_per_second, f.dirty_bytes_per_second) = (2, 1000, 1000);
    let why = given_up(&after(801, started(), state.clone(), link())).unwrap();
    assert_eq!(why.cause, FailureCause::NotConverging);
    assert!(why.reason.contains("writes 1000 bytes a second"), "{}", why.reason);
    state.migration.as_mut().unwrap().iteration = 1;
    let why = given_up(&after(801, started(), state, link())).unwrap();
    assert_eq!(why.cause, FailureCause::OutOfTime, "not measured yet");
}

#[test]
fn no_new_low_for_the_progress_timeout_ends_the_migration() {
    let plan = after(160, started(), sent("active"), stuck(150));
    let why = given_up(&plan).unwrap();
    assert_eq!(why.cause, FailureCause::NoProgress);
    assert!(why.reason.starts_with("stuck for 150 seconds"), "{}", why.reason);
    let endless = MigrationView { progress_limit: None, ..started() };
    assert_eq!(orders(&after(160, endless, sent("active"), stuck(100_000))), [""; 0], "0 is no limit");
}

#[test]
fn a_cut_link_is_noticed_by_bytes_that_stand_still() {
    let still = |for_seconds| SourceView { still: seconds(for_seconds), ..link() };
    assert_eq!(given_up(&after(20, started(), sent("active"), still(11))), None);
    let why = given_up(&after(20, started(), sent("active"), still(12))).unwrap();
    assert_eq!(why.cause, FailureCause::LinkLost);
    assert!(why.reason.contains("no byte has moved for 12 seconds"), "{}", why.reason);
    let hasty = MigrationView { progress_limit: Some(seconds(5)), ..started() };
    assert!(given_up(&after(20, hasty, sent("active"), still(5))).is_some());
    // Held back by its own cap, it is silent between two bursts; what remains does not sink, and that is what is said.
    let m = MigrationView { bandwidth: 1, progress_limit: Some(seconds(5)), ..started() };
    assert_eq!(given_up(&after(20, m.clone(), sent("active"), still(5))), None);
    let both = SourceView { stuck: seconds(5), ..still(5) };
    assert_eq!(given_up(&after(20, m, sent("active"), both)).unwrap().cause, FailureCause::NoProgress);
}

#[test]
fn it_is_given_up_once_and_ends_with_the_reason() {
    let why = Failure::new(FailureCause::OutOfTime, "not completed after 800 seconds");
    let cancelled = SourceView { cancelled: Some(why), still: seconds(99), ..link() };
    let plan = after(801, started(), sent("active"), cancelled.clone());
    assert_eq!(orders(&plan), [""; 0]);
    let begun = [Change::Abort("Aborting"), Change::GivingUp(FailureCause::OutOfTime)];
    assert_eq!(writes(&plan)[..2], begun, "the first write was refused, say");
    let plan = after(802, started(), sent("cancelled"), cancelled);
    assert_eq!(failure(&plan), "Live migration has been aborted: not completed after 800 seconds");
    assert_eq!(cause(&plan), FailureCause::OutOfTime);
    assert!(writes(&plan).contains(&Change::Abort("Succeeded")), "as KubeVirt has it, though nobody requested it");
}

#[test]
fn a_users_abort_goes_before_deadlines() {
    let m = MigrationView { abort_requested: true, ..started() };
    let plan = after(801, m, sent("active"), link());
    assert_eq!(given_up(&plan), None);
    assert_eq!(orders(&plan), ["cancel old"]);
}

#[test]
fn post_copy_is_begun_when_it_is_allowed_and_time_is_over() {
    let (m, state) = post_copy();
    assert_eq!(orders(&after(801, m.clone(), state.clone(), link())), ["PostCopy old"]);
    assert_eq!(
        orders(&after(160, m.clone(), state.clone(), stuck(150))),
        ["PostCopy old"],
        "it will not end by itself"
    );
    assert_eq!(orders(&after(700, m.clone(), state.clone(), link())), [""; 0]);
    // Once; QEMU may take a moment.
    let given = SourceView { post_copy: Ordered::Given(seconds(5)), ..link() };
    assert_eq!(orders(&after(806, m.clone(), state.clone(), given)), [""; 0]);
    // A guest that cannot be moved so is paused.
    let refused = SourceView { post_copy: Ordered::Refused("no userfaultfd".into()), ..link() };
    assert_eq!(orders(&after(801, m.clone(), state, refused)), ["Pause old"]);
    assert_eq!(orders(&after(801, m.clone(), sent("active"), link())), ["Pause old"], "not possible at present");
    // Post-copy disturbs the guest: who forbids that forbids it.
    let m = MigrationView { allow_workload_disruption: false, ..m };
    let (_, state) = post_copy();
    assert_eq!(given_up(&after(801, m, state, link())).unwrap().cause, FailureCause::OutOfTime);
}

#[test]
fn disks_that_are_still_copied_delay_post_copy_but_not_for_ever() {
    let (m, mut state) = post_copy();
    let f = state.migration.as_mut().unwrap();
    (f.status, f.post_copy_possible) = ("setup".into(), false);
    let offered = || SourceView { post_copy_offered: true, ..link() };
    assert_eq!(orders(&after(1600, m.clone(), state.clone(), offered())), [""; 0]);
    assert_eq!(orders(&after(1601, m.clone(), state.clone(), offered())), ["Pause old"]);
    assert_eq!(orders(&after(801, m, state, link())), ["Pause old"], "the target cannot");
}

#[test]
fn the_guest_is_paused_when_that_is_allowed_and_has_twice_the_time() {
    assert_eq!(orders(&after(801, disruptive(), sent("active"), link())), ["Pause old"]);
    let given = || SourceView { pause: Ordered::Given(seconds(5)), ..link() };
    assert_eq!(orders(&after(1600, disruptive(), sent("active"), given())), [""; 0]);
    assert_eq!(given_up(&after(1601, disruptive(), sent("active"), given())).unwrap().cause, FailureCause::OutOfTime);
    // A handler that has restarted sees it by the launcher's word.
    let mut state = sent("active");
    state.migration.as_mut().unwrap().mode = MigrationMode::Paused;
    let plan = after(1500, disruptive(), state.clone(), link());
    assert_eq!(orders(&plan), [""; 0]);
    assert_eq!(writes(&plan)[0], Change::Mode(MigrationMode::Paused));
    assert_eq!(given_up(&after(1601, disruptive(), state, link())).unwrap().cause, FailureCause::OutOfTime);
    // It does not help either: nothing comes nearer.
    let stuck = SourceView { stuck: seconds(150), ..given() };
    assert_eq!(given_up(&after(900, disruptive(), sent("active"), stuck)).unwrap().cause, FailureCause::NoProgress);
    // It cannot be.
    let refused = SourceView { pause: Ordered::Refused("no".into()), ..link() };
    assert_eq!(given_up(&after(801, disruptive(), sent("active"), refused)).unwrap().cause, FailureCause::OutOfTime);
}

#[test]
fn another_bandwidth_is_ordered_until_the_launcher_has_it() {
    let capped = MigrationView { bandwidth: 5 << 20, ..started() };
    let mut state = sent("active");
    assert_eq!(orders(&after(1, capped.clone(), state.clone(), link())), ["limit old"]);
    state.migration.as_mut().unwrap().bandwidth_limit = Some(5 << 20);
    assert_eq!(orders(&after(1, capped.clone(), state.clone(), link())), [""; 0]);
    // 0 is unlimited, for which the launcher says nothing.
    let unlimited = MigrationView { bandwidth: 0, ..started() };
    assert_eq!(orders(&after(1, unlimited, state.clone(), link())), ["limit old"]);
    // What is being given up is left alone.
    let aborted = MigrationView { abort_requested: true, abort_status: Some("Aborting".into()), ..started() };
    assert_eq!(orders(&after(1, aborted, state, link())), [""; 0]);
    // In post-copy it holds as well.
    let mut ahead = sent("postcopy-active");
    ahead.migration.as_mut().unwrap().handed_over = true;
    let going = SourceView { go: Go::Running(1), ..link() };
    assert_eq!(orders(&after(1, capped, ahead, going)), ["limit old"]);
}

/// Three passes of 2 s over 100 MiB of a guest that is still writing to them.
fn hopeless() -> State {
    let mut state = sent("active");
    let before = [(100, 30), (1000, 100), (3000, 100)];
    let written = before.map(|(within_ms, mib)| Written { within_ms, bytes: mib << 20, margin: 0 });
    let memory =
        MemoryFacts { total_bytes: 1 << 30, present_bytes: 1 << 30, measured_us: Some(1), ..Default::default() };
    state.memory = MemoryFacts { written: written.into(), ..memory };
    let f = state.migration.as_mut().unwrap();
    f.written = vec![Written { within_ms: 2000, bytes: 100 << 20, margin: 0 }; 3];
    (f.total_bytes, f.remaining_bytes, f.iteration, f.downtime_limit_ms) = (1 << 30, 100 << 20, 4, Some(45));
    f.post_copy_possible = true;
    state
}

#[test]
fn what_cannot_end_is_disturbed_as_soon_as_that_is_known_and_allowed() {
    assert_eq!(orders(&after(9, disruptive(), hopeless(), link())), ["Pause old"]);
    let (both, _) = post_copy();
    assert_eq!(orders(&after(9, both.clone(), hopeless(), link())), ["PostCopy old"]);
    // Not twice, and not again while QEMU is at it.
    let given = SourceView { post_copy: Ordered::Given(seconds(1)), ..link() };
    assert_eq!(orders(&after(9, both.clone(), hopeless(), given)), [""; 0]);
    let paused = SourceView { pause: Ordered::Given(seconds(1)), ..link() };
    assert_eq!(orders(&after(9, disruptive(), hopeless(), paused)), [""; 0]);
    // Two passes may be chance.
    let mut early = hopeless();
    early.migration.as_mut().unwrap().written.pop();
    assert_eq!(orders(&after(9, both, early, link())), [""; 0]);
}

#[test]
fn what_cannot_end_goes_on_until_its_time_is_over_where_nobody_has_said_otherwise() {
    assert_eq!(
        orders(&after(9, started(), hopeless(), link())),
        [""; 0],
        "as in KubeVirt: the guest may become quieter"
    );
    let strict = MigrationView { fail_when_not_converging: true, ..started() };
    let why = given_up(&after(9, strict.clone(), hopeless(), link())).unwrap();
    assert_eq!(why.cause, FailureCause::NotConverging);
    assert!(why.reason.contains("2000 ms") && why.reason.contains("100 MiB"), "{}", why.reason);
    // First what may help.
    let both = MigrationView { allow_workload_disruption: true, ..strict.clone() };
    assert_eq!(orders(&after(9, both, hopeless(), link())), ["Pause old"]);
    let slowed = MigrationView { allow_auto_converge: true, ..strict.clone() };
    assert_eq!(orders(&after(9, slowed, hopeless(), link())), [""; 0], "QEMU can slow it down");
    let mut calm = hopeless();
    calm.migration.as_mut().unwrap().written = vec![Written { within_ms: 20, bytes: 1 << 20, margin: 0 }; 3];
    assert_eq!(orders(&after(9, strict, calm, link())), [""; 0]);
}
