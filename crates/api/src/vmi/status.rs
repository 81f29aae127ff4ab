//! What a virtual machine is: KubeVirt's VMI status, and godwit's additions (`progress`, `accelerator`, `qemuVersion`).

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::failure::FailureCause;
use crate::kubevirt::MigrationConfiguration;
use crate::{Condition, Quantity};

string_enum! {
    /// The phase of a VMI. It stays `Running` throughout a migration.
    VmiPhase default Unset {
        /// Not yet seen by the controller.
        Unset = "",
        /// Accepted, nothing done.
        Pending = "Pending",
        /// The launcher pod exists.
        Scheduling = "Scheduling",
        /// The launcher pod runs on a node.
        Scheduled = "Scheduled",
        /// The guest runs (or is paused).
        Running = "Running",
        /// The guest ended by itself or as asked.
        Succeeded = "Succeeded",
        /// The guest was lost.
        Failed = "Failed",
        /// Waits for a migration from another cluster.
        WaitingForSync = "WaitingForSync",
        /// The node does not answer.
        Unknown = "Unknown",
    }
}

always_or_default!(VmiPhase);

api_struct! {
    /// The status of a VMI.
    VirtualMachineInstanceStatus {
        /// Where the VMI is in its life.
        phase: VmiPhase,
        /// A word on why, as `NodeUnresponsive`.
        reason: Option<String>,
        /// What is true of it.
        conditions: Vec<Condition>,
        /// When each phase was first reached.
        phase_transition_timestamps: Vec<VmiPhaseTransitionTimestamp>,
        /// The node where the guest runs.
        node_name: Option<String>,
        /// The launcher pods that exist: pod UID to node.
        active_pods: BTreeMap<String, String>,
        /// The node that the VMI shall leave.
        evacuation_node_name: Option<String>,
        /// The migration under way, or the last one.
        migration_state: Option<VirtualMachineInstanceMigrationState>,
        /// What a migration has to copy.
        migration_method: Option<MigrationMethod>,
        /// How migration data travels: `Unix`.
        migration_transport: Option<String>,
        /// The launcher's image.
        launcher_container_image_version: Option<String>,
        /// The interfaces as they are.
        interfaces: Vec<VmiNetworkInterface>,
        /// The volumes as they are.
        volume_status: Vec<VolumeStatus>,
        /// Volumes that a migration under way, or the next one, moves to other claims.
        migrated_volumes: Vec<StorageMigratedVolumeInfo>,
        /// What the guest agent says of the operating system.
        #[serde(rename = "guestOSInfo")]
        guest_os_info: Option<GuestOsInfo>,
        /// The launcher pod's quality of service class.
        qos_class: Option<String>,
        /// The user that runs QEMU: 107 (qemu) or 0.
        runtime_user: u64,
        /// The machine type really used.
        machine: Option<crate::vmi::Machine>,
        /// The CPU topology really used.
        #[serde(rename = "currentCPUTopology")]
        current_cpu_topology: Option<CpuTopology>,
        /// Memory really used.
        memory: Option<MemoryStatus>,
        /// The ControllerRevision of the VM's template.
        virtual_machine_revision_name: Option<String>,
        /// Godwit's own: how the attempts to move it off its node have gone.
        evacuation: Option<EvacuationStatus>,
        /// Godwit's own: `kvm` or `tcg`.
        accelerator: Option<String>,
        /// Godwit's own: how the guest's machine was built beyond what the spec says; unset is 0. It stays with the guest.
        machine_revision: Option<u32>,
        /// Godwit's own: the processor that the guest has, spelled out when it started, so that it is the same wherever the guest goes.
        guest_cpu: Option<GuestCpu>,
        /// Godwit's own: the version of QEMU.
        qemu_version: Option<String>,
        /// Godwit's own: how fast the guest writes to its memory, measured now and then while it runs.
        dirty_rate: Option<DirtyRate>,
    }
}

always_or_default!(VirtualMachineInstanceStatus);

api_struct! {
    /// The processor of a guest.
    GuestCpu {
        /// A QEMU CPU model.
        model: String,
        /// What it has beyond the model, in QEMU's names.
        features: Vec<String>,
    }
}

impl crate::macros::Absent for u64 {
    fn absent(&self) -> bool {
        false
    }
}

impl crate::macros::Absent for bool {
    fn absent(&self) -> bool {
        !*self
    }
}

