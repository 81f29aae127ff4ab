//! Guests are moved while what moves them is killed, stopped and cut: never two, and never none that could live.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::process::{Command, Stdio};

const RUNS: usize = 40;

#[test]
fn whatever_is_killed_stopped_or_cut_a_guest_runs_once_and_only_once() {
    let runs = RUNS.to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_godwit"))
        .args(["bench", "faults", "--runs", &runs, "--seed", "20261121", "--parallel", "6"])
        .stdin(Stdio::null())
        .output()
        .expect("godwit starts");
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{complaint}");
    assert_eq!(said.lines().filter(|line| line.starts_with("run ")).count(), RUNS, "{said}");
}
