//! A guest that is on its way while something breaks, or is replaced, around it. It tells itself that it goes on: by its frames.

use super::moving::{guest_runs_on_in, one_launcher_is_left};
use super::real::Real;
use super::witnessed::{heard_vmi, switch_gap};
use super::{Cluster, kill_hard, status};
use godwit_bench::witness::{Station, Witness, complaint, longest_gap};
use godwit_guest_rom::Parameters;
use godwit_launcher::rpc::CarriedFacts;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch};
use serde_json::{Value, json};
use std::cell::Cell;
use std::time::{Duration, Instant, SystemTime};

pub const TOKEN: u32 = 0xF1EE;
pub const GUEST: &str = "flyer";
const STATION: Station = [2, 0x66, 0, 0, 2, 1];
/// So many beats show that a guest goes on.
const BEATS: usize = 25;
pub const PATIENCE: Duration = Duration::from_secs(120);
pub const MOMENT: Duration = Duration::from_millis(20);

/// A cluster whose guest is on its way each time that something breaks.
pub struct Stage {
    pub cluster: Cluster,
    witness: Witness,
    migrations: Cell<usize>,
}

/// A migration under way.
pub struct Flight {
    pub name: String,
    /// The node that it leaves.
    pub from: String,
    since: SystemTime,
}

impl Stage {
    /// With a guest that says fifty times a second that it runs, and migrations that may take as long as they like.
    pub async fn of(cluster: Cluster) -> Self {
        cluster.build_rom_image(Parameters { token: TOKEN, frame_ticks: 2, ..Parameters::default() });
        let witness = cluster.witness().await;
        let stage = Self { cluster, witness, migrations: Cell::default() };
        // At a byte a second none ends before that is changed.
        stage
            .configure(json!({"bandwidthPerMigration": "1", "completionTimeoutPerGiB": 0, "progressTimeout": 0}))
            .await;
        let cluster = &stage.cluster;
        cluster.apply(heard_vmi(GUEST, STATION)).await.expect("apply VMI");
        cluster.wait(&cluster.vmis(), GUEST, "it runs", |vmi| status(vmi, "phase") == "Running").await;
        stage.beats_on().await;
        // Our kubelets say it as Multus does, on an API server that lets kubelets write little.
        let (pod, _) = cluster.launchers(GUEST).await.remove(0);
        let pod = cluster.pods().get(&pod).await.expect("pod");
        let networks = pod.metadata.annotations.and_then(|mut all| all.remove("k8s.v1.cni.cncf.io/network-status"));
        assert!(networks.as_ref().is_some_and(|said| said.contains("witness")), "{networks:?}");
        stage
    }

    /// Changes how guests are moved from now on.
    pub async fn configure(&self, migrations: Value) {
        let kubevirt = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
        let kubevirt: Api<DynamicObject> = Api::namespaced_with(self.cluster.client.clone(), "kubevirt", &kubevirt);
        let patch = Patch::Merge(json!({"spec": {"configuration": {"migrations": migrations}}}));
        kubevirt.patch("kubevirt", &Default::default(), &patch).await.expect("configure");
    }

    pub fn real(&self) -> &Real {
        self.cluster.real.as_ref().expect("a real API server")
    }

    pub async fn vmi(&self) -> DynamicObject {
        self.cluster.vmis().get(GUEST).await.expect("VMI")
    }

    /// Begins a migration and waits until memory is being sent.
    pub async fn depart(&self) -> Flight {
        self.migrations.set(self.migrations.get() + 1);
        let name = format!("move{}", self.migrations.get());
        let from = status(&self.vmi().await, "nodeName");
        let since = SystemTime::now();
        self.cluster.migrate(GUEST, &name).await;
        let runs = |migration: &DynamicObject| status(migration, "phase") == "Running";
        self.cluster.wait(&self.cluster.migrations(), &name, "it runs", runs).await;
        Flight { name, from, since }
    }

