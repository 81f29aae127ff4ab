//! The control plane's process: store, API server, KubeVirt's kinds and rules, controllers.

use crate::actions::KubeVirtActions;
use crate::admission::KubeVirtAdmission;
use crate::args::ControlPlane;
use crate::shutdown::until;
use anyhow::Context;
use futures::future::BoxFuture;
use godwit_api::{Installation, access};
use godwit_apiserver::{Dialer, Options, Prepared, TlsFiles, User};
use godwit_handler::front::FrontClient;
use godwit_network::Namespace;
use godwit_standalone::{CONTROL_PLANE_ADDRESS, Cluster, FABRIC_API_PORT, Layout, fabric, pki};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::{Api, Client};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Runs until SIGTERM.
pub fn run(args: &ControlPlane) -> anyhow::Result<()> {
    let layout = Layout::open(&args.data_dir)?;
    let cluster = layout.load()?.context("no cluster.json: this process is started by `godwit up`")?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(&layout, &cluster))
}

async fn serve(layout: &Layout, cluster: &Cluster) -> anyhow::Result<()> {
    let (stop, stopped) = watch::channel(false);
    let switch = Namespace::open(&fabric::switch(cluster))?;
    let local = TcpListener::bind((Ipv4Addr::LOCALHOST, cluster.api_port))
        .with_context(|| format!("listen on 127.0.0.1:{}", cluster.api_port))?;
    let inner = switch.listen(SocketAddr::from((CONTROL_PLANE_ADDRESS, FABRIC_API_PORT)))?;
    let dialer = Arc::new(FabricDialer(switch));
    let handlers = pki::pair(layout, pki::HANDLER_CLIENT);
    let handlers = godwit_handler::TlsPaths { ca: pki::ca(layout), cert: handlers.cert, key: handlers.key };
    let dial = dialer.clone();
    let front = FrontClient::new(handlers, Arc::new(move |address| dial.dial(address)));
    let options = Options {
        store: godwit_store::Store::open(layout.store())?,
        listeners: vec![local, inner],
        tls: files(layout, pki::API_SERVER),
        kubelet_client: Some(files(layout, pki::KUBELET_CLIENT)),
        admission: vec![Arc::new(KubeVirtAdmission)],
        actions: vec![Arc::new(KubeVirtActions::new(front))],
        dialer,
        roles: roles(),
    };
    let prepared = Prepared::new(options).await.context("API server")?;
    // Before the first request is taken: whoever reaches the API finds KubeVirt's kinds and objects.
    furnish(&Client::new(prepared.server.service(User::new("godwit", &["system:masters"])), "default")).await?;
    let mut server = tokio::spawn(prepared.serve(until(stopped.clone())));
    let mut controllers = tokio::spawn(control(layout.clone(), stopped));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let outcome = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        ended = &mut server => ended.map_err(anyhow::Error::from).and_then(|r| r.context("API server")),
        ended = &mut controllers => ended.map_err(anyhow::Error::from).and_then(|r| r.context("controllers")),
    };
    stop.send_replace(true);
    // Watches end at once; whoever does not is cut off, every acknowledged write being on disk already.
    let _ = tokio::time::timeout(Duration::from_secs(2), async {
        if !controllers.is_finished() {
            let _ = controllers.await;
        }
        if !server.is_finished() {
            let _ = server.await;
        }
    })
    .await;
    outcome
}

/// What the accounts of this cluster's components may do: what they may in any cluster, and Kubernetes' own work.
pub fn roles() -> Vec<serde_json::Value> {
    let accounts = access::components().into_iter().chain([access::engine_room()]);
    accounts.flat_map(|account| account.objects(Installation::USUAL.namespace())).collect()
}

fn files(layout: &Layout, identity: &str) -> TlsFiles {
    let pair = pki::pair(layout, identity);
    TlsFiles { ca: pki::ca(layout), cert: pair.cert, key: pair.key }
}

/// Reaches kubelets through the fabric without entering it.
struct FabricDialer(Namespace);

impl Dialer for FabricDialer {
    fn dial(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<TcpStream>> {
        let switch = self.0.clone();
        Box::pin(async move {
            let connect = move || switch.connect(address, Duration::from_secs(5)).map_err(io::Error::other);
            let stream = tokio::task::spawn_blocking(connect).await.map_err(io::Error::other)??;
            stream.set_nonblocking(true)?;
            TcpStream::from_std(stream)
        })
    }
}

async fn control(layout: Layout, stopped: watch::Receiver<bool>) -> anyhow::Result<()> {
    let client = godwit_standalone::impatient_client(&pki::kubeconfig(&layout, pki::CONTROLLER)).await?;
    let data_dir = layout.root().to_str().context("the data directory's path is not UTF-8")?;
    let options = godwit_runtime::Options::standalone("godwit-standalone", data_dir);
    godwit_runtime::run(client, options, until(stopped)).await?;
    Ok(())
}

/// Makes KubeVirt's kinds and objects. Kinds, roles and bindings of an older data directory become those of this version;
/// other objects belong to the user once they are there.
pub async fn furnish(admin: &Client) -> anyhow::Result<()> {
    for crd in godwit_api::crd::crds() {
        apply(admin, crd).await?;
    }
    for object in godwit_api::initial::initial_objects() {
        apply(admin, object).await?;
    }
    Ok(())
}

async fn apply(client: &Client, value: serde_json::Value) -> anyhow::Result<()> {
    let object: DynamicObject = serde_json::from_value(value)?;
    let types = object.types.clone().context("an object without apiVersion and kind")?;
    let gvk = GroupVersionKind::try_from(&types)?;
    let resource = ApiResource::from_gvk(&gvk);
    let api: Api<DynamicObject> = match &object.metadata.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let name = object.metadata.name.clone().unwrap_or_default();
    let ours = ["CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding"].contains(&gvk.kind.as_str());
    let parameters = PatchParams::apply("godwit").force();
    // A kind may be a moment behind its definition.
    let mut last = None;
    for _ in 0..200 {
        let there = if ours { Ok(None) } else { api.get_opt(&name).await };
        let made = match there {
            Ok(None) => api.patch(&name, &parameters, &Patch::Apply(&object)).await,
            Ok(Some(there)) => Ok(there),
            Err(error) => Err(error),
        };
        match made {
            Ok(_) => return Ok(()),
            Err(error) => last = Some(error),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err(anyhow::Error::from(last.context("no answer")?)).with_context(|| format!("make {} {name}", gvk.kind))
}
