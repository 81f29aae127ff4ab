//! Instruments that put a cluster of their own to the test. [`migrate`] measures migrations, side by side with QEMU driven by
//! hand.

pub mod migrate;
