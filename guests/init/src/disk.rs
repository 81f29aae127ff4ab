//! Disks that are written to all the time, past the guest's own cache, and read back before each block is written again.

use godwit_guest_init::blocks::{self, BLOCK, BLOCKS};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Writes between two flushes.
const BATCH: u64 = 8;
/// Between two batches, so that several disks and the rest of the guest have their turn.
const PAUSE: Duration = Duration::from_millis(2);

/// A block where O_DIRECT wants it.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

/// One disk. Whoever holds the lock has it to himself.
pub struct Disk {
    name: String,
    token: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    file: Option<File>,
    /// The last write that a flush has followed.
    acknowledged: u64,
    /// Blocks read back.
    verified: u64,
    /// What was found that must not be; the first words of it.
    wrong: u64,
    first_wrong: Option<String>,
    /// The longest batch since the last verification, flush included.
    worst: Duration,
}

impl Disk {
    /// Begins to write to `/dev/NAME`. `life` names this life of the guest.
    pub fn start(name: &str, life: &str) -> Arc<Self> {
        // FNV-1a: any number will do that differs from disk to disk and from life to life.
        let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
        let token = life.bytes().chain(name.bytes()).fold(0xCBF2_9CE4_8422_2325, hash);
        let disk = Arc::new(Self { name: name.to_owned(), token, state: Mutex::default() });
        let written = disk.clone();
        thread::spawn(move || written.write());
        disk
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) {
        let path = format!("/dev/{}", self.name);
        let file = loop {
            match OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_DIRECT).open(&path) {
                Ok(file) => break file,
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        };
        self.lock().file = Some(file);
        loop {
            {
                let mut state = self.lock();
                if let Err(error) = self.batch(&mut state) {
                    let words = format!("I/O error: {error}");
                    state.complain(words);
                    return;
                }
            }
            thread::sleep(PAUSE);
        }
    }

    fn batch(&self, state: &mut State) -> io::Result<()> {
        let began = Instant::now();
        let mut block = Box::new(Aligned([0; BLOCK]));
        for n in state.acknowledged + 1..=state.acknowledged + BATCH {
            self.verify(state, blocks::place(n), n.checked_sub(BLOCKS).filter(|n| *n > 0), &mut block)?;
            blocks::content(self.token, n, &mut block.0);
            let at = blocks::place(n) * BLOCK as u64;
            state.file.as_ref().ok_or(io::ErrorKind::NotFound)?.write_all_at(&block.0, at)?;
        }
        state.file.as_ref().ok_or(io::ErrorKind::NotFound)?.sync_data()?;
        state.acknowledged += BATCH;
        state.worst = state.worst.max(began.elapsed());
        Ok(())
    }

    /// Reads the block at `place`, which must hold write `wanted`.
    fn verify(&self, state: &mut State, place: u64, wanted: Option<u64>, block: &mut Aligned) -> io::Result<()> {
        let Some(wanted) = wanted else { return Ok(()) };
        state.file.as_ref().ok_or(io::ErrorKind::NotFound)?.read_exact_at(&mut block.0, place * BLOCK as u64)?;
        state.verified += 1;
        let found = blocks::written(self.token, &block.0);
        if found != Some(wanted) {
            state.complain(format!("block {place} holds write {found:?} and not {wanted}"));
        }
        Ok(())
    }

    /// What is known.
    pub fn json(&self) -> serde_json::Value {
        self.told(&self.lock())
    }

    fn told(&self, state: &State) -> serde_json::Value {
        serde_json::json!({
            "name": self.name,
            "token": format!("{:016x}", self.token),
            "acknowledged": state.acknowledged,
            "verifiedBlocks": state.verified,
            "wrongBlocks": state.wrong,
            "firstWrong": state.first_wrong,
            "worstMilliseconds": state.worst.as_secs_f64() * 1e3,
        })
    }

    /// Reads every block back; nothing is written meanwhile.
    pub fn verify_all(&self) -> serde_json::Value {
        let mut state = self.lock();
        let mut block = Box::new(Aligned([0; BLOCK]));
        for (place, wanted) in (0..).zip(blocks::last_writes(state.acknowledged)) {
            if let Err(error) = self.verify(&mut state, place, wanted, &mut block) {
                let words = format!("I/O error: {error}");
                state.complain(words);
                break;
            }
        }
        let told = self.told(&state);
        state.worst = Duration::ZERO;
        told
    }
}

impl State {
    fn complain(&mut self, words: String) {
        self.wrong += 1;
        self.first_wrong.get_or_insert(words);
    }
}
