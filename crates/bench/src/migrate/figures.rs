//! The figures of a move, and what several of them add up to.

use super::beats::Testimony;
use serde::Serialize;

/// What a way of moving reports of one move. Times are microseconds since the Unix epoch by this host's clock.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moved {
    /// When the move was asked for: ours, the VMIM's creation; bare, the start of the target's QEMU.
    pub asked_us: i64,
    /// When the order to send was given (bare: the command `migrate`), or was known to have been (ours: QEMU's first event).
    pub sending_us: Option<i64>,
    /// QEMU's `STOP` at the source.
    pub stop_us: Option<i64>,
    /// QEMU's `RESUME` at the target.
    pub resume_us: Option<i64>,
    /// When it was over: ours, `Succeeded` seen by the client; bare, the later of the source's `completed` and `RESUME`.
    pub over_us: i64,
    /// From the start of the target's QEMU until it can receive (bare), or from `Scheduled` to `TargetReady` (ours), in
    /// milliseconds.
    pub target_ready_ms: Option<f64>,
    /// QEMU's own figure.
    pub qemu_downtime_ms: Option<u64>,
    /// Bytes by QEMU's count.
    pub qemu_bytes: Option<u64>,
    /// Passes over the memory.
    pub passes: u64,
    /// What was seen on the way.
    pub samples: Vec<Sample>,
    /// Steps with the time since it was asked for, in milliseconds.
    pub steps: Vec<(String, f64)>,
    /// Ours: what was expected before, and what came.
    pub foretold: Option<Foretold>,
    /// Why the guest did not move.
    pub failure: Option<String>,
}

/// What a migration was expected to take before it began (`migrationState.forecast`), and what the same status says that it took.
/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Foretold {
    /// Whether it was expected to end by itself.
    pub converges: bool,
    /// The likely duration of the sending; none where it was not expected to end.
    pub total_ms: Option<f64>,
    /// The interval of it.
    pub total_within_ms: [Option<f64>; 2],
    /// The likely standstill.
    pub standstill_ms: Option<f64>,
    /// The interval of it.
    pub standstill_within_ms: [Option<f64>; 2],
    /// What the sending took.
    pub really_total_ms: f64,
    /// How long the guest stood still.
    pub really_standstill_ms: f64,
}

impl Foretold {
    /// By how many per cent of what it took the likely total was too long (or, below 0, too short).
    pub fn total_error_percent(&self) -> Option<f64> {
        self.total_ms.map(|told| (told - self.really_total_ms) / self.really_total_ms.max(1.0) * 100.0)
    }

    /// By how many milliseconds the likely standstill was too long (or, below 0, too short).
    pub fn standstill_error_ms(&self) -> Option<f64> {
        self.standstill_ms.map(|told| told - self.really_standstill_ms)
    }
}

/// A look at a migration that is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sample {
    /// Milliseconds since the order to send.
    pub at_ms: f64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes still to be sent.
    pub remaining_bytes: u64,
    /// How fast the guest writes to its memory, as QEMU estimates it after each pass.
    pub dirty_bytes_per_second: u64,
}

/// One move, measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// From asked for to over.
    pub total_ms: f64,
    /// From the order to send until it was over; leaves out the start of the target, and ours' way through the API before it.
    pub transfer_ms: Option<f64>,
    /// See [`Moved::target_ready_ms`].
    pub target_ready_ms: Option<f64>,
    /// `STOP` at the source to `RESUME` at the target, QEMU's stamps, one clock.
    pub standstill_ms: Option<f64>,
    /// What the heartbeats say.
    pub witness: Testimony,
    /// Bytes a second, by QEMU's count, from the order to send until the guest ran at the target: by then it was all there.
    pub bytes_per_second: Option<f64>,
    /// QEMU's own `downtime`.
    pub qemu_downtime_ms: Option<u64>,
    /// The longest time between two answers to pings that are 10 ms apart.
    pub ping_gap_ms: f64,
    /// Pings without an answer.
    pub pings_lost: u64,
    /// Answers that came twice.
    pub pings_doubled: u64,
    /// Pings that were sent while the guest stood still.
    pub pings_standing: u64,
    /// Those of them without an answer.
    pub pings_standing_lost: u64,
    /// Bytes in and out of the source's link, everything.
    pub wire_bytes: u64,
    /// Bytes by QEMU's count.
    pub qemu_bytes: Option<u64>,
    /// Processor time of all processes of this way from asked for to over, the guest's own work included.
    pub cpu_seconds: f64,
    /// Passes over the memory.
    pub passes: u64,
    /// See [`Moved::foretold`].
    pub foretold: Option<Foretold>,
    /// By how many per cent of what it took the likely total was too long (or, below 0, too short).
    pub total_error_percent: Option<f64>,
    /// By how many milliseconds the likely standstill was too long (or, below 0, too short).
    pub standstill_error_ms: Option<f64>,
    /// Pages that the guest found damaged since the move before.
    pub damaged_pages: u64,
    /// The machine's load (1 minute) before.
    pub load_before: f64,
    /// Why the guest did not move.
    pub failure: Option<String>,
    /// Something that must never be.
    pub wrong: Option<String>,
    /// Steps with the time since it was asked for, in milliseconds.
    pub steps: Vec<(String, f64)>,
    /// What was seen on the way.
    pub samples: Vec<Sample>,
}

