//! Carrying the memory stream between a unix socket and a channel, and counting it.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// Size of one read and write. QEMU writes its stream in pieces of up to 32 KiB per page group; larger reads gather them.
const CHUNK: usize = 256 * 1024;

/// How long sent bytes may stay unacknowledged before the connection counts as cut. Without it Linux retries for about a
/// quarter of an hour while neither end notices anything.
pub const CUT_AFTER: Duration = Duration::from_secs(10);

/// Bytes that went through a pump, readable while it runs.
#[derive(Debug, Default)]
pub struct Carried {
    /// From the local unix socket to the channel.
    pub out: AtomicU64,
    /// From the channel to the local unix socket.
    pub back: AtomicU64,
    /// Microseconds that the channels took to take what went out, all of them together.
    pub writing_us: AtomicU64,
}

/// Fewer bytes than this lie in buffers on the way, and say nothing of the link.
const MEASURABLE: u64 = 16 << 20;

impl Carried {
    /// What the link takes in bytes a second: what went out over so many connections, in the time that they took to take it.
    /// How long they waited for something to send does not count. None while too little went out to tell.
    #[must_use]
    pub fn link_rate(&self, connections: u64) -> Option<u64> {
        let (out, us) = (self.out.load(Ordering::Relaxed), self.writing_us.load(Ordering::Relaxed));
        if out < MEASURABLE || us == 0 {
            return None;
        }
        let rate = u128::from(out) * u128::from(connections.max(1)) * 1_000_000 / u128::from(us);
        u64::try_from(rate).ok()
    }

    /// It is counted elsewhere: these are the numbers.
    pub fn tell(&self, (out, back, writing_us): (u64, u64, u64)) {
        self.out.store(out, Ordering::Relaxed);
        self.back.store(back, Ordering::Relaxed);
        self.writing_us.store(writing_us, Ordering::Relaxed);
    }

    /// Both directions together: any change means that the link lives.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.out.load(Ordering::Relaxed) + self.back.load(Ordering::Relaxed)
    }
}

/// How much of what was written may wait for its turn on the network, in bytes. What is under way does not count.
const UNSENT: u32 = 128 * 1024;
/// Bytes a second of one connection that its receive window leaves room for: 10 Gbit/s.
const RATE: u64 = 1_250_000_000;
/// The least receive window, in bytes.
const LEAST_WINDOW: usize = 512 * 1024;
/// The most that is set; a link so long is left to Linux.
const MOST_WINDOW: usize = 4 << 20;

/// The receive window of a connection with this round trip, in bytes; none is as Linux sees fit.
fn window(round_trip: Duration) -> Option<usize> {
    let bytes = usize::try_from(u128::from(RATE) * round_trip.as_micros() / 1_000_000).ok()?;
    (bytes <= MOST_WINDOW).then(|| bytes.max(LEAST_WINDOW))
}

/// What the kernel has measured since the connection was opened; none as long as that is nothing.
fn round_trip(stream: &TcpStream) -> io::Result<Option<Duration>> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the descriptor is open as long as `stream` is, and the kernel writes at most `length` bytes to `info`.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(done)?;
    // SAFETY: it consists of numbers, which were zero before the kernel wrote to it.
    let info = unsafe { info.assume_init() };
    Ok((info.tcpi_rtt > 0).then(|| Duration::from_micros(info.tcpi_rtt.into())))
}

/// Settings of every channel connection: no waiting for full segments, and a cut link is noticed. And little waits in its
/// buffers: what QEMU has handed over but the target's has not read yet is sent while the guest stands still. Linux lets some MiB
/// pile up at either end where the reader is slower than the network.
///
/// # Errors
/// As `setsockopt(2)`.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &5)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &2)?;
    setsockopt(stream, sockopt::TcpKeepCount, &3)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &(CUT_AFTER.as_millis() as u32))?;
    SockRef::from(stream).set_tcp_notsent_lowat(UNSENT)?;
    if let Some(window) = round_trip(stream)?.and_then(window) {
        // Whoever has no right to it could only set less than a long link needs (`net.core.rmem_max`): that is left as it is.
        match setsockopt(stream, sockopt::RcvBufForce, &window) {
            Err(Errno::EPERM) => {}
            done => done?,
        }
    }
    Ok(())
}

