//! How fast the guest writes to its memory, measured again and again while it runs: what a migration will take is told from that.

use super::{Stage, Vm};
use crate::rpc::{MemoryFacts, Written};
use godwit_qemu::instance::Qemu;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Between two rounds of measurements, of which each costs a few milliseconds of processor time.
const MEASURE_EVERY: Duration = Duration::from_secs(60);
/// What is no older is not measured anew when somebody asks for it.
const FRESH: Duration = Duration::from_secs(3);

/// One measurement.
pub(super) struct Measured {
    written: Written,
    present: Option<u64>,
    /// The last of its round: all that is known is of this round now.
    whole: bool,
}

impl Measured {
    /// Writes it down, at this time in microseconds since the Unix epoch.
    fn note(self, memory: &mut MemoryFacts, now: i64) {
        // What is not told is taken to be there.
        memory.present_bytes = self.present.unwrap_or(memory.total_bytes);
        memory.written.retain(|known| known.within_ms != self.written.within_ms);
        memory.written.push(self.written);
        memory.written.sort_by_key(|written| written.within_ms);
        if self.whole {
            memory.measured_us = Some(now);
        }
    }
}

/// The round that is under way, and when it began.
#[derive(Default)]
pub(super) struct Measuring {
    began: Option<Instant>,
    round: Option<mpsc::Receiver<Measured>>,
}

impl Measuring {
    /// The next measurement; none when the round is over. Waits for ever where there is no round.
    pub(super) async fn next(&mut self) -> Option<Measured> {
        match &mut self.round {
            Some(round) => round.recv().await,
            None => std::future::pending().await,
        }
    }
}

impl Vm {
    /// Begins a round if one is due; `asked`: somebody wants to know now.
    pub(super) fn measure(&mut self, asked: bool) {
        let every = if asked { FRESH } else { MEASURE_EVERY };
        let due = self.measuring.began.is_none_or(|began| began.elapsed() >= every);
        if self.measuring.round.is_some() || !due {
            return;
        }
        // A guest that stands still writes nothing, and would not tell what it does when it runs. One that is half here
        // would have its pages fetched.
        let qemu = match &self.stage {
            Stage::Running(running) if !running.is_paused() => running.qemu().clone(),
            Stage::Outgoing(outgoing) if !(outgoing.is_paused() || outgoing.is_held() || outgoing.is_switching()) => {
                outgoing.qemu().clone()
            }
            _ => return,
        };
        let (tell, round) = mpsc::channel(1);
        self.measuring = Measuring { began: Some(Instant::now()), round: Some(round) };
        self.now.memory.total_bytes = qemu.memory();
        self.now.memory.one_pass = !qemu.tracks_writes();
        tokio::spawn(measure(qemu, tell));
    }

    pub(super) fn measured(&mut self, measured: Option<Measured>) {
        match measured {
            Some(measured) => measured.note(&mut self.now.memory, jiff::Timestamp::now().as_microsecond()),
            None => self.measuring.round = None,
        }
    }
}

/// One round, one time after another: QEMU measures only one at once.
async fn measure(qemu: Qemu, tell: mpsc::Sender<Measured>) {
    let windows = qemu.write_windows();
    for window in windows {
        let written = match qemu.written_within(*window).await {
            Ok(written) => written,
            Err(error) => {
                tracing::debug!(%error, "measuring how fast the guest writes");
                return;
            }
        };
        let asked = qemu.clone();
        // The kernel goes through the page tables for this.
        let present = tokio::task::spawn_blocking(move || asked.memory_present()).await.ok().flatten();
        let whole = windows.last() == Some(window);
        if tell.send(Measured { written, present, whole }).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_has_the_time_of_its_end() {
        let mut memory = MemoryFacts { total_bytes: 1000, ..MemoryFacts::default() };
        let mut note = |within_ms, bytes, whole, now| {
            let written = Written { within_ms, bytes, margin: 0 };
            Measured { written, present: Some(bytes), whole }.note(&mut memory, now);
            let known: Vec<u64> = memory.written.iter().map(|written| written.bytes).collect();
            (known, memory.present_bytes, memory.measured_us)
        };
        assert_eq!(note(100, 1, false, 5), (vec![1], 1, None));
        assert_eq!(note(3000, 30, true, 8), (vec![1, 30], 30, Some(8)));
        // The longest is still of the round before, and so is the time.
        assert_eq!(note(100, 2, false, 68), (vec![2, 30], 2, Some(8)));
        assert_eq!(note(3000, 60, true, 71), (vec![2, 60], 60, Some(71)));
    }
}
