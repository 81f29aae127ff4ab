use godwit_api::drain::{BandwidthBasis, DrainBasis, DrainOutcome, DrainPlan, DrainVm, PodOutcome};
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
fn a_guest_goes_only_where_its_processor_is() {
    let mut cluster = cluster();
    mover(&mut cluster, "a", "node1");
    let name = Name::new("default", crate::names::launcher_pod("a", "uid-a"));
    cluster.patch(Kind::Pod, &name, json!({"spec": {"nodeSelector": {"kubevirt.io/schedulable": "true"}}}));
    let has = json!({"guestCpu": {"model": "Westmere", "features": []}, "machineRevision": 4});
    cluster.patch(Kind::VirtualMachineInstance, &Name::new("default", "a"), json!({"status": has}));
    for (node, model) in [("node1", "Westmere"), ("node2", "Penryn"), ("node3", "Westmere")] {
        let label = format!("cpu-model-migration.node.kubevirt.io/{model}");
        cluster.patch(Kind::Node, &Name::cluster(node), json!({"metadata": {"labels": {label: "true"}}}));
    }
    assert_eq!(vm(&plan(&cluster, &["node1"]), "a").target_node.as_deref(), Some("node3"));
    let none = plan(&cluster, &["node1", "node3"]);
    assert!(none.is_blocked() && vm(&none, "a").target_node.is_none(), "{none:#?}");
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
    assert_eq!(
        [&free[1], &free[5], &free[6]].map(|(_, why)| why.as_str()),
        ["", "nobody makes it again elsewhere", "its emptyDir is lost with it"]
    );
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

/// What a guest was measured to write, `rate` bytes a second to all of its memory.
fn writes(cluster: &mut Cluster, name: &str, rate: u64, present: u64) {
    let samples: Vec<Value> = [1000, 2000, 4000]
        .iter()
        .map(|ms| json!({"withinMilliseconds": ms, "bytes": (rate * ms / 1000).min(present), "marginBytes": 0}))
        .collect();
    let dirty = json!({"measuredAt": "1970-01-01T00:00:00Z", "bytesPerSecond": rate, "memoryBytes": 128 << 20,
        "presentBytes": present, "onePass": false, "samples": samples});
    cluster.patch(Kind::VirtualMachineInstance, &Name::new("default", name), json!({"status": {"dirtyRate": dirty}}));
}

#[test]
fn what_a_guest_was_measured_to_write_counts_though_it_never_moved() {
    const MI: u64 = 1 << 20;
    let mut cluster = cluster();
    for name in ["quiet", "busy", "hopeless"] {
        mover(&mut cluster, name, "node1");
    }
    writes(&mut cluster, "quiet", 0, 32 * MI);
    writes(&mut cluster, "busy", 30 * MI, 96 * MI);
    writes(&mut cluster, "hopeless", 90 * MI, 128 * MI);
    let first = plan(&cluster, &["node1"]);
    let likely = |plan: &DrainPlan, name: &str| vm(plan, name).duration.as_ref().unwrap().milliseconds.unwrap();
    for name in ["quiet", "busy", "hopeless"] {
        assert_eq!(vm(&first, name).basis, Some(DrainBasis::DirtyRate), "{name}");
        let bandwidth = (vm(&first, name).bytes_per_second, vm(&first, name).bandwidth_basis.clone());
        assert_eq!(bandwidth, (Some(64 * MI), Some(BandwidthBasis::Configured)), "{name}");
    }
    // 32 MiB at 64 MiB/s; 96 MiB and again what was written meanwhile. And 1.5 s before each.
    assert!((1_900..2_300).contains(&likely(&first, "quiet")), "{first:#?}");
    assert!((3_500..5_500).contains(&likely(&first, "busy")), "{first:#?}");
    let busy = vm(&first, "busy");
    assert_eq!((busy.dirty_bytes_per_second, busy.converges), (Some(30 * MI), Some(true)));
    assert!(busy.downtime.as_ref().unwrap().milliseconds < Some(1_000), "{busy:#?}");
    // Its memory is written faster than it is sent: the time of KubeVirt's default, 800 s a GiB.
    let hopeless = vm(&first, "hopeless");
    assert_eq!((hopeless.converges, hopeless.downtime.clone()), (Some(false), None));
    assert_eq!(likely(&first, "hopeless"), 800_000 + 1_500);
    assert!(said(&first, "hopeless", "at 64 MiB/s the copying does not end by itself: it is given up"), "{first:#?}");

    configure(&mut cluster, json!({"migrations": {"allowPostCopy": true}}));
    let ended = plan(&cluster, &["node1"]);
    assert!(said(&ended, "hopeless", "post-copy ends it"), "{ended:#?}");
    assert!((8_000..10_000).contains(&likely(&ended, "hopeless")), "{ended:#?}");
    configure(&mut cluster, json!({"migrations": {"bandwidthPerMigration": "512Mi"}}));
    let fast = plan(&cluster, &["node1"]);
    assert_eq!(vm(&fast, "hopeless").converges, Some(true), "{fast:#?}");

    // A guest that stands still writes nothing.
    configure(&mut cluster, json!({}));
    let paused = json!([{"type": "LiveMigratable", "status": "True"}, {"type": "Paused", "status": "True"}]);
    let key = Name::new("default", "hopeless");
    cluster.patch(Kind::VirtualMachineInstance, &key, json!({"status": {"conditions": paused}}));
    assert_eq!(vm(&plan(&cluster, &["node1"]), "hopeless").converges, Some(true));
}

#[test]
fn a_last_migration_counts_as_long_as_the_guest_does_the_same() {
    const MI: u64 = 1 << 20;
    let mut cluster = cluster();
    mover(&mut cluster, "a", "node1");
    let last = json!({
        "migrationUid": "old", "completed": true, "sourceNode": "node2", "targetNode": "node1",
        "progress": {"totalMilliseconds": 700, "bytesProcessed": 40 << 20},
        "migrationConfiguration": {"bandwidthPerMigration": "64Mi"},
        "forecast": {"dirtyBytesPerSecond": 10 << 20},
    });
    let key = Name::new("default", "a");
    cluster.patch(Kind::VirtualMachineInstance, &key, json!({"status": {"migrationState": last}}));
    let basis = |cluster: &Cluster| vm(&plan(cluster, &["node1"]), "a").basis.clone().unwrap();
    assert_eq!(basis(&cluster), DrainBasis::LastMigration);
    writes(&mut cluster, "a", 15 * MI, 64 * MI);
    assert_eq!(basis(&cluster), DrainBasis::LastMigration);
    writes(&mut cluster, "a", 40 * MI, 64 * MI);
    assert_eq!(basis(&cluster), DrainBasis::DirtyRate, "it writes more than then");
    writes(&mut cluster, "a", 10 * MI, 64 * MI);
    configure(&mut cluster, json!({"migrations": {"bandwidthPerMigration": "32Mi"}}));
    assert_eq!(basis(&cluster), DrainBasis::DirtyRate, "another cap");
}

/// A record of a migration that went at this rate under a cap.
fn record(cluster: &mut Cluster, name: &str, nodes: (&str, &str), rate: u64, cap: Option<u64>) {
    cluster.put(
        Kind::MigrationRecord,
        json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"vmiName": "gone", "migrationName": name, "migrationUID": name, "result": "Succeeded",
                "sourceNode": nodes.0, "targetNode": nodes.1, "endedAt": "1970-01-01T00:00:00Z",
                "bytesProcessed": rate * 2, "totalMilliseconds": 2100, "downtimeMilliseconds": 100,
                "bandwidthBytesPerSecond": cap},
        }),
    );
}

