//! Rules of names, labels and annotations, and the sentences with which Kubernetes refuses them.

use crate::meta;
use crate::status::Cause;
use serde_json::Value;

/// Longest DNS-1123 subdomain, in bytes.
pub const SUBDOMAIN_MAX: usize = 253;
/// Longest DNS label and label value, in bytes.
pub const LABEL_MAX: usize = 63;
/// Keys and values of all annotations together, in bytes.
pub const ANNOTATIONS_MAX: usize = 256 * 1024;

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', \
    and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must \
    start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an \
    alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for \
    validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const QUALIFIED: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an \
    alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
    '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or \
    '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex \
    used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

/// What an object of a kind may be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Most kinds.
    Subdomain,
    /// Namespaces.
    Label,
    /// Services.
    Label1035,
    /// RBAC: anything that fits in one segment of a path.
    PathSegment,
}

impl Rule {
    /// The rule for a resource.
    pub fn of(group: &str, plural: &str) -> Rule {
        match (group, plural) {
            ("", "namespaces") => Rule::Label,
            ("", "services") => Rule::Label1035,
            ("rbac.authorization.k8s.io", _) => Rule::PathSegment,
            _ => Rule::Subdomain,
        }
    }

    /// What is wrong with a name; empty if nothing is.
    pub fn check(self, name: &str) -> Vec<String> {
        match self {
            Rule::Subdomain => subdomain(name),
            Rule::Label => label(name),
            Rule::Label1035 => label_1035(name),
            Rule::PathSegment => path_segment(name),
        }
    }
}

fn too_long(max: usize) -> String {
    format!("must be no more than {max} bytes")
}

fn is_lower(c: u8) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit()
}

/// `inner` characters with `edge` characters at both ends, at least one.
fn framed(text: &str, edge: fn(u8) -> bool, inner: fn(u8) -> bool) -> bool {
    match text.as_bytes() {
        [] => false,
        [one] => edge(*one),
        [first, middle @ .., last] => edge(*first) && edge(*last) && middle.iter().all(|c| edge(*c) || inner(*c)),
    }
}

/// DNS-1123 subdomain.
pub fn subdomain(name: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if name.len() > SUBDOMAIN_MAX {
        errors.push(too_long(SUBDOMAIN_MAX));
    }
    if !name.split('.').all(|part| framed(part, is_lower, |c| c == b'-')) {
        errors.push(SUBDOMAIN.to_owned());
    }
    errors
}

/// DNS-1123 label.
pub fn label(name: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if name.len() > LABEL_MAX {
        errors.push(too_long(LABEL_MAX));
    }
    if !framed(name, is_lower, |c| c == b'-') {
        errors.push(LABEL.to_owned());
    }
    errors
}

/// DNS-1035 label.
pub fn label_1035(name: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if name.len() > LABEL_MAX {
        errors.push(too_long(LABEL_MAX));
    }
    if !framed(name, is_lower, |c| c == b'-') || name.starts_with(|c: char| c.is_ascii_digit()) {
        errors.push(LABEL_1035.to_owned());
    }
    errors
}

/// A name that may stand in a URL path as one segment.
pub fn path_segment(name: &str) -> Vec<String> {
    if name == "." || name == ".." {
        return vec![format!("may not be '{name}'")];
    }
    ['/', '%'].iter().filter(|c| name.contains(**c)).map(|c| format!("may not contain '{c}'")).collect()
}

