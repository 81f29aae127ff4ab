//! delete and deletecollection: preconditions, graceful deletion, finalizers.

use crate::admission::Operation;
use crate::create::{Stored, Write, encode, judge, stored_reply};
use crate::intake;
use crate::kinds::Kind;
use crate::list::ListOptions;
use crate::read::{find, list_body, not_found, object, store_error};
use crate::respond::{self, Reply};
use crate::server::Context;
use crate::strategy::NAMESPACE_FINALIZER;
use bytes::Bytes;
use godwit_machinery::meta;
use godwit_machinery::status::{Details, Status, success};
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Dependents keep living.
pub(crate) const ORPHAN: &str = "orphan";
/// Dependents go first.
pub(crate) const FOREGROUND: &str = "foregroundDeletion";

const ATTEMPTS: usize = 16;

/// What becomes of dependents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    Orphan,
    Background,
    Foreground,
}

/// `DeleteOptions`, from the body or the query.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeleteOptions {
    pub(crate) grace: Option<i64>,
    pub(crate) uid: String,
    pub(crate) resource_version: String,
    pub(crate) policy: Option<Policy>,
    pub(crate) dry_run: bool,
}

impl DeleteOptions {
    fn parse(cx: &Context, kind: &Kind, bytes: &Bytes) -> Result<Self, Status> {
        let api_version = kind.api_version();
        let kinds = [("v1", "DeleteOptions"), ("meta.k8s.io/v1", "DeleteOptions"), (&api_version, "DeleteOptions")];
        let body = intake::other(cx, bytes, &kinds)?;
        let mut options = Self { dry_run: cx.dry_run()?, ..Self::default() };
        let text = |pointer: &str| body.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        options.uid = text("/preconditions/uid");
        options.resource_version = text("/preconditions/resourceVersion");
        options.grace = body.get("gracePeriodSeconds").and_then(Value::as_i64);
        let number = |value: &str| {
            value
                .parse::<i64>()
                .map_err(|_| Status::bad_request(format!("strconv.ParseInt: parsing {value:?}: invalid syntax")))
        };
        if options.grace.is_none() && cx.params.has("gracePeriodSeconds") {
            options.grace = Some(number(cx.params.get("gracePeriodSeconds"))?);
        }
        let mut policy = text("/propagationPolicy");
        if policy.is_empty() {
            policy = cx.params.get("propagationPolicy").to_owned();
        }
        let orphan = body.get("orphanDependents").and_then(Value::as_bool);
        let orphan = orphan.or_else(|| cx.params.has("orphanDependents").then(|| cx.params.flag("orphanDependents")));
        options.policy = match (policy.as_str(), orphan) {
            ("", Some(true)) | ("Orphan", None) => Some(Policy::Orphan),
            ("", Some(false)) | ("Background", None) => Some(Policy::Background),
            ("Foreground", None) => Some(Policy::Foreground),
            ("", None) => None,
            (odd, None) => {
                use godwit_machinery::status::Cause;
                let value = Value::String(odd.to_owned());
                let cause =
                    Cause::not_supported("propagationPolicy", &value, &["Foreground", "Background", "Orphan", "nil"]);
                return Err(Status::invalid("meta.k8s.io", "DeleteOptions", "", vec![cause]));
            }
            (_, Some(_)) => {
                use godwit_machinery::status::Cause;
                let value = Value::String(policy.clone());
                let why = "orphanDependents and deletionPropagation cannot be both set";
                let cause = Cause::invalid("propagationPolicy", &value, why);
                return Err(Status::invalid("meta.k8s.io", "DeleteOptions", "", vec![cause]));
            }
        };
        let dry = body.get("dryRun").and_then(Value::as_array).is_some_and(|list| list.contains(&json!("All")));
        options.dry_run |= dry;
        Ok(options)
    }
}

/// What a delete did.
pub(crate) enum Deleted {
    /// It is gone; its last version.
    Gone(Value),
    /// It will go when grace is over or finalizers are done.
    Going(Stored),
}

/// Nothing keeps an object that is being deleted any longer.
pub(crate) fn is_finished(kind: &Kind, object: &Value) -> bool {
    let grace = object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
    meta::is_deleting(object) && grace == 0 && meta::finalizers(object).is_empty() && !holds_namespace(kind, object)
}

fn holds_namespace(kind: &Kind, object: &Value) -> bool {
    let list = object.pointer("/spec/finalizers").and_then(Value::as_array);
    kind.is("", "namespaces") && list.is_some_and(|list| list.contains(&json!(NAMESPACE_FINALIZER)))
}

pub(crate) async fn delete(cx: &Context, kind: &Arc<Kind>, bytes: &Bytes) -> Reply {
    respond::form(&cx.headers)?;
    let options = DeleteOptions::parse(cx, kind, bytes)?;
    let info = &cx.info;
    match remove(cx, kind, &info.namespace, &info.name, &options).await? {
        Deleted::Going(stored) => stored_reply(cx, kind, StatusCode::OK, &stored),
        Deleted::Gone(last) if kind.is("", "pods") => stored_reply(cx, kind, StatusCode::OK, &Stored::Draft(last)),
        Deleted::Gone(last) => {
            let details = Details {
                name: info.name.clone(),
                group: kind.resource.gv.group.clone(),
                kind: kind.resource.plural.clone(),
                uid: meta::uid(&last).to_owned(),
                ..Details::default()
            };
            Ok(respond::json(StatusCode::OK, &success(Some(details))))
        }
    }
}

