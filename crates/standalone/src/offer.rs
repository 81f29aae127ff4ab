//! What executes guests, as the nodes say it.

use crate::up::admin_client;
use crate::{Error, Up};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use std::time::{Duration, Instant};

/// How long the nodes may take to find out: they try KVM with a small guest.
const KNOWN_WITHIN: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(50);

/// What executes guests on the nodes of a cluster that is up, one line for each answer that differs; none as long as no
/// node has found out.
///
/// # Errors
/// The kubeconfig cannot be used.
pub async fn offers(up: &Up) -> Result<Vec<String>, Error> {
    let nodes: Api<Node> = Api::all(admin_client(&up.layout).await?);
    let deadline = Instant::now() + KNOWN_WITHIN;
    loop {
        let known: Vec<_> = match nodes.list(&Default::default()).await {
            Ok(list) => list.items.iter().map(offer).collect(),
            Err(_) => Vec::new(),
        };
        let all = !known.is_empty() && known.iter().all(Option::is_some);
        if all || Instant::now() > deadline {
            let mut lines: Vec<String> = known.into_iter().flatten().collect();
            lines.sort();
            lines.dedup();
            return Ok(lines);
        }
        tokio::time::sleep(POLL).await;
    }
}

fn offer(node: &Node) -> Option<String> {
    let annotation = |name: &str| node.metadata.annotations.as_ref()?.get(&format!("godwit.dev/{name}"));
    let accelerator = annotation("accelerator")?;
    let mut line = match annotation("qemu-version") {
        Some(version) => format!("{} with QEMU {version}", accelerator.to_uppercase()),
        None => format!("{}, no QEMU found", accelerator.to_uppercase()),
    };
    for sentence in [annotation("accelerator-reason"), annotation("qemu-shortcoming")].into_iter().flatten() {
        line += "; ";
        line += sentence;
    }
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_says_what_it_offers_once_it_knows() {
        let mut node = Node::default();
        assert_eq!(offer(&node), None);
        let mut set = |name: &str, value: &str| {
            node.metadata.annotations.get_or_insert_default().insert(format!("godwit.dev/{name}"), value.into());
            offer(&node)
        };
        assert_eq!(set("accelerator", "tcg").as_deref(), Some("TCG, no QEMU found"));
        set("qemu-version", "7.2.22");
        set("accelerator-reason", "no KVM");
        assert_eq!(set("qemu-shortcoming", "old").as_deref(), Some("TCG with QEMU 7.2.22; no KVM; old"));
    }
}
