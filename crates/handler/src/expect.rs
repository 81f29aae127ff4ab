//! What a migration is expected to take: the launcher's measurements put to the model of `godwit_launcher::rpc::forecast`.

use godwit_launcher::rpc::forecast::{self, Forecast, Guest, Link, Terms, Underway};
use godwit_launcher::rpc::{MigrationFacts, State};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::facts::MigrationView;

/// The standstill that launchers accept when nobody has said how long (KubeVirt's).
const MAX_DOWNTIME_MS: u64 = 300;
/// So many passes in a row have to show that it does not end before it is believed.
const PASSES_TO_BELIEVE: usize = 3;

/// What was expected, and of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prediction {
    /// When that was.
    pub at: Timestamp,
    /// What was expected.
    pub forecast: Forecast,
    /// How fast the guest wrote, in bytes a second, by the longest measurement.
    pub dirty: u64,
    /// How fast memory was taken to go, in bytes a second.
    pub rate: u64,
}

/// What migration `m` of this launcher's guest will take. `link_rate`: what the link to the target's node was seen to carry;
/// `compressed`: pages are compressed on their way. None while the launcher has measured nothing.
#[must_use]
pub fn before(
    state: &State,
    m: &MigrationView,
    link_rate: Option<u64>,
    compressed: bool,
    now: Timestamp,
) -> Option<Prediction> {
    let link = link(m.bandwidth, link_rate, compressed);
    let sizes = state.volumes.iter().filter(|volume| !volume.shared).filter_map(|volume| volume.size_bytes);
    let terms = Terms { disks: sizes.sum(), ..terms(state, m, 0) };
    let guest = guest(state, None)?;
    let longest = guest.written.last().copied();
    let forecast = forecast::forecast(&guest, link, terms, None)?;
    let dirty = longest.map_or(0, |longest| longest.rate());
    Some(Prediction { at: now, forecast, dirty, rate: link.running.likely })
}

/// What the rest of a migration under way will take, while its guest runs at the source. None while nothing was measured.
#[must_use]
pub fn rest(state: &State, f: &MigrationFacts, m: &MigrationView, link_rate: Option<u64>) -> Option<Forecast> {
    let (guest, link, terms, underway) = question(state, f, m, link_rate)?;
    forecast::forecast(&guest, link, terms, underway)
}

/// Whether its passes so far show that it does not end by itself, however kindly they are read.
#[must_use]
pub fn is_hopeless(state: &State, f: &MigrationFacts, m: &MigrationView, link_rate: Option<u64>) -> bool {
    if f.written.len() < PASSES_TO_BELIEVE || state.memory.one_pass || f.status != "active" {
        return false;
    }
    question(state, f, m, link_rate)
        .is_some_and(|(guest, link, terms, underway)| forecast::is_hopeless(&guest, link, terms, underway))
}

type Question = (Guest, Link, Terms, Option<Underway>);

fn question(state: &State, f: &MigrationFacts, m: &MigrationView, link_rate: Option<u64>) -> Option<Question> {
    // What the guest writes need not be sent.
    if f.by_reference {
        return None;
    }
    let link = link(f.bandwidth_limit.unwrap_or(m.bandwidth), link_rate, f.transport.zstd).corrected(&f.written);
    let mut terms = terms(state, m, f.throttle_percent.unwrap_or(0));
    let underway = match f.status.as_str() {
        // Disks go first.
        "setup" => {
            terms.disks = f.remaining_bytes;
            None
        }
        "active" => Some(Underway {
            remaining: f.remaining_bytes,
            pass: f.iteration,
            downtime_limit_ms: f.downtime_limit_ms.unwrap_or(0),
        }),
        _ => return None,
    };
    Some((guest(state, Some(f))?, link, terms, underway))
}

fn link(cap: u64, link_rate: Option<u64>, compressed: bool) -> Link {
    let link = forecast::usable(Some(cap), link_rate, None);
    if compressed { link.compressed() } else { link }
}

fn terms(state: &State, m: &MigrationView, throttled_percent: u64) -> Terms {
    Terms {
        max_downtime_ms: m.max_downtime_ms.filter(|ms| *ms > 0).unwrap_or(MAX_DOWNTIME_MS),
        one_pass: state.memory.one_pass,
        auto_converge: m.allow_auto_converge,
        throttled_percent,
        disks: 0,
    }
}

fn guest(state: &State, f: Option<&MigrationFacts>) -> Option<Guest> {
    let memory = &state.memory;
    let passes = f.map(|f| f.written.clone()).unwrap_or_default();
    let stands_still = match f {
        Some(f) => f.guest_paused || f.paused_by_migration || f.stop_us.is_some(),
        None => state.phase == godwit_launcher::rpc::DomainPhase::Paused,
    };
    // A paused guest that was never measured: all of its memory may be there.
    let total = if memory.total_bytes > 0 { memory.total_bytes } else { f.map_or(0, |f| f.total_bytes) };
    (total > 0).then(|| Guest {
        memory: total,
        present: if memory.written.is_empty() { total } else { memory.present_bytes },
        written: memory.written.clone(),
        passes,
        stands_still,
    })
}

