//! `fsGroup`: a pod's volumes belong to its group, as Kubernetes' kubelet sees to it (kubernetes.io, "Configure a Security Context
//! for a Pod").

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::PodSecurityContext;
use nix::dir::{Dir, Type};
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{Gid, fchownat};

/// What the group may do with a volume's files.
const READ_WRITE: u32 = 0o660;
/// What it may do with folders on top of that. New files are the group's too.
const FOLDER: u32 = 0o2110;
/// Each of these holds a descriptor while what is in it is looked through, and who may make a pod may make folders.
const DEEPEST: u32 = 128;

/// The group that a pod's volumes belong to, and whether a volume whose root is as it should be is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FsGroup {
    pub(crate) group: u32,
    on_root_mismatch: bool,
}

impl FsGroup {
    /// The one that the pod asks for.
    pub(crate) fn of(security: Option<&PodSecurityContext>) -> Option<Self> {
        let security = security?;
        let group = security.fs_group.and_then(|group| u32::try_from(group).ok())?;
        Some(Self { group, on_root_mismatch: security.fs_group_change_policy.as_deref() == Some("OnRootMismatch") })
    }

    /// Gives the group all that is below `root`, and `root` last: where it is as it should be, so is the rest.
    pub(crate) fn own(self, root: &Path) -> io::Result<()> {
        let metadata = fs::metadata(root)?;
        let wanted = READ_WRITE | FOLDER;
        if self.on_root_mismatch && metadata.gid() == self.group && metadata.permissions().mode() & wanted == wanted {
            return Ok(());
        }
        self.folder(&open(root, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?, DEEPEST)
    }

    /// Others may be at work in it: nothing is looked at by its name twice, and no link is followed.
    fn folder(self, folder: &OwnedFd, deepest: u32) -> io::Result<()> {
        for entry in Dir::from_fd(openat(folder, c".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)?.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            let done = match entry.file_type() {
                Some(Type::Directory) => self.inner(folder, name, deepest),
                _ => self.entry(folder, name),
            };
            match done {
                // What is gone needs nothing.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        self.give(folder)
    }

    fn inner(self, above: &OwnedFd, name: &CStr, deepest: u32) -> io::Result<()> {
        let deeper = deepest
            .checked_sub(1)
            .ok_or_else(|| io::Error::other(format!("folders lie in folders there, more than {DEEPEST} deep")))?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        self.folder(&openat(above, name, flags, Mode::empty())?, deeper)
    }

    fn entry(self, above: &OwnedFd, name: &CStr) -> io::Result<()> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        self.give(&openat(above, name, flags, Mode::empty())?)
    }

    fn give(self, file: &OwnedFd) -> io::Result<()> {
        let about = fstat(file)?;
        fchownat(file.as_fd(), c"", None, Some(Gid::from_raw(self.group)), AtFlags::AT_EMPTY_PATH)?;
        let mode = match SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT {
            // It has no mode of its own.
            SFlag::S_IFLNK => return Ok(()),
            SFlag::S_IFDIR => READ_WRITE | FOLDER,
            _ => READ_WRITE,
        };
        // Of a descriptor that only stands for a path the mode can be set in this way alone.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        fs::set_permissions(path, fs::Permissions::from_mode(about.st_mode & 0o7777 | mode))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const GROUP: u32 = 107;

    fn about(path: &Path) -> (u32, u32) {
        let metadata = fs::symlink_metadata(path).unwrap();
        (metadata.gid(), metadata.permissions().mode() & 0o7777)
    }

    #[test]
    fn a_volume_becomes_its_groups_and_what_is_outside_of_it_does_not() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: only root gives files away");
            return;
        }
        let scratch = tempfile::tempdir().unwrap();
        let outside = scratch.path().join("outside");
        fs::write(&outside, "").unwrap();
        fs::set_permissions(&outside, fs::Permissions::from_mode(0o600)).unwrap();
        let volume = scratch.path().join("volume");
        fs::create_dir_all(volume.join("folder")).unwrap();
        let image = volume.join("folder/disk.img");
        fs::write(&image, "").unwrap();
        fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
        symlink(&outside, volume.join("link")).unwrap();
        symlink(scratch.path(), volume.join("folders")).unwrap();
        let security = PodSecurityContext { fs_group: Some(GROUP.into()), ..PodSecurityContext::default() };
        let always = FsGroup::of(Some(&security)).unwrap();
        always.own(&volume).unwrap();
        assert_eq!(about(&image), (GROUP, 0o660));
        assert_eq!(about(&volume.join("folder")), (GROUP, 0o2775));
        assert_eq!(about(&volume), (GROUP, 0o2775));
        assert_eq!(about(&outside), (0, 0o600));

        // However deep somebody makes it, it costs the node no more than so many descriptors.
        let depth = usize::try_from(DEEPEST).unwrap();
        fs::create_dir_all(volume.join(vec!["d"; depth].join("/"))).unwrap();
        always.own(&volume).unwrap();
        fs::create_dir(volume.join(vec!["d"; depth].join("/")).join("d")).unwrap();
        assert!(always.own(&volume).unwrap_err().to_string().contains("deep"));
        fs::remove_dir_all(volume.join("d")).unwrap();

        // Where only the root is looked at, what is below stays as it is, until the root is not the group's.
        fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
        let policy = Some("OnRootMismatch".to_owned());
        let seldom =
            FsGroup::of(Some(&PodSecurityContext { fs_group_change_policy: policy, ..security.clone() })).unwrap();
        seldom.own(&volume).unwrap();
        assert_eq!(about(&image).1, 0o600);
        always.own(&volume).unwrap();
        assert_eq!(about(&image).1, 0o660);
        fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o755)).unwrap();
        seldom.own(&volume).unwrap();
        assert_eq!(about(&image).1, 0o660);
        assert_eq!(FsGroup::of(Some(&PodSecurityContext::default())), None);
    }
}
