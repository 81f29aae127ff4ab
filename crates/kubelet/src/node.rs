//! The node's own object: registration, heartbeats, routes to other nodes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{
    DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};

use crate::network::{Networks, Range};
use crate::{Error, Options, PORT};

/// How often the lease is renewed. Others hold the node for dead after four times that.
const LEASE_EVERY: Duration = Duration::from_secs(10);
const LEASE_SECONDS: i32 = 40;
/// How often the status is written though nothing has changed (Kubernetes: 5 minutes; the lease is the heartbeat).
const STATUS_EVERY: Duration = Duration::from_secs(60);
/// The version of Kubernetes whose kubelet this one behaves like.
const VERSION: &str = concat!("v1.33.0-godwit.", env!("CARGO_PKG_VERSION"));

fn api_error(what: impl Into<String>) -> impl FnOnce(kube::Error) -> Error {
    let what = what.into();
    move |source| Error::Api { what, source: Box::new(source) }
}

/// Makes or updates the node's object and returns the range of its pods. Tries until the API server answers.
pub(crate) async fn register(options: &Options) -> Result<Range, Error> {
    let api: Api<Node> = Api::all(options.client.clone());
    let mut said = false;
    loop {
        match try_register(&api, options).await {
            Err(Error::Api { what, source }) if is_passing(&source) => {
                tracing::warn!(error = %source, "{what}; trying again");
            }
            Ok(None) if std::mem::replace(&mut said, true) => {}
            Ok(None) => {
                let node = &options.node_name;
                tracing::warn!(
                    node,
                    "the node has no podCIDR: waiting for the cluster to give it one (or see --pod-cidr)"
                );
            }
            Ok(Some(range)) => return Ok(range),
            Err(error) => return Err(error),
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Whether an error may go away by itself: the server is not there yet, or somebody else wrote at the same time.
fn is_passing(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(answer) => answer.code == 409 || answer.code == 429 || answer.code >= 500,
        _ => true,
    }
}

/// The range of the node's pods; none when nobody has given it one yet.
async fn try_register(api: &Api<Node>, options: &Options) -> Result<Option<Range>, Error> {
    let name = &options.node_name;
    let labels = BTreeMap::from([
        ("kubernetes.io/hostname".to_owned(), name.clone()),
        ("kubernetes.io/os".to_owned(), "linux".to_owned()),
        ("kubernetes.io/arch".to_owned(), architecture().to_owned()),
        ("beta.kubernetes.io/os".to_owned(), "linux".to_owned()),
        ("beta.kubernetes.io/arch".to_owned(), architecture().to_owned()),
    ]);
    let existing = api.get_opt(name).await.map_err(api_error(format!("read node {name}")))?;
    let node = match existing {
        None => {
            let node = Node {
                metadata: ObjectMeta { name: Some(name.clone()), labels: Some(labels), ..ObjectMeta::default() },
                spec: Some(NodeSpec {
                    pod_cidr: options.pod_range.clone(),
                    pod_cidrs: options.pod_range.clone().map(|range| vec![range]),
                    ..NodeSpec::default()
                }),
                status: Some(status(options, None)),
            };
            api.create(&PostParams::default(), &node).await.map_err(api_error(format!("register node {name}")))?
        }
        Some(node) => {
            let mut patch = serde_json::json!({ "metadata": { "labels": labels } });
            let given = node.spec.as_ref().is_some_and(|spec| spec.pod_cidr.is_some());
            if let Some(range) = options.pod_range.as_ref().filter(|_| !given) {
                patch["spec"] = serde_json::json!({ "podCIDR": range, "podCIDRs": [range] });
            }
            let patched = api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
            patched.map_err(api_error(format!("update node {name}")))?
        }
    };
    write_status(api, options, &node).await.map_err(api_error(format!("write the status of node {name}")))?;
    let given = node.spec.and_then(|spec| spec.pod_cidr);
    given
        .map(|range| {
            range.parse().map_err(|()| Error::Invalid(format!("node {name}: podCIDR {range:?} is no usable range")))
        })
        .transpose()
}

async fn write_status(api: &Api<Node>, options: &Options, node: &Node) -> Result<(), kube::Error> {
    let status = status(options, node.status.as_ref());
    let mut value = serde_json::to_value(&status).unwrap_or_default();
    // What others add (devices, other conditions) is not ours to take away: a strategic merge keeps it.
    if let Some(object) = value.as_object_mut() {
        object.retain(|_, value| !value.is_null());
    }
    let patch = Patch::Strategic(serde_json::json!({ "status": value }));
    api.patch_status(&options.node_name, &PatchParams::default(), &patch).await.map(|_| ())
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Memory of the machine in KiB.
fn memory() -> u64 {
    let info = read("/proc/meminfo");
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
    line.split_ascii_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn status(options: &Options, before: Option<&NodeStatus>) -> NodeStatus {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let disk =
        nix::sys::statvfs::statvfs(&options.root).map_or(0, |stat| stat.blocks().saturating_mul(stat.fragment_size()));
    let mut resources = BTreeMap::from([
        ("cpu".to_owned(), Quantity(processors.to_string())),
        ("memory".to_owned(), Quantity(format!("{}Ki", memory()))),
        ("pods".to_owned(), Quantity("110".into())),
        ("ephemeral-storage".to_owned(), Quantity(format!("{}Ki", disk / 1024))),
    ]);
    // The scheduler does not place what asks for huge pages on a node that does not speak of them.
    resources.extend(["hugepages-1Gi", "hugepages-2Mi"].map(|name| (name.to_owned(), Quantity("0".into()))));
    let os = read("/etc/os-release");
    let os =
        os.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).unwrap_or("Linux").trim_matches('"').to_owned();
    let kernel = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    let address = |kind: &str, address: String| NodeAddress { type_: kind.into(), address };
    NodeStatus {
        addresses: Some(vec![
            address("InternalIP", options.node_ip.to_string()),
            address("Hostname", options.node_name.clone()),
        ]),
        capacity: Some(resources.clone()),
        allocatable: Some(resources),
        conditions: Some(conditions(before)),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(PORT) }),
        }),
        node_info: Some(NodeSystemInfo {
            architecture: architecture().into(),
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            container_runtime_version: format!("godwit://{}", env!("CARGO_PKG_VERSION")),
            kernel_version: kernel.unwrap_or_default(),
            kube_proxy_version: VERSION.into(),
            kubelet_version: VERSION.into(),
            machine_id: read("/etc/machine-id"),
            operating_system: "linux".into(),
            os_image: os,
            system_uuid: read("/sys/class/dmi/id/product_uuid"),
            ..NodeSystemInfo::default()
        }),
        ..NodeStatus::default()
    }
}

