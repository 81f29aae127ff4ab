//! Connections to the guest's echo service: one that is always busy, and some that keep silent.

use super::Error;
use godwit_network::Namespace;
use nix::sys::socket::GetSockOpt;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(10);
/// A connection over which nothing comes back for so long is dead, whatever its sockets say.
const SILENCE: Duration = Duration::from_secs(60);
/// Bytes written and read at once.
const CHUNK: usize = 16 * 1024;

/// The bytes of a stream: each follows from its place, so that one that is missing, doubled or damaged is seen.
fn fill(from: u64, buffer: &mut [u8]) {
    for (place, byte) in (from..).zip(buffer.iter_mut()) {
        // The finaliser of SplitMix64 over the number of the eight bytes that it is one of.
        let mut word = (place / 8).wrapping_add(0x9e37_79b9_7f4a_7c15);
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        *byte = (word ^ (word >> 31)).to_le_bytes()[(place % 8) as usize];
    }
}

/// What came of the busy connection so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Bytes that came back as they were sent, in their order.
    pub verified: u64,
    /// The longest time between two arrivals since the last [`Busy::pause`].
    pub longest_pause: Duration,
    /// Segments that TCP sent again.
    pub retransmitted: u32,
    /// What went wrong, if anything did.
    pub wrong: Option<String>,
}

#[derive(Default)]
struct Account {
    verified: AtomicU64,
    longest_us: AtomicU64,
    /// The whole stream has come back, and its end.
    over: AtomicBool,
    wrong: Mutex<Option<String>>,
}

impl Account {
    /// The first thing that goes wrong counts.
    fn complain(&self, what: String) {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
    }
}

/// A connection over which bytes go to and fro as fast as the guest can.
pub struct Busy {
    stream: TcpStream,
    account: Arc<Account>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    /// Connects, and begins.
    pub fn start(client: &Namespace, to: SocketAddr) -> Result<Self, Error> {
        let io = |what: &str| {
            let what = format!("{what} {to}");
            move |e| Error::io(what, e)
        };
        let stream = client.connect(to, CONNECT)?;
        stream.set_read_timeout(Some(SILENCE)).map_err(io("set up the connection to"))?;
        let (account, stop) = (Arc::new(Account::default()), Arc::new(AtomicBool::new(false)));
        let mut busy = Self { stream, account, stop, threads: Vec::new() };
        let (mut out, flag, account) = (busy.handle()?, busy.stop.clone(), busy.account.clone());
        busy.spawn("stream-out", move || send(&mut out, &flag, &account))?;
        let (mut back, account) = (busy.handle()?, busy.account.clone());
        busy.spawn("stream-in", move || verify(&mut back, &account))?;
        Ok(busy)
    }

    fn handle(&self) -> Result<TcpStream, Error> {
        self.stream.try_clone().map_err(|e| Error::io("share a connection", e))
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(work);
        self.threads.push(thread.map_err(|e| Error::io("start a thread", e))?);
        Ok(())
    }