api_struct! {
    /// When a phase was first reached.
    VmiPhaseTransitionTimestamp {
        /// The phase.
        phase: VmiPhase,
        /// When.
        phase_transition_timestamp: Option<Time>,
    }
}

string_enum! {
    /// What a migration has to copy.
    MigrationMethod default LiveMigration {
        /// Memory only.
        LiveMigration = "LiveMigration",
        /// Memory and disks that are local to the node (or made again at the target).
        BlockMigration = "BlockMigration",
    }
}

string_enum! {
    /// How a migration runs.
    MigrationMode default PreCopy {
        /// The guest runs at the source until all but the last bytes are over.
        PreCopy = "PreCopy",
        /// The guest runs at the target, memory follows.
        PostCopy = "PostCopy",
        /// The guest was paused so that the migration ends.
        Paused = "Paused",
    }
}

string_enum! {
    /// How far an abort has come.
    AbortStatus default Aborting {
        /// Being aborted.
        Aborting = "Aborting",
        /// Aborted; the guest is where it was.
        Succeeded = "Succeeded",
        /// Too late; the migration went through.
        Failed = "Failed",
    }
}

api_struct! {
    /// Godwit's own: how the attempts to move a VMI off its node have gone. Gone with the evacuation.
    EvacuationStatus {
        /// The node that it is to leave.
        node_name: Option<String>,
        /// Since when.
        start_timestamp: Option<Time>,
        /// The node has been cordoned or drained meanwhile: when it is open again, the evacuation is over.
        cordoned: Option<bool>,
        /// The migration that is the attempt under way.
        migration_name: Option<String>,
        /// When it was made.
        attempt_timestamp: Option<Time>,
        /// Attempts that failed since the last success.
        failed_attempts: Option<u32>,
        /// The last migration that was counted.
        #[serde(rename = "lastMigrationUID")]
        last_migration_uid: Option<String>,
        /// When the last attempt failed.
        last_failure_timestamp: Option<Time>,
        /// Why it failed.
        last_failure: Option<FailureCause>,
        /// The sentence that went with it.
        last_failure_message: Option<String>,
        /// Not tried again before this time.
        next_attempt_timestamp: Option<Time>,
    }
}

api_struct! {
    /// A migration under way or the last one.
    VirtualMachineInstanceMigrationState {
        /// The VirtualMachineInstanceMigration.
        migration_uid: Option<String>,
        /// The node that the guest leaves.
        source_node: Option<String>,
        /// The launcher pod that the guest leaves.
        source_pod: Option<String>,
        /// The node that the guest goes to.
        target_node: Option<String>,
        /// The launcher pod that the guest goes to.
        target_pod: Option<String>,
        /// The pod that holds hotplugged volumes on the target.
        #[serde(rename = "targetAttachmentPodUID")]
        target_attachment_pod_uid: Option<String>,
        /// The address where the target's handler listens.
        target_node_address: Option<String>,
        /// TCP port on the target to what it carries: 0 control, 49152 memory, 49153 disks.
        target_direct_migration_node_ports: BTreeMap<String, i32>,
        /// `Pod` or `Migration`.
        migration_network_type: Option<String>,
        /// When the source began to send.
        start_timestamp: Option<Time>,
        /// When it was over.
        end_timestamp: Option<Time>,
        /// Pre-copy, post-copy or paused.
        mode: Option<MigrationMode>,
        /// The target has the guest's virtual machine.
        target_node_domain_detected: Option<bool>,
        /// When the guest ran at the target.
        target_node_domain_ready_timestamp: Option<Time>,
        /// Over, well or badly.
        completed: Option<bool>,
        /// Over badly; implies `completed`.
        failed: Option<bool>,
        /// Why it failed.
        failure_reason: Option<String>,
        /// Godwit's own: why it failed, out of a closed list.
        failure_cause: Option<FailureCause>,
        /// Somebody asked to abort.
        abort_requested: Option<bool>,
        /// How far the abort has come.
        abort_status: Option<AbortStatus>,
        /// The MigrationPolicy that applied.
        migration_policy_name: Option<String>,
        /// The configuration that applies, complete.
        migration_configuration: Option<MigrationConfiguration>,
        /// Dedicated CPUs on the target.
        #[serde(rename = "targetCPUSet")]
        target_cpu_set: Vec<i32>,
        /// The target node's topology, JSON.
        target_node_topology: Option<String>,
        /// The source half, complete.
        source_state: Option<MigrationSourceState>,
        /// The target half, complete.
        target_state: Option<MigrationTargetState>,
        /// The claim with the guest's persistent state (TPM, EFI variables) at the source.
        #[serde(rename = "sourcePersistentStatePVCName")]
        source_persistent_state_pvc_name: Option<String>,
        /// The claim that it goes to: the same one where it can be shared.
        #[serde(rename = "targetPersistentStatePVCName")]
        target_persistent_state_pvc_name: Option<String>,
        /// Memory of the target pod beyond the guest's.
        target_memory_overhead: Option<Quantity>,
        /// Godwit's own: how far the copying has come.
        progress: Option<MigrationProgress>,
        /// Godwit's own: what was to be expected before it began, and stays to be compared with what came.
        forecast: Option<MigrationForecast>,
    }
}

