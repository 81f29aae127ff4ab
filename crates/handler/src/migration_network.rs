//! The interface that migrations go over, where the node has one of its own for them.
//!
//! Which one it is is said when the handler is started; whether it can be used is looked at each time that a target begins to listen or
//! a source dials. While it cannot be, migrations go over the node's own network, as KubeVirt's do. What was found is told on the Node
//! ([`MigrationNetwork`]), by which the controllers know whether both ends of a migration have it.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use godwit_api::MigrationNetwork;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;

use crate::heartbeat::Offer;

/// Between two looks at the interface, for what is told of it. A migration takes its own look.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// What a handler is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationInterface {
    /// Its name; it may come and go.
    pub interface: String,
    /// The NetworkAttachmentDefinition that it is of, as `NAMESPACE/NAME`, to be told.
    pub network: Option<String>,
}

/// Where connections of migrations begin and end on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    node_ip: IpAddr,
    own: Option<MigrationInterface>,
}

/// A link of this machine as `getifaddrs(3)` tells of it: once, and once for each of its addresses.
struct Seen {
    name: String,
    /// It is up, and so is what is at its other end.
    carries: bool,
    address: Option<IpAddr>,
}

impl Underlay {
    /// On a node of this address, with this interface for migrations.
    #[must_use]
    pub fn new(node_ip: IpAddr, own: Option<MigrationInterface>) -> Self {
        Self { node_ip, own }
    }

    /// Where a target is to listen, and whether that is on the interface for migrations. It is only if it `may` be, since the source has to
    /// have one, too.
    pub(crate) fn to_listen(&self, may: bool) -> (IpAddr, bool) {
        let Some(own) = self.own.as_ref().filter(|_| may) else { return (self.node_ip, false) };
        match self.find(own) {
            Ok(address) => (address, true),
            Err(problem) => {
                tracing::warn!(problem, "this migration goes over the node's own network");
                (self.node_ip, false)
            }
        }
    }

    /// Connects to a target that listens on its interface for migrations, from this node's where there is one.
    pub(crate) async fn connect(&self, to: (IpAddr, u16)) -> io::Result<TcpStream> {
        let socket = if to.0.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        let from = self.own.as_ref().and_then(|own| self.find(own).ok());
        if let Some(from) = from.filter(|from| from.is_ipv4() == to.0.is_ipv4()) {
            socket.bind((from, 0).into())?;
        }
        socket.connect(to.into()).await
    }

    /// Whether memory and disks may go in the clear, where that is wished. Whoever has a network for migrations may count on it to be
    /// closed; the nodes' own was not meant.
    pub(crate) fn may_be_plain(&self, over_own_network: bool) -> bool {
        over_own_network || self.own.is_none()
    }

    /// Whether it can be used now.
    pub(crate) fn is_there(&self) -> bool {
        self.own.as_ref().is_some_and(|own| self.find(own).is_ok())
    }

    /// What the Node says of it.
    pub(crate) fn told(&self) -> Option<MigrationNetwork> {
        let own = self.own.as_ref()?;
        let found = self.find(own);
        let MigrationInterface { interface, network } = own.clone();
        Some(MigrationNetwork { interface, network, address: found.as_ref().ok().copied(), problem: found.err() })
    }

