//! The door's listening half: TLS, and who may come in.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::CLIENT_NAME;
use crate::tls::{self, TlsPaths};

/// How long a client may take for its handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// Handshakes in progress. Where there are more, the oldest makes room: whoever connects and says nothing keeps nobody out.
pub(super) const HANDSHAKES: usize = 64;
/// Before the next attempt when the address cannot be had.
const RETRY: Duration = Duration::from_secs(2);

/// Connections of clients that have shown who they are.
pub(super) struct Listener {
    address: SocketAddr,
    accepted: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    task: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listener {
    /// Listens, as soon as the address can be had.
    pub(super) async fn bind(address: SocketAddr, files: TlsPaths) -> Self {
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(error) => {
                    tracing::warn!(%error, %address, "the API server cannot reach this node's guests; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        };
        let address = listener.local_addr().unwrap_or(address);
        let (entered, accepted) = mpsc::channel(1);
        let task = tokio::spawn(accept(listener, files, entered));
        Self { address, accepted, task }
    }
}

impl axum::serve::Listener for Listener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.accepted.recv().await {
            Some(accepted) => accepted,
            // The task has been aborted: nobody comes any more.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.address)
    }
}

async fn accept(listener: TcpListener, files: TlsPaths, entered: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>) {
    let files = Arc::new(files);
    let mut connections = tokio::task::JoinSet::new();
    let mut oldest_first: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept; trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        oldest_first.retain(|handshake| !handshake.is_finished());
        if oldest_first.len() >= HANDSHAKES
            && let Some(oldest) = oldest_first.pop_front()
        {
            tracing::warn!("too many handshakes at the door for the API server: the oldest is broken off");
            oldest.abort();
        }
        let (files, entered) = (files.clone(), entered.clone());
        let handshake = connections.spawn(async move {
            let shaken = match tokio::time::timeout(HANDSHAKE_TIME, enter(stream, &files)).await {
                Ok(result) => result,
                Err(_) => Err("no handshake in time".to_owned()),
            };
            match shaken {
                // Nobody takes it any more at the handler's end.
                Ok(stream) => drop(entered.send((stream, peer)).await),
                Err(reason) => tracing::warn!(%peer, reason, "refused at the door for the API server"),
            }
        });
        oldest_first.push_back(handshake);
    }
}

async fn enter(stream: TcpStream, files: &TlsPaths) -> Result<TlsStream<TcpStream>, String> {
    // What is typed goes at once.
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    // Read anew for each, so that a rotated certificate counts.
    let identity = tls::Identity::load(files).map_err(|e| e.to_string())?;
    let config = identity.server().map_err(|e| e.to_string())?;
    let stream = TlsAcceptor::from(config).accept(stream).await.map_err(|e| format!("handshake: {e}"))?;
    match stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()) {
        Some(cert) => tls::check_name(cert, CLIENT_NAME)?,
        None => return Err("peer shows no certificate".to_owned()),
    }
    Ok(stream)
}
