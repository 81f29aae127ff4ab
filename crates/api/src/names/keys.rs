//! Labels, annotations and finalizers.

/// `virt-launcher` on launcher pods.
pub const LABEL_APP: &str = "kubevirt.io";
/// The value of [`LABEL_APP`] on launcher pods.
pub const APP_VIRT_LAUNCHER: &str = "virt-launcher";
/// The value of [`LABEL_APP`] on pods that hold the claims of disks which are plugged in while the guest runs.
pub const APP_HOTPLUG_DISK: &str = "hotplug-disk";
/// The VMI's UID, on launcher pods.
pub const LABEL_CREATED_BY: &str = "kubevirt.io/created-by";
/// The VMIM's UID, on target pods.
pub const LABEL_MIGRATION_JOB_UID: &str = "kubevirt.io/migrationJobUID";
/// The node where the guest runs, on VMIs and launcher pods.
pub const LABEL_NODE_NAME: &str = "kubevirt.io/nodeName";
/// The node that the guest goes to, on VMIs during a migration.
pub const LABEL_MIGRATION_TARGET_NODE_NAME: &str = "kubevirt.io/migrationTargetNodeName";
/// The VMI's name, on VMIMs.
pub const LABEL_VMI_NAME: &str = "kubevirt.io/vmi-name";
/// The VM's name, on launcher pods.
pub const LABEL_VM: &str = "kubevirt.io/vm";
/// The VMI's name, on launcher pods (deprecated by KubeVirt, still read by others).
pub const LABEL_DEPRECATED_VM_NAME: &str = "vm.kubevirt.io/name";
/// The VMI's name or its hash, on launcher pods.
pub const LABEL_VMI_ID: &str = "vmi.kubevirt.io/id";
/// The launcher's image is not the current one.
pub const LABEL_OUTDATED_LAUNCHER_IMAGE: &str = "kubevirt.io/outdatedLauncherImage";
/// `true` on nodes that take launcher pods.
pub const LABEL_SCHEDULABLE: &str = "kubevirt.io/schedulable";
/// Reserved by KubeVirt.
pub const LABEL_INSTALL_STRATEGY: &str = "kubevirt.io/install-strategy";
/// Prefix of labels on nodes: CPU models that can run there.
pub const LABEL_PREFIX_CPU_MODEL: &str = "cpu-model.node.kubevirt.io/";
/// Prefix of labels on nodes: CPU models that can be migrated there.
pub const LABEL_PREFIX_CPU_MODEL_MIGRATION: &str = "cpu-model-migration.node.kubevirt.io/";
/// Prefix of labels on nodes: CPU features.
pub const LABEL_PREFIX_CPU_FEATURE: &str = "cpu-feature.node.kubevirt.io/";
/// Prefix of labels on nodes: the CPU's vendor.
pub const LABEL_PREFIX_CPU_VENDOR: &str = "cpu-vendor.node.kubevirt.io/";
/// Prefix of labels on nodes: the host's own CPU model.
pub const LABEL_PREFIX_HOST_MODEL_CPU: &str = "host-model-cpu.node.kubevirt.io/";
/// Prefix of labels on nodes: what the host's model requires.
pub const LABEL_PREFIX_HOST_MODEL_REQUIRED_FEATURES: &str = "host-model-required-features.node.kubevirt.io/";
/// Prefix of labels on nodes: machine types.
pub const LABEL_PREFIX_MACHINE_TYPE: &str = "machine-type.node.kubevirt.io/";
/// Prefix of labels on nodes: Hyper-V features.
pub const LABEL_PREFIX_HYPERV: &str = "hyperv.node.kubevirt.io/";

/// What a pod asks for to get `/dev/kvm`.
pub const DEVICE_KVM: &str = "devices.kubevirt.io/kvm";
/// What a pod asks for to get `/dev/net/tun`.
pub const DEVICE_TUN: &str = "devices.kubevirt.io/tun";
/// What a pod asks for to get `/dev/vhost-net`.
pub const DEVICE_VHOST_NET: &str = "devices.kubevirt.io/vhost-net";

/// Labels that nobody but godwit may put on a VMI.
pub const RESERVED_VMI_LABELS: [&str; 6] = [
    LABEL_CREATED_BY,
    LABEL_MIGRATION_JOB_UID,
    LABEL_NODE_NAME,
    LABEL_MIGRATION_TARGET_NODE_NAME,
    LABEL_SCHEDULABLE,
    LABEL_INSTALL_STRATEGY,
];

