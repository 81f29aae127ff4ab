//! Bringing a cluster up, level by level: what already runs is left alone, what is missing is started.

use crate::layout::{Cluster, Layout, MAX_NODES};
use crate::status::{kubevirt, text};
use crate::{Error, fabric, pki, process};
use godwit_qemu::process::{find_qemu, find_qemu_img};
use k8s_openapi::api::core::v1::Node;
use kube::api::DynamicObject;
use kube::client::ClientBuilder;
use kube::{Api, Client};
use std::ffi::OsStr;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tower::timeout::TimeoutLayer;

/// Name of the control plane's process.
pub const CONTROL_PLANE: &str = "control-plane";
/// How long a process may take to become ready before the start counts as failed.
const READY_WITHIN: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(15);

/// What to bring up.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Number of nodes; a cluster that has more keeps them.
    pub nodes: usize,
    /// Port on 127.0.0.1; `None`: the recorded one, else 6443, else any free one.
    pub api_port: Option<u16>,
    /// The nodes are to have a network for migrations; a cluster that has one keeps it.
    pub migration_network: bool,
}

/// A cluster that is up.
#[derive(Debug, Clone)]
pub struct Up {
    /// Paths.
    pub layout: Layout,
    /// Shape.
    pub cluster: Cluster,
    /// From the call to ready.
    pub took: Duration,
}

/// Brings the cluster up and returns when every node is ready for VMs and the KubeVirt object says that it is deployed.
///
/// # Errors
/// Not root, missing programs, or a process that ended or was not ready within a minute (with the end of its log).
pub async fn up(options: &Options) -> Result<Up, Error> {
    let started = Instant::now();
    require_root()?;
    require_programs()?;
    let layout = Layout::open(&options.data_dir)?;
    settle(&layout, &layout.load()?.map(|cluster| cluster.nodes).unwrap_or_default()).await?;
    let cluster = shape(&layout, options)?;
    pki::ensure(&layout, &cluster)?;
    fabric::ensure(&cluster).await?;
    start_missing(&layout, &cluster).await?;
    wait_until_ready(&layout, &cluster).await?;
    Ok(Up { layout, cluster, took: started.elapsed() })
}

/// Starts those of the cluster's processes that do not run, and does not wait until they are ready.
///
/// # Errors
/// A killed process that does not end, or one that cannot be started.
pub async fn start_missing(layout: &Layout, cluster: &Cluster) -> Result<(), Error> {
    settle(layout, &cluster.nodes).await?;
    let data_dir = layout.root().display().to_string();
    if process::find(layout, CONTROL_PLANE).is_none() {
        process::start(layout, CONTROL_PLANE, &["control-plane".into(), "--data-dir".into(), data_dir.clone()])?;
    }
    for node in &cluster.nodes {
        if process::find(layout, node).is_none() {
            let arguments = ["node".into(), "--data-dir".into(), data_dir.clone(), "--name".into(), node.to_owned()];
            process::start(layout, node, &arguments)?;
        }
    }
    Ok(())
}

/// Waits until those that have been killed are gone.
async fn settle(layout: &Layout, nodes: &[String]) -> Result<(), Error> {
    for name in std::iter::once(CONTROL_PLANE).chain(nodes.iter().map(String::as_str)) {
        process::settled(layout, name).await?;
    }
    Ok(())
}

/// A client of the cluster as its administrator.
///
/// # Errors
/// No kubeconfig, or one that cannot be used.
pub async fn admin_client(layout: &Layout) -> Result<Client, Error> {
    client(&layout.kubeconfig()).await
}

/// A client with the given kubeconfig.
///
/// # Errors
/// No such kubeconfig, or one that cannot be used.
pub async fn client(kubeconfig: &Path) -> Result<Client, Error> {
    client_of(config(kubeconfig).await?)
}

