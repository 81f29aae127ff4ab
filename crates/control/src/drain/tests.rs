use godwit_api::drain::{DrainBasis, DrainOutcome, DrainPlan, DrainVm, PodOutcome};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde_json::{Value, json};

use super::{Manner, Terms};
use crate::plan::View;
use crate::testing::Cluster;
use crate::{Key, Kind, Name};

const NODES: [&str; 3] = ["node1", "node2", "node3"];

fn cluster() -> Cluster {
    let mut cluster = Cluster::new();
    for node in NODES {
        cluster.add_node(node);
    }
    cluster
}

/// A running guest with its launcher pod; `spec` is laid over a plain one.
fn guest(cluster: &mut Cluster, name: &str, node: &str, spec: Value) {
    let uid = format!("uid-{name}");
    let pod = crate::names::launcher_pod(name, &uid);
    let mut vmi = json!({
        "metadata": {"name": name, "namespace": "default", "uid": uid, "finalizers": ["f"]},
        "spec": {"domain": {"memory": {"guest": "128Mi"}, "devices": {}}},
        "status": {
            "phase": "Running", "nodeName": node, "accelerator": "tcg",
            "conditions": [{"type": "LiveMigratable", "status": "True"}],
        },
    });
    for (key, value) in spec.as_object().unwrap() {
        vmi["spec"][key] = value.clone();
    }
    cluster.put(Kind::VirtualMachineInstance, vmi);
    cluster.put(
        Kind::Pod,
        json!({
            "metadata": {
                "name": pod, "namespace": "default",
                "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": format!("uid-{name}")},
                "annotations": {"kubevirt.io/domain": name},
            },
            "spec": {"nodeName": node, "containers": [{
                "name": "compute", "resources": {"requests": {"cpu": "100m", "memory": "200Mi"}},
            }]},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
        }),
    );
}

fn mover(cluster: &mut Cluster, name: &str, node: &str) {
    guest(cluster, name, node, json!({"evictionStrategy": "LiveMigrate"}));
}

/// A VM of this guest.
fn machine(cluster: &mut Cluster, name: &str, strategy: &str) {
    cluster.put(
        Kind::VirtualMachine,
        json!({"metadata": {"name": name, "namespace": "default", "uid": format!("vm-{name}")},
            "spec": {"runStrategy": strategy}}),
    );
    let owner = json!([{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": name,
        "uid": format!("vm-{name}"), "controller": true}]);
    let key = Name::new("default", name);
    cluster.patch(Kind::VirtualMachineInstance, &key, json!({"metadata": {"ownerReferences": owner}}));
}

fn configure(cluster: &mut Cluster, configuration: Value) {
    cluster.put(
        Kind::KubeVirt,
        json!({"metadata": {"namespace": "kubevirt", "name": "kubevirt"}, "spec": {"configuration": configuration}}),
    );
}

fn with(cluster: &Cluster, nodes: &[&str], terms: &Terms<'_>) -> DrainPlan {
    let view = View { now: cluster.now, world: &cluster.world, settings: &cluster.settings };
    super::plan(&view, nodes, terms)
}

fn plan(cluster: &Cluster, nodes: &[&str]) -> DrainPlan {
    with(cluster, nodes, &Terms { budgets: Some(&[]), ..Terms::default() })
}

fn vm<'a>(plan: &'a DrainPlan, name: &str) -> &'a DrainVm {
    plan.vms.iter().find(|vm| vm.name == name).unwrap()
}

fn outcome(plan: &DrainPlan, name: &str) -> DrainOutcome {
    vm(plan, name).outcome.clone().unwrap()
}

fn said(plan: &DrainPlan, name: &str, text: &str) -> bool {
    vm(plan, name).reasons.iter().any(|reason| reason.contains(text))
}

