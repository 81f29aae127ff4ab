//! Reading and keeping `metadata` of objects held as values.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

fn field<'a>(object: &'a Value, key: &str) -> Option<&'a Value> {
    object.get("metadata")?.get(key)
}

fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    field(object, key).and_then(Value::as_str).unwrap_or_default()
}

/// `kind`, or empty.
pub fn kind(object: &Value) -> &str {
    object.get("kind").and_then(Value::as_str).unwrap_or_default()
}

/// `apiVersion`, or empty.
pub fn api_version(object: &Value) -> &str {
    object.get("apiVersion").and_then(Value::as_str).unwrap_or_default()
}

/// `metadata.name`, or empty.
pub fn name(object: &Value) -> &str {
    text(object, "name")
}

/// `metadata.generateName`, or empty.
pub fn generate_name(object: &Value) -> &str {
    text(object, "generateName")
}

/// `metadata.namespace`, or empty.
pub fn namespace(object: &Value) -> &str {
    text(object, "namespace")
}

/// `metadata.uid`, or empty.
pub fn uid(object: &Value) -> &str {
    text(object, "uid")
}

/// `metadata.resourceVersion`, or empty.
pub fn resource_version(object: &Value) -> &str {
    text(object, "resourceVersion")
}

/// `metadata.generation`, or 0.
pub fn generation(object: &Value) -> i64 {
    field(object, "generation").and_then(Value::as_i64).unwrap_or_default()
}

/// `metadata.labels`, if it is a map.
pub fn labels(object: &Value) -> Option<&Map<String, Value>> {
    field(object, "labels")?.as_object()
}

/// One label.
pub fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    labels(object)?.get(key)?.as_str()
}

/// One annotation.
pub fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    field(object, "annotations")?.get(key)?.as_str()
}

/// `metadata.finalizers`.
pub fn finalizers(object: &Value) -> Vec<&str> {
    field(object, "finalizers").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
}

/// `metadata.ownerReferences`.
pub fn owners(object: &Value) -> &[Value] {
    field(object, "ownerReferences").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// The owner reference with `controller: true`.
pub fn controller(object: &Value) -> Option<&Value> {
    owners(object).iter().find(|o| o.get("controller").and_then(Value::as_bool) == Some(true))
}

/// `metadata.creationTimestamp`.
pub fn creation_timestamp(object: &Value) -> Option<Timestamp> {
    text(object, "creationTimestamp").parse().ok()
}

/// `metadata.deletionTimestamp`: when the object is (or should be) gone.
pub fn deletion_timestamp(object: &Value) -> Option<Timestamp> {
    text(object, "deletionTimestamp").parse().ok()
}

/// Deletion has been asked for.
pub fn is_deleting(object: &Value) -> bool {
    !text(object, "deletionTimestamp").is_empty()
}

/// `meta/v1 Time`: RFC 3339 in whole seconds.
pub fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `meta/v1 MicroTime`: RFC 3339 with six digits after the point.
pub fn micro_time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// `metadata` for writing, made an object if it is missing or something else. Objects that are no maps are left alone
/// (`None`).
pub fn metadata_mut(object: &mut Value) -> Option<&mut Map<String, Value>> {
    let slot = object.as_object_mut()?.entry("metadata").or_insert_with(|| json!({}));
    if !slot.is_object() {
        *slot = json!({});
    }
    slot.as_object_mut()
}

/// Sets (or, with `None`, removes) one member of `metadata`.
pub fn set(object: &mut Value, key: &str, value: Option<Value>) {
    if let Some(metadata) = metadata_mut(object) {
        match value {
            Some(value) => {
                metadata.insert(key.to_owned(), value);
            }
            None => {
                metadata.remove(key);
            }
        }
    }
}

/// Sets `metadata.resourceVersion`.
pub fn set_resource_version(object: &mut Value, revision: u64) {
    set(object, "resourceVersion", Some(revision.to_string().into()));
}

/// Sets the finalizers; none removes the member.
pub fn set_finalizers(object: &mut Value, list: &[&str]) {
    set(object, "finalizers", (!list.is_empty()).then(|| json!(list)));
}

/// Gives a new object what only the server may give: uid, creation time, generation 1 (if the kind counts them), and
/// takes what a client may not set.
pub fn prepare_create(object: &mut Value, uid: &str, now: Timestamp, counts_generations: bool) {
    let Some(metadata) = metadata_mut(object) else { return };
    for key in ["resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"] {
        metadata.remove(key);
    }
    metadata.insert("uid".to_owned(), uid.into());
    metadata.insert("creationTimestamp".to_owned(), time(now).into());
    if counts_generations {
        metadata.insert("generation".to_owned(), 1.into());
    }
    drop_empty(metadata);
}

/// Empty or null maps and lists of metadata say nothing and are not stored.
fn drop_empty(metadata: &mut Map<String, Value>) {
    for key in ["labels", "annotations", "finalizers", "ownerReferences", "managedFields", "creationTimestamp"] {
        let empty = match metadata.get(key) {
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Null) => true,
            _ => false,
        };
        if empty {
            metadata.remove(key);
        }
    }
}

