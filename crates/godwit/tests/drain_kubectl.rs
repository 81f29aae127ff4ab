//! Nodes are emptied with nothing but kubectl.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::linux::{build_demo_image, linux_vmi};
use common::{Cluster, rom_vmi, status, text};
use godwit_guest_rom::Parameters;
use godwit_network::Namespace;
use godwit_network::pinger::Pinger;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// As the seeds have them.
const FLAGS: [&str; 3] = ["--delete-emptydir-data", "--ignore-daemonsets=true", "--force"];

/// A VM that is always to run, of this VMI.
fn vm(vmi: Value, strategy: Option<&str>) -> Value {
    let mut template = json!({"metadata": vmi["metadata"], "spec": vmi["spec"]});
    template["metadata"].as_object_mut().expect("metadata").remove("name");
    if let Some(strategy) = strategy {
        template["spec"]["evictionStrategy"] = strategy.into();
    }
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": vmi["metadata"]["name"]},
        "spec": {"runStrategy": "Always", "template": template},
    })
}

/// On the pod network, bridged.
fn bridged(mut vmi: Value) -> Value {
    vmi["spec"]["domain"]["devices"] = json!({"interfaces": [{"name": "default", "bridge": {}}]});
    vmi["spec"]["networks"] = json!([{"name": "default", "pod": {}}]);
    vmi
}

