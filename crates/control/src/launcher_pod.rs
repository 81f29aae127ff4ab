//! The launcher pod of a VMI, as docs/architecture.md lays it out.

use std::collections::{BTreeMap, BTreeSet};

use godwit_api::vmi::{CloudInitNoCloudSource, ResourceList, VirtualMachineInstanceSpec, Volume as VmiVolume};
use godwit_api::{VirtualMachineInstance, VirtualMachineInstanceMigration};
use k8s_openapi::api::core::v1::{
    Affinity, ConfigMapVolumeSource, Container, EmptyDirVolumeSource, EnvVar, ImageVolumeSource, Node,
    NodeSelectorRequirement, NodeSelectorTerm, PersistentVolumeClaimVolumeSource, Pod, PodAffinityTerm,
    PodAntiAffinity, PodReadinessGate, PodSpec, PreferredSchedulingTerm, ProjectedVolumeSource, ResourceRequirements,
    SecretProjection, SecretVolumeSource, Volume, VolumeDevice, VolumeMount, VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    LabelSelector, LabelSelectorRequirement, ObjectMeta, OwnerReference,
};
use serde_json::json;

use crate::kubevirt;
use crate::names;
use crate::object::{Name, Stored, labels};
use crate::plan::View;
use crate::pod_security::{self, RunAs};
use crate::world::World;
use crate::{persistent_state, processor, quantity, vmi, volumes, workloads};

const MEBI: i128 = 1 << 20;
/// Seconds between the power button and the kill when the VMI does not say (KubeVirt's default).
const DEFAULT_GRACE_SECONDS: i64 = 30;
/// Seconds that the pod gets on top, so that the launcher and not the kubelet ends a guest that ignores the button.
const GRACE_MARGIN_SECONDS: i64 = 15;
/// How many virtual CPUs share one CPU of a node (KubeVirt's `cpuAllocationRatio`).
const CPU_ALLOCATION_RATIO: i128 = 10;

/// The most channels of a migration; how many there are the cores of both nodes decide.
const CHANNELS: i128 = 8;
/// What a channel holds: pieces of half a MiB of pages, compressed ones, and the state of the compression.
const CHANNEL_MEBI: i128 = 4;
/// What the mirror of a disk has in flight at most.
const MIRROR_MEBI: i128 = 10;

/// What a launcher pod is made for.
#[derive(Clone, Copy)]
pub enum Role<'a> {
    /// To start the guest.
    Start,
    /// To receive the guest.
    Receive(&'a VirtualMachineInstanceMigration),
}

/// The name of the launcher pod for a role; always the same, so that making it twice is refused by the server.
pub fn name(vmi: &VirtualMachineInstance, role: Role<'_>) -> String {
    let seed = match role {
        Role::Start => vmi.uid(),
        Role::Receive(migration) => migration.uid(),
    };
    names::launcher_pod(Stored::name(vmi), seed)
}

/// Memory that a launcher pod needs beyond the guest's (docs/launcher-pod.md has the measurements): page tables (guest/512), 12 MiB for
/// the launcher, 42 MiB for QEMU, 2 MiB for each virtual CPU, 8 MiB for the memory of a screen, and 53 MiB (KubeVirt's figure) for a
/// trusted platform module.
///
/// Where a limit may have it killed, also what it needs only for a while: QEMU's copies of a full HD picture while somebody looks,
/// the buffers of a migration, of each of its channels and of each disk that it may copy, and the deepest stacks of the virtual CPUs'
/// threads.
pub fn overhead(spec: &VirtualMachineInstanceSpec) -> i128 {
    let tpm = if spec.domain.devices.has_tpm() { 53 } else { 0 };
    let (screen, looked_at) = match spec.domain.devices.autoattach_graphics_device {
        Some(false) => (0, 0),
        _ => (8, 24),
    };
    let vcpus = i128::from(vcpus(spec));
    let limited = spec.domain.resources.limits.contains_key("memory");
    let migration = 16 + CHANNELS * CHANNEL_MEBI + copied_disks(spec) * MIRROR_MEBI;
    let passing = if limited { looked_at + migration + 6 * vcpus } else { 0 };
    guest_memory(spec) / 512 / MEBI * MEBI + (12 + 42 + 2 * vcpus + screen + tpm + passing) * MEBI
}

