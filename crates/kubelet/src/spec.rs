//! What passes between the kubelet and the shim of a container: files in the container's folder.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The file with the [`ContainerSpec`].
pub const SPEC: &str = "spec.json";
/// The file with the [`Running`] of the current attempt.
pub const STATE: &str = "state.json";
/// The file with the [`Exit`] of the current attempt.
pub const EXIT: &str = "exit.json";
/// The container's output, in the format of the CRI: `<time> stdout|stderr F|P <line>`.
pub const LOG: &str = "log";
/// What the container writes to `/dev/termination-log`.
pub const TERMINATION_LOG: &str = "termination-log";
/// Added to [`LOG`] and [`EXIT`] of the attempt before the current one.
pub const PREVIOUS: &str = ".previous";

/// Everything a shim has to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Unique in the cluster: pod, container, attempt.
    pub id: String,
    /// Counts the starts of this container, from 0.
    pub attempt: u32,
    /// The container's folder, absolute.
    pub folder: PathBuf,
    /// What it sees as `/`.
    pub root: Root,
    /// Whether `/` cannot be written.
    pub read_only_root: bool,
    /// Host name.
    pub hostname: String,
    /// The pod's network namespace; none for the node's own.
    pub network: Option<PathBuf>,
    /// Whether it sees the node's processes.
    pub host_pid: bool,
    /// Program and arguments.
    pub args: Vec<String>,
    /// The environment.
    pub env: Vec<(String, String)>,
    /// Working directory, absolute.
    pub cwd: String,
    /// User and group, as the pod or else the image says: `uid[:gid]`, or names known in the image.
    pub user: String,
    /// Group, if the pod says one.
    pub group: Option<u32>,
    /// Additional groups.
    pub groups: Vec<u32>,
    /// What is mounted, in this order.
    pub mounts: Vec<Mount>,
    /// Block devices that it has.
    #[serde(default)]
    pub devices: Vec<Mount>,
    /// Loop devices among them, which the shim holds.
    #[serde(default)]
    pub loops: Vec<Loop>,
    /// Control group folders that it joins.
    pub cgroups: Vec<PathBuf>,
    /// Linux capabilities by number; `None` keeps all (privileged).
    pub capabilities: Option<Vec<u8>>,
    /// Whether system calls that reach beyond a container are refused (seccomp profile `RuntimeDefault`); never where it is privileged.
    #[serde(default)]
    pub runtime_seccomp: bool,
    /// Whether programs with setuid bits gain nothing.
    pub no_new_privileges: bool,
    /// Where [`TERMINATION_LOG`] is mounted in it.
    pub termination_log: String,
}

/// What a container sees as `/`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Root {
    /// The node's own system, read-only, with `binary` at `/usr/bin/godwit`.
    Host {
        /// The godwit binary.
        binary: PathBuf,
    },
    /// An unpacked image below a layer of the container's own.
    Image {
        /// The unpacked image.
        lower: PathBuf,
    },
}

/// A folder, file or device of the node that a container sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Where it is on the node.
    pub source: PathBuf,
    /// Absolute path in the container.
    pub target: String,
    /// Whether it cannot be written there.
    pub read_only: bool,
}

/// A loop device, and the file that must be behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loop {
    /// The device.
    pub device: PathBuf,
    /// The file.
    pub file: PathBuf,
}

/// A process, told apart from later ones with the same number by its start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process number.
    pub pid: i32,
    /// Start time in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start: u64,
}

impl Process {
    /// The process with that number, if it runs.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything; what follows the last one is fixed.
        let rest = stat.rsplit_once(')')?.1;
        let mut fields = rest.split_ascii_whitespace();
        if matches!(fields.next()?, "Z" | "X") {
            return None;
        }
        Some(Self { pid, start: fields.nth(18)?.parse().ok()? })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }
}

/// A container that has been started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Running {
    /// Which start this is.
    pub attempt: u32,
    /// The shim.
    pub shim: Process,
    /// The container's first process.
    pub main: Process,
    /// When it was started, RFC 3339.
    pub started_at: String,
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exit {
    /// Which start this is.
    pub attempt: u32,
    /// Exit status; 128 + signal if killed by one, 128 if it could not be started.
    pub exit_code: i32,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`.
    pub reason: String,
    /// More, in words.
    pub message: Option<String>,
    /// When it was started, RFC 3339; none if it could not be.
    pub started_at: Option<String>,
    /// When it ended, RFC 3339.
    pub finished_at: String,
}

/// What a shim says on its standard output: one line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Started {
    /// The program runs.
    Running(Running),
    /// It could not be started.
    Failed(String),
}

/// Reads one of the files above; `None` if it is not there or unreadable (half-written files never are: they are renamed
/// into place).
pub fn read<T: serde::de::DeserializeOwned>(folder: &Path, name: &str) -> Option<T> {
    serde_json::from_slice(&std::fs::read(folder.join(name)).ok()?).ok()
}

/// Writes one of the files above, whole or not at all.
///
/// # Errors
/// As the file system says.
pub fn write<T: Serialize>(folder: &Path, name: &str, value: &T) -> std::io::Result<()> {
    let temporary = folder.join(format!(".{name}.new"));
    std::fs::write(&temporary, serde_json::to_vec(value)?)?;
    std::fs::rename(temporary, folder.join(name))
}

/// Now, as it is written in API objects.
pub fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
