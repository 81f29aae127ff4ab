//! The node's and its pods' networks: bridge `cni0` for the pod range, one namespace a pod, secondary segments.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use godwit_network::{Links, Mac, NETNS_DIR, Namespace, Route, VethEnd, segment};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams};
use kube::{Api, Client, ResourceExt};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::spec;

/// The bridge of the pod range.
const BRIDGE: &str = "cni0";
/// The node's link to other nodes.
pub(crate) const UPLINK: &str = "eth0";
/// What pods and guests expect of Ethernet.
const MTU: u32 = 1500;
/// The file with a pod's [`PodNetwork`] in its folder.
const FILE: &str = "network.json";
const WANTED: &str = "k8s.v1.cni.cncf.io/networks";
/// Annotation of a pod in which a guest is bridged to the pod network and takes its address along when it moves to another pod
/// (KubeVirt's; OVN-Kubernetes acts on it too).
const TRAVELS: &str = "kubevirt.io/allow-pod-bridge-network-live-migration";
/// Label of all pods of one guest, with its UID.
const GUEST: &str = "kubevirt.io/created-by";
/// Label of a pod that was made for a guest to move to.
const MOVE: &str = "kubevirt.io/migrationJobUID";
/// Annotation that tells what a pod got (Network Plumbing Working Group's specification).
pub(crate) const STATUS: &str = "k8s.v1.cni.cncf.io/network-status";

/// A range of addresses, such as `10.244.1.0/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) network: Ipv4Addr,
    pub(crate) prefix: u8,
}

impl std::str::FromStr for Range {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (network, prefix) = text.split_once('/').ok_or(())?;
        let range = Self { network: network.parse().map_err(|_| ())?, prefix: prefix.parse().map_err(|_| ())? };
        // Room for the gateway and a pod at least.
        if (8..=29).contains(&range.prefix) { Ok(range) } else { Err(()) }
    }
}

impl Range {
    fn address(self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network).wrapping_add(offset))
    }

    /// The range of the same size in which an address is: all nodes' ranges have one size.
    fn around(self, ip: Ipv4Addr) -> Self {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
        Self { network: Ipv4Addr::from(u32::from(ip) & mask), prefix: self.prefix }
    }

    fn contains(self, ip: Ipv4Addr) -> bool {
        self.around(ip) == self.around(self.network)
    }

    fn gateway(self) -> Ipv4Addr {
        self.address(1)
    }

    /// How many addresses pods can have, from offset 2 on.
    fn room(self) -> u32 {
        (1u32 << (32 - self.prefix)) - 3
    }
}

/// A network interface of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attachment {
    /// What network it is: `cni0`, or `<namespace>/<NetworkAttachmentDefinition>`.
    pub(crate) name: String,
    pub(crate) interface: String,
    pub(crate) mac: Option<Mac>,
}

/// What a pod has been given; written down, so that it keeps its address over a restart of the kubelet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodNetwork {
    pub(crate) namespace: String,
    pub(crate) ip: Ipv4Addr,
    pub(crate) attachments: Vec<Attachment>,
    /// Its guest takes the address along.
    #[serde(default)]
    pub(crate) travels: bool,
}

impl PodNetwork {
    pub(crate) fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.namespace)
    }

    /// The value of the annotation [`STATUS`].
    pub(crate) fn status(&self) -> String {
        let list = self.attachments.iter().enumerate().map(|(index, one)| {
            let mut entry = serde_json::json!({ "name": one.name, "interface": one.interface, "dns": {} });
            if let Some(mac) = one.mac {
                entry["mac"] = mac.to_string().into();
            }
            if index == 0 {
                entry["ips"] = vec![self.ip.to_string()].into();
                entry["default"] = true.into();
            }
            entry
        });
        serde_json::Value::Array(list.collect()).to_string()
    }
}

#[derive(Deserialize)]
struct Wanted {
    name: String,
    namespace: Option<String>,
    interface: Option<String>,
    mac: Option<Mac>,
}

/// The networks of the pods of this node.
pub(crate) struct Networks {
    client: Client,
    links: Links,
    node: Namespace,
    cluster_id: String,
    range: Range,
    /// Addresses in use, and where to look next: one that was just given back is used again as late as possible.
    addresses: std::sync::Mutex<(BTreeSet<Ipv4Addr>, u32)>,
    /// Addresses that guests have taken along to other nodes; none: it has to be looked up.
    abroad: std::sync::Mutex<Option<BTreeSet<Ipv4Addr>>>,
    /// Only one at a time makes a segment.
    segments: tokio::sync::Mutex<()>,
}