/// `migrationState.forecast`.
#[must_use]
pub fn shown(made: &Prediction) -> Value {
    let Prediction { at, forecast, dirty, rate } = made;
    let at = Timestamp::from_second(at.as_second()).unwrap_or(*at).to_string();
    json!({
        "madeAt": at,
        "converges": forecast.converges,
        "durationMilliseconds": forecast.duration.likely,
        "minDurationMilliseconds": forecast.duration.least,
        "maxDurationMilliseconds": forecast.duration.most,
        "downtimeMilliseconds": forecast.downtime.likely,
        "minDowntimeMilliseconds": forecast.downtime.least,
        "maxDowntimeMilliseconds": forecast.downtime.most,
        "passes": forecast.converges.then_some(forecast.passes),
        "dirtyBytesPerSecond": dirty,
        "bytesPerSecond": rate,
    })
}

#[cfg(test)]
mod tests {
    use godwit_api::vmi::MigrationForecast;
    use godwit_launcher::rpc::{DomainPhase, MemoryFacts, MigrationRole, Written};

    use super::*;

    const MI: u64 = 1 << 20;

    fn now() -> Timestamp {
        "2026-11-20T20:00:00.5Z".parse().unwrap()
    }

    /// A guest of 1 GiB with 200 MiB in it, that writes to 100 of them at this rate.
    fn state(rate: u64) -> State {
        let at = |within_ms| Written { within_ms, bytes: (rate * within_ms / 1000).min(100 * MI), margin: 0 };
        let memory = MemoryFacts {
            total_bytes: 1 << 30,
            present_bytes: 200 * MI,
            written: [100, 1000, 3000].map(at).into(),
            measured_us: Some(1),
            one_pass: false,
        };
        State { phase: DomainPhase::Running, memory, ..State::default() }
    }

    fn capped(mib: u64) -> MigrationView {
        MigrationView { bandwidth: mib * MI, ..MigrationView::default() }
    }

    fn passes(n: usize, within_ms: u64, bytes: u64) -> MigrationFacts {
        let mut f = MigrationFacts::new("m", MigrationRole::Source);
        f.status = "active".into();
        f.iteration = n as u64 + 1;
        f.written = vec![Written { within_ms, bytes, margin: 0 }; n];
        (f.remaining_bytes, f.downtime_limit_ms) = (bytes, Some(20));
        f
    }

    #[test]
    fn a_launcher_that_has_measured_nothing_lets_nothing_be_expected() {
        assert_eq!(before(&State::default(), &capped(64), None, false, now()), None);
        let f = passes(3, 1000, MI);
        assert!(rest(&State::default(), &f, &capped(64), None).is_none(), "not even how much memory there is");
        let mut sent = f;
        sent.total_bytes = 1 << 30;
        assert!(rest(&State::default(), &sent, &capped(64), None).is_some(), "its passes tell of an older launcher's");
    }

    #[test]
    fn what_is_shown_is_what_the_api_knows() {
        let made = before(&state(10 * MI), &capped(50), Some(1 << 30), false, now()).unwrap();
        assert!(made.forecast.converges);
        let value = shown(&made);
        let read: MigrationForecast = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), value, "no member is unknown");
        assert_eq!((read.dirty_bytes_per_second, read.bytes_per_second), (Some(10 * MI), Some(50 * MI)));
        assert_eq!(read.made_at.unwrap().0.to_string(), "2026-11-20T20:00:00Z");
        let duration = read.duration_milliseconds.unwrap();
        assert!((4000..7000).contains(&duration), "{duration}");
    }

    #[test]
    fn three_passes_that_do_not_get_nearer_are_believed() {
        let m = capped(50);
        assert!(is_hopeless(&state(90 * MI), &passes(3, 2000, 100 * MI), &m, None));
        assert!(!is_hopeless(&state(90 * MI), &passes(2, 2000, 100 * MI), &m, None), "too early");
        assert!(!is_hopeless(&state(90 * MI), &passes(3, 200, 10 * MI), &m, None));
        let wide = MigrationView { max_downtime_ms: Some(3000), ..capped(50) };
        assert!(!is_hopeless(&state(90 * MI), &passes(3, 2000, 100 * MI), &wide, None), "100 MiB fit into 3 s");
        let throttled = MigrationView { allow_auto_converge: true, ..capped(50) };
        assert!(!is_hopeless(&state(90 * MI), &passes(3, 2000, 100 * MI), &throttled, None), "QEMU can slow it down");
        let mut f = passes(3, 2000, 100 * MI);
        f.throttle_percent = Some(99);
        assert!(is_hopeless(&state(90 * MI), &f, &throttled, None), "more than that it cannot");
        let mut once = state(90 * MI);
        once.memory.one_pass = true;
        assert!(!is_hopeless(&once, &passes(3, 2000, 100 * MI), &m, None), "its one pass ends");
    }

    #[test]
    fn a_guest_that_stands_still_is_only_carried() {
        let mut f = passes(3, 2000, 100 * MI);
        f.paused_by_migration = true;
        assert!(!is_hopeless(&state(90 * MI), &f, &capped(50), None));
        let left = rest(&state(90 * MI), &f, &capped(50), None).unwrap().duration.likely.unwrap();
        assert!((2000..2100).contains(&left), "{left}");
    }
}
