//! A network of its own for migrations: real nodes with a second link, over which the guest's memory goes while both have it.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::moving::{guest_runs_on_in, narrow, one_launcher_is_left};
use common::{Cluster, status};
use godwit_api::MigrationNetwork;
use godwit_guest_rom::{Line, Parameters};
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch};
use serde_json::{Value, json};
use std::process::Command;
use std::time::{Duration, Instant};

const TOKEN: u32 = 0xF1EE;
const GUEST: &str = "flyer";
/// What the guest has written to all of before it moves, so that a stream has to carry it.
const WRITTEN: u64 = 4 << 20;
const MOMENT: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(120);

struct Stage {
    cluster: Cluster,
    moves: usize,
}

/// What was moved, and how.
struct Moved {
    from: String,
    /// `migrationNetworkType` of the VMI, and the address that the target listened at.
    network: String,
    address: String,
    /// Bytes that the source's node has sent meanwhile: by the nodes' network, and by that for migrations.
    sent: [u64; 2],
}

impl Stage {
    async fn new() -> Self {
        let cluster = Cluster::with_migration_network(2).await;
        cluster.build_rom_image(Parameters { token: TOKEN, pages_per_tick: 25, noise: true, ..Parameters::default() });
        cluster.start_rom_guest(GUEST).await;
        let stage = Self { cluster, moves: 0 };
        stage
            .until("the guest has written to its memory", async || {
                stage.beats().await.is_some_and(|(_, pass)| pass > 0)
            })
            .await;
        for node in ["node1", "node2"] {
            stage.tells(node, |has| has.address.is_some()).await;
        }
        stage
    }

