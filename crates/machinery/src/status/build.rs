//! One constructor for each kind of answer, with the wording that Kubernetes' clients know.

use super::{Cause, Details, Status, causes};
use serde_json::{Value, json};

/// Body (plain text) of a request for a path that does not exist.
pub const PAGE_NOT_FOUND: &str = "404 page not found\n";

/// Who wants to do what, for the sentence of a refusal.
#[derive(Debug, Clone, Copy, Default)]
pub struct Attributes<'a> {
    /// User name.
    pub user: &'a str,
    /// `get`, `list`, …
    pub verb: &'a str,
    /// API group, empty for core.
    pub group: &'a str,
    /// Plural resource; empty for a request that is not about one.
    pub resource: &'a str,
    /// `log`, `status`, … or empty.
    pub subresource: &'a str,
    /// Namespace, empty at the cluster scope.
    pub namespace: &'a str,
    /// Object name or empty.
    pub name: &'a str,
    /// URL path of a request that is not about a resource.
    pub path: &'a str,
}

/// `pods` or `virtualmachines.kubevirt.io`.
fn qualified(group: &str, plural: &str) -> String {
    if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") }
}

fn about(group: &str, kind: &str, name: &str) -> Details {
    Details { group: group.to_owned(), kind: kind.to_owned(), name: name.to_owned(), ..Details::default() }
}

impl Status {
    /// Any answer; the named constructors below are preferred.
    pub fn new(code: u16, reason: &str, message: impl Into<String>) -> Status {
        Status {
            code,
            reason: reason.to_owned(),
            message: message.into(),
            details: None,
            continue_token: String::new(),
        }
    }

    /// The same answer with details.
    #[must_use]
    pub fn with_details(mut self, details: Details) -> Status {
        self.details = Some(Box::new(details));
        self
    }

    /// 404: `pods "x" not found`.
    pub fn not_found(group: &str, plural: &str, name: &str) -> Status {
        Status::new(404, "NotFound", format!("{} {name:?} not found", qualified(group, plural)))
            .with_details(about(group, plural, name))
    }

    /// 404 for a resource or subresource that is not served.
    pub fn no_such_resource() -> Status {
        Status::new(404, "NotFound", "the server could not find the requested resource")
            .with_details(Details::default())
    }

    /// 409: `pods "x" already exists`.
    pub fn already_exists(group: &str, plural: &str, name: &str) -> Status {
        Status::new(409, "AlreadyExists", format!("{} {name:?} already exists", qualified(group, plural)))
            .with_details(about(group, plural, name))
    }

    /// 409 with a reason of its own: `Operation cannot be fulfilled on pods "x": why`.
    pub fn conflict_because(group: &str, plural: &str, name: &str, why: &str) -> Status {
        let on = qualified(group, plural);
        Status::new(409, "Conflict", format!("Operation cannot be fulfilled on {on} {name:?}: {why}"))
            .with_details(about(group, plural, name))
    }

    /// 409: the object was changed since the caller read it.
    pub fn conflict(group: &str, plural: &str, name: &str) -> Status {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        Status::conflict_because(group, plural, name, why)
    }

