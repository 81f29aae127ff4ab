//! Copying disks that are not shared, while the guest runs: each is mirrored to the target's QEMU over NBD, and stays mirrored
//! until the guest stands still for the switchover (`pre-switchover`), when the mirrors are ended and both sides are the same.
//!
//! QEMU: `docs/interop/live-block-operations`, "Live disk synchronization with NBD".

use crate::qmp::commands::{self, BlockJob};
use crate::qmp::{self, Event, Qmp};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::Instant;

/// Which disks to copy and where to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blocks {
    /// The unix socket behind which the target's NBD server is.
    pub socket: PathBuf,
    /// Number of each disk in the machine (see [`crate::machine::node_name`]) and the name of its export.
    pub disks: Vec<(usize, String)>,
    /// Those whose backing image the target has too, byte for byte: only what was written above it is copied.
    pub above_base: BTreeSet<usize>,
}

/// What becomes of the guest's writes while its disks are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writes {
    /// They are copied afterwards: a guest that writes faster than that is never done.
    Follow,
    /// Each waits for its copy, so that a guest writes no faster than its disks are copied.
    Wait,
}

impl Writes {
    /// QEMU's word for it.
    fn copy_mode(self) -> &'static str {
        match self {
            Writes::Follow => "background",
            Writes::Wait => "write-blocking",
        }
    }
}

/// What a mirror keeps in flight without a cap (QEMU's default).
const LARGEST_BUFFER: u64 = 10 << 20;
/// And at least: a few of its pieces of 64 KiB.
const LEAST_BUFFER: u64 = 256 << 10;

/// How many bytes a mirror may have in flight. A guest is stopped only when they have arrived, so under a cap it is what the
/// cap lets through in a sixteenth of a second.
fn buffer(bandwidth: Option<u64>) -> u64 {
    bandwidth.map_or(LARGEST_BUFFER, |bandwidth| (bandwidth / 16).clamp(LEAST_BUFFER, LARGEST_BUFFER))
}

/// What is left of a cap for memory while mirrors take `blocks` bytes a second: at least half of it.
pub(crate) fn left_for_memory(cap: u64, blocks: u64) -> u64 {
    cap - blocks.min(cap / 2)
}

/// Offers disks of a target for writing, until [`stop`].
pub(crate) async fn offer(qmp: &Qmp, socket: &Path, disks: &[(usize, String)]) -> Result<(), qmp::Error> {
    let addr = json!({"type": "unix", "data": {"path": socket.to_string_lossy()}});
    qmp.execute(&commands::NbdServerStart { addr }).await?;
    for (number, name) in disks {
        let export = commands::BlockExportAdd {
            r#type: "nbd",
            id: format!("export{number}"),
            node_name: crate::machine::node_name(*number),
            name: name.clone(),
            writable: true,
        };
        qmp.execute(&export).await?;
    }
    Ok(())
}

/// Takes the offer back. The guest cannot run before that: nobody else may write to its disks.
pub(crate) async fn stop(qmp: &Qmp) -> Result<(), qmp::Error> {
    qmp.execute(&commands::NbdServerStop {}).await.map(drop)
}

/// Takes away what an earlier try has left. A mirror that is given up ends when what it had in flight has ended, which over a slow
/// link may be after its migration was over.
async fn clear(qmp: &Qmp, id: &str) -> Result<(), qmp::Error> {
    let end = Instant::now() + ABANDON_LIMIT;
    loop {
        let nodes = qmp.execute(&commands::QueryNamedBlockNodes { flat: true }).await?;
        if !nodes.iter().any(|node| node.node_name == id) {
            return Ok(());
        }
        match qmp.execute(&commands::BlockdevDel { node_name: id.into() }).await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
}

/// Where one mirror stands.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Job {
    Copying,
    /// Both sides are the same, and are kept so.
    Ready,
    /// Ended in order.
    Done,
    Failed(String),
}

/// The mirrors of an outgoing migration, by job id.
#[derive(Clone, Debug)]
pub(crate) struct Mirrors {
    jobs: BTreeMap<String, Job>,
    from_event: u64,
    finishing: bool,
    progress: (u64, u64),
    writes: Writes,
    /// Bytes to copy when they began.
    whole: u64,
    /// Bytes copied at a time in microseconds, and bytes a second up to then.
    rate: Option<(u64, i64, u64)>,
}

/// How long an abandoned mirror is waited for.
const ABANDON_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks whether it has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Between two measurements of the rate, in microseconds.
const MEASURE_EVERY: i64 = 250_000;

impl Mirrors {
    /// Starts to copy. On an error nothing is left behind.
    pub(crate) async fn start(
        qmp: &Qmp,
        blocks: &Blocks,
        bandwidth: Option<u64>,
        writes: Writes,
    ) -> Result<Mirrors, qmp::Error> {
        let mut mirrors = Mirrors {
            jobs: BTreeMap::new(),
            from_event: qmp.event_count(),
            finishing: false,
            progress: (0, 0),
            writes,
            whole: 0,
            rate: None,
        };
        for (number, export) in &blocks.disks {
            let sync = if blocks.above_base.contains(number) { "top" } else { "full" };
            if let Err(error) = mirrors.add(qmp, &blocks.socket, *number, export, sync, buffer(bandwidth)).await {
                mirrors.abandon(qmp).await;
                return Err(error);
            }
        }
        Ok(mirrors)
    }

