//! Paths that are not about objects: health, version, discovery, OpenAPI.

use crate::kinds::Kinds;
use crate::respond::{self, Reply, ranges};
use crate::server::Context;
use bytes::Bytes;
use godwit_machinery::resource::{GroupVersion, Resource};
use godwit_machinery::status::Status;
use godwit_machinery::{discovery, openapi};
use http::header::{CONTENT_TYPE, ETAG, IF_NONE_MATCH, VARY};
use http::{HeaderValue, Response, StatusCode};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// A document with its fingerprint.
#[derive(Debug, Clone)]
struct Document {
    bytes: Bytes,
    hash: String,
}

/// OpenAPI documents of one table of kinds.
#[derive(Debug, Default)]
struct Built {
    generation: u64,
    v3: Option<(Document, Arc<BTreeMap<GroupVersion, Document>>)>,
    v2_json: Option<Document>,
    v2_protobuf: Option<Document>,
}

/// OpenAPI documents, made when they are asked for and kept until the table of kinds changes.
#[derive(Debug, Default)]
pub(crate) struct Documents {
    built: Mutex<Built>,
    /// Those of built-in kinds never change.
    builtin: Mutex<BTreeMap<GroupVersion, Document>>,
}

impl Documents {
    fn with<T>(&self, kinds: &Kinds, work: impl FnOnce(&mut Built) -> T) -> T {
        let mut built = self.built.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if built.generation != kinds.generation {
            *built = Built { generation: kinds.generation, ..Built::default() };
        }
        work(&mut built)
    }

    fn version(&self, kinds: &Kinds, gv: &GroupVersion) -> Option<Document> {
        let constant = kinds.resources.iter().filter(|r| r.gv == *gv).all(|r| r.builtin);
        let cached = || self.builtin.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if constant && let Some(known) = cached().get(gv) {
            return Some(known.clone());
        }
        let document = openapi::v3_document(&kinds.resources, gv)?;
        let document = Document { hash: openapi::hash(&document), bytes: document.to_string().into() };
        if constant {
            cached().insert(gv.clone(), document.clone());
        }
        Some(document)
    }

    fn v3(&self, kinds: &Kinds) -> (Document, Arc<BTreeMap<GroupVersion, Document>>) {
        self.with(kinds, |built| {
            let make = || {
                let mut all = BTreeMap::new();
                let mut index = Map::new();
                for Resource { gv, .. } in &kinds.resources {
                    if all.contains_key(gv) {
                        continue;
                    }
                    let Some(document) = self.version(kinds, gv) else { continue };
                    let path = gv.path();
                    let url = format!("/openapi/v3/{path}?hash={}", document.hash);
                    index.insert(path, json!({"serverRelativeURL": url}));
                    all.insert(gv.clone(), document);
                }
                let index = json!({"paths": index});
                (Document { hash: openapi::hash(&index), bytes: index.to_string().into() }, Arc::new(all))
            };
            built.v3.get_or_insert_with(make).clone()
        })
    }

    fn v2_json(&self, kinds: &Kinds) -> Document {
        self.with(kinds, |built| {
            let make = || {
                let document = openapi::v2_document(&kinds.resources);
                Document { hash: openapi::hash(&document), bytes: document.to_string().into() }
            };
            built.v2_json.get_or_insert_with(make).clone()
        })
    }

    fn v2_protobuf(&self, kinds: &Kinds) -> Document {
        self.with(kinds, |built| {
            let make = || {
                let document = openapi::v2_document(&kinds.resources);
                Document { hash: openapi::hash(&document), bytes: openapi::v2_protobuf(&document).into() }
            };
            built.v2_protobuf.get_or_insert_with(make).clone()
        })
    }
}

pub(crate) async fn answer(cx: &Context) -> Reply {
    let path = cx.info.path.trim_end_matches('/');
    let known = matches!(
        path,
        "" | "/healthz" | "/livez" | "/readyz" | "/version" | "/api" | "/apis" | "/openapi/v2" | "/openapi/v3"
    );
    let below = ["/healthz/", "/livez/", "/readyz/", "/api/", "/apis/", "/openapi/v3/"];
    if !known && !below.iter().any(|start| path.starts_with(start)) {
        return Ok(respond::page_not_found());
    }
    if !matches!(cx.info.verb, "get" | "head") {
        return Err(Status::method_not_allowed());
    }
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let kinds = &cx.kinds;
    let resources = &kinds.resources;
    let found = |document: Option<Value>| match document {
        Some(document) => Ok(respond::json(StatusCode::OK, &document)),
        None => Ok(respond::page_not_found()),
    };
    match parts.as_slice() {
        [] | [""] => Ok(respond::json(StatusCode::OK, &root(resources))),
        ["healthz" | "livez" | "readyz", ..] => Ok(health(cx, path)),
        ["version"] => found(Some(discovery::version())),
        ["api"] => match discovery::aggregated_version(cx.header("accept")) {
            Some(version) => Ok(aggregated(cx, true, version)),
            None => found(Some(discovery::api_versions(resources, cx.header("host")))),
        },
        ["apis"] => match discovery::aggregated_version(cx.header("accept")) {
            Some(version) => Ok(aggregated(cx, false, version)),
            None => found(Some(discovery::api_group_list(resources))),
        },
        ["api", version] => found(discovery::api_resource_list(resources, &gv("", version))),
        ["apis", group] => found(discovery::api_group(resources, group)),
        ["apis", group, version] => found(discovery::api_resource_list(resources, &gv(group, version))),
        ["openapi", ..] => openapi_document(cx, &parts).await,
        _ => Ok(respond::page_not_found()),
    }
}

