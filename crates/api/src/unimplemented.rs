//! Fields of KubeVirt's API that godwit knows and does not implement.
//!
//! They are part of the CRD schemas, so that strict validation lets them through to admission, which then answers each one
//! that is used: with a warning where the guest is the same without it, with a refusal where it would differ. Nothing is
//! ignored in silence.

use serde_json::Value;

/// What a guest is without the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The guest is the same; the user is warned.
    Harmless,
    /// The guest would be another one; the object is refused.
    GuestDiffers,
}

/// A known field that is not implemented.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Where, under the spec; `[]` is any item of a list.
    pub path: &'static str,
    /// What a guest is without it.
    pub effect: Effect,
    /// What it is for, to finish the sentence in the message.
    pub why: &'static str,
}

/// A known field that is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// The full path with list indexes, as `spec.domain.devices.disks[0].shareable`.
    pub path: String,
    /// What a guest is without it.
    pub effect: Effect,
    /// What it is for.
    pub why: &'static str,
}

impl Use {
    /// The text for the user: a warning or a refusal.
    pub fn message(&self) -> String {
        let (path, why) = (&self.path, self.why);
        match self.effect {
            Effect::Harmless => format!("{path}: not implemented by godwit, ignored ({why})"),
            Effect::GuestDiffers => {
                format!("{path}: not implemented by godwit, and the guest would differ without it ({why}); remove it")
            }
        }
    }
}

const fn harmless(path: &'static str, why: &'static str) -> Field {
    Field { path, effect: Effect::Harmless, why }
}

const fn differs(path: &'static str, why: &'static str) -> Field {
    Field { path, effect: Effect::GuestDiffers, why }
}

/// Known fields under a VMI's spec.
pub const VMI_FIELDS: &[Field] = &[
    harmless("livenessProbe", "the guest is not probed"),
    harmless("readinessProbe", "the guest is not probed"),
    harmless("dnsPolicy", "the guest gets the cluster's DNS"),
    harmless("dnsConfig", "the guest gets the cluster's DNS"),
    differs("accessCredentials", "keys and passwords would not be in the guest"),
    differs("resourceClaims", "dynamic resource allocation"),
    harmless("utilityVolumes", "utility volumes are not attached"),
    differs("domain.chassis", "SMBIOS chassis data"),
    differs("domain.launchSecurity", "confidential computing"),
    harmless("domain.ioThreadsPolicy", "threads are chosen by godwit"),
    harmless("domain.ioThreads", "threads are chosen by godwit"),
    differs("domain.rebootPolicy", "the guest reboots in place"),
    harmless("domain.cpu.maxSockets", "CPUs are not hotplugged"),
    harmless("domain.cpu.dedicatedCpuPlacement", "CPUs are not pinned"),
    harmless("domain.cpu.isolateEmulatorThread", "CPUs are not pinned"),
    harmless("domain.cpu.realtime", "CPUs are not pinned"),
    differs("domain.cpu.numa", "the guest's NUMA topology"),
    differs("domain.cpu.features", "single CPU features"),
    harmless("domain.memory.maxGuest", "memory is not hotplugged"),
    differs("domain.memory.hugepages", "huge pages"),
    harmless("domain.memory.reservedOverhead", "the overhead is computed"),
    harmless("domain.firmware.bootloader.bios.useSerial", "the firmware is silent on the serial console"),
    differs("domain.firmware.acpi", "ACPI tables"),
    harmless("domain.firmware.kernelBoot.container.imagePullSecret", "images are pulled without credentials"),
    harmless("domain.clock.timer.hyperv", "Hyper-V enlightenments"),
    harmless("domain.features.apic.endOfInterrupt", "QEMU's default"),
    differs("domain.features.hyperv", "Hyper-V enlightenments"),
    differs("domain.features.hypervPassthrough", "Hyper-V enlightenments"),
    differs("domain.features.kvm", "hiding KVM"),
    differs("domain.features.pvspinlock", "paravirtual spin locks"),
    differs("domain.devices.useVirtioTransitional", "transitional virtio devices"),
    differs("domain.devices.watchdog", "a watchdog device"),
    harmless("domain.devices.inputs", "the guest has a PS/2 keyboard and mouse"),
    harmless("domain.devices.autoattachInputDevice", "the guest has a PS/2 keyboard and mouse"),
    differs("domain.devices.autoattachVSOCK", "a VSOCK device"),
    harmless("domain.devices.logSerialConsole", "the serial console is not copied to the pod's log"),
    harmless("domain.devices.blockMultiQueue", "disks have one queue"),
    harmless("domain.devices.networkInterfaceMultiqueue", "interfaces have one queue"),
    harmless("domain.devices.clientPassthrough", "USB redirection needs a client connection"),
    harmless("domain.devices.video", "the guest's screen is a VGA device"),
    differs("domain.devices.gpus", "GPUs"),
    differs("domain.devices.hostDevices", "devices of the host"),
    differs("domain.devices.downwardMetrics", "host metrics in the guest"),
    differs("domain.devices.panicDevices", "panic devices"),
    differs("domain.devices.filesystems", "shared file systems"),
    differs("domain.devices.sound", "a sound device"),
    differs("domain.devices.disks[].floppy", "floppy disks"),
    differs("domain.devices.disks[].blockSize", "the disk's block size"),
    differs("domain.devices.disks[].shareable", "disks that several guests write"),
    harmless("domain.devices.disks[].dedicatedIOThread", "threads are chosen by godwit"),
    harmless("domain.devices.disks[].tag", "a note for the guest's metadata"),
    harmless("domain.devices.disks[].errorPolicy", "QEMU's default"),
    harmless("domain.devices.disks[].changedBlockTracking", "there is no backup"),
    differs("domain.devices.disks[].disk.pciAddress", "the device's address"),
    harmless("domain.devices.disks[].cdrom.tray", "the tray is closed"),
    differs("domain.devices.disks[].lun", "a block device passed through; use disk"),
    harmless("domain.devices.disks[].io", "QEMU chooses"),
    differs("domain.devices.interfaces[].slirp", "the slirp binding"),
    differs("domain.devices.interfaces[].sriov", "the SR-IOV binding"),
    differs("domain.devices.interfaces[].macvtap", "the macvtap binding"),
    differs("domain.devices.interfaces[].passt", "the passt binding"),
    differs("domain.devices.interfaces[].passtBinding", "the passt binding"),
    differs("domain.devices.interfaces[].binding", "network binding plugins"),
    differs("domain.devices.interfaces[].pciAddress", "the device's address"),
    differs("domain.devices.interfaces[].dhcpOptions", "what DHCP tells the guest"),
    differs("domain.devices.interfaces[].acpiIndex", "the interface's name in the guest"),
    differs("domain.devices.interfaces[].state", "the link's state"),
    harmless("domain.devices.interfaces[].tag", "a note for the guest's metadata"),
    differs("networks[].pod.vmNetworkCIDR", "the guest's network behind masquerade is 10.0.2.0/24"),
    harmless("networks[].pod.vmIPv6NetworkCIDR", "there is no IPv6 behind masquerade"),
    differs("networks[].resourceClaim", "dynamic resource allocation"),
    harmless("volumes[].containerDisk.imagePullSecret", "images are pulled without credentials"),
    harmless("volumes[].containerDisk.hotpluggable", "only disks on claims are plugged in while the guest runs"),
    differs("volumes[].cloudInitConfigDrive", "this kind of volume"),
    differs("volumes[].sysprep", "this kind of volume"),
    differs("volumes[].hostDisk", "this kind of volume"),
    differs("volumes[].dataVolume", "this kind of volume; name its claim in persistentVolumeClaim"),
    differs("volumes[].serviceAccount", "this kind of volume"),
    differs("volumes[].downwardAPI", "this kind of volume"),
    differs("volumes[].downwardMetrics", "this kind of volume"),
    differs("volumes[].ephemeral", "this kind of volume"),
    differs("volumes[].memoryDump", "this kind of volume"),
];

