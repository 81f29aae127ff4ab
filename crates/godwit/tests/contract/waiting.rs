//! What a migration waits for is said on it, in a word and a sentence.

use crate::common::{Cluster, status};
use crate::stage::{annotated, condition, is_over, migration, phase};
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch};
use serde_json::{Value, json};

fn resource_quotas(cluster: &Cluster) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "ResourceQuota"));
    Api::default_namespaced_with(cluster.client.clone(), &resource)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_without_room_holds_it_until_there_is() {
    let cluster = Cluster::with_rom(2, 3).await;
    // The embedded server counts by itself.
    if let Some(real) = &cluster.real
        && !real.start_kubernetes_own(&cluster.client, &["resourcequota"]).await
    {
        return;
    }
    cluster.start_rom_guest_on("mover", "node1").await;
    cluster
        .apply(json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small"},
            "spec": {"hard": {"pods": "1"}}}))
        .await
        .expect("apply");
    let counted = |quota: &DynamicObject| status(quota, "used/pods") == "1";
    cluster.wait(&resource_quotas(&cluster), "small", "the guest's pod is counted", counted).await;
    cluster.migrate("mover", "move").await;
    let rejected = |m: &DynamicObject| condition(m, "migrationRejectedByResourceQuota").is_some();
    let waiting = cluster.wait(&cluster.migrations(), "move", "the quota is named", rejected).await;
    assert_eq!(phase(&waiting), "Pending");
    assert_eq!(condition(&waiting, "migrationRejectedByResourceQuota").expect("it")["status"], "True");
    assert_eq!(status(&waiting, "reason"), "QuotaExceeded");
    assert!(status(&waiting, "message").contains("small"), "{}", status(&waiting, "message"));
    let more = Patch::Merge(json!({"spec": {"hard": {"pods": "2"}}}));
    resource_quotas(&cluster).patch("small", &Default::default(), &more).await.expect("patch");
    cluster.has_moved("mover", "move").await;
    assert!(!rejected(&cluster.migration("move").await));
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_do_not_take_the_target_say_why() {
    let cluster = Cluster::with_rom(3, 3).await;
    cluster.start_rom_guest_on("mover", "node1").await;
    cluster.cordon("node2", true).await;
    let taint = Patch::Merge(json!({"spec": {"taints": [{"key": "maker", "value": "full", "effect": "NoSchedule"}]}}));
    cluster.nodes().patch("node3", &Default::default(), &taint).await.expect("taint");
    cluster.migrate("mover", "move").await;
    let listed = |m: &DynamicObject| m.data.pointer("/status/nodes").is_some();
    let waiting = cluster.wait(&cluster.migrations(), "move", "the nodes are listed", listed).await;
    assert_eq!(phase(&waiting), "Scheduling");
    assert_eq!(status(&waiting, "reason"), "TargetPodUnschedulable");
    let nodes = waiting.data["status"]["nodes"].as_array().expect("nodes");
    let why = |node: &str| -> String {
        let verdict = nodes.iter().find(|verdict| verdict["nodeName"] == node);
        verdict.map(|verdict| verdict["reasons"].to_string()).unwrap_or_default()
    };
    assert!(why("node1").contains("anti-affinity"), "{nodes:?}");
    assert!(why("node2").contains("unschedulable"), "{nodes:?}");
    assert!(why("node3").contains("maker"), "{nodes:?}");
    assert_eq!(nodes.len(), 3);
    // As soon as one takes it, nothing is left of that.
    cluster.cordon("node2", false).await;
    assert_eq!(cluster.has_moved("mover", "move").await, "node2");
    assert_eq!(cluster.migration("move").await.data.pointer("/status/nodes"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_not_there_is_named_and_given_up_in_time() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let (pod, node) = cluster.only_launcher("stayer").await;
    let image = "kubevirt.io/func-test-migration-target-image-override";
    let mut wanted = annotated(migration("move", "stayer"), image, "godwit.local/missing:1");
    wanted["metadata"]["annotations"]["kubevirt.io/migrationPendingPodTimeoutSeconds"] = json!("6");
    cluster.ask(&wanted).await.made();
    let named = |m: &DynamicObject| status(m, "reason") == "TargetPodImage" || is_over(m);
    let waiting = cluster.wait(&cluster.migrations(), "move", "the image is named", named).await;
    assert_eq!(phase(&waiting), "Scheduling");
    assert!(status(&waiting, "message").contains("godwit.local/missing:1"), "{}", status(&waiting, "message"));
    let said = condition(&waiting, "Waiting").map(|c| c["message"].clone()).unwrap_or_default();
    assert_eq!(said, Value::String(status(&waiting, "message")));
    let over = cluster.wait(&cluster.migrations(), "move", "it is over", is_over).await;
    assert_eq!((phase(&over), status(&over, "reason")), ("Failed".into(), "TargetNotReady".into()));
    assert!(status(&over, "message").contains("godwit.local/missing:1"), "{}", status(&over, "message"));
    cluster.stays("stayer", &node, &pod).await;
}
