//! What a migration says of itself, phase by phase, and how it ends.

use godwit_api::failure::FailureCause;
use serde_json::{Value, json};

use super::tests::{arrive, cluster, hand_over, migrate, name, phase, state, target_pod, tell};
use crate::testing::Cluster;
use crate::{Key, Kind, Ref};

pub fn status(cluster: &Cluster, job: &str) -> Value {
    cluster.get(Kind::Migration, &name(job)).unwrap()["status"].clone()
}

pub fn condition(status: &Value, type_: &str) -> Value {
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    conditions.into_iter().find(|condition| condition["type"] == type_).unwrap_or(Value::Null)
}

/// From the wish to the sending source.
fn run(cluster: &mut Cluster, job: &str, vmi: &str) {
    hand_over(cluster, job, vmi);
    let now = cluster.now.to_string();
    tell(cluster, vmi, json!({"targetNodeAddress": "10.88.0.12", "startTimestamp": now, "mode": "PreCopy"}));
    cluster.settle();
    assert_eq!(phase(cluster, job), "Running");
}

/// Asserts that a migration has failed for this reason, and says so everywhere with the remedy.
pub fn assert_failed(cluster: &Cluster, job: &str, cause: FailureCause, text: &str) {
    let status = status(cluster, job);
    assert_eq!((&status["phase"], &status["reason"]), (&json!("Failed"), &json!(cause.as_str())), "{status}");
    let message = status["message"].as_str().unwrap();
    assert!(message.contains(text) && message.ends_with(cause.remedy()), "{message}");
    let condition = condition(&status, "Failed");
    assert_eq!((&condition["status"], &condition["reason"]), (&json!("True"), &json!(cause.as_str())));
    assert_eq!(condition["message"], status["message"]);
}

#[test]
fn the_migration_shows_what_the_vmi_says_while_it_runs() {
    let mut cluster = cluster(&[("demo", "node1")]);
    run(&mut cluster, "job", "demo");
    for percent in [10, 55] {
        tell(&mut cluster, "demo", json!({"progress": {"percent": percent, "bytesProcessed": percent * 1000}}));
        let plan = cluster.decide(&Key::Migration(name("job")));
        let writes = plan.effects.iter().filter(|effect| !matches!(effect, crate::Effect::Record(_))).count();
        assert_eq!(writes, 1, "one write for one report");
        cluster.settle();
        assert_eq!(status(&cluster, "job")["migrationState"], state(&cluster, "demo"));
        assert_eq!(status(&cluster, "job")["migrationState"]["progress"]["percent"], percent);
        assert!(cluster.decide(&Key::Migration(name("job"))).is_quiet());
    }
    let message = status(&cluster, "job")["message"].clone();
    assert!(message.as_str().unwrap().contains("given up after 800 s"), "{message}");
}

#[test]
fn a_controller_that_is_behind_takes_nothing_back() {
    let mut cluster = cluster(&[("demo", "node1")]);
    run(&mut cluster, "job", "demo");
    tell(&mut cluster, "demo", json!({"progress": {"totalMilliseconds": 3000, "bytesProcessed": 5}}));
    cluster.settle();
    let early = cluster.get(Kind::VirtualMachineInstance, &name("demo")).unwrap();
    let now = cluster.now.to_string();
    let end = json!({
        "failed": true, "completed": true, "endTimestamp": now, "failureReason": "x",
        "progress": {"totalMilliseconds": 2000, "bytesProcessed": 9},
    });
    tell(&mut cluster, "demo", end);
    cluster.step(&Key::Migration(name("job")));
    let held = status(&cluster, "job")["migrationState"].clone();
    assert_eq!(held["failed"], true);
    assert_eq!(held["progress"]["bytesProcessed"], 9);
    // Another controller has this migration and an older VMI.
    cluster.put(Kind::VirtualMachineInstance, early);
    cluster.step(&Key::Migration(name("job")));
    assert_eq!(status(&cluster, "job")["migrationState"], held);
}

