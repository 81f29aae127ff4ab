//! The node's side of "never two": guests run here only while the node's lease is held (docs/fencing.md).
//!
//! [`lease`] renews it, [`rules`] says what follows, each launcher is told ([`crate::follow`]) and kills its guest when its time
//! has passed, and [`enforce`] kills the guests of launchers that do not. While the control plane is away, [`peers`] are asked
//! whether it is for everybody.

pub mod enforce;
mod lease;
#[cfg(test)]
mod model_tests;
mod peers;
mod report;
pub mod rules;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_launcher::fence::now;
use kube::Client;
use tokio::sync::watch;

use crate::events::Events;
use crate::tls::TlsPaths;
use rules::{Peers, Rules};

/// How long an order waits for the lease before it is given up: a handler that has just started gets it in a moment.
const HELD_WITHIN: Duration = Duration::from_secs(5);

/// Until when guests may run on this node; clones are the same one.
#[derive(Clone)]
pub struct Fence(Arc<Shared>);

struct Shared {
    known: Mutex<Known>,
    until: watch::Sender<Option<Duration>>,
    met: enforce::Met,
}

struct Known {
    rules: Rules,
    /// When it was noticed that the time had passed, until that is told.
    lapsed: Option<Duration>,
}

impl Fence {
    /// Nothing may run yet.
    #[must_use]
    pub fn begin() -> Self {
        let known = Known { rules: Rules::new(now()), lapsed: None };
        Self(Arc::new(Shared {
            known: Mutex::new(known),
            until: watch::Sender::new(None),
            met: enforce::Met::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To hear of each later time; [`now`]'s clock.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Option<Duration>> {
        self.0.until.subscribe()
    }

    fn until(&self) -> Option<Duration> {
        self.lock().rules.until()
    }

    fn is_held(&self) -> bool {
        self.lock().rules.is_held(now())
    }

    fn silent_for(&self) -> Duration {
        self.lock().rules.silent_for(now())
    }

    fn to_ask(&self) -> Peers {
        self.lock().rules.to_ask()
    }

    /// Until when guests may run, in milliseconds of the boot clock, if they may run now.
    #[must_use]
    pub fn held(&self) -> Option<u64> {
        let known = self.lock();
        let until = known.rules.until().filter(|_| known.rules.is_held(now()))?;
        u64::try_from(until.as_millis()).ok()
    }

    /// The same after a moment, if need be.
    pub async fn wait_held(&self) -> Option<u64> {
        let mut changes = self.subscribe();
        let held = changes.wait_for(|_| self.is_held());
        let _ = tokio::time::timeout(HELD_WITHIN, held).await;
        self.held()
    }

    fn sends(&self, peers: Peers) {
        self.lock().rules.sends(peers);
    }

    fn answered(&self, sent: Duration, peers: Peers) {
        let until = {
            let mut known = self.lock();
            let at = now();
            known.note_lapse(at);
            known.rules.answered(sent, at, peers);
            known.rules.until()
        };
        self.0.until.send_replace(until);
    }

    fn finds_news(&self) {
        self.lock().rules.finds_news(now());
    }

    /// The launchers that were met on this node.
    pub(crate) fn met(&self) -> &enforce::Met {
        &self.0.met
    }

    fn put_off(&self, asked: Duration) {
        let until = {
            let mut known = self.lock();
            known.rules.put_off(asked, now());
            known.rules.until()
        };
        self.0.until.send_replace(until);
    }

    /// Since when the time has passed, if it has and that was not told yet.
    fn lapsed(&self) -> Option<Duration> {
        let mut known = self.lock();
        known.note_lapse(now());
        known.lapsed
    }

    /// The controller counted this node's guests as dead.
    fn found_lost(&self) {
        let mut known = self.lock();
        known.lapsed.get_or_insert(now());
    }

    fn told(&self) {
        self.lock().lapsed = None;
    }
}

impl Known {
    fn note_lapse(&mut self, now: Duration) {
        if self.rules.until().is_some_and(|until| until <= now) {
            self.lapsed.get_or_insert(now);
        }
    }
}

/// What the fence's tasks share.
pub(crate) struct Surroundings {
    pub client: Client,
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
    let others = Arc::new(peers::Others::default());
    let door = peers::Door::open(around.node_ip).await;
    let address = door.as_ref().map(|door| door.address.to_string());
    let answering = async {
        match door {
            Some(door) => door.serve(around.clone()).await,
            None => std::future::pending().await,
        }
    };
    tokio::join!(
        lease::keep(around.clone(), others.clone(), address),
        peers::learn(around.clone(), others.clone()),
        peers::put_off(around.clone(), others),
        report::enforce_and_tell(around.clone()),
        answering,
    );
}
