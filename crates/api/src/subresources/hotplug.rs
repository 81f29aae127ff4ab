//! KubeVirt's subresources `addvolume` and `removevolume`: what they make of a VMI or of a VM's template.
//!
//! A VMI that a VM has made gets its disks from the VM (KubeVirt's `DeclarativeHotplugVolumes`, on by default): there the VM's
//! template is changed, and the controller brings the running VMI in step.

use serde_json::{Value, json};

use super::{Deed, INSTANCES, MACHINES, Patch, Refusal, Request, Write, bad, conflict, dry_run};
use crate::admission::{Cause, object_at, spec};
use crate::vmi::{Disk, VirtualMachineInstanceSpec, Volume};
use crate::{VirtualMachine, VirtualMachineInstance, VmiPhase};

/// Puts a disk into a machine.
pub const ADD: &str = "addvolume";
/// Takes a disk out of it.
pub const REMOVE: &str = "removevolume";

/// Said of guests that cannot be given a disk.
const NO_PLACE: &str = "the guest was started without a place for disks that come while it runs, because of \
                        disableHotplug or by an older version; start it anew";
/// The bus of disks that come while the guest runs.
const BUS: &str = "scsi";

/// Which machine is asked about.
#[derive(Clone, Copy, Debug)]
pub enum Machine<'a> {
    /// One that runs, without a VM behind it.
    Instance(&'a Value),
    /// A VM, whose template counts.
    Vm(&'a Value),
}

pub(super) fn decide(request: &Request<'_>) -> Result<Deed, Refusal> {
    let (kind, singular, resource) = match request.resource {
        MACHINES => ("VirtualMachine", "virtualmachine", MACHINES),
        _ => ("VirtualMachineInstance", "virtualmachineinstance", INSTANCES),
    };
    let found = request.lookup.get(kind, request.namespace, request.name);
    let object = found.ok_or(Refusal::NotFound(singular))?;
    let machine = if resource == INSTANCES { Machine::Instance(&object) } else { Machine::Vm(&object) };
    let patch = patch(machine, request.action, request.body)?;
    let values: Vec<String> = match request.body.get("dryRun") {
        Some(values) => serde_json::from_value(values.clone()).map_err(|error| bad(format!("dryRun: {error}")))?,
        None => Vec::new(),
    };
    let write = Write::Patch(Patch { resource, name: request.name.to_owned(), status: false, patch });
    Ok(Deed { code: 202, writes: vec![write], dry_run: dry_run(&values)? })
}

/// The merge patch that a request makes of a machine: of an object that is read at `metadata.resourceVersion`, which it carries.
/// `action` is [`ADD`] or [`REMOVE`], `options` the request's body.
///
/// # Errors
/// When the request, or the machine as it is, does not allow it.
pub fn patch(machine: Machine<'_>, action: &str, options: &Value) -> Result<Value, Refusal> {
    let (object, at) = match machine {
        Machine::Instance(object) => (object, "/spec"),
        Machine::Vm(object) => (object, "/spec/template/spec"),
    };
    let name = options.get("name").and_then(Value::as_str).unwrap_or_default();
    let wish = match action {
        ADD => Wish::Add(Box::new(asked_for(name, options)?)),
        _ if name.is_empty() => return Err(bad("RemoveVolumeOptions requires name to be set")),
        _ => Wish::Remove(name),
    };
    let mut raw = object.pointer(at).cloned().unwrap_or_else(|| json!({}));
    let old: VirtualMachineInstanceSpec = serde_json::from_value(raw.clone()).map_err(|e| bad(e.to_string()))?;
    if let Machine::Instance(object) = machine {
        let vmi: VirtualMachineInstance = serde_json::from_value(object.clone()).map_err(|e| bad(e.to_string()))?;
        allows_change(&vmi, &wish)?;
    } else {
        serde_json::from_value::<VirtualMachine>(object.clone()).map_err(|e| bad(e.to_string()))?;
    }
    match &wish {
        Wish::Add(added) => {
            let (disk, volume) = added.as_ref();
            let claim = claim_of(volume);
            if old.volumes.iter().any(|one| one.name == volume.name) {
                return Err(conflict(format!(
                    "Unable to add volume [{}] because volume with that name already exists",
                    volume.name
                )));
            }
            if old.volumes.iter().any(|one| claim_of(one) == claim) {
                let claim = claim.unwrap_or_default();
                return Err(conflict(format!("Unable to add volume source [{claim}] because it already exists")));
            }
            push(&mut raw, &["volumes"], json!(volume));
            push(&mut raw, &["domain", "devices", "disks"], json!(disk));
            let new: VirtualMachineInstanceSpec =
                serde_json::from_value(raw.clone()).map_err(|e| bad(e.to_string()))?;
            // What was wrong before is not this request's affair.
            let (mut before, mut after) = (Vec::new(), Vec::new());
            spec::check(&old, "spec", &mut before);
            spec::check(&new, "spec", &mut after);
            after.retain(|cause| !before.contains(cause));
            if !after.is_empty() {
                return Err(Refusal::Invalid(after));
            }
        }
        Wish::Remove(wanted) => {
            let fits = |one: &&Volume| one.name == *wanted || claim_of(one) == Some(wanted);
            let Some(volume) = old.volumes.iter().find(fits) else {
                return Err(conflict(format!("Unable to remove volume [{wanted}] because it does not exist")));
            };
            if !volume.is_hotpluggable() {
                return Err(conflict(format!(
                    "Unable to remove volume [{}] because it is not hotpluggable",
                    volume.name
                )));
            }
            drop_named(&mut raw, "/volumes", &volume.name);
            drop_named(&mut raw, "/domain/devices/disks", &volume.name);
        }
    }
    let list = |path: &str| raw.pointer(path).cloned().unwrap_or_else(|| json!([]));
    let changed =
        json!({ "volumes": list("/volumes"), "domain": {"devices": {"disks": list("/domain/devices/disks")}} });
    let spec = match machine {
        Machine::Instance(_) => changed,
        Machine::Vm(_) => json!({ "template": {"spec": changed} }),
    };
    Ok(json!({ "metadata": {"resourceVersion": object.pointer("/metadata/resourceVersion")}, "spec": spec }))
}

/// What is to become of a machine.
enum Wish<'a> {
    Add(Box<(Disk, Volume)>),
    Remove(&'a str),
}

/// Whether the disks of a VMI can be changed now.
fn allows_change(vmi: &VirtualMachineInstance, wish: &Wish<'_>) -> Result<(), Refusal> {
    let (namespace, name) = vmi.namespaced_name();
    let owners = vmi.metadata.owner_references.iter().flatten();
    if owners.into_iter().any(|owner| owner.kind == "VirtualMachine" && owner.controller == Some(true)) {
        return Err(bad(format!("VMI {namespace}/{name} is owned by a VM")));
    }
    if vmi.status.phase != VmiPhase::Running || vmi.is_deleting() {
        return Err(conflict("VMI is not running"));
    }
    // Both ends have to have the same disks. (KubeVirt takes it and has the migration fail.)
    let state = vmi.status.migration_state.as_ref();
    let moves = state.is_some_and(|state| {
        state.migration_uid.as_deref().is_some_and(|uid| !uid.is_empty()) && state.completed != Some(true)
    });
    if moves || !vmi.has_arrived() && state.is_some_and(|state| state.failed != Some(true)) {
        return Err(conflict("the guest is being migrated; its disks can be changed when that is over"));
    }
    if matches!(wish, Wish::Add(_)) && !vmi.takes_disks() {
        return Err(conflict(NO_PLACE));
    }
    if let Wish::Add(added) = wish
        && let (_, volume) = added.as_ref()
        && vmi.status.volume_status.iter().any(|status| status.name == volume.name && status.hotplug_volume.is_some())
        && !vmi.spec.volumes.iter().any(|one| one.name == volume.name)
    {
        let text =
            format!("Unable to add volume [{}] because the one of that name is still being removed", volume.name);
        return Err(conflict(text));
    }
    Ok(())
}

/// The disk and the volume that are asked for.
fn asked_for(name: &str, options: &Value) -> Result<(Disk, Volume), Refusal> {
    let given = |key: &str| options.get(key).filter(|value| !value.is_null());
    if name.is_empty() {
        return Err(bad("AddVolumeOptions requires name to be set"));
    }
    let Some(disk) = given("disk") else { return Err(bad("AddVolumeOptions requires disk to not be nil")) };
    let Some(source) = given("volumeSource") else {
        return Err(bad("AddVolumeOptions requires VolumeSource to not be nil"));
    };
    let invalid = |field: &str, text: String| Refusal::Invalid(vec![Cause::invalid(field, text)]);
    if source.get("dataVolume").is_some_and(|volume| !volume.is_null()) {
        let text = format!("volume {name}: DataVolumes are not implemented by godwit; name its PersistentVolumeClaim");
        return Err(invalid("volumeSource.dataVolume", text));
    }
    let mut disk = disk.clone();
    let mut volume = source.clone();
    let (Some(disk_map), Some(volume_map)) = (disk.as_object_mut(), volume.as_object_mut()) else {
        return Err(bad("AddVolumeOptions: disk and volumeSource are objects"));
    };
    disk_map.insert("name".to_owned(), json!(name));
    volume_map.insert("name".to_owned(), json!(name));
    if let Some(claim) = object_at(&mut volume, "persistentVolumeClaim").and_then(Value::as_object_mut) {
        claim.insert("hotpluggable".to_owned(), json!(true));
    }
    let mut causes = Vec::new();
    let whole = json!({"volumes": [volume], "domain": {"devices": {"disks": [disk]}}});
    spec::unimplemented(&whole, "spec", &mut causes, &mut Vec::new());
    if !causes.is_empty() {
        return Err(Refusal::Invalid(causes));
    }
    let unreadable = |error: serde_json::Error| bad(format!("AddVolumeOptions cannot be read: {error}"));
    let disk: Disk = serde_json::from_value(disk).map_err(unreadable)?;
    let volume: Volume = serde_json::from_value(volume).map_err(unreadable)?;
    if claim_of(&volume).is_none_or(str::is_empty) {
        return Err(invalid("volumeSource", format!("volume {name} is not a PVC or DataVolume")));
    }
    match (&disk.disk, disk.bus()) {
        (Some(_), Some(BUS)) => Ok((disk, volume)),
        // A machine has no free places for controllers of its own.
        (Some(_), bus) => {
            let bus = bus.unwrap_or_default();
            let text = format!(
                "Hotplug configuration for disk [{name}] requires bus to be '{BUS}'. [{bus}] is not permitted."
            );
            Err(invalid("disk", text))
        }
        (None, _) => {
            let text = format!("Hotplug configuration for [{name}] requires diskDevice of type 'disk' to be used.");
            Err(invalid("disk", text))
        }
    }
}

fn claim_of(volume: &Volume) -> Option<&str> {
    volume.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.as_str())
}

