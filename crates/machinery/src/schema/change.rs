//! What the server changes in an object before it is validated and stored: unknown members out, defaults in.

use super::Schema;
use serde_json::{Map, Value};

/// Removes every member that the schema does not know (custom resources; Kubernetes calls it pruning). In the metadata of
/// objects, nulls go as well: many tools write `creationTimestamp: null`.
pub fn prune(schema: &Schema, value: &mut Value) {
    match value {
        Value::Object(map) => {
            if schema.object_root
                && let (Some(known), Some(metadata)) = (schema.properties.get("metadata"), map.get_mut("metadata"))
            {
                drop_nulls(known, metadata);
            }
            if !schema.preserve_unknown && schema.additional.is_none() {
                map.retain(|name, _| schema.properties.contains_key(name));
            }
            for (name, member) in map.iter_mut() {
                if let Some(known) = schema.member(name) {
                    prune(known, member);
                }
            }
        }
        Value::Array(items) => {
            if let Some(known) = &schema.items {
                items.iter_mut().for_each(|item| prune(known, item));
            }
        }
        _ => {}
    }
}

/// What strict field validation complains about, in Kubernetes' words: `unknown field "spec.foo[0].bar"`.
pub fn unknown_fields(schema: &Schema, value: &Value) -> Vec<String> {
    let mut out = Vec::new();
    collect_unknown(schema, value, &mut String::new(), &mut out);
    out
}

fn collect_unknown(schema: &Schema, value: &Value, path: &mut String, out: &mut Vec<String>) {
    let len = path.len();
    match value {
        Value::Object(map) => {
            for (name, member) in map {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(name);
                match schema.member(name) {
                    Some(known) => collect_unknown(known, member, path, out),
                    // A scalar schema with an object value is a type error, which validation reports better.
                    None if schema.preserve_unknown || schema.int_or_string => {}
                    None if !matches!(schema.ty, None | Some(super::Type::Object)) => {}
                    None => out.push(format!("unknown field \"{path}\"")),
                }
                path.truncate(len);
            }
        }
        Value::Array(items) => {
            if let Some(known) = &schema.items {
                for (index, item) in items.iter().enumerate() {
                    path.push_str(&format!("[{index}]"));
                    collect_unknown(known, item, path, out);
                    path.truncate(len);
                }
            }
        }
        _ => {}
    }
}

/// Sets absent members (and nulls that may not be null) to their defaults, at every depth.
pub fn apply_defaults(schema: &Schema, value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (name, known) in &schema.properties {
                let Some(default) = &known.default else { continue };
                let missing = match map.get(name) {
                    None => true,
                    Some(Value::Null) => !known.nullable,
                    Some(_) => false,
                };
                if missing {
                    map.insert(name.clone(), default.clone());
                }
            }
            for (name, member) in map.iter_mut() {
                if let Some(known) = schema.member(name) {
                    apply_defaults(known, member);
                }
            }
        }
        Value::Array(items) => {
            if let Some(known) = &schema.items {
                items.iter_mut().for_each(|item| apply_defaults(known, item));
            }
        }
        _ => {}
    }
}

/// Removes null members, which mean "absent" in built-in kinds (their server decodes into structs). Nulls under
/// members of unknown shape stay.
pub fn drop_nulls(schema: &Schema, value: &mut Value) {
    match value {
        Value::Object(map) => {
            if !schema.properties.is_empty() {
                let nulls: Vec<String> = nulls_of(schema, map);
                nulls.iter().for_each(|name| {
                    map.remove(name);
                });
            }
            for (name, member) in map.iter_mut() {
                if let Some(known) = schema.member(name) {
                    drop_nulls(known, member);
                }
            }
        }
        Value::Array(items) => {
            if let Some(known) = &schema.items {
                items.iter_mut().for_each(|item| drop_nulls(known, item));
            }
        }
        _ => {}
    }
}

fn nulls_of(schema: &Schema, map: &Map<String, Value>) -> Vec<String> {
    map.iter()
        .filter(|(name, v)| v.is_null() && schema.properties.get(*name).is_some_and(|known| !known.nullable))
        .map(|(name, _)| name.clone())
        .collect()
}
