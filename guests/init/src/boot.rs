//! What a kernel expects of process 1, and what this one is told on the kernel's command line.

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io::Read;
use std::time::Duration;

/// What the command line says.
pub struct Options {
    /// Address and prefix length of `eth0`, if it has one.
    pub address: Option<(std::net::Ipv4Addr, u8)>,
    /// Default gateway.
    pub gateway: Option<std::net::Ipv4Addr>,
    /// Host name.
    pub hostname: String,
    /// Where it answers HTTP.
    pub ports: Vec<u16>,
    /// MiB of memory kept and verified.
    pub working_set_mib: usize,
    /// MiB a second rewritten.
    pub dirty_mib_per_second: usize,
    /// Disks that are written to and verified, as the kernel names them.
    pub disks: Vec<String>,
    /// Who measures how long the guest stands still.
    pub witness: Option<std::net::SocketAddrV4>,
    /// How often it is told that the guest runs.
    pub witness_every: Duration,
    /// Which guest agent it has.
    pub agent: Agent,
    /// A CD that is mounted at `/mnt`, as the kernel names it.
    pub mount: Option<String>,
}

/// A guest agent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Agent {
    /// Our own.
    Own,
    /// QEMU's.
    Qemus,
    /// There is none.
    None,
}

impl Options {
    /// Reads `/proc/cmdline`; what is absent or malformed has its default.
    pub fn from_command_line() -> Self {
        let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
        let value = |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        let number = |key: &str, default| value(key).and_then(|v| v.parse().ok()).unwrap_or(default);
        Self {
            address: value("godwit.ip").and_then(|v| {
                let (address, prefix) = v.split_once('/')?;
                Some((address.parse().ok()?, prefix.parse().ok()?))
            }),
            gateway: value("godwit.gw").and_then(|v| v.parse().ok()),
            hostname: value("godwit.hostname").unwrap_or("godwit-guest").to_owned(),
            ports: value("godwit.ports").unwrap_or("80").split(',').filter_map(|port| port.parse().ok()).collect(),
            working_set_mib: number("godwit.wss", 16).max(1),
            dirty_mib_per_second: number("godwit.dirty", 1),
            disks: value("godwit.disks")
                .unwrap_or_default()
                .split(',')
                .filter(|d| !d.is_empty())
                .map(str::to_owned)
                .collect(),
            witness: value("godwit.witness").and_then(|v| v.parse().ok()),
            witness_every: Duration::from_micros(number("godwit.witness-us", 2000).max(100) as u64),
            agent: match value("godwit.agent") {
                Some("qemu") => Agent::Qemus,
                Some("none") => Agent::None,
                _ => Agent::Own,
            },
            mount: value("godwit.mount").map(str::to_owned),
        }
    }
}

/// Mounts the kernel's file systems.
pub fn mount_all() {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        let _ = fs::create_dir_all(target);
        // devtmpfs may already be there (CONFIG_DEVTMPFS_MOUNT): not an error worth a word.
        let _ = mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>);
    }
}

/// Mounts a CD at `/mnt`, as soon as there is one.
pub fn mount_cd(name: &str) {
    let _ = fs::create_dir_all("/mnt");
    let device = format!("/dev/{name}");
    for _ in 0..300 {
        if mount(Some(device.as_str()), "/mnt", Some("iso9660"), MsFlags::MS_RDONLY, None::<&str>).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("mount: no CD {device}");
}

/// Loads `/modules/*.ko` in the order of `/modules/order`.
pub fn load_modules() {
    let order = fs::read_to_string("/modules/order").unwrap_or_default();
    for name in order.lines() {
        let loaded = fs::File::open(format!("/modules/{name}")).map_err(|e| e.to_string()).and_then(|file| {
            finit_module(&file, &CString::default(), ModuleInitFlags::empty()).map_err(|e| e.to_string())
        });
        if let Err(error) = loaded {
            println!("module {name}: {error}");
        }
    }
}

/// Sets the host name.
pub fn set_hostname(name: &str) {
    let _ = nix::unistd::sethostname(name);
}

/// Waits for the ACPI power button and turns the machine off. Which of the input devices the button is, is not settled (a
/// keyboard may come first), so all of them are read.
pub fn power_button() {
    let mut known = BTreeSet::new();
    loop {
        for entry in fs::read_dir("/dev/input").into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with("event")
                && !known.contains(&name)
                && let Ok(device) = fs::File::open(entry.path())
            {
                known.insert(name);
                std::thread::spawn(move || watch_for_power_key(device));
            }
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn watch_for_power_key(mut device: fs::File) {
    const EV_KEY: u16 = 1;
    const KEY_POWER: u16 = 116;
    // struct input_event on 64-bit: two longs of time, type, code, value.
    let mut event = [0_u8; 24];
    while device.read_exact(&mut event).is_ok() {
        let kind = u16::from_ne_bytes([event[16], event[17]]);
        let code = u16::from_ne_bytes([event[18], event[19]]);
        if kind == EV_KEY && code == KEY_POWER {
            power_off();
        }
    }
}

/// Turns the machine off; returns only if the kernel refuses.
pub fn power_off() {
    println!("power off");
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_POWER_OFF);
}

/// Starts the machine over; returns only if the kernel refuses.
pub fn start_over() {
    println!("reboot");
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_AUTOBOOT);
}

/// Collects orphans, as process 1 must.
pub fn reap() {
    loop {
        if nix::sys::wait::wait().is_err() {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}
