//! The channels on the loopback: who is let in, who is not, and that a stream arrives whole.

use std::sync::atomic::Ordering::Relaxed;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::testing::Ca;
use crate::tls::TlsPaths;

const LIMIT: Duration = Duration::from_secs(5);
const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

/// A target whose memory comes so.
struct Echo(Transport);

impl TargetControl for Echo {
    fn answer(self: Arc<Self>, request: Request) -> BoxFuture<'static, Answer> {
        Box::pin(async move {
            match request {
                Request::Clock => Answer::Time { now_us: jiff::Timestamp::now().as_microsecond() + 5_000_000 },
                Request::Offer => {
                    Answer::Offered { post_copy: true, ability: Ability::default(), rooms: Default::default() }
                }
                Request::Carry(_) => Answer::Carries(self.0),
                Request::Go { .. } => Answer::Running { resume_us: 42 },
                Request::Recover => Answer::NotYet { reason: "not here".into() },
                Request::Why => Answer::Because { ended: false, words: None, cause: None },
                Request::Abandon => Answer::Abandoned,
                Request::Frames => Answer::NotYet { reason: "not here".into() },
            }
        })
    }

    fn join(self: Arc<Self>) -> BoxFuture<'static, Result<Inlets, String>> {
        Box::pin(async move { Err("there are no taps here".to_owned()) })
    }

    fn transport(self: Arc<Self>) -> BoxFuture<'static, Result<Transport, String>> {
        Box::pin(async move { Ok(self.0) })
    }
}

struct Stage {
    ca: Ca,
    dir: tempfile::TempDir,
    source: Identity,
    channels: TargetChannels,
    launcher: tokio::net::UnixListener,
}

/// A target on node2 that waits for migration `uid-1` from node1.
async fn stage() -> Stage {
    stage_for(Transport::default()).await
}

/// The same, with memory that comes in this way.
async fn stage_for(transport: Transport) -> Stage {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new();
    let source = ca.identity(dir.path(), "system:node:node1", &[]);
    let target = ca.identity(dir.path(), "system:node:node2", &[]);
    let sockets = Arc::new(SocketDir::open(dir.path().to_owned()).unwrap());
    let launcher = sockets.listen("in.sock").unwrap();
    let options = TargetOptions {
        migration_uid: "uid-1".into(),
        source_node: "node1".into(),
        address: HERE,
        streams: vec![(MEMORY, sockets, "in.sock".into())],
        control: Arc::new(Echo(transport)),
        recoveries: Arc::default(),
    };
    let channels = TargetChannels::open(&target, options).await.unwrap();
    Stage { ca, dir, source, channels, launcher }
}

impl Stage {
    fn target(&self, uid: &str, node: &str) -> Target {
        Target { migration_uid: uid.into(), node: node.into(), address: HERE }
    }

    fn memory(&self) -> u16 {
        self.channels.port(MEMORY).unwrap()
    }

    fn control(&self) -> u16 {
        self.channels.port(CONTROL).unwrap()
    }

