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
        /// The target pod was ready, but the VMI could not be told of the migration.
        NotHandedOver = "NotHandedOver",
        /// The namespace's quota has no room for a second pod.
        QuotaExceeded = "QuotaExceeded",
        /// The target's pod, QEMU or node is gone.
        TargetLost = "TargetLost",
        /// The target's node was put into maintenance before the guest was on its way there.
        TargetInMaintenance = "TargetInMaintenance",
        /// The source's pod, QEMU or node is gone, and the guest with it.
        SourceLost = "SourceLost",
        /// The two nodes could not reach each other.
        LinkLost = "LinkLost",
        /// The target's CPU lacks what the guest has.
        TargetRefusedCpu = "TargetRefusedCPU",
        /// The target has no room for a disk that has to be copied.
        TargetOutOfSpace = "TargetOutOfSpace",
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
    pub const ALL: [FailureCause; 25] = [
        Self::Cancelled,
        Self::NoProgress,
        Self::OutOfTime,
        Self::NotConverging,
        Self::Unschedulable,
        Self::TargetNotReady,
        Self::NotHandedOver,
        Self::QuotaExceeded,
        Self::TargetLost,
        Self::TargetInMaintenance,
        Self::SourceLost,
        Self::LinkLost,
        Self::TargetRefusedCpu,
        Self::TargetOutOfSpace,
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

    /// What happened, as the documentation says it.
    pub fn meaning(&self) -> &'static str {
        match self {
            Self::Cancelled => "Somebody deleted the migration; the guest runs where it was.",
            Self::NoProgress => "No byte came nearer to the end for `progressTimeout`.",
            Self::OutOfTime => "It took longer than `completionTimeoutPerGiB` allows for the VMI's size.",
            Self::NotConverging => {
                "The guest changes its memory faster than the link carries it, and nothing stronger was allowed."
            }
            Self::Unschedulable => "No node took the target pod in time.",
            Self::TargetNotReady => "The target pod had a node and did not become ready in time.",
            Self::NotHandedOver => "The target pod was ready, but the VMI could not be told of the migration in time.",
            Self::QuotaExceeded => "The namespace's ResourceQuota had no room for a second launcher pod.",
            Self::TargetLost => "The target's pod, QEMU or node was lost.",
            Self::TargetInMaintenance => {
                "The target node was put into maintenance before the guest was on its way there."
            }
            Self::SourceLost => "The source's pod, QEMU or node was lost, and the guest with it.",
            Self::LinkLost => "The two nodes could not reach each other (in post-copy the link is waited for instead).",
            Self::TargetRefusedCpu => "The target's CPU lacks something that the guest was started with.",
            Self::TargetOutOfSpace => "The target has no room for a disk that has to be copied.",
            Self::TargetRefusedStorage => "The target could not open a disk, or not as the guest needs it.",
            Self::TargetRefusedMachine => "The target's machine or devices do not fit the guest's.",
            Self::TargetUnresponsive => "The handler of the target node did not do its part in time.",
            Self::SourceUnresponsive => "The handler of the source node did not do its part in time.",
            Self::GuestEnded => "The guest was shut down, or its VMI was deleted, before the migration was over.",
            Self::VmiNotFound => "The VMI does not exist.",
            Self::NotMigratable => "The VMI's condition `LiveMigratable` is False.",
            Self::OtherMigration => "Another migration of the same VMI was under way.",
            Self::WaitedTooLong => "It waited for its turn for more than a day.",
            Self::StateTaken => "Somebody removed or replaced the migration in the VMI's status.",
            Self::HypervisorError | Self::Other(_) => {
                "QEMU gave an error that is none of the others; the message has it word for word."
            }
        }
    }

    /// What to do about it: one sentence, which ends the migration's message.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Cancelled => "Create the migration again when it is wanted.",
            Self::NoProgress => {
                "Check the link between the two nodes and how busy the guest is; raise progressTimeout or \
                 bandwidthPerMigration, or allow auto-converge or post-copy."
            }
            Self::OutOfTime => {
                "Raise completionTimeoutPerGiB or bandwidthPerMigration, or set allowWorkloadDisruption so that the \
                 guest may be paused or moved by post-copy when the time is up."
            }
            Self::NotConverging => {
                "Raise bandwidthPerMigration, or allow allowAutoConverge, allowPostCopy or allowWorkloadDisruption, or \
                 migrate when the guest is less busy."
            }
            Self::Unschedulable => {
                "Make room on a node that fits: status.nodes says why each was not taken (cordons, taints, CPU, \
                 memory, selectors); then migrate again."
            }
            Self::TargetNotReady => {
                "See the events of the target pod (image, volumes, network), mend what they name and migrate again."
            }
            Self::NotHandedOver => {
                "Check that the API server accepts writes to the VMI (webhooks, RBAC) and migrate again."
            }
            Self::QuotaExceeded => {
                "Raise the namespace's ResourceQuota so that two launcher pods of the VMI fit, or free some of it."
            }
            Self::TargetLost => {
                "Migrate again; if it happens again, look at the target node and at the log of the target pod."
            }
            Self::TargetInMaintenance => {
                "Migrate again: another node is chosen. Evacuations are made anew by themselves after a moment."
            }
            Self::SourceLost => {
                "The VM's run strategy decides whether the guest is started again; look at the source node and the log \
                 of the source pod."
            }
            Self::LinkLost => {
                "Check that the source node reaches the target node's address and that no firewall closes the ports \
                 of the migration; then migrate again."
            }
            Self::TargetRefusedCpu => {
                "Migrate to a node with the same CPU features (spec.addedNodeSelector), or give the VM a CPU model that \
                 all nodes have."
            }
            Self::TargetOutOfSpace => {
                "Free space where the message says that it is missing (the target node's kubelet directory, or the claim), \
                 or migrate to another node (spec.addedNodeSelector)."
            }
            Self::TargetRefusedStorage => {
                "Check that every claim of the VM is ReadWriteMany on storage that both nodes see, and that no other \
                 process holds its disks."
            }
            Self::TargetRefusedMachine => {
                "Bring both nodes to the same QEMU version, or give the VM a machine type that both have."
            }
            Self::TargetUnresponsive => {
                "Check that virt-handler runs on the target node and reaches the API server; then migrate again."
            }
            Self::SourceUnresponsive => {
                "Check that virt-handler runs on the source node and reaches the API server; then migrate again."
            }
            Self::GuestEnded => "Start the VM again if it should run; there is nothing left to migrate.",
            Self::VmiNotFound => "Check spec.vmiName and the namespace; a VM has to run to be migrated.",
            Self::NotMigratable => {
                "Remove what the VMI's condition LiveMigratable names, restart the VM and migrate again."
            }
            Self::OtherMigration => "Wait until the other migration is over, or delete it, and migrate again.",
            Self::WaitedTooLong => {
                "Look at what holds the places (kubectl get vmim -A) or raise the limit that it waited for."
            }
            Self::StateTaken => "Leave status.migrationState of VMIs to godwit, and migrate again.",
            Self::HypervisorError | Self::Other(_) => {
                "See the log of both launcher pods; if the error is not about this VM's configuration, report it."
            }
        }
    }
}

