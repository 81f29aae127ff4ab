//! Gives a pod whose process is not root what it must open: device nodes, and what others made on its claims.
//!
//! Kubelets give a container its devices with the node's owners and modes, and `fsGroup` does not reach every volume (a driver may not
//! know it; a folder of the node's is left alone). All of it is found through the process, in the pod as it sees itself: the nodes there
//! are the pod's own. What is there is the pod's doing, so no link is followed out of it, and nothing changes hands but devices with
//! the right numbers and regular files.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use godwit_api::vmi::VirtualMachineInstance;
use godwit_launcher::rpc::Paths;
use godwit_network::Namespace;
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::unistd::{Gid, Uid, fchownat};

use crate::sockets::SocketDir;

/// The node's devices that a launcher opens.
const DEVICES: [&str; 3] = ["kvm", "net/tun", "vhost-net"];
/// What an image on a claim is called.
const IMAGE: &CStr = c"disk.img";
/// What lies beside it while it is being made: a draft, and the mark of a copy that is not whole. Nothing else there is looked at: it is
/// somebody else's, and there may be any number of it.
const UNFINISHED: [&CStr; 2] = [c"disk.new", c"disk.img.unfinished"];
/// Entries in a folder of what a guest keeps. There are a dozen; whoever puts millions there is not to have them listed.
const MOST: usize = 1024;
/// Folders within folders of what a guest keeps: its place, its TPM.
const DEEPEST: u32 = 4;

/// A process at the other end of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its number, as this node counts.
    pub pid: u32,
    /// Its user.
    pub user: Uid,
    group: Gid,
}

impl Peer {
    /// Who listened at, or connected to, the other end.
    ///
    /// # Errors
    /// When it cannot be told, or it is in no process namespace that this process sees.
    pub fn of(stream: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(stream, PeerCredentials)?;
        let pid = u32::try_from(credentials.pid()).ok().filter(|pid| *pid != 0);
        let pid = pid.ok_or_else(|| io::Error::other("whoever is at the other end has no number here"))?;
        Ok(Self { pid, user: Uid::from_raw(credentials.uid()), group: Gid::from_raw(credentials.gid()) })
    }

    /// Whether all of it is its to open already.
    fn is_root(self) -> bool {
        self.user.is_root()
    }
}

/// A pod as its process sees it: its files and its network.
pub struct Pod {
    root: OwnedFd,
    network: Namespace,
    peer: Peer,
    paths: Paths,
}

impl Pod {
    /// The pod with this `sockets` volume, through its process.
    ///
    /// # Errors
    /// When the process is gone, or is one without power in another pod: its number has become another's.
    pub fn of(peer: Peer, sockets: &SocketDir) -> io::Result<Self> {
        // Of one process, whoever has its number by the time that it is looked through.
        let folder = open_folder(&PathBuf::from(format!("/proc/{}", peer.pid)))?;
        let process = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
        let label = format!("of process {}", peer.pid);
        let network = Namespace::open_path(&process.join("ns/net"), &label).map_err(io::Error::other)?;
        Self::seen_from(&process.join("root"), network, peer, sockets, Paths::default())
    }

    fn seen_from(root: &Path, network: Namespace, peer: Peer, sockets: &SocketDir, paths: Paths) -> io::Result<Self> {
        let pod = Self { root: open_folder(root)?, network, peer, paths };
        if peer.is_root() {
            // It could show any folder there, and is given nothing.
            return Ok(pod);
        }
        let about = fstat(&pod.open(&pod.paths.sockets, OFlag::O_PATH | OFlag::O_DIRECTORY)?)?;
        if (about.st_dev, about.st_ino) != sockets.identity()? {
            return Err(io::Error::other(format!(
                "process {} is not of the pod of {}",
                peer.pid,
                sockets.path().display()
            )));
        }
        Ok(pod)
    }

    /// Its network.
    pub fn network(&self) -> &Namespace {
        &self.network
    }

    /// Who its process is.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Gives a launcher what its guest is made of. While the guest is yet to come (`awaited`) what is kept of it is its source's, whose
    /// TPM sets modes of its files, as their owner only may.
    pub fn give(&self, vmi: &VirtualMachineInstance, awaited: bool) {
        if self.peer.is_root() {
            return;
        }
        for device in DEVICES {
            self.note(device, self.give_device(device));
        }
        for volume in vmi.spec.volumes.iter().filter(|one| one.persistent_volume_claim.is_some()) {
            self.give_volume(&volume.name);
        }
        if vmi.spec.domain.has_persistent_state() {
            self.note("what the guest keeps", self.give_state(awaited));
        }
    }

