use serde_json::{Value, json};

use super::*;
use crate::Ref;
use crate::key::Noun;
use crate::names;
use crate::plan::Effect;
use crate::testing::Cluster;

const NODE: &str = "node1";

fn add(cluster: &mut Cluster, kind: Kind, name: &str, spec: Value) {
    let mut object = json!({"metadata": {"name": name}, "spec": {"nodeName": NODE}});
    for (key, value) in spec.as_object().unwrap() {
        object["spec"][key] = value.clone();
    }
    cluster.put(kind, object);
}

fn begin(cluster: &mut Cluster, kind: Kind, spec: Value) {
    add(cluster, kind, "m", spec);
    cluster.settle();
}

fn object(cluster: &Cluster, kind: Kind) -> Value {
    cluster.get(kind, &Name::cluster("m")).unwrap()
}

fn node(cluster: &Cluster) -> Value {
    cluster.get(Kind::Node, &Name::cluster(NODE)).unwrap()
}

fn taints(cluster: &Cluster) -> Vec<String> {
    let node = node(cluster);
    let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    taints
        .iter()
        .map(|taint| format!("{}:{}", taint["key"].as_str().unwrap(), taint["effect"].as_str().unwrap()))
        .collect()
}

fn end(cluster: &mut Cluster, kind: Kind) {
    cluster.delete(&Ref::new(kind, Name::cluster("m")));
    cluster.settle();
}

fn two_nodes() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.add_node(NODE);
    cluster.add_node("node2");
    cluster
}

fn pod(cluster: &mut Cluster, name: &str, extra: Value) {
    let mut pod = json!({
        "metadata": {"namespace": "ns", "name": name},
        "spec": {"nodeName": NODE, "containers": []}, "status": {"phase": "Running"},
    });
    for (key, value) in extra.as_object().unwrap() {
        pod["metadata"][key] = value.clone();
    }
    cluster.put(Kind::Pod, pod);
}

fn pods(cluster: &Cluster) -> Vec<String> {
    cluster.world.pods.names().map(|name| name.name.to_string()).collect()
}

/// A guest with its pod, as handlers and kubelets have left it.
fn guest(cluster: &mut Cluster, name: &str, strategy: Option<&str>, migratable: bool) {
    let why = if migratable { Value::Null } else { json!("cannot migrate VMI: PVC disk is not shared") };
    let status = if migratable { "True" } else { "False" };
    cluster.put(
        Kind::VirtualMachineInstance,
        json!({
            "metadata": {"namespace": "ns", "name": name, "uid": name},
            "spec": {"evictionStrategy": strategy, "domain": {"memory": {"guest": "128Mi"}, "devices": {}}},
            "status": {
                "phase": "Running", "nodeName": NODE, "runtimeUser": 0,
                "conditions": [{"type": "LiveMigratable", "status": status, "message": why}],
            },
        }),
    );
    pod(
        cluster,
        &names::launcher_pod(name, name),
        json!({
            "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": name},
            "annotations": {"kubevirt.io/domain": name},
        }),
    );
}

#[test]
fn an_empty_node_is_closed_and_opened_again_in_every_group() {
    for (kind, drain, lease) in [
        (Kind::NodeMaintenance, "medik8s.io/drain:NoSchedule", Name::new("medik8s-leases", "node-node1")),
        (Kind::KubeVirtNodeMaintenance, "kubevirt.io/drain:NoSchedule", Name::new("node-maintenance", "node1")),
        (Kind::OldestNodeMaintenance, "kubevirt.io/drain:NoSchedule", Name::new("node-maintenance", "node1")),
    ] {
        let mut cluster = two_nodes();
        let before = node(&cluster);
        begin(&mut cluster, kind, json!({}));
        let status = object(&cluster, kind)["status"].clone();
        assert_eq!((&status["phase"], &status["drainProgress"]), (&json!("Succeeded"), &json!(100)), "{status}");
        assert_eq!((&status["totalpods"], &status["evictionPods"]), (&json!(0), &json!(0)));
        assert!(status["lastUpdate"].is_string());
        assert_eq!(object(&cluster, kind)["metadata"]["finalizers"], json!([FINALIZER]));
        assert_eq!(node(&cluster)["spec"]["unschedulable"], true);
        assert_eq!(taints(&cluster), ["node.kubernetes.io/unschedulable:NoSchedule", drain]);
        let label = &node(&cluster)["metadata"]["labels"]["remediation.medik8s.io/exclude-from-remediation"];
        assert_eq!(label == "true", kind == Kind::NodeMaintenance);
        let held = cluster.get(Kind::Lease, &lease).unwrap();
        assert_eq!(held["spec"]["holderIdentity"], "node-maintenance");
        assert_eq!(held["spec"]["leaseDurationSeconds"], 3600);
        let owner = &held["metadata"]["ownerReferences"][0]["kind"];
        assert_eq!(owner == "Node", kind == Kind::NodeMaintenance);
        let told: Vec<_> = cluster.events.iter().map(|event| event.reason.as_str()).collect();
        assert_eq!(told, ["BeginMaintenance", "SucceedMaintenance"]);

        end(&mut cluster, kind);
        assert_eq!(cluster.get(kind, &Name::cluster("m")), None);
        for part in ["labels", "annotations"] {
            let said = |node: &Value| node["metadata"].get(part).cloned().filter(|part| *part != json!({}));
            assert_eq!(said(&node(&cluster)), said(&before), "{part}");
        }
        assert!(node(&cluster)["spec"]["unschedulable"].is_null() && taints(&cluster).is_empty());
        match kind {
            Kind::NodeMaintenance => assert_eq!(cluster.get(Kind::Lease, &lease), None),
            _ => assert!(cluster.get(Kind::Lease, &lease).unwrap()["spec"]["holderIdentity"].is_null()),
        }
        assert!(cluster.has_event("UncordonNode", "Uncordon a node"));
        assert!(cluster.has_event("RemovedMaintenance", "Removed a node maintenance"));
    }
}

