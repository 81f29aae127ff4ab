//! Merge patches of typed objects, field by field: a patch that touches a few known fields needs no JSON form of the whole
//! object. Whatever is not known here takes the long way, with the same result (a test compares).

use std::collections::BTreeMap;
use std::sync::Arc;

use godwit_api::{VirtualMachineInstance, VirtualMachineInstanceMigration};
use godwit_control::Object;
use godwit_machinery::patch;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The object after the patch, or `None` when the long way must be taken.
pub fn patch(old: &Object, status: bool, body: &Value) -> Option<Object> {
    let body = body.as_object()?;
    if body.keys().any(|key| !matches!(key.as_str(), "metadata" | "status")) {
        return None;
    }
    match old {
        Object::VirtualMachineInstance(old) if !status => {
            let mut new = VirtualMachineInstance::clone(old);
            metadata(&mut new.metadata, body)?;
            vmi_status(&mut new, body)?;
            Some(Object::VirtualMachineInstance(Arc::new(new)))
        }
        Object::Migration(old) if status => {
            let mut new = VirtualMachineInstanceMigration::clone(old);
            migration_status(&mut new, body)?;
            Some(Object::Migration(Arc::new(new)))
        }
        Object::Migration(old) if !body.contains_key("status") => {
            let mut new = VirtualMachineInstanceMigration::clone(old);
            metadata(&mut new.metadata, body)?;
            Some(Object::Migration(Arc::new(new)))
        }
        Object::Pod(old) if status => {
            let mut new = Pod::clone(old);
            if let Some(change) = body.get("status") {
                field(&mut new.status, change)?;
            }
            Some(Object::Pod(Arc::new(new)))
        }
        _ => None,
    }
}

fn part<'a>(body: &'a Map<String, Value>, name: &str) -> Option<Option<&'a Map<String, Value>>> {
    match body.get(name) {
        None => Some(None),
        Some(Value::Object(map)) => Some(Some(map)),
        Some(_) => None,
    }
}

fn metadata(meta: &mut ObjectMeta, body: &Map<String, Value>) -> Option<()> {
    let Some(changes) = part(body, "metadata")? else { return Some(()) };
    for (key, value) in changes {
        match key.as_str() {
            "resourceVersion" => {}
            "labels" => texts(&mut meta.labels, value)?,
            "annotations" => texts(&mut meta.annotations, value)?,
            "finalizers" => field(&mut meta.finalizers, value)?,
            _ => return None,
        }
    }
    Some(())
}

fn texts(map: &mut Option<BTreeMap<String, String>>, changes: &Value) -> Option<()> {
    let Some(changes) = changes.as_object() else {
        *map = None;
        return changes.is_null().then_some(());
    };
    let map = map.get_or_insert_default();
    for (key, value) in changes {
        match value {
            Value::Null => drop(map.remove(key)),
            Value::String(text) => drop(map.insert(key.clone(), text.clone())),
            _ => return None,
        }
    }
    Some(())
}

fn vmi_status(vmi: &mut VirtualMachineInstance, body: &Map<String, Value>) -> Option<()> {
    let Some(changes) = part(body, "status")? else { return Some(()) };
    let status = &mut vmi.status;
    for (key, value) in changes {
        match key.as_str() {
            "phase" => field(&mut status.phase, value)?,
            "nodeName" => field(&mut status.node_name, value)?,
            "migrationState" => state(&mut status.migration_state, value)?,
            "conditions" => field(&mut status.conditions, value)?,
            _ => return None,
        }
    }
    Some(())
}

fn migration_status(migration: &mut VirtualMachineInstanceMigration, body: &Map<String, Value>) -> Option<()> {
    let Some(changes) = part(body, "status")? else { return Some(()) };
    let status = &mut migration.status;
    for (key, value) in changes {
        match key.as_str() {
            "phase" => field(&mut status.phase, value)?,
            "reason" => field(&mut status.reason, value)?,
            "message" => field(&mut status.message, value)?,
            "migrationState" => state(&mut status.migration_state, value)?,
            "conditions" => field(&mut status.conditions, value)?,
            "phaseTransitionTimestamps" => field(&mut status.phase_transition_timestamps, value)?,
            _ => return None,
        }
    }
    Some(())
}

