//! Reboots by the power button: a guest without an agent starts over in its QEMU.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod pod;

use godwit_guest_rom::Line;
use godwit_launcher::rpc::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pod::*;
use std::time::Duration;

/// A guest that beats; where it is yet to start, only then. (What it said before anybody listened is not heard.)
async fn boots(console: &mut Console, is_yet_to: bool) {
    let work = async {
        let mut started = !is_yet_to;
        loop {
            let line = console.lines.next_line().await.unwrap().expect("the console has ended");
            match Line::parse(&line) {
                Some(Line::Start { .. }) => started = true,
                Some(Line::Beat { errors: 0, .. }) if started => return,
                _ => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("it does not boot");
}

/// A guest that does nothing at all, and hears no power button.
async fn deaf() -> Pod {
    let pod = Pod::start().await;
    let mut rom = vec![0; 64 << 10];
    // At the reset vector: cli; hlt; jmp to the hlt.
    rom[0xfff0..0xfff4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    std::fs::write(Pod::paths(pod.folder.path()).kernel_boot.join("rom.bin"), rom).unwrap();
    pod.client.start(&vm_order()).await.unwrap();
    pod
}

#[tokio::test]
async fn a_guest_without_an_agent_starts_over_in_its_qemu_and_can_be_ended_afterwards() {
    let pod = Pod::start().await;
    let first = pod.client.start(&vm_order()).await.unwrap();
    let mut console = pod.console().await;
    let mut watch = pod.client.watch().await.unwrap();
    let phases = tokio::spawn(async move {
        let mut phases = Vec::new();
        while let Ok(Some(state)) = watch.next().await {
            phases.push(state.phase);
        }
        phases.dedup();
        phases
    });
    // It may miss the first press: it is not waited for.
    for _ in 0..2 {
        assert!(pod.client.reboot().await.unwrap().is_rebooting());
        boots(&mut console, true).await;
        let state = pod.until("it has started over", |state| state.reboot.is_none()).await;
        assert_eq!((state.phase, state.qemu_pid), (DomainPhase::Running, first.qemu_pid));
    }
    let events: Vec<String> = pod.client.events().await.unwrap().into_iter().map(|event| event.event).collect();
    let turns = ["SHUTDOWN", "STOP", "RESET", "RESUME"];
    let turned: Vec<&str> = events.iter().map(String::as_str).filter(|event| turns.contains(event)).collect();
    assert_eq!(turned, ["RESUME", "SHUTDOWN", "STOP", "RESET", "RESUME", "SHUTDOWN", "STOP", "RESET", "RESUME"]);

    // The next time that it powers down is its end.
    pod.client.shutdown(Duration::from_secs(60)).await.unwrap();
    let ended = pod.end().await;
    assert_eq!(ended.phase, DomainPhase::Shutdown, "{ended:#?}");
    assert_eq!(ended.exit_reason.as_deref(), Some("the guest has shut down as it was told to"));
    assert_eq!(phases.await.unwrap(), [DomainPhase::Running, DomainPhase::Shutdown], "nobody has paused it");
}

#[tokio::test]
async fn an_end_that_is_ordered_meanwhile_goes_before() {
    let pod = Pod::start().await;
    pod.client.start(&vm_order()).await.unwrap();
    let mut console = pod.console().await;
    boots(&mut console, false).await;
    pod.client.reboot().await.unwrap();
    pod.client.shutdown(Duration::from_secs(60)).await.unwrap();
    assert_eq!(refusal(pod.client.reboot().await), Refusal::Conflict);
    let ended = pod.end().await;
    assert_eq!(ended.phase, DomainPhase::Shutdown, "{ended:#?}");
    assert_eq!(ended.exit_reason.as_deref(), Some("the guest has shut down as it was told to"));
    assert_eq!(ended.reboot, None);
}

#[tokio::test]
async fn a_guest_ends_when_it_powers_down_after_a_reboot_that_was_refused_because_qemu_did_not_answer() {
    let pod = Pod::start().await;
    let state = pod.client.start(&vm_order()).await.unwrap();
    let mut console = pod.console().await;
    boots(&mut console, false).await;
    let qemu = Pid::from_raw(state.qemu_pid.unwrap() as i32);
    kill(qemu, Signal::SIGSTOP).unwrap();
    assert_eq!(refusal(pod.client.reboot().await), Refusal::Failed);
    // Now it learns that it is to stay.
    kill(qemu, Signal::SIGCONT).unwrap();
    pod.client.shutdown(PATIENCE / 2).await.unwrap();
    let ended = pod.end().await;
    assert_eq!(ended.phase, DomainPhase::Shutdown, "{ended:#?}");
    assert_eq!(ended.exit_reason.as_deref(), Some("the guest has shut down as it was told to"), "not by force");
}

#[tokio::test]
async fn a_guest_that_is_asked_to_reboot_is_not_sent_away_and_a_reset_is_a_reboot() {
    let pod = deaf().await;
    let asked = pod.client.reboot().await.unwrap();
    assert!(asked.is_rebooting());
    assert_eq!(pod.client.reboot().await.unwrap().reboot, asked.reboot, "one is enough");
    assert_eq!(refusal(pod.client.migrate(&source_order(None)).await), Refusal::Conflict);
    pod.client.reset().await.unwrap();
    let state = pod.until("it has started over", |state| state.reboot.is_none()).await;
    assert_eq!(state.phase, DomainPhase::Running);

    pod.client.pause().await.unwrap();
    assert_eq!(refusal(pod.client.reboot().await), Refusal::Conflict);
    pod.client.unpause().await.unwrap();
    assert!(pod.client.reboot().await.unwrap().is_rebooting());
    pod.client.shutdown(Duration::ZERO).await.unwrap();
    assert_eq!(pod.end().await.phase, DomainPhase::Shutdown);
}
