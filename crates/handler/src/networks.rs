//! The networks of a VM inside its launcher pod: bridge, tap, address translation, DHCP.
//!
//! Names and addresses are KubeVirt's: pod interface `eth0` or `pod<11 hex of the network's name>`, bridge `k6t-<suffix>`, tap
//! `tap<suffix>`; masquerade gives the guest 10.0.2.2 behind 10.0.2.1.

use std::net::{IpAddr, Ipv4Addr};

use godwit_api::vmi::{Interface, VirtualMachineInstance};
use godwit_launcher::rpc::InterfaceOrder;
use godwit_network::dhcp::{Lease, Server};
use godwit_network::nat::{Masquerade, Protocol};
use godwit_network::{Links, Mac, Namespace, TapOptions};

/// The bridge to a masqueraded guest has the same address on every node, so that the guest's ARP table stays right when it moves.
const GATEWAY_MAC: Mac = Mac([2, 0, 0, 0, 0, 0]);

/// From where a guest that is bridged to the pod network gets the pod's address by DHCP.
const LEASER: Ipv4Addr = Ipv4Addr::new(169, 254, 75, 10);

/// The pod's interface on the pod network.
const POD_INTERFACE: &str = "eth0";

/// KubeVirt's network behind masquerade.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const PREFIX: u8 = 24;

/// Why the networks could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The VMI asks for something that cannot be done.
    #[error("{0}")]
    Spec(String),
    /// The kernel or nft refused.
    #[error(transparent)]
    Network(#[from] godwit_network::Error),
}

/// How a guest's interface reaches its network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Binding {
    /// Address translation behind the pod's address.
    Masquerade {
        /// Our address on the bridge.
        gateway: Ipv4Addr,
        /// The guest's.
        guest: Ipv4Addr,
        /// Length of their network's prefix.
        prefix: u8,
        /// Forwarded ports; all when empty.
        ports: Vec<(Protocol, u16)>,
    },
    /// One segment with the pod's interface.
    Bridge,
}

/// One interface as it is to be wired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Name in the VMI.
    pub name: String,
    /// The pod's interface.
    pub pod_interface: String,
    /// The bridge to make.
    pub bridge: String,
    /// The tap to make.
    pub tap: String,
    /// The guest's address on the wire.
    pub mac: Mac,
    /// Its binding.
    pub binding: Binding,
}

/// A guest's interface on a segment that others are on too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its number in the VMI's spec, from 0: the same at both ends of a migration.
    pub number: u8,
    /// The pod's interface, over which frames come in.
    pub pod_interface: String,
    /// The bridge to which both belong.
    pub bridge: String,
    /// The tap, over which they reach the guest.
    pub tap: String,
    /// The guest's address on the wire.
    pub mac: Mac,
}

/// The interfaces of a VMI that have the bridge binding.
#[must_use]
pub fn ports(vmi: &VirtualMachineInstance) -> Vec<Port> {
    let plans = plan(vmi).unwrap_or_default();
    let numbered = plans.into_iter().enumerate().filter(|(_, plan)| plan.binding == Binding::Bridge);
    numbered
        .filter_map(|(number, plan)| {
            let Plan { pod_interface, bridge, tap, mac, .. } = plan;
            Some(Port { number: u8::try_from(number).ok()?, pod_interface, bridge, tap, mac })
        })
        .collect()
}

/// Lets a guest's taps hear what its segments carry. Harmless when they do.
///
/// # Errors
/// What could not be done, to which link.
pub async fn join(pid: u32, ports: &[Port]) -> Result<(), NetworkError> {
    if ports.is_empty() {
        return Ok(());
    }
    let links = Namespace::of_pid(pid)?.links()?;
    for port in ports {
        links.set_master(&port.tap, Some(&port.bridge)).await?;
    }
    Ok(())
}

impl Plan {
    /// Whether the guest is bridged to the pod network: then the pod's address is its own.
    #[must_use]
    pub fn has_pod_address(&self) -> bool {
        self.binding == Binding::Bridge && self.pod_interface == POD_INTERFACE
    }
}

