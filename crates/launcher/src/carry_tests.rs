//! Two launchers on the loopback, between two ends that stand for QEMUs.

use super::*;
use crate::rpc::{MigrationFacts, Transport};
use std::net::TcpListener as StdTcpListener;
use std::os::fd::AsFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const UID: &str = "uid-1";
const PATIENCE: Duration = Duration::from_secs(20);

struct End {
    folder: tempfile::TempDir,
    carrier: Carrier,
    role: MigrationRole,
    identity: MigrationIdentity,
    states: watch::Sender<State>,
    /// What is different in its orders.
    amended: Option<fn(CarryOrder) -> CarryOrder>,
}

impl End {
    fn new(role: MigrationRole) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let migration = (role == MigrationRole::Target).then(|| MigrationFacts::new(UID, role));
        let state = State { phase: DomainPhase::Running, migration, ..State::default() };
        let identity = MigrationIdentity::new(UID, "either").unwrap();
        let carrier = Carrier::new(folder.path().to_owned());
        End { carrier, folder, role, identity, states: watch::Sender::new(state), amended: None }
    }

    /// Hands these connections over. `peer`: whom it talks to; nobody is in the clear.
    async fn carry(
        &self,
        link: u64,
        streams: &[u8],
        connections: Vec<StdTcpStream>,
        peer: Option<&End>,
    ) -> Result<(), Refused> {
        let handed = self.folder.path().join("hand.sock");
        let _ = std::fs::remove_file(&handed);
        let listener = StdUnixListener::bind(&handed).unwrap();
        let hand = tokio::task::spawn_blocking(move || {
            let (stream, _) = listener.accept().unwrap();
            connections.iter().for_each(|connection| descriptor::send(connection.as_fd(), &stream).unwrap());
        });
        let order = CarryOrder {
            migration_uid: UID.into(),
            role: self.role,
            link,
            streams: streams.to_vec(),
            socket: "qemu.sock".into(),
            handed: "hand.sock".into(),
            transport: Transport { channels: 1, ..Transport::default() },
            secured: peer.map(|peer| self.identity.lend(&peer.identity.fingerprint())),
        };
        let order = match self.amended {
            Some(amend) => amend(order),
            None => order,
        };
        let done = self.carrier.carry(order, self.states.subscribe()).await;
        hand.await.unwrap();
        done
    }

    fn qemu(&self) -> PathBuf {
        self.folder.path().join("qemu.sock")
    }

    fn facts(&self) -> Option<CarriedFacts> {
        self.carrier.facts(UID, self.role)
    }

    async fn until(&self, what: impl Fn(&CarriedFacts) -> bool) {
        let seen = async {
            while !self.facts().is_some_and(|facts| what(&facts)) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, seen).await.unwrap_or_else(|_| panic!("{:?}", self.facts()));
    }
}

fn pair() -> (End, End) {
    (End::new(MigrationRole::Source), End::new(MigrationRole::Target))
}

/// Both ends of this many connections.
fn connections(count: usize) -> (Vec<StdTcpStream>, Vec<StdTcpStream>) {
    let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (0..count).map(|_| (StdTcpStream::connect(address).unwrap(), listener.accept().unwrap().0)).unzip()
}

/// A link of two connections between two launchers.
async fn link(source: &End, target: &End, number: u64, secured: bool) -> Result<(), Refused> {
    let (dialled, accepted) = connections(2);
    // They come in any order.
    for (stream, connection) in [1, 0].into_iter().zip(accepted.into_iter().rev()) {
        target.carry(number, &[stream], vec![connection], secured.then_some(source)).await?;
    }
    source.carry(number, &[0, 1], dialled, secured.then_some(target)).await
}

