//! What the checks are worth: controllers that are wrong on purpose are seen within a few seeds.

use godwit_simulator::{Faults, Mutation, Options, Rule, run_of, shrink, simulate};

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
