//! The file system that a container sees.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, mknod, mknodat};
use nix::unistd::{Gid, Uid, fchownat};

use super::mounts::{bind, make_in, open_in};
use super::{Failure, failed};
use crate::spec::{ContainerSpec, Root, TERMINATION_LOG};

/// What a container of the host image sees of the node, read-only.
const HOST: [&str; 9] = ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "opt"];
/// Devices of every container.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// Devices of the host image and of privileged containers, as far as the machine has them.
const MACHINE_DEVICES: [&str; 4] = ["kvm", "net/tun", "vhost-net", "fuse"];

const NONE: Option<&str> = None;

/// Builds the file system and makes it the calling process's `/`.
pub(super) fn enter(spec: &ContainerSpec) -> Result<(), Failure> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).map_err(failed("keep mounts apart"))?;
    let root = spec.folder.join("rootfs");
    fs::create_dir_all(&root).map_err(failed(format!("make {}", root.display())))?;
    match &spec.root {
        Root::Host { binary } => host(&root, binary)?,
        Root::Image { lower } => image(spec, &root, lower)?,
    }
    let opened: OwnedFd = File::open(&root).map_err(failed(format!("open {}", root.display())))?.into();
    kernel_file_systems(spec, &opened)?;
    if !spec.termination_log.is_empty() {
        let file = spec.folder.join(TERMINATION_LOG);
        let made = File::create(&file).and_then(|f| f.set_permissions(fs::Permissions::from_mode(0o666)));
        made.map_err(failed(format!("make {}", file.display())))?;
        mount_at(&opened, &file, &spec.termination_log, false)?;
    }
    for wanted in &spec.mounts {
        mount_at(&opened, &wanted.source, &wanted.target, wanted.read_only)?;
    }
    for wanted in &spec.devices {
        device_at(&opened, &wanted.source, &wanted.target, wanted.read_only)?;
    }
    drop(opened);

    nix::unistd::chdir(&root).map_err(failed("enter the root"))?;
    // Both roots on one place: the old one is taken away from above the new one.
    nix::unistd::pivot_root(".", ".").map_err(failed("change the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("leave the old root"))?;
    nix::unistd::chdir("/").map_err(failed("enter the new root"))?;
    if spec.read_only_root {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(NONE, "/", NONE, flags, NONE).map_err(failed("make the root read-only"))?;
    }
    // The image may not have its working directory, as with Docker.
    if !spec.read_only_root && !Path::new(&spec.cwd).exists() {
        let _ = fs::create_dir_all(&spec.cwd);
    }
    Ok(())
}

fn tmpfs(path: &Path, options: &str, flags: MsFlags) -> Result<(), Failure> {
    mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options))
        .map_err(failed(format!("mount a tmpfs at {}", path.display())))
}

fn make_folder(path: &Path, mode: u32) -> Result<(), Failure> {
    fs::create_dir_all(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(failed(format!("make {}", path.display())))
}

fn host(root: &Path, binary: &Path) -> Result<(), Failure> {
    tmpfs(root, "mode=755", MsFlags::MS_NOSUID)?;
    for (name, mode) in [("tmp", 0o1777), ("run", 0o755), ("root", 0o700), ("var/tmp", 0o1777)] {
        make_folder(&root.join(name), mode)?;
    }
    symlink("/run", root.join("var/run")).map_err(failed("make /var/run"))?;
    for name in HOST {
        let (here, there) = (Path::new("/").join(name), root.join(name));
        let Ok(metadata) = fs::symlink_metadata(&here) else { continue };
        if metadata.is_symlink() {
            let made = fs::read_link(&here).and_then(|target| symlink(target, &there));
            made.map_err(failed(format!("link {}", there.display())))?;
            continue;
        }
        make_folder(&there, 0o755)?;
        if name == "usr" {
            host_usr(root, &there, binary)?;
        } else {
            bind_path(&here, &there, true)?;
        }
    }
    Ok(())
}

/// /usr with a place for the binary: another layer below the node's, which has just that file.
fn host_usr(root: &Path, usr: &Path, binary: &Path) -> Result<(), Failure> {
    let extra = root.join(".godwit");
    make_folder(&extra.join("bin"), 0o755)?;
    File::create(extra.join("bin/godwit")).map_err(failed("make /usr/bin/godwit"))?;
    let options = format!("lowerdir=/usr:{}", extra.display());
    mount(Some("overlay"), usr, Some("overlay"), MsFlags::MS_RDONLY, Some(options.as_str()))
        .map_err(failed("mount /usr"))?;
    bind_path(binary, &usr.join("bin/godwit"), true)
}

fn bind_path(source: &Path, target: &Path, read_only: bool) -> Result<(), Failure> {
    File::options()
        .read(true)
        .custom_flags_path()
        .open(target)
        .and_then(|target| bind(source, &target.into(), read_only))
        .map_err(failed(format!("mount {} at {}", source.display(), target.display())))
}

/// `O_PATH` for [`fs::OpenOptions`].
trait PathOnly {
    fn custom_flags_path(&mut self) -> &mut Self;
}

impl PathOnly for fs::OpenOptions {
    fn custom_flags_path(&mut self) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(self, nix::libc::O_PATH)
    }
}

