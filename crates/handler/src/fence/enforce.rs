//! Killing guests from outside: the launcher may hang, or be too old to do it itself.
//!
//! What is looked at is the node's own: the folders of its pods, the sockets in them and `/proc`. The API may be away, and a
//! handler that has just started knows nothing else.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_launcher::fence::{self, Victim};
use godwit_launcher::record;

use crate::follow;
use crate::sockets::SocketDir;

/// In a launcher's `sockets` volume: its guest is under this node's lease. Without it a handler that never had the lease leaves
/// the guest alone: it was started when there was none.
const MARK: &str = "leased";
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
    /// Every launcher, with or without a guest: none of them may get one any more.
    Launchers,
}

/// Puts a launcher's guest, called this, under the node's lease.
pub fn mark(sockets: &Path, guest: &str) {
    let mark = sockets.join(MARK);
    if !mark.exists()
        && let Err(error) = std::fs::write(&mark, guest)
    {
        tracing::warn!(%error, path = %mark.display(), "cannot mark a guest as leased");
    }
}

/// The launchers that were met, by their `sockets` volume, for when they let nobody in any more. A descriptor keeps each one's
/// number from becoming another process's.
#[derive(Default)]
pub struct Met(Mutex<BTreeMap<PathBuf, (u32, Victim)>>);

impl Met {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, (u32, Victim)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

/// The pods on this node whose guest was fenced, by UID, and what the guest is called.
#[must_use]
pub fn fenced(kubelet_root: &Path) -> BTreeMap<String, String> {
    let fenced = |(uid, folder): (String, PathBuf)| {
        fence::read(&follow::disks_of(&folder)?)?;
        let guest = std::fs::read_to_string(folder.join(MARK)).ok().filter(|guest| !guest.is_empty());
        Some((uid.clone(), guest.unwrap_or_else(|| format!("the guest of pod {uid}"))))
    };
    launchers(kubelet_root).into_iter().flatten().filter_map(fenced).collect()
}

/// A launcher: its pod's UID, its `sockets` volume, its process.
type Found = (String, PathBuf, u32);

/// Kills what may not run any more and waits until it is dead. Whether nothing is left that should be: not where that cannot be
/// told.
pub async fn strike(kubelet_root: &Path, met: &Met, whom: Whom) -> bool {
    let mut sure = true;
    let folders = launchers(kubelet_root).unwrap_or_else(|error| {
        tracing::warn!(%error, "the pods of this node cannot be listed; those that are known are looked at");
        sure = false;
        met.folders()
    });
    let mut found = Vec::new();
    for (uid, folder) in folders {
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
    let struck = tokio::task::spawn_blocking(move || strike_these(&found, whom)).await;
    sure && struck.unwrap_or(false)
}

/// A process that has to go.
struct Prey<'a> {
    pod: &'a str,
    pid: u32,
    victim: Victim,
}

fn strike_these(found: &[Found], whom: Whom) -> bool {
    let mut launchers: BTreeMap<u32, (&str, PathBuf)> = BTreeMap::new();
    for (uid, folder, launcher) in found {
        if whom == Whom::Guests && matches!(folder.join(MARK).try_exists(), Ok(false)) {
            continue;
        }
        let Some(disks) = follow::disks_of(folder) else { continue };
        // What is left of a guest that has gone elsewhere runs nothing, and the guest may need it.
        if record::read_departed(&disks).is_ok_and(|facts| facts.is_some()) {
            continue;
        }
        launchers.insert(*launcher, (uid, disks));
    }
    if launchers.is_empty() {
        return true;
    }
    let struck = guests_of(&launchers).and_then(|guests| {
        let left: Vec<&str> = end(&guests).iter().map(|guest| guest.pod).collect();
        if whom == Whom::Guests {
            return Ok(left.is_empty());
        }
        // Only then: without its launcher nobody finds a guest that does not go.
        let mut prey = Vec::new();
        for (pid, (pod, _)) in launchers.iter().filter(|(_, (pod, _))| !left.contains(pod)) {
            prey.extend(open(*pid)?.map(|victim| Prey { pod, pid: *pid, victim }));
        }
        Ok(left.is_empty() & end(&prey).is_empty())
    });
    struck.unwrap_or_else(|error| {
        tracing::error!(%error, "the processes of this node cannot be looked at, so not all that should is killed yet");
        false
    })
}

/// What these launchers have started and still runs; that it is killed is written down.
fn guests_of<'a>(launchers: &BTreeMap<u32, (&'a str, PathBuf)>) -> io::Result<Vec<Prey<'a>>> {
    let mut guests = Vec::new();
    for (pid, launcher, victim) in children(|parent| launchers.contains_key(&parent))? {
        let Some((pod, disks)) = launchers.get(&launcher) else { continue };
        tracing::error!(pod, launcher, pid, "the node's lease has passed: killing a guest");
        fence::write_down(disks, REASON);
        guests.push(Prey { pod, pid, victim });
    }
    Ok(guests)
}

