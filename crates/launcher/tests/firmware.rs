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
    let _carrier = moves(&source, &target, &ready.socket).await;
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
    let told = |s: &State| s.tpm_failure.as_deref().is_some_and(|why| why.contains("signal 9"));
    source.until("its TPM is said to have failed", told).await;
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

/// The guest with what it keeps on one claim that all of its pods see.
fn keeps(firmware: bool) -> VirtualMachineInstance {
    let mut vmi = vm_order().vmi;
    vmi.spec.domain.devices.tpm = serde_json::from_value(json!({"persistent": true})).unwrap();
    if firmware {
        vmi.spec.domain.memory = serde_json::from_value(json!({"guest": "128Mi"})).unwrap();
        vmi.spec.domain.firmware =
            serde_json::from_value(json!({"bootloader": {"efi": {"secureBoot": false, "persistent": true}}})).unwrap();
    }
    vmi
}

/// Makes the claim of the second pod that of the first.
fn share_claim(first: &Pod, second: &Pod) {
    let of = |pod: &Pod| Pod::paths(pod.folder.path()).persistent_state;
    std::fs::create_dir_all(of(first)).unwrap();
    std::fs::create_dir_all(of(second).parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(of(first), of(second)).unwrap();
}

/// The folders on the claim, and the one that counts for the TPM and for EFI.
fn on_claim(pod: &Pod) -> (Vec<String>, [Option<String>; 2]) {
    let root = Pod::paths(pod.folder.path()).persistent_state;
    let entries = std::fs::read_dir(&root).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_dir());
    let mut folders: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    folders.sort();
    let pointer: serde_json::Value =
        serde_json::from_slice(&std::fs::read(root.join("current.json")).unwrap()).unwrap();
    (folders, ["tpm", "efiVariables"].map(|kept| pointer[kept].as_str().map(str::to_owned)))
}

async fn settled(pod: &Pod, wanted: &str) {
    let all = |(folders, pointer): (Vec<String>, [Option<String>; 2])| {
        folders == [wanted] && pointer.iter().flatten().all(|folder| folder == wanted)
    };
    let work = async {
        while !all(on_claim(pod)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("{:?}, not {wanted}", on_claim(pod)));
}

#[tokio::test]
async fn on_a_claim_that_both_ends_see_a_guests_state_is_its_sources_until_it_goes_and_its_targets_then() {
    let (source, first, second) = (Pod::start().await, Pod::start().await, Pod::start().await);
    for target in [&first, &second] {
        share_claim(&source, target);
    }
    source.client.start(&VmOrder { vmi: keeps(true), ..vm_order() }).await.unwrap();
    assert_eq!(on_claim(&source), (vec![UID.into()], [Some(UID.into()), Some(UID.into())]));

    // A target that it never comes to, with the TPM's state there already or not.
    let order = TargetOrder { vmi: keeps(true), ..target_order() };
    first.client.prepare_target(&TargetOrder { migration_uid: "vain".into(), ..order.clone() }).await.unwrap();
    assert_eq!(on_claim(&source).0, [UID, "vain"]);
    first.client.abandon("vain").await.unwrap();
    settled(&source, UID).await;

    let ready = second.client.prepare_target(&order).await.unwrap();
    let _carrier = carry(&source, "outgoing.sock", &second, &ready.socket);
    source.client.migrate(&source_order(None)).await.unwrap();
    source.until("completed", |s| status(s) == "completed").await;
    // All of the TPM has come, and still the source's is what counts.
    assert_eq!(on_claim(&source).1, [Some(UID.into()), Some(UID.into())]);
    assert_eq!(second.client.go(MIGRATION).await.unwrap().phase, DomainPhase::Running);
    settled(&second, MIGRATION).await;
    let own = Pod::paths(second.folder.path()).persistent_state.join(MIGRATION);
    assert!(own.join("tpm/tpm2-00.permall").is_file());
    assert_eq!(std::fs::metadata(own.join("efi-variables.fd")).unwrap().len() % 4096, 0);
}

#[tokio::test]
async fn a_target_that_is_killed_while_a_guest_comes_leaves_its_state_as_it_was() {
    let (source, target) = (Pod::start().await, Pod::start().await);
    share_claim(&source, &target);
    source.client.start(&VmOrder { vmi: keeps(false), ..vm_order() }).await.unwrap();
    let mut here = source.console().await;
    let mut story = Story::default();
    here.hear(&mut story, 1).await;
    let before =
        std::fs::read(Pod::paths(source.folder.path()).persistent_state.join(UID).join("tpm/tpm2-00.permall")).unwrap();
    let order = TargetOrder { vmi: keeps(false), ..target_order() };
    let ready = target.client.prepare_target(&order).await.unwrap();
    let _carrier = carry(&source, "outgoing.sock", &target, &ready.socket);
    // So slow that it is under way for a while.
    source.client.migrate(&source_order(Some(100_000))).await.unwrap();
    source.until("bytes are sent", |s| s.migration.as_ref().is_some_and(|m| m.processed_bytes > 0)).await;
    let pid = target.client.state().await.unwrap().qemu_pid.unwrap();
    kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGKILL).unwrap();
    source.until("its end", |s| s.migration.as_ref().is_some_and(MigrationFacts::is_final)).await;
    here.hear(&mut story, 3).await;
    assert_eq!(on_claim(&source).1, [Some(UID.into()), None]);

    // It is stopped, and starts in another pod with what it had; what was received in vain goes.
    source.client.shutdown(Duration::ZERO).await.unwrap();
    none_is_left(&source).await;
    let next = Pod::start().await;
    share_claim(&source, &next);
    next.client.start(&VmOrder { vmi: keeps(false), ..vm_order() }).await.unwrap();
    settled(&next, UID).await;
    let after =
        std::fs::read(Pod::paths(next.folder.path()).persistent_state.join(UID).join("tpm/tpm2-00.permall")).unwrap();
    assert_eq!(after.len(), before.len());
}
