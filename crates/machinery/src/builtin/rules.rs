//! Rules of built-in kinds and of metadata that no schema says, in Kubernetes' words.

use crate::names;
use crate::resource::Resource;
use crate::schema::{self, FieldError, Schema};
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::Arc;

const CONFIG_KEY: &str = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name', \
                          or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";

/// Everything wrong with an object of any kind that is about to be stored: metadata, schema, and for built-in kinds the
/// rules that their schemas do not say.
pub fn validate(resource: &Resource, object: &Value) -> Vec<FieldError> {
    // Reviews are asked, not stored, and have no name.
    let mut errors = if resource.virtual_create_only {
        Vec::new()
    } else {
        let rule = names::Rule::of(&resource.gv.group, &resource.plural);
        names::validate(object, rule, resource.namespaced)
    };
    if !resource.builtin {
        errors.extend(schema::validate(&resource.schema, object));
        return errors;
    }
    errors.extend(schema::validate(&without_status(&resource.schema), object));
    match (resource.gv.group.as_str(), resource.kind.as_str()) {
        ("", "Pod") => pod(object, &mut errors),
        ("", "ConfigMap") => {
            keys(object, "data", &mut errors);
            keys(object, "binaryData", &mut errors);
        }
        ("", "Secret") => keys(object, "data", &mut errors),
        ("", "PersistentVolumeClaim") => claim(object, &mut errors),
        ("", "ResourceQuota") => resource_quota(object, &mut errors),
        ("policy", "PodDisruptionBudget") => budget(object, &mut errors),
        ("apps", "Deployment" | "DaemonSet") => workload(object, &mut errors),
        ("storage.k8s.io", "StorageClass") => needs(object, "provisioner", "provisioner", &mut errors),
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => role_ref(object, &mut errors),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => errors.extend(crate::crd::validate_crd(object)),
        _ => {}
    }
    errors
}

/// The schema with an unconstrained status: writers of built-in statuses leave out members that Go would write as zero.
fn without_status(schema: &Schema) -> Schema {
    let mut schema = schema.clone();
    if let Some(status) = schema.properties.get("status") {
        let relaxed = Schema { ty: status.ty, preserve_unknown: true, ..Schema::default() };
        schema.properties.insert("status".into(), Arc::new(relaxed));
    }
    schema
}

fn push(reason: &str, field: &str, message: String, errors: &mut Vec<FieldError>) {
    errors.push(FieldError { reason: reason.into(), field: field.into(), message });
}

fn required(field: &str, detail: &str, errors: &mut Vec<FieldError>) {
    let message = if detail.is_empty() { "Required value".into() } else { format!("Required value: {detail}") };
    push("FieldValueRequired", field, message, errors);
}

fn invalid(field: &str, value: &str, why: &str, errors: &mut Vec<FieldError>) {
    push("FieldValueInvalid", field, format!("Invalid value: {}: {why}", Value::from(value)), errors);
}

/// Complains of a text member that is absent or empty.
fn needs(object: &Value, member: &str, field: &str, errors: &mut Vec<FieldError>) {
    let absent = match object.get(member) {
        None | Some(Value::Null) => true,
        Some(Value::String(s)) => s.is_empty(),
        Some(_) => false,
    };
    // Members that the schema calls required were reported by it.
    if absent && !errors.iter().any(|e| e.field == field) {
        required(field, "", errors);
    }
}

fn one_of(object: &Value, member: &str, field: &str, supported: &[&str], errors: &mut Vec<FieldError>) {
    let Some(value) = object.get(member).and_then(Value::as_str) else { return };
    if !supported.contains(&value) {
        let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let message = format!("Unsupported value: {}: supported values: {}", Value::from(value), list.join(", "));
        push("FieldValueNotSupported", field, message, errors);
    }
}

fn list<'a>(object: &'a Value, member: &str) -> impl Iterator<Item = (usize, &'a Value)> {
    object.get(member).and_then(Value::as_array).into_iter().flatten().enumerate()
}