    /// Gives it the claim of a volume: a block device, or a folder with an image.
    pub fn give_volume(&self, name: &str) {
        // It becomes a part of a path.
        if SocketDir::is_name(name) && !self.peer.is_root() {
            self.note(name, self.give_claim(name));
        }
    }

    /// What cannot be given may still be open to it: by its mode, or as a server of files has it. It says so itself if not.
    fn note(&self, what: &str, given: io::Result<()>) {
        match given {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::info!(pid = self.peer.pid, user = %self.peer.user, what, %error, "cannot be given to the pod's user");
            }
            _ => {}
        }
    }

    /// Opens a path of the pod as if its root were `/`, whatever links are on the way.
    fn open(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        loop {
            match openat2(&self.root, path, how) {
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn give_device(&self, name: &str) -> io::Result<()> {
        let here = fs::metadata(Path::new("/dev").join(name))?;
        let node = self.open(&Path::new("/dev").join(name), OFlag::O_PATH)?;
        let about = fstat(&node)?;
        if kind(&about) != SFlag::S_IFCHR || !here.file_type().is_char_device() || about.st_rdev != here.rdev() {
            return Err(io::Error::other("it is not the node's device of that name"));
        }
        self.make_its(&node, &about, 0)
    }

    fn give_claim(&self, name: &str) -> io::Result<()> {
        match self.open(&self.paths.block_disks.join(name), OFlag::O_PATH) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            node => {
                let node = node?;
                let about = fstat(&node)?;
                if kind(&about) != SFlag::S_IFBLK {
                    return Err(io::Error::other("it is no block device"));
                }
                return self.make_its(&node, &about, 0);
            }
        }
        let folder = self.open(&self.paths.vmi_disks.join(name), OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        let image = self.give_image(&folder, IMAGE)?;
        let mut unfinished = false;
        for name in UNFINISHED {
            unfinished |= self.give_image(&folder, name)?;
        }
        let about = fstat(&folder)?;
        // What is whole is only opened. Else there are files to make, and others may be using the folder too: it stays theirs, and
        // becomes the group's as `fsGroup` would have it.
        if self.has(&about, 0o7) || image && !unfinished && (self.has(&about, 0o1) || about.st_mode & 0o1 != 0) {
            return Ok(());
        }
        fchownat(folder.as_fd(), c"", None, Some(self.peer.group), AtFlags::AT_EMPTY_PATH)?;
        set_mode(&folder, about.st_mode & 0o7777 | 0o2770)
    }

    /// Gives it a file of a claim. False where there is none of that name.
    fn give_image(&self, folder: &OwnedFd, name: &CStr) -> io::Result<bool> {
        let Some(file) = look(folder, name)? else { return Ok(false) };
        let about = fstat(&file)?;
        if kind(&about) == SFlag::S_IFREG && !self.has(&about, 0o6) {
            self.make_its(&file, &about, 0o600)?;
        }
        Ok(true)
    }

    /// All that is on the claim is this guest's. Of what another place of it still uses only the folders are given, so that they can be
    /// removed later.
    fn give_state(&self, awaited: bool) -> io::Result<()> {
        let folder = self.open(&self.paths.persistent_state, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        self.give_tree(folder, !awaited, DEEPEST)
    }

    fn give_tree(&self, folder: OwnedFd, files: bool, deepest: u32) -> io::Result<()> {
        for name in names(&folder)? {
            // What is gone since needs nothing: whoever uses it replaces its files.
            let Some(file) = look(&folder, &name)? else { continue };
            let about = fstat(&file)?;
            match kind(&about) {
                SFlag::S_IFREG if files && !self.has(&about, 0o6) => self.make_its(&file, &about, 0o600)?,
                SFlag::S_IFDIR if deepest > 0 && name.as_c_str() != c"lost+found" => {
                    self.give_tree(open_folder_of(&file)?, files, deepest - 1)?;
                }
                _ => {}
            }
        }
        let about = fstat(&folder)?;
        if self.has(&about, 0o7) { Ok(()) } else { self.make_its(&folder, &about, 0o700) }
    }

    /// Whether the process may do all this with it, as its owner or by its group.
    fn has(&self, about: &FileStat, wanted: u32) -> bool {
        let mode = about.st_mode;
        let owner = about.st_uid == self.peer.user.as_raw() && mode >> 6 & wanted == wanted;
        owner || about.st_gid == self.peer.group.as_raw() && mode >> 3 & wanted == wanted
    }

    fn make_its(&self, file: &OwnedFd, about: &FileStat, mode: u32) -> io::Result<()> {
        // Its group keeps what it may do with it: another pod's, say.
        if about.st_uid != self.peer.user.as_raw() {
            fchownat(file.as_fd(), c"", Some(self.peer.user), None, AtFlags::AT_EMPTY_PATH)?;
        }
        if about.st_mode & mode == mode { Ok(()) } else { set_mode(file, about.st_mode & 0o777 | mode) }
    }
}

fn kind(about: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(about.st_mode) & SFlag::S_IFMT
}

/// Also of a descriptor that only stands for a path.
pub(crate) fn set_mode(file: &OwnedFd, mode: u32) -> io::Result<()> {
    fs::set_permissions(format!("/proc/self/fd/{}", file.as_raw_fd()), fs::Permissions::from_mode(mode))
}

fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// To list it, by a descriptor that only stands for its path.
fn open_folder_of(folder: &OwnedFd) -> io::Result<OwnedFd> {
    Ok(openat(folder, c".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// What has this name in the folder, unopened.
fn look(folder: &OwnedFd, name: &CStr) -> io::Result<Option<OwnedFd>> {
    match openat(folder, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()) {
        Err(nix::Error::ENOENT) => Ok(None),
        other => Ok(Some(other?)),
    }
}

fn names(folder: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::from_fd(folder.try_clone()?)?.iter() {
        let entry = entry?;
        if [c".", c".."].contains(&entry.file_name()) {
            continue;
        }
        if names.len() == MOST {
            return Err(io::Error::other(format!("a folder of what the guest keeps has more than {MOST} entries")));
        }
        names.push(entry.file_name().to_owned());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{chown, symlink};

    const USER: u32 = 107;

    struct Place {
        scratch: tempfile::TempDir,
        pod: Pod,
    }

    impl Place {
        /// A pod's root in a folder; none where this is not root, who alone gives files away.
        fn new() -> Option<Self> {
            if !nix::unistd::geteuid().is_root() {
                println!("SKIPPED: only root gives files away");
                return None;
            }
            let scratch = tempfile::tempdir().unwrap();
            let root = scratch.path().join("root");
            let paths = Paths::default();
            for folder in [&paths.sockets, &paths.vmi_disks, &paths.block_disks, &paths.persistent_state] {
                fs::create_dir_all(below(&root, folder)).unwrap();
            }
            let sockets = SocketDir::open(below(&root, &paths.sockets)).unwrap();
            let peer = Peer { pid: 1, user: Uid::from_raw(USER), group: Gid::from_raw(USER) };
            let pod = Pod::seen_from(&root, Namespace::current().unwrap(), peer, &sockets, paths).unwrap();
            Some(Self { scratch, pod })
        }

        fn root(&self) -> PathBuf {
            self.scratch.path().join("root")
        }

        fn claim(&self, name: &str) -> PathBuf {
            let folder = below(&self.root(), &self.pod.paths.vmi_disks).join(name);
            fs::create_dir_all(&folder).unwrap();
            folder
        }
    }

    fn below(root: &Path, path: &Path) -> PathBuf {
        root.join(path.strip_prefix("/").unwrap())
    }

    fn file(path: &Path, mode: u32) {
        fs::write(path, "").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn about(path: &Path) -> (u32, u32, u32) {
        let about = fs::symlink_metadata(path).unwrap();
        (about.uid(), about.gid(), about.permissions().mode() & 0o7777)
    }

    #[test]
    fn images_that_others_made_are_given_and_nothing_else() {
        let Some(place) = Place::new() else { return };
        let claim = place.claim("data");
        let secret = place.scratch.path().join("shadow");
        for path in [&claim.join("disk.img"), &claim.join("notes"), &secret] {
            file(path, 0o600);
        }
        symlink(&secret, claim.join("disk.link")).unwrap();
        let outside = place.scratch.path().join("outside");
        fs::create_dir(&outside).unwrap();
        file(&outside.join("disk.img"), 0o600);
        symlink(&outside, below(&place.root(), &place.pod.paths.vmi_disks).join("led")).unwrap();
        for name in ["data", "led", "gone", "../data", ""] {
            place.pod.give_volume(name);
        }
        assert_eq!(about(&claim.join("disk.img")), (USER, 0, 0o600));
        assert_eq!(about(&claim), (0, 0, 0o755), "others use it, and nothing is to be made in it");
        assert_eq!(about(&claim.join("notes")), (0, 0, 0o600));
        assert_eq!(about(&secret), (0, 0, 0o600));
        assert_eq!(about(&outside.join("disk.img")), (0, 0, 0o600));

        // A folder that files have to be made in becomes the group's.
        for (name, beside) in [("empty", None), ("copied", Some("disk.img.unfinished")), ("closed", None)] {
            let claim = place.claim(name);
            if name != "empty" {
                file(&claim.join("disk.img"), 0o600);
            }
            if name == "closed" {
                fs::set_permissions(&claim, fs::Permissions::from_mode(0o750)).unwrap();
            }
            if let Some(beside) = beside {
                file(&claim.join(beside), 0o600);
            }
            place.pod.give_volume(name);
            assert_eq!(about(&claim).1, USER, "{name}");
            assert_eq!(about(&claim).2 & 0o2070, 0o2070, "{name}");
        }
        // The group that an image had may do with it what it could.
        let backed_up = place.claim("backed-up").join("disk.img");
        file(&backed_up, 0o640);
        chown(&backed_up, Some(0), Some(2000)).unwrap();
        place.pod.give_volume("backed-up");
        assert_eq!(about(&backed_up), (USER, 2000, 0o640));
        // Nothing is drawn in by a name that only begins like an image's.
        file(&claim.join("disk.x"), 0o600);
        place.pod.give_volume("data");
        assert_eq!(about(&claim.join("disk.x")), (0, 0, 0o600));

        // What the group may use already stays its owner's.
        let shared = claim.join("disk.img");
        chown(&shared, Some(0), Some(USER)).unwrap();
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o660)).unwrap();
        place.pod.give_volume("data");
        assert_eq!(about(&shared), (0, USER, 0o660));
    }

    #[test]
    fn a_guests_state_is_given_as_a_whole() {
        let Some(place) = Place::new() else { return };
        let state = below(&place.root(), &place.pod.paths.persistent_state);
        let tpm = state.join("first/tpm");
        fs::create_dir_all(&tpm).unwrap();
        file(&tpm.join("tpm2-00.permall"), 0o640);
        file(&state.join("current.json"), 0o644);
        place.pod.give_state(true).unwrap();
        assert_eq!(about(&tpm), (USER, 0, 0o755));
        assert_eq!(about(&tpm.join("tpm2-00.permall")), (0, 0, 0o640), "the source's still");
        place.pod.give_state(false).unwrap();
        assert_eq!(about(&tpm.join("tpm2-00.permall")), (USER, 0, 0o640));
        assert_eq!(about(&tpm), (USER, 0, 0o755));
        assert_eq!(about(&state), (USER, 0, 0o755));

        // Nobody has the handler list what has no end.
        let endless = state.join("endless");
        fs::create_dir(&endless).unwrap();
        for number in 0..=MOST {
            fs::write(endless.join(number.to_string()), "").unwrap();
        }
        assert!(place.pod.give_state(false).unwrap_err().to_string().contains("entries"));
    }

    #[test]
    fn devices_are_given_by_their_numbers() {
        let Some(place) = Place::new() else { return };
        let mode = Mode::from_bits_truncate(0o600);
        let dev = place.root().join("dev");
        let node = |path: &Path, kind, of: &str| {
            nix::sys::stat::mknod(path, kind, mode, fs::metadata(of).unwrap().rdev()).unwrap();
        };
        fs::create_dir(dev.join("net")).unwrap();
        node(&dev.join("net/tun"), SFlag::S_IFCHR, "/dev/net/tun");
        node(&dev.join("kvm"), SFlag::S_IFCHR, "/dev/null");
        node(&dev.join("vmi-disks/data"), SFlag::S_IFBLK, "/dev/null");
        node(&dev.join("vmi-disks/chars"), SFlag::S_IFCHR, "/dev/null");
        place.pod.give_device("net/tun").unwrap();
        assert_eq!(about(&dev.join("net/tun")), (USER, 0, 0o600));
        assert!(place.pod.give_device("kvm").is_err());
        assert_eq!(about(&dev.join("kvm")).0, 0);
        place.pod.give_volume("data");
        assert_eq!(about(&dev.join("vmi-disks/data")), (USER, 0, 0o600));
        place.pod.give_volume("chars");
        assert_eq!(about(&dev.join("vmi-disks/chars")).0, 0);
    }

    #[test]
    fn a_process_of_another_pod_gets_nothing() {
        let Some(place) = Place::new() else { return };
        let another = tempfile::tempdir().unwrap();
        let sockets = SocketDir::open(another.path().to_owned()).unwrap();
        let peer = place.pod.peer;
        let network = Namespace::current().unwrap();
        assert!(Pod::seen_from(&place.root(), network, peer, &sockets, Paths::default()).is_err());
    }

    #[test]
    fn a_process_that_is_root_opens_what_it_wants_itself() {
        let Some(mut place) = Place::new() else { return };
        place.pod.peer.user = Uid::from_raw(0);
        let image = place.claim("data").join("disk.img");
        file(&image, 0o600);
        chown(&image, Some(1000), Some(1000)).unwrap();
        place.pod.give_volume("data");
        assert_eq!(about(&image), (1000, 1000, 0o600));
    }
}