fn gv(group: &str, version: &str) -> GroupVersion {
    GroupVersion { group: group.to_owned(), version: version.to_owned() }
}

fn root(resources: &[Resource]) -> Value {
    let mut paths: Vec<String> =
        ["/api", "/apis", "/healthz", "/livez", "/openapi/v2", "/openapi/v3", "/readyz", "/version"]
            .iter()
            .map(|path| (*path).to_owned())
            .collect();
    for resource in resources {
        paths.push(format!("/{}", resource.gv.path()));
    }
    paths.sort();
    paths.dedup();
    json!({"paths": paths})
}

fn health(cx: &Context, path: &str) -> Response<respond::Body> {
    if *cx.inner.stopping.borrow() {
        return respond::text(StatusCode::INTERNAL_SERVER_ERROR, "[-]shutdown failed: the server is shutting down\n");
    }
    let name = path.trim_start_matches('/');
    if cx.params.has("verbose") {
        return respond::text(StatusCode::OK, format!("[+]ping ok\n[+]store ok\n{name} check passed\n"));
    }
    respond::text(StatusCode::OK, "ok")
}

fn aggregated(cx: &Context, legacy: bool, version: &str) -> Response<respond::Body> {
    let document = discovery::aggregated(&cx.kinds.resources, legacy, version);
    let tag = format!("\"{}\"", openapi::hash(&document));
    if cx.header(IF_NONE_MATCH.as_str()) == tag {
        return unchanged(&tag);
    }
    let mut response = respond::json(StatusCode::OK, &document);
    if let Ok(value) = HeaderValue::from_str(&discovery::aggregated_content_type(version)) {
        response.headers_mut().insert(CONTENT_TYPE, value);
    }
    response.headers_mut().insert(VARY, HeaderValue::from_static("Accept"));
    tagged(response, &tag)
}

fn tagged(mut response: Response<respond::Body>, tag: &str) -> Response<respond::Body> {
    if let Ok(value) = HeaderValue::from_str(tag) {
        response.headers_mut().insert(ETAG, value);
    }
    response
}

fn unchanged(tag: &str) -> Response<respond::Body> {
    let mut response = Response::new(respond::full(Bytes::new()));
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    tagged(response, tag)
}

/// Which of the documents a path means, or none; may take a while in the making.
async fn openapi_document(cx: &Context, parts: &[&str]) -> Reply {
    let accepted = ranges(&cx.headers);
    let protobuf = parts == ["openapi", "v2"]
        && accepted.first().is_some_and(|range| {
            openapi::V2_PROTOBUF.eq_ignore_ascii_case(range.media) || range.media.contains("openapi.spec.v2")
        });
    let wanted = match parts {
        ["openapi", "v2"] | ["openapi", "v3"] => None,
        ["openapi", "v3", "api", version] => Some(gv("", version)),
        ["openapi", "v3", "apis", group, version] => Some(gv(group, version)),
        _ => return Ok(respond::page_not_found()),
    };
    let (inner, kinds, v2) = (cx.inner.clone(), cx.kinds.clone(), parts == ["openapi", "v2"]);
    let made = tokio::task::spawn_blocking(move || match (wanted, v2, protobuf) {
        (Some(gv), _, _) => inner.documents.v3(&kinds).1.get(&gv).cloned(),
        (None, false, _) => Some(inner.documents.v3(&kinds).0),
        (None, true, false) => Some(inner.documents.v2_json(&kinds)),
        (None, true, true) => Some(inner.documents.v2_protobuf(&kinds)),
    });
    let Some(document) = made.await.map_err(Status::internal_error)? else { return Ok(respond::page_not_found()) };
    let tag = format!("\"{}\"", document.hash);
    if cx.header(IF_NONE_MATCH.as_str()) == tag {
        return Ok(unchanged(&tag));
    }
    let media = if protobuf { openapi::V2_PROTOBUF } else { "application/json" };
    let mut response = respond::bytes(StatusCode::OK, media, document.bytes);
    response.headers_mut().insert(VARY, HeaderValue::from_static("Accept"));
    Ok(tagged(response, &tag))
}
