//! Why migrations fail: a closed list, each with what to do about it.
//!
//! KubeVirt has one text for a cancelled, a stuck and a slow migration. Here each cause has a word of its own, in
//! `VMIM.status.reason` and `VMI.status.migrationState.failureCause`; KubeVirt's text stays in `failureReason`.

string_enum! {
    /// Why a migration failed.
    FailureCause default HypervisorError {
        /// Somebody deleted the migration.
        Cancelled = "Cancelled",
        /// Nothing came nearer for `progressTimeout`.
        NoProgress = "NoProgress",
        /// It took longer than `completionTimeoutPerGiB` allows.
        OutOfTime = "OutOfTime",
        /// The guest writes faster than the link carries, and nothing stronger was allowed.
        NotConverging = "NotConverging",
        /// No node took the target pod.
        Unschedulable = "Unschedulable",
        /// The target pod did not become ready: its image, its volumes, its network.
        TargetNotReady = "TargetNotReady",
        /// The namespace's quota has no room for a second pod.
        QuotaExceeded = "QuotaExceeded",
        /// The target's pod, QEMU or node is gone.
        TargetLost = "TargetLost",
        /// The source's pod, QEMU or node is gone, and the guest with it.
        SourceLost = "SourceLost",
        /// The two nodes could not reach each other.
        LinkLost = "LinkLost",
        /// The target's CPU lacks what the guest has.
        TargetRefusedCpu = "TargetRefusedCPU",
        /// The target could not open a disk, or not as the guest needs it.
        TargetRefusedStorage = "TargetRefusedStorage",
        /// The target's machine or devices do not fit the guest's.
        TargetRefusedMachine = "TargetRefusedMachine",
        /// The target node's handler did not do its part in time.
        TargetUnresponsive = "TargetUnresponsive",
        /// The source node's handler did not do its part in time.
        SourceUnresponsive = "SourceUnresponsive",
        /// The guest ended, or its VMI was deleted.
        GuestEnded = "GuestEnded",
        /// The VMI does not exist.
        VmiNotFound = "VMINotFound",
        /// The VMI says that it cannot be migrated.
        NotMigratable = "NotMigratable",
        /// Another migration of the same VMI is under way.
        OtherMigration = "OtherMigration",
        /// It waited for its turn longer than a day.
        WaitedTooLong = "WaitedTooLong",
        /// Somebody removed or replaced the migration in the VMI's status.
        StateTaken = "StateTaken",
        /// QEMU gave an error that is none of these; the message has it word for word.
        HypervisorError = "HypervisorError",
    }
}

impl FailureCause {
    /// Every cause, in the order of the documentation.
    pub const ALL: [FailureCause; 22] = [
        Self::Cancelled,
        Self::NoProgress,
        Self::OutOfTime,
        Self::NotConverging,
        Self::Unschedulable,
        Self::TargetNotReady,
        Self::QuotaExceeded,
        Self::TargetLost,
        Self::SourceLost,
        Self::LinkLost,
        Self::TargetRefusedCpu,
        Self::TargetRefusedStorage,
        Self::TargetRefusedMachine,
        Self::TargetUnresponsive,
        Self::SourceUnresponsive,
        Self::GuestEnded,
        Self::VmiNotFound,
        Self::NotMigratable,
        Self::OtherMigration,
        Self::WaitedTooLong,
        Self::StateTaken,
        Self::HypervisorError,
    ];
}
