//! The goals of the issue, and by how much they are met or missed.

use super::report::Entry;
use super::{Load, Way};
use serde::Serialize;
use std::fmt;

/// How much longer ours may take in all than the best bare run sends: the way through the API and the target's start.
const EXTRA_MS: f64 = 400.0;
/// The longest standstill of an idle guest.
const IDLE_STANDSTILL_MS: f64 = 10.0;
/// The longest ping gap of an idle guest, where pings are 10 ms apart.
const IDLE_GAP_MS: f64 = 60.0;
/// How long the target's QEMU may take to be ready.
const READY_MS: f64 = 300.0;

/// The least part of the throughput of QEMU's own encrypted channels that ours have.
const THROUGHPUT: f64 = 0.9;
/// A guest with less to send tells more of the beginning and the end than of the link.
const MUCH_BYTES: f64 = 256.0 * MIB;
const MIB: f64 = 1024.0 * 1024.0;

/// A goal on one line.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Judgement {
    /// The line, in words.
    pub line: String,
    /// What is wanted.
    pub goal: String,
    /// What was measured: the median over ours' moves, or a count.
    pub measured: f64,
    /// What it may be at most, or at least.
    pub bound: f64,
    /// In which unit both are.
    pub unit: &'static str,
    /// It is a least and not a most.
    pub at_least: bool,
    /// Whether it is met.
    pub met: bool,
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = (self.measured - self.bound).abs();
        let word = if self.met { "met   " } else { "MISSED" };
        let most = if self.at_least { "least" } else { "most" };
        write!(
            f,
            "{word} by {by:>7.1} {:<5}  {:<28} {}: {:.1} of at {most} {:.1} {}",
            self.unit, self.line, self.goal, self.measured, self.bound, self.unit
        )
    }
}

/// Every goal on every line that has what it needs. Nothing is judged that was not measured: a goal against another way is left
/// out where that way was not run or did not move its guest, and moves after which a guest was not whole are no bound.
pub fn judge(entries: &[Entry]) -> Vec<Judgement> {
    entries.iter().filter(|entry| entry.way == Way::Ours).flat_map(|ours| judge_line(ours, entries)).collect()
}

fn judge_line(ours: &Entry, entries: &[Entry]) -> Vec<Judgement> {
    let line = ours.line;
    let of = |way: Way| entries.iter().find(|entry| entry.way == way && entry.line == line);
    let mut list = Vec::new();
    let mut add = |goal: &str, measured: Option<f64>, bound: Option<f64>, unit: &'static str, below: bool| {
        let (Some(measured), Some(bound)) = (measured, bound) else { return };
        let met = if below { measured < bound } else { measured <= bound };
        list.push(Judgement {
            line: line.to_string(),
            goal: goal.to_owned(),
            measured,
            bound,
            unit,
            met,
            at_least: false,
        });
    };
    if let Some(failure) = ours.failure() {
        add(&format!("ours moves the guest ({failure})"), Some(1.0), Some(0.0), "", false);
    }
    let broken = ours.runs.iter().filter(|run| run.failure.is_none() && !run.is_sound()).count();
    add("guests lost or damaged, all moves", Some(broken as f64), Some(0.0), "", false);
    let median = |entry: &Entry, figure: &dyn Fn(&super::figures::Figures) -> Option<f64>| {
        entry.spread(figure).map(|spread| spread.median)
    };
    let total = median(ours, &|run| Some(run.total_ms));
    let standstill = median(ours, &|run| run.standstill_ms);
    let bare = || [Way::BareDefault, Way::BareBest].into_iter().filter_map(of);
    let best = |figure: &dyn Fn(&super::figures::Figures) -> Option<f64>| {
        bare().filter_map(|entry| entry.spread(figure)).map(|spread| spread.min).min_by(f64::total_cmp)
    };
    add(
        "VMIM to Succeeded, best bare run + 400 ms",
        total,
        best(&|run| run.transfer_ms).map(|ms| ms + EXTRA_MS),
        "ms",
        false,
    );
    add("standstill, best bare run", standstill, best(&|run| run.standstill_ms), "ms", false);
    if line.load == Load::Idle {
        add("standstill of an idle guest", standstill, Some(IDLE_STANDSTILL_MS), "ms", true);
        let lost: u64 = ours.runs.iter().map(|run| run.pings_lost).sum();
        add("pings lost, all moves", Some(lost as f64), Some(0.0), "", false);
        add("ping gap of an idle guest", median(ours, &|run| Some(run.ping_gap_ms)), Some(IDLE_GAP_MS), "ms", true);
    }
    for (way, name) in [(Way::BareDefault, "default QEMU"), (Way::Virsh, "virsh")] {
        let other =
            |figure: &dyn Fn(&super::figures::Figures) -> Option<f64>| of(way).and_then(|entry| median(entry, figure));
        // Its target is part of what a person with QEMU has to start, too.
        add(&format!("in all, ahead of {name}"), total, other(&|run| Some(run.total_ms)), "ms", true);
        add(&format!("standstill, ahead of {name}"), standstill, other(&|run| run.standstill_ms), "ms", true);
    }
    add("target QEMU ready", median(ours, &|run| run.target_ready_ms), Some(READY_MS), "ms", true);
    list.extend(of(Way::BareTls).and_then(|tls| throughput(ours, tls)));
    list
}

