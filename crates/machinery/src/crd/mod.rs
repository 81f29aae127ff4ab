//! CustomResourceDefinitions: from the object that a user applied to served [`Resource`]s.

mod rules;
mod structural;

pub use rules::{validate_crd, warnings};

use crate::resource::{Column, Columns, GroupVersion, Resource};
use crate::schema::{Schema, Type};
use crate::status::Status;
use serde_json::{Value, json};
use std::sync::Arc;

const GROUP: &str = "apiextensions.k8s.io";

/// Every served version of the kind that a CRD defines, in the CRD's order.
///
/// # Errors
/// 422 Invalid with every cause, if the definition breaks a rule of [`validate_crd`].
pub fn resources_from_crd(crd: &Value) -> Result<Vec<Resource>, Status> {
    let causes = validate_crd(crd);
    if !causes.is_empty() {
        let name = crd.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        return Err(Status::invalid(GROUP, "CustomResourceDefinition", name, causes));
    }
    let group = text(crd, "/spec/group");
    let names = Names::of(crd);
    let versions = crd.pointer("/spec/versions").and_then(Value::as_array).into_iter().flatten();
    Ok(versions
        .filter(|version| version.get("served").and_then(Value::as_bool).unwrap_or(false))
        .map(|version| {
            let gv = GroupVersion { group: group.clone(), version: text(version, "/name") };
            Resource {
                deprecation_warning: deprecation(version, &gv, &names.kind),
                kind: names.kind.clone(),
                list_kind: names.list_kind.clone(),
                plural: names.plural.clone(),
                singular: names.singular.clone(),
                short_names: names.short_names.clone(),
                categories: names.categories.clone(),
                namespaced: text(crd, "/spec/scope") == "Namespaced",
                status_subresource: version.pointer("/subresources/status").is_some_and(Value::is_object),
                // `scale` is not served.
                subresources: Vec::new(),
                schema: Arc::new(root_schema(version.pointer("/schema/openAPIV3Schema").unwrap_or(&Value::Null))),
                columns: columns(version),
                builtin: false,
                virtual_create_only: false,
                actions_only: false,
                gettable: Vec::new(),
                storage: version.get("storage").and_then(Value::as_bool).unwrap_or(false),
                gv,
            }
        })
        .collect())
}

/// Fills in what a CRD may leave out: `listKind`, `singular`, and no conversion.
pub fn set_defaults(crd: &mut Value) {
    let names = Names::of(crd);
    let Some(Value::Object(spec)) = crd.get_mut("spec") else { return };
    spec.entry("conversion").or_insert_with(|| json!({"strategy": "None"}));
    if let Some(Value::Object(map)) = spec.get_mut("names")
        && !names.kind.is_empty()
    {
        map.entry("singular").or_insert_with(|| Value::String(names.singular));
        map.entry("listKind").or_insert_with(|| Value::String(names.list_kind));
    }
    for version in spec.get_mut("versions").and_then(Value::as_array_mut).into_iter().flatten() {
        // Absent means no, as in Go.
        if let Value::Object(version) = version {
            version.entry("served").or_insert(Value::Bool(false));
            version.entry("storage").or_insert(Value::Bool(false));
        }
    }
}

/// The CRD with the status of one whose names are accepted and which is served. Conditions that were already so keep their
/// `lastTransitionTime`. `now` is RFC 3339 with seconds, in UTC.
pub fn established_status(crd: &Value, now: &str) -> Value {
    let before = |kind: &str| {
        let list = crd.pointer("/status/conditions").and_then(Value::as_array)?;
        let same = |c: &&Value| c["type"] == kind && c["status"] == "True";
        list.iter().find(same).and_then(|c| c.get("lastTransitionTime")).cloned()
    };
    let condition = |kind: &str, reason: &str, message: &str| {
        let since = before(kind).unwrap_or_else(|| Value::from(now));
        json!({"lastTransitionTime": since, "message": message, "reason": reason, "status": "True", "type": kind})
    };
    let mut stored: Vec<Value> =
        crd.pointer("/status/storedVersions").and_then(Value::as_array).cloned().unwrap_or_default();
    let versions = crd.pointer("/spec/versions").and_then(Value::as_array);
    for version in versions.into_iter().flatten().filter(|v| v["storage"] == true) {
        if let Some(name) = version.get("name").filter(|name| !stored.contains(name)) {
            stored.push(name.clone());
        }
    }
    let mut out = crd.clone();
    if let Value::Object(map) = &mut out {
        let mut with_defaults = crd.clone();
        set_defaults(&mut with_defaults);
        map.insert(
            "status".into(),
            json!({
                "acceptedNames": with_defaults.pointer("/spec/names").cloned().unwrap_or_else(|| json!({})),
                "conditions": [
                    condition("NamesAccepted", "NoConflicts", "no conflicts found"),
                    condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
                ],
                "storedVersions": stored,
            }),
        );
    }
    out
}

/// The schema of a whole custom resource: the author's, with the members that every object has.
pub fn root_schema(raw: &Value) -> Schema {
    let mut schema = structural::parse(raw);
    schema.ty = Some(Type::Object);
    structural::make_object(&mut schema);
    schema
}

struct Names {
    kind: String,
    list_kind: String,
    plural: String,
    singular: String,
    short_names: Vec<String>,
    categories: Vec<String>,
}

impl Names {
    fn of(crd: &Value) -> Names {
        let kind = text(crd, "/spec/names/kind");
        let or = |given: String, default: String| if given.is_empty() { default } else { given };
        Names {
            list_kind: or(text(crd, "/spec/names/listKind"), format!("{kind}List")),
            singular: or(text(crd, "/spec/names/singular"), kind.to_lowercase()),
            plural: text(crd, "/spec/names/plural"),
            short_names: texts(crd, "/spec/names/shortNames"),
            categories: texts(crd, "/spec/names/categories"),
            kind,
        }
    }
}

fn columns(version: &Value) -> Columns {
    let entry = |column: &Value| Column {
        name: text(column, "/name"),
        ty: text(column, "/type"),
        format: text(column, "/format"),
        description: text(column, "/description"),
        priority: column
            .get("priority")
            .and_then(Value::as_i64)
            .and_then(|priority| i32::try_from(priority).ok())
            .unwrap_or(0),
        json_path: text(column, "/jsonPath"),
    };
    let given = version.get("additionalPrinterColumns").and_then(Value::as_array).filter(|list| !list.is_empty());
    match given {
        Some(list) => Columns::Custom(list.iter().map(entry).collect()),
        None => Columns::Custom(vec![Column {
            name: "Age".into(),
            ty: "date".into(),
            format: String::new(),
            description: String::new(),
            priority: 0,
            json_path: ".metadata.creationTimestamp".into(),
        }]),
    }
}

fn deprecation(version: &Value, gv: &GroupVersion, kind: &str) -> Option<String> {
    if !version.get("deprecated").and_then(Value::as_bool).unwrap_or(false) {
        return None;
    }
    let own = version.get("deprecationWarning").and_then(Value::as_str);
    Some(own.map_or_else(|| format!("{} {kind} is deprecated", gv.api_version()), str::to_owned))
}

fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn texts(value: &Value, pointer: &str) -> Vec<String> {
    let list = value.pointer(pointer).and_then(Value::as_array).into_iter().flatten();
    list.filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests;
