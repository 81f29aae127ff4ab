//! VirtualMachineInstance on its way in.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{
    Cause, Denial, Operation, Request, Verdict, add_finalizer, configured, object_at, read, set_default, spec,
};
use crate::access::HANDLER;
use crate::gates::NODE_RESTRICTION;
use crate::kubevirt::KubeVirtConfiguration;
use crate::names::{ANNOTATION_HOME, ANNOTATION_IGNITION, FINALIZER_VMI, LABEL_NODE_NAME, RESERVED_VMI_LABELS};
use crate::{Quantity, VirtualMachineInstance};

const CREATE: &str = "virtualmachineinstances-create-validator.kubevirt.io";
const UPDATE: &str = "virtualmachineinstances-update-validator.kubevirt.io";

/// The machine type of a VMI that names none.
pub(super) const DEFAULT_MACHINE: &str = "q35";
/// The bus of a disk that names none, as in KubeVirt.
const DEFAULT_BUS: &str = "sata";
/// Seconds between the power button and the kill.
const DEFAULT_GRACE_SECONDS: i64 = 30;

pub(super) fn mutate(request: &Request<'_>, object: &mut Value) {
    match request.operation {
        Operation::Create => {
            add_finalizer(object, FINALIZER_VMI);
            // nobody brings a status along
            if let Some(object) = object.as_object_mut() {
                object.insert("status".to_owned(), json!({ "phase": "Pending", "runtimeUser": 0 }));
            }
            let configuration = configured(request).configuration;
            let (namespace, name) = (request.namespace, request.name);
            if let Some(spec) = object_at(object, "spec") {
                complete_spec(spec, namespace, name, configuration.as_ref());
            }
        }
        Operation::Update if !request.is_own() => {
            // A manifest that is applied again replaces lists as a whole, and with them the defaults in their items: they
            // are completed as they were at the creation, so that the same manifest is the same spec.
            let configuration = configured(request).configuration;
            if let Some(spec) = object_at(object, "spec") {
                complete_spec(spec, request.namespace, request.name, configuration.as_ref());
            }
            // a VMI has no status subresource: what others write into the status is undone without a word
            let before = request.old_object.and_then(|old| old.get("status")).cloned();
            if let Some(object) = object.as_object_mut() {
                match before {
                    Some(before) => object.insert("status".to_owned(), before),
                    None => object.remove("status"),
                };
            }
        }
        Operation::Update | Operation::Delete => {}
    }
}

/// Fills in what a VMI's spec leaves open, as KubeVirt does. Whatever has an unexpected type is left for validation.
pub(super) fn complete_spec(
    spec: &mut Value,
    namespace: &str,
    name: &str,
    configuration: Option<&KubeVirtConfiguration>,
) {
    set_default(spec, "terminationGracePeriodSeconds", json!(DEFAULT_GRACE_SECONDS));
    set_default(spec, "architecture", json!("amd64"));
    networks(spec, configuration);
    let Some(domain) = object_at(spec, "domain") else { return };
    if let Some(machine) = object_at(domain, "machine") {
        let configured = configuration.and_then(|configuration| configuration.machine_type.as_deref());
        set_default(machine, "type", json!(configured.unwrap_or(DEFAULT_MACHINE)));
    }
    cpu(domain, configuration);
    let acpi = object_at(domain, "features").and_then(|features| object_at(features, "acpi"));
    if let Some(acpi) = acpi {
        set_default(acpi, "enabled", json!(true));
    }
    if let Some(firmware) = object_at(domain, "firmware").filter(|_| !name.is_empty()) {
        set_default(firmware, "uuid", json!(crate::derived_firmware_uuid(namespace, name)));
    }
    memory(domain);
    let Some(devices) = object_at(domain, "devices") else { return };
    for disk in items(devices, "disks") {
        disk_defaults(disk);
    }
    for interface in items(devices, "interfaces") {
        set_default(interface, "model", json!("virtio"));
    }
}

/// One virtual CPU, or as many sockets as the pod asks for whole CPUs when no topology is given (as KubeVirt).
fn cpu(domain: &mut Value, configuration: Option<&KubeVirtConfiguration>) {
    let asked = |list: &str| {
        let value = domain.pointer(&format!("/resources/{list}/cpu"))?.clone();
        serde_json::from_value::<Quantity>(value).ok()?.bytes().ok().and_then(|count| u32::try_from(count).ok())
    };
    let sockets = asked("limits").or_else(|| asked("requests")).unwrap_or(1).max(1);
    let Some(cpu) = object_at(domain, "cpu") else { return };
    let unset = |cpu: &Value, part: &str| cpu.get(part).is_none_or(|count| count.is_null() || *count == json!(0));
    let parts = ["cores", "sockets", "threads"];
    let no_topology = parts.iter().all(|part| unset(cpu, part));
    for part in parts {
        let default = if part == "sockets" && no_topology { sockets } else { 1 };
        if unset(cpu, part)
            && let Some(cpu) = cpu.as_object_mut()
        {
            cpu.insert(part.to_owned(), json!(default));
        }
    }
    if let Some(model) = configuration.and_then(|configuration| configuration.cpu_model.as_deref()) {
        set_default(cpu, "model", json!(model));
    }
}

