//! What kubelets ask of a pod: whether it lives, and whether it is ready.

use anyhow::Context;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use std::net::SocketAddr;
use tokio::sync::watch;

/// Answers from now on, in the background.
///
/// # Errors
/// The address is taken, or not one of this machine's.
pub async fn serve(address: SocketAddr, ready: watch::Receiver<bool>) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router(ready)).await {
            eprintln!("godwit: probes are answered no more: {error}");
        }
    });
    Ok(())
}

fn router(ready: watch::Receiver<bool>) -> Router {
    let is_ready = move || {
        let answer = match *ready.borrow() {
            true => (StatusCode::OK, "ok\n"),
            false => (StatusCode::SERVICE_UNAVAILABLE, "not everything is listed yet\n"),
        };
        std::future::ready(answer)
    };
    Router::new().route("/livez", get(|| async { "ok\n" })).route("/readyz", get(is_ready))
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
        answer.lines().next().unwrap_or_default().to_owned()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn ready_is_told_when_it_is() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("it");
        let (tell, ready) = watch::channel(false);
        serve(port, ready).await.expect("serve");
        let ask = async |path: &'static str| tokio::task::spawn_blocking(move || ask(port, path)).await.expect("asked");
        assert_eq!(ask("/livez").await, "HTTP/1.1 200 OK");
        assert_eq!(ask("/readyz").await, "HTTP/1.1 503 Service Unavailable");
        tell.send_replace(true);
        assert_eq!(ask("/readyz").await, "HTTP/1.1 200 OK");
        assert_eq!(ask("/metrics").await, "HTTP/1.1 404 Not Found");
    }
}
