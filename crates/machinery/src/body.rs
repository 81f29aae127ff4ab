//! Request bodies: JSON and YAML read strictly, with duplicate fields found and depth bounded.

use crate::status::{Cause, Status};
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::cell::RefCell;
use std::fmt;

/// Deepest nesting that is accepted; what answers wrap around an object must stay below serde_json's own limit of 128.
pub const MAX_DEPTH: usize = 100;
/// Kubernetes' limit for a body.
pub const MAX_BYTES: usize = 3 * 1024 * 1024;
/// Media types read here (protobuf is read by [`crate::protobuf`]).
pub const ACCEPTED: [&str; 3] = ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];

const MAX_REPORTED: usize = 100;

/// A body that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// The content; of duplicate fields the last.
    pub value: Value,
    /// Paths of fields that came more than once, such as `metadata.labels.a`.
    pub duplicate_fields: Vec<String>,
}

/// What to do about unknown and duplicate fields (`fieldValidation` in the query).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FieldValidation {
    /// Drop them silently.
    Ignore,
    /// Drop them and warn.
    #[default]
    Warn,
    /// Refuse the request.
    Strict,
}

impl FieldValidation {
    /// Reads the query parameter; `options` is the kind of the options, such as `CreateOptions`, for the error.
    ///
    /// # Errors
    /// 422 Invalid for anything but `Ignore`, `Warn`, `Strict` and empty.
    pub fn parse(text: &str, options: &str) -> Result<FieldValidation, Status> {
        match text {
            "" | "Warn" => Ok(FieldValidation::Warn),
            "Ignore" => Ok(FieldValidation::Ignore),
            "Strict" => Ok(FieldValidation::Strict),
            other => {
                let cause = Cause::not_supported("fieldValidation", &other.into(), &["Ignore", "Strict", "Warn"]);
                Err(Status::invalid("meta.k8s.io", options, "", vec![cause]))
            }
        }
    }

    /// Decides about what was found: the warnings to send.
    ///
    /// # Errors
    /// 400 naming every field, if the mode is Strict and there is one.
    pub fn judge(
        self,
        version: &str,
        kind: &str,
        unknown: &[String],
        duplicate: &[String],
    ) -> Result<Vec<String>, Status> {
        let found = unknown
            .iter()
            .map(|path| format!("unknown field \"{path}\""))
            .chain(duplicate.iter().map(|path| format!("duplicate field \"{path}\"")));
        match self {
            FieldValidation::Ignore => Ok(Vec::new()),
            FieldValidation::Warn => Ok(found.take(MAX_REPORTED).collect()),
            FieldValidation::Strict => {
                let found: Vec<String> = found.take(MAX_REPORTED).collect();
                if found.is_empty() {
                    return Ok(found);
                }
                Err(undecodable(version, kind, &format!("strict decoding error: {}", found.join(", "))))
            }
        }
    }
}

/// 400: `Pod in version "v1" cannot be handled as a Pod: why`. `version` may come with its group, which is not shown.
pub fn undecodable(version: &str, kind: &str, why: &str) -> Status {
    let version = version.rsplit('/').next().unwrap_or_default();
    Status::bad_request(format!("{kind} in version {version:?} cannot be handled as a {kind}: {why}"))
}