#[test]
fn bandwidth_is_what_these_nodes_were_seen_to_carry() {
    const MI: u64 = 1 << 20;
    let mut cluster = cluster();
    mover(&mut cluster, "a", "node1");
    configure(&mut cluster, json!({"migrations": {"bandwidthPerMigration": "0"}}));
    let bandwidth = |cluster: &Cluster| {
        let plan = plan(cluster, &["node1"]);
        let a = vm(&plan, "a");
        (a.bytes_per_second.unwrap() / MI, a.bandwidth_basis.clone().unwrap())
    };
    assert_eq!(bandwidth(&cluster), (400, BandwidthBasis::Assumed));
    record(&mut cluster, "far", ("node4", "node5"), 300 * MI, Some(0));
    assert_eq!(bandwidth(&cluster), (300, BandwidthBasis::Cluster));
    record(&mut cluster, "came", ("node5", "node1"), 200 * MI, Some(0));
    assert_eq!(bandwidth(&cluster), (200, BandwidthBasis::Node));
    for to in ["node2", "node3"] {
        record(&mut cluster, &format!("{to}-slow"), ("node1", to), 50 * MI, Some(0));
        record(&mut cluster, to, ("node1", to), 100 * MI, None);
        record(&mut cluster, &format!("{to}-fast"), ("node1", to), 110 * MI, Some(0));
        // On its node, small, or failed: nothing of the link.
        record(&mut cluster, &format!("{to}-local"), (to, to), 9000 * MI, Some(0));
        record(&mut cluster, &format!("{to}-small"), ("node1", to), MI, Some(0));
    }
    assert_eq!(bandwidth(&cluster), (100, BandwidthBasis::Pair), "the median");
    configure(&mut cluster, json!({"migrations": {"bandwidthPerMigration": "80Mi"}}));
    assert_eq!(bandwidth(&cluster), (80, BandwidthBasis::Configured));
    configure(&mut cluster, json!({"migrations": {"bandwidthPerMigration": "200Mi"}}));
    assert_eq!(bandwidth(&cluster), (100, BandwidthBasis::Pair));
}

