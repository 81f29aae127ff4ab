use std::collections::BTreeSet;

use godwit_api::MigrationPhase as Phase;
use godwit_api::failure::FailureCause;
use serde_json::{Value, json};

use super::table::{Action, Blame, Fact, TABLE, lookup, rank};
use crate::testing::Cluster;
use crate::{Key, Kind, Name, Ref};

const ALL_PHASES: [Phase; 9] = [
    Phase::Unset,
    Phase::Pending,
    Phase::Scheduling,
    Phase::Scheduled,
    Phase::PreparingTarget,
    Phase::TargetReady,
    Phase::Running,
    Phase::Succeeded,
    Phase::Failed,
];

#[test]
fn no_fact_is_ambiguous() {
    let mut seen = BTreeSet::new();
    for row in TABLE {
        assert!(seen.insert((rank(&row.from), row.from.clone(), row.fact)), "{row:?} is there twice");
    }
}

#[test]
fn final_phases_are_absorbing() {
    for row in TABLE.iter().filter(|row| row.from.is_final()) {
        assert_eq!((&row.to, row.actions), (&row.from, &[][..]), "{row:?}");
    }
}

#[test]
fn phases_never_go_back() {
    for row in TABLE {
        assert!(rank(&row.to) >= rank(&row.from), "{row:?}");
    }
}

#[test]
fn time_ends_every_phase() {
    for phase in ALL_PHASES.iter().filter(|phase| !phase.is_final()) {
        let rows: Vec<_> = TABLE.iter().filter(|row| row.from == *phase).collect();
        assert!(!rows.is_empty(), "{phase:?}");
        if *phase == Phase::Unset {
            assert!(rows.iter().all(|row| row.to != Phase::Unset), "the first phase is left with any fact");
            continue;
        }
        let timeouts: Vec<_> = rows.iter().filter(|row| row.fact.is_timeout()).collect();
        assert!(!timeouts.is_empty(), "{phase:?} can last for ever");
        for row in timeouts {
            // A timeout either ends the migration or brings about the fact that ends it.
            let ends = row.to == Phase::Failed
                || row.actions.contains(&Action::FailOnVmi) && lookup(phase, Fact::SourceFailed).is_some()
                || row.actions.contains(&Action::RequestAbort) && lookup(phase, Fact::AbortUnanswered).is_some();
            assert!(ends, "{row:?}");
        }
    }
}

#[test]
fn every_way_to_fail_says_why() {
    for row in TABLE.iter().filter(|row| row.to == Phase::Failed && row.from != Phase::Failed) {
        assert!(row.actions.iter().any(|action| matches!(action, Action::Tell(..))), "{row:?} is silent");
    }
}

#[test]
fn every_way_to_fail_has_one_cause() {
    for row in TABLE {
        let fails = row.to == Phase::Failed && row.from != Phase::Failed || row.actions.contains(&Action::FailOnVmi);
        match row.fact.blame() {
            Some(Blame::Cause(cause)) => assert!(cause.is_known(), "{row:?}"),
            Some(Blame::Reported) => assert_eq!(row.fact, Fact::SourceFailed),
            None => assert!(!fails, "{row:?} has no cause"),
        }
    }
    // What the handlers alone can know, and nothing else, is missing from the table.
    let told: BTreeSet<_> = TABLE.iter().filter_map(|row| row.fact.blame()).collect();
    let missing: Vec<_> =
        FailureCause::ALL.into_iter().filter(|cause| !told.contains(&Blame::Cause(cause.clone()))).collect();
    use FailureCause as C;
    let handlers = [
        C::NoProgress,
        C::NotConverging,
        C::LinkLost,
        C::TargetOutOfSpace,
        C::TargetRefusedStorage,
        C::TargetRefusedMachine,
        C::HypervisorError,
    ];
    assert_eq!(missing, handlers);
}

#[test]
fn states_page_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/migration-states.md");
    let page = super::render();
    if std::env::var_os("GODWIT_BLESS").is_some() {
        std::fs::write(path, &page).unwrap();
    }
    let held = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        held == page,
        "docs/migration-states.md is stale: run GODWIT_BLESS=1 cargo test -p godwit-control states_page"
    );
}

