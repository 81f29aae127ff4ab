//! What is asked of a pod over plain HTTP: whether it lives, whether it is ready (kubelets), and its figures (Prometheus).
//!
//! A handler shares its node's addresses with the one that it is to replace, which answers there as long as it runs. So its kubelet asks
//! it on a unix socket of its own pod, by [`probe`].

use crate::metrics;
use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;
use futures::future::BoxFuture;
use godwit_api::metrics::Figures;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

/// How long figures may take; Prometheus waits for 10 seconds unless it is told otherwise.
const LIMIT: Duration = Duration::from_secs(9);

/// Between two attempts to have an address that somebody else has.
const AGAIN: Duration = Duration::from_secs(1);
/// How long an answer to a probe may take.
const PROBE_LIMIT: Duration = Duration::from_secs(4);

/// Where a process has its figures from; there are none when it ends.
pub type Told = Arc<dyn Fn() -> BoxFuture<'static, Option<Figures>> + Send + Sync>;

/// Answers from now on, in the background.
///
/// # Errors
/// The address is taken, or not one of this machine's.
pub async fn serve(address: SocketAddr, ready: watch::Receiver<bool>, told: Told) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    tokio::spawn(answer(listener, ready, told));
    Ok(())
}

/// The same as soon as nobody else has the address.
pub fn serve_when_free(address: SocketAddr, ready: watch::Receiver<bool>, told: Told) {
    tokio::spawn(async move {
        let mut said = false;
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(error) if !std::mem::replace(&mut said, true) => {
                    tracing::warn!(%address, %error, "figures are not told yet; trying again");
                }
                Err(_) => {}
            }
            tokio::time::sleep(AGAIN).await;
        };
        answer(listener, ready, told).await;
    });
}

/// The same on a unix socket, in place of what was there.
///
/// # Errors
/// The socket cannot be made.
pub fn serve_on_socket(path: &Path, ready: watch::Receiver<bool>, told: Told) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("replace {}", path.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    tokio::spawn(answer(listener, ready, told));
    Ok(())
}

async fn answer<L>(listener: L, ready: watch::Receiver<bool>, told: Told)
where
    L: axum::serve::Listener,
    L::Addr: std::fmt::Debug,
{
    if let Err(error) = axum::serve(listener, router(ready, told)).await {
        eprintln!("godwit: probes are answered no more: {error}");
    }
}

/// `godwit probe`: asks a process for this path on its unix socket.
///
/// # Errors
/// It is not there, does not answer in time, or with anything but success.
pub fn probe(socket: &Path, path: &str) -> anyhow::Result<()> {
    let asking = || {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PROBE_LIMIT))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        std::io::Result::Ok(answer)
    };
    let answer = asking().with_context(|| format!("ask on {}", socket.display()))?;
    anyhow::ensure!(answer.starts_with("HTTP/1.1 200 "), "{path}: {}", answer.lines().next().unwrap_or("no answer"));
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

    fn ask(address: SocketAddr, path: &str) -> std::io::Result<String> {
        let mut stream = std::net::TcpStream::connect(address)?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
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
        let answer = async |path: &'static str| {
            tokio::task::spawn_blocking(move || ask(port, path)).await.expect("asked").expect("an answer")
        };
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

    fn nothing() -> Told {
        Arc::new(|| Box::pin(std::future::ready(None)))
    }

    /// On the node's address the handler answers that is to go; the next one, at its own socket, for itself.
    #[tokio::test(flavor = "multi_thread")]
    async fn two_handlers_of_a_node_answer_each_for_itself() {
        let folder = tempfile::tempdir().expect("a folder");
        let [first, next] = ["first", "next"].map(|name| folder.path().join(name));
        let address = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("it");
        let outgoing = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("one");
        let old = watch::channel(true).1;
        let (at, also) = (first.clone(), old.clone());
        let serving = outgoing.spawn(async move {
            serve(address, also, nothing()).await?;
            serve_on_socket(&at, old, nothing())
        });
        serving.await.expect("not aborted").expect("served");
        let (tell, ready) = watch::channel(false);
        serve_when_free(address, ready.clone(), nothing());
        serve_on_socket(&next, ready, nothing()).expect("a socket");
        let asked = async |socket: &Path, path: &'static str| {
            let socket = socket.to_owned();
            tokio::task::spawn_blocking(move || probe(&socket, path)).await.expect("asked")
        };
        assert!(asked(&first, "/readyz").await.is_ok() && asked(&next, "/livez").await.is_ok());
        let refused = asked(&next, "/readyz").await.expect_err("it is not ready").to_string();
        assert!(refused.contains("503"), "{refused}");
        tell.send_replace(true);
        asked(&next, "/readyz").await.expect("ready");
        // The one before ends: the next one has the address.
        outgoing.shutdown_background();
        let ask = async || tokio::task::spawn_blocking(move || ask(address, "/readyz")).await.expect("asked");
        let gone = loop {
            match asked(&first, "/livez").await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(gone) => break gone.to_string(),
            }
        };
        assert!(gone.contains("first"), "{gone}");
        // On its way out that one may still take a connection, and answers none.
        let answer = loop {
            match ask().await {
                Ok(answer) if !answer.is_empty() => break answer,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    }
}
