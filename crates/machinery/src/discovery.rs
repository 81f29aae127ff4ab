//! What is served: `/api`, `/apis`, group and version lists, aggregated discovery, `/version`.
//!
//! Clients use two forms: the classic lists (Python, kube-rs, `kubectl drain`) and the aggregated documents (kubectl).

use crate::resource::{GroupVersion, Resource};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Content type of an aggregated document, for the `Content-Type` of the answer. `version` is `v2` or `v2beta1`.
pub fn aggregated_content_type(version: &str) -> String {
    format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList")
}

/// What `Accept` asks for at `/api` and `/apis`: `Some("v2")` or `Some("v2beta1")` for an aggregated document, `None` for the
/// classic one. The first form that we know wins, as in Kubernetes.
pub fn aggregated_version(accept: &str) -> Option<&'static str> {
    for range in accept.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default();
        let params: BTreeMap<&str, &str> = parts.filter_map(|p| p.split_once('=')).collect();
        let json = matches!(media, "application/json" | "application/*" | "*/*");
        match (params.get("as"), params.get("v")) {
            (Some(&"APIGroupDiscoveryList"), Some(&"v2")) if json => return Some("v2"),
            (Some(&"APIGroupDiscoveryList"), Some(&"v2beta1")) if json => return Some("v2beta1"),
            (Some(_), _) => {}
            (None, _) if json => return None,
            (None, _) => {}
        }
    }
    None
}

/// `GET /version`.
pub fn version() -> Value {
    json!({
        "major": "1", "minor": "33",
        "gitVersion": concat!("v1.33.0+godwit-", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "", "compiler": "rustc",
        "platform": format!("{}/{}", std::env::consts::OS, go_arch()),
        "emulationMajor": "1", "emulationMinor": "33", "minCompatibilityMajor": "1", "minCompatibilityMinor": "33",
    })
}

fn go_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `GET /api`, classic. `address` is `host:port` of this server.
pub fn api_versions(resources: &[Resource], address: &str) -> Value {
    let versions: Vec<String> = versions_of(resources, "");
    json!({
        "kind": "APIVersions", "versions": versions,
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}],
    })
}

/// `GET /apis`, classic.
pub fn api_group_list(resources: &[Resource]) -> Value {
    let groups: Vec<Value> = groups(resources).iter().map(|group| group_value(resources, group)).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `GET /apis/G`; `None`: no such group.
pub fn api_group(resources: &[Resource], group: &str) -> Option<Value> {
    if group.is_empty() || !resources.iter().any(|r| r.gv.group == group) {
        return None;
    }
    let mut value = group_value(resources, group);
    value["kind"] = json!("APIGroup");
    value["apiVersion"] = json!("v1");
    Some(value)
}

fn group_value(resources: &[Resource], group: &str) -> Value {
    let versions: Vec<Value> = versions_of(resources, group)
        .into_iter()
        .map(|version| json!({"groupVersion": format!("{group}/{version}"), "version": version}))
        .collect();
    json!({"name": group, "preferredVersion": versions.first(), "versions": versions})
}

/// `GET /api/v1` and `/apis/G/V`; `None`: no such version.
pub fn api_resource_list(resources: &[Resource], gv: &GroupVersion) -> Option<Value> {
    let of_version: Vec<&Resource> = sorted(resources, gv);
    if of_version.is_empty() {
        return None;
    }
    let mut list = Vec::new();
    for r in of_version {
        let mut entry = json!({
            "name": r.plural, "singularName": r.singular, "namespaced": r.namespaced, "kind": r.kind, "verbs": r.verbs(),
        });
        if !r.short_names.is_empty() {
            entry["shortNames"] = json!(r.short_names);
        }
        if !r.categories.is_empty() {
            entry["categories"] = json!(r.categories);
        }
        if !r.virtual_create_only {
            entry["storageVersionHash"] = json!(storage_hash(r));
        }
        if !r.actions_only {
            list.push(entry);
        }
        for sub in subresources(r) {
            let mut entry = json!({
                "name": format!("{}/{}", r.plural, sub.name), "singularName": "", "namespaced": r.namespaced,
                "kind": sub.kind, "verbs": sub.verbs,
            });
            // Only where it differs from the list's own: `kubectl drain` reads policy/v1 here.
            if sub.gv != r.gv {
                entry["group"] = json!(sub.gv.group);
                entry["version"] = json!(sub.gv.version);
            }
            list.push(entry);
        }
    }
    Some(json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": gv.api_version(), "resources": list}))
}

/// `GET /api` (`legacy`) or `/apis`, aggregated, as `v2` or `v2beta1` (same shape).
pub fn aggregated(resources: &[Resource], legacy: bool, version: &str) -> Value {
    let names: Vec<String> = if legacy { vec![String::new()] } else { groups(resources) };
    let items: Vec<Value> = names
        .iter()
        .map(|group| {
            let versions: Vec<Value> = versions_of(resources, group)
                .into_iter()
                .map(|version| {
                    let gv = GroupVersion { group: group.clone(), version: version.clone() };
                    let list: Vec<Value> = sorted(resources, &gv).into_iter().map(aggregated_resource).collect();
                    json!({"version": version, "resources": list, "freshness": "Current"})
                })
                .collect();
            let metadata = if legacy {
                json!({"creationTimestamp": null})
            } else {
                json!({"name": group, "creationTimestamp": null})
            };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList", "apiVersion": format!("apidiscovery.k8s.io/{version}"),
        "metadata": {}, "items": items,
    })
}

fn aggregated_resource(r: &Resource) -> Value {
    let scope = if r.namespaced { "Namespaced" } else { "Cluster" };
    let kind = |gv: &GroupVersion, kind: &str| json!({"group": gv.group, "version": gv.version, "kind": kind});
    let mut entry = json!({
        "resource": r.plural, "responseKind": kind(&r.gv, &r.kind), "scope": scope, "singularResource": r.singular,
        "verbs": r.verbs(),
    });
    // Without it clients take the subresources alone: nobody shall `get` it by the name that it shares with the real one.
    if r.actions_only {
        entry["responseKind"] = Value::Null;
    }
    if !r.short_names.is_empty() {
        entry["shortNames"] = json!(r.short_names);
    }
    if !r.categories.is_empty() {
        entry["categories"] = json!(r.categories);
    }
    let subs: Vec<Value> = subresources(r)
        .into_iter()
        .map(|sub| json!({"subresource": sub.name, "responseKind": kind(&sub.gv, sub.kind), "verbs": sub.verbs}))
        .collect();
    if !subs.is_empty() {
        entry["subresources"] = Value::Array(subs);
    }
    entry
}

/// One subresource as discovery and OpenAPI describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subresource<'a> {
    /// `status`, `log` …
    pub name: &'a str,
    /// Group and version of what it takes and answers.
    pub gv: GroupVersion,
    /// Kind of what it takes and answers.
    pub kind: &'a str,
    /// `create`; `get`, `patch`, `update` …
    pub verbs: &'static [&'static str],
}

