//! The configuration in force: the KubeVirt object over the seeds' older names over the defaults.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::Quantity;
use crate::gates::Gates;
use crate::kubevirt::{KubeVirt, MigrationConfiguration};
use crate::migration_network::NetworkName;
use crate::names::{CONFIG_MAP_NAME, KUBEVIRT_NAMESPACE, TAINT_DRAIN};
use crate::quantity::QuantityError;
use crate::vmi::{MigrationMethod, VirtualMachineInstance};

/// How many migrations may run in the cluster at once.
pub const PARALLEL_MIGRATIONS_PER_CLUSTER: u32 = 5;
/// How many migrations may leave one node at once.
pub const PARALLEL_OUTBOUND_MIGRATIONS_PER_NODE: u32 = 2;
/// How many migrations may arrive on one node at once.
pub const PARALLEL_INBOUND_MIGRATIONS_PER_NODE: u32 = 2;
/// How often an evacuation tries to move one VMI before it stops.
pub const MAX_ATTEMPTS: u32 = 10;
/// Bytes a second for one migration.
pub const BANDWIDTH_PER_MIGRATION: &str = "64Mi";
/// Seconds for each GiB to copy.
pub const COMPLETION_TIMEOUT_PER_GIB: i64 = 800;
/// Seconds without progress.
pub const PROGRESS_TIMEOUT: i64 = 150;
/// Seconds to wait for utility volumes.
pub const UTILITY_VOLUMES_TIMEOUT: i64 = 150;
/// The longest standstill to accept, in milliseconds (QEMU's own default).
pub const MAX_DOWNTIME_MS: u64 = 300;
/// The key of the ConfigMap `kubevirt-config` that holds the migrations' settings as YAML.
pub const CONFIG_MAP_KEY: &str = "migrations";

/// The defaults (design, section 5).
pub fn defaults() -> MigrationConfiguration {
    MigrationConfiguration {
        node_drain_taint_key: Some(TAINT_DRAIN.to_owned()),
        parallel_outbound_migrations_per_node: Some(PARALLEL_OUTBOUND_MIGRATIONS_PER_NODE),
        parallel_migrations_per_cluster: Some(PARALLEL_MIGRATIONS_PER_CLUSTER),
        parallel_inbound_migrations_per_node: Some(PARALLEL_INBOUND_MIGRATIONS_PER_NODE),
        max_attempts: Some(MAX_ATTEMPTS),
        allow_auto_converge: Some(false),
        bandwidth_per_migration: Some(Quantity::from(BANDWIDTH_PER_MIGRATION)),
        completion_timeout_per_gib: Some(COMPLETION_TIMEOUT_PER_GIB),
        progress_timeout: Some(PROGRESS_TIMEOUT),
        utility_volumes_timeout: Some(UTILITY_VOLUMES_TIMEOUT),
        max_downtime_ms: Some(MAX_DOWNTIME_MS),
        unsafe_migration_override: Some(false),
        allow_post_copy: Some(false),
        allow_workload_disruption: None,
        fail_when_not_converging: Some(false),
        disable_tls: Some(false),
        network: None,
        match_selinux_level_on_migration: None,
    }
}

/// The configuration in force, every number and switch set.
///
/// `spec.configuration.migrations` wins over `spec.configuration.migrationConfiguration`, which wins over the ConfigMap
/// `kubevirt-config` (its `data`), which wins over the defaults; field by field. Values that cannot be are passed over
/// ([`ignored`] names them). `maxDowntimeMs` counts only with its feature gate, as in KubeVirt.
pub fn effective(kubevirt: Option<&KubeVirt>, config_map: Option<&BTreeMap<String, String>>) -> MigrationConfiguration {
    let gates = Gates::of(kubevirt, config_map);
    let mut out = MigrationConfiguration::default();
    for source in sources(kubevirt, config_map).0 {
        let mut sifted = sift(source.settings).0;
        if !gates.max_downtime() {
            sifted.max_downtime_ms = None;
        }
        out = over(out, sifted);
    }
    out = over(out, defaults());
    out.allow_workload_disruption = out.allow_workload_disruption.or(out.allow_post_copy);
    out
}

