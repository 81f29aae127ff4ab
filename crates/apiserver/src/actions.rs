//! Actions: subresources of a group of their own, about objects of another group (KubeVirt's `subresources.kubevirt.io`).
//! What an action comes to is a plugin's to say: writes, which are made as any other update is, an answer from elsewhere, or a
//! stream over a websocket.

use crate::Lookup;
use crate::create;
use crate::intake;
use crate::managed;
use crate::respond::{self, Reply};
use crate::server::{Context, stopped};
use crate::update::{ATTEMPTS, Change, change_object};
use crate::user::User;
use bytes::Bytes;
use godwit_machinery::patch::merge_patch;
use godwit_machinery::resource::{GroupVersion, Resource};
use godwit_machinery::status::Status;
use godwit_serving::actions::{self, ActionWrite, Answer, Deed, Outcome};
use godwit_serving::stream;
use http::StatusCode;
use serde_json::Value;
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
    /// The query's parameters, in their order.
    pub query: &'a [(String, String)],
    /// Stored objects, now and later.
    pub lookup: Arc<dyn Lookup>,
}

/// A group of actions.
pub trait Actions: Send + Sync {
    /// What discovery says of them: resources that have nothing but subresources ([`Resource::actions_only`]).
    fn resources(&self) -> Vec<Resource>;

    /// Decides what becomes of an action. A Status refuses it.
    fn act(&self, request: &ActionRequest<'_>) -> Result<Outcome, Status>;

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

/// `PUT` to an action, or `GET` of one that tells something or opens a stream.
pub(crate) async fn act(cx: &Context, resource: &Resource, bytes: &Bytes) -> Reply {
    let info = &cx.info;
    let plugin = plugin(cx, &resource.gv).ok_or_else(Status::no_such_resource)?;
    actions::check(resource, info, |resource, action| plugin.unknown(resource, action))?;
    let body = if bytes.iter().all(u8::is_ascii_whitespace) { Value::Null } else { intake::other(cx, bytes, &[])? };
    let request = ActionRequest {
        resource: &info.resource,
        action: &info.subresource,
        namespace: &info.namespace,
        name: &info.name,
        body: &body,
        user: &cx.user,
        query: cx.params.pairs(),
        lookup: cx.inner.clone(),
    };
    for attempt in 1.. {
        let deed = match plugin.act(&request)? {
            Outcome::Write(deed) => deed,
            Outcome::Call(call) => return call.await?.reply(),
            Outcome::Stream(stream) => return open(cx, stream).await,
        };
        let code = deed.code;
        match carry_out(cx, deed).await {
            Ok(()) => return Answer::done(code).reply(),
            Err(why) if why.code == 409 && attempt < ATTEMPTS => {}
            Err(why) => return Err(why),
        }
    }
    Err(Status::internal_error("the action was not carried out"))
}

async fn open(cx: &Context, stream: stream::Stream) -> Reply {
    let info = &cx.info;
    let what = format!("{}/{}", info.resource, info.subresource);
    let mut stopping = cx.inner.stopping.subscribe();
    let stopped = async move { stopped(&mut stopping).await };
    let reply = stream::open(stream, &what, &cx.headers, || cx.take_upgrade(), stopped).await?;
    // Whoever is in a guest's console may do anything in it.
    let from = cx.from.map(|from| from.to_string());
    tracing::info!(
        user = cx.user.name,
        from,
        guest = format!("{}/{}", info.namespace, info.name),
        stream = info.subresource,
        "a stream is opened"
    );
    Ok(reply)
}

async fn carry_out(cx: &Context, deed: Deed) -> Result<(), Status> {
    let dry_run = deed.dry_run || cx.dry_run()?;
    let user = Arc::new(deed.user);
    let namespace = cx.info.namespace.as_str();
    for (index, write) in deed.writes.into_iter().enumerate() {
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
                let written = change_object(&own, &kind, &change, |old| {
                    let mut new = merge_patch(old, &patch)?;
                    intake::shape(&kind, &mut new)?;
                    Ok(new)
                });
                match written.await {
                    // Gone, or another one of its name: the first write was enough.
                    Err(why) if index > 0 && matches!(why.code, 404 | 409) => {}
                    written => drop(written?),
                }
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
