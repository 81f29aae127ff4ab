//! Disks that come and go while the guest runs, as `virtctl addvolume` and `virtctl removevolume` ask for them.

use super::view::{hardware, place};
use super::{build_demo_image, claim, condition, linux_vmi, runs, succeeds};
use crate::common::{Cluster, qemus, status};
use kube::api::DynamicObject;
use serde_json::{Value, json};

/// What `virtctl addvolume GUEST --volume-name=CLAIM` sends, without options for the disk.
pub fn add_options(claim: &str) -> Value {
    json!({
        "name": claim, "disk": {"disk": {"bus": "scsi"}, "serial": claim},
        "volumeSource": {"persistentVolumeClaim": {"claimName": claim, "hotpluggable": true}},
    })
}

/// Asks for an action on a VM or VMI: the answer's code, and its message when it is a refusal.
async fn ask(cluster: &Cluster, resource: &str, name: &str, action: &str, options: &Value) -> (u16, String) {
    cluster.put_action(None, (resource, name, action), options).await
}

fn volume<'a>(vmi: &'a DynamicObject, name: &str) -> &'a Value {
    let all = vmi.data.pointer("/status/volumeStatus").and_then(Value::as_array);
    all.and_then(|all| all.iter().find(|volume| volume["name"] == name)).unwrap_or(&Value::Null)
}

/// Waits until the guest has this disk, and says how it is called.
pub async fn is_ready(cluster: &Cluster, vmi: &str, name: &str) -> String {
    let ready = |vmi: &DynamicObject| volume(vmi, name)["phase"] == "Ready";
    let vmi = cluster.wait(&cluster.vmis(), vmi, &format!("it has the disk {name}"), ready).await;
    let told = volume(&vmi, name);
    let pod = told["hotplugVolume"]["attachPodName"].as_str().expect("an attachment pod");
    assert!(pod.starts_with("hp-volume-"), "{told}");
    assert_eq!(told["message"], format!("Successfully attach hotplugged volume {name} to VM"), "{told}");
    told["target"].as_str().expect("a target").to_owned()
}

async fn attachments(cluster: &Cluster) -> Vec<String> {
    let all = cluster.pods().list(&kube::api::ListParams::default().labels("kubevirt.io=hotplug-disk")).await;
    all.expect("list").items.into_iter().filter_map(|pod| pod.metadata.name).collect()
}

/// Waits until the guest has written to its disk and reads back all of it, and that nothing of it is wrong.
async fn has_written(cluster: &Cluster, vmi: &str, more_than: u64) -> u64 {
    let acknowledged = |facts: &Value| facts["disks"][0]["acknowledged"].as_u64().unwrap_or(0);
    let facts = hardware(cluster, vmi, "/verify", |facts| acknowledged(facts) > more_than).await;
    assert_eq!(facts["disks"][0]["wrongBlocks"], 0, "{facts:#}");
    acknowledged(&facts)
}

fn serials(hardware: &Value) -> Vec<&str> {
    let disks = hardware["disks"].as_array().expect("disks");
    disks.iter().filter_map(|disk| disk["serial"].as_str()).collect()
}

