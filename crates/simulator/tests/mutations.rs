//! What the checks are worth: controllers that are wrong on purpose are seen within a few seeds.

use std::time::Duration;

use godwit_simulator::{Blow, Faults, Mutation, Options, Rule, Step, run_of, shrink, simulate};

fn wrong(mutation: Mutation, seed: u64) -> Options {
    Options { mutation: Some(mutation), ..run_of(seed, Faults::ALL) }
}

/// The first of the seeds that sees a mutation breaks one of the rules.
fn seen(mutation: Mutation, seeds: std::ops::Range<u64>, rules: &[Rule]) {
    let found = seeds.clone().find_map(|seed| simulate(wrong(mutation, seed)).violation);
    let violation = found.unwrap_or_else(|| panic!("{mutation:?} is not seen in seeds {seeds:?}"));
    assert!(rules.contains(&violation.rule), "{mutation:?} is seen as {violation}");
}

#[test]
fn writes_without_a_revision_are_seen() {
    seen(Mutation::NoRevisions, 0..12, &[Rule::Backwards, Rule::NeverLost, Rule::NeverTwo]);
}

#[test]
fn migrations_that_begin_beside_other_pods_are_seen() {
    seen(Mutation::StartsBesideOthers, 0..8, &[Rule::Stuck, Rule::OneAtATime, Rule::NeverTwo, Rule::NeverLost]);
}

#[test]
fn limits_that_are_off_by_one_are_seen() {
    seen(Mutation::LimitOffByOne, 0..24, &[Rule::Limits]);
}

#[test]
fn decisions_that_ask_for_no_wake_up_are_seen() {
    seen(Mutation::NeverWakes, 0..4, &[Rule::Stuck]);
}

#[test]
fn migrations_that_begin_again_are_seen() {
    seen(Mutation::FailedBeginsAgain, 0..4, &[Rule::Backwards]);
}

/// Nodes that are wrong in a way that shows when something stands still or breaks at a step of a hand-over (`scenarios.rs` shows that
/// those which are right are sound in the same runs).
fn seen_at_a_step(mutation: Mutation, post_copy: bool, blow: Blow, rules: &[Rule]) {
    let often = if post_copy { 1000 } else { 0 };
    let faults = Faults { post_copy_per_mille: often, busy_guests_per_mille: often, ..Faults::NONE };
    let run = |(step, seed)| {
        let (duration, blow_at_step, mutation) = (Duration::from_secs(20), Some((step, blow)), Some(mutation));
        simulate(Options { vms: 1, seed, duration, faults, blow_at_step, mutation, ..Options::default() })
    };
    let mut runs = Step::ALL.into_iter().flat_map(|step| (0..16).map(move |seed| (step, seed)));
    let found = runs.find_map(|one| run(one).violation);
    let violation = found.unwrap_or_else(|| panic!("{mutation:?} is not seen"));
    assert!(rules.contains(&violation.rule), "{mutation:?} is seen as {violation}");
}

#[test]
fn a_go_before_it_is_written_down_that_the_guest_has_left_is_seen() {
    seen_at_a_step(Mutation::GoesUnwritten, false, Blow::StallSourceLauncher, &[Rule::NeverTwo]);
}

#[test]
fn a_launcher_that_stood_still_and_runs_what_has_left_is_seen() {
    seen_at_a_step(Mutation::RunsWhatHasLeft, false, Blow::StallSourceLauncher, &[Rule::NeverTwo]);
}

#[test]
fn a_post_copy_that_is_taken_back_is_seen() {
    seen_at_a_step(Mutation::CancelsWhatHasLeft, true, Blow::Cancel, &[Rule::NeverTwo]);
}

#[test]
fn a_post_copy_that_is_ended_before_all_has_followed_is_seen() {
    seen_at_a_step(Mutation::EndsBeforeAllFollowed, true, Blow::StallTargetQemu, &[Rule::NeverLost]);
}

#[test]
fn a_loaded_guest_that_is_given_up_is_seen() {
    for post_copy in [false, true] {
        seen_at_a_step(Mutation::GivesUpLoaded, post_copy, Blow::StallSourceAgent, &[Rule::NeverLost]);
    }
}

#[test]
fn handlers_that_go_on_with_what_they_decided_before_are_seen() {
    seen_at_a_step(Mutation::HandlersWithoutRevisions, true, Blow::CutSourceNode, &[Rule::Backwards]);
}

