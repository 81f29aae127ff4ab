//! Strategic merge patch: like a merge patch, but lists are merged by the key that the schema names, and directives
//! (`$patch`, `$setElementOrder/…`, `$deleteFromPrimitiveList/…`, `$retainKeys`) say what else to do.

use super::object_patch;
use crate::schema::Schema;
use crate::status::Status;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

const PATCH: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const ORDER: &str = "$setElementOrder/";
const DELETE: &str = "$deleteFromPrimitiveList/";

/// Applies a strategic merge patch to an object of the kind that `schema` describes.
///
/// # Errors
/// 400 if the patch is malformed, 422 if it does not fit the lists it means.
pub fn strategic_merge(schema: &Schema, original: &Value, patch: &Value) -> Result<Value, Status> {
    object_patch(patch)?;
    let (Some(before), Some(patch)) = (original.as_object(), patch.as_object()) else {
        return Err(Status::bad_request("error decoding patch: the patch must be an object"));
    };
    merge_map(Some(schema), before.clone(), patch).map(Value::Object)
}

fn malformed(why: String) -> Status {
    Status::bad_request(why)
}

fn directive(map: &Map<String, Value>) -> Result<Option<&str>, Status> {
    match map.get(PATCH) {
        None => Ok(None),
        Some(Value::String(text)) if matches!(text.as_str(), "delete" | "replace" | "merge") => Ok(Some(text)),
        Some(other) => Err(malformed(format!("unknown patch type found: {other}"))),
    }
}

fn merges(schema: Option<&Schema>) -> bool {
    schema.is_some_and(|s| s.patch_strategy.iter().any(|p| p == "merge"))
}

fn merge_map(
    schema: Option<&Schema>,
    mut result: Map<String, Value>,
    patch: &Map<String, Value>,
) -> Result<Map<String, Value>, Status> {
    match directive(patch)? {
        Some("delete") => return Ok(Map::new()),
        // What replaces may still hold directives further down; merging into nothing resolves them.
        Some("replace") => result = Map::new(),
        _ => {}
    }
    if let Some(keys) = patch.get(RETAIN) {
        retain(&mut result, keys, patch)?;
    }
    let member = |name: &str| schema.and_then(|s| s.member(name)).map(Arc::as_ref);
    for (key, change) in patch {
        if key == PATCH || key == RETAIN {
            continue;
        }
        if let Some(name) = key.strip_prefix(DELETE) {
            let gone = change
                .as_array()
                .ok_or_else(|| malformed(format!("invalid patch format of primitive list: {key} must be a list")))?;
            if let Some(Value::Array(list)) = result.get_mut(name) {
                list.retain(|item| !gone.contains(item));
            }
            continue;
        }
        if key.starts_with(ORDER) {
            continue;
        }
        let merged = match (result.remove(key), change) {
            (_, Value::Null) => continue,
            (before, Value::Object(change)) => {
                let below = member(key);
                let replaced = below.is_some_and(|s| s.patch_strategy.iter().any(|p| p == "replace"));
                let before = match before {
                    Some(Value::Object(map)) if !replaced => map,
                    _ => Map::new(),
                };
                Value::Object(merge_map(below, before, change)?)
            }
            (before, Value::Array(change)) => {
                let below = member(key);
                let before = match before {
                    Some(Value::Array(list)) if merges(below) => list,
                    _ => Vec::new(),
                };
                if merges(below) {
                    Value::Array(merge_list(key, below, before, change)?)
                } else {
                    change.clone().into()
                }
            }
            (_, scalar) => scalar.clone(),
        };
        result.insert(key.clone(), merged);
    }
    for (key, order) in patch {
        let Some(name) = key.strip_prefix(ORDER) else { continue };
        let order = order
            .as_array()
            .ok_or_else(|| malformed(format!("invalid patch format of setElementOrder list: {key} must be a list")))?;
        if let Some(Value::Array(list)) = result.get_mut(name) {
            let key = member(name).and_then(|s| s.patch_merge_key.as_deref());
            let sorted = reorder(std::mem::take(list), order, key);
            *list = sorted;
        }
    }
    Ok(result)
}