#[test]
fn what_the_node_had_before_stays() {
    let mut cluster = two_nodes();
    let taint = json!({"key": "kubevirt.io/drain", "effect": "NoSchedule"});
    cluster.patch(
        Kind::Node,
        &Name::cluster(NODE),
        json!({
            "metadata": {"labels": {"remediation.medik8s.io/exclude-from-remediation": "mine"}},
            "spec": {"unschedulable": true, "taints": [taint]},
        }),
    );
    for kind in KINDS {
        begin(&mut cluster, kind, json!({}));
        assert_eq!(object(&cluster, kind)["status"]["phase"], "Succeeded");
        end(&mut cluster, kind);
        assert_eq!(node(&cluster)["spec"]["unschedulable"], true, "somebody had closed it");
        assert_eq!(taints(&cluster), ["kubevirt.io/drain:NoSchedule", "node.kubernetes.io/unschedulable:NoSchedule"]);
        assert_eq!(node(&cluster)["metadata"]["labels"]["remediation.medik8s.io/exclude-from-remediation"], "mine");
        assert!(!cluster.has_event("UncordonNode", ""));
    }
}

#[test]
fn pods_go_but_those_that_would_come_back_at_once() {
    let mut cluster = two_nodes();
    pod(&mut cluster, "plain", json!({}));
    pod(&mut cluster, "mirror", json!({"annotations": {"kubernetes.io/config.mirror": "x"}}));
    let owner = json!([{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "d", "uid": "d", "controller": true}]);
    pod(&mut cluster, "daemon", json!({"ownerReferences": owner}));
    pod(
        &mut cluster,
        "guarded",
        json!({"annotations": {"test/budget": "Cannot evict pod as it would violate the pod's disruption budget."}}),
    );
    begin(&mut cluster, Kind::NodeMaintenance, json!({}));
    let status = object(&cluster, Kind::NodeMaintenance)["status"].clone();
    assert_eq!((&status["totalpods"], &status["evictionPods"]), (&json!(4), &json!(2)));
    assert_eq!(status["phase"], "Running");
    cluster.run_kubelets();
    cluster.settle();
    assert_eq!(pods(&cluster), ["daemon", "guarded", "mirror"]);
    let status = object(&cluster, Kind::NodeMaintenance)["status"].clone();
    assert_eq!((&status["drainProgress"], &status["pendingPods"]), (&json!(50), &json!(["guarded"])));
    assert_eq!(status["pendingPodsRefs"], json!([{"namespace": "ns", "name": "guarded"}]));
    let budget = "pod ns/guarded cannot be evicted: Cannot evict pod as it would violate the pod's disruption budget.";
    assert_eq!(status["lastError"], budget);

    // Asked again every five seconds, and not in between.
    let key = Key::Maintenance(Kind::NodeMaintenance, "m".into());
    let evictions = |cluster: &Cluster| {
        cluster.decide(&key).effects.iter().filter(|effect| matches!(effect, Effect::Evict { .. })).count()
    };
    assert_eq!(evictions(&cluster), 0);
    assert_eq!(cluster.decide(&key).wake_at, Some(cluster.now + AGAIN));
    cluster.pass(5);
    assert_eq!(evictions(&cluster), 1);
    cluster.patch(Kind::Pod, &Name::new("ns", "guarded"), json!({"metadata": {"annotations": null}}));
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    let status = object(&cluster, Kind::NodeMaintenance)["status"].clone();
    assert_eq!((&status["phase"], &status["drainProgress"]), (&json!("Succeeded"), &json!(100)));
    assert!(status.get("pendingPods").is_none() && status.get("pendingPodsRefs").is_none());

    // What arrives later goes as well, and the progress never falls below nothing.
    for late in ["late1", "late2", "late3"] {
        pod(&mut cluster, late, json!({}));
    }
    let status = |cluster: &Cluster| object(cluster, Kind::NodeMaintenance)["status"].clone();
    cluster.step(&key);
    assert_eq!((&status(&cluster)["phase"], &status(&cluster)["drainProgress"]), (&json!("Running"), &json!(0)));
    cluster.run_kubelets();
    cluster.settle();
    assert_eq!(pods(&cluster), ["daemon", "mirror"]);
    assert_eq!(status(&cluster)["phase"], "Succeeded");
}

