//! The configuration in force: the KubeVirt object over the seeds' older names over the defaults.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::Quantity;
use crate::kubevirt::{KubeVirt, MigrationConfiguration};
use crate::names::TAINT_DRAIN;
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
        disable_tls: Some(false),
        network: None,
        match_selinux_level_on_migration: None,
    }
}

/// The configuration in force, every number and switch set.
///
/// `spec.configuration.migrations` wins over `spec.configuration.migrationConfiguration`, which wins over the ConfigMap
/// `kubevirt-config` (its `data`), which wins over the defaults; field by field. Values that cannot be are passed over.
pub fn effective(kubevirt: Option<&KubeVirt>, config_map: Option<&BTreeMap<String, String>>) -> MigrationConfiguration {
    let configuration = kubevirt.map(|kubevirt| &kubevirt.spec.configuration);
    let newest = configuration.and_then(|configuration| configuration.migrations.clone()).unwrap_or_default();
    let older =
        configuration.and_then(|configuration| configuration.migration_configuration.clone()).unwrap_or_default();
    let oldest = config_map.map(from_config_map).unwrap_or_default();
    let mut out = MigrationConfiguration::default();
    for source in [newest, older, oldest, defaults()] {
        out = over(out, possible(source));
    }
    out.allow_workload_disruption = out.allow_workload_disruption.or(out.allow_post_copy);
    out
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
        disable_tls: first.disable_tls.or(second.disable_tls),
        network: first.network.or(second.network),
        match_selinux_level_on_migration: first
            .match_selinux_level_on_migration
            .or(second.match_selinux_level_on_migration),
    }
}

/// Without the values that cannot be: quantities that are none, negative times, empty names.
pub(crate) fn possible(mut configuration: MigrationConfiguration) -> MigrationConfiguration {
    configuration.bandwidth_per_migration = configuration.bandwidth_per_migration.filter(|q| q.bytes().is_ok());
    for timeout in [
        &mut configuration.completion_timeout_per_gib,
        &mut configuration.progress_timeout,
        &mut configuration.utility_volumes_timeout,
    ] {
        *timeout = timeout.filter(|seconds| *seconds >= 0);
    }
    configuration.max_downtime_ms = configuration.max_downtime_ms.filter(|ms| (1..=2_000_000).contains(ms));
    configuration.node_drain_taint_key = configuration.node_drain_taint_key.filter(|key| !key.is_empty());
    configuration.network = configuration.network.filter(|name| !name.is_empty());
    configuration
}

/// The seeds' ConfigMap: YAML under the key `migrations`, with numbers and switches often written as strings.
fn from_config_map(data: &BTreeMap<String, String>) -> MigrationConfiguration {
    let Some(text) = data.get(CONFIG_MAP_KEY) else { return MigrationConfiguration::default() };
    let fields: BTreeMap<String, Value> = serde_saphyr::from_str(text).unwrap_or_default();
    let mut out = MigrationConfiguration::default();
    // one field at a time, so that one bad value does not take the others with it
    for (key, value) in fields {
        let one = read_field(&key, &value).or_else(|| {
            // "5" and "true" as KubeVirt's old documents write them
            let text = value.as_str()?;
            read_field(&key, &serde_json::from_str(text.trim()).ok()?)
        });
        if let Some(one) = one {
            out = over(out, one);
        }
    }
    out
}

fn read_field(key: &str, value: &Value) -> Option<MigrationConfiguration> {
    let object = Map::from_iter([(key.to_owned(), value.clone())]);
    serde_json::from_value(Value::Object(object)).ok()
}

/// What a migration of the VMI has to copy at least once, in bytes: the guest's memory (`memory.guest`, else the memory
/// request, else its limit), and with `migrationMethod` BlockMigration the disks that are not shared, as far as the VMI
/// says how large they are.
pub fn bytes_to_copy(vmi: &VirtualMachineInstance) -> u64 {
    let domain = &vmi.spec.domain;
    let guest = domain.memory.as_ref().and_then(|memory| memory.guest.as_ref());
    let memory =
        guest.or_else(|| domain.resources.requests.get("memory")).or_else(|| domain.resources.limits.get("memory"));
    let memory = memory.and_then(|amount| amount.bytes().ok()).unwrap_or(0);
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
    fn impossible_values_are_passed_over() {
        let object = kubevirt(json!({ "migrations": { "progressTimeout": -1, "bandwidthPerMigration": "fast" } }));
        let map = BTreeMap::from([("migrations".to_owned(), "]".to_owned())]);
        let effective = effective(Some(&object), Some(&map));
        assert_eq!((effective.progress_timeout, bandwidth_bytes(&effective)), (Some(150), Some(64 << 20)));
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
