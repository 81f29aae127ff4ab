//! VirtualMachineInstanceMigration: the wish to move one VMI.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::vmi::VirtualMachineInstanceMigrationState;
use crate::{Condition, Quantity, names};

/// The wish to move one VMI to another node. Deleting it cancels.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VirtualMachineInstanceMigration {
    /// Standard object metadata.
    pub metadata: ObjectMeta,
    /// What is to be moved.
    pub spec: VirtualMachineInstanceMigrationSpec,
    /// How far it has come.
    pub status: VirtualMachineInstanceMigrationStatus,
}

kind!(VirtualMachineInstanceMigration, "kubevirt.io", "v1", "virtualmachineinstancemigrations", [spec, status]);

/// Short for [`VirtualMachineInstanceMigration`].
pub type Vmim = VirtualMachineInstanceMigration;

api_struct! {
    /// What is to be moved.
    VirtualMachineInstanceMigrationSpec {
        /// The VMI, in the same namespace.
        vmi_name: Option<String>,
        /// More labels that the target node must carry; the VM's own win.
        added_node_selector: BTreeMap<String, String>,
        /// Set by the controller only.
        priority: Option<MigrationPriority>,
        /// The source half of a migration between clusters.
        send_to: Option<MigrationSendTo>,
        /// The target half of a migration between clusters.
        receive: Option<MigrationReceive>,
    }
}

string_enum! {
    /// How urgent a migration is.
    MigrationPriority default UserTriggered {
        /// Evacuations.
        SystemCritical = "system-critical",
        /// Changes that a user made.
        UserTriggered = "user-triggered",
        /// Housekeeping.
        SystemMaintenance = "system-maintenance",
    }
}

api_struct! {
    /// The source half of a migration between clusters.
    MigrationSendTo {
        /// The same on both sides.
        #[serde(rename = "migrationID")]
        migration_id: String,
        /// The other cluster's synchronisation address.
        #[serde(rename = "connectURL")]
        connect_url: Option<String>,
    }
}

api_struct! {
    /// The target half of a migration between clusters.
    MigrationReceive {
        /// The same on both sides.
        #[serde(rename = "migrationID")]
        migration_id: String,
    }
}

string_enum! {
    /// The phase of a migration.
    MigrationPhase default Unset {
        /// Not yet seen by the controller.
        Unset = "",
        /// Waits for a place or for its target pod.
        Pending = "Pending",
        /// The target pod exists.
        Scheduling = "Scheduling",
        /// The target pod is ready.
        Scheduled = "Scheduled",
        /// The target prepares.
        PreparingTarget = "PreparingTarget",
        /// The target listens.
        TargetReady = "TargetReady",
        /// The source sends.
        Running = "Running",
        /// The guest runs at the target.
        Succeeded = "Succeeded",
        /// The guest runs where it was.
        Failed = "Failed",
        /// Waits for the other cluster.
        WaitingForSync = "WaitingForSync",
        /// Talks with the other cluster.
        Synchronizing = "Synchronizing",
    }
}

always_or_default!(MigrationPhase);

impl MigrationPhase {
    /// Over, well or badly.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }

    /// What the limits count: under way, and not only waiting.
    pub fn is_running(&self) -> bool {
        !self.is_final() && !matches!(self, Self::Unset | Self::Pending | Self::WaitingForSync | Self::Synchronizing)
    }

    /// The target pod exists (Scheduling or later).
    pub fn target_is_created(&self) -> bool {
        self.is_running() || self.is_final()
    }

    /// The handlers drive (PreparingTarget or later).
    pub fn target_is_handed_off(&self) -> bool {
        matches!(self, Self::PreparingTarget | Self::TargetReady | Self::Running) || self.is_final()
    }
}

api_struct! {
    /// How far a migration has come.
    VirtualMachineInstanceMigrationStatus {
        /// The phase.
        phase: MigrationPhase,
        /// What is true of it.
        conditions: Vec<Condition>,
        /// When each phase was first reached.
        phase_transition_timestamps: Vec<MigrationPhaseTransitionTimestamp>,
        /// Details; only `sourcePod` while pending.
        migration_state: Option<VirtualMachineInstanceMigrationState>,
        /// Where the other cluster can be reached.
        synchronization_addresses: Vec<String>,
        /// Godwit's own: how far it is, for the column, as `42%`.
        progress: Option<String>,
        /// Godwit's own: the standstill, for the column, as `73 ms`.
        downtime: Option<String>,
        /// Godwit's own: what it was expected to take, and once it is over what it took, for the column.
        forecast: Option<String>,
        /// Godwit's own: its place among those that wait for their turn, while it does.
        queue: Option<MigrationQueuePlace>,
        /// Godwit's own: the nodes that were looked at and why each was not taken, while no node takes the target pod.
        nodes: Vec<NodeVerdict>,
        /// Godwit's own: one word on what it waits for or why it failed.
        reason: Option<String>,
        /// Godwit's own: the sentence for people, with what to do.
        message: Option<String>,
    }
}

