//! `subresources.kubevirt.io` behind kube-apiserver: an aggregated API.
//!
//! kube-apiserver hands on what is asked of the group (APIService), and says who asks ([`front_proxy`]). Whether they may is
//! asked back ([`access`]); then the request is decided and carried out as the embedded server does it, with the objects of
//! kube-apiserver.

mod access;
mod documents;
pub mod front_proxy;
#[cfg(test)]
mod tests;
mod watch;
mod write;

use crate::act::{self, Asked, outcome, plan, resources, root};
use crate::objects::{ApiServer, Objects, ask};
use bytes::Bytes;
use documents::Documents;
use front_proxy::FrontProxy;
use futures::FutureExt;
use godwit_api::subresources::{self, GROUP};
use godwit_handler::front::FrontClient;
use godwit_machinery::body::{self, MAX_BYTES};
use godwit_machinery::discovery;
use godwit_machinery::status::Status;
use godwit_serving::actions::{self, Answer, Outcome};
use godwit_serving::listen::{Connection, stopped};
use godwit_serving::request::{Params, RequestInfo};
use godwit_serving::respond::{self, Body, Reply};
use godwit_serving::stream;
use godwit_serving::user::User;
use godwit_webhook::Cluster;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::upgrade::OnUpgrade;
use rustls_pki_types::UnixTime;
use serde_json::Value;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use tokio::sync::watch as signal;

pub use watch::follow as follow_front_proxy;

/// How long a request may take, until its stream begins where it is one.
const DEADLINE: Duration = Duration::from_secs(60);
/// How often an action is decided anew because somebody else wrote its object meanwhile.
const ATTEMPTS: usize = 16;

/// The aggregated API.
pub struct Aggregated {
    client: kube::Client,
    objects: Arc<dyn Objects>,
    front: FrontClient,
    proxy: RwLock<Option<Arc<FrontProxy>>>,
    documents: Documents,
    stopping: signal::Receiver<bool>,
}

impl Aggregated {
    /// With the account of this process towards the API server, and the way to the handlers. Streams end with `stopping`.
    pub fn new(cluster: Cluster, front: FrontClient, stopping: signal::Receiver<bool>) -> Self {
        Self {
            client: cluster.client.clone(),
            objects: Arc::new(ApiServer(cluster)),
            front,
            proxy: RwLock::default(),
            documents: Documents::new(resources()),
            stopping,
        }
    }

