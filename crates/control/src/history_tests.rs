use serde_json::{Value, json};

use crate::testing::Cluster;
use crate::{Key, Kind, Name, names};

fn cluster() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.put(Kind::Namespace, json!({"metadata": {"name": "default"}}));
    cluster
}

/// A migration that is over, of a VMI that is not there any more.
fn finished(cluster: &mut Cluster, name: &str, uid: &str, status: Value) {
    cluster.put(
        Kind::Migration,
        json!({
            "metadata": {
                "name": name, "namespace": "default", "uid": uid,
                "finalizers": ["kubevirt.io/migrationJobFinalize"],
                "annotations": {"godwit.io/requested-by": "jane"},
            },
            "spec": {"vmiName": "demo"},
            "status": status,
        }),
    );
    cluster.settle();
}

fn record(cluster: &Cluster, name: &str) -> Value {
    cluster.get(Kind::MigrationRecord, &Name::new("default", name)).unwrap_or_default()
}

fn count(cluster: &Cluster) -> usize {
    cluster.world.records.iter().count()
}

#[test]
fn a_migration_leaves_a_record_when_it_goes() {
    let mut cluster = cluster();
    let asked = cluster.now.to_string();
    finished(
        &mut cluster,
        "move",
        "0123456789",
        json!({
            "phase": "Succeeded",
            "reason": "Over",
            "phaseTransitionTimestamps": [{"phase": "Succeeded", "phaseTransitionTimestamp": asked}],
            "migrationState": {
                "sourceNode": "node1", "targetNode": "node2", "mode": "PreCopy", "startTimestamp": "2026-01-02T03:04:05Z",
                "endTimestamp": "2026-01-02T03:04:07Z", "completed": true,
                "progress": {"downtimeMilliseconds": 12, "bytesProcessed": 1024},
                "forecast": {"durationMilliseconds": 1900, "downtimeMilliseconds": 15, "passes": 2},
            },
        }),
    );
    assert!(cluster.world.migrations.names().next().is_none(), "without its VMI it goes");
    let spec = &record(&cluster, "move-01234567")["spec"];
    assert_eq!(
        *spec,
        json!({
            "vmiName": "demo", "migrationName": "move", "migrationUID": "0123456789", "requestedBy": "jane",
            "sourceNode": "node1", "targetNode": "node2", "result": "Succeeded", "mode": "PreCopy",
            "requestedAt": asked, "startedAt": "2026-01-02T03:04:05Z", "endedAt": "2026-01-02T03:04:07Z",
            "downtimeMilliseconds": 12, "totalMilliseconds": 2000, "bytesProcessed": 1024,
            "forecastDowntimeMilliseconds": 15, "forecastTotalMilliseconds": 1900,
            "downtime": "12 ms", "sent": "1 KiB",
        })
    );
}

#[test]
fn a_failure_is_written_down_with_its_cause() {
    let mut cluster = cluster();
    let status = json!({"phase": "Failed", "reason": "Unschedulable", "message": "No node takes it."});
    finished(&mut cluster, "move", "0123456789", status);
    let spec = &record(&cluster, "move-01234567")["spec"];
    assert_eq!((&spec["result"], &spec["reason"]), (&json!("Failed"), &json!("Unschedulable")));
    assert_eq!((&spec["message"], &spec["endedAt"]), (&json!("No node takes it."), &json!(cluster.now.to_string())));
    assert_eq!((&spec["targetNode"], &spec["startedAt"]), (&Value::Null, &Value::Null));
}

#[test]
fn fifty_are_kept_for_two_weeks() {
    let mut cluster = cluster();
    for number in 0..53 {
        cluster.pass(3600);
        finished(&mut cluster, &format!("move{number}"), &format!("{number:08}"), json!({"phase": "Failed"}));
    }
    assert_eq!(count(&cluster), 50);
    assert_eq!(record(&cluster, "move2-00000002"), Value::Null);
    assert_ne!(record(&cluster, "move3-00000003"), Value::Null);
    let key = Key::History(Name::new("default", "demo"));
    let first = cluster.decide(&key).wake_at.unwrap();
    assert_eq!(first.duration_since(cluster.now).as_secs(), (14 * 24 - 49) * 3600);
    cluster.now = first;
    cluster.step(&key);
    assert_eq!((count(&cluster), record(&cluster, "move3-00000003")), (49, Value::Null));
    assert_eq!(cluster.decide(&key).wake_at.unwrap().duration_since(first).as_secs(), 3600);
    cluster.pass(14 * 24 * 3600);
    cluster.settle();
    assert_eq!((count(&cluster), cluster.decide(&key).wake_at), (0, None));
}

#[test]
fn a_namespace_that_goes_is_not_held_up() {
    let mut cluster = cluster();
    cluster.patch(
        Kind::Namespace,
        &Name::cluster("default"),
        json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["kubernetes"]}}),
    );
    finished(&mut cluster, "move", "0123456789", json!({"phase": "Failed"}));
    assert!(cluster.world.migrations.names().next().is_none());
    assert_eq!(count(&cluster), 0);
    assert_eq!(names::record("move", "0123456789"), "move-01234567");
}
