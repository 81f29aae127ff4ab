//! Godwit's own fields of a NodeMaintenance, on real guests: `dryRun`, `deadline`, `onDeadline`, `maxParallel`, `returnHome`; and
//! two nodes in maintenance at once.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{Cluster, status};
use godwit_guest_rom::Parameters;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

const GROUP: &str = "nodemaintenance.medik8s.io";
const NODES: [&str; 3] = ["node1", "node2", "node3"];

fn cluster_wide(cluster: &Cluster, group: &str, version: &str, kind: &str) -> Api<DynamicObject> {
    Api::all_with(cluster.client.clone(), &ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind)))
}

/// A guest that is to be moved rather than ended, on this node, and known to be migratable.
async fn start(cluster: &Cluster, kubectl: &Path, name: &str, node: &str, selector: Value) {
    for other in NODES.iter().filter(|other| **other != node) {
        cluster.kubectl(kubectl, &["cordon", other]);
        let nodes = cluster_wide(cluster, "", "v1", "Node");
        let told = |node: &DynamicObject| node.data["spec"]["taints"][0]["key"] == "node.kubernetes.io/unschedulable";
        cluster.wait(&nodes, other, "a taint tells of the cordon", told).await;
    }
    let mut vmi = common::rom_vmi(name);
    vmi["spec"]["evictionStrategy"] = "LiveMigrate".into();
    vmi["spec"]["nodeSelector"] = selector;
    cluster.apply(vmi).await.expect("apply");
    let ready = |vmi: &DynamicObject| {
        let conditions = vmi.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let migratable = |one: &Value| one["type"] == "LiveMigratable" && one["status"] == "True";
        runs_on(vmi, node) && conditions.iter().any(migratable)
    };
    cluster.wait(&cluster.vmis(), name, "it runs and can be moved", ready).await;
    for other in NODES.iter().filter(|other| **other != node) {
        cluster.kubectl(kubectl, &["uncordon", other]);
        let nodes = cluster_wide(cluster, "", "v1", "Node");
        let open = |node: &DynamicObject| node.data["spec"].get("taints").is_none();
        cluster.wait(&nodes, other, "its taint is gone as well", open).await;
    }
}

fn runs_on(vmi: &DynamicObject, node: &str) -> bool {
    status(vmi, "phase") == "Running" && status(vmi, "nodeName") == node
}

/// Asks for a maintenance of a node; it has the node's name.
async fn begin(cluster: &Cluster, node: &str, also: Value) {
    let mut spec = json!({"nodeName": node, "reason": "a test"});
    for (key, value) in also.as_object().expect("an object") {
        spec[key] = value.clone();
    }
    let object = json!({
        "apiVersion": format!("{GROUP}/v1beta1"), "kind": "NodeMaintenance", "metadata": {"name": node}, "spec": spec,
    });
    let api = cluster_wide(cluster, GROUP, "v1beta1", "NodeMaintenance");
    let object: DynamicObject = serde_json::from_value(object).expect("an object");
    api.create(&Default::default(), &object).await.expect("create");
}

async fn end(cluster: &Cluster, node: &str) {
    let api = cluster_wide(cluster, GROUP, "v1beta1", "NodeMaintenance");
    api.delete(node, &Default::default()).await.expect("delete");
    cluster.wait_gone(&api, node).await;
}

/// Migrations that are not over, by their VMIs.
async fn moving(cluster: &Cluster) -> Vec<String> {
    let all = cluster.migrations().list(&Default::default()).await.expect("list").items;
    let open = all.iter().filter(|one| !["Succeeded", "Failed"].contains(&status(one, "phase").as_str()));
    open.map(|one| one.data["spec"]["vmiName"].as_str().unwrap_or_default().to_owned()).collect()
}

