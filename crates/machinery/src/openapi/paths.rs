//! The operations of a resource: those that clients look for, with the parameters that they look for.

use super::definition_name;
use super::emit::{Flavour, gvk};
use crate::resource::{GroupVersion, Resource};
use serde_json::{Map, Value, json};

const JSON: &str = "application/json";
/// What built-in kinds can be patched with.
const PATCHES: &[&str] = &[
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];
/// What custom resources can be patched with.
const CUSTOM_PATCHES: &[&str] =
    &["application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml"];

/// Adds the paths of one resource.
pub(super) fn add(resource: &Resource, flavour: Flavour, paths: &mut Map<String, Value>) {
    if resource.actions_only {
        return actions(resource, flavour, paths);
    }
    let scope = if resource.namespaced { "/namespaces/{namespace}" } else { "" };
    let base = format!("/{}{scope}/{}", resource.gv.path(), resource.plural);
    let own = Target { gv: &resource.gv, kind: &resource.kind, definition: definition_name(resource) };
    let op = |verb: &str, target: &Target<'_>| operation(resource, verb, target, flavour);
    let parameters = |names: &[&str]| -> Vec<Value> { names.iter().map(|n| path_parameter(n, flavour)).collect() };
    let in_namespace: &[&str] = if resource.namespaced { &["namespace"] } else { &[] };
    let of_item: &[&str] = if resource.namespaced { &["name", "namespace"] } else { &["name"] };

    let mut collection = Map::new();
    collection.insert("post".into(), op("post", &own));
    if !resource.virtual_create_only {
        collection.insert("get".into(), op("list", &own));
        collection.insert("delete".into(), op("deletecollection", &own));
    }
    collection.insert("parameters".into(), json!(parameters(in_namespace)));
    paths.insert(base.clone(), Value::Object(collection));
    if resource.virtual_create_only {
        return;
    }
    if resource.namespaced {
        // All namespaces at once.
        let all = json!({"get": op("list", &own), "parameters": []});
        paths.insert(format!("/{}/{}", resource.gv.path(), resource.plural), all);
    }
    let mut item = Map::new();
    for verb in ["get", "put", "patch", "delete"] {
        item.insert(verb.into(), op(verb, &own));
    }
    item.insert("parameters".into(), json!(parameters(of_item)));
    paths.insert(format!("{base}/{{name}}"), Value::Object(item));

    for sub in crate::discovery::subresources(resource) {
        let body = crate::builtin::body(&sub.gv.group, &sub.gv.version, sub.kind);
        let definition = body.and_then(|s| s.definition.clone()).unwrap_or_else(|| own.definition.clone());
        let target = Target { gv: &sub.gv, kind: sub.kind, definition };
        let mut item = Map::new();
        for verb in sub.verbs {
            let method = match *verb {
                "create" => "post",
                "update" => "put",
                other => other,
            };
            item.insert(method.into(), op(method, &target));
        }
        item.insert("parameters".into(), json!(parameters(of_item)));
        paths.insert(format!("{base}/{{name}}/{}", sub.name), Value::Object(item));
    }
}

/// What is done to objects of another group. What such a request has in it and what is answered, no definition says.
fn actions(resource: &Resource, flavour: Flavour, paths: &mut Map<String, Value>) {
    let base = format!("/{}/namespaces/{{namespace}}/{}/{{name}}", resource.gv.path(), resource.plural);
    for sub in crate::discovery::subresources(resource) {
        let mut item = Map::new();
        for verb in sub.verbs {
            let method = if *verb == "get" { "get" } else { "put" };
            let mut op = json!({
                "responses": {"200": {"description": "OK"}},
                "x-kubernetes-action": method,
                "x-kubernetes-group-version-kind": gvk(&sub.gv, sub.kind),
            });
            if flavour == Flavour::V2 {
                op["consumes"] = json!(["*/*"]);
                op["produces"] = json!([JSON]);
            }
            item.insert(method.into(), op);
        }
        let parameters = ["name", "namespace"].map(|name| path_parameter(name, flavour));
        item.insert("parameters".into(), json!(parameters));
        paths.insert(format!("{base}/{}", sub.name), Value::Object(item));
    }
}

