//! Carrying QEMU's memory stream to and from the other end's launcher.
//!
//! The two handlers open the connections and make sure of each other; then they hand them to their launchers, which secure them
//! anew with identities that were made for this migration ([`identity`]), and carry the stream from then on. So a handler can end
//! and start anew in the middle of a migration, and the stream goes on. Where one of the ends is older the handlers carry it
//! themselves, by the same code.

pub mod arrive;
pub mod depart;
pub mod identity;
pub mod pace;
pub mod pump;

use self::arrive::{Arrivals, Ended};
use self::identity::{IdentityError, MigrationIdentity};
use self::pump::Carried;
use crate::rpc::{CarriedFacts, CarryOrder, DomainPhase, MigrationFacts, MigrationRole, Refusal, Secured, State};
use crate::vm::{Refused, check_name, meet, refused};
use godwit_qemu::descriptor;
use rustls::pki_types::ServerName;
use std::collections::BTreeSet;
use std::io;
use std::net::TcpStream as StdTcpStream;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::BufReader;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::either::Either;

/// How long the source's launcher waits for the target's on all connections.
const DIAL_LIMIT: Duration = Duration::from_secs(5);
/// How long the target's launcher waits for the source's: its handler has yet to be told that it may come.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// How long a link may lie here that QEMU has not come for, and that belongs to no migration that this launcher was told to begin.
const UNWANTED_AFTER: Duration = Duration::from_secs(60);
/// What one read takes from the network below TLS, in bytes: rustls asks for 4 KiB at a time, and each such read of a full
/// socket would be acknowledged and wake the sender.
const RECORDS: usize = 256 * 1024;

/// The streams of one launcher. Clones are the same.
#[derive(Clone)]
pub struct Carrier(Arc<Inner>);

struct Inner {
    sockets: PathBuf,
    /// [`UNWANTED_AFTER`].
    unwanted_after: Duration,
    link: Mutex<Option<Link>>,
}

/// One link of a memory stream.
struct Link {
    uid: String,
    role: MigrationRole,
    number: u64,
    /// Over all links of its migration.
    carried: Arc<Carried>,
    /// What had been carried before it.
    before: u64,
    arrivals: Arc<Arrivals>,
    streams: Arc<Mutex<Streams>>,
    threads: Option<Threads>,
}

/// The connections of a link.
#[derive(Default)]
struct Streams {
    open: BTreeSet<u8>,
    /// At the source: QEMU has come for it.
    begun: bool,
    error: Option<String>,
    timed_out: bool,
}

/// What carries a link: threads of its own, since the launcher's one has to answer meanwhile, and as many as help. They end with
/// this, and the streams with them.
struct Threads(Option<Runtime>);

