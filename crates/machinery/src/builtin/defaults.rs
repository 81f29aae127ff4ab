//! Defaults of built-in kinds: what Kubernetes' server fills in before it validates and stores.

use crate::quantity::Quantity;
use crate::resource::Resource;
use crate::schema::{Schema, drop_nulls};
use base64::Engine as _;
use serde_json::{Map, Value, json};

/// Fills in defaults, drops nulls and writes quantities canonically. For every write of a built-in kind (creation,
/// replacement, after a patch); doing it twice changes nothing more.
pub fn set_defaults(resource: &Resource, object: &mut Value) {
    drop_nulls(&resource.schema, object);
    canonical_quantities(&resource.schema, object);
    match (resource.gv.group.as_str(), resource.kind.as_str()) {
        ("", "Pod") => object.get_mut("spec").into_iter().for_each(pod_spec),
        ("", "Namespace") => namespace(object),
        ("", "Secret") => secret(object),
        ("", "PersistentVolumeClaim") => in_spec(object, &[("volumeMode", json!("Filesystem"))]),
        ("", "PersistentVolume") => {
            in_spec(object, &[("volumeMode", json!("Filesystem")), ("persistentVolumeReclaimPolicy", json!("Retain"))])
        }
        ("", "Service") => service(object),
        ("apps", kind) => workload(kind, object),
        ("storage.k8s.io", "StorageClass") => {
            put(object, "reclaimPolicy", || json!("Delete"));
            put(object, "volumeBindingMode", || json!("Immediate"));
        }
        ("scheduling.k8s.io", "PriorityClass") => {
            put(object, "preemptionPolicy", || json!("PreemptLowerPriority"));
        }
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => binding(object),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => crate::crd::set_defaults(object),
        _ => {}
    }
}

/// The status that an object of this kind is born with, whatever the client sent; `None`: none.
pub fn initial_status(resource: &Resource, object: &Value) -> Option<Value> {
    Some(match (resource.gv.group.as_str(), resource.kind.as_str()) {
        ("", "Pod") => json!({"phase": "Pending", "qosClass": qos_class(object)}),
        ("", "Namespace") => json!({"phase": "Active"}),
        ("", "PersistentVolumeClaim" | "PersistentVolume") => json!({"phase": "Pending"}),
        ("", "Service") => json!({"loadBalancer": {}}),
        _ => return None,
    })
}

/// `Guaranteed`, `Burstable` or `BestEffort`: what a pod's requests and limits make of it.
pub fn qos_class(pod: &Value) -> &'static str {
    let containers = ["containers", "initContainers"]
        .iter()
        .filter_map(|list| pod.pointer(&format!("/spec/{list}"))?.as_array())
        .flatten();
    let (mut any, mut guaranteed) = (false, true);
    for container in containers {
        let amount = |kind: &str, what: &str| {
            container.pointer(&format!("/resources/{kind}/{what}")).and_then(Quantity::of).filter(|q| !q.is_zero())
        };
        for what in ["cpu", "memory"] {
            let (request, limit) = (amount("requests", what), amount("limits", what));
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && (request.is_none() || request == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

fn canonical_quantities(schema: &Schema, value: &mut Value) {
    if schema.quantity {
        if let Some(q) = Quantity::of(value) {
            *value = Value::String(q.to_string());
        }
        return;
    }
    match value {
        Value::Object(map) => {
            for (name, member) in map.iter_mut() {
                if let Some(known) = schema.member(name) {
                    canonical_quantities(known, member);
                }
            }
        }
        Value::Array(items) => {
            if let Some(known) = &schema.items {
                items.iter_mut().for_each(|item| canonical_quantities(known, item));
            }
        }
        _ => {}
    }
}

/// Sets a member of an object that has none; anything but an object is left for validation to refuse.
fn put(object: &mut Value, field: &str, value: impl FnOnce() -> Value) {
    if let Value::Object(map) = object {
        map.entry(field).or_insert_with(value);
    }
}

fn put_all(object: &mut Value, defaults: &[(&str, Value)]) {
    for (field, value) in defaults {
        put(object, field, || value.clone());
    }
}

fn in_spec(object: &mut Value, defaults: &[(&str, Value)]) {
    object.get_mut("spec").into_iter().for_each(|spec| put_all(spec, defaults));
}

fn each<'a>(object: &'a mut Value, list: &str) -> impl Iterator<Item = &'a mut Value> {
    object.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten()
}

fn pod_spec(spec: &mut Value) {
    put_all(
        spec,
        &[
            ("restartPolicy", json!("Always")),
            ("dnsPolicy", json!("ClusterFirst")),
            ("terminationGracePeriodSeconds", json!(30)),
            ("securityContext", json!({})),
            ("schedulerName", json!("default-scheduler")),
            ("enableServiceLinks", json!(true)),
        ],
    );
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        each(spec, list).for_each(container);
    }
    each(spec, "volumes").for_each(volume);
}

