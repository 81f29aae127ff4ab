//! One VM: owns one QEMU and serves a small local RPC
