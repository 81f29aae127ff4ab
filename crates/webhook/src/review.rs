//! The request's half of an `AdmissionReview` (admission.k8s.io/v1).

use std::collections::BTreeMap;

use godwit_api::admission::{Operation, User};
use serde::Deserialize;
use serde_json::Value;

use crate::routes::Route;

/// The version that is spoken.
pub const API_VERSION: &str = "admission.k8s.io/v1";
/// The kind.
pub const KIND: &str = "AdmissionReview";

/// Why a body is no review that can be answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no JSON, or not of the form of a review.
    #[error("the body is no AdmissionReview: {0}")]
    Form(#[from] serde_json::Error),
    /// Another kind or version.
    #[error("the body is {kind} of {version:?}, not AdmissionReview of admission.k8s.io/v1")]
    Kind {
        /// The kind found.
        kind: String,
        /// The version found.
        version: String,
    },
    /// There is no request in it.
    #[error("the review has no request")]
    Empty,
    /// The request has no uid, so that no answer could be told from another.
    #[error("the request has no uid")]
    NoUid,
    /// The webhook is configured for something else.
    #[error("the path {path} is for {operations:?} of {resource}, not for {found}: mend the webhook's configuration")]
    Misdirected {
        /// The path.
        path: &'static str,
        /// Its operations.
        operations: &'static [&'static str],
        /// Its resource.
        resource: &'static str,
        /// What came.
        found: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    request: Option<Review>,
}

/// What is asked.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Review {
    /// To be said in the answer.
    #[serde(default)]
    pub uid: String,
    /// The object's type.
    pub kind: GroupVersionKind,
    /// The resource of the request.
    pub resource: GroupVersionResource,
    /// The subresource, empty for the object itself.
    #[serde(default)]
    pub sub_resource: String,
    /// The name, empty while it is still to be generated.
    #[serde(default)]
    pub name: String,
    /// The namespace.
    #[serde(default)]
    pub namespace: String,
    /// `CREATE`, `UPDATE`, `DELETE` or `CONNECT`.
    pub operation: String,
    /// Who asks.
    #[serde(default)]
    user_info: UserInfo,
    /// The object as it shall be.
    #[serde(default)]
    pub object: Option<Value>,
    /// The object as it is.
    #[serde(default)]
    pub old_object: Option<Value>,
    /// Nothing will be written.
    #[serde(default)]
    dry_run: Option<bool>,
}

/// A type.
#[derive(Debug, Deserialize)]
pub struct GroupVersionKind {
    /// The group, empty for the core group.
    #[serde(default)]
    pub group: String,
    /// The version.
    #[serde(default)]
    pub version: String,
    /// The kind.
    pub kind: String,
}

/// A resource.
#[derive(Debug, Deserialize)]
pub struct GroupVersionResource {
    /// The group, empty for the core group.
    #[serde(default)]
    pub group: String,
    /// The version.
    #[serde(default)]
    pub version: String,
    /// The plural.
    pub resource: String,
}

#[derive(Debug, Default, Deserialize)]
struct UserInfo {
    #[serde(default)]
    username: String,
    #[serde(default)]
    groups: Option<Vec<String>>,
    #[serde(default)]
    extra: Option<BTreeMap<String, Vec<String>>>,
}

impl Review {
    /// Reads the body of a request to a path.
    ///
    /// # Errors
    /// When it is no review that this path answers.
    pub fn read(body: &[u8], route: &'static Route) -> Result<Self, Error> {
        let body: Body = serde_json::from_slice(body)?;
        if body.kind != KIND || body.api_version != API_VERSION {
            return Err(Error::Kind { kind: body.kind, version: body.api_version });
        }
        let review = body.request.ok_or(Error::Empty)?;
        if review.uid.is_empty() {
            return Err(Error::NoUid);
        }
        let found = (review.resource.group.as_str(), review.resource.resource.as_str(), review.sub_resource.as_str());
        let expected = (route.group, route.resource, route.subresource);
        if found != expected || !route.operations.contains(&review.operation.as_str()) {
            let found = format!("{} of {}/{}", review.operation, review.resource.resource, review.sub_resource);
            return Err(Error::Misdirected {
                path: route.path,
                operations: route.operations,
                resource: route.resource,
                found: found.trim_end_matches('/').to_owned(),
            });
        }
        Ok(review)
    }

    /// What is being done.
    pub fn operation(&self) -> Operation {
        if self.operation == "CREATE" { Operation::Create } else { Operation::Update }
    }

    /// Who asks.
    pub fn user(&self) -> User {
        User {
            name: self.user_info.username.clone(),
            groups: self.user_info.groups.clone().unwrap_or_default(),
            extra: self.user_info.extra.clone().unwrap_or_default(),
        }
    }

