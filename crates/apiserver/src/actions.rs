//! Actions: subresources of a group of their own, about objects of another group (KubeVirt's `subresources.kubevirt.io`).
//! What an action comes to is a plugin's to say: writes, which are made as any other update is, an answer from elsewhere, or a
//! stream over a websocket.

use crate::Lookup;
use crate::create;
use crate::intake;
use crate::managed;
use crate::respond::{self, Reply};
use crate::server::{Context, stopped};
use crate::update::{ATTEMPTS, Change, change_object};
use crate::user::User;
use bytes::Bytes;
use futures::future::BoxFuture;
use godwit_machinery::patch::merge_patch;
use godwit_machinery::resource::{GroupVersion, Resource};
use godwit_machinery::status::{Status, success};
use http::header::SEC_WEBSOCKET_PROTOCOL;
use http::{HeaderValue, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::server as handshake;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

/// The most bytes of one message on a stream, and of one frame. virtctl sends 32 KiB at most.
const LARGEST_MESSAGE: usize = 64 << 10;

/// One request for an action.
pub struct ActionRequest<'a> {
    /// The resource in the action's own group, as `virtualmachineinstances`.
    pub resource: &'a str,
    /// The action, as `start` or `evacuate/cancel`.
    pub action: &'a str,
    /// The object's namespace.
    pub namespace: &'a str,
    /// The object's name.
    pub name: &'a str,
    /// What the client sent; null when that was nothing.
    pub body: &'a Value,
    /// Who asks. That they may has been checked.
    pub user: &'a User,
    /// The query's parameters, in their order.
    pub query: &'a [(String, String)],
    /// Stored objects, now and later.
    pub lookup: Arc<dyn Lookup>,
}

/// What becomes of an action.
pub enum Outcome {
    /// It is a change of objects.
    Write(Deed),
    /// Somebody else carries it out, or knows the answer.
    Call(BoxFuture<'static, Result<Answer, Status>>),
    /// It is a stream.
    Stream(Stream),
}

/// An answer.
pub struct Answer {
    /// The HTTP code.
    pub code: u16,
    /// The body; none is an empty one.
    pub body: Option<Value>,
}

/// An action that is a stream over a websocket.
pub struct Stream {
    /// The websocket's subprotocol, for clients that offer some.
    pub protocol: &'static str,
    /// Opens the other end; the client's becomes a websocket when that has been done.
    pub open: BoxFuture<'static, Result<Session, Status>>,
}

/// Carries a stream until its end.
pub type Session = Box<dyn FnOnce(WebSocket) -> BoxFuture<'static, ()> + Send>;

/// The client's end of a stream.
pub type WebSocket = tokio_tungstenite::WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// What an action comes to.
pub struct Deed {
    /// The HTTP code of the answer.
    pub code: u16,
    /// What is written, in this order. When the first finds its object changed, the action is decided anew. The others follow
    /// from it, and are left out where their object is gone by then.
    pub writes: Vec<ActionWrite>,
    /// Who writes.
    pub user: User,
    /// Everything is checked and nothing is written.
    pub dry_run: bool,
}

/// One write of an action, in the namespace of its request.
pub enum ActionWrite {
    /// Changes an object.
    Patch {
        /// The object's group.
        group: String,
        /// Its plural.
        plural: String,
        /// Its name.
        name: String,
        /// Its `status` subresource is written.
        status: bool,
        /// A merge patch that carries the `metadata.resourceVersion` that it was decided on, or at least the `metadata.uid`.
        patch: Value,
    },
    /// Makes an object. When that is refused, the answer is an internal error with the refusal in it.
    Create {
        /// The object's group.
        group: String,
        /// Its plural.
        plural: String,
        /// The object.
        object: Value,
    },
}

/// A group of actions.
pub trait Actions: Send + Sync {
    /// What discovery says of them: resources that have nothing but subresources ([`Resource::actions_only`]).
    fn resources(&self) -> Vec<Resource>;

