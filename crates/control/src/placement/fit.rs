//! Which nodes a pod fits on, why not on the others, and which it fits on best.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, NodeSelector, PersistentVolumeClaim, Pod, PodSpec, Taint, Toleration};

use super::is_ready;
use super::load::{Requests, requests};
use super::neighbours::Neighbours;
use crate::fence;
use crate::maintenance;
use crate::names;
use crate::object::{Name, Stored, labels};
use crate::selector;
use crate::volumes;
use crate::world::{World, claims_of};

/// In clusters up to this size every node is looked at.
const ALL_NODES: usize = 100;
/// Why a node that could take a migration's target does not take it now.
const RECEIVES_ENOUGH: &str = "node(s) receive as many migrations as they may (parallelInboundMigrationsPerNode)";

/// Why a guest does not go where a maintenance has begun.
const TO_BE_EMPTY: &str = "node(s) are to be empty (NodeMaintenance)";

/// A reason in Kubernetes' words.
pub type Reason = Cow<'static, str>;

/// Why a pod cannot go to a node.
pub struct Objections {
    /// How far the node came: filters are tried in a fixed order, and the first that fails ends them.
    pub stage: u8,
    /// The reasons of that filter.
    pub reasons: Vec<Reason>,
}

/// A pod that seeks a node, with all that counts for every node gathered once.
pub struct Fit<'a> {
    pod: &'a Pod,
    spec: &'a PodSpec,
    world: &'a World,
    need: Requests,
    neighbours: Neighbours,
    /// Where the pod's volumes can be reached.
    volumes: Vec<&'a NodeSelector>,
    tolerates_cordon: bool,
    is_launcher: bool,
    /// Nodes that are to be empty, closed or not.
    emptied: BTreeSet<&'a str>,
    /// Claims of the pod that wait for their first consumer and are to be bound for its node first.
    pub unbound: Vec<Arc<PersistentVolumeClaim>>,
}

/// What a search has found.
pub struct Found<'a> {
    /// The best node among those looked at.
    pub best: Option<&'a Arc<Node>>,
    /// A node that would fit if it did not receive enough already.
    pub full: Option<&'a Arc<Node>>,
    /// How many nodes have which reason; complete when there is no best.
    pub reasons: BTreeMap<Reason, usize>,
}

impl<'a> Fit<'a> {
    /// Gathers what counts. An error is why no node at all can take the pod.
    pub fn of(pod: &'a Pod, world: &'a World) -> Result<Self, String> {
        let total = world.nodes.len();
        let Some(spec) = pod.spec.as_ref().filter(|_| total > 0) else {
            return Err("no nodes available to schedule pods".to_owned());
        };
        let (mut unbound, mut reach) = (Vec::new(), Vec::new());
        for claim in claims_of(pod) {
            let Some(found) = world.claims.get(&claim) else {
                return Err(format!(
                    "0/{total} nodes are available: persistentvolumeclaim \"{}\" not found.",
                    claim.name
                ));
            };
            let volume = found.spec.as_ref().and_then(|spec| spec.volume_name.clone());
            let volume = volume.and_then(|volume| world.volumes.get(&Name::cluster(volume)));
            let affinity = volume.and_then(|volume| volume.spec.as_ref()).and_then(|spec| spec.node_affinity.as_ref());
            reach.extend(affinity.and_then(|affinity| affinity.required.as_ref()));
            if volumes::is_bound(found) {
                continue;
            }
            if !volumes::waits_for_consumer(found, world) {
                return Err(format!(
                    "0/{total} nodes are available: pod has unbound immediate PersistentVolumeClaims."
                ));
            }
            unbound.push(found.clone());
        }
        let cordon = Taint { key: names::TAINT_UNSCHEDULABLE.into(), effect: "NoSchedule".into(), ..Taint::default() };
        Ok(Self {
            pod,
            spec,
            world,
            need: requests(pod),
            neighbours: Neighbours::of(pod, world),
            volumes: reach,
            tolerates_cordon: tolerated(&cordon, spec.tolerations.as_deref().unwrap_or_default()),
            is_launcher: pod.label(names::LABEL_APP) == Some(names::APP_VIRT_LAUNCHER),
            emptied: maintenance::nodes(world).collect(),
            unbound,
        })
    }