fn pod(object: &Value, errors: &mut Vec<FieldError>) {
    let Some(spec) = object.get("spec") else { return required("spec.containers", "", errors) };
    if list(spec, "containers").next().is_none() && !errors.iter().any(|e| e.field == "spec.containers") {
        required("spec.containers", "", errors);
    }
    one_of(spec, "restartPolicy", "spec.restartPolicy", &["Always", "OnFailure", "Never"], errors);
    let policies = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    one_of(spec, "dnsPolicy", "spec.dnsPolicy", &policies, errors);
    let mut volumes = BTreeSet::new();
    for (index, volume) in list(spec, "volumes") {
        let field = format!("spec.volumes[{index}].name");
        named(volume, &field, &mut volumes, errors);
    }
    let mut names = BTreeSet::new();
    for kind in ["containers", "initContainers"] {
        for (index, container) in list(spec, kind) {
            let path = format!("spec.{kind}[{index}]");
            named(container, &format!("{path}.name"), &mut names, errors);
            needs(container, "image", &format!("{path}.image"), errors);
            let policies = ["Always", "IfNotPresent", "Never"];
            one_of(container, "imagePullPolicy", &format!("{path}.imagePullPolicy"), &policies, errors);
            let mut paths = BTreeSet::new();
            for (at, mount) in list(container, "volumeMounts") {
                let target = mount.get("mountPath").and_then(Value::as_str).unwrap_or_default();
                let field = format!("{path}.volumeMounts[{at}].mountPath");
                if target.is_empty() {
                    needs(mount, "mountPath", &field, errors);
                } else if !paths.insert(target) {
                    invalid(&field, target, "must be unique", errors);
                }
                let name = mount.get("name").and_then(Value::as_str).unwrap_or_default();
                if !name.is_empty() && !volumes.contains(name) {
                    let message = format!("Not found: {}", Value::from(name));
                    push("FieldValueNotFound", &format!("{path}.volumeMounts[{at}].name"), message, errors);
                }
            }
            requests_within_limits(container, &path, errors);
        }
    }
}

/// A name that must be a DNS label and unlike those before it.
fn named(object: &Value, field: &str, seen: &mut BTreeSet<String>, errors: &mut Vec<FieldError>) {
    needs(object, "name", field, errors);
    let Some(name) = object.get("name").and_then(Value::as_str).filter(|n| !n.is_empty()) else { return };
    names::label(name).iter().for_each(|why| invalid(field, name, why, errors));
    if !seen.insert(name.to_owned()) {
        push("FieldValueDuplicate", field, format!("Duplicate value: {}", Value::from(name)), errors);
    }
}

/// The template is a pod, and one that is selected.
fn workload(object: &Value, errors: &mut Vec<FieldError>) {
    let Some(template) = object.pointer("/spec/template") else { return };
    let mut within = Vec::new();
    pod(template, &mut within);
    one_of(template.get("spec").unwrap_or(template), "restartPolicy", "spec.restartPolicy", &["Always"], &mut within);
    errors.extend(
        within.into_iter().map(|error| FieldError { field: format!("spec.template.{}", error.field), ..error }),
    );
    let labels = template.pointer("/metadata/labels");
    let selected = object.pointer("/spec/selector/matchLabels").and_then(Value::as_object);
    let mut selected = selected.into_iter().flatten();
    if !selected.all(|(key, value)| labels.is_some_and(|labels| labels.get(key) == Some(value))) {
        let labels = labels.cloned().unwrap_or_default();
        let why = format!("Invalid value: {labels}: `selector` does not match template `labels`");
        push("FieldValueInvalid", "spec.template.metadata.labels", why, errors);
    }
}

fn requests_within_limits(container: &Value, path: &str, errors: &mut Vec<FieldError>) {
    use crate::quantity::Quantity;
    let Some(requests) = container.pointer("/resources/requests").and_then(Value::as_object) else { return };
    for (name, request) in requests {
        let limit = container.pointer("/resources/limits").and_then(|l| l.get(name));
        if let (Some(request), Some(limit)) = (Quantity::of(request), limit.and_then(Quantity::of))
            && request > limit
        {
            let why = format!("must be less than or equal to {name} limit of {limit}");
            invalid(&format!("{path}.resources.requests"), &request.to_string(), &why, errors);
        }
    }
}

fn keys(object: &Value, member: &str, errors: &mut Vec<FieldError>) {
    for key in object.get(member).and_then(Value::as_object).into_iter().flat_map(|m| m.keys()) {
        let good = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        let field = format!("{member}[{key}]");
        if key.len() > 253 {
            invalid(&field, key, "must be no more than 253 bytes", errors);
        } else if !good {
            invalid(&field, key, CONFIG_KEY, errors);
        } else if key == "." || key == ".." {
            invalid(&field, key, &format!("may not be '{key}'"), errors);
        }
    }
}

