//! What the server does by itself: garbage of owners that are gone, the end of namespaces and definitions, and what every
//! namespace is furnished with.

use crate::bootstrap::ensure;
use crate::create::encode;
use crate::delete::{DeleteOptions, FOREGROUND, ORPHAN, Policy, is_finished, remove};
use crate::kinds::{CRDS, Kind};
use crate::server::{Context, Inner};
use crate::strategy::{CRD_CLEANUP, NAMESPACE_FINALIZER};
use godwit_machinery::meta;
use godwit_machinery::status::Status;
use godwit_store::{Entry, Event};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

const ALL: &str = "/registry/";
const NAMESPACES: &str = "/registry/core/namespaces/";
/// Until something that failed or has to wait is looked at again.
const RETRY: Duration = Duration::from_millis(500);

/// Who owns whom.
#[derive(Debug, Default)]
struct Graph {
    /// Every object's key by its uid.
    alive: BTreeMap<String, Arc<str>>,
    /// Keys of the objects that name this uid as an owner.
    dependents: BTreeMap<String, BTreeSet<Arc<str>>>,
    /// Namespaces and definitions that are being deleted.
    ending: BTreeSet<Arc<str>>,
    /// Keys to look at.
    queue: BTreeSet<Arc<str>>,
}

fn owners(object: &Value) -> impl Iterator<Item = &str> {
    meta::owners(object).iter().filter_map(|owner| owner["uid"].as_str())
}

impl Graph {
    fn see(&mut self, event: &Event) {
        if let Some(old) = &event.old {
            self.forget(old);
        }
        if let Some(new) = &event.new {
            self.learn(new);
        } else if let Some(old) = &event.old {
            self.gone(old);
        }
    }

    fn learn(&mut self, entry: &Arc<Entry>) {
        let object = entry.json();
        self.alive.insert(meta::uid(object).to_owned(), entry.key.clone());
        for uid in owners(object) {
            self.dependents.entry(uid.to_owned()).or_default().insert(entry.key.clone());
        }
        let ending = meta::is_deleting(object);
        if ending && (entry.key.starts_with(NAMESPACES) || entry.key.starts_with(CRDS)) {
            self.ending.insert(entry.key.clone());
        }
        if ending || !meta::owners(object).is_empty() || entry.key.starts_with(NAMESPACES) {
            self.queue.insert(entry.key.clone());
        }
    }

    fn forget(&mut self, entry: &Entry) {
        let object = entry.json();
        self.alive.remove(meta::uid(object));
        for uid in owners(object) {
            if let Some(keys) = self.dependents.get_mut(uid) {
                keys.remove(&entry.key);
                if keys.is_empty() {
                    self.dependents.remove(uid);
                }
            }
        }
    }

    fn gone(&mut self, entry: &Entry) {
        let object = entry.json();
        self.ending.remove(&entry.key);
        self.queue.extend(self.dependents.get(meta::uid(object)).into_iter().flatten().cloned());
        // Its owners may wait for it.
        let waiting: Vec<_> = owners(object).filter_map(|uid| self.alive.get(uid).cloned()).collect();
        self.queue.extend(waiting);
        // So may its namespace or its definition.
        self.queue.extend(self.ending.iter().cloned());
    }
}

pub(crate) async fn run(inner: Arc<Inner>, ca: String) {
    loop {
        let Ok((list, mut watch)) = inner.store.list_and_watch(ALL) else { return };
        let mut graph = Graph::default();
        list.entries.iter().for_each(|entry| graph.learn(entry));
        drop(list);
        loop {
            let mut again = BTreeSet::new();
            while let Some(key) = graph.queue.pop_first() {
                if !look(&inner, &graph, &key, &ca).await {
                    again.insert(key);
                }
                if let Ok(batch) = watch.poll() {
                    batch.events.iter().for_each(|event| graph.see(event));
                }
            }
            let batch = tokio::select! {
                batch = watch.next() => batch,
                () = tokio::time::sleep(RETRY), if !again.is_empty() => watch.poll(),
            };
            graph.queue.extend(again);
            match batch {
                Ok(batch) => batch.events.iter().for_each(|event| graph.see(event)),
                Err(godwit_store::Error::Closed) => return,
                // Fell behind the log: begin anew.
                Err(_) => break,
            }
        }
    }
}

