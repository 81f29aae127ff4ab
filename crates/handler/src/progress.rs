//! `migrationState.progress`: the launcher's numbers for a reader, and what they let expect.

use godwit_api::vmi::MigrationProgress;
use godwit_launcher::rpc::MigrationFacts;
use godwit_launcher::rpc::forecast::Forecast;
use jiff::Timestamp;
use serde_json::{Value, json};

/// The members of `progress` as a merge patch. Within a migration what is done never becomes less: the percentage stands still
/// while the guest makes copied memory stale again. What is not known is taken out. `rest`: what the model expects from now on,
/// where enough was measured for it; without that the rates of now have to do.
pub fn report(f: &MigrationFacts, rest: Option<Forecast>, before: &MigrationProgress, now: Timestamp) -> Value {
    let percent = percent(f).max(before.percent.unwrap_or(0));
    let processed = f.processed_bytes.max(before.bytes_processed.unwrap_or(0));
    let elapsed = f.start_us.map(|s| f.end_us.unwrap_or_else(|| now.as_microsecond()).saturating_sub(s).max(0) / 1000);
    let elapsed = elapsed.and_then(|ms| u64::try_from(ms).ok()).or(f.total_ms);
    let over = matches!(f.status.as_str(), "completed" | "failed" | "cancelled");
    let rest = rest.filter(|_| !over && !f.handed_over && dirty_now(f));
    let left = match rest {
        Some(rest) => rest.duration.likely,
        None if over => None,
        None => milliseconds_left(f),
    };
    let standstill = match rest {
        Some(rest) => rest.downtime.likely.filter(|_| rest.converges),
        None if over => None,
        None => standstill(f),
    };
    let end = left.and_then(|ms| now.checked_add(std::time::Duration::from_millis(ms)).ok());
    let end = end.and_then(|end| Timestamp::from_second(end.as_second()).ok()).map(|end| end.to_string());
    json!({
        "percent": percent,
        "bytesTotal": f.total_bytes,
        "bytesProcessed": processed,
        "bytesRemaining": f.remaining_bytes,
        "bytesPerSecond": f.bytes_per_second,
        "dirtyBytesPerSecond": f.dirty_bytes_per_second,
        "memory": f.by_reference.then_some("ByReference"),
        "connections": f.transport.connections(),
        "compression": f.transport.zstd.then_some("zstd"),
        "throttlePercent": f.throttle_percent.filter(|percent| !over && *percent > 0),
        "linkBrokenTimestamp": f.broken_us.and_then(time).map(|at| at.to_string()),
        "recoveries": Some(f.recoveries).filter(|times| *times > 0),
        "iteration": f.iteration.max(before.iteration.unwrap_or(0)),
        "totalMilliseconds": elapsed.max(before.total_milliseconds),
        "qemuDowntimeMilliseconds": f.qemu_downtime_ms,
        "expectedEndTimestamp": end,
        "expectedDowntimeMilliseconds": standstill,
        // Told by its passes, not by what was measured before.
        "converges": rest.filter(|_| f.written.len() >= 2).map(|rest| rest.converges),
    })
}

/// Kubernetes' times have whole seconds.
fn time(us: i64) -> Option<Timestamp> {
    Timestamp::from_second(us.div_euclid(1_000_000)).ok()
}

/// What is taken out when nothing is expected any more.
pub fn end() -> Value {
    json!({
        "converges": null, "expectedEndTimestamp": null, "expectedDowntimeMilliseconds": null, "linkBrokenTimestamp": null,
    })
}

fn percent(f: &MigrationFacts) -> u32 {
    let sent = f.total_bytes.saturating_sub(f.remaining_bytes);
    match (f.status.as_str(), f.total_bytes) {
        ("completed", _) => 100,
        (_, 0) => 0,
        // The last percent is the switchover's.
        (_, total) => u32::try_from(u128::from(sent) * 100 / u128::from(total)).unwrap_or(0).min(99),
    }
}

