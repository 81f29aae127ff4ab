//! The end of a guest whose node may not run it any more (docs/fencing.md).
//!
//! The handler tells until when the guest may run, and by which clock. A thread of its own
//! waits for that moment, so that nothing that hangs in this process keeps it from killing QEMU. It sleeps in the kernel until
//! then, and a process that was stopped meanwhile kills as soon as it goes on.

use crate::plain_file;
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

/// What a node's times are counted by; the same for all processes of a machine. None of them ever jumps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Clock {
    /// `CLOCK_BOOTTIME`: the machine's sleep counts, since others may be awake meanwhile.
    #[default]
    Boot,
    /// `CLOCK_MONOTONIC`: it does not. For nodes that share one machine with each other and with their control plane, and sleep when
    /// these do.
    Awake,
}

impl Clock {
    const fn id(self) -> ClockId {
        match self {
            Self::Boot => ClockId::CLOCK_BOOTTIME,
            Self::Awake => ClockId::CLOCK_MONOTONIC,
        }
    }

    /// The time.
    #[must_use]
    pub fn now(self) -> Duration {
        clock_gettime(self.id()).map(Duration::from).unwrap_or(Duration::MAX)
    }
}

/// The time of [`Clock::Boot`].
#[must_use]
pub fn now() -> Duration {
    Clock::Boot.now()
}

/// A moment of a clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// Whose.
    pub clock: Clock,
    /// Its time.
    pub at: Duration,
}

impl Deadline {
    /// How far away it is; zero when it has passed.
    #[must_use]
    pub fn left(self) -> Duration {
        self.at.saturating_sub(self.clock.now())
    }

    fn has_passed(self) -> bool {
        self.left().is_zero()
    }
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
        .and_then(|bytes| plain_file::write(&ephemeral_disks.join(RECORD), &bytes));
    if let Err(error) = written {
        tracing::warn!(%error, "that the guest was fenced could not be written down");
    }
}

/// What was written down of it, if it was fenced.
#[must_use]
pub fn read(ephemeral_disks: &Path) -> Option<Fenced> {
    serde_json::from_slice(&plain_file::read(&ephemeral_disks.join(RECORD)).ok()?).ok()
}

#[derive(Debug, Default)]
struct Held {
    /// Until when the guest may run; none when nobody has said so.
    until: Option<Deadline>,
    victim: Option<Victim>,
    struck: bool,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    held: Mutex<Held>,
    boot: TimerFd,
    awake: TimerFd,
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
        self.0.wake_at(Deadline { clock: Clock::Boot, at: Duration::ZERO });
    }
}

