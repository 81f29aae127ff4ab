//! Guests that get a new launcher on their node: their memory stays where it is.

use crate::common::{Cluster, rom_vmi, status};
use crate::stage::{annotated, is_over, migration, phase};
use kube::api::{DynamicObject, Patch};
use serde_json::json;

/// Less than the guest's memory by far: what is sent is the machine without it.
const FEW_BYTES: u64 = 2 << 20;

fn bytes_sent(vmi: &DynamicObject) -> u64 {
    status(vmi, "migrationState/progress/bytesProcessed").parse().expect("bytes")
}

impl Cluster {
    /// The guest has moved within its node, without a copy of its memory, and lives.
    async fn stayed(&self, name: &str, vmi: &str, node: &str, old_pod: &str) -> String {
        let m = self.comes_to(name, "Succeeded").await;
        assert_eq!(status(&m, "migrationState/sourceNode"), node, "{}", m.data);
        assert_eq!(status(&m, "migrationState/targetNode"), node, "{}", m.data);
        let (pod, at) = self.only_launcher(vmi).await;
        assert_eq!(at, node);
        assert_ne!(pod, old_pod);
        let found = self.vmis().get(vmi).await.expect("VMI");
        assert_eq!(status(&found, "migrationState/targetPod"), pod, "{}", found.data);
        assert_eq!(status(&found, "migrationState/progress/memory"), "ByReference", "{}", found.data);
        assert!(bytes_sent(&found) < FEW_BYTES, "{}", found.data);
        // Each page is verified when the guest comes back to it.
        self.beats_on(vmi, &pod).await;
        pod
    }

    async fn beats_on(&self, vmi: &str, pod: &str) {
        self.beats_in(pod).await;
        let found = self.vmis().get(vmi).await.expect("VMI");
        assert_eq!(phase(&found), "Running", "{}", found.data);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_gets_a_new_launcher_on_its_node_and_its_memory_is_not_copied() {
    let cluster = Cluster::with_rom(2, 64).await;
    cluster.wait(&cluster.kubevirt(), "kubevirt", "it is there", |_| true).await;
    let strategy = json!({"spec": {"workloadUpdateStrategy": {"workloadUpdateMethods": ["LiveMigrate"]}}});
    let merge = Patch::Merge(strategy);
    cluster.kubevirt().patch("kubevirt", &Default::default(), &merge).await.expect("patch the KubeVirt CR");
    cluster.start_rom_guest("demo").await;
    let (first, node) = cluster.only_launcher("demo").await;

    // By hand: the node is named.
    let mut by_hand = migration("stay", "demo");
    by_hand["spec"]["addedNodeSelector"] = json!({"kubernetes.io/hostname": node});
    cluster.apply(by_hand).await.expect("apply VMIM");
    let second = cluster.stayed("stay", "demo", &node, &first).await;

    // As after an update: the launcher's pod is of an older version.
    let older = Patch::Merge(json!({"metadata": {"annotations": {"godwit.io/launcher-version": "0.0.0-older"}}}));
    cluster.pods().patch(&second, &Default::default(), &older).await.expect("patch the pod");
    let updated = |vmi: &DynamicObject| {
        let pod = status(vmi, "migrationState/targetPod");
        pod != second && status(vmi, "migrationState/completed") == "true"
    };
    cluster.wait(&cluster.vmis(), "demo", "its launcher is replaced", updated).await;
    let all = cluster.migrations().list(&Default::default()).await.expect("VMIMs");
    let names = all.items.iter().filter_map(|m| m.metadata.name.clone());
    let name = names.into_iter().find(|name| name.starts_with("kubevirt-workload-update-")).expect("an update's VMIM");
    cluster.stayed(&name, "demo", &node, &second).await;
    let label = |vmi: &DynamicObject| {
        vmi.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key("kubevirt.io/outdatedLauncherImage"))
    };
    cluster.wait(&cluster.vmis(), "demo", "it is not outdated any more", |vmi| !label(vmi)).await;
    let none = |kubevirt: &DynamicObject| status(kubevirt, "outdatedVirtualMachineInstanceWorkloads") == "0";
    cluster.wait(&cluster.kubevirt(), "kubevirt", "no launcher is outdated", none).await;

    // Other migrations leave the node, also from a pod that has stayed there.
    cluster.migrate("demo", "leave").await;
    let m = cluster.comes_to("leave", "Succeeded").await;
    assert_ne!(status(&m, "migrationState/targetNode"), node, "{}", m.data);
    let (pod, _) = cluster.only_launcher("demo").await;
    cluster.beats_on("demo", &pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_memory_is_its_own_stays_with_a_copy_and_a_cancelled_update_leaves_it_alone() {
    let cluster = Cluster::with_noisy_rom(1, 64).await;
    cluster.start_on(annotated(rom_vmi("copied"), "godwit.io/guest-memory", "private"), "node1").await;
    let (first, node) = cluster.only_launcher("copied").await;
    let stay = |name: &str, vmi: &str| {
        let mut stay = migration(name, vmi);
        stay["spec"]["addedNodeSelector"] = json!({"kubernetes.io/hostname": node});
        stay
    };
    cluster.apply(stay("copy", "copied")).await.expect("apply VMIM");
    cluster.comes_to("copy", "Succeeded").await;
    let (second, at) = cluster.only_launcher("copied").await;
    assert!(second != first && at == node);
    let vmi = cluster.vmis().get("copied").await.expect("VMI");
    assert_eq!(status(&vmi, "migrationState/progress/memory"), "", "{}", vmi.data);
    assert!(bytes_sent(&vmi) > FEW_BYTES, "{}", vmi.data);
    cluster.beats_on("copied", &second).await;

    cluster.start_on(annotated(rom_vmi("shared"), "godwit.io/guest-memory", "shareable"), "node1").await;
    let (pod, _) = cluster.only_launcher("shared").await;
    let held = annotated(stay("held", "shared"), "godwit.io/bandwidth-per-migration", "1");
    cluster.apply(held).await.expect("apply VMIM");
    cluster.comes_to("held", "Running").await;
    cluster.cancel("held").await;
    assert_eq!(cluster.only_launcher("shared").await, (pod.clone(), node.clone()));
    cluster.beats_on("shared", &pod).await;
    cluster.apply(stay("again", "shared")).await.expect("apply VMIM");
    let m = cluster.wait(&cluster.migrations(), "again", "it is over", is_over).await;
    assert_eq!(phase(&m), "Succeeded", "{}", m.data);
    cluster.stayed("again", "shared", &node, &pod).await;
}
