use serde_json::{Value, json};

use crate::testing::Cluster;
use crate::{Key, Kind, Name, Ref, Stored, names};

fn name(name: &str) -> Name {
    Name::new("default", name)
}

fn cluster() -> Cluster {
    let mut cluster = Cluster::new();
    for node in ["node1", "node2", "node3"] {
        cluster.add_node(node);
    }
    cluster
}

fn add_vmi(cluster: &mut Cluster, vmi: &str, spec: Value) {
    cluster.put(
        Kind::VirtualMachineInstance,
        json!({
            "metadata": {
                "name": vmi, "namespace": "default", "uid": format!("uid-{vmi}"),
                "finalizers": ["kubevirt.io/foregroundDeleteVirtualMachine"],
            },
            "spec": spec,
        }),
    );
}

fn spec() -> Value {
    json!({"domain": {"memory": {"guest": "128Mi"}, "devices": {}}})
}

fn vmi(cluster: &Cluster, vmi: &str) -> Value {
    cluster.get(Kind::VirtualMachineInstance, &name(vmi)).unwrap_or_default()
}

fn condition(object: &Value, type_: &str) -> Value {
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.into_iter().find(|condition| condition["type"] == type_).unwrap_or_default()
}

fn pod(cluster: &Cluster, vmi: &str) -> Name {
    cluster.world.pods_of_vmi(&format!("uid-{vmi}")).next().unwrap().key()
}

fn run(cluster: &mut Cluster, vmi: &str) {
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    cluster.patch(Kind::VirtualMachineInstance, &name(vmi), json!({"status": {"phase": "Running"}}));
    cluster.settle();
}

#[test]
fn its_pod_says_where_it_is_and_whether_the_guest_is_paused() {
    let mut cluster = cluster();
    add_vmi(&mut cluster, "demo", spec());
    run(&mut cluster, "demo");
    let name = pod(&cluster, "demo");
    let gate = "kubevirt.io/virtual-machine-unpaused";
    let object = cluster.get(Kind::Pod, &name).unwrap();
    assert_eq!(object["metadata"]["labels"]["kubevirt.io/nodeName"], "node1");
    assert_eq!(object["spec"]["readinessGates"][0]["conditionType"], gate);
    let told = |cluster: &Cluster| {
        let told = condition(&cluster.get(Kind::Pod, &name).unwrap(), gate);
        [told["status"].clone(), told["reason"].clone(), told["message"].clone()]
    };
    assert_eq!(told(&cluster), ["True", "NotPaused", "the virtual machine is not paused"]);
    let mut conditions = vmi(&cluster, "demo")["status"]["conditions"].as_array().unwrap().clone();
    conditions.push(json!({"type": "Paused", "status": "True", "reason": "PausedByUser"}));
    let vmi_name = Name::new("default", "demo");
    cluster.patch(Kind::VirtualMachineInstance, &vmi_name, json!({"status": {"conditions": conditions}}));
    cluster.settle();
    assert_eq!(told(&cluster), ["False", "Paused", "the virtual machine is paused"]);
    conditions.pop();
    cluster.patch(Kind::VirtualMachineInstance, &vmi_name, json!({"status": {"conditions": conditions}}));
    cluster.settle();
    assert_eq!(told(&cluster)[0], "True");
}

#[test]
fn a_gate_that_is_about_to_open_does_not_make_the_vmi_unready() {
    let mut cluster = cluster();
    add_vmi(&mut cluster, "demo", spec());
    run(&mut cluster, "demo");
    let name = pod(&cluster, "demo");
    let conditions = |paused: bool| {
        let gate = if paused { "False" } else { "True" };
        json!({"status": {"conditions": [
            {"type": "Ready", "status": "False", "reason": "ReadinessGatesNotReady", "message": "m"},
            {"type": "kubevirt.io/virtual-machine-unpaused", "status": gate},
        ]}})
    };
    cluster.patch(Kind::Pod, &name, conditions(false));
    cluster.settle();
    assert_eq!(condition(&vmi(&cluster, "demo"), "Ready")["status"], "True");
    let paused = json!({"status": {"conditions": [{"type": "Paused", "status": "True"}]}});
    cluster.patch(Kind::VirtualMachineInstance, &Name::new("default", "demo"), paused);
    cluster.patch(Kind::Pod, &name, conditions(true));
    cluster.settle();
    let ready = condition(&vmi(&cluster, "demo"), "Ready");
    assert_eq!([&ready["status"], &ready["reason"]], ["False", "ReadinessGatesNotReady"]);
}

