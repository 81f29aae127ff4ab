//! Every label, annotation, finalizer, condition, reason and event that clients match on, spelled once.

pub mod conditions;
pub mod events;
pub mod fence;
pub mod keys;
mod made;

pub use keys::*;
pub use made::*;

/// The API group.
pub const GROUP: &str = "kubevirt.io";
/// The API group of MigrationPolicies.
pub const GROUP_MIGRATIONS: &str = "migrations.kubevirt.io";
/// Where a service account's user carries the node of its pod.
pub const EXTRA_NODE_NAME: &str = "authentication.kubernetes.io/node-name";
/// The namespace that godwit is installed in unless another one is named ([`crate::Installation`]).
pub const KUBEVIRT_NAMESPACE: &str = "kubevirt";
/// The name of the KubeVirt object.
pub const KUBEVIRT_NAME: &str = "kubevirt";
/// The seeds' configuration ConfigMap, in the installation's namespace.
pub const CONFIG_MAP_NAME: &str = "kubevirt-config";
/// Godwit's own: the ConfigMap in the installation's namespace that holds the migrations' slots.
pub const SLOTS_NAME: &str = "godwit-migration-slots";
/// The Lease in the installation's namespace that the leading controller holds.
pub const CONTROLLER_LEASE: &str = "virt-controller";
/// The Secret in the installation's namespace with the authority of godwit's own certificates.
pub const CA_SECRET: &str = "godwit-ca";
/// The ConfigMap in the installation's namespace with the certificates of that authority that are good: the old one and the new
/// one while it is changed.
pub const CA_BUNDLE: &str = "godwit-ca-bundle";
/// The signer of handlers' certificates.
pub const NODE_SIGNER: &str = "godwit.io/node";
/// The APIServices of `subresources.kubevirt.io`.
pub const API_SERVICES: [&str; 2] = ["v1.subresources.kubevirt.io", "v1alpha3.subresources.kubevirt.io"];
/// `generateName` of migrations that an evacuation makes.
pub const EVACUATION_GENERATE_NAME: &str = "kubevirt-evacuation-";
/// `generateName` of migrations that `virtualmachines/migrate` makes.
pub const MIGRATE_VM_GENERATE_NAME: &str = "kubevirt-migrate-vm-";
/// `generateName` of migrations that a workload update makes.
pub const WORKLOAD_UPDATE_GENERATE_NAME: &str = "kubevirt-workload-update-";
/// `generateName` of migrations that bring a VM back after a maintenance.
pub const HOMECOMING_GENERATE_NAME: &str = "godwit-homecoming-";
/// Launcher pods are named `virt-launcher-<vmi>-<5 random>`.
pub const LAUNCHER_POD_PREFIX: &str = "virt-launcher-";
/// Attachment pods, which hold the claims of disks that are plugged in while the guest runs, are named `hp-volume-<random>`.
pub const ATTACHMENT_POD_PREFIX: &str = "hp-volume-";
/// The container of an attachment pod.
pub const ATTACHMENT_CONTAINER: &str = "hotplug-disk";
/// The socket in an attachment pod's volume `sockets` that gives the claims' images away.
pub const ATTACHMENT_SOCKET: &str = "hotplug.sock";
/// The launcher's container.
pub const COMPUTE_CONTAINER: &str = "compute";
/// How many finished migrations of a VMI are kept.
pub const FINISHED_MIGRATIONS_KEPT: usize = 5;
/// Inner port of the control channel in `targetDirectMigrationNodePorts`.
pub const MIGRATION_PORT_CONTROL: i32 = 0;
/// Inner port of the memory stream.
pub const MIGRATION_PORT_MEMORY: i32 = 49152;
/// Inner port of the block stream.
pub const MIGRATION_PORT_BLOCK: i32 = 49153;
/// `migrationState.migrationNetworkType` when migrations use the nodes' own network.
pub const MIGRATION_NETWORK_POD: &str = "Pod";
/// The same when they use a network of their own.
pub const MIGRATION_NETWORK_OWN: &str = "Migration";
/// The interface of handlers' pods that is in that network (KubeVirt's name).
pub const MIGRATION_INTERFACE: &str = "migration0";
/// `status.migrationTransport`.
pub const MIGRATION_TRANSPORT_UNIX: &str = "Unix";
/// `status.reason` of a VMI whose node does not answer.
pub const REASON_NODE_UNRESPONSIVE: &str = "NodeUnresponsive";
/// `failureReason` of a migration that was cancelled or timed out.
pub const FAILURE_ABORTED: &str = "Live migration has been aborted";
/// `failureReason` of a migration whose target pod died before the start.
pub const FAILURE_TARGET_POD_DOWN: &str = "Target pod is down";
/// An unschedulable target pod is given up after this many seconds.
pub const UNSCHEDULABLE_POD_TIMEOUT_SECONDS: i64 = 300;
/// A target pod that does not become ready is given up after this many seconds.
pub const PENDING_POD_TIMEOUT_SECONDS: i64 = 900;

/// The standalone mode's host image.
pub const HOST_IMAGE: &str = "godwit.local/host";
/// The annotation that asks for secondary networks (Multus).
pub const NETWORKS_ANNOTATION: &str = "k8s.v1.cni.cncf.io/networks";
/// The annotation in which the secondary networks' state is answered (Multus).
pub const NETWORK_STATUS_ANNOTATION: &str = "k8s.v1.cni.cncf.io/network-status";
