//! Lost nodes, and those that only look lost.

use jiff::Timestamp;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::object::Stored;
use crate::testing::Cluster;
use crate::{Effect, Key, Kind, Name, fence};

const NODES: [&str; 3] = ["node1", "node2", "node3"];

/// Every clock of a node is as wrong as it can be: what is written in a lease counts for nothing.
fn renew_at(cluster: &mut Cluster, node: &str, second: i64, peers: &str) {
    let time = Timestamp::from_second(second).unwrap();
    cluster.put(
        Kind::Lease,
        json!({
            "metadata": {
                "namespace": "kubevirt", "name": format!("virt-handler-{node}"), "uid": format!("lease-{node}"),
                "annotations": {"godwit.io/fence-peers": peers},
            },
            "spec": {"holderIdentity": node, "leaseDurationSeconds": 20, "renewTime": format!("{time:.6}")},
        }),
    );
}

fn renew(cluster: &mut Cluster, node: &str) {
    let others: Vec<&str> = NODES.into_iter().filter(|other| *other != node).collect();
    let second = cluster.now.as_second() - 100_000;
    renew_at(cluster, node, second, &others.join(","));
}

/// Three nodes of which the last is cordoned, so that a guest starts on the first or the second.
fn cluster() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.put(Kind::KubeVirt, json!({"metadata": {"namespace": "kubevirt", "name": "kubevirt"}, "spec": {}}));
    for node in NODES {
        cluster.add_node(node);
        renew(&mut cluster, node);
    }
    cluster
}

/// Seconds in which these nodes renew, each third.
fn live(cluster: &mut Cluster, seconds: i64, nodes: &[&str]) {
    for _ in 0..seconds / 3 {
        cluster.pass(3);
        for node in nodes {
            renew(cluster, node);
        }
        cluster.settle();
    }
}

fn name(name: &str) -> Name {
    Name::new("default", name)
}

fn get(cluster: &Cluster, kind: Kind, of: &str) -> Value {
    cluster.get(kind, &name(of)).unwrap_or(Value::Null)
}

/// A VM whose guest runs; the node where it does.
fn run_vm(cluster: &mut Cluster, vm: &str, strategy: &str) -> String {
    cluster.put(
        Kind::VirtualMachine,
        json!({
            "metadata": {"namespace": "default", "name": vm},
            "spec": {"runStrategy": strategy, "template": {"metadata": {}, "spec": {"domain": {
                "devices": {}, "resources": {"requests": {"memory": "64Mi"}}}}}},
        }),
    );
    if strategy == "Manual" {
        let start = json!({"status": {"stateChangeRequests": [{"action": "Start"}]}});
        cluster.patch(Kind::VirtualMachine, &name(vm), start);
    }
    start(cluster, vm)
}

/// The VM's guest comes to run.
fn start(cluster: &mut Cluster, vm: &str) -> String {
    for _ in 0..4 {
        cluster.settle();
        cluster.run_kubelets();
    }
    cluster.settle();
    let vmi = get(cluster, Kind::VirtualMachineInstance, vm);
    assert_eq!(vmi["status"]["phase"], "Scheduled", "{vmi:#}");
    cluster.patch(
        Kind::VirtualMachineInstance,
        &name(vm),
        json!({"status": {"phase": "Running", "phaseTransitionTimestamps": [
            {"phase": "Running", "phaseTransitionTimestamp": cluster.now.to_string()},
        ]}}),
    );
    cluster.settle();
    vmi["status"]["nodeName"].as_str().unwrap().to_owned()
}

fn others(node: &str) -> Vec<&'static str> {
    NODES.into_iter().filter(|other| *other != node).collect()
}

fn is_lost(cluster: &Cluster, node: &str) -> bool {
    fence::is_lost(node, &cluster.world)
}

/// What kubelets do that live: pods of a lost node stay as they are.
fn run_kubelets_but(cluster: &mut Cluster, lost: &str) {
    for pod in cluster.world.names_of(Kind::Pod) {
        let held = cluster.get(Kind::Pod, &pod).unwrap();
        if held["spec"]["nodeName"] == lost {
            continue;
        }
        if held["metadata"].get("deletionTimestamp").is_some_and(|at| !at.is_null()) {
            cluster.remove(Kind::Pod, &pod);
        }
    }
}

