//! What a guest was doing it goes on doing.

use crate::channels::is_of_the_clear;
use crate::common::{Cluster, kill_hard, status};
use crate::stage::{MOMENT, NARROW, PATIENCE, condition, phase};
use godwit_guest_rom::Line;
use kube::api::DynamicObject;
use serde_json::json;
use std::time::Instant;

impl Cluster {
    /// Two nodes and a guest that lives at the second one already, while a part of its memory is still at the first.
    async fn with_guest_in_post_copy(guest: &str, disable_tls: bool) -> (Self, DynamicObject) {
        let cluster = Self::with_rom(2, 64).await;
        cluster
            .configure(json!({"completionTimeoutPerGiB": 3, "allowPostCopy": true, "disableTLS": disable_tls}))
            .await;
        cluster.start_rom_guest_on(guest, "node1").await;
        cluster.narrow("node1", NARROW);
        cluster.migrate(guest, "move").await;
        let ahead = |vmi: &DynamicObject| {
            status(vmi, "migrationState/mode") == "PostCopy" && status(vmi, "nodeName") == "node2"
        };
        let vmi = cluster.wait(&cluster.vmis(), guest, "it is in post-copy", ahead).await;
        (cluster, vmi)
    }
}

impl Cluster {
    /// How much of a guest's memory has been sent, as the API has it, and when that began.
    async fn sent(&self, guest: &str) -> (u64, String) {
        let vmi = self.vmis().get(guest).await.expect("VMI");
        let bytes = status(&vmi, "migrationState/progress/bytesProcessed").parse().unwrap_or(0);
        (bytes, status(&vmi, "migrationState/startTimestamp"))
    }

    /// Waits until its handler, which has come since, tells of more, in the same migration.
    async fn sends_on(&self, guest: &str, (before, start): (u64, String)) {
        let goes_on = |vmi: &DynamicObject| {
            let told = |field: &str| status(vmi, &format!("migrationState/{field}"));
            assert_eq!((told("failureReason").as_str(), told("progress/linkBrokenTimestamp").as_str()), ("", ""));
            told("progress/bytesProcessed").parse().is_ok_and(|bytes: u64| bytes > before)
        };
        let vmi = self.wait(&self.vmis(), guest, "it goes on", goes_on).await;
        assert_eq!(status(&vmi, "migrationState/startTimestamp"), start);
        assert_eq!((phase(&vmi).as_str(), status(&vmi, "migrationState/completed").as_str()), ("Running", ""));
    }
}

fn paused_by(vmi: &DynamicObject) -> &str {
    condition(vmi, "Paused").filter(|c| c["status"] == "True").and_then(|c| c["reason"].as_str()).unwrap_or_default()
}

