//! The cluster that is attacked.

use super::error::Error;
use super::guest::{DISK_BLOCKS, DISK_STRIDE};
use super::plan::Manner;
use crate::witness::Witness;
use godwit_guest_rom::Parameters;
use godwit_images::{FileEntry, Store};
use godwit_network::Namespace;
use godwit_standalone::{CONTROL_PLANE, Cluster, Layout, Options, admin_client, fabric, start_missing, up};
use k8s_openapi::api::core::v1::Event;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// How long a node's lease lasts, and the events about guests that were stopped because it had ended (docs/fencing.md).
const LEASE: Duration = Duration::from_secs(20);
const GUEST_FENCED: &str = "GuestFenced";
const NODE_FENCED: &str = "NodeFenced";
/// Nodes: source, target and one that could have been.
const NODES: usize = 3;
/// The guest's image.
pub const IMAGE: &str = "godwit.local/faults-rom:latest";
/// The L2 segment whose frames the witness reads.
pub const NETWORK: &str = "witnessed";
/// The label by which a guest is moved in another manner than pre-copy.
pub const MANNER: &str = "bench.godwit.io/manner";
/// What a node sends at most, as `tc` takes it: a guest needs about a second, so that a fault can meet it on its way.
const RATE: &str = "60mbit";
/// How long anything may take that no fault is in the way of.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The cluster, its witness, and what is needed to ask and to break it.
pub struct Stage {
    /// Files.
    pub layout: Layout,
    /// Shape.
    pub cluster: Cluster,
    /// Who runs.
    pub witness: Witness,
    client: kube::Client,
    /// Only one at a time starts what is missing.
    starting: tokio::sync::Mutex<()>,
    /// What of that which carries memory was broken, by any run.
    broken: Mutex<Vec<Break>>,
    /// When a node, or all of them, could not renew its lease, by any run, and for how long.
    silent: Mutex<Vec<(Instant, Duration)>>,
}

/// Something that carries memory was broken.
#[derive(Clone, Debug)]
struct Break {
    at: Instant,
    hit: Carrier,
}

/// What carries memory from node to node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// A node's handler, or its uplink.
    Node(String),
    /// What is between two nodes.
    Link(String, String),
}

impl Carrier {
    /// Whether memory on its way from one node to the other goes through it.
    #[must_use]
    pub fn is_between(&self, source: &str, target: &str) -> bool {
        match self {
            Carrier::Node(node) => node == source || node == target,
            Carrier::Link(one, other) => (one == source && other == target) || (one == target && other == source),
        }
    }
}

/// How long after a link was cut the connections over it may break.
const BREAKS_WITHIN: Duration = Duration::from_secs(20);

/// What is asked for of the API.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// VirtualMachineInstance.
    Vmi,
    /// VirtualMachineInstanceMigration.
    Migration,
    /// Pod.
    Pod,
}

impl Stage {
    /// Brings a cluster up in `folder`, with slow links and no limits to parallel migrations.
    pub async fn start(folder: &Path) -> Result<Self, Error> {
        let up =
            up(&Options { data_dir: folder.to_owned(), nodes: NODES, api_port: Some(0), ..Options::default() }).await?;
        let (layout, cluster) = (up.layout, up.cluster);
        let rom = layout.root().join("rom.bin");
        // Half of its memory is written to, some of it faster than it can be sent without standing still.
        let parameters = Parameters {
            pages_per_tick: 8,
            first: 0x10_0000,
            last: 0x90_0000,
            frame_ticks: 2,
            disk_blocks: DISK_BLOCKS,
            disk_stride: DISK_STRIDE,
            ..Parameters::default()
        };
        std::fs::write(&rom, godwit_guest_rom::image(parameters)).map_err(|source| Error::Io {
            what: "write",
            path: rom.clone(),
            source,
        })?;
        let file = FileEntry { source: rom, destination: "/boot/rom.bin".into(), mode: 0o644 };
        Store::open(layout.images())?.build(IMAGE, &[file])?;
        for node in &cluster.nodes {
            narrow(&Namespace::open(&cluster.namespace(node))?)?;
        }
        let witness = Witness::start(&cluster)?;
        let client = admin_client(&layout).await?;
        let stage = Self {
            layout,
            cluster,
            witness,
            client,
            starting: tokio::sync::Mutex::new(()),
            broken: Mutex::default(),
            silent: Mutex::default(),
        };
        stage.configure().await?;
        Ok(stage)
    }

