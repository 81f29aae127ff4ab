//! The listening half's part of a post-copy that goes on over another link: which link counts.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

/// The links of one memory stream, one after another. 0 is the one that it began with.
#[derive(Default)]
pub struct Recoveries {
    latest: watch::Sender<u64>,
    expected: Mutex<Option<Expected>>,
    /// The last link whose main connection has reached QEMU.
    connected: watch::Sender<u64>,
}

struct Expected {
    number: u64,
    socket: String,
    /// Its connections that have come.
    taken: BTreeSet<u8>,
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
            let expected = Expected { number, socket, taken: BTreeSet::new() };
            *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = Some(expected);
        }
    }

    /// Takes connection `stream` of the link of this number, once: the socket that it leads to. Whether such a link has that
    /// connection is the caller's to know.
    pub fn admit(&self, number: u64, stream: u8) -> Result<String, String> {
        let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        match expected.as_mut().filter(|expected| expected.number == number) {
            Some(expected) => match expected.taken.insert(stream) {
                true => Ok(expected.socket.clone()),
                false => Err(format!("connection {stream} of link {number} has been connected before")),
            },
            None => Err(format!("link {number} of this migration's memory stream is not expected (any more)")),
        }
    }

    /// The main connection of this link has reached QEMU.
    pub fn main_is_connected(&self, number: u64) {
        self.connected.send_if_modified(|connected| {
            let later = number > *connected;
            *connected = number.max(*connected);
            later
        });
    }

    /// Returns when [`Recoveries::main_is_connected`]: QEMU takes the first connection of a link for the main one.
    pub async fn main_connection(&self, number: u64) {
        // The sender lives as long as this.
        let _ = self.connected.subscribe().wait_for(|connected| *connected >= number).await;
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
        assert!(recoveries.admit(0, 0).is_err(), "nothing is expected yet");
        let first = recoveries.begin(1000);
        assert_eq!(first, 1000);
        recoveries.expect(first, "a".into());
        assert!(recoveries.admit(7, 0).is_err());
        assert_eq!(recoveries.admit(first, 0).unwrap(), "a");
        assert!(recoveries.admit(first, 0).is_err(), "once");
        assert_eq!(recoveries.admit(first, 1).unwrap(), "a", "another connection of the same link");
        assert!(recoveries.admit(first, 1).is_err(), "once");
        recoveries.main_is_connected(first);
        recoveries.main_connection(first).await;
        recoveries.superseded(0).await;
        let second = recoveries.begin(900);
        assert!(second > first, "whatever the clock says");
        recoveries.superseded(first).await;
        recoveries.expect(first, "late".into());
        assert!(recoveries.admit(first, 0).is_err());
        recoveries.expect(second, "b".into());
        assert_eq!(recoveries.admit(second, 0).unwrap(), "b");
    }
}
