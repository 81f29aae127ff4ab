//! Runs so many seeds and prints what came of them: what `make test` does with 2,000. `godwit simulate` can do more.
//!
//! `cargo run --release -p godwit-simulator --example seeds -- 2000`

use std::process::ExitCode;
use std::time::Instant;

use godwit_simulator::{Faults, campaign, explain, run_of};

fn main() -> ExitCode {
    let Some(count) = std::env::args().nth(1).and_then(|text| text.parse().ok()) else {
        eprintln!("usage: seeds COUNT");
        return ExitCode::from(2);
    };
    let begun = Instant::now();
    let summary = campaign(0..count, 1, |seed| run_of(seed, Faults::ALL));
    println!("simulator: {summary}; {:.1} s", begun.elapsed().as_secs_f64());
    let Some(report) = summary.violations.first() else { return ExitCode::SUCCESS };
    println!("{}", explain(&run_of(report.seed, Faults::ALL), report, 300));
    ExitCode::FAILURE
}
