//! The guest's clock: what can be and what cannot.

use super::Cause;
use super::spec::one_of;
use crate::vmi::Clock;

pub(super) fn check(clock: &Clock, at: &str, causes: &mut Vec<Cause>) {
    if clock.utc.is_some() && clock.timezone.is_some() {
        causes.push(Cause::invalid(at, format!("{at} can only have one of utc and timezone")));
    }
    // Years beyond QEMU's calendar would be nobody's wish.
    let offset = clock.utc.as_ref().and_then(|utc| utc.offset_seconds).unwrap_or_default();
    if offset.unsigned_abs() > MOST_SECONDS {
        let field = format!("{at}.utc.offsetSeconds");
        causes
            .push(Cause::invalid(&field, format!("{field} {offset}: at most {MOST_SECONDS} either way are possible")));
    }
    if clock.timezone.as_deref().is_some_and(|zone| !is_zone(zone)) {
        let field = format!("{at}.timezone");
        causes.push(Cause::invalid(&field, format!("{field} is no time zone's name, as Europe/Berlin")));
    }
    let Some(timer) = &clock.timer else { return };
    let timers = [
        ("hpet", &timer.hpet, &["delay", "catchup", "merge", "discard"][..]),
        ("kvm", &timer.kvm, &[]),
        ("pit", &timer.pit, &["delay", "catchup", "discard"]),
        ("rtc", &timer.rtc, &["delay", "catchup"]),
    ];
    for (name, timer, policies) in timers {
        let Some(timer) = timer else { continue };
        let at = format!("{at}.timer.{name}");
        one_of(timer.tick_policy.as_deref().unwrap_or_default(), policies, &format!("{at}.tickPolicy"), causes);
        let tracks: &[&str] = if name == "rtc" { &["guest", "wall"] } else { &[] };
        one_of(timer.track.as_deref().unwrap_or_default(), tracks, &format!("{at}.track"), causes);
    }
    // The firmware and every system keep the time of day there.
    if timer.rtc.as_ref().and_then(|rtc| rtc.present) == Some(false) {
        let field = format!("{at}.timer.rtc.present");
        causes.push(Cause::unsupported(&field, format!("{field}: a guest without it is not implemented by godwit")));
    }
}

/// A century.
const MOST_SECONDS: u64 = 100 * 366 * 86_400;

/// Names of the IANA database, which only a node can look into.
fn is_zone(zone: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '_' | '-' | '+');
    !zone.is_empty() && zone.chars().all(fine) && !zone.starts_with('/')
}
