//! The clock that a VMI asks for.

use super::{Error, invalid};
use godwit_api::VirtualMachineInstance;
use godwit_api::vmi::{Clock, TimerState};
use godwit_qemu::machine::{MissedTicks, Timers};
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// By how many seconds the guest's wall clock is meant to differ from UTC. A hardware clock in local time is read as such by
/// the guest, and does not count here.
pub fn wall_clock_offset(vmi: &VirtualMachineInstance) -> i64 {
    vmi.spec.domain.clock.as_ref().map_or(0, utc_offset)
}

fn utc_offset(spec: &Clock) -> i64 {
    spec.utc.as_ref().and_then(|utc| utc.offset_seconds).unwrap_or(0)
}

/// By how many seconds the hardware's clock differs from UTC at the guest's start.
pub(super) fn hardware_offset(spec: &Clock, now: Timestamp) -> Result<i64, Error> {
    let Some(name) = spec.timezone.as_deref().filter(|name| !name.is_empty()) else { return Ok(utc_offset(spec)) };
    let zone = TimeZone::get(name).map_err(|error| {
        invalid(format!("spec.domain.clock.timezone {name} is not known on this node (package tzdata): {error}"))
    })?;
    Ok(zone.to_offset(now).seconds().into())
}

pub(super) fn timers(spec: &Clock) -> Timers {
    let mut timers = Timers::default();
    let Some(spec) = &spec.timer else { return timers };
    let present = |timer: &Option<TimerState>| timer.as_ref().is_none_or(|timer| timer.present.unwrap_or(true));
    let missed = |timer: &Option<TimerState>| {
        let policy = timer.as_ref().and_then(|timer| timer.tick_policy.as_deref());
        match policy {
            Some("delay") => Some(MissedTicks::Delay),
            Some("catchup") => Some(MissedTicks::CatchUp),
            Some("discard") => Some(MissedTicks::Discard),
            _ => None,
        }
    };
    timers.hpet = present(&spec.hpet);
    timers.pit = present(&spec.pit);
    timers.pit_missed = missed(&spec.pit);
    timers.kvm_clock = present(&spec.kvm);
    timers.rtc_catches_up = missed(&spec.rtc) != Some(MissedTicks::Delay);
    timers.rtc_is_the_guests = spec.rtc.as_ref().is_some_and(|rtc| rtc.track.as_deref() == Some("guest"));
    timers
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn clock(spec: Value) -> Clock {
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn a_zone_is_local_time_and_an_offset_is_meant() {
        let summer: Timestamp = "2026-07-01T00:00:00Z".parse().unwrap();
        let offset = |spec| hardware_offset(&clock(spec), summer);
        assert_eq!(offset(json!({})).unwrap(), 0);
        assert_eq!(offset(json!({"utc": {"offsetSeconds": -90}})).unwrap(), -90);
        assert!(offset(json!({"timezone": "Nowhere/Atall"})).unwrap_err().to_string().contains("Nowhere/Atall"));
        assert_eq!(offset(json!({"timezone": "UTC"})).unwrap(), 0);
        // A machine without time zones cannot know it, and says so.
        match offset(json!({"timezone": "Europe/Berlin"})) {
            Ok(seconds) => assert_eq!(seconds, 7200),
            Err(error) => assert!(error.to_string().contains("tzdata"), "{error}"),
        }
        let mut vmi = VirtualMachineInstance::default();
        vmi.spec.domain.clock = Some(clock(json!({"timezone": "Europe/Berlin"})));
        assert_eq!(wall_clock_offset(&vmi), 0);
        vmi.spec.domain.clock = Some(clock(json!({"utc": {"offsetSeconds": 60}})));
        assert_eq!(wall_clock_offset(&vmi), 60);
    }

    #[test]
    fn timers_are_as_they_are_asked_for() {
        let spec = json!({"timer": {
            "hpet": {"present": false}, "pit": {"tickPolicy": "delay"}, "rtc": {"tickPolicy": "catchup", "track": "guest"},
            "kvm": {},
        }});
        let wanted =
            Timers { hpet: false, pit_missed: Some(MissedTicks::Delay), rtc_is_the_guests: true, ..Timers::default() };
        assert_eq!(timers(&clock(spec)), wanted);
        assert_eq!(timers(&clock(json!({"utc": {}}))), Timers::default());
    }
}
