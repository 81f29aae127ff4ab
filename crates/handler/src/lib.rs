//! One node: both ends of a migration, channels, VM networks, heartbeat.
//!
//! The handler of a node (KubeVirt's virt-handler) sees to it that the VMIs that the API places on its node run in their
//! launcher pods, says in the API how they are, and moves them: it is the receiving half of migrations to its node and the
//! sending half of those from it. It keeps no state of its own: whatever it knows, it can find out again from the API and the
//! launchers, so it may be restarted at any moment.
//!
//! [`decide`] is the heart: facts in, actions out, pure. The rest gathers facts and carries out actions. What happens when
//! guests change hands, and why there are never two, is in docs/hand-over.md.

pub mod channel;
mod confine;
mod context;
mod credentials;
pub mod decide;
mod dirty_rate;
mod door;
mod events;
mod expect;
pub mod facts;
pub mod fence;
mod follow;
pub mod frames;
pub mod front;
pub mod heartbeat;
mod lend;
mod links;
mod migration_network;
pub mod networks;
pub mod ownership;
mod processors;
mod progress;
mod recovery;
pub mod sockets;
mod source_link;
mod source_streams;
mod streams;
mod target_link;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod view;
mod watch;
mod worker;
mod write;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use godwit_api::{Installation, names};
use godwit_launcher::Processors;
pub use godwit_launcher::fence::Clock;
use godwit_launcher::rpc::Accelerator;
use kube::Client;

use crate::context::Context;
use crate::events::Events;
use crate::fence::Fence;
use crate::heartbeat::Offer;
use crate::links::Links;
pub use crate::migration_network::MigrationInterface;
use crate::migration_network::Underlay;
pub use crate::tls::TlsPaths;

/// What a handler needs to know.
pub struct Options {
    /// The API, as the handler's service account.
    pub client: Client,
    /// Where godwit is installed.
    pub installation: Installation,
    /// The name of this node.
    pub node_name: String,
    /// The address on which this handler is asked and migrations are received; other nodes must reach it.
    pub node_ip: IpAddr,
    /// The interface that migrations go over instead, while it is there.
    pub migration_interface: Option<MigrationInterface>,
    /// Where on it the API server asks for what is to be done with guests ([`front::PORT`]).
    pub front_port: u16,
    /// The kubelet's root folder (`/var/lib/kubelet`, or the node's folder in standalone mode).
    pub kubelet_root: PathBuf,
    /// A folder in memory, which is gone when the machine starts anew: what a handler leaves to its successor.
    pub state: PathBuf,
    /// By what until when guests may run is counted: [`Clock::Awake`] only where all nodes and the control plane are on one machine.
    pub clock: Clock,
    /// The node's certificate for migrations.
    pub tls: TlsPaths,
    /// The cluster's id, for the log.
    pub cluster_id: String,
    /// Kubelet's folder of device plugins ([`godwit_devices::FOLDER`]); none where pods have the node's devices anyway.
    pub device_plugins: Option<PathBuf>,
    /// What executes guests; found out at start when not given.
    pub accelerator: Option<Accelerator>,
}

/// Why a handler could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node's certificate cannot be used.
    #[error("the handler cannot start: {0}")]
    Tls(#[from] tls::TlsError),
}

/// Runs the handler until `shutdown` is done; then the node is marked as not schedulable. Guests run on.
///
/// # Errors
/// Only at start, when the node's certificate cannot be used: everything else is tried again for as long as it takes.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    // A handler that cannot receive should say so at once, not at the first migration.
    tls::Identity::load(&options.tls)?.server()?;
    tracing::info!(node = options.node_name, address = %options.node_ip, cluster = options.cluster_id, "handler starts");

    let (accelerator, known) = tokio::sync::watch::channel(options.accelerator);
    let (host_cpu, host_cpu_known) = tokio::sync::watch::channel(None);
    let underlay = Underlay::new(options.node_ip, options.migration_interface);
    let (offer, offered) =
        tokio::sync::watch::channel(Offer { migration_network: underlay.told(), ..Offer::default() });
    let following = tokio::spawn(underlay.clone().follow(offer.clone()));
    let wanted = options.accelerator;
    let probe = tokio::spawn(async move {
        let found = find_offer(wanted).await;
        accelerator.send_replace(Some(found.0));
        let tell = |processors: Option<Processors>| {
            host_cpu.send_replace(Some(processors.as_ref().and_then(processors::host_cpu)));
            offer.send_modify(|offer| {
                let migration_network = offer.migration_network.take();
                *offer = Offer { processors, migration_network, ..found.1.clone() };
            });
        };
        ask_until_known(|| find_processors(found.0), tell).await;
        // The receivers live as long as the handler; so must the senders.
        std::future::pending::<()>().await;
    });

    let events = Events::start(options.client.clone(), options.node_name.clone());
    let fence = Fence::resume(&options.state, options.clock);
    let fencing = tokio::spawn(fence::run(fence::Surroundings {
        client: options.client.clone(),
        namespace: options.installation.namespace().to_owned(),
        node: options.node_name.clone(),
        node_ip: options.node_ip,
        kubelet_root: options.kubelet_root.clone(),
        tls: options.tls.clone(),
        events: events.clone(),
        fence: fence.clone(),
    }));
    let plugins = options.device_plugins.map(|folder| tokio::spawn(offer_devices(folder, known.clone())));
    let context = Arc::new(Context {
        client: options.client.clone(),
        node: options.node_name.clone(),
        node_ip: options.node_ip,
        underlay,
        kubelet_root: options.kubelet_root,
        tls: options.tls,
        accelerator: known,
        host_cpu: host_cpu_known,
        links: Links::default(),
        fence,
        events,
    });
    let door = tokio::spawn(front::run(context.clone(), options.front_port));
    let watching = tokio::spawn(watch::run(context));
    heartbeat::run(options.client, options.node_name.clone(), offered, shutdown).await;
    if let Some(plugins) = plugins {
        plugins.abort();
    }
    door.abort();
    watching.abort();
    fencing.abort();
    following.abort();
    probe.abort();
    tracing::info!(node = options.node_name, "handler stopped");
    Ok(())
}

