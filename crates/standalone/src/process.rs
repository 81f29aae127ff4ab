//! The cluster's processes: started detached with a log and a pid record, found again, and ended by pid only.

use crate::Error;
use crate::layout::{Layout, write_atomically};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A running process, told from a later one with the same number by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Process number.
    pub pid: i32,
    /// Clock ticks since boot at which it started (`/proc/PID/stat`, field 22).
    pub started: u64,
}

impl Process {
    /// The process with this number, if there is one that has not ended.
    pub fn of(pid: i32) -> Option<Self> {
        Self::read(Path::new("/proc"), pid)
    }

    fn read(proc: &Path, pid: i32) -> Option<Self> {
        let folder = proc.join(pid.to_string());
        let (over, started) = stat(&folder)?;
        // Its first thread is a zombie as soon as that one has ended; files and sockets stay open until the last has.
        let lives = || {
            let threads = std::fs::read_dir(folder.join("task")).into_iter().flatten().flatten();
            threads.filter_map(|thread| stat(&thread.path())).any(|(over, _)| !over)
        };
        (!over || lives()).then_some(Self { pid, started })
    }

    /// Whether it still runs, or some of it: only afterwards its files and sockets are free.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Whether it has been killed and is not gone yet.
    fn is_ending(self, proc: &Path) -> bool {
        let folder = proc.join(self.pid.to_string());
        if stat(&folder).is_some_and(|(over, _)| over) {
            return true;
        }
        let status = std::fs::read_to_string(folder.join("status")).unwrap_or_default();
        let sets = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
        sets.filter_map(|set| u64::from_str_radix(set.trim(), 16).ok()).any(|set| set & KILLED != 0)
    }

