//! The one-machine cluster: its fabric of network namespaces, its certificates, its processes, and the demo.

#![forbid(unsafe_code)]

pub mod demo;
mod down;
mod error;
pub mod fabric;
mod layout;
mod offer;
pub mod pki;
mod process;
mod status;
mod up;

pub use down::down;
pub use error::Error;
pub use layout::{CLIENT_ADDRESS, CONTROL_PLANE_ADDRESS, Cluster, FABRIC_API_PORT, FABRIC_PREFIX, Layout, state};
pub use offer::offers;
pub use process::{Process, find};
pub use status::status;
pub use up::{
    CONTROL_PLANE, Options, Up, admin_client, client, client_of, impatient_client, is_ready, start_missing, up,
};