/// Deletes one object, or begins to.
pub(crate) async fn remove(
    cx: &Context,
    kind: &Kind,
    namespace: &str,
    name: &str,
    options: &DeleteOptions,
) -> Result<Deleted, Status> {
    let (group, plural) = kind.names();
    let key = kind.key(namespace, name);
    for _ in 0..ATTEMPTS {
        let entry = cx.store().get(&key).ok_or_else(|| not_found(kind, name))?;
        let old = object(kind, &entry);
        let uid = meta::uid(&old);
        if !options.uid.is_empty() && options.uid != uid {
            return Err(Status::precondition_uid(group, plural, name, &options.uid, uid));
        }
        let version = meta::resource_version(&old);
        if !options.resource_version.is_empty() && options.resource_version != version {
            return Err(Status::precondition_resource_version(group, plural, name, &options.resource_version, version));
        }
        if kind.is("", "namespaces") && matches!(name, "default" | "kube-system" | "kube-public") {
            return Err(Status::forbidden(group, plural, name, "this namespace may not be deleted"));
        }
        let write = Write { operation: Operation::Delete, namespace, name, old: Some(&old), dry_run: options.dry_run };
        judge(cx, kind, write, None)?;
        let new = mark(kind, &old, options);
        if options.dry_run {
            return Ok(if is_finished(kind, &new) { Deleted::Gone(old) } else { Deleted::Going(Stored::Draft(new)) });
        }
        let written = if is_finished(kind, &new) {
            cx.store().delete(&key, Some(entry.revision)).await.map(|(revision, _)| {
                let mut last = new;
                meta::set_resource_version(&mut last, revision);
                Deleted::Gone(last)
            })
        } else if meta::unchanged(&old, &new) {
            return Ok(Deleted::Going(Stored::Entry(entry)));
        } else {
            let mut stored = new;
            kind.store(&mut stored);
            let updated = cx.store().update(&key, Some(entry.revision), encode(stored)).await;
            updated.map(|entry| Deleted::Going(Stored::Entry(entry)))
        };
        match written {
            Ok(deleted) => return Ok(deleted),
            Err(godwit_store::Error::Conflict { .. } | godwit_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(store_error(kind, name, error)),
        }
    }
    Err(Status::conflict(group, plural, name))
}

/// The object with the marks of its deletion.
fn mark(kind: &Kind, old: &Value, options: &DeleteOptions) -> Value {
    let mut new = old.clone();
    let mut finalizers = meta::finalizers(old);
    if let Some(policy) = options.policy {
        finalizers.retain(|finalizer| !matches!(*finalizer, ORPHAN | FOREGROUND));
        match policy {
            Policy::Orphan => finalizers.push(ORPHAN),
            Policy::Foreground => finalizers.push(FOREGROUND),
            Policy::Background => {}
        }
    }
    meta::set_finalizers(&mut new, &finalizers);
    let grace = grace(kind, old, options);
    let left = old.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64);
    // A deletion under way can only be shortened.
    if !meta::is_deleting(old) || left.is_some_and(|left| grace < left) {
        let seconds = u64::try_from(grace).unwrap_or(0).min(365 * 24 * 3600);
        let at = jiff::Timestamp::now() + Duration::from_secs(seconds);
        meta::set(&mut new, "deletionTimestamp", Some(Value::String(meta::time(at))));
        meta::set(&mut new, "deletionGracePeriodSeconds", Some(grace.into()));
        if !meta::is_deleting(old) && meta::generation(old) > 0 {
            meta::set(&mut new, "generation", Some((meta::generation(old) + 1).into()));
        }
    }
    if kind.is("", "namespaces") && new.get("status").is_none_or(Value::is_object) {
        new["status"]["phase"] = json!("Terminating");
    }
    new
}

/// Only pods that run somewhere get time to stop.
fn grace(kind: &Kind, object: &Value, options: &DeleteOptions) -> i64 {
    if !kind.is("", "pods") {
        return 0;
    }
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    if text("/spec/nodeName").is_empty() || matches!(text("/status/phase"), "Succeeded" | "Failed") {
        return 0;
    }
    let own = object.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(30);
    match options.grace {
        // Kubernetes' guard against careless arithmetic.
        Some(negative) if negative < 0 => 1,
        Some(grace) => grace,
        None => own.max(0),
    }
}

pub(crate) async fn collection(cx: &Context, kind: &Arc<Kind>, bytes: &Bytes) -> Reply {
    respond::form(&cx.headers)?;
    let (group, plural) = kind.names();
    let options = DeleteOptions::parse(cx, kind, bytes)?;
    let selection = ListOptions::parse(&cx.params, group, plural, false)?;
    let found = find(cx, kind, &selection).await?;
    let mut items: Vec<Bytes> = Vec::with_capacity(found.entries.len());
    for entry in &found.entries {
        let item = entry.json();
        match remove(cx, kind, meta::namespace(item), meta::name(item), &options).await {
            Ok(_) => items.push(crate::read::encoded(kind, entry)),
            Err(status) if status.reason == "NotFound" => {}
            Err(status) => return Err(status),
        }
    }
    let list_meta = json!({"resourceVersion": cx.store().revision().to_string()});
    Ok(respond::bytes(StatusCode::OK, "application/json", list_body(kind, &list_meta, items.into_iter())))
}
