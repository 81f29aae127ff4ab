//! A large cluster that stands already, for an hour of virtual time: how long that takes, and what came of it.
//!
//! `cargo run --release -p godwit-simulator --example large -- [NODES [VMS [MIGRATIONS [HOURS [PARALLEL]]]]]`

use std::time::{Duration, Instant};

use godwit_simulator::{DEFAULT_PER_NODE, Limits, Options, simulate};

fn main() {
    let given: Vec<u32> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let of = |place: usize, otherwise| given.get(place).copied().unwrap_or(otherwise);
    let options = Options {
        nodes: of(0, 10_000),
        vms: of(1, 50_000),
        moves: Some(of(2, 500)),
        duration: Duration::from_secs(3600 * u64::from(of(3, 1))),
        limits: Some(Limits { cluster: of(4, 20), outbound: DEFAULT_PER_NODE, inbound: DEFAULT_PER_NODE }),
        standing: true,
        ..Options::default()
    };
    let begun = Instant::now();
    let report = simulate(options);
    report.expect_sound();
    println!(
        "{:.1} s: {} events, {} decisions, {} writes, {} migrations succeeded and {} failed, at most {} at once",
        begun.elapsed().as_secs_f64(),
        report.events,
        report.decisions,
        report.writes,
        report.succeeded,
        report.failed,
        report.most_at_once,
    );
}
