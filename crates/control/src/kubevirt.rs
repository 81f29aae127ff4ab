//! The installation's own object: says that it is deployed, and which version.

use std::collections::BTreeMap;

use godwit_api::condition;
use godwit_api::config::{effective, ignored};
use godwit_api::kubevirt::KubeVirtPhase;
use godwit_api::names::conditions::CONFIGURATION_APPLIED;
use godwit_api::policy::{Resolved, resolve};
use godwit_api::{Condition, Installation, KubeVirt, MigrationConfiguration, VirtualMachineInstance};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::object::Name;
use crate::plan::{Plan, View};
use crate::world::World;
use crate::{migration_network, names, processor, workloads};

/// Decides about the KubeVirt object.
pub fn decide(name: &Name, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let Some(kubevirt) = view.world.kubevirts.get(name).filter(|kubevirt| !kubevirt.is_deleting()) else { return plan };
    let mut after: KubeVirt = kubevirt.as_ref().clone();
    let status = &mut after.status;
    let own = name_in(view.world.installation());
    if *name != own {
        // Somebody may wonder why nothing comes of it.
        let message = format!(
            "Godwit is installed in the namespace {}, and reads the KubeVirt object {own} alone.",
            own.namespace
        );
        let applied = Condition::new(CONFIGURATION_APPLIED, false).because("NotTheInstallation", message);
        condition::set(&mut status.conditions, applied, &Time(view.now));
        plan.update(kubevirt.as_ref(), &after);
        return plan;
    }
    status.phase = KubeVirtPhase::Deployed;
    let version = Some(view.settings.version.clone());
    status.operator_version = version.clone();
    status.target_kube_virt_version = version.clone();
    status.observed_kube_virt_version = version;
    status.observed_generation = kubevirt.metadata.generation;
    status.default_architecture = Some("amd64".to_owned());
    let configuration = &kubevirt.spec.configuration;
    status.cpu_baseline = configuration.has_cpu_baseline().then(|| processor::baseline(view.world));
    let now = Time(view.now);
    for (type_, holds, reason, message) in [
        ("Created", true, "AllResourcesCreated", "All resources were created."),
        ("Available", true, "AllComponentsReady", "All components are ready."),
        ("Progressing", false, "AllComponentsReady", "All components are ready."),
        ("Degraded", false, "AllComponentsReady", "All components are ready."),
    ] {
        condition::set(&mut status.conditions, Condition::new(type_, holds).because(reason, message), &now);
    }
    let mut ignored = ignored(Some(kubevirt), data(view.world));
    ignored.extend(migration_network::unmet(view.world));
    let applied = Condition::new(CONFIGURATION_APPLIED, ignored.is_empty());
    let applied = match ignored.is_empty() {
        true => applied.because("AllSettingsApplied", "All settings are applied."),
        false => applied.because("SettingsIgnored", ignored.join("; ")),
    };
    condition::set(&mut status.conditions, applied, &now);
    let mut then = Plan::nothing();
    workloads::update(kubevirt, &mut after, view, &mut then);
    plan.update(kubevirt.as_ref(), &after);
    plan.effects.append(&mut then.effects);
    plan.wake_at = then.wake_at;
    plan
}

/// The migration configuration in force in the cluster, every field with a default set.
pub fn migration_configuration(world: &World) -> MigrationConfiguration {
    world.configuration().clone()
}

/// Reads the migration configuration; the world keeps it until one of its sources changes.
pub(crate) fn read_configuration(world: &World) -> MigrationConfiguration {
    effective(world.kubevirt().map(AsRef::as_ref), data(world))
}

/// What the ConfigMap `kubevirt-config` says.
fn data(world: &World) -> Option<&BTreeMap<String, String>> {
    world.config_maps.get(&Name::new(world.installation().namespace(), names::CONFIG_MAP_NAME))?.data.as_ref()
}

/// What a migration of this VMI runs with: the cluster's configuration and the policy that fits best.
pub fn migration_configuration_of(world: &World, vmi: &VirtualMachineInstance) -> Resolved {
    let namespace = world.namespaces.get(&Name::cluster(vmi.metadata.namespace.as_deref().unwrap_or_default()));
    let namespace_labels = namespace.and_then(|namespace| namespace.metadata.labels.as_ref());
    let policies = world.policies.iter().map(AsRef::as_ref);
    resolve(policies, vmi.metadata.labels.as_ref(), namespace_labels, &migration_configuration(world))
}

/// Whether this ConfigMap is one of the sources of the configuration.
pub fn is_configuration(config_map: &Name, world: &World) -> bool {
    config_map.namespace == world.installation().namespace() && config_map.name == names::CONFIG_MAP_NAME
}

