//! Sets of fields, and `FieldsV1`, the form in which `managedFields` writes them.

use crate::body::MAX_DEPTH;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// One step of a path as `FieldsV1` writes it: `f:name`, `k:{"name":"a"}`, `v:"x"`, `i:0`.
pub type Step = String;

/// A set of fields, as a tree of steps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSet {
    nodes: BTreeMap<Step, Node>,
}

/// What the set holds at and below one step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Node {
    /// The field itself is in the set.
    pub(super) member: bool,
    /// Fields below it.
    pub(super) below: FieldSet,
}

/// `f:name`
pub(super) fn field_step(name: &str) -> Step {
    format!("f:{name}")
}

impl FieldSet {
    /// Holds no field.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    pub(super) fn get(&self, step: &str) -> Option<&Node> {
        self.nodes.get(step)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Step, &Node)> {
        self.nodes.iter()
    }

    /// Puts in the field at `step` itself.
    pub(super) fn insert(&mut self, step: Step) {
        self.nodes.entry(step).or_default().member = true;
    }

    /// Puts in fields below `step`.
    pub(super) fn insert_below(&mut self, step: Step, below: FieldSet) {
        if !below.is_empty() {
            let node = self.nodes.entry(step).or_default();
            node.below = std::mem::take(&mut node.below).union(&below);
        }
    }

    /// Takes out the field at `step` and everything below it.
    pub(super) fn remove_tree(&mut self, step: &str) {
        self.nodes.remove(step);
    }

    /// Takes out the field at `step`, but nothing below it.
    pub(super) fn remove_member(&mut self, step: &str) {
        if let Some(node) = self.nodes.get_mut(step) {
            node.member = false;
            if node.below.is_empty() {
                self.nodes.remove(step);
            }
        }
    }

    /// Takes out fields below `step`.
    pub(super) fn edit_below(&mut self, step: &str, edit: impl FnOnce(&mut FieldSet)) {
        if let Some(node) = self.nodes.get_mut(step) {
            edit(&mut node.below);
            if !node.member && node.below.is_empty() {
                self.nodes.remove(step);
            }
        }
    }

    /// Fields in either.
    #[must_use]
    pub fn union(mut self, other: &FieldSet) -> FieldSet {
        for (step, theirs) in &other.nodes {
            let node = self.nodes.entry(step.clone()).or_default();
            node.member |= theirs.member;
            node.below = std::mem::take(&mut node.below).union(&theirs.below);
        }
        self
    }

    /// Fields in both.
    #[must_use]
    pub fn intersection(&self, other: &FieldSet) -> FieldSet {
        self.combine(other, |mine, theirs| mine && theirs, false)
    }

    /// Fields here that are not there.
    #[must_use]
    pub fn difference(&self, other: &FieldSet) -> FieldSet {
        self.combine(other, |mine, theirs| mine && !theirs, true)
    }

    fn combine(&self, other: &FieldSet, member: fn(bool, bool) -> bool, keep_alone: bool) -> FieldSet {
        let mut nodes = BTreeMap::new();
        for (step, mine) in &self.nodes {
            let node = match other.nodes.get(step) {
                Some(theirs) => Node {
                    member: member(mine.member, theirs.member),
                    below: mine.below.combine(&theirs.below, member, keep_alone),
                },
                None if keep_alone => mine.clone(),
                None => continue,
            };
            if node.member || !node.below.is_empty() {
                nodes.insert(step.clone(), node);
            }
        }
        FieldSet { nodes }
    }

    /// Every field as a path for people: `.spec.containers[name="a"].image`.
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect(&mut String::new(), &mut paths);
        paths
    }

    fn collect(&self, prefix: &mut String, paths: &mut Vec<String>) {
        for (step, node) in &self.nodes {
            let length = prefix.len();
            show(step, prefix);
            if node.member {
                paths.push(prefix.clone());
            }
            node.below.collect(prefix, paths);
            prefix.truncate(length);
        }
    }

    /// The form of `managedFields[].fieldsV1`.
    pub fn to_fields_v1(&self) -> Value {
        let mut map = Map::new();
        for (step, node) in &self.nodes {
            let mut value = node.below.to_fields_v1();
            if node.member
                && !node.below.is_empty()
                && let Some(members) = value.as_object_mut()
            {
                members.insert(".".to_owned(), Value::Object(Map::new()));
            }
            map.insert(step.clone(), value);
        }
        Value::Object(map)
    }

    /// Reads `fieldsV1`; `None` if it is malformed.
    pub fn from_fields_v1(value: &Value) -> Option<FieldSet> {
        FieldSet::read(value, MAX_DEPTH + 28)
    }

    fn read(value: &Value, depth: usize) -> Option<FieldSet> {
        let mut set = FieldSet::default();
        let depth = depth.checked_sub(1)?;
        for (key, value) in value.as_object()? {
            if key == "." {
                continue;
            }
            let step = normal(key)?;
            let below = FieldSet::read(value, depth)?;
            let node = set.nodes.entry(step).or_default();
            node.member |= below.is_empty() || value.get(".").is_some();
            node.below = std::mem::take(&mut node.below).union(&below);
        }
        Some(set)
    }
}

