//! A virtual machine as data, and the QEMU command line that makes it.
//!
//! Source and target of a migration must build the same machine. So every device has an explicit id and an explicit place
//! on its bus that follow from its role and its number alone, and the arguments come in one fixed order. Where a machine
//! is built (paths, taps, sockets) never changes what the guest sees.

mod clock;
mod disk;
mod firmware;

use crate::accelerator::Accelerator;
use crate::memory::GuestMemory;
pub use clock::{MissedTicks, Timers};
pub use disk::{Bus, Cache, Disk, DiskKind, Format, PLACES, node_name, plugged_number};
pub(crate) use disk::{NODE_PREFIX, plugged_id};
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
    /// A screen (VGA, 8 MiB of memory: up to 1920x1080), and the unix socket on which QEMU shows it (VNC); no graphics device when none.
    pub screen: Option<PathBuf>,
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
    /// QEMU ends rather than building it without what this machine lacks of it.
    pub enforce: bool,
    /// Sockets.
    pub sockets: u32,
    /// Cores a socket.
    pub cores: u32,
    /// Threads a core.
    pub threads: u32,
}

impl Default for Cpu {
    fn default() -> Self {
        Cpu { model: None, features: Vec::new(), enforce: false, sockets: 1, cores: 1, threads: 1 }
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

/// What QEMU denies itself once its machine is built (seccomp): system calls that nobody needs any more, other users and groups,
/// starting programs, and changing its scheduling. A guest that has taken over its QEMU gets no further with them. None of what
/// a guest or its migration needs is among them; what serves it from outside (swtpm) is started by the launcher.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// What QEMU calls a PC's memory when it makes it itself; streams name it so.
const RAM: &str = "pc.ram";

const SCREEN_SLOT: usize = 0x2;
const RNG_SLOT: usize = 0x3;
const BALLOON_SLOT: usize = 0x4;
const SERIAL_SLOT: usize = 0x5;
const NIC_SLOTS: std::ops::Range<usize> = 0x8..0x10;
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
            screen: None,
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
        out.pair("-sandbox", SANDBOX);

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
        if let Some(screen) = &self.screen {
            out.pair("-vnc", format!("unix:{}", path_value(screen)?));
            // QEMU's default of 16 MiB is twice what a full HD picture needs, and all of it is looked through when the guest moves.
            out.pair("-device", format!("VGA,id=video0,vgamem_mb=8,bus={bus},addr={SCREEN_SLOT:#x}"));
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
        if self.cpu.enforce {
            option += ",enforce";
        }
        Ok(option)
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
mod tests;
