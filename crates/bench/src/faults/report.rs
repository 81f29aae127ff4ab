//! What a night says: a line a run, and a table.

use super::judge::Outcome;
use super::night::Summary;
use super::run::Report;
use std::collections::BTreeMap;

/// The line of a run that is over.
pub fn print(report: &Report) {
    let Report { number, strike, struck_at, outcome, broken, took, gap, migration } = report;
    let at = struck_at.map_or_else(|| "not there any more".to_owned(), |moment| format!("at: {}", moment.name()));
    let verdict = if broken.is_empty() { "ok" } else { "BROKEN" };
    println!(
        "run {number:>4}  {:<9}  {:<24} {:<21} {at:<23} lasts {:>5.2} s  {:<20} {verdict}  {:>5.1} s, silent {:>6.0} ms  {migration}",
        strike.manner.name(),
        strike.to_string(),
        format!("{} +{} ms", strike.moment.name(), strike.delay.as_millis()),
        strike.lasts.as_secs_f64(),
        outcome.name(),
        took.as_secs_f64(),
        gap.as_secs_f64() * 1e3,
    );
    for promise in broken {
        println!("          {promise}");
    }
}

/// The table over all.
pub fn print_all(summary: &Summary) {
    let mut kinds: BTreeMap<String, [usize; 5]> = BTreeMap::new();
    for report in &summary.reports {
        let row = kinds.entry(report.strike.to_string()).or_default();
        let outcome = match report.outcome {
            Outcome::Moved => 1,
            Outcome::Stayed => 2,
            Outcome::Lost => 3,
        };
        for column in [Some(0), Some(outcome), (!report.broken.is_empty()).then_some(4)].into_iter().flatten() {
            if let Some(cell) = row.get_mut(column) {
                *cell += 1;
            }
        }
    }
    println!("{:<26}{:>6}{:>8}{:>8}{:>8}{:>8}", "fault", "runs", "moved", "stayed", "lost", "broken");
    let mut total = [0; 5];
    for (kind, row) in &kinds {
        line(kind, row);
        for (sum, cell) in total.iter_mut().zip(row) {
            *sum += cell;
        }
    }
    line("all", &total);
}

fn line(name: &str, [runs, moved, stayed, lost, broken]: &[usize; 5]) {
    println!("{name:<26}{runs:>6}{moved:>8}{stayed:>8}{lost:>8}{broken:>8}");
}
