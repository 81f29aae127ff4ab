//! Whole frames from one link to another, in whatever namespaces they are: [`Listener`] hears what comes in for a station,
//! [`Sender`] puts it out elsewhere.
//!
//! A frame goes with its virtio header (linux/virtio_net.h) in front. Between links of one kernel a frame may still lack its
//! checksum, or be many segments in one; the header says so, and the kernel at the other end does what is left to do.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use nix::libc;
use nix::sys::socket::{MsgFlags, send};
use nix::sys::time::TimeSpec;

use crate::{Error, Mac, Namespace, Result, capture};

/// Length of the virtio header.
const HEADER: usize = 10;
/// Longest frame with its header: 64 KiB of segments in one, and room for the headers around them.
pub const LARGEST: usize = HEADER + 64 * 1024 + 64;

/// A frame that came in for a station.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// When the kernel took it from the link, by the machine's clock.
    pub at: SystemTime,
    /// For more than one station: broadcast or multicast.
    pub group: bool,
    /// Virtio header and frame.
    pub bytes: Vec<u8>,
}

/// Hears what comes in. It stops soon after it is dropped, which does not wait for that.
#[derive(Debug)]
pub struct Listener {
    stop: Arc<AtomicBool>,
    socket: Arc<OwnedFd>,
    station: Mac,
}

impl Listener {
    /// Gives `sink` every frame that comes in over `link` for `station` or for a group, in order, on a thread of its own. What is
    /// done with the frame otherwise stays as it is.
    ///
    /// # Errors
    /// No such link, no permission for packet sockets.
    pub async fn start(
        namespace: &Namespace,
        link: &str,
        station: Mac,
        mut sink: impl FnMut(Heard) + Send + 'static,
    ) -> Result<Self> {
        let index = index(namespace, link).await?;
        let opened = namespace.run(|| hear(index, station))?;
        let socket =
            opened.map_err(|e| Error::io(format!("listen on link {link} in namespace {}", namespace.label()), e))?;
        let socket = Arc::new(socket);
        let kept = socket.clone();
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let work = move || {
            let mut buffer = vec![0; LARGEST];
            let mut control = nix::cmsg_space!(TimeSpec);
            while !flag.load(Ordering::Relaxed) {
                let Some((length, from, at)) = capture::take(&socket, &mut buffer, &mut control) else { continue };
                if from.is_some_and(|from| from.pkttype() == libc::PACKET_OUTGOING) {
                    continue;
                }
                let Some(bytes) = buffer.get(..length) else { continue };
                let Some(first) = bytes.get(HEADER) else { continue };
                sink(Heard { at, group: first & 1 == 1, bytes: bytes.to_vec() });
            }
        };
        let thread = std::thread::Builder::new().name("frames".into()).spawn(work);
        thread.map_err(|e| Error::io("start a thread", e))?;
        Ok(Self { stop, socket: kept, station })
    }

    /// Hears from now on (as it does from its start on), or nothing until it is told again. The kernel drops what is not heard before it is
    /// copied, so that a busy link costs next to nothing; the change itself is one call.
    ///
    /// # Errors
    /// As the system says; then it stays as it was.
    pub fn hear(&self, on: bool) -> io::Result<()> {
        match on {
            true => capture::pick(&self.socket, &mut for_station(self.station)),
            false => capture::pick(&self.socket, &mut [capture::step(libc::BPF_RET | libc::BPF_K, 0, 0, 0)]),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Puts frames out over a link.
#[derive(Debug)]
pub struct Sender(OwnedFd);

impl Sender {
    /// For `link` in `namespace`. What is sent over a tap is for the process that holds it, and waits in the tap's queue until it
    /// is read.
    ///
    /// # Errors
    /// No such link, no permission for packet sockets.
    pub async fn open(namespace: &Namespace, link: &str) -> Result<Self> {
        let index = index(namespace, link).await?;
        let open = || {
            let socket = capture::packet_socket()?;
            with_header(&socket)?;
            capture::bind(&socket, index, 0)?;
            Ok(socket)
        };
        let opened: io::Result<OwnedFd> = namespace.run(open)?;
        let what = || format!("open link {link} in namespace {} for sending", namespace.label());
        opened.map(Self).map_err(|e| Error::io(what(), e))
    }

    /// Sends a frame as a [`Listener`] heard it, without waiting.
    ///
    /// # Errors
    /// A full queue, a link that is down, something that is no frame.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }
}

async fn index(namespace: &Namespace, link: &str) -> Result<u32> {
    let found = namespace.links()?.get(link).await?;
    found.map(|link| link.index).ok_or_else(|| Error::NoLink { link: link.into(), namespace: namespace.label().into() })
}

/// Frames for the station or for a group.
fn for_station(station: Mac) -> [libc::sock_filter; 8] {
    use libc::{BPF_ABS, BPF_B, BPF_H, BPF_JEQ, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W};
    let [a, b, c, d, e, f] = station.0;
    [
        capture::step(BPF_LD | BPF_H | BPF_ABS, 0, 0, 4),
        capture::step(BPF_JMP | BPF_JEQ | BPF_K, 0, 2, u32::from_be_bytes([0, 0, e, f])),
        capture::step(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0),
        capture::step(BPF_JMP | BPF_JEQ | BPF_K, 2, 0, u32::from_be_bytes([a, b, c, d])),
        capture::step(BPF_LD | BPF_B | BPF_ABS, 0, 0, 0),
        capture::step(BPF_JMP | BPF_JSET | BPF_K, 0, 1, 1),
        capture::step(BPF_RET | BPF_K, 0, 0, LARGEST as u32),
        capture::step(BPF_RET | BPF_K, 0, 0, 0),
    ]
}

fn hear(link: u32, station: Mac) -> io::Result<OwnedFd> {
    let socket = capture::packet_socket()?;
    with_header(&socket)?;
    capture::pick(&socket, &mut for_station(station))?;
    capture::listen(&socket, link)?;
    Ok(socket)
}

/// Frames go with their virtio header (`PACKET_VNET_HDR`).
fn with_header(socket: &OwnedFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: pointer and length are those of an integer that lives through the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            (&raw const on).cast(),
            u32::try_from(size_of::<libc::c_int>()).unwrap_or_default(),
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
