//! What exists from the start: namespaces, roles and bindings.

use crate::create::insert;
use crate::managed::Manager;
use crate::reconcile::reconciled;
use crate::server::{Context, Inner};
use crate::update::{Change, change_object};
use crate::{Error, collector};
use serde_json::{Value, json};
use std::sync::Arc;

const NAMESPACES: [&str; 5] = ["default", "kube-system", "kube-public", "kube-node-lease", "kubevirt"];
const RBAC: &str = "rbac.authorization.k8s.io";
const READ: [&str; 3] = ["get", "list", "watch"];
const WRITE: [&str; 5] = ["create", "delete", "deletecollection", "patch", "update"];
const KUBEVIRT: &str = "kubevirt.io";

/// Creates what is missing. Roles and bindings that are there are given what they lack; the rest stays as it is.
pub(crate) async fn objects(inner: &Arc<Inner>, ca: &str) -> Result<(), Error> {
    for name in NAMESPACES {
        ensure(inner, "", "v1", "namespaces", "", json!({"metadata": {"name": name}})).await?;
        collector::furnish(inner, name, ca).await;
    }
    let service = json!({
        "metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"clusterIP": "None", "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": 6443}]},
    });
    ensure(inner, "", "v1", "services", "default", service).await?;
    for role in cluster_roles() {
        reconcile(inner, "clusterroles", role).await?;
    }
    for binding in cluster_role_bindings() {
        reconcile(inner, "clusterrolebindings", binding).await?;
    }
    Ok(())
}

/// Creates a role or binding, or brings the one of an older data directory up to date.
async fn reconcile(inner: &Arc<Inner>, plural: &str, object: Value) -> Result<(), Error> {
    ensure(inner, RBAC, "v1", plural, "", object.clone()).await?;
    let cx = Context::internal(inner);
    let Some(kind) = cx.kinds.get(RBAC, "v1", plural).cloned() else { return Ok(()) };
    let name = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    let change = Change { namespace: "", name, dry_run: false, manager: Manager::server() };
    match change_object(&cx, &kind, &change, |found| Ok(reconciled(found, &object))).await {
        Ok(_) => Ok(()),
        Err(status) => Err(Error::Bootstrap { what: format!("{plural} {name}"), status: Box::new(status) }),
    }
}

/// Creates an object unless one of its name is there.
pub(crate) async fn ensure(
    inner: &Arc<Inner>,
    group: &str,
    version: &str,
    plural: &str,
    namespace: &str,
    mut object: Value,
) -> Result<(), Error> {
    let cx = Context::internal(inner);
    let name = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
    let failed = |status| Error::Bootstrap { what: format!("{plural} {name}"), status: Box::new(status) };
    let Some(kind) = cx.kinds.get(group, version, plural).cloned() else { return Ok(()) };
    if inner.store.get(&kind.key(namespace, &name)).is_some() {
        return Ok(());
    }
    object["apiVersion"] = json!(kind.api_version());
    object["kind"] = json!(kind.resource.kind);
    crate::intake::shape(&kind, &mut object).map_err(failed)?;
    match insert(&cx, &kind, namespace, object, false, &Manager::server()).await {
        Ok(_) => Ok(()),
        Err(status) if status.reason == "AlreadyExists" => Ok(()),
        Err(status) => Err(failed(status)),
    }
}

fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": groups, "resources": resources, "verbs": verbs})
}

fn paths(urls: &[&str]) -> Value {
    json!({"nonResourceURLs": urls, "verbs": ["get"]})
}

fn role(name: &str, labels: &[(&str, &str)], rules: Vec<Value>) -> Value {
    let mut all = json!({"kubernetes.io/bootstrapping": "rbac-defaults"});
    for (key, value) in labels {
        all[*key] = json!(value);
    }
    let annotations = json!({"rbac.authorization.kubernetes.io/autoupdate": "true"});
    json!({"metadata": {"name": name, "labels": all, "annotations": annotations}, "rules": rules})
}

/// A role whose rules are those of all roles with the label `aggregate-to-<name>`.
fn aggregated(name: &str, also: &[(&str, &str)]) -> Value {
    let mut role = role(name, also, Vec::new());
    let label = format!("rbac.authorization.k8s.io/aggregate-to-{name}");
    role["aggregationRule"] = json!({"clusterRoleSelectors": [{"matchLabels": {label: "true"}}]});
    role
}

