//! A running guest's volumes move to other claims, or do not.

use crate::common::{Cluster, qemus, rom_vmi, status};
use crate::stage::{condition, phase};
use godwit_guest_rom::Parameters;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// So slow that a copy is seen under way, and so fast that what is in flight ends.
const SLOW: &str = "64Ki";

fn claim_of(vmi: &DynamicObject) -> &str {
    vmi.data.pointer("/spec/volumes/0/persistentVolumeClaim/claimName").and_then(Value::as_str).unwrap_or_default()
}

/// What is said of a change of volumes that is under way; empty when there is none.
fn change(object: &DynamicObject) -> String {
    let said = condition(object, "VolumesChange").map(|c| c["message"].as_str().unwrap_or("-").to_owned());
    said.unwrap_or_default()
}

impl Cluster {
    /// A cluster whose guests write to their disks all the time, and check each block before they write it again.
    async fn with_disks() -> Self {
        let cluster = Self::start(2).await;
        cluster.build_rom_image(Parameters { disk_blocks: 64, disk_stride: 16, ..Parameters::default() });
        cluster.configure(json!({"completionTimeoutPerGiB": 0, "progressTimeout": 0})).await;
        cluster
    }

    async fn claim(&self, name: &str, class: &str, mode: &str, size: &str) {
        self.claim_of("Filesystem", name, class, mode, size).await;
    }