#[test]
fn a_guest_is_moved_and_one_that_cannot_be_is_named() {
    let mut cluster = two_nodes();
    guest(&mut cluster, "mover", Some("LiveMigrate"), true);
    guest(&mut cluster, "stuck", Some("LiveMigrate"), false);
    guest(&mut cluster, "plain", None, true);
    begin(&mut cluster, Kind::NodeMaintenance, json!({}));
    let vmi = |cluster: &Cluster, name| cluster.get(Kind::VirtualMachineInstance, &Name::new("ns", name)).unwrap();
    assert_eq!(vmi(&cluster, "mover")["status"]["evacuationNodeName"], NODE);
    let migrations: Vec<_> = cluster.world.migrations.iter().map(|one| one.vmi_name().to_owned()).collect();
    assert_eq!(migrations, ["mover"]);
    let status = object(&cluster, Kind::NodeMaintenance)["status"].clone();
    let state = |name: &str| {
        let all = status["virtualMachineInstances"].as_array().unwrap();
        all.iter().find(|one| one["name"] == name).cloned().unwrap()
    };
    assert_eq!(state("stuck")["state"], "Blocked", "{status}");
    assert_eq!(state("stuck")["message"], "cannot migrate VMI: PVC disk is not shared");
    assert_eq!(status["lastError"], "ns/stuck cannot leave: cannot migrate VMI: PVC disk is not shared");
    assert_eq!(state("plain")["state"], "ShuttingDown");
    assert!(state("mover")["migrationName"].as_str().unwrap().starts_with("kubevirt-evacuation-"), "{status}");
    // Its target does not go where the maintenance is, also if somebody opens the node behind its back.
    let target = cluster.world.pods_without_node().count() + cluster.world.pods_on("node2").count();
    assert!(target >= 1 && cluster.world.pods_on("node2").count() <= 1);

    // Over before it could leave: nothing is asked of anybody any more.
    end(&mut cluster, Kind::NodeMaintenance);
    assert_eq!(cluster.get(Kind::NodeMaintenance, &Name::cluster("m")), None);
    assert!(vmi(&cluster, "mover")["status"]["evacuationNodeName"].is_null());
    assert!(vmi(&cluster, "mover")["status"]["evacuation"].is_null());
}

#[test]
fn a_waiting_evacuation_is_taken_back_with_the_maintenance() {
    let mut cluster = two_nodes();
    // Somebody had closed it: that the node stays closed must not keep the guests marked.
    cluster.patch(Kind::Node, &Name::cluster(NODE), json!({"spec": {"unschedulable": true}}));
    cluster.put(
        Kind::KubeVirt,
        json!({
            "metadata": {"namespace": "kubevirt", "name": "kubevirt"},
            "spec": {"configuration": {"migrations": {"parallelOutboundMigrationsPerNode": 1}}},
        }),
    );
    for name in ["one", "two"] {
        guest(&mut cluster, name, Some("LiveMigrate"), true);
    }
    begin(&mut cluster, Kind::OldestNodeMaintenance, json!({}));
    let open = |cluster: &Cluster| -> Vec<String> {
        let open = cluster.world.migrations.iter().filter(|one| !one.is_final() && !one.is_deleting());
        let mut phases: Vec<_> = open.map(|one| one.status.phase.as_str().to_owned()).collect();
        phases.sort();
        phases
    };
    assert_eq!(open(&cluster), ["Pending", "Scheduling"], "one at a time leaves the node");
    let mut waits = cluster.clone();
    end(&mut waits, Kind::OldestNodeMaintenance);
    assert_eq!(open(&waits), Vec::<String>::new(), "neither has begun");
    cluster.run_kubelets();
    cluster.settle();
    end(&mut cluster, Kind::OldestNodeMaintenance);
    for name in ["one", "two"] {
        let vmi = cluster.get(Kind::VirtualMachineInstance, &Name::new("ns", name)).unwrap();
        assert!(vmi["status"]["evacuationNodeName"].is_null(), "{vmi}");
    }
    assert_eq!(open(&cluster), ["PreparingTarget"], "what is under way goes on, what waits does not begin any more");
    assert_eq!(node(&cluster)["spec"]["unschedulable"], true);
}