/// Known fields under a VM's spec, beside those in its template.
pub const VM_FIELDS: &[Field] = &[
    differs("instancetype", "the instancetype would say what the guest is"),
    differs("preference", "the preference would say what the guest is"),
    differs("dataVolumeTemplates", "DataVolumes would be the guest's disks"),
];

/// Which fields of the table are used in `spec`; `prefix` is the spec's own path, as `spec` or `spec.template.spec`.
///
/// `null`, `false`, `""` and `[]` say nothing and are not in use; `{}` is.
pub fn uses(spec: &Value, prefix: &str, fields: &[Field]) -> Vec<Use> {
    let mut found = Vec::new();
    for field in fields {
        let steps: Vec<&str> = field.path.split('.').collect();
        walk(spec, &steps, prefix.to_owned(), field, &mut found);
    }
    found
}

fn walk(value: &Value, steps: &[&str], at: String, field: &Field, found: &mut Vec<Use>) {
    let Some((step, rest)) = steps.split_first() else {
        if is_used(value) {
            found.push(Use { path: at, effect: field.effect, why: field.why });
        }
        return;
    };
    match step.strip_suffix("[]") {
        Some(name) => {
            let items = value.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            for (index, item) in items.iter().enumerate() {
                walk(item, rest, format!("{at}.{name}[{index}]"), field, found);
            }
        }
        None => {
            if let Some(inner) = value.get(step) {
                walk(inner, rest, format!("{at}.{step}"), field, found);
            }
        }
    }
}

fn is_used(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::Object(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn finds_what_is_used_and_names_it() {
        let spec = json!({
            "livenessProbe": null,
            "domain": {
                "ioThreadsPolicy": "auto",
                "devices": { "sound": {}, "disableHotplug": false, "disks": [{"name": "a"}, {"name": "b", "shareable": true}] }
            }
        });
        let messages: Vec<String> = uses(&spec, "spec", VMI_FIELDS).iter().map(Use::message).collect();
        assert_eq!(
            messages,
            [
                "spec.domain.ioThreadsPolicy: not implemented by godwit, ignored (threads are chosen by godwit)",
                "spec.domain.devices.sound: not implemented by godwit, and the guest would differ without it (a sound \
                 device); remove it",
                "spec.domain.devices.disks[1].shareable: not implemented by godwit, and the guest would differ without \
                 it (disks that several guests write); remove it",
            ]
        );
    }

    #[test]
    fn paths_are_listed_once() {
        let mut paths: Vec<&str> = VMI_FIELDS.iter().map(|field| field.path).collect();
        paths.sort_unstable();
        let all = paths.len();
        paths.dedup();
        assert_eq!(paths.len(), all);
    }
}
