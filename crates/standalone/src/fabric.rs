//! The cluster's underlay: one switch namespace with a bridge, one namespace a node, one for an outside client, each on
//! the bridge with one veth. Nothing of it touches the root namespace's links.

use crate::Error;
use crate::layout::{CLIENT_ADDRESS, CONTROL_PLANE_ADDRESS, Cluster, FABRIC_PREFIX};
use godwit_network::{Links, Namespace, VethEnd};
use std::net::{IpAddr, Ipv4Addr};

/// Name of the bridge in the switch's namespace.
const BRIDGE: &str = "fabric";
/// Name of the one link in every other namespace.
pub const UPLINK: &str = "eth0";
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
    for (index, node) in cluster.nodes.iter().enumerate() {
        let number = u8::try_from(index + 1).map_err(|_| Error::Usage("too many nodes".to_owned()))?;
        ensure_host(&links, &cluster.namespace(node), node, Cluster::node_address(number)).await?;
    }
    ensure_host(&links, &client(cluster), "client", CLIENT_ADDRESS).await
}

async fn ensure_host(switch: &Links, name: &str, port: &str, address: Ipv4Addr) -> Result<(), Error> {
    let (namespace, _) = Namespace::open_or_create(name)?;
    let links = namespace.links()?;
    if links.get(UPLINK).await?.is_none() {
        // A port without its other end is left over from a namespace that went away.
        switch.delete(port).await?;
        let inside = VethEnd { namespace: &namespace, name: UPLINK, mac: None };
        let outside = VethEnd { namespace: switch.namespace(), name: port, mac: None };
        switch.veth(&outside, &inside, Some(MTU)).await?;
    }
    switch.set_master(port, Some(BRIDGE)).await?;
    ensure_address(&links, UPLINK, address).await
}

async fn ensure_address(links: &Links, link: &str, address: Ipv4Addr) -> Result<(), Error> {
    let address = IpAddr::V4(address);
    if links.addresses(link).await?.contains(&(address, FABRIC_PREFIX)) {
        return Ok(());
    }
    Ok(links.add_address(link, address, FABRIC_PREFIX).await?)
}
