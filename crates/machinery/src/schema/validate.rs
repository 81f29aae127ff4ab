//! Does a value fit a schema? The texts are those that users of Kubernetes know.

use super::{ListType, Schema, Type};
use serde_json::Value;

/// One thing wrong with one field: `reason` such as `FieldValueRequired`, `field` such as `spec.x[0]`, `message` such as
/// `Required value`.
pub type FieldError = crate::status::Cause;

/// More errors than this help nobody.
const MAX_ERRORS: usize = 100;

/// Every way in which `value` does not fit `schema`, at most a hundred of them.
pub fn validate(schema: &Schema, value: &Value) -> Vec<FieldError> {
    let mut walk = Walk { errors: Vec::new() };
    walk.node(schema, value, &mut String::new());
    walk.errors
}

struct Walk {
    errors: Vec<FieldError>,
}

impl Walk {
    fn push(&mut self, reason: &str, path: &str, message: String) {
        if self.errors.len() < MAX_ERRORS {
            let field = if path.is_empty() { "<nil>".to_owned() } else { path.to_owned() };
            self.errors.push(FieldError { reason: reason.to_owned(), message, field });
        }
    }

    fn invalid(&mut self, path: &str, value: &Value, why: &str) {
        self.push("FieldValueInvalid", path, format!("Invalid value: {}: {why}", show(value)));
    }

    fn should(&mut self, path: &str, value: &Value, what: &str) {
        self.invalid(path, value, &format!("{path} in body should {what}"));
    }

    fn wrong_type(&mut self, path: &str, want: &str, got: &str) {
        self.push(
            "FieldValueTypeInvalid",
            path,
            format!("Invalid value: \"{got}\": {path} in body must be of type {want}: \"{got}\""),
        );
    }

    fn node(&mut self, schema: &Schema, value: &Value, path: &mut String) {
        if self.errors.len() >= MAX_ERRORS {
            return;
        }
        if value.is_null() {
            if !schema.nullable && (schema.ty.is_some() || schema.int_or_string) {
                self.wrong_type(path, &wanted(schema), "null");
            }
            return;
        }
        if !fits(schema, value) {
            self.wrong_type(path, &wanted(schema), type_name(value));
            return;
        }
        if schema.quantity && crate::quantity::Quantity::of(value).is_none() {
            self.invalid(path, value, crate::quantity::SYNTAX);
        }
        if !schema.enumeration.is_empty() && !schema.enumeration.contains(value) {
            let supported: Vec<String> = schema.enumeration.iter().map(show).collect();
            let message = format!("Unsupported value: {}: supported values: {}", show(value), supported.join(", "));
            self.push("FieldValueNotSupported", path, message);
        }
        match value {
            Value::String(s) => self.string(schema, s, value, path),
            Value::Number(n) => {
                if let Some(n) = n.as_f64() {
                    self.number(schema, n, value, path);
                }
            }
            Value::Array(items) => self.list(schema, items, value, path),
            Value::Object(map) => {
                self.object(schema, map, value, path);
            }
            Value::Bool(_) | Value::Null => {}
        }
        self.junctors(schema, value, path);
    }

    fn string(&mut self, schema: &Schema, s: &str, value: &Value, path: &str) {
        let chars = s.chars().count() as u64;
        if let Some(max) = schema.max_length.filter(|max| chars > *max) {
            self.push("FieldValueTooLong", path, format!("Too long: may not be more than {max} bytes"));
        }
        if let Some(min) = schema.min_length.filter(|min| chars < *min) {
            self.should(path, value, &format!("be at least {min} chars long"));
        }
        if let Some(pattern) = &schema.pattern
            // A pattern this engine cannot read was accepted with the CRD; then it constrains nothing.
            && let Ok(re) = regex_lite::Regex::new(pattern)
            && !re.is_match(s)
        {
            self.should(path, value, &format!("match '{pattern}'"));
        }
        if let Some(format) = schema.format.as_deref().filter(|f| !super::formats::matches(f, s)) {
            self.invalid(path, value, &format!("{path} in body must be of type {format}: {}", show(value)));
        }
    }