api_struct! {
    /// The source half of a migration.
    MigrationSourceState {
        /// The node.
        node: Option<String>,
        /// The launcher pod.
        pod: Option<String>,
        /// The VirtualMachineInstanceMigration.
        #[serde(rename = "migrationUID")]
        migration_uid: Option<String>,
        /// The VMI's name at the source.
        domain_name: Option<String>,
        /// The VMI's namespace at the source.
        domain_namespace: Option<String>,
        /// The synchronisation address (decentralized).
        sync_address: Option<String>,
        /// The VMI's UID at the source.
        #[serde(rename = "virtualMachineInstanceUID")]
        virtual_machine_instance_uid: Option<String>,
        /// The claim with the guest's persistent state.
        #[serde(rename = "persistentStatePVCName")]
        persistent_state_pvc_name: Option<String>,
        /// Node selectors that the target must honour.
        node_selectors: BTreeMap<String, String>,
    }
}

api_struct! {
    /// The target half of a migration.
    MigrationTargetState {
        /// The node.
        node: Option<String>,
        /// The launcher pod.
        pod: Option<String>,
        /// The VirtualMachineInstanceMigration.
        #[serde(rename = "migrationUID")]
        migration_uid: Option<String>,
        /// The VMI's name at the target.
        domain_name: Option<String>,
        /// The VMI's namespace at the target.
        domain_namespace: Option<String>,
        /// The synchronisation address (decentralized).
        sync_address: Option<String>,
        /// The VMI's UID at the target.
        #[serde(rename = "virtualMachineInstanceUID")]
        virtual_machine_instance_uid: Option<String>,
        /// The claim with the guest's persistent state.
        #[serde(rename = "persistentStatePVCName")]
        persistent_state_pvc_name: Option<String>,
        /// When the guest ran at the target.
        domain_ready_timestamp: Option<Time>,
        /// The target has the guest's virtual machine.
        domain_detected: Option<bool>,
        /// The address where the target's handler listens.
        node_address: Option<String>,
        /// TCP port on the target to what it carries.
        direct_migration_node_ports: BTreeMap<String, i32>,
        /// The pod that holds hotplugged volumes.
        #[serde(rename = "attachmentPodUID")]
        attachment_pod_uid: Option<String>,
        /// Dedicated CPUs.
        #[serde(rename = "cpuSet")]
        cpu_set: Vec<i32>,
        /// The node's topology, JSON.
        node_topology: Option<String>,
    }
}