#[test]
fn without_its_node_it_fails_for_good() {
    let mut cluster = two_nodes();
    begin(&mut cluster, Kind::NodeMaintenance, json!({"nodeName": "nowhere"}));
    let status = object(&cluster, Kind::NodeMaintenance)["status"].clone();
    assert_eq!((&status["phase"], &status["lastError"]), (&json!("Failed"), &json!("nodes \"nowhere\" not found")));
    assert!(cluster.has_event("FailedMaintenance", "Failed a node maintenance"));
    cluster.add_node("nowhere");
    cluster.settle();
    let node = cluster.get(Kind::Node, &Name::cluster("nowhere")).unwrap();
    assert!(node["spec"]["unschedulable"].is_null());
    end(&mut cluster, Kind::NodeMaintenance);
    assert_eq!(cluster.get(Kind::NodeMaintenance, &Name::cluster("m")), None);
}

#[test]
fn the_lease_of_another_is_waited_for_and_a_lost_one_ends_it() {
    let lease = Name::new("medik8s-leases", "node-node1");
    let held_by = |cluster: &mut Cluster, who: &str| {
        let spec = json!({
            "holderIdentity": who, "leaseDurationSeconds": 600, "renewTime": format!("{:.6}", cluster.now),
        });
        cluster.put(
            Kind::Lease,
            json!({
                "metadata": {"namespace": "medik8s-leases", "name": "node-node1"}, "spec": spec,
            }),
        );
    };
    let status = |cluster: &Cluster| object(cluster, Kind::NodeMaintenance)["status"].clone();
    let mut cluster = two_nodes();
    pod(&mut cluster, "one", json!({}));
    pod(&mut cluster, "guarded", json!({"annotations": {"test/budget": "no"}}));
    held_by(&mut cluster, "somebody");
    begin(&mut cluster, Kind::NodeMaintenance, json!({}));
    for _ in 0..10 {
        cluster.pass(5);
        cluster.settle();
    }
    let said = "the lease medik8s-leases/node-node1 of the node is held by \"somebody\"";
    assert_eq!(status(&cluster)["lastError"], said);
    assert!(status(&cluster)["errorOnLeaseCount"].is_null(), "nothing was moved yet: it may wait");
    assert!(node(&cluster)["spec"]["unschedulable"].is_null());
    cluster.pass(600);
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    assert_eq!(status(&cluster)["drainProgress"], 50, "the lease has run out");
    assert_eq!(cluster.get(Kind::Lease, &lease).unwrap()["spec"]["holderIdentity"], "node-maintenance");

    held_by(&mut cluster, "somebody");
    let mut counts = Vec::new();
    for _ in 0..5 {
        cluster.settle();
        counts.push(status(&cluster)["errorOnLeaseCount"].as_i64().unwrap_or(0));
        cluster.pass(5);
    }
    assert_eq!(counts, [1, 2, 3, 4, 4]);
    let said = "maintenance failed: lease could not be extended after 3 attempts";
    assert_eq!((&status(&cluster)["phase"], &status(&cluster)["lastError"]), (&json!("Failed"), &json!(said)));
    assert!(node(&cluster)["spec"]["unschedulable"].is_null() && taints(&cluster).is_empty());
    assert_eq!(cluster.get(Kind::Lease, &lease).unwrap()["spec"]["holderIdentity"], "somebody");
}

#[test]
fn the_lease_is_renewed_as_long_as_the_maintenance_lasts() {
    let mut cluster = two_nodes();
    begin(&mut cluster, Kind::NodeMaintenance, json!({}));
    let key = Key::Maintenance(Kind::NodeMaintenance, "m".into());
    let lease = Name::new("medik8s-leases", "node-node1");
    let renewed = |cluster: &Cluster| cluster.get(Kind::Lease, &lease).unwrap()["spec"]["renewTime"].clone();
    let first = renewed(&cluster);
    let wake = cluster.decide(&key).wake_at.unwrap();
    assert_eq!(wake, cluster.now + SignedDuration::from_mins(30));
    cluster.pass(30 * 60);
    cluster.settle();
    assert_ne!(renewed(&cluster), first);
}

#[test]
fn a_deadline_aborts_or_is_told() {
    for (action, phase, cordoned) in [
        (Value::Null, "Failed", Value::Null),
        (json!("Abort"), "Failed", Value::Null),
        (json!("Continue"), "Running", json!(true)),
    ] {
        let mut cluster = two_nodes();
        pod(&mut cluster, "guarded", json!({"annotations": {"test/budget": "no"}}));
        begin(&mut cluster, Kind::NodeMaintenance, json!({"deadline": "1m", "onDeadline": action}));
        let key = Key::Maintenance(Kind::NodeMaintenance, "m".into());
        cluster.pass(58);
        cluster.settle();
        assert_eq!(object(&cluster, Kind::NodeMaintenance)["status"]["phase"], "Running");
        assert!(cluster.decide(&key).wake_at.unwrap() <= cluster.now + SignedDuration::from_secs(2));
        cluster.pass(2);
        cluster.settle();
        let status = object(&cluster, Kind::NodeMaintenance)["status"].clone();
        assert_eq!(status["phase"], phase, "{action}");
        assert_eq!(node(&cluster)["spec"]["unschedulable"], cordoned, "{action}");
        let told = if phase == "Failed" { "FailedMaintenance" } else { "DeadlinePassed" };
        assert_eq!(cluster.events.iter().filter(|event| event.reason == told).count(), 1, "{action}");
        cluster.pass(5);
        cluster.settle();
        assert_eq!(cluster.events.iter().filter(|event| event.reason == told).count(), 1, "{action}");
    }
}

