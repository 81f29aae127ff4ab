//! get and list.

use crate::kinds::Kind;
use crate::list::{ListOptions, Match, Token, revision};
use crate::render;
use crate::respond::{self, Form, Reply};
use crate::server::Context;
use bytes::{BufMut, Bytes, BytesMut};
use godwit_machinery::status::Status;
use godwit_store::{Entry, Error, List};
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// How long a read waits for a revision that has not happened.
const PATIENCE: Duration = Duration::from_secs(3);

/// A stored object as this kind serves it.
pub(crate) fn object(kind: &Kind, entry: &Entry) -> Value {
    let mut object = Value::clone(entry.json());
    if !kind.served_as_stored() {
        kind.serve(&mut object);
    }
    object
}

/// Its encoding; no parsing where it is served as stored.
pub(crate) fn encoded(kind: &Kind, entry: &Entry) -> Bytes {
    if kind.served_as_stored() { entry.value.clone() } else { object(kind, entry).to_string().into() }
}

/// Waits until the store has seen this revision.
pub(crate) async fn caught_up(cx: &Context, wanted: u64) -> Result<(), Status> {
    if wanted <= cx.store().revision() || tokio::time::timeout(PATIENCE, cx.store().reached(wanted)).await.is_ok() {
        return Ok(());
    }
    Err(Status::too_large_resource_version(wanted, cx.store().revision()))
}

pub(crate) fn not_found(kind: &Kind, name: &str) -> Status {
    let (group, plural) = kind.names();
    Status::not_found(group, plural, name)
}

pub(crate) async fn get(cx: &Context, kind: &Arc<Kind>) -> Reply {
    let form = respond::form(&cx.headers)?;
    caught_up(cx, revision(cx.params.get("resourceVersion"))?).await?;
    let info = &cx.info;
    let entry = cx.store().get(&kind.key(&info.namespace, &info.name)).ok_or_else(|| not_found(kind, &info.name))?;
    entry_reply(cx, kind, form, StatusCode::OK, &entry)
}

/// Answers with one stored object.
pub(crate) fn entry_reply(cx: &Context, kind: &Kind, form: Form, code: StatusCode, entry: &Entry) -> Reply {
    match form {
        Form::Object => Ok(respond::bytes(code, "application/json", encoded(kind, entry))),
        form => object_reply(cx, kind, form, code, &object(kind, entry)),
    }
}

/// Answers with one object.
pub(crate) fn object_reply(cx: &Context, kind: &Kind, form: Form, code: StatusCode, object: &Value) -> Reply {
    let body = match form {
        Form::Object => return Ok(respond::json(code, object)),
        Form::Table(version) => {
            let table = render::Table::parse(cx, version)?;
            let meta = json!({"resourceVersion": object.pointer("/metadata/resourceVersion")});
            table.render(kind, std::slice::from_ref(object), meta)
        }
        Form::Partial(version) => render::partial(object, version),
    };
    Ok(respond::json(code, &body))
}

/// What a list found.
pub(crate) struct Found {
    pub(crate) revision: u64,
    pub(crate) entries: Vec<Arc<Entry>>,
    pub(crate) next: Option<Token>,
    /// How many follow, where that is known.
    pub(crate) remaining: Option<usize>,
}

