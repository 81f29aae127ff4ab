//! Network namespaces with names, as `ip netns` knows them, and work inside them.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::{Error, Links, Result};

/// Where named namespaces are mounted, the same directory as iproute2's.
pub const NETNS_DIR: &str = "/run/netns";

/// See [`Namespace::origin`].
static ORIGIN: OnceLock<Namespace> = OnceLock::new();

/// An open network namespace. Cheap to clone; holding one keeps the namespace alive even after its name is deleted.
#[derive(Clone, Debug)]
pub struct Namespace {
    label: Arc<str>,
    file: Arc<File>,
}

impl Namespace {
    /// Makes a namespace and gives it a name under [`NETNS_DIR`]. Its loopback is up.
    ///
    /// # Errors
    /// [`Error::NamespaceExists`], a name with other characters than letters, digits, `-`, `_` and `.`, or no permission.
    pub fn create(name: &str) -> Result<Self> {
        let path = name_path(name)?;
        ensure_directory()?;
        match File::options().write(true).create_new(true).open(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::NamespaceExists(name.into()));
            }
            Err(error) => return Err(Error::io(format!("make {}", path.display()), error)),
        }
        let made = on_thread(name, || -> Result<()> {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|e| Error::io(format!("make network namespace {name}"), e))?;
            let none: Option<&str> = None;
            mount(Some("/proc/thread-self/ns/net"), &path, none, MsFlags::MS_BIND, none)
                .map_err(|e| Error::io(format!("mount network namespace {name}"), e))?;
            loopback_up().map_err(|e| Error::io(format!("set lo up in network namespace {name}"), e))
        })
        .and_then(|inner| inner);
        if let Err(error) = made {
            let _ = umount2(&path, MntFlags::MNT_DETACH);
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Self::open(name)
    }

    /// Opens a namespace by its name under [`NETNS_DIR`].
    ///
    /// # Errors
    /// [`Error::NoNamespace`] when there is none (also when only the empty file of a half-made one is left).
    pub fn open(name: &str) -> Result<Self> {
        Self::open_path(&name_path(name)?, name)
    }

    /// Opens the one of that name, or makes it. The flag says whether it was made.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn open_or_create(name: &str) -> Result<(Self, bool)> {
        match Self::open(name) {
            Ok(namespace) => Ok((namespace, false)),
            Err(Error::NoNamespace(_)) => {
                // A file without a mount is what a crash between the two steps, or a reboot, leaves.
                let _ = fs::remove_file(name_path(name)?);
                Ok((Self::create(name)?, true))
            }
            Err(error) => Err(error),
        }
    }

    /// Opens the network namespace in which process `pid` lives.
    ///
    /// # Errors
    /// [`Error::NoNamespace`] when there is no such process.
    pub fn of_pid(pid: u32) -> Result<Self> {
        Self::open_path(Path::new(&format!("/proc/{pid}/ns/net")), &format!("of process {pid}"))
    }

    /// Opens the namespace of the calling thread.
    ///
    /// # Errors
    /// Only when /proc is not mounted.
    pub fn current() -> Result<Self> {
        Self::open_path(Path::new("/proc/thread-self/ns/net"), "of this thread")
    }

    /// The namespace in which this process began, also after it has moved into another with [`Self::enter`].
    ///
    /// # Errors
    /// As [`Self::current`].
    pub fn origin() -> Result<Self> {
        ORIGIN.get().cloned().map_or_else(Self::current, Ok)
    }

    /// Opens a namespace file (nsfs); `label` names it in messages.
    ///
    /// # Errors
    /// [`Error::NoNamespace`] when there is no such file or it is no network namespace.
    pub fn open_path(path: &Path, label: &str) -> Result<Self> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NoNamespace(label.into())),
            Err(error) => return Err(Error::io(format!("open {}", path.display()), error)),
        };
        let kind = nix::sys::statfs::fstatfs(&file).map_err(|e| Error::io(format!("look at {}", path.display()), e))?;
        if kind.filesystem_type() != nix::sys::statfs::NSFS_MAGIC {
            return Err(Error::NoNamespace(label.into()));
        }
        Ok(Self { label: label.into(), file: Arc::new(file) })
    }

    /// Whether a live namespace has that name.
    pub fn exists(name: &str) -> bool {
        Self::open(name).is_ok()
    }

    /// Takes the name away; the namespace itself ends with its last process and socket. Nothing there is not an error.
    ///
    /// # Errors
    /// A bad name, or no permission.
    pub fn delete(name: &str) -> Result<()> {
        let path = name_path(name)?;
        loop {
            match umount2(&path, MntFlags::MNT_DETACH) {
                Ok(()) => {} // once more, it may have been mounted twice
                Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
                Err(error) => return Err(Error::io(format!("unmount {}", path.display()), error)),
            }
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", path.display()), error))
            }
            _ => Ok(()),
        }
    }

    /// The names under [`NETNS_DIR`] that begin with `prefix`, sorted.
    ///
    /// # Errors
    /// When the directory exists and cannot be read.
    pub fn list(prefix: &str) -> Result<Vec<String>> {
        let entries = match fs::read_dir(NETNS_DIR) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io(format!("read {NETNS_DIR}"), error)),
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        Ok(names)
    }

    /// Deletes every namespace whose name begins with `prefix` (which must not be empty) and returns how many there
    /// were. All are tried, the first failure is returned.
    ///
    /// # Errors
    /// As [`Self::delete`].
    pub fn delete_prefix(prefix: &str) -> Result<usize> {
        if prefix.is_empty() {
            return Err(Error::Invalid("refusing to delete every network namespace: the prefix is empty".into()));
        }
        let names = Self::list(prefix)?;
        let results: Vec<Result<()>> = names.iter().map(|name| Self::delete(name)).collect();
        results.into_iter().collect::<Result<Vec<()>>>()?;
        Ok(names.len())
    }

    /// The name or description for messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// A number that is equal for equal namespaces on this machine (the inode of the nsfs file).
    ///
    /// # Errors
    /// Never in practice; whatever `fstat` gives.
    pub fn inode(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(self.file.metadata().map_err(|e| Error::io(format!("look at namespace {}", self.label), e))?.ino())
    }

    /// Moves the calling thread into this namespace for good. Threads that it starts afterwards are there too: call it
    /// before a runtime starts its threads.
    ///
    /// # Errors
    /// No permission.
    pub fn enter(&self) -> Result<()> {
        // The first thread to go anywhere is still where the process began.
        if ORIGIN.get().is_none()
            && let Ok(here) = Self::current()
        {
            let _ = ORIGIN.set(here);
        }
        setns(&self.file, CloneFlags::CLONE_NEWNET)
            .map_err(|e| Error::io(format!("enter network namespace {}", self.label), e))
    }

    /// Runs a closure on a thread of its own inside the namespace and waits for it.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or the closure panics.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_thread(&self.label, || self.enter().map(|()| work())).and_then(|inner| inner)
    }

    /// A netlink connection for the links of this namespace. Must be called inside a tokio runtime (it is driven there).
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn links(&self) -> Result<Links> {
        Links::open(self)
    }

    /// Listens on a TCP address inside the namespace. The listener is blocking; for tokio set it non-blocking first.
    ///
    /// # Errors
    /// What `bind` says.
    pub fn listen(&self, address: SocketAddr) -> Result<TcpListener> {
        self.run(|| TcpListener::bind(address))?
            .map_err(|e| Error::io(format!("listen on {address} in namespace {}", self.label), e))
    }

    /// Connects to a TCP address from inside the namespace.
    ///
    /// # Errors
    /// What `connect` says.
    pub fn connect(&self, address: SocketAddr, timeout: Duration) -> Result<TcpStream> {
        self.run(|| TcpStream::connect_timeout(&address, timeout))?
            .map_err(|e| Error::io(format!("connect to {address} from namespace {}", self.label), e))
    }

    /// Binds a UDP socket inside the namespace.
    ///
    /// # Errors
    /// What `bind` says.
    pub fn udp(&self, address: SocketAddr) -> Result<UdpSocket> {
        self.run(|| UdpSocket::bind(address))?
            .map_err(|e| Error::io(format!("bind {address}/udp in namespace {}", self.label), e))
    }

    /// Sets a kernel parameter of this namespace; `key` as in `net.ipv4.ip_forward` (a `/` stands for itself, so that link
    /// names with dots can be written `net/ipv4/conf/<link>/forwarding`).
    ///
    /// # Errors
    /// No such parameter, or a value that the kernel does not take.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.sysctls(&[(key, value)])
    }

    /// Several of [`Self::sysctl`] with one entry into the namespace.
    ///
    /// # Errors
    /// As [`Self::sysctl`], for the first that fails.
    pub fn sysctls(&self, pairs: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (key, value) in pairs {
                let relative = if key.contains('/') { (*key).to_owned() } else { key.replace('.', "/") };
                if !relative.starts_with("net/") || relative.split('/').any(|part| part == "..") {
                    return Err(Error::Invalid(format!("{key} is not a parameter of a network namespace")));
                }
                fs::write(format!("/proc/sys/{relative}"), value)
                    .map_err(|e| Error::io(format!("set {key}={value} in namespace {}", self.label), e))?;
            }
            Ok(())
        })?
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Runs on a fresh thread, so that what it does to its namespaces ends with it.
fn on_thread<T: Send>(label: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, work)
            .map_err(|e| Error::io("start a thread", e))?
            .join()
            .map_err(|_| Error::Panicked(label.into()))
    })
}

