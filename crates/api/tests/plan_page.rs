//! The page on plans tells of each member of one.

use godwit_api::drain::DrainPlan;
use serde_json::Value;

/// The names of all members of a type, and of those within.
fn names(schema: &Value, found: &mut Vec<String>) {
    match schema {
        Value::Object(map) => {
            let members = map.get("properties").and_then(Value::as_object);
            found.extend(members.into_iter().flat_map(|members| members.keys().cloned()));
            map.values().for_each(|value| names(value, found));
        }
        Value::Array(all) => all.iter().for_each(|value| names(value, found)),
        _ => {}
    }
}

#[test]
fn every_member_of_a_plan_is_documented() {
    let schema = serde_json::to_value(schemars::schema_for!(DrainPlan)).expect("JSON");
    let mut found = Vec::new();
    names(&schema, &mut found);
    assert!(found.contains(&"madeAt".to_owned()) && found.contains(&"targetNode".to_owned()), "{found:?}");
    let page = include_str!("../../../docs/drain.md");
    let missing: Vec<&String> = found.iter().filter(|name| !page.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/drain.md does not tell of {missing:?}");
}
