//! Revisions: an embedded, crash-safe, watchable object store