pub fn name(name: &str) -> Name {
    Name::new("default", name)
}

fn vmi_value(name: &str, node: &str) -> Value {
    let pod = crate::names::launcher_pod(name, &format!("uid-{name}"));
    json!({
        "metadata": {
            "name": name, "namespace": "default", "uid": format!("uid-{name}"),
            "labels": {"kubevirt.io/nodeName": node},
            "finalizers": ["kubevirt.io/foregroundDeleteVirtualMachine"],
        },
        "spec": {"domain": {"memory": {"guest": "128Mi"}, "devices": {}}},
        "status": {"phase": "Running", "nodeName": node, "runtimeUser": 0, "pod": pod},
    })
}

/// Three nodes and a running VMI, with its launcher pod, for each name.
pub fn cluster(vmis: &[(&str, &str)]) -> Cluster {
    furnish(Cluster::new(), vmis)
}

/// The same in a cluster that is there already.
pub fn furnish(mut cluster: Cluster, vmis: &[(&str, &str)]) -> Cluster {
    for node in ["node1", "node2", "node3"] {
        cluster.add_node(node);
    }
    for (vmi, node) in vmis {
        cluster.put(Kind::VirtualMachineInstance, vmi_value(vmi, node));
        cluster.put(
            Kind::Pod,
            json!({
                "metadata": {
                    "name": crate::names::launcher_pod(vmi, &format!("uid-{vmi}")), "namespace": "default",
                    "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": format!("uid-{vmi}")},
                    "annotations": {"kubevirt.io/domain": vmi},
                },
                "spec": {"nodeName": node, "containers": [{"name": "compute"}]},
            }),
        );
    }
    cluster.run_kubelets();
    cluster.settle();
    cluster
}

pub fn migrate(cluster: &mut Cluster, job: &str, vmi: &str) {
    cluster.put(
        Kind::Migration,
        json!({
            "metadata": {
                "name": job, "namespace": "default", "uid": format!("uid-{job}"),
                "finalizers": ["kubevirt.io/migrationJobFinalize"], "labels": {"kubevirt.io/vmi-name": vmi},
            },
            "spec": {"vmiName": vmi},
        }),
    );
}

pub fn phase(cluster: &Cluster, job: &str) -> String {
    match cluster.get(Kind::Migration, &name(job)) {
        Some(value) => value["status"]["phase"].as_str().unwrap_or_default().to_owned(),
        None => "gone".to_owned(),
    }
}

pub fn state(cluster: &Cluster, vmi: &str) -> Value {
    cluster.get(Kind::VirtualMachineInstance, &name(vmi)).unwrap()["status"]["migrationState"].clone()
}

pub fn tell(cluster: &mut Cluster, vmi: &str, facts: Value) {
    cluster.patch(Kind::VirtualMachineInstance, &name(vmi), json!({"status": {"migrationState": facts}}));
}

pub fn target_pod(cluster: &Cluster, job: &str) -> Option<Name> {
    cluster.world.pods_of_migration(&format!("uid-{job}")).next().map(|pod| crate::Stored::key(pod.as_ref()))
}

/// From the wish to the hand-over.
pub fn hand_over(cluster: &mut Cluster, job: &str, vmi: &str) {
    migrate(cluster, job, vmi);
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    assert_eq!(phase(cluster, job), "PreparingTarget");
}

/// What the handlers write of a migration that goes well.
pub fn arrive(cluster: &mut Cluster, vmi: &str) {
    let target = state(cluster, vmi)["targetNode"].clone();
    tell(cluster, vmi, json!({"completed": true, "endTimestamp": cluster.now.to_string()}));
    cluster.patch(
        Kind::VirtualMachineInstance,
        &name(vmi),
        json!({"metadata": {"labels": {"kubevirt.io/nodeName": target}}, "status": {"nodeName": target}}),
    );
    cluster.settle();
}

