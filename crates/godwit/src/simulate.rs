//! `godwit simulate`: the controllers on a simulated cluster.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use godwit_simulator::{Faults, Limits, Options, campaign, explain, run_of};

use crate::args::Simulate;

/// Runs that are tried to make one that violates something small.
const SHRINK_RUNS: u32 = 300;

/// Simulates, and says what came of it. Fails when something that must always hold did not.
pub fn run(wanted: &Simulate) -> anyhow::Result<ExitCode> {
    let faults = faults(&wanted.faults)?;
    let seeds = wanted.seed..wanted.seed.saturating_add(wanted.seeds.max(1));
    let options_of = |seed| options(wanted, seed, faults);
    let begun = Instant::now();
    let summary = campaign(seeds.clone(), 1, options_of);
    println!("simulate: {summary}; {:.1} s", begun.elapsed().as_secs_f64());
    let Some(worst) = summary.violations.first() else { return Ok(ExitCode::SUCCESS) };
    println!("{}", explain(&options_of(worst.seed), worst, SHRINK_RUNS));
    Ok(ExitCode::FAILURE)
}

fn options(wanted: &Simulate, seed: u64, faults: Faults) -> Options {
    let mut options = run_of(seed, faults);
    options.nodes = wanted.nodes.unwrap_or(options.nodes);
    options.vms = wanted.vms.unwrap_or(options.vms);
    options.controllers = wanted.controllers.unwrap_or(options.controllers);
    options.moves = wanted.migrations.or(options.moves);
    if let Some(hours) = wanted.hours {
        options.duration = Duration::from_secs_f64(hours.clamp(0.0, 10_000.0) * 3600.0);
        // What is meant to happen in a minute would be too much for hours.
        options.faults = faults;
    }
    if let Some(most) = wanted.parallel {
        let per_node = godwit_simulator::DEFAULT_PER_NODE;
        options.limits = Some(Limits { cluster: most, outbound: per_node, inbound: per_node });
    }
    options.standing = wanted.standing;
    options
}

fn faults(names: &[String]) -> anyhow::Result<Faults> {
    let mut faults = Faults::NONE;
    for name in names {
        match name.as_str() {
            "none" => faults = Faults::NONE,
            "all" => faults = Faults::ALL,
            name => {
                let mut all = Faults::ALL;
                let (Some(often), Some(rate)) = (all.rate(name), faults.rate(name)) else {
                    bail!("there is no fault {name:?}; there are: none, all, {}", Faults::NAMES.join(", "));
                };
                *rate = *often;
            }
        }
    }
    Ok(faults)
}
