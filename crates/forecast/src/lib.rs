//! What a migration will take, told before it has begun and while it goes on. Pure.
//!
//! The quantity that decides is U(t): how many bytes of its memory a guest writes to within a time t, however often. It is
//! measured ([`Written`]), and pre-copy is then followed pass by pass: the first one sends V₀, what is there, in t₀ = V₀ / B;
//! each one after it sends what was written during the one before, Vᵢ₊₁ = U(Vᵢ / B); the guest is stopped when Vᵢ / B fits into
//! the standstill that is allowed at that pass, which grows as the source lets it grow ([`DowntimeRamp`]).
//!
//! It is reckoned three times: as is likely, and with everything at its best and at its worst. The last two are the interval.

mod ramp;

pub use ramp::DowntimeRamp;

use serde::{Deserialize, Serialize};

const MIB: f64 = 1024.0 * 1024.0;
/// A link of which nothing is known, in bytes a second: a busy gigabit, two cores that encrypt, a fast link.
const UNKNOWN_LINK: Rate = Rate { least: 40 << 20, likely: 400 << 20, most: 4 << 30 };
/// How many bytes of pages that hold nothing QEMU looks through in a millisecond.
const SCANNED: [f64; 3] = [1200.0 * MIB / 1000.0, 4500.0 * MIB / 1000.0, 12_000.0 * MIB / 1000.0];
/// What a migration takes beside the copying, in milliseconds.
const SETUP_MS: [f64; 3] = [120.0, 30.0, 5.0];
/// What a switchover takes beside the copying, in milliseconds: devices, both QEMUs' turns, the go.
const SWITCHOVER_MS: [f64; 3] = [60.0, 12.0, 2.0];
/// QEMU lets a cap's bytes go in slices of a tenth of a second, the first of them at once: what that saves, in milliseconds.
const FIRST_SLICE_MS: [f64; 3] = [0.0, 80.0, 100.0];
/// The same makes a short pass longer: it waits for its next slice.
const SLICE_MS: [f64; 3] = [110.0, 100.0, 0.0];
/// What a pass takes beside the copying, in milliseconds.
const PASS_MS: f64 = 2.0;
/// How evenly a guest writes: what it did in one time against what it does in the next.
const EVENLY: [f64; 3] = [1.2, 1.0, 0.85];
/// The same of what it did during the last passes against what it does in the next.
const STEADILY: [f64; 3] = [1.1, 1.0, 0.97];
/// After as many passes it is said not to end.
const PASSES: u64 = 300;
/// QEMU's auto-converge: slows the guest by so many per cent first, and by so many more each time, up to so many.
const THROTTLE: (f64, f64, f64) = (20.0, 10.0, 99.0);

/// A measurement of U(t).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Written {
    /// t, in milliseconds.
    pub within_ms: u64,
    /// U(t): bytes of pages that were written to.
    pub bytes: u64,
    /// By how many bytes it may be wrong.
    #[serde(default)]
    pub margin: u64,
}

impl Written {
    /// Bytes a second.
    pub fn rate(&self) -> u64 {
        self.bytes.saturating_mul(1000) / self.within_ms.max(1)
    }

    /// Of memory of which so many pages were looked at: by how much the rest may differ.
    pub fn sampled(memory: u64, pages: f64, within_ms: u64, bytes: f64, rounded_by: f64) -> Written {
        let (all, pages) = (memory as f64, pages.max(1.0));
        let part = (bytes / all.max(1.0)).clamp(0.0, 1.0);
        let spread = 2.0 * (part * (1.0 - part) / pages).sqrt() * all;
        // Whoever has seen nothing among n can be sure, with 95 %, only of less than 3 among n.
        let unseen = if part * pages < 3.0 { 3.0 / pages * all } else { 0.0 };
        let count = |bytes: f64| bytes.clamp(0.0, all) as u64;
        Written { within_ms, bytes: count(bytes), margin: count(spread.max(unseen) + rounded_by) }
    }
}

/// Bytes a second: as is likely, and at least and at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Rate {
    pub least: u64,
    pub likely: u64,
    pub most: u64,
}

impl Rate {
    fn within(self, most: u64) -> Rate {
        Rate { least: self.least.min(most), likely: self.likely.min(most), most: self.most.min(most) }
    }

    fn around(likely: u64, least_percent: u64, most_percent: u64) -> Rate {
        let percent = |n| u64::try_from(u128::from(likely) * u128::from(n) / 100).unwrap_or(u64::MAX);
        Rate { least: percent(least_percent), likely, most: percent(most_percent) }
    }