#[test]
fn a_lost_nodes_vm_runs_elsewhere_and_nobody_had_to_delete_its_pod() {
    let mut cluster = cluster();
    live(&mut cluster, 60, &NODES);
    let dead = run_vm(&mut cluster, "demo", "Always");
    let (old, died) = (get(&cluster, Kind::VirtualMachineInstance, "demo"), cluster.now);
    while !is_lost(&cluster, &dead) {
        let pods = cluster.world.pods_on(&dead).count();
        assert_eq!(pods, 1, "nothing is touched before");
        live(&mut cluster, 3, &others(&dead));
    }
    let after = cluster.now.duration_since(died).as_secs();
    assert!((30..=36).contains(&after), "{after} s");
    assert!(cluster.has_event("NodeUnresponsive", &format!("virt-handler on node {dead} is not responsive")));
    assert!(cluster.has_event("NodeUnresponsive", "was not heard for 30 s"));
    run_kubelets_but(&mut cluster, &dead);
    let node = start(&mut cluster, "demo");
    assert_ne!(node, dead);
    let new = get(&cluster, Kind::VirtualMachineInstance, "demo");
    assert_ne!(new["metadata"]["uid"], old["metadata"]["uid"]);
    assert_eq!(cluster.world.pods_on(&dead).count(), 0);
}

#[test]
fn run_strategies_decide_what_becomes_of_a_lost_guest() {
    for (strategy, again) in [("Always", true), ("RerunOnFailure", true), ("Once", false), ("Manual", false)] {
        let mut cluster = cluster();
        live(&mut cluster, 60, &NODES);
        let dead = run_vm(&mut cluster, "demo", strategy);
        let old = get(&cluster, Kind::VirtualMachineInstance, "demo");
        live(&mut cluster, 36, &others(&dead));
        if again {
            run_kubelets_but(&mut cluster, &dead);
            assert_ne!(start(&mut cluster, "demo"), dead, "{strategy}");
        } else {
            let vmi = get(&cluster, Kind::VirtualMachineInstance, "demo");
            assert_eq!(vmi["metadata"]["uid"], old["metadata"]["uid"], "{strategy}");
            let told = (&vmi["status"]["phase"], &vmi["status"]["reason"]);
            assert_eq!(told, (&json!("Failed"), &json!("NodeUnresponsive")), "{strategy}");
        }
    }
}

#[test]
fn a_node_without_a_lease_is_waited_for_and_the_vmi_says_so() {
    let mut cluster = cluster();
    live(&mut cluster, 60, &NODES);
    let dead = run_vm(&mut cluster, "demo", "Always");
    cluster.remove(Kind::Lease, &Name::new("kubevirt", format!("virt-handler-{dead}")));
    let silent = json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}});
    cluster.patch(Kind::Node, &Name::cluster(dead.as_str()), silent);
    live(&mut cluster, 600, &others(&dead));
    let vmi = get(&cluster, Kind::VirtualMachineInstance, "demo");
    assert_eq!(vmi["status"]["phase"], "Running");
    let told = vmi["status"]["conditions"].as_array().unwrap().iter().find(|one| one["type"] == "Synchronized");
    let told = told.expect("it says what it waits for");
    assert_eq!((&told["status"], &told["reason"]), (&json!("False"), &json!("NodeUnresponsive")));
    assert!(told["message"].as_str().unwrap().contains(&format!("no Lease kubevirt/virt-handler-{dead}")), "{told}");
    let back = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    cluster.patch(Kind::Node, &Name::cluster(dead.as_str()), back);
    cluster.settle();
    let vmi = get(&cluster, Kind::VirtualMachineInstance, "demo");
    let told = vmi["status"]["conditions"].as_array().unwrap().iter().find(|one| one["type"] == "Synchronized");
    assert_eq!(told, None);
}

