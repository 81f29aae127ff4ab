//! CustomResourceDefinitions, generated from the types.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::maintenance::{self, medik8s::NodeMaintenance};
use crate::unimplemented::{Field, VM_FIELDS, VMI_FIELDS};
use crate::{
    KubeVirt, MigrationPolicy, MigrationRecord, NetworkAttachmentDefinition, VirtualMachine, VirtualMachineInstance,
    VirtualMachineInstanceMigration,
};

/// What a client of the old version is told.
const V1ALPHA3_WARNING: &str = "kubevirt.io/v1alpha3 is now deprecated and will be removed in a future release.";
/// The longest standstill that KubeVirt's schema lets through, in milliseconds.
const MAX_DOWNTIME_MS: u32 = 2_000_000;
/// Longest description in a schema; the rest of a Kubernetes type's prose is left out.
const MAX_DESCRIPTION: usize = 160;

/// A printer column: name, type, path, and whether it is only shown with `-o wide`.
struct Column(&'static str, &'static str, &'static str, bool);

const AGE: Column = Column("Age", "date", ".metadata.creationTimestamp", false);

struct Definition {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
    short_names: &'static [&'static str],
    categories: &'static [&'static str],
    columns: Vec<Column>,
    status_subresource: bool,
    versions: &'static [&'static str],
    schema: Value,
    cluster_scoped: bool,
}

const BOTH: &[&str] = &["v1", "v1alpha3"];

