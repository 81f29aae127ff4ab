//! From a request's body to an object of the kind that the URL names.

use crate::kinds::Kind;
use crate::server::Context;
use bytes::Bytes;
use godwit_machinery::body::{self, FieldValidation, MAX_BYTES};
use godwit_machinery::schema::{self, Schema};
use godwit_machinery::status::Status;
use godwit_machinery::{builtin, protobuf};
use serde_json::{Value, json};

/// Reads the body, whatever its media type: the value and the paths of fields that came twice.
pub(crate) fn read(cx: &Context, bytes: &Bytes) -> Result<(Value, Vec<String>), Status> {
    let content_type = cx.header("content-type");
    if body::media_type(content_type) == protobuf::CONTENT_TYPE {
        return Ok((protobuf::decode_body(bytes)?, Vec::new()));
    }
    let decoded = body::decode(content_type, bytes, MAX_BYTES)?;
    Ok((decoded.value, decoded.duplicate_fields))
}

/// What to do about unknown fields.
pub(crate) fn validation(cx: &Context, options: &str) -> Result<FieldValidation, Status> {
    FieldValidation::parse(cx.params.get("fieldValidation"), options)
}

/// Reads an object of this kind, judges its unknown fields and brings it into shape.
pub(crate) fn object(cx: &Context, kind: &Kind, bytes: &Bytes, options: &str) -> Result<Value, Status> {
    let mode = validation(cx, options)?;
    let (mut object, duplicates) = read(cx, bytes)?;
    body::check_kind(&mut object, &kind.api_version(), &kind.resource.kind, true)?;
    judge(cx, kind, &object, mode, &duplicates)?;
    shape(kind, &mut object)?;
    Ok(object)
}

/// Complains about unknown and duplicate fields as the client asked.
pub(crate) fn judge(
    cx: &Context,
    kind: &Kind,
    object: &Value,
    mode: FieldValidation,
    duplicates: &[String],
) -> Result<(), Status> {
    if mode == FieldValidation::Ignore {
        return Ok(());
    }
    let unknown: Vec<String> = schema::unknown_fields(&kind.resource.schema, object)
        .into_iter()
        .map(|complaint| complaint.trim_start_matches("unknown field ").trim_matches('"').to_owned())
        .collect();
    let api_version = kind.api_version();
    cx.warn(mode.judge(&api_version, &kind.resource.kind, &unknown, duplicates)?);
    Ok(())
}

/// Drops what the kind does not know, fills in what it defaults. For everything that came from outside.
pub(crate) fn shape(kind: &Kind, object: &mut Value) -> Result<(), Status> {
    let resource = &kind.resource;
    if object.get("metadata").is_none_or(Value::is_null)
        && let Some(map) = object.as_object_mut()
    {
        map.insert("metadata".to_owned(), json!({}));
    }
    if resource.builtin
        && let Some(mismatch) = schema::type_mismatch(&resource.schema, object)
    {
        return Err(Status::bad_request(mismatch.message(&kind.api_version(), &resource.kind)));
    }
    if object.get("metadata").is_some_and(|metadata| !metadata.is_object()) {
        return Err(body::undecodable(&kind.api_version(), &resource.kind, "metadata must be an object"));
    }
    schema::prune(&resource.schema, object);
    if resource.builtin {
        builtin::set_defaults(resource, object);
    } else {
        schema::apply_defaults(&resource.schema, object);
    }
    Ok(())
}

/// Reads a body that is not an object of the kind in the URL, such as an Eviction; an empty body is an empty object.
pub(crate) fn other(cx: &Context, bytes: &Bytes, kinds: &[(&str, &str)]) -> Result<Value, Status> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(json!({}));
    }
    let (mut value, _) = read(cx, bytes)?;
    let found = value.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
    let Some((api_version, kind)) = kinds.iter().find(|(_, kind)| *kind == found).or(kinds.first()) else {
        return Ok(value);
    };
    let given = value.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
    if given.is_empty() || !kinds.iter().any(|(v, k)| *v == given && *k == found) {
        body::check_kind(&mut value, api_version, kind, true)?;
    }
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let schema: Option<std::sync::Arc<Schema>> = builtin::body(group, version, kind);
    if let Some(mismatch) = schema.and_then(|schema| schema::type_mismatch(&schema, &value)) {
        return Err(Status::bad_request(mismatch.message(api_version, kind)));
    }
    Ok(value)
}
