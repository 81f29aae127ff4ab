//! The listening half's doors: who comes in, and what keeps everybody else out.
//!
//! The control channel's door knows the source by its node's certificate. Whoever has come in there says by which identity
//! it will be known at the doors of the streams ([`credentials`]); until then those are closed.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use godwit_launcher::carry::pump;
use godwit_launcher::rpc::Secured;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::either::Either;

use crate::channel::{CONTROL, Greeting, Place, Question, Welcome, read_line, write_line};
use crate::credentials::{self, Claim, Fingerprint, MigrationIdentity};
use crate::tls::{TlsError, check_node};

/// How long a peer may take for handshake and greeting.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Handshakes in progress at one listener; more wait in the backlog.
const HANDSHAKES: usize = 8;

/// Who was sent away.
#[derive(Debug, Default)]
pub struct Refusals {
    count: AtomicU64,
    last: Mutex<String>,
}

impl Refusals {
    /// One more: it is logged and counted.
    pub fn note(&self, migration: &str, channel: &str, peer: SocketAddr, reason: &str) {
        tracing::warn!(%peer, channel, migration, reason, "connection refused");
        reason.clone_into(&mut self.last.lock().unwrap_or_else(PoisonError::into_inner));
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Why the last one was.
    #[must_use]
    pub fn last(&self) -> String {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What one read takes from the network below TLS, in bytes: rustls asks for 4 KiB at a time, and each such read of a full
/// socket would be acknowledged and wake the sender.
const RECORDS: usize = 256 * 1024;

/// Encrypted, or in the clear; the reader may already hold bytes after the greeting.
type Wire = BufReader<Either<tokio_rustls::server::TlsStream<BufReader<TcpStream>>, TcpStream>>;

/// A connection that may come in, unless its channel has a reason against it.
pub(crate) struct Guest {
    /// What it says next.
    pub stream: Wire,
    /// Which connection it says it is.
    pub place: Place,
    /// From where it comes.
    pub peer: SocketAddr,
    /// After the welcome it is the launchers', who know each other by this.
    pub launcher: Option<Option<Secured>>,
    welcome: Welcome,
}

/// The same, with what it says and the answer that it will get.
type Entered = (Wire, Greeting, Welcome);

impl Guest {
    /// The connection below, on which nobody has said anything yet that has not been heard here.
    pub fn bare(&self) -> io::Result<OwnedFd> {
        let (stream, unheard) = match self.stream.get_ref() {
            Either::Left(tls) => (tls.get_ref().0.get_ref(), !tls.get_ref().0.buffer().is_empty()),
            Either::Right(stream) => (stream, false),
        };
        if unheard || !self.stream.buffer().is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the source has said more than its greeting"));
        }
        stream.as_fd().try_clone_to_owned()
    }

    /// Lets it in.
    pub async fn accept(&mut self) -> io::Result<()> {
        write_line(&mut self.stream, &self.welcome).await
    }

    /// Shows it out.
    pub async fn refuse(&mut self, reason: &str) -> io::Result<()> {
        refuse(&mut self.stream, reason).await
    }
}

async fn refuse(stream: &mut Wire, reason: &str) -> io::Result<()> {
    write_line(stream, &Welcome { refused: Some(reason.to_owned()), ..Welcome::default() }).await?;
    stream.shutdown().await
}

/// What opens the streams' doors.
#[derive(Clone)]
enum Key {
    /// Nothing yet: nobody has been at the control channel.
    None,
    /// The source node's certificate: its handler is older, and has no identity for this migration.
    Node,
    /// The identity that was told at the control channel.
    Identity(Fingerprint),
    /// The secret that was told there.
    Secret,
}

/// The keys of one migration's doors.
pub(crate) struct Keys {
    own: MigrationIdentity,
    secret: String,
    /// The migration's configuration wants its streams in the clear.
    plain: bool,
    streams: Mutex<Key>,
}

impl Keys {
    /// Nobody has been here yet.
    pub fn new(uid: &str, plain: bool) -> Result<Self, TlsError> {
        Ok(Self {
            own: MigrationIdentity::new(uid, "target")?,
            secret: credentials::unguessable()?,
            plain,
            streams: Mutex::new(Key::None),
        })
    }

    /// The source is at the control channel: how it will be known at the streams, and what it has to know for that.
    fn agree(&self, greeting: &Greeting) -> Welcome {
        let mut welcome = Welcome { accepted: true, ..Welcome::default() };
        let mut now = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let key = match &greeting.identity {
            None if matches!(*now, Key::None) => Key::Node,
            // It has been told, and that is not taken back; whoever says nothing wants no streams.
            None => return welcome,
            Some(_) if greeting.plain && self.plain => {
                welcome.secret = Some(self.secret.clone());
                Key::Secret
            }
            Some(peer) => {
                welcome.identity = Some(self.own.fingerprint());
                Key::Identity(peer.clone())
            }
        };
        *now = key;
        welcome
    }

    fn now(&self) -> Key {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One of a migration's doors.
pub(crate) struct Door {
    /// The channel behind it.
    pub channel: &'static str,
    /// Its inner port.
    pub inner: i32,
    /// The only migration that it is for.
    pub uid: String,
    /// The only node that may come.
    pub source_node: String,
    /// What that node is known by.
    pub nodes: TlsAcceptor,
    /// What its streams are known by.
    pub keys: Arc<Keys>,
    /// Who was sent away.
    pub refused: Arc<Refusals>,
}

impl Door {
    /// Lets in who may come in, for ever.
    pub async fn serve<F, Fut>(self, listener: TcpListener, serve: F)
    where
        F: Fn(Guest) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let (door, serve) = (Arc::new(self), Arc::new(serve));
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        // Ends the connections with the listener.
        let mut connections = tokio::task::JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, channel = door.channel, "cannot accept; trying again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (door, serve, handshakes) = (door.clone(), serve.clone(), handshakes.clone());
            connections.spawn(async move {
                let entered = {
                    let Ok(_permit) = handshakes.acquire().await else { return };
                    match tokio::time::timeout(GREETING_TIME, door.enter(stream, peer)).await {
                        Ok(result) => result,
                        Err(_) => Err("no handshake and greeting in time".to_owned()),
                    }
                };
                match entered {
                    Ok(guest) => serve(guest).await,
                    Err(reason) => door.refused.note(&door.uid, door.channel, peer, &reason),
                }
            });
        }
    }

    async fn enter(&self, stream: TcpStream, peer: SocketAddr) -> Result<Guest, String> {
        pump::prepare(&stream).map_err(|e| e.to_string())?;
        let key = if self.inner == CONTROL { Key::Node } else { self.keys.now() };
        let secured = match &key {
            Key::Identity(peer) => Some(Some(self.keys.own.lend(peer))),
            Key::Secret => Some(None),
            Key::None | Key::Node => None,
        };
        let (stream, greeting, welcome) = match key {
            Key::None => Err("nobody has been at this migration's control channel yet".to_owned()),
            Key::Node => self.enter_by_tls(stream, &self.nodes, true).await,
            Key::Identity(peer) => {
                let config = self.keys.own.server(&peer).map_err(|e| e.to_string())?;
                self.enter_by_tls(stream, &TlsAcceptor::from(config), false).await
            }
            Key::Secret => self.enter_by_secret(stream).await,
        }?;
        let launcher = secured.filter(|_| greeting.launcher);
        Ok(Guest { stream, place: greeting.place, peer, launcher, welcome })
    }

    async fn enter_by_tls(&self, stream: TcpStream, acceptor: &TlsAcceptor, is_node: bool) -> Result<Entered, String> {
        let records = if self.inner == CONTROL { 4096 } else { RECORDS };
        let stream = BufReader::with_capacity(records, stream);
        let stream = acceptor.accept(stream).await.map_err(|e| format!("handshake: {e}"))?;
        let known = match stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()) {
            Some(cert) if is_node => check_node(cert, &self.source_node),
            // The handshake has looked at it.
            Some(_) => Ok(()),
            None => Err("peer shows no certificate".to_owned()),
        };
        let mut stream = BufReader::with_capacity(4096, Either::Left(stream));
        let greeting = self.greeting(&mut stream).await;
        match known.and(greeting) {
            Ok(greeting) => {
                let is_control = self.inner == CONTROL;
                let accepted = Welcome { accepted: true, ..Welcome::default() };
                let welcome = if is_control { self.keys.agree(&greeting) } else { accepted };
                Ok((stream, greeting, welcome))
            }
            Err(reason) => {
                let _ = refuse(&mut stream, &reason).await;
                Err(reason)
            }
        }
    }

    async fn enter_by_secret(&self, stream: TcpStream) -> Result<Entered, String> {
        let mut stream: Wire = BufReader::with_capacity(4096, Either::Right(stream));
        let question = credentials::unguessable().map_err(|e| e.to_string())?;
        let asked = write_line(&mut stream, &Question { question: question.clone() }).await;
        asked.map_err(|e| format!("question: {e}"))?;
        let secret = &self.keys.secret;
        let proven = self.greeting(&mut stream).await.and_then(|greeting| {
            let claim =
                Claim { end: "source", uid: &self.uid, inner: self.inner, place: greeting.place, question: &question };
            let proof = greeting.proof.as_deref().unwrap_or_default();
            if !claim.is_proven(secret, proof) {
                return Err("peer does not know this migration's secret".to_owned());
            }
            let own = Claim { end: "target", ..claim };
            let proof = Some(own.proof(secret));
            Ok((greeting, Welcome { accepted: true, proof, ..Welcome::default() }))
        });
        match proven {
            Ok((greeting, welcome)) => Ok((stream, greeting, welcome)),
            Err(reason) => {
                let _ = refuse(&mut stream, &reason).await;
                Err(reason)
            }
        }
    }

    async fn greeting(&self, stream: &mut Wire) -> Result<Greeting, String> {
        match read_line::<Greeting, _>(stream).await {
            Ok(Some(greeting)) if greeting.migration_uid == self.uid => Ok(greeting),
            Ok(Some(greeting)) => Err(format!("migration {:?} is not the one expected here", greeting.migration_uid)),
            Ok(None) => Err("closed before the greeting".to_owned()),
            Err(e) => Err(format!("greeting: {e}")),
        }
    }
}
