//! A target's node is put into maintenance while a guest is to go there.

use serde_json::{Value, json};

use super::tests::{cluster, hand_over, migrate, name, phase, state, target_pod, tell};
use crate::testing::Cluster;
use crate::{Kind, Name, Ref};

const KIND: Kind = Kind::NodeMaintenance;

fn close(cluster: &mut Cluster, node: &str) {
    cluster.put(KIND, json!({"metadata": {"name": "m"}, "spec": {"nodeName": node}}));
}

fn target_node(cluster: &Cluster, job: &str) -> String {
    let pod = target_pod(cluster, job).unwrap();
    cluster.get(Kind::Pod, &pod).unwrap()["spec"]["nodeName"].as_str().unwrap().to_owned()
}

fn job(cluster: &Cluster) -> Value {
    cluster.get(Kind::Migration, &name("job")).unwrap()["status"].clone()
}

#[test]
fn what_is_bound_there_turns_back() {
    let mut cluster = cluster(&[("demo", "node1")]);
    migrate(&mut cluster, "job", "demo");
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Scheduling");
    let node = target_node(&cluster, "job");
    close(&mut cluster, &node);
    cluster.settle();
    let status = job(&cluster);
    assert_eq!((&status["phase"], &status["reason"]), (&json!("Failed"), &json!("TargetInMaintenance")));
    let said = format!("The target node {node} was put into maintenance; the guest stays on node node1. ");
    assert!(status["message"].as_str().unwrap().starts_with(&said), "{status}");
    cluster.run_kubelets();
    assert_eq!(target_pod(&cluster, "job"), None, "its pod goes");
    // Asked for again it goes to the only node that is left.
    migrate(&mut cluster, "again", "demo");
    cluster.settle();
    assert!(![node.as_str(), "node1"].contains(&target_node(&cluster, "again").as_str()));
}

#[test]
fn a_plan_of_one_and_a_maintenance_of_another_node_leave_it_alone() {
    let mut cluster = cluster(&[("demo", "node1")]);
    migrate(&mut cluster, "job", "demo");
    cluster.settle();
    let node = target_node(&cluster, "job");
    let dry = json!({"metadata": {"name": "dry"}, "spec": {"nodeName": node, "dryRun": true}});
    cluster.put(KIND, dry);
    close(&mut cluster, "node1");
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Scheduling");
}

#[test]
fn what_was_handed_over_and_has_not_started_is_called_off() {
    for listening in [false, true] {
        let mut cluster = cluster(&[("demo", "node1")]);
        hand_over(&mut cluster, "job", "demo");
        if listening {
            tell(&mut cluster, "demo", json!({"targetNodeAddress": "10.88.0.12"}));
            cluster.settle();
        }
        let before = phase(&cluster, "job");
        let node = target_node(&cluster, "job");
        close(&mut cluster, &node);
        cluster.settle();
        // The source has the last word: it may just have begun.
        assert_eq!((state(&cluster, "demo")["abortRequested"].clone(), phase(&cluster, "job")), (json!(true), before));
        let now = cluster.now.to_string();
        let answer = json!({
            "abortStatus": "Succeeded", "failed": true, "completed": true, "failureCause": "Cancelled",
            "failureReason": "Live migration has been aborted", "endTimestamp": now,
        });
        tell(&mut cluster, "demo", answer);
        cluster.settle();
        let status = job(&cluster);
        assert_eq!(
            (&status["phase"], &status["reason"]),
            (&json!("Failed"), &json!("TargetInMaintenance")),
            "{status}"
        );
        assert!(status["message"].as_str().unwrap().contains("was put into maintenance"), "{status}");
    }
}

#[test]
fn without_an_answer_it_is_called_off_as_well() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    // Its handlers take their time.
    cluster.pass(200);
    let node = target_node(&cluster, "job");
    close(&mut cluster, &node);
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "PreparingTarget", "there is time to answer from now on");
    cluster.pass(120);
    cluster.settle();
    let status = job(&cluster);
    assert_eq!((&status["phase"], &status["reason"]), (&json!("Failed"), &json!("TargetInMaintenance")), "{status}");
}

#[test]
fn there_is_time_to_answer_when_the_request_is_known_from_the_vmi_alone() {
    for deleted in [false, true] {
        let mut cluster = cluster(&[("demo", "node1")]);
        hand_over(&mut cluster, "job", "demo");
        cluster.pass(200);
        let node = target_node(&cluster, "job");
        if deleted {
            cluster.delete(&Ref::new(Kind::Migration, name("job")));
        } else {
            close(&mut cluster, &node);
        }
        // The write to the migration that was to follow met another's.
        tell(&mut cluster, "demo", json!({"abortRequested": true}));
        cluster.settle();
        assert_eq!(phase(&cluster, "job"), "PreparingTarget", "deleted: {deleted}");
        let asked = job(&cluster)["conditions"].as_array().cloned().unwrap_or_default();
        let asked = asked.iter().find(|one| one["type"] == "migrationAbortRequested").cloned();
        assert_eq!(asked.map(|one| one["lastTransitionTime"].clone()), Some(json!(cluster.now.to_string())));
        cluster.pass(119);
        cluster.settle();
        assert_eq!(phase(&cluster, "job"), "PreparingTarget", "deleted: {deleted}");
        cluster.pass(1);
        cluster.settle();
        assert_eq!(state(&cluster, "demo")["failed"], true, "deleted: {deleted}");
    }
}

#[test]
fn what_is_being_sent_goes_on() {
    let mut cluster = cluster(&[("demo", "node1")]);
    hand_over(&mut cluster, "job", "demo");
    let now = cluster.now.to_string();
    tell(&mut cluster, "demo", json!({"targetNodeAddress": "10.88.0.12", "startTimestamp": now}));
    cluster.settle();
    let node = target_node(&cluster, "job");
    close(&mut cluster, &node);
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Running");
    assert!(state(&cluster, "demo")["abortRequested"].is_null());
}

#[test]
fn an_evacuation_is_made_anew_and_nothing_is_counted_against_it() {
    let mut cluster = cluster(&[("demo", "node1")]);
    let demo = name("demo");
    let spec = json!({
        "spec": {"evictionStrategy": "LiveMigrate"},
        "status": {"evacuationNodeName": "node1", "conditions": [{"type": "LiveMigratable", "status": "True"}]},
    });
    cluster.patch(Kind::VirtualMachineInstance, &demo, spec);
    cluster.settle();
    let made = |cluster: &Cluster| -> Vec<(String, String)> {
        let open = cluster.world.migrations.iter().filter(|one| !one.is_final());
        open.map(|one| {
            let pod = cluster.world.pods_of_migration(one.uid()).next();
            let node = pod.and_then(|pod| pod.spec.as_ref()?.node_name.clone());
            (one.uid().to_owned(), node.unwrap_or_default())
        })
        .collect()
    };
    let first = made(&cluster);
    let [(_, node)] = &first[..] else { panic!("one attempt: {first:?}") };
    close(&mut cluster, node);
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    assert_eq!(made(&cluster), []);
    cluster.pass(5);
    cluster.settle();
    let second = made(&cluster);
    let [(_, other)] = &second[..] else { panic!("another attempt: {second:?}") };
    assert!(other != node && other != "node1", "{second:?}");
    let state = &cluster.get(Kind::VirtualMachineInstance, &demo).unwrap()["status"]["evacuation"];
    assert!(state["failedAttempts"].is_null(), "{state}");
    // It does not end with the maintenance of the other node.
    cluster.delete(&Ref::new(KIND, Name::cluster("m")));
    cluster.settle();
    assert_eq!(made(&cluster), second);
}
