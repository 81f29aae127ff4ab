//! Guests are moved while what moves them is killed, stopped and cut: never two, and never none that could live.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

const RUNS: usize = 40;

#[test]
fn whatever_is_killed_stopped_or_cut_a_guest_runs_once_and_only_once() {
    let runs = RUNS.to_string();
    let mut bench = Command::new(env!("CARGO_BIN_EXE_godwit"))
        .args(["bench", "faults", "--runs", &runs, "--seed", "20261121", "--parallel", "6"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("godwit starts");
    let (mut done, mut broken) = (0, Vec::new());
    for line in BufReader::new(bench.stdout.take().expect("piped")).lines() {
        let line = line.expect("text");
        // Said at once: one that does not end tells by that which run it is.
        println!("{line}");
        if line.starts_with("run ") {
            done += 1;
        }
        // What is broken is said below its run.
        if line.contains(" BROKEN ") || !broken.is_empty() && line.starts_with("   ") {
            broken.push(line);
        }
    }
    assert!(bench.wait().expect("it ends").success(), "{}", broken.join("\n"));
    assert_eq!(done, RUNS);
}