async fn carries(secured: bool) {
    let (source, target) = pair();
    let receiving = UnixListener::bind(target.qemu()).unwrap();
    link(&source, &target, 0, secured).await.unwrap();
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n >> 3) as u8).collect();
    let mut main = UnixStream::connect(source.qemu()).await.unwrap();
    let mut channel = UnixStream::connect(source.qemu()).await.unwrap();
    // What comes over the channel waits until the target has the main one.
    channel.write_all(b"channel").await.unwrap();
    source.until(|facts| facts.out == 7).await;
    let sent = content.clone();
    let sending = tokio::spawn(async move {
        main.write_all(&sent).await.unwrap();
        main.shutdown().await.unwrap();
        let mut answer = Vec::new();
        main.read_to_end(&mut answer).await.unwrap();
        answer
    });
    let (mut arrived, _) = receiving.accept().await.unwrap();
    let mut got = Vec::new();
    arrived.read_to_end(&mut got).await.unwrap();
    assert!(got == content, "{} bytes", got.len());
    arrived.write_all(b"whole").await.unwrap();
    drop(arrived);
    assert_eq!(sending.await.unwrap(), b"whole");
    assert!(source.facts().is_some_and(|facts| facts.flows), "the channel is there");
    let (mut second, _) = receiving.accept().await.unwrap();
    let mut got = [0; 7];
    second.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"channel");
    drop((second, channel));
    source.until(|facts| !facts.flows).await;
    target.until(|facts| !facts.flows).await;
    let (out, back) = (3_000_007, 5);
    let seen = [&source, &target].map(|end| end.facts().map(|f| (f.out, f.back, f.error)));
    assert_eq!(seen, [Some((out, back, None)), Some((back, out, None))]);
}

#[tokio::test]
async fn memory_goes_from_launcher_to_launcher_and_is_counted() {
    carries(true).await;
}

#[tokio::test]
async fn in_the_clear_too() {
    carries(false).await;
}

#[tokio::test]
async fn launchers_that_do_not_know_each_other_carry_nothing_and_take_nobodys_place() {
    let (source, target) = pair();
    let stranger = End::new(MigrationRole::Source);
    let receiving = UnixListener::bind(target.qemu()).unwrap();
    let (dialled, accepted) = connections(2);
    for (stream, connection) in [0, 1].into_iter().zip(accepted) {
        target.carry(0, &[stream], vec![connection], Some(&source)).await.unwrap();
    }
    let refused = stranger.carry(0, &[0, 1], dialled, Some(&target)).await;
    // TLS 1.3: the dialling end may learn it only when it reads.
    if refused.is_ok()
        && let Ok(mut qemu) = UnixStream::connect(stranger.qemu()).await
    {
        let _ = qemu.write_all(b"stranger's").await;
    }
    target.until(|facts| !facts.flows).await;
    use futures::FutureExt;
    assert!(receiving.accept().now_or_never().is_none(), "QEMU has been dialled");
    link(&source, &target, 0, true).await.unwrap();
    assert!(target.facts().is_some_and(|facts| facts.flows && facts.error.is_none()));
}

#[tokio::test]
async fn a_connection_comes_once_and_a_later_link_ends_the_one_before() {
    let (source, target) = pair();
    let receiving = UnixListener::bind(target.qemu()).unwrap();
    link(&source, &target, 0, true).await.unwrap();
    let mut main = UnixStream::connect(source.qemu()).await.unwrap();
    main.write_all(b"first").await.unwrap();
    let (mut arrived, _) = receiving.accept().await.unwrap();
    arrived.read_exact(&mut [0; 5]).await.unwrap();

    let again = target.carry(0, &[0], connections(1).1, Some(&source)).await.unwrap_err();
    assert!(again.message.contains("has been connected before"), "{again:?}");
    let again = source.carry(0, &[0, 1], connections(2).0, Some(&target)).await.unwrap_err();
    assert!(again.message.contains("is carried already"), "{again:?}");

    link(&source, &target, 7, true).await.unwrap();
    assert_eq!(arrived.read(&mut [0; 8]).await.unwrap_or(0), 0, "it is over");
    assert_eq!(main.read(&mut [0; 8]).await.unwrap_or(0), 0, "it is over");
    let late = target.carry(0, &[0], connections(1).1, Some(&source)).await.unwrap_err();
    assert!(late.message.contains("7 has come"), "{late:?}");
    let mut main = UnixStream::connect(source.qemu()).await.unwrap();
    main.write_all(b"second").await.unwrap();
    let (mut arrived, _) = receiving.accept().await.unwrap();
    arrived.read_exact(&mut [0; 6]).await.unwrap();
    assert_eq!(source.facts().map(|facts| (facts.link, facts.out)), Some((7, 11)), "over both");

    target.carrier.cut();
    assert_eq!(main.read(&mut [0; 8]).await.unwrap_or(0), 0);
    drop(main);
    source.until(|facts| !facts.flows).await;
}

#[tokio::test]
async fn a_link_that_was_not_begun_with_can_be_given_up_and_dialled_again() {
    let (source, target) = pair();
    let receiving = UnixListener::bind(target.qemu()).unwrap();
    link(&source, &target, 0, true).await.unwrap();
    source.carrier.carry(CarryOrder::none(UID, 0), source.states.subscribe()).await.unwrap();
    target.until(|facts| !facts.flows).await;
    link(&source, &target, 0, true).await.unwrap();
    let mut main = UnixStream::connect(source.qemu()).await.unwrap();
    main.write_all(b"now").await.unwrap();
    let (mut arrived, _) = receiving.accept().await.unwrap();
    arrived.read_exact(&mut [0; 3]).await.unwrap();
}

