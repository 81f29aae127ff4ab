//! The objects that exist from the start.

use serde_json::{Value, json};

use crate::names::{KUBEVIRT_NAME, KUBEVIRT_NAMESPACE};

/// The provisioner of the StorageClass `shared`.
pub const SHARED_PROVISIONER: &str = "godwit.local/shared";
/// The provisioner of the StorageClass `local`.
pub const LOCAL_PROVISIONER: &str = "godwit.local/local";

/// The objects that exist from the start, in the order in which they can be created: the namespace and the object of
/// KubeVirt (its phase is set through the status), two StorageClasses and KubeVirt's user roles.
pub fn initial_objects() -> Vec<Value> {
    let mut objects = vec![
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": KUBEVIRT_NAMESPACE } }),
        json!({
            "apiVersion": "kubevirt.io/v1",
            "kind": "KubeVirt",
            "metadata": { "name": KUBEVIRT_NAME, "namespace": KUBEVIRT_NAMESPACE },
            "spec": { "configuration": {} },
        }),
        storage_class("shared", SHARED_PROVISIONER, "Immediate", true),
        storage_class("local", LOCAL_PROVISIONER, "WaitForFirstConsumer", false),
    ];
    objects.extend(user_roles());
    objects
}

/// What the KubeVirt object's status says once everything runs: a body for its status subresource.
pub fn deployed_status(version: &str) -> Value {
    let condition = |type_: &str, status: &str, reason: &str, message: &str| json!({ "type": type_, "status": status, "reason": reason, "message": message });
    json!({
        "phase": "Deployed",
        "operatorVersion": version,
        "targetKubeVirtVersion": version,
        "observedKubeVirtVersion": version,
        "defaultArchitecture": "amd64",
        "conditions": [
            condition("Available", "True", "AllComponentsReady", "All components are ready."),
            condition("Progressing", "False", "AllComponentsReady", "All components are ready."),
            condition("Degraded", "False", "AllComponentsReady", "All components are ready."),
            condition("Created", "True", "AllResourcesCreated", "All resources were created."),
        ],
    })
}

fn storage_class(name: &str, provisioner: &str, binding: &str, default: bool) -> Value {
    let default = if default { "true" } else { "false" };
    json!({
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": { "name": name, "annotations": { "storageclass.kubernetes.io/is-default-class": default } },
        "provisioner": provisioner,
        "reclaimPolicy": "Delete",
        "volumeBindingMode": binding,
    })
}

