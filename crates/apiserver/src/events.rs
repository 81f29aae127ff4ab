//! Events are served twice: as core/v1 and as events.k8s.io/v1, one object with two sets of names.

use serde_json::{Value, json};

/// The second group.
pub(crate) const GROUP: &str = "events.k8s.io";

/// events.k8s.io name, core name
const NAMES: [(&str, &str); 7] = [
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
    ("reportingController", "reportingComponent"),
];

fn rename(object: &mut Value, names: impl Iterator<Item = (&'static str, &'static str)>) {
    let Some(map) = object.as_object_mut() else { return };
    for (from, to) in names {
        if let Some(value) = map.remove(from) {
            map.insert(to.to_owned(), value);
        }
    }
}

/// Core to events.k8s.io.
pub(crate) fn from_core(object: &mut Value) {
    rename(object, NAMES.iter().map(|(new, core)| (*core, *new)));
    // The field is required there.
    if let Some(map) = object.as_object_mut() {
        map.entry("eventTime").or_insert(Value::Null);
    }
}

/// events.k8s.io to core, with what core clients cannot do without.
pub(crate) fn to_core(object: &mut Value) {
    rename(object, NAMES.iter().copied());
    if let Some(map) = object.as_object_mut() {
        map.entry("involvedObject").or_insert_with(|| json!({}));
        map.entry("source").or_insert_with(|| json!({}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let new = json!({"regarding": {"name": "a"}, "note": "n", "eventTime": "t", "deprecatedSource": {},
            "reportingController": "c", "reason": "r"});
        let mut object = new.clone();
        to_core(&mut object);
        assert_eq!(object["involvedObject"]["name"], "a");
        assert_eq!(object["message"], "n");
        assert_eq!(object["reportingComponent"], "c");
        from_core(&mut object);
        assert_eq!(object, new);
    }
}
