//! What a migration costs the machine: bytes over the link and processor time.

use godwit_network::{NETNS_DIR, Namespace};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Error, now_us};

/// Bytes in and out of a link since it was made.
///
/// # Errors
/// No such link.
pub fn link_bytes(namespace: &Namespace, link: &str) -> Result<u64, Error> {
    // /proc/net follows the thread, other than /sys/class/net.
    let table = namespace
        .run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))?
        .map_err(|e| Error::io("read /proc/net/dev", e))?;
    parse_link(&table, link)
        .ok_or_else(|| Error::io(format!("find link {link} in /proc/net/dev"), std::io::ErrorKind::NotFound.into()))
}

fn parse_link(table: &str, link: &str) -> Option<u64> {
    let counters = table.lines().find_map(|line| line.trim_start().strip_prefix(link)?.strip_prefix(':'))?;
    let counters: Vec<u64> = counters.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    // Eight counters of what came in, eight of what went out; the first of each are the bytes.
    Some(counters.first()? + counters.get(8)?)
}

/// Whose processor time counts: everything that lives in some network namespaces, and some processes outside.
#[derive(Clone, Debug)]
pub struct Members {
    /// How the namespaces' names begin.
    pub prefix: String,
    /// Processes outside.
    pub others: Vec<u32>,
}

impl Members {
    fn pids(&self) -> BTreeSet<u32> {
        let inodes: BTreeSet<u64> = Namespace::list(&self.prefix)
            .unwrap_or_default()
            .iter()
            .filter_map(|name| std::fs::metadata(Path::new(NETNS_DIR).join(name)).ok().map(|m| m.ino()))
            .collect();
        let own = std::process::id();
        let inside = std::fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let namespace = std::fs::metadata(entry.path().join("ns/net")).ok()?.ino();
            (pid != own && inodes.contains(&namespace)).then_some(pid)
        });
        inside.chain(self.others.iter().copied()).collect()
    }
}

/// Adds up the processor time of processes, also of those that come and end meanwhile (up to the last look, 50 ms before).
#[derive(Debug)]
pub struct Meter {
    seen: Arc<Mutex<Seen>>,
    members: Members,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

const LOOK_EVERY: Duration = Duration::from_millis(50);

/// By process and its start: ticks at the first look (0 for one that came later), and at the last.
#[derive(Debug, Default)]
struct Seen {
    begun: bool,
    /// When each look was, in microseconds since the Unix epoch, and what was spent by then.
    history: Vec<(i64, u64)>,
    ticks: BTreeMap<(u32, u64), (u64, u64)>,
}

impl Seen {
    fn look(&mut self, at_us: i64, processes: impl Iterator<Item = (u32, u64, u64)>) {
        for (pid, started, ticks) in processes {
            let first = if self.begun { 0 } else { ticks };
            self.ticks.entry((pid, started)).or_insert((first, ticks)).1 = ticks;
        }
        self.begun = true;
        self.history.push((at_us, self.spent()));
    }

    /// By the first look after this moment.
    fn spent_until(&self, at_us: i64) -> u64 {
        let look = self.history.iter().find(|(at, _)| *at >= at_us).or(self.history.last());
        look.map_or(0, |(_, spent)| *spent)
    }

    fn spent(&self) -> u64 {
        self.ticks.values().map(|(first, last)| last.saturating_sub(*first)).sum()
    }
}

impl Meter {
    /// Begins to count.
    ///
    /// # Errors
    /// No more threads.
    pub fn start(members: Members) -> Result<Self, Error> {
        let (seen, stop) = (Arc::new(Mutex::new(Seen::default())), Arc::new(AtomicBool::new(false)));
        look(&members, &seen);
        let (into, told, whose) = (seen.clone(), stop.clone(), members.clone());
        let work = move || {
            while !told.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK_EVERY);
                look(&whose, &into);
            }
        };
        let thread =
            std::thread::Builder::new().name("meter".into()).spawn(work).map_err(|e| Error::io("start a thread", e))?;
        Ok(Self { seen, members, stop, thread: Some(thread) })
    }

    /// Seconds spent from the start until this moment (microseconds since the Unix epoch), or at most 50 ms after it.
    pub fn seconds_until(&self, at_us: i64) -> f64 {
        look(&self.members, &self.seen);
        let ticks = self.seen.lock().unwrap_or_else(PoisonError::into_inner).spent_until(at_us);
        ticks as f64 / ticks_per_second()
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn look(members: &Members, seen: &Mutex<Seen>) {
    let processes: Vec<_> = members.pids().into_iter().filter_map(read).collect();
    seen.lock().unwrap_or_else(PoisonError::into_inner).look(now_us(), processes.into_iter());
}

fn read(pid: u32) -> Option<(u32, u64, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (started, ticks) = parse_stat(&stat)?;
    Some((pid, started, ticks))
}

/// When a process started, and its processor time, both in ticks.
fn parse_stat(stat: &str) -> Option<(u64, u64)> {
    // The name may hold anything, also spaces and brackets.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some((number(19)?, number(11)? + number(12)?))
}

fn ticks_per_second() -> f64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().map_or(100.0, |ticks| ticks as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_of_the_right_link_are_added() {
        let table = "Inter-| Receive | Transmit\n face |bytes packets\n    lo: 1 2 0 0 0 0 0 0 1 2 0 0 0 0 0 0\n  eth0:5000 9 \
                     0 0 0 0 0 0 700 8 0 0 0 0 0 0\n eth01: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(parse_link(table, "eth0"), Some(5700));
        assert_eq!(parse_link(table, "eth1"), None);
    }

    #[test]
    fn a_process_counts_from_the_first_look_and_one_that_comes_later_wholly() {
        let mut seen = Seen::default();
        seen.look(1, [(1, 10, 100)].into_iter());
        seen.look(2, [(1, 10, 107), (2, 50, 3)].into_iter());
        // The first has ended; its number went to another.
        seen.look(3, [(1, 99, 2), (2, 50, 4)].into_iter());
        assert_eq!(seen.spent(), 7 + 4 + 2);
        assert_eq!((seen.spent_until(2), seen.spent_until(9)), (7 + 3, 7 + 4 + 2));
    }

    #[test]
    fn names_with_brackets_do_not_confuse() {
        let stat = "7 (a) b) R 1 7 7 0 -1 4194304 1 0 0 0 250 50 0 0 20 0 1 0 4711 1 1";
        assert_eq!(parse_stat(stat), Some((4711, 300)));
    }

    #[test]
    fn work_that_is_done_is_seen() {
        let mut child = std::process::Command::new("/bin/sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let meter = Meter::start(Members { prefix: "gw-none-such-".into(), others: vec![child.id()] }).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while meter.seconds_until(i64::MAX) < 0.05 && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(meter.seconds_until(i64::MAX) >= 0.05);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
