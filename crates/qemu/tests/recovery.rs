//! Post-copy whose link breaks: the guest's memory waits at both ends and goes on over another link.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod place;

use godwit_guest_rom::Story;
use godwit_qemu::instance::{Error, Filling, Incoming, Serving};
use godwit_qemu::migration::{Facts, Options};
use godwit_qemu::qmp::commands::{MigrationStatus, RunState, VersionTriple};
use godwit_qemu::transport::Transport;
use place::*;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// A link between two QEMUs: dropping it cuts it, and both notice.
struct Link {
    near: PathBuf,
    far: PathBuf,
    silent: Arc<AtomicBool>,
    swallows: Arc<AtomicBool>,
    /// Bytes that went over each connection from near to far, the main one first.
    bytes: Arc<Mutex<Vec<u64>>>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    /// Of so many connections. The first one gets to the far end when there is something to read, the others right after it, as
    /// the handlers do it.
    fn new(place: &Place, number: u32, connections: usize) -> Link {
        let (near, far) = (place.path(&format!("near{number}")), place.path(&format!("far{number}")));
        let listener = UnixListener::bind(&near).unwrap();
        let silent = Arc::new(AtomicBool::new(false));
        let swallows = Arc::new(AtomicBool::new(false));
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (to, quiet, swallowed, count) = (far.clone(), silent.clone(), swallows.clone(), bytes.clone());
        let task = tokio::spawn(async move {
            let far = Arc::new(tokio::sync::Mutex::new(VecDeque::new()));
            let main = watch::Sender::new(false);
            // They end with the link.
            let mut carriers = JoinSet::new();
            while let Ok((from, _)) = listener.accept().await {
                let number = {
                    let mut count = count.lock().unwrap();
                    count.push(0);
                    count.len() - 1
                };
                let (to, count, main, far) = (to.clone(), count.clone(), main.clone(), far.clone());
                let (quiet, swallowed) = (quiet.clone(), swallowed.clone());
                carriers.spawn(async move {
                    let (mut from_read, mut from_write) = from.into_split();
                    let there = |n: usize| count.lock().unwrap()[number] += n as u64;
                    if number == 0 {
                        let mut first = [0; 1];
                        if from_read.read_exact(&mut first).await.is_err() {
                            return;
                        }
                        let mut far = far.lock().await;
                        for _ in 0..connections {
                            far.push_back(UnixStream::connect(&to).await.unwrap());
                        }
                        far[0].write_all(&first).await.unwrap();
                        there(1);
                        main.send_replace(true);
                    }
                    main.subscribe().wait_for(|connected| *connected).await.unwrap();
                    let to = far.lock().await.pop_front().expect("as many as were agreed");
                    let (mut to_read, mut to_write) = to.into_split();
                    tokio::select! {
                        () = carry(&mut from_read, &mut to_write, &quiet, &swallowed, there) => {}
                        () = carry(&mut to_read, &mut from_write, &quiet, &swallowed, |_| ()) => {}
                    }
                });
            }
        });
        Link { near, far, silent, swallows, bytes, task }
    }

    fn bytes(&self) -> Vec<u64> {
        self.bytes.lock().unwrap().clone()
    }

    /// As a cut cable: nothing moves any more, and nobody is told.
    fn silence(&self) {
        self.silent.store(true, Ordering::SeqCst);
    }

    /// As buffers on the way do that never get rid of what they hold.
    fn swallow(&self) {
        self.swallows.store(true, Ordering::SeqCst);
    }
}

async fn carry(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    silent: &AtomicBool,
    swallows: &AtomicBool,
    count: impl Fn(usize),
) {
    let mut buffer = vec![0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        if swallows.load(Ordering::SeqCst) {
            continue;
        }
        if silent.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
        count(n);
    }
}

/// A guest in post-copy, with a part of its memory at the source.
struct Flight {
    place: Place,
    link: Link,
    links: u32,
    transport: Transport,
    serving: Serving,
    here: Console,
    there: Console,
    story: Story,
}

impl Flight {
    /// Handed over; the target waits for its go.
    async fn start() -> (Flight, Incoming) {
        Flight::start_by(Transport::default()).await
    }

    async fn start_by(transport: Transport) -> (Flight, Incoming) {
        let place = Place::new(writer());
        let (source, mut here) = place.source().await;
        let mut story = Story::default();
        // Once through its memory, so that all of it is there to lose.
        here.hear(&mut story, 20).await;
        let link = Link::new(&place, 0, transport.connections());
        let mut incoming = Incoming::prepare(&qemu(), &place.machine("target"), &link.far, true).await.unwrap();
        incoming.listen(transport).await.unwrap();
        let there = Console::open(&place.path("target-serial")).await;
        let options = Options { bandwidth: Some(1 << 20), post_copy: true, transport, ..Options::default() };
        let mut outgoing = source.migrate(&link.near, &options, None).await.map_err(|e| e.1).unwrap();
        active(&mut outgoing).await;
        outgoing.switch_to_post_copy().await.unwrap();
        let serving = hand_over(outgoing).await;
        (Flight { place, link, links: 0, transport, serving, here, there, story }, incoming)
    }

