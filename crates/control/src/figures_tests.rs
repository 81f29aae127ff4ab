use serde_json::{Value, json};

use super::*;
use crate::Kind;
use crate::names;
use crate::testing::Cluster;

fn figures(cluster: &Cluster) -> Figures {
    let mut census = Census::begin(Noun::CLUSTER, &cluster.world);
    // However little is looked at in one go.
    loop {
        if let Some(figures) = census.go_on(1, &cluster.world) {
            return figures;
        }
    }
}

fn put_vmi(cluster: &mut Cluster, name: &str, spec: Value, status: Value) {
    let mut vmi = json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
        "spec": {"evictionStrategy": "LiveMigrate", "domain": {"memory": {"guest": "128Mi"}, "devices": {}}},
        "status": {
            "phase": "Running", "nodeName": "node1", "runtimeUser": 0,
            "conditions": [{"type": "LiveMigratable", "status": "True"}],
        },
    });
    for (part, more) in [("spec", spec), ("status", status)] {
        vmi[part].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    }
    let running = vmi["status"]["phase"] == "Running";
    cluster.put(Kind::VirtualMachineInstance, vmi);
    if running {
        cluster.put(
            Kind::Pod,
            json!({
                "metadata": {
                    "name": names::launcher_pod(name, &format!("uid-{name}")), "namespace": "default",
                    "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": format!("uid-{name}")},
                    "annotations": {"kubevirt.io/domain": name},
                },
                "spec": {"nodeName": "node1", "containers": [{"name": "compute"}]},
            }),
        );
        cluster.run_kubelets();
    }
}

fn put_migration(cluster: &mut Cluster, name: &str, vmi: &str, phase: &str, second: i64, status: Value) {
    let at = jiff::Timestamp::from_second(second).unwrap().to_string();
    let mut migration = json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
        "spec": {"vmiName": vmi},
        "status": {
            "phase": phase,
            "phaseTransitionTimestamps": [
                {"phase": "Pending", "phaseTransitionTimestamp": "1970-01-01T00:00:01Z"},
                {"phase": phase, "phaseTransitionTimestamp": at},
            ],
        },
    });
    migration["status"].as_object_mut().unwrap().extend(status.as_object().unwrap().clone());
    cluster.put(Kind::Migration, migration);
}

fn two_nodes() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.add_node("node1");
    cluster.add_node("node2");
    cluster
}

#[test]
fn instances_are_counted_and_those_named_that_hold_up_a_drain() {
    let mut cluster = two_nodes();
    let stuck =
        json!({"conditions": [{"type": "LiveMigratable", "status": "False", "message": "it has a disk of its own"}]});
    put_vmi(&mut cluster, "free", json!({}), json!({}));
    put_vmi(&mut cluster, "stuck", json!({}), stuck.clone());
    put_vmi(&mut cluster, "unknown", json!({}), json!({"conditions": []}));
    put_vmi(&mut cluster, "ends", json!({"evictionStrategy": "None"}), stuck.clone());
    put_vmi(&mut cluster, "tries", json!({"evictionStrategy": "LiveMigrateIfPossible"}), stuck.clone());
    put_vmi(&mut cluster, "over", json!({}), json!({"phase": "Succeeded", "conditions": []}));
    put_vmi(&mut cluster, "new", json!({}), json!({"phase": "Pending", "nodeName": null, "conditions": []}));
    let told = figures(&cluster);
    let phase = |node, phase| told.value(metrics::VMI_PHASES, [node, phase]);
    assert_eq!((phase("node1", "running"), phase("node1", "succeeded")), (Some(5.0), Some(1.0)));
    assert_eq!((phase("", "pending"), phase("node2", "running")), (Some(1.0), None));
    let stuck = |name| told.value(metrics::VMI_NON_EVICTABLE, ["node1", "default", name]);
    assert_eq!((stuck("stuck"), stuck("unknown"), told.count(metrics::VMI_NON_EVICTABLE)), (Some(1.0), Some(1.0), 2));
    assert_eq!(told.value(metrics::VMIS_OUTDATED, []), Some(0.0));
}

