//! QEMU as a process: finding it, starting it, noticing its end.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// The QEMU for x86-64 guests: `$GODWIT_QEMU` if set, else the first in `$PATH` and the usual places.
pub fn find_qemu() -> Option<PathBuf> {
    find("GODWIT_QEMU", &["qemu-system-x86_64", "qemu-kvm"])
}

/// `qemu-img`: `$GODWIT_QEMU_IMG` if set, else the first in `$PATH` and the usual places.
pub fn find_qemu_img() -> Option<PathBuf> {
    find("GODWIT_QEMU_IMG", &["qemu-img"])
}

fn find(variable: &str, names: &[&str]) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/usr/local/bin", "/usr/libexec"].map(PathBuf::from);
    let folders: Vec<PathBuf> = std::env::split_paths(&path).chain(usual).collect();
    names.iter().find_map(|name| folders.iter().map(|f| f.join(name)).find(|p| p.is_file()))
}

/// Has the kernel kill the child when the thread that starts it ends, so that no QEMU outlives its launcher, however that dies.
pub(crate) fn die_with_parent(command: &mut Command) {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; prctl(2) is a plain system call.
    unsafe {
        command.pre_exec(|| nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(Into::into));
    }
}

/// How many of QEMU's last words are kept to explain its end.
const KEPT_LINES: usize = 40;

/// A running QEMU. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pid: u32,
    said: Arc<Mutex<VecDeque<String>>>,
    readers: Vec<tokio::task::JoinHandle<()>>,
}

/// How a QEMU ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// The last lines it wrote.
    pub said: Vec<String>,
}

impl Ended {
    fn new(status: ExitStatus, said: Vec<String>) -> Self {
        use std::os::unix::process::ExitStatusExt;
        Ended { code: status.code(), signal: status.signal(), said }
    }

    /// Whether it ended as a QEMU does that was told to quit or whose guest powered off.
    pub fn is_clean(&self) -> bool {
        self.code == Some(0)
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code, self.signal) {
            (_, Some(9)) => f.write_str("QEMU was killed (signal 9: by someone, or for want of memory)")?,
            (_, Some(signal)) => write!(f, "QEMU was ended by signal {signal}")?,
            (Some(code), _) => write!(f, "QEMU exited with status {code}")?,
            (None, None) => f.write_str("QEMU ended")?,
        }
        if let Some(last) = self.said.last() {
            write!(f, "; its last words: {last}")?;
        }
        Ok(())
    }
}

impl Process {
    /// Starts QEMU with these arguments. What it writes goes to the log, and its last lines are kept.
    pub fn spawn(qemu: &Path, arguments: &[String]) -> std::io::Result<Process> {
        let mut command = Command::new(qemu);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        die_with_parent(&mut command);
        let mut child = command.spawn()?;
        let pid = child.id().unwrap_or_default();
        let said = Arc::new(Mutex::new(VecDeque::new()));
        let mut readers = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            readers.push(tokio::spawn(keep(stderr, said.clone())));
        }
        if let Some(stdout) = child.stdout.take() {
            readers.push(tokio::spawn(keep(stdout, said.clone())));
        }
        Ok(Process { child, pid, said, readers })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end and reaps it. May be called again, and may be dropped half-way.
    pub async fn wait(&mut self) -> Ended {
        let status = match self.child.wait().await {
            Ok(status) => status,
            Err(error) => {
                tracing::warn!(pid = self.pid, %error, "cannot wait for QEMU");
                ExitStatus::default()
            }
        };
        // The pipes end with the process; the last words may still be on their way.
        for reader in self.readers.drain(..) {
            let _ = tokio::time::timeout(std::time::Duration::from_millis(200), reader).await;
        }
        Ended::new(status, self.last_words())
    }

    /// Ends it at once (SIGKILL) and reaps it.
    pub async fn kill(&mut self) -> Ended {
        let _ = self.child.start_kill();
        self.wait().await
    }

    /// What it wrote last.
    pub fn last_words(&self) -> Vec<String> {
        self.said.lock().map(|s| s.iter().cloned().collect()).unwrap_or_default()
    }
}

async fn keep(pipe: impl tokio::io::AsyncRead + Unpin, said: Arc<Mutex<VecDeque<String>>>) {
    let mut lines = BufReader::new(pipe).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        let line = String::from_utf8_lossy(&line).trim_end().to_string();
        tracing::info!(target: "qemu", "{line}");
        if let Ok(mut said) = said.lock() {
            if said.len() == KEPT_LINES {
                said.pop_front();
            }
            said.push_back(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_is_told_with_the_last_words() {
        let arguments = ["-c".to_string(), "echo first; echo cannot find disk >&2; exit 3".to_string()];
        let mut process = Process::spawn(Path::new("/bin/sh"), &arguments).unwrap();
        let ended = process.wait().await;
        assert_eq!(ended.code, Some(3));
        assert!(ended.said.contains(&"cannot find disk".to_string()), "{ended:?}");
        assert!(!ended.is_clean());
    }

    #[tokio::test]
    async fn a_killed_process_is_reaped_and_says_so() {
        let mut process = Process::spawn(Path::new("/bin/sleep"), &["60".to_string()]).unwrap();
        let ended = process.kill().await;
        assert_eq!(ended.signal, Some(9));
        assert!(ended.to_string().contains("killed"));
        assert!(!Path::new(&format!("/proc/{}", process.pid())).exists());
    }
}
