//! Walks over values and their schema: which fields a value has, what differs between two, merging and taking away.

use super::fields::{FieldSet, Step, field_step, keys_step, value_step};
use crate::schema::{ListType, Schema};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

/// The schema of one place, as far as it is known.
pub(super) type Known<'s> = Option<&'s Schema>;

fn member<'s>(schema: Known<'s>, name: &str) -> Known<'s> {
    schema.and_then(|s| s.member(name)).map(Arc::as_ref)
}

fn item<'s>(schema: Known<'s>) -> Known<'s> {
    schema.and_then(|s| s.items.as_deref())
}

/// The root's members; `metadata` of custom resources is described here, because their definitions leave it out.
fn root_member<'s>(schema: Known<'s>, name: &str, root: bool) -> Known<'s> {
    let found = member(schema, name);
    if root && name == "metadata" && found.is_none_or(|s| s.properties.is_empty()) {
        return Some(object_meta());
    }
    found
}

fn object_meta() -> &'static Schema {
    static META: OnceLock<Schema> = OnceLock::new();
    META.get_or_init(|| {
        let text_map = Schema { additional: Some(Arc::new(Schema::default())), ..Schema::default() };
        let list = |list_type, keys: &[&str]| Schema {
            items: Some(Arc::new(Schema::default())),
            list_type,
            list_map_keys: keys.iter().map(|k| (*k).to_owned()).collect(),
            ..Schema::default()
        };
        let properties = [
            ("labels", text_map.clone()),
            ("annotations", text_map),
            ("finalizers", list(ListType::Set, &[])),
            ("ownerReferences", list(ListType::Map, &["uid"])),
        ];
        Schema {
            properties: properties.into_iter().map(|(k, s)| (k.to_owned(), Arc::new(s))).collect(),
            ..Schema::default()
        }
    })
}

/// A map as opposed to an object with known members.
fn is_map(schema: Known<'_>) -> bool {
    schema.is_none_or(|s| s.properties.is_empty())
}

/// How the items of a list are told apart; `None`: they are not, the list is one value.
fn list_type(schema: Known<'_>) -> Option<ListType> {
    schema.map(|s| s.list_type).filter(|t| *t != ListType::Atomic)
}

fn is_atomic_map(schema: Known<'_>) -> bool {
    schema.is_some_and(|s| s.atomic_map)
}

/// The step that names an item; `Err` with the key that the item lacks.
fn item_step(schema: Known<'_>, kind: ListType, value: &Value) -> Result<Step, String> {
    if kind == ListType::Set {
        return Ok(value_step(value));
    }
    let mut keys = BTreeMap::new();
    let mut missing = None;
    let names = schema.map(|s| s.list_map_keys.as_slice()).unwrap_or_default();
    for name in names {
        let default = || member(item(schema), name).and_then(|s| s.default.as_ref());
        match value.get(name).or_else(default) {
            Some(found) => {
                keys.insert(name.clone(), found.clone());
            }
            None => missing = Some(name.clone()),
        }
    }
    match missing {
        // Some keys may be left out, but not all.
        Some(name) if keys.is_empty() => Err(name),
        _ => Ok(keys_step(&keys)),
    }
}

/// Items with their steps; those without a name or with one that came before are left to themselves (`None`).
fn named<'v>(schema: Known<'_>, kind: ListType, list: &'v [Value]) -> Vec<(Option<Step>, &'v Value)> {
    let mut seen = BTreeSet::new();
    list.iter()
        .map(|value| {
            let step = item_step(schema, kind, value).ok().filter(|step| seen.insert(step.clone()));
            (step, value)
        })
        .collect()
}

/// The fields of an object.
pub(super) fn fields_of(schema: &Schema, object: &Value) -> FieldSet {
    match object {
        Value::Object(map) => fields_of_map(Some(schema), map, true, false),
        _ => FieldSet::default(),
    }
}