#[test]
fn migrations_are_counted_by_phase_and_by_what_they_wait_for() {
    let mut cluster = two_nodes();
    for (number, phase) in
        ["", "Pending", "Scheduling", "Scheduled", "PreparingTarget", "TargetReady", "Running"].into_iter().enumerate()
    {
        let status = match phase {
            "Pending" => json!({"queue": {"position": 1, "limit": "parallelMigrationsPerCluster"}}),
            _ => json!({}),
        };
        put_migration(&mut cluster, &format!("m{number}"), &format!("vm{number}"), phase, 5, status);
    }
    let told = figures(&cluster);
    let [unset, pending, scheduling, running] = [
        metrics::MIGRATIONS_UNSET,
        metrics::MIGRATIONS_PENDING,
        metrics::MIGRATIONS_SCHEDULING,
        metrics::MIGRATIONS_RUNNING,
    ]
    .map(|metric| told.value(metric, []));
    assert_eq!((unset, pending, scheduling, running), (Some(1.0), Some(1.0), Some(1.0), Some(4.0)));
    assert_eq!(told.value(metrics::MIGRATIONS_WAITING, ["parallelMigrationsPerCluster"]), Some(1.0));
    let none = figures(&Cluster::new());
    assert_eq!(none.value(metrics::MIGRATIONS_RUNNING, []), Some(0.0), "none is said, too");
}

#[test]
fn failures_count_since_the_last_success_and_without_what_was_cancelled() {
    let mut cluster = two_nodes();
    let why = |reason: &str| json!({"reason": reason});
    put_migration(&mut cluster, "a1", "a", "Failed", 10, why("OutOfTime"));
    put_migration(&mut cluster, "a2", "a", "Succeeded", 20, json!({}));
    put_migration(&mut cluster, "a3", "a", "Failed", 30, why("LinkLost"));
    put_migration(&mut cluster, "a4", "a", "Failed", 40, why("Cancelled"));
    put_migration(&mut cluster, "a5", "a", "Failed", 50, why("OutOfTime"));
    put_migration(&mut cluster, "b1", "b", "Failed", 10, why("OutOfTime"));
    put_migration(&mut cluster, "b2", "b", "Succeeded", 11, json!({}));
    let told = figures(&cluster);
    let in_a_row = |vmi| told.value(metrics::MIGRATION_FAILURES, ["default", vmi]);
    assert_eq!((in_a_row("a"), in_a_row("b")), (Some(2.0), None));
    assert_eq!(told.value(metrics::MIGRATION_FAILED, ["a", "a3", "default"]), Some(1.0));
    assert_eq!(told.value(metrics::MIGRATION_SUCCEEDED, ["b", "b2", "default"]), Some(1.0));
    assert_eq!((told.count(metrics::MIGRATION_FAILED), told.count(metrics::MIGRATION_SUCCEEDED)), (5, 2));
    assert_eq!(told.value(metrics::MIGRATIONS_PENDING, []), Some(0.0));
}

