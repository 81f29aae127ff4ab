//! Blocks whose content says which write of which guest they are of.
//!
//! The writes of a disk are numbered from 1. Write `n` goes to block [`place`]`(n)`, and fills it with [`content`], of which
//! every byte follows from the guest's token and from `n`. So the number of the last acknowledged write says what each
//! block must hold.

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// How many of a disk's first blocks are written to.
pub const BLOCKS: u64 = 1024;
/// From one write's block to the next one's; it has no factor in common with [`BLOCKS`], so all have their turn.
const STRIDE: u64 = 613;

/// The block that write `n` goes to.
#[must_use]
pub fn place(n: u64) -> u64 {
    n.wrapping_mul(STRIDE) % BLOCKS
}

/// What write `n` of the guest `token` puts there.
pub fn content(token: u64, n: u64, block: &mut [u8; BLOCK]) {
    for (index, word) in (0u64..).zip(block.chunks_exact_mut(8)) {
        let value = match index {
            0 => token,
            1 => n,
            _ => (token ^ n.rotate_left(32)).wrapping_add(index).wrapping_mul(0x9E37_79B9_7F4A_7C15),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Which write of the guest `token` filled this block, if one did, and all of it.
#[must_use]
pub fn written(token: u64, block: &[u8; BLOCK]) -> Option<u64> {
    let n = block.get(8..16).and_then(|word| Some(u64::from_le_bytes(word.try_into().ok()?)))?;
    let mut wanted = [0; BLOCK];
    content(token, n, &mut wanted);
    (n > 0 && wanted == *block).then_some(n)
}

/// The last write to each block, after `n` writes.
#[must_use]
pub fn last_writes(n: u64) -> Vec<Option<u64>> {
    let mut last = vec![None; BLOCKS as usize];
    for write in n.saturating_sub(BLOCKS - 1).max(1)..=n {
        if let Some(place) = last.get_mut(place(write) as usize) {
            *place = Some(write);
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_has_its_turn_and_the_last_write_is_known() {
        let mut turns: Vec<u64> = (1..=BLOCKS).map(place).collect();
        turns.sort_unstable();
        assert!(turns.into_iter().eq(0..BLOCKS));
        assert!(last_writes(0).iter().all(Option::is_none));
        assert_eq!(last_writes(1).iter().flatten().collect::<Vec<_>>(), [&1]);
        let last = last_writes(3000);
        assert_eq!(last.iter().flatten().min(), Some(&(3000 - BLOCKS + 1)));
        assert_eq!(last[place(3000) as usize], Some(3000));
    }

    #[test]
    fn a_block_that_is_old_torn_or_anothers_is_known() {
        let mut block = [0; BLOCK];
        assert_eq!(written(7, &block), None, "never written");
        content(7, 5, &mut block);
        assert_eq!((written(7, &block), written(8, &block)), (Some(5), None));
        block[4000] ^= 1;
        assert_eq!(written(7, &block), None);
    }
}