#[test]
fn who_was_held_up_by_a_cap_tells_no_less_of_the_link() {
    const MI: u64 = 1 << 20;
    let mut cluster = cluster();
    mover(&mut cluster, "a", "node1");
    for to in ["node2", "node3"] {
        record(&mut cluster, to, ("node1", to), 60 * MI, Some(64 * MI));
    }
    let plan = plan(&cluster, &["node1"]);
    let a = vm(&plan, "a");
    assert_eq!((a.bytes_per_second, a.bandwidth_basis.clone()), (Some(64 * MI), Some(BandwidthBasis::Configured)));
}

#[test]
fn who_was_held_up_by_a_lower_cap_than_there_is_now_tells_nothing() {
    const MI: u64 = 1 << 20;
    let mut cluster = cluster();
    mover(&mut cluster, "a", "node1");
    for to in ["node2", "node3"] {
        record(&mut cluster, to, ("node1", to), 64 * MI, Some(64 * MI));
    }
    let bandwidth = |cluster: &mut Cluster, cap: &str| {
        configure(cluster, json!({"migrations": {"bandwidthPerMigration": cap}}));
        let plan = plan(cluster, &["node1"]);
        let a = vm(&plan, "a");
        (a.bytes_per_second.unwrap() / MI, a.bandwidth_basis.clone().unwrap())
    };
    // As if nothing had been measured.
    let mut untold = self::cluster();
    mover(&mut untold, "a", "node1");
    for cap in ["1Gi", "0", "100Mi"] {
        assert_eq!(bandwidth(&mut cluster, cap), bandwidth(&mut untold, cap), "{cap}");
    }
    assert_eq!(bandwidth(&mut cluster, "0"), (400, BandwidthBasis::Assumed));
    assert_eq!(bandwidth(&mut cluster, "100Mi"), (100, BandwidthBasis::Configured));
    assert_eq!(bandwidth(&mut cluster, "64Mi"), (64, BandwidthBasis::Configured));
    // A policy's cap holds up some of them; the others tell.
    for to in ["node2", "node3"] {
        for n in 0..30 {
            record(&mut cluster, &format!("policy-{to}-{n}"), ("node1", to), 15 * MI, Some(16 * MI));
        }
        record(&mut cluster, &format!("free-{to}"), ("node1", to), 50 * MI, Some(200 * MI));
    }
    assert_eq!(bandwidth(&mut cluster, "200Mi"), (50, BandwidthBasis::Pair));
    assert_eq!(bandwidth(&mut cluster, "0"), (50, BandwidthBasis::Pair));
    // Else what the node's other links carried counts, or any.
    for n in ["came", "came2"] {
        record(&mut untold, n, ("node9", "node1"), 80 * MI, Some(0));
    }
    for to in ["node2", "node3"] {
        record(&mut untold, to, ("node1", to), 15 * MI, Some(16 * MI));
    }
    assert_eq!(bandwidth(&mut untold, "200Mi"), (80, BandwidthBasis::Node));
}

fn quota(cluster: &mut Cluster, memory: &str, used: &str) {
    cluster.put(
        Kind::ResourceQuota,
        json!({"metadata": {"name": "small", "namespace": "default"}, "spec": {"hard": {"requests.memory": memory}},
            "status": {"hard": {"requests.memory": memory}, "used": {"requests.memory": used}}}),
    );
}

