//! Admission: what may be changed in or said against a write, after authorisation and before it is stored.

use crate::user::User;
use godwit_machinery::resource::Resource;
use godwit_machinery::status::Status;
use serde_json::Value;
use std::sync::Arc;

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A new object, or a create of a subresource such as `pods/eviction`.
    Create,
    /// Put, patch or apply to an object that is there.
    Update,
    /// A delete.
    Delete,
    /// Exec, attach, proxy.
    Connect,
}

/// One write, as admission sees it.
pub struct AdmissionRequest<'a> {
    /// What is being done.
    pub operation: Operation,
    /// To which resource, in which version.
    pub resource: &'a Resource,
    /// `status`, `binding`, `eviction`, … or empty.
    pub subresource: &'a str,
    /// Empty at the cluster scope.
    pub namespace: &'a str,
    /// Empty when the name is still to be generated.
    pub name: &'a str,
    /// The object as it would be stored (for subresources that take another kind: that body); none for deletes.
    pub object: Option<&'a Value>,
    /// The object as it is stored; none for creates.
    pub old_object: Option<&'a Value>,
    /// Who wants it.
    pub user: &'a User,
    /// Nothing will be stored.
    pub dry_run: bool,
    /// Other objects, read-only.
    pub lookup: &'a dyn Lookup,
}

/// Read-only access to stored objects. Objects come in the version they are stored in.
pub trait Lookup: Send + Sync {
    /// One object; `namespace` is empty for cluster-scoped ones.
    fn get(&self, group: &str, plural: &str, namespace: &str, name: &str) -> Option<Arc<Value>>;
    /// All objects of a resource; all namespaces if `namespace` is empty.
    fn list(&self, group: &str, plural: &str, namespace: &str) -> Vec<Arc<Value>>;
}

/// What a mutating admission wants.
#[derive(Debug, Clone, Default)]
pub struct MutateOutcome {
    /// The changed object; none: as it was.
    pub object: Option<Value>,
    /// `Warning:` headers.
    pub warnings: Vec<String>,
}

/// What is said of an eviction, and a write that goes with it.
pub struct EvictionVerdict {
    /// Warnings; a Status refuses the eviction.
    pub verdict: Result<Vec<String>, Status>,
    /// To be written before the verdict is given; not on a dry run.
    pub write: Option<OwnWrite>,
}

/// A write of a plugin's own, past admission.
pub struct OwnWrite {
    /// The object's group.
    pub group: String,
    /// Its plural.
    pub plural: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// A merge patch. With a `metadata.resourceVersion` it is refused when the object has changed since.
    pub patch: Value,
    /// The answer when it cannot be written; why is put behind its message.
    pub failure: Status,
}

/// One admission plugin. Called on the request's task, so it should not take long.
pub trait Admission: Send + Sync {
    /// May change the object of creates and updates; a Status refuses the write. Not called for deletes.
    fn mutate(&self, request: &AdmissionRequest<'_>) -> Result<MutateOutcome, Status> {
        let _ = request;
        Ok(MutateOutcome::default())
    }

    /// Sees the object after all mutations and defaults and returns warnings; a Status refuses the write.
    fn validate(&self, request: &AdmissionRequest<'_>) -> Result<Vec<String>, Status> {
        let _ = request;
        Ok(Vec::new())
    }

    /// Called instead of [`Admission::validate`] for `pods/eviction`, and called again when its write met a newer object.
    fn evict(&self, request: &AdmissionRequest<'_>) -> EvictionVerdict {
        EvictionVerdict { verdict: self.validate(request), write: None }
    }
}