impl Figures {
    /// Whether the guest moved and was whole afterwards. A move that is quick because it leaves pages behind is no measure for
    /// others.
    pub fn is_sound(&self) -> bool {
        self.failure.is_none() && self.wrong.is_none() && self.damaged_pages == 0
    }

    /// The times of a move.
    pub fn of(moved: Moved) -> Self {
        let ms = |from: i64, to: i64| (to - from) as f64 / 1e3;
        let moves = moved.failure.is_none();
        let sent_in = moved.sending_us.zip(moved.resume_us).map(|(from, to)| ms(from, to) / 1e3).filter(|s| *s > 0.0);
        Figures {
            total_ms: ms(moved.asked_us, moved.over_us),
            transfer_ms: moved.sending_us.filter(|_| moves).map(|from| ms(from, moved.over_us)),
            target_ready_ms: moved.target_ready_ms,
            standstill_ms: moved.stop_us.zip(moved.resume_us).filter(|_| moves).map(|(stop, run)| ms(stop, run)),
            bytes_per_second: sent_in.filter(|_| moves).and_then(|s| Some(moved.qemu_bytes? as f64 / s)),
            qemu_downtime_ms: moved.qemu_downtime_ms.filter(|_| moves),
            qemu_bytes: moved.qemu_bytes,
            passes: moved.passes,
            foretold: moved.foretold,
            total_error_percent: moved.foretold.and_then(|foretold| foretold.total_error_percent()),
            standstill_error_ms: moved.foretold.and_then(|foretold| foretold.standstill_error_ms()),
            failure: moved.failure,
            steps: moved.steps,
            samples: moved.samples,
            ..Figures::default()
        }
    }
}

/// Middle, least and most of some numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one (of an even number, the mean of the middle two).
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    /// Of these numbers; none of none.
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = numbers.into_iter().filter(|n| n.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => *sorted.get(middle)?,
            _ => (sorted.get(middle - 1)? + sorted.get(middle)?) / 2.0,
        };
        Some(Spread { median, min, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_have_the_middle_and_the_ends() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn a_forecast_is_off_by_so_much() {
        let foretold = Foretold {
            total_ms: Some(600.0),
            standstill_ms: Some(10.0),
            really_total_ms: 500.0,
            really_standstill_ms: 30.0,
            ..Foretold::default()
        };
        assert_eq!(foretold.total_error_percent(), Some(20.0));
        assert_eq!(foretold.standstill_error_ms(), Some(-20.0));
        assert_eq!(Foretold { total_ms: None, ..foretold }.total_error_percent(), None);
    }

    #[test]
    fn a_move_that_failed_has_no_standstill() {
        let moved = Moved {
            asked_us: 1_000,
            sending_us: Some(3_000),
            stop_us: Some(5_000),
            resume_us: Some(8_500),
            over_us: 11_000,
            qemu_bytes: Some(1100),
            qemu_downtime_ms: Some(1),
            ..Moved::default()
        };
        let figures = Figures::of(moved.clone());
        assert_eq!((figures.total_ms, figures.transfer_ms, figures.standstill_ms), (10.0, Some(8.0), Some(3.5)));
        assert_eq!(figures.bytes_per_second, Some(200_000.0));
        let figures = Figures::of(Moved { failure: Some("no".into()), ..moved });
        assert_eq!((figures.transfer_ms, figures.standstill_ms, figures.qemu_downtime_ms), (None, None, None));
    }
}