/// Which door a write came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// The object itself. With a status subresource, status stays as it was.
    Main {
        /// The kind has `/status`.
        status_separate: bool,
    },
    /// `/status`: only status (and managedFields) changes.
    Status,
}

/// Makes `new`, sent by a client, the successor of `old`: what only the server may set is kept from `old`, the part that
/// this door does not lead to is kept too, and the generation counts on if the specification changed.
pub fn prepare_update(old: &Value, new: &mut Value, door: Door, counts_generations: bool) {
    match door {
        Door::Status => {
            let status = new.get("status").cloned();
            let managed = field(new, "managedFields").cloned();
            let version = field(new, "resourceVersion").cloned();
            *new = old.clone();
            if let Some(object) = new.as_object_mut() {
                match status {
                    Some(status) => object.insert("status".to_owned(), status),
                    None => object.remove("status"),
                };
            }
            set(new, "managedFields", managed);
            set(new, "resourceVersion", version);
            return;
        }
        Door::Main { status_separate: true } => {
            if let Some(object) = new.as_object_mut() {
                match old.get("status") {
                    Some(status) => object.insert("status".to_owned(), status.clone()),
                    None => object.remove("status"),
                };
            }
        }
        Door::Main { status_separate: false } => {}
    }
    for key in ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "selfLink"]
    {
        set(new, key, field(old, key).cloned());
    }
    if let Some(metadata) = metadata_mut(new) {
        drop_empty(metadata);
    }
    if counts_generations {
        let separate = door == Door::Main { status_separate: true };
        let next = generation(old) + i64::from(specification_differs(old, new, separate));
        set(new, "generation", Some(next.max(1).into()));
    }
}

/// Anything but metadata (and, if it is separate, status) differs.
pub fn specification_differs(old: &Value, new: &Value, status_separate: bool) -> bool {
    let (Some(old), Some(new)) = (old.as_object(), new.as_object()) else { return old != new };
    let counts = |key: &&String| match key.as_str() {
        "metadata" | "apiVersion" | "kind" => false,
        "status" => !status_separate,
        _ => true,
    };
    old.keys().chain(new.keys()).filter(counts).any(|key| old.get(key) != new.get(key))
}

/// Nothing but the resourceVersion differs: the write need not happen.
pub fn unchanged(old: &Value, new: &Value) -> bool {
    let (Some(old), Some(new)) = (old.as_object(), new.as_object()) else { return old == new };
    let empty = Map::new();
    let part = |object: &'_ Map<String, Value>| object.get("metadata").and_then(Value::as_object).cloned();
    let (mut a, mut b) = (part(old).unwrap_or_else(|| empty.clone()), part(new).unwrap_or(empty));
    a.remove("resourceVersion");
    b.remove("resourceVersion");
    a == b && old.keys().chain(new.keys()).filter(|k| *k != "metadata").all(|key| old.get(key) == new.get(key))
}

