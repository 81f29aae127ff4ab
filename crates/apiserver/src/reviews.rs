//! Questions about access: (Self)SubjectAccessReview, SelfSubjectRulesReview, SelfSubjectReview.

use crate::rbac::{Action, Index};
use crate::user::User;
use godwit_machinery::status::{Cause, Status};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Whether this resource is a question that is answered and not stored.
pub(crate) fn is_review(group: &str, resource: &str) -> bool {
    match group {
        "authorization.k8s.io" => matches!(
            resource,
            "selfsubjectaccessreviews"
                | "subjectaccessreviews"
                | "localsubjectaccessreviews"
                | "selfsubjectrulesreviews"
        ),
        "authentication.k8s.io" => matches!(resource, "selfsubjectreviews" | "tokenreviews"),
        _ => false,
    }
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn texts(value: &Value, pointer: &str) -> Vec<String> {
    let list = value.pointer(pointer).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Answers the question in `body`; `namespace` is that of the path.
pub(crate) fn answer(
    resource: &str,
    namespace: &str,
    mut body: Value,
    user: &User,
    rbac: &Index,
) -> Result<Value, Status> {
    let status = match resource {
        "selfsubjectreviews" => json!({"userInfo": user_info(user)}),
        // No tokens are issued here, so none is good.
        "tokenreviews" => json!({"user": {}, "error": "this server issues no tokens: use client certificates"}),
        "selfsubjectrulesreviews" => rules(rbac, user, text(&body, "/spec/namespace")),
        "selfsubjectaccessreviews" => access("SelfSubjectAccessReview", &body, user, rbac)?,
        _ => {
            let kind =
                if resource == "subjectaccessreviews" { "SubjectAccessReview" } else { "LocalSubjectAccessReview" };
            if kind == "LocalSubjectAccessReview" && text(&body, "/spec/resourceAttributes/namespace") != namespace {
                let cause = Cause::invalid(
                    "spec.resourceAttributes.namespace",
                    &Value::String(text(&body, "/spec/resourceAttributes/namespace").to_owned()),
                    "must match metadata.namespace",
                );
                return Err(Status::invalid("authorization.k8s.io", kind, "", vec![cause]));
            }
            let name = text(&body, "/spec/user").to_owned();
            let groups = texts(&body, "/spec/groups");
            if name.is_empty() && groups.is_empty() {
                let cause = Cause::invalid("spec.user", &json!(""), "at least one of user or group must be specified");
                return Err(Status::invalid("authorization.k8s.io", kind, "", vec![cause]));
            }
            let other = User { name, groups, uid: String::new(), extra: BTreeMap::new() };
            access(kind, &body, &other, rbac)?
        }
    };
    if let Some(map) = body.as_object_mut() {
        map.insert("status".to_owned(), status);
        map.entry("metadata").or_insert_with(|| json!({"creationTimestamp": null}));
    }
    Ok(body)
}

fn user_info(user: &User) -> Value {
    let mut info = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        info["uid"] = json!(user.uid);
    }
    if !user.extra.is_empty() {
        info["extra"] = json!(user.extra);
    }
    info
}

fn access(kind: &str, body: &Value, user: &User, rbac: &Index) -> Result<Value, Status> {
    let objects = body.pointer("/spec/resourceAttributes").filter(|v| v.is_object());
    let paths = body.pointer("/spec/nonResourceAttributes").filter(|v| v.is_object());
    let action = match (objects, paths) {
        (Some(a), None) => Action {
            verb: text(a, "/verb"),
            group: text(a, "/group"),
            resource: text(a, "/resource"),
            subresource: text(a, "/subresource"),
            namespace: text(a, "/namespace"),
            name: text(a, "/name"),
            path: "",
        },
        (None, Some(a)) => Action { verb: text(a, "/verb"), path: text(a, "/path"), ..Action::default() },
        _ => {
            let cause = Cause::invalid(
                "spec.resourceAttributes",
                &Value::Null,
                "exactly one of nonResourceAttributes or resourceAttributes must be specified",
            );
            return Err(Status::invalid("authorization.k8s.io", kind, "", vec![cause]));
        }
    };
    Ok(match rbac.allowed(user, &action) {
        Some(why) if why.is_empty() => json!({"allowed": true}),
        Some(why) => json!({"allowed": true, "reason": why}),
        None => json!({"allowed": false}),
    })
}

fn rules(rbac: &Index, user: &User, namespace: &str) -> Value {
    let (mut resources, mut paths) = (Vec::new(), Vec::new());
    for rule in rbac.rules(user, namespace) {
        if rule.non_resource_urls.is_empty() {
            resources.push(json!(rule));
        } else {
            paths.push(json!({"verbs": rule.verbs, "nonResourceURLs": rule.non_resource_urls}));
        }
    }
    json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_needs_one_subject_and_one_object() {
        let index = Index::default();
        let ask = |body| answer("selfsubjectaccessreviews", "", body, &User::system(), &index);
        assert_eq!(ask(json!({"spec": {}})).unwrap_err().code, 422);
        let yes = ask(json!({"spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}}})).unwrap();
        assert_eq!(yes["status"], json!({"allowed": true}));
        let other = json!({"spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}}});
        assert_eq!(answer("subjectaccessreviews", "", other, &User::system(), &index).unwrap_err().code, 422);
    }
}
