//! The front door: TLS, authentication, authorisation, admission, generic REST and watch streams.
//!
//! One set of handlers serves every kind, driven by the table of [`godwit_machinery::resource::Resource`]s: the built-in
//! ones and those of CustomResourceDefinitions, which are served as soon as they are stored. Objects are JSON values
//! throughout; what each kind does beyond the common rules is in `strategy`.

mod actions;
mod admission;
mod bootstrap;
mod budgets;
mod collector;
mod create;
mod delete;
mod events;
mod expire;
mod intake;
mod kinds;
mod list;
mod listen;
mod managed;
mod paths;
mod pods;
mod quotas;
mod rbac;
mod read;
mod reconcile;
mod render;
mod reviews;
mod server;
mod strategy;
mod update;
mod watch;

pub use actions::{ActionRequest, Actions};
pub use admission::{Admission, AdmissionRequest, EvictionVerdict, Lookup, MutateOutcome, Operation, OwnWrite};
pub use godwit_serving::respond::Body;
pub use godwit_serving::user::User;
pub use server::Service;

use godwit_serving::pem::PemError;
pub(crate) use godwit_serving::{request, respond, user};

use futures::future::BoxFuture;
use godwit_store::Store;
use server::Inner;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Why the server could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A certificate or key could not be read.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// Certificate and key do not fit.
    #[error("TLS configuration: {0}")]
    Tls(#[from] rustls::Error),
    /// The verifier of client certificates could not be built.
    #[error("client certificates cannot be verified: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// A listener failed.
    #[error("listener: {0}")]
    Listener(#[from] io::Error),
    /// The objects that must exist from the start could not be made.
    #[error("cannot create {what}: {status}")]
    Bootstrap {
        /// Which object.
        what: String,
        /// Why not.
        status: Box<godwit_machinery::status::Status>,
    },
}

/// PEM files of one identity and of the authority that it and its peers are checked against.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// Certificate authority.
    pub ca: PathBuf,
    /// Certificate (chain).
    pub cert: PathBuf,
    /// Private key.
    pub key: PathBuf,
}

/// How the server reaches kubelets, which live in other network namespaces.
pub trait Dialer: Send + Sync {
    /// Opens a TCP connection.
    fn dial(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<TcpStream>>;
}

/// Dials from where this process is.
#[derive(Debug, Clone, Copy, Default)]
pub struct DirectDialer;

impl Dialer for DirectDialer {
    fn dial(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(address))
    }
}

/// What a server with sockets needs.
pub struct Options {
    /// Where objects live.
    pub store: Store,
    /// Sockets to accept on, from whatever namespace they were made in.
    pub listeners: Vec<TcpListener>,
    /// The serving identity; clients are checked against its authority.
    pub tls: TlsFiles,
    /// The identity towards kubelets; without one there are no logs.
    pub kubelet_client: Option<TlsFiles>,
    /// Plugins in the order in which they are asked.
    pub admission: Vec<Arc<dyn Admission>>,
    /// Subresources of groups of their own.
    pub actions: Vec<Arc<dyn Actions>>,
    /// Way to the kubelets.
    pub dialer: Arc<dyn Dialer>,
    /// Roles and bindings that come with the server beside Kubernetes' own; those of an older store are given what they lack.
    pub roles: Vec<serde_json::Value>,
}

/// What a server without sockets needs.
pub struct Parts {
    /// Where objects live.
    pub store: Store,
    /// Plugins in the order in which they are asked.
    pub admission: Vec<Arc<dyn Admission>>,
    /// Subresources of groups of their own.
    pub actions: Vec<Arc<dyn Actions>>,
    /// Way to the kubelets.
    pub dialer: Arc<dyn Dialer>,
    /// The identity towards kubelets.
    pub kubelet_client: Option<TlsFiles>,
    /// PEM of the cluster's authority, published in every namespace as `kube-root-ca.crt`; empty: not published.
    pub ca: String,
    /// Roles and bindings that come with the server beside Kubernetes' own; those of an older store are given what they lack.
    pub roles: Vec<serde_json::Value>,
}

impl Parts {
    /// The least: no plugins, no kubelets.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            admission: Vec::new(),
            actions: Vec::new(),
            dialer: Arc::new(DirectDialer),
            kubelet_client: None,
            ca: String::new(),
            roles: Vec::new(),
        }
    }
}

/// A running server without sockets: objects that must exist do, and its housekeeping (garbage, namespaces, expiry)
/// runs until the last clone is gone.
#[derive(Clone)]
pub struct Server {
    inner: Arc<Inner>,
    _housekeeping: Arc<Housekeeping>,
}

struct Housekeeping {
    // Aborts its tasks when dropped.
    _tasks: JoinSet<()>,
}

impl Server {
    /// Starts it. Must be called within a tokio runtime.
    pub async fn start(parts: Parts) -> Result<Self, Error> {
        let kubelet = parts.kubelet_client.as_ref().map(listen::client_config).transpose()?;
        let inner = Arc::new(Inner {
            registry: kinds::Registry::new(
                parts.store.clone(),
                parts.actions.iter().flat_map(|actions| actions.resources()).collect(),
            ),
            rbac: rbac::Rbac::new(parts.store.clone()),
            store: parts.store,
            admission: parts.admission,
            actions: parts.actions,
            dialer: parts.dialer,
            kubelet: kubelet.map(Arc::new),
            documents: paths::Documents::default(),
            quotas: quotas::Quotas::default(),
            evictions: tokio::sync::Mutex::default(),
            stopping: tokio::sync::watch::Sender::new(false),
        });
        bootstrap::objects(&inner, &parts.ca, parts.roles).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(collector::run(inner.clone(), parts.ca));
        tasks.spawn(expire::run(inner.clone()));
        tasks.spawn(budgets::run(inner.clone()));
        tasks.spawn(quotas::run(inner.clone()));
        Ok(Self { inner, _housekeeping: Arc::new(Housekeeping { _tasks: tasks }) })
    }

    /// A `tower::Service` for requests of this user, such as `kube::Client::new` takes.
    pub fn service(&self, user: User) -> Service {
        Service { inner: self.inner.clone(), user: Arc::new(user) }
    }

    /// Ends watches and says on `/readyz` that the server is going.
    pub fn stop(&self) {
        self.inner.stopping.send_replace(true);
    }
}

/// A running server whose sockets are not served yet: what has to be there for the first client can be made.
pub struct Prepared {
    /// The server, for requests of this process.
    pub server: Server,
    listeners: Vec<TcpListener>,
    tls: Arc<rustls::ServerConfig>,
}

impl Prepared {
    /// Starts the server; clients that connect wait. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// Unusable certificates, or objects of the server's own that cannot be made.
    pub async fn new(options: Options) -> Result<Self, Error> {
        let Options { store, listeners, tls, kubelet_client, admission, actions, dialer, roles } = options;
        let config = listen::server_config(&tls)?;
        let ca = std::fs::read_to_string(&tls.ca)
            .map_err(|error| PemError { path: tls.ca.clone(), why: error.to_string() })?;
        let server = Server::start(Parts { store, admission, actions, dialer, kubelet_client, ca, roles }).await?;
        Ok(Self { server, listeners, tls: config })
    }

    /// Serves until `shutdown` is done, then ends watches, lets other requests finish for a moment, and returns.
    ///
    /// # Errors
    /// Unusable sockets.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
        listen::run(&self.server, self.listeners, self.tls, shutdown).await
    }
}

/// [`Prepared::new`] and [`Prepared::serve`] in one.
pub async fn serve(options: Options, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
    Prepared::new(options).await?.serve(shutdown).await
}
