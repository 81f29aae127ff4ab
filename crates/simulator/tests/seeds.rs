//! Many seeds with everything going wrong, and those that once showed something.

use std::time::Duration;

use godwit_simulator::{Faults, Options, simulate};

/// Seeds that showed a violation once, of the controllers or of the simulator; see docs/simulator.md.
const REGRESSIONS: [u64; 12] = [12, 13, 39, 52, 53, 73, 91, 110, 120, 205, 443, 1033];

/// Short runs in which all happens close together.
fn stormy(seed: u64) -> Options {
    let mut faults = Faults::ALL;
    for rate in [
        &mut faults.watch_breaks_per_hour,
        &mut faults.controller_restarts_per_hour,
        &mut faults.agent_restarts_per_hour,
        &mut faults.launcher_kills_per_hour,
        &mut faults.node_deaths_per_hour,
        &mut faults.node_cuts_per_hour,
        &mut faults.link_cuts_per_hour,
        &mut faults.cordons_per_hour,
    ] {
        *rate *= 3;
    }
    Options { vms: 2, migrations: 2, seed, faults, duration: Duration::from_secs(60), ..Options::default() }
}

/// The runs of tests/explore.rs.
fn long(seed: u64) -> Options {
    let faults = Faults::ALL;
    Options { nodes: 4, vms: 4, seed, faults, migrations: 3, duration: Duration::from_secs(240), ..Options::default() }
}

fn run(seeds: std::ops::Range<u64>) {
    let (mut succeeded, mut failed, mut killed) = (0, 0, 0);
    for seed in seeds.clone() {
        let report = simulate(stormy(seed));
        report.expect_sound();
        succeeded += report.succeeded;
        failed += report.failed;
        killed += report.guests_killed;
    }
    println!("seeds {seeds:?}: {succeeded} migrations went well, {failed} did not, {killed} guests were killed");
    // A simulation in which nothing happens shows nothing.
    assert!(succeeded > 0 && failed > 0 && killed > 0);
}

#[test]
fn seeds_0_to_50() {
    run(0..50);
}

#[test]
fn seeds_50_to_100() {
    run(50..100);
}

#[test]
fn regressions() {
    for seed in REGRESSIONS {
        simulate(long(seed)).expect_sound();
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    let (one, same, other) = (simulate(stormy(11)), simulate(stormy(11)), simulate(stormy(12)));
    assert_eq!((one.trace_hash, one.events, one.virtual_time), (same.trace_hash, same.events, same.virtual_time));
    assert_ne!(one.trace_hash, other.trace_hash);
}
