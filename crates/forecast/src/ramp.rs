//! How long a source lets the guest stand still.

/// The standstill that a source allows itself. QEMU spends the whole allowance on a real link, so it begins small and grows
/// only when another pass no longer brings the end nearer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DowntimeRamp {
    limit_ms: u64,
    ceiling_ms: u64,
    pass: u64,
    least: Option<u64>,
}

/// Where the ramp begins, in milliseconds: as short as a busy host can switch over.
const FIRST_LIMIT_MS: u64 = 20;

impl DowntimeRamp {
    /// Never more than this many milliseconds.
    pub fn new(ceiling_ms: u64) -> Self {
        let ceiling_ms = ceiling_ms.max(1);
        DowntimeRamp { limit_ms: FIRST_LIMIT_MS.min(ceiling_ms), ceiling_ms, pass: 0, least: None }
    }

    /// One pass while the guest runs, then what it has written meanwhile while it stands still, however much that is: with an
    /// allowance of nothing QEMU does not take stock before everything is sent, and then no longer lets the guest run.
    pub fn one_pass() -> Self {
        DowntimeRamp { limit_ms: 0, ceiling_ms: 0, pass: 0, least: None }
    }

    /// Goes on from an allowance.
    pub fn from(limit_ms: u64, ceiling_ms: u64) -> Self {
        let ceiling_ms = ceiling_ms.max(limit_ms).max(1);
        DowntimeRamp { limit_ms: limit_ms.max(1), ceiling_ms, pass: 0, least: None }
    }

    /// The allowance now, in milliseconds.
    pub fn limit_ms(&self) -> u64 {
        self.limit_ms
    }

    /// Takes what remains to be sent in this pass; returns the new allowance when it has to grow.
    pub fn look(&mut self, pass: u64, remaining: u64) -> Option<u64> {
        // The first pass sends everything; what it leaves says nothing.
        if pass <= 1 || pass == self.pass {
            return None;
        }
        self.pass = pass;
        let falls = self.least.is_none_or(|least| remaining < least - least / 10);
        self.least = Some(self.least.map_or(remaining, |least| least.min(remaining)));
        if falls || self.limit_ms >= self.ceiling_ms {
            return None;
        }
        self.limit_ms = (self.limit_ms * 3).div_ceil(2).min(self.ceiling_ms);
        Some(self.limit_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ramp_grows_only_when_passes_stop_helping_and_never_above_the_ceiling() {
        let mut ramp = DowntimeRamp::new(100);
        assert_eq!(ramp.limit_ms(), 20);
        assert_eq!(ramp.look(1, 900), None);
        assert_eq!(ramp.look(2, 500), None);
        assert_eq!(ramp.look(2, 480), None, "the same pass");
        assert_eq!(ramp.look(3, 300), None, "still falling");
        assert_eq!(ramp.look(4, 290), Some(30));
        assert_eq!(ramp.look(5, 310), Some(45));
        assert_eq!(ramp.look(6, 310), Some(68));
        assert_eq!(ramp.look(7, 310), Some(100));
        assert_eq!(ramp.look(8, 310), None);
        assert_eq!(DowntimeRamp::new(5).limit_ms(), 5);
    }
}