#[test]
fn who_sees_the_success_sees_how_it_went() {
    let mut cluster = cluster(&[("demo", "node1")]);
    run(&mut cluster, "job", "demo");
    let target = state(&cluster, "demo")["targetNode"].clone();
    let now = cluster.now.to_string();
    tell(
        &mut cluster,
        "demo",
        json!({
            "completed": true, "endTimestamp": now,
            "progress": {"percent": 100, "totalMilliseconds": 4200, "downtimeMilliseconds": 38, "bytesProcessed": 77},
        }),
    );
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": {"nodeName": target}}));
    // One decision, one write: the phase and all that belongs to it.
    assert!(cluster.step(&Key::Migration(name("job"))));
    let status = status(&cluster, "job");
    assert_eq!(status["phase"], "Succeeded");
    let progress = &status["migrationState"]["progress"];
    assert_eq!((&progress["downtimeMilliseconds"], &progress["bytesProcessed"]), (&json!(38), &json!(77)));
    assert!(status["message"].as_str().unwrap().ends_with("in 4200 ms; it stood still for 38 ms."), "{status}");
    assert!(status.get("reason").is_none() && condition(&status, "Waiting").is_null(), "{status}");
}

#[test]
fn labels_are_cleaned_up_by_whoever_comes_after_a_restart() {
    let mut cluster = cluster(&[("demo", "node1")]);
    run(&mut cluster, "job", "demo");
    let target = state(&cluster, "demo")["targetNode"].clone();
    let now = cluster.now.to_string();
    tell(&mut cluster, "demo", json!({"completed": true, "endTimestamp": now}));
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": {"nodeName": target}}));
    let label = |cluster: &Cluster| {
        let vmi = cluster.get(Kind::VirtualMachineInstance, &name("demo")).unwrap();
        vmi["metadata"]["labels"]["kubevirt.io/migrationTargetNodeName"].clone()
    };
    // The controller writes the last phase and is gone before it does anything else.
    cluster.step(&Key::Migration(name("job")));
    assert_eq!((phase(&cluster, "job").as_str(), label(&cluster)), ("Succeeded", target));
    // Whether the next one sees the migration or only the VMI, the label goes.
    let mut other = cluster.clone();
    cluster.step(&Key::Migration(name("job")));
    assert!(label(&cluster).is_null());
    other.remove(Kind::Migration, &name("job"));
    other.step(&Key::Vmi(name("demo")));
    assert!(label(&other).is_null());
}

#[test]
fn the_target_pod_is_told_when_the_guest_runs_in_it() {
    let mut cluster = cluster(&[("demo", "node1")]);
    run(&mut cluster, "job", "demo");
    let pod = target_pod(&cluster, "job").unwrap();
    let told = |cluster: &Cluster| {
        let pod = cluster.get(Kind::Pod, &pod).unwrap();
        pod["metadata"]["annotations"]["kubevirt.io/migration-target-ready-timestamp"].clone()
    };
    assert!(told(&cluster).is_null());
    tell(&mut cluster, "demo", json!({"targetNodeDomainReadyTimestamp": "2026-01-01T00:00:00Z"}));
    arrive(&mut cluster, "demo");
    assert_eq!(told(&cluster), "2026-01-01T00:00:00Z");
}

#[test]
fn a_label_without_a_migration_goes() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": {"migrationState": null}}));
    cluster.settle();
    assert_failed(&cluster, "job", FailureCause::StateTaken, "does not carry the migration any more");
    let vmi = cluster.get(Kind::VirtualMachineInstance, &name("demo")).unwrap();
    assert!(vmi["metadata"]["labels"].get("kubevirt.io/migrationTargetNodeName").is_none(), "{vmi}");
}

