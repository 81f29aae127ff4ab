//! Taps: links whose other end is a file descriptor of a process, such as QEMU.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::libc::{self, c_short, c_ulong};

use crate::{Error, Namespace, Result};

/// How a tap is to be. Packets never carry the extra protocol header (`IFF_NO_PI`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TapOptions {
    /// User who may open it without being root.
    pub owner: Option<u32>,
    /// Packets carry a virtio header, so that checksums and segmentation can be left to the guest's peer. QEMU asks for it.
    pub vnet_hdr: bool,
    /// Several queues can be attached.
    pub multi_queue: bool,
}

impl Default for TapOptions {
    fn default() -> Self {
        Self { owner: None, vnet_hdr: true, multi_queue: false }
    }
}

// The numbers are _IOW('T', 202…204, int) of linux/if_tun.h; the first one is an `ifreq` in truth.
nix::ioctl_write_ptr_bad!(tun_set_iff, 0x4004_54ca, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_persist, 0x4004_54cb);
nix::ioctl_write_int_bad!(tun_set_owner, 0x4004_54cc);

/// Opens the end of a tap that its process holds, such as QEMU does, and makes the tap if there is none; without
/// being made persistent it goes with the descriptor. Packets are read and written whole, with a virtio header in front where the
/// options say so.
///
/// # Errors
/// `EBUSY` when another process holds it open.
pub fn open_tap(namespace: &Namespace, name: &str, options: TapOptions) -> Result<File> {
    crate::links::check(name)?;
    namespace.run(|| open(namespace, name, options))?
}

fn failed(namespace: &Namespace, name: &str) -> impl Fn(std::io::Error) -> Error {
    let what = format!("make tap {name} in namespace {}", namespace.label());
    move |e| Error::io(what.clone(), e)
}

fn open(namespace: &Namespace, name: &str, options: TapOptions) -> Result<File> {
    let failed = failed(namespace, name);
    let file = File::options().read(true).write(true).open("/dev/net/tun").map_err(&failed)?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI;
    if options.vnet_hdr {
        flags |= libc::IFF_VNET_HDR;
    }
    if options.multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // SAFETY: an all-zero ifreq is a valid one (integers and byte arrays).
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // `check` has limited the name to 15 bytes, so the last of the 16 stays NUL.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the descriptor is the tun device and the ifreq is filled in and lives through the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }.map_err(|e| failed(e.into()))?;
    Ok(file)
}

pub(crate) fn create(namespace: &Namespace, name: &str, options: TapOptions) -> Result<()> {
    namespace.run(|| {
        let file = open(namespace, name, options)?;
        let failed = failed(namespace, name);
        let descriptor = file.as_raw_fd();
        if let Some(owner) = options.owner {
            let owner = i32::try_from(owner).map_err(|_| Error::Invalid(format!("user id {owner} is too large")))?;
            // SAFETY: the argument is an integer.
            unsafe { tun_set_owner(descriptor, owner) }.map_err(|e| failed(e.into()))?;
        }
        // SAFETY: the argument is an integer.
        unsafe { tun_set_persist(descriptor, 1) }.map_err(|e| failed(e.into()))?;
        Ok(())
    })?
}

const _: () = assert!(size_of::<c_ulong>() == 8, "the ioctl numbers above are those of 64-bit Linux");
