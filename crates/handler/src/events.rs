//! Events about VMIs, written aside so that nothing waits for them.

use std::collections::BTreeMap;

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

/// Series that are remembered, to count repetitions instead of listing them.
const SERIES: usize = 1024;

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
    sender: mpsc::UnboundedSender<Record>,
    node: String,
}

impl Events {
    /// Starts the writing task for the handler of `node`. It ends with the last clone.
    #[must_use]
    pub fn start(client: Client, node: String) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
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
        let _ = self.sender.send(Record { about, warning: true, reason, message, at: Timestamp::now() });
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
        let _ = self.sender.send(Record { about, warning, reason, message, at: Timestamp::now() });
    }
}

/// A series' event: its name and how often it has happened.
struct Series {
    name: String,
    count: i32,
}

async fn write(client: Client, node: String, mut records: mpsc::UnboundedReceiver<Record>) {
    let mut series: BTreeMap<String, Series> = BTreeMap::new();
    while let Some(record) = records.recv().await {
        let key = format!("{:?} {} {}", record.about.uid, record.reason, record.message);
        let namespace = record.about.namespace.clone().unwrap_or_else(|| "default".into());
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        let whole = Timestamp::from_second(record.at.as_second()).unwrap_or(record.at);
        if let Some(known) = series.get_mut(&key) {
            let count = known.count.saturating_add(1);
            let patch = json!({ "count": count, "lastTimestamp": whole.to_string() });
            if api.patch(&known.name, &PatchParams::default(), &Patch::Merge(patch)).await.is_ok() {
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
        match api.create(&PostParams::default(), &event).await {
            Ok(_) => {
                if series.len() >= SERIES {
                    series.clear();
                }
                series.insert(key, Series { name, count: 1 });
            }
            Err(error) => tracing::warn!(%error, event = name, "cannot record an event"),
        }
    }
}
