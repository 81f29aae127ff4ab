//! The node's side of "never two": guests run here only while the node's lease is held (docs/fencing.md).
//!
//! [`lease`] renews it, [`rules`] says what follows, each launcher is told ([`crate::follow`]) and kills its guest when its time
//! has passed, and [`enforce`] kills the guests of launchers that do not. While the control plane is away, [`peers`] are asked
//! whether it is for everybody.

mod disks;
pub mod enforce;
mod kept;
mod lease;
#[cfg(test)]
mod model_tests;
mod peers;
mod report;
pub mod rules;
pub(crate) mod tell;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_launcher::fence::Clock;
use godwit_launcher::rpc::RunUntilOrder;
use kube::Client;
use tokio::sync::watch;

use crate::events::Events;
use crate::tls::TlsPaths;
use kept::{Book, Kept};
use rules::Peers;

/// How long an order waits for the lease before it is given up: a handler that has just started gets it in a moment.
const HELD_WITHIN: Duration = Duration::from_secs(5);

/// Until when guests may run on this node; clones are the same one.
#[derive(Clone)]
pub struct Fence(Arc<Shared>);

struct Shared {
    clock: Clock,
    known: Mutex<Known>,
    until: watch::Sender<Option<Duration>>,
    met: enforce::Met,
    adopted: tell::Adopted,
}

struct Known {
    kept: Kept,
    /// For a successor.
    book: Option<Book>,
    /// When it was noticed that the time had passed, until that is told.
    lapsed: Option<Duration>,
}

impl Fence {
    /// Nothing may run yet, and a successor is left nothing.
    #[must_use]
    pub fn begin() -> Self {
        let clock = Clock::default();
        Self::with(clock, Kept::nothing(clock.now()), None)
    }

    /// Goes on where the last handler of this node has left off, if it did a moment ago, and leaves to the next one in this folder what
    /// that has to know. It must not outlive the machine's boot.
    #[must_use]
    pub fn resume(folder: &Path, clock: Clock) -> Self {
        let (book, now) = (Book::new(folder, clock), clock.now());
        let kept = book.read(now);
        if let Some(kept) = &kept {
            let silent_ms = kept.rules.silent_for(now).as_millis() as u64;
            tracing::info!(silent_ms, "the node's lease is still held: the last handler ended a moment ago");
        }
        Self::with(clock, kept.unwrap_or_else(|| Kept::nothing(now)), Some(book))
    }

    fn with(clock: Clock, kept: Kept, book: Option<Book>) -> Self {
        let until = watch::Sender::new(kept.rules.until());
        let known = Mutex::new(Known { kept, book, lapsed: None });
        let (met, adopted) = (enforce::Met::default(), tell::Adopted::default());
        Self(Arc::new(Shared { clock, known, until, met, adopted }))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time of the clock by which this node counts.
    fn now(&self) -> Duration {
        self.0.clock.now()
    }

    /// What launchers are told of a time.
    fn order(&self, until: Duration) -> RunUntilOrder {
        RunUntilOrder::by(self.0.clock, until)
    }

    /// To hear of each later time.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Option<Duration>> {
        self.0.until.subscribe()
    }

    fn until(&self) -> Option<Duration> {
        self.lock().kept.rules.until()
    }

    fn is_held(&self) -> bool {
        self.lock().kept.rules.is_held(self.now())
    }

    fn silent_for(&self) -> Duration {
        self.lock().kept.rules.silent_for(self.now())
    }

    fn to_ask(&self) -> Peers {
        self.lock().kept.rules.to_ask()
    }

    /// Until when guests may run, if they may run now.
    #[must_use]
    pub fn held(&self) -> Option<RunUntilOrder> {
        let now = self.now();
        let until = self.lock().kept.rules.until().filter(|until| now < *until)?;
        Some(self.order(until))
    }

    /// The same after a moment, if need be.
    pub async fn wait_held(&self) -> Option<RunUntilOrder> {
        let mut changes = self.subscribe();
        let held = changes.wait_for(|_| self.is_held());
        let _ = tokio::time::timeout(HELD_WITHIN, held).await;
        self.held()
    }

    /// The nodes that a predecessor named, and where handlers answer.
    fn others(&self) -> (Peers, BTreeMap<String, String>) {
        let known = self.lock();
        (known.kept.live.clone(), known.kept.addresses.clone())
    }

