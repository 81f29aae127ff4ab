//! Address translation between a pod's address and the one guest behind it (KubeVirt's `masquerade` binding).

use std::collections::BTreeSet;
use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use crate::{Error, Namespace, Result};

/// Transport protocols that can be forwarded to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// The masquerade binding of one guest interface.
#[derive(Clone, Debug)]
pub struct Masquerade<'a> {
    /// The pod's interface, such as `eth0`.
    pub interface: &'a str,
    /// The bridge to the guest, such as `k6t-eth0`.
    pub bridge: &'a str,
    /// Our address on the bridge: the guest's gateway (KubeVirt: 10.0.2.1).
    pub gateway: Ipv4Addr,
    /// The guest's address (KubeVirt: 10.0.2.2).
    pub guest: Ipv4Addr,
    /// Ports of the pod's address that lead to the guest; all (and ICMP) when empty.
    pub ports: BTreeSet<(Protocol, u16)>,
    /// TCP ports that stay the pod's own in any case.
    pub reserved: BTreeSet<u16>,
}

impl<'a> Masquerade<'a> {
    /// KubeVirt's addresses: gateway 10.0.2.1, guest 10.0.2.2; every port leads to the guest.
    pub fn new(interface: &'a str, bridge: &'a str) -> Self {
        Self {
            interface,
            bridge,
            gateway: Ipv4Addr::new(10, 0, 2, 1),
            guest: Ipv4Addr::new(10, 0, 2, 2),
            ports: BTreeSet::new(),
            reserved: BTreeSet::new(),
        }
    }

    /// The rules as `nft -f` reads them. The table is replaced as a whole, so that setting it twice is the same as once.
    fn rules(&self) -> String {
        let Self { interface, bridge, gateway, guest, .. } = self;
        // nft takes no quoted table names; what is no letter or digit becomes its code.
        let table: String = interface
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c.to_string() } else { format!("_{:x}", u32::from(c)) })
            .collect();
        let mut inbound = String::new();
        for port in &self.reserved {
            inbound += &format!("    tcp dport {port} return\n");
        }
        if self.ports.is_empty() {
            inbound += &format!("    dnat to {guest}\n");
        }
        for (protocol, port) in &self.ports {
            let protocol = match protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            };
            inbound += &format!("    {protocol} dport {port} dnat to {guest}\n");
        }
        format!(
            r#"table ip godwit_{table} {{}}
delete table ip godwit_{table}
table ip godwit_{table} {{
  chain inbound {{
{inbound}  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "{interface}" jump inbound
  }}
  chain output {{
    type nat hook output priority -100; policy accept;
    ip daddr 127.0.0.1 jump inbound
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {guest} oifname "{interface}" masquerade
    oifname "{bridge}" ip saddr 127.0.0.1 snat to {gateway}
  }}
}}
"#
        )
    }

    /// Puts the rules into force in a pod's namespace and lets it forward packets.
    ///
    /// # Errors
    /// [`Error::Nft`]; [`Error::Io`] when nft is not installed.
    pub fn apply(&self, namespace: &Namespace) -> Result<()> {
        for name in [self.interface, self.bridge] {
            crate::links::check(name)?;
            if name.contains(['"', '\\', '*']) {
                return Err(Error::Invalid(format!("link name {name:?} cannot be written in nft's rules")));
            }
        }
        // route_localnet: connections to 127.0.0.1 in the pod may be led to the guest, as in KubeVirt.
        namespace.sysctls(&[("net.ipv4.ip_forward", "1"), ("net/ipv4/conf/all/route_localnet", "1")])?;
        nft(namespace, &self.rules())
    }
}

/// Runs `nft -f -` inside a namespace; all of the rules or none take effect.
///
/// # Errors
/// [`Error::Nft`] with what nft said; [`Error::Io`] when it is not installed.
pub fn nft(namespace: &Namespace, rules: &str) -> Result<()> {
    // /usr/sbin is not in every service's PATH.
    let program =
        ["/usr/sbin/nft", "/sbin/nft"].into_iter().find(|p| std::path::Path::new(p).exists()).unwrap_or("nft");
    let output = namespace.run(|| {
        let mut child = Command::new(program)
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // A broken pipe shows in the exit status, with nft's own words.
            let _ = stdin.write_all(rules.as_bytes());
        }
        child.wait_with_output()
    })?;
    let output = output.map_err(|e| Error::io(format!("run {program} (Debian package nftables)"), e))?;
    if output.status.success() {
        Ok(())
    } else {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Error::Nft { namespace: namespace.label().into(), message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declared_ports_only_lead_to_the_guest() {
        let mut nat = Masquerade::new("eth0", "k6t-eth0");
        assert!(nat.rules().contains("    dnat to 10.0.2.2\n"));
        nat.ports.insert((Protocol::Udp, 53));
        nat.reserved.insert(49152);
        let rules = nat.rules();
        assert!(!rules.contains("    dnat to 10.0.2.2\n"));
        assert!(rules.contains("udp dport 53 dnat to 10.0.2.2"));
        assert!(rules.contains("tcp dport 49152 return"));
    }
}
