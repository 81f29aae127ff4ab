//! One node: both ends of a migration, channels, VM networks, heartbeat

pub mod channel;
pub mod pump;
pub mod sockets;
pub mod tls;