#[test]
fn the_oldest_of_two_is_in_charge_and_the_next_takes_over() {
    let mut cluster = two_nodes();
    begin(&mut cluster, Kind::OldestNodeMaintenance, json!({}));
    cluster.pass(1);
    add(&mut cluster, Kind::NodeMaintenance, "second", json!({}));
    cluster.settle();
    let second = |cluster: &Cluster| cluster.get(Kind::NodeMaintenance, &Name::cluster("second")).unwrap();
    assert_eq!(second(&cluster)["status"]["lastError"], "node1 is in the maintenance m already");
    assert!(!taints(&cluster).contains(&"medik8s.io/drain:NoSchedule".to_owned()));
    end(&mut cluster, Kind::OldestNodeMaintenance);
    assert_eq!(second(&cluster)["status"]["phase"], "Succeeded");
    assert_eq!(node(&cluster)["spec"]["unschedulable"], true);
    cluster.delete(&Ref::new(Kind::NodeMaintenance, Name::cluster("second")));
    cluster.settle();
    assert!(node(&cluster)["spec"]["unschedulable"].is_null() && taints(&cluster).is_empty());
}

#[test]
fn a_dry_run_touches_nothing_and_says_what_would_happen() {
    let mut cluster = two_nodes();
    pod(&mut cluster, "plain", json!({}));
    guest(&mut cluster, "mover", Some("LiveMigrate"), true);
    guest(&mut cluster, "stuck", Some("LiveMigrate"), false);
    cluster.settle();
    let (before, pods_before) = (node(&cluster), pods(&cluster));
    begin(&mut cluster, Kind::NodeMaintenance, json!({"dryRun": true}));
    assert_eq!((node(&cluster), pods(&cluster)), (before, pods_before));
    let one = object(&cluster, Kind::NodeMaintenance);
    assert_eq!(one["metadata"].get("finalizers"), None);
    let plan = &one["status"]["plan"];
    assert_eq!((&plan["nodes"], &plan["blocked"]), (&json!([NODE]), &json!(true)), "{plan}");
    let outcomes: Vec<_> = plan["vms"].as_array().unwrap().iter().map(|vm| (&vm["name"], &vm["outcome"])).collect();
    assert!(outcomes.contains(&(&json!("mover"), &json!("Migrate"))), "{plan}");
    assert!(outcomes.contains(&(&json!("stuck"), &json!("Block"))), "{plan}");
    assert_eq!(cluster.world.migrations.len(), 0);
    // Not with each piece of news, but after a while.
    let key = Key::Maintenance(Kind::NodeMaintenance, "m".into());
    cluster.patch(Kind::Pod, &Name::new("ns", "plain"), json!({"metadata": {"labels": {"a": "b"}}}));
    assert!(cluster.decide(&key).effects.is_empty());
    assert_eq!(cluster.decide(&key).wake_at, Some(cluster.now + FORESEE_AGAIN));
}

