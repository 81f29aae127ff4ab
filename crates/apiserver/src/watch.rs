//! watch: a stream that pulls from the store's log as fast as its client reads, and no faster.

use crate::kinds::Kind;
use crate::list::{ListOptions, Match};
use crate::read::{caught_up, encoded, object};
use crate::render;
use crate::respond::{self, Body, Form, Reply};
use crate::server::{Context, stopped};
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream;
use godwit_machinery::meta;
use godwit_machinery::status::Status;
use godwit_store::{Entry, Error, Event, Watch};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Between bookmarks.
const BOOKMARK: Duration = Duration::from_secs(60);
/// Watches without `timeoutSeconds` end after this long plus up to as long again, so that not all end together.
const MIN_TIMEOUT: Duration = Duration::from_secs(1800);
/// Initial events that go into one piece of the body.
const PIECE: usize = 256 << 10;

/// Says that all initial events were sent.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

pub(crate) async fn watch(cx: &Context, kind: &Arc<Kind>) -> Reply {
    let form = respond::form(&cx.headers)?;
    let (group, plural) = kind.names();
    let mut options = ListOptions::parse(&cx.params, group, plural, true)?;
    if !cx.info.name.is_empty() {
        // The old form: one object by its path.
        options.fields = godwit_machinery::selector::FieldSelector::parse(&format!("metadata.name={}", cx.info.name))?;
    }
    let table = match form {
        Form::Table(version) => Some(render::Table::parse(cx, version)?),
        _ => None,
    };
    let folder = kind.folder(&cx.info.namespace);
    let fresh = matches!(options.resource_version.as_str(), "" | "0");
    if options.initial_events == Some(true)
        && let Match::NotOlderThan(wanted) = options.at
    {
        caught_up(cx, wanted).await?;
    }
    let initial = options.initial_events.unwrap_or(fresh);
    let source = if initial {
        cx.store().list_and_watch(&folder).map(|(list, watch)| (Some(list), watch))
    } else {
        let from = match options.at {
            Match::NotOlderThan(from) | Match::Exact(from) => from,
            Match::Any => cx.store().revision(),
        };
        cx.store().watch(&folder, from).map(|watch| (None, watch))
    };
    let timeout = match options.timeout_seconds {
        Some(seconds) => Duration::from_secs(seconds.min(24 * 3600)),
        None => MIN_TIMEOUT + MIN_TIMEOUT.mul_f64(spread()),
    };
    let mut encoder = Encoder { kind: kind.clone(), form, table, options };
    let mut stream = Stream {
        watch: None,
        initial: Vec::new().into_iter(),
        end_mark: None,
        deadline: Instant::now() + timeout,
        bookmark: Instant::now() + BOOKMARK,
        stopping: cx.inner.stopping.subscribe(),
        last_words: None,
        encoder: None,
    };
    match source {
        Ok((list, watch)) => {
            if let Some(list) = list {
                stream.initial = list.entries.into_iter();
                if encoder.options.initial_events == Some(true) && encoder.options.bookmarks {
                    stream.end_mark = Some(list.revision);
                }
            }
            stream.watch = Some(watch);
            stream.encoder = Some(encoder);
        }
        Err(Error::Compacted { requested, oldest }) => {
            stream.last_words = Some(encoder.error(&Status::expired(requested, oldest)));
        }
        Err(error) => return Err(crate::read::store_error(kind, "", error)),
    }
    let pieces = stream::unfold(stream, |mut stream| async move { stream.next().await.map(|piece| (piece, stream)) });
    let frames = futures::StreamExt::map(pieces, |piece| Ok::<_, std::io::Error>(Frame::data(piece)));
    let body: Body = StreamBody::new(frames).boxed_unsync();
    let mut response = http::Response::new(body);
    *response.status_mut() = StatusCode::OK;
    let media = if table_or_partial(form) { "application/json;stream=watch" } else { "application/json" };
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(media));
    Ok(response)
}

fn table_or_partial(form: Form) -> bool {
    form != Form::Object
}

/// A number from 0 to 1 that differs from watch to watch.
fn spread() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_bytes().first().copied().unwrap_or_default()) / 255.0
}

struct Stream {
    watch: Option<Watch>,
    initial: std::vec::IntoIter<Arc<Entry>>,
    /// Revision of the bookmark that ends the initial events, still to be sent.
    end_mark: Option<u64>,
    deadline: Instant,
    bookmark: Instant,
    stopping: tokio::sync::watch::Receiver<bool>,
    last_words: Option<Bytes>,
    encoder: Option<Encoder>,
}

impl Stream {
    /// The next piece of the body.
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(words) = self.last_words.take() {
            self.watch = None;
            return Some(words);
        }
        let encoder = self.encoder.as_mut()?;
        let watch = self.watch.as_mut()?;
        let mut out = BytesMut::new();
        for entry in self.initial.by_ref() {
            encoder.initial(&mut out, &entry);
            if out.len() >= PIECE {
                return Some(out.freeze());
            }
        }
        if let Some(revision) = self.end_mark.take() {
            out.put_slice(&encoder.bookmark(revision, true));
        }
        if !out.is_empty() {
            return Some(out.freeze());
        }
        loop {
            tokio::select! {
                biased;
                () = stopped(&mut self.stopping) => return None,
                () = tokio::time::sleep_until(self.deadline) => {
                    // A last bookmark, so that the client can go on from here.
                    let batch = watch.poll().ok().filter(|_| encoder.options.bookmarks);
                    if let Some(batch) = batch {
                        batch.events.iter().for_each(|event| encoder.event(&mut out, event));
                        out.put_slice(&encoder.bookmark(batch.revision, false));
                    }
                    self.watch = None;
                    return (!out.is_empty()).then(|| out.freeze());
                }
                () = tokio::time::sleep_until(self.bookmark), if encoder.options.bookmarks => {
                    self.bookmark = Instant::now() + BOOKMARK;
                    if let Ok(batch) = watch.poll() {
                        batch.events.iter().for_each(|event| encoder.event(&mut out, event));
                        out.put_slice(&encoder.bookmark(batch.revision, false));
                        return Some(out.freeze());
                    }
                }
                batch = watch.next() => match batch {
                    Ok(batch) => {
                        batch.events.iter().for_each(|event| encoder.event(&mut out, event));
                        if !out.is_empty() {
                            return Some(out.freeze());
                        }
                    }
                    Err(Error::Compacted { requested, oldest }) => {
                        let words = encoder.error(&Status::expired(requested, oldest));
                        self.watch = None;
                        return Some(words);
                    }
                    Err(_) => return None,
                },
            }
        }
    }
}