    /// What came of it so far; the longest pause counts anew from here.
    pub fn pause(&self) -> Flow {
        Flow {
            verified: self.account.verified.load(Ordering::Acquire),
            longest_pause: Duration::from_micros(self.account.longest_us.swap(0, Ordering::AcqRel)),
            retransmitted: retransmitted(&self.stream),
            wrong: self.account.wrong.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Ends it in order: what was sent has to come back, and then the end.
    pub fn finish(mut self) -> Flow {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                self.account.complain("a thread of the bench broke off".into());
            }
        }
        if !self.account.over.load(Ordering::Acquire) {
            self.account.complain("it did not come to its end".into());
        }
        self.pause()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes both threads, whatever they wait for.
        let _ = self.stream.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn send(stream: &mut TcpStream, stop: &AtomicBool, account: &Account) {
    let mut buffer = [0; CHUNK];
    let mut sent = 0;
    while !stop.load(Ordering::Acquire) {
        fill(sent, &mut buffer);
        if let Err(error) = stream.write_all(&buffer) {
            return account.complain(format!("sending broke after {sent} bytes: {error}"));
        }
        sent += CHUNK as u64;
    }
    if let Err(error) = stream.shutdown(Shutdown::Write) {
        account.complain(format!("its end cannot be sent after {sent} bytes: {error}"));
    }
}

fn verify(stream: &mut TcpStream, account: &Account) {
    let (mut buffer, mut wanted) = ([0; CHUNK], [0; CHUNK]);
    let mut place = 0;
    let mut last = Instant::now();
    loop {
        let length = match stream.read(&mut buffer) {
            Ok(0) => return account.over.store(true, Ordering::Release),
            Ok(length) => length,
            Err(error) => return account.complain(format!("reading broke after {place} bytes: {error}")),
        };
        let now = Instant::now();
        account.longest_us.fetch_max(now.duration_since(last).as_micros() as u64, Ordering::AcqRel);
        last = now;
        fill(place, &mut wanted[..length]);
        if let Some(at) = buffer[..length].iter().zip(&wanted[..length]).position(|(is, should)| is != should) {
            account.complain(format!("byte {} is not the one that was sent", place + at as u64));
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
        place += length as u64;
        account.verified.store(place, Ordering::Release);
    }
}

/// `tcpi_total_retrans` (linux/tcp.h).
#[derive(Clone, Copy)]
struct TcpInfo;

impl GetSockOpt for TcpInfo {
    type Val = u32;

    fn get<F: AsFd>(&self, of: &F) -> nix::Result<u32> {
        // SAFETY: an all-zero tcp_info is a valid one (integers only).
        let mut info: nix::libc::tcp_info = unsafe { std::mem::zeroed() };
        let mut length = u32::try_from(size_of::<nix::libc::tcp_info>()).unwrap_or_default();
        // SAFETY: pointer and length are those of a tcp_info that lives through the call.
        let got = unsafe {
            nix::libc::getsockopt(
                of.as_fd().as_raw_fd(),
                nix::libc::IPPROTO_TCP,
                nix::libc::TCP_INFO,
                (&raw mut info).cast(),
                &raw mut length,
            )
        };
        nix::errno::Errno::result(got).map(|_| info.tcpi_total_retrans)
    }
}

fn retransmitted(stream: &TcpStream) -> u32 {
    TcpInfo.get(stream).unwrap_or_default()
}

/// Connections over which nothing is sent between their first word and their last.
pub struct Silent(Vec<TcpStream>);

impl Silent {
    /// Makes `count` of them, and has the guest answer once on each.
    pub fn open(client: &Namespace, to: SocketAddr, count: usize) -> Result<Self, Error> {
        let mut streams = Vec::with_capacity(count);
        for _ in 0..count {
            let stream = client.connect(to, CONNECT)?;
            stream.set_read_timeout(Some(SILENCE)).map_err(|e| Error::io("set up a connection", e))?;
            streams.push(stream);
        }
        let silent = Self(streams);
        match silent.ask(1).first() {
            None => Ok(silent),
            Some(wrong) => Err(Error::Guest(format!("does not echo before any move: {wrong}"))),
        }
    }

    /// Sends a word of its own over each, and waits for it to come back; what went wrong with which.
    pub fn ask(&self, round: u64) -> Vec<String> {
        let word = |number: usize| {
            let mut word = [0; 16];
            fill((round << 32) + 16 * number as u64, &mut word);
            word
        };
        // All are asked before the first is waited for: they are peers of one guest at the same time.
        let asked: Vec<_> = self.0.iter().enumerate().map(|(n, mut stream)| stream.write_all(&word(n))).collect();
        let mut wrong = Vec::new();
        for (number, (mut stream, asked)) in self.0.iter().zip(asked).enumerate() {
            let mut answer = [0; 16];
            match asked.and_then(|()| stream.read_exact(&mut answer)) {
                Ok(()) if answer == word(number) => {}
                Ok(()) => wrong.push(format!("connection {number}: another word came back than was sent")),
                Err(error) => wrong.push(format!("connection {number}: {error}")),
            }
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// An echo service that is to go wrong after `good` bytes of each connection.
    fn echo(good: usize, harm: fn(&mut Vec<u8>)) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let (mut buffer, mut seen) = ([0; 4096], 0);
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        let mut bytes = buffer[..length].to_vec();
                        if seen <= good && good < seen + length {
                            harm(&mut bytes);
                        }
                        seen += length;
                        if stream.write_all(&bytes).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    fn here() -> Namespace {
        Namespace::current().unwrap()
    }

    fn flow_until(address: SocketAddr, enough: impl Fn(&Flow) -> bool) -> Flow {
        let busy = Busy::start(&here(), address).unwrap();
        let deadline = Instant::now() + SILENCE;
        while !enough(&busy.pause()) {
            assert!(Instant::now() < deadline, "{:?}", busy.pause());
            std::thread::sleep(Duration::from_millis(1));
        }
        busy.finish()
    }

    #[test]
    fn a_whole_stream_is_right_to_its_end() {
        let flow = flow_until(echo(usize::MAX, |_| ()), |flow| flow.verified > 1 << 20 || flow.wrong.is_some());
        assert_eq!(flow.wrong, None);
        assert_eq!(flow.verified % CHUNK as u64, 0, "all that was sent came back");
    }

    #[test]
    fn a_byte_that_is_changed_missing_or_doubled_is_seen() {
        for harm in
            [|b: &mut Vec<u8>| b[0] ^= 1, |b: &mut Vec<u8>| b.truncate(b.len() - 1), |b: &mut Vec<u8>| b.push(b[0])]
        {
            let flow = flow_until(echo(100_000, harm), |flow| flow.wrong.is_some());
            assert!(flow.wrong.as_ref().is_some_and(|wrong| wrong.contains("is not the one")), "{flow:?}");
        }
    }

    #[test]
    fn a_connection_that_ends_is_not_taken_for_a_whole_one() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let guest = std::thread::spawn(move || drop(listener.accept()));
        let flow = flow_until(address, |flow| flow.wrong.is_some());
        assert!(flow.wrong.is_some());
        guest.join().unwrap();
    }

    #[test]
    fn silent_connections_are_each_asked() {
        let address = echo(20, |bytes| bytes[0] ^= 1);
        let silent = Silent::open(&here(), address, 5).unwrap();
        let wrong = silent.ask(2);
        assert_eq!(wrong.len(), 5, "{wrong:?}");
        assert_eq!(silent.ask(3), Vec::<String>::new());
    }
}