/// How much of what is on its way to QEMU may lie in its socket, in bytes: fewer wakings than Linux's 208 KiB make.
const ON_ITS_WAY: usize = 1 << 20;

/// Settings of a connection into one of the launcher's sockets that takes much.
///
/// # Errors
/// As `setsockopt(2)`.
pub fn prepare_local(stream: &UnixStream) -> io::Result<()> {
    Ok(setsockopt(stream, sockopt::SndBuf, &ON_ITS_WAY)?)
}

/// Copies both ways until both are at their end or one fails; an end of file is passed on as such.
///
/// # Errors
/// The first error of either direction; the other is given up with it.
pub async fn pump<L, C>(local: L, channel: C, carried: Arc<Carried>) -> io::Result<()>
where
    L: AsyncRead + AsyncWrite + Unpin,
    C: AsyncRead + AsyncWrite + Unpin,
{
    let (mut local_read, mut local_write) = tokio::io::split(local);
    let (mut channel_read, mut channel_write) = tokio::io::split(channel);
    tokio::try_join!(
        one_way(&mut local_read, &mut channel_write, &carried.out, Some(&carried.writing_us)),
        one_way(&mut channel_read, &mut local_write, &carried.back, None),
    )?;
    Ok(())
}

async fn one_way<R, W>(from: &mut R, to: &mut W, count: &AtomicU64, writing_us: Option<&AtomicU64>) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0u8; CHUNK];
    let mut end = None;
    while end.is_none() {
        let n;
        (n, end) = gather(from, &mut buffer).await;
        let Some(mut filled) = buffer.get(..n).filter(|filled| !filled.is_empty()) else { break };
        let began = Instant::now();
        // Counted as they go: several connections over a slow link take longer for all of it than a link may be silent.
        while !filled.is_empty() {
            let taken = to.write(filled).await?;
            filled = filled.get(taken..).filter(|_| taken > 0).ok_or(io::ErrorKind::WriteZero)?;
            count.fetch_add(taken as u64, Ordering::Relaxed);
        }
        to.flush().await?;
        if let Some(us) = writing_us {
            us.fetch_add(u64::try_from(began.elapsed().as_micros()).unwrap_or(0), Ordering::Relaxed);
        }
    }
    end.unwrap_or(Ok(()))?;
    to.shutdown().await
}

