//! What single kinds do beyond what every kind does when they are created and changed.

use crate::kinds::Kind;
use base64::Engine;
use godwit_machinery::status::Cause;
use godwit_machinery::{builtin, crd, meta};
use serde_json::{Map, Value, json};

/// Deleting a definition first deletes what it defines.
pub(crate) const CRD_CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";
/// Kubernetes' own finalizer of namespaces, in `spec.finalizers`.
pub(crate) const NAMESPACE_FINALIZER: &str = "kubernetes";

fn now() -> String {
    meta::time(jiff::Timestamp::now())
}

/// Completes a new object.
pub(crate) fn create(kind: &Kind, object: &mut Value) {
    let resource = &kind.resource;
    let status = builtin_status(kind, object);
    if let Some(map) = object.as_object_mut() {
        match status {
            Some(status) => {
                map.insert("status".to_owned(), status);
            }
            // Kubelets register their node with its status.
            None if resource.status_subresource && !kind.is("", "nodes") => {
                map.remove("status");
            }
            None => {}
        }
    }
    match kind.names() {
        ("", "namespaces") => {
            let name = meta::name(object).to_owned();
            if let Some(metadata) = meta::metadata_mut(object) {
                let labels = metadata.entry("labels").or_insert_with(|| json!({}));
                if let Some(labels) = labels.as_object_mut() {
                    labels.insert("kubernetes.io/metadata.name".to_owned(), Value::String(name));
                }
            }
            set_namespace_finalizers(object, Some(json!([NAMESPACE_FINALIZER])));
        }
        ("", "secrets") => secret_strings(object),
        ("apiextensions.k8s.io", "customresourcedefinitions") => {
            let mut finalizers = meta::finalizers(object);
            if !finalizers.contains(&CRD_CLEANUP) {
                finalizers.push(CRD_CLEANUP);
                let list: Vec<String> = finalizers.into_iter().map(str::to_owned).collect();
                meta::set(object, "finalizers", Some(json!(list)));
            }
            *object = crd::established_status(object, &now());
        }
        _ => {}
    }
}

fn builtin_status(kind: &Kind, object: &Value) -> Option<Value> {
    kind.resource.builtin.then(|| builtin::initial_status(&kind.resource, object)).flatten()
}

/// Completes a changed object; `status`: it came through `/status`.
pub(crate) fn update(kind: &Kind, old: &Value, new: &mut Value, subresource: &str) {
    match kind.names() {
        ("", "namespaces") if subresource != "finalize" => {
            set_namespace_finalizers(new, old.pointer("/spec/finalizers").cloned());
            if meta::is_deleting(new) {
                new["status"]["phase"] = json!("Terminating");
            }
        }
        ("", "secrets") => secret_strings(new),
        ("apiextensions.k8s.io", "customresourcedefinitions") if subresource.is_empty() => {
            *new = crd::established_status(new, &now());
        }
        _ => {}
    }
}

fn set_namespace_finalizers(object: &mut Value, list: Option<Value>) {
    let Some(map) = object.as_object_mut() else { return };
    let spec = map.entry("spec").or_insert_with(|| json!({}));
    if !spec.is_object() {
        *spec = json!({});
    }
    if let Some(spec) = spec.as_object_mut() {
        match list {
            Some(list) => {
                spec.insert("finalizers".to_owned(), list);
            }
            None => {
                spec.remove("finalizers");
            }
        }
    }
}

/// `stringData` is written into `data`.
fn secret_strings(object: &mut Value) {
    let Some(map) = object.as_object_mut() else { return };
    let Some(Value::Object(strings)) = map.remove("stringData") else { return };
    let data = map.entry("data").or_insert_with(|| Value::Object(Map::new()));
    if !data.is_object() {
        *data = Value::Object(Map::new());
    }
    if let Some(data) = data.as_object_mut() {
        for (key, value) in strings {
            let text = value.as_str().unwrap_or_default();
            data.insert(key, Value::String(base64::engine::general_purpose::STANDARD.encode(text)));
        }
    }
}

