//! What a migration waits for before its guest is touched, who says so, and for how long.

use godwit_api::failure::FailureCause;
use serde_json::{Value, json};

use super::life_tests::{assert_failed, condition, status};
use super::tests::{cluster, migrate, name, phase, target_pod};
use crate::testing::Cluster;
use crate::{Key, Kind, Name};

/// Target pods that the scheduler places and no kubelet starts.
fn stuck(annotations: Value) -> Cluster {
    let mut cluster = cluster(&[("demo", "node1")]);
    migrate(&mut cluster, "job", "demo");
    cluster.patch(Kind::Migration, &name("job"), json!({"metadata": {"annotations": annotations}}));
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Scheduling");
    cluster
}

#[test]
fn zero_switches_the_limits_of_the_target_pod_off() {
    let mut cluster = stuck(json!({"kubevirt.io/migrationPendingPodTimeoutSeconds": "0"}));
    cluster.pass(1_000_000);
    cluster.settle();
    assert_eq!(
        (phase(&cluster, "job").as_str(), &status(&cluster, "job")["reason"]),
        ("Scheduling", &json!("TargetPodStarting"))
    );

    // A pod without a node is a pod that is not ready: that limit goes on.
    for (pending, left) in [(None, "Failed"), (Some("0"), "Scheduling")] {
        let mut cluster = super::tests::cluster(&[("demo", "node1")]);
        for node in ["node2", "node3"] {
            cluster.patch(Kind::Node, &Name::cluster(node), json!({"spec": {"unschedulable": true}}));
        }
        migrate(&mut cluster, "job", "demo");
        let annotations = json!({
            "kubevirt.io/migrationUnschedulablePodTimeoutSeconds": "0",
            "kubevirt.io/migrationPendingPodTimeoutSeconds": pending,
        });
        cluster.patch(Kind::Migration, &name("job"), json!({"metadata": {"annotations": annotations}}));
        cluster.settle();
        cluster.pass(899);
        cluster.settle();
        assert_eq!(phase(&cluster, "job"), "Scheduling");
        cluster.pass(1);
        cluster.settle();
        assert_eq!(phase(&cluster, "job"), left);
        if left == "Failed" {
            assert_failed(&cluster, "job", FailureCause::TargetNotReady, "within 900 s: 0/3 nodes are available");
            assert!(cluster.has_event("SuccessfulDelete", "pending pod default/"));
        }
    }
}

#[test]
fn limits_of_the_target_pod_follow_the_annotations() {
    let mut cluster = stuck(json!({"kubevirt.io/migrationPendingPodTimeoutSeconds": " 130 "}));
    cluster.pass(129);
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Scheduling");
    cluster.pass(1);
    cluster.settle();
    assert_failed(
        &cluster,
        "job",
        FailureCause::TargetNotReady,
        "did not become ready within 130 s: the kubelet of node",
    );
    // What is no number of seconds counts as not said.
    for odd in ["soon", "-1", "99999999999"] {
        let cluster = stuck(json!({"kubevirt.io/migrationPendingPodTimeoutSeconds": odd}));
        let wake = cluster.decide(&Key::Migration(name("job"))).wake_at.unwrap();
        assert_eq!(wake.duration_since(cluster.now).as_secs(), 900, "{odd}");
    }
}

#[test]
fn images_that_cannot_be_pulled_are_named_while_it_waits_and_when_it_gives_up() {
    let mut cluster = stuck(json!({}));
    let pod = target_pod(&cluster, "job").unwrap();
    let waiting = json!({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image \"disk:1\""}});
    let container = json!({
        "name": "compute", "ready": false, "image": "i", "imageID": "", "restartCount": 0, "state": waiting,
    });
    cluster.patch(Kind::Pod, &pod, json!({"status": {"phase": "Pending", "containerStatuses": [container]}}));
    cluster.settle();
    let told = status(&cluster, "job");
    let text = "container compute: ImagePullBackOff: Back-off pulling image \"disk:1\"";
    assert_eq!(told["reason"], "TargetPodImage");
    assert!(told["message"].as_str().unwrap().contains(text), "{told}");
    assert_eq!(condition(&told, "Waiting")["message"], told["message"]);
    cluster.pass(900);
    cluster.settle();
    assert_failed(&cluster, "job", FailureCause::TargetNotReady, text);
}

