//! The last moments of a guest's network at the source: what comes in for it while it stands still is handed on to the target,
//! where it waits in the tap's queue until the guest runs.
//!
//! Switches send a guest's frames where they last heard it, so until it has spoken at the target they come to the source's pod. While
//! the end of the sending may be near the source's handler listens on the pod's interface beside the bridge, which goes on as ever,
//! and keeps the last few. As long as much is to be sent yet ([`Distance`]) the kernel passes its ears by: a busy guest would cost it a core. When the guest has stopped it asks the target's handler to let the guest's taps hear their segments, and then
//! sends what it has kept, and whatever comes after, over a connection of its own with the same locks as the control channel. The
//! target's handler puts each frame straight into the tap, beyond every bridge, so that nothing can go round in a loop.
//!
//! What came in just before the guest stopped goes with it: it may have lain unread in the source's tap. If it had not, the guest
//! gets it twice, as every network may deliver a frame twice. Frames for a group are handed on only until the target's taps hear
//! their segments themselves.
//!
//! Nothing of this is needed for the move: whatever goes wrong with it costs frames, as if it were not there.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use godwit_launcher::rpc::{MigrationFacts, MigrationMode, MigrationRole};
use godwit_network::Namespace;
use godwit_network::frames::{Heard, LARGEST, Listener, Sender};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, BufWriter};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::channel::{Answer, ChannelError, Control, Credentials, Request};
use crate::facts::{self, Launcher};
use crate::networks::{NetworkError, Port};
use crate::source_link::{DIAL_LIMIT, Endpoint};
use crate::tls::{Identity, TlsPaths};

/// How long before the guest stopped a frame may have come in and not have been read by QEMU.
const UNREAD: Duration = Duration::from_millis(50);
/// Most such frames: they must not take the place of those that are surely unread.
const UNREAD_FRAMES: usize = 64;
/// Most frames that are kept, which is what a tap's queue holds, and most bytes.
const KEPT: (usize, usize) = (1000, 8 << 20);

/// Frames of a guest's ports, oldest first, the oldest of which make room for new ones.
#[derive(Default)]
struct Kept {
    frames: VecDeque<(u8, Heard)>,
    bytes: usize,
}

impl Kept {
    fn push(&mut self, port: u8, frame: Heard) {
        self.bytes += frame.bytes.len();
        self.frames.push_back((port, frame));
        while self.frames.len() > KEPT.0 || self.bytes > KEPT.1 {
            let Some((_, gone)) = self.frames.pop_front() else { break };
            self.bytes -= gone.bytes.len();
        }
    }

    fn take(&mut self) -> VecDeque<(u8, Heard)> {
        self.bytes = 0;
        std::mem::take(&mut self.frames)
    }
}

/// With no more than this to send the end may be near, however slowly it goes: memory of zeros only is gone through at some GiB a second.
const NEAR_BYTES: u64 = 1 << 30;
/// With more it is near when it goes so fast that this is enough. Launchers tell of it ten times a second.
const NEAR: Duration = Duration::from_secs(2);
/// How long it is near for after an order that may hasten it.
const HASTENED: Duration = Duration::from_secs(10);

/// How far the end of the sending is.
#[derive(Debug, Default)]
struct Distance {
    /// When what was left was last looked at, what it was, and by how much it became less, in bytes a second.
    left: Option<(Instant, u64, u64)>,
}

/// Between two looks at how fast it becomes less.
const LOOK: Duration = Duration::from_millis(50);

impl Distance {
    /// Whether the guest may leave soon.
    fn is_near(&mut self, facts: Option<&MigrationFacts>, now: Instant) -> bool {
        let Some(f) = facts else { return true };
        let left = f.remaining_bytes;
        let (at, before, gone) = *self.left.get_or_insert((now, left, 0));
        let elapsed = now.saturating_duration_since(at);
        let gone = if elapsed < LOOK {
            gone
        } else {
            let gone = before.saturating_sub(left) as f64 / elapsed.as_secs_f64();
            self.left = Some((now, left, gone as u64));
            gone as u64
        };
        let rate = f.bytes_per_second.max(gone);
        // Everything else is the end, or a beginning of which nothing is known yet.
        let sending = f.status == "active" && f.mode == MigrationMode::PreCopy && !f.paused_by_migration;
        !sending || left <= NEAR_BYTES || left <= rate.saturating_mul(NEAR.as_secs())
    }
}

/// The listeners, and whether they hear.
struct Ears {
    listeners: Vec<Listener>,
    /// Whether they hear, and until when at least.
    now: Mutex<(bool, Option<Instant>)>,
}

