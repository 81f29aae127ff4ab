//! A node that cannot renew its lease stops its guests, and says so; a control plane that is away for everybody stops none. Who
//! runs when is told by the guests' own frames (docs/fencing.md).

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::stopped::Stopped;
use common::{Cluster, ROM_IMAGE, kill_hard, qemus, status};
use godwit_api::names::fence::{DURATION, LEASE_PREFIX, MARGIN, RENEW_EVERY, SILENCE};
use godwit_api::names::{ANNOTATION_FENCE_PEERS, ANNOTATION_FENCED};
use godwit_bench::witness::{Beat, Station, Witness, complaint};
use godwit_guest_rom::Parameters;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, ResourceExt};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::time::{Duration, Instant, SystemTime};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const MOMENT: Duration = Duration::from_millis(20);

/// A cluster with a guest that beats on each of its nodes.
struct Stage {
    cluster: Cluster,
    witness: Witness,
}

fn station(number: u8) -> Station {
    [2, 0x66, 0, 0, 0, number]
}

fn guest(number: u8) -> String {
    format!("guest{number}")
}

fn vmi(number: u8) -> Value {
    let mac = station(number).map(|byte| format!("{byte:02x}")).join(":");
    let interface = json!({"name": "w", "bridge": {}, "model": "rtl8139", "macAddress": mac});
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": guest(number)},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "nodeSelector": {"kubernetes.io/hostname": format!("node{number}")},
            "domain": {
                "memory": {"guest": "16Mi"},
                "devices": {"interfaces": [interface]},
                "firmware": {"kernelBoot": {"container": {"image": ROM_IMAGE, "kernelPath": "/boot/rom.bin"}}},
            },
            "networks": [{"name": "w", "multus": {"networkName": "witness"}}],
        },
    })
}

impl Stage {
    async fn start(nodes: u8) -> Self {
        let cluster = Cluster::start(nodes.into()).await;
        cluster.build_rom_image(Parameters { frame_ticks: 2, ..Parameters::default() });
        let witness = cluster.witness().await;
        let stage = Self { cluster, witness };
        for number in 1..=nodes {
            stage.cluster.apply(vmi(number)).await.expect("apply VMI");
        }
        for number in 1..=nodes {
            let running = |vmi: &DynamicObject| status(vmi, "phase") == "Running";
            stage.cluster.wait(&stage.cluster.vmis(), &guest(number), "it runs", running).await;
            stage.beats_after(number, SystemTime::now()).await;
        }
        stage
    }

    fn beats(&self, number: u8) -> Vec<Beat> {
        self.witness.beats(station(number))
    }