#[test]
fn a_quota_without_room_for_a_target_blocks_and_is_named() {
    let mut cluster = cluster();
    for name in ["a", "b", "c"] {
        mover(&mut cluster, name, "node1");
    }
    // 200 MiB each: they fill it, so no target comes beside them.
    quota(&mut cluster, "700Mi", "600Mi");
    let plan = plan(&cluster, &["node1"]);
    let numbers = "exceeded quota: small, requested: requests.memory=200Mi, used: requests.memory=600Mi, limited: \
                   requests.memory=700Mi; requests.memory=100Mi is missing";
    assert!(said(&plan, "a", numbers), "{plan:#?}");
    // The numbers are those of the first.
    for name in ["b", "c"] {
        assert!(!said(&plan, name, "exceeded quota"), "{plan:#?}");
        assert!(said(&plan, name, "It waits behind default/a, for which ResourceQuota default/small has no room."));
    }
    assert!(["a", "b", "c"].iter().all(|name| outcome(&plan, name) == DrainOutcome::Block), "{plan:#?}");
    assert!(plan.is_blocked());
}

#[test]
fn a_small_one_waits_behind_a_big_one_and_others_behind_neither() {
    let mut cluster = cluster();
    mover(&mut cluster, "big", "node1");
    let small = |n: usize| format!("small{n:03}");
    // More than are looked at because of full targets.
    let all: Vec<String> = (0..300).map(small).collect();
    for name in &all {
        mover(&mut cluster, name, "node1");
        let pod = Name::new("default", crate::names::launcher_pod(name, &format!("uid-{name}")));
        let little = json!([{"name": "compute", "resources": {"requests": {"memory": "1Mi"}}}]);
        cluster.patch(Kind::Pod, &pod, json!({"spec": {"containers": little}}));
    }
    guest(&mut cluster, "zebra", "node1", json!({"evictionStrategy": "LiveMigrate"}));
    for (kind, name) in [
        (Kind::VirtualMachineInstance, "zebra".to_owned()),
        (Kind::Pod, crate::names::launcher_pod("zebra", "uid-zebra")),
    ] {
        let key = Name::new("default", name);
        let mut other = cluster.get(kind, &key).unwrap();
        cluster.remove(kind, &key);
        other["metadata"]["namespace"] = json!("other");
        cluster.put(kind, other);
    }
    quota(&mut cluster, "700Mi", "550Mi");
    let plan = plan(&cluster, &["node1"]);
    assert!(said(&plan, "big", "requests.memory=50Mi is missing"), "{:#?}", vm(&plan, "big"));
    for name in &all {
        assert!(said(&plan, name, "It waits behind default/big,"), "{:#?}", vm(&plan, name));
    }
    assert_eq!(outcome(&plan, "zebra"), DrainOutcome::Migrate, "{:#?}", vm(&plan, "zebra"));
    let bound = plan.bounds.iter().find(|bound| bound.limit == "ResourceQuota").unwrap();
    assert_eq!(bound.vms, Some(301), "{bound:#?}");
}

#[test]
fn what_has_left_gives_its_quota_back() {
    let mut cluster = cluster();
    for name in ["a", "b", "c"] {
        mover(&mut cluster, name, "node1");
    }
    let free = plan(&cluster, &["node1"]);
    let one = vm(&free, "a").duration.as_ref().unwrap().milliseconds.unwrap();
    assert_eq!(free.duration.as_ref().unwrap().milliseconds, Some(2 * one));
    quota(&mut cluster, "800Mi", "600Mi");
    let narrow = plan(&cluster, &["node1"]);
    assert!(!narrow.is_blocked(), "{narrow:#?}");
    let begins: Vec<u64> = narrow.vms.iter().map(|vm| vm.start.as_ref().unwrap().milliseconds.unwrap()).collect();
    assert_eq!(begins, [0, one, 2 * one], "one after the other");
    let worst: Vec<u64> = narrow.vms.iter().map(|vm| vm.start.as_ref().unwrap().max_milliseconds.unwrap()).collect();
    assert!(0 == worst[0] && worst[0] < worst[1] && worst[1] < worst[2], "also at worst: {worst:?}");
    let bound = narrow.bounds.iter().find(|bound| bound.limit == "ResourceQuota").unwrap();
    assert_eq!((bound.quota.as_deref(), bound.vms), (Some("default/small"), Some(2)));
    // A guest that is shut down needs no second place.
    let mut cluster = self::cluster();
    guest(&mut cluster, "again", "node1", json!({}));
    machine(&mut cluster, "again", "Always");
    quota(&mut cluster, "200Mi", "200Mi");
    let same = plan(&cluster, &["node1"]);
    assert!(vm(&same, "again").target_node.is_some(), "{same:#?}");
}