/// Discovery names the actions, and roles are asked about them as about anything else.
async fn may_be_asked_for_by_editors(cluster: &Cluster, vmi: &str) {
    let served = http::Request::get("/apis/subresources.kubevirt.io/v1").body(Vec::new()).expect("request");
    let served: Value = cluster.client.request(served).await.expect("discovery");
    let names: Vec<&str> =
        served["resources"].as_array().expect("resources").iter().filter_map(|one| one["name"].as_str()).collect();
    for name in ["virtualmachineinstances/addvolume", "virtualmachines/removevolume"] {
        assert!(names.contains(&name), "{names:?}");
    }
    let mut dry = add_options("data");
    dry["dryRun"] = json!(["All"]);
    let path = ("virtualmachineinstances", vmi, "addvolume");
    let (code, message) = cluster.put_action(Some("editor"), path, &dry).await;
    let forbidden =
        "cannot update resource \"virtualmachineinstances/addvolume\" in API group \"subresources.kubevirt.io\"";
    assert!(code == 403 && message.contains(forbidden), "{code} {message}");
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "editor"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "kubevirt.io:edit"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "editor"}]});
    cluster.apply(binding).await.expect("apply");
    assert_eq!(cluster.put_action(Some("editor"), path, &dry).await.0, 202);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_plugged_in_written_to_taken_along_and_taken_out() {
    let cluster = Cluster::start(2).await;
    build_demo_image(&cluster);
    for object in [
        claim("data", "shared", "ReadWriteMany"),
        claim("more", "shared", "ReadWriteMany"),
        claim("own", "local", "ReadWriteOnce"),
    ] {
        cluster.apply(object).await.expect("apply");
    }
    let mut vmi = linux_vmi("plugged", "masquerade");
    vmi["spec"]["domain"]["firmware"]["kernelBoot"]["kernelArgs"] =
        json!("console=ttyS0 quiet godwit.hostname=plugged godwit.disks=sda");
    cluster.apply(vmi).await.expect("apply");
    runs(&cluster, "plugged").await;
    let instances = "virtualmachineinstances";
    let add = async |claim: &str| ask(&cluster, instances, "plugged", "addvolume", &add_options(claim)).await;
    let remove = async |name: &str| ask(&cluster, instances, "plugged", "removevolume", &json!({"name": name})).await;

    may_be_asked_for_by_editors(&cluster, "plugged").await;

    // Nothing is done on a dry run, and virtctl is told which VM there is not.
    let mut dry = add_options("data");
    dry["dryRun"] = json!(["All"]);
    assert_eq!(ask(&cluster, instances, "plugged", "addvolume", &dry).await.0, 202);
    let (code, message) = ask(&cluster, "virtualmachines", "plugged", "addvolume", &add_options("data")).await;
    assert_eq!((code, message.as_str()), (404, "virtualmachine.kubevirt.io \"plugged\" not found"));
    let spec = cluster.vmis().get("plugged").await.expect("VMI").data["spec"].clone();
    assert!(spec["volumes"].is_null(), "{spec}");

    assert_eq!(add("data").await.0, 202);
    assert_eq!(is_ready(&cluster, "plugged", "data").await, "sda");
    let (code, message) = add("data").await;
    let taken = "Operation cannot be fulfilled on virtualmachineinstance.kubevirt.io \"plugged\": Unable to add volume \
                 [data] because volume with that name already exists";
    assert_eq!((code, message.as_str()), (409, taken));
    has_written(&cluster, "plugged", 0).await;

    // A second one, which goes again.
    assert_eq!(add("more").await.0, 202);
    assert_eq!(is_ready(&cluster, "plugged", "more").await, "sdb");
    let seen = hardware(&cluster, "plugged", "/hardware", |seen| serials(seen).contains(&"more")).await;
    assert_eq!(serials(&seen), ["data", "more"], "{seen:#}");
    assert_eq!(attachments(&cluster).await.len(), 2);

    // It moves there and back with both, and what it wrote is on them.
    let shared = |vmi: &DynamicObject| condition(vmi, "LiveMigratable")["status"] == "True";
    cluster.wait(&cluster.vmis(), "plugged", "it can move", shared).await;
    let mut written = has_written(&cluster, "plugged", 0).await;
    for round in ["away", "home"] {
        cluster.migrate("plugged", round).await;
        succeeds(&cluster, round).await;
        written = has_written(&cluster, "plugged", written).await;
        let held_by_target = |vmi: &DynamicObject| {
            let uid = status(vmi, "migrationState/targetAttachmentPodUID");
            !uid.is_empty()
                && ["data", "more"].iter().all(|name| volume(vmi, name)["hotplugVolume"]["attachPodUID"] == uid)
        };
        cluster.wait(&cluster.vmis(), "plugged", "its claims are held at the target", held_by_target).await;
        let seen = hardware(&cluster, "plugged", "/hardware", |_| true).await;
        assert_eq!(serials(&seen), ["data", "more"], "{round}: {seen:#}");
    }

    assert_eq!(remove("more").await.0, 202);
    let gone = |vmi: &DynamicObject| volume(vmi, "more").is_null() && volume(vmi, "data")["phase"] == "Ready";
    cluster.wait(&cluster.vmis(), "plugged", "the disk is gone", gone).await;
    let seen = hardware(&cluster, "plugged", "/hardware", |seen| !serials(seen).contains(&"more")).await;
    assert_eq!(serials(&seen), ["data"], "{seen:#}");
    has_written(&cluster, "plugged", written).await;
    let (code, message) = remove("more").await;
    assert!(code == 409 && message.ends_with("Unable to remove volume [more] because it does not exist"), "{message}");

    // One that only its node has keeps the guest there, as any other would.
    assert_eq!(add("own").await.0, 202);
    is_ready(&cluster, "plugged", "own").await;
    let stays = |vmi: &DynamicObject| condition(vmi, "LiveMigratable")["reason"] == "DisksNotLiveMigratable";
    let vmi = cluster.wait(&cluster.vmis(), "plugged", "it stays", stays).await;
    let message = condition(&vmi, "LiveMigratable")["message"].as_str().expect("a message").to_owned();
    assert!(message.starts_with("cannot migrate VMI: PVC own is not shared"), "{message}");
    assert_eq!(remove("own").await.0, 202);
    cluster.wait(&cluster.vmis(), "plugged", "it can move again", shared).await;

    cluster.vmis().delete("plugged", &Default::default()).await.expect("delete");
    cluster.wait_gone(&cluster.vmis(), "plugged").await;
    for pod in attachments(&cluster).await {
        cluster.wait_gone(&cluster.pods(), &pod).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_added_to_a_vm_comes_at_once_and_after_each_start() {
    let cluster = Cluster::start(1).await;
    build_demo_image(&cluster);
    cluster.apply(claim("data", "shared", "ReadWriteMany")).await.expect("apply");
    let mut spec = linux_vmi("kept", "masquerade")["spec"].clone();
    spec["domain"]["firmware"]["kernelBoot"]["kernelArgs"] =
        json!("console=ttyS0 quiet godwit.hostname=kept godwit.disks=sda");
    let vm = json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "kept"},
        "spec": {"runStrategy": "Always", "template": {"metadata": {}, "spec": spec}}});
    cluster.apply(vm).await.expect("apply");
    let first = runs(&cluster, "kept").await;
    let (code, message) = ask(&cluster, "virtualmachineinstances", "kept", "addvolume", &add_options("data")).await;
    assert_eq!((code, message.as_str()), (400, "VMI default/kept is owned by a VM"));
    assert_eq!(ask(&cluster, "virtualmachines", "kept", "addvolume", &add_options("data")).await.0, 202);
    is_ready(&cluster, "kept", "data").await;
    has_written(&cluster, "kept", 0).await;

    cluster.vmis().delete("kept", &Default::default()).await.expect("delete");
    let again = |vmi: &DynamicObject| vmi.metadata.uid != first.metadata.uid && status(vmi, "phase") == "Running";
    cluster.wait(&cluster.vmis(), "kept", "it runs again", again).await;
    is_ready(&cluster, "kept", "data").await;
    has_written(&cluster, "kept", 0).await;

    assert_eq!(ask(&cluster, "virtualmachines", "kept", "removevolume", &json!({"name": "data"})).await.0, 202);
    let gone = |vmi: &DynamicObject| volume(vmi, "data").is_null();
    let vmi = cluster.wait(&cluster.vmis(), "kept", "the disk is gone", gone).await;
    assert_eq!(qemus(&vmi).len(), 1, "the guest runs on");
    assert!(!place(&cluster, "kept").await.is_empty());
}
