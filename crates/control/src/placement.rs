//! Which node a pod goes to: the scheduler of the standalone mode.
//!
//! Filters and their messages are those of Kubernetes' scheduler, so that `kubectl describe pod` reads as its users expect.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, PodAffinityTerm, PodCondition, Taint, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

use crate::names;
use crate::object::{Name, Stored, labels};
use crate::plan::{Effect, EventType, Plan, SCHEDULER, View};
use crate::quantity;
use crate::selector;
use crate::volumes;
use crate::world::{World, claims_of};

/// Reason of `PodScheduled=False` while no node fits.
pub const UNSCHEDULABLE: &str = "Unschedulable";

/// Whether this pod waits for us to place it.
pub fn is_ours(pod: &Pod, scheduler_name: &str) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let asked_for = spec.scheduler_name.as_deref().unwrap_or("default-scheduler");
    spec.node_name.as_deref().unwrap_or_default().is_empty()
        && (asked_for == scheduler_name || asked_for.is_empty())
        && spec.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
        && !pod.deleting()
        && !is_finished(pod)
}

/// Whether all containers of the pod have ended for good.
pub fn is_finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// Decides about one pod.
pub fn decide(name: &Name, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let Some(pod) = view.world.pods.get(name) else { return plan };
    if !is_ours(pod, &view.settings.scheduler_name) {
        return plan;
    }
    match find_node(pod, view.world) {
        Ok(Choice { node, unbound }) => {
            let mut waiting = false;
            for claim in unbound {
                waiting = true;
                if claim.annotation(names::SELECTED_NODE) != Some(node.name()) {
                    let mut after = claim.as_ref().clone();
                    let annotations = after.metadata.annotations.get_or_insert_with(BTreeMap::new);
                    annotations.insert(names::SELECTED_NODE.to_owned(), node.name().to_owned());
                    plan.update(claim.as_ref(), &after);
                }
            }
            // With claims that wait for their first consumer, the volumes come first; their binding wakes this pod again.
            if !waiting {
                plan.push(Effect::Bind {
                    pod: pod.reference(),
                    uid: pod.uid().to_owned(),
                    node: node.name().to_owned(),
                });
                let message = format!("Successfully assigned {name} to {}", node.name());
                plan.record(pod.as_ref(), SCHEDULER, EventType::Normal, "Scheduled", message);
            }
        }
        Err(message) => {
            let mut after = pod.as_ref().clone();
            if set_unschedulable(&mut after, &message, view) {
                plan.update(pod.as_ref(), &after);
                plan.record(pod.as_ref(), SCHEDULER, EventType::Warning, "FailedScheduling", message);
            }
        }
    }
    plan
}

fn set_unschedulable(pod: &mut Pod, message: &str, view: &View<'_>) -> bool {
    let conditions = pod.status.get_or_insert_default().conditions.get_or_insert_default();
    let now = Some(Time(view.now));
    let known = conditions.iter_mut().find(|condition| condition.type_ == "PodScheduled");
    match known {
        Some(known) if known.status == "False" && known.message.as_deref() == Some(message) => return false,
        Some(known) => {
            if known.status != "False" {
                known.last_transition_time = now;
            }
            known.status = "False".to_owned();
            known.reason = Some(UNSCHEDULABLE.to_owned());
            known.message = Some(message.to_owned());
        }
        None => conditions.push(PodCondition {
            type_: "PodScheduled".to_owned(),
            status: "False".to_owned(),
            reason: Some(UNSCHEDULABLE.to_owned()),
            message: Some(message.to_owned()),
            last_transition_time: now,
            ..PodCondition::default()
        }),
    }
    true
}

/// A node that fits.
struct Choice {
    node: Arc<Node>,
    /// Claims of the pod that wait for their first consumer and are to be bound for this node first.
    unbound: Vec<Arc<k8s_openapi::api::core::v1::PersistentVolumeClaim>>,
}

fn find_node(pod: &Pod, world: &World) -> Result<Choice, String> {
    let total = world.nodes.iter().count();
    if total == 0 {
        return Err("no nodes available to schedule pods".to_owned());
    }
    let mut unbound = Vec::new();
    for claim in claims_of(pod) {
        let Some(found) = world.claims.get(&claim) else {
            return Err(format!("0/{total} nodes are available: persistentvolumeclaim \"{}\" not found.", claim.name));
        };
        if volumes::is_bound(found) {
            continue;
        }
        if !volumes::waits_for_consumer(found, world) {
            return Err(format!("0/{total} nodes are available: pod has unbound immediate PersistentVolumeClaims."));
        }
        unbound.push(found.clone());
    }

    let need = requests(pod);
    let neighbours = Neighbours::of(pod, world);
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let mut best: Option<(Rank, &Arc<Node>)> = None;
    for node in world.nodes.iter() {
        let load = Load::of(node, world);
        let against = objections(pod, &need, node, &load, &neighbours, world);
        if against.is_empty() {
            let rank = Rank::of(pod, node, &load, &need, &unbound);
            if best.as_ref().is_none_or(|(other, _)| rank < *other) {
                best = Some((rank, node));
            }
        }
        for reason in against {
            *reasons.entry(reason).or_default() += 1;
        }
    }
    match best {
        Some((_, node)) => Ok(Choice { node: node.clone(), unbound }),
        None => {
            let mut parts: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
            parts.sort();
            Err(format!("0/{total} nodes are available: {}.", parts.join(", ")))
        }
    }
}