/// What a client should know about an object that is stored and served, but on (parts of) which nothing here acts.
pub(crate) fn unsupported(kind: &Kind, object: &Value) -> Vec<String> {
    let what = match kind.names() {
        ("", "services") => "Service is stored, but no address or load balancing is set up for it",
        ("scheduling.k8s.io", "priorityclasses") => "PriorityClass is stored, but nothing is preempted",
        ("apps", "deployments") => "Deployment is stored, but no pods are made of it",
        ("apps", "daemonsets") => "DaemonSet is stored, but no pods are made of it",
        ("admissionregistration.k8s.io", "mutatingwebhookconfigurations") => {
            "MutatingWebhookConfiguration is stored, but no webhooks are called"
        }
        ("admissionregistration.k8s.io", "validatingwebhookconfigurations") => {
            "ValidatingWebhookConfiguration is stored, but no webhooks are called"
        }
        ("admissionregistration.k8s.io", "validatingadmissionpolicies") => {
            "ValidatingAdmissionPolicy is stored, but not evaluated"
        }
        ("apiregistration.k8s.io", "apiservices") => "APIService is stored, but no requests are passed on",
        ("apiextensions.k8s.io", "customresourcedefinitions") => return crd::warnings(object),
        _ => return Vec::new(),
    };
    vec![format!("{what} by Godwit's standalone cluster")]
}

/// Changes that a kind forbids.
pub(crate) fn forbidden_changes(kind: &Kind, old: &Value, new: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let same = |pointer: &str| old.pointer(pointer) == new.pointer(pointer);
    let value = |pointer: &str| new.pointer(pointer).cloned().unwrap_or_default();
    match kind.names() {
        ("", "pods") => pod_changes(old, new, &mut causes),
        ("", "configmaps" | "secrets") if old.get("immutable") == Some(&Value::Bool(true)) => {
            for field in ["data", "binaryData"] {
                if !same(&format!("/{field}")) {
                    causes.push(Cause::forbidden(field, "field is immutable when `immutable` is set"));
                }
            }
            if !same("/immutable") {
                causes.push(Cause::forbidden("immutable", "field is immutable when `immutable` is set"));
            }
        }
        ("", "secrets") if !same("/type") => {
            causes.push(Cause::invalid("type", &value("/type"), "field is immutable"));
        }
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") if !same("/roleRef") => {
            causes.push(Cause::invalid("roleRef", &value("/roleRef"), "cannot change roleRef"));
        }
        ("storage.k8s.io", "storageclasses") => {
            for field in ["provisioner", "parameters", "reclaimPolicy", "volumeBindingMode"] {
                if !same(&format!("/{field}")) {
                    causes.push(Cause::forbidden(field, &format!("updates to {field} are forbidden.")));
                }
            }
        }
        ("apiextensions.k8s.io", "customresourcedefinitions") => {
            for field in ["group", "scope", "names/plural", "names/kind"] {
                if !same(&format!("/spec/{field}")) {
                    let name = format!("spec.{}", field.replace('/', "."));
                    causes.push(Cause::invalid(name, &value(&format!("/spec/{field}")), "field is immutable"));
                }
            }
        }
        _ => {}
    }
    causes
}

/// Of a pod's specification little may change once it is there.
fn pod_changes(old: &Value, new: &Value, causes: &mut Vec<Cause>) {
    let fixed = |pod: &Value| {
        let mut spec = pod.get("spec").cloned().unwrap_or_default();
        if let Some(map) = spec.as_object_mut() {
            for key in ["activeDeadlineSeconds", "terminationGracePeriodSeconds", "tolerations", "schedulingGates"] {
                map.remove(key);
            }
            for list in ["containers", "initContainers"] {
                for container in map.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                    if let Some(container) = container.as_object_mut() {
                        container.remove("image");
                    }
                }
            }
        }
        spec
    };
    if fixed(old) != fixed(new) {
        causes.push(Cause::forbidden(
            "spec",
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,\
             `spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),\
             `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        ));
    }
}
