//! The node's front door: what the API server has a guest's own node do for KubeVirt's subresources, as it asks KubeVirt's
//! virt-handler: pause, reboot, tell what the guest agent says, open the console.
//!
//! HTTPS on the node's address. The handler shows its node's certificate and lets in only who shows [`CLIENT_NAME`]; whoever
//! asks has checked that the user may. Calls name a launcher pod by its uid, so that a call that arrives late cannot meet
//! another guest.

mod client;
mod follow;
mod listener;
mod screen;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, body::Body};
use godwit_launcher::client::{Client, Error};
use godwit_launcher::console::{self, Hello};
use godwit_launcher::rpc::Refusal;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};

pub use client::{CallError, Dial, FrontClient, Show};
pub use follow::{Here, Sight, Spot, Whereabouts, follow};

use crate::context::Context;
use crate::sockets::{Socket, SocketDir};

/// Where handlers listen unless they are told otherwise (the port of KubeVirt's virt-handler for this).
pub const PORT: u16 = 8186;
/// The common name of the API server's certificate towards handlers (KubeVirt's).
pub const CLIENT_NAME: &str = "kubevirt.io:system:client:virt-handler";
/// What a console's connection is upgraded to: what is typed comes in as it is, [`console::Frame`]s go out. The query is a
/// [`Hello`].
pub const CONSOLE: &str = "godwit-console";

/// What a screen's connection is upgraded to: the bytes of VNC, both ways.
pub const SCREEN: &str = "godwit-vnc";

/// The body of an answer that is not a success.
#[derive(Debug, Serialize, Deserialize)]
pub struct Refused {
    /// For a person.
    pub message: String,
}

/// The path of a call about the guest in a launcher pod: `pause`, `unpause`, `reset`, `softreboot` (PUT), `guest`, `console`, `vnc`
/// (GET).
#[must_use]
pub fn path(pod_uid: &str, call: &str) -> String {
    format!("/v1/pods/{pod_uid}/{call}")
}

/// Serves on this port of the node's address until it is aborted.
pub async fn run(context: Arc<Context>, port: u16) {
    let address = (context.node_ip, port).into();
    let listener = listener::Listener::bind(address, context.tls.clone()).await;
    serve(listener, context.kubelet_root.clone()).await;
}

async fn serve(listener: listener::Listener, kubelet_root: PathBuf) {
    let router = Router::new()
        .route("/v1/pods/{uid}/{call}", put(carry_out))
        .route("/v1/pods/{uid}/guest", get(guest))
        .route("/v1/pods/{uid}/console", get(open_console))
        .with_state(Arc::new(kubelet_root.clone()))
        .route("/v1/pods/{uid}/vnc", get(screen::open).with_state(Arc::new(screen::Screens::of(kubelet_root))));
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "the door for the API server has closed");
    }
}

fn refuse(status: StatusCode, message: impl Into<String>) -> Response {
    (status, Json(Refused { message: message.into() })).into_response()
}

/// The socket where the launcher in a pod takes calls.
fn launcher(kubelet_root: &std::path::Path, uid: &str) -> Result<Socket, Box<Response>> {
    let unheard =
        |error| Box::new(refuse(StatusCode::INTERNAL_SERVER_ERROR, format!("the launcher of pod {uid}: {error}")));
    sockets(kubelet_root, uid)?.socket("launcher.sock").map_err(unheard)
}

/// The sockets of the launcher in a pod.
fn sockets(kubelet_root: &std::path::Path, uid: &str) -> Result<SocketDir, Box<Response>> {
    let is_uid = !uid.is_empty() && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    let missing = || Box::new(refuse(StatusCode::NOT_FOUND, format!("no launcher pod {uid} on this node")));
    if !is_uid {
        return Err(missing());
    }
    SocketDir::open(SocketDir::path_of(kubelet_root, uid)).map_err(|_| missing())
}

fn answer(result: Result<Response, Error>) -> Response {
    result.unwrap_or_else(|error| {
        let status = match error.refusal() {
            Some(Refusal::Conflict) => StatusCode::CONFLICT,
            // An older launcher, which does not know the call.
            Some(Refusal::NotFound | Refusal::Unsupported) => StatusCode::NOT_IMPLEMENTED,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        match error {
            Error::Refused { message, .. } => refuse(status, message),
            other => refuse(status, other.to_string()),
        }
    })
}

async fn carry_out(State(kubelet_root): State<Arc<PathBuf>>, Path((uid, call)): Path<(String, String)>) -> Response {
    let socket = match launcher(&kubelet_root, &uid) {
        Ok(socket) => socket,
        Err(refused) => return *refused,
    };
    let launcher = Client::new(socket.path());
    tracing::info!(pod = uid, call, "asked by the API server");
    let done = match call.as_str() {
        "pause" => launcher.pause().await,
        "unpause" => launcher.unpause().await,
        "reset" => launcher.reset().await,
        "softreboot" => launcher.reboot().await,
        _ => return refuse(StatusCode::NOT_FOUND, format!("no call {call}")),
    };
    answer(done.map(|_| StatusCode::OK.into_response()))
}

async fn guest(State(kubelet_root): State<Arc<PathBuf>>, Path(uid): Path<String>) -> Response {
    let socket = match launcher(&kubelet_root, &uid) {
        Ok(socket) => socket,
        Err(refused) => return *refused,
    };
    let told = Client::new(socket.path()).guest().await;
    answer(told.map(|told| Json(told).into_response()))
}

async fn open_console(
    State(kubelet_root): State<Arc<PathBuf>>,
    Path(uid): Path<String>,
    Query(hello): Query<Hello>,
    mut request: Request,
) -> Response {
    let dir = match sockets(&kubelet_root, &uid) {
        Ok(dir) => dir,
        Err(refused) => return *refused,
    };
    let Some(upgrade) = request.extensions_mut().remove::<hyper::upgrade::OnUpgrade>() else {
        return refuse(StatusCode::BAD_REQUEST, format!("a console needs a connection that can become {CONSOLE}"));
    };
    let mut guest = match dir.connect(console::STREAM).await {
        Ok(guest) => guest,
        Err(error) => return refuse(StatusCode::NOT_IMPLEMENTED, format!("the launcher's console: {error}")),
    };
    if let Err(error) = console::greet(&mut guest, hello).await {
        return refuse(StatusCode::INTERNAL_SERVER_ERROR, format!("the launcher's console: {error}"));
    }
    tokio::spawn(async move {
        let Ok(client) = upgrade.await else { return };
        // Either end may go at any time.
        let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut guest).await;
    });
    becomes(CONSOLE)
}

/// The connection becomes this.
fn becomes(protocol: &'static str) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(protocol));
    response
}
