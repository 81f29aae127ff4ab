//! The network and the guest that all ways share: two hosts and an outside client, each in a network namespace, on one switch;
//! an L2 segment over all three; the guest on it.

use super::beats::Witness;
use super::plan::Mebibytes;
use super::{Bandwidth, Error, Line};
use godwit_network::{Namespace, TapOptions, segment};
use godwit_standalone::demo::{Facts, Guest, build_image};
use godwit_standalone::{Cluster, Layout, fabric};
use nix::sched::{CloneFlags, setns};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::process::Command;

/// The guest's address on the segment.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 123, 62);
/// The outside client's.
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 123, 1);
/// Where the client listens for the guest's heartbeats.
const WITNESS_PORT: u16 = 4242;
/// The segment's bridge, as in the cluster's NetworkAttachmentDefinition.
const BRIDGE: &str = "br-lab";
/// The tap of a guest that no pod holds.
pub const TAP: &str = "tap0";
/// The guest's address on the wire, where no VMI says it.
pub const GUEST_MAC: &str = "02:00:5e:00:53:62";
/// Its UUID.
pub const GUEST_UUID: &str = "7a3e1f52-2c0b-4d0e-9d1c-0d8f5a7b6c43";
/// How long a guest may take to boot.
const BOOT: Duration = Duration::from_secs(180);

/// The place where guests move, taken down when it is dropped.
#[derive(Debug)]
pub struct Lab {
    folder: tempfile::TempDir,
    /// The place's shape.
    pub cluster: Cluster,
    /// Its files.
    pub layout: Layout,
}

impl Lab {
    fn scratch() -> Result<tempfile::TempDir, Error> {
        tempfile::Builder::new()
            .prefix("godwit-bench-")
            .tempdir_in("/var/tmp")
            .map_err(|e| Error::io("make a scratch folder in /var/tmp", e))
    }

    /// Only the network: the same switch, links and segment as a cluster has, and a tap on each host.
    pub async fn without_cluster() -> Result<Self, Error> {
        let folder = Self::scratch()?;
        let layout = Layout::open(folder.path())?;
        let nodes = vec!["node1".to_owned(), "node2".to_owned()];
        let cluster = Cluster { id: layout.id(), nodes, ..Cluster::default() };
        layout.save(&cluster)?;
        let lab = Self { folder, cluster, layout };
        fabric::ensure(&lab.cluster).await?;
        for host in 0..2 {
            let links = lab.host(host)?.links()?;
            segment::ensure(&links, BRIDGE, fabric::UPLINK).await?;
            links.tap(TAP, TapOptions::default()).await?;
            links.set_master(TAP, Some(BRIDGE)).await?;
            links.set_up(TAP, true).await?;
        }
        Ok(lab)
    }

    /// A cluster of two nodes, with the guest's image in its store.
    pub async fn with_cluster(guest: &Path) -> Result<Self, Error> {
        let folder = Self::scratch()?;
        let options = godwit_standalone::Options {
            data_dir: folder.path().to_owned(),
            nodes: 2,
            api_port: Some(0),
            ..Default::default()
        };
        match godwit_standalone::up(&options).await {
            Ok(up) => {
                let lab = Self { folder, cluster: up.cluster, layout: up.layout };
                build_image(&lab.layout, guest)?;
                Ok(lab)
            }
            Err(error) => {
                let _ = godwit_standalone::down(folder.path());
                Err(error.into())
            }
        }
    }

    /// Where scratch files can go.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The namespace of a host, from 0.
    pub fn host(&self, number: usize) -> Result<Namespace, Error> {
        Ok(Namespace::open(&self.cluster.namespace(&format!("node{}", number + 1)))?)
    }

    /// A host's address.
    pub fn address(number: usize) -> Ipv4Addr {
        Cluster::node_address(u8::try_from(number + 1).unwrap_or(1))
    }

    /// The client's view of the guest.
    pub async fn guest(&self) -> Result<Guest, Error> {
        Ok(Guest::at(&self.cluster, GUEST, CLIENT).await?)
    }

