//! Keeps a pod's status in the API equal to what is known here.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::{Mutex, watch};

use crate::status::PodInfo;

/// What is known of one pod, and the task that publishes it.
#[derive(Clone)]
pub(crate) struct Board {
    info: watch::Sender<PodInfo>,
    writer: Arc<Writer>,
}

struct Writer {
    api: Api<Pod>,
    name: String,
    uid: String,
    written: Mutex<Written>,
}

struct Written {
    status: Option<PodStatus>,
    /// The object is gone, or another one has its name.
    over: bool,
}

impl Board {
    pub(crate) fn new(client: kube::Client, pod: &Pod, info: PodInfo) -> Self {
        let api = Api::namespaced(client, &pod.namespace().unwrap_or_default());
        let (name, uid) = (pod.name_any(), pod.uid().unwrap_or_default());
        let written = Mutex::new(Written { status: pod.status.clone(), over: false });
        Self { info: watch::Sender::new(info), writer: Arc::new(Writer { api, name, uid, written }) }
    }

    /// Changes what is known.
    pub(crate) fn change(&self, change: impl FnOnce(&mut PodInfo)) {
        self.info.send_if_modified(|info| {
            let before = info.clone();
            change(info);
            *info != before
        });
    }

    /// What is known now.
    pub(crate) fn info(&self) -> PodInfo {
        self.info.borrow().clone()
    }

    /// Publishes every change, until dropped.
    pub(crate) async fn publish(&self) {
        let mut changes = self.info.subscribe();
        loop {
            changes.borrow_and_update();
            while !self.write().await {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Publishes what is known now; `false` if the API server could not be reached or did not want it.
    pub(crate) async fn write(&self) -> bool {
        let mut written = self.writer.written.lock().await;
        if written.over {
            return true;
        }
        let status = self.info().status(written.status.as_ref());
        if written.status.as_ref() == Some(&status) {
            return true;
        }
        let patch = patch(&self.writer.uid, &status);
        let result =
            self.writer.api.patch_status(&self.writer.name, &PatchParams::default(), &Patch::Strategic(patch)).await;
        match result {
            Ok(_) => {
                written.status = Some(status);
                true
            }
            Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409 | 422) => {
                tracing::debug!(pod = self.writer.name, code = answer.code, answer.message, "status not wanted");
                // A conflict of versions cannot be (none was sent): it is the uid.
                written.over = answer.code != 422;
                true
            }
            Err(error) => {
                tracing::debug!(pod = self.writer.name, %error, "cannot write the status");
                false
            }
        }
    }

    /// Sets an annotation.
    pub(crate) async fn annotate(&self, key: &str, value: &str) {
        let patch = serde_json::json!({ "metadata": { "uid": self.writer.uid, "annotations": { key: value } } });
        let (name, params, patch) = (&self.writer.name, PatchParams::default(), Patch::Merge(patch));
        let mut result = self.writer.api.patch(name, &params, &patch).await;
        // Kubernetes lets kubelets change a pod together with its status only.
        if matches!(&result, Err(kube::Error::Api(answer)) if answer.code == 403) {
            result = self.writer.api.patch_status(name, &params, &patch).await;
        }
        if let Err(error) = result {
            tracing::warn!(pod = self.writer.name, key, %error, "cannot annotate");
        }
    }

    /// Removes the object for good, now that nothing of the pod is left; tries until it is gone.
    pub(crate) async fn delete(&self) {
        let parameters = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: Some(self.writer.uid.clone()), resource_version: None }),
            ..DeleteParams::default()
        };
        loop {
            match self.writer.api.delete(&self.writer.name, &parameters).await {
                Ok(_) => return,
                Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => return,
                Err(error) => tracing::debug!(pod = self.writer.name, %error, "cannot delete"),
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
}

/// The patch that makes a pod's status what is known of it. It is a strategic one, which leaves the conditions of others as
/// they are, and the uid makes sure that it is not another pod with the same name.
fn patch(uid: &str, status: &PodStatus) -> Value {
    let mut patch = json!({ "metadata": { "uid": uid }, "status": status });
    let conditions = patch.pointer_mut("/status/conditions").and_then(Value::as_array_mut);
    for condition in conditions.into_iter().flatten().filter_map(Value::as_object_mut) {
        for field in ["reason", "message"] {
            // What a strategic patch does not name stays.
            condition.entry(field).or_insert(Value::Null);
        }
    }
    patch
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::PodCondition;

    use super::*;

    #[test]
    fn what_a_condition_does_not_say_any_more_is_taken_back() {
        let condition = |kind: &str, reason: Option<&str>| PodCondition {
            type_: kind.into(),
            status: "True".into(),
            reason: reason.map(str::to_owned),
            ..PodCondition::default()
        };
        let conditions = Some(vec![condition("Ready", None), condition("Initialized", Some("why"))]);
        let patch = patch("u", &PodStatus { conditions, ..PodStatus::default() });
        let expected = json!([
            { "type": "Ready", "status": "True", "reason": null, "message": null },
            { "type": "Initialized", "status": "True", "reason": "why", "message": null },
        ]);
        assert_eq!(patch["status"]["conditions"], expected);
    }
}
