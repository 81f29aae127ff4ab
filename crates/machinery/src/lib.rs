//! Kubernetes API machinery as functions on values: no IO, no clock, no randomness.
//!
//! Objects are `serde_json::Value`s throughout, so that fields which this version does not know survive a round trip.

pub mod resource;
pub mod schema;
pub mod status;
