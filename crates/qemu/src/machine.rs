//! A virtual machine as data, and the QEMU command line that makes it.
//!
//! Source and target of a migration must build the same machine. So every device has an explicit id and an explicit place
//! on its bus that follow from its role and its number alone, and the arguments come in one fixed order. Where a machine
//! is built (paths, taps, sockets) never changes what the guest sees.

mod clock;
mod firmware;

use crate::accelerator::Accelerator;
use crate::memory::GuestMemory;
pub use clock::{MissedTicks, Timers};
pub use firmware::Efi;
use std::path::{Path, PathBuf};

/// Everything QEMU is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Shown in process lists.
    pub name: String,
    /// What executes the guest.
    pub accelerator: Accelerator,
    /// `q35`, `pc`, or one with a version such as `pc-q35-7.2`.
    pub machine_type: String,
    /// Virtual CPUs.
    pub cpu: Cpu,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Memory that other QEMUs can map as well; none is QEMU's own. Both can be migrated to each other.
    pub shared_memory: Option<GuestMemory>,
    /// What boots.
    pub boot: Boot,
    /// EFI firmware in the place of SeaBIOS.
    pub efi: Option<Efi>,
    /// System management mode; none leaves it to QEMU. Secure boot needs it.
    pub system_management: Option<bool>,
    /// A trusted platform module: the control socket of [`crate::tpm::Tpm`].
    pub tpm: Option<PathBuf>,
    /// Disks in the order of their definition.
    pub disks: Vec<Disk>,
    /// Network interfaces in the order of their definition.
    pub nics: Vec<Nic>,
    /// A unix socket on which QEMU offers the first serial port; no serial port when none.
    pub serial: Option<PathBuf>,
    /// A random number generator.
    pub rng: bool,
    /// A unix socket on which QEMU offers the guest agent's channel.
    pub guest_agent: Option<PathBuf>,
    /// A memory balloon that returns free pages.
    pub balloon: bool,
    /// The balloon also says, when the guest is sent, which of its memory is free and need not be (`free-page-hint`). The
    /// guest sees this as a feature of the device, so both ends of a migration must agree on it.
    pub free_page_hint: bool,
    /// There is a controller for disks that come while the guest runs ([`Disk::place`]).
    pub hotplug: bool,
    /// SMBIOS UUID.
    pub uuid: Option<String>,
    /// SMBIOS serial number of the system.
    pub serial_number: Option<String>,
    /// ACPI tables.
    pub acpi: bool,
    /// Seconds by which the guest's clock differs from UTC.
    pub clock_offset_seconds: i64,
    /// Its timers.
    pub timers: Timers,
    /// The unix socket of the monitor.
    pub monitor: PathBuf,
    /// Wait for a migration instead of booting.
    pub incoming: bool,
}

/// Virtual CPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// QEMU's model; none takes what fits the accelerator best.
    pub model: Option<String>,
    /// Features that are added (`true`) or removed.
    pub features: Vec<(String, bool)>,
    /// Sockets.
    pub sockets: u32,
    /// Cores a socket.
    pub cores: u32,
    /// Threads a core.
    pub threads: u32,
}

impl Default for Cpu {
    fn default() -> Self {
        Cpu { model: None, features: Vec::new(), sockets: 1, cores: 1, threads: 1 }
    }
}

impl Cpu {
    /// How many virtual CPUs this makes.
    pub fn count(&self) -> u64 {
        u64::from(self.sockets) * u64::from(self.cores) * u64::from(self.threads)
    }
}

/// What boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// The firmware (SeaBIOS), which looks at disks and networks by their boot index.
    Firmware,
    /// A Linux kernel, directly.
    Kernel {
        /// The kernel image.
        kernel: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
        /// Its command line.
        arguments: String,
    },
    /// A flat image in the firmware's place.
    Rom(PathBuf),
}

/// Of what kind the file behind a `kernel` is.
///
/// A flat firmware image (a multiple of 64 KiB, at most 16 MiB, without Linux' magic `HdrS` at 0x202) takes the firmware's
/// place. This is an extension: it lets a test guest that is its own firmware be given as `kernelBoot`.
pub fn boot_of_kernel(kernel: PathBuf, initrd: Option<PathBuf>, arguments: String) -> std::io::Result<Boot> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(&kernel)?;
    let size = file.metadata()?.len();
    let mut magic = [0u8; 4];
    let is_linux =
        file.seek(SeekFrom::Start(0x202)).is_ok() && file.read_exact(&mut magic).is_ok() && &magic == b"HdrS";
    if !is_linux && initrd.is_none() && size > 0 && size.is_multiple_of(64 << 10) && size <= 16 << 20 {
        return Ok(Boot::Rom(kernel));
    }
    Ok(Boot::Kernel { kernel, initrd, arguments })
}

