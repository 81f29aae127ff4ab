//! The mTLS channels between the two handlers of one migration.
//!
//! The target's handler listens on one random port a channel; the source's handler dials. On the control channel each end
//! first checks that the other is the node recorded in the VMI's `migrationState`; then the source sends one line,
//! `{"migrationUid": "…", "identity": "…"}`, and the target answers `{"accepted": true, "identity": "…"}` or
//! `{"refused": "why"}`. The other channels are open to those two identities only ([`crate::credentials`]); a first line and an
//! answer open each of their connections too. An older handler tells no identity: then the streams are for the two nodes.
//!
//! - The memory channel is accepted once for each of the connections that were agreed over the control channel
//!   ([`Request::Carry`]), and once when nothing was. The greeting says which of them it is (`stream`, from 0, QEMU's main
//!   connection). A further one, of whoever, is refused. What follows the greeting is QEMU's stream, both ways. In post-copy
//!   another link may follow one that broke ([`Request::Recover`]); its greeting has the number that was answered (`recovery`).
//!   A connection that is the launchers' (`launcher` in its greeting) ends here with the answer: what follows is theirs
//!   ([`godwit_launcher::carry`]).
//! - The blocks channel, for disks that are not shared, carries one NBD connection a connection.
//! - The control channel carries one JSON request a line and one JSON answer a line. It may be dialled again (a handler that
//!   restarts does that): every request can be repeated without harm. A second connection to it carries the guest's frames in
//!   the last moments ([`Request::Frames`]).

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use godwit_launcher::carry::pump::{self, Carried};
use godwit_launcher::rpc::{Ability, CarryOrder, Cause, DiskRoom, Transport};
use rustls::ClientConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::either::Either;

use crate::credentials::{Claim, Fingerprint, MigrationIdentity};
use crate::door::{Door, Guest, Keys, Refusals};
use crate::frames::{self, Inlets};
use crate::migration_network::Underlay;
use crate::recovery::Recoveries;
use crate::sockets::SocketDir;
use crate::streams::{Memory, Stream};
use crate::tls::{Identity, TlsError};

/// Inner port of the control channel in `targetDirectMigrationNodePorts` (KubeVirt's number for the hypervisor's own socket).
pub const CONTROL: i32 = 0;
/// Inner port of the memory stream.
pub const MEMORY: i32 = 49152;
/// Inner port of disks' blocks.
pub const BLOCKS: i32 = 49153;

/// Longest line of the control protocol; more is a broken or hostile peer.
const MAX_LINE: u64 = 64 * 1024;
/// Why a channel could not be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// Our own certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The network or the handshake failed.
    #[error("{what} {address}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With whom.
        address: SocketAddr,
        /// The reason.
        source: io::Error,
    },
    /// The target's handler said no.
    #[error("the target's handler at {address} refused: {reason}")]
    Refused {
        /// Who.
        address: SocketAddr,
        /// In its words.
        reason: String,
    },
    /// The launcher here said no.
    #[error("the source's launcher cannot carry the memory stream: {0}")]
    Launcher(String),
}

impl ChannelError {
    /// Whether the target's node answers, but no handler that knows of this migration is there.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        match self {
            Self::Tls(_) | Self::Launcher(_) => false,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::ConnectionRefused,
            Self::Refused { .. } => true,
        }
    }
}

/// First line on a connection.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Greeting {
    /// What it is for.
    pub migration_uid: String,
    /// Which connection it is.
    #[serde(flatten)]
    pub place: Place,
    /// At the control channel: what the source's streams will be known by. A handler that does not know of that says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Fingerprint>,
    /// At the control channel: the streams shall go in the clear.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
    /// On a connection of the memory stream: after the welcome it is the launchers', who secure it anew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub launcher: bool,
    /// On a stream in the clear: the answer to the [`Question`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<String>,
}

/// What a connection is for, among those of the same channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Place {
    /// Which connection of the memory stream it is.
    #[serde(skip_serializing_if = "is_main")]
    pub stream: u8,
    /// Which link of a post-copy, after the first one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery: Option<u64>,
}