/// How many disks a migration may have to copy: all that are written to. Those on shared claims are copied where they move to others.
fn copied_disks(spec: &VirtualMachineInstanceSpec) -> i128 {
    let written = |volume: &&VmiVolume| {
        let claim = volume.persistent_volume_claim.as_ref();
        let claim = claim.is_some_and(|claim| claim.read_only != Some(true));
        claim || volume.container_disk.is_some() || volume.empty_disk.is_some()
    };
    i128::try_from(spec.volumes.iter().filter(written).count()).unwrap_or_default()
}

/// The guest's memory in bytes: `memory.guest`, else the memory request, else the memory limit.
pub fn guest_memory(spec: &VirtualMachineInstanceSpec) -> i128 {
    let resources = &spec.domain.resources;
    let guest = spec.domain.memory.as_ref().and_then(|memory| memory.guest.as_ref());
    let amount = guest.or_else(|| resources.requests.get("memory")).or_else(|| resources.limits.get("memory"));
    amount.and_then(|amount| amount.bytes().ok()).map_or(0, i128::from)
}

/// The number of virtual CPUs.
pub fn vcpus(spec: &VirtualMachineInstanceSpec) -> u32 {
    spec.domain.cpu.as_ref().map_or(1, |cpu| cpu.count())
}

/// Makes the launcher pod.
pub fn build(vmi: &VirtualMachineInstance, role: Role<'_>, view: &View<'_>) -> Pod {
    let spec = &vmi.spec;
    let mut volumes = Volumes::default();
    volumes.empty_dir("sockets", "/var/run/kubevirt/sockets");
    volumes.empty_dir("ephemeral-disks", "/var/run/kubevirt-ephemeral-disks");
    volumes.add_all(vmi, view.world);
    if let Some(claim) = persistent_state::claim_name(vmi, role, view.world) {
        let source = PersistentVolumeClaimVolumeSource { claim_name: claim, read_only: None };
        let volume = Volume { name: STATE.to_owned(), persistent_volume_claim: Some(source), ..Volume::default() };
        volumes.push(volume, "/var/run/kubevirt-private/persistent-state".to_owned(), false);
    }

    let run_as = run_as(vmi, role, view);
    let settings = view.settings;
    let mut command = settings.launcher_command.clone();
    for (flag, value) in [("--name", Stored::name(vmi)), ("--namespace", vmi.namespace()), ("--uid", vmi.uid())] {
        command.extend([flag.to_owned(), value.to_owned()]);
    }
    let compute = Container {
        name: names::COMPUTE_CONTAINER.to_owned(),
        image: Some(launcher_image(role).unwrap_or(&settings.launcher_image).to_owned()),
        image_pull_policy: settings.launcher_pull_policy.clone(),
        command: Some(command),
        env: Some(vec![EnvVar { name: "POD_NAME".to_owned(), value: Some(name(vmi, role)), value_from: None }]),
        resources: Some(resources(vmi, role, view.world)),
        security_context: Some(run_as.container()),
        volume_mounts: Some(volumes.mounts),
        volume_devices: (!volumes.devices.is_empty()).then_some(volumes.devices),
        ..Container::default()
    };
    let grace = spec.termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE_SECONDS).max(0);
    Pod {
        metadata: metadata(vmi, role, view),
        spec: Some(PodSpec {
            containers: vec![compute],
            volumes: Some(volumes.volumes),
            readiness_gates: Some(vec![PodReadinessGate { condition_type: names::READINESS_GATE_UNPAUSED.to_owned() }]),
            restart_policy: Some("Never".to_owned()),
            termination_grace_period_seconds: Some(grace.saturating_add(GRACE_MARGIN_SECONDS)),
            node_selector: Some(node_selector(vmi, role, view.world)),
            affinity: affinity(vmi, role, view),
            tolerations: (!spec.tolerations.is_empty()).then(|| spec.tolerations.clone()),
            topology_spread_constraints: (!spec.topology_spread_constraints.is_empty())
                .then(|| spec.topology_spread_constraints.clone()),
            scheduler_name: spec.scheduler_name.clone(),
            priority_class_name: spec.priority_class_name.clone(),
            hostname: spec.hostname.clone(),
            subdomain: spec.subdomain.clone(),
            security_context: Some(run_as.pod()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            ..PodSpec::default()
        }),
        status: None,
    }
}

