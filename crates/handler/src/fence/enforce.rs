//! Killing guests from outside: the launcher may hang, or be too old to do it itself.
//!
//! What is looked at is the node's own: the folders of its pods, the sockets in them and `/proc`. The API may be away, and a
//! handler that has just started knows nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
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

/// The `sockets` volumes of the node's pods that have a launcher's socket, with the pod's UID.
fn launchers(kubelet_root: &Path) -> Vec<(String, PathBuf)> {
    let pods = std::fs::read_dir(kubelet_root.join("pods")).into_iter().flatten().flatten();
    let uids = pods.filter_map(|entry| entry.file_name().into_string().ok());
    let found = uids.map(|uid| {
        let folder = SocketDir::path_of(kubelet_root, &uid);
        (uid, folder)
    });
    found.filter(|(_, folder)| folder.is_dir()).collect()
}

/// The pods on this node whose guest was fenced, by UID, and what the guest is called.
#[must_use]
pub fn fenced(kubelet_root: &Path) -> BTreeMap<String, String> {
    let fenced = |(uid, folder): (String, PathBuf)| {
        fence::read(&follow::disks_of(&folder)?)?;
        let guest = std::fs::read_to_string(folder.join(MARK)).ok().filter(|guest| !guest.is_empty());
        Some((uid.clone(), guest.unwrap_or_else(|| format!("the guest of pod {uid}"))))
    };
    launchers(kubelet_root).into_iter().filter_map(fenced).collect()
}

/// A launcher: its pod's UID, its `sockets` volume, its process.
type Found = (String, PathBuf, u32);

/// Kills what may not run any more and waits until it is dead. Whether nothing is left that should be.
pub async fn strike(kubelet_root: &Path, whom: Whom) -> bool {
    let mut found = Vec::new();
    for (uid, folder) in launchers(kubelet_root) {
        if let Some(pid) = follow::peer(&folder).await {
            found.push((uid, folder, pid));
        }
    }
    // A test's launchers are in this very process.
    found.retain(|(_, _, pid)| *pid != std::process::id());
    tokio::task::spawn_blocking(move || strike_these(&found, whom)).await.unwrap_or(false)
}

fn strike_these(found: &[Found], whom: Whom) -> bool {
    let mut all = true;
    for (uid, folder, launcher) in found {
        if whom == Whom::Guests && !folder.join(MARK).exists() {
            continue;
        }
        let Some(disks) = follow::disks_of(folder) else { continue };
        // What is left of a guest that has gone elsewhere runs nothing, and the guest may need it.
        if record::read_departed(&disks).is_ok_and(|facts| facts.is_some()) {
            continue;
        }
        all &= end(uid, *launcher, &disks, whom);
    }
    all
}

fn end(pod: &str, launcher: u32, disks: &Path, whom: Whom) -> bool {
    let mut victims: Vec<(u32, Victim)> = Vec::new();
    for child in children(launcher) {
        // The number may be another one's by now.
        if let Ok(victim) = Victim::open(child)
            && parent(child) == Some(launcher)
        {
            victims.push((child, victim));
        }
    }
    if !victims.is_empty() {
        tracing::error!(pod, launcher, children = victims.len(), "the node's lease has passed: killing a guest");
        fence::write_down(disks, REASON);
    }
    victims.iter().for_each(|(_, victim)| victim.kill());
    let mut all = true;
    for (pid, victim) in &victims {
        if !victim.is_gone_within(GONE_WITHIN) {
            tracing::error!(pod, pid, "a guest that was killed is not dead: the kernel does not let go of it");
            all = false;
        }
    }
    // Only then: its end would end them as well, but nobody could be sure.
    if whom == Whom::Launchers
        && let Ok(victim) = Victim::open(launcher)
    {
        victim.kill();
        all &= victim.is_gone_within(GONE_WITHIN);
    }
    all
}

fn children(of: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| parent(*pid) == Some(of) && !is_zombie(*pid)).collect()
}

/// The fields of `/proc/<pid>/stat` after the name, which may contain anything.
fn stat(pid: u32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(text.rsplit_once(") ")?.1.to_owned())
}

fn parent(pid: u32) -> Option<u32> {
    stat(pid)?.split(' ').nth(1)?.parse().ok()
}

fn is_zombie(pid: u32) -> bool {
    stat(pid).is_none_or(|stat| stat.starts_with(['Z', 'X']))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use godwit_launcher::record::Record;
    use godwit_launcher::rpc::{MigrationFacts, MigrationRole};

    use super::*;

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
                let stopped = stat(launcher.id()).is_some_and(|stat| stat.starts_with('T'));
                match children(launcher.id()).first() {
                    Some(guest) if stopped => break *guest,
                    _ => std::thread::yield_now(),
                }
            };
            Self { root, launcher, guest }
        }

        fn strike(&self, whom: Whom) -> bool {
            strike_these(&[("uid".to_owned(), self.sockets(), self.launcher.id())], whom)
        }
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
