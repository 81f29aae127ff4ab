//! MigrationPolicy: other migration settings for some VMIs (`reference/kubevirt-contract.md`, 1.10).

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::Quantity;

/// Migration settings for the VMIs that it selects; cluster-scoped.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MigrationPolicy {
    /// Standard object metadata.
    pub metadata: ObjectMeta,
    /// Whom it is for, and what it sets.
    pub spec: MigrationPolicySpec,
    /// Empty.
    pub status: MigrationPolicyStatus,
}

kind!(cluster MigrationPolicy, "migrations.kubevirt.io", "v1alpha1", "migrationpolicies", [spec, status]);

api_struct! {
    /// Whom a policy is for, and what it sets; what is unset stays as the cluster has it.
    MigrationPolicySpec {
        /// Whom it is for; nobody when unset.
        selectors: Option<MigrationPolicySelectors>,
        /// Slow the guest down when its memory changes faster than it can be sent.
        allow_auto_converge: Option<bool>,
        /// Bytes a second for one migration; 0 is unlimited.
        bandwidth_per_migration: Option<Quantity>,
        /// Seconds for each GiB to copy, then it is given up; 0 is never.
        #[serde(rename = "completionTimeoutPerGiB")]
        completion_timeout_per_gib: Option<i64>,
        /// The longest standstill to accept, in milliseconds.
        max_downtime_ms: Option<u64>,
        /// Post-copy when pre-copy does not end.
        allow_post_copy: Option<bool>,
        /// Pause or post-copy when pre-copy does not end; follows `allowPostCopy` when unset.
        allow_workload_disruption: Option<bool>,
    }
}

api_struct! {
    /// Plain labels, all of which must be there.
    MigrationPolicySelectors {
        /// Labels of the namespace.
        namespace_selector: BTreeMap<String, String>,
        /// Labels of the VMI.
        virtual_machine_instance_selector: BTreeMap<String, String>,
    }
}

api_struct! {
    /// Empty.
    MigrationPolicyStatus {}
}

always_or_default!(MigrationPolicyStatus);