/// `whole`: maps, lists and objects are facts of their own besides what they hold, so that they stay when that goes.
fn fields_of_map(schema: Known<'_>, map: &Map<String, Value>, root: bool, whole: bool) -> FieldSet {
    let mut set = FieldSet::default();
    for (name, value) in map {
        let own = stands_alone(schema, name, root, whole);
        add_fields(root_member(schema, name, root), field_step(name), value, own, whole, &mut set);
    }
    set
}

/// Is it a fact of its own that there is a member of this name, besides what the member holds? With members of maps it
/// is; with those of objects when they came as a `whole`, unless the objects of Kubernetes' own kinds have them always.
fn stands_alone(schema: Known<'_>, name: &str, root: bool, whole: bool) -> bool {
    let always = || {
        schema.is_some_and(|s| s.definition.is_some() && (root || s.required.iter().any(|required| required == name)))
    };
    (is_map(schema) && !root) || (whole && !always())
}

/// Puts the fields of `value`, which stands at `step`, into `set`; `own`: the step itself belongs to them.
fn add_fields(schema: Known<'_>, step: Step, value: &Value, own: bool, whole: bool, set: &mut FieldSet) {
    let below = match value {
        Value::Object(map) if !is_atomic_map(schema) => fields_of_map(schema, map, false, whole),
        Value::Array(list) => match list_type(schema) {
            Some(kind) => {
                let mut below = FieldSet::default();
                for (step, value) in named(schema, kind, list) {
                    let Some(step) = step else { continue };
                    add_fields(item(schema), step, value, true, whole, &mut below);
                }
                below
            }
            None => FieldSet::default(),
        },
        _ => FieldSet::default(),
    };
    if own || below.is_empty() {
        set.insert(step.clone());
    }
    set.insert_below(step, below);
}

/// What an author wrote wrong: items of a keyed list without their key or with one that came before.
pub(super) fn check_lists(schema: &Schema, object: &Value) -> Vec<String> {
    let mut errors = Vec::new();
    check_node(Some(schema), object, true, &mut String::new(), &mut errors);
    errors
}

fn check_node(schema: Known<'_>, value: &Value, root: bool, path: &mut String, errors: &mut Vec<String>) {
    let length = path.len();
    match value {
        Value::Object(map) if !is_atomic_map(schema) => {
            for (name, value) in map {
                path.push('.');
                path.push_str(name);
                check_node(root_member(schema, name, root), value, false, path, errors);
                path.truncate(length);
            }
        }
        Value::Array(list) => {
            let Some(kind) = list_type(schema) else { return };
            let mut seen = BTreeSet::new();
            for (i, value) in list.iter().enumerate() {
                match item_step(schema, kind, value) {
                    Err(key) => errors.push(format!(
                        "{path}: element {i}: associative list with keys has an element that omits key field {key:?} \
                         (and doesn't have default value)"
                    )),
                    Ok(step) => {
                        let mut shown = FieldSet::default();
                        shown.insert(step.clone());
                        let shown = shown.paths().concat();
                        if !seen.insert(step) {
                            errors.push(format!("{path}: duplicate entries for key {shown}"));
                        }
                        path.push_str(&shown);
                    }
                }
                check_node(item(schema), value, false, path, errors);
                path.truncate(length);
            }
        }
        _ => {}
    }
}

/// What happened between two objects.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Difference {
    /// Fields that came or have another value.
    pub changed: FieldSet,
    /// Fields that went.
    pub removed: FieldSet,
}

/// Compares two objects.
pub(super) fn difference(schema: &Schema, old: &Value, new: &Value) -> Difference {
    let empty = Map::new();
    let (old, new) = (old.as_object().unwrap_or(&empty), new.as_object().unwrap_or(&empty));
    compare_maps(Some(schema), old, new, true)
}

fn compare_maps(schema: Known<'_>, old: &Map<String, Value>, new: &Map<String, Value>, root: bool) -> Difference {
    let mut all = Difference::default();
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for name in names {
        let own = stands_alone(schema, name, root, true);
        compare(root_member(schema, name, root), field_step(name), old.get(name), new.get(name), own, &mut all);
    }
    all
}

