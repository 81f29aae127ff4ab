//! `godwit webhook`: KubeVirt's admission webhooks for a real Kubernetes.

use crate::args::Webhook;
use crate::shutdown::until;
use anyhow::Context;
use std::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Serves until SIGTERM or SIGINT. Prints where it listens.
pub async fn run(args: Webhook) -> anyhow::Result<()> {
    let client = match &args.kubeconfig {
        Some(path) => godwit_standalone::client(path).await?,
        None => kube::Client::try_default().await.context("no --kubeconfig, and this is no pod of a cluster")?,
    };
    let listener = TcpListener::bind(args.listen).with_context(|| format!("listen on {}", args.listen))?;
    println!("listening on https://{}", listener.local_addr()?);
    let (stop, stopped) = watch::channel(false);
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        stop.send_replace(true);
    });
    let options = godwit_webhook::Options { listener, certificate: args.tls_cert, key: args.tls_key, client };
    godwit_webhook::serve(options, until(stopped)).await?;
    Ok(())
}
