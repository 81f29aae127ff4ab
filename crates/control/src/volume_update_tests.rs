use serde_json::{Value, json};

use crate::testing::Cluster;
use crate::{Key, Kind, Name, Ref, names};

fn name(name: &str) -> Name {
    Name::new("default", name)
}

fn spec(claim: &str) -> Value {
    json!({
        "domain": {"memory": {"guest": "128Mi"}, "devices": {"disks": [{"name": "data", "disk": {"bus": "virtio"}}]}},
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}],
    })
}

fn claim(name: &str, mode: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"accessModes": [mode], "resources": {"requests": {"storage": "1Gi"}}, "volumeName": name},
        "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}},
    })
}

/// A VM whose guest runs on node1, on the claim `old`, which is not shared.
fn cluster() -> Cluster {
    let mut cluster = Cluster::new();
    for node in ["node1", "node2"] {
        cluster.add_node(node);
    }
    for (name, mode) in [("old", "ReadWriteOnce"), ("new", "ReadWriteMany"), ("other", "ReadWriteMany")] {
        cluster.put(Kind::PersistentVolumeClaim, claim(name, mode));
    }
    cluster.put(
        Kind::VirtualMachine,
        json!({
            "metadata": {"name": "demo", "namespace": "default", "uid": "uid-vm", "finalizers": [names::FINALIZER_VM]},
            "spec": {
                "runStrategy": "Always", "updateVolumesStrategy": "Migration",
                "template": {"metadata": {}, "spec": spec("old")},
            },
        }),
    );
    let owner = json!([{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": "demo", "uid": "uid-vm"}]);
    cluster.put(
        Kind::VirtualMachineInstance,
        json!({
            "metadata": {
                "name": "demo", "namespace": "default", "uid": "uid-demo", "ownerReferences": owner,
                "finalizers": [names::FINALIZER_VMI],
            },
            "spec": spec("old"),
            "status": {
                "phase": "Running", "nodeName": "node1", "runtimeUser": 0,
                "conditions": [{
                    "type": "LiveMigratable", "status": "False", "reason": "DisksNotLiveMigratable",
                    "message": "cannot migrate VMI: PVC old is not shared",
                }],
            },
        }),
    );
    cluster.put(
        Kind::Pod,
        json!({
            "metadata": {
                "name": names::launcher_pod("demo", "uid-demo"), "namespace": "default",
                "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": "uid-demo"},
                "annotations": {"kubevirt.io/domain": "demo"},
            },
            "spec": {"nodeName": "node1", "containers": [{"name": "compute"}]},
        }),
    );
    cluster.run_kubelets();
    cluster.settle();
    cluster
}

fn want(cluster: &mut Cluster, claim: &str) {
    let volumes = spec(claim)["volumes"].clone();
    let patch = json!({"spec": {"template": {"spec": {"volumes": volumes}}}});
    cluster.patch(Kind::VirtualMachine, &name("demo"), patch);
    cluster.settle();
}

fn vmi(cluster: &Cluster) -> Value {
    cluster.get(Kind::VirtualMachineInstance, &name("demo")).unwrap()
}

fn vm(cluster: &Cluster) -> Value {
    cluster.get(Kind::VirtualMachine, &name("demo")).unwrap()
}

fn volume_of(vmi: &Value) -> &Value {
    &vmi["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
}

/// What a handler and a kubelet do to a VMI that is deleted: its guest ends, its pods go.
fn end_guest(cluster: &mut Cluster) {
    cluster.delete(&Ref::new(Kind::VirtualMachineInstance, name("demo")));
    for _ in 0..3 {
        cluster.settle();
        cluster.run_kubelets();
    }
}

fn condition<'a>(object: &'a Value, type_: &str) -> &'a Value {
    let found = object["status"]["conditions"].as_array().and_then(|all| all.iter().find(|one| one["type"] == type_));
    found.unwrap_or(&Value::Null)
}

/// The handler has looked at the claims again.
fn becomes_migratable(cluster: &mut Cluster) {
    let mut conditions = vmi(cluster)["status"]["conditions"].clone();
    for one in conditions.as_array_mut().unwrap() {
        if one["type"] == "LiveMigratable" {
            *one = json!({"type": "LiveMigratable", "status": "True"});
        }
    }
    let patch = json!({"status": {"conditions": conditions}});
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), patch);
    cluster.settle();
}

fn migrations(cluster: &Cluster) -> Vec<Value> {
    let kind = Kind::Migration;
    cluster.world.names_of(kind).iter().map(|name| cluster.get(kind, name).unwrap()).collect()
}