    async fn start_and_go() -> (Flight, Filling) {
        Flight::start_and_go_by(Transport::default()).await
    }

    async fn start_and_go_by(transport: Transport) -> (Flight, Filling) {
        let (flight, incoming) = Flight::start_by(transport).await;
        let filling = filling(incoming.go(false).await.map_err(|e| e.error).unwrap());
        (flight, filling)
    }

    /// Cuts the link and waits until both ends say so.
    async fn cut(&mut self, filling: &mut Filling) {
        self.link.task.abort();
        broken(&mut self.serving).await;
        until(async || {
            filling.look().await.unwrap();
            filling.is_broken()
        })
        .await;
        assert_eq!(self.serving.qemu().status().await.unwrap(), RunState::FinishMigrate, "the source never runs it");
        for facts in [self.serving.facts(), filling.facts()] {
            assert!(facts.error.is_some() && facts.broken_us.is_some(), "{facts:?}");
        }
    }

    fn lay(&mut self) -> PathBuf {
        self.links += 1;
        self.link = Link::new(&self.place, self.links, self.transport.connections());
        self.link.far.clone()
    }

    /// Goes on over another link.
    async fn take_up(&mut self, filling: &mut Filling) {
        let far = self.lay();
        filling.take_up(&far).await.unwrap();
        self.serving.take_up(&self.link.near).await.unwrap();
        self.flows().await;
        until(async || {
            filling.look().await.unwrap();
            !filling.is_broken()
        })
        .await;
        assert_eq!(filling.facts().error, None);
    }

    async fn flows(&mut self) {
        let serving = &mut self.serving;
        until(async || {
            serving.look().await.unwrap();
            serving.facts().broken_us.is_none()
        })
        .await;
    }

    /// The rest of its memory comes at once; none of it is lost.
    async fn land(mut self, filling: Filling) -> (Facts, Facts) {
        self.serving.limit_bandwidth(None).await.unwrap();
        let (running, arrived) = fill(filling).await;
        let departed = serve(self.serving).await;
        let left = departed.facts().clone();
        departed.qemu().quit().await;
        self.here.drain(&mut self.story).await;
        // Twice through its memory: every page is verified when it is written to again.
        self.there.hear(&mut self.story, 40).await;
        running.qemu().quit().await;
        (left, arrived)
    }
}

async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let work = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("it does not come about");
}

async fn broken(serving: &mut Serving) {
    until(async || {
        serving.look().await.unwrap();
        serving.facts().status == MigrationStatus::PostcopyPaused
    })
    .await;
}

#[tokio::test]
async fn a_link_that_is_cut_again_and_again_loses_no_page() {
    let (mut flight, mut filling) = Flight::start_and_go().await;
    for _ in 0..3 {
        flight.cut(&mut filling).await;
        flight.take_up(&mut filling).await;
        assert_eq!(filling.facts().status, MigrationStatus::PostcopyActive, "a part is missing still");
    }
    let (left, arrived) = flight.land(filling).await;
    assert_eq!((left.recoveries, arrived.recoveries), (3, 3));
    assert_eq!((left.status, left.error), (MigrationStatus::Completed, None));
}

/// Pages that the target waits for come over a connection of their own, on every link.
#[tokio::test]
async fn missing_pages_overtake_the_others_and_none_is_lost_when_the_link_is_cut() {
    let transport = Transport { preempt: true, ..Transport::default() };
    let (mut flight, mut filling) = {
        let place = Place::new(writer());
        let (source, _) = place.source().await;
        let (version, able) = (source.qemu().version(), source.qemu().ability().preempt);
        source.qemu().quit().await;
        if !able {
            eprintln!(
                "skipped: QEMU {version} has no connection for missing pages that comes after the main one (8.0 on)"
            );
            return;
        }
        Flight::start_and_go_by(transport).await
    };
    for _ in 0..2 {
        // The guest waits for pages that lie behind seconds of others under this cap.
        until(async || flight.link.bytes().get(1).is_some_and(|bytes| *bytes > 4096)).await;
        flight.cut(&mut filling).await;
        flight.take_up(&mut filling).await;
        assert_eq!(filling.facts().status, MigrationStatus::PostcopyActive, "a part is missing still");
    }
    let bytes = flight.link.bytes.clone();
    let (left, arrived) = flight.land(filling).await;
    assert_eq!((left.recoveries, arrived.recoveries), (2, 2));
    assert_eq!((left.status, left.error), (MigrationStatus::Completed, None));
    assert_eq!(bytes.lock().unwrap().len(), transport.connections());
}