/// The bus that a disk is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// virtio-blk.
    Virtio,
    /// AHCI.
    Sata,
    /// virtio-scsi.
    Scsi,
}

/// As what the guest sees a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskKind {
    /// A disk.
    Disk,
    /// A CD-ROM.
    CdRom,
}

/// The format of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Sector for sector.
    Raw,
    /// QEMU's own, for overlays.
    Qcow2,
}

impl Format {
    /// QEMU's name of it.
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// How the host caches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// The host's page cache is used, flushes are honoured.
    #[default]
    Writeback,
    /// The host's page cache is left out.
    None,
    /// Every write is forced to the disk.
    Writethrough,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Name of its block node and device; letters, digits, `-`, at most 20 of them are used.
    pub name: String,
    /// The file or block device.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// How many bytes of it the guest sees, of a raw one that is larger than the guest's disk; none is all.
    pub size: Option<u64>,
    /// The bus.
    pub bus: Bus,
    /// Disk or CD-ROM.
    pub kind: DiskKind,
    /// The guest cannot write.
    pub read_only: bool,
    /// Serial number.
    pub serial: Option<String>,
    /// Caching.
    pub cache: Cache,
    /// Place in the boot order, from 1.
    pub boot_index: Option<u32>,
    /// Its place among the disks that come while the guest runs, from 0; none of those that are there from the start. It stays
    /// the same wherever the guest goes.
    pub place: Option<u32>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// The tap device, which is there already.
    pub tap: String,
    /// MAC address.
    pub mac: String,
    /// `virtio`, `e1000`, `e1000e`, `rtl8139`, `ne2k_pci`, `pcnet`.
    pub model: String,
    /// MTU offered to the guest (virtio only).
    pub mtu: Option<u32>,
    /// Place in the boot order, from 1.
    pub boot_index: Option<u32>,
}

/// Why a machine cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// More devices than places.
    #[error("{count} {what} are more than the {limit} that a machine has places for")]
    TooMany {
        /// Of which devices.
        what: &'static str,
        /// How many were asked for.
        count: usize,
        /// How many there can be.
        limit: usize,
    },
    /// A value that QEMU's options cannot carry.
    #[error("{what} {value:?} is not possible: {why}")]
    Bad {
        /// Which value.
        what: &'static str,
        /// The value.
        value: String,
        /// Why not.
        why: &'static str,
    },
}

/// What QEMU calls a PC's memory when it makes it itself; streams name it so.
const RAM: &str = "pc.ram";

const RNG_SLOT: usize = 0x3;
const BALLOON_SLOT: usize = 0x4;
const SERIAL_SLOT: usize = 0x5;
const SCSI_SLOT: usize = 0x6;
const SATA_SLOT: usize = 0x7;
const NIC_SLOTS: std::ops::Range<usize> = 0x8..0x10;
const DISK_SLOTS: std::ops::Range<usize> = 0x10..0x1f;
/// Ports of the AHCI controller.
const SATA_PORTS: usize = 6;
/// How many LUNs of the SCSI controller are for disks that are there from the start.
const SCSI_UNITS: usize = 64;
/// How many disks may come while the guest runs; their LUNs follow on the others'.
pub const PLACES: u32 = 128;
/// Their numbers begin where no other disk's are.
const FIRST_PLUGGED: usize = 100;

impl Machine {
    /// The smallest machine: one CPU, no disks, TCG.
    pub fn new(monitor: impl Into<PathBuf>, memory_mib: u64, boot: Boot) -> Self {
        Machine {
            name: "guest".into(),
            accelerator: Accelerator::Tcg,
            machine_type: "q35".into(),
            cpu: Cpu::default(),
            memory_mib,
            shared_memory: None,
            boot,
            efi: None,
            system_management: None,
            tpm: None,
            disks: Vec::new(),
            nics: Vec::new(),
            serial: None,
            rng: false,
            guest_agent: None,
            balloon: false,
            free_page_hint: false,
            hotplug: false,
            uuid: None,
            serial_number: None,
            acpi: true,
            clock_offset_seconds: 0,
            timers: Timers::default(),
            monitor: monitor.into(),
            incoming: false,
        }
    }