#[test]
fn claims_that_are_not_there_are_named() {
    let mut cluster = cluster(&[("demo", "node1")]);
    let volumes = json!([{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]);
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"spec": {"volumes": volumes}}));
    let claim = |phase: &str, volume: Value| {
        json!({
            "metadata": {"name": "data", "namespace": "default"},
            "spec": {"accessModes": ["ReadWriteMany"], "volumeName": volume, "storageClassName": ""},
            "status": {"phase": phase},
        })
    };
    cluster.put(Kind::PersistentVolumeClaim, claim("Bound", json!("pv")));
    migrate(&mut cluster, "job", "demo");
    cluster.settle();
    assert_eq!(status(&cluster, "job")["reason"], "TargetPodStarting");
    cluster.remove(Kind::PersistentVolumeClaim, &name("data"));
    cluster.settle();
    let told = status(&cluster, "job");
    assert_eq!(told["reason"], "TargetPodVolumes");
    assert_eq!(told["message"], "The target pod waits for its volumes: claim default/data does not exist.");
}

#[test]
fn nodes_are_named_with_why_they_do_not_take_the_pod() {
    let mut cluster = cluster(&[("demo", "node1")]);
    for node in ["node2", "node3"] {
        cluster.patch(Kind::Node, &Name::cluster(node), json!({"spec": {"unschedulable": true}}));
    }
    migrate(&mut cluster, "job", "demo");
    cluster.settle();
    let told = status(&cluster, "job");
    assert_eq!(told["reason"], "TargetPodUnschedulable");
    let reasons = |told: &Value, node: &str| {
        let nodes = told["nodes"].as_array().cloned().unwrap_or_default();
        nodes.into_iter().find(|one| one["nodeName"] == node).map(|one| one["reasons"][0].clone()).unwrap_or_default()
    };
    assert_eq!(reasons(&told, "node2"), "node(s) were unschedulable");
    assert_eq!(reasons(&told, "node1"), "node(s) didn't match pod anti-affinity rules");
    let message = told["message"].as_str().unwrap();
    assert!(message.starts_with("No node takes the target pod: 0/3 nodes are available: "), "{message}");
    assert!(message.ends_with("Given up after 300 s."), "{message}");
    // They are still there when it has been given up, and go when there is room.
    let mut late = cluster.clone();
    late.pass(300);
    late.settle();
    assert_failed(&late, "job", FailureCause::Unschedulable, "within 300 s: 0/3 nodes are available");
    assert_eq!(status(&late, "job")["nodes"], told["nodes"]);
    cluster.patch(Kind::Node, &Name::cluster("node2"), json!({"spec": {"unschedulable": null}}));
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "PreparingTarget");
    assert!(status(&cluster, "job").get("nodes").is_none());
}

fn quota(pods: u32, used: u32) -> Value {
    json!({
        "metadata": {"name": "small", "namespace": "default"},
        "spec": {"hard": {"pods": pods.to_string()}},
        "status": {"hard": {"pods": pods.to_string()}, "used": {"pods": used.to_string()}},
    })
}