#[test]
fn a_link_that_is_broken_in_post_copy_is_said_of_the_migration_too() {
    let mut cluster = cluster(&[("demo", "node1")]);
    run(&mut cluster, "job", "demo");
    tell(&mut cluster, "demo", json!({"mode": "PostCopy"}));
    cluster.settle();
    let message = |cluster: &Cluster| status(cluster, "job")["message"].as_str().unwrap_or_default().to_owned();
    assert!(message(&cluster).contains("memory follows from node node1"), "{}", message(&cluster));
    let conditions = |broken| match broken {
        true => json!([{"type": "Synchronized", "status": "False", "reason": "PostCopyLinkBroken"}]),
        false => json!([]),
    };
    let link = |cluster: &mut Cluster, broken| {
        let status = json!({"status": {"conditions": conditions(broken)}});
        cluster.patch(Kind::VirtualMachineInstance, &name("demo"), status);
        cluster.settle();
    };
    for cancelled_too_late in [false, true] {
        if cancelled_too_late {
            tell(&mut cluster, "demo", json!({"abortRequested": true, "abortStatus": "Failed"}));
        }
        link(&mut cluster, true);
        assert_eq!(status(&cluster, "job")["reason"], "PostCopyLinkBroken");
        assert!(message(&cluster).contains("goes on when the link is back"), "{}", message(&cluster));
        link(&mut cluster, false);
        let then = if cancelled_too_late { "AbortTooLate" } else { "InFlight" };
        assert_eq!(status(&cluster, "job")["reason"], then);
    }
}

#[test]
fn a_cancel_that_loses_the_race_says_so() {
    // The handler may have noticed the request or not.
    for noticed in [true, false] {
        let mut cluster = cluster(&[("demo", "node1")]);
        run(&mut cluster, "job", "demo");
        // Something holds the object, so that it can be looked at after its end.
        let held = json!({"metadata": {"finalizers": ["kubevirt.io/migrationJobFinalize", "test"]}});
        cluster.patch(Kind::Migration, &name("job"), held);
        if noticed {
            cluster.delete(&Ref::new(Kind::Migration, name("job")));
            cluster.settle();
            assert_eq!(state(&cluster, "demo")["abortRequested"], true);
            tell(&mut cluster, "demo", json!({"abortStatus": "Failed"}));
            cluster.settle();
            assert_eq!(status(&cluster, "job")["reason"], "AbortTooLate");
            // The guest's way may be long (post-copy): nobody gives it up meanwhile.
            cluster.pass(600);
            cluster.settle();
            assert_eq!(phase(&cluster, "job"), "Running");
            arrive(&mut cluster, "demo");
        } else {
            let target = state(&cluster, "demo")["targetNode"].clone();
            let now = cluster.now.to_string();
            tell(&mut cluster, "demo", json!({"completed": true, "endTimestamp": now}));
            cluster.delete(&Ref::new(Kind::Migration, name("job")));
            cluster.settle();
            cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": {"nodeName": target}}));
            cluster.settle();
        }
        let status = status(&cluster, "job");
        assert_eq!((&status["phase"], &status["reason"]), (&json!("Succeeded"), &json!("CompletedDespiteCancel")));
        assert!(status["message"].as_str().unwrap().contains("came too late: the guest had already moved"), "{status}");
        assert_eq!(condition(&status, "migrationAbortRequested")["reason"], "CompletedDespiteCancel");
        assert_eq!(
            (&state(&cluster, "demo")["abortStatus"], &status["migrationState"]["abortStatus"]),
            (&json!("Failed"), &json!("Failed"))
        );
        assert!(state(&cluster, "demo").get("failed").is_none());
        assert!(cluster.has_event("FailedAbortMigration", "could not be canceled"));
        assert!(cluster.has_event("SuccessfulMigration", ""));
    }
}

#[test]
fn a_cancel_before_the_start_is_asked_of_the_source_as_well() {
    for listening in [false, true] {
        let mut cluster = cluster(&[("demo", "node1")]);
        hand_over(&mut cluster, "job", "demo");
        if listening {
            tell(&mut cluster, "demo", json!({"targetNodeAddress": "10.88.0.12"}));
            cluster.settle();
            assert_eq!(phase(&cluster, "job"), "TargetReady");
        }
        cluster.delete(&Ref::new(Kind::Migration, name("job")));
        cluster.settle();
        assert_eq!(state(&cluster, "demo")["abortRequested"], true);
        let status = status(&cluster, "job");
        assert_eq!(condition(&status, "migrationAbortRequested")["status"], "True");
        assert!(cluster.has_event("SuccessfulAbortMigration", "Migration is ready to be canceled by virt-handler."));
        // Nobody answers.
        cluster.pass(120);
        cluster.settle();
        let told = state(&cluster, "demo");
        assert_eq!(
            (&told["failed"], &told["completed"], &told["abortStatus"], &told["failureCause"]),
            (&json!(true), &json!(true), &json!("Succeeded"), &json!("Cancelled"))
        );
        assert_eq!(told["failureReason"], "Live migration has been aborted");
        assert_eq!(phase(&cluster, "job"), "gone");
    }
}

