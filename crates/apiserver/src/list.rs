//! Options of list and watch, and pages.

use crate::request::Params;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use godwit_machinery::selector::{FieldSelector, LabelSelector};
use godwit_machinery::status::{Cause, Status};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How a resourceVersion is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Match {
    /// Whatever is there.
    Any,
    /// The newest state, which must be at least this one.
    NotOlderThan(u64),
    /// The state at this revision.
    Exact(u64),
}

/// Options of list, watch and deletecollection.
#[derive(Debug, Clone)]
pub(crate) struct ListOptions {
    pub(crate) labels: LabelSelector,
    pub(crate) fields: FieldSelector,
    pub(crate) limit: usize,
    pub(crate) next: Option<Token>,
    pub(crate) at: Match,
    /// The parameter as sent; empty and `0` mean different things to a watch.
    pub(crate) resource_version: String,
    pub(crate) initial_events: Option<bool>,
    pub(crate) bookmarks: bool,
    pub(crate) timeout_seconds: Option<u64>,
}

/// Where a list goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Token {
    #[serde(rename = "rv")]
    pub(crate) revision: u64,
    /// The last key's part below the folder.
    pub(crate) start: String,
    #[serde(default)]
    v: String,
}

impl Token {
    pub(crate) fn new(revision: u64, start: &str) -> Self {
        Self { revision, start: start.to_owned(), v: "meta.k8s.io/v1".to_owned() }
    }

    pub(crate) fn encode(&self) -> String {
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default())
    }

    fn decode(text: &str) -> Option<Self> {
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).ok()?).ok()
    }
}

/// A resourceVersion as a number; empty is 0.
pub(crate) fn revision(text: &str) -> Result<u64, Status> {
    if text.is_empty() {
        return Ok(0);
    }
    text.parse().map_err(|_| {
        let cause = Cause::invalid(
            "resourceVersion",
            &Value::String(text.to_owned()),
            "strconv.ParseUint: parsing: invalid syntax",
        );
        Status::invalid("", "ListOptions", "", vec![cause])
    })
}

impl ListOptions {
    pub(crate) fn parse(params: &Params, group: &str, plural: &str, watch: bool) -> Result<Self, Status> {
        let labels = LabelSelector::parse(params.get("labelSelector"))?;
        let fields = FieldSelector::parse(params.get("fieldSelector"))?;
        fields.check(group, plural)?;
        let number = |key: &str| match params.get(key) {
            "" => Ok(None),
            text => text.parse::<i64>().map(Some).map_err(|_| {
                Status::bad_request(format!("strconv.ParseInt: parsing {text:?}: invalid syntax ({key})"))
            }),
        };
        let limit = usize::try_from(number("limit")?.unwrap_or(0)).unwrap_or(0);
        let timeout_seconds = number("timeoutSeconds")?.and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0);
        let resource_version = params.get("resourceVersion").to_owned();
        let how = params.get("resourceVersionMatch");
        let initial_events = params.has("sendInitialEvents").then(|| params.flag("sendInitialEvents"));
        let next = params.get("continue");
        check(watch, &resource_version, how, initial_events, !next.is_empty())?;
        let next = match next {
            "" => None,
            text => Some(
                Token::decode(text)
                    .ok_or_else(|| Status::bad_request("continue key is not valid: it must be as a list gave it"))?,
            ),
        };
        let number = revision(&resource_version)?;
        let at = match (&next, how, number) {
            (Some(token), _, _) => Match::Exact(token.revision),
            (None, "Exact", number) => Match::Exact(number),
            (None, _, 0) => Match::Any,
            // What it meant before there was a resourceVersionMatch.
            (None, "", number) if limit > 0 && !watch => Match::Exact(number),
            (None, _, number) => Match::NotOlderThan(number),
        };
        let bookmarks = params.flag("allowWatchBookmarks");
        Ok(Self { labels, fields, limit, next, at, resource_version, initial_events, bookmarks, timeout_seconds })
    }

    /// Whether everything is wanted.
    pub(crate) fn everything(&self) -> bool {
        self.labels.is_everything() && self.fields.is_everything()
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        self.labels.matches(object) && self.fields.matches(object)
    }
}

