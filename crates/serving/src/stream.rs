//! Streams over websockets.

use crate::respond::{self, Reply};
use bytes::Bytes;
use futures::future::BoxFuture;
use godwit_machinery::status::Status;
use http::header::SEC_WEBSOCKET_PROTOCOL;
use http::{HeaderMap, HeaderValue};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::server as handshake;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

pub use tokio_tungstenite::tungstenite::Message;
pub use tokio_tungstenite::tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};

/// The most bytes of one message on a stream, and of one frame. virtctl sends 32 KiB at most.
const LARGEST_MESSAGE: usize = 64 << 10;

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
pub type WebSocket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// Opens a stream: first its other end, so that a refusal is an answer like any other. `what` is named to a client that does not
/// ask for a websocket, `upgrade` is its connection, and the stream ends with `stopped`.
///
/// # Errors
/// A request for no websocket, or a refusal of the other end.
pub async fn open(
    stream: Stream,
    what: &str,
    headers: &HeaderMap,
    upgrade: impl FnOnce() -> Option<OnUpgrade>,
    stopped: impl Future<Output = ()> + Send + 'static,
) -> Reply {
    let Stream { protocol, open } = stream;
    let mut request = http::Request::new(());
    *request.headers_mut() = headers.clone();
    let accepted = handshake::create_response(&request)
        .map_err(|error| Status::bad_request(format!("{what} is a websocket: {error}")))?;
    let upgrade = upgrade().ok_or_else(|| Status::bad_request("this connection cannot become a websocket"))?;
    let session = open.await?;
    let (mut parts, ()) = accepted.into_parts();
    let offered = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    if offered.flat_map(|list| list.split(',')).any(|one| one.trim() == protocol) {
        parts.headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
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
            () = stopped => {}
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