    /// 409: the UID asked for is not the UID that lives.
    pub fn precondition_uid(group: &str, plural: &str, name: &str, wanted: &str, found: &str) -> Status {
        let why = format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}");
        Status::conflict_because(group, plural, name, &why)
    }

    /// 409: the resourceVersion asked for is not the one that lives.
    pub fn precondition_resource_version(group: &str, plural: &str, name: &str, wanted: &str, found: &str) -> Status {
        let why = format!(
            "Precondition failed: ResourceVersion in precondition: {wanted}, ResourceVersion in object meta: {found}"
        );
        Status::conflict_because(group, plural, name, &why)
    }

    /// 422: `Pod "x" is invalid: …`. `kind` is the kind, not the plural.
    pub fn invalid(group: &str, kind: &str, name: &str, list: Vec<Cause>) -> Status {
        let message = format!("{} {name:?} is invalid: {}", qualified(group, kind), causes::aggregate(&list));
        Status::new(422, "Invalid", message).with_details(Details { causes: list, ..about(group, kind, name) })
    }

    /// 422 without a field to name, as for patches that cannot be applied.
    pub fn unprocessable(why: impl std::fmt::Display) -> Status {
        let message = format!("the server rejected our request due to an error in our request: {why}");
        Status::new(422, "Invalid", message).with_details(Details::default())
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Status {
        Status::new(400, "BadRequest", message)
    }

    /// 403: `pods "x" is forbidden: why`; used for refusals of admission, too.
    pub fn forbidden(group: &str, plural: &str, name: &str, why: &str) -> Status {
        let what = qualified(group, plural);
        let message = match (plural.is_empty(), name.is_empty()) {
            (true, _) => format!("forbidden: {why}"),
            (false, true) => format!("{what} is forbidden: {why}"),
            (false, false) => format!("{what} {name:?} is forbidden: {why}"),
        };
        Status::new(403, "Forbidden", message).with_details(about(group, plural, name))
    }

    /// 403 by authorisation: `… User "u" cannot get resource "pods" in API group "" in the namespace "ns"`.
    pub fn forbidden_user(a: &Attributes<'_>) -> Status {
        if a.resource.is_empty() {
            let why = format!("User {:?} cannot {} path {:?}", a.user, a.verb, a.path);
            return Status::forbidden("", "", "", &why);
        }
        let resource = match a.subresource {
            "" => a.resource.to_owned(),
            sub => format!("{}/{sub}", a.resource),
        };
        let scope = match a.namespace {
            "" => "at the cluster scope".to_owned(),
            ns => format!("in the namespace {ns:?}"),
        };
        let why =
            format!("User {:?} cannot {} resource {resource:?} in API group {:?} {scope}", a.user, a.verb, a.group);
        Status::forbidden(a.group, a.resource, a.name, &why)
    }

    /// 401.
    pub fn unauthorized() -> Status {
        Status::new(401, "Unauthorized", "Unauthorized")
    }

    /// 405: `patch is not supported on resources of kind "pods"`.
    pub fn method_not_supported(group: &str, plural: &str, verb: &str) -> Status {
        let message = format!("{verb} is not supported on resources of kind {:?}", qualified(group, plural));
        Status::new(405, "MethodNotAllowed", message).with_details(about(group, plural, ""))
    }

    /// 405 for an HTTP method on a path that does not know it.
    pub fn method_not_allowed() -> Status {
        Status::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
            .with_details(Details::default())
    }

    /// 406.
    pub fn not_acceptable(accepted: &[&str]) -> Status {
        let message = format!("only the following media types are accepted: {}", accepted.join(", "));
        Status::new(406, "NotAcceptable", message)
    }

    /// 415.
    pub fn unsupported_media_type(accepted: &[&str]) -> Status {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        Status::new(415, "UnsupportedMediaType", message)
    }

    /// 413.
    pub fn request_entity_too_large(limit: usize) -> Status {
        Status::new(413, "RequestEntityTooLarge", format!("Request entity too large: limit is {limit}"))
    }

    /// 410 for a watch or list from a revision that is gone: `too old resource version: N (M)`.
    pub fn expired(requested: u64, oldest: u64) -> Status {
        Status::new(410, "Expired", format!("too old resource version: {requested} ({oldest})"))
    }

    /// 410 for a continue token whose revision is gone; `token` goes on from the present state (empty: none to offer).
    pub fn expired_continue(token: &str) -> Status {
        let mut status = if token.is_empty() {
            Status::new(
                410,
                "Expired",
                "The provided continue parameter is too old to display a consistent list result. You must start a \
                 new list without the continue parameter.",
            )
        } else {
            Status::new(
                410,
                "Expired",
                "The provided continue parameter is too old to display a consistent list result. You can start a \
                 new list without the continue parameter, or use the continue token in this response to retrieve \
                 the remainder of the results. Continuing with the provided token results in an inconsistent list \
                 - objects that were created, modified, or deleted between the time the first chunk was returned \
                 and now may show up in the list.",
            )
        };
        status.continue_token = token.to_owned();
        status
    }

    /// 504: `Timeout: why`.
    pub fn timeout(why: &str, retry_after_seconds: u32) -> Status {
        Status::new(504, "Timeout", format!("Timeout: {why}"))
            .with_details(Details { retry_after_seconds, ..Details::default() })
    }

    /// 504: the caller has seen a revision that is not here yet.
    pub fn too_large_resource_version(requested: u64, current: u64) -> Status {
        let mut status = Status::timeout(&format!("Too large resource version: {requested}, current: {current}"), 1);
        if let Some(details) = &mut status.details {
            details.causes.push(Cause {
                reason: "ResourceVersionTooLarge".to_owned(),
                message: "Too large resource version".to_owned(),
                field: String::new(),
            });
        }
        status
    }

    /// 429; `cause` such as (`DisruptionBudget`, `The disruption budget x needs 1 healthy pods and has 1 currently`).
    pub fn too_many_requests(message: &str, retry_after_seconds: u32, cause: Option<(&str, &str)>) -> Status {
        let causes = cause
            .map(|(reason, message)| Cause {
                reason: reason.to_owned(),
                message: message.to_owned(),
                field: String::new(),
            })
            .into_iter()
            .collect();
        Status::new(429, "TooManyRequests", message).with_details(Details {
            retry_after_seconds,
            causes,
            ..Details::default()
        })
    }

    /// 500: `Internal error occurred: why`.
    pub fn internal_error(why: impl std::fmt::Display) -> Status {
        let why = why.to_string();
        Status::new(500, "InternalError", format!("Internal error occurred: {why}"))
            .with_details(Details { causes: vec![Cause { message: why, ..Cause::default() }], ..Details::default() })
    }

    /// 503: `why`, for a server that is starting or stopping.
    pub fn service_unavailable(why: &str) -> Status {
        Status::new(503, "ServiceUnavailable", why)
    }

    /// The body: kind Status, apiVersion v1, status Failure.
    pub fn to_value(&self) -> Value {
        let mut metadata = json!({});
        if !self.continue_token.is_empty() {
            metadata["continue"] = Value::String(self.continue_token.clone());
        }
        let mut body = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": metadata,
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        });
        if let Some(details) = &self.details {
            body["details"] = details.to_value();
        }
        body
    }

    /// Reads a Status object; nothing if it is not one or says Success.
    pub fn from_value(value: &Value) -> Option<Status> {
        if value.get("kind")?.as_str()? != "Status" || value.get("status")?.as_str()? != "Failure" {
            return None;
        }
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
        let code = value.get("code").and_then(Value::as_u64).and_then(|c| u16::try_from(c).ok()).unwrap_or(500);
        let mut status = Status::new(code, text("reason"), text("message"));
        status.details = value.get("details").and_then(|d| serde_json::from_value(d.clone()).ok());
        status.continue_token =
            value.pointer("/metadata/continue").and_then(Value::as_str).unwrap_or_default().to_owned();
        Some(status)
    }
}