    /// The outside client's namespace. It is on the segment once there is a [`Lab::guest`].
    pub fn client(&self) -> Result<Namespace, Error> {
        Ok(Namespace::open(&fabric::client(&self.cluster))?)
    }

    /// Begins to listen for heartbeats. The client must be on the segment: see [`Lab::guest`].
    pub fn witness(&self) -> Result<Witness, Error> {
        let client = self.client()?;
        Witness::listen(&client, SocketAddr::from((IpAddr::V4(CLIENT), WITNESS_PORT)))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = godwit_standalone::down(self.folder.path()) {
            eprintln!("bench: {error}; godwit down --data-dir {} tries again", self.folder.path().display());
        }
    }
}

/// A guest and how it is moved, the same for all ways.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Its memory.
    pub memory: Mebibytes,
    /// The cap.
    pub bandwidth: Bandwidth,
    /// Its kernel's command line.
    pub arguments: String,
    /// Its disks.
    pub disks: Vec<Attached>,
    /// Its memory can be mapped by its next launcher on the same node.
    pub shareable: bool,
}

/// A disk of a guest.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Of disk and volume.
    pub name: String,
    /// `disk.cache`; none leaves it to the product.
    pub cache: Option<String>,
    /// The volume without its name, as `{"emptyDisk": …}`.
    pub volume: serde_json::Value,
}

impl Workload {
    /// What a line is, where the link carries `link` bytes a second.
    pub fn of(line: &Line, link: u64) -> Self {
        let arguments = arguments(line.working_set_mib(), line.dirty_mib_per_second(link));
        Self { memory: line.memory, bandwidth: line.bandwidth, arguments, disks: Vec::new(), shareable: false }
    }

    /// A guest of which only the network counts.
    pub fn quiet(memory: Mebibytes, bandwidth: Bandwidth) -> Self {
        Self { memory, bandwidth, arguments: own_arguments(16, 1), disks: Vec::new(), shareable: false }
    }

    /// A guest that fills half of its memory and writes a little.
    pub fn filled(memory: Mebibytes, bandwidth: Bandwidth, shareable: bool) -> Self {
        Self { arguments: own_arguments(memory.0 / 2, 10), shareable, ..Self::quiet(memory, bandwidth) }
    }

    /// Much to send, nothing written to, no cap.
    pub fn full() -> Self {
        Self {
            memory: Mebibytes(768),
            bandwidth: Bandwidth::Mebibytes(Mebibytes(1 << 20)),
            arguments: arguments(512, 0),
            disks: Vec::new(),
            shareable: false,
        }
    }
}

fn arguments(working_set: u64, dirty: u64) -> String {
    format!("{} godwit.witness={CLIENT}:{WITNESS_PORT}", own_arguments(working_set, dirty))
}

/// Without heartbeats.
fn own_arguments(working_set: u64, dirty: u64) -> String {
    format!(
        "console=ttyS0 quiet godwit.ip={GUEST}/24 godwit.hostname=bench godwit.wss={working_set} godwit.dirty={dirty}"
    )
}

/// A program that will run in a host's network namespace. Whatever becomes of the benchmark, it is not left behind.
pub fn command_in(host: &Namespace, program: &Path) -> Command {
    let mut command = Command::new(program);
    command.kill_on_drop(true);
    let inside = host.clone();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; setns(2) and prctl(2) are plain system calls, and
    // nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            setns(&inside, CloneFlags::CLONE_NEWNET)?;
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(Into::into)
        });
    }
    command
}

/// Waits until the guest has booted.
pub async fn booted(guest: &Guest) -> Result<Facts, Error> {
    let deadline = Instant::now() + BOOT;
    loop {
        match guest.facts().await {
            Ok(facts) => return Ok(facts),
            Err(error) if Instant::now() > deadline => {
                return Err(Error::Guest(format!("did not boot within {} s: {error}", BOOT.as_secs())));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}