fn migratable(vmi: &DynamicObject) -> Option<Value> {
    let conditions = vmi.data["status"]["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == "LiveMigratable").cloned()
}

/// Starts these VMs while the other nodes take nothing.
async fn start_on(cluster: &Cluster, kubectl: &Path, node: &str, others: &[&str], vms: Vec<Value>) {
    cluster.kubectl(kubectl, &[&["cordon"], others].concat());
    let names: Vec<String> = vms.iter().map(|vm| vm["metadata"]["name"].as_str().expect("a name").to_owned()).collect();
    for vm in vms {
        cluster.apply(vm).await.expect("apply");
    }
    for name in names {
        let runs = |vmi: &DynamicObject| status(vmi, "phase") == "Running" && migratable(vmi).is_some();
        let vmi = cluster.wait(&cluster.vmis(), &name, "it runs", runs).await;
        assert_eq!(status(&vmi, "nodeName"), node);
    }
    cluster.kubectl(kubectl, &[&["uncordon"], others].concat());
}

/// `kubectl drain`, on its way.
fn drain(cluster: &Cluster, kubectl: &Path, arguments: &[&str]) -> Child {
    Command::new(kubectl)
        .arg("drain")
        .args(arguments)
        .args(FLAGS)
        .env("KUBECONFIG", cluster.kubeconfig())
        .env("HOME", cluster.data_dir())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kubectl starts")
}

fn succeeds(drain: Child) -> String {
    let output = drain.wait_with_output().expect("kubectl ends");
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{said}");
    said
}

fn uid(object: &DynamicObject) -> String {
    object.metadata.uid.clone().unwrap_or_default()
}

/// The migrations that have been recorded, as (VMI, to).
async fn recorded(cluster: &Cluster) -> Vec<(String, String)> {
    let records =
        cluster.api("godwit.io", "v1alpha1", "MigrationRecord").list(&Default::default()).await.expect("list");
    let word = |record: &DynamicObject, key: &str| record.data["spec"][key].as_str().unwrap_or_default().to_owned();
    records.items.iter().map(|record| (word(record, "vmiName"), word(record, "targetNode"))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_guests_of_every_strategy_is_emptied_while_one_is_pinged() {
    let Some(kubectl) = common::kubectls().pop() else { return };
    let cluster = Cluster::start(3).await;
    cluster.build_rom_image(Parameters::default());
    build_demo_image(&cluster);
    let mut pinged = linux_vmi("pinged", "bridge");
    pinged["metadata"]["annotations"] = json!({"kubevirt.io/allow-pod-bridge-network-live-migration": ""});
    let vms = vec![
        vm(pinged, Some("LiveMigrate")),
        vm(rom_vmi("steady"), Some("LiveMigrate")),
        vm(rom_vmi("willing"), Some("LiveMigrateIfPossible")),
        // Bridged to the pod network without leave to move.
        vm(bridged(rom_vmi("rooted")), Some("LiveMigrateIfPossible")),
        vm(rom_vmi("plain"), None),
        vm(rom_vmi("foreign"), Some("External")),
    ];
    start_on(&cluster, &kubectl, "node1", &["node2", "node3"], vms).await;
    let answers = |vmi: &DynamicObject| status(vmi, "interfaces/0/ipAddress").parse::<Ipv4Addr>().is_ok();
    let vmi = cluster.wait(&cluster.vmis(), "pinged", "it has its address", answers).await;
    let address: Ipv4Addr = status(&vmi, "interfaces/0/ipAddress").parse().expect("an address");
    let outside = Namespace::open(&cluster.namespace("node3")).expect("namespace");
    let pinger = Pinger::start(&outside, address, Duration::from_millis(10)).expect("ping");
    until_answered(&pinger).await;
    let mut before = BTreeMap::new();
    for vmi in cluster.vmis().list(&Default::default()).await.expect("list").items {
        before.insert(vmi.metadata.name.clone().unwrap_or_default(), uid(&vmi));
    }
    assert_eq!(before.len(), 6);

    let drain = drain(&cluster, &kubectl, &["node1", "--timeout=240s"]);
    // Somebody else moves this one, as cluster API's provider would.
    let marked = |vmi: &DynamicObject| status(vmi, "evacuationNodeName") == "node1";
    cluster.wait(&cluster.vmis(), "foreign", "it is marked", marked).await;
    cluster.migrate("foreign", "by-somebody-else").await;
    let said = tokio::task::block_in_place(|| succeeds(drain));
    for name in ["pinged", "steady", "willing", "foreign"] {
        assert!(said.contains(&format!("Eviction triggered evacuation of VMI \"default/{name}\"")), "{name}: {said}");
    }
    assert!(said.contains("node/node1 drained"), "{said}");

    for (name, uid_before) in &before {
        let moved = ["pinged", "steady", "willing", "foreign"].contains(&name.as_str());
        let there = |vmi: &DynamicObject| {
            status(vmi, "phase") == "Running"
                && !["", "node1"].contains(&status(vmi, "nodeName").as_str())
                && status(vmi, "evacuationNodeName").is_empty()
                && (uid(vmi) == *uid_before) == moved
        };
        cluster.wait(&cluster.vmis(), name, "it runs elsewhere", there).await;
        assert!(cluster.launchers(name).await.iter().all(|(_, node)| node != "node1"));
    }
    until_answered(&pinger).await;
    let pings = pinger.stop();
    println!("{} pings, {} lost, longest gap {} ms", pings.sent, pings.lost, pings.longest_gap_us / 1000);
    assert!(cluster.kubectl(&kubectl, &["get", "node", "node1"]).contains("Ready,SchedulingDisabled"));

    // A claim that only one node has, and a guest that may not be ended: the drain waits, and it can be read for what.
    cluster.kubectl(&kubectl, &["uncordon", "node1"]);
    cluster
        .apply(json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "ledger"},
            "spec": {"storageClassName": "local", "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "16Mi"}}},
        }))
        .await
        .expect("apply");
    let mut stuck = rom_vmi("stuck");
    stuck["spec"]["volumes"] = json!([{"name": "books", "persistentVolumeClaim": {"claimName": "ledger"}}]);
    stuck["spec"]["domain"]["devices"]["disks"] = json!([{"name": "books", "disk": {"bus": "virtio"}}]);
    start_on(&cluster, &kubectl, "node1", &["node2", "node3"], vec![vm(stuck, Some("LiveMigrate"))]).await;
    let output = cluster.try_kubectl(&kubectl, &[&["drain", "node1", "--timeout=1s"][..], &FLAGS].concat(), None);
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("VMI stuck is configured with an eviction strategy but is not live-migratable"), "{said}");
    let vmi = cluster.vmis().get("stuck").await.expect("VMI");
    let why = migratable(&vmi).expect("known");
    assert_eq!((&why["status"], &why["reason"]), (&json!("False"), &json!("DisksNotLiveMigratable")));
    assert!(why["message"].as_str().is_some_and(|text| text.contains("PVC ledger is not shared")), "{why}");
    assert_eq!((status(&vmi, "phase"), status(&vmi, "nodeName")), ("Running".to_owned(), "node1".to_owned()));
}

