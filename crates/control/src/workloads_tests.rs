use serde_json::{Value, json};

use crate::testing::Cluster;
use crate::{Kind, Name, names};

fn name(name: &str) -> Name {
    Name::new("default", name)
}

fn installed() -> Name {
    Name::new("kubevirt", "kubevirt")
}

/// Two nodes, and guests on the first in launchers of this version.
fn cluster(strategy: Value, guests: &[&str]) -> Cluster {
    let mut cluster = Cluster::new();
    for node in ["node1", "node2"] {
        cluster.add_node(node);
    }
    cluster.put(
        Kind::KubeVirt,
        json!({"metadata": {"name": "kubevirt", "namespace": "kubevirt"}, "spec": {"workloadUpdateStrategy": strategy}}),
    );
    for guest in guests {
        let uid = format!("uid-{guest}");
        cluster.put(
            Kind::VirtualMachineInstance,
            json!({
                "metadata": {"name": guest, "namespace": "default", "uid": uid},
                "spec": {"domain": {"memory": {"guest": "128Mi"}, "devices": {}}},
                "status": {
                    "phase": "Running", "nodeName": "node1", "runtimeUser": 0,
                    "conditions": [{"type": "LiveMigratable", "status": "True"}],
                },
            }),
        );
        let settings = cluster.settings.clone();
        cluster.put(
            Kind::Pod,
            json!({
                "metadata": {
                    "name": names::launcher_pod(guest, &uid), "namespace": "default",
                    "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": uid},
                    "annotations": {"kubevirt.io/domain": guest, "godwit.io/launcher-version": settings.version},
                },
                "spec": {"nodeName": "node1", "containers": [{"name": "compute", "image": settings.launcher_image}]},
            }),
        );
    }
    cluster.run_kubelets();
    cluster.settle();
    cluster
}

fn age(cluster: &mut Cluster, guest: &str) {
    let pod = name(&names::launcher_pod(guest, &format!("uid-{guest}")));
    cluster.patch(Kind::Pod, &pod, json!({"metadata": {"annotations": {"godwit.io/launcher-version": "older"}}}));
    cluster.settle();
}

fn outdated(cluster: &Cluster, guest: &str) -> bool {
    let vmi = cluster.get(Kind::VirtualMachineInstance, &name(guest)).unwrap();
    vmi["metadata"]["labels"].get("kubevirt.io/outdatedLauncherImage").is_some()
}

fn counted(cluster: &Cluster) -> Value {
    cluster.get(Kind::KubeVirt, &installed()).unwrap()["status"]["outdatedVirtualMachineInstanceWorkloads"].clone()
}

fn updates(cluster: &Cluster) -> Vec<Value> {
    cluster.world.migrations.iter().map(|one| serde_json::to_value(one.as_ref()).unwrap()).collect()
}

#[test]
fn launchers_of_another_version_are_outdated_and_without_a_strategy_nothing_is_done() {
    let mut cluster = cluster(json!({}), &["demo", "other"]);
    assert!(!outdated(&cluster, "demo"));
    assert_eq!(counted(&cluster), 0);
    age(&mut cluster, "demo");
    assert!(outdated(&cluster, "demo") && !outdated(&cluster, "other"));
    assert_eq!(counted(&cluster), 1);
    cluster.pass(3600);
    cluster.settle();
    assert_eq!(updates(&cluster), Vec::<Value>::new());
    let pod = name(&names::launcher_pod("demo", "uid-demo"));
    let version = cluster.settings.version.clone();
    cluster.patch(Kind::Pod, &pod, json!({"metadata": {"annotations": {"godwit.io/launcher-version": version}}}));
    cluster.settle();
    assert!(!outdated(&cluster, "demo"));
    assert_eq!(counted(&cluster), 0);
}

