//! Following changes.
//!
//! A watch is a cursor into the image's ring, not a queue: a slow reader costs nothing, and one that falls behind the ring
//! is told so. One channel a prefix wakes only the watches that an event concerns.

use crate::{Error, Event, Result, Shared};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

/// Events that one [`Watch::next`] returns at most.
const BATCH: usize = 256;

/// Carries the newest revision under one prefix.
type Channel = tokio::sync::watch::Sender<u64>;

#[derive(Debug, Default)]
pub(crate) struct Channels {
    by_prefix: Mutex<BTreeMap<Arc<str>, Weak<Channel>>>,
}

impl Channels {
    fn subscribe(&self, prefix: &str) -> Arc<Channel> {
        let mut map = self.by_prefix.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(channel) = map.get(prefix).and_then(Weak::upgrade) {
            return channel;
        }
        map.retain(|_, channel| channel.strong_count() > 0);
        let channel = Arc::new(Channel::new(0));
        map.insert(prefix.into(), Arc::downgrade(&channel));
        channel
    }

    pub(crate) fn notify(&self, events: &[Arc<Event>]) {
        let map = self.by_prefix.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for event in events {
            let key = event.key();
            let folders = key.match_indices('/').map(|(at, _)| &key[..=at]);
            for prefix in folders.chain([key]) {
                if let Some(channel) = map.get(prefix).and_then(Weak::upgrade) {
                    channel.send_replace(event.revision);
                }
            }
        }
    }
}

/// A piece of a watch.
#[derive(Debug)]
pub struct Batch {
    /// In revision order.
    pub events: Vec<Arc<Event>>,
    /// Everything under the prefix up to this revision has been returned.
    pub revision: u64,
}

/// Follows the changes under one prefix; see [`crate::Store::watch`].
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    prefix: Arc<str>,
    cursor: u64,
    /// The newest revision when the channel began to listen for this watch.
    since: u64,
    // Kept so that the channel stays registered.
    _channel: Arc<Channel>,
    receiver: tokio::sync::watch::Receiver<u64>,
}

impl Watch {
    pub(crate) fn new(shared: Arc<Shared>, prefix: &str, after: u64) -> Result<Self> {
        let channel = shared.channels.subscribe(prefix);
        let mut receiver = channel.subscribe();
        // The first look is unconditional: whatever was published before the subscription is in the ring.
        receiver.mark_changed();
        let (oldest, since) = {
            let image = shared.image();
            (image.oldest(), image.revision())
        };
        if after < oldest {
            return Err(Error::Compacted { requested: after, oldest });
        }
        Ok(Self { shared, prefix: prefix.into(), cursor: after, since, _channel: channel, receiver })
    }

    /// The revision up to which everything has been returned.
    pub fn revision(&self) -> u64 {
        self.cursor
    }

    /// Whether [`Watch::poll`] may have something; cheap.
    pub fn has_changed(&self) -> bool {
        self.receiver.has_changed().unwrap_or(true)
    }

    /// What there is now, without waiting. Moves [`Watch::revision`] on even if there is nothing.
    pub fn poll(&mut self) -> Result<Batch> {
        // The image first: the writer notifies while it holds the image, so `newest` is never behind it.
        let image = self.shared.image();
        let newest = *self.receiver.borrow_and_update();
        let oldest = image.oldest();
        if self.cursor < oldest {
            // The channel was there all the time; if it saw nothing since, nothing was missed.
            if newest > self.cursor || self.since > self.cursor {
                return Err(Error::Compacted { requested: self.cursor, oldest });
            }
            self.cursor = oldest;
        }
        let (events, revision) = image.events(&self.prefix, self.cursor, BATCH);
        drop(image);
        if events.len() == BATCH {
            self.receiver.mark_changed();
        }
        self.cursor = revision;
        Ok(Batch { events, revision })
    }

    /// Waits for changes. Can be dropped at any time without losing events. [`Error::Compacted`] when the reader was so
    /// slow that the log no longer has what comes next.
    pub async fn next(&mut self) -> Result<Batch> {
        loop {
            self.receiver.changed().await.map_err(|_| Error::Closed)?;
            let batch = self.poll()?;
            if !batch.events.is_empty() {
                return Ok(batch);
            }
        }
    }
}
