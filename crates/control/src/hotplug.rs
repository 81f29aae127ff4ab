//! Disks that come and go while the guest runs.
//!
//! The claim of such a disk is held by an attachment pod on the node of the launcher that shall have it, which belongs to that
//! launcher's pod; a migration's target has one of its own. Here it is decided which attachment pods there are, and how far each
//! disk has come (`status.volumeStatus`) up to the point where the handler of the node has the launcher plug it in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_api::VirtualMachineInstance;
use godwit_api::names::events::{self, reason};
use godwit_api::vmi::{HotplugVolumeStatus, Volume as VmiVolume, VolumePhase, VolumeStatus};
use k8s_openapi::api::core::v1::{
    Affinity, Container, EmptyDirVolumeSource, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm,
    PersistentVolumeClaimVolumeSource, Pod, PodSpec, ResourceRequirements, Toleration, Volume, VolumeDevice,
    VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use crate::migration;
use crate::names;
use crate::object::{Name, Stored};
use crate::placement;
use crate::plan::{EventType, Plan, VM_CONTROLLER, View};
use crate::pod_security::RunAs;
use crate::vmi;
use crate::volumes;
use crate::world::World;
use crate::{launcher_pod, quantity};

/// What an attachment pod asks for and is limited to (KubeVirt's figures).
const REQUESTS: [(&str, &str); 2] = [("cpu", "10m"), ("memory", "2M")];
const LIMITS: [(&str, &str); 2] = [("cpu", "100m"), ("memory", "80M")];

/// The VMI that an attachment pod is of.
pub fn vmi_of_attachment(pod: &Pod) -> Option<Name> {
    (pod.label(names::LABEL_APP) == Some(names::APP_HOTPLUG_DISK))
        .then(|| Name::new(pod.namespace(), pod.annotation(names::ANNOTATION_OWNER_VMI_NAME).unwrap_or_default()))
}

/// The UID of the launcher pod that an attachment pod belongs to.
pub fn launcher_of(pod: &Pod) -> Option<&str> {
    vmi_of_attachment(pod)?;
    pod.metadata.owner_references.as_ref()?.first().map(|owner| owner.uid.as_str())
}

/// Whether a launcher may be given what the pod holds.
fn holds(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_ref());
    let ready = conditions.into_iter().flatten().any(|one| one.type_ == "Ready" && one.status == "True");
    ready && !pod.deleting() && status.and_then(|status| status.phase.as_deref()) == Some("Running")
}

/// The VMI's volumes that the pod holds the claims of.
fn held_by(pod: &Pod) -> BTreeSet<&str> {
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
    let claims = volumes.into_iter().flatten().filter(|volume| volume.persistent_volume_claim.is_some());
    claims.map(|volume| volume.name.as_str()).collect()
}

/// The attachment pod of a launcher's pod that holds this volume's claim and can give its image.
fn holder<'a>(launcher: &Pod, volume: &str, world: &'a World) -> Option<&'a Arc<Pod>> {
    let name = launcher_pod::volume_name(volume);
    world.attachments_of(launcher.uid()).find(|pod| holds(pod) && held_by(pod).contains(name.as_str()))
}

/// The attachment pod that a migration's target gets the guest's disks from; `Ok(None)` when there are no such disks.
///
/// # Errors
/// What is missing, in a sentence.
pub fn for_target<'a>(
    vmi: &VirtualMachineInstance,
    target: &Pod,
    world: &'a World,
) -> Result<Option<&'a Arc<Pod>>, String> {
    if !vmi.has_settled_disks() {
        return Err("a disk of the guest is being plugged in or taken out".to_owned());
    }
    let wanted: Vec<&str> = vmi.plugged_in().collect();
    let Some(first) = wanted.first() else { return Ok(None) };
    let missing = |volume: &str| format!("the claim of volume {volume} is not attached to the target's node yet");
    let pod = holder(target, first, world).ok_or_else(|| missing(first))?;
    let held = held_by(pod);
    match wanted.into_iter().find(|volume| !held.contains(launcher_pod::volume_name(volume).as_str())) {
        None => Ok(Some(pod)),
        Some(volume) => Err(missing(volume)),
    }
}

