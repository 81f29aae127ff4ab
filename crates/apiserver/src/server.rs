//! One request from its first byte to its answer.

use crate::actions::{self, Actions};
use crate::admission::{Admission, Lookup};
use crate::kinds::{Kind, Kinds, Registry};
use crate::rbac::{Action, Rbac};
use crate::request::{Params, RequestInfo};
use crate::respond::{self, Body, Reply};
use crate::user::{ANONYMOUS, Impersonation, User, service_account};
use crate::{Dialer, create, delete, paths, pods, read, reviews, update, watch};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use godwit_machinery::body::MAX_BYTES;
use godwit_machinery::status::{Attributes, Status};
use godwit_store::Store;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::upgrade::OnUpgrade;
use serde_json::Value;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::task::{Context as Task, Poll};
use std::time::Duration;

/// How long anything but a watch or a log may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// Everything that requests share.
pub(crate) struct Inner {
    pub(crate) store: Store,
    pub(crate) registry: Registry,
    pub(crate) rbac: Rbac,
    pub(crate) admission: Vec<Arc<dyn Admission>>,
    pub(crate) actions: Vec<Arc<dyn Actions>>,
    pub(crate) dialer: Arc<dyn Dialer>,
    pub(crate) kubelet: Option<Arc<rustls::ClientConfig>>,
    pub(crate) documents: paths::Documents,
    pub(crate) quotas: crate::quotas::Quotas,
    /// Held from an eviction's look at the budgets to its pod's mark of deletion.
    pub(crate) evictions: tokio::sync::Mutex<()>,
    /// True when the server stops: watches end.
    pub(crate) stopping: tokio::sync::watch::Sender<bool>,
}

pub(crate) use godwit_serving::listen::stopped;

/// The address that a request comes from, in its extensions.
#[derive(Clone, Copy)]
pub(crate) struct Origin(pub(crate) SocketAddr);

/// One request that has been authenticated.
pub(crate) struct Context {
    pub(crate) inner: Arc<Inner>,
    pub(crate) info: RequestInfo,
    pub(crate) params: Params,
    pub(crate) headers: HeaderMap,
    pub(crate) user: Arc<User>,
    /// Where it comes from; none for what the server asks of itself.
    pub(crate) from: Option<SocketAddr>,
    pub(crate) kinds: Arc<Kinds>,
    warnings: Mutex<Vec<String>>,
    /// The connection, where it may become something else than HTTP.
    upgrade: Mutex<Option<OnUpgrade>>,
}

impl Context {
    /// A request that the server makes to itself.
    pub(crate) fn internal(inner: &Arc<Inner>) -> Self {
        Self {
            inner: inner.clone(),
            info: RequestInfo::default(),
            params: Params::default(),
            headers: HeaderMap::new(),
            user: Arc::new(User::system()),
            from: None,
            kinds: inner.registry.kinds(),
            warnings: Mutex::default(),
            upgrade: Mutex::default(),
        }
    }

    /// The connection, once.
    pub(crate) fn take_upgrade(&self) -> Option<OnUpgrade> {
        self.upgrade.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take()
    }

    pub(crate) fn store(&self) -> &Store {
        &self.inner.store
    }

    pub(crate) fn warn(&self, warnings: impl IntoIterator<Item = String>) {
        self.warnings.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).extend(warnings);
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Whether nothing is to be stored.
    pub(crate) fn dry_run(&self) -> Result<bool, Status> {
        self.params.dry_run()
    }
}

impl Lookup for Inner {
    fn get(&self, group: &str, plural: &str, namespace: &str, name: &str) -> Option<Arc<Value>> {
        let kinds = self.registry.kinds();
        let kind = kinds.any_version(group, plural)?;
        Some(self.store.get(&kind.key(namespace, name))?.json().clone())
    }

    fn list(&self, group: &str, plural: &str, namespace: &str) -> Vec<Arc<Value>> {
        let kinds = self.registry.kinds();
        let Some(kind) = kinds.any_version(group, plural) else { return Vec::new() };
        let entries = self.store.list(&kind.folder(namespace), None, 0).entries;
        entries.iter().map(|entry| entry.json().clone()).collect()
    }
}

/// Body of a request, whatever carried it.
pub(crate) type RequestBody = http_body_util::combinators::UnsyncBoxBody<Bytes, std::io::Error>;

/// Answers a request of this user.
pub(crate) async fn handle(inner: Arc<Inner>, user: Arc<User>, request: Request<RequestBody>) -> Response<Body> {
    let work = AssertUnwindSafe(answer(inner, user, request)).catch_unwind();
    work.await.unwrap_or_else(|_| {
        tracing::error!("a request handler panicked");
        respond::failure(&Status::internal_error("the request could not be handled; this is a bug of the server"))
    })
}