#[test]
fn a_guest_moves_to_the_claim_that_its_vm_names_now() {
    let mut cluster = cluster();
    assert_eq!(vm(&cluster)["status"].get("volumeUpdateState"), None);
    want(&mut cluster, "new");
    let moving = vmi(&cluster);
    assert_eq!(volume_of(&moving), "new");
    let moved = &moving["status"]["migratedVolumes"][0];
    assert_eq!(
        (&moved["volumeName"], &moved["sourcePVCInfo"]["claimName"], &moved["destinationPVCInfo"]["claimName"]),
        (&json!("data"), &json!("old"), &json!("new"))
    );
    assert_eq!(moved["destinationPVCInfo"]["accessModes"], json!(["ReadWriteMany"]));
    let change = condition(&moving, "VolumesChange");
    assert_eq!((&change["status"], &change["message"]), (&json!("True"), &json!("migrate volumes")));
    let state = &vm(&cluster)["status"]["volumeUpdateState"]["volumeMigrationState"]["migratedVolumes"];
    assert_eq!(state, &moving["status"]["migratedVolumes"]);
    assert_eq!(migrations(&cluster), Vec::<Value>::new(), "its handler does not call it migratable yet");

    becomes_migratable(&mut cluster);
    let made = migrations(&cluster);
    assert_eq!(made.len(), 1, "{made:#?}");
    let meta = &made[0]["metadata"];
    assert!(meta["name"].as_str().unwrap().starts_with("kubevirt-workload-update-"), "{meta}");
    assert_eq!(meta["labels"]["kubevirt.io/volume-update-in-progress"], "demo");

    // The target's handler: the guest is there, with its data.
    let arrived = json!({"status": {"nodeName": "node2", "migratedVolumes": null}});
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), arrived);
    let over = json!({"status": {"phase": "Succeeded"}});
    cluster.patch(Kind::Migration, &name(meta["name"].as_str().unwrap()), over);
    cluster.settle();
    let there = vmi(&cluster);
    assert_eq!((volume_of(&there), condition(&there, "VolumesChange")), (&json!("new"), &Value::Null));
    assert_eq!(vm(&cluster)["status"].get("volumeUpdateState"), None);
    assert_eq!(condition(&vm(&cluster), "RestartRequired"), &Value::Null);
}

#[test]
fn a_migration_that_fails_is_tried_again_after_a_pause_and_one_that_has_arrived_is_waited_for() {
    let mut cluster = cluster();
    want(&mut cluster, "new");
    becomes_migratable(&mut cluster);
    let fail = |cluster: &mut Cluster, at: usize| {
        let name = name(migrations(cluster)[at]["metadata"]["name"].as_str().unwrap());
        let state = json!({"failureReason": "the target's QEMU ended"});
        let status = json!({"metadata": {"finalizers": null}, "status": {"phase": "Failed", "migrationState": state}});
        cluster.patch(Kind::Migration, &name, status);
        cluster.settle();
    };
    let change = |cluster: &Cluster| condition(&vm(cluster), "VolumesChange")["message"].clone();
    assert_eq!(change(&cluster), "migrate volumes");
    fail(&mut cluster, 0);
    assert_eq!(migrations(&cluster).len(), 1, "not at once");
    let why = "migrate volumes; the last migration failed, and the guest stays where it was: the target's QEMU ended";
    assert_eq!(change(&cluster), why);
    cluster.pass(11);
    cluster.settle();
    assert_eq!(migrations(&cluster).len(), 2);
    assert_eq!(change(&cluster), why, "until the next one has an end");
    let open = migrations(&cluster).iter().position(|one| one["status"]["phase"] != "Failed").unwrap();
    // Well at its end, but who runs the guest has not said so yet.
    let state = json!({"completed": true, "targetNode": "node2"});
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": {"migrationState": state}}));
    fail(&mut cluster, open);
    want(&mut cluster, "old");
    cluster.pass(1000);
    cluster.settle();
    assert_eq!(volume_of(&vmi(&cluster)), "new", "its data may be there already");
    assert_eq!(migrations(&cluster).len(), 2);
}

