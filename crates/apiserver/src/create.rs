//! create, and the questions that are created to be answered.

use crate::admission::{AdmissionRequest, Operation};
use crate::kinds::Kind;
use crate::read::{entry_reply, object_reply, store_error};
use crate::respond::{self, Reply};
use crate::server::Context;
use crate::{intake, managed, quotas, reviews, strategy};
use bytes::Bytes;
use godwit_machinery::status::{Cause, Status};
use godwit_machinery::{builtin, meta, names};
use godwit_store::{Encode, Entry};
use http::StatusCode;
use serde_json::Value;
use std::sync::Arc;

/// A write's outcome.
pub(crate) enum Stored {
    /// It is stored.
    Entry(Arc<Entry>),
    /// It would be stored like this (in the version of the request), or it was like this when it went.
    Draft(Value),
}

/// Puts the revision into the object and encodes it.
pub(crate) fn encode(mut object: Value) -> Encode {
    Box::new(move |revision| {
        meta::set_resource_version(&mut object, revision);
        object.to_string().into()
    })
}

/// Answers with what a write left.
pub(crate) fn stored_reply(cx: &Context, kind: &Kind, code: StatusCode, stored: &Stored) -> Reply {
    let form = respond::form(&cx.headers)?;
    match stored {
        Stored::Entry(entry) => entry_reply(cx, kind, form, code, entry),
        Stored::Draft(object) => object_reply(cx, kind, form, code, object),
    }
}

/// Answers a question such as SelfSubjectAccessReview.
pub(crate) fn review(cx: &Context, kind: &Kind, bytes: &Bytes) -> Reply {
    let body = intake::object(cx, kind, bytes, "CreateOptions")?;
    let index = cx.inner.rbac.index();
    let answer = reviews::answer(&kind.resource.plural, &cx.info.namespace, body, &cx.user, &index)?;
    Ok(respond::json(StatusCode::CREATED, &answer))
}

pub(crate) async fn create(cx: &Context, kind: &Arc<Kind>, bytes: &Bytes) -> Reply {
    respond::form(&cx.headers)?;
    if !cx.info.name.is_empty() {
        return Err(Status::method_not_allowed());
    }
    let object = intake::object(cx, kind, bytes, "CreateOptions")?;
    let dry_run = cx.dry_run()?;
    let manager = managed::Manager::of(cx)?;
    let stored = insert(cx, kind, &cx.info.namespace, object, dry_run, &manager).await?;
    stored_reply(cx, kind, StatusCode::CREATED, &stored)
}

/// Everything between understanding an object and having it stored.
pub(crate) async fn insert(
    cx: &Context,
    kind: &Arc<Kind>,
    namespace: &str,
    mut object: Value,
    dry_run: bool,
    manager: &managed::Manager,
) -> Result<Stored, Status> {
    let resource = &kind.resource;
    cx.warn(strategy::unsupported(kind, &object));
    place(kind, namespace, &mut object)?;
    if !meta::resource_version(&object).is_empty() {
        return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
    }
    let generate = meta::generate_name(&object).to_owned();
    let given = !meta::name(&object).is_empty();
    for attempt in 0.. {
        let mut object = object.clone();
        if !given && !generate.is_empty() {
            let name = names::generated(&generate, &names::suffix(random()));
            meta::set(&mut object, "name", Some(Value::String(name)));
        }
        let name = meta::name(&object).to_owned();
        open_namespace(cx, kind, namespace, &name)?;
        let counts = meta::counts_generations(&resource.gv.group, &resource.plural, resource.builtin);
        meta::prepare_create(&mut object, &uuid::Uuid::new_v4().to_string(), jiff::Timestamp::now(), counts);
        strategy::create(kind, &mut object);
        let object = admit(
            cx,
            kind,
            Write { operation: Operation::Create, namespace, name: &name, old: None, dry_run },
            object,
        )?;
        let mut object = managed::created(kind, object, manager);
        let claim = quotas::claim(&cx.inner, kind, namespace, &object).await?;
        if dry_run {
            if cx.store().get(&kind.key(namespace, &name)).is_some() {
                let (group, plural) = kind.names();
                return Err(Status::already_exists(group, plural, &name));
            }
            return Ok(Stored::Draft(object));
        }
        kind.store(&mut object);
        let key = kind.key(namespace, &name);
        let stored = match claim {
            Some(claim) => claim.store(key, encode(object)).await,
            None => cx.store().create(&key, encode(object)).await,
        };
        match stored {
            Ok(entry) => return Ok(Stored::Entry(entry)),
            // A generated name that is taken is tried again with another one.
            Err(godwit_store::Error::Exists { .. }) if !given && attempt < 8 => {}
            Err(error) => return Err(store_error(kind, &name, error)),
        }
    }
    Err(Status::internal_error("no free name could be generated"))
}