    fn number(&mut self, schema: &Schema, n: f64, value: &Value, path: &str) {
        if let Some(min) = schema.minimum {
            if schema.exclusive_minimum && n <= min {
                self.should(path, value, &format!("be greater than {min}"));
            } else if n < min {
                self.should(path, value, &format!("be greater than or equal to {min}"));
            }
        }
        if let Some(max) = schema.maximum {
            if schema.exclusive_maximum && n >= max {
                self.should(path, value, &format!("be less than {max}"));
            } else if n > max {
                self.should(path, value, &format!("be less than or equal to {max}"));
            }
        }
        if let Some(step) = schema.multiple_of.filter(|step| *step > 0.0 && (n / step).fract() != 0.0) {
            self.should(path, value, &format!("be a multiple of {step}"));
        }
        let range = match schema.format.as_deref() {
            Some("int32") => f64::from(i32::MIN)..=f64::from(i32::MAX),
            _ => return,
        };
        if !range.contains(&n) {
            self.should(path, value, &format!("be between {} and {}", range.start(), range.end()));
        }
    }

    fn list(&mut self, schema: &Schema, items: &[Value], value: &Value, path: &mut String) {
        let n = items.len() as u64;
        if let Some(max) = schema.max_items.filter(|max| n > *max) {
            self.push("FieldValueTooMany", path, format!("Too many: {n}: must have at most {max} items"));
        }
        if let Some(min) = schema.min_items.filter(|min| n < *min) {
            self.should(path, value, &format!("have at least {min} items"));
        }
        let len = path.len();
        if let Some(item_schema) = &schema.items {
            for (index, item) in items.iter().enumerate() {
                path.push_str(&format!("[{index}]"));
                self.node(item_schema, item, path);
                path.truncate(len);
            }
        }
        self.duplicates(schema, items, value, path);
    }

    /// Sets and maps may not hold the same item twice (`Duplicate value`). Built-in kinds, which are those with patch
    /// strategies, have rules of their own: an environment variable may be named twice, the last one counts.
    fn duplicates(&mut self, schema: &Schema, items: &[Value], value: &Value, path: &mut String) {
        if schema.unique_items && identities(items.iter().cloned()).next().is_some() {
            self.should(path, value, "not contain duplicates");
        }
        let len = path.len();
        let twice: Vec<(usize, Value)> = match schema.list_type {
            _ if !schema.patch_strategy.is_empty() => return,
            ListType::Atomic => return,
            ListType::Set => identities(items.iter().cloned()).collect(),
            ListType::Map => identities(items.iter().map(|item| key_of(schema, item))).collect(),
        };
        for (index, key) in twice {
            path.push_str(&format!("[{index}]"));
            self.push("FieldValueDuplicate", path, format!("Duplicate value: {}", show(&key)));
            path.truncate(len);
        }
    }

    fn object(&mut self, schema: &Schema, map: &serde_json::Map<String, Value>, value: &Value, path: &mut String) {
        let n = map.len() as u64;
        if let Some(max) = schema.max_properties.filter(|max| n > *max) {
            self.push("FieldValueTooMany", path, format!("Too many: {n}: must have at most {max} items"));
        }
        if let Some(min) = schema.min_properties.filter(|min| n < *min) {
            self.should(path, value, &format!("have at least {min} properties"));
        }
        let len = path.len();
        let enter = |path: &mut String, name: &str| {
            if !path.is_empty() {
                path.push('.');
            }
            path.push_str(name);
        };
        for name in schema.required.iter().filter(|name| !map.contains_key(*name)) {
            enter(path, name);
            self.push("FieldValueRequired", path, "Required value".to_owned());
            path.truncate(len);
        }
        for (name, member) in map {
            if let Some(known) = schema.member(name) {
                enter(path, name);
                self.node(known, member, path);
                path.truncate(len);
            }
        }
    }

    fn junctors(&mut self, schema: &Schema, value: &Value, path: &mut String) {
        for part in &schema.all_of {
            self.node(part, value, path);
        }
        if !schema.any_of.is_empty() && !schema.any_of.iter().any(|part| validate(part, value).is_empty()) {
            self.invalid(path, value, &format!("\"{path}\" must validate at least one schema (anyOf)"));
        }
        if !schema.one_of.is_empty() {
            let valid = schema.one_of.iter().filter(|part| validate(part, value).is_empty()).count();
            if valid != 1 {
                let found = if valid == 0 { "none valid".to_owned() } else { format!("{valid} valid alternatives") };
                let why = format!("\"{path}\" must validate one and only one schema (oneOf). Found {found}");
                self.invalid(path, value, &why);
            }
        }
        if schema.not.as_ref().is_some_and(|part| validate(part, value).is_empty()) {
            self.invalid(path, value, &format!("\"{path}\" must not validate the schema (not)"));
        }
    }
}

