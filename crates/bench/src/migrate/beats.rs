//! The witness: the guest sends a numbered datagram every 2 ms (`guests/init`), and here is when each arrived.

use godwit_network::Namespace;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, setsockopt, sockopt};
use nix::sys::time::TimeVal;
use serde::Serialize;
use std::collections::BTreeSet;
use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use super::{Error, now_us};

/// One heartbeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    /// When it arrived, in microseconds since the Unix epoch, by the kernel's stamp.
    pub at_us: i64,
    /// Which life of the guest sent it: an index into the tokens seen, in order.
    pub life: usize,
    /// Its number.
    pub number: u64,
}

/// What the witness saw in a span of time.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Testimony {
    /// The silence in which the guest ran again at the target: from the last heartbeat before it to the first after, in
    /// milliseconds. None without heartbeats around it.
    pub around_resume_ms: Option<f64>,
    /// The longest silence of the whole span, in milliseconds.
    pub longest_ms: Option<f64>,
    /// The usual time between two heartbeats in this span (median), in milliseconds.
    pub usual_ms: Option<f64>,
    /// Heartbeats that did not arrive.
    pub lost: u64,
    /// Something that must never be: two lives, or a number twice.
    pub wrong: Option<String>,
}

/// Listens until dropped.
#[derive(Debug)]
pub struct Witness {
    heard: Arc<Mutex<Heard>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Heard {
    tokens: Vec<String>,
    beats: Vec<Beat>,
}

impl Heard {
    fn hear(&mut self, text: &str, at_us: i64) {
        let Some((token, number)) = text.split_once(' ').and_then(|(t, n)| Some((t, n.parse().ok()?))) else { return };
        let life = match self.tokens.iter().position(|known| known == token) {
            Some(life) => life,
            None => {
                self.tokens.push(token.to_owned());
                self.tokens.len() - 1
            }
        };
        self.beats.push(Beat { at_us, life, number });
    }
}

impl Witness {
    /// Listens on an address inside the namespace.
    ///
    /// # Errors
    /// The address is taken, or not the namespace's.
    pub fn listen(namespace: &Namespace, address: SocketAddr) -> Result<Self, Error> {
        let socket = namespace.udp(address)?;
        let failed = |e: nix::Error| Error::io("prepare the witness's socket", e.into());
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true).map_err(failed)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000)).map_err(failed)?;
        let (heard, stop) = (Arc::new(Mutex::new(Heard::default())), Arc::new(AtomicBool::new(false)));
        let (into, told) = (heard.clone(), stop.clone());
        let thread = std::thread::Builder::new()
            .name("witness".into())
            .spawn(move || receive(&socket, &into, &told))
            .map_err(|e| Error::io("start a thread", e))?;
        Ok(Self { heard, stop, thread: Some(thread) })
    }

    /// Forgets what it heard.
    pub fn clear(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Heard::default();
    }

    /// What it heard between two moments, where the guest ran again at `resumed_us`. All in microseconds since the Unix epoch.
    pub fn testify(&self, from_us: i64, to_us: i64, resumed_us: i64) -> Testimony {
        testify(&self.heard.lock().unwrap_or_else(PoisonError::into_inner).beats, from_us, to_us, resumed_us)
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn receive(socket: &UdpSocket, heard: &Mutex<Heard>, stop: &AtomicBool) {
    let mut buffer = [0; 256];
    let mut control = nix::cmsg_space!(nix::sys::time::TimeSpec);
    while !stop.load(Ordering::Relaxed) {
        let (length, at_us) = {
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let Ok(message) =
                recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty())
            else {
                continue; // the timeout
            };
            let stamp = message.cmsgs().ok().and_then(|mut all| {
                all.find_map(|one| if let ControlMessageOwned::ScmTimestampns(time) = one { Some(time) } else { None })
            });
            let at_us = stamp.map(|time| SystemTime::UNIX_EPOCH + Duration::from(time));
            let at_us = at_us.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
            (message.bytes, at_us.and_then(|d| i64::try_from(d.as_micros()).ok()).unwrap_or_else(now_us))
        };
        if let Some(text) = buffer.get(..length).and_then(|bytes| std::str::from_utf8(bytes).ok()) {
            heard.lock().unwrap_or_else(PoisonError::into_inner).hear(text, at_us);
        }
    }
}