    async fn wait_refused(&self, n: u64) {
        tokio::time::timeout(LIMIT, async {
            while self.channels.refused.load(Relaxed) < n {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("the refusal is counted");
        assert_eq!(self.channels.refused.load(Relaxed), n);
    }

    /// Nothing reached the launcher.
    fn assert_launcher_untouched(&mut self) {
        use futures::FutureExt;
        assert!(self.launcher.accept().now_or_never().is_none(), "the launcher's socket was dialled");
    }
}

#[tokio::test]
async fn the_right_source_is_let_in_and_may_come_back_to_the_control_channel() {
    let stage = stage().await;
    let target = stage.target("uid-1", "node2");
    for _ in 0..2 {
        let mut control = Control::connect(&target, &stage.source, stage.control(), LIMIT).await.unwrap();
        assert_eq!(control.ask(Request::Go { paused: false }, LIMIT).await.unwrap(), Answer::Running { resume_us: 42 });
        let offset = control.clock_offset_us(LIMIT).await.unwrap();
        assert!((4_000_000..6_000_000).contains(&offset), "{offset}");
    }
    assert_eq!(stage.channels.refused.load(Relaxed), 0);
}

#[tokio::test]
async fn another_ca_is_refused_by_both_ends() {
    let mut stage = stage().await;
    let other = Ca::new();
    let stranger = other.identity(stage.dir.path(), "system:node:node1", &[]);
    let dialled = stage.target("uid-1", "node2").dial(&stranger, stage.memory(), LIMIT).await;
    assert!(dialled.is_err(), "the stranger does not trust the target");
    stage.wait_refused(1).await;

    // A stranger that trusts everybody is still not trusted.
    let own = stage.ca.pem();
    let stranger_paths = TlsPaths {
        ca: stage.dir.path().join("ca.crt"),
        cert: stage.dir.path().join("tls.crt"),
        key: stage.dir.path().join("tls.key"),
    };
    std::fs::write(&stranger_paths.ca, own).unwrap();
    let trusting = Identity::load(&stranger_paths).unwrap();
    let dialled = stage.target("uid-1", "node2").dial(&trusting, stage.memory(), LIMIT).await;
    assert!(dialled.is_err(), "the target does not trust the stranger");
    stage.wait_refused(2).await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn another_node_of_the_cluster_is_refused_as_source() {
    let mut stage = stage().await;
    let other = stage.ca.identity(stage.dir.path(), "system:node:node3", &["node3"]);
    for port in [stage.memory(), stage.control()] {
        match stage.target("uid-1", "node2").dial(&other, port, LIMIT).await {
            Err(ChannelError::Refused { reason, .. }) => {
                assert_eq!(reason, "peer is [CN=system:node:node3, DNS=node3], expected node node1");
            }
            other => panic!("{:?}", other.err()),
        }
    }
    stage.wait_refused(2).await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn the_source_talks_to_the_expected_target_only() {
    let mut stage = stage().await;
    let error = stage.target("uid-1", "node4").dial(&stage.source, stage.memory(), LIMIT).await.err().unwrap();
    assert!(error.to_string().contains("expected node node4"), "{error}");
    stage.wait_refused(1).await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn a_dns_name_of_the_node_will_do() {
    let stage = stage().await;
    let serving = stage.ca.identity(stage.dir.path(), "kubelet", &["node1"]);
    assert!(stage.target("uid-1", "node2").dial(&serving, stage.control(), LIMIT).await.is_ok());
}

#[tokio::test]
async fn another_migration_is_refused() {
    let mut stage = stage().await;
    for port in [stage.memory(), stage.control()] {
        match stage.target("uid-0", "node2").dial(&stage.source, port, LIMIT).await {
            Err(ChannelError::Refused { reason, .. }) => assert!(reason.contains("uid-0"), "{reason}"),
            other => panic!("{:?}", other.err()),
        }
    }
    stage.wait_refused(2).await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn the_memory_stream_is_accepted_once() {
    let mut stage = stage().await;
    let target = stage.target("uid-1", "node2");
    let first = target.dial(&stage.source, stage.memory(), LIMIT).await.unwrap();
    let _qemu = stage.launcher.accept().await.unwrap();
    match target.dial(&stage.source, stage.memory(), LIMIT).await {
        Err(ChannelError::Refused { reason, .. }) => assert!(reason.contains("connected before"), "{reason}"),
        other => panic!("{:?}", other.err()),
    }
    stage.wait_refused(1).await;
    stage.assert_launcher_untouched();
    drop(first);
}

const THREE: Transport = Transport { channels: 2, zstd: false };

impl Stage {
    /// Connection `number` of the memory stream, with a byte that says so.
    async fn memory_stream(&self, number: u8) -> Dialled {
        let target = self.target("uid-1", "node2");
        let mut dialled = target.dial_stream(&self.source, self.memory(), number, LIMIT).await.unwrap();
        dialled.write_all(&[number]).await.unwrap();
        dialled.flush().await.unwrap();
        dialled
    }

    async fn assert_refused(&self, number: u8, because: &str) {
        match self.target("uid-1", "node2").dial_stream(&self.source, self.memory(), number, LIMIT).await {
            Err(ChannelError::Refused { reason, .. }) => assert!(reason.contains(because), "{reason}"),
            other => panic!("{:?}", other.err()),
        }
    }

    /// QEMU's end of the next connection, and which it is.
    async fn accept(&self) -> (tokio::net::UnixStream, u8) {
        let (mut local, _) = tokio::time::timeout(LIMIT, self.launcher.accept()).await.unwrap().unwrap();
        let number = tokio::time::timeout(LIMIT, local.read_u8()).await.unwrap().unwrap();
        (local, number)
    }
}

#[tokio::test]
async fn the_agreed_connections_come_in_once_and_the_main_one_is_qemus_first() {
    let mut stage = stage_for(THREE).await;
    // The others are there before it.
    let (_two, _one) = (stage.memory_stream(2).await, stage.memory_stream(1).await);
    stage.assert_launcher_untouched();
    let _main = stage.memory_stream(0).await;
    let mut locals = [stage.accept().await, stage.accept().await, stage.accept().await];
    let numbers: Vec<u8> = locals.iter().map(|(_, number)| *number).collect();
    assert_eq!(numbers[0], 0, "{numbers:?}");
    locals.sort_by_key(|(_, number)| *number);
    assert_eq!(locals.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [0, 1, 2]);
    // Each of them once, and none beyond them.
    for number in 0..3 {
        stage.assert_refused(number, "connected before").await;
    }
    stage.assert_refused(3, "for which 3 were agreed").await;
    stage.assert_refused(255, "for which 3 were agreed").await;
    stage.wait_refused(5).await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn a_second_connection_is_refused_where_one_was_agreed() {
    let mut stage = stage().await;
    stage.assert_refused(1, "for which 1 were agreed").await;
    stage.wait_refused(1).await;
    stage.assert_launcher_untouched();
    // That does not take the place of the one that was.
    let _main = stage.memory_stream(0).await;
    assert_eq!(stage.accept().await.1, 0);
}

#[tokio::test]
async fn a_stranger_takes_no_place_among_the_connections() {
    let mut stage = stage_for(THREE).await;
    let other = stage.ca.identity(stage.dir.path(), "system:node:node3", &[]);
    for number in 0..3 {
        let dialled = stage.target("uid-1", "node2").dial_stream(&other, stage.memory(), number, LIMIT).await;
        assert!(dialled.is_err());
        let stale = stage.target("uid-0", "node2").dial_stream(&stage.source, stage.memory(), number, LIMIT).await;
        assert!(stale.is_err());
    }
    stage.wait_refused(6).await;
    stage.assert_launcher_untouched();
    let _streams = [stage.memory_stream(0).await, stage.memory_stream(1).await, stage.memory_stream(2).await];
    let _locals = [stage.accept().await, stage.accept().await, stage.accept().await];
}

#[tokio::test]
async fn a_connection_that_goes_before_it_said_anything_may_come_again() {
    let mut stage = stage_for(THREE).await;
    let target = stage.target("uid-1", "node2");
    drop(target.dial_stream(&stage.source, stage.memory(), 1, LIMIT).await.unwrap());
    // Its end has to be noticed first.
    let again = async {
        while target.dial_stream(&stage.source, stage.memory(), 1, LIMIT).await.is_err() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(LIMIT, again).await.expect("it is let in again");
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn a_connection_that_breaks_takes_the_others_with_it() {
    let stage = stage_for(THREE).await;
    let mut streams = [stage.memory_stream(0).await, stage.memory_stream(1).await, stage.memory_stream(2).await];
    let mut locals = vec![stage.accept().await, stage.accept().await, stage.accept().await];
    locals.sort_by_key(|(_, number)| *number);
    let (broken, _) = locals.remove(1);
    drop(broken);
    // What is written to it now cannot arrive.
    let mut noticed = false;
    for _ in 0..1000 {
        noticed = streams[1].write_all(&[0; 4096]).await.is_err() || streams[1].flush().await.is_err();
        if noticed {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(noticed, "the source hears of it");
    for (local, number) in &mut locals {
        let read = tokio::time::timeout(LIMIT, local.read(&mut [0; 16])).await;
        assert!(matches!(read.expect("it ends"), Ok(0) | Err(_)), "connection {number} goes on");
    }
}

#[tokio::test]
async fn garbage_instead_of_a_greeting_is_refused() {
    let mut stage = stage().await;
    let mut plain = TcpStream::connect((HERE, stage.memory())).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    stage.wait_refused(1).await;

    // The right node that speaks nonsense: an endless line.
    let config = stage.source.client("node2").unwrap();
    let stream = TcpStream::connect((HERE, stage.control())).await.unwrap();
    let mut tls = TlsConnector::from(config).connect(HERE.into(), stream).await.unwrap();
    let _ = tls.write_all(&vec![b'x'; 2 * MAX_LINE as usize]).await;
    let _ = tls.flush().await;
    stage.wait_refused(2).await;
    stage.assert_launcher_untouched();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_stream_arrives_whole_and_the_answer_comes_back() {
    const CHUNKS: u64 = 256;
    let stage = stage().await;
    let dialled = stage.target("uid-1", "node2").dial(&stage.source, stage.memory(), LIMIT).await.unwrap();
    let (mut target_qemu, _) = stage.launcher.accept().await.unwrap();
    let (mut source_qemu, local) = tokio::net::UnixStream::pair().unwrap();
    let carried = Arc::new(Carried::default());
    let source_pump = tokio::spawn(pump::pump(local, dialled, carried.clone()));

    let chunk: Vec<u8> = (0..256 * 1024u32).map(|i| (i % 251) as u8).collect();
    let expected = chunk.clone();
    let began = std::time::Instant::now();
    let writer = tokio::spawn(async move {
        for _ in 0..CHUNKS {
            source_qemu.write_all(&chunk).await.unwrap();
        }
        source_qemu.shutdown().await.unwrap();
        let mut answer = Vec::new();
        source_qemu.read_to_end(&mut answer).await.unwrap();
        answer
    });
    let mut got = vec![0; expected.len()];
    for i in 0..CHUNKS {
        target_qemu.read_exact(&mut got).await.unwrap();
        assert_eq!(got, expected, "chunk {i}");
    }
    let seconds = began.elapsed().as_secs_f64();
    assert_eq!(target_qemu.read(&mut got).await.unwrap(), 0, "the end is passed on");
    target_qemu.write_all(b"loaded").await.unwrap();
    target_qemu.shutdown().await.unwrap();
    assert_eq!(writer.await.unwrap(), b"loaded");
    source_pump.await.unwrap().unwrap();
    let bytes = CHUNKS * expected.len() as u64;
    assert_eq!(carried.out.load(Relaxed), bytes);
    assert_eq!(stage.channels.carried.back.load(Relaxed), bytes);
    println!("{:.0} MiB/s through both pumps and TLS", bytes as f64 / seconds / 1048576.0);
}

/// Says something, then breaks as TLS does without close_notify.
struct Cut(&'static [u8]);

impl tokio::io::AsyncRead for Cut {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        if self.0.is_empty() {
            return std::task::Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        buffer.put_slice(std::mem::take(&mut self.0));
        std::task::Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_source_that_leaves_between_two_lines_is_no_error() {
    let serve = |said| {
        let stream = BufReader::new(tokio::io::join(Cut(said), tokio::io::sink()));
        serve_control(stream, Arc::new(Echo(Transport::default())))
    };
    let line = serde_json::to_string(&Request::Clock).unwrap() + "\n";
    let line: &'static str = Box::leak(line.into_boxed_str());
    serve(b"").await.unwrap();
    serve(line.as_bytes()).await.unwrap();
    let cut = serve(&line.as_bytes()[..line.len() - 2]).await.unwrap_err();
    assert_eq!(cut.kind(), io::ErrorKind::InvalidData);
}