/// The rules between resourceVersion, resourceVersionMatch, sendInitialEvents and continue.
fn check(watch: bool, version: &str, how: &str, initial: Option<bool>, continues: bool) -> Result<(), Status> {
    let mut causes = Vec::new();
    let forbidden = |field: &str, detail: &str| Cause::forbidden(field, detail);
    if initial.is_some() && !watch {
        causes.push(forbidden("sendInitialEvents", "sendInitialEvents is forbidden for list"));
    }
    if initial.is_some() && how.is_empty() && watch {
        let detail = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
        causes.push(forbidden("resourceVersionMatch", detail));
    }
    match how {
        "" => {}
        "Exact" | "NotOlderThan" if watch => {
            if initial.is_none() {
                let detail = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
                causes.push(forbidden("resourceVersionMatch", detail));
            }
            if how == "Exact" {
                let detail = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
                causes.push(forbidden("resourceVersionMatch", detail));
            }
        }
        "Exact" | "NotOlderThan" => {
            if continues {
                causes.push(forbidden(
                    "resourceVersionMatch",
                    "resourceVersionMatch is forbidden when continue is provided",
                ));
            }
            if version.is_empty() {
                let detail = "resourceVersionMatch is forbidden unless resourceVersion is provided";
                causes.push(forbidden("resourceVersionMatch", detail));
            }
            if how == "Exact" && version == "0" {
                let detail = "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"";
                causes.push(forbidden("resourceVersionMatch", detail));
            }
        }
        other => {
            let value = Value::String(other.to_owned());
            causes.push(Cause::not_supported("resourceVersionMatch", &value, &["Exact", "NotOlderThan"]));
        }
    }
    if continues && !version.is_empty() && version != "0" {
        return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
    }
    if causes.is_empty() { Ok(()) } else { Err(Status::invalid("meta.k8s.io", "ListOptions", "", causes)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(query: &str, watch: bool) -> Result<ListOptions, u16> {
        let uri = format!("/x?{query}").parse().unwrap();
        ListOptions::parse(&Params::parse(&uri), "", "pods", watch).map_err(|status| status.code)
    }

    #[test]
    fn versions_mean_what_kubernetes_says() {
        let at = |query| options(query, false).map(|o| o.at);
        assert_eq!(at(""), Ok(Match::Any));
        assert_eq!(at("resourceVersion=0"), Ok(Match::Any));
        assert_eq!(at("resourceVersion=5"), Ok(Match::NotOlderThan(5)));
        assert_eq!(at("resourceVersion=5&limit=1"), Ok(Match::Exact(5)));
        assert_eq!(at("resourceVersion=5&resourceVersionMatch=Exact"), Ok(Match::Exact(5)));
        for bad in [
            "resourceVersionMatch=Exact",
            "resourceVersion=0&resourceVersionMatch=Exact",
            "resourceVersion=1&resourceVersionMatch=Odd",
            "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&resourceVersion=1",
            "resourceVersion=x",
        ] {
            assert_eq!(at(bad), Err(422), "{bad}");
        }
        assert_eq!(at("continue=%21"), Err(400));
        assert_eq!(at("limit=x"), Err(400));
        assert_eq!(at("fieldSelector=spec.odd%3Dx"), Err(400));
        assert_eq!(at("labelSelector=a+in"), Err(400));
    }

    #[test]
    fn initial_events_need_not_older_than() {
        assert_eq!(options("sendInitialEvents=true", true).map(|_| ()), Err(422));
        let good = options("sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true", true);
        assert_eq!(good.map(|o| o.initial_events), Ok(Some(true)));
    }

    #[test]
    fn tokens_go_round() {
        let token = Token::new(7, "ns/na/me");
        assert_eq!(Token::decode(&token.encode()), Some(token));
        let options = options(&format!("continue={}", Token::new(7, "a").encode()), false).unwrap();
        assert_eq!(options.at, Match::Exact(7));
    }
}
