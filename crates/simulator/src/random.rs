//! Seeded random numbers (splitmix64): the same seed gives the same run on every machine.

/// A generator.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator for a seed.
    pub fn new(seed: u64) -> Self {
        // Neighbouring seeds shall not begin alike.
        let mut fresh = Self(seed ^ 0x6a09_e667_f3bc_c909);
        fresh.next();
        fresh
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        let span = high.saturating_sub(low).saturating_add(1);
        low + if span == 0 { self.next() } else { self.next() % span }
    }

    /// True in so many of a thousand cases.
    pub fn chance(&mut self, per_mille: u32) -> bool {
        per_mille > 0 && self.next() % 1000 < u64::from(per_mille)
    }

    /// One of the items.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        let count = u64::try_from(items.len()).unwrap_or(1).max(1);
        items.get(usize::try_from(self.next() % count).unwrap_or(0))
    }

    /// A UID.
    pub fn uid(&mut self) -> String {
        let (high, low) = (self.next(), self.next());
        format!(
            "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
            high >> 32,
            (high >> 16) & 0xffff,
            high & 0xfff,
            (low >> 48) & 0xfff,
            low & 0xffff_ffff_ffff
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_in_their_range_and_follow_the_seed() {
        let (mut one, mut same, mut other) = (Random::new(1), Random::new(1), Random::new(2));
        let first: Vec<u64> = (0..100).map(|_| one.between(3, 7)).collect();
        assert!(first.iter().all(|number| (3..=7).contains(number)));
        assert!((3..=7).all(|number| first.contains(&number)));
        assert_eq!(first, (0..100).map(|_| same.between(3, 7)).collect::<Vec<_>>());
        assert_ne!(first, (0..100).map(|_| other.between(3, 7)).collect::<Vec<_>>());
        assert_eq!(one.uid().len(), 36);
        assert!(!one.chance(0) && one.chance(1000));
    }
}
