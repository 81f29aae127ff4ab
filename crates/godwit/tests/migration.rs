//! Live migrations of real guests, asked for through the API.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::moving::{guest_runs_on_in, narrow_the_link, one_launcher_is_left};
use common::{Cluster, status};
use godwit_guest_rom::Parameters;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};

#[tokio::test(flavor = "multi_thread")]
async fn a_running_guest_moves_and_goes_on() {
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(Parameters { token: 0xF1EE, ..Parameters::default() });
    cluster.start_rom_guest("flyer").await;
    let source = cluster.launchers("flyer").await.remove(0).0;
    let before = cluster.vmis().get("flyer").await.expect("VMI");
    let from = status(&before, "nodeName");
    // What it was given in the place of its node's own processor is one that the node says it can give.
    let model = status(&before, "guestCpu/model");
    let node = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Node"));
    let nodes: Api<DynamicObject> = Api::all_with(cluster.client.clone(), &node);
    let labels = ["cpu-model", "cpu-model-migration", "host-model-cpu"];
    let offers = |node: &DynamicObject| {
        let has = node.metadata.labels.clone().unwrap_or_default();
        labels.iter().all(|kind| has.contains_key(&format!("{kind}.node.kubevirt.io/{model}")))
    };
    cluster.wait(&nodes, &from, &format!("it offers CPU model {model:?}"), offers).await;
    cluster.migrate("flyer", "move").await;
    let migration = cluster
        .wait(&cluster.migrations(), "move", "it is over", |m| {
            ["Succeeded", "Failed"].contains(&status(m, "phase").as_str())
        })
        .await;
    assert_eq!(status(&migration, "phase"), "Succeeded", "{}\n{}", migration.data, cluster.words());
    let after = cluster.vmis().get("flyer").await.expect("VMI");
    assert_ne!(status(&after, "nodeName"), from);
    assert_eq!(status(&after, "migrationState/sourceNode"), from);
    assert_eq!(status(&after, "migrationState/targetNode"), status(&after, "nodeName"));
    assert_eq!(status(&after, "migrationState/completed"), "true");
    assert_eq!(after.data["status"]["guestCpu"], before.data["status"]["guestCpu"]);
    assert_eq!(status(&after, "migrationState/migrationUid"), migration.metadata.uid.clone().unwrap());
    for field in ["startTimestamp", "endTimestamp", "targetNodeAddress", "targetPod", "targetNodeDomainReadyTimestamp"]
    {
        assert_ne!(status(&after, &format!("migrationState/{field}")), "", "{field}: {}", after.data);
    }
    let phases: Vec<&str> = migration.data["status"]["phaseTransitionTimestamps"]
        .as_array()
        .expect("timestamps")
        .iter()
        .filter_map(|entry| entry["phase"].as_str())
        .collect();
    let wanted = ["Pending", "Scheduling", "Scheduled", "PreparingTarget", "TargetReady", "Running", "Succeeded"];
    assert_eq!(phases, wanted);
    let target = status(&after, "migrationState/targetPod");
    assert_ne!(source, target);
    guest_runs_on_in(&cluster, &target, 0xF1EE).await;
    one_launcher_is_left(&cluster, "flyer").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_deleted_in_flight_leaves_the_guest_where_it_was() {
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(Parameters { pages_per_tick: 64, noise: true, ..Parameters::default() });
    cluster.start_rom_guest("stayer").await;
    let before = cluster.vmis().get("stayer").await.expect("VMI");
    let from = status(&before, "nodeName");
    narrow_the_link(&cluster, &from);
    cluster.migrate("stayer", "move").await;
    cluster.wait(&cluster.migrations(), "move", "it runs", |m| status(m, "phase") == "Running").await;
    cluster.migrations().delete("move", &Default::default()).await.expect("delete");
    cluster.wait_gone(&cluster.migrations(), "move").await;
    let after = cluster
        .wait(&cluster.vmis(), "stayer", "the abort is done", |v| {
            status(v, "migrationState/abortStatus") == "Succeeded"
        })
        .await;
    assert_eq!(status(&after, "nodeName"), from);
    assert_eq!(status(&after, "phase"), "Running");
    assert_eq!(status(&after, "migrationState/abortRequested"), "true");
    assert_eq!(status(&after, "migrationState/completed"), "true");
    assert_eq!(status(&after, "migrationState/failed"), "true");
    one_launcher_is_left(&cluster, "stayer").await;
}
