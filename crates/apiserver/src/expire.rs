//! Events are kept for an hour.

use crate::server::Inner;
use jiff::Timestamp;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

const EVENTS: &str = "/registry/core/events/";
const KEPT_SECONDS: i64 = 3600;
const INTERVAL: Duration = Duration::from_secs(60);

pub(crate) async fn run(inner: Arc<Inner>) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let now = Timestamp::now();
        for entry in inner.store.list(EVENTS, None, 0).entries {
            if expired(entry.json(), now) {
                // Changed meanwhile: it lives on.
                let _ = inner.store.delete(&entry.key, Some(entry.revision)).await;
            }
        }
    }
}

/// Whether the last sign of life is too old.
fn expired(event: &Value, now: Timestamp) -> bool {
    let times =
        ["/lastTimestamp", "/series/lastObservedTime", "/eventTime", "/firstTimestamp", "/metadata/creationTimestamp"];
    let last = times.iter().filter_map(|at| event.pointer(at)?.as_str()?.parse::<Timestamp>().ok()).max();
    last.is_some_and(|last| now.as_second() - last.as_second() > KEPT_SECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_last_sign_of_life_counts() {
        let now: Timestamp = "2026-01-01T12:00:00Z".parse().unwrap();
        let event = |last: &str| json!({"lastTimestamp": last, "eventTime": null, "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}});
        assert!(expired(&event("2026-01-01T10:59:59Z"), now));
        assert!(!expired(&event("2026-01-01T11:30:00Z"), now));
        assert!(expired(&json!({"metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}}), now));
        assert!(!expired(&json!({}), now));
    }
}