#[test]
fn outdated_guests_are_moved_and_their_target_prefers_their_node() {
    let mut cluster = cluster(json!({"workloadUpdateMethods": ["LiveMigrate"]}), &["demo"]);
    age(&mut cluster, "demo");
    let [update] = &updates(&cluster)[..] else { panic!("{:?}", updates(&cluster)) };
    let made = update["metadata"]["name"].as_str().unwrap();
    assert!(made.starts_with("kubevirt-workload-update-"), "{made}");
    assert_eq!(update["metadata"]["annotations"]["kubevirt.io/workloadUpdateMigration"], "");
    assert_eq!(update["spec"], json!({"vmiName": "demo", "priority": "system-critical"}));
    let said = format!("Created Migration {made} for automated workload update");
    assert!(cluster.has_event("SuccessfulCreate", &said));
    let uid = update["metadata"]["uid"].as_str().unwrap();
    let target = cluster.world.pods_of_migration(uid).next().expect("a target pod").clone();
    assert_eq!(target.spec.as_ref().unwrap().node_name.as_deref(), Some("node1"), "where its memory is");
    let annotations = target.metadata.annotations.clone().unwrap();
    assert_eq!(annotations["godwit.io/guest-memory"], "shareable");
    assert!(!target.metadata.labels.clone().unwrap().contains_key("kubevirt.io/outdatedLauncherImage"));
    cluster.pass(60);
    cluster.settle();
    assert_eq!(updates(&cluster).len(), 1, "one at a time");
}

#[test]
fn a_failed_update_waits_and_no_more_than_the_limit_are_under_way() {
    let guests = ["a", "b", "c", "d", "e", "f"];
    let mut cluster = cluster(json!({"workloadUpdateMethods": ["LiveMigrate"]}), &guests);
    for guest in guests {
        age(&mut cluster, guest);
    }
    assert_eq!(counted(&cluster), 6);
    assert_eq!(updates(&cluster).len(), 5, "parallelMigrationsPerCluster");
    let first = updates(&cluster)[0].clone();
    let stamps = json!([{"phase": "Failed", "phaseTransitionTimestamp": cluster.now.to_string()}]);
    let failed = json!({"status": {"phase": "Failed", "phaseTransitionTimestamps": stamps}});
    cluster.patch(Kind::Migration, &name(first["metadata"]["name"].as_str().unwrap()), failed);
    cluster.settle();
    let of = |cluster: &Cluster, guest: &Value| {
        updates(cluster).iter().filter(|one| one["spec"]["vmiName"] == *guest).count()
    };
    assert_eq!(updates(&cluster).len(), 6, "another one's turn");
    assert_eq!(of(&cluster, &first["spec"]["vmiName"]), 1, "it has a pause");
}

#[test]
fn what_cannot_be_moved_is_evicted_in_batches() {
    let strategy = json!({
        "workloadUpdateMethods": ["Evict"], "batchEvictionSize": 1, "batchEvictionInterval": "30s",
    });
    let mut cluster = cluster(strategy, &["a", "b"]);
    age(&mut cluster, "a");
    age(&mut cluster, "b");
    let evicted = |cluster: &Cluster| {
        let gone = |guest: &&str| {
            let pod = cluster.get(Kind::Pod, &name(&names::launcher_pod(guest, &format!("uid-{guest}"))));
            pod.is_none_or(|pod| pod["metadata"].get("deletionTimestamp").is_some())
        };
        ["a", "b"].iter().filter(|guest| gone(guest)).count()
    };
    assert_eq!(evicted(&cluster), 1);
    cluster.pass(29);
    cluster.settle();
    assert_eq!(evicted(&cluster), 1);
    cluster.pass(1);
    cluster.settle();
    assert_eq!(evicted(&cluster), 2);
    assert_eq!(updates(&cluster), Vec::<Value>::new());
}

#[test]
fn a_time_without_end_is_waited_for() {
    let interval = format!("{}s", i64::MAX);
    let strategy =
        json!({"workloadUpdateMethods": ["Evict"], "batchEvictionSize": 1, "batchEvictionInterval": interval});
    let mut cluster = cluster(strategy, &["a", "b"]);
    age(&mut cluster, "a");
    age(&mut cluster, "b");
    cluster.pass(3600);
    cluster.settle();
    let going = cluster.world.pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_some()).count();
    assert_eq!(going, 1);
}
