//! Discovery and OpenAPI of the group. They never change while the process runs.

use bytes::Bytes;
use godwit_api::subresources::{GROUP, VERSIONS};
use godwit_machinery::resource::{GroupVersion, Resource};
use godwit_machinery::{discovery, openapi};
use godwit_serving::respond::{self, Body};
use http::header::{ACCEPT, CONTENT_TYPE, ETAG, IF_NONE_MATCH, VARY};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use serde_json::{Map, Value, json};

/// One document.
struct Document {
    media: HeaderValue,
    bytes: Bytes,
    tag: HeaderValue,
}

impl Document {
    fn of(value: &Value, media: &str) -> Self {
        Self::new(value.to_string().into(), value, media)
    }

    fn new(bytes: Bytes, value: &Value, media: &str) -> Self {
        let header = |text: &str| HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""));
        Self { media: header(media), bytes, tag: header(&format!("\"{}\"", openapi::hash(value))) }
    }

    fn answer(&self, headers: &HeaderMap) -> Response<Body> {
        let unchanged = headers.get(IF_NONE_MATCH) == Some(&self.tag);
        let mut response = Response::new(respond::full(if unchanged { Bytes::new() } else { self.bytes.clone() }));
        if unchanged {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
        }
        let own = response.headers_mut();
        own.insert(CONTENT_TYPE, self.media.clone());
        own.insert(VARY, HeaderValue::from_static("Accept"));
        own.insert(ETAG, self.tag.clone());
        response
    }
}

/// All of them.
pub struct Documents {
    resources: Vec<Resource>,
    aggregated: Vec<(&'static str, Document)>,
    v2: Document,
    v2_protobuf: Document,
    v3: Document,
    v3_of: Vec<(GroupVersion, Document)>,
}

const JSON: &str = "application/json";

impl Documents {
    /// Those of these resources.
    pub fn new(resources: Vec<Resource>) -> Self {
        let aggregated = |version| {
            let document = discovery::aggregated(&resources, false, version);
            (version, Document::of(&document, &discovery::aggregated_content_type(version)))
        };
        let v2 = openapi::v2_document(&resources);
        let of = |version: &&str| {
            let gv = GroupVersion { group: GROUP.to_owned(), version: (*version).to_owned() };
            let document = openapi::v3_document(&resources, &gv)?;
            Some((gv, Document::of(&document, JSON), openapi::hash(&document)))
        };
        let documents: Vec<_> = VERSIONS.iter().filter_map(of).collect();
        let index: Map<String, Value> = documents
            .iter()
            .map(|(gv, _, hash)| {
                let path = gv.path();
                let url = format!("/openapi/v3/{path}?hash={hash}");
                (path, json!({ "serverRelativeURL": url }))
            })
            .collect();
        Self {
            aggregated: vec![aggregated("v2"), aggregated("v2beta1")],
            v2_protobuf: Document::new(openapi::v2_protobuf(&v2).into(), &v2, openapi::V2_PROTOBUF),
            v2: Document::of(&v2, JSON),
            v3: Document::of(&json!({ "paths": index }), JSON),
            v3_of: documents.into_iter().map(|(gv, document, _)| (gv, document)).collect(),
            resources,
        }
    }

    /// What the group's resources are.
    pub fn resources(&self) -> &[Resource] {
        &self.resources
    }

    /// The document at a path; none where there is none.
    pub fn at(&self, path: &str, headers: &HeaderMap) -> Option<Response<Body>> {
        let accept: Vec<&str> = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
        let accept = accept.join(",");
        let gv = |group: &str, version: &str| GroupVersion { group: group.to_owned(), version: version.to_owned() };
        let plain = |value: Value| Document::of(&value, JSON).answer(headers);
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        match parts.as_slice() {
            [] => Some(plain(self.root())),
            ["apis"] => match discovery::aggregated_version(&accept) {
                Some(wanted) => {
                    let found = self.aggregated.iter().find(|(version, _)| *version == wanted);
                    found.map(|(_, document)| document.answer(headers))
                }
                None => Some(plain(discovery::api_group_list(&self.resources))),
            },
            ["apis", group] => discovery::api_group(&self.resources, group).map(plain),
            ["apis", group, version] => discovery::api_resource_list(&self.resources, &gv(group, version)).map(plain),
            ["openapi", "v2"] if takes_protobuf(headers) => Some(self.v2_protobuf.answer(headers)),
            ["openapi", "v2"] => Some(self.v2.answer(headers)),
            ["openapi", "v3"] => Some(self.v3.answer(headers)),
            ["openapi", "v3", "apis", group, version] => {
                let wanted = gv(group, version);
                self.v3_of.iter().find(|(gv, _)| *gv == wanted).map(|(_, document)| document.answer(headers))
            }
            _ => None,
        }
    }

    fn root(&self) -> Value {
        let versions = VERSIONS.iter().map(|version| format!("/apis/{GROUP}/{version}"));
        let mut paths: Vec<String> = versions.collect();
        paths.extend(["/apis", "/healthz", "/livez", "/openapi/v2", "/openapi/v3", "/readyz"].map(str::to_owned));
        paths.push(format!("/apis/{GROUP}"));
        paths.sort();
        json!({ "paths": paths })
    }
}

/// Whether protobuf is what a client would rather have.
fn takes_protobuf(headers: &HeaderMap) -> bool {
    respond::ranges(headers).first().is_some_and(|range| {
        openapi::V2_PROTOBUF.eq_ignore_ascii_case(range.media) || range.media.contains("openapi.spec.v2")
    })
}