#[test]
fn each_strategy_has_its_outcome() {
    let mut cluster = cluster();
    mover(&mut cluster, "moves", "node1");
    guest(&mut cluster, "always", "node1", json!({"evictionStrategy": "None"}));
    machine(&mut cluster, "always", "Always");
    guest(&mut cluster, "once", "node1", json!({}));
    machine(&mut cluster, "once", "RerunOnFailure");
    guest(&mut cluster, "alone", "node1", json!({}));
    guest(&mut cluster, "external", "node1", json!({"evictionStrategy": "External"}));
    guest(&mut cluster, "elsewhere", "node2", json!({"evictionStrategy": "LiveMigrate"}));
    let volumes = json!([{"name": "root", "persistentVolumeClaim": {"claimName": "local"}}]);
    for (name, strategy) in [("stuck", "LiveMigrate"), ("possible", "LiveMigrateIfPossible")] {
        let disk = json!({"evictionStrategy": strategy, "volumes": volumes});
        guest(&mut cluster, name, "node1", disk);
        let told =
            json!([{"type": "LiveMigratable", "status": "False", "reason": "DisksNotLiveMigratable", "message": "m"}]);
        cluster.patch(
            Kind::VirtualMachineInstance,
            &Name::new("default", name),
            json!({"status": {"conditions": told}}),
        );
    }
    cluster.put(
        Kind::PersistentVolumeClaim,
        json!({"metadata": {"name": "local", "namespace": "default"}, "spec": {"accessModes": ["ReadWriteOnce"]}}),
    );
    let before = format!("{:?}", cluster.world);
    let plan = plan(&cluster, &["node1"]);
    assert_eq!(format!("{:?}", cluster.world), before, "the world is as it was");

    for (name, outcome) in [
        ("moves", DrainOutcome::Migrate),
        ("always", DrainOutcome::ShutDown),
        ("once", DrainOutcome::ShutDown),
        ("alone", DrainOutcome::ShutDown),
        ("external", DrainOutcome::External),
        ("stuck", DrainOutcome::Block),
        ("possible", DrainOutcome::ShutDown),
    ] {
        assert_eq!(vm(&plan, name).outcome.clone().unwrap(), outcome, "{name}");
    }
    assert_eq!(plan.vms.len(), 7, "who is not on the node is not in the plan");
    assert!(plan.is_blocked());
    for name in ["stuck", "possible"] {
        assert!(said(&plan, name, "volume root: cannot migrate VMI: PVC local is not shared"), "{plan:#?}");
    }
    let restarts = ["always", "once", "alone", "possible"].map(|name| vm(&plan, name).restarts);
    assert_eq!(restarts, [Some(true), Some(false), Some(false), Some(false)]);
    for name in ["moves", "always"] {
        let target = vm(&plan, name).target_node.clone().unwrap();
        assert!(["node2", "node3"].contains(&target.as_str()), "{name}: {target}");
    }
    assert_eq!(vm(&plan, "once").target_node, None);
    assert_eq!(
        outcome(&plan, &plan.vms.last().unwrap().name.clone()),
        DrainOutcome::Block,
        "who stays comes last, or waits"
    );
}

#[test]
fn the_clusters_strategy_is_for_who_has_none() {
    let mut cluster = cluster();
    guest(&mut cluster, "a", "node1", json!({}));
    guest(&mut cluster, "b", "node1", json!({"evictionStrategy": "None"}));
    configure(&mut cluster, json!({"evictionStrategy": "LiveMigrate"}));
    let plan = plan(&cluster, &["node1"]);
    assert_eq!((outcome(&plan, "a"), outcome(&plan, "b")), (DrainOutcome::Migrate, DrainOutcome::ShutDown));
    assert!(said(&plan, "a", "evictionStrategy LiveMigrate (the cluster's)"));
}

#[test]
fn the_line_is_kept_and_what_bounds_it_is_told() {
    let mut cluster = cluster();
    for name in ["a", "b", "c", "d", "e", "f"] {
        mover(&mut cluster, name, "node1");
    }
    let first = plan(&cluster, &["node1"]);
    let order: Vec<&str> = first.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(order, ["a", "b", "c", "d", "e", "f"]);
    let begins: Vec<u64> = first.vms.iter().map(|vm| vm.start.as_ref().unwrap().milliseconds.unwrap()).collect();
    let one = vm(&first, "a").duration.as_ref().unwrap().milliseconds.unwrap();
    assert_eq!(begins, [0, 0, one, one, 2 * one, 2 * one], "two at a time leave a node");
    assert_eq!(first.duration.as_ref().unwrap().milliseconds, Some(3 * one));
    let bound = first.bounds.iter().find(|bound| bound.limit == "parallelOutboundMigrationsPerNode").unwrap();
    assert_eq!((bound.value, bound.node.as_deref(), bound.vms), (Some(2), Some("node1"), Some(4)));
    assert_eq!(bound.milliseconds, Some(2 * one));
    // The bytes alone, at the default 64 MiB/s for each of two.
    let bytes = first.bounds.iter().find(|bound| bound.limit == "bandwidthPerMigration").unwrap();
    assert_eq!((bytes.value, bytes.milliseconds), (Some(64 << 20), Some(6000)));
    // They spread over the nodes that remain.
    let to = |node: &str| first.vms.iter().filter(|vm| vm.target_node.as_deref() == Some(node)).count();
    assert_eq!((to("node1"), to("node2"), to("node3")), (0, 3, 3));

    configure(&mut cluster, json!({"migrations": {"parallelMigrationsPerCluster": 1}}));
    let slower = plan(&cluster, &["node1"]);
    assert_eq!(slower.duration.unwrap().milliseconds, Some(6 * one));
    assert_eq!(slower.bounds[0].limit, "parallelMigrationsPerCluster");
    configure(
        &mut cluster,
        json!({"migrations": {"parallelOutboundMigrationsPerNode": 6, "parallelInboundMigrationsPerNode": 1,
            "parallelMigrationsPerCluster": 6}}),
    );
    let inbound = plan(&cluster, &["node1"]);
    assert_eq!(inbound.duration.unwrap().milliseconds, Some(3 * one), "two nodes, each receives one");
    assert_eq!(inbound.bounds[0].limit, "parallelInboundMigrationsPerNode");
}