/// Everything that the configuration says and that is not applied, one sentence each, with its place.
pub fn ignored(kubevirt: Option<&KubeVirt>, config_map: Option<&BTreeMap<String, String>>) -> Vec<String> {
    let (sources, mut out) = sources(kubevirt, config_map);
    let gates = Gates::of(kubevirt, config_map);
    for source in sources {
        if source.settings.max_downtime_ms.is_some() && !gates.max_downtime() {
            out.push(format!("{}.maxDowntimeMs: {MAX_DOWNTIME_NEEDS_A_GATE}", source.place));
        }
        let faults = sift(source.settings).1;
        out.extend(faults.into_iter().map(|fault| format!("{}.{}: {}", source.place, fault.field, fault.why)));
    }
    out
}

/// What is said of `maxDowntimeMs` while its gates are closed, in KubeVirt's words.
pub const MAX_DOWNTIME_NEEDS_A_GATE: &str = "maxDowntimeMs cannot be modified without enabling the \
                                             MigrationStallDetection or MigrationDowntimeTuning feature gate";

struct Source {
    place: String,
    settings: MigrationConfiguration,
}

/// The places where settings are read, the one that wins first; and what could not be read.
fn sources(kubevirt: Option<&KubeVirt>, config_map: Option<&BTreeMap<String, String>>) -> (Vec<Source>, Vec<String>) {
    let configuration = kubevirt.map(|kubevirt| &kubevirt.spec.configuration);
    let newest = configuration.and_then(|configuration| configuration.migrations.clone());
    let older = configuration.and_then(|configuration| configuration.migration_configuration.clone());
    let (oldest, unread) = config_map.map(from_config_map).unwrap_or_default();
    let sources = [
        ("spec.configuration.migrations".to_owned(), newest.unwrap_or_default()),
        ("spec.configuration.migrationConfiguration".to_owned(), older.unwrap_or_default()),
        (format!("ConfigMap {CONFIG_MAP_NAME}, {CONFIG_MAP_KEY}"), oldest),
    ];
    (sources.into_iter().map(|(place, settings)| Source { place, settings }).collect(), unread)
}

/// `first` where it says something, `second` elsewhere.
pub(crate) fn over(first: MigrationConfiguration, second: MigrationConfiguration) -> MigrationConfiguration {
    MigrationConfiguration {
        node_drain_taint_key: first.node_drain_taint_key.or(second.node_drain_taint_key),
        parallel_outbound_migrations_per_node: first
            .parallel_outbound_migrations_per_node
            .or(second.parallel_outbound_migrations_per_node),
        parallel_migrations_per_cluster: first
            .parallel_migrations_per_cluster
            .or(second.parallel_migrations_per_cluster),
        parallel_inbound_migrations_per_node: first
            .parallel_inbound_migrations_per_node
            .or(second.parallel_inbound_migrations_per_node),
        max_attempts: first.max_attempts.or(second.max_attempts),
        allow_auto_converge: first.allow_auto_converge.or(second.allow_auto_converge),
        bandwidth_per_migration: first.bandwidth_per_migration.or(second.bandwidth_per_migration),
        completion_timeout_per_gib: first.completion_timeout_per_gib.or(second.completion_timeout_per_gib),
        progress_timeout: first.progress_timeout.or(second.progress_timeout),
        utility_volumes_timeout: first.utility_volumes_timeout.or(second.utility_volumes_timeout),
        max_downtime_ms: first.max_downtime_ms.or(second.max_downtime_ms),
        unsafe_migration_override: first.unsafe_migration_override.or(second.unsafe_migration_override),
        allow_post_copy: first.allow_post_copy.or(second.allow_post_copy),
        allow_workload_disruption: first.allow_workload_disruption.or(second.allow_workload_disruption),
        fail_when_not_converging: first.fail_when_not_converging.or(second.fail_when_not_converging),
        disable_tls: first.disable_tls.or(second.disable_tls),
        network: first.network.or(second.network),
        match_selinux_level_on_migration: first
            .match_selinux_level_on_migration
            .or(second.match_selinux_level_on_migration),
    }
}