    /// QEMU's arguments. `now_seconds` (Unix time) is used only for a clock that is not UTC.
    pub fn arguments(&self, now_seconds: i64) -> Result<Vec<String>, Error> {
        let mut out = Arguments(Vec::new());
        let bus = if is_q35(&self.machine_type) { "pcie.0" } else { "pci.0" };
        out.pair("-name", format!("guest={}", value("name", &self.name)?));
        out.flags(&["-nodefaults", "-no-user-config", "-S"]);
        out.pair("-display", "none");
        out.pair("-vga", "none");

        let acpi = if self.acpi { "" } else { ",acpi=off" };
        let smm = match self.system_management {
            Some(true) => ",smm=on",
            Some(false) => ",smm=off",
            None => "",
        };
        let efi = self.efi.as_ref().map(Efi::machine_options).unwrap_or_default();
        out.pair(
            "-machine",
            format!(
                "{},usb=off,vmport=off,dump-guest-core=off{acpi}{smm}{}{efi}{}",
                plain("machine type", &self.machine_type)?,
                self.timers.machine_options(),
                if self.shared_memory.is_some() { format!(",memory-backend={RAM}") } else { String::new() }
            ),
        );
        out.pair("-accel", self.accelerator_option());
        out.pair("-cpu", self.cpu_option()?);
        if self.memory_mib == 0 {
            return Err(Error::Bad { what: "memory", value: "0".into(), why: "a guest needs some" });
        }
        out.pair("-m", format!("{}M", self.memory_mib));
        if let Some(memory) = &self.shared_memory {
            if memory.bytes() != self.memory_mib.saturating_mul(1 << 20) {
                return Err(Error::Bad {
                    what: "memory",
                    value: format!("{} bytes", memory.bytes()),
                    why: "it is not as large as the guest's",
                });
            }
            out.pair(
                "-object",
                format!(
                    "memory-backend-file,id={RAM},x-use-canonical-path-for-ramblock-id=off,size={}M,mem-path={},share=on",
                    self.memory_mib,
                    memory.path()
                ),
            );
        }
        let Cpu { sockets, cores, threads, .. } = self.cpu;
        let count = self.cpu.count();
        if !(1..=255).contains(&count) {
            return Err(Error::Bad { what: "CPUs", value: count.to_string(), why: "from 1 to 255 are possible" });
        }
        out.pair("-smp", format!("{count},sockets={sockets},cores={cores},threads={threads}"));
        if let Some(uuid) = &self.uuid {
            out.pair("-uuid", plain("uuid", uuid)?);
        }
        if let Some(serial) = &self.serial_number {
            out.pair("-smbios", format!("type=1,serial={}", value("system serial number", serial)?));
        }
        out.pair("-rtc", self.timers.clock_option(self.clock_offset_seconds, now_seconds));
        if let Some(policy) = self.timers.pit_policy(self.accelerator) {
            out.pair("-global", format!("kvm-pit.lost_tick_policy={policy}"));
        }
        match &self.boot {
            Boot::Firmware => out.pair("-boot", "strict=on"),
            Boot::Rom(path) => out.pair("-bios", path_text(path)?),
            Boot::Kernel { kernel, initrd, arguments } => {
                out.pair("-kernel", path_text(kernel)?);
                if let Some(initrd) = initrd {
                    // `-initrd` takes a list of files, so a comma is doubled here as in options.
                    out.pair("-initrd", value("initrd", &path_text(initrd)?)?);
                }
                if !arguments.is_empty() {
                    out.pair("-append", arguments.clone());
                }
            }
        }

        if let Some(efi) = &self.efi {
            efi.arguments(&mut out)?;
        }
        if let Some(socket) = &self.tpm {
            firmware::tpm_arguments(socket, &mut out)?;
        }

        out.pair("-chardev", format!("socket,id=monitor,path={},server=on,wait=off", path_value(&self.monitor)?));
        out.pair("-mon", "chardev=monitor,mode=control");
        if let Some(serial) = &self.serial {
            out.pair("-chardev", format!("socket,id=serial0,path={},server=on,wait=off", path_value(serial)?));
            out.pair("-device", "isa-serial,id=serial-port0,chardev=serial0,index=0");
        }
        if self.rng {
            out.pair("-object", "rng-random,id=rng0,filename=/dev/urandom");
            out.pair("-device", format!("virtio-rng-pci,id=rng-device0,rng=rng0,bus={bus},addr={RNG_SLOT:#x}"));
        }
        if self.balloon {
            let mut device = "virtio-balloon-pci,id=balloon0,free-page-reporting=on".to_owned();
            if self.free_page_hint {
                // QEMU takes the hints in a thread of their own, and wants to be told which.
                out.pair("-object", "iothread,id=hints0");
                device += ",free-page-hint=on,iothread=hints0";
            }
            out.pair("-device", format!("{device},bus={bus},addr={BALLOON_SLOT:#x}"));
        }
        if let Some(agent) = &self.guest_agent {
            out.pair("-device", format!("virtio-serial-pci,id=virtio-serial0,bus={bus},addr={SERIAL_SLOT:#x}"));
            out.pair("-chardev", format!("socket,id=agent,path={},server=on,wait=off", path_value(agent)?));
            out.pair(
                "-device",
                "virtserialport,id=agent-port,bus=virtio-serial0.0,nr=1,chardev=agent,name=org.qemu.guest_agent.0",
            );
        }
        self.disk_arguments(bus, &mut out)?;
        self.nic_arguments(bus, &mut out)?;
        if self.incoming {
            out.pair("-incoming", "defer");
        }
        Ok(out.0)
    }