#[test]
fn a_guest_of_a_node_that_asks_nobody_is_waited_for_and_the_vmi_says_so() {
    let mut cluster = cluster();
    live(&mut cluster, 60, &NODES);
    let dead = run_vm(&mut cluster, "demo", "Always");
    let second = cluster.now.as_second() - 100_000;
    renew_at(&mut cluster, &dead, second + 1, crate::names::FENCE_NO_PEERS);
    let silent = json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}});
    cluster.patch(Kind::Node, &Name::cluster(dead.as_str()), silent);
    live(&mut cluster, 600, &others(&dead));
    assert!(!is_lost(&cluster, &dead));
    let vmi = get(&cluster, Kind::VirtualMachineInstance, "demo");
    let told = vmi["status"]["conditions"].as_array().unwrap().iter().find(|one| one["type"] == "Synchronized");
    let told = told.expect("it says what it waits for")["message"].as_str().unwrap().to_owned();
    assert!(told.contains("its virt-handler knows of no other node") && !told.contains('*'), "{told}");
}

#[test]
fn a_lease_that_says_less_than_what_handlers_keep_is_not_believed() {
    let mut cluster = cluster();
    live(&mut cluster, 60, &NODES);
    let lease = Name::new("kubevirt", "virt-handler-node1");
    cluster.patch(Kind::Lease, &lease, json!({"spec": {"leaseDurationSeconds": 1}}));
    live(&mut cluster, 24, &["node2", "node3"]);
    assert!(!is_lost(&cluster, "node1"));
    live(&mut cluster, 12, &["node2", "node3"]);
    assert!(is_lost(&cluster, "node1"));
}

#[test]
fn who_hears_nobody_counts_nobody_as_lost() {
    let mut cluster = cluster();
    live(&mut cluster, 60, &NODES);
    run_vm(&mut cluster, "demo", "Always");
    // The controllers stood still, their clock jumped, or their watch is behind: then everybody is back.
    cluster.pass(3600);
    cluster.settle();
    assert!(NODES.iter().all(|node| !is_lost(&cluster, node)));
    // The first renewals after it show nothing yet either.
    live(&mut cluster, 36, &["node2", "node3"]);
    assert!(!is_lost(&cluster, "node1"), "it has to be silent while others are heard");
    live(&mut cluster, 6, &["node2", "node3"]);
    assert!(is_lost(&cluster, "node1"));
}

#[test]
fn only_those_whom_a_node_would_ask_can_show_that_it_has_ended_its_guests() {
    let mut cluster = cluster();
    live(&mut cluster, 60, &NODES);
    // The third node came after the first two had lost their contact: they put their fences off on each other's word.
    for node in ["node1", "node2"] {
        let other = if node == "node1" { "node2" } else { "node1" };
        let second = cluster.now.as_second() - 100_000;
        renew_at(&mut cluster, node, second + 1, other);
    }
    live(&mut cluster, 3600, &["node3"]);
    assert!(!is_lost(&cluster, "node1") && !is_lost(&cluster, "node2"));
    // One of them is back: from then on it does not give its word any more.
    live(&mut cluster, 42, &["node2", "node3"]);
    assert!(is_lost(&cluster, "node1") && !is_lost(&cluster, "node2"));
}

#[test]
fn a_renewal_that_comes_before_the_verdict_makes_it_void() {
    let mut cluster = cluster();
    live(&mut cluster, 60, &NODES);
    run_vm(&mut cluster, "demo", "Always");
    live(&mut cluster, 27, &["node2", "node3"]);
    cluster.pass(3);
    renew(&mut cluster, "node2");
    let plan = cluster.decide(&Key::Fence("node1".into()));
    assert!(!plan.is_quiet(), "it is due");
    renew(&mut cluster, "node1");
    cluster.carry_out(plan);
    assert!(!is_lost(&cluster, "node1"));
}

#[test]
fn a_node_that_is_back_takes_vms_again_and_one_that_is_not_heard_takes_none() {
    let mut cluster = cluster();
    live(&mut cluster, 60, &NODES);
    live(&mut cluster, 60, &["node1"]);
    let mut nodes = Vec::new();
    for vm in ["a", "b", "c"] {
        nodes.push(run_vm(&mut cluster, vm, "Always"));
    }
    assert_eq!(nodes, ["node1", "node1", "node1"]);
    live(&mut cluster, 3, &NODES);
    assert!(NODES.iter().all(|node| !is_lost(&cluster, node)), "a renewal ends it");
    assert_eq!(run_vm(&mut cluster, "d", "Always"), "node2");
}