#[test]
fn a_vmi_gets_its_pod_and_its_node() {
    let mut cluster = cluster();
    add_vmi(&mut cluster, "demo", spec());
    cluster.settle();
    let waiting = vmi(&cluster, "demo");
    assert_eq!(waiting["status"]["phase"], "Scheduling");
    assert_eq!(condition(&waiting, "Ready")["reason"], "GuestNotRunning");
    cluster.run_kubelets();
    cluster.settle();
    let scheduled = vmi(&cluster, "demo");
    assert_eq!(scheduled["status"]["phase"], "Scheduled");
    assert_eq!(scheduled["metadata"]["labels"]["kubevirt.io/nodeName"], "node1");
    assert_eq!(scheduled["status"]["nodeName"], "node1");
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": {"phase": "Running"}}));
    cluster.settle();
    let running = vmi(&cluster, "demo");
    assert_eq!(condition(&running, "Ready")["status"], "True");
    assert_eq!(running["status"]["activePods"].as_object().unwrap().len(), 1);
    let entered: Vec<_> = running["status"]["phaseTransitionTimestamps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["phase"].clone())
        .collect();
    assert_eq!(entered, ["Pending", "Scheduling", "Scheduled"]);
    assert_eq!(cluster.world.pods_of_vmi("uid-demo").count(), 1);
}

#[test]
fn trouble_with_images_and_claims_is_said() {
    let mut cluster = cluster();
    let mut with_claim = spec();
    with_claim["volumes"] = json!([{"name": "root", "persistentVolumeClaim": {"claimName": "disk"}}]);
    add_vmi(&mut cluster, "demo", with_claim);
    cluster.settle();
    assert_eq!(condition(&vmi(&cluster, "demo"), "Synchronized")["reason"], "FailedPvcNotFound");
    assert_eq!(cluster.world.pods.iter().count(), 0);
    add_class(&mut cluster, "shared", "godwit.local/shared", "Immediate");
    add_claim(&mut cluster, "disk", "shared", "ReadWriteMany");
    cluster.settle();
    assert!(condition(&vmi(&cluster, "demo"), "Synchronized").is_null());
    let pod = pod(&cluster, "demo");
    let waiting = json!({"reason": "ErrImagePull", "message": "no such image"});
    cluster.patch(Kind::Pod, &pod, json!({"status": {"phase": "Pending", "containerStatuses": [
        {"name": "compute", "ready": false, "image": "i", "imageID": "", "restartCount": 0, "state": {"waiting": waiting}},
    ]}}));
    cluster.settle();
    let said = condition(&vmi(&cluster, "demo"), "Synchronized");
    assert_eq!((&said["reason"], &said["message"]), (&json!("ErrImagePull"), &json!("no such image")));
}

#[test]
fn a_start_that_a_quota_refuses_is_said_on_the_vmi() {
    let mut cluster = cluster();
    let quota = |pods: &str| {
        json!({"metadata": {"name": "small", "namespace": "default"}, "spec": {"hard": {"pods": pods}},
            "status": {"hard": {"pods": pods}, "used": {"pods": "1"}}})
    };
    cluster.put(Kind::ResourceQuota, quota("1"));
    add_vmi(&mut cluster, "demo", spec());
    cluster.settle();
    let said = condition(&vmi(&cluster, "demo"), "Synchronized");
    assert_eq!((&said["status"], &said["reason"]), (&json!("False"), &json!("FailedCreate")), "{said}");
    assert!(said["message"].as_str().unwrap().contains("exceeded quota: small"), "{said}");
    assert_eq!(vmi(&cluster, "demo")["status"]["phase"], "Pending");
    assert_eq!(cluster.world.pods.iter().count(), 0);
    cluster.put(Kind::ResourceQuota, quota("2"));
    cluster.settle();
    assert!(condition(&vmi(&cluster, "demo"), "Synchronized").is_null());
    assert_eq!(cluster.world.pods.iter().count(), 1);
}

#[test]
fn deletion_waits_for_the_pod() {
    let mut cluster = cluster();
    add_vmi(&mut cluster, "demo", spec());
    run(&mut cluster, "demo");
    cluster.delete(&Ref::new(Kind::VirtualMachineInstance, name("demo")));
    cluster.settle();
    assert!(vmi(&cluster, "demo").is_object(), "the pod is still there");
    cluster.run_kubelets();
    cluster.settle();
    assert!(vmi(&cluster, "demo").is_null());
}

#[test]
fn the_end_of_the_pod_is_the_end_of_the_vmi() {
    for (end, phase) in [("Succeeded", "Succeeded"), ("Failed", "Failed")] {
        let mut cluster = cluster();
        add_vmi(&mut cluster, "demo", spec());
        run(&mut cluster, "demo");
        let pod = pod(&cluster, "demo");
        cluster.patch(Kind::Pod, &pod, json!({"status": {"phase": end}}));
        cluster.settle();
        assert_eq!(vmi(&cluster, "demo")["status"]["phase"], phase);
    }
    let mut cluster = cluster();
    add_vmi(&mut cluster, "demo", spec());
    run(&mut cluster, "demo");
    let pod = pod(&cluster, "demo");
    cluster.remove(Kind::Node, &Name::cluster("node1"));
    cluster.remove(Kind::Pod, &pod);
    cluster.settle();
    let lost = vmi(&cluster, "demo");
    assert_eq!((&lost["status"]["phase"], &lost["status"]["reason"]), (&json!("Failed"), &json!("NodeUnresponsive")));
}

#[test]
fn a_source_that_ends_in_the_hand_over_is_not_the_end_of_the_guest() {
    let mut cluster = cluster();
    add_vmi(&mut cluster, "demo", spec());
    run(&mut cluster, "demo");
    let source = pod(&cluster, "demo");
    cluster.put(
        Kind::Migration,
        json!({
            "metadata": {"name": "job", "namespace": "default", "uid": "uid-job"}, "spec": {"vmiName": "demo"},
        }),
    );
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    cluster.patch(Kind::Pod, &source, json!({"status": {"phase": "Succeeded"}}));
    cluster.settle();
    assert_eq!(vmi(&cluster, "demo")["status"]["phase"], "Running", "the target's handler may yet report the guest");
    let grace = cluster.decide(&Key::Vmi(name("demo"))).wake_at.unwrap();
    assert_eq!(grace.duration_since(cluster.now).as_secs(), 60);
    // A node that claims to have come back at the end of time has not had its chance.
    let mut late = cluster.clone();
    let target = vmi(&late, "demo")["status"]["migrationState"]["targetNode"].as_str().unwrap().to_owned();
    let ready = json!([{"type": "Ready", "status": "True", "lastTransitionTime": "9999-12-30T22:00:00Z"}]);
    late.patch(Kind::Node, &Name::cluster(target), json!({"status": {"conditions": ready}}));
    late.pass(90);
    late.settle();
    assert_eq!(vmi(&late, "demo")["status"]["phase"], "Running");
    // It does: all is well.
    let target = vmi(&cluster, "demo")["status"]["migrationState"]["targetNode"].clone();
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": {"nodeName": target}}));
    cluster.pass(3600);
    cluster.settle();
    assert_eq!(vmi(&cluster, "demo")["status"]["phase"], "Running");
}

#[test]
fn a_guest_that_is_nowhere_is_given_up_in_the_end() {
    let mut cluster = cluster();
    add_vmi(&mut cluster, "demo", spec());
    run(&mut cluster, "demo");
    let source = pod(&cluster, "demo");
    cluster.put(
        Kind::Migration,
        json!({
            "metadata": {"name": "job", "namespace": "default", "uid": "uid-job"}, "spec": {"vmiName": "demo"},
        }),
    );
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    cluster.remove(Kind::Pod, &source);
    cluster.settle();
    cluster.pass(60);
    cluster.settle();
    assert_eq!(vmi(&cluster, "demo")["status"]["phase"], "Failed");
    cluster.run_kubelets();
    assert_eq!(
        cluster.world.pods_of_vmi("uid-demo").count(),
        0,
        "what may hold the guest goes before a new one starts"
    );
}

/// A VMI in the middle of a migration, whose source pod has just ended. Returns the target's node.
fn source_ended(cluster: &mut Cluster) -> String {
    add_vmi(cluster, "demo", spec());
    run(cluster, "demo");
    let source = pod(cluster, "demo");
    cluster.put(
        Kind::Migration,
        json!({
            "metadata": {"name": "job", "namespace": "default", "uid": "uid-job"}, "spec": {"vmiName": "demo"},
        }),
    );
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
    let started = json!({"status": {"migrationState": {"startTimestamp": cluster.now.to_string()}}});
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), started);
    cluster.patch(Kind::Pod, &source, json!({"status": {"phase": "Succeeded"}}));
    cluster.settle();
    vmi(cluster, "demo")["status"]["migrationState"]["targetNode"].as_str().unwrap().to_owned()
}