#[test]
fn handlers_have_time_to_answer_an_abort_of_the_controller() {
    let mut cluster = cluster(&[("demo", "node1")]);
    run(&mut cluster, "job", "demo");
    cluster.pass(2 * 800 + 600 - 1);
    cluster.settle();
    assert!(state(&cluster, "demo").get("abortRequested").is_none());
    cluster.pass(1);
    cluster.settle();
    assert_eq!(
        (&state(&cluster, "demo")["abortRequested"], phase(&cluster, "job").as_str()),
        (&json!(true), "Running")
    );
    cluster.pass(119);
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Running");
    let told = json!({
        "failed": true, "completed": true, "abortStatus": "Succeeded", "failureCause": "Cancelled",
        "failureReason": "Live migration has been aborted",
    });
    tell(&mut cluster, "demo", told);
    cluster.settle();
    // Nobody cancelled it: its time was up.
    assert_failed(&cluster, "job", FailureCause::OutOfTime, "Live migration has been aborted");
}

#[test]
fn without_a_time_limit_only_silence_ends_a_migration() {
    let mut cluster = cluster(&[("demo", "node1")]);
    let configuration = json!({"migrations": {"completionTimeoutPerGiB": 0}});
    cluster.put(
        Kind::KubeVirt,
        json!({"metadata": {"name": "kubevirt", "namespace": "kubevirt"}, "spec": {"configuration": configuration}}),
    );
    run(&mut cluster, "job", "demo");
    assert_eq!(state(&cluster, "demo")["migrationConfiguration"]["completionTimeoutPerGiB"], 0);
    for day in 1..5 {
        cluster.pass(86_399);
        cluster.settle();
        assert!(state(&cluster, "demo").get("abortRequested").is_none(), "day {day}");
        tell(&mut cluster, "demo", json!({"progress": {"totalMilliseconds": day * 86_399_000_u64}}));
        cluster.settle();
    }
    cluster.pass(86_400);
    cluster.settle();
    assert_eq!(state(&cluster, "demo")["abortRequested"], true);
}

#[test]
fn what_is_resolved_at_the_hand_over_holds_to_the_end() {
    let mut cluster = cluster(&[("demo", "node1")]);
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"metadata": {"labels": {"app": "web"}}}));
    let policy = |timeout: u32| {
        json!({
            "metadata": {"name": "web"},
            "spec": {"selectors": {"virtualMachineInstanceSelector": {"app": "web"}}, "completionTimeoutPerGiB": timeout},
        })
    };
    cluster.put(Kind::MigrationPolicy, policy(7));
    run(&mut cluster, "job", "demo");
    let handed = state(&cluster, "demo");
    assert_eq!((&handed["migrationPolicyName"], &handed["migrationNetworkType"]), (&json!("web"), &json!("Pod")));
    let configuration = &handed["migrationConfiguration"];
    assert_eq!(
        (&configuration["completionTimeoutPerGiB"], &configuration["progressTimeout"]),
        (&json!(7), &json!(150))
    );
    // Whole: what nobody has set is there as well.
    for field in [
        "bandwidthPerMigration",
        "parallelMigrationsPerCluster",
        "allowPostCopy",
        "allowWorkloadDisruption",
        "maxDowntimeMs",
    ] {
        assert!(!configuration[field].is_null(), "{field} is missing");
    }
    cluster.put(Kind::MigrationPolicy, policy(5000));
    cluster.pass(2 * 7 + 600);
    cluster.settle();
    assert_eq!(state(&cluster, "demo")["abortRequested"], true);
}

