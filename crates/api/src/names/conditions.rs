//! Condition types, their reasons and their messages.

/// The VMI's pod is ready and the guest runs.
pub const READY: &str = "Ready";
/// The VMI can be migrated.
pub const LIVE_MIGRATABLE: &str = "LiveMigratable";
/// The VMI's storage can be migrated.
pub const STORAGE_LIVE_MIGRATABLE: &str = "StorageLiveMigratable";
/// The guest is paused.
pub const PAUSED: &str = "Paused";
/// The guest agent answers.
pub const AGENT_CONNECTED: &str = "AgentConnected";
/// The guest agent is too old.
pub const AGENT_VERSION_NOT_SUPPORTED: &str = "AgentVersionNotSupported";
/// The guest runs without hardware virtualisation.
pub const SOFTWARE_EMULATION: &str = "SoftwareEmulation";
/// The VMI shall leave its node.
pub const EVICTION_REQUESTED: &str = "EvictionRequested";
/// Godwit's own, on VMIs: the evacuation has given up moving it, and why.
pub const EVACUATION_STOPPED: &str = "EvacuationStopped";
/// Godwit's own, on the KubeVirt object: whether everything that its configuration says is applied.
pub const CONFIGURATION_APPLIED: &str = "ConfigurationApplied";
/// A change needs a migration.
pub const MIGRATION_REQUIRED: &str = "MigrationRequired";
/// CPUs are being added.
pub const HOT_VCPU_CHANGE: &str = "HotVCPUChange";
/// Memory is being added.
pub const HOT_MEMORY_CHANGE: &str = "HotMemoryChange";
/// Volumes are being changed.
pub const VOLUMES_CHANGE: &str = "VolumesChange";
/// DataVolumes are filled.
pub const DATA_VOLUMES_READY: &str = "DataVolumesReady";
/// The VMI was last synchronised well.
pub const SYNCHRONIZED: &str = "Synchronized";
/// Godwit's own reason of [`SYNCHRONIZED`]: the link of a post-copy broke, and the guest waits for another one.
pub const POST_COPY_LINK_BROKEN: &str = "PostCopyLinkBroken";
/// The launcher pod has a node.
pub const POD_SCHEDULED: &str = "PodScheduled";
/// The VMI is being made.
pub const PROVISIONING: &str = "Provisioning";
/// The VM failed.
pub const FAILURE: &str = "Failure";
/// The VM needs a restart for a change.
pub const RESTART_REQUIRED: &str = "RestartRequired";

/// On VMIMs: somebody deleted it.
pub const MIGRATION_ABORT_REQUESTED: &str = "migrationAbortRequested";
/// On VMIMs: the target pod does not fit into the quota.
pub const MIGRATION_REJECTED_BY_RESOURCE_QUOTA: &str = "migrationRejectedByResourceQuota";
/// On VMIMs: waits for utility volumes.
pub const MIGRATION_BLOCKED_BY_UTILITY_VOLUMES: &str = "migrationBlockedByUtilityVolumes";
/// On VMIMs: waits for a backup.
pub const MIGRATION_BLOCKED_BY_BACKUP: &str = "migrationBlockedByBackup";
/// Godwit's own, on VMIMs: waits, and for what.
pub const MIGRATION_WAITING: &str = "Waiting";
/// Godwit's own, on VMIMs: failed, and why.
pub const MIGRATION_FAILED: &str = "Failed";

/// Reasons of `Ready`=False and their messages.
pub mod ready {
    /// There is no launcher pod.
    pub const POD_NOT_EXISTS: (&str, &str) = ("PodNotExists", "virt-launcher pod has not yet been scheduled");
    /// The launcher pod is going.
    pub const POD_TERMINATING: (&str, &str) = ("PodTerminating", "virt-launcher pod is terminating");
    /// The guest does not run.
    pub const GUEST_NOT_RUNNING: (&str, &str) = ("GuestNotRunning", "Guest VM is not reported as running");
    /// The launcher pod says nothing of being ready.
    pub const POD_CONDITION_MISSING: (&str, &str) =
        ("PodConditionMissing", "virt-launcher pod is missing the Ready condition");
}

/// Reasons of `Paused` and their messages.
pub mod paused {
    /// A user did.
    pub const BY_USER: (&str, &str) = ("PausedByUser", "VMI was paused by user");
    /// The migration did, so that it ends.
    pub const BY_MIGRATION_MONITOR: (&str, &str) =
        ("PausedByMigrationMonitor", "VMI was paused by the migration monitor");
    /// A disk failed.
    pub const IO_ERROR: (&str, &str) = ("PausedIOError", "VMI was paused, low-level IO error detected");
}

/// `EvictionRequested`=True.
pub const EVICTION_REQUESTED_REASON: (&str, &str) = ("EvictionRequested", "VMI is marked for eviction");

/// Reasons of `LiveMigratable`=False, in KubeVirt's spelling.
pub mod live_migratable {
    /// An interface cannot move.
    pub const INTERFACE: &str = "InterfaceNotLiveMigratable";
    /// A disk cannot move.
    pub const DISKS: &str = "DisksNotLiveMigratable";
    /// The CPU model cannot move (the constant's name is KubeVirt's).
    pub const CPU_MODE: &str = "CPUModeLiveMigratable";
    /// A device of the host cannot move.
    pub const HOST_DEVICE: &str = "HostDeviceNotLiveMigratable";
    /// The TPM has failed while the guest ran (Godwit's own).
    pub const TPM: &str = "TPMNotLiveMigratable";
    /// Memory encryption.
    pub const SEV: &str = "SEVNotLiveMigratable";
    /// Trust domains.
    pub const TDX: &str = "TDXNotLiveMigratable";
    /// IBM Secure Execution.
    pub const SECURE_EXECUTION: &str = "SecureExecutionNotLiveMigratable";
    /// Hyper-V passthrough.
    pub const HYPERV_PASSTHROUGH: &str = "HypervPassthroughNotLiveMigratable";
    /// Hyper-V reenlightenment without a known TSC frequency.
    pub const NO_TSC_FREQUENCY: &str = "NoTSCFrequencyNotLiveMigratable";
    /// SCSI persistent reservations (only in the message of `StorageLiveMigratable`).
    pub const PERSISTENT_RESERVATION: &str = "PersistentReservationNotLiveMigratable";
    /// The reason of `StorageLiveMigratable`=False.
    pub const STORAGE: &str = "NotMigratable";
}
