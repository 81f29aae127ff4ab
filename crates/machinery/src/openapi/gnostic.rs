//! Swagger 2.0 JSON to gnostic's protobuf (`openapi.v2.Document`). Field numbers are those of gnostic's `OpenAPIv2.proto`;
//! messages and fields that our documents never have are left out.

use prost::Message;
use serde_json::{Map, Value};

#[derive(Clone, PartialEq, Message)]
struct Document {
    #[prost(string, tag = "1")]
    swagger: String,
    #[prost(message, optional, tag = "2")]
    info: Option<Info>,
    #[prost(message, optional, tag = "8")]
    paths: Option<Paths>,
    #[prost(message, optional, tag = "9")]
    definitions: Option<NamedSchemas>,
}

#[derive(Clone, PartialEq, Message)]
struct Info {
    #[prost(string, tag = "1")]
    title: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Paths {
    #[prost(message, repeated, tag = "2")]
    path: Vec<NamedPathItem>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedPathItem {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<PathItem>,
}

#[derive(Clone, PartialEq, Message)]
struct PathItem {
    #[prost(message, optional, tag = "2")]
    get: Option<Operation>,
    #[prost(message, optional, tag = "3")]
    put: Option<Operation>,
    #[prost(message, optional, tag = "4")]
    post: Option<Operation>,
    #[prost(message, optional, tag = "5")]
    delete: Option<Operation>,
    #[prost(message, optional, tag = "8")]
    patch: Option<Operation>,
    #[prost(message, repeated, tag = "9")]
    parameters: Vec<ParametersItem>,
}

#[derive(Clone, PartialEq, Message)]
struct Operation {
    #[prost(string, repeated, tag = "6")]
    produces: Vec<String>,
    #[prost(string, repeated, tag = "7")]
    consumes: Vec<String>,
    #[prost(message, repeated, tag = "8")]
    parameters: Vec<ParametersItem>,
    #[prost(message, optional, tag = "9")]
    responses: Option<Responses>,
    #[prost(message, repeated, tag = "13")]
    vendor_extension: Vec<NamedAny>,
}

#[derive(Clone, PartialEq, Message)]
struct ParametersItem {
    #[prost(message, optional, tag = "1")]
    parameter: Option<Parameter>,
}

/// One of the two.
#[derive(Clone, PartialEq, Message)]
struct Parameter {
    #[prost(message, optional, tag = "1")]
    body: Option<BodyParameter>,
    #[prost(message, optional, tag = "2")]
    non_body: Option<NonBodyParameter>,
}

#[derive(Clone, PartialEq, Message)]
struct BodyParameter {
    #[prost(string, tag = "2")]
    name: String,
    #[prost(string, tag = "3")]
    place: String,
    #[prost(bool, tag = "4")]
    required: bool,
    #[prost(message, optional, tag = "5")]
    schema: Option<Schema>,
}

/// One of the two.
#[derive(Clone, PartialEq, Message)]
struct NonBodyParameter {
    #[prost(message, optional, tag = "3")]
    query: Option<QueryParameter>,
    #[prost(message, optional, tag = "4")]
    path: Option<PathParameter>,
}

#[derive(Clone, PartialEq, Message)]
struct QueryParameter {
    #[prost(bool, tag = "1")]
    required: bool,
    #[prost(string, tag = "2")]
    place: String,
    #[prost(string, tag = "3")]
    description: String,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(string, tag = "6")]
    ty: String,
    #[prost(bool, tag = "20")]
    unique_items: bool,
}

#[derive(Clone, PartialEq, Message)]
struct PathParameter {
    #[prost(bool, tag = "1")]
    required: bool,
    #[prost(string, tag = "2")]
    place: String,
    #[prost(string, tag = "3")]
    description: String,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(string, tag = "5")]
    ty: String,
    #[prost(bool, tag = "19")]
    unique_items: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Responses {
    #[prost(message, repeated, tag = "1")]
    response_code: Vec<NamedResponseValue>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedResponseValue {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<ResponseValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ResponseValue {
    #[prost(message, optional, tag = "1")]
    response: Option<Response>,
}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(string, tag = "1")]
    description: String,
    #[prost(message, optional, tag = "2")]
    schema: Option<SchemaItem>,
}

#[derive(Clone, PartialEq, Message)]
struct SchemaItem {
    #[prost(message, optional, tag = "1")]
    schema: Option<Schema>,
}

#[derive(Clone, PartialEq, Message)]
struct Schema {
    #[prost(string, tag = "1")]
    reference: String,
    #[prost(string, tag = "2")]
    format: String,
    #[prost(string, tag = "3")]
    title: String,
    #[prost(string, tag = "4")]
    description: String,
    #[prost(message, optional, tag = "5")]
    default: Option<Any>,
    #[prost(double, tag = "7")]
    maximum: f64,
    #[prost(double, tag = "9")]
    minimum: f64,
    #[prost(int64, tag = "11")]
    max_length: i64,
    #[prost(int64, tag = "12")]
    min_length: i64,
    #[prost(string, tag = "13")]
    pattern: String,
    #[prost(int64, tag = "14")]
    max_items: i64,
    #[prost(int64, tag = "15")]
    min_items: i64,
    #[prost(bool, tag = "16")]
    unique_items: bool,
    #[prost(string, repeated, tag = "19")]
    required: Vec<String>,
    #[prost(message, repeated, tag = "20")]
    enumeration: Vec<Any>,
    #[prost(message, optional, boxed, tag = "21")]
    additional_properties: Option<Box<AdditionalProperties>>,
    #[prost(message, optional, tag = "22")]
    ty: Option<TypeItem>,
    #[prost(message, optional, tag = "23")]
    items: Option<ItemsItem>,
    #[prost(message, optional, tag = "25")]
    properties: Option<NamedSchemas>,
    #[prost(message, repeated, tag = "31")]
    vendor_extension: Vec<NamedAny>,
}

#[derive(Clone, PartialEq, Message)]
struct AdditionalProperties {
    #[prost(message, optional, boxed, tag = "1")]
    schema: Option<Box<Schema>>,
}

#[derive(Clone, PartialEq, Message)]
struct TypeItem {
    #[prost(string, repeated, tag = "1")]
    value: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct ItemsItem {
    #[prost(message, repeated, tag = "1")]
    schema: Vec<Schema>,
}

/// `Definitions` and `Properties` alike.
#[derive(Clone, PartialEq, Message)]
struct NamedSchemas {
    #[prost(message, repeated, tag = "1")]
    additional_properties: Vec<NamedSchema>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedSchema {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Schema>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedAny {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Any>,
}

/// Anything, as YAML; JSON is YAML.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "2")]
    yaml: String,
}

/// Encodes a Swagger 2.0 document.
pub(super) fn encode(document: &Value) -> Vec<u8> {
    let paths = members(document, "paths").map(|(name, item)| NamedPathItem { name, value: Some(path_item(item)) });
    Document {
        swagger: text(document, "swagger"),
        info: document.get("info").map(|info| Info { title: text(info, "title"), version: text(info, "version") }),
        paths: Some(Paths { path: paths.collect() }),
        definitions: Some(schemas(document, "definitions")),
    }
    .encode_to_vec()
}

fn path_item(raw: &Value) -> PathItem {
    let op = |method: &str| raw.get(method).map(operation);
    PathItem {
        get: op("get"),
        put: op("put"),
        post: op("post"),
        delete: op("delete"),
        patch: op("patch"),
        parameters: parameters(raw),
    }
}

fn operation(raw: &Value) -> Operation {
    let response = |(name, raw): (String, &Value)| {
        let schema = raw.get("schema").map(|raw| SchemaItem { schema: Some(schema(raw)) });
        let response = Response { description: text(raw, "description"), schema };
        NamedResponseValue { name, value: Some(ResponseValue { response: Some(response) }) }
    };
    Operation {
        produces: texts(raw, "produces"),
        consumes: texts(raw, "consumes"),
        parameters: parameters(raw),
        responses: Some(Responses { response_code: members(raw, "responses").map(response).collect() }),
        vendor_extension: extensions(raw),
    }
}

fn parameters(raw: &Value) -> Vec<ParametersItem> {
    let list = raw.get("parameters").and_then(Value::as_array).into_iter().flatten();
    list.map(|raw| ParametersItem { parameter: Some(parameter(raw)) }).collect()
}

fn parameter(raw: &Value) -> Parameter {
    let (place, name, required) = (text(raw, "in"), text(raw, "name"), flag(raw, "required"));
    let (description, ty, unique_items) = (text(raw, "description"), text(raw, "type"), flag(raw, "uniqueItems"));
    let (mut body, mut non_body) = (None, None);
    match place.as_str() {
        "body" => body = Some(BodyParameter { name, place, required, schema: raw.get("schema").map(schema) }),
        "path" => {
            let path = Some(PathParameter { required, place, description, name, ty, unique_items });
            non_body = Some(NonBodyParameter { query: None, path });
        }
        _ => {
            let query = Some(QueryParameter { required, place, description, name, ty, unique_items });
            non_body = Some(NonBodyParameter { query, path: None });
        }
    }
    Parameter { body, non_body }
}

fn schemas(raw: &Value, key: &str) -> NamedSchemas {
    let named = members(raw, key).map(|(name, raw)| NamedSchema { name, value: Some(schema(raw)) });
    NamedSchemas { additional_properties: named.collect() }
}

fn schema(raw: &Value) -> Schema {
    let count = |key: &str| raw.get(key).and_then(Value::as_i64).unwrap_or(0);
    let bound = |key: &str| raw.get(key).and_then(Value::as_f64).unwrap_or(0.0);
    Schema {
        reference: text(raw, "$ref"),
        format: text(raw, "format"),
        title: text(raw, "title"),
        description: text(raw, "description"),
        default: raw.get("default").map(any),
        maximum: bound("maximum"),
        minimum: bound("minimum"),
        max_length: count("maxLength"),
        min_length: count("minLength"),
        pattern: text(raw, "pattern"),
        max_items: count("maxItems"),
        min_items: count("minItems"),
        unique_items: flag(raw, "uniqueItems"),
        required: texts(raw, "required"),
        enumeration: raw.get("enum").and_then(Value::as_array).into_iter().flatten().map(any).collect(),
        additional_properties: raw
            .get("additionalProperties")
            .map(|raw| Box::new(AdditionalProperties { schema: Some(Box::new(schema(raw))) })),
        ty: raw.get("type").and_then(Value::as_str).map(|ty| TypeItem { value: vec![ty.to_owned()] }),
        items: raw.get("items").map(|raw| ItemsItem { schema: vec![schema(raw)] }),
        properties: raw.get("properties").map(|_| schemas(raw, "properties")),
        vendor_extension: extensions(raw),
    }
}

fn extensions(raw: &Value) -> Vec<NamedAny> {
    let map: Option<&Map<String, Value>> = raw.as_object();
    map.into_iter()
        .flatten()
        .filter(|(name, _)| name.starts_with("x-"))
        .map(|(name, value)| NamedAny { name: name.clone(), value: Some(any(value)) })
        .collect()
}

fn any(value: &Value) -> Any {
    Any { yaml: value.to_string() }
}

fn members<'a>(raw: &'a Value, key: &str) -> impl Iterator<Item = (String, &'a Value)> {
    raw.get(key).and_then(Value::as_object).into_iter().flatten().map(|(name, value)| (name.clone(), value))
}

fn text(raw: &Value, key: &str) -> String {
    raw.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn texts(raw: &Value, key: &str) -> Vec<String> {
    let list = raw.get(key).and_then(Value::as_array).into_iter().flatten();
    list.filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

fn flag(raw: &Value, key: &str) -> bool {
    raw.get(key).and_then(Value::as_bool).unwrap_or(false)
}