#[test]
fn a_migration_goes_over_the_network_for_them_where_both_nodes_are_in_it() {
    let network_between = |source: Option<&str>, target: Option<&str>| {
        let mut cluster = cluster(&[("demo", "node1")]);
        for (node, address) in [("node1", source), ("node2", target), ("node3", target)] {
            let mut told = json!({"interface": "eth1", "problem": "interface eth1 is down"});
            if let Some(address) = address {
                told = json!({"interface": "eth1", "address": address});
            }
            let beat = cluster.now.to_string();
            told["heartbeat"] = json!(beat);
            let annotations = json!({
                crate::names::ANNOTATION_HEARTBEAT: beat, crate::names::ANNOTATION_MIGRATION_NETWORK: told.to_string(),
            });
            cluster.patch(Kind::Node, &crate::Name::cluster(node), json!({"metadata": {"annotations": annotations}}));
        }
        run(&mut cluster, "job", "demo");
        let network = state(&cluster, "demo")["migrationNetworkType"].clone();
        assert_eq!(status(&cluster, "job")["migrationState"]["migrationNetworkType"], network);
        network
    };
    assert_eq!(network_between(Some("10.99.0.1"), Some("10.99.0.2")), "Migration");
    assert_eq!(network_between(Some("10.99.0.1"), None), "Pod");
    assert_eq!(network_between(None, Some("10.99.0.2")), "Pod");
    assert_eq!(network_between(Some("10.99.0.1"), Some("fd00::2")), "Pod");
}

#[test]
fn a_guest_that_is_lost_after_it_has_moved_is_lost_at_the_target() {
    let mut cluster = cluster(&[("demo", "node1")]);
    run(&mut cluster, "job", "demo");
    // Post-copy: it lives at the target before the migration is over.
    tell(&mut cluster, "demo", json!({"mode": "PostCopy"}));
    let target = state(&cluster, "demo")["targetNode"].clone();
    let moved = json!({"status": {"nodeName": target}});
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), moved);
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Running");
    let pod = target_pod(&cluster, "job").unwrap();
    cluster.patch(Kind::Pod, &pod, json!({"status": {"phase": "Failed"}}));
    cluster.settle();
    let text = format!("The VMI \"demo\" failed on node {}", target.as_str().unwrap());
    assert_failed(&cluster, "job", FailureCause::TargetLost, &text);
}

#[test]
fn the_memory_of_the_launcher_follows_the_guest() {
    let mut cluster = cluster(&[("demo", "node1")]);
    let memory = |cluster: &Cluster| {
        cluster.get(Kind::VirtualMachineInstance, &name("demo")).unwrap()["status"]["memory"].clone()
    };
    let told = memory(&cluster);
    assert_eq!((&told["guestAtBoot"], &told["guestCurrent"]), (&json!("128Mi"), &json!("128Mi")));
    assert_eq!(told["memoryOverhead"], "64Mi");
    run(&mut cluster, "job", "demo");
    tell(&mut cluster, "demo", json!({"targetMemoryOverhead": "90Mi"}));
    cluster.settle();
    assert_eq!(memory(&cluster)["memoryOverhead"], "64Mi");
    arrive(&mut cluster, "demo");
    assert_eq!(memory(&cluster)["memoryOverhead"], "90Mi");
}

#[test]
fn the_ends_of_the_guest_have_their_own_words() {
    // Lost, shut down, and shut down by a handler that has given the migration up for it.
    for (vmi, facts, cause) in [
        (json!({"status": {"phase": "Failed", "reason": "NodeUnresponsive"}}), json!({}), FailureCause::SourceLost),
        (json!({"status": {"phase": "Succeeded"}}), json!({}), FailureCause::GuestEnded),
        (
            json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
            json!({"failed": true, "completed": true, "failureCause": "GuestEnded"}),
            FailureCause::GuestEnded,
        ),
    ] {
        let mut cluster = cluster(&[("demo", "node1")]);
        run(&mut cluster, "job", "demo");
        cluster.patch(Kind::VirtualMachineInstance, &name("demo"), vmi);
        tell(&mut cluster, "demo", facts);
        cluster.step(&Key::Migration(name("job")));
        assert_failed(&cluster, "job", cause, "\"demo\"");
        assert!(cluster.has_event("FailedMigration", "Migration failed vmi shutdown during migration."));
    }
}

