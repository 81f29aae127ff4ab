//! NodeMaintenances: a node is closed and emptied, and kept empty until the object goes or fails.
//!
//! The order of things is the reference's (`reference/maintenance-hypershift.md`, 1.4): finalizer, lease, then label, taints
//! and cordon ([`marks`]), then the eviction of the node's pods ([`drain`]). Where it differs: what the node had before is left
//! as it was, pods that come later are evicted as well, and the lease is renewed. A VMI that shall live on is moved by its
//! [evacuation](crate::evacuation), which its eviction asks for.

mod drain;
mod lease;
mod marks;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use godwit_api::VirtualMachineInstance;
use godwit_api::maintenance::{
    Maintenance, MaintenancePhase as Phase, NodeMaintenanceSpec, NodeMaintenanceStatus, OnDeadline,
};
use godwit_api::names::events::{COMPONENT_MAINTENANCE, maintenance as told};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use smol_str::SmolStr;

use crate::key::Key;
use crate::names;
use crate::object::{Kind, Name, Object, Stored};
use crate::plan::{EventType, Plan, View};
use crate::world::{Change, World};

/// Between two attempts at what was refused (the reference's).
pub(crate) const AGAIN: SignedDuration = SignedDuration::from_secs(5);
/// After so many attempts in a row to have the node's lease it is given up (the reference's).
const LEASE_ATTEMPTS: i32 = 3;
/// The plan of a dry run is made anew after so long: it costs too much to follow each piece of news.
const FORESEE_AGAIN: SignedDuration = SignedDuration::from_secs(30);
/// Holds a NodeMaintenance until what it has done is taken back (the reference's).
pub const FINALIZER: &str = "foregroundDeleteNodeMaintenance";
/// The kinds of NodeMaintenances, one a group.
pub const KINDS: [Kind; 3] = [Kind::NodeMaintenance, Kind::KubeVirtNodeMaintenance, Kind::OldestNodeMaintenance];

/// A NodeMaintenance of any group.
#[derive(Clone, Copy)]
pub struct Held<'a> {
    /// Which of the kinds.
    pub kind: Kind,
    /// Its metadata.
    pub meta: &'a ObjectMeta,
    /// What is asked for.
    pub spec: &'a NodeMaintenanceSpec,
    /// How far it is.
    pub status: &'a NodeMaintenanceStatus,
}

impl Held<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        self.meta.name.as_deref().unwrap_or_default()
    }

    fn key(&self) -> Key {
        Key::Maintenance(self.kind, SmolStr::new(self.name()))
    }

    /// Whether it keeps pods off its node: it is meant, and has neither ended nor failed.
    pub fn is_in_force(&self) -> bool {
        self.meta.deletion_timestamp.is_none() && !self.is_dry() && self.status.phase != Phase::Failed
    }

    fn is_dry(&self) -> bool {
        self.spec.dry_run == Some(true)
    }

    /// Which of several counts: the oldest.
    fn age(&self) -> (Option<Timestamp>, Kind, &str) {
        (self.meta.creation_timestamp.as_ref().map(|time| time.0), self.kind, self.name())
    }
}

fn held<'a, T: Maintenance + Stored>(one: &'a Arc<T>) -> Held<'a> {
    Held { kind: T::KIND, meta: Maintenance::meta(one.as_ref()), spec: one.spec(), status: one.status() }
}

/// All NodeMaintenances.
pub fn every(world: &World) -> impl Iterator<Item = Held<'_>> {
    let medik8s = world.maintenances.iter().map(held);
    medik8s.chain(world.kubevirt_maintenances.iter().map(held)).chain(world.oldest_maintenances.iter().map(held))
}

/// Those of a node.
fn of_node<'a>(node: &'a str, world: &'a World) -> impl Iterator<Item = Held<'a>> {
    every(world).filter(move |one| one.spec.node_name == node)
}

/// The maintenance in charge of a node, if there is one.
pub fn of<'a>(node: &'a str, world: &'a World) -> Option<Held<'a>> {
    of_node(node, world).filter(Held::is_in_force).min_by(|one, other| one.age().cmp(&other.age()))
}

/// Nodes that are to be empty, whether or not they are closed by now.
pub fn nodes(world: &World) -> impl Iterator<Item = &str> {
    every(world).filter(Held::is_in_force).map(|one| one.spec.node_name.as_str())
}

/// The NodeMaintenance that an object is.
pub fn of_object(object: &Object) -> Option<Held<'_>> {
    match object {
        Object::NodeMaintenance(one) => Some(held(one)),
        Object::KubeVirtNodeMaintenance(one) => Some(held(one)),
        Object::OldestNodeMaintenance(one) => Some(held(one)),
        _ => None,
    }
}

