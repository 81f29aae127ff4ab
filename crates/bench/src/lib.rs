//! Instruments that put a cluster of their own to the test. [`migrate`] measures migrations, side by side with QEMU driven by
//! hand; [`faults`] kills, stops and cuts what moves guests; [`streams`] looks whether connections to them stay open;
//! [`storage`] whether their disks keep what they acknowledged; [`local`] measures new launchers on the same node, and
//! [`drain`] how long it takes to empty a node.

pub mod drain;
pub mod faults;
pub mod local;
pub mod migrate;
pub mod storage;
pub mod streams;
pub mod witness;
