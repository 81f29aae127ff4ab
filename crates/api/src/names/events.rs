//! Event components, reasons and messages, exactly KubeVirt's.

/// Source component of the VM, VMI and VMIM controllers.
pub const COMPONENT_CONTROLLER: &str = "virtualmachine-controller";
/// Source component of the evacuation controller.
pub const COMPONENT_EVACUATION: &str = "evacuation-controller";
/// Source component of the node controller.
pub const COMPONENT_NODE: &str = "node-controller";
/// Source component of the workload updater.
pub const COMPONENT_WORKLOAD_UPDATE: &str = "workload-update-controller";
/// Source component of the disruption budget controller.
pub const COMPONENT_DISRUPTION_BUDGET: &str = "disruptionbudget-controller";
/// Source component of the NodeMaintenance controller.
pub const COMPONENT_MAINTENANCE: &str = "nodemaintenance-controller";
/// Source component of the handler (its host is the node).
pub const COMPONENT_HANDLER: &str = "virt-handler";

/// Event type of what is as it should be.
pub const NORMAL: &str = "Normal";
/// Event type of what is not.
pub const WARNING: &str = "Warning";

/// Event reasons.
pub mod reason {
    #![allow(missing_docs, reason = "the names say it; the texts are KubeVirt's")]
    pub const SUCCESSFUL_CREATE: &str = "SuccessfulCreate";
    pub const FAILED_CREATE: &str = "FailedCreate";
    pub const VOLUME_READY: &str = "VolumeReady";
    pub const VOLUME_UNMOUNTED: &str = "VolumeUnMountedFromPod";
    pub const SUCCESSFUL_DELETE: &str = "SuccessfulDelete";
    pub const FAILED_DELETE: &str = "FailedDelete";
    pub const SUCCESSFUL_HAND_OVER: &str = "SuccessfulHandOver";
    pub const FAILED_HAND_OVER: &str = "FailedHandOver";
    pub const SUCCESSFUL_MIGRATION: &str = "SuccessfulMigration";
    pub const FAILED_MIGRATION: &str = "FailedMigration";
    pub const SUCCESSFUL_ABORT_MIGRATION: &str = "SuccessfulAbortMigration";
    pub const FAILED_ABORT_MIGRATION: &str = "FailedAbortMigration";
    pub const MIGRATION_TARGET_POD_UNSCHEDULABLE: &str = "migrationTargetPodUnschedulable";
    pub const MIGRATION_BACKOFF: &str = "MigrationBackoff";
    pub const NO_SUITABLE_NODES_FOR_HOST_MODEL: &str = "NoSuitableNodesForHostModelMigration";
    pub const UTILITY_VOLUME_MIGRATION_PENDING: &str = "UtilityVolumeMigrationPending";
    pub const SUCCESSFUL_EVICT: &str = "SuccessfulEvict";
    pub const FAILED_EVICT: &str = "FailedEvict";
    pub const NODE_UNRESPONSIVE: &str = "NodeUnresponsive";
    pub const PREPARING_TARGET: &str = "PreparingTarget";
    pub const MIGRATING: &str = "Migrating";
    pub const MIGRATED: &str = "Migrated";
    pub const CREATED: &str = "Created";
    pub const STARTED: &str = "Started";
    pub const SHUTTING_DOWN: &str = "ShuttingDown";
    pub const DELETED: &str = "Deleted";
    pub const STOPPED: &str = "Stopped";
    pub const SYNC_FAILED: &str = "SyncFailed";
    // Ours: the guest was killed because its node had lost its lease.
    pub const GUEST_FENCED: &str = "GuestFenced";
    // Ours: the guest was to reboot by its power button, and did not react.
    pub const SOFT_REBOOT_FAILED: &str = "SoftRebootFailed";
    // Ours, on the node: its handler says how many guests were fenced, and why.
    pub const NODE_FENCED: &str = "NodeFenced";
    // Ours, on the node and on the VMI: the guest had to be killed, and its processes do not die.
    pub const GUEST_NOT_DEAD: &str = "GuestNotDead";
}