    async fn add(
        &mut self,
        qmp: &Qmp,
        socket: &Path,
        number: usize,
        export: &str,
        sync: &'static str,
        buf_size: u64,
    ) -> Result<(), qmp::Error> {
        let id = format!("mirror{number}");
        clear(qmp, &id).await?;
        let server = json!({"type": "unix", "path": socket.to_string_lossy()});
        let add = commands::BlockdevAddNbd {
            driver: "nbd",
            node_name: id.clone(),
            server,
            export: export.into(),
            // Without it QEMU 10.0 asks for zeros where the source has holes, and they are allocated.
            discard: "unmap",
        };
        qmp.execute(&add).await?;
        self.jobs.insert(id.clone(), Job::Copying);
        let mirror = commands::BlockdevMirror {
            job_id: id.clone(),
            device: crate::machine::node_name(number),
            target: id,
            sync,
            buf_size,
            copy_mode: self.writes.copy_mode(),
            auto_dismiss: true,
            auto_finalize: true,
        };
        qmp.execute(&mirror).await.map(drop)
    }

    /// Takes an event of QEMU's.
    pub(crate) fn event(&mut self, event: &Event) {
        if event.number < self.from_event {
            return;
        }
        let Some(job) = event.text("device").and_then(|id| self.jobs.get_mut(id)) else { return };
        match (event.name.as_str(), event.text("error")) {
            ("BLOCK_JOB_READY", _) => *job = Job::Ready,
            ("BLOCK_JOB_COMPLETED", None) if self.finishing => *job = Job::Done,
            ("BLOCK_JOB_COMPLETED", error) => {
                *job = Job::Failed(error.unwrap_or("it ended before its time").to_string());
            }
            ("BLOCK_JOB_CANCELLED", _) => *job = Job::Failed("it was cancelled".into()),
            _ => {}
        }
    }

    /// Looks how far they are: bytes to copy and bytes copied.
    pub(crate) async fn look(&mut self, qmp: &Qmp) -> Result<(u64, u64), qmp::Error> {
        let jobs: Vec<BlockJob> = qmp.execute(&commands::QueryBlockJobs {}).await?;
        let ours: Vec<&BlockJob> = jobs.iter().filter(|j| self.jobs.contains_key(&j.device)).collect();
        // A job that has ended is not listed any more; what it has copied stays copied.
        if ours.len() == self.jobs.len() {
            self.progress = (ours.iter().map(|j| j.len).sum(), ours.iter().map(|j| j.offset).sum());
            self.whole = if self.whole == 0 { self.progress.0 } else { self.whole };
        }
        Ok(self.progress)
    }

    /// Bytes to copy, by the last look.
    pub(crate) fn total(&self) -> u64 {
        self.progress.0
    }

    /// How many bytes a second they take at present, after [`Mirrors::look`] at `now_us`. None: not measured anew.
    pub(crate) fn measure(&mut self, now_us: i64) -> Option<u64> {
        let copied = self.progress.1;
        let Some((before, at, _)) = self.rate else {
            self.rate = Some((copied, now_us, 0));
            return None;
        };
        let elapsed = now_us.saturating_sub(at);
        if elapsed < MEASURE_EVERY {
            return None;
        }
        let bytes = u128::from(copied.saturating_sub(before)) * 1_000_000;
        let rate = u64::try_from(bytes / u128::from(elapsed.unsigned_abs())).unwrap_or(u64::MAX);
        self.rate = Some((copied, now_us, rate));
        Some(rate)
    }

    /// Whether all has been copied that there was at first, and they are not ready for what the guest has written since.
    pub(crate) fn are_outrun(&self) -> bool {
        self.whole > 0 && self.progress.1 >= self.whole && !self.are_ready()
    }

