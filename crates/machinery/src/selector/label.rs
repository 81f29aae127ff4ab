//! Label selectors, as strings in queries and as structured objects in specifications.

use crate::meta;
use crate::names;
use crate::status::{Cause, Status};
use serde_json::Value;
use std::fmt;

/// How a requirement compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// The value is one of these.
    In,
    /// There is no such label or its value is none of these.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
    /// The value is a whole number greater than this.
    GreaterThan,
    /// The value is a whole number less than this.
    LessThan,
}

/// One condition on one label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement {
    /// Label key.
    pub key: String,
    /// How to compare.
    pub operator: Operator,
    /// With what; sorted, without repetitions.
    pub values: Vec<String>,
}

/// All requirements must hold; without any, everything matches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
    nothing: bool,
}

impl Requirement {
    /// A checked requirement.
    ///
    /// # Errors
    /// The cause: bad key, bad values or the wrong number of them.
    pub fn new(key: &str, operator: Operator, values: Vec<String>) -> Result<Requirement, Cause> {
        if let Some(error) = names::qualified(key).first() {
            return Err(Cause::invalid("key", &key.into(), error));
        }
        let shown = || Value::from(values.clone());
        match operator {
            Operator::In | Operator::NotIn if values.is_empty() => {
                let detail = "for 'in', 'notin' operators, values set can't be empty";
                return Err(Cause::invalid("values", &shown(), detail));
            }
            Operator::Exists | Operator::DoesNotExist if !values.is_empty() => {
                let detail = "values set must be empty for exists and does not exist";
                return Err(Cause::invalid("values", &shown(), detail));
            }
            Operator::GreaterThan | Operator::LessThan => match values.as_slice() {
                [one] if one.parse::<i64>().is_err() => {
                    let detail = "for 'Gt', 'Lt' operators, the value must be an integer";
                    return Err(Cause::invalid("values[0]", &one.as_str().into(), detail));
                }
                [_] => {}
                _ => {
                    let detail = "for 'Gt', 'Lt' operators, exactly one value is required";
                    return Err(Cause::invalid("values", &shown(), detail));
                }
            },
            _ => {}
        }
        for (i, value) in values.iter().enumerate() {
            if let Some(error) = names::label_value(value).first() {
                return Err(Cause::invalid(format!("values[{i}][{key}]"), &value.as_str().into(), error));
            }
        }
        let mut values = values;
        values.sort();
        values.dedup();
        Ok(Requirement { key: key.to_owned(), operator, values })
    }

    fn matches(&self, value: Option<&str>) -> bool {
        let listed = |v: &str| self.values.iter().any(|x| x == v);
        let ordered = |wanted: std::cmp::Ordering| match (value, self.values.first()) {
            (Some(value), Some(bound)) => match (value.parse::<i64>(), bound.parse::<i64>()) {
                (Ok(value), Ok(bound)) => value.cmp(&bound) == wanted,
                _ => false,
            },
            _ => false,
        };
        match self.operator {
            Operator::In => value.is_some_and(listed),
            Operator::NotIn => !value.is_some_and(listed),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::GreaterThan => ordered(std::cmp::Ordering::Greater),
            Operator::LessThan => ordered(std::cmp::Ordering::Less),
        }
    }
}

impl LabelSelector {
    /// Matches every object.
    pub fn everything() -> LabelSelector {
        LabelSelector::default()
    }

    /// Matches no object, as an absent structured selector does.
    pub fn nothing() -> LabelSelector {
        LabelSelector { requirements: Vec::new(), nothing: true }
    }

