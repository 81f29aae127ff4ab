use godwit_api::FailureCause;
use godwit_launcher::rpc::{
    Accelerator, GuestAgentFacts, GuestInterface, GuestOs, MigrationFacts, MigrationRole, VolumeState,
};

use super::*;
use crate::decide::Failure;

const NOW: &str = "2026-11-20T20:00:00.9Z";

fn vmi(status: Value) -> VirtualMachineInstance {
    serde_json::from_value(json!({
        "metadata": { "name": "vm", "namespace": "default", "uid": "u", "resourceVersion": "7" },
        "spec": {
            "domain": { "cpu": { "cores": 2 }, "devices": { "interfaces": [
                { "name": "default", "masquerade": {}, "macAddress": "02:00:00:00:00:11" },
                { "name": "red", "bridge": {}, "macAddress": "02:00:00:00:00:22" },
            ] } },
            "networks": [{ "name": "default", "pod": {} }, { "name": "red", "multus": { "networkName": "red" } }],
        },
        "status": status,
    }))
    .unwrap()
}

fn running() -> State {
    State {
        phase: DomainPhase::Running,
        accelerator: Some(Accelerator::Tcg),
        qemu_version: Some("7.2.22".into()),
        machine_type: Some("pc-q35-7.2".into()),
        ..State::default()
    }
}

fn made(vmi: &VirtualMachineInstance, changes: &[Change], state: State) -> Option<Value> {
    let launchers = BTreeMap::from([("p".to_owned(), state)]);
    let addresses = BTreeMap::from([("p".to_owned(), vec!["10.244.1.5".to_owned()])]);
    let target = TargetView {
        uid: "m".into(),
        address: "10.88.0.12".into(),
        over_own_network: false,
        ports: [("4000".to_owned(), 0), ("4001".to_owned(), 49152)].into(),
    };
    let shared = PersistentVolumeClaimInfo {
        claim_name: Some("data".into()),
        access_modes: vec!["ReadWriteMany".into()],
        ..PersistentVolumeClaimInfo::default()
    };
    let migratable = Migratable {
        claims: [("data".to_owned(), shared)].into(),
        conditions: vec![Condition::new(c::LIVE_MIGRATABLE, true)],
        method: Some("LiveMigration".into()),
    };
    let from = Sources {
        node: "node2",
        now: NOW.parse().unwrap(),
        launchers: &launchers,
        addresses: &addresses,
        target: Some(&target),
        link_rate: None,
        migratable: &migratable,
    };
    patch(vmi, changes, &from)
}

/// The object after the patch, as an API server makes it (RFC 7386).
fn applied(vmi: &VirtualMachineInstance, patch: &Value) -> VirtualMachineInstance {
    fn merge(to: &mut Value, from: &Value) {
        let Value::Object(from) = from else {
            *to = from.clone();
            return;
        };
        if !to.is_object() {
            *to = json!({});
        }
        for (key, value) in from {
            if value.is_null() {
                to.as_object_mut().unwrap().remove(key);
            } else {
                merge(to.as_object_mut().unwrap().entry(key).or_insert(Value::Null), value);
            }
        }
    }
    let mut value = serde_json::to_value(vmi).unwrap();
    merge(&mut value, patch);
    serde_json::from_value(value).unwrap()
}

#[test]
fn a_guest_whose_tpm_has_failed_is_not_migratable() {
    let changes = [Change::Report { pod: "p".into() }];
    let old = vmi(json!({ "phase": "Running" }));
    let state = State { tpm_failure: Some("the guest's TPM has ended".into()), ..running() };
    let new = applied(&old, &made(&old, &changes, state.clone()).unwrap());
    let told = new.condition("LiveMigratable").unwrap();
    assert!(told.is_false());
    assert_eq!(told.reason.as_deref(), Some("TPMNotLiveMigratable"));
    assert_eq!(told.message.as_deref(), Some("the guest's TPM has ended"));
    assert_eq!(made(&new, &changes, state), None, "it is said once");
}

