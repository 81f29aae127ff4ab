//! The migration contract, shown on real guests: a file for each of its parts, a test for each of its sentences.

#![allow(clippy::expect_used, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod cancel;
mod channels;
mod contract;
mod deadlines;
mod limits;
mod modes;
mod policy;
mod stage;
mod updates;
mod volumes;
mod waiting;
