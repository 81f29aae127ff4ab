//! The part of JSONPath that columns of custom resources use.
//!
//! `.a.b[0].c`, `['a.b']`, `.metadata.annotations.a\.b`, `[*]`, `[1:3]`, `[-1]`,
//! `.status.conditions[?(@.type=='Ready')].status`, with or without `{}` and `$` around.

use serde_json::Value;

/// A path that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct JsonPath {
    steps: Vec<Step>,
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Member(String),
    Index(i64),
    Slice(Option<i64>, Option<i64>),
    All,
    Filter(Filter),
}

#[derive(Debug, Clone, PartialEq)]
struct Filter {
    left: Vec<Step>,
    test: Option<(Comparison, Operand)>,
}

#[derive(Debug, Clone, PartialEq)]
enum Operand {
    Literal(Value),
    Path(Vec<Step>),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

const MAX_LENGTH: usize = 4096;
const MAX_RESULTS: usize = 10_000;

impl JsonPath {
    /// Reads a path.
    ///
    /// # Errors
    /// A sentence saying what is wrong with it.
    pub fn parse(text: &str) -> Result<JsonPath, String> {
        if text.len() > MAX_LENGTH {
            return Err(format!("JSONPath is longer than {MAX_LENGTH} bytes"));
        }
        let inner = text.trim();
        let inner = inner.strip_prefix('{').and_then(|t| t.strip_suffix('}')).unwrap_or(inner);
        let mut reader = Reader { rest: inner.trim() };
        reader.take("$");
        let steps = reader.steps(false)?;
        if steps.is_empty() && reader.rest.is_empty() && inner.trim() == "." {
            return Ok(JsonPath { steps });
        }
        if !reader.rest.is_empty() {
            return Err(format!("unexpected {:?} in JSONPath {text:?}", reader.rest));
        }
        Ok(JsonPath { steps })
    }

    /// Everything that the path leads to.
    pub fn find<'a>(&self, root: &'a Value) -> Vec<&'a Value> {
        walk(&self.steps, root)
    }
}

fn walk<'a>(steps: &[Step], root: &'a Value) -> Vec<&'a Value> {
    let mut found = vec![root];
    for step in steps {
        let mut next = Vec::new();
        for value in found {
            advance(step, value, &mut next);
            if next.len() > MAX_RESULTS {
                next.truncate(MAX_RESULTS);
                break;
            }
        }
        found = next;
    }
    found
}

fn place(index: i64, length: usize) -> Option<usize> {
    let length = i64::try_from(length).ok()?;
    let index = if index < 0 { index.checked_add(length)? } else { index };
    usize::try_from(index).ok()
}

fn advance<'a>(step: &Step, value: &'a Value, next: &mut Vec<&'a Value>) {
    match (step, value) {
        (Step::Member(name), Value::Object(map)) => next.extend(map.get(name)),
        (Step::Index(index), Value::Array(list)) => next.extend(place(*index, list.len()).and_then(|i| list.get(i))),
        (Step::Slice(from, to), Value::Array(list)) => {
            let from = from.map_or(Some(0), |i| place(i, list.len())).unwrap_or(0);
            let to = to.map_or(Some(list.len()), |i| place(i, list.len())).unwrap_or(0).min(list.len());
            next.extend(list.iter().take(to).skip(from));
        }
        (Step::All, Value::Array(list)) => next.extend(list),
        (Step::All, Value::Object(map)) => next.extend(map.values()),
        (Step::Filter(filter), Value::Array(list)) => next.extend(list.iter().filter(|item| filter.holds(item))),
        _ => {}
    }
}

impl Filter {
    fn holds(&self, item: &Value) -> bool {
        let left = walk(&self.left, item);
        let Some((comparison, right)) = &self.test else { return !left.is_empty() };
        let Some(left) = left.first() else { return false };
        match right {
            Operand::Literal(right) => comparison.holds(left, right),
            Operand::Path(path) => walk(path, item).first().is_some_and(|right| comparison.holds(left, right)),
        }
    }
}

