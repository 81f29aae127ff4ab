//! Killing guests from outside: the launcher may hang, or be too old to do it itself.
//!
//! What is looked at is the node's own: the folders of its pods, the sockets in them and `/proc`. The API may be away, and a
//! handler that has just started knows nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_launcher::fence::{self, Victim};
use godwit_launcher::{plain_file, record};

use super::disks::Disks;
use crate::follow;
use crate::sockets::SocketDir;

/// In a launcher's `sockets` volume: its guest is under this node's lease. Without it a handler that never had the lease leaves
/// the guest alone: it was started when there was none.
const MARK: &str = "leased";
/// Beside what was written down of a guest that was fenced: it is in the API too.
const TOLD: &str = "fenced-told";
/// How long a killed process may take to be gone before that is complained about.
const GONE_WITHIN: Duration = Duration::from_secs(2);
/// What is written down of a guest that was killed from outside.
const REASON: &str = "Fenced: its node could not renew its lease in time, and its launcher did not end it, so the handler \
                      killed it before it may be started elsewhere";

/// Whom to kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whom {
    /// The guests that this lease covers.
    Guests,
    /// The launchers that it covers, with or without a guest.
    Leased,
    /// Every launcher, with or without a guest: none of them may get one any more.
    Launchers,
}

/// Puts a launcher's guest, called this, under the node's lease.
///
/// # Errors
/// When that cannot be written down: a later process does not know it. This one does.
pub(super) fn mark(met: &Met, sockets: &Path, guest: &str) -> io::Result<()> {
    met.note_leased(sockets);
    let mark = sockets.join(MARK);
    // What else has that name does not say whose guest it is.
    plain_file::read(&mark).map(drop).or_else(|_| plain_file::write(&mark, guest.as_bytes()))
}

/// Whether there is anything by that name. Where that cannot be told, there may be.
fn is_there(path: &Path) -> bool {
    !matches!(path.symlink_metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound)
}

/// The launchers that were met, by their `sockets` volume, for when they let nobody in any more. A descriptor keeps each one's
/// number from becoming another process's.
#[derive(Default)]
pub struct Met {
    launchers: Mutex<BTreeMap<PathBuf, (u32, Victim)>>,
    /// Those whose guests this process has put under the lease: their marks may be missing.
    leased: Mutex<BTreeSet<PathBuf>>,
    disks: Disks,
    /// One strike at a time.
    striking: tokio::sync::Mutex<()>,
}

impl Met {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, (u32, Victim)>> {
        self.launchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_leased(&self, sockets: &Path) {
        let mut leased = self.leased.lock().unwrap_or_else(PoisonError::into_inner);
        if leased.insert(sockets.to_owned()) {
            // Pods that were removed need nothing any more.
            leased.retain(|folder| folder == sockets || is_there(folder));
        }
    }

    fn is_leased(&self, sockets: &Path) -> bool {
        let leased = self.leased.lock().unwrap_or_else(PoisonError::into_inner).contains(sockets);
        leased || is_there(&sockets.join(MARK))
    }

    /// This process listens on the launcher's socket in this volume.
    pub fn note(&self, sockets: &Path, pid: u32) {
        let Ok(victim) = Victim::open(pid) else { return };
        let mut met = self.lock();
        met.retain(|_, (_, victim)| !victim.is_gone_within(Duration::ZERO));
        met.insert(sockets.to_owned(), (pid, victim));
    }

    /// The launcher of this volume, if it was met and lives.
    fn living(&self, sockets: &Path) -> Option<u32> {
        let met = self.lock();
        let (pid, victim) = met.get(sockets)?;
        (!victim.is_gone_within(Duration::ZERO)).then_some(*pid)
    }

