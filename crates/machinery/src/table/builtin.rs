//! Columns of Kubernetes' own kinds.

use super::{Heading, age, at, condition, count, heading, items, or_none, pod, text, wide};
use crate::duration;
use crate::meta;
use jiff::Timestamp;
use serde_json::{Value, json};

/// Kinds with columns of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Namespace,
    Node,
    Pod,
    Event,
    ConfigMap,
    Secret,
    ServiceAccount,
    Claim,
    Volume,
    StorageClass,
    Lease,
    DisruptionBudget,
    ResourceQuota,
    Role,
    Binding,
    Definition,
    /// Name and Age.
    Other,
}

const NAME: Heading = heading("Name", "string");
const AGE: Heading = heading("Age", "string");

const NAMESPACE: &[Heading] = &[NAME, heading("Status", "string"), AGE];
const NODE: &[Heading] = &[
    NAME,
    heading("Status", "string"),
    heading("Roles", "string"),
    AGE,
    heading("Version", "string"),
    wide("Internal-IP", "string"),
    wide("External-IP", "string"),
    wide("OS-Image", "string"),
    wide("Kernel-Version", "string"),
    wide("Container-Runtime", "string"),
];
const POD: &[Heading] = &[
    NAME,
    heading("Ready", "string"),
    heading("Status", "string"),
    heading("Restarts", "string"),
    AGE,
    wide("IP", "string"),
    wide("Node", "string"),
    wide("Nominated Node", "string"),
    wide("Readiness Gates", "string"),
];
const EVENT: &[Heading] = &[
    heading("Last Seen", "string"),
    heading("Type", "string"),
    heading("Reason", "string"),
    heading("Object", "string"),
    wide("Subobject", "string"),
    wide("Source", "string"),
    heading("Message", "string"),
    wide("First Seen", "string"),
    wide("Count", "string"),
    wide("Name", "string"),
];
const CONFIG_MAP: &[Heading] = &[NAME, heading("Data", "string"), AGE];
const SECRET: &[Heading] = &[NAME, heading("Type", "string"), heading("Data", "string"), AGE];
const SERVICE_ACCOUNT: &[Heading] = &[NAME, heading("Secrets", "string"), AGE];
const CLAIM: &[Heading] = &[
    NAME,
    heading("Status", "string"),
    heading("Volume", "string"),
    heading("Capacity", "string"),
    heading("Access Modes", "string"),
    heading("StorageClass", "string"),
    heading("VolumeAttributesClass", "string"),
    AGE,
    wide("VolumeMode", "string"),
];
const VOLUME: &[Heading] = &[
    NAME,
    heading("Capacity", "string"),
    heading("Access Modes", "string"),
    heading("Reclaim Policy", "string"),
    heading("Status", "string"),
    heading("Claim", "string"),
    heading("StorageClass", "string"),
    heading("VolumeAttributesClass", "string"),
    heading("Reason", "string"),
    AGE,
    wide("VolumeMode", "string"),
];
const STORAGE_CLASS: &[Heading] = &[
    NAME,
    heading("Provisioner", "string"),
    heading("ReclaimPolicy", "string"),
    heading("VolumeBindingMode", "string"),
    heading("AllowVolumeExpansion", "string"),
    AGE,
];
const LEASE: &[Heading] = &[NAME, heading("Holder", "string"), AGE];
const DISRUPTION_BUDGET: &[Heading] = &[
    NAME,
    heading("Min Available", "string"),
    heading("Max Unavailable", "string"),
    heading("Allowed Disruptions", "integer"),
    AGE,
];
const RESOURCE_QUOTA: &[Heading] = &[NAME, heading("Request", "string"), heading("Limit", "string"), AGE];
const CREATED: &[Heading] = &[NAME, heading("Created At", "date")];
const BINDING: &[Heading] = &[
    NAME,
    heading("Role", "string"),
    AGE,
    wide("Users", "string"),
    wide("Groups", "string"),
    wide("ServiceAccounts", "string"),
];
const OTHER: &[Heading] = &[NAME, AGE];

impl Kind {
    pub(super) fn of(group: &str, kind: &str) -> Kind {
        match (group, kind) {
            ("", "Namespace") => Kind::Namespace,
            ("", "Node") => Kind::Node,
            ("", "Pod") => Kind::Pod,
            ("" | "events.k8s.io", "Event") => Kind::Event,
            ("", "ConfigMap") => Kind::ConfigMap,
            ("", "Secret") => Kind::Secret,
            ("", "ServiceAccount") => Kind::ServiceAccount,
            ("", "PersistentVolumeClaim") => Kind::Claim,
            ("", "PersistentVolume") => Kind::Volume,
            ("storage.k8s.io", "StorageClass") => Kind::StorageClass,
            ("coordination.k8s.io", "Lease") => Kind::Lease,
            ("", "ResourceQuota") => Kind::ResourceQuota,
            ("policy", "PodDisruptionBudget") => Kind::DisruptionBudget,
            ("rbac.authorization.k8s.io", "Role" | "ClusterRole") => Kind::Role,
            ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => Kind::Binding,
            ("apiextensions.k8s.io", "CustomResourceDefinition") => Kind::Definition,
            _ => Kind::Other,
        }
    }

