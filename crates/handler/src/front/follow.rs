//! A console that stays with its guest: what the guest says comes from whichever launcher has it, without a gap and without
//! anything twice.
//!
//! Each launcher counts what its guest has said there and keeps the last of it. A launcher that the guest has left says so when
//! all has been sent; then its successor is asked for everything from its first byte on. A connection that breaks is taken up
//! again at the byte where it broke.

use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use godwit_launcher::console::{Frame, Hello};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::client::{CallError, FrontClient};

/// Between the first two looks at where the guest is while it is on its way; each pause is twice the one before.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// The longest of these pauses.
const LOOK_AT_LEAST: Duration = Duration::from_secs(2);
/// Between two looks while its console is open.
const LOOK: Duration = Duration::from_secs(1);
/// How long the console of a launcher that the guest has left is waited for: its node may be gone without a word.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A launcher pod that can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spot {
    /// The node.
    pub node: String,
    /// Its address.
    pub address: IpAddr,
    /// The pod's uid.
    pub pod_uid: String,
}

/// What is known of a guest's place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// Its run is over, or it is another guest of the same name.
    pub over: bool,
    /// Where it is.
    pub now: Option<Spot>,
    /// Where it goes when it leaves the pod that was asked about.
    pub next: Option<Spot>,
}

/// Who knows where a guest is.
pub trait Whereabouts: Send + Sync {
    /// Looks. `left` is the uid of the pod where it was last.
    fn look<'a>(&'a self, left: &'a str) -> BoxFuture<'a, Sight>;
}

/// An open console.
pub struct Here {
    spot: Spot,
    stream: TokioIo<Upgraded>,
    /// The place of the next byte; none while the launcher has not told.
    at: Option<u64>,
}

impl Here {
    /// Opens the console of the guest in a pod; what it said before is not sent.
    ///
    /// # Errors
    /// A node that is not reached, or refuses.
    pub async fn open(front: &FrontClient, spot: Spot) -> Result<Self, CallError> {
        Self::open_from(front, spot, None).await
    }

    async fn open_from(front: &FrontClient, spot: Spot, from: Option<u64>) -> Result<Self, CallError> {
        let stream = front.console((&spot.node, spot.address), &spot.pod_uid, Hello { from }).await?;
        Ok(Self { spot, stream, at: from })
    }
}

/// Why a console was left.
enum Left {
    /// Nobody wants it any more, or somebody else has it.
    ForGood,
    /// The guest says nothing more there.
    Ended,
    /// It broke at this byte.
    Broken(Option<u64>),
}

/// Carries a console until the guest's run is over, the client goes (its end of `typed` or `said` is closed), or a newer client
/// takes its place. Gives the place where the guest was last, when it was the run that ended.
pub async fn follow(
    front: &FrontClient,
    guest: &dyn Whereabouts,
    mut here: Here,
    mut typed: mpsc::Receiver<Bytes>,
    said: mpsc::Sender<Bytes>,
) -> Option<Spot> {
    loop {
        let spot = here.spot.clone();
        let left = carry(guest, here, &mut typed, &said).await;
        let found = match left {
            Left::ForGood => return None,
            Left::Ended => found(front, guest, &spot, None, &said).await,
            Left::Broken(at) => found(front, guest, &spot, Some(at), &said).await,
        };
        match found {
            Some(found) => here = found,
            None => return (!said.is_closed()).then_some(spot),
        }
        tracing::info!(from = spot.node, to = here.spot.node, "an open console follows its guest");
    }
}