impl From<u8> for Place {
    /// Connection `stream` of the first link.
    fn from(stream: u8) -> Self {
        Self { stream, recovery: None }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_main(stream: &u8) -> bool {
    *stream == 0
}

/// Its answer.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Welcome {
    /// Come in.
    pub accepted: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// At the control channel: what the target will be known by on the streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<Fingerprint>,
    /// At the control channel: the streams go in the clear, and this is what both ends prove to know there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    /// On a stream in the clear: the target's own proof.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proof: Option<String>,
}

/// The target's first line on a stream in the clear.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Question {
    /// Never asked before.
    pub question: String,
}

/// What the source's handler asks over the control channel. All can be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "camelCase")]
pub enum Request {
    /// What is the time at your end?
    Clock,
    /// How can the target's QEMU receive?
    Offer,
    /// Memory is going to come in this way.
    Carry(Transport),
    /// The source is stopped for good, and that is written down: run the guest.
    Go {
        /// Its user had paused it: it stays so.
        #[serde(default)]
        paused: bool,
    },
    /// The link of a post-copy broke: wait for another one.
    Recover,
    /// The migration has failed: what is known of it at your end?
    Why,
    /// The guest stays at the source: end the waiting QEMU.
    Abandon,
    /// The guest stands still: its taps are to hear their segments, and what comes in for it at the source follows on this
    /// connection, which takes no further requests ([`crate::frames`]).
    Frames,
}

/// The answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Answer {
    /// To [`Request::Clock`]: microseconds since the Unix epoch.
    Time {
        /// By the target node's clock.
        now_us: i64,
    },
    /// To [`Request::Offer`].
    Offered {
        /// In post-copy.
        post_copy: bool,
        /// It has the source's own memory, and takes no pages.
        #[serde(default)]
        by_reference: bool,
        /// Over several connections, and compressed. A handler that does not know of that says nothing.
        #[serde(default)]
        ability: Ability,
        /// By volume, what there is for the disks that are copied.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        rooms: BTreeMap<String, DiskRoom>,
        /// Its launcher can carry the memory stream. An older handler says nothing.
        #[serde(default)]
        carries: bool,
    },
    /// To [`Request::Carry`]: this is how it is received. What was agreed first stands.
    Carries(Transport),
    /// To [`Request::Why`].
    Because {
        /// QEMU is not there any more.
        ended: bool,
        /// What went wrong, if anything did, in QEMU's words where it has some.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        words: Option<String>,
        /// Of what kind that is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cause: Option<Cause>,
    },
    /// To [`Request::Go`]: the guest runs at the target.
    Running {
        /// When it resumed (or arrived, if it stays paused), microseconds since the Unix epoch by the target node's clock.
        resume_us: i64,
    },
    /// To [`Request::Recover`]: the target's QEMU waits for the link of this number. Every earlier one is over.
    Recovering {
        /// For its greeting.
        number: u64,
    },
    /// To [`Request::Abandon`].
    Abandoned,
    /// To [`Request::Frames`]: they may come.
    Takes,
    /// Not now; ask again.
    NotYet {
        /// Why.
        reason: String,
    },
    /// To [`Request::Go`] and [`Request::Recover`]: the state that was received is gone for good; nobody can run this guest
    /// any more.
    Lost {
        /// What happened.
        reason: String,
    },
}

/// What the target's handler does when it is asked.
pub trait TargetControl: Send + Sync + 'static {
    /// Carries out one request.
    fn answer(self: Arc<Self>, request: Request) -> BoxFuture<'static, Answer>;

    /// Has the guest's taps hear their segments: where frames go that came in for it at the source.
    fn join(self: Arc<Self>) -> BoxFuture<'static, Result<Inlets, String>>;

    /// Has the launcher carry a connection of the memory stream.
    fn carry(self: Arc<Self>, order: CarryOrder) -> BoxFuture<'static, Result<(), String>>;

    /// How memory comes: as was agreed, or, where nothing has been, as QEMU's plain stream from now on.
    fn transport(self: Arc<Self>) -> BoxFuture<'static, Result<Transport, String>>;
}

