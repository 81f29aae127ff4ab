//! The times that keep a guest from running twice when a node is cut off. What follows from what is in docs/fencing.md: change
//! one only with the argument there.

use std::time::Duration;

/// A node's fence lease, in the namespace `kubevirt`, is named this and the node's name.
pub const LEASE_PREFIX: &str = "virt-handler-";
/// F: no guest of a node runs later than this after the sending of the last renewal that was answered, on the node's
/// `CLOCK_BOOTTIME`. `leaseDurationSeconds` of the lease.
pub const DURATION: Duration = Duration::from_secs(20);
/// The handler renews this often.
pub const RENEW_EVERY: Duration = Duration::from_secs(2);
/// What the controller waits beyond [`DURATION`], counted from when it heard of the last renewal: for the kill, and for clocks
/// that run at different speeds.
pub const MARGIN: Duration = Duration::from_secs(10);
/// A handler tells others that it has no contact when it last heard this long ago that a renewal of its had been taken.
pub const SILENCE: Duration = Duration::from_secs(13);
/// A fence is put off until this long after the question to which every peer answered that it has no contact.
pub const PUT_OFF: Duration = Duration::from_secs(10);
/// A node counts as heard steadily while the controller hears of a renewal at least this often.
pub const STEADY_GAP: Duration = Duration::from_secs(5);
/// At most so many peers are asked.
pub const MAX_PEERS: usize = 32;
