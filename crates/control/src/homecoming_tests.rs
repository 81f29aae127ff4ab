use serde_json::{Value, json};

use crate::object::Stored;
use crate::testing::Cluster;
use crate::{Kind, Name, Ref, names};

const KIND: Kind = Kind::NodeMaintenance;

fn guest(cluster: &mut Cluster, name: &str) {
    cluster.put(
        Kind::VirtualMachineInstance,
        json!({
            "metadata": {"namespace": "ns", "name": name, "uid": name},
            "spec": {"evictionStrategy": "LiveMigrate", "domain": {"memory": {"guest": "128Mi"}, "devices": {}}},
            "status": {
                "phase": "Running", "nodeName": "node1", "runtimeUser": 0,
                "conditions": [{"type": "LiveMigratable", "status": "True"}],
            },
        }),
    );
    cluster.put(
        Kind::Pod,
        json!({
            "metadata": {
                "namespace": "ns", "name": names::launcher_pod(name, name),
                "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": name},
                "annotations": {"kubevirt.io/domain": name},
            },
            "spec": {"nodeName": "node1", "containers": []}, "status": {"phase": "Running"},
        }),
    );
}

/// Every migration under way ends at `node`, as handlers, kubelets and garbage collection leave it.
fn arrive(cluster: &mut Cluster, node: &str) {
    let open: Vec<_> = cluster.world.migrations.iter().filter(|one| !one.is_final()).cloned().collect();
    for migration in open {
        let vmi = Name::new("ns", migration.vmi_name());
        let pods: Vec<_> = cluster.world.pods_of_vmi(migration.vmi_name()).map(|pod| pod.key()).collect();
        let target = names::launcher_pod(migration.vmi_name(), migration.uid());
        for pod in pods.iter().filter(|pod| pod.name != target) {
            cluster.remove(Kind::Pod, pod);
        }
        let there = Name::new("ns", target.as_str());
        if cluster.get(Kind::Pod, &there).is_some() {
            cluster.patch(Kind::Pod, &there, json!({"spec": {"nodeName": node}, "status": {"phase": "Running"}}));
        }
        let now = cluster.now.to_string();
        cluster.patch(
            Kind::VirtualMachineInstance,
            &vmi,
            json!({"status": {
                "nodeName": node,
                "migrationState": {
                    "migrationUid": migration.uid(), "completed": true, "targetNode": node, "targetPod": target,
                    "startTimestamp": now, "endTimestamp": now, "targetNodeDomainReadyTimestamp": now,
                },
            }}),
        );
        let over = json!({"metadata": {"finalizers": null}, "status": {"phase": "Succeeded"}});
        cluster.patch(Kind::Migration, &migration.key(), over);
    }
}

fn away() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.add_node("node1");
    cluster.add_node("node2");
    for name in ["a", "b"] {
        guest(&mut cluster, name);
    }
    let spec = json!({"nodeName": "node1", "returnHome": true});
    cluster.put(KIND, json!({"metadata": {"name": "m"}, "spec": spec}));
    cluster.settle();
    arrive(&mut cluster, "node2");
    cluster.settle();
    assert_eq!(cluster.get(KIND, &Name::cluster("m")).unwrap()["status"]["phase"], "Succeeded");
    assert!(going_home(&cluster).is_empty(), "not as long as it lasts");
    cluster
}

fn end(cluster: &mut Cluster) {
    cluster.delete(&Ref::new(KIND, Name::cluster("m")));
    cluster.settle();
}

fn going_home(cluster: &Cluster) -> Vec<String> {
    let open = cluster.world.migrations.iter().filter(|one| !one.is_final());
    open.filter(|one| one.annotation("godwit.io/homecoming") == Some("node1"))
        .map(|one| one.vmi_name().to_owned())
        .collect()
}

fn home(cluster: &Cluster, name: &str) -> Value {
    cluster.get(Kind::VirtualMachineInstance, &Name::new("ns", name)).unwrap()["metadata"]["annotations"]["godwit.io/home"]
        .clone()
}