#[test]
fn a_guest_that_the_source_has_handed_over_is_not_given_up() {
    let mut cluster = cluster();
    source_ended(&mut cluster);
    let target = vmi(&cluster, "demo")["status"]["migrationState"]["targetPod"].as_str().unwrap().to_owned();
    let said = json!({"status": {"migrationState": {"completed": true, "endTimestamp": cluster.now.to_string()}}});
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), said);
    for _ in 0..3 {
        cluster.settle();
        cluster.pass(3600);
    }
    cluster.settle();
    assert_eq!(vmi(&cluster, "demo")["status"]["phase"], "Running");
    assert!(cluster.get(Kind::Pod, &name(&target)).unwrap()["metadata"].get("deletionTimestamp").is_none());
    // Only the end of the target pod is the end of the guest.
    cluster.patch(Kind::Pod, &name(&target), json!({"status": {"phase": "Failed"}}));
    cluster.settle();
    assert_eq!(vmi(&cluster, "demo")["status"]["phase"], "Failed");
}

#[test]
fn a_guest_on_a_node_out_of_reach_is_not_given_up() {
    let mut cluster = cluster();
    let node = Name::cluster(source_ended(&mut cluster));
    let ready = |cluster: &mut Cluster, status: &str| {
        let at = cluster.now.to_string();
        let condition = json!([{"type": "Ready", "status": status, "lastTransitionTime": at}]);
        cluster.patch(Kind::Node, &node, json!({"status": {"conditions": condition}}));
        cluster.settle();
    };
    cluster.pass(40);
    ready(&mut cluster, "Unknown");
    cluster.pass(3600);
    cluster.settle();
    assert_eq!(vmi(&cluster, "demo")["status"]["phase"], "Running");
    assert!(cluster.decide(&Key::Vmi(name("demo"))).wake_at.is_some(), "it is looked at again");
    ready(&mut cluster, "True");
    cluster.pass(59);
    cluster.settle();
    assert_eq!(vmi(&cluster, "demo")["status"]["phase"], "Running", "its handler gets the same time as any other");
    cluster.pass(1);
    cluster.settle();
    assert_ne!(vmi(&cluster, "demo")["status"]["phase"], "Running", "then it counts as lost");
}