    /// Looks for the best node, leaving out those that are full; `prefer` wins if it fits. In a large cluster only a part
    /// of those that fit is compared, as Kubernetes' scheduler does it: half of them, and fewer the larger the cluster is,
    /// down to a twentieth. Where the search begins depends on the pod.
    /// `coming` says how many migrations go to a node already.
    pub fn search(
        &self,
        prefer: Option<&str>,
        coming: impl Fn(&str) -> u32,
        is_full: impl Fn(&str) -> bool,
    ) -> Found<'a> {
        let nodes = &self.world.nodes;
        let mut found = Found { best: None, full: None, reasons: BTreeMap::new() };
        if let Some(node) = prefer.or_else(|| self.favourite()).and_then(|name| nodes.get(&Name::cluster(name)))
            && !is_full(node.name())
            && !self.breaks_promise(node)
            && self.objections(node).is_none()
        {
            found.best = Some(node);
            return found;
        }
        let total = nodes.len();
        let (enough, start) = if total <= ALL_NODES {
            (total, 0)
        } else {
            let percent = (50_usize.saturating_sub(total / 125)).max(5);
            ((total * percent / 100).max(ALL_NODES), self.start(total))
        };
        let mut best: Option<(Rank<'_>, &Arc<Node>)> = None;
        let mut fitting = 0;
        for node in nodes.iter().skip(start).chain(nodes.iter().take(start)) {
            if let Some(against) = self.objections(node) {
                for reason in against.reasons {
                    *found.reasons.entry(reason).or_default() += 1;
                }
                continue;
            }
            if is_full(node.name()) {
                found.full.get_or_insert(node);
                *found.reasons.entry(RECEIVES_ENOUGH.into()).or_default() += 1;
                continue;
            }
            let rank = self.rank(node, coming(node.name()));
            if best.as_ref().is_none_or(|(other, _)| rank < *other) {
                best = Some((rank, node));
            }
            fitting += 1;
            if fitting >= enough {
                break;
            }
        }
        found.best = best.map(|(_, node)| node);
        found
    }