always_or_default!(VirtualMachineInstanceMigrationStatus);

impl VirtualMachineInstanceMigrationStatus {
    /// Makes the columns' texts from `migrationState.progress`; to be called on every status before it is written.
    pub fn fill_columns(&mut self) {
        let progress = self.migration_state.as_ref().and_then(|state| state.progress.as_ref());
        self.progress = progress.and_then(|progress| progress.percent).map(|percent| format!("{percent}%"));
        self.downtime = progress.and_then(|progress| progress.downtime_milliseconds).map(|ms| format!("{ms} ms"));
        let forecast = self.migration_state.as_ref().and_then(|state| state.forecast.as_ref());
        self.forecast = forecast.map(|forecast| {
            let standstill =
                forecast.downtime_milliseconds.map(|ms| format!(", standstill {ms} ms")).unwrap_or_default();
            let expected = match forecast.duration_milliseconds {
                Some(ms) => format!("{ms} ms{standstill}"),
                None => "does not end by itself".to_owned(),
            };
            let real = progress.filter(|progress| progress.downtime_milliseconds.is_some());
            match real.and_then(|progress| progress.total_milliseconds.zip(progress.downtime_milliseconds)) {
                Some((total, downtime)) => format!("{expected}; was {total} ms, {downtime} ms"),
                None => expected,
            }
        });
    }
}

api_struct! {
    /// A place in the queue.
    MigrationQueuePlace {
        /// 1 is next.
        position: Option<u32>,
        /// The setting whose limit it waits for, e.g. `parallelMigrationsPerCluster`.
        limit: Option<String>,
    }
}

api_struct! {
    /// Why a node does not take a target pod.
    NodeVerdict {
        /// The node.
        node_name: String,
        /// Why not, in the scheduler's words.
        reasons: Vec<String>,
    }
}

api_struct! {
    /// When a phase was first reached.
    MigrationPhaseTransitionTimestamp {
        /// The phase.
        phase: MigrationPhase,
        /// When.
        phase_transition_timestamp: Option<Time>,
    }
}

impl VirtualMachineInstanceMigration {
    /// Over, well or badly.
    pub fn is_final(&self) -> bool {
        self.status.phase.is_final()
    }

    /// The VMI's name, empty when it is missing.
    pub fn vmi_name(&self) -> &str {
        self.spec.vmi_name.as_deref().unwrap_or("")
    }

    /// What its annotation says of its bandwidth; one that is no quantity says nothing.
    pub fn bandwidth(&self) -> Option<Quantity> {
        let said = self.metadata.annotations.as_ref()?.get(names::ANNOTATION_BANDWIDTH)?;
        Some(Quantity(said.clone())).filter(|quantity| quantity.bytes().is_ok())
    }

    /// A condition by its type.
    pub fn condition(&self, type_: &str) -> Option<&Condition> {
        crate::condition::find(&self.status.conditions, type_)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_have_units() {
        let mut status: VirtualMachineInstanceMigrationStatus =
            serde_json::from_value(json!({ "migrationState": { "progress": { "percent": 42 } } })).unwrap();
        status.fill_columns();
        assert_eq!((status.progress.as_deref(), status.downtime.as_deref()), (Some("42%"), None));
        status = serde_json::from_value(json!({
            "progress": "42%",
            "migrationState": { "progress": { "percent": 100, "downtimeMilliseconds": 73 } },
        }))
        .unwrap();
        status.fill_columns();
        assert_eq!((status.progress.as_deref(), status.downtime.as_deref()), (Some("100%"), Some("73 ms")));
        assert_eq!(status.forecast, None, "nothing was measured before");
        let mut told = |state| {
            status.migration_state = Some(serde_json::from_value(state).unwrap());
            status.fill_columns();
            status.forecast.clone().unwrap()
        };
        let forecast = json!({ "converges": true, "durationMilliseconds": 1300, "downtimeMilliseconds": 20 });
        assert_eq!(told(json!({ "forecast": forecast })), "1300 ms, standstill 20 ms");
        let over = json!({ "totalMilliseconds": 1200, "downtimeMilliseconds": 18 });
        assert_eq!(
            told(json!({ "forecast": forecast, "progress": over })),
            "1300 ms, standstill 20 ms; was 1200 ms, 18 ms"
        );
        let never = json!({ "converges": false, "downtimeMilliseconds": 2000 });
        assert_eq!(told(json!({ "forecast": never })), "does not end by itself");
        status.migration_state = None;
        status.fill_columns();
        assert_eq!((status.progress, status.downtime), (None, None));
    }
}