/// Appends to a list below `value` that may be missing.
fn push(value: &mut Value, path: &[&str], item: Value) {
    match path {
        [] => {}
        [list] => {
            if let Some(map) = value.as_object_mut() {
                let list = map.entry(*list).or_insert(Value::Null);
                match list.as_array_mut() {
                    Some(items) => items.push(item),
                    None => *list = json!([item]),
                }
            }
        }
        [key, rest @ ..] => {
            if let Some(below) = object_at(value, key) {
                push(below, rest, item);
            }
        }
    }
}

fn drop_named(value: &mut Value, path: &str, name: &str) {
    if let Some(items) = value.pointer_mut(path).and_then(Value::as_array_mut) {
        items.retain(|item| item.get("name").and_then(Value::as_str) != Some(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::vmi;

    fn options(name: &str, claim: &str) -> Value {
        json!({
            "name": name, "disk": {"disk": {"bus": "scsi"}, "serial": "S-1"},
            "volumeSource": {"persistentVolumeClaim": {"claimName": claim}},
        })
    }

    fn running() -> Value {
        let mut vmi = vmi("db");
        vmi["metadata"]["resourceVersion"] = json!("7");
        vmi["status"]["machineRevision"] = json!(2);
        vmi
    }

    fn add(vmi: &Value, options: &Value) -> Result<Value, Refusal> {
        patch(Machine::Instance(vmi), ADD, options)
    }

    #[test]
    fn a_disk_is_added_behind_the_others_and_removed_by_its_name_or_its_claims() {
        let vmi = running();
        let patched = add(&vmi, &options("data", "claim")).unwrap();
        assert_eq!(patched["metadata"]["resourceVersion"], "7");
        assert_eq!(
            patched["spec"]["volumes"],
            json!([
                {"name": "root", "persistentVolumeClaim": {"claimName": "root"}},
                {"name": "data", "persistentVolumeClaim": {"claimName": "claim", "hotpluggable": true}},
            ])
        );
        assert_eq!(patched["spec"]["domain"]["devices"]["disks"][1]["name"], "data");
        assert_eq!(patched["spec"]["domain"]["devices"]["disks"][1]["serial"], "S-1");
        let mut with = vmi.clone();
        with["spec"]["volumes"] = patched["spec"]["volumes"].clone();
        with["spec"]["domain"]["devices"]["disks"] = patched["spec"]["domain"]["devices"]["disks"].clone();
        for name in ["data", "claim"] {
            let without = patch(Machine::Instance(&with), REMOVE, &json!({"name": name})).unwrap();
            assert_eq!(without["spec"]["volumes"], vmi["spec"]["volumes"]);
            assert_eq!(without["spec"]["domain"]["devices"]["disks"], vmi["spec"]["domain"]["devices"]["disks"]);
        }
        let vm = json!({"metadata": {"resourceVersion": "3"}, "spec": {"template": {"spec": vmi["spec"]}}});
        let patched = patch(Machine::Vm(&vm), ADD, &options("data", "claim")).unwrap();
        assert_eq!(patched["spec"]["template"]["spec"]["volumes"][1]["name"], "data");
    }

    #[test]
    fn what_cannot_be_is_said_in_kubevirts_words() {
        let refused = |vmi: &Value, options: &Value| add(vmi, options).unwrap_err();
        let vmi = running();
        let said = |text: &str| Refusal::Conflict(text.to_owned());
        assert_eq!(
            refused(&vmi, &options("root", "claim")),
            said("Unable to add volume [root] because volume with that name already exists")
        );
        assert_eq!(
            refused(&vmi, &options("data", "root")),
            said("Unable to add volume source [root] because it already exists")
        );
        let remove = |name: &str| patch(Machine::Instance(&vmi), REMOVE, &json!({"name": name})).unwrap_err();
        assert_eq!(remove("gone"), said("Unable to remove volume [gone] because it does not exist"));
        assert_eq!(remove("root"), said("Unable to remove volume [root] because it is not hotpluggable"));
        assert_eq!(remove(""), Refusal::BadRequest("RemoveVolumeOptions requires name to be set".to_owned()));
        for (key, text) in [
            ("name", "AddVolumeOptions requires name to be set"),
            ("disk", "AddVolumeOptions requires disk to not be nil"),
            ("volumeSource", "AddVolumeOptions requires VolumeSource to not be nil"),
        ] {
            let mut without = options("data", "claim");
            without.as_object_mut().unwrap().remove(key);
            assert_eq!(refused(&vmi, &without), Refusal::BadRequest(text.to_owned()));
        }
        let change = |path: &str, value: Value| {
            let mut vmi = running();
            let (parent, key) = path.rsplit_once('/').unwrap();
            vmi.pointer_mut(parent).unwrap().as_object_mut().unwrap().insert(key.to_owned(), value);
            vmi
        };
        let wanted = options("data", "claim");
        assert_eq!(refused(&change("/status/phase", json!("Scheduled")), &wanted), said("VMI is not running"));
        let owner = json!([{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": "db", "uid": "u",
            "controller": true}]);
        let text = "VMI default/db is owned by a VM".to_owned();
        assert_eq!(refused(&change("/metadata/ownerReferences", owner), &wanted), Refusal::BadRequest(text));
        let moving = json!({"migrationUid": "m", "sourceNode": "a", "targetNode": "b"});
        let Refusal::Conflict(text) = refused(&change("/status/migrationState", moving), &wanted) else { panic!() };
        assert!(text.contains("being migrated"), "{text}");
        let leaving = json!([{"name": "data", "target": "sda", "phase": "Detaching", "hotplugVolume": {}}]);
        let Refusal::Conflict(text) = refused(&change("/status/volumeStatus", leaving), &wanted) else { panic!() };
        assert!(text.contains("still being removed"), "{text}");
        let without_place = change("/spec/domain/devices/disableHotplug", json!(true));
        assert_eq!(refused(&without_place, &wanted), said(NO_PLACE));
        assert_eq!(refused(&change("/status/machineRevision", json!(1)), &wanted), said(NO_PLACE));
    }

    #[test]
    fn only_claims_on_scsi_are_taken() {
        let vmi = running();
        let invalid = |options: Value| match add(&vmi, &options).unwrap_err() {
            Refusal::Invalid(causes) => causes[0].message.clone(),
            other => panic!("{other:?}"),
        };
        let mut virtio = options("data", "claim");
        virtio["disk"] = json!({"disk": {"bus": "virtio"}});
        assert_eq!(
            invalid(virtio),
            "Hotplug configuration for disk [data] requires bus to be 'scsi'. [virtio] is not permitted."
        );
        let mut lun = options("data", "claim");
        lun["disk"] = json!({"lun": {"bus": "scsi"}});
        assert!(!invalid(lun).is_empty());
        let mut data_volume = options("data", "claim");
        data_volume["volumeSource"] = json!({"dataVolume": {"name": "claim"}});
        assert!(invalid(data_volume).contains("DataVolumes are not implemented"));
        let mut other = options("data", "claim");
        other["volumeSource"] = json!({"emptyDisk": {"capacity": "1Mi"}});
        assert!(invalid(other).contains("is not a PVC or DataVolume"));
        let mut cache = options("data", "claim");
        cache["disk"]["cache"] = json!("never");
        assert!(invalid(cache).contains("cache"));
        assert!(!invalid(options("Not A Label", "claim")).is_empty());
    }
}