    /// Tells what becomes of it, for ever.
    pub(crate) async fn follow(self, offer: watch::Sender<Offer>) {
        let mut before = None;
        loop {
            let Some(now) = self.told() else { return };
            if before.as_ref() != Some(&now) {
                let interface = &now.interface;
                match (now.address, &now.problem) {
                    (Some(address), _) => tracing::info!(interface, %address, "migrations go over this interface"),
                    (None, problem) => {
                        tracing::warn!(
                            interface,
                            problem,
                            "migrations go over the node's own network until it is there"
                        );
                    }
                }
                offer.send_if_modified(|offer| {
                    let told = offer.migration_network.replace(now.clone());
                    told.as_ref() != Some(&now)
                });
                before = Some(now);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    fn find(&self, own: &MigrationInterface) -> Result<IpAddr, String> {
        let seen = look().map_err(|error| format!("the node's interfaces cannot be listed: {error}"))?;
        choose(&own.interface, &seen, self.node_ip)
    }
}

fn look() -> nix::Result<Vec<Seen>> {
    let works = InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING;
    let links = getifaddrs()?.map(|link| {
        let address = link.address.as_ref().and_then(|address| {
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        });
        Seen { name: link.interface_name, carries: link.flags.contains(works), address }
    });
    Ok(links.collect())
}

/// The interface's address that others reach, of the node's own family if it has one; or what is in the way.
fn choose(interface: &str, seen: &[Seen], node_ip: IpAddr) -> Result<IpAddr, String> {
    let of_it = || seen.iter().filter(|seen| seen.name == interface);
    if of_it().next().is_none() {
        return Err(format!("there is no interface {interface}"));
    }
    if of_it().any(|seen| !seen.carries) {
        return Err(format!("interface {interface} is down"));
    }
    // One that counts on its link alone would have to be told with the link's number at the other end.
    let reached = |address: &IpAddr| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let mut addresses: Vec<IpAddr> = of_it().filter_map(|seen| seen.address).filter(reached).collect();
    addresses.sort_by_key(|address| address.is_ipv4() != node_ip.is_ipv4());
    addresses.first().copied().ok_or_else(|| format!("interface {interface} has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_network::{Namespace, VethEnd};

    #[test]
    fn what_was_to_be_plain_in_a_network_of_its_own_is_not_in_the_nodes() {
        let interface = MigrationInterface { interface: "eth1".to_owned(), network: None };
        let both = Underlay::new(ip("10.88.0.11"), Some(interface));
        assert_eq!((both.may_be_plain(true), both.may_be_plain(false)), (true, false));
        assert!(Underlay::new(ip("10.88.0.11"), None).may_be_plain(false));
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_address_is_one_that_others_reach_and_of_the_nodes_family_if_there_is_one() {
        let seen =
            |name: &str, carries, address: Option<&str>| Seen { name: name.into(), carries, address: address.map(ip) };
        let (four, six) = (ip("10.0.0.1"), ip("fd00::1"));
        let both = [
            seen("eth0", true, Some("10.0.0.1")),
            seen("eth1", true, None),
            seen("eth1", true, Some("fe80::1")),
            seen("eth1", true, Some("fd00::9")),
            seen("eth1", true, Some("10.99.0.1")),
            seen("eth1", true, Some("10.99.0.2")),
        ];
        assert_eq!(choose("eth1", &both, four), Ok(ip("10.99.0.1")));
        assert_eq!(choose("eth1", &both, six), Ok(ip("fd00::9")));
        assert_eq!(choose("eth1", &both[..4], four), Ok(ip("fd00::9")));
        assert_eq!(choose("eth1", &both[..3], four).unwrap_err(), "interface eth1 has no address");
        assert_eq!(choose("eth1", &both[..1], four).unwrap_err(), "there is no interface eth1");
        let down = [seen("eth1", false, None), seen("eth1", false, Some("10.99.0.1"))];
        assert_eq!(choose("eth1", &down, four).unwrap_err(), "interface eth1 is down");
    }

    /// A node in a namespace of its own.
    struct Node {
        name: String,
        namespace: Namespace,
    }

    impl Node {
        fn new(what: &str) -> Self {
            let name = format!("gw-mn-{}-{what}", std::process::id());
            let (namespace, _) = Namespace::open_or_create(&name).unwrap();
            Self { name, namespace }
        }
    }

    impl Drop for Node {
        fn drop(&mut self) {
            let _ = Namespace::delete(&self.name);
        }
    }

    #[tokio::test]
    async fn what_is_told_and_used_is_how_the_interface_is_now() {
        let (node, other) = (Node::new("a"), Node::new("b"));
        let own = MigrationInterface { interface: "eth1".into(), network: Some("kubevirt/fast".into()) };
        let underlay = Underlay::new(ip("127.0.0.1"), Some(own));
        let now = || node.namespace.run(|| (underlay.told().unwrap(), underlay.to_listen(true))).unwrap();
        let away = |problem: &str| {
            let (told, listens) = now();
            assert_eq!((told.address, told.problem.as_deref()), (None, Some(problem)));
            assert_eq!(listens, (ip("127.0.0.1"), false));
        };
        away("there is no interface eth1");
        let (links, others) = (node.namespace.links().unwrap(), other.namespace.links().unwrap());
        let one = VethEnd { namespace: &node.namespace, name: "eth1", mac: None };
        let peer = VethEnd { namespace: &other.namespace, name: "eth1", mac: None };
        links.veth(&one, &peer, None).await.unwrap();
        away("interface eth1 has no address");
        links.add_address("eth1", ip("10.99.0.1"), 24).await.unwrap();
        let (told, listens) = now();
        assert_eq!(
            (told.network.as_deref(), told.address, told.problem),
            (Some("kubevirt/fast"), Some(ip("10.99.0.1")), None)
        );
        assert_eq!(listens, (ip("10.99.0.1"), true));
        assert_eq!(
            node.namespace.run(|| underlay.to_listen(false)).unwrap(),
            (ip("127.0.0.1"), false),
            "its source has none"
        );
        // The cable is pulled at the other end, and put in again. The kernel may take a second to tell.
        for (up, wanted) in [(false, (ip("127.0.0.1"), false)), (true, (ip("10.99.0.1"), true))] {
            others.set_up("eth1", up).await.unwrap();
            let deadline = std::time::Instant::now() + Duration::from_secs(60);
            while now().1 != wanted {
                assert!(std::time::Instant::now() < deadline, "{:?}", now());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert_eq!(now().0.problem.as_deref(), (!up).then_some("interface eth1 is down"));
        }
        links.delete("eth1").await.unwrap();
        away("there is no interface eth1");
    }

    #[tokio::test]
    async fn who_has_no_such_interface_tells_nothing_and_dials_as_ever() {
        let underlay = Underlay::new(ip("127.0.0.1"), None);
        assert_eq!((underlay.told(), underlay.to_listen(true)), (None, (ip("127.0.0.1"), false)));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        underlay.connect((ip("127.0.0.1"), port)).await.unwrap();
    }

    #[tokio::test]
    async fn connections_leave_from_the_interface() {
        // All of 127.0.0.0/8 is this machine's; what `lo` has is 127.0.0.1.
        let own = MigrationInterface { interface: "lo".into(), network: None };
        let underlay = Underlay::new(ip("127.0.0.9"), Some(own));
        let listener = tokio::net::TcpListener::bind("127.0.0.9:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connection = underlay.connect((ip("127.0.0.9"), port)).await.unwrap();
        assert_eq!(connection.local_addr().unwrap().ip(), ip("127.0.0.1"));
    }
}