fn compare(schema: Known<'_>, step: Step, old: Option<&Value>, new: Option<&Value>, own: bool, all: &mut Difference) {
    let below = match (old, new) {
        (old, new) if old == new => return,
        (None, Some(new)) => {
            return add_fields(schema, step, new, own, true, &mut all.changed);
        }
        (Some(old), None) => return add_fields(schema, step, old, true, true, &mut all.removed),
        (Some(Value::Object(old)), Some(Value::Object(new))) if !is_atomic_map(schema) => {
            compare_maps(schema, old, new, false)
        }
        (Some(Value::Array(old)), Some(Value::Array(new))) if list_type(schema).is_some() => {
            compare_lists(schema, old, new)
        }
        (Some(old), Some(new)) => {
            let (mut before, mut after) = (FieldSet::default(), FieldSet::default());
            add_fields(schema, step.clone(), old, true, true, &mut before);
            add_fields(schema, step, new, true, true, &mut after);
            all.removed = std::mem::take(&mut all.removed).union(&before.difference(&after));
            all.changed = std::mem::take(&mut all.changed).union(&after);
            return;
        }
        (None, None) => return,
    };
    let emptied = match new {
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        _ => false,
    };
    if emptied {
        all.changed.insert(step.clone());
    }
    all.changed.insert_below(step.clone(), below.changed);
    all.removed.insert_below(step, below.removed);
}

fn compare_lists(schema: Known<'_>, old: &[Value], new: &[Value]) -> Difference {
    let mut all = Difference::default();
    let kind = list_type(schema).unwrap_or_default();
    let index = |list| -> BTreeMap<Step, &Value> {
        named(schema, kind, list).into_iter().filter_map(|(step, value)| Some((step?, value))).collect()
    };
    let (old, new) = (index(old), index(new));
    let steps: BTreeSet<&Step> = old.keys().chain(new.keys()).collect();
    for step in steps {
        compare(item(schema), step.clone(), old.get(step).copied(), new.get(step).copied(), true, &mut all);
    }
    all
}

/// `live` with everything that `applied` says.
pub(super) fn merge(schema: &Schema, live: &Value, applied: &Value) -> Value {
    merge_node(Some(schema), Some(live), applied, true)
}

fn merge_node(schema: Known<'_>, live: Option<&Value>, applied: &Value, root: bool) -> Value {
    match (live, applied) {
        (Some(Value::Object(live)), Value::Object(applied)) if !is_atomic_map(schema) => {
            let mut merged = live.clone();
            for (name, value) in applied {
                let value = merge_node(root_member(schema, name, root), live.get(name), value, false);
                merged.insert(name.clone(), value);
            }
            Value::Object(merged)
        }
        (Some(Value::Array(live)), Value::Array(applied)) => match list_type(schema) {
            Some(kind) => Value::Array(merge_lists(schema, kind, live, applied)),
            None => Value::Array(applied.clone()),
        },
        _ => applied.clone(),
    }
}

/// Items in the order in which they are applied; those only in `live` keep their places among them.
fn merge_lists(schema: Known<'_>, kind: ListType, live: &[Value], applied: &[Value]) -> Vec<Value> {
    let wanted: BTreeSet<Step> = applied.iter().filter_map(|value| item_step(schema, kind, value).ok()).collect();
    let mut places: BTreeMap<Step, (usize, &Value)> = BTreeMap::new();
    let mut others: Vec<(usize, &Value)> = Vec::new();
    for (place, (step, value)) in named(schema, kind, live).into_iter().enumerate() {
        match step {
            Some(step) if wanted.contains(&step) => {
                places.insert(step, (place, value));
            }
            _ => others.push((place, value)),
        }
    }
    let mut others = others.into_iter().peekable();
    let mut merged = Vec::with_capacity(live.len() + applied.len());
    for value in applied {
        let old = item_step(schema, kind, value).ok().and_then(|step| places.get(&step).copied());
        if let Some((place, _)) = old {
            while let Some((_, other)) = others.next_if(|(other, _)| *other < place) {
                merged.push(other.clone());
            }
        }
        merged.push(merge_node(item(schema), old.map(|(_, value)| value), value, false));
    }
    merged.extend(others.map(|(_, other)| other.clone()));
    merged
}