/// The node of a NodeMaintenance.
pub fn node_of(object: &Object) -> Option<&str> {
    of_object(object).map(|one| one.spec.node_name.as_str())
}

/// Whether the maintenance of a node does not let this VM leave yet (`maxParallel`).
pub fn holds_back(vmi: &VirtualMachineInstance, node: &str, world: &World) -> bool {
    of(node, world)
        .is_some_and(|one| one.spec.max_parallel.is_some() && !one.status.leaving.contains(&vmi.key().to_string()))
}

/// Everything there is to decide about.
pub fn all(world: &World) -> impl Iterator<Item = Key> {
    every(world).map(|one| one.key())
}

/// The maintenances that a change touches.
pub fn affected(change: &Change, world: &World) -> Vec<Key> {
    if let Some(one) = change.latest().and_then(of_object) {
        return of_node(&one.spec.node_name, world).map(|one| one.key()).chain([one.key()]).collect();
    }
    if every(world).next().is_none() {
        return Vec::new();
    }
    let nodes = change.sides().filter_map(|object| match object {
        Object::Pod(pod) => pod.spec.as_ref()?.node_name.as_deref(),
        Object::Node(node) => Some(Stored::name(node.as_ref())),
        Object::Lease(lease) => lease::node_of(lease),
        Object::VirtualMachineInstance(vmi) => vmi.status.node_name.as_deref(),
        Object::Migration(migration) => {
            let vmi = world.vmis.get(&Name::new(migration.namespace(), migration.vmi_name()))?;
            vmi.status.node_name.as_deref()
        }
        _ => None,
    });
    nodes.flat_map(|node| of_node(node, world)).map(|one| one.key()).collect()
}

/// From when on what was done to a node is nobody's any more, and to be taken back ([`release`]).
pub fn orphaned_from(node: &Node, world: &World) -> Option<Timestamp> {
    marks::orphaned_from(node, world)
}

/// Whether a maintenance has done something to the node, as far as itself says.
pub fn is_closure(node: &Node) -> bool {
    node.annotation(names::ANNOTATION_MAINTENANCE).is_some()
}

/// Decides whether what was done to a node is to be taken back.
pub fn decide_closure(node: &str, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let node = view.world.nodes.get(&Name::cluster(node)).filter(|node| !node.deleting());
    let Some((node, from)) = node.and_then(|node| Some((node, orphaned_from(node, view.world)?))) else { return plan };
    if view.now >= from {
        return release(node, view);
    }
    plan.wake(from);
    plan
}

/// Takes back what a maintenance that does not exist any more has done to a node.
fn release(node: &Arc<Node>, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let after = marks::clear(node, &mut plan);
    drain::call_off(&after, view.world, &mut plan);
    plan
}

/// Whether a change of a NodeMaintenance changes where pods may go.
pub fn changes_room(change: &Change) -> bool {
    let of = |side: &Option<Object>| side.as_ref().and_then(of_object).is_some_and(|one| one.is_in_force());
    of(&change.before) != of(&change.after)
}

/// Whether a change of a NodeMaintenance changes whose turn it is to leave ([`holds_back`]).
pub fn changes_turns(change: &Change) -> bool {
    let of = |side: &Option<Object>| {
        let one = side.as_ref().and_then(of_object).filter(Held::is_in_force)?;
        Some((one.spec.node_name.clone(), one.spec.max_parallel, one.status.leaving.clone()))
    };
    of(&change.before) != of(&change.after)
}

/// Decides about one NodeMaintenance.
pub fn decide(kind: Kind, name: &str, view: &View<'_>) -> Plan {
    let name = Name::cluster(name);
    match kind {
        Kind::NodeMaintenance => view.world.maintenances.get(&name).map(|one| decide_on(one, view)),
        Kind::KubeVirtNodeMaintenance => view.world.kubevirt_maintenances.get(&name).map(|one| decide_on(one, view)),
        Kind::OldestNodeMaintenance => view.world.oldest_maintenances.get(&name).map(|one| decide_on(one, view)),
        _ => None,
    }
    .unwrap_or_default()
}

/// A decision under way.
struct Work<'a> {
    /// The object as it is.
    one: Held<'a>,
    view: &'a View<'a>,
    /// What the object is to be.
    meta: ObjectMeta,
    status: NodeMaintenanceStatus,
    /// Written before the object itself, and after it.
    first: Plan,
    then: Plan,
    /// Told of the object when all is written.
    events: Vec<(EventType, (&'static str, &'static str))>,
}