#[test]
fn a_quota_without_room_is_said_and_waited_for() {
    let mut cluster = cluster(&[("demo", "node1")]);
    cluster.put(Kind::ResourceQuota, quota(1, 1));
    migrate(&mut cluster, "job", "demo");
    cluster.settle();
    let told = status(&cluster, "job");
    assert_eq!((&told["phase"], &told["reason"]), (&json!("Pending"), &json!("QuotaExceeded")), "{told}");
    assert_eq!(target_pod(&cluster, "job"), None);
    let rejected = condition(&told, "migrationRejectedByResourceQuota");
    assert_eq!(rejected["status"], "True");
    assert!(told["message"].as_str().unwrap().contains("exceeded quota: small"), "{told}");
    let mut late = cluster.clone();
    late.pass(86_400);
    late.settle();
    assert_failed(&late, "job", FailureCause::QuotaExceeded, "exceeded quota: small");
    cluster.put(Kind::ResourceQuota, quota(2, 1));
    cluster.settle();
    let told = status(&cluster, "job");
    assert_eq!(told["phase"], "Scheduling");
    assert!(condition(&told, "migrationRejectedByResourceQuota").is_null());
}

#[test]
fn what_the_server_says_against_the_target_pod_is_said() {
    for (why, reason, cause) in [
        ("pods \"x\" is forbidden: exceeded quota: hidden", "QuotaExceeded", None),
        ("pods \"x\" is forbidden: violates PodSecurity", "TargetPodRefused", Some(FailureCause::TargetNotReady)),
    ] {
        let mut cluster = cluster(&[("demo", "node1")]);
        migrate(&mut cluster, "job", "demo");
        // Up to the making of the pod, which the server refuses again and again.
        let refused = |cluster: &mut Cluster| {
            for _ in 0..20 {
                for key in Key::all(&cluster.world) {
                    let mut plan = cluster.decide(&key);
                    let pod = plan.effects.iter().find_map(|effect| match effect {
                        crate::Effect::Create(object) if object.kind() == Kind::Pod => Some(object.name()),
                        _ => None,
                    });
                    if let Some(pod) = pod {
                        plan.effects.clear();
                        cluster.world.refuse(pod, why.to_owned(), cluster.now);
                    }
                    cluster.carry_out(plan);
                }
            }
        };
        refused(&mut cluster);
        let told = status(&cluster, "job");
        assert_eq!((&told["phase"], &told["reason"]), (&json!("Pending"), &json!(reason)), "{told}");
        assert!(told["message"].as_str().unwrap().contains(why), "{told}");
        assert_eq!(condition(&told, "migrationRejectedByResourceQuota").is_null(), cause.is_some());
        let plan = cluster.decide(&Key::Migration(name("job")));
        assert!(plan.is_quiet() && plan.wake_at == Some(cluster.now + jiff::SignedDuration::from_secs(30)));
        for _ in 0..29 {
            cluster.pass(30);
            refused(&mut cluster);
        }
        assert_eq!(status(&cluster, "job")["phase"], "Pending");
        cluster.pass(30);
        match cause {
            Some(cause) => {
                refused(&mut cluster);
                assert_failed(&cluster, "job", cause, why);
            }
            None => {
                // Asked again, the server has changed its mind.
                cluster.settle();
                assert_eq!(phase(&cluster, "job"), "Scheduling");
            }
        }
    }
}

#[test]
fn the_place_in_the_line_is_said() {
    let mut cluster = cluster(&[("a", "node1"), ("b", "node1"), ("c", "node1"), ("d", "node1")]);
    for vmi in ["a", "b", "c", "d"] {
        cluster.pass(1);
        migrate(&mut cluster, &format!("job-{vmi}"), vmi);
    }
    cluster.settle();
    for (job, place, said) in [("job-c", 1, "First"), ("job-d", 2, "Place 2")] {
        let told = status(&cluster, job);
        assert_eq!((&told["reason"], &told["queue"]["position"]), (&json!("NodeLimit"), &json!(place)));
        assert_eq!(told["queue"]["limit"], "parallelOutboundMigrationsPerNode");
        let message = format!(
            "Waits for its turn: 2 migrations leave node node1, which is the limit \
             (parallelOutboundMigrationsPerNode). {said} of those that wait."
        );
        assert_eq!(told["message"], message);
    }
}
