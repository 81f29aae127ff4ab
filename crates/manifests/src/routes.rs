//! Where Kubernetes' API server asks godwit's: the webhooks and the aggregated API.

use godwit_api::admission::routes::{Act, Route, configurations};
use godwit_api::names::{ATTACHMENT_POD_PREFIX, CONFIG_MAP_NAME, GROUP, LAUNCHER_POD_PREFIX};
use godwit_api::{maintenance, subresources};
use serde_json::{Value, json};

/// The port of the Service.
pub const PORT: u16 = 443;
const SERVICE: &str = "virt-api";

/// Everything of that kind, for `godwit api` in `namespace`. The authority's certificate is left out: `godwit api` puts it in.
pub fn objects(namespace: &str) -> Vec<Value> {
    let versions = subresources::VERSIONS.iter().zip(1..);
    let mut objects: Vec<Value> = versions.map(|(version, place)| api_service(version, place, namespace)).collect();
    objects.extend(configurations().into_iter().map(|one| {
        let webhooks: Vec<Value> = one.routes.into_iter().map(|route| webhook(route, namespace)).collect();
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": one.kind,
            "metadata": {"name": one.name, "labels": {"kubevirt.io": SERVICE}},
            "webhooks": webhooks,
        })
    }));
    objects
}

fn webhook(route: &Route, namespace: &str) -> Value {
    let resource = match route.subresource {
        "" => route.resource.to_owned(),
        subresource => format!("{}/{subresource}", route.resource),
    };
    let mut webhook = json!({
        "name": route.webhook,
        "admissionReviewVersions": ["v1"],
        "clientConfig": {"service": {"namespace": namespace, "name": SERVICE, "path": route.path, "port": PORT}},
        // Evictions mark the VMI, which is not done for a dry run.
        "sideEffects": if route.act == Act::Evict { "NoneOnDryRun" } else { "None" },
        // What nobody has looked at is not let in: a wrong VM, or the eviction of a running one.
        "failurePolicy": "Fail",
        "timeoutSeconds": 10,
        "rules": [{
            "apiGroups": [route.group],
            "apiVersions": versions(route),
            "operations": route.operations,
            "resources": [resource],
            "scope": "*",
        }],
    });
    match (route.act, route.resource) {
        // Of other pods' evictions nothing is to be said, least of all that nobody is there to be asked.
        (Act::Evict, _) => {
            let prefixes = [LAUNCHER_POD_PREFIX, ATTACHMENT_POD_PREFIX];
            let named = prefixes.map(|prefix| format!("request.name.startsWith('{prefix}')")).join(" || ");
            webhook["matchConditions"] = json!([{"name": "pods-of-virtual-machines", "expression": named}]);
        }
        // It only warns, and of one ConfigMap.
        (_, "configmaps") => {
            webhook["failurePolicy"] = json!("Ignore");
            let named = format!("request.name == '{CONFIG_MAP_NAME}'");
            webhook["matchConditions"] = json!([{"name": CONFIG_MAP_NAME, "expression": named}]);
            webhook["namespaceSelector"] = json!({"matchLabels": {"kubernetes.io/metadata.name": namespace}});
        }
        _ => {}
    }
    webhook
}

fn versions(route: &Route) -> Vec<&'static str> {
    match (route.group, route.resource) {
        (_, "nodemaintenances") => {
            maintenance::GROUPS.iter().filter(|(group, _)| *group == route.group).map(|(_, version)| *version).collect()
        }
        (GROUP, _) => vec!["v1", "v1alpha3"],
        ("", _) => vec!["v1"],
        _ => vec!["v1alpha1"],
    }
}

/// A version of `subresources.kubevirt.io`, the first of which clients prefer.
fn api_service(version: &str, place: i32, namespace: &str) -> Value {
    let group = subresources::GROUP;
    json!({
        "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
        "metadata": {"name": format!("{version}.{group}"), "labels": {"kubevirt.io": SERVICE}},
        "spec": {
            "group": group,
            "version": version,
            "service": {"namespace": namespace, "name": SERVICE, "port": PORT},
            "groupPriorityMinimum": 1000,
            "versionPriority": 16 - place,
        },
    })
}