/// What this node offers: the accelerator that was wished for, or else the one that its machine turns out to have.
async fn find_offer(wanted: Option<Accelerator>) -> (Accelerator, Offer) {
    let (accelerator, reason) = match wanted {
        Some(accelerator) => (accelerator, "chosen by the handler's options".to_owned()),
        None => {
            let probe = godwit_launcher::probe_accelerator().await;
            (probe.accelerator, probe.reason)
        }
    };
    let version = godwit_launcher::qemu_version().await;
    let shortcoming = version.and_then(|version| godwit_launcher::shortcoming(accelerator, version));
    let qemu_version = version.map(|version| version.to_string());
    tracing::info!(%accelerator, reason, qemu = qemu_version, shortcoming, "what this node offers");
    let offer = Offer {
        accelerator: Some(accelerator.as_str().to_owned()),
        reason: Some(reason),
        qemu_version,
        shortcoming: shortcoming.map(str::to_owned),
        ..Offer::default()
    };
    (accelerator, offer)
}

/// Offers the node's devices to kubelet for ever; `/dev/kvm` where guests are run with it.
async fn offer_devices(folder: PathBuf, accelerator: tokio::sync::watch::Receiver<Option<Accelerator>>) {
    let mut accelerator = accelerator;
    // Kubelet is not told of a device that is away when what it is good for is only not known yet: pods that have it would be refused.
    let Ok(known) = accelerator.wait_for(Option::is_some).await.map(|known| *known) else { return };
    let (kvm, kvm_serves) = tokio::sync::watch::channel(known == Some(Accelerator::Kvm));
    let (_always, of_use) = tokio::sync::watch::channel(true);
    let offers = godwit_devices::Resource::all().map(|resource| {
        let of_use = if resource.name == names::DEVICE_KVM { kvm_serves.clone() } else { of_use.clone() };
        godwit_devices::run(resource, folder.clone(), of_use)
    });
    let follow = async {
        while accelerator.changed().await.is_ok() {
            let known = *accelerator.borrow_and_update();
            kvm.send_replace(known == Some(Accelerator::Kvm));
        }
    };
    tokio::join!(futures::future::join_all(offers), follow);
}

/// How long QEMU may take to say which processors it can give; it takes less than a second.
const PROCESSORS_LIMIT: Duration = Duration::from_secs(30);

/// When QEMU is asked again after it has not answered; each time after twice as long.
const ASK_AGAIN: Duration = Duration::from_secs(30);
/// The longest that this becomes.
const ASK_SELDOM: Duration = Duration::from_secs(3600);

/// Asks until there is an answer: a machine may have been too busy for one. Tells what is known after each time.
async fn ask_until_known<T, F: Future<Output = Option<T>>>(ask: impl Fn() -> F, mut tell: impl FnMut(Option<T>)) {
    let mut pause = ASK_AGAIN;
    loop {
        let answer = ask().await;
        let known = answer.is_some();
        tell(answer);
        if known {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(ASK_SELDOM);
    }
}

/// Which processors guests can have here. A node that does not know it runs guests all the same, with its own.
async fn find_processors(accelerator: Accelerator) -> Option<Processors> {
    let asked = tokio::time::timeout(PROCESSORS_LIMIT, godwit_launcher::processors(accelerator)).await;
    match asked.unwrap_or_else(|_| Err("QEMU does not answer".to_owned())) {
        Ok(found) => {
            let host = found.host_model().map(|host| host.model);
            tracing::info!(models = found.models.len(), features = found.features.len(), host, "processors for guests");
            Some(found)
        }
        Err(error) => {
            tracing::warn!(error, "not known which processors guests can have here");
            None
        }
    }
}

/// How long a handler that has just started may find that the cluster's definitions, or its own node, are still to come:
/// on one machine everything starts at the same time.
const STARTING: Duration = Duration::from_secs(20);

/// Whether an error says no more than that the cluster is still starting.
fn is_early(error: &kube::Error, since_start: Duration) -> bool {
    since_start < STARTING && matches!(error, kube::Error::Api(status) if status.code == 404)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn who_did_not_answer_is_asked_again_and_less_and_less_often() {
        let began = tokio::time::Instant::now();
        let asked = std::sync::Mutex::new(Vec::new());
        let mut told = Vec::new();
        let ask = || async {
            let mut asked = asked.lock().unwrap();
            asked.push(began.elapsed().as_secs());
            (asked.len() == 4).then_some("known")
        };
        super::ask_until_known(ask, |answer| told.push(answer)).await;
        assert_eq!(told, [None, None, None, Some("known")]);
        assert_eq!(*asked.lock().unwrap(), [0, 30, 90, 210]);
    }

    #[test]
    fn what_is_missing_at_the_start_is_waited_for() {
        let answer = |code: u16| {
            let status = kube::core::Status { code, ..kube::core::Status::default() };
            kube::Error::Api(Box::new(status))
        };
        assert!(super::is_early(&answer(404), Duration::from_millis(100)));
        assert!(!super::is_early(&answer(403), Duration::from_millis(100)));
        assert!(!super::is_early(&answer(404), Duration::from_secs(60)));
    }
}