/// Whether the VMI's disks must stay as they are: a migration has been handed over and is not over.
pub fn is_moving(vmi: &VirtualMachineInstance) -> bool {
    let state = vmi.status.migration_state.as_ref();
    state.is_some_and(|state| migration::is_unresolved(state) || state.failed != Some(true) && !vmi.has_arrived())
}

/// Decides about the disks of a VMI that come and go.
pub fn decide(
    vmi: &Arc<VirtualMachineInstance>,
    after: &mut VirtualMachineInstance,
    view: &View<'_>,
    plan: &mut Plan,
    events: &mut Plan,
) {
    let world = view.world;
    let wanted: Vec<&VmiVolume> = vmi.spec.volumes.iter().filter(|volume| volume.is_hotpluggable()).collect();
    let known = vmi.status.volume_status.iter().any(|one| one.hotplug_volume.is_some());
    let pods = || world.pods_of_vmi(vmi.uid());
    if wanted.is_empty() && !known && pods().all(|pod| world.attachments_of(pod.uid()).next().is_none()) {
        return;
    }
    for pod in pods().filter(|pod| placement::is_finished(pod)) {
        drop_attachments(vmi, pod, &BTreeSet::new(), view, plan, events);
    }
    let Some(launcher) = vmi::current_pod(vmi, world).filter(|pod| !placement::is_finished(pod)) else { return };
    if !is_moving(vmi) {
        follow(vmi, after, launcher, &wanted, view);
    }
    // While the guest has it, its claim is held, whatever the spec says.
    let had = after.status.volume_status.iter().filter(|one| one.hotplug_volume.is_some()).map(|one| &one.name);
    let held: BTreeSet<&str> = wanted.iter().map(|volume| &volume.name).chain(had).map(String::as_str).collect();
    attach(vmi, launcher, &wanted, view, plan, events);
    drop_attachments(vmi, launcher, &held, view, plan, events);

    let plugged: BTreeSet<&str> = vmi.plugged_in().collect();
    for target in pods().filter(|pod| pod.uid() != launcher.uid() && is_awaited_target(vmi, pod, world)) {
        let needed: Vec<&VmiVolume> =
            wanted.iter().copied().filter(|volume| plugged.contains(volume.name.as_str())).collect();
        attach(vmi, target, &needed, view, plan, events);
    }
}

/// The guest has ended: nobody needs its claims any more.
pub fn release(vmi: &Arc<VirtualMachineInstance>, view: &View<'_>, plan: &mut Plan, events: &mut Plan) {
    for pod in view.world.pods_of_vmi(vmi.uid()) {
        drop_attachments(vmi, pod, &BTreeSet::new(), view, plan, events);
    }
}

/// Whether the guest may be on its way to this pod.
fn is_awaited_target(vmi: &VirtualMachineInstance, pod: &Pod, world: &World) -> bool {
    let uid = pod.label(names::LABEL_MIGRATION_JOB_UID);
    let migration = uid.and_then(|uid| world.migration_by_uid(uid));
    let open = migration.is_some_and(|migration| !migration.is_final() && migration.vmi_name() == vmi.name());
    open && !pod.deleting() && !placement::is_finished(pod)
}

/// How far each disk has come.
fn follow(
    vmi: &VirtualMachineInstance,
    after: &mut VirtualMachineInstance,
    launcher: &Pod,
    wanted: &[&VmiVolume],
    view: &View<'_>,
) {
    let statuses = &mut after.status.volume_status;
    for volume in wanted {
        if !statuses.iter().any(|one| one.name == volume.name) {
            let hotplug_volume = Some(HotplugVolumeStatus::default());
            statuses.push(VolumeStatus { name: volume.name.clone(), hotplug_volume, ..VolumeStatus::default() });
        }
    }
    statuses.retain_mut(|status| {
        if status.hotplug_volume.is_none() {
            return true;
        }
        match wanted.iter().find(|volume| volume.name == status.name) {
            Some(volume) => {
                come(status, vmi, launcher, volume, view);
                true
            }
            None => go(status),
        }
    });
}