    /// The one node that the pod would like best, if it says so by name with the highest weight.
    fn favourite(&self) -> Option<&'a str> {
        let affinity = self.spec.affinity.as_ref()?.node_affinity.as_ref()?;
        let terms = affinity.preferred_during_scheduling_ignored_during_execution.as_ref()?;
        terms.iter().filter(|term| term.weight == 100).find_map(|term| {
            match term.preference.match_expressions.as_deref()? {
                [only] if only.key == names::HOSTNAME && only.operator == "In" => match only.values.as_deref()? {
                    [node] => Some(node.as_str()),
                    _ => None,
                },
                _ => None,
            }
        })
    }

    /// Where the search begins: anywhere, but for the same pod always at the same node.
    fn start(&self, total: usize) -> usize {
        // FNV-1a: all that is asked of it is to differ from pod to pod.
        let name = self.pod.namespace().bytes().chain(self.pod.name().bytes());
        let hash =
            name.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        usize::try_from(hash % u64::try_from(total.max(1)).unwrap_or(1)).unwrap_or(0)
    }

    /// Why the node is not for the pod, but for receiving enough; `full` says whether it does.
    pub fn verdict(&self, node: &Node, full: bool) -> Option<Objections> {
        self.objections(node).or_else(|| full.then(|| Objections { stage: 9, reasons: vec![RECEIVES_ENOUGH.into()] }))
    }

    /// Why the pod cannot go to a node.
    fn objections(&self, node: &Node) -> Option<Objections> {
        let one = |stage, reason: Reason| Some(Objections { stage, reasons: vec![reason] });
        let node_spec = node.spec.as_ref();
        if node_spec.and_then(|spec| spec.unschedulable).unwrap_or(false) && !self.tolerates_cordon {
            return one(1, "node(s) were unschedulable".into());
        }
        // Before it is closed, and whatever the guest tolerates: it would have to leave at once.
        if self.is_launcher && self.emptied.contains(node.name()) {
            return one(1, TO_BE_EMPTY.into());
        }
        let tolerations = self.spec.tolerations.as_deref().unwrap_or_default();
        if let Some(taint) = repelling_taint(node, tolerations) {
            let value = taint.value.as_deref().unwrap_or_default();
            return one(2, format!("node(s) had untolerated taint {{{}: {value}}}", taint.key).into());
        }
        if !is_ready(node) {
            return one(3, "node(s) were not ready".into());
        }
        if self.is_launcher && fence::has_lapsed(node.name(), self.world) {
            return one(3, "node(s) had a virt-handler that is not heard".into());
        }
        let have = labels(&node.metadata);
        let selector_holds = self.spec.node_selector.iter().flatten().all(|(key, value)| have.get(key) == Some(value));
        let required = self
            .spec
            .affinity
            .as_ref()
            .and_then(|affinity| affinity.node_affinity.as_ref())
            .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
        if !selector_holds || required.is_some_and(|required| !selector::node_matches(required, node)) {
            return one(4, "node(s) didn't match Pod's node affinity/selector".into());
        }
        let (load, has) = (self.world.loads().of(node.name()), self.world.loads().capacity(node.name()));
        let mut short: Vec<Reason> = Vec::new();
        if has.max_pods.is_some_and(|max| load.pods + 1 > max) {
            short.push("Too many pods".into());
        }
        if self.need.cpu_milli > 0 && load.used.cpu_milli + self.need.cpu_milli > has.allocatable.cpu_milli {
            short.push("Insufficient cpu".into());
        }
        if self.need.memory > 0 && load.used.memory + self.need.memory > has.allocatable.memory {
            short.push("Insufficient memory".into());
        }
        if !short.is_empty() {
            return Some(Objections { stage: 6, reasons: short });
        }
        if self.volumes.iter().any(|required| !selector::node_matches(required, node)) {
            return one(7, "node(s) had volume node affinity conflict".into());
        }
        self.neighbours.objection(node).and_then(|reason| one(5, reason.into()))
    }

    /// Whether unbound claims have been promised to another node.
    fn breaks_promise(&self, node: &Node) -> bool {
        let promised = self.unbound.iter().filter_map(|claim| claim.annotation(names::SELECTED_NODE));
        promised.into_iter().any(|promised| promised != node.name())
    }

    fn rank(&self, node: &'a Node, coming: u32) -> Rank<'a> {
        let share = |used: i128, of: i128| if of > 0 { used.saturating_mul(1_000) / of } else { 1_000 };
        let (load, has) = (self.world.loads().of(node.name()), self.world.loads().capacity(node.name()));
        let launchers = load.launchers + i128::from(coming);
        Rank {
            breaks_promise: self.breaks_promise(node),
            launchers: if self.is_launcher { launchers } else { 0 },
            requested: share(load.used.cpu_milli + self.need.cpu_milli, has.allocatable.cpu_milli)
                + share(load.used.memory + self.need.memory, has.allocatable.memory),
            pods: load.pods,
            name: node.name(),
        }
    }
}

/// Order of preference among nodes that fit; the least wins.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Rank<'a> {
    /// The node that unbound claims have been promised to goes first, so that a decision taken twice is the same.
    breaks_promise: bool,
    /// VMs spread by number; those that are on their way count as well.
    launchers: i128,
    /// Thousandths of cpu and memory that would be asked for, summed.
    requested: i128,
    /// Pods that ask for nothing spread by number.
    pods: i128,
    name: &'a str,
}

/// A taint of the node that keeps off pods with these tolerations.
pub(crate) fn repelling_taint<'a>(node: &'a Node, tolerations: &[Toleration]) -> Option<&'a Taint> {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let mut hard = taints.iter().filter(|taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute"));
    hard.find(|taint| !tolerated(taint, tolerations))
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
