//! What is said: kubevirt.io types, CRDs, defaults, validation (pure).
//!
//! The types are the part of KubeVirt's API that godwit implements, under KubeVirt's names, plus a few fields of godwit's
//! own, which their documentation marks. They work with `kube::Api<T>`.

#[macro_use]
mod macros;

pub mod access;
pub mod admission;
pub mod condition;
pub mod config;
pub mod crd;
pub mod derived;
pub mod drain;
pub mod failure;
pub mod gates;
pub mod initial;
pub mod installation;
pub mod kubevirt;
pub mod maintenance;
pub mod metrics;
pub mod migratability;
pub mod migration;
pub mod migration_network;
pub mod nad;
pub mod names;
pub mod policy;
pub mod quantity;
pub mod record;
pub mod subresources;
pub mod unimplemented;
pub mod vm;
pub mod vmi;

pub use condition::Condition;
pub use crd::crds;
pub use derived::{derived_firmware_uuid, derived_mac, pod_interface_name};
pub use failure::FailureCause;
pub use initial::initial_objects;
pub use installation::Installation;
pub use kubevirt::{KubeVirt, MigrationConfiguration};
pub use migration::{MigrationPhase, VirtualMachineInstanceMigration, Vmim};
pub use migration_network::MigrationNetwork;
pub use nad::NetworkAttachmentDefinition;
pub use policy::MigrationPolicy;
pub use quantity::Quantity;
pub use record::MigrationRecord;
pub use vm::{RunStrategy, VirtualMachine};
pub use vmi::{VirtualMachineInstance, Vmi, VmiPhase};
