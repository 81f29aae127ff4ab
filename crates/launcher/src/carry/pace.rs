//! Keeping below the cap what QEMU does not: the copies of disks, which no limit holds for once both sides were the same, and
//! in post-copy the pages that the guest waits for.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::rpc::{MigrationRole, State};

/// What may be sent at once after a pause.
const BURST: Duration = Duration::from_millis(50);
/// The longest sleep, so that another limit counts soon.
const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// A piece that is read at once lasts no longer than this at the limit, so that nobody else's waits for long.
const PIECE: Duration = Duration::from_millis(10);
/// The least that is read at once, in bytes, however low the limit.
const LEAST_PIECE: usize = 4096;

/// Whose bytes go first where several connections share a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// They wait until the limit has room.
    Ordinary,
    /// They go before those, on account, up to what a burst is; then they wait as well.
    Urgent,
}

/// How many bytes a second the connections that share it may carry.
#[derive(Debug)]
pub struct Pace(Mutex<Bucket>);

#[derive(Debug)]
struct Bucket {
    bytes_per_second: Option<u64>,
    /// What may still be sent; less than nothing when a piece was larger than what was left.
    tokens: f64,
    filled: Instant,
}

impl Pace {
    /// No limit where there is no rate.
    #[must_use]
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self(Mutex::new(Bucket::new(bytes_per_second, Instant::now())))
    }

    /// Another limit from now on.
    pub fn set(&self, bytes_per_second: Option<u64>) {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.fill(Instant::now());
        bucket.bytes_per_second = bytes_per_second;
    }

    /// How long to wait before the next piece, or how large that may be.
    fn next(&self, share: Share) -> Result<usize, Duration> {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.wait(share, Instant::now()).map_or_else(|| Ok(bucket.piece()), Err)
    }

    fn spend(&self, bytes: usize) {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.tokens -= bytes as f64;
    }
}

impl Bucket {
    fn new(bytes_per_second: Option<u64>, now: Instant) -> Self {
        Self { bytes_per_second, tokens: 0.0, filled: now }
    }

    fn wait(&mut self, share: Share, now: Instant) -> Option<Duration> {
        self.fill(now);
        let rate = self.bytes_per_second?.max(1) as f64;
        let on_account = if share == Share::Urgent { rate * BURST.as_secs_f64() } else { 0.0 };
        if self.tokens + on_account >= 0.0 {
            return None;
        }
        let seconds = -(self.tokens + on_account) / rate;
        Some(Duration::from_secs_f64(seconds.min(LONGEST_WAIT.as_secs_f64())).max(Duration::from_millis(1)))
    }

    /// The most that is read at once, in bytes.
    fn piece(&self) -> usize {
        self.bytes_per_second.map_or(usize::MAX, |rate| {
            usize::try_from(rate / 1000 * PIECE.as_millis() as u64).unwrap_or(usize::MAX).max(LEAST_PIECE)
        })
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.duration_since(self.filled);
        self.filled = now;
        match self.bytes_per_second {
            None => self.tokens = 0.0,
            Some(rate) => {
                let most = rate as f64 * BURST.as_secs_f64();
                self.tokens = (self.tokens + rate as f64 * elapsed.as_secs_f64()).min(most);
            }
        }
    }
}

/// What the disks of migration `uid` may take of the cap, by what the source's launcher says: all of it before memory is sent,
/// half beside it (the launcher gives memory what they leave of the whole), and for the last blocks, while the guest stands
/// still, whatever the link carries, as QEMU does with memory. `cap`: what holds as long as the launcher says nothing.
#[must_use]
pub fn share_of_disks(state: Option<&State>, uid: &str, cap: Option<u64>) -> Option<u64> {
    let Some(f) = state.and_then(|state| state.migration_of(uid, MigrationRole::Source)) else { return cap };
    if f.stop_us.is_some() || f.status == "pre-switchover" {
        return None;
    }
    let beside_memory = !matches!(f.status.as_str(), "none" | "setup");
    f.bandwidth_limit.map(|cap| if beside_memory { (cap / 2).max(1) } else { cap })
}

/// What memory may take in post-copy: the cap, by what the source's launcher says. Before that QEMU keeps to it by itself, and
/// sends the last pages, while the guest stands still, as fast as the link carries them.
#[must_use]
pub fn limit_of_post_copy(state: Option<&State>, uid: &str) -> Option<u64> {
    let f = state.and_then(|state| state.migration_of(uid, MigrationRole::Source))?;
    f.bandwidth_limit.filter(|_| f.status.starts_with("postcopy"))
}