/// The image below a layer of the container's own, which is empty at each start.
fn image(spec: &ContainerSpec, root: &Path, lower: &Path) -> Result<(), Failure> {
    let layer = spec.folder.join("layer");
    match fs::remove_dir_all(&layer) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(format!("empty {}: {error}", layer.display()));
        }
        _ => {}
    }
    let (upper, work) = (layer.join("upper"), layer.join("work"));
    make_folder(&upper, 0o755)?;
    make_folder(&work, 0o755)?;
    if [lower, &upper, &work].iter().any(|path| path.as_os_str().as_encoded_bytes().iter().any(|b| b":,\\".contains(b)))
    {
        return Err(format!("the path {} cannot be used with overlayfs (':', ',' or '\\')", layer.display()));
    }
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    mount(Some("overlay"), root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .map_err(failed("mount the image"))
}

fn kernel_file_systems(spec: &ContainerSpec, opened: &OwnedFd) -> Result<(), Failure> {
    // In an image these could be links to anywhere: they are opened as if the image were the root.
    let place = |name: &str| -> Result<PathBuf, Failure> {
        let fd = make_in(opened, Path::new(name), true).map_err(failed(format!("make /{name}")))?;
        fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(failed(format!("find /{name}")))
    };
    let privileged = spec.capabilities.is_none();
    let noexec = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), &place("proc")?, Some("proc"), noexec, NONE).map_err(failed("mount /proc"))?;
    let read_only = if privileged { noexec } else { noexec | MsFlags::MS_RDONLY };
    mount(Some("sysfs"), &place("sys")?, Some("sysfs"), read_only, NONE).map_err(failed("mount /sys"))?;
    let dev = place("dev")?;
    tmpfs(&dev, "mode=755,size=64k", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC)?;
    for (name, mode) in [("pts", 0o755), ("shm", 0o1777), ("net", 0o755)] {
        make_folder(&dev.join(name), mode)?;
    }
    let machine = if privileged || matches!(spec.root, Root::Host { .. }) { &MACHINE_DEVICES[..] } else { &[] };
    for name in DEVICES.iter().chain(machine) {
        let Ok(metadata) = fs::metadata(Path::new("/dev").join(name)) else { continue };
        if !metadata.file_type().is_char_device() {
            continue;
        }
        let path = dev.join(name);
        let made = mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), metadata.rdev())
            .map_err(io::Error::from)
            // The umask has taken bits away.
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(metadata.mode() & 0o777)));
        made.map_err(failed(format!("make /dev/{name}")))?;
    }
    let devpts = "newinstance,ptmxmode=0666,mode=0620";
    mount(Some("devpts"), &dev.join("pts"), Some("devpts"), MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, Some(devpts))
        .map_err(failed("mount /dev/pts"))?;
    tmpfs(&dev.join("shm"), "mode=1777,size=64m", noexec)?;
    let links = [("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0")];
    for (name, target) in links.into_iter().chain([("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")]) {
        symlink(target, dev.join(name)).map_err(failed(format!("make /dev/{name}")))?;
    }
    Ok(())
}

/// An absolute path of the container, seen from its root.
fn relative(target: &str) -> Result<PathBuf, Failure> {
    let path = Path::new(target);
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(format!("mount path {target:?} must not contain '..'"));
    }
    Ok(path.components().filter(|part| matches!(part, Component::Normal(_))).collect())
}

/// Makes a node of the container's own for a device of the node, with the same owner and mode, as container runtimes do: who is
/// to use it there can be given it without the node's own changing hands.
fn device_at(root: &OwnedFd, source: &Path, target: &str, read_only: bool) -> Result<(), Failure> {
    let metadata = fs::metadata(source).map_err(failed(format!("look at {}", source.display())))?;
    let path = relative(target)?;
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(format!("device path {target:?} is no file's"));
    };
    let kind = if metadata.file_type().is_block_device() { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
    let mode = metadata.mode() & if read_only { 0o444 } else { 0o777 };
    let make = || -> io::Result<()> {
        let folder = make_in(root, folder, true)?;
        mknodat(&folder, name, kind, Mode::from_bits_truncate(mode), metadata.rdev())?;
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let node = openat(&folder, name, flags, Mode::empty())?;
        let (owner, group) = (Uid::from_raw(metadata.uid()), Gid::from_raw(metadata.gid()));
        fchownat(node.as_fd(), c"", Some(owner), Some(group), AtFlags::AT_EMPTY_PATH)?;
        // The umask has taken bits away.
        let path = format!("/proc/self/fd/{}", node.as_raw_fd());
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    };
    make().map_err(failed(format!("make the device {target}")))
}

/// Mounts a file or folder of the node at an absolute path of the container.
fn mount_at(root: &OwnedFd, source: &Path, target: &str, read_only: bool) -> Result<(), Failure> {
    let metadata = fs::metadata(source).map_err(failed(format!("mount {}", source.display())))?;
    let path = relative(target)?;
    let opened = make_in(root, &path, metadata.is_dir())
        // Files of the read-only system that are missing there (/etc/resolv.conf) have nothing to be mounted on.
        .map_err(failed(format!("make a place for {target}")))?;
    bind(source, &opened, read_only).map_err(failed(format!("mount {} at {target}", source.display())))?;
    debug_assert!(open_in(root, &path, OFlag::O_PATH).is_ok());
    Ok(())
}