#[test]
fn others_are_waited_for() {
    let mut cluster = cluster();
    mover(&mut cluster, "ours", "node1");
    for name in ["x", "y"] {
        mover(&mut cluster, name, "node2");
        cluster.put(
            Kind::Migration,
            json!({"metadata": {"name": name, "namespace": "default", "uid": format!("job-{name}")},
                "spec": {"vmiName": name}, "status": {"phase": "Running"}}),
        );
    }
    configure(&mut cluster, json!({"migrations": {"parallelMigrationsPerCluster": 2}}));
    let waits = plan(&cluster, &["node1"]);
    assert_eq!(waits.vms.len(), 1);
    let one = vm(&waits, "ours").duration.as_ref().unwrap().milliseconds;
    assert_eq!(vm(&waits, "ours").start.as_ref().unwrap().milliseconds, one, "as long as theirs take");
    assert_eq!(waits.bounds[0].limit, "parallelMigrationsPerCluster");
}

#[test]
fn a_migration_that_is_under_way_is_part_of_the_plan() {
    let mut cluster = cluster();
    mover(&mut cluster, "a", "node1");
    cluster.put(
        Kind::Migration,
        json!({"metadata": {"name": "move", "namespace": "default", "uid": "job"}, "spec": {"vmiName": "a"},
            "status": {"phase": "Running"}}),
    );
    let end = (cluster.now + jiff::SignedDuration::from_secs(7)).to_string();
    let state = json!({"migrationUid": "job", "sourceNode": "node1", "targetNode": "node3",
        "progress": {"expectedEndTimestamp": end}});
    cluster.patch(
        Kind::VirtualMachineInstance,
        &Name::new("default", "a"),
        json!({"status": {"migrationState": state}}),
    );
    let plan = plan(&cluster, &["node1"]);
    let a = vm(&plan, "a");
    assert_eq!((a.migration_name.as_deref(), a.basis.clone()), (Some("move"), Some(DrainBasis::Progress)));
    assert_eq!(a.duration.as_ref().unwrap().milliseconds, Some(7000));
}

#[test]
fn nothing_goes_to_a_node_that_is_emptied_as_well() {
    let mut cluster = cluster();
    for name in ["a", "b"] {
        mover(&mut cluster, name, "node1");
        mover(&mut cluster, &format!("{name}2"), "node2");
    }
    let both = plan(&cluster, &["node2", "node1"]);
    assert_eq!(both.nodes, ["node1", "node2"]);
    assert!(both.vms.iter().all(|vm| vm.target_node.as_deref() == Some("node3")), "{both:#?}");
    // A node that somebody else empties is closed, too.
    cluster.patch(Kind::Node, &Name::cluster("node3"), json!({"spec": {"unschedulable": true}}));
    let none = plan(&cluster, &["node1", "node2"]);
    assert!(none.is_blocked());
    assert!(said(&none, "a", "0/3 nodes are available: 3 node(s) were unschedulable."), "{none:#?}");
}

#[test]
fn what_was_placed_before_takes_room() {
    let mut cluster = cluster();
    let big = json!({"metadata": {"name": "big", "namespace": "default"}, "status": {"phase": "Running"}});
    for (node, free) in [("node2", 300), ("node3", 500)] {
        let mut big = big.clone();
        big["metadata"]["name"] = json!(format!("big-{node}"));
        let memory = format!("{}Mi", 8192 - free);
        big["spec"] = json!({"nodeName": node, "containers": [
            {"name": "c", "resources": {"requests": {"memory": memory}}}]});
        cluster.put(Kind::Pod, big);
    }
    // 200 MiB each: one fits on node2, two on node3.
    for name in ["a", "b", "c", "d"] {
        mover(&mut cluster, name, "node1");
    }
    let plan = plan(&cluster, &["node1"]);
    let to = |node: &str| plan.vms.iter().filter(|vm| vm.target_node.as_deref() == Some(node)).count();
    assert_eq!((to("node2"), to("node3")), (1, 2), "{plan:#?}");
    assert_eq!(outcome(&plan, "d"), DrainOutcome::Block);
    assert!(said(&plan, "d", "2 Insufficient memory"), "{plan:#?}");
}