async fn answer(inner: Arc<Inner>, user: Arc<User>, request: Request<RequestBody>) -> Response<Body> {
    let (mut parts, body) = request.into_parts();
    let upgrade = Mutex::new(parts.extensions.remove::<OnUpgrade>());
    let from = parts.extensions.remove::<Origin>().map(|Origin(from)| from);
    let params = Params::parse(&parts.uri);
    let mut info = RequestInfo::parse(&parts.method, &parts.uri, &params);
    let kinds = inner.registry.kinds();
    if let Some(kind) = kinds.get(&info.group, &info.version, &info.resource).filter(|kind| kind.resource.actions_only)
    {
        info.take_action(&kind.resource.subresources);
    }
    let mut cx =
        Context { inner, info, params, headers: parts.headers, user, from, kinds, warnings: Mutex::default(), upgrade };
    let endless = cx.info.verb == "watch" || cx.info.subresource == "log";
    let reply = async {
        if cx.user.name == ANONYMOUS && cx.headers.contains_key(http::header::AUTHORIZATION) {
            // Tokens are not known here, and a wrong one is worse than none.
            return Err(Status::unauthorized());
        }
        let asks = cx.user.clone();
        impersonate(&mut cx)?;
        authorize(&cx).inspect_err(|status| {
            // A component that lacks a right goes on without what it wanted; nobody else would see that.
            if Arc::ptr_eq(&asks, &cx.user) && service_account(&asks.name).is_some() {
                tracing::warn!(why = status.message, "a component was refused");
            }
        })?;
        let bytes = read_body(body).await?;
        dispatch(&cx, bytes).await
    };
    let reply = if endless {
        reply.await
    } else {
        tokio::time::timeout(DEADLINE, reply)
            .await
            .unwrap_or_else(|_| Err(Status::timeout("request did not complete within the allotted timeout", 0)))
    };
    let mut response = reply.unwrap_or_else(|status| respond::failure(&status));
    let warnings = std::mem::take(&mut *cx.warnings.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    respond::warn(&mut response, &warnings);
    tracing::debug!(verb = cx.info.verb, path = cx.info.path, user = cx.user.name, status = response.status().as_u16());
    response
}

async fn read_body(body: RequestBody) -> Result<Bytes, Status> {
    match Limited::new(body, MAX_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Status::request_entity_too_large(MAX_BYTES)),
        Err(error) => Err(Status::bad_request(format!("the body of the request could not be read: {error}"))),
    }
}

fn impersonate(cx: &mut Context) -> Result<(), Status> {
    let wanted = Impersonation::parse(&cx.headers).map_err(|why| Status::bad_request(why.to_owned()))?;
    let Some(wanted) = wanted else { return Ok(()) };
    let index = cx.inner.rbac.index();
    let check = |group: &str, resource: &str, subresource: &str, namespace: &str, name: &str| {
        let action = Action { verb: "impersonate", group, resource, subresource, namespace, name, path: "" };
        index.allowed(&cx.user, &action).map(|_| ()).ok_or_else(|| {
            let user = cx.user.name.as_str();
            Status::forbidden_user(&Attributes {
                user,
                verb: "impersonate",
                group,
                resource,
                subresource,
                namespace,
                name,
                path: "",
            })
        })
    };
    match service_account(&wanted.user) {
        Some((namespace, name)) => check("", "serviceaccounts", "", namespace, name)?,
        None => check("", "users", "", "", &wanted.user)?,
    }
    for group in &wanted.groups {
        check("", "groups", "", "", group)?;
    }
    let authentication = "authentication.k8s.io";
    if !wanted.uid.is_empty() {
        check(authentication, "uids", "", "", &wanted.uid)?;
    }
    for (key, values) in &wanted.extra {
        values.iter().try_for_each(|value| check(authentication, "userextras", key, "", value))?;
    }
    cx.user = Arc::new(wanted.into_user());
    Ok(())
}

fn authorize(cx: &Context) -> Result<(), Status> {
    let info = &cx.info;
    let path = if info.is_resource { "" } else { info.path.as_str() };
    let action = Action {
        verb: info.verb,
        group: &info.group,
        resource: &info.resource,
        subresource: &info.subresource,
        namespace: &info.namespace,
        name: &info.name,
        path,
    };
    if cx.inner.rbac.index().allowed(&cx.user, &action).is_some() {
        return Ok(());
    }
    Err(Status::forbidden_user(&Attributes {
        user: &cx.user.name,
        verb: info.verb,
        group: &info.group,
        resource: &info.resource,
        subresource: &info.subresource,
        namespace: &info.namespace,
        name: &info.name,
        path,
    }))
}