/// Keeps only what `$retainKeys` names; everything the patch sets must be named.
fn retain(result: &mut Map<String, Value>, keys: &Value, patch: &Map<String, Value>) -> Result<(), Status> {
    let keys = keys
        .as_array()
        .ok_or_else(|| malformed("invalid patch format of retainKeys: it must be a list of strings".to_owned()))?;
    let named = |key: &str| keys.iter().any(|k| k.as_str() == Some(key));
    if let Some((stray, _)) = patch.iter().find(|(key, value)| !key.starts_with('$') && !value.is_null() && !named(key))
    {
        return Err(malformed(format!("invalid patch format of retainKeys: {stray:?} is set but not retained")));
    }
    result.retain(|key, _| named(key));
    Ok(())
}

fn merge_list(name: &str, schema: Option<&Schema>, before: Vec<Value>, patch: &[Value]) -> Result<Vec<Value>, Status> {
    if patch.iter().any(Value::is_array) || before.iter().any(Value::is_array) {
        return Err(Status::unprocessable("lists of lists are not supported"));
    }
    let objects = patch.iter().chain(&before).filter(|item| item.is_object()).count();
    if objects == 0 {
        return Ok(merge_scalars(before, patch));
    }
    if objects != patch.len() + before.len() {
        return Err(Status::unprocessable(format!("list element types are not identical in list {name:?}")));
    }
    let Some(key) = schema.and_then(|s| s.patch_merge_key.as_deref()) else {
        return Err(Status::unprocessable(format!("list {name:?} has no merge key")));
    };
    let items = schema.and_then(|s| s.items.as_deref());
    let mut list: Vec<Option<Value>> = before.into_iter().map(Some).collect();
    if patch.iter().any(|item| item.get(PATCH).and_then(Value::as_str) == Some("replace") && !is_keyed(item, key)) {
        // `- $patch: replace` alone: the other elements are the whole list.
        list.clear();
    }
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for (i, item) in list.iter().enumerate() {
        if let Some(id) = item.as_ref().and_then(|item| item.get(key)) {
            places.entry(id.to_string()).or_insert(i);
        }
    }
    for item in patch {
        let Some(change) = item.as_object() else { continue };
        let directive = directive(change)?;
        let Some(id) = change.get(key).map(Value::to_string) else {
            if directive == Some("replace") {
                continue;
            }
            return Err(Status::unprocessable(format!(
                "map in list {name:?} does not contain declared merge key: {key}"
            )));
        };
        let place = places.get(&id).copied();
        if directive == Some("delete") {
            if let Some(slot) = place.and_then(|i| list.get_mut(i)) {
                *slot = None;
            }
            places.remove(&id);
            continue;
        }
        let old = match place.and_then(|i| list.get_mut(i)).and_then(Option::take) {
            Some(Value::Object(map)) => map,
            _ => Map::new(),
        };
        let merged = Some(Value::Object(merge_map(items, old, change)?));
        match place.and_then(|i| list.get_mut(i)) {
            Some(slot) => *slot = merged,
            None => {
                places.insert(id, list.len());
                list.push(merged);
            }
        }
    }
    Ok(list.into_iter().flatten().collect())
}

fn is_keyed(item: &Value, key: &str) -> bool {
    item.get(key).is_some()
}

fn merge_scalars(before: Vec<Value>, patch: &[Value]) -> Vec<Value> {
    let mut seen: std::collections::BTreeSet<String> = std::collections::BTreeSet::new();
    before.into_iter().chain(patch.iter().cloned()).filter(|item| seen.insert(item.to_string())).collect()
}

/// Puts the elements that `order` names into that order; the others keep their places relative to their neighbours.
fn reorder(list: Vec<Value>, order: &[Value], key: Option<&str>) -> Vec<Value> {
    let identity = |item: &Value| match key {
        Some(key) => item.get(key).map(Value::to_string),
        None => Some(item.to_string()),
    };
    let ranks: BTreeMap<String, usize> =
        order.iter().enumerate().rev().filter_map(|(i, item)| Some((identity(item)?, i))).collect();
    let mut named: Vec<(usize, usize, Value)> = Vec::new();
    let mut others: Vec<(usize, Value)> = Vec::new();
    for (place, item) in list.into_iter().enumerate() {
        match identity(&item).and_then(|id| ranks.get(&id).copied()) {
            Some(rank) => named.push((rank, place, item)),
            None => others.push((place, item)),
        }
    }
    named.sort_by_key(|(rank, ..)| *rank);
    let mut result = Vec::with_capacity(named.len() + others.len());
    let mut others = others.into_iter().peekable();
    for (_, place, item) in named {
        while let Some((_, other)) = others.next_if(|(other, _)| *other < place) {
            result.push(other);
        }
        result.push(item);
    }
    result.extend(others.map(|(_, item)| item));
    result
}

