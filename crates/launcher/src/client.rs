//! The handler's end of the launcher RPC.

use crate::rpc::{self, ErrorBody, Refusal};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// Why a call did not give an answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens on the socket: the launcher has not started yet, or is gone.
    #[error("the launcher does not answer on {socket}: {source}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The launcher took too long. What was ordered may or may not have happened; ask for the state.
    #[error("the launcher did not answer {call} within {after:?}; ask for its state before ordering again")]
    Timeout {
        /// The call.
        call: String,
        /// How long was waited.
        after: Duration,
    },
    /// The connection broke in the middle of a call.
    #[error("the connection to the launcher broke during {call}: {message}")]
    Broken {
        /// The call.
        call: String,
        /// What went wrong.
        message: String,
    },
    /// The launcher refused the order.
    #[error("the launcher refused {call}: {message}")]
    Refused {
        /// The call.
        call: String,
        /// For a program.
        reason: Refusal,
        /// For a person.
        message: String,
        /// What kind of failure of QEMU's it is, where it is one.
        cause: Option<rpc::Cause>,
    },
    /// The answer is not what this build understands.
    #[error("the launcher's answer to {call} cannot be read: {message}")]
    Unreadable {
        /// The call.
        call: String,
        /// What is wrong with it.
        message: String,
    },
}

impl Error {
    /// The launcher's reason, when it refused.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Error::Refused { reason, .. } => Some(*reason),
            _ => None,
        }
    }

    /// What kind of failure of QEMU's it is, when the launcher refused because of one.
    pub fn cause(&self) -> Option<rpc::Cause> {
        match self {
            Error::Refused { cause, .. } => *cause,
            _ => None,
        }
    }
}

/// Calls one launcher. Cheap to clone; each call is a connection of its own, so calls never wait for each other.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

/// Long enough for a QEMU to start on a busy machine, short enough to notice a launcher that hangs.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes of one answer or one line of the stream.
const MAX_BODY: usize = 8 << 20;

