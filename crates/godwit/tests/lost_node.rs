//! A node dies with all that runs on it. Its VMs are started elsewhere, as their run strategies say, and nobody has to delete a pod; a
//! migration that was on its way ends as it should, whichever end died. A node that was only cut off has ended its guests before.
//! Who runs when is told by the guests' own frames.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::stopped::Stopped;
use common::streams::Console;
use common::{Cluster, ROM_IMAGE, status};
use godwit_bench::witness::{Beat, Station, Witness, complaint, overlap};
use godwit_guest_rom::Parameters;
use godwit_launcher::record;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const MOMENT: Duration = Duration::from_millis(20);
/// The node that dies.
const DEAD: &str = "node1";

/// VMs, and the number in the address of each one's frames.
const VMS: [(&str, u8); 6] = [("always", 1), ("once", 2), ("manual", 3), ("local", 4), ("leaving", 5), ("coming", 6)];
/// The same of those whose guests have left when the node dies, with the node that each left and the one where it is: in post-copy,
/// and wholly.
const MOVED: [(&str, u8, &str, &str); 4] = [
    ("post-out", 7, DEAD, "node2"),
    ("post-in", 8, "node2", DEAD),
    ("gone-out", 9, DEAD, "node2"),
    ("gone-in", 10, "node2", DEAD),
];