impl Threads {
    fn start(connections: usize) -> io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let builder = builder.worker_threads(cores.min(connections).max(1)).thread_name("carrier");
        Ok(Self(Some(builder.enable_all().build()?)))
    }

    fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Option<tokio::task::JoinHandle<T>> {
        self.0.as_ref().map(|runtime| runtime.spawn(work))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Streams {
    /// Notes how connection `number` ended.
    fn ended(&mut self, number: u8, how: &io::Result<()>) {
        self.open.remove(&number);
        if let (Err(error), None) = (how, &self.error) {
            self.error = Some(error.to_string());
            // A connection that nobody acknowledges ends with what the network last said of it, if it said anything.
            self.timed_out = matches!(
                error.kind(),
                io::ErrorKind::TimedOut
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::NetworkDown
            );
        }
    }
}

impl Link {
    fn is_of(&self, uid: &str, role: MigrationRole) -> bool {
        self.uid == uid && self.role == role
    }

    fn new(order: &CarryOrder, carried: Arc<Carried>) -> Self {
        Self {
            uid: order.migration_uid.clone(),
            role: order.role,
            number: order.link,
            before: carried.total(),
            carried,
            arrivals: Arc::default(),
            streams: Arc::default(),
            threads: None,
        }
    }

    /// Whether QEMU has begun with it.
    fn begun(&self) -> bool {
        lock(&self.streams).begun || self.carried.total() > self.before
    }

    fn threads(&mut self, order: &CarryOrder) -> Result<&Threads, Refused> {
        let threads = match self.threads.take() {
            Some(threads) => threads,
            None => Threads::start(order.transport.connections()).map_err(|e| failed("starting threads", &e))?,
        };
        Ok(self.threads.insert(threads))
    }
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> Refused {
    refused(Refusal::Failed, format!("carrying the memory stream: {what}: {error}"))
}

fn conflict(message: String) -> Refused {
    refused(Refusal::Conflict, message)
}

impl Carrier {
    /// With QEMU's sockets, and those of the handler, in this folder.
    #[must_use]
    pub fn new(sockets: PathBuf) -> Self {
        Self(Arc::new(Inner { sockets, unwanted_after: UNWANTED_AFTER, link: Mutex::default() }))
    }

    /// What is carried of migration `uid`, if anything.
    #[must_use]
    pub fn facts(&self, uid: &str, role: MigrationRole) -> Option<CarriedFacts> {
        let mut link = lock(&self.0.link);
        let link = link.as_mut().filter(|link| link.is_of(uid, role))?;
        let (flows, error, timed_out) = {
            let streams = lock(&link.streams);
            (!streams.open.is_empty(), streams.error.clone(), streams.timed_out)
        };
        let awaits_qemu = flows && role == MigrationRole::Source && !link.begun();
        if !flows {
            link.threads = None;
        }
        let count = |of: &std::sync::atomic::AtomicU64| of.load(Ordering::Relaxed);
        let Carried { out, back, writing_us } = &*link.carried;
        let (out, back, writing_us) = (count(out), count(back), count(writing_us));
        Some(CarriedFacts { link: link.number, flows, awaits_qemu, out, back, writing_us, error, timed_out })
    }

    /// Has `state` say what is carried now.
    pub fn tell(&self, state: &mut State) {
        if let Some(m) = &mut state.migration {
            m.carried = self.facts(&m.uid, m.role);
        }
    }

    /// Breaks the link off: another one is going to come.
    pub fn cut(&self) {
        if let Some(link) = lock(&self.0.link).as_mut() {
            link.threads = None;
            lock(&link.streams).open.clear();
        }
    }

    /// Takes connections over, and carries the stream over them.
    ///
    /// # Errors
    /// When they are not those that are expected, or cannot be had or secured.
    pub async fn carry(&self, order: CarryOrder, states: watch::Receiver<State>) -> Result<(), Refused> {
        check_name(&order.socket)?;
        check_name(&order.handed)?;
        admit(&order, &states.borrow())?;
        if order.streams.is_empty() {
            self.let_go(&order);
            return Ok(());
        }
        let identity = order.secured.as_ref().map(MigrationIdentity::lent).transpose();
        let identity = identity.map_err(|e| refused(Refusal::BadRequest, e.to_string()))?;
        let secured = identity.zip(order.secured.clone());
        let handed = self.0.sockets.join(&order.handed);
        let wanted = order.streams.len();
        let connections = meet(handed, move |stream| {
            (0..wanted).map(|_| descriptor::receive(stream).map(StdTcpStream::from)).collect::<io::Result<Vec<_>>>()
        });
        let connections = connections.await.map_err(|e| failed("taking connections over", &e))?;
        match order.role {
            MigrationRole::Source => self.depart(order, connections, secured, states).await,
            MigrationRole::Target => self.arrive(&order, connections, secured.as_ref()),
        }
    }

    /// Gives a link up that QEMU has not begun with, unless it is a later one.
    fn let_go(&self, order: &CarryOrder) {
        let mut known = lock(&self.0.link);
        let unused = |link: &mut Link| {
            link.is_of(&order.migration_uid, order.role) && link.number <= order.link && !link.begun()
        };
        drop(known.take_if(unused));
    }

    /// The counters of a migration go on from link to link.
    fn counters(link: Option<&Link>, order: &CarryOrder) -> Arc<Carried> {
        let before = link.filter(|link| link.is_of(&order.migration_uid, order.role));
        before.map(|link| link.carried.clone()).unwrap_or_default()
    }

    async fn depart(
        &self,
        order: CarryOrder,
        connections: Vec<StdTcpStream>,
        secured: Option<(MigrationIdentity, Secured)>,
        states: watch::Receiver<State>,
    ) -> Result<(), Refused> {
        let path = self.0.sockets.join(&order.socket);
        let (securing, streams, carried) = {
            let mut known = lock(&self.0.link);
            if let Some(old) = known.as_ref().filter(|old| old.is_of(&order.migration_uid, order.role)) {
                // One that QEMU has not begun with is none: a handler that has started anew dials again.
                if old.number > order.link || (old.number == order.link && old.begun()) {
                    let message = format!("link {} of this migration's memory stream is carried already", old.number);
                    return Err(conflict(message));
                }
            }
            let mut link = Link::new(&order, Self::counters(known.as_ref(), &order));
            let (streams, carried) = (link.streams.clone(), link.carried.clone());
            lock(&streams).open.extend(&order.streams);
            let places: Vec<_> = order.streams.iter().map(|number| place(&order, *number)).collect();
            let securing = link.threads(&order)?.spawn(async move {
                let ends = places.into_iter().zip(connections);
                let dial = ends.map(|(place, connection)| dial(connection, secured.as_ref(), place));
                match tokio::time::timeout(DIAL_LIMIT, futures::future::try_join_all(dial)).await {
                    Ok(result) => result,
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                }
            });
            // Its threads, and its streams, end with the link that was there before.
            *known = Some(link);
            (securing, streams, carried)
        };
        let ended = |error: String| {
            // It is as if there had been none: the handlers may carry the stream themselves.
            drop(lock(&self.0.link).take_if(|link| Arc::ptr_eq(&link.streams, &streams)));
            refused(Refusal::Failed, error)
        };
        let channels = match securing {
            Some(task) => task.await.map_err(io::Error::other).and_then(|secured| secured),
            None => Err(io::ErrorKind::Interrupted.into()),
        };
        let channels = channels.map_err(|e| ended(format!("the target's launcher cannot be talked to: {e}")))?;
        let _ = std::fs::remove_file(&path);
        let listener = StdUnixListener::bind(&path)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|e| ended(format!("listening on {}: {e}", path.display())))?;
        let mut known = lock(&self.0.link);
        let link = known.as_mut().filter(|link| Arc::ptr_eq(&link.streams, &streams));
        let Some(threads) = link.and_then(|link| link.threads.as_ref()) else {
            return Err(conflict("another link has taken the place of this one".into()));
        };
        let uid = order.migration_uid;
        let (streams, link) = (streams.clone(), order.link);
        let (inner, unwanted_after) = (Arc::downgrade(&self.0), self.0.unwanted_after);
        threads.spawn(async move {
            let limit = |state: &State| pace::limit_of_post_copy(Some(state), &uid);
            let unwanted = unwanted(states.clone(), &uid, unwanted_after);
            let (came, comes) = tokio::sync::oneshot::channel();
            let begun = || {
                lock(&streams).begun = true;
                let _ = came.send(());
            };
            let result = async {
                let listener = UnixListener::from_std(listener)?;
                depart::carry_memory(listener, channels, states, limit, carried.clone(), begun).await
            };
            let unwanted = async {
                tokio::select! {
                    biased;
                    _ = comes => std::future::pending().await,
                    why = unwanted => why,
                }
            };
            let result = tokio::select! {
                biased;
                result = result => result,
                why = unwanted => {
                    tracing::warn!(migration = %uid, link, why, "QEMU does not come for its connections: they are given up");
                    let Some(inner) = inner.upgrade() else { return };
                    drop(lock(&inner.link).take_if(|link| Arc::ptr_eq(&link.streams, &streams)));
                    return;
                }
            };
            let bytes = carried.total();
            match &result {
                Ok(()) => tracing::info!(migration = %uid, link, bytes, "memory stream at its end"),
                Err(error) => tracing::warn!(migration = %uid, link, bytes, %error, "memory stream broke"),
            }
            let mut streams = lock(&streams);
            streams.open.clear();
            streams.ended(0, &result);
        });
        Ok(())
    }

    fn arrive(
        &self,
        order: &CarryOrder,
        connections: Vec<StdTcpStream>,
        secured: Option<&(MigrationIdentity, Secured)>,
    ) -> Result<(), Refused> {
        let acceptor = |number: &u8| {
            let Some((identity, secured)) = secured else { return Ok(None) };
            let mut config = Arc::unwrap_or_clone(identity.server(&secured.peer)?);
            config.alpn_protocols = vec![place(order, *number)];
            Ok(Some(TlsAcceptor::from(Arc::new(config))))
        };
        let acceptors: Result<Vec<_>, IdentityError> = order.streams.iter().map(acceptor).collect();
        let acceptors = acceptors.map_err(|e| failed("the other end's identity", &e))?;
        let mut known = lock(&self.0.link);
        match known.as_ref().filter(|old| old.is_of(&order.migration_uid, order.role)) {
            Some(old) if old.number > order.link => {
                let (link, later) = (order.link, old.number);
                return Err(conflict(format!(
                    "link {link} of this migration's memory stream is over: {later} has come"
                )));
            }
            Some(old) if old.number == order.link => {}
            _ => *known = Some(Link::new(order, Self::counters(known.as_ref(), order))),
        }
        let Some(link) = known.as_mut() else { return Ok(()) };
        for ((number, connection), acceptor) in order.streams.iter().copied().zip(connections).zip(acceptors) {
            let (arrivals, streams, carried) = (link.arrivals.clone(), link.streams.clone(), link.carried.clone());
            let threads = link.threads(order)?;
            // Whatever is in there is carried, until its task says that it is not.
            if !lock(&streams).open.insert(number) {
                let message =
                    format!("connection {number} of this migration's memory stream has been connected before");
                return Err(conflict(message));
            }
            let (uid, transport, socket) =
                (order.migration_uid.clone(), order.transport, self.0.sockets.join(&order.socket));
            let work = async move {
                let connect = UnixStream::connect(socket);
                let result = match tokio::time::timeout(CALL_LIMIT, accept(connection, acceptor)).await {
                    Ok(Ok(stream)) => arrivals.carry((number, transport), stream, connect, carried.clone()).await,
                    // It was not the source's launcher, or that one has not come: nothing has begun.
                    Ok(Err(error)) => {
                        tracing::warn!(migration = %uid, number, %error, "a connection is not the source's launcher's");
                        Ok(Ended::Unused)
                    }
                    Err(_) => Ok(Ended::Unused),
                };
                let bytes = carried.total();
                match &result {
                    Ok(Ended::Over) => tracing::info!(migration = %uid, number, bytes, "stream at its end"),
                    Ok(Ended::Unused) => tracing::info!(migration = %uid, number, "connection went before it was used"),
                    Err(error) => tracing::warn!(migration = %uid, number, bytes, %error, "stream broke"),
                }
                lock(&streams).ended(number, &result.map(drop));
            };
            threads.spawn(work);
        }
        Ok(())
    }
}

/// Ends when QEMU will not come any more for a link of this migration, and says why: its migration is over, or nobody has ordered it
/// for `limit`. (Where disks are copied QEMU comes for its memory after them, however long they take.)
async fn unwanted(mut states: watch::Receiver<State>, uid: &str, limit: Duration) -> &'static str {
    loop {
        let over = {
            let state = states.borrow_and_update();
            state.migration_of(uid, MigrationRole::Source).map(MigrationFacts::is_final)
        };
        let ordered = |state: &State| state.migration_of(uid, MigrationRole::Source).is_some();
        let ends = match over {
            Some(true) => return "the migration is over",
            Some(false) => states.changed().await.is_err(),
            None => match tokio::time::timeout(limit, states.wait_for(ordered)).await {
                Ok(came) => came.is_err(),
                Err(_) => return "the migration was not ordered",
            },
        };
        if ends {
            return "the launcher ends";
        }
    }
}

