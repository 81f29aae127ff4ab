//! Volumes for claims: provisioning and binding for the two StorageClasses of the standalone mode.
//!
//! `shared` gives a folder that all nodes see, bound at once; `local` gives a folder of one node, bound when the first pod that
//! uses the claim has been placed (`WaitForFirstConsumer`). The folder is made by the kubelet, the disk image in it by
//! the launcher. In place of the folder a claim of mode `Block` has a file, which the kubelet makes a block device of.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    HostPathVolumeSource, LocalVolumeSource, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, ObjectReference,
    PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimSpec, PersistentVolumeSpec, VolumeNodeAffinity,
};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::names;
use crate::object::{Name, Stored};
use crate::plan::{EventType, Plan, VOLUME_CONTROLLER, View};
use crate::quantity;
use crate::world::World;

/// Provisioner of the StorageClass `shared`.
pub const SHARED_PROVISIONER: &str = "godwit.local/shared";
/// Provisioner of the StorageClass `local`.
pub const LOCAL_PROVISIONER: &str = "godwit.local/local";

const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
/// Marks the class of claims that name none.
pub(crate) const IS_DEFAULT_CLASS: &str = "storageclass.kubernetes.io/is-default-class";

/// Volume modes of Kubernetes.
const BLOCK: &str = "Block";
const FILESYSTEM: &str = "Filesystem";

/// Where the folder of a volume is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    AllNodes,
    OneNode,
}

fn reach(class: &StorageClass) -> Option<Reach> {
    match class.provisioner.as_str() {
        SHARED_PROVISIONER => Some(Reach::AllNodes),
        LOCAL_PROVISIONER => Some(Reach::OneNode),
        _ => None,
    }
}

/// Whether the claim has its volume.
pub fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
    let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
    phase == Some("Bound") && !volume.is_empty()
}

/// Whether the claim is for a block device, and not for a file system.
pub fn is_block(claim: &PersistentVolumeClaim) -> bool {
    mode(claim.spec.as_ref().and_then(|spec| spec.volume_mode.as_deref())) == BLOCK
}

/// A volume mode; what names none is a file system.
fn mode(given: Option<&str>) -> &str {
    given.unwrap_or(FILESYSTEM)
}

/// Whether the claim is to be bound only when a pod that uses it has been placed.
pub fn waits_for_consumer(claim: &PersistentVolumeClaim, world: &World) -> bool {
    class_of(claim, world).is_some_and(|class| {
        class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer") || reach(&class) == Some(Reach::OneNode)
    })
}

fn class_of(claim: &PersistentVolumeClaim, world: &World) -> Option<Arc<StorageClass>> {
    match claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref()) {
        Some("") => None,
        Some(name) => world.classes.get(&Name::cluster(name)).cloned(),
        None => world.classes.iter().find(|class| class.annotation(IS_DEFAULT_CLASS) == Some("true")).cloned(),
    }
}

/// Whether volumes of this class are known to be of one node each.
pub fn is_of_one_node(class: &str, world: &World) -> bool {
    world.classes.get(&Name::cluster(class)).is_some_and(|class| reach(class) == Some(Reach::OneNode))
}

/// The one node where the claim's volume can be reached, if it is bound to one of those.
pub fn only_node<'a>(claim: &PersistentVolumeClaim, world: &'a World) -> Option<&'a str> {
    let volume = world.volumes.get(&Name::cluster(claim.spec.as_ref()?.volume_name.as_deref()?))?;
    let required = volume.spec.as_ref()?.node_affinity.as_ref()?.required.as_ref()?;
    let [term] = required.node_selector_terms.as_slice() else { return None };
    let host =
        term.match_expressions.iter().flatten().find(|one| one.key == names::HOSTNAME && one.operator == "In")?;
    match host.values.as_deref()? {
        [node] => Some(node),
        _ => None,
    }
}

