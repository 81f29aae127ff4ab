//! MigrationPolicy: other migration settings for some VMIs (`reference/kubevirt-contract.md`, 1.10).

use std::cmp::Reverse;
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::{over, sift};
use crate::{MigrationConfiguration, Quantity};

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
        /// Godwit's own: give a migration up as soon as its passes show that it will not end.
        fail_when_not_converging: Option<bool>,
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

/// What one migration runs with.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// The name of the policy that was applied (`migrationState.migrationPolicyName`).
    pub policy: Option<String>,
    /// The configuration to go by (`migrationState.migrationConfiguration`).
    pub configuration: MigrationConfiguration,
}

/// The configuration for the migration of a VMI: the cluster's ([`crate::config::effective`]), overridden field by field by the
/// one policy that fits best.
///
/// A policy fits when the VMI carries every label of its VMI selector and the namespace every label of its namespace
/// selector. Of those that fit, the one with the most labels wins; at equality the one with more labels of the VMI, then the
/// first by name. A policy without `selectors` is for nobody, one whose selectors are both empty is for everybody that no other
/// policy fits. (KubeVirt skips the namespace selector for a VMI without labels; here both always count.)
///
/// A policy that sets `allowPostCopy` and not `allowWorkloadDisruption` sets both. Values that cannot be are passed over.
pub fn resolve<'a>(
    policies: impl IntoIterator<Item = &'a MigrationPolicy>,
    vmi_labels: Option<&BTreeMap<String, String>>,
    namespace_labels: Option<&BTreeMap<String, String>>,
    cluster: &MigrationConfiguration,
) -> Resolved {
    let best = policies
        .into_iter()
        .filter_map(|policy| {
            let selectors = policy.spec.selectors.as_ref()?;
            let vmi = matching(&selectors.virtual_machine_instance_selector, vmi_labels)?;
            let namespace = matching(&selectors.namespace_selector, namespace_labels)?;
            let name = policy.metadata.name.as_deref().unwrap_or_default();
            Some(((vmi + namespace, vmi, Reverse(name)), policy))
        })
        .max_by_key(|(rank, _)| *rank);
    match best {
        None => Resolved { policy: None, configuration: cluster.clone() },
        Some(((_, _, Reverse(name)), policy)) => Resolved {
            policy: Some(name.to_owned()),
            configuration: over(sift(policy.spec.overrides()).0, cluster.clone()),
        },
    }
}

/// How many labels a selector lists, or none when one of them is not there.
fn matching(selector: &BTreeMap<String, String>, labels: Option<&BTreeMap<String, String>>) -> Option<usize> {
    let carried = |key: &String, value: &String| labels.and_then(|labels| labels.get(key)) == Some(value);
    selector.iter().all(|(key, value)| carried(key, value)).then_some(selector.len())
}

