//! Structural schemas: one description of a kind for validation, pruning, defaults, patches, apply, explain and OpenAPI.

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
    /// `x-kubernetes-int-or-string`, also quantities.
    pub int_or_string: bool,
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
}
