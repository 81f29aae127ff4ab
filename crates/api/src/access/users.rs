//! KubeVirt's roles for users, and those of the maintenance operators.

use serde_json::{Value, json};

/// KubeVirt's ClusterRoles for users (`reference/kubevirt-contract.md`, 1.13). Since KubeVirt 1.5 nobody may migrate by being
/// admin of a namespace: `kubevirt.io:migrate` is given on purpose.
pub fn user_roles() -> Vec<Value> {
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
        // kube-apiserver sees no more of a path than this of a subresource's name; who serves it is asked for the whole.
        "virtualmachines/evacuate",
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
        "virtualmachineinstances/evacuate",
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
    use super::*;

    #[test]
    fn namespace_admins_cannot_migrate() {
        let admin = user_roles().into_iter().find(|o| o["metadata"]["name"] == "kubevirt.io:admin").unwrap();
        assert!(!admin.to_string().contains("migrate\""));
        assert_eq!(admin["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-admin"], "true");
    }
}
