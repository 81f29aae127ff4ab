//! Disks: their block nodes and devices, on the command line and for the monitor.

use std::path::{Path, PathBuf};

use super::{Arguments, Error, Machine, path_text, too_many, value};

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

const SCSI_SLOT: usize = 0x6;
const SATA_SLOT: usize = 0x7;
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
    pub(super) fn disk_arguments(&self, bus: &str, out: &mut Arguments) -> Result<(), Error> {
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
    /// A raw disk that the guest may write to, there from the start, with what is left unsaid at its default.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>, bus: Bus) -> Self {
        Disk {
            name: name.into(),
            path: path.into(),
            format: Format::Raw,
            size: None,
            bus,
            kind: DiskKind::Disk,
            read_only: false,
            serial: None,
            cache: Cache::default(),
            boot_index: None,
            place: None,
        }
    }

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