    async fn configure(&self) -> Result<(), Error> {
        let migrations = json!({"parallelMigrationsPerCluster": 50, "parallelOutboundMigrationsPerNode": 50});
        let patch = Patch::Merge(json!({"spec": {"configuration": {"migrations": migrations}}}));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), "kubevirt", &resource);
        let patched = api.patch("kubevirt", &PatchParams::default(), &patch).await;
        patched.map_err(|source| Error::Api { what: "raise the limits of parallel migrations".into(), source })?;
        // In post-copy after a second, when about half of the memory has been sent; the rest takes as long again.
        let policy = json!({
            "apiVersion": "migrations.kubevirt.io/v1alpha1", "kind": "MigrationPolicy",
            "metadata": {"name": Manner::PostCopy.name()},
            "spec": {
                "selectors": {"virtualMachineInstanceSelector": {MANNER: Manner::PostCopy.name()}},
                "allowPostCopy": true, "completionTimeoutPerGiB": 1, "bandwidthPerMigration": "4Mi",
            },
        });
        let resource =
            ApiResource::from_gvk(&GroupVersionKind::gvk("migrations.kubevirt.io", "v1alpha1", "MigrationPolicy"));
        self.apply(Api::all_with(self.client.clone(), &resource), Manner::PostCopy.name(), &policy).await?;
        let config = json!({"cniVersion": "0.3.1", "name": NETWORK, "type": "bridge", "bridge": "br-witness"});
        let network = json!({
            "apiVersion": "k8s.cni.cncf.io/v1", "kind": "NetworkAttachmentDefinition",
            "metadata": {"name": NETWORK}, "spec": {"config": config.to_string()},
        });
        let kind = GroupVersionKind::gvk("k8s.cni.cncf.io", "v1", "NetworkAttachmentDefinition");
        let resource = ApiResource::from_gvk_with_plural(&kind, "network-attachment-definitions");
        self.apply(Api::default_namespaced_with(self.client.clone(), &resource), NETWORK, &network).await
    }

    /// Server-side apply, repeated while the API is not there.
    pub async fn apply(&self, api: Api<DynamicObject>, name: &str, object: &Value) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match api.patch(name, &PatchParams::apply("godwit-bench").force(), &Patch::Apply(object)).await {
                Ok(_) => return Ok(()),
                // A kind that was defined a moment ago may not be served yet.
                Err(kube::Error::Api(status)) if status.code != 404 && status.code < 500 => {
                    let source = kube::Error::Api(status);
                    return Err(Error::Api { what: format!("apply {name}"), source });
                }
                Err(source) if Instant::now() > deadline => {
                    return Err(Error::Api { what: format!("apply {name}"), source });
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// The objects of a kind.
    pub fn api(&self, kind: Kind) -> Api<DynamicObject> {
        let gvk = match kind {
            Kind::Vmi => GroupVersionKind::gvk("kubevirt.io", "v1", "VirtualMachineInstance"),
            Kind::Migration => GroupVersionKind::gvk("kubevirt.io", "v1", "VirtualMachineInstanceMigration"),
            Kind::Pod => GroupVersionKind::gvk("", "v1", "Pod"),
        };
        Api::default_namespaced_with(self.client.clone(), &ApiResource::from_gvk(&gvk))
    }

    /// Starts again what a fault has ended, and returns when that answers (a control plane) or runs (a node).
    pub async fn mend(&self, process: &str) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            {
                let _alone = self.starting.lock().await;
                start_missing(&self.layout, &self.cluster).await?;
            }
            if process != CONTROL_PLANE || self.answers().await {
                return Ok(());
            }
            if Instant::now() > deadline {
                let what = "the control plane answers again".into();
                let last = "not answering".into();
                return Err(Error::Late { what, seconds: PATIENCE.as_secs(), last });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn answers(&self) -> bool {
        let asked = tokio::time::timeout(Duration::from_secs(5), self.client.apiserver_version()).await;
        matches!(asked, Ok(Ok(_)))
    }

    /// A run keeps a node, or all of them, from renewing its lease for so long.
    pub fn silences(&self, lasts: Duration) {
        self.silent.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), lasts));
    }

    /// For how long that was so in all since a lease's time before `began`. Faults follow one another, so a node may lose its lease
    /// though none of them lasts that long.
    pub fn silent_since(&self, began: Instant) -> Duration {
        let all = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = all.iter().filter(|(at, lasts)| *at + *lasts + LEASE >= began);
        ours.map(|(_, lasts)| *lasts).sum()
    }

    /// Whether the API says that this guest was fenced: it, or its node.
    pub async fn was_fenced(&self, guest: &str) -> bool {
        let events: Api<Event> = Api::default_namespaced(self.client.clone());
        let Ok(list) = events.list(&ListParams::default()).await else { return false };
        let named = format!("default/{guest}");
        list.items.iter().any(|event| match event.reason.as_deref() {
            Some(GUEST_FENCED) => event.involved_object.name.as_deref() == Some(guest),
            Some(NODE_FENCED) => {
                let message = event.message.as_deref().unwrap_or_default();
                message.split([' ', ',']).any(|word| word == named)
            }
            _ => false,
        })
    }

    /// A run breaks what carries memory.
    pub fn breaks(&self, hit: Carrier) {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).push(Break { at: Instant::now(), hit });
    }

    /// When any run broke what carries memory between these nodes since `began`, the first one first. A cut takes its time until
    /// it breaks a connection, so those of shortly before count.
    pub fn broken_since(&self, began: Instant, source: &str, target: &str) -> Vec<Instant> {
        let all = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = all.iter().filter(|one| one.hit.is_between(source, target) && one.at + BREAKS_WITHIN >= began);
        ours.map(|one| one.at).collect()
    }

    /// The namespace of a node.
    pub fn namespace(&self, node: &str) -> Result<Namespace, Error> {
        Ok(Namespace::open(&self.cluster.namespace(node))?)
    }

    /// The namespace of the switch between the nodes, whose ports have the nodes' names.
    pub fn switch(&self) -> Result<Namespace, Error> {
        Ok(Namespace::open(&fabric::switch(&self.cluster))?)
    }
}

fn narrow(namespace: &Namespace) -> Result<(), Error> {
    let output = namespace.run(|| {
        let queue = ["qdisc", "replace", "dev", fabric::UPLINK, "root", "tbf"];
        Command::new("tc").args(queue).args(["rate", RATE, "burst", "64kb", "latency", "400ms"]).output()
    })?;
    let message = match output {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    Err(Error::Tc { link: fabric::UPLINK, namespace: namespace.label().to_owned(), message })
}

/// A text in an object, by JSON pointer; empty where there is none.
pub fn text(object: &DynamicObject, pointer: &str) -> String {
    object.data.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}