#[test]
fn the_label_of_a_target_does_not_outlive_its_migration() {
    let label =
        |cluster: &Cluster| vmi(cluster, "demo")["metadata"]["labels"][names::LABEL_MIGRATION_TARGET_NODE_NAME].clone();
    let mut cluster = cluster();
    add_vmi(&mut cluster, "demo", spec());
    run(&mut cluster, "demo");
    let state = json!({"migrationUid": "uid-gone", "sourceNode": "node1", "targetNode": "node2"});
    let on_its_way = json!({
        "metadata": {"labels": {names::LABEL_MIGRATION_TARGET_NODE_NAME: "node2"}}, "status": {"migrationState": state},
    });
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), on_its_way);
    cluster.settle();
    assert_eq!(label(&cluster), "node2", "its end is not known yet");
    cluster.patch(
        Kind::VirtualMachineInstance,
        &name("demo"),
        json!({"status": {"migrationState": {"completed": true}}}),
    );
    cluster.settle();
    assert_eq!(label(&cluster), "node2", "the target's handler has yet to say that the guest is there");
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": {"migrationState": {"failed": true}}}));
    cluster.settle();
    assert!(label(&cluster).is_null());
}

#[test]
fn a_target_pod_without_its_migration_is_removed_though_nothing_was_ever_handed_over() {
    let mut cluster = cluster();
    add_vmi(&mut cluster, "demo", spec());
    run(&mut cluster, "demo");
    let of_guest = crate::vmi::current_pod_name(cluster.world.vmis.get(&name("demo")).unwrap());
    let mut target = cluster.get(Kind::Pod, &name(&of_guest)).unwrap();
    target["metadata"]["name"] = json!("virt-launcher-demo-late");
    target["metadata"]["uid"] = json!("uid-late");
    target["metadata"]["labels"][names::LABEL_MIGRATION_JOB_UID] = json!("uid-over");
    cluster.put(Kind::Pod, target);
    live(&mut cluster);
    assert!(cluster.get(Kind::Pod, &name("virt-launcher-demo-late")).is_none());
    assert!(cluster.get(Kind::Pod, &name(&of_guest)).is_some(), "the guest's own stays");
}

