//! Installations elsewhere than in the usual namespace: what is their own counts, and what has its name in the usual one does not.

use godwit_api::Installation;
use godwit_api::vmi::EvictionStrategy;
use serde_json::{Value, json};

use crate::migration::tests::{furnish, migrate};
use crate::testing::Cluster;
use crate::{Key, Kind, Name, evacuation, fence, kubevirt, persistent_state, turns, workloads};

const OWN: &str = "vms-9";
const USUAL: &str = "kubevirt";

fn elsewhere() -> Cluster {
    Cluster::of(Installation::new(OWN))
}

fn put(cluster: &mut Cluster, namespace: &str, spec: Value) {
    cluster.put(Kind::KubeVirt, json!({"metadata": {"namespace": namespace, "name": "kubevirt"}, "spec": spec}));
}

fn condition(cluster: &Cluster, namespace: &str) -> Value {
    let kubevirt = cluster.get(Kind::KubeVirt, &Name::new(namespace, "kubevirt")).unwrap();
    let conditions = kubevirt["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.into_iter().find(|one| one["type"] == "ConfigurationApplied").unwrap_or_default()
}

#[test]
fn its_kubevirt_object_counts_and_that_of_the_usual_namespace_says_that_it_does_not() {
    let told = |namespace: &str| {
        let mut cluster = elsewhere();
        put(
            &mut cluster,
            namespace,
            json!({
                "configuration": {
                    "migrations": {"parallelMigrationsPerCluster": 1}, "evictionStrategy": "LiveMigrate",
                    "vmStateStorageClass": "state",
                },
                "workloadUpdateStrategy": {"workloadUpdateMethods": ["LiveMigrate"]},
            }),
        );
        cluster.put(Kind::StorageClass, json!({"metadata": {"name": "state"}, "provisioner": "any"}));
        let mut cluster = furnish(cluster, &[("a", "node1"), ("b", "node2")]);
        migrate(&mut cluster, "job-a", "a");
        migrate(&mut cluster, "job-b", "b");
        cluster.settle();
        let vmi = cluster.world.vmis.iter().next().unwrap();
        let strategy = evacuation::strategy(vmi, &cluster.world) == EvictionStrategy::LiveMigrate;
        let shareable = workloads::wants_shareable_memory(vmi, &cluster.world);
        let class = persistent_state::kubevirt_class(&cluster.world).is_some();
        let phase = cluster.get(Kind::KubeVirt, &Name::new(namespace, "kubevirt")).unwrap()["status"]["phase"].clone();
        let slots = cluster.world.turns().ledger().slots.len();
        ((slots, strategy, shareable, class), phase, condition(&cluster, namespace))
    };
    let (counts, phase, applied) = told(OWN);
    assert_eq!((counts, phase, &applied["status"]), ((1, true, true, true), json!("Deployed"), &json!("True")));
    let (counts, phase, applied) = told(USUAL);
    assert_eq!((counts, &applied["status"]), ((2, false, false, false), &json!("False")));
    assert_ne!(phase, "Deployed");
    assert_eq!(applied["reason"], "NotTheInstallation");
    assert_eq!(
        applied["message"],
        "Godwit is installed in the namespace vms-9, and reads the KubeVirt object vms-9/kubevirt alone."
    );
}

#[test]
fn its_config_map_counts_and_that_of_the_usual_namespace_does_not() {
    let attempts = |namespace: &str| {
        let mut cluster = elsewhere();
        put(&mut cluster, OWN, json!({}));
        cluster.settle();
        let object = json!({
            "metadata": {"namespace": namespace, "name": "kubevirt-config"},
            "data": {"migrations": "maxAttempts: 7\nprogressTimeout: never"},
        });
        cluster.put(Kind::ConfigMap, object);
        cluster.settle();
        let applied = condition(&cluster, OWN)["status"].clone();
        (kubevirt::migration_configuration(&cluster.world).max_attempts == Some(7), applied)
    };
    assert_eq!(attempts(OWN), (true, json!("False")));
    assert_eq!(attempts(USUAL), (false, json!("True")));
}

#[test]
fn slots_are_written_where_it_is() {
    let mut cluster = furnish(elsewhere(), &[("a", "node1")]);
    let own = turns::reference(cluster.world.installation());
    assert_eq!(own.name.namespace, OWN);
    // A ledger of somebody else says nothing.
    let usual = turns::reference(&Installation::USUAL);
    let slot = json!({"migration": "default/x", "vmi": "x", "source": "node1", "seen": "1"});
    let object = json!({
        "metadata": {"namespace": usual.name.namespace, "name": usual.name.name}, "data": {"uid-x": slot.to_string()},
    });
    cluster.put(Kind::ConfigMap, object);
    migrate(&mut cluster, "job", "a");
    cluster.settle();
    let keys = |name: &Name| -> Vec<String> {
        let map = cluster.get(Kind::ConfigMap, name).unwrap();
        map["data"].as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect()
    };
    assert_eq!((keys(&own.name), keys(&usual.name)), (vec!["uid-job".to_owned()], vec!["uid-x".to_owned()]));
    // One that is missing is made there.
    cluster.remove(Kind::ConfigMap, &own.name);
    assert!(cluster.step(&Key::Turns));
    assert!(cluster.get(Kind::ConfigMap, &own.name).is_some());
}

#[test]
fn nodes_promise_in_leases_of_its_namespace() {
    let mut cluster = elsewhere();
    cluster.add_node("node1");
    let mut renew = |namespace: &str| {
        let renewed = cluster.now;
        cluster.put(
            Kind::Lease,
            json!({
                "metadata": {"namespace": namespace, "name": "virt-handler-node1"},
                "spec": {"leaseDurationSeconds": 20, "renewTime": format!("{renewed:.6}")},
            }),
        );
        (fence::lease_of("node1", &cluster.world).is_some(), cluster.world.fence_heard("node1").is_some())
    };
    assert_eq!(renew(USUAL), (false, false));
    assert_eq!(renew(OWN), (true, true));
    let mut silent = elsewhere();
    silent.add_node("node1");
    assert!(fence::waits_for("node1", "pod", &silent.world).contains("no Lease vms-9/virt-handler-node1"));
}
