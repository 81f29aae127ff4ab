//! Nothing lasts for ever, and whatever ends says why.

use crate::common::{Cluster, status};
use crate::stage::{NARROW, annotated, is_over, migration, phase};
use kube::api::DynamicObject;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_no_node_takes_is_given_up_in_time() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let (pod, node) = cluster.only_launcher("stayer").await;
    cluster.cordon("node2", true).await;
    let impatient = "kubevirt.io/migrationUnschedulablePodTimeoutSeconds";
    cluster.ask(&annotated(migration("move", "stayer"), impatient, "2")).await.made();
    let unschedulable = "Migration target pod for VMI [default/stayer] is currently unschedulable.";
    cluster.is_told("move", "Warning", "migrationTargetPodUnschedulable", unschedulable).await;
    let over = cluster.wait(&cluster.migrations(), "move", "it is over", is_over).await;
    assert_eq!(phase(&over), "Failed");
    let deleted = |message: &str| {
        message.starts_with("unschedulable pod default/virt-launcher-stayer-")
            && message.ends_with(" timeout period exceeded")
    };
    cluster.is_told_what("move", "Normal", "SuccessfulDelete", deleted).await;
    let removed = "Migration target pod was removed during active migration.";
    cluster.is_told("move", "Warning", "FailedMigration", removed).await;
    let vmi = cluster.stays("stayer", &node, &pod).await;
    assert_eq!(vmi.data.pointer("/status/migrationState"), None, "{}", vmi.data);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_pod_that_does_not_start_is_given_up_in_time() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let (pod, node) = cluster.only_launcher("stayer").await;
    let frozen = cluster.freeze("node2");
    let impatient = "kubevirt.io/migrationPendingPodTimeoutSeconds";
    cluster.ask(&annotated(migration("move", "stayer"), impatient, "2")).await.made();
    let over = cluster.wait(&cluster.migrations(), "move", "it is over", is_over).await;
    assert_eq!(phase(&over), "Failed");
    let deleted = |message: &str| {
        message.starts_with("pending pod default/virt-launcher-stayer-")
            && message.ends_with(" timeout period exceeded")
    };
    cluster.is_told_what("move", "Normal", "SuccessfulDelete", deleted).await;
    drop(frozen);
    let vmi = cluster.stays("stayer", &node, &pod).await;
    assert_eq!(status(&vmi, "migrationState"), "", "{}", vmi.data);
}

/// KubeVirt's own way to have a migration that cannot end (its test 2227).
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_does_not_end_is_given_up() {
    let cluster = Cluster::with_rom(2, 64).await;
    cluster.configure(json!({"progressTimeout": 5, "completionTimeoutPerGiB": 5, "bandwidthPerMigration": "1"})).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let (pod, node) = cluster.only_launcher("stayer").await;
    cluster.migrate("stayer", "move").await;
    let over = cluster.wait(&cluster.migrations(), "move", "it is over", is_over).await;
    let reason = status(&over, "migrationState/failureReason");
    assert!(reason.contains("has been aborted"), "{reason:?} {}", over.data["status"]);
    gave_up(&over, &["NoProgress", "OutOfTime", "NotConverging"]);
    cluster.stays("stayer", &node, &pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_takes_too_long_for_its_size_is_out_of_time() {
    let cluster = Cluster::with_rom(2, 64).await;
    // 16 MiB count as one GiB.
    cluster.configure(json!({"completionTimeoutPerGiB": 1})).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let (pod, node) = cluster.only_launcher("stayer").await;
    cluster.narrow("node1", NARROW);
    cluster.migrate("stayer", "move").await;
    let over = cluster.wait(&cluster.migrations(), "move", "it is over", is_over).await;
    gave_up(&over, &["OutOfTime"]);
    let reason = status(&over, "migrationState/failureReason");
    assert_eq!(
        reason, "Live migration has been aborted: not completed after 1 seconds (completionTimeoutPerGiB)",
        "{}",
        over.data["status"]
    );
    cluster.stays("stayer", &node, &pod).await;
    // Given more time, it arrives.
    cluster.configure(json!({"completionTimeoutPerGiB": 0})).await;
    cluster.widen("node1");
    cluster.migrate("stayer", "again").await;
    cluster.has_moved("stayer", "again").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_cut_is_named_and_the_guest_stays() {
    let cluster = Cluster::with_rom(2, 64).await;
    cluster.configure(json!({"progressTimeout": 3})).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let (pod, node) = cluster.only_launcher("stayer").await;
    cluster.narrow("node1", NARROW);
    cluster.migrate("stayer", "move").await;
    cluster.comes_to("move", "Running").await;
    cluster.cut("node1", "node2");
    let over = cluster.wait(&cluster.migrations(), "move", "it is over", is_over).await;
    gave_up(&over, &["LinkLost"]);
    cluster.stays("stayer", &node, &pod).await;
    cluster.mend("node1", "node2");
    cluster.widen("node1");
    cluster.migrate("stayer", "again").await;
    cluster.has_moved("stayer", "again").await;
}

/// KubeVirt's own way again, without another limit: at a byte a second QEMU comes no nearer to the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_comes_no_nearer_makes_no_progress() {
    let cluster = Cluster::with_rom(2, 64).await;
    cluster.configure(json!({"progressTimeout": 3, "completionTimeoutPerGiB": 0, "bandwidthPerMigration": "1"})).await;
    cluster.start_rom_guest_on("stayer", "node1").await;
    let (pod, node) = cluster.only_launcher("stayer").await;
    cluster.migrate("stayer", "move").await;
    let over = cluster.wait(&cluster.migrations(), "move", "it is over", is_over).await;
    gave_up(&over, &["NoProgress"]);
    let reason = status(&over, "migrationState/failureReason");
    assert!(reason.starts_with("Live migration has been aborted: stuck for "), "{reason}");
    assert!(reason.ends_with(" seconds: what remains to be sent has become no less (progressTimeout)"), "{reason}");
    cluster.stays("stayer", &node, &pod).await;
}

/// It says so on both objects, with one of these causes and what to do about it.
fn gave_up(over: &DynamicObject, causes: &[&str]) {
    assert_eq!(phase(over), "Failed", "{}", over.data["status"]);
    let cause = status(over, "reason");
    assert!(causes.contains(&cause.as_str()), "{cause}: {}", over.data["status"]);
    assert_eq!(status(over, "migrationState/failureCause"), cause);
    assert_eq!(status(over, "migrationState/failed"), "true");
    assert_eq!(status(over, "migrationState/completed"), "true");
    let remedy = godwit_api::FailureCause::from(cause.as_str()).remedy();
    assert!(status(over, "message").ends_with(remedy), "{}", status(over, "message"));
}
