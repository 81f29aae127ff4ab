//! The command line.

use clap::{Parser, Subcommand, ValueEnum};
use godwit_api::Installation;
use godwit_bench::migrate::plan::Mebibytes;
use godwit_bench::migrate::{Bandwidth, Load, Way};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

const DEFAULT_DATA_DIR: &str = "/var/lib/godwit";

/// Live migration of virtual machines on Kubernetes, compatible with the KubeVirt API.
#[derive(Parser)]
#[command(name = "godwit", version)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub enum Command {
    /// Start a cluster on this machine: an API server and nodes, each in a network namespace
    Up(Up),
    /// End the cluster; its objects and volumes stay in the data directory
    Down(Down),
    /// Show processes, nodes, VMs and migrations
    Status(Status),
    /// Boot a guest, move it between two nodes while it is pinged, and report
    Demo(Demo),
    /// Say what would happen, without touching anything
    #[command(subcommand)]
    Plan(Plan),
    /// Empty nodes: the plan, carried out by evictions; Ctrl-C takes it back
    Drain(Drain),
    /// Build, import, list and remove images of the cluster's local store
    #[command(subcommand)]
    Image(Image),
    /// Print what is to be applied to a Kubernetes cluster
    Manifests(Manifests),
    /// Serve KubeVirt's subresources and admission webhooks for a Kubernetes cluster, with certificates of its own
    Api(Api),
    /// Serve KubeVirt's admission webhooks alone, with a certificate that is given
    Webhook(Webhook),
    /// Run the controllers on a simulated cluster in virtual time, with faults, and check what must always hold
    Simulate(Simulate),
    /// Measure and test a cluster of its own
    #[command(subcommand)]
    Bench(Bench),
    /// Run the controllers on a Kubernetes cluster; of several the one that holds the lease decides
    Controller(Controller),
    /// Run a node's handler on a Kubernetes cluster
    Handler(Handler),
    /// Ask a handler how it is, as its kubelet does
    #[command(hide = true)]
    Probe(Probe),
    /// Join this machine, or one of its network namespaces, to a cluster as a node: a kubelet of ours, and its handler
    Node(Node),
    /// The control plane's process (started by `up`)
    #[command(hide = true)]
    ControlPlane(ControlPlane),
    /// The process of a VM's pod (started by its kubelet)
    #[command(hide = true)]
    Launcher(Launcher),
    /// The process of a pod that holds claims for disks which come while a VM runs (started by its kubelet)
    #[command(hide = true)]
    Attachment(Attachment),
    /// The supervisor of one container (started by a kubelet)
    #[command(hide = true)]
    Shim(Shim),
}

/// `godwit up`
#[derive(clap::Args)]
pub struct Up {
    /// Number of nodes
    #[arg(long, default_value_t = 3)]
    pub nodes: usize,
    /// Where the cluster keeps everything
    #[arg(long, env = "GODWIT_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
    pub data_dir: PathBuf,
    /// Return when the cluster is ready and leave it running
    #[arg(long)]
    pub detach: bool,
    /// Port of the API server on 127.0.0.1 (0: any free one) [default: the last one, or 6443, or any free one]
    #[arg(long)]
    pub api_port: Option<u16>,
    /// Give the nodes a second network (10.89.0.0/24, eth1), which migrations go over; the cluster keeps it
    #[arg(long)]
    pub migration_network: bool,
}

impl From<&Up> for godwit_standalone::Options {
    fn from(up: &Up) -> Self {
        Self {
            data_dir: up.data_dir.clone(),
            nodes: up.nodes,
            api_port: up.api_port,
            migration_network: up.migration_network,
        }
    }
}

/// `godwit down`
#[derive(clap::Args)]
pub struct Down {
    /// Where the cluster keeps everything
    #[arg(long, env = "GODWIT_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
    pub data_dir: PathBuf,
}