/// The longest name that ALPN has room for, in bytes.
const LONGEST_NAME: usize = 255;

/// What both ends name in their handshake, so that a connection is only good for the place that it was opened for. (ALPN, RFC 7301: a
/// launcher that does not know of it names none, and takes any.)
fn place(order: &CarryOrder, number: u8) -> Vec<u8> {
    let mut place = format!("{}/{number}/{}", order.link, order.migration_uid).into_bytes();
    place.truncate(LONGEST_NAME);
    place
}

/// Whether this VM has such a stream.
fn admit(order: &CarryOrder, state: &State) -> Result<(), Refused> {
    let uid = &order.migration_uid;
    let other = state.migration.as_ref().filter(|m| m.uid != *uid && !m.is_final());
    if let Some(other) = other {
        return Err(conflict(format!("this launcher's migration is {}, not {uid}", other.uid)));
    }
    match order.role {
        MigrationRole::Target if state.migration_of(uid, MigrationRole::Target).is_some() => Ok(()),
        MigrationRole::Source
            if matches!(state.phase, DomainPhase::Running | DomainPhase::Paused | DomainPhase::HandedOver) =>
        {
            Ok(())
        }
        role => Err(conflict(format!("this launcher is no {role:?} of migration {uid}"))),
    }
}

type Channel = BufReader<Either<tokio_rustls::client::TlsStream<TcpStream>, TcpStream>>;

