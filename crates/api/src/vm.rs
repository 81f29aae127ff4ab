//! VirtualMachine: a VMI that outlives its runs.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Condition;
use crate::vmi::{StorageMigratedVolumeInfo, VirtualMachineInstanceSpec};

/// A virtual machine, running or not.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VirtualMachine {
    /// Standard object metadata.
    pub metadata: ObjectMeta,
    /// What the machine shall be and when it runs.
    pub spec: VirtualMachineSpec,
    /// What the machine is.
    pub status: VirtualMachineStatus,
}

kind!(VirtualMachine, "kubevirt.io", "v1", "virtualmachines", [spec, status]);

api_struct! {
    /// What the machine shall be and when it runs.
    VirtualMachineSpec {
        /// Deprecated: true is `Always`, false is `Halted`. Exclusive with `runStrategy`.
        running: Option<bool>,
        /// When the machine runs.
        run_strategy: Option<RunStrategy>,
        /// The VMI that is made for a run.
        template: Option<VirtualMachineInstanceTemplateSpec>,
        /// What becomes of a running guest when its volumes are changed; `Replacement` when not said.
        update_volumes_strategy: Option<UpdateVolumesStrategy>,
    }
}

string_enum! {
    /// What becomes of a running guest whose VM names other volumes.
    UpdateVolumesStrategy default Replacement {
        /// It gets them when it is started again.
        Replacement = "Replacement",
        /// Its data moves to them while it runs.
        Migration = "Migration",
    }
}

string_enum! {
    /// When a machine runs.
    RunStrategy default Unset {
        /// Not said.
        Unset = "",
        /// Always; it is started again when it ends.
        Always = "Always",
        /// Never.
        Halted = "Halted",
        /// As start and stop are asked for.
        Manual = "Manual",
        /// Started again when it fails, not when it ends well.
        RerunOnFailure = "RerunOnFailure",
        /// Started once.
        Once = "Once",
        /// Waits for a migration from another cluster.
        WaitAsReceiver = "WaitAsReceiver",
    }
}

/// The VMI that is made for a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VirtualMachineInstanceTemplateSpec {
    /// Labels and annotations of the VMI.
    pub metadata: ObjectMeta,
    /// The VMI's spec.
    pub spec: VirtualMachineInstanceSpec,
}

impl VirtualMachineSpec {
    /// When the machine runs, `running` taken into account; `Halted` when nothing is said.
    pub fn effective_run_strategy(&self) -> RunStrategy {
        match (&self.run_strategy, self.running) {
            (Some(strategy), _) if *strategy != RunStrategy::Unset => strategy.clone(),
            (_, Some(true)) => RunStrategy::Always,
            _ => RunStrategy::Halted,
        }
    }
}

string_enum! {
    /// What `kubectl get vm` says.
    PrintableStatus default Unset {
        /// Not yet known.
        Unset = "",
        /// Being deleted.
        Terminating = "Terminating",
        /// The guest is being stopped.
        Stopping = "Stopping",
        /// The guest is on its way to another node.
        Migrating = "Migrating",
        /// The guest is paused.
        Paused = "Paused",
        /// The guest runs.
        Running = "Running",
        /// A claim does not exist.
        ErrorPvcNotFound = "ErrorPvcNotFound",
        /// A DataVolume failed.
        DataVolumeError = "DataVolumeError",
        /// No node takes the launcher pod.
        ErrorUnschedulable = "ErrorUnschedulable",
        /// Volumes are being filled.
        Provisioning = "Provisioning",
        /// Volumes wait for the first consumer.
        WaitingForVolumeBinding = "WaitingForVolumeBinding",
        /// An image cannot be pulled.
        ErrImagePull = "ErrImagePull",
        /// An image cannot be pulled, tried again later.
        ImagePullBackOff = "ImagePullBackOff",
        /// The launcher pod is on its way.
        Starting = "Starting",
        /// It fails again and again.
        CrashLoopBackOff = "CrashLoopBackOff",
        /// It does not run.
        Stopped = "Stopped",
        /// Waits for a migration from another cluster.
        WaitingForReceiver = "WaitingForReceiver",
        /// None of the others.
        Unknown = "Unknown",
    }
}

always_or_default!(PrintableStatus);

api_struct! {
    /// What the machine is.
    VirtualMachineStatus {
        /// What `kubectl get vm` says.
        printable_status: PrintableStatus,
        /// The VMI exists.
        created: Option<bool>,
        /// The VMI is ready.
        ready: Option<bool>,
        /// The strategy now in force.
        run_strategy: Option<RunStrategy>,
        /// What is true of it, the VMI's conditions among them.
        conditions: Vec<Condition>,
        /// Starts and stops still to be done.
        state_change_requests: Vec<StateChangeRequest>,
        /// Starts that failed.
        start_failure: Option<StartFailure>,
        /// A change of volumes that is not over.
        volume_update_state: Option<VolumeUpdateState>,
        /// The generation that was last dealt with.
        observed_generation: Option<i64>,
        /// The generation that is wanted.
        desired_generation: Option<i64>,
    }
}

always_or_default!(VirtualMachineStatus);

api_struct! {
    /// A change of volumes that is not over.
    VolumeUpdateState {
        /// The one by migration.
        volume_migration_state: Option<VolumeMigrationState>,
    }
}

api_struct! {
    /// Volumes on their way to other claims.
    VolumeMigrationState {
        /// Each of them.
        migrated_volumes: Vec<StorageMigratedVolumeInfo>,
    }
}

api_struct! {
    /// A start or a stop still to be done.
    StateChangeRequest {
        /// `Start` or `Stop`.
        action: String,
        /// The VMI that shall stop.
        uid: Option<String>,
        /// How it shall start: `paused` is `true` when the guest shall wait for somebody to unpause it.
        data: BTreeMap<String, String>,
    }
}

api_struct! {
    /// Starts that failed without ever running.
    StartFailure {
        /// How many in a row.
        consecutive_fail_count: Option<i32>,
        /// The last VMI.
        #[serde(rename = "lastFailedVMIUID")]
        last_failed_vmi_uid: Option<String>,
        /// Not before.
        retry_after_timestamp: Option<Time>,
    }
}
