//! Nothing lasts for ever, and whatever ends says why.

use crate::common::{Cluster, status};
use crate::stage::{annotated, is_over, migration, phase};

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
