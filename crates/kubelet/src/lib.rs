//! Pods here: runs pods as processes in network namespaces.
//!
//! One task a pod ([`pod`]), in it one a container ([`container`]), whose process is watched by a [`shim`] of its own that
//! outlives the kubelet. What is known of a pod is on a board, from which its status is published.

mod backoff;
pub mod cgroup;
mod container;
mod env;
mod error;
mod events;
mod loops;
mod network;
mod node;
mod ownership;
mod plan;
mod pod;
mod probes;
mod process;
mod publish;
mod quantity;
mod server;
pub mod shim;
pub mod spec;
mod status;
mod volumes;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use godwit_images::{Auth, PullPolicy, Unpacked};
use godwit_network::Namespace;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use error::Error;
use pod::Seen;
use server::Folders;

/// The port of the kubelet's own server.
pub const PORT: u16 = 10250;

/// The files of the kubelet's own server, PEM.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The cluster's CA: who has a certificate of it may ask.
    pub ca: PathBuf,
    /// The node's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// What a kubelet needs to know.
pub struct Options {
    /// Client with the identity `system:node:<name>`.
    pub client: Client,
    /// The node's name.
    pub node_name: String,
    /// The node's address.
    pub node_ip: IpAddr,
    /// The range of the node's pods, such as `10.244.1.0/24`, where its object says none. Without one the cluster is to give it
    /// (kube-controller-manager does), and until then the node runs nothing.
    pub pod_range: Option<String>,
    /// The folder with `pods/`.
    pub root: PathBuf,
    /// Where images are.
    pub images: godwit_images::Store,
    /// Eight hexadecimal digits that all that this cluster makes on the machine carries.
    pub cluster_id: String,
    /// The godwit binary: for shims, and for containers of the host image.
    pub godwit: PathBuf,
    /// For the server on [`PORT`].
    pub tls: TlsFiles,
}

/// What all pods share.
pub(crate) struct Context {
    client: Client,
    node_name: String,
    node_ip: IpAddr,
    root: PathBuf,
    images: godwit_images::Store,
    cluster_id: String,
    godwit: PathBuf,
    events: events::Events,
    networks: Arc<network::Networks>,
}

impl Context {
    fn pod_folder(&self, uid: &str) -> PathBuf {
        // It becomes part of a path; the API server makes uids, but is not to be trusted with folders.
        let clean: String = uid.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        self.root.join("pods").join(clean)
    }

    fn group_name(&self, uid: &str) -> PathBuf {
        PathBuf::from(format!("gw-{}", self.cluster_id)).join(uid)
    }

    fn pod_group(&self, pod: &Pod) -> cgroup::Group {
        cgroup::Group::new(self.group_name(&pod.uid().unwrap_or_default()))
    }

    fn group(&self, pod: &Pod, container: &str) -> cgroup::Group {
        cgroup::Group::new(self.group_name(&pod.uid().unwrap_or_default()).join(container))
    }

    /// The image, unpacked. Registries are spoken to from the machine's own network: a standalone node's reaches only other
    /// nodes.
    async fn image(&self, reference: &str, policy: PullPolicy) -> Result<Unpacked, godwit_images::Error> {
        let here = matches!(self.images.resolve(reference), Ok(Some(_)));
        let local = self.images.is_local(reference).unwrap_or(false);
        if policy == PullPolicy::Never || (here && (local || policy == PullPolicy::IfNotPresent)) {
            return self.images.ensure(reference, policy, &Auth::Anonymous).await;
        }
        let failed = |reason: String| godwit_images::Error::Pull { reference: reference.into(), reason };
        let (images, name) = (self.images.clone(), reference.to_owned());
        let pulled = tokio::task::spawn_blocking(move || {
            Namespace::origin()?.run(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.map(|runtime| runtime.block_on(images.ensure(&name, policy, &Auth::Anonymous)))
            })
        });
        let pulled = pulled.await.map_err(|e| failed(e.to_string()))?;
        pulled.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?
    }

    /// Waits before an image is asked for again, but not longer than until somebody adds it to the store.
    async fn wait_for_image(&self, reference: &str, delay: Duration, then: impl FnOnce()) {
        let present = || matches!(self.images.resolve(reference), Ok(Some(_)));
        let was_present = present();
        let end = tokio::time::Instant::now() + delay;
        let mut then = Some(then);
        while tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if !was_present && present() {
                return;
            }
            // The first reason is to be seen for a while before the general one.
            if let Some(then) = then.take() {
                then();
            }
        }
    }
}

/// Runs the node's pods until `shutdown`. Containers run on; the next kubelet with the same folder finds them.
///
/// # Errors
/// The node cannot be registered or its network set up; the server's certificates or address cannot be used.
pub async fn run(mut options: Options, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    tokio::select! {
        result = serve(&mut options) => result,
        () = shutdown => Ok(()),
    }
}

