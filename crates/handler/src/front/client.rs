//! The API server's half of the door.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use godwit_launcher::console::Hello;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{CONSOLE, PORT, Refused, SCREEN, path};
use crate::tls::{Identity, TlsPaths};

/// How long a node may take to be reached and to answer. An agent that is asked may take a while.
const PATIENCE: Duration = Duration::from_secs(30);
/// Most bytes of one answer.
const LARGEST_ANSWER: usize = 8 << 20;

/// Opens a TCP connection to an address of the nodes' network.
pub type Dial = Arc<dyn Fn(SocketAddr) -> BoxFuture<'static, io::Result<TcpStream>> + Send + Sync>;

/// Why a node did not do it.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It could not be asked, or did not answer.
    #[error("node {node}: {why}")]
    Unreachable {
        /// The node.
        node: String,
        /// What went wrong.
        why: String,
    },
    /// It refused.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// For a person.
        message: String,
    },
}

/// What is shown to handlers, at the moment: a certificate of [`super::CLIENT_NAME`].
pub type Show = Arc<dyn Fn() -> Result<Identity, String> + Send + Sync>;

/// Calls handlers. Each call is a connection of its own.
#[derive(Clone)]
pub struct FrontClient {
    show: Show,
    dial: Dial,
    port: u16,
}

impl FrontClient {
    /// With the certificate of [`super::CLIENT_NAME`] in files, which are read for each call.
    pub fn new(files: TlsPaths, dial: Dial) -> Self {
        Self::showing(Arc::new(move || Identity::load(&files).map_err(|error| error.to_string())), dial)
    }

    /// With a certificate that is asked for at each call.
    pub fn showing(show: Show, dial: Dial) -> Self {
        Self { show, dial, port: PORT }
    }

    /// Of handlers that listen on another port than [`PORT`].
    #[must_use]
    pub fn at_port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    #[cfg(test)]
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// A call about the guest in a pod of a node, which is at this address; the JSON that is answered, null when it is nothing.
    ///
    /// # Errors
    /// A node that is not reached, or refuses.
    pub async fn call(
        &self,
        (node, address): (&str, IpAddr),
        method: Method,
        pod_uid: &str,
        call: &str,
    ) -> Result<serde_json::Value, CallError> {
        let unreachable = |why: String| CallError::Unreachable { node: node.to_owned(), why };
        let work = async {
            let request = Request::builder().method(method).uri(path(pod_uid, call)).header(header::HOST, node);
            let request = request.body(Empty::<Bytes>::new()).map_err(|e| unreachable(e.to_string()))?;
            let response = self.send((node, address), request).await.map_err(unreachable)?;
            let body = checked(response).await?;
            if body.is_empty() {
                return Ok(serde_json::Value::Null);
            }
            serde_json::from_slice(&body).map_err(|e| unreachable(e.to_string()))
        };
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(done) => done,
            Err(_) => Err(unreachable("it does not answer in time".to_owned())),
        }
    }

    /// Opens the console of the guest in a pod.
    ///
    /// # Errors
    /// As of [`FrontClient::call`].
    pub async fn console(
        &self,
        at: (&str, IpAddr),
        pod_uid: &str,
        hello: Hello,
    ) -> Result<TokioIo<Upgraded>, CallError> {
        let query = hello.from.map(|from| format!("?from={from}")).unwrap_or_default();
        self.stream(at, format!("{}{query}", path(pod_uid, "console")), CONSOLE).await
    }

    /// Opens the screen of the guest in a pod: the bytes are those of VNC. A newer one closes it, unless it is told to `preserve`
    /// the one that is open; then it is refused itself.
    ///
    /// # Errors
    /// As of [`FrontClient::call`].
    pub async fn screen(
        &self,
        at: (&str, IpAddr),
        pod_uid: &str,
        preserve: bool,
    ) -> Result<TokioIo<Upgraded>, CallError> {
        self.stream(at, format!("{}?preserve={preserve}", path(pod_uid, "vnc")), SCREEN).await
    }

    async fn stream(
        &self,
        (node, address): (&str, IpAddr),
        path: String,
        protocol: &'static str,
    ) -> Result<TokioIo<Upgraded>, CallError> {
        let unreachable = |why: String| CallError::Unreachable { node: node.to_owned(), why };
        let work = async {
            let request = Request::get(path)
                .header(header::HOST, node)
                .header(header::CONNECTION, "upgrade")
                .header(header::UPGRADE, protocol);
            let request = request.body(Empty::<Bytes>::new()).map_err(|e| unreachable(e.to_string()))?;
            let response = self.send((node, address), request).await.map_err(unreachable)?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                let status = response.status();
                checked(response).await?;
                return Err(unreachable(format!("it answers a stream with {status}")));
            }
            let upgraded = hyper::upgrade::on(response).await.map_err(|e| unreachable(e.to_string()))?;
            Ok(TokioIo::new(upgraded))
        };
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(done) => done,
            Err(_) => Err(unreachable("it does not answer in time".to_owned())),
        }
    }

    async fn send(
        &self,
        (node, address): (&str, IpAddr),
        request: Request<Empty<Bytes>>,
    ) -> Result<Response<Incoming>, String> {
        let tcp = (self.dial)(SocketAddr::new(address, self.port)).await.map_err(|e| e.to_string())?;
        tcp.set_nodelay(true).map_err(|e| e.to_string())?;
        let config = (self.show)()?.client(node).map_err(|e| e.to_string())?;
        let name = ServerName::IpAddress(address.into());
        let stream = TlsConnector::from(config).connect(name, tcp).await.map_err(|e| e.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "connection to a handler ended");
            }
        });
        sender.send_request(request).await.map_err(|e| e.to_string())
    }
}

/// The body of an answer that is a success.
async fn checked(response: Response<Incoming>) -> Result<Bytes, CallError> {
    let status = response.status();
    let body = Limited::new(response.into_body(), LARGEST_ANSWER).collect().await;
    let body = body.map(|all| all.to_bytes()).unwrap_or_default();
    if status.is_success() {
        return Ok(body);
    }
    let message = match serde_json::from_slice::<Refused>(&body) {
        Ok(refused) => refused.message,
        Err(_) => format!("the handler answers {status}"),
    };
    Err(CallError::Refused { status: status.as_u16(), message })
}