#[cfg(test)]
mod tests {
    use super::super::tests::any_json;
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn list(items: Schema, key: Option<&str>) -> Schema {
        Schema {
            items: Some(Arc::new(items)),
            patch_merge_key: key.map(str::to_owned),
            patch_strategy: vec!["merge".to_owned()],
            ..Schema::default()
        }
    }

    fn object(members: Vec<(&str, Schema)>) -> Schema {
        let properties = members.into_iter().map(|(name, schema)| (name.to_owned(), Arc::new(schema))).collect();
        Schema { properties, ..Schema::default() }
    }

    fn schema() -> Schema {
        let inner = object(vec![("l", list(Schema::default(), Some("name"))), ("s", list(Schema::default(), None))]);
        object(vec![
            ("l", list(inner, Some("name"))),
            ("s", list(Schema::default(), None)),
            ("r", Schema { patch_strategy: vec!["replace".to_owned()], ..Schema::default() }),
        ])
    }

    fn merged(original: Value, patch: Value) -> Value {
        strategic_merge(&schema(), &original, &patch).unwrap()
    }

    #[test]
    fn merges_lists_by_key() {
        assert_eq!(
            merged(
                json!({"l": [{"name": "a", "x": 1}, {"name": "b"}], "s": ["p"], "atomic": [1], "m": {"k": 1}}),
                json!({"l": [{"name": "c"}, {"name": "a", "y": 2, "s": ["q"]}], "s": ["q", "p"], "atomic": [2],
                    "m": {"k": null, "n": {"o": null}}})
            ),
            json!({"l": [{"name": "a", "x": 1, "y": 2, "s": ["q"]}, {"name": "b"}, {"name": "c"}], "s": ["p", "q"],
                "atomic": [2], "m": {"n": {}}})
        );
    }

    #[test]
    fn obeys_directives() {
        let original = json!({"l": [{"name": "a", "x": 1}, {"name": "b"}, {"name": "c"}], "s": ["p", "q", "r"],
            "m": {"k": 1, "j": 2}});
        assert_eq!(
            merged(
                original.clone(),
                json!({"$setElementOrder/l": [{"name": "c"}, {"name": "a"}], "l": [{"name": "b", "$patch": "delete"}],
                    "$deleteFromPrimitiveList/s": ["q"], "$setElementOrder/s": ["r", "p"],
                    "m": {"$patch": "replace", "z": 1}})
            ),
            json!({"l": [{"name": "c"}, {"name": "a", "x": 1}], "s": ["r", "p"], "m": {"z": 1}})
        );
        assert_eq!(merged(original.clone(), json!({"m": {"$patch": "delete"}}))["m"], json!({}));
        assert_eq!(
            merged(original.clone(), json!({"m": {"$retainKeys": ["k", "z"], "z": 3}}))["m"],
            json!({"k": 1, "z": 3})
        );
        assert_eq!(
            merged(original.clone(), json!({"l": [{"$patch": "replace"}, {"name": "z"}]}))["l"],
            json!([{"name": "z"}])
        );
        assert_eq!(
            merged(original, json!({"l": [{"name": "a", "$patch": "replace", "y": 1}]}))["l"][0],
            json!({"name": "a", "y": 1})
        );
        assert_eq!(merged(json!({"r": {"a": 1}}), json!({"r": {"b": 1}})), json!({"r": {"b": 1}}));
    }

