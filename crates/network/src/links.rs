//! Links, addresses, routes and forwarding entries of one namespace, by name.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd};

use futures::TryStreamExt;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo as InfoAttribute, LinkMessage,
};
use rtnetlink::packet_route::neighbour::NeighbourFlags;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVxlan, RouteMessageBuilder};

use crate::{Error, Mac, Namespace, Result, TapOptions, tap};

/// One end of a veth pair.
#[derive(Clone, Debug)]
pub struct VethEnd<'a> {
    /// The namespace the end is to be in.
    pub namespace: &'a Namespace,
    /// Its name there, at most 15 bytes.
    pub name: &'a str,
    /// Ethernet address; the kernel makes one up if absent.
    pub mac: Option<Mac>,
}

/// How a VXLAN link finds its peers.
#[derive(Clone, Debug)]
pub struct VxlanOptions<'a> {
    /// Network identifier, 24 bits.
    pub vni: u32,
    /// The link that carries the packets.
    pub device: &'a str,
    /// Multicast group to which frames for unknown stations and broadcasts go; with none, add entries with
    /// [`Links::set_forwarding`].
    pub group: Option<Ipv4Addr>,
    /// Source address of the packets.
    pub local: Option<Ipv4Addr>,
    /// UDP port, 4789 by RFC 7348.
    pub port: u16,
}

/// A route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route<'a> {
    /// Destination network; `0.0.0.0/0` is the default route.
    pub destination: (Ipv4Addr, u8),
    /// Next hop; none for a network that is directly on the link.
    pub gateway: Option<Ipv4Addr>,
    /// Outgoing link; may be left to the kernel when there is a gateway.
    pub link: Option<&'a str>,
}

/// What is known of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Name.
    pub name: String,
    /// Number in its namespace.
    pub index: u32,
    /// Ethernet address, for links that have one.
    pub mac: Option<Mac>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Whether it is set up (administratively).
    pub up: bool,
    /// Number of the bridge it is a port of.
    pub master: Option<u32>,
    /// `bridge`, `veth`, `tun`, `vxlan`; none for loopback and hardware.
    pub kind: Option<String>,
    /// A note that was left with it ([`Links::set_alias`]).
    pub alias: Option<String>,
}

/// A netlink connection into one namespace. Cheap to clone; its socket closes with the last clone.
#[derive(Clone, Debug)]
pub struct Links {
    namespace: Namespace,
    handle: Handle,
}

impl Links {
    pub(crate) fn open(namespace: &Namespace) -> Result<Self> {
        let runtime = tokio::runtime::Handle::try_current()
            .map_err(|_| Error::Invalid("a netlink connection needs a tokio runtime".into()))?;
        let (connection, handle, _) = namespace
            .run(|| {
                let _inside = runtime.enter();
                rtnetlink::new_connection()
            })?
            .map_err(|e| Error::io(format!("open netlink in namespace {}", namespace.label()), e))?;
        tokio::spawn(connection);
        Ok(Self { namespace: namespace.clone(), handle })
    }