fn conditions(before: Option<&NodeStatus>) -> Vec<NodeCondition> {
    let now = Timestamp::now();
    let all = [
        ("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        ("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
    ];
    let known = before.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    all.into_iter()
        .map(|(kind, status, reason, message)| {
            let same = known.iter().find(|one| one.type_ == kind && one.status == status);
            NodeCondition {
                type_: kind.into(),
                status: status.into(),
                reason: Some(reason.into()),
                message: Some(message.into()),
                last_heartbeat_time: Some(Time(now)),
                last_transition_time: same.and_then(|one| one.last_transition_time.clone()).or(Some(Time(now))),
            }
        })
        .collect()
}

/// Renews the lease and the status for ever.
pub(crate) async fn heartbeat(options: &Options) {
    let nodes: Api<Node> = Api::all(options.client.clone());
    let leases: Api<Lease> = Api::namespaced(options.client.clone(), "kube-node-lease");
    let mut owner = None;
    let mut last_status = tokio::time::Instant::now();
    loop {
        if owner.is_none() {
            owner = nodes.get(&options.node_name).await.ok().and_then(|node| node.uid());
        }
        if let Err(error) = renew(&leases, options, owner.as_deref()).await {
            tracing::debug!(%error, "cannot renew the node's lease");
        }
        if last_status.elapsed() >= STATUS_EVERY || !is_ready(&nodes, options).await {
            last_status = tokio::time::Instant::now();
            if let Ok(node) = nodes.get(&options.node_name).await
                && let Err(error) = write_status(&nodes, options, &node).await
            {
                tracing::debug!(%error, "cannot write the node's status");
            }
        }
        tokio::time::sleep(LEASE_EVERY).await;
    }
}

/// Whether the API still says that this node is ready; the node controller may have given it up during a cut.
async fn is_ready(nodes: &Api<Node>, options: &Options) -> bool {
    match nodes.get(&options.node_name).await {
        Ok(node) => {
            let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
            conditions.iter().any(|one| one.type_ == "Ready" && one.status == "True")
        }
        Err(_) => true, // nothing can be written either
    }
}

async fn renew(leases: &Api<Lease>, options: &Options, owner: Option<&str>) -> Result<(), kube::Error> {
    let name = &options.node_name;
    let spec = LeaseSpec {
        holder_identity: Some(name.clone()),
        lease_duration_seconds: Some(LEASE_SECONDS),
        renew_time: Some(MicroTime(Timestamp::now())),
        ..LeaseSpec::default()
    };
    let patch = Patch::Merge(serde_json::json!({ "spec": spec }));
    match leases.patch(name, &PatchParams::default(), &patch).await {
        Err(kube::Error::Api(answer)) if answer.code == 404 => {}
        other => return other.map(|_| ()),
    }
    let owner = owner.map(|uid| k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: name.clone(),
        uid: uid.into(),
        ..Default::default()
    });
    let metadata = ObjectMeta {
        name: Some(name.clone()),
        owner_references: owner.map(|owner| vec![owner]),
        ..ObjectMeta::default()
    };
    leases.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await.map(|_| ())
}