fn claim(object: &Value, errors: &mut Vec<FieldError>) {
    let Some(spec) = object.get("spec") else { return required("spec", "", errors) };
    if list(spec, "accessModes").next().is_none() {
        required("spec.accessModes", "at least 1 access mode is required", errors);
    }
    let modes = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
    for (index, mode) in list(spec, "accessModes") {
        let holder = serde_json::json!({"mode": mode});
        one_of(&holder, "mode", &format!("spec.accessModes[{index}]"), &modes, errors);
    }
    if spec.pointer("/resources/requests/storage").is_none() {
        required("spec.resources[storage]", "", errors);
    }
}

fn budget(object: &Value, errors: &mut Vec<FieldError>) {
    let Some(spec) = object.get("spec") else { return };
    if spec.get("minAvailable").is_some() && spec.get("maxUnavailable").is_some() {
        let why = "Invalid value: minAvailable and maxUnavailable cannot be both set";
        push("FieldValueInvalid", "spec", why.into(), errors);
    }
    for member in ["minAvailable", "maxUnavailable"] {
        let field = format!("spec.{member}");
        match spec.get(member) {
            Some(Value::Number(n)) if n.as_i64().is_some_and(|n| n < 0) => {
                let why = format!("Invalid value: {n}: must be greater than or equal to 0");
                push("FieldValueInvalid", &field, why, errors);
            }
            Some(Value::String(text)) => {
                let percent = text.strip_suffix('%').filter(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()));
                match percent.map(str::parse::<u32>) {
                    None => {
                        let why = "a valid percent string must be a numeric string followed by an ending '%' (e.g. \
                                   '1%',  or '93%', regex used for validation is '[0-9]+%')";
                        invalid(&field, text, why, errors);
                    }
                    Some(Ok(n)) if n <= 100 => {}
                    Some(_) => invalid(&field, text, "must not be greater than 100%", errors),
                }
            }
            _ => {}
        }
    }
}

/// Amounts are not negative, and nothing is limited that nobody counts.
fn resource_quota(object: &Value, errors: &mut Vec<FieldError>) {
    use crate::{quantity::Quantity, quota};
    for (name, amount) in object.pointer("/spec/hard").and_then(Value::as_object).into_iter().flatten() {
        let field = format!("spec.hard[{name}]");
        if quota::counts(name).is_none() {
            invalid(&field, name, "must be a standard resource for quota", errors);
        }
        if let Some(amount) = Quantity::of(amount)
            && amount < Quantity::new(0, crate::quantity::Format::DecimalSi)
        {
            invalid(&field, &amount.to_string(), "must be greater than or equal to 0", errors);
        }
    }
    let Some(spec) = object.get("spec") else { return };
    for (index, scope) in list(spec, "scopes") {
        let holder = serde_json::json!({"scope": scope});
        one_of(&holder, "scope", &format!("spec.scopes[{index}]"), &quota::SCOPES, errors);
    }
    let terms = spec.get("scopeSelector").into_iter().flat_map(|selector| list(selector, "matchExpressions"));
    for (index, term) in terms {
        let path = format!("spec.scopeSelector.matchExpressions[{index}]");
        one_of(term, "scopeName", &format!("{path}.scopeName"), &quota::SCOPES, errors);
        one_of(term, "operator", &format!("{path}.operator"), &["In", "NotIn", "Exists", "DoesNotExist"], errors);
    }
}