#[test]
fn what_was_measured_counts_more_than_sizes() {
    let mut cluster = cluster();
    mover(&mut cluster, "a", "node1");
    let by_size = plan(&cluster, &["node1"]);
    let a = vm(&by_size, "a");
    assert_eq!((a.basis.clone(), a.bytes), (Some(DrainBasis::Size), Some(128 << 20)));
    let expected = a.duration.clone().unwrap();
    // 128 MiB at 64 MiB/s, and what it takes to make ready.
    assert_eq!(expected.milliseconds, Some(2000 + 1500));
    assert!(expected.min_milliseconds < expected.milliseconds && expected.milliseconds < expected.max_milliseconds);
    let last = json!({
        "migrationUid": "old", "completed": true, "sourceNode": "node2", "targetNode": "node1",
        "progress": {"totalMilliseconds": 700, "bytesProcessed": 40 << 20},
        "migrationConfiguration": {"bandwidthPerMigration": "64Mi"},
    });
    let key = Name::new("default", "a");
    cluster.patch(Kind::VirtualMachineInstance, &key, json!({"status": {"migrationState": last}}));
    let measured = plan(&cluster, &["node1"]);
    let a = vm(&measured, "a");
    assert_eq!(
        (a.basis.clone(), a.duration.as_ref().unwrap().milliseconds),
        (Some(DrainBasis::LastMigration), Some(2200))
    );
    // With half of the bandwidth it takes what its bytes take.
    configure(&mut cluster, json!({"migrations": {"bandwidthPerMigration": "32Mi"}}));
    let slower = plan(&cluster, &["node1"]);
    assert_eq!(vm(&slower, "a").duration.as_ref().unwrap().milliseconds, Some(1250 + 1500));
    let forecast = json!({
        "migrationUid": "old", "completed": true, "failed": true,
        "forecast": {"madeAt": "1970-01-01T00:00:00Z", "durationMilliseconds": 900, "minDurationMilliseconds": 800,
            "maxDurationMilliseconds": 1000},
        "progress": null,
    });
    cluster.patch(Kind::VirtualMachineInstance, &key, json!({"status": {"migrationState": forecast}}));
    let foretold = plan(&cluster, &["node1"]);
    let duration = vm(&foretold, "a").duration.clone().unwrap();
    assert_eq!(vm(&foretold, "a").basis, Some(DrainBasis::Forecast));
    assert_eq!((duration.milliseconds, duration.max_milliseconds), (Some(2400), Some(16_000)));
}

#[test]
fn an_evacuation_that_has_stopped_blocks() {
    let mut cluster = cluster();
    mover(&mut cluster, "a", "node1");
    let told = json!([{"type": "LiveMigratable", "status": "True"},
        {"type": "EvacuationStopped", "status": "True", "reason": "AttemptsUsedUp", "message": "All 10 attempts failed."}]);
    cluster.patch(Kind::VirtualMachineInstance, &Name::new("default", "a"), json!({"status": {"conditions": told}}));
    let plan = plan(&cluster, &["node1"]);
    assert_eq!(outcome(&plan, "a"), DrainOutcome::Block);
    assert!(said(&plan, "a", "All 10 attempts failed."));
}

fn pod(cluster: &mut Cluster, name: &str, owner: Option<&str>, volumes: Value) {
    let owners =
        owner.map(|kind| json!([{"apiVersion": "apps/v1", "kind": kind, "name": "o", "uid": "o", "controller": true}]));
    cluster.put(
        Kind::Pod,
        json!({
            "metadata": {"name": name, "namespace": "default", "labels": {"app": name.split('-').next()}, "ownerReferences": owners},
            "spec": {"nodeName": "node1", "containers": [], "volumes": volumes},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
        }),
    );
}

fn budget(name: &str, app: &str, allowed: i32) -> PodDisruptionBudget {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": app}}},
        "status": {"disruptionsAllowed": allowed, "currentHealthy": 2, "desiredHealthy": 2 - allowed, "expectedPods": 2},
    }))
    .unwrap()
}