/// A stream whose reader is held to a [`Pace`].
pub struct Paced<S> {
    stream: S,
    pace: Arc<Pace>,
    share: Share,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl<S> Paced<S> {
    /// Shares `pace` with others.
    #[must_use]
    pub fn new(stream: S, pace: Arc<Pace>, share: Share) -> Self {
        Self { stream, pace, share, sleep: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let piece = loop {
            if let Some(sleep) = &mut self.sleep {
                ready!(sleep.as_mut().poll(cx));
                self.sleep = None;
            }
            match self.pace.next(self.share) {
                Err(wait) => self.sleep = Some(Box::pin(sleep(wait))),
                Ok(piece) => break piece,
            }
        };
        let mut piece = ReadBuf::new(buf.initialize_unfilled_to(buf.remaining().min(piece)));
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut piece))?;
        let read = piece.filled().len();
        buf.advance(read);
        self.pace.spend(read);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::MigrationFacts;
    use tokio::io::AsyncReadExt;

    /// How long 1 MiB takes in pieces of 16 KiB; in the middle the limit becomes `then`.
    fn seconds(first: Option<u64>, then: Option<u64>) -> f64 {
        let began = Instant::now();
        let mut now = began;
        let mut bucket = Bucket::new(first, now);
        for piece in 0..64 {
            while let Some(wait) = bucket.wait(Share::Ordinary, now) {
                now += wait;
            }
            bucket.tokens -= f64::from(16 << 10);
            if piece == 31 {
                bucket.fill(now);
                bucket.bytes_per_second = then;
            }
        }
        (now - began).as_secs_f64()
    }

    #[test]
    fn the_limit_is_kept_and_another_one_counts_at_once() {
        let (slow, fast) = (Some(256 << 10), Some(512 << 10));
        for (first, then, wanted) in [(slow, slow, 4.0), (slow, fast, 3.0), (None, None, 0.0), (slow, None, 2.0)] {
            let took = seconds(first, then);
            assert!((wanted - 0.2..=wanted + 0.1).contains(&took), "{first:?}, {then:?}: {took}");
        }
    }

    #[test]
    fn what_is_urgent_goes_first_and_both_together_keep_to_the_limit() {
        let rate = 1 << 20;
        let began = Instant::now();
        let (mut now, mut bucket, mut sent) = (began, Bucket::new(Some(rate), began), [0u64; 2]);
        while now - began < Duration::from_secs(4) {
            // There is always something ordinary, and something urgent half of the time.
            let is_urgent = (now - began).as_secs().is_multiple_of(2);
            let shares = [(Share::Urgent, is_urgent), (Share::Ordinary, true)];
            for (n, (share, _)) in shares.into_iter().enumerate().filter(|(_, (_, wants))| *wants) {
                if bucket.wait(share, now).is_none() {
                    let piece = bucket.piece();
                    bucket.tokens -= piece as f64;
                    sent[n] += piece as u64;
                }
            }
            now += Duration::from_millis(1);
        }
        let [urgent, ordinary] = sent.map(|bytes| bytes as f64 / rate as f64);
        assert!((1.9..=2.2).contains(&urgent), "{urgent} of what two seconds carry");
        assert!((1.7..=2.1).contains(&ordinary), "{ordinary}");
        assert!(urgent + ordinary <= 4.1, "{urgent} + {ordinary}");
        assert_eq!(Bucket::new(Some(1), began).piece(), LEAST_PIECE);
        assert_eq!(Bucket::new(None, began).piece(), usize::MAX);
    }

    #[test]
    fn memory_is_held_to_the_cap_only_in_post_copy() {
        let limit = |status: &str| {
            let mut facts = MigrationFacts::new("u", MigrationRole::Source);
            (facts.bandwidth_limit, facts.status) = (Some(100), status.into());
            limit_of_post_copy(Some(&State { migration: Some(facts), ..State::default() }), "u")
        };
        assert_eq!(["active", "device", "pre-switchover", "completed"].map(limit), [None; 4]);
        assert_eq!(["postcopy-active", "postcopy-recover"].map(limit), [Some(100); 2]);
        assert_eq!(limit_of_post_copy(None, "u"), None);
    }

    #[tokio::test]
    async fn a_stream_that_is_held_back_loses_nothing() {
        let pace = Arc::new(Pace::new(Some(4 << 20)));
        let content: Vec<u8> = (0..600_000u32).map(|n| n as u8).collect();
        let mut read = Vec::new();
        Paced::new(tokio::io::join(content.as_slice(), tokio::io::sink()), pace.clone(), Share::Ordinary)
            .read_to_end(&mut read)
            .await
            .unwrap();
        assert!(read == content);
    }

    #[test]
    fn disks_have_the_cap_to_themselves_then_half_of_it_and_at_the_end_all_there_is() {
        let with = |change: &dyn Fn(&mut MigrationFacts)| {
            let mut facts = MigrationFacts::new("u", MigrationRole::Source);
            facts.bandwidth_limit = Some(100);
            change(&mut facts);
            let state = State { migration: Some(facts), ..State::default() };
            share_of_disks(Some(&state), "u", Some(7))
        };
        assert_eq!(share_of_disks(None, "u", Some(7)), Some(7));
        assert_eq!(with(&|f| f.uid = "another".into()), Some(7));
        assert_eq!(with(&|f| f.status = "setup".into()), Some(100));
        assert_eq!(with(&|f| f.status = "active".into()), Some(50));
        assert_eq!(with(&|f| f.bandwidth_limit = None), None);
        assert_eq!(with(&|f| f.stop_us = Some(1)), None);
        assert_eq!(with(&|f| f.status = "pre-switchover".into()), None);
    }
}