#[test]
fn a_pod_that_comes_to_a_lost_node_goes_again_unless_the_node_is_back() {
    let mut cluster = cluster();
    live(&mut cluster, 60, &NODES);
    live(&mut cluster, 60, &["node2", "node3"]);
    assert!(is_lost(&cluster, "node1"));
    let pod = |app: &str| {
        json!({
            "metadata": {"namespace": "default", "name": app, "labels": {"kubevirt.io": app}},
            "spec": {"nodeName": "node1", "containers": []},
        })
    };
    for app in ["virt-launcher", "hotplug-disk", "something-else"] {
        cluster.put(Kind::Pod, pod(app));
    }
    let plan = cluster.decide(&Key::Fence("node1".into()));
    let deleted = plan.effects.iter().filter_map(|effect| match effect {
        Effect::Delete { target, grace_seconds: Some(0), .. } => Some(target.name.name.as_str()),
        _ => None,
    });
    assert_eq!(deleted.collect::<Vec<_>>(), ["hotplug-disk", "virt-launcher"]);
    renew(&mut cluster, "node1");
    cluster.carry_out(plan);
    assert!(cluster.get(Kind::Pod, &name("virt-launcher")).is_some(), "the node is back, and may run it");
}

#[test]
fn a_source_that_still_gives_memory_to_its_guest_elsewhere_goes_when_the_link_is_broken() {
    let mut cluster = cluster();
    live(&mut cluster, 60, &NODES);
    let source = run_vm(&mut cluster, "demo", "Always");
    let target = others(&source)[0];
    let vmi = get(&cluster, Kind::VirtualMachineInstance, "demo");
    let pod = cluster.world.pods_on(&source).next().unwrap().key();
    let of = json!({"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": vmi["metadata"]["uid"]});
    cluster.put(
        Kind::Pod,
        json!({
            "metadata": {"namespace": "default", "name": "there", "labels": of, "annotations": {"kubevirt.io/domain": "demo"}},
            "spec": {"nodeName": target, "containers": []}, "status": {"phase": "Running"},
        }),
    );
    let state = json!({
        "migrationUid": "uid-job", "sourceNode": source, "targetNode": target, "sourcePod": pod.name, "targetPod": "there",
        "mode": "PostCopy", "targetNodeDomainReadyTimestamp": cluster.now.to_string(),
    });
    let moved = json!({"status": {"nodeName": target, "migrationState": state}});
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), moved);
    live(&mut cluster, 60, &others(&source));
    assert!(is_lost(&cluster, &source));
    assert_eq!(cluster.world.pods_on(&source).count(), 1, "its node may be cut off from the API alone");
    let broken = json!({"status": {"migrationState": {"progress": {"linkBrokenTimestamp": cluster.now.to_string()}}}});
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), broken);
    cluster.settle();
    assert_eq!(cluster.world.pods_on(&source).count(), 0, "whoever has the guest learns that the rest never comes");
    assert_eq!(cluster.world.pods_on(target).count(), 1);
}

proptest! {
    /// Whatever a node's clock, the controllers' standstills and other nodes do: nobody is lost who was heard within F and the
    /// margin.
    #[test]
    fn nobody_is_lost_who_was_heard(steps in proptest::collection::vec((0..8_u8, 0..12_i64), 1..200)) {
        let mut cluster = cluster();
        let mut heard = [cluster.now; 3];
        for (what, pause) in steps {
            cluster.pass(pause);
            match what {
                0..3 => {
                    renew(&mut cluster, NODES[usize::from(what)]);
                    heard[usize::from(what)] = cluster.now;
                }
                _ => cluster.settle(),
            }
            for (node, heard) in NODES.iter().zip(heard) {
                let silent = cluster.now.duration_since(heard).as_secs();
                prop_assert!(!is_lost(&cluster, node) || silent >= 30, "{node} was heard {silent} s ago");
            }
        }
    }
}