    /// Has the guest's writes wait for their copies from now on. QEMU from 8.2 on can change that.
    pub(crate) async fn make_writes_wait(&mut self, qmp: &Qmp) -> Result<(), qmp::Error> {
        if std::mem::replace(&mut self.writes, Writes::Wait) == Writes::Wait {
            return Ok(());
        }
        tracing::info!("the guest's writes wait for their copies from now on");
        for id in self.jobs.keys() {
            let change =
                commands::BlockJobChange { id: id.clone(), r#type: "mirror", copy_mode: Writes::Wait.copy_mode() };
            qmp.execute(&change).await?;
        }
        Ok(())
    }

    /// Whether both sides are the same, and will be.
    pub(crate) fn are_ready(&self) -> bool {
        self.jobs.values().all(|j| *j == Job::Ready)
    }

    /// Whether they have ended in order.
    pub(crate) fn are_done(&self) -> bool {
        self.jobs.values().all(|j| *j == Job::Done)
    }

    /// What went wrong with one of them.
    pub(crate) fn failure(&self) -> Option<String> {
        self.jobs.iter().find_map(|(id, job)| match job {
            Job::Failed(why) => Some(format!("copying a disk ({id}) failed: {why}")),
            _ => None,
        })
    }

    /// The guest stands still: bring over what is left and end. [`Mirrors::are_done`] tells when.
    pub(crate) async fn finish(&mut self, qmp: &Qmp) -> Result<(), qmp::Error> {
        if std::mem::replace(&mut self.finishing, true) {
            return Ok(());
        }
        for device in self.jobs.keys() {
            // Of a mirror that is ready, this is its orderly end.
            qmp.execute(&commands::BlockJobCancel { device: device.clone(), force: false }).await?;
        }
        Ok(())
    }

    /// Closes the connections to the target.
    pub(crate) async fn close(&self, qmp: &Qmp) {
        for node_name in self.jobs.keys() {
            if let Err(error) = qmp.execute(&commands::BlockdevDel { node_name: node_name.clone() }).await {
                tracing::debug!(%error, "closing a mirror");
            }
        }
    }

    /// Ends the copying without a result; the guest's own disks are untouched.
    pub(crate) async fn abandon(&mut self, qmp: &Qmp) {
        let mut events = qmp.subscribe();
        for (device, job) in &self.jobs {
            if matches!(job, Job::Copying | Job::Ready) {
                let cancel = commands::BlockJobCancel { device: device.clone(), force: true };
                if let Err(error) = qmp.execute(&cancel).await {
                    tracing::debug!(%error, "ending a mirror");
                }
            }
        }
        // The nodes are free when the jobs have ended.
        let wait = async {
            while self.jobs.values().any(|j| matches!(j, Job::Copying | Job::Ready)) {
                let Some(event) = events.next().await else { return };
                self.event(&event);
            }
        };
        let _ = tokio::time::timeout(ABANDON_LIMIT, wait).await;
        self.close(qmp).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirrors() -> Mirrors {
        let jobs = ["mirror0", "mirror1"].map(|id| (id.to_string(), Job::Copying)).into();
        let writes = Writes::Follow;
        Mirrors { jobs, from_event: 5, finishing: false, progress: (0, 0), writes, whole: 0, rate: None }
    }

    fn event(number: u64, name: &str, data: serde_json::Value) -> Event {
        Event { number, at_us: 0, name: name.into(), data }
    }

    #[test]
    fn ready_means_all_and_done_means_after_the_end_was_asked_for() {
        let mut m = mirrors();
        m.event(&event(4, "BLOCK_JOB_READY", json!({"device": "mirror0"})));
        m.event(&event(6, "BLOCK_JOB_READY", json!({"device": "mirror1"})));
        assert!(!m.are_ready(), "the first was of an earlier migration");
        m.event(&event(7, "BLOCK_JOB_READY", json!({"device": "mirror0"})));
        assert!(m.are_ready() && m.failure().is_none());
        m.finishing = true;
        m.event(&event(8, "BLOCK_JOB_COMPLETED", json!({"device": "mirror0"})));
        assert!(!m.are_done());
        m.event(&event(9, "BLOCK_JOB_COMPLETED", json!({"device": "mirror1"})));
        assert!(m.are_done());
    }

    #[test]
    fn memory_gets_what_the_mirrors_leave_of_the_cap_and_never_less_than_half() {
        assert_eq!([0, 10, 50, 900].map(|blocks| left_for_memory(100, blocks)), [100, 90, 50, 50]);
        let mut m = mirrors();
        assert_eq!(m.measure(0), None);
        m.progress.1 = 1 << 20;
        assert_eq!(m.measure(100_000), None, "too early to tell");
        assert_eq!(m.measure(500_000), Some(2 << 20));
        assert_eq!(m.measure(1_000_000), Some(0));
    }

    #[test]
    fn a_guest_outruns_its_mirrors_when_a_whole_pass_was_not_enough() {
        let mut m = mirrors();
        assert!(!m.are_outrun(), "nothing is known yet");
        (m.whole, m.progress) = (100, (150, 99));
        assert!(!m.are_outrun(), "the first pass");
        m.progress.1 = 100;
        assert!(m.are_outrun());
        m.jobs.values_mut().for_each(|job| *job = Job::Ready);
        assert!(!m.are_outrun());
    }

    #[test]
    fn little_is_in_flight_under_a_small_cap() {
        assert_eq!(buffer(None), 10 << 20);
        assert_eq!(buffer(Some(64 << 20)), 4 << 20);
        assert_eq!(buffer(Some(1 << 40)), 10 << 20);
        assert_eq!(buffer(Some(1)), 256 << 10);
    }

    #[test]
    fn an_end_before_its_time_or_with_an_error_is_a_failure() {
        let mut m = mirrors();
        m.event(&event(6, "BLOCK_JOB_COMPLETED", json!({"device": "mirror0"})));
        assert!(m.failure().unwrap().contains("before its time"));
        let mut m = mirrors();
        m.finishing = true;
        m.event(&event(6, "BLOCK_JOB_COMPLETED", json!({"device": "mirror0", "error": "No space left"})));
        assert!(m.failure().unwrap().contains("No space left"));
    }
}
