//! One node: both ends of a migration, channels, VM networks, heartbeat
