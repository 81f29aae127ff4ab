//! Block devices for volumes of mode `Block`: a file behind a loop device.
//!
//! A device lives as long as somebody has it open (`LO_FLAGS_AUTOCLEAR`), so nothing is left behind whatever is killed: the kubelet
//! holds it until the container's shim does, and that as long as its container lives. All nodes of a machine take the same device for
//! the same file, so that all see what one of them writes.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::libc;

/// `LOOP_CTL_GET_FREE`, `LOOP_CONFIGURE` and `LO_FLAGS_AUTOCLEAR` (linux/loop.h).
const GET_FREE: libc::c_ulong = 0x4c82;
const CONFIGURE: libc::c_ulong = 0x4c0a;
const AUTOCLEAR: u32 = 4;
/// How often another free device is asked for when somebody else was quicker.
const TRIES: u32 = 64;

nix::ioctl_none_bad!(get_free, GET_FREE);
nix::ioctl_write_ptr_bad!(configure, CONFIGURE, Config);

/// `struct loop_config` with its `struct loop_info64` (linux/loop.h), of which only the flags are used.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    fd: u32,
    block_size: u32,
    before_flags: [u64; 5],
    before_flags_too: [u32; 3],
    flags: u32,
    names_and_key: [u8; 64 + 64 + 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

/// A block device that is held.
#[derive(Debug)]
pub struct Device {
    /// Where it is.
    pub path: PathBuf,
    /// The file behind it; none where it is no loop device of ours.
    pub file: Option<PathBuf>,
    _held: File,
}

/// The device at `path`, or one for the file at `path`, which is made with `size` bytes if it is not there.
///
/// # Errors
/// As the system says; a folder in its place.
pub fn attach(path: &Path, size: u64) -> io::Result<Device> {
    if fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device()) {
        return Ok(Device { path: path.to_owned(), file: None, _held: File::open(path)? });
    }
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    // Whoever comes at the same time takes the same device.
    let file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| io::Error::from(error))?;
    if file.metadata()?.len() == 0 {
        file.set_len(size)?;
        file.sync_all()?;
    }
    let path = path.canonicalize()?;
    for entry in fs::read_dir("/sys/block")?.flatten() {
        let name = entry.file_name();
        if behind(&entry.path()).is_some_and(|file| file == path)
            && let Ok(device) = hold(&Path::new("/dev").join(name), &path)
        {
            return Ok(device);
        }
    }
    let control = File::open("/dev/loop-control")?;
    let mut last = io::Error::from_raw_os_error(libc::EBUSY);
    for _ in 0..TRIES {
        // SAFETY: takes no pointer.
        let number = unsafe { get_free(control.as_raw_fd()) }?;
        let device = PathBuf::from(format!("/dev/loop{number}"));
        let opened = File::options().read(true).write(true).open(&device)?;
        let config = Config {
            fd: u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?,
            block_size: 0,
            before_flags: [0; 5],
            before_flags_too: [0; 3],
            flags: AUTOCLEAR,
            names_and_key: [0; 160],
            init: [0; 2],
            reserved: [0; 8],
        };
        // SAFETY: the pointer is that of a whole `struct loop_config` that lives through the call.
        match unsafe { configure(opened.as_raw_fd(), &config) } {
            Ok(_) => return Ok(Device { path: device, file: Some(path), _held: opened }),
            Err(error @ nix::Error::EBUSY) => last = error.into(),
            Err(error) => return Err(error.into()),
        }
    }
    Err(last)
}

/// Holds a loop device, if `file` is behind it.
///
/// # Errors
/// It is not, or cannot be opened.
pub fn hold(device: &Path, file: &Path) -> io::Result<Device> {
    let held = File::open(device)?;
    let name = device.file_name().unwrap_or_default();
    // Looked at when it is held: it cannot become another's any more.
    match behind(&Path::new("/sys/block").join(name)) {
        Some(found) if found == file => {
            Ok(Device { path: device.to_owned(), file: Some(file.to_owned()), _held: held })
        }
        found => Err(io::Error::other(format!(
            "{} is not the device of {} any more, but of {found:?}",
            device.display(),
            file.display()
        ))),
    }
}

/// The file behind a loop device, by its folder in /sys/block.
fn behind(folder: &Path) -> Option<PathBuf> {
    fs::read_to_string(folder.join("loop/backing_file")).ok().map(|text| text.trim_end_matches('\n').into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    /// Machines without loop devices (some containers) cannot run it.
    fn can_loop() -> bool {
        let can = Path::new("/dev/loop-control").exists() && nix::unistd::geteuid().is_root();
        if !can {
            println!("SKIPPED: no /dev/loop-control here, or not root");
        }
        can
    }

    #[test]
    fn a_file_has_one_device_as_long_as_it_is_held() {
        if !can_loop() {
            return;
        }
        // Not in a tmpfs, which some kernels refuse to loop over.
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = folder.path().join("volume");
        let one = attach(&path, 1 << 20).unwrap();
        let two = attach(&path, 5 << 20).unwrap();
        assert_eq!((&one.path, &one.file), (&two.path, &two.file));
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20, "what is there stays");
        File::options().write(true).open(&one.path).unwrap().write_all(b"written").unwrap();
        let mut read = [0; 7];
        File::open(&two.path).unwrap().read_exact(&mut read).unwrap();
        assert_eq!(&read, b"written");

        let (device, file) = (one.path.clone(), one.file.clone().unwrap());
        drop(one);
        let third = hold(&device, &file).unwrap();
        drop(two);
        assert_eq!(behind(&Path::new("/sys/block").join(device.file_name().unwrap())), Some(file.clone()));
        assert!(hold(&device, Path::new("/another")).is_err());
        drop(third);
        // The kernel lets go of it a moment after the last one has.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while behind(&Path::new("/sys/block").join(device.file_name().unwrap())) == Some(file.clone()) {
            assert!(std::time::Instant::now() < deadline, "{} stays", device.display());
            std::thread::yield_now();
        }
        assert_eq!(attach(&device, 0).unwrap().file, None, "a device is taken as it is");
    }
}
