//! Request bodies of content type `application/vnd.kubernetes.protobuf`, decoded into the JSON that they stand for.
//!
//! kubectl sends them from 1.32 on for the kinds that it creates typed, and does not fall back to JSON when refused.
//! Answers may stay JSON. Driven by a table of field numbers, see `tables`.

mod tables;
mod wire;

use crate::status::Status;
use base64::Engine as _;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::LazyLock;
use wire::{Fields, Malformed, Wire};

/// The content type that this module reads.
pub const CONTENT_TYPE: &str = "application/vnd.kubernetes.protobuf";

/// What every body starts with.
const MAGIC: &[u8] = b"k8s\0";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scalar {
    Text,
    Bool,
    Int,
    Bytes,
    Json,
    Quantity,
    IntOrString,
    Time,
    MicroTime,
    Skip,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Scalar(Scalar),
    Message(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// Absent when zero or empty.
    Plain,
    /// Present when on the wire.
    Pointer,
    List,
    Map,
}

#[derive(Debug, Clone)]
struct Field {
    name: String,
    kind: Kind,
    shape: Shape,
}

type Message = BTreeMap<u64, Field>;

/// Messages by name, by `group/version`.
static MESSAGES: LazyLock<BTreeMap<&'static str, BTreeMap<&'static str, Message>>> = LazyLock::new(|| {
    let mut messages: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    for (group, table) in tables::TABLES {
        for line in table.lines() {
            let mut words = line.split_whitespace();
            if let Some(name) = words.next() {
                messages.entry(*group).or_default().insert(name, words.filter_map(field).collect());
            }
        }
    }
    messages
});

fn field(word: &str) -> Option<(u64, Field)> {
    let (name, rest) = word.split_once(':')?;
    let (ty, number) = rest.split_once('=')?;
    let (shape, ty) = if let Some(ty) = ty.strip_prefix("[]") {
        (Shape::List, ty)
    } else if let Some(ty) = ty.strip_prefix("{}") {
        (Shape::Map, ty)
    } else if let Some(ty) = ty.strip_prefix('*') {
        (Shape::Pointer, ty)
    } else {
        (Shape::Plain, ty)
    };
    let kind = match ty {
        "string" => Kind::Scalar(Scalar::Text),
        "bool" => Kind::Scalar(Scalar::Bool),
        "int" => Kind::Scalar(Scalar::Int),
        "bytes" => Kind::Scalar(Scalar::Bytes),
        "json" => Kind::Scalar(Scalar::Json),
        "quantity" => Kind::Scalar(Scalar::Quantity),
        "port" => Kind::Scalar(Scalar::IntOrString),
        "time" => Kind::Scalar(Scalar::Time),
        "microtime" => Kind::Scalar(Scalar::MicroTime),
        "skip" => Kind::Scalar(Scalar::Skip),
        message => Kind::Message(message.to_owned()),
    };
    Some((number.parse().ok()?, Field { name: name.to_owned(), kind, shape }))
}

/// A message of this group version, or the one of that name that all groups share.
fn message(group: &str, name: &str) -> Option<(&'static str, &'static Message)> {
    [group, "meta/v1"].into_iter().find_map(|group| {
        let (group, messages) = MESSAGES.get_key_value(group)?;
        Some((*group, messages.get(name)?))
    })
}

/// Decodes a request body into the object that it stands for, `apiVersion` and `kind` included.
///
/// # Errors
/// 400 BadRequest if the bytes are not such a body or use a field that this server does not know; 415
/// UnsupportedMediaType if the kind can only be sent as JSON here. Both say which.
pub fn decode_body(bytes: &[u8]) -> Result<Value, Status> {
    let bad =
        |why: String| Status::bad_request(format!("the request body is not a Kubernetes protobuf message: {why}"));
    let envelope = bytes.strip_prefix(MAGIC).ok_or_else(|| bad("it does not begin with \"k8s\\0\"".into()))?;
    let envelope = Envelope::read(envelope).map_err(|e| bad(e.to_string()))?;
    let (api_version, kind) = (envelope.api_version, envelope.kind);
    if !matches!(envelope.content_type, "" | "application/vnd.kubernetes.protobuf") || !envelope.encoding.is_empty() {
        return Err(bad(format!("its content is {} {}", envelope.content_type, envelope.encoding)));
    }
    let Some((group, table)) = message(api_version, kind) else {
        let name = if kind.is_empty() { "an object without a kind".into() } else { format!("{api_version} {kind}") };
        return Err(Status::new(
            415,
            "UnsupportedMediaType",
            format!("{name} cannot be sent as {CONTENT_TYPE} to this server; send application/json"),
        ));
    };
    let mut out = Map::new();
    out.insert("apiVersion".into(), json!(api_version));
    out.insert("kind".into(), json!(kind));
    let mut decoder = Decoder { path: vec![kind.to_owned()] };
    match decoder.message(group, table, envelope.raw, &mut out) {
        Ok(()) => Ok(Value::Object(out)),
        Err(Trouble::Malformed(e)) => Err(bad(format!("{}: {e}", decoder.path.join(".")))),
        Err(Trouble::Unknown(number)) => Err(Status::bad_request(format!(
            "field {number} of {} in a {CONTENT_TYPE} body is not known to this server; send application/json",
            decoder.path.join(".")
        ))),
    }
}

/// `runtime.Unknown`.
#[derive(Default)]
struct Envelope<'a> {
    api_version: &'a str,
    kind: &'a str,
    raw: &'a [u8],
    encoding: &'a str,
    content_type: &'a str,
}

