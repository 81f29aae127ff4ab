//! The KubeVirt object on its way in.

use super::{Cause, Denial, Operation, Request, Verdict, read};
use crate::{KubeVirt, MigrationConfiguration};

const CREATE: &str = "kubevirt-create-validator.kubevirt.io";
const UPDATE: &str = "kubevirt-update-validator.kubevirt.io";

pub(super) fn validate(request: &Request<'_>) -> Verdict {
    let Some(object) = request.object else { return Ok(Vec::new()) };
    let webhook = if request.operation == Operation::Create { CREATE } else { UPDATE };
    if request.operation == Operation::Create && !request.lookup.list("KubeVirt", "", None).is_empty() {
        return Err(Box::new(Denial::plain(webhook, "Kubevirt is already created")));
    }
    let kubevirt: KubeVirt = read(webhook, object)?;
    let configuration = &kubevirt.spec.configuration;
    let mut causes = Vec::new();
    if let Some(developer) = &configuration.developer_configuration {
        for gate in &developer.feature_gates {
            if developer.disabled_feature_gates.contains(gate) {
                let text =
                    format!("feature gate \"{gate}\" exists on both \"FeatureGates\" and \"DisabledFeatureGates\"");
                causes.push(Cause::invalid("spec.configuration.developerConfiguration", text));
            }
        }
    }
    if let Some(strategy) = configuration.eviction_strategy.as_ref().filter(|strategy| !strategy.is_known()) {
        let field = "spec.configuration.evictionStrategy";
        causes.push(Cause::unsupported(field, format!("{field} is set with an unrecognized option: {strategy}")));
    }
    let mut warnings = Vec::new();
    for (name, migrations) in
        [("migrations", &configuration.migrations), ("migrationConfiguration", &configuration.migration_configuration)]
    {
        if let Some(migrations) = migrations {
            let at = format!("spec.configuration.{name}");
            check(&at, migrations, &mut causes);
            warn(&at, migrations, &mut warnings);
        }
    }
    if causes.is_empty() { Ok(warnings) } else { Err(Box::new(Denial::causes(webhook, causes))) }
}

fn check(at: &str, migrations: &MigrationConfiguration, causes: &mut Vec<Cause>) {
    if let Some(error) = migrations.bandwidth_per_migration.as_ref().and_then(|bandwidth| bandwidth.bytes().err()) {
        let field = format!("{at}.bandwidthPerMigration");
        causes.push(Cause::invalid(&field, format!("{field}: {error}")));
    }
    for (name, seconds) in [
        ("completionTimeoutPerGiB", migrations.completion_timeout_per_gib),
        ("progressTimeout", migrations.progress_timeout),
        ("utilityVolumesTimeout", migrations.utility_volumes_timeout),
    ] {
        if seconds.is_some_and(|seconds| seconds < 0) {
            let field = format!("{at}.{name}");
            causes.push(Cause::invalid(&field, format!("{field}: must not be negative")));
        }
    }
    for (name, count) in [
        ("parallelMigrationsPerCluster", migrations.parallel_migrations_per_cluster),
        ("parallelOutboundMigrationsPerNode", migrations.parallel_outbound_migrations_per_node),
    ] {
        if count == Some(0) {
            let field = format!("{at}.{name}");
            causes.push(Cause::invalid(&field, format!("{field}: must be at least 1, or nothing would ever migrate")));
        }
    }
    if migrations.max_downtime_ms.is_some_and(|ms| !(1..=2_000_000).contains(&ms)) {
        let field = format!("{at}.maxDowntimeMs");
        causes.push(Cause::invalid(&field, format!("{field}: must be between 1 and 2000000")));
    }
}

/// Settings that are read by nothing yet are said to be so.
fn warn(at: &str, migrations: &MigrationConfiguration, warnings: &mut Vec<String>) {
    let mut say = |used: bool, name: &str| {
        if used {
            warnings.push(format!("{at}.{name}: not implemented by godwit, ignored"));
        }
    };
    say(migrations.network.is_some(), "network");
    say(migrations.disable_tls == Some(true), "disableTLS");
    say(migrations.match_selinux_level_on_migration.is_some(), "matchSELinuxLevelOnMigration");
    say(migrations.utility_volumes_timeout.is_some(), "utilityVolumesTimeout");
    say(migrations.unsafe_migration_override == Some(true), "unsafeMigrationOverride");
    say(migrations.allow_post_copy == Some(true), "allowPostCopy");
    say(migrations.allow_workload_disruption == Some(true), "allowWorkloadDisruption");
}