/// Renders `docs/failures.md`.
pub fn render() -> String {
    let mut page = String::from(
        "# Why migrations fail\n\n\
         Rendered from `crates/api/src/failure.rs` by a test of the crate `godwit-api`; after a change of the list run\n\
         `GODWIT_BLESS=1 cargo test -p godwit-api failures_page` to write it anew.\n\n\
         The list is closed: a migration that is `Failed` has exactly one of these words in its `status.reason`, in the\n\
         reason of its condition `Failed` and, when it had been handed over, in `status.migrationState.failureCause` of\n\
         the VMI. `status.message` says what happened, with names and numbers, and ends with what to do.\n\
         `status.migrationState.failureReason` keeps KubeVirt's texts, which have one for several of these.\n\n\
         | reason | what happened | what to do |\n|---|---|---|\n",
    );
    for cause in FailureCause::ALL {
        page.push_str(&format!("| `{cause}` | {} | {} |\n", cause.meaning(), cause.remedy()));
    }
    page
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_cause_has_a_sentence_of_its_own() {
        let (mut words, mut meanings, mut remedies) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for cause in FailureCause::ALL {
            assert!(cause.is_known(), "{cause}");
            assert!(words.insert(cause.to_string()), "{cause} is there twice");
            assert!(meanings.insert(cause.meaning()), "{cause} shares its meaning");
            // Two causes with one remedy are one cause.
            assert!(remedies.insert(cause.remedy()), "{cause} shares its remedy");
            for sentence in [cause.meaning(), cause.remedy()] {
                assert!(sentence.ends_with('.') && !sentence.contains("  "), "{sentence}");
            }
            assert_eq!(FailureCause::from(cause.as_str()), cause);
        }
    }

    #[test]
    fn failures_page_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/failures.md");
        let page = render();
        if std::env::var_os("GODWIT_BLESS").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        let held = std::fs::read_to_string(path).unwrap_or_default();
        assert!(held == page, "docs/failures.md is stale: run GODWIT_BLESS=1 cargo test -p godwit-api failures_page");
    }
}
