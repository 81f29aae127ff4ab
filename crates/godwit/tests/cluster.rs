//! What breaks around a migration on a real API server: that itself, the leading controller, a node's handler, all certificates. The
//! guest does not notice: its own frames go on, and the QEMU that it is in has not stopped it but for the switch.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::moving::{guest_runs_on_in, one_launcher_is_left};
use common::real::{CONTROLLER, Real, STANDBY, Wishes};
use common::stopped::Stopped;
use common::witnessed::{heard_vmi, switch_gap};
use common::{Cluster, kill_hard, status, text};
use godwit_api::Installation;
use godwit_bench::witness::{Station, Witness, complaint, longest_gap};
use godwit_guest_rom::Parameters;
use godwit_launcher::rpc::CarriedFacts;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch};
use serde_json::{Value, json};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

const TOKEN: u32 = 0xF1EE;
const GUEST: &str = "flyer";
const STATION: Station = [2, 0x66, 0, 0, 2, 1];
/// So many beats show that a guest goes on.
const BEATS: usize = 25;
const PATIENCE: Duration = Duration::from_secs(120);
const MOMENT: Duration = Duration::from_millis(20);

/// A cluster whose guest is on its way each time that something breaks.
struct Stage {
    cluster: Cluster,
    witness: Witness,
    migrations: usize,
}

/// A migration under way.
struct Flight {
    name: String,
    from: String,
    since: SystemTime,
}