#[test]
fn a_report_says_everything_once() {
    let old = vmi(json!({ "phase": "Scheduled", "conditions": [{ "type": "Ready", "status": "False" }] }));
    let changes = [Change::Phase("Running"), Change::Report { pod: "p".into() }];
    let patch = made(&old, &changes, running()).unwrap();
    assert_eq!(patch["metadata"], json!({ "resourceVersion": "7" }));
    let new = applied(&old, &patch);
    assert_eq!(new.status.phase.as_str(), "Running");
    assert_eq!(patch["status"]["phaseTransitionTimestamps"][0]["phaseTransitionTimestamp"], "2026-11-20T20:00:00Z");
    assert_eq!(new.condition("Ready").unwrap().status, "False", "other writers' conditions stay");
    assert!(new.condition("LiveMigratable").unwrap().is_true());
    assert!(new.condition("AgentConnected").is_none());
    assert_eq!(new.status.interfaces[0].ip_address.as_deref(), Some("10.244.1.5"));
    assert_eq!(new.status.interfaces[1].ip_address, None);
    assert_eq!(new.status.accelerator.as_deref(), Some("tcg"));
    assert_eq!(new.status.migration_transport.as_deref(), Some("Unix"));
    assert_eq!(patch["status"]["machine"]["type"], "pc-q35-7.2");
    assert_eq!(patch["status"]["currentCPUTopology"]["cores"], 2);
    assert_eq!(made(&new, &changes, running()), None, "nothing differs any more");
}

#[test]
fn what_the_agent_says_is_taken_and_kept() {
    let old =
        applied(&vmi(json!({})), &made(&vmi(json!({})), &[Change::Report { pod: "p".into() }], running()).unwrap());
    let mut state = running();
    state.guest_agent = GuestAgentFacts {
        connected: true,
        hostname: Some("vm".into()),
        os: Some(GuestOs { id: "debian".into(), ..GuestOs::default() }),
        interfaces: vec![GuestInterface {
            name: "eth1".into(),
            mac: Some("02:00:00:00:00:22".to_uppercase()),
            addresses: vec!["fe80::22".into(), "192.168.5.2".into()],
        }],
        ..GuestAgentFacts::default()
    };
    let report = [Change::Report { pod: "p".into() }];
    let new = applied(&old, &made(&old, &report, state.clone()).unwrap());
    assert!(new.condition("AgentConnected").unwrap().is_true());
    let red = &new.status.interfaces[1];
    assert_eq!(red.ip_address.as_deref(), Some("192.168.5.2"));
    assert_eq!(red.ip_addresses, ["fe80::22", "192.168.5.2"]);
    assert_eq!(red.interface_name.as_deref(), Some("eth1"));
    assert_eq!(new.status.interfaces[0].ip_address.as_deref(), Some("10.244.1.5"), "the pod's, not the guest's");
    assert_eq!(new.status.guest_os_info.as_ref().and_then(|o| o.id.as_deref()), Some("debian"));
    assert_eq!(made(&new, &report, state), None);
    // The agent goes away: its condition does too, the addresses stay.
    let newer = applied(&new, &made(&new, &report, running()).unwrap());
    assert!(newer.condition("AgentConnected").is_none());
    assert_eq!(newer.status.interfaces[1].ip_address.as_deref(), Some("192.168.5.2"));
}

#[test]
fn a_pause_is_a_condition_with_its_reason() {
    let report = [Change::Report { pod: "p".into() }];
    let mut state = running();
    state.phase = DomainPhase::Paused;
    let paused = applied(&vmi(json!({})), &made(&vmi(json!({})), &report, state.clone()).unwrap());
    assert_eq!(paused.condition("Paused").unwrap().reason.as_deref(), Some("PausedByUser"));
    state.qemu_status = Some("io-error".into());
    let failed = applied(&paused, &made(&paused, &report, state).unwrap());
    assert_eq!(failed.condition("Paused").unwrap().reason.as_deref(), Some("PausedIOError"));
    let resumed = applied(&failed, &made(&failed, &report, running()).unwrap());
    assert!(resumed.condition("Paused").is_none());
}

#[test]
fn a_place_that_is_published_anew_replaces_the_old_one() {
    let old = vmi(json!({ "migrationState": {
        "migrationUid": "m", "targetNodeAddress": "10.88.0.12", "targetDirectMigrationNodePorts": { "3000": 0, "4000": 49152 },
    } }));
    let new = applied(&old, &made(&old, &[Change::Published], State::default()).unwrap());
    let m = new.status.migration_state.unwrap();
    assert_eq!(m.target_direct_migration_node_ports, BTreeMap::from([("4000".into(), 0), ("4001".into(), 49152)]));
    assert_eq!(m.migration_uid.as_deref(), Some("m"), "the controller's part stays");
    assert_eq!(m.target_node_domain_detected, Some(true));
    assert_eq!(m.target_state.unwrap().node_address.as_deref(), Some("10.88.0.12"));
}

