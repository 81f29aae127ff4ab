//! What makes a CustomResourceDefinition a good one, in Kubernetes' words.

use super::structural;
use crate::schema::{self, FieldError};
use serde_json::Value;
use std::collections::BTreeSet;

/// Everything wrong with a CRD; empty: it can be served.
pub fn validate_crd(crd: &Value) -> Vec<FieldError> {
    let mut check = Check { errors: Vec::new() };
    let Some(spec) = crd.get("spec").filter(|s| s.is_object()) else {
        check.required("spec", "");
        return check.errors;
    };
    let group = text(spec, "/group");
    let plural = text(spec, "/names/plural");
    let name = text(crd, "/metadata/name");
    if group.is_empty() {
        check.required("spec.group", "");
    } else if !group.contains('.') {
        check.invalid("spec.group", &Value::from(group), "should be a domain with at least one dot");
    }
    match text(spec, "/scope") {
        "Namespaced" | "Cluster" => {}
        "" => check.required("spec.scope", ""),
        other => check.unsupported("spec.scope", other, &["Cluster", "Namespaced"]),
    }
    for field in ["plural", "kind"] {
        if text(spec, &format!("/names/{field}")).is_empty() {
            check.required(&format!("spec.names.{field}"), "");
        }
    }
    if !plural.is_empty() && !group.is_empty() && name != format!("{plural}.{group}") {
        check.invalid("metadata.name", &Value::from(name), "must be spec.names.plural+\".\"+spec.group");
    }
    if text(spec, "/conversion/strategy") == "Webhook" {
        // Said rather than ignored: objects would come back in the wrong version.
        check.unsupported("spec.conversion.strategy", "Webhook", &["None"]);
    }
    check.versions(spec);
    check.errors
}

/// What is accepted in a CRD and does less here than on other servers, a sentence each; for `Warning:` headers.
pub fn warnings(crd: &Value) -> Vec<String> {
    let mut out = Vec::new();
    let versions = crd.pointer("/spec/versions").and_then(Value::as_array);
    for version in versions.into_iter().flatten() {
        let name = text(version, "/name");
        if version.pointer("/subresources/scale").is_some_and(Value::is_object) {
            out.push(format!("version {name}: the scale subresource is not served by this server"));
        }
        if version.get("selectableFields").and_then(Value::as_array).is_some_and(|list| !list.is_empty()) {
            out.push(format!("version {name}: selectableFields are not supported by this server"));
        }
        if let Some(schema) = version.pointer("/schema/openAPIV3Schema") {
            let (mut rules, mut patterns) = (false, Vec::new());
            survey(schema, &mut rules, &mut patterns);
            if rules {
                out.push(format!("version {name}: x-kubernetes-validations are not evaluated by this server"));
            }
            for pattern in patterns {
                out.push(format!("version {name}: pattern {pattern:?} cannot be evaluated by this server"));
            }
        }
    }
    out
}

fn survey<'a>(schema: &'a Value, rules: &mut bool, patterns: &mut Vec<&'a str>) {
    match schema {
        Value::Object(map) => {
            *rules |= map.get("x-kubernetes-validations").and_then(Value::as_array).is_some_and(|r| !r.is_empty());
            if let Some(pattern) = map.get("pattern").and_then(Value::as_str)
                && regex_lite::Regex::new(pattern).is_err()
            {
                patterns.push(pattern);
            }
            map.values().for_each(|inner| survey(inner, rules, patterns));
        }
        Value::Array(items) => items.iter().for_each(|inner| survey(inner, rules, patterns)),
        _ => {}
    }
}

struct Check {
    errors: Vec<FieldError>,
}

impl Check {
    fn push(&mut self, reason: &str, field: &str, message: String) {
        // One definition with thousands of mistakes needs no longer answer than this.
        if self.errors.len() < 100 {
            self.errors.push(FieldError { reason: reason.into(), field: field.into(), message });
        }
    }

    fn required(&mut self, field: &str, detail: &str) {
        let message = if detail.is_empty() { "Required value".into() } else { format!("Required value: {detail}") };
        self.push("FieldValueRequired", field, message);
    }

    fn invalid(&mut self, field: &str, value: &Value, why: &str) {
        self.push("FieldValueInvalid", field, format!("Invalid value: {value}: {why}"));
    }

    fn forbidden(&mut self, field: &str, why: &str) {
        self.push("FieldValueForbidden", field, format!("Forbidden: {why}"));
    }

    fn unsupported(&mut self, field: &str, value: &str, supported: &[&str]) {
        let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let message = format!("Unsupported value: {}: supported values: {}", Value::from(value), list.join(", "));
        self.push("FieldValueNotSupported", field, message);
    }