    /// Whether it has a SCSI controller, which also takes disks that come while the guest runs.
    pub fn has_scsi(&self) -> bool {
        self.hotplug || self.disks.iter().any(|disk| disk.bus == Bus::Scsi)
    }

    fn accelerator_option(&self) -> String {
        match self.accelerator {
            Accelerator::Kvm => "kvm".into(),
            // The translation cache: QEMU's default of up to 1 GiB is far more than a small guest can fill.
            Accelerator::Tcg => format!("tcg,tb-size={}", (self.memory_mib / 4).clamp(4, 512)),
        }
    }

    fn cpu_option(&self) -> Result<String, Error> {
        let mut option = match (self.cpu.model.as_deref(), self.accelerator) {
            (Some("host-passthrough" | "host-model") | None, Accelerator::Kvm) => "host".into(),
            // 57-bit addresses only make every page walk of the translator longer.
            (Some("host-passthrough" | "host-model") | None, Accelerator::Tcg) => "max,la57=off".into(),
            (Some(model), _) => plain("CPU model", model)?,
        };
        if self.accelerator == Accelerator::Kvm && !self.timers.kvm_clock {
            option += ",kvmclock=off";
        }
        for (feature, on) in &self.cpu.features {
            option += &format!(",{}={}", plain("CPU feature", feature)?, if *on { "on" } else { "off" });
        }
        Ok(option)
    }

    fn disk_arguments(&self, bus: &str, out: &mut Arguments) -> Result<(), Error> {
        let on = |bus: Bus| self.disks.iter().filter(move |d| d.bus == bus && d.place.is_none()).count();
        too_many("virtio disks", on(Bus::Virtio), DISK_SLOTS.len())?;
        too_many("SATA disks", on(Bus::Sata), SATA_PORTS)?;
        too_many("SCSI disks", on(Bus::Scsi), SCSI_UNITS)?;
        if self.has_scsi() {
            out.pair("-device", format!("virtio-scsi-pci,id=scsi0,bus={bus},addr={SCSI_SLOT:#x}"));
        }
        if on(Bus::Sata) > 0 {
            out.pair("-device", format!("ich9-ahci,id=sata0,bus={bus},addr={SATA_SLOT:#x}"));
        }
        let (mut virtio, mut sata, mut scsi) = (0, 0, 0);
        for (number, disk) in self.disks.iter().enumerate() {
            if let Some(place) = disk.place {
                out.pair("-blockdev", listed(disk.node(&node_name(plugged_number(place)))?)?);
                out.pair("-device", listed(disk.plugged_device(place)?)?);
                continue;
            }
            let node = node_name(number);
            out.pair("-blockdev", listed(disk.node(&node)?)?);
            let mut device = match (disk.bus, disk.kind) {
                (Bus::Virtio, DiskKind::CdRom) => {
                    return Err(Error::Bad { what: "CD-ROM bus", value: "virtio".into(), why: "use sata or scsi" });
                }
                (Bus::Virtio, DiskKind::Disk) => {
                    virtio += 1;
                    format!("virtio-blk-pci,bus={bus},addr={:#x}", DISK_SLOTS.start + virtio - 1)
                }
                (Bus::Sata, kind) => {
                    sata += 1;
                    format!("{},bus=sata0.{}", if kind == DiskKind::CdRom { "ide-cd" } else { "ide-hd" }, sata - 1)
                }
                (Bus::Scsi, kind) => {
                    scsi += 1;
                    let device = if kind == DiskKind::CdRom { "scsi-cd" } else { "scsi-hd" };
                    format!("{device},bus=scsi0.0,channel=0,scsi-id=0,lun={}", scsi - 1)
                }
            };
            device += &format!(",drive={node},id=disk{number}");
            if disk.kind == DiskKind::Disk {
                device += if disk.cache == Cache::Writethrough { ",write-cache=off" } else { ",write-cache=on" };
            }
            // A node that two QEMUs hold during the switchover must not be locked by the one that does not run yet; QEMU
            // sees to that itself (`-incoming` leaves nodes inactive).
            if let Some(serial) = &disk.serial {
                device += &format!(",serial={}", value("disk serial", serial)?);
            }
            if let Some(index) = disk.boot_index {
                device += &format!(",bootindex={index}");
            }
            out.pair("-device", device);
        }
        Ok(())
    }

