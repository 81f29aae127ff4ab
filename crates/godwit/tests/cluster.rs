//! What breaks around a migration on a real API server: that itself, the leading controller, a node's handler, all certificates. The
//! guest does not notice: its own frames go on, and the QEMU that it is in has not stopped it but for the switch.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::flights::{GUEST, MOMENT, PATIENCE, Stage, TOKEN};
use common::moving::{guest_runs_on_in, one_launcher_is_left};
use common::real::{CONTROLLER, STANDBY, Wishes};
use common::stopped::Stopped;
use common::{Cluster, status, text};
use godwit_api::Installation;
use godwit_guest_rom::Parameters;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch};
use serde_json::{Value, json};
use std::process::Command;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_in_flight_outlives_its_api_server_its_leader_and_its_handlers() {
    let Some(cluster) = Cluster::wished(2, Wishes::default()).await else { return };
    let stage = Stage::of(cluster).await;

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
    let stage = Stage::of(cluster).await;
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
    let stage = Stage::of(cluster).await;
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
