//! A DHCPv4 server for one guest: one fixed address, a lease of a day, nothing to remember (RFC 2131, RFC 2132).
//!
//! Replies are whole Ethernet frames with finished checksums, sent to the guest's own Ethernet address: the guest has no IP
//! address yet that an ordinary socket could send to, and some clients drop packets whose checksum was left to hardware.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::{Error, Links, Mac, Namespace, Result};

/// What the guest is told.
#[derive(Clone, Debug)]
pub struct Lease {
    /// The guest's Ethernet address; others get no answer.
    pub mac: Mac,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Prefix length of its network.
    pub prefix: u8,
    /// The server's own address on the link.
    pub server: Ipv4Addr,
    /// Default gateway.
    pub router: Option<Ipv4Addr>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Search domains.
    pub search: Vec<String>,
    /// Host name.
    pub hostname: Option<String>,
    /// Largest packet in bytes.
    pub mtu: Option<u16>,
}

const LEASE_SECONDS: u32 = 86400;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
const HEADER: usize = 236;

/// A running server. It stops on drop.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts to answer on `link` (the bridge to the guest) in `namespace`.
    ///
    /// # Errors
    /// No such link, port 67 taken on it, no permission.
    pub async fn start(namespace: &Namespace, link: &str, lease: Lease) -> Result<Self> {
        let links: Links = namespace.links()?;
        let info = links
            .get(link)
            .await?
            .ok_or_else(|| Error::NoLink { link: link.into(), namespace: namespace.label().into() })?;
        let own = info.mac.ok_or_else(|| Error::Invalid(format!("link {link} has no Ethernet address")))?;
        let sockets = namespace.run(|| sockets(link, info.index))?;
        let (receiver, sender) = sockets
            .map_err(|e| Error::io(format!("serve DHCP on link {link} in namespace {}", namespace.label()), e))?;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = std::thread::Builder::new()
            .name("dhcp".into())
            .spawn(move || serve(&receiver, &sender, own, &lease, &flag))
            .map_err(|e| Error::io("start a thread", e))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn sockets(link: &str, index: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let receiver = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::Udp)?;
    setsockopt(&receiver, sockopt::ReuseAddr, &true)?;
    setsockopt(&receiver, sockopt::BindToDevice, &link.into())?;
    // The time after which a stop is noticed.
    setsockopt(&receiver, sockopt::ReceiveTimeout, &TimeVal::new(0, 100_000))?;
    let any = nix::sys::socket::SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 67));
    bind(receiver.as_raw_fd(), &any)?;
    // Protocol 0: this one only sends.
    // SAFETY: plain call; the result is checked and owned right away.
    let raw = unsafe { nix::libc::socket(nix::libc::AF_PACKET, nix::libc::SOCK_RAW | nix::libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `raw` is a descriptor that was just made and that nobody else owns.
    let sender = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(raw) };
    // SAFETY: an all-zero sockaddr_ll is a valid one.
    let mut address: nix::libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = nix::libc::AF_PACKET as u16;
    address.sll_ifindex = i32::try_from(index).unwrap_or_default();
    // SAFETY: pointer and length are those of a sockaddr_ll that lives through the call.
    let bound = unsafe {
        nix::libc::bind(
            raw,
            (&raw const address).cast(),
            u32::try_from(size_of::<nix::libc::sockaddr_ll>()).unwrap_or_default(),
        )
    };
    if bound < 0 { Err(io::Error::last_os_error()) } else { Ok((receiver, sender)) }
}