    fn nic_arguments(&self, bus: &str, out: &mut Arguments) -> Result<(), Error> {
        too_many("network interfaces", self.nics.len(), NIC_SLOTS.len())?;
        for (number, nic) in self.nics.iter().enumerate() {
            let model = match nic.model.as_str() {
                "virtio" | "" => "virtio-net-pci",
                model @ ("e1000" | "e1000e" | "rtl8139" | "ne2k_pci" | "pcnet") => model,
                other => {
                    return Err(Error::Bad {
                        what: "interface model",
                        value: other.into(),
                        why: "QEMU has none of this name here",
                    });
                }
            };
            out.pair(
                "-netdev",
                format!("tap,id=net{number},ifname={},script=no,downscript=no", plain("tap", &nic.tap)?),
            );
            let mut device = format!(
                "{model},id=nic{number},netdev=net{number},mac={},bus={bus},addr={:#x}",
                plain("MAC address", &nic.mac)?,
                NIC_SLOTS.start + number
            );
            if model == "virtio-net-pci"
                && let Some(mtu) = nic.mtu
            {
                device += &format!(",host_mtu={mtu}");
            }
            match nic.boot_index {
                Some(index) => device += &format!(",bootindex={index}"),
                // Without a place in the boot order there is nothing to boot from it, and its option ROM only costs memory.
                None => device += ",romfile=",
            }
            out.pair("-device", device);
        }
        Ok(())
    }
}

/// The block node of the disk with this number (from 0).
pub fn node_name(number: usize) -> String {
    format!("{NODE_PREFIX}{number}")
}

/// How all names of the disks' block nodes begin.
pub(crate) const NODE_PREFIX: &str = "drive";

/// The number of the disk at this place among those that come while the guest runs.
pub fn plugged_number(place: u32) -> usize {
    FIRST_PLUGGED.saturating_add(usize::try_from(place).unwrap_or(usize::MAX))
}

/// The id of its device.
pub(crate) fn plugged_id(place: u32) -> String {
    format!("disk{}", plugged_number(place))
}