    /// Sends it a signal, unless it has ended.
    pub fn signal(self, signal: Signal) {
        if self.is_alive() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// SIGKILL in the sets of pending signals of `/proc/PID/status`.
const KILLED: u64 = 1 << (Signal::SIGKILL as u64 - 1);

/// Whether a process or thread is over, and when it started.
fn stat(folder: &Path) -> Option<(bool, u64)> {
    let stat = std::fs::read_to_string(folder.join("stat")).ok()?;
    // The command name may hold anything, also spaces and brackets: count from behind it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    Some((matches!(state, "Z" | "X"), fields.nth(18)?.parse().ok()?))
}

/// Waits until the recorded process called `name` is gone, if it has been killed: a successor needs its port and files.
///
/// # Errors
/// It is still there after ten seconds.
pub async fn settled(layout: &Layout, name: &str) -> Result<(), Error> {
    let deadline = Instant::now() + GONE_WITHIN;
    while let Some(process) = find(layout, name).filter(|process| process.is_ending(Path::new("/proc"))) {
        if Instant::now() > deadline {
            return Err(Error::Ending { process: name.to_owned(), pid: process.pid, seconds: GONE_WITHIN.as_secs() });
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// How long a killed process may take to be gone: the kernel first takes back its memory and closes its files.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// Starts `godwit <arguments>` as a detached process called `name`, with its output in the name's log.
pub fn start(layout: &Layout, name: &str, arguments: &[String]) -> Result<Process, Error> {
    let program = std::env::current_exe().map_err(|e| Error::io("find", Path::new("/proc/self/exe"), e))?;
    let log = layout.log(name);
    if let Some(folder) = log.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::io("create directory", folder, e))?;
    }
    let output = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .map_err(|source| Error::io("open", &log, source))?;
    let errors = output.try_clone().map_err(|source| Error::io("open", &log, source))?;
    // A group of its own: Ctrl-C in the terminal of `godwit up` must not reach it.
    let mut child = Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .process_group(0)
        .spawn()
        .map_err(|source| Error::io("start", &program, source))?;
    let pid = i32::try_from(child.id()).unwrap_or(0);
    // Collects the exit status as long as we live, so that a dead child is not taken for a running one.
    std::thread::spawn(move || child.wait());
    let process = Process::of(pid).ok_or_else(|| died(layout, name))?;
    write_atomically(&layout.pid(name), format!("{} {}\n", process.pid, process.started).as_bytes(), 0o644)?;
    Ok(process)
}

/// The recorded process called `name`, if it still runs.
pub fn find(layout: &Layout, name: &str) -> Option<Process> {
    let record = std::fs::read_to_string(layout.pid(name)).ok()?;
    let (pid, started) = record.trim().split_once(' ')?;
    let process = Process { pid: pid.parse().ok()?, started: started.parse().ok()? };
    process.is_alive().then_some(process)
}

/// The error that tells what a dead process said last.
pub fn died(layout: &Layout, name: &str) -> Error {
    failed(layout, name, "ended")
}

/// The error about process `name` which `what`, with the end of its log.
pub fn failed(layout: &Layout, name: &str, what: &str) -> Error {
    let log = layout.log(name);
    let text = std::fs::read(&log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(8)..].iter().map(|line| format!("  {line}\n")).collect();
    Error::Process { process: name.to_owned(), what: what.to_owned(), log, tail }
}

/// All processes that live in one of the network namespaces with this prefix.
pub fn inside_namespaces(prefix: &str) -> Vec<Process> {
    let inodes: BTreeSet<u64> = std::fs::read_dir(godwit_network::NETNS_DIR)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .filter_map(|entry| std::fs::metadata(entry.path()).ok().map(|m| m.ino()))
        .collect();
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let namespace = std::fs::metadata(entry.path().join("ns/net")).map(|m| m.ino());
        if pid != own
            && namespace.is_ok_and(|inode| inodes.contains(&inode))
            && let Some(process) = Process::of(pid)
        {
            found.push(process);
        }
    }
    found
}

/// Asks the processes to end, and after `grace` makes them.
pub fn end(processes: &[Process], grace: Duration) {
    for process in processes {
        process.signal(Signal::SIGTERM);
    }
    let deadline = Instant::now() + grace;
    while processes.iter().any(|p| p.is_alive()) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    for process in processes {
        process.signal(Signal::SIGKILL);
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while processes.iter().any(|p| p.is_alive()) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_its_successor() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(process.is_alive());
        assert!(!Process { started: process.started + 1, ..process }.is_alive());
        let waiter = std::thread::spawn(move || child.wait());
        end(&[process], Duration::from_secs(5));
        waiter.join().unwrap().unwrap();
        assert!(!process.is_alive());
    }

    /// A thread or process as `/proc` has it.
    fn task(folder: &Path, state: &str, pending: &str) {
        std::fs::create_dir_all(folder).unwrap();
        let middle = ["0"; 18].join(" ");
        std::fs::write(folder.join("stat"), format!("7 (a) b) {state} {middle} 4711 0 0\n")).unwrap();
        std::fs::write(folder.join("status"), format!("Name:\ta\nSigPnd:\t{pending}\nShdPnd:\t0000000000000000\n"))
            .unwrap();
    }

    #[test]
    fn a_killed_process_lives_until_its_last_thread_has_ended() {
        let proc = tempfile::tempdir().unwrap();
        let (folder, none) = (proc.path().join("7"), "0000000000000000");
        let found = || Process::read(proc.path(), 7);
        assert_eq!(found(), None);
        task(&folder, "S", none);
        task(&folder.join("task/7"), "S", none);
        task(&folder.join("task/8"), "S", none);
        let process = Process { pid: 7, started: 4711 };
        assert_eq!(found(), Some(process));
        assert!(!process.is_ending(proc.path()));
        task(&folder, "S", "0000000000000100");
        assert_eq!(found(), Some(process));
        assert!(process.is_ending(proc.path()), "it has been told to");
        task(&folder, "Z", none);
        task(&folder.join("task/7"), "Z", none);
        assert_eq!(found(), Some(process), "its second thread may hold its port");
        assert!(process.is_ending(proc.path()));
        task(&folder.join("task/8"), "X", none);
        assert_eq!(found(), None);
    }
}
