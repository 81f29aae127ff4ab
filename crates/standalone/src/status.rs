//! What `godwit status` says: processes, nodes, VMs and migrations, read from the machine and the API.

use crate::up::{CONTROL_PLANE, admin_client, is_ready};
use crate::{Error, Layout, process};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{ApiResource, DynamicObject};
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// A cluster as it is now.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Cluster id.
    pub id: String,
    /// Cluster-admin kubeconfig.
    pub kubeconfig: String,
    /// `https://127.0.0.1:PORT`.
    pub server: String,
    /// Whether the API answered.
    pub api_answers: bool,
    /// Control plane and nodes.
    pub processes: Vec<ProcessStatus>,
    /// Nodes as the API has them.
    pub nodes: Vec<NodeStatus>,
    /// VMs, a row each.
    pub guests: Vec<GuestStatus>,
    /// Migrations that are not over.
    pub migrations: Vec<MigrationStatus>,
}

/// One of the cluster's own processes.
#[derive(Debug, Serialize)]
pub struct ProcessStatus {
    /// `control-plane` or a node's name.
    pub name: String,
    /// Number, if it runs.
    pub pid: Option<i32>,
    /// Its network namespace (`ip netns exec NAME …`), or `-` for the root one.
    pub namespace: String,
}

/// One node.
#[derive(Debug, Serialize)]
pub struct NodeStatus {
    /// Name.
    pub name: String,
    /// Ready for VMs.
    pub ready: bool,
    /// Cordoned.
    pub cordoned: bool,
    /// `kvm` or `tcg`.
    pub accelerator: String,
}

/// One VMI.
#[derive(Debug, Serialize)]
pub struct GuestStatus {
    /// `namespace/name`.
    pub name: String,
    /// Phase.
    pub phase: String,
    /// Node.
    pub node: String,
    /// First address.
    pub address: String,
}

/// One unfinished migration.
#[derive(Debug, Serialize)]
pub struct MigrationStatus {
    /// `namespace/name`.
    pub name: String,
    /// VMI.
    pub vmi: String,
    /// Phase.
    pub phase: String,
}

/// Reads the state of the cluster in `data_dir`.
///
/// # Errors
/// [`Error::NoCluster`] when there never was one there.
pub async fn status(data_dir: &Path) -> Result<Status, Error> {
    if !data_dir.exists() {
        return Err(Error::NoCluster(data_dir.to_owned()));
    }
    let layout = Layout::open(data_dir)?;
    let Some(cluster) = layout.load()? else { return Err(Error::NoCluster(data_dir.to_owned())) };
    let processes = std::iter::once((CONTROL_PLANE, "-".to_owned()))
        .chain(cluster.nodes.iter().map(|name| (name.as_str(), cluster.namespace(name))))
        .map(|(name, namespace)| ProcessStatus {
            name: name.to_owned(),
            pid: process::find(&layout, name).map(|p| p.pid),
            namespace,
        })
        .collect();
    let mut status = Status {
        id: cluster.id.clone(),
        kubeconfig: layout.kubeconfig().display().to_string(),
        server: format!("https://127.0.0.1:{}", cluster.api_port),
        api_answers: false,
        processes,
        nodes: Vec::new(),
        guests: Vec::new(),
        migrations: Vec::new(),
    };
    if process::find(&layout, CONTROL_PLANE).is_some() {
        let asked = tokio::time::timeout(Duration::from_secs(5), ask(&layout, &mut status)).await;
        status.api_answers = matches!(asked, Ok(Ok(())));
    }
    Ok(status)
}

async fn ask(layout: &Layout, status: &mut Status) -> Result<(), Error> {
    let client = admin_client(layout).await?;
    let nodes: Api<Node> = Api::all(client.clone());
    for node in nodes.list(&Default::default()).await? {
        let labels = node.metadata.labels.clone().unwrap_or_default();
        status.nodes.push(NodeStatus {
            ready: is_ready(&node),
            cordoned: node.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or(false),
            accelerator: labels.get("godwit.dev/accelerator").cloned().unwrap_or_else(|| "?".to_owned()),
            name: node.metadata.name.unwrap_or_default(),
        });
    }
    for guest in list(&client, "VirtualMachineInstance").await? {
        status.guests.push(GuestStatus {
            name: full_name(&guest),
            phase: text(&guest, "/status/phase"),
            node: text(&guest, "/status/nodeName"),
            address: text(&guest, "/status/interfaces/0/ipAddress"),
        });
    }
    for migration in list(&client, "VirtualMachineInstanceMigration").await? {
        let phase = text(&migration, "/status/phase");
        if phase != "Succeeded" && phase != "Failed" {
            let vmi = text(&migration, "/spec/vmiName");
            status.migrations.push(MigrationStatus { name: full_name(&migration), vmi, phase });
        }
    }
    Ok(())
}

/// A kubevirt.io/v1 kind for dynamic access.
pub(crate) fn kubevirt(kind: &str) -> ApiResource {
    ApiResource {
        group: "kubevirt.io".to_owned(),
        version: "v1".to_owned(),
        api_version: "kubevirt.io/v1".to_owned(),
        kind: kind.to_owned(),
        plural: format!("{}s", kind.to_lowercase()),
    }
}

async fn list(client: &kube::Client, kind: &str) -> Result<Vec<DynamicObject>, Error> {
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &kubevirt(kind));
    Ok(api.list(&Default::default()).await?.items)
}

fn full_name(object: &DynamicObject) -> String {
    let metadata = &object.metadata;
    format!("{}/{}", metadata.namespace.as_deref().unwrap_or(""), metadata.name.as_deref().unwrap_or(""))
}

pub(crate) fn text(object: &DynamicObject, pointer: &str) -> String {
    object.data.pointer(pointer).and_then(|v| v.as_str()).unwrap_or_default().to_owned()
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "cluster    {}   {}   KUBECONFIG={}", self.id, self.server, self.kubeconfig)?;
        for process in &self.processes {
            let state = process.pid.map_or_else(|| "not running".to_owned(), |pid| format!("pid {pid}"));
            writeln!(f, "process    {:<14} {:<14} namespace {}", process.name, state, process.namespace)?;
        }
        if !self.api_answers {
            return writeln!(f, "api        does not answer; `godwit up` starts what is missing");
        }
        for node in &self.nodes {
            let ready = if node.ready { "ready" } else { "not ready" };
            let cordoned = if node.cordoned { ", cordoned" } else { "" };
            writeln!(f, "node       {:<14} {ready}{cordoned}, {}", node.name, node.accelerator)?;
        }
        for guest in &self.guests {
            writeln!(f, "vmi        {:<24} {:<10} {:<10} {}", guest.name, guest.phase, guest.node, guest.address)?;
        }
        for migration in &self.migrations {
            writeln!(f, "migration  {:<24} {:<16} of {}", migration.name, migration.phase, migration.vmi)?;
        }
        Ok(())
    }
}