    async fn until(&self, what: &str, is: impl AsyncFn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is().await {
            assert!(Instant::now() < deadline, "waited two minutes until {what}\n{}", self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// The last beat in the pod that the guest is in now: its number, and how often the guest has been through its memory.
    async fn beats(&self) -> Option<(u32, u32)> {
        let node = status(&self.vmi().await, "nodeName");
        let launchers = self.cluster.launchers(GUEST).await;
        let (pod, _) = launchers.iter().find(|(_, on)| *on == node)?;
        self.cluster.lines(pod).await.iter().rev().find_map(|line| match line {
            Line::Beat { count, pass, errors: 0, .. } => Some((*count, *pass)),
            _ => None,
        })
    }

    async fn beats_on(&self) {
        let (before, _) = self.beats().await.expect("it has beaten");
        self.until("the guest beats on", async || self.beats().await.is_some_and(|(now, _)| now > before + 3)).await;
    }

    async fn vmi(&self) -> DynamicObject {
        self.cluster.vmis().get(GUEST).await.expect("VMI")
    }

    /// Has a node reach another one's address no more, which neither can see by its links.
    fn cut(&self, from: &str, to: &str) {
        self.route(from, "add", to);
    }

    /// Has it reach that again.
    fn mend(&self, from: &str, to: &str) {
        self.route(from, "del", to);
    }

    fn route(&self, from: &str, change: &str, to: &str) {
        let node = self.cluster.namespace(from);
        let done = Command::new("ip").args(["netns", "exec", &node, "ip", "route", change, "blackhole", to]).status();
        assert!(done.expect("ip starts").success());
    }

    /// Waits until the node says so of its network for migrations; its address there.
    async fn tells(&self, node: &str, wanted: impl Fn(&MigrationNetwork) -> bool) -> String {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Node"));
        let nodes: Api<DynamicObject> = Api::all_with(self.cluster.client.clone(), &resource);
        let told = |node: &DynamicObject| {
            MigrationNetwork::of(node.metadata.annotations.as_ref()).is_some_and(|has| wanted(&has))
        };
        let node = self.cluster.wait(&nodes, node, "it tells of its network for migrations", told).await;
        let has = MigrationNetwork::of(node.metadata.annotations.as_ref()).expect("it tells");
        has.address.map(|address| address.to_string()).unwrap_or_default()
    }

    async fn link(&self, node: &str, up: bool) {
        self.cluster.migration_link(node, up).await;
        match up {
            true => self.tells(node, |has| has.address.is_some()).await,
            false => self.tells(node, |has| has.problem.as_deref() == Some("interface eth1 is down")).await,
        };
    }

    fn sent_by(&self, node: &str, link: &str) -> u64 {
        let path = format!("/sys/class/net/{link}/statistics/tx_bytes");
        let output = Command::new("ip").args(["netns", "exec", &self.cluster.namespace(node), "cat", &path]).output();
        let output = output.expect("ip starts");
        common::text(&output.stdout).trim().parse().unwrap_or_else(|_| panic!("{}", common::text(&output.stderr)))
    }

    async fn depart(&mut self, annotations: Value) -> String {
        self.moves += 1;
        let name = format!("move{}", self.moves);
        let migration = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
            "metadata": {"name": name, "annotations": annotations}, "spec": {"vmiName": GUEST},
        });
        self.cluster.apply(migration).await.expect("apply VMIM");
        name
    }

    async fn over(&self, name: &str) -> DynamicObject {
        let over = |migration: &DynamicObject| ["Succeeded", "Failed"].contains(&status(migration, "phase").as_str());
        self.cluster.wait(&self.cluster.migrations(), name, "it is over", over).await
    }

    /// Moves the guest to the other node, where it goes on.
    async fn moved(&mut self) -> Moved {
        let from = status(&self.vmi().await, "nodeName");
        let sent = |stage: &Self| ["eth0", "eth1"].map(|link| stage.sent_by(&from, link));
        let before = sent(self);
        let name = self.depart(json!({})).await;
        let migration = self.over(&name).await;
        let after = sent(self);
        assert_eq!(status(&migration, "phase"), "Succeeded", "{}\n{}", migration.data, self.cluster.words());
        let vmi = self.vmi().await;
        assert_ne!(status(&vmi, "nodeName"), from);
        let said = |name: &str| status(&vmi, &format!("migrationState/{name}"));
        let (network, address) = (said("migrationNetworkType"), said("targetNodeAddress"));
        assert_eq!(status(&migration, "migrationState/migrationNetworkType"), network);
        guest_runs_on_in(&self.cluster, &said("targetPod"), TOKEN).await;
        one_launcher_is_left(&self.cluster, GUEST).await;
        let sent = [after[0] - before[0], after[1] - before[1]];
        println!("{name}: {network}, to {address}: {} KiB by eth0, {} KiB by eth1", sent[0] >> 10, sent[1] >> 10);
        Moved { from, network, address, sent }
    }

    async fn moves_over_its_own(&mut self) -> String {
        let Moved { from, network, address, sent: [nodes, own] } = self.moved().await;
        assert_eq!(network, "Migration");
        assert!(address.starts_with("10.89.0."), "{address}");
        assert!(
            own > WRITTEN && nodes < WRITTEN / 2,
            "{nodes} bytes by the nodes' network, {own} by that for migrations"
        );
        from
    }

    async fn moves_over_the_nodes(&mut self) {
        let Moved { network, address, sent: [nodes, own], .. } = self.moved().await;
        assert_eq!(network, "Pod");
        assert!(address.starts_with("10.88.0."), "{address}");
        assert!(
            nodes > WRITTEN && own < WRITTEN / 64,
            "{nodes} bytes by the nodes' network, {own} by that for migrations"
        );
    }

    async fn configure(&self, migrations: Value) {
        let patch = Patch::Merge(json!({"spec": {"configuration": {"migrations": migrations}}}));
        self.kubevirts().patch("kubevirt", &Default::default(), &patch).await.expect("configure");
    }

    fn kubevirts(&self) -> Api<DynamicObject> {
        let kubevirt = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
        Api::namespaced_with(self.cluster.client.clone(), "kubevirt", &kubevirt)
    }

    /// Waits until the installation's object says so of its settings.
    async fn is_applied(&self, wanted: &str, with: &[&str]) {
        let told = |kubevirt: &DynamicObject| {
            let conditions = kubevirt.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let applied = conditions.into_iter().find(|one| one["type"] == "ConfigurationApplied").unwrap_or_default();
            let message = applied["message"].as_str().unwrap_or_default();
            applied["status"] == wanted && with.iter().all(|words| message.contains(words))
        };
        self.cluster.wait(&self.kubevirts(), "kubevirt", &format!("{wanted}: {with:?}"), told).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_move_over_the_network_for_that_while_both_ends_have_it() {
    let mut stage = Stage::new().await;
    let first = stage.moves_over_its_own().await;
    // Without it on the node that the guest leaves, and on the one that it goes to.
    stage.link(&first, false).await;
    stage.moves_over_the_nodes().await;
    stage.moves_over_the_nodes().await;
    stage.link(&first, true).await;
    stage.moves_over_its_own().await;
    stage.moves_over_its_own().await;
    // Both have it, and the one cannot reach the other over it.
    let from = status(&stage.vmi().await, "nodeName");
    let to = if from == "node1" { "node2" } else { "node1" };
    stage.cut(&from, &stage.tells(to, |has| has.address.is_some()).await);
    stage.moves_over_the_nodes().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_installation_says_whether_its_migrations_go_over_the_network_that_it_names() {
    let stage = Stage::new().await;
    stage.is_applied("True", &[]).await;
    stage.configure(json!({"network": "fast"})).await;
    if stage.cluster.real.is_some() {
        // There handlers are told that it is this one.
        stage.is_applied("True", &[]).await;
        stage.link("node2", false).await;
        stage.is_applied("False", &["kubevirt/fast", "node2 (interface eth1 is down)"]).await;
        stage.link("node2", true).await;
        stage.is_applied("True", &[]).await;
        stage.configure(json!({"network": "slow"})).await;
        stage.is_applied("False", &["kubevirt/slow: node1, node2;", "--migration-network slow"]).await;
    } else {
        stage.is_applied("False", &["kubevirt/fast: node1, node2;", "--migration-network fast"]).await;
    }
    stage.configure(json!({"network": null})).await;
    stage.is_applied("True", &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_migration_loses_its_network_stays_and_moves_over_the_other_one() {
    let mut stage = Stage::new().await;
    // At a byte a second it does not end by itself.
    stage.configure(json!({"completionTimeoutPerGiB": 0, "progressTimeout": 0})).await;
    let from = status(&stage.vmi().await, "nodeName");
    let name = stage.depart(json!({"godwit.io/bandwidth-per-migration": "1"})).await;
    let runs = |migration: &DynamicObject| status(migration, "phase") == "Running";
    let migration = stage.cluster.wait(&stage.cluster.migrations(), &name, "it runs", runs).await;
    assert_eq!(status(&migration, "migrationState/migrationNetworkType"), "Migration");
    let to = status(&migration, "migrationState/targetNode");
    stage.link(&to, false).await;
    let migration = stage.over(&name).await;
    assert_eq!(status(&migration, "phase"), "Failed", "{}", migration.data);
    println!("{name}: {}: {}", status(&migration, "reason"), status(&migration, "message"));
    assert_eq!(status(&migration, "reason"), "LinkLost", "{}", migration.data);
    let vmi = stage.vmi().await;
    assert_eq!((status(&vmi, "nodeName"), status(&vmi, "phase")), (from, "Running".to_owned()));
    one_launcher_is_left(&stage.cluster, GUEST).await;
    stage.beats_on().await;
    stage.moves_over_the_nodes().await;
}

impl Stage {
    /// Sends the guest away over a narrow network for migrations until it is at the other node in post-copy; the migration, the node that
    /// it has left and the VMI.
    async fn in_post_copy(&mut self) -> (String, String, DynamicObject) {
        self.configure(json!({"completionTimeoutPerGiB": 3, "allowPostCopy": true})).await;
        let from = status(&self.vmi().await, "nodeName");
        narrow(&self.cluster, &from, "eth1");
        let name = self.depart(json!({})).await;
        let ahead = |vmi: &DynamicObject| {
            status(vmi, "migrationState/mode") == "PostCopy"
                && status(vmi, "nodeName") == status(vmi, "migrationState/targetNode")
        };
        let vmi = self.cluster.wait(&self.cluster.vmis(), GUEST, "it is in post-copy", ahead).await;
        assert_eq!(status(&vmi, "migrationState/migrationNetworkType"), "Migration", "{}", vmi.data);
        (name, from, vmi)
    }

    /// Waits until it has arrived with all of its memory; the VMI.
    async fn arrives(&self, name: &str) -> DynamicObject {
        let migration = self.over(name).await;
        assert_eq!(status(&migration, "phase"), "Succeeded", "{}\n{}", migration.data, self.cluster.words());
        one_launcher_is_left(&self.cluster, GUEST).await;
        self.beats_on().await;
        self.vmi().await
    }
}

/// Where nothing will do but to reach the target: the guest is there, and a part of its memory is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_in_post_copy_gets_its_memory_over_the_other_network() {
    let mut stage = Stage::new().await;
    let (name, from, vmi) = stage.in_post_copy().await;
    // Neither end sees it by its own link.
    stage.cut(&from, &status(&vmi, "migrationState/targetNodeAddress"));
    let vmi = stage.arrives(&name).await;
    let said = |name: &str| status(&vmi, &format!("migrationState/{name}"));
    assert_eq!(
        (said("migrationNetworkType").as_str(), said("progress/recoveries").as_str()),
        ("Pod", "1"),
        "{}",
        vmi.data
    );
    assert!(said("targetNodeAddress").starts_with("10.88.0."), "{}", vmi.data);
    let words = "is not reached over the network for migrations: the nodes' own network is tried.";
    stage.cluster.hears_of("VirtualMachineInstance", GUEST, words, |event| event.message.ends_with(words)).await;
}

/// The other one is no way at all (a firewall, say): the first one is tried again.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_in_post_copy_gets_its_memory_when_the_network_for_that_is_whole_again() {
    let mut stage = Stage::new().await;
    let (name, from, vmi) = stage.in_post_copy().await;
    let address = status(&vmi, "migrationState/targetNodeAddress");
    let nodes_own = address.replace("10.89.", "10.88.");
    stage.cut(&from, &nodes_own);
    stage.cut(&from, &address);
    let leaves = |vmi: &DynamicObject| status(vmi, "migrationState/targetNodeAddress") == nodes_own;
    stage.cluster.wait(&stage.cluster.vmis(), GUEST, "the other network is tried", leaves).await;
    stage.mend(&from, &address);
    let vmi = stage.arrives(&name).await;
    let said = |name: &str| status(&vmi, &format!("migrationState/{name}"));
    assert_eq!((said("migrationNetworkType"), said("targetNodeAddress")), ("Migration".to_owned(), address));
}