fn station(vm: &str) -> Station {
    let moved = MOVED.iter().map(|(name, number, ..)| (*name, *number));
    let (_, number) = VMS.into_iter().chain(moved).find(|(name, _)| *name == vm).expect("one of the VMs");
    [2, 0x66, 0, 0, 1, number]
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
    /// Three nodes, whose guests move at a byte a second.
    async fn start() -> Self {
        let guest = Parameters { frame_ticks: 2, ..Parameters::default() };
        let slow = json!({"bandwidthPerMigration": "1", "completionTimeoutPerGiB": 0, "progressTimeout": 0});
        Self::start_with(guest, slow).await
    }

    async fn start_with(guest: Parameters, migrations: Value) -> Self {
        let cluster = Cluster::start(3).await;
        cluster.build_rom_image(guest);
        let claim = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "local-disk"},
            "spec": {"storageClassName": "local", "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "1Mi"}}},
        });
        cluster.apply(claim).await.expect("apply the claim");
        let witness = cluster.witness().await;
        let stage = Self { cluster, witness };
        stage.configure(migrations).await;
        stage
    }

    /// Changes how guests are moved from now on.
    async fn configure(&self, migrations: Value) {
        let patch = json!({"spec": {"configuration": {"migrations": migrations}}});
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
        let kubevirts: Api<DynamicObject> = Api::namespaced_with(self.cluster.client.clone(), "kubevirt", &resource);
        kubevirts.patch("kubevirt", &PatchParams::default(), &Patch::Merge(&patch)).await.expect("configure");
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
        self.flows(vm).await;
    }

    async fn flows(&self, vm: &str) {
        let flows = |vmi: &DynamicObject| !status(vmi, "migrationState/startTimestamp").is_empty();
        self.vmi(vm, "it is on its way", flows).await;
    }

    /// The UID of the pod in which a VM's guest is, or shall be, on this node.
    async fn pod_on(&self, vm: &str, node: &str) -> String {
        let pods = self.cluster.pods().list(&Default::default()).await.expect("list pods");
        let prefix = format!("virt-launcher-{vm}-");
        let named = |pod: &&DynamicObject| pod.metadata.name.as_deref().is_some_and(|name| name.starts_with(&prefix));
        let here = pods.items.into_iter().filter(|pod| named(&pod) && pod.data["spec"]["nodeName"] == node);
        let [pod] = &here.collect::<Vec<_>>()[..] else { panic!("{vm} has not one pod on {node}") };
        pod.metadata.uid.clone().expect("uid")
    }

    /// Where the launcher of the VM's pod on this node writes down that its guest has left.
    async fn record_of(&self, vm: &str, node: &str) -> PathBuf {
        let pod = self.cluster.data_dir().join("nodes").join(node).join("pods").join(self.pod_on(vm, node).await);
        pod.join("volumes/kubernetes.io~empty-dir/ephemeral-disks")
    }

    /// Waits until it has: or until the guest is heard there already.
    async fn has_left(&self, vm: &str, record: &Path, target: &str) {
        let deadline = Instant::now() + PATIENCE;
        while record::read_departed(record).ok().flatten().is_none() && !self.is_heard_on(vm, target) {
            assert!(Instant::now() < deadline, "{vm} does not leave for {target}\n{}", self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    fn is_heard_on(&self, vm: &str, node: &str) -> bool {
        self.beats(vm).last().is_some_and(|beat| &*beat.node == node)
    }

    /// Waits until the guest is heard on this node.
    async fn beats_on(&self, vm: &str, node: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_heard_on(vm, node) {
            assert!(Instant::now() < deadline, "{vm} is not heard on {node}\n{}", self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// The pods, or instances, out of which the guest was heard.
    fn instances(&self, vm: &str) -> usize {
        self.beats(vm).into_iter().map(|beat| beat.port).collect::<std::collections::BTreeSet<_>>().len()
    }

    /// Lets no more than `rate` (as `tc` takes it) out of a node; none: as before.
    fn narrow(&self, node: &str, rate: Option<&str>) {
        let namespace = self.cluster.namespace(node);
        let mut tc = std::process::Command::new("ip");
        tc.args(["netns", "exec", &namespace, "tc", "qdisc"]);
        match rate {
            Some(rate) => {
                tc.args(["replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "16kb", "latency", "400ms"])
            }
            None => tc.args(["del", "dev", "eth0", "root"]),
        };
        let output = tc.output().expect("ip starts");
        assert!(output.status.success(), "tc: {}", common::text(&output.stderr));
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
        self.victims(node).await.kill().await;
    }

    async fn victims(&self, node: &str) -> Victims {
        let pods = self.cluster.pods().list(&Default::default()).await.expect("list pods");
        let here = pods.items.into_iter().filter(|pod| pod.data["spec"]["nodeName"] == node);
        Victims { node: self.cluster.pid(node), pods: here.filter_map(|pod| pod.metadata.uid).collect() }
    }

    fn says(vmi: &DynamicObject, condition: &str) -> Option<Value> {
        let conditions = vmi.data.pointer("/status/conditions").and_then(Value::as_array)?;
        conditions.iter().find(|one| one["type"] == condition).cloned()
    }
}

/// All that runs on a node.
struct Victims {
    node: Pid,
    pods: Vec<String>,
}

impl Victims {
    /// Asks nobody: whoever knew may stand still.
    async fn kill(&self) {
        kill(self.node, Signal::SIGKILL).expect("kill the node");
        // Again until nothing is left: one that was being started is not in the first list.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = processes_in(&self.pods);
            if left.is_empty() {
                return;
            }
            for (pid, _) in left {
                let _ = kill(pid, Signal::SIGKILL);
            }
            assert!(Instant::now() < deadline, "the pods of {} do not die", self.node);
            tokio::time::sleep(MOMENT).await;
        }
    }
}

/// What runs in these pods, with its command line.
fn processes_in(pods: &[String]) -> Vec<(Pid, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let read = |file: &str| common::text(&std::fs::read(entry.path().join(file)).unwrap_or_default());
        let (groups, words) = (read("cgroup"), read("cmdline"));
        // A zombie has no command line.
        if !words.is_empty() && pods.iter().any(|uid| groups.contains(uid) || words.contains(uid)) {
            found.push((Pid::from_raw(pid), words));
        }
    }
    found
}

/// The QEMU of a pod.
fn qemu_in(pod: String) -> Pid {
    let processes = processes_in(&[pod]);
    let qemus =
        processes.iter().filter(|(_, words)| words.split('\0').next().is_some_and(|name| name.contains("qemu-system")));
    let [(pid, _)] = &qemus.collect::<Vec<_>>()[..] else { panic!("not one QEMU: {processes:?}") };
    *pid
}

fn failed_with_its_node(vmi: &DynamicObject) -> bool {
    status(vmi, "phase") == "Failed" && status(vmi, "reason") == "NodeUnresponsive"
}

#[tokio::test(flavor = "multi_thread")]
async fn the_vms_of_a_node_that_dies_run_elsewhere_and_never_twice() {
    let mut stage = Stage::start().await;
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

    let console = Console::open(&stage.cluster, "once").await;
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
    // Who was in its console is told.
    let said = format!("node {DEAD} does not answer any more, and the guest there is lost");
    assert_eq!(console.closes(&stage.cluster).await, Some(said));
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
    stage.cluster.up_again(3).await;
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

/// Four guests have left when a node dies: two wholly, from it and to it, and nobody has heard of that yet; two in post-copy, from it
/// and to it. One of them lives on. The others have ended with the node, wherever they were, and are started again once.
#[tokio::test(flavor = "multi_thread")]
async fn guests_that_had_been_handed_over_when_a_node_dies_run_on_or_again_and_never_twice() {
    // So much memory at a time that it is written to after some seconds, and takes some to be sent.
    let guest = Parameters { frame_ticks: 2, pages_per_tick: 1, last: 0x30_0000, ..Parameters::default() };
    let ahead = json!({"allowPostCopy": true, "completionTimeoutPerGiB": 3});
    let mut stage = Stage::start_with(guest, ahead).await;
    for (name, _, node, _) in MOVED {
        stage.run(vm(name, "Always", node), node).await;
    }
    stage.cordon("node3", true).await;
    let mut before = Vec::new();
    for (name, _, _, target) in MOVED {
        let whole = |beats: &[Beat]| beats.last().is_some_and(|beat| beat.count > 256);
        let deadline = Instant::now() + PATIENCE;
        while !whole(&stage.beats(name)) {
            assert!(Instant::now() < deadline, "{name} does not go on");
            tokio::time::sleep(MOMENT).await;
        }
        before.push((name, target, stage.cluster.vmis().get(name).await.expect("VMI").metadata.uid.expect("uid")));
    }

    // Two run at the other node, and the rest of their memory does not follow.
    let mut holds = Vec::new();
    for node in [DEAD, "node2"] {
        stage.narrow(node, Some("1mbit"));
    }
    for (name, _, source, target) in &MOVED[..2] {
        stage.cluster.migrate(name, &format!("move-{name}")).await;
        let is_ahead = |vmi: &DynamicObject| {
            status(vmi, "migrationState/mode") == "PostCopy" && status(vmi, "nodeName") == *target
        };
        stage.vmi(name, "it is in post-copy", is_ahead).await;
        stage.beats_on(name, target).await;
        holds.push(Stopped::stop(qemu_in(stage.pod_on(name, source).await)));
        assert_eq!(status(&stage.cluster.vmis().get(name).await.expect("VMI"), "migrationState/completed"), "");
    }
    for node in [DEAD, "node2"] {
        stage.narrow(node, None);
    }
    // Two have left, and the go is not taken before nobody can be told of it.
    let slow = json!({"allowPostCopy": false, "completionTimeoutPerGiB": 800, "bandwidthPerMigration": "512Ki"});
    stage.configure(slow).await;
    let mut records = Vec::new();
    for (name, _, source, _) in &MOVED[2..] {
        records.push(stage.record_of(name, source).await);
        stage.cluster.migrate(name, &format!("move-{name}")).await;
    }
    for (name, ..) in &MOVED[2..] {
        stage.flows(name).await;
    }
    // The launchers carry the memory on; the go would come by the handlers.
    let going = [DEAD, "node2"].map(|node| Stopped::stop(stage.cluster.pid(node)));
    for ((name, _, _, target), record) in MOVED[2..].iter().zip(&records) {
        stage.has_left(name, record, target).await;
    }
    let victims = stage.victims(DEAD).await;
    let control_plane = stage.cluster.stop_control_plane();
    drop(going);
    for (name, _, _, target) in &MOVED[2..] {
        stage.beats_on(name, target).await;
    }
    victims.kill().await;
    drop(control_plane);
    drop(holds);
    let died = SystemTime::now();
    stage.cluster.reconnect().await;
    stage.cordon("node3", false).await;

    let mut alive = vec!["gone-out"];
    for (name, target, uid) in &before {
        if *name == "gone-out" {
            let over =
                |migration: &DynamicObject| ["Succeeded", "Failed"].contains(&status(migration, "phase").as_str());
            let migration = stage.cluster.wait(&stage.cluster.migrations(), "move-gone-out", "it is over", over).await;
            assert_eq!(status(&migration, "phase"), "Succeeded", "{}", migration.data);
            stage.beats_after(name, died).await;
            let vmi = stage.cluster.vmis().get(name).await.expect("VMI");
            assert_eq!((vmi.metadata.uid.as_ref(), &*status(&vmi, "nodeName")), (Some(uid), *target));
            continue;
        }
        // What was on its way when the source was held, in sockets and pipes, arrives all the same: where that was all, the guest
        // has left in time, and lives on at a target that lives.
        let lives_on = |vmi: &DynamicObject| {
            vmi.metadata.uid.as_ref() == Some(uid)
                && *target != DEAD
                && status(vmi, "nodeName") == *target
                && status(vmi, "migrationState/completed") == "true"
                && status(vmi, "migrationState/failed") != "true"
        };
        let again = |vmi: &DynamicObject| {
            status(vmi, "phase") == "Running"
                && status(vmi, "nodeName") != DEAD
                && vmi.metadata.uid.as_ref() != Some(uid)
        };
        let vmi = stage.vmi(name, "it runs again", |vmi| again(vmi) || lives_on(vmi)).await;
        if lives_on(&vmi) {
            alive.push(*name);
        }
        stage.beats_after(name, SystemTime::now()).await;
        // A migration whose guest ran at its target before that died may count as done.
        let Some(reason) =
            [("post-out", "SourceLost"), ("post-in", "TargetLost")].into_iter().find(|(vm, _)| vm == name)
        else {
            continue;
        };
        let records = stage.cluster.api("godwit.io", "v1alpha1", "MigrationRecord");
        // It is written after the migration's end.
        let deadline = Instant::now() + PATIENCE;
        let record = loop {
            let all = records.list(&Default::default()).await.expect("records").items;
            if let Some(record) = all.into_iter().find(|record| record.data["spec"]["vmiName"] == *name) {
                break record;
            }
            assert!(Instant::now() < deadline, "no record of {name}\n{}", stage.cluster.words());
            tokio::time::sleep(MOMENT).await;
        };
        let said = (&record.data["spec"]["result"], &record.data["spec"]["reason"]);
        if said.0 != "Succeeded" {
            assert_eq!(said, (&json!("Failed"), &json!(reason.1)), "{name}: {}", record.data);
        }
    }
    for (name, ..) in MOVED {
        let beats = stage.beats(name);
        assert_eq!(overlap(&beats), None, "{name}");
        let lives_on = alive.contains(&name);
        assert_eq!(stage.instances(name), if lives_on { 2 } else { 3 }, "{name}");
        assert!(!lives_on || complaint(&beats).is_none(), "{name}: {:?}", complaint(&beats));
    }
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