    /// Selects nothing away.
    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty() && !self.nothing
    }

    /// The requirements.
    pub fn requirements(&self) -> &[Requirement] {
        &self.requirements
    }

    /// The one value that a label must have, for indexes.
    pub fn exact(&self, key: &str) -> Option<&str> {
        self.requirements.iter().find_map(|r| match (r.operator, r.values.as_slice()) {
            (Operator::In, [value]) if r.key == key => Some(value.as_str()),
            _ => None,
        })
    }

    /// Reads `a=b,a==b,c!=d,e in (x,y),f notin (z),g,!h,i>1`.
    ///
    /// # Errors
    /// 400 BadRequest with what was found and what was expected.
    pub fn parse(text: &str) -> Result<LabelSelector, Status> {
        let requirements = Parser { tokens: lex(text), at: 0 }
            .requirements()
            .map_err(|why| Status::bad_request(format!("unable to parse requirement: {why}")))?;
        Ok(LabelSelector { requirements, nothing: false })
    }

    /// Reads a structured selector (`matchLabels`, `matchExpressions`). null matches nothing, `{}` everything.
    ///
    /// # Errors
    /// Causes with fields relative to the selector.
    pub fn from_object(selector: &Value) -> Result<LabelSelector, Vec<Cause>> {
        if selector.is_null() {
            return Ok(LabelSelector::nothing());
        }
        let Some(selector) = selector.as_object() else {
            return Err(vec![Cause::type_invalid("", selector, "must be a label selector")]);
        };
        let mut causes = Vec::new();
        let mut requirements = Vec::new();
        let mut push = |at: &str, made: Result<Requirement, Cause>| match made {
            Ok(requirement) => requirements.push(requirement),
            Err(cause) => causes.push(Cause { field: format!("{at}{}", cause.field), ..cause }),
        };
        for (key, value) in selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
            let value = value.as_str().unwrap_or_default().to_owned();
            push("matchLabels.", Requirement::new(key, Operator::In, vec![value]));
        }
        let expressions = selector.get("matchExpressions").and_then(Value::as_array);
        for (i, expression) in expressions.into_iter().flatten().enumerate() {
            let at = format!("matchExpressions[{i}].");
            let text = |key: &str| expression.get(key).and_then(Value::as_str).unwrap_or_default();
            let values = expression.get("values").and_then(Value::as_array).into_iter().flatten();
            let values = values.map(|v| v.as_str().unwrap_or_default().to_owned()).collect();
            let operator = match text("operator") {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                // Node affinity only; harmless elsewhere.
                "Gt" => Operator::GreaterThan,
                "Lt" => Operator::LessThan,
                other => {
                    let detail = "not a valid selector operator";
                    push(&at, Err(Cause::invalid("operator", &other.into(), detail)));
                    continue;
                }
            };
            push(&at, Requirement::new(text("key"), operator, values));
        }
        if causes.is_empty() { Ok(LabelSelector { requirements, nothing: false }) } else { Err(causes) }
    }

    /// Does it select this object (by its `metadata.labels`)?
    pub fn matches(&self, object: &Value) -> bool {
        let labels = meta::labels(object);
        self.matches_labels(|key| labels?.get(key)?.as_str())
    }

    /// Does it select something with these labels?
    pub fn matches_labels<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        !self.nothing && self.requirements.iter().all(|r| r.matches(label(&r.key)))
    }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, r) in self.requirements.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            let (key, values) = (&r.key, r.values.join(","));
            match (r.operator, r.values.len()) {
                (Operator::In, 1) => write!(f, "{key}={values}")?,
                (Operator::NotIn, 1) => write!(f, "{key}!={values}")?,
                (Operator::In, _) => write!(f, "{key} in ({values})")?,
                (Operator::NotIn, _) => write!(f, "{key} notin ({values})")?,
                (Operator::Exists, _) => write!(f, "{key}")?,
                (Operator::DoesNotExist, _) => write!(f, "!{key}")?,
                (Operator::GreaterThan, _) => write!(f, "{key}>{values}")?,
                (Operator::LessThan, _) => write!(f, "{key}<{values}")?,
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    Sign(&'a str),
    End,
}

impl Token<'_> {
    fn literal(&self) -> &str {
        match self {
            Token::Word(text) | Token::Sign(text) => text,
            Token::End => "",
        }
    }
}