    /// Bytes a millisecond at a corner; never nothing.
    fn at(self, corner: Corner) -> f64 {
        let bytes = match corner {
            Corner::Worst => self.least,
            Corner::Likely => self.likely,
            Corner::Best => self.most,
        };
        (bytes.max(1) as f64) / 1000.0
    }
}

/// How fast memory can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// While the guest runs: the cap holds.
    pub running: Rate,
    /// While it stands still: QEMU sends the rest without a cap.
    pub switching: Rate,
}

/// What a migration can use: `cap` is what it is allowed, `measured` what the link was last seen to carry, `speed` what the
/// network interface says of itself; bytes a second, none where it is not known (or there is no cap).
pub fn usable(cap: Option<u64>, measured: Option<u64>, speed: Option<u64>) -> Link {
    let known = |n: Option<u64>| n.filter(|n| *n > 0);
    let link = match (known(measured), known(speed)) {
        (Some(measured), _) => Rate::around(measured, 60, 150),
        // Nobody is alone on a link, and something has to encrypt.
        (None, Some(speed)) => Rate { likely: (speed / 2).min(UNKNOWN_LINK.likely), ..Rate::around(speed, 5, 100) },
        (None, None) => UNKNOWN_LINK,
    };
    let running = match known(cap) {
        // QEMU counts in tenths of a second, and is a little over it.
        Some(cap) => link.within(Rate::around(cap, 100, 105).most).capped(cap),
        None => link,
    };
    Link { running, switching: link }
}

impl Link {
    /// Pages are compressed before they are sent and counted: how well, nobody knows beforehand.
    pub fn compressed(mut self) -> Link {
        for rate in [&mut self.running, &mut self.switching] {
            rate.likely = rate.likely.saturating_mul(2);
            rate.most = rate.most.saturating_mul(20);
        }
        self
    }

    /// As the passes of this migration have shown: what a pass had to send, in the time that it took. That counts bytes of the
    /// guest's, however they went.
    pub fn corrected(mut self, passes: &[Written]) -> Link {
        let passes = passes.get(passes.len().saturating_sub(RECENT)..).unwrap_or_default();
        let rates = passes.windows(2).filter_map(|pair| match pair {
            [sent, next] => Some(sent.bytes.saturating_mul(1000) / next.within_ms.max(1)),
            _ => None,
        });
        let rates: Vec<u64> = rates.filter(|rate| *rate > 0).collect();
        let (Some(least), Some(most)) = (rates.iter().min(), rates.iter().max()) else { return self };
        let likely = rates.iter().sum::<u64>() / rates.len() as u64;
        self.running = Rate { least: least / 10 * 9, likely, most: most.saturating_add(most / 32) };
        self.switching.least = self.switching.least.max(self.running.least);
        self.switching.likely = self.switching.likely.max(likely);
        self.switching.most = self.switching.most.max(self.running.most);
        self
    }
}

impl Rate {
    fn capped(self, cap: u64) -> Rate {
        Rate { least: self.least.min(cap), likely: self.likely.min(cap), most: self.most }
    }
}

/// The guest, and what was measured of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guest {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of it that are really there; the rest was never written to, and is not sent.
    pub present: u64,
    /// U(t), measured before the migration (or beside it).
    pub written: Vec<Written>,
    /// U(t), as this migration's own passes have shown it, the oldest first: what corrects the former.
    pub passes: Vec<Written>,
    /// It stands still, and writes nothing.
    pub stands_still: bool,
}

/// What the migration is allowed and has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// The longest standstill.
    pub max_downtime_ms: u64,
    /// The guest is sent in one pass, and stands still for what it has written meanwhile
    /// (`godwit_qemu::migration::tracks_writes`).
    pub one_pass: bool,
    /// The guest may be slowed down.
    pub auto_converge: bool,
    /// By how many per cent it is now.
    pub throttled_percent: u64,
    /// Bytes of disks that are copied before its memory.
    pub disks: u64,
}

/// How far a migration that has begun is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underway {
    /// Bytes that this pass still has to send.
    pub remaining: u64,
    /// Which pass, from 1.
    pub pass: u64,
    /// The standstill allowed now.
    pub downtime_limit_ms: u64,
}

/// A time in milliseconds; none is never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// As is likely.
    pub likely: Option<u64>,
    /// It takes no less.
    pub least: Option<u64>,
    /// It takes no more.
    pub most: Option<u64>,
}