/// The VMI's name, on launcher pods.
pub const ANNOTATION_DOMAIN: &str = "kubevirt.io/domain";
/// The VMI's name, on attachment pods.
pub const ANNOTATION_OWNER_VMI_NAME: &str = "kubevirt.io/owner-vmi-name";
/// The VMI's UID, on attachment pods.
pub const ANNOTATION_OWNER_VMI_UID: &str = "kubevirt.io/owner-vmi-uid";
/// How the guest's memory is made, on launcher pods, and on VMIs that want it otherwise than the cluster: `shareable` (another
/// QEMU of the node can map it, so that the guest gets a new launcher without a copy) or `private`.
pub const ANNOTATION_GUEST_MEMORY: &str = "godwit.io/guest-memory";
/// Value of [`ANNOTATION_GUEST_MEMORY`].
pub const GUEST_MEMORY_SHAREABLE: &str = "shareable";
/// Value of [`ANNOTATION_GUEST_MEMORY`].
pub const GUEST_MEMORY_PRIVATE: &str = "private";
/// The version of the launcher that a launcher pod was made for.
pub const ANNOTATION_LAUNCHER_VERSION: &str = "godwit.io/launcher-version";
/// The name of the guest whose TPM and EFI variables are kept there, on claims.
pub const LABEL_PERSISTENT_STATE: &str = "persistent-state-for";
/// The migration that a claim was made for, on claims: what is kept for a guest comes there with it.
pub const LABEL_MIGRATION_NAME: &str = "kubevirt.io/migrationName";
/// The name under which `status.volumeStatus` shows the claim with a guest's TPM and EFI variables.
pub const PERSISTENT_STATE_VOLUME: &str = "persistent-state-for-this-vm";
/// The VMIM's name, on target pods.
pub const ANNOTATION_MIGRATION_JOB_NAME: &str = "kubevirt.io/migrationJobName";
/// When the guest ran at the target, on target pods (for the CNI).
pub const ANNOTATION_MIGRATION_TARGET_READY: &str = "kubevirt.io/migration-target-ready-timestamp";
/// The launcher migrates over unix sockets, on launcher pods.
pub const ANNOTATION_MIGRATION_TRANSPORT_UNIX: &str = "kubevirt.io/migrationTransportUnix";
/// The node that is being emptied, on VMIMs of an evacuation.
pub const ANNOTATION_EVACUATION_MIGRATION: &str = "kubevirt.io/evacuationMigration";
/// On VMIMs of a workload update.
pub const ANNOTATION_WORKLOAD_UPDATE_MIGRATION: &str = "kubevirt.io/workloadUpdateMigration";
/// Seconds for an unschedulable target pod, on VMIMs.
pub const ANNOTATION_UNSCHEDULABLE_POD_TIMEOUT: &str = "kubevirt.io/migrationUnschedulablePodTimeoutSeconds";
/// Seconds for a target pod that does not become ready, on VMIMs.
pub const ANNOTATION_PENDING_POD_TIMEOUT: &str = "kubevirt.io/migrationPendingPodTimeoutSeconds";
/// Seconds for utility volumes, on VMIMs.
pub const ANNOTATION_UTILITY_VOLUMES_TIMEOUT: &str = "kubevirt.io/migrationUtilityVolumesTimeoutSeconds";
/// Godwit's own: the user who created a VMIM, on VMIMs. Set by admission; what a client says is replaced.
pub const ANNOTATION_REQUESTED_BY: &str = "godwit.io/requested-by";
/// Godwit's own, on the KubeVirt object: `v1alpha3` for the old meaning of feature gates ([`crate::gates`]).
pub const ANNOTATION_FEATURE_GATES: &str = "godwit.io/feature-gates";
/// Godwit's own: bytes a second for this migration from now on, also while it runs, on VMIMs. A quantity; `0` is unlimited.
pub const ANNOTATION_BANDWIDTH: &str = "godwit.io/bandwidth-per-migration";
/// KubeVirt's test hook: no back-off, on VMIMs.
pub const ANNOTATION_TEST_IGNORE_BACKOFF: &str = "kubevirt.io/func-test-ignore-migration-backoff";
/// The newest API version that the controller saw.
pub const ANNOTATION_LATEST_OBSERVED_API_VERSION: &str = "kubevirt.io/latest-observed-api-version";
/// The stored API version that the controller saw.
pub const ANNOTATION_STORAGE_OBSERVED_API_VERSION: &str = "kubevirt.io/storage-observed-api-version";
/// Allows live migration with bridge binding on the pod network, on VMIs.
pub const ANNOTATION_ALLOW_POD_BRIDGE_MIGRATION: &str = "kubevirt.io/allow-pod-bridge-network-live-migration";
/// `descheduler` when the descheduler asked for the eviction, on VMIs.
pub const ANNOTATION_EVICTION_SOURCE: &str = "kubevirt.io/eviction-source";
/// The value of [`ANNOTATION_EVICTION_SOURCE`] that makes an evacuation less urgent.
pub const DESCHEDULER: &str = "descheduler";
/// Ignition data, on VMIs (KubeVirt needs a gate for it).
pub const ANNOTATION_IGNITION: &str = "kubevirt.io/ignitiondata";
/// The handler's sign of life, on nodes (RFC 3339).
pub const ANNOTATION_HEARTBEAT: &str = "kubevirt.io/heartbeat";
/// Godwit's own: the CPU models that guests can have on a node and how many features each has (a JSON object), on nodes.
pub const ANNOTATION_CPU_MODELS: &str = "godwit.io/cpu-models";
/// Godwit's own: guests' pods may be of any user on a node, whose handler gives them what they must open; on nodes. The value is that of
/// [`ANNOTATION_HEARTBEAT`] from the same handler: an older one, which gives nothing, goes on with that alone.
pub const ANNOTATION_GIVES_FILES: &str = "godwit.io/gives-files";
/// Godwit's own: the network that migrations to and from a node go over, where it has one for that
/// ([`crate::MigrationNetwork`], a JSON object, with the [`ANNOTATION_HEARTBEAT`] of the handler that tells it); on nodes.
pub const ANNOTATION_MIGRATION_NETWORK: &str = "godwit.io/migration-network";
/// Godwit's own: what executes guests on a node, `kvm` or `tcg`; label and annotation of nodes.
pub const LABEL_ACCELERATOR: &str = "godwit.dev/accelerator";
/// The descheduler shall ask, not delete, on launcher pods.
pub const ANNOTATION_DESCHEDULER_EVICT_ONLY: &str = "descheduler.alpha.kubernetes.io/request-evict-only";
/// An eviction is under way, on launcher pods.
pub const ANNOTATION_DESCHEDULER_EVICTION_IN_PROGRESS: &str = "descheduler.alpha.kubernetes.io/eviction-in-progress";
/// The container that `kubectl logs` shows.
pub const ANNOTATION_DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";
/// KubeVirt's test hook: the migration fails at once, on VMIs.
pub const ANNOTATION_TEST_FORCE_MIGRATION_FAILURE: &str = "kubevirt.io/func-test-force-launcher-migration-failure";
/// KubeVirt's test hook: the target never becomes ready, on VMIs.
pub const ANNOTATION_TEST_BLOCK_TARGET_PREPARATION: &str = "kubevirt.io/func-test-block-migration-target-preparation";
/// KubeVirt's test hook: another image for the target pod, on VMIMs.
pub const ANNOTATION_TEST_TARGET_IMAGE: &str = "kubevirt.io/func-test-migration-target-image-override";

