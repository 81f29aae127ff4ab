//! What of a guest outlives its VMI: `persistent: true` of TPM and EFI.

use super::view::hardware;
use super::{build_demo_image, condition, linux_vmi, runs, succeeds};
use crate::common::{Cluster, status};
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch};
use serde_json::{Value, json};

/// From now on claims of this class are made.
pub async fn keep_on(cluster: &Cluster, class: &str) {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
    let api: Api<DynamicObject> = Api::namespaced_with(cluster.client.clone(), "kubevirt", &resource);
    let patch = Patch::Merge(json!({"spec": {"configuration": {"vmStateStorageClass": class}}}));
    api.patch("kubevirt", &Default::default(), &patch).await.expect("patch");
}

pub async fn start(cluster: &Cluster, name: &str, change: impl Fn(&mut Value)) {
    let mut spec = linux_vmi(name, "masquerade")["spec"].take();
    spec["domain"]["memory"] = json!({"guest": "256Mi"});
    spec["domain"]["devices"]["tpm"] = json!({"persistent": true});
    change(&mut spec);
    let vm = json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": name},
        "spec": {"runStrategy": "Always", "template": {"metadata": {}, "spec": spec}}});
    cluster.apply(vm).await.expect("apply");
}

/// The claims with a guest's state, as (name, access mode).
async fn claims(cluster: &Cluster, vm: &str) -> Vec<(String, String)> {
    let all = cluster.api("", "v1", "PersistentVolumeClaim").list(&Default::default()).await.expect("list").items;
    let prefix = format!("persistent-state-for-{vm}-");
    let named = all.into_iter().filter_map(|claim| Some((claim.metadata.name.clone()?, claim)));
    let ours = named.filter(|(name, _)| name.starts_with(&prefix));
    ours.map(|(name, claim)| (name, claim.data["spec"]["accessModes"][0].as_str().unwrap_or_default().to_owned()))
        .collect()
}

/// The claim that the VMI says its state is on.
fn shown(vmi: &DynamicObject) -> Option<&str> {
    let volumes = vmi.data.pointer("/status/volumeStatus").and_then(Value::as_array)?;
    let volume = volumes.iter().find(|volume| volume["name"] == "persistent-state-for-this-vm")?;
    volume["persistentVolumeClaimInfo"]["claimName"].as_str()
}

/// The EFI variables that count, as they are on a shared claim.
async fn current_variables(cluster: &Cluster, claim: &str) -> Vec<u8> {
    let claim = cluster.api("", "v1", "PersistentVolumeClaim").get(claim).await.expect("claim");
    let folder = cluster.data_dir().join("shared").join(claim.data["spec"]["volumeName"].as_str().expect("bound"));
    let current: Value =
        serde_json::from_slice(&std::fs::read(folder.join("current.json")).expect("current")).expect("JSON");
    let migration = cluster.migrations().get("away").await.expect("VMIM").metadata.uid;
    assert_eq!(current["efiVariables"].as_str(), migration.as_deref(), "the target's count");
    std::fs::read(folder.join(current["efiVariables"].as_str().expect("a folder")).join("efi-variables.fd"))
        .expect("the variables")
}

/// Stops the VM and starts it again; the new VMI.
async fn restart(cluster: &Cluster, vm: &str) -> DynamicObject {
    for strategy in ["Halted", "Always"] {
        let patch = Patch::Merge(json!({"spec": {"runStrategy": strategy}}));
        cluster.vms().patch(vm, &Default::default(), &patch).await.expect("patch");
        if strategy == "Halted" {
            cluster.wait_gone(&cluster.vmis(), vm).await;
        }
    }
    runs(cluster, vm).await
}

