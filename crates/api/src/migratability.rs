//! Whether a VMI can be migrated, and every reason why not (KubeVirt tells only the first).

use crate::Condition;
use crate::names::ANNOTATION_ALLOW_POD_BRIDGE_MIGRATION;
use crate::names::conditions::{LIVE_MIGRATABLE, STORAGE_LIVE_MIGRATABLE, live_migratable};
use crate::vmi::{MigrationMethod, Vmi, Volume};

/// One reason why a VMI cannot be migrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// The condition's reason, in KubeVirt's spelling.
    pub reason: &'static str,
    /// The sentence, naming the volume, interface or device.
    pub message: String,
}

/// What is known of a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimAccess {
    /// Its access modes.
    Modes(Vec<String>),
    /// It could not be looked up.
    Unknown,
}

/// Every reason why the VMI cannot be migrated, in KubeVirt's order; none means that it can.
///
/// `can_mirror` says whether disks that are local to a node can be copied while the guest runs; without it a writable
/// containerDisk or emptyDisk blocks. `claim` looks up a PersistentVolumeClaim of the VMI's namespace.
pub fn migratability(vmi: &Vmi, can_mirror: bool, claim: &dyn Fn(&str) -> ClaimAccess) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    interfaces(vmi, &mut blockers);
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
        None => blockers
            .push(Blocker { reason, message: format!("no primary interface found for network {}", network.name) }),
        Some(interface) => {
            let allowed = vmi.annotation(ANNOTATION_ALLOW_POD_BRIDGE_MIGRATION).is_some();
            if interface.masquerade.is_none() && !(interface.bridge.is_some() && allowed) {
                let message = "cannot migrate VMI which does not use masquerade or a migratable plugin to connect to \
                               the pod network";
                blockers.push(Blocker { reason, message: message.to_owned() });
            }
        }
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
    } else {
        // cloud-init, ConfigMap and Secret disks are made again at the target
        return None;
    };
    Some(Blocker { reason: live_migratable::DISKS, message })
}

/// Whether a disk of the volume can be written by the guest.
fn is_written(vmi: &Vmi, volume: &Volume) -> bool {
    vmi.spec.domain.devices.disks.iter().any(|disk| disk.name == volume.name && !disk.is_read_only())
}

/// What a migration has to copy: disks too when a volume is no claim, unless it is only a read-only CD-ROM.
pub fn migration_method(vmi: &Vmi) -> MigrationMethod {
    let copied = vmi.spec.volumes.iter().filter(|volume| volume.persistent_volume_claim.is_none()).any(|volume| {
        let mut disks = vmi.spec.domain.devices.disks.iter().filter(|disk| disk.name == volume.name);
        disks.any(|disk| disk.cdrom.is_none() || !disk.is_read_only())
    });
    if copied { MigrationMethod::BlockMigration } else { MigrationMethod::LiveMigration }
}

/// The conditions `LiveMigratable` and `StorageLiveMigratable`. The first blocker gives reason and message, as in KubeVirt;
/// further ones follow in the message.
pub fn conditions(blockers: &[Blocker]) -> [Condition; 2] {
    let live = match blockers.split_first() {
        None => Condition::new(LIVE_MIGRATABLE, true),
        Some((first, rest)) => {
            let more: String =
                rest.iter().map(|blocker| format!("; {}: {}", blocker.reason, blocker.message)).collect();
            Condition::new(LIVE_MIGRATABLE, false).because(first.reason, format!("{}{more}", first.message))
        }
    };
    let storage: Vec<String> = blockers
        .iter()
        .filter(|blocker| blocker.reason == live_migratable::DISKS)
        .map(|blocker| format!("{}: {}", blocker.reason, blocker.message))
        .collect();
    let storage = if storage.is_empty() {
        Condition::new(STORAGE_LIVE_MIGRATABLE, true)
    } else {
        Condition::new(STORAGE_LIVE_MIGRATABLE, false).because(live_migratable::STORAGE, storage.join(", "))
    };
    [live, storage]
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

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
        let [live, storage] = conditions(&blockers);
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
        assert!(conditions(&[]).iter().all(Condition::is_true));
    }
}