impl Ears {
    fn hear(&self, near: bool) {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = near || now.1.is_some_and(|until| Instant::now() < until);
        if wanted == now.0 {
            return;
        }
        now.0 = wanted;
        for listener in &self.listeners {
            if let Err(error) = listener.hear(wanted) {
                tracing::warn!(%error, wanted, "beginning or ceasing to listen for the guest's frames");
            }
        }
    }
}

/// What of the kept frames the target needs, when the guest stopped at `stopped` and the target's taps heard their segments at `joined`.
fn due(kept: VecDeque<(u8, Heard)>, stopped: SystemTime, joined: SystemTime) -> Vec<(u8, Heard)> {
    let early = stopped.checked_sub(UNREAD).unwrap_or(SystemTime::UNIX_EPOCH);
    let mut due: Vec<_> = kept.into_iter().filter(|(_, f)| f.at >= early && !(f.group && f.at > joined)).collect();
    let before = due.iter().filter(|(_, f)| f.at < stopped).count();
    let mut surplus = before.saturating_sub(UNREAD_FRAMES);
    due.retain(|(_, f)| {
        let goes = surplus > 0 && f.at < stopped;
        surplus -= usize::from(goes);
        !goes
    });
    due
}

/// What the source's launcher says of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    /// It runs here, or might again.
    Here,
    /// It stands still since then, to run at the target.
    Leaving(SystemTime),
    /// It stays.
    Stays,
}

fn guest(facts: Option<&MigrationFacts>) -> Guest {
    let Some(f) = facts else { return Guest::Here };
    if matches!(f.status.as_str(), "failed" | "cancelled") && !f.handed_over {
        return Guest::Stays;
    }
    if f.status != "device" && !facts::has_left(f) {
        return Guest::Here;
    }
    let at = f.stop_us.and_then(|us| u64::try_from(us).ok()).map(Duration::from_micros);
    // One that was paused before has no such time.
    Guest::Leaving(at.map_or_else(SystemTime::now, |since| SystemTime::UNIX_EPOCH + since))
}

