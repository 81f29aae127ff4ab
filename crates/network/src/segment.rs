//! One L2 segment over many namespaces: a bridge of the same name in each, joined by VXLAN over the namespaces' uplinks.
//!
//! Everything about a segment follows from its bridge's name, so that nodes (and the outside client) join it without asking
//! anybody: VNI = first 24 bits of the name's SHA-256, multicast group 239.88.x.y from the next two bytes.

use crate::{Links, Result, VxlanOptions};
use sha2::{Digest, Sha256};
use std::net::Ipv4Addr;

/// VXLAN's UDP port (RFC 7348).
const PORT: u16 = 4789;
/// What guests expect of Ethernet; the uplink must carry 50 bytes more.
const MTU: u32 = 1500;

/// The parameters that follow from a segment's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Name of the VXLAN link: `vx-<bridge>`, cut to what the kernel takes.
    pub link: String,
    /// VXLAN network identifier, 24 bits, never 0.
    pub vni: u32,
    /// Where frames for unknown stations go.
    pub group: Ipv4Addr,
}

impl Segment {
    /// The segment of the bridge called `bridge`.
    pub fn of(bridge: &str) -> Self {
        let digest = Sha256::digest(bridge.as_bytes());
        let byte = |index: usize| digest.get(index).copied().unwrap_or_default();
        let vni = u32::from_be_bytes([0, byte(0), byte(1), byte(2)]).max(1);
        let link = format!("vx-{bridge}");
        // 15 characters is the kernel's limit; a cut name is made unique by the VNI.
        let link = if link.len() <= 15 { link } else { format!("vx-{vni:06x}") };
        Self { link, vni, group: Ipv4Addr::new(239, 88, byte(3), byte(4)) }
    }
}

/// Makes the bridge `bridge` in the namespace of `links`, joined to its peers over `uplink`. Harmless when it is there.
///
/// # Errors
/// Links of those names that are something else, or no permission.
pub async fn ensure(links: &Links, bridge: &str, uplink: &str) -> Result<()> {
    let segment = Segment::of(bridge);
    links.ensure_bridge(bridge).await?;
    if links.get(&segment.link).await?.is_none() {
        let options =
            VxlanOptions { vni: segment.vni, device: uplink, group: Some(segment.group), local: None, port: PORT };
        links.vxlan(&segment.link, &options, Some(MTU)).await?;
    }
    links.set_master(&segment.link, Some(bridge)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_give_distinct_segments_that_the_kernel_takes() {
        let (one, two) = (Segment::of("br-lab"), Segment::of("br-lab2"));
        assert_ne!(one.vni, two.vni);
        assert_eq!(one, Segment::of("br-lab"));
        assert!(one.group.is_multicast());
        assert!(Segment::of("a-bridge-with-a-name").link.len() <= 15);
    }
}
