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

/// Creates what is missing. Roles and bindings that are there, Kubernetes' own and these, are given what they lack; the rest stays
/// as it is.
pub(crate) async fn objects(inner: &Arc<Inner>, ca: &str, roles: Vec<Value>) -> Result<(), Error> {
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
    for mut object in roles {
        if object["kind"] == "Namespace" {
            let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            ensure(inner, "", "v1", "namespaces", "", object).await?;
            collector::furnish(inner, &name, ca).await;
            continue;
        }
        mark(&mut object);
        let kind = object["kind"].as_str().unwrap_or_default().to_lowercase();
        reconcile(inner, &format!("{kind}s"), object).await?;
    }
    Ok(())
}

/// Creates a role or binding, or brings the one of an older data directory up to date.
async fn reconcile(inner: &Arc<Inner>, plural: &str, object: Value) -> Result<(), Error> {
    let namespace = object.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or_default();
    ensure(inner, RBAC, "v1", plural, namespace, object.clone()).await?;
    let cx = Context::internal(inner);
    let Some(kind) = cx.kinds.get(RBAC, "v1", plural).cloned() else { return Ok(()) };
    let name = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    let change = Change { namespace, name, dry_run: false, manager: Manager::server() };
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

/// Says that a role or binding comes with the server and is brought up to date by it.
fn mark(object: &mut Value) {
    object["metadata"]["labels"]["kubernetes.io/bootstrapping"] = json!("rbac-defaults");
    object["metadata"]["annotations"]["rbac.authorization.kubernetes.io/autoupdate"] = json!("true");
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
    roles.extend(components());
    roles
}

/// Roles of the parts of a cluster that are Kubernetes' own.
fn components() -> Vec<Value> {
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
    ]
}
