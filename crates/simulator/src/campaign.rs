//! Many seeds, on all cores.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::{Faults, Options, Report, shrink, simulate};

/// What many runs came to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Runs.
    pub seeds: u64,
    /// Events that were simulated.
    pub events: u64,
    /// Virtual time of all runs.
    pub virtual_time: Duration,
    /// Migrations that ended well.
    pub succeeded: u64,
    /// Migrations that ended badly, cancelled ones included.
    pub failed: u64,
    /// Faults that were injected.
    pub injections: u64,
    /// Guests that died of an injected fault.
    pub guests_killed: u64,
    /// Guests that were handed over in post-copy.
    pub post_copies: u64,
    /// Runs that violated something, by seed.
    pub violations: Vec<Report>,
}

impl Summary {
    fn add(&mut self, report: Report) {
        self.seeds += 1;
        self.events += report.events;
        self.virtual_time += report.virtual_time;
        self.succeeded += report.succeeded;
        self.failed += report.failed;
        self.injections += report.injections;
        self.guests_killed += report.guests_killed;
        self.post_copies += report.post_copies;
        if report.violation.is_some() {
            self.violations.push(report);
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} seeds: {} events, {:.1} hours of virtual time, {} migrations succeeded ({} guests in post-copy) and {} failed, {} \
             faults that killed {} guests; {} seeds violated something",
            self.seeds,
            self.events,
            self.virtual_time.as_secs_f64() / 3600.0,
            self.succeeded,
            self.post_copies,
            self.failed,
            self.injections,
            self.guests_killed,
            self.violations.len()
        )
    }
}

/// What a run violates, and the trace of one as small as `tries` runs can make it.
pub fn explain(options: &Options, report: &Report, tries: u32) -> String {
    let Some(violation) = &report.violation else { return format!("seed {}: nothing was violated", report.seed) };
    let Some(small) = shrink(options, tries) else {
        return format!("seed {}: {violation}\nand not when it was run again, which must not be", report.seed);
    };
    let ends = small.report.violation.as_ref().map(ToString::to_string).unwrap_or_default();
    format!(
        "seed {}: {violation}\nmade small ({} of {} events are left, {} runs tried):\n{}\n{ends}\nthe small run: {:?}\nseed {}",
        report.seed,
        small.report.events,
        report.events,
        small.tried,
        small.report.trace.join("\n"),
        small.options,
        report.seed,
    )
}

/// The run that a seed stands for when nothing else is said: kinds of clusters and weather take turns, so that many seeds in a
/// row see all of them. `faults` is how bad it may get.
pub fn run_of(seed: u64, faults: Faults) -> Options {
    let mut options = Options { seed, faults, ..Options::default() };
    if seed.is_multiple_of(2) {
        // Short runs in which all happens close together.
        (options.vms, options.migrations, options.duration) = (2, 2, Duration::from_secs(60));
        for name in Faults::NAMES.iter().filter(|name| !Faults::is_share(name)) {
            if let Some(rate) = options.faults.rate(name) {
                *rate *= 3;
            }
        }
    } else {
        (options.nodes, options.vms, options.migrations) = (4, 4, 3);
        options.duration = Duration::from_secs(180);
    }
    // One of five with nodes in maintenance.
    if seed % 5 == 3 {
        options.maintenances = if seed.is_multiple_of(2) { 2 } else { 4 };
    }
    // Half of them with two controllers at work at once.
    options.controllers = if seed % 4 < 2 { 1 } else { 2 };
    options
}

/// Runs all seeds of a range, on as many threads as the machine has cores, until `most` runs have violated something.
pub fn campaign(seeds: std::ops::Range<u64>, most: usize, options_of: impl Fn(u64) -> Options + Sync) -> Summary {
    let next = AtomicU64::new(seeds.start);
    let summary = Mutex::new(Summary::default());
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let report = simulate(options_of(seed));
                    let mut summary = summary.lock().unwrap_or_else(PoisonError::into_inner);
                    summary.add(report);
                    if summary.violations.len() >= most {
                        next.store(seeds.end, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let mut summary = summary.into_inner().unwrap_or_else(PoisonError::into_inner);
    summary.violations.sort_by_key(|report| report.seed);
    summary
}