fn kept(hardware: &Value) -> (&Value, &Value) {
    (&hardware["tpmKept"], &hardware["efiKept"])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_stopped_moved_and_started_elsewhere_finds_its_tpm_and_its_efi_variables() {
    let cluster = Cluster::start(2).await;
    build_demo_image(&cluster);
    keep_on(&cluster, "shared").await;
    start(&cluster, "wide", |spec| {
        spec["domain"]["firmware"]["bootloader"] = json!({"efi": {"secureBoot": false, "persistent": true}});
    })
    .await;
    runs(&cluster, "wide").await;
    let before = hardware(&cluster, "wide", "/keep", |_| true).await;
    assert!(before["tpmKept"].is_string() && before["tpmKept"] == before["efiKept"], "{before:#}");
    let [(claim, mode)] = claims(&cluster, "wide").await.try_into().expect("one claim");
    assert_eq!(mode, "ReadWriteMany");

    // Moved while it stands still, with what it has, which is on the claim before it runs.
    let pod = cluster.launchers("wide").await.remove(0).0;
    cluster.with_launcher(&pod, async |launcher| launcher.pause().await.expect("pause")).await;
    cluster.wait(&cluster.vmis(), "wide", "it is paused", |vmi| condition(vmi, "Paused")["status"] == "True").await;
    cluster.migrate("wide", "away").await;
    succeeds(&cluster, "away").await;
    let variables = current_variables(&cluster, &claim).await;
    let name: Vec<u8> = "GodwitKept".bytes().flat_map(|byte| [byte, 0]).collect();
    assert!(variables.windows(name.len()).any(|part| part == name), "the file has not got the variable");
    let pod = status(&cluster.vmis().get("wide").await.expect("VMI"), "migrationState/targetPod");
    cluster.with_launcher(&pod, async |launcher| launcher.unpause().await.expect("unpause")).await;
    // And what it writes there is kept on the same claim.
    let after = hardware(&cluster, "wide", "/hardware", |_| true).await;
    assert_eq!(kept(&after), kept(&before));
    let written = hardware(&cluster, "wide", "/keep", |other| kept(other) != kept(&before)).await;
    assert_eq!(written["tpmKept"], written["efiKept"], "{written:#}");
    // On to another launcher of the same node.
    let node = status(&cluster.vmis().get("wide").await.expect("VMI"), "nodeName");
    cluster
        .apply(json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration", "metadata": {"name": "within"},
            "spec": {"vmiName": "wide", "addedNodeSelector": {"kubernetes.io/hostname": node}},
        }))
        .await
        .expect("apply");
    succeeds(&cluster, "within").await;
    let after = hardware(&cluster, "wide", "/hardware", |_| true).await;
    assert_eq!((kept(&after), &after["tpmRegister"]), (kept(&written), &written["tpmRegister"]));
    let vmi = cluster.vmis().get("wide").await.expect("VMI");
    assert_eq!(status(&vmi, "nodeName"), node);
    assert_eq!(shown(&vmi), Some(claim.as_str()), "{}", vmi.data);
    for end in ["sourcePersistentStatePVCName", "targetPersistentStatePVCName"] {
        assert_eq!(status(&vmi, &format!("migrationState/{end}")), claim);
    }

    // Stopped, and started at another node.
    let nodes = Api::<k8s_openapi::api::core::v1::Node>::all(cluster.client.clone());
    nodes.cordon(&status(&vmi, "nodeName")).await.expect("cordon");
    let again = restart(&cluster, "wide").await;
    assert_ne!(status(&again, "nodeName"), status(&vmi, "nodeName"));
    let found = hardware(&cluster, "wide", "/hardware", |_| true).await;
    assert_eq!(kept(&found), kept(&written));
    // The register is the module's memory for one life; it was switched off.
    assert_ne!(found["tpmRegister"], written["tpmRegister"]);
    assert_eq!(claims(&cluster, "wide").await, [(claim, mode)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tpm_on_a_claim_of_one_node_comes_to_another_claim_with_its_guest() {
    let cluster = Cluster::start(2).await;
    build_demo_image(&cluster);
    keep_on(&cluster, "local").await;
    start(&cluster, "near", |_| {}).await;
    let vmi = runs(&cluster, "near").await;
    assert_eq!(condition(&vmi, "LiveMigratable")["status"], "True", "{}", vmi.data);
    let before = hardware(&cluster, "near", "/keep", |_| true).await;
    assert!(before["tpmKept"].is_string(), "{before:#}");
    let [first] = claims(&cluster, "near").await.try_into().expect("one claim");
    assert_eq!(first.1, "ReadWriteOnce");

    // One that finds no node leaves nothing behind.
    cluster
        .apply(json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration", "metadata": {"name": "nowhere"},
            "spec": {"vmiName": "near", "addedNodeSelector": {"nowhere": "here"}},
        }))
        .await
        .expect("apply");
    let waits = |migration: &DynamicObject| status(migration, "phase") == "Scheduling";
    cluster.wait(&cluster.migrations(), "nowhere", "it has a pod", waits).await;
    cluster.migrations().delete("nowhere", &Default::default()).await.expect("delete");
    cluster.wait_gone(&cluster.migrations(), "nowhere").await;
    assert_eq!(claims(&cluster, "near").await, std::slice::from_ref(&first));

    cluster.migrate("near", "away").await;
    succeeds(&cluster, "away").await;
    let written = hardware(&cluster, "near", "/keep", |other| other["tpmKept"] != before["tpmKept"]).await;
    let settled = |vmi: &DynamicObject| shown(vmi).is_some_and(|claim| claim != first.0);
    let vmi = cluster.wait(&cluster.vmis(), "near", "its state is on another claim", settled).await;
    assert_eq!(status(&vmi, "migrationState/sourcePersistentStatePVCName"), first.0);
    assert_eq!(Some(status(&vmi, "migrationState/targetPersistentStatePVCName").as_str()), shown(&vmi));
    cluster.wait_gone(&cluster.api("", "v1", "PersistentVolumeClaim"), &first.0).await;

    let again = restart(&cluster, "near").await;
    assert_eq!(status(&again, "nodeName"), status(&vmi, "nodeName"), "its claim is there");
    let found = hardware(&cluster, "near", "/hardware", |_| true).await;
    assert_eq!(found["tpmKept"], written["tpmKept"]);
    assert_eq!(shown(&again), shown(&vmi));
}