#[test]
fn other_pods_go_as_kubectl_and_their_budgets_have_it() {
    let mut cluster = cluster();
    pod(&mut cluster, "daemon", Some("DaemonSet"), json!([]));
    pod(&mut cluster, "web-1", Some("ReplicaSet"), json!([]));
    pod(&mut cluster, "web-2", Some("ReplicaSet"), json!([]));
    pod(&mut cluster, "db-1", Some("StatefulSet"), json!([]));
    pod(&mut cluster, "twice-1", Some("ReplicaSet"), json!([]));
    pod(&mut cluster, "bare", None, json!([]));
    pod(&mut cluster, "scratch", Some("ReplicaSet"), json!([{"name": "tmp", "emptyDir": {}}]));
    let budgets =
        [budget("web", "web", 1), budget("db", "db", 0), budget("one", "twice", 2), budget("two", "twice", 2)];
    let said = |manner: Manner| {
        let plan = with(&cluster, &["node1"], &Terms { manner, budgets: Some(&budgets) });
        let of = |name: &str| {
            let pod = plan.pods.iter().find(|pod| pod.name == name).unwrap();
            (pod.outcome.clone().unwrap(), pod.reasons.join("; "))
        };
        ["daemon", "web-1", "web-2", "db-1", "twice-1", "bare", "scratch"].map(of)
    };
    let free = said(Manner::default());
    use PodOutcome::{Block, Evict, Ignore, Wait};
    assert_eq!(free.clone().map(|(outcome, _)| outcome), [Ignore, Evict, Wait, Block, Block, Evict, Evict]);
    assert_eq!(free[3].1, "PodDisruptionBudget default/db needs 2 healthy pods and has 2");
    assert!(free[4].1.contains("more than one PodDisruptionBudget (default/one and default/two)"));
    let strict = said(Manner { ignore_daemon_sets: false, delete_empty_dir_data: false, force: false });
    assert_eq!(strict.clone().map(|(outcome, _)| outcome), [Block, Evict, Wait, Block, Block, Block, Block]);
    assert!(strict[5].1.contains("--force") && strict[6].1.contains("--delete-emptydir-data"));
}

#[test]
fn a_budget_keeps_a_guest_that_would_be_shut_down() {
    let mut cluster = cluster();
    guest(&mut cluster, "a", "node1", json!({}));
    let pod = crate::names::launcher_pod("a", "uid-a");
    cluster.patch(Kind::Pod, &Name::new("default", &pod), json!({"metadata": {"labels": {"app": "db"}}}));
    let budgets = [budget("db", "db", 0)];
    let plan = with(&cluster, &["node1"], &Terms { budgets: Some(&budgets), ..Terms::default() });
    assert_eq!(outcome(&plan, "a"), DrainOutcome::Block);
    assert!(said(&plan, "a", "PodDisruptionBudget default/db needs 2 healthy pods"));
}

/// What the plan foretells is what the controllers then do: the same VMs leave, to as many on each node.
#[test]
fn the_controllers_do_what_the_plan_says() {
    let mut cluster = cluster();
    for index in 0..8 {
        mover(&mut cluster, &format!("vm{index}"), "node1");
    }
    for name in ["old1", "old2", "old3"] {
        mover(&mut cluster, name, "node2");
    }
    configure(
        &mut cluster,
        json!({"migrations": {"parallelOutboundMigrationsPerNode": 20, "parallelMigrationsPerCluster": 20,
            "parallelInboundMigrationsPerNode": 20}}),
    );
    let plan = plan(&cluster, &["node1"]);
    cluster.patch(Kind::Node, &Name::cluster("node1"), json!({"spec": {"unschedulable": true}}));
    for index in 0..8 {
        let name = Name::new("default", format!("vm{index}"));
        let mark = json!({"status": {"evacuationNodeName": "node1"}});
        cluster.patch(Kind::VirtualMachineInstance, &name, mark);
        cluster.step(&Key::Evacuation(name));
    }
    cluster.settle();
    let count = |node: &str| {
        let foretold = plan.vms.iter().filter(|vm| vm.target_node.as_deref() == Some(node)).count();
        let targets = cluster
            .world
            .pods_on(node)
            .filter(|pod| pod.metadata.labels.as_ref().unwrap().contains_key("kubevirt.io/migrationJobUID"));
        (foretold, targets.count())
    };
    for node in NODES {
        let (foretold, came) = count(node);
        assert_eq!(foretold, came, "{node}");
    }
    assert_eq!(count("node2").0 + count("node3").0, 8);
    assert!(count("node3").0 > count("node2").0);
}
