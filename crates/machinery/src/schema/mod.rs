//! Structural schemas: one description of a kind for validation, pruning, defaults, patches, apply, explain and OpenAPI.

mod change;
mod formats;
mod validate;

pub use change::{apply_defaults, drop_nulls, prune, unknown_fields};
pub use validate::{FieldError, TypeMismatch, type_mismatch, validate};

use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// JSON type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// JSON object.
    Object,
    /// JSON array.
    Array,
    /// JSON string.
    String,
    /// Whole number.
    Integer,
    /// Any number.
    Number,
    /// true or false.
    Boolean,
}

/// How a list is merged (`x-kubernetes-list-type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ListType {
    /// Replaced as a whole.
    #[default]
    Atomic,
    /// Unordered scalars without repetition.
    Set,
    /// Objects identified by [`Schema::list_map_keys`].
    Map,
}

/// A structural schema node. References are resolved while it is built; recursion (JSONSchemaProps) is cut by
/// [`Schema::preserve_unknown`]. Absent means "not constrained".
#[derive(Debug, Clone, Default)]
pub struct Schema {
    /// For `kubectl explain`.
    pub description: Option<String>,
    /// Expected JSON type.
    pub ty: Option<Type>,
    /// Short heading of the node, rarely used.
    pub title: Option<String>,
    /// `int32`, `int64`, `date-time`, `byte` …
    pub format: Option<String>,
    /// Known members of an object.
    pub properties: BTreeMap<String, Arc<Schema>>,
    /// Schema of unknown members (maps).
    pub additional: Option<Arc<Schema>>,
    /// Schema of list items.
    pub items: Option<Arc<Schema>>,
    /// Members that must be present.
    pub required: Vec<String>,
    /// Allowed values.
    pub enumeration: Vec<Value>,
    /// Default value.
    pub default: Option<Value>,
    /// null is a value.
    pub nullable: bool,
    /// Regular expression for strings.
    pub pattern: Option<String>,
    /// Bounds of numbers.
    pub minimum: Option<f64>,
    /// Bounds of numbers.
    pub maximum: Option<f64>,
    /// Bounds of string length.
    pub min_length: Option<u64>,
    /// Bounds of string length.
    pub max_length: Option<u64>,
    /// Bounds of list length.
    pub min_items: Option<u64>,
    /// Bounds of list length.
    pub max_items: Option<u64>,
    /// Bounds of the number of members.
    pub min_properties: Option<u64>,
    /// Bounds of the number of members.
    pub max_properties: Option<u64>,
    /// The number must be a multiple of it.
    pub multiple_of: Option<f64>,
    /// `minimum` itself is not allowed.
    pub exclusive_minimum: bool,
    /// `maximum` itself is not allowed.
    pub exclusive_maximum: bool,
    /// List items must differ.
    pub unique_items: bool,
    /// Value validations that must all hold; they never name new members.
    pub all_of: Vec<Schema>,
    /// Value validations of which one or more must hold.
    pub any_of: Vec<Schema>,
    /// Value validations of which exactly one must hold.
    pub one_of: Vec<Schema>,
    /// A value validation that must not hold.
    pub not: Option<Box<Schema>>,
    /// `x-kubernetes-int-or-string`, also quantities.
    pub int_or_string: bool,
    /// A Kubernetes quantity (`int_or_string` is set as well).
    pub quantity: bool,
    /// `x-kubernetes-preserve-unknown-fields`.
    pub preserve_unknown: bool,
    /// `x-kubernetes-embedded-resource`.
    pub embedded_resource: bool,
    /// Merge behaviour of a list under apply.
    pub list_type: ListType,
    /// Keys when `list_type` is map.
    pub list_map_keys: Vec<String>,
    /// `x-kubernetes-map-type: atomic`.
    pub atomic_map: bool,
    /// Strategic merge key of a list of objects (`x-kubernetes-patch-merge-key`).
    pub patch_merge_key: Option<String>,
    /// Strategic merge strategies: `merge`, `replace`, `retainKeys`.
    pub patch_strategy: Vec<String>,
    /// CEL rules (`x-kubernetes-validations`), kept as written.
    pub validations: Vec<Value>,
    /// Name of the shared definition this node came from, such as `io.k8s.api.core.v1.PodSpec`, for OpenAPI `$ref`s.
    pub definition: Option<String>,
    /// The shared definition's own description, where `description` is the field's.
    pub definition_description: Option<String>,
    /// A whole API object (root or embedded resource): `apiVersion`, `kind` and `metadata` are always known in it.
    pub object_root: bool,
}

impl Type {
    /// As JSON Schema writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Type::Object => "object",
            Type::Array => "array",
            Type::String => "string",
            Type::Integer => "integer",
            Type::Number => "number",
            Type::Boolean => "boolean",
        }
    }

    /// The inverse of [`Type::as_str`].
    pub fn parse(s: &str) -> Option<Type> {
        Some(match s {
            "object" => Type::Object,
            "array" => Type::Array,
            "string" => Type::String,
            "integer" => Type::Integer,
            "number" => Type::Number,
            "boolean" => Type::Boolean,
            _ => return None,
        })
    }
}

impl ListType {
    /// As `x-kubernetes-list-type` writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            ListType::Atomic => "atomic",
            ListType::Set => "set",
            ListType::Map => "map",
        }
    }
}

impl Schema {
    /// Schema of the member `name`: a known property, else that of map values.
    pub fn member(&self, name: &str) -> Option<&Arc<Schema>> {
        self.properties.get(name).or(self.additional.as_ref())
    }

    /// Schema at a path of member names; list items are entered by any number or `*`.
    pub fn at<'a>(&'a self, path: &[&str]) -> Option<&'a Schema> {
        path.iter().try_fold(self, |node, step| {
            node.member(step)
                .or(if step.parse::<usize>().is_ok() || *step == "*" { node.items.as_ref() } else { None })
                .map(Arc::as_ref)
        })
    }
}

#[cfg(test)]
mod tests;
