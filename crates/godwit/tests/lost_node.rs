//! A node dies with all that runs on it. Its VMs are started elsewhere, as their run strategies say, and nobody has to delete a pod; a
//! migration that was on its way ends as it should, whichever end died. A node that was only cut off has ended its guests before.
//! Who runs when is told by the guests' own frames.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{Cluster, ROM_IMAGE, status};
use godwit_bench::witness::{Beat, Station, Witness, overlap};
use godwit_guest_rom::Parameters;
use godwit_standalone::Layout;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::time::{Duration, Instant, SystemTime};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const MOMENT: Duration = Duration::from_millis(20);
/// The node that dies.
const DEAD: &str = "node1";

/// VMs, and the number in the address of each one's frames.
const VMS: [(&str, u8); 6] = [("always", 1), ("once", 2), ("manual", 3), ("local", 4), ("leaving", 5), ("coming", 6)];

fn station(vm: &str) -> Station {
    let (_, number) = VMS.iter().find(|(name, _)| *name == vm).expect("one of the VMs");
    [2, 0x66, 0, 0, 1, *number]
}

/// A VM that would like to run on a node.
fn vm(name: &str, strategy: &str, node: &str) -> Value {
    let mac = station(name).map(|byte| format!("{byte:02x}")).join(":");
    let wish = json!({"key": "kubernetes.io/hostname", "operator": "In", "values": [node]});
    let affinity = json!({"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 100, "preference": {"matchExpressions": [wish]}},
    ]}});
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": name},
        "spec": {"runStrategy": strategy, "template": {"metadata": {}, "spec": {
            "terminationGracePeriodSeconds": 0,
            "affinity": affinity,
            "domain": {
                "memory": {"guest": "16Mi"},
                "devices": {
                    "interfaces": [{"name": "w", "bridge": {}, "model": "rtl8139", "macAddress": mac}],
                },
                "firmware": {"kernelBoot": {"container": {"image": ROM_IMAGE, "kernelPath": "/boot/rom.bin"}}},
            },
            "networks": [{"name": "w", "multus": {"networkName": "witness"}}],
        }}},
    })
}

/// The same with a disk on a claim that only one node can reach.
fn with_local_disk(mut vm: Value) -> Value {
    let spec = &mut vm["spec"]["template"]["spec"];
    spec["domain"]["devices"]["disks"] = json!([{"name": "disk", "disk": {"bus": "virtio"}}]);
    spec["volumes"] = json!([{"name": "disk", "persistentVolumeClaim": {"claimName": "local-disk"}}]);
    vm
}

struct Stage {
    cluster: Cluster,
    witness: Witness,
}