/// The guest's MAC address: the one in the spec, or one derived from VMI and interface, which is the same on every node.
///
/// # Errors
/// A malformed address in the spec.
pub fn mac(vmi: &VirtualMachineInstance, interface: &Interface) -> Result<Mac, NetworkError> {
    let (namespace, name) = vmi.namespaced_name();
    let text = match &interface.mac_address {
        Some(text) => text.clone(),
        None => godwit_api::derived_mac(namespace, name, &interface.name),
    };
    text.parse().map_err(|e| NetworkError::Spec(format!("interface {}: {e}", interface.name)))
}

/// What is to be wired for a VMI.
///
/// # Errors
/// [`NetworkError::Spec`] names the interface and what is wrong with it.
pub fn plan(vmi: &VirtualMachineInstance) -> Result<Vec<Plan>, NetworkError> {
    let spec = &vmi.spec;
    spec.domain
        .devices
        .interfaces
        .iter()
        .map(|interface| {
            let name = &interface.name;
            let network = spec.networks.iter().find(|n| n.name == *name).ok_or_else(|| {
                NetworkError::Spec(format!("interface {name} has no network of the same name in spec.networks"))
            })?;
            let on_pod = network.pod.is_some();
            let pod_interface = if on_pod { POD_INTERFACE.to_owned() } else { godwit_api::pod_interface_name(name) };
            let suffix = pod_interface.strip_prefix("pod").unwrap_or(&pod_interface).to_owned();
            let binding = match (&interface.masquerade, &interface.bridge) {
                (Some(_), Some(_)) => {
                    return Err(NetworkError::Spec(format!("interface {name} has two bindings: choose one")));
                }
                (None, Some(_)) => Binding::Bridge,
                (Some(_), None) if !on_pod => {
                    return Err(NetworkError::Spec(format!(
                        "interface {name}: masquerade works on the pod network only"
                    )));
                }
                (None, None) if !on_pod => Binding::Bridge,
                (_, None) => {
                    Binding::Masquerade { gateway: GATEWAY, guest: GUEST, prefix: PREFIX, ports: forwarded(interface)? }
                }
            };
            Ok(Plan {
                name: name.clone(),
                bridge: format!("k6t-{suffix}"),
                tap: format!("tap{suffix}"),
                pod_interface,
                mac: mac(vmi, interface)?,
                binding,
            })
        })
        .collect()
}

fn forwarded(interface: &Interface) -> Result<Vec<(Protocol, u16)>, NetworkError> {
    interface
        .ports
        .iter()
        .map(|port| {
            let bad = |what: &str| NetworkError::Spec(format!("interface {}: {what}", interface.name));
            let protocol = match port.protocol.as_deref().unwrap_or("TCP") {
                "TCP" | "" => Protocol::Tcp,
                "UDP" => Protocol::Udp,
                other => return Err(bad(&format!("protocol {other:?} is neither TCP nor UDP"))),
            };
            let number = u16::try_from(port.port).ok().filter(|p| *p > 0);
            Ok((protocol, number.ok_or_else(|| bad(&format!("port {} is out of range", port.port)))?))
        })
        .collect()
}

/// The networks of one pod. Its DHCP servers stop when it is dropped; the links stay until the pod goes.
pub struct Wired {
    /// For the launcher.
    pub interfaces: Vec<InterfaceOrder>,
    _servers: Vec<Server>,
}

/// Whether it is that of the node, or of this process: whose number a process has is not for ever.
fn is_the_nodes(namespace: &Namespace) -> Result<bool, NetworkError> {
    let wanted = namespace.inode()?;
    // Not everywhere may process 1 be looked at.
    let nodes = Namespace::of_pid(1).and_then(|first| first.inode()).is_ok_and(|first| first == wanted);
    Ok(nodes || Namespace::origin()?.inode()? == wanted)
}

