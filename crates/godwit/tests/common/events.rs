//! Events. Whoever records one goes on before it is written, so a test waits for those that it expects.

use super::Cluster;
use kube::api::{DynamicObject, ListParams};
use serde_json::Value;
use std::time::{Duration, Instant};

/// One event.
#[derive(Clone, Debug)]
pub struct Said {
    pub type_: String,
    pub reason: String,
    pub message: String,
    pub component: String,
}

impl Cluster {
    /// What was said about an object so far.
    pub async fn events(&self, kind: &str, name: &str) -> Vec<Said> {
        let selector = format!("involvedObject.kind={kind},involvedObject.name={name}");
        let list = self.api("", "v1", "Event").list(&ListParams::default().fields(&selector)).await.expect("events");
        let text = |event: &DynamicObject, at: &str| {
            event.data.pointer(at).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let said = list.items.iter().map(|event| Said {
            type_: text(event, "/type"),
            reason: text(event, "/reason"),
            message: text(event, "/message"),
            component: text(event, "/source/component"),
        });
        said.collect()
    }

    /// Waits until it is said about the object.
    pub async fn hears_of(&self, kind: &str, name: &str, what: &str, wanted: impl Fn(&Said) -> bool) -> Said {
        let deadline = Instant::now() + Duration::from_secs(120);
        let mut said = Vec::new();
        while Instant::now() < deadline {
            said = self.events(kind, name).await;
            if let Some(event) = said.iter().find(|event| wanted(event)) {
                return event.clone();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("nobody said {what} about {name}, but {said:?}\n{}", self.words());
    }
}
