//! The hypervisor: command line, QMP and one migration as one QEMU sees it; knows no Kubernetes

pub mod accelerator;
pub mod process;
pub mod qmp;