    fn folders(&self) -> Vec<(String, PathBuf)> {
        self.lock().keys().map(|folder| (folder.display().to_string(), folder.clone())).collect()
    }
}

/// The `sockets` volumes of the node's pods that may have a launcher's socket, with the pod's UID.
fn launchers(kubelet_root: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let pods = match std::fs::read_dir(kubelet_root.join("pods")) {
        Ok(pods) => pods,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in pods {
        let Ok(uid) = entry?.file_name().into_string() else { continue };
        let folder = SocketDir::path_of(kubelet_root, &uid);
        // Where that cannot be told, whoever opens it is told why.
        if !matches!(folder.try_exists(), Ok(false)) {
            found.push((uid, folder));
        }
    }
    Ok(found)
}

/// The pods on this node whose guest was fenced, by UID, and what the guest is called; without those of which that was told.
#[must_use]
pub fn untold(kubelet_root: &Path) -> BTreeMap<String, String> {
    let untold = |(uid, folder): (String, PathBuf)| {
        let disks = follow::disks_of(&folder)?;
        fence::read(&disks).filter(|_| !is_there(&disks.join(TOLD)))?;
        let guest = guest_of(&uid, &folder);
        Some((uid, guest))
    };
    launchers(kubelet_root).into_iter().flatten().filter_map(untold).collect()
}

/// It was told that the guest of this pod was fenced.
pub fn note_told(kubelet_root: &Path, uid: &str) {
    let Some(disks) = follow::disks_of(&SocketDir::path_of(kubelet_root, uid)) else { return };
    // A pod that was removed meanwhile needs none.
    if disks.exists()
        && let Err(error) = plain_file::write(&disks.join(TOLD), b"")
    {
        tracing::warn!(%error, pod = uid, "that it was told that a guest was fenced cannot be noted");
    }
}

/// The launchers on this node whose guests are under its lease: the `sockets` volume, and what the guest is called.
#[must_use]
pub fn leased(kubelet_root: &Path) -> Vec<(PathBuf, String)> {
    let marked = |(_, folder): (String, PathBuf)| Some((folder.clone(), read_mark(&folder)?));
    launchers(kubelet_root).into_iter().flatten().filter_map(marked).collect()
}

fn read_mark(sockets: &Path) -> Option<String> {
    String::from_utf8(plain_file::read(&sockets.join(MARK)).ok()?).ok()
}

/// A launcher: its pod's UID, its `sockets` volume, its process.
type Found = (String, PathBuf, u32);

/// Not all that should be is dead.
#[derive(Debug, Default, thiserror::Error)]
#[error("{}", why(&self.guests()))]
pub struct NotDead {
    /// What was killed and is still there.
    pub(super) left: Vec<Left>,
}

/// A process that was killed and is still there.
#[derive(Debug)]
pub(super) struct Left {
    /// Whose it is.
    pub guest: String,
    pub victim: Victim,
}

impl NotDead {
    /// Whose processes were killed and are still there.
    #[must_use]
    pub fn guests(&self) -> Vec<String> {
        let guests: BTreeSet<&String> = self.left.iter().map(|left| &left.guest).collect();
        guests.into_iter().cloned().collect()
    }

    /// What of it is left by now; none if nothing is.
    pub(super) fn by_now(mut self) -> Option<Self> {
        self.left.retain(|left| !left.victim.is_gone_within(Duration::ZERO));
        (!self.left.is_empty()).then_some(self)
    }
}

fn why(left: &[String]) -> String {
    match left {
        [] => "whether all of them are cannot be told: see the log of virt-handler".to_owned(),
        left => format!("the kernel does not let go of the killed processes of {}", left.join(", ")),
    }
}

/// Kills what may not run any more and waits until it is dead.
///
/// # Errors
/// Something is left, or that cannot be told.
pub async fn strike(kubelet_root: &Path, met: &Met, whom: Whom) -> Result<(), NotDead> {
    let _alone = met.striking.lock().await;
    let mut sure = true;
    let folders = launchers(kubelet_root).unwrap_or_else(|error| {
        tracing::warn!(%error, "the pods of this node cannot be listed; those that are known are looked at");
        sure = false;
        met.folders()
    });
    let mut found = Vec::new();
    for (uid, folder) in folders {
        // Before its socket is looked at: what is there is nobody's concern.
        if !is_covered(met, &folder, whom) {
            continue;
        }
        let launcher = match follow::peer(&folder).await {
            Ok(launcher) => launcher,
            Err(error) => {
                let known = met.living(&folder);
                if known.is_none() {
                    tracing::warn!(%error, pod = uid, "whether this pod's launcher runs cannot be told");
                    sure = false;
                }
                known
            }
        };
        if let Some(launcher) = launcher {
            found.push((uid, folder, launcher));
        }
    }
    // A test's launchers are in this very process.
    found.retain(|(_, _, pid)| *pid != std::process::id());
    let disks = met.disks.clone();
    tokio::task::spawn_blocking(move || strike_these(&found, whom, &disks))
        .await
        .unwrap_or_else(|_| Err(NotDead::default()))?;
    if sure { Ok(()) } else { Err(NotDead::default()) }
}

fn is_covered(met: &Met, sockets: &Path, whom: Whom) -> bool {
    whom == Whom::Launchers || met.is_leased(sockets)
}

/// A process that has to go.
struct Prey<'a> {
    pod: &'a str,
    pid: u32,
    victim: Victim,
}

fn strike_these(found: &[Found], whom: Whom, on: &Disks) -> Result<(), NotDead> {
    let all = found.iter().filter_map(|(uid, folder, launcher)| Some((uid, follow::disks_of(folder)?, launcher)));
    let all: Vec<_> = all.collect();
    // What is left of a guest that has gone elsewhere runs nothing, and the guest may need it. Whether it has may be unknown, as its
    // disk hangs or the record is none: then it has not, since nobody else's time waits for that.
    let gone = on.each("departure", all.iter().map(|(_, disks, _)| disks.clone()), |disks| {
        record::read_departed(disks).is_ok_and(|facts| facts.is_some())
    });
    let gone = gone.wait();
    let mut launchers: BTreeMap<u32, (&str, PathBuf)> = BTreeMap::new();
    for (uid, disks, launcher) in all {
        if gone.get(&disks) != Some(&true) {
            launchers.insert(*launcher, (uid, disks));
        }
    }
    let left = strike_launchers(&launchers, whom, on).map_err(|error| {
        tracing::error!(%error, "the processes of this node cannot be looked at, so not all that should is killed yet");
        NotDead::default()
    })?;
    if left.is_empty() {
        return Ok(());
    }
    let name = |pod: &str| match found.iter().find(|(uid, ..)| uid == pod) {
        Some((uid, folder, _)) => guest_of(uid, folder),
        None => format!("the guest of pod {pod}"),
    };
    Err(NotDead { left: left.into_iter().map(|prey| Left { guest: name(prey.pod), victim: prey.victim }).collect() })
}

/// What is left.
fn strike_launchers<'a>(
    launchers: &BTreeMap<u32, (&'a str, PathBuf)>,
    whom: Whom,
    on: &Disks,
) -> io::Result<Vec<Prey<'a>>> {
    if launchers.is_empty() {
        return Ok(Vec::new());
    }
    let guests = guests_of(launchers)?;
    let pods: BTreeSet<&str> = guests.iter().map(|guest| guest.pod).collect();
    let victims = launchers.values().filter(|(pod, _)| pods.contains(pod)).map(|(_, disks)| disks.clone());
    // Only when all are killed, and before their launchers can have ended.
    let (mut left, written) = end(guests, || on.each("fenced", victims, |disks| fence::write_down(disks, REASON)));
    written.wait();
    if whom != Whom::Guests {
        // Only then: without its launcher nobody finds a guest that does not go.
        let mut prey = Vec::new();
        for (pid, (pod, _)) in launchers.iter().filter(|(_, (pod, _))| left.iter().all(|left| left.pod != *pod)) {
            prey.extend(open(*pid)?.map(|victim| Prey { pod, pid: *pid, victim }));
        }
        left.extend(end(prey, || ()).0);
    }
    Ok(left)
}