    async fn claim_of(&self, volume_mode: &str, name: &str, class: &str, mode: &str, size: &str) {
        let spec = json!({
            "volumeMode": volume_mode, "storageClassName": class, "accessModes": [mode], "resources": {"requests": {"storage": size}},
        });
        let claim =
            json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec});
        self.apply(claim).await.expect("apply");
    }

    /// Has the VM `mover` name this claim.
    async fn name_claim(&self, claim: &str) {
        let mut spec = rom_vmi("mover")["spec"].clone();
        spec["domain"]["devices"]["disks"] = json!([{"name": "data", "disk": {"bus": "virtio"}}]);
        spec["volumes"] = json!([{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]);
        let vm = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "mover"},
            "spec": {
                "runStrategy": "Always", "updateVolumesStrategy": "Migration",
                "template": {"metadata": {}, "spec": spec},
            },
        });
        self.apply(vm).await.expect("apply");
    }

    /// Starts the guest on claim `here`; its pod and node.
    async fn start_mover(&self, volume_mode: &str) -> (String, String) {
        self.claim_of(volume_mode, "here", "local", "ReadWriteOnce", "8Mi").await;
        self.name_claim("here").await;
        self.wait(&self.vmis(), "mover", "it runs", |vmi| phase(vmi) == "Running").await;
        let (pod, node) = self.only_launcher("mover").await;
        self.beats_in(&pod).await;
        (pod, node)
    }

    /// The one migration that moves volumes, once it copies.
    async fn moving(&self) -> DynamicObject {
        let copies = |vmi: &DynamicObject| !status(vmi, "migrationState/startTimestamp").is_empty();
        let copying = |vmi: &DynamicObject| copies(vmi) && status(vmi, "migrationState/completed").is_empty();
        let vmi = self.wait(&self.vmis(), "mover", "its volume is copied", copying).await;
        let name = status(&vmi, "migrationState/migrationUid");
        let all = self.migrations().list(&Default::default()).await.expect("list").items;
        all.into_iter().find(|m| m.metadata.uid.as_deref() == Some(&name)).expect("its migration")
    }

    /// The guest has come to this claim, with all that it has written.
    async fn arrives(&self, claim: &str, from: &str) {
        let there = |vmi: &DynamicObject| {
            claim_of(vmi) == claim && status(vmi, "nodeName") != from && status(vmi, "migratedVolumes").is_empty()
        };
        self.wait(&self.vmis(), "mover", "it is on the other claim", there).await;
        let (pod, _) = self.only_launcher("mover").await;
        self.beats_in(&pod).await;
        let over = |vm: &DynamicObject| status(vm, "volumeUpdateState").is_empty() && change(vm).is_empty();
        self.wait(&self.vms(), "mover", "the change is over", over).await;
    }

    /// The change is taken back, and nothing has happened to the guest.
    async fn is_back(&self, (pod, node): &(String, String)) {
        let back = |vmi: &DynamicObject| {
            claim_of(vmi) == "here" && change(vmi).is_empty() && status(vmi, "migratedVolumes").is_empty()
        };
        self.wait(&self.vmis(), "mover", "the change is taken back", back).await;
        self.stays("mover", node, pod).await;
        let over = |vm: &DynamicObject| status(vm, "volumeUpdateState").is_empty() && change(vm).is_empty();
        self.wait(&self.vms(), "mover", "nothing is changed any more", over).await;
    }

    /// The VM says that a try failed, with this in its words.
    async fn fails_with(&self, why: &str) {
        let failed = |vm: &DynamicObject| change(vm).contains("the last migration failed") && change(vm).contains(why);
        self.wait(&self.vms(), "mover", &format!("it says {why:?}"), failed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_claims_is_cancelled_by_naming_the_old_one_and_made_by_naming_the_new_one_again() {
    let cluster = Cluster::with_disks().await;
    let home = cluster.start_mover("Filesystem").await;
    cluster.claim("there", "local", "ReadWriteOnce", "8Mi").await;
    cluster.configure(json!({"bandwidthPerMigration": SLOW})).await;
    cluster.name_claim("there").await;
    let moving = cluster.moving().await.metadata.name.expect("a name");
    cluster.name_claim("here").await;
    cluster.is_back(&home).await;
    let given_up = cluster.migrations().get_opt(&moving).await.expect("get");
    assert!(given_up.as_ref().is_none_or(|m| phase(m) == "Failed"), "{given_up:?}");

    // What was copied of it so far lies on that claim, and is in nobody's way.
    cluster.configure(json!({"bandwidthPerMigration": "0"})).await;
    cluster.name_claim("there").await;
    cluster.arrives("there", &home.1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_that_cannot_arrive_leave_their_guest_and_the_vm_says_why() {
    let cluster = Cluster::with_disks().await;
    let home = cluster.start_mover("Filesystem").await;

    // Somebody's data is on it.
    cluster.claim("taken", "shared", "ReadWriteMany", "8Mi").await;
    let bound = |claim: &DynamicObject| phase(claim) == "Bound";
    let claims = cluster.api("", "v1", "PersistentVolumeClaim");
    let taken = cluster.wait(&claims, "taken", "it is bound", bound).await;
    let volume = taken.data["spec"]["volumeName"].as_str().expect("a volume").to_owned();
    let image: PathBuf = cluster.data_dir().join("shared").join(volume).join("disk.img");
    std::fs::create_dir_all(image.parent().expect("a folder")).expect("make the folder");
    std::fs::write(&image, b"precious").expect("write");
    cluster.name_claim("taken").await;
    cluster.fails_with("is not blank").await;
    cluster.name_claim("here").await;
    cluster.is_back(&home).await;
    assert_eq!(std::fs::read(&image).expect("read"), b"precious");

    // How large its volume is, is known only at the target.
    cluster.claim("small", "local", "ReadWriteOnce", "4Mi").await;
    cluster.name_claim("small").await;
    cluster.fails_with("the destination volume is smaller than the source volume").await;
    cluster.name_claim("here").await;
    cluster.is_back(&home).await;

    // The target dies in the middle. It is tried again, and comes.
    cluster.claim("there", "local", "ReadWriteOnce", "8Mi").await;
    cluster.configure(json!({"bandwidthPerMigration": SLOW})).await;
    cluster.name_claim("there").await;
    cluster.moving().await;
    let target = status(&cluster.vmis().get("mover").await.expect("VMI"), "migrationState/targetPod");
    cluster.configure(json!({"bandwidthPerMigration": "0"})).await;
    let gone = kube::api::DeleteParams::default().grace_period(0);
    cluster.pods().delete(&target, &gone).await.expect("delete");
    cluster.fails_with("").await;
    cluster.stays("mover", &home.1, &home.0).await;
    cluster.arrives("there", &home.1).await;
}

/// Machines without loop devices (some containers) cannot run it: nothing else makes a block device of a file.
#[tokio::test(flavor = "multi_thread")]
async fn claims_of_block_devices_are_disks_that_move_and_take_what_moves() {
    if !Path::new("/dev/loop-control").exists() {
        println!("SKIPPED: no /dev/loop-control on this machine");
        return;
    }
    let cluster = Cluster::with_disks().await;
    let (_, node) = cluster.start_mover("Block").await;
    let on_device = async |what: &str| {
        let vmi = cluster.vmis().get("mover").await.expect("VMI");
        let running = qemus(&vmi);
        assert_eq!(running.len(), 1, "{running:?}");
        assert!(running[0].1.contains("file.driver=host_device"), "{what}: {}", running[0].1);
    };
    on_device("at its start").await;

    // Larger than the guest's disk, which stays as it is.
    cluster.claim_of("Block", "everywhere", "shared", "ReadWriteMany", "16Mi").await;
    cluster.name_claim("everywhere").await;
    cluster.arrives("everywhere", &node).await;
    on_device("on the shared claim").await;
    let size = |vmi: &DynamicObject| status(vmi, "volumeStatus/0/size") == (8 << 20).to_string();
    cluster.wait(&cluster.vmis(), "mover", "its disk is as large as it was", size).await;

    // Both nodes see it.
    let shared = |vmi: &DynamicObject| condition(vmi, "LiveMigratable").is_some_and(|c| c["status"] == "True");
    cluster.wait(&cluster.vmis(), "mover", "it can be moved on", shared).await;
    cluster.migrate("mover", "back").await;
    assert_eq!(cluster.has_moved("mover", "back").await, node);
    cluster.only_launcher("mover").await;
    on_device("at the other node").await;

    // And into a file.
    cluster.claim("file", "local", "ReadWriteOnce", "8Mi").await;
    cluster.name_claim("file").await;
    cluster.arrives("file", &node).await;
}