/// Status and reason of a pod's `Ready`.
fn is_ready(pod: &DynamicObject) -> (&str, &str) {
    let field = |name: &str| condition(pod, "Ready").and_then(|ready| ready[name].as_str()).unwrap_or_default();
    (field("status"), field("reason"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_guest_moves_and_stays_paused_until_it_is_unpaused() {
    let cluster = Cluster::with_rom(2, 3).await;
    cluster.start_rom_guest_on("sleeper", "node1").await;
    let (source, _) = cluster.only_launcher("sleeper").await;
    cluster.beats_in(&source).await;
    cluster.with_launcher(&source, async |launcher| launcher.pause().await.expect("pause")).await;
    let by_user = |vmi: &DynamicObject| paused_by(vmi) == "PausedByUser";
    cluster.wait(&cluster.vmis(), "sleeper", "it is paused", by_user).await;
    cluster.migrate("sleeper", "move").await;
    cluster.comes_to("move", "Succeeded").await;
    let vmi = cluster.vmis().get("sleeper").await.expect("VMI");
    assert_eq!((status(&vmi, "nodeName").as_str(), phase(&vmi).as_str()), ("node2", "Running"));
    let vmi = cluster.wait(&cluster.vmis(), "sleeper", "it is paused there", by_user).await;
    let target = status(&vmi, "migrationState/targetPod");
    let state = cluster.with_launcher(&target, async |launcher| launcher.state().await.expect("state")).await;
    assert_eq!(state.phase, godwit_launcher::rpc::DomainPhase::Paused);
    assert_eq!(cluster.lines(&target).await, Vec::<Line>::new(), "it has run");
    // Services send nobody there meanwhile.
    let shut = |pod: &DynamicObject| is_ready(pod) == ("False", "ReadinessGatesNotReady");
    let pod = cluster.wait(&cluster.pods(), &target, "it is not ready", shut).await;
    assert_eq!(pod.metadata.labels.unwrap_or_default()["kubevirt.io/nodeName"], "node2");
    cluster.with_launcher(&target, async |launcher| launcher.unpause().await.expect("unpause")).await;
    cluster.wait(&cluster.vmis(), "sleeper", "it runs", |vmi| paused_by(vmi).is_empty()).await;
    cluster.wait(&cluster.pods(), &target, "it is ready", |pod| is_ready(pod) == ("True", "")).await;
    cluster.beats_in(&target).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_may_be_disturbed_is_held_until_the_rest_is_over() {
    let cluster = Cluster::with_noisy_rom(2, 64).await;
    cluster.configure(json!({"completionTimeoutPerGiB": 15, "allowWorkloadDisruption": true})).await;
    cluster.start_rom_guest_on("busy", "node1").await;
    cluster.narrow("node1", NARROW);
    cluster.migrate("busy", "move").await;
    let held = |vmi: &DynamicObject| {
        paused_by(vmi) == "PausedByMigrationMonitor" && status(vmi, "migrationState/mode") == "Paused"
    };
    cluster.wait(&cluster.vmis(), "busy", "it is held", held).await;
    assert_eq!(phase(&cluster.migration("move").await), "Running");
    // It has as long again for the rest.
    cluster.widen("node1");
    cluster.has_moved("busy", "move").await;
    let vmi = cluster.wait(&cluster.vmis(), "busy", "it is not paused", |vmi| paused_by(vmi).is_empty()).await;
    assert_eq!(status(&vmi, "migrationState/mode"), "Paused", "{}", vmi.data["status"]["migrationState"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_may_go_ahead_of_its_memory_does() {
    let (cluster, vmi) = Cluster::with_guest_in_post_copy("ahead", false).await;
    assert_eq!(status(&vmi, "migrationState/completed"), "", "{}", vmi.data["status"]["migrationState"]);
    cluster.widen("node1");
    cluster.has_moved("ahead", "move").await;
    let vmi = cluster.vmis().get("ahead").await.expect("VMI");
    assert_eq!(status(&vmi, "migrationState/mode"), "PostCopy", "{}", vmi.data["status"]["migrationState"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_cut_in_post_copy_costs_time_and_nothing_else() {
    cut_in_post_copy(false).await;
}

/// The other link proves the migration's secret anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_in_the_clear_that_is_cut_in_post_copy_costs_no_more() {
    cut_in_post_copy(true).await;
}

async fn cut_in_post_copy(disable_tls: bool) {
    let (cluster, _) = Cluster::with_guest_in_post_copy("parted", disable_tls).await;
    cluster.cut("node1", "node2");
    let link_broken = |vmi: &DynamicObject| {
        condition(vmi, "Synchronized").is_some_and(|c| c["status"] == "False" && c["reason"] == "PostCopyLinkBroken")
    };
    let vmi = cluster.wait(&cluster.vmis(), "parted", "it waits for the link", link_broken).await;
    assert_eq!((phase(&vmi).as_str(), status(&vmi, "migrationState/completed").as_str()), ("Running", ""));
    let since = |vmi: &DynamicObject| !status(vmi, "migrationState/progress/linkBrokenTimestamp").is_empty();
    cluster.wait(&cluster.vmis(), "parted", "it says since when", since).await;
    let said = |move_: &DynamicObject| status(move_, "reason") == "PostCopyLinkBroken";
    let migration = cluster.wait(&cluster.migrations(), "move", "it says so too", said).await;
    assert_eq!(phase(&migration), "Running");
    assert!(status(&migration, "message").contains("goes on when the link is back"), "{}", migration.data);
    cluster.widen("node1");
    cluster.mend("node1", "node2");
    cluster.has_moved("parted", "move").await;
    let vmi = cluster.wait(&cluster.vmis(), "parted", "it is whole", |vmi| !link_broken(vmi)).await;
    let told = |field: &str| status(&vmi, &format!("migrationState/progress/{field}"));
    assert_eq!((told("recoveries").as_str(), told("linkBrokenTimestamp").as_str()), ("1", ""), "{}", vmi.data);
    for words in ["The link to node node1 broke in post-copy", "The link is back"] {
        cluster.hears_of("VirtualMachineInstance", "parted", words, |event| event.message.starts_with(words)).await;
    }
    let said = cluster.events("VirtualMachineInstance", "parted").await;
    assert_eq!(said.iter().any(is_of_the_clear), disable_tls, "{said:?}");
}

/// The handlers open the way that memory takes, and it goes through the launchers.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_is_killed_in_post_copy_costs_nothing() {
    let (mut cluster, _) = Cluster::with_guest_in_post_copy("orphan", false).await;
    // Minutes for what is left, so that something is left to be lost each time, however busy the machine is.
    cluster.narrow("node1", "200kbit");
    for nodes in [&["node1"][..], &["node2"], &["node1", "node2"]] {
        let before = cluster.sent("orphan").await;
        nodes.iter().for_each(|node| kill_hard(cluster.pid(node)));
        cluster.up_again(2).await;
        cluster.sends_on("orphan", before).await;
    }
    cluster.widen("node1");
    assert_eq!(cluster.has_moved("orphan", "move").await, "node2");
    let vmi = cluster.vmis().get("orphan").await.expect("VMI");
    let told = |field: &str| status(&vmi, &format!("migrationState/progress/{field}"));
    assert_eq!((told("bytesRemaining").as_str(), told("recoveries").as_str()), ("0", ""), "{}", vmi.data);
}

/// While the guest runs at the source nothing is sent twice either.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_is_killed_while_memory_is_copied_costs_nothing() {
    let mut cluster = Cluster::with_noisy_rom(2, 64).await;
    cluster.start_rom_guest_on("copied", "node1").await;
    let (source, _) = cluster.only_launcher("copied").await;
    cluster.narrow("node1", NARROW);
    cluster.migrate("copied", "move").await;
    let sends = |vmi: &DynamicObject| {
        status(vmi, "migrationState/progress/bytesProcessed").parse().is_ok_and(|bytes: u64| bytes > 0)
    };
    let vmi = cluster.wait(&cluster.vmis(), "copied", "it is on its way", sends).await;
    // More than a minute for what is left.
    cluster.narrow("node1", "400kbit");
    let carried = async |cluster: &Cluster| {
        let state = cluster.with_launcher(&source, async |launcher| launcher.state().await.expect("state")).await;
        let facts = state.migration.expect("its migration");
        let carried = facts.carried.expect("its memory goes through the launcher");
        (facts.start_us, carried)
    };
    let (began, mut before) = carried(&cluster).await;
    assert!(before.flows, "{before:?}");
    assert_eq!(status(&vmi, "nodeName"), "node1");
    for nodes in [&["node1"][..], &["node2"], &["node1", "node2"]] {
        let told = cluster.sent("copied").await;
        nodes.iter().for_each(|node| kill_hard(cluster.pid(node)));
        cluster.up_again(2).await;
        cluster.sends_on("copied", told).await;
        // What the API tells may be older than the kill; and a full socket takes nothing for seconds.
        let deadline = Instant::now() + PATIENCE;
        let now = loop {
            let (start, now) = carried(&cluster).await;
            assert_eq!((start, now.link, now.flows), (began, 0, true), "the same stream");
            if now.out > before.out {
                break now;
            }
            assert!(Instant::now() < deadline, "nothing goes out any more: {now:?}\n{}", cluster.words());
            tokio::time::sleep(MOMENT).await;
        };
        before = now;
    }
    cluster.widen("node1");
    assert_eq!(cluster.has_moved("copied", "move").await, "node2");
}