    /// Decides what becomes of an action. A Status refuses it.
    fn act(&self, request: &ActionRequest<'_>) -> Result<Outcome, Status>;

    /// What is answered to a path right below one of the group's versions, such as `version`; none where there is nothing.
    fn root(&self, _path: &str, _lookup: &dyn Lookup) -> Option<Result<Value, Status>> {
        None
    }

    /// What is answered to an action that [`Actions::resources`] does not name, instead of a plain 404.
    fn unknown(&self, _resource: &str, _action: &str) -> Option<Status> {
        None
    }
}

fn plugin<'a>(cx: &'a Context, gv: &GroupVersion) -> Option<&'a Arc<dyn Actions>> {
    cx.inner.actions.iter().find(|one| one.resources().iter().any(|resource| resource.gv == *gv))
}

/// A path right below a version of a group of actions.
pub(crate) fn root(cx: &Context) -> Reply {
    let info = &cx.info;
    let gv = GroupVersion { group: info.group.clone(), version: info.version.clone() };
    let answer = plugin(cx, &gv).filter(|_| info.namespace.is_empty() && info.name.is_empty());
    let answer = answer.and_then(|plugin| plugin.root(&info.resource, cx.inner.as_ref()));
    let answer = answer.ok_or_else(Status::no_such_resource)??;
    if info.verb != "list" {
        return Err(Status::method_not_allowed());
    }
    Ok(respond::json(StatusCode::OK, &answer))
}

/// `PUT` to an action, or `GET` of one that tells something or opens a stream.
pub(crate) async fn act(cx: &Context, resource: &Resource, bytes: &Bytes) -> Reply {
    let info = &cx.info;
    let plugin = plugin(cx, &resource.gv).ok_or_else(Status::no_such_resource)?;
    if info.subresource.is_empty() || !info.rest.is_empty() || !resource.subresources.contains(&info.subresource) {
        let action = [info.subresource.as_str(), &info.rest].join("/");
        let unknown = [info.subresource.as_str(), action.trim_end_matches('/')];
        let said = unknown.iter().find_map(|action| plugin.unknown(&info.resource, action));
        return Err(said.unwrap_or_else(Status::no_such_resource));
    }
    let verb = if resource.gettable.contains(&info.subresource) { "get" } else { "update" };
    if info.verb != verb {
        return Err(Status::method_not_allowed());
    }
    let body = if bytes.iter().all(u8::is_ascii_whitespace) { Value::Null } else { intake::other(cx, bytes, &[])? };
    let request = ActionRequest {
        resource: &info.resource,
        action: &info.subresource,
        namespace: &info.namespace,
        name: &info.name,
        body: &body,
        user: &cx.user,
        query: cx.params.pairs(),
        lookup: cx.inner.clone(),
    };
    for attempt in 1.. {
        let deed = match plugin.act(&request)? {
            Outcome::Write(deed) => deed,
            Outcome::Call(call) => return answered(call.await?),
            Outcome::Stream(stream) => return open(cx, stream).await,
        };
        let code = StatusCode::from_u16(deed.code).map_err(Status::internal_error)?;
        match carry_out(cx, deed).await {
            Ok(()) => {
                let mut answer = success(None);
                answer["code"] = json!(code.as_u16());
                return Ok(respond::json(code, &answer));
            }
            Err(why) if why.code == 409 && attempt < ATTEMPTS => {}
            Err(why) => return Err(why),
        }
    }
    Err(Status::internal_error("the action was not carried out"))
}

fn answered(answer: Answer) -> Reply {
    let code = StatusCode::from_u16(answer.code).map_err(Status::internal_error)?;
    match answer.body {
        Some(body) => Ok(respond::json(code, &body)),
        None => Ok(respond::text(code, "")),
    }
}