/// Kills all of them and waits until they are gone. Those that are left.
fn end<'a, 'b>(prey: &'a [Prey<'b>]) -> Vec<&'a Prey<'b>> {
    let left = kill_then_wait(prey, |one| one.victim.kill(), |one, limit| one.victim.is_gone_within(limit));
    for Prey { pod, pid, .. } in &left {
        tracing::error!(pod, pid, "a process that was killed is not dead: the kernel does not let go of it");
    }
    left
}

/// All of them first, so that one that does not go keeps no other one alive.
fn kill_then_wait<T>(all: &[T], kill: impl Fn(&T), is_gone_within: impl Fn(&T, Duration) -> bool) -> Vec<&T> {
    all.iter().for_each(kill);
    let end = fence::now() + GONE_WITHIN;
    all.iter().filter(|one| !is_gone_within(one, end.saturating_sub(fence::now()))).collect()
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
            strike_these(&[("uid".to_owned(), self.sockets(), self.launcher.id())], whom)
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
        mark(&pod.sockets(), "default/vm");
        assert!(pod.strike(Whom::Guests) && is_zombie(pod.guest));
        assert!(!is_zombie(pod.launcher.id()));
        assert_eq!(fenced(pod.root.path()), BTreeMap::from([("uid".to_owned(), "default/vm".to_owned())]));
        assert!(pod.strike(Whom::Launchers) && is_zombie(pod.launcher.id()));
    }

    #[tokio::test]
    async fn a_launcher_whose_socket_is_full_is_not_taken_for_gone() {
        let pod = Pod::start();
        mark(&pod.sockets(), "default/vm");
        let (root, met) = (pod.root.path(), Met::default());
        // It stands for the launcher's own, which nobody empties.
        let _full = FullSocket::listen(&pod.sockets());
        assert!(!strike(root, &met, Whom::Launchers).await, "nobody can tell whether there is a launcher");
        assert!(!is_zombie(pod.guest));
        met.note(&pod.sockets(), pod.launcher.id());
        assert!(strike(root, &met, Whom::Guests).await && is_zombie(pod.guest));
        assert!(strike(root, &met, Whom::Launchers).await && is_zombie(pod.launcher.id()));
    }

    #[tokio::test]
    async fn pods_that_cannot_be_listed_are_not_taken_for_none() {
        let root = tempfile::tempdir().unwrap();
        assert!(strike(root.path(), &Met::default(), Whom::Launchers).await, "there never was one");
        std::fs::write(root.path().join("pods"), "").unwrap();
        assert!(!strike(root.path(), &Met::default(), Whom::Launchers).await);
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
        assert_eq!(kill_then_wait(&[1, 2, 3], kill, gone), [&1]);
        let done = [("kill", 1), ("kill", 2), ("kill", 3), ("wait", 1), ("wait", 2), ("wait", 3)];
        assert_eq!(*log.borrow(), done);
    }

    #[test]
    fn what_a_guest_left_behind_is_not_touched() {
        let pod = Pod::start();
        mark(&pod.sockets(), "default/vm");
        let mut record = Record::prepare(&follow::disks_of(&pod.sockets()).unwrap()).unwrap();
        record.write(&MigrationFacts::new("m", MigrationRole::Source)).unwrap();
        assert!(pod.strike(Whom::Launchers));
        assert!(!is_zombie(pod.guest) && !is_zombie(pod.launcher.id()));
        assert!(fenced(pod.root.path()).is_empty());
    }
}
