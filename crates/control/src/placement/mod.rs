//! Which node a pod goes to: the scheduler of the standalone mode.
//!
//! Filters and their messages are those of Kubernetes' scheduler, so that `kubectl describe pod` reads as its users expect.

mod fit;
mod load;
mod neighbours;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use godwit_api::migration::NodeVerdict;
use k8s_openapi::api::core::v1::{Node, Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

pub(crate) use fit::repelling_taint;
pub use load::{Capacity, Load, Loads, Requests, requests};
pub(crate) use neighbours::{label, repelled};

use crate::names;
use crate::object::{Name, Stored};
use crate::plan::{Effect, EventType, Plan, SCHEDULER, View};
use crate::turns::{self, Slot};
use crate::world::World;
use fit::{Fit, Reason};

/// So many nodes are named that do not take a pod.
const MOST_VERDICTS: usize = 16;
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
    let world = view.world;
    let Some(pod) = world.pods.get(name).filter(|pod| is_ours(pod, &view.settings.scheduler_name)) else { return plan };
    let hold = Hold::of(pod, world);
    if matches!(hold, Hold::Missing) {
        // The pod of a migration that is over, or of one that an older controller began: the ledger is about to have it.
        return plan;
    }
    let sought = Fit::of(pod, world).and_then(|fit| {
        let coming = |node: &str| world.turns().coming(node);
        let found = fit.search(hold.prefers(), coming, |node| hold.is_full(node, world));
        match found.best {
            Some(node) => Ok((node, fit.unbound)),
            None => Err(nowhere(world.nodes.len(), &found.reasons)),
        }
    });
    match sought {
        Ok((node, unbound)) => {
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
                if let Hold::Slot(uid, slot) = hold
                    && !slot.targets().any(|target| target == node.name())
                {
                    // The node counts for the limit before the pod can be there.
                    let moved = BTreeMap::from([(uid.to_owned(), Some(slot.moved_to(node.name())))]);
                    plan.push(world.turns().ledger().write(&moved, world.installation()));
                }
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

/// That no node takes a pod, in Kubernetes' words.
fn nowhere(total: usize, reasons: &BTreeMap<Reason, usize>) -> String {
    let mut parts: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    parts.sort();
    format!("0/{total} nodes are available: {}.", parts.join(", "))
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

/// Where a migration's target pod could go now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Room {
    /// To this node.
    On(String),
    /// Only to nodes that are full; this is one of them.
    Full(String),
    /// To no node at all.
    Nowhere,
}

/// Where a target pod could go that is still to be made, when so many migrations are `coming` to a node and `limit` may.
pub fn room(pod: &Pod, world: &World, coming: impl Fn(&str) -> u32, limit: u32) -> Room {
    let Ok(fit) = Fit::of(pod, world) else { return Room::Nowhere };
    let found = fit.search(None, &coming, |node| coming(node) >= limit);
    match (found.best, found.full) {
        (Some(node), _) => Room::On(node.name().to_owned()),
        (None, Some(node)) => Room::Full(node.name().to_owned()),
        (None, None) => Room::Nowhere,
    }
}

/// Whether a node takes a pod that is still to be made.
pub fn takes(pod: &Pod, world: &World, node: &str) -> bool {
    let Some(node) = world.nodes.get(&Name::cluster(node)) else { return false };
    Fit::of(pod, world).is_ok_and(|fit| fit.verdict(node, false).is_none())
}

/// Why no node takes a pod that is still to be made, in Kubernetes' words.
pub fn explain(pod: &Pod, world: &World) -> String {
    match Fit::of(pod, world) {
        Ok(fit) => nowhere(world.nodes.len(), &fit.search(None, |_| 0, |_| false).reasons),
        Err(why) => why,
    }
}

/// The slot of the migration that a pod is the target of.
enum Hold<'a> {
    /// It is no target pod.
    Free,
    /// Its migration has no slot (yet, or any more).
    Missing,
    /// Its migration has this slot.
    Slot(&'a str, &'a Slot),
}

impl<'a> Hold<'a> {
    fn of(pod: &'a Pod, world: &'a World) -> Self {
        let Some(uid) = pod.label(names::LABEL_MIGRATION_JOB_UID) else { return Hold::Free };
        world.turns().ledger().slots.get(uid).map_or(Hold::Missing, |slot| Hold::Slot(uid, slot))
    }

    /// Whether a node may not take the pod because it receives enough.
    fn is_full(&self, node: &str, world: &World) -> bool {
        match self {
            Hold::Free => false,
            Hold::Slot(_, slot) if slot.targets().any(|target| target == node) => false,
            _ => world.turns().coming(node) >= turns::inbound_limit(world.configuration()),
        }
    }

    fn prefers(&self) -> Option<&'a str> {
        match self {
            Hold::Slot(_, slot) => slot.target.as_deref(),
            _ => None,
        }
    }
}

/// Why nodes do not take a pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdicts {
    /// How many nodes there are.
    pub looked_at: usize,
    /// Nodes and reasons; those that came nearest to taking it first.
    pub nodes: Vec<NodeVerdict>,
    /// How many more do not take it.
    pub more: usize,
}

/// Looks at every node on behalf of a pod, which need not exist yet, and says of the first few that do not take it why.
pub fn verdicts(pod: &Pod, view: &View<'_>) -> Verdicts {
    let world = view.world;
    let Ok(fit) = Fit::of(pod, world) else { return Verdicts::default() };
    let hold = Hold::of(pod, world);
    let mut against: Vec<(u8, &str, Vec<String>)> = world
        .nodes
        .iter()
        .filter_map(|node| {
            let why = fit.verdict(node, hold.is_full(node.name(), world))?;
            Some((why.stage, node.name(), why.reasons.into_iter().map(std::borrow::Cow::into_owned).collect()))
        })
        .collect();
    against.sort_by(|one, two| two.0.cmp(&one.0).then(one.1.cmp(two.1)));
    let more = against.len().saturating_sub(MOST_VERDICTS);
    let nodes = against.into_iter().take(MOST_VERDICTS);
    let nodes = nodes.map(|(_, node, reasons)| NodeVerdict { node_name: node.to_owned(), reasons }).collect();
    Verdicts { looked_at: world.nodes.len(), nodes, more }
}

/// Whether the node says that it is ready.
pub fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