/// The manifests of every CustomResourceDefinition that godwit brings, ready to be created.
pub fn crds() -> Vec<Value> {
    let vmi = Definition {
        group: "kubevirt.io",
        kind: "VirtualMachineInstance",
        plural: "virtualmachineinstances",
        singular: "virtualmachineinstance",
        short_names: &["vmi", "vmis"],
        categories: &["all"],
        columns: vec![
            AGE,
            Column("Phase", "string", ".status.phase", false),
            Column("IP", "string", ".status.interfaces[0].ipAddress", false),
            Column("NodeName", "string", ".status.nodeName", false),
            Column("Ready", "string", ".status.conditions[?(@.type=='Ready')].status", false),
            Column("Live-Migratable", "string", ".status.conditions[?(@.type=='LiveMigratable')].status", true),
            Column("Paused", "string", ".status.conditions[?(@.type=='Paused')].status", true),
        ],
        status_subresource: false,
        versions: BOTH,
        schema: vmi_schema(),
        cluster_scoped: false,
    };
    let vm = Definition {
        group: "kubevirt.io",
        kind: "VirtualMachine",
        plural: "virtualmachines",
        singular: "virtualmachine",
        short_names: &["vm", "vms"],
        categories: &["all"],
        columns: vec![
            AGE,
            Column("Status", "string", ".status.printableStatus", false),
            Column("Ready", "string", ".status.conditions[?(@.type=='Ready')].status", false),
        ],
        status_subresource: true,
        versions: BOTH,
        schema: vm_schema(),
        cluster_scoped: false,
    };
    let vmim = Definition {
        group: "kubevirt.io",
        kind: "VirtualMachineInstanceMigration",
        plural: "virtualmachineinstancemigrations",
        singular: "virtualmachineinstancemigration",
        short_names: &["vmim", "vmims"],
        categories: &["all"],
        columns: vec![
            Column("Phase", "string", ".status.phase", false),
            Column("VMI", "string", ".spec.vmiName", false),
            // godwit's own, after KubeVirt's
            Column("Source", "string", ".status.migrationState.sourceNode", false),
            Column("Target", "string", ".status.migrationState.targetNode", false),
            Column("Progress", "string", ".status.progress", false),
            Column("Downtime", "string", ".status.downtime", false),
            AGE,
            Column("Reason", "string", ".status.reason", false),
            Column("Forecast", "string", ".status.forecast", true),
            Column("Queue", "integer", ".status.queue.position", true),
            Column("Message", "string", ".status.message", true),
        ],
        status_subresource: true,
        versions: BOTH,
        schema: vmim_schema(),
        cluster_scoped: false,
    };
    let kubevirt = Definition {
        group: "kubevirt.io",
        kind: "KubeVirt",
        plural: "kubevirts",
        singular: "kubevirt",
        short_names: &["kv", "kvs"],
        categories: &["all"],
        columns: vec![AGE, Column("Phase", "string", ".status.phase", false)],
        status_subresource: true,
        versions: BOTH,
        schema: kubevirt_schema(),
        cluster_scoped: false,
    };
    let nad = Definition {
        group: "k8s.cni.cncf.io",
        kind: "NetworkAttachmentDefinition",
        plural: "network-attachment-definitions",
        singular: "network-attachment-definition",
        short_names: &["net-attach-def"],
        categories: &[],
        columns: vec![AGE],
        status_subresource: false,
        versions: &["v1"],
        schema: schema_of::<NetworkAttachmentDefinition>(),
        cluster_scoped: false,
    };
    let policy = Definition {
        group: "migrations.kubevirt.io",
        kind: "MigrationPolicy",
        plural: "migrationpolicies",
        singular: "migrationpolicy",
        short_names: &[],
        categories: &["all"],
        columns: vec![],
        status_subresource: true,
        versions: &["v1alpha1"],
        schema: policy_schema(),
        cluster_scoped: true,
    };
    let record = Definition {
        group: "godwit.io",
        kind: "MigrationRecord",
        plural: "migrationrecords",
        singular: "migrationrecord",
        short_names: &["mrec"],
        categories: &[],
        columns: vec![
            Column("VMI", "string", ".spec.vmiName", false),
            Column("From", "string", ".spec.sourceNode", false),
            Column("To", "string", ".spec.targetNode", false),
            Column("Result", "string", ".spec.result", false),
            Column("Reason", "string", ".spec.reason", false),
            Column("Downtime", "string", ".spec.downtime", false),
            Column("Bytes", "string", ".spec.sent", false),
            Column("By", "string", ".spec.requestedBy", false),
            AGE,
            Column("Message", "string", ".spec.message", true),
        ],
        status_subresource: false,
        versions: &["v1alpha1"],
        schema: schema_of::<MigrationRecord>(),
        cluster_scoped: false,
    };
    let maintenances = maintenance::GROUPS.map(|(group, version)| maintenance_definition(group, version));
    [vmi, vm, vmim, kubevirt, nad, policy, record].into_iter().chain(maintenances).map(manifest).collect()
}

/// NodeMaintenance of one of its groups: without columns, so that `kubectl get` shows NAME and AGE.
fn maintenance_definition(group: &'static str, version: &'static str) -> Definition {
    let mut schema = schema_of::<NodeMaintenance>();
    require(&mut schema, "spec", &["nodeName"]);
    if let Some(action) = node(&mut schema, "spec.onDeadline") {
        set(action, "enum", json!(["Abort", "Continue"]));
    }
    if let Some(number) = node(&mut schema, "spec.maxParallel") {
        set(number, "minimum", json!(1));
    }
    Definition {
        group,
        kind: "NodeMaintenance",
        plural: "nodemaintenances",
        singular: "nodemaintenance",
        short_names: if group == maintenance::GROUP_MEDIK8S { &["nm"] } else { &[] },
        categories: &[],
        columns: vec![],
        status_subresource: true,
        versions: match version {
            "v1alpha1" => &["v1alpha1"],
            _ => &["v1beta1"],
        },
        schema,
        cluster_scoped: true,
    }
}

