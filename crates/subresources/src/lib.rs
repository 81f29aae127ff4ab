//! KubeVirt's group `subresources.kubevirt.io`, carried out.
//!
//! What a request comes to is decided in [`godwit_api::subresources`]. Here is what follows from that: objects are written, the
//! guest's node is called, consoles and screens are carried over websockets. The embedded API server has it as a plugin; on a
//! real Kubernetes [`aggregated`] serves it behind kube-apiserver.

mod act;
pub mod aggregated;
mod console;
mod objects;
mod screen;

pub use act::{Asked, Plan, outcome, plan, resources, root, unknown};
pub use objects::{ApiServer, Objects};