#[test]
fn so_many_leave_at_once_as_it_says() {
    let mut cluster = two_nodes();
    for name in ["a", "b", "c", "d"] {
        guest(&mut cluster, name, Some("LiveMigrate"), true);
    }
    guest(&mut cluster, "stuck", Some("LiveMigrate"), false);
    // The taint of this group would send all of them off at once.
    begin(&mut cluster, Kind::OldestNodeMaintenance, json!({"maxParallel": 2}));
    let leaving = |cluster: &Cluster| object(cluster, Kind::OldestNodeMaintenance)["status"]["leaving"].clone();
    let moved = |cluster: &Cluster| -> Vec<String> {
        let open = cluster.world.migrations.iter().filter(|one| !one.is_final());
        let mut names: Vec<_> = open.map(|one| one.vmi_name().to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!((leaving(&cluster), moved(&cluster)), (json!(["ns/a", "ns/b"]), vec!["a".to_owned(), "b".to_owned()]));
    let status = object(&cluster, Kind::OldestNodeMaintenance)["status"].clone();
    let all = status["virtualMachineInstances"].as_array().unwrap();
    let of = |name: &str| all.iter().find(|one| one["name"] == name).unwrap();
    assert_eq!(of("c")["message"], "it waits for its turn (maxParallel)");
    assert_eq!(of("stuck")["state"], "Blocked", "it takes nobody's turn");

    // One has left: the next one goes. Nobody else may while a turn is taken.
    cluster.patch(Kind::VirtualMachineInstance, &Name::new("ns", "a"), json!({"status": {"nodeName": "node2"}}));
    let of_a: Vec<_> =
        cluster.world.migrations.iter().filter(|one| one.vmi_name() == "a").map(|one| one.key()).collect();
    cluster.patch(
        Kind::Migration,
        &of_a[0],
        json!({"metadata": {"finalizers": null}, "status": {"phase": "Succeeded"}}),
    );
    cluster.settle();
    assert_eq!((leaving(&cluster), moved(&cluster)), (json!(["ns/b", "ns/c"]), vec!["b".to_owned(), "c".to_owned()]));

    // The bound is lifted: all go.
    let patch = json!({"spec": {"maxParallel": null}});
    cluster.patch(Kind::OldestNodeMaintenance, &Name::cluster("m"), patch);
    cluster.settle();
    assert_eq!((leaving(&cluster), moved(&cluster).len()), (Value::Null, 3));
}

#[test]
fn a_failed_one_leaves_the_next_drain_alone() {
    const KIND: Kind = Kind::NodeMaintenance;
    let mut cluster = two_nodes();
    pod(&mut cluster, "guarded", json!({"annotations": {"test/budget": "no"}}));
    begin(&mut cluster, KIND, json!({"deadline": "1m"}));
    cluster.pass(60);
    cluster.settle();
    assert_eq!(object(&cluster, KIND)["status"]["phase"], "Failed");

    // A drain by hand.
    guest(&mut cluster, "mover", Some("LiveMigrate"), true);
    cluster.patch(Kind::Node, &Name::cluster(NODE), json!({"spec": {"unschedulable": true}}));
    let mover = Name::new("ns", "mover");
    cluster.patch(Kind::VirtualMachineInstance, &mover, json!({"status": {"evacuationNodeName": NODE}}));
    let goes_on = |cluster: &Cluster| {
        let vmi = cluster.get(Kind::VirtualMachineInstance, &mover).unwrap();
        assert_eq!(vmi["status"]["evacuationNodeName"], NODE);
        assert_eq!(node(cluster)["spec"]["unschedulable"], true);
        let open: Vec<_> = cluster.world.migrations.iter().filter(|one| !one.is_final()).collect();
        assert!(open.len() == 1 && !open[0].is_deleting(), "{open:?}");
    };
    cluster.settle();
    goes_on(&cluster);

    // What an earlier leader still wrote in its name is taken back.
    let uid = object(&cluster, KIND)["metadata"]["uid"].clone();
    let marks = json!({"uid": uid, "taints": ["medik8s.io/drain"]}).to_string();
    let taints_now = json!([{"key": "medik8s.io/drain", "effect": "NoSchedule"}]);
    let patch = json!({"metadata": {"annotations": {"godwit.io/maintenance": marks}}, "spec": {"taints": taints_now}});
    let mut strayed = cluster.clone();
    strayed.patch(Kind::Node, &Name::cluster(NODE), patch);
    strayed.settle();
    assert_eq!(taints(&strayed), ["node.kubernetes.io/unschedulable:NoSchedule"], "it is cordoned");

    end(&mut cluster, KIND);
    assert_eq!(cluster.get(KIND, &Name::cluster("m")), None);
    goes_on(&cluster);
}

#[test]
fn guests_are_only_looked_at_when_their_turn_may_have_come() {
    use crate::world::Change;
    const KIND: Kind = Kind::NodeMaintenance;
    let mut cluster = two_nodes();
    guest(&mut cluster, "mover", Some("LiveMigrate"), true);
    begin(&mut cluster, KIND, json!({"maxParallel": 1}));
    let before = object(&cluster, KIND);
    let wakes = |at: &str, value: Value| {
        let mut after = before.clone();
        *after.pointer_mut(at).unwrap() = value;
        let read = |value: &Value| Some(Object::from_value(KIND, value.clone()).unwrap());
        let change = Change { before: read(&before), after: read(&after) };
        Key::affected(&change, &cluster.world).contains(&Key::Evacuation(Name::new("ns", "mover")))
    };
    assert!(!wakes("/status/drainProgress", json!(50)));
    assert!(!wakes("/status/virtualMachineInstances", json!([])));
    assert!(wakes("/status/leaving", json!(["ns/other"])));
    assert!(wakes("/spec/maxParallel", json!(2)));
    assert!(wakes("/status/phase", json!("Failed")));
}

#[test]
fn one_that_never_closed_its_node_takes_nobodys_marks_off() {
    for kind in KINDS {
        let mut cluster = two_nodes();
        let lease = match kind {
            Kind::NodeMaintenance => ("medik8s-leases", "node-node1"),
            _ => ("node-maintenance", NODE),
        };
        let spec = json!({
            "holderIdentity": "somebody", "leaseDurationSeconds": 600, "renewTime": format!("{:.6}", cluster.now),
        });
        let metadata = json!({"namespace": lease.0, "name": lease.1});
        cluster.put(Kind::Lease, json!({"metadata": metadata, "spec": spec}));
        begin(&mut cluster, kind, json!({}));
        // A drain by hand, of a guest that nobody can take.
        guest(&mut cluster, "mover", Some("LiveMigrate"), true);
        cluster.patch(Kind::Node, &Name::cluster("node2"), json!({"spec": {"unschedulable": true}}));
        let mover = Name::new("ns", "mover");
        cluster.patch(Kind::VirtualMachineInstance, &mover, json!({"status": {"evacuationNodeName": NODE}}));
        cluster.settle();
        let open = |cluster: &Cluster| cluster.world.migrations.iter().filter(|one| !one.is_deleting()).count();
        assert_eq!(open(&cluster), 1);
        end(&mut cluster, kind);
        assert_eq!(cluster.get(kind, &Name::cluster("m")), None);
        let vmi = cluster.get(Kind::VirtualMachineInstance, &mover).unwrap();
        assert_eq!((&vmi["status"]["evacuationNodeName"], open(&cluster)), (&json!(NODE), 1), "{vmi}");
    }
}

/// Beside another KubeVirt nobody brings guests back, and the taint of its groups has all of them leave at once.
#[test]
fn what_only_godwits_migrations_do_is_said_to_be_ignored_where_another_moves_the_guests() {
    for (kind, ignored) in [
        (Kind::NodeMaintenance, "returnHome"),
        (Kind::KubeVirtNodeMaintenance, "returnHome, maxParallel"),
        (Kind::OldestNodeMaintenance, "returnHome, maxParallel"),
    ] {
        for ours in [true, false] {
            let mut cluster = two_nodes();
            cluster.settings.moves_guests = ours;
            guest(&mut cluster, "mover", Some("LiveMigrate"), true);
            begin(&mut cluster, kind, json!({"returnHome": true, "maxParallel": 1}));
            let told = object(&cluster, kind)["status"]["lastError"].as_str().unwrap_or_default().to_owned();
            let text = format!("ignored where another KubeVirt moves the guests: {ignored}");
            assert_eq!(told.contains(&text), !ours, "{told}");
            let vmi = cluster.get(Kind::VirtualMachineInstance, &Name::new("ns", "mover")).unwrap();
            assert_eq!(vmi["metadata"]["annotations"]["godwit.io/home"].is_string(), ours, "{vmi}");
        }
    }
}

/// An earlier leader closes the node when the maintenance has gone already.
#[test]
fn what_a_late_write_leaves_is_taken_back() {
    const KIND: Kind = Kind::NodeMaintenance;
    let mut cluster = two_nodes();
    begin(&mut cluster, KIND, json!({}));
    let closed = node(&cluster);
    end(&mut cluster, KIND);
    let again = json!({
        "metadata": {"annotations": closed["metadata"]["annotations"], "labels": closed["metadata"]["labels"]},
        "spec": closed["spec"],
    });
    cluster.patch(Kind::Node, &Name::cluster(NODE), again);
    guest(&mut cluster, "mover", Some("LiveMigrate"), true);
    let mover = Name::new("ns", "mover");
    cluster.patch(Kind::VirtualMachineInstance, &mover, json!({"status": {"evacuationNodeName": NODE}}));
    cluster.settle();
    assert_eq!(node(&cluster)["spec"]["unschedulable"], true, "it may be that of a maintenance that is not known yet");
    // Whoever maintains nodes and decides nothing else of them takes it back as well.
    let key = Key::Closure(NODE.into());
    assert_eq!(key.noun(), Noun::Maintenance);
    let woken = cluster.decide(&key).wake_at.unwrap();
    assert_eq!(woken, cluster.now + SignedDuration::from_mins(1));
    cluster.pass(60);
    cluster.settle();
    assert!(node(&cluster)["spec"]["unschedulable"].is_null() && taints(&cluster).is_empty());
    assert!(node(&cluster)["metadata"]["annotations"].get("godwit.io/maintenance").is_none());
    let vmi = cluster.get(Kind::VirtualMachineInstance, &mover).unwrap();
    assert!(vmi["status"]["evacuationNodeName"].is_null());
}

#[test]
fn what_goes_with_its_finalizer_is_not_written_to_afterwards() {
    const KIND: Kind = Kind::NodeMaintenance;
    for guests in [0, 1] {
        let mut cluster = two_nodes();
        for number in 0..guests {
            guest(&mut cluster, &format!("stuck{number}"), Some("LiveMigrate"), false);
        }
        begin(&mut cluster, KIND, json!({}));
        cluster.delete(&Ref::new(KIND, Name::cluster("m")));
        let plan = cluster.decide(&Key::Maintenance(KIND, "m".into()));
        let told = plan
            .effects
            .iter()
            .any(|effect| matches!(effect, Effect::Record(one) if one.reason == "RemovedMaintenance"));
        let written =
            plan.effects.iter().any(|effect| matches!(effect, Effect::PatchStatus(target, _) if target.kind == KIND));
        assert_eq!((told, written), (true, false), "{:?}", plan.effects);
    }
}

#[test]
fn who_leaves_by_the_taint_alone_or_lost_its_mark_is_let_off_as_well() {
    let open = |cluster: &Cluster| -> Vec<String> {
        let open = cluster.world.migrations.iter().filter(|one| !one.is_final() && !one.is_deleting());
        open.map(|one| one.uid().to_owned()).collect()
    };
    let mover = Name::new("ns", "mover");
    let drain = json!([{"key": "kubevirt.io/drain", "effect": "NoSchedule"}]);
    for (kind, somebody_drains) in
        [(Kind::OldestNodeMaintenance, false), (Kind::NodeMaintenance, false), (Kind::OldestNodeMaintenance, true)]
    {
        let mut cluster = two_nodes();
        guest(&mut cluster, "mover", Some("LiveMigrate"), true);
        cluster.patch(Kind::Node, &Name::cluster("node2"), json!({"spec": {"unschedulable": true}}));
        if somebody_drains {
            cluster.patch(Kind::Node, &Name::cluster(NODE), json!({"spec": {"taints": drain}}));
            cluster.settle();
        }
        begin(&mut cluster, kind, json!({}));
        let off = json!({"status": {"evacuationNodeName": null}});
        cluster.patch(Kind::VirtualMachineInstance, &mover, off);
        cluster.settle();
        let before = open(&cluster);
        assert_eq!(before.len(), 1, "{kind:?}");
        end(&mut cluster, kind);
        assert_eq!(cluster.get(kind, &Name::cluster("m")), None);
        let vmi = cluster.get(Kind::VirtualMachineInstance, &mover).unwrap();
        if somebody_drains {
            assert_eq!((open(&cluster), &vmi["status"]["evacuation"]["nodeName"]), (before, &json!(NODE)), "{vmi}");
        } else {
            assert_eq!((open(&cluster), &vmi["status"]["evacuation"]), (vec![], &Value::Null), "{kind:?}: {vmi}");
        }
    }
}

/// Marks of a maintenance that is gone are left on a node whose next maintenance waits for the lease.
#[test]
fn what_another_maintenance_will_take_over_is_not_taken_back() {
    use crate::world::Change;
    const KIND: Kind = Kind::NodeMaintenance;
    let mut cluster = two_nodes();
    begin(&mut cluster, KIND, json!({}));
    let closed = node(&cluster);
    end(&mut cluster, KIND);
    let spec = json!({
        "holderIdentity": "somebody", "leaseDurationSeconds": 600, "renewTime": format!("{:.6}", cluster.now),
    });
    let metadata = json!({"namespace": "medik8s-leases", "name": "node-node1"});
    cluster.put(Kind::Lease, json!({"metadata": metadata, "spec": spec}));
    begin(&mut cluster, KIND, json!({}));
    let again = json!({
        "metadata": {"annotations": closed["metadata"]["annotations"], "labels": closed["metadata"]["labels"]},
        "spec": closed["spec"],
    });
    cluster.patch(Kind::Node, &Name::cluster(NODE), again);
    let marks = |cluster: &Cluster| -> Value {
        let text = node(cluster)["metadata"]["annotations"]["godwit.io/maintenance"].clone();
        text.as_str().map_or(Value::Null, |text| serde_json::from_str(text).unwrap())
    };
    let left = marks(&cluster);
    cluster.pass(300);
    cluster.settle();
    assert_eq!((&node(&cluster)["spec"]["unschedulable"], marks(&cluster)), (&json!(true), left.clone()));

    // It gives up, and nobody else will.
    let mut given_up = cluster.clone();
    let before = object(&given_up, KIND);
    let failed = json!({"status": {"phase": "Failed", "lastError": "a test"}});
    given_up.patch(KIND, &Name::cluster("m"), failed);
    let read = |value: Value| Some(Object::from_value(KIND, value).unwrap());
    let change = Change { before: read(before), after: read(object(&given_up, KIND)) };
    assert!(Key::affected(&change, &given_up.world).contains(&Key::Closure(NODE.into())));
    given_up.settle();
    assert!(node(&given_up)["spec"]["unschedulable"].is_null() && marks(&given_up).is_null());

    // The lease has run out: they are its own from now on.
    cluster.pass(300);
    cluster.settle();
    assert_eq!(object(&cluster, KIND)["status"]["phase"], "Succeeded");
    assert_ne!(marks(&cluster)["uid"], left["uid"]);
    assert_eq!(marks(&cluster)["uid"], object(&cluster, KIND)["metadata"]["uid"]);
    assert_eq!(marks(&cluster)["since"], cluster.now.to_string());
    end(&mut cluster, KIND);
    assert!(node(&cluster)["spec"]["unschedulable"].is_null() && taints(&cluster).is_empty());
}
