//! How lists and maps of built-in kinds are merged: facts of Kubernetes' API that `k8s-openapi`'s schemas leave out
//! (`x-kubernetes-list-type`, `-list-map-keys`, `-map-type`, `-patch-strategy`, `-patch-merge-key`).
//!
//! Lists that are not named here are atomic.

use crate::schema::{ListType, Schema};

enum Fact {
    /// A map by these keys under apply; a strategic merge by the first.
    Map(&'static [&'static str]),
    /// The same, and members that the patch's `$retainKeys` does not name go.
    MapRetainingKeys(&'static [&'static str]),
    /// A map under apply, replaced by a strategic merge patch.
    ApplyMap(&'static [&'static str]),
    /// Merged by a strategic merge patch, atomic under apply.
    PatchMerge(&'static str),
    /// A set, also under strategic merge.
    Set,
    /// Replaced by a strategic merge patch.
    Replace,
    /// A map of strings that apply takes as one value.
    AtomicMap,
}
use Fact::{ApplyMap, AtomicMap, Map, MapRetainingKeys, PatchMerge, Replace, Set};

/// Definition (its last two or three name parts), member, fact.
const FACTS: &[(&str, &str, Fact)] = &[
    ("meta.v1.ObjectMeta", "ownerReferences", Map(&["uid"])),
    ("meta.v1.ObjectMeta", "finalizers", Set),
    ("core.v1.PodSpec", "volumes", MapRetainingKeys(&["name"])),
    ("core.v1.PodSpec", "resourceClaims", MapRetainingKeys(&["name"])),
    ("core.v1.PodSpec", "containers", Map(&["name"])),
    ("core.v1.PodSpec", "initContainers", Map(&["name"])),
    ("core.v1.PodSpec", "ephemeralContainers", Map(&["name"])),
    ("core.v1.PodSpec", "nodeSelector", AtomicMap),
    ("core.v1.PodSpec", "imagePullSecrets", Map(&["name"])),
    ("core.v1.PodSpec", "hostAliases", Map(&["ip"])),
    ("core.v1.PodSpec", "schedulingGates", Map(&["name"])),
    ("core.v1.PodSpec", "topologySpreadConstraints", Map(&["topologyKey", "whenUnsatisfiable"])),
    ("core.v1.Container", "ports", Map(&["containerPort", "protocol"])),
    ("core.v1.Container", "env", Map(&["name"])),
    ("core.v1.Container", "volumeMounts", Map(&["mountPath"])),
    ("core.v1.Container", "volumeDevices", Map(&["devicePath"])),
    ("core.v1.EphemeralContainer", "ports", Map(&["containerPort", "protocol"])),
    ("core.v1.EphemeralContainer", "env", Map(&["name"])),
    ("core.v1.EphemeralContainer", "volumeMounts", Map(&["mountPath"])),
    ("core.v1.EphemeralContainer", "volumeDevices", Map(&["devicePath"])),
    ("core.v1.ResourceRequirements", "claims", ApplyMap(&["name"])),
    ("core.v1.PodStatus", "conditions", Map(&["type"])),
    ("core.v1.PodStatus", "podIPs", Map(&["ip"])),
    ("core.v1.PodStatus", "hostIPs", PatchMerge("ip")),
    ("core.v1.PodStatus", "resourceClaimStatuses", MapRetainingKeys(&["name"])),
    ("core.v1.ContainerStatus", "volumeMounts", Map(&["mountPath"])),
    ("core.v1.ContainerStatus", "allocatedResourcesStatus", Map(&["name"])),
    ("core.v1.ResourceStatus", "resources", ApplyMap(&["resourceID"])),
    ("core.v1.NodeSpec", "podCIDRs", Set),
    ("core.v1.NodeStatus", "conditions", Map(&["type"])),
    ("core.v1.NodeStatus", "addresses", Map(&["type"])),
    ("core.v1.NamespaceStatus", "conditions", Map(&["type"])),
    ("core.v1.PersistentVolumeClaimStatus", "conditions", Map(&["type"])),
    ("core.v1.ServiceAccount", "secrets", Map(&["name"])),
    ("core.v1.ServiceSpec", "ports", Map(&["port", "protocol"])),
    ("core.v1.ServiceSpec", "selector", AtomicMap),
    ("core.v1.ServiceStatus", "conditions", Map(&["type"])),
    ("policy.v1.PodDisruptionBudgetSpec", "selector", Replace),
    ("policy.v1.PodDisruptionBudgetStatus", "conditions", Map(&["type"])),
    ("apiextensions.v1.CustomResourceDefinitionStatus", "conditions", ApplyMap(&["type"])),
    ("apps.v1.DeploymentStatus", "conditions", Map(&["type"])),
    ("apps.v1.DaemonSetStatus", "conditions", Map(&["type"])),
    ("admissionregistration.v1.MutatingWebhookConfiguration", "webhooks", Map(&["name"])),
    ("admissionregistration.v1.MutatingWebhook", "matchConditions", Map(&["name"])),
    ("admissionregistration.v1.ValidatingWebhookConfiguration", "webhooks", Map(&["name"])),
    ("admissionregistration.v1.ValidatingWebhook", "matchConditions", Map(&["name"])),
    ("admissionregistration.v1.ValidatingAdmissionPolicySpec", "matchConditions", Map(&["name"])),
    ("admissionregistration.v1.ValidatingAdmissionPolicySpec", "variables", Map(&["name"])),
    ("admissionregistration.v1.ValidatingAdmissionPolicyStatus", "conditions", ApplyMap(&["type"])),
    ("apiregistration.v1.APIServiceStatus", "conditions", Map(&["type"])),
];

