//! update (PUT) and patch.

use crate::admission::Operation;
use crate::create::{Stored, Write, admit, encode, insert, stored_reply};
use crate::kinds::Kind;
use crate::read::{not_found, object, store_error};
use crate::respond::{self, Reply};
use crate::server::Context;
use crate::{delete, intake, managed, strategy};
use bytes::Bytes;
use godwit_machinery::body::FieldValidation;
use godwit_machinery::meta::{self, Door};
use godwit_machinery::patch::{PatchKind, json_patch, merge_patch, strategic_merge};
use godwit_machinery::status::{Cause, Status};
use http::StatusCode;
use serde_json::Value;
use std::sync::Arc;

/// How often a change is computed anew because something else changed the object meanwhile.
pub(crate) const ATTEMPTS: usize = 16;

/// What to change, and how.
pub(crate) struct Change<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) dry_run: bool,
    pub(crate) manager: managed::Manager,
}

pub(crate) async fn replace(cx: &Context, kind: &Arc<Kind>, bytes: &Bytes) -> Reply {
    respond::form(&cx.headers)?;
    let info = &cx.info;
    let mut sent = intake::object(cx, kind, bytes, "UpdateOptions")?;
    let given = meta::name(&sent);
    if given.is_empty() {
        meta::set(&mut sent, "name", Some(Value::String(info.name.clone())));
    } else if given != info.name {
        let why = format!("the name of the object ({given}) does not match the name on the URL ({})", info.name);
        return Err(Status::bad_request(why));
    }
    let namespace = if kind.resource.namespaced { info.namespace.as_str() } else { "" };
    let given = meta::namespace(&sent);
    if !given.is_empty() && given != namespace {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    meta::set(&mut sent, "namespace", (!namespace.is_empty()).then(|| Value::String(namespace.to_owned())));
    if !kind.resource.builtin && meta::resource_version(&sent).is_empty() {
        let cause = Cause::invalid("metadata.resourceVersion", &0.into(), "must be specified for an update");
        return Err(Status::invalid(kind.names().0, &kind.resource.kind, &info.name, vec![cause]));
    }
    let change = Change {
        namespace: &info.namespace,
        name: &info.name,
        dry_run: cx.dry_run()?,
        manager: managed::Manager::of(cx)?,
    };
    let stored = change_object(cx, kind, &change, |_| Ok(sent.clone())).await?;
    stored_reply(cx, kind, StatusCode::OK, &stored)
}

/// Reads, changes and writes an object until nothing came in between.
pub(crate) async fn change_object(
    cx: &Context,
    kind: &Arc<Kind>,
    change: &Change<'_>,
    mut make: impl FnMut(&Value) -> Result<Value, Status>,
) -> Result<Stored, Status> {
    let (group, plural) = kind.names();
    let key = kind.key(change.namespace, change.name);
    for _ in 0..ATTEMPTS {
        let entry = cx.store().get(&key).ok_or_else(|| not_found(kind, change.name))?;
        let old = object(kind, &entry);
        let new = make(&old)?;
        let (wanted, found) = (meta::uid(&new), meta::uid(&old));
        if !wanted.is_empty() && wanted != found {
            return Err(Status::precondition_uid(group, plural, change.name, wanted, found));
        }
        let wanted = meta::resource_version(&new);
        if !wanted.is_empty() && wanted != meta::resource_version(&old) {
            return Err(Status::conflict(group, plural, change.name));
        }
        let new = finish(cx, kind, change, &old, new)?;
        if meta::unchanged(&old, &new) {
            return Ok(Stored::Entry(entry));
        }
        if change.dry_run {
            return Ok(Stored::Draft(new));
        }
        let written = if delete::is_finished(kind, &new) {
            let gone = cx.store().delete(&key, Some(entry.revision)).await;
            gone.map(|(revision, _)| {
                let mut last = new;
                meta::set_resource_version(&mut last, revision);
                Stored::Draft(last)
            })
        } else {
            let mut stored = new;
            kind.store(&mut stored);
            cx.store().update(&key, Some(entry.revision), encode(stored)).await.map(Stored::Entry)
        };
        match written {
            Ok(stored) => return Ok(stored),
            Err(godwit_store::Error::Conflict { .. } | godwit_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(store_error(kind, change.name, error)),
        }
    }
    Err(Status::conflict(group, plural, change.name))
}

/// Brings a changed object into the shape in which it may be stored.
fn finish(cx: &Context, kind: &Kind, change: &Change<'_>, old: &Value, mut new: Value) -> Result<Value, Status> {
    let resource = &kind.resource;
    let subresource = cx.info.subresource.as_str();
    let door = match subresource {
        "status" => Door::Status,
        _ => Door::Main { status_separate: resource.status_subresource },
    };
    let counts = meta::counts_generations(&resource.gv.group, &resource.plural, resource.builtin);
    meta::prepare_update(old, &mut new, door, counts);
    strategy::update(kind, old, &mut new, subresource);
    if kind.is("apiextensions.k8s.io", "customresourcedefinitions") && subresource.is_empty() {
        cx.warn(strategy::unsupported(kind, &new));
    }
    meta::set(&mut new, "resourceVersion", old.pointer("/metadata/resourceVersion").cloned());
    let write = Write {
        operation: Operation::Update,
        namespace: change.namespace,
        name: change.name,
        old: Some(old),
        dry_run: change.dry_run,
    };
    let new = admit(cx, kind, write, new)?;
    Ok(managed::updated(kind, old, new, &change.manager))
}

pub(crate) async fn patch(cx: &Context, kind: &Arc<Kind>, bytes: &Bytes) -> Reply {
    respond::form(&cx.headers)?;
    let info = &cx.info;
    let resource = &kind.resource;
    let patch_kind = PatchKind::of(cx.header("content-type"), resource.builtin)?;
    if patch_kind == PatchKind::Apply {
        return apply(cx, kind, bytes).await;
    }
    let mode = intake::validation(cx, "PatchOptions")?;
    if cx.params.has("force") {
        let cause = Cause::forbidden("force", "may not be specified for non-apply patch");
        return Err(Status::invalid("meta.k8s.io", "PatchOptions", "", vec![cause]));
    }
    let decoded = godwit_machinery::body::decode("application/json", bytes, godwit_machinery::body::MAX_BYTES)?;
    let patch = decoded.value;
    if patch_kind != PatchKind::Json && !patch.is_object() {
        return Err(Status::bad_request("error decoding patch: a merge patch is an object"));
    }
    let change = Change {
        namespace: &info.namespace,
        name: &info.name,
        dry_run: cx.dry_run()?,
        manager: managed::Manager::of(cx)?,
    };
    let duplicates = decoded.duplicate_fields;
    let stored = change_object(cx, kind, &change, |old| {
        let mut new = match patch_kind {
            PatchKind::Json => json_patch(old, &patch)?,
            PatchKind::Merge => merge_patch(old, &patch)?,
            PatchKind::Strategic | PatchKind::Apply => strategic_merge(&resource.schema, old, &patch)?,
        };
        check_identity(kind, old, &new)?;
        intake::judge(cx, kind, &new, mode, &duplicates)?;
        intake::shape(kind, &mut new)?;
        Ok(new)
    })
    .await?;
    stored_reply(cx, kind, StatusCode::OK, &stored)
}

/// A patch may not turn an object into another one.
fn check_identity(kind: &Kind, old: &Value, new: &Value) -> Result<(), Status> {
    if !new.is_object() {
        return Err(Status::unprocessable("the patch leaves no object"));
    }
    for key in ["apiVersion", "kind"] {
        if new.get(key) != old.get(key) {
            return Err(Status::bad_request(format!("the {key} in the data does not match the expected {key}")));
        }
    }
    let (before, after) = (meta::name(old), meta::name(new));
    if before != after {
        let why = format!("the name of the object ({after}) does not match the name on the URL ({before})");
        return Err(Status::bad_request(why));
    }
    if kind.resource.namespaced && meta::namespace(old) != meta::namespace(new) {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    Ok(())
}

/// Server-side apply.
async fn apply(cx: &Context, kind: &Arc<Kind>, bytes: &Bytes) -> Reply {
    let info = &cx.info;
    let manager = managed::Manager::of(cx)?;
    if cx.params.get("fieldManager").is_empty() {
        let cause = Cause::required("fieldManager", "is required for apply patch");
        return Err(Status::invalid("meta.k8s.io", "PatchOptions", "", vec![cause]));
    }
    let force = cx.params.flag("force");
    let mode = match intake::validation(cx, "PatchOptions")? {
        // Unknown fields cannot be owned, so apply is always at least told about them.
        FieldValidation::Ignore => FieldValidation::Warn,
        mode => mode,
    };
    let decoded = godwit_machinery::body::decode("application/yaml", bytes, godwit_machinery::body::MAX_BYTES)?;
    let mut applied = decoded.value;
    godwit_machinery::body::check_kind(&mut applied, &kind.api_version(), &kind.resource.kind, false)?;
    if applied.pointer("/metadata/managedFields").is_some_and(|m| m.as_array().is_none_or(|list| !list.is_empty())) {
        return Err(Status::bad_request("metadata.managedFields must be nil"));
    }
    let name = meta::name(&applied);
    if !name.is_empty() && name != info.name {
        let why = format!("the name of the object ({name}) does not match the name on the URL ({})", info.name);
        return Err(Status::bad_request(why));
    }
    meta::set(&mut applied, "name", Some(Value::String(info.name.clone())));
    let namespace = meta::namespace(&applied);
    if kind.resource.namespaced && !namespace.is_empty() && namespace != info.namespace {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    intake::judge(cx, kind, &applied, mode, &decoded.duplicate_fields)?;
    let dry_run = cx.dry_run()?;
    let key = kind.key(&info.namespace, &info.name);
    for _ in 0..ATTEMPTS {
        if cx.store().get(&key).is_some() || !info.subresource.is_empty() {
            let change = Change {
                namespace: &info.namespace,
                name: &info.name,
                dry_run,
                manager: managed::Manager::accounted(),
            };
            let stored = change_object(cx, kind, &change, |old| {
                let mut new = managed::applied(kind, Some(old), &applied, &manager, force)?;
                intake::shape(kind, &mut new)?;
                Ok(new)
            })
            .await?;
            return stored_reply(cx, kind, StatusCode::OK, &stored);
        }
        if !meta::uid(&applied).is_empty() {
            let wanted = meta::uid(&applied);
            let (group, plural) = kind.names();
            return Err(Status::precondition_uid(group, plural, &info.name, wanted, ""));
        }
        let mut new = managed::applied(kind, None, &applied, &manager, force)?;
        intake::shape(kind, &mut new)?;
        match insert(cx, kind, &info.namespace, new, dry_run, &managed::Manager::accounted()).await {
            Ok(stored) => return stored_reply(cx, kind, StatusCode::CREATED, &stored),
            Err(status) if status.reason == "AlreadyExists" => {}
            Err(status) => return Err(status),
        }
    }
    Err(Status::conflict(kind.names().0, kind.names().1, &info.name))
}
