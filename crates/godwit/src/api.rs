//! `godwit api`: the admission webhooks and the aggregated API of a real Kubernetes, on one socket.

use crate::args::Api;
use crate::{connect, shutdown};
use anyhow::Context;
use godwit_api::admission::routes;
use godwit_api::metrics::{self, Figures};
use godwit_api::names::API_SERVICES;
use godwit_certificates::authority::Subject;
use godwit_certificates::keeper::{Keeper, Trusting};
use godwit_certificates::serving::{self, Shown, Subjects};
use godwit_handler::front::{CLIENT_NAME, FrontClient};
use godwit_handler::tls::Identity;
use godwit_serving::listen::{self, AnyClient, Connection};
use godwit_serving::respond::{self, Body};
use godwit_subresources::aggregated::{Aggregated, follow_front_proxy};
use godwit_webhook::Cluster;
use http::header::CONNECTION;
use http::{HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// How long connections are still accepted after the end was asked for: until every node's kube-proxy knows that this pod goes,
/// some of them are sent here, and a webhook that is not reached fails closed.
const LEAVE: Duration = Duration::from_secs(8);
/// How long requests may still run after that: kube-apiserver waits 10 seconds for a webhook, and a pod has 30 to end.
const GRACE: Duration = Duration::from_secs(15);

/// What requests share.
struct Front {
    cluster: Cluster,
    shown: Arc<Shown>,
    aggregated: Arc<Aggregated>,
    certificates: watch::Receiver<bool>,
    leaving: watch::Receiver<bool>,
}

/// Serves until SIGTERM or SIGINT. Prints where it listens.
pub async fn run(args: Api) -> anyhow::Result<()> {
    let lifetimes = args.lifetimes.checked()?;
    let asked = shutdown::asked()?;
    let client = connect::client(args.kubeconfig.as_deref()).await?;
    let cluster = Cluster { client, installation: args.installed.installation() };
    let socket = TcpListener::bind(args.listen).with_context(|| format!("listen on {}", args.listen))?;
    let address = socket.local_addr()?;
    let listener = listen::listener(socket)?;
    let (stop, stopping) = watch::channel(false);
    let (leave, leaving) = watch::channel(false);
    let shown = Arc::new(Shown::default());
    let aggregated =
        Arc::new(Aggregated::new(cluster.clone(), handlers(shown.clone(), args.handler_port), stopping.clone()));
    let (ready, certificates) = watch::channel(false);
    let told = shown.clone();
    let keeper = Keeper::new(cluster.client.clone(), cluster.installation.namespace(), lifetimes, trusting());
    let mut tasks = JoinSet::new();
    tasks.spawn(follow_front_proxy(aggregated.clone(), cluster.client.clone()));
    tasks.spawn(serving::run(keeper, lifetimes, subjects(&args), shown.clone(), ready));
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(Arc::new(AnyClient::default()))
        .with_cert_resolver(shown);
    config.alpn_protocols = listen::alpn();
    let front = Arc::new(Front { cluster, shown: told, aggregated, certificates, leaving });
    let handler = move |connection: Connection| {
        let front = front.clone();
        move |request| {
            let (front, connection) = (front.clone(), connection.clone());
            async move { front.answer(request, &connection).await }
        }
    };
    let mut serving = tokio::spawn(listen::serve(listener, Arc::new(config), handler, stopping));
    println!("listening on https://{address}");
    tokio::select! {
        () = asked => {}
        ended = tasks.join_next() => {
            return Err(anyhow::anyhow!("a task of this process has ended: {ended:?}"));
        }
    }
    end(LEAVE, &leave, &stop, &mut serving).await;
    Ok(())
}

/// In two stages: from now on this process is not ready, but serves as before; after `linger` it accepts no more, and what runs
/// has [`GRACE`] to end.
async fn end(linger: Duration, leave: &watch::Sender<bool>, stop: &watch::Sender<bool>, serving: &mut JoinHandle<()>) {
    leave.send_replace(true);
    tokio::time::sleep(linger).await;
    stop.send_replace(true);
    let _ = tokio::time::timeout(GRACE, serving).await;
}

/// The way to the handlers, with what this process shows to them at the moment.
fn handlers(shown: Arc<Shown>, port: u16) -> FrontClient {
    let show = move || {
        let calling = shown.calling().ok_or("there is no certificate for handlers yet")?;
        let (ca, own, key) = (calling.bundle.as_bytes(), calling.certificate.as_bytes(), calling.key.as_bytes());
        Identity::from_pem(ca, own, key).map_err(|(what, why)| format!("{what}: {why}"))
    };
    FrontClient::showing(Arc::new(show), Arc::new(|address| Box::pin(TcpStream::connect(address)))).at_port(port)
}

fn trusting() -> Trusting {
    let all = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    Trusting {
        mutating: all(&[routes::MUTATING]),
        validating: all(&routes::VALIDATING),
        api_services: all(&API_SERVICES),
    }
}

fn subjects(args: &Api) -> Subjects {
    let (service, namespace) = (&args.service, &args.installed.namespace);
    let names = ["", ".svc", ".svc.cluster.local"].map(|end| format!("{service}.{namespace}{end}"));
    Subjects {
        serving: Subject {
            common_name: format!("{service}.{namespace}.svc"),
            names: names.into(),
            serves: true,
            calls: false,
        },
        calling: Subject { common_name: CLIENT_NAME.to_owned(), calls: true, ..Subject::default() },
    }
}

/// Has the client open another connection for its next request. kube-apiserver asks webhooks over HTTP/1.1 and keeps connections,
/// wherever the Service leads by then; a request that one is closed under fails, and is not sent again.
fn part(version: Version, response: &mut Response<Body>) {
    if version <= Version::HTTP_11 && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

impl Front {
    async fn answer(&self, request: Request<Incoming>, connection: &Connection) -> Response<Body> {
        let version = request.version();
        let mut response = self.route(request, connection).await;
        if *self.leaving.borrow() {
            part(version, &mut response);
        }
        response
    }

    async fn route(&self, request: Request<Incoming>, connection: &Connection) -> Response<Body> {
        let path = request.uri().path();
        match path {
            "/livez" | "/healthz" => respond::text(StatusCode::OK, "ok"),
            "/readyz" => self.readiness(),
            "/metrics" => {
                respond::bytes(StatusCode::OK, crate::metrics::CONTENT_TYPE, crate::metrics::text(self.figures()))
            }
            path if Aggregated::has(path) => self.aggregated.handle(request, connection).await,
            _ => godwit_webhook::answer_request(&self.cluster, request)
                .await
                .map(|body| body.map_err(|never| match never {}).boxed_unsync()),
        }
    }

    fn checks(&self) -> [(&'static str, bool); 3] {
        [
            ("certificates", *self.certificates.borrow()),
            ("front-proxy", self.aggregated.is_ready()),
            ("shutdown", !*self.leaving.borrow()),
        ]
    }

    /// What is told to Prometheus.
    fn figures(&self) -> Figures {
        let mut figures = Figures::default();
        figures.tell(metrics::INFO, [crate::metrics::VERSION], 1.0);
        let ready = self.checks().iter().all(|(_, good)| *good);
        figures.tell(metrics::API_READY, [], f64::from(u8::from(ready)));
        for (certificate, end) in self.shown.ends() {
            figures.tell(metrics::CERTIFICATE_END, [certificate], end as f64);
        }
        figures
    }

    fn readiness(&self) -> Response<Body> {
        let checks = self.checks();
        if checks.iter().all(|(_, good)| *good) {
            return respond::text(StatusCode::OK, "ok");
        }
        let lines = checks.map(|(name, good)| {
            format!("[{}]{name} {}\n", if good { '+' } else { '-' }, if good { "ok" } else { "failed" })
        });
        respond::text(StatusCode::SERVICE_UNAVAILABLE, lines.concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_are_kept_are_given_up_before_they_are_closed() {
        let parted = |version, code| {
            let mut response = respond::text(code, "");
            part(version, &mut response);
            response.headers().get(CONNECTION).is_some_and(|value| value == "close")
        };
        assert!(parted(Version::HTTP_11, StatusCode::OK));
        assert!(parted(Version::HTTP_10, StatusCode::NOT_FOUND));
        // HTTP/2 has a frame for it, and a console is no connection any more.
        assert!(!parted(Version::HTTP_2, StatusCode::OK));
        assert!(!parted(Version::HTTP_11, StatusCode::SWITCHING_PROTOCOLS));
    }

    #[tokio::test]
    async fn it_is_not_ready_for_a_while_before_it_accepts_no_more() {
        let ((leave, _leaving), (stop, mut stopping)) = (watch::channel(false), watch::channel(false));
        let mut serving = tokio::spawn(async move { listen::stopped(&mut stopping).await });
        {
            let mut ending = std::pin::pin!(end(Duration::MAX, &leave, &stop, &mut serving));
            assert!(futures::poll!(&mut ending).is_pending());
            assert!(*leave.borrow() && !*stop.borrow());
        }
        end(Duration::ZERO, &leave, &stop, &mut serving).await;
        assert!(*stop.borrow() && serving.is_finished());
    }
}