fn manifest(definition: Definition) -> Value {
    let versions: Vec<Value> = definition.versions.iter().map(|version| served(&definition, version)).collect();
    let mut names = json!({
        "kind": definition.kind,
        "listKind": format!("{}List", definition.kind),
        "plural": definition.plural,
        "singular": definition.singular,
        "shortNames": definition.short_names,
    });
    if !definition.categories.is_empty() {
        set(&mut names, "categories", json!(definition.categories));
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{}.{}", definition.plural, definition.group),
            "labels": { "app.kubernetes.io/managed-by": "godwit" },
        },
        "spec": {
            "group": definition.group,
            "scope": if definition.cluster_scoped { "Cluster" } else { "Namespaced" },
            "conversion": { "strategy": "None" },
            "names": names,
            "versions": versions,
        },
    })
}

fn served(definition: &Definition, version: &str) -> Value {
    let columns: Vec<Value> = definition
        .columns
        .iter()
        .map(|Column(name, type_, path, wide)| {
            let mut column = json!({ "name": name, "type": type_, "jsonPath": path });
            if *wide {
                set(&mut column, "priority", json!(1));
            }
            column
        })
        .collect();
    let mut out = json!({
        "name": version,
        "served": true,
        "storage": version != "v1alpha3",
        "additionalPrinterColumns": columns,
        "schema": { "openAPIV3Schema": definition.schema },
    });
    if version == "v1alpha3" {
        set(&mut out, "deprecated", json!(true));
        set(&mut out, "deprecationWarning", json!(V1ALPHA3_WARNING));
    }
    if definition.status_subresource {
        set(&mut out, "subresources", json!({ "status": {} }));
    }
    out
}

fn vmi_schema() -> Value {
    let mut schema = schema_of::<VirtualMachineInstance>();
    require(&mut schema, "", &["spec"]);
    complete_vmi_spec(&mut schema, "spec");
    schema
}

fn vm_schema() -> Value {
    let mut schema = schema_of::<VirtualMachine>();
    require(&mut schema, "", &["spec"]);
    require(&mut schema, "spec", &["template"]);
    if let Some(metadata) = node(&mut schema, "spec.template.metadata") {
        *metadata = json!({ "type": "object", "nullable": true, "x-kubernetes-preserve-unknown-fields": true });
    }
    complete_vmi_spec(&mut schema, "spec.template.spec");
    add_unimplemented(&mut schema, "spec", VM_FIELDS);
    schema
}

fn vmim_schema() -> Value {
    let mut schema = schema_of::<VirtualMachineInstanceMigration>();
    require(&mut schema, "", &["spec"]);
    if let Some(priority) = node(&mut schema, "spec.priority") {
        set(priority, "enum", json!(["system-critical", "user-triggered", "system-maintenance"]));
    }
    schema
}

fn policy_schema() -> Value {
    let mut schema = schema_of::<MigrationPolicy>();
    require(&mut schema, "", &["spec"]);
    if let Some(spec) = node(&mut schema, "spec") {
        // `experimental` is KubeVirt's alpha: kept, and said to be without effect
        set(spec, "x-kubernetes-preserve-unknown-fields", json!(true));
    }
    if let Some(number) = node(&mut schema, "spec.maxDowntimeMs") {
        set(number, "minimum", json!(1));
        set(number, "maximum", json!(MAX_DOWNTIME_MS));
    }
    schema
}

fn kubevirt_schema() -> Value {
    let mut schema = schema_of::<KubeVirt>();
    require(&mut schema, "", &["spec"]);
    // an installation's other settings are KubeVirt's operator's business: kept, without effect
    for path in
        ["spec", "spec.configuration", "spec.configuration.developerConfiguration", "spec.configuration.network"]
    {
        if let Some(open) = node(&mut schema, path) {
            set(open, "x-kubernetes-preserve-unknown-fields", json!(true));
        }
    }
    for path in ["spec.configuration.migrations", "spec.configuration.migrationConfiguration"] {
        for (field, least, most) in [
            ("parallelMigrationsPerCluster", 0, u32::MAX),
            ("parallelOutboundMigrationsPerNode", 0, u32::MAX),
            ("parallelInboundMigrationsPerNode", 0, u32::MAX),
            ("maxAttempts", 0, u32::MAX),
            ("maxDowntimeMs", 1, MAX_DOWNTIME_MS),
        ] {
            if let Some(number) = node(&mut schema, &format!("{path}.{field}")) {
                set(number, "minimum", json!(least));
                set(number, "maximum", json!(most));
            }
        }
    }
    schema
}