#[tokio::test]
async fn a_link_that_falls_silent_is_broken_by_whoever_notices_and_loses_no_page() {
    let (mut flight, mut filling) = Flight::start_and_go().await;
    flight.link.silence();
    // Neither QEMU notices: it is told, at both ends, when another link is there.
    let there = flight.story.beats();
    flight.serving.look().await.unwrap();
    assert_eq!(flight.serving.facts().status, MigrationStatus::PostcopyActive);
    flight.take_up(&mut filling).await;
    let (left, arrived) = flight.land(filling).await;
    assert_eq!((left.recoveries, arrived.recoveries), (1, 1));
    assert!(there > 0);
}

#[tokio::test]
async fn a_link_that_breaks_before_the_go_is_taken_up_before_the_go() {
    let (mut flight, mut incoming) = Flight::start().await;
    until(async || incoming.is_loaded().await.unwrap()).await;
    flight.link.task.abort();
    broken(&mut flight.serving).await;
    until(async || {
        incoming.look().await.unwrap();
        incoming.facts().status == MigrationStatus::PostcopyPaused
    })
    .await;
    assert_eq!(incoming.qemu().status().await.unwrap(), RunState::Paused);
    let far = flight.lay();
    incoming.take_up(&far).await.unwrap();
    flight.serving.take_up(&flight.link.near).await.unwrap();
    flight.flows().await;
    let filling = filling(incoming.go(false).await.map_err(|e| e.error).unwrap());
    let (left, arrived) = flight.land(filling).await;
    assert_eq!((left.recoveries, arrived.recoveries), (1, 1));
}

#[tokio::test]
async fn attempts_that_come_to_nothing_cost_nothing() {
    let (mut flight, mut filling) = Flight::start_and_go().await;
    flight.cut(&mut filling).await;
    // The target listens in vain, and there is nobody for the source to dial.
    filling.take_up(&flight.place.path("nobody-comes")).await.unwrap();
    filling.take_up(&flight.place.path("again")).await.unwrap();
    let nowhere = flight.place.path("nobody-there");
    let refused = flight.serving.take_up(&nowhere).await;
    assert!(matches!(&refused, Err(Error::NoLink(path)) if *path == nowhere), "{refused:?}");
    broken(&mut flight.serving).await;
    flight.take_up(&mut filling).await;
    flight.land(filling).await;
}

/// While both ends compare what the target has. QEMU before 8.2 does not get over that.
#[tokio::test]
async fn a_link_that_breaks_while_it_is_taken_up_loses_no_page() {
    let (mut flight, mut filling) = Flight::start_and_go().await;
    let version = filling.qemu().version();
    if version < (VersionTriple { major: 8, minor: 2, micro: 0 }) {
        eprintln!(
            "skipped: QEMU {version} loses the guest when a link breaks within the few round trips of its recovery"
        );
        return;
    }
    flight.cut(&mut filling).await;
    let far = flight.lay();
    flight.link.silence();
    filling.take_up(&far).await.unwrap();
    flight.serving.take_up(&flight.link.near).await.unwrap();
    let serving = &mut flight.serving;
    until(async || {
        serving.look().await.unwrap();
        serving.facts().status == MigrationStatus::PostcopyRecover
    })
    .await;
    flight.take_up(&mut filling).await;
    let (left, arrived) = flight.land(filling).await;
    assert_eq!((left.recoveries, arrived.recoveries), (1, 1));
}

/// All was sent and not all has arrived: QEMU waits for the target's last word only. 7.2 does not hear of a break then, 10.0 gives up.
#[tokio::test]
async fn a_link_that_breaks_when_all_was_sent_is_said_to_be_the_end_and_the_source_never_runs() {
    let (mut flight, mut filling) = Flight::start_and_go().await;
    flight.link.swallow();
    flight.serving.limit_bandwidth(None).await.unwrap();
    let (near, serving) = (flight.link.near.clone(), &mut flight.serving);
    until(async || {
        serving.look().await.unwrap();
        serving.facts().remaining_bytes == 0
    })
    .await;
    flight.link.task.abort();
    until(async || {
        filling.look().await.unwrap();
        filling.is_broken()
    })
    .await;
    until(async || {
        assert!(serving.take_up(&near).await.is_err());
        serving.facts().is_final()
    })
    .await;
    assert_eq!(serving.facts().status, MigrationStatus::Failed);
    assert!(serving.facts().error.is_some(), "it says why");
    let state = serving.qemu().status().await.unwrap();
    assert!(matches!(state, RunState::FinishMigrate | RunState::Paused | RunState::Postmigrate), "{state:?}");
}