#[test]
fn an_arrival_moves_the_vmi() {
    let old =
        vmi(json!({ "nodeName": "node1", "evacuationNodeName": "node1", "migrationState": { "migrationUid": "m" } }));
    let resume_us = "2026-11-20T19:59:59.5Z".parse::<Timestamp>().unwrap().as_microsecond();
    let patch = made(&old, &[Change::Arrived { resume_us }], State::default()).unwrap();
    assert_eq!(patch["metadata"]["labels"]["kubevirt.io/nodeName"], "node2");
    assert_eq!(patch["status"]["migrationState"]["targetNodeDomainReadyTimestamp"], "2026-11-20T19:59:59Z");
    let new = applied(&old, &patch);
    assert_eq!(new.status.node_name.as_deref(), Some("node2"));
    assert_eq!(new.status.evacuation_node_name, None);
}

#[test]
fn a_guest_that_only_changes_its_launcher_is_still_to_leave() {
    let old =
        vmi(json!({ "nodeName": "node2", "evacuationNodeName": "node2", "migrationState": { "migrationUid": "m" } }));
    let patch = made(&old, &[Change::Arrived { resume_us: 0 }], State::default()).unwrap();
    assert_eq!(applied(&old, &patch).status.evacuation_node_name.as_deref(), Some("node2"));
}

#[test]
fn an_end_carries_progress_and_the_measured_standstill() {
    let mut state = running();
    let mut facts = MigrationFacts::new("m", MigrationRole::Source);
    facts.status = "completed".into();
    facts.total_bytes = 1000;
    facts.processed_bytes = 900;
    facts.start_us = Some(1_000_000);
    facts.end_us = Some(1_250_000);
    facts.remaining_bytes = 70;
    facts.qemu_downtime_ms = Some(2);
    state.migration = Some(facts);
    let changes = [Change::Progress { pod: "p".into() }, Change::Completed { downtime_us: Some(3_600) }];
    let patch = made(&vmi(json!({})), &changes, state).unwrap();
    let m = &patch["status"]["migrationState"];
    assert_eq!(m["completed"], true);
    assert_eq!(m["endTimestamp"], "2026-11-20T20:00:00Z");
    assert_eq!((&m["progress"]["percent"], &m["progress"]["bytesRemaining"]), (&json!(100), &json!(0)));
    assert_eq!(m["progress"]["totalMilliseconds"], 250);
    assert_eq!(m["progress"]["downtimeMilliseconds"], 4);
    assert_eq!(m["progress"]["qemuDowntimeMilliseconds"], 2);
}

#[test]
fn an_end_that_the_target_reports_leaves_nothing_to_be_sent() {
    let old = vmi(json!({ "migrationState": { "progress": { "percent": 61, "bytesRemaining": 5000 } } }));
    let patch = made(&old, &[Change::Completed { downtime_us: None }], State::default()).unwrap();
    let progress = applied(&old, &patch).status.migration_state.unwrap().progress.unwrap();
    assert_eq!((progress.percent, progress.bytes_remaining), (Some(100), Some(0)));
}

#[test]
fn a_failure_is_final_and_says_why() {
    let failure = Failure::new(FailureCause::Cancelled, "Live migration has been aborted");
    let changes = [Change::Abort("Succeeded"), Change::Failed(failure)];
    let old = vmi(json!({ "migrationState": { "progress": { "percent": 7, "expectedDowntimeMilliseconds": 9 } } }));
    let patch = made(&old, &changes, State::default()).unwrap();
    let m = &patch["status"]["migrationState"];
    assert_eq!((&m["failed"], &m["completed"], &m["abortStatus"]), (&json!(true), &json!(true), &json!("Succeeded")));
    assert_eq!(m["failureReason"], "Live migration has been aborted");
    assert_eq!(m["failureCause"], "Cancelled");
    let progress = applied(&old, &patch).status.migration_state.unwrap().progress.unwrap();
    assert_eq!((progress.percent, progress.expected_downtime_milliseconds), (Some(7), None), "nothing is expected");
}

#[test]
fn a_migration_that_was_to_be_given_up_and_is_quicker_has_no_cause() {
    let old = vmi(json!({ "migrationState": { "migrationUid": "m" } }));
    let patch = made(&old, &[Change::GivingUp(FailureCause::OutOfTime)], State::default()).unwrap();
    let given_up = applied(&old, &patch);
    let m = given_up.status.migration_state.clone().unwrap();
    assert_eq!((m.failure_cause, m.failed, m.completed), (Some(FailureCause::OutOfTime), None, None));
    let patch = made(&given_up, &[Change::Completed { downtime_us: None }], State::default()).unwrap();
    assert_eq!(applied(&given_up, &patch).status.migration_state.unwrap().failure_cause, None);
}