impl Details {
    fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_else(|_| json!({}))
    }
}

/// The body of an answer without an object, such as to a delete: kind Status, status Success.
pub fn success(details: Option<Details>) -> Value {
    let mut body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"});
    if let Some(details) = details {
        body["details"] = details.to_value();
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_object() {
        let status = Status::not_found("kubevirt.io", "virtualmachines", "a");
        assert_eq!(status.message, "virtualmachines.kubevirt.io \"a\" not found");
        assert_eq!((status.code, status.reason.as_str()), (404, "NotFound"));
        assert_eq!(
            status.to_value(),
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 404,
                "reason": "NotFound", "message": "virtualmachines.kubevirt.io \"a\" not found",
                "details": {"name": "a", "group": "kubevirt.io", "kind": "virtualmachines"}})
        );
        assert_eq!(Status::from_value(&status.to_value()), Some(status));
    }

    #[test]
    fn joins_causes() {
        let one = Status::invalid("", "Pod", "x", vec![Cause::required("spec.y", "")]);
        assert_eq!(one.message, "Pod \"x\" is invalid: spec.y: Required value");
        let two = Status::invalid(
            "apps",
            "Deployment",
            "x",
            vec![
                Cause::required("spec.y", "name it"),
                Cause::not_supported("spec.z", &json!("q"), &["a", "b"]),
                Cause::required("spec.y", "name it"),
            ],
        );
        assert_eq!(
            two.message,
            "Deployment.apps \"x\" is invalid: [spec.y: Required value: name it, \
             spec.z: Unsupported value: \"q\": supported values: \"a\", \"b\"]"
        );
    }

    #[test]
    fn forbids_in_a_namespace_and_everywhere() {
        let mut a = Attributes { user: "u", verb: "get", resource: "pods", name: "x", ..Attributes::default() };
        a.namespace = "ns";
        assert_eq!(
            Status::forbidden_user(&a).message,
            "pods \"x\" is forbidden: User \"u\" cannot get resource \"pods\" in API group \"\" in the namespace \"ns\""
        );
        a = Attributes {
            user: "u",
            verb: "list",
            group: "g",
            resource: "r",
            subresource: "s",
            ..Attributes::default()
        };
        assert_eq!(
            Status::forbidden_user(&a).message,
            "r.g is forbidden: User \"u\" cannot list resource \"r/s\" in API group \"g\" at the cluster scope"
        );
        a = Attributes { user: "u", verb: "get", path: "/x", ..Attributes::default() };
        assert_eq!(Status::forbidden_user(&a).message, "forbidden: User \"u\" cannot get path \"/x\"");
    }

    #[test]
    fn offers_the_rest_of_a_list() {
        assert_eq!(Status::expired_continue("t").to_value()["metadata"], json!({"continue": "t"}));
        assert_eq!(Status::expired(3, 7).message, "too old resource version: 3 (7)");
    }

    #[test]
    fn says_when_to_come_again() {
        let status = Status::too_many_requests("no", 10, Some(("DisruptionBudget", "why")));
        assert_eq!(
            status.to_value()["details"],
            json!({"retryAfterSeconds": 10, "causes": [{"reason": "DisruptionBudget", "message": "why"}]})
        );
    }
}