fn cluster_roles() -> Vec<Value> {
    let to_view = ("rbac.authorization.k8s.io/aggregate-to-view", "true");
    let to_edit = ("rbac.authorization.k8s.io/aggregate-to-edit", "true");
    let to_admin = ("rbac.authorization.k8s.io/aggregate-to-admin", "true");
    let read_write: Vec<&str> = READ.iter().chain(&WRITE).copied().collect();
    let discovery = [
        "/api",
        "/api/*",
        "/apis",
        "/apis/*",
        "/healthz",
        "/livez",
        "/openapi",
        "/openapi/*",
        "/readyz",
        "/version",
        "/version/",
    ];
    let namespaced = [
        "configmaps",
        "events",
        "persistentvolumeclaims",
        "pods",
        "pods/log",
        "pods/status",
        "serviceaccounts",
        "services",
    ];
    let mut roles = vec![
        role(
            "cluster-admin",
            &[],
            vec![rule(&["*"], &["*"], &["*"]), json!({"nonResourceURLs": ["*"], "verbs": ["*"]})],
        ),
        aggregated("admin", &[]),
        aggregated("edit", &[to_admin]),
        aggregated("view", &[to_edit]),
        role(
            "system:aggregate-to-view",
            &[to_view, to_edit, to_admin],
            vec![
                rule(&[""], &namespaced, &READ),
                rule(&[""], &["namespaces", "resourcequotas"], &READ),
                rule(&["policy"], &["poddisruptionbudgets", "poddisruptionbudgets/status"], &READ),
                rule(&["events.k8s.io"], &["events"], &READ),
            ],
        ),
        role(
            "system:aggregate-to-edit",
            &[to_edit, to_admin],
            vec![
                rule(
                    &[""],
                    &["configmaps", "events", "persistentvolumeclaims", "pods", "serviceaccounts", "services"],
                    &WRITE,
                ),
                rule(&[""], &["secrets"], &read_write),
                rule(&[""], &["pods/eviction"], &["create"]),
                rule(&[""], &["serviceaccounts"], &["impersonate"]),
                rule(&["policy"], &["poddisruptionbudgets"], &WRITE),
                rule(&["coordination.k8s.io"], &["leases"], &read_write),
            ],
        ),
        role(
            "system:aggregate-to-admin",
            &[to_admin],
            vec![
                rule(&[RBAC], &["roles", "rolebindings"], &read_write),
                rule(&["authorization.k8s.io"], &["localsubjectaccessreviews"], &["create"]),
            ],
        ),
        role("system:discovery", &[], vec![paths(&discovery)]),
        role(
            "system:public-info-viewer",
            &[],
            vec![paths(&["/healthz", "/livez", "/readyz", "/version", "/version/"])],
        ),
        role(
            "system:basic-user",
            &[],
            vec![
                rule(&["authorization.k8s.io"], &["selfsubjectaccessreviews", "selfsubjectrulesreviews"], &["create"]),
                rule(&["authentication.k8s.io"], &["selfsubjectreviews"], &["create"]),
            ],
        ),
    ];
    roles.extend(components(&read_write));
    roles
}