    /// The namespace it works in.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    fn failed(&self, what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
        let (what, namespace) = (what.into(), self.namespace.label().to_owned());
        move |source| Error::Netlink { what, namespace, source }
    }

    /// All links, by number.
    ///
    /// # Errors
    /// [`Error::Netlink`].
    pub async fn list(&self) -> Result<Vec<LinkInfo>> {
        let mut links: Vec<LinkInfo> = self
            .handle
            .link()
            .get()
            .execute()
            .map_ok(|message| info(&message))
            .try_collect()
            .await
            .map_err(self.failed("list links"))?;
        links.sort_by_key(|link| link.index);
        Ok(links)
    }

    /// One link, or `None` when it is not there.
    ///
    /// # Errors
    /// [`Error::Netlink`].
    pub async fn get(&self, name: &str) -> Result<Option<LinkInfo>> {
        check(name)?;
        let answer = self.handle.link().get().match_name(name).execute().try_next().await;
        match answer {
            Ok(message) => Ok(message.map(|message| info(&message))),
            Err(source) => {
                let error = self.failed(format!("look at link {name}"))(source);
                if error.is_missing() { Ok(None) } else { Err(error) }
            }
        }
    }

    async fn index(&self, name: &str) -> Result<u32> {
        self.get(name)
            .await?
            .map(|link| link.index)
            .ok_or_else(|| Error::NoLink { link: name.into(), namespace: self.namespace.label().into() })
    }

    async fn add(&self, name: &str, message: LinkMessage) -> Result<()> {
        self.handle.link().add(message).execute().await.map_err(self.failed(format!("make link {name}")))
    }

    async fn set(&self, name: &str, what: &str, builder: LinkMessageBuilder<LinkUnspec>) -> Result<()> {
        let message = builder.index(self.index(name).await?).build();
        self.handle.link().set(message).execute().await.map_err(self.failed(format!("{what} link {name}")))
    }

    /// Makes a pair of connected links, both up, with the same MTU. Either end may be in any namespace.
    ///
    /// # Errors
    /// `EEXIST` (see [`Error::is_exists`]) when one of the names is taken.
    pub async fn veth(&self, one: &VethEnd<'_>, other: &VethEnd<'_>, mtu: Option<u32>) -> Result<()> {
        check(one.name)?;
        check(other.name)?;
        let end = |end: &VethEnd<'_>| {
            let mut builder =
                LinkMessageBuilder::<LinkUnspec>::new().name(end.name).setns_by_fd(end.namespace.as_fd().as_raw_fd());
            if let Some(mac) = end.mac {
                builder = builder.address(mac.0.to_vec());
            }
            if let Some(mtu) = mtu {
                builder = builder.mtu(mtu);
            }
            builder
        };
        let mut message = end(one).up().build();
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            InfoAttribute::Kind(InfoKind::Veth),
            InfoAttribute::Data(InfoData::Veth(InfoVeth::Peer(end(other).build()))),
        ]));
        self.add(one.name, message).await?;
        // The kernel cannot open the second end while it makes it: it has no peer yet.
        other.namespace.links()?.set_up(other.name, true).await
    }

    /// Makes a bridge, up, without spanning tree and with no forwarding delay.
    ///
    /// # Errors
    /// `EEXIST` when the name is taken.
    pub async fn bridge(&self, name: &str, mac: Option<Mac>) -> Result<()> {
        check(name)?;
        // Multicast snooping would cut neighbour discovery and VXLAN floods on segments without a querier.
        let mut builder = LinkBridge::new(name).forward_delay(0).mcast_snooping(false);
        if let Some(mac) = mac {
            builder = builder.address(mac.0.to_vec());
        }
        self.add(name, builder.build()).await
    }

    /// As [`Self::bridge`], content with one that is there already.
    ///
    /// # Errors
    /// A link of that name that is no bridge.
    pub async fn ensure_bridge(&self, name: &str) -> Result<()> {
        match self.bridge(name, None).await {
            Err(error) if error.is_exists() => match self.get(name).await? {
                Some(link) if link.kind.as_deref() == Some("bridge") => self.set_up(name, true).await,
                _ => Err(Error::Invalid(format!(
                    "link {name} in namespace {} is in the way: it is no bridge",
                    self.namespace.label()
                ))),
            },
            other => other,
        }
    }

    /// Makes a VXLAN link, up.
    ///
    /// # Errors
    /// `EEXIST` when the name is taken or the network identifier is in use in this namespace.
    pub async fn vxlan(&self, name: &str, options: &VxlanOptions<'_>, mtu: Option<u32>) -> Result<()> {
        check(name)?;
        let device = self.index(options.device).await?;
        let mut builder =
            LinkVxlan::new(name, options.vni).dev(device).port(options.port).learning(true).udp_csum(false).up();
        if let Some(group) = options.group {
            builder = builder.group(group);
        }
        if let Some(local) = options.local {
            builder = builder.local(local);
        }
        if let Some(mtu) = mtu {
            builder = builder.mtu(mtu);
        }
        self.add(name, builder.build()).await
    }

    /// Makes a persistent tap, down. See [`TapOptions`].
    ///
    /// # Errors
    /// `EBUSY` when the name belongs to a link of another kind or another process holds it open.
    pub async fn tap(&self, name: &str, options: TapOptions) -> Result<()> {
        check(name)?;
        tap::create(&self.namespace, name, options)
    }

    /// Sets a link up or down.
    ///
    /// # Errors
    /// [`Error::NoLink`].
    pub async fn set_up(&self, name: &str, up: bool) -> Result<()> {
        let builder = LinkMessageBuilder::<LinkUnspec>::new();
        self.set(name, "set up or down", if up { builder.up() } else { builder.down() }).await
    }

    /// Sets the largest packet size in bytes.
    ///
    /// # Errors
    /// [`Error::NoLink`], or a size that the link does not take.
    pub async fn set_mtu(&self, name: &str, mtu: u32) -> Result<()> {
        self.set(name, "set the MTU of", LinkMessageBuilder::<LinkUnspec>::new().mtu(mtu)).await
    }

    /// Sets the Ethernet address.
    ///
    /// # Errors
    /// [`Error::NoLink`].
    pub async fn set_mac(&self, name: &str, mac: Mac) -> Result<()> {
        self.set(name, "set the address of", LinkMessageBuilder::<LinkUnspec>::new().address(mac.0.to_vec())).await
    }

    /// Sets the length of the transmit queue in packets.
    ///
    /// # Errors
    /// [`Error::NoLink`].
    pub async fn set_txqueuelen(&self, name: &str, packets: u32) -> Result<()> {
        self.set(name, "set the queue of", LinkMessageBuilder::<LinkUnspec>::new().txqueuelen(packets)).await
    }

    /// Gives a link a note of at most 255 bytes (`ip link … alias`), which stays with it and means nothing to the kernel.
    ///
    /// # Errors
    /// [`Error::NoLink`].
    pub async fn set_alias(&self, name: &str, alias: &str) -> Result<()> {
        let builder = LinkMessageBuilder::<LinkUnspec>::new();
        let mut message = builder.index(self.index(name).await?).build();
        message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
        self.handle.link().set(message).execute().await.map_err(self.failed(format!("set the alias of link {name}")))
    }

    /// Makes a link a port of a bridge, or of none.
    ///
    /// # Errors
    /// [`Error::NoLink`] for either.
    pub async fn set_master(&self, name: &str, bridge: Option<&str>) -> Result<()> {
        let builder = LinkMessageBuilder::<LinkUnspec>::new();
        let builder = match bridge {
            Some(bridge) => builder.controller(self.index(bridge).await?),
            None => builder.nocontroller(),
        };
        self.set(name, "set the bridge of", builder).await
    }

    /// Renames a link (which must be down on old kernels).
    ///
    /// # Errors
    /// [`Error::NoLink`], `EEXIST`.
    pub async fn rename(&self, name: &str, to: &str) -> Result<()> {
        check(to)?;
        self.set(name, "rename", LinkMessageBuilder::<LinkUnspec>::new().name(to)).await
    }

    /// Moves a link into another namespace, where it arrives down.
    ///
    /// # Errors
    /// [`Error::NoLink`], `EEXIST` when its name is taken there.
    pub async fn move_to(&self, name: &str, namespace: &Namespace) -> Result<()> {
        let descriptor = namespace.as_fd().as_raw_fd();
        self.set(name, "move", LinkMessageBuilder::<LinkUnspec>::new().setns_by_fd(descriptor)).await
    }

    /// Deletes a link; one that is not there is not an error.
    ///
    /// # Errors
    /// [`Error::Netlink`], such as for loopback.
    pub async fn delete(&self, name: &str) -> Result<()> {
        let Some(link) = self.get(name).await? else { return Ok(()) };
        match self.handle.link().del(link.index).execute().await.map_err(self.failed(format!("delete link {name}"))) {
            Err(error) if error.is_missing() => Ok(()),
            other => other,
        }
    }

    /// Deletes every link whose name begins with `prefix` (not empty); returns how many.
    ///
    /// # Errors
    /// As [`Self::delete`].
    pub async fn delete_prefix(&self, prefix: &str) -> Result<usize> {
        if prefix.is_empty() {
            return Err(Error::Invalid("refusing to delete every link: the prefix is empty".into()));
        }
        let mut count = 0;
        for link in self.list().await?.iter().filter(|link| link.name.starts_with(prefix)) {
            self.delete(&link.name).await?;
            count += 1;
        }
        Ok(count)
    }

    /// Gives a link an address; one that it has already is not an error.
    ///
    /// # Errors
    /// [`Error::NoLink`].
    pub async fn add_address(&self, name: &str, address: IpAddr, prefix: u8) -> Result<()> {
        let index = self.index(name).await?;
        self.handle
            .address()
            .add(index, address, prefix)
            .replace()
            .execute()
            .await
            .map_err(self.failed(format!("add address {address}/{prefix} to link {name}")))
    }

    /// The addresses of a link with their prefix lengths.
    ///
    /// # Errors
    /// [`Error::NoLink`].
    pub async fn addresses(&self, name: &str) -> Result<Vec<(IpAddr, u8)>> {
        let messages = self.address_messages(name).await?;
        Ok(messages.iter().filter_map(|m| Some((address_of(m)?, m.header.prefix_len))).collect())
    }

    /// Takes an address away from a link; one that it has not is not an error.
    ///
    /// # Errors
    /// [`Error::NoLink`].
    pub async fn delete_address(&self, name: &str, address: IpAddr) -> Result<()> {
        for message in self.address_messages(name).await? {
            if address_of(&message) == Some(address) {
                let what = format!("delete address {address} of link {name}");
                self.handle.address().del(message).execute().await.map_err(self.failed(what))?;
            }
        }
        Ok(())
    }

    async fn address_messages(&self, name: &str) -> Result<Vec<AddressMessage>> {
        let index = self.index(name).await?;
        self.handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .map_err(self.failed(format!("list addresses of link {name}")))
    }

    async fn route(&self, route: &Route<'_>) -> Result<rtnetlink::packet_route::route::RouteMessage> {
        let (network, prefix) = route.destination;
        let mut builder = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(network, prefix);
        if let Some(gateway) = route.gateway {
            builder = builder.gateway(gateway);
        } else {
            builder = builder.scope(rtnetlink::packet_route::route::RouteScope::Link);
        }
        if let Some(link) = route.link {
            builder = builder.output_interface(self.index(link).await?);
        }
        Ok(builder.build())
    }

    /// Adds a route, or replaces the one to the same destination.
    ///
    /// # Errors
    /// [`Error::NoLink`], or a gateway that cannot be reached.
    pub async fn set_route(&self, route: &Route<'_>) -> Result<()> {
        let message = self.route(route).await?;
        let what = format!("set route {route:?}");
        self.handle.route().add(message).replace().execute().await.map_err(self.failed(what))
    }

    /// The next hop of the default route, if there is one.
    ///
    /// # Errors
    /// [`Error::Netlink`].
    pub async fn default_gateway(&self) -> Result<Option<Ipv4Addr>> {
        let wanted = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes = self.handle.route().get(wanted).execute().try_collect::<Vec<_>>().await;
        let routes = routes.map_err(self.failed("list routes".to_owned()))?;
        Ok(routes.iter().filter(|route| route.header.destination_prefix_length == 0).find_map(|route| {
            route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => Some(*gateway),
                _ => None,
            })
        }))
    }

    /// Deletes a route; one that is not there is not an error.
    ///
    /// # Errors
    /// [`Error::NoLink`].
    pub async fn delete_route(&self, route: &Route<'_>) -> Result<()> {
        let message = self.route(route).await?;
        match self.handle.route().del(message).execute().await.map_err(self.failed(format!("delete route {route:?}"))) {
            Err(error) if error.is_missing() => Ok(()),
            other => other,
        }
    }

    /// Tells a bridge port (or a VXLAN link, with `remote`) where a station is, replacing what it knew. With
    /// `Mac([0; 6])` and a remote address, a VXLAN link sends floods there too.
    ///
    /// # Errors
    /// [`Error::NoLink`].
    pub async fn set_forwarding(&self, link: &str, station: Mac, remote: Option<IpAddr>) -> Result<()> {
        let index = self.index(link).await?;
        let mut request = self.handle.neighbours().add_bridge(index, &station.0);
        request = match remote {
            Some(remote) => request.destination(remote).flags(NeighbourFlags::Own),
            None => request.flags(NeighbourFlags::Controller),
        };
        // Flood entries of a VXLAN link live side by side; `replace` would need them to be unique.
        if station.0 != [0; 6] {
            request = request.replace();
        }
        match request.execute().await.map_err(self.failed(format!("set where {station} is, on link {link}"))) {
            Err(error) if error.is_exists() => Ok(()),
            other => other,
        }
    }

    /// Sets the Ethernet address of a neighbour for good (a permanent ARP entry).
    ///
    /// # Errors
    /// [`Error::NoLink`].
    pub async fn set_neighbour(&self, link: &str, address: IpAddr, mac: Mac) -> Result<()> {
        let index = self.index(link).await?;
        let request = self.handle.neighbours().add(index, address).link_layer_address(&mac.0).replace();
        request.execute().await.map_err(self.failed(format!("set neighbour {address} on link {link}")))
    }
}

