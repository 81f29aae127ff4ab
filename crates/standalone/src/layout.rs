//! Where a standalone cluster keeps its things, and the names and addresses that follow from its data directory.

use crate::Error;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Address of the control plane on the fabric.
pub const CONTROL_PLANE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
/// Port of the API server on the fabric.
pub const FABRIC_API_PORT: u16 = 6443;
/// Prefix length of the fabric network.
pub const FABRIC_PREFIX: u8 = 24;
/// Address of the outside client on the fabric.
pub const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 200);
/// More nodes than this do not fit between the control plane's and the client's address.
pub const MAX_NODES: usize = 64;

/// The recorded shape of a cluster (`cluster.json`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    /// Eight hex digits; carried by everything the cluster makes on the machine.
    pub id: String,
    /// Node names, in order of their numbers (1, 2, …).
    pub nodes: Vec<String>,
    /// Port of the API server on 127.0.0.1.
    pub api_port: u16,
    /// The nodes have a second network, which migrations go over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub migration_network: bool,
}

impl Cluster {
    /// Number of the node called `name`, from 1.
    pub fn number_of(&self, name: &str) -> Option<u8> {
        let index = self.nodes.iter().position(|node| node == name)?;
        u8::try_from(index + 1).ok()
    }

    /// Address of node `number` on the fabric.
    pub fn node_address(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 88, 0, 10 + number)
    }

    /// Address of node `number` on the network for migrations.
    pub fn migration_address(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 89, 0, 10 + number)
    }

    /// Range of the pods of node `number`.
    pub fn pod_range(number: u8) -> String {
        format!("10.244.{number}.0/24")
    }

    /// Folder, in memory, of what may not outlive the machine's boot.
    pub fn state(&self) -> PathBuf {
        state(&self.id)
    }

    /// Prefix of all namespaces of this cluster.
    pub fn namespace_prefix(&self) -> String {
        format!("gw-{}-", self.id)
    }

    /// Name of one of this cluster's network namespaces.
    pub fn namespace(&self, what: &str) -> String {
        format!("gw-{}-{what}", self.id)
    }
}

/// Folder, in memory, of what the nodes of the data directory with this id keep until the machine's next boot.
pub fn state(id: &str) -> PathBuf {
    Path::new("/run/godwit").join(id)
}

/// Paths inside a data directory.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// The layout of `root`, which is made if it is missing.
    pub fn open(root: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(root).map_err(|source| Error::io("create data directory", root, source))?;
        let root = root.canonicalize().map_err(|source| Error::io("resolve data directory", root, source))?;
        Ok(Self { root })
    }

    /// The cluster id that belongs to this directory.
    pub fn id(&self) -> String {
        let digest = Sha256::digest(self.root.as_os_str().as_encoded_bytes());
        digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect()
    }

    /// The data directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Certificates and keys.
    pub fn pki(&self) -> PathBuf {
        self.root.join("pki")
    }

    /// Cluster-admin kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.root.join("kubeconfig")
    }

    /// Database file of the store.
    pub fn store(&self) -> PathBuf {
        self.root.join("store.redb")
    }

    /// Local OCI layout.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Volumes that every node sees.
    pub fn shared(&self) -> PathBuf {
        self.root.join("shared")
    }

    /// Root of one node's kubelet.
    pub fn node(&self, name: &str) -> PathBuf {
        self.root.join("nodes").join(name)
    }

    /// Log of one process.
    pub fn log(&self, process: &str) -> PathBuf {
        self.root.join("log").join(format!("{process}.log"))
    }

    /// Pid record of one process.
    pub fn pid(&self, process: &str) -> PathBuf {
        self.root.join("run").join(format!("{process}.pid"))
    }

    /// Reads `cluster.json`; `None` when there is none yet.
    pub fn load(&self) -> Result<Option<Cluster>, Error> {
        let path = self.root.join("cluster.json");
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|source| Error::io("read", &path, std::io::Error::other(source))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::io("read", &path, source)),
        }
    }

    /// Writes `cluster.json`, whole or not at all.
    pub fn save(&self, cluster: &Cluster) -> Result<(), Error> {
        let text = serde_json::to_vec_pretty(cluster).map_err(|e| Error::io("encode", &self.root, e.into()))?;
        write_atomically(&self.root.join("cluster.json"), &text, 0o644)
    }
}

/// Writes a file through a temporary neighbour, so that nobody ever reads half of it.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let parent = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(parent).map_err(|source| Error::io("create directory", parent, source))?;
    let temporary = path.with_extension("new");
    let written = (|| {
        let mut file =
            std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    })();
    written.map_err(|source| Error::io("write", path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_follows_the_path_and_the_record_survives() {
        let a = tempfile::tempdir().unwrap();
        let b = tempfile::tempdir().unwrap();
        let (one, two) = (Layout::open(a.path()).unwrap(), Layout::open(b.path()).unwrap());
        assert_eq!(one.id().len(), 8);
        assert_ne!(one.id(), two.id());
        assert_eq!(one.load().unwrap(), None);
        let cluster =
            Cluster { id: one.id(), nodes: vec!["node1".into(), "node2".into()], api_port: 6443, ..Cluster::default() };
        one.save(&cluster).unwrap();
        assert_eq!(Layout::open(a.path()).unwrap().load().unwrap(), Some(cluster.clone()));
        assert_eq!(cluster.number_of("node2"), Some(2));
        assert_eq!(cluster.number_of("node9"), None);
        assert_eq!(Cluster::node_address(2).to_string(), "10.88.0.12");
    }
}