#[test]
fn setting_the_claim_back_cancels() {
    let mut cluster = cluster();
    want(&mut cluster, "new");
    becomes_migratable(&mut cluster);
    // Another one meanwhile is no way out.
    want(&mut cluster, "other");
    let told = condition(&vm(&cluster), "RestartRequired")["message"].clone();
    assert_eq!(told, "The volume can only be reverted to the previous version during the update");
    assert_eq!(volume_of(&vmi(&cluster)), "new");

    want(&mut cluster, "old");
    for one in migrations(&cluster) {
        assert!(one["metadata"]["deletionTimestamp"].is_string() || one["status"]["phase"] == "Failed", "{one}");
    }
    let cancelling = condition(&vmi(&cluster), "VolumesChange").clone();
    if !cancelling.is_null() {
        assert_eq!(
            (&cancelling["status"], &cancelling["reason"]),
            (&json!("False"), &json!("VolumesChangeCancellation"))
        );
    }
    cluster.settle();
    for name in cluster.world.names_of(Kind::Migration) {
        cluster.remove(Kind::Migration, &name);
    }
    cluster.pass(10);
    cluster.settle();
    let back = vmi(&cluster);
    assert_eq!((volume_of(&back), back["status"].get("migratedVolumes")), (&json!("old"), None));
    assert_eq!(condition(&back, "VolumesChange"), &Value::Null);
    assert_eq!(vm(&cluster)["status"].get("volumeUpdateState"), None);
}

#[test]
fn a_guest_that_ends_meanwhile_is_started_only_where_its_data_is() {
    let mut cluster = cluster();
    want(&mut cluster, "new");
    end_guest(&mut cluster);
    let held = vm(&cluster);
    assert_eq!(condition(&held, "ManualRecoveryRequired")["status"], "True", "{held:#}");
    assert_eq!(cluster.get(Kind::VirtualMachineInstance, &name("demo")), None);
    want(&mut cluster, "old");
    assert_eq!(volume_of(&vmi(&cluster)), "old");
    assert_eq!(condition(&vm(&cluster), "ManualRecoveryRequired"), &Value::Null);
}

#[test]
fn a_guest_that_ends_right_after_its_arrival_is_started_on_the_new_claim() {
    let by_target = json!({"status": {"nodeName": "node2", "migratedVolumes": null}});
    // Only the source's handler has spoken yet.
    let by_source = json!({"status": {"migrationState": {"completed": true, "targetNode": "node2"}}});
    for arrival in [by_target, by_source] {
        let mut cluster = cluster();
        want(&mut cluster, "new");
        // Its VM's controller is slow: it learns of the arrival only when all else is over.
        cluster.patch(Kind::VirtualMachineInstance, &name("demo"), arrival.clone());
        cluster.delete(&Ref::new(Kind::VirtualMachineInstance, name("demo")));
        for _ in 0..5 {
            cluster.step(&Key::Vmi(name("demo")));
            cluster.run_kubelets();
        }
        assert_eq!(vmi(&cluster)["status"]["phase"], "Succeeded", "it waits for its VM's note");
        assert!(vm(&cluster)["status"]["volumeUpdateState"].is_object());
        cluster.settle();
        let again = vmi(&cluster);
        assert_ne!(again["metadata"]["uid"], "uid-demo", "{arrival}");
        assert_eq!(volume_of(&again), "new");
        assert_eq!(condition(&vm(&cluster), "ManualRecoveryRequired"), &Value::Null);
    }
}

#[test]
fn a_vm_that_is_deleted_meanwhile_goes_with_its_guest() {
    let mut cluster = cluster();
    want(&mut cluster, "new");
    cluster.delete(&Ref::new(Kind::VirtualMachine, name("demo")));
    end_guest(&mut cluster);
    assert_eq!(cluster.get(Kind::VirtualMachineInstance, &name("demo")), None);
    assert_eq!(cluster.get(Kind::VirtualMachine, &name("demo")), None);
}