/// How long the API may take to begin its answer; a watch begins at once. The slowest, a webhook, has 10 s.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// A client none of whose calls waits for ever: where a link was down, both ends of a connection may think that it is whole, and
/// nothing comes over it.
///
/// # Errors
/// A configuration that cannot be used.
pub fn client_of(config: kube::Config) -> Result<Client, Error> {
    Ok(ClientBuilder::try_from(config)?.with_layer(&TimeoutLayer::new(ANSWER_WITHIN)).build())
}

/// The same for controllers: a "not now" (429) is an answer to them, on which they decide; kube would ask again for minutes.
pub async fn impatient_client(kubeconfig: &Path) -> Result<Client, Error> {
    let mut config = config(kubeconfig).await?;
    config.default_retry = false;
    client_of(config)
}

async fn config(kubeconfig: &Path) -> Result<kube::Config, Error> {
    let failed = |error: kube::config::KubeconfigError| Error::io("use", kubeconfig, std::io::Error::other(error));
    let file = kube::config::Kubeconfig::read_from(kubeconfig).map_err(failed)?;
    kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await.map_err(failed)
}

fn require_root() -> Result<(), Error> {
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(Error::NeedsRoot) }
}

/// A program that the nodes run.
struct Program {
    name: &'static str,
    /// The Debian package that carries it.
    package: &'static str,
    /// The environment variable that may name another one.
    variable: Option<&'static str>,
    /// What would be run.
    found: Option<PathBuf>,
}

fn require_programs() -> Result<(), Error> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let nft = || {
        let administrators = ["/usr/sbin", "/sbin"].map(PathBuf::from);
        std::env::split_paths(&path).chain(administrators).map(|folder| folder.join("nft")).find(|nft| nft.is_file())
    };
    let program = |name, package, variable, found| Program { name, package, variable, found };
    let programs = [
        program("qemu-system-x86_64", "qemu-system-x86", Some("GODWIT_QEMU"), find_qemu()),
        program("qemu-img", "qemu-utils", Some("GODWIT_QEMU_IMG"), find_qemu_img()),
        program("nft", "nftables", None, nft()),
    ];
    require(&programs, &path)
}

/// Each has to be there: found, or where somebody says that it is.
fn require(programs: &[Program], path: &OsStr) -> Result<(), Error> {
    let missing: Vec<&Program> = programs.iter().filter(|program| program.found.is_none()).collect();
    if !missing.is_empty() {
        return Err(Error::MissingPrograms {
            programs: missing.iter().map(|program| program.name.to_owned()).collect(),
            packages: missing.iter().map(|program| program.package.to_owned()).collect(),
        });
    }
    for Program { variable, found, .. } in programs {
        let Some((variable, found)) = variable.zip(found.as_deref()) else { continue };
        // A name alone is looked for when it is started.
        let is_name = found.parent() == Some(Path::new(""));
        let is_there = found.is_file() || is_name && std::env::split_paths(path).any(|one| one.join(found).is_file());
        if !is_there {
            return Err(Error::NamedProgram { variable, program: found.to_owned() });
        }
    }
    Ok(())
}

fn shape(layout: &Layout, options: &Options) -> Result<Cluster, Error> {
    if options.nodes == 0 || options.nodes > MAX_NODES {
        return Err(Error::Usage(format!("--nodes must be between 1 and {MAX_NODES}, not {}", options.nodes)));
    }
    let recorded = layout.load()?;
    let running = process::find(layout, CONTROL_PLANE).is_some();
    let mut cluster = match recorded {
        Some(cluster) => cluster,
        None => Cluster { id: layout.id(), ..Cluster::default() },
    };
    if options.migration_network && !cluster.migration_network {
        // Nodes look for it when they start.
        if cluster.nodes.iter().any(|node| process::find(layout, node).is_some()) {
            let why = "the cluster runs without a network for migrations: `godwit down` it first, then --migration-network gives it one";
            return Err(Error::Usage(why.to_owned()));
        }
        cluster.migration_network = true;
    }
    if !running {
        cluster.api_port = match options.api_port {
            Some(port) if port != 0 => port,
            Some(_) => free_port(0)?,
            None if cluster.api_port != 0 => free_port(cluster.api_port)?,
            None => free_port(6443)?,
        };
    }
    while cluster.nodes.len() < options.nodes {
        cluster.nodes.push(format!("node{}", cluster.nodes.len() + 1));
    }
    layout.save(&cluster)?;
    Ok(cluster)
}