/// How long the rest takes at the rates of now, if it ever ends at these.
fn milliseconds_left(f: &MigrationFacts) -> Option<u64> {
    if f.total_bytes == 0 {
        return None;
    }
    let nearer = f.bytes_per_second.checked_sub(dirty(f)).filter(|rate| *rate > 0)?;
    u64::try_from(u128::from(f.remaining_bytes) * 1000 / u128::from(nearer)).ok()
}

/// The standstill if it switched over as soon as it may: QEMU waits until the rest fits into what it allows itself. Known only
/// once a whole pass was measured.
fn standstill(f: &MigrationFacts) -> Option<u64> {
    if f.handed_over || f.iteration < 2 || f.bytes_per_second == 0 {
        return None;
    }
    let now = u64::try_from(u128::from(f.remaining_bytes) * 1000 / u128::from(f.bytes_per_second)).ok()?;
    match f.downtime_limit_ms.filter(|limit| *limit > 0) {
        Some(limit) if now > limit => (f.bytes_per_second > dirty(f)).then_some(limit),
        _ => Some(now),
    }
}

/// Whether the guest runs at the source.
fn dirty_now(f: &MigrationFacts) -> bool {
    !(f.guest_paused || f.paused_by_migration || f.handed_over || f.stop_us.is_some())
}

/// How fast the guest undoes what is done. A guest that stands still, or is at the target already, does not.
fn dirty(f: &MigrationFacts) -> u64 {
    if f.guest_paused || f.paused_by_migration || f.handed_over { 0 } else { f.dirty_bytes_per_second }
}

#[cfg(test)]
mod tests {
    use godwit_launcher::rpc::forecast::Expected;
    use godwit_launcher::rpc::{MigrationRole, Transport, Written};

    use super::*;

    fn now() -> Timestamp {
        "2026-11-20T20:00:00Z".parse().unwrap()
    }

    fn active() -> MigrationFacts {
        let mut f = MigrationFacts::new("m", MigrationRole::Source);
        f.status = "active".into();
        f.total_bytes = 1000;
        f.remaining_bytes = 250;
        f.processed_bytes = 800;
        f
    }

    fn shown(f: &MigrationFacts, before: &MigrationProgress) -> MigrationProgress {
        serde_json::from_value(report(f, None, before, now())).unwrap()
    }

    #[test]
    fn it_is_of_what_is_known() {
        let nothing = MigrationProgress::default();
        let mut f = MigrationFacts::new("m", MigrationRole::Source);
        assert_eq!(shown(&f, &nothing).percent, Some(0), "nothing known yet");
        f = active();
        assert_eq!(shown(&f, &nothing).percent, Some(75));
        f.remaining_bytes = 0;
        assert_eq!(shown(&f, &nothing).percent, Some(99), "the guest still has to switch over");
        f.remaining_bytes = 5000;
        assert_eq!(shown(&f, &nothing).percent, Some(0));
        f.status = "completed".into();
        assert_eq!(shown(&f, &nothing).percent, Some(100));
    }

    #[test]
    fn how_memory_goes_is_told() {
        let mut f = active();
        assert_eq!((shown(&f, &MigrationProgress::default())).connections, Some(1));
        f.transport = Transport { channels: 2, zstd: true, preempt: false };
        let told = shown(&f, &MigrationProgress::default());
        assert_eq!((told.connections, told.compression.as_deref()), (Some(3), Some("zstd")));
    }

    #[test]
    fn a_guest_that_is_slowed_down_is_told_while_it_is() {
        let mut f = active();
        f.throttle_percent = Some(30);
        assert_eq!(shown(&f, &MigrationProgress::default()).throttle_percent, Some(30));
        f.status = "completed".into();
        assert_eq!(report(&f, None, &MigrationProgress::default(), now())["throttlePercent"], Value::Null);
    }

    #[test]
    fn a_broken_link_is_told_while_it_is_broken() {
        let mut f = active();
        assert_eq!(report(&f, None, &MigrationProgress::default(), now())["recoveries"], Value::Null);
        (f.broken_us, f.recoveries) = (Some(now().as_microsecond() + 7), 2);
        let told = shown(&f, &MigrationProgress::default());
        assert_eq!((told.link_broken_timestamp.map(|t| t.0), told.recoveries), (Some(now()), Some(2)));
        f.broken_us = None;
        assert_eq!(report(&f, None, &MigrationProgress::default(), now())["linkBrokenTimestamp"], Value::Null);
    }

