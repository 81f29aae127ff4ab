//! A map that is asked by hash and walked in order.
#![expect(clippy::disallowed_types, reason = "the hashed half is never walked, so its order is never seen")]

use std::borrow::Borrow;
use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::ops::RangeBounds;

use foldhash::fast::FixedState;

/// A map from keys to values. Most questions name one key, and a tree would compare a dozen long names for each; what walks
/// through all entries needs them in an order that does not change from run to run. Keys should be cheap to clone.
#[derive(Clone, Debug)]
pub struct Ordered<K, V> {
    entries: HashMap<K, V, FixedState>,
    order: BTreeSet<K>,
}

impl<K, V> Default for Ordered<K, V> {
    fn default() -> Self {
        Self { entries: HashMap::default(), order: BTreeSet::new() }
    }
}

impl<K: Clone + Eq + Hash + Ord, V> Ordered<K, V> {
    /// The value of a key.
    pub fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.entries.get(key)
    }

    /// Whether the key has a value.
    pub fn contains_key(&self, key: &K) -> bool {
        self.entries.contains_key(key)
    }

    /// Gives a key a value; returns the one that it had.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        if let Some(held) = self.entries.get_mut(&key) {
            return Some(std::mem::replace(held, value));
        }
        self.order.insert(key.clone());
        self.entries.insert(key, value)
    }

    /// Takes a key out, with its value.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let value = self.entries.remove(key)?;
        self.order.remove(key);
        Some(value)
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.order.iter()
    }

    /// The values, in the order of their keys.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.order.iter().filter_map(|key| self.entries.get(key))
    }

    /// Does something to each value, in the order of their keys.
    pub fn for_each(&mut self, mut work: impl FnMut(&mut V)) {
        for key in &self.order {
            if let Some(value) = self.entries.get_mut(key) {
                work(value);
            }
        }
    }

    /// The keys within bounds and their values, in order.
    pub fn range(&self, bounds: impl RangeBounds<K>) -> impl Iterator<Item = (&K, &V)> {
        self.order.range(bounds).filter_map(|key| Some((key, self.entries.get(key)?)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_sorted_map(steps in proptest::collection::vec((0_u8..20, any::<bool>(), any::<u8>()), 0..200)) {
            let (mut map, mut expected) = (Ordered::default(), BTreeMap::new());
            for (key, remove, value) in steps {
                if remove {
                    prop_assert_eq!(map.remove(&key), expected.remove(&key));
                } else {
                    prop_assert_eq!(map.insert(key, value), expected.insert(key, value));
                }
                prop_assert_eq!(map.len(), expected.len());
                prop_assert_eq!(map.is_empty(), expected.is_empty());
                prop_assert_eq!(map.contains_key(&key), expected.contains_key(&key));
                prop_assert_eq!(map.get(&key), expected.get(&key));
            }
            prop_assert!(map.keys().eq(expected.keys()));
            prop_assert!(map.values().eq(expected.values()));
            prop_assert!(map.range(7..).eq(expected.range(7..)));
            map.for_each(|value| *value /= 2);
            expected.values_mut().for_each(|value| *value /= 2);
            prop_assert!(map.values().eq(expected.values()));
        }
    }
}
