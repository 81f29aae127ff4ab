//! What the links to other nodes were seen to carry, for the next migration there.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// The last measurement for each node, over the network for migrations or its own, in bytes a second.
#[derive(Debug, Default)]
pub struct Links(Mutex<BTreeMap<(String, bool), u64>>);

impl Links {
    /// A migration to `node` has measured this.
    pub fn seen(&self, node: &str, over_own_network: bool, rate: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert((node.to_owned(), over_own_network), rate);
    }

    /// What is known of the link to `node`.
    #[must_use]
    pub fn to(&self, node: &str, over_own_network: bool) -> Option<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&(node.to_owned(), over_own_network)).copied()
    }
}