impl Stage {
    async fn start() -> Self {
        let cluster = Cluster::start(3).await;
        cluster.build_rom_image(Parameters { frame_ticks: 2, ..Parameters::default() });
        let config = json!({"cniVersion": "0.3.1", "name": "witness", "type": "bridge", "bridge": "br-witness"});
        let network = json!({
            "apiVersion": "k8s.cni.cncf.io/v1", "kind": "NetworkAttachmentDefinition",
            "metadata": {"name": "witness"}, "spec": {"config": config.to_string()},
        });
        cluster.apply(network).await.expect("apply the network");
        // What is on its way stays so.
        let migrations = json!({"bandwidthPerMigration": "1", "completionTimeoutPerGiB": 0, "progressTimeout": 0});
        let slow = json!({"spec": {"configuration": {"migrations": migrations}}});
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
        let kubevirts: Api<DynamicObject> = Api::namespaced_with(cluster.client.clone(), "kubevirt", &resource);
        kubevirts.patch("kubevirt", &PatchParams::default(), &Patch::Merge(&slow)).await.expect("configure");
        let claim = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "local-disk"},
            "spec": {"storageClassName": "local", "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "1Mi"}}},
        });
        cluster.apply(claim).await.expect("apply the claim");
        let layout =
            Layout::open(cluster.data_dir()).expect("layout").load().expect("cluster.json").expect("a cluster");
        let witness = Witness::start(&layout).expect("a witness");
        Self { cluster, witness }
    }

    fn beats(&self, vm: &str) -> Vec<Beat> {
        self.witness.beats(station(vm))
    }

    /// Waits until the guest is heard after this moment.
    async fn beats_after(&self, vm: &str, moment: SystemTime) -> Beat {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(beat) = self.witness.since(station(vm), moment).last {
                return beat;
            }
            assert!(Instant::now() < deadline, "{vm} is not heard\n{}", self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    async fn vmi(&self, vm: &str, what: &str, wanted: impl Fn(&DynamicObject) -> bool) -> DynamicObject {
        self.cluster.wait(&self.cluster.vmis(), vm, what, wanted).await
    }

    /// Makes a VM, and waits until its guest runs on this node.
    async fn run(&self, vm: Value, node: &str) {
        let name = vm["metadata"]["name"].as_str().expect("a name").to_owned();
        let manual = vm["spec"]["runStrategy"] == "Manual";
        self.cluster.apply(vm).await.expect("apply VM");
        if manual {
            let start = json!({"status": {"stateChangeRequests": [{"action": "Start"}]}});
            let started = self.cluster.vms().patch_status(&name, &PatchParams::default(), &Patch::Merge(&start)).await;
            started.expect("start the VM");
        }
        let runs = |vmi: &DynamicObject| status(vmi, "phase") == "Running" && status(vmi, "nodeName") == node;
        self.vmi(&name, "it runs", runs).await;
        self.beats_after(&name, SystemTime::now()).await;
    }

    /// Asks for a migration, and waits until bytes flow.
    async fn send(&self, vm: &str) {
        self.cluster.migrate(vm, &format!("move-{vm}")).await;
        let flows = |vmi: &DynamicObject| !status(vmi, "migrationState/startTimestamp").is_empty();
        self.vmi(vm, "it is on its way", flows).await;
    }

    fn nodes(&self) -> Api<DynamicObject> {
        Api::all_with(self.cluster.client.clone(), &ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Node")))
    }

    async fn cordon(&self, node: &str, shut: bool) {
        let patch = json!({"spec": {"unschedulable": shut}});
        self.nodes().patch(node, &PatchParams::default(), &Patch::Merge(&patch)).await.expect("cordon");
    }

    /// Kills a node's process, and every process in its pods.
    async fn kill(&self, node: &str) {
        let pods = self.cluster.pods().list(&Default::default()).await.expect("list pods");
        let here = pods.items.iter().filter(|pod| pod.data["spec"]["nodeName"] == node);
        let uids: Vec<&str> = here.filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        kill(self.cluster.pid(node), Signal::SIGKILL).expect("kill the node");
        // Again until nothing is left: one that was being started is not in the first list.
        let deadline = Instant::now() + PATIENCE;
        while kill_in_pods(&uids) > 0 {
            assert!(Instant::now() < deadline, "the pods of {node} do not die");
            tokio::time::sleep(MOMENT).await;
        }
    }

    fn says(vmi: &DynamicObject, condition: &str) -> Option<Value> {
        let conditions = vmi.data.pointer("/status/conditions").and_then(Value::as_array)?;
        conditions.iter().find(|one| one["type"] == condition).cloned()
    }
}

/// Kills what runs in pods; how many processes there were.
fn kill_in_pods(uids: &[&str]) -> usize {
    let mut found = 0;
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let read = |file: &str| {
            String::from_utf8_lossy(&std::fs::read(entry.path().join(file)).unwrap_or_default()).into_owned()
        };
        let (groups, words) = (read("cgroup"), read("cmdline"));
        // A zombie has no command line.
        if !words.is_empty() && uids.iter().any(|uid| groups.contains(uid) || words.contains(uid)) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            found += 1;
        }
    }
    found
}

fn failed_with_its_node(vmi: &DynamicObject) -> bool {
    status(vmi, "phase") == "Failed" && status(vmi, "reason") == "NodeUnresponsive"
}