fn role_ref(object: &Value, errors: &mut Vec<FieldError>) {
    let Some(role) = object.get("roleRef") else { return };
    one_of(role, "kind", "roleRef.kind", &["Role", "ClusterRole"], errors);
    needs(role, "name", "roleRef.name", errors);
    for (index, subject) in list(object, "subjects") {
        one_of(subject, "kind", &format!("subjects[{index}].kind"), &["ServiceAccount", "User", "Group"], errors);
        needs(subject, "name", &format!("subjects[{index}].name"), errors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(kind: &str, object: Value) -> Vec<String> {
        let resource = super::super::resources().into_iter().find(|r| r.kind == kind).unwrap();
        validate(&resource, &object).into_iter().map(|e| format!("{}: {}", e.field, e.message)).collect()
    }

    #[test]
    fn a_good_pod_passes() {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "n"},
            "spec": {"containers": [{"name": "c", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
                "volumes": [{"name": "v", "emptyDir": {}}]},
            "status": {"containerStatuses": [{"name": "c"}]}});
        assert_eq!(check("Pod", pod), Vec::<String>::new());
    }

    #[test]
    fn a_workload_selects_good_pods() {
        let good = json!({"metadata": {"name": "d", "namespace": "n"}, "spec": {"selector": {"matchLabels": {"a": "b"}},
            "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        for kind in ["Deployment", "DaemonSet"] {
            assert_eq!(check(kind, good.clone()), Vec::<String>::new());
            let mut bad = good.clone();
            bad["spec"]["template"] = json!({"metadata": {"labels": {"a": "c"}},
                "spec": {"restartPolicy": "Never", "containers": [{"name": "c"}]}});
            assert_eq!(
                check(kind, bad),
                [
                    "spec.template.spec.containers[0].image: Required value",
                    "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\"",
                    "spec.template.metadata.labels: Invalid value: {\"a\":\"c\"}: `selector` does not match template `labels`",
                ]
            );
        }
    }

    #[test]
    fn a_bad_pod_is_told_everything() {
        let pod = json!({"metadata": {"name": "P_", "namespace": "n", "labels": {"a b": "c"}},
            "spec": {"restartPolicy": "Sometimes", "containers": [{"name": "c"}, {"name": "c", "image": "i",
                "resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}},
                "volumeMounts": [{"name": "nope", "mountPath": "/v"}]}]}});
        let errors = check("Pod", pod);
        let has = |start: &str| assert!(errors.iter().any(|e| e.starts_with(start)), "{start} not in {errors:#?}");
        has("metadata.name: Invalid value: \"P_\": a lowercase RFC 1123 subdomain");
        has("metadata.labels: Invalid value: \"a b\": name part must");
        has(
            "spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"OnFailure\", \"Never\"",
        );
        has("spec.containers[0].image: Required value");
        has("spec.containers[1].name: Duplicate value: \"c\"");
        has("spec.containers[1].volumeMounts[0].name: Not found: \"nope\"");
        has(
            "spec.containers[1].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
        );
    }

    #[test]
    fn a_variable_may_be_named_twice_and_a_path_not_mounted_twice() {
        let pod = json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {"volumes": [{"name": "v", "emptyDir": {}}],
            "containers": [{"name": "c", "image": "i", "env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}],
                "volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "v", "mountPath": "/v"}]}]}});
        let wanted = "spec.containers[0].volumeMounts[1].mountPath: Invalid value: \"/v\": must be unique";
        assert_eq!(check("Pod", pod), [wanted]);
    }

    #[test]
    fn budgets_count_one_way_in_numbers_or_percents() {
        let with = |spec: Value| {
            check("PodDisruptionBudget", json!({"metadata": {"name": "b", "namespace": "n"}, "spec": spec}))
        };
        assert!(with(json!({"minAvailable": "50%", "selector": {}})).is_empty());
        assert!(with(json!({"minAvailable": 1, "maxUnavailable": 1}))[0].contains("cannot be both set"));
        assert!(with(json!({"minAvailable": -1}))[0].contains("greater than or equal to 0"));
        assert!(with(json!({"maxUnavailable": "half"}))[0].contains("valid percent string"));
        assert!(with(json!({"maxUnavailable": "101%"}))[0].contains("greater than 100%"));
    }

    #[test]
    fn quotas_limit_what_is_counted() {
        let with =
            |spec: Value| check("ResourceQuota", json!({"metadata": {"name": "q", "namespace": "n"}, "spec": spec}));
        assert!(with(json!({"hard": {"pods": "3", "requests.memory": "1Gi", "count/vms.example.com": 1}})).is_empty());
        assert!(with(json!({"hard": {"podz": "3"}}))[0].contains("must be a standard resource for quota"));
        assert!(with(json!({"hard": {"pods": "-1"}}))[0].contains("must be greater than or equal to 0"));
        assert!(with(json!({"scopes": ["Odd"]}))[0].starts_with("spec.scopes[0]: Unsupported value: \"Odd\""));
    }

    #[test]
    fn scope_and_names_are_checked() {
        assert!(check("Node", json!({"metadata": {"name": "n", "namespace": "x"}}))[0].contains("orbidden"));
        assert!(check("ConfigMap", json!({"metadata": {"name": "n"}}))[0].starts_with("metadata.namespace: Required"));
        assert!(
            check("ConfigMap", json!({"metadata": {"name": "n", "namespace": "x"}, "data": {"a/b": "c"}}))[0]
                .starts_with("data[a/b]: Invalid value")
        );
        assert!(check("ClusterRole", json!({"metadata": {"name": "system:x"}, "rules": []})).is_empty());
    }
}