async fn serve(options: &mut Options) -> Result<(), Error> {
    let pods = options.root.join("pods");
    std::fs::create_dir_all(&pods).map_err(Error::io("make", &pods))?;
    // Paths are handed to other processes.
    options.root = options.root.canonicalize().map_err(Error::io("find", &options.root))?;
    let options = &*options;
    let acceptor = server::acceptor(&options.tls)?;
    let range = node::register(options).await?;
    let networks = network::Networks::start(options.client.clone(), &options.cluster_id, range, &pods).await?;
    let context = Arc::new(Context {
        client: options.client.clone(),
        node_name: options.node_name.clone(),
        node_ip: options.node_ip,
        root: options.root.clone(),
        images: options.images.clone(),
        cluster_id: options.cluster_id.clone(),
        godwit: options.godwit.clone(),
        events: events::Events::start(options.client.clone(), &options.node_name),
        networks: Arc::new(networks),
    });
    let folders = Folders::default();
    tracing::info!(node = options.node_name, address = %options.node_ip, "kubelet is ready");
    tokio::select! {
        () = node::heartbeat(options) => Ok(()),
        () = node::routes(options.client.clone(), options.node_name.clone(), context.networks.clone()) => Ok(()),
        result = server::serve(options.node_ip, acceptor, folders.clone()) => result,
        () = follow_pods(context.clone(), folders) => Ok(()),
    }
}

/// The pods that have a task, by uid.
struct Pods {
    context: Arc<Context>,
    folders: Folders,
    known: BTreeMap<String, watch::Sender<Seen>>,
    tasks: JoinSet<String>,
}

impl Pods {
    fn see(&mut self, pod: Pod) {
        let Some(uid) = pod.uid() else { return };
        let seen = Seen { pod: Arc::new(pod), gone: false };
        if let Some(sender) = self.known.get(&uid) {
            sender.send_replace(seen);
            return;
        }
        let (namespace, name) = (seen.pod.namespace().unwrap_or_default(), seen.pod.name_any());
        let folder = self.context.pod_folder(&uid);
        self.folders.insert(namespace.clone(), name.clone(), folder.clone());
        let (sender, receiver) = watch::channel(seen);
        self.known.insert(uid.clone(), sender);
        let (context, folders) = (self.context.clone(), self.folders.clone());
        self.tasks.spawn(async move {
            pod::run(context, receiver).await;
            folders.remove(namespace, name, &folder);
            uid
        });
    }

    fn lose(&mut self, uid: &str) {
        if let Some(sender) = self.known.get(uid) {
            sender.send_modify(|seen| seen.gone = true);
        }
    }

    /// After a list of all pods: those that are not in it are gone, also those of which only the folder is left.
    fn lose_all_but(&mut self, listed: &BTreeSet<String>) {
        let gone: Vec<String> = self.known.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
        for uid in gone {
            self.lose(&uid);
        }
        for entry in std::fs::read_dir(self.context.root.join("pods")).into_iter().flatten().flatten() {
            let uid = entry.file_name().to_string_lossy().into_owned();
            if !listed.contains(&uid) && !self.known.contains_key(&uid) {
                let context = self.context.clone();
                self.tasks.spawn(async move {
                    pod::remove_orphan(&context, &uid).await;
                    String::new()
                });
            }
        }
    }
}

async fn follow_pods(context: Arc<Context>, folders: Folders) {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={}", context.node_name));
    let stream = watcher(Api::<Pod>::all(context.client.clone()), config).default_backoff();
    let mut stream = std::pin::pin!(stream);
    let mut pods = Pods { context, folders, known: BTreeMap::new(), tasks: JoinSet::new() };
    let mut listed = BTreeSet::new();
    loop {
        tokio::select! {
            Some(ended) = pods.tasks.join_next() => match ended {
                Ok(uid) => {
                    pods.known.remove(&uid);
                }
                Err(error) => tracing::error!(%error, "the task of a pod has died"),
            },
            event = stream.next() => match event {
                None => return,
                Some(Ok(watcher::Event::Init)) => listed.clear(),
                Some(Ok(watcher::Event::InitApply(pod))) => {
                    listed.extend(pod.uid());
                    pods.see(pod);
                }
                Some(Ok(watcher::Event::InitDone)) => pods.lose_all_but(&listed),
                Some(Ok(watcher::Event::Apply(pod))) => pods.see(pod),
                Some(Ok(watcher::Event::Delete(pod))) => {
                    if let Some(uid) = pod.uid() {
                        pods.lose(&uid);
                    }
                }
                Some(Err(error)) => tracing::debug!(%error, "cannot watch pods"),
            },
        }
    }
}