/// The migration's state; its progress, which changes each second, by itself.
fn state(state: &mut Option<godwit_api::vmi::VirtualMachineInstanceMigrationState>, changes: &Value) -> Option<()> {
    match (state, changes.as_object()) {
        (Some(state), Some(changes)) if changes.len() == 1 && changes.contains_key("progress") => {
            field(&mut state.progress, changes.get("progress")?)
        }
        (state, _) => field(state, changes),
    }
}

/// One field by way of its JSON form. What is `null` or not there is the field's default.
fn field<T: Serialize + DeserializeOwned + Default>(field: &mut T, change: &Value) -> Option<()> {
    *field = match change {
        Value::Null => T::default(),
        Value::Object(_) => {
            let old = serde_json::to_value(&*field).ok()?;
            // The patch of nothing is what it says, without its nulls.
            let old = if old.is_null() { Value::Object(Map::new()) } else { old };
            serde_json::from_value(patch::merge_patch(&old, change).ok()?).ok()?
        }
        // Everything but an object is replaced whole.
        change => serde_json::from_value(change.clone()).ok()?,
    };
    Some(())
}

#[cfg(test)]
mod tests {
    use godwit_control::Kind;
    use serde_json::json;

    use super::*;

    fn long_way(old: &Object, body: &Value) -> Object {
        let value = patch::merge_patch(&old.to_value().unwrap(), body).unwrap();
        Object::from_value(old.kind(), value).unwrap()
    }

    #[test]
    fn the_short_way_leads_where_the_long_way_does() {
        let vmi = json!({
            "metadata": {"name": "a", "namespace": "n", "labels": {"x": "1", "y": "2"}, "finalizers": ["f"]},
            "status": {"phase": "Running", "nodeName": "node1", "conditions": [{"type": "Ready", "status": "True"}],
                "migrationState": {"migrationUid": "m", "startTimestamp": "2024-01-01T00:00:00Z", "progress": {"percent": 3}}},
        });
        let vmi = Object::from_value(Kind::VirtualMachineInstance, vmi).unwrap();
        for body in [
            json!({"metadata": {"labels": {"x": null, "z": "3"}, "finalizers": null}}),
            json!({"metadata": {"labels": null, "annotations": {"a": "b"}}}),
            json!({"status": {"phase": "Failed", "nodeName": null, "conditions": []}}),
            json!({"status": {"migrationState": {"progress": {"percent": 4, "bytesProcessed": 7}}}}),
            json!({"status": {"migrationState": {"completed": true, "startTimestamp": null, "progress": null}}}),
            json!({"status": {"migrationState": null}}),
        ] {
            let new = patch(&vmi, false, &body).unwrap_or_else(|| panic!("the long way is taken: {body}"));
            assert!(new.same_as(&long_way(&vmi, &body)), "{body}");
        }
        assert!(patch(&vmi, false, &json!({"spec": {}})).is_none());
        assert!(patch(&vmi, false, &json!({"metadata": {"name": "b"}})).is_none());

        let migration =
            json!({"metadata": {"name": "a", "namespace": "n"}, "status": {"phase": "Pending", "reason": "r"}});
        let migration = Object::from_value(Kind::Migration, migration).unwrap();
        for body in [
            json!({"status": {"phase": "Scheduling", "reason": null, "message": "m"}}),
            json!({"status": {"phaseTransitionTimestamps": [{"phase": "Pending"}], "migrationState": {"failed": true}}}),
        ] {
            let new = patch(&migration, true, &body).unwrap_or_else(|| panic!("the long way is taken: {body}"));
            assert!(new.same_as(&long_way(&migration, &body)), "{body}");
        }
    }
}