fn decide_on<T: Maintenance + Stored>(object: &Arc<T>, view: &View<'_>) -> Plan {
    let one = held(object);
    let mut work = Work {
        one,
        view,
        meta: one.meta.clone(),
        status: one.status.clone(),
        first: Plan::nothing(),
        then: Plan::nothing(),
        events: Vec::new(),
    };
    work.decide();
    let Work { meta, mut status, first: mut plan, mut then, events, .. } = work;
    if status != *one.status {
        status.last_update = Some(Time(view.now));
    }
    let mut after = object.as_ref().clone();
    after.set(meta, status);
    plan.update(object.as_ref(), &after);
    for (type_, (reason, message)) in events {
        plan.record(object.as_ref(), COMPONENT_MAINTENANCE, type_, reason, message);
    }
    plan.effects.append(&mut then.effects);
    if let Some(at) = then.wake_at {
        plan.wake(at);
    }
    plan
}

impl<'a> Work<'a> {
    fn decide(&mut self) {
        let Self { one, view, .. } = *self;
        let ours = one.meta.finalizers.iter().flatten().any(|known| known == FINALIZER);
        if one.meta.deletion_timestamp.is_some() {
            if ours {
                self.end();
                // It goes with its finalizer: a write to its status would find nothing, and end the plan.
                self.status = one.status.clone();
                if let Some(finalizers) = &mut self.meta.finalizers {
                    finalizers.retain(|known| known != FINALIZER);
                }
                self.events.push((EventType::Normal, told::REMOVED));
            }
            return;
        }
        if one.is_dry() {
            return self.foresee();
        }
        self.status.plan = None;
        if one.status.phase == Phase::Failed {
            return self.end();
        }
        if let Some(rival) = of(&one.spec.node_name, view.world).filter(|rival| rival.age() != one.age()) {
            let text = format!("{} is in the maintenance {} already", one.spec.node_name, rival.name());
            self.status.last_error = Some(text);
            return;
        }
        let node = view.world.nodes.get(&Name::cluster(one.spec.node_name.as_str()));
        if !ours {
            return self.begin(node);
        }
        let Some(node) = node else {
            return self.fail(format!("nodes \"{}\" not found", one.spec.node_name));
        };
        if one.status.error_on_lease_count.unwrap_or(0) > LEASE_ATTEMPTS {
            let text = format!("maintenance failed: lease could not be extended after {LEASE_ATTEMPTS} attempts");
            return self.fail(text);
        }
        if self.is_over_time(node) {
            return;
        }
        if lease::hold(self, node) {
            self.empty(node);
        }
    }

