//! QEMU as a process: finding it, starting it, noticing its end.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

/// The QEMU for x86-64 guests: `$GODWIT_QEMU` if set, else the first in `$PATH` and the usual places.
pub fn find_qemu() -> Option<PathBuf> {
    find("GODWIT_QEMU", &["qemu-system-x86_64", "qemu-kvm"])
}

/// `qemu-img`: `$GODWIT_QEMU_IMG` if set, else the first in `$PATH` and the usual places.
pub fn find_qemu_img() -> Option<PathBuf> {
    find("GODWIT_QEMU_IMG", &["qemu-img"])
}

pub(crate) fn find(variable: &str, names: &[&str]) -> Option<PathBuf> {
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

/// Has the child keep a descriptor, under the same number. Whoever calls sees to it that it is open until the child is started.
fn inherit(command: &mut Command, file: BorrowedFd<'_>) {
    let number = file.as_raw_fd();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; fcntl(2) is a plain system call. The number is
    // open in the child as it is in its parent, which holds it until then.
    unsafe {
        command.pre_exec(move || {
            let file = BorrowedFd::borrow_raw(number);
            nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
            Ok(())
        });
    }
}

/// How many of QEMU's last words are kept to explain its end.
const KEPT_LINES: usize = 40;

/// A QEMU that was started. A task of its own waits for its end; when the last clone of this handle is dropped, it is killed.
#[derive(Clone, Debug)]
pub struct Process {
    pid: u32,
    kill: mpsc::UnboundedSender<()>,
    ended: watch::Receiver<Option<Ended>>,
    said: Said,
}

type Said = Arc<Mutex<VecDeque<String>>>;

/// How a QEMU ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// Starts QEMU with these arguments. What it writes goes to the log, and its last lines are kept. A descriptor that it
    /// keeps has the same number there.
    pub fn spawn(qemu: &Path, arguments: &[String], keeps: Option<BorrowedFd<'_>>) -> std::io::Result<Process> {
        Process::spawn_with(qemu, arguments, Stdio::null(), keeps)
    }

    /// The same for a program that reads something.
    pub(crate) fn spawn_with(
        program: &Path,
        arguments: &[String],
        stdin: Stdio,
        keeps: Option<BorrowedFd<'_>>,
    ) -> std::io::Result<Process> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        die_with_parent(&mut command);
        if let Some(file) = keeps {
            inherit(&mut command, file);
        }
        let mut child = command.spawn()?;
        let pid = child.id().unwrap_or_default();
        let said = Said::default();
        let mut readers = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            readers.push(tokio::spawn(keep(stderr, said.clone())));
        }
        if let Some(stdout) = child.stdout.take() {
            readers.push(tokio::spawn(keep(stdout, said.clone())));
        }
        let (tell, ended) = watch::channel(None);
        let (kill, killed) = mpsc::unbounded_channel();
        tokio::spawn(supervise(child, killed, readers, said.clone(), tell));
        Ok(Process { pid, kill, ended, said })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// Waits until it has ended and was reaped.
    pub async fn wait(&self) -> Ended {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or_default(),
            // The supervising task is gone, and with it the process.
            Err(_) => Ended::default(),
        }
    }

    /// Ends it at once (SIGKILL) and waits until it was reaped.
    pub async fn kill(&self) -> Ended {
        let _ = self.kill.send(());
        self.wait().await
    }

    /// What it wrote last.
    pub fn last_words(&self) -> Vec<String> {
        words(&self.said)
    }
}

async fn supervise(
    mut child: Child,
    mut killed: mpsc::UnboundedReceiver<()>,
    readers: Vec<tokio::task::JoinHandle<()>>,
    said: Said,
    tell: watch::Sender<Option<Ended>>,
) {
    let status = tokio::select! {
        status = child.wait() => status,
        _ = killed.recv() => {
            let _ = child.start_kill();
            child.wait().await
        }
    };
    let status = status.unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot wait for QEMU");
        ExitStatus::default()
    });
    // The pipes end with the process; its last words may still be on their way.
    for reader in readers {
        let _ = tokio::time::timeout(Duration::from_millis(200), reader).await;
    }
    let _ = tell.send(Some(Ended::new(status, words(&said))));
}

fn words(said: &Said) -> Vec<String> {
    said.lock().map(|s| s.iter().cloned().collect()).unwrap_or_default()
}

async fn keep(pipe: impl tokio::io::AsyncRead + Unpin, said: Said) {
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
        let process = Process::spawn(Path::new("/bin/sh"), &arguments, None).unwrap();
        let ended = process.wait().await;
        assert_eq!(ended.code, Some(3));
        assert!(ended.said.contains(&"cannot find disk".to_string()), "{ended:?}");
        assert!(!ended.is_clean());
    }

    #[tokio::test]
    async fn a_killed_process_is_reaped_and_says_so() {
        let process = Process::spawn(Path::new("/bin/sleep"), &["60".to_string()], None).unwrap();
        let ended = process.kill().await;
        assert_eq!(ended.signal, Some(9));
        assert!(ended.to_string().contains("killed"));
        assert!(!Path::new(&format!("/proc/{}", process.pid())).exists());
    }
}