async fn until_answered(pinger: &Pinger) {
    let before = pinger.report().received;
    let deadline = std::time::Instant::now() + Duration::from_secs(120);
    while pinger.report().received <= before {
        assert!(std::time::Instant::now() < deadline, "nobody answers");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_at_once_are_emptied_onto_the_third() {
    let Some(kubectl) = common::kubectls().pop() else { return };
    let cluster = Cluster::start(3).await;
    cluster.build_rom_image(Parameters::default());
    let two = |names: [&str; 2]| names.map(|name| vm(rom_vmi(name), Some("LiveMigrate"))).to_vec();
    start_on(&cluster, &kubectl, "node1", &["node2", "node3"], two(["a1", "a2"])).await;
    start_on(&cluster, &kubectl, "node2", &["node1", "node3"], two(["b1", "b2"])).await;
    cluster.kubectl(&kubectl, &["cordon", "node1", "node2"]);
    let drains = ["node1", "node2"].map(|node| drain(&cluster, &kubectl, &[node, "--timeout=240s"]));
    for drain in drains {
        tokio::task::block_in_place(|| succeeds(drain));
    }
    for name in ["a1", "a2", "b1", "b2"] {
        let vmi = cluster.vmis().get(name).await.expect("VMI");
        assert_eq!((status(&vmi, "phase"), status(&vmi, "nodeName")), ("Running".to_owned(), "node3".to_owned()));
    }
    let all = |records: &[(String, String)]| ["a1", "a2", "b1", "b2"].iter().all(|n| records.iter().any(|r| r.0 == *n));
    let deadline = std::time::Instant::now() + Duration::from_secs(120);
    let mut records = recorded(&cluster).await;
    while !all(&records) {
        assert!(std::time::Instant::now() < deadline, "not all are recorded: {records:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
        records = recorded(&cluster).await;
    }
    assert!(records.iter().all(|(_, to)| to == "node3"), "{records:?}");
}

/// A pod that a budget keeps.
async fn start_kept_pod(cluster: &Cluster) {
    cluster
        .apply(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "kept", "labels": {"app": "kept"}},
            "spec": {"terminationGracePeriodSeconds": 1, "nodeName": "node1", "containers": [
                {"name": "main", "image": "godwit.local/host", "command": ["/bin/sh", "-c", "exec sleep 1000"]}]},
        }))
        .await
        .expect("apply");
    let ready = |pod: &DynamicObject| {
        let conditions = pod.data.pointer("/status/conditions").and_then(Value::as_array);
        conditions.into_iter().flatten().any(|one| one["type"] == "Ready" && one["status"] == "True")
    };
    cluster.wait(&cluster.pods(), "kept", "it is ready", ready).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_flag_of_drain_with_every_kubectl() {
    let kubectls = common::kubectls();
    if kubectls.is_empty() {
        return;
    }
    let cluster = Cluster::start(1).await;
    cluster.build_rom_image(Parameters::default());
    let mut stayer = rom_vmi("stayer");
    stayer["spec"]["evictionStrategy"] = "LiveMigrate".into();
    cluster.apply(stayer).await.expect("apply");
    let known = |vmi: &DynamicObject| status(vmi, "phase") == "Running" && migratable(vmi).is_some();
    cluster.wait(&cluster.vmis(), "stayer", "it runs", known).await;
    cluster
        .apply(json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "keep"},
            "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "kept"}}},
        }))
        .await
        .expect("apply");
    let run = |kubectl: &Path, arguments: &[&str]| {
        let output = cluster.try_kubectl(kubectl, &[&["drain"], arguments].concat(), None);
        (output.status.success(), text(&output.stdout) + &text(&output.stderr))
    };
    let refuses = |kubectl: &Path, arguments: &[&str], why: &str| {
        let (good, said) = run(kubectl, arguments);
        assert!(!good && said.contains(why), "{} {arguments:?}: {said}", kubectl.display());
    };
    let counted = async || {
        start_kept_pod(&cluster).await;
        let counted = |budget: &DynamicObject| budget.data["status"]["currentHealthy"] == 1;
        let budgets = cluster.api("policy", "v1", "PodDisruptionBudget");
        let budget = cluster.wait(&budgets, "keep", "it has counted", counted).await;
        assert_eq!(budget.data["status"]["disruptionsAllowed"], 0);
    };

    // What is refused is asked for again after five seconds, so all ask at once.
    counted().await;
    let dry = ["node1", "--dry-run=server", "--timeout=1s", "--chunk-size=1"];
    let triggered = "Eviction triggered evacuation of VMI \"default/stayer\"";
    all_refuse(&cluster, &kubectls, &dry, triggered);
    assert!(!cluster.kubectl(&kubectls[0], &["get", "node", "node1"]).contains("SchedulingDisabled"));
    let chosen = ["-l", "kubernetes.io/hostname=node1", "--pod-selector=app=kept", "--timeout=1s", "--grace-period=1"];
    let budget = "Cannot evict pod as it would violate the pod's disruption budget.";
    all_refuse(&cluster, &kubectls, &chosen, budget);
    let vmi = cluster.vmis().get("stayer").await.expect("VMI");
    assert_eq!(status(&vmi, "evacuationNodeName"), "", "a dry run marks nothing, nor does asking for other pods");

    for kubectl in &kubectls {
        println!("with {}", kubectl.display());
        counted().await;
        refuses(kubectl, &["node1", "--delete-empty-dir-data"], "unknown flag: --delete-empty-dir-data");
        let local = "(use --delete-emptydir-data to override): default/virt-launcher-stayer-";
        refuses(kubectl, &["node1", "--force"], local);
        refuses(kubectl, &["node1", "--delete-emptydir-data"], "(use --force to override): default/kept");
        let (good, said) = run(kubectl, &[&["node1", "--dry-run=client"][..], &FLAGS].concat());
        assert!(good && said.contains("evicting pod default/kept (dry run)"), "{said}");
        let by_force = ["node1", "--pod-selector=app=kept", "--disable-eviction", "--skip-wait-for-delete-timeout=1"];
        let (good, said) = run(kubectl, &[&by_force[..], &FLAGS, &["--timeout=60s"]].concat());
        assert!(good && said.contains("node/node1 drained"), "{said}");
        cluster.wait_gone(&cluster.pods(), "kept").await;
        cluster.kubectl(kubectl, &["uncordon", "node1"]);
    }
    assert_eq!(status(&cluster.vmis().get("stayer").await.expect("VMI"), "phase"), "Running");
}

fn all_refuse(cluster: &Cluster, kubectls: &[std::path::PathBuf], arguments: &[&str], why: &str) {
    let drains: Vec<Child> = kubectls.iter().map(|kubectl| drain(cluster, kubectl, arguments)).collect();
    for (drain, kubectl) in drains.into_iter().zip(kubectls) {
        let output = drain.wait_with_output().expect("kubectl ends");
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(!output.status.success() && said.contains(why), "{} {arguments:?}: {said}", kubectl.display());
    }
}