#[tokio::test]
async fn only_the_migration_that_is_here_is_carried() {
    let (source, target) = pair();
    let other = MigrationFacts { status: "active".into(), ..MigrationFacts::new("another", MigrationRole::Source) };
    source.states.send_modify(|state| state.migration = Some(other));
    let refused = source.carrier.carry(order_without(&source), source.states.subscribe()).await.unwrap_err();
    assert!(refused.message.contains("another"), "{refused:?}");
    target.states.send_modify(|state| state.migration = None);
    let refused = target.carrier.carry(order_without(&target), target.states.subscribe()).await.unwrap_err();
    assert!(refused.message.contains("no Target"), "{refused:?}");
}

fn order_without(end: &End) -> CarryOrder {
    CarryOrder {
        migration_uid: UID.into(),
        role: end.role,
        link: 0,
        streams: vec![0],
        socket: "qemu.sock".into(),
        handed: "hand.sock".into(),
        transport: Transport::default(),
        secured: None,
    }
}

/// So that a handler knows one that QEMU uses from one that it will never come for.
#[tokio::test]
async fn a_link_awaits_qemu_until_that_has_come_and_is_given_up_only_before() {
    let (source, target) = pair();
    let receiving = UnixListener::bind(target.qemu()).unwrap();
    link(&source, &target, 3, true).await.unwrap();
    assert!(source.facts().is_some_and(|facts| facts.flows && facts.awaits_qemu));
    assert!(target.facts().is_some_and(|facts| facts.flows && !facts.awaits_qemu), "there QEMU is dialled");
    source.carrier.carry(CarryOrder::none(UID, 2), source.states.subscribe()).await.unwrap();
    assert!(source.facts().is_some_and(|facts| facts.flows), "it is a later one");
    let main = UnixStream::connect(source.qemu()).await.unwrap();
    source.until(|facts| facts.flows && !facts.awaits_qemu).await;
    source.carrier.carry(CarryOrder::none(UID, 3), source.states.subscribe()).await.unwrap();
    assert!(source.facts().is_some_and(|facts| facts.flows), "QEMU has come");
    let again = source.carry(3, &[0, 1], connections(2).0, Some(&target)).await.unwrap_err();
    assert!(again.message.contains("is carried already"), "{again:?}");
    drop((main, receiving));

    link(&source, &target, 4, true).await.unwrap();
    source.carrier.carry(CarryOrder::none(UID, 4), source.states.subscribe()).await.unwrap();
    assert_eq!(source.facts(), None);
    target.until(|facts| !facts.flows).await;
}

/// A handler may have opened it and not lived long enough to order anything.
#[tokio::test]
async fn a_link_that_nobody_will_use_is_given_up_by_itself() {
    let (mut source, target) = pair();
    let (sockets, unwanted_after) = (source.folder.path().to_owned(), Duration::from_millis(200));
    source.carrier = Carrier(Arc::new(Inner { sockets, unwanted_after, link: Mutex::default() }));
    // As long as its migration is under way QEMU may come: it may have disks to copy before.
    let under_way = MigrationFacts { status: "setup".into(), ..MigrationFacts::new(UID, MigrationRole::Source) };
    source.states.send_modify(|state| state.migration = Some(under_way));
    link(&source, &target, 0, true).await.unwrap();
    tokio::time::sleep(3 * unwanted_after).await;
    assert!(source.facts().is_some_and(|facts| facts.flows));
    source.states.send_modify(|state| state.migration.as_mut().unwrap().status = "failed".into());
    target.until(|facts| !facts.flows).await;
    assert_eq!(source.facts(), None, "the order to send was refused");

    source.states.send_modify(|state| state.migration = None);
    link(&source, &target, 1, true).await.unwrap();
    target.until(|facts| facts.link == 1 && !facts.flows).await;
    assert_eq!(source.facts(), None, "nobody has ordered anything");

    let receiving = UnixListener::bind(target.qemu()).unwrap();
    link(&source, &target, 2, true).await.unwrap();
    let mut main = UnixStream::connect(source.qemu()).await.unwrap();
    source.until(|facts| facts.link == 2 && !facts.awaits_qemu).await;
    tokio::time::sleep(3 * unwanted_after).await;
    main.write_all(b"here").await.unwrap();
    let (mut arrived, _) = receiving.accept().await.unwrap();
    arrived.read_exact(&mut [0; 4]).await.unwrap();
}