/// What is to be expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forecast {
    /// It comes to its end by itself.
    pub converges: bool,
    /// The same holds at the best and at the worst.
    pub certain: bool,
    /// From now on to the end.
    pub duration: Expected,
    /// From the guest's stop to its start. Where it does not come to its end by itself: the standstill that would end it.
    pub downtime: Expected,
    /// Passes over the memory, those before included.
    pub passes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Corner {
    Worst = 0,
    Likely = 1,
    Best = 2,
}

/// What a migration will take from its beginning, or from where it is. None while nothing is known of what the guest writes.
pub fn forecast(guest: &Guest, link: Link, terms: Terms, underway: Option<Underway>) -> Option<Forecast> {
    let run = |corner| follow(guest, link, terms, underway, corner);
    let (likely, best, worst) = (run(Corner::Likely)?, run(Corner::Best)?, run(Corner::Worst)?);
    let time = |of: fn(&Run) -> Option<f64>| {
        let ms = |run: &Run| of(run).map(|ms| ms.round() as u64);
        let (likely, least, most) = (ms(&likely), ms(&best), ms(&worst));
        // Corners are not ordered in every case: less time to write may cost a pass more.
        let least = least.map(|least| likely.map_or(least, |likely| least.min(likely)));
        let most = most.map(|most| likely.map_or(most, |likely| most.max(likely)));
        Expected { likely, least, most }
    };
    Some(Forecast {
        converges: likely.converges,
        certain: best.converges == likely.converges && worst.converges == likely.converges,
        duration: time(|run| run.converges.then_some(run.total)),
        downtime: time(|run| Some(run.downtime)),
        passes: likely.passes,
    })
}

/// Whether it does not end by itself even if all that was measured is wrong in its favour.
pub fn is_hopeless(guest: &Guest, link: Link, terms: Terms, underway: Option<Underway>) -> bool {
    follow(guest, link, terms, underway, Corner::Best).is_some_and(|run| !run.converges)
}

struct Run {
    converges: bool,
    total: f64,
    downtime: f64,
    passes: u64,
}

fn follow(guest: &Guest, link: Link, terms: Terms, underway: Option<Underway>, corner: Corner) -> Option<Run> {
    let (sends, switches) = (link.running.at(corner), link.switching.at(corner));
    let writes = if guest.stands_still { Curve::none() } else { Curve::of(guest, corner)? };
    let at = corner as usize;
    let here = guest.present.min(guest.memory) as f64;
    let here = match corner {
        Corner::Worst => (here * 1.1).min(guest.memory as f64),
        Corner::Likely => here,
        Corner::Best => here * 0.9,
    };
    let (mut total, mut pass, mut rest) = (0.0, 1, 0.0);
    let mut ramp = DowntimeRamp::new(terms.max_downtime_ms);
    let mut time = match underway {
        None => {
            total += SETUP_MS[at] + terms.disks as f64 / sends;
            // It looks for pages that hold something while it waits for its next slice.
            let looks = here / switches + (guest.memory as f64 - here).max(0.0) / SCANNED[at];
            let slice = if sends < switches { FIRST_SLICE_MS[at] } else { 0.0 };
            (here / sends - slice).max(looks)
        }
        Some(Underway { remaining, pass: now, downtime_limit_ms }) => {
            pass = now.max(1);
            ramp = DowntimeRamp::from(downtime_limit_ms, terms.max_downtime_ms);
            // In the first pass the pages that hold nothing count as remaining.
            let sent = if pass == 1 { (remaining as f64).min(here) } else { remaining as f64 };
            if pass > 1 {
                rest = remaining as f64;
            }
            (sent / sends).max(sent / switches + (remaining as f64 - sent) / SCANNED[at])
        }
    };
    let ends = |total: f64, rest: f64, passes, converges| {
        let downtime = rest / switches + SWITCHOVER_MS[at];
        Some(Run { converges, total: total + downtime, downtime, passes })
    };
    if guest.stands_still {
        return ends(total + time, 0.0, pass, true);
    }
    if terms.one_pass {
        return ends(total + time, writes.within(time), pass + 1, true);
    }
    let mut throttle = terms.throttled_percent.min(99) as f64;
    // What its passes have shown, it did as slow as it is now.
    let slowed = if guest.passes.is_empty() { 1.0 } else { 1.0 - throttle / 100.0 };
    let mut often = 0;
    let mut plateau = rest;
    // This pass may end it already.
    if pass > 1 && rest / sends <= ramp.limit_ms() as f64 {
        return ends(total, rest, pass, true);
    }
    while pass < PASSES {
        total += time + PASS_MS;
        let sent = if pass == 1 { here } else { rest };
        rest = writes.within((time + PASS_MS) * (1.0 - throttle / 100.0) / slowed);
        plateau = rest;
        pass += 1;
        ramp.look(pass, rest as u64);
        if rest / sends <= ramp.limit_ms() as f64 {
            return ends(total, rest, pass, true);
        }
        if terms.auto_converge && rest > sent / 2.0 {
            often += 1;
            if often >= 2 {
                often = 0;
                let (first, more, most) = THROTTLE;
                throttle = if throttle < first { first } else { (throttle + more).min(most) };
            }
        }
        time = (rest / sends).max(if sends < switches { SLICE_MS[at] } else { 0.0 });
    }
    // Whoever stops it lets the cap stand.
    let downtime = plateau / sends + SWITCHOVER_MS[at];
    Some(Run { converges: false, total: total + downtime, downtime, passes: pass })
}