/// The source's end of a connection.
async fn dial(
    connection: StdTcpStream,
    secured: Option<&(MigrationIdentity, Secured)>,
    place: Vec<u8>,
) -> io::Result<Channel> {
    connection.set_nonblocking(true)?;
    let stream = TcpStream::from_std(connection)?;
    let stream = match secured {
        None => Either::Right(stream),
        Some((identity, secured)) => {
            let mut config = Arc::unwrap_or_clone(identity.client(&secured.peer).map_err(io::Error::other)?);
            config.alpn_protocols = vec![place];
            // Who it is is known by its certificate alone.
            let name = ServerName::try_from("migration").map_err(io::Error::other)?;
            Either::Left(TlsConnector::from(Arc::new(config)).connect(name, stream).await?)
        }
    };
    Ok(BufReader::with_capacity(4096, stream))
}

type Guest = BufReader<Either<tokio_rustls::server::TlsStream<BufReader<TcpStream>>, TcpStream>>;

/// The target's end of a connection.
async fn accept(connection: StdTcpStream, acceptor: Option<TlsAcceptor>) -> io::Result<Guest> {
    connection.set_nonblocking(true)?;
    let stream = TcpStream::from_std(connection)?;
    let stream = match acceptor {
        None => Either::Right(stream),
        Some(acceptor) => Either::Left(acceptor.accept(BufReader::with_capacity(RECORDS, stream)).await?),
    };
    Ok(BufReader::with_capacity(4096, stream))
}

#[cfg(test)]
#[path = "carry_tests.rs"]
mod tests;