/// The subresources served under a resource, by name.
pub fn subresources(r: &Resource) -> Vec<Subresource<'_>> {
    let gv = |group: &str| GroupVersion { group: group.to_owned(), version: "v1".to_owned() };
    let mut list: Vec<Subresource<'_>> = r
        .subresources
        .iter()
        .map(|name| {
            let (gv, kind, verbs): (GroupVersion, &str, &'static [&'static str]) = match name.as_str() {
                "eviction" => (gv("policy"), "Eviction", &["create"]),
                "binding" => (r.gv.clone(), "Binding", &["create"]),
                "token" => (gv("authentication.k8s.io"), "TokenRequest", &["create"]),
                "log" => (r.gv.clone(), &r.kind, &["get"]),
                "finalize" => (r.gv.clone(), &r.kind, &["update"]),
                "exec" | "attach" | "portforward" => (r.gv.clone(), "PodExecOptions", &["create", "get"]),
                _ if r.gettable.contains(name) => (r.gv.clone(), &r.kind, &["get"]),
                _ if r.actions_only => (r.gv.clone(), &r.kind, &["update"]),
                _ => (r.gv.clone(), &r.kind, &["get", "patch", "update"]),
            };
            Subresource { name, gv, kind, verbs }
        })
        .collect();
    if r.status_subresource {
        list.push(Subresource { name: "status", gv: r.gv.clone(), kind: &r.kind, verbs: &["get", "patch", "update"] });
    }
    list.sort_by(|a, b| a.name.cmp(b.name));
    list.dedup_by(|a, b| a.name == b.name);
    list
}

/// Groups other than the core one, most important first: as in Kubernetes, its own in their order, then those of CRDs by name.
pub fn groups(resources: &[Resource]) -> Vec<String> {
    const ORDER: &[&str] = &[
        "apiregistration.k8s.io",
        "apps",
        "events.k8s.io",
        "authentication.k8s.io",
        "authorization.k8s.io",
        "autoscaling",
        "batch",
        "networking.k8s.io",
        "policy",
        "rbac.authorization.k8s.io",
        "storage.k8s.io",
        "admissionregistration.k8s.io",
        "apiextensions.k8s.io",
        "scheduling.k8s.io",
        "coordination.k8s.io",
        "node.k8s.io",
    ];
    let mut names: Vec<&str> = resources.iter().map(|r| r.gv.group.as_str()).filter(|g| !g.is_empty()).collect();
    names.sort_by_key(|name| (ORDER.iter().position(|g| g == name).unwrap_or(ORDER.len()), *name));
    names.dedup();
    names.into_iter().map(str::to_owned).collect()
}

