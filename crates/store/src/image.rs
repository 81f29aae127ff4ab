//! The memory image: all objects and the recent past.

use crate::{Entry, Error, Event, List, Result, Retention};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

/// All objects at the newest revision, and the events that led there.
#[derive(Debug, Default)]
pub(crate) struct Image {
    objects: BTreeMap<Arc<str>, Arc<Entry>>,
    /// Contiguous: event i has revision `first + i`; the last one is `revision`.
    ring: VecDeque<Arc<Event>>,
    ring_bytes: usize,
    revision: u64,
}

impl Image {
    pub(crate) fn new(objects: BTreeMap<Arc<str>, Arc<Entry>>, ring: VecDeque<Arc<Event>>, revision: u64) -> Self {
        let ring_bytes = ring.iter().map(|event| event.size()).sum();
        Self { objects, ring, ring_bytes, revision }
    }

    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// Watches and lists can go back to this revision.
    pub(crate) fn oldest(&self) -> u64 {
        self.revision - self.ring.len() as u64
    }

    pub(crate) fn get(&self, key: &str) -> Option<Arc<Entry>> {
        self.objects.get(key).cloned()
    }

    /// Makes a durable event visible.
    pub(crate) fn publish(&mut self, event: Arc<Event>) {
        match &event.new {
            Some(entry) => {
                self.objects.insert(entry.key.clone(), entry.clone());
            }
            None => {
                self.objects.remove(event.key());
            }
        }
        self.revision = event.revision;
        self.ring_bytes += event.size();
        self.ring.push_back(event);
    }

    /// Forgets what is beyond `retention`.
    pub(crate) fn trim(&mut self, retention: Retention) {
        while self.ring.len() > retention.events || (self.ring_bytes > retention.bytes && !self.ring.is_empty()) {
            if let Some(event) = self.ring.pop_front() {
                self.ring_bytes -= event.size();
            }
        }
    }

    /// Up to `limit` events after revision `after` (not older than [`Image::oldest`]) with this prefix, and the
    /// revision up to which they are complete.
    pub(crate) fn events(&self, prefix: &str, after: u64, limit: usize) -> (Vec<Arc<Event>>, u64) {
        let skip = after.saturating_sub(self.oldest()) as usize;
        let mut events = Vec::new();
        for event in self.ring.iter().skip(skip) {
            if event.key().starts_with(prefix) {
                events.push(event.clone());
                if events.len() == limit {
                    return (events, event.revision);
                }
            }
        }
        (events, self.revision.max(after))
    }

    fn from<'a>(&'a self, prefix: &'a str, after: Option<&'a str>) -> impl Iterator<Item = &'a Arc<Entry>> {
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        self.objects
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(_, entry)| entry)
    }

    pub(crate) fn count(&self, prefix: &str) -> usize {
        self.from(prefix, None).count()
    }

    pub(crate) fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> List {
        let mut iter = self.from(prefix, after);
        let entries: Vec<_> = match limit {
            0 => iter.by_ref().cloned().collect(),
            limit => iter.by_ref().take(limit).cloned().collect(),
        };
        List { revision: self.revision, entries, remaining: iter.count() }
    }

    pub(crate) fn list_at(&self, prefix: &str, after: Option<&str>, limit: usize, revision: u64) -> Result<List> {
        if revision == self.revision {
            return Ok(self.list(prefix, after, limit));
        }
        if revision > self.revision {
            return Err(Error::Future { requested: revision, current: self.revision });
        }
        if revision < self.oldest() {
            return Err(Error::Compacted { requested: revision, oldest: self.oldest() });
        }
        // Undo what happened since, newest first.
        let mut past: BTreeMap<&str, &Arc<Entry>> =
            self.from(prefix, after).map(|entry| (&*entry.key, entry)).collect();
        for event in self.ring.iter().skip((revision - self.oldest()) as usize).rev() {
            let key = event.key();
            if !key.starts_with(prefix) || after.is_some_and(|after| key <= after) {
                continue;
            }
            match &event.old {
                Some(old) => past.insert(&old.key, old),
                None => past.remove(key),
            };
        }
        let take = if limit == 0 { past.len() } else { limit.min(past.len()) };
        let remaining = past.len() - take;
        Ok(List { revision, entries: past.into_values().take(take).cloned().collect(), remaining })
    }
}