/// What the target listens for.
pub struct TargetOptions {
    /// UID of the migration that may greet.
    pub migration_uid: String,
    /// The only node that may connect.
    pub source_node: String,
    /// The streams go in the clear if the source wants that too.
    pub plain: bool,
    /// Address to listen on.
    pub address: IpAddr,
    /// The launcher's sockets for the streams, by inner port; none opens only the control channel.
    pub streams: Vec<(i32, Arc<SocketDir>, String)>,
    /// Who answers on the control channel.
    pub control: Arc<dyn TargetControl>,
    /// Links that follow a broken one.
    pub recoveries: Arc<Recoveries>,
}

/// The listening half. Dropping it closes listeners and connections.
pub struct TargetChannels {
    /// Address that was bound.
    pub address: IpAddr,
    /// TCP port → inner port, for each channel.
    pub ports: BTreeMap<u16, i32>,
    /// Bytes of the streams so far.
    pub carried: Arc<Carried>,
    /// Connections that were refused.
    pub refused: Arc<Refusals>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for TargetChannels {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl TargetChannels {
    /// Opens the listeners on random ports.
    ///
    /// # Errors
    /// When the node's certificate cannot be used or the address cannot be bound.
    pub async fn open(identity: &Identity, options: TargetOptions) -> Result<Self, ChannelError> {
        let nodes = TlsAcceptor::from(identity.server()?);
        let keys = Arc::new(Keys::new(&options.migration_uid, options.plain)?);
        let refused = Arc::new(Refusals::default());
        let carried = Arc::new(Carried::default());
        let door = |channel, inner| Door {
            channel,
            inner,
            uid: options.migration_uid.clone(),
            source_node: options.source_node.clone(),
            nodes: nodes.clone(),
            keys: keys.clone(),
            refused: refused.clone(),
        };
        let mut tasks = Vec::new();
        let (listener, control_port) = bind(options.address).await?;
        let mut memory = Some(Memory::new(options.control.clone(), options.recoveries));
        let control = options.control;
        tasks.push(tokio::spawn(door("control", CONTROL).serve(listener, move |guest| {
            let control = control.clone();
            async move {
                if let Err(error) = serve_control(guest, control).await {
                    tracing::info!(%error, "control channel ended");
                }
            }
        })));
        let mut ports = BTreeMap::from([(control_port, CONTROL)]);
        for (inner, dir, socket) in options.streams {
            let (listener, port) = bind(options.address).await?;
            ports.insert(port, inner);
            let stream = Arc::new(Stream {
                channel: if inner == MEMORY { "memory" } else { "blocks" },
                memory: memory.take_if(|_| inner == MEMORY),
                uid: options.migration_uid.clone(),
                dir,
                socket,
                carried: carried.clone(),
                refused: refused.clone(),
            });
            let door = door(stream.channel, inner);
            tasks.push(tokio::spawn(door.serve(listener, move |guest| stream.clone().carry(guest))));
        }
        Ok(Self { address: options.address, ports, carried, refused, tasks })
    }

    /// The TCP port of inner port `inner`.
    #[must_use]
    pub fn port(&self, inner: i32) -> Option<u16> {
        self.ports.iter().find(|(_, i)| **i == inner).map(|(port, _)| *port)
    }
}

async fn bind(address: IpAddr) -> Result<(TcpListener, u16), ChannelError> {
    let wanted = SocketAddr::new(address, 0);
    let io = |source| ChannelError::Io { what: "cannot listen on", address: wanted, source };
    let listener = TcpListener::bind(wanted).await.map_err(io)?;
    let port = listener.local_addr().map_err(io)?.port();
    Ok((listener, port))
}

async fn serve_control(mut guest: Guest, control: Arc<dyn TargetControl>) -> io::Result<()> {
    guest.accept().await?;
    answer_all(guest.stream, control).await
}

async fn answer_all<S>(mut stream: S, control: Arc<dyn TargetControl>) -> io::Result<()>
where
    S: tokio::io::AsyncBufRead + tokio::io::AsyncWrite + Unpin,
{
    loop {
        let request = match read_line::<Request, _>(&mut stream).await {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            // The source drops the channel when it needs it no more; between two lines nothing can have been cut off.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        if request == Request::Frames {
            match control.clone().join().await {
                Ok(inlets) => {
                    write_line(&mut stream, &Answer::Takes).await?;
                    return frames::take(&mut stream, &inlets).await;
                }
                Err(reason) => write_line(&mut stream, &Answer::NotYet { reason }).await?,
            }
            continue;
        }
        let answer = control.clone().answer(request).await;
        write_line(&mut stream, &answer).await?;
    }
}

/// One JSON value a line; `None` at the end of the stream.
pub(crate) async fn read_line<T, R>(stream: &mut R) -> io::Result<Option<T>>
where
    T: DeserializeOwned,
    R: tokio::io::AsyncBufRead + Unpin,
{
    let mut line = Vec::new();
    match stream.take(MAX_LINE).read_until(b'\n', &mut line).await {
        Ok(0) => return Ok(None),
        // Cut off in the middle of a line, with or without a word: told apart from an end between two lines below.
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof || line.is_empty() => return Err(error),
        Ok(_) | Err(_) => {}
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a line that is too long or cut off"));
    }
    serde_json::from_slice(&line).map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

pub(crate) async fn write_line<T, W>(stream: &mut W, value: &T) -> io::Result<()>
where
    T: Serialize,
    W: tokio::io::AsyncWrite + Unpin,
{
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.flush().await
}

/// The dialling half's view of the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// UID of the migration.
    pub migration_uid: String,
    /// The node that must answer.
    pub node: String,
    /// Its address as published.
    pub address: IpAddr,
    /// Where it is dialled from, if that is of the network for migrations.
    pub from: Option<Underlay>,
}

/// A connection as the dialling half has it, encrypted or in the clear; the reader may already hold bytes after the greeting.
pub type Dialled = BufReader<Either<tokio_rustls::client::TlsStream<TcpStream>, TcpStream>>;

/// What the streams' doors know this end by.
#[derive(Clone)]
pub enum StreamKey {
    /// The identities of this migration, or, with an older handler at the other end, the two nodes' certificates.
    Tls(Arc<ClientConfig>),
    /// A secret; the streams go in the clear.
    Secret(Arc<str>),
}

impl Target {
    /// Dials connection `place` of the stream with inner port `inner`, greets, and waits to be accepted.
    ///
    /// # Errors
    /// When the target cannot be reached within `limit`, is not who it should be, or refuses.
    pub async fn dial_stream(
        &self,
        key: &StreamKey,
        (inner, port): (i32, u16),
        place: impl Into<Place>,
        limit: Duration,
    ) -> Result<Dialled, ChannelError> {
        self.dial(key, (inner, port), Greeting { place: place.into(), ..Greeting::default() }, limit).await
    }

    /// The same for a connection of the memory stream that the launchers are to carry: the bare one, which nobody has said
    /// anything on after the welcome.
    ///
    /// # Errors
    /// As [`Target::dial_stream`].
    pub async fn dial_for_launcher(
        &self,
        key: &StreamKey,
        (inner, port): (i32, u16),
        place: Place,
        limit: Duration,
    ) -> Result<OwnedFd, ChannelError> {
        let greeting = Greeting { place, launcher: true, ..Greeting::default() };
        let dialled = self.dial(key, (inner, port), greeting, limit).await?;
        bare(dialled).map_err(self.io(port, GREET))
    }

    async fn dial(
        &self,
        key: &StreamKey,
        (inner, port): (i32, u16),
        greeting: Greeting,
        limit: Duration,
    ) -> Result<Dialled, ChannelError> {
        let greeting = Greeting { migration_uid: self.migration_uid.clone(), ..greeting };
        self.within(port, limit, async {
            match key {
                StreamKey::Tls(config) => Ok(self.greet(config.clone(), port, &greeting).await?.0),
                StreamKey::Secret(secret) => self.greet_in_the_clear(secret, (inner, port), greeting).await,
            }
        })
        .await
    }

    async fn within<T>(
        &self,
        port: u16,
        limit: Duration,
        dial: impl Future<Output = Result<T, ChannelError>>,
    ) -> Result<T, ChannelError> {
        match tokio::time::timeout(limit, dial).await {
            Ok(result) => result,
            Err(_) => Err(self.io(port, REACH)(io::ErrorKind::TimedOut.into())),
        }
    }

    fn io(&self, port: u16, what: &'static str) -> impl Fn(io::Error) -> ChannelError + Copy {
        let address = SocketAddr::new(self.address, port);
        move |source| ChannelError::Io { what, address, source }
    }

    async fn connect(&self, port: u16) -> Result<TcpStream, ChannelError> {
        let address = SocketAddr::new(self.address, port);
        let stream = match &self.from {
            Some(underlay) => underlay.connect((self.address, port)).await,
            None => TcpStream::connect(address).await,
        };
        let stream = stream.map_err(self.io(port, REACH))?;
        pump::prepare(&stream).map_err(self.io(port, "cannot set up the connection to"))?;
        Ok(stream)
    }

    async fn greet(
        &self,
        config: Arc<ClientConfig>,
        port: u16,
        greeting: &Greeting,
    ) -> Result<(Dialled, Welcome), ChannelError> {
        let stream = TlsConnector::from(config)
            .connect(self.address.into(), self.connect(port).await?)
            .await
            .map_err(self.io(port, "handshake with the target's handler at"))?;
        let mut stream = BufReader::with_capacity(4096, Either::Left(stream));
        write_line(&mut stream, greeting).await.map_err(self.io(port, GREET))?;
        let welcome = self.welcome(port, &mut stream).await?;
        Ok((stream, welcome))
    }

    async fn greet_in_the_clear(
        &self,
        secret: &str,
        (inner, port): (i32, u16),
        mut greeting: Greeting,
    ) -> Result<Dialled, ChannelError> {
        let io = self.io(port, GREET);
        let mut stream: Dialled = BufReader::with_capacity(4096, Either::Right(self.connect(port).await?));
        let asked: Option<Question> = read_line(&mut stream).await.map_err(io)?;
        let Question { question } = asked.ok_or_else(|| io(io::ErrorKind::UnexpectedEof.into()))?;
        let place = greeting.place;
        let claim = Claim { end: "source", uid: &self.migration_uid, inner, place, question: &question };
        greeting.proof = Some(claim.proof(secret));
        write_line(&mut stream, &greeting).await.map_err(io)?;
        let welcome = self.welcome(port, &mut stream).await?;
        let theirs = Claim { end: "target", ..claim };
        if !theirs.is_proven(secret, welcome.proof.as_deref().unwrap_or_default()) {
            let why = "whoever answers does not know this migration's secret";
            return Err(io(io::Error::new(io::ErrorKind::PermissionDenied, why)));
        }
        Ok(stream)
    }

    async fn welcome(&self, port: u16, stream: &mut Dialled) -> Result<Welcome, ChannelError> {
        let address = SocketAddr::new(self.address, port);
        match read_line::<Welcome, _>(stream).await.map_err(self.io(port, GREET))? {
            Some(welcome) if welcome.accepted => Ok(welcome),
            Some(Welcome { refused, .. }) => {
                Err(ChannelError::Refused { address, reason: refused.unwrap_or_else(|| "no reason given".into()) })
            }
            None => Err(self.io(port, GREET)(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

/// What is below a session that ends here, without a farewell.
fn bare(dialled: Dialled) -> io::Result<OwnedFd> {
    if !dialled.buffer().is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the target has said more than its welcome"));
    }
    let stream = match dialled.into_inner() {
        Either::Left(tls) => tls.into_inner().0,
        Either::Right(stream) => stream,
    };
    Ok(stream.into_std()?.into())
}

const REACH: &str = "cannot reach the target's handler at";
const GREET: &str = "greeting the target's handler at";

/// What the source's end of a migration is known by.
pub struct Credentials {
    /// The node's certificate, for the control channel.
    pub node: Identity,
    /// Its own for this migration, for the streams; without one the control channel is all that it wants.
    pub own: Option<Arc<MigrationIdentity>>,
    /// The streams shall go in the clear, if the target agrees.
    pub plain: bool,
}

/// The source's end of the control channel.
pub struct Control {
    stream: Dialled,
    address: SocketAddr,
    /// What opens the streams, as was agreed here.
    pub key: StreamKey,
    /// The target's identity for this migration; an older handler has none.
    pub peer: Option<Fingerprint>,
}

impl StreamKey {
    /// The streams go in the clear.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        matches!(self, Self::Secret(_))
    }
}

impl Control {
    /// Dials the control channel.
    ///
    /// # Errors
    /// When the target cannot be reached within `limit`, is another node than expected, or refuses.
    pub async fn connect(
        target: &Target,
        credentials: &Credentials,
        port: u16,
        limit: Duration,
    ) -> Result<Self, ChannelError> {
        let Credentials { node, own, plain } = credentials;
        let nodes = node.client(&target.node)?;
        let greeting = Greeting {
            migration_uid: target.migration_uid.clone(),
            identity: own.as_ref().map(|own| own.fingerprint()),
            plain: *plain,
            ..Greeting::default()
        };
        let (stream, welcome) = target.within(port, limit, target.greet(nodes.clone(), port, &greeting)).await?;
        let peer = welcome.identity.clone();
        let key = match (own, welcome) {
            (None, _) => StreamKey::Tls(nodes),
            (_, Welcome { secret: Some(secret), .. }) if *plain => StreamKey::Secret(secret.into()),
            (Some(own), Welcome { identity: Some(theirs), .. }) => {
                StreamKey::Tls(own.client(&theirs).map_err(TlsError::from)?)
            }
            _ => {
                tracing::info!(
                    migration = target.migration_uid,
                    "the target's handler is older: the streams are known by the nodes' certificates"
                );
                StreamKey::Tls(nodes)
            }
        };
        if *plain && !key.is_plain() {
            tracing::warn!(migration = target.migration_uid, "the target wants its streams encrypted, and they are");
        }
        Ok(Self { stream, address: SocketAddr::new(target.address, port), key, peer })
    }

    /// Asks and waits for the answer. After an error the channel is of no more use: dial again.
    ///
    /// # Errors
    /// When the connection breaks or there is no answer within `limit`.
    pub async fn ask(&mut self, request: Request, limit: Duration) -> Result<Answer, ChannelError> {
        let address = self.address;
        let io = |source| ChannelError::Io { what: "control channel to", address, source };
        let work = async {
            write_line(&mut self.stream, &request).await?;
            read_line(&mut self.stream).await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        };
        match tokio::time::timeout(limit, work).await {
            Ok(result) => result.map_err(io),
            Err(_) => Err(io(io::ErrorKind::TimedOut.into())),
        }
    }

    /// The target has answered, and it is no.
    #[must_use]
    pub fn refused(&self, reason: String) -> ChannelError {
        ChannelError::Refused { address: self.address, reason }
    }

    /// The connection itself, after an answer that says what follows on it.
    #[must_use]
    pub fn into_stream(self) -> Dialled {
        self.stream
    }

    /// Takes leave, so that the other end does not take it for a broken connection.
    pub async fn close(mut self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.stream.shutdown()).await;
    }

    /// Waits until the other end goes away. Nothing is sent unasked on this channel, so whatever arrives is the end.
    pub async fn closed(&mut self) {
        let _ = self.stream.fill_buf().await;
    }

    /// By how many microseconds the target's clock is ahead of ours: the best of three exchanges, good to half a round trip.
    ///
    /// # Errors
    /// As [`Control::ask`].
    pub async fn clock_offset_us(&mut self, limit: Duration) -> Result<i64, ChannelError> {
        let mut best = (i64::MAX, 0);
        for _ in 0..3 {
            let before = jiff::Timestamp::now().as_microsecond();
            let answer = self.ask(Request::Clock, limit).await?;
            let after = jiff::Timestamp::now().as_microsecond();
            if let Answer::Time { now_us } = answer {
                let round_trip = after.saturating_sub(before);
                if round_trip < best.0 {
                    best = (round_trip, now_us.saturating_sub(before.saturating_add(round_trip / 2)));
                }
            }
        }
        Ok(best.1)
    }
}

#[cfg(test)]
#[path = "channel_tests.rs"]
mod tests;