/// A value that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The field, as `progressTimeout`.
    pub field: &'static str,
    /// What is wrong with it.
    pub why: String,
}

/// Takes out the values that cannot be: counts of zero, quantities that are none, negative or absurd times, empty names.
pub fn sift(mut settings: MigrationConfiguration) -> (MigrationConfiguration, Vec<Fault>) {
    let mut faults = Vec::new();
    let mut fault = |field: &'static str, why: &str| faults.push(Fault { field, why: why.to_owned() });
    for (field, count) in [
        ("parallelMigrationsPerCluster", &mut settings.parallel_migrations_per_cluster),
        ("parallelOutboundMigrationsPerNode", &mut settings.parallel_outbound_migrations_per_node),
        ("parallelInboundMigrationsPerNode", &mut settings.parallel_inbound_migrations_per_node),
        ("maxAttempts", &mut settings.max_attempts),
    ] {
        if *count == Some(0) {
            fault(field, "must be at least 1, or nothing would ever migrate");
            *count = None;
        }
    }
    for (field, timeout) in [
        ("completionTimeoutPerGiB", &mut settings.completion_timeout_per_gib),
        ("progressTimeout", &mut settings.progress_timeout),
        ("utilityVolumesTimeout", &mut settings.utility_volumes_timeout),
    ] {
        match *timeout {
            Some(seconds) if seconds < 0 => fault(field, NEGATIVE),
            Some(seconds) if seconds > MAX_SECONDS => {
                fault(field, "must not be more than a year (31622400 seconds); 0 is without a limit");
            }
            _ => continue,
        }
        *timeout = None;
    }
    match settings.bandwidth_per_migration.as_ref().map(Quantity::bytes) {
        Some(Err(QuantityError::Negative(_))) => fault("bandwidthPerMigration", NEGATIVE),
        Some(Err(error)) => fault("bandwidthPerMigration", &error.to_string()),
        _ => {}
    }
    settings.bandwidth_per_migration = settings.bandwidth_per_migration.filter(|quantity| quantity.bytes().is_ok());
    if settings.max_downtime_ms.is_some_and(|ms| !(1..=2_000_000).contains(&ms)) {
        fault("maxDowntimeMs", "must be between 1 and 2000000");
        settings.max_downtime_ms = None;
    }
    for (field, name) in [("nodeDrainTaintKey", &mut settings.node_drain_taint_key), ("network", &mut settings.network)]
    {
        if name.as_deref() == Some("") {
            fault(field, "must not be empty");
            *name = None;
        }
    }
    if settings.network.as_deref().is_some_and(|network| NetworkName::parse(network, KUBEVIRT_NAMESPACE).is_none()) {
        fault("network", "is no name of a NetworkAttachmentDefinition: NAME, or NAMESPACE/NAME");
        settings.network = None;
    }
    (settings, faults)
}

/// KubeVirt's words for a number below zero.
pub const NEGATIVE: &str = "must not be negative";
/// The longest time that can be meant: more is a slip of the pen, and near the end of what clocks can count.
const MAX_SECONDS: i64 = 366 * 24 * 3600;

/// The seeds' ConfigMap: YAML under the key `migrations`, with numbers and switches often written as strings. Also what could
/// not be read.
fn from_config_map(data: &BTreeMap<String, String>) -> (MigrationConfiguration, Vec<String>) {
    let mut out = MigrationConfiguration::default();
    let mut unread = Vec::new();
    let place = format!("ConfigMap {CONFIG_MAP_NAME}, {CONFIG_MAP_KEY}");
    let Some(text) = data.get(CONFIG_MAP_KEY) else { return (out, unread) };
    let fields: BTreeMap<String, Value> = match serde_saphyr::from_str::<Option<BTreeMap<String, Value>>>(text) {
        Ok(fields) => fields.unwrap_or_default(),
        Err(_) => {
            unread.push(format!("{place}: is no YAML mapping of settings, as `progressTimeout: 150`"));
            return (out, unread);
        }
    };
    // one field at a time, so that one bad value does not take the others with it
    for (key, value) in fields {
        if !FIELDS.contains(&key.as_str()) {
            unread.push(format!("{place}.{key}: there is no such setting"));
            continue;
        }
        let one = read_field(&key, &value).or_else(|| {
            // "5" and "true" as KubeVirt's old documents write them
            let text = value.as_str()?;
            read_field(&key, &serde_json::from_str(text.trim()).ok()?)
        });
        match one {
            Some(one) => out = over(out, one),
            None => unread.push(format!("{place}.{key}: {value} is no value for it")),
        }
    }
    (out, unread)
}

