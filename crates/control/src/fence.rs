//! Nodes whose guests have ended: lost nodes.
//!
//! A handler that cannot renew its node's fence lease ends the node's guests (docs/fencing.md). So a node whose lease has not
//! been renewed for the lease's time and a margin runs none, and what is left of it in the API may go. The verdict is written
//! into the lease itself, on the revision that was heard last: a renewal that comes first makes it void, and a handler that comes later
//! finds it. The times that are written in a lease are those of the node's clock and count for nothing; what counts is when the
//! news of a renewal came.
//!
//! A handler may put its fence off while the other nodes that its lease names say that they have no contact to the API either.
//! So one of those must have been heard *steadily* all the while. That is also what makes a controller's own standstill, a jump of
//! its clock or a watch that is behind harmless: whoever has heard nobody for a while gives no verdict.

use std::sync::Arc;

use godwit_api::{Installation, VirtualMachineInstance};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use smol_str::SmolStr;

use crate::migration;
use crate::names::{self, events, fence};
use crate::object::{Kind, Name, Object, Ref, Stored};
use crate::placement;
use crate::plan::{Effect, EventType, NODE_CONTROLLER, Plan, View};
use crate::world::{Change, World, vmi_of_pod};

/// So long after a lease has run out its node's guests count as ended.
const MARGIN: SignedDuration = SignedDuration::from_secs(fence::MARGIN.as_secs().cast_signed());
/// No lease promises less: a handler puts its fence off by its own times, whatever is written there.
const DURATION: SignedDuration = SignedDuration::from_secs(fence::DURATION.as_secs().cast_signed());
/// A node is heard steadily while its renewals are no further apart.
const STEADY: SignedDuration = SignedDuration::from_secs(fence::STEADY_GAP.as_secs().cast_signed());

/// When a node's renewals were heard, by the clock of whoever keeps the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// The last one.
    pub last: Timestamp,
    /// Since when the node has been heard steadily. It is in the future where a row of renewals has just begun: only the second
    /// one, which carries the revision of the first, shows that the node gets answers.
    pub steady_since: Timestamp,
}

impl Heard {
    /// What is known after a renewal at this time.
    pub fn again(before: Option<Self>, now: Timestamp) -> Self {
        let row = before.filter(|before| before.last <= now && now.duration_since(before.last) <= STEADY);
        Self { last: now, steady_since: row.map_or(now + STEADY, |row| row.steady_since) }
    }

    /// Whether a row of renewals has just begun with the last one.
    fn begins(&self) -> bool {
        self.steady_since > self.last
    }
}

/// The node that a lease is the fence of.
pub fn node_of<'a>(lease: &'a Lease, installation: &Installation) -> Option<&'a str> {
    (lease.namespace() == installation.namespace()).then(|| lease.name().strip_prefix(fence::LEASE_PREFIX))?
}

/// The name of a node's fence lease.
fn lease_name(node: &str) -> String {
    format!("{}{node}", fence::LEASE_PREFIX)
}

/// The fence lease of a node.
pub fn lease_of<'a>(node: &str, world: &'a World) -> Option<&'a Arc<Lease>> {
    world.leases.get(&Name::new(world.installation().namespace(), lease_name(node)))
}

/// How long the guests may run after a renewal; `None` when the lease promises nothing.
fn promised(lease: &Lease) -> Option<SignedDuration> {
    let seconds = lease.spec.as_ref()?.lease_duration_seconds.filter(|seconds| *seconds > 0)?;
    renewed(lease).map(|_| SignedDuration::from_secs(i64::from(seconds)).max(DURATION))
}

/// When the lease was renewed, by its node's clock, as it is spelled there.
fn renewed(lease: &Lease) -> Option<String> {
    let time = lease.spec.as_ref()?.renew_time.as_ref()?.0;
    Some(format!("{time:.6}"))
}

/// Whether a lease says that its node is lost: the mark of the last renewal is there.
pub fn says_lost(lease: &Lease) -> bool {
    promised(lease).is_some() && lease.annotation(names::ANNOTATION_NODE_LOST).map(str::to_owned) == renewed(lease)
}

/// Whether the node's guests are known to have ended.
pub fn is_lost(node: &str, world: &World) -> bool {
    lease_of(node, world).is_some_and(|lease| says_lost(lease))
}

/// Whether the node's lease had run out when the last news came: its handler ends guests instead of starting them.
pub fn has_lapsed(node: &str, world: &World) -> bool {
    let Some(lease) = lease_of(node, world) else { return false };
    let heard = world.fence_heard(node).zip(promised(lease));
    says_lost(lease) || heard.is_some_and(|(heard, promised)| world.clock().duration_since(heard.last) >= promised)
}

/// The node that has renewed its fence lease with a change.
pub fn renewal(change: &Change, installation: &Installation) -> Option<SmolStr> {
    let Some(Object::Lease(after)) = &change.after else { return None };
    let node = node_of(after, installation)?;
    let before = match &change.before {
        Some(Object::Lease(before)) => renewed(before),
        _ => None,
    };
    (renewed(after).is_some() && renewed(after) != before).then(|| SmolStr::new(node))
}

/// Whether a change of a fence lease asks for a decision. A renewal of a node that is not lost does not: the decision before
/// has asked to be woken when the lease would have run out, and that is soon enough to find that it has not.
pub fn is_told_by(before: Option<&Lease>, after: Option<&Lease>) -> bool {
    let said = |lease: Option<&Lease>| lease.map(|lease| (promised(lease), says_lost(lease)));
    said(before) != said(after)
}

/// Whether pods may go to the node that could not before.
pub fn makes_room(before: Option<&Lease>, node: &str, world: &World) -> bool {
    before.is_some() && world.fence_heard(node).is_some_and(|heard| heard.begins())
}

