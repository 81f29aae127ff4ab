//! Starting shims, waiting for their end, ending containers.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, BufReader, Interest};

use crate::cgroup::Group;
use crate::spec::{self, ContainerSpec, EXIT, Exit, LOG, PREVIOUS, Process, Running, SPEC, STATE, Started};

/// What the container's folder says of its last attempt.
pub(crate) enum Recorded {
    /// Never started.
    Nothing,
    /// Runs.
    Running(Running),
    /// Has ended.
    Ended(Exit),
}

/// Looks at a container's folder. An attempt whose shim is gone without a word counts as ended.
pub(crate) fn recorded(folder: &Path) -> Recorded {
    let Some(spec) = spec::read::<ContainerSpec>(folder, SPEC) else { return Recorded::Nothing };
    let ended = |folder: &Path| spec::read::<Exit>(folder, EXIT).filter(|exit| exit.attempt == spec.attempt);
    if let Some(exit) = ended(folder) {
        return Recorded::Ended(exit);
    }
    let running = spec::read::<Running>(folder, STATE).filter(|running| running.attempt == spec.attempt);
    if let Some(running) = &running
        && running.shim.is_alive()
    {
        return Recorded::Running(running.clone());
    }
    // It may have ended between the two looks.
    if let Some(exit) = ended(folder) {
        return Recorded::Ended(exit);
    }
    let exit = lost(spec.attempt, running.map(|running| running.started_at));
    let _ = spec::write(folder, EXIT, &exit);
    Recorded::Ended(exit)
}

/// The end of a container of which nobody has seen the end.
pub(crate) fn lost(attempt: u32, started_at: Option<String>) -> Exit {
    Exit {
        attempt,
        exit_code: 137,
        signal: None,
        reason: "ContainerStatusUnknown".into(),
        message: Some(
            "The container could not be located: its supervisor ended, or the machine was started anew".into(),
        ),
        started_at,
        finished_at: spec::now(),
    }
}

/// Starts a container under a shim. `Err` is the reason in words; its exit is written down all the same.
pub(crate) async fn start(godwit: &Path, spec: &ContainerSpec) -> Result<Running, String> {
    let folder = &spec.folder;
    for name in [LOG, EXIT] {
        let _ = std::fs::rename(folder.join(name), folder.join(format!("{name}{PREVIOUS}")));
    }
    spec::write(folder, SPEC, spec).map_err(|e| format!("write {SPEC}: {e}"))?;
    let shim_log = std::fs::File::create(folder.join("shim.log")).map_err(|e| format!("make shim.log: {e}"))?;
    let mut command = tokio::process::Command::new(godwit);
    command.arg("shim").arg(folder).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(shim_log);
    // A group of its own: signals to the kubelet's (Ctrl-C) are not for it.
    command.process_group(0).kill_on_drop(false);
    let mut child = command.spawn().map_err(|e| format!("start {}: {e}", godwit.display()))?;
    let stdout = child.stdout.take().ok_or("no pipe from the shim")?;
    // Reaps it when it ends, as long as this process lives.
    tokio::spawn(async move { child.wait().await });
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).await.map_err(|e| format!("listen to the shim: {e}"))?;
    match serde_json::from_str(&line) {
        Ok(Started::Running(running)) => Ok(running),
        Ok(Started::Failed(reason)) => Err(reason),
        Err(_) => Err(format!("the shim ended without a word, see {}", folder.join("shim.log").display())),
    }
}

/// Waits until a process, which need not be a child, has ended.
pub(crate) async fn ended(process: Process) {
    match crate::shim::pidfd(process) {
        Ok(None) => return,
        Ok(Some(fd)) => {
            // SAFETY: an owned descriptor stays open for as long as the wrapper has it.
            if let Ok(fd) = unsafe { AsyncFd::<OwnedFd>::register_with_interest(fd, Interest::READABLE) } {
                let _ = fd.readable().await;
                return;
            }
        }
        Err(_) => {}
    }
    // No pidfd (a very old kernel): look now and then.
    while process.is_alive() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits for the end of a running container and tells how it ended.
pub(crate) async fn exit_of(folder: &Path, running: &Running) -> Exit {
    ended(running.shim).await;
    match recorded(folder) {
        Recorded::Ended(exit) => exit,
        _ => lost(running.attempt, Some(running.started_at.clone())),
    }
}

/// Sends a signal to a container's first process, if it still is that process.
pub(crate) fn signal(running: &Running, signal: Signal) {
    if running.main.start == 0 || running.main.is_alive() {
        let _ = kill(Pid::from_raw(running.main.pid), signal);
    }
}

/// Ends a container: asks, waits for `grace`, then kills all of it.
pub(crate) async fn stop(
    folder: &Path,
    running: &Running,
    group: &Group,
    stop_signal: Signal,
    grace: impl Future<Output = ()>,
) -> Exit {
    signal(running, stop_signal);
    let end = exit_of(folder, running);
    tokio::pin!(end);
    tokio::select! {
        exit = &mut end => return exit,
        () = grace => {}
    }
    signal(running, Signal::SIGKILL);
    group.kill();
    match tokio::time::timeout(Duration::from_secs(10), &mut end).await {
        Ok(exit) => exit,
        Err(_) => {
            // Something holds the output open outside the container's process namespace; the shim is no longer needed.
            let _ = kill(Pid::from_raw(running.shim.pid), Signal::SIGKILL);
            lost(running.attempt, Some(running.started_at.clone()))
        }
    }
}
