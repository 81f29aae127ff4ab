//! The cluster's underlay: one switch namespace with a bridge, one namespace a node, one for an outside client, each on
//! the bridge with one veth; and where the cluster has a network for migrations, a second bridge with the nodes on it. Nothing of it
//! touches the root namespace's links.

use crate::Error;
use crate::layout::{CLIENT_ADDRESS, CONTROL_PLANE_ADDRESS, Cluster, FABRIC_PREFIX};
use godwit_network::{Links, Namespace, VethEnd};
use std::net::{IpAddr, Ipv4Addr};

/// Name of the bridge in the switch's namespace.
const BRIDGE: &str = "fabric";
/// Name of the link to it in every other namespace.
pub const UPLINK: &str = "eth0";
/// Name of the bridge of the network for migrations, in clusters that have one.
const MIGRATION_BRIDGE: &str = "migrations";
/// Name of the nodes' links to that.
pub const MIGRATIONS: &str = "eth1";
/// Large, so that an overlay with full Ethernet frames fits in and memory streams are carried in few packets.
const MTU: u32 = 9000;

/// Name of the switch's namespace.
pub fn switch(cluster: &Cluster) -> String {
    cluster.namespace("fabric")
}

/// Name of the outside client's namespace.
pub fn client(cluster: &Cluster) -> String {
    cluster.namespace("client")
}

/// Makes what is missing of the fabric.
///
/// # Errors
/// No permission, or links in the way.
pub async fn ensure(cluster: &Cluster) -> Result<(), Error> {
    let (namespace, _) = Namespace::open_or_create(&switch(cluster))?;
    let links = namespace.links()?;
    links.ensure_bridge(BRIDGE).await?;
    links.set_mtu(BRIDGE, MTU).await?;
    ensure_address(&links, BRIDGE, CONTROL_PLANE_ADDRESS).await?;
    if cluster.migration_network {
        links.ensure_bridge(MIGRATION_BRIDGE).await?;
        links.set_mtu(MIGRATION_BRIDGE, MTU).await?;
    }
    for (index, node) in cluster.nodes.iter().enumerate() {
        let number = u8::try_from(index + 1).map_err(|_| Error::Usage("too many nodes".to_owned()))?;
        let namespace = cluster.namespace(node);
        let own = Cluster::node_address(number);
        ensure_host(&links, &namespace, Plug { port: node, bridge: BRIDGE, link: UPLINK, address: own }).await?;
        if cluster.migration_network {
            let (port, address) = (migration_port(node), Cluster::migration_address(number));
            let plug = Plug { port: &port, bridge: MIGRATION_BRIDGE, link: MIGRATIONS, address };
            ensure_host(&links, &namespace, plug).await?;
        }
    }
    let plug = Plug { port: "client", bridge: BRIDGE, link: UPLINK, address: CLIENT_ADDRESS };
    ensure_host(&links, &client(cluster), plug).await
}

/// Name of the port of a node's link for migrations, in the switch's namespace; that of its uplink has the node's name.
pub fn migration_port(node: &str) -> String {
    format!("{node}-m")
}

/// A link from a namespace into the switch.
struct Plug<'a> {
    /// Its end in the switch, and the bridge there.
    port: &'a str,
    bridge: &'a str,
    /// Its other end, and that one's address.
    link: &'a str,
    address: Ipv4Addr,
}

async fn ensure_host(switch: &Links, name: &str, plug: Plug<'_>) -> Result<(), Error> {
    let (namespace, _) = Namespace::open_or_create(name)?;
    let links = namespace.links()?;
    if links.get(plug.link).await?.is_none() {
        // A port without its other end is left over from a namespace that went away.
        switch.delete(plug.port).await?;
        let inside = VethEnd { namespace: &namespace, name: plug.link, mac: None };
        let outside = VethEnd { namespace: switch.namespace(), name: plug.port, mac: None };
        switch.veth(&outside, &inside, Some(MTU)).await?;
    }
    switch.set_master(plug.port, Some(plug.bridge)).await?;
    ensure_address(&links, plug.link, plug.address).await
}

async fn ensure_address(links: &Links, link: &str, address: Ipv4Addr) -> Result<(), Error> {
    let address = IpAddr::V4(address);
    if links.addresses(link).await?.contains(&(address, FABRIC_PREFIX)) {
        return Ok(());
    }
    Ok(links.add_address(link, address, FABRIC_PREFIX).await?)
}
