//! Disks that come and go: which pods there are, and what is said of each disk.

use godwit_api::VirtualMachineInstance;
use serde_json::{Value, json};

use crate::testing::{Cluster, breaks_restricted};
use crate::{Key, Kind, Name, Stored};

fn name(of: &str) -> Name {
    Name::new("ns", of)
}

fn vmi_key() -> Key {
    Key::Vmi(name("db"))
}

/// A guest that runs on node1 in its first launcher pod.
fn cluster() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.put(Kind::VirtualMachineInstance, vmi(&[], json!([])));
    let launcher = {
        let vmi = cluster.world.vmis.get(&name("db")).expect("VMI");
        crate::names::launcher_pod("db", vmi.uid())
    };
    cluster.put(Kind::Pod, launcher_pod(&launcher, "launcher", "node1", None));
    cluster.put(
        Kind::PersistentVolumeClaim,
        json!({"metadata": {"name": "claim", "namespace": "ns", "uid": "claim"},
            "spec": {"accessModes": ["ReadWriteMany"], "volumeName": "pv", "resources": {"requests": {"storage": "8Mi"}}},
            "status": {"phase": "Bound", "capacity": {"storage": "8Mi"}}}),
    );
    cluster
}

fn launcher_pod(pod: &str, uid: &str, node: &str, migration: Option<&str>) -> Value {
    let mut labels = json!({"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": "db-uid"});
    if let Some(migration) = migration {
        labels["kubevirt.io/migrationJobUID"] = json!(migration);
    }
    json!({
        "metadata": {"name": pod, "namespace": "ns", "uid": uid, "labels": labels,
            "annotations": {"kubevirt.io/domain": "db"}},
        "spec": {"nodeName": node, "containers": [{"name": "compute"}]},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "compute", "ready": true, "image": "", "imageID": "", "restartCount": 0}]},
    })
}

fn vmi(volumes: &[&str], statuses: Value) -> Value {
    let volume =
        |volume: &&str| json!({"name": volume, "persistentVolumeClaim": {"claimName": "claim", "hotpluggable": true}});
    let disk = |volume: &&str| json!({"name": volume, "disk": {"bus": "scsi"}});
    json!({
        "metadata": {"name": "db", "namespace": "ns", "uid": "db-uid", "finalizers": ["kubevirt.io/foregroundDeleteVirtualMachine"]},
        "spec": {
            "domain": {"memory": {"guest": "64Mi"}, "devices": {"disks": volumes.iter().map(disk).collect::<Vec<_>>()}},
            "volumes": volumes.iter().map(volume).collect::<Vec<_>>(),
        },
        "status": {"phase": "Running", "nodeName": "node1", "volumeStatus": statuses},
    })
}

fn told(cluster: &Cluster) -> VirtualMachineInstance {
    cluster.world.vmis.get(&name("db")).expect("VMI").as_ref().clone()
}

fn phase(cluster: &Cluster) -> Option<String> {
    told(cluster).status.volume_status.first()?.phase.as_ref().map(|phase| phase.as_str().to_owned())
}

/// The attachment pods of a launcher's pod.
fn attachments(cluster: &Cluster, launcher: &str) -> Vec<Value> {
    cluster.world.attachments_of(launcher).map(|pod| serde_json::to_value(pod.as_ref()).expect("JSON")).collect()
}

fn becomes_ready(cluster: &mut Cluster, mut pod: Value, node: &str) {
    pod["spec"]["nodeName"] = json!(node);
    pod["status"] = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
    cluster.put(Kind::Pod, pod);
}

