//! The listening half's streams: memory and blocks, on their way into the launcher's sockets.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use godwit_launcher::carry::arrive::{Arrivals, Ended};
use godwit_launcher::carry::pump::{self, Carried};
use godwit_launcher::rpc::{CarryOrder, MigrationRole, Secured, Transport};
use tokio::io::AsyncBufReadExt;
use tokio::net::UnixStream;

use crate::channel::{Place, TargetControl};
use crate::door::{Guest, Refusals};
use crate::lend;
use crate::recovery::Recoveries;
use crate::sockets::SocketDir;

/// A stream into one of the launcher's sockets.
pub struct Stream {
    /// For the log.
    pub channel: &'static str,
    /// For the memory stream, whose connections come once; blocks are one connection a disk.
    pub memory: Option<Memory>,
    /// UID of the migration.
    pub uid: String,
    /// Where the socket is.
    pub dir: Arc<SocketDir>,
    /// Its name; none for a memory stream that can only be recovered.
    pub socket: String,
    /// Bytes so far.
    pub carried: Arc<Carried>,
    /// Connections that were refused.
    pub refused: Arc<Refusals>,
}

impl Stream {
    /// Carries one connection, if it may be.
    pub async fn carry(self: Arc<Self>, mut guest: Guest) {
        let place = guest.place;
        let (uid, channel) = (&self.uid, self.channel);
        if let Some(secured) = guest.launcher.take() {
            if let Err(reason) = self.hand_over(&guest, secured).await {
                self.refused.note(uid, channel, guest.peer, &reason);
                let _ = guest.refuse(&reason).await;
            } else if let Err(error) = guest.accept().await {
                tracing::info!(migration = %uid, channel, %error, "the source has gone before its launcher could come");
            }
            return;
        }
        let admitted = match &self.memory {
            Some(memory) => self.admit(memory, place).await,
            None => Ok(Admitted::Alone),
        };
        let admitted = match admitted {
            Ok(admitted) => admitted,
            Err(reason) => {
                self.refused.note(uid, channel, guest.peer, &reason);
                let _ = guest.refuse(&reason).await;
                return;
            }
        };
        let began = std::time::Instant::now();
        let link = place.recovery.unwrap_or(0);
        let result = match (&self.memory, admitted) {
            (None, _) => self.carry_alone(guest).await,
            (Some(memory), admitted) => tokio::select! {
                result = async {
                    match admitted {
                        Admitted::Alone => self.carry_alone(guest).await,
                        Admitted::OneOfSeveral(transport) => {
                            self.carry_one_of(memory, guest, place.stream, transport).await
                        }
                        Admitted::Recovery { socket, connections } => {
                            self.carry_on(memory, guest, &socket, connections).await
                        }
                    }
                } => result,
                error = memory.recoveries.superseded(link) => Err(error),
            },
        };
        let bytes = self.carried.total();
        let ms = began.elapsed().as_millis() as u64;
        match result {
            Ok(()) => tracing::info!(migration = %uid, channel, bytes, ms, "stream at its end"),
            Err(error) => tracing::warn!(migration = %uid, channel, bytes, ms, %error, "stream broke"),
        }
    }

    /// Has the launcher carry this connection: it waits for the source's, which comes when it is let in here.
    async fn hand_over(&self, guest: &Guest, secured: Option<Secured>) -> Result<(), String> {
        let Some(memory) = &self.memory else { return Err("launchers carry memory only".into()) };
        let (stream, recovery) = (guest.place.stream, guest.place.recovery);
        let transport = memory.expects(stream).await?;
        let socket = match recovery {
            Some(number) => memory.recoveries.admit(number, stream)?,
            None => self.first_socket()?.to_owned(),
        };
        let connection = guest.bare().map_err(|e| e.to_string())?;
        let handed = lend::hand(vec![connection], self.dir.clone()).map_err(|e| e.to_string())?;
        let order = CarryOrder {
            migration_uid: self.uid.clone(),
            role: MigrationRole::Target,
            link: recovery.unwrap_or(0),
            streams: vec![stream],
            socket,
            handed: handed.socket.clone(),
            transport,
            secured,
        };
        memory.control.clone().carry(order).await
    }

    fn first_socket(&self) -> Result<&str, String> {
        match self.socket.as_str() {
            "" => Err("this memory stream began before this handler did; it can only be recovered".into()),
            socket => Ok(socket),
        }
    }

