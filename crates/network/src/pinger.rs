//! Pings an address many times a second and keeps account of every answer.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recvmsg, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde::Serialize;

use crate::{Error, Namespace, Result};

/// One ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// When it was sent, in microseconds since the start.
    pub sent_us: u64,
    /// How long its answer took, in microseconds; none if it never came (or has not come yet).
    pub rtt_us: Option<u64>,
}

/// What came of the pings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// When it began, in microseconds since the Unix epoch.
    pub started_us: i64,
    /// How many were sent.
    pub sent: u64,
    /// How many were answered.
    pub received: u64,
    /// How many never were. In a report of a running pinger, the last few may only be on their way.
    pub lost: u64,
    /// Answers that came a second time. Two machines with one address would show here.
    pub duplicates: u64,
    /// The longest time between two successive answers, in microseconds.
    pub longest_gap_us: u64,
    /// When that time began, in microseconds since the start.
    pub longest_gap_at_us: u64,
    /// Shortest, mean and longest time from ping to answer, in microseconds.
    pub rtt_us: (u64, u64, u64),
    /// Every ping in order.
    pub samples: Vec<Sample>,
}

impl Report {
    /// The pings that were sent between two moments, in microseconds since the Unix epoch.
    pub fn between(&self, from_us: i64, to_us: i64) -> impl Iterator<Item = &Sample> {
        let offset = |us: i64| u64::try_from(us.saturating_sub(self.started_us)).unwrap_or(0);
        let span = offset(from_us)..offset(to_us);
        self.samples.iter().filter(move |sample| span.contains(&sample.sent_us))
    }
}

#[derive(Debug, Default)]
struct Account {
    started_us: i64,
    samples: Vec<Sample>,
    duplicates: u64,
    /// Arrival times of first answers, in microseconds since the start.
    arrivals: Vec<u64>,
}

impl Account {
    fn report(&self) -> Report {
        let sent = self.samples.len() as u64;
        let rtts: Vec<u64> = self.samples.iter().filter_map(|sample| sample.rtt_us).collect();
        let received = rtts.len() as u64;
        let mut arrivals = self.arrivals.clone();
        arrivals.sort_unstable();
        let (mut longest_gap_us, mut longest_gap_at_us) = (0, 0);
        for (before, after) in arrivals.iter().zip(arrivals.iter().skip(1)) {
            if after - before > longest_gap_us {
                (longest_gap_us, longest_gap_at_us) = (after - before, *before);
            }
        }
        let mean = rtts.iter().sum::<u64>().checked_div(received).unwrap_or(0);
        Report {
            started_us: self.started_us,
            sent,
            received,
            lost: sent - received,
            duplicates: self.duplicates,
            longest_gap_us,
            longest_gap_at_us,
            rtt_us: (rtts.iter().min().copied().unwrap_or(0), mean, rtts.iter().max().copied().unwrap_or(0)),
            samples: self.samples.clone(),
        }
    }
}

/// A running pinger: two threads, one sends at fixed times, one receives. Stops on drop.
#[derive(Debug)]
pub struct Pinger {
    account: Arc<Mutex<Account>>,
    stop_sending: Arc<AtomicBool>,
    stop_receiving: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// How long answers are awaited after the last ping.
const GRACE: Duration = Duration::from_secs(1);
/// Our mark in the payload of a ping, followed by the pinger's own number and the sequence number, eight bytes each.
const MARK: &[u8; 8] = b"godwit\0\x01";

impl Pinger {
    /// Pings `address` from inside `namespace`, once every `interval`.
    ///
    /// # Errors
    /// No permission for raw sockets; an interval of zero.
    pub fn start(namespace: &Namespace, address: Ipv4Addr, interval: Duration) -> Result<Self> {
        if interval.is_zero() {
            return Err(Error::Invalid("the interval between pings must be longer than zero".into()));
        }
        let opened = namespace.run(open)?;
        let socket =
            Arc::new(opened.map_err(|e| Error::io(format!("open a ping socket in {}", namespace.label()), e))?);
        let (stop_sending, stop_receiving) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let clock = Clock { start: SystemTime::now() };
        let started = clock.start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros();
        let started_us = i64::try_from(started).unwrap_or_default();
        let account = Arc::new(Mutex::new(Account { started_us, ..Account::default() }));
        // Distinguishes pingers, also those of other processes, by their own addresses in memory and process numbers.
        let token = (u64::from(std::process::id()) << 32) ^ (Arc::as_ptr(&account) as u64);
        let identifier = (token ^ (token >> 16) ^ (token >> 32)) as u16;

        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(work).map_err(|e| Error::io("start a thread", e))
        };
        let mut pinger = Self {
            account: account.clone(),
            stop_sending: stop_sending.clone(),
            stop_receiving: stop_receiving.clone(),
            threads: Vec::new(),
        };
        let receiver = {
            let (socket, account) = (socket.clone(), account.clone());
            Box::new(move || receive(&socket, &account, &clock, token, &stop_receiving))
        };
        pinger.threads.push(spawn("ping-in", receiver)?);
        let sender = Box::new(move || {
            let to = SockaddrIn::from(SocketAddrV4::new(address, 0));
            let mut next = Instant::now();
            while !stop_sending.load(Ordering::Relaxed) {
                let sequence = {
                    let mut account = account.lock().unwrap_or_else(PoisonError::into_inner);
                    account.samples.push(Sample { sent_us: clock.now(), rtt_us: None });
                    account.samples.len() as u64 - 1
                };
                // A ping that cannot be sent (no route for a moment) is a lost one.
                let _ = sendto(socket.as_raw_fd(), &packet(identifier, token, sequence), &to, MsgFlags::empty());
                // Times are fixed ahead, so that a late one does not shift the rest.
                next += interval;
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        pinger.threads.push(spawn("ping-out", sender)?);
        Ok(pinger)
    }

    /// The account so far.
    pub fn report(&self) -> Report {
        self.account.lock().unwrap_or_else(PoisonError::into_inner).report()
    }

    /// Stops, waits up to a second for answers that are on their way, and gives the account.
    pub fn stop(self) -> Report {
        self.stop_within(GRACE)
    }

    /// The same, with more or less patience for the last answers.
    pub fn stop_within(mut self, grace: Duration) -> Report {
        self.finish(grace);
        self.report()
    }

    fn finish(&mut self, grace: Duration) {
        self.stop_sending.store(true, Ordering::Relaxed);
        if self.threads.len() == 2
            && let Some(sender) = self.threads.pop()
        {
            let _ = sender.join();
        }
        let end = Instant::now() + grace;
        let waiting = || {
            let account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
            let recent = account.samples.iter().rev().take(1000);
            recent.into_iter().any(|sample| sample.rtt_us.is_none())
        };
        while Instant::now() < end && waiting() {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.stop_receiving.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.finish(Duration::ZERO);
    }
}

#[derive(Clone, Copy)]
struct Clock {
    start: SystemTime,
}

impl Clock {
    fn at(&self, time: SystemTime) -> u64 {
        u64::try_from(time.duration_since(self.start).unwrap_or_default().as_micros()).unwrap_or(u64::MAX)
    }

    fn now(&self) -> u64 {
        self.at(SystemTime::now())
    }
}

fn open() -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)?;
    // The kernel stamps arrivals, so that a busy machine does not lengthen the times.
    setsockopt(&fd, sockopt::ReceiveTimestampns, &true)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))?;
    Ok(fd)
}

