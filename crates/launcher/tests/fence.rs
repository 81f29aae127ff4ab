//! Guests whose node may not run them any more.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod pod;

use godwit_guest_rom::Story;
use godwit_launcher::fence::{self, Clock};
use godwit_launcher::rpc::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pod::*;
use std::path::Path;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(600);

fn after(time: Duration) -> RunUntilOrder {
    RunUntilOrder::by(Clock::Boot, Clock::Boot.now() + time)
}

#[tokio::test]
async fn a_guest_runs_while_its_time_lasts_and_not_a_moment_longer_even_if_qemu_hangs() {
    let mut pod = Pod::start().await;
    let order = VmOrder { run_until: Some(after(LONG)), ..vm_order() };
    let state = pod.client.start(&order).await.unwrap();
    let mut story = Story::default();
    pod.console().await.hear(&mut story, 2).await;
    let qemu = state.qemu_pid.unwrap();
    kill(Pid::from_raw(qemu as i32), Signal::SIGSTOP).unwrap();
    // The VM's task waits for QEMU's answer now; the fence does not.
    let busy = pod.client.clone();
    let asked = tokio::spawn(async move { busy.pause().await });
    pod.client.run_until(after(Duration::from_millis(100))).await.unwrap();
    assert!(Path::new(&format!("/proc/{qemu}")).exists(), "the longer time stands");
    asked.abort();
    kill(Pid::from_raw(qemu as i32), Signal::SIGCONT).unwrap();
    pod.client.shutdown(Duration::ZERO).await.unwrap();
    let end = tokio::time::timeout(PATIENCE, &mut pod.launcher).await.unwrap().unwrap().unwrap();
    assert!(!end.fenced, "{end:?}");
}

#[tokio::test]
async fn a_guest_whose_time_has_passed_is_killed_and_that_is_said_and_written_down() {
    let mut pod = Pod::start().await;
    let state = pod.client.start(&vm_order()).await.unwrap();
    let qemu = Pid::from_raw(state.qemu_pid.unwrap() as i32);
    kill(qemu, Signal::SIGSTOP).unwrap();
    pod.client.run_until(after(Duration::from_millis(50))).await.unwrap();
    let state = pod.until("it is fenced", |state| state.fenced).await;
    assert_eq!((state.phase, state.exit_reason.as_deref()), (DomainPhase::Crashed, Some(fence::REASON)));
    assert!(kill(qemu, None).is_err(), "QEMU is gone, and was reaped");
    let end = tokio::time::timeout(PATIENCE, &mut pod.launcher).await.unwrap().unwrap().unwrap();
    assert!(end.fenced);
    assert!(fence::read(&Pod::paths(pod.folder.path()).ephemeral_disks).is_some());
}

#[tokio::test]
async fn nothing_is_started_and_no_go_is_taken_when_the_time_has_passed() {
    let pod = Pod::start().await;
    let late = VmOrder { run_until: Some(after(Duration::ZERO)), ..vm_order() };
    let refused = pod.client.start(&late).await.unwrap_err();
    assert_eq!(refused.refusal(), Some(Refusal::Conflict), "{refused}");
    // With more time it is.
    pod.client.start(&VmOrder { run_until: Some(after(LONG)), ..vm_order() }).await.unwrap();

    let target = Pod::start().await;
    target.client.prepare_target(&target_order()).await.unwrap();
    let go = GoOrder { migration_uid: MIGRATION.into(), paused: false, run_until: Some(after(Duration::ZERO)) };
    let refused = target.client.give_go(&go).await.unwrap_err();
    assert!(refused.to_string().contains("lease") || target.client.state().await.is_err(), "{refused}");
    let end = target.until("the waiting target is gone as well", |state| state.fenced).await;
    assert_eq!(end.phase, DomainPhase::Crashed);
}
