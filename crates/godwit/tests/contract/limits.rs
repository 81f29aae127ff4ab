//! How many migrations run at once, and whose turn it is.

use crate::common::{Cluster, kubectls, status};
use crate::stage::{NARROW, condition, is_over, is_running, migration, phase};
use kube::api::DynamicObject;
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

/// Each that waits says for which limit and at which place; the more urgent one goes first, whenever it came.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_says_for_what_and_the_urgent_overtakes() {
    let cluster = Cluster::with_rom(2, 3).await;
    for name in ["first", "manual", "urgent"] {
        cluster.start_rom_guest_on(name, "node1").await;
    }
    cluster.configure(json!({"parallelMigrationsPerCluster": 1, "parallelOutboundMigrationsPerNode": 9})).await;
    cluster.narrow("node1", NARROW);
    cluster.migrate("first", "first").await;
    cluster.comes_to("first", "Running").await;
    cluster.migrate("manual", "manual").await;
    let place = |m: &DynamicObject| {
        (phase(m), status(m, "queue/limit"), status(m, "queue/position").parse::<u32>().unwrap_or(0))
    };
    let at = |position: u32| {
        move |m: &DynamicObject| {
            place(m) == ("Pending".into(), "parallelMigrationsPerCluster".into(), position)
                && status(m, "reason") == "ClusterLimit"
        }
    };
    let waiting = cluster.wait(&cluster.migrations(), "manual", "it is next", at(1)).await;
    assert!(status(&waiting, "message").contains("parallelMigrationsPerCluster"), "{}", status(&waiting, "message"));
    assert_eq!(condition(&waiting, "Waiting").expect("a condition")["reason"], "ClusterLimit");

    // Only the controller may say that something is urgent.
    let mut urgent = migration("urgent", "urgent");
    urgent["spec"]["priority"] = json!("system-critical");
    let path = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstancemigrations";
    let controller = "system:serviceaccount:kubevirt:kubevirt-controller";
    cluster.post(path, &urgent, controller).await.made();
    cluster.wait(&cluster.migrations(), "urgent", "it is next", at(1)).await;
    cluster.wait(&cluster.migrations(), "manual", "it was overtaken", at(2)).await;
    if let Some(kubectl) = kubectls().pop() {
        let table = cluster.kubectl(&kubectl, &["get", "vmim", "-o", "wide"]);
        let row = table.lines().find(|line| line.starts_with("manual ")).unwrap_or_default();
        assert!(row.contains("ClusterLimit"), "{table}");
    }

    cluster.cancel("first").await;
    cluster.comes_to("urgent", "Running").await;
    let behind = cluster.wait(&cluster.migrations(), "manual", "it is next", at(1)).await;
    assert_eq!(phase(&behind), "Pending");
    cluster.widen("node1");
    cluster.has_moved("urgent", "urgent").await;
    cluster.has_moved("manual", "manual").await;
    assert_eq!(cluster.migration("manual").await.data.pointer("/status/queue"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_come_to_a_node_than_it_may_receive() {
    let cluster = Cluster::with_rom(3, 3).await;
    cluster.start_rom_guest_on("one", "node1").await;
    cluster.start_rom_guest_on("two", "node2").await;
    cluster.configure(json!({"parallelInboundMigrationsPerNode": 1})).await;
    cluster.narrow("node1", NARROW);
    // Both can only go to node3.
    let to_the_third = |name: &str| {
        let mut wanted = migration(name, name);
        wanted["spec"]["addedNodeSelector"] = json!({"kubernetes.io/hostname": "node3"});
        wanted
    };
    cluster.ask(&to_the_third("one")).await.made();
    cluster.comes_to("one", "Running").await;
    cluster.ask(&to_the_third("two")).await.made();
    let limit = |m: &DynamicObject| {
        status(m, "queue/limit") == "parallelInboundMigrationsPerNode" && status(m, "reason") == "InboundLimit"
    };
    let waiting = cluster.wait(&cluster.migrations(), "two", "it says what it waits for", limit).await;
    assert_eq!(phase(&waiting), "Pending");
    assert_eq!(phase(&cluster.migration("one").await), "Running");
    cluster.widen("node1");
    assert_eq!(cluster.has_moved("one", "one").await, "node3");
    assert_eq!(cluster.has_moved("two", "two").await, "node3");
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
            cluster.kill_control_plane();
            kills += 1;
            cluster.up_again(3).await;
        }
    }
    assert_eq!((most, kills), (2, 2));
    for name in names {
        cluster.has_moved(name, name).await;
    }
}
