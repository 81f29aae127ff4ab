//! Instruments that put a cluster of their own to the test. [`migrate`] measures migrations, side by side with QEMU driven by
//! hand; [`faults`] kills, stops and cuts what moves guests; [`streams`] looks whether connections to them stay open.

pub mod faults;
pub mod migrate;
pub mod streams;
pub mod witness;