#[test]
fn a_pause_by_the_migration_is_told_from_a_users() {
    // To its launcher it is a running guest, which runs on if the migration fails.
    let mut state = running();
    let mut facts = MigrationFacts::new("m", MigrationRole::Source);
    facts.paused_by_migration = true;
    // So it stands before post-copy, for a moment.
    state.migration = Some(facts.clone());
    let report = [Change::Report { pod: "p".into() }];
    let switching = made(&vmi(json!({})), &report, state.clone()).map(|patch| applied(&vmi(json!({})), &patch));
    assert!(switching.is_none_or(|vmi| vmi.condition("Paused").is_none()));
    facts.mode = MigrationMode::Paused;
    state.migration = Some(facts);
    let changes = [Change::Mode(MigrationMode::Paused), Change::Report { pod: "p".into() }];
    let patch = made(&vmi(json!({})), &changes, state).unwrap();
    assert_eq!(patch["status"]["migrationState"]["mode"], "Paused");
    let paused = applied(&vmi(json!({})), &patch);
    let condition = paused.condition("Paused").unwrap();
    assert_eq!(condition.reason.as_deref(), Some("PausedByMigrationMonitor"));
    assert_eq!(condition.message.as_deref(), Some("VMI was paused by the migration monitor"));
    // It runs again at the target.
    let arrived = [Change::Arrived { resume_us: 0 }, Change::Report { pod: "p".into() }];
    let moved = applied(&paused, &made(&paused, &arrived, running()).unwrap());
    assert!(moved.condition("Paused").is_none());
}

#[test]
fn volumes_are_told_as_the_guest_has_them() {
    let mut old = vmi(json!({ "volumeStatus": [{ "name": "gone", "target": "vdz" }] }));
    old.spec.volumes = serde_json::from_value(json!([
        { "name": "root", "containerDisk": { "image": "x" } },
        { "name": "data", "persistentVolumeClaim": { "claimName": "data" } },
    ]))
    .unwrap();
    let mut state = running();
    let disk = |name: &str, target: &str, size_bytes| VolumeState {
        name: name.into(),
        target: target.into(),
        size_bytes,
        ..VolumeState::default()
    };
    state.volumes = vec![disk("root", "vda", Some(1 << 30)), disk("data", "vdb", None)];
    let report = [Change::Report { pod: "p".into() }];
    let new = applied(&old, &made(&old, &report, state).unwrap());
    let [root, data] = &new.status.volume_status[..] else { panic!("{:?}", new.status.volume_status) };
    assert_eq!((root.name.as_str(), root.target.as_str(), root.size), ("root", "vda", Some(1 << 30)));
    assert_eq!(root.persistent_volume_claim_info, None);
    let claim = data.persistent_volume_claim_info.as_ref().unwrap();
    assert_eq!((data.target.as_str(), claim.access_modes.as_slice()), ("vdb", &["ReadWriteMany".to_owned()][..]));
    // A launcher that does not say keeps what is known.
    assert_eq!(made(&new, &report, running()), None);
}

#[test]
fn a_disk_that_came_late_is_ready_when_the_guest_has_it_and_gone_when_it_has_not() {
    let entry = |phase: &str| {
        json!({ "volumeStatus": [{ "name": "late", "target": "", "phase": phase,
            "hotplugVolume": { "attachPodName": "hp-volume-x", "attachPodUID": "u" } }] })
    };
    let volumes = json!([{ "name": "late", "persistentVolumeClaim": { "claimName": "data", "hotpluggable": true } }]);
    let report = [Change::Report { pod: "p".into() }];
    let with = || {
        let mut state = running();
        let late = VolumeState { name: "late".into(), target: "sda".into(), place: Some(0), ..VolumeState::default() };
        state.volumes = vec![late];
        state
    };
    let told = |old: &VirtualMachineInstance, state: State| {
        let patch = made(old, &report, state);
        let new = patch.map_or_else(|| old.clone(), |patch| applied(old, &patch));
        let status = new.status.volume_status.into_iter().next();
        status.map(|one| (one.phase.map(|phase| phase.as_str().to_owned()).unwrap_or_default(), one.target))
    };
    let told_as = |phase: &str, target: &str| Some((phase.to_owned(), target.to_owned()));
    let mut old = vmi(entry("AttachedToNode"));
    old.spec.volumes = serde_json::from_value(volumes.clone()).unwrap();
    assert_eq!(told(&old, running()), told_as("AttachedToNode", ""), "it waits for the launcher");
    assert_eq!(told(&old, with()), told_as("Ready", "sda"));
    // The controller says first that there is such a disk.
    old.status.volume_status.clear();
    assert_eq!(told(&old, running()), None);

    let leaving = vmi(entry("Detaching"));
    assert_eq!(told(&leaving, with()), told_as("Detaching", ""), "the guest still has it");
    assert_eq!(told(&leaving, running()), told_as("UnMountedFromPod", ""));
}