/// A key of labels, annotations or finalizers: `[prefix/]name`.
pub fn qualified(key: &str) -> Vec<String> {
    let mut errors = Vec::new();
    let parts: Vec<&str> = key.split('/').collect();
    let name = match parts.as_slice() {
        [name] => *name,
        [prefix, name] => {
            if prefix.is_empty() {
                errors.push("prefix part must be non-empty".to_owned());
            } else {
                errors.extend(subdomain(prefix).into_iter().map(|e| format!("prefix part {e}")));
            }
            *name
        }
        _ => {
            errors.push(format!(
                "a qualified name {QUALIFIED} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            ));
            return errors;
        }
    };
    if name.is_empty() {
        errors.push("name part must be non-empty".to_owned());
    } else if name.len() > LABEL_MAX {
        errors.push(format!("name part {}", too_long(LABEL_MAX)));
    }
    if !framed(name, |c| c.is_ascii_alphanumeric(), |c| matches!(c, b'-' | b'_' | b'.')) {
        errors.push(format!("name part {QUALIFIED}"));
    }
    errors
}

/// A label's value.
pub fn label_value(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.len() > LABEL_MAX {
        errors.push(too_long(LABEL_MAX));
    }
    if !value.is_empty() && !framed(value, |c| c.is_ascii_alphanumeric(), |c| matches!(c, b'-' | b'_' | b'.')) {
        errors.push(LABEL_VALUE.to_owned());
    }
    errors
}

/// Five characters for a generated name, from a random number; without vowels, so that no words come out.
pub fn suffix(random: u64) -> String {
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut rest = random;
    let mut text = String::with_capacity(5);
    for _ in 0..5 {
        text.push(char::from(ALPHABET[(rest % 27) as usize]));
        rest /= 27;
    }
    text
}

/// The name that `generateName` stands for.
pub fn generated(base: &str, suffix: &str) -> String {
    let mut end = base.len().min(LABEL_MAX.saturating_sub(suffix.len()));
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{suffix}", &base[..end])
}

/// Checks everything in `metadata` of an object that is about to be stored; `generateName` must have been used up.
pub fn validate(object: &Value, rule: Rule, namespaced: bool) -> Vec<Cause> {
    let mut causes = Vec::new();
    let Some(metadata) = object.get("metadata").and_then(Value::as_object) else {
        return vec![Cause::required("metadata", "")];
    };
    let field = |f: &str| format!("metadata.{f}");
    if let Some(base) = metadata.get("generateName").and_then(Value::as_str).filter(|g| !g.is_empty()) {
        // A trailing dash is fine: characters follow.
        let whole = format!("{base}a");
        causes.extend(rule.check(&whole).iter().map(|e| Cause::invalid(field("generateName"), &base.into(), e)));
    }
    match meta::name(object) {
        "" => causes.push(Cause::required(field("name"), "name or generateName is required")),
        name => causes.extend(rule.check(name).iter().map(|e| Cause::invalid(field("name"), &name.into(), e))),
    }
    match (namespaced, meta::namespace(object)) {
        (true, "") => causes.push(Cause::required(field("namespace"), "")),
        (true, ns) => {
            causes.extend(label(ns).iter().map(|e| Cause::invalid(field("namespace"), &ns.into(), e)));
        }
        (false, "") => {}
        (false, _) => causes.push(Cause::forbidden(field("namespace"), "not allowed on this type")),
    }
    labels(metadata.get("labels"), &field("labels"), &mut causes);
    annotations(metadata.get("annotations"), &field("annotations"), &mut causes);
    finalizers(metadata.get("finalizers"), &field("finalizers"), &mut causes);
    owners(metadata.get("ownerReferences"), &field("ownerReferences"), &mut causes);
    causes
}

/// Checks a map of labels found at `field`.
pub fn labels(map: Option<&Value>, field: &str, causes: &mut Vec<Cause>) {
    for (key, value) in map.and_then(Value::as_object).into_iter().flatten() {
        causes.extend(qualified(key).iter().map(|e| Cause::invalid(field, &key.as_str().into(), e)));
        match value {
            Value::String(text) => {
                causes.extend(label_value(text).iter().map(|e| Cause::invalid(field, value, e)));
            }
            Value::Null => {}
            _ => causes.push(Cause::type_invalid(format!("{field}.{key}"), value, "must be a string")),
        }
    }
}

fn annotations(map: Option<&Value>, field: &str, causes: &mut Vec<Cause>) {
    let mut total = 0usize;
    for (key, value) in map.and_then(Value::as_object).into_iter().flatten() {
        // Upper case is allowed in the prefix of an annotation.
        let lower = key.to_lowercase();
        causes.extend(qualified(&lower).iter().map(|e| Cause::invalid(field, &key.as_str().into(), e)));
        total = total.saturating_add(key.len());
        match value {
            Value::String(text) => total = total.saturating_add(text.len()),
            Value::Null => {}
            _ => causes.push(Cause::type_invalid(format!("{field}.{key}"), value, "must be a string")),
        }
    }
    if total > ANNOTATIONS_MAX {
        causes.push(Cause::too_long(field, ANNOTATIONS_MAX as u64));
    }
}

/// Only core kinds demand more (a slash, or one of Kubernetes' own names); KubeVirt has finalizers without a slash.
fn finalizers(list: Option<&Value>, field: &str, causes: &mut Vec<Cause>) {
    for (i, value) in list.and_then(Value::as_array).into_iter().flatten().enumerate() {
        let at = format!("{field}[{i}]");
        let Some(name) = value.as_str() else {
            causes.push(Cause::type_invalid(at, value, "must be a string"));
            continue;
        };
        causes.extend(qualified(name).iter().map(|e| Cause::invalid(at.clone(), value, e)));
    }
}

fn owners(list: Option<&Value>, field: &str, causes: &mut Vec<Cause>) {
    let mut controller: Option<&str> = None;
    for (i, owner) in list.and_then(Value::as_array).into_iter().flatten().enumerate() {
        let text = |key: &str| owner.get(key).and_then(Value::as_str).unwrap_or_default();
        for (key, detail) in [
            ("apiVersion", "version must not be empty"),
            ("kind", "kind must not be empty"),
            ("name", "name must not be empty"),
            ("uid", "uid must not be empty"),
        ] {
            if text(key).is_empty() {
                causes.push(Cause::invalid(format!("{field}[{i}].{key}"), &"".into(), detail));
            }
        }
        if owner.get("controller").and_then(Value::as_bool) == Some(true) {
            match controller {
                None => controller = Some(text("name")),
                Some(first) => causes.push(Cause::invalid(
                    field,
                    list.unwrap_or(&Value::Null),
                    &format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for {first} \
                         and {}",
                        text("name")
                    ),
                )),
            }
        }
    }
}

/// Checks what an update may not change in `metadata`.
pub fn validate_update(old: &Value, new: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    for key in ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        let at = |object: &Value| object.get("metadata").and_then(|m| m.get(key)).cloned().unwrap_or(Value::Null);
        let (before, after) = (at(old), at(new));
        if before != after {
            causes.push(Cause::invalid(format!("metadata.{key}"), &after, "field is immutable"));
        }
    }
    if meta::is_deleting(old) {
        let before = meta::finalizers(old);
        let added: Vec<String> =
            meta::finalizers(new).iter().filter(|f| !before.contains(f)).map(|f| format!("{f:?}")).collect();
        if !added.is_empty() {
            let detail = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                added.join(", ")
            );
            causes.push(Cause::forbidden("metadata.finalizers", &detail));
        }
    }
    causes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn knows_good_names_from_bad() {
        for good in ["a", "a-b.c", "1", "virt-launcher-x-abcde"] {
            assert!(subdomain(good).is_empty(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a..b", "a_b", "ä", ".a"] {
            assert!(!subdomain(bad).is_empty(), "{bad}");
        }
        assert_eq!(subdomain(&"a".repeat(254)), ["must be no more than 253 bytes"]);
        assert!(!label("a.b").is_empty());
        assert!(!label_1035("1a").is_empty());
        assert!(path_segment("system:node").is_empty());
        assert_eq!(path_segment("a/b%"), ["may not contain '/'", "may not contain '%'"]);
    }

    #[test]
    fn knows_label_keys_and_values() {
        for good in ["kubevirt.io/nodeName", "app", "a.b_c-d", "x/1"] {
            assert!(qualified(good).is_empty(), "{good}");
        }
        assert_eq!(qualified("/a"), ["prefix part must be non-empty"]);
        assert_eq!(qualified("a/b/c").len(), 1);
        assert_eq!(qualified("a/").first().map(String::as_str), Some("name part must be non-empty"));
        assert!(label_value("").is_empty());
        assert!(!label_value("a b").is_empty());
        assert!(!label_value("-a").is_empty());
    }

    #[test]
    fn generates_names() {
        assert_eq!(suffix(0), "bbbbb");
        assert_eq!(generated("pod-", "x2x4z"), "pod-x2x4z");
        assert_eq!(generated(&"a".repeat(80), "bbbbb").len(), 63);
    }

    #[test]
    fn validates_metadata() {
        let good = json!({"metadata": {"name": "a", "namespace": "n", "labels": {"a/b": "c"}, "finalizers": ["x/y"],
            "annotations": {"Example.com/A": "anything at all"}}});
        assert_eq!(validate(&good, Rule::Subdomain, true), vec![]);
        let bad = json!({"metadata": {"namespace": "n", "labels": {"a b": "c"}, "finalizers": ["x y"],
            "annotations": {"a": "x".repeat(ANNOTATIONS_MAX)},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p"}]}});
        let lines: Vec<String> = validate(&bad, Rule::Subdomain, false).iter().map(Cause::line).collect();
        assert_eq!(lines.len(), 6, "{lines:?}");
        assert_eq!(lines[0], "metadata.name: Required value: name or generateName is required");
        assert_eq!(lines[3], "metadata.annotations: Too long: may not be more than 262144 bytes");
        assert_eq!(lines[5], "metadata.ownerReferences[0].uid: Invalid value: \"\": uid must not be empty");
    }

    #[test]
    fn refuses_new_finalizers_while_deleting() {
        let old =
            json!({"metadata": {"name": "a", "deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["a/b"]}});
        let mut new = old.clone();
        new["metadata"]["finalizers"] = json!(["c/d"]);
        new["metadata"]["name"] = json!("b");
        let causes = validate_update(&old, &new);
        assert_eq!(causes[0].line(), "metadata.name: Invalid value: \"b\": field is immutable");
        assert!(causes[1].line().ends_with("[]string{\"c/d\"}"));
    }

    proptest! {
        #[test]
        fn never_panics(name in ".{0,80}", extra in any::<u64>()) {
            for rule in [Rule::Subdomain, Rule::Label, Rule::Label1035, Rule::PathSegment] {
                rule.check(&name);
            }
            qualified(&name);
            label_value(&name);
            let made = generated(&name, &suffix(extra));
            prop_assert!(made.len() <= 63);
        }
    }
}