/// U(t) as a broken line from nothing at no time.
struct Curve {
    /// Milliseconds and bytes, both rising.
    points: Vec<(f64, f64)>,
    /// No guest writes to more than it has; as is likely, to no more than is there by now.
    most: f64,
}

impl Curve {
    fn none() -> Curve {
        Curve { points: Vec::new(), most: 0.0 }
    }

    /// None when nothing was measured.
    fn of(guest: &Guest, corner: Corner) -> Option<Curve> {
        let before = Curve::through(&guest.written, guest, corner, EVENLY);
        let passes = guest.passes.get(guest.passes.len().saturating_sub(RECENT)..).unwrap_or_default();
        let seen = Curve::through(passes, guest, corner, STEADILY);
        match (before, seen) {
            (Some(before), Some(seen)) => Some(before.corrected(seen)),
            (one, None) | (None, one) => one,
        }
    }

    fn through(samples: &[Written], guest: &Guest, corner: Corner, evenly: [f64; 3]) -> Option<Curve> {
        let memory = guest.memory;
        let mut sorted: Vec<(f64, f64)> = samples
            .iter()
            .filter(|sample| sample.within_ms > 0)
            .map(|sample| {
                let bytes = match corner {
                    Corner::Worst => sample.bytes.saturating_add(sample.margin),
                    Corner::Likely => sample.bytes,
                    Corner::Best => sample.bytes.saturating_sub(sample.margin),
                };
                (sample.within_ms as f64, (bytes as f64 * evenly[corner as usize]).min(memory as f64))
            })
            .collect();
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
        // Of several measurements of about the same time the mean counts.
        let mut points: Vec<(f64, f64, f64)> = Vec::new();
        for (ms, bytes) in sorted {
            match points.last_mut() {
                Some((at, mean, n)) if ms <= *at * 1.1 => {
                    (*at, *mean) = ((*at * *n + ms) / (*n + 1.0), (*mean * *n + bytes) / (*n + 1.0));
                    *n += 1.0;
                }
                _ => points.push((ms, bytes, 1.0)),
            }
        }
        // More time is never less written.
        let mut high = 0.0f64;
        let points: Vec<(f64, f64)> = points
            .into_iter()
            .map(|(ms, bytes, _)| {
                high = high.max(bytes);
                (ms, high)
            })
            .collect();
        let most = match corner {
            Corner::Worst => memory as f64,
            // What it was seen to write to is there as well, whatever the count of that says.
            Corner::Likely | Corner::Best => (guest.present.min(memory) as f64).max(high),
        };
        (!points.is_empty()).then_some(Curve { points, most })
    }

    /// As what was seen later tells: the same form, raised or lowered.
    fn corrected(mut self, seen: Curve) -> Curve {
        let told: f64 = seen.points.iter().map(|(ms, _)| self.within(*ms)).sum();
        let real: f64 = seen.points.iter().map(|(_, bytes)| bytes).sum();
        if told > 0.0 {
            let factor = real / told;
            for (_, bytes) in &mut self.points {
                *bytes = (*bytes * factor).min(self.most);
            }
            return self;
        }
        seen
    }

    fn within(&self, ms: f64) -> f64 {
        let mut before = (0.0, 0.0);
        let mut slope = 0.0;
        for &(at, bytes) in &self.points {
            slope = (bytes - before.1) / (at - before.0);
            if ms <= at {
                return (before.1 + slope * (ms - before.0)).clamp(0.0, self.most);
            }
            before = (at, bytes);
        }
        // Beyond what was measured it goes on as it went last; never faster than on the whole.
        let whole = if before.0 > 0.0 { before.1 / before.0 } else { 0.0 };
        (before.1 + slope.min(whole) * (ms - before.0)).clamp(0.0, self.most)
    }
}

/// So many of the last passes tell what the guest does now.
const RECENT: usize = 4;

#[cfg(test)]
mod tests;
