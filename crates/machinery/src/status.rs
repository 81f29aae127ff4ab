//! `meta/v1 Status`: the one error type that clients of the API see.

use serde::{Deserialize, Serialize};

mod build;
mod causes;

pub use build::{Attributes, PAGE_NOT_FOUND, success};

/// An API failure as Kubernetes clients expect it (`kind: Status`, `apiVersion: v1`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable reason, such as `NotFound`, `Conflict`, `Invalid`.
    pub reason: String,
    /// A sentence for a person.
    pub message: String,
    /// What it is about and why, if there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Box<Details>>,
    /// `metadata.continue`: with 410 Expired for a list, a token with which the rest can still be had, inconsistently.
    #[serde(default, skip_serializing_if = "String::is_empty", rename = "continue")]
    pub continue_token: String,
}

/// The object a [`Status`] is about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Details {
    /// Object name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// API group, empty for core.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// Kind or, as Kubernetes often has it, plural resource.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// Object UID.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// Single causes, a line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    /// After how many seconds a retry makes sense; 0 = not said.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retry_after_seconds: u32,
}

/// One cause of an `Invalid` or similar answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// Such as `FieldValueRequired`, `FieldValueInvalid`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// For a person.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// JSON path of the field.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub field: String,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Status {}
