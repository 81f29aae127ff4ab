//! Explores many seeds; `SEEDS=from..to FAULTS=none|all cargo test -p godwit-simulator --test explore -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use godwit_simulator::{Faults, Options, Rule, simulate};

/// A range of seeds from the environment.
fn seeds() -> std::ops::Range<u64> {
    let text = std::env::var("SEEDS").unwrap_or_else(|_| "0..100".to_owned());
    let (from, to) = text.split_once("..").expect("SEEDS is from..to");
    from.parse().expect("a number")..to.parse().expect("a number")
}

#[test]
#[ignore = "for people; see the top of this file"]
fn explore() {
    let faults = if std::env::var("FAULTS").as_deref() == Ok("none") { Faults::NONE } else { Faults::ALL };
    let begun = Instant::now();
    let (mut bad, mut events) = (0, 0);
    let range = seeds();
    let count = range.end - range.start;
    for seed in range {
        let options = Options {
            nodes: 4,
            vms: 4,
            seed,
            faults,
            migrations: 3,
            duration: Duration::from_secs(240),
            full_trace: count == 1,
            unchecked: if std::env::var("BACKWARDS").is_ok() { [Rule::Backwards].into() } else { Default::default() },
            controllers: std::env::var("CONTROLLERS").map_or(1, |text| text.parse().expect("a number")),
            ..Options::default()
        };
        let report = simulate(options);
        events += report.events;
        if std::env::var("STATS").is_ok() {
            println!(
                "seed {seed}: {} good, {} bad, {} guests killed, {} conflicts, {} writes, {} decisions, {} events, {:?}",
                report.succeeded,
                report.failed,
                report.guests_killed,
                report.conflicts,
                report.writes,
                report.decisions,
                report.events,
                report.virtual_time
            );
        }
        if let Some(violation) = &report.violation {
            bad += 1;
            println!("seed {seed}: {violation}");
        }
        if count == 1 {
            println!("{}\n{report:#?}", report.trace.join("\n"));
        }
    }
    println!("{bad} of {count} seeds violated something; {events} events in {:?}", begun.elapsed());
}