/// Holds a VMIM until it is final.
pub const FINALIZER_MIGRATION: &str = "kubevirt.io/migrationJobFinalize";
/// Holds a VMI until its guest is gone.
pub const FINALIZER_VMI: &str = "kubevirt.io/foregroundDeleteVirtualMachine";
/// Holds a VM until its VMI is gone.
pub const FINALIZER_VM: &str = "kubevirt.io/virtualMachineControllerFinalize";
/// KubeVirt's readiness gate of launcher pods.
pub const READINESS_GATE_UNPAUSED: &str = "kubevirt.io/virtual-machine-unpaused";
/// Namespace of the leases of nodes in maintenance, which all of medik8s' operators share.
pub const MAINTENANCE_LEASES_MEDIK8S: &str = "medik8s-leases";
/// Namespace of these leases for the operators before.
pub const MAINTENANCE_LEASES_KUBEVIRT: &str = "node-maintenance";
/// The taint of nodes in a maintenance of `nodemaintenance.medik8s.io`.
pub const TAINT_DRAIN_MEDIK8S: &str = "medik8s.io/drain";
/// Keeps other operators from repairing a node in a maintenance of `nodemaintenance.medik8s.io`.
pub const LABEL_EXCLUDE_FROM_REMEDIATION: &str = "remediation.medik8s.io/exclude-from-remediation";
/// Godwit's own: what a NodeMaintenance has done to its node, on the node.
pub const ANNOTATION_MAINTENANCE: &str = "godwit.io/maintenance";
/// Godwit's own: the node that a VM comes back to after its maintenance, on VMIs.
pub const ANNOTATION_HOME: &str = "godwit.io/home";
/// Godwit's own: why that node does not take the VM back for now, on VMIs.
pub const ANNOTATION_HOME_CLOSED: &str = "godwit.io/home-closed";
/// Godwit's own: the node that a migration brings its VM back to, on VMIMs.
pub const ANNOTATION_HOMECOMING: &str = "godwit.io/homecoming";
/// The taint that empties a node.
pub const TAINT_DRAIN: &str = "kubevirt.io/drain";
/// Godwit's own, on a node's fence lease: the nodes whose handlers this one asks before it puts its fence off, sorted, with commas
/// between; [`FENCE_NO_PEERS`] when there is no other node. Without it the fence is never put off (docs/fencing.md).
pub const ANNOTATION_FENCE_PEERS: &str = "godwit.io/fence-peers";
/// Value of [`ANNOTATION_FENCE_PEERS`]: nobody could take the guests, so they run on for as long as the control plane is away.
pub const FENCE_NO_PEERS: &str = "*";
/// Godwit's own, on a node's fence lease: `address:port` where its handler tells other handlers whether it has contact.
pub const ANNOTATION_FENCE_ADDRESS: &str = "godwit.io/fence-address";
/// Godwit's own, on a node's fence lease: the controller counts the node's guests as dead. The value is the lease's `renewTime`
/// as it was then, so that any further renewal ends it. It is written on the revision that was decided on; the handler that finds it
/// kills whatever still runs before it renews again.
pub const ANNOTATION_NODE_LOST: &str = "godwit.io/node-lost";
/// Godwit's own, on nodes: when the handler's fence last stopped guests (RFC 3339).
pub const ANNOTATION_FENCED: &str = "godwit.io/fenced";