/// Does what an object needs; false: look again later.
async fn look(inner: &Arc<Inner>, graph: &Graph, key: &str, ca: &str) -> bool {
    let Some(entry) = inner.store.get(key) else { return true };
    let cx = Context::internal(inner);
    let Some((kind, namespace, name)) = cx.kinds.of_key(key) else { return true };
    let object = entry.json();
    let deleting = meta::is_deleting(object);
    let finalizers = meta::finalizers(object);
    if deleting && kind.is("", "namespaces") {
        return end_namespace(&cx, &entry, name).await;
    }
    if kind.is("", "namespaces") {
        furnish(inner, name, ca).await;
        return true;
    }
    if deleting && finalizers.contains(&CRD_CLEANUP) {
        return end_definition(&cx, &entry).await;
    }
    if deleting && finalizers.contains(&ORPHAN) {
        return orphan(&cx, graph, &entry).await;
    }
    if deleting && finalizers.contains(&FOREGROUND) {
        return foreground(&cx, graph, &entry).await;
    }
    if deleting || meta::owners(object).is_empty() {
        return true;
    }
    owned(&cx, graph, kind, (namespace, name), &entry).await
}

/// An object with owners: goes when all are gone, forgets those that are when one is left.
async fn owned(cx: &Context, graph: &Graph, kind: &Kind, (namespace, name): (&str, &str), entry: &Entry) -> bool {
    let object = entry.json();
    let lives = |owner: &Value| owner["uid"].as_str().is_some_and(|uid| graph.alive.contains_key(uid));
    let list = meta::owners(object);
    if list.iter().all(lives) {
        return true;
    }
    if list.iter().any(lives) {
        let left: Vec<Value> = list.iter().filter(|owner| lives(owner)).cloned().collect();
        return rewrite(cx, entry, |new| meta::set(new, "ownerReferences", Some(json!(left)))).await;
    }
    let uid = meta::uid(object).to_owned();
    let options = DeleteOptions { uid, policy: Some(Policy::Background), ..DeleteOptions::default() };
    settled(remove(cx, kind, namespace, name, &options).await)
}

fn settled<T>(outcome: Result<T, Status>) -> bool {
    match outcome {
        Ok(_) => true,
        Err(status) if matches!(status.reason.as_str(), "NotFound" | "Conflict") => true,
        Err(status) => {
            tracing::warn!(%status, "garbage collection will try again");
            false
        }
    }
}

/// Writes a changed object; false if something else changed it meanwhile.
async fn rewrite(cx: &Context, entry: &Entry, change: impl FnOnce(&mut Value)) -> bool {
    let mut new = Value::clone(entry.json());
    change(&mut new);
    let Some((kind, _, _)) = cx.kinds.of_key(&entry.key) else { return true };
    let outcome = if is_finished(kind, &new) {
        cx.store().delete(&entry.key, Some(entry.revision)).await.map(|_| ())
    } else {
        cx.store().update(&entry.key, Some(entry.revision), encode(new)).await.map(|_| ())
    };
    matches!(outcome, Ok(()) | Err(godwit_store::Error::NotFound { .. }))
}

async fn drop_finalizer(cx: &Context, entry: &Entry, finalizer: &str) -> bool {
    let left: Vec<String> =
        meta::finalizers(entry.json()).into_iter().filter(|f| *f != finalizer).map(str::to_owned).collect();
    rewrite(cx, entry, |new| {
        let left: Vec<&str> = left.iter().map(String::as_str).collect();
        meta::set_finalizers(new, &left);
    })
    .await
}

