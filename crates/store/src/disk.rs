//! What is on disk, and how it becomes an image.
//!
//! Three tables: `objects` (key → revision, value), `log` (revision → key, and the value it *replaced*) and `meta`. The
//! new value of a logged change is found in the next change of that key or else in `objects`, so that every value is
//! written twice at most.

use crate::image::Image;
use crate::{Entry, Error, Event, Result, Retention};
use bytes::Bytes;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

const OBJECTS: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("objects");
/// revision → (key, revision replaced or 0, value replaced)
const LOG: TableDefinition<'_, u64, (&str, u64, &[u8])> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const REVISION: &str = "revision";
const FORMAT: &str = "format";
const FORMAT_VERSION: u64 = 1;

#[derive(Debug)]
pub(crate) struct Disk {
    database: Database,
}

impl Disk {
    /// Makes the tables, if they are not there.
    pub(crate) fn new(database: Database) -> Result<Self> {
        let transaction = database.begin_write()?;
        {
            transaction.open_table(OBJECTS)?;
            transaction.open_table(LOG)?;
            let mut meta = transaction.open_table(META)?;
            let format = meta.get(FORMAT)?.map(|found| found.value());
            match format {
                None => {
                    meta.insert(FORMAT, FORMAT_VERSION)?;
                    // Clients read 0 as "any", so the first write is not the first revision.
                    meta.insert(REVISION, 1)?;
                }
                Some(FORMAT_VERSION) => {}
                Some(other) => {
                    return Err(Error::Damaged(format!(
                        "format {other} on disk, this version knows {FORMAT_VERSION}: use the version that wrote it"
                    )));
                }
            }
        }
        transaction.commit()?;
        Ok(Self { database })
    }

    /// Reads everything.
    pub(crate) fn load(&self, retention: Retention) -> Result<Image> {
        let transaction = self.database.begin_read()?;
        let revision = transaction.open_table(META)?.get(REVISION)?.map_or(1, |found| found.value());
        let mut objects: BTreeMap<Arc<str>, Arc<Entry>> = BTreeMap::new();
        for row in transaction.open_table(OBJECTS)?.iter()? {
            let (key, value) = row?;
            let key: Arc<str> = key.value().into();
            let (revision, bytes) = value.value();
            objects.insert(key.clone(), Entry::new(key, revision, Bytes::copy_from_slice(bytes)));
        }
        let mut ring = VecDeque::new();
        // What each key held after the change at hand, where that is not what it holds now.
        let mut after: BTreeMap<Arc<str>, Option<Arc<Entry>>> = BTreeMap::new();
        let mut expected = revision;
        for row in transaction.open_table(LOG)?.iter()?.rev() {
            let (at, change) = row?;
            let at = at.value();
            if at != expected {
                return Err(Error::Damaged(format!("change {expected} is missing from the log, found {at}")));
            }
            expected -= 1;
            let (key, replaced, bytes) = change.value();
            let key: Arc<str> = key.into();
            let old = (replaced != 0).then(|| Entry::new(key.clone(), replaced, Bytes::copy_from_slice(bytes)));
            let new = match after.insert(key.clone(), old.clone()) {
                Some(known) => known,
                None => objects.get(&key).cloned(),
            };
            if old.is_none() && new.is_none() {
                return Err(Error::Damaged(format!("change {at} of {key} has neither an old nor a new value")));
            }
            ring.push_front(Event::new(at, old, new));
        }
        let mut image = Image::new(objects, ring, revision);
        image.trim(retention);
        Ok(image)
    }

    /// Makes the events durable and forgets the log up to and including `oldest`.
    pub(crate) fn commit(&self, events: &[Arc<Event>], oldest: u64) -> Result<()> {
        let transaction = self.database.begin_write()?;
        {
            let mut objects = transaction.open_table(OBJECTS)?;
            let mut log = transaction.open_table(LOG)?;
            let mut meta = transaction.open_table(META)?;
            for event in events {
                match &event.new {
                    Some(new) => objects.insert(event.key(), (new.revision, &new.value[..]))?,
                    None => objects.remove(event.key())?,
                };
                let (replaced, bytes) = event.old.as_ref().map_or((0, &[][..]), |old| (old.revision, &old.value[..]));
                log.insert(event.revision, (event.key(), replaced, bytes))?;
            }
            if let Some(last) = events.last() {
                meta.insert(REVISION, last.revision)?;
            }
            let first = log.first()?.map(|(revision, _)| revision.value());
            for revision in first.unwrap_or(oldest + 1)..=oldest {
                log.remove(revision)?;
            }
        }
        transaction.commit()?;
        Ok(())
    }
}
