//! One VM: owns one QEMU and serves a small local RPC
//!
//! The process in the pod's container `compute`. It turns a VirtualMachineInstance and the files in the pod into a QEMU,
//! supervises it, and answers one handler over a unix socket: facts out, orders in. It decides nothing that a controller
//! could decide; what it does guard, alone, is that no guest is run twice (see [`rpc`] and docs/architecture.md, "Hand-over").

pub mod client;
pub mod iso;
pub mod plan;
pub mod rpc;
pub mod volumes;