/// Event messages without holes.
pub mod message {
    #![allow(missing_docs, reason = "the names say it; the texts are KubeVirt's")]
    pub const HAND_OVER: &str = "Migration target pod is ready for preparation by virt-handler.";
    pub const MIGRATION_SUCCEEDED: &str = "Source node reported migration succeeded";
    pub const MIGRATION_FAILED_NO_VMI: &str = "Migration failed because vmi does not exist.";
    pub const MIGRATION_FAILED_VMI_SHUTDOWN: &str = "Migration failed vmi shutdown during migration.";
    pub const MIGRATION_FAILED_CANCELED: &str = "Migration failed due to being canceled";
    pub const MIGRATION_FAILED_TARGET_POD_SHUTDOWN: &str =
        "Migration failed because target pod shutdown during migration";
    pub const MIGRATION_FAILED_TARGET_POD_REMOVED: &str = "Migration target pod was removed during active migration.";
    pub const MIGRATION_FAILED_STATE_CLEARED: &str = "VMI's migration state was cleared during the active migration.";
    pub const MIGRATION_FAILED_STATE_TAKEN_OVER: &str =
        "VMI's migration state was taken over by another migration job during active migration.";
    pub const MIGRATION_FAILED_BY_SOURCE: &str = "source node reported migration failed";
    pub const MIGRATION_FAILED_ATTACHMENT_POD: &str =
        "Migration failed because target attachment pod shutdown during migration";
    pub const MIGRATION_NOT_ELIGIBLE: &str =
        "VMI is not eligible for migration because another migration job is in progress.";
    pub const MIGRATION_ABORT: &str = "Migration is ready to be canceled by virt-handler.";
    pub const NODE_UNRESPONSIVE: &str = "virt-handler is not responsive, marking node as unresponsive";
    pub const NODE_ORPHANED_VMIS: &str = "virt-handler is not present, there are orphaned vmis on this node. Run \
                                          virt-handler on this node to migrate or remove them.";
    pub const TARGET_PREPARED: &str = "VirtualMachineInstance Migration Target Prepared.";
    pub const MIGRATING: &str = "VirtualMachineInstance is migrating.";
    pub const ABORTING: &str = "VirtualMachineInstance is aborting migration.";
    pub const MIGRATED_UNKNOWN_HOST: &str = "The VirtualMachineInstance migrated to unknown host.";
    pub const MIGRATED_NEVER_SEEN: &str = "The VirtualMachineInstance's domain was never observed on the target after \
                                           the migration completed within the timeout period.";
    pub const DEFINED: &str = "VirtualMachineInstance defined.";
    pub const STARTED: &str = "VirtualMachineInstance started.";
    pub const GRACEFUL_SHUTDOWN: &str = "Signaled Graceful Shutdown";
    pub const DELETION: &str = "Signaled Deletion";
    pub const SHUT_DOWN: &str = "The VirtualMachineInstance was shut down.";
    pub const CRASHED: &str = "The VirtualMachineInstance crashed.";
}

/// On the VMIM, reason `SuccessfulCreate`.
pub fn created_target_pod(pod: &str) -> String {
    format!("Created migration target pod {pod}")
}

/// On the VMI, reason `SuccessfulCreate`: a launcher pod.
pub fn created_pod(pod: &str) -> String {
    format!("Created virtual machine pod {pod}")
}

/// On the VMI, reason `SuccessfulCreate`: the pod that holds the claims of disks which come while the guest runs.
pub fn created_attachment_pod(pod: &str) -> String {
    format!("Created attachment pod {pod}")
}

/// On the VMI, reason `SuccessfulDelete`.
pub fn deleted_attachment_pod(pod: &str) -> String {
    format!("Deleted attachment pod {pod}")
}

/// On the VMI, reason `VolumeReady`.
pub fn volume_ready(volume: &str) -> String {
    format!("Successfully attach hotplugged volume {volume} to VM")
}

/// On the VMI, reason `VolumeUnMountedFromPod`.
pub fn volume_unmounted(volume: &str) -> String {
    format!("Volume {volume} has been unmounted from virt-launcher pod")
}

/// On the VMI, reason `FailedCreate`.
pub fn failed_to_create_pod(error: &str) -> String {
    format!("Error creating pod: {error}")
}

/// On the VMIM, reason `FailedHandOver`.
pub fn failed_hand_over(error: &str) -> String {
    format!("Failed to set MigrationStat in VMI status. :{error}")
}

/// On the VMIM, reason `migrationTargetPodUnschedulable`.
pub fn target_pod_unschedulable(namespace: &str, vmi: &str) -> String {
    format!("Migration target pod for VMI [{namespace}/{vmi}] is currently unschedulable.")
}

/// On the VMIM, reason `SuccessfulDelete`: the migration was cancelled.
pub fn deleted_canceled_pod(namespace: &str, pod: &str) -> String {
    format!("migration canceled and pod {namespace}/{pod} is deleted")
}

/// On the VMIM, reason `SuccessfulDelete`: the target pod was unschedulable for too long.
pub fn deleted_unschedulable_pod(namespace: &str, pod: &str) -> String {
    format!("unschedulable pod {namespace}/{pod} timeout period exceeded")
}

/// On the VMIM, reason `SuccessfulDelete`: the target pod was not ready for too long.
pub fn deleted_pending_pod(namespace: &str, pod: &str) -> String {
    format!("pending pod {namespace}/{pod} timeout period exceeded")
}