    #[test]
    fn keeps_the_places_of_elements_it_does_not_name() {
        let names = |list: &Value| -> String {
            list.as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap()).collect::<Vec<_>>().join("")
        };
        let original = json!({"l": [{"name": "s"}, {"name": "a"}, {"name": "t"}, {"name": "b"}]});
        let patch = json!({"$setElementOrder/l": [{"name": "a"}, {"name": "n"}, {"name": "b"}], "l": [{"name": "n"}]});
        let result = merged(original, patch);
        assert!(matches!(names(&result["l"]).as_str(), "santb" | "satnb"), "{result}");
    }

    #[test]
    fn follows_the_schemas_of_kubernetes() {
        let schema = |plural: &str| {
            let all = crate::builtin::resources();
            all.into_iter().find(|r| r.plural == plural && r.gv.group.is_empty()).unwrap().schema
        };
        let pod = json!({"metadata": {"name": "p", "finalizers": ["a/b"], "ownerReferences": [{"uid": "u", "name": "o"}]},
            "spec": {"containers": [{"name": "c", "image": "i", "args": ["x"],
                "env": [{"name": "E", "value": "1"}], "volumeMounts": [{"mountPath": "/a", "name": "v"}]}],
                "volumes": [{"name": "v", "emptyDir": {}}], "tolerations": [{"key": "k"}]},
            "status": {"conditions": [{"type": "Ready", "status": "False"}]}});
        let patch = json!({"metadata": {"finalizers": ["c/d"], "ownerReferences": [{"uid": "w"}]},
            "spec": {"$setElementOrder/containers": [{"name": "d"}, {"name": "c"}],
                "containers": [{"name": "d", "image": "j"}, {"name": "c", "args": ["y"],
                    "env": [{"name": "E", "$patch": "delete"}, {"name": "F", "value": "2"}],
                    "volumeMounts": [{"mountPath": "/b", "name": "v"}]}],
                "volumes": [{"name": "v", "$retainKeys": ["name", "configMap"], "configMap": {"name": "m"}}],
                "tolerations": [{"key": "l"}]},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        assert_eq!(
            strategic_merge(&schema("pods"), &pod, &patch).unwrap(),
            json!({"metadata": {"name": "p", "finalizers": ["a/b", "c/d"],
                    "ownerReferences": [{"uid": "u", "name": "o"}, {"uid": "w"}]},
                "spec": {"containers": [{"name": "d", "image": "j"}, {"name": "c", "image": "i", "args": ["y"],
                        "env": [{"name": "F", "value": "2"}],
                        "volumeMounts": [{"mountPath": "/a", "name": "v"}, {"mountPath": "/b", "name": "v"}]}],
                    "volumes": [{"name": "v", "configMap": {"name": "m"}}], "tolerations": [{"key": "l"}]},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]}})
        );
        let node = json!({"spec": {"taints": [{"key": "a"}], "unschedulable": true},
            "status": {"addresses": [{"type": "InternalIP", "address": "1"}]}});
        let patch =
            json!({"spec": {"unschedulable": null}, "status": {"addresses": [{"type": "Hostname", "address": "n"}]}});
        assert_eq!(
            strategic_merge(&schema("nodes"), &node, &patch).unwrap(),
            json!({"spec": {"taints": [{"key": "a"}]},
                "status": {"addresses": [{"type": "InternalIP", "address": "1"}, {"type": "Hostname", "address": "n"}]}})
        );
    }

    #[test]
    fn refuses_nonsense() {
        let code = |patch: Value| strategic_merge(&schema(), &json!({"l": [{"name": "a"}]}), &patch).unwrap_err().code;
        assert_eq!(code(json!([])), 400);
        assert_eq!(code(json!({"m": {"$patch": "fly"}})), 400);
        assert_eq!(code(json!({"m": {"$retainKeys": ["a"], "b": 1}})), 400);
        assert_eq!(code(json!({"l": [{"x": 1}]})), 422);
        assert_eq!(code(json!({"l": ["x"]})), 422);
        assert_eq!(code(json!({"l": [[]]})), 422);
    }

    proptest! {
        #[test]
        fn never_panics_and_leaves_no_directive(document in any_json(), patch in any_json()) {
            if let Ok(result) = strategic_merge(&schema(), &json!({}), &patch) {
                let result = strategic_merge(&schema(), &result, &json!({})).unwrap();
                prop_assert!(result.get("$patch").is_none());
            }
            let _ = strategic_merge(&schema(), &document, &patch);
        }
    }
}
