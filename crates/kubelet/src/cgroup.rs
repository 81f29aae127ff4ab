//! Control groups: limits of a container, version 2 or 1 (also both at once, as on machines in transition).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";
/// The controllers that are used, by their names in both versions.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];
/// Length of the period in which processor time is given, in microseconds (the kernel's default).
const PERIOD: u64 = 100_000;

/// What a container may use; nothing is limited by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Processor time in thousandths of a processor.
    pub cpu_millis: Option<u64>,
    /// Share of the processors when they are scarce, in thousandths of a processor (`requests.cpu`).
    pub cpu_request_millis: u64,
    /// Number of processes and threads.
    pub pids: Option<u64>,
}

/// A control group, by its path below the root of each hierarchy.
#[derive(Clone, Debug)]
pub struct Group {
    name: PathBuf,
}

impl Group {
    /// Names a group, such as `gw-1a2b3c4d/<pod>/<container>`; makes nothing.
    pub fn new(name: impl Into<PathBuf>) -> Self {
        Self { name: name.into() }
    }

    fn is_v2() -> bool {
        Path::new(ROOT).join("cgroup.controllers").exists()
    }

    fn folders(&self) -> Vec<PathBuf> {
        if Self::is_v2() {
            return vec![Path::new(ROOT).join(&self.name)];
        }
        let hierarchies = CONTROLLERS.iter().map(|controller| Path::new(ROOT).join(controller));
        hierarchies.filter(|path| path.join("cgroup.procs").exists()).map(|path| path.join(&self.name)).collect()
    }

    /// Makes the group with its limits and returns the folders that a process must join (none on a machine without control
    /// groups).
    ///
    /// # Errors
    /// A limit that cannot be set: the container must not run without it.
    pub fn create(&self, limits: &Limits) -> io::Result<Vec<PathBuf>> {
        let folders = self.folders();
        if folders.is_empty() && *limits != Limits::default() {
            tracing::warn!("this machine has no control groups: limits of containers are not enforced");
        }
        for folder in &folders {
            if Self::is_v2() {
                self.delegate();
            }
            fs::create_dir_all(folder)?;
            set(folder, limits)?;
        }
        Ok(folders)
    }

    /// Version 2 gives controllers to a group only if all groups above pass them on.
    fn delegate(&self) {
        let mut folder = PathBuf::from(ROOT);
        for part in self.name.components() {
            for controller in CONTROLLERS {
                // One that is missing shows when its limit is set.
                let _ = fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"));
            }
            folder.push(part);
            let _ = fs::create_dir(&folder);
        }
    }

    /// Kills every process in the group and below.
    pub fn kill(&self) {
        for folder in self.folders() {
            if fs::write(folder.join("cgroup.kill"), "1").is_ok() {
                continue;
            }
            for_each_below(&folder, &mut |group| {
                for line in fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default().lines() {
                    if let Some(pid) = line.parse().ok().filter(|pid| *pid > 0) {
                        let pid = nix::unistd::Pid::from_raw(pid);
                        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
                    }
                }
            });
        }
    }

    /// Removes the group and those below. What still has processes stays.
    pub fn remove(&self) {
        for folder in self.folders() {
            for_each_below(&folder, &mut |group| {
                let _ = fs::remove_dir(group);
            });
        }
    }
}

/// Innermost first.
fn for_each_below(folder: &Path, work: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            for_each_below(&entry.path(), work);
        }
    }
    if folder.exists() {
        work(folder);
    }
}

fn set(folder: &Path, limits: &Limits) -> io::Result<()> {
    let write = |name: &str, value: String| {
        fs::write(folder.join(name), &value)
            .map_err(|e| io::Error::new(e.kind(), format!("set {name}={value} in {}: {e}", folder.display())))
    };
    // The files of the other version, and of other hierarchies, are not there.
    let has = |name: &str| folder.join(name).exists();
    if let Some(bytes) = limits.memory_bytes {
        if has("memory.max") {
            write("memory.max", bytes.to_string())?;
            if has("memory.swap.max") {
                write("memory.swap.max", "0".into())?;
            }
        } else if has("memory.limit_in_bytes") {
            write("memory.limit_in_bytes", bytes.to_string())?;
        }
    }
    if let Some(millis) = limits.cpu_millis {
        // Less than a millisecond a period is refused by the kernel.
        let quota = (millis * PERIOD / 1000).max(1000);
        if has("cpu.max") {
            write("cpu.max", format!("{quota} {PERIOD}"))?;
        } else if has("cpu.cfs_quota_us") {
            write("cpu.cfs_period_us", PERIOD.to_string())?;
            write("cpu.cfs_quota_us", quota.to_string())?;
        }
    }
    let shares = (limits.cpu_request_millis * 1024 / 1000).clamp(2, 262_144);
    if has("cpu.weight") {
        // The conversion that container runtimes agree on: [2, 262144] to [1, 10000].
        write("cpu.weight", (1 + (shares - 2) * 9999 / 262_142).to_string())?;
    } else if has("cpu.shares") {
        write("cpu.shares", shares.to_string())?;
    }
    if let Some(pids) = limits.pids.filter(|_| has("pids.max")) {
        write("pids.max", pids.to_string())?;
    }
    Ok(())
}
