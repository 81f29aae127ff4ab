//! Mounting without following links out of the container: the kernel's file-descriptor based mount calls.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::libc;
use nix::sys::stat::{Mode, mkdirat};

// linux/mount.h
const OPEN_TREE_CLONE: u32 = 1;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;
const MOUNT_ATTR_RDONLY: u64 = 1;
const AT_RECURSIVE: u32 = 0x8000;

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
#[derive(Default)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A copy of what is mounted at `source` (and below), attached nowhere yet.
fn copy_of(source: &Path) -> io::Result<OwnedFd> {
    let path = std::ffi::CString::new(source.as_os_str().as_bytes())?;
    let flags = OPEN_TREE_CLONE | AT_RECURSIVE | libc::O_CLOEXEC as u32;
    // SAFETY: the path is a NUL-terminated string that lives through the call.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })?;
    // SAFETY: a descriptor that was just made and that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) })
}

fn make_read_only(mount: &OwnedFd) -> io::Result<()> {
    let attributes = MountAttributes { set: MOUNT_ATTR_RDONLY, ..MountAttributes::default() };
    let flags = libc::AT_EMPTY_PATH as u32 | AT_RECURSIVE;
    // SAFETY: the pointers are to a string and a structure of the given size that live through the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    })?;
    Ok(())
}

/// Mounts `source` (with what is mounted below it) onto an open folder or file.
pub(super) fn bind(source: &Path, target: &OwnedFd, read_only: bool) -> io::Result<()> {
    let mount = copy_of(source)?;
    if read_only {
        make_read_only(&mount)?;
    }
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: takes descriptors, integers and constant strings.
    check(unsafe {
        libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), c"".as_ptr(), target.as_raw_fd(), c"".as_ptr(), flags)
    })?;
    Ok(())
}

/// Opens a path below `root` as if `root` were `/`, whatever links are on the way.
pub(super) fn open_in(root: &OwnedFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    loop {
        match openat2(root.as_fd(), if path.as_os_str().is_empty() { Path::new(".") } else { path }, how) {
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            other => return other,
        }
    }
}

/// Opens `path` below `root`, first making it (a folder, or else an empty file) and the folders above it.
pub(super) fn make_in(root: &OwnedFd, path: &Path, folder: bool) -> io::Result<OwnedFd> {
    match open_in(root, path, OFlag::O_PATH) {
        Err(nix::Error::ENOENT) => {}
        other => return Ok(other?),
    }
    let parent = make_in(root, path.parent().unwrap_or(Path::new("")), true)?;
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    if folder {
        mkdirat(&parent, name, Mode::from_bits_truncate(0o755))?;
    } else {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        drop(File::from(nix::fcntl::openat(&parent, name, flags, Mode::from_bits_truncate(0o644))?));
    }
    Ok(open_in(root, path, OFlag::O_PATH)?)
}
