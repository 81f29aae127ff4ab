//! From the JSON Schemas that the `k8s-openapi` crate ships to [`Schema`] nodes: references resolved and shared.

use super::merge;
use crate::schema::{Schema, Type};
use schemars::JsonSchema;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Collects the definitions of many types, then resolves them once.
pub(super) struct Definitions {
    generator: SchemaGenerator,
}

impl Definitions {
    pub(super) fn new() -> Definitions {
        Definitions { generator: SchemaSettings::draft07().into_generator() }
    }

    /// Adds a type and everything that it refers to; answers its definition's name.
    pub(super) fn add<T: JsonSchema>(&mut self) -> String {
        let _ = self.generator.subschema_for::<T>();
        T::schema_name().into_owned()
    }

    /// Every definition as a schema, by name.
    pub(super) fn resolve(mut self) -> BTreeMap<String, Arc<Schema>> {
        let raw = self.generator.take_definitions(false);
        let mut resolver = Resolver { raw: &raw, done: BTreeMap::new(), open: BTreeSet::new() };
        for name in raw.keys() {
            resolver.definition(name);
        }
        resolver.done
    }
}

struct Resolver<'a> {
    raw: &'a Map<String, Value>,
    done: BTreeMap<String, Arc<Schema>>,
    open: BTreeSet<String>,
}

impl Resolver<'_> {
    fn definition(&mut self, name: &str) -> Arc<Schema> {
        if let Some(done) = self.done.get(name) {
            return done.clone();
        }
        let raw = self.raw.get(name).unwrap_or(&Value::Null);
        if !self.open.insert(name.to_owned()) {
            // Recursion: cut here; what lies below is not constrained.
            return Arc::new(Schema {
                description: text(raw, "description"),
                definition_description: text(raw, "description"),
                ty: Some(Type::Object),
                preserve_unknown: true,
                definition: Some(name.to_owned()),
                ..Schema::default()
            });
        }
        let mut schema = self.node(raw, Some(name));
        schema.definition = Some(name.to_owned());
        schema.definition_description = schema.description.clone();
        special(name, &mut schema);
        if let Some(root) = schema.properties.get("metadata").and_then(|m| m.definition.as_deref())
            && root.ends_with(".ObjectMeta")
            && schema.properties.contains_key("kind")
        {
            schema.object_root = true;
            // k8s-openapi has it required, Kubernetes' own documents do not.
            schema.required.retain(|field| field != "metadata");
        }
        self.open.remove(name);
        let schema = Arc::new(schema);
        self.done.insert(name.to_owned(), schema.clone());
        schema
    }

    /// A node; `owner` is the definition whose members' merge facts apply.
    fn node(&mut self, raw: &Value, owner: Option<&str>) -> Schema {
        if let Some(target) = raw.get("$ref").and_then(Value::as_str) {
            let name = target.rsplit('/').next().unwrap_or(target);
            let mut schema = Schema::clone(&self.definition(name));
            if let Some(description) = text(raw, "description") {
                schema.description = Some(description);
            }
            return schema;
        }
        let mut schema = Schema {
            description: text(raw, "description"),
            ty: raw.get("type").and_then(Value::as_str).and_then(Type::parse),
            format: text(raw, "format"),
            int_or_string: flag(raw, "x-kubernetes-int-or-string"),
            ..Schema::default()
        };
        if let Some(Value::Object(properties)) = raw.get("properties") {
            for (field, raw) in properties {
                let mut member = self.node(raw, None);
                if let Some(owner) = owner {
                    merge::apply(owner, field, &mut member);
                }
                schema.properties.insert(field.clone(), Arc::new(member));
            }
        }
        schema.additional = match raw.get("additionalProperties") {
            Some(raw @ Value::Object(_)) => Some(Arc::new(self.node(raw, None))),
            Some(Value::Bool(true)) => Some(Arc::new(Schema { preserve_unknown: true, ..Schema::default() })),
            _ => None,
        };
        schema.items = raw.get("items").filter(|r| r.is_object()).map(|raw| Arc::new(self.node(raw, None)));
        if let Some(Value::Array(required)) = raw.get("required") {
            schema.required = required.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect();
        }
        if schema.ty == Some(Type::Object) && schema.properties.is_empty() && schema.additional.is_none() {
            schema.preserve_unknown = true;
        }
        schema
    }
}

/// Definitions whose meaning JSON Schema cannot say.
fn special(name: &str, schema: &mut Schema) {
    let short = name.rsplit('.').next().unwrap_or(name);
    match short {
        "Quantity" => schema.quantity = true,
        // Anything at all; the crate calls some of them objects.
        "JSON" | "JSONSchemaPropsOrArray" | "JSONSchemaPropsOrBool" | "JSONSchemaPropsOrStringArray" => {
            schema.ty = None;
            schema.preserve_unknown = true;
        }
        "RawExtension" => schema.embedded_resource = true,
        _ => {}
    }
    schema.atomic_map |= merge::is_atomic(name);
}

fn text(raw: &Value, key: &str) -> Option<String> {
    raw.get(key).and_then(Value::as_str).map(str::to_owned)
}

fn flag(raw: &Value, key: &str) -> bool {
    raw.get(key).and_then(Value::as_bool).unwrap_or(false)
}
