//! Pods that keep away from each other, or together.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, PodAffinityTerm};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};

use super::is_finished;
use crate::object::{Name, labels};
use crate::selector;
use crate::world::World;

/// Topology domains that other pods rule out or that a pod must be in.
#[derive(Default)]
pub struct Neighbours {
    /// (topology key, value) where a pod is that this one keeps away from.
    own_rules: BTreeSet<(String, String)>,
    /// (topology key, value) where a pod is that keeps away from this one.
    their_rules: BTreeSet<(String, String)>,
    /// For each affinity term: topology key and the values where a match is.
    wanted: Vec<(String, BTreeSet<String>)>,
}

impl Neighbours {
    /// What the pods of the world mean for this one.
    pub fn of(pod: &Pod, world: &World) -> Self {
        let mut found = Self::default();
        for term in anti_affinity(pod) {
            for other in subjects(term, world) {
                if concerns(term, &pod.metadata, &other.metadata) {
                    found.own_rules.extend(domain(&term.topology_key, other, pod, world));
                }
            }
        }
        for other in objectors(pod, world) {
            for term in anti_affinity(other).iter().filter(|term| concerns(term, &other.metadata, &pod.metadata)) {
                found.their_rules.extend(domain(&term.topology_key, other, pod, world));
            }
        }
        for term in affinity(pod) {
            let matching = subjects(term, world).filter(|other| concerns(term, &pod.metadata, &other.metadata));
            let values = matching.filter_map(|other| domain(&term.topology_key, other, pod, world));
            found.wanted.push((term.topology_key.clone(), values.map(|(_, value)| value).collect()));
        }
        // The first of a group that wants to be together with its like may go anywhere.
        let alone = found.wanted.iter().all(|(_, values)| values.is_empty());
        if alone && affinity(pod).iter().all(|term| concerns(term, &pod.metadata, &pod.metadata)) {
            found.wanted.clear();
        }
        found
    }

    /// Why the pod cannot be on this node.
    pub fn objection(&self, node: &Node) -> Option<&'static str> {
        let labels = labels(&node.metadata);
        let is_in = |rules: &BTreeSet<(String, String)>| {
            rules.iter().any(|(key, value)| labels.get(key).is_some_and(|have| have == value))
        };
        if is_in(&self.their_rules) {
            return Some("node(s) didn't satisfy existing pods anti-affinity rules");
        }
        let together =
            |(key, values): &(String, BTreeSet<String>)| labels.get(key).is_some_and(|have| values.contains(have));
        if !self.wanted.iter().all(together) {
            return Some("node(s) didn't match pod affinity rules");
        }
        is_in(&self.own_rules).then_some("node(s) didn't match pod anti-affinity rules")
    }
}

/// The topology domain that another pod is in, if it is anywhere and counts for this one.
fn domain(key: &str, other: &Pod, pod: &Pod, world: &World) -> Option<(String, String)> {
    if is_finished(other) || other.metadata.uid.is_some() && other.metadata.uid == pod.metadata.uid {
        return None;
    }
    let node = other.spec.as_ref()?.node_name.clone()?;
    let node = world.nodes.get(&Name::cluster(node))?;
    labels(&node.metadata).get(key).map(|value| (key.to_owned(), value.clone()))
}

/// The label that everything that a selector selects has, if it asks for one by its value.
fn needed(selector: &LabelSelector) -> impl Iterator<Item = String> {
    selector.match_labels.iter().flatten().map(|(key, value)| label(key, value))
}

/// A label as the world's indexes know it.
pub fn label(key: &str, value: &str) -> String {
    format!("{key}={value}")
}

/// Pods that a term may speak of: those with the rarest label that it asks for.
fn subjects<'a>(term: &PodAffinityTerm, world: &'a World) -> Box<dyn Iterator<Item = &'a Arc<Pod>> + 'a> {
    let labels = term.label_selector.as_ref().into_iter().flat_map(needed);
    match labels.min_by_key(|label| world.pods_labelled(label)) {
        Some(label) => Box::new(world.pods_with(&label)),
        None => Box::new(world.pods.iter()),
    }
}

/// What a pod's anti-affinity is indexed under: one label that each of its terms asks for; empty for a term that asks
/// for none.
pub fn repelled(pod: &Pod) -> impl Iterator<Item = String> {
    anti_affinity(pod)
        .iter()
        .filter_map(|term| term.label_selector.as_ref())
        .map(|selector| needed(selector).next().unwrap_or_default())
}

/// Pods that may keep away from this one.
fn objectors<'a>(pod: &Pod, world: &'a World) -> Vec<&'a Arc<Pod>> {
    let own = labels(&pod.metadata).iter().map(|(key, value)| label(key, value));
    own.chain([String::new()]).flat_map(|label| world.pods_repelling(&label).collect::<Vec<_>>()).collect()
}

fn affinity(pod: &Pod) -> &[PodAffinityTerm] {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
    affinity
        .and_then(|affinity| affinity.pod_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_deref())
        .unwrap_or_default()
}

fn anti_affinity(pod: &Pod) -> &[PodAffinityTerm] {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
    affinity
        .and_then(|affinity| affinity.pod_anti_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_deref())
        .unwrap_or_default()
}

/// Whether a term of `owner` speaks of `other`.
fn concerns(term: &PodAffinityTerm, owner: &ObjectMeta, other: &ObjectMeta) -> bool {
    let namespaces = term.namespaces.as_deref().unwrap_or_default();
    let other_namespace = other.namespace.clone().unwrap_or_default();
    // A namespace selector counts as "all namespaces".
    let in_scope = term.namespace_selector.is_some()
        || namespaces.contains(&other_namespace)
        || (namespaces.is_empty() && owner.namespace == other.namespace);
    in_scope && term.label_selector.as_ref().is_some_and(|selector| selector::matches(selector, labels(other)))
}
