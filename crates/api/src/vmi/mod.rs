//! VirtualMachineInstance: one running (or to be run) virtual machine.

mod spec;
mod status;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::Deserialize;

pub use spec::*;
pub use status::*;

/// A virtual machine that runs or shall run. It has no status subresource (KubeVirt's contract).
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VirtualMachineInstance {
    /// Standard object metadata.
    pub metadata: ObjectMeta,
    /// What the machine shall be. Immutable for users.
    pub spec: VirtualMachineInstanceSpec,
    /// What the machine is. Written by godwit's own accounts only.
    pub status: VirtualMachineInstanceStatus,
}

kind!(VirtualMachineInstance, "kubevirt.io", "v1", "virtualmachineinstances", [spec, status]);

/// Short for [`VirtualMachineInstance`].
pub type Vmi = VirtualMachineInstance;

impl VirtualMachineInstance {
    /// Whether the guest has ended for good.
    pub fn is_final(&self) -> bool {
        matches!(self.status.phase, VmiPhase::Succeeded | VmiPhase::Failed)
    }

    /// Whether a migration has started and not ended, as KubeVirt's VM status `Migrating` sees it.
    pub fn is_migrating(&self) -> bool {
        self.status
            .migration_state
            .as_ref()
            .is_some_and(|state| state.start_timestamp.is_some() && state.end_timestamp.is_none())
    }

    /// A condition by its type.
    pub fn condition(&self, type_: &str) -> Option<&crate::Condition> {
        crate::condition::find(&self.status.conditions, type_)
    }
}
