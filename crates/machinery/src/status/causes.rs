//! Causes of `Invalid`, with the wording of Kubernetes' field errors.

use super::Cause;
use serde_json::Value;

/// A value as Kubernetes prints it in field errors: JSON, with strings quoted.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    const LONGEST: usize = 10_000;
    if text.len() <= LONGEST {
        return text;
    }
    let mut end = LONGEST;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

fn joined(head: String, detail: &str) -> String {
    if detail.is_empty() { head } else { format!("{head}: {detail}") }
}

impl Cause {
    fn of(reason: &str, field: impl Into<String>, message: String) -> Cause {
        Cause { reason: reason.to_owned(), message, field: field.into() }
    }

    /// `Required value: detail`
    pub fn required(field: impl Into<String>, detail: &str) -> Cause {
        Cause::of("FieldValueRequired", field, joined("Required value".to_owned(), detail))
    }

    /// `Invalid value: "x": detail`
    pub fn invalid(field: impl Into<String>, value: &Value, detail: &str) -> Cause {
        Cause::of("FieldValueInvalid", field, joined(format!("Invalid value: {}", shown(value)), detail))
    }

    /// Wrong JSON type; printed like [`Cause::invalid`].
    pub fn type_invalid(field: impl Into<String>, value: &Value, detail: &str) -> Cause {
        Cause::of("FieldValueTypeInvalid", field, joined(format!("Invalid value: {}", shown(value)), detail))
    }

    /// `Unsupported value: "x": supported values: "a", "b"`
    pub fn not_supported<S: AsRef<str>>(field: impl Into<String>, value: &Value, supported: &[S]) -> Cause {
        let list: Vec<String> = supported.iter().map(|s| format!("{:?}", s.as_ref())).collect();
        let detail = if list.is_empty() { String::new() } else { format!("supported values: {}", list.join(", ")) };
        Cause::of("FieldValueNotSupported", field, joined(format!("Unsupported value: {}", shown(value)), &detail))
    }

    /// `Duplicate value: "x"`
    pub fn duplicate(field: impl Into<String>, value: &Value) -> Cause {
        Cause::of("FieldValueDuplicate", field, format!("Duplicate value: {}", shown(value)))
    }

    /// `Forbidden: detail`
    pub fn forbidden(field: impl Into<String>, detail: &str) -> Cause {
        Cause::of("FieldValueForbidden", field, joined("Forbidden".to_owned(), detail))
    }

    /// `Not found: "x"`
    pub fn not_found(field: impl Into<String>, value: &Value) -> Cause {
        Cause::of("FieldValueNotFound", field, format!("Not found: {}", shown(value)))
    }

    /// `Too long: may not be more than N bytes`
    pub fn too_long(field: impl Into<String>, limit: u64) -> Cause {
        Cause::of("FieldValueTooLong", field, format!("Too long: may not be more than {limit} bytes"))
    }

    /// `Too many: N: must have at most M items`
    pub fn too_many(field: impl Into<String>, actual: u64, limit: u64) -> Cause {
        Cause::of("FieldValueTooMany", field, format!("Too many: {actual}: must have at most {limit} items"))
    }

    /// The cause as one line: `spec.y: Required value`.
    pub fn line(&self) -> String {
        if self.field.is_empty() { self.message.clone() } else { format!("{}: {}", self.field, self.message) }
    }
}

/// Lines of causes as Kubernetes joins them: one alone, several in brackets, repetitions once.
pub(super) fn aggregate(causes: &[Cause]) -> String {
    let mut lines: Vec<String> = Vec::new();
    for cause in causes {
        let line = cause.line();
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    match lines.len() {
        0 => String::new(),
        1 => lines.remove(0),
        _ => format!("[{}]", lines.join(", ")),
    }
}
