//! Whether a VMI can be migrated, and every reason why not (KubeVirt tells only the first).

use serde_json::Value;

use crate::Condition;
use crate::names::ANNOTATION_ALLOW_POD_BRIDGE_MIGRATION;
use crate::names::conditions::{LIVE_MIGRATABLE, STORAGE_LIVE_MIGRATABLE, live_migratable};
use crate::vmi::{MigrationMethod, Vmi, Volume};

/// One reason why a VMI cannot be migrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// The condition's reason, in KubeVirt's spelling.
    pub reason: &'static str,
    /// The sentence, in KubeVirt's words.
    pub message: String,
    /// The volume, interface or device, as `interface default`; empty when it is the VMI as a whole.
    pub what: String,
}

/// What is known of a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimAccess {
    /// Its access modes.
    Modes(Vec<String>),
    /// It could not be looked up.
    Unknown,
}

/// Every reason why the VMI cannot be migrated, in KubeVirt's order (`reference/kubevirt-contract.md`, 1.6); none means that it
/// can.
///
/// `can_mirror` says whether disks that are local to a node can be copied while the guest runs; without it a writable
/// containerDisk or emptyDisk blocks. `claim` looks up a PersistentVolumeClaim of the VMI's namespace.
///
/// Not judged: a host CPU that KubeVirt's node labeller calls obsolete for `host-model` (no node says so here), and the gate of
/// GPUs, which is taken to be closed, as it is by default.
pub fn migratability(vmi: &Vmi, can_mirror: bool, claim: &dyn Fn(&str) -> ClaimAccess) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    interfaces(vmi, &mut blockers);
    devices(vmi, &mut blockers);
    confidential(vmi, &mut blockers);
    hyperv(vmi, &mut blockers);
    for volume in &vmi.spec.volumes {
        blockers.extend(volume_blocker(vmi, volume, can_mirror, claim));
    }
    blockers
}

fn interfaces(vmi: &Vmi, blockers: &mut Vec<Blocker>) {
    let reason = live_migratable::INTERFACE;
    let Some(network) = vmi.spec.networks.iter().find(|network| network.pod.is_some()) else { return };
    let found = vmi.spec.domain.devices.interfaces.iter().find(|interface| interface.name == network.name);
    match found {
        None => {
            let message = format!("no primary interface found for network {}", network.name);
            blockers.push(Blocker { reason, message, what: format!("network {}", network.name) });
        }
        Some(interface) => {
            let allowed = vmi.annotation(ANNOTATION_ALLOW_POD_BRIDGE_MIGRATION).is_some();
            let moves = interface.masquerade.is_some()
                || interface.passt_binding.is_some()
                || (interface.bridge.is_some() && allowed);
            if !moves {
                let message = "cannot migrate VMI which does not use masquerade or a migratable plugin to connect to \
                               the pod network";
                let what = format!("interface {}", interface.name);
                blockers.push(Blocker { reason, message: message.to_owned(), what });
            }
        }
    }
}

fn devices(vmi: &Vmi, blockers: &mut Vec<Blocker>) {
    let devices = &vmi.spec.domain.devices;
    let mut add = |message: &str, kind: &str, device: &Value| {
        let name = device.get("name").and_then(Value::as_str).unwrap_or("without a name");
        let what = format!("{kind} {name}");
        blockers.push(Blocker { reason: live_migratable::HOST_DEVICE, message: message.to_owned(), what });
    };
    for device in &devices.host_devices {
        add("VMI specifies non-migratable generic PCI host device", "host device", device);
    }
    let message = match devices.gpus.len() {
        0 | 1 => "VMI specifies a GPU but feature gate VGPULiveMigration is not enabled",
        _ => "VMI specifies too many GPUs",
    };
    for gpu in &devices.gpus {
        add(message, "GPU", gpu);
    }
}

fn confidential(vmi: &Vmi, blockers: &mut Vec<Blocker>) {
    let Some(security) = vmi.spec.domain.launch_security.as_ref().filter(|security| !security.is_null()) else {
        return;
    };
    let has = |kind: &str| security.get(kind).is_some_and(|value| !value.is_null());
    for (found, reason, message) in [
        (has("sev") || has("snp"), live_migratable::SEV, "VMI uses SEV"),
        (has("tdx"), live_migratable::TDX, "VMI uses TDX"),
        (
            vmi.spec.architecture.as_deref() == Some("s390x"),
            live_migratable::SECURE_EXECUTION,
            "VMI uses Secure Execution",
        ),
    ] {
        if found {
            let what = "spec.domain.launchSecurity".to_owned();
            blockers.push(Blocker { reason, message: message.to_owned(), what });
        }
    }
}

