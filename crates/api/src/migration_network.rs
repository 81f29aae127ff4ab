//! A network of their own for migrations: which one is asked for, and which one nodes have.
//!
//! `spec.configuration.migrations.network` names it, as KubeVirt's does. Which network a handler uses is said when it is started, since
//! its pod has to be attached to it; it tells on its Node what it has, and what was asked for is held against that.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use crate::Installation;
use crate::names::{ANNOTATION_HEARTBEAT, ANNOTATION_MIGRATION_NETWORK, LABEL_SCHEDULABLE};

/// So many nodes are named; of more it is said how many they are.
const MOST_NAMED: usize = 5;

/// A NetworkAttachmentDefinition, by its namespace and name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkName {
    namespace: String,
    name: String,
}

impl NetworkName {
    /// Reads `[NAMESPACE/]NAME`; without a namespace it is one in `namespace`, for KubeVirt's setting its own. `None` if nothing can have
    /// that name.
    #[must_use]
    pub fn parse(text: &str, namespace: &str) -> Option<Self> {
        let (namespace, name) = text.split_once('/').unwrap_or((namespace, text));
        let fits = |part: &str, most: usize| {
            let edge = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
            part.len() <= most
                && part.bytes().all(|byte| edge(byte) || matches!(byte, b'-' | b'.'))
                && part.bytes().next().is_some_and(edge)
                && part.bytes().last().is_some_and(edge)
        };
        // As Kubernetes has it: a label and a subdomain (RFC 1123).
        let known = fits(namespace, 63) && !namespace.contains('.') && fits(name, 253);
        known.then(|| Self { namespace: namespace.to_owned(), name: name.to_owned() })
    }

    /// As Multus' annotation asks for it, to be this interface of the pod.
    #[must_use]
    pub fn as_interface(&self, interface: &str) -> String {
        format!("{self}@{interface}")
    }