fn container(container: &mut Value) {
    if let Some(image) = container.get("image").and_then(Value::as_str) {
        let policy = pull_policy(image);
        put(container, "imagePullPolicy", || json!(policy));
    }
    put_all(
        container,
        &[
            ("terminationMessagePath", json!("/dev/termination-log")),
            ("terminationMessagePolicy", json!("File")),
            ("resources", json!({})),
        ],
    );
    each(container, "ports").for_each(|port| put(port, "protocol", || json!("TCP")));
    for env in each(container, "env") {
        if let Some(field) = env.pointer_mut("/valueFrom/fieldRef") {
            put(field, "apiVersion", || json!("v1"));
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(probe) {
            put_all(
                probe,
                &[
                    ("timeoutSeconds", json!(1)),
                    ("periodSeconds", json!(10)),
                    ("successThreshold", json!(1)),
                    ("failureThreshold", json!(3)),
                ],
            );
            if let Some(get) = probe.get_mut("httpGet") {
                put_all(get, &[("path", json!("/")), ("scheme", json!("HTTP"))]);
            }
        }
    }
    if let Some(resources) = container.get_mut("resources") {
        requests_from_limits(resources);
    }
}

/// What is limited and not asked for is asked for at its limit.
fn requests_from_limits(resources: &mut Value) {
    let Some(Value::Object(limits)) = resources.get("limits").cloned() else { return };
    put(resources, "requests", || Value::Object(Map::new()));
    if let Some(requests) = resources.get_mut("requests") {
        limits.into_iter().for_each(|(name, amount)| put(requests, &name, || amount));
    }
}

/// `Always` for images without a tag or with `:latest`.
fn pull_policy(image: &str) -> &'static str {
    let last = image.rsplit('/').next().unwrap_or(image);
    match last.rsplit_once(':') {
        _ if image.contains('@') => "IfNotPresent",
        None | Some((_, "latest")) => "Always",
        Some(_) => "IfNotPresent",
    }
}

fn volume(volume: &mut Value) {
    let Value::Object(map) = &*volume else { return };
    if map.keys().all(|k| k == "name") {
        put(volume, "emptyDir", || json!({}));
    }
    for kind in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(source) = volume.get_mut(kind) {
            put(source, "defaultMode", || json!(420));
        }
    }
    if let Some(path) = volume.get_mut("hostPath") {
        put(path, "type", || json!(""));
    }
    if let Some(image) = volume.get_mut("image")
        && let Some(reference) = image.get("reference").and_then(Value::as_str)
    {
        let policy = pull_policy(reference);
        put(image, "pullPolicy", || json!(policy));
    }
    let lists = [volume.get_mut("downwardAPI").map(|v| vec![v]).unwrap_or_default()];
    for item in lists.into_iter().flatten().flat_map(|v| each(v, "items")) {
        if let Some(field) = item.get_mut("fieldRef") {
            put(field, "apiVersion", || json!("v1"));
        }
    }
    for source in volume.get_mut("projected").into_iter().flat_map(|p| each(p, "sources")) {
        if let Some(token) = source.get_mut("serviceAccountToken") {
            put(token, "expirationSeconds", || json!(3600));
        }
        for item in source.get_mut("downwardAPI").into_iter().flat_map(|d| each(d, "items")) {
            if let Some(field) = item.get_mut("fieldRef") {
                put(field, "apiVersion", || json!("v1"));
            }
        }
    }
}