/// Every setting.
pub const FIELDS: [&str; 18] = [
    "nodeDrainTaintKey",
    "parallelOutboundMigrationsPerNode",
    "parallelMigrationsPerCluster",
    "parallelInboundMigrationsPerNode",
    "maxAttempts",
    "allowAutoConverge",
    "bandwidthPerMigration",
    "completionTimeoutPerGiB",
    "progressTimeout",
    "utilityVolumesTimeout",
    "maxDowntimeMs",
    "unsafeMigrationOverride",
    "allowPostCopy",
    "allowWorkloadDisruption",
    "failWhenNotConverging",
    "disableTLS",
    "network",
    "matchSELinuxLevelOnMigration",
];

fn read_field(key: &str, value: &Value) -> Option<MigrationConfiguration> {
    let object = Map::from_iter([(key.to_owned(), value.clone())]);
    serde_json::from_value(Value::Object(object)).ok()
}

/// What a migration of the VMI has to copy at least once, in bytes: the guest's memory (`memory.guest`, else the memory
/// request, else its limit), and with `migrationMethod` BlockMigration the disks that are not shared, as far as the VMI
/// says how large they are.
pub fn bytes_to_copy(vmi: &VirtualMachineInstance) -> u64 {
    let memory = memory_bytes(vmi);
    if vmi.status.migration_method != Some(MigrationMethod::BlockMigration) {
        return memory;
    }
    let disks = vmi.spec.volumes.iter().map(|volume| {
        let status = vmi.status.volume_status.iter().find(|status| status.name == volume.name);
        let claim = status.and_then(|status| status.persistent_volume_claim_info.as_ref());
        if claim.is_some_and(|claim| claim.access_modes.iter().any(|mode| mode == "ReadWriteMany")) {
            return 0;
        }
        let said = status.and_then(|status| status.size).and_then(|size| u64::try_from(size).ok());
        let asked = || volume.empty_disk.as_ref().map(|disk| &disk.capacity);
        let held = || claim.and_then(|claim| claim.capacity.get("storage").or_else(|| claim.requests.get("storage")));
        said.or_else(|| asked().or_else(held).and_then(|amount| amount.bytes().ok())).unwrap_or(0)
    });
    disks.fold(memory, u64::saturating_add)
}

/// The memory that a guest is to have.
pub fn memory_bytes(vmi: &VirtualMachineInstance) -> u64 {
    let domain = &vmi.spec.domain;
    let guest = domain.memory.as_ref().and_then(|memory| memory.guest.as_ref());
    let memory =
        guest.or_else(|| domain.resources.requests.get("memory")).or_else(|| domain.resources.limits.get("memory"));
    memory.and_then(|amount| amount.bytes().ok()).unwrap_or(0)
}

/// How long a migration of this many bytes may take, in seconds; `None` is for ever (`completionTimeoutPerGiB` 0).
///
/// Binary GiB, rounded up: the seeds give 6400 s for 8 GiB at 800 s each. (Today's KubeVirt counts decimal gigabytes and
/// would give 7200 s; `reference/kubevirt-contract.md`, 4.4.)
pub fn completion_timeout_seconds(configuration: &MigrationConfiguration, bytes: u64) -> Option<u64> {
    let per_gib = u64::try_from(configuration.completion_timeout_per_gib.unwrap_or(COMPLETION_TIMEOUT_PER_GIB)).ok()?;
    (per_gib != 0).then(|| per_gib.saturating_mul(bytes.div_ceil(1 << 30).max(1)))
}