/// Opens a stream: first its other end, so that a refusal is an answer like any other.
async fn open(cx: &Context, stream: Stream) -> Reply {
    let Stream { protocol, open } = stream;
    let mut request = http::Request::new(());
    *request.headers_mut() = cx.headers.clone();
    let accepted = handshake::create_response(&request).map_err(|error| {
        Status::bad_request(format!("{}/{} is a websocket: {error}", cx.info.resource, cx.info.subresource))
    })?;
    let upgrade = cx.take_upgrade().ok_or_else(|| Status::bad_request("this connection cannot become a websocket"))?;
    let session = open.await?;
    let (mut parts, ()) = accepted.into_parts();
    let offered = cx.headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    if offered.flat_map(|list| list.split(',')).any(|one| one.trim() == protocol) {
        parts.headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
    let mut stopping = cx.inner.stopping.subscribe();
    tokio::spawn(async move {
        let upgraded = match upgrade.await {
            Ok(upgraded) => upgraded,
            Err(error) => {
                tracing::debug!(%error, "a client left before its stream began");
                return;
            }
        };
        let socket = socket(TokioIo::new(upgraded)).await;
        tokio::select! {
            () = session(socket) => {}
            () = stopped(&mut stopping) => {}
        }
    });
    Ok(http::Response::from_parts(parts, respond::full(Bytes::new())))
}

/// The server's end of a websocket whose handshake is over.
async fn socket<S: AsyncRead + AsyncWrite + Unpin>(stream: S) -> WebSocketStream<S> {
    let limits = WebSocketConfig::default()
        .max_message_size(Some(LARGEST_MESSAGE))
        .max_frame_size(Some(LARGEST_MESSAGE))
        .read_buffer_size(LARGEST_MESSAGE);
    WebSocketStream::from_raw_socket(stream, Role::Server, Some(limits)).await
}

async fn carry_out(cx: &Context, deed: Deed) -> Result<(), Status> {
    let dry_run = deed.dry_run || cx.dry_run()?;
    let user = Arc::new(deed.user);
    let namespace = cx.info.namespace.as_str();
    for (index, write) in deed.writes.into_iter().enumerate() {
        let mut own = Context::internal(&cx.inner);
        own.user = user.clone();
        let manager = managed::Manager::of(cx)?;
        match write {
            ActionWrite::Patch { group, plural, name, status, patch } => {
                let missing = || Status::not_found(&group, &plural, &name);
                let kind = cx.kinds.any_version(&group, &plural).cloned().ok_or_else(missing)?;
                if status {
                    own.info.subresource = "status".to_owned();
                }
                let change = Change { namespace, name: &name, dry_run, manager };
                let written = change_object(&own, &kind, &change, |old| {
                    let mut new = merge_patch(old, &patch)?;
                    intake::shape(&kind, &mut new)?;
                    Ok(new)
                });
                match written.await {
                    // Gone, or another one of its name: the first write was enough.
                    Err(why) if index > 0 && matches!(why.code, 404 | 409) => {}
                    written => drop(written?),
                }
            }
            ActionWrite::Create { group, plural, object } => {
                let missing = || Status::not_found(&group, &plural, "");
                let kind = cx.kinds.any_version(&group, &plural).cloned().ok_or_else(missing)?;
                let made = create::insert(&own, &kind, namespace, object, dry_run, &manager).await;
                made.map_err(|why| Status::internal_error(why.message))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::{Error, Message};

    use super::*;

    #[tokio::test]
    async fn a_client_cannot_have_the_server_keep_a_large_message() {
        let (near, far) = tokio::io::duplex(4 << 10);
        let mut server = socket(near).await;
        let client = tokio::spawn(async move {
            let mut client = WebSocketStream::from_raw_socket(far, Role::Client, None).await;
            let _ = client.send(Message::Binary(vec![0; LARGEST_MESSAGE].into())).await;
            // The server leaves in the middle.
            let _ = client.send(Message::Binary(vec![0; LARGEST_MESSAGE + 1].into())).await;
        });
        let fits = server.next().await.unwrap().unwrap();
        assert_eq!(fits.len(), LARGEST_MESSAGE);
        let error = server.next().await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Capacity(_)), "{error}");
        drop(server);
        client.await.unwrap();
    }
}