/// Versions of a group, the preferred one first: `v2`, `v1`, `v1beta1`, `v1alpha3`, then others by name.
pub fn versions_of(resources: &[Resource], group: &str) -> Vec<String> {
    let mut versions: Vec<&str> =
        resources.iter().filter(|r| r.gv.group == group).map(|r| r.gv.version.as_str()).collect();
    versions.sort_by(|a, b| version_rank(b).cmp(&version_rank(a)).then_with(|| a.cmp(b)));
    versions.dedup();
    versions.into_iter().map(str::to_owned).collect()
}

/// Greater is preferred: stability, then numbers.
fn version_rank(version: &str) -> (u8, u64, u64) {
    let unordered = (0, 0, 0);
    let Some(rest) = version.strip_prefix('v') else { return unordered };
    let (major, rest) = rest.split_at(rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len());
    let Ok(major) = major.parse::<u64>() else { return unordered };
    if rest.is_empty() {
        return (3, major, 0);
    }
    for (name, rank) in [("beta", 2), ("alpha", 1)] {
        if let Some(minor) = rest.strip_prefix(name)
            && let Ok(minor) = minor.parse::<u64>()
        {
            return (rank, major, minor);
        }
    }
    unordered
}

fn sorted<'a>(resources: &'a [Resource], gv: &GroupVersion) -> Vec<&'a Resource> {
    let mut list: Vec<&Resource> = resources.iter().filter(|r| r.gv == *gv).collect();
    list.sort_by(|a, b| a.plural.cmp(&b.plural));
    list
}

/// Names what an object is stored as; clients only compare it.
fn storage_hash(r: &Resource) -> String {
    use base64::Engine as _;
    use sha2::Digest as _;
    let digest = sha2::Sha256::digest(format!("{}/{}/{}", r.gv.group, r.gv.version, r.kind));
    base64::engine::general_purpose::STANDARD.encode(digest.get(..8).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Resource> {
        crate::builtin::resources()
    }

    fn core() -> GroupVersion {
        GroupVersion::parse("v1")
    }

    #[test]
    fn eviction_says_policy_v1() {
        let list = api_resource_list(&all(), &core()).unwrap();
        let entry = list["resources"].as_array().unwrap().iter().find(|r| r["name"] == "pods/eviction").unwrap();
        assert_eq!((entry["group"].as_str(), entry["version"].as_str()), (Some("policy"), Some("v1")));
        assert_eq!(entry["kind"], "Eviction");
        let pod = list["resources"].as_array().unwrap().iter().find(|r| r["name"] == "pods").unwrap();
        assert_eq!(pod["shortNames"], json!(["po"]));
        assert!(pod["verbs"].as_array().unwrap().contains(&json!("watch")));
        assert!(api_resource_list(&all(), &GroupVersion::parse("nope/v1")).is_none());
    }

    #[test]
    fn versions_are_ranked_as_kubernetes_ranks_them() {
        let mut list = ["v1alpha3", "foo", "v10", "v1", "v2beta1", "v2", "v1beta2"];
        list.sort_by_key(|v| std::cmp::Reverse(version_rank(v)));
        assert_eq!(list, ["v10", "v2", "v1", "v2beta1", "v1beta2", "v1alpha3", "foo"]);
    }

    #[test]
    fn accept_headers_of_kubectl_are_understood() {
        let v2 = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json";
        let beta = "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json";
        assert_eq!(aggregated_version(v2), Some("v2"));
        assert_eq!(aggregated_version(beta), Some("v2beta1"));
        for classic in ["application/json", "*/*", "", "application/json, */*", "nonsense;;=,"] {
            assert_eq!(aggregated_version(classic), None);
        }
    }

    #[test]
    fn every_group_is_listed_once_and_has_its_resources() {
        let classic = api_group_list(&all());
        let names: Vec<&str> =
            classic["groups"].as_array().unwrap().iter().map(|g| g["name"].as_str().unwrap()).collect();
        assert_eq!(names[..2], ["apiregistration.k8s.io", "apps"]);
        assert_eq!(names.len(), groups(&all()).len());
        let doc = aggregated(&all(), false, "v2");
        assert_eq!(doc["items"].as_array().unwrap().len(), names.len());
        let legacy = aggregated(&all(), true, "v2");
        let pods = &legacy["items"][0]["versions"][0]["resources"]
            .as_array()
            .unwrap()
            .iter()
            .find(|r| r["resource"] == "pods")
            .unwrap()
            .clone();
        assert_eq!(pods["responseKind"]["kind"], "Pod");
        let names: Vec<&str> =
            pods["subresources"].as_array().unwrap().iter().map(|s| s["subresource"].as_str().unwrap()).collect();
        assert_eq!(names, ["binding", "eviction", "log", "status"]);
    }
}
