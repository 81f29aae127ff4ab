//! The objects that exist from the start.

use serde_json::{Value, json};

use crate::access::user_roles;
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
    fn the_status_is_of_its_type() {
        let status: crate::kubevirt::KubeVirtStatus = serde_json::from_value(deployed_status("v1")).unwrap();
        assert_eq!(status.phase, crate::kubevirt::KubeVirtPhase::Deployed);
    }
}
