//! What roles cannot say: that each handler writes only what is of its own node.

use godwit_api::Installation;
use godwit_api::access::HANDLER;
use godwit_api::names::EXTRA_NODE_NAME;
use godwit_api::names::fence::LEASE_PREFIX;
use serde_json::{Value, json};

const NAME: &str = "godwit-handlers";

/// The policy and its binding, for handlers of `namespace`. The API server evaluates them by itself, so that no heartbeat and no
/// lease waits for godwit's own webhooks (VMIs are theirs: feature gate `NodeRestriction`).
///
/// Kubernetes says since 1.30 of which node a pod's token is; of a token of which it does not, nothing can be asked.
pub fn objects(namespace: &str) -> [Value; 2] {
    let metadata = json!({"name": NAME, "labels": {"kubevirt.io": ""}});
    let handler = Installation::new(namespace).user(HANDLER);
    let of_node = format!("has(request.userInfo.extra) && '{EXTRA_NODE_NAME}' in request.userInfo.extra");
    let rule = |group: &str, resource: &str, operations: &[&str], scope: &str| {
        json!({
            "apiGroups": [group], "apiVersions": ["v1"], "resources": [resource], "operations": operations, "scope": scope,
        })
    };
    let validation = |resource: &str, expression: String, message: &str| {
        json!({
            "expression": format!("request.resource.resource != '{resource}' || {expression}"),
            "message": message,
            "reason": "Forbidden",
        })
    };
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy", "metadata": metadata,
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [
                rule("", "nodes", &["UPDATE"], "Cluster"),
                rule("coordination.k8s.io", "leases", &["CREATE", "UPDATE"], "Namespaced"),
            ]},
            "matchConditions": [
                {
                    "name": "handlers",
                    "expression": format!("request.userInfo.username == '{handler}'"),
                },
                {"name": "whose-node-is-known", "expression": of_node},
            ],
            "variables": [{"name": "node", "expression": format!("request.userInfo.extra['{EXTRA_NODE_NAME}'][0]")}],
            "validations": [
                validation(
                    "nodes",
                    "object.metadata.name == variables.node".to_owned(),
                    "a virt-handler may change only the Node that it runs on",
                ),
                validation(
                    "leases",
                    format!("object.metadata.name == '{LEASE_PREFIX}' + variables.node"),
                    "a virt-handler may write only the Lease of the node that it runs on",
                ),
            ],
        },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding", "metadata": metadata,
        "spec": {"policyName": NAME, "validationActions": ["Deny"]},
    });
    [policy, binding]
}