#[test]
fn they_come_back_one_after_the_other() {
    let mut cluster = away();
    end(&mut cluster);
    assert_eq!(going_home(&cluster), ["a"]);
    let journey = cluster.world.migrations.iter().find(|one| !one.is_final()).unwrap();
    assert_eq!(journey.spec.priority.as_ref().map(|priority| priority.as_str()), Some("system-maintenance"));
    assert_eq!(journey.spec.added_node_selector.get("kubernetes.io/hostname").map(String::as_str), Some("node1"));
    arrive(&mut cluster, "node1");
    cluster.settle();
    assert_eq!((going_home(&cluster), home(&cluster, "a")), (vec!["b".to_owned()], Value::Null));
    arrive(&mut cluster, "node1");
    cluster.settle();
    assert_eq!((going_home(&cluster), home(&cluster, "b")), (vec![], Value::Null));
    assert!(cluster.world.vmis.iter().all(|vmi| vmi.status.node_name.as_deref() == Some("node1")));
}

#[test]
fn who_was_moved_by_somebody_else_stays_there() {
    let mut cluster = away();
    let moved = json!({"metadata": {"namespace": "ns", "name": "by-hand"}, "spec": {"vmiName": "a"}});
    cluster.add_node("node3");
    cluster.put(Kind::Migration, moved);
    cluster.settle();
    arrive(&mut cluster, "node3");
    cluster.settle();
    end(&mut cluster);
    assert_eq!((going_home(&cluster), home(&cluster, "a")), (vec!["b".to_owned()], Value::Null));
}

#[test]
fn who_does_not_fit_any_more_stays_away_and_says_so() {
    let mut cluster = away();
    cluster.patch(Kind::Node, &Name::cluster("node1"), json!({"status": {"allocatable": {"memory": "16Mi"}}}));
    end(&mut cluster);
    assert!(going_home(&cluster).is_empty());
    assert_eq!((home(&cluster, "a"), home(&cluster, "b")), (Value::Null, Value::Null));
    assert!(cluster.has_event("StaysAway", "It stays where it is"));
}

#[test]
fn a_closed_home_is_waited_for() {
    let mut cluster = away();
    end(&mut cluster);
    let all: Vec<_> = cluster.world.migrations.names().cloned().collect();
    assert!(!all.is_empty());
    let mut cluster = away();
    cluster.patch(
        Kind::Node,
        &Name::cluster("node1"),
        json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}),
    );
    end(&mut cluster);
    assert_eq!((going_home(&cluster), home(&cluster, "a")), (vec![], json!("node1")));
    cluster.patch(
        Kind::Node,
        &Name::cluster("node1"),
        json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}}),
    );
    cluster.settle();
    assert_eq!(going_home(&cluster), ["a"]);
}

#[test]
fn a_journey_that_fails_is_not_made_again() {
    let mut cluster = away();
    end(&mut cluster);
    let journey = cluster.world.migrations.iter().find(|one| !one.is_final()).unwrap().key();
    cluster.patch(Kind::Migration, &journey, json!({"metadata": {"finalizers": null}, "status": {"phase": "Failed"}}));
    cluster.settle();
    assert_eq!(going_home(&cluster), ["b"]);
    assert_eq!(home(&cluster, "a"), Value::Null);
}