impl Networks {
    /// Sets the node's side up, in the namespace of the calling thread.
    pub(crate) async fn start(
        client: Client,
        cluster_id: &str,
        range: Range,
        pods: &Path,
    ) -> Result<Self, godwit_network::Error> {
        let node = Namespace::current()?;
        let links = node.links()?;
        if links.get(BRIDGE).await?.is_none() {
            // A fixed address: a bridge takes that of its ports otherwise, and changes it with them.
            links.bridge(BRIDGE, Some(Mac::local(&Sha256::digest(range.network.octets())))).await?;
        }
        links.set_mtu(BRIDGE, MTU).await?;
        links.add_address(BRIDGE, IpAddr::V4(range.gateway()), range.prefix).await?;
        node.sysctls(&[("net.ipv4.ip_forward", "1"), ("net.ipv4.conf.all.rp_filter", "0")])?;
        let mut used = BTreeSet::new();
        for pod in fs::read_dir(pods).into_iter().flatten().flatten() {
            if let Some(network) = spec::read::<PodNetwork>(&pod.path(), FILE) {
                used.insert(network.ip);
            }
        }
        let own = used.iter().filter(|ip| range.contains(**ip));
        let next = own.max().map_or(0, |ip| u32::from(*ip).wrapping_sub(u32::from(range.address(1))));
        Ok(Self {
            client,
            links,
            node,
            cluster_id: cluster_id.into(),
            range,
            addresses: std::sync::Mutex::new((used, next)),
            abroad: std::sync::Mutex::new(None),
            segments: tokio::sync::Mutex::new(()),
        })
    }

    /// Learns which addresses are in use by pods elsewhere, where that may have changed.
    async fn look_abroad(&self) -> Result<BTreeSet<Ipv4Addr>, String> {
        if let Some(none) = self.abroad().as_ref().filter(|abroad| abroad.is_empty()) {
            return Ok(none.clone());
        }
        let pods = Api::<Pod>::all(self.client.clone()).list(&ListParams::default()).await;
        let pods = pods.map_err(|e| format!("cannot tell which addresses are in use: {e}"))?;
        let mine = self.addresses.lock().unwrap_or_else(std::sync::PoisonError::into_inner).0.clone();
        let abroad: BTreeSet<Ipv4Addr> =
            pods.iter().filter_map(address).filter(|ip| self.range.contains(*ip) && !mine.contains(ip)).collect();
        *self.abroad() = Some(abroad.clone());
        Ok(abroad)
    }

    fn abroad(&self) -> std::sync::MutexGuard<'_, Option<BTreeSet<Ipv4Addr>>> {
        self.abroad.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The address with which a guest comes that moves to this pod.
    async fn brought(&self, pod: &Pod) -> Result<Option<Ipv4Addr>, String> {
        let label = |key| pod.labels().get(key).filter(|value| !value.is_empty());
        let (Some(guest), Some(_), true) = (label(GUEST), label(MOVE), travels(pod)) else { return Ok(None) };
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
        let pods = api.list(&ListParams::default().labels(&format!("{GUEST}={guest}"))).await;
        let pods = pods.map_err(|e| format!("cannot tell the address of the guest that comes: {e}"))?;
        Ok(pods.iter().filter(|other| other.uid() != pod.uid()).find_map(address))
    }

    fn take_address(&self, abroad: &BTreeSet<Ipv4Addr>) -> Option<Ipv4Addr> {
        let mut addresses = self.addresses.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let room = self.range.room();
        for step in 0..room {
            let offset = (addresses.1 + step) % room;
            let ip = self.range.address(offset + 2);
            if !abroad.contains(&ip) && addresses.0.insert(ip) {
                addresses.1 = offset + 1;
                return Some(ip);
            }
        }
        None
    }

    fn give_back(&self, ip: Ipv4Addr) {
        self.addresses.lock().unwrap_or_else(std::sync::PoisonError::into_inner).0.remove(&ip);
    }