api_struct! {
    /// Godwit's own: how far a migration has come. Byte counts are QEMU's, durations in milliseconds.
    MigrationProgress {
        /// 0 to 100, of what is known to be copied.
        percent: Option<u32>,
        /// All that is to be copied, as known now.
        bytes_total: Option<u64>,
        /// Copied so far, repeated pages included.
        bytes_processed: Option<u64>,
        /// Still to copy.
        bytes_remaining: Option<u64>,
        /// How fast it is copied.
        bytes_per_second: Option<u64>,
        /// How fast the guest changes its memory.
        dirty_bytes_per_second: Option<u64>,
        /// `ByReference`: memory stays where it is on the node, and what is sent is the rest of the machine; unset when it is
        /// copied.
        memory: Option<String>,
        /// Over how many connections memory goes.
        connections: Option<u32>,
        /// How memory is compressed on its way (`zstd`); unset when it is not.
        compression: Option<String>,
        /// By how many per cent auto-converge slows the guest down at present; unset when it does not.
        throttle_percent: Option<u64>,
        /// Which pass over the memory.
        iteration: Option<u64>,
        /// Since when post-copy has had no link; unset while it has one.
        link_broken_timestamp: Option<Time>,
        /// How often post-copy went on over another link after one had broken.
        recoveries: Option<u64>,
        /// From start to end (or to now).
        total_milliseconds: Option<u64>,
        /// From the guest's stop at the source to its start at the target.
        downtime_milliseconds: Option<u64>,
        /// When it will be over, as far as the rates of now tell; unset while they do not.
        expected_end_timestamp: Option<Time>,
        /// The standstill to expect if it switched over at the rates of now; unset while they do not tell.
        expected_downtime_milliseconds: Option<u64>,
        /// Whether the copying comes to its end by itself, as its passes so far tell; unset while they do not.
        converges: Option<bool>,
        /// What QEMU itself calls downtime.
        qemu_downtime_milliseconds: Option<u64>,
    }
}

api_struct! {
    /// Godwit's own: what a migration was expected to take when it began, from how the guest writes to its memory and what the
    /// link carries. To be compared with `progress.totalMilliseconds` and `progress.downtimeMilliseconds`. Durations are in
    /// milliseconds; the interval is what all that was measured allows.
    MigrationForecast {
        /// When it was made.
        made_at: Option<Time>,
        /// Whether the copying comes to its end by itself.
        converges: Option<bool>,
        /// From start to end; unset when it does not end by itself.
        duration_milliseconds: Option<u64>,
        /// It takes no less; unset when it does not end by itself at best.
        min_duration_milliseconds: Option<u64>,
        /// It takes no more; unset when at worst it does not end by itself.
        max_duration_milliseconds: Option<u64>,
        /// From the guest's stop at the source to its start at the target. When the copying does not end by itself: the
        /// standstill that would end it.
        downtime_milliseconds: Option<u64>,
        /// It takes no less.
        min_downtime_milliseconds: Option<u64>,
        /// It takes no more.
        max_downtime_milliseconds: Option<u64>,
        /// Passes over the memory.
        passes: Option<u64>,
        /// How fast the guest wrote to its memory, by the longest measurement.
        dirty_bytes_per_second: Option<u64>,
        /// How fast memory was taken to go.
        bytes_per_second: Option<u64>,
    }
}

api_struct! {
    /// Godwit's own: how fast a guest writes to its memory, as its launcher has measured it while no migration was under way.
    /// It is written anew when it has changed markedly, at most every few minutes: until then it still holds.
    DirtyRate {
        /// When it was measured.
        measured_at: Option<Time>,
        /// By the longest measurement.
        bytes_per_second: Option<u64>,
        /// Bytes of memory that the guest has.
        memory_bytes: Option<u64>,
        /// Bytes of it that are there: what was never written to is not.
        present_bytes: Option<u64>,
        /// A migration sends the guest in one pass, since its QEMU loses track of what is written between two.
        one_pass: Option<bool>,
        /// How much of its memory it writes to within some times, the shortest first.
        samples: Vec<DirtySample>,
    }
}

api_struct! {
    /// How much of its memory a guest writes to within a time, however often.
    DirtySample {
        /// The time.
        within_milliseconds: u64,
        /// Bytes of pages that were written to.
        bytes: u64,
        /// By how many bytes that may be wrong.
        margin_bytes: u64,
    }
}

api_struct! {
    /// An interface as it is.
    VmiNetworkInterface {
        /// The first address.
        ip_address: Option<String>,
        /// All addresses.
        ip_addresses: Vec<String>,
        /// The MAC address.
        mac: Option<String>,
        /// The interface's (and network's) name in the spec.
        name: Option<String>,
        /// The name in the guest, when the agent says it.
        interface_name: Option<String>,
        /// The name in the pod.
        pod_interface_name: Option<String>,
        /// Who says it: `domain`, `guest-agent`, `multus-status`.
        info_source: Option<String>,
        /// Queues.
        queue_count: Option<i32>,
        /// `up` or `down`.
        link_state: Option<String>,
    }
}