async fn carry(
    guest: &dyn Whereabouts,
    here: Here,
    typed: &mut mpsc::Receiver<Bytes>,
    said: &mpsc::Sender<Bytes>,
) -> Left {
    let Here { spot, stream, mut at } = here;
    let (mut read, mut write) = tokio::io::split(stream);
    let (tell, mut frames) = mpsc::channel(4);
    // Reading a frame is not to be broken off in the middle.
    let mut reading = tokio::task::JoinSet::new();
    reading.spawn(async move {
        while let Ok(Some(frame)) = Frame::read(&mut read).await {
            if tell.send(frame).await.is_err() {
                return;
            }
        }
    });
    let mut look = tokio::time::interval(LOOK);
    let mut gone_since: Option<Instant> = None;
    // What is typed and said does not wait for a look.
    let mut looking: Option<BoxFuture<'_, Sight>> = None;
    loop {
        tokio::select! {
            frame = frames.recv() => match frame {
                Some(Frame::At(place)) => at = Some(place),
                Some(Frame::Said(bytes)) => {
                    // As long as it talks, it is listened to.
                    gone_since = None;
                    at = at.map(|at| at + bytes.len() as u64);
                    if said.send(bytes).await.is_err() {
                        return Left::ForGood;
                    }
                }
                Some(Frame::End) => return Left::Ended,
                Some(Frame::Replaced) => return Left::ForGood,
                None => return Left::Broken(at),
            },
            bytes = typed.recv() => match bytes {
                Some(bytes) => {
                    if write.write_all(&bytes).await.and(write.flush().await).is_err() {
                        return Left::Broken(at);
                    }
                }
                None => return Left::ForGood,
            },
            () = said.closed() => return Left::ForGood,
            _ = look.tick(), if looking.is_none() => looking = Some(guest.look(&spot.pod_uid)),
            sight = async { Some(looking.as_mut()?.await) }, if looking.is_some() => {
                looking = None;
                let Some(sight): Option<Sight> = sight else { continue };
                let elsewhere = sight.over || sight.now.as_ref().is_some_and(|now| now.pod_uid != spot.pod_uid);
                match (elsewhere, gone_since) {
                    (false, _) => gone_since = None,
                    (true, None) => gone_since = Some(Instant::now()),
                    (true, Some(since)) if since.elapsed() >= LAST_WORDS => return Left::Broken(at),
                    (true, Some(_)) => {}
                }
            }
        }
    }
}

/// The pauses between looks at where a guest is.
#[derive(Default)]
pub(super) struct Pauses(Option<Duration>);

impl Pauses {
    /// The next one.
    pub(super) fn next(&mut self) -> Duration {
        let next = self.0.map_or(LOOK_AGAIN, |before| (before * 2).min(LOOK_AT_LEAST));
        self.0 = Some(next);
        next
    }

    /// Whether it has taken long.
    fn are_long(&self) -> bool {
        self.0 == Some(LOOK_AT_LEAST)
    }
}

/// Opens the console anew where the guest is. `broken`: the connection broke at this byte; else the guest has left the pod.
async fn found(
    front: &FrontClient,
    guest: &dyn Whereabouts,
    left: &Spot,
    broken: Option<Option<u64>>,
    said: &mpsc::Sender<Bytes>,
) -> Option<Here> {
    let mut pauses = Pauses::default();
    let mut warned = false;
    loop {
        let sight = guest.look(&left.pod_uid).await;
        let elsewhere = |spot: &Spot| spot.pod_uid != left.pod_uid;
        let spot = match broken {
            None => sight.next.or(sight.now).filter(elsewhere),
            Some(_) => sight.now,
        };
        if sight.over || said.is_closed() {
            return None;
        }
        if let Some(spot) = spot {
            // At a launcher that it has just come to, all that it says is news.
            let from = if elsewhere(&spot) { Some(0) } else { broken.flatten() };
            match Here::open_from(front, spot, from).await {
                Ok(here) => return Some(here),
                Err(error) if pauses.are_long() && !warned => {
                    warned = true;
                    tracing::warn!(%error, left = left.node, "an open console does not come to its guest; trying again");
                }
                Err(error) => tracing::debug!(%error, "opening a console again"),
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pauses.next()) => {}
            () = said.closed() => return None,
        }
    }
}
