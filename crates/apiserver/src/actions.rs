//! Actions: subresources of a group of their own, each of which changes objects of another group (KubeVirt's
//! `subresources.kubevirt.io`). What an action comes to is a plugin's to say; it is written as any other update is.

use crate::Lookup;
use crate::create;
use crate::intake;
use crate::managed;
use crate::respond::{self, Reply};
use crate::server::Context;
use crate::update::{ATTEMPTS, Change, change_object};
use crate::user::User;
use bytes::Bytes;
use godwit_machinery::patch::merge_patch;
use godwit_machinery::resource::{GroupVersion, Resource};
use godwit_machinery::status::{Status, success};
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;

/// One request for an action.
pub struct ActionRequest<'a> {
    /// The resource in the action's own group, as `virtualmachineinstances`.
    pub resource: &'a str,
    /// The action, as `start` or `evacuate/cancel`.
    pub action: &'a str,
    /// The object's namespace.
    pub namespace: &'a str,
    /// The object's name.
    pub name: &'a str,
    /// What the client sent; null when that was nothing.
    pub body: &'a Value,
    /// Who asks. That they may has been checked.
    pub user: &'a User,
    /// Stored objects.
    pub lookup: &'a dyn Lookup,
}

/// What an action comes to.
pub struct Deed {
    /// The HTTP code of the answer.
    pub code: u16,
    /// What is written, in this order. When an object has changed since, the action is decided anew, and earlier writes are
    /// made again.
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
        /// A merge patch that carries the `metadata.resourceVersion` that it was decided on.
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

/// A group of actions.
pub trait Actions: Send + Sync {
    /// What discovery says of them: resources that have nothing but subresources ([`Resource::actions_only`]).
    fn resources(&self) -> Vec<Resource>;

    /// Decides what an action comes to. A Status refuses it.
    fn act(&self, request: &ActionRequest<'_>) -> Result<Deed, Status>;

    /// What is answered to a path right below one of the group's versions, such as `version`; none where there is nothing.
    fn root(&self, _path: &str, _lookup: &dyn Lookup) -> Option<Result<Value, Status>> {
        None
    }

    /// What is answered to an action that [`Actions::resources`] does not name, instead of a plain 404.
    fn unknown(&self, _resource: &str, _action: &str) -> Option<Status> {
        None
    }
}

fn plugin<'a>(cx: &'a Context, gv: &GroupVersion) -> Option<&'a Arc<dyn Actions>> {
    cx.inner.actions.iter().find(|one| one.resources().iter().any(|resource| resource.gv == *gv))
}

/// A path right below a version of a group of actions.
pub(crate) fn root(cx: &Context) -> Reply {
    let info = &cx.info;
    let gv = GroupVersion { group: info.group.clone(), version: info.version.clone() };
    let answer = plugin(cx, &gv).filter(|_| info.namespace.is_empty() && info.name.is_empty());
    let answer = answer.and_then(|plugin| plugin.root(&info.resource, cx.inner.as_ref()));
    let answer = answer.ok_or_else(Status::no_such_resource)??;
    if info.verb != "list" {
        return Err(Status::method_not_allowed());
    }
    Ok(respond::json(StatusCode::OK, &answer))
}

/// `PUT` to an action.
pub(crate) async fn act(cx: &Context, resource: &Resource, bytes: &Bytes) -> Reply {
    let info = &cx.info;
    let plugin = plugin(cx, &resource.gv).ok_or_else(Status::no_such_resource)?;
    if info.subresource.is_empty() || !info.rest.is_empty() || !resource.subresources.contains(&info.subresource) {
        let action = [info.subresource.as_str(), &info.rest].join("/");
        let unknown = [info.subresource.as_str(), action.trim_end_matches('/')];
        let said = unknown.iter().find_map(|action| plugin.unknown(&info.resource, action));
        return Err(said.unwrap_or_else(Status::no_such_resource));
    }
    if info.verb != "update" {
        return Err(Status::method_not_allowed());
    }
    let body = if bytes.iter().all(u8::is_ascii_whitespace) { Value::Null } else { intake::other(cx, bytes, &[])? };
    let request = ActionRequest {
        resource: &info.resource,
        action: &info.subresource,
        namespace: &info.namespace,
        name: &info.name,
        body: &body,
        user: &cx.user,
        lookup: cx.inner.as_ref(),
    };
    for attempt in 1.. {
        let deed = plugin.act(&request)?;
        let code = StatusCode::from_u16(deed.code).map_err(Status::internal_error)?;
        match carry_out(cx, deed).await {
            Ok(()) => {
                let mut answer = success(None);
                answer["code"] = json!(code.as_u16());
                return Ok(respond::json(code, &answer));
            }
            Err(why) if why.code == 409 && attempt < ATTEMPTS => {}
            Err(why) => return Err(why),
        }
    }
    Err(Status::internal_error("the action was not carried out"))
}

async fn carry_out(cx: &Context, deed: Deed) -> Result<(), Status> {
    let dry_run = deed.dry_run || cx.dry_run()?;
    let user = Arc::new(deed.user);
    let namespace = cx.info.namespace.as_str();
    for write in deed.writes {
        let mut own = Context::internal(&cx.inner);
        own.user = user.clone();
        let manager = managed::Manager::of(cx)?;
        match write {
            ActionWrite::Patch { group, plural, name, status, patch } => {
                let missing = || Status::not_found(&group, &plural, &name);
                let kind = cx.kinds.any_version(&group, &plural).cloned().ok_or_else(missing)?;
                if status {
                    own.info.subresource = "status".to_owned();
                }
                let change = Change { namespace, name: &name, dry_run, manager };
                change_object(&own, &kind, &change, |old| {
                    let mut new = merge_patch(old, &patch)?;
                    intake::shape(&kind, &mut new)?;
                    Ok(new)
                })
                .await?;
            }
            ActionWrite::Create { group, plural, object } => {
                let missing = || Status::not_found(&group, &plural, "");
                let kind = cx.kinds.any_version(&group, &plural).cloned().ok_or_else(missing)?;
                let made = create::insert(&own, &kind, namespace, object, dry_run, &manager).await;
                made.map_err(|why| Status::internal_error(why.message))?;
            }
        }
    }
    Ok(())
}
