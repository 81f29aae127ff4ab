//! Status of PodDisruptionBudgets: how many pods they count and how many of them may go.

use crate::admission::Lookup;
use crate::create::encode;
use crate::pods::tally;
use crate::server::Inner;
use godwit_machinery::meta;
use godwit_store::{Batch, Entry, Error};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;

const BUDGETS: &str = "/registry/policy/poddisruptionbudgets/";
const PODS: &str = "/registry/core/pods/";

pub(crate) async fn run(inner: Arc<Inner>) {
    'anew: loop {
        let revision = inner.store.revision();
        let (Ok(mut budgets), Ok(mut pods)) = (inner.store.watch(BUDGETS, revision), inner.store.watch(PODS, revision))
        else {
            return;
        };
        for entry in inner.store.list(BUDGETS, None, 0).entries {
            count(&inner, &entry).await;
        }
        loop {
            let batch = tokio::select! {
                batch = budgets.next() => batch,
                batch = pods.next() => batch,
            };
            let changed = match batch {
                Ok(batch) => namespaces(&batch),
                Err(Error::Closed) => return,
                Err(_) => continue 'anew,
            };
            for namespace in changed {
                for entry in inner.store.list(&format!("{BUDGETS}{namespace}/"), None, 0).entries {
                    count(&inner, &entry).await;
                }
            }
        }
    }
}

fn namespaces(batch: &Batch) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for event in &batch.events {
        let rest = event.key().strip_prefix(BUDGETS).or_else(|| event.key().strip_prefix(PODS));
        if let Some((namespace, _)) = rest.and_then(|rest| rest.split_once('/')) {
            found.insert(namespace.to_owned());
        }
    }
    found
}

/// Writes the status, if it is not so already. Whatever changes meanwhile is an event of its own.
async fn count(inner: &Arc<Inner>, entry: &Entry) {
    let budget = entry.json();
    let pods = inner.list("", "pods", meta::namespace(budget));
    let Some((_, tally)) = tally(budget, &pods) else { return };
    let allowed = tally.healthy.saturating_sub(tally.desired);
    let fields = json!({
        "observedGeneration": meta::generation(budget),
        "disruptionsAllowed": allowed,
        "currentHealthy": tally.healthy,
        "desiredHealthy": tally.desired,
        "expectedPods": tally.expected,
    });
    let before = budget.get("status").cloned().unwrap_or_default();
    let same = fields.as_object().into_iter().flatten().all(|(key, value)| before.get(key) == Some(value));
    if same {
        return;
    }
    let (status, reason) = if allowed > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
    let mut new = Value::clone(budget);
    let Some(map) = new.as_object_mut() else { return };
    let since =
        before.pointer("/conditions/0").filter(|c| c["status"] == status).map(|c| c["lastTransitionTime"].clone());
    let since = since.unwrap_or_else(|| json!(meta::time(jiff::Timestamp::now())));
    let mut fields = fields;
    fields["conditions"] = json!([{"type": "DisruptionAllowed", "status": status, "reason": reason, "message": "",
        "lastTransitionTime": since, "observedGeneration": meta::generation(budget)}]);
    map.insert("status".to_owned(), fields);
    if let Err(error) = inner.store.update(&entry.key, Some(entry.revision), encode(new)).await {
        tracing::debug!(%error, "a budget's status was not written");
    }
}