    /// Waits until the guest has gone on for a while from now.
    pub async fn beats_on(&self) {
        let now = SystemTime::now();
        let deadline = Instant::now() + PATIENCE;
        while self.witness.since(STATION, now).beats < BEATS {
            assert!(Instant::now() < deadline, "the guest is silent\n{}", self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// The QEMU that the guest is in on this node has let it run since it came there. (One before 9.0 that translates is held while it
    /// begins to note what its guest writes: docs/data-plane.md.)
    async fn has_not_been_stopped(&self, node: &str) {
        let launchers = self.cluster.launchers(GUEST).await;
        let (pod, _) = launchers.iter().find(|(_, on)| on == node).expect("its launcher");
        let events = self.cluster.with_launcher(pod, async |launcher| launcher.events().await).await.expect("events");
        let turns = events.iter().filter_map(|one| match one.event.as_str() {
            "MIGRATION" => one.data["status"].as_str(),
            turn @ ("STOP" | "RESUME") => Some(turn),
            _ => None,
        });
        let turns: Vec<&str> = turns.skip_while(|turn| *turn != "RESUME").collect();
        let begins = ["RESUME", "STOP", "setup", "active", "RESUME"];
        let runs = turns.iter().filter(|turn| ["STOP", "RESUME"].contains(turn)).count() == 1;
        assert!(runs || turns == begins, "{events:?}\n{}", self.cluster.words());
    }

    /// Lets the guest arrive; it goes on in its target's pod as it was, and has stood still once: for the switch.
    pub async fn arrive(&self, flight: &Flight) {
        self.has_not_been_stopped(&flight.from).await;
        let unlimited = Patch::Merge(json!({"metadata": {"annotations": {"godwit.io/bandwidth-per-migration": "0"}}}));
        self.cluster.migrations().patch(&flight.name, &Default::default(), &unlimited).await.expect("annotate");
        let over = |migration: &DynamicObject| ["Succeeded", "Failed"].contains(&status(migration, "phase").as_str());
        let migration = self.cluster.wait(&self.cluster.migrations(), &flight.name, "it is over", over).await;
        assert_eq!(status(&migration, "phase"), "Succeeded", "{}\n{}", migration.data, self.cluster.words());
        let vmi = self.vmi().await;
        let node = status(&vmi, "nodeName");
        assert_ne!(node, flight.from);
        guest_runs_on_in(&self.cluster, &status(&vmi, "migrationState/targetPod"), TOKEN).await;
        one_launcher_is_left(&self.cluster, GUEST).await;
        self.beats_on().await;
        self.has_not_been_stopped(&node).await;
        let beats = self.witness.beats(STATION);
        assert_eq!(complaint(&beats), None);
        let switch = switch_gap(&beats, flight.since).expect("it was heard on both nodes");
        let figure = |name: &str| status(&vmi, &format!("migrationState/progress/{name}"));
        println!(
            "{}: the guest was silent for {} ms at most, and for {} ms at the switch, which took {} ms by the API and {} ms by QEMU",
            flight.name,
            longest_gap(&beats, flight.since).as_millis(),
            switch.as_millis(),
            figure("downtimeMilliseconds"),
            figure("qemuDowntimeMilliseconds"),
        );
    }

    /// Waits until this controller holds the lease.
    pub async fn leads(&self, who: &str) {
        let api: Api<Lease> = Api::namespaced(self.cluster.client.clone(), "kubevirt");
        let deadline = Instant::now() + PATIENCE;
        let holder = async || api.get("virt-controller").await.expect("lease").spec?.holder_identity;
        while holder().await.as_deref() != Some(who) {
            assert!(Instant::now() < deadline, "{who} does not lead\n{}", self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// Waits until a process has said something.
    pub async fn says(&self, process: &str, what: &str) {
        let log = self.cluster.data_dir().join(format!("log/{process}.log"));
        let deadline = Instant::now() + PATIENCE;
        while !std::fs::read_to_string(&log).expect("its log").contains(what) {
            assert!(Instant::now() < deadline, "{process} does not say {what:?}\n{}", self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// What the source's launcher says of the stream that it carries, and since when its QEMU sends.
    pub async fn stream(&self, from: &str) -> (i64, CarriedFacts) {
        let launchers = self.cluster.launchers(GUEST).await;
        let (pod, _) = launchers.iter().find(|(_, on)| on == from).expect("the source's launcher");
        let state = self.cluster.with_launcher(pod, async |launcher| launcher.state().await).await.expect("state");
        let facts = state.migration.expect("its migration");
        (facts.start_us.expect("it sends"), facts.carried.expect("its memory goes through the launcher"))
    }

    /// Replaces a node's handler as a DaemonSet does: the next one is ready before the one before is told to end.
    pub async fn roll(&self, node: &str, turn: usize) {
        let next = self.real().start_handler(node, turn + 1).await;
        self.says(&next, "another handler of this node runs").await;
        let before = format!("{node}-handler-{turn}");
        assert!(self.real().runs(&before));
        // The next one begins when it has let go of the node, some moments before its process is no more.
        self.real().end(&before).await;
        self.says(&next, "handler starts").await;
        self.says(&before, "handler stopped").await;
    }

    /// A handler is killed in flight. The stream of memory goes through the launchers: the guest arrives.
    pub async fn without_handler(&self, of_source: bool) {
        let flight = self.depart().await;
        let to = status(&self.vmi().await, "migrationState/targetNode");
        let node = if of_source { &flight.from } else { &to };
        kill_hard(self.cluster.pid(node));
        self.beats_on().await;
        self.cluster.start_node(node);
        self.arrive(&flight).await;
    }
}
