//! Revisions: an embedded, crash-safe, watchable object store.
//!
//! Objects live under string keys. Every write takes the next number of one global revision, is made durable together
//! with whatever else waits to be written (group commit), and only then becomes visible, in revision order: first in
//! the memory image that all reads come from, then to watchers. What was acknowledged survives `kill -9` and power loss.
//!
//! A bounded log of changes is kept on disk, too, so that watches resume across restarts; whoever asks for something
//! older gets [`Error::Compacted`].

mod disk;
mod image;
mod watch;
mod writer;

pub use redb::StorageBackend;
pub use watch::{Batch, Watch};

use bytes::Bytes;
use image::Image;
use std::path::Path;
use std::sync::{Arc, OnceLock, RwLock};
use tokio::sync::{mpsc, oneshot};

/// Why a store operation failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Create of a key that is there.
    #[error("key {key} already exists at revision {revision}")]
    Exists {
        /// The key.
        key: String,
        /// Its present revision.
        revision: u64,
    },
    /// Update or delete of a key that is not there.
    #[error("key {key} not found")]
    NotFound {
        /// The key.
        key: String,
    },
    /// The key changed since the caller read it.
    #[error("key {key} is at revision {actual}, not {expected}")]
    Conflict {
        /// The key.
        key: String,
        /// What the caller expected.
        expected: u64,
        /// What it is.
        actual: u64,
    },
    /// The log of changes no longer reaches back that far: read anew.
    #[error("revision {requested} is too old, the log of changes begins after {oldest}")]
    Compacted {
        /// What was asked for.
        requested: u64,
        /// The oldest revision that can still be asked for.
        oldest: u64,
    },
    /// A revision that has not happened (yet).
    #[error("revision {requested} is in the future, the present one is {current}")]
    Future {
        /// What was asked for.
        requested: u64,
        /// The newest revision.
        current: u64,
    },
    /// The disk failed; nothing of the write is visible. Free space or replace the disk, then restart.
    #[error("storage failed: {0}")]
    Storage(Arc<redb::Error>),
    /// The log on disk does not fit the objects on disk.
    #[error("store is damaged: {0}")]
    Damaged(String),
    /// The store was shut down.
    #[error("store is closed")]
    Closed,
}

impl<E: Into<redb::Error>> From<E> for Error {
    fn from(error: E) -> Self {
        Error::Storage(Arc::new(error.into()))
    }
}

/// Result of store operations.
pub type Result<T> = std::result::Result<T, Error>;

/// One version of one object.
#[derive(Debug)]
pub struct Entry {
    /// Where it is stored.
    pub key: Arc<str>,
    /// The revision that wrote it.
    pub revision: u64,
    /// What was written.
    pub value: Bytes,
    json: OnceLock<Arc<serde_json::Value>>,
}

impl Entry {
    pub(crate) fn new(key: Arc<str>, revision: u64, value: Bytes) -> Arc<Self> {
        Arc::new(Self { key, revision, value, json: OnceLock::new() })
    }

    /// The value parsed as JSON, once for all readers; `null` if it is not JSON.
    pub fn json(&self) -> &Arc<serde_json::Value> {
        self.json.get_or_init(|| Arc::new(serde_json::from_slice(&self.value).unwrap_or_default()))
    }
}

/// One change. At least one of `old` and `new` is there.
#[derive(Debug)]
pub struct Event {
    /// The revision of the change.
    pub revision: u64,
    /// Before; none: it was created.
    pub old: Option<Arc<Entry>>,
    /// After; none: it was deleted.
    pub new: Option<Arc<Entry>>,
    cache: [OnceLock<Bytes>; Event::SLOTS],
}

impl Event {
    /// How many encodings [`Event::cached`] keeps.
    pub const SLOTS: usize = 4;

    pub(crate) fn new(revision: u64, old: Option<Arc<Entry>>, new: Option<Arc<Entry>>) -> Arc<Self> {
        Arc::new(Self { revision, old, new, cache: Default::default() })
    }

    /// The key that changed.
    pub fn key(&self) -> &str {
        self.new.as_ref().or(self.old.as_ref()).map_or("", |entry| &entry.key)
    }

    /// An encoding of this event that all watchers share: made by the first, kept with the event. What a `slot`
    /// (below [`Event::SLOTS`]) means is up to the caller; other slots are not kept.
    pub fn cached(&self, slot: usize, make: impl FnOnce() -> Bytes) -> Bytes {
        match self.cache.get(slot) {
            Some(cell) => cell.get_or_init(make).clone(),
            None => make(),
        }
    }

    pub(crate) fn size(&self) -> usize {
        // The new value is the image's or the next event's old one, so it is not counted.
        self.key().len() + self.old.as_ref().map_or(0, |entry| entry.value.len()) + 64
    }
}

/// A consistent piece of the store.
#[derive(Debug)]
pub struct List {
    /// The revision that the entries are a snapshot of.
    pub revision: u64,
    /// Entries in the order of their keys.
    pub entries: Vec<Arc<Entry>>,
    /// How many entries follow that the limit cut off.
    pub remaining: usize,
}

/// How much of the past is kept.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// Changes at most.
    pub events: usize,
    /// Bytes of replaced values at most.
    pub bytes: usize,
}

impl Default for Retention {
    fn default() -> Self {
        Self { events: 20_000, bytes: 64 << 20 }
    }
}

/// A backend that lives in memory.
pub fn memory_backend() -> impl StorageBackend {
    redb::backends::InMemoryBackend::new()
}