/// Order of preference among nodes that fit; the least wins.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// The node that unbound claims have been promised to goes first, so that a decision taken twice is the same.
    breaks_promise: bool,
    /// VMs spread by number.
    launchers: usize,
    /// Thousandths of cpu and memory that would be asked for, summed.
    requested: i128,
    /// Pods that ask for nothing spread by number.
    pods: i128,
    name: String,
}

impl Rank {
    fn of(
        pod: &Pod,
        node: &Node,
        load: &Load,
        need: &Requests,
        unbound: &[Arc<k8s_openapi::api::core::v1::PersistentVolumeClaim>],
    ) -> Self {
        let share = |used: i128, of: i128| if of > 0 { used.saturating_mul(1_000) / of } else { 1_000 };
        let is_launcher = pod.label(names::LABEL_APP) == Some(names::APP_VIRT_LAUNCHER);
        Self {
            breaks_promise: unbound
                .iter()
                .filter_map(|claim| claim.annotation(names::SELECTED_NODE))
                .any(|promised| promised != node.name()),
            launchers: if is_launcher { load.launchers } else { 0 },
            requested: share(load.used.cpu_milli + need.cpu_milli, load.allocatable.cpu_milli)
                + share(load.used.memory + need.memory, load.allocatable.memory),
            pods: load.pods,
            name: node.name().to_owned(),
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Requests {
    cpu_milli: i128,
    memory: i128,
}

fn requests(pod: &Pod) -> Requests {
    let Some(spec) = &pod.spec else { return Requests::default() };
    let of = |container: &k8s_openapi::api::core::v1::Container| {
        let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
        Requests {
            cpu_milli: quantity::cpu_milli(requests.and_then(|all| all.get("cpu"))),
            memory: quantity::whole(requests.and_then(|all| all.get("memory"))),
        }
    };
    let mut sum = spec.containers.iter().map(of).fold(Requests::default(), |sum, one| Requests {
        cpu_milli: sum.cpu_milli + one.cpu_milli,
        memory: sum.memory + one.memory,
    });
    for one in spec.init_containers.iter().flatten().map(of) {
        sum.cpu_milli = sum.cpu_milli.max(one.cpu_milli);
        sum.memory = sum.memory.max(one.memory);
    }
    let overhead = spec.overhead.as_ref();
    sum.cpu_milli += quantity::cpu_milli(overhead.and_then(|all| all.get("cpu")));
    sum.memory += quantity::whole(overhead.and_then(|all| all.get("memory")));
    sum
}

/// What a node has and what its pods ask for.
struct Load {
    allocatable: Requests,
    max_pods: Option<i128>,
    used: Requests,
    pods: i128,
    launchers: usize,
}

impl Load {
    fn of(node: &Node, world: &World) -> Self {
        let status = node.status.as_ref();
        let has = status.and_then(|status| status.allocatable.as_ref().or(status.capacity.as_ref()));
        let mut load = Self {
            allocatable: Requests {
                cpu_milli: quantity::cpu_milli(has.and_then(|all| all.get("cpu"))),
                memory: quantity::whole(has.and_then(|all| all.get("memory"))),
            },
            max_pods: has.and_then(|all| all.get("pods")).and_then(|quantity| quantity::units(&quantity.0)),
            used: Requests::default(),
            pods: 0,
            launchers: 0,
        };
        for pod in world.pods_on(node.name()).filter(|pod| !is_finished(pod)) {
            let one = requests(pod);
            load.used.cpu_milli += one.cpu_milli;
            load.used.memory += one.memory;
            load.pods += 1;
            load.launchers += usize::from(pod.label(names::LABEL_APP) == Some(names::APP_VIRT_LAUNCHER));
        }
        load
    }
}

/// Why a pod cannot go to a node; the first kind of reason only, as Kubernetes' filters stop at the first that fails.
fn objections(
    pod: &Pod,
    need: &Requests,
    node: &Node,
    load: &Load,
    neighbours: &Neighbours,
    world: &World,
) -> Vec<String> {
    let one = |text: &str| vec![text.to_owned()];
    let Some(spec) = &pod.spec else { return one("node(s) cannot run a pod without a spec") };
    let node_spec = node.spec.as_ref();
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();

    let cordon = Taint { key: names::TAINT_UNSCHEDULABLE.into(), effect: "NoSchedule".into(), ..Taint::default() };
    if node_spec.and_then(|spec| spec.unschedulable).unwrap_or(false) && !tolerated(&cordon, tolerations) {
        return one("node(s) were unschedulable");
    }
    let taints = node_spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let hard = taints.iter().filter(|taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute"));
    if let Some(taint) = hard.into_iter().find(|taint| !tolerated(taint, tolerations)) {
        let value = taint.value.as_deref().unwrap_or_default();
        return vec![format!("node(s) had untolerated taint {{{}: {value}}}", taint.key)];
    }
    if !is_ready(node) {
        return one("node(s) were not ready");
    }
    let selector_holds =
        spec.node_selector.iter().flatten().all(|(key, value)| labels(&node.metadata).get(key) == Some(value));
    let affinity = spec.affinity.as_ref();
    let required = affinity
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    if !selector_holds || required.is_some_and(|required| !selector::node_matches(required, node)) {
        return one("node(s) didn't match Pod's node affinity/selector");
    }
    let mut short = Vec::new();
    if load.max_pods.is_some_and(|max| load.pods + 1 > max) {
        short.push("Too many pods".to_owned());
    }
    if need.cpu_milli > 0 && load.used.cpu_milli + need.cpu_milli > load.allocatable.cpu_milli {
        short.push("Insufficient cpu".to_owned());
    }
    if need.memory > 0 && load.used.memory + need.memory > load.allocatable.memory {
        short.push("Insufficient memory".to_owned());
    }
    if !short.is_empty() {
        return short;
    }
    for claim in claims_of(pod) {
        let volume = world
            .claims
            .get(&claim)
            .and_then(|claim| claim.spec.as_ref())
            .and_then(|spec| spec.volume_name.clone())
            .and_then(|volume| world.volumes.get(&Name::cluster(volume)));
        let required = volume
            .and_then(|volume| volume.spec.as_ref())
            .and_then(|spec| spec.node_affinity.as_ref())
            .and_then(|affinity| affinity.required.as_ref());
        if required.is_some_and(|required| !selector::node_matches(required, node)) {
            return one("node(s) had volume node affinity conflict");
        }
    }
    neighbours.objection(node).map(one).unwrap_or_default()
}

/// Whether the node says that it is ready.
pub fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn tolerated(taint: &Taint, tolerations: &[Toleration]) -> bool {
    tolerations.iter().any(|toleration| {
        let key = toleration.key.as_deref().unwrap_or_default();
        let effect = toleration.effect.as_deref().unwrap_or_default();
        let exists = toleration.operator.as_deref() == Some("Exists");
        let same_key = key == taint.key || (key.is_empty() && exists);
        let same_value = toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default();
        same_key && (effect.is_empty() || effect == taint.effect) && (exists || same_value)
    })
}

/// Topology domains that other pods rule out or that a pod must be in.
#[derive(Default)]
struct Neighbours {
    /// (topology key, value) where a pod is that this one keeps away from.
    own_rules: BTreeSet<(String, String)>,
    /// (topology key, value) where a pod is that keeps away from this one.
    their_rules: BTreeSet<(String, String)>,
    /// For each affinity term: topology key and the values where a match is.
    wanted: Vec<(String, BTreeSet<String>)>,
}

impl Neighbours {
    fn of(pod: &Pod, world: &World) -> Self {
        let mut found = Self::default();
        let own_anti = anti_affinity(pod);
        let own_affinity = affinity(pod);
        found.wanted = own_affinity.iter().map(|term| (term.topology_key.clone(), BTreeSet::new())).collect();
        for other in world.pods.iter() {
            let Some(node) = other.spec.as_ref().and_then(|spec| spec.node_name.clone()) else { continue };
            if is_finished(other) || other.metadata.uid == pod.metadata.uid {
                continue;
            }
            let Some(node) = world.nodes.get(&Name::cluster(node)) else { continue };
            let domain = |key: &str| labels(&node.metadata).get(key).map(|value| (key.to_owned(), value.clone()));
            for term in own_anti.iter().filter(|term| concerns(term, &pod.metadata, &other.metadata)) {
                found.own_rules.extend(domain(&term.topology_key));
            }
            for term in anti_affinity(other).iter().filter(|term| concerns(term, &other.metadata, &pod.metadata)) {
                found.their_rules.extend(domain(&term.topology_key));
            }
            for (term, (_, values)) in own_affinity.iter().zip(found.wanted.iter_mut()) {
                if concerns(term, &pod.metadata, &other.metadata) {
                    values.extend(domain(&term.topology_key).map(|(_, value)| value));
                }
            }
        }
        // The first of a group that wants to be together with its like may go anywhere.
        let alone = found.wanted.iter().all(|(_, values)| values.is_empty());
        if alone && own_affinity.iter().all(|term| concerns(term, &pod.metadata, &pod.metadata)) {
            found.wanted.clear();
        }
        found
    }

    fn objection(&self, node: &Node) -> Option<&'static str> {
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
    // Labels of namespaces are not watched: a namespace selector counts as "all namespaces".
    let in_scope = term.namespace_selector.is_some()
        || namespaces.contains(&other_namespace)
        || (namespaces.is_empty() && owner.namespace == other.namespace);
    in_scope && term.label_selector.as_ref().is_some_and(|selector| selector::matches(selector, labels(other)))
}