#[test]
fn pods_without_their_vmi_are_removed() {
    let mut cluster = cluster();
    add_vmi(&mut cluster, "demo", spec());
    run(&mut cluster, "demo");
    cluster.remove(Kind::VirtualMachineInstance, &name("demo"));
    cluster.settle();
    cluster.run_kubelets();
    assert_eq!(cluster.world.pods.iter().count(), 0);
}

fn add_vm(cluster: &mut Cluster, strategy: &str) {
    cluster.put(
        Kind::VirtualMachine,
        json!({
            "metadata": {"name": "demo", "namespace": "default", "uid": "uid-vm"},
            "spec": {"runStrategy": strategy, "template": {"metadata": {"labels": {"app": "web"}}, "spec": spec()}},
        }),
    );
}

fn vm(cluster: &Cluster) -> Value {
    cluster.get(Kind::VirtualMachine, &name("demo")).unwrap_or_default()
}

fn uid(cluster: &Cluster) -> String {
    vmi(cluster, "demo")["metadata"]["uid"].as_str().unwrap_or_default().to_owned()
}

/// Lets pods start and go until nothing changes any more.
fn live(cluster: &mut Cluster) {
    for _ in 0..4 {
        cluster.settle();
        cluster.run_kubelets();
    }
    cluster.settle();
}

fn set_phase(cluster: &mut Cluster, phase: &str) {
    let entry = json!([{"phase": "Running"}]);
    let status = if phase == "Running" {
        json!({"phase": phase, "phaseTransitionTimestamps": entry})
    } else {
        json!({"phase": phase})
    };
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), json!({"status": status}));
}

