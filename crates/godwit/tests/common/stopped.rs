//! Processes that stand still.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process that stands still until this is dropped.
pub struct Stopped(Pid);

impl Stopped {
    pub fn stop(pid: Pid) -> Self {
        kill(pid, Signal::SIGSTOP).expect("stop it");
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have ended meanwhile.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}
