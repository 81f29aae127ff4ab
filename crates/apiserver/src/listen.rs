//! Sockets: TLS, HTTP/1.1 and HTTP/2 on each.

use crate::server::{handle, stopped};
use crate::user::User;
use crate::{Error, Server, TlsFiles};
use http::Request;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::convert::Infallible;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// A client that says nothing for so long is not a client.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Go clients multiplex all their watches over one connection.
const STREAMS: u32 = 2000;
/// How long requests may still run after the end was asked for.
const GRACE: Duration = Duration::from_secs(2);

fn pem_error(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::Pem { path: path.to_owned(), why: why.to_string() }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let list: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|e| pem_error(path, e))?.collect();
    let list = list.map_err(|e| pem_error(path, e))?;
    if list.is_empty() { Err(pem_error(path, "no certificate in it")) } else { Ok(list) }
}

fn authority(path: &Path) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    PrivateKeyDer::from_pem_file(path).map_err(|e| pem_error(path, e))
}

pub(crate) fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = Arc::new(authority(&files.ca)?);
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).allow_unauthenticated().build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(&files.cert)?, key(&files.key)?)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The server as a client of kubelets.
pub(crate) fn client_config(files: &TlsFiles) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(authority(&files.ca)?)
        .with_client_auth_cert(certificates(&files.cert)?, key(&files.key)?)?)
}

pub(crate) async fn run(
    server: &Server,
    listeners: Vec<std::net::TcpListener>,
    acceptor: TlsAcceptor,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let mut accepting = JoinSet::new();
    for listener in listeners {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        accepting.spawn(accept(server.clone(), listener, acceptor.clone()));
    }
    shutdown.await;
    server.stop();
    // The accept loops let their connections finish.
    let _ = tokio::time::timeout(GRACE, async { while accepting.join_next().await.is_some() {} }).await;
    Ok(())
}

async fn accept(server: Server, listener: tokio::net::TcpListener, acceptor: TlsAcceptor) {
    let mut connections = JoinSet::new();
    let mut stopping = server.inner.stopping.subscribe();
    loop {
        let accepted = tokio::select! {
            () = stopped(&mut stopping) => break,
            accepted = listener.accept() => accepted,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((tcp, _)) => {
                connections.spawn(connection(server.clone(), tcp, acceptor.clone()));
            }
            Err(error) => {
                // Out of file descriptors, most likely: let some be closed.
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    while connections.join_next().await.is_some() {}
}

async fn connection(server: Server, tcp: TcpStream, acceptor: TlsAcceptor) {
    let _ = tcp.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%error, "TLS handshake failed");
            return;
        }
        Err(_) => return,
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let user = certificate.and_then(|der| User::from_certificate(der)).unwrap_or_else(User::anonymous);
    let user = Arc::new(user);
    let mut stopping = server.inner.stopping.subscribe();
    let service = service_fn(move |request: Request<Incoming>| {
        let (inner, user) = (server.inner.clone(), user.clone());
        let request = request.map(|body| body.map_err(std::io::Error::other).boxed_unsync());
        async move { Ok::<_, Infallible>(handle(inner, user, request).await) }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HANDSHAKE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .initial_connection_window_size(8 << 20)
        .initial_stream_window_size(1 << 20)
        .max_send_buf_size(256 << 10)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(30));
    let serving = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let outcome = tokio::select! {
        outcome = serving.as_mut() => outcome,
        () = stopped(&mut stopping) => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "connection ended");
    }
}
