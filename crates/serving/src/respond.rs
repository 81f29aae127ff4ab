//! Answers: which form the client wants, and bodies.

use bytes::Bytes;
use godwit_machinery::status::{PAGE_NOT_FOUND, Status};
use http::header::{ACCEPT, CONTENT_TYPE, RETRY_AFTER, WARNING};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use serde_json::Value;

/// Body of every answer.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What a handler returns.
pub type Reply = Result<Response<Body>, Status>;

/// How the client wants objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As they are.
    Object,
    /// `meta.k8s.io` Table of this version.
    Table(&'static str),
    /// `meta.k8s.io` PartialObjectMetadata of this version.
    Partial(&'static str),
}

/// One media range of an `Accept` header.
#[derive(Debug)]
pub struct Range<'a> {
    /// `application/json`
    pub media: &'a str,
    parameters: Vec<(&'a str, &'a str)>,
    quality: f32,
}

impl<'a> Range<'a> {
    fn parse(text: &'a str) -> Self {
        let mut pieces = text.split(';').map(str::trim);
        let media = pieces.next().unwrap_or_default();
        let parameters: Vec<_> = pieces.filter_map(|piece| piece.split_once('=')).collect();
        let quality = parameters.iter().find(|(k, _)| *k == "q").and_then(|(_, v)| v.parse().ok()).unwrap_or(1.0);
        Self { media, parameters, quality }
    }

    /// The value of a parameter, empty without it.
    pub fn parameter(&self, key: &str) -> &'a str {
        self.parameters.iter().find(|(k, _)| *k == key).map_or("", |(_, v)| v)
    }

    /// Whether JSON will do.
    pub fn takes_json(&self) -> bool {
        matches!(self.media, "application/json" | "application/*" | "*/*")
    }
}

/// What the client accepts, best first.
pub fn ranges(headers: &HeaderMap) -> Vec<Range<'_>> {
    let values = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut ranges: Vec<_> =
        values.flat_map(|value| value.split(',')).map(Range::parse).filter(|range| !range.media.is_empty()).collect();
    ranges.sort_by(|a, b| b.quality.total_cmp(&a.quality));
    ranges
}

/// What can be answered, for 406.
const MEDIA_TYPES: [&str; 3] =
    ["application/json", "application/json;as=Table;g=meta.k8s.io;v=v1", "application/json;stream=watch"];

/// The form to answer in.
///
/// # Errors
/// There is none that the client would take.
pub fn form(headers: &HeaderMap) -> Result<Form, Status> {
    let ranges = ranges(headers);
    if ranges.is_empty() {
        return Ok(Form::Object);
    }
    for range in ranges.iter().filter(|range| range.takes_json()) {
        let version = match range.parameter("v") {
            "v1" => "v1",
            "v1beta1" => "v1beta1",
            _ => "",
        };
        match (range.parameter("as"), range.parameter("g"), version) {
            ("", _, _) => return Ok(Form::Object),
            (_, _, "") => {}
            ("Table", "meta.k8s.io", version) => return Ok(Form::Table(version)),
            ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io", version) => {
                return Ok(Form::Partial(version));
            }
            _ => {}
        }
    }
    Err(Status::not_acceptable(&MEDIA_TYPES))
}

/// A body of known content.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// An answer with a body of this type.
pub fn bytes(status: StatusCode, media: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media));
    response
}

/// A JSON answer.
pub fn json(status: StatusCode, value: &Value) -> Response<Body> {
    bytes(status, "application/json", value.to_string())
}

/// A text answer.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    bytes(status, "text/plain; charset=utf-8", body)
}

/// The answer to a path that is not served.
pub fn page_not_found() -> Response<Body> {
    text(StatusCode::NOT_FOUND, PAGE_NOT_FOUND)
}

/// A failure.
pub fn failure(status: &Status) -> Response<Body> {
    let code = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json(code, &status.to_value());
    let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
    if seconds > 0 {
        response.headers_mut().insert(RETRY_AFTER, seconds.into());
    }
    response
}

/// Adds `Warning: 299 - "text"` headers.
pub fn warn(response: &mut Response<Body>, warnings: &[String]) {
    let mut seen: Vec<&str> = Vec::new();
    for warning in warnings {
        if seen.contains(&warning.as_str()) {
            continue;
        }
        seen.push(warning);
        let clean: String = warning.chars().filter(|c| !c.is_control()).take(1024).collect();
        let quoted = clean.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_bytes(format!("299 - \"{quoted}\"").as_bytes()) {
            response.headers_mut().append(WARNING, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accept(text: &str) -> Result<Form, u16> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, text.parse().unwrap());
        form(&headers).map_err(|status| status.code)
    }

    #[test]
    fn the_first_form_that_fits_wins() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(accept(kubectl), Ok(Form::Table("v1")));
        assert_eq!(accept("application/vnd.kubernetes.protobuf, application/json"), Ok(Form::Object));
        assert_eq!(accept("application/json;as=Table;v=v9;g=meta.k8s.io, */*;q=0.1"), Ok(Form::Object));
        assert_eq!(accept("application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"), Ok(Form::Partial("v1")));
        assert_eq!(accept("application/vnd.kubernetes.protobuf"), Err(406));
        assert_eq!(accept("text/html"), Err(406));
        assert_eq!(accept("text/html, */*"), Ok(Form::Object));
    }

    #[test]
    fn warnings_are_quoted_and_not_repeated() {
        let mut response = text(StatusCode::OK, "");
        warn(&mut response, &["a \"b\"\n".into(), "a \"b\"\n".into(), "ü".into()]);
        let all: Vec<_> = response.headers().get_all(WARNING).iter().map(|v| v.as_bytes().to_vec()).collect();
        assert_eq!(all, [b"299 - \"a \\\"b\\\"\"".to_vec(), "299 - \"ü\"".as_bytes().to_vec()]);
    }
}
