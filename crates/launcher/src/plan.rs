//! From a VMI to the machine that QEMU is told to build. The same VMI gives the same machine at the source and at the target.

mod clock;
mod firmware;

use crate::persistent::PersistentState;
use crate::rpc::{GuestCpu, InterfaceOrder, Paths, VolumeFacts, VolumeState};
use crate::volumes::{self, Image, Preparer};
pub use clock::wall_clock_offset;
use godwit_api::VirtualMachineInstance;
use godwit_api::vmi::{Disk as DiskSpec, Volume as VolumeSpec};
use godwit_qemu::accelerator::Accelerator;
use godwit_qemu::machine::{Boot, Bus, Cache, Cpu, Disk, DiskKind, Machine, Nic, boot_of_kernel, plugged_number};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Name of the monitor's socket.
pub const MONITOR: &str = "qmp";
/// Name of the socket on which QEMU offers the serial port to the launcher.
pub const SERIAL: &str = "qemu-serial0";
/// Name of the socket on which QEMU speaks to the trusted platform module.
pub const TPM: &str = "tpm";
/// Where the module keeps its state, among the guest's other files of this place.
pub const TPM_STATE: &str = "tpm";
/// Name of the socket on which QEMU shows the guest's screen (VNC).
pub const SCREEN: &str = "vnc";
/// Name of the guest agent's socket.
pub const AGENT: &str = "qga";

/// Why no machine can be made of a VMI.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VMI asks for something that is not possible.
    #[error("{0}")]
    Invalid(String),
    /// A volume.
    #[error(transparent)]
    Volume(#[from] volumes::Error),
}

/// What the plan is made from, besides the VMI.
pub struct Inputs<'a> {
    /// The VMI.
    pub vmi: &'a VirtualMachineInstance,
    /// The interfaces as they were wired.
    pub interfaces: &'a [InterfaceOrder],
    /// What is known of volumes.
    pub volumes: &'a BTreeMap<String, VolumeFacts>,
    /// The images of disks that the guest was given while it ran, by volume.
    pub images: &'a BTreeMap<String, PathBuf>,
    /// Where things are.
    pub paths: &'a Paths,
    /// What executes the guest.
    pub accelerator: Accelerator,
    /// The machine type of the source.
    pub machine_type: Option<&'a str>,
    /// How the machine is built ([`crate::rpc::MACHINE_REVISION`]).
    pub revision: u32,
    /// What stands for the node's own processor, where that is known.
    pub host_cpu: Option<&'a GuestCpu>,
    /// Whether this is a target.
    pub arriving: bool,
    /// What of the guest is on a claim.
    pub persistent: Option<&'a PersistentState>,
}

/// A disk that the guest can write to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WritableDisk {
    /// Its place in `machine.disks`.
    pub number: usize,
    /// Its volume.
    pub volume: String,
    /// Its file.
    pub path: PathBuf,
    /// The image that it lies above.
    pub base: Option<PathBuf>,
    /// Both ends of a migration see it, as long as it stays on its claim.
    pub shared: bool,
    /// It comes from another claim: its content is still there.
    pub comes: bool,
}

/// A machine, and what of its disks is on this node only.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The machine.
    pub machine: Machine,
    /// The disks that can change.
    pub writable: Vec<WritableDisk>,
    /// What is known of each of the machine's disks, in their order; their sizes QEMU knows.
    pub volumes: Vec<VolumeState>,
    /// Its processor; none when that is the node's own, whatever that is.
    pub guest_cpu: Option<GuestCpu>,
}

