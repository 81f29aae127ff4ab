//! What an action comes to: a subresource of a group of its own, about objects of another group (KubeVirt's
//! `subresources.kubevirt.io`).

use crate::request::RequestInfo;
use crate::respond::{self, Reply};
use crate::stream::Stream;
use crate::user::User;
use futures::future::BoxFuture;
use godwit_machinery::resource::Resource;
use godwit_machinery::status::{Status, success};
use http::StatusCode;
use serde_json::{Value, json};

/// What becomes of an action.
pub enum Outcome {
    /// It is a change of objects.
    Write(Deed),
    /// Somebody else carries it out, or knows the answer.
    Call(BoxFuture<'static, Result<Answer, Status>>),
    /// It is a stream.
    Stream(Stream),
}

/// Whether a request is for an action that a resource has: `PUT`, or `GET` of one that tells something or opens a stream.
/// `unknown` is asked what to say of an action that it has not, by the resource's plural and the action's name.
///
/// # Errors
/// There is no such action, or it is asked for in another way.
pub fn check(
    resource: &Resource,
    info: &RequestInfo,
    unknown: impl Fn(&str, &str) -> Option<Status>,
) -> Result<(), Status> {
    if info.subresource.is_empty() || !info.rest.is_empty() || !resource.subresources.contains(&info.subresource) {
        let action = [info.subresource.as_str(), &info.rest].join("/");
        let names = [info.subresource.as_str(), action.trim_end_matches('/')];
        let said = names.iter().find_map(|action| unknown(&info.resource, action));
        return Err(said.unwrap_or_else(Status::no_such_resource));
    }
    let verb = if resource.gettable.contains(&info.subresource) { "get" } else { "update" };
    if info.verb == verb { Ok(()) } else { Err(Status::method_not_allowed()) }
}

/// An answer.
pub struct Answer {
    /// The HTTP code.
    pub code: u16,
    /// The body; none is an empty one.
    pub body: Option<Value>,
}

impl Answer {
    /// The answer to an action that was a change of objects.
    pub fn done(code: u16) -> Self {
        let mut body = success(None);
        body["code"] = json!(code);
        Self { code, body: Some(body) }
    }

    /// As it is sent.
    ///
    /// # Errors
    /// The code is none of HTTP's.
    pub fn reply(self) -> Reply {
        let code = StatusCode::from_u16(self.code).map_err(Status::internal_error)?;
        Ok(match self.body {
            Some(body) => respond::json(code, &body),
            None => respond::text(code, ""),
        })
    }
}

/// What an action comes to.
pub struct Deed {
    /// The HTTP code of the answer.
    pub code: u16,
    /// What is written, in this order. When the first finds its object changed, the action is decided anew. The others follow
    /// from it, and are left out where their object is gone by then.
    pub writes: Vec<ActionWrite>,
    /// Who writes.
    pub user: User,
    /// Everything is checked and nothing is written.
    pub dry_run: bool,
}

/// One write of an action, in the namespace of its request.
pub enum ActionWrite {
    /// Changes an object.
    Patch {
        /// The object's group.
        group: String,
        /// Its plural.
        plural: String,
        /// Its name.
        name: String,
        /// Its `status` subresource is written.
        status: bool,
        /// A merge patch that carries the `metadata.resourceVersion` that it was decided on, or at least the `metadata.uid`.
        patch: Value,
    },
    /// Makes an object. When that is refused, the answer is an internal error with the refusal in it.
    Create {
        /// The object's group.
        group: String,
        /// Its plural.
        plural: String,
        /// The object.
        object: Value,
    },
}