    /// As it is written from within `namespace`.
    fn seen_from(&self, namespace: &str) -> String {
        if self.namespace == namespace { self.name.clone() } else { self.to_string() }
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A node's place in a network for migrations, as its handler tells in the annotation [`ANNOTATION_MIGRATION_NETWORK`]; a handler that
/// was given none tells nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MigrationNetwork {
    /// The interface that the handler was told to use.
    pub interface: String,
    /// The NetworkAttachmentDefinition that it is of, as `NAMESPACE/NAME`; none for an interface of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Where migrations are received there; none while that cannot be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Why there is no address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The annotation: with the heartbeat that it came with. An older handler, which uses no such network, goes on with the heartbeat alone and
/// leaves what a newer one has told.
#[derive(Serialize, Deserialize)]
struct Told<N> {
    #[serde(flatten)]
    network: N,
    heartbeat: String,
}

impl MigrationNetwork {
    /// What a node with these annotations has, by the handler that its last heartbeat is of.
    #[must_use]
    pub fn of(annotations: Option<&BTreeMap<String, String>>) -> Option<Self> {
        let annotations = annotations?;
        let told: Told<Self> = serde_json::from_str(annotations.get(ANNOTATION_MIGRATION_NETWORK)?).ok()?;
        (annotations.get(ANNOTATION_HEARTBEAT) == Some(&told.heartbeat)).then_some(told.network)
    }

    /// The annotation [`ANNOTATION_MIGRATION_NETWORK`] beside this value of [`ANNOTATION_HEARTBEAT`].
    #[must_use]
    pub fn told_at(&self, heartbeat: &str) -> Option<String> {
        serde_json::to_string(&Told { network: self, heartbeat: heartbeat.to_owned() }).ok()
    }

    /// Whether a migration between this node and the other one can go over it: both are there now, with addresses of one family.
    #[must_use]
    pub fn joins(&self, other: &Self) -> bool {
        let addresses = self.address.zip(other.address);
        self.network == other.network && addresses.is_some_and(|(one, other)| one.is_ipv4() == other.is_ipv4())
    }
}

/// Whether a node has a handler, which has neither said farewell nor been silent for too long.
#[must_use]
pub fn has_handler(node: &ObjectMeta) -> bool {
    let beats = node.annotations.as_ref().is_some_and(|all| all.contains_key(ANNOTATION_HEARTBEAT));
    let away = node.labels.as_ref().and_then(|all| all.get(LABEL_SCHEDULABLE)).is_some_and(|value| value == "false");
    beats && !away
}

/// Why migrations do not all go over the network `wanted` (`migrations.network`), with the nodes' names and what is to be done about it;
/// `None` when they do. Nodes without a handler do not count: while one is replaced it is not known what the next one uses.
#[must_use]
pub fn unmet<'a>(
    wanted: &str,
    installation: &Installation,
    nodes: impl IntoIterator<Item = &'a ObjectMeta>,
) -> Option<String> {
    let own = installation.namespace();
    let wanted = NetworkName::parse(wanted, own)?;
    let (mut elsewhere, mut away) = (Vec::new(), Vec::new());
    for node in nodes.into_iter().filter(|node| has_handler(node)) {
        let name = node.name.as_deref().unwrap_or_default();
        match MigrationNetwork::of(node.annotations.as_ref()) {
            Some(has) if has.network.as_deref() == Some(wanted.to_string().as_str()) => {
                away.extend(has.problem.map(|problem| format!("{name} ({problem})")));
            }
            _ => elsewhere.push(name.to_owned()),
        }
    }
    let mut said = Vec::new();
    if !elsewhere.is_empty() {
        said.push(format!(
            "the handlers of these nodes do not use network {wanted}: {}; they do when what `godwit manifests --migration-network {}` \
             prints, with its other options as they were, is applied",
            listed(elsewhere),
            wanted.seen_from(own)
        ));
    }
    if !away.is_empty() {
        said.push(format!("network {wanted} is not there now for the handlers of {}", listed(away)));
    }
    (!said.is_empty()).then(|| {
        let said = said.join(". And ");
        format!(
            "migrations.network: {said}. Migrations to and from these nodes go over the nodes' own network meanwhile"
        )
    })
}

fn listed(mut nodes: Vec<String>) -> String {
    nodes.sort_unstable();
    let more = nodes.len().saturating_sub(MOST_NAMED);
    nodes.truncate(MOST_NAMED);
    let named = nodes.join(", ");
    if more == 0 { named } else { format!("{named} and {more} more") }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Annotations = BTreeMap<String, String>;

    const BEAT: &str = "2026-11-23T03:00:00Z";

    fn annotations(says: Option<&str>) -> Annotations {
        let beat = (ANNOTATION_HEARTBEAT.to_owned(), BEAT.to_owned());
        let says = says.map(|says| (ANNOTATION_MIGRATION_NETWORK.to_owned(), says.to_owned()));
        std::iter::once(beat).chain(says).collect()
    }

    fn has(network: Option<&str>, address: Option<&str>) -> MigrationNetwork {
        MigrationNetwork {
            interface: "migration0".into(),
            network: network.map(str::to_owned),
            address: address.map(|address| address.parse().unwrap()),
            problem: address.is_none().then(|| "there is no interface migration0".to_owned()),
        }
    }

    fn node(name: &str, annotations: &Annotations) -> ObjectMeta {
        ObjectMeta { name: Some(name.to_owned()), annotations: Some(annotations.clone()), ..ObjectMeta::default() }
    }

    #[test]
    fn a_network_is_named_with_or_without_its_namespace() {
        let parse = |text| NetworkName::parse(text, "kubevirt").map(|name| name.to_string());
        assert_eq!(parse("fast").as_deref(), Some("kubevirt/fast"));
        assert_eq!(parse("networks/fast.lane-1").as_deref(), Some("networks/fast.lane-1"));
        for wrong in ["", "/", "a/", "/b", "a/b/c", "Fast", "a b", "-a", "a-", "n.s/a", &"x".repeat(254)] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_migration_goes_over_a_network_that_both_ends_are_in_now() {
        let (fast, slow) = (Some("kubevirt/fast"), Some("kubevirt/slow"));
        let (one, other) = (has(fast, Some("10.99.0.1")), has(fast, Some("10.99.0.2")));
        assert!(one.joins(&other) && has(None, Some("fd00::1")).joins(&has(None, Some("fd00::2"))));
        for not in
            [has(fast, None), has(slow, Some("10.99.0.2")), has(None, Some("10.99.0.2")), has(fast, Some("fd00::2"))]
        {
            assert!(!one.joins(&not) && !not.joins(&one), "{not:?}");
        }
    }

    #[test]
    fn what_a_node_says_is_read_back_and_anything_else_is_nothing() {
        for told in [has(None, None), has(Some("kubevirt/fast"), Some("fd00::1"))] {
            let text = told.told_at(BEAT).unwrap();
            assert_eq!(MigrationNetwork::of(Some(&annotations(Some(&text)))), Some(told));
        }
        let nowhere = format!(r#"{{"interface":"a","address":"somewhere","heartbeat":"{BEAT}"}}"#);
        for text in [None, Some(""), Some("{}"), Some(nowhere.as_str())] {
            assert_eq!(MigrationNetwork::of(Some(&annotations(text))), None);
        }
        assert_eq!(MigrationNetwork::of(None), None);
    }

    #[test]
    fn what_a_handler_has_told_is_over_with_the_first_heartbeat_of_an_older_one() {
        let told = has(None, Some("10.99.0.1"));
        let mut node = annotations(told.told_at(BEAT).as_deref());
        assert_eq!(MigrationNetwork::of(Some(&node)), Some(told));
        node.insert(ANNOTATION_HEARTBEAT.to_owned(), "2026-11-23T03:00:41Z".to_owned());
        assert_eq!(MigrationNetwork::of(Some(&node)), None);
        // Neither does what tells of no heartbeat count.
        let text = r#"{"interface":"eth1","address":"10.99.0.1"}"#;
        assert_eq!(MigrationNetwork::of(Some(&annotations(Some(text)))), None);
    }

    #[test]
    fn nodes_that_do_not_use_the_network_are_named_with_what_is_to_be_done() {
        let say = |has: &MigrationNetwork| annotations(has.told_at(BEAT).as_deref());
        let uses = say(&has(Some("kubevirt/fast"), Some("10.99.0.1")));
        let away = say(&has(Some("kubevirt/fast"), None));
        let other = say(&has(None, Some("10.99.0.1")));
        let silent = annotations(None);
        let of = |nodes: &[(&str, &Annotations)]| {
            let nodes: Vec<_> = nodes.iter().map(|(name, all)| node(name, all)).collect();
            unmet("fast", &Installation::USUAL, &nodes)
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("a", &uses), ("no-handler", &Annotations::new())]), None);
        assert_eq!(
            of(&[("c", &silent), ("a", &uses), ("b", &other)]).unwrap(),
            "migrations.network: the handlers of these nodes do not use network kubevirt/fast: b, c; they do when what `godwit manifests \
             --migration-network fast` prints, with its other options as they were, is applied. Migrations to and from these nodes go \
             over the nodes' own network meanwhile"
        );
        assert_eq!(
            of(&[("a", &uses), ("b", &away)]).unwrap(),
            "migrations.network: network kubevirt/fast is not there now for the handlers of b (there is no interface migration0). \
             Migrations to and from these nodes go over the nodes' own network meanwhile"
        );
        let many: Vec<String> = (1..=8).map(|number| format!("n{number}")).collect();
        let many: Vec<_> = many.iter().map(|name| (name.as_str(), &silent)).collect();
        assert!(of(&many).unwrap().contains("n1, n2, n3, n4, n5 and 3 more;"));
        let foreign = unmet("networks/fast", &Installation::USUAL, [&node("a", &uses)]).unwrap();
        assert!(foreign.contains("--migration-network networks/fast`"), "{foreign}");
        let said = |schedulable: &str| {
            let labels = BTreeMap::from([(LABEL_SCHEDULABLE.to_owned(), schedulable.to_owned())]);
            let node = ObjectMeta { labels: Some(labels), ..node("a", &silent) };
            unmet("fast", &Installation::USUAL, [&node]).is_some()
        };
        assert!(said("true") && !said("false"), "a handler that is being replaced uses none");
    }
}
