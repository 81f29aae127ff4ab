//! A migration is cancelled by deleting it, at every phase, and the guest goes on where it was.

use crate::common::{Cluster, rom_vmi, status};
use crate::stage::{NARROW, annotated, is_over, migration, phase};
use serde_json::json;

/// Before the hand-off nothing of it is left in the VMI.
async fn nothing_is_left(cluster: &Cluster, vmi: &str, (pod, node): &(String, String)) {
    let object = cluster.stays(vmi, node, pod).await;
    assert_eq!(object.data.pointer("/status/migrationState"), None, "{}", object.data);
}

/// After it the VMI says that it was aborted.
async fn the_abort_is_told(cluster: &Cluster, vmi: &str, (pod, node): &(String, String)) {
    cluster
        .wait(&cluster.vmis(), vmi, "the abort is done", |v| !status(v, "migrationState/abortStatus").is_empty())
        .await;
    let object = cluster.stays(vmi, node, pod).await;
    for (field, wanted) in [
        ("abortRequested", "true"),
        ("abortStatus", "Succeeded"),
        ("completed", "true"),
        ("failed", "true"),
        ("sourceNode", node),
    ] {
        assert_eq!(status(&object, &format!("migrationState/{field}")), wanted, "{field}: {}", object.data);
    }
    assert_ne!(status(&object, "migrationState/endTimestamp"), "", "{}", object.data);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_while_it_waits_for_its_turn() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("first", "node1").await;
    cluster.start_rom_guest_on("second", "node1").await;
    let before = cluster.only_launcher("second").await;
    cluster.configure(json!({"parallelMigrationsPerCluster": 1})).await;
    cluster.narrow("node1", NARROW);
    cluster.migrate("first", "ahead").await;
    cluster.comes_to("ahead", "Running").await;
    cluster.migrate("second", "behind").await;
    cluster
        .wait(&cluster.migrations(), "behind", "it says what it waits for", |m| !status(m, "reason").is_empty())
        .await;
    assert_eq!(phase(&cluster.migration("behind").await), "Pending");
    cluster.cancel("behind").await;
    cluster.is_told("behind", "Warning", "FailedMigration", "Migration failed due to being canceled").await;
    nothing_is_left(&cluster, "second", &before).await;
    // The other one was not disturbed.
    assert!(!is_over(&cluster.migration("ahead").await));
    cluster.widen("node1");
    cluster.has_moved("first", "ahead").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_while_no_node_takes_its_target() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let before = cluster.only_launcher("stayer").await;
    cluster.cordon("node2", true).await;
    cluster.migrate("stayer", "move").await;
    let unschedulable = "Migration target pod for VMI [default/stayer] is currently unschedulable.";
    cluster.is_told("move", "Warning", "migrationTargetPodUnschedulable", unschedulable).await;
    assert_eq!(phase(&cluster.migration("move").await), "Scheduling");
    cluster.cancel("move").await;
    cluster.is_told("move", "Warning", "FailedMigration", "Migration failed due to being canceled").await;
    nothing_is_left(&cluster, "stayer", &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_while_its_target_pod_starts() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let before = cluster.only_launcher("stayer").await;
    // Nobody starts what is bound to that node.
    let frozen = cluster.freeze("node2");
    cluster.migrate("stayer", "move").await;
    cluster.comes_to("move", "Scheduling").await;
    cluster.cancel("move").await;
    cluster.is_told("move", "Warning", "FailedMigration", "Migration failed due to being canceled").await;
    drop(frozen);
    nothing_is_left(&cluster, "stayer", &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_while_the_target_prepares() {
    let cluster = Cluster::with_rom(2, 3).await;
    // KubeVirt's own hook for this.
    let hook = "kubevirt.io/func-test-block-migration-target-preparation";
    cluster.start_on(annotated(rom_vmi("stayer"), hook, "true"), "node1").await;
    let before = cluster.only_launcher("stayer").await;
    cluster.migrate("stayer", "move").await;
    cluster.comes_to("move", "PreparingTarget").await;
    cluster.cancel("move").await;
    the_abort_is_told(&cluster, "stayer", &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_before_the_source_begins_to_send() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let before = cluster.only_launcher("stayer").await;
    // The target is ready, and its source does not get there. (A node that is frozen ends its guests after twenty seconds.)
    cluster.cut("node1", "node2");
    cluster.migrate("stayer", "move").await;
    cluster.comes_to("move", "TargetReady").await;
    cluster.migrations().delete("move", &Default::default()).await.expect("delete");
    let requested = |v: &kube::api::DynamicObject| status(v, "migrationState/abortRequested") == "true";
    cluster.wait(&cluster.vmis(), "stayer", "the abort is asked for", requested).await;
    cluster.wait_gone(&cluster.migrations(), "move").await;
    the_abort_is_told(&cluster, "stayer", &before).await;
    cluster
        .is_told("move", "Normal", "SuccessfulAbortMigration", "Migration is ready to be canceled by virt-handler.")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_while_it_runs() {
    let cluster = Cluster::with_rom(2, 64).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let before = cluster.only_launcher("stayer").await;
    cluster.narrow("node1", NARROW);
    cluster.migrate("stayer", "move").await;
    cluster.comes_to("move", "Running").await;
    cluster.cancel("move").await;
    the_abort_is_told(&cluster, "stayer", &before).await;
    let reason = status(&cluster.vmis().get("stayer").await.expect("VMI"), "migrationState/failureReason");
    assert_eq!(reason, "Live migration has been aborted");
    cluster
        .is_told("move", "Normal", "SuccessfulAbortMigration", "Migration is ready to be canceled by virt-handler.")
        .await;
    // And it can go when it is asked again.
    cluster.widen("node1");
    cluster.migrate("stayer", "again").await;
    cluster.has_moved("stayer", "again").await;
}

/// A cancel may come too late. Whoever wins, there is one guest, and the VMI says where and why.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_and_the_end_race_and_one_of_them_wins() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("racer", "node1").await;
    for (round, percent) in [0, 60, 98, 100].into_iter().enumerate() {
        let (pod, node) = cluster.only_launcher("racer").await;
        let name = format!("race-{round}");
        let asked = cluster.ask(&annotated(migration(&name, "racer"), "round", &round.to_string())).await.made();
        let so_far = |v: &kube::api::DynamicObject| {
            let own = status(v, "migrationState/migrationUid") == asked;
            let done = status(v, "migrationState/progress/percent").parse::<u64>().unwrap_or(0);
            own && (done >= percent || status(v, "migrationState/completed") == "true")
        };
        cluster.wait(&cluster.vmis(), "racer", &format!("{percent} percent are done"), so_far).await;
        cluster.cancel(&name).await;
        let settled = |v: &kube::api::DynamicObject| status(v, "migrationState/completed") == "true";
        let after = cluster.wait(&cluster.vmis(), "racer", "it is settled", settled).await;
        let state = |field: &str| status(&after, &format!("migrationState/{field}"));
        if state("failed") == "true" {
            assert_eq!(state("abortStatus"), "Succeeded", "{}", after.data);
            cluster.stays("racer", &node, &pod).await;
        } else {
            assert!(["", "Failed"].contains(&state("abortStatus").as_str()), "{}", after.data);
            let target = state("targetPod");
            assert_eq!(cluster.only_launcher("racer").await, (target.clone(), state("targetNode")));
            cluster.beats_in(&target).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmi_that_is_deleted_takes_its_migration_and_its_pods_along() {
    let cluster = Cluster::with_rom(2, 64).await;
    cluster.start_rom_guest_on("leaver", "node1").await;
    cluster.narrow("node1", NARROW);
    cluster.migrate("leaver", "move").await;
    cluster.comes_to("move", "Running").await;
    cluster.vmis().delete("leaver", &Default::default()).await.expect("delete");
    cluster.wait_gone(&cluster.vmis(), "leaver").await;
    cluster.wait_gone(&cluster.migrations(), "move").await;
    let ended = "Migration failed vmi shutdown during migration.";
    let gone = "Migration failed because vmi does not exist.";
    // Whichever the controller sees first.
    let failed = "source node reported migration failed";
    cluster.is_told_what("move", "Warning", "FailedMigration", |said| [ended, gone, failed].contains(&said)).await;
    for (pod, _) in cluster.launchers("leaver").await {
        cluster.wait_gone(&cluster.pods(), &pod).await;
    }
}