impl Client {
    /// A client of the launcher behind this socket (`launcher.sock`). Does not connect yet.
    ///
    /// A path of 108 bytes or more does not fit a unix socket address; it is then reached through `/proc/self/fd`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Client { socket: socket.into(), timeout: TIMEOUT }
    }

    /// The same with another limit on how long a call may take (the stream of `watch` is not limited).
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The whole truth about the VM.
    pub async fn state(&self) -> Result<rpc::State, Error> {
        self.call(Method::GET, rpc::STATE, None::<&()>).await
    }

    /// QEMU's events, in order.
    pub async fn events(&self) -> Result<Vec<rpc::EventRecord>, Error> {
        self.call(Method::GET, rpc::EVENTS, None::<&()>).await
    }

    /// The state now and after each change, until the launcher ends.
    pub async fn watch(&self) -> Result<Watch, Error> {
        let call = format!("GET {}", rpc::WATCH);
        let response = self.limited(&call, self.send(&call, Method::GET, rpc::WATCH, Bytes::new())).await?;
        let response = self.checked(&call, response).await?;
        Ok(Watch { body: response.into_body(), buffer: Vec::new(), call })
    }

    /// Define and start the VM.
    pub async fn start(&self, order: &rpc::VmOrder) -> Result<rpc::State, Error> {
        self.call(Method::PUT, rpc::VM, Some(order)).await
    }

    /// Hand the guest's memory over on this socket.
    pub async fn lend_memory(&self, uid: &str, socket: &str) -> Result<rpc::State, Error> {
        let order = rpc::LendOrder { migration_uid: uid.into(), socket: socket.into() };
        self.call(Method::POST, rpc::MIGRATION_LEND, Some(&order)).await
    }

    /// Plug disks in and take disks out.
    pub async fn change_disks(&self, order: &rpc::DisksOrder) -> Result<rpc::State, Error> {
        self.call(Method::PUT, rpc::DISKS, Some(order)).await
    }

    /// Prepare to receive.
    pub async fn prepare_target(&self, order: &rpc::TargetOrder) -> Result<rpc::TargetReady, Error> {
        self.call(Method::PUT, rpc::MIGRATION_TARGET, Some(order)).await
    }

    /// Target: receive memory in this way. The answer's [`rpc::MigrationFacts::transport`] is the way that stands.
    pub async fn receive_by(&self, migration_uid: &str, transport: rpc::Transport) -> Result<rpc::State, Error> {
        let order = rpc::TransportOrder { migration_uid: migration_uid.into(), transport };
        self.call(Method::PUT, rpc::MIGRATION_TRANSPORT, Some(&order)).await
    }

    /// Start the outgoing migration. The same order again with another bandwidth changes the bandwidth.
    pub async fn migrate(&self, order: &rpc::SourceOrder) -> Result<rpc::State, Error> {
        self.call(Method::PUT, rpc::MIGRATION_SOURCE, Some(order)).await
    }

    /// Cancel the outgoing migration. The answer says which it was: `cancelled`, or too late
    /// ([`rpc::MigrationFacts::handed_over`]), or still `cancelling` when QEMU takes its time.
    pub async fn cancel(&self, migration_uid: &str) -> Result<rpc::State, Error> {
        self.about(rpc::MIGRATION_CANCEL, migration_uid).await
    }

    /// Source: run the guest at the target as soon as can be, and let the rest of its memory follow.
    pub async fn post_copy(&self, migration_uid: &str) -> Result<rpc::State, Error> {
        self.about(rpc::MIGRATION_POST_COPY, migration_uid).await
    }

    /// Source: stop the guest so that its migration comes to an end. It runs again at the target, or here if that fails.
    pub async fn pause_to_migrate(&self, migration_uid: &str) -> Result<rpc::State, Error> {
        self.about(rpc::MIGRATION_PAUSE, migration_uid).await
    }

    /// Target: the source is stopped for good; run the guest.
    pub async fn go(&self, migration_uid: &str) -> Result<rpc::State, Error> {
        self.hand(migration_uid, false).await
    }

    /// Target: the source is stopped for good; the guest is this end's now and stays paused as it was there.
    pub async fn go_paused(&self, migration_uid: &str) -> Result<rpc::State, Error> {
        self.hand(migration_uid, true).await
    }

    async fn hand(&self, migration_uid: &str, paused: bool) -> Result<rpc::State, Error> {
        let order = rpc::GoOrder { migration_uid: migration_uid.into(), paused, run_until: None };
        self.give_go(&order).await
    }

    /// Target: the go, whole.
    pub async fn give_go(&self, order: &rpc::GoOrder) -> Result<rpc::State, Error> {
        self.call(Method::POST, rpc::MIGRATION_GO, Some(order)).await
    }

    /// The guest may run until then.
    pub async fn run_until(&self, order: rpc::RunUntilOrder) -> Result<rpc::State, Error> {
        self.call(Method::PUT, rpc::RUN_UNTIL, Some(&order)).await
    }

    /// Take another link for the guest's memory in post-copy: the target listens on this socket, the source dials it.
    pub async fn recover(&self, migration_uid: &str, socket: &str) -> Result<rpc::State, Error> {
        let order = rpc::LinkOrder { migration_uid: migration_uid.into(), socket: socket.into() };
        self.call(Method::POST, rpc::MIGRATION_RECOVER, Some(&order)).await
    }

    /// Carry the memory stream over connections that wait behind a socket.
    pub async fn carry(&self, order: &rpc::CarryOrder) -> Result<rpc::State, Error> {
        self.call(Method::POST, rpc::MIGRATION_CARRY, Some(order)).await
    }

    /// Target: the guest lives elsewhere; end this QEMU.
    pub async fn abandon(&self, migration_uid: &str) -> Result<rpc::State, Error> {
        self.about(rpc::MIGRATION_ABANDON, migration_uid).await
    }

    /// Shut the guest down. Answers once that has begun.
    pub async fn shutdown(&self, grace: Duration) -> Result<rpc::State, Error> {
        self.call(Method::POST, rpc::SHUTDOWN, Some(&rpc::ShutdownOrder { grace_seconds: grace.as_secs() })).await
    }

    /// Stop the guest's CPUs.
    pub async fn pause(&self) -> Result<rpc::State, Error> {
        self.call(Method::POST, rpc::PAUSE, None::<&()>).await
    }

    /// Measure anew how fast the guest writes to its memory; what comes of it is told in the state.
    pub async fn measure(&self) -> Result<rpc::State, Error> {
        self.call(Method::POST, rpc::MEASURE, None::<&()>).await
    }

    /// Let the guest's CPUs run again.
    pub async fn unpause(&self) -> Result<rpc::State, Error> {
        self.call(Method::POST, rpc::UNPAUSE, None::<&()>).await
    }

    /// Press the machine's reset button.
    pub async fn reset(&self) -> Result<rpc::State, Error> {
        self.call(Method::POST, rpc::RESET, None::<&()>).await
    }

    /// Have the guest reboot itself.
    pub async fn reboot(&self) -> Result<rpc::State, Error> {
        self.call(Method::POST, rpc::REBOOT, None::<&()>).await
    }

    /// What the guest agent says now.
    pub async fn guest(&self) -> Result<rpc::GuestAnswers, Error> {
        self.call(Method::GET, rpc::GUEST, None::<&()>).await
    }

    async fn about<T: DeserializeOwned>(&self, path: &str, migration_uid: &str) -> Result<T, Error> {
        self.call(Method::POST, path, Some(&rpc::MigrationRef { migration_uid: migration_uid.into() })).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Error> {
        let call = format!("{method} {path}");
        let unreadable = |e: serde_json::Error| Error::Unreadable { call: call.clone(), message: e.to_string() };
        let body = match body {
            Some(body) => Bytes::from(serde_json::to_vec(body).map_err(unreadable)?),
            None => Bytes::new(),
        };
        let bytes = self
            .limited(&call, async {
                let response = self.send(&call, method, path, body).await?;
                let response = self.checked(&call, response).await?;
                collect(&call, response.into_body()).await
            })
            .await?;
        serde_json::from_slice(&bytes).map_err(unreadable)
    }

    async fn limited<T>(&self, call: &str, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        match tokio::time::timeout(self.timeout, work).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout { call: call.into(), after: self.timeout }),
        }
    }

    async fn send(
        &self,
        call: &str,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<http::Response<Incoming>, Error> {
        let broken = |e: &dyn std::fmt::Display| Error::Broken { call: call.into(), message: e.to_string() };
        let stream =
            connect(&self.socket).await.map_err(|source| Error::Connect { socket: self.socket.clone(), source })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
        // Ends by itself with the last of the two: the sender (dropped below) or the body being read.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "launcher connection ended");
            }
        });
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, "launcher")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|e| broken(&e))?;
        sender.send_request(request).await.map_err(|e| broken(&e))
    }

    async fn checked(&self, call: &str, response: http::Response<Incoming>) -> Result<http::Response<Incoming>, Error> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = collect(call, response.into_body()).await?;
        let (reason, message, cause) = match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => (body.reason, body.message, body.cause),
            Err(_) => {
                let reason = match status {
                    StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => Refusal::NotFound,
                    s if s.is_client_error() => Refusal::BadRequest,
                    _ => Refusal::Failed,
                };
                (reason, format!("{status}: {}", String::from_utf8_lossy(&bytes)), None)
            }
        };
        Err(Error::Refused { call: call.into(), reason, message, cause })
    }
}

