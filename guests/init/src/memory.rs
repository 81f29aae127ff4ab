//! A working set whose every page carries a tag that can be recomputed, so that a page lost or mixed up in a migration
//! is found by the guest itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// Counters of the working set.
#[derive(Default)]
pub struct Memory {
    /// Pages found with a content that was never written.
    pub corrupt: AtomicU64,
    /// Pages verified so far.
    pub verified: AtomicU64,
    /// Checksum over the part that is never rewritten: constant for the guest's life.
    pub checksum: AtomicU64,
}

/// Content of word `word` of page `page` in generation `generation`: cheap, and different everywhere.
fn content(page: usize, word: usize, generation: u64) -> u64 {
    (page as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
        ^ (word as u64).wrapping_mul(0xC2B2_AE3D_27D4_EB4F)
        ^ generation.rotate_left(17)
}

/// Fills the set, then rewrites one half at the given rate, verifying each page before, and sums up the other half
/// once a second.
pub fn start(mib: usize, dirty_mib_per_second: usize) -> Arc<Memory> {
    let memory = Arc::new(Memory::default());
    let pages = mib * 1024 * 1024 / PAGE;
    let (fixed, moving) = (pages / 2, pages - pages / 2);
    let sums = memory.clone();
    let mut still = vec![0_u64; fixed * WORDS];
    for (index, word) in still.iter_mut().enumerate() {
        *word = content(index / WORDS, index % WORDS, 0);
    }
    sums.checksum.store(sum(&still), Ordering::Release);
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_secs(1));
            sums.checksum.store(sum(&still), Ordering::Release);
        }
    });
    let counters = memory.clone();
    thread::spawn(move || rewrite(&counters, moving, dirty_mib_per_second));
    memory
}

fn sum(words: &[u64]) -> u64 {
    // volatile: the compiler must not assume that nobody but us changes memory.
    words.iter().fold(0xCBF2_9CE4_8422_2325_u64, |hash, word| {
        let value = std::hint::black_box(*word);
        (hash ^ value).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(5)
    })
}

fn rewrite(memory: &Memory, pages: usize, mib_per_second: usize) {
    const TICK: Duration = Duration::from_millis(20);
    let mut words = vec![0_u64; pages * WORDS];
    for (index, word) in words.iter_mut().enumerate() {
        *word = content(index / WORDS, index % WORDS, 1);
    }
    if mib_per_second == 0 || pages == 0 {
        return;
    }
    let (mut generation, mut page) = (1_u64, 0_usize);
    let mut due = Instant::now();
    let mut owed = 0_usize;
    loop {
        owed += mib_per_second * 1024 * 1024 / 50;
        while owed >= PAGE {
            owed -= PAGE;
            let words = &mut words[page * WORDS..(page + 1) * WORDS];
            // Two words a page are enough to find a page that is old, lost or another's, and leave the CPU to the guest.
            for word in [page % WORDS, (page * 7 + 3) % WORDS] {
                if std::hint::black_box(words[word]) != content(page, word, generation) {
                    memory.corrupt.fetch_add(1, Ordering::AcqRel);
                }
            }
            for word in [page % WORDS, (page * 7 + 3) % WORDS] {
                words[word] = content(page, word, generation + 1);
            }
            memory.verified.fetch_add(1, Ordering::AcqRel);
            page += 1;
            if page == pages {
                page = 0;
                generation += 1;
            }
        }
        due += TICK;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}
