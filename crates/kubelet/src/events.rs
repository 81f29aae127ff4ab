//! Events, in the words of Kubernetes' kubelet. Sent in the background; one that cannot be written is only logged.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use tokio::sync::mpsc;

/// Sends events. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Events {
    sender: mpsc::UnboundedSender<Event>,
    node: String,
}

static NUMBER: AtomicU64 = AtomicU64::new(0);

/// What was said before: the same again only counts, as with Kubernetes.
#[derive(Default)]
struct Known(BTreeMap<Saying, (String, i32)>);

/// Whom it is about, reason, message.
type Saying = (Option<String>, Option<String>, Option<String>);

/// So many different events are remembered; then all are forgotten.
const REMEMBERED: usize = 4096;

impl Known {
    async fn write(&mut self, api: &Api<Event>, event: &Event) -> Result<(), kube::Error> {
        let key = (event.involved_object.uid.clone(), event.reason.clone(), event.message.clone());
        if let Some((name, count)) = self.0.get_mut(&key) {
            *count += 1;
            let patch = serde_json::json!({ "count": *count, "lastTimestamp": event.last_timestamp });
            match api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await {
                // It has expired meanwhile.
                Err(kube::Error::Api(answer)) if answer.code == 404 => {}
                other => return other.map(|_| ()),
            }
        }
        if self.0.len() >= REMEMBERED {
            self.0.clear();
        }
        self.0.insert(key, (event.metadata.name.clone().unwrap_or_default(), 1));
        api.create(&PostParams::default(), event).await.map(|_| ())
    }
}

impl Events {
    pub(crate) fn start(client: Client, node: &str) -> Self {
        let (sender, mut receiver) = mpsc::unbounded_channel::<Event>();
        tokio::spawn(async move {
            let mut known = Known::default();
            while let Some(event) = receiver.recv().await {
                let namespace = event.metadata.namespace.clone().unwrap_or_else(|| "default".into());
                let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
                if let Err(error) = known.write(&api, &event).await {
                    let reason = event.reason.unwrap_or_default();
                    tracing::debug!(%error, reason, object = ?event.involved_object.name, "cannot write an event");
                }
            }
        });
        Self { sender, node: node.into() }
    }

    pub(crate) fn normal(&self, pod: &Pod, container: Option<&str>, reason: &str, message: impl Into<String>) {
        self.send(pod, container, "Normal", reason, message.into());
    }

    pub(crate) fn warning(&self, pod: &Pod, container: Option<&str>, reason: &str, message: impl Into<String>) {
        self.send(pod, container, "Warning", reason, message.into());
    }

    fn send(&self, pod: &Pod, container: Option<&str>, kind: &str, reason: &str, message: String) {
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        tracing::info!(pod = %format!("{namespace}/{name}"), container, reason, "{message}");
        let now = Timestamp::now();
        let unique = now.as_nanosecond() as u64 ^ (NUMBER.fetch_add(1, Ordering::Relaxed) << 56);
        let event = Event {
            metadata: ObjectMeta {
                name: Some(format!("{name}.{unique:x}")),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                field_path: container.map(|name| format!("spec.containers{{{name}}}")),
                name: Some(name),
                namespace: Some(namespace),
                resource_version: pod.resource_version(),
                uid: pod.uid(),
            },
            reason: Some(reason.into()),
            message: Some(message),
            type_: Some(kind.into()),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            count: Some(1),
            source: Some(EventSource { component: Some("kubelet".into()), host: Some(self.node.clone()) }),
            reporting_component: Some("kubelet".into()),
            reporting_instance: Some(self.node.clone()),
            ..Event::default()
        };
        let _ = self.sender.send(event);
    }
}
