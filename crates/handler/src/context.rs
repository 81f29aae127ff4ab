//! What every worker of this handler shares.

use std::net::IpAddr;
use std::path::PathBuf;

use godwit_api::vmi::GuestCpu;
use godwit_launcher::rpc::Accelerator;
use kube::Client;
use tokio::sync::watch;

use crate::events::Events;
use crate::fence::Fence;
use crate::links::Links;
use crate::migration_network::Underlay;
use crate::tls::TlsPaths;

/// The handler's surroundings.
pub struct Context {
    /// The API.
    pub client: Client,
    /// This node's name.
    pub node: String,
    /// Address on which this handler is asked.
    pub node_ip: IpAddr,
    /// Where migrations are received, and sent from.
    pub underlay: Underlay,
    /// The kubelet's root folder.
    pub kubelet_root: PathBuf,
    /// The node's certificate.
    pub tls: TlsPaths,
    /// What executes guests here, once known.
    pub accelerator: watch::Receiver<Option<Accelerator>>,
    /// What stands for this node's own processor; none within where QEMU has no model for it, none at all until it was asked.
    pub host_cpu: watch::Receiver<Option<Option<GuestCpu>>>,
    /// What is known of the links to other nodes.
    pub links: Links,
    /// Whether guests may run here.
    pub fence: Fence,
    /// Takes events.
    pub events: Events,
}
