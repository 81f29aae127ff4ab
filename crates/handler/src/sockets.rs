//! Unix sockets in a pod's `sockets` volume, seen from the node.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, SFlag, fstat};
use tokio::net::{UnixListener, UnixStream};

use crate::ownership::set_mode;

/// The `sockets` volume of one launcher pod. A unix socket's address holds 107 bytes, and a kubelet's volume path is often
/// longer: sockets are therefore addressed through the open directory (`/proc/self/fd/<n>/<name>`).
#[derive(Debug)]
pub struct SocketDir {
    path: PathBuf,
    fd: OwnedFd,
}

impl SocketDir {
    /// The volume of pod `pod_uid` below the kubelet's root folder.
    #[must_use]
    pub fn path_of(kubelet_root: &Path, pod_uid: &str) -> PathBuf {
        kubelet_root.join("pods").join(pod_uid).join("volumes/kubernetes.io~empty-dir/sockets")
    }

    /// Opens the folder.
    ///
    /// # Errors
    /// When it does not exist (yet).
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let fd = open(&path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(Self { path, fd })
    }

    /// The folder's real path, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which folder it is, however it is reached: device and number.
    ///
    /// # Errors
    /// As `fstat(2)`.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let about = fstat(&self.fd)?;
        Ok((about.st_dev, about.st_ino))
    }

    /// A short path to socket `name`, valid as long as `self` lives.
    #[must_use]
    pub fn short(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()))
    }

    /// Finds socket `name`. What the pod puts there is its own doing: a symbolic link could lead to any socket of the node.
    ///
    /// # Errors
    /// When there is none, or something else by that name.
    pub fn socket(&self, name: &str) -> io::Result<Socket> {
        self.found(name).map(|fd| Socket { fd })
    }

    fn found(&self, name: &str) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&self.fd, name, flags, Mode::empty())?;
        let kind = SFlag::from_bits_truncate(fstat(&fd)?.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFSOCK {
            return Err(io::Error::other(format!("{name} in {} is not a socket", self.path.display())));
        }
        Ok(fd)
    }

    /// Connects to socket `name`.
    ///
    /// # Errors
    /// As [`SocketDir::socket`] and `connect(2)`.
    pub async fn connect(&self, name: &str) -> io::Result<UnixStream> {
        UnixStream::connect(self.socket(name)?.path()).await
    }

    /// Listens on socket `name`, in place of a stale one of the same name. The volume's group, which is the pod's, may connect.
    ///
    /// # Errors
    /// As `bind(2)`.
    pub fn listen(&self, name: &str) -> io::Result<UnixListener> {
        match std::fs::remove_file(self.short(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(self.short(name))?;
        // Whatever socket the pod has put in its place by now: it is in the pod's folder, and the pod's already.
        set_mode(&self.found(name)?, 0o660)?;
        Ok(listener)
    }

    /// Removes socket `name` if it is there.
    pub fn remove(&self, name: &str) {
        let _ = std::fs::remove_file(self.short(name));
    }

    /// Whether `name` is that of a socket directly in this volume.
    #[must_use]
    pub fn is_name(name: &str) -> bool {
        !name.is_empty() && name != "." && name != ".." && !name.contains('/')
    }
}

/// A socket that was found in a pod's volume. Whatever comes in its place later, this is the one that is connected to.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Where it can be connected to, valid as long as `self` lives.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_link_to_a_socket_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let of_the_node = root.path().join("containerd.sock");
        let _listener = UnixListener::bind(&of_the_node).unwrap();
        let volume = root.path().join("sockets");
        std::fs::create_dir(&volume).unwrap();
        let dir = SocketDir::open(volume.clone()).unwrap();
        std::os::unix::fs::symlink(&of_the_node, volume.join("launcher.sock")).unwrap();
        assert!(UnixStream::connect(dir.short("launcher.sock")).await.is_ok(), "it leads there");
        assert!(dir.connect("launcher.sock").await.is_err());
        std::fs::write(volume.join("file"), "").unwrap();
        assert!(dir.connect("file").await.is_err());
        assert!(dir.connect("nothing").await.is_err());
    }

    #[tokio::test]
    async fn the_volumes_group_may_connect() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: only root gives files away");
            return;
        }
        let volume = tempfile::tempdir().unwrap();
        chown(volume.path(), None, Some(107)).unwrap();
        std::fs::set_permissions(volume.path(), std::fs::Permissions::from_mode(0o2777)).unwrap();
        let dir = SocketDir::open(volume.path().to_owned()).unwrap();
        let _listener = dir.listen("a.sock").unwrap();
        let about = std::fs::metadata(volume.path().join("a.sock")).unwrap();
        assert_eq!((about.gid(), about.mode() & 0o777), (107, 0o660));
    }

    #[test]
    fn only_names_directly_in_the_volume_are_taken() {
        assert!(SocketDir::is_name("migration.sock"));
        for bad in ["", ".", "..", "../launcher.sock", "/etc/passwd", "a/b"] {
            assert!(!SocketDir::is_name(bad), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_socket_in_a_deep_folder_can_be_used() {
        let root = tempfile::tempdir().unwrap();
        let deep = SocketDir::path_of(&root.path().join("x".repeat(120)), "0b6f4d0a-93a0-4d0a-9d0a-93a04d0a9d0a");
        std::fs::create_dir_all(&deep).unwrap();
        let dir = SocketDir::open(deep).unwrap();
        let listener = dir.listen("a.sock").unwrap();
        let (dialled, accepted) = tokio::join!(dir.connect("a.sock"), listener.accept());
        assert!(dialled.is_ok() && accepted.is_ok());
        drop(listener);
        assert!(dir.listen("a.sock").is_ok(), "a stale socket is replaced");
    }
}
