//! The guest's clock and timers.

use crate::accelerator::Accelerator;

/// What becomes of a timer's ticks that the guest could not be given in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissedTicks {
    /// They come later, at the ordinary rate: the guest stays behind.
    Delay,
    /// They come later, faster: the guest catches up.
    CatchUp,
    /// They are left out.
    Discard,
}

/// Timers of a machine. Both ends of a migration need the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timers {
    /// The high precision event timer.
    pub hpet: bool,
    /// The programmable interval timer.
    pub pit: bool,
    /// Missed ticks of the programmable interval timer; none leaves QEMU's own way.
    pub pit_missed: Option<MissedTicks>,
    /// KVM's clock, where KVM executes the guest.
    pub kvm_clock: bool,
    /// The real-time clock catches up on missed ticks.
    pub rtc_catches_up: bool,
    /// The real-time clock stands still with the guest, instead of following the host's.
    pub rtc_is_the_guests: bool,
}

impl Default for Timers {
    fn default() -> Self {
        Timers {
            hpet: true,
            pit: true,
            pit_missed: None,
            kvm_clock: true,
            rtc_catches_up: true,
            rtc_is_the_guests: false,
        }
    }
}

impl Timers {
    /// What `-machine` is told, beginning with a comma; nothing for what it does anyway.
    pub(super) fn machine_options(&self) -> String {
        let mut options = String::new();
        for (name, present) in [("hpet", self.hpet), ("pit", self.pit)] {
            if !present {
                options += &format!(",{name}=off");
            }
        }
        options
    }

    /// Only KVM's own timer has a choice; QEMU's catches up.
    pub(super) fn pit_policy(&self, accelerator: Accelerator) -> Option<&'static str> {
        match self.pit_missed {
            _ if accelerator != Accelerator::Kvm || !self.pit => None,
            Some(MissedTicks::Delay) => Some("delay"),
            Some(MissedTicks::Discard) => Some("discard"),
            Some(MissedTicks::CatchUp) | None => None,
        }
    }

    /// `-rtc`. A clock that is not UTC begins at a point in time; a target takes over the source's, whatever it began with.
    pub(super) fn clock_option(&self, offset_seconds: i64, now_seconds: i64) -> String {
        let clock = if self.rtc_is_the_guests { "vm" } else { "host" };
        let drift = if self.rtc_catches_up { "slew" } else { "none" };
        let at = jiff::Timestamp::from_second(now_seconds.saturating_add(offset_seconds));
        let base = match at {
            Ok(at) if offset_seconds != 0 => at.strftime("%Y-%m-%dT%H:%M:%S").to_string(),
            _ => "utc".into(),
        };
        format!("base={base},clock={clock},driftfix={drift}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_from_qemus_own_way_is_said() {
        let timers = Timers::default();
        assert_eq!(timers.machine_options(), "");
        assert_eq!(timers.pit_policy(Accelerator::Kvm), None);
        assert_eq!(timers.clock_option(0, 0), "base=utc,clock=host,driftfix=slew");
        let timers = Timers {
            hpet: false,
            pit_missed: Some(MissedTicks::Delay),
            rtc_catches_up: false,
            rtc_is_the_guests: true,
            ..timers
        };
        assert_eq!(timers.machine_options(), ",hpet=off");
        assert_eq!(timers.pit_policy(Accelerator::Kvm), Some("delay"));
        assert_eq!(timers.pit_policy(Accelerator::Tcg), None);
        assert_eq!(timers.clock_option(-60, 90), "base=1970-01-01T00:00:30,clock=vm,driftfix=none");
    }
}