impl<'a> Envelope<'a> {
    fn read(bytes: &'a [u8]) -> Result<Envelope<'a>, Malformed> {
        let mut envelope = Envelope::default();
        let mut fields = Fields::of(bytes);
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => {
                    let mut meta = Fields::of(value.bytes()?);
                    while let Some((number, value)) = meta.next()? {
                        match number {
                            1 => envelope.api_version = value.text()?,
                            2 => envelope.kind = value.text()?,
                            _ => {}
                        }
                    }
                }
                2 => envelope.raw = value.bytes()?,
                3 => envelope.encoding = value.text()?,
                4 => envelope.content_type = value.text()?,
                _ => {}
            }
        }
        Ok(envelope)
    }
}

enum Trouble {
    Malformed(Malformed),
    Unknown(u64),
}

impl From<Malformed> for Trouble {
    fn from(e: Malformed) -> Self {
        Trouble::Malformed(e)
    }
}

struct Decoder {
    /// Where we are, for error messages; left standing at the place of an error.
    path: Vec<String>,
}

impl Decoder {
    fn message(
        &mut self,
        group: &str,
        table: &Message,
        bytes: &[u8],
        out: &mut Map<String, Value>,
    ) -> Result<(), Trouble> {
        let mut fields = Fields::of(bytes);
        while let Some((number, wire)) = fields.next()? {
            let field = table.get(&number).ok_or(Trouble::Unknown(number))?;
            if field.name == "-" {
                // Inlined in Go: its members are ours.
                if let Kind::Message(name) = &field.kind
                    && let Some((group, table)) = message(group, name)
                {
                    self.message(group, table, wire.bytes()?, out)?;
                }
                continue;
            }
            self.path.push(field.name.clone());
            self.field(group, field, wire, out)?;
            self.path.pop();
        }
        Ok(())
    }

    fn field(
        &mut self,
        group: &str,
        field: &Field,
        wire: Wire<'_>,
        out: &mut Map<String, Value>,
    ) -> Result<(), Trouble> {
        match field.shape {
            Shape::Plain => {
                if let Some(value) = self.value(group, &field.kind, wire)?.filter(|v| !is_zero(&field.kind, v)) {
                    out.insert(field.name.clone(), value);
                }
            }
            Shape::Pointer => {
                if let Some(value) = self.value(group, &field.kind, wire)? {
                    out.insert(field.name.clone(), value);
                }
            }
            Shape::List => {
                let value = self.value(group, &field.kind, wire)?;
                let list = out.entry(field.name.clone()).or_insert_with(|| json!([]));
                if let (Value::Array(list), Some(value)) = (list, value) {
                    list.push(value);
                }
            }
            Shape::Map => {
                let mut entry = Fields::of(wire.bytes()?);
                let (mut key, mut value) = (String::new(), None);
                while let Some((number, wire)) = entry.next()? {
                    match number {
                        1 => key = wire.text()?.to_owned(),
                        2 => value = self.value(group, &field.kind, wire)?,
                        _ => {}
                    }
                }
                let value = value.unwrap_or_else(|| Value::from(""));
                if let Value::Object(map) = out.entry(field.name.clone()).or_insert_with(|| json!({})) {
                    map.insert(key, value);
                }
            }
        }
        Ok(())
    }

