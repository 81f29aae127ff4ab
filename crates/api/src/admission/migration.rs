//! VirtualMachineInstanceMigration on its way in.

use serde_json::{Value, json};

use super::{Cause, Denial, Operation, Request, Verdict, add_finalizer, configured, label, object_at, read};
use crate::access::CONTROLLER;
use crate::gates::LIVE_MIGRATION;
use crate::names::conditions::LIVE_MIGRATABLE;
use crate::names::{ANNOTATION_BANDWIDTH, ANNOTATION_REQUESTED_BY, FINALIZER_MIGRATION, LABEL_VMI_NAME};
use crate::names::{ANNOTATION_LATEST_OBSERVED_API_VERSION, ANNOTATION_STORAGE_OBSERVED_API_VERSION};
use crate::{VirtualMachineInstanceMigration, Vmi};

const CREATE: &str = "migration-create-validator.kubevirt.io";
const UPDATE: &str = "migration-update-validator.kubevirt.io";

/// At the creation: the finalizer that makes deleting a cancellation, the label by which the VMI's migrations are found, and
/// who asked. Who asked stays, whatever an update says.
pub(super) fn mutate(request: &Request<'_>, object: &mut Value) {
    match request.operation {
        Operation::Create => {
            add_finalizer(object, FINALIZER_MIGRATION);
            // Godwit's own accounts may ask in somebody's name: `virtctl migrate` does not make the migration itself.
            if !request.is_own() || annotation(object, ANNOTATION_REQUESTED_BY).is_none() {
                set_metadata(object, "annotations", ANNOTATION_REQUESTED_BY, Some(&request.user.name));
            }
            // KubeVirt's controller writes these; here it is spared the write
            for key in [ANNOTATION_LATEST_OBSERVED_API_VERSION, ANNOTATION_STORAGE_OBSERVED_API_VERSION] {
                set_metadata(object, "annotations", key, Some("v1"));
            }
            let vmi = object.pointer("/spec/vmiName").and_then(Value::as_str).unwrap_or_default().to_owned();
            if !vmi.is_empty() {
                set_metadata(object, "labels", LABEL_VMI_NAME, Some(&vmi));
            }
        }
        Operation::Update => {
            let old = request.old_object.unwrap_or(&Value::Null);
            let before = annotation(old, ANNOTATION_REQUESTED_BY);
            if annotation(object, ANNOTATION_REQUESTED_BY) != before {
                set_metadata(object, "annotations", ANNOTATION_REQUESTED_BY, before);
            }
        }
        Operation::Delete => {}
    }
}

/// Sets or removes one label or annotation.
fn set_metadata(object: &mut Value, map: &str, key: &str, value: Option<&str>) {
    let metadata = object_at(object, "metadata");
    let map = metadata.and_then(|metadata| object_at(metadata, map)).and_then(Value::as_object_mut);
    match (map, value) {
        (Some(map), Some(value)) => drop(map.insert(key.to_owned(), json!(value))),
        (Some(map), None) => drop(map.remove(key)),
        (None, _) => {}
    }
}

fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object.get("metadata")?.get("annotations")?.get(key)?.as_str()
}

pub(super) fn validate(request: &Request<'_>) -> Verdict {
    let Some(object) = request.object else { return Ok(Vec::new()) };
    match request.operation {
        Operation::Create => create(request, object),
        Operation::Update => update(object, request.old_object.unwrap_or(&Value::Null)),
        Operation::Delete => Ok(Vec::new()),
    }
}

/// A bandwidth that cannot be is refused where somebody says it.
fn check_bandwidth(webhook: &'static str, object: &Value) -> Result<(), Box<Denial>> {
    let Some(said) = annotation(object, ANNOTATION_BANDWIDTH) else { return Ok(()) };
    let Err(error) = crate::Quantity(said.to_owned()).bytes() else { return Ok(()) };
    let field = format!("metadata.annotations[{ANNOTATION_BANDWIDTH}]");
    let text = error.to_string();
    Err(Box::new(Denial::causes(webhook, vec![Cause::invalid(&field, text)])))
}