/// Waits for bytes and takes all that are there, as far as the buffer goes: TLS gives one record of 16 KiB at a time, and a
/// write for each of them wakes QEMU as often. Says how many, and how the stream ended after them, if it did.
async fn gather<R: AsyncRead + Unpin>(from: &mut R, buffer: &mut [u8]) -> (usize, Option<io::Result<()>>) {
    let mut n = 0;
    loop {
        let Some(rest) = buffer.get_mut(n..).filter(|rest| !rest.is_empty()) else { return (n, None) };
        let mut rest = ReadBuf::new(rest);
        let read = poll_fn(|cx| match Pin::new(&mut *from).poll_read(cx, &mut rest) {
            Poll::Pending if n > 0 => Poll::Ready(None),
            read => read.map(Some),
        });
        match read.await {
            None => return (n, None),
            Some(Ok(())) if rest.filled().is_empty() => return (n, Some(Ok(()))),
            Some(Ok(())) => n += rest.filled().len(),
            // A peer that goes away without TLS's farewell has ended its stream all the same; QEMU's own protocol knows
            // whether it was complete.
            Some(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof => return (n, Some(Ok(()))),
            Some(Err(e)) => return (n, Some(Err(e))),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[test]
    fn the_link_is_measured_by_the_time_that_it_takes_to_take_bytes() {
        let carried = Carried::default();
        assert_eq!(carried.link_rate(1), None);
        carried.out.store(100 << 20, Ordering::Relaxed);
        carried.writing_us.store(2_000_000, Ordering::Relaxed);
        assert_eq!(carried.link_rate(1), Some(50 << 20));
        assert_eq!(carried.link_rate(2), Some(100 << 20), "two waited at the same time");
        carried.out.store(1 << 20, Ordering::Relaxed);
        assert_eq!(carried.link_rate(1), None, "that is in the buffers still");
    }

    #[test]
    fn the_window_follows_the_round_trip_and_long_links_are_left_to_the_kernel() {
        assert_eq!(window(Duration::ZERO), Some(LEAST_WINDOW));
        assert_eq!(window(Duration::from_micros(50)), Some(LEAST_WINDOW));
        assert_eq!(window(Duration::from_millis(1)), Some(1_250_000));
        assert_eq!(window(Duration::from_millis(10)), None);
        assert_eq!(window(Duration::MAX), None);
    }

    #[tokio::test]
    async fn both_ends_of_a_connection_have_little_room() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        // A handshake that took a busy machine long leaves the window to Linux: another one.
        let (dialled, accepted, measured) = loop {
            let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (accepted, _) = listener.accept().await.unwrap();
            let measured = round_trip(&accepted).unwrap().unwrap();
            if window(measured).is_some() {
                break (dialled, accepted, measured);
            }
        };
        prepare(&dialled).unwrap();
        prepare(&accepted).unwrap();
        let received = SockRef::from(&accepted).recv_buffer_size().unwrap();
        if nix::unistd::geteuid().is_root() {
            // Linux doubles what it is told, for its own records.
            assert_eq!(Some(received), window(measured).map(|window| window * 2), "{measured:?}");
        } else {
            println!("not root: the receive window is left to Linux");
        }
        assert_eq!(SockRef::from(&dialled).tcp_notsent_lowat().unwrap(), UNSENT);
    }

    #[tokio::test]
    async fn what_is_there_goes_on_together_also_before_an_error() {
        let reset = io::ErrorKind::ConnectionReset;
        let pieces = [Ok(&b"one "[..]), Ok(&b"two"[..]), Err(io::Error::from(reset))];
        let mut from = tokio_util::io::StreamReader::new(futures::stream::iter(pieces));
        let mut buffer = [0; 64];
        let (n, end) = gather(&mut from, &mut buffer).await;
        assert_eq!(buffer.get(..n), Some(&b"one two"[..]));
        assert_eq!(end.unwrap().unwrap_err().kind(), reset);
    }

    #[tokio::test]
    async fn what_a_slow_link_has_taken_counts_before_it_has_taken_all() {
        let (mut qemu, local) = tokio::io::duplex(10_000);
        let (channel, mut peer) = tokio::io::duplex(64);
        qemu.write_all(&[7; 10_000]).await.unwrap();
        let carried = Arc::new(Carried::default());
        let task = tokio::spawn(pump(local, channel, carried.clone()));
        peer.read_exact(&mut [0; 100]).await.unwrap();
        let taken = carried.out.load(Ordering::Relaxed);
        assert!((100..=164).contains(&taken), "{taken}");
        task.abort();
    }

    #[tokio::test]
    async fn both_directions_are_carried_counted_and_closed() {
        let (mut qemu, local) = tokio::io::duplex(64);
        let (channel, mut peer) = tokio::io::duplex(64);
        let carried = Arc::new(Carried::default());
        let task = tokio::spawn(pump(local, channel, carried.clone()));
        let sent = vec![7u8; 10_000];
        let to_send = sent.clone();
        let writer = tokio::spawn(async move {
            qemu.write_all(&to_send).await.unwrap();
            qemu.shutdown().await.unwrap();
            let mut answer = Vec::new();
            qemu.read_to_end(&mut answer).await.unwrap();
            answer
        });
        let mut got = Vec::new();
        peer.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, sent);
        peer.write_all(b"ok").await.unwrap();
        peer.shutdown().await.unwrap();
        assert_eq!(writer.await.unwrap(), b"ok");
        task.await.unwrap().unwrap();
        assert_eq!(carried.out.load(Ordering::Relaxed), 10_000);
        assert_eq!(carried.back.load(Ordering::Relaxed), 2);
    }
}
