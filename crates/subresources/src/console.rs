//! The serial console of a guest, from a websocket to whichever node the guest is on.

use crate::objects::{Objects, ask};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use godwit_api::VirtualMachineInstance;
use godwit_api::admission::Lookup;
use godwit_api::names::fence::LEASE_PREFIX;
use godwit_api::names::{ANNOTATION_FENCE_ADDRESS, ANNOTATION_NODE_LOST};
use godwit_api::subresources::{PLAIN, place};
use godwit_handler::front::{CallError, FrontClient, Here, Sight, Spot, Whereabouts, follow};
use godwit_machinery::status::Status;
use godwit_serving::stream::{CloseCode, CloseFrame, Message, Session, Stream, WebSocket};
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Messages on their way in either direction; the guest waits for nobody.
const WAITING: usize = 16;
/// How long a client may take to take leave.
const PARTING: Duration = Duration::from_secs(2);
/// The most bytes that a websocket's reason for its end may have (RFC 6455, 5.5: 125 for the frame, two of them for the code).
const LONGEST_REASON: usize = 123;

/// One run of a VMI.
pub struct Guest {
    /// The VMI's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Where it is looked for.
    pub objects: Arc<dyn Objects>,
}

impl Whereabouts for Guest {
    fn look<'a>(&'a self, left: &'a str) -> BoxFuture<'a, Sight> {
        Box::pin(async move {
            // While nothing can be read, nothing is known.
            ask(self.objects.as_ref(), |lookup| self.sight(left, lookup)).await.unwrap_or_default()
        })
    }
}

impl Guest {
    fn sight(&self, left: &str, lookup: &dyn Lookup) -> Sight {
        let over = Sight { over: true, ..Sight::default() };
        let Some(object) = lookup.get("VirtualMachineInstance", &self.namespace, &self.name) else { return over };
        let Ok(vmi) = serde_json::from_value::<VirtualMachineInstance>(object) else { return over };
        if vmi.metadata.uid.as_deref() != Some(self.uid.as_str()) || vmi.is_final() {
            return over;
        }
        let pod =
            |name: &str| -> Option<Pod> { serde_json::from_value(lookup.get("Pod", &self.namespace, name)?).ok() };
        let reach = |place: Option<place::Place>| spot(lookup, place?).ok();
        Sight { over: false, now: reach(place::of_guest(&vmi, pod)), next: reach(place::after(&vmi, left, pod)) }
    }
}

/// A node's fence lease.
fn lease_of(lookup: &dyn Lookup, node: &str) -> Option<Value> {
    lookup.get("Lease", lookup.installation().namespace(), &format!("{LEASE_PREFIX}{node}"))
}

/// A place with the address of its node's handler: the one that the handler says in its lease, which need not be its node's
/// own, or else that.
pub fn spot(lookup: &dyn Lookup, place: place::Place) -> Result<Spot, Status> {
    let lease = lease_of(lookup, &place.node);
    let said = lease.as_ref().and_then(|lease| lease["metadata"]["annotations"][ANNOTATION_FENCE_ADDRESS].as_str());
    let said = said.and_then(|address| address.parse::<SocketAddr>().ok()).map(|address| address.ip());
    let node = lookup.get("Node", "", &place.node).ok_or_else(|| Status::not_found("", "nodes", &place.node))?;
    let addresses = node.pointer("/status/addresses").and_then(|list| list.as_array());
    let internal = addresses.into_iter().flatten().find(|address| address["type"] == "InternalIP");
    let internal: Option<IpAddr> = internal.and_then(|address| address["address"].as_str()?.parse().ok());
    let address =
        said.or(internal).ok_or_else(|| Status::internal_error(format!("node {} has no InternalIP", place.node)))?;
    Ok(Spot { node: place.node, address, pod_uid: place.pod_uid })
}

/// The console of a guest that is at this place now.
pub fn stream(front: FrontClient, guest: Guest, spot: Spot) -> Stream {
    Stream {
        protocol: PLAIN,
        open: Box::pin(async move {
            let here = Here::open(&front, spot).await.map_err(|error: CallError| Status::internal_error(error))?;
            let session: Session = Box::new(move |socket| Box::pin(carry(socket, front, guest, here)));
            Ok(session)
        }),
    }
}

/// Closes a stream with the reason, and gives the client a moment to take it: what it sends meanwhile would otherwise break the
/// connection before it has read that.
pub async fn part(mut out: SplitSink<WebSocket, Message>, mut within: SplitStream<WebSocket>, reason: String) {
    let frame = CloseFrame { code: CloseCode::Away, reason: fitting(reason).into() };
    let parting = async {
        if out.send(Message::Close(Some(frame))).await.is_ok() {
            while let Some(Ok(_)) = within.next().await {}
        }
    };
    // It may have gone by now.
    let _ = tokio::time::timeout(PARTING, parting).await;
}

/// As much of a reason as can be told. A node's name may be longer than that.
fn fitting(mut reason: String) -> String {
    while reason.len() > LONGEST_REASON {
        reason.pop();
    }
    reason
}

/// Between the client's websocket and the guest. At the end the connection is closed without a word, as KubeVirt closes it:
/// virtctl then tells its user why that may be. Only what no client can guess is said: the guest's node is gone.
async fn carry(socket: WebSocket, front: FrontClient, guest: Guest, here: Here) {
    let (mut out, mut within) = socket.split();
    let (type_, typed) = mpsc::channel::<Bytes>(WAITING);
    let (say, mut said) = mpsc::channel::<Bytes>(WAITING);
    let incoming = async {
        while let Some(Ok(message)) = within.next().await {
            let bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Text(text) => text.into(),
                Message::Close(_) => return,
                _ => continue,
            };
            if type_.send(bytes).await.is_err() {
                return;
            }
        }
    };
    let outgoing = async {
        while let Some(bytes) = said.recv().await {
            if out.send(Message::Binary(bytes)).await.is_err() {
                return;
            }
        }
    };
    let following = follow(&front, &guest, here, typed, say);
    let last = tokio::select! {
        () = incoming => None,
        (last, ()) = async { tokio::join!(following, outgoing) } => last,
    };
    if let Some(Spot { node, .. }) = last
        && ask(guest.objects.as_ref(), |lookup| !answers(lookup, &node)).await.unwrap_or(false)
    {
        part(out, within, format!("node {node} does not answer any more, and the guest there is lost")).await;
    }
}

/// Whether a node is there: it has not been found lost (docs/fencing.md), and says that it is ready.
fn answers(lookup: &dyn Lookup, node: &str) -> bool {
    let lease = lease_of(lookup, node);
    let lost = |lease: &Value| lease["metadata"]["annotations"].get(ANNOTATION_NODE_LOST).is_some();
    let node = lookup.get("Node", "", node);
    let conditions = node.as_ref().and_then(|node| node.pointer("/status/conditions")?.as_array());
    !lease.is_some_and(|lease| lost(&lease))
        && conditions.into_iter().flatten().any(|one| one["type"] == "Ready" && one["status"] == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_cut_to_what_a_websocket_carries() {
        assert_eq!(fitting("gone".to_owned()), "gone");
        assert_eq!(fitting("x".repeat(300)), "x".repeat(LONGEST_REASON));
        // Two bytes each.
        assert_eq!(fitting("é".repeat(62)), "é".repeat(61));
    }
}
