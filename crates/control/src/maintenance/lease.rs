//! The node's lease: whoever holds it may take the node out of service. Others (the medik8s operators) look at it.

use std::sync::Arc;

use godwit_api::maintenance::GROUP_MEDIK8S;
use godwit_api::names::{MAINTENANCE_LEASES_KUBEVIRT, MAINTENANCE_LEASES_MEDIK8S};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};

use super::{AGAIN, Held, Work};
use crate::object::{Kind, Name, Stored};
use crate::plan::{Plan, View};

/// Who holds the lease: every maintenance operator under this name (the reference's).
const HOLDER: &str = "node-maintenance";
/// For how long (the reference's).
const DURATION: SignedDuration = SignedDuration::from_hours(1);
/// Renewed when half of it has passed.
const RENEW_AFTER: SignedDuration = SignedDuration::from_mins(30);
/// Before the node's name in the name of a medik8s lease.
const MEDIK8S_PREFIX: &str = "node-";

fn name_of(one: &Held<'_>) -> Name {
    let node = one.spec.node_name.as_str();
    if one.kind.group() == GROUP_MEDIK8S {
        Name::new(MAINTENANCE_LEASES_MEDIK8S, format!("{MEDIK8S_PREFIX}{node}"))
    } else {
        Name::new(MAINTENANCE_LEASES_KUBEVIRT, node)
    }
}

/// The node whose maintenance a lease is for.
pub fn node_of(lease: &Lease) -> Option<&str> {
    match Stored::namespace(lease) {
        MAINTENANCE_LEASES_MEDIK8S => Stored::name(lease).strip_prefix(MEDIK8S_PREFIX),
        MAINTENANCE_LEASES_KUBEVIRT => Some(Stored::name(lease)),
        _ => None,
    }
}

fn renewed(spec: &LeaseSpec) -> Option<Timestamp> {
    spec.renew_time.as_ref().map(|time| time.0)
}

/// Who else holds the lease now.
fn other_holder(lease: &Lease, now: Timestamp) -> Option<&str> {
    let spec = lease.spec.as_ref()?;
    let holder = spec.holder_identity.as_deref().filter(|holder| !holder.is_empty() && *holder != HOLDER)?;
    let lasts = spec.lease_duration_seconds.map_or(DURATION, |seconds| SignedDuration::from_secs(seconds.into()));
    let ends = renewed(spec).and_then(|from| from.checked_add(lasts).ok());
    ends.is_none_or(|ends| now < ends).then_some(holder)
}

fn held(now: Timestamp, before: Option<&LeaseSpec>) -> LeaseSpec {
    let mut spec = before.cloned().unwrap_or_default();
    if spec.holder_identity.as_deref() != Some(HOLDER) {
        spec.acquire_time = Some(MicroTime(now));
        spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |count| count.saturating_add(1)));
    }
    spec.holder_identity = Some(HOLDER.to_owned());
    spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
    spec.renew_time = Some(MicroTime(now));
    spec
}

/// Takes the lease, or keeps it. Says whether it is held, or will be when the plan is carried out that far.
pub fn hold(work: &mut Work<'_>, node: &Arc<Node>) -> bool {
    let (one, view) = (work.one, work.view);
    let name = name_of(&one);
    let Some(lease) = view.world.leases.get(&name) else {
        let namespace = Name::cluster(name.namespace.as_str());
        if view.world.namespaces.get(&namespace).is_none() {
            let metadata = ObjectMeta { name: Some(name.namespace.to_string()), ..ObjectMeta::default() };
            work.first.create(Namespace { metadata, ..Namespace::default() });
        }
        work.first.create(fresh(&name, &one, node, view.now));
        return true;
    };
    if let Some(holder) = other_holder(lease, view.now) {
        let text = format!("the lease {name} of the node is held by {holder:?}");
        let since = one.status.last_update.as_ref().map(|time| time.0);
        let told = one.status.last_error.as_deref() == Some(text.as_str());
        let again = since.filter(|_| told).and_then(|since| since.checked_add(AGAIN).ok());
        if let Some(again) = again.filter(|again| view.now < *again) {
            work.then.wake(again);
            return false;
        }
        // Whoever has not moved anything yet may wait; who has, is in somebody's way.
        if one.status.drain_progress.unwrap_or(0) > 0 {
            work.status.error_on_lease_count = Some(one.status.error_on_lease_count.unwrap_or(0).saturating_add(1));
        }
        work.status.last_error = Some(text);
        work.then.wake(view.now + AGAIN);
        return false;
    }
    work.status.error_on_lease_count = None;
    let spec = lease.spec.as_ref();
    let ours = spec.is_some_and(|spec| spec.holder_identity.as_deref() == Some(HOLDER));
    let next = spec.filter(|_| ours).and_then(renewed).and_then(|from| from.checked_add(RENEW_AFTER).ok());
    match next.filter(|next| view.now < *next) {
        Some(next) => work.then.wake(next),
        None => {
            let mut after = lease.as_ref().clone();
            after.spec = Some(held(view.now, spec));
            work.first.update(lease.as_ref(), &after);
            work.then.wake(view.now + RENEW_AFTER);
        }
    }
    true
}

fn fresh(name: &Name, one: &Held<'_>, node: &Node, now: Timestamp) -> Lease {
    let owner = OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: Stored::name(node).to_owned(),
        uid: node.uid().to_owned(),
        ..OwnerReference::default()
    };
    let metadata = ObjectMeta {
        namespace: Some(name.namespace.to_string()),
        name: Some(name.name.to_string()),
        owner_references: (one.kind == Kind::NodeMaintenance).then(|| vec![owner]),
        ..ObjectMeta::default()
    };
    Lease { metadata, spec: Some(held(now, None)) }
}

/// Gives the lease back, unless it is another's: one of medik8s goes, the older ones are left blank.
pub fn release(one: &Held<'_>, view: &View<'_>, plan: &mut Plan) {
    let Some(lease) = view.world.leases.get(&name_of(one)) else { return };
    let ours = lease.spec.as_ref().is_some_and(|spec| spec.holder_identity.as_deref() == Some(HOLDER));
    if !ours || lease.deleting() {
        return;
    }
    if one.kind == Kind::NodeMaintenance {
        plan.delete(lease.as_ref());
    } else {
        let mut after = lease.as_ref().clone();
        after.spec = Some(LeaseSpec::default());
        plan.update(lease.as_ref(), &after);
    }
}