#[test]
fn a_migration_goes_all_the_way() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    let vmi = cluster.get(Kind::VirtualMachineInstance, &name("demo")).unwrap();
    let handed = &vmi["status"]["migrationState"];
    assert_eq!(handed["migrationUid"], "uid-job");
    assert_eq!(handed["sourceNode"], "node1");
    assert_eq!(handed["sourcePod"], crate::names::launcher_pod("demo", "uid-demo"));
    assert_ne!(handed["targetNode"], "node1");
    assert_eq!(handed["targetPod"], target_pod(&cluster, "job").unwrap().name.as_str());
    assert_eq!(handed["migrationConfiguration"]["completionTimeoutPerGiB"], 800);
    assert_eq!(vmi["metadata"]["labels"]["kubevirt.io/migrationTargetNodeName"], handed["targetNode"]);

    tell(&mut cluster, "demo", json!({"targetNodeAddress": "10.88.0.12"}));
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "TargetReady");
    let now = cluster.now.to_string();
    tell(&mut cluster, "demo", json!({"startTimestamp": now}));
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Running");
    arrive(&mut cluster, "demo");
    assert_eq!(phase(&cluster, "job"), "Succeeded");

    let migration = cluster.get(Kind::Migration, &name("job")).unwrap();
    assert!(migration["metadata"].get("finalizers").is_none(), "{migration}");
    assert_eq!(migration["status"]["migrationState"]["completed"], true);
    let entered: Vec<_> = migration["status"]["phaseTransitionTimestamps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["phase"].as_str().unwrap().to_owned())
        .collect();
    let all = ["Pending", "Scheduling", "Scheduled", "PreparingTarget", "TargetReady", "Running", "Succeeded"];
    assert_eq!(entered, all);
    for reason in ["SuccessfulCreate", "SuccessfulHandOver", "SuccessfulMigration"] {
        assert!(cluster.has_event(reason, ""), "{reason}");
    }
    // The pod that the guest has left goes, the one where it lives stays.
    cluster.run_kubelets();
    cluster.settle();
    let pods: Vec<_> = cluster.world.pods_of_vmi("uid-demo").map(|pod| crate::Stored::key(pod.as_ref())).collect();
    assert_eq!(pods, [target_pod(&cluster, "job").unwrap()]);
    let vmi = cluster.get(Kind::VirtualMachineInstance, &name("demo")).unwrap();
    assert!(vmi["metadata"]["labels"].get("kubevirt.io/migrationTargetNodeName").is_none());
    // And back again, to any node.
    hand_over(&mut cluster, "back", "demo");
}

#[test]
fn cancelling_before_the_hand_over_leaves_the_vmi_alone() {
    let mut cluster = cluster(&[("demo", "node1")]);
    migrate(&mut cluster, "job", "demo");
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Scheduling");
    cluster.delete(&Ref::new(Kind::Migration, name("job")));
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "gone");
    cluster.run_kubelets();
    assert_eq!(target_pod(&cluster, "job"), None);
    assert!(state(&cluster, "demo").is_null());
    assert!(cluster.has_event("FailedMigration", "being canceled"));
    assert!(cluster.has_event("SuccessfulDelete", "migration canceled and pod default/"));
}

#[test]
fn cancelling_a_running_one_asks_the_source_to_abort() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    let now = cluster.now.to_string();
    tell(&mut cluster, "demo", json!({"targetNodeAddress": "10.88.0.12", "startTimestamp": now}));
    cluster.settle();
    cluster.delete(&Ref::new(Kind::Migration, name("job")));
    cluster.settle();
    assert_eq!(state(&cluster, "demo")["abortRequested"], true);
    assert_eq!(phase(&cluster, "job"), "Running");
    let aborts = cluster.events.iter().filter(|event| event.reason == "SuccessfulAbortMigration").count();
    assert_eq!(aborts, 1);
    tell(
        &mut cluster,
        "demo",
        json!({
            "failed": true, "completed": true, "abortStatus": "Succeeded", "failureReason": "x", "endTimestamp": now,
        }),
    );
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "gone");
    cluster.run_kubelets();
    assert!(target_pod(&cluster, "job").is_some(), "its handler ends it");
    cluster.pass(15);
    cluster.settle();
    cluster.run_kubelets();
    assert_eq!(target_pod(&cluster, "job"), None, "the target pod never ran the guest");
    let vmi = cluster.get(Kind::VirtualMachineInstance, &name("demo")).unwrap();
    assert_eq!((&vmi["status"]["phase"], &vmi["status"]["nodeName"]), (&json!("Running"), &json!("node1")));
}

