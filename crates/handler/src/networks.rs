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
    let bridged_pod = vmi.annotation(godwit_api::names::ANNOTATION_ALLOW_POD_BRIDGE_MIGRATION).is_some();
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
            let pod_interface = if on_pod { "eth0".to_owned() } else { godwit_api::pod_interface_name(name) };
            let suffix = pod_interface.strip_prefix("pod").unwrap_or(&pod_interface).to_owned();
            let binding = match (&interface.masquerade, &interface.bridge) {
                (Some(_), Some(_)) => {
                    return Err(NetworkError::Spec(format!("interface {name} has two bindings: choose one")));
                }
                (None, Some(_)) if on_pod && !bridged_pod => {
                    return Err(NetworkError::Spec(format!(
                        "interface {name}: bridge binding on the pod network cannot be migrated; use masquerade, or \
                         annotate the VMI with {}",
                        godwit_api::names::ANNOTATION_ALLOW_POD_BRIDGE_MIGRATION
                    )));
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

/// Sets up what is missing in the network namespace of process `pid`; what is there already is left as it is. The taps of a guest
/// that is yet to come (`awaited`) hear nothing of their segments until they [`join`]: what is said there meanwhile is for
/// the guest where it is, and would fill the queues that the last moments of its move need.
///
/// # Errors
/// What could not be done, to which link.
pub async fn wire(pid: u32, vmi: &VirtualMachineInstance, awaited: bool) -> Result<Wired, NetworkError> {
    let plans = plan(vmi)?;
    let namespace = Namespace::of_pid(pid)?;
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
                let applied = tokio::task::spawn_blocking(move || {
                    let mut nat = Masquerade::new(&interface, &bridge);
                    nat.gateway = gateway;
                    nat.guest = guest;
                    nat.ports = ports;
                    nat.apply(&Namespace::of_pid(pid)?)
                });
                applied
                    .await
                    .map_err(|e| NetworkError::Spec(format!("setting up address translation broke off: {e}")))??;
            }
            Binding::Bridge => {
                for (address, _) in links.addresses(&plan.pod_interface).await? {
                    links.delete_address(&plan.pod_interface, address).await?;
                }
                links.set_master(&plan.pod_interface, Some(&plan.bridge)).await?;
                links.set_up(&plan.pod_interface, true).await?;
            }
        }
        let joins = !(awaited && plan.binding == Binding::Bridge);
        tap(&links, &plan, below.mtu, joins).await?;
        if let Binding::Masquerade { gateway, guest, prefix, .. } = &plan.binding {
            let (dns, search) = resolver();
            let lease = Lease {
                mac: plan.mac,
                address: *guest,
                prefix: *prefix,
                server: *gateway,
                router: Some(*gateway),
                dns,
                search,
                hostname: vmi.spec.hostname.clone().or_else(|| vmi.metadata.name.clone()),
                mtu: u16::try_from(below.mtu).ok(),
            };
            wired._servers.push(Server::start(&namespace, &plan.bridge, lease).await?);
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

async fn tap(links: &Links, plan: &Plan, mtu: u32, joins: bool) -> Result<(), NetworkError> {
    if links.get(&plan.tap).await?.is_none() {
        links.tap(&plan.tap, TapOptions::default()).await?;
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
        let bridged = vmi(json!([{ "name": "default", "bridge": {} }]), pod.clone());
        assert!(text(&bridged).contains("use masquerade"));
        let mut allowed = bridged.clone();
        allowed.metadata.annotations =
            Some([(godwit_api::names::ANNOTATION_ALLOW_POD_BRIDGE_MIGRATION.to_owned(), String::new())].into());
        assert_eq!(plan(&allowed).unwrap()[0].binding, Binding::Bridge);
        assert!(text(&vmi(json!([{ "name": "red", "bridge": {} }]), pod.clone())).contains("red"));
        let bad = vmi(json!([{ "name": "default", "masquerade": {}, "ports": [{ "port": 70000 }] }]), pod);
        assert!(text(&bad).contains("70000"));
    }

    /// A namespace with a process in it, both gone when dropped.
    struct Scratch {
        name: String,
        child: std::process::Child,
    }

    impl Scratch {
        fn new() -> Self {
            let name = format!("gw-handler-test-{}", std::process::id());
            let namespace = Namespace::create(&name).unwrap();
            let child = namespace.run(|| std::process::Command::new("sleep").arg("600").spawn().unwrap()).unwrap();
            Self { name, child }
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
        let scratch = Scratch::new();
        let namespace = Namespace::open(&scratch.name).unwrap();
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
        let first = wire(scratch.child.id(), &vmi, false).await.unwrap();
        let seen = links.list().await.unwrap();
        // As after a restart of the handler: its servers are gone, the links are there.
        let interfaces = first.interfaces.clone();
        drop(first);
        let second = wire(scratch.child.id(), &vmi, false).await.unwrap();
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
        let error = wire(scratch.child.id(), &gone, false).await.err().unwrap().to_string();
        assert!(error.contains("blue") && error.contains("is its network attached"), "{error}");
    }
}
