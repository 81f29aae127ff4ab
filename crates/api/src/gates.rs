//! Feature gates: which are known, which are on (`reference/kubevirt-contract.md`, 1.11).
//!
//! Gates are accepted as today's KubeVirt does: those that have become part of KubeVirt are on whatever is listed, `LiveMigration`
//! among them. A cluster that follows the documents of `v1alpha3` (seed 002) says so with the annotation
//! [`ANNOTATION_FEATURE_GATES`] on its KubeVirt object; a list of gates without `LiveMigration` then means that nothing
//! migrates.

use std::collections::BTreeMap;

use crate::kubevirt::KubeVirt;
use crate::names::ANNOTATION_FEATURE_GATES;

/// The gate without which, by the rules of `v1alpha3`, nothing migrates.
pub const LIVE_MIGRATION: &str = "LiveMigration";
/// Handlers may only write VMIs of their own node.
pub const NODE_RESTRICTION: &str = "NodeRestriction";
/// Either of these opens `maxDowntimeMs`.
pub const MIGRATION_STALL_DETECTION: &str = "MigrationStallDetection";
/// Either of these opens `maxDowntimeMs`.
pub const MIGRATION_DOWNTIME_TUNING: &str = "MigrationDowntimeTuning";
/// The value of [`ANNOTATION_FEATURE_GATES`] that chooses the rules of `v1alpha3`.
pub const V1ALPHA3: &str = "v1alpha3";
/// The key of the ConfigMap `kubevirt-config` that lists gates, separated by commas.
pub const CONFIG_MAP_KEY: &str = "feature-gates";

/// Part of KubeVirt by now: on, listed or not.
const GA: &[&str] = &[
    LIVE_MIGRATION,
    "SRIOVLiveMigration",
    "NonRoot",
    "PSA",
    "CPUNodeDiscovery",
    "NUMA",
    "CommonInstancetypesDeployment",
    "GPU",
    "HotplugNICs",
    "BochsDisplayForEFIGuests",
    "VMLiveUpdateFeatures",
    "NetworkBindingPlugins",
    "DynamicPodInterfaceNaming",
    "VolumesUpdateStrategy",
    "VolumeMigration",
    "DisableCustomSELinuxPolicy",
    "AutoResourceLimits",
    "ClusterProfiler",
    "VMPersistentState",
    "VMExport",
    "PersistentReservation",
    "InstancetypeReferencePolicy",
    "EnableVirtioFsConfigVolumes",
    "ExpandDisks",
    "PanicDevices",
    "LiveUpdateNADRef",
    "VideoConfig",
    "SecureExecution",
    "MigrationPriorityQueue",
    "VmiMemoryOverheadReport",
    "LibvirtHooksServerAndClient",
    // older names in the seeds
    "DataVolumes",
    "SRIOV",
];

/// On unless disabled.
const BETA: &[&str] = &[
    "ImageVolume",
    "Snapshot",
    "WorkloadEncryptionSEV",
    "KubevirtSeccompProfile",
    NODE_RESTRICTION,
    "GPUsWithDRA",
    "HostDevicesWithDRA",
    "DecentralizedLiveMigration",
    "DeclarativeHotplugVolumes",
    "PasstBinding",
    "PodSecondaryInterfaceNamingUpgrade",
    "ExternalNetResourceInjection",
    "RebootPolicy",
    "Template",
    "OptOutRoleAggregation",
];

/// Off unless listed; those that change something here.
const ALPHA: &[&str] = &[MIGRATION_STALL_DETECTION, MIGRATION_DOWNTIME_TUNING];

/// What is said of gates, wherever it is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gates {
    listed: Vec<String>,
    disabled: Vec<String>,
    v1alpha3: bool,
}

impl Gates {
    /// Reads the gates: the KubeVirt object's list, or the ConfigMap's (its `data`) when the object lists none.
    pub fn of(kubevirt: Option<&KubeVirt>, config_map: Option<&BTreeMap<String, String>>) -> Self {
        let developer = kubevirt.and_then(|kubevirt| kubevirt.spec.configuration.developer_configuration.as_ref());
        let mut listed = developer.map(|developer| developer.feature_gates.clone()).unwrap_or_default();
        if listed.is_empty() {
            listed = config_map.and_then(|data| data.get(CONFIG_MAP_KEY)).map(|text| split(text)).unwrap_or_default();
        }
        Self {
            listed,
            disabled: developer.map(|developer| developer.disabled_feature_gates.clone()).unwrap_or_default(),
            v1alpha3: kubevirt.and_then(|kubevirt| kubevirt.annotation(ANNOTATION_FEATURE_GATES)) == Some(V1ALPHA3),
        }
    }