/// The running half at the source. Dropping it ends it.
pub struct Relay {
    task: JoinHandle<()>,
    ears: Arc<Ears>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Relay {
    /// Begins to listen in the pod of process `pid`; none when it has no `ports`, or cannot (which is logged). `ends`: where the target is,
    /// and what the source's launcher says.
    pub async fn start(
        tls: &TlsPaths,
        ends: (watch::Receiver<Endpoint>, watch::Receiver<Launcher>),
        pid: u32,
        ports: Vec<Port>,
    ) -> Option<Self> {
        if ports.is_empty() {
            return None;
        }
        let (endpoint, launcher) = ends;
        let uid = endpoint.borrow().migration_uid.clone();
        let kept = Arc::new((Mutex::new(Kept::default()), Notify::new()));
        let listeners = match listen(pid, &ports, &kept).await {
            Ok(listeners) => listeners,
            Err(error) => {
                tracing::warn!(migration = %uid, %error, "frames that come in while the guest stands still will be lost");
                return None;
            }
        };
        let ears = Arc::new(Ears { listeners, now: Mutex::new((true, None)) });
        let run =
            Run { uid, tls: tls.clone(), endpoint, launcher, kept, ears: ears.clone(), distance: Distance::default() };
        let task = tokio::spawn(async move {
            let uid = run.uid.clone();
            if let Err(error) = run.run().await {
                tracing::info!(migration = %uid, %error, "the guest's frames are not handed on any more");
            }
        });
        Some(Self { task, ears })
    }

    /// What is ordered next may bring the end about, whatever was left to send.
    pub fn hasten(&self) {
        self.ears.now.lock().unwrap_or_else(PoisonError::into_inner).1 = Some(Instant::now() + HASTENED);
        self.ears.hear(true);
    }
}

type Shared = Arc<(Mutex<Kept>, Notify)>;

async fn listen(pid: u32, ports: &[Port], kept: &Shared) -> Result<Vec<Listener>, NetworkError> {
    let namespace = Namespace::of_pid(pid)?;
    let mut listeners = Vec::new();
    for port in ports {
        let (number, kept) = (port.number, kept.clone());
        let sink = move |frame| {
            kept.0.lock().unwrap_or_else(PoisonError::into_inner).push(number, frame);
            kept.1.notify_one();
        };
        listeners.push(Listener::start(&namespace, &port.pod_interface, port.mac, sink).await?);
    }
    Ok(listeners)
}

struct Run {
    uid: String,
    tls: TlsPaths,
    endpoint: watch::Receiver<Endpoint>,
    launcher: watch::Receiver<Launcher>,
    kept: Shared,
    ears: Arc<Ears>,
    distance: Distance,
}

impl Run {
    async fn run(mut self) -> Result<(), ChannelError> {
        // Dialled ahead: in the moment itself it would take too long.
        let mut ahead = self.dial().await.ok();
        let stopped = loop {
            match self.guest() {
                Guest::Leaving(since) => break since,
                Guest::Stays => return Ok(()),
                Guest::Here => {}
            }
            let changed = match &mut ahead {
                Some(open) => tokio::select! {
                    changed = self.launcher.changed() => changed.is_ok(),
                    () = open.closed() => {
                        ahead = None;
                        true
                    }
                },
                None => self.launcher.changed().await.is_ok(),
            };
            if !changed {
                return Ok(());
            }
        };
        let mut control = match ahead {
            Some(open) => open,
            None => self.dial().await?,
        };
        match control.ask(Request::Frames, DIAL_LIMIT).await? {
            Answer::Takes => {}
            Answer::NotYet { reason } => return Err(control.refused(reason)),
            other => return Err(control.refused(format!("unexpected answer {other:?}"))),
        }
        let joined = SystemTime::now();
        let address = self.endpoint.borrow().address;
        let io = |source| ChannelError::Io {
            what: "handing the guest's frames on to",
            address: (address, 0).into(),
            source,
        };
        let mut stream = BufWriter::new(control.into_stream());
        let mut count = 0_usize;
        loop {
            let kept = self.kept.0.lock().unwrap_or_else(PoisonError::into_inner).take();
            let frames = due(kept, stopped, joined);
            if !frames.is_empty() {
                count += frames.len();
                tracing::debug!(migration = %self.uid, count, "frames handed on to the target");
            }
            for (port, frame) in frames {
                write(&mut stream, port, &frame.bytes).await.map_err(io)?;
            }
            stream.flush().await.map_err(io)?;
            tokio::select! {
                () = self.kept.1.notified() => {}
                changed = self.launcher.changed() => {
                    // It runs on here after all.
                    if changed.is_err() || !matches!(self.guest(), Guest::Leaving(_)) {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn dial(&self) -> Result<Control, ChannelError> {
        let endpoint = self.endpoint.borrow().clone();
        let credentials = Credentials { node: Identity::load(&self.tls)?, own: None, plain: false };
        Control::connect(&endpoint.target(), &credentials, endpoint.control, DIAL_LIMIT).await
    }

    fn guest(&mut self) -> Guest {
        let launcher = self.launcher.borrow_and_update();
        let facts = launcher.last().and_then(|state| facts::migration(state, &self.uid, MigrationRole::Source));
        self.ears.hear(self.distance.is_near(facts, Instant::now()));
        guest(facts)
    }
}

/// Number of the port, length, frame.
async fn write<W: tokio::io::AsyncWrite + Unpin>(stream: &mut W, port: u8, frame: &[u8]) -> io::Result<()> {
    stream.write_u8(port).await?;
    stream.write_u32(u32::try_from(frame.len()).map_err(io::Error::other)?).await?;
    stream.write_all(frame).await
}

/// Where frames go at the target, by the numbers of their ports.
pub type Inlets = BTreeMap<u8, Sender>;

/// Opens the taps of a guest that is yet to run.
///
/// # Errors
/// Which link could not be opened.
pub async fn inlets(pid: u32, ports: &[Port]) -> Result<Inlets, NetworkError> {
    let namespace = Namespace::of_pid(pid)?;
    let mut inlets = Inlets::new();
    for port in ports {
        inlets.insert(port.number, Sender::open(&namespace, &port.tap).await?);
    }
    Ok(inlets)
}

/// Puts frames into the guest's taps until the connection ends. What a tap's queue has no room for is dropped, as it is everywhere.
pub(crate) async fn take<R: AsyncRead + Unpin>(stream: &mut R, inlets: &Inlets) -> io::Result<()> {
    let (mut taken, mut dropped) = (0_u64, 0_u64);
    let mut frame = Vec::new();
    let ended = loop {
        let port = match stream.read_u8().await {
            Ok(port) => port,
            // Between two frames it may end in any way.
            Err(_) => break Ok(()),
        };
        let length = stream.read_u32().await? as usize;
        if length > LARGEST {
            break Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
        }
        frame.resize(length, 0);
        stream.read_exact(&mut frame).await?;
        match inlets.get(&port).map(|tap| tap.send(&frame)) {
            Some(Ok(())) => taken += 1,
            Some(Err(_)) | None => dropped += 1,
        }
    };
    tracing::info!(taken, dropped, "frames that came in for the guest at the source");
    ended
}

#[cfg(test)]
#[path = "frames_tests.rs"]
mod tests;
