//! VirtualMachineInstance: one running (or to be run) virtual machine.

mod spec;
mod status;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::Deserialize;

pub use spec::*;
pub use status::*;

/// The only `spec.startStrategy` that there is.
pub const START_PAUSED: &str = "Paused";

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

impl VirtualMachineInstanceMigrationState {
    /// Whether the guest stays on its node, and only its launcher changes.
    pub fn is_local(&self) -> bool {
        self.source_node.is_some() && self.source_node == self.target_node
    }
}

impl VirtualMachineInstance {
    /// Whether the guest has ended for good.
    pub fn is_final(&self) -> bool {
        matches!(self.status.phase, VmiPhase::Succeeded | VmiPhase::Failed)
    }

    /// Whether the guest is at its last migration's target, as that node's handler has written down.
    pub fn has_arrived(&self) -> bool {
        let state = self.status.migration_state.as_ref();
        state.is_none_or(|state| {
            // Within a node its name does not tell.
            let known = !state.is_local() || state.target_node_domain_ready_timestamp.is_some();
            state.target_node == self.status.node_name && known
        })
    }

    /// Whether the guest waits at its start until somebody unpauses it.
    pub fn starts_paused(&self) -> bool {
        self.spec.start_strategy.as_deref() == Some(START_PAUSED)
    }

    /// Whether a migration has started and not ended, as KubeVirt's VM status `Migrating` sees it.
    pub fn is_migrating(&self) -> bool {
        self.status
            .migration_state
            .as_ref()
            .is_some_and(|state| state.start_timestamp.is_some() && state.end_timestamp.is_none())
    }

    /// Whether nothing is being done to disks that come and go while the guest runs: those that it has are those that a
    /// migration's target builds. Disks that have not begun to come do not count.
    pub fn has_settled_disks(&self) -> bool {
        let wanted = |name: &str| self.spec.volumes.iter().any(|one| one.name == name && one.is_hotpluggable());
        let statuses = self.status.volume_status.iter();
        statuses.into_iter().all(|one| !one.is_being_changed() && (!one.is_plugged_in() || wanted(&one.name)))
    }

    /// Whether the guest was started with a controller for disks that come while it runs: since revision 2 of the machine, unless
    /// `disableHotplug` is set.
    pub fn takes_disks(&self) -> bool {
        self.status.machine_revision.unwrap_or(0) >= 2 && self.spec.domain.devices.disable_hotplug != Some(true)
    }

    /// Whether the guest was started with a screen: since revision 3 of the machine, unless `autoattachGraphicsDevice` is false.
    pub fn has_screen(&self) -> bool {
        self.status.machine_revision.unwrap_or(0) >= 3
            && self.spec.domain.devices.autoattach_graphics_device != Some(false)
    }

    /// The disks that were plugged in and that the guest has, by volume.
    pub fn plugged_in(&self) -> impl Iterator<Item = &str> {
        self.status.volume_status.iter().filter(|one| one.is_plugged_in()).map(|one| one.name.as_str())
    }

    /// A condition by its type.
    pub fn condition(&self, type_: &str) -> Option<&crate::Condition> {
        crate::condition::find(&self.status.conditions, type_)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Seed 002's migration state and a little of everything else, as KubeVirt's clients write it.
    const OBJECT: &str = "
apiVersion: kubevirt.io/v1alpha3
kind: VirtualMachineInstance
metadata:
  name: vmi-fedora
  namespace: default
  creationTimestamp: null
spec:
  evictionStrategy: LiveMigrate
  nodeSelector: { zone: a }
  unknownToGodwit: 1
  domain:
    cpu: { cores: 2 }
    memory: { guest: 1Gi }
    resources: { requests: { memory: 1073741824 } }
    firmware: { kernelBoot: { kernelArgs: console=ttyS0, container: { image: k, kernelPath: /boot/vmlinuz } } }
    devices:
      rng: {}
      disks: [{ name: root, disk: { bus: virtio }, bootOrder: 1 }, { name: iso, cdrom: { bus: sata } }]
      interfaces: [{ name: default, masquerade: {}, macAddress: '02:00:00:00:00:01', ports: [{ port: 22 }] }]
  networks: [{ name: default, pod: {} }]
  volumes:
  - { name: root, persistentVolumeClaim: { claimName: root } }
  - { name: iso, cloudInitNoCloud: { userData: '#cloud-config', networkDataSecretRef: { name: net } } }
status:
  phase: Running
  runtimeUser: 107
  nodeName: node02
  guestOSInfo: { prettyName: Fedora }
  conditions: [{ type: LiveMigratable, status: 'True', lastProbeTime: null }]
  migrationState:
    migrationUid: 57a693d6-51d7-11e9-b370-525500d15501
    abortRequested: true
    abortStatus: Succeeded
    completed: true
    failed: true
    startTimestamp: '2019-03-29T04:02:47Z'
    endTimestamp: '2019-03-29T04:02:49Z'
    migrationConfiguration: { completionTimeoutPerGiB: 800, progressTimeout: 150 }
    sourceNode: node02
    targetNode: node01
    targetNodeAddress: 10.128.0.46
    targetNodeDomainDetected: true
    targetDirectMigrationNodePorts: { '39445': 0, '43345': 49152, '44222': 49153 }
    progress: { percent: 40, bytesPerSecond: 1, downtimeMilliseconds: 12 }
";

    #[test]
    fn what_is_read_is_written_under_the_same_names() {
        let value: Value = serde_saphyr::from_str(OBJECT).unwrap();
        let vmi: Vmi = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(vmi.namespaced_name(), ("default", "vmi-fedora"));
        assert!(vmi.condition("LiveMigratable").is_some_and(crate::Condition::is_true));
        assert!(!vmi.is_final() && !vmi.is_migrating());
        let written = serde_json::to_value(&vmi).unwrap();
        assert_eq!(written["apiVersion"], "kubevirt.io/v1");
        let mut expected = value;
        expected["apiVersion"] = json!("kubevirt.io/v1");
        expected["spec"].as_object_mut().unwrap().remove("unknownToGodwit");
        expected["spec"]["domain"]["resources"]["requests"]["memory"] = json!("1073741824");
        expected["status"]["conditions"][0].as_object_mut().unwrap().remove("lastProbeTime");
        expected["metadata"].as_object_mut().unwrap().remove("creationTimestamp");
        assert_eq!(written, expected);
    }

    #[test]
    fn an_almost_empty_object_is_read() {
        for text in ["{}", r#"{"metadata":{},"spec":{},"status":{}}"#, r#"{"metadata":{"name":"a"}}"#] {
            let vmi: Vmi = serde_json::from_str(text).unwrap();
            assert_eq!(vmi.status.phase, VmiPhase::Unset);
        }
    }
}