/// What the guest of a pod is called.
fn guest_of(uid: &str, folder: &Path) -> String {
    let guest = read_mark(folder).filter(|guest| !guest.is_empty());
    guest.unwrap_or_else(|| format!("the guest of pod {uid}"))
}

/// What these launchers have started and still runs.
fn guests_of<'a>(launchers: &BTreeMap<u32, (&'a str, PathBuf)>) -> io::Result<Vec<Prey<'a>>> {
    let mut guests = Vec::new();
    for (pid, launcher, victim) in children(|parent| launchers.contains_key(&parent))? {
        let Some((pod, _)) = launchers.get(&launcher) else { continue };
        tracing::error!(pod, launcher, pid, "the node's lease has passed: killing a guest");
        guests.push(Prey { pod, pid, victim });
    }
    Ok(guests)
}

/// Kills all of them, does what is to be done then, and waits until they are gone. Those that are left.
fn end<T>(prey: Vec<Prey<'_>>, killed: impl FnOnce() -> T) -> (Vec<Prey<'_>>, T) {
    let (left, done) =
        kill_then_wait(prey, |one| one.victim.kill(), killed, |one, limit| one.victim.is_gone_within(limit));
    for Prey { pod, pid, .. } in &left {
        tracing::error!(pod, pid, "a process that was killed is not dead: the kernel does not let go of it");
    }
    (left, done)
}