    /// Whether a gate is open: part of KubeVirt, else listed, else not disabled and on by default.
    pub fn is_open(&self, gate: &str) -> bool {
        let among = |list: &[String]| list.iter().any(|one| one == gate);
        GA.contains(&gate) || among(&self.listed) || (!among(&self.disabled) && BETA.contains(&gate))
    }

    /// Whether VMIs may be migrated. Always, unless the rules of `v1alpha3` are chosen and `LiveMigration` is missing in the
    /// list of gates, or disabled. No list at all says nothing, so it is no refusal.
    pub fn live_migration(&self) -> bool {
        let among = |list: &[String]| list.iter().any(|one| one == LIVE_MIGRATION);
        !self.v1alpha3 || among(&self.listed) || (self.listed.is_empty() && !among(&self.disabled))
    }

    /// Whether `maxDowntimeMs` counts.
    pub fn max_downtime(&self) -> bool {
        self.is_open(MIGRATION_STALL_DETECTION) || self.is_open(MIGRATION_DOWNTIME_TUNING)
    }

    /// Listed gates that change nothing here and are no part of KubeVirt either.
    pub fn without_effect(&self) -> impl Iterator<Item = &str> {
        let known = |gate: &&str| GA.contains(gate) || BETA.contains(gate) || ALPHA.contains(gate);
        self.listed.iter().map(String::as_str).filter(move |gate| !known(gate))
    }
}

fn split(text: &str) -> Vec<String> {
    let words =
        text.split([',', '\n']).map(|word| word.trim().trim_start_matches("- ").trim_matches(['"', '\'']).trim());
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn gates(annotation: Option<&str>, developer: Value, map: Option<&str>) -> Gates {
        let annotations: Value = annotation.map(|value| json!({ ANNOTATION_FEATURE_GATES: value })).unwrap_or_default();
        let kubevirt: KubeVirt = serde_json::from_value(json!({
            "metadata": { "annotations": annotations },
            "spec": { "configuration": { "developerConfiguration": developer } },
        }))
        .unwrap();
        let map = map.map(|text| BTreeMap::from([(CONFIG_MAP_KEY.to_owned(), text.to_owned())]));
        Gates::of(Some(&kubevirt), map.as_ref())
    }

    #[test]
    fn live_migration_is_on_as_in_todays_kubevirt() {
        assert!(Gates::of(None, None).live_migration());
        for developer in [
            json!(null),
            json!({ "featureGates": [] }),
            json!({ "featureGates": ["DataVolumes"] }),
            json!({ "disabledFeatureGates": ["LiveMigration"] }),
        ] {
            assert!(gates(None, developer.clone(), Some("DataVolumes")).live_migration(), "{developer}");
            assert!(gates(Some("v1"), developer.clone(), None).live_migration(), "{developer}");
        }
    }

    #[test]
    fn off_means_off_when_the_old_rules_are_chosen() {
        let on = |developer: Value, map: Option<&str>| gates(Some(V1ALPHA3), developer, map).live_migration();
        assert!(on(json!({ "featureGates": ["DataVolumes", "LiveMigration"] }), None));
        assert!(!on(json!({ "featureGates": ["DataVolumes"] }), None));
        assert!(on(json!(null), None), "no list says nothing");
        assert!(on(json!({ "featureGates": [] }), None));
        assert!(!on(json!({ "disabledFeatureGates": ["LiveMigration"] }), None));
        // the ConfigMap counts where the object lists nothing
        assert!(on(json!(null), Some("DataVolumes, LiveMigration")));
        assert!(!on(json!(null), Some("DataVolumes,SRIOV")));
        assert!(!on(json!({ "featureGates": ["DataVolumes"] }), Some("LiveMigration")), "the object's list wins");
    }

    #[test]
    fn each_stage_has_its_default() {
        let gates = gates(
            None,
            json!({ "featureGates": ["MigrationStallDetection", "Sidecar"], "disabledFeatureGates": ["NodeRestriction", "NonRoot"] }),
            None,
        );
        assert!(gates.is_open("NonRoot") && gates.is_open("ImageVolume") && gates.is_open("Sidecar"));
        assert!(!gates.is_open(NODE_RESTRICTION) && !gates.is_open("VSOCK") && gates.max_downtime());
        assert!(Gates::default().is_open(NODE_RESTRICTION) && !Gates::default().max_downtime());
        assert_eq!(gates.without_effect().collect::<Vec<_>>(), ["Sidecar"]);
    }

    #[test]
    fn lists_in_a_config_map_are_read_in_every_spelling() {
        assert_eq!(split("A, B,,C"), ["A", "B", "C"]);
        assert_eq!(split("- A\n- \"B\"\n"), ["A", "B"]);
        assert_eq!(split(" \n"), Vec::<String>::new());
    }
}
