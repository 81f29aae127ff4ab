//! Guests whose processor no node, or no other node, can give: nothing is started for them, and it is said why.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::moving::{guest_runs_on_in, one_launcher_is_left};
use common::stopped::Stopped;
use common::{Cluster, rom_vmi, status};
use godwit_guest_rom::Parameters;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch};
use serde_json::{Value, json};

const GUEST: &str = "picky";
const TOKEN: u32 = 0xC0DE;

fn nodes(cluster: &Cluster) -> Api<DynamicObject> {
    Api::all_with(cluster.client.clone(), &ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Node")))
}

fn has(node: &DynamicObject, label: &str) -> bool {
    node.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(label))
}

fn is_over(migration: &DynamicObject) -> bool {
    ["Succeeded", "Failed"].contains(&status(migration, "phase").as_str())
}

/// A guest does not leave for where its processor is not; when it is there again, it does.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_processor_no_other_node_offers_is_not_sent_off() {
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(Parameters { token: TOKEN, ..Parameters::default() });
    cluster.start_rom_guest(GUEST).await;
    let before = cluster.vmis().get(GUEST).await.expect("VMI");
    let (from, model) = (status(&before, "nodeName"), status(&before, "guestCpu/model"));
    let other = if from == "node1" { "node2" } else { "node1" };
    let label = format!("cpu-model-migration.node.kubevirt.io/{model}");
    for node in [&from, other] {
        cluster.wait(&nodes(&cluster), node, "it says what it offers", |node| has(node, &label)).await;
    }
    // What a node of another kind would never have said. Its handler would say it again soon.
    let silenced = Stopped::stop(cluster.pid(other));
    let patch = Patch::Merge(json!({"metadata": {"labels": {&label: null}}}));
    nodes(&cluster).patch(other, &Default::default(), &patch).await.expect("patch the node");
    cluster.migrate(GUEST, "refused").await;
    let refused = cluster.wait(&cluster.migrations(), "refused", "it is over", is_over).await;
    assert_eq!((status(&refused, "phase"), status(&refused, "reason")), ("Failed".into(), "TargetRefusedCPU".into()));
    let verdict = json!([{"nodeName": other, "reasons": [format!("it does not offer CPU model {model}")]}]);
    assert_eq!(refused.data["status"]["nodes"], verdict, "{}", refused.data);
    cluster
        .hears_of("VirtualMachineInstance", GUEST, "that it has nowhere to go", |event| {
            event.reason == "NoSuitableNodesForHostModelMigration"
        })
        .await;
    // Nothing was started: there was no second pod, and the guest is where it was, on its way nowhere.
    let pods = cluster.pods().list(&Default::default()).await.expect("pods").items;
    assert_eq!(pods.len(), 1, "{pods:?}");
    let after = cluster.vmis().get(GUEST).await.expect("VMI");
    assert_eq!((status(&after, "nodeName"), status(&after, "migrationState/targetPod")), (from, String::new()));

    drop(silenced);
    cluster.wait(&nodes(&cluster), other, "it says again what it offers", |node| has(node, &label)).await;
    cluster.migrate(GUEST, "granted").await;
    let granted = cluster.wait(&cluster.migrations(), "granted", "it is over", is_over).await;
    assert_eq!(status(&granted, "phase"), "Succeeded", "{}\n{}", granted.data, cluster.words());
    let after = cluster.vmis().get(GUEST).await.expect("VMI");
    assert_eq!(status(&after, "nodeName"), other);
    guest_runs_on_in(&cluster, &status(&after, "migrationState/targetPod"), TOKEN).await;
    one_launcher_is_left(&cluster, GUEST).await;
}

/// A guest is not started where its model is not: its pod waits, on no node, and the VMI says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_model_no_node_offers_is_not_started() {
    let cluster = Cluster::start(1).await;
    cluster.build_rom_image(Parameters::default());
    // The node says what it has before anything is asked of it.
    cluster.start_rom_guest("modest").await;
    let model = status(&cluster.vmis().get("modest").await.expect("VMI"), "guestCpu/model");
    let label = format!("cpu-model.node.kubevirt.io/{model}");
    cluster.wait(&nodes(&cluster), "node1", "it says what it offers", |node| has(node, &label)).await;
    let mut picky = rom_vmi(GUEST);
    picky["spec"]["domain"]["cpu"] = json!({"model": "Hopper-Server"});
    cluster.apply(picky).await.expect("apply VMI");
    let waits = |vmi: &DynamicObject| {
        let conditions = vmi.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let unscheduled = |one: &Value| one["type"] == "PodScheduled" && one["status"] == "False";
        conditions.iter().any(unscheduled)
    };
    let vmi = cluster.wait(&cluster.vmis(), GUEST, "its pod cannot be placed", waits).await;
    assert_eq!(status(&vmi, "phase"), "Scheduling", "{}", vmi.data);
    println!("{}", vmi.data["status"]["conditions"]);
    let launchers = cluster.launchers(GUEST).await;
    assert!(matches!(&launchers[..], [(_, node)] if node.is_empty()), "{launchers:?}");
    let pod = cluster.pods().get(&launchers[0].0).await.expect("pod");
    assert_eq!(pod.data["spec"]["nodeSelector"]["cpu-model.node.kubevirt.io/Hopper-Server"], "true");
}