/// KubeVirt's ClusterRoles for users (`reference/kubevirt-contract.md`, 1.13). Since KubeVirt 1.5 nobody may migrate by being
/// admin of a namespace: `kubevirt.io:migrate` is given on purpose.
fn user_roles() -> Vec<Value> {
    let all = ["get", "delete", "create", "update", "patch", "list", "watch", "deletecollection"];
    let read = ["get", "list", "watch"];
    let rule = |group: &str, resources: &[&str], verbs: &[&str]| json!({ "apiGroups": [group], "resources": resources, "verbs": verbs });
    let machines = [
        "virtualmachines",
        "virtualmachineinstances",
        "virtualmachineinstancepresets",
        "virtualmachineinstancereplicasets",
    ];
    let migrations = ["virtualmachineinstancemigrations"];
    let read_subresources = [
        "virtualmachineinstances/guestosinfo",
        "virtualmachineinstances/filesystemlist",
        "virtualmachineinstances/userlist",
        "virtualmachines/expand-spec",
    ];
    let consoles =
        ["virtualmachineinstances/console", "virtualmachineinstances/vnc", "virtualmachineinstances/portforward"];
    let machine_actions = [
        "virtualmachines/start",
        "virtualmachines/stop",
        "virtualmachines/restart",
        "virtualmachines/evacuate/cancel",
        "virtualmachines/addvolume",
        "virtualmachines/removevolume",
    ];
    let instance_actions = [
        "virtualmachineinstances/pause",
        "virtualmachineinstances/unpause",
        "virtualmachineinstances/freeze",
        "virtualmachineinstances/unfreeze",
        "virtualmachineinstances/softreboot",
        "virtualmachineinstances/reset",
        "virtualmachineinstances/evacuate/cancel",
        "virtualmachineinstances/addvolume",
        "virtualmachineinstances/removevolume",
    ];
    let sub = "subresources.kubevirt.io";
    let group = "kubevirt.io";
    let edit = vec![
        rule(sub, &read_subresources, &["get"]),
        rule(sub, &consoles, &["get"]),
        rule(sub, &machine_actions, &["update"]),
        rule(sub, &instance_actions, &["update"]),
        rule(group, &machines, &all),
        rule(group, &migrations, &read),
        rule("migrations.kubevirt.io", &["migrationpolicies"], &read),
        rule("godwit.io", &["migrationrecords"], &read),
    ];
    let view = vec![
        rule(sub, &read_subresources, &["get"]),
        rule(group, &machines, &read),
        rule(group, &migrations, &read),
        rule("migrations.kubevirt.io", &["migrationpolicies"], &read),
        rule("godwit.io", &["migrationrecords"], &read),
    ];
    let mut roles = vec![
        cluster_role("kubevirt.io:admin", Some("admin"), &edit),
        cluster_role("kubevirt.io:edit", Some("edit"), &edit),
        cluster_role("kubevirt.io:view", Some("view"), &view),
        cluster_role(
            "kubevirt.io:migrate",
            None,
            &[rule(sub, &["virtualmachines/migrate"], &["update"]), rule(group, &migrations, &all)],
        ),
        cluster_role("kubevirt.io:default", None, &[rule(sub, &["version", "guestfs"], &["get", "list"])]),
    ];
    // The reference's roles for those who put nodes into maintenance, and for those who look on.
    let groups: Vec<&str> = crate::maintenance::GROUPS.iter().map(|(group, _)| *group).collect();
    let maintenance =
        |resource: &str, verbs: &[&str]| json!({ "apiGroups": groups, "resources": [resource], "verbs": verbs });
    for (name, verbs) in [
        ("nodemaintenance-editor-role", &["create", "delete", "get", "list", "patch", "update", "watch"][..]),
        ("nodemaintenance-viewer-role", &read),
    ] {
        let rules = [maintenance("nodemaintenances", verbs), maintenance("nodemaintenances/status", &["get"])];
        roles.push(cluster_role(name, None, &rules));
    }
    let subject = |name: &str| json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": name });
    roles.push(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": { "name": "kubevirt.io:default" },
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "kubevirt.io:default",
        },
        "subjects": [subject("system:authenticated"), subject("system:unauthenticated")],
    }));
    roles
}

fn cluster_role(name: &str, aggregate_to: Option<&str>, rules: &[Value]) -> Value {
    let mut metadata = json!({ "name": name });
    if let (Some(role), Some(metadata)) = (aggregate_to, metadata.as_object_mut()) {
        let label = format!("rbac.authorization.k8s.io/aggregate-to-{role}");
        metadata.insert("labels".to_owned(), json!({ label: "true" }));
    }
    json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": metadata, "rules": rules })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
    use k8s_openapi::api::storage::v1::StorageClass;

    use super::*;

    #[test]
    fn objects_are_what_kubernetes_reads() {
        for object in initial_objects() {
            let kind = object["kind"].as_str().unwrap().to_owned();
            match kind.as_str() {
                "ClusterRole" => drop(serde_json::from_value::<ClusterRole>(object).unwrap()),
                "ClusterRoleBinding" => drop(serde_json::from_value::<ClusterRoleBinding>(object).unwrap()),
                "StorageClass" => drop(serde_json::from_value::<StorageClass>(object).unwrap()),
                "KubeVirt" => drop(serde_json::from_value::<crate::KubeVirt>(object).unwrap()),
                "Namespace" => {}
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn namespace_admins_cannot_migrate() {
        let admin = initial_objects().into_iter().find(|o| o["metadata"]["name"] == "kubevirt.io:admin").unwrap();
        assert!(!admin.to_string().contains("migrate\""));
        assert_eq!(admin["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-admin"], "true");
    }

    #[test]
    fn the_status_is_of_its_type() {
        let status: crate::kubevirt::KubeVirtStatus = serde_json::from_value(deployed_status("v1")).unwrap();
        assert_eq!(status.phase, crate::kubevirt::KubeVirtPhase::Deployed);
    }
}
