//! The hypervisor: command line, QMP and one migration as one QEMU sees it; knows no Kubernetes
//!
//! A [`machine::Machine`] describes the virtual machine, [`instance`] starts a QEMU for it and holds its states as types,
//! [`migration`] adds up what a migration's events and numbers mean, and [`accelerator`] finds out whether KVM serves.
//! QEMU 7.2 and newer; what only a newer one has is detected at its start.

pub mod accelerator;
pub mod blocks;
pub mod descriptor;
pub mod failure;
pub mod instance;
pub mod machine;
pub mod memory;
pub mod migration;
pub mod process;
pub mod processors;
pub mod qmp;
pub mod tpm;
pub mod transport;

pub use godwit_forecast as forecast;