/// The kernel's rules for link names (`dev_valid_name`).
pub(crate) fn check(name: &str) -> Result<()> {
    let why = if name.is_empty() || name.len() > 15 {
        "it must have 1 to 15 bytes"
    } else if name == "." || name == ".." || name.bytes().any(|b| b == b'/' || b == b':' || b.is_ascii_whitespace()) {
        "'/', ':', white space, '.' and '..' are not allowed"
    } else if name.contains(['\0', '%']) {
        "'%' and NUL are not allowed"
    } else {
        return Ok(());
    };
    Err(Error::Name { what: "link", name: name.into(), why })
}

fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    // On point-to-point links `Address` is the peer; `Local` is ours wherever it is given.
    let local =
        message.attributes.iter().find_map(|a| if let AddressAttribute::Local(ip) = a { Some(*ip) } else { None });
    local.or_else(|| {
        message.attributes.iter().find_map(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None })
    })
}

fn info(message: &LinkMessage) -> LinkInfo {
    let mut link = LinkInfo {
        name: String::new(),
        index: message.header.index,
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        master: None,
        kind: None,
        alias: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Controller(index) => link.master = Some(*index),
            LinkAttribute::Address(bytes) => link.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac),
            LinkAttribute::LinkInfo(infos) => {
                link.kind =
                    infos.iter().find_map(|i| if let InfoAttribute::Kind(k) = i { Some(k.to_string()) } else { None });
            }
            _ => {}
        }
    }
    link
}