    pub(super) fn headings(self) -> &'static [Heading] {
        match self {
            Kind::Namespace => NAMESPACE,
            Kind::Node => NODE,
            Kind::Pod => POD,
            Kind::Event => EVENT,
            Kind::ConfigMap => CONFIG_MAP,
            Kind::Secret => SECRET,
            Kind::ServiceAccount => SERVICE_ACCOUNT,
            Kind::Claim => CLAIM,
            Kind::Volume => VOLUME,
            Kind::StorageClass => STORAGE_CLASS,
            Kind::Lease => LEASE,
            Kind::DisruptionBudget => DISRUPTION_BUDGET,
            Kind::ResourceQuota => RESOURCE_QUOTA,
            Kind::Role | Kind::Definition => CREATED,
            Kind::Binding => BINDING,
            Kind::Other => OTHER,
        }
    }

    pub(super) fn cells(self, o: &Value, now: Timestamp) -> Vec<Value> {
        let name = Value::from(meta::name(o));
        let age = age(o, now);
        let string = |path: &str| Value::from(text(o, path).unwrap_or_default());
        match self {
            Kind::Namespace => vec![name, string("status.phase"), age],
            Kind::Node => vec![
                name,
                node_status(o).into(),
                node_roles(o).into(),
                age,
                string("status.nodeInfo.kubeletVersion"),
                node_address(o, "InternalIP"),
                node_address(o, "ExternalIP"),
                known(o, "status.nodeInfo.osImage"),
                known(o, "status.nodeInfo.kernelVersion"),
                known(o, "status.nodeInfo.containerRuntimeVersion"),
            ],
            Kind::Pod => pod::cells(o, now),
            Kind::Event => event(o, now),
            Kind::ConfigMap => vec![name, (count(o, "data") + count(o, "binaryData")).into(), age],
            Kind::Secret => vec![name, string("type"), count(o, "data").into(), age],
            Kind::ServiceAccount => vec![name, count(o, "secrets").into(), age],
            Kind::Claim => claim(o, name, age),
            Kind::Volume => vec![
                name,
                string("spec.capacity.storage"),
                access_modes(o, "spec.accessModes"),
                string("spec.persistentVolumeReclaimPolicy"),
                phase(o),
                match (text(o, "spec.claimRef.namespace"), text(o, "spec.claimRef.name")) {
                    (ns, Some(claim)) => format!("{}/{claim}", ns.unwrap_or_default()).into(),
                    _ => "".into(),
                },
                string("spec.storageClassName"),
                text(o, "spec.volumeAttributesClassName").unwrap_or("<unset>").into(),
                string("status.reason"),
                age,
                text(o, "spec.volumeMode").unwrap_or("<unset>").into(),
            ],
            Kind::StorageClass => vec![
                if meta::annotation(o, "storageclass.kubernetes.io/is-default-class") == Some("true") {
                    format!("{} (default)", meta::name(o)).into()
                } else {
                    name
                },
                string("provisioner"),
                text(o, "reclaimPolicy").unwrap_or("Delete").into(),
                text(o, "volumeBindingMode").unwrap_or("Immediate").into(),
                at(o, "allowVolumeExpansion").and_then(Value::as_bool).unwrap_or(false).into(),
                age,
            ],
            Kind::Lease => vec![name, string("spec.holderIdentity"), age],
            Kind::DisruptionBudget => vec![
                name,
                amount(o, "spec.minAvailable"),
                amount(o, "spec.maxUnavailable"),
                at(o, "status.disruptionsAllowed").and_then(Value::as_i64).unwrap_or_default().into(),
                age,
            ],
            Kind::ResourceQuota => quota(o, name, age),
            Kind::Role | Kind::Definition => vec![name, string("metadata.creationTimestamp")],
            Kind::Binding => binding(o, name, age),
            Kind::Other => vec![name, age],
        }
    }
}

fn known(object: &Value, path: &str) -> Value {
    text(object, path).unwrap_or("<unknown>").into()
}

/// A number or percentage, or N/A.
fn amount(object: &Value, path: &str) -> Value {
    match at(object, path) {
        Some(Value::String(text)) => text.as_str().into(),
        Some(Value::Number(number)) => number.to_string().into(),
        _ => "N/A".into(),
    }
}

fn phase(object: &Value) -> Value {
    if meta::is_deleting(object) {
        "Terminating".into()
    } else {
        text(object, "status.phase").unwrap_or_default().into()
    }
}

fn node_status(node: &Value) -> String {
    let ready = match condition(node, "Ready").and_then(|c| text(c, "status")) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    };
    if at(node, "spec.unschedulable").and_then(Value::as_bool) == Some(true) {
        format!("{ready},SchedulingDisabled")
    } else {
        ready.to_owned()
    }
}