/// Makes the plan, and the files that it needs.
pub async fn plan(inputs: &Inputs<'_>) -> Result<Plan, Error> {
    let vmi = inputs.vmi;
    let domain = &vmi.spec.domain;
    let (_, name) = vmi.namespaced_name();
    let mut machine = Machine::new(inputs.paths.sockets.join(MONITOR), memory_mib(vmi)?, boot(inputs)?);
    machine.name = name.into();
    machine.accelerator = inputs.accelerator;
    machine.machine_type = machine_type(inputs);
    let guest_cpu = guest_cpu(inputs);
    machine.cpu = cpu(vmi, guest_cpu.as_ref())?;
    machine.incoming = inputs.arriving;
    machine.rng = domain.devices.rng.is_some();
    machine.balloon = domain.devices.autoattach_mem_balloon.unwrap_or(true);
    machine.free_page_hint = machine.balloon && inputs.revision == 1;
    machine.hotplug = inputs.revision >= 2 && domain.devices.disable_hotplug != Some(true);
    if domain.devices.autoattach_serial_console.unwrap_or(true) {
        machine.serial = Some(inputs.paths.sockets.join(SERIAL));
    }
    if inputs.revision >= 3 && domain.devices.autoattach_graphics_device.unwrap_or(true) {
        machine.screen = Some(inputs.paths.sockets.join(SCREEN));
    }
    machine.guest_agent = Some(inputs.paths.sockets.join(AGENT));
    machine.acpi = domain.features.as_ref().and_then(|f| f.acpi.as_ref()).is_none_or(|a| a.enabled.unwrap_or(true));
    let firmware = domain.firmware.as_ref();
    // A VMI's own UID is as good as any when none is asked for, and the same at both ends.
    let own = Some(vmi.uid()).filter(|uid| is_uuid(uid)).map(str::to_owned);
    machine.uuid = firmware.and_then(|f| f.uuid.clone()).or(own);
    machine.serial_number = firmware.and_then(|f| f.serial.clone());
    machine.efi = firmware::efi(inputs, &machine.boot)?;
    machine.system_management = firmware::system_management(domain, machine.efi.as_ref());
    if domain.devices.has_tpm() {
        machine.tpm = Some(inputs.paths.sockets.join(TPM));
    }
    if let Some(spec) = &domain.clock {
        machine.clock_offset_seconds = clock::hardware_offset(spec, jiff::Timestamp::now())?;
        machine.timers = clock::timers(spec);
    }
    let (writable, volumes) = disks(inputs, &mut machine).await?;
    machine.nics = nics(inputs)?;
    boot_order(&mut machine);
    Ok(Plan { machine, writable, volumes, guest_cpu })
}

fn invalid(message: impl Into<String>) -> Error {
    Error::Invalid(message.into())
}

fn is_uuid(text: &str) -> bool {
    let groups: Vec<&str> = text.split('-').collect();
    groups.iter().map(|g| g.len()).eq([8, 4, 4, 4, 12])
        && groups.iter().all(|g| g.chars().all(|c| c.is_ascii_hexdigit()))
}

fn machine_type(inputs: &Inputs<'_>) -> String {
    let status = inputs.vmi.status.machine.as_ref().and_then(|m| m.type_.as_deref());
    let spec = inputs.vmi.spec.domain.machine.as_ref().and_then(|m| m.type_.as_deref());
    // The versioned name in the status is what a running guest has; a fresh one takes what is asked for.
    let running = if inputs.arriving { status } else { None };
    inputs.machine_type.or(running).or(spec).filter(|t| !t.is_empty()).unwrap_or("q35").to_string()
}

fn memory_mib(vmi: &VirtualMachineInstance) -> Result<u64, Error> {
    let domain = &vmi.spec.domain;
    let guest = domain.memory.as_ref().and_then(|m| m.guest.as_ref());
    let quantity = guest
        .or_else(|| domain.resources.requests.get("memory"))
        .or_else(|| domain.resources.limits.get("memory"))
        .ok_or_else(|| invalid("spec.domain.memory.guest is missing"))?;
    let bytes = quantity.bytes().map_err(|e| invalid(format!("spec.domain.memory.guest: {e}")))?;
    match bytes.div_ceil(1 << 20) {
        0 => Err(invalid("spec.domain.memory.guest is 0")),
        mib => Ok(mib),
    }
}

/// The processor that is built the same at every node: an arriving guest's is what it was started with.
fn guest_cpu(inputs: &Inputs<'_>) -> Option<GuestCpu> {
    if inputs.revision < 4 {
        return None;
    }
    if inputs.arriving && inputs.vmi.status.guest_cpu.is_some() {
        return inputs.vmi.status.guest_cpu.clone();
    }
    let asked = inputs.vmi.spec.domain.cpu.as_ref().and_then(|cpu| cpu.model.as_deref());
    match asked.filter(|model| !model.is_empty()) {
        None | Some("host-model") => inputs.host_cpu.cloned(),
        Some("host-passthrough") => None,
        Some(named) => Some(GuestCpu { model: named.to_owned(), features: Vec::new() }),
    }
}