    /// Takes what the API server says of its front proxy.
    pub fn trust(&self, proxy: FrontProxy) {
        *self.proxy.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Arc::new(proxy));
    }

    /// Whether it is known who the front proxy is: before that nobody can be let in.
    pub fn is_ready(&self) -> bool {
        self.proxy().is_some()
    }

    fn proxy(&self) -> Option<Arc<FrontProxy>> {
        self.proxy.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Whether a path is one of this API's.
    pub fn has(path: &str) -> bool {
        let below = |root: &str| path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        path == "/" || below("/apis") || below("/openapi")
    }

    /// Answers a request that came over a connection.
    pub async fn handle<B>(&self, request: Request<B>, connection: &Connection) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let work = AssertUnwindSafe(tokio::time::timeout(DEADLINE, self.answer(request, connection))).catch_unwind();
        let reply = work.await.unwrap_or_else(|_| {
            tracing::error!("a request handler panicked");
            Ok(Err(Status::internal_error("the request could not be handled; this is a bug of godwit")))
        });
        let late = |_| Err(Status::timeout("request did not complete within the allotted timeout", 0));
        reply.unwrap_or_else(late).unwrap_or_else(|status| respond::failure(&status))
    }

    async fn answer<B>(&self, request: Request<B>, connection: &Connection) -> Reply
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (mut parts, body) = request.into_parts();
        let user = self.authenticate(&parts, connection)?;
        let params = Params::parse(&parts.uri);
        let mut info = RequestInfo::parse(&parts.method, &parts.uri, &params);
        if !info.is_resource {
            // What there is may be known to everybody whom kube-apiserver lets through.
            return match info.verb {
                "get" | "head" => {
                    Ok(self.documents.at(&info.path, &parts.headers).unwrap_or_else(respond::page_not_found))
                }
                _ => Err(Status::method_not_allowed()),
            };
        }
        if info.group != GROUP || !subresources::VERSIONS.contains(&info.version.as_str()) {
            return Err(Status::no_such_resource());
        }
        info.take_action(&subresources::served(&info.resource).iter().map(|one| (*one).to_owned()).collect::<Vec<_>>());
        access::authorize(&self.client, &user, &info).await?;
        let upgrade = parts.extensions.remove::<OnUpgrade>();
        let asked = Ask { info, params, user, parts, connection, upgrade };
        let bytes = read(body).await?;
        self.act(asked, &bytes).await
    }

    fn authenticate(&self, parts: &Parts, connection: &Connection) -> Result<User, Status> {
        let proxy = self
            .proxy()
            .ok_or_else(|| Status::service_unavailable("it is not known yet who kube-apiserver's front proxy is"))?;
        proxy.authenticate(&connection.certificates, &parts.headers, UnixTime::now()).map_err(|stranger| {
            tracing::warn!(from = %connection.from, path = parts.uri.path(), "refused: {stranger}");
            Status::unauthorized()
        })
    }

    async fn act(&self, mut asked: Ask<'_>, bytes: &Bytes) -> Reply {
        let info = &asked.info;
        let resource =
            self.documents.resources().iter().find(|one| {
                one.plural == info.resource && one.gv.group == info.group && one.gv.version == info.version
            });
        let Some(resource) = resource else { return self.root(info).await };
        if info.namespace.is_empty() || info.name.is_empty() {
            return Err(Status::no_such_resource());
        }
        actions::check(resource, info, act::unknown)?;
        let body = if bytes.iter().all(u8::is_ascii_whitespace) {
            Value::Null
        } else {
            let media = asked.parts.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
            body::decode(media.unwrap_or_default(), bytes, MAX_BYTES)?.value
        };
        let dry_run = asked.params.dry_run()?;
        for attempt in 1.. {
            let info = &asked.info;
            let decided = ask(self.objects.as_ref(), |lookup| {
                plan(&subresources::Request {
                    resource: &info.resource,
                    action: &info.subresource,
                    namespace: &info.namespace,
                    name: &info.name,
                    body: &body,
                    user: &asked.user.name,
                    lookup,
                })
            });
            let plan = decided.await??;
            let about = Asked {
                resource: &info.resource,
                namespace: &info.namespace,
                name: &info.name,
                query: asked.params.pairs(),
            };
            let deed = match outcome(&self.front, plan, about, self.objects.clone()) {
                Outcome::Write(deed) => deed,
                Outcome::Call(call) => return call.await?.reply(),
                Outcome::Stream(stream) => return self.open(&mut asked, stream).await,
            };
            let code = deed.code;
            match write::carry_out(&self.client, &info.namespace, deed, dry_run).await {
                Ok(()) => return Answer::done(code).reply(),
                Err(why) if why.code == 409 && attempt < ATTEMPTS => {}
                Err(why) => return Err(why),
            }
        }
        Err(Status::internal_error("the action was not carried out"))
    }

    async fn open(&self, asked: &mut Ask<'_>, stream: stream::Stream) -> Reply {
        let info = &asked.info;
        let what = format!("{}/{}", info.resource, info.subresource);
        let mut stopping = self.stopping.clone();
        let upgrade = asked.upgrade.take();
        let stopped = async move { stopped(&mut stopping).await };
        let reply = stream::open(stream, &what, &asked.parts.headers, move || upgrade, stopped).await?;
        // Whoever is in a guest's console may do anything in it.
        tracing::info!(
            user = asked.user.name,
            from = front_proxy::asker(&asked.parts.headers, asked.connection.from),
            guest = format!("{}/{}", info.namespace, info.name),
            stream = info.subresource,
            "a stream is opened"
        );
        Ok(reply)
    }

    /// A path right below a version.
    async fn root(&self, info: &RequestInfo) -> Reply {
        if !info.namespace.is_empty() || !info.name.is_empty() {
            return Err(Status::no_such_resource());
        }
        let kubernetes = match info.resource.as_str() {
            // Whether the API server answers is what is asked.
            "healthz" => {
                let version = self.client.apiserver_version().await.map_err(Status::internal_error)?;
                serde_json::to_value(version).map_err(Status::internal_error)?
            }
            _ => discovery::version(),
        };
        let answer = ask(self.objects.as_ref(), |lookup| root(&info.resource, &kubernetes, lookup)).await?;
        let answer = answer.ok_or_else(Status::no_such_resource)??;
        if info.verb != "list" {
            return Err(Status::method_not_allowed());
        }
        Ok(respond::json(StatusCode::OK, &answer))
    }
}

/// A request that may be granted.
struct Ask<'a> {
    info: RequestInfo,
    params: Params,
    user: User,
    parts: Parts,
    connection: &'a Connection,
    /// The connection, where it may become something else than HTTP.
    upgrade: Option<OnUpgrade>,
}

async fn read<B>(body: B) -> Result<Bytes, Status>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match Limited::new(body, MAX_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Status::request_entity_too_large(MAX_BYTES)),
        Err(error) => Err(Status::bad_request(format!("the body of the request could not be read: {error}"))),
    }
}