/// On the VMI, reason `MigrationBackoff`.
pub fn migration_backoff(namespace: &str, vmi: &str) -> String {
    format!("backoff migrating vmi {namespace}/{vmi}")
}

/// On the VMI, reason `FailedMigration`: the target pod died before the start.
pub fn migration_failed_target_pod_down(migration_uid: &str) -> String {
    format!("VirtualMachineInstance migration uid {migration_uid} failed. reason: Target pod is down")
}

/// An update made a migration.
pub fn created_workload_update(migration: &str) -> String {
    format!("Created Migration {migration} for automated workload update")
}

/// An update evicted a guest's pod.
pub fn evicted_for_update(vmi: &str) -> String {
    format!("Initiated eviction of {vmi} for automated workload update: its launcher is outdated")
}

/// On the VMI by the evacuation controller, reason `SuccessfulCreate`.
pub fn created_migration(name: &str) -> String {
    format!("Created Migration {name}")
}

/// On the VMI by the evacuation controller, reason `FailedCreate`.
pub fn failed_to_create_migration(error: &str) -> String {
    format!("Error creating a Migration: {error}")
}

/// On the VMI by the node controller, reason `NodeUnresponsive`.
pub fn vmi_node_unresponsive(node: &str) -> String {
    format!("virt-handler on node {node} is not responsive, marking VMI as failed")
}

/// Godwit's own: on a node, a warning with reason `NodeUnresponsive`.
pub fn node_lost(seconds: i64) -> String {
    format!(
        "virt-handler was not heard for {seconds} s: the guests of this node have ended by now, and are started elsewhere by their \
         run strategy"
    )
}

/// On the VM, reason `SuccessfulCreate`.
pub fn started_vm(vmi: &str) -> String {
    format!("Started the virtual machine by creating the new virtual machine instance {vmi}")
}

/// On the VM, reason `SuccessfulDelete`.
pub fn stopped_vm(vmi: &str) -> String {
    format!("Stopped the virtual machine by deleting the virtual machine instance {vmi}")
}

/// On the VMI by the target's handler, reason `PreparingTarget`; ports in ascending order.
pub fn target_listening(address: &str, ports: &[u16]) -> String {
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    format!("Migration Target is listening at {address}, on ports: {}", ports.join(","))
}

/// On the VMI, reason `Migrated`.
pub fn migrated_to(node: &str) -> String {
    format!("The VirtualMachineInstance migrated to node {node}.")
}

/// On the VMI, a warning with reason `Migrated`.
pub fn migration_failed(migration_uid: &str, reason: &str) -> String {
    format!("VirtualMachineInstance migration uid {migration_uid} failed. reason:{reason}")
}

/// On the VMI, a warning with reason `Migrated`: an eviction strategy that cannot be kept.
pub fn not_migratable(message: &str) -> String {
    format!("EvictionStrategy is set but vmi is not migratable; {message}")
}

/// Events of node maintenances, as (reason, message); the reference's but for the last.
pub mod maintenance {
    /// On the NodeMaintenance: it has been seen.
    pub const BEGIN: (&str, &str) = ("BeginMaintenance", "Begin a node maintenance");
    /// On the NodeMaintenance, a warning: it was given up.
    pub const FAILED: (&str, &str) = ("FailedMaintenance", "Failed a node maintenance");
    /// On the NodeMaintenance: the node is empty.
    pub const SUCCEED: (&str, &str) = ("SucceedMaintenance", "Node maintenance was succeeded");
    /// On the Node: it takes pods again.
    pub const UNCORDON: (&str, &str) = ("UncordonNode", "Uncordon a node");
    /// On the NodeMaintenance: it is over and gone.
    pub const REMOVED: (&str, &str) = ("RemovedMaintenance", "Removed a node maintenance");
    /// On the NodeMaintenance, a warning: the node is not empty at its deadline, and it goes on.
    pub const DEADLINE_PASSED: (&str, &str) = ("DeadlinePassed", "The node was not empty at its deadline");
    /// On the VMI, a warning: it was to come back after a maintenance, and does not.
    pub const STAYS_AWAY: (&str, &str) =
        ("StaysAway", "It stays where it is: the node that it left for a maintenance does not take it back");
    /// On the VMI: it is to come back after a maintenance, and its home does not take it for now.
    pub const WAITS_TO_RETURN: &str = "WaitsToReturn";

    /// The text of [`WAITS_TO_RETURN`]; `why` names the node.
    pub fn waits_to_return(why: &str) -> String {
        format!("It returns when the node that it left for a maintenance takes it: {why}")
    }
}
