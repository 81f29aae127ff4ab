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
    fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name may hold anything, also spaces and brackets: count from behind it.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok()?;
        (state != "Z" && state != "X").then_some(Self { pid, started })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    fn signal(self, signal: Signal) {
        if self.is_alive() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

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
}