    /// The pod's network: the one it has, or a new one. Errors are texts for a `FailedCreatePodSandBox` event.
    pub(crate) async fn attach(&self, pod: &Pod, folder: &Path) -> Result<PodNetwork, String> {
        let before = spec::read::<PodNetwork>(folder, FILE);
        if let Some(network) = before.as_ref().filter(|network| Namespace::exists(&network.namespace)) {
            return Ok(network.clone());
        }
        let wanted = self.wanted(pod).await?;
        let uid = pod.uid().unwrap_or_default();
        let short: String = uid.chars().filter(char::is_ascii_alphanumeric).take(8).collect();
        // After a restart of the machine the namespace is gone, but the address is still the pod's.
        let brought = self.brought(pod).await?;
        let ip = match before.map(|network| network.ip).or(brought) {
            Some(ip) => {
                self.addresses.lock().unwrap_or_else(std::sync::PoisonError::into_inner).0.insert(ip);
                ip
            }
            None => {
                let abroad = self.look_abroad().await?;
                self.take_address(&abroad).ok_or("no addresses left in the node's pod range")?
            }
        };
        let network = PodNetwork {
            namespace: format!("gw-{}-p-{short}", self.cluster_id),
            ip,
            attachments: Vec::new(),
            travels: travels(pod),
        };
        match self.make(network, &short, wanted, brought.is_some()).await {
            Ok(network) => {
                if let Err(error) = spec::write(folder, FILE, &network) {
                    self.detach_network(&network);
                    return Err(format!("write {FILE}: {error}"));
                }
                Ok(network)
            }
            Err(error) => {
                self.give_back(ip);
                let _ = fs::remove_file(folder.join(FILE));
                let _ = Namespace::delete(&format!("gw-{}-p-{short}", self.cluster_id));
                Err(error.to_string())
            }
        }
    }

    async fn make(
        &self,
        mut network: PodNetwork,
        short: &str,
        wanted: Vec<(Wanted, String)>,
        brought: bool,
    ) -> Result<PodNetwork, Error> {
        let name = network.namespace.clone();
        // A namespace that a broken attempt has left behind is no use; its links go with it.
        Namespace::delete(&name)?;
        let pod = tokio::task::spawn_blocking(move || Namespace::create(&name)).await.map_err(|e| e.to_string())??;
        let links = pod.links()?;
        pod.sysctls(&[
            ("net.ipv6.conf.all.accept_dad", "0"),
            ("net.ipv6.conf.default.accept_dad", "0"),
            // Neighbours learn at once where an address is; but not while its guest still runs elsewhere.
            ("net.ipv4.conf.default.arp_notify", if brought { "0" } else { "1" }),
            ("net.ipv4.conf.default.arp_ignore", if brought { "8" } else { "0" }),
        ])?;
        if network.travels {
            // Wherever the guest is, it is on the network of the node that it began on.
            let _alone = self.segments.lock().await;
            segment::ensure(&self.links, BRIDGE, UPLINK).await?;
        }
        let mac = Mac::local(&Sha256::digest(format!("{}/{}", network.namespace, network.ip)));
        let outside = format!("v{short}");
        self.connect(&pod, "eth0", Some(mac), &outside, BRIDGE).await?;
        links.add_address("eth0", IpAddr::V4(network.ip), self.range.prefix).await?;
        let gateway = Some(self.range.around(network.ip).gateway());
        links.set_route(&Route { destination: (Ipv4Addr::UNSPECIFIED, 0), gateway, link: None }).await?;
        network.attachments.push(Attachment { name: BRIDGE.into(), interface: "eth0".into(), mac: Some(mac) });
        for (number, (wanted, bridge)) in wanted.into_iter().enumerate() {
            {
                let _alone = self.segments.lock().await;
                segment::ensure(&self.links, &bridge, UPLINK).await?;
            }
            let interface = wanted.interface.unwrap_or_else(|| format!("net{}", number + 1));
            let mac =
                wanted.mac.unwrap_or_else(|| Mac::local(&Sha256::digest(format!("{}/{interface}", network.namespace))));
            self.connect(&pod, &interface, Some(mac), &format!("v{short}{number}"), &bridge).await?;
            let name = format!("{}/{}", wanted.namespace.unwrap_or_default(), wanted.name);
            network.attachments.push(Attachment { name, interface, mac: Some(mac) });
        }
        Ok(network)
    }

