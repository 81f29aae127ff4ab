//! OpenAPI documents: v3 by group version, v2 as JSON and as the protobuf that older kubectls ask for.
//!
//! kubectl reads them for `explain`, for client-side validation, to learn whether the server validates fields itself
//! (`fieldValidation` on PATCH), and for the merge keys of `apply`.

mod emit;
mod gnostic;
mod paths;

use crate::resource::{GroupVersion, Resource};
use emit::{Emitter, Flavour};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeSet;

/// What clients put into `Accept` for [`v2_protobuf`].
pub const V2_PROTOBUF_ACCEPT: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";
/// `Content-Type` of [`v2_protobuf`]: with a dot, since the `@` of what was asked for is not allowed in a media type
/// and clients refuse to read it.
pub const V2_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// Every group version that has resources.
fn group_versions(resources: &[Resource]) -> BTreeSet<GroupVersion> {
    resources.iter().map(|r| r.gv.clone()).collect()
}

/// `GET /openapi/v3`: where the documents are. The hashes change when what is served changes, so that clients may cache for
/// ever.
pub fn v3_index(resources: &[Resource]) -> Value {
    let mut index = Map::new();
    for gv in group_versions(resources) {
        let path = gv.path();
        let hash = v3_document(resources, &gv).map(|document| hash(&document)).unwrap_or_default();
        index.insert(path.clone(), json!({"serverRelativeURL": format!("/openapi/v3/{path}?hash={hash}")}));
    }
    json!({ "paths": index })
}

/// Fingerprint of a document, for `hash=` and `ETag`.
pub fn hash(document: &Value) -> String {
    let digest = Sha256::digest(document.to_string());
    digest.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// `GET /openapi/v3/api/v1` or `/openapi/v3/apis/G/V`; `None`: no such version.
pub fn v3_document(resources: &[Resource], gv: &GroupVersion) -> Option<Value> {
    let of_version: Vec<&Resource> = resources.iter().filter(|r| r.gv == *gv).collect();
    if of_version.is_empty() {
        return None;
    }
    let mut emitter = Emitter::new(Flavour::V3);
    let mut paths = Map::new();
    for resource in of_version {
        define(resource, &mut emitter);
        paths::add(resource, Flavour::V3, &mut paths);
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.33.0"},
        "paths": paths,
        "components": {"schemas": emitter.finish()},
    }))
}

/// Actions have no types of their own.
fn define(resource: &Resource, emitter: &mut Emitter) {
    if !resource.actions_only {
        emitter.resource(resource);
    }
}

/// `GET /openapi/v2`: everything in one Swagger 2.0 document.
pub fn v2_document(resources: &[Resource]) -> Value {
    let mut emitter = Emitter::new(Flavour::V2);
    let mut paths = Map::new();
    for resource in resources {
        define(resource, &mut emitter);
        paths::add(resource, Flavour::V2, &mut paths);
    }
    json!({
        "swagger": "2.0",
        "info": {"title": "Kubernetes", "version": "v1.33.0"},
        "paths": paths,
        "definitions": emitter.finish(),
    })
}

/// A document of [`v2_document`] as gnostic's `openapi.v2.Document`.
pub fn v2_protobuf(document: &Value) -> Vec<u8> {
    gnostic::encode(document)
}

/// The name under which a resource's schema is shared: that of the built-in definition, or the group reversed as Kubernetes
/// does it for custom resources (`io.kubevirt.v1.VirtualMachine`).
pub fn definition_name(resource: &Resource) -> String {
    if let Some(name) = &resource.schema.definition {
        return name.clone();
    }
    let mut parts: Vec<&str> = resource.gv.group.split('.').collect();
    parts.reverse();
    format!("{}.{}.{}", parts.join("."), resource.gv.version, resource.kind)
}

#[cfg(test)]
mod tests;