/// The name of the installation's KubeVirt object.
pub fn name_in(installation: &Installation) -> Name {
    Name::new(installation.namespace(), names::KUBEVIRT_NAME)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::object::Kind;
    use crate::plan::Effect;
    use crate::testing::Cluster;

    fn applied(cluster: &Cluster) -> (String, String) {
        let name = Name::new("kubevirt", "kubevirt");
        let view = View { now: cluster.now, world: &cluster.world, settings: &cluster.settings };
        let plan = decide(&name, &view);
        let [Effect::PatchStatus(_, patch)] = plan.effects.as_slice() else {
            panic!("one write of the status: {plan:?}")
        };
        let conditions = patch["status"]["conditions"].as_array().unwrap();
        let found = conditions.iter().find(|condition| condition["type"] == CONFIGURATION_APPLIED).unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&found["status"]), text(&found["message"]))
    }

    #[test]
    fn the_cpu_baseline_is_told_where_it_is_asked_for() {
        let mut cluster = Cluster::new();
        let annotations = json!({ names::ANNOTATION_CPU_MODELS: json!({"Westmere": 40, "qemu64": 20}).to_string() });
        cluster.put(Kind::Node, json!({"metadata": {"name": "node1", "annotations": annotations}}));
        let mut told = |configuration: Value| {
            let metadata = json!({"namespace": "kubevirt", "name": "kubevirt"});
            cluster.put(Kind::KubeVirt, json!({"metadata": metadata, "spec": {"configuration": configuration}}));
            let view = View { now: cluster.now, world: &cluster.world, settings: &cluster.settings };
            let plan = decide(&Name::new("kubevirt", "kubevirt"), &view);
            let [Effect::PatchStatus(_, patch)] = plan.effects.as_slice() else { panic!("{plan:?}") };
            patch["status"]["cpuBaseline"].clone()
        };
        assert_eq!(told(json!({})), Value::Null);
        assert_eq!(told(json!({"cpuBaseline": "Auto"})), json!({"model": "Westmere", "nodes": 1}));
    }

    #[test]
    fn a_network_that_handlers_do_not_use_is_told_of_until_they_do() {
        let mut cluster = Cluster::new();
        let kubevirt = json!({
            "metadata": {"namespace": "kubevirt", "name": "kubevirt"},
            "spec": {"configuration": {"migrations": {"network": "fast"}}},
        });
        cluster.put(Kind::KubeVirt, kubevirt);
        let node = |mut told: Value| {
            let beat = "2026-11-23T03:00:00Z";
            told["heartbeat"] = json!(beat);
            let annotations = json!({
                names::ANNOTATION_HEARTBEAT: beat, names::ANNOTATION_MIGRATION_NETWORK: told.to_string(),
            });
            json!({"metadata": {"name": "node1", "annotations": annotations}})
        };
        let place = |address: &str| json!({"interface": "migration0", "network": "kubevirt/fast", "address": address});
        assert_eq!(applied(&cluster).0, "True", "there is no handler");
        cluster.put(Kind::Node, node(json!({"interface": "eth1", "address": "10.99.0.1"})));
        let (status, message) = applied(&cluster);
        assert_eq!(status, "False");
        assert!(message.contains("kubevirt/fast: node1; they do when"), "{message}");
        cluster.put(Kind::Node, node(place("10.99.0.1")));
        assert_eq!(applied(&cluster), ("True".to_owned(), "All settings are applied.".to_owned()));
        let gone =
            json!({"interface": "migration0", "network": "kubevirt/fast", "problem": "interface migration0 is down"});
        cluster.put(Kind::Node, node(gone));
        let (status, message) = applied(&cluster);
        assert_eq!(status, "False");
        assert!(message.contains("for the handlers of node1 (interface migration0 is down)"), "{message}");
    }

    #[test]
    fn settings_that_are_not_applied_are_named_on_the_object() {
        let mut cluster = Cluster::new();
        let kubevirt = json!({
            "metadata": {"namespace": "kubevirt", "name": "kubevirt"},
            "spec": {"configuration": {"migrations": {"progressTimeout": 10}}},
        });
        cluster.put(Kind::KubeVirt, kubevirt);
        assert_eq!(applied(&cluster), ("True".to_owned(), "All settings are applied.".to_owned()));
        cluster.put(
            Kind::ConfigMap,
            json!({
                "metadata": {"namespace": "kubevirt", "name": "kubevirt-config"},
                "data": {"migrations": "parallelMigrationsPerCluster: -3\nprogressTimeout: 20\nmaxAttempts: 4"},
            }),
        );
        let (status, message) = applied(&cluster);
        assert_eq!(status, "False");
        assert_eq!(
            message,
            "ConfigMap kubevirt-config, migrations.parallelMigrationsPerCluster: -3 is no value for it"
        );
        let found = migration_configuration(&cluster.world);
        assert_eq!(
            (found.parallel_migrations_per_cluster, found.progress_timeout, found.max_attempts),
            (Some(5), Some(10), Some(4))
        );
    }
}