#[test]
fn an_always_running_vm_comes_back() {
    let mut cluster = cluster();
    add_vm(&mut cluster, "Always");
    live(&mut cluster);
    assert_eq!(vm(&cluster)["status"]["printableStatus"], "Starting");
    assert_eq!(vmi(&cluster, "demo")["metadata"]["labels"]["app"], "web");
    assert!(cluster.has_event(
        "SuccessfulCreate",
        "Started the virtual machine by creating the new virtual machine instance demo"
    ));
    set_phase(&mut cluster, "Running");
    live(&mut cluster);
    let running = vm(&cluster);
    assert_eq!(running["status"]["printableStatus"], "Running");
    assert_eq!((&running["status"]["created"], &running["status"]["ready"]), (&json!(true), &json!(true)));
    assert_eq!(condition(&running, "Ready")["status"], "True");
    let first = uid(&cluster);
    set_phase(&mut cluster, "Succeeded");
    live(&mut cluster);
    assert!(!uid(&cluster).is_empty() && uid(&cluster) != first, "a new run");
    cluster.patch(Kind::VirtualMachine, &name("demo"), json!({"spec": {"runStrategy": "Halted"}}));
    live(&mut cluster);
    assert_eq!((vm(&cluster)["status"]["printableStatus"].clone(), uid(&cluster)), (json!("Stopped"), String::new()));
    assert_eq!(condition(&vm(&cluster), "Ready")["reason"], "VMINotExists");
}

#[test]
fn a_vm_that_never_starts_is_backed_off() {
    let mut cluster = cluster();
    add_vm(&mut cluster, "Always");
    live(&mut cluster);
    for (count, pause) in [(1, 10), (2, 40)] {
        set_phase(&mut cluster, "Failed");
        live(&mut cluster);
        let failed = vm(&cluster);
        assert_eq!(failed["status"]["startFailure"]["consecutiveFailCount"], count);
        assert_eq!(
            (failed["status"]["printableStatus"].clone(), uid(&cluster)),
            (json!("CrashLoopBackOff"), String::new())
        );
        let wake = cluster.decide(&Key::Vm(name("demo"))).wake_at.unwrap();
        assert_eq!(wake.duration_since(cluster.now).as_secs(), pause);
        cluster.pass(pause);
        live(&mut cluster);
        assert!(!uid(&cluster).is_empty());
    }
    set_phase(&mut cluster, "Running");
    live(&mut cluster);
    assert!(vm(&cluster)["status"].get("startFailure").is_none());
}

#[test]
fn run_strategies_differ_in_what_an_end_means() {
    // strategy, the VMI's end, whether there is a new run
    for (strategy, end, again) in [
        ("RerunOnFailure", "Failed", true),
        ("RerunOnFailure", "Succeeded", false),
        ("Once", "Failed", false),
        ("Once", "Succeeded", false),
        ("Always", "Failed", true),
    ] {
        let mut cluster = cluster();
        add_vm(&mut cluster, strategy);
        live(&mut cluster);
        let first = uid(&cluster);
        assert!(!first.is_empty(), "{strategy}");
        set_phase(&mut cluster, "Running");
        live(&mut cluster);
        set_phase(&mut cluster, end);
        live(&mut cluster);
        assert_eq!(uid(&cluster) != first, again, "{strategy} {end}");
    }
}

#[test]
fn manual_vms_do_as_they_are_asked() {
    let mut cluster = cluster();
    add_vm(&mut cluster, "Manual");
    live(&mut cluster);
    assert_eq!(uid(&cluster), "");
    cluster.patch(
        Kind::VirtualMachine,
        &name("demo"),
        json!({"status": {"stateChangeRequests": [{"action": "Start"}]}}),
    );
    live(&mut cluster);
    let first = uid(&cluster);
    assert!(!first.is_empty());
    assert!(vm(&cluster)["status"].get("stateChangeRequests").is_none(), "met");
    let requests = json!([{"action": "Stop", "uid": first}]);
    cluster.patch(Kind::VirtualMachine, &name("demo"), json!({"status": {"stateChangeRequests": requests}}));
    live(&mut cluster);
    assert_eq!(uid(&cluster), "");
    assert!(vm(&cluster)["status"].get("stateChangeRequests").is_none());
}