/// Structs that apply treats as one value (`x-kubernetes-map-type: atomic`).
const ATOMIC: &[&str] = &[
    "core.v1.ConfigMapKeySelector",
    "core.v1.LocalObjectReference",
    "core.v1.NodeSelector",
    "core.v1.NodeSelectorTerm",
    "core.v1.ObjectFieldSelector",
    "core.v1.ObjectReference",
    "core.v1.ResourceFieldSelector",
    "core.v1.ScopeSelector",
    "core.v1.ScopedResourceSelectorRequirement",
    "core.v1.SecretKeySelector",
    "core.v1.SecretReference",
    "core.v1.TopologySelectorTerm",
    "core.v1.TypedLocalObjectReference",
    "meta.v1.LabelSelector",
    "meta.v1.OwnerReference",
    "rbac.v1.RoleRef",
    "rbac.v1.Subject",
];

/// Sets the merge facts of one member of a definition.
pub(super) fn apply(definition: &str, field: &str, member: &mut Schema) {
    if matches!((short(definition), field), ("core.v1.ContainerPort" | "core.v1.ServicePort", "protocol")) {
        // Part of the key of their lists, and often left out.
        member.default = Some("TCP".into());
    }
    let Some((_, _, fact)) = FACTS.iter().find(|(d, f, _)| *f == field && *d == short(definition)) else { return };
    let map = |member: &mut Schema, keys: &[&str]| {
        member.list_type = ListType::Map;
        member.list_map_keys = keys.iter().map(|k| (*k).to_owned()).collect();
    };
    let patch = |member: &mut Schema, key: &[&str], strategies: &[&str]| {
        member.patch_merge_key = key.first().map(|k| (*k).to_owned());
        member.patch_strategy = strategies.iter().map(|s| (*s).to_owned()).collect();
    };
    match fact {
        Map(keys) => {
            map(member, keys);
            patch(member, keys, &["merge"]);
        }
        MapRetainingKeys(keys) => {
            map(member, keys);
            patch(member, keys, &["merge", "retainKeys"]);
        }
        ApplyMap(keys) => map(member, keys),
        PatchMerge(key) => patch(member, &[key], &["merge"]),
        Set => {
            member.list_type = ListType::Set;
            patch(member, &[], &["merge"]);
        }
        Replace => patch(member, &[], &["replace"]),
        AtomicMap => member.atomic_map = true,
    }
}

/// Whether apply takes the whole struct as one value.
pub(super) fn is_atomic(definition: &str) -> bool {
    ATOMIC.contains(&short(definition))
}

/// `core.v1.PodSpec` of `io.k8s.api.core.v1.PodSpec`.
fn short(definition: &str) -> &str {
    let mut dots = definition.rmatch_indices('.');
    match dots.nth(2) {
        Some((at, _)) => &definition[at + 1..],
        None => definition,
    }
}

#[cfg(test)]
pub(super) fn check(definitions: &std::collections::BTreeMap<String, std::sync::Arc<Schema>>) {
    let find = |name: &str| definitions.iter().find(|(full, _)| short(full) == name).map(|(_, schema)| schema);
    for (definition, field, fact) in FACTS {
        let schema = find(definition).unwrap_or_else(|| panic!("{definition}"));
        let member = schema.properties.get(*field).unwrap_or_else(|| panic!("{definition}.{field}"));
        if let Map(keys) | MapRetainingKeys(keys) | ApplyMap(keys) = fact {
            for key in *keys {
                let item = member.items.as_ref().unwrap_or_else(|| panic!("{definition}.{field}: no list"));
                assert!(item.properties.contains_key(*key), "{definition}.{field}: {key}");
            }
        }
    }
    for definition in ATOMIC {
        assert!(find(definition).is_some_and(|schema| schema.atomic_map), "{definition}");
    }
}