api_struct! {
    /// A volume as it is.
    VolumeStatus {
        /// The volume's name in the spec.
        name: String,
        /// The device in the guest, as `vda`.
        target: String,
        /// What is known of its claim.
        persistent_volume_claim_info: Option<PersistentVolumeClaimInfo>,
        /// Bytes of the disk.
        size: Option<i64>,
        /// Of a disk that is plugged in while the guest runs: how far that has come.
        phase: Option<VolumePhase>,
        /// A word on the phase.
        reason: Option<String>,
        /// A sentence on the phase.
        message: Option<String>,
        /// There for a disk that is plugged in while the guest runs, also while it is taken out.
        hotplug_volume: Option<HotplugVolumeStatus>,
    }
}

string_enum! {
    /// How far a disk that is plugged in while the guest runs has come.
    VolumePhase default Pending {
        /// Its claim is not there, or has no volume.
        Pending = "Pending",
        /// Its claim has its volume.
        Bound = "Bound",
        /// The pod that holds the claim runs on the guest's node.
        AttachedToNode = "AttachedToNode",
        /// The launcher has it.
        MountedToPod = "MountedToPod",
        /// The guest has it.
        Ready = "Ready",
        /// It is being taken out.
        Detaching = "Detaching",
        /// Neither guest nor launcher has it any more.
        UnMountedFromPod = "UnMountedFromPod",
    }
}

api_struct! {
    /// The pod that holds a disk's claim on the guest's node.
    HotplugVolumeStatus {
        /// Its name.
        attach_pod_name: Option<String>,
        /// Its UID.
        #[serde(rename = "attachPodUID")]
        attach_pod_uid: Option<String>,
    }
}

impl VolumeStatus {
    /// Whether the guest has it, or is just getting it or being rid of it: something may be going on with it at the launcher.
    pub fn is_being_changed(&self) -> bool {
        let phases = [VolumePhase::AttachedToNode, VolumePhase::MountedToPod, VolumePhase::Detaching];
        self.hotplug_volume.is_some() && self.phase.as_ref().is_some_and(|phase| phases.contains(phase))
    }

    /// Whether it was plugged in and the guest has it.
    pub fn is_plugged_in(&self) -> bool {
        self.hotplug_volume.is_some() && self.phase == Some(VolumePhase::Ready)
    }
}

api_struct! {
    /// A volume that moves to another claim.
    StorageMigratedVolumeInfo {
        /// The volume's name in the spec.
        volume_name: String,
        /// Where it was.
        #[serde(rename = "sourcePVCInfo")]
        source_pvc_info: Option<PersistentVolumeClaimInfo>,
        /// Where it goes.
        #[serde(rename = "destinationPVCInfo")]
        destination_pvc_info: Option<PersistentVolumeClaimInfo>,
        /// Godwit's own: it was blank, and a copy to it has begun. What is on it may be written over.
        receiving: Option<bool>,
    }
}

api_struct! {
    /// What is known of a claim.
    PersistentVolumeClaimInfo {
        /// The claim.
        claim_name: Option<String>,
        /// Its access modes.
        access_modes: Vec<String>,
        /// `Filesystem` or `Block`.
        volume_mode: Option<String>,
        /// Its capacity.
        capacity: crate::vmi::ResourceList,
        /// What it asked for.
        requests: crate::vmi::ResourceList,
    }
}

api_struct! {
    /// What the guest agent says of the operating system.
    GuestOsInfo {
        /// As `Debian GNU/Linux`.
        name: Option<String>,
        /// The kernel's release.
        kernel_release: Option<String>,
        /// The version.
        version: Option<String>,
        /// Name and version.
        pretty_name: Option<String>,
        /// The version, short.
        version_id: Option<String>,
        /// The kernel's build.
        kernel_version: Option<String>,
        /// As `x86_64`.
        machine: Option<String>,
        /// As `debian`.
        id: Option<String>,
    }
}

api_struct! {
    /// A CPU topology.
    CpuTopology {
        /// Cores a socket.
        cores: Option<u32>,
        /// Sockets.
        sockets: Option<u32>,
        /// Threads a core.
        threads: Option<u32>,
    }
}

api_struct! {
    /// Memory really used.
    MemoryStatus {
        /// At boot.
        guest_at_boot: Option<Quantity>,
        /// Now.
        guest_current: Option<Quantity>,
        /// As asked for.
        guest_requested: Option<Quantity>,
        /// The launcher's own.
        memory_overhead: Option<Quantity>,
    }
}
