use serde_json::{Value, json};

use crate::migration::tests::{arrive, cluster, hand_over, migrate, name, phase, state, target_pod, tell};
use crate::testing::Cluster;
use crate::{Key, Kind, Name, Ref};

fn class(cluster: &mut Cluster, class: &str, default: bool) {
    let annotations = json!({"storageclass.kubernetes.io/is-default-class": default.to_string()});
    cluster.put(
        Kind::StorageClass,
        json!({"metadata": {"name": class, "annotations": annotations}, "provisioner": "godwit.local/shared"}),
    );
}

fn keep_on(cluster: &mut Cluster, class: &str) {
    cluster.put(
        Kind::KubeVirt,
        json!({
            "metadata": {"namespace": "kubevirt", "name": "kubevirt"},
            "spec": {"configuration": {"vmStateStorageClass": class}},
        }),
    );
}

fn vmi(uid: &str) -> Value {
    json!({
        "metadata": {
            "name": "demo", "namespace": "default", "uid": uid,
            "finalizers": ["kubevirt.io/foregroundDeleteVirtualMachine"],
            "ownerReferences": [{
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": "demo", "uid": "uid-vm", "controller": true,
            }],
        },
        "spec": {"domain": {"memory": {"guest": "128Mi"}, "devices": {"tpm": {"persistent": true}}}},
    })
}

/// The names of the claims that there are.
fn claims(cluster: &Cluster) -> Vec<String> {
    cluster.world.claims.names().map(|name| name.name.to_string()).collect()
}

fn claim(cluster: &Cluster, of: &str) -> Value {
    cluster.get(Kind::PersistentVolumeClaim, &name(of)).unwrap()
}

/// A running guest with its TPM on a claim of this mode.
fn running(mode: &str) -> Cluster {
    let mut cluster = cluster(&[("demo", "node1")]);
    class(&mut cluster, "first", true);
    cluster.put(
        Kind::PersistentVolumeClaim,
        json!({
            "metadata": {"name": "persistent-state-for-demo-old", "namespace": "default", "labels": {"persistent-state-for": "demo"}},
            "spec": {"accessModes": [mode]},
        }),
    );
    cluster.patch(
        Kind::VirtualMachineInstance,
        &name("demo"),
        json!({"spec": {"domain": {"devices": {"tpm": {"persistent": true}}}}}),
    );
    cluster
}

fn held_by(cluster: &Cluster, pod: &Name) -> Value {
    let pod = cluster.get(Kind::Pod, pod).unwrap();
    let volumes = pod["spec"]["volumes"].as_array().unwrap();
    let volume = volumes.iter().find(|volume| volume["name"] == "vm-state").unwrap();
    volume["persistentVolumeClaim"]["claimName"].clone()
}

#[test]
fn the_claim_is_made_before_the_pod_and_stays_for_the_next_life() {
    let mut cluster = cluster(&[]);
    cluster.put(Kind::VirtualMachineInstance, vmi("uid-1"));
    cluster.settle();
    assert!(claims(&cluster).is_empty() && cluster.has_event("FailedBackendStorageCreate", "no default storage class"));
    assert_eq!(cluster.world.pods_of_vmi("uid-1").count(), 0);
    class(&mut cluster, "other", false);
    class(&mut cluster, "first", true);
    cluster.settle();
    let [of] = claims(&cluster).try_into().unwrap();
    let made = claim(&cluster, &of);
    assert_eq!(made["spec"]["storageClassName"], "first");
    assert_eq!(made["spec"]["accessModes"], json!(["ReadWriteOnce"]));
    assert_eq!(made["metadata"]["ownerReferences"][0]["kind"], "VirtualMachine");
    assert_eq!(made["metadata"]["labels"], json!({"persistent-state-for": "demo"}));
    let pod = cluster.world.pods_of_vmi("uid-1").next().map(|pod| crate::Stored::key(pod.as_ref())).unwrap();
    assert_eq!(held_by(&cluster, &pod), of);
    let shown = cluster.get(Kind::VirtualMachineInstance, &name("demo")).unwrap()["status"]["volumeStatus"][0].clone();
    assert_eq!(shown["name"], "persistent-state-for-this-vm");
    assert_eq!(shown["persistentVolumeClaimInfo"]["claimName"], of);

    cluster.delete(&Ref::new(Kind::VirtualMachineInstance, name("demo")));
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    cluster.put(Kind::VirtualMachineInstance, vmi("uid-2"));
    cluster.settle();
    assert_eq!(claims(&cluster), [of]);
}

#[test]
fn a_class_that_is_named_is_one_that_nodes_share_unless_it_is_known_to_be_of_one_node() {
    for (provisioner, mode) in [("example.com/any", "ReadWriteMany"), ("godwit.local/local", "ReadWriteOnce")] {
        let mut cluster = cluster(&[]);
        cluster.put(Kind::StorageClass, json!({"metadata": {"name": "state"}, "provisioner": provisioner}));
        keep_on(&mut cluster, "state");
        cluster.put(Kind::VirtualMachineInstance, vmi("uid-1"));
        cluster.settle();
        let [of] = claims(&cluster).try_into().unwrap();
        assert_eq!(claim(&cluster, &of)["spec"]["accessModes"], json!([mode]));
    }
}

