//! One node's process: kubelet and handler, in the node's network namespace.

use crate::args::Node;
use crate::{handler, shutdown};
use anyhow::Context;
use godwit_api::Installation;
use godwit_handler::{Clock, MigrationInterface, TlsPaths};
use godwit_network::Namespace;
use godwit_standalone::{Cluster, Layout, fabric, pki};
use kube::config::{KubeConfigOptions, Kubeconfig};
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use tokio::sync::watch;

/// A node, and the cluster that it belongs to.
struct Place {
    name: String,
    namespace: Option<String>,
    address: IpAddr,
    migrations: Option<MigrationInterface>,
    pod_range: Option<String>,
    kubelet: PathBuf,
    /// None where its handler is another process.
    handler: Option<PathBuf>,
    /// Of the kubelet, and of the handler unless that asks for its own.
    tls: TlsPaths,
    requests: bool,
    root: PathBuf,
    images: PathBuf,
    state: PathBuf,
    clock: Clock,
    cluster_id: String,
    installation: Installation,
}

/// Runs until SIGTERM. Guests run on.
pub fn run(args: &Node) -> anyhow::Result<()> {
    let layout = Layout::open(&args.data_dir)?;
    let place = match &args.kubeconfig {
        Some(kubeconfig) => joined(&layout, args, kubeconfig)?,
        None => native(&layout, args)?,
    };
    if let Some(name) = &place.namespace {
        // Before the runtime starts its threads: all of the process is to live on the node.
        Namespace::open(name)?.enter()?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(place))
}

/// A node of the cluster that `godwit up` has made.
fn native(layout: &Layout, args: &Node) -> anyhow::Result<Place> {
    let name = args.name.as_str();
    let cluster = layout.load()?.context("no --kubeconfig, and the data directory has no cluster of `godwit up`")?;
    let number = cluster.number_of(name).with_context(|| format!("no node {name} in this cluster"))?;
    let pair = pki::pair(layout, &pki::node_file(name));
    Ok(Place {
        namespace: Some(cluster.namespace(name)),
        address: IpAddr::V4(Cluster::node_address(number)),
        migrations: args.migrations.to_handler().or_else(|| {
            let interface = fabric::MIGRATIONS.to_owned();
            cluster.migration_network.then_some(MigrationInterface { interface, network: None })
        }),
        pod_range: Some(Cluster::pod_range(number)),
        kubelet: pki::kubeconfig(layout, &pki::node_file(name)),
        handler: Some(pki::kubeconfig(layout, &pki::handler_file(name))),
        tls: TlsPaths { ca: pki::ca(layout), cert: pair.cert, key: pair.key },
        requests: false,
        root: layout.node(name),
        images: layout.images(),
        state: cluster.state().join(name),
        // The control plane and all nodes sleep and wake with this machine.
        clock: Clock::Awake,
        installation: Installation::USUAL,
        cluster_id: cluster.id,
        name: name.to_owned(),
    })
}

/// A node of any cluster.
fn joined(layout: &Layout, args: &Node, kubeconfig: &Path) -> anyhow::Result<Place> {
    let address = match args.address {
        Some(address) => address,
        None => {
            let find = || own_address(kubeconfig);
            match &args.network_namespace {
                Some(name) => Namespace::open(name)?.run(find)??,
                None => find()?,
            }
        }
    };
    // The same for all nodes of a data directory, which `godwit down` cleans up.
    let id = layout.id();
    Ok(Place {
        name: args.name.clone(),
        namespace: args.network_namespace.clone(),
        address,
        migrations: args.migrations.to_handler(),
        pod_range: args.pod_cidr.clone(),
        kubelet: kubeconfig.to_owned(),
        handler: (!args.without_handler)
            .then(|| args.handler_kubeconfig.clone().unwrap_or_else(|| kubeconfig.to_owned())),
        tls: handler::tls(&args.tls)?,
        requests: args.tls.request_certificate,
        root: layout.node(&args.name),
        images: layout.images(),
        state: godwit_standalone::state(&id).join(&args.name),
        clock: Clock::Boot,
        installation: Installation::new(args.namespace.as_str()),
        cluster_id: id,
    })
}

/// The address from which the API server is reached.
fn own_address(kubeconfig: &Path) -> anyhow::Result<IpAddr> {
    let file = Kubeconfig::read_from(kubeconfig)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let options = KubeConfigOptions::default();
    let server = runtime.block_on(kube::Config::from_custom_kubeconfig(file, &options))?.cluster_url;
    let host = server.host().context("the kubeconfig names no server")?.trim_matches(['[', ']']);
    // Nothing is sent: the kernel is asked for the way.
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    let port = server.port_u16().unwrap_or(443);
    socket.connect((host, port)).with_context(|| format!("no way to the API server {server}; see --address"))?;
    let address = socket.local_addr()?.ip();
    anyhow::ensure!(
        !address.is_loopback(),
        "the API server is on this machine; say with --address how others reach the node"
    );
    Ok(address)
}

async fn serve(place: Place) -> anyhow::Result<()> {
    let (stop, stopped) = watch::channel(false);
    let asked = shutdown::asked()?;
    let kubelet = godwit_kubelet::run(
        godwit_kubelet::Options {
            client: godwit_standalone::client(&place.kubelet).await?,
            node_name: place.name.clone(),
            node_ip: place.address,
            pod_range: place.pod_range,
            root: place.root.clone(),
            images: godwit_images::Store::open(place.images)?,
            cluster_id: place.cluster_id.clone(),
            godwit: std::env::current_exe().context("find the godwit binary")?,
            tls: godwit_kubelet::TlsFiles {
                ca: place.tls.ca.clone(),
                cert: place.tls.cert.clone(),
                key: place.tls.key.clone(),
            },
        },
        shutdown::until(stopped.clone()),
    );
    let client = match &place.handler {
        Some(kubeconfig) => Some(godwit_standalone::client(kubeconfig).await?),
        None => None,
    };
    let handler = async {
        let Some(client) = client else {
            shutdown::until(stopped).await;
            return Ok(());
        };
        let tls = match place.requests {
            true => handler::request(client.clone(), &place.installation, &place.name, &place.state).await,
            false => place.tls,
        };
        let options = godwit_handler::Options {
            client,
            installation: place.installation,
            node_name: place.name,
            node_ip: place.address,
            migration_interface: place.migrations,
            front_port: godwit_handler::front::PORT,
            kubelet_root: place.root,
            state: place.state,
            clock: place.clock,
            tls,
            cluster_id: place.cluster_id,
            device_plugins: None,
            accelerator: None,
        };
        godwit_handler::run(options, shutdown::until(stopped)).await
    };
    let (mut kubelet, mut handler) = (std::pin::pin!(kubelet), std::pin::pin!(handler));
    tokio::select! {
        () = asked => {}
        ended = &mut kubelet => return ended.context("kubelet"),
        ended = &mut handler => return ended.context("handler"),
    }
    stop.send_replace(true);
    let ending = async { tokio::join!(kubelet, handler) };
    let _ = tokio::time::timeout(std::time::Duration::from_secs(2), ending).await;
    Ok(())
}
