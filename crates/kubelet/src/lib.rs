//! Pods here: runs pods as processes in network namespaces.

pub mod cgroup;
pub mod shim;
pub mod spec;