    fn versions(&mut self, spec: &Value) {
        let versions = spec.get("versions").and_then(Value::as_array).filter(|list| !list.is_empty());
        let Some(versions) = versions else { return self.required("spec.versions", "") };
        let mut names = BTreeSet::new();
        for (index, version) in versions.iter().enumerate() {
            let path = format!("spec.versions[{index}]");
            let name = text(version, "/name");
            if name.is_empty() {
                self.required(&format!("{path}.name"), "");
            } else if !label(name) {
                let why = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an \
                           alphabetic character, and end with an alphanumeric character";
                self.invalid(&format!("{path}.name"), &Value::from(name), why);
            }
            if !names.insert(name) {
                let why = "must contain unique version names";
                self.invalid("spec.versions", &Value::from(name), why);
            }
            let at = format!("{path}.schema.openAPIV3Schema");
            match version.pointer("/schema/openAPIV3Schema").filter(|s| s.is_object()) {
                None => self.required(&at, "schemas are required"),
                Some(schema) => {
                    if schema.get("type").and_then(Value::as_str) != Some("object") {
                        self.invalid(
                            &format!("{at}.type"),
                            schema.get("type").unwrap_or(&Value::from("")),
                            "must be object at the root",
                        );
                    }
                    self.schema(schema, &at, true);
                }
            }
            let columns = version.get("additionalPrinterColumns").and_then(Value::as_array);
            for (at, column) in columns.into_iter().flatten().enumerate() {
                let path = format!("{path}.additionalPrinterColumns[{at}]");
                for field in ["name", "jsonPath"] {
                    if text(column, &format!("/{field}")).is_empty() {
                        self.required(&format!("{path}.{field}"), "");
                    }
                }
                let types = ["boolean", "date", "integer", "number", "string"];
                match text(column, "/type") {
                    "" => self.required(&format!("{path}.type"), ""),
                    ty if types.contains(&ty) => {}
                    other => self.unsupported(&format!("{path}.type"), other, &types),
                }
            }
        }
        if versions.iter().filter(|v| v["storage"] == true).count() != 1 {
            let why = "must have exactly one version marked as storage version";
            self.invalid("spec.versions", &Value::from(names.into_iter().collect::<Vec<_>>()), why);
        }
    }

    /// The rules of structural schemas, at every depth.
    fn schema(&mut self, schema: &Value, path: &str, root: bool) {
        let has = |key: &str| schema.get(key).is_some_and(|v| !v.is_null());
        let flag = |key: &str| schema.get(key).and_then(Value::as_bool).unwrap_or(false);
        let ty = text(schema, "/type");
        let types = ["array", "boolean", "integer", "number", "object", "string"];
        let free = flag("x-kubernetes-int-or-string") || flag("x-kubernetes-preserve-unknown-fields");
        if ty.is_empty() && !free && !root {
            self.required(&format!("{path}.type"), "must not be empty for specified object fields");
        } else if !ty.is_empty() && !types.contains(&ty) {
            self.unsupported(&format!("{path}.type"), ty, &types);
        }
        for key in ["$ref", "definitions", "dependencies", "patternProperties", "additionalItems", "id"] {
            if has(key) {
                self.forbidden(&format!("{path}.{key}"), &format!("{key} is not supported"));
            }
        }
        if has("properties") && has("additionalProperties") {
            self.forbidden(
                &format!("{path}.additionalProperties"),
                "additionalProperties and properties are mutual exclusive",
            );
        }
        if schema.get("additionalProperties") == Some(&Value::Bool(false)) {
            self.forbidden(&format!("{path}.additionalProperties"), "additionalProperties cannot be set to false");
        }
        if ty == "array" && !schema.get("items").is_some_and(Value::is_object) {
            self.required(&format!("{path}.items"), "must be specified");
        }
        self.lists(schema, path);
        if let Some(default) = schema.get("default") {
            for error in schema::validate(&structural::parse(schema), default) {
                let inner = if error.field == "<nil>" { String::new() } else { format!(".{}", error.field) };
                self.push(&error.reason, &format!("{path}.default{inner}"), error.message);
            }
        }
        if let Some(Value::Object(properties)) = schema.get("properties") {
            for (name, member) in properties {
                // The metadata of the whole object is Kubernetes' own.
                if !(root && name == "metadata") {
                    self.schema(member, &format!("{path}.properties[{name}]"), false);
                }
            }
        }
        for key in ["items", "additionalProperties"] {
            if let Some(inner @ Value::Object(_)) = schema.get(key) {
                self.schema(inner, &format!("{path}.{key}"), false);
            }
        }
    }

    fn lists(&mut self, schema: &Value, path: &str) {
        let keys = schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
        match text(schema, "/x-kubernetes-list-type") {
            "map" => {
                let Some(keys) = keys.filter(|k| !k.is_empty()) else {
                    let why = "must not be empty if x-kubernetes-list-type is map";
                    return self.required(&format!("{path}.x-kubernetes-list-map-keys"), why);
                };
                for key in keys.iter().filter_map(Value::as_str) {
                    let known = schema.pointer("/items/properties").and_then(|p| p.get(key)).is_some();
                    if !known {
                        let field = format!("{path}.x-kubernetes-list-map-keys");
                        self.invalid(&field, &Value::from(key), "entries must all be names of item properties");
                    }
                }
            }
            "" | "set" | "atomic" => {
                if keys.is_some_and(|k| !k.is_empty()) {
                    let why = "must be map if x-kubernetes-list-map-keys is non-empty";
                    let found = schema.get("x-kubernetes-list-type").unwrap_or(&Value::Null);
                    self.invalid(&format!("{path}.x-kubernetes-list-type"), found, why);
                }
            }
            other => self.unsupported(&format!("{path}.x-kubernetes-list-type"), other, &["atomic", "map", "set"]),
        }
    }
}

fn label(s: &str) -> bool {
    s.len() <= 63
        && s.starts_with(|c: char| c.is_ascii_lowercase())
        && !s.ends_with('-')
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}
