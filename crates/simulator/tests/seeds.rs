//! Many seeds with everything going wrong, and those that once showed something.

use godwit_simulator::{Faults, Options, campaign, run_of, simulate};

/// Seeds of [`run_of`] that showed a violation once, of the controllers or of the simulator; see docs/simulator.md.
const REGRESSIONS: [u64; 6] = [22, 51, 87, 111, 1220, 1239];

fn all(seed: u64) -> Options {
    run_of(seed, Faults::ALL)
}

#[test]
fn the_first_seeds() {
    let summary = campaign(0..40, 1, all);
    println!("{summary}");
    if let Some(report) = summary.violations.first() {
        report.expect_sound();
    }
    // A simulation in which nothing happens shows nothing.
    assert!(summary.succeeded > 40 && summary.failed > 40 && summary.guests_killed > 10, "{summary}");
}

#[test]
fn regressions() {
    for seed in REGRESSIONS {
        simulate(all(seed)).expect_sound();
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    let (one, same, other) = (simulate(all(10)), simulate(all(10)), simulate(all(12)));
    assert_eq!((one.trace_hash, one.events, one.virtual_time), (same.trace_hash, same.events, same.virtual_time));
    assert_ne!(one.trace_hash, other.trace_hash);
}