/// Roles of the parts of this cluster; docs/architecture.md says who writes what.
fn components(read_write: &[&str]) -> Vec<Value> {
    let events = rule(&["", "events.k8s.io"], &["events"], &["create", "patch", "update"]);
    let leases =
        rule(&["coordination.k8s.io"], &["leases"], &["create", "get", "list", "patch", "update", "watch", "delete"]);
    vec![
        role(
            "system:node",
            &[],
            vec![
                rule(&[""], &["nodes"], &["create", "get", "list", "patch", "update", "watch"]),
                rule(&[""], &["nodes/status"], &["patch", "update"]),
                rule(&[""], &["pods"], &["get", "list", "watch", "create", "delete", "patch"]),
                rule(&[""], &["pods/status"], &["patch", "update"]),
                rule(&[""], &["pods/eviction"], &["create"]),
                rule(
                    &[""],
                    &["configmaps", "secrets", "services", "serviceaccounts", "persistentvolumes", "namespaces"],
                    &READ,
                ),
                rule(&[""], &["persistentvolumeclaims"], &READ),
                rule(&["storage.k8s.io"], &["storageclasses"], &READ),
                rule(&["k8s.cni.cncf.io"], &["network-attachment-definitions"], &READ),
                rule(&["authentication.k8s.io"], &["tokenreviews"], &["create"]),
                rule(&["authorization.k8s.io"], &["subjectaccessreviews"], &["create"]),
                events.clone(),
                leases.clone(),
            ],
        ),
        role(
            "system:kube-scheduler",
            &[],
            vec![
                rule(&[""], &["nodes", "namespaces", "persistentvolumes", "services", "configmaps"], &READ),
                rule(&[""], &["persistentvolumeclaims"], &["get", "list", "watch", "patch", "update"]),
                rule(&[""], &["pods"], &["get", "list", "watch", "delete"]),
                rule(&[""], &["pods/binding"], &["create"]),
                rule(&[""], &["pods/status"], &["patch", "update"]),
                rule(&["policy"], &["poddisruptionbudgets"], &READ),
                rule(&["storage.k8s.io"], &["storageclasses"], &READ),
                events.clone(),
                leases.clone(),
            ],
        ),
        role(
            "kubevirt-controller",
            &[],
            vec![
                rule(
                    &[""],
                    &[
                        "pods",
                        "configmaps",
                        "secrets",
                        "services",
                        "serviceaccounts",
                        "persistentvolumeclaims",
                        "persistentvolumes",
                    ],
                    read_write,
                ),
                rule(
                    &[""],
                    &["pods/status", "persistentvolumeclaims/status", "persistentvolumes/status"],
                    &["get", "patch", "update"],
                ),
                rule(&[""], &["pods/eviction", "pods/binding"], &["create"]),
                rule(&[""], &["nodes", "nodes/status"], &["get", "list", "watch", "patch", "update"]),
                rule(&[""], &["namespaces", "resourcequotas"], &READ),
                // those of the leases of nodes in maintenance
                rule(&[""], &["namespaces"], &["create"]),
                rule(&["policy"], &["poddisruptionbudgets"], read_write),
                rule(&["policy"], &["poddisruptionbudgets/status"], &["get", "patch", "update"]),
                rule(&["apps"], &["*"], &READ),
                rule(&["storage.k8s.io"], &["*"], &READ),
                rule(&["apiextensions.k8s.io"], &["customresourcedefinitions"], &READ),
                rule(&["k8s.cni.cncf.io"], &["network-attachment-definitions"], &READ),
                rule(&["authorization.k8s.io"], &["subjectaccessreviews"], &["create"]),
                rule(
                    &[
                        KUBEVIRT,
                        "migrations.kubevirt.io",
                        "pool.kubevirt.io",
                        "snapshot.kubevirt.io",
                        "clone.kubevirt.io",
                        "instancetype.kubevirt.io",
                        "export.kubevirt.io",
                        "nodemaintenance.kubevirt.io",
                        "nodemaintenance.medik8s.io",
                        "godwit.io",
                    ],
                    &["*"],
                    &["*"],
                ),
                events.clone(),
                leases.clone(),
            ],
        ),
        role(
            "kubevirt-handler",
            &[],
            vec![
                rule(&[KUBEVIRT], &["virtualmachineinstances"], &["get", "list", "watch", "patch", "update"]),
                rule(&[KUBEVIRT], &["virtualmachineinstances/status"], &["get", "patch", "update"]),
                rule(&[KUBEVIRT], &["virtualmachineinstancemigrations", "kubevirts"], &READ),
                rule(&["migrations.kubevirt.io"], &["migrationpolicies"], &READ),
                rule(&[""], &["nodes"], &["get", "list", "watch", "patch"]),
                rule(&[""], &["nodes/status"], &["patch", "update"]),
                rule(
                    &[""],
                    &["pods", "configmaps", "secrets", "namespaces", "persistentvolumes", "persistentvolumeclaims"],
                    &READ,
                ),
                rule(&["k8s.cni.cncf.io"], &["network-attachment-definitions"], &READ),
                events,
                leases,
            ],
        ),
    ]
}

