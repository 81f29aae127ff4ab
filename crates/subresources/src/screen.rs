//! The screen of a guest (VNC), from a websocket to the node where the guest is. QEMU's words are handed on as they are, so a screen
//! does not follow its guest: it is closed when that has moved, and says so.

use futures::{SinkExt, Stream as Messages, StreamExt};
use godwit_api::names::GROUP;
use godwit_api::subresources::PLAIN;
use godwit_handler::front::{CallError, FrontClient, Spot, Whereabouts};
use godwit_machinery::status::Status;
use godwit_serving::stream::{Message, Session, Stream, WebSocket};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::console::{Guest, part};

/// The most bytes of one message to the client.
const LARGEST: usize = 32 << 10;
/// Between two looks at where the guest is.
const LOOK: Duration = Duration::from_secs(1);
/// The same when it must be about to be somewhere else.
const SOON: Duration = Duration::from_millis(100);
/// How long after the screen's end the guest may take to be somewhere else. A migration may take hours, and a screen that somebody
/// else has opened meanwhile is not to stay so long.
const SETTLE: Duration = Duration::from_secs(30);
/// How many bytes of the client's may wait for QEMU. One that has more to say gives up a QEMU that hangs.
const UNTAKEN: usize = 4 << 20;
/// How long QEMU may take for what the client said before it went.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The screen of a guest that is at this place now. `preserve`: not if somebody looks at it already.
pub fn stream(front: FrontClient, guest: Guest, spot: Spot, preserve: bool) -> Stream {
    Stream {
        protocol: PLAIN,
        open: Box::pin(async move {
            let opened = front.screen((&spot.node, spot.address), &spot.pod_uid, preserve).await;
            let screen = opened.map_err(|error| match error {
                CallError::Refused { status: 409, message } => {
                    Status::conflict_because(GROUP, "virtualmachineinstance", &guest.name, &message)
                }
                other => Status::internal_error(other),
            })?;
            let session: Session = Box::new(move |socket| Box::pin(carry(socket, guest, spot, screen)));
            Ok(session)
        }),
    }
}

/// Between the client's websocket and QEMU, until either goes or the guest is elsewhere.
async fn carry(socket: WebSocket, guest: Guest, spot: Spot, screen: impl AsyncRead + AsyncWrite) {
    let (mut out, mut within) = socket.split();
    let (mut shown, typed) = tokio::io::split(screen);
    let incoming = hand_on(&mut within, typed);
    let outgoing = async {
        let mut buffer = vec![0; LARGEST];
        while let Ok(length) = shown.read(&mut buffer).await {
            let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else { return };
            if out.send(Message::Binary(bytes.to_vec().into())).await.is_err() {
                return;
            }
        }
    };
    let leaves = async {
        while elsewhere(&guest, &spot).await.is_none() {
            tokio::time::sleep(LOOK).await;
        }
    };
    // QEMU goes a moment before it is written down where the guest is.
    let ends = async {
        outgoing.await;
        let moved = async {
            while is_moving(&guest, &spot).await {
                tokio::time::sleep(SOON).await;
            }
        };
        let _ = tokio::time::timeout(SETTLE, moved).await;
    };
    tokio::select! {
        () = incoming => {}
        () = ends => {}
        () = leaves => {}
    }
    let ended = "somebody else has opened the guest's screen, or its node's handler was restarted";
    part(out, within, elsewhere(&guest, &spot).await.unwrap_or_else(|| ended.to_owned())).await;
}

/// What the client says, to QEMU, until the client has gone: that is seen also while QEMU takes nothing.
async fn hand_on<E>(mut within: impl Messages<Item = Result<Message, E>> + Unpin, mut typed: impl AsyncWrite + Unpin) {
    let (queue, mut queued) = mpsc::unbounded_channel();
    let waiting = AtomicUsize::new(0);
    let reads = async {
        while let Some(Ok(message)) = within.next().await {
            let bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Close(_) => return,
                _ => continue,
            };
            let before = waiting.fetch_add(bytes.len(), Ordering::Relaxed);
            if before > UNTAKEN || queue.send(bytes).is_err() {
                return;
            }
        }
    };
    let mut writes = pin!(async {
        while let Some(bytes) = queued.recv().await {
            // What comes when QEMU has gone is for nobody; why it has gone is told by `carry`.
            let _ = typed.write_all(&bytes).await.and(typed.flush().await);
            waiting.fetch_sub(bytes.len(), Ordering::Relaxed);
        }
    });
    tokio::select! {
        () = reads => {}
        () = &mut writes => {}
    }
    drop(queue);
    let _ = tokio::time::timeout(LAST_WORDS, writes).await;
}

/// Whether a guest is on its way from where it was.
async fn is_moving(guest: &Guest, spot: &Spot) -> bool {
    let sight = guest.look(&spot.pod_uid).await;
    !sight.over && sight.next.is_some() && sight.now.is_none_or(|now| now.pod_uid == spot.pod_uid)
}

/// Why a guest is not where it was; none while it is.
async fn elsewhere(guest: &Guest, spot: &Spot) -> Option<String> {
    let sight = guest.look(&spot.pod_uid).await;
    if sight.over {
        return Some("the guest has ended".to_owned());
    }
    let now = sight.now.filter(|now| now.pod_uid != spot.pod_uid)?;
    Some(format!("the guest has moved to {}: connect again", now.node))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;

    fn said(bytes: &'static [u8]) -> Result<Message, ()> {
        Ok(Message::Binary(bytes.into()))
    }

    #[tokio::test]
    async fn what_the_client_said_before_it_went_reaches_qemu() {
        let (ours, mut qemu) = tokio::io::duplex(64);
        hand_on(stream::iter([said(b"one"), said(b"two"), Ok(Message::Close(None))]), ours).await;
        let mut heard = String::new();
        qemu.read_to_string(&mut heard).await.expect("reads");
        assert_eq!(heard, "onetwo");
    }

    #[tokio::test]
    async fn a_client_that_goes_is_seen_while_qemu_takes_nothing() {
        // QEMU's end is there, and nobody reads it.
        let (ours, _qemu) = tokio::io::duplex(1);
        let client = stream::iter([said(b"keys"), said(b"more"), Ok(Message::Close(None))]);
        tokio::time::timeout(Duration::from_secs(60), hand_on(client, ours)).await.expect("it has gone");
    }

    #[tokio::test]
    async fn what_waits_for_qemu_has_a_bound() {
        const LARGE: &[u8] = &[0; 1 << 20];
        let (ours, _qemu) = tokio::io::duplex(1);
        let client = stream::repeat(said(LARGE));
        tokio::time::timeout(Duration::from_secs(60), hand_on(client, ours)).await.expect("it is given up");
    }
}