/// Which of the shared encodings of an event is meant; see [`Event::cached`].
#[derive(Clone, Copy)]
enum Slot {
    /// ADDED or MODIFIED as the store saw it.
    Plain,
    /// DELETED because the object is gone.
    Gone,
    /// ADDED because the object came into the selection.
    Entered,
    /// DELETED because the object left the selection.
    Left,
}

/// Turns events into lines for one watch.
struct Encoder {
    kind: Arc<Kind>,
    form: Form,
    table: Option<render::Table>,
    options: ListOptions,
}

impl Encoder {
    fn selects(&self, entry: &Entry) -> bool {
        if self.options.everything() {
            return true;
        }
        if self.kind.served_as_stored() {
            return self.options.matches(entry.json());
        }
        self.options.matches(&object(&self.kind, entry))
    }

    fn initial(&mut self, out: &mut BytesMut, entry: &Entry) {
        if !self.selects(entry) {
            return;
        }
        if self.form == Form::Object {
            put_line(out, "ADDED", &encoded(&self.kind, entry));
        } else {
            let object = object(&self.kind, entry);
            self.put(out, "ADDED", object);
        }
    }

    fn event(&mut self, out: &mut BytesMut, event: &Event) {
        let before = event.old.as_ref().filter(|entry| self.selects(entry));
        let after = event.new.as_ref().filter(|entry| self.selects(entry));
        let (ty, entry, slot) = match (before, after) {
            (None, None) => return,
            (Some(old), None) if event.new.is_none() => ("DELETED", old, Slot::Gone),
            (Some(old), None) => ("DELETED", old, Slot::Left),
            (None, Some(new)) if event.old.is_none() => ("ADDED", new, Slot::Plain),
            (None, Some(new)) => ("ADDED", new, Slot::Entered),
            (Some(_), Some(new)) => ("MODIFIED", new, Slot::Plain),
        };
        // What goes is shown as it was, at the revision at which it went.
        let gone = ty == "DELETED";
        let shown = |kind: &Kind| {
            let mut object = object(kind, entry);
            if gone {
                meta::set_resource_version(&mut object, event.revision);
            }
            object
        };
        if self.form == Form::Object && self.kind.served_as_stored() {
            out.put_slice(&event.cached(slot as usize, || {
                let mut line = BytesMut::new();
                let body = if gone { shown(&self.kind).to_string().into() } else { entry.value.clone() };
                put_line(&mut line, ty, &body);
                line.freeze()
            }));
        } else {
            let object = shown(&self.kind);
            self.put(out, ty, object);
        }
    }

    fn put(&mut self, out: &mut BytesMut, ty: &str, object: Value) {
        let body = match (self.form, &mut self.table) {
            (Form::Table(_), Some(table)) => {
                let meta = json!({"resourceVersion": object.pointer("/metadata/resourceVersion")});
                let body = table.render(&self.kind, std::slice::from_ref(&object), meta);
                table.headings = false;
                body
            }
            (Form::Partial(version), _) => render::partial(&object, version),
            _ => object,
        };
        put_line(out, ty, body.to_string().as_bytes());
    }

    fn bookmark(&mut self, revision: u64, end_of_initial: bool) -> Bytes {
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if end_of_initial {
            metadata["annotations"] = json!({INITIAL_EVENTS_END: "true"});
        }
        let body = match self.form {
            Form::Object => {
                json!({"kind": self.kind.resource.kind, "apiVersion": self.kind.api_version(), "metadata": metadata})
            }
            Form::Partial(version) => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": format!("meta.k8s.io/{version}"), "metadata": metadata})
            }
            Form::Table(version) => {
                let meta = json!({"resourceVersion": revision.to_string()});
                // The row carries the annotation; tables have no metadata for it.
                let object = json!({"kind": "PartialObjectMetadata", "apiVersion": format!("meta.k8s.io/{version}"), "metadata": metadata});
                let rows = json!([{"cells": [], "object": object}]);
                json!({"kind": "Table", "apiVersion": format!("meta.k8s.io/{version}"), "metadata": meta, "columnDefinitions": null, "rows": rows})
            }
        };
        let mut line = BytesMut::new();
        put_line(&mut line, "BOOKMARK", body.to_string().as_bytes());
        line.freeze()
    }

    fn error(&mut self, status: &Status) -> Bytes {
        let mut line = BytesMut::new();
        put_line(&mut line, "ERROR", status.to_value().to_string().as_bytes());
        line.freeze()
    }
}

fn put_line(out: &mut BytesMut, ty: &str, object: &[u8]) {
    out.reserve(object.len() + 40);
    out.put_slice(b"{\"type\":\"");
    out.put_slice(ty.as_bytes());
    out.put_slice(b"\",\"object\":");
    out.put_slice(object);
    out.put_slice(b"}\n");
}
