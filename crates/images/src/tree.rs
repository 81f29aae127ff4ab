//! A folder that may only be changed below itself, whatever links lie in it.
//!
//! Every path is resolved by the kernel as if the folder were the root (`openat2` with `RESOLVE_IN_ROOT`): neither `..` nor
//! absolute or relative symbolic links in a layer can lead out of it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, fchown, fchownat, linkat, symlinkat};

/// The folder.
pub(crate) struct Tree {
    root: OwnedFd,
}

/// A path of a layer without `.`, `..` and leading `/`; `None` if it would climb out, `Some("")` for the root itself.
pub(crate) fn clean(path: &Path) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    (!clean.as_os_str().as_bytes().contains(&0)).then_some(clean)
}

impl Tree {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { root: File::open(path)?.into() })
    }

    fn resolve(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        loop {
            match openat2(&self.root, path, how) {
                // The kernel asks to try again when somebody renames meanwhile.
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                other => return other,
            }
        }
    }

    /// Opens the folder `path`, making it and those above as needed.
    fn folder(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.resolve(path, OFlag::O_DIRECTORY | OFlag::O_RDONLY) {
            Err(nix::Error::ENOENT) => {}
            other => return Ok(other?),
        }
        let (parent, name) = split(path)?;
        let above = self.folder(parent)?;
        match mkdirat(&above, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) => {}
            // A symbolic link that leads nowhere: replaced, as the layer wants a folder here.
            Err(nix::Error::EEXIST) => {
                remove_at(&above, name)?;
                mkdirat(&above, name, Mode::from_bits_truncate(0o755))?;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(self.resolve(path, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?)
    }

    /// The folder above `path`, and its last part.
    fn place<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let (parent, name) = split(path)?;
        Ok((self.folder(parent)?, name))
    }

    /// Makes (or keeps) a folder and sets its mode and owner.
    pub(crate) fn make_folder(&self, path: &Path, mode: u32, owner: (u32, u32)) -> io::Result<()> {
        let descriptor = if path.as_os_str().is_empty() {
            self.folder(path)?
        } else {
            let (above, name) = self.place(path)?;
            let here = Path::new("/proc/self/fd").join(above.as_raw_fd().to_string()).join(name);
            match fs::symlink_metadata(&here) {
                Ok(metadata) if metadata.is_dir() => {}
                // A link to a folder (as /lib to /usr/lib) stays, like with other container engines.
                Ok(metadata) if metadata.is_symlink() && self.folder(path).is_ok() => {}
                Ok(_) => {
                    remove_at(&above, name)?;
                    mkdirat(&above, name, Mode::from_bits_truncate(0o755))?;
                }
                Err(_) => mkdirat(&above, name, Mode::from_bits_truncate(0o755))?,
            }
            self.folder(path)?
        };
        own(&descriptor, mode, owner)
    }

    /// Makes a file, replacing what was there.
    pub(crate) fn make_file(
        &self,
        path: &Path,
        mode: u32,
        owner: (u32, u32),
        content: &mut impl io::Read,
    ) -> io::Result<()> {
        let (above, name) = self.place(path)?;
        remove_at(&above, name)?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut file = File::from(nix::fcntl::openat(&above, name, flags, Mode::from_bits_truncate(0o600))?);
        io::copy(content, &mut file)?;
        own(&file.into(), mode, owner)
    }

    /// Makes a symbolic link, replacing what was there. Where it leads does not matter here.
    pub(crate) fn make_link(&self, path: &Path, target: &Path, owner: (u32, u32)) -> io::Result<()> {
        let (above, name) = self.place(path)?;
        remove_at(&above, name)?;
        symlinkat(target, &above, name)?;
        let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
        Ok(fchownat(&above, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?)
    }

    /// Gives a file a second name. Both are below the root.
    pub(crate) fn make_hard_link(&self, path: &Path, target: &Path) -> io::Result<()> {
        let (from, from_name) = split(target)?;
        let from = self.resolve(from, OFlag::O_DIRECTORY | OFlag::O_RDONLY)?;
        let (above, name) = self.place(path)?;
        if path == target {
            return Ok(());
        }
        remove_at(&above, name)?;
        Ok(linkat(&from, from_name, &above, name, AtFlags::empty())?)
    }

    /// Removes whatever is at `path`; nothing there is fine.
    pub(crate) fn remove(&self, path: &Path) -> io::Result<()> {
        let (parent, name) = split(path)?;
        match self.resolve(parent, OFlag::O_DIRECTORY | OFlag::O_RDONLY) {
            Ok(above) => remove_at(&above, name),
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The names in a folder; none if it is not there.
    pub(crate) fn names(&self, path: &Path) -> io::Result<Vec<std::ffi::OsString>> {
        let folder = match self.resolve(path, OFlag::O_DIRECTORY | OFlag::O_RDONLY) {
            Ok(folder) => folder,
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        fs::read_dir(format!("/proc/self/fd/{}", folder.as_raw_fd()))?.map(|entry| Ok(entry?.file_name())).collect()
    }
}

fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    path.parent()
        .zip(path.file_name())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no entry of a folder"))
}

fn own(descriptor: &OwnedFd, mode: u32, (uid, gid): (u32, u32)) -> io::Result<()> {
    fchown(descriptor, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    Ok(fchmod(descriptor, Mode::from_bits_truncate(mode & 0o7777))?)
}

fn remove_at(folder: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    let removed = match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&path),
        Ok(_) => fs::remove_file(&path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The disk in an unpacked container disk: the file that `path` names (absolute in the image), or the one file under
/// `disk/`. Links are followed inside the image only.
///
/// # Errors
/// No such file, no file or several under `disk/`, something that is no ordinary file. The text says which.
pub fn find_disk(image: &Path, path: Option<&str>) -> io::Result<PathBuf> {
    let bad = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let tree = Tree::open(image)?;
    let relative = match path {
        Some(path) => clean(Path::new(path)).ok_or_else(|| bad(format!("path {path:?} leads out of the image")))?,
        None => {
            let names = tree.names(Path::new("disk"))?;
            let mut names = names.into_iter().filter(|name| !name.as_bytes().starts_with(b"."));
            match (names.next(), names.next()) {
                (Some(name), None) => Path::new("disk").join(name),
                (None, _) => return Err(bad("there is no file under /disk in the image".into())),
                _ => return Err(bad("there are several files under /disk in the image; say which (path)".into())),
            }
        }
    };
    let file = File::from(tree.resolve(&relative, OFlag::O_RDONLY | OFlag::O_NONBLOCK).map_err(|error| {
        io::Error::new(io::Error::from(error).kind(), format!("/{} of the image: {error}", relative.display()))
    })?);
    if !file.metadata()?.is_file() {
        return Err(bad(format!("/{} of the image is no ordinary file", relative.display())));
    }
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_or_refused() {
        assert_eq!(clean(Path::new("./a//b/.")), Some("a/b".into()));
        assert_eq!(clean(Path::new("/a")), Some("a".into()));
        assert_eq!(clean(Path::new("./")), Some("".into()));
        assert_eq!(clean(Path::new("a/../../b")), None);
    }

    #[test]
    fn the_disk_is_found_inside_only() {
        let image = tempfile::tempdir().unwrap();
        let disk = image.path().join("disk");
        assert!(find_disk(image.path(), None).is_err());
        fs::create_dir(&disk).unwrap();
        assert!(find_disk(image.path(), None).is_err());
        fs::write(disk.join("a.img"), "x").unwrap();
        let found = find_disk(image.path(), None).unwrap();
        assert_eq!(found.file_name().unwrap(), "a.img");
        std::os::unix::fs::symlink("/etc/passwd", disk.join("b.img")).unwrap();
        assert!(find_disk(image.path(), None).is_err(), "two files");
        assert!(find_disk(image.path(), Some("/disk/b.img")).is_err(), "/etc/passwd is not in the image");
        assert!(find_disk(image.path(), Some("../../etc/passwd")).is_err());
        assert!(find_disk(image.path(), Some("/disk")).is_err());
        assert_eq!(find_disk(image.path(), Some("/disk/a.img")).unwrap(), found);
    }
}