    async fn admit(&self, memory: &Memory, place: Place) -> Result<Admitted, String> {
        if let Some(number) = place.recovery {
            // A later link has as many connections as the first. A launcher that knows nothing of that had one.
            let connections = memory.control.clone().transport().await.map_or(1, Transport::connections);
            if usize::from(place.stream) >= connections {
                let stream = place.stream;
                return Err(format!("connection {stream} of a link for which {connections} were agreed (from 0)"));
            }
            let socket = memory.recoveries.admit(number, place.stream)?;
            return Ok(Admitted::Recovery { socket, connections });
        }
        self.first_socket()?;
        let transport = memory.admit(place.stream).await?;
        Ok(if transport.connections() > 1 { Admitted::OneOfSeveral(transport) } else { Admitted::Alone })
    }

    /// The link that follows a broken one. QEMU takes part as soon as it is connected, and up to 8.1 does not get over a link
    /// that breaks then: so it is connected when the source's has begun.
    async fn carry_on(&self, memory: &Memory, mut guest: Guest, socket: &str, connections: usize) -> io::Result<()> {
        let (stream, link) = (guest.place.stream, guest.place.recovery.unwrap_or(0));
        let is_last = usize::from(stream) + 1 == connections;
        // Whatever becomes of it; another link has another socket.
        let _socket = is_last.then(|| Removed { dir: &self.dir, socket });
        guest.accept().await?;
        if stream > 0 {
            // Whoever waits for a page waits for this connection first.
            tokio::select! {
                first = guest.stream.fill_buf() => if first?.is_empty() { return Ok(()) },
                () = memory.recoveries.main_connection(link) => {}
            }
            memory.recoveries.main_connection(link).await;
        } else if guest.stream.fill_buf().await?.is_empty() {
            return Ok(());
        }
        let local = self.connect(socket).await?;
        if stream == 0 {
            memory.recoveries.main_is_connected(link);
        }
        pump::pump(local, guest.stream, self.carried.clone()).await
    }

    async fn connect(&self, socket: &str) -> io::Result<UnixStream> {
        let local = self.dir.connect(socket).await?;
        pump::prepare_local(&local)?;
        Ok(local)
    }

    async fn carry_alone(&self, mut guest: Guest) -> io::Result<()> {
        let local = self.connect(&self.socket).await?;
        guest.accept().await?;
        pump::pump(local, guest.stream, self.carried.clone()).await
    }

    /// One connection of several.
    async fn carry_one_of(
        &self,
        memory: &Memory,
        mut guest: Guest,
        number: u8,
        transport: Transport,
    ) -> io::Result<()> {
        let ended = match guest.accept().await {
            Ok(()) => {
                let connect = self.dir.connect(&self.socket);
                let (arrivals, carried) = (&memory.arrivals, self.carried.clone());
                arrivals.carry((number, transport), guest.stream, connect, carried).await?
            }
            Err(_) => Ended::Unused,
        };
        if ended == Ended::Unused {
            memory.release(number);
        }
        Ok(())
    }
}

/// A socket that goes with this.
struct Removed<'a> {
    dir: &'a SocketDir,
    socket: &'a str,
}

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        self.dir.remove(self.socket);
    }
}

/// As what a connection was let in.
enum Admitted {
    /// QEMU's only one.
    Alone,
    /// QEMU's main one or a channel.
    OneOfSeveral(Transport),
    /// Another link, to this socket, of so many connections.
    Recovery { socket: String, connections: usize },
}

/// What the connections of one memory stream know of each other.
pub struct Memory {
    control: Arc<dyn TargetControl>,
    recoveries: Arc<Recoveries>,
    taken: Mutex<BTreeSet<u8>>,
    arrivals: Arrivals,
}

impl Memory {
    /// Before its first connection.
    pub fn new(control: Arc<dyn TargetControl>, recoveries: Arc<Recoveries>) -> Self {
        Self { control, recoveries, taken: Mutex::default(), arrivals: Arrivals::default() }
    }

    /// How memory comes, if connection `number` is one of those that were agreed.
    async fn expects(&self, number: u8) -> Result<Transport, String> {
        let transport = self.control.clone().transport().await?;
        if usize::from(number) >= transport.connections() {
            let agreed = transport.connections();
            return Err(format!("connection {number} of a memory stream for which {agreed} were agreed (from 0)"));
        }
        Ok(transport)
    }

    /// Takes connection `number`, if it is one of those that were agreed and nobody has had it.
    async fn admit(&self, number: u8) -> Result<Transport, String> {
        let transport = self.expects(number).await?;
        if !self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(number) {
            return Err(format!("connection {number} of this migration's memory stream has been connected before"));
        }
        Ok(transport)
    }

    /// Connection `number` has gone before it said anything.
    fn release(&self, number: u8) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
    }
}
