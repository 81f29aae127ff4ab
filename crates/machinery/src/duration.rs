//! Ages as kubectl writes them: `5s`, `3m20s`, `2d4h`.

use jiff::Timestamp;

/// The time from `since` to `now`; `<invalid>` when it lies more than a second in the future.
pub fn age(since: Timestamp, now: Timestamp) -> String {
    human(now.as_second().saturating_sub(since.as_second()))
}

/// Age of an RFC 3339 time; `<unknown>` when there is none, `<invalid>` when it is no time.
pub fn age_of(text: Option<&str>, now: Timestamp) -> String {
    match text {
        None | Some("") => "<unknown>".to_owned(),
        Some(text) => match text.parse::<Timestamp>() {
            Ok(since) => age(since, now),
            Err(_) => "<invalid>".to_owned(),
        },
    }
}

/// A number of seconds with two figures of precision.
pub fn human(seconds: i64) -> String {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;
    const YEAR: i64 = 365 * DAY;
    // Clocks of different machines may differ by a little; more than that is wrong.
    if seconds < -1 {
        return "<invalid>".to_owned();
    }
    let pair = |big: i64, big_unit: char, small: i64, small_unit: char| {
        let (whole, rest) = (seconds / big, seconds % big / small);
        if rest == 0 { format!("{whole}{big_unit}") } else { format!("{whole}{big_unit}{rest}{small_unit}") }
    };
    match seconds {
        ..=0 => "0s".to_owned(),
        s if s < 2 * MINUTE => format!("{s}s"),
        s if s < 10 * MINUTE => pair(MINUTE, 'm', 1, 's'),
        s if s < 3 * HOUR => format!("{}m", s / MINUTE),
        s if s < 8 * HOUR => pair(HOUR, 'h', MINUTE, 'm'),
        s if s < 2 * DAY => format!("{}h", s / HOUR),
        s if s < 8 * DAY => pair(DAY, 'd', HOUR, 'h'),
        s if s < 2 * YEAR => format!("{}d", s / DAY),
        s if s < 8 * YEAR => pair(YEAR, 'y', DAY, 'd'),
        s => format!("{}y", s / YEAR),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_as_kubectl_does() {
        for (seconds, text) in [
            (-5, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (200, "3m20s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (11_860, "3h17m"),
            (28_800, "8h"),
            (23 * 3600 + 59, "23h"),
            (172_800, "2d"),
            (2 * 86_400 + 4 * 3600, "2d4h"),
            (8 * 86_400, "8d"),
            (729 * 86_400, "729d"),
            (730 * 86_400, "2y"),
            (800 * 86_400, "2y70d"),
            (3000 * 86_400, "8y"),
        ] {
            assert_eq!(human(seconds), text, "{seconds}");
        }
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        assert_eq!(age_of(Some("2026-01-01T00:00:00Z"), now), "60s");
        assert_eq!(age_of(None, now), "<unknown>");
        assert_eq!(age_of(Some("soon"), now), "<invalid>");
    }
}