#[test]
fn a_migration_tells_how_far_it_is_and_when_it_is_over_what_it_took() {
    let mut cluster = two_nodes();
    let state = json!({
        "migrationUid": "uid-move", "sourceNode": "node1", "targetNode": "node2", "startTimestamp": "1970-01-01T00:01:40Z",
        "forecast": {"durationMilliseconds": 2500, "downtimeMilliseconds": 50},
        "progress": {
            "bytesTotal": 1000, "bytesProcessed": 600, "bytesRemaining": 400, "bytesPerSecond": 200, "dirtyBytesPerSecond": 20,
            "expectedEndTimestamp": "1970-01-01T00:02:00Z", "converges": true,
        },
    });
    put_vmi(&mut cluster, "mover", json!({}), json!({"migrationState": state}));
    put_migration(&mut cluster, "move", "mover", "Running", 100, json!({}));
    let told = figures(&cluster);
    let labels = ["node1", "default", "mover"];
    for (metric, value) in [
        (metrics::MIGRATION_DATA_TOTAL, 1000.0),
        (metrics::MIGRATION_DATA_PROCESSED, 600.0),
        (metrics::MIGRATION_DATA_REMAINING, 400.0),
        (metrics::MIGRATION_RATE, 200.0),
        (metrics::MIGRATION_DIRTY_RATE, 20.0),
        (metrics::MIGRATION_EXPECTED_END, 120.0),
        (metrics::MIGRATION_CONVERGES, 1.0),
        (metrics::FORECAST_DURATION, 2.5),
        (metrics::FORECAST_DOWNTIME, 0.05),
    ] {
        assert_eq!(told.value(metric, labels), Some(value), "{}", metric.name);
    }
    assert_eq!(told.value(metrics::MIGRATION_START, ["node1", "default", "mover", "move"]), Some(100.0));
    assert_eq!((told.count(metrics::MIGRATION_END), told.count(metrics::MIGRATION_DOWNTIME)), (0, 0));

    let over = json!({"status": {"nodeName": "node2", "migrationState": {
        "endTimestamp": "1970-01-01T00:01:43Z", "completed": true,
        "progress": {"totalMilliseconds": 3000, "downtimeMilliseconds": 73},
    }}});
    cluster.patch(Kind::VirtualMachineInstance, &Name::new("default", "mover"), over);
    let told = figures(&cluster);
    let labels = ["node2", "default", "mover"];
    assert_eq!(told.value(metrics::MIGRATION_END, ["node2", "default", "mover", "move", "succeeded"]), Some(103.0));
    assert_eq!(told.value(metrics::MIGRATION_DURATION, labels), Some(3.0));
    assert_eq!(told.value(metrics::MIGRATION_DOWNTIME, labels), Some(0.073));
    assert_eq!(told.value(metrics::FORECAST_DURATION, labels), Some(2.5));
    assert_eq!((told.count(metrics::MIGRATION_DATA_TOTAL), told.count(metrics::MIGRATION_RATE)), (0, 0));
}

#[test]
fn who_is_to_leave_is_told_with_what_it_does() {
    let mut cluster = two_nodes();
    let stuck =
        json!({"conditions": [{"type": "LiveMigratable", "status": "False", "message": "it has a disk of its own"}]});
    put_vmi(&mut cluster, "goes", json!({}), json!({}));
    put_vmi(&mut cluster, "stuck", json!({}), stuck);
    put_vmi(&mut cluster, "others", json!({"evictionStrategy": "External"}), json!({}));
    for vmi in ["goes", "stuck", "others"] {
        let mark = json!({"status": {"evacuationNodeName": "node1"}});
        cluster.patch(Kind::VirtualMachineInstance, &Name::new("default", vmi), mark);
    }
    cluster.settle();
    let told = figures(&cluster);
    let count = |state| told.value(metrics::EVACUATIONS, ["node1", state]);
    assert_eq!((count("blocked"), count("external")), (Some(1.0), Some(1.0)));
    assert_eq!(count("migrating").unwrap_or(0.0) + count("waiting").unwrap_or(0.0), 1.0);
    let blocked = ["node1", "default", "stuck", "NotLiveMigratable"];
    assert_eq!(told.value(metrics::EVACUATION_BLOCKED, blocked), Some(1.0));
    let since = cluster.now.as_second() as f64;
    assert_eq!(told.value(metrics::EVACUATION_START, ["node1", "default", "goes"]), Some(since));
    assert_eq!(told.count(metrics::EVACUATION_FAILED), 0);
    let failed = json!({"status": {"evacuation": {"failedAttempts": 3}}});
    cluster.patch(Kind::VirtualMachineInstance, &Name::new("default", "goes"), failed);
    let told = figures(&cluster);
    assert_eq!(told.value(metrics::EVACUATION_FAILED, ["node1", "default", "goes"]), Some(3.0));
}

