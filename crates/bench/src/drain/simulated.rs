//! A node of simulated guests, emptied in virtual time by the real controllers.

use super::report::{Departure, Drained, Simulated};
use super::{Error, Options};
use godwit_simulator::{Emptied, Leaving, Limits, Options as Simulation, Report, simulate};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// The node that is emptied, and those that take its guests.
const OTHERS: u32 = 9;
/// Virtual time for a guest: what it takes at most if they leave one after another.
const PATIENCE: Duration = Duration::from_secs(120);

/// Real time, for what is measured of it.
fn clock() -> Duration {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    BEGAN.elapsed()
}

/// Simulates, and says what must not be.
pub async fn run(options: &Options) -> Result<(Simulated, Vec<String>), Error> {
    let limits = options.limits();
    let simulation = Simulation {
        nodes: OTHERS + 1,
        vms: options.simulated,
        seed: options.seed,
        standing: true,
        empty: Some(0),
        clock: Some(clock),
        migrations: 0,
        duration: PATIENCE.saturating_mul(options.simulated.max(1)),
        limits: Some(Limits { cluster: limits.cluster, outbound: limits.outbound, inbound: limits.inbound }),
        ..Simulation::default()
    };
    let began = clock();
    // A thread of its own: whoever breaks the benchmark off does not wait for it.
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = tell.send(simulate(simulation));
    });
    let report = told.await.map_err(|_| Error::Simulation)?;
    let wall = clock().saturating_sub(began);
    let wrong = report.violation.iter().map(|violation| format!("simulated: {violation}")).collect();
    Ok((told_of(options, report, wall), wrong))
}

fn told_of(options: &Options, mut report: Report, wall: Duration) -> Simulated {
    let emptied = report.emptied.take().unwrap_or_default();
    let Emptied { plan, planning, after, guests } = emptied;
    let of = |bytes: u64| bytes >> 20;
    let (least, most) = (
        guests.iter().map(|guest| guest.bandwidth).min().unwrap_or(0),
        guests.iter().map(|guest| guest.bandwidth).max().unwrap_or(0),
    );
    let bandwidth = format!("{} to {} MiB/s, to each guest its own; memory counts once", of(least), of(most));
    let departures = guests.into_iter().map(departure).collect();
    let others = usize::try_from(OTHERS).unwrap_or(usize::MAX);
    let total = after.map(milliseconds);
    Simulated {
        drained: Drained::new(options.limits(), others, bandwidth, &plan, total, departures),
        seed: options.seed,
        decisions: report.decisions,
        deciding_ms: milliseconds(report.deciding),
        longest_decision_ms: milliseconds(report.longest_decision),
        planning_ms: milliseconds(planning),
        wall_ms: milliseconds(wall),
    }
}

fn departure(guest: Leaving) -> Departure {
    let Leaving { vmi, memory, bandwidth, turn, sends, ends, failed } = guest;
    Departure {
        vmi,
        turn_ms: turn.map(milliseconds),
        sends_ms: sends.map(milliseconds),
        ends_ms: ends.map(milliseconds),
        bytes: Some(memory),
        least_ms: Some(memory as f64 / (bandwidth.max(1) as f64) * 1e3),
        failed,
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
