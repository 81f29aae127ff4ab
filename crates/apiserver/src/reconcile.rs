//! Built-in roles and bindings of an older data directory are brought up to date, as Kubernetes does at each start: what they
//! lack is added, and nothing that somebody else has added is taken away.

use crate::rbac::{Action, Rule};
use serde::Deserialize;
use serde_json::{Map, Value};

/// Whoever wants a built-in role or binding to stay as it is sets this to `false`.
const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";

/// A stored role or binding with everything that `ours` has and it has not.
pub(crate) fn reconciled(found: &Value, ours: &Value) -> Value {
    let mut all = found.clone();
    if found.pointer("/metadata/annotations").and_then(|a| a.get(AUTOUPDATE)) == Some(&Value::from("false")) {
        return all;
    }
    for field in ["labels", "annotations"] {
        let values = ours["metadata"].get(field).and_then(Value::as_object);
        for (key, value) in values.into_iter().flatten() {
            if let Some(there) = object(&mut all, &["metadata", field]) {
                there.entry(key).or_insert_with(|| value.clone());
            }
        }
    }
    let known: Vec<Rule> = each(&all, "/rules").filter_map(|rule| Rule::deserialize(rule).ok()).collect();
    let covered = |rule: &Value| Rule::deserialize(rule).is_ok_and(|rule| covers(&known, &rule));
    add(&mut all, &[], "rules", each(ours, "/rules").filter(|rule| !covered(rule)));
    let selectors = "/aggregationRule/clusterRoleSelectors";
    let missing = each(ours, selectors).filter(|one| !each(found, selectors).any(|other| other == *one));
    add(&mut all, &["aggregationRule"], "clusterRoleSelectors", missing);
    let subject = |one: &Value| ["kind", "namespace", "name"].map(|field| one.get(field).cloned().unwrap_or_default());
    let missing = each(ours, "/subjects").filter(|one| !each(found, "/subjects").any(|o| subject(o) == subject(one)));
    add(&mut all, &[], "subjects", missing);
    all
}

fn each<'a>(object: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    object.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

/// The object at this path, made where it is missing.
fn object<'a>(value: &'a mut Value, path: &[&str]) -> Option<&'a mut Map<String, Value>> {
    let mut at = value;
    for step in path {
        let next = at.as_object_mut()?.entry(*step).or_insert(Value::Null);
        if next.is_null() {
            *next = Value::Object(Map::new());
        }
        at = next;
    }
    at.as_object_mut()
}

fn add<'a>(value: &mut Value, path: &[&str], field: &str, missing: impl Iterator<Item = &'a Value>) {
    let missing: Vec<Value> = missing.cloned().collect();
    if missing.is_empty() {
        return;
    }
    let Some(parent) = object(value, path) else { return };
    match parent.entry(field).or_insert(Value::Null) {
        Value::Array(list) => list.extend(missing),
        other => *other = Value::Array(missing),
    }
}

/// Whether these rules together allow all that `rule` allows. An asterisk is only covered by an asterisk.
fn covers(known: &[Rule], rule: &Rule) -> bool {
    rule.verbs.iter().all(|verb| {
        let allowed = |action: Action<'_>| known.iter().any(|rule| rule.allows(&action));
        let paths = rule.non_resource_urls.iter().all(|path| allowed(Action { verb, path, ..Action::default() }));
        let resources = rule.api_groups.iter().all(|group| {
            rule.resources.iter().all(|resource| {
                let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
                allowed(Action { verb, group, resource, subresource, ..Action::default() })
            })
        });
        paths && resources
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
        json!({"apiGroups": groups, "resources": resources, "verbs": verbs})
    }

    #[test]
    fn a_role_gains_what_it_lacks_and_keeps_what_it_has() {
        let old = rule(&["kubevirt.io"], &["*"], &["*"]);
        let own = rule(&["example.com"], &["things"], &["get"]);
        let found = json!({"metadata": {"name": "r", "labels": {"a": "mine"}}, "rules": [old, own]});
        let new = rule(&["kubevirt.io", "godwit.io"], &["*"], &["*"]);
        let split = rule(&["kubevirt.io"], &["vms", "vms/status"], &["get"]);
        let ours = json!({"metadata": {"name": "r", "labels": {"a": "theirs", "b": "b"}}, "rules": [new, split]});
        let after = reconciled(&found, &ours);
        assert_eq!(after["rules"], json!([old, own, new]), "what a wider rule allows is not added");
        assert_eq!(after["metadata"]["labels"], json!({"a": "mine", "b": "b"}));
        assert_eq!(reconciled(&after, &ours), after, "once is enough");
    }

    #[test]
    fn an_asterisk_is_only_covered_by_an_asterisk() {
        let known = |rule: Value| vec![serde_json::from_value::<Rule>(rule).unwrap()];
        let all: Rule = serde_json::from_value(rule(&["*"], &["*"], &["*"])).unwrap();
        assert!(covers(&known(rule(&["*"], &["*"], &["*"])), &all));
        assert!(!covers(&known(rule(&[""], &["*"], &["*"])), &all));
        assert!(!covers(&known(rule(&["*"], &["pods"], &["*"])), &all));
        assert!(!covers(&known(rule(&["*"], &["*"], &["get"])), &all));
        let named = json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["get"], "resourceNames": ["a"]});
        assert!(!covers(&known(named), &serde_json::from_value(rule(&[""], &["pods"], &["get"])).unwrap()));
        let path: Rule = serde_json::from_value(json!({"nonResourceURLs": ["/healthz"], "verbs": ["get"]})).unwrap();
        assert!(!covers(&known(rule(&["*"], &["*"], &["*"])), &path));
    }

    #[test]
    fn bindings_gain_subjects_and_aggregated_roles_selectors() {
        let group = |name: &str| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": name});
        let after = reconciled(&json!({"subjects": [group("mine")]}), &json!({"subjects": [group("ours")]}));
        assert_eq!(after["subjects"], json!([group("mine"), group("ours")]));
        let selectors = json!({"aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"a": "b"}}]}});
        let after = reconciled(&json!({"rules": null}), &selectors);
        assert_eq!(after["aggregationRule"], selectors["aggregationRule"]);
    }

    #[test]
    fn who_wants_it_to_stay_says_so() {
        let found = json!({"metadata": {"annotations": {AUTOUPDATE: "false"}}, "rules": []});
        let ours =
            json!({"metadata": {"annotations": {AUTOUPDATE: "true"}}, "rules": [rule(&[""], &["pods"], &["get"])]});
        assert_eq!(reconciled(&found, &ours), found);
    }
}