impl Watchdog {
    /// Starts to watch. Nothing happens before somebody has said until when the guest may run.
    ///
    /// # Errors
    /// When the system has no timer or thread to give.
    pub fn start(ephemeral_disks: PathBuf) -> std::io::Result<Watchdog> {
        let timer = |clock| TimerFd::new(clock, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK);
        let (boot, awake) = (timer(timerfd::ClockId::CLOCK_BOOTTIME)?, timer(timerfd::ClockId::CLOCK_MONOTONIC)?);
        let fence = Fence(Arc::new(Shared { held: Mutex::default(), boot, awake, ephemeral_disks }));
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

    fn wake_at(&self, deadline: Deadline) {
        let timer = match deadline.clock {
            Clock::Boot => &self.0.boot,
            Clock::Awake => &self.0.awake,
        };
        let at = Expiration::OneShot(deadline.at.max(Duration::from_nanos(1)).into());
        if let Err(error) = timer.set(at, TimerSetTimeFlags::TFD_TIMER_ABSTIME) {
            tracing::error!(%error, "the fence's timer cannot be set");
        }
    }

    /// The guest may run until then. What was allowed before is not taken back, and a guest that was killed
    /// gets nothing any more.
    pub fn run_until(&self, until: Deadline) {
        let mut held = self.lock();
        // Whoever comes too late finds it passed, even where the thread has not been woken yet.
        self.strike_if_due(&mut held);
        if held.until.is_none_or(|known| known.left() < until.left()) {
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
        !held.struck && held.until.is_none_or(|until| !until.has_passed())
    }

    fn strike_if_due(&self, held: &mut Held) {
        if held.until.is_none_or(|until| !until.has_passed()) {
            return;
        }
        let Some(victim) = held.victim.take() else { return };
        victim.kill();
        held.struck = true;
        tracing::error!("{REASON}");
        write_down(&self.0.ephemeral_disks, REASON);
    }

    fn watch(&self) {
        let timers = [&self.0.boot, &self.0.awake];
        loop {
            let mut wanted = timers.map(|timer| PollFd::new(timer.as_fd(), PollFlags::POLLIN));
            match poll(&mut wanted, PollTimeout::NONE) {
                Ok(_) => {}
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "the fence's timers cannot be waited for");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            for timer in timers {
                // One that has not run out has nothing to say.
                let _ = timer.wait();
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

    fn after(time: Duration) -> Deadline {
        Deadline { clock: Clock::Boot, at: now() + time }
    }

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
        fence.run_until(after(Duration::from_millis(50)));
        assert!(killed(child));
        while !fence.has_struck() || read(folder.path()).is_none() {
            std::thread::yield_now();
        }
        fence.run_until(after(Duration::from_secs(600)));
        assert!(!fence.allows(), "it stays fenced");
    }

    #[test]
    fn time_that_was_given_is_not_taken_back_and_more_of_it_counts() {
        let folder = tempfile::tempdir().unwrap();
        let dog = Watchdog::start(folder.path().to_owned()).unwrap();
        let (fence, mut child) = (dog.fence(), sleeper());
        fence.guard(child.id());
        fence.run_until(after(Duration::from_secs(600)));
        fence.run_until(after(Duration::ZERO));
        assert!(fence.allows() && child.try_wait().unwrap().is_none());
        // A guest that has left is nobody's to kill.
        fence.release();
        let late = Watchdog::start(folder.path().to_owned()).unwrap().fence();
        late.run_until(after(Duration::ZERO));
        late.guard(child.id());
        assert!(late.has_struck() && !late.allows() && killed(child));
        assert!(!fence.has_struck());
    }

    #[test]
    fn a_launcher_without_a_guest_starts_none_too_late_and_may_later() {
        let folder = tempfile::tempdir().unwrap();
        let dog = Watchdog::start(folder.path().to_owned()).unwrap();
        dog.fence().run_until(after(Duration::ZERO));
        assert!(!dog.fence().allows() && !dog.fence().has_struck());
        dog.fence().run_until(after(Duration::from_secs(600)));
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

    #[test]
    fn each_clock_has_its_own_time_and_wakes_the_fence() {
        let awake = Clock::Awake.now();
        assert!(Clock::Boot.now() >= awake, "the machine's sleep counts for one of them");
        assert_eq!(Clock::default(), Clock::Boot, "nothing is known of others");
        for clock in [Clock::Boot, Clock::Awake] {
            let folder = tempfile::tempdir().unwrap();
            let dog = Watchdog::start(folder.path().to_owned()).unwrap();
            let child = sleeper();
            dog.fence().guard(child.id());
            dog.fence().run_until(Deadline { clock, at: clock.now() + Duration::from_millis(50) });
            assert!(killed(child));
        }
    }

    #[test]
    fn time_by_one_clock_is_longer_or_shorter_than_by_the_other_by_what_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let dog = Watchdog::start(folder.path().to_owned()).unwrap();
        let (fence, mut child) = (dog.fence(), sleeper());
        fence.guard(child.id());
        fence.run_until(Deadline { clock: Clock::Awake, at: Clock::Awake.now() + Duration::from_secs(600) });
        fence.run_until(after(Duration::ZERO));
        assert!(fence.allows() && child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