/// The places at which something stands for the second time.
fn identities(keys: impl Iterator<Item = Value>) -> impl Iterator<Item = (usize, Value)> {
    let mut seen = std::collections::BTreeSet::new();
    keys.enumerate().filter(move |(_, key)| !seen.insert(key.to_string()))
}

fn key_of(schema: &Schema, item: &Value) -> Value {
    let key = |name: &String| {
        let default = || schema.items.as_ref().and_then(|i| i.properties.get(name)).and_then(|p| p.default.clone());
        item.get(name).cloned().or_else(default).map(|v| (name.clone(), v))
    };
    Value::Object(schema.list_map_keys.iter().filter_map(key).collect())
}

fn fits(schema: &Schema, value: &Value) -> bool {
    if schema.int_or_string {
        // Quantities may be written as any number, other int-or-strings only as whole ones.
        return value.is_string() || value.is_i64() || value.is_u64() || (schema.quantity && value.is_number());
    }
    match schema.ty {
        None => true,
        Some(Type::Object) => value.is_object(),
        Some(Type::Array) => value.is_array(),
        Some(Type::String) => value.is_string(),
        Some(Type::Boolean) => value.is_boolean(),
        Some(Type::Number) => value.is_number(),
        Some(Type::Integer) => {
            value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0 && n.abs() < 9e15)
        }
    }
}

fn wanted(schema: &Schema) -> String {
    match schema.ty {
        _ if schema.int_or_string => "integer,string".to_owned(),
        Some(ty) => ty.as_str().to_owned(),
        None => "any".to_owned(),
    }
}

/// JSON Schema's name for the type of a value.
fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// A value in an error text, cut to a length that a person can read.
fn show(value: &Value) -> String {
    const MAX: usize = 1024;
    let mut text = value.to_string();
    if text.len() > MAX {
        let cut = (0..=MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(cut);
        text.push('…');
    }
    text
}

/// The first value that could not even be decoded into a built-in kind's struct.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeMismatch {
    /// Where, such as `spec.containers`.
    pub path: String,
    /// JSON type found.
    pub found: &'static str,
    /// Go-like type wanted, such as `[]v1.Container`.
    pub wanted: String,
}

impl TypeMismatch {
    /// The sentence of a 400 answer, as Kubernetes gives it for a body of built-in kind.
    pub fn message(&self, gv: &str, kind: &str) -> String {
        let (parent, field) = (kind, &self.path);
        format!(
            "{kind} in version \"{gv}\" cannot be handled as a {kind}: json: cannot unmarshal {} into Go struct field \
             {parent}.{field} of type {}",
            self.found, self.wanted
        )
    }
}

/// Finds a value whose JSON type makes it undecodable, as a decoder of built-in kinds would; null fits everything.
pub fn type_mismatch(schema: &Schema, value: &Value) -> Option<TypeMismatch> {
    find_mismatch(schema, value, &mut String::new())
}

fn find_mismatch(schema: &Schema, value: &Value, path: &mut String) -> Option<TypeMismatch> {
    if value.is_null() {
        return None;
    }
    if !fits(schema, value) {
        let found = match value {
            Value::Bool(_) => "bool",
            other if other.is_number() => "number",
            other => type_name(other),
        };
        return Some(TypeMismatch { path: path.clone(), found, wanted: go_type(schema) });
    }
    let len = path.len();
    match value {
        Value::Object(map) => map.iter().find_map(|(name, member)| {
            let known = schema.member(name)?;
            if !path.is_empty() {
                path.push('.');
            }
            path.push_str(name);
            let found = find_mismatch(known, member, path);
            path.truncate(len);
            found
        }),
        // Go's decoder does not count list items in its paths.
        Value::Array(items) => items.iter().find_map(|item| find_mismatch(schema.items.as_ref()?, item, path)),
        _ => None,
    }
}

fn go_type(schema: &Schema) -> String {
    if let Some(name) = &schema.definition {
        let mut parts = name.rsplit('.');
        let (kind, version) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        return format!("{version}.{kind}");
    }
    match schema.ty {
        Some(Type::Array) => format!("[]{}", schema.items.as_deref().map_or("interface {}".into(), go_type)),
        Some(Type::Object) => {
            format!("map[string]{}", schema.additional.as_deref().map_or("interface {}".into(), go_type))
        }
        Some(Type::String) => "string".into(),
        Some(Type::Boolean) => "bool".into(),
        Some(Type::Number) => "float64".into(),
        Some(Type::Integer) => schema.format.clone().unwrap_or_else(|| "int64".into()),
        None => "interface {}".into(),
    }
}
