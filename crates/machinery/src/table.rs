//! `meta.k8s.io Table`: what `kubectl get` prints, made on the server.

mod builtin;
mod pod;

use crate::duration;
use crate::jsonpath::JsonPath;
use crate::meta;
use crate::resource::{Column, Columns, Resource};
use crate::status::Status;
use jiff::Timestamp;
use serde_json::{Value, json};

/// What each row carries besides its cells (`includeObject` in the query).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Include {
    /// The whole object.
    Object,
    /// Its metadata as PartialObjectMetadata.
    #[default]
    Metadata,
    /// Nothing.
    None,
}

impl Include {
    /// Reads the query parameter.
    ///
    /// # Errors
    /// 400 for an unknown value.
    pub fn parse(text: &str) -> Result<Include, Status> {
        match text {
            "" | "Metadata" => Ok(Include::Metadata),
            "Object" => Ok(Include::Object),
            "None" => Ok(Include::None),
            other => Err(Status::bad_request(format!("unrecognized includeObject value: {other:?}"))),
        }
    }
}

/// How a table is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options<'a> {
    /// What rows carry.
    pub include: Include,
    /// `v1` or `v1beta1` of `meta.k8s.io`.
    pub version: &'a str,
    /// Whether the columns are described; in a watch only the first table does.
    pub headers: bool,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Options { include: Include::default(), version: "v1", headers: true }
    }
}

/// One column of a built-in printer.
struct Heading {
    name: &'static str,
    ty: &'static str,
    priority: i32,
}

const fn heading(name: &'static str, ty: &'static str) -> Heading {
    Heading { name, ty, priority: 0 }
}

const fn wide(name: &'static str, ty: &'static str) -> Heading {
    Heading { name, ty, priority: 1 }
}

/// A table of objects. Its metadata is that of the only object, or empty: a list's own (resourceVersion, continue,
/// remainingItemCount) is the caller's to put in.
pub fn render(resource: &Resource, objects: &[&Value], options: Options<'_>, now: Timestamp) -> Value {
    let api_version = format!("meta.k8s.io/{}", options.version);
    let printer = Printer::of(resource);
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut row = json!({"cells": printer.cells(object, now)});
            match options.include {
                Include::Object => row["object"] = (*object).clone(),
                Include::Metadata => row["object"] = partial(object, options.version),
                Include::None => {}
            }
            row
        })
        .collect();
    let metadata = match objects {
        [one] if !meta::resource_version(one).is_empty() => json!({"resourceVersion": meta::resource_version(one)}),
        _ => json!({}),
    };
    json!({
        "kind": "Table",
        "apiVersion": api_version,
        "metadata": metadata,
        "columnDefinitions": if options.headers { printer.headings() } else { Value::Null },
        "rows": rows,
    })
}

/// `PartialObjectMetadata` of an object.
pub fn partial(object: &Value, version: &str) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({})),
    })
}

enum Printer<'a> {
    Builtin(builtin::Kind),
    Custom(Vec<(&'a Column, Option<JsonPath>)>),
}

impl<'a> Printer<'a> {
    fn of(resource: &'a Resource) -> Printer<'a> {
        match &resource.columns {
            Columns::Builtin => Printer::Builtin(builtin::Kind::of(&resource.gv.group, &resource.kind)),
            Columns::Custom(columns) if columns.is_empty() => Printer::Builtin(builtin::Kind::Other),
            Columns::Custom(columns) => {
                Printer::Custom(columns.iter().map(|c| (c, JsonPath::parse(&c.json_path).ok())).collect())
            }
        }
    }

    fn headings(&self) -> Value {
        match self {
            Printer::Builtin(kind) => kind
                .headings()
                .iter()
                .map(|h| {
                    let format = if h.name == "Name" { "name" } else { "" };
                    definition(h.name, h.ty, format, describe(h.name), h.priority)
                })
                .collect(),
            Printer::Custom(columns) => {
                let name = definition("Name", "string", "name", describe("Name"), 0);
                let others =
                    columns.iter().map(|(c, _)| definition(&c.name, &c.ty, &c.format, &c.description, c.priority));
                std::iter::once(name).chain(others).collect()
            }
        }
    }

    fn cells(&self, object: &Value, now: Timestamp) -> Vec<Value> {
        match self {
            Printer::Builtin(kind) => kind.cells(object, now),
            Printer::Custom(columns) => {
                let name = Value::from(meta::name(object));
                let others = columns.iter().map(|(column, path)| match path {
                    Some(path) => custom_cell(&column.ty, &path.find(object), now),
                    None => Value::Null,
                });
                std::iter::once(name).chain(others).collect()
            }
        }
    }
}

fn definition(name: &str, ty: &str, format: &str, description: &str, priority: i32) -> Value {
    json!({"name": name, "type": ty, "format": format, "description": description, "priority": priority})
}

fn describe(heading: &str) -> &'static str {
    match heading {
        "Name" => "Name of the object, unique within its namespace.",
        "Age" => "Time since the object was created.",
        "Created At" => "Time at which the object was created.",
        _ => "",
    }
}

/// A cell of a custom column; null when there is nothing or it is not of the column's type.
fn custom_cell(ty: &str, found: &[&Value], now: Timestamp) -> Value {
    let Some(first) = found.first() else { return Value::Null };
    match (ty, first) {
        (_, Value::Null) if found.len() == 1 => Value::Null,
        ("integer", Value::Number(n)) => match (n.as_i64(), n.as_f64()) {
            (Some(n), _) => n.into(),
            (None, Some(f)) => (f as i64).into(),
            _ => Value::Null,
        },
        ("number", Value::Number(_)) | ("boolean", Value::Bool(_)) => (*first).clone(),
        ("date", Value::String(time)) => duration::age_of(Some(time), now).into(),
        ("string", _) => {
            let texts: Vec<String> = found
                .iter()
                .map(|value| match value {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                })
                .collect();
            texts.join(" ").into()
        }
        _ => Value::Null,
    }
}

/// Cell of `metadata.creationTimestamp`.
fn age(object: &Value, now: Timestamp) -> Value {
    duration::age_of(text(object, "metadata.creationTimestamp"), now).into()
}

/// The value at a dotted path.
fn at<'v>(object: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.').try_fold(object, |value, key| value.get(key))
}

/// The text at a dotted path, if there is one and it is not empty.
fn text<'v>(object: &'v Value, path: &str) -> Option<&'v str> {
    at(object, path)?.as_str().filter(|t| !t.is_empty())
}

/// The text at a dotted path, or `<none>`.
fn or_none(object: &Value, path: &str) -> Value {
    text(object, path).unwrap_or("<none>").into()
}

/// Elements of the list at a dotted path.
fn items<'v>(object: &'v Value, path: &str) -> &'v [Value] {
    at(object, path).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// Members of the map, or elements of the list, at a dotted path.
fn count(object: &Value, path: &str) -> usize {
    match at(object, path) {
        Some(Value::Object(map)) => map.len(),
        Some(Value::Array(list)) => list.len(),
        _ => 0,
    }
}

/// Status of the condition of one type.
fn condition<'v>(object: &'v Value, ty: &str) -> Option<&'v Value> {
    items(object, "status.conditions").iter().find(|c| text(c, "type") == Some(ty))
}

#[cfg(test)]
mod tests;