/// Reads what the options select.
pub(crate) async fn find(cx: &Context, kind: &Kind, options: &ListOptions) -> Result<Found, Status> {
    let folder = kind.folder(&cx.info.namespace);
    let after = options.next.as_ref().map(|token| format!("{folder}{}", token.start));
    if let Match::NotOlderThan(wanted) | Match::Exact(wanted) = options.at {
        caught_up(cx, wanted).await?;
    }
    // With selectors the limit counts what is selected.
    let everything = options.everything();
    let limit = if everything { options.limit } else { 0 };
    let list = match options.at {
        // An inconsistent continuation: from the present state.
        Match::Exact(0) | Match::Any | Match::NotOlderThan(_) => cx.store().list(&folder, after.as_deref(), limit),
        Match::Exact(at) => cx.store().list_at(&folder, after.as_deref(), limit, at).map_err(|error| match error {
            Error::Compacted { requested, oldest } => match &options.next {
                Some(token) => Status::expired_continue(&Token::new(0, &token.start).encode()),
                None => Status::expired(requested, oldest),
            },
            other => store_error(kind, &cx.info.name, other),
        })?,
    };
    let List { revision, entries, remaining } = list;
    if everything {
        let next = (remaining > 0).then(|| entries.last().map(|entry| token(revision, &folder, entry))).flatten();
        return Ok(Found { revision, entries, next, remaining: (remaining > 0).then_some(remaining) });
    }
    let mut chosen = Vec::new();
    let mut next = None;
    for entry in entries {
        let selected = match kind.served_as_stored() {
            true => options.matches(entry.json()),
            false => options.matches(&object(kind, &entry)),
        };
        if !selected {
            continue;
        }
        if options.limit > 0 && chosen.len() == options.limit {
            next = chosen.last().map(|last: &Arc<Entry>| token(revision, &folder, last));
            break;
        }
        chosen.push(entry);
    }
    Ok(Found { revision, entries: chosen, next, remaining: None })
}

fn token(revision: u64, folder: &str, last: &Entry) -> Token {
    Token::new(revision, last.key.strip_prefix(folder).unwrap_or(&last.key))
}

pub(crate) async fn list(cx: &Context, kind: &Arc<Kind>) -> Reply {
    let form = respond::form(&cx.headers)?;
    let (group, plural) = kind.names();
    let options = ListOptions::parse(&cx.params, group, plural, false)?;
    let found = find(cx, kind, &options).await?;
    let mut meta = json!({"resourceVersion": found.revision.to_string()});
    if let Some(next) = &found.next {
        meta["continue"] = json!(next.encode());
    }
    if let Some(remaining) = found.remaining {
        meta["remainingItemCount"] = json!(remaining);
    }
    match form {
        Form::Object => {
            let items = found.entries.iter().map(|entry| encoded(kind, entry));
            Ok(respond::bytes(StatusCode::OK, "application/json", list_body(kind, &meta, items)))
        }
        Form::Table(version) => {
            let table = render::Table::parse(cx, version)?;
            let objects: Vec<Value> = found.entries.iter().map(|entry| object(kind, entry)).collect();
            Ok(respond::json(StatusCode::OK, &table.render(kind, &objects, meta)))
        }
        Form::Partial(version) => {
            let items: Vec<Value> =
                found.entries.iter().map(|entry| render::partial(&object(kind, entry), version)).collect();
            let api_version = format!("meta.k8s.io/{version}");
            let body = json!({"kind": "PartialObjectMetadataList", "apiVersion": api_version, "metadata": meta, "items": items});
            Ok(respond::json(StatusCode::OK, &body))
        }
    }
}

/// A list, put together from encoded objects.
pub(crate) fn list_body(kind: &Kind, meta: &Value, items: impl Iterator<Item = Bytes>) -> Bytes {
    let mut body = BytesMut::new();
    let head = json!({"kind": kind.resource.list_kind, "apiVersion": kind.api_version(), "metadata": meta}).to_string();
    body.put_slice(head.strip_suffix('}').unwrap_or(&head).as_bytes());
    body.put_slice(b",\"items\":[");
    for (at, item) in items.enumerate() {
        if at > 0 {
            body.put_u8(b',');
        }
        body.put_slice(&item);
    }
    body.put_slice(b"]}");
    body.freeze()
}

/// What a failure of the store means to the client.
pub(crate) fn store_error(kind: &Kind, name: &str, error: Error) -> Status {
    let (group, plural) = kind.names();
    match error {
        Error::Exists { .. } => Status::already_exists(group, plural, name),
        Error::NotFound { .. } => Status::not_found(group, plural, name),
        Error::Conflict { .. } => Status::conflict(group, plural, name),
        Error::Compacted { requested, oldest } => Status::expired(requested, oldest),
        Error::Future { requested, current } => Status::too_large_resource_version(requested, current),
        Error::Closed => Status::service_unavailable("the server is shutting down"),
        other @ (Error::Storage(_) | Error::Damaged(_)) => Status::internal_error(other),
    }
}