fn packet(identifier: u16, token: u64, sequence: u64) -> [u8; 56] {
    let mut bytes = [0; 56];
    bytes[0] = 8; // echo request, RFC 792
    bytes[4..6].copy_from_slice(&identifier.to_be_bytes());
    bytes[6..8].copy_from_slice(&(sequence as u16).to_be_bytes());
    bytes[8..16].copy_from_slice(MARK);
    bytes[16..24].copy_from_slice(&token.to_be_bytes());
    bytes[24..32].copy_from_slice(&sequence.to_be_bytes());
    let mut sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    bytes[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    bytes
}

/// The sequence number in an IP packet that is an answer to one of our pings.
fn sequence(packet: &[u8], token: u64) -> Option<u64> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let icmp = packet.get(header..)?;
    let number = |at: usize| Some(u64::from_be_bytes(icmp.get(at..at + 8)?.try_into().ok()?));
    (icmp.first() == Some(&0) && icmp.get(8..16)? == MARK && number(16)? == token).then(|| number(24)).flatten()
}

fn receive(socket: &OwnedFd, account: &Mutex<Account>, clock: &Clock, token: u64, stop: &AtomicBool) {
    let mut buffer = [0; 1500];
    let mut control = nix::cmsg_space!(nix::sys::time::TimeSpec);
    while !stop.load(Ordering::Relaxed) {
        let (length, time) = {
            let mut slices = [io::IoSliceMut::new(&mut buffer)];
            let Ok(message) =
                recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty())
            else {
                continue; // the timeout, for the most part; errors of the network are not ours to report
            };
            let stamp = message.cmsgs().ok().and_then(|mut all| {
                all.find_map(|one| if let ControlMessageOwned::ScmTimestampns(time) = one { Some(time) } else { None })
            });
            let time = stamp.map_or_else(SystemTime::now, |time| SystemTime::UNIX_EPOCH + Duration::from(time));
            (message.bytes, clock.at(time))
        };
        let Some(sequence) = buffer.get(..length).and_then(|packet| sequence(packet, token)) else { continue };
        let mut account = account.lock().unwrap_or_else(PoisonError::into_inner);
        let sample = usize::try_from(sequence).ok().and_then(|index| account.samples.get_mut(index));
        match sample {
            Some(sample) if sample.rtt_us.is_none() => {
                sample.rtt_us = Some(time.saturating_sub(sample.sent_us));
                account.arrivals.push(time);
            }
            Some(_) => account.duplicates += 1,
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_account_finds_the_longest_gap() {
        let sample = |sent_us, rtt_us| Sample { sent_us, rtt_us };
        let account = Account {
            started_us: 1_000,
            samples: vec![sample(0, Some(10)), sample(100, None), sample(200, Some(30)), sample(300, Some(20))],
            duplicates: 0,
            arrivals: vec![10, 230, 320],
        };
        let report = account.report();
        assert_eq!((report.sent, report.received, report.lost), (4, 3, 1));
        assert_eq!((report.longest_gap_us, report.longest_gap_at_us), (220, 10));
        assert_eq!(report.rtt_us, (10, 20, 30));
        let between: Vec<u64> = report.between(1_100, 1_300).map(|ping| ping.sent_us).collect();
        assert_eq!(between, [100, 200]);
        assert_eq!(report.between(0, 1_001).count(), 1);
    }

    #[test]
    fn only_own_answers_count() {
        let mut reply = vec![0x45; 20];
        reply.extend(packet(1, 77, 5));
        assert_eq!(sequence(&reply, 77), None, "a request is no answer");
        reply[20] = 0;
        assert_eq!(sequence(&reply, 77), Some(5));
        assert_eq!(sequence(&reply, 78), None);
        for length in 0..reply.len() {
            let _ = sequence(&reply[..length], 77);
        }
    }
}
