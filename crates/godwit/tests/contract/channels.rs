//! The streams between two nodes.

use crate::common::events::Said;
use crate::common::{Cluster, status};
use crate::stage::{migration, phase};
use kube::api::{DynamicObject, Patch};
use serde_json::json;

const VMI: &str = "VirtualMachineInstance";

/// Whether it says that a VMI's memory goes in the clear.
pub fn is_of_the_clear(event: &Said) -> bool {
    event.reason == "Migrating" && event.message.contains("in the clear: disableTLS is set")
}

/// What the wire shows then is looked at in the handler's own tests.
#[tokio::test(flavor = "multi_thread")]
async fn memory_goes_in_the_clear_where_tls_is_disabled_and_only_there() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.configure(json!({})).await;
    cluster.start_rom_guest_on("guest", "node1").await;
    cluster.migrate("guest", "encrypted").await;
    assert_eq!(cluster.has_moved("guest", "encrypted").await, "node2");
    assert!(!cluster.events(VMI, "guest").await.iter().any(is_of_the_clear));
    cluster.configure(json!({"disableTLS": true})).await;
    cluster.migrate("guest", "plain").await;
    assert_eq!(cluster.has_moved("guest", "plain").await, "node1");
    cluster.hears_of(VMI, "guest", "that it goes in the clear", is_of_the_clear).await;
}

/// Under the least cap there is the guest would need many minutes.
#[tokio::test(flavor = "multi_thread")]
async fn the_bandwidth_of_a_migration_is_changed_while_it_runs() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.configure(json!({"bandwidthPerMigration": "1", "completionTimeoutPerGiB": 0, "progressTimeout": 0})).await;
    cluster.start_rom_guest_on("guest", "node1").await;
    cluster.migrate("guest", "move").await;
    cluster.comes_to("move", "Running").await;
    let annotated = |said: &str| Patch::Merge(json!({"metadata": {"annotations": {KEY: said}}}));
    let refused = cluster.migrations().patch("move", &Default::default(), &annotated("fast")).await.unwrap_err();
    assert!(refused.to_string().contains("is no quantity"), "{refused}");

    // What the setting says now is not asked any more.
    cluster.configure(json!({"bandwidthPerMigration": "0"})).await;
    let reported = |vmi: &DynamicObject| !status(vmi, "migrationState/progress/iteration").is_empty();
    let vmi = cluster.wait(&cluster.vmis(), "guest", "progress is reported", reported).await;
    assert_eq!(status(&vmi, CAP), "1");
    assert_eq!(phase(&cluster.migration("move").await), "Running");
    cluster.migrations().patch("move", &Default::default(), &annotated("0")).await.expect("annotate");
    cluster.has_moved("guest", "move").await;
    assert_eq!(status(&cluster.vmis().get("guest").await.expect("VMI"), CAP), "0");

    // One that is said from the beginning wins over the settings.
    let back = crate::stage::annotated(migration("back", "guest"), KEY, "3Mi");
    cluster.ask(&back).await.made();
    cluster.has_moved("guest", "back").await;
    assert_eq!(status(&cluster.vmis().get("guest").await.expect("VMI"), CAP), "3Mi");
}

const KEY: &str = "godwit.io/bandwidth-per-migration";
const CAP: &str = "migrationState/migrationConfiguration/bandwidthPerMigration";
