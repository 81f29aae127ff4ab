//! `godwit api`: the admission webhooks and the aggregated API of a real Kubernetes, on one socket.

use crate::args::Api;
use crate::{connect, shutdown};
use anyhow::Context;
use godwit_api::admission::routes;
use godwit_api::names::API_SERVICES;
use godwit_certificates::authority::Subject;
use godwit_certificates::keeper::{Keeper, Trusting};
use godwit_certificates::serving::{self, Shown, Subjects};
use godwit_handler::front::{CLIENT_NAME, FrontClient};
use godwit_handler::tls::Identity;
use godwit_serving::listen::{self, AnyClient, Connection};
use godwit_serving::respond::{self, Body};
use godwit_subresources::aggregated::{Aggregated, follow_front_proxy};
use http::{Request, Response, StatusCode};
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
    client: kube::Client,
    aggregated: Arc<Aggregated>,
    certificates: watch::Receiver<bool>,
    leaving: watch::Receiver<bool>,
}

/// Serves until SIGTERM or SIGINT. Prints where it listens.
pub async fn run(args: Api) -> anyhow::Result<()> {
    let lifetimes = args.lifetimes.checked()?;
    let asked = shutdown::asked()?;
    let client = connect::client(args.kubeconfig.as_deref()).await?;
    let socket = TcpListener::bind(args.listen).with_context(|| format!("listen on {}", args.listen))?;
    let address = socket.local_addr()?;
    let listener = listen::listener(socket)?;
    let (stop, stopping) = watch::channel(false);
    let (leave, leaving) = watch::channel(false);
    let shown = Arc::new(Shown::default());
    let aggregated = Arc::new(Aggregated::new(client.clone(), handlers(shown.clone()), stopping.clone()));
    let (ready, certificates) = watch::channel(false);
    let keeper = Keeper::new(client.clone(), &args.namespace, lifetimes, trusting());
    let mut tasks = JoinSet::new();
    tasks.spawn(follow_front_proxy(aggregated.clone(), client.clone()));
    tasks.spawn(serving::run(keeper, lifetimes, subjects(&args), shown.clone(), ready));
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(Arc::new(AnyClient::default()))
        .with_cert_resolver(shown);
    config.alpn_protocols = listen::alpn();
    let front = Arc::new(Front { client, aggregated, certificates, leaving });
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
fn handlers(shown: Arc<Shown>) -> FrontClient {
    let show = move || {
        let calling = shown.calling().ok_or("there is no certificate for handlers yet")?;
        let (ca, own, key) = (calling.bundle.as_bytes(), calling.certificate.as_bytes(), calling.key.as_bytes());
        Identity::from_pem(ca, own, key).map_err(|(what, why)| format!("{what}: {why}"))
    };
    FrontClient::showing(Arc::new(show), Arc::new(|address| Box::pin(TcpStream::connect(address))))
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
    let (service, namespace) = (&args.service, &args.namespace);
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

impl Front {
    async fn answer(&self, request: Request<Incoming>, connection: &Connection) -> Response<Body> {
        let path = request.uri().path();
        match path {
            "/livez" | "/healthz" => respond::text(StatusCode::OK, "ok"),
            "/readyz" => self.readiness(),
            path if Aggregated::has(path) => self.aggregated.handle(request, connection).await,
            _ => godwit_webhook::answer_request(&self.client, request)
                .await
                .map(|body| body.map_err(|never| match never {}).boxed_unsync()),
        }
    }

    fn readiness(&self) -> Response<Body> {
        let checks = [
            ("certificates", *self.certificates.borrow()),
            ("front-proxy", self.aggregated.is_ready()),
            ("shutdown", !*self.leaving.borrow()),
        ];
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