impl MigrationPolicySpec {
    /// What the policy says, as a configuration that is unset elsewhere.
    pub(crate) fn overrides(&self) -> MigrationConfiguration {
        MigrationConfiguration {
            allow_auto_converge: self.allow_auto_converge,
            bandwidth_per_migration: self.bandwidth_per_migration.clone(),
            completion_timeout_per_gib: self.completion_timeout_per_gib,
            max_downtime_ms: self.max_downtime_ms,
            allow_post_copy: self.allow_post_copy,
            allow_workload_disruption: self.allow_workload_disruption.or(self.allow_post_copy),
            fail_when_not_converging: self.fail_when_not_converging,
            ..MigrationConfiguration::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::config::{bandwidth_bytes, effective};

    fn policy(name: &str, vmi: &[&str], namespace: &[&str], mut spec: Value) -> MigrationPolicy {
        spec["selectors"] =
            json!({ "virtualMachineInstanceSelector": labels(vmi), "namespaceSelector": labels(namespace) });
        serde_json::from_value(json!({ "metadata": { "name": name }, "spec": spec })).unwrap()
    }

    fn labels(keys: &[&str]) -> BTreeMap<String, String> {
        keys.iter().map(|key| ((*key).to_owned(), "yes".to_owned())).collect()
    }

    fn winner(policies: &[MigrationPolicy], vmi: &[&str], namespace: &[&str]) -> Option<String> {
        resolve(policies, Some(&labels(vmi)), Some(&labels(namespace)), &effective(None, None)).policy
    }

    #[test]
    fn most_labels_then_more_of_the_vmi_then_the_first_name() {
        let none = json!({});
        let policies = [
            policy("z-one", &["a"], &[], none.clone()),
            policy("m-two-of-the-namespace", &[], &["n", "o"], none.clone()),
            policy("n-two-mixed", &["a"], &["n"], none.clone()),
            policy("x-two-of-the-vmi", &["a", "b"], &[], none.clone()),
            policy("w-two-of-the-vmi", &["a", "c"], &[], none.clone()),
            policy("three", &["a", "b"], &["p"], none),
        ];
        assert_eq!(winner(&policies, &[], &[]), None);
        assert_eq!(winner(&policies, &["a"], &[]).unwrap(), "z-one");
        assert_eq!(winner(&policies, &["a"], &["n", "o"]).unwrap(), "n-two-mixed");
        assert_eq!(winner(&policies, &[], &["n", "o"]).unwrap(), "m-two-of-the-namespace");
        assert_eq!(winner(&policies, &["a", "b"], &["n", "o"]).unwrap(), "x-two-of-the-vmi");
        assert_eq!(winner(&policies, &["a", "b", "c"], &["n", "o"]).unwrap(), "w-two-of-the-vmi");
        assert_eq!(winner(&policies, &["a", "b", "c"], &["n", "o", "p"]).unwrap(), "three");
    }

    #[test]
    fn both_selectors_must_match_and_values_count() {
        let both = [policy("both", &["a"], &["n"], json!({}))];
        assert_eq!(winner(&both, &["a"], &[]), None);
        assert_eq!(winner(&both, &[], &["n"]), None);
        let other = BTreeMap::from([("a".to_owned(), "no".to_owned())]);
        let cluster = effective(None, None);
        assert_eq!(resolve(&both, Some(&other), Some(&labels(&["n"])), &cluster).policy, None);
        // a VMI without labels is no way around the namespace selector
        let namespace = [policy("namespace", &[], &["n"], json!({}))];
        assert_eq!(resolve(&namespace, None, None, &cluster).policy, None);
        assert_eq!(resolve(&namespace, None, Some(&labels(&["n"])), &cluster).policy.as_deref(), Some("namespace"));
    }

    #[test]
    fn without_selectors_it_is_for_nobody_with_empty_ones_for_everybody_else() {
        let mut nobody = policy("nobody", &[], &[], json!({}));
        nobody.spec.selectors = None;
        assert_eq!(winner(&[nobody.clone()], &["a"], &["n"]), None);
        let policies = [nobody, policy("everybody", &[], &[], json!({})), policy("some", &["a"], &[], json!({}))];
        assert_eq!(winner(&policies, &[], &[]).unwrap(), "everybody");
        assert_eq!(winner(&policies, &["a"], &[]).unwrap(), "some");
    }

    #[test]
    fn single_fields_are_overridden_and_the_rest_is_the_clusters() {
        let spec = json!({ "bandwidthPerMigration": "1Mi", "allowPostCopy": true, "completionTimeoutPerGiB": 0 });
        let cluster = effective(None, None);
        let found = resolve(&[policy("p", &["a"], &[], spec)], Some(&labels(&["a"])), None, &cluster);
        let mut expected = cluster.clone();
        expected.bandwidth_per_migration = Some(Quantity::from("1Mi"));
        expected.allow_post_copy = Some(true);
        expected.allow_workload_disruption = Some(true);
        expected.completion_timeout_per_gib = Some(0);
        assert_eq!(found, Resolved { policy: Some("p".into()), configuration: expected });
        let spec = json!({ "allowPostCopy": true, "allowWorkloadDisruption": false });
        let found = resolve(&[policy("p", &["a"], &[], spec)], Some(&labels(&["a"])), None, &cluster);
        assert_eq!(found.configuration.allow_workload_disruption, Some(false));
    }

    #[test]
    fn values_that_cannot_be_are_passed_over() {
        let spec = json!({
            "bandwidthPerMigration": "fast", "completionTimeoutPerGiB": -1, "maxDowntimeMs": 0, "allowAutoConverge": true,
        });
        let cluster = effective(None, None);
        let found = resolve(&[policy("p", &[], &[], spec)], None, None, &cluster).configuration;
        assert_eq!(bandwidth_bytes(&found), Some(64 << 20));
        assert_eq!(found.completion_timeout_per_gib, Some(800));
        assert_eq!(found.max_downtime_ms, cluster.max_downtime_ms);
        assert_eq!(found.allow_auto_converge, Some(true));
    }

    proptest! {
        /// Whatever the order in which policies are listed, the same one wins, and it fits.
        #[test]
        fn the_order_of_the_list_does_not_matter(
            selectors in prop::collection::vec((0u8..8, 0u8..8), 0..8),
            vmi in 0u8..8,
            namespace in 0u8..8,
            turn in 0usize..8,
        ) {
            let names = ["a", "b", "c"];
            let bits = |set: u8| -> Vec<&str> { names.iter().enumerate().filter(|(i, _)| set & (1 << i) != 0).map(|(_, n)| *n).collect() };
            let mut policies: Vec<MigrationPolicy> = selectors
                .iter()
                .enumerate()
                .map(|(i, (v, n))| policy(&format!("p{i}"), &bits(*v), &bits(*n), json!({})))
                .collect();
            let first = winner(&policies, &bits(vmi), &bits(namespace));
            let count = policies.len().max(1);
            policies.rotate_left(turn % count);
            prop_assert_eq!(&winner(&policies, &bits(vmi), &bits(namespace)), &first);
            let fits = |(v, n): &(u8, u8)| v & !vmi == 0 && n & !namespace == 0;
            prop_assert_eq!(first.is_some(), selectors.iter().any(fits));
        }
    }
}
