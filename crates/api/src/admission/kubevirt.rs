//! The KubeVirt object on its way in.

use k8s_openapi::api::core::v1::Node;
use serde_json::Value;

use super::{Cause, Denial, Lookup, Operation, Request, Verdict, read};
use crate::config::{MAX_DOWNTIME_NEEDS_A_GATE, sift};
use crate::gates::{Gates, LIVE_MIGRATION};
use crate::kubevirt::{BASELINE_AUTO, KubeVirtConfiguration};
use crate::{KubeVirt, MigrationConfiguration, migration_network};

const CREATE: &str = "kubevirt-create-validator.kubevirt.io";
const UPDATE: &str = "kubevirt-update-validator.kubevirt.io";

pub(super) fn validate(request: &Request<'_>) -> Verdict {
    let Some(object) = request.object else { return Ok(Vec::new()) };
    let webhook = if request.operation == Operation::Create { CREATE } else { UPDATE };
    if request.operation == Operation::Create && !request.lookup.list("KubeVirt", "", None).is_empty() {
        return Err(Box::new(Denial::plain(webhook, "Kubevirt is already created")));
    }
    let kubevirt: KubeVirt = read(webhook, object)?;
    let before: KubeVirt = request.old_object.and_then(|old| read(webhook, old).ok()).unwrap_or_default();
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
    let gates = Gates::of(Some(&kubevirt), None);
    if let Some(baseline) = configuration.cpu_baseline.as_deref().filter(|baseline| *baseline != BASELINE_AUTO) {
        let field = "spec.configuration.cpuBaseline";
        let text = format!("{field} is {baseline:?}: only {BASELINE_AUTO:?} is possible");
        causes.push(Cause::invalid(field, text));
    }
    for ((name, now), (_, then)) in places(configuration).into_iter().zip(places(&before.spec.configuration)) {
        let Some(now) = now else { continue };
        let at = format!("spec.configuration.{name}");
        let downtime_then = then.as_ref().and_then(|then| then.max_downtime_ms);
        if now.max_downtime_ms.is_some() && now.max_downtime_ms != downtime_then && !gates.max_downtime() {
            causes.push(Cause::invalid(format!("{at}.maxDowntimeMs"), MAX_DOWNTIME_NEEDS_A_GATE));
        }
        for fault in sift(now.clone()).1 {
            let field = format!("{at}.{}", fault.field);
            causes.push(Cause::invalid(&field, format!("{field}: {}", fault.why)));
        }
        warn(&at, now, &mut warnings);
        let network_then = then.as_ref().and_then(|then| then.network.as_deref());
        if let Some(network) = now.network.as_deref().filter(|network| Some(*network) != network_then) {
            warnings.extend(unmet(network, request.lookup));
        }
    }
    for gate in gates.without_effect() {
        let at = "spec.configuration.developerConfiguration.featureGates";
        warnings.push(format!("{at}: {gate} is not implemented by godwit, it changes nothing"));
    }
    if !gates.live_migration() {
        warnings.push(format!(
            "feature gate {LIVE_MIGRATION} is off by the rules of v1alpha3 ({}): nothing can be migrated",
            crate::names::ANNOTATION_FEATURE_GATES
        ));
    }
    if causes.is_empty() { Ok(warnings) } else { Err(Box::new(Denial { warnings, ..Denial::causes(webhook, causes) })) }
}

/// Why migrations will not all go over this network.
fn unmet(network: &str, lookup: &dyn Lookup) -> Option<String> {
    let nodes: Vec<Node> =
        lookup.list_to_warn("Node").into_iter().filter_map(|node| serde_json::from_value(node).ok()).collect();
    migration_network::unmet(network, lookup.installation(), nodes.iter().map(|node| &node.metadata))
}

/// The two names of the migrations' settings.
fn places(configuration: &KubeVirtConfiguration) -> [(&'static str, &Option<MigrationConfiguration>); 2] {
    [("migrations", &configuration.migrations), ("migrationConfiguration", &configuration.migration_configuration)]
}

/// Settings that are read by nothing yet are said to be so.
fn warn(at: &str, migrations: &MigrationConfiguration, warnings: &mut Vec<String>) {
    let mut say = |used: bool, name: &str| {
        if used {
            warnings.push(format!("{at}.{name}: not implemented by godwit, ignored"));
        }
    };
    say(migrations.match_selinux_level_on_migration.is_some(), "matchSELinuxLevelOnMigration");
    say(migrations.utility_volumes_timeout.is_some(), "utilityVolumesTimeout");
    say(migrations.unsafe_migration_override == Some(true), "unsafeMigrationOverride");
}

/// The ConfigMap `kubevirt-config`. KubeVirt's webhooks never saw it, and who writes it may be an old tool: nothing is refused,
/// what will not be applied is warned of.
pub(super) fn config_map(request: &Request<'_>) -> Verdict {
    let data = request.object.and_then(|object| object.get("data")).and_then(Value::as_object);
    let data = data.into_iter().flatten().filter_map(|(key, text)| Some((key.clone(), text.as_str()?.to_owned())));
    Ok(crate::config::ignored(None, Some(&data.collect())))
}