/// Sets up what is missing in a pod's network namespace; what is there already is left as it is. A user who is not root
/// gets the taps: nobody else there may open them. The taps of a guest
/// that is yet to come (`awaited`) hear nothing of their segments until they [`join`]: what is said there meanwhile is for
/// the guest where it is, and would fill the queues that the last moments of its move need.
///
/// # Errors
/// What could not be done, to which link.
pub async fn wire(
    namespace: &Namespace,
    user: u32,
    vmi: &VirtualMachineInstance,
    awaited: bool,
) -> Result<Wired, NetworkError> {
    let plans = plan(vmi)?;
    if !plans.is_empty() && is_the_nodes(namespace)? {
        return Err(NetworkError::Spec(
            "the launcher's process is not in a pod's network but in the node's".to_owned(),
        ));
    }
    let links = namespace.links()?;
    let mut wired = Wired { interfaces: Vec::new(), _servers: Vec::new() };
    for plan in plans {
        let below = links.get(&plan.pod_interface).await?.ok_or_else(|| {
            NetworkError::Spec(format!(
                "interface {}: the pod has no interface {}; is its network attached?",
                plan.name, plan.pod_interface
            ))
        })?;
        let bridge_mac = matches!(plan.binding, Binding::Masquerade { .. }).then_some(GATEWAY_MAC);
        if links.get(&plan.bridge).await?.is_none() {
            links.bridge(&plan.bridge, bridge_mac).await?;
            links.set_mtu(&plan.bridge, below.mtu).await?;
        }
        match &plan.binding {
            Binding::Masquerade { gateway, guest, prefix, ports } => {
                links.add_address(&plan.bridge, IpAddr::V4(*gateway), *prefix).await?;
                let (interface, bridge) = (plan.pod_interface.clone(), plan.bridge.clone());
                let (gateway, guest, ports) = (*gateway, *guest, ports.iter().copied().collect());
                // nft is a process that is waited for: not on the runtime's threads.
                let namespace = namespace.clone();
                let applied = tokio::task::spawn_blocking(move || {
                    let mut nat = Masquerade::new(&interface, &bridge);
                    nat.gateway = gateway;
                    nat.guest = guest;
                    nat.ports = ports;
                    nat.apply(&namespace)
                });
                applied
                    .await
                    .map_err(|e| NetworkError::Spec(format!("setting up address translation broke off: {e}")))??;
            }
            Binding::Bridge => {
                if plan.has_pod_address() {
                    keep_pod_address(&links, &plan).await?;
                }
                for (address, _) in links.addresses(&plan.pod_interface).await? {
                    links.delete_address(&plan.pod_interface, address).await?;
                }
                links.set_master(&plan.pod_interface, Some(&plan.bridge)).await?;
                links.set_up(&plan.pod_interface, true).await?;
            }
        }
        let joins = !(awaited && plan.binding == Binding::Bridge);
        tap(&links, &plan, user, below.mtu, joins).await?;
        let given = match &plan.binding {
            Binding::Masquerade { gateway, guest, prefix, .. } => Some((*guest, *prefix, *gateway, Some(*gateway))),
            Binding::Bridge if plan.has_pod_address() => {
                kept_pod_address(&links, &plan).await?.map(|kept| (kept.address, kept.prefix, LEASER, kept.gateway))
            }
            Binding::Bridge => None,
        };
        if let Some((address, prefix, server, router)) = given {
            let (dns, search) = resolver();
            let lease = Lease {
                mac: plan.mac,
                address,
                prefix,
                server,
                router,
                dns,
                search,
                hostname: vmi.spec.hostname.clone().or_else(|| vmi.metadata.name.clone()),
                mtu: u16::try_from(below.mtu).ok(),
            };
            wired._servers.push(Server::start(namespace, &plan.bridge, lease).await?);
        }
        wired.interfaces.push(InterfaceOrder {
            name: plan.name,
            tap: plan.tap,
            mac: plan.mac.to_string(),
            mtu: Some(below.mtu),
        });
    }
    Ok(wired)
}

/// The pod's address, which a guest that is bridged to the pod network gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PodAddress {
    address: Ipv4Addr,
    prefix: u8,
    gateway: Option<Ipv4Addr>,
}