fn namespace(object: &mut Value) {
    let Some(name) = object.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned) else { return };
    if let Some(meta) = object.get_mut("metadata") {
        put(meta, "labels", || json!({}));
        if let Some(Value::Object(labels)) = meta.get_mut("labels") {
            labels.insert("kubernetes.io/metadata.name".into(), Value::String(name));
        }
    }
    put(object, "spec", || json!({}));
    // Namespaces on their way out have had theirs taken away on purpose.
    if object.pointer("/metadata/deletionTimestamp").is_none() {
        in_spec(object, &[("finalizers", json!(["kubernetes"]))]);
    }
}

fn secret(object: &mut Value) {
    let Value::Object(map) = object else { return };
    if map.get("type").and_then(Value::as_str).unwrap_or_default().is_empty() {
        map.insert("type".into(), json!("Opaque"));
    }
    let Some(Value::Object(plain)) = map.get("stringData") else { return };
    // A value that is no string is left where it is, for validation to name.
    if plain.values().any(|v| !v.is_string()) {
        return;
    }
    let coded: Vec<(String, Value)> = plain
        .iter()
        .filter_map(|(k, v)| Some((k.clone(), json!(base64::engine::general_purpose::STANDARD.encode(v.as_str()?)))))
        .collect();
    map.remove("stringData");
    if let Value::Object(data) = map.entry("data").or_insert_with(|| json!({})) {
        data.extend(coded);
    }
}

fn service(object: &mut Value) {
    in_spec(
        object,
        &[
            ("type", json!("ClusterIP")),
            ("sessionAffinity", json!("None")),
            ("internalTrafficPolicy", json!("Cluster")),
        ],
    );
    for port in object.get_mut("spec").into_iter().flat_map(|spec| each(spec, "ports")) {
        put(port, "protocol", || json!("TCP"));
        if let Some(number) = port.get("port").cloned() {
            put(port, "targetPort", || number);
        }
    }
}

fn workload(kind: &str, object: &mut Value) {
    let quarter = json!("25%");
    let (update, own) = match kind {
        "Deployment" => ("strategy", vec![("replicas", json!(1)), ("progressDeadlineSeconds", json!(600))]),
        _ => ("updateStrategy", Vec::new()),
    };
    in_spec(object, &own);
    in_spec(object, &[("revisionHistoryLimit", json!(10)), (update, json!({}))]);
    let Some(spec) = object.get_mut("spec") else { return };
    if let Some(update) = spec.get_mut(update) {
        put(update, "type", || json!("RollingUpdate"));
        if update["type"] == "RollingUpdate" {
            put(update, "rollingUpdate", || json!({}));
            let (surge, unavailable) =
                if kind == "Deployment" { (quarter.clone(), quarter) } else { (json!(0), json!(1)) };
            if let Some(rolling) = update.get_mut("rollingUpdate") {
                put_all(rolling, &[("maxSurge", surge), ("maxUnavailable", unavailable)]);
            }
        }
    }
    spec.pointer_mut("/template/spec").into_iter().for_each(pod_spec);
}