/// Marks a guest that runs on a node where alone it may run: its evacuation waits for ever.
async fn stick(cluster: &Cluster, kubectl: &Path) {
    let refused = cluster.evict(kubectl, "stuck", false).await;
    assert!(refused.contains("Eviction triggered evacuation of VMI \"default/stuck\""), "{refused}");
    let made = |vmi: &DynamicObject| !status(vmi, "evacuation/migrationName").is_empty();
    let vmi = cluster.wait(&cluster.vmis(), "stuck", "it is to be moved", made).await;
    let waits = |one: &DynamicObject| status(one, "phase") == "Scheduling";
    let attempt = status(&vmi, "evacuation/migrationName");
    cluster.wait(&cluster.migrations(), &attempt, "no node takes it", waits).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_maintenance_keeps_its_time_its_bounds_and_its_guests() {
    let Some(kubectl) = common::kubectls().pop() else { return };
    let cluster = Cluster::start(3).await;
    cluster.build_rom_image(Parameters::default());
    cluster.kubectl(&kubectl, &["label", "nodes", "--all", "rack=one"]);
    start(&cluster, &kubectl, "stuck", "node1", json!({"kubernetes.io/hostname": "node1"})).await;
    start(&cluster, &kubectl, "returns", "node1", json!({})).await;
    start(&cluster, &kubectl, "stays-away", "node1", json!({"rack": "one"})).await;
    start(&cluster, &kubectl, "neighbour", "node2", json!({})).await;
    let maintenances = cluster_wide(&cluster, GROUP, "v1beta1", "NodeMaintenance");
    let nodes = cluster_wide(&cluster, "", "v1", "Node");
    let vmis = cluster.vmis();

    a_dry_run_only_tells(&cluster, &maintenances, &nodes).await;

    // The time is up: what was done is taken back. (With one turn for all, which the guest has that cannot go.)
    stick(&cluster, &kubectl).await;
    // That it is closed by then no clock can promise: so it goes on beyond its deadline until it is told to end there.
    begin(&cluster, "node1", json!({"deadline": "1s", "onDeadline": "Continue", "maxParallel": 1})).await;
    let late = |one: &DynamicObject| status(one, "closed") == "true" && status(one, "deadlinePassed") == "true";
    cluster.wait(&maintenances, "node1", "it is closed, and its time is up", late).await;
    let told = "DeadlinePassed";
    cluster.hears_of("NodeMaintenance", "node1", told, |event| event.reason == told).await;
    assert_eq!(nodes.get("node1").await.expect("node").data["spec"]["unschedulable"], true);
    let abort = kube::api::Patch::Merge(json!({"spec": {"onDeadline": "Abort"}}));
    maintenances.patch("node1", &Default::default(), &abort).await.expect("patch");
    let failed = |one: &DynamicObject| status(one, "phase") == "Failed";
    let given_up = cluster.wait(&maintenances, "node1", "its time is up", failed).await;
    let why = status(&given_up, "lastError");
    assert!(
        why.starts_with("the node was not empty at the deadline 20") && why.ends_with(": 3 pods were left"),
        "{why}"
    );
    let node = nodes.get("node1").await.expect("node");
    let spec = &node.data["spec"];
    assert_eq!((spec.get("unschedulable"), spec.get("taints")), (None, None), "{spec}");
    cluster.hears_of("Node", "node1", "that it is open", |event| event.reason == "UncordonNode").await;
    let told = "FailedMaintenance";
    cluster.hears_of("NodeMaintenance", "node1", told, |event| event.reason == told).await;
    let free = |vmi: &DynamicObject| {
        status(vmi, "evacuationNodeName").is_empty() && status(vmi, "evacuation").is_empty() && runs_on(vmi, "node1")
    };
    for vmi in ["stuck", "returns", "stays-away"] {
        cluster.wait(&vmis, vmi, "nothing is asked of it", free).await;
    }
    let all = cluster.migrations().list(&Default::default()).await.expect("list").items;
    for one in all.iter().filter_map(|one| one.metadata.name.as_deref()) {
        let deadline = Instant::now() + Duration::from_secs(120);
        // It goes at any moment, or stays as one that has failed.
        while let Some(left) = cluster.migrations().get_opt(one).await.expect("get") {
            if status(&left, "phase") == "Failed" {
                break;
            }
            assert!(Instant::now() < deadline, "{one} is not taken back: {}\n{}", left.data, cluster.words());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    end(&cluster, "node1").await;

    // Its time is up, and it goes on. Nobody else has a turn as long as one guest has it.
    stick(&cluster, &kubectl).await;
    let wishes = json!({"deadline": "1s", "onDeadline": "Continue", "maxParallel": 1, "returnHome": true});
    begin(&cluster, "node1", wishes).await;
    let late = |one: &DynamicObject| {
        let waits = |name: &str| {
            let all = one.data["status"]["virtualMachineInstances"].as_array().cloned().unwrap_or_default();
            let its = all.iter().find(|vm| vm["name"] == name).cloned().unwrap_or_default();
            its["message"] == "it waits for its turn (maxParallel)"
        };
        status(one, "deadlinePassed") == "true" && waits("returns") && waits("stays-away")
    };
    let late = cluster.wait(&maintenances, "node1", "its time is up and two wait for their turn", late).await;
    assert_eq!(
        (status(&late, "phase"), &late.data["status"]["leaving"]),
        ("Running".into(), &json!(["default/stuck"]))
    );
    assert_eq!(nodes.get("node1").await.expect("node").data["spec"]["unschedulable"], true);
    assert_eq!(moving(&cluster).await, ["stuck"]);

    // Two nodes at once: all go to the third. (One that is in nobody's way is over at once.)
    begin(&cluster, "node2", json!({})).await;
    vmis.delete("stuck", &Default::default()).await.expect("delete");
    let empty = |one: &DynamicObject| status(one, "phase") == "Succeeded";
    for node in ["node1", "node2"] {
        cluster.wait(&maintenances, node, "it is empty", empty).await;
    }
    let records = cluster.api("godwit.io", "v1alpha1", "MigrationRecord");
    for vmi in ["returns", "stays-away", "neighbour"] {
        assert!(runs_on(&vmis.get(vmi).await.expect("VMI"), "node3"), "{vmi}");
    }
    let moved = |record: &DynamicObject| record.data["spec"]["result"] == "Succeeded";
    for record in records.list(&Default::default()).await.expect("records").items.iter().filter(|one| moved(one)) {
        assert_eq!(record.data["spec"]["targetNode"], "node3", "{}", record.data["spec"]);
    }

    // Who still fits comes home, and the guest of the other node has none.
    cluster.kubectl(&kubectl, &["label", "node", "node1", "rack-"]);
    end(&cluster, "node2").await;
    end(&cluster, "node1").await;
    cluster.wait(&vmis, "returns", "it is home", |vmi| runs_on(vmi, "node1")).await;
    let told = "StaysAway";
    cluster.hears_of("VirtualMachineInstance", "stays-away", told, |event| event.reason == told).await;
    let settled = |vmi: &DynamicObject| {
        vmi.metadata.annotations.as_ref().is_none_or(|annotations| !annotations.contains_key("godwit.io/home"))
    };
    for (vmi, node) in [("returns", "node1"), ("stays-away", "node3"), ("neighbour", "node3")] {
        let vmi = cluster.wait(&vmis, vmi, "it is expected nowhere", settled).await;
        assert!(runs_on(&vmi, node), "{}", json!(vmi));
    }
    assert!(!cluster.events("VirtualMachineInstance", "neighbour").await.iter().any(|event| event.reason == told));
}

/// A plan, and nothing else.
async fn a_dry_run_only_tells(cluster: &Cluster, maintenances: &Api<DynamicObject>, nodes: &Api<DynamicObject>) {
    let before = nodes.get("node1").await.expect("node");
    begin(cluster, "node1", json!({"dryRun": true, "returnHome": true})).await;
    let planned = |one: &DynamicObject| one.data["status"]["plan"].is_object();
    let plan = cluster.wait(maintenances, "node1", "there is a plan", planned).await;
    assert_eq!(plan.metadata.finalizers, None);
    let status_ = &plan.data["status"];
    let mut outcomes: Vec<(&str, &str, bool)> = Vec::new();
    for vm in status_["plan"]["vms"].as_array().expect("VMs") {
        let target = vm["targetNode"].as_str();
        let text = |field: &str| vm[field].as_str().unwrap_or_default();
        outcomes.push((text("name"), text("outcome"), ["node2", "node3"].map(Some).contains(&target)));
    }
    outcomes.sort();
    let expected = [("returns", "Migrate", true), ("stays-away", "Migrate", true), ("stuck", "Block", false)];
    assert_eq!(outcomes, expected, "{status_}");
    assert_eq!((&status_["plan"]["blocked"], status(&plan, "phase")), (&json!(true), String::new()));
    let after = nodes.get("node1").await.expect("node");
    assert_eq!(after.data["spec"], before.data["spec"]);
    let noted = |node: &DynamicObject| node.metadata.annotations.clone().unwrap_or_default();
    assert!(!noted(&after).contains_key("godwit.io/maintenance"), "{:?}", noted(&after));
    assert_eq!(moving(cluster).await, Vec::<String>::new());
    for vmi in cluster.vmis().list(&Default::default()).await.expect("list").items {
        let annotations = vmi.metadata.annotations.clone().unwrap_or_default();
        assert!(!annotations.contains_key("godwit.io/home") && status(&vmi, "evacuationNodeName").is_empty());
    }
    end(cluster, "node1").await;
}
