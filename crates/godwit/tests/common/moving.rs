//! Guests on their way, and what is left of it.

use super::{Cluster, status, text};
use godwit_guest_rom::Line;
use std::process::Command;
use std::time::Duration;

/// The guest beats in the target's log, without having started there and with its memory as it was.
pub async fn guest_runs_on_in(cluster: &Cluster, pod: &str, wanted: u32) {
    for _ in 0..250 {
        let lines = cluster.lines(pod).await;
        let beats: Vec<_> = lines
            .iter()
            .filter_map(|line| match line {
                Line::Beat { token, count, errors, .. } => Some((*token, *count, *errors)),
                _ => None,
            })
            .collect();
        assert!(!lines.iter().any(|line| matches!(line, Line::Start { .. })), "it started anew: {lines:?}");
        if beats.len() >= 3 {
            assert!(
                beats.iter().all(|(token, count, errors)| *token == wanted && *count > 1 && *errors == 0),
                "{beats:?}"
            );
            assert!(beats.windows(2).all(|pair| pair[1].1 == pair[0].1 + 1), "beats are missing: {beats:?}");
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("no beats in {pod}: {}\n{}", cluster.console(pod).await, cluster.words());
}

/// One launcher is left of a VMI, on the node that its status names.
pub async fn one_launcher_is_left(cluster: &Cluster, vmi: &str) {
    let node = status(&cluster.vmis().get(vmi).await.expect("VMI"), "nodeName");
    for _ in 0..500 {
        let launchers = cluster.launchers(vmi).await;
        if launchers.len() == 1 {
            assert_eq!(launchers[0].1, node);
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("more than one launcher is left: {:?}\n{}", cluster.launchers(vmi).await, cluster.words());
}

/// Makes a node's way out so narrow that a migration can be caught in flight. (The cap in the API would not do: QEMU's
/// translator before 9.0 sends a guest in one pass, uncapped.)
pub fn narrow_the_link(cluster: &Cluster, node: &str) {
    narrow(cluster, node, "eth0");
}

/// The same of any of its links.
pub fn narrow(cluster: &Cluster, node: &str, link: &str) {
    shape(cluster, node, &["add", "dev", link, "root", "tbf", "rate", "4mbit", "burst", "16kb", "latency", "400ms"]);
}

/// Takes that back.
pub fn widen_the_link(cluster: &Cluster, node: &str) {
    shape(cluster, node, &["del", "dev", "eth0", "root"]);
}

fn shape(cluster: &Cluster, node: &str, what: &[&str]) {
    let output = Command::new("ip")
        .args(["netns", "exec", &cluster.namespace(node), "tc", "qdisc"])
        .args(what)
        .output()
        .expect("ip starts");
    assert!(output.status.success(), "{}", text(&output.stderr));
}