#[test]
fn an_abort_that_comes_too_late_is_a_success() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    let now = cluster.now.to_string();
    tell(&mut cluster, "demo", json!({"targetNodeAddress": "10.88.0.12", "startTimestamp": now}));
    cluster.settle();
    cluster.delete(&Ref::new(Kind::Migration, name("job")));
    cluster.settle();
    tell(&mut cluster, "demo", json!({"abortStatus": "Failed"}));
    arrive(&mut cluster, "demo");
    assert!(cluster.has_event("SuccessfulMigration", ""));
    assert!(target_pod(&cluster, "job").is_some());
}

#[test]
fn a_dead_target_before_the_start_fails_the_migration_on_the_vmi() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    let pod = target_pod(&cluster, "job").unwrap();
    cluster.patch(Kind::Pod, &pod, json!({"status": {"phase": "Failed"}}));
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Failed");
    assert_eq!(state(&cluster, "demo")["failureReason"], "Target pod is down");
    assert!(cluster.has_event("FailedMigration", "failed. reason: Target pod is down"));
    assert!(cluster.has_event("FailedMigration", "source node reported migration failed"));
    let migration = cluster.get(Kind::Migration, &name("job")).unwrap();
    assert_eq!(migration["status"]["reason"], "TargetLost");
}

#[test]
fn an_abort_is_answered_when_the_target_dies_before_the_source_has_heard_of_it() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    cluster.delete(&Ref::new(Kind::Migration, name("job")));
    cluster.settle();
    assert_eq!(state(&cluster, "demo")["abortRequested"], true);
    let pod = target_pod(&cluster, "job").unwrap();
    cluster.patch(Kind::Pod, &pod, json!({"status": {"phase": "Failed"}}));
    cluster.settle();
    let state = state(&cluster, "demo");
    assert_eq!((&state["failed"], &state["failureReason"]), (&json!(true), &json!("Target pod is down")));
    assert_eq!(state["abortStatus"], "Succeeded");
}

#[test]
fn targets_that_do_not_come_up_are_given_up() {
    for (unschedulable, seconds, text) in [(true, 300, "unschedulable pod"), (false, 900, "pending pod")] {
        let mut cluster = cluster(&[("demo", "node1")]);
        if unschedulable {
            for node in ["node2", "node3"] {
                cluster.patch(Kind::Node, &Name::cluster(node), json!({"spec": {"unschedulable": true}}));
            }
        }
        migrate(&mut cluster, "job", "demo");
        cluster.settle();
        assert_eq!(phase(&cluster, "job"), "Scheduling");
        if unschedulable {
            let message = cluster.get(Kind::Migration, &name("job")).unwrap()["status"]["message"].clone();
            assert!(message.as_str().unwrap().contains("0/3 nodes are available"), "{message}");
            assert!(cluster.has_event("migrationTargetPodUnschedulable", "[default/demo]"));
        }
        let wake = cluster.decide(&Key::Migration(name("job"))).wake_at.unwrap();
        assert_eq!(wake.duration_since(cluster.now).as_secs(), seconds);
        cluster.pass(seconds - 1);
        cluster.settle();
        assert_eq!(phase(&cluster, "job"), "Scheduling");
        cluster.pass(1);
        cluster.settle();
        assert_eq!(phase(&cluster, "job"), "Failed");
        assert!(cluster.has_event("SuccessfulDelete", text));
    }
}

#[test]
fn silent_handlers_are_not_waited_for_for_ever() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    cluster.pass(300);
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Failed");
    assert_eq!(state(&cluster, "demo")["failed"], true);
}