    /// Nothing will be written. `kubectl drain --dry-run=server` says so in the Eviction itself, and kube-apiserver in a review only
    /// what stood in the query.
    pub fn dry_run(&self) -> bool {
        let options = self.object.as_ref().filter(|_| self.sub_resource == "eviction");
        let wanted = options.and_then(|eviction| eviction.pointer("/deleteOptions/dryRun")).and_then(Value::as_array);
        self.dry_run.unwrap_or(false) || wanted.is_some_and(|all| !all.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use godwit_api::admission::{Nothing, Request, mutate, validate};
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::answer::Answer;
    use crate::routes::ROUTES;

    fn body(route: &Route, object: Value) -> Value {
        json!({
            "apiVersion": API_VERSION, "kind": KIND,
            "request": {
                "uid": "u", "kind": { "group": route.group, "version": "v1", "kind": "Any" },
                "resource": { "group": route.group, "version": "v1", "resource": route.resource },
                "subResource": route.subresource, "operation": route.operations[0], "object": object,
            },
        })
    }

    #[test]
    fn what_is_no_review_for_this_path_is_named() {
        let read = |body: Value| Review::read(body.to_string().as_bytes(), &ROUTES[0]).map(drop);
        let good = body(&ROUTES[0], json!({}));
        assert!(read(good.clone()).is_ok());
        for (path, value, said) in [
            ("/kind", json!("Review"), "the body is Review of"),
            ("/apiVersion", json!("admission.k8s.io/v1beta1"), "not AdmissionReview of admission.k8s.io/v1"),
            ("/request", Value::Null, "the review has no request"),
            ("/request/uid", json!(""), "the request has no uid"),
            ("/request/operation", json!("DELETE"), "not for DELETE of virtualmachineinstancemigrations"),
            ("/request/resource/resource", json!("pods"), "not for CREATE of pods"),
            ("/request/uid", json!(7), "the body is no AdmissionReview"),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(path).unwrap() = value;
            let error = read(bad).unwrap_err().to_string();
            assert!(error.contains(said), "{path}: {error}");
        }
    }

    #[test]
    fn an_eviction_says_itself_that_it_is_a_dry_run() {
        let route = ROUTES.iter().find(|route| route.subresource == "eviction").unwrap();
        let read = |object: Value| Review::read(body(route, object).to_string().as_bytes(), route).unwrap().dry_run();
        assert!(!read(json!({})));
        assert!(!read(json!({"deleteOptions": {"dryRun": []}})));
        assert!(read(json!({"deleteOptions": {"dryRun": ["All"]}})));
        let mut asked = body(route, json!({}));
        asked["request"]["dryRun"] = json!(true);
        assert!(Review::read(asked.to_string().as_bytes(), route).unwrap().dry_run());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-zA-Z/.]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let keys = prop_oneof![
                Just("metadata".to_owned()),
                Just("spec".to_owned()),
                Just("status".to_owned()),
                Just("labels".to_owned()),
                Just("domain".to_owned()),
                Just("request".to_owned()),
                Just("object".to_owned()),
                "[a-z]{1,5}",
            ];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(keys, inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), which in 0..ROUTES.len()) {
            let _ = Review::read(&bytes, &ROUTES[which]);
        }

        /// Whatever stands in a review, there is an answer with its uid.
        #[test]
        fn junk_within_a_review_is_answered(object in any_json(), old in any_json(), extra in any_json(), which in 0..ROUTES.len()) {
            let route = &ROUTES[which];
            let mut body = body(route, object);
            body["request"]["oldObject"] = old;
            body["request"]["userInfo"] = json!({ "username": "u", "extra": extra });
            if let Ok(review) = Review::read(body.to_string().as_bytes(), route) {
                let user = review.user();
                for kind in ["VirtualMachineInstance", "VirtualMachineInstanceMigration", "VirtualMachine", "KubeVirt", "MigrationPolicy"] {
                    let request = Request {
                        operation: review.operation(), group: route.group, version: "v1", kind, resource: route.resource,
                        subresource: "", namespace: "", name: "", object: review.object.as_ref(),
                        old_object: review.old_object.as_ref(), user: &user, dry_run: false, lookup: &Nothing,
                    };
                    let changed = mutate(&request).map(|mutation| Answer::Changed(mutation.object, mutation.warnings));
                    let answers = [changed, validate(&request).map(Answer::Allowed)];
                    for answer in answers {
                        let sent = answer.unwrap_or_else(Answer::Denied).review(&review);
                        prop_assert_eq!(&sent["response"]["uid"], &json!("u"));
                        prop_assert!(sent["response"]["allowed"].is_boolean());
                    }
                }
            }
        }
    }
}
