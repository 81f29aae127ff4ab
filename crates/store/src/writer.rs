//! The one thread that writes.

use crate::disk::Disk;
use crate::{Encode, Entry, Error, Event, Result, Retention, Shared};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// Writes that one commit carries at most.
const BATCH: usize = 256;

pub(crate) enum Op {
    Create(Encode),
    Update(Option<u64>, Encode),
    Delete(Option<u64>),
}

pub(crate) struct Request {
    pub(crate) key: Arc<str>,
    pub(crate) op: Op,
    pub(crate) reply: oneshot::Sender<Result<Arc<Event>>>,
}

pub(crate) struct Writer {
    disk: Disk,
    shared: Arc<Shared>,
    retention: Retention,
}

impl Writer {
    pub(crate) fn new(disk: Disk, shared: Arc<Shared>, retention: Retention) -> Self {
        Self { disk, shared, retention }
    }

    /// Serves until every [`crate::Store`] is gone.
    pub(crate) fn run(self, mut requests: mpsc::Receiver<Request>) {
        let mut batch = Vec::with_capacity(BATCH);
        while requests.blocking_recv_many(&mut batch, BATCH) > 0 {
            self.write(&mut batch);
        }
    }

    fn write(&self, batch: &mut Vec<Request>) {
        let mut events: Vec<Arc<Event>> = Vec::with_capacity(batch.len());
        let mut replies = Vec::with_capacity(batch.len());
        let mut pending: BTreeMap<Arc<str>, Option<Arc<Entry>>> = BTreeMap::new();
        let (mut revision, oldest) = {
            let image = self.shared.image();
            (image.revision(), image.oldest())
        };
        for Request { key, op, reply } in batch.drain(..) {
            let present = match pending.get(&key) {
                Some(entry) => entry.clone(),
                None => self.shared.image().get(&key),
            };
            match change(key.clone(), present, op, revision + 1) {
                Ok(event) => {
                    revision += 1;
                    pending.insert(key, event.new.clone());
                    replies.push((reply, Ok(event.clone())));
                    events.push(event);
                }
                Err(error) => replies.push((reply, Err(error))),
            }
        }
        if !events.is_empty() {
            // The log on disk may keep a little more than the ring; both are cut by the same rule after a restart.
            if let Err(error) = self.disk.commit(&events, oldest) {
                tracing::error!(%error, writes = events.len(), "commit failed");
                for (reply, outcome) in replies {
                    let _ = reply.send(outcome.and(Err(error.clone())));
                }
                return;
            }
            self.publish(events, revision);
        }
        for (reply, outcome) in replies {
            // A caller that no longer waits is no reason to undo.
            let _ = reply.send(outcome);
        }
    }

    fn publish(&self, events: Vec<Arc<Event>>, revision: u64) {
        {
            let mut image = self.shared.image.write().unwrap_or_else(|poisoned| poisoned.into_inner());
            for event in &events {
                image.publish(event.clone());
            }
            // Before anything is forgotten, so that a watch knows whether it missed something.
            self.shared.channels.notify(&events);
            image.trim(self.retention);
        }
        self.shared.revision.send_replace(revision);
    }
}

fn change(key: Arc<str>, present: Option<Arc<Entry>>, op: Op, revision: u64) -> Result<Arc<Event>> {
    let check = |expected: Option<u64>| match (&present, expected) {
        (None, _) => Err(Error::NotFound { key: key.to_string() }),
        (Some(entry), Some(expected)) if entry.revision != expected => {
            Err(Error::Conflict { key: key.to_string(), expected, actual: entry.revision })
        }
        _ => Ok(()),
    };
    let new = match op {
        Op::Create(encode) => match &present {
            Some(entry) => return Err(Error::Exists { key: key.to_string(), revision: entry.revision }),
            None => Some(encode(revision)),
        },
        Op::Update(expected, encode) => {
            check(expected)?;
            Some(encode(revision))
        }
        Op::Delete(expected) => {
            check(expected)?;
            None
        }
    };
    Ok(Event::new(revision, present, new.map(|value| Entry::new(key, revision, value))))
}
