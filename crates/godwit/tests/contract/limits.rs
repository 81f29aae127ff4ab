//! How many migrations run at once, and whose turn it is.

use crate::common::Cluster;
use crate::stage::{NARROW, is_over, is_running, phase};
use kube::api::DynamicObject;
use nix::sys::signal::{Signal, kill};
use serde_json::json;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// How many migrations take a slot now: those under way, and those whose target pod exists.
async fn slots(cluster: &Cluster) -> Option<usize> {
    // Pods first: one whose migration is not over afterwards took its slot all the time.
    let pods = cluster.pods().list(&Default::default()).await.ok()?;
    let migrations = cluster.migrations().list(&Default::default()).await.ok()?;
    let unfinished = |m: &&DynamicObject| !is_over(m);
    let uids: BTreeSet<&str> =
        migrations.items.iter().filter(unfinished).filter_map(|m| m.metadata.uid.as_deref()).collect();
    let mut taken: BTreeSet<&str> =
        migrations.items.iter().filter(|m| is_running(m)).filter_map(|m| m.metadata.uid.as_deref()).collect();
    for pod in &pods.items {
        let labels = pod.metadata.labels.as_ref();
        let of = labels.and_then(|labels| labels.get("kubevirt.io/migrationJobUID")).map(String::as_str);
        taken.extend(of.filter(|of| uids.contains(of)));
    }
    Some(taken.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_leave_a_node_than_it_may_send() {
    let cluster = Cluster::with_rom(3, 3).await;
    for name in ["one", "two"] {
        cluster.start_rom_guest_on(name, "node1").await;
    }
    cluster.start_rom_guest_on("other", "node2").await;
    cluster.configure(json!({"parallelOutboundMigrationsPerNode": 1})).await;
    cluster.narrow("node1", NARROW);
    cluster.migrate("one", "one").await;
    cluster.comes_to("one", "Running").await;
    cluster.migrate("two", "two").await;
    // The other node's guest does not wait behind it.
    cluster.migrate("other", "other").await;
    cluster.has_moved("other", "other").await;
    assert_eq!(phase(&cluster.migration("two").await), "Pending");
    assert_eq!(phase(&cluster.migration("one").await), "Running");
    cluster.widen("node1");
    cluster.has_moved("one", "one").await;
    cluster.has_moved("two", "two").await;
}

/// Whoever decides forgets everything, twice, and never lets one too many go.
#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_when_the_control_plane_is_killed() {
    let mut cluster = Cluster::with_rom(3, 3).await;
    let names = ["a", "b", "c", "d", "e", "f"];
    for (n, name) in names.iter().enumerate() {
        cluster.start_rom_guest_on(name, &format!("node{}", n % 3 + 1)).await;
    }
    cluster.configure(json!({"parallelMigrationsPerCluster": 2})).await;
    for node in ["node1", "node2", "node3"] {
        cluster.narrow(node, "32mbit");
    }
    for name in names {
        cluster.migrate(name, name).await;
    }
    let deadline = Instant::now() + Duration::from_secs(150);
    let (mut most, mut kills) = (0, 0);
    loop {
        assert!(Instant::now() < deadline, "not all have moved\n{}", cluster.words());
        if let Some(now) = slots(&cluster).await {
            assert!(now <= 2, "{now} at once\n{}", cluster.words());
            most = most.max(now);
        }
        let Ok(list) = cluster.migrations().list(&Default::default()).await else { continue };
        let over = list.items.iter().filter(|m| is_over(m)).count();
        if over == names.len() {
            break;
        }
        // In the middle of things, after the first and after the third.
        if over > 2 * kills && kills < 2 && list.items.iter().any(is_running) {
            kill(cluster.pid("control-plane"), Signal::SIGKILL).expect("kill it");
            kills += 1;
            cluster.up_again(3).await;
        }
    }
    assert_eq!((most, kills), (2, 2));
    for name in names {
        cluster.has_moved(name, name).await;
    }
}
