//! What to do: every controller's decisions as pure functions.
//!
//! Facts in, plan out: a [`View`] holds the time and all that is known of the cluster ([`World`]); [`Key::decide`] gives a
//! [`Plan`] of effects as data. The runtime carries them out and feeds the answers back; nothing here does IO, reads a
//! clock or rolls dice.

mod confirm;
pub mod disruption;
pub mod drain;
pub mod evacuation;
#[cfg(test)]
mod evacuation_tests;
pub mod fence;
#[cfg(test)]
mod fence_tests;
pub mod figures;
pub mod garbage;
pub mod history;
#[cfg(test)]
mod history_tests;
pub mod homecoming;
#[cfg(test)]
mod homecoming_tests;
pub mod hotplug;
#[cfg(test)]
mod hotplug_tests;
#[cfg(test)]
mod installation_tests;
mod key;
pub mod kubevirt;
pub mod launcher_pod;
pub mod lease;
pub mod maintenance;
pub mod migration;
mod migration_network;
pub mod names;
pub mod node;
pub mod object;
mod ordered;
pub mod persistent_state;
pub mod placement;
mod plan;
pub mod pod_security;
pub mod processor;
pub mod quantity;
pub mod queue;
pub mod quota;
pub mod selector;
mod short;
mod table;
#[cfg(test)]
mod testing;
pub mod turns;
pub mod vm;
pub mod vmi;
#[cfg(test)]
mod vmi_tests;
pub mod volume_update;
#[cfg(test)]
mod volume_update_tests;
pub mod volumes;
pub mod workloads;
#[cfg(test)]
mod workloads_tests;
mod world;

pub use key::{Key, Lane, Noun, kinds_for};
pub use object::{Kind, Name, Object, Packed, Ref, Stored};
pub use ordered::Ordered;
pub use plan::{
    Effect, EventRecord, EventType, NODE_CONTROLLER, Plan, SCHEDULER, VM_CONTROLLER, VOLUME_CONTROLLER, View,
    has_status_subresource, merge_difference,
};
pub use table::{Names, Table};
pub use world::{Change, Refusal, Source, World, claims_of, vmi_of_pod};

/// How an installation is set up: what decisions need to know that no object says.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Image of the launcher's container.
    pub launcher_image: String,
    /// Pull policy of the launcher's image; `None` leaves it to Kubernetes.
    pub launcher_pull_policy: Option<String>,
    /// The command that starts a launcher, e.g. `["/usr/bin/godwit", "launcher"]`.
    pub launcher_command: Vec<String>,
    /// The command that holds claims for disks which come while the guest runs, e.g. `["/usr/bin/godwit", "attachment"]`.
    pub attachment_command: Vec<String>,
    /// Folder that all nodes see; volumes of StorageClass `shared` are folders in it.
    pub shared_root: String,
    /// Folder of one node for volumes of StorageClass `local`; `{node}` stands for the node's name.
    pub local_root: String,
    /// Pods of this `schedulerName` (or of none) are placed by us.
    pub scheduler_name: String,
    /// Whether nobody else says of nodes that they are silent or cordoned (kube-controller-manager).
    pub tells_of_nodes: bool,
    /// Whether these controllers move guests. Where they only maintain nodes, another KubeVirt does, by its own lights.
    pub moves_guests: bool,
    /// The version to report.
    pub version: String,
}

impl Settings {
    /// Settings of the standalone mode for a data directory.
    pub fn standalone(data_dir: &str) -> Self {
        let data_dir = data_dir.trim_end_matches('/');
        Self {
            launcher_image: names::HOST_IMAGE.to_owned(),
            launcher_pull_policy: None,
            launcher_command: vec!["/usr/bin/godwit".to_owned(), "launcher".to_owned()],
            attachment_command: vec!["/usr/bin/godwit".to_owned(), "attachment".to_owned()],
            shared_root: format!("{data_dir}/shared"),
            local_root: format!("{data_dir}/nodes/{{node}}/local"),
            scheduler_name: "default-scheduler".to_owned(),
            tells_of_nodes: true,
            moves_guests: true,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// Settings on a Kubernetes cluster, which places pods, provides volumes and watches nodes itself. The launcher's image is
    /// to be set.
    pub fn cluster() -> Self {
        Self { tells_of_nodes: false, ..Self::standalone("") }
    }

    /// The folder of a volume that all nodes see.
    pub fn shared_path(&self, volume: &str) -> String {
        format!("{}/{volume}", self.shared_root)
    }

    /// The folder of a volume on one node.
    pub fn local_path(&self, node: &str, volume: &str) -> String {
        format!("{}/{volume}", self.local_root.replace("{node}", node))
    }
}
