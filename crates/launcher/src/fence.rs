//! The end of a guest whose node may not run it any more (docs/fencing.md).
//!
//! The handler tells until when the guest may run, by the clock that also counts while the machine sleeps. A thread of its own
//! waits for that moment, so that nothing that hangs in this process keeps it from killing QEMU. It sleeps in the kernel until
//! then, and a process that was stopped meanwhile kills as soon as it goes on.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What is written down of a guest that was fenced, beside its ephemeral disks.
const RECORD: &str = "fenced.json";
/// Why a launcher says that its guest has ended.
pub const REASON: &str = "Fenced: its node could not renew its lease in time, so the guest was killed before it may be \
                          started elsewhere";

/// `CLOCK_BOOTTIME`: the time since this machine's start, its sleep included. The same for all its processes.
#[must_use]
pub fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or(Duration::MAX)
}

/// A process to be killed, held so that its number cannot become another one's.
#[derive(Debug)]
pub struct Victim {
    fd: OwnedFd,
}

impl Victim {
    /// The process of this number.
    ///
    /// # Errors
    /// `ESRCH` when there is none.
    pub fn open(pid: u32) -> std::io::Result<Victim> {
        // SAFETY: takes integers; the result is checked and owned right away.
        let fd = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let fd = i32::try_from(fd).map_err(std::io::Error::other)?;
        // SAFETY: a descriptor that was just made and that nobody else owns.
        Ok(Victim { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Kills it (SIGKILL): one that is stopped as well.
    pub fn kill(&self) {
        let (fd, signal) = (self.fd.as_raw_fd(), nix::libc::SIGKILL);
        // SAFETY: an open descriptor, integers, and no information with the signal, which is allowed. That it has ended is no error.
        unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<u8>(), 0) };
    }

    /// Waits until all of it has ended; whether it has.
    pub fn is_gone_within(&self, limit: Duration) -> bool {
        let end = now() + limit;
        loop {
            let left = end.saturating_sub(now());
            let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], wait) {
                Ok(0) if left.is_zero() => return false,
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return true,
                Err(_) => return false,
            }
        }
    }
}

/// That a guest was fenced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fenced {
    /// When, milliseconds since the Unix epoch by this host's clock.
    pub at_ms: i64,
    /// Who killed it, in a sentence.
    pub reason: String,
}

/// Writes down that the guest of this pod was fenced: its launcher may not live to tell.
pub fn write_down(ephemeral_disks: &Path, reason: &str) {
    let fenced = Fenced { at_ms: jiff::Timestamp::now().as_millisecond(), reason: reason.to_owned() };
    let written = serde_json::to_vec(&fenced)
        .map_err(std::io::Error::from)
        .and_then(|bytes| std::fs::write(ephemeral_disks.join(RECORD), bytes));
    if let Err(error) = written {
        tracing::warn!(%error, "that the guest was fenced could not be written down");
    }
}

/// What was written down of it, if it was fenced.
#[must_use]
pub fn read(ephemeral_disks: &Path) -> Option<Fenced> {
    serde_json::from_slice(&std::fs::read(ephemeral_disks.join(RECORD)).ok()?).ok()
}

#[derive(Debug, Default)]
struct Held {
    /// Until when the guest may run; none when nobody has said so.
    until: Option<Duration>,
    victim: Option<Victim>,
    struck: bool,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    held: Mutex<Held>,
    timer: TimerFd,
    ephemeral_disks: PathBuf,
}

/// The fence of one launcher; clones are the same one.
#[derive(Clone, Debug)]
pub struct Fence(Arc<Shared>);

/// Keeps the fence's thread; it ends with this.
#[derive(Debug)]
pub struct Watchdog(Fence);

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.wake_at(Duration::from_nanos(1));
    }
}

impl Watchdog {
    /// Starts to watch. Nothing happens before somebody has said until when the guest may run.
    ///
    /// # Errors
    /// When the system has no timer or thread to give.
    pub fn start(ephemeral_disks: PathBuf) -> std::io::Result<Watchdog> {
        let timer = TimerFd::new(timerfd::ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC)?;
        let fence = Fence(Arc::new(Shared { held: Mutex::default(), timer, ephemeral_disks }));
        let watched = fence.clone();
        std::thread::Builder::new().name("fence".into()).stack_size(128 * 1024).spawn(move || watched.watch())?;
        Ok(Watchdog(fence))
    }

    /// The fence.
    #[must_use]
    pub fn fence(&self) -> Fence {
        self.0.clone()
    }
}

impl Fence {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_at(&self, at: Duration) {
        let at = Expiration::OneShot(at.max(Duration::from_nanos(1)).into());
        if let Err(error) = self.0.timer.set(at, TimerSetTimeFlags::TFD_TIMER_ABSTIME) {
            tracing::error!(%error, "the fence's timer cannot be set");
        }
    }

