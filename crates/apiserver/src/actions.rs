//! Actions: subresources of a group of their own, each of which changes an object of another group (KubeVirt's
//! `subresources.kubevirt.io`). What an action does to the object is a plugin's to say; it is written as any other update is.

use crate::Lookup;
use crate::intake;
use crate::managed;
use crate::respond::{self, Reply};
use crate::server::Context;
use crate::update::{ATTEMPTS, Change, change_object};
use crate::user::User;
use bytes::Bytes;
use godwit_machinery::patch::merge_patch;
use godwit_machinery::resource::Resource;
use godwit_machinery::status::{Status, success};
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;

/// One request for an action.
pub struct ActionRequest<'a> {
    /// The resource in the action's own group, as `virtualmachineinstances`.
    pub resource: &'a str,
    /// The action.
    pub action: &'a str,
    /// The object's namespace.
    pub namespace: &'a str,
    /// The object's name.
    pub name: &'a str,
    /// What the client sent.
    pub body: &'a Value,
    /// Stored objects.
    pub lookup: &'a dyn Lookup,
}

/// What an action comes to.
pub struct Deed {
    /// The object's group.
    pub group: String,
    /// Its plural.
    pub plural: String,
    /// A merge patch that carries the `metadata.resourceVersion` that it was decided on: it is decided anew when the object has
    /// changed since.
    pub patch: Value,
    /// Who changes the object. That the client may ask for the action has been checked.
    pub user: User,
    /// Everything is checked and nothing is written.
    pub dry_run: bool,
}

/// A group of actions.
pub trait Actions: Send + Sync {
    /// What discovery says of them: resources that have nothing but subresources ([`Resource::actions_only`]).
    fn resources(&self) -> Vec<Resource>;

    /// Decides what an action comes to. A Status refuses it.
    fn act(&self, request: &ActionRequest<'_>) -> Result<Deed, Status>;
}

/// `PUT` to an action.
pub(crate) async fn act(cx: &Context, resource: &Resource, bytes: &Bytes) -> Reply {
    let info = &cx.info;
    if info.subresource.is_empty() || !resource.subresources.contains(&info.subresource) {
        return Err(Status::no_such_resource());
    }
    if info.verb != "update" {
        return Err(Status::method_not_allowed());
    }
    let Some(plugin) = cx.inner.actions.iter().find(|one| one.resources().iter().any(|other| other.gv == resource.gv))
    else {
        return Err(Status::no_such_resource());
    };
    let body = intake::other(cx, bytes, &[])?;
    let request = ActionRequest {
        resource: &info.resource,
        action: &info.subresource,
        namespace: &info.namespace,
        name: &info.name,
        body: &body,
        lookup: cx.inner.as_ref(),
    };
    for attempt in 1.. {
        let deed = plugin.act(&request)?;
        let missing = || Status::not_found(&deed.group, &deed.plural, &info.name);
        let kind = cx.kinds.any_version(&deed.group, &deed.plural).cloned().ok_or_else(missing)?;
        let mut own = Context::internal(&cx.inner);
        own.user = Arc::new(deed.user);
        let change = Change {
            namespace: &info.namespace,
            name: &info.name,
            dry_run: deed.dry_run || cx.dry_run()?,
            manager: managed::Manager::of(cx)?,
        };
        let written = change_object(&own, &kind, &change, |old| {
            let mut new = merge_patch(old, &deed.patch)?;
            intake::shape(&kind, &mut new)?;
            Ok(new)
        });
        match written.await {
            Ok(_) => break,
            Err(why) if why.code == 409 && attempt < ATTEMPTS => {}
            Err(why) => return Err(why),
        }
    }
    let mut answer = success(None);
    answer["code"] = json!(202);
    Ok(respond::json(StatusCode::ACCEPTED, &answer))
}
