//! What breaks around a migration on a real API server: that itself, the leading controller, a node's handler. The guest does not
//! notice.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::moving::{guest_runs_on_in, narrow_the_link, one_launcher_is_left, widen_the_link};
use common::real::{CONTROLLER, Real, STANDBY};
use common::stopped::Stopped;
use common::{Cluster, kill_hard, status};
use godwit_guest_rom::{Line, Parameters};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::DynamicObject;
use std::time::{Duration, Instant};

const TOKEN: u32 = 0xF1EE;
const GUEST: &str = "flyer";

/// A cluster whose guest is on its way each time that something breaks.
struct Stage {
    cluster: Cluster,
    migrations: usize,
}

impl Stage {
    fn real(&self) -> &Real {
        self.cluster.real.as_ref().expect("a real API server")
    }

    async fn vmi(&self) -> DynamicObject {
        self.cluster.vmis().get(GUEST).await.expect("VMI")
    }

    /// Begins a migration over a narrow link and waits until memory is being sent: its name, and the node that the guest leaves.
    async fn depart(&mut self) -> (String, String) {
        self.migrations += 1;
        let name = format!("move{}", self.migrations);
        let from = status(&self.vmi().await, "nodeName");
        narrow_the_link(&self.cluster, &from);
        self.cluster.migrate(GUEST, &name).await;
        let runs = |migration: &DynamicObject| status(migration, "phase") == "Running";
        self.cluster.wait(&self.cluster.migrations(), &name, "it runs", runs).await;
        (name, from)
    }

    /// Lets the guest arrive; it goes on in its target's pod as it was.
    async fn arrive(&self, name: &str, from: &str) {
        widen_the_link(&self.cluster, from);
        let migration = self.ends(name).await;
        assert_eq!(status(&migration, "phase"), "Succeeded", "{}\n{}", migration.data, self.cluster.words());
        let vmi = self.vmi().await;
        assert_ne!(status(&vmi, "nodeName"), from);
        guest_runs_on_in(&self.cluster, &status(&vmi, "migrationState/targetPod"), TOKEN).await;
        one_launcher_is_left(&self.cluster, GUEST).await;
    }

    async fn ends(&self, name: &str) -> DynamicObject {
        let over = |migration: &DynamicObject| ["Succeeded", "Failed"].contains(&status(migration, "phase").as_str());
        self.cluster.wait(&self.cluster.migrations(), name, "it is over", over).await
    }

    /// Waits until this controller holds the lease.
    async fn leads(&self, who: &str) {
        let api: Api<Lease> = Api::namespaced(self.cluster.client.clone(), "kubevirt");
        let deadline = Instant::now() + Duration::from_secs(120);
        let holder = async || api.get("virt-controller").await.expect("lease").spec?.holder_identity;
        while holder().await.as_deref() != Some(who) {
            assert!(Instant::now() < deadline, "{who} does not lead\n{}", self.cluster.words());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a process has said something.
    async fn says(&self, process: &str, what: &str) {
        let log = self.cluster.data_dir().join(format!("log/{process}.log"));
        let deadline = Instant::now() + Duration::from_secs(120);
        while !std::fs::read_to_string(&log).expect("its log").contains(what) {
            assert!(Instant::now() < deadline, "{process} does not say {what:?}\n{}", self.cluster.words());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The last beat that was heard of the guest where it is now.
    async fn beat(&self) -> u32 {
        let node = status(&self.vmi().await, "nodeName");
        let launchers = self.cluster.launchers(GUEST).await;
        let (pod, _) = launchers.iter().find(|(_, on)| *on == node).expect("its launcher");
        let last = self.cluster.lines(pod).await.into_iter().rev().find_map(|line| match line {
            Line::Beat { count, errors, .. } => {
                assert_eq!(errors, 0, "its memory is damaged");
                Some(count)
            }
            _ => None,
        });
        last.unwrap_or(0)
    }

    /// A handler is killed in flight. The stream of memory goes through it, so the guest stays where it is, or has left already:
    /// it runs on in either case.
    async fn without_handler(&mut self, of_source: bool) {
        let (name, from) = self.depart().await;
        let before = self.beat().await;
        let to = status(&self.vmi().await, "migrationState/targetNode");
        let node = if of_source { &from } else { &to };
        kill_hard(self.cluster.pid(node));
        self.cluster.start_node(node);
        widen_the_link(&self.cluster, &from);
        let migration = self.ends(&name).await;
        if status(&migration, "phase") == "Failed" {
            assert_ne!(status(&migration, "migrationState/failureReason"), "", "{}", migration.data);
            assert_eq!(status(&self.vmi().await, "nodeName"), from);
        }
        one_launcher_is_left(&self.cluster, GUEST).await;
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.beat().await < before + 3 {
            assert!(Instant::now() < deadline, "the guest is silent\n{}", self.cluster.words());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_in_flight_outlives_its_api_server_its_leader_and_its_handlers() {
    if common::real::assets().is_none() {
        println!("SKIPPED: KUBEBUILDER_ASSETS names no folder with etcd and kube-apiserver");
        return;
    }
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(Parameters { token: TOKEN, ..Parameters::default() });
    cluster.start_rom_guest(GUEST).await;
    let mut stage = Stage { cluster, migrations: 0 };

    let (name, from) = stage.depart().await;
    stage.real().kill(common::real::API_SERVER);
    stage.real().start_api_server();
    stage.real().until_it_serves(&stage.cluster.client).await;
    stage.arrive(&name, &from).await;

    // The leader dies, and the other one goes on where it was.
    stage.real().start_controller(STANDBY);
    stage.says(STANDBY, "all kinds listed").await;
    let (name, from) = stage.depart().await;
    stage.real().kill(CONTROLLER);
    stage.leads(STANDBY).await;
    stage.arrive(&name, &from).await;

    // The leader is stopped for longer than its lease, and does not come between the other one's decisions afterwards.
    stage.real().start_controller(CONTROLLER);
    let (name, from) = stage.depart().await;
    let leader = Stopped::stop(stage.cluster.pid(STANDBY));
    stage.leads(CONTROLLER).await;
    stage.arrive(&name, &from).await;
    drop(leader);
    stage.says(STANDBY, "this controller decides no more").await;
    let (name, from) = stage.depart().await;
    stage.arrive(&name, &from).await;
    stage.leads(CONTROLLER).await;

    stage.without_handler(true).await;
    stage.without_handler(false).await;
}