fn hyperv(vmi: &Vmi, blockers: &mut Vec<Blocker>) {
    let Some(features) = &vmi.spec.domain.features else { return };
    // a feature that is there is on, unless it says that it is not
    let on = |feature: Option<&Value>| {
        feature.is_some_and(|feature| !feature.is_null() && feature.get("enabled") != Some(&Value::Bool(false)))
    };
    if on(features.hyperv.as_ref().and_then(|hyperv| hyperv.get("reenlightenment"))) {
        let message = "HyperV Reenlightenment VMIs cannot migrate when TSC Frequency is not exposed on the cluster: guest \
                       timers might be inconsistent";
        let what = "spec.domain.features.hyperv.reenlightenment".to_owned();
        blockers.push(Blocker { reason: live_migratable::NO_TSC_FREQUENCY, message: message.to_owned(), what });
    }
    if on(features.hyperv_passthrough.as_ref()) {
        let message = "VMI uses hyperv passthrough".to_owned();
        let what = "spec.domain.features.hypervPassthrough".to_owned();
        blockers.push(Blocker { reason: live_migratable::HYPERV_PASSTHROUGH, message, what });
    }
}

fn volume_blocker(
    vmi: &Vmi,
    volume: &Volume,
    can_mirror: bool,
    claim: &dyn Fn(&str) -> ClaimAccess,
) -> Option<Blocker> {
    let message = if let Some(source) = &volume.persistent_volume_claim {
        let name = &source.claim_name;
        // Its data is on its way there.
        if vmi.status.migrated_volumes.iter().any(|moved| moved.volume_name == volume.name) {
            return None;
        }
        let rule = "live migration requires that all PVCs must be shared (using ReadWriteMany access mode)";
        match claim(name) {
            ClaimAccess::Modes(modes) if modes.iter().any(|mode| mode == "ReadWriteMany") => return None,
            ClaimAccess::Modes(_) => format!("cannot migrate VMI: PVC {name} is not shared, {rule}"),
            ClaimAccess::Unknown => {
                format!("cannot migrate VMI: Unable to determine if PVC {name} is shared, {rule}")
            }
        }
    } else if volume.container_disk.is_some() || volume.empty_disk.is_some() {
        if can_mirror || !is_written(vmi, volume) {
            return None;
        }
        let kind = if volume.empty_disk.is_some() { "emptyDisk" } else { "containerDisk" };
        format!(
            "cannot migrate VMI: volume {} is a writable {kind}, local to its node; use a PVC with ReadWriteMany access \
             mode, or make the disk read-only",
            volume.name
        )
    } else if let Some(host) = &volume.host_disk {
        if host.get("shared") == Some(&Value::Bool(true)) {
            return None;
        }
        "cannot migrate VMI with non-shared HostDisk".to_owned()
    } else {
        // cloud-init, ConfigMap and Secret disks are made again at the target
        return None;
    };
    Some(Blocker { reason: live_migratable::DISKS, message, what: format!("volume {}", volume.name) })
}

/// Whether a disk of the volume can be written by the guest.
fn is_written(vmi: &Vmi, volume: &Volume) -> bool {
    vmi.spec.domain.devices.disks.iter().any(|disk| disk.name == volume.name && !disk.is_read_only())
}

/// What a migration has to copy: disks too when a volume moves to another claim, or is no claim, unless it is only a read-only CD-ROM.
pub fn migration_method(vmi: &Vmi) -> MigrationMethod {
    if !vmi.status.migrated_volumes.is_empty() {
        return MigrationMethod::BlockMigration;
    }
    let copied = vmi.spec.volumes.iter().filter(|volume| volume.persistent_volume_claim.is_none()).any(|volume| {
        let mut disks = vmi.spec.domain.devices.disks.iter().filter(|disk| disk.name == volume.name);
        disks.any(|disk| disk.cdrom.is_none() || !disk.is_read_only())
    });
    if copied { MigrationMethod::BlockMigration } else { MigrationMethod::LiveMigration }
}