fn cpu(vmi: &VirtualMachineInstance, guest_cpu: Option<&GuestCpu>) -> Result<Cpu, Error> {
    let domain = &vmi.spec.domain;
    let mut cpu = Cpu::default();
    let topology = domain.cpu.as_ref();
    cpu.sockets = topology.and_then(|c| c.sockets).unwrap_or(1).max(1);
    cpu.cores = topology.and_then(|c| c.cores).unwrap_or(1).max(1);
    cpu.threads = topology.and_then(|c| c.threads).unwrap_or(1).max(1);
    if topology.is_none_or(|c| c.sockets.is_none() && c.cores.is_none() && c.threads.is_none()) {
        // As KubeVirt: without a topology, whole CPUs of the request (or limit) become sockets.
        let resources = &domain.resources;
        if let Some(quantity) = resources.requests.get("cpu").or_else(|| resources.limits.get("cpu")) {
            let milli = quantity.milli().map_err(|e| invalid(format!("spec.domain.resources cpu: {e}")))?;
            cpu.sockets = u32::try_from((milli + 999) / 1000).unwrap_or(1).max(1);
        }
    }
    if let Some(guest_cpu) = guest_cpu {
        cpu.model = Some(guest_cpu.model.clone());
        cpu.features = guest_cpu.features.iter().map(|feature| (feature.clone(), true)).collect();
        cpu.enforce = true;
    } else if let Some(topology) = topology {
        cpu.model = topology.model.clone().filter(|m| !m.is_empty());
    }
    Ok(cpu)
}

fn boot(inputs: &Inputs<'_>) -> Result<Boot, Error> {
    let Some(boot) = inputs.vmi.spec.domain.firmware.as_ref().and_then(|f| f.kernel_boot.as_ref()) else {
        return Ok(Boot::Firmware);
    };
    let arguments = boot.kernel_args.clone().unwrap_or_default();
    let Some(container) = &boot.container else {
        return Err(invalid("spec.domain.firmware.kernelBoot.container is missing"));
    };
    let root = &inputs.paths.kernel_boot;
    let file = |field: &str, path: &Option<String>| match path.as_deref().filter(|p| !p.is_empty()) {
        None => Ok(None),
        Some(path) => volumes::within(root, path).map(Some).map_err(|e| {
            invalid(format!("kernelBoot.container.{field} {path} is not in the image {}: {e}", container.image))
        }),
    };
    let kernel = file("kernelPath", &container.kernel_path)?;
    let initrd = file("initrdPath", &container.initrd_path)?;
    let Some(kernel) = kernel else { return Err(invalid("kernelBoot.container.kernelPath is missing")) };
    boot_of_kernel(kernel.clone(), initrd, arguments).map_err(|e| invalid(format!("{}: {e}", kernel.display())))
}

type Disks = (Vec<WritableDisk>, Vec<VolumeState>);

async fn disks(inputs: &Inputs<'_>, machine: &mut Machine) -> Result<Disks, Error> {
    let preparer = Preparer { paths: inputs.paths, vmi: inputs.vmi, arriving: inputs.arriving };
    let unknown = VolumeFacts::default();
    let (mut writable, mut volumes) = (Vec::new(), Vec::new());
    let mut late = Vec::new();
    for spec in &inputs.vmi.spec.domain.devices.disks {
        let Some(volume) = inputs.vmi.spec.volumes.iter().find(|v| v.name == spec.name) else {
            return Err(invalid(format!("disk {} has no volume of its name", spec.name)));
        };
        if volume.is_hotpluggable() {
            late.extend(place_of(inputs, &volume.name)?.map(|place| Late { disk: spec, volume, place }));
            continue;
        }
        let facts = inputs.volumes.get(&volume.name).unwrap_or(&unknown);
        let image = preparer.prepare(volume, spec.is_read_only(), facts).await?;
        let disk = disk(spec, &image)?;
        let shared = disk.read_only || image.same_everywhere;
        if !disk.read_only {
            writable.push(WritableDisk {
                number: machine.disks.len(),
                volume: volume.name.clone(),
                path: image.path.clone(),
                base: image.base.clone(),
                shared,
                comes: image.comes,
            });
        }
        volumes.push(VolumeState {
            name: volume.name.clone(),
            target: guest_name(machine, disk.bus),
            claim: volume.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.clone()),
            shared,
            ..VolumeState::default()
        });
        machine.disks.push(disk);
    }
    // Behind all others, so that those have the same numbers with and without them.
    for late in late {
        let (disk, state) = late_disk(&preparer, &late, inputs.images)?;
        writable.extend(self::writable(&disk, plugged_number(late.place), &state));
        volumes.push(state);
        machine.disks.push(disk);
    }
    Ok((writable, volumes))
}

