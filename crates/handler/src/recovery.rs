//! The listening half's part of a post-copy that goes on over another link: which link counts.

use std::io;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

/// The links of one memory stream, one after another. 0 is the one that it began with.
#[derive(Default)]
pub struct Recoveries {
    latest: watch::Sender<u64>,
    expected: Mutex<Option<(u64, String)>>,
}

impl Recoveries {
    /// Begins another one: all earlier ones are over. Its number is greater than any that an earlier process has given
    /// (`now_us`, microseconds since the epoch).
    pub fn begin(&self, now_us: i64) -> u64 {
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let mut number = 0;
        self.latest.send_modify(|latest| {
            number = u64::try_from(now_us).unwrap_or(0).max(*latest + 1);
            *latest = number;
        });
        number
    }

    /// The launcher's QEMU waits for this one on that socket.
    pub fn expect(&self, number: u64, socket: String) {
        if *self.latest.borrow() == number {
            *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = Some((number, socket));
        }
    }

    /// Takes the link of this number, once: the socket that it leads to.
    pub fn admit(&self, number: u64) -> Result<String, String> {
        let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        match expected.take_if(|(expected, _)| *expected == number) {
            Some((_, socket)) => Ok(socket),
            None => Err(format!("link {number} of this migration's memory stream is not expected (any more)")),
        }
    }

    /// Returns when a later link than this has begun.
    pub async fn superseded(&self, number: u64) -> io::Error {
        let mut latest = self.latest.subscribe();
        // The sender lives as long as this.
        let _ = latest.wait_for(|latest| *latest > number).await;
        io::Error::new(io::ErrorKind::ConnectionAborted, "the source takes another link for this memory stream")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_link_comes_in_once_and_ends_with_the_next_one() {
        let recoveries = Recoveries::default();
        assert!(recoveries.admit(0).is_err(), "nothing is expected yet");
        let first = recoveries.begin(1000);
        assert_eq!(first, 1000);
        recoveries.expect(first, "a".into());
        assert!(recoveries.admit(7).is_err());
        assert_eq!(recoveries.admit(first).unwrap(), "a");
        assert!(recoveries.admit(first).is_err(), "once");
        recoveries.superseded(0).await;
        let second = recoveries.begin(900);
        assert!(second > first, "whatever the clock says");
        recoveries.superseded(first).await;
        recoveries.expect(first, "late".into());
        assert!(recoveries.admit(first).is_err());
        recoveries.expect(second, "b".into());
        assert_eq!(recoveries.admit(second).unwrap(), "b");
    }
}
