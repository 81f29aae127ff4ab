//! KubeVirt: the cluster's configuration object.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::vmi::EvictionStrategy;
use crate::{Condition, Quantity};

/// The installation and its configuration; there is one, in the namespace that godwit is installed in.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct KubeVirt {
    /// Standard object metadata.
    pub metadata: ObjectMeta,
    /// The configuration.
    pub spec: KubeVirtSpec,
    /// The state of the installation.
    pub status: KubeVirtStatus,
}

kind!(KubeVirt, "kubevirt.io", "v1", "kubevirts", [spec, status]);

api_struct! {
    /// What is wanted of the installation.
    KubeVirtSpec {
        /// The configuration.
        configuration: KubeVirtConfiguration,
        /// What is done with guests whose launcher is older than the installation.
        workload_update_strategy: Option<WorkloadUpdateStrategy>,
    }
}

api_struct! {
    /// How guests get a new launcher after an update.
    WorkloadUpdateStrategy {
        /// `LiveMigrate`: those that can be are moved, on their node where possible. `Evict`: the others' pods are evicted. None:
        /// nothing is done.
        workload_update_methods: Vec<String>,
        /// How many pods are evicted at once; 10 when unset.
        batch_eviction_size: Option<i32>,
        /// How long the next batch waits; `1m` when unset.
        batch_eviction_interval: Option<String>,
    }
}

api_struct! {
    /// The configuration.
    KubeVirtConfiguration {
        /// How migrations run.
        migrations: Option<MigrationConfiguration>,
        /// The same under its older name; `migrations` wins, field by field.
        migration_configuration: Option<MigrationConfiguration>,
        /// Feature gates.
        developer_configuration: Option<DeveloperConfiguration>,
        /// The eviction strategy of VMIs that say none.
        eviction_strategy: Option<EvictionStrategy>,
        /// Defaults of networks.
        #[serde(rename = "network")]
        network_configuration: Option<NetworkConfiguration>,
        /// The machine type of VMIs that say none.
        machine_type: Option<String>,
        /// The CPU model of VMIs that say none.
        cpu_model: Option<String>,
        /// Godwit's own: `Auto` gives VMIs that say no CPU model the greatest that all nodes have (`status.cpuBaseline`), so that they
        /// can go everywhere; `cpuModel` wins.
        cpu_baseline: Option<String>,
        /// The launcher's pull policy.
        image_pull_policy: Option<String>,
        /// `LiveUpdate` (default) or `Stage`.
        vm_rollout_strategy: Option<String>,
        /// The StorageClass of the claims that keep TPMs and EFI variables; the cluster's default when unset.
        vm_state_storage_class: Option<String>,
    }
}

always_or_default!(KubeVirtConfiguration, KubeVirtSpec, KubeVirtStatus);

api_struct! {
    /// How migrations run. In a KubeVirt object an unset field is the default; the result of
    /// [`crate::config::effective`] has every field of section 5 of the design set.
    MigrationConfiguration {
        /// The taint that empties a node.
        node_drain_taint_key: Option<String>,
        /// How many may leave one node at once.
        parallel_outbound_migrations_per_node: Option<u32>,
        /// How many may run in the cluster at once.
        parallel_migrations_per_cluster: Option<u32>,
        /// Godwit's own: how many may arrive on one node at once.
        parallel_inbound_migrations_per_node: Option<u32>,
        /// Godwit's own: how often an evacuation tries to move one VMI before it stops and says so.
        max_attempts: Option<u32>,
        /// Slow the guest down when its memory changes faster than it can be sent.
        allow_auto_converge: Option<bool>,
        /// Bytes a second for one migration; 0 is unlimited.
        bandwidth_per_migration: Option<Quantity>,
        /// Seconds for each GiB to copy, then it is given up; 0 is never.
        #[serde(rename = "completionTimeoutPerGiB")]
        completion_timeout_per_gib: Option<i64>,
        /// Seconds without progress, then it is given up; 0 is never.
        progress_timeout: Option<i64>,
        /// Seconds to wait for utility volumes.
        utility_volumes_timeout: Option<i64>,
        /// The longest standstill to accept, in milliseconds.
        max_downtime_ms: Option<u64>,
        /// Migrate although disks may be unsafe.
        unsafe_migration_override: Option<bool>,
        /// Post-copy when pre-copy does not end.
        allow_post_copy: Option<bool>,
        /// Pause or post-copy when pre-copy does not end; follows `allowPostCopy` when unset.
        allow_workload_disruption: Option<bool>,
        /// Godwit's own: give a migration up as soon as its passes show that it will not end, instead of at its timeout; no
        /// when unset.
        fail_when_not_converging: Option<bool>,
        /// Send in the clear.
        #[serde(rename = "disableTLS")]
        disable_tls: Option<bool>,
        /// A network of its own for migrations: the NetworkAttachmentDefinition, `NAME` or `NAMESPACE/NAME`, that handlers' pods are
        /// attached to.
        network: Option<String>,
        /// Keep the SELinux level of the source.
        #[serde(rename = "matchSELinuxLevelOnMigration")]
        match_selinux_level_on_migration: Option<bool>,
    }
}