/// What KubeVirt requires of a VMI's spec, and the fields that it has and godwit has not.
fn complete_vmi_spec(schema: &mut Value, at: &str) {
    let parent = at.rsplit_once('.').map_or("", |(parent, _)| parent);
    require(schema, parent, &["spec"]);
    require(schema, at, &["domain"]);
    require(schema, &format!("{at}.domain"), &["devices"]);
    for list in ["domain.devices.disks[]", "domain.devices.interfaces[]", "networks[]", "volumes[]"] {
        require(schema, &format!("{at}.{list}"), &["name"]);
    }
    require(schema, &format!("{at}.domain.devices.interfaces[].ports[]"), &["port"]);
    require(schema, &format!("{at}.domain.firmware.kernelBoot.container"), &["image"]);
    require(schema, &format!("{at}.networks[].multus"), &["networkName"]);
    require(schema, &format!("{at}.volumes[].containerDisk"), &["image"]);
    require(schema, &format!("{at}.volumes[].emptyDisk"), &["capacity"]);
    require(schema, &format!("{at}.volumes[].persistentVolumeClaim"), &["claimName"]);
    add_unimplemented(schema, at, VMI_FIELDS);
}

fn add_unimplemented(schema: &mut Value, at: &str, fields: &[Field]) {
    for field in fields {
        let mut current = at.to_owned();
        let steps: Vec<&str> = field.path.split('.').collect();
        for (index, step) in steps.iter().enumerate() {
            let Some(parent) = node(schema, &current) else { break };
            let name = step.trim_end_matches("[]");
            let last = index + 1 == steps.len();
            let properties = entry(parent, "properties");
            if let Some(properties) = properties.as_object_mut() {
                properties.entry(name).or_insert_with(|| {
                    if last {
                        json!({
                            "description": "Not implemented by godwit.",
                            "x-kubernetes-preserve-unknown-fields": true,
                        })
                    } else if step.ends_with("[]") {
                        json!({ "type": "array", "items": { "type": "object" }, "x-kubernetes-list-type": "atomic" })
                    } else {
                        json!({ "type": "object" })
                    }
                });
            }
            current = format!("{current}.{step}");
        }
    }
}

/// The node of a schema at a path, `[]` going into the items of a list.
fn node<'a>(schema: &'a mut Value, path: &str) -> Option<&'a mut Value> {
    let mut at = schema;
    for step in path.split('.').filter(|step| !step.is_empty()) {
        let name = step.trim_end_matches("[]");
        at = at.get_mut("properties")?.get_mut(name)?;
        if step.ends_with("[]") {
            at = at.get_mut("items")?;
        }
    }
    Some(at)
}

fn require(schema: &mut Value, path: &str, fields: &[&str]) {
    if let Some(at) = node(schema, path) {
        set(at, "required", json!(fields));
    }
}

fn set(value: &mut Value, key: &str, to: Value) {
    if let Some(object) = value.as_object_mut() {
        object.insert(key.to_owned(), to);
    }
}

/// A member of an object, made as an empty object where it is missing.
fn entry<'a>(value: &'a mut Value, key: &str) -> &'a mut Value {
    if !value.is_object() {
        *value = json!({});
    }
    match value {
        Value::Object(object) => object.entry(key).or_insert_with(|| json!({})),
        other => other,
    }
}

