//! One node's process: kubelet and handler, in the node's network namespace.

use crate::args::Node;
use crate::shutdown::until;
use anyhow::Context;
use godwit_network::Namespace;
use godwit_standalone::{Cluster, Layout, pki};
use std::net::IpAddr;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Runs until SIGTERM. Guests run on.
pub fn run(args: &Node) -> anyhow::Result<()> {
    let layout = Layout::open(&args.data_dir)?;
    let cluster = layout.load()?.context("no cluster.json: this process is started by `godwit up`")?;
    let number = cluster.number_of(&args.name).with_context(|| format!("no node {} in this cluster", args.name))?;
    // Before the runtime starts its threads: all of the process is to live on the node.
    Namespace::open(&cluster.namespace(&args.name))?.enter()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(&layout, &cluster, &args.name, number))
}

async fn serve(layout: &Layout, cluster: &Cluster, name: &str, number: u8) -> anyhow::Result<()> {
    let (stop, stopped) = watch::channel(false);
    let address = IpAddr::V4(Cluster::node_address(number));
    let node = pki::pair(layout, &pki::node_file(name));
    let kubelet = godwit_kubelet::run(
        godwit_kubelet::Options {
            client: godwit_standalone::client(&pki::kubeconfig(layout, &pki::node_file(name))).await?,
            node_name: name.to_owned(),
            node_ip: address,
            node_number: number,
            root: layout.node(name),
            images: godwit_images::Store::open(layout.images())?,
            cluster_id: cluster.id.clone(),
            godwit: std::env::current_exe().context("find the godwit binary")?,
            tls: godwit_kubelet::TlsFiles { ca: pki::ca(layout), cert: node.cert.clone(), key: node.key.clone() },
        },
        until(stopped.clone()),
    );
    let handler = godwit_handler::run(
        godwit_handler::Options {
            client: godwit_standalone::client(&pki::kubeconfig(layout, &pki::handler_file(name))).await?,
            node_name: name.to_owned(),
            node_ip: address,
            kubelet_root: layout.node(name),
            tls: godwit_handler::TlsPaths { ca: pki::ca(layout), cert: node.cert, key: node.key },
            cluster_id: cluster.id.clone(),
            accelerator: None,
        },
        until(stopped),
    );
    let (mut kubelet, mut handler) = (std::pin::pin!(kubelet), std::pin::pin!(handler));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = &mut kubelet => return ended.context("kubelet"),
        ended = &mut handler => return ended.context("handler"),
    }
    stop.send_replace(true);
    let ending = async { tokio::join!(kubelet, handler) };
    let _ = tokio::time::timeout(std::time::Duration::from_secs(2), ending).await;
    Ok(())
}