    async fn connect(
        &self,
        pod: &Namespace,
        inside: &str,
        mac: Option<Mac>,
        outside: &str,
        bridge: &str,
    ) -> Result<(), godwit_network::Error> {
        // Its other end went with a namespace that is gone.
        self.links.delete(outside).await?;
        let inner = VethEnd { namespace: pod, name: inside, mac };
        let outer = VethEnd { namespace: &self.node, name: outside, mac: None };
        self.links.veth(&outer, &inner, Some(MTU)).await?;
        self.links.set_master(outside, Some(bridge)).await
    }

    /// The secondary networks that the pod asks for, each with its bridge.
    async fn wanted(&self, pod: &Pod) -> Result<Vec<(Wanted, String)>, String> {
        let Some(text) = pod.annotations().get(WANTED).filter(|text| !text.trim().is_empty()) else {
            return Ok(Vec::new());
        };
        let own = pod.namespace().unwrap_or_default();
        let mut list: Vec<Wanted> = if text.trim_start().starts_with('[') {
            serde_json::from_str(text).map_err(|e| format!("annotation {WANTED}: {e}"))?
        } else {
            text.split(',').map(|item| short_form(item.trim())).collect()
        };
        let mut with_bridges = Vec::new();
        for mut wanted in list.drain(..) {
            let namespace = wanted.namespace.get_or_insert_with(|| own.clone()).clone();
            let bridge = self.bridge_of(&namespace, &wanted.name).await?;
            with_bridges.push((wanted, bridge));
        }
        Ok(with_bridges)
    }

    async fn bridge_of(&self, namespace: &str, name: &str) -> Result<String, String> {
        let kind = GroupVersionKind::gvk("k8s.cni.cncf.io", "v1", "NetworkAttachmentDefinition");
        let resource = ApiResource::from_gvk_with_plural(&kind, "network-attachment-definitions");
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource);
        let shown = format!("NetworkAttachmentDefinition {namespace}/{name}");
        let object = api.get_opt(name).await.map_err(|e| format!("{shown}: {e}"))?;
        let object = object.ok_or_else(|| format!("{shown} not found"))?;
        let config = object.data.pointer("/spec/config").and_then(|config| config.as_str()).unwrap_or_default();
        bridge_in(config).map_err(|reason| format!("{shown}: {reason}"))
    }

    /// Takes a pod's network away.
    pub(crate) fn detach(&self, folder: &Path) {
        if let Some(network) = spec::read::<PodNetwork>(folder, FILE) {
            self.detach_network(&network);
            let _ = fs::remove_file(folder.join(FILE));
        }
    }

    fn detach_network(&self, network: &PodNetwork) {
        if let Err(error) = Namespace::delete(&network.namespace) {
            tracing::warn!(%error, "cannot delete a pod's network namespace");
        }
        if network.travels {
            // It may be in use elsewhere now.
            *self.abroad() = None;
        }
        self.give_back(network.ip);
    }

    /// Routes to the pod ranges of other nodes: what is in `wanted` and not in `known` is set, what is only in `known` goes.
    pub(crate) async fn route(
        &self,
        known: &mut BTreeMap<String, (Range, Ipv4Addr)>,
        wanted: BTreeMap<String, (Range, Ipv4Addr)>,
    ) {
        for (name, (range, via)) in &wanted {
            if known.get(name) == Some(&(*range, *via)) {
                continue;
            }
            let route = Route { destination: (range.network, range.prefix), gateway: Some(*via), link: None };
            match self.links.set_route(&route).await {
                Ok(()) => {
                    known.insert(name.clone(), (*range, *via));
                }
                Err(error) => tracing::warn!(%error, node = name, "cannot set the route to a node's pods"),
            }
        }
        let gone: Vec<String> = known.keys().filter(|name| !wanted.contains_key(*name)).cloned().collect();
        for name in gone {
            if let Some((range, via)) = known.remove(&name) {
                let route = Route { destination: (range.network, range.prefix), gateway: Some(via), link: None };
                if let Err(error) = self.links.delete_route(&route).await {
                    tracing::warn!(%error, node = name, "cannot delete the route to a node's pods");
                }
            }
        }
    }
}

fn travels(pod: &Pod) -> bool {
    pod.annotations().contains_key(TRAVELS)
}

/// The address of a pod that is not over.
fn address(pod: &Pod) -> Option<Ipv4Addr> {
    let status = pod.status.as_ref()?;
    let over = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    status.pod_ip.as_ref().filter(|_| !over)?.parse().ok()
}