/// The conditions `LiveMigratable` and `StorageLiveMigratable`.
///
/// A single blocker gives reason and message exactly as in KubeVirt, whose clients compare them. With several the first still
/// does, and every further one follows in the message: `; <reason>: <sentence> (<volume, interface or device>)`.
pub fn conditions(vmi: &Vmi, blockers: &[Blocker]) -> [Condition; 2] {
    let live = match blockers.split_first() {
        None => Condition::new(LIVE_MIGRATABLE, true),
        Some((first, rest)) => {
            let more: String =
                rest.iter().map(|one| format!("; {}: {} ({})", one.reason, one.message, one.what)).collect();
            Condition::new(LIVE_MIGRATABLE, false).because(first.reason, format!("{}{more}", first.message))
        }
    };
    let disks = blockers.iter().filter(|blocker| blocker.reason == live_migratable::DISKS);
    let mut storage: Vec<String> = disks.map(|blocker| format!("{}: {}", blocker.reason, blocker.message)).collect();
    let mut luns = vmi.spec.domain.devices.disks.iter().filter_map(|disk| disk.lun.as_ref());
    if luns.any(|lun| lun.reservation == Some(true)) {
        storage.push(format!("{}: VMI uses SCSI persistent reservation", live_migratable::PERSISTENT_RESERVATION));
    }
    let storage = if storage.is_empty() {
        Condition::new(STORAGE_LIVE_MIGRATABLE, true)
    } else {
        Condition::new(STORAGE_LIVE_MIGRATABLE, false).because(live_migratable::STORAGE, storage.join(", "))
    };
    [live, storage]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn vmi(spec: Value) -> Vmi {
        serde_json::from_value(json!({ "metadata": { "name": "a" }, "spec": spec })).unwrap()
    }

    fn claims(name: &str) -> ClaimAccess {
        match name {
            "shared" => ClaimAccess::Modes(vec!["ReadWriteMany".into()]),
            "lost" => ClaimAccess::Unknown,
            _ => ClaimAccess::Modes(vec!["ReadWriteOnce".into()]),
        }
    }

    fn mixed() -> Vmi {
        vmi(json!({
            "networks": [{ "name": "default", "pod": {} }, { "name": "second", "multus": { "networkName": "br" } }],
            "domain": { "devices": {
                "interfaces": [{ "name": "default", "bridge": {} }, { "name": "second", "bridge": {} }],
                "disks": [
                    { "name": "root", "disk": { "bus": "virtio" } },
                    { "name": "iso", "cdrom": { "bus": "sata" } },
                    { "name": "seed", "disk": { "bus": "virtio" } },
                    { "name": "local", "disk": { "bus": "virtio" } },
                    { "name": "lost", "disk": { "bus": "virtio" } }
                ]
            } },
            "volumes": [
                { "name": "root", "containerDisk": { "image": "x" } },
                { "name": "iso", "containerDisk": { "image": "y" } },
                { "name": "seed", "cloudInitNoCloud": { "userData": "#cloud-config" } },
                { "name": "local", "persistentVolumeClaim": { "claimName": "local" } },
                { "name": "lost", "persistentVolumeClaim": { "claimName": "lost" } }
            ]
        }))
    }

    #[test]
    fn all_blockers_are_named_the_first_first() {
        let blockers = migratability(&mixed(), false, &claims);
        let reasons: Vec<&str> = blockers.iter().map(|blocker| blocker.reason).collect();
        assert_eq!(
            reasons,
            [live_migratable::INTERFACE, live_migratable::DISKS, live_migratable::DISKS, live_migratable::DISKS]
        );
        assert!(blockers[1].message.contains("volume root is a writable containerDisk"));
        assert_eq!(
            blockers[2].message,
            "cannot migrate VMI: PVC local is not shared, live migration requires that all PVCs must be shared (using \
             ReadWriteMany access mode)"
        );
        assert!(blockers[3].message.contains("Unable to determine if PVC lost is shared"));
        let [live, storage] = conditions(&mixed(), &blockers);
        assert_eq!(live.reason.as_deref(), Some("InterfaceNotLiveMigratable"));
        assert_eq!((live.status.as_str(), storage.reason.as_deref()), ("False", Some("NotMigratable")));
        assert_eq!(migratability(&mixed(), true, &claims).len(), 3);
    }

    #[test]
    fn a_vmi_on_shared_disks_can_move() {
        let vmi = vmi(json!({
            "networks": [{ "name": "default", "pod": {} }],
            "domain": { "devices": {
                "interfaces": [{ "name": "default", "masquerade": {} }],
                "disks": [{ "name": "root", "disk": {} }, { "name": "seed", "cdrom": {} }]
            } },
            "volumes": [
                { "name": "root", "persistentVolumeClaim": { "claimName": "shared" } },
                { "name": "seed", "cloudInitNoCloud": { "userData": "x" } }
            ]
        }));
        assert_eq!(migratability(&vmi, false, &claims), []);
        assert_eq!(migration_method(&vmi), MigrationMethod::LiveMigration);
        assert_eq!(migration_method(&mixed()), MigrationMethod::BlockMigration);
        assert!(conditions(&vmi, &[]).iter().all(Condition::is_true));
    }

    #[test]
    fn a_single_blocker_is_said_exactly_as_in_kubevirt() {
        let pod = json!([{ "name": "default", "pod": {} }]);
        let claim = |name: &str| json!([{ "name": "root", "persistentVolumeClaim": { "claimName": name } }]);
        let tsc = "HyperV Reenlightenment VMIs cannot migrate when TSC Frequency is not exposed on the cluster: guest timers \
                   might be inconsistent";
        let cases = [
            (
                json!({ "networks": pod, "domain": { "devices": { "interfaces": [{ "name": "default", "bridge": {} }] } } }),
                "InterfaceNotLiveMigratable",
                "cannot migrate VMI which does not use masquerade or a migratable plugin to connect to the pod network",
            ),
            (
                json!({ "networks": pod }),
                "InterfaceNotLiveMigratable",
                "no primary interface found for network default",
            ),
            (
                json!({ "domain": { "devices": { "hostDevices": [{ "name": "nic", "deviceName": "x/y" }] } } }),
                "HostDeviceNotLiveMigratable",
                "VMI specifies non-migratable generic PCI host device",
            ),
            (
                json!({ "domain": { "devices": { "gpus": [{ "name": "g", "deviceName": "x/y" }] } } }),
                "HostDeviceNotLiveMigratable",
                "VMI specifies a GPU but feature gate VGPULiveMigration is not enabled",
            ),
            (json!({ "domain": { "launchSecurity": { "sev": {} } } }), "SEVNotLiveMigratable", "VMI uses SEV"),
            (json!({ "domain": { "launchSecurity": { "tdx": {} } } }), "TDXNotLiveMigratable", "VMI uses TDX"),
            (
                json!({ "architecture": "s390x", "domain": { "launchSecurity": {} } }),
                "SecureExecutionNotLiveMigratable",
                "VMI uses Secure Execution",
            ),
            (
                json!({ "domain": { "features": { "hyperv": { "reenlightenment": {} } } } }),
                "NoTSCFrequencyNotLiveMigratable",
                tsc,
            ),
            (
                json!({ "domain": { "features": { "hypervPassthrough": { "enabled": true } } } }),
                "HypervPassthroughNotLiveMigratable",
                "VMI uses hyperv passthrough",
            ),
            (
                json!({ "volumes": claim("local") }),
                "DisksNotLiveMigratable",
                "cannot migrate VMI: PVC local is not shared, live migration requires that all PVCs must be shared (using \
                 ReadWriteMany access mode)",
            ),
            (
                json!({ "volumes": claim("lost") }),
                "DisksNotLiveMigratable",
                "cannot migrate VMI: Unable to determine if PVC lost is shared, live migration requires that all PVCs must \
                 be shared (using ReadWriteMany access mode)",
            ),
            (
                json!({ "volumes": [{ "name": "h", "hostDisk": { "path": "/x", "type": "Disk" } }] }),
                "DisksNotLiveMigratable",
                "cannot migrate VMI with non-shared HostDisk",
            ),
        ];
        for (spec, reason, message) in cases {
            let vmi = vmi(spec.clone());
            let [live, _] = conditions(&vmi, &migratability(&vmi, true, &claims));
            assert_eq!((live.reason.as_deref(), live.message.as_deref()), (Some(reason), Some(message)), "{spec}");
        }
    }

    #[test]
    fn several_are_in_kubevirts_order_and_named() {
        let vmi = vmi(json!({
            "networks": [{ "name": "default", "pod": {} }],
            "domain": {
                "launchSecurity": { "sev": {} },
                "features": { "hyperv": { "reenlightenment": { "enabled": false } } },
                "devices": {
                    "interfaces": [{ "name": "default", "bridge": {} }],
                    "gpus": [{ "name": "one" }, { "name": "two" }],
                    "disks": [{ "name": "pr", "lun": { "reservation": true } }],
                },
            },
            "volumes": [{ "name": "data", "persistentVolumeClaim": { "claimName": "local" } }],
        }));
        let [live, storage] = conditions(&vmi, &migratability(&vmi, true, &claims));
        assert_eq!(live.reason.as_deref(), Some("InterfaceNotLiveMigratable"));
        assert_eq!(
            live.message.unwrap(),
            "cannot migrate VMI which does not use masquerade or a migratable plugin to connect to the pod network; \
             HostDeviceNotLiveMigratable: VMI specifies too many GPUs (GPU one); HostDeviceNotLiveMigratable: VMI specifies \
             too many GPUs (GPU two); SEVNotLiveMigratable: VMI uses SEV (spec.domain.launchSecurity); \
             DisksNotLiveMigratable: cannot migrate VMI: PVC local is not shared, live migration requires that all PVCs \
             must be shared (using ReadWriteMany access mode) (volume data)"
        );
        assert_eq!(
            storage.message.unwrap(),
            "DisksNotLiveMigratable: cannot migrate VMI: PVC local is not shared, live migration requires that all PVCs \
             must be shared (using ReadWriteMany access mode), PersistentReservationNotLiveMigratable: VMI uses SCSI \
             persistent reservation"
        );
    }
}