impl std::fmt::Display for PodAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)?;
        self.gateway.map_or(Ok(()), |gateway| write!(f, " via {gateway}"))
    }
}

impl std::str::FromStr for PodAddress {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (range, gateway) = text.split_once(" via ").map_or((text, None), |(range, gateway)| (range, Some(gateway)));
        let (address, prefix) = range.split_once('/').ok_or(())?;
        Ok(Self {
            address: address.parse().map_err(|_| ())?,
            prefix: prefix.parse().map_err(|_| ())?,
            gateway: gateway.map(str::parse).transpose().map_err(|_| ())?,
        })
    }
}

/// Before the pod's address is taken from its interface it is noted on the bridge, where it outlives this process. A pod without one
/// has a network that gives the guest its address itself.
async fn keep_pod_address(links: &Links, plan: &Plan) -> Result<(), NetworkError> {
    let addresses = links.addresses(&plan.pod_interface).await?;
    let first = addresses.into_iter().find_map(|(address, prefix)| match address {
        IpAddr::V4(address) if !address.is_link_local() => Some((address, prefix)),
        _ => None,
    });
    let Some((address, prefix)) = first else { return Ok(()) };
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
    let inside = |gateway: &Ipv4Addr| u32::from(*gateway) & mask == u32::from(address) & mask;
    // DHCP's router has to be on the guest's own network.
    let gateway = links.default_gateway().await?.filter(inside);
    links.set_alias(&plan.bridge, &PodAddress { address, prefix, gateway }.to_string()).await?;
    links.add_address(&plan.bridge, IpAddr::V4(LEASER), 32).await?;
    Ok(())
}

/// What [`keep_pod_address`] has noted.
async fn kept_pod_address(links: &Links, plan: &Plan) -> Result<Option<PodAddress>, NetworkError> {
    let bridge = links.get(&plan.bridge).await?;
    Ok(bridge.and_then(|bridge| bridge.alias).and_then(|alias| alias.parse().ok()))
}

async fn tap(links: &Links, plan: &Plan, user: u32, mtu: u32, joins: bool) -> Result<(), NetworkError> {
    if links.get(&plan.tap).await?.is_none() {
        let owner = Some(user).filter(|user| *user != 0);
        links.tap(&plan.tap, TapOptions { owner, ..TapOptions::default() }).await?;
    }
    links.set_mtu(&plan.tap, mtu).await?;
    if joins {
        links.set_master(&plan.tap, Some(&plan.bridge)).await?;
    }
    links.set_up(&plan.tap, true).await?;
    Ok(())
}