/// Where there is much to send and no cap: the throughput beside that of QEMU's own encryption, in the same run.
fn throughput(ours: &Entry, tls: &Entry) -> Option<Judgement> {
    if ours.line.bandwidth.bytes().is_some() || ours.spread(|run| Some(run.qemu_bytes? as f64))?.median < MUCH_BYTES {
        return None;
    }
    let rate = |entry: &Entry| Some(entry.spread(|run| run.bytes_per_second)?.median / MIB);
    let (measured, theirs) = (rate(ours)?, rate(tls)?);
    let bound = theirs * THROUGHPUT;
    Some(Judgement {
        line: ours.line.to_string(),
        goal: format!("throughput, {THROUGHPUT} of QEMU's own TLS ({:.2} of {theirs:.1})", measured / theirs),
        measured,
        bound,
        unit: "MiB/s",
        met: measured >= bound,
        at_least: true,
    })
}

#[cfg(test)]
mod tests {
    use super::super::Line;
    use super::super::figures::Figures;
    use super::*;

    fn entry(way: Way, line: Line, totals: &[(f64, f64, f64)]) -> Entry {
        let run = |(total, transfer, standstill): &(f64, f64, f64)| Figures {
            total_ms: *total,
            transfer_ms: Some(*transfer),
            standstill_ms: Some(*standstill),
            ping_gap_ms: 20.0,
            ..Figures::default()
        };
        Entry { line, way, runs: totals.iter().map(run).collect() }
    }

    fn line(load: &str) -> Line {
        Line { memory: "1Gi".parse().unwrap(), load: load.parse().unwrap(), bandwidth: "unlimited".parse().unwrap() }
    }