fn serve(receiver: &OwnedFd, sender: &OwnedFd, own: Mac, lease: &Lease, stop: &AtomicBool) {
    let mut buffer = [0; 1500];
    while !stop.load(Ordering::Relaxed) {
        match recv(receiver.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => {
                let Some(reply) = buffer.get(..length).and_then(|request| answer(request, lease)) else { continue };
                let frame = frame(&reply, own, lease);
                if let Err(error) = send(sender.as_raw_fd(), &frame, MsgFlags::empty()) {
                    tracing::warn!(%error, mac = %lease.mac, "cannot send a DHCP reply");
                }
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Err(error) => {
                // The link may be down for the moment; when it is gone for good our owner stops us.
                tracing::debug!(%error, mac = %lease.mac, "cannot receive DHCP");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// The value of an option in the options field.
fn option(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        match options {
            [0, rest @ ..] => options = rest,
            [255, ..] | [] | [_] => return None,
            [code, length, rest @ ..] => {
                let value = rest.get(..usize::from(*length))?;
                if *code == wanted {
                    return Some(value);
                }
                options = rest.get(usize::from(*length)..)?;
            }
        }
    }
}

/// The reply's BOOTP payload, or `None` for what needs no answer.
fn answer(request: &[u8], lease: &Lease) -> Option<Vec<u8>> {
    let header = request.get(..HEADER)?;
    let options = request.get(HEADER..)?.strip_prefix(&MAGIC)?;
    // BOOTREQUEST over Ethernet from our guest
    if header.get(..3)? != [1, 1, 6] || header.get(28..34)? != lease.mac.0 {
        return None;
    }
    let (_discover, offer, request_code, ack, nak, inform) = (1, 2, 3, 5, 6, 8);
    let client = Ipv4Addr::from(<[u8; 4]>::try_from(header.get(12..16)?).ok()?);
    let server = option(options, 54).and_then(|v| <[u8; 4]>::try_from(v).ok()).map(Ipv4Addr::from);
    let wanted = option(options, 50).and_then(|v| <[u8; 4]>::try_from(v).ok()).map(Ipv4Addr::from);
    let kind = match *option(options, 53)?.first()? {
        1 => offer,
        3 if server.is_some_and(|server| server != lease.server) => return None,
        // A guest that remembers another address (a disk from elsewhere) is told so, and begins anew.
        3 if wanted.unwrap_or(client) != lease.address => nak,
        3 => ack,
        code if code == inform => ack,
        code if code == request_code => ack,
        _ => return None,
    };
    let asked = *option(options, 53)?.first()?;

    let mut reply = vec![0; HEADER];
    reply.splice(..4, [2, 1, 6, 0]);
    reply.splice(4..8, header.get(4..8)?.iter().copied()); // xid
    reply.splice(10..12, header.get(10..12)?.iter().copied()); // flags
    if kind != nak {
        reply.splice(12..16, header.get(12..16)?.iter().copied()); // ciaddr
        if asked != inform {
            reply.splice(16..20, lease.address.octets()); // yiaddr
        }
    }
    reply.splice(28..44, header.get(28..44)?.iter().copied()); // chaddr
    reply.extend(MAGIC);
    let mut put = |code: u8, value: &[u8]| {
        // Longer values do not fit an option; none of ours is that long in practice.
        if let Ok(length) = u8::try_from(value.len()) {
            reply.extend([code, length]);
            reply.extend(value);
        }
    };
    put(53, &[kind]);
    put(54, &lease.server.octets());
    if kind != nak {
        if asked != inform {
            put(51, &LEASE_SECONDS.to_be_bytes());
            put(58, &(LEASE_SECONDS / 2).to_be_bytes());
            put(59, &(LEASE_SECONDS / 8 * 7).to_be_bytes());
        }
        let mask = u32::MAX.checked_shl(32 - u32::from(lease.prefix.min(32))).unwrap_or(0);
        put(1, &mask.to_be_bytes());
        if let Some(router) = lease.router {
            put(3, &router.octets());
        }
        if !lease.dns.is_empty() {
            put(6, &lease.dns.iter().flat_map(Ipv4Addr::octets).collect::<Vec<u8>>());
        }
        if let Some(hostname) = &lease.hostname {
            put(12, hostname.as_bytes());
        }
        if let Some(mtu) = lease.mtu {
            put(26, &mtu.to_be_bytes());
        }
        let search: Vec<u8> = lease.search.iter().filter_map(|domain| labels(domain)).flatten().collect();
        if !search.is_empty() {
            put(119, &search);
        }
    }
    reply.push(255);
    reply.resize(reply.len().max(300), 0); // the smallest that old BOOTP relays pass on
    Some(reply)
}

/// A domain as DNS writes it (RFC 3397), without compression.
fn labels(domain: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for label in domain.trim_end_matches('.').split('.') {
        let length = u8::try_from(label.len()).ok().filter(|length| (1..64).contains(length))?;
        bytes.push(length);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    Some(bytes)
}

fn checksum(parts: &[&[u8]]) -> u16 {
    // Every part but the last has an even length.
    let mut sum: u32 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            let (high, low) = (pair.first().copied().unwrap_or(0), pair.get(1).copied().unwrap_or(0));
            sum += u32::from(u16::from_be_bytes([high, low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn frame(payload: &[u8], own: Mac, lease: &Lease) -> Vec<u8> {
    let udp_length = u16::try_from(payload.len() + 8).unwrap_or(u16::MAX);
    let to = Ipv4Addr::BROADCAST; // right for clients with and without an address
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    ip.splice(2..4, (udp_length + 20).to_be_bytes());
    ip.extend(lease.server.octets());
    ip.extend(to.octets());
    let sum = checksum(&[&ip]);
    ip.splice(10..12, sum.to_be_bytes());
    let mut udp = Vec::with_capacity(8);
    udp.extend(67u16.to_be_bytes());
    udp.extend(68u16.to_be_bytes());
    udp.extend(udp_length.to_be_bytes());
    udp.extend([0, 0]);
    let pseudo = [0, 17];
    let sum = checksum(&[&lease.server.octets(), &to.octets(), &pseudo, &udp_length.to_be_bytes(), &udp, payload]);
    udp.splice(6..8, (if sum == 0 { 0xffff } else { sum }).to_be_bytes());
    [&lease.mac.0[..], &own.0, &[8, 0], &ip, &udp, payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> Lease {
        Lease {
            mac: Mac([2, 0, 0, 0, 0, 7]),
            address: Ipv4Addr::new(10, 0, 2, 2),
            prefix: 24,
            server: Ipv4Addr::new(10, 0, 2, 1),
            router: Some(Ipv4Addr::new(10, 0, 2, 1)),
            dns: vec![Ipv4Addr::new(10, 96, 0, 10)],
            search: vec!["default.svc.cluster.local".into()],
            hostname: Some("fedora".into()),
            mtu: Some(1450),
        }
    }

    fn message(kind: u8, more: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[..3].copy_from_slice(&[1, 1, 6]);
        bytes[4..8].copy_from_slice(&[9, 8, 7, 6]);
        bytes[28..34].copy_from_slice(&lease().mac.0);
        bytes.extend(MAGIC);
        bytes.extend([53, 1, kind]);
        bytes.extend(more);
        bytes.push(255);
        bytes
    }

    fn options(reply: &[u8]) -> &[u8] {
        reply[HEADER..].strip_prefix(&MAGIC).unwrap()
    }

    #[test]
    fn a_discover_gets_an_offer_with_everything() {
        let reply = answer(&message(1, &[]), &lease()).unwrap();
        assert_eq!(reply[4..8], [9, 8, 7, 6]);
        assert_eq!(reply[16..20], [10, 0, 2, 2]);
        let options = options(&reply);
        assert_eq!(option(options, 53), Some(&[2][..]));
        assert_eq!(option(options, 1), Some(&[255, 255, 255, 0][..]));
        assert_eq!(option(options, 3), Some(&[10, 0, 2, 1][..]));
        assert_eq!(option(options, 6), Some(&[10, 96, 0, 10][..]));
        assert_eq!(option(options, 12), Some(&b"fedora"[..]));
        assert_eq!(option(options, 26), Some(&1450u16.to_be_bytes()[..]));
        assert_eq!(option(options, 119), Some(&b"\x07default\x03svc\x07cluster\x05local\x00"[..]));
    }

    #[test]
    fn requests_are_confirmed_or_refused() {
        let kind = |more: &[u8]| answer(&message(3, more), &lease()).map(|r| option(options(&r), 53).unwrap()[0]);
        assert_eq!(kind(&[50, 4, 10, 0, 2, 2]), Some(5));
        assert_eq!(kind(&[50, 4, 192, 168, 0, 9]), Some(6));
        assert_eq!(kind(&[50, 4, 10, 0, 2, 2, 54, 4, 10, 9, 9, 9]), None, "another server's");
    }

    #[test]
    fn strangers_and_nonsense_get_no_answer() {
        let mut stranger = message(1, &[]);
        stranger[33] = 8;
        assert_eq!(answer(&stranger, &lease()), None);
        let whole = message(1, &[50, 200, 1]);
        for length in 0..whole.len() {
            let _ = answer(&whole[..length], &lease());
        }
        assert_eq!(answer(&message(1, &[])[..HEADER], &lease()), None);
    }

    #[test]
    fn frames_have_right_checksums() {
        let frame = frame(&answer(&message(1, &[]), &lease()).unwrap(), Mac([2, 0, 0, 0, 0, 1]), &lease());
        let (ip, udp) = (&frame[14..34], &frame[34..]);
        assert_eq!(checksum(&[ip]), 0);
        assert_eq!(checksum(&[&ip[12..20], &[0, 17], &udp[4..6], udp]), 0);
    }
}
