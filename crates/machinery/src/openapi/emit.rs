//! [`Schema`] to JSON Schema as Kubernetes' documents write it, with shared definitions.

use super::definition_name;
use crate::builtin;
use crate::resource::{GroupVersion, Resource};
use crate::schema::{ListType, Schema, Type};
use serde_json::{Map, Value, json};

/// Which OpenAPI: they differ in where definitions live, and in what can be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flavour {
    V2,
    V3,
}

impl Flavour {
    pub(super) fn reference(self, name: &str) -> String {
        match self {
            Flavour::V2 => format!("#/definitions/{name}"),
            Flavour::V3 => format!("#/components/schemas/{name}"),
        }
    }
}

pub(super) struct Emitter {
    flavour: Flavour,
    definitions: Map<String, Value>,
}

impl Emitter {
    pub(super) fn new(flavour: Flavour) -> Emitter {
        Emitter { flavour, definitions: Map::new() }
    }

    pub(super) fn finish(self) -> Map<String, Value> {
        self.definitions
    }

    /// Adds a resource's own definition, its list's, those of its subresources' bodies, and all that they refer to.
    pub(super) fn resource(&mut self, resource: &Resource) {
        let name = definition_name(resource);
        let mut value = self.body(&resource.schema);
        if let Some(description) =
            resource.schema.definition_description.as_ref().or(resource.schema.description.as_ref())
        {
            value["description"] = json!(description);
        }
        value["x-kubernetes-group-version-kind"] = json!([gvk(&resource.gv, &resource.kind)]);
        self.definitions.insert(name.clone(), value);
        for sub in crate::discovery::subresources(resource) {
            if let Some(schema) = builtin::body(&sub.gv.group, &sub.gv.version, sub.kind)
                && let Some(body) = &schema.definition
                && *body != name
            {
                let mut value = self.body(&schema);
                value["x-kubernetes-group-version-kind"] = json!([gvk(&sub.gv, sub.kind)]);
                self.definitions.insert(body.clone(), value);
            }
        }
        if !resource.virtual_create_only {
            self.list(resource, &name);
        }
    }

    fn list(&mut self, resource: &Resource, item: &str) {
        let metadata = builtin::definition("io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta").unwrap_or_default();
        let metadata = self.node(&metadata);
        let base = definition_name(resource);
        let name = match base.rsplit_once('.') {
            Some((package, _)) => format!("{package}.{}", resource.list_kind),
            None => resource.list_kind.clone(),
        };
        let value = json!({
            "type": "object", "required": ["items"],
            "description": format!("{} is a list of {}", resource.list_kind, resource.kind),
            "properties": {
                "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": metadata,
                "items": {"type": "array", "items": {"$ref": self.flavour.reference(item)}},
            },
            "x-kubernetes-group-version-kind": [gvk(&resource.gv, &resource.list_kind)],
        });
        self.definitions.insert(name, value);
    }

    /// A node in place: a reference if it is a shared definition.
    fn node(&mut self, schema: &Schema) -> Value {
        let Some(name) = &schema.definition else { return self.body(schema) };
        if !self.definitions.contains_key(name) {
            // Stands for itself while its members are written, which may refer back to it.
            self.definitions.insert(name.clone(), Value::Null);
            let shared = builtin::definition(name);
            let whole = shared.as_deref().unwrap_or(schema);
            let mut value = self.body(whole);
            if let Some(description) = &whole.definition_description {
                value["description"] = json!(description);
            }
            self.definitions.insert(name.clone(), value);
        }
        let reference = json!({"$ref": self.flavour.reference(name)});
        let own = schema.description.as_ref().filter(|d| Some(*d) != schema.definition_description.as_ref());
        let Some(own) = own else { return reference };
        match self.flavour {
            // Nothing may stand beside a v3 reference.
            Flavour::V3 => json!({"description": own, "allOf": [reference]}),
            Flavour::V2 => {
                let mut reference = reference;
                reference["description"] = json!(own);
                reference
            }
        }
    }