/// An option of QEMU's with its value. Dots in names lead into objects.
type Options = Vec<(&'static str, String)>;

/// Options as QEMU's command line takes them.
fn listed(options: Options) -> Result<String, Error> {
    let mut out = Vec::new();
    for (name, text) in options {
        let text = value(name, &text)?;
        // Its first option goes without a name.
        out.push(if name == DEVICE { text } else { format!("{name}={text}") });
    }
    Ok(out.join(","))
}

/// The option of `-device` that says which; QMP calls it `driver`.
const DEVICE: &str = "device";

/// Options as QEMU's monitor takes them.
fn object(options: Options) -> serde_json::Value {
    use serde_json::{Map, Value};
    let mut whole = Value::Object(Map::new());
    for (name, text) in options {
        let name = if name == DEVICE { "driver" } else { name };
        let typed = match (name, text.as_str()) {
            // A property of the devices, where it has a third value.
            ("write-cache", _) => Value::from(text),
            (_, "on") => Value::from(true),
            (_, "off") if name != "file.locking" => Value::from(false),
            ("size" | "channel" | "scsi-id" | "lun", number) => number.parse::<u64>().map_or(Value::Null, Value::from),
            _ => Value::from(text),
        };
        let mut at = &mut whole;
        let mut parts = name.split('.').peekable();
        while let Some(part) = parts.next() {
            let Some(map) = at.as_object_mut() else { break };
            if parts.peek().is_none() {
                map.insert(part.to_owned(), typed);
                break;
            }
            at = map.entry(part).or_insert_with(|| Value::Object(Map::new()));
        }
    }
    whole
}

impl Disk {
    fn node(&self, node: &str) -> Result<Options, Error> {
        let read_only = if self.read_only { "on" } else { "off" };
        let (direct, aio) = match self.cache {
            Cache::None => ("on", "threads"),
            Cache::Writeback | Cache::Writethrough => ("off", "threads"),
        };
        // Of a read-only image there is nothing to protect, and images are shared between guests.
        let locking = if self.read_only { "off" } else { "auto" };
        // A raw CD-ROM or disk returns what the guest discards; `auto-read-only` is off so that a missing right is an error.
        let discard = if self.read_only { "ignore" } else { "unmap" };
        // Over a file that is not there to be shared the lock is QEMU's; over a block device the driver is another.
        let driver = if is_block_device(&self.path) { "host_device" } else { "file" };
        let mut options = vec![("driver", self.format.as_str().to_owned())];
        options.extend(self.size.map(|size| ("size", size.to_string())));
        options.extend([("node-name", node.to_owned()), ("file.filename", path_text(&self.path)?)]);
        options.extend(
            [
                ("read-only", read_only),
                ("discard", discard),
                ("cache.direct", direct),
                ("file.driver", driver),
                ("file.aio", aio),
                ("file.locking", locking),
                ("file.cache.direct", direct),
                ("file.discard", discard),
            ]
            .map(|(name, word)| (name, word.to_owned())),
        );
        Ok(options)
    }

    /// The device of a disk that comes while the guest runs, or has come so before.
    fn plugged_device(&self, place: u32) -> Result<Options, Error> {
        if place >= PLACES {
            return Err(Error::TooMany {
                what: "disks that come while the guest runs",
                count: usize::try_from(place).unwrap_or(usize::MAX).saturating_add(1),
                limit: usize::try_from(PLACES).unwrap_or(usize::MAX),
            });
        }
        let device = if self.kind == DiskKind::CdRom { "scsi-cd" } else { "scsi-hd" };
        let unit = usize::try_from(place).unwrap_or(usize::MAX).saturating_add(SCSI_UNITS);
        let mut options: Options = [(DEVICE, device), ("bus", "scsi0.0"), ("channel", "0"), ("scsi-id", "0")]
            .map(|(name, word)| (name, word.to_owned()))
            .into();
        options.extend([
            ("lun", unit.to_string()),
            ("drive", node_name(plugged_number(place))),
            ("id", plugged_id(place)),
        ]);
        if self.kind == DiskKind::Disk {
            let cache = if self.cache == Cache::Writethrough { "off" } else { "on" };
            options.push(("write-cache", cache.to_owned()));
        }
        options.extend(self.serial.clone().map(|serial| ("serial", serial)));
        Ok(options)
    }

    /// Block node and device for the monitor, of a disk that comes while the guest runs.
    pub(crate) fn plugging(&self, place: u32) -> Result<(serde_json::Value, serde_json::Value), Error> {
        let node = self.node(&node_name(plugged_number(place)))?;
        let device = self.plugged_device(place)?;
        for (name, text) in node.iter().chain(&device) {
            // What cannot be said on a command line is not said to the monitor either: the target has only the former.
            value(name, text)?;
        }
        Ok((object(node), object(device)))
    }
}

fn is_block_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

fn is_q35(machine_type: &str) -> bool {
    machine_type.contains("q35")
}

struct Arguments(Vec<String>);

impl Arguments {
    fn pair(&mut self, option: &str, value: impl Into<String>) {
        self.0.push(option.into());
        self.0.push(value.into());
    }

    fn flags(&mut self, options: &[&str]) {
        self.0.extend(options.iter().map(|o| o.to_string()));
    }
}

fn too_many(what: &'static str, count: usize, limit: usize) -> Result<(), Error> {
    if count > limit { Err(Error::TooMany { what, count, limit }) } else { Ok(()) }
}

/// A value within a list of options: QEMU ends it at a comma, and takes two commas for one.
fn value(what: &'static str, text: &str) -> Result<String, Error> {
    if text.contains(['\0', '\n']) {
        return Err(Error::Bad { what, value: text.into(), why: "it has a line end or a zero byte" });
    }
    Ok(text.replace(',', ",,"))
}

/// A name that must not carry any syntax.
fn plain(what: &'static str, text: &str) -> Result<String, Error> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    if text.is_empty() || !text.chars().all(fine) {
        return Err(Error::Bad {
            what,
            value: text.into(),
            why: "only letters, digits, `-`, `_`, `.` and `:` are allowed",
        });
    }
    Ok(text.into())
}

