//! Sockets: who may come in, and who comes.

use crate::server::{Origin, handle};
use crate::user::User;
use crate::{Error, Server, TlsFiles};
use godwit_serving::{listen, pem};
use http::Request;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ServerConfig};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// How long requests may still run after the end was asked for.
const GRACE: Duration = Duration::from_secs(2);

pub(crate) fn server_config(files: &TlsFiles) -> Result<Arc<ServerConfig>, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = Arc::new(pem::authority(&files.ca)?);
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).allow_unauthenticated().build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(pem::certificates(&files.cert)?, pem::key(&files.key)?)?;
    config.alpn_protocols = listen::alpn();
    Ok(Arc::new(config))
}

/// The server as a client of kubelets.
pub(crate) fn client_config(files: &TlsFiles) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(pem::authority(&files.ca)?)
        .with_client_auth_cert(pem::certificates(&files.cert)?, pem::key(&files.key)?)?)
}

pub(crate) async fn run(
    server: &Server,
    listeners: Vec<std::net::TcpListener>,
    tls: Arc<ServerConfig>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let mut accepting = JoinSet::new();
    for listener in listeners {
        let inner = server.inner.clone();
        let listener = listen::listener(listener)?;
        let handler = move |connection: listen::Connection| {
            let certificate = connection.certificates.first();
            let user = certificate.and_then(|der| User::from_certificate(der)).unwrap_or_else(User::anonymous);
            let (inner, user) = (inner.clone(), Arc::new(user));
            move |request: Request<Incoming>| {
                let mut request = request.map(|body| body.map_err(std::io::Error::other).boxed_unsync());
                request.extensions_mut().insert(Origin(connection.from));
                handle(inner.clone(), user.clone(), request)
            }
        };
        accepting.spawn(listen::serve(listener, tls.clone(), handler, server.inner.stopping.subscribe()));
    }
    shutdown.await;
    server.stop();
    // The accept loops let their connections finish.
    let _ = tokio::time::timeout(GRACE, async { while accepting.join_next().await.is_some() {} }).await;
    Ok(())
}
