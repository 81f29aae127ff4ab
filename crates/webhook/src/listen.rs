//! The socket: TLS, HTTP/1.1 and HTTP/2.

use std::convert::Infallible;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::review::Review;
use crate::{Error, Options, judge, routes};

/// A client that says nothing for so long is not a client.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A review holds the object twice, each at most three MiB (the API server's own limit), and some more.
const MAX_BODY: usize = 8 << 20;
/// Of a body that is too long this much is read all the same: a client that still writes would see a broken connection in
/// place of the answer, and one that has written would take the connection for free when it is about to be closed.
const MAX_DISCARDED: usize = 4 * MAX_BODY;
/// How long requests may still run after the end was asked for.
const GRACE: Duration = Duration::from_secs(2);

/// Serves until `shutdown`. Certificates are read once.
///
/// # Errors
/// When certificate, key or socket cannot be used.
pub async fn serve(options: Options, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
    let acceptor = acceptor(&options.certificate, &options.key)?;
    options.listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(options.listener)?;
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => accepted,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((tcp, _)) => {
                connections.spawn(connection(tcp, acceptor.clone(), options.client.clone()));
            }
            Err(error) => {
                // out of file descriptors, most likely: let some be closed
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    // clients keep idle connections open for minutes: what runs may end, the rest is cut
    let _ = tokio::time::timeout(GRACE, async { while connections.join_next().await.is_some() {} }).await;
    Ok(())
}

fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor, Error> {
    let pem = |path: &Path, why: String| Error::Pem { path: path.to_owned(), why };
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(certificate).map_err(|e| pem(certificate, e.to_string()))?.collect();
    let chain = chain.map_err(|e| pem(certificate, e.to_string()))?;
    if chain.is_empty() {
        return Err(pem(certificate, "no certificate in it".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_file(key).map_err(|e| pem(key, e.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn connection(tcp: TcpStream, acceptor: TlsAcceptor, client: kube::Client) {
    let _ = tcp.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%error, "TLS handshake failed");
            return;
        }
        Err(_) => return,
    };
    let service = service_fn(move |request: Request<Incoming>| {
        let client = client.clone();
        async move { Ok::<_, Infallible>(handle(&client, request).await) }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HANDSHAKE);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Duration::from_secs(30));
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "connection ended");
    }
}

async fn handle(client: &kube::Client, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    let http2 = request.version() == Version::HTTP_2;
    if request.method() == Method::GET && path == "/healthz" {
        return text(StatusCode::OK, "ok");
    }
    let Some(route) = routes::of(&path) else {
        return text(StatusCode::NOT_FOUND, &format!("there is no webhook at {path}"));
    };
    if request.method() != Method::POST {
        return text(StatusCode::METHOD_NOT_ALLOWED, "an AdmissionReview is sent with POST");
    }
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
            let answer = judge(client, route, &review).await.review(&review);
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
