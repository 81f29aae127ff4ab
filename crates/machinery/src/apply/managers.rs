//! `metadata.managedFields`: who owns which fields.

use super::Writer;
use super::fields::FieldSet;
use crate::meta;
use serde_json::{Map, Value, json};

/// More ordinary writers than this are put together under one name, oldest first.
const MAX_UPDATERS: usize = 10;
const ANCIENT: &str = "ancient-changes";

/// How a manager came to own its fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Operation {
    Apply,
    Update,
}

impl Operation {
    fn as_str(self) -> &'static str {
        match self {
            Operation::Apply => "Apply",
            Operation::Update => "Update",
        }
    }
}

/// One entry of `managedFields`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub manager: String,
    pub operation: Operation,
    pub api_version: String,
    pub subresource: String,
    /// RFC 3339, empty if unknown.
    pub time: String,
    pub fields: FieldSet,
}

impl Entry {
    pub(super) fn new(writer: &Writer<'_>, operation: Operation, fields: FieldSet) -> Entry {
        Entry {
            manager: writer.manager.to_owned(),
            operation,
            api_version: writer.api_version.to_owned(),
            subresource: writer.subresource.to_owned(),
            time: meta::time(writer.now),
            fields,
        }
    }

    /// The same owner; appliers are the same across versions.
    pub(super) fn is_same(&self, other: &Entry) -> bool {
        self.manager == other.manager
            && self.operation == other.operation
            && self.subresource == other.subresource
            && (self.operation == Operation::Apply || self.api_version == other.api_version)
    }

    /// `"kubectl-edit" using v1 at 2026-01-01T00:00:00Z`
    pub(super) fn describe(&self) -> String {
        let mut text = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            text.push_str(&format!(" with subresource {:?}", self.subresource));
        }
        if self.operation == Operation::Update {
            text.push_str(&format!(" using {}", self.api_version));
            if !self.time.is_empty() {
                text.push_str(&format!(" at {}", self.time));
            }
        }
        text
    }

    fn read(value: &Value) -> Option<Entry> {
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let operation = match text("operation").as_str() {
            "Apply" => Operation::Apply,
            "Update" => Operation::Update,
            _ => return None,
        };
        let fields = match value.get("fieldsV1") {
            None | Some(Value::Null) => FieldSet::default(),
            Some(fields) => FieldSet::from_fields_v1(fields)?,
        };
        Some(Entry {
            manager: text("manager"),
            operation,
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: text("time"),
            fields,
        })
    }

    fn write(&self) -> Value {
        let mut entry = Map::new();
        let mut put = |key: &str, value: &str| {
            if !value.is_empty() {
                entry.insert(key.to_owned(), value.into());
            }
        };
        put("manager", &self.manager);
        put("operation", self.operation.as_str());
        put("apiVersion", &self.api_version);
        put("time", &self.time);
        put("fieldsType", "FieldsV1");
        put("subresource", &self.subresource);
        entry.insert("fieldsV1".to_owned(), self.fields.to_fields_v1());
        Value::Object(entry)
    }
}

/// The entries of an object; `None` if it has none or they cannot be read.
pub(super) fn read(object: &Value) -> Option<Vec<Entry>> {
    let list = object.get("metadata")?.get("managedFields")?.as_array()?;
    if list.is_empty() {
        return None;
    }
    list.iter().map(Entry::read).collect()
}

/// A client asks to start over: the first entry is `{}`.
pub(super) fn is_reset(object: &Value) -> bool {
    object.pointer("/metadata/managedFields/0").and_then(Value::as_object).is_some_and(Map::is_empty)
}

/// Writes the entries into an object, in Kubernetes' order.
pub(super) fn write(object: &mut Value, mut entries: Vec<Entry>) {
    entries.retain(|entry| !entry.fields.is_empty());
    let order =
        |e: &Entry| (e.operation, e.time.clone(), e.manager.clone(), e.api_version.clone(), e.subresource.clone());
    entries.sort_by_key(order);
    cap(&mut entries);
    let list: Vec<Value> = entries.iter().map(Entry::write).collect();
    meta::set(object, "managedFields", (!list.is_empty()).then(|| json!(list)));
}

fn cap(entries: &mut Vec<Entry>) {
    let updaters = entries.iter().filter(|e| e.operation == Operation::Update).count();
    let Some(surplus) = updaters.checked_sub(MAX_UPDATERS).filter(|n| *n > 0) else { return };
    // Sorted by time: the oldest updaters come first. One more goes, because the bucket itself takes a place.
    let mut bucket: Option<Entry> = None;
    let mut left = surplus + 1;
    entries.retain(|entry| {
        if entry.operation != Operation::Update || left == 0 {
            return true;
        }
        left -= 1;
        match &mut bucket {
            Some(bucket) => {
                bucket.fields = std::mem::take(&mut bucket.fields).union(&entry.fields);
                bucket.time = entry.time.clone();
            }
            None => bucket = Some(Entry { manager: ANCIENT.to_owned(), subresource: String::new(), ..entry.clone() }),
        }
        false
    });
    if let Some(bucket) = bucket {
        let at = entries.iter().position(|e| e.operation == Operation::Update).unwrap_or(entries.len());
        entries.insert(at, bucket);
    }
}