/// Decides about one claim.
pub fn decide_claim(name: &Name, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let Some(claim) = view.world.claims.get(name) else { return plan };
    let Some(spec) = &claim.spec else { return plan };
    if claim.deleting() || is_bound(claim) {
        return plan;
    }
    let named = spec.volume_name.as_deref().filter(|name| !name.is_empty());
    if let Some(volume) = find_volume(claim, spec, named, view.world) {
        bind(claim, volume, &mut plan);
        return plan;
    }
    // The claim asks for one volume by name that is not there (yet).
    if named.is_some() {
        return plan;
    }
    let Some(class) = class_of(claim, view.world) else { return plan };
    let Some(reach) = reach(&class) else { return plan };
    let node = claim.annotation(names::SELECTED_NODE);
    if waits_for_consumer(claim, view.world) && node.is_none() {
        return plan;
    }
    let modes = spec.access_modes.as_deref().unwrap_or_default();
    if reach == Reach::OneNode && modes.iter().any(|mode| mode == "ReadWriteMany" || mode == "ReadOnlyMany") {
        let message = format!(
            "storage class \"{}\" keeps a volume on one node and cannot give access modes {modes:?}; \
             use storage class \"shared\" for a volume that many nodes can use",
            class.name()
        );
        plan.record(claim.as_ref(), VOLUME_CONTROLLER, EventType::Warning, "ProvisioningFailed", message);
        return plan;
    }
    let volume = provision(claim, spec, &class, reach, node, view);
    let message = format!("Successfully provisioned volume {}", volume.name());
    plan.create(volume);
    plan.record(claim.as_ref(), VOLUME_CONTROLLER, EventType::Normal, "ProvisioningSucceeded", message);
    plan
}

/// The volume that is meant for this claim or can serve it.
fn find_volume<'a>(
    claim: &PersistentVolumeClaim,
    spec: &PersistentVolumeClaimSpec,
    named: Option<&str>,
    world: &'a World,
) -> Option<&'a Arc<PersistentVolume>> {
    let usable = |volume: &PersistentVolume| {
        let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
        !volume.deleting() && reference.is_none_or(|reference| refers_to(reference, claim))
    };
    if let Some(named) = named {
        return world.volumes.get(&Name::cluster(named)).filter(|volume| usable(volume));
    }
    if let Some(own) = world.volumes.get(&Name::cluster(volume_name(claim))).filter(|volume| usable(volume)) {
        return Some(own);
    }
    let wanted = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref());
    let wanted = quantity::whole(wanted.and_then(|all| all.get("storage")));
    let class = spec.storage_class_name.as_deref().unwrap_or_default();
    let size_of = |volume: &PersistentVolume| {
        let capacity = volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref());
        quantity::whole(capacity.and_then(|all| all.get("storage")))
    };
    world
        .volumes_for(&claim.key())
        .chain(world.free_volumes())
        .filter(|volume| usable(volume))
        .filter(|volume| {
            let Some(have) = &volume.spec else { return false };
            let modes = have.access_modes.as_deref().unwrap_or_default();
            have.storage_class_name.as_deref().unwrap_or_default() == class
                && size_of(volume) >= wanted
                && mode(have.volume_mode.as_deref()) == mode(spec.volume_mode.as_deref())
                && spec.access_modes.iter().flatten().all(|mode| modes.contains(mode))
                // A volume of one node is matched only when somebody reserved it for this claim.
                && (have.node_affinity.is_none() || have.claim_ref.is_some())
        })
        .min_by_key(|volume| size_of(volume))
}

fn refers_to(reference: &ObjectReference, claim: &PersistentVolumeClaim) -> bool {
    reference.name.as_deref() == Some(claim.name())
        && reference.namespace.as_deref() == Some(claim.namespace())
        && reference.uid.as_deref().is_none_or(|uid| uid.is_empty() || uid == claim.uid())
}

/// Deterministic, so that provisioning twice is provisioning once.
fn volume_name(claim: &PersistentVolumeClaim) -> String {
    format!("pvc-{}", claim.uid())
}

fn reference_to(claim: &PersistentVolumeClaim) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("PersistentVolumeClaim".to_owned()),
        namespace: claim.metadata.namespace.clone(),
        name: claim.metadata.name.clone(),
        uid: claim.metadata.uid.clone(),
        ..ObjectReference::default()
    }
}