/// The stream of states.
#[derive(Debug)]
pub struct Watch {
    body: Incoming,
    buffer: Vec<u8>,
    call: String,
}

impl Watch {
    /// The next state; `None` when the launcher has ended the stream, which it does only when it ends itself.
    pub async fn next(&mut self) -> Result<Option<rpc::State>, Error> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|e| Error::Unreadable { call: self.call.clone(), message: e.to_string() });
            }
            if self.buffer.len() > MAX_BODY {
                return Err(Error::Unreadable { call: self.call.clone(), message: "a line without end".into() });
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(e)) => return Err(Error::Broken { call: self.call.clone(), message: e.to_string() }),
            }
        }
    }
}

async fn collect(call: &str, body: Incoming) -> Result<Bytes, Error> {
    match http_body_util::Limited::new(body, MAX_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(e) => Err(Error::Broken { call: call.into(), message: e.to_string() }),
    }
}

/// Connects to this very socket: the pod puts there what it likes, and a symbolic link could lead to any socket of the node. A path
/// may be too long for a socket address (`sun_path` holds 107 bytes; kubelet paths can be longer).
async fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    use nix::libc::{O_CLOEXEC, O_NOFOLLOW, O_PATH};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
    // Somebody has opened it already.
    if socket.parent() == Some(Path::new(DESCRIPTORS)) {
        return UnixStream::connect(socket).await;
    }
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(O_PATH | O_NOFOLLOW | O_CLOEXEC).open(socket)?;
    if !opened.metadata()?.file_type().is_socket() {
        return Err(std::io::Error::other("it is not a socket"));
    }
    UnixStream::connect(Path::new(DESCRIPTORS).join(opened.as_raw_fd().to_string())).await
}

const DESCRIPTORS: &str = "/proc/self/fd";

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_link_is_not_followed_and_a_long_path_is_no_hindrance() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("x".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let (short, long) = (folder.path().join("short.sock"), deep.join("launcher.sock"));
        let _listener = tokio::net::UnixListener::bind(&short).unwrap();
        std::os::unix::fs::symlink(&short, &long).unwrap();
        assert!(connect(&short).await.is_ok());
        assert!(connect(&long).await.is_err(), "it leads to another one");
        std::fs::remove_file(&long).unwrap();
        std::fs::rename(&short, &long).unwrap();
        assert!(connect(&long).await.is_ok());
        let opened = std::fs::File::open(&deep).unwrap();
        let through = format!("/proc/self/fd/{}/launcher.sock", std::os::fd::AsRawFd::as_raw_fd(&opened));
        assert!(connect(Path::new(&through)).await.is_ok());
        std::fs::write(folder.path().join("file"), "").unwrap();
        assert!(connect(&folder.path().join("file")).await.is_err());
    }
}
