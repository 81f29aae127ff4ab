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
                Request::Offer => Answer::Offered {
                    post_copy: true,
                    by_reference: false,
                    ability: Ability::default(),
                    rooms: Default::default(),
                    carries: false,
                },
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

    fn carry(self: Arc<Self>, _: CarryOrder) -> BoxFuture<'static, Result<(), String>> {
        Box::pin(async move { Err("there is no launcher here".to_owned()) })
    }

    fn transport(self: Arc<Self>) -> BoxFuture<'static, Result<Transport, String>> {
        Box::pin(async move { Ok(self.0) })
    }
}

struct Stage {
    ca: Ca,
    dir: tempfile::TempDir,
    source: Credentials,
    channels: TargetChannels,
    launcher: tokio::net::UnixListener,
}

/// A target on node2 that waits for migration `uid-1` from node1.
async fn stage() -> Stage {
    stage_for(Transport::default(), false).await
}

/// The same, with memory that comes in this way.
async fn stage_for(transport: Transport, plain: bool) -> Stage {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new();
    let node = ca.identity(dir.path(), "system:node:node1", &[]);
    let source = Credentials { node, own: Some(own("uid-1")), plain };
    let target = ca.identity(dir.path(), "system:node:node2", &[]);
    let (channels, launcher) = listen(&target, dir.path(), "uid-1", transport, plain).await;
    Stage { ca, dir, source, channels, launcher }
}

/// What the source of a migration makes for it.
fn own(uid: &str) -> Arc<MigrationIdentity> {
    Arc::new(MigrationIdentity::new(uid, "source").unwrap())
}

async fn listen(
    identity: &Identity,
    dir: &std::path::Path,
    uid: &str,
    transport: Transport,
    plain: bool,
) -> (TargetChannels, tokio::net::UnixListener) {
    let sockets = Arc::new(SocketDir::open(dir.to_owned()).unwrap());
    let launcher = sockets.listen("in.sock").unwrap();
    let options = TargetOptions {
        migration_uid: uid.into(),
        source_node: "node1".into(),
        plain,
        address: HERE,
        streams: vec![(MEMORY, sockets, "in.sock".into())],
        control: Arc::new(Echo(transport)),
        recoveries: Arc::default(),
    };
    (TargetChannels::open(identity, options).await.unwrap(), launcher)
}

impl Stage {
    fn target(&self, uid: &str, node: &str) -> Target {
        Target { migration_uid: uid.into(), node: node.into(), address: HERE, from: None }
    }

    fn memory(&self) -> (i32, u16) {
        (MEMORY, self.channels.port(MEMORY).unwrap())
    }

    fn control(&self) -> u16 {
        self.channels.port(CONTROL).unwrap()
    }

    /// Somebody else, with the certificate of a node.
    fn other(&self, node: Identity) -> Credentials {
        Credentials { node, own: Some(own("uid-1")), plain: false }
    }

    async fn connect(&self, as_whom: &Credentials) -> Result<Control, ChannelError> {
        Control::connect(&self.target("uid-1", "node2"), as_whom, self.control(), LIMIT).await
    }

    /// What opens the streams, as the source learns it at the control channel.
    async fn key(&self) -> StreamKey {
        self.connect(&self.source).await.unwrap().key
    }

    async fn dial(&self, key: &StreamKey, number: u8) -> Result<Dialled, ChannelError> {
        self.target("uid-1", "node2").dial_stream(key, self.memory(), number, LIMIT).await
    }