#[test]
fn a_shared_claim_goes_with_the_guest() {
    let mut cluster = running("ReadWriteMany");
    hand_over(&mut cluster, "job", "demo");
    assert_eq!(held_by(&cluster, &target_pod(&cluster, "job").unwrap()), "persistent-state-for-demo-old");
    let told = state(&cluster, "demo");
    assert_eq!(told["sourcePersistentStatePVCName"], told["targetPersistentStatePVCName"]);
    assert_eq!(told["targetState"]["persistentStatePVCName"], "persistent-state-for-demo-old");
    let now = cluster.now.to_string();
    tell(&mut cluster, "demo", json!({"targetNodeAddress": "10.88.0.12", "startTimestamp": now}));
    cluster.settle();
    arrive(&mut cluster, "demo");
    assert_eq!(phase(&cluster, "job"), "Succeeded");
    assert_eq!(claims(&cluster), ["persistent-state-for-demo-old"]);
}

#[test]
fn any_other_claim_is_replaced_by_the_targets_when_the_guest_is_there() {
    let mut cluster = running("ReadWriteOnce");
    hand_over(&mut cluster, "job", "demo");
    let target = held_by(&cluster, &target_pod(&cluster, "job").unwrap());
    assert_ne!(target, "persistent-state-for-demo-old");
    let told = state(&cluster, "demo");
    assert_eq!(told["sourcePersistentStatePVCName"], "persistent-state-for-demo-old");
    assert_eq!(told["targetPersistentStatePVCName"], target);
    let now = cluster.now.to_string();
    tell(&mut cluster, "demo", json!({"targetNodeAddress": "10.88.0.12", "startTimestamp": now}));
    cluster.settle();
    assert_eq!(claims(&cluster).len(), 2);
    arrive(&mut cluster, "demo");
    assert_eq!(phase(&cluster, "job"), "Succeeded");
    assert_eq!(claims(&cluster), [target.as_str().unwrap()]);
    let kept = claim(&cluster, target.as_str().unwrap());
    assert_eq!(kept["metadata"]["labels"], json!({"persistent-state-for": "demo"}));
}

#[test]
fn a_migration_that_fails_takes_its_claim_away_and_leaves_the_guests() {
    let mut cluster = running("ReadWriteOnce");
    migrate(&mut cluster, "job", "demo");
    cluster.settle();
    assert_eq!(claims(&cluster).len(), 2);
    cluster.delete(&Ref::new(Kind::Migration, name("job")));
    cluster.settle();
    assert_eq!(claims(&cluster), ["persistent-state-for-demo-old"]);

    cluster.run_kubelets();
    hand_over(&mut cluster, "again", "demo");
    let end = cluster.now.to_string();
    tell(&mut cluster, "demo", json!({"failed": true, "completed": true, "endTimestamp": end, "failureReason": "x"}));
    cluster.settle();
    assert_eq!(phase(&cluster, "again"), "Failed");
    assert_eq!(claims(&cluster), ["persistent-state-for-demo-old"]);
}

#[test]
fn a_guest_that_came_and_was_lost_left_its_state_where_it_was_last() {
    let mut cluster = running("ReadWriteOnce");
    hand_over(&mut cluster, "job", "demo");
    let target = held_by(&cluster, &target_pod(&cluster, "job").unwrap());
    let now = cluster.now.to_string();
    let facts =
        json!({"targetNodeAddress": "10.88.0.12", "startTimestamp": now, "targetNodeDomainReadyTimestamp": now});
    tell(&mut cluster, "demo", facts);
    cluster.settle();
    let node = state(&cluster, "demo")["targetNode"].clone();
    let end = json!({"status": {
        "nodeName": node, "phase": "Failed", "migrationState": {"failed": true, "completed": true, "endTimestamp": now},
    }});
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), end);
    // The next life does not begin before that is settled.
    let mut next = vmi("uid-2");
    next["metadata"]["name"] = json!("demo");
    cluster.step(&Key::Vmi(name("demo")));
    cluster.settle();
    assert_eq!(phase(&cluster, "job"), "Failed");
    assert_eq!(claims(&cluster), [target.as_str().unwrap()]);
    cluster.remove(Kind::VirtualMachineInstance, &name("demo"));
    cluster.run_kubelets();
    cluster.put(Kind::VirtualMachineInstance, next);
    cluster.settle();
    let pod = cluster.world.pods_of_vmi("uid-2").next().map(|pod| crate::Stored::key(pod.as_ref())).unwrap();
    assert_eq!(held_by(&cluster, &pod), target);
}
