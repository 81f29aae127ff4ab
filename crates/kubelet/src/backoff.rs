//! Growing delays between attempts.

use std::time::{Duration, Instant};

/// The first delay, doubled with each failure (Kubernetes' values).
const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(300);
/// After so long without a failure all is forgotten.
const FORGET: Duration = Duration::from_secs(600);

#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
    last: Option<Instant>,
}

impl Backoff {
    /// The delay after a failure now; `free` failures are not delayed.
    pub(crate) fn next(&mut self, now: Instant, free: u32) -> Duration {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) > FORGET) {
            self.failures = 0;
        }
        self.last = Some(now);
        self.failures += 1;
        match self.failures.checked_sub(free + 1) {
            None => Duration::ZERO,
            Some(doublings) => FIRST.saturating_mul(1 << doublings.min(10)).min(LONGEST),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_five_minutes_and_are_forgotten() {
        let mut backoff = Backoff::default();
        let now = Instant::now();
        let delays: Vec<u64> = (0..8).map(|_| backoff.next(now, 1).as_secs()).collect();
        assert_eq!(delays, [0, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(backoff.next(now + Duration::from_secs(601), 1), Duration::ZERO);
    }
}
