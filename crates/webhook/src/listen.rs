//! The socket, and HTTP above it.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use godwit_serving::{listen, pem};
use http::{Method, Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use rustls::ServerConfig;
use tokio::sync::{Semaphore, watch};

use crate::review::Review;
use crate::routes::{Act, Route};
use crate::{Cluster, Error, Options, judge, routes};

/// A review holds the object twice, each at most three MiB (the API server's own limit), and some more.
const MAX_BODY: usize = 8 << 20;
/// Of a body that is too long this much is read all the same: a client that still writes would see a broken connection in
/// place of the answer, and one that has written would take the connection for free when it is about to be closed.
const MAX_DISCARDED: usize = 4 * MAX_BODY;
/// How long requests may still run after the end was asked for.
const GRACE: Duration = Duration::from_secs(2);

/// How long a review may take, from the first byte of its body: longer than kube-apiserver waits for an answer (10 s, as the
/// webhooks are announced), so whoever sends one slowly is nobody who waits for it.
const DEADLINE: Duration = Duration::from_secs(15);
/// So many reviews are read or judged at once. Each may take [`MAX_BODY`] and what it is parsed into.
const AT_ONCE: usize = 64;
static REVIEWS: Semaphore = Semaphore::const_new(AT_ONCE);
/// Evictions have places of their own: they mark VMIs, which is reviewed here while they wait for it.
static EVICTIONS: Semaphore = Semaphore::const_new(AT_ONCE);

/// Serves until `shutdown`. Certificates are read once.
///
/// # Errors
/// When certificate, key or socket cannot be used.
pub async fn serve(options: Options, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(pem::certificates(&options.certificate)?, pem::key(&options.key)?)?;
    config.alpn_protocols = listen::alpn();
    let listener = listen::listener(options.listener)?;
    let cluster = options.cluster;
    let handler = move |_| {
        let cluster = cluster.clone();
        move |request| {
            let cluster = cluster.clone();
            async move { answer(&cluster, request).await }
        }
    };
    let (stop, stopping) = watch::channel(false);
    let mut serving = tokio::spawn(listen::serve(listener, Arc::new(config), handler, stopping));
    shutdown.await;
    stop.send_replace(true);
    // clients keep idle connections open for minutes: what runs may end, the rest is cut
    if tokio::time::timeout(GRACE, &mut serving).await.is_err() {
        serving.abort();
    }
    Ok(())
}

/// Answers a request: a review at one of the [`routes`].
pub async fn answer(cluster: &Cluster, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    if request.method() == Method::GET && path == "/healthz" {
        return text(StatusCode::OK, "ok");
    }
    let Some(route) = routes::of(&path) else {
        return text(StatusCode::NOT_FOUND, &format!("there is no webhook at {path}"));
    };
    if request.method() != Method::POST {
        return text(StatusCode::METHOD_NOT_ALLOWED, "an AdmissionReview is sent with POST");
    }
    let places = match route.act {
        Act::Evict => &EVICTIONS,
        Act::Mutate | Act::Validate => &REVIEWS,
    };
    bounded(DEADLINE, places, review(cluster, route, request)).await
}

/// An answer in any case: when there is no place, when it takes too long, when a rule panics.
async fn bounded(
    limit: Duration,
    places: &Semaphore,
    work: impl Future<Output = Response<Full<Bytes>>>,
) -> Response<Full<Bytes>> {
    let work = async {
        // Never closed.
        let _place = places.acquire().await;
        work.await
    };
    match AssertUnwindSafe(tokio::time::timeout(limit, work)).catch_unwind().await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => {
            text(StatusCode::SERVICE_UNAVAILABLE, &format!("the review was not done within {limit:?}; try again"))
        }
        Err(_) => {
            tracing::error!("a rule of admission panicked");
            text(StatusCode::INTERNAL_SERVER_ERROR, "the review could not be done; this is a bug of godwit")
        }
    }
}

async fn review(cluster: &Cluster, route: &'static Route, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let http2 = request.version() == Version::HTTP_2;
    let body = match read(request.into_body()).await {
        Ok(Some(body)) => body,
        Ok(None) => {
            let mut refusal = text(StatusCode::PAYLOAD_TOO_LARGE, &format!("a review has at most {MAX_BODY} bytes"));
            if !http2 {
                refusal.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
            }
            return refusal;
        }
        Err(error) => return text(StatusCode::BAD_REQUEST, &format!("the body cannot be read: {error}")),
    };
    match Review::read(&body, route) {
        Ok(review) => {
            let answer = judge(cluster, route, &review).await.review(&review);
            let mut response = Response::new(Full::new(Bytes::from(answer.to_string())));
            response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
            response
        }
        Err(error) => text(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

/// The whole body, or `None` when it is too long.
async fn read(mut body: Incoming) -> Result<Option<Bytes>, hyper::Error> {
    let (mut kept, mut length) = (BytesMut::new(), 0_usize);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        length = length.saturating_add(data.len());
        match length {
            0..=MAX_BODY => kept.extend_from_slice(&data),
            _ if length > MAX_DISCARDED => break,
            _ => kept.clear(),
        }
    }
    Ok((length <= MAX_BODY).then(|| kept.freeze()))
}

fn text(code: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text.to_owned())));
    *response.status_mut() = code;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn said(answer: Response<Full<Bytes>>) -> (StatusCode, String) {
        let code = answer.status();
        let body = answer.into_body().collect().await.expect("a body").to_bytes();
        (code, String::from_utf8_lossy(&body).into_owned())
    }

    async fn good() -> Response<Full<Bytes>> {
        text(StatusCode::OK, "ok")
    }

    #[tokio::test]
    async fn a_rule_that_panics_is_answered_and_leaves_its_place() {
        let places = Semaphore::new(1);
        let (code, why) = said(bounded(DEADLINE, &places, async { panic!("of a rule") }).await).await;
        assert_eq!(code, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(why.contains("a bug of godwit"), "{why}");
        assert_eq!(said(bounded(DEADLINE, &places, good()).await).await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn what_does_not_end_is_answered_and_leaves_its_place() {
        let places = Semaphore::new(1);
        let held = places.acquire().await.expect("a place");
        let none_free = said(bounded(Duration::ZERO, &places, good()).await).await;
        assert_eq!(none_free.0, StatusCode::SERVICE_UNAVAILABLE, "{}", none_free.1);
        drop(held);
        // It never sends the end of its body.
        let slow = said(bounded(Duration::ZERO, &places, std::future::pending()).await).await;
        assert_eq!(slow.0, StatusCode::SERVICE_UNAVAILABLE, "{}", slow.1);
        assert_eq!(said(bounded(DEADLINE, &places, good()).await).await.0, StatusCode::OK);
    }
}