#[test]
fn what_cannot_move_waits_for_a_restart_and_says_why() {
    let told = |change: &dyn Fn(&mut Cluster)| {
        let mut cluster = cluster();
        change(&mut cluster);
        want(&mut cluster, "new");
        let told = condition(&vm(&cluster), "RestartRequired")["message"].as_str().unwrap_or_default().to_owned();
        assert_eq!(volume_of(&vmi(&cluster)), "old", "{told}");
        told
    };
    let vm_spec = |cluster: &mut Cluster, spec: Value| {
        cluster.patch(Kind::VirtualMachine, &name("demo"), json!({"spec": spec}));
    };
    let replaced = told(&|cluster| vm_spec(cluster, json!({"updateVolumesStrategy": "Replacement"})));
    assert!(replaced.contains("when the VM is started again"), "{replaced}");
    let missing = told(&|cluster| cluster.remove(Kind::PersistentVolumeClaim, &name("new")));
    assert_eq!(missing, "claim new of volume data does not exist");
    let network = told(&|cluster| {
        let reason = json!([{"type": "LiveMigratable", "status": "False", "reason": "InterfaceNotLiveMigratable",
            "message": "no masquerade"}]);
        let patch = json!({"status": {"conditions": reason}});
        cluster.patch(Kind::VirtualMachineInstance, &name("demo"), patch);
    });
    assert_eq!(network, "cannot migrate the volumes as the VMI isn't migratable: no masquerade");
    let used = told(&|cluster| {
        cluster.put(
            Kind::VirtualMachineInstance,
            json!({"metadata": {"name": "second", "namespace": "default", "uid": "u2"}, "spec": spec("new")}),
        );
    });
    assert_eq!(used, "claim new of volume data is used by VirtualMachineInstance second");
    let small = told(&|cluster| {
        let status = json!({"status": {"capacity": {"storage": "1Mi"}}});
        cluster.patch(Kind::PersistentVolumeClaim, &name("new"), status);
        let sizes = json!([{"name": "data", "target": "vda", "size": 1 << 30}]);
        cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": {"volumeStatus": sizes}}));
    });
    assert!(small.contains("smaller than the source volume"), "{small}");
}

/// The volume of claim `new` is one that only this node has.
fn volume_of_node(cluster: &mut Cluster, node: &str) {
    let is_node = json!([{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]);
    cluster.put(
        Kind::PersistentVolume,
        json!({
            "metadata": {"name": "new"},
            "spec": {
                "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "local": {"path": "/x"},
                "claimRef": {"namespace": "default", "name": "new"},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": is_node}]}},
            },
        }),
    );
}

#[test]
fn where_only_its_own_node_will_do_the_guest_gets_another_pod_there() {
    let claim_is_there = |cluster: &mut Cluster| volume_of_node(cluster, "node1");
    let node_is_alone = |cluster: &mut Cluster| {
        for node in cluster.world.names_of(Kind::Node).into_iter().filter(|node| node.name != "node1") {
            cluster.remove(Kind::Node, &node);
        }
    };
    for prepare in [&claim_is_there as &dyn Fn(&mut Cluster), &node_is_alone] {
        let mut cluster = cluster();
        prepare(&mut cluster);
        want(&mut cluster, "new");
        becomes_migratable(&mut cluster);
        cluster.run_kubelets();
        cluster.settle();
        let [migration] = migrations(&cluster).try_into().unwrap();
        assert_eq!(migration["spec"]["addedNodeSelector"], json!({"kubernetes.io/hostname": "node1"}));
        let uid = migration["metadata"]["uid"].as_str().unwrap();
        let target = cluster.world.pods_of_migration(uid).next().unwrap();
        assert_eq!(target.spec.as_ref().unwrap().node_name.as_deref(), Some("node1"));
    }
}

#[test]
fn a_claim_of_another_node_takes_the_guest_there() {
    let mut cluster = cluster();
    volume_of_node(&mut cluster, "node2");
    want(&mut cluster, "new");
    assert_eq!(volume_of(&vmi(&cluster)), "new");
    becomes_migratable(&mut cluster);
    cluster.run_kubelets();
    cluster.settle();
    let uid = migrations(&cluster)[0]["metadata"]["uid"].clone();
    let pods: Vec<Value> =
        cluster.world.names_of(Kind::Pod).iter().map(|pod| cluster.get(Kind::Pod, pod).unwrap()).collect();
    let target = pods.iter().find(|pod| pod["metadata"]["labels"]["kubevirt.io/migrationJobUID"] == uid).unwrap();
    assert_eq!(target["spec"]["nodeName"], "node2");
}

#[test]
fn a_second_claim_that_is_not_shared_stays_in_the_way() {
    let mut cluster = cluster();
    cluster.put(Kind::PersistentVolumeClaim, claim("second", "ReadWriteOnce"));
    let volumes = |first: &str| {
        json!([
            {"name": "data", "persistentVolumeClaim": {"claimName": first}},
            {"name": "more", "persistentVolumeClaim": {"claimName": "second"}},
        ])
    };
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"spec": {"volumes": volumes("old")}}));
    let patch = json!({"spec": {"template": {"spec": {"volumes": volumes("new")}}}});
    cluster.patch(Kind::VirtualMachine, &name("demo"), patch);
    cluster.settle();
    assert_eq!(
        condition(&vm(&cluster), "RestartRequired")["message"],
        "cannot migrate the VM. The volume more is RWO and not included in the migration volumes"
    );
}