/// The structural schema of a kind.
fn schema_of<T: JsonSchema>() -> Value {
    let mut settings = SchemaSettings::draft07();
    settings.inline_subschemas = true;
    settings.meta_schema = None;
    let schema = SchemaGenerator::new(settings).into_root_schema_for::<T>();
    let mut out = structural(&schema.to_value());
    // what the API machinery itself knows
    if let Some(properties) = out.get_mut("properties").and_then(Value::as_object_mut) {
        properties
            .insert("apiVersion".to_owned(), json!({ "type": "string", "description": "The version of the schema." }));
        properties.insert("kind".to_owned(), json!({ "type": "string", "description": "The kind of the object." }));
        properties.insert("metadata".to_owned(), json!({ "type": "object" }));
    }
    out
}

/// Turns a JSON schema into a structural one (Kubernetes' subset): no references, no alternatives, no defaults.
fn structural(schema: &Value) -> Value {
    let Some(object) = schema.as_object() else {
        // `true`: anything
        return json!({ "x-kubernetes-preserve-unknown-fields": true });
    };
    // an optional field: the one alternative that is not null
    let alternatives = object.get("anyOf").or_else(|| object.get("allOf")).and_then(Value::as_array);
    if let Some(inner) = alternatives.and_then(|all| all.iter().find(|one| one.get("type") != Some(&json!("null")))) {
        let mut out = structural(inner);
        if let Some(description) = object.get("description").and_then(Value::as_str) {
            set(&mut out, "description", json!(short(description)));
        }
        return out;
    }
    let mut out = Map::new();
    for (key, value) in object {
        match key.as_str() {
            "description" => {
                out.insert(key.clone(), json!(short(value.as_str().unwrap_or_default())));
            }
            "type" => {
                let type_ = match value {
                    Value::Array(types) => types.iter().find(|one| **one != json!("null")).cloned(),
                    other => Some(other.clone()),
                };
                out.extend(type_.map(|type_| (key.clone(), type_)));
            }
            "format" => {
                let format = match value.as_str().unwrap_or_default() {
                    "uint8" | "uint16" | "int8" | "int16" => "int32",
                    "uint32" | "uint64" | "uint" | "int" => "int64",
                    other => other,
                };
                out.insert(key.clone(), json!(format));
                if value == "uint32" {
                    out.insert("maximum".to_owned(), json!(u32::MAX));
                }
                if format == "date-time" {
                    // Go clients write null for a time that is not set
                    out.insert("nullable".to_owned(), json!(true));
                }
            }
            "properties" => {
                let properties = value.as_object().into_iter().flatten();
                let properties: Map<String, Value> =
                    properties.map(|(name, inner)| (name.clone(), structural(inner))).collect();
                out.insert(key.clone(), Value::Object(properties));
            }
            "items" => {
                out.insert(key.clone(), structural(value));
                out.entry("x-kubernetes-list-type").or_insert_with(|| json!("atomic"));
            }
            "additionalProperties" if value.is_object() => {
                out.insert(key.clone(), structural(value));
            }
            "required" | "enum" | "minimum" | "maximum" | "pattern" | "minLength" | "maxLength" => {
                out.insert(key.clone(), value.clone());
            }
            _ if key.starts_with("x-kubernetes-") => {
                out.insert(key.clone(), value.clone());
            }
            _ => {}
        }
    }
    Value::Object(out)
}