impl Comparison {
    fn holds(self, left: &Value, right: &Value) -> bool {
        use std::cmp::Ordering;
        let order = match (left, right) {
            (Value::Number(a), Value::Number(b)) => match (a.as_i64(), b.as_i64()) {
                (Some(a), Some(b)) => Some(a.cmp(&b)),
                _ => a.as_f64().zip(b.as_f64()).and_then(|(a, b)| a.partial_cmp(&b)),
            },
            (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
            (a, b) => (a == b).then_some(Ordering::Equal),
        };
        match self {
            Comparison::Equal => order == Some(Ordering::Equal),
            Comparison::NotEqual => order != Some(Ordering::Equal),
            Comparison::Less => order == Some(Ordering::Less),
            Comparison::LessOrEqual => order.is_some_and(Ordering::is_le),
            Comparison::Greater => order == Some(Ordering::Greater),
            Comparison::GreaterOrEqual => order.is_some_and(Ordering::is_ge),
        }
    }
}

struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn take(&mut self, prefix: &str) -> bool {
        match self.rest.strip_prefix(prefix) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    /// Inside a filter, paths end at spaces, operators and the closing parenthesis, and do not nest filters.
    fn steps(&mut self, inside: bool) -> Result<Vec<Step>, String> {
        let mut steps = Vec::new();
        loop {
            if self.rest.starts_with("..") {
                return Err("recursive descent (..) is not supported".to_owned());
            } else if self.take(".") {
                if self.rest.starts_with('[') || (self.rest.is_empty() && steps.is_empty()) {
                    continue;
                }
                match self.name(inside) {
                    name if name == "*" => steps.push(Step::All),
                    name if name.is_empty() => return Err("a field name is missing after '.'".to_owned()),
                    name => steps.push(Step::Member(name)),
                }
            } else if self.take("[") {
                steps.push(self.bracket(inside)?);
            } else {
                return Ok(steps);
            }
        }
    }

    /// A bare name; a backslash takes the next character as it is.
    fn name(&mut self, inside: bool) -> String {
        let mut name = String::new();
        let mut chars = self.rest.char_indices();
        let mut end = self.rest.len();
        while let Some((i, c)) = chars.next() {
            match c {
                '\\' => name.extend(chars.next().map(|(_, escaped)| escaped)),
                '.' | '[' => {
                    end = i;
                    break;
                }
                ' ' | ')' | '=' | '!' | '<' | '>' if inside => {
                    end = i;
                    break;
                }
                c => name.push(c),
            }
        }
        self.rest = &self.rest[end..];
        name
    }

    /// A quoted text, if one starts here.
    fn quoted(&mut self) -> Result<Option<String>, String> {
        let Some(quote) = self.rest.chars().next().filter(|c| matches!(c, '\'' | '"')) else { return Ok(None) };
        let mut text = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((i, c)) = chars.next() {
            if c == quote {
                self.rest = &self.rest[i + c.len_utf8()..];
                return Ok(Some(text));
            }
            match c {
                '\\' => text.extend(chars.next().map(|(_, escaped)| escaped)),
                c => text.push(c),
            }
        }
        Err("a quoted text does not end".to_owned())
    }

    fn number(&mut self) -> Option<i64> {
        let end = self.rest.find(|c: char| !c.is_ascii_digit() && c != '-').unwrap_or(self.rest.len());
        let number = self.rest.get(..end)?.parse().ok()?;
        self.rest = self.rest.get(end..)?;
        Some(number)
    }

    fn bracket(&mut self, inside: bool) -> Result<Step, String> {
        self.skip_space();
        let step = if self.take("?(") {
            if inside {
                return Err("filters cannot be nested".to_owned());
            }
            let filter = self.filter()?;
            self.skip_space();
            if !self.take(")") {
                return Err("')' is missing after a filter".to_owned());
            }
            Step::Filter(filter)
        } else if self.take("*") {
            Step::All
        } else if let Some(name) = self.quoted()? {
            Step::Member(name)
        } else {
            let from = self.number();
            if self.take(":") {
                Step::Slice(from, self.number())
            } else {
                Step::Index(from.ok_or_else(|| format!("invalid array index at {:?}", self.rest))?)
            }
        };
        self.skip_space();
        if self.take("]") { Ok(step) } else { Err("']' is missing".to_owned()) }
    }

    fn filter(&mut self) -> Result<Filter, String> {
        self.skip_space();
        if !self.take("@") {
            return Err("a filter must start with '@'".to_owned());
        }
        let left = self.steps(true)?;
        self.skip_space();
        let comparison = [
            ("==", Comparison::Equal),
            ("!=", Comparison::NotEqual),
            ("<=", Comparison::LessOrEqual),
            (">=", Comparison::GreaterOrEqual),
            ("<", Comparison::Less),
            (">", Comparison::Greater),
        ]
        .into_iter()
        .find_map(|(sign, comparison)| self.take(sign).then_some(comparison));
        let Some(comparison) = comparison else { return Ok(Filter { left, test: None }) };
        self.skip_space();
        let operand = if self.take("@") {
            Operand::Path(self.steps(true)?)
        } else if let Some(text) = self.quoted()? {
            Operand::Literal(Value::String(text))
        } else {
            let end = self.rest.find([')', ' ']).unwrap_or(self.rest.len());
            let (word, rest) = self.rest.split_at(end);
            self.rest = rest;
            let literal: Value =
                serde_json::from_str(word).map_err(|_| format!("{word:?} is no value to compare with"))?;
            Operand::Literal(literal)
        };
        Ok(Filter { left, test: Some((comparison, operand)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn found(path: &str) -> Value {
        let object = json!({
            "a": {"b": [{"c": 1}, {"c": 2}, {"c": 3}]},
            "metadata": {"annotations": {"a.b/c": "x"}},
            "status": {"conditions": [{"type": "Ready", "status": "True", "n": 2}, {"type": "Live", "status": "False"}]},
        });
        JsonPath::parse(path).unwrap().find(&object).into_iter().cloned().collect()
    }

    #[test]
    fn follows_paths() {
        for (path, result) in [
            (".a.b[0].c", json!([1])),
            ("{.a.b[-1].c}", json!([3])),
            ("$.a.b[*].c", json!([1, 2, 3])),
            (".a.b[1:].c", json!([2, 3])),
            (".a.b[0:1].c", json!([1])),
            (".metadata.annotations['a.b/c']", json!(["x"])),
            (r".metadata.annotations['a\.b/c']", json!(["x"])),
            (r".metadata.annotations.a\.b/c", json!(["x"])),
            (".status.conditions[?(@.type=='Ready')].status", json!(["True"])),
            (".status.conditions[?(@.type == \"Live\")].status", json!(["False"])),
            (".status.conditions[?(@.n>1)].type", json!(["Ready"])),
            (".status.conditions[?(@.n)].type", json!(["Ready"])),
            (".status.conditions[?(@.type!='Ready')].type", json!(["Live"])),
            (".a.x", json!([])),
            (".a.b[7]", json!([])),
            (".a.b.c", json!([])),
        ] {
            assert_eq!(found(path), result, "{path}");
        }
    }

    #[test]
    fn refuses_what_it_cannot_follow() {
        for path in [".a[", ".a[?(@.b==", ".a['b", "a.b", ".a..b", ".a.", ".a[x]", ".a[?(@.b==c)]", ".a[?(@[?(@.b)])]"]
        {
            assert!(JsonPath::parse(path).is_err(), "{path}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(any in ".*", likely in r#"[.\[\]?(@)='"a\\*:0-9é!<>{}$ -]{0,24}"#) {
            let object = json!({"a": [{"a": 1}, [1, 2]]});
            for path in [any, likely] {
                if let Ok(path) = JsonPath::parse(&path) {
                    path.find(&object);
                }
            }
        }
    }
}