/// A disk that comes while the guest runs, or has come so before.
#[derive(Clone, Copy, Debug)]
pub struct Late<'a> {
    /// What it is.
    pub disk: &'a DiskSpec,
    /// What is on it.
    pub volume: &'a VolumeSpec,
    /// Its place.
    pub place: u32,
}

/// The place at which an arriving guest has such a disk; none when it has not got it. A guest that starts gets them afterwards.
fn place_of(inputs: &Inputs<'_>, volume: &str) -> Result<Option<u32>, Error> {
    let status = inputs.vmi.status.volume_status.iter().find(|status| status.name == volume);
    let Some(status) = status.filter(|status| inputs.arriving && status.is_plugged_in()) else { return Ok(None) };
    match index_of(&status.target) {
        Some(place) => Ok(Some(place)),
        None => {
            Err(invalid(format!("volume {volume}: the guest has it as {:?}, which is no SCSI disk", status.target)))
        }
    }
}

/// The machine's disk for one that comes late, and what is told of it. `images` are those that were handed over.
pub fn late_disk(
    preparer: &Preparer<'_>,
    late: &Late<'_>,
    images: &BTreeMap<String, PathBuf>,
) -> Result<(Disk, VolumeState), Error> {
    let name = &late.volume.name;
    let Some(path) = images.get(name) else {
        return Err(invalid(format!("volume {name}: its claim's image was not handed over")));
    };
    let image = preparer.handed_over(late.volume, path, late.disk.is_read_only())?;
    let built = disk(late.disk, &image)?;
    if built.bus != Bus::Scsi || built.kind != DiskKind::Disk {
        return Err(invalid(format!("volume {name}: only disks on the bus scsi come while a guest runs")));
    }
    let shared = built.read_only || image.same_everywhere;
    let state = VolumeState {
        name: name.clone(),
        target: format!("sd{}", letters(usize::try_from(late.place).unwrap_or(usize::MAX))),
        claim: late.volume.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.clone()),
        shared,
        place: Some(late.place),
        ..VolumeState::default()
    };
    Ok((Disk { place: Some(late.place), boot_index: None, ..built }, state))
}

/// What has to be known of such a disk if the guest can write to it.
pub fn writable(disk: &Disk, number: usize, state: &VolumeState) -> Option<WritableDisk> {
    (!disk.read_only).then(|| WritableDisk {
        number,
        volume: state.name.clone(),
        path: disk.path.clone(),
        base: None,
        shared: state.shared,
        comes: false,
    })
}

/// The first place that no disk has: a disk's place is told by its letters, as those of disks that are there from the start.
pub fn free_place<'a>(targets: impl Iterator<Item = &'a str>) -> u32 {
    let used: BTreeSet<u32> = targets.filter_map(index_of).collect();
    (0..).find(|place| !used.contains(place)).unwrap_or(u32::MAX)
}

/// What Linux most likely calls the next disk on this bus, as KubeVirt counts them.
fn guest_name(machine: &Machine, bus: Bus) -> String {
    let prefix = |bus| if bus == Bus::Virtio { "vd" } else { "sd" };
    let before = machine.disks.iter().filter(|d| prefix(d.bus) == prefix(bus)).count();
    format!("{}{}", prefix(bus), letters(before))
}

/// 0 is `a`, 25 `z`, 26 `aa`.
fn letters(index: usize) -> String {
    let mut letters = Vec::new();
    let mut rest = index;
    loop {
        letters.insert(0, char::from(b'a' + (rest % 26) as u8));
        match (rest / 26).checked_sub(1) {
            Some(more) => rest = more,
            None => break,
        }
    }
    letters.into_iter().collect()
}

