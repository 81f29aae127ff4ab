//! `godwit webhook`: KubeVirt's admission webhooks for a real Kubernetes.

use crate::args::Webhook;
use crate::{connect, shutdown};
use anyhow::Context;
use std::net::TcpListener;

/// Serves until SIGTERM or SIGINT. Prints where it listens.
pub async fn run(args: Webhook) -> anyhow::Result<()> {
    let asked = shutdown::asked()?;
    let client = connect::client(args.kubeconfig.as_deref()).await?;
    let listener = TcpListener::bind(args.listen).with_context(|| format!("listen on {}", args.listen))?;
    println!("listening on https://{}", listener.local_addr()?);
    let cluster = godwit_webhook::Cluster { client, installation: args.installed.installation() };
    let options = godwit_webhook::Options { listener, certificate: args.tls_cert, key: args.tls_key, cluster };
    godwit_webhook::serve(options, asked).await?;
    Ok(())
}