    /// The value of one occurrence; `None`: there is none (a zero time).
    fn value(&mut self, group: &str, kind: &Kind, wire: Wire<'_>) -> Result<Option<Value>, Trouble> {
        Ok(Some(match kind {
            Kind::Message(name) => {
                let mut out = Map::new();
                if let Some((group, table)) = message(group, name) {
                    self.message(group, table, wire.bytes()?, &mut out)?;
                }
                // A message that is nothing but a list in JSON.
                match out.remove(".") {
                    Some(list) => list,
                    None => Value::Object(out),
                }
            }
            Kind::Scalar(scalar) => return Ok(scalar_value(*scalar, wire)?),
        }))
    }
}

fn is_zero(kind: &Kind, value: &Value) -> bool {
    match value {
        Value::String(s) => s.is_empty(),
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_i64() == Some(0),
        // Value structs that were never filled in.
        Value::Object(map) => map.is_empty() && matches!(kind, Kind::Message(_)),
        _ => false,
    }
}

fn scalar_value(scalar: Scalar, wire: Wire<'_>) -> Result<Option<Value>, Malformed> {
    Ok(Some(match scalar {
        Scalar::Text => Value::from(wire.text()?),
        Scalar::Bool => Value::Bool(wire.varint()? != 0),
        // Negative numbers stand as their two's complement.
        Scalar::Int => Value::from(wire.varint()?.cast_signed()),
        Scalar::Bytes => Value::from(base64::engine::general_purpose::STANDARD.encode(wire.bytes()?)),
        Scalar::Json => {
            let mut raw: &[u8] = &[];
            let mut fields = Fields::of(wire.bytes()?);
            while let Some((number, value)) = fields.next()? {
                if number == 1 {
                    raw = value.bytes()?;
                }
            }
            serde_json::from_slice(raw).map_err(|_| Malformed::Json)?
        }
        Scalar::Quantity => {
            let mut text = "0";
            let mut fields = Fields::of(wire.bytes()?);
            while let Some((number, value)) = fields.next()? {
                if number == 1 {
                    text = value.text()?;
                }
            }
            Value::from(text)
        }
        Scalar::IntOrString => int_or_string(wire.bytes()?)?,
        Scalar::Time => return time(wire.bytes()?, 0),
        Scalar::MicroTime => return time(wire.bytes()?, 6),
        Scalar::Skip => {
            wire.bytes()?;
            return Ok(None);
        }
    }))
}

fn int_or_string(bytes: &[u8]) -> Result<Value, Malformed> {
    let (mut is_text, mut int, mut text) = (false, 0, "");
    let mut fields = Fields::of(bytes);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => is_text = value.varint()? == 1,
            2 => int = value.varint()?.cast_signed(),
            3 => text = value.text()?,
            _ => {}
        }
    }
    Ok(if is_text { Value::from(text) } else { Value::from(int) })
}

/// RFC 3339 with so many digits after the second; the empty message is Go's zero time, which JSON writes as null.
fn time(bytes: &[u8], digits: usize) -> Result<Option<Value>, Malformed> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let (mut seconds, mut nanos) = (0i64, 0i64);
    let mut fields = Fields::of(bytes);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => seconds = value.varint()?.cast_signed(),
            2 => nanos = value.varint()?.cast_signed(),
            _ => {}
        }
    }
    let nanos = i32::try_from(nanos).map_err(|_| Malformed::Time)?;
    let stamp = jiff::Timestamp::new(seconds, nanos).map_err(|_| Malformed::Time)?;
    Ok(Some(Value::from(match digits {
        0 => stamp.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        _ => stamp.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string(),
    })))
}

#[cfg(test)]
mod tests;