fn testify(beats: &[Beat], from_us: i64, to_us: i64, resumed_us: i64) -> Testimony {
    let mut order: Vec<&Beat> = beats.iter().collect();
    // Stamps are the kernel's, and what lay in a queue may be handed over late.
    order.sort_by_key(|beat| beat.at_us);
    // One before and one after the span close the silences at its ends.
    let first = order.partition_point(|beat| beat.at_us < from_us).saturating_sub(1);
    let last = (order.partition_point(|beat| beat.at_us <= to_us) + 1).min(order.len());
    let span = order.get(first..last).unwrap_or_default();
    let ms = |us: i64| us as f64 / 1e3;
    let mut silences: Vec<i64> = Vec::with_capacity(span.len());
    let mut around = None;
    for pair in span.windows(2) {
        let [before, after] = pair else { continue };
        let silence = after.at_us - before.at_us;
        silences.push(silence);
        if (before.at_us..after.at_us).contains(&resumed_us) {
            around = Some(silence);
        }
    }
    silences.sort_unstable();
    let lives: BTreeSet<usize> = span.iter().map(|beat| beat.life).collect();
    let numbers: BTreeSet<u64> = span.iter().map(|beat| beat.number).collect();
    let wrong = if lives.len() > 1 {
        Some(format!("heartbeats of {} lives: the guest was started anew, or runs twice", lives.len()))
    } else if numbers.len() < span.len() {
        Some(format!("{} heartbeats came twice: the guest ran twice", span.len() - numbers.len()))
    } else {
        None
    };
    let width = numbers.last().zip(numbers.first()).map_or(0, |(last, first)| last - first + 1);
    Testimony {
        around_resume_ms: around.map(ms),
        longest_ms: silences.last().copied().map(ms),
        usual_ms: silences.get(silences.len() / 2).copied().map(ms),
        lost: width.saturating_sub(numbers.len() as u64),
        wrong,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beats(times: &[i64]) -> Vec<Beat> {
        times.iter().enumerate().map(|(n, at)| Beat { at_us: *at, life: 0, number: n as u64 }).collect()
    }

    #[test]
    fn the_silence_of_the_switchover_is_told_from_the_longest() {
        let all = beats(&[0, 2_000, 4_000, 24_000, 26_000, 33_000, 35_000, 37_000]);
        let seen = testify(&all, 1_000, 36_000, 30_000);
        assert_eq!((seen.around_resume_ms, seen.longest_ms), (Some(7.0), Some(20.0)));
        assert_eq!((seen.usual_ms, seen.lost, seen.wrong), (Some(2.0), 0, None));
        assert_eq!(
            testify(&all, 33_000, 36_000, 34_000).longest_ms,
            Some(7.0),
            "a silence that begins before the span"
        );
        assert_eq!(testify(&[], 0, 10, 5), Testimony::default());
        assert_eq!(testify(&all, 36_500, 40_000, 39_000).around_resume_ms, None, "it never came back");
    }

    #[test]
    fn missing_and_doubled_heartbeats_and_other_lives_are_seen() {
        let mut all = beats(&[0, 2_000, 4_000]);
        all[2].number = 7;
        assert_eq!(testify(&all, 0, 4_000, 1_000).lost, 5);
        all[2].number = 1;
        assert!(testify(&all, 0, 4_000, 1_000).wrong.unwrap().contains("ran twice"));
        all[2] = Beat { at_us: 4_000, life: 1, number: 2 };
        assert!(testify(&all, 0, 4_000, 1_000).wrong.unwrap().contains("2 lives"));
    }

    #[test]
    fn datagrams_are_read_and_noise_is_not() {
        let mut heard = Heard::default();
        for text in ["abc 7", "abc 8", "def 1", "abc", "abc x", ""] {
            heard.hear(text, 5);
        }
        let seen: Vec<_> = heard.beats.iter().map(|b| (b.life, b.number)).collect();
        assert_eq!(seen, [(0, 7), (0, 8), (1, 1)]);
    }
}
