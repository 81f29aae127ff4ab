//! Links, namespaces, taps and address translation over netlink; knows no Kubernetes.
//!
//! A socket belongs for ever to the network namespace in which it was made. So everything here works the same way: a
//! short-lived thread enters the namespace ([`Namespace::run`]), opens what is needed (a listener, a netlink connection,
//! a raw socket), and hands it back to a caller who never left its own namespace.

pub mod capture;
pub mod dhcp;
mod error;
pub mod frames;
mod links;
mod mac;
mod namespace;
pub mod nat;
pub mod pinger;
pub mod segment;
mod tap;

pub use error::{Error, Result};
pub use links::{LinkInfo, Links, Route, VethEnd, VxlanOptions};
pub use mac::Mac;
pub use namespace::{NETNS_DIR, Namespace};
pub use tap::{TapOptions, open_tap};