#[test]
fn a_vm_starts_paused_once_when_that_is_asked_for() {
    for strategy in ["Manual", "Halted"] {
        let mut cluster = cluster();
        add_vm(&mut cluster, strategy);
        live(&mut cluster);
        let requests = json!([{"action": "Start", "data": {"paused": "true"}}]);
        cluster.patch(Kind::VirtualMachine, &name("demo"), json!({"status": {"stateChangeRequests": requests}}));
        live(&mut cluster);
        let first = uid(&cluster);
        assert_eq!(vmi(&cluster, "demo")["spec"]["startStrategy"], "Paused", "{strategy}");
        assert!(vm(&cluster)["status"].get("stateChangeRequests").is_none(), "met");
        let after = if strategy == "Halted" { "Always" } else { strategy };
        assert_eq!(vm(&cluster)["spec"]["runStrategy"], after);
        let requests = json!([{"action": "Stop", "uid": first}, {"action": "Start"}]);
        cluster.patch(Kind::VirtualMachine, &name("demo"), json!({"status": {"stateChangeRequests": requests}}));
        live(&mut cluster);
        assert_ne!(uid(&cluster), first);
        assert!(vmi(&cluster, "demo")["spec"].get("startStrategy").is_none(), "the next start is like any other");
    }
}

#[test]
fn a_stop_outdoes_the_restart_before_it() {
    let mut cluster = cluster();
    add_vm(&mut cluster, "Halted");
    let requests = json!([{"action": "Start"}]);
    cluster.patch(Kind::VirtualMachine, &name("demo"), json!({"status": {"stateChangeRequests": requests}}));
    live(&mut cluster);
    assert_eq!(uid(&cluster), "");
    assert_eq!(vm(&cluster)["spec"]["runStrategy"], "Halted");
}

#[test]
fn deleting_a_vm_takes_its_vmi_along() {
    let mut cluster = cluster();
    add_vm(&mut cluster, "Always");
    live(&mut cluster);
    cluster.delete(&Ref::new(Kind::VirtualMachine, name("demo")));
    cluster.settle();
    assert_eq!(vm(&cluster)["status"]["printableStatus"], "Terminating");
    live(&mut cluster);
    assert!(vm(&cluster).is_null() && vmi(&cluster, "demo").is_null());
}

#[test]
fn a_vmi_of_the_same_name_is_left_alone() {
    let mut cluster = cluster();
    add_vmi(&mut cluster, "demo", spec());
    add_vm(&mut cluster, "Always");
    live(&mut cluster);
    assert_eq!(uid(&cluster), "uid-demo");
    assert_eq!(condition(&vm(&cluster), "Failure")["reason"], "VMINameTaken");
}

fn add_class(cluster: &mut Cluster, class: &str, provisioner: &str, mode: &str) {
    cluster.put(Kind::StorageClass, json!({
        "metadata": {"name": class}, "provisioner": provisioner, "volumeBindingMode": mode, "reclaimPolicy": "Delete",
    }));
}

fn add_claim(cluster: &mut Cluster, claim: &str, class: &str, mode: &str) {
    cluster.put(
        Kind::PersistentVolumeClaim,
        json!({
            "metadata": {"name": claim, "namespace": "default", "uid": format!("uid-{claim}")},
            "spec": {"storageClassName": class, "accessModes": [mode], "resources": {"requests": {"storage": "1Gi"}}},
        }),
    );
}

#[test]
fn a_shared_claim_is_bound_at_once_and_cleaned_up() {
    let mut cluster = cluster();
    add_class(&mut cluster, "shared", "godwit.local/shared", "Immediate");
    add_claim(&mut cluster, "disk", "shared", "ReadWriteMany");
    cluster.settle();
    let claim = cluster.get(Kind::PersistentVolumeClaim, &name("disk")).unwrap();
    assert_eq!((&claim["status"]["phase"], &claim["spec"]["volumeName"]), (&json!("Bound"), &json!("pvc-uid-disk")));
    let volume = cluster.get(Kind::PersistentVolume, &Name::cluster("pvc-uid-disk")).unwrap();
    assert_eq!(volume["spec"]["hostPath"]["path"], "/data/shared/pvc-uid-disk");
    assert_eq!(volume["status"]["phase"], "Bound");
    cluster.remove(Kind::PersistentVolumeClaim, &name("disk"));
    cluster.settle();
    assert!(cluster.get(Kind::PersistentVolume, &Name::cluster("pvc-uid-disk")).is_none());
}

