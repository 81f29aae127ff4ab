//! `openAPIV3Schema` to [`Schema`].

use crate::builtin;
use crate::schema::{ListType, Schema, Type};
use serde_json::Value;
use std::sync::Arc;

/// Reads a schema leniently: what breaks a rule was reported by `validate_crd`, and is not constrained here.
pub(super) fn parse(raw: &Value) -> Schema {
    let mut schema = Schema {
        description: text(raw, "description"),
        title: text(raw, "title"),
        ty: raw.get("type").and_then(Value::as_str).and_then(Type::parse),
        format: text(raw, "format"),
        additional: match raw.get("additionalProperties") {
            Some(Value::Bool(true)) => Some(Arc::new(Schema { preserve_unknown: true, ..Schema::default() })),
            Some(raw @ Value::Object(_)) => Some(Arc::new(parse(raw))),
            _ => None,
        },
        items: raw.get("items").filter(|r| r.is_object()).map(|raw| Arc::new(parse(raw))),
        required: list(raw, "required").filter_map(|v| v.as_str().map(str::to_owned)).collect(),
        enumeration: list(raw, "enum").cloned().collect(),
        default: raw.get("default").cloned(),
        nullable: flag(raw, "nullable"),
        pattern: text(raw, "pattern"),
        minimum: raw.get("minimum").and_then(Value::as_f64),
        maximum: raw.get("maximum").and_then(Value::as_f64),
        exclusive_minimum: flag(raw, "exclusiveMinimum"),
        exclusive_maximum: flag(raw, "exclusiveMaximum"),
        multiple_of: raw.get("multipleOf").and_then(Value::as_f64),
        min_length: count(raw, "minLength"),
        max_length: count(raw, "maxLength"),
        min_items: count(raw, "minItems"),
        max_items: count(raw, "maxItems"),
        min_properties: count(raw, "minProperties"),
        max_properties: count(raw, "maxProperties"),
        unique_items: flag(raw, "uniqueItems"),
        all_of: list(raw, "allOf").map(parse).collect(),
        any_of: list(raw, "anyOf").map(parse).collect(),
        one_of: list(raw, "oneOf").map(parse).collect(),
        not: raw.get("not").filter(|r| r.is_object()).map(|raw| Box::new(parse(raw))),
        int_or_string: flag(raw, "x-kubernetes-int-or-string"),
        preserve_unknown: flag(raw, "x-kubernetes-preserve-unknown-fields"),
        embedded_resource: flag(raw, "x-kubernetes-embedded-resource"),
        list_type: match raw.get("x-kubernetes-list-type").and_then(Value::as_str) {
            Some("set") => ListType::Set,
            Some("map") => ListType::Map,
            _ => ListType::Atomic,
        },
        list_map_keys: list(raw, "x-kubernetes-list-map-keys").filter_map(|v| v.as_str().map(str::to_owned)).collect(),
        atomic_map: raw.get("x-kubernetes-map-type").and_then(Value::as_str) == Some("atomic"),
        validations: list(raw, "x-kubernetes-validations").cloned().collect(),
        ..Schema::default()
    };
    if let Some(Value::Object(properties)) = raw.get("properties") {
        schema.properties = properties.iter().map(|(name, raw)| (name.clone(), Arc::new(parse(raw)))).collect();
    }
    if schema.int_or_string {
        // The usual `anyOf: [integer, string]` beside it says the same once more.
        schema.any_of.clear();
    }
    if schema.embedded_resource {
        make_object(&mut schema);
    }
    schema
}

/// Adds the members that every API object has; the author's own of these names give way.
pub(super) fn make_object(schema: &mut Schema) {
    let member = |description: &str| {
        Arc::new(Schema { description: Some(description.into()), ty: Some(Type::String), ..Schema::default() })
    };
    let version = "APIVersion defines the versioned schema of this representation of an object. Servers should convert \
                   recognized schemas to the latest internal value, and may reject unrecognized values. More info: \
                   https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#resources";
    let kind = "Kind is a string value representing the REST resource this object represents. Servers may infer this \
                from the endpoint the client submits requests to. Cannot be updated. In CamelCase. More info: \
                https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#types-kinds";
    schema.object_root = true;
    schema.properties.insert("apiVersion".into(), member(version));
    schema.properties.insert("kind".into(), member(kind));
    let mut metadata = Schema::clone(&builtin::object_meta());
    let info = "Standard object's metadata. More info: \
                https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#metadata";
    metadata.description = Some(info.into());
    schema.properties.insert("metadata".into(), Arc::new(metadata));
}

fn text(raw: &Value, key: &str) -> Option<String> {
    raw.get(key).and_then(Value::as_str).filter(|s| !s.is_empty()).map(str::to_owned)
}

fn flag(raw: &Value, key: &str) -> bool {
    raw.get(key).and_then(Value::as_bool).unwrap_or(false)
}

fn count(raw: &Value, key: &str) -> Option<u64> {
    raw.get(key).and_then(Value::as_u64)
}

fn list<'a>(raw: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    raw.get(key).and_then(Value::as_array).into_iter().flatten()
}
