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

#[test]
fn what_is_held_packed_is_decided_the_same() {
    let runs = (0..6).map(all);
    // Of sixteen and more of a kind a sample is taken, against which they are held.
    let many = (0..2).map(|seed| Options { nodes: 6, vms: 24, migrations: 1, ..all(seed) });
    for run in runs.chain(many) {
        let (one, packed) = (simulate(run.clone()), simulate(Options { packed: true, ..run }));
        assert_eq!(
            (one.trace_hash, one.events, one.virtual_time),
            (packed.trace_hash, packed.events, packed.virtual_time)
        );
    }
}
