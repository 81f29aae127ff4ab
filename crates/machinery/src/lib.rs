//! Kubernetes API machinery as functions on values: no IO, no clock, no randomness.
//!
//! Objects are `serde_json::Value`s throughout, so that fields which this version does not know survive a round trip.

pub mod apply;
pub mod body;
pub mod builtin;
pub mod crd;
pub mod discovery;
pub mod duration;
pub mod jsonpath;
pub mod meta;
pub mod names;
pub mod openapi;
pub mod patch;
pub mod protobuf;
pub mod quantity;
pub mod quota;
pub mod resource;
pub mod schema;
pub mod selector;
pub mod status;
pub mod table;
