//! ResourceQuotas: what does not fit is refused, and what is taken is said in their status.
//!
//! What is taken is counted from the stored objects, not added up in the status: a count cannot drift. Creates that a quota
//! counts happen one at a time, from the count until the object is stored, so two cannot both take the last place.

use crate::admission::Lookup;
use crate::create::encode;
use crate::kinds::Kind;
use crate::server::Inner;
use godwit_machinery::status::Status;
use godwit_machinery::{meta, quota};
use godwit_store::{Batch, Encode, Entry, Error, Store};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::{Mutex, OwnedMutexGuard};

const ALL: &str = "/registry/";
const QUOTAS: &str = "/registry/core/resourcequotas/";
/// How often a status is written anew because the quota changed meanwhile.
const ATTEMPTS: usize = 16;

/// Orders creates that quotas count.
#[derive(Debug, Default)]
pub(crate) struct Quotas {
    turn: Arc<Mutex<()>>,
}

/// The right to store one object that fits.
pub(crate) struct Claim {
    inner: Arc<Inner>,
    /// Keys of the quotas that count it.
    quotas: Vec<Arc<str>>,
    turn: OwnedMutexGuard<()>,
}

fn quotas_of(store: &Store, namespace: &str) -> Vec<Arc<Entry>> {
    store.list(&format!("{QUOTAS}{namespace}/"), None, 0).entries
}

/// Waits for its turn and checks that a new object fits; none if no quota counts it.
pub(crate) async fn claim(
    inner: &Arc<Inner>,
    kind: &Kind,
    namespace: &str,
    object: &Value,
) -> Result<Option<Claim>, Status> {
    if !kind.resource.namespaced {
        return Ok(None);
    }
    let (group, plural) = kind.names();
    let counting = || -> Vec<Arc<Entry>> {
        let mut quotas = quotas_of(&inner.store, namespace);
        quotas.retain(|entry| quota::kinds(entry.json()).iter().any(|(g, p)| g == group && p == plural));
        quotas
    };
    if counting().is_empty() {
        return Ok(None);
    }
    let turn = inner.quotas.turn.clone().lock_owned().await;
    let quotas = counting();
    for entry in &quotas {
        let used = used(inner, namespace, entry.json());
        if let Some(why) = quota::refusal(entry.json(), &used, group, plural, object) {
            return Err(Status::forbidden(group, plural, meta::name(object), &why));
        }
    }
    Ok(Some(Claim { inner: inner.clone(), quotas: quotas.iter().map(|entry| entry.key.clone()).collect(), turn }))
}

impl Claim {
    /// Stores the object and says in the quotas that it is there. Goes on when the client has gone: the write may be under
    /// way, and nobody may count before it is done.
    pub(crate) async fn store(self, key: String, object: Encode) -> godwit_store::Result<Arc<Entry>> {
        let Self { inner, quotas, turn } = self;
        let work = tokio::spawn(async move {
            let stored = inner.store.create(&key, object).await;
            if stored.is_ok() {
                for quota in quotas {
                    refresh(&inner, &quota).await;
                }
            }
            drop(turn);
            stored
        });
        work.await.unwrap_or(Err(Error::Closed))
    }
}

fn used(inner: &Inner, namespace: &str, quota: &Value) -> quota::Amounts {
    let kinds = quota::kinds(quota);
    let objects: Vec<(&str, &str, Arc<Value>)> = kinds
        .iter()
        .flat_map(|(group, plural)| {
            let found = inner.list(group, plural, namespace).into_iter();
            found.map(move |object| (group.as_str(), plural.as_str(), object))
        })
        .collect();
    quota::used(quota, objects.iter().map(|(group, plural, object)| (*group, *plural, object.as_ref())))
}

/// Writes a quota's status, if it is not so already.
async fn refresh(inner: &Arc<Inner>, key: &str) {
    for _ in 0..ATTEMPTS {
        let Some(entry) = inner.store.get(key) else { return };
        let quota = entry.json();
        let texts = |amounts: quota::Amounts| -> Map<String, Value> {
            amounts.into_iter().map(|(name, amount)| (name, Value::String(amount.to_string()))).collect()
        };
        let status = json!({
            "hard": texts(quota::hard(quota)),
            "used": texts(used(inner, meta::namespace(quota), quota)),
        });
        if quota.get("status") == Some(&status) {
            return;
        }
        let mut new = Value::clone(quota);
        let Some(map) = new.as_object_mut() else { return };
        map.insert("status".to_owned(), status);
        match inner.store.update(key, Some(entry.revision), encode(new)).await {
            Err(Error::Conflict { .. }) => {}
            Ok(_) | Err(Error::NotFound { .. }) => return,
            Err(error) => {
                tracing::debug!(%error, key, "a quota's status was not written");
                return;
            }
        }
    }
}

/// Keeps the status of all quotas up to date with what is deleted, ends and is created otherwise.
pub(crate) async fn run(inner: Arc<Inner>) {
    'anew: loop {
        let revision = inner.store.revision();
        let Ok(mut changes) = inner.store.watch(ALL, revision) else { return };
        for entry in inner.store.list(QUOTAS, None, 0).entries {
            refresh(&inner, &entry.key).await;
        }
        loop {
            let namespaces = match changes.next().await {
                Ok(batch) => namespaces(&batch),
                Err(Error::Closed) => return,
                Err(_) => continue 'anew,
            };
            for namespace in namespaces {
                for entry in quotas_of(&inner.store, &namespace) {
                    refresh(&inner, &entry.key).await;
                }
            }
        }
    }
}

/// Namespaces of what changed. (Names of cluster-scoped objects may be among them; they have no quotas.)
fn namespaces(batch: &Batch) -> BTreeSet<String> {
    let parts = batch.events.iter().filter_map(|event| event.key().strip_prefix(ALL)?.split('/').nth(2));
    parts.map(str::to_owned).collect()
}
