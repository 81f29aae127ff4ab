//! The serial console of a guest, from a websocket to whichever node the guest is on.

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use godwit_api::VirtualMachineInstance;
use godwit_api::names::GROUP;
use godwit_api::subresources::{INSTANCES, PLAIN, place};
use godwit_apiserver::{Lookup, Message, Session, Stream, WebSocket};
use godwit_handler::front::{CallError, FrontClient, Here, Sight, Spot, Whereabouts, follow};
use godwit_machinery::status::Status;
use k8s_openapi::api::core::v1::Pod;
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Messages on their way in either direction; the guest waits for nobody.
const WAITING: usize = 16;

/// One run of a VMI.
pub struct Guest {
    /// The VMI's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The stored objects.
    pub lookup: Arc<dyn Lookup>,
}

impl Whereabouts for Guest {
    fn look(&self, left: &str) -> Sight {
        let over = Sight { over: true, ..Sight::default() };
        let Some(object) = self.lookup.get(GROUP, INSTANCES, &self.namespace, &self.name) else { return over };
        let Ok(vmi) = serde_json::from_value::<VirtualMachineInstance>((*object).clone()) else { return over };
        if vmi.metadata.uid.as_deref() != Some(self.uid.as_str()) || vmi.is_final() {
            return over;
        }
        let pod = |name: &str| -> Option<Pod> {
            let pod = self.lookup.get("", "pods", &self.namespace, name)?;
            serde_json::from_value((*pod).clone()).ok()
        };
        let reach = |place: Option<place::Place>| spot(self.lookup.as_ref(), place?).ok();
        Sight { over: false, now: reach(place::of_guest(&vmi, pod)), next: reach(place::after(&vmi, left, pod)) }
    }
}

/// A place with its node's address.
pub fn spot(lookup: &dyn Lookup, place: place::Place) -> Result<Spot, Status> {
    let node = lookup.get("", "nodes", "", &place.node).ok_or_else(|| Status::not_found("", "nodes", &place.node))?;
    let addresses = node.pointer("/status/addresses").and_then(|list| list.as_array());
    let internal = addresses.into_iter().flatten().find(|address| address["type"] == "InternalIP");
    let address: Option<IpAddr> = internal.and_then(|address| address["address"].as_str()?.parse().ok());
    let address = address.ok_or_else(|| Status::internal_error(format!("node {} has no InternalIP", place.node)))?;
    Ok(Spot { node: place.node, address, pod_uid: place.pod_uid })
}

/// The console of a guest that is at this place now.
pub fn stream(front: FrontClient, guest: Guest, at: place::Place) -> Result<Stream, Status> {
    let spot = spot(guest.lookup.as_ref(), at)?;
    Ok(Stream {
        protocol: PLAIN,
        open: Box::pin(async move {
            let here = Here::open(&front, spot).await.map_err(|error: CallError| Status::internal_error(error))?;
            let session: Session = Box::new(move |socket| Box::pin(carry(socket, front, guest, here)));
            Ok(session)
        }),
    })
}

/// Between the client's websocket and the guest. At the end the connection is closed without a word, as KubeVirt closes it:
/// virtctl then tells its user why that may be.
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
    tokio::select! {
        () = incoming => {}
        _ = async { tokio::join!(following, outgoing) } => {}
    }
}
