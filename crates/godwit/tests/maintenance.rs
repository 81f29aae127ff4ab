//! Nodes in maintenance, by the manifests and commands that people know, with guests that are to live on.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{Cluster, status, text};
use godwit_guest_rom::Parameters;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use serde_json::Value;
use std::path::Path;

/// A group's NodeMaintenance.
struct Group {
    version: &'static str,
    /// The kind as `kubectl` names it in full.
    resource: &'static str,
    drain: &'static str,
}

const GROUPS: [Group; 3] = [
    Group { version: "kubevirt.io/v1alpha1", resource: "nodemaintenance.kubevirt.io", drain: "kubevirt.io/drain" },
    Group {
        version: "nodemaintenance.kubevirt.io/v1beta1",
        resource: "nodemaintenance.nodemaintenance.kubevirt.io",
        drain: "kubevirt.io/drain",
    },
    Group {
        version: "nodemaintenance.medik8s.io/v1beta1",
        resource: "nodemaintenance.nodemaintenance.medik8s.io",
        drain: "medik8s.io/drain",
    },
];

fn cluster_wide(cluster: &Cluster, version: &str, kind: &str) -> Api<DynamicObject> {
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    Api::all_with(cluster.client.clone(), &ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind)))
}

/// The column STATUS of a node.
fn told(cluster: &Cluster, kubectl: &Path, node: &str) -> String {
    let line = cluster.kubectl(kubectl, &["get", "nodes", node, "--no-headers"]);
    line.split_whitespace().nth(1).unwrap_or_default().to_owned()
}

fn create(cluster: &Cluster, kubectl: &Path, group: &Group, node: &str) -> Result<String, String> {
    let manifest = format!(
        "apiVersion: {}\nkind: NodeMaintenance\nmetadata:\n  name: {node}-maintenance\nspec:\n  nodeName: {node}\n  \
         reason: \"{node} Maintenance\"\n",
        group.version
    );
    let output = cluster.try_kubectl(kubectl, &["apply", "-f", "-"], Some(&manifest));
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

async fn succeeded(cluster: &Cluster, group: &Group, node: &str) -> DynamicObject {
    let api = cluster_wide(cluster, group.version, "NodeMaintenance");
    let name = format!("{node}-maintenance");
    cluster.wait(&api, &name, "the node is empty", |one| status(one, "phase") == "Succeeded").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_emptied_and_opened_again_in_every_group() {
    let Some(kubectl) = common::kubectls().pop() else { return };
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(Parameters::default());
    let mut vmi = common::rom_vmi("flyer");
    vmi["spec"]["evictionStrategy"] = "LiveMigrate".into();
    cluster.apply(vmi).await.expect("apply");
    let runs = |vmi: &DynamicObject| {
        let conditions = vmi.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let migratable = |one: &Value| one["type"] == "LiveMigratable" && one["status"] == "True";
        status(vmi, "phase") == "Running" && conditions.iter().any(migratable)
    };
    let mut uid = None;
    let mut first = String::new();
    for group in &GROUPS {
        let vmi = cluster.wait(&cluster.vmis(), "flyer", "it runs and can be moved", runs).await;
        let node = status(&vmi, "nodeName");
        assert!(uid.is_none() || uid == vmi.metadata.uid, "it was never started anew");
        uid = vmi.metadata.uid;
        if first.is_empty() {
            first = node.clone();
        }
        let created = create(&cluster, &kubectl, group, &node).expect("created");
        let family = group.resource.split_once('.').expect("a group").1;
        assert_eq!(created, format!("nodemaintenance.{family}/{node}-maintenance created\n"));
        let done = succeeded(&cluster, group, &node).await;
        assert_eq!(told(&cluster, &kubectl, &node), "Ready,SchedulingDisabled");
        let after = cluster.vmis().get("flyer").await.expect("VMI");
        assert_ne!(status(&after, "nodeName"), node, "the guest runs elsewhere");
        assert_eq!(status(&after, "phase"), "Running");
        assert_eq!((status(&done, "drainProgress"), status(&done, "evictionPods")), ("100".into(), "1".into()));
        assert_eq!(status(&done, "pendingPods"), "");
        let object = cluster_wide(&cluster, "v1", "Node").get(&node).await.expect("node");
        let taints: Vec<&str> = object.data["spec"]["taints"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|taint| taint["key"].as_str())
            .collect();
        assert_eq!(taints, ["node.kubernetes.io/unschedulable", group.drain]);

        // `kubectl get nodemaintenance` is that of the oldest group, as the name alone says no more.
        let name = if group.version == "kubevirt.io/v1alpha1" { "nodemaintenance" } else { group.resource };
        let table = cluster.kubectl(&kubectl, &["get", name]);
        let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["NAME", "AGE"], "{table}");
        assert_eq!((lines.len(), lines[1][0]), (2, format!("{node}-maintenance").as_str()), "{table}");
        if group.drain == "medik8s.io/drain" {
            assert_eq!(cluster.kubectl(&kubectl, &["get", "nm", "-o", "name"]).lines().count(), 1);
        }
        let again = create(&cluster, &kubectl, &GROUPS[0], &node);
        if group.version != GROUPS[0].version {
            let refusal = again.expect_err("a second one is refused");
            let why = format!(
                "admission webhook \"vnodemaintenance.kb.io\" denied the request: invalid nodeName, \
                 a NodeMaintenance for node {node} already exists"
            );
            assert!(refusal.contains(&why), "{refusal}");
        }
        let deleted = cluster.kubectl(&kubectl, &["delete", &format!("{name}/{node}-maintenance")]);
        assert_eq!(deleted.trim_end(), format!("nodemaintenance.{family} \"{node}-maintenance\" deleted"));
        assert_eq!(told(&cluster, &kubectl, &node), "Ready");
        let object = cluster_wide(&cluster, "v1", "Node").get(&node).await.expect("node");
        assert_eq!(object.data["spec"].get("taints"), None, "{}", object.data["spec"]);
        let after = cluster.vmis().get("flyer").await.expect("VMI");
        assert_ne!(status(&after, "nodeName"), node, "it does not come back by itself");
    }

    // A node that somebody had closed stays closed, whatever comes and goes.
    let node = status(&cluster.vmis().get("flyer").await.expect("VMI"), "nodeName");
    cluster.kubectl(&kubectl, &["cordon", &node]);
    create(&cluster, &kubectl, &GROUPS[2], &node).expect("created");
    succeeded(&cluster, &GROUPS[2], &node).await;
    cluster.kubectl(&kubectl, &["delete", "nm", &format!("{node}-maintenance")]);
    assert_eq!(told(&cluster, &kubectl, &node), "Ready,SchedulingDisabled");
    let refusal = create(&cluster, &kubectl, &GROUPS[2], "nowhere").expect_err("there is no such node");
    let why = "admission webhook \"vnodemaintenance.kb.io\" denied the request: invalid nodeName, no node with name nowhere found";
    assert!(refusal.contains(why), "{refusal}");
    for (kind, name, reason) in [
        ("NodeMaintenance", format!("{node}-maintenance"), "BeginMaintenance"),
        ("NodeMaintenance", format!("{node}-maintenance"), "SucceedMaintenance"),
        ("NodeMaintenance", format!("{node}-maintenance"), "RemovedMaintenance"),
        ("Node", first, "UncordonNode"),
    ] {
        cluster.hears_of(kind, &name, reason, |event| event.reason == reason).await;
    }
}