/// Keeps the routes to the pods of other nodes.
pub(crate) async fn routes(client: Client, own: String, networks: Arc<Networks>) {
    let mut nodes: BTreeMap<String, (Range, Ipv4Addr)> = BTreeMap::new();
    let mut fresh: Option<BTreeMap<String, (Range, Ipv4Addr)>> = None;
    let mut known = BTreeMap::new();
    let stream = watcher(Api::<Node>::all(client), watcher::Config::default()).default_backoff();
    let mut stream = std::pin::pin!(stream);
    while let Some(event) = stream.next().await {
        match event {
            Ok(watcher::Event::Init) => fresh = Some(BTreeMap::new()),
            Ok(watcher::Event::InitApply(node)) => {
                if let (Some(list), Some((name, place))) = (&mut fresh, place_of(&node, &own)) {
                    list.insert(name, place);
                }
                continue;
            }
            Ok(watcher::Event::InitDone) => nodes = fresh.take().unwrap_or_default(),
            Ok(watcher::Event::Apply(node)) => {
                if let Some((name, place)) = place_of(&node, &own) {
                    nodes.insert(name, place);
                }
            }
            Ok(watcher::Event::Delete(node)) => {
                nodes.remove(&node.name_any());
            }
            Err(error) => {
                tracing::debug!(%error, "cannot watch nodes");
                continue;
            }
        }
        if fresh.is_none() {
            networks.route(&mut known, nodes.clone()).await;
        }
    }
}

fn place_of(node: &Node, own: &str) -> Option<(String, (Range, Ipv4Addr))> {
    let name = node.name_any();
    if name == own {
        return None;
    }
    let range = node.spec.as_ref()?.pod_cidr.as_ref()?.parse().ok()?;
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    let address = addresses.iter().find(|address| address.type_ == "InternalIP")?.address.parse::<IpAddr>().ok()?;
    let IpAddr::V4(address) = address else { return None };
    Some((name, (range, address)))
}