fn cluster_role_bindings() -> Vec<Value> {
    let bind = |name: &str, role: &str, subjects: Value| {
        json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"},
                "annotations": {"rbac.authorization.kubernetes.io/autoupdate": "true"}},
            "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": role},
            "subjects": subjects,
        })
    };
    let group = |name: &str| json!({"apiGroup": RBAC, "kind": "Group", "name": name});
    let user = |name: &str| json!({"apiGroup": RBAC, "kind": "User", "name": name});
    let account = |name: &str| json!({"kind": "ServiceAccount", "namespace": "kubevirt", "name": name});
    vec![
        bind("cluster-admin", "cluster-admin", json!([group("system:masters")])),
        bind("system:discovery", "system:discovery", json!([group("system:authenticated")])),
        bind("system:basic-user", "system:basic-user", json!([group("system:authenticated")])),
        bind(
            "system:public-info-viewer",
            "system:public-info-viewer",
            json!([group("system:authenticated"), group("system:unauthenticated")]),
        ),
        bind("system:nodes", "system:node", json!([group("system:nodes")])),
        bind("system:kube-scheduler", "system:kube-scheduler", json!([user("system:kube-scheduler")])),
        bind("kubevirt-controller", "kubevirt-controller", json!([account("kubevirt-controller")])),
        bind("kubevirt-handler", "kubevirt-handler", json!([account("kubevirt-handler")])),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rbac::{Action, Rule};

    fn may(role: &str, group: &str, resource: &str, verb: &str) -> bool {
        let role = cluster_roles().into_iter().find(|one| one["metadata"]["name"] == role).unwrap();
        let rules: Vec<Rule> = serde_json::from_value(role["rules"].clone()).unwrap();
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let action = Action { verb, group, resource, subresource, namespace: "kubevirt", name: "one", path: "" };
        rules.iter().any(|rule| rule.allows(&action))
    }

    /// What the controllers watch and write (`control`'s kinds); a right that is missing shows only as a watch that never
    /// comes.
    #[test]
    fn the_controller_may_do_its_work() {
        let role = "kubevirt-controller";
        let watched = [
            (KUBEVIRT, "virtualmachines"),
            (KUBEVIRT, "virtualmachineinstances"),
            (KUBEVIRT, "virtualmachineinstancemigrations"),
            (KUBEVIRT, "kubevirts"),
            ("migrations.kubevirt.io", "migrationpolicies"),
            ("godwit.io", "migrationrecords"),
            ("k8s.cni.cncf.io", "network-attachment-definitions"),
            ("coordination.k8s.io", "leases"),
            ("storage.k8s.io", "storageclasses"),
            ("", "pods"),
            ("", "nodes"),
            ("", "persistentvolumeclaims"),
            ("", "persistentvolumes"),
            ("", "configmaps"),
            ("", "namespaces"),
            ("", "resourcequotas"),
        ];
        for (group, resource) in watched {
            for verb in READ {
                assert!(may(role, group, resource, verb), "{verb} {resource}.{group}");
            }
        }
        let written = [
            (KUBEVIRT, "virtualmachineinstancemigrations"),
            (KUBEVIRT, "virtualmachineinstancemigrations/status"),
            (KUBEVIRT, "virtualmachineinstances"),
            (KUBEVIRT, "kubevirts/status"),
            ("godwit.io", "migrationrecords"),
            ("coordination.k8s.io", "leases"),
            ("", "configmaps"),
            ("", "pods"),
            ("", "nodes"),
        ];
        for (group, resource) in written {
            assert!(may(role, group, resource, "patch"), "patch {resource}.{group}");
        }
        for (group, resource) in [
            (KUBEVIRT, "virtualmachineinstancemigrations"),
            ("godwit.io", "migrationrecords"),
            ("coordination.k8s.io", "leases"),
            ("", "configmaps"),
            ("", "pods"),
        ] {
            assert!(may(role, group, resource, "create") && may(role, group, resource, "delete"), "{resource}.{group}");
        }
        assert!(may(role, "", "events", "create") && may(role, "events.k8s.io", "events", "create"));
        assert!(may(role, "", "pods/eviction", "create"));
        assert!(!may(role, RBAC, "clusterroles", "create"));
    }
}