#[test]
fn only_taints_that_a_guest_does_not_tolerate_keep_it_away_and_that_is_said() {
    let taint = |key: &str, effect: &str| json!([{"key": key, "effect": effect}]);
    let node1 = Name::cluster("node1");
    let mut cluster = away();
    let rack = taint("rack", "NoSchedule");
    cluster.patch(Kind::Node, &node1, json!({"spec": {"taints": rack}}));
    let tolerations = json!([{"operator": "Exists"}]);
    let b = Name::new("ns", "b");
    cluster.patch(Kind::VirtualMachineInstance, &b, json!({"spec": {"tolerations": tolerations}}));
    end(&mut cluster);
    assert_eq!(cluster.get(Kind::Node, &node1).unwrap()["spec"]["taints"][0]["key"], "rack");
    assert_eq!((going_home(&cluster), home(&cluster, "a")), (vec!["b".to_owned()], json!("node1")));
    let told = |cluster: &Cluster| -> Vec<String> {
        let waits = cluster.events.iter().filter(|event| event.reason == "WaitsToReturn");
        waits.map(|event| format!("{} {}", event.target.name, event.message)).collect()
    };
    let text = "ns/a It returns when the node that it left for a maintenance takes it: \
                node1 has the taint rack, which it does not tolerate";
    assert_eq!(told(&cluster), [text]);
    cluster.patch(Kind::Node, &node1, json!({"metadata": {"labels": {"more": "news"}}}));
    cluster.settle();
    assert_eq!(told(&cluster).len(), 1, "once");
    arrive(&mut cluster, "node1");
    cluster.settle();
    assert_eq!(going_home(&cluster), Vec::<String>::new());

    cluster.patch(Kind::Node, &node1, json!({"spec": {"taints": taint("rack", "PreferNoSchedule")}}));
    cluster.settle();
    assert_eq!(going_home(&cluster), ["a"]);
    let annotations = |name: &str| {
        cluster.get(Kind::VirtualMachineInstance, &Name::new("ns", name)).unwrap()["metadata"]["annotations"].clone()
    };
    assert!(annotations("a").get("godwit.io/home-closed").is_none());
    assert!(annotations("b").get("godwit.io/home-closed").is_none());

    // The drain taint keeps off whom it would only send away again.
    let mut cluster = away();
    for name in ["a", "b"] {
        let name = Name::new("ns", name);
        cluster.patch(Kind::VirtualMachineInstance, &name, json!({"spec": {"tolerations": tolerations}}));
    }
    cluster.patch(Kind::Node, &node1, json!({"spec": {"taints": taint("kubevirt.io/drain", "NoSchedule")}}));
    end(&mut cluster);
    assert_eq!((going_home(&cluster), home(&cluster, "a")), (vec![], json!("node1")));
    assert!(cluster.has_event("WaitsToReturn", "node1 carries the drain taint"));
}

#[test]
fn a_home_that_is_closed_again_on_the_way_is_waited_for() {
    let mut cluster = away();
    end(&mut cluster);
    assert_eq!(going_home(&cluster), ["a"]);
    let spec = json!({"nodeName": "node1"});
    cluster.put(KIND, json!({"metadata": {"name": "m"}, "spec": spec}));
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    assert_eq!((going_home(&cluster), home(&cluster, "a")), (vec![], json!("node1")));
    end(&mut cluster);
    assert_eq!(going_home(&cluster), ["a"]);
}

/// Its home is put into maintenance on the way, and taken out of it.
fn call_off(cluster: &mut Cluster) {
    cluster.put(KIND, json!({"metadata": {"name": "m"}, "spec": {"nodeName": "node1"}}));
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    assert_eq!((going_home(cluster), home(cluster, "a")), (vec![], json!("node1")));
}

#[test]
fn a_home_that_is_closed_again_and_again_is_waited_for() {
    // Also within one second, and whatever their UIDs are.
    for (pause, uids) in [(0, ["z", "m", "a"]), (0, ["a", "m", "z"]), (7, ["z", "m", "a"]), (7, ["a", "m", "z"])] {
        let mut cluster = away();
        end(&mut cluster);
        for uid in uids {
            assert_eq!(going_home(&cluster), ["a"], "{uids:?}");
            let journey = cluster.world.migrations.iter().find(|one| !one.is_final()).unwrap().key();
            call_off(&mut cluster);
            cluster.patch(Kind::Migration, &journey, json!({"metadata": {"uid": uid}}));
            cluster.pass(pause);
            end(&mut cluster);
        }
        assert_eq!(going_home(&cluster), ["a"], "{uids:?}");
    }
}

#[test]
fn a_journey_of_an_earlier_maintenance_does_not_lend_its_name() {
    let mut cluster = away();
    let earlier = json!({
        "metadata": {
            "namespace": "ns", "name": "earlier", "uid": "zzz", "creationTimestamp": "1970-01-02T00:00:00Z",
            "annotations": {"godwit.io/homecoming": "node1"},
        },
        "spec": {"vmiName": "a"}, "status": {"phase": "Succeeded"},
    });
    cluster.put(Kind::Migration, earlier);
    end(&mut cluster);
    assert_eq!(going_home(&cluster), ["a"]);
    cluster.pass(5);
    call_off(&mut cluster);
    end(&mut cluster);
    assert_eq!(going_home(&cluster), ["a"]);
}