/// Media type without parameters, in lower case.
pub fn media_type(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Reads a body by its `Content-Type` (empty: JSON).
///
/// # Errors
/// 413 if it is longer than `limit` bytes, 415 for a media type that is neither JSON nor YAML, 400 if it is malformed,
/// too deep or empty.
pub fn decode(content_type: &str, bytes: &[u8], limit: usize) -> Result<Decoded, Status> {
    if bytes.len() > limit {
        return Err(Status::request_entity_too_large(limit));
    }
    let media = media_type(content_type);
    if media.is_empty() || media == "application/json" || media == "text/json" || media.ends_with("+json") {
        json(bytes)
    } else if media == "application/yaml"
        || media == "text/yaml"
        || media == "application/x-yaml"
        || media.ends_with("+yaml")
    {
        yaml(bytes)
    } else {
        Err(Status::unsupported_media_type(&ACCEPTED))
    }
}

fn json(bytes: &[u8]) -> Result<Decoded, Status> {
    let found = Found::default();
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Node { found: &found, depth: 0 }.deserialize(&mut deserializer);
    match value.and_then(|value| deserializer.end().map(|()| value)) {
        Ok(value) => Ok(Decoded { value, duplicate_fields: found.duplicates.into_inner() }),
        Err(error) => {
            let why = if bytes.iter().all(u8::is_ascii_whitespace) {
                "unexpected end of JSON input".to_owned()
            } else {
                error.to_string()
            };
            Err(Status::bad_request(format!("couldn't get version/kind; json parse error: {why}")))
        }
    }
}

fn yaml(bytes: &[u8]) -> Result<Decoded, Status> {
    // JSON is YAML, and kubectl sends it under this name; its own reader is faster and finds every duplicate.
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{')
        && let Ok(decoded) = json(bytes)
    {
        return Ok(decoded);
    }
    let malformed =
        |error: &dyn fmt::Display| Status::bad_request(format!("error converting YAML to JSON: yaml: {error}"));
    let text = std::str::from_utf8(bytes).map_err(|e| malformed(&e))?;
    let read = |policy: serde_saphyr::DuplicateKeyPolicy| {
        let found = Found::default();
        let mut options = serde_saphyr::Options::default();
        options.duplicate_keys = policy;
        options.with_snippet = false;
        if let Some(budget) = &mut options.budget {
            budget.max_depth = MAX_DEPTH;
            budget.max_documents = 1;
        }
        serde_saphyr::with_deserializer_from_str_with_options(text, options, |deserializer| {
            Node { found: &found, depth: 0 }.deserialize(deserializer)
        })
        .map_err(|error| Box::new((error, found.path.borrow().join("."))))
    };
    match read(serde_saphyr::DuplicateKeyPolicy::Error) {
        Ok(value) => Ok(Decoded { value, duplicate_fields: Vec::new() }),
        Err(failed) => match failed.0.without_snippet() {
            serde_saphyr::Error::DuplicateMappingKey { key, .. } => {
                let key = key.clone().unwrap_or_default();
                let path = &failed.1;
                let field = if path.is_empty() { key } else { format!("{path}.{key}") };
                let value = read(serde_saphyr::DuplicateKeyPolicy::LastWins).map_err(|failed| malformed(&failed.0))?;
                Ok(Decoded { value, duplicate_fields: vec![field] })
            }
            other => Err(malformed(other)),
        },
    }
}

/// Nesting of a value, 1 for a scalar; stops counting above `limit`.
pub fn depth(value: &Value, limit: usize) -> usize {
    if limit == 0 {
        return 1;
    }
    let deepest = match value {
        Value::Object(map) => map.values().map(|v| depth(v, limit - 1)).max(),
        Value::Array(list) => list.iter().map(|v| depth(v, limit - 1)).max(),
        _ => None,
    };
    1 + deepest.unwrap_or(0)
}

/// What is learned on the way through a document.
#[derive(Default)]
struct Found {
    /// Segments from the root to the present node; list indexes are part of the segment before them.
    path: RefCell<Vec<String>>,
    duplicates: RefCell<Vec<String>>,
}

#[derive(Clone, Copy)]
struct Node<'a> {
    found: &'a Found,
    depth: usize,
}

impl Node<'_> {
    fn below<E: de::Error>(self) -> Result<Self, E> {
        if self.depth >= MAX_DEPTH {
            return Err(E::custom("exceeded max depth"));
        }
        Ok(Node { found: self.found, depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let below = self.below()?;
        let before = self.found.path.borrow_mut().pop().unwrap_or_default();
        let mut list = Vec::new();
        loop {
            self.found.path.borrow_mut().push(format!("{before}[{}]", list.len()));
            match items.next_element_seed(below)? {
                Some(value) => list.push(value),
                None => break,
            }
            self.found.path.borrow_mut().pop();
        }
        self.found.path.borrow_mut().pop();
        self.found.path.borrow_mut().push(before);
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let below = self.below()?;
        let mut map = Map::new();
        while let Some(key) = members.next_key_seed(Key)? {
            self.found.path.borrow_mut().push(key.clone());
            let value = members.next_value_seed(below)?;
            if map.insert(key, value).is_some() {
                let mut duplicates = self.found.duplicates.borrow_mut();
                let path = self.found.path.borrow();
                let shown: Vec<&str> = path.iter().map(String::as_str).filter(|p| !p.is_empty()).collect();
                let shown = shown.join(".");
                if duplicates.len() < MAX_REPORTED && !duplicates.contains(&shown) {
                    duplicates.push(shown);
                }
            }
            self.found.path.borrow_mut().pop();
        }
        Ok(Value::Object(map))
    }
}

/// A member's name; YAML's plain numbers and booleans become text.
struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E>(self, value: &str) -> Result<String, E> {
        Ok(value.to_owned())
    }

    fn visit_string<E>(self, value: String) -> Result<String, E> {
        Ok(value)
    }
}

/// Does the object say that it is what the URL says? Missing `apiVersion` and `kind` are filled in when `lenient`
/// (the object comes from a path that fixes its type), refused otherwise.
///
/// # Errors
/// 400 BadRequest.
pub fn check_kind(object: &mut Value, api_version: &str, kind: &str, lenient: bool) -> Result<(), Status> {
    let Some(map) = object.as_object_mut() else {
        return Err(Status::bad_request(
            "couldn't get version/kind; json parse error: cannot unmarshal a value that is not an object",
        ));
    };
    for (key, wanted) in [("kind", kind), ("apiVersion", api_version)] {
        match map.get(key) {
            Some(Value::String(found)) if found == wanted => {}
            Some(Value::String(found)) if !found.is_empty() => {
                let what = if key == "kind" { "kind" } else { "API version" };
                return Err(Status::bad_request(format!(
                    "the {what} in the data ({found}) does not match the expected {what} ({wanted})"
                )));
            }
            None | Some(Value::Null | Value::String(_)) if lenient => {
                map.insert(key.to_owned(), wanted.into());
            }
            None | Some(Value::Null | Value::String(_)) => {
                let shown = if key == "kind" { "Kind" } else { "apiVersion" };
                return Err(Status::bad_request(format!("Object '{shown}' is missing in the body of the request")));
            }
            Some(_) => {
                let why = format!("couldn't get version/kind; json parse error: {key} must be a string");
                return Err(Status::bad_request(why));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(content_type: &str, text: &str) -> Decoded {
        decode(content_type, text.as_bytes(), MAX_BYTES).unwrap()
    }

    #[test]
    fn finds_duplicates() {
        let decoded = read(
            "application/json; charset=utf-8",
            r#"{"a":1,"s":{"c":[{"n":1},{"n":1,"n":2}],"d":[[{"x":1,"x":2}]]},"a":2}"#,
        );
        assert_eq!(decoded.value, json!({"a": 2, "s": {"c": [{"n": 1}, {"n": 2}], "d": [[{"x": 2}]]}}));
        assert_eq!(decoded.duplicate_fields, ["s.c[1].n", "s.d[0][0].x", "a"]);
        let decoded = read("application/yaml", "a: 1\nm:\n  b: 1\n  b: 2\n");
        assert_eq!(decoded.value, json!({"a": 1, "m": {"b": 2}}));
        assert_eq!(decoded.duplicate_fields, ["m.b"]);
    }

    #[test]
    fn reads_yaml() {
        let decoded = read(
            "application/apply-patch+yaml",
            "apiVersion: v1\nspec:\n  a: [1, 2.5, true, null, 'x']\n  1: one\n  big: 18446744073709551615\n  s: |\n    line\n",
        );
        assert_eq!(
            decoded.value,
            json!({"apiVersion": "v1",
                "spec": {"a": [1, 2.5, true, null, "x"], "1": "one", "big": 18446744073709551615u64, "s": "line\n"}})
        );
        assert_eq!(read("application/yaml", " {\"a\": 1}").value, json!({"a": 1}));
        assert_eq!(read("application/yaml", "{a: 1}").value, json!({"a": 1}));
    }

    #[test]
    fn refuses_what_is_malformed() {
        let error = |content_type: &str, text: &str| decode(content_type, text.as_bytes(), 1000).unwrap_err();
        assert_eq!(
            error("application/json", "").message,
            "couldn't get version/kind; json parse error: unexpected end of JSON input"
        );
        assert_eq!(error("application/json", "{").code, 400);
        assert_eq!(error("application/json", "{} x").code, 400);
        assert_eq!(error("application/yaml", "a: [").code, 400);
        assert_eq!(error("application/yaml", "a: 1\n---\nb: 2\n").code, 400);
        assert_eq!(error("text/plain", "{}").code, 415);
        assert_eq!(error("application/json", &"x".repeat(1001)).code, 413);
        let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
        assert_eq!(decode("", deep.as_bytes(), MAX_BYTES).unwrap_err().code, 400);
        assert_eq!(decode("application/yaml", deep.as_bytes(), MAX_BYTES).unwrap_err().code, 400);
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
            d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n\
            g: [*f,*f,*f,*f,*f,*f,*f,*f,*f]\n";
        assert_eq!(decode("application/yaml", bomb.as_bytes(), MAX_BYTES).unwrap_err().code, 400);
    }

    #[test]
    fn judges_fields() {
        let (unknown, duplicate) = (vec!["spec.foo".to_owned()], vec!["a".to_owned()]);
        let status = FieldValidation::Strict.judge("x.io/v1", "Pod", &unknown, &duplicate).unwrap_err();
        assert_eq!(
            (status.code, status.message.as_str()),
            (
                400,
                "Pod in version \"v1\" cannot be handled as a Pod: strict decoding error: unknown field \"spec.foo\", \
                 duplicate field \"a\""
            )
        );
        let warnings = FieldValidation::Warn.judge("v1", "Pod", &unknown, &duplicate).unwrap();
        assert_eq!(warnings, ["unknown field \"spec.foo\"", "duplicate field \"a\""]);
        assert!(FieldValidation::Ignore.judge("v1", "Pod", &unknown, &duplicate).unwrap().is_empty());
        assert_eq!(
            FieldValidation::parse("x", "CreateOptions").unwrap_err().message,
            "CreateOptions.meta.k8s.io \"\" is invalid: fieldValidation: Unsupported value: \"x\": supported values: \
             \"Ignore\", \"Strict\", \"Warn\""
        );
    }

    #[test]
    fn compares_kinds() {
        let mut object = json!({"kind": "Pod"});
        check_kind(&mut object, "v1", "Pod", true).unwrap();
        assert_eq!(object, json!({"kind": "Pod", "apiVersion": "v1"}));
        let status = check_kind(&mut object, "v2", "Pod", true).unwrap_err();
        assert_eq!(status.message, "the API version in the data (v1) does not match the expected API version (v2)");
        assert!(check_kind(&mut json!({}), "v1", "Pod", false).is_err());
        assert!(check_kind(&mut json!([]), "v1", "Pod", true).is_err());
        assert!(check_kind(&mut json!({"kind": 3}), "v1", "Pod", true).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in "[\\{\\}\\[\\]:,\"a-c1-3 \n\\-&*|>!?#%@`']{0,60}") {
            for content_type in ["application/json", "application/yaml"] {
                let _ = decode(content_type, &bytes, MAX_BYTES);
                let _ = decode(content_type, text.as_bytes(), MAX_BYTES);
            }
        }
    }
}
