//! What a handler leaves to the one that comes after it on this node. While the control plane is away nobody else could tell a
//! handler that has just started for how long it has been, whom it has to ask, and where those are.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_launcher::fence::Clock;
use serde::{Deserialize, Serialize};

use super::rules::{Peers, Rules};

const FILE: &str = "fence.json";

/// What is known of the node's lease and of those who are asked about theirs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kept {
    /// What follows from it.
    pub rules: Rules,
    /// The last revision of the lease that was seen here.
    pub seen: Option<String>,
    /// The nodes that a renewal names.
    pub live: Peers,
    /// Where those and the ones that were named before answer.
    pub addresses: BTreeMap<String, String>,
}

impl Kept {
    /// Nothing is known yet.
    pub fn nothing(now: Duration) -> Self {
        Self { rules: Rules::new(now), seen: None, live: None, addresses: BTreeMap::new() }
    }
}

#[derive(Serialize, Deserialize)]
struct Page {
    /// The times are counted from this boot of the machine,
    boot: String,
    /// by this clock.
    clock: Clock,
    kept: Kept,
}

/// Where it is kept: in memory (tmpfs), so that a disk that hangs stops no renewal.
#[derive(Debug)]
pub struct Book {
    folder: PathBuf,
    boot: String,
    clock: Clock,
}

impl Book {
    /// In this folder, which is made with the first page.
    pub fn new(folder: &Path, clock: Clock) -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { folder: folder.to_owned(), boot: boot.trim().to_owned(), clock }
    }

    /// What a predecessor has left, as long as its guests may run: it wrote this a moment ago. What is older is worth nothing any
    /// more, and says nothing about handlers that kept no such book.
    pub fn read(&self, now: Duration) -> Option<Kept> {
        let page: Page = serde_json::from_slice(&std::fs::read(self.folder.join(FILE)).ok()?).ok()?;
        let ours = page.boot == self.boot && page.clock == self.clock;
        (ours && page.kept.rules.is_held(now)).then_some(page.kept)
    }

    /// Replaces what is kept, wholly or not at all.
    pub fn write(&self, kept: &Kept) -> io::Result<()> {
        let page = Page { boot: self.boot.clone(), clock: self.clock, kept: kept.clone() };
        std::fs::create_dir_all(&self.folder)?;
        let new = self.folder.join("fence.new");
        std::fs::write(&new, serde_json::to_vec(&page)?)?;
        std::fs::rename(new, self.folder.join(FILE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_successor_goes_on_with_what_was_known_while_guests_may_run_and_the_machine_is_up() {
        let folder = tempfile::tempdir().unwrap();
        let book = Book::new(&folder.path().join("node1"), Clock::Boot);
        assert_eq!(book.read(s(0)), None);
        let mut kept = Kept::nothing(s(100));
        kept.rules.answered(s(100), s(101), Some(["b".to_owned()].into()));
        kept.seen = Some("7".to_owned());
        kept.addresses.insert("b".to_owned(), "10.0.0.2:8187".to_owned());
        book.write(&kept).unwrap();
        assert_eq!(book.read(s(119)).as_ref(), Some(&kept));
        assert_eq!(book.read(s(120)), None, "it may be of long ago");
        let differently = Book::new(&folder.path().join("node1"), Clock::Awake);
        assert_eq!(differently.read(s(119)), None, "it counts by another clock");
        let rebooted = Book { boot: "another".to_owned(), ..book };
        assert_eq!(rebooted.read(s(119)), None, "its clock began anew");
    }
}