/// Which SCSI or SATA disk this is the name of.
fn index_of(target: &str) -> Option<u32> {
    let letters = target.strip_prefix("sd").filter(|rest| !rest.is_empty() && rest.len() <= 3)?;
    let digit = |letter: char| letter.is_ascii_lowercase().then(|| u32::from(letter) - u32::from('a') + 1);
    letters.chars().try_fold(0, |sum, letter| Some(sum * 26 + digit(letter)?))?.checked_sub(1)
}

fn disk(spec: &DiskSpec, image: &Image) -> Result<Disk, Error> {
    let kind = if spec.cdrom.is_some() { DiskKind::CdRom } else { DiskKind::Disk };
    let bus = match spec.bus() {
        Some("virtio") if kind == DiskKind::Disk => Bus::Virtio,
        Some("scsi") => Bus::Scsi,
        // KubeVirt's default.
        Some("sata") | None => Bus::Sata,
        Some(other) => return Err(invalid(format!("disk {}: bus {other} is not possible here", spec.name))),
    };
    let direct = image.allows_direct_io();
    let cache = match spec.cache.as_deref() {
        Some("none") if !direct => {
            let path = image.path.display();
            return Err(invalid(format!(
                "disk {}: cache none is not possible: the file system of {path} does not support direct I/O; use \
                 writethrough or writeback",
                spec.name
            )));
        }
        Some("none") => Cache::None,
        Some("writethrough") => Cache::Writethrough,
        Some("writeback") => Cache::Writeback,
        // The guest sees no difference between these two (it would with writethrough), so they may change on its way.
        None if direct => Cache::None,
        None => Cache::Writeback,
        Some(other) => return Err(invalid(format!("disk {}: cache {other} is not possible", spec.name))),
    };
    Ok(Disk {
        name: spec.name.clone(),
        path: image.path.clone(),
        format: image.format,
        size: image.size,
        bus,
        kind,
        // A hard disk on AHCI knows no write protection; its content is made anew at each place, so nothing is lost.
        read_only: kind == DiskKind::CdRom || ((image.read_only || spec.is_read_only()) && bus != Bus::Sata),
        serial: spec.serial.clone().filter(|s| !s.is_empty()),
        cache,
        boot_index: spec.boot_order,
        place: None,
    })
}

fn nics(inputs: &Inputs<'_>) -> Result<Vec<Nic>, Error> {
    let nic = |order: &InterfaceOrder, model: Option<&str>, boot_index: Option<u32>| Nic {
        tap: order.tap.clone(),
        mac: order.mac.clone(),
        model: model.unwrap_or("virtio").into(),
        mtu: order.mtu,
        boot_index,
    };
    let specs = &inputs.vmi.spec.domain.devices.interfaces;
    if specs.is_empty() {
        return Ok(inputs.interfaces.iter().map(|order| nic(order, None, None)).collect());
    }
    let wired = |name: &str| inputs.interfaces.iter().find(|order| order.name == name);
    specs
        .iter()
        .map(|spec| match wired(&spec.name) {
            Some(order) => Ok(nic(order, spec.model.as_deref(), spec.boot_order)),
            None => Err(invalid(format!("interface {} was not wired by the handler", spec.name))),
        })
        .collect()
}