/// Takes the fields in `gone` out of an object, except what `kept` holds.
pub(super) fn remove(schema: &Schema, object: Value, gone: &FieldSet, kept: &FieldSet) -> Value {
    match object {
        Value::Object(map) => Value::Object(remove_from_map(Some(schema), map, gone, kept, true)),
        other => other,
    }
}

fn remove_from_map(
    schema: Known<'_>,
    mut map: Map<String, Value>,
    gone: &FieldSet,
    kept: &FieldSet,
    root: bool,
) -> Map<String, Value> {
    for (step, _) in gone.iter() {
        let Some(name) = step.strip_prefix("f:") else { continue };
        let Some(value) = map.remove(name) else { continue };
        if let Some(value) = remove_node(root_member(schema, name, root), step, value, gone, kept) {
            map.insert(name.to_owned(), value);
        }
    }
    map
}

/// What is left of a value at `step`; nothing if it goes altogether.
fn remove_node(schema: Known<'_>, step: &str, value: Value, gone: &FieldSet, kept: &FieldSet) -> Option<Value> {
    let Some(node) = gone.get(step) else { return Some(value) };
    let nothing = FieldSet::default();
    let kept = kept.get(step);
    if node.member && kept.is_none() {
        return None;
    }
    if node.below.is_empty() {
        return Some(value);
    }
    let (keep_it, below) = kept.map_or((false, &nothing), |kept| (kept.member, &kept.below));
    let left = match value {
        Value::Object(map) if !is_atomic_map(schema) => {
            Value::Object(remove_from_map(schema, map, &node.below, below, false))
        }
        Value::Array(list) => match list_type(schema) {
            Some(kind) => Value::Array(remove_from_list(schema, kind, list, &node.below, below)),
            None => Value::Array(list),
        },
        other => other,
    };
    let empty = match &left {
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    (!empty || keep_it).then_some(left)
}

fn remove_from_list(
    schema: Known<'_>,
    kind: ListType,
    list: Vec<Value>,
    gone: &FieldSet,
    kept: &FieldSet,
) -> Vec<Value> {
    let keys = schema.map(|s| s.list_map_keys.as_slice()).unwrap_or_default();
    list.into_iter()
        .filter_map(|value| {
            let Ok(step) = item_step(schema, kind, &value) else { return Some(value) };
            // An item that stays keeps what names it.
            let naming: Vec<(String, Value)> =
                keys.iter().filter_map(|key| Some((key.clone(), value.get(key)?.clone()))).collect();
            let mut left = remove_node(item(schema), &step, value, gone, kept)?;
            if let Some(map) = left.as_object_mut() {
                for (key, value) in naming {
                    map.entry(key).or_insert(value);
                }
            }
            Some(left)
        })
        .collect()
}

/// Members that are null where null is not a value say nothing; they are dropped.
pub(super) fn without_nulls(schema: &Schema, object: &Value) -> Value {
    drop_nulls(Some(schema), object, true)
}

fn drop_nulls(schema: Known<'_>, value: &Value, root: bool) -> Value {
    match value {
        Value::Object(map) => map
            .iter()
            .filter_map(|(name, value)| {
                let below = root_member(schema, name, root);
                let says_nothing = value.is_null() && !below.is_some_and(|s| s.nullable);
                (!says_nothing).then(|| (name.clone(), drop_nulls(below, value, false)))
            })
            .collect(),
        Value::Array(list) => list.iter().map(|value| drop_nulls(item(schema), value, false)).collect(),
        other => other.clone(),
    }
}