/// A step with its JSON written as we write it.
fn normal(step: &str) -> Option<Step> {
    let (tag, rest) = step.split_once(':')?;
    match tag {
        "f" => Some(step.to_owned()),
        "k" => {
            let keys: BTreeMap<String, Value> = serde_json::from_str(rest).ok()?;
            (!keys.is_empty()).then(|| keys_step(&keys))
        }
        "v" => {
            let value: Value = serde_json::from_str(rest).ok()?;
            Some(value_step(&value))
        }
        "i" => Some(format!("i:{}", rest.parse::<u64>().ok()?)),
        _ => None,
    }
}

/// `k:{"name":"a"}`
pub(super) fn keys_step(keys: &BTreeMap<String, Value>) -> Step {
    let mut step = "k:{".to_owned();
    for (i, (key, value)) in keys.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(step, "{comma}{}:{value}", Value::from(key.as_str()));
    }
    step.push('}');
    step
}

/// `v:"x"`
pub(super) fn value_step(value: &Value) -> Step {
    format!("v:{value}")
}

fn show(step: &str, path: &mut String) {
    let (tag, rest) = step.split_once(':').unwrap_or(("f", step));
    let _ = match tag {
        "k" => {
            let keys: BTreeMap<String, Value> = serde_json::from_str(rest).unwrap_or_default();
            let pairs: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
            write!(path, "[{}]", pairs.join(","))
        }
        "v" => write!(path, "[={rest}]"),
        "i" => write!(path, "[{rest}]"),
        _ => write!(path, ".{rest}"),
    };
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    pub fn any_set() -> impl Strategy<Value = FieldSet> {
        let step = prop_oneof![
            "f:[a-c.]",
            Just(r#"k:{"a":1,"name":"x"}"#.to_owned()),
            Just("v:\"x\"".to_owned()),
            Just("v:1".to_owned()),
            Just("i:0".to_owned())
        ];
        let leaf = Just(FieldSet::default());
        leaf.prop_recursive(3, 16, 4, move |inner| {
            proptest::collection::btree_map(step.clone(), (any::<bool>(), inner), 0..4).prop_map(|nodes| FieldSet {
                nodes: nodes
                    .into_iter()
                    .map(|(step, (member, below))| (step, Node { member: member || below.is_empty(), below }))
                    .collect(),
            })
        })
    }

    #[test]
    fn reads_and_writes() {
        let fields =
            json!({"f:spec": {"f:l": {"k:{\"name\":\"a\"}": {".": {}, "f:image": {}}}, "f:s": {"v:\"x\"": {}}}});
        let set = FieldSet::from_fields_v1(&fields).unwrap();
        assert_eq!(set.to_fields_v1(), fields);
        assert_eq!(set.paths(), [".spec.l[name=\"a\"]", ".spec.l[name=\"a\"].image", ".spec.s[=\"x\"]"]);
        let loose = json!({"k:{\"b\" : 1, \"a\":2}": {}});
        assert_eq!(FieldSet::from_fields_v1(&loose).unwrap().to_fields_v1(), json!({"k:{\"a\":2,\"b\":1}": {}}));
        for bad in [json!([]), json!({"x": {}}), json!({"k:{": {}}), json!({"f:a": 1}), json!({"i:x": {}})] {
            assert_eq!(FieldSet::from_fields_v1(&bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn round_trips(set in any_set()) {
            prop_assert_eq!(FieldSet::from_fields_v1(&set.to_fields_v1()), Some(set));
        }

        #[test]
        fn is_a_set(a in any_set(), b in any_set()) {
            let both = a.clone().union(&b);
            prop_assert_eq!(&both, &b.clone().union(&a));
            prop_assert_eq!(a.difference(&b).union(&a.intersection(&b)), a.clone());
            prop_assert!(a.difference(&b).intersection(&b).is_empty());
            prop_assert!(a.difference(&both).is_empty());
        }

        #[test]
        fn never_panics(key in ".{0,12}", tag in "[fkvix.]:") {
            let _ = FieldSet::from_fields_v1(&json!({key.clone(): {}, format!("{tag}{key}"): {".": {}}}));
        }
    }
}