    /// Waits until the guest is heard at this moment or later.
    async fn beats_after(&self, number: u8, moment: SystemTime) {
        let deadline = Instant::now() + PATIENCE;
        while self.witness.since(station(number), moment).beats == 0 {
            assert!(Instant::now() < deadline, "{} is not heard\n{}", guest(number), self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// The QEMU of a guest.
    async fn qemu(&self, number: u8) -> Pid {
        let vmi = self.cluster.vmis().get(&guest(number)).await.expect("VMI");
        let [(pid, _)] = qemus(&vmi)[..] else { panic!("{} has not one QEMU: {}", guest(number), json!(vmi)) };
        Pid::from_raw(pid)
    }

    /// Waits until a guest's process is no more; a zombie of a launcher that stands still runs nothing.
    async fn dies(&self, number: u8, pid: Pid) {
        let lives = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
        };
        let deadline = Instant::now() + PATIENCE;
        while lives() {
            assert!(Instant::now() < deadline, "{} is not fenced\n{}", guest(number), self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// The guest's last frame came before the controller may count it as dead.
    fn was_silent_in_time(&self, number: u8, cut: SystemTime) {
        let beats = self.beats(number);
        assert_eq!(complaint(&beats), None);
        let last = beats.last().expect("it was heard").at;
        let ran = last.duration_since(cut).unwrap_or_default();
        assert!(ran < DURATION + MARGIN, "{} ran for {ran:?} after its node was cut off", guest(number));
    }

    fn leases(&self) -> Api<DynamicObject> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("coordination.k8s.io", "v1", "Lease"));
        Api::namespaced_with(self.cluster.client.clone(), "kubevirt", &resource)
    }

    fn nodes(&self) -> Api<DynamicObject> {
        Api::all_with(self.cluster.client.clone(), &ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Node")))
    }

    /// Waits until the leases of these many nodes name all the others: the first ones that they write may not know them yet.
    async fn name_each_other(&self, nodes: u8) {
        for number in 1..=nodes {
            let others: Vec<String> =
                (1..=nodes).filter(|other| *other != number).map(|other| format!("node{other}")).collect();
            let named = |lease: &DynamicObject| {
                let annotations = lease.metadata.annotations.as_ref();
                annotations.and_then(|all| all.get(ANNOTATION_FENCE_PEERS)) == Some(&others.join(","))
            };
            let lease = format!("{LEASE_PREFIX}node{number}");
            self.cluster.wait(&self.leases(), &lease, "it names the other nodes", named).await;
        }
    }

    /// Waits for a moment at which all nodes have just renewed their leases: those that lose their contact at the same time say so at the
    /// same time. Their renewals are not in step, so there need not be a moment at which all are much younger than this.
    async fn have_just_renewed(&self, nodes: usize) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let leases: Api<Lease> = Api::namespaced(self.cluster.client.clone(), "kubevirt");
            let leases = leases.list(&Default::default()).await.expect("list leases").items;
            let now = SystemTime::now();
            let fences = leases.iter().filter(|lease| lease.name_any().starts_with(LEASE_PREFIX));
            let renewed = fences.filter_map(|lease| lease.spec.as_ref()?.renew_time.as_ref());
            let ages: Vec<Duration> = renewed.map(|at| now.duration_since(at.0.into()).unwrap_or_default()).collect();
            if ages.len() == nodes && ages.iter().all(|age| *age < RENEW_EVERY) {
                return;
            }
            assert!(Instant::now() < deadline, "leases were renewed {ages:?} ago\n{}", self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// The node says that it has fenced its guest.
    async fn says_that_it_fenced(&self, number: u8) {
        let node = format!("node{number}");
        let fenced = |node: &DynamicObject| {
            node.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(ANNOTATION_FENCED))
        };
        self.cluster.wait(&self.nodes(), &node, "it says that it fenced", fenced).await;
        let named = |said: &common::events::Said| said.reason == "NodeFenced" && said.message.contains(&guest(number));
        let event = self.cluster.hears_of("Node", &node, "that its guest was fenced", named).await;
        assert_eq!((event.type_.as_str(), event.component.as_str()), ("Warning", "virt-handler"));
        let over = |vmi: &DynamicObject| status(vmi, "phase") == "Failed";
        self.cluster.wait(&self.cluster.vmis(), &guest(number), "it has failed", over).await;
    }
}

/// At the same time, since each takes its twenty seconds: node1's handler stands still, so its launcher has to fence; node2 is cut
/// off, and its launcher stands still, so its handler has to; node3 is cut off, and its QEMU stands still.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_its_lease_stops_its_guests_whatever_hangs_and_says_so_when_it_is_back() {
    let stage = Stage::start(4).await;
    stage.name_each_other(4).await;
    let mut guests = Vec::new();
    for number in 1..=3 {
        guests.push(stage.qemu(number).await);
    }
    let cut = SystemTime::now();
    let handler = Stopped::stop(stage.cluster.pid("node1"));
    let parent = std::fs::read_to_string(format!("/proc/{}/stat", guests[1])).expect("stat");
    let parent = parent.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)).expect("its parent");
    let launcher = Stopped::stop(Pid::from_raw(parent.parse().expect("a pid")));
    stage.cluster.uplink("node2", false).await;
    let hung = Stopped::stop(guests[2]);
    stage.cluster.uplink("node3", false).await;
    for number in 1..=3_u8 {
        stage.dies(number, guests[usize::from(number) - 1]).await;
        stage.was_silent_in_time(number, cut);
    }
    drop((handler, launcher, hung));
    stage.cluster.uplink("node2", true).await;
    stage.cluster.uplink("node3", true).await;
    for number in 1..=3 {
        stage.says_that_it_fenced(number).await;
    }
    // Nobody else was touched.
    stage.beats_after(4, SystemTime::now()).await;
    assert_eq!(complaint(&stage.beats(4)), None);
}

/// And that a handler restarts meanwhile is no reason either: for its own guest, or for those of the nodes that ask it.
#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_is_away_stops_no_guest_and_starts_none_again() {
    let mut stage = Stage::start(3).await;
    let mut guests = Vec::new();
    stage.name_each_other(3).await;
    for number in 1..=3_u8 {
        guests.push(stage.qemu(number).await);
    }
    stage.have_just_renewed(3).await;
    let away = SystemTime::now();
    let handler = stage.cluster.pid("node2");
    let control_plane = stage.cluster.stop_control_plane();
    // The others have not put their fences off yet. When they ask, one that forgot its last contact would count from here, and deny
    // for as long as their guests have left. Not later: it needs the time to start.
    stage.beats_after(2, away + (DURATION - SILENCE)).await;
    kill_hard(handler);
    stage.cluster.start_node("node2");
    for number in 1..=3 {
        stage.beats_after(number, away + DURATION + MARGIN + Duration::from_secs(5)).await;
    }
    drop(control_plane);
    stage.cluster.reconnect().await;
    for number in 1..=3_u8 {
        let lease = format!("virt-handler-node{number}");
        let found = stage.leases().get(&lease).await.expect("the lease").metadata.resource_version;
        let renewed = |lease: &DynamicObject| lease.metadata.resource_version != found;
        stage.cluster.wait(&stage.leases(), &lease, "it is renewed again", renewed).await;
    }
    for number in 1..=3_u8 {
        stage.beats_after(number, SystemTime::now()).await;
        assert_eq!(complaint(&stage.beats(number)), None);
        assert_eq!(stage.qemu(number).await, guests[usize::from(number) - 1]);
        let vmi = stage.cluster.vmis().get(&guest(number)).await.expect("VMI");
        assert_eq!(status(&vmi, "phase"), "Running");
    }
}