api_struct! {
    /// Feature gates.
    DeveloperConfiguration {
        /// Gates to open. Those that are on anyway are accepted and do nothing.
        feature_gates: Vec<String>,
        /// Gates to close.
        disabled_feature_gates: Vec<String>,
    }
}

api_struct! {
    /// Defaults of networks.
    NetworkConfiguration {
        /// The binding of the pod network's interface when none is given: `masquerade` or `bridge`.
        default_network_interface: Option<String>,
        /// Bridge binding on the pod network is allowed; true when unset.
        permit_bridge_interface_on_pod_network: Option<bool>,
    }
}

string_enum! {
    /// The phase of the installation.
    KubeVirtPhase default Unset {
        /// Not yet seen.
        Unset = "",
        /// Being installed.
        Deploying = "Deploying",
        /// Ready.
        Deployed = "Deployed",
        /// Being removed.
        Deleting = "Deleting",
        /// Removed.
        Deleted = "Deleted",
    }
}

always_or_default!(KubeVirtPhase);

api_struct! {
    /// The state of the installation.
    KubeVirtStatus {
        /// The phase.
        phase: KubeVirtPhase,
        /// `Available`, `Created`, `Progressing`, `Degraded`.
        conditions: Vec<Condition>,
        /// The operator's version.
        operator_version: Option<String>,
        /// The registry wanted.
        target_kube_virt_registry: Option<String>,
        /// The version wanted.
        target_kube_virt_version: Option<String>,
        /// The registry seen.
        observed_kube_virt_registry: Option<String>,
        /// The version seen.
        observed_kube_virt_version: Option<String>,
        /// The generation that was last dealt with.
        observed_generation: Option<i64>,
        /// VMIs whose launcher is of an older version.
        outdated_virtual_machine_instance_workloads: Option<i64>,
        /// The architecture of VMIs that say none.
        default_architecture: Option<String>,
        /// Godwit's own: the greatest CPU model that all nodes have, where that is asked for.
        cpu_baseline: Option<CpuBaseline>,
    }
}

api_struct! {
    /// The greatest common CPU model.
    CpuBaseline {
        /// The model; none when the nodes have none in common.
        model: Option<String>,
        /// How many nodes have said what they have.
        nodes: u64,
    }
}

impl KubeVirt {
    /// The CPU model of VMIs that say none, where it is not their node's own.
    pub fn default_cpu_model(&self) -> Option<&str> {
        let configuration = &self.spec.configuration;
        let baseline = self.status.cpu_baseline.as_ref().filter(|_| configuration.has_cpu_baseline());
        configuration.cpu_model.as_deref().or_else(|| baseline?.model.as_deref())
    }
}

impl KubeVirtConfiguration {
    /// Whether VMIs get the greatest common CPU model.
    pub fn has_cpu_baseline(&self) -> bool {
        self.cpu_baseline.as_deref() == Some(BASELINE_AUTO)
    }
}

/// The value of `cpuBaseline`.
pub const BASELINE_AUTO: &str = "Auto";
