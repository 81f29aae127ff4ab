//! Evictions and evacuations of real guests, and what is told of them.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::events::Said;
use common::{Cluster, status, text};
use godwit_guest_rom::Parameters;
use kube::api::{DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};

/// A guest that is to be moved rather than ended, known to be migratable. The node it runs on.
async fn start(cluster: &Cluster, name: &str, also: Value) -> String {
    let mut vmi = common::rom_vmi(name);
    vmi["spec"]["evictionStrategy"] = "LiveMigrate".into();
    for (key, value) in also.as_object().expect("an object") {
        vmi["spec"][key] = value.clone();
    }
    cluster.apply(vmi).await.expect("apply");
    let known = |vmi: &DynamicObject| {
        status(vmi, "phase") == "Running" && condition(vmi, "LiveMigratable").is_some_and(|one| one["status"] == "True")
    };
    let vmi = cluster.wait(&cluster.vmis(), name, "it runs and is known to be migratable", known).await;
    status(&vmi, "nodeName")
}

fn condition(object: &DynamicObject, type_: &str) -> Option<Value> {
    let conditions = object.data["status"]["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == type_).cloned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_guest_moves_and_its_record_tells() {
    let Some(kubectl) = common::kubectls().pop() else { return };
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(Parameters::default());
    let from = start(&cluster, "flyer", json!({})).await;
    let refused = |why: &str| {
        format!("admission webhook \"virt-launcher-eviction-interceptor.kubevirt.io\" denied the request: {why}")
    };
    let triggered = "Eviction triggered evacuation of VMI \"default/flyer\"";
    assert_eq!(cluster.evict(&kubectl, "flyer", true).await, refused(triggered));
    let vmi = cluster.vmis().get("flyer").await.expect("VMI");
    assert_eq!(status(&vmi, "evacuationNodeName"), "", "a dry run marks nothing");
    assert_eq!(cluster.evict(&kubectl, "flyer", false).await, refused(triggered));
    let left = |vmi: &DynamicObject| {
        status(vmi, "nodeName") != from
            && status(vmi, "evacuationNodeName").is_empty()
            && status(vmi, "evacuation").is_empty()
            && condition(vmi, "EvictionRequested").is_none()
    };
    let after = cluster.wait(&cluster.vmis(), "flyer", "it has left and nothing is asked of it", left).await;
    assert_eq!(status(&after, "phase"), "Running");
    let migrations = cluster.migrations().list(&Default::default()).await.expect("list").items;
    let [migration] = &migrations[..] else { panic!("one migration: {migrations:?}") };
    let made = migration.metadata.name.clone().unwrap_or_default();
    assert!(made.starts_with("kubevirt-evacuation-"), "{made}");
    assert_eq!(migration.metadata.annotations.as_ref().expect("annotations")["kubevirt.io/evacuationMigration"], from);
    assert_eq!(migration.data["spec"]["priority"], "system-critical");
    let created = format!("Created Migration {made}");
    let said = |event: &Said| event.reason == "SuccessfulCreate" && event.message == created;
    cluster.hears_of("VirtualMachineInstance", "flyer", &created, said).await;

    let over = |migration: &DynamicObject| {
        status(migration, "phase") == "Succeeded" && migration.metadata.finalizers.as_ref().is_none_or(Vec::is_empty)
    };
    // It has left before its migration is over, and two at a time are refused.
    cluster.wait(&cluster.migrations(), &made, "it is over and let go", over).await;
    // Back again, by somebody's wish: two records, and who asked.
    cluster.migrate("flyer", "back").await;
    cluster.wait(&cluster.vmis(), "flyer", "it is back", |vmi| status(vmi, "nodeName") == from).await;
    let records = cluster.api("godwit.io", "v1alpha1", "MigrationRecord");
    for (migration, by, evacuated) in [(made.as_str(), "kubevirt-controller", json!(from)), ("back", "", Value::Null)] {
        let migration = cluster.wait(&cluster.migrations(), migration, "it is over and let go", over).await;
        let uid = migration.metadata.uid.clone().unwrap_or_default();
        let name = format!("{}-{}", migration.metadata.name.as_deref().unwrap_or_default(), &uid[..8]);
        let record = records.get(&name).await.expect("record");
        let spec = &record.data["spec"];
        assert_eq!((&spec["vmiName"], &spec["migrationUID"]), (&json!("flyer"), &json!(uid)));
        assert_eq!((&spec["result"], &spec["evacuatedNode"]), (&json!("Succeeded"), &evacuated));
        let nodes = [&spec["sourceNode"], &spec["targetNode"]];
        assert!(nodes.contains(&&json!(from)) && nodes[0] != nodes[1], "{spec}");
        let asked = spec["requestedBy"].as_str().unwrap_or_default();
        assert!(!asked.is_empty() && asked.contains(by), "{spec}");
        assert!(spec["downtimeMilliseconds"].is_u64() && spec["bytesProcessed"].is_u64(), "{spec}");
        assert_eq!(spec["downtime"], format!("{} ms", spec["downtimeMilliseconds"]));
        assert!(spec["sent"].as_str().is_some_and(|sent| sent.ends_with("iB")), "{spec}");
        assert!(spec["startedAt"].is_string() && spec["endedAt"].is_string(), "{spec}");
    }
    let table = cluster.kubectl(&kubectl, &["get", "mrec"]);
    let head: Vec<&str> = table.lines().next().unwrap_or_default().split_whitespace().collect();
    assert_eq!(head, ["NAME", "VMI", "FROM", "TO", "RESULT", "REASON", "DOWNTIME", "BYTES", "BY", "AGE"], "{table}");
    assert_eq!(table.lines().count(), 3, "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evacuation_that_cannot_succeed_stops_and_says_why() {
    let Some(kubectl) = common::kubectls().pop() else { return };
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(Parameters::default());
    let kubevirts = kube::Api::<DynamicObject>::namespaced_with(
        cluster.client.clone(),
        "kubevirt",
        &kube::api::ApiResource::from_gvk(&kube::api::GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt")),
    );
    let set = json!({"spec": {"configuration": {"migrations": {"maxAttempts": 1}}}});
    kubevirts.patch("kubevirt", &PatchParams::default(), &Patch::Merge(&set)).await.expect("configure");
    // It may run on its own node only.
    let pinned = json!({"nodeSelector": {"kubernetes.io/hostname": "node1"}});
    let from = start(&cluster, "stayer", pinned).await;
    let marks = cluster.evict(&kubectl, "stayer", false).await;
    assert!(marks.ends_with("Eviction triggered evacuation of VMI \"default/stayer\""), "{marks}");
    let asked = |vmi: &DynamicObject| condition(vmi, "EvictionRequested").is_some_and(|one| one["status"] == "True");
    let vmi = cluster.wait(&cluster.vmis(), "stayer", "the eviction is told", asked).await;
    assert_eq!(condition(&vmi, "EvictionRequested").expect("told")["message"], "VMI is marked for eviction");
    let again = cluster.evict(&kubectl, "stayer", false).await;
    assert!(
        again.ends_with("Evacuation in progress: Eviction triggered evacuation of VMI \"default/stayer\""),
        "{again}"
    );
    // The attempt is taken back, which is a failure; the only one that is allowed.
    let made = |vmi: &DynamicObject| !status(vmi, "evacuation/migrationName").is_empty();
    let vmi = cluster.wait(&cluster.vmis(), "stayer", "a migration is made", made).await;
    let attempt = status(&vmi, "evacuation/migrationName");
    cluster.wait(&cluster.migrations(), &attempt, "it waits for a node", |m| status(m, "phase") == "Scheduling").await;
    cluster.migrations().delete(&attempt, &Default::default()).await.expect("delete");
    cluster.wait_gone(&cluster.migrations(), &attempt).await;
    let stopped = |vmi: &DynamicObject| condition(vmi, "EvacuationStopped").is_some_and(|one| one["status"] == "True");
    let vmi = cluster.wait(&cluster.vmis(), "stayer", "the evacuation stops", stopped).await;
    let said = condition(&vmi, "EvacuationStopped").expect("told");
    let message = said["message"].as_str().expect("a sentence");
    assert_eq!(said["reason"], "AttemptsUsedUp");
    assert!(
        message.starts_with(&format!("The only attempt to move it away from {from} has failed, with")),
        "{message}"
    );
    assert_eq!((status(&vmi, "nodeName"), status(&vmi, "phase")), (from.clone(), "Running".to_owned()));
    let refused = cluster.evict(&kubectl, "stayer", false).await;
    assert!(
        refused.ends_with(&format!("The evacuation of VMI \"default/stayer\" has stopped: {message}")),
        "{refused}"
    );
    assert!(cluster.migrations().list(&Default::default()).await.expect("list").items.is_empty());
    // Cordoned and opened again, the node need not be left any more.
    let nodes = kube::Api::<k8s_openapi::api::core::v1::Node>::all(cluster.client.clone());
    nodes.cordon(&from).await.expect("cordon");
    let noted = |vmi: &DynamicObject| status(vmi, "evacuation/cordoned") == "true";
    cluster.wait(&cluster.vmis(), "stayer", "the cordon is seen", noted).await;
    nodes.uncordon(&from).await.expect("uncordon");
    let free = |vmi: &DynamicObject| {
        status(vmi, "evacuationNodeName").is_empty()
            && condition(vmi, "EvacuationStopped").is_none()
            && condition(vmi, "EvictionRequested").is_none()
    };
    cluster.wait(&cluster.vmis(), "stayer", "nothing is asked of it", free).await;
}

/// A drain waits for a guest that nobody takes, rather than ending it.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_does_not_end_a_guest_that_is_to_be_moved() {
    let cluster = Cluster::start(1).await;
    cluster.build_rom_image(Parameters::default());
    start(&cluster, "kept", json!({})).await;
    let Some(kubectl) = common::kubectls().pop() else { return };
    let drain = ["drain", "node1", "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=3s"];
    let output = cluster.try_kubectl(&kubectl, &drain, None);
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("Eviction triggered evacuation of VMI \"default/kept\""), "{said}");
    assert_eq!(status(&cluster.vmis().get("kept").await.expect("VMI"), "phase"), "Running");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_until_the_guest_has_left_and_goes_on() {
    let Some(kubectl) = common::kubectls().pop() else { return };
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(Parameters::default());
    let from = start(&cluster, "flyer", json!({})).await;
    let drain = ["drain", &from, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s"];
    let output = cluster.try_kubectl(&kubectl, &drain, None);
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{said}\n{}", cluster.words());
    assert!(said.contains("Eviction triggered evacuation of VMI \"default/flyer\""), "{said}");
    assert!(said.contains(&format!("node/{from} drained")), "{said}");
    let vmi = cluster.vmis().get("flyer").await.expect("VMI");
    assert_eq!(status(&vmi, "phase"), "Running");
    assert_ne!(status(&vmi, "nodeName"), from);
    assert!(cluster.launchers("flyer").await.iter().all(|(_, node)| *node != from));
}