struct Target<'a> {
    gv: &'a GroupVersion,
    kind: &'a str,
    definition: String,
}

/// One operation. `verb` is an HTTP method, `list` or `deletecollection`.
fn operation(resource: &Resource, verb: &str, target: &Target<'_>, flavour: Flavour) -> Value {
    let writes = matches!(verb, "post" | "put" | "patch");
    let mut parameters: Vec<Value> = Vec::new();
    let mut query = |name: &str, ty: &str, about: &str| parameters.push(parameter("query", name, ty, about, flavour));
    if writes || verb == "delete" {
        query("dryRun", "string", "When present, indicates that modifications should not be persisted. Valid: All");
    }
    if writes {
        query("fieldManager", "string", "The actor or entity that is making these changes");
        query("fieldValidation", "string", "How unknown and duplicate fields are handled: Ignore, Warn or Strict");
    }
    if verb == "patch" {
        query("force", "boolean", "Take over fields that other managers own. Apply patches only");
    }
    if matches!(verb, "list" | "deletecollection") {
        for (name, ty) in [
            ("labelSelector", "string"),
            ("fieldSelector", "string"),
            ("limit", "integer"),
            ("continue", "string"),
            ("resourceVersion", "string"),
            ("resourceVersionMatch", "string"),
        ] {
            query(name, ty, "");
        }
    }
    if verb == "list" {
        for (name, ty) in [
            ("watch", "boolean"),
            ("allowWatchBookmarks", "boolean"),
            ("sendInitialEvents", "boolean"),
            ("timeoutSeconds", "integer"),
        ] {
            query(name, ty, "");
        }
    }
    let schema = json!({"$ref": flavour.reference(&target.definition)});
    let patches = if resource.builtin { PATCHES } else { CUSTOM_PATCHES };
    // A patch may be of any shape.
    let (kinds, body): (&[&str], Value) = match verb {
        "patch" => (patches, json!({"type": "object"})),
        _ => (&[JSON], schema.clone()),
    };
    let answer = match verb {
        "deletecollection" | "list" => json!({"type": "object"}),
        _ => schema,
    };
    let mut op = Map::new();
    match flavour {
        Flavour::V3 => {
            if writes {
                let content: Map<String, Value> =
                    kinds.iter().map(|kind| ((*kind).to_owned(), json!({"schema": body}))).collect();
                op.insert("requestBody".into(), json!({"content": content, "required": true}));
            }
            let ok = json!({"200": {"description": "OK", "content": {JSON: {"schema": answer}}}});
            op.insert("responses".into(), ok);
        }
        Flavour::V2 => {
            if writes {
                parameters.push(json!({"name": "body", "in": "body", "required": true, "schema": body}));
            }
            op.insert("consumes".into(), json!(if writes { kinds } else { &["*/*"] }));
            op.insert("produces".into(), json!([JSON]));
            op.insert("responses".into(), json!({"200": {"description": "OK", "schema": answer}}));
        }
    }
    op.insert("parameters".into(), Value::Array(parameters));
    op.insert("x-kubernetes-action".into(), json!(verb));
    op.insert("x-kubernetes-group-version-kind".into(), gvk(target.gv, target.kind));
    Value::Object(op)
}

fn path_parameter(name: &str, flavour: Flavour) -> Value {
    let mut parameter = parameter("path", name, "string", "", flavour);
    parameter["required"] = json!(true);
    parameter
}

fn parameter(place: &str, name: &str, ty: &str, about: &str, flavour: Flavour) -> Value {
    let mut value = json!({"name": name, "in": place});
    match flavour {
        Flavour::V3 => value["schema"] = json!({"type": ty, "uniqueItems": true}),
        Flavour::V2 => {
            value["type"] = json!(ty);
            value["uniqueItems"] = json!(true);
        }
    }
    if !about.is_empty() {
        value["description"] = json!(about);
    }
    value
}