    /// The first pass: what is done from now on will be taken back.
    fn begin(&mut self, node: Option<&Arc<Node>>) {
        let Self { one, view, .. } = *self;
        self.meta.finalizers.get_or_insert_default().push(FINALIZER.to_owned());
        if let Some(node) = node {
            let owners = self.meta.owner_references.get_or_insert_default();
            owners.retain(|owner| owner.kind != "Node");
            owners.push(OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Node".to_owned(),
                name: Stored::name(node.as_ref()).to_owned(),
                uid: node.uid().to_owned(),
                controller: Some(false),
                block_owner_deletion: Some(false),
            });
        }
        let created = one.meta.creation_timestamp.as_ref().map_or(view.now, |time| time.0);
        match one.spec.deadline_of(created) {
            Ok(deadline) => self.status.deadline = deadline.map(Time),
            Err(wrong) => self.status.last_error = Some(format!("the deadline is ignored: {wrong}")),
        }
        let mut ignored = Vec::new();
        if !view.settings.moves_guests {
            ignored.extend((one.spec.return_home == Some(true)).then_some("returnHome"));
            // The drain taint of these groups is KubeVirt's own: it has all leave at once.
            ignored.extend(
                (one.spec.max_parallel.is_some() && one.kind != Kind::NodeMaintenance).then_some("maxParallel"),
            );
        }
        if !ignored.is_empty() {
            let known = self.status.last_error.take().map(|known| format!("{known}; ")).unwrap_or_default();
            let text = format!("{known}ignored where another KubeVirt moves the guests: {}", ignored.join(", "));
            self.status.last_error = Some(text);
        }
        self.status.phase = Phase::Running;
        self.status.drain_progress = Some(0);
        let (total, pending) = drain::pods(&one.spec.node_name, view.world);
        self.status.total_pods = i32::try_from(total).ok();
        self.status.eviction_pods = i32::try_from(pending.len()).ok();
        drain::list(&pending, &mut self.status);
        self.events.push((EventType::Normal, told::BEGIN));
    }

    /// Whether the deadline has passed and that ends it.
    fn is_over_time(&mut self, node: &Arc<Node>) -> bool {
        let Self { one, view, .. } = *self;
        let Some(deadline) = one.status.deadline.as_ref().map(|time| time.0) else { return false };
        let (_, pending) = drain::pods(Stored::name(node.as_ref()), view.world);
        if pending.is_empty() || one.status.phase == Phase::Succeeded {
            return false;
        }
        if view.now < deadline {
            self.then.wake(deadline);
            return false;
        }
        let text = format!("the node was not empty at the deadline {deadline}: {} pods were left", pending.len());
        if one.spec.on_deadline == Some(OnDeadline::Continue) {
            if one.status.deadline_passed != Some(true) {
                self.status.deadline_passed = Some(true);
                self.status.last_error = Some(text);
                self.events.push((EventType::Warning, told::DEADLINE_PASSED));
            }
            return false;
        }
        self.fail(text);
        true
    }

    /// Closes the node, asks its pods to go, and says how far it is.
    fn empty(&mut self, node: &Arc<Node>) {
        let Self { one, view, .. } = *self;
        let closed = marks::set(node, &one, view.now, &mut self.first);
        self.status.closed = Some(true);
        let (_, pending) = drain::pods(Stored::name(node.as_ref()), view.world);
        drain::list(&pending, &mut self.status);
        if pending.is_empty() && closed {
            self.status.virtual_machine_instances.clear();
            self.status.leaving.clear();
            if one.status.phase != Phase::Succeeded {
                self.status.phase = Phase::Succeeded;
                self.events.push((EventType::Normal, told::SUCCEED));
            }
            self.status.drain_progress = Some(100);
            return;
        }
        // Also when it had been empty already: something has come.
        self.status.phase = Phase::Running;
        self.status.drain_progress = Some(drain::progress(self.status.eviction_pods, pending.len()));
        if one.spec.return_home == Some(true) && view.settings.moves_guests {
            drain::mark_home(&one.spec.node_name, view.world, &mut self.first);
        }
        self.status.leaving = drain::turns(&one, view, &mut self.then);
        drain::evict(&pending, &one, &self.status.leaving, view, &mut self.then);
        drain::tell(&pending, &one, view, &mut self.status);
    }

    /// It is given up, and what it has done is taken back.
    fn fail(&mut self, why: String) {
        self.end();
        self.status.phase = Phase::Failed;
        self.status.last_error = Some(why);
        self.events.push((EventType::Warning, told::FAILED));
    }

    /// Takes back what it has done. Done again, it does nothing: what others want of the node then is theirs.
    fn end(&mut self) {
        let Self { one, view, .. } = *self;
        let node = view.world.nodes.get(&Name::cluster(one.spec.node_name.as_str()));
        // Failed is written last. Only an earlier leader can have closed the node once more.
        if one.status.phase == Phase::Failed && !node.is_some_and(|node| marks::are_of(node, &one)) {
            return;
        }
        // What another maintenance does is not undone.
        let other = of(&one.spec.node_name, view.world).is_some_and(|other| other.age() != one.age());
        // One that never came so far has marked nobody: what it finds is somebody else's.
        let closed = one.status.closed == Some(true) || node.is_some_and(|node| marks::are_of(node, &one));
        if let Some(node) = node.filter(|_| closed && !other) {
            let after = marks::clear(node, &mut self.first);
            drain::call_off(&after, view.world, &mut self.first);
        }
        if !other {
            lease::release(&one, view, &mut self.first);
        }
        self.status.virtual_machine_instances.clear();
        self.status.leaving.clear();
        self.status.closed = None;
    }

    /// Says what would happen, and again after a while.
    fn foresee(&mut self) {
        let Self { one, view, .. } = *self;
        let made = one.status.plan.as_ref().and_then(|plan| plan.made_at.as_ref()).map(|time| time.0);
        let again = made.and_then(|made| made.checked_add(FORESEE_AGAIN).ok());
        if let Some(again) = again.filter(|again| view.now < *again) {
            return self.then.wake(again);
        }
        self.then.wake(view.now + FORESEE_AGAIN);
        if view.world.nodes.get(&Name::cluster(one.spec.node_name.as_str())).is_none() {
            self.status.last_error = Some(format!("nodes \"{}\" not found", one.spec.node_name));
            return;
        }
        let node = one.spec.node_name.as_str();
        self.status.plan = Some(crate::drain::plan(view, &[node], &crate::drain::Terms::default()));
    }
}