/// What a node says of itself, from now on.
fn ready(cluster: &mut Cluster, node: &str, status: &str) {
    let condition = json!([{"type": "Ready", "status": status, "lastTransitionTime": cluster.now.to_string()}]);
    cluster.patch(Kind::Node, &Name::cluster(node), json!({"status": {"conditions": condition}}));
    cluster.settle();
}

#[test]
fn a_source_that_is_cut_off_may_have_started_and_is_waited_for() {
    for cancelled in [false, true] {
        let mut cluster = cluster(&[("demo", "node1")]);
        hand_over(&mut cluster, "job", "demo");
        if cancelled {
            cluster.delete(&Ref::new(Kind::Migration, name("job")));
            cluster.settle();
        }
        ready(&mut cluster, "node1", "Unknown");
        cluster.pass(3600);
        cluster.settle();
        assert_eq!(phase(&cluster, "job"), "PreparingTarget");
        assert!(cluster.decide(&Key::Migration(name("job"))).wake_at.is_some(), "it is looked at again");
        ready(&mut cluster, "node1", "True");
        let limit = if cancelled { 120 } else { 300 };
        cluster.pass(limit - 1);
        cluster.settle();
        assert_ne!(state(&cluster, "demo")["failed"], true, "its handler gets the same time as any other");
        cluster.pass(1);
        cluster.settle();
        assert_eq!(state(&cluster, "demo")["failed"], true);
    }
}

#[test]
fn a_target_pod_that_is_being_deleted_may_run_the_guest_until_it_has_ended() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    let pod = target_pod(&cluster, "job").unwrap();
    cluster.delete(&Ref::new(Kind::Pod, pod));
    cluster.settle();
    assert_ne!(state(&cluster, "demo")["failed"], true, "its source has not been heard, and may have handed over");
    cluster.run_kubelets();
    cluster.settle();
    assert_eq!(state(&cluster, "demo")["failureReason"], "Target pod is down");
}

#[test]
fn a_guest_that_has_arrived_has_started_whatever_its_source_could_say() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    let target = state(&cluster, "demo")["targetNode"].clone();
    let now = cluster.now.to_string();
    tell(&mut cluster, "demo", json!({"targetNodeDomainReadyTimestamp": now}));
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": {"nodeName": target}}));
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Running");
    cluster.pass(3600);
    cluster.settle();
    assert_ne!(state(&cluster, "demo")["failed"], true);
}

#[test]
fn a_lost_source_never_frees_the_vmi_for_another_migration() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    let now = cluster.now.to_string();
    tell(&mut cluster, "demo", json!({"targetNodeAddress": "10.88.0.12", "startTimestamp": now}));
    cluster.settle();
    cluster.pass(200_000);
    cluster.settle();
    assert_eq!(state(&cluster, "demo")["abortRequested"], true);
    cluster.pass(100_000);
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Failed");
    // Nobody knows where the guest is: its target pod stays, and no other migration begins.
    cluster.run_kubelets();
    assert!(target_pod(&cluster, "job").is_some());
    migrate(&mut cluster, "next", "demo");
    cluster.settle();
    assert_eq!(phase(&cluster, "next"), "Pending");
    assert_eq!(target_pod(&cluster, "next"), None);
    let waiting = cluster.get(Kind::Migration, &name("next")).unwrap();
    assert_eq!(waiting["status"]["reason"], "EarlierUnresolved");
}

#[test]
fn a_guest_that_has_arrived_unreported_is_not_swept_away() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    let now = cluster.now.to_string();
    let told =
        json!({"targetNodeAddress": "10.88.0.12", "startTimestamp": now, "completed": true, "endTimestamp": now});
    tell(&mut cluster, "demo", told);
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Running");
    cluster.pass(60);
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Succeeded");
    cluster.run_kubelets();
    assert_eq!(cluster.world.pods_of_vmi("uid-demo").count(), 2, "which of them holds the guest nobody has said");
    // The source has ended; where the guest is said to be, it is not. No other migration begins from there.
    let source = state(&cluster, "demo")["sourcePod"].as_str().unwrap().to_owned();
    cluster.patch(Kind::Pod, &name(&source), json!({"status": {"phase": "Succeeded"}}));
    migrate(&mut cluster, "next", "demo");
    cluster.settle();
    assert_eq!((phase(&cluster, "next").as_str(), target_pod(&cluster, "next")), ("Pending", None));
    let target = state(&cluster, "demo")["targetNode"].clone();
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": {"nodeName": target}}));
    cluster.settle();
    assert_eq!(phase(&cluster, "next"), "Scheduling");
}