fn items<'a>(value: &'a mut Value, list: &str) -> impl Iterator<Item = &'a mut Value> {
    value.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten()
}

fn is_empty_list(value: &Value, list: &str) -> bool {
    match value.get(list) {
        None | Some(Value::Null) => true,
        Some(Value::Array(items)) => items.is_empty(),
        Some(_) => false,
    }
}

/// A VMI that says nothing of networks gets the pod network.
fn networks(spec: &mut Value, configuration: Option<&KubeVirtConfiguration>) {
    let Some(devices) = spec.pointer("/domain/devices") else { return };
    let wanted = devices.get("autoattachPodInterface") != Some(&Value::Bool(false));
    let said = !is_empty_list(spec, "networks") || !is_empty_list(devices, "interfaces");
    if !wanted || said {
        return;
    }
    let binding = configuration
        .and_then(|configuration| configuration.network_configuration.as_ref())
        .and_then(|network| network.default_network_interface.as_deref())
        .filter(|binding| *binding == "bridge")
        .unwrap_or("masquerade");
    if let Some(devices) = spec.pointer_mut("/domain/devices").and_then(Value::as_object_mut) {
        devices.insert("interfaces".to_owned(), json!([{ "name": "default", binding: {} }]));
        if let Some(spec) = spec.as_object_mut() {
            spec.insert("networks".to_owned(), json!([{ "name": "default", "pod": {} }]));
        }
    }
}

/// The guest's memory and the pod's request say the same where only one is given.
fn memory(domain: &mut Value) {
    let given = |path: &str| domain.pointer(path).filter(|value| value.is_string() || value.is_number()).cloned();
    let guest = given("/memory/guest");
    let request = given("/resources/requests/memory");
    let limit = given("/resources/limits/memory");
    let Some(size) = guest.or_else(|| request.clone()).or_else(|| limit.clone()) else { return };
    if let Some(memory) = object_at(domain, "memory") {
        set_default(memory, "guest", size.clone());
    }
    let requests = object_at(domain, "resources").and_then(|resources| object_at(resources, "requests"));
    if let Some(requests) = requests {
        set_default(requests, "memory", limit.unwrap_or(size));
    }
}

fn disk_defaults(disk: &mut Value) {
    let has = |kind: &str| disk.get(kind).is_some_and(|target| !target.is_null());
    // a floppy is refused by validation, it must not look like a disk as well
    let kind = ["disk", "cdrom", "lun", "floppy"].into_iter().find(|kind| has(kind));
    match kind {
        Some("floppy") => {}
        Some(kind) => {
            if let Some(target) = disk.get_mut(kind) {
                set_default(target, "bus", json!(DEFAULT_BUS));
                if kind == "cdrom" {
                    set_default(target, "readonly", json!(true));
                }
            }
        }
        None => {
            if let Some(disk) = disk.as_object_mut() {
                disk.insert("disk".to_owned(), json!({ "bus": DEFAULT_BUS }));
            }
        }
    }
}

pub(super) fn validate(request: &Request<'_>) -> Verdict {
    let Some(object) = request.object else { return Ok(Vec::new()) };
    match request.operation {
        Operation::Create => create(request, object),
        Operation::Update => update(request, object),
        Operation::Delete => Ok(Vec::new()),
    }
}

fn create(request: &Request<'_>, object: &Value) -> Verdict {
    let vmi: VirtualMachineInstance = read(CREATE, object)?;
    let mut causes = Vec::new();
    let mut warnings = Vec::new();
    if !request.is_own() {
        reserved_labels(vmi.metadata.labels.as_ref(), "metadata.labels", &mut causes);
        causes.extend(set_home(object, &Value::Null));
    }
    if let Some(ignition) = vmi.annotation(ANNOTATION_IGNITION) {
        let text = format!(
            "ExperimentalIgnitionSupport feature gate is not enabled in kubevirt-config, invalid entry {ignition}"
        );
        causes.push(Cause::invalid("metadata.annotations", text));
    }
    spec::unimplemented(object.get("spec").unwrap_or(&Value::Null), "spec", &mut causes, &mut warnings);
    spec::object_name(vmi.metadata.name.as_deref(), &mut causes);
    spec::check(&vmi.spec, "spec", &mut causes);
    if causes.is_empty() { Ok(warnings) } else { Err(Box::new(Denial { warnings, ..Denial::causes(CREATE, causes) })) }
}