fn create(request: &Request<'_>, object: &Value) -> Verdict {
    let migration: VirtualMachineInstanceMigration = read(CREATE, object)?;
    check_bandwidth(CREATE, object)?;
    let plain = |message: String| Err(Box::new(Denial::plain(CREATE, message)));
    let cause = |cause: Cause| Err(Box::new(Denial::causes(CREATE, vec![cause])));
    if migration.vmi_name().is_empty() {
        return cause(Cause::required("spec.vmiName", "vmiName is missing"));
    }
    if migration.spec.priority.is_some() && !request.is_of(CONTROLLER) {
        let text = "Migration priority queue, only virt-controller is allowed to set priority field";
        return cause(Cause::invalid("spec.migrationPriority", text));
    }
    if !configured(request).gates.live_migration() {
        return plain(format!("{LIVE_MIGRATION} feature gate is not enabled in kubevirt resource"));
    }
    if migration.spec.send_to.is_some() || migration.spec.receive.is_some() {
        let text = "migration between clusters or namespaces (spec.sendTo, spec.receive) is not implemented by godwit: \
                    remove it, the migration then stays in this cluster";
        let field = if migration.spec.send_to.is_some() { "spec.sendTo" } else { "spec.receive" };
        return cause(Cause::unsupported(field, text));
    }
    let (namespace, name) = (request.namespace, migration.vmi_name());
    let Some(vmi) = request.lookup.get("VirtualMachineInstance", namespace, name) else {
        return plain(format!("the VMI \"{namespace}/{name}\" does not exist"));
    };
    let vmi: Vmi = read(CREATE, &vmi)?;
    if vmi.is_final() {
        return plain("Cannot migrate VMI in finalized state.".to_owned());
    }
    if let Some(condition) = vmi.condition(LIVE_MIGRATABLE).filter(|condition| condition.is_false()) {
        let (reason, message) = (condition.reason.as_deref(), condition.message.as_deref());
        return plain(format!(
            "Cannot migrate VMI, Reason: {}, Message: {}",
            reason.unwrap_or_default(),
            message.unwrap_or_default()
        ));
    }
    for other in request.lookup.list("VirtualMachineInstanceMigration", namespace, Some((LABEL_VMI_NAME, name))) {
        let phase = other.pointer("/status/phase").and_then(Value::as_str).unwrap_or_default();
        if !crate::MigrationPhase::from(phase).is_final() {
            let uid = other.pointer("/metadata/uid").and_then(Value::as_str).unwrap_or_default();
            return plain(format!(
                "in-flight migration detected. Active migration job ({uid}) is currently already in progress for VMI \
                 {name}."
            ));
        }
    }
    Ok(Vec::new())
}

fn update(object: &Value, old: &Value) -> Verdict {
    if object.get("spec") != old.get("spec") {
        let text = "update of Migration object's spec is restricted";
        return Err(Box::new(Denial::causes(UPDATE, vec![Cause::unsupported("spec", text)])));
    }
    if annotation(object, ANNOTATION_BANDWIDTH) != annotation(old, ANNOTATION_BANDWIDTH) {
        check_bandwidth(UPDATE, object)?;
    }
    let phase = old.pointer("/status/phase").and_then(Value::as_str).unwrap_or_default();
    let Some(before) = label(old, LABEL_VMI_NAME).filter(|_| !crate::MigrationPhase::from(phase).is_final()) else {
        return Ok(Vec::new());
    };
    let text = match label(object, LABEL_VMI_NAME) {
        None => "selector label can't be removed from an in-flight migration",
        Some(after) if after != before => "selector label can't be modified on an in-flight migration",
        Some(_) => return Ok(Vec::new()),
    };
    Err(Box::new(Denial::causes(UPDATE, vec![Cause::unsupported("metadata.labels", text)])))
}