#[test]
fn a_second_migration_of_a_vmi_is_refused() {
    let mut cluster = cluster(&[("demo", "node1")]);
    migrate(&mut cluster, "first", "demo");
    migrate(&mut cluster, "second", "demo");
    cluster.settle();
    assert_eq!((phase(&cluster, "first").as_str(), phase(&cluster, "second").as_str()), ("Scheduling", "Failed"));
    assert!(cluster.has_event("FailedMigration", "another migration job is in progress"));
}

#[test]
fn missing_and_unmovable_vmis_fail_at_once() {
    let mut cluster = cluster(&[("demo", "node1")]);
    cluster.patch(
        Kind::VirtualMachineInstance,
        &name("demo"),
        json!({"status": {"conditions": [{"type": "LiveMigratable", "status": "False", "reason": "DisksNotLiveMigratable", "message": "PVC"}]}}),
    );
    migrate(&mut cluster, "job", "demo");
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Failed");
    let message = cluster.get(Kind::Migration, &name("job")).unwrap()["status"]["message"].clone();
    assert!(
        message.as_str().unwrap().starts_with("Cannot migrate VMI, Reason: DisksNotLiveMigratable, Message: PVC. ")
    );
    migrate(&mut cluster, "nobody", "nobody");
    cluster.step(&Key::Migration(name("nobody")));
    assert_eq!(phase(&cluster, "nobody"), "Failed");
}

#[test]
fn limits_hold_and_are_said() {
    let vmis: Vec<(String, &str)> = (0..9)
        .map(|i| {
            (format!("vm{i}"), ["node1", "node1", "node1", "node2", "node2", "node2", "node3", "node3", "node3"][i])
        })
        .collect();
    let vmis: Vec<(&str, &str)> = vmis.iter().map(|(name, node)| (name.as_str(), *node)).collect();
    let mut cluster = cluster(&vmis);
    for (vmi, _) in &vmis {
        migrate(&mut cluster, &format!("job-{vmi}"), vmi);
    }
    cluster.settle();
    let running: Vec<&str> =
        vmis.iter().map(|(vmi, _)| *vmi).filter(|vmi| phase(&cluster, &format!("job-{vmi}")) == "Scheduling").collect();
    assert_eq!(running, ["vm0", "vm1", "vm3", "vm4", "vm6"], "two from each node, five in all, the oldest first");
    let reason = |vmi: &str| {
        let waiting = cluster.get(Kind::Migration, &name(&format!("job-{vmi}"))).unwrap();
        waiting["status"]["reason"].as_str().unwrap().to_owned()
    };
    assert_eq!((reason("vm2"), reason("vm7")), ("NodeLimit".to_owned(), "ClusterLimit".to_owned()));
    // A place that becomes free is taken at once.
    cluster.delete(&Ref::new(Kind::Migration, name("job-vm0")));
    cluster.settle();
    assert_eq!(phase(&cluster, "job-vm2"), "Scheduling");
}

#[test]
fn five_finished_migrations_are_kept() {
    let mut cluster = cluster(&[("demo", "node1")]);
    for i in 0..7 {
        cluster.pass(1);
        migrate(&mut cluster, &format!("job{i}"), "demo");
        cluster.patch(Kind::Migration, &name(&format!("job{i}")), json!({"status": {"phase": "Failed"}}));
    }
    cluster.settle();
    let left: Vec<_> = cluster.world.names_of(Kind::Migration).into_iter().map(|name| name.name).collect();
    assert_eq!(left, ["job2", "job3", "job4", "job5", "job6"]);
}