    /// `n` have been refused by now, the last one for this reason.
    async fn wait_refused(&self, n: u64, because: &str) {
        let refused = &self.channels.refused;
        tokio::time::timeout(LIMIT, async {
            while refused.count() < n {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("the refusal is counted");
        assert_eq!(refused.count(), n);
        assert!(refused.last().contains(because), "{}", refused.last());
    }

    /// Nothing reached the launcher.
    fn assert_launcher_untouched(&mut self) {
        use futures::FutureExt;
        assert!(self.launcher.accept().now_or_never().is_none(), "the launcher's socket was dialled");
    }
}

/// Refused at the end of a handshake, which the dialling half mostly learns only when it reads.
fn assert_gets_nothing(dialled: Result<Dialled, ChannelError>) {
    let error = dialled.expect_err("it is not let in");
    assert!(matches!(error, ChannelError::Io { .. }), "{error}");
}

#[tokio::test]
async fn the_right_source_is_let_in_and_may_come_back_to_the_control_channel() {
    let stage = stage().await;
    for _ in 0..2 {
        let mut control = stage.connect(&stage.source).await.unwrap();
        assert_eq!(control.ask(Request::Go { paused: false }, LIMIT).await.unwrap(), Answer::Running { resume_us: 42 });
        let offset = control.clock_offset_us(LIMIT).await.unwrap();
        assert!((4_000_000..6_000_000).contains(&offset), "{offset}");
    }
    assert_eq!(stage.channels.refused.count(), 0);
}

#[tokio::test]
async fn another_ca_is_refused_by_both_ends() {
    let mut stage = stage().await;
    let other = Ca::new();
    let stranger = stage.other(other.identity(stage.dir.path(), "system:node:node1", &[]));
    assert!(stage.connect(&stranger).await.is_err(), "the stranger does not trust the target");
    stage.wait_refused(1, "handshake: ").await;

    // A stranger that trusts everybody is still not trusted.
    let own = stage.ca.pem();
    let stranger_paths = TlsPaths {
        ca: stage.dir.path().join("ca.crt"),
        cert: stage.dir.path().join("tls.crt"),
        key: stage.dir.path().join("tls.key"),
    };
    std::fs::write(&stranger_paths.ca, own).unwrap();
    let trusting = stage.other(Identity::load(&stranger_paths).unwrap());
    assert!(stage.connect(&trusting).await.is_err(), "the target does not trust the stranger");
    stage.wait_refused(2, "invalid peer certificate").await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn another_node_of_the_cluster_is_refused_as_source() {
    let mut stage = stage().await;
    let other = stage.other(stage.ca.identity(stage.dir.path(), "system:node:node3", &["node3"]));
    match stage.connect(&other).await {
        Err(ChannelError::Refused { reason, .. }) => {
            assert_eq!(reason, "peer is [CN=system:node:node3, DNS=node3], expected node node1");
        }
        other => panic!("{:?}", other.err()),
    }
    stage.wait_refused(1, "CN=system:node:node3").await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn an_expired_certificate_of_the_right_node_is_refused() {
    let mut stage = stage().await;
    let expired = stage.other(stage.ca.expired(stage.dir.path(), "system:node:node1"));
    let error = stage.connect(&expired).await.err().unwrap();
    assert!(error.to_string().contains("CertificateExpired") || error.to_string().contains("expired"), "{error}");
    stage.wait_refused(1, "xpired").await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn the_source_talks_to_the_expected_target_only() {
    let mut stage = stage().await;
    let target = stage.target("uid-1", "node4");
    let error = Control::connect(&target, &stage.source, stage.control(), LIMIT).await.err().unwrap();
    assert!(error.to_string().contains("expected node node4"), "{error}");
    stage.wait_refused(1, "handshake: ").await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn a_dns_name_of_the_node_will_do() {
    let stage = stage().await;
    let serving = stage.other(stage.ca.identity(stage.dir.path(), "kubelet", &["node1"]));
    assert!(stage.connect(&serving).await.is_ok());
}

#[tokio::test]
async fn another_migration_is_refused() {
    let mut stage = stage().await;
    let target = stage.target("uid-0", "node2");
    let key = stage.key().await;
    let control = Control::connect(&target, &stage.source, stage.control(), LIMIT).await.err();
    let memory = target.dial_stream(&key, stage.memory(), 0, LIMIT).await.err();
    for error in [control, memory] {
        match error {
            Some(ChannelError::Refused { reason, .. }) => assert!(reason.contains("uid-0"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    stage.wait_refused(2, "uid-0").await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn streams_are_closed_until_the_source_has_been_at_the_control_channel() {
    let mut stage = stage().await;
    let key = StreamKey::Tls(stage.source.node.client("node2").unwrap());
    assert_gets_nothing(stage.dial(&key, 0).await);
    stage.wait_refused(1, "control channel yet").await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn no_nodes_certificate_opens_a_stream() {
    let mut stage = stage().await;
    drop(stage.key().await);
    // Not a third node's, and not the source node's own.
    for node in ["system:node:node3", "system:node:node1"] {
        let identity = stage.ca.identity(stage.dir.path(), node, &[]);
        // It would talk to anybody.
        let key = StreamKey::Tls(trusting(identity.client("node2").unwrap()));
        assert_gets_nothing(stage.dial(&key, 0).await);
    }
    stage.wait_refused(2, "peer is [CN=system:node:node1]").await;
    stage.assert_launcher_untouched();
}

/// The same configuration, which takes anybody for the right target.
fn trusting(config: Arc<ClientConfig>) -> Arc<ClientConfig> {
    let mut config = (*config).clone();
    config.dangerous().set_certificate_verifier(Arc::new(Anybody));
    Arc::new(config)
}

#[derive(Debug)]
struct Anybody;

impl rustls::client::danger::ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

#[tokio::test]
async fn what_the_same_two_nodes_held_for_the_last_migration_opens_nothing() {
    let mut stage = stage().await;
    // The guest went this way before, between the same two nodes.
    let (last, _launcher) = {
        let target = stage.ca.identity(stage.dir.path(), "system:node:node2", &[]);
        std::fs::create_dir(stage.dir.path().join("last")).unwrap();
        listen(&target, &stage.dir.path().join("last"), "uid-0", Transport::default(), false).await
    };
    let former = Credentials {
        node: stage.ca.identity(stage.dir.path(), "system:node:node1", &[]),
        own: Some(own("uid-0")),
        plain: false,
    };
    let place = stage.target("uid-0", "node2");
    let stale = Control::connect(&place, &former, last.port(CONTROL).unwrap(), LIMIT).await.unwrap().key;
    let StreamKey::Tls(config) = &stale else { panic!("encrypted") };
    let stale = StreamKey::Tls(trusting(config.clone()));
    place.dial_stream(&stale, (MEMORY, last.port(MEMORY).unwrap()), 0, LIMIT).await.expect("it was good then");
    drop(last);

    // Neither before this migration's source has come nor after does it open a stream of this one, whatever it says.
    assert_gets_nothing(stage.dial(&stale, 0).await);
    stage.wait_refused(1, "control channel yet").await;
    let fresh = stage.key().await;
    assert_gets_nothing(stage.dial(&stale, 0).await);
    stage.wait_refused(2, "peer is [CN=migration uid-0 source]").await;
    // It is no node's certificate either.
    let control = (CONTROL, stage.control());
    assert_gets_nothing(stage.target("uid-1", "node2").dial_stream(&stale, control, 0, LIMIT).await);
    stage.wait_refused(3, "UnknownIssuer").await;
    stage.assert_launcher_untouched();
    // And it has taken nobody's place.
    let _stream = stage.dial(&fresh, 0).await.unwrap();
}

#[tokio::test]
async fn the_source_gives_nothing_to_a_target_of_the_last_migration() {
    let stage = stage().await;
    let own = own("uid-1");
    let stale = StreamKey::Tls(own.client(&own.fingerprint()).unwrap());
    drop(stage.key().await);
    let error = stage.dial(&stale, 0).await.err().unwrap();
    assert!(error.to_string().contains("not the identity that was made for this migration"), "{error}");
}

#[tokio::test]
async fn a_source_that_has_restarted_is_known_by_its_new_identity_only() {
    let stage = stage().await;
    let before = stage.key().await;
    let again = Credentials {
        node: stage.ca.identity(stage.dir.path(), "system:node:node1", &[]),
        own: Some(own("uid-1")),
        plain: false,
    };
    let after = stage.connect(&again).await.unwrap().key;
    assert_gets_nothing(stage.dial(&before, 0).await);
    stage.wait_refused(1, "not the identity").await;
    let _stream = stage.dial(&after, 0).await.unwrap();
}

#[tokio::test]
async fn a_greeting_without_an_identity_takes_none_back() {
    let stage = stage().await;
    let key = stage.key().await;
    let node = stage.ca.identity(stage.dir.path(), "system:node:node1", &[]);
    let without = Credentials { node, own: None, plain: false };
    let nodes = stage.connect(&without).await.unwrap().key;
    let StreamKey::Tls(config) = nodes else { panic!("encrypted") };
    assert_gets_nothing(stage.dial(&StreamKey::Tls(trusting(config)), 0).await);
    stage.wait_refused(1, "peer is [CN=system:node:node1]").await;
    let _stream = stage.dial(&key, 0).await.unwrap();
}

/// What is recorded on the wire between the source and a target.
struct Wiretap {
    address: SocketAddr,
    recorded: tokio::task::JoinHandle<Vec<u8>>,
}

/// Passes one connection on to `port`, and keeps what the dialling half said.
async fn wiretap(port: u16) -> Wiretap {
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let recorded = tokio::spawn(async move {
        let (from, _) = listener.accept().await.unwrap();
        let to = TcpStream::connect((HERE, port)).await.unwrap();
        let ((mut from_read, mut from_write), (mut to_read, mut to_write)) = (from.into_split(), to.into_split());
        let back = tokio::spawn(async move { tokio::io::copy(&mut to_read, &mut from_write).await });
        let mut said = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from_read.read(&mut buffer).await {
            said.extend_from_slice(&buffer[..n]);
            to_write.write_all(&buffer[..n]).await.unwrap();
        }
        back.abort();
        said
    });
    Wiretap { address, recorded }
}

/// What was recorded, said once more: nothing comes of it.
async fn replay(mut stage: Stage, because: &str) {
    let key = stage.key().await;
    let tap = wiretap(stage.memory().1).await;
    let target = stage.target("uid-1", "node2");
    let mut dialled = target.dial_stream(&key, (MEMORY, tap.address.port()), 0, LIMIT).await.unwrap();
    dialled.write_all(b"memory").await.unwrap();
    dialled.flush().await.unwrap();
    let (mut qemu, _) = stage.launcher.accept().await.unwrap();
    let mut got = [0; 6];
    qemu.read_exact(&mut got).await.unwrap();
    dialled.shutdown().await.unwrap();
    drop(dialled);
    let recorded = tap.recorded.await.unwrap();

    let mut again = TcpStream::connect((HERE, stage.memory().1)).await.unwrap();
    let _ = again.write_all(&recorded).await;
    stage.wait_refused(1, because).await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn a_recorded_connection_is_worth_nothing() {
    replay(stage().await, "handshake: ").await;
}

#[tokio::test]
async fn a_recorded_connection_in_the_clear_is_worth_nothing() {
    replay(stage_for(Transport::default(), true).await, "does not know this migration's secret").await;
}

#[tokio::test]
async fn an_older_source_has_its_nodes_certificate_only_and_is_let_in_by_it() {
    let mut stage = stage().await;
    let nodes = stage.source.node.client("node2").unwrap();
    let older = StreamKey::Tls(nodes.clone());
    // It says nothing of identities.
    let target = stage.target("uid-1", "node2");
    let greeting = Greeting { migration_uid: "uid-1".into(), ..Greeting::default() };
    let (_control, welcome) = target.greet(nodes, stage.control(), &greeting).await.unwrap();
    assert!(welcome.identity.is_none() && welcome.secret.is_none());
    // Another node gains nothing by that.
    let third = stage.ca.identity(stage.dir.path(), "system:node:node3", &[]);
    let third = StreamKey::Tls(third.client("node2").unwrap());
    assert!(matches!(stage.dial(&third, 0).await, Err(ChannelError::Refused { .. })));
    stage.wait_refused(1, "CN=system:node:node3").await;
    stage.assert_launcher_untouched();
    let _stream = stage.dial(&older, 0).await.unwrap();
    let _qemu = stage.launcher.accept().await.unwrap();
}

#[tokio::test]
async fn an_older_target_tells_no_identity_and_gets_its_streams_by_its_nodes_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new();
    let source =
        Credentials { node: ca.identity(dir.path(), "system:node:node1", &[]), own: Some(own("uid-1")), plain: true };
    let older = TlsAcceptor::from(ca.identity(dir.path(), "system:node:node2", &[]).server().unwrap());
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = tokio::spawn(async move {
        let mut seen = Vec::new();
        for _ in 0..2 {
            let stream = older.accept(listener.accept().await.unwrap().0).await.unwrap();
            let shown = stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned();
            let mut stream = BufReader::new(stream);
            let _: Option<serde_json::Value> = read_line(&mut stream).await.unwrap();
            stream.write_all(b"{\"accepted\":true}\n").await.unwrap();
            stream.flush().await.unwrap();
            seen.push((crate::tls::check_node(&shown, "node1"), stream));
        }
        seen.into_iter().map(|(shown, _)| shown).collect::<Vec<_>>()
    });
    let target = Target { migration_uid: "uid-1".into(), node: "node2".into(), address: HERE, from: None };
    let control = Control::connect(&target, &source, port, LIMIT).await.unwrap();
    target.dial_stream(&control.key, (MEMORY, port), 0, LIMIT).await.unwrap();
    assert_eq!(serve.await.unwrap(), [Ok(()), Ok(())]);
}

#[tokio::test]
async fn in_the_clear_is_what_both_ends_want() {
    // The wire shows what is sent.
    let stage = stage_for(Transport::default(), true).await;
    let key = stage.key().await;
    assert!(matches!(key, StreamKey::Secret(_)));
    let tap = wiretap(stage.memory().1).await;
    let target = stage.target("uid-1", "node2");
    let mut dialled = target.dial_stream(&key, (MEMORY, tap.address.port()), 0, LIMIT).await.unwrap();
    dialled.write_all(b"memory of a guest").await.unwrap();
    dialled.shutdown().await.unwrap();
    drop(dialled);
    let said = tap.recorded.await.unwrap();
    let said = String::from_utf8(said).expect("no cipher text");
    assert!(said.ends_with("memory of a guest"), "{said}");
    let StreamKey::Secret(secret) = key else { unreachable!() };
    assert!(!said.contains(&*secret), "the secret itself never goes over it");

    // One end alone does not have its way.
    let wants =
        Credentials { plain: true, ..stage.other(stage.ca.identity(stage.dir.path(), "system:node:node1", &[])) };
    let unwilling = stage_for(Transport::default(), false).await;
    let own_ca = Credentials { node: unwilling.ca.identity(unwilling.dir.path(), "system:node:node1", &[]), ..wants };
    assert!(matches!(unwilling.connect(&own_ca).await.unwrap().key, StreamKey::Tls(_)));
    let does_not =
        Credentials { plain: false, ..stage.other(stage.ca.identity(stage.dir.path(), "system:node:node1", &[])) };
    assert!(matches!(stage.connect(&does_not).await.unwrap().key, StreamKey::Tls(_)));
}

#[tokio::test]
async fn a_stranger_gets_nothing_in_the_clear_either() {
    let mut stage = stage_for(THREE, true).await;
    let StreamKey::Secret(secret) = stage.key().await else { panic!("in the clear") };
    match stage.dial(&StreamKey::Secret("a guess".into()), 0).await {
        Err(ChannelError::Refused { reason, .. }) => assert!(reason.contains("does not know"), "{reason}"),
        other => panic!("{:?}", other.err()),
    }
    // What one connection said does not open another.
    let mut stream = BufReader::new(TcpStream::connect((HERE, stage.memory().1)).await.unwrap());
    let Question { question } = read_line(&mut stream).await.unwrap().unwrap();
    let claim = Claim { end: "source", uid: "uid-1", inner: MEMORY, place: 1.into(), question: &question };
    let greeting = Greeting {
        migration_uid: "uid-1".into(),
        place: 2.into(),
        proof: Some(claim.proof(&secret)),
        ..Greeting::default()
    };
    write_line(&mut stream, &greeting).await.unwrap();
    let welcome: Welcome = read_line(&mut stream).await.unwrap().unwrap();
    assert!(!welcome.accepted);
    stage.wait_refused(2, "does not know this migration's secret").await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn memory_in_the_clear_is_not_given_to_whoever_answers() {
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let impostor = tokio::spawn(async move {
        let mut stream = BufReader::new(listener.accept().await.unwrap().0);
        write_line(&mut stream, &Question { question: "q".into() }).await.unwrap();
        let _: Option<Greeting> = read_line(&mut stream).await.unwrap();
        write_line(&mut stream, &Welcome { accepted: true, ..Welcome::default() }).await.unwrap();
        let mut said = Vec::new();
        stream.read_to_end(&mut said).await.unwrap();
        said
    });
    let target = Target { migration_uid: "uid-1".into(), node: "node2".into(), address: HERE, from: None };
    let dialled = target.dial_stream(&StreamKey::Secret("secret".into()), (MEMORY, port), 0, LIMIT).await;
    let error = dialled.err().unwrap();
    assert!(error.to_string().contains("does not know this migration's secret"), "{error}");
    assert!(impostor.await.unwrap().is_empty());
}

#[tokio::test]
async fn the_memory_stream_is_accepted_once() {
    let mut stage = stage().await;
    let key = stage.key().await;
    let first = stage.dial(&key, 0).await.unwrap();
    let _qemu = stage.launcher.accept().await.unwrap();
    match stage.dial(&key, 0).await {
        Err(ChannelError::Refused { reason, .. }) => assert!(reason.contains("connected before"), "{reason}"),
        other => panic!("{:?}", other.err()),
    }
    stage.wait_refused(1, "connected before").await;
    stage.assert_launcher_untouched();
    drop(first);
}

const THREE: Transport = Transport { channels: 2, zstd: false, preempt: false };

impl Stage {
    /// Connection `number` of the memory stream, with a byte that says so.
    async fn memory_stream(&self, number: u8) -> Dialled {
        let mut dialled = self.dial(&self.key().await, number).await.unwrap();
        dialled.write_all(&[number]).await.unwrap();
        dialled.flush().await.unwrap();
        dialled
    }

    async fn assert_refused(&self, number: u8, because: &str) {
        match self.dial(&self.key().await, number).await {
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
    let mut stage = stage_for(THREE, false).await;
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
    stage.wait_refused(5, "for which 3 were agreed").await;
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn a_second_connection_is_refused_where_one_was_agreed() {
    let mut stage = stage().await;
    stage.assert_refused(1, "for which 1 were agreed").await;
    stage.wait_refused(1, "for which 1 were agreed").await;
    stage.assert_launcher_untouched();
    // That does not take the place of the one that was.
    let _main = stage.memory_stream(0).await;
    assert_eq!(stage.accept().await.1, 0);
}

#[tokio::test]
async fn a_stranger_takes_no_place_among_the_connections() {
    let mut stage = stage_for(THREE, false).await;
    let key = stage.key().await;
    let other = stage.ca.identity(stage.dir.path(), "system:node:node3", &[]);
    let other = StreamKey::Tls(trusting(other.client("node2").unwrap()));
    for number in 0..3 {
        assert_gets_nothing(stage.dial(&other, number).await);
        let stale = stage.target("uid-0", "node2").dial_stream(&key, stage.memory(), number, LIMIT).await;
        assert!(stale.is_err());
    }
    stage.wait_refused(6, "uid-0").await;
    stage.assert_launcher_untouched();
    let _streams = [stage.memory_stream(0).await, stage.memory_stream(1).await, stage.memory_stream(2).await];
    let _locals = [stage.accept().await, stage.accept().await, stage.accept().await];
}

#[tokio::test]
async fn a_connection_that_goes_before_it_said_anything_may_come_again() {
    let mut stage = stage_for(THREE, false).await;
    let key = stage.key().await;
    drop(stage.dial(&key, 1).await.unwrap());
    // Its end has to be noticed first.
    let again = async {
        while stage.dial(&key, 1).await.is_err() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(LIMIT, again).await.expect("it is let in again");
    stage.assert_launcher_untouched();
}

#[tokio::test]
async fn a_connection_that_breaks_takes_the_others_with_it() {
    let stage = stage_for(THREE, false).await;
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
    drop(stage.key().await);
    let mut plain = TcpStream::connect((HERE, stage.memory().1)).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    stage.wait_refused(1, "handshake: ").await;

    // The right node that speaks nonsense: an endless line.
    let config = stage.source.node.client("node2").unwrap();
    let stream = TcpStream::connect((HERE, stage.control())).await.unwrap();
    let mut tls = TlsConnector::from(config).connect(HERE.into(), stream).await.unwrap();
    let _ = tls.write_all(&vec![b'x'; 2 * MAX_LINE as usize]).await;
    let _ = tls.flush().await;
    stage.wait_refused(2, "greeting: ").await;
    stage.assert_launcher_untouched();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_stream_arrives_whole_and_the_answer_comes_back() {
    long_stream(stage().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_does_one_in_the_clear() {
    long_stream(stage_for(Transport::default(), true).await).await;
}

async fn long_stream(stage: Stage) {
    const CHUNKS: u64 = 256;
    let dialled = stage.dial(&stage.key().await, 0).await.unwrap();
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
    println!("{:.0} MiB/s through both pumps", bytes as f64 / seconds / 1048576.0);
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
        answer_all(stream, Arc::new(Echo(Transport::default())))
    };
    let line = serde_json::to_string(&Request::Clock).unwrap() + "\n";
    let line: &'static str = Box::leak(line.into_boxed_str());
    serve(b"").await.unwrap();
    serve(line.as_bytes()).await.unwrap();
    let cut = serve(&line.as_bytes()[..line.len() - 2]).await.unwrap_err();
    assert_eq!(cut.kind(), io::ErrorKind::InvalidData);
}
