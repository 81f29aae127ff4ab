//! Events about VMIs, written aside so that nothing waits for them.

use std::collections::BTreeMap;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use godwit_api::names::events;
use godwit_api::vmi::VirtualMachineInstance;
use jiff::Timestamp;
use k8s_openapi::Resource;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Series that are remembered, to count repetitions instead of listing them.
const SERIES: usize = 1024;
/// Events that wait to be written, at most: what comes beyond them is only in the log.
const WAITING: usize = 1024;
/// How long one attempt may take: the connection may have died with a link that was down.
const LIMIT: Duration = Duration::from_secs(10);
/// Between two attempts, at least and at most. The API that was away is to be told what happened meanwhile.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Attempts: for an hour or so. Then events are too old to be kept by the API either.
const ATTEMPTS: usize = 1800;

/// One event to be recorded.
#[derive(Debug)]
struct Record {
    about: ObjectReference,
    warning: bool,
    reason: &'static str,
    message: String,
    at: Timestamp,
}

/// Takes events; a task of its own writes them.
#[derive(Clone)]
pub struct Events {
    sender: mpsc::Sender<Record>,
    node: String,
}

impl Events {
    /// Starts the writing task for the handler of `node`. It ends with the last clone.
    #[must_use]
    pub fn start(client: Client, node: String) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        tokio::spawn(write(client, node.clone(), receiver));
        Self { sender, node }
    }

    /// Records a warning about this handler's node.
    pub fn record_node(&self, reason: &'static str, message: String) {
        tracing::info!(node = self.node, reason, message, "event");
        // As a kubelet names its node: the UID is the name.
        let about = ObjectReference {
            kind: Some("Node".into()),
            name: Some(self.node.clone()),
            uid: Some(self.node.clone()),
            ..ObjectReference::default()
        };
        self.send(Record { about, warning: true, reason, message, at: Timestamp::now() });
    }

    /// Records an event about a VMI.
    pub fn record(&self, vmi: &VirtualMachineInstance, warning: bool, reason: &'static str, message: String) {
        tracing::info!(vmi = vmi.metadata.name, reason, message, "event");
        let about = ObjectReference {
            api_version: Some("kubevirt.io/v1".into()),
            kind: Some(VirtualMachineInstance::KIND.into()),
            name: vmi.metadata.name.clone(),
            namespace: vmi.metadata.namespace.clone(),
            uid: vmi.metadata.uid.clone(),
            resource_version: vmi.metadata.resource_version.clone(),
            field_path: None,
        };
        self.send(Record { about, warning, reason, message, at: Timestamp::now() });
    }

    fn send(&self, record: Record) {
        if let Err(error) = self.sender.try_send(record) {
            tracing::warn!(%error, "an event is not recorded");
        }
    }
}

/// A series' event: its name and how often it has happened.
struct Series {
    name: String,
    count: i32,
}

async fn write(client: Client, node: String, mut records: mpsc::Receiver<Record>) {
    let mut series: BTreeMap<String, Series> = BTreeMap::new();
    while let Some(record) = records.recv().await {
        let key = format!("{:?} {} {}", record.about.uid, record.reason, record.message);
        let namespace = record.about.namespace.clone().unwrap_or_else(|| "default".into());
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        let whole = Timestamp::from_second(record.at.as_second()).unwrap_or(record.at);
        if let Some(known) = series.get_mut(&key) {
            let count = known.count.saturating_add(1);
            let patch = Patch::Merge(json!({ "count": count, "lastTimestamp": whole.to_string() }));
            let parameters = PatchParams::default();
            if until_answered(|| api.patch(&known.name, &parameters, &patch)).await.is_ok() {
                known.count = count;
                continue;
            }
            // It has expired: begin anew.
        }
        let name = format!("{}.{:x}", record.about.name.as_deref().unwrap_or("vmi"), record.at.as_nanosecond());
        let event = Event {
            metadata: ObjectMeta { name: Some(name.clone()), namespace: Some(namespace), ..Default::default() },
            involved_object: record.about,
            type_: Some(if record.warning { events::WARNING } else { events::NORMAL }.into()),
            reason: Some(record.reason.into()),
            message: Some(record.message),
            source: Some(EventSource { component: Some(events::COMPONENT_HANDLER.into()), host: Some(node.clone()) }),
            reporting_component: Some(events::COMPONENT_HANDLER.into()),
            reporting_instance: Some(node.clone()),
            first_timestamp: Some(Time(whole)),
            last_timestamp: Some(Time(whole)),
            count: Some(1),
            ..Default::default()
        };
        let parameters = PostParams::default();
        match until_answered(|| api.create(&parameters, &event)).await {
            Err(Unwritten::Api(error)) if !is_there_already(&error) => {
                tracing::warn!(%error, event = name, "cannot record an event");
            }
            Err(Unwritten::Late) => tracing::warn!(event = name, "cannot record an event: the API does not answer"),
            // An answer to an earlier attempt was lost: the name is this event's alone.
            Ok(_) | Err(Unwritten::Api(_)) => {
                if series.len() >= SERIES {
                    series.clear();
                }
                series.insert(key, Series { name, count: 1 });
            }
        }
    }
}

/// Why an attempt came to nothing.
enum Unwritten {
    Api(kube::Error),
    Late,
}

/// Asks until there is an answer that will not change.
async fn until_answered<T, F: Future<Output = Result<T, kube::Error>>>(ask: impl Fn() -> F) -> Result<T, Unwritten> {
    let (shortest, longest) = PAUSES;
    let pauses = ExponentialBuilder::new().with_min_delay(shortest).with_max_delay(longest).with_max_times(ATTEMPTS);
    let attempt = async || match timeout(LIMIT, ask()).await {
        Ok(answer) => answer.map_err(Unwritten::Api),
        Err(_) => Err(Unwritten::Late),
    };
    attempt.retry(pauses).when(may_pass).await
}

/// Whether another attempt may succeed.
fn may_pass(error: &Unwritten) -> bool {
    match error {
        Unwritten::Api(kube::Error::Api(status)) => status.code == 429 || status.code >= 500,
        Unwritten::Api(_) | Unwritten::Late => true,
    }
}

fn is_there_already(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::api;

    #[tokio::test]
    async fn an_event_waits_for_an_api_that_is_away() {
        let api = api::Api::default();
        api.put("nodes", json!({"metadata": {"name": "a"}}));
        api.refuse_writes(3);
        let events = Events::start(api.client(), "a".into());
        for message in ["first", "second", "first"] {
            events.record_node("NodeFenced", message.into());
        }
        let written = |message| api.list("events").into_iter().find(|event| event["message"] == message);
        while written("second").is_none() || written("first").is_none_or(|event| event["count"] != 2) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(api.list("events").len(), 2);
    }
}