#[test]
fn a_claim_is_held_on_the_guests_node_until_the_guest_has_let_go_of_it() {
    let mut cluster = cluster();
    cluster.step(&vmi_key());
    assert!(attachments(&cluster, "launcher").is_empty() && phase(&cluster).is_none());

    cluster.put(Kind::VirtualMachineInstance, vmi(&["data"], json!([])));
    cluster.step(&vmi_key());
    assert_eq!(phase(&cluster).as_deref(), Some("Bound"));
    let pods = attachments(&cluster, "launcher");
    assert_eq!(pods.len(), 1);
    let pod = &pods[0];
    assert_eq!(breaks_restricted(&serde_json::from_value(pod.clone()).expect("a pod")), [""; 0]);
    assert!(pod["metadata"]["name"].as_str().expect("a name").starts_with("hp-volume-"));
    let command = pod["spec"]["containers"][0]["command"].to_string();
    assert!(command.contains("data:rw:8388608:/var/run/kubevirt-private/vmi-disks/data"), "{command}");
    let node = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    assert_eq!(node["nodeSelectorTerms"][0]["matchExpressions"][0]["values"], json!(["node1"]));
    cluster.step(&vmi_key());
    assert_eq!(attachments(&cluster, "launcher").len(), 1, "once");

    becomes_ready(&mut cluster, pod.clone(), "node1");
    cluster.step(&vmi_key());
    assert_eq!(phase(&cluster).as_deref(), Some("AttachedToNode"));
    let status = told(&cluster).status.volume_status.remove(0);
    let held = status.hotplug_volume.expect("a pod");
    assert_eq!(held.attach_pod_uid.as_deref(), pod["metadata"]["uid"].as_str());
    assert!(!told(&cluster).has_settled_disks());

    // The handler says that the guest has it, then the user takes it away.
    let entry = json!([{"name": "data", "target": "sda", "phase": "Ready",
        "hotplugVolume": {"attachPodName": pod["metadata"]["name"], "attachPodUID": pod["metadata"]["uid"]}}]);
    cluster.put(Kind::VirtualMachineInstance, vmi(&["data"], entry.clone()));
    cluster.step(&vmi_key());
    assert!(told(&cluster).has_settled_disks());
    cluster.put(Kind::VirtualMachineInstance, vmi(&[], entry.clone()));
    cluster.step(&vmi_key());
    assert_eq!(phase(&cluster).as_deref(), Some("Detaching"));
    assert_eq!(attachments(&cluster, "launcher").len(), 1, "the guest still has it");
    let mut gone = entry;
    gone[0]["phase"] = json!("UnMountedFromPod");
    cluster.put(Kind::VirtualMachineInstance, vmi(&[], gone));
    cluster.step(&vmi_key());
    assert_eq!(phase(&cluster), None);
    cluster.step(&vmi_key());
    cluster.run_kubelets();
    assert!(attachments(&cluster, "launcher").is_empty(), "{:?}", attachments(&cluster, "launcher"));
}

#[test]
fn a_claim_that_is_not_there_is_waited_for() {
    let mut cluster = cluster();
    let mut other = vmi(&["data"], json!([]));
    other["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = json!("later");
    cluster.put(Kind::VirtualMachineInstance, other);
    cluster.step(&vmi_key());
    let status = told(&cluster).status.volume_status.remove(0);
    assert_eq!(status.message.as_deref(), Some("PVC ns/later does not exist, waiting for it to appear"));
    assert!(attachments(&cluster, "launcher").is_empty());
}

#[test]
fn a_target_has_the_claims_before_the_guest_is_sent_and_keeps_them_when_it_is_there() {
    let mut cluster = cluster();
    let entry = json!([{"name": "data", "target": "sda", "phase": "Ready",
        "hotplugVolume": {"attachPodName": "old", "attachPodUID": "old"}}]);
    cluster.put(Kind::VirtualMachineInstance, vmi(&["data"], entry.clone()));
    cluster.put(
        Kind::Migration,
        json!({"metadata": {"name": "move", "namespace": "ns", "uid": "move-uid"}, "spec": {"vmiName": "db"},
            "status": {"phase": "Scheduling"}}),
    );
    cluster.put(Kind::Pod, launcher_pod("target", "target", "node2", Some("move-uid")));
    let state = |cluster: &Cluster| {
        let vmi = told(cluster);
        let pod = cluster.world.pods.get(&name("target")).expect("pod").clone();
        crate::hotplug::for_target(&vmi, &pod, &cluster.world).map(|pod| pod.map(|pod| pod.uid().to_owned()))
    };
    cluster.step(&vmi_key());
    assert!(state(&cluster).is_err(), "it is not ready");
    let pods = attachments(&cluster, "target");
    assert_eq!(pods.len(), 1);
    becomes_ready(&mut cluster, pods[0].clone(), "node2");
    let uid = pods[0]["metadata"]["uid"].as_str().expect("uid").to_owned();
    assert_eq!(state(&cluster), Ok(Some(uid.clone())));

    // While it is being taken out, nothing is handed over.
    let mut leaving = entry.clone();
    leaving[0]["phase"] = json!("Detaching");
    cluster.put(Kind::VirtualMachineInstance, vmi(&[], leaving));
    assert!(state(&cluster).is_err());

    // There it is the target's pod that holds it.
    let mut there = vmi(&["data"], entry);
    there["status"]["nodeName"] = json!("node2");
    there["status"]["migrationState"] = json!({"migrationUid": "move-uid", "sourceNode": "node1", "targetNode": "node2",
        "targetPod": "target", "sourcePod": "x", "completed": true, "endTimestamp": "2026-01-01T00:00:00Z"});
    cluster.put(Kind::VirtualMachineInstance, there);
    cluster.step(&vmi_key());
    let held = told(&cluster).status.volume_status.remove(0).hotplug_volume.expect("a pod");
    assert_eq!(held.attach_pod_uid, Some(uid));
}
