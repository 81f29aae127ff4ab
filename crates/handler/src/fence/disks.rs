//! Reading and writing on the disks of pods when time presses. Any of them may hang, and none may hold up the others.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_launcher::fence::now;

/// How long one may take before nobody waits for it any more. It is part of the margin that is left for the kill.
const LIMIT: Duration = Duration::from_secs(2);

/// What is being done on disks; clones are the same one.
#[derive(Clone, Default)]
pub(super) struct Disks(Arc<Mutex<BTreeSet<(&'static str, PathBuf)>>>);

/// What is being done in some folders.
pub(super) struct Doing<T> {
    heard: Receiver<(PathBuf, T)>,
    until: Duration,
}

impl Disks {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<(&'static str, PathBuf)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to do this in each folder, on a thread of its own; not where the last such thing still hangs.
    pub fn each<T: Send + 'static>(
        &self,
        what: &'static str,
        folders: impl Iterator<Item = PathBuf>,
        act: impl Fn(&Path) -> T + Clone + Send + 'static,
    ) -> Doing<T> {
        let (tell, heard) = mpsc::channel();
        for folder in folders {
            let key = (what, folder.clone());
            if !self.lock().insert(key.clone()) {
                tracing::warn!(folder = %folder.display(), "a disk hangs");
                continue;
            }
            let (tell, act, all, done) = (tell.clone(), act.clone(), self.clone(), key.clone());
            let thread = std::thread::Builder::new().name("disk".into()).spawn(move || {
                let found = act(&folder);
                all.lock().remove(&done);
                // Nobody may wait any more.
                let _ = tell.send((folder, found));
            });
            if let Err(error) = thread {
                tracing::warn!(%error, "no thread for a disk");
                self.lock().remove(&key);
            }
        }
        Doing { heard, until: now() + LIMIT }
    }
}

impl<T> Doing<T> {
    /// What came of it, where it does not hang.
    pub fn wait(self) -> BTreeMap<PathBuf, T> {
        let next = || self.heard.recv_timeout(self.until.saturating_sub(now())).ok();
        std::iter::from_fn(next).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_hangs_holds_up_no_other_and_is_left_alone_until_it_goes_on() {
        let disks = Disks::default();
        let (go, wait) = mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        let act = move |folder: &Path| {
            if folder == Path::new("hangs") {
                let _ = wait.lock().unwrap().recv();
            }
            folder.to_owned()
        };
        let folders = || ["hangs", "serves"].into_iter().map(PathBuf::from);
        let only = |name: &str| BTreeMap::from([(PathBuf::from(name), PathBuf::from(name))]);
        let first = disks.each("look", folders(), act.clone());
        assert_eq!(first.heard.recv().unwrap().0, Path::new("serves"));
        let second = disks.each("look", folders(), act.clone());
        assert_eq!(second.wait(), only("serves"), "there is no second one that hangs");
        go.send(()).unwrap();
        assert_eq!(first.heard.recv().unwrap().0, Path::new("hangs"));
        drop(go);
        let third = disks.each("look", [PathBuf::from("hangs")].into_iter(), act);
        assert_eq!(third.heard.recv().unwrap().0, Path::new("hangs"));
    }
}