    /// A renewal is about to be sent that names these peers. Only after it was written down what was heard of the one before: a
    /// successor must not say that there was no contact, since whoever sees this renewal knows that there was.
    fn sends(&self, peers: Peers, addresses: BTreeMap<String, String>) -> io::Result<()> {
        let mut known = self.lock();
        known.kept.rules.sends(peers.clone());
        (known.kept.live, known.kept.addresses) = (peers, addresses);
        known.write()
    }

    fn answered(&self, sent: Duration, peers: Peers, revision: Option<String>) {
        let until = {
            let mut known = self.lock();
            let at = self.now();
            known.note_lapse(at);
            known.kept.rules.answered(sent, at, peers);
            known.kept.seen = revision;
            known.leave();
            known.kept.rules.until()
        };
        self.0.until.send_replace(until);
    }

    /// The lease was read, and this is its revision. Not any reading is contact: where nothing can be written for anybody, all of
    /// them read the same again and again, and may say that they have no contact.
    fn reads(&self, revision: Option<String>) {
        let mut known = self.lock();
        if revision.is_none() || revision != known.kept.seen {
            known.kept.rules.finds_news(self.now());
            known.kept.seen = revision;
            known.leave();
        }
    }

    /// The launchers that were met on this node.
    pub(crate) fn met(&self) -> &enforce::Met {
        &self.0.met
    }

    /// Puts a launcher's guest, called this, under the node's lease. Where that cannot be written down this process knows it all the
    /// same, and its successor does not.
    pub(crate) async fn mark(&self, sockets: &Path, guest: &str) -> io::Result<()> {
        let (fence, sockets, guest) = (self.clone(), sockets.to_owned(), guest.to_owned());
        let marking = tokio::task::spawn_blocking(move || enforce::mark(fence.met(), &sockets, &guest));
        marking.await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    /// Those that were found on it when this handler started.
    pub(crate) fn adopted(&self) -> &tell::Adopted {
        &self.0.adopted
    }

    fn put_off(&self, asked: Duration) {
        let until = {
            let mut known = self.lock();
            known.kept.rules.put_off(asked, self.now());
            known.leave();
            known.kept.rules.until()
        };
        self.0.until.send_replace(until);
    }

    /// Since when the time has passed, if it has and that was not told yet.
    fn lapsed(&self) -> Option<Duration> {
        let mut known = self.lock();
        known.note_lapse(self.now());
        known.lapsed
    }

    /// The controller counted this node's guests as dead.
    fn found_lost(&self) {
        let mut known = self.lock();
        known.lapsed.get_or_insert(self.now());
    }

    fn told(&self) {
        self.lock().lapsed = None;
    }
}

impl Known {
    fn write(&self) -> io::Result<()> {
        self.book.as_ref().map_or(Ok(()), |book| book.write(&self.kept))
    }

    /// The same where it costs no more than time that a successor does not know of.
    fn leave(&self) {
        if let Err(error) = self.write() {
            tracing::warn!(%error, "what the next handler of this node has to know is not written down");
        }
    }

    fn note_lapse(&mut self, now: Duration) {
        if self.kept.rules.until().is_some_and(|until| until <= now) {
            self.lapsed.get_or_insert(now);
        }
    }
}

/// What the fence's tasks share.
pub(crate) struct Surroundings {
    pub client: Client,
    /// Where the nodes' leases are.
    pub namespace: String,
    pub node: String,
    pub node_ip: IpAddr,
    pub kubelet_root: PathBuf,
    pub tls: TlsPaths,
    pub events: Events,
    pub fence: Fence,
}

/// Keeps the lease and what hangs on it, for ever.
pub(crate) async fn run(around: Surroundings) {
    let around = Arc::new(around);
    let others = Arc::new(peers::Others::resume(around.fence.others()));
    let door = peers::Door::open(around.node_ip).await;
    let address = door.as_ref().map(|door| door.address.to_string());
    let answering = async {
        match door {
            Some(door) => door.serve(around.clone()).await,
            None => std::future::pending().await,
        }
    };
    tokio::join!(
        around.fence.adopted().find(&around.kubelet_root, &around.fence),
        lease::keep(around.clone(), others.clone(), address),
        peers::learn(around.clone(), others.clone()),
        peers::put_off(around.clone(), others),
        report::enforce_and_tell(around.clone()),
        answering,
    );
}