impl Stage {
    /// With a guest that says fifty times a second that it runs, and migrations that may take as long as they like.
    async fn of(cluster: Cluster) -> Self {
        cluster.build_rom_image(Parameters { token: TOKEN, frame_ticks: 2, ..Parameters::default() });
        let witness = cluster.witness().await;
        let stage = Self { cluster, witness, migrations: 0 };
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
    async fn configure(&self, migrations: Value) {
        let kubevirt = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
        let kubevirt: Api<DynamicObject> = Api::namespaced_with(self.cluster.client.clone(), "kubevirt", &kubevirt);
        let patch = Patch::Merge(json!({"spec": {"configuration": {"migrations": migrations}}}));
        kubevirt.patch("kubevirt", &Default::default(), &patch).await.expect("configure");
    }

    fn real(&self) -> &Real {
        self.cluster.real.as_ref().expect("a real API server")
    }

    async fn vmi(&self) -> DynamicObject {
        self.cluster.vmis().get(GUEST).await.expect("VMI")
    }

    /// Begins a migration and waits until memory is being sent.
    async fn depart(&mut self) -> Flight {
        self.migrations += 1;
        let name = format!("move{}", self.migrations);
        let from = status(&self.vmi().await, "nodeName");
        let since = SystemTime::now();
        self.cluster.migrate(GUEST, &name).await;
        let runs = |migration: &DynamicObject| status(migration, "phase") == "Running";
        self.cluster.wait(&self.cluster.migrations(), &name, "it runs", runs).await;
        Flight { name, from, since }
    }

    /// Waits until the guest has gone on for a while from now.
    async fn beats_on(&self) {
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
    async fn arrive(&self, flight: &Flight) {
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
    async fn leads(&self, who: &str) {
        let api: Api<Lease> = Api::namespaced(self.cluster.client.clone(), "kubevirt");
        let deadline = Instant::now() + PATIENCE;
        let holder = async || api.get("virt-controller").await.expect("lease").spec?.holder_identity;
        while holder().await.as_deref() != Some(who) {
            assert!(Instant::now() < deadline, "{who} does not lead\n{}", self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// Waits until a process has said something.
    async fn says(&self, process: &str, what: &str) {
        let log = self.cluster.data_dir().join(format!("log/{process}.log"));
        let deadline = Instant::now() + PATIENCE;
        while !std::fs::read_to_string(&log).expect("its log").contains(what) {
            assert!(Instant::now() < deadline, "{process} does not say {what:?}\n{}", self.cluster.words());
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// What the source's launcher says of the stream that it carries, and since when its QEMU sends.
    async fn stream(&self, from: &str) -> (i64, CarriedFacts) {
        let launchers = self.cluster.launchers(GUEST).await;
        let (pod, _) = launchers.iter().find(|(_, on)| on == from).expect("the source's launcher");
        let state = self.cluster.with_launcher(pod, async |launcher| launcher.state().await).await.expect("state");
        let facts = state.migration.expect("its migration");
        (facts.start_us.expect("it sends"), facts.carried.expect("its memory goes through the launcher"))
    }

    /// Replaces a node's handler as a DaemonSet does: the next one is ready before the one before is told to end.
    async fn roll(&self, node: &str, turn: usize) {
        let next = self.real().start_handler(node, turn + 1).await;
        self.says(&next, "another handler of this node runs").await;
        let before = format!("{node}-handler-{turn}");
        assert!(self.real().runs(&before));
        nix::sys::signal::kill(self.cluster.pid(&before), nix::sys::signal::Signal::SIGTERM).expect("SIGTERM");
        self.says(&next, "handler starts").await;
        assert!(!self.real().runs(&before));
        self.says(&before, "handler stopped").await;
    }

    /// A handler is killed in flight. The stream of memory goes through the launchers: the guest arrives.
    async fn without_handler(&mut self, of_source: bool) {
        let flight = self.depart().await;
        let to = status(&self.vmi().await, "migrationState/targetNode");
        let node = if of_source { &flight.from } else { &to };
        kill_hard(self.cluster.pid(node));
        self.beats_on().await;
        self.cluster.start_node(node);
        self.arrive(&flight).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_in_flight_outlives_its_api_server_its_leader_and_its_handlers() {
    let Some(cluster) = Cluster::wished(2, Wishes::default()).await else { return };
    let mut stage = Stage::of(cluster).await;

    let flight = stage.depart().await;
    stage.real().kill(common::real::API_SERVER);
    stage.beats_on().await;
    stage.real().start_api_server();
    stage.real().until_it_serves(&stage.cluster.client).await;
    stage.arrive(&flight).await;

    // The leader dies, and the other one goes on where it was.
    stage.real().start_controller(STANDBY);
    stage.says(STANDBY, "all kinds listed").await;
    let flight = stage.depart().await;
    stage.real().kill(CONTROLLER);
    stage.beats_on().await;
    stage.leads(STANDBY).await;
    stage.arrive(&flight).await;

    // The leader is stopped for longer than its lease, and does not come between the other one's decisions afterwards.
    stage.real().start_controller(CONTROLLER);
    let flight = stage.depart().await;
    let leader = Stopped::stop(stage.cluster.pid(STANDBY));
    stage.leads(CONTROLLER).await;
    stage.arrive(&flight).await;
    drop(leader);
    stage.says(STANDBY, "this controller decides no more").await;
    let flight = stage.depart().await;
    stage.arrive(&flight).await;
    stage.leads(CONTROLLER).await;

    stage.without_handler(true).await;
    stage.without_handler(false).await;
}

/// The connections are those of the nodes' network, and the launchers carry the stream: it outlives whoever opened it, at both ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_in_flight_outlives_the_replacement_of_its_handlers() {
    let Some(cluster) = Cluster::wished(2, Wishes::default()).await else { return };
    cluster.real.as_ref().expect("a real API server").take_handlers_apart().await;
    let mut stage = Stage::of(cluster).await;
    let flight = stage.depart().await;
    let to = status(&stage.vmi().await, "migrationState/targetNode");
    let (began, first) = stage.stream(&flight.from).await;
    assert!(first.flows && first.link == 0, "{first:?}");
    for turn in 1..=2 {
        for node in [&flight.from, &to] {
            stage.roll(node, turn).await;
            stage.beats_on().await;
            let (start, now) = stage.stream(&flight.from).await;
            assert_eq!((start, now.link, now.flows), (began, 0, true), "the same stream\n{}", stage.cluster.words());
        }
    }
    // What is ordered now is ordered by the last ones, of the stream that the first ones have opened.
    let slowly = Patch::Merge(json!({"metadata": {"annotations": {"godwit.io/bandwidth-per-migration": "8Ki"}}}));
    stage.cluster.migrations().patch(&flight.name, &Default::default(), &slowly).await.expect("annotate");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (start, now) = stage.stream(&flight.from).await;
        assert_eq!((start, now.link, now.flows), (began, 0, true), "the same stream\n{}", stage.cluster.words());
        if now.out > first.out {
            break;
        }
        assert!(Instant::now() < deadline, "nothing is sent\n{}", stage.cluster.words());
        tokio::time::sleep(MOMENT).await;
    }
    stage.arrive(&flight).await;
    // And what is begun now is begun by the last ones.
    let flight = stage.depart().await;
    stage.arrive(&flight).await;
}

/// From the CA down to what each node shows, all is replaced while one migration is under way: no end of it knows what it has begun
/// with any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_in_flight_outlives_all_certificates() {
    let Some(cluster) = Cluster::rotating(2, ["100s", "20s"]).await else { return };
    let mut stage = Stage::of(cluster).await;
    let flight = stage.depart().await;
    let first = stage.cluster.signing_ca().await;
    let (_, before) = stage.cluster.node_certificates().await;
    let deadline = Instant::now() + Duration::from_secs(240);
    while stage.cluster.published_cas().await.contains(first.trim()) {
        assert!(Instant::now() < deadline, "the first CA is still published\n{}", stage.cluster.words());
        stage.beats_on().await;
    }
    let (_, after) = stage.cluster.node_certificates().await;
    assert!(after >= before + 4, "{before} certificates of nodes have become {after}\n{}", stage.cluster.words());
    assert_eq!(status(&stage.cluster.migrations().get(&flight.name).await.expect("VMIM"), "phase"), "Running");
    stage.arrive(&flight).await;
    println!("while the CA and {} certificates of nodes were replaced", after - before);
    // And what is begun now is begun with the new ones.
    let flight = stage.depart().await;
    stage.arrive(&flight).await;
}

/// A node that has been taken over cannot have another one fenced, closed or shown as alive.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_writes_only_the_node_and_the_lease_of_its_own_node() {
    let Some(cluster) = Cluster::wished(2, Wishes::default()).await else { return };
    let own_lease = || -> Api<Lease> { Api::namespaced(cluster.client.clone(), "kubevirt") };
    // It is written by the handler: what the policy lets through.
    let deadline = Instant::now() + PATIENCE;
    while own_lease().get_opt("virt-handler-node1").await.expect("get").is_none() {
        assert!(Instant::now() < deadline, "no lease of node1\n{}", cluster.words());
        tokio::time::sleep(MOMENT).await;
    }
    let handler = cluster.real.as_ref().expect("a real API server").handler_of("node1", &cluster.kubeconfig()).await;
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(handler.clone());
    let leases: Api<Lease> = Api::namespaced(handler, "kubevirt");
    let mark = Patch::Merge(json!({"metadata": {"annotations": {"test": "was here"}}}));
    nodes.patch("node1", &Default::default(), &mark).await.expect("its own node");
    // The API server takes a moment to compile what has just been applied.
    let refusal = loop {
        match nodes.patch("node2", &Default::default(), &mark).await {
            Err(kube::Error::Api(refusal)) => break refusal,
            other => assert!(Instant::now() < deadline, "not refused: {other:?}"),
        }
        tokio::time::sleep(MOMENT).await;
    };
    assert_eq!(refusal.code, 403, "{refusal:?}");
    assert!(refusal.message.contains("may change only the Node that it runs on"), "{refusal:?}");
    let mut other = own_lease().get("virt-handler-node1").await.expect("a lease");
    other.metadata = kube::api::ObjectMeta { name: Some("virt-handler-node3".into()), ..Default::default() };
    let refused = leases.create(&Default::default(), &other).await.expect_err("another node's lease").to_string();
    assert!(refused.contains("may write only the Lease of the node that it runs on"), "{refused}");
    let controllers = own_lease().get("virt-controller").await.expect("the controllers' lease");
    let refused = leases.replace("virt-controller", &Default::default(), &controllers).await;
    let refused = refused.expect_err("the controllers' lease").to_string();
    assert!(refused.contains("may write only the Lease"), "{refused}");
}

/// All of godwit in a namespace of another name, and none that is called kubevirt: the KubeVirt object there says how guests leave a
/// node, an eviction is judged by it, nodes have their certificates from there, and virtctl's requests find them.
#[tokio::test(flavor = "multi_thread")]
async fn an_installation_in_another_namespace_moves_guests_as_its_kubevirt_object_says() {
    const NAMESPACE: &str = "vms-9";
    let wishes = Wishes { installation: Installation::new(NAMESPACE), ..Wishes::default() };
    let Some(cluster) = Cluster::wished(2, wishes).await else { return };
    let Some(kubectl) = common::kubectls().pop() else { return };
    cluster.build_rom_image(Parameters { token: TOKEN, ..Parameters::default() });
    let kubevirt = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
    let kubevirt: Api<DynamicObject> = Api::namespaced_with(cluster.client.clone(), NAMESPACE, &kubevirt);
    let configuration = json!({"evictionStrategy": "LiveMigrate", "migrations": {"completionTimeoutPerGiB": 777}});
    let patch = Patch::Merge(json!({"spec": {"configuration": configuration}}));
    kubevirt.patch("kubevirt", &Default::default(), &patch).await.expect("configure");
    cluster.wait(&kubevirt, "kubevirt", "it is taken", |one| status(one, "phase") == "Deployed").await;

    // It has no strategy of its own.
    cluster.start_rom_guest(GUEST).await;
    let from = status(&cluster.vmis().get(GUEST).await.expect("VMI"), "nodeName");
    let refused = cluster.evict(&kubectl, GUEST, false).await;
    assert!(refused.contains("Eviction triggered evacuation of VMI"), "{refused}");
    let away =
        |vmi: &DynamicObject| status(vmi, "migrationState/completed") == "true" && status(vmi, "nodeName") != from;
    let vmi = cluster.wait(&cluster.vmis(), GUEST, "it has left its node", away).await;
    assert_eq!(status(&vmi, "migrationState/migrationConfiguration/completionTimeoutPerGiB"), "777");
    guest_runs_on_in(&cluster, &status(&vmi, "migrationState/targetPod"), TOKEN).await;
    one_launcher_is_left(&cluster, GUEST).await;

    // Its node's handler is found by its lease, and knows who asks.
    let guest = |action| ("virtualmachineinstances", GUEST, action);
    let done = (200, String::new());
    assert_eq!(cluster.put_action(None, guest("pause"), &json!({})).await, done);
    let is_paused = |vmi: &DynamicObject| vmi.data["status"]["conditions"].to_string().contains("\"Paused\"");
    cluster.wait(&cluster.vmis(), GUEST, "it is paused", is_paused).await;
    assert_eq!(cluster.put_action(None, guest("unpause"), &json!({})).await, done);

    // All that is godwit's own is there, and nothing of it anywhere else.
    let all = |kind: &str| {
        let path = "jsonpath={range .items[*]}{.metadata.namespace}/{.metadata.name}{\"\\n\"}{end}";
        cluster.kubectl(&kubectl, &["get", kind, "--all-namespaces", "-o", path])
    };
    for (kind, names) in [
        ("leases.coordination.k8s.io", &["virt-controller", "virt-handler-node1", "virt-handler-node2"][..]),
        ("secrets", &["godwit-ca"]),
        ("configmaps", &["godwit-ca-bundle", "godwit-migration-slots"]),
    ] {
        let there = all(kind);
        for name in names {
            let found: Vec<&str> = there.lines().filter(|line| line.ends_with(&format!("/{name}"))).collect();
            assert_eq!(found, [format!("{NAMESPACE}/{name}")], "{there}");
        }
    }
    let namespaces = cluster.kubectl(&kubectl, &["get", "namespaces", "-o", "name"]);
    assert!(!namespaces.lines().any(|line| line == "namespace/kubevirt"), "{namespaces}");

    // A plan finds the configuration without being told where it is.
    let kubeconfig = cluster.kubeconfig();
    let plan = ["plan", "drain", "node1", "--kubeconfig", kubeconfig.to_str().expect("UTF-8"), "-o", "json"];
    let plan = Command::new(env!("CARGO_BIN_EXE_godwit")).args(plan).output().expect("godwit starts");
    let plan: Value = serde_json::from_slice(&plan.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&plan.stderr)));
    let notes = plan["notes"].to_string();
    assert!(!notes.contains("KubeVirt object") && !notes.contains("configmaps"), "{notes}");
}

/// Every group of decisions but NodeMaintenances: what stands for a KubeVirt that knows of none.
const OTHERS: [&str; 8] = ["vm", "vmi", "migration", "evacuation", "history", "node", "fence", "kubevirt"];

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_maintained_beside_controllers_that_know_of_no_maintenance() {
    let Some(kubectl) = common::kubectls().pop() else { return };
    let Some(cluster) = Cluster::wished(2, Wishes::default()).await else { return };
    cluster.build_rom_image(Parameters { token: TOKEN, ..Parameters::default() });
    let real = cluster.real.as_ref().expect("a real API server");
    real.kill(CONTROLLER);
    real.start_controllers_of(CONTROLLER, &OTHERS);
    let wanted = ["manifests", "--components", "maintenance", "--namespace", "maintenance"];
    let printed = Command::new(env!("CARGO_BIN_EXE_godwit")).args(wanted).output().expect("godwit starts");
    let apply = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
    let applied = cluster.try_kubectl(&kubectl, &apply, Some(&text(&printed.stdout)));
    assert!(applied.status.success(), "{}", text(&applied.stderr));
    real.start_maintenance(&cluster.client, "maintenance").await;

    let mut vmi = common::rom_vmi(GUEST);
    vmi["spec"]["evictionStrategy"] = "LiveMigrate".into();
    cluster.apply(vmi).await.expect("apply");
    let vmi = cluster.wait(&cluster.vmis(), GUEST, "it runs", |vmi| status(vmi, "phase") == "Running").await;
    let from = status(&vmi, "nodeName");
    let manifest = format!(
        "apiVersion: nodemaintenance.medik8s.io/v1beta1\nkind: NodeMaintenance\nmetadata: {{name: away}}\nspec: {{nodeName: {from}}}\n"
    );
    let applied = cluster.try_kubectl(&kubectl, &["apply", "-f", "-"], Some(&manifest));
    assert!(applied.status.success(), "{}", text(&applied.stderr));
    let kind = GroupVersionKind::gvk("nodemaintenance.medik8s.io", "v1beta1", "NodeMaintenance");
    let maintenances = Api::all_with(cluster.client.clone(), &ApiResource::from_gvk(&kind));
    cluster.wait(&maintenances, "away", "the node is empty", |one| status(one, "phase") == "Succeeded").await;
    let vmi = cluster.vmis().get(GUEST).await.expect("VMI");
    assert_ne!(status(&vmi, "nodeName"), from);
    guest_runs_on_in(&cluster, &status(&vmi, "migrationState/targetPod"), TOKEN).await;
    let node = cluster.kubectl(&kubectl, &["get", "nodes", &from, "--no-headers"]);
    assert!(node.contains("SchedulingDisabled"), "{node}");
    cluster.kubectl(&kubectl, &["delete", "nodemaintenances.nodemaintenance.medik8s.io", "away", "--timeout=60s"]);
    let node = cluster.kubectl(&kubectl, &["get", "nodes", &from, "--no-headers"]);
    assert!(!node.contains("SchedulingDisabled"), "{node}");
}