/// Without any order asked for, disks boot in the order of their definition.
fn boot_order(machine: &mut Machine) {
    let asked =
        machine.disks.iter().any(|d| d.boot_index.is_some()) || machine.nics.iter().any(|n| n.boot_index.is_some());
    if !asked && machine.boot == Boot::Firmware {
        for (number, disk) in machine.disks.iter_mut().filter(|disk| disk.place.is_none()).enumerate() {
            disk.boot_index = u32::try_from(number + 1).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::MACHINE_REVISION;
    use serde_json::{Value, json};

    async fn try_plan(vmi: Value, interfaces: &[InterfaceOrder], arriving: bool) -> Result<Plan, Error> {
        plan_of_revision(vmi, interfaces, arriving, MACHINE_REVISION).await
    }

    async fn plan_of_revision(
        vmi: Value,
        interfaces: &[InterfaceOrder],
        arriving: bool,
        revision: u32,
    ) -> Result<Plan, Error> {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::under(folder.path());
        for place in [&paths.sockets, &paths.ephemeral_disks, &paths.kernel_boot] {
            std::fs::create_dir_all(place).unwrap();
        }
        std::fs::write(paths.kernel_boot.join("rom.bin"), vec![0u8; 65536]).unwrap();
        let vmi: VirtualMachineInstance = serde_json::from_value(vmi).unwrap();
        let inputs = Inputs {
            vmi: &vmi,
            interfaces,
            volumes: &BTreeMap::new(),
            images: &BTreeMap::from([("late".to_owned(), paths.kernel_boot.join("rom.bin"))]),
            paths: &paths,
            accelerator: Accelerator::Tcg,
            machine_type: None,
            revision,
            host_cpu: Some(&GuestCpu { model: "Opteron_G2".into(), features: vec!["avx".into(), "bmi1".into()] }),
            arriving,
            persistent: None,
        };
        let mut plan = plan(&inputs).await?;
        // The only thing that may differ between two places.
        let files = plan.machine.disks.iter_mut().map(|d| &mut d.path);
        for path in files.chain(plan.writable.iter_mut().map(|d| &mut d.path)) {
            *path = path.strip_prefix(folder.path()).unwrap().to_path_buf();
        }
        Ok(plan)
    }

    fn vmi() -> Value {
        json!({
            "metadata": {"name": "vm", "namespace": "default", "uid": "5cd0a2f1-0000-4000-8000-000000000001"},
            "spec": {
                "domain": {
                    "cpu": {"cores": 2, "model": "Nehalem"},
                    "memory": {"guest": "100M"},
                    "devices": {
                        "disks": [
                            {"name": "seed", "disk": {"bus": "virtio"}},
                            {"name": "work", "disk": {"bus": "scsi"}, "serial": "W1"},
                            {"name": "cd", "cdrom": {"bus": "sata"}},
                        ],
                        "interfaces": [{"name": "default", "masquerade": {}}],
                        "rng": {}
                    }
                },
                "volumes": [
                    {"name": "cd", "cloudInitNoCloud": {"userData": "b"}},
                    {"name": "work", "emptyDisk": {"capacity": "1Mi"}},
                    {"name": "seed", "cloudInitNoCloud": {"userData": "a"}},
                ]
            }
        })
    }

    fn wired() -> Vec<InterfaceOrder> {
        vec![InterfaceOrder {
            name: "default".into(),
            tap: "tapeth0".into(),
            mac: "02:00:00:00:00:01".into(),
            mtu: None,
        }]
    }

    #[tokio::test]
    async fn a_vmi_becomes_a_machine() {
        let plan = try_plan(vmi(), &wired(), false).await.unwrap();
        let machine = &plan.machine;
        assert_eq!((machine.memory_mib, machine.cpu.count(), machine.machine_type.as_str()), (96, 2, "q35"));
        assert_eq!(machine.cpu.model.as_deref(), Some("Nehalem"));
        assert_eq!(machine.uuid.as_deref(), Some("5cd0a2f1-0000-4000-8000-000000000001"));
        let disks: Vec<_> = machine.disks.iter().map(|d| (d.bus, d.kind, d.read_only, d.boot_index)).collect();
        assert_eq!(
            disks,
            [
                (Bus::Virtio, DiskKind::Disk, true, Some(1)),
                (Bus::Scsi, DiskKind::Disk, false, Some(2)),
                (Bus::Sata, DiskKind::CdRom, true, Some(3))
            ]
        );
        let local: Vec<_> = plan.writable.iter().filter(|d| !d.shared).map(|d| (d.number, d.volume.as_str())).collect();
        assert_eq!(local, [(1, "work")]);
        let volumes: Vec<_> = plan.volumes.iter().map(|v| (v.name.as_str(), v.target.as_str(), v.shared)).collect();
        assert_eq!(volumes, [("seed", "vda", true), ("work", "sda", false), ("cd", "sdb", true)]);
        machine.arguments(0).unwrap();
    }

    #[tokio::test]
    async fn a_processor_is_spelled_out_where_the_guest_starts_and_stays_with_it() {
        let with = |model: Value, guest_cpu: Value| {
            let mut vmi = vmi();
            vmi["spec"]["domain"]["cpu"]["model"] = model;
            vmi["status"] = json!({ "guestCpu": guest_cpu });
            vmi
        };
        let option = |plan: &Plan| {
            let arguments = plan.machine.arguments(0).unwrap();
            arguments[arguments.iter().position(|argument| argument == "-cpu").unwrap() + 1].clone()
        };
        let spelled = "Opteron_G2,avx=on,bmi1=on,enforce";
        for asked in [json!(null), json!("host-model")] {
            let started = try_plan(with(asked.clone(), json!(null)), &wired(), false).await.unwrap();
            assert_eq!(option(&started), spelled, "{asked}");
            // The target's own processor does not count.
            let elsewhere = json!({"model": "Penryn", "features": ["avx"]});
            let arrived = try_plan(with(asked.clone(), elsewhere), &wired(), true).await.unwrap();
            assert_eq!(option(&arrived), "Penryn,avx=on,enforce");
            // A guest of an older machine has what it had.
            let old = plan_of_revision(with(asked, json!(null)), &wired(), true, 3).await.unwrap();
            assert_eq!((option(&old).as_str(), old.guest_cpu), ("max,la57=off", None));
        }
        let passed = try_plan(with(json!("host-passthrough"), json!(null)), &wired(), false).await.unwrap();
        assert_eq!((option(&passed).as_str(), passed.guest_cpu), ("max,la57=off", None));
        let named = try_plan(with(json!("Nehalem"), json!(null)), &wired(), false).await.unwrap();
        assert_eq!(option(&named), "Nehalem,enforce");
    }

    #[tokio::test]
    async fn both_ends_of_a_migration_plan_the_same_machine() {
        let source = try_plan(vmi(), &wired(), false).await.unwrap();
        let mut target = try_plan(vmi(), &wired(), true).await.unwrap();
        target.machine.incoming = false;
        target.machine.monitor = source.machine.monitor.clone();
        target.machine.serial = source.machine.serial.clone();
        target.machine.screen = source.machine.screen.clone();
        target.machine.guest_agent = source.machine.guest_agent.clone();
        assert_eq!(source, target);
    }

    #[tokio::test]
    async fn a_disk_that_came_late_is_built_where_the_guest_arrives_and_not_where_it_starts() {
        let built = |plan: &Plan| (plan.machine.disks.clone(), plan.writable.clone(), plan.volumes.clone());
        let plain = built(&try_plan(vmi(), &wired(), true).await.unwrap());
        let mut with = vmi();
        let late = json!({"name": "late", "persistentVolumeClaim": {"claimName": "c", "hotpluggable": true}});
        with["spec"]["volumes"].as_array_mut().unwrap().insert(0, late);
        let disk = json!({"name": "late", "disk": {"bus": "scsi"}, "serial": "L"});
        with["spec"]["domain"]["devices"]["disks"].as_array_mut().unwrap().insert(0, disk);
        assert_eq!(built(&try_plan(with.clone(), &wired(), true).await.unwrap()), plain, "it has not come yet");
        with["status"] = json!({"volumeStatus": [
            {"name": "late", "target": "sdc", "phase": "Ready", "hotplugVolume": {"attachPodUID": "p"}},
        ]});
        let mut arrived = try_plan(with.clone(), &wired(), true).await.unwrap();
        let disk = arrived.machine.disks.pop().unwrap();
        assert_eq!((disk.place, disk.serial.as_deref(), disk.boot_index), (Some(2), Some("L"), None));
        assert_eq!(arrived.writable.pop().unwrap().number, plugged_number(2));
        let state = arrived.volumes.pop().unwrap();
        assert_eq!((state.target.as_str(), state.place), ("sdc", Some(2)));
        assert_eq!(built(&arrived), plain);
        let started = try_plan(with, &wired(), false).await.unwrap();
        assert!(started.machine.disks.iter().all(|disk| disk.place.is_none()));
        assert!(started.machine.hotplug && !started.machine.free_page_hint);
    }

    #[tokio::test]
    async fn a_guest_has_a_screen_unless_it_wants_none() {
        let screen = async |vmi: Value| try_plan(vmi, &wired(), false).await.unwrap().machine.screen;
        assert!(screen(vmi()).await.unwrap().ends_with(SCREEN));
        let mut without = vmi();
        without["spec"]["domain"]["devices"]["autoattachGraphicsDevice"] = json!(false);
        assert_eq!(screen(without).await, None);
    }

    #[test]
    fn places_are_counted_as_the_guest_counts_its_disks() {
        for (name, index) in [("sda", 0), ("sdz", 25), ("sdaa", 26), ("sdba", 52)] {
            assert_eq!((index_of(name), format!("sd{}", letters(index))), (u32::try_from(index).ok(), name.to_owned()));
        }
        assert_eq!([index_of("vda"), index_of("sd"), index_of("sdA"), index_of("sdaaaa")], [None; 4]);
        assert_eq!(free_place(["sda", "vda", "sdc"].into_iter()), 1);
        assert_eq!(free_place([].into_iter()), 0);
    }

    #[tokio::test]
    async fn a_target_takes_the_machine_type_that_the_guest_runs_on() {
        let mut vmi = vmi();
        vmi["status"] = json!({"machine": {"type": "pc-q35-7.2"}});
        assert_eq!(try_plan(vmi.clone(), &wired(), true).await.unwrap().machine.machine_type, "pc-q35-7.2");
        assert_eq!(try_plan(vmi, &wired(), false).await.unwrap().machine.machine_type, "q35");
    }

    #[tokio::test]
    async fn a_uid_that_is_no_uuid_is_not_given_to_qemu() {
        let mut vmi = vmi();
        vmi["metadata"]["uid"] = json!("u-1");
        assert_eq!(try_plan(vmi, &wired(), false).await.unwrap().machine.uuid, None);
    }

    #[tokio::test]
    async fn a_flat_kernel_image_is_the_firmware() {
        let mut vmi = vmi();
        vmi["spec"]["domain"]["firmware"] =
            json!({"kernelBoot": {"container": {"image": "rom", "kernelPath": "/rom.bin"}}});
        assert!(matches!(try_plan(vmi.clone(), &wired(), false).await.unwrap().machine.boot, Boot::Rom(_)));
        vmi["spec"]["domain"]["firmware"]["kernelBoot"]["container"]["kernelPath"] = json!("/../../etc/passwd");
        assert!(try_plan(vmi, &wired(), false).await.is_err());
    }

    #[tokio::test]
    async fn clock_and_tpm_are_as_the_vmi_has_them() {
        let mut vmi = vmi();
        vmi["spec"]["domain"]["clock"] = json!({"utc": {"offsetSeconds": 90}, "timer": {"hpet": {"present": false}}});
        vmi["spec"]["domain"]["devices"]["tpm"] = json!({});
        let machine = try_plan(vmi.clone(), &wired(), false).await.unwrap().machine;
        assert_eq!((machine.clock_offset_seconds, machine.timers.hpet), (90, false));
        assert!(machine.tpm.unwrap().ends_with(TPM));
        vmi["spec"]["domain"]["devices"]["tpm"] = json!({"enabled": false});
        assert_eq!(try_plan(vmi, &wired(), false).await.unwrap().machine.tpm, None);
    }

    #[tokio::test]
    async fn what_does_not_fit_together_is_named() {
        let error = try_plan(vmi(), &[], false).await.unwrap_err();
        assert!(error.to_string().contains("interface default"), "{error}");
        let mut bad = vmi();
        bad["spec"]["volumes"] = json!([]);
        assert!(try_plan(bad, &wired(), false).await.unwrap_err().to_string().contains("disk seed"));
        let mut bad = vmi();
        bad["spec"]["domain"]["firmware"] = json!({
            "bootloader": {"efi": {"secureBoot": false}},
            "kernelBoot": {"container": {"image": "rom", "kernelPath": "/rom.bin"}},
        });
        assert!(try_plan(bad, &wired(), false).await.unwrap_err().to_string().contains("efi"));
        let mut bad = vmi();
        bad["spec"]["domain"]["memory"] = json!({});
        assert!(try_plan(bad, &wired(), false).await.unwrap_err().to_string().contains("memory"));
    }
}