/// All of them first, so that one that does not go keeps no other one alive.
fn kill_then_wait<T, D>(
    mut all: Vec<T>,
    kill: impl Fn(&T),
    killed: impl FnOnce() -> D,
    is_gone_within: impl Fn(&T, Duration) -> bool,
) -> (Vec<T>, D) {
    all.iter().for_each(kill);
    let done = killed();
    let end = fence::now() + GONE_WITHIN;
    all.retain(|one| !is_gone_within(one, end.saturating_sub(fence::now())));
    (all, done)
}

/// A process that has not ended.
fn open(pid: u32) -> io::Result<Option<Victim>> {
    none_where_ended(Victim::open(pid))
}

fn none_where_ended<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The living children of such processes: each one's number, and its parent's.
fn children(is_parent: impl Fn(u32) -> bool) -> io::Result<Vec<(u32, u32, Victim)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Some(parent) = living(pid)?.filter(|parent| is_parent(*parent)) else { continue };
        let Some(victim) = open(pid)? else { continue };
        // The number may be another one's by now.
        if living(pid)? == Some(parent) {
            found.push((pid, parent, victim));
        }
    }
    Ok(found)
}

/// The parent of a process that is there and is no zombie.
fn living(pid: u32) -> io::Result<Option<u32>> {
    let stat = none_where_ended(stat(pid))?.filter(|stat| !stat.starts_with(['Z', 'X']));
    Ok(stat.and_then(|stat| stat.split(' ').nth(1)?.parse().ok()))
}