/// Decides about one node.
pub fn decide(node: &str, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let Some(lease) = lease_of(node, view.world) else { return plan };
    if says_lost(lease) {
        clear(node, lease, view.world, &mut plan);
        return plan;
    }
    let Some((heard, promised)) = view.world.fence_heard(node).zip(promised(lease)) else { return plan };
    let end = heard.last + promised + MARGIN;
    if view.now < end {
        plan.wake(end);
        return plan;
    }
    match witnessed(node, lease, promised + MARGIN, view) {
        Ok(()) => {
            let mut after = lease.as_ref().clone();
            let annotations = after.metadata.annotations.get_or_insert_default();
            annotations.insert(names::ANNOTATION_NODE_LOST.to_owned(), renewed(lease).unwrap_or_default());
            plan.update(lease.as_ref(), &after);
            if let Some(node) = view.world.nodes.get(&Name::cluster(node)) {
                let text = events::node_lost((promised + MARGIN).as_secs());
                let reason = events::reason::NODE_UNRESPONSIVE;
                plan.record(node.as_ref(), NODE_CONTROLLER, EventType::Warning, reason, text);
            }
        }
        Err(again) => plan.wake(again),
    }
    plan
}

/// The nodes without whose word a handler does not put its fence off.
fn peers(lease: &Lease) -> impl Iterator<Item = &str> {
    let named = lease.annotation(names::ANNOTATION_FENCE_PEERS).unwrap_or_default();
    named.split(',').map(str::trim).filter(|peer| !peer.is_empty())
}

/// Whether another node has been heard steadily for so long: one that the lease names if it names any. If not, when that may be.
fn witnessed(node: &str, lease: &Lease, window: SignedDuration, view: &View<'_>) -> Result<(), Timestamp> {
    let mut again = view.now + STEADY;
    let mut look = |other: &str| {
        let heard = view.world.fence_heard(other).filter(|_| other != node)?;
        if heard.last > view.now || view.now.duration_since(heard.last) > STEADY {
            return None;
        }
        let end = heard.steady_since + window;
        again = again.min(end.max(view.now));
        (view.now >= end).then_some(())
    };
    let found = match peers(lease).next() {
        Some(_) => peers(lease).find_map(&mut look),
        None => view.world.fenced_nodes().find_map(|other| look(other)),
    };
    found.ok_or(again)
}

/// What the API still has of a lost node's guests goes: nobody else will say that it has ended.
fn clear(node: &str, lease: &Lease, world: &World, plan: &mut Plan) {
    let left = world.pods_on(node).filter(|pod| {
        is_guests(pod) && (pod.deleting() || !placement::is_finished(pod)) && !may_still_serve(pod, world)
    });
    let deletions: Vec<Effect> = left
        .map(|pod| Effect::Delete { target: pod.reference(), uid: pod.uid().to_owned(), grace_seconds: Some(0) })
        .collect();
    if deletions.is_empty() {
        return;
    }
    // A handler that has renewed meanwhile has swept its node itself, and may have got new pods.
    let target = Ref::new(Kind::Lease, lease.key());
    plan.push(Effect::Confirm { target, revision: lease.metadata.resource_version.clone() });
    plan.effects.extend(deletions);
}

/// Whether a pod holds a guest, or a guest's disks. What else runs on a node nobody has fenced.
fn is_guests(pod: &Pod) -> bool {
    matches!(pod.label(names::LABEL_APP), Some(names::APP_VIRT_LAUNCHER | names::APP_HOTPLUG_DISK))
}

/// Whether the guest of a pod runs elsewhere by now, and may still get memory from here: the fence ends guests, and not a source whose
/// guest has left. A broken link says that it does not get any.
fn may_still_serve(pod: &Pod, world: &World) -> bool {
    let vmi = vmi_of_pod(pod).and_then(|vmi| world.vmis.get(&vmi)).filter(|vmi| vmi.has_arrived() && !vmi.is_final());
    let Some(vmi) = vmi.filter(|vmi| !vmi.is_deleting()) else { return false };
    let state = vmi.status.migration_state.as_ref().filter(|state| migration::is_unresolved(state));
    state.is_some_and(|state| state.source_pod.as_deref() == Some(pod.name())) && !migration::is_link_broken(vmi)
}

/// The lost node that a VMI's guest came from, if it may still get memory from there.
pub fn lost_source<'a>(vmi: &'a VirtualMachineInstance, world: &World) -> Option<&'a str> {
    let state = vmi.status.migration_state.as_ref().filter(|_| vmi.has_arrived())?;
    state.source_node.as_deref().filter(|node| is_lost(node, world))
}

/// Why a guest on a node that cannot be reached is not given up yet.
pub fn waits_for(node: &str, pod: &str, world: &World) -> String {
    let lease = lease_name(node);
    let found = lease_of(node, world).filter(|lease| promised(lease).is_some());
    let why = match found {
        None => format!(
            "its virt-handler has promised nothing about its guests (there is no Lease {}/{lease}), so this one may still run",
            world.installation().namespace()
        ),
        Some(lease) => match peers(lease).next() {
            Some(names::FENCE_NO_PEERS) => {
                "its virt-handler knows of no other node, so its guests run on for as long as it does not reach the API server"
                    .to_owned()
            }
            None => "no other node is heard that shows that this is not the controllers' own fault".to_owned(),
            Some(_) => format!(
                "its guests run on while none of the nodes {} reaches the API server, and none has been heard for long enough",
                peers(lease).collect::<Vec<_>>().join(", ")
            ),
        },
    };
    format!(
        "Node {node} cannot be reached, and {why}. It is started elsewhere when that changes, or when somebody who knows that \
         the node is down deletes the pod {pod} by force."
    )
}