/// `godwit status`
#[derive(clap::Args)]
pub struct Status {
    /// Where the cluster keeps everything
    #[arg(long, env = "GODWIT_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
    pub data_dir: PathBuf,
    /// Text for people or JSON for programs
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// Form of an answer.
#[derive(Clone, Copy, ValueEnum)]
pub enum Output {
    /// For people
    Text,
    /// For programs
    Json,
}

/// `godwit demo`
#[derive(clap::Args)]
pub struct Demo {
    /// Folder with the demo guest's vmlinuz and initrd (made by `make guest`)
    #[arg(long, default_value = "target/demo-guest")]
    pub guest: PathBuf,
    /// Leave the cluster up and print the KUBECONFIG line
    #[arg(long)]
    pub keep: bool,
    /// Keep the cluster here instead of in a scratch folder
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
}

impl From<Demo> for godwit_standalone::demo::DemoOptions {
    fn from(demo: Demo) -> Self {
        Self { guest: demo.guest, keep: demo.keep, data_dir: demo.data_dir }
    }
}

/// `godwit plan …`
#[derive(Subcommand)]
pub enum Plan {
    /// What emptying nodes would do to each VM: where it goes, in which order, how long it takes, what blocks. Only reads.
    /// Ends with 2 if something blocks
    Drain(PlanDrain),
}

/// Which cluster, which nodes, and how.
#[derive(clap::Args)]
pub struct Drained {
    /// The nodes to be emptied
    #[arg(required = true)]
    pub nodes: Vec<String>,
    /// The cluster [default: KUBECONFIG, else the one in --data-dir, else as kubectl finds it]
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// Where the standalone cluster keeps everything
    #[arg(long, env = "GODWIT_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
    pub data_dir: PathBuf,
    /// The namespace that KubeVirt is installed in, whose KubeVirt object and ConfigMap hold the limits [default: where the one KubeVirt
    /// object is, if it may be looked for, or kubevirt]
    #[arg(long)]
    pub namespace: Option<String>,
    /// Leave pods of DaemonSets alone
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub ignore_daemonsets: bool,
    /// Let pods go whose emptyDir is lost with them (VMs' pods always may)
    #[arg(long)]
    pub delete_emptydir_data: bool,
    /// Let pods go that nobody makes again
    #[arg(long)]
    pub force: bool,
}

impl Drained {
    /// How to go about other pods.
    pub fn manner(&self) -> godwit_drain::Manner {
        godwit_drain::Manner {
            ignore_daemon_sets: self.ignore_daemonsets,
            delete_empty_dir_data: self.delete_emptydir_data,
            force: self.force,
        }
    }
}

/// `godwit plan drain`
#[derive(clap::Args)]
pub struct PlanDrain {
    /// What is to be emptied.
    #[command(flatten)]
    pub what: Drained,
    /// Text for people or JSON for programs
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// `godwit drain`
#[derive(clap::Args)]
pub struct Drain {
    /// What is to be emptied.
    #[command(flatten)]
    pub what: Drained,
    /// Take it back if it is not done after this many seconds, as `90`, `90s`, `5m` or `1h`; 0 is never
    #[arg(long, default_value = "0", value_parser = seconds)]
    pub timeout: u64,
    /// Begin without asking, also when something will stay
    #[arg(long, short)]
    pub yes: bool,
    /// So many VMs on their way or in line at the same time [default: one more for each node than may leave it]
    #[arg(long)]
    pub max_parallel: Option<usize>,
}

/// A time as kubectl takes it.
fn seconds(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.char_indices().next_back() {
        Some((end, 's')) => (text.get(..end), 1),
        Some((end, 'm')) => (text.get(..end), 60),
        Some((end, 'h')) => (text.get(..end), 3600),
        _ => (Some(text), 1),
    };
    let number = number.and_then(|number| number.parse::<u64>().ok()).and_then(|number| number.checked_mul(unit));
    number
        .filter(|seconds| *seconds <= 31_622_400)
        .ok_or_else(|| format!("{text} is no time such as 90s, 5m or 1h (a year at most)"))
}

/// How long certificates live.
#[derive(clap::Args)]
pub struct Lifetimes {
    /// How long the CA lives, as `90s`, `30m`, `12h` or `90d`; it is replaced after two thirds of that
    #[arg(long, default_value = "90d", value_parser = lifetime)]
    pub ca_lifetime: Duration,
    /// The same of the certificates that it signs
    #[arg(long, default_value = "10d", value_parser = lifetime)]
    pub certificate_lifetime: Duration,
}

impl Lifetimes {
    /// As they are, if they go together.
    pub fn checked(&self) -> anyhow::Result<godwit_certificates::schedule::Lifetimes> {
        let Self { ca_lifetime: authority, certificate_lifetime: certificate } = *self;
        godwit_certificates::schedule::Lifetimes { authority, certificate }.checked().map_err(anyhow::Error::msg)
    }
}

/// A lifetime: as kubectl takes times, and days.
fn lifetime(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text} is no time such as 90s, 5m, 1h or 10d (a hundred years at most)");
    let (number, unit) = match text.char_indices().next_back() {
        Some((end, 's')) => (text.get(..end), 1),
        Some((end, 'm')) => (text.get(..end), 60),
        Some((end, 'h')) => (text.get(..end), 60 * 60),
        Some((end, 'd')) => (text.get(..end), 24 * 60 * 60),
        _ => (None, 1),
    };
    let number = number.and_then(|number| number.parse::<u64>().ok()).and_then(|number| number.checked_mul(unit));
    number.filter(|seconds| *seconds <= 3_155_760_000).map(Duration::from_secs).ok_or_else(wrong)
}

/// Where godwit is installed.
#[derive(clap::Args)]
pub struct Installed {
    /// The namespace that godwit is installed in: that of the KubeVirt object, the configuration, the nodes' leases and the CA
    #[arg(long, env = "POD_NAMESPACE", default_value = godwit_api::names::KUBEVIRT_NAMESPACE)]
    pub namespace: String,
}

impl Installed {
    /// As the components know it.
    pub fn installation(&self) -> Installation {
        Installation::new(self.namespace.as_str())
    }
}

/// `godwit api`
#[derive(clap::Args)]
pub struct Api {
    /// How to reach the API server, as the account kubevirt-apiserver [default: as a pod of the cluster]
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// Where to listen (port 0: any free one)
    #[arg(long, default_value = "0.0.0.0:8443")]
    pub listen: SocketAddr,
    /// Its namespace, and that of the Service.
    #[command(flatten)]
    pub installed: Installed,
    /// The Service by which the API server reaches this process: its names stand in the certificate
    #[arg(long, default_value = "virt-api")]
    pub service: String,
    /// Where handlers listen on their nodes' addresses (`godwit handler --port`)
    #[arg(long, value_name = "PORT", default_value_t = godwit_handler::front::PORT)]
    pub handler_port: u16,
    /// How long certificates live.
    #[command(flatten)]
    pub lifetimes: Lifetimes,
}

/// `godwit manifests`
#[derive(clap::Args)]
pub struct Manifests {
    /// The namespace of the components
    #[arg(long, default_value = godwit_api::names::KUBEVIRT_NAMESPACE)]
    pub namespace: String,
    /// The image of the components and of launchers, as your registry has it
    #[arg(long, default_value = godwit_manifests::IMAGE)]
    pub image: String,
    /// The namespace of the KubeVirt that --components work beside
    #[arg(long, default_value = godwit_api::names::KUBEVIRT_NAMESPACE, requires = "components")]
    pub kubevirt_namespace: String,
    /// Nothing but these, which work beside an existing KubeVirt [default: all of godwit]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub components: Vec<Component>,
    /// Leave handlers in their pods' network instead of their nodes': migrations under way then break when a handler's pod is replaced
    #[arg(long)]
    pub handler_in_pod_network: bool,
    /// Migrations go over this network: the handlers' pods are in the pods' network and attached to it by Multus, as KubeVirt's are
    #[arg(long, value_name = "[NAMESPACE/]NAME", conflicts_with = "components")]
    pub migration_network: Option<String>,
    /// Migrations go over the interface of this name of each node, while it is there and has an address
    #[arg(long, value_name = "NAME", conflicts_with_all = ["migration_network", "handler_in_pod_network", "components"])]
    pub migration_interface: Option<String>,
    /// The port of each node where its handler does what is asked of guests (pause, console …)
    #[arg(long, value_name = "PORT", default_value_t = godwit_handler::front::PORT)]
    pub handler_port: u16,
    /// The port of each node where its handler answers Prometheus
    #[arg(long, value_name = "PORT", default_value_t = godwit_manifests::HANDLER_METRICS_PORT)]
    pub handler_metrics_port: u16,
    /// Also what a Prometheus of the Prometheus Operator needs: what to scrape and of what to warn
    #[arg(long)]
    pub monitoring: bool,
    /// The service account of that Prometheus, which is to find the pods
    #[arg(long, value_name = "NAMESPACE/NAME", default_value = "monitoring/prometheus-k8s", value_parser = account, requires = "monitoring")]
    pub monitoring_account: godwit_manifests::Prometheus,
}

/// An account by its namespace and name.
fn account(text: &str) -> Result<godwit_manifests::Prometheus, String> {
    match text.split_once('/') {
        Some((namespace, account)) if !namespace.is_empty() && !account.is_empty() && !account.contains('/') => {
            Ok(godwit_manifests::Prometheus { namespace: namespace.to_owned(), account: account.to_owned() })
        }
        _ => Err(format!("{text} is no NAMESPACE/NAME, as monitoring/prometheus-k8s")),
    }
}

/// What works beside an existing KubeVirt.
#[derive(Clone, Copy, ValueEnum)]
pub enum Component {
    /// Roles for `godwit plan drain`
    Plan,
    /// NodeMaintenance
    Maintenance,
    /// Node pools
    #[value(name = "nodepool")]
    NodePool,
}

impl From<Manifests> for godwit_manifests::Options {
    fn from(wanted: Manifests) -> Self {
        let component = |component: Component| match component {
            Component::Plan => godwit_manifests::Component::Plan,
            Component::Maintenance => godwit_manifests::Component::Maintenance,
            Component::NodePool => godwit_manifests::Component::NodePool,
        };
        let components = wanted.components.into_iter().map(component).collect();
        let monitoring = wanted.monitoring.then_some(wanted.monitoring_account);
        let handler_network = match (wanted.migration_network, wanted.handler_in_pod_network) {
            (Some(network), _) => godwit_manifests::HandlerNetwork::Attached(network),
            (None, true) => godwit_manifests::HandlerNetwork::Pod,
            (None, false) => godwit_manifests::HandlerNetwork::Node { migrations: wanted.migration_interface },
        };
        Self {
            namespace: wanted.namespace,
            image: wanted.image,
            kubevirt: wanted.kubevirt_namespace,
            components,
            monitoring,
            handler_network,
            handler_port: wanted.handler_port,
            handler_metrics_port: wanted.handler_metrics_port,
        }
    }
}

/// `godwit webhook`
#[derive(clap::Args)]
pub struct Webhook {
    /// How to reach the API server, as a service account of that namespace [default: as a pod of the cluster]
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// Its namespace.
    #[command(flatten)]
    pub installed: Installed,
    /// Where to listen (port 0: any free one)
    #[arg(long, default_value = "0.0.0.0:8443")]
    pub listen: SocketAddr,
    /// PEM file of the serving certificate and its chain
    #[arg(long)]
    pub tls_cert: PathBuf,
    /// PEM file of its private key
    #[arg(long)]
    pub tls_key: PathBuf,
}

/// `godwit simulate`
#[derive(clap::Args)]
pub struct Simulate {
    /// Nodes [default: 3 or 4, by the seed]
    #[arg(long)]
    pub nodes: Option<u32>,
    /// VMs [default: 2 or 4, by the seed]
    #[arg(long)]
    pub vms: Option<u32>,
    /// The first seed; the same seed and options give the same run
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// How many seeds, one after another
    #[arg(long, default_value_t = 1)]
    pub seeds: u64,
    /// What goes wrong: none, all, or names joined by commas (an unknown name lists them)
    #[arg(long, value_delimiter = ',', default_value = "all")]
    pub faults: Vec<String>,
    /// For how long users and faults are at work, in hours of virtual time [default: one to three minutes, by the seed]
    #[arg(long)]
    pub hours: Option<f64>,
    /// Migrations, of VMs drawn at random [default: 2 or 3 of each VM, by the seed]
    #[arg(long)]
    pub migrations: Option<u32>,
    /// Controllers that are at work at the same time [default: 1 or 2, by the seed]
    #[arg(long)]
    pub controllers: Option<u32>,
    /// Migrations that may be under way in the cluster at once (parallelMigrationsPerCluster) [default: 5]
    #[arg(long)]
    pub parallel: Option<u32>,
    /// The VMs run already when time begins
    #[arg(long)]
    pub standing: bool,
}

/// `godwit bench …`
#[derive(Subcommand)]
pub enum Bench {
    /// Move the same guest in several ways, side by side, and report
    Migrate(BenchMigrate),
    /// Kill, stop and cut what moves guests, while a witness outside sees to it that each runs once and only once
    Faults(BenchFaults),
    /// Move a guest while connections to it are open, and see that every one of them lives
    Streams(BenchStreams),
    /// Move a guest that writes to its disks all the time, and look for acknowledged writes that are lost
    Storage(BenchStorage),
    /// Gives guests new launchers on their node, by reference and by copy
    Local(BenchLocal),
    /// Empty a node of real guests and one of simulated ones, beside what bytes, bandwidth and limits allow
    Drain(BenchDrain),
    /// Fill an API server with VMs and say how much memory the controllers hold
    Controller(BenchController),
}

/// `godwit bench migrate`
#[derive(clap::Args)]
pub struct BenchMigrate {
    /// Guests' memory
    #[arg(long, value_delimiter = ',', default_value = "512Mi,1Gi")]
    pub memory: Vec<Mebibytes>,
    /// What guests do: idle, or write to this many per cent of the link (or the cap)
    #[arg(long, value_delimiter = ',', default_value = "idle,10%,50%")]
    pub load: Vec<Load>,
    /// Caps: unlimited, or MiB a second such as 64Mi
    #[arg(long, value_delimiter = ',', default_value = "unlimited,64Mi")]
    pub bandwidth: Vec<Bandwidth>,
    /// Ways of moving
    #[arg(long, value_delimiter = ',', default_value = "ours,bare-default,bare-best,virsh")]
    pub ways: Vec<Way>,
    /// Moves of each guest in each way
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Guests of 512 MiB, 1 and 4 GiB, instead of --memory
    #[arg(long)]
    pub all: bool,
    /// Folder with the demo guest's vmlinuz and initrd (made by `make guest`)
    #[arg(long, default_value = "target/demo-guest")]
    pub guest: PathBuf,
    /// What the link carries in a second without a cap, such as 300Mi [default: it is measured]
    #[arg(long)]
    pub link: Option<Mebibytes>,
    /// Seconds after which a move is given up
    #[arg(long, default_value_t = 60)]
    pub limit: u64,
    /// Folder for report.json, report.txt and an SVG of each line
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Text for people or JSON for programs, on standard output
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// `godwit bench faults`
#[derive(clap::Args)]
pub struct BenchFaults {
    /// How many faults, one a migration
    #[arg(long, default_value_t = 200)]
    pub runs: u32,
    /// Decides about victims and moments [default: any, printed]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Number of the first run, to have one of a seed's runs again
    #[arg(long, default_value_t = 0)]
    pub first: u32,
    /// Guests that are moved at the same time
    #[arg(long, default_value_t = 4)]
    pub parallel: u32,
    /// The longest that a fault lasts, in seconds
    #[arg(long, default_value_t = 15.0)]
    pub longest: f64,
    /// Keep the cluster here instead of in a scratch folder
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
}

/// `godwit bench streams`
#[derive(clap::Args)]
pub struct BenchStreams {
    /// How many moves
    #[arg(long, default_value_t = 20)]
    pub moves: usize,
    /// Connections that keep silent from the first move to the last, beside the one that never does
    #[arg(long, default_value_t = 100)]
    pub connections: usize,
    /// Folder with the demo guest's vmlinuz and initrd (made by `make guest`)
    #[arg(long, default_value = "target/demo-guest")]
    pub guest: PathBuf,
    /// Seconds after which a move is given up
    #[arg(long, default_value_t = 60)]
    pub limit: u64,
    /// Text for people or JSON for programs, on standard output
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// `godwit bench storage`
#[derive(clap::Args)]
pub struct BenchStorage {
    /// How many moves
    #[arg(long, default_value_t = 50)]
    pub moves: usize,
    /// Cap of a move, for memory and disks: unlimited, or MiB a second such as 64Mi
    #[arg(long, default_value = "unlimited")]
    pub bandwidth: Bandwidth,
    /// Folder with the demo guest's vmlinuz and initrd (made by `make guest`)
    #[arg(long, default_value = "target/demo-guest")]
    pub guest: PathBuf,
    /// Seconds after which a move is given up
    #[arg(long, default_value_t = 60)]
    pub limit: u64,
    /// Text for people or JSON for programs, on standard output
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// `godwit bench local`
#[derive(clap::Args)]
pub struct BenchLocal {
    /// Memory of the guests
    #[arg(long, value_delimiter = ',', default_value = "512Mi,1Gi,4Gi")]
    pub memory: Vec<Mebibytes>,
    /// How many moves of each guest
    #[arg(long, default_value_t = 3)]
    pub moves: usize,
    /// Folder with the demo guest's vmlinuz and initrd (made by `make guest`)
    #[arg(long, default_value = "target/demo-guest")]
    pub guest: PathBuf,
    /// Seconds after which a move is given up
    #[arg(long, default_value_t = 60)]
    pub limit: u64,
    /// Text for people or JSON for programs, on standard output
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// `godwit bench drain`
#[derive(clap::Args)]
pub struct BenchDrain {
    /// Real guests on the node; 0 leaves them out
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub guests: u32,
    /// Simulated guests on the node; 0 leaves them out
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub simulated: u32,
    /// Cap of each migration of real guests: unlimited, or MiB a second such as 64Mi (KubeVirt's default)
    #[arg(long, default_value = "64Mi")]
    pub bandwidth: Bandwidth,
    /// So many migrations at once in the cluster, from a node and to one [default: KubeVirt's 5, 2 and 2]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub parallel: Option<u32>,
    /// Of the simulation; the same seed gives the same virtual times
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Seconds after which emptying the real node is given up
    #[arg(long, default_value_t = 600)]
    pub limit: u64,
    /// Text for people or JSON for programs, on standard output
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// `godwit bench controller`
#[derive(clap::Args)]
pub struct BenchController {
    /// How many VMs, all of them running
    #[arg(long, default_value_t = 5000)]
    pub vmis: usize,
    /// How much memory the controllers may hold at most, in MiB
    #[arg(long, default_value_t = 150)]
    pub limit: u32,
    /// Text for people or JSON for programs, on standard output
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// `godwit image …`
#[derive(Subcommand)]
pub enum Image {
    /// Make an image of files: `godwit image build NAME SOURCE:DESTINATION…`
    Build {
        /// Where the cluster keeps everything
        #[arg(long, env = "GODWIT_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
        data_dir: PathBuf,
        /// Reference, such as `registry.local/alpine:1`
        name: String,
        /// File here and its absolute path in the image, joined by a colon
        #[arg(required = true)]
        files: Vec<String>,
    },
    /// Take over an image from a `docker save` or OCI archive
    Import {
        /// Where the cluster keeps everything
        #[arg(long, env = "GODWIT_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
        data_dir: PathBuf,
        /// The tar file
        archive: PathBuf,
        /// Reference to store it under [default: the one in the archive]
        name: Option<String>,
    },
    /// List images
    List {
        /// Where the cluster keeps everything
        #[arg(long, env = "GODWIT_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
        data_dir: PathBuf,
    },
    /// Remove an image
    Remove {
        /// Where the cluster keeps everything
        #[arg(long, env = "GODWIT_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
        data_dir: PathBuf,
        /// Reference
        name: String,
    },
}

/// `godwit control-plane`
#[derive(clap::Args)]
pub struct ControlPlane {
    /// The cluster's data directory
    #[arg(long)]
    pub data_dir: PathBuf,
}

/// `godwit controller`
#[derive(clap::Args)]
pub struct Controller {
    /// How to reach the API server, as the service account kubevirt-controller [default: as a pod of the cluster]
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// Under which name to hold the lease; no two running controllers may have the same [default: host name and process]
    #[arg(long, env = "POD_NAME")]
    pub identity: Option<String>,
    /// Name of the lease; KubeVirt's own by default, so that of both only one decides
    #[arg(long, default_value = godwit_api::names::CONTROLLER_LEASE)]
    pub lease: String,
    /// Namespace of the lease [default: --namespace]
    #[arg(long, env = "POD_NAMESPACE")]
    pub lease_namespace: Option<String>,
    /// Its namespace; with `--nouns=maintenance` that of the KubeVirt beside it.
    #[command(flatten)]
    pub installed: Installed,
    /// What to decide about, joined by commas, such as maintenance,history [default: all that Kubernetes does not]
    #[arg(long, value_delimiter = ',', value_parser = noun)]
    pub nouns: Option<Vec<godwit_control::Noun>>,
    /// Image of the launchers' container: this binary and QEMU [default: that of this pod]
    #[arg(long, env = "GODWIT_LAUNCHER_IMAGE")]
    pub launcher_image: Option<String>,
    /// Pull policy of that image [default: Kubernetes']
    #[arg(long, env = "GODWIT_LAUNCHER_PULL_POLICY")]
    pub launcher_pull_policy: Option<String>,
    /// There is neither a kube-scheduler nor a kube-controller-manager (tests): do as much of their work as VMs need, with
    /// volumes in this data directory, which the nodes share, whatever `--nouns` takes
    #[arg(long, value_name = "DATA_DIR")]
    pub bare_api_server: Option<PathBuf>,
    /// How long nodes' certificates live, as `90s`, `30m`, `12h` or `10d`
    #[arg(long, default_value = "10d", value_parser = lifetime)]
    pub certificate_lifetime: Duration,
    /// Answer GET /livez, /readyz and /metrics here, over plain HTTP; ready when it could decide, whoever does
    #[arg(long)]
    pub health: Option<SocketAddr>,
}

/// A group of decisions by its name.
fn noun(text: &str) -> Result<godwit_control::Noun, String> {
    let all = godwit_control::Noun::CLUSTER;
    all.iter().copied().find(|noun| noun.name() == text).ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|noun| noun.name()).collect();
        format!("{text} is none of {}", names.join(", "))
    })
}

/// An address and a port, or a port alone.
fn place(text: &str) -> Result<(Option<IpAddr>, u16), String> {
    if let Ok(port) = text.parse() {
        return Ok((None, port));
    }
    let address: SocketAddr =
        text.parse().map_err(|_| format!("{text} is neither PORT nor ADDRESS:PORT, as 8188 or 127.0.0.1:8188"))?;
    Ok((Some(address.ip()), address.port()))
}

/// `godwit probe`
#[derive(clap::Args)]
pub struct Probe {
    /// Its unix socket
    #[arg(long)]
    pub socket: PathBuf,
    /// What to ask for, such as /livez
    pub path: String,
}

/// `godwit handler`
#[derive(clap::Args)]
pub struct Handler {
    /// How to reach the API server, as the service account kubevirt-handler [default: as a pod of the cluster]
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// Its namespace.
    #[command(flatten)]
    pub installed: Installed,
    /// Name of the node
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Address of this node that other nodes reach
    #[arg(long, env = "POD_IP")]
    pub address: IpAddr,
    /// Where on it `godwit api` asks for what is to be done with guests; that has to be told of another one, too
    #[arg(long, default_value_t = godwit_handler::front::PORT)]
    pub port: u16,
    /// What migrations go over.
    #[command(flatten)]
    pub migrations: MigrationInterface,
    /// The kubelet's root folder
    #[arg(long, default_value = "/var/lib/kubelet")]
    pub kubelet_root: PathBuf,
    /// Kubelet's folder of device plugins, where the node's devices are offered to pods [default: device-plugins in the kubelet's root
    /// folder]
    #[arg(long)]
    pub device_plugins: Option<PathBuf>,
    /// A folder of the node, in memory, for what a handler leaves to its successor
    #[arg(long, default_value = "/run/godwit")]
    pub state: PathBuf,
    /// Answer GET /livez, /readyz and /metrics here, over plain HTTP, as soon as no other handler of the node has it; a port alone is one
    /// of `--address`
    #[arg(long, value_name = "[ADDRESS:]PORT", value_parser = place)]
    pub health: Option<(Option<IpAddr>, u16)>,
    /// Answer the same on this unix socket, from the start; ready also while the node's other handler is waited for
    #[arg(long, value_name = "PATH")]
    pub health_socket: Option<PathBuf>,
    /// The node's certificate.
    #[command(flatten)]
    pub tls: NodeTls,
}

/// The interface that migrations go over.
#[derive(clap::Args)]
pub struct MigrationInterface {
    /// Migrations go over this interface of the node (or of the handler's pod) while it is there and has an address, and over the node's own
    /// network meanwhile
    #[arg(long, value_name = "NAME")]
    pub migration_interface: Option<String>,
    /// The NetworkAttachmentDefinition that it is of, to be told on the Node
    #[arg(long, value_name = "NAMESPACE/NAME", requires = "migration_interface")]
    pub migration_network: Option<String>,
}

impl MigrationInterface {
    /// As a handler takes it.
    pub fn to_handler(&self) -> Option<godwit_handler::MigrationInterface> {
        let interface = self.migration_interface.clone()?;
        Some(godwit_handler::MigrationInterface { interface, network: self.migration_network.clone() })
    }
}

/// The certificate by which nodes know each other.
#[derive(clap::Args)]
pub struct NodeTls {
    /// PEM file of the certificate authority of the nodes' certificates
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// PEM file of the node's certificate (CN=system:node:NAME) and its chain
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file of its private key
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// The handler asks the cluster's controllers for its certificate, and for a new one in time [default without --tls-cert]
    #[arg(long)]
    pub request_certificate: bool,
}

/// `godwit node`
#[derive(clap::Args)]
pub struct Node {
    /// Where the node keeps pods, volumes and images; of a node of `godwit up`, the cluster's data directory
    #[arg(long, env = "GODWIT_DATA_DIR", default_value = DEFAULT_DATA_DIR)]
    pub data_dir: PathBuf,
    /// Name of the node
    #[arg(long)]
    pub name: String,
    /// The cluster to join, as a kubelet (system:node:NAME) [default: that of `godwit up` in the data directory]
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// The same cluster for the handler, as the service account kubevirt-handler [default: as the kubelet]
    #[arg(long, requires = "kubeconfig")]
    pub handler_kubeconfig: Option<PathBuf>,
    /// The namespace that godwit is installed in there
    #[arg(long, requires = "kubeconfig", default_value = godwit_api::names::KUBEVIRT_NAMESPACE)]
    pub namespace: String,
    /// Address of this node that other nodes and the API server reach [default: the one from which it reaches that]
    #[arg(long, requires = "kubeconfig")]
    pub address: Option<IpAddr>,
    /// Range of the node's pods, such as 10.244.1.0/24 [default: the cluster is to give one]
    #[arg(long, requires = "kubeconfig")]
    pub pod_cidr: Option<String>,
    /// Live in this network namespace, as `ip netns` names it
    #[arg(long, requires = "kubeconfig")]
    pub network_namespace: Option<String>,
    /// A kubelet and nothing else: the node's handler is a process of its own (`godwit handler`)
    #[arg(long, requires = "kubeconfig", conflicts_with = "handler_kubeconfig")]
    pub without_handler: bool,
    /// What migrations go over [default: what `godwit up --migration-network` gave the node]
    #[command(flatten)]
    pub migrations: MigrationInterface,
    /// Its certificate, for the kubelet's server too.
    #[command(flatten)]
    pub tls: NodeTls,
}

/// `godwit launcher`
#[derive(clap::Args)]
pub struct Launcher {
    /// Name of the VMI
    #[arg(long)]
    pub name: String,
    /// Namespace of the VMI
    #[arg(long)]
    pub namespace: String,
    /// UID of the VMI
    #[arg(long)]
    pub uid: String,
}

impl From<Launcher> for godwit_launcher::Options {
    fn from(launcher: Launcher) -> Self {
        Self { name: launcher.name, namespace: launcher.namespace, uid: launcher.uid }
    }
}

/// `godwit attachment`
#[derive(clap::Args)]
pub struct Attachment {
    /// A claim: the volume's name, `rw` or `ro`, its size in bytes, and where it is
    #[arg(long = "volume", value_name = "NAME:rw:BYTES:PATH")]
    pub volumes: Vec<godwit_launcher::attachment::Claim>,
}

/// `godwit shim`
#[derive(clap::Args)]
pub struct Shim {
    /// As the kubelet gives them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<std::ffi::OsString>,
}