fn name_path(name: &str) -> Result<PathBuf> {
    let why = if name.is_empty() || name.len() > 200 {
        "it must have 1 to 200 characters"
    } else if name.starts_with('.') || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        "only letters, digits, '-', '_' and '.' (not first) are allowed"
    } else {
        return Ok(Path::new(NETNS_DIR).join(name));
    };
    Err(Error::Name { what: "network namespace", name: name.into(), why })
}

/// Makes [`NETNS_DIR`] a shared mount of its own, as `ip netns add` does: if it did that after us, it would mount copies of
/// our namespaces over them, and a later delete would miss the lower ones.
fn ensure_directory() -> Result<()> {
    let failed = |e: io::Error| Error::io(format!("prepare {NETNS_DIR}"), e);
    fs::create_dir_all(NETNS_DIR).map_err(failed)?;
    let none: Option<&str> = None;
    let shared = || mount(none, NETNS_DIR, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    if shared() == Err(nix::Error::EINVAL) {
        mount(Some(NETNS_DIR), NETNS_DIR, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .map_err(|e| failed(e.into()))?;
        shared().map_err(|e| failed(e.into()))?;
    }
    Ok(())
}

nix::ioctl_write_ptr_bad!(siocsifflags, nix::libc::SIOCSIFFLAGS, nix::libc::ifreq);

/// Sets `lo` of the calling thread's namespace up. An ioctl, because it must work without a runtime.
fn loopback_up() -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an all-zero ifreq is a valid one (integers and byte arrays).
    let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as nix::libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (nix::libc::IFF_UP | nix::libc::IFF_RUNNING) as nix::libc::c_short;
    // SAFETY: the descriptor is a socket and the pointer is to a filled-in ifreq that lives through the call.
    unsafe { siocsifflags(socket.as_raw_fd(), &raw const request) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// Deletes on drop what begins with a prefix of this process.
    pub(crate) struct Scratch(pub String);

    impl Scratch {
        pub(crate) fn new(test: &str) -> Self {
            Self(format!("gwt{}-{test}", std::process::id()))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = Namespace::delete_prefix(&self.0);
        }
    }

    #[test]
    fn namespaces_are_made_listed_and_deleted() {
        let scratch = Scratch::new("life");
        let (a, b) = (format!("{}-a", scratch.0), format!("{}-b", scratch.0));
        let first = Namespace::create(&a).unwrap();
        Namespace::create(&b).unwrap();
        assert!(matches!(Namespace::create(&a), Err(Error::NamespaceExists(_))));
        assert_eq!(Namespace::list(&scratch.0).unwrap(), [a.clone(), b.clone()]);
        assert_ne!(first.inode().unwrap(), Namespace::current().unwrap().inode().unwrap());
        assert!(!Namespace::open_or_create(&a).unwrap().1);
        assert_eq!(Namespace::delete_prefix(&scratch.0).unwrap(), 2);
        assert!(matches!(Namespace::open(&a), Err(Error::NoNamespace(_))));
        Namespace::delete(&a).unwrap();
        assert!(Namespace::delete_prefix("").is_err());
    }

    #[test]
    fn bad_names_are_refused() {
        for bad in ["", "..", "a/b", "a b", ".x"] {
            assert!(matches!(Namespace::create(bad), Err(Error::Name { .. })), "{bad}");
        }
    }

    #[test]
    fn sockets_stay_in_their_namespace() {
        let scratch = Scratch::new("sock");
        let inside = Namespace::create(&format!("{}-a", scratch.0)).unwrap();
        let listener = inside.listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"hello").unwrap());
        assert!(TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err(), "reachable from outside");
        let mut text = String::new();
        inside.connect(address, Duration::from_secs(5)).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        server.join().unwrap();
    }

    #[test]
    fn parameters_are_set_inside_only() {
        let scratch = Scratch::new("sysctl");
        let inside = Namespace::create(&format!("{}-a", scratch.0)).unwrap();
        let read = || fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
        let before = read();
        inside.sysctl("net.ipv4.ip_forward", "1").unwrap();
        assert_eq!(inside.run(read).unwrap().trim(), "1");
        assert_eq!(read(), before);
        assert!(inside.sysctl("kernel.panic", "1").is_err());
        assert!(inside.sysctl("net/../kernel/panic", "1").is_err());
    }

    #[test]
    fn a_process_knows_where_it_began() {
        let scratch = Scratch::new("origin");
        let inside = Namespace::create(&format!("{}-a", scratch.0)).unwrap();
        let began = Namespace::current().unwrap().inode().unwrap();
        let seen = inside.run(|| Namespace::origin().unwrap().inode().unwrap()).unwrap();
        assert_eq!(seen, began);
    }

    #[test]
    fn a_panic_inside_is_an_error_outside() {
        let here = Namespace::current().unwrap();
        assert!(matches!(here.run(|| panic!("on purpose")), Err(Error::Panicked(_))));
    }
}