/// The fields of `/proc/<pid>/stat` after the name, which may contain anything.
fn stat(pid: u32) -> io::Result<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/stat"))?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.rsplit_once(") ").map(|(_, fields)| fields.to_owned()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use godwit_launcher::record::Record;
    use godwit_launcher::rpc::{MigrationFacts, MigrationRole};

    use super::*;
    use crate::testing::FullSocket;

    /// A pod whose launcher is a shell with a child of its own, which stands for its QEMU; the shell stands still.
    struct Pod {
        root: tempfile::TempDir,
        launcher: Child,
        guest: u32,
    }

    impl Pod {
        fn sockets(&self) -> PathBuf {
            SocketDir::path_of(self.root.path(), "uid")
        }

        fn start() -> Self {
            let root = tempfile::tempdir().unwrap();
            let sockets = SocketDir::path_of(root.path(), "uid");
            std::fs::create_dir_all(&sockets).unwrap();
            std::fs::create_dir_all(follow::disks_of(&sockets).unwrap()).unwrap();
            let launcher = Command::new("sh").args(["-c", "sleep 600 & kill -STOP $$; wait"]).spawn().unwrap();
            let guest = loop {
                let stopped = stat(launcher.id()).unwrap().starts_with('T');
                match children(|parent| parent == launcher.id()).unwrap().first() {
                    Some((guest, ..)) if stopped => break *guest,
                    _ => std::thread::yield_now(),
                }
            };
            Self { root, launcher, guest }
        }

        fn strike(&self, whom: Whom) -> bool {
            self.strike_as(&Met::default(), whom)
        }

        fn strike_as(&self, met: &Met, whom: Whom) -> bool {
            let mut found = vec![("uid".to_owned(), self.sockets(), self.launcher.id())];
            found.retain(|(_, folder, _)| is_covered(met, folder, whom));
            strike_these(&found, whom, &met.disks).is_ok()
        }

        /// As an earlier process has done.
        fn mark(&self) {
            mark(&Met::default(), &self.sockets(), "default/vm").unwrap();
        }
    }

    fn is_zombie(pid: u32) -> bool {
        living(pid).unwrap().is_none()
    }

    impl Drop for Pod {
        fn drop(&mut self) {
            if let Ok(guest) = Victim::open(self.guest) {
                guest.kill();
            }
            let _ = self.launcher.kill();
            let _ = self.launcher.wait();
        }
    }

    #[test]
    fn the_guest_of_a_launcher_that_hangs_is_killed_if_it_is_under_the_lease() {
        let pod = Pod::start();
        assert!(pod.strike(Whom::Guests) && !is_zombie(pod.guest), "nobody has put it under a lease");
        pod.mark();
        assert!(pod.strike(Whom::Guests) && is_zombie(pod.guest));
        assert!(!is_zombie(pod.launcher.id()));
        assert_eq!(untold(pod.root.path()), BTreeMap::from([("uid".to_owned(), "default/vm".to_owned())]));
        assert!(pod.strike(Whom::Launchers) && is_zombie(pod.launcher.id()));
    }

    #[test]
    fn with_a_lease_that_is_gone_goes_what_it_covered_and_nothing_else() {
        let pod = Pod::start();
        assert!(pod.strike(Whom::Leased) && !is_zombie(pod.guest) && !is_zombie(pod.launcher.id()));
        pod.mark();
        assert!(pod.strike(Whom::Leased) && is_zombie(pod.guest) && is_zombie(pod.launcher.id()));
    }

    #[tokio::test]
    async fn a_launcher_whose_socket_is_full_is_not_taken_for_gone() {
        let pod = Pod::start();
        pod.mark();
        let (root, met) = (pod.root.path(), Met::default());
        // It stands for the launcher's own, which nobody empties.
        let _full = FullSocket::listen(&pod.sockets());
        assert!(strike(root, &met, Whom::Launchers).await.is_err(), "nobody can tell whether there is a launcher");
        assert!(!is_zombie(pod.guest));
        met.note(&pod.sockets(), pod.launcher.id());
        assert!(strike(root, &met, Whom::Guests).await.is_ok() && is_zombie(pod.guest));
        assert!(strike(root, &met, Whom::Launchers).await.is_ok() && is_zombie(pod.launcher.id()));
    }

    #[tokio::test]
    async fn pods_that_cannot_be_listed_are_not_taken_for_none() {
        let root = tempfile::tempdir().unwrap();
        assert!(strike(root.path(), &Met::default(), Whom::Launchers).await.is_ok(), "there never was one");
        std::fs::write(root.path().join("pods"), "").unwrap();
        assert!(strike(root.path(), &Met::default(), Whom::Launchers).await.is_err());
    }

    #[test]
    fn one_that_does_not_die_keeps_no_other_alive() {
        let log = std::cell::RefCell::new(Vec::new());
        let kill = |number: &u32| log.borrow_mut().push(("kill", *number));
        let gone = |number: &u32, limit: Duration| {
            assert!(limit <= GONE_WITHIN);
            log.borrow_mut().push(("wait", *number));
            *number != 1
        };
        let killed = || log.borrow_mut().push(("write", 0));
        assert_eq!(kill_then_wait(vec![1, 2, 3], kill, killed, gone).0, [1]);
        let done = [("kill", 1), ("kill", 2), ("kill", 3), ("write", 0), ("wait", 1), ("wait", 2), ("wait", 3)];
        assert_eq!(*log.borrow(), done);
    }

    #[test]
    fn what_a_guest_left_behind_is_not_touched() {
        let pod = Pod::start();
        pod.mark();
        let mut record = Record::prepare(&follow::disks_of(&pod.sockets()).unwrap()).unwrap();
        record.write(&MigrationFacts::new("m", MigrationRole::Source)).unwrap();
        assert!(pod.strike(Whom::Launchers));
        assert!(!is_zombie(pod.guest) && !is_zombie(pod.launcher.id()));
        assert!(untold(pod.root.path()).is_empty());
    }

    #[test]
    fn a_guest_that_cannot_be_marked_is_fenced_by_the_process_that_put_it_under_the_lease() {
        let (pod, met) = (Pod::start(), Met::default());
        std::fs::remove_dir(pod.sockets()).unwrap();
        assert!(mark(&met, &pod.sockets(), "default/vm").is_err());
        assert!(pod.strike(Whom::Guests) && !is_zombie(pod.guest), "nobody else knows of it");
        assert!(pod.strike_as(&met, Whom::Guests) && is_zombie(pod.guest));
    }

    #[test]
    fn what_a_pod_puts_in_the_place_of_our_files_keeps_nothing_alive_and_leads_nowhere() {
        let pod = Pod::start();
        let (sockets, disks) = (pod.sockets(), follow::disks_of(&pod.sockets()).unwrap());
        let of_the_node = pod.root.path().join("shadow");
        std::fs::write(&of_the_node, "secret").unwrap();
        let fifo = |path: PathBuf| nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        fifo(sockets.join(MARK));
        fifo(disks.join("fenced.json"));
        fifo(disks.join("migration-completed.json"));
        assert!(leased(pod.root.path()).is_empty() && untold(pod.root.path()).is_empty());
        pod.mark();
        assert_eq!(leased(pod.root.path()), [(sockets, "default/vm".to_owned())]);
        assert!(pod.strike(Whom::Guests) && is_zombie(pod.guest));
        assert_eq!(untold(pod.root.path()).len(), 1);
        std::os::unix::fs::symlink(&of_the_node, disks.join("there")).unwrap();
        std::fs::rename(disks.join("there"), disks.join("fenced.json")).unwrap();
        std::os::unix::fs::symlink(pod.root.path().join("made"), disks.join(TOLD)).unwrap();
        note_told(pod.root.path(), "uid");
        assert!(pod.strike(Whom::Launchers));
        assert!(!pod.root.path().join("made").exists());
        assert_eq!(std::fs::read(&of_the_node).unwrap(), b"secret");
    }

    #[tokio::test]
    async fn a_pod_that_no_lease_covers_cannot_keep_the_lease_away() {
        let (root, met) = (tempfile::tempdir().unwrap(), Met::default());
        let sockets = SocketDir::path_of(root.path(), "uid");
        std::fs::create_dir_all(&sockets).unwrap();
        std::fs::write(sockets.join("launcher.sock"), "").unwrap();
        assert!(strike(root.path(), &met, Whom::Leased).await.is_ok());
        assert!(strike(root.path(), &met, Whom::Guests).await.is_ok());
        assert!(strike(root.path(), &met, Whom::Launchers).await.is_err(), "it may be anybody's");
        mark(&met, &sockets, "default/vm").unwrap();
        assert!(strike(root.path(), &met, Whom::Leased).await.is_err());
    }

    #[test]
    fn what_is_dead_by_now_is_not_complained_about() {
        let pod = Pod::start();
        let left = |pid| Left { guest: "default/vm".to_owned(), victim: Victim::open(pid).unwrap() };
        let not_dead = NotDead { left: vec![left(pod.guest), left(pod.guest), left(std::process::id())] };
        assert_eq!(not_dead.guests(), ["default/vm"]);
        let victim = Victim::open(pod.guest).unwrap();
        victim.kill();
        assert!(victim.is_gone_within(Duration::from_secs(60)));
        assert_eq!(not_dead.by_now().map(|not_dead| not_dead.left.len()), Some(1));
        assert!(NotDead::default().by_now().is_none());
    }
}