/// Kinds of Kubernetes whose objects carry a generation; every custom resource does.
pub fn counts_generations(group: &str, plural: &str, builtin: bool) -> bool {
    !builtin
        || matches!(
            (group, plural),
            ("policy", "poddisruptionbudgets")
                | ("apiextensions.k8s.io", "customresourcedefinitions")
                | ("apps" | "admissionregistration.k8s.io", _)
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn creates() {
        let mut object = json!({"metadata": {"name": "a", "uid": "forged", "resourceVersion": "9", "labels": {},
            "deletionTimestamp": "2020-01-01T00:00:00Z", "generation": 7, "creationTimestamp": null}});
        prepare_create(&mut object, "u", at("2026-01-02T03:04:05.678Z"), true);
        assert_eq!(
            object,
            json!({"metadata": {"name": "a", "uid": "u", "creationTimestamp": "2026-01-02T03:04:05Z", "generation": 1}})
        );
        assert_eq!(micro_time(at("2026-01-02T03:04:05.678Z")), "2026-01-02T03:04:05.678000Z");
    }

    #[test]
    fn main_door_keeps_status_and_counts() {
        let old = json!({"metadata": {"name": "a", "uid": "u", "generation": 3}, "spec": {"a": 1}, "status": {"s": 1}});
        let mut new = json!({"metadata": {"name": "a", "uid": "x"}, "spec": {"a": 2}, "status": {"s": 2}});
        prepare_update(&old, &mut new, Door::Main { status_separate: true }, true);
        assert_eq!(
            new,
            json!({"metadata": {"name": "a", "uid": "u", "generation": 4}, "spec": {"a": 2}, "status": {"s": 1}})
        );
        let mut same = old.clone();
        same["metadata"]["labels"] = json!({"x": "y"});
        prepare_update(&old, &mut same, Door::Main { status_separate: true }, true);
        assert_eq!(generation(&same), 3);
        let mut status = old.clone();
        status["status"] = json!({"s": 9});
        prepare_update(&old, &mut status, Door::Main { status_separate: false }, true);
        assert_eq!((generation(&status), &status["status"]["s"]), (4, &json!(9)));
    }

    #[test]
    fn status_door_changes_status_only() {
        let old = json!({"metadata": {"name": "a", "generation": 3}, "spec": {"a": 1}, "status": {"s": 1}});
        let mut new = json!({"metadata": {"name": "b", "labels": {"x": "y"}}, "spec": {"a": 2}, "status": {"s": 2}});
        prepare_update(&old, &mut new, Door::Status, true);
        assert_eq!(new, json!({"metadata": {"name": "a", "generation": 3}, "spec": {"a": 1}, "status": {"s": 2}}));
    }

    #[test]
    fn sees_that_nothing_changed() {
        let old = json!({"metadata": {"name": "a", "resourceVersion": "1"}, "spec": {}});
        assert!(unchanged(&old, &json!({"metadata": {"name": "a", "resourceVersion": "2"}, "spec": {}})));
        assert!(!unchanged(&old, &json!({"metadata": {"name": "a"}, "spec": {}, "status": {}})));
        assert!(!unchanged(&old, &json!({"metadata": {"name": "a", "labels": {"a": "b"}}, "spec": {}})));
    }

    #[test]
    fn survives_odd_shapes() {
        for odd in [json!(null), json!([]), json!({"metadata": 3}), json!({"metadata": {"labels": [], "name": 4}})] {
            assert_eq!(name(&odd), "");
            assert!(labels(&odd).is_none());
            assert!(finalizers(&odd).is_empty());
            let mut object = odd.clone();
            prepare_create(&mut object, "u", at("2026-01-02T03:04:05Z"), true);
            prepare_update(&odd, &mut object, Door::Status, true);
        }
    }
}
