//! Guests with a trusted platform module or EFI firmware, moved from launcher to launcher.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod pod;

use godwit_api::VirtualMachineInstance;
use godwit_guest_rom::Story;
use godwit_launcher::rpc::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pod::*;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

fn with_tpm() -> VirtualMachineInstance {
    let mut vmi = vm_order().vmi;
    vmi.spec.domain.devices.tpm = Some(Default::default());
    vmi
}

/// The software TPMs that keep their state in this pod.
fn modules(pod: &Pod) -> Vec<Pid> {
    let folder = pod.folder.path().to_str().unwrap();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_one = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.contains("swtpm") && line.contains(folder)
    };
    numbers.filter(is_one).map(Pid::from_raw).collect()
}

async fn none_is_left(pod: &Pod) {
    let gone = async {
        while !modules(pod).is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("its TPM goes with its QEMU");
}

#[tokio::test]
async fn a_tpm_has_a_process_at_the_guests_place_only() {
    let (source, target) = (Pod::start().await, Pod::start().await);
    source.client.start(&VmOrder { vmi: with_tpm(), ..vm_order() }).await.unwrap();
    assert_eq!(modules(&source).len(), 1);
    let mut here = source.console().await;
    let mut story = Story::default();
    here.hear(&mut story, 1).await;
    let ready = target.client.prepare_target(&TargetOrder { vmi: with_tpm(), ..target_order() }).await.unwrap();
    let mut there = target.console().await;
    let _carrier = carry(&source, "outgoing.sock", &target, &ready.socket);
    source.client.migrate(&source_order(None)).await.unwrap();
    source.until("completed", |s| status(s) == "completed").await;
    target.client.go(MIGRATION).await.unwrap();
    here.drain(&mut story).await;
    there.hear(&mut story, 3).await;
    none_is_left(&source).await;
    assert_eq!(modules(&target).len(), 1);
    target.client.shutdown(Duration::ZERO).await.unwrap();
    none_is_left(&target).await;
}

#[tokio::test]
async fn a_guest_whose_tpm_has_died_stays_and_runs_on() {
    let (source, target) = (Pod::start().await, Pod::start().await);
    source.client.start(&VmOrder { vmi: with_tpm(), ..vm_order() }).await.unwrap();
    let mut here = source.console().await;
    let mut story = Story::default();
    here.hear(&mut story, 1).await;
    for module in modules(&source) {
        kill(module, Signal::SIGKILL).unwrap();
    }
    none_is_left(&source).await;
    let ready = target.client.prepare_target(&TargetOrder { vmi: with_tpm(), ..target_order() }).await.unwrap();
    let _carrier = carry(&source, "outgoing.sock", &target, &ready.socket);
    source.client.migrate(&source_order(None)).await.unwrap();
    let state = source.until("its end", |s| s.migration.as_ref().is_some_and(MigrationFacts::is_final)).await;
    assert_eq!((status(&state), state.phase), ("failed", DomainPhase::Running), "{state:#?}");
    here.hear(&mut story, 3).await;
}

#[tokio::test]
async fn secure_boots_variables_are_written_where_the_guest_goes() {
    let mut vmi = vm_order().vmi;
    vmi.spec.domain.memory = serde_json::from_value(json!({"guest": "128Mi"})).unwrap();
    vmi.spec.domain.firmware = serde_json::from_value(json!({"bootloader": {"efi": {}}})).unwrap();
    vmi.spec.domain.features = serde_json::from_value(json!({"smm": {}})).unwrap();
    let (source, target) = (Pod::start().await, Pod::start().await);
    let file = |pod: &Pod| Pod::paths(pod.folder.path()).ephemeral_disks.join("efi-variables.fd");
    let differs = |file: PathBuf, empty: Vec<u8>| async move {
        let written = async {
            while std::fs::read(&file).unwrap() == empty {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, written).await.expect("the firmware's variables are written");
    };
    source.client.start(&VmOrder { vmi: vmi.clone(), ..vm_order() }).await.unwrap();
    let ready = target.client.prepare_target(&TargetOrder { vmi, ..target_order() }).await.unwrap();
    // A target's are empty, and its guest does not run.
    let empty = std::fs::read(file(&target)).unwrap();
    differs(file(&source), empty.clone()).await;
    let _carrier = carry(&source, "outgoing.sock", &target, &ready.socket);
    source.client.migrate(&source_order(None)).await.unwrap();
    source.until("completed", |s| status(s) == "completed").await;
    assert!(std::fs::read(file(&target)).unwrap() == empty, "nothing is written before the go");
    assert_eq!(target.client.go(MIGRATION).await.unwrap().phase, DomainPhase::Running);
    differs(file(&target), empty).await;
}