    /// The guest may run until then ([`now`]'s clock). What was allowed before is not taken back, and a guest that was killed
    /// gets nothing any more.
    pub fn run_until(&self, until: Duration) {
        let mut held = self.lock();
        // Whoever comes too late finds it passed, even where the thread has not been woken yet.
        self.strike_if_due(&mut held);
        if held.until.is_none_or(|known| known < until) {
            held.until = Some(until);
            self.wake_at(until);
        }
    }

    /// This process is the guest's from now on. Too late, it is killed at once.
    pub fn guard(&self, pid: u32) {
        let mut held = self.lock();
        match Victim::open(pid) {
            Ok(victim) => held.victim = Some(victim),
            Err(error) => tracing::error!(%error, pid, "the guest's process cannot be watched"),
        }
        self.strike_if_due(&mut held);
    }

    /// It is not any more: it has ended, or will never run the guest again.
    pub fn release(&self) {
        self.lock().victim = None;
    }

    /// Whether a guest was killed by this.
    #[must_use]
    pub fn has_struck(&self) -> bool {
        self.lock().struck
    }

    /// Whether a guest may be run now.
    #[must_use]
    pub fn allows(&self) -> bool {
        let held = self.lock();
        !held.struck && held.until.is_none_or(|until| now() < until)
    }

    fn strike_if_due(&self, held: &mut Held) {
        if held.until.is_none_or(|until| now() < until) {
            return;
        }
        let Some(victim) = held.victim.take() else { return };
        victim.kill();
        held.struck = true;
        tracing::error!("{REASON}");
        write_down(&self.0.ephemeral_disks, REASON);
    }

    fn watch(&self) {
        loop {
            if let Err(error) = self.0.timer.wait() {
                tracing::error!(%error, "the fence's timer cannot be waited for");
                std::thread::sleep(Duration::from_millis(100));
            }
            let mut held = self.lock();
            if held.closed {
                return;
            }
            self.strike_if_due(&mut held);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn sleeper() -> Child {
        Command::new("sleep").arg("600").spawn().unwrap()
    }

    fn killed(mut child: Child) -> bool {
        use std::os::unix::process::ExitStatusExt;
        child.wait().unwrap().signal() == Some(9)
    }

    #[test]
    fn a_guest_is_killed_when_its_time_has_passed_also_one_that_is_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let dog = Watchdog::start(folder.path().to_owned()).unwrap();
        let fence = dog.fence();
        assert!(fence.allows(), "nobody has said otherwise");
        let child = sleeper();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::SIGSTOP).unwrap();
        fence.guard(child.id());
        fence.run_until(now() + Duration::from_millis(50));
        assert!(killed(child));
        while !fence.has_struck() || read(folder.path()).is_none() {
            std::thread::yield_now();
        }
        fence.run_until(now() + Duration::from_secs(600));
        assert!(!fence.allows(), "it stays fenced");
    }

    #[test]
    fn time_that_was_given_is_not_taken_back_and_more_of_it_counts() {
        let folder = tempfile::tempdir().unwrap();
        let dog = Watchdog::start(folder.path().to_owned()).unwrap();
        let (fence, mut child) = (dog.fence(), sleeper());
        fence.guard(child.id());
        fence.run_until(now() + Duration::from_secs(600));
        fence.run_until(now());
        assert!(fence.allows() && child.try_wait().unwrap().is_none());
        // A guest that has left is nobody's to kill.
        fence.release();
        let late = Watchdog::start(folder.path().to_owned()).unwrap().fence();
        late.run_until(now());
        late.guard(child.id());
        assert!(late.has_struck() && !late.allows() && killed(child));
        assert!(!fence.has_struck());
    }

    #[test]
    fn a_launcher_without_a_guest_starts_none_too_late_and_may_later() {
        let folder = tempfile::tempdir().unwrap();
        let dog = Watchdog::start(folder.path().to_owned()).unwrap();
        dog.fence().run_until(now());
        assert!(!dog.fence().allows() && !dog.fence().has_struck());
        dog.fence().run_until(now() + Duration::from_secs(600));
        assert!(dog.fence().allows());
    }

    #[test]
    fn a_process_that_has_ended_is_gone_and_one_that_has_not_is_not() {
        let mut child = sleeper();
        let victim = Victim::open(child.id()).unwrap();
        assert!(!victim.is_gone_within(Duration::ZERO));
        victim.kill();
        assert!(victim.is_gone_within(Duration::from_secs(60)));
        child.wait().unwrap();
        assert!(Victim::open(child.id()).is_err());
    }
}