#[test]
fn a_local_claim_waits_for_its_first_pod_and_stays_on_its_node() {
    let mut cluster = cluster();
    add_class(&mut cluster, "local", "godwit.local/local", "WaitForFirstConsumer");
    add_claim(&mut cluster, "disk", "local", "ReadWriteOnce");
    cluster.settle();
    assert!(cluster.get(Kind::PersistentVolumeClaim, &name("disk")).unwrap()["spec"].get("volumeName").is_none());
    let mut with_claim = spec();
    with_claim["volumes"] = json!([{"name": "root", "persistentVolumeClaim": {"claimName": "disk"}}]);
    with_claim["nodeSelector"] = json!({"kubernetes.io/hostname": "node2"});
    add_vmi(&mut cluster, "demo", with_claim);
    cluster.settle();
    let volume = cluster.get(Kind::PersistentVolume, &Name::cluster("pvc-uid-disk")).unwrap();
    assert_eq!(volume["spec"]["local"]["path"], "/data/nodes/node2/local/pvc-uid-disk");
    let bound = cluster.world.pods.get(&pod(&cluster, "demo")).unwrap().spec.as_ref().unwrap().node_name.clone();
    assert_eq!(bound.as_deref(), Some("node2"));
    // Another pod with the claim can go nowhere else.
    cluster.patch(Kind::Node, &Name::cluster("node2"), json!({"spec": {"unschedulable": true}}));
    cluster.put(
        Kind::Pod,
        json!({
            "metadata": {"name": "other", "namespace": "default"},
            "spec": {"containers": [], "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "disk"}}]},
        }),
    );
    cluster.settle();
    let said = condition(&cluster.get(Kind::Pod, &name("other")).unwrap(), "PodScheduled");
    let expected =
        "0/3 nodes are available: 1 node(s) were unschedulable, 2 node(s) had volume node affinity conflict.";
    assert_eq!((&said["reason"], &said["message"]), (&json!("Unschedulable"), &json!(expected)));
    add_claim(&mut cluster, "many", "local", "ReadWriteMany");
    cluster.patch(
        Kind::PersistentVolumeClaim,
        &name("many"),
        json!({"metadata": {"annotations": {names::SELECTED_NODE: "node1"}}}),
    );
    cluster.step(&Key::Claim(name("many")));
    assert!(cluster.has_event("ProvisioningFailed", "use storage class \"shared\""));
}

#[test]
fn a_claim_of_a_block_device_is_a_device_of_the_launchers_pod() {
    let mut cluster = cluster();
    add_class(&mut cluster, "local", "godwit.local/local", "WaitForFirstConsumer");
    // One for file systems that would do otherwise.
    let spare = json!({
        "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "local", "hostPath": {"path": "/x"},
    });
    cluster.put(Kind::PersistentVolume, json!({"metadata": {"name": "spare"}, "spec": spare}));
    add_claim(&mut cluster, "disk", "local", "ReadWriteOnce");
    cluster.patch(Kind::PersistentVolumeClaim, &name("disk"), json!({"spec": {"volumeMode": "Block"}}));
    let mut with_claim = spec();
    with_claim["volumes"] = json!([{"name": "root", "persistentVolumeClaim": {"claimName": "disk"}}]);
    add_vmi(&mut cluster, "demo", with_claim);
    cluster.settle();
    let volume = cluster.get(Kind::PersistentVolume, &Name::cluster("pvc-uid-disk")).unwrap();
    assert_eq!((&volume["spec"]["volumeMode"], &volume["status"]["phase"]), (&json!("Block"), &json!("Bound")));
    let pod = cluster.get(Kind::Pod, &pod(&cluster, "demo")).unwrap();
    let compute = &pod["spec"]["containers"][0];
    assert_eq!(compute["volumeDevices"], json!([{"name": "root", "devicePath": "/dev/vmi-disks/root"}]));
    let mounts = compute["volumeMounts"].as_array().unwrap();
    assert!(mounts.iter().all(|mount| mount["name"] != "root"), "{compute:#}");
}