fn update(request: &Request<'_>, object: &Value) -> Verdict {
    let old = request.old_object.unwrap_or(&Value::Null);
    if request.is_own() {
        let causes: Vec<Cause> = node_restriction(request, object, old).into_iter().chain(fixed(object, old)).collect();
        return if causes.is_empty() { Ok(Vec::new()) } else { Err(Box::new(Denial::causes(UPDATE, causes))) };
    }
    if object.get("spec") != old.get("spec") {
        let cause = Cause::unsupported("spec", "update of VMI object is restricted");
        return Err(Box::new(Denial::causes(UPDATE, vec![cause])));
    }
    let changed = |key: &&str| super::label(object, key) != super::label(old, key);
    if RESERVED_VMI_LABELS.iter().any(changed) {
        let text = "modification of the following reserved kubevirt.io/ labels on a VMI object is prohibited";
        return Err(Box::new(Denial::causes(UPDATE, vec![Cause::unsupported("metadata.labels", text)])));
    }
    match set_home(object, old) {
        Some(cause) => Err(Box::new(Denial::causes(UPDATE, vec![cause]))),
        None => Ok(Vec::new()),
    }
}

/// Only godwit says where a VM comes home to: it goes there by a migration that its editor may not ask for. Taken off, it stays.
fn set_home(object: &Value, old: &Value) -> Option<Cause> {
    let home = |object: &Value| Some(object.get("metadata")?.get("annotations")?.get(ANNOTATION_HOME)?.clone());
    let after = home(object).filter(|after| Some(after) != home(old).as_ref());
    let text = "the annotation godwit.io/home is set by godwit alone, it may only be removed";
    after.map(|_| Cause::unsupported("metadata.annotations", text))
}

/// A handler writes the VMIs of its node: where the guest is, where it comes from, where it goes to. (KubeVirt's source handler
/// is done before the node changes; here it still writes how the migration ended.)
fn node_restriction(request: &Request<'_>, object: &Value, old: &Value) -> Option<Cause> {
    if !request.is_of(HANDLER) || !configured(request).gates.is_open(NODE_RESTRICTION) {
        return None;
    }
    let refuse = |text: &str| Some(Cause::unsupported("", format!("Node restriction, virt-handler {text}")));
    let Some(node) = request.user.node() else { return refuse("service account is missing node name") };
    let state = |object: &Value, field: &str| Some(object.pointer(field)?.as_str()?.to_owned());
    let target = "/status/migrationState/targetNode";
    let places = ["/status/nodeName", "/status/migrationState/sourceNode", target];
    let is_here = places.into_iter().any(|place| state(old, place).as_deref() == Some(node))
        || super::label(old, LABEL_NODE_NAME) == Some(node);
    if !is_here {
        return refuse("is only allowed to modify VMIs it owns");
    }
    if state(object, target).is_some_and(|new| state(old, target) != Some(new)) {
        return refuse("is not allowed to set target node");
    }
    None
}

/// What not even godwit's own accounts change.
fn fixed(object: &Value, old: &Value) -> impl Iterator<Item = Cause> {
    [
        ("/spec/domain/cpu/maxSockets", "spec.domain.cpu.maxSockets", "CPU topology maxSockets changed"),
        ("/spec/domain/memory/maxGuest", "spec.domain.memory.maxGuest", "Memory maxGuest changed"),
    ]
    .into_iter()
    .filter(|(path, ..)| object.pointer(path) != old.pointer(path))
    .map(|(_, field, text)| Cause::unsupported(field, text))
    .collect::<Vec<_>>()
    .into_iter()
}

/// Labels by which godwit finds its own objects are godwit's.
pub(super) fn reserved_labels(labels: Option<&BTreeMap<String, String>>, field: &str, causes: &mut Vec<Cause>) {
    let reserved = |key: &String| RESERVED_VMI_LABELS.contains(&key.as_str());
    if labels.is_some_and(|labels| labels.keys().any(reserved)) {
        let text = "creation of the following reserved kubevirt.io/ labels on a VMI object is prohibited";
        causes.push(Cause::unsupported(field, text));
    }
}

/// The memory that the guest is given, as far as it is said: its own, or what the pod asks for.
pub(super) fn said_memory(domain: &crate::vmi::DomainSpec) -> Option<(&'static str, &Quantity)> {
    let guest = domain.memory.as_ref().and_then(|memory| memory.guest.as_ref()).map(|q| ("memory.guest", q));
    let request = domain.resources.requests.get("memory").map(|q| ("resources.requests.memory", q));
    let limit = domain.resources.limits.get("memory").map(|q| ("resources.limits.memory", q));
    guest.or(request).or(limit)
}
