//! `eth0` by ioctl: this guest has no `ip` and needs one address, one route. Without `godwit.ip` it asks busybox's DHCP
//! client, which is on board, for one.

use crate::boot::Options;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

const SIOCSIFADDR: u64 = 0x8916;
const SIOCSIFNETMASK: u64 = 0x891c;
const SIOCSIFFLAGS: u64 = 0x8914;
const IFF_UP: i16 = 1;

/// `struct ifreq` with a socket address or flags in its union.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    value: [u8; 24],
}

impl InterfaceRequest {
    fn new(name: &str) -> Self {
        let mut request = Self { name: [0; 16], value: [0; 24] };
        let bytes = name.as_bytes();
        let length = bytes.len().min(15);
        request.name[..length].copy_from_slice(&bytes[..length]);
        request
    }

    fn with_address(name: &str, address: Ipv4Addr) -> Self {
        let mut request = Self::new(name);
        request.value[..2].copy_from_slice(&(nix::libc::AF_INET as u16).to_ne_bytes());
        request.value[4..8].copy_from_slice(&address.octets());
        request
    }

    fn up(name: &str) -> Self {
        let mut request = Self::new(name);
        request.value[..2].copy_from_slice(&IFF_UP.to_ne_bytes());
        request
    }
}

fn order(socket: &OwnedFd, code: u64, request: &InterfaceRequest) -> Result<(), String> {
    // SAFETY: `request` is a live `struct ifreq` of full size and these three ioctls only read it.
    let result = unsafe { nix::libc::ioctl(socket.as_raw_fd(), code as _, std::ptr::from_ref(request)) };
    if result < 0 { Err(format!("ioctl {code:#x}: {}", std::io::Error::last_os_error())) } else { Ok(()) }
}

/// Brings `lo` and `eth0` up, with the address of the command line or one by DHCP.
pub fn configure(options: &Options) -> Result<(), String> {
    let socket =
        socket(AddressFamily::Inet, SockType::Datagram, SockFlag::empty(), None).map_err(|e| format!("socket: {e}"))?;
    order(&socket, SIOCSIFFLAGS, &InterfaceRequest::up("lo"))?;
    wait_for("/sys/class/net/eth0")?;
    if let Some((address, prefix)) = options.address {
        order(&socket, SIOCSIFADDR, &InterfaceRequest::with_address("eth0", address))?;
        let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0));
        order(&socket, SIOCSIFNETMASK, &InterfaceRequest::with_address("eth0", mask))?;
    }
    order(&socket, SIOCSIFFLAGS, &InterfaceRequest::up("eth0"))?;
    if let Some(gateway) = options.gateway {
        busybox(&["ip", "route", "add", "default", "via", &gateway.to_string()])?;
    }
    if options.address.is_none() {
        busybox(&["udhcpc", "-i", "eth0", "-b", "-s", "/dhcp.sh"])?;
    }
    Ok(())
}

fn busybox(arguments: &[&str]) -> Result<(), String> {
    // No `wait`: the reaper thread of process 1 collects it.
    std::process::Command::new("/bin/busybox")
        .args(arguments)
        .spawn()
        .map(drop)
        .map_err(|e| format!("busybox {}: {e}", arguments.join(" ")))
}

fn wait_for(path: &str) -> Result<(), String> {
    for _ in 0..100 {
        if std::path::Path::new(path).exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(format!("{path} did not appear in 2 s: is there a network card, and its driver in /modules?"))
}
