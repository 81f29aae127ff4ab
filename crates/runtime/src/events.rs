//! Records events the way `kubectl describe` shows them: what happens again raises a count.

use std::collections::{BTreeMap, VecDeque};

use godwit_control::{EventRecord, Kind};
use jiff::Timestamp;
use kube::Client;
use kube::core::Request;
use kube::core::params::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tracing::warn;

/// How many different events are remembered for counting.
const REMEMBERED: usize = 4096;

/// Events with the same of all these are one event with a count.
type Sameness = (Kind, String, &'static str, String, String, &'static str);

struct Known {
    namespace: String,
    name: String,
    count: i64,
}

/// Takes events in and writes them until nobody sends any more.
pub async fn record(client: Client, identity: String, mut events: mpsc::Receiver<EventRecord>) {
    let mut known: BTreeMap<Sameness, Known> = BTreeMap::new();
    let mut order: VecDeque<Sameness> = VecDeque::new();
    while let Some(event) = events.recv().await {
        let same: Sameness = (
            event.target.kind,
            if event.uid.is_empty() { event.target.name.to_string() } else { event.uid.clone() },
            event.type_.as_str(),
            event.reason.clone(),
            event.message.clone(),
            event.component,
        );
        let now = Timestamp::now();
        if let Some(before) = known.get_mut(&same) {
            before.count += 1;
            match repeat(&client, before, now).await {
                Ok(()) => continue,
                // It has expired or was deleted: begin anew.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => {
                    warn!(reason = event.reason, %error, "event not recorded");
                    continue;
                }
            }
        }
        match create(&client, &identity, &event, now).await {
            Ok(fresh) => {
                if known.insert(same.clone(), fresh).is_none() {
                    order.push_back(same);
                }
                if order.len() > REMEMBERED
                    && let Some(oldest) = order.pop_front()
                {
                    known.remove(&oldest);
                }
            }
            Err(error) => warn!(reason = event.reason, target = %event.target, %error, "event not recorded"),
        }
    }
}

fn collection(namespace: &str) -> Request {
    Request::new(format!("/api/v1/namespaces/{namespace}/events"))
}

async fn repeat(client: &Client, known: &Known, now: Timestamp) -> Result<(), kube::Error> {
    let patch = Patch::Merge(json!({"count": known.count, "lastTimestamp": seconds(now)}));
    let request = collection(&known.namespace).patch(&known.name, &PatchParams::default(), &patch);
    client.request::<Value>(request.map_err(kube::Error::BuildRequest)?).await.map(|_| ())
}

async fn create(client: &Client, identity: &str, event: &EventRecord, now: Timestamp) -> Result<Known, kube::Error> {
    let target = &event.target;
    // Events of cluster-scoped objects are kept in "default", as Kubernetes does.
    let namespace = if target.name.namespace.is_empty() { "default" } else { target.name.namespace.as_str() };
    let name = format!("{}.{:x}", target.name.name, now.as_nanosecond());
    let mut involved = json!({
        "apiVersion": target.kind.api_version(),
        "kind": target.kind.kind(),
        "name": target.name.name,
        "namespace": target.name.namespace,
        "uid": event.uid,
        "resourceVersion": event.resource_version,
    });
    if let Value::Object(map) = &mut involved {
        map.retain(|_, value| value.as_str() != Some(""));
    }
    let body = json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": involved,
        "type": event.type_.as_str(),
        "reason": event.reason,
        "message": event.message,
        "source": {"component": event.component},
        "reportingComponent": event.component,
        "reportingInstance": identity,
        "firstTimestamp": seconds(now),
        "lastTimestamp": seconds(now),
        "count": 1,
    });
    let body = serde_json::to_vec(&body).map_err(kube::Error::SerdeError)?;
    let request = collection(namespace).create(&PostParams::default(), body);
    client.request::<Value>(request.map_err(kube::Error::BuildRequest)?).await?;
    Ok(Known { namespace: namespace.to_owned(), name, count: 1 })
}

/// Times of events are in whole seconds.
fn seconds(now: Timestamp) -> String {
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}