/// Name servers and search domains of the node, for guests.
fn resolver() -> (Vec<Ipv4Addr>, Vec<String>) {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let mut servers = Vec::new();
    let mut search = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            // A resolver on the node's own loopback is out of a guest's reach.
            Some("nameserver") => {
                servers.extend(words.next().and_then(|w| w.parse::<Ipv4Addr>().ok()).filter(|a| !a.is_loopback()))
            }
            Some("search") => search = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    (servers, search)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn vmi(interfaces: serde_json::Value, networks: serde_json::Value) -> VirtualMachineInstance {
        serde_json::from_value(json!({
            "metadata": { "name": "vm", "namespace": "default", "uid": "u" },
            "spec": { "domain": { "devices": { "interfaces": interfaces } }, "networks": networks },
        }))
        .unwrap()
    }

    #[test]
    fn masquerade_and_bridge_have_kubevirts_names() {
        let plans = plan(&vmi(
            json!([{ "name": "default", "masquerade": {}, "ports": [{ "port": 80 }, { "port": 53, "protocol": "UDP" }] },
                   { "name": "red", "bridge": {}, "macAddress": "02:00:5e:00:53:01" }]),
            json!([{ "name": "default", "pod": {} }, { "name": "red", "multus": { "networkName": "br-red" } }]),
        ))
        .unwrap();
        assert_eq!(plans[0].bridge, "k6t-eth0");
        assert_eq!(plans[0].tap, "tapeth0");
        assert_eq!(
            plans[0].binding,
            Binding::Masquerade {
                gateway: Ipv4Addr::new(10, 0, 2, 1),
                guest: Ipv4Addr::new(10, 0, 2, 2),
                prefix: 24,
                ports: vec![(Protocol::Tcp, 80), (Protocol::Udp, 53)],
            }
        );
        // sha256("red") begins b1f51a511f1…
        assert_eq!(plans[1].pod_interface, "podb1f51a511f1");
        assert_eq!(plans[1].bridge, "k6t-b1f51a511f1");
        assert_eq!(plans[1].tap, "tapb1f51a511f1");
        assert_eq!(plans[1].mac.to_string(), "02:00:5e:00:53:01");
        assert_eq!(plans[1].binding, Binding::Bridge);
    }

    #[test]
    fn a_mac_that_is_not_given_is_the_same_on_every_node() {
        let one = vmi(json!([{ "name": "default", "masquerade": {} }]), json!([{ "name": "default", "pod": {} }]));
        assert_eq!(plan(&one).unwrap()[0].mac, plan(&one).unwrap()[0].mac);
        let mut other = one.clone();
        other.metadata.name = Some("other".into());
        assert_ne!(plan(&one).unwrap()[0].mac, plan(&other).unwrap()[0].mac);
    }

    #[test]
    fn what_cannot_be_wired_is_named() {
        let pod = json!([{ "name": "default", "pod": {} }]);
        let text = |v: &VirtualMachineInstance| plan(v).unwrap_err().to_string();
        assert!(text(&vmi(json!([{ "name": "red", "bridge": {} }]), pod.clone())).contains("red"));
        let bad = vmi(json!([{ "name": "default", "masquerade": {}, "ports": [{ "port": 70000 }] }]), pod);
        assert!(text(&bad).contains("70000"));
    }

    #[test]
    fn a_guest_may_be_bridged_to_the_pod_network() {
        let bridged = vmi(json!([{ "name": "default", "bridge": {} }]), json!([{ "name": "default", "pod": {} }]));
        let plans = plan(&bridged).unwrap();
        assert!(plans[0].has_pod_address());
        assert_eq!((plans[0].pod_interface.as_str(), plans[0].binding.clone()), ("eth0", Binding::Bridge));
        let address = |gateway| PodAddress { address: Ipv4Addr::new(10, 244, 1, 5), prefix: 24, gateway };
        for kept in [address(None), address(Some(Ipv4Addr::new(10, 244, 1, 1)))] {
            assert_eq!(kept.to_string().parse(), Ok(kept));
        }
        assert_eq!("a bridge".parse::<PodAddress>(), Err(()));
    }

    /// A namespace with a process in it, both gone when dropped.
    struct Scratch {
        name: String,
        child: std::process::Child,
    }

    impl Scratch {
        fn new(what: &str) -> Self {
            let name = format!("gw-handler-test-{what}-{}", std::process::id());
            let namespace = Namespace::create(&name).unwrap();
            let child = namespace.run(|| std::process::Command::new("sleep").arg("600").spawn().unwrap()).unwrap();
            Self { name, child }
        }

        fn namespace(&self) -> Namespace {
            Namespace::open(&self.name).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
            let _ = Namespace::delete(&self.name);
        }
    }

    #[tokio::test]
    async fn a_pod_is_wired_and_wiring_it_again_changes_nothing() {
        let scratch = Scratch::new("wire");
        let namespace = scratch.namespace();
        let links = namespace.links().unwrap();
        for (inside, outside) in [("eth0", "out0"), ("podb1f51a511f1", "out1")] {
            let end = |name| godwit_network::VethEnd { namespace: &namespace, name, mac: None };
            links.veth(&end(inside), &end(outside), Some(1400)).await.unwrap();
        }
        links.add_address("podb1f51a511f1", "192.168.9.9".parse().unwrap(), 24).await.unwrap();
        let vmi = vmi(
            json!([{ "name": "default", "masquerade": {} }, { "name": "red", "bridge": {} }]),
            json!([{ "name": "default", "pod": {} }, { "name": "red", "multus": { "networkName": "br-red" } }]),
        );
        let first = wire(&namespace, 107, &vmi, false).await.unwrap();
        let seen = links.list().await.unwrap();
        // As after a restart of the handler: its servers are gone, the links are there.
        let interfaces = first.interfaces.clone();
        drop(first);
        let second = wire(&namespace, 107, &vmi, false).await.unwrap();
        assert_eq!(second.interfaces, interfaces);
        let shape = |l: &godwit_network::LinkInfo| (l.name.clone(), l.index, l.mac, l.mtu, l.master);
        let again = links.list().await.unwrap();
        assert_eq!(seen.iter().map(shape).collect::<Vec<_>>(), again.iter().map(shape).collect::<Vec<_>>());

        let link = |name: &str| again.iter().find(|l| l.name == name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(link("k6t-eth0").mac, Some(GATEWAY_MAC));
        assert_eq!(link("tapeth0").master, Some(link("k6t-eth0").index));
        assert_eq!(link("eth0").master, None);
        assert_eq!(link("podb1f51a511f1").master, Some(link("k6t-b1f51a511f1").index));
        assert_eq!(link("tapb1f51a511f1").master, Some(link("k6t-b1f51a511f1").index));
        assert_eq!(link("tapb1f51a511f1").mtu, 1400);
        let gateway = links.addresses("k6t-eth0").await.unwrap();
        assert!(gateway.contains(&("10.0.2.1".parse().unwrap(), 24)), "{gateway:?}");
        let moved = links.addresses("podb1f51a511f1").await.unwrap();
        assert!(!moved.iter().any(|(a, _)| a.is_ipv4()), "the segment is the guest's: {moved:?}");

        let mut gone = vmi.clone();
        gone.spec.networks[1].name = "blue".into();
        gone.spec.domain.devices.interfaces[1].name = "blue".into();
        let here = Namespace::current().unwrap();
        let error = wire(&here, 107, &vmi, false).await.err().unwrap().to_string();
        assert!(error.contains("the node's"), "{error}");
        let error = wire(&namespace, 107, &gone, false).await.err().unwrap().to_string();
        assert!(error.contains("blue") && error.contains("is its network attached"), "{error}");
    }

    #[tokio::test]
    async fn a_pods_address_is_kept_for_its_guest_also_by_the_next_handler() {
        let scratch = Scratch::new("lease");
        let namespace = scratch.namespace();
        let links = namespace.links().unwrap();
        let end = |name| godwit_network::VethEnd { namespace: &namespace, name, mac: None };
        links.veth(&end("eth0"), &end("out0"), Some(1400)).await.unwrap();
        links.add_address("eth0", "10.244.1.5".parse().unwrap(), 24).await.unwrap();
        let gateway = Some(Ipv4Addr::new(10, 244, 1, 1));
        let default = godwit_network::Route { destination: (Ipv4Addr::UNSPECIFIED, 0), gateway, link: None };
        links.set_route(&default).await.unwrap();
        let vmi = vmi(json!([{ "name": "default", "bridge": {} }]), json!([{ "name": "default", "pod": {} }]));
        let plan = plan(&vmi).unwrap().remove(0);
        for awaited in [true, false] {
            let wired = wire(&namespace, 107, &vmi, awaited).await.unwrap();
            assert_eq!(wired._servers.len(), 1);
            let kept = kept_pod_address(&links, &plan).await.unwrap().unwrap();
            assert_eq!(kept, PodAddress { address: Ipv4Addr::new(10, 244, 1, 5), prefix: 24, gateway });
            let left = links.addresses("eth0").await.unwrap();
            assert!(!left.iter().any(|(a, _)| a.is_ipv4()), "it is the guest's: {left:?}");
            // A guest that is yet to come hears nothing.
            assert_eq!(links.get("tapeth0").await.unwrap().unwrap().master.is_none(), awaited);
        }
    }
}
