//! Which path answers for what: KubeVirt's paths and webhooks' names.

/// What a path does with a review.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Changes the object.
    Mutate,
    /// Says whether it may come in.
    Validate,
    /// Says whether a pod may be evicted, and marks its VMI.
    Evict,
}

/// One webhook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The path.
    pub path: &'static str,
    /// The webhook's name, which stands in every refusal.
    pub webhook: &'static str,
    /// What is done.
    pub act: Act,
    /// The API group of its resource, empty for the core group.
    pub group: &'static str,
    /// The resource's plural.
    pub resource: &'static str,
    /// The subresource, mostly empty.
    pub subresource: &'static str,
    /// `CREATE`, `UPDATE`.
    pub operations: &'static [&'static str],
}

const CREATE: &[&str] = &["CREATE"];
const UPDATE: &[&str] = &["UPDATE"];
const BOTH: &[&str] = &["CREATE", "UPDATE"];

const fn route(
    path: &'static str,
    webhook: &'static str,
    act: Act,
    resource: &'static str,
    operations: &'static [&'static str],
) -> Route {
    Route { path, webhook, act, group: "kubevirt.io", resource, subresource: "", operations }
}

const fn maintenance(path: &'static str, group: &'static str) -> Route {
    let webhook = "vnodemaintenance.kb.io";
    Route { path, webhook, act: Act::Validate, group, resource: "nodemaintenances", subresource: "", operations: BOTH }
}

/// Every webhook. Godwit's own are: migrations are mutated on updates too (who asked for one stays), and the ConfigMap
/// `kubevirt-config` is looked at for warnings.
pub const ROUTES: &[Route] = &[
    route(
        "/migration-mutate-create",
        "migrations-mutator.kubevirt.io",
        Act::Mutate,
        "virtualmachineinstancemigrations",
        BOTH,
    ),
    route(
        "/migration-validate-create",
        "migration-create-validator.kubevirt.io",
        Act::Validate,
        "virtualmachineinstancemigrations",
        CREATE,
    ),
    route(
        "/migration-validate-update",
        "migration-update-validator.kubevirt.io",
        Act::Validate,
        "virtualmachineinstancemigrations",
        UPDATE,
    ),
    route(
        "/virtualmachineinstances-mutate",
        "virtualmachineinstances-mutator.kubevirt.io",
        Act::Mutate,
        "virtualmachineinstances",
        BOTH,
    ),
    route(
        "/virtualmachineinstances-validate-create",
        "virtualmachineinstances-create-validator.kubevirt.io",
        Act::Validate,
        "virtualmachineinstances",
        CREATE,
    ),
    route(
        "/virtualmachineinstances-validate-update",
        "virtualmachineinstances-update-validator.kubevirt.io",
        Act::Validate,
        "virtualmachineinstances",
        UPDATE,
    ),
    route("/virtualmachines-mutate", "virtualmachines-mutator.kubevirt.io", Act::Mutate, "virtualmachines", BOTH),
    route("/virtualmachines-validate", "virtualmachine-validator.kubevirt.io", Act::Validate, "virtualmachines", BOTH),
    route("/kubevirt-validate-create", "kubevirt-create-validator.kubevirt.io", Act::Validate, "kubevirts", CREATE),
    route("/kubevirt-validate-update", "kubevirt-update-validator.kubevirt.io", Act::Validate, "kubevirts", UPDATE),
    Route {
        path: "/migration-policy-validate-create",
        webhook: "migration-policy-validator.kubevirt.io",
        act: Act::Validate,
        group: "migrations.kubevirt.io",
        resource: "migrationpolicies",
        subresource: "",
        operations: BOTH,
    },
    maintenance("/validate-nodemaintenance-medik8s-io-v1beta1-nodemaintenance", "nodemaintenance.medik8s.io"),
    maintenance("/validate-nodemaintenance-kubevirt-io-v1beta1-nodemaintenances", "nodemaintenance.kubevirt.io"),
    maintenance("/validate-kubevirt-io-v1alpha1-nodemaintenance", "kubevirt.io"),
    Route {
        path: "/kubevirt-config-validate",
        webhook: "kubevirt-config-validator.godwit.io",
        act: Act::Validate,
        group: "",
        resource: "configmaps",
        subresource: "",
        operations: BOTH,
    },
    Route {
        path: "/pod-eviction-validate",
        webhook: "virt-launcher-eviction-interceptor.kubevirt.io",
        act: Act::Evict,
        group: "",
        resource: "pods",
        subresource: "eviction",
        operations: CREATE,
    },
];

/// Webhooks that one object announces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// `MutatingWebhookConfiguration` or `ValidatingWebhookConfiguration`.
    pub kind: &'static str,
    /// The object's name.
    pub name: &'static str,
    /// Its webhooks, each of another name.
    pub routes: Vec<&'static Route>,
}

/// Names of the ValidatingWebhookConfigurations: a webhook's name may stand in each of them once, and some are of several.
pub const VALIDATING: [&str; 3] = ["virt-api-validator", "virt-api-validator-2", "virt-api-validator-3"];
/// Name of the MutatingWebhookConfiguration.
pub const MUTATING: &str = "virt-api-mutator";

/// Every webhook, in the objects that announce it.
pub fn configurations() -> Vec<Configuration> {
    let of = |kind, name, routes| Configuration { kind, name, routes };
    let (mutating, validating): (Vec<_>, Vec<_>) = ROUTES.iter().partition(|route| route.act == Act::Mutate);
    let mut all = vec![of("MutatingWebhookConfiguration", MUTATING, mutating)];
    all.extend(VALIDATING.map(|name| of("ValidatingWebhookConfiguration", name, Vec::new())));
    for route in validating {
        let free = |one: &&mut Configuration| {
            one.name != MUTATING && one.routes.iter().all(|other| other.webhook != route.webhook)
        };
        if let Some(one) = all.iter_mut().find(free) {
            one.routes.push(route);
        }
    }
    all
}

/// The webhook of a path.
pub fn of(path: &str) -> Option<&'static Route> {
    ROUTES.iter().find(|route| route.path == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_webhook_is_announced_once() {
        let all = configurations();
        assert!(all.iter().all(|one| !one.routes.is_empty()));
        let mut paths: Vec<&str> = all.iter().flat_map(|one| &one.routes).map(|route| route.path).collect();
        assert_eq!(paths.len(), ROUTES.len());
        paths.sort_unstable();
        paths.dedup();
        assert_eq!(paths.len(), ROUTES.len());
        for one in &all {
            let mut names: Vec<&str> = one.routes.iter().map(|route| route.webhook).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), one.routes.len(), "{}", one.name);
        }
    }
}