fn say(status: &mut VolumeStatus, phase: VolumePhase, reason: &str, message: String) {
    status.phase = Some(phase);
    status.reason = Some(reason.to_owned());
    status.message = Some(message);
}

/// A disk that the guest shall have.
fn come(status: &mut VolumeStatus, vmi: &VirtualMachineInstance, launcher: &Pod, volume: &VmiVolume, view: &View<'_>) {
    let pod = holder(launcher, &volume.name, view.world);
    let named = |pod: &Arc<Pod>| HotplugVolumeStatus {
        attach_pod_name: pod.metadata.name.clone(),
        attach_pod_uid: pod.metadata.uid.clone(),
    };
    match (&status.phase, pod) {
        (None | Some(VolumePhase::Pending | VolumePhase::Bound), Some(pod)) => {
            status.hotplug_volume = Some(named(pod));
            let text = format!(
                "Created hotplug attachment pod {}, for volume {}",
                pod.metadata.name.as_deref().unwrap_or_default(),
                volume.name
            );
            say(status, VolumePhase::AttachedToNode, reason::SUCCESSFUL_CREATE, text);
        }
        (None | Some(VolumePhase::Pending | VolumePhase::Bound), None) => {
            let name = volume.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.as_str());
            let name = name.unwrap_or_default();
            match view.world.claims.get(&Name::new(vmi.namespace(), name)) {
                None => {
                    let text = format!("PVC {}/{name} does not exist, waiting for it to appear", vmi.namespace());
                    say(status, VolumePhase::Pending, "FailedPvcNotFound", text);
                }
                Some(claim) if volumes::is_bound(claim) => {
                    say(status, VolumePhase::Bound, "PVCNotReady", format!("PVC {name} is in phase Bound"));
                }
                Some(_) => say(status, VolumePhase::Pending, "PVCNotReady", format!("PVC {name} is in phase Pending")),
            }
        }
        // The guest has moved, or another pod took over: the disk stays the guest's.
        (_, Some(pod)) => {
            let held = status.hotplug_volume.as_ref().and_then(|held| held.attach_pod_uid.as_deref());
            let still = view.world.attachments_of(launcher.uid()).any(|one| holds(one) && Some(one.uid()) == held);
            if !still {
                status.hotplug_volume = Some(named(pod));
            }
        }
        (_, None) => {}
    }
}

/// A disk that the guest shall not have any more; false when nothing of it is left.
fn go(status: &mut VolumeStatus) -> bool {
    match status.phase {
        Some(VolumePhase::AttachedToNode | VolumePhase::MountedToPod | VolumePhase::Ready) => {
            let text = format!("Volume {} is being taken out", status.name);
            say(status, VolumePhase::Detaching, "Detaching", text);
            true
        }
        Some(VolumePhase::Detaching) => true,
        _ => false,
    }
}