/// The first sentence of a description.
fn short(text: &str) -> String {
    let text = text.split("\n\n").next().unwrap_or_default().replace('\n', " ");
    // "e.g. " ends no sentence
    let end = text.match_indices(". ").map(|(at, _)| at + 1).find(|at| !text[..*at].ends_with(".g."));
    let sentence = text.get(..end.unwrap_or(text.len())).unwrap_or_default();
    sentence.chars().take(MAX_DESCRIPTION).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crd(kind: &str) -> Value {
        crds().into_iter().find(|crd| crd["spec"]["names"]["kind"] == kind).unwrap()
    }

    fn check(schema: &Value, at: &str) {
        let object = schema.as_object().unwrap();
        for forbidden in ["$ref", "anyOf", "oneOf", "allOf", "default", "$schema", "title", "definitions"] {
            assert!(!object.contains_key(forbidden), "{forbidden} at {at}");
        }
        let typed = object.get("type").is_some_and(Value::is_string);
        let free = ["x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"];
        assert!(typed || free.iter().any(|key| object.get(*key) == Some(&json!(true))), "no type at {at}: {schema}");
        if object.get("type") == Some(&json!("array")) {
            check(&schema["items"], &format!("{at}[]"));
        }
        if let Some(more) = object.get("additionalProperties") {
            assert!(!object.contains_key("properties"), "properties and additionalProperties at {at}");
            check(more, &format!("{at}.*"));
        }
        for (name, inner) in object.get("properties").and_then(Value::as_object).into_iter().flatten() {
            check(inner, &format!("{at}.{name}"));
        }
        for name in object.get("required").and_then(Value::as_array).into_iter().flatten() {
            assert!(schema["properties"].get(name.as_str().unwrap()).is_some(), "required {name} unknown at {at}");
        }
    }

    #[test]
    fn schemas_are_structural() {
        for crd in crds() {
            for version in crd["spec"]["versions"].as_array().unwrap() {
                check(&version["schema"]["openAPIV3Schema"], crd["metadata"]["name"].as_str().unwrap());
            }
        }
    }

    #[test]
    fn fields_have_their_types() {
        let crd = crd("VirtualMachineInstance");
        let mut schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
        let mut at = |path: &str| node(&mut schema, path).unwrap_or_else(|| panic!("{path}")).clone();
        assert_eq!(at("spec.domain.memory.guest")["x-kubernetes-int-or-string"], true);
        assert_eq!(at("spec.domain.cpu.cores")["type"], "integer");
        assert_eq!(at("spec.domain.resources.requests")["additionalProperties"]["x-kubernetes-int-or-string"], true);
        assert_eq!(at("spec.networks[].multus.default")["type"], "boolean");
        assert_eq!(at("spec.domain.devices.disks[]")["required"], json!(["name"]));
        assert_eq!(at("spec.domain.devices.sound")["x-kubernetes-preserve-unknown-fields"], true);
        assert_eq!(at("spec.domain.devices.disks[].shareable")["x-kubernetes-preserve-unknown-fields"], true);
        assert_eq!(at("spec.affinity.nodeAffinity")["type"], "object");
        assert_eq!(at("status.migrationState.startTimestamp")["format"], "date-time");
        assert_eq!(
            at("status.migrationState.targetDirectMigrationNodePorts")["additionalProperties"]["type"],
            "integer"
        );
        assert_eq!(at("status.migrationState.migrationConfiguration.completionTimeoutPerGiB")["type"], "integer");
        assert!(crd["spec"]["versions"][0].get("subresources").is_none());
    }

    #[test]
    fn every_unimplemented_field_is_in_the_schema() {
        let mut schema = vm_schema();
        for field in VMI_FIELDS {
            assert!(node(&mut schema, &format!("spec.template.spec.{}", field.path)).is_some(), "{}", field.path);
        }
        assert!(node(&mut schema, "spec.instancetype").is_some());
    }

    #[test]
    fn columns_and_versions_are_kubevirts() {
        let vmi = crd("VirtualMachineInstance");
        let names: Vec<&str> = vmi["spec"]["versions"][0]["additionalPrinterColumns"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|column| column["name"].as_str())
            .collect();
        assert_eq!(names, ["Age", "Phase", "IP", "NodeName", "Ready", "Live-Migratable", "Paused"]);
        let old = &vmi["spec"]["versions"][1];
        assert_eq!(
            (&old["name"], &old["storage"], &old["deprecated"]),
            (&json!("v1alpha3"), &json!(false), &json!(true))
        );
    }
}