/// Dependents forget an owner that goes alone.
async fn orphan(cx: &Context, graph: &Graph, entry: &Entry) -> bool {
    let uid = meta::uid(entry.json());
    for key in graph.dependents.get(uid).into_iter().flatten() {
        let Some(dependent) = cx.store().get(key) else { continue };
        let left: Vec<Value> =
            meta::owners(dependent.json()).iter().filter(|owner| owner["uid"] != uid).cloned().collect();
        let left = (!left.is_empty()).then(|| json!(left));
        if !rewrite(cx, &dependent, |new| meta::set(new, "ownerReferences", left)).await {
            return false;
        }
    }
    drop_finalizer(cx, entry, ORPHAN).await
}

/// An owner that goes last waits for the dependents that say they block it.
async fn foreground(cx: &Context, graph: &Graph, entry: &Entry) -> bool {
    let uid = meta::uid(entry.json());
    let mut blocked = false;
    for key in graph.dependents.get(uid).into_iter().flatten() {
        let Some(dependent) = cx.store().get(key) else { continue };
        let object = dependent.json();
        let Some((kind, namespace, name)) = cx.kinds.of_key(key) else { continue };
        let list = meta::owners(object);
        blocked |= list.iter().any(|owner| owner["uid"] == uid && owner["blockOwnerDeletion"] == true);
        let other_owner =
            list.iter().any(|o| o["uid"] != uid && o["uid"].as_str().is_some_and(|u| graph.alive.contains_key(u)));
        if meta::is_deleting(object) || other_owner {
            continue;
        }
        let options = DeleteOptions {
            policy: Some(Policy::Foreground),
            uid: meta::uid(object).to_owned(),
            ..DeleteOptions::default()
        };
        if !settled(remove(cx, kind, namespace, name, &options).await) {
            return false;
        }
    }
    // If something blocks, its own end brings us back here.
    blocked || drop_finalizer(cx, entry, FOREGROUND).await
}

/// Deletes everything in a namespace, then lets it go.
async fn end_namespace(cx: &Context, entry: &Entry, namespace: &str) -> bool {
    let mut left = 0;
    for kind in cx.kinds.stored().filter(|kind| kind.resource.namespaced) {
        left += empty(cx, kind, &kind.folder(namespace)).await;
    }
    if left > 0 {
        // Whatever waits (grace, finalizers) brings us back when it is gone.
        return true;
    }
    rewrite(cx, entry, |new| {
        if let Some(list) = new.pointer_mut("/spec/finalizers").and_then(Value::as_array_mut) {
            list.retain(|finalizer| finalizer != NAMESPACE_FINALIZER);
        }
    })
    .await
}

/// Deletes every object of a kind, then lets its definition go.
async fn end_definition(cx: &Context, entry: &Entry) -> bool {
    let name = meta::name(entry.json());
    let kind = cx.kinds.stored().find(|kind| kind.crd == name).cloned();
    if let Some(kind) = kind
        && empty(cx, &kind, &kind.prefix).await > 0
    {
        return true;
    }
    drop_finalizer(cx, entry, CRD_CLEANUP).await
}

/// Deletes what is in a folder and says how much is left of it.
async fn empty(cx: &Context, kind: &Kind, folder: &str) -> usize {
    for entry in cx.store().list(folder, None, 0).entries {
        let object = entry.json();
        if meta::is_deleting(object) {
            continue;
        }
        let options = DeleteOptions { policy: Some(Policy::Background), ..DeleteOptions::default() };
        settled(remove(cx, kind, meta::namespace(object), meta::name(object), &options).await);
    }
    cx.store().count(folder)
}

/// Every namespace has a `default` service account and the cluster's certificate authority.
pub(crate) async fn furnish(inner: &Arc<Inner>, namespace: &str, ca: &str) {
    let account = json!({"metadata": {"name": "default", "namespace": namespace}});
    if let Err(error) = ensure(inner, "", "v1", "serviceaccounts", namespace, account).await {
        tracing::debug!(%error, namespace, "no default service account");
    }
    if ca.is_empty() {
        return;
    }
    let map = json!({"metadata": {"name": "kube-root-ca.crt", "namespace": namespace}, "data": {"ca.crt": ca}});
    if let Err(error) = ensure(inner, "", "v1", "configmaps", namespace, map).await {
        tracing::debug!(%error, namespace, "no certificate authority published");
    }
}