    /// The node itself.
    fn body(&mut self, schema: &Schema) -> Value {
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| {
            out.insert(key.to_owned(), value);
        };
        if let Some(text) = &schema.description {
            put("description", json!(text));
        }
        if let Some(text) = &schema.title {
            put("title", json!(text));
        }
        if schema.definition.is_some() && schema.int_or_string {
            self.int_or_string(schema, &mut out);
            return Value::Object(out);
        }
        let v2 = self.flavour == Flavour::V2;
        // Older clients refuse null and unknown members wherever they know a type.
        let untyped = v2 && (schema.nullable || (schema.preserve_unknown && schema.definition.is_none()));
        if let Some(ty) = schema.ty.filter(|_| !schema.int_or_string && !untyped) {
            put("type", json!(ty.as_str()));
        }
        for (key, value) in [("format", &schema.format), ("pattern", &schema.pattern)] {
            if let Some(value) = value {
                put(key, json!(value));
            }
        }
        for (key, value) in [
            ("minLength", schema.min_length),
            ("maxLength", schema.max_length),
            ("minItems", schema.min_items),
            ("maxItems", schema.max_items),
            ("minProperties", schema.min_properties),
            ("maxProperties", schema.max_properties),
        ] {
            if let Some(value) = value {
                put(key, json!(value));
            }
        }
        for (key, value) in
            [("minimum", schema.minimum), ("maximum", schema.maximum), ("multipleOf", schema.multiple_of)]
        {
            if let Some(value) = value {
                put(key, number(value));
            }
        }
        for (key, value) in [
            ("exclusiveMinimum", schema.exclusive_minimum),
            ("exclusiveMaximum", schema.exclusive_maximum),
            ("uniqueItems", schema.unique_items),
            ("nullable", schema.nullable && !v2),
            ("x-kubernetes-int-or-string", schema.int_or_string),
            ("x-kubernetes-preserve-unknown-fields", schema.preserve_unknown && schema.definition.is_none()),
            ("x-kubernetes-embedded-resource", schema.embedded_resource && schema.definition.is_none()),
        ] {
            if value {
                put(key, json!(true));
            }
        }
        if !schema.enumeration.is_empty() {
            put("enum", json!(schema.enumeration));
        }
        if let Some(default) = &schema.default {
            put("default", default.clone());
        }
        if !schema.required.is_empty() {
            put("required", json!(schema.required));
        }
        merge_extensions(schema, &mut put);
        if !(untyped && schema.preserve_unknown) {
            self.members(schema, &mut out);
        }
        if !v2 {
            self.junctors(schema, &mut out);
        }
        Value::Object(out)
    }

    fn int_or_string(&self, schema: &Schema, out: &mut Map<String, Value>) {
        match (self.flavour, schema.quantity) {
            (Flavour::V2, true) => {
                out.insert("type".into(), json!("string"));
            }
            (Flavour::V2, false) => {
                out.insert("type".into(), json!("string"));
                out.insert("format".into(), json!("int-or-string"));
            }
            (Flavour::V3, true) => {
                out.insert("oneOf".into(), json!([{"type": "string"}, {"type": "number"}]));
            }
            (Flavour::V3, false) => {
                out.insert("oneOf".into(), json!([{"type": "integer"}, {"type": "string"}]));
                out.insert("format".into(), json!("int-or-string"));
            }
        }
    }

    fn members(&mut self, schema: &Schema, out: &mut Map<String, Value>) {
        if !schema.properties.is_empty() {
            let members = schema.properties.iter().map(|(name, member)| (name.clone(), self.node(member))).collect();
            out.insert("properties".into(), Value::Object(members));
        }
        if let Some(additional) = &schema.additional {
            let value = self.node(additional);
            out.insert("additionalProperties".into(), value);
        }
        if let Some(items) = &schema.items {
            let value = self.node(items);
            out.insert("items".into(), value);
        } else if schema.ty == Some(Type::Array) && out.contains_key("type") {
            out.insert("items".into(), json!({}));
        }
    }

    fn junctors(&mut self, schema: &Schema, out: &mut Map<String, Value>) {
        for (key, parts) in [("allOf", &schema.all_of), ("anyOf", &schema.any_of), ("oneOf", &schema.one_of)] {
            if !parts.is_empty() {
                let parts: Vec<Value> = parts.iter().map(|part| self.body(part)).collect();
                out.insert(key.into(), Value::Array(parts));
            }
        }
        if let Some(part) = &schema.not {
            let part = self.body(part);
            out.insert("not".into(), part);
        }
        if !schema.validations.is_empty() {
            out.insert("x-kubernetes-validations".into(), json!(schema.validations));
        }
    }
}

fn merge_extensions(schema: &Schema, put: &mut impl FnMut(&str, Value)) {
    if schema.list_type != ListType::Atomic {
        put("x-kubernetes-list-type", json!(schema.list_type.as_str()));
    }
    if !schema.list_map_keys.is_empty() {
        put("x-kubernetes-list-map-keys", json!(schema.list_map_keys));
    }
    if schema.atomic_map {
        put("x-kubernetes-map-type", json!("atomic"));
    }
    if let Some(key) = &schema.patch_merge_key {
        put("x-kubernetes-patch-merge-key", json!(key));
    }
    if !schema.patch_strategy.is_empty() {
        put("x-kubernetes-patch-strategy", json!(schema.patch_strategy.join(",")));
    }
}

/// Whole numbers without `.0`.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

/// The value of `x-kubernetes-group-version-kind`.
pub(super) fn gvk(gv: &GroupVersion, kind: &str) -> Value {
    json!({"group": gv.group, "version": gv.version, "kind": kind})
}