/// Bytes a second for one migration; `None` is unlimited.
pub fn bandwidth_bytes(configuration: &MigrationConfiguration) -> Option<u64> {
    let quantity = configuration.bandwidth_per_migration.as_ref()?;
    quantity.bytes().ok().filter(|bytes| *bytes != 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn kubevirt(configuration: Value) -> KubeVirt {
        serde_json::from_value(json!({ "metadata": {}, "spec": { "configuration": configuration } })).unwrap()
    }

    #[test]
    fn defaults_are_the_seeds() {
        let effective = effective(None, None);
        assert_eq!(effective.parallel_migrations_per_cluster, Some(5));
        assert_eq!(effective.parallel_outbound_migrations_per_node, Some(2));
        assert_eq!(bandwidth_bytes(&effective), Some(64 << 20));
        assert_eq!(effective.completion_timeout_per_gib, Some(800));
        assert_eq!(effective.progress_timeout, Some(150));
        assert_eq!(effective.allow_workload_disruption, Some(false));
    }

    #[test]
    fn first_over_second_over_third() {
        let object = kubevirt(json!({
            "migrations": { "progressTimeout": 10, "allowPostCopy": true },
            "migrationConfiguration": { "progressTimeout": 20, "completionTimeoutPerGiB": 20 },
        }));
        let map = BTreeMap::from([(
            "migrations".to_owned(),
            "progressTimeout: \"30\"\ncompletionTimeoutPerGiB: 30\nparallelMigrationsPerCluster: \"30\"\n\
             bandwidthPerMigration: 32Mi\nparallelOutboundMigrationsPerNode: many\n"
                .to_owned(),
        )]);
        let effective = effective(Some(&object), Some(&map));
        assert_eq!(effective.progress_timeout, Some(10));
        assert_eq!(effective.completion_timeout_per_gib, Some(20));
        assert_eq!(effective.parallel_migrations_per_cluster, Some(30));
        assert_eq!(effective.parallel_outbound_migrations_per_node, Some(2));
        assert_eq!(bandwidth_bytes(&effective), Some(32 << 20));
        assert_eq!(effective.allow_workload_disruption, Some(true));
    }

    #[test]
    fn impossible_values_are_passed_over_and_named() {
        let object = kubevirt(json!({
            "migrations": { "progressTimeout": -1, "bandwidthPerMigration": "fast", "maxDowntimeMs": 500 },
            "migrationConfiguration": { "parallelMigrationsPerCluster": 0, "completionTimeoutPerGiB": 99_999_999_999i64 },
        }));
        let map = BTreeMap::from([(
            "migrations".to_owned(),
            "bandwidthPerMigration: 64Zi\nparallelOutboundMigrationsPerNode: -2\nspeed: 9\nmaxAttempts: 3\n".to_owned(),
        )]);
        let found = effective(Some(&object), Some(&map));
        let mut expected = defaults();
        expected.max_attempts = Some(3);
        expected.allow_workload_disruption = Some(false);
        assert_eq!(found, expected);
        assert_eq!(
            ignored(Some(&object), Some(&map)),
            [
                "ConfigMap kubevirt-config, migrations.parallelOutboundMigrationsPerNode: -2 is no value for it",
                "ConfigMap kubevirt-config, migrations.speed: there is no such setting",
                "spec.configuration.migrations.maxDowntimeMs: maxDowntimeMs cannot be modified without enabling the \
                 MigrationStallDetection or MigrationDowntimeTuning feature gate",
                "spec.configuration.migrations.progressTimeout: must not be negative",
                "spec.configuration.migrations.bandwidthPerMigration: \"fast\" is no quantity: quantities must match the \
                 regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
                "spec.configuration.migrationConfiguration.parallelMigrationsPerCluster: must be at least 1, or nothing \
                 would ever migrate",
                "spec.configuration.migrationConfiguration.completionTimeoutPerGiB: must not be more than a year \
                 (31622400 seconds); 0 is without a limit",
                "ConfigMap kubevirt-config, migrations.bandwidthPerMigration: \"64Zi\" is no quantity: quantities must \
                 match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
            ]
        );
        let broken = BTreeMap::from([("migrations".to_owned(), "]".to_owned())]);
        assert_eq!(effective(None, Some(&broken)), effective(None, None));
        assert!(ignored(None, Some(&broken))[0].contains("is no YAML mapping"));
        assert_eq!(ignored(None, Some(&BTreeMap::from([("migrations".to_owned(), String::new())]))), [""; 0]);
    }

    #[test]
    fn the_longest_standstill_counts_with_its_gate() {
        let object = |gates: Value| {
            kubevirt(
                json!({ "migrations": { "maxDowntimeMs": 500 }, "developerConfiguration": { "featureGates": gates } }),
            )
        };
        assert_eq!(effective(Some(&object(json!([]))), None).max_downtime_ms, Some(300));
        assert_eq!(effective(Some(&object(json!(["MigrationDowntimeTuning"]))), None).max_downtime_ms, Some(500));
    }

    /// The list of settings is that of the type.
    #[test]
    fn every_setting_is_listed() {
        let full = MigrationConfiguration {
            network: Some("n".into()),
            allow_workload_disruption: Some(true),
            match_selinux_level_on_migration: Some(true),
            ..defaults()
        };
        let object = serde_json::to_value(full).unwrap();
        let mut listed: Vec<&str> = FIELDS.to_vec();
        let mut known: Vec<&str> = object.as_object().unwrap().keys().map(String::as_str).collect();
        listed.sort_unstable();
        known.sort_unstable();
        assert_eq!(listed, known);
    }

    proptest! {
        /// Whatever stands in the ConfigMap, it is read or named, and the configuration can be worked with.
        #[test]
        fn any_config_map_is_read(text in "\\PC{0,60}", key in 0usize..FIELDS.len(), value in "[-+0-9.a-zA-Z\"]{0,12}", free: bool) {
            let text = if free { text } else { format!("{}: {value}\n", FIELDS[key]) };
            let map = BTreeMap::from([(CONFIG_MAP_KEY.to_owned(), text)]);
            let found = effective(None, Some(&map));
            let _ = ignored(None, Some(&map));
            prop_assert!(found.parallel_migrations_per_cluster.is_some_and(|count| count > 0));
            prop_assert!(found.progress_timeout.is_some_and(|seconds| (0..=MAX_SECONDS).contains(&seconds)));
            prop_assert!(found.bandwidth_per_migration.is_some_and(|quantity| quantity.bytes().is_ok()));
        }
    }

    #[test]
    fn time_limits() {
        let mut configuration = defaults();
        assert_eq!(completion_timeout_seconds(&configuration, 8 << 30), Some(6400));
        assert_eq!(completion_timeout_seconds(&configuration, (8 << 30) + 1), Some(7200));
        assert_eq!(completion_timeout_seconds(&configuration, 1), Some(800));
        configuration.completion_timeout_per_gib = Some(0);
        assert_eq!(completion_timeout_seconds(&configuration, 1 << 30), None);
        configuration.bandwidth_per_migration = Some(Quantity::from("0"));
        assert_eq!(bandwidth_bytes(&configuration), None);
    }

    #[test]
    fn what_is_to_be_copied() {
        let mut value = json!({
            "spec": {
                "domain": {"memory": {"guest": "1Gi"}, "resources": {"requests": {"memory": "2Gi"}}},
                "volumes": [
                    {"name": "scratch", "emptyDisk": {"capacity": "2Gi"}},
                    {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}},
                    {"name": "own", "persistentVolumeClaim": {"claimName": "own"}},
                    {"name": "seed", "cloudInitNoCloud": {}},
                ],
            },
            "status": {
                "volumeStatus": [
                    {"name": "shared", "target": "", "persistentVolumeClaimInfo": {
                        "accessModes": ["ReadWriteMany"], "capacity": {"storage": "64Gi"}}},
                    {"name": "own", "target": "", "persistentVolumeClaimInfo": {
                        "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "4Gi"}}},
                ],
            },
        });
        let of = |value: &Value| bytes_to_copy(&serde_json::from_value(value.clone()).unwrap());
        assert_eq!(of(&value), 1 << 30, "memory only");
        value["status"]["migrationMethod"] = json!("BlockMigration");
        assert_eq!(of(&value), 7 << 30, "and the disks that are not shared");
    }
}