/// Boxed, which also keeps the compiler from proving that the whole is `Send` for every lifetime at once.
fn dispatch(cx: &Context, body: Bytes) -> BoxFuture<'_, Reply> {
    match cx.info.is_resource {
        true => resource(cx, body).boxed(),
        false => paths::answer(cx).boxed(),
    }
}

/// One handler set for all kinds.
async fn resource(cx: &Context, body: Bytes) -> Reply {
    let info = &cx.info;
    let Some(kind) = cx.kinds.get(&info.group, &info.version, &info.resource).cloned() else {
        return actions::root(cx);
    };
    if kind.resource.actions_only {
        return actions::act(cx, &kind.resource, &body).await;
    }
    cx.warn(kind.resource.deprecation_warning.clone());
    let (group, plural) = kind.names();
    let unsupported = || Err(Status::method_not_supported(group, plural, info.verb));
    if reviews::is_review(group, plural) {
        return if info.verb == "create" { create::review(cx, &kind, &body) } else { unsupported() };
    }
    if kind.resource.virtual_create_only {
        return unsupported();
    }
    let inside = !info.namespace.is_empty() && !kind.is("", "namespaces");
    if inside != kind.resource.namespaced && (inside || !info.name.is_empty()) {
        return Err(Status::no_such_resource());
    }
    if !info.subresource.is_empty() {
        return subresource(cx, &kind, &body).await;
    }
    match info.verb {
        "get" => read::get(cx, &kind).await,
        "list" => read::list(cx, &kind).await,
        "watch" => watch::watch(cx, &kind).await,
        "create" if inside || !kind.resource.namespaced => create::create(cx, &kind, &body).await,
        "update" if !info.name.is_empty() => update::replace(cx, &kind, &body).await,
        "patch" if !info.name.is_empty() => update::patch(cx, &kind, &body).await,
        "delete" => delete::delete(cx, &kind, &body).await,
        "deletecollection" if inside || !kind.resource.namespaced => delete::collection(cx, &kind, &body).await,
        _ => Err(Status::method_not_allowed()),
    }
}

async fn subresource(cx: &Context, kind: &Arc<Kind>, body: &Bytes) -> Reply {
    let info = &cx.info;
    let sub = info.subresource.as_str();
    let resource = &kind.resource;
    let known = (sub == "status" && resource.status_subresource) || resource.subresources.iter().any(|s| s == sub);
    match (sub, info.verb) {
        ("status", "get") if known => read::get(cx, kind).await,
        ("status", "update") if known => update::replace(cx, kind, body).await,
        ("status", "patch") if known => update::patch(cx, kind, body).await,
        ("finalize", "update") if kind.is("", "namespaces") => update::replace(cx, kind, body).await,
        ("binding", "create") if kind.is("", "pods") => pods::bind(cx, kind, body).await,
        ("eviction", "create") if kind.is("", "pods") => pods::evict(cx, kind, body).await,
        ("log", "get") if kind.is("", "pods") => pods::log(cx, kind).await,
        ("exec" | "attach" | "portforward" | "proxy", _) if kind.is("", "pods") => Err(Status::new(
            501,
            "NotImplemented",
            format!(
                "pods/{sub} is not implemented by Godwit's embedded API server; use the guest's console or network"
            ),
        )),
        ("token", "create") if kind.is("", "serviceaccounts") => {
            Err(Status::new(501, "NotImplemented", "this server issues no tokens: use client certificates"))
        }
        _ if known => Err(Status::method_not_allowed()),
        _ => Err(Status::no_such_resource()),
    }
}

/// The server without its sockets, to be called in the same process. Clones share everything.
///
/// As a `tower::Service` it takes requests from the user found in the request's extensions ([`User`]), or else from
/// the user it was made for.
#[derive(Clone)]
pub struct Service {
    pub(crate) inner: Arc<Inner>,
    pub(crate) user: Arc<User>,
}

impl<B> tower::Service<Request<B>> for Service
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Task<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let inner = self.inner.clone();
        let extensions = request.extensions();
        let user = extensions.get::<User>().map_or_else(|| self.user.clone(), |user| Arc::new(user.clone()));
        let request = request.map(|body| body.map_err(std::io::Error::other).boxed_unsync());
        Box::pin(async move { Ok(handle(inner, user, request).await) })
    }
}