fn random() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}

/// Makes the object's namespace that of the URL.
fn place(kind: &Kind, namespace: &str, object: &mut Value) -> Result<(), Status> {
    let given = meta::namespace(object);
    if kind.resource.namespaced {
        if !given.is_empty() && given != namespace {
            return Err(Status::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        meta::set(object, "namespace", Some(Value::String(namespace.to_owned())));
    } else if !given.is_empty() {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    } else {
        meta::set(object, "namespace", None);
    }
    Ok(())
}

/// New objects need a namespace that is there and stays.
fn open_namespace(cx: &Context, kind: &Kind, namespace: &str, name: &str) -> Result<(), Status> {
    let (group, plural) = kind.names();
    if !kind.resource.namespaced {
        return Ok(());
    }
    let Some(entry) = cx.store().get(&format!("/registry/core/namespaces/{namespace}")) else {
        return Err(Status::not_found("", "namespaces", namespace));
    };
    if meta::is_deleting(entry.json()) {
        let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
        let mut status = Status::forbidden(group, plural, name, &why);
        if let Some(details) = &mut status.details {
            details.causes.push(Cause {
                reason: "NamespaceTerminating".to_owned(),
                message: format!("namespace {namespace} is being terminated"),
                field: "metadata.namespace".to_owned(),
            });
        }
        return Err(status);
    }
    Ok(())
}

/// What admission is asked about.
#[derive(Clone, Copy)]
pub(crate) struct Write<'a> {
    pub(crate) operation: Operation,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) old: Option<&'a Value>,
    pub(crate) dry_run: bool,
}

/// Asks every admission plugin and validates the outcome.
pub(crate) fn admit(cx: &Context, kind: &Kind, write: Write<'_>, mut object: Value) -> Result<Value, Status> {
    let before = write.old.filter(|_| write.operation == Operation::Update);
    for plugin in &cx.inner.admission {
        let outcome = plugin.mutate(&question(cx, kind, write, Some(&object)))?;
        cx.warn(outcome.warnings);
        if let Some(mut changed) = outcome.object {
            intake::shape(kind, &mut changed)?;
            // What only the server may say is not for plugins to change.
            for key in
                ["uid", "creationTimestamp", "deletionTimestamp", "generation", "resourceVersion", "name", "namespace"]
            {
                meta::set(&mut changed, key, object.pointer(&format!("/metadata/{key}")).cloned());
            }
            if let Some(old) = before {
                let resource = &kind.resource;
                let counts = meta::counts_generations(&resource.gv.group, &resource.plural, resource.builtin);
                let version = object.pointer("/metadata/resourceVersion").cloned();
                let door = if cx.info.subresource == "status" {
                    meta::Door::Status
                } else {
                    meta::Door::Main { status_separate: resource.status_subresource }
                };
                meta::prepare_update(old, &mut changed, door, counts);
                meta::set(&mut changed, "resourceVersion", version);
            }
            object = changed;
        }
    }
    let mut causes = before.map(|old| names::validate_update(old, &object)).unwrap_or_default();
    causes.extend(before.map(|old| strategy::forbidden_changes(kind, old, &object)).unwrap_or_default());
    causes.extend(builtin::validate(&kind.resource, &object));
    if !causes.is_empty() {
        let (group, _) = kind.names();
        return Err(Status::invalid(group, &kind.resource.kind, write.name, causes));
    }
    judge(cx, kind, write, Some(&object))?;
    Ok(object)
}

/// Asks every plugin whether it objects.
pub(crate) fn judge(cx: &Context, kind: &Kind, write: Write<'_>, object: Option<&Value>) -> Result<(), Status> {
    for plugin in &cx.inner.admission {
        cx.warn(plugin.validate(&question(cx, kind, write, object))?);
    }
    Ok(())
}

/// The question that plugins are asked about a write.
pub(crate) fn question<'a>(
    cx: &'a Context,
    kind: &'a Kind,
    write: Write<'a>,
    object: Option<&'a Value>,
) -> AdmissionRequest<'a> {
    AdmissionRequest {
        operation: write.operation,
        resource: &kind.resource,
        subresource: &cx.info.subresource,
        namespace: write.namespace,
        name: write.name,
        object,
        old_object: write.old,
        user: &cx.user,
        dry_run: write.dry_run,
        lookup: &*cx.inner,
    }
}