/// Makes the value to store, given the revision it gets; called on the writer's thread, so it should not take long.
pub type Encode = Box<dyn FnOnce(u64) -> Bytes + Send>;

/// The store. Cheap to clone; closed when the last clone is gone.
#[derive(Clone, Debug)]
pub struct Store {
    shared: Arc<Shared>,
    writer: Arc<WriterHandle>,
}

/// Ends the writer and waits for it, so that the file can be opened again at once.
#[derive(Debug)]
struct WriterHandle {
    requests: Option<mpsc::Sender<writer::Request>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for WriterHandle {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's writer panicked");
        }
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) image: RwLock<Image>,
    pub(crate) channels: watch::Channels,
    /// The newest visible revision.
    pub(crate) revision: tokio::sync::watch::Sender<u64>,
}

impl Shared {
    pub(crate) fn image(&self) -> std::sync::RwLockReadGuard<'_, Image> {
        // A panic while the lock was held would have been in code that only moves Arcs; the image is whole.
        self.image.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Store {
    /// Opens or creates the store in this file. It can be open only once at a time.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::with_database(redb::Database::create(path)?, Retention::default())
    }

    /// As [`Store::open`], with another idea of how much of the past to keep.
    pub fn open_with_retention(path: impl AsRef<Path>, retention: Retention) -> Result<Self> {
        Self::with_database(redb::Database::create(path)?, retention)
    }

    /// Opens the store on any backend: memory, or one that fails on purpose.
    pub fn open_backend(backend: impl StorageBackend, retention: Retention) -> Result<Self> {
        Self::with_database(redb::Builder::new().create_with_backend(backend)?, retention)
    }

    /// A store in memory, gone with its last clone.
    pub fn memory() -> Result<Self> {
        Self::open_backend(memory_backend(), Retention::default())
    }

    fn with_database(database: redb::Database, retention: Retention) -> Result<Self> {
        let disk = disk::Disk::new(database)?;
        let image = disk.load(retention)?;
        let (requests, receiver) = mpsc::channel(1024);
        let shared = Arc::new(Shared {
            revision: tokio::sync::watch::Sender::new(image.revision()),
            image: RwLock::new(image),
            channels: watch::Channels::default(),
        });
        let writer = writer::Writer::new(disk, shared.clone(), retention);
        let thread = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(receiver))
            .map_err(|error| Error::Storage(Arc::new(redb::Error::Io(error))))?;
        let writer = Arc::new(WriterHandle { requests: Some(requests), thread: Some(thread) });
        Ok(Self { shared, writer })
    }

    /// The newest revision.
    pub fn revision(&self) -> u64 {
        *self.shared.revision.borrow()
    }

    /// Waits until `revision` has happened.
    pub async fn reached(&self, revision: u64) {
        let mut receiver = self.shared.revision.subscribe();
        // The sender lives in `self.shared`, so this cannot fail.
        let _ = receiver.wait_for(|current| *current >= revision).await;
    }

    /// The object under `key`.
    pub fn get(&self, key: &str) -> Option<Arc<Entry>> {
        self.shared.image().get(key)
    }

    /// Everything whose key starts with `prefix`, as of now; at most `limit` (0: all) after the key `after`.
    pub fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> List {
        self.shared.image().list(prefix, after, limit)
    }

    /// As [`Store::list`], as of `revision`.
    pub fn list_at(&self, prefix: &str, after: Option<&str>, limit: usize, revision: u64) -> Result<List> {
        self.shared.image().list_at(prefix, after, limit, revision)
    }

    /// How many keys start with `prefix`.
    pub fn count(&self, prefix: &str) -> usize {
        self.shared.image().count(prefix)
    }

    /// Follows the changes under `prefix` (a whole key, or ending in `/`) after revision `after`.
    pub fn watch(&self, prefix: &str, after: u64) -> Result<Watch> {
        Watch::new(self.shared.clone(), prefix, after)
    }

    /// A list and a watch that continues exactly where it ends.
    pub fn list_and_watch(&self, prefix: &str) -> Result<(List, Watch)> {
        let list = self.list(prefix, None, 0);
        let watch = self.watch(prefix, list.revision)?;
        Ok((list, watch))
    }

    /// Stores a new object. Returns when it is durable.
    pub async fn create(&self, key: &str, encode: Encode) -> Result<Arc<Entry>> {
        self.write(key, writer::Op::Create(encode)).await?.new.clone().ok_or(Error::Closed)
    }

    /// Replaces an object, if it is still at `expected` (none: whatever it is at). Returns when it is durable.
    pub async fn update(&self, key: &str, expected: Option<u64>, encode: Encode) -> Result<Arc<Entry>> {
        self.write(key, writer::Op::Update(expected, encode)).await?.new.clone().ok_or(Error::Closed)
    }

    /// Deletes an object, if it is still at `expected` (none: whatever it is at). Returns the deletion's revision and
    /// the last version, when it is durable.
    pub async fn delete(&self, key: &str, expected: Option<u64>) -> Result<(u64, Arc<Entry>)> {
        let event = self.write(key, writer::Op::Delete(expected)).await?;
        Ok((event.revision, event.old.clone().ok_or(Error::Closed)?))
    }

    async fn write(&self, key: &str, op: writer::Op) -> Result<Arc<Event>> {
        let (reply, answer) = oneshot::channel();
        let request = writer::Request { key: key.into(), op, reply };
        let requests = self.writer.requests.as_ref().ok_or(Error::Closed)?;
        requests.send(request).await.map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?
    }
}

#[cfg(test)]
mod tests;