fn path_text(path: &Path) -> Result<String, Error> {
    path.to_str().map(str::to_owned).ok_or_else(|| Error::Bad {
        what: "path",
        value: path.to_string_lossy().into_owned(),
        why: "it is not UTF-8",
    })
}

fn path_value(path: &Path) -> Result<String, Error> {
    value("path", &path_text(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Machine {
        let disk = |name: &str, bus| Disk {
            name: name.into(),
            path: format!("/disks/{name},1.img").into(),
            format: Format::Raw,
            size: None,
            bus,
            kind: DiskKind::Disk,
            read_only: false,
            serial: None,
            cache: Cache::default(),
            boot_index: None,
            place: None,
        };
        let mut machine = Machine::new("/run/m", 512, Boot::Firmware);
        machine.disks =
            vec![disk("a", Bus::Virtio), disk("b", Bus::Sata), disk("c", Bus::Virtio), disk("d", Bus::Scsi)];
        machine.disks[1].kind = DiskKind::CdRom;
        let nic = Nic {
            tap: "tapeth0".into(),
            mac: "02:00:00:00:00:01".into(),
            model: "virtio".into(),
            mtu: Some(1450),
            boot_index: None,
        };
        machine.nics = vec![nic];
        machine
    }

    fn joined(machine: &Machine) -> String {
        machine.arguments(0).unwrap().join(" ")
    }

    #[test]
    fn devices_have_ids_and_places_of_their_own() {
        let line = joined(&full());
        for part in [
            "virtio-blk-pci,bus=pcie.0,addr=0x10,drive=drive0,id=disk0",
            "ide-cd,bus=sata0.0,drive=drive1,id=disk1",
            "virtio-blk-pci,bus=pcie.0,addr=0x11,drive=drive2,id=disk2",
            "scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=0,drive=drive3,id=disk3",
            "virtio-net-pci,id=nic0,netdev=net0,mac=02:00:00:00:00:01,bus=pcie.0,addr=0x8,host_mtu=1450",
            "file.filename=/disks/a,,1.img",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }

    #[test]
    fn a_target_differs_only_in_where_things_are() {
        let source = full();
        let mut target = full();
        target.monitor = "/run/other".into();
        target.incoming = true;
        let strip = |m: &Machine| {
            let line: Vec<String> = m.arguments(0).unwrap();
            line.into_iter()
                .filter(|a| !a.contains("id=monitor") && a != "-incoming" && a != "defer")
                .collect::<Vec<_>>()
        };
        assert_eq!(strip(&source), strip(&target));
    }

    #[test]
    fn nothing_runs_before_it_is_told_to() {
        let mut machine = full();
        assert!(machine.arguments(0).unwrap().contains(&"-S".to_string()));
        machine.incoming = true;
        assert!(machine.arguments(0).unwrap().contains(&"-S".to_string()));
    }

    #[test]
    fn a_disk_that_came_later_is_built_at_its_place_and_moves_no_other() {
        let mut machine = full();
        let before = joined(&machine);
        let late = Disk { place: Some(2), serial: Some("a,b".into()), bus: Bus::Scsi, ..machine.disks[3].clone() };
        machine.disks.push(late.clone());
        let after = joined(&machine);
        let device =
            "scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=66,drive=drive102,id=disk102,write-cache=on,serial=a,,b";
        assert!(after.contains(device), "{after}");
        let without = machine.disks.pop().map(|_| joined(&machine));
        assert_eq!(without, Some(before));
        let (node, device) = late.plugging(2).unwrap();
        assert_eq!((&node["node-name"], &node["file"]["filename"]), (&"drive102".into(), &"/disks/d,1.img".into()));
        assert_eq!((&node["read-only"], &node["cache"]["direct"]), (&false.into(), &false.into()));
        assert_eq!(
            (&device["driver"], &device["lun"], &device["serial"]),
            (&"scsi-hd".into(), &66.into(), &"a,b".into())
        );
        assert!(late.plugging(PLACES).is_err());
        // Without a SCSI disk from the start there is a controller only where one was asked for.
        machine.disks.clear();
        assert!(!joined(&machine).contains("virtio-scsi"));
        machine.hotplug = true;
        assert!(joined(&machine).contains("virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=0x6"));
    }

    #[test]
    fn what_would_smuggle_in_options_is_refused() {
        let mut machine = full();
        machine.nics[0].mac = "02:00:00:00:00:01,romfile=/etc/shadow".into();
        assert!(matches!(machine.arguments(0), Err(Error::Bad { what: "MAC address", .. })));
        let mut machine = full();
        machine.cpu.model = Some("max,x=y".into());
        assert!(matches!(machine.arguments(0), Err(Error::Bad { what: "CPU model", .. })));
        let mut machine = full();
        machine.disks[0].serial = Some("a,b".into());
        assert!(joined(&machine).contains("serial=a,,b"));
    }

    #[test]
    fn too_many_devices_are_refused_by_kind() {
        let mut machine = full();
        let disk = machine.disks[0].clone();
        machine.disks = vec![disk; 16];
        assert_eq!(machine.arguments(0), Err(Error::TooMany { what: "virtio disks", count: 16, limit: 15 }));
    }

    #[test]
    fn a_flat_image_takes_the_firmwares_place_and_a_kernel_does_not() {
        let folder = std::env::temp_dir().join(format!("godwit-boot-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, size: usize, magic: bool| {
            let mut bytes = vec![0u8; size];
            if magic {
                bytes[0x202..0x206].copy_from_slice(b"HdrS");
            }
            let path = folder.join(name);
            std::fs::write(&path, bytes).unwrap();
            boot_of_kernel(path, None, String::new()).unwrap()
        };
        assert!(matches!(write("rom", 64 << 10, false), Boot::Rom(_)));
        assert!(matches!(write("linux", 64 << 10, true), Boot::Kernel { .. }));
        assert!(matches!(write("odd", 1000, false), Boot::Kernel { .. }));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn hints_of_free_pages_are_a_feature_of_the_balloon_alone() {
        let mut machine = full();
        machine.free_page_hint = true;
        assert!(!joined(&machine).contains("hint"), "no balloon");
        machine.balloon = true;
        let with = joined(&machine);
        assert!(with.contains("-object iothread,id=hints0 -device virtio-balloon-pci,id=balloon0,"), "{with}");
        assert!(with.contains("free-page-hint=on,iothread=hints0,bus=pcie.0,addr=0x4"), "{with}");
        machine.free_page_hint = false;
        let without = joined(&machine);
        assert!(without.contains("virtio-balloon-pci") && !without.contains("hint"), "{without}");
    }

    #[test]
    fn efi_firmware_and_a_tpm_are_told() {
        let mut machine = full();
        let efi = Efi { code: "/ovmf/code".into(), variables: "/my/variables".into(), secure: false };
        machine.efi = Some(efi.clone());
        machine.tpm = Some("/run/tpm".into());
        let line = joined(&machine);
        for part in [
            ",pflash0=firmware-code,pflash1=firmware-variables",
            "node-name=firmware-code,read-only=on,file.driver=file,file.filename=/ovmf/code,file.locking=off",
            "node-name=firmware-variables,read-only=off,file.driver=file,file.filename=/my/variables",
            "socket,id=tpm-control,path=/run/tpm -tpmdev emulator,id=tpm-backend,chardev=tpm-control -device tpm-crb",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        assert!(!line.contains("smm") && !line.contains("cfi.pflash01"), "{line}");
        machine.efi = Some(Efi { secure: true, ..efi });
        machine.system_management = Some(true);
        let line = joined(&machine);
        assert!(line.contains(",smm=on") && line.contains("driver=cfi.pflash01,property=secure,value=on"), "{line}");
    }

    #[test]
    fn memory_that_others_can_map_bears_the_name_of_qemus_own() {
        let mut machine = full();
        assert!(!joined(&machine).contains("memory-backend"));
        let memory = GuestMemory::new(512).unwrap();
        machine.shared_memory = Some(memory.clone());
        let line = joined(&machine);
        assert!(line.contains(",memory-backend=pc.ram -accel"), "{line}");
        let object =
            "memory-backend-file,id=pc.ram,x-use-canonical-path-for-ramblock-id=off,size=512M,mem-path=/proc/self/fd/";
        assert!(line.contains(object) && line.contains(",share=on"), "{line}");
        machine.memory_mib = 256;
        assert!(matches!(machine.arguments(0), Err(Error::Bad { what: "memory", .. })));
    }

    #[test]
    fn a_clock_with_an_offset_starts_there() {
        let mut machine = full();
        machine.clock_offset_seconds = 3600;
        assert!(machine.arguments(0).unwrap().join(" ").contains("base=1970-01-01T01:00:00"));
    }
}
