//! Makes a run that violates something small: fewer faults, guests, nodes and migrations, as long as the same rule breaks.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::{Faults, Options, Report, Rule, simulate};

/// A run that was made small.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// What is left of it.
    pub options: Options,
    /// How it goes, with the whole trace.
    pub report: Report,
    /// Runs that were tried.
    pub tried: u32,
}

/// Shrinks a run that violates something; `None` when it does not. Tries at most so many runs.
pub fn shrink(options: &Options, most: u32) -> Option<Shrunk> {
    let mut search = Search { rule: Rule::Simulation, tried: 0, most };
    let report = simulate(options.clone());
    search.rule = report.violation.as_ref()?.rule;
    let mut best = (options.clone(), report);
    // Each step makes room for the others; two rounds are nearly always enough.
    for _ in 0..2 {
        let before = search.tried;
        search.drop_kinds(&mut best);
        search.drop_sizes(&mut best);
        search.drop_injections(&mut best);
        if search.tried == before || search.tried >= most {
            break;
        }
    }
    let (mut options, mut report) = best;
    options.full_trace = true;
    report.trace = simulate(options.clone()).trace;
    Some(Shrunk { options, report, tried: search.tried })
}

/// A number of a run that can be made smaller, and the least that it can be.
type Size = fn(&mut Options) -> Option<(&mut u32, u32)>;

struct Search {
    rule: Rule,
    tried: u32,
    most: u32,
}

impl Search {
    /// Takes the smaller run if it violates the same rule, and not after more than before.
    fn take(&mut self, smaller: Options, best: &mut (Options, Report)) -> bool {
        if self.tried >= self.most {
            return false;
        }
        self.tried += 1;
        let report = simulate(smaller.clone());
        let same = report.violation.as_ref().is_some_and(|violation| violation.rule == self.rule)
            && report.events <= best.1.events;
        if same {
            *best = (smaller, report);
        }
        same
    }

    /// Whole kinds of faults.
    fn drop_kinds(&mut self, best: &mut (Options, Report)) {
        for name in Faults::NAMES {
            let mut smaller = best.0.clone();
            match smaller.faults.rate(name) {
                Some(rate) if *rate > 0 => *rate = 0,
                _ => continue,
            }
            // Without the kind the others are numbered anew.
            smaller.without = BTreeSet::new();
            self.take(smaller, best);
        }
    }

    /// Nodes, VMs, migrations, controllers, time.
    fn drop_sizes(&mut self, best: &mut (Options, Report)) {
        if let Some(violation) = best.1.violation.clone() {
            let mut smaller = best.0.clone();
            smaller.duration = smaller.duration.min(violation.at + Duration::from_secs(1));
            smaller.without = BTreeSet::new();
            self.take(smaller, best);
        }
        let sizes: [Size; 6] = [
            |options| Some((&mut options.vms, 1)),
            |options| Some((&mut options.migrations, 1)),
            |options| Some((options.moves.as_mut()?, 1)),
            |options| Some((&mut options.nodes, 2)),
            |options| Some((&mut options.controllers, 1)),
            |options| Some((&mut options.maintenances, 0)),
        ];
        for size in sizes {
            // First by halves, then one by one.
            for halve in [true, false] {
                loop {
                    let mut smaller = best.0.clone();
                    smaller.without = BTreeSet::new();
                    let Some((value, least)) = size(&mut smaller) else { break };
                    let next = if halve { (*value / 2).max(least) } else { value.saturating_sub(1).max(least) };
                    if next >= *value {
                        break;
                    }
                    *value = next;
                    if !self.take(smaller, best) {
                        break;
                    }
                }
            }
        }
    }

    /// Single faults by their number: first in large groups, then one by one.
    fn drop_injections(&mut self, best: &mut (Options, Report)) {
        let mut group = best.1.injections.max(1);
        while group > 0 {
            let mut from = 1;
            while from <= best.1.injections {
                let mut smaller = best.0.clone();
                let fresh = (from..from + group).filter(|number| smaller.without.insert(*number)).count();
                if fresh > 0 {
                    self.take(smaller, best);
                }
                from += group;
            }
            group /= 2;
        }
    }
}