fn provision(
    claim: &PersistentVolumeClaim,
    spec: &PersistentVolumeClaimSpec,
    class: &StorageClass,
    reach: Reach,
    node: Option<&str>,
    view: &View<'_>,
) -> PersistentVolume {
    let name = volume_name(claim);
    let wanted = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref());
    let storage = wanted.and_then(|all| all.get("storage")).cloned().unwrap_or_default();
    let node = node.filter(|_| reach == Reach::OneNode);
    let mut volume = PersistentVolumeSpec {
        capacity: Some(BTreeMap::from([("storage".to_owned(), storage)])),
        access_modes: spec.access_modes.clone(),
        claim_ref: Some(reference_to(claim)),
        persistent_volume_reclaim_policy: Some(class.reclaim_policy.clone().unwrap_or_else(|| "Delete".to_owned())),
        storage_class_name: class.metadata.name.clone(),
        volume_mode: Some(spec.volume_mode.clone().unwrap_or_else(|| FILESYSTEM.to_owned())),
        ..PersistentVolumeSpec::default()
    };
    match node {
        Some(node) => {
            let path = view.settings.local_path(node, &name);
            volume.local = Some(LocalVolumeSource { path, fs_type: None });
            volume.node_affinity = Some(only_on(node));
        }
        None => {
            let path = view.settings.shared_path(&name);
            // Of a block volume it is the file behind the device.
            let type_ = if is_block(claim) { "" } else { "DirectoryOrCreate" };
            volume.host_path = Some(HostPathVolumeSource { path, type_: Some(type_.to_owned()) });
        }
    }
    PersistentVolume {
        metadata: ObjectMeta {
            name: Some(name),
            annotations: Some(BTreeMap::from([(PROVISIONED_BY.to_owned(), class.provisioner.clone())])),
            ..ObjectMeta::default()
        },
        spec: Some(volume),
        status: None,
    }
}

fn only_on(node: &str) -> VolumeNodeAffinity {
    let requirement = NodeSelectorRequirement {
        key: names::HOSTNAME.to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    let term = NodeSelectorTerm { match_expressions: Some(vec![requirement]), match_fields: None };
    VolumeNodeAffinity { required: Some(NodeSelector { node_selector_terms: vec![term] }) }
}

fn bind(claim: &Arc<PersistentVolumeClaim>, volume: &Arc<PersistentVolume>, plan: &mut Plan) {
    let mut bound = volume.as_ref().clone();
    bound.spec.get_or_insert_default().claim_ref = Some(reference_to(claim));
    bound.status.get_or_insert_default().phase = Some("Bound".to_owned());
    plan.update(volume.as_ref(), &bound);

    let mut after = claim.as_ref().clone();
    let annotations = after.metadata.annotations.get_or_insert_default();
    annotations.insert(BIND_COMPLETED.to_owned(), "yes".to_owned());
    annotations.insert(BOUND_BY_CONTROLLER.to_owned(), "yes".to_owned());
    after.spec.get_or_insert_default().volume_name = volume.metadata.name.clone();
    let status = after.status.get_or_insert_default();
    status.phase = Some("Bound".to_owned());
    let from = volume.spec.as_ref();
    status.access_modes = from.and_then(|spec| spec.access_modes.clone());
    status.capacity = from.and_then(|spec| spec.capacity.clone());
    plan.update(claim.as_ref(), &after);
}

/// Decides about one volume: what becomes of it when its claim is gone.
pub fn decide_volume(name: &Name, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let Some(volume) = view.world.volumes.get(name) else { return plan };
    let Some(spec) = volume.spec.as_ref().filter(|_| !volume.deleting()) else { return plan };
    let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
    let Some(reference) = &spec.claim_ref else {
        if phase.is_none_or(|phase| phase == "Pending") {
            let mut after = volume.as_ref().clone();
            after.status.get_or_insert_default().phase = Some("Available".to_owned());
            plan.update(volume.as_ref(), &after);
        }
        return plan;
    };
    let claim = Name::new(reference.namespace.clone().unwrap_or_default(), reference.name.clone().unwrap_or_default());
    let held = view.world.claims.get(&claim).is_some_and(|claim| refers_to(reference, claim));
    // A reference without a UID is a reservation: its claim may be yet to come.
    let reserved = reference.uid.as_deref().unwrap_or_default().is_empty();
    if held || reserved {
        return plan;
    }
    if spec.persistent_volume_reclaim_policy.as_deref() == Some("Delete") {
        plan.delete(volume.as_ref());
    } else if phase != Some("Released") {
        let mut after = volume.as_ref().clone();
        after.status.get_or_insert_default().phase = Some("Released".to_owned());
        plan.update(volume.as_ref(), &after);
    }
    plan
}
