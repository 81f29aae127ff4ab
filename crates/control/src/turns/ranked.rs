//! A sorted set that also knows places: which is the n-th, and how many are before one.

/// Chunks are split beyond this length.
const LONGEST: usize = 512;

/// A sorted set in chunks: inserting, removing and asking for a place take about the square root of its length.
#[derive(Clone, Debug)]
pub struct Ranked<T> {
    /// Sorted within and among each other; none is empty.
    chunks: Vec<Vec<T>>,
    len: usize,
}

impl<T> Default for Ranked<T> {
    fn default() -> Self {
        Self { chunks: Vec::new(), len: 0 }
    }
}

impl<T: Ord> Ranked<T> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The chunk that has this one or would have it.
    fn chunk_of(&self, item: &T) -> usize {
        self.chunks.partition_point(|chunk| chunk.last().is_some_and(|last| last < item))
    }

    /// Adds one, unless it is there.
    pub fn insert(&mut self, item: T) {
        if self.chunks.is_empty() {
            self.chunks.push(Vec::new());
        }
        let index = self.chunk_of(&item).min(self.chunks.len() - 1);
        let Some(chunk) = self.chunks.get_mut(index) else { return };
        let Err(at) = chunk.binary_search(&item) else { return };
        chunk.insert(at, item);
        self.len += 1;
        if chunk.len() > LONGEST {
            let rest = chunk.split_off(LONGEST / 2);
            self.chunks.insert(index + 1, rest);
        }
    }

    /// Removes one, if it is there.
    pub fn remove(&mut self, item: &T) {
        let index = self.chunk_of(item);
        let Some(chunk) = self.chunks.get_mut(index) else { return };
        let Ok(at) = chunk.binary_search(item) else { return };
        chunk.remove(at);
        self.len -= 1;
        if chunk.is_empty() {
            self.chunks.remove(index);
        }
    }

    /// How many are before this one (whether or not it is there).
    pub fn rank(&self, item: &T) -> usize {
        let index = self.chunk_of(item);
        let before: usize = self.chunks.iter().take(index).map(Vec::len).sum();
        before + self.chunks.get(index).map_or(0, |chunk| chunk.partition_point(|other| other < item))
    }

    /// The one that so many are before.
    pub fn nth(&self, mut rank: usize) -> Option<&T> {
        for chunk in &self.chunks {
            if let Some(item) = chunk.get(rank) {
                return Some(item);
            }
            rank -= chunk.len();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_sorted_set(steps in proptest::collection::vec((any::<bool>(), 0u16..1500), 0..4000)) {
            let (mut ranked, mut plain) = (Ranked::default(), BTreeSet::new());
            for (insert, item) in steps {
                if insert {
                    ranked.insert(item);
                    plain.insert(item);
                } else {
                    ranked.remove(&item);
                    plain.remove(&item);
                }
            }
            prop_assert_eq!(ranked.len(), plain.len());
            for (rank, item) in plain.iter().enumerate() {
                prop_assert_eq!(ranked.nth(rank), Some(item));
                prop_assert_eq!(ranked.rank(item), rank);
            }
            prop_assert_eq!(ranked.nth(plain.len()), None);
            prop_assert!(ranked.chunks.iter().all(|chunk| !chunk.is_empty() && chunk.len() <= LONGEST));
        }
    }
}