fn lex(text: &str) -> Vec<Token<'_>> {
    let special = |c: char| matches!(c, '=' | '!' | '(' | ')' | ',' | '>' | '<');
    let space = |c: char| matches!(c, ' ' | '\t' | '\r' | '\n');
    let mut tokens = Vec::new();
    let mut rest = text.trim_start_matches(space);
    while let Some(first) = rest.chars().next() {
        let length = if special(first) {
            if rest.starts_with("==") || rest.starts_with("!=") { 2 } else { 1 }
        } else {
            rest.find(|c| special(c) || space(c)).unwrap_or(rest.len())
        };
        let (token, tail) = rest.split_at(length);
        tokens.push(if special(first) { Token::Sign(token) } else { Token::Word(token) });
        rest = tail.trim_start_matches(space);
    }
    tokens
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Token<'a> {
        self.tokens.get(self.at).copied().unwrap_or(Token::End)
    }

    fn next(&mut self) -> Token<'a> {
        let token = self.peek();
        self.at += 1;
        token
    }

    fn requirements(mut self) -> Result<Vec<Requirement>, String> {
        let mut list = Vec::new();
        loop {
            match self.peek() {
                Token::End => return Ok(list),
                Token::Word(_) | Token::Sign("!") => list.push(self.requirement()?),
                other => {
                    return Err(format!("found '{}', expected: !, identifier, or 'end of string'", other.literal()));
                }
            }
            match self.next() {
                Token::End => return Ok(list),
                Token::Sign(",") => match self.peek() {
                    Token::Word(_) | Token::Sign("!") => {}
                    other => return Err(format!("found '{}', expected: identifier after ','", other.literal())),
                },
                other => return Err(format!("found '{}', expected: ',' or 'end of string'", other.literal())),
            }
        }
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let made = |key: &str, operator, values| Requirement::new(key, operator, values).map_err(|cause| cause.line());
        let absent = self.peek() == Token::Sign("!");
        if absent {
            self.next();
        }
        let key = match self.next() {
            Token::Word(key) => key,
            other => return Err(format!("found '{}', expected: identifier", other.literal())),
        };
        if absent {
            return made(key, Operator::DoesNotExist, vec![]);
        }
        match self.peek() {
            Token::End | Token::Sign(",") => return made(key, Operator::Exists, vec![]),
            _ => {}
        }
        let operator = match self.next() {
            Token::Sign("=" | "==") => Operator::In,
            Token::Sign("!=") => Operator::NotIn,
            Token::Sign(">") => Operator::GreaterThan,
            Token::Sign("<") => Operator::LessThan,
            Token::Word("in") => return made(key, Operator::In, self.set()?),
            Token::Word("notin") => return made(key, Operator::NotIn, self.set()?),
            other => return Err(format!("found '{}', expected: in, notin, =, ==, !=, gt, lt", other.literal())),
        };
        let value = match self.peek() {
            // `a=` means the empty value.
            Token::End | Token::Sign(",") => "",
            Token::Word(value) => {
                self.next();
                value
            }
            other => return Err(format!("found '{}', expected: identifier", other.literal())),
        };
        made(key, operator, vec![value.to_owned()])
    }

    /// `(x,y)`; what is missing between commas is the empty value.
    fn set(&mut self) -> Result<Vec<String>, String> {
        match self.next() {
            Token::Sign("(") => {}
            other => return Err(format!("found '{}' expected: '('", other.literal())),
        }
        let mut values = Vec::new();
        loop {
            let value = match self.peek() {
                Token::Word(value) => {
                    self.next();
                    value
                }
                Token::Sign("," | ")") => "",
                other => return Err(format!("found '{}', expected: ',', ')' or identifier", other.literal())),
            };
            values.push(value.to_owned());
            match self.next() {
                Token::Sign(",") => {}
                Token::Sign(")") => return Ok(values),
                other => return Err(format!("found '{}', expected: ',' or ')'", other.literal())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn matches(selector: &str, labels: Value) -> bool {
        LabelSelector::parse(selector).unwrap().matches(&json!({"metadata": {"labels": labels}}))
    }

    #[test]
    fn matches_what_it_says() {
        let labels = json!({"a": "b", "e": "x", "n": "5", "empty": "", "in": "notin"});
        for yes in [
            "",
            "a=b",
            "a==b",
            "a = b",
            "c!=d",
            "a!=c",
            "e in (x,y)",
            "f notin (z)",
            "a,e",
            "!h",
            "n>4",
            "n<6",
            "empty=",
            "a=b,empty=,e",
            "in in (notin)",
            "empty in ()",
            "e in (x, y ),a",
            " ",
        ] {
            assert!(matches(yes, labels.clone()), "{yes}");
        }
        for no in ["a=c", "a!=b", "e in (y)", "e notin (x)", "h", "!a", "n>5", "a>1", "x>1", "a=b,h"] {
            assert!(!matches(no, labels.clone()), "{no}");
        }
    }

    #[test]
    fn says_what_is_wrong() {
        for (bad, text) in [
            ("a=b=c", "unable to parse requirement: found '=', expected: ',' or 'end of string'"),
            (",a", "unable to parse requirement: found ',', expected: !, identifier, or 'end of string'"),
            ("a,", "unable to parse requirement: found '', expected: identifier after ','"),
            ("a in x", "unable to parse requirement: found 'x' expected: '('"),
            ("a in (x", "unable to parse requirement: found '', expected: ',' or ')'"),
            ("a b", "unable to parse requirement: found 'b', expected: in, notin, =, ==, !=, gt, lt"),
            ("!", "unable to parse requirement: found '', expected: identifier"),
        ] {
            let status = LabelSelector::parse(bad).unwrap_err();
            assert_eq!((status.code, status.message.as_str()), (400, text), "{bad}");
        }
        let status = LabelSelector::parse("a=b c").unwrap_err();
        assert_eq!(status.code, 400);
        let status = LabelSelector::parse("a/b/c=d").unwrap_err();
        assert!(status.message.starts_with("unable to parse requirement: key: Invalid value: \"a/b/c\": a qualified"));
        let status = LabelSelector::parse("a=$").unwrap_err();
        assert!(status.message.starts_with("unable to parse requirement: values[0][a]: Invalid value: \"$\": a valid"));
    }

    #[test]
    fn reads_structures() {
        let selector = LabelSelector::from_object(&json!({"matchLabels": {"a": "b"}, "matchExpressions": [
            {"key": "c", "operator": "In", "values": ["d", "e"]}, {"key": "f", "operator": "DoesNotExist"}]}))
        .unwrap();
        assert_eq!(selector.to_string(), "a=b,c in (d,e),!f");
        assert_eq!(selector.exact("a"), Some("b"));
        assert!(selector.matches(&json!({"metadata": {"labels": {"a": "b", "c": "e"}}})));
        assert!(!selector.matches(&json!({"metadata": {"labels": {"a": "b", "c": "e", "f": ""}}})));
        assert!(!LabelSelector::from_object(&json!(null)).unwrap().matches(&json!({})));
        assert!(LabelSelector::from_object(&json!({})).unwrap().matches(&json!({})));
        let causes =
            LabelSelector::from_object(&json!({"matchExpressions": [{"key": "a", "operator": "Is"}]})).unwrap_err();
        assert_eq!(
            causes[0].line(),
            "matchExpressions[0].operator: Invalid value: \"Is\": not a valid selector operator"
        );
    }

    proptest! {
        #[test]
        fn never_panics_and_prints_what_it_read(text in "[a-c!=(), <>inotx/.0-9é-]{0,24}") {
            if let Ok(selector) = LabelSelector::parse(&text) {
                prop_assert_eq!(LabelSelector::parse(&selector.to_string()).unwrap(), selector);
            }
        }

        #[test]
        fn never_panics_on_anything(text in ".*") {
            let _ = LabelSelector::parse(&text);
        }
    }
}
