//! What is asked of a pod over plain HTTP: whether it lives, whether it is ready (kubelets), and its figures (Prometheus).

use crate::metrics;
use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;
use futures::future::BoxFuture;
use godwit_api::metrics::Figures;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How long figures may take; Prometheus waits for 10 seconds unless it is told otherwise.
const LIMIT: Duration = Duration::from_secs(9);

/// Where a process has its figures from; there are none when it ends.
pub type Told = Arc<dyn Fn() -> BoxFuture<'static, Option<Figures>> + Send + Sync>;

/// Answers from now on, in the background.
///
/// # Errors
/// The address is taken, or not one of this machine's.
pub async fn serve(address: SocketAddr, ready: watch::Receiver<bool>, told: Told) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router(ready, told)).await {
            eprintln!("godwit: probes are answered no more: {error}");
        }
    });
    Ok(())
}

fn router(ready: watch::Receiver<bool>, told: Told) -> Router {
    let is_ready = move || {
        let answer = match *ready.borrow() {
            true => (StatusCode::OK, "ok\n"),
            false => (StatusCode::SERVICE_UNAVAILABLE, "not everything is listed yet\n"),
        };
        std::future::ready(answer)
    };
    let figures = move || {
        let figures = told();
        async move {
            match tokio::time::timeout(LIMIT, figures).await {
                Ok(Some(figures)) => Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::text(figures))),
                Ok(None) => Err((StatusCode::SERVICE_UNAVAILABLE, "this process is ending\n")),
                Err(_) => Err((StatusCode::SERVICE_UNAVAILABLE, "the figures take too long\n")),
            }
        }
    };
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(is_ready))
        .route("/metrics", get(figures))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = std::net::TcpStream::connect(address).expect("connect");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("ask");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn ready_is_told_when_it_is() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("it");
        let (tell, ready) = watch::channel(false);
        let told = || -> BoxFuture<'static, _> {
            let mut figures = Figures::default();
            figures.tell(godwit_api::metrics::CONTROLLER_READY, [], 1.0);
            Box::pin(std::future::ready(Some(figures)))
        };
        serve(port, ready, Arc::new(told)).await.expect("serve");
        let answer =
            async |path: &'static str| tokio::task::spawn_blocking(move || ask(port, path)).await.expect("asked");
        let ask = async |path: &'static str| answer(path).await.lines().next().unwrap_or_default().to_owned();
        assert_eq!(ask("/livez").await, "HTTP/1.1 200 OK");
        assert_eq!(ask("/readyz").await, "HTTP/1.1 503 Service Unavailable");
        tell.send_replace(true);
        assert_eq!(ask("/readyz").await, "HTTP/1.1 200 OK");
        assert_eq!(ask("/").await, "HTTP/1.1 404 Not Found");
        let told = answer("/metrics").await;
        assert!(told.starts_with("HTTP/1.1 200 OK") && told.to_lowercase().contains(metrics::CONTENT_TYPE), "{told}");
        assert!(told.contains("\nkubevirt_virt_controller_ready_status 1.0\n"), "{told}");
    }
}