fn node_roles(node: &Value) -> String {
    let mut roles: Vec<&str> = Vec::new();
    for (key, value) in meta::labels(node).into_iter().flatten() {
        if let Some(role) = key.strip_prefix("node-role.kubernetes.io/").filter(|r| !r.is_empty()) {
            roles.push(role);
        } else if key == "kubernetes.io/role" {
            roles.extend(value.as_str().filter(|r| !r.is_empty()));
        }
    }
    roles.sort_unstable();
    roles.dedup();
    if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") }
}

fn node_address(node: &Value, ty: &str) -> Value {
    items(node, "status.addresses")
        .iter()
        .find(|a| text(a, "type") == Some(ty))
        .map_or_else(|| "<none>".into(), |a| or_none(a, "address"))
}

fn access_modes(object: &Value, path: &str) -> Value {
    let mut modes: Vec<&str> = Vec::new();
    for mode in items(object, path).iter().filter_map(Value::as_str) {
        let short = match mode {
            "ReadWriteOnce" => "RWO",
            "ReadOnlyMany" => "ROX",
            "ReadWriteMany" => "RWX",
            "ReadWriteOncePod" => "RWOP",
            other => other,
        };
        if !modes.contains(&short) {
            modes.push(short);
        }
    }
    modes.join(",").into()
}

fn claim(o: &Value, name: Value, age: Value) -> Vec<Value> {
    let bound = text(o, "spec.volumeName");
    vec![
        name,
        phase(o),
        bound.unwrap_or_default().into(),
        bound.and_then(|_| text(o, "status.capacity.storage")).unwrap_or_default().into(),
        if bound.is_some() { access_modes(o, "status.accessModes") } else { "".into() },
        text(o, "spec.storageClassName").unwrap_or_default().into(),
        text(o, "spec.volumeAttributesClassName").unwrap_or("<unset>").into(),
        age,
        text(o, "spec.volumeMode").unwrap_or("<unset>").into(),
    ]
}

/// `pods: 1/3, requests.cpu: 0/2`, limits in a cell of their own.
fn quota(o: &Value, name: Value, age: Value) -> Vec<Value> {
    let (mut requests, mut limits) = (Vec::new(), Vec::new());
    for (key, hard) in o.pointer("/status/hard").and_then(Value::as_object).into_iter().flatten() {
        let used = o.pointer("/status/used").and_then(|used| used.get(key));
        let plain = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or("0").to_owned();
        let cell = format!("{key}: {}/{}", plain(used), plain(Some(hard)));
        if key.starts_with("limits.") { limits.push(cell) } else { requests.push(cell) }
    }
    vec![name, requests.join(", ").into(), limits.join(", ").into(), age]
}

fn binding(o: &Value, name: Value, age: Value) -> Vec<Value> {
    let role =
        format!("{}/{}", text(o, "roleRef.kind").unwrap_or_default(), text(o, "roleRef.name").unwrap_or_default());
    let subjects = |kind: &str| -> Value {
        let names: Vec<String> = items(o, "subjects")
            .iter()
            .filter(|s| text(s, "kind") == Some(kind))
            .map(|s| {
                let name = text(s, "name").unwrap_or_default();
                if kind == "ServiceAccount" {
                    format!("{}/{name}", text(s, "namespace").unwrap_or_default())
                } else {
                    name.to_owned()
                }
            })
            .collect();
        names.join(", ").into()
    };
    vec![name, role.into(), age, subjects("User"), subjects("Group"), subjects("ServiceAccount")]
}

/// Events of either group; the older names of fields are looked at first.
fn event(o: &Value, now: Timestamp) -> Vec<Value> {
    let first = |paths: &[&str]| paths.iter().find_map(|p| text(o, p));
    let number = |paths: &[&str]| paths.iter().find_map(|p| at(o, p).and_then(Value::as_i64)).filter(|n| *n > 0);
    let began = first(&["firstTimestamp", "deprecatedFirstTimestamp", "eventTime"]);
    let seen = first(&["series.lastObservedTime", "lastTimestamp", "deprecatedLastTimestamp"]).or(began);
    let times = number(&["series.count", "count", "deprecatedCount"]).unwrap_or(1);
    let kind = first(&["involvedObject.kind", "regarding.kind"]).unwrap_or_default().to_lowercase();
    let target = match first(&["involvedObject.name", "regarding.name"]) {
        Some(name) => format!("{kind}/{name}"),
        None => kind,
    };
    let component =
        first(&["source.component", "deprecatedSource.component", "reportingComponent", "reportingController"]);
    let host = first(&["source.host", "deprecatedSource.host", "reportingInstance"]);
    let source: Vec<&str> = component.into_iter().chain(host).collect();
    let cell = |text: Option<&str>| json!(text.unwrap_or_default());
    vec![
        duration::age_of(seen, now).into(),
        cell(first(&["type"])),
        cell(first(&["reason"])),
        target.into(),
        cell(first(&["involvedObject.fieldPath", "regarding.fieldPath"])),
        source.join(", ").into(),
        cell(first(&["message", "note"]).map(str::trim)),
        duration::age_of(began, now).into(),
        times.into(),
        meta::name(o).into(),
    ]
}