    #[test]
    fn what_is_done_never_becomes_less() {
        let mut f = active();
        f.iteration = 3;
        let first = shown(&f, &MigrationProgress::default());
        (f.remaining_bytes, f.processed_bytes, f.iteration) = (900, 700, 2);
        let second = shown(&f, &first);
        assert_eq!((second.percent, second.bytes_processed, second.iteration), (Some(75), Some(800), Some(3)));
        assert_eq!(second.bytes_remaining, Some(900), "what remains is as it is");
    }

    #[test]
    fn the_end_is_expected_only_where_the_rates_tell_one() {
        let mut f = active();
        let nothing = MigrationProgress::default();
        assert_eq!(shown(&f, &nothing).expected_end_timestamp, None, "no rate yet");
        f.bytes_per_second = 100;
        f.dirty_bytes_per_second = 50;
        let end = shown(&f, &nothing).expected_end_timestamp.unwrap();
        assert_eq!(end.0.to_string(), "2026-11-20T20:00:05Z");
        f.dirty_bytes_per_second = 100;
        assert_eq!(report(&f, None, &nothing, now())["expectedEndTimestamp"], Value::Null, "never at these rates");
        f.paused_by_migration = true;
        assert!(shown(&f, &nothing).expected_end_timestamp.is_some(), "a guest that stands still writes nothing");
        f.status = "completed".into();
        assert_eq!(shown(&f, &nothing).expected_end_timestamp, None);
    }

    #[test]
    fn the_standstill_is_expected_once_a_pass_was_measured() {
        let mut f = active();
        let nothing = MigrationProgress::default();
        (f.bytes_per_second, f.iteration, f.downtime_limit_ms) = (10_000, 1, Some(300));
        assert_eq!(shown(&f, &nothing).expected_downtime_milliseconds, None, "the first pass sends everything");
        f.iteration = 2;
        assert_eq!(shown(&f, &nothing).expected_downtime_milliseconds, Some(25));
        f.bytes_per_second = 500;
        assert_eq!(shown(&f, &nothing).expected_downtime_milliseconds, Some(300), "not before it fits");
        f.dirty_bytes_per_second = 500;
        assert_eq!(shown(&f, &nothing).expected_downtime_milliseconds, None, "it never fits");
        f.downtime_limit_ms = Some(0);
        assert_eq!(shown(&f, &nothing).expected_downtime_milliseconds, Some(500), "one pass, then the rest at once");
    }

    #[test]
    fn the_model_is_believed_where_there_is_one() {
        let mut f = active();
        (f.bytes_per_second, f.dirty_bytes_per_second, f.iteration) = (100, 100, 3);
        let nothing = MigrationProgress::default();
        let expected = |ms| Expected { likely: Some(ms), least: None, most: None };
        let mut rest =
            Forecast { converges: true, duration: expected(2000), downtime: expected(30), ..Forecast::default() };
        let told = |f: &MigrationFacts, rest| -> MigrationProgress {
            serde_json::from_value(report(f, Some(rest), &nothing, now())).unwrap()
        };
        let progress = told(&f, rest);
        assert_eq!(progress.expected_end_timestamp.unwrap().0.to_string(), "2026-11-20T20:00:02Z");
        assert_eq!((progress.expected_downtime_milliseconds, progress.converges), (Some(30), None));
        f.written = vec![Written { within_ms: 1, bytes: 1, margin: 0 }; 2];
        assert_eq!(told(&f, rest).converges, Some(true), "its passes tell");
        (rest.converges, rest.duration) = (false, Expected::default());
        let progress = told(&f, rest);
        assert_eq!((progress.converges, progress.expected_downtime_milliseconds), (Some(false), None));
        assert_eq!(progress.expected_end_timestamp, None);
        f.handed_over = true;
        assert_eq!(told(&f, rest).converges, None, "the guest is at the target");
    }
}