#[test]
fn maintenances_and_nodes_tell_how_they_stand() {
    let mut cluster = two_nodes();
    let lease = |node: &str, lost: bool| {
        let mut lease = json!({
            "metadata": {"namespace": "kubevirt", "name": format!("virt-handler-{node}"), "annotations": {}},
            "spec": {"holderIdentity": node, "leaseDurationSeconds": 20, "renewTime": "1970-01-01T00:00:10.000000Z"},
        });
        if lost {
            lease["metadata"]["annotations"]["godwit.io/node-lost"] = json!("1970-01-01T00:00:10.000000Z");
        }
        lease
    };
    cluster.put(Kind::Lease, lease("node1", false));
    put_vmi(&mut cluster, "goes", json!({}), json!({}));
    cluster.put(
        Kind::NodeMaintenance,
        json!({"metadata": {"name": "m"}, "spec": {"nodeName": "node1", "deadline": "1h"}}),
    );
    cluster.settle();
    let told = figures(&cluster);
    assert_eq!(told.value(metrics::MAINTENANCE, ["m", "node1", "Running"]), Some(1.0));
    assert_eq!(told.value(metrics::MAINTENANCE_DRAINED, ["m", "node1"]), Some(0.0));
    assert!(told.value(metrics::MAINTENANCE_PODS, ["m", "node1"]) >= Some(1.0));
    let end = cluster.now.as_second() as f64 + 3600.0;
    assert_eq!(told.value(metrics::MAINTENANCE_DEADLINE, ["m", "node1"]), Some(end));
    let states = ["Migrating", "Waiting", "ShuttingDown", "Blocked"];
    let vmis = states.map(|state| told.value(metrics::MAINTENANCE_VMIS, ["m", "node1", state]).unwrap());
    assert_eq!(vmis.iter().sum::<f64>(), 1.0, "{vmis:?}");
    let of =
        |told: &Figures, node| (told.value(metrics::HANDLER_HEARD, [node]), told.value(metrics::NODE_FENCED, [node]));
    assert_eq!(of(&told, "node1"), (Some(1.0), Some(0.0)));
    assert_eq!(of(&told, "node2"), (None, None), "it never had a handler");
    let closed = |node| told.value(metrics::NODE_CLOSED, [node]);
    assert_eq!((closed("node1"), closed("node2")), (Some(1.0), Some(0.0)));

    cluster.put(Kind::Lease, lease("node1", true));
    assert_eq!(of(&figures(&cluster), "node1"), (Some(0.0), Some(1.0)));
    let only = Census::begin(&[Noun::Maintenance], &cluster.world).go_on(1, &cluster.world).unwrap();
    assert!(only.count(metrics::MAINTENANCE) == 1 && only.count(metrics::VMI_PHASES) == 0);
    let foreign = only.families().filter(|(metric, _)| metric.name.starts_with("kubevirt_")).count();
    assert_eq!(foreign, 0, "another KubeVirt tells of its own");
}

/// 5,000 VMs, each with a finished migration: what is told does not grow with them, but for what is counted.
#[test]
fn a_large_cluster_tells_no_more_than_a_prometheus_can_take() {
    let mut cluster = Cluster::new();
    let state = json!({"migrationUid": "u", "startTimestamp": "1970-01-01T00:01:40Z", "endTimestamp": "1970-01-01T00:01:43Z",
        "completed": true, "progress": {"totalMilliseconds": 3000, "downtimeMilliseconds": 73}});
    for number in 0..5_000 {
        let vmi = json!({
            "metadata": {"name": format!("vm{number}"), "namespace": "default"},
            "spec": {"evictionStrategy": "LiveMigrate", "domain": {"devices": {}}},
            "status": {"phase": "Running", "nodeName": format!("node{}", number % 100), "migrationState": state},
        });
        cluster.put(Kind::VirtualMachineInstance, vmi);
        put_migration(&mut cluster, &format!("m{number}"), &format!("vm{number}"), "Succeeded", 103, json!({}));
    }
    let told = figures(&cluster);
    let series: usize = told.families().map(|(_, series)| series.count()).sum();
    assert!(series < 8 * metrics::MOST_SERIES, "{series}");
    assert_eq!(told.count(metrics::VMI_NON_EVICTABLE), metrics::MOST_SERIES);
    assert_eq!(told.value(metrics::SERIES_LEFT_OUT, [metrics::VMI_NON_EVICTABLE.name]), Some(4_000.0));
    assert_eq!(told.value(metrics::VMI_PHASES, ["node7", "running"]), Some(50.0));
}