/// Nodes and controllers that are wrong in a way that shows when nodes cannot renew their leases.
fn seen_when_cut_off(mutation: Mutation) {
    let faults = Faults {
        api_cuts_per_hour: 60,
        handler_stalls_per_hour: 60,
        launcher_stalls_per_hour: 60,
        skewed_clocks_per_mille: 500,
        ..Faults::NONE
    };
    let run = |seed, mutation| {
        let duration = Duration::from_secs(300);
        simulate(Options { vms: 6, seed, duration, migrations: 0, faults, mutation, ..Options::default() })
    };
    for seed in 0..4 {
        run(seed, None).expect_sound();
    }
    let found = (0..60).find_map(|seed| run(seed, Some(mutation)).violation);
    let violation = found.unwrap_or_else(|| panic!("{mutation:?} is not seen"));
    assert!([Rule::NeverTwo, Rule::NeverLost].contains(&violation.rule), "{mutation:?} is seen as {violation}");
}

#[test]
fn launchers_that_do_not_look_at_the_time_are_seen() {
    seen_when_cut_off(Mutation::NoWatchdog);
}

#[test]
fn nodes_that_count_as_lost_without_a_margin_are_seen() {
    seen_when_cut_off(Mutation::NoMargin);
}

#[test]
fn nodes_that_count_as_lost_by_their_own_clocks_are_seen() {
    seen_when_cut_off(Mutation::LostByTimestamps);
}

#[test]
fn what_is_seen_is_made_small() {
    // One in which much happens before it goes wrong; which seed that is changes with every change of the controllers.
    let all = (0..40)
        .map(|seed| wrong(Mutation::FailedBeginsAgain, seed))
        .map(|options| (simulate(options.clone()), options));
    let (before, options) = all
        .into_iter()
        .find(|(run, _)| run.violation.is_some() && run.events > 1_000)
        .expect("a long run that goes wrong");
    let small = shrink(&options, 80).expect("it violates something");
    let after = small.report.violation.as_ref().expect("the small run violates it as well");
    assert_eq!(after.rule, before.violation.as_ref().expect("a violation").rule);
    // Much shorter, and the same when it is run again.
    assert!(small.report.events * 2 < before.events, "{} of {} events", small.report.events, before.events);
    assert!(small.report.injections < before.injections, "{} of {}", small.report.injections, before.injections);
    let again = simulate(small.options.clone());
    assert_eq!(again.violation.as_ref(), Some(after));
    assert_eq!(again.trace, small.report.trace);
}

/// Controllers that do not keep what a maintenance promises, on nodes that pull images slowly: targets that have a node wait for long.
/// (`scenarios.rs` shows that those which do are sound.)
fn seen_in_maintenance(mutation: Mutation) {
    let faults = Faults { slow_pulls_per_mille: 700, late_news_per_mille: 50, ..Faults::NONE };
    let run = |seed| {
        let (duration, mutation) = (Duration::from_secs(200), Some(mutation));
        let options = Options { seed, vms: 4, maintenances: 6, duration, faults, mutation, ..Options::default() };
        simulate(options).violation
    };
    let violation = (0..40).find_map(run).unwrap_or_else(|| panic!("{mutation:?} is not seen"));
    assert_eq!(violation.rule, Rule::Maintenance, "{mutation:?} is seen as {violation}");
}

#[test]
fn pods_that_are_placed_on_nodes_in_maintenance_are_seen() {
    seen_in_maintenance(Mutation::PlacesOnClosed);
}

#[test]
fn migrations_that_go_to_a_node_that_is_to_be_emptied_are_seen() {
    seen_in_maintenance(Mutation::GoesToClosed);
}

#[test]
fn nodes_that_were_cordoned_before_and_are_opened_are_seen() {
    seen_in_maintenance(Mutation::UncordonsAlways);
}

#[test]
fn marks_that_a_maintenance_leaves_are_seen() {
    seen_in_maintenance(Mutation::LeavesMarks);
}

#[test]
fn nodes_that_are_not_emptied_in_silence_are_seen() {
    seen_in_maintenance(Mutation::EmptiesSilently);
}

#[test]
fn guests_that_never_come_home_are_seen() {
    seen_in_maintenance(Mutation::NeverReturns);
}

#[test]
fn guests_that_come_home_to_another_node_are_seen() {
    seen_in_maintenance(Mutation::ReturnsElsewhere);
}
