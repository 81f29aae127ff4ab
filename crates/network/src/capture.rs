//! Frames of one EtherType as they come in over the links of a namespace, with the time at which the kernel took them.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use nix::libc::{sock_filter, sock_fprog};
use nix::sys::socket::{ControlMessageOwned, LinkAddr, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::sys::time::{TimeSpec, TimeVal};

use crate::{Error, Namespace, Result};

/// Longest frame that is read whole.
const LARGEST: usize = 2048;
/// Where the EtherType is in a frame.
const TYPE_AT: usize = 12;

/// A frame that came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// When the kernel took it from the link, by the machine's clock.
    pub at: SystemTime,
    /// Name of the link.
    pub link: String,
    /// The frame, from its destination address on.
    pub frame: Vec<u8>,
}

/// A running capture. It stops on drop.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Gives `sink` every frame of this EtherType that comes in over any link of `namespace`, in order, on a thread of its own.
    /// What goes out is left out; a frame that a bridge passes on is seen on its port and on the bridge.
    ///
    /// # Errors
    /// No permission for packet sockets.
    pub fn start(namespace: &Namespace, ethertype: u16, mut sink: impl FnMut(Seen) + Send + 'static) -> Result<Self> {
        let what = || format!("capture frames in {}", namespace.label());
        let socket = namespace.run(|| open(ethertype))?.map_err(|e| Error::io(what(), e))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, namespace) = (stop.clone(), namespace.clone());
        let work = move || {
            // Names of links are asked for by their numbers, which mean something only there.
            if let Err(error) = namespace.enter() {
                tracing::error!(%error, "cannot capture");
                return;
            }
            receive(&socket, ethertype, &flag, &mut sink);
        };
        let thread = std::thread::Builder::new().name("capture".into()).spawn(work);
        Ok(Self { stop, thread: Some(thread.map_err(|e| Error::io("start a thread", e))?) })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A socket for this EtherType on all links. It asks for every frame and has the kernel pick: a socket for one type alone would not
/// see what comes in over a bridge's port, but only what the bridge then takes for itself.
fn open(ethertype: u16) -> io::Result<OwnedFd> {
    use nix::libc::{BPF_ABS, BPF_H, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET};
    let mut steps = [
        step(BPF_LD | BPF_H | BPF_ABS, 0, 0, TYPE_AT as u32),
        step(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, ethertype.into()),
        step(BPF_RET | BPF_K, 0, 0, LARGEST as u32),
        step(BPF_RET | BPF_K, 0, 0, 0),
    ];
    let socket = packet_socket()?;
    pick(&socket, &mut steps)?;
    listen(&socket, 0)?;
    Ok(socket)
}

/// A packet socket that hears nothing yet.
pub(crate) fn packet_socket() -> io::Result<OwnedFd> {
    // SAFETY: plain call; the result is checked and owned right away.
    let raw = unsafe { nix::libc::socket(nix::libc::AF_PACKET, nix::libc::SOCK_RAW | nix::libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `raw` is a descriptor that was just made and that nobody else owns.
    Ok(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(raw) })
}

/// Begins to hear what comes in over the link of this number, or over all (0), with the kernel's time stamps.
pub(crate) fn listen(socket: &OwnedFd, link: u32) -> io::Result<()> {
    setsockopt(socket, sockopt::ReceiveTimestampns, &true)?;
    // Nothing is to be lost while the machine is busy with something else.
    setsockopt(socket, sockopt::RcvBuf, &(4 << 20))?;
    // The time after which a stop is noticed.
    setsockopt(socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))?;
    bind(socket, link, nix::libc::ETH_P_ALL as u16)
}

/// Ties a packet socket to a link (0: all), to hear frames of this protocol (0: none).
pub(crate) fn bind(socket: &OwnedFd, link: u32, protocol: u16) -> io::Result<()> {
    // SAFETY: an all-zero sockaddr_ll is a valid one.
    let mut address: nix::libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = nix::libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = i32::try_from(link).unwrap_or_default();
    let length = u32::try_from(size_of::<nix::libc::sockaddr_ll>()).unwrap_or_default();
    // SAFETY: pointer and length are those of a sockaddr_ll that lives through the call.
    let bound = unsafe { nix::libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A step of a classic BPF program (linux/filter.h).
pub(crate) fn step(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

/// Lets only those frames through that a classic BPF program picks.
pub(crate) fn pick(socket: &OwnedFd, steps: &mut [sock_filter]) -> io::Result<()> {
    let program = sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: pointer and length are those of a program that lives through the call, and so do its steps.
    let set = unsafe {
        nix::libc::setsockopt(
            socket.as_raw_fd(),
            nix::libc::SOL_SOCKET,
            nix::libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            u32::try_from(size_of::<sock_fprog>()).unwrap_or_default(),
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The next frame, its sender (none when nothing came for a while), and when the kernel took it.
pub(crate) fn take(
    socket: &OwnedFd,
    buffer: &mut [u8],
    control: &mut [u8],
) -> Option<(usize, Option<LinkAddr>, SystemTime)> {
    let mut slices = [io::IoSliceMut::new(buffer)];
    let message = recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut slices, Some(control), MsgFlags::empty()).ok()?;
    let stamp = message.cmsgs().ok().and_then(|mut all| {
        all.find_map(|one| if let ControlMessageOwned::ScmTimestampns(time) = one { Some(time) } else { None })
    });
    let at = stamp.map_or_else(SystemTime::now, |time| SystemTime::UNIX_EPOCH + Duration::from(time));
    Some((message.bytes, message.address, at))
}

fn receive(socket: &OwnedFd, ethertype: u16, stop: &AtomicBool, sink: &mut impl FnMut(Seen)) {
    let mut buffer = [0; LARGEST];
    let mut control = nix::cmsg_space!(TimeSpec);
    while !stop.load(Ordering::Relaxed) {
        let Some((length, address, at)) = take(socket, &mut buffer, &mut control) else { continue };
        let Some(address) = address.filter(|address| address.pkttype() != nix::libc::PACKET_OUTGOING) else { continue };
        let link = u32::try_from(address.ifindex()).unwrap_or_default();
        // A link that has gone meanwhile has no name any more.
        let name = nix::net::if_::if_indextoname(link).ok().and_then(|name| name.into_string().ok());
        // Before the filter was there any frame could come.
        let frame = buffer.get(..length).filter(|f| f.get(TYPE_AT..TYPE_AT + 2) == Some(&ethertype.to_be_bytes()[..]));
        let Some(frame) = frame else { continue };
        sink(Seen { at, link: name.unwrap_or_else(|| format!("if{link}")), frame: frame.to_vec() });
    }
}