/// Whom the pod runs as. A namespace that lets no such pod in gets one that can receive in pre-copy only.
fn run_as(vmi: &VirtualMachineInstance, role: Role<'_>, view: &View<'_>) -> RunAs {
    let post_copy = matches!(role, Role::Receive(_))
        && kubevirt::migration_configuration_of(view.world, vmi).configuration.allow_post_copy == Some(true)
        && pod_security::lets_privileged_in(vmi, view.world);
    if post_copy { RunAs::PostCopyTarget } else { RunAs::usual(vmi, view.world) }
}

/// The image that a migration asks for instead of the launcher's (KubeVirt's test hook).
fn launcher_image(role: Role<'_>) -> Option<&str> {
    match role {
        Role::Start => None,
        Role::Receive(migration) => migration.annotation(names::ANNOTATION_TEST_TARGET_IMAGE),
    }
}

fn metadata(vmi: &VirtualMachineInstance, role: Role<'_>, view: &View<'_>) -> ObjectMeta {
    let own = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    // Labels of the VMI are the pod's too, as selectors of services expect; but for those that speak of the VMI itself.
    let reserved =
        [names::LABEL_NODE_NAME, names::LABEL_MIGRATION_TARGET_NODE_NAME, names::LABEL_OUTDATED_LAUNCHER_IMAGE];
    let mut labels: BTreeMap<String, String> = labels(&vmi.metadata)
        .iter()
        .filter(|(key, _)| !reserved.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    labels.extend([
        own(names::LABEL_APP, names::APP_VIRT_LAUNCHER),
        own(names::LABEL_CREATED_BY, vmi.uid()),
        own(names::LABEL_DEPRECATED_VM_NAME, Stored::name(vmi)),
        own(names::LABEL_VMI_ID, &names::label_value(Stored::name(vmi))),
    ]);
    let mut annotations = BTreeMap::from([
        own(names::ANNOTATION_DOMAIN, Stored::name(vmi)),
        own(names::ANNOTATION_DEFAULT_CONTAINER, names::COMPUTE_CONTAINER),
        own(names::ANNOTATION_MIGRATION_TRANSPORT_UNIX, "true"),
        // The descheduler asks for an eviction, which moves the guest; it never deletes the pod.
        own(names::ANNOTATION_DESCHEDULER_EVICT_ONLY, ""),
        own(names::ANNOTATION_LAUNCHER_VERSION, &view.settings.version),
    ]);
    if workloads::wants_shareable_memory(vmi, view.world) {
        annotations.extend([own(names::ANNOTATION_GUEST_MEMORY, names::GUEST_MEMORY_SHAREABLE)]);
    }
    // The pod network reads it on the pod: the guest takes its address along.
    if let Some(value) = vmi.annotation(names::ANNOTATION_ALLOW_POD_BRIDGE_MIGRATION) {
        annotations.extend([own(names::ANNOTATION_ALLOW_POD_BRIDGE_MIGRATION, value)]);
    }
    if let Some(networks) = networks(vmi) {
        annotations.insert(names::NETWORKS_ANNOTATION.to_owned(), networks);
    }
    if let Role::Receive(migration) = role {
        labels.extend([own(names::LABEL_MIGRATION_JOB_UID, migration.uid())]);
        annotations.extend([own(names::ANNOTATION_MIGRATION_JOB_NAME, Stored::name(migration))]);
    }
    ObjectMeta {
        name: Some(name(vmi, role)),
        namespace: vmi.metadata.namespace.clone(),
        labels: Some(labels),
        annotations: Some(annotations),
        owner_references: Some(vec![owner(vmi)]),
        ..ObjectMeta::default()
    }
}

/// The owner reference to a kubevirt.io object that controls what it owns.
pub fn owner<T: Stored>(object: &T) -> OwnerReference {
    OwnerReference {
        api_version: T::KIND.api_version(),
        kind: T::KIND.kind().to_owned(),
        name: object.name().to_owned(),
        uid: object.uid().to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The annotation that asks for the secondary networks.
fn networks(vmi: &VirtualMachineInstance) -> Option<String> {
    let wanted: Vec<_> = vmi
        .spec
        .networks
        .iter()
        .filter_map(|network| {
            let multus = network.multus.as_ref()?;
            let (namespace, name) =
                multus.network_name.split_once('/').unwrap_or((vmi.namespace(), multus.network_name.as_str()));
            let interface = godwit_api::derived::pod_interface_name(&network.name);
            Some(json!({"name": name, "namespace": namespace, "interface": interface}))
        })
        .collect();
    (!wanted.is_empty()).then(|| serde_json::Value::Array(wanted).to_string())
}

fn node_selector(vmi: &VirtualMachineInstance, role: Role<'_>, world: &World) -> BTreeMap<String, String> {
    let mut selector = match role {
        Role::Start => BTreeMap::new(),
        Role::Receive(migration) => migration.spec.added_node_selector.clone(),
    };
    // The VM's own keys win: a migration can only restrict.
    selector.extend(vmi.spec.node_selector.clone());
    selector.extend(processor::wanted(vmi, role, world).into_iter().map(|label| (label, "true".to_owned())));
    selector.insert(names::LABEL_SCHEDULABLE.to_owned(), "true".to_owned());
    selector
}

/// Whether a migration leaves the guest on its node.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stay {
    /// It asks for that node by name.
    Must,
    /// Only its launcher is to be another: best there, where memory need not be copied.
    May,
    /// It leaves.
    Never,
}

fn stay(vmi: &VirtualMachineInstance, migration: &VirtualMachineInstanceMigration) -> Stay {
    let asked = migration.spec.added_node_selector.get(names::HOSTNAME);
    match asked {
        Some(node) if vmi.status.node_name.as_ref() == Some(node) => Stay::Must,
        None if migration.annotation(names::ANNOTATION_WORKLOAD_UPDATE_MIGRATION).is_some() => Stay::May,
        _ => Stay::Never,
    }
}

/// Whether a migration may leave the guest on its node.
pub fn may_stay(vmi: &VirtualMachineInstance, migration: &VirtualMachineInstanceMigration) -> bool {
    stay(vmi, migration) != Stay::Never
}

fn affinity(vmi: &VirtualMachineInstance, role: Role<'_>, view: &View<'_>) -> Option<Affinity> {
    let mut affinity = vmi.spec.affinity.clone();
    let Role::Receive(migration) = role else { return affinity };
    match (stay(vmi, migration), &vmi.status.node_name) {
        (Stay::Must, _) => {}
        (Stay::May, Some(node)) => {
            let here = NodeSelectorRequirement {
                key: names::HOSTNAME.to_owned(),
                operator: "In".to_owned(),
                values: Some(vec![node.clone()]),
            };
            let preference = NodeSelectorTerm { match_expressions: Some(vec![here]), match_fields: None };
            let node_affinity = affinity.get_or_insert_default().node_affinity.get_or_insert_default();
            let preferred = node_affinity.preferred_during_scheduling_ignored_during_execution.get_or_insert_default();
            preferred.push(PreferredSchedulingTerm { preference, weight: 100 });
        }
        _ => keep_away(vmi, affinity.get_or_insert_default(), view),
    }
    affinity
}

/// Never where the guest is now. Only its pod of now is meant: a pod that comes later to the same node for its sake, with
/// another launcher, must not be kept away by this one.
fn keep_away(vmi: &VirtualMachineInstance, affinity: &mut Affinity, view: &View<'_>) {
    let current = vmi::current_pod(vmi, view.world);
    let made_for = current.map(|pod| match pod.label(names::LABEL_MIGRATION_JOB_UID) {
        Some(uid) => ("In", Some(vec![uid.to_owned()])),
        None => ("DoesNotExist", None),
    });
    let made_for = made_for.map(|(operator, values)| LabelSelectorRequirement {
        key: names::LABEL_MIGRATION_JOB_UID.to_owned(),
        operator: operator.to_owned(),
        values,
    });
    let anti: &mut PodAntiAffinity = affinity.pod_anti_affinity.get_or_insert_default();
    anti.required_during_scheduling_ignored_during_execution.get_or_insert_default().push(PodAffinityTerm {
        label_selector: Some(LabelSelector {
            match_labels: Some(BTreeMap::from([(names::LABEL_CREATED_BY.to_owned(), vmi.uid().to_owned())])),
            match_expressions: made_for.map(|term| vec![term]),
        }),
        topology_key: names::HOSTNAME.to_owned(),
        ..PodAffinityTerm::default()
    });
}

/// The node's devices that the pod asks for, where nodes offer them: on a real cluster it gets no others.
fn devices(vmi: &VirtualMachineInstance, role: Role<'_>, world: &World) -> Vec<&'static str> {
    let offered = |name: &str| world.nodes.iter().any(|node| offers(node, name));
    // A guest that is translated stays so wherever it goes.
    let translated = matches!(role, Role::Receive(_)) && vmi.status.accelerator.as_deref() == Some("tcg");
    let kvm = [names::DEVICE_KVM].into_iter().filter(|_| !translated);
    kvm.chain([names::DEVICE_TUN, names::DEVICE_VHOST_NET]).filter(|name| offered(name)).collect()
}

fn offers(node: &Node, device: &str) -> bool {
    let has = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
    let amount = has.and_then(|has| has.get(device)).and_then(|amount| quantity::units(&amount.0));
    amount.is_some_and(|amount| amount > 0)
}

fn resources(vmi: &VirtualMachineInstance, role: Role<'_>, world: &World) -> ResourceRequirements {
    let spec = &vmi.spec;
    let asked = &spec.domain.resources;
    let copy = |list: &ResourceList| -> BTreeMap<String, Quantity> {
        list.iter().map(|(name, amount)| (name.clone(), Quantity(amount.0.clone()))).collect()
    };
    let (mut requests, mut limits) = (copy(&asked.requests), copy(&asked.limits));
    let guest = guest_memory(spec);
    let overhead = overhead(spec);
    let bytes_in = |list: &ResourceList| list.get("memory").and_then(|amount| amount.bytes().ok()).map(i128::from);
    let extra = if asked.overcommit_guest_overhead.unwrap_or(false) { 0 } else { overhead };
    // The guest is never promised less than it asks for, unless the VMI asks for exactly that (overcommitment).
    let memory = bytes_in(&asked.requests).unwrap_or(guest) + extra;
    requests.insert("memory".to_owned(), quantity::bytes(memory));
    if let Some(limit) = bytes_in(&asked.limits) {
        limits.insert("memory".to_owned(), quantity::bytes(limit + overhead));
    }
    if !requests.contains_key("cpu") {
        let request = match limits.get("cpu") {
            Some(limit) => limit.clone(),
            None => Quantity(format!("{}m", i128::from(vcpus(spec)) * 1_000 / CPU_ALLOCATION_RATIO)),
        };
        requests.insert("cpu".to_owned(), request);
    }
    for device in devices(vmi, role, world) {
        requests.insert(device.to_owned(), Quantity("1".to_owned()));
        limits.insert(device.to_owned(), Quantity("1".to_owned()));
    }
    ResourceRequirements {
        requests: Some(requests),
        limits: (!limits.is_empty()).then_some(limits),
        ..ResourceRequirements::default()
    }
}

/// The pod's volumes and where the launcher finds them.
#[derive(Default)]
struct Volumes {
    volumes: Vec<Volume>,
    mounts: Vec<VolumeMount>,
    devices: Vec<VolumeDevice>,
}

/// The pod's volume with what of the guest outlives its VMI (KubeVirt's name).
const STATE: &str = "vm-state";
/// Volume names of the pod that are not the VMI's to use.
const RESERVED: [&str; 4] = ["sockets", "ephemeral-disks", "kernel-boot", STATE];

/// The pod's volume for a volume of the VMI: the same name, unless the pod has one of that name for itself.
pub fn volume_name(name: &str) -> String {
    if RESERVED.contains(&name) { format!("vmi-{name}") } else { name.to_owned() }
}

impl Volumes {
    fn push(&mut self, volume: Volume, path: String, read_only: bool) {
        self.mounts.push(VolumeMount {
            name: volume.name.clone(),
            mount_path: path,
            read_only: read_only.then_some(true),
            ..VolumeMount::default()
        });
        self.volumes.push(volume);
    }

    fn empty_dir(&mut self, name: &str, path: &str) {
        let volume =
            Volume { name: name.to_owned(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() };
        self.push(volume, path.to_owned(), false);
    }

    fn image(&mut self, name: String, image: &str, policy: Option<String>, path: String) {
        let source = ImageVolumeSource { reference: Some(image.to_owned()), pull_policy: policy };
        self.push(Volume { name, image: Some(source), ..Volume::default() }, path, true);
    }

    fn add_all(&mut self, vmi: &VirtualMachineInstance, world: &World) {
        let spec = &vmi.spec;
        let boot = spec.domain.firmware.as_ref().and_then(|firmware| firmware.kernel_boot.as_ref());
        if let Some(container) = boot.and_then(|boot| boot.container.as_ref()) {
            let path = "/var/run/kubevirt/kernel-boot".to_owned();
            self.image("kernel-boot".to_owned(), &container.image, container.image_pull_policy.clone(), path);
        }
        // Claims of disks that come while the guest runs are not the launcher's to hold: others bring it their images.
        for volume in spec.volumes.iter().filter(|volume| !volume.is_hotpluggable()) {
            let claim = volume.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.as_str());
            let claim = claim.and_then(|claim| world.claims.get(&Name::new(vmi.namespace(), claim)));
            self.add(volume, claim.is_some_and(|claim| volumes::is_block(claim)));
        }
    }

    fn add(&mut self, volume: &VmiVolume, is_block: bool) {
        let given = &volume.name;
        let name = volume_name(given);
        if let Some(disk) = &volume.container_disk {
            let path = format!("/var/run/kubevirt/container-disks/{given}");
            self.image(name, &disk.image, disk.image_pull_policy.clone(), path);
        } else if let Some(claim) = &volume.persistent_volume_claim {
            let source =
                PersistentVolumeClaimVolumeSource { claim_name: claim.claim_name.clone(), read_only: claim.read_only };
            let volume = Volume { name, persistent_volume_claim: Some(source), ..Volume::default() };
            if is_block {
                let device_path = format!("/dev/vmi-disks/{given}");
                self.devices.push(VolumeDevice { name: volume.name.clone(), device_path });
                self.volumes.push(volume);
            } else {
                let path = format!("/var/run/kubevirt-private/vmi-disks/{given}");
                self.push(volume, path, claim.read_only.unwrap_or(false));
            }
        } else if let Some(config_map) = &volume.config_map {
            let source = ConfigMapVolumeSource {
                name: config_map.name.clone(),
                optional: config_map.optional,
                ..ConfigMapVolumeSource::default()
            };
            let path = format!("/var/run/kubevirt-private/config-map/{given}");
            self.push(Volume { name, config_map: Some(source), ..Volume::default() }, path, true);
        } else if let Some(secret) = &volume.secret {
            let source = SecretVolumeSource {
                secret_name: Some(secret.secret_name.clone()),
                optional: secret.optional,
                ..SecretVolumeSource::default()
            };
            let path = format!("/var/run/kubevirt-private/secret/{given}");
            self.push(Volume { name, secret: Some(source), ..Volume::default() }, path, true);
        } else if let Some(cloud_init) = &volume.cloud_init_no_cloud {
            self.cloud_init(name, given, cloud_init);
        }
    }

    /// Secrets with cloud-init data: keys `userdata` and `networkdata` side by side in one folder.
    fn cloud_init(&mut self, name: String, given: &str, source: &CloudInitNoCloudSource) {
        let secrets: BTreeSet<&str> = [&source.secret_ref, &source.network_data_secret_ref]
            .into_iter()
            .filter_map(|reference| reference.as_ref())
            .map(|reference| reference.name.as_str())
            .collect();
        let secrets: Vec<&str> = secrets.into_iter().collect();
        let mut volume = Volume { name, ..Volume::default() };
        match secrets.as_slice() {
            [] => return,
            [one] => {
                volume.secret =
                    Some(SecretVolumeSource { secret_name: Some((*one).to_owned()), ..SecretVolumeSource::default() });
            }
            several => {
                let sources = several.iter().map(|one| VolumeProjection {
                    secret: Some(SecretProjection { name: (*one).to_owned(), ..SecretProjection::default() }),
                    ..VolumeProjection::default()
                });
                volume.projected = Some(ProjectedVolumeSource {
                    sources: Some(sources.collect()),
                    ..ProjectedVolumeSource::default()
                });
            }
        }
        self.push(volume, format!("/var/run/kubevirt-private/cloud-init/{given}"), true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn pod_follows_the_architecture() {
        let vmi: VirtualMachineInstance = serde_json::from_value(json!({
            "metadata": {"name": "demo", "namespace": "default", "uid": "u1", "labels": {"app": "web", "kubevirt.io/nodeName": "n"}},
            "spec": {
                "domain": {
                    "cpu": {"cores": 2}, "memory": {"guest": "512Mi"},
                    "firmware": {"kernelBoot": {"container": {"image": "boot:1", "kernelPath": "/k"}}},
                },
                "nodeSelector": {"zone": "a"},
                "networks": [{"name": "default", "pod": {}}, {"name": "lan", "multus": {"networkName": "br"}}],
                "volumes": [
                    {"name": "root", "containerDisk": {"image": "disk:1"}},
                    {"name": "data", "persistentVolumeClaim": {"claimName": "claim"}},
                    {"name": "sockets", "configMap": {"name": "cm"}},
                    {"name": "seed", "cloudInitNoCloud": {"secretRef": {"name": "a"}, "networkDataSecretRef": {"name": "b"}}},
                    {"name": "scratch", "emptyDisk": {"capacity": "1Gi"}},
                ],
            },
        }))
        .unwrap();
        let migration: VirtualMachineInstanceMigration = serde_json::from_value(json!({
            "metadata": {"name": "job", "namespace": "default", "uid": "m1"},
            "spec": {"vmiName": "demo", "addedNodeSelector": {"zone": "b", "disk": "fast"}},
        }))
        .unwrap();
        let (world, settings) = (crate::World::default(), testing::settings());
        let view = testing::view(&world, &settings);
        let pod = build(&vmi, Role::Receive(&migration), &view);
        let value = serde_json::to_value(&pod).unwrap();
        let labels = &value["metadata"]["labels"];
        assert_eq!(labels["kubevirt.io/created-by"], "u1");
        assert_eq!(labels["kubevirt.io/migrationJobUID"], "m1");
        assert_eq!(labels["app"], "web");
        assert!(labels.get("kubevirt.io/nodeName").is_none());
        let spec = &value["spec"];
        assert_eq!(spec["nodeSelector"], json!({"zone": "a", "disk": "fast", "kubevirt.io/schedulable": "true"}));
        let term = &spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0];
        assert_eq!(term["labelSelector"]["matchLabels"]["kubevirt.io/created-by"], "u1");
        let names: Vec<_> = spec["volumes"].as_array().unwrap().iter().map(|volume| volume["name"].clone()).collect();
        assert_eq!(names, ["sockets", "ephemeral-disks", "kernel-boot", "root", "data", "vmi-sockets", "seed"]);
        let requests = &spec["containers"][0]["resources"]["requests"];
        assert_eq!(requests["memory"], "579Mi");
        let mut unseen = vmi.spec.clone();
        unseen.domain.devices.autoattach_graphics_device = Some(false);
        assert_eq!(overhead(&vmi.spec) - overhead(&unseen), 8 * MEBI);
        let mut limited = vmi.spec.clone();
        limited.domain.resources.limits.insert("memory".into(), godwit_api::Quantity("1Gi".into()));
        assert_eq!(overhead(&limited) - overhead(&vmi.spec), (24 + 16 + 8 * 4 + 3 * 10 + 12) * MEBI);
        let smallest = json!({"domain": {"memory": {"guest": "1Gi"}}});
        assert_eq!(overhead(&serde_json::from_value(smallest).unwrap()), (64 + 2) * MEBI);
        assert_eq!(requests["cpu"], "200m");
        let wanted = value["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"].as_str().unwrap();
        assert!(wanted.contains("\"name\":\"br\"") && wanted.contains("\"namespace\":\"default\""), "{wanted}");
        assert_eq!(labels["vmi.kubevirt.io/id"], "demo");
        assert_eq!(spec["containers"][0]["image"], settings.launcher_image);
        let mut elsewhere = migration.clone();
        let annotation = (names::ANNOTATION_TEST_TARGET_IMAGE.to_owned(), "other:1".to_owned());
        elsewhere.metadata.annotations = Some(BTreeMap::from([annotation]));
        let other = build(&vmi, Role::Receive(&elsewhere), &view);
        assert_eq!(other.spec.unwrap().containers[0].image.as_deref(), Some("other:1"));
        let mut allowing = crate::World::default();
        let kubevirt = serde_json::from_value(json!({
            "metadata": {"name": "kubevirt", "namespace": "kubevirt", "uid": "kv"},
            "spec": {"configuration": {"migrations": {"allowPostCopy": true}}},
        }));
        allowing.apply(crate::Object::KubeVirt(std::sync::Arc::new(kubevirt.unwrap())), crate::Source::Watch);
        // Devices are asked for where nodes offer them.
        let asks = |vmi: &VirtualMachineInstance, role, world: &crate::World| -> Vec<String> {
            let limits = resources(vmi, role, world).limits.unwrap_or_default();
            limits.into_keys().filter(|name| name.starts_with("devices.")).collect()
        };
        assert_eq!(asks(&vmi, Role::Start, &allowing), [""; 0]);
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": "n"},
            "status": {"allocatable": {names::DEVICE_KVM: "1k", names::DEVICE_TUN: "1k", names::DEVICE_VHOST_NET: "0"}},
        }))
        .unwrap();
        allowing.apply(crate::Object::Node(std::sync::Arc::new(node)), crate::Source::Watch);
        assert_eq!(asks(&vmi, Role::Start, &allowing), [names::DEVICE_KVM, names::DEVICE_TUN]);
        let mut translated = vmi.clone();
        translated.status.accelerator = Some("tcg".into());
        assert_eq!(asks(&translated, Role::Receive(&migration), &allowing), [names::DEVICE_TUN]);
        // The pod that starts the guest differs in name and knows nothing of a migration.
        let (world, settings) = (crate::World::default(), testing::settings());
        let first = build(&vmi, Role::Start, &testing::view(&world, &settings));
        assert_ne!(first.metadata.name, pod.metadata.name);
        assert!(first.spec.unwrap().affinity.is_none());
    }
}