fn binding(object: &mut Value) {
    const GROUP: &str = "rbac.authorization.k8s.io";
    if let Some(role) = object.get_mut("roleRef") {
        put(role, "apiGroup", || json!(GROUP));
    }
    for subject in each(object, "subjects") {
        if matches!(subject.get("kind").and_then(Value::as_str), Some("User" | "Group")) {
            put(subject, "apiGroup", || json!(GROUP));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(kind: &str) -> Resource {
        super::super::resources().into_iter().find(|r| r.kind == kind).unwrap()
    }

    #[test]
    fn a_pod_gets_kubernetes_defaults_once() {
        let pod = resource("Pod");
        let mut object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": null},
            "spec": {"containers": [{"name": "c", "image": "a/b:1", "ports": [{"containerPort": 80}],
                "resources": {"limits": {"cpu": "0.5", "memory": 1048576}}}],
                "volumes": [{"name": "v"}, {"name": "s", "secret": {"secretName": "x"}}]}});
        set_defaults(&pod, &mut object);
        assert_eq!(object["spec"]["restartPolicy"], "Always");
        assert_eq!(object["spec"]["terminationGracePeriodSeconds"], 30);
        let c = &object["spec"]["containers"][0];
        assert_eq!(c["imagePullPolicy"], "IfNotPresent");
        assert_eq!(c["ports"][0]["protocol"], "TCP");
        assert_eq!(c["resources"]["requests"], json!({"cpu": "500m", "memory": "1048576"}));
        assert_eq!(object["spec"]["volumes"][0], json!({"name": "v", "emptyDir": {}}));
        assert_eq!(object["spec"]["volumes"][1]["secret"]["defaultMode"], 420);
        assert!(object["metadata"].get("labels").is_none());
        assert_eq!(qos_class(&object), "Guaranteed");
        let once = object.clone();
        set_defaults(&pod, &mut object);
        assert_eq!(object, once);
    }

    #[test]
    fn a_deployment_gets_kubernetes_defaults() {
        let deployment = resource("Deployment");
        let template =
            json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "a/b:1"}]}});
        let selector = json!({"matchLabels": {"a": "b"}});
        let mut object = json!({"metadata": {"name": "d"}, "spec": {"selector": selector, "template": template}});
        set_defaults(&deployment, &mut object);
        let spec = &object["spec"];
        assert_eq!((&spec["replicas"], &spec["revisionHistoryLimit"]), (&json!(1), &json!(10)));
        let rolling = json!({"maxSurge": "25%", "maxUnavailable": "25%"});
        assert_eq!(spec["strategy"], json!({"type": "RollingUpdate", "rollingUpdate": rolling}));
        assert_eq!(spec["template"]["spec"]["restartPolicy"], "Always");
        let mut recreated = json!({"metadata": {"name": "d"}, "spec": {"strategy": {"type": "Recreate"}}});
        set_defaults(&deployment, &mut recreated);
        assert_eq!(recreated["spec"]["strategy"], json!({"type": "Recreate"}));
        let mut daemons = json!({"metadata": {"name": "d"}, "spec": {"selector": {}, "template": {}}});
        set_defaults(&resource("DaemonSet"), &mut daemons);
        assert_eq!(daemons["spec"]["updateStrategy"]["rollingUpdate"], json!({"maxSurge": 0, "maxUnavailable": 1}));
    }

    #[test]
    fn images_that_move_are_always_pulled() {
        for (image, policy) in [
            ("nginx", "Always"),
            ("nginx:latest", "Always"),
            ("host:5000/nginx", "Always"),
            ("host:5000/nginx:1", "IfNotPresent"),
            ("nginx@sha256:00", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), policy, "{image}");
        }
    }

    #[test]
    fn secrets_are_coded_and_namespaces_labelled() {
        let mut secret = json!({"metadata": {"name": "s"}, "stringData": {"a": "b"}, "data": {"c": "ZA=="}});
        set_defaults(&resource("Secret"), &mut secret);
        assert_eq!(secret["data"], json!({"a": "Yg==", "c": "ZA=="}));
        assert_eq!(secret["type"], "Opaque");
        let mut ns = json!({"metadata": {"name": "n"}});
        set_defaults(&resource("Namespace"), &mut ns);
        assert_eq!(ns["metadata"]["labels"]["kubernetes.io/metadata.name"], "n");
        assert_eq!(ns["spec"]["finalizers"], json!(["kubernetes"]));
    }
}