#[test]
fn a_guest_that_is_lost_does_not_count_as_shut_down_because_its_vm_starts_another_one() {
    let mut cluster = cluster(&[("demo", "node1")]);
    run(&mut cluster, "job", "demo");
    let dying = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": {"phase": "Failed"}});
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), dying);
    let end =
        json!({"failed": true, "completed": true, "failureCause": "TargetLost", "failureReason": "node1 is gone"});
    tell(&mut cluster, "demo", end);
    cluster.step(&Key::Migration(name("job")));
    assert_failed(&cluster, "job", FailureCause::TargetLost, "node1 is gone.");
}

#[test]
fn what_the_handler_blames_is_what_the_migration_says() {
    for (told, cause) in [
        (json!({"failureCause": "LinkLost"}), FailureCause::LinkLost),
        (json!({"failureCause": "SomethingNew"}), FailureCause::HypervisorError),
        (json!({}), FailureCause::HypervisorError),
    ] {
        let mut cluster = cluster(&[("demo", "node1")]);
        run(&mut cluster, "job", "demo");
        let end = json!({"failed": true, "completed": true, "failureReason": "Live migration failed: broken pipe"});
        tell(&mut cluster, "demo", end);
        tell(&mut cluster, "demo", told);
        cluster.settle();
        assert_failed(&cluster, "job", cause, "Live migration failed: broken pipe; the guest stays on node node1.");
        assert_eq!(status(&cluster, "job")["migrationState"], state(&cluster, "demo"));
    }
}

#[test]
fn migrations_go_with_their_vmi() {
    let mut cluster = cluster(&[("demo", "node1")]);
    migrate(&mut cluster, "old", "demo");
    cluster.patch(Kind::Migration, &name("old"), json!({"status": {"phase": "Succeeded"}}));
    run(&mut cluster, "job", "demo");
    cluster.delete(&Ref::new(Kind::VirtualMachineInstance, name("demo")));
    for _ in 0..3 {
        cluster.settle();
        cluster.run_kubelets();
    }
    cluster.settle();
    assert!(cluster.get(Kind::VirtualMachineInstance, &name("demo")).is_none());
    assert_eq!((phase(&cluster, "old").as_str(), phase(&cluster, "job").as_str()), ("gone", "gone"));
}

#[test]
fn the_bandwidth_can_be_changed_while_it_runs() {
    let mut cluster = cluster(&[("demo", "node1")]);
    run(&mut cluster, "job", "demo");
    let bandwidth =
        |cluster: &Cluster| state(cluster, "demo")["migrationConfiguration"]["bandwidthPerMigration"].clone();
    assert_eq!(bandwidth(&cluster), "64Mi");
    let say = |cluster: &mut Cluster, text: Value| {
        let annotations = json!({"godwit.io/bandwidth-per-migration": text});
        cluster.patch(Kind::Migration, &name("job"), json!({"metadata": {"annotations": annotations}}));
        cluster.settle();
    };
    for (said, holds) in [("8Mi", "8Mi"), ("8192Ki", "8Mi"), ("fast", "8Mi"), ("0", "0")] {
        say(&mut cluster, json!(said));
        assert_eq!(bandwidth(&cluster), holds, "{said}");
        let shown = &status(&cluster, "job")["migrationState"]["migrationConfiguration"]["bandwidthPerMigration"];
        assert_eq!(shown, holds);
        assert!(cluster.decide(&Key::Migration(name("job"))).is_quiet());
    }
    say(&mut cluster, Value::Null);
    assert_eq!(bandwidth(&cluster), "0", "taken away it changes nothing");
    // What is over is not written to.
    tell(&mut cluster, "demo", json!({"completed": true, "failed": true}));
    say(&mut cluster, json!("9Mi"));
    assert_eq!(bandwidth(&cluster), "0");
}

#[test]
fn the_bandwidth_can_be_said_beforehand() {
    let mut cluster = cluster(&[("demo", "node1")]);
    migrate(&mut cluster, "job", "demo");
    let annotations = json!({"godwit.io/bandwidth-per-migration": "7Mi"});
    cluster.patch(Kind::Migration, &name("job"), json!({"metadata": {"annotations": annotations}}));
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    assert_eq!(state(&cluster, "demo")["migrationConfiguration"]["bandwidthPerMigration"], "7Mi");
}
