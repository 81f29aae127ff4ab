//! Field selectors: few fields, a kind at a time.

use crate::status::Status;
use serde_json::Value;

/// One condition on one field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldTerm {
    /// `spec.nodeName`
    pub field: String,
    /// Compared as text.
    pub value: String,
    /// `!=`
    pub negated: bool,
}

/// All terms must hold; without any, everything matches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector {
    terms: Vec<FieldTerm>,
}

impl FieldSelector {
    /// Reads `metadata.name=x,spec.nodeName!=y`; `\` escapes `,`, `=` and itself in values.
    ///
    /// # Errors
    /// 400 BadRequest.
    pub fn parse(text: &str) -> Result<FieldSelector, Status> {
        let mut terms = Vec::new();
        for part in split(text) {
            if part.is_empty() {
                continue;
            }
            let Some((field, negated, raw)) = operator(part) else {
                return Err(Status::bad_request(format!(
                    "unable to parse field selector: invalid selector: '{text}'; can't understand '{part}'"
                )));
            };
            let value = unescape(raw).ok_or_else(|| {
                Status::bad_request(format!("unable to parse field selector: invalid escape in value '{raw}'"))
            })?;
            terms.push(FieldTerm { field: field.to_owned(), value, negated });
        }
        Ok(FieldSelector { terms })
    }

    /// Selects nothing away.
    pub fn is_everything(&self) -> bool {
        self.terms.is_empty()
    }

    /// The terms.
    pub fn terms(&self) -> &[FieldTerm] {
        &self.terms
    }

    /// The one value that a field must have, for indexes and single reads.
    pub fn exact(&self, field: &str) -> Option<&str> {
        self.terms.iter().find(|t| t.field == field && !t.negated).map(|t| t.value.as_str())
    }

    /// Are all fields known for this kind?
    ///
    /// # Errors
    /// 400 `field label not supported: x`.
    pub fn check(&self, group: &str, plural: &str) -> Result<(), Status> {
        match self.terms.iter().find(|t| !supported(group, plural, &t.field)) {
            None => Ok(()),
            Some(term) => Err(Status::bad_request(format!("field label not supported: {}", term.field))),
        }
    }

    /// Does it select this object? Fields that are absent compare as their zero value.
    pub fn matches(&self, object: &Value) -> bool {
        self.terms.iter().all(|t| (value(object, &t.field) == t.value) != t.negated)
    }
}

/// Parts between commas that are not escaped.
fn split(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

/// Field, "not", and what stands behind the first operator.
fn operator(term: &str) -> Option<(&str, bool, &str)> {
    for (i, c) in term.char_indices() {
        let rest = &term[i..];
        for (sign, negated) in [("!=", true), ("==", false), ("=", false)] {
            if let Some(value) = rest.strip_prefix(sign) {
                return (i > 0).then_some((&term[..i], negated, value));
            }
        }
        if c == '\\' {
            return None;
        }
    }
    None
}

fn unescape(raw: &str) -> Option<String> {
    let mut value = String::with_capacity(raw.len());
    let mut chars = raw.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next()? {
                escaped @ ('\\' | ',' | '=') => value.push(escaped),
                _ => return None,
            },
            ',' | '=' => return None,
            c => value.push(c),
        }
    }
    Some(value)
}

fn supported(group: &str, plural: &str, field: &str) -> bool {
    const REFERENCE: [&str; 7] = ["kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath"];
    if matches!(field, "metadata.name" | "metadata.namespace") {
        return true;
    }
    match (group, plural) {
        ("", "pods") => matches!(
            field,
            "spec.nodeName"
                | "spec.restartPolicy"
                | "spec.schedulerName"
                | "spec.serviceAccountName"
                | "spec.hostNetwork"
                | "status.phase"
                | "status.podIP"
                | "status.podIPs"
                | "status.nominatedNodeName"
        ),
        ("" | "events.k8s.io", "events") => {
            matches!(field, "reason" | "reportingComponent" | "reportingController" | "source" | "type")
                || field
                    .strip_prefix("involvedObject.")
                    .or_else(|| field.strip_prefix("regarding."))
                    .is_some_and(|f| REFERENCE.contains(&f))
        }
        ("", "nodes") => field == "spec.unschedulable",
        ("", "namespaces") => matches!(field, "status.phase" | "name"),
        ("", "secrets") => field == "type",
        _ => false,
    }
}

fn value(object: &Value, field: &str) -> String {
    let at = |path: &str| path.split('.').try_fold(object, |value, key| value.get(key));
    let first = |paths: &[&str]| paths.iter().find_map(|p| at(p)).map(text).unwrap_or_default();
    match field {
        "spec.unschedulable" | "spec.hostNetwork" => at(field).and_then(Value::as_bool).unwrap_or(false).to_string(),
        "name" => first(&["metadata.name"]),
        "status.podIPs" => first(&["status.podIP"]),
        "source" => first(&["source.component", "deprecatedSource.component", "reportingComponent"]),
        "reportingComponent" | "reportingController" => first(&["reportingComponent", "reportingController"]),
        _ => match field.split_once('.') {
            // An event may be held in the shape of either of its groups.
            Some(("involvedObject" | "regarding", rest)) => {
                first(&[&format!("involvedObject.{rest}"), &format!("regarding.{rest}")])
            }
            _ => first(&[field]),
        },
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn selects_pods_as_describe_node_does() {
        let s = FieldSelector::parse("spec.nodeName=n1,status.phase!=Succeeded,status.phase!=Failed").unwrap();
        assert!(s.check("", "pods").is_ok());
        assert!(s.matches(&json!({"spec": {"nodeName": "n1"}, "status": {"phase": "Running"}})));
        assert!(!s.matches(&json!({"spec": {"nodeName": "n1"}, "status": {"phase": "Failed"}})));
        assert!(!s.matches(&json!({"status": {"phase": "Running"}})));
        assert!(FieldSelector::parse("spec.nodeName=").unwrap().matches(&json!({"spec": {}})));
        assert!(FieldSelector::parse("spec.unschedulable==false").unwrap().matches(&json!({})));
        assert_eq!(FieldSelector::parse("metadata.name=x").unwrap().exact("metadata.name"), Some("x"));
    }

    #[test]
    fn selects_events_of_either_group() {
        let s = FieldSelector::parse("involvedObject.name=a,involvedObject.uid=u").unwrap();
        assert!(s.check("", "events").is_ok());
        assert!(s.matches(&json!({"involvedObject": {"name": "a", "uid": "u"}})));
        assert!(s.matches(&json!({"regarding": {"name": "a", "uid": "u"}})));
        assert!(!s.matches(&json!({"regarding": {"name": "a", "uid": "v"}})));
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        let s = FieldSelector::parse("spec.x=1").unwrap();
        let status = s.check("kubevirt.io", "virtualmachineinstances").unwrap_err();
        assert_eq!((status.code, status.message.as_str()), (400, "field label not supported: spec.x"));
        assert!(FieldSelector::parse("metadata.name=a,nonsense").is_err());
        assert!(FieldSelector::parse("=a").is_err());
        assert!(FieldSelector::parse("a=b=c").is_err());
        assert_eq!(FieldSelector::parse(r"a=b\,c\=\\").unwrap().exact("a"), Some(r"b,c=\"));
    }

    proptest! {
        #[test]
        fn never_panics(text in ".*", odd in r"[a=!,\\.é]{0,16}") {
            for text in [text, odd] {
                if let Ok(selector) = FieldSelector::parse(&text) {
                    selector.matches(&json!({"a": [1], "metadata": null}));
                }
            }
        }
    }
}