/// Sees to it that the claims of these volumes are held on the launcher's node.
fn attach(
    vmi: &Arc<VirtualMachineInstance>,
    launcher: &Arc<Pod>,
    wanted: &[&VmiVolume],
    view: &View<'_>,
    plan: &mut Plan,
    events: &mut Plan,
) {
    let node = launcher.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).filter(|node| !node.is_empty());
    let Some(node) = node else { return };
    let pods = || view.world.attachments_of(launcher.uid());
    let live: Vec<&Arc<Pod>> = pods().filter(|pod| !pod.deleting() && !placement::is_finished(pod)).collect();
    let held: BTreeSet<&str> = live.iter().flat_map(|pod| held_by(pod)).collect();
    let missing: Vec<&VmiVolume> = wanted
        .iter()
        .copied()
        .filter(|volume| !held.contains(launcher_pod::volume_name(&volume.name).as_str()))
        .filter(|volume| claim_of(vmi, volume, view.world).is_some())
        .collect();
    if missing.is_empty() {
        return;
    }
    let pod = build(vmi, launcher, node, &missing, view);
    if view.world.pods.get(&pod.key()).is_some() {
        // One of this name has ended or is going: the next comes when it is gone.
        return;
    }
    let text = events::created_attachment_pod(Stored::name(&pod));
    events.record(vmi.as_ref(), VM_CONTROLLER, EventType::Normal, reason::SUCCESSFUL_CREATE, text);
    plan.create(pod);
}

/// Removes the attachment pods of a launcher's pod that hold nothing of `wanted`, or have ended.
fn drop_attachments(
    vmi: &Arc<VirtualMachineInstance>,
    launcher: &Pod,
    wanted: &BTreeSet<&str>,
    view: &View<'_>,
    plan: &mut Plan,
    events: &mut Plan,
) {
    let wanted: BTreeSet<String> = wanted.iter().map(|volume| launcher_pod::volume_name(volume)).collect();
    for pod in view.world.attachments_of(launcher.uid()).filter(|pod| !pod.deleting()) {
        let needed = held_by(pod).into_iter().any(|volume| wanted.contains(volume));
        if !needed || placement::is_finished(pod) {
            let text = events::deleted_attachment_pod(Stored::name(pod.as_ref()));
            events.record(vmi.as_ref(), VM_CONTROLLER, EventType::Normal, reason::SUCCESSFUL_DELETE, text);
            plan.delete(pod.as_ref());
        }
    }
}

fn claim_of<'a>(
    vmi: &VirtualMachineInstance,
    volume: &VmiVolume,
    world: &'a World,
) -> Option<&'a Arc<k8s_openapi::api::core::v1::PersistentVolumeClaim>> {
    let claim = volume.persistent_volume_claim.as_ref()?;
    world.claims.get(&Name::new(vmi.namespace(), claim.claim_name.as_str()))
}