/// `wanted` if nobody has it, else any that is free.
fn free_port(wanted: u16) -> Result<u16, Error> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, wanted))
        .or_else(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .and_then(|listener| listener.local_addr());
    listener.map(|address| address.port()).map_err(|e| Error::io("find a free port on", Path::new("127.0.0.1"), e))
}

async fn wait_until_ready(layout: &Layout, cluster: &Cluster) -> Result<(), Error> {
    let deadline = Instant::now() + READY_WITHIN;
    let client = admin_client(layout).await?;
    let nodes: Api<Node> = Api::all(client.clone());
    let kubevirts: Api<DynamicObject> = Api::namespaced_with(client.clone(), "kubevirt", &kubevirt("KubeVirt"));
    loop {
        for name in std::iter::once(CONTROL_PLANE).chain(cluster.nodes.iter().map(String::as_str)) {
            if process::find(layout, name).is_none() {
                return Err(process::died(layout, name));
            }
        }
        let mut waiting = match nodes.list(&Default::default()).await {
            Err(_) => vec![CONTROL_PLANE.to_owned()],
            Ok(list) => cluster
                .nodes
                .iter()
                .filter(|name| !list.items.iter().any(|n| n.metadata.name.as_deref() == Some(name) && is_ready(n)))
                .cloned()
                .collect(),
        };
        if waiting.is_empty() {
            // Its controllers say it.
            let found = kubevirts.get_opt("kubevirt").await.ok().flatten();
            if found.is_none_or(|found| text(&found, "/status/phase") != "Deployed") {
                waiting.push(CONTROL_PLANE.to_owned());
            }
        }
        let Some(first) = waiting.first() else { return Ok(()) };
        if Instant::now() > deadline {
            return Err(process::failed(layout, first, "was not ready within a minute"));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Whether a node takes pods and its handler takes VMs.
pub fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    let schedulable = node.metadata.labels.as_ref().and_then(|l| l.get("kubevirt.io/schedulable"));
    conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True") && schedulable.is_some_and(|v| v == "true")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `require` says where QEMU is found so and nothing is in `PATH` but this folder.
    fn said(qemu: Option<&Path>, folder: &Path) -> Result<(), String> {
        let qemu = Program {
            name: "qemu-system-x86_64",
            package: "qemu-system-x86",
            variable: Some("GODWIT_QEMU"),
            found: qemu.map(Path::to_owned),
        };
        let nft = Program { name: "nft", package: "nftables", variable: None, found: Some("/usr/sbin/nft".into()) };
        require(&[qemu, nft], folder.as_os_str()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_qemu_that_is_named_needs_no_other_and_has_to_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let (elsewhere, empty) = (folder.path().join("elsewhere"), folder.path().join("empty"));
        for folder in [&elsewhere, &empty] {
            std::fs::create_dir(folder).unwrap();
        }
        let own = elsewhere.join("qemu-of-mine");
        std::fs::write(&own, "").unwrap();
        assert_eq!(said(Some(&own), &empty), Ok(()));
        let bare = Path::new("qemu-of-mine");
        assert_eq!(said(Some(bare), &elsewhere), Ok(()));
        assert!(said(Some(bare), &empty).unwrap_err().starts_with("GODWIT_QEMU names qemu-of-mine, which is no file"));
        let gone = said(Some(&elsewhere.join("gone")), &empty).unwrap_err();
        assert!(
            gone.starts_with("GODWIT_QEMU names /") && gone.contains("/elsewhere/gone, which is no file"),
            "{gone}"
        );
        let none = said(None, &elsewhere).unwrap_err();
        assert!(none.starts_with("not installed: qemu-system-x86_64; run `make deps`"), "{none}");
    }
}