#[tokio::test(flavor = "multi_thread")]
async fn the_vms_of_a_node_that_dies_run_elsewhere_and_never_twice() {
    let stage = Stage::start().await;
    for (name, strategy) in [("always", "Always"), ("once", "Once"), ("manual", "Manual"), ("leaving", "Always")] {
        stage.run(vm(name, strategy, DEAD), DEAD).await;
    }
    stage.run(with_local_disk(vm("local", "Always", DEAD)), DEAD).await;
    stage.run(vm("coming", "Always", "node2"), "node2").await;
    stage.send("leaving").await;
    let uid = stage.cluster.migrations().get("move-leaving").await.expect("VMIM").metadata.uid.expect("uid");
    let record = format!("move-leaving-{}", uid.get(..8).expect("a UUID"));
    // The other one has only the node to go to that is about to die.
    stage.cordon("node3", true).await;
    stage.send("coming").await;
    stage.cordon("node3", false).await;
    let [stayed] = &stage
        .cluster
        .launchers("coming")
        .await
        .into_iter()
        .filter(|(_, node)| node == "node2")
        .collect::<Vec<_>>()[..]
    else {
        panic!("the guest is not on node2");
    };
    let guests: Vec<(&str, DynamicObject)> = {
        let mut found = Vec::new();
        for (name, _) in VMS {
            found.push((name, stage.cluster.vmis().get(name).await.expect("VMI")));
        }
        found
    };
    let before = |vm: &str| guests.iter().find(|(name, _)| *name == vm).and_then(|(_, vmi)| vmi.metadata.uid.clone());

    stage.kill(DEAD).await;
    let died = SystemTime::now();

    // The guest whose target died stays where it is, and its migration says why.
    let over = |migration: &DynamicObject| status(migration, "phase") == "Failed";
    stage.cluster.wait(&stage.cluster.migrations(), "move-coming", "it has failed", over).await;
    stage.beats_after("coming", SystemTime::now()).await;
    assert_eq!(stage.cluster.vmis().get("coming").await.expect("VMI").metadata.uid, before("coming"));

    // Those that shall run do so elsewhere, and the others say what has become of them.
    for name in ["always", "leaving"] {
        let again = |vmi: &DynamicObject| {
            status(vmi, "phase") == "Running" && status(vmi, "nodeName") != DEAD && vmi.metadata.uid != before(name)
        };
        stage.vmi(name, "it runs elsewhere", again).await;
        let beat = stage.beats_after(name, SystemTime::now()).await;
        assert_ne!(&*beat.node, DEAD);
        let took = stage.witness.since(station(name), died).first.expect("it was heard").at.duration_since(died);
        println!("{name} was heard elsewhere {:.1} s after its node had died", took.unwrap_or_default().as_secs_f64());
    }
    // The migration has gone with its VMI; what remains of it says how it ended.
    let records = stage.cluster.api("godwit.io", "v1alpha1", "MigrationRecord");
    let ended = |record: &DynamicObject| record.data["spec"]["result"] == "Failed";
    let record = stage.cluster.wait(&records, &record, "it has failed", ended).await;
    assert_eq!(record.data["spec"]["reason"], "SourceLost", "{}", record.data);
    for name in ["once", "manual"] {
        let vmi = stage.vmi(name, "it has failed with its node", failed_with_its_node).await;
        assert_eq!(vmi.metadata.uid, before(name));
    }
    let lost = |said: &common::events::Said| said.message.contains("was not heard for");
    stage.cluster.hears_of("Node", DEAD, "that it is lost", lost).await;
    let left_behind = |vmi: &DynamicObject| {
        let told = Stage::says(vmi, "Synchronized");
        vmi.metadata.uid != before("local")
            && told
                .is_some_and(|told| told["message"].as_str().is_some_and(|said| said.contains("local-disk is on node")))
    };
    stage.vmi("local", "it says what it waits for", left_behind).await;

    // The node is back: what only it can reach runs there again, and it takes others.
    let output = stage.cluster.godwit(&["up", "--nodes", "3", "--detach"]);
    assert!(output.status.success(), "{}", common::text(&output.stderr));
    let back = |vmi: &DynamicObject| status(vmi, "phase") == "Running" && status(vmi, "nodeName") == DEAD;
    stage.vmi("local", "it runs on its node", back).await;
    stage.beats_after("local", SystemTime::now()).await;
    stage.cluster.vms().delete("once", &Default::default()).await.expect("delete");
    stage.cluster.wait_gone(&stage.cluster.vms(), "once").await;
    stage.run(vm("once", "Once", DEAD), DEAD).await;

    for (name, _) in VMS {
        assert_eq!(overlap(&stage.beats(name)), None, "{name}");
    }
    let ports: std::collections::BTreeSet<_> = stage.beats("coming").into_iter().map(|beat| beat.port).collect();
    assert_eq!(ports.len(), 1, "it never left {stayed:?}");
}

/// The link is down, and the guest runs on where nobody sees it but the witness of its own node.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_cut_off_comes_back_without_the_guest_that_runs_elsewhere() {
    let stage = Stage::start().await;
    stage.run(vm("always", "Always", DEAD), DEAD).await;
    let uid = stage.cluster.vmis().get("always").await.expect("VMI").metadata.uid;
    stage.cluster.uplink(DEAD, false).await;
    let cut = SystemTime::now();
    let again = |vmi: &DynamicObject| {
        status(vmi, "phase") == "Running" && status(vmi, "nodeName") != DEAD && vmi.metadata.uid != uid
    };
    let vmi = stage.vmi("always", "it runs elsewhere", again).await;
    let beat = stage.beats_after("always", SystemTime::now()).await;
    assert_ne!(&*beat.node, DEAD);
    let beats = stage.beats("always");
    let last = beats.iter().rfind(|beat| &*beat.node == DEAD).expect("it was heard there").at;
    let first = beats.iter().find(|beat| &*beat.node != DEAD).expect("it is heard elsewhere").at;
    println!(
        "it ran for {:.1} s on the node that was cut off, and elsewhere after {:.1} s",
        last.duration_since(cut).unwrap_or_default().as_secs_f64(),
        first.duration_since(cut).unwrap_or_default().as_secs_f64(),
    );

    stage.cluster.uplink(DEAD, true).await;
    let fenced = |said: &common::events::Said| said.reason == "NodeFenced" && said.message.contains("always");
    stage.cluster.hears_of("Node", DEAD, "that its guest was fenced", fenced).await;
    // It takes guests again, and has not got the old one back.
    let mut newcomer = vm("once", "Once", DEAD);
    newcomer["spec"]["template"]["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": DEAD});
    stage.run(newcomer, DEAD).await;
    stage.beats_after("always", SystemTime::now()).await;
    assert_eq!(overlap(&stage.beats("always")), None);
    let now = stage.cluster.vmis().get("always").await.expect("VMI");
    assert_eq!((&now.metadata.uid, status(&now, "nodeName")), (&vmi.metadata.uid, status(&vmi, "nodeName")));
}