#[tokio::test]
async fn a_link_that_could_not_be_secured_takes_nobodys_place() {
    let (source, mut target) = pair();
    let receiving = UnixListener::bind(target.qemu()).unwrap();
    target.amended = Some(|order| {
        let secured = order.secured.map(|secured| Secured { key: "bm8ga2V5".into(), ..secured });
        CarryOrder { secured, ..order }
    });
    let refused = link(&source, &target, 0, true).await.unwrap_err();
    assert!(refused.message.contains("the other end's identity"), "{refused:?}");
    assert!(!target.facts().is_some_and(|facts| facts.flows));
    target.amended = None;
    link(&source, &target, 0, true).await.unwrap();
    let mut main = UnixStream::connect(source.qemu()).await.unwrap();
    main.write_all(b"now").await.unwrap();
    let (mut arrived, _) = receiving.accept().await.unwrap();
    arrived.read_exact(&mut [0; 3]).await.unwrap();
}

#[tokio::test]
async fn a_connection_is_good_for_its_own_place_alone() {
    let (source, target) = pair();
    let (dialled, accepted) = connections(2);
    for (stream, connection) in [1, 0].into_iter().zip(accepted) {
        target.carry(0, &[stream], vec![connection], Some(&source)).await.unwrap();
    }
    let refused = source.carry(0, &[0, 1], dialled, Some(&target)).await.unwrap_err();
    assert!(refused.message.contains("the target's launcher cannot be talked to"), "{refused:?}");
    target.until(|facts| !facts.flows).await;
    let (dialled, accepted) = connections(2);
    for (stream, connection) in [0, 1].into_iter().zip(accepted) {
        target.carry(1, &[stream], vec![connection], Some(&source)).await.unwrap();
    }
    source.carry(2, &[0, 1], dialled, Some(&target)).await.unwrap_err();
}

/// The task of the VM may wait for a QEMU whose main loop stands still while its memory flows.
#[tokio::test]
async fn what_is_carried_is_told_while_the_vm_says_nothing() {
    let (source, target) = pair();
    let receiving = UnixListener::bind(target.qemu()).unwrap();
    let under_way = MigrationFacts { status: "active".into(), ..MigrationFacts::new(UID, MigrationRole::Source) };
    source.states.send_modify(|state| state.migration = Some(under_way));
    let door = source.folder.path().join("launcher.sock");
    let listener = UnixListener::bind(&door).unwrap();
    let (orders, _unheard) = tokio::sync::mpsc::channel(1);
    let fence = crate::fence::Watchdog::start(source.folder.path().to_owned()).unwrap().fence();
    let (states, carrier, agent) = (source.states.subscribe(), source.carrier.clone(), PathBuf::new());
    let router = crate::server::router(orders, states, fence, carrier, agent);
    let server = tokio::spawn(async move { axum::serve(listener, router).await });
    let client = crate::client::Client::new(&door);
    let mut watch = client.watch().await.unwrap();
    link(&source, &target, 0, true).await.unwrap();
    let mut main = UnixStream::connect(source.qemu()).await.unwrap();
    let out = |state: &State| state.migration.as_ref()?.carried.as_ref().map(|carried| carried.out);
    for bytes in 1..=3 {
        main.write_all(b"x").await.unwrap();
        let told = async { while out(&watch.next().await.unwrap().unwrap()) != Some(bytes) {} };
        tokio::time::timeout(PATIENCE, told).await.unwrap_or_else(|_| panic!("{bytes}: {:?}", source.facts()));
        assert_eq!(out(&client.state().await.unwrap()), Some(bytes));
    }
    server.abort();
    drop(receiving);
}

/// A router, or the source's own kernel, may say why before the time is up.
#[test]
fn a_link_that_ends_with_the_networks_word_was_cut_and_one_that_the_other_end_closes_was_not() {
    use io::ErrorKind::*;
    let was_cut = |kind: io::ErrorKind| {
        let mut streams = Streams::default();
        streams.ended(0, &Err(kind.into()));
        streams.timed_out
    };
    assert!([TimedOut, HostUnreachable, NetworkUnreachable, NetworkDown].into_iter().all(was_cut));
    assert!(![ConnectionReset, BrokenPipe, UnexpectedEof].into_iter().any(was_cut));
}