/// The attachment pod for these volumes on this node, with a name that is always the same.
fn build(vmi: &VirtualMachineInstance, launcher: &Pod, node: &str, held: &[&VmiVolume], view: &View<'_>) -> Pod {
    let sockets =
        Volume { name: "sockets".to_owned(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() };
    let mut all = vec![sockets];
    let mut mounts = vec![VolumeMount {
        name: "sockets".to_owned(),
        mount_path: "/var/run/kubevirt/sockets".to_owned(),
        ..VolumeMount::default()
    }];
    let mut devices = Vec::new();
    let mut command = view.settings.attachment_command.clone();
    for volume in held {
        let Some(source) = &volume.persistent_volume_claim else { continue };
        let Some(claim) = claim_of(vmi, volume, view.world) else { continue };
        let name = launcher_pod::volume_name(&volume.name);
        let read_only = source.read_only.unwrap_or(false);
        let path = if volumes::is_block(claim) {
            let device_path = format!("/dev/vmi-disks/{}", volume.name);
            devices.push(VolumeDevice { name: name.clone(), device_path: device_path.clone() });
            device_path
        } else {
            let mount_path = format!("/var/run/kubevirt-private/vmi-disks/{}", volume.name);
            let mount = VolumeMount {
                name: name.clone(),
                mount_path: mount_path.clone(),
                read_only: read_only.then_some(true),
                ..VolumeMount::default()
            };
            mounts.push(mount);
            mount_path
        };
        let mode = if read_only { "ro" } else { "rw" };
        command.extend(["--volume".to_owned(), format!("{}:{mode}:{}:{path}", volume.name, size(claim))]);
        let source = PersistentVolumeClaimVolumeSource {
            claim_name: source.claim_name.clone(),
            read_only: read_only.then_some(true),
        };
        all.push(Volume { name, persistent_volume_claim: Some(source), ..Volume::default() });
    }
    let run_as = RunAs::usual(vmi, view.world);
    let container = Container {
        name: names::ATTACHMENT_CONTAINER.to_owned(),
        image: Some(view.settings.launcher_image.clone()),
        image_pull_policy: view.settings.launcher_pull_policy.clone(),
        command: Some(command),
        resources: Some(ResourceRequirements {
            requests: Some(amounts(REQUESTS)),
            limits: Some(amounts(LIMITS)),
            ..ResourceRequirements::default()
        }),
        security_context: Some(run_as.container()),
        volume_mounts: Some(mounts),
        volume_devices: (!devices.is_empty()).then_some(devices),
        ..Container::default()
    };
    let names_of: Vec<&str> = held.iter().map(|volume| volume.name.as_str()).collect();
    let seed = format!("{} {}", launcher.uid(), names_of.join(" "));
    Pod {
        metadata: ObjectMeta {
            name: Some(names::attachment_pod(&seed)),
            namespace: vmi.metadata.namespace.clone(),
            labels: Some(labelled(names::LABEL_APP, names::APP_HOTPLUG_DISK)),
            annotations: Some(BTreeMap::from([
                (names::ANNOTATION_OWNER_VMI_NAME.to_owned(), Stored::name(vmi).to_owned()),
                (names::ANNOTATION_OWNER_VMI_UID.to_owned(), vmi.uid().to_owned()),
            ])),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Pod".to_owned(),
                name: Stored::name(launcher).to_owned(),
                uid: launcher.uid().to_owned(),
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            containers: vec![container],
            volumes: Some(all),
            affinity: Some(on_node(node)),
            tolerations: Some(tolerations(launcher)),
            // Whoever uses what it holds has opened it.
            termination_grace_period_seconds: Some(0),
            scheduler_name: launcher.spec.as_ref().and_then(|spec| spec.scheduler_name.clone()),
            security_context: Some(run_as.pod()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            ..PodSpec::default()
        }),
        status: None,
    }
}

/// How large an image that is made on the claim is.
fn size(claim: &k8s_openapi::api::core::v1::PersistentVolumeClaim) -> i128 {
    let bound = claim.status.as_ref().and_then(|status| status.capacity.as_ref()).and_then(|all| all.get("storage"));
    let asked = claim.spec.as_ref().and_then(|spec| spec.resources.as_ref()).and_then(|one| one.requests.as_ref());
    quantity::whole(bound.or_else(|| asked.and_then(|all| all.get("storage"))))
}

fn labelled(key: &str, value: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(key.to_owned(), value.to_owned())])
}

fn amounts(of: [(&str, &str); 2]) -> BTreeMap<String, Quantity> {
    of.into_iter().map(|(name, amount)| (name.to_owned(), Quantity(amount.to_owned()))).collect()
}

fn on_node(node: &str) -> Affinity {
    let here = NodeSelectorRequirement {
        key: names::HOSTNAME.to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    let term = NodeSelectorTerm { match_expressions: Some(vec![here]), match_fields: None };
    let required = Some(NodeSelector { node_selector_terms: vec![term] });
    let node_affinity =
        NodeAffinity { required_during_scheduling_ignored_during_execution: required, ..NodeAffinity::default() };
    Affinity { node_affinity: Some(node_affinity), ..Affinity::default() }
}

/// It goes where the guest is, whatever keeps new guests away from there.
fn tolerations(launcher: &Pod) -> Vec<Toleration> {
    let cordon = Toleration {
        key: Some(names::TAINT_UNSCHEDULABLE.to_owned()),
        operator: Some("Exists".to_owned()),
        ..Toleration::default()
    };
    let own = launcher.spec.as_ref().and_then(|spec| spec.tolerations.clone()).unwrap_or_default();
    own.into_iter().chain([cordon]).collect()
}
