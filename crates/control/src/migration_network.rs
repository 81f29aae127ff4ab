//! Which network a migration goes over.
//!
//! Handlers say on their nodes which network for migrations they have, and whether it is there ([`MigrationNetwork`]). A migration goes over
//! it if both ends do at the moment of the hand-over: a target that listened where its source cannot reach it would be of no use. The
//! target's handler has the last word, since its interface may have gone meanwhile, and publishes what it is.

use godwit_api::{MigrationNetwork, migration_network};
use k8s_openapi::api::core::v1::Node;

use crate::names;
use crate::object::Name;
use crate::world::World;

/// The `migrationNetworkType` that a migration between these nodes is begun with.
pub(crate) fn between(source: Option<&str>, target: Option<&str>, world: &World) -> &'static str {
    let place = |node: Option<&str>| {
        let node = world.nodes.get(&Name::cluster(node?))?;
        MigrationNetwork::of(node.metadata.annotations.as_ref())
    };
    // Within its node a guest goes over no network.
    let joined =
        source != target && place(source).zip(place(target)).is_some_and(|(source, target)| source.joins(&target));
    if joined { names::MIGRATION_NETWORK_OWN } else { names::MIGRATION_NETWORK_POD }
}

/// Why migrations do not all go over the network that the configuration names.
pub(crate) fn unmet(world: &World) -> Option<String> {
    let wanted = world.configuration().network.as_deref()?;
    migration_network::unmet(wanted, world.installation(), world.nodes.iter().map(|node| &node.metadata))
}

/// Whether what a node's handler says of it has changed, or whether there is a handler.
pub(crate) fn changes(before: Option<&Node>, after: Option<&Node>) -> bool {
    let said = |node: Option<&Node>| {
        let node = &node.filter(|node| migration_network::has_handler(&node.metadata))?.metadata;
        Some(MigrationNetwork::of(node.annotations.as_ref()))
    };
    said(before) != said(after)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::key::Key;
    use crate::object::{Kind, Object};
    use crate::testing::Cluster;
    use crate::world::Change;

    fn node(name: &str, annotations: Value) -> Value {
        json!({"metadata": {"name": name, "annotations": annotations}})
    }

    const BEAT: &str = "2026-11-23T03:00:00Z";
    const NEXT_BEAT: &str = "2026-11-23T03:01:00Z";

    fn told_at(heartbeat: &str, address: &str) -> Value {
        let told = json!({"interface": "eth1", "address": address, "heartbeat": heartbeat}).to_string();
        json!({names::ANNOTATION_HEARTBEAT: heartbeat, names::ANNOTATION_MIGRATION_NETWORK: told})
    }

    fn told(address: &str) -> Value {
        told_at(BEAT, address)
    }

    /// The next heartbeat is of a handler that knows nothing of such networks.
    fn by_an_older_one(mut told: Value) -> Value {
        told[names::ANNOTATION_HEARTBEAT] = json!(NEXT_BEAT);
        told
    }

    #[test]
    fn a_guest_that_stays_on_its_node_goes_over_none() {
        let mut cluster = Cluster::new();
        cluster.put(Kind::Node, node("a", told("10.99.0.1")));
        cluster.put(Kind::Node, node("b", told("10.99.0.2")));
        assert_eq!(between(Some("a"), Some("b"), &cluster.world), "Migration");
        assert_eq!(between(Some("a"), Some("a"), &cluster.world), "Pod");
        assert_eq!(between(Some("a"), Some("gone"), &cluster.world), "Pod");
        assert_eq!(between(None, None, &cluster.world), "Pod");
    }

    #[test]
    fn what_a_handler_has_told_does_not_count_for_an_older_one_after_it() {
        let mut cluster = Cluster::new();
        cluster.put(Kind::Node, node("a", told("10.99.0.1")));
        cluster.put(Kind::Node, node("b", by_an_older_one(told("10.99.0.2"))));
        assert_eq!(between(Some("a"), Some("b"), &cluster.world), "Pod");
        assert_eq!(between(Some("b"), Some("a"), &cluster.world), "Pod");
        cluster.put(Kind::Node, node("b", told_at(NEXT_BEAT, "10.99.0.2")));
        assert_eq!(between(Some("a"), Some("b"), &cluster.world), "Migration");
    }

    #[test]
    fn the_installations_object_is_looked_at_again_when_a_handler_says_something_else() {
        let mut cluster = Cluster::new();
        cluster.put(Kind::KubeVirt, json!({"metadata": {"namespace": "kubevirt", "name": "kubevirt"}}));
        let object = |annotations| Some(Object::from_value(Kind::Node, node("a", annotations)).unwrap());
        let asks = |before, after| {
            let keys = Key::affected(&Change { before, after }, &cluster.world);
            keys.iter().any(|key| matches!(key, Key::KubeVirt(_)))
        };
        assert!(asks(None, object(told("10.99.0.1"))));
        assert!(!asks(object(told("10.99.0.1")), object(told_at(NEXT_BEAT, "10.99.0.1"))));
        assert!(asks(object(told("10.99.0.1")), object(by_an_older_one(told("10.99.0.1")))));
        assert!(asks(object(told("10.99.0.1")), object(told("10.99.0.3"))));
        assert!(asks(object(told("10.99.0.1")), None));
        let silent = json!({names::ANNOTATION_HEARTBEAT: BEAT});
        assert!(asks(object(json!({})), object(silent.clone())), "there is a handler now, which uses no such network");
        let mut away = node("a", silent.clone());
        away["metadata"]["labels"] = json!({names::LABEL_SCHEDULABLE: "false"});
        let away = Object::from_value(Kind::Node, away).unwrap();
        assert!(asks(object(silent), Some(away)), "it has said farewell");
    }
}