/// `[<namespace>/]<name>[@<interface>]`
fn short_form(text: &str) -> Wanted {
    let (rest, interface) = text.split_once('@').map_or((text, None), |(rest, i)| (rest, Some(i.to_owned())));
    let (namespace, name) = rest.split_once('/').map_or((None, rest), |(ns, name)| (Some(ns.to_owned()), name));
    Wanted { name: name.into(), namespace, interface, mac: None }
}

/// The bridge that a CNI configuration names: type `bridge` (or `cnv-bridge`), also in a list of plugins.
fn bridge_in(config: &str) -> Result<String, String> {
    let config: serde_json::Value = serde_json::from_str(config).map_err(|e| format!("spec.config: {e}"))?;
    let plugins = config.get("plugins").and_then(|plugins| plugins.as_array());
    let plugin = plugins.and_then(|plugins| plugins.first()).unwrap_or(&config);
    let text = |key: &str| plugin.get(key).and_then(|value| value.as_str());
    match text("type") {
        Some("bridge" | "cnv-bridge") => {}
        other => return Err(format!("type {:?} is not supported, only \"bridge\"", other.unwrap_or_default())),
    }
    if plugin.get("vlan").and_then(serde_json::Value::as_u64).is_some_and(|vlan| vlan != 0) {
        return Err("vlan is not supported".into());
    }
    if plugin.get("ipam").and_then(|ipam| ipam.get("type")).is_some() {
        return Err("ipam is not supported: addresses on it are the guests' own".into());
    }
    let bridge = text("bridge").unwrap_or("cni0").to_owned();
    if bridge == BRIDGE || bridge == UPLINK { Err(format!("bridge {bridge:?} is the node's own")) } else { Ok(bridge) }
}

enum Error {
    Network(godwit_network::Error),
    Text(String),
}

impl From<godwit_network::Error> for Error {
    fn from(error: godwit_network::Error) -> Self {
        Self::Network(error)
    }
}

impl From<String> for Error {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Network(error) => error.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_name_a_bridge_or_are_refused() {
        assert_eq!(bridge_in(r#"{"type":"bridge","bridge":"br-lab"}"#).unwrap(), "br-lab");
        assert_eq!(bridge_in(r#"{"plugins":[{"type":"cnv-bridge","bridge":"b"}]}"#).unwrap(), "b");
        for bad in
            ["", "{}", r#"{"type":"sriov"}"#, r#"{"type":"bridge"}"#, r#"{"type":"bridge","bridge":"b","vlan":7}"#]
        {
            assert!(bridge_in(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges_are_read() {
        let range: Range = "10.244.3.0/24".parse().unwrap();
        assert_eq!(range.gateway(), Ipv4Addr::new(10, 244, 3, 1));
        assert_eq!(range.room(), 253);
        assert_eq!(range.around(Ipv4Addr::new(10, 244, 1, 7)).gateway(), Ipv4Addr::new(10, 244, 1, 1));
        assert!(range.contains(Ipv4Addr::new(10, 244, 3, 9)) && !range.contains(Ipv4Addr::new(10, 244, 4, 9)));
        for bad in ["", "10.0.0.0", "10.0.0.0/33", "10.0.0.0/31", "x/24"] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
    }

    #[test]
    fn short_forms_are_understood() {
        let wanted = short_form("ns/lab@net7");
        let expected = (Some("ns".to_owned()), "lab".to_owned(), Some("net7".to_owned()));
        assert_eq!((wanted.namespace, wanted.name, wanted.interface), expected);
    }

    #[test]
    fn the_status_tells_the_default_network_first() {
        let attachment =
            |name: &str, interface: &str| Attachment { name: name.into(), interface: interface.into(), mac: None };
        let network = PodNetwork {
            namespace: "x".into(),
            ip: Ipv4Addr::new(10, 244, 1, 2),
            attachments: vec![attachment("cni0", "eth0"), attachment("default/lab", "pod1")],
            travels: false,
        };
        let status: serde_json::Value = serde_json::from_str(&network.status()).unwrap();
        assert_eq!(status[0]["ips"][0], "10.244.1.2");
        assert_eq!(status[0]["default"], true);
        assert_eq!(status[1]["name"], "default/lab");
        assert!(status[1].get("ips").is_none());
    }
}