    fn find<'a>(list: &'a [Judgement], goal: &str) -> &'a Judgement {
        list.iter().find(|one| one.goal.contains(goal)).unwrap_or_else(|| panic!("no goal {goal} in {list:?}"))
    }

    #[test]
    fn ours_is_held_against_the_best_bare_run_and_the_medians_of_the_defaults() {
        let idle = line("idle");
        let entries = [
            entry(Way::Ours, idle, &[(560.0, 200.0, 8.0), (600.0, 200.0, 9.0), (900.0, 200.0, 30.0)]),
            entry(Way::BareDefault, idle, &[(700.0, 500.0, 60.0), (800.0, 500.0, 80.0), (900.0, 500.0, 90.0)]),
            entry(Way::BareBest, idle, &[(400.0, 150.0, 3.0), (420.0, 160.0, 4.0)]),
            entry(Way::BareBest, line("10%"), &[(1.0, 1.0, 1.0)]),
        ];
        let list = judge(&entries);
        let total = find(&list, "best bare run + 400");
        assert_eq!((total.measured, total.bound, total.met), (600.0, 550.0, false));
        assert!(total.to_string().starts_with("MISSED by    50.0 ms"), "{total}");
        assert!(total.to_string().contains("of at most 550.0 ms"), "{total}");
        let standstill = find(&list, "standstill, best bare");
        assert_eq!((standstill.measured, standstill.bound, standstill.met), (9.0, 3.0, false));
        assert!(find(&list, "standstill of an idle").met);
        assert!(find(&list, "in all, ahead of default").met);
        assert!(find(&list, "pings lost").met);
        assert!(!list.iter().any(|one| one.goal.contains("virsh")), "nothing is judged that was not measured");
        assert!(!list.iter().any(|one| one.goal.contains("target")), "not measured either");
    }

    #[test]
    fn a_move_that_loses_the_guest_is_no_bound_for_others_and_a_miss_of_ours() {
        let mut ours = entry(Way::Ours, line("50%"), &[(900.0, 500.0, 50.0)]);
        let mut bare = entry(Way::BareBest, line("50%"), &[(100.0, 50.0, 1.0), (800.0, 700.0, 40.0)]);
        bare.runs[0].wrong = Some("it does not answer".into());
        let list = judge(&[ours.clone(), bare.clone()]);
        assert_eq!(find(&list, "best bare run + 400").bound, 1100.0);
        assert!(find(&list, "lost or damaged").met);
        bare.runs[1].damaged_pages = 1;
        assert!(!judge(&[ours.clone(), bare]).iter().any(|one| one.goal.contains("bare")));
        ours.runs[0].damaged_pages = 3;
        assert!(!find(&judge(&[ours]), "lost or damaged").met);
    }

    #[test]
    fn throughput_is_held_against_qemus_own_encryption_where_there_is_much_to_send_and_no_cap() {
        let entries = |line: Line, bytes: u64, ours: f64| {
            let mut list = [entry(Way::Ours, line, &[(1.0, 1.0, 1.0)]), entry(Way::BareTls, line, &[(1.0, 1.0, 1.0)])];
            for (one, rate) in list.iter_mut().zip([ours, 1000.0]) {
                one.runs[0].bytes_per_second = Some(rate * MIB);
                one.runs[0].qemu_bytes = Some(bytes);
            }
            judge(&list)
        };
        let full = line("full");
        let list = entries(full, 700 << 20, 890.0);
        let seen = find(&list, "throughput");
        assert_eq!((seen.measured, seen.bound, seen.met), (890.0, 900.0, false));
        assert!(seen.goal.contains("0.89 of 1000.0") && seen.to_string().contains("at least"), "{seen}");
        assert!(find(&entries(full, 700 << 20, 910.0), "throughput").met);
        let none = |list: Vec<Judgement>| !list.iter().any(|one| one.goal.contains("throughput"));
        assert!(none(entries(full, 100 << 20, 910.0)), "too little to tell");
        let capped = Line { bandwidth: "64Mi".parse().unwrap(), ..full };
        assert!(none(entries(capped, 700 << 20, 910.0)), "the cap is what is measured");
    }

    #[test]
    fn a_guest_with_a_load_has_no_idle_goals_and_one_that_stays_is_a_miss() {
        let mut ours = entry(Way::Ours, line("50%"), &[(1.0, 1.0, 1.0)]);
        assert!(judge(std::slice::from_ref(&ours)).iter().all(|one| !one.goal.contains("idle")));
        ours.runs.push(Figures { failure: Some("too slow".into()), ..Figures::default() });
        assert!(!find(&judge(&[ours]), "too slow").met);
    }
}
