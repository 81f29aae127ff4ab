//! How long it takes until a VM has left, as far as the API tells it.

use godwit_api::drain::{DrainBasis, DrainDuration};
use godwit_api::vmi::{MigrationForecast, MigrationProgress, VirtualMachineInstanceMigrationState as State};
use godwit_api::{MigrationConfiguration, MigrationPhase, VirtualMachineInstance, config};
use jiff::Timestamp;

use crate::world::World;

/// A reading of what is known: the worst, the likely or the best.
pub type Corner = usize;
/// Everything to the drain's disadvantage.
pub const WORST: Corner = 0;
/// As is likely.
pub const LIKELY: Corner = 1;
/// Everything in its favour.
pub const BEST: Corner = 2;
/// All of them.
pub const CORNERS: [Corner; 3] = [WORST, LIKELY, BEST];

/// So many milliseconds are for ever: nobody can tell when it is over.
pub const FOREVER: u64 = u64::MAX / 4;

/// From the turn of a migration to its first byte: pod, launcher, QEMU, connections; in milliseconds.
const PREPARE_MS: [u64; 3] = [15_000, 1_500, 300];
/// The same where KubeVirt makes the pods.
const PREPARE_KUBEVIRT_MS: [u64; 3] = [60_000, 8_000, 3_000];
/// A link of which nothing is known, in bytes a second: a busy gigabit, two cores that encrypt, a fast link.
const UNKNOWN_LINK: [u64; 3] = [40 << 20, 400 << 20, 4 << 30];
/// A guest's memory may be untouched but for this: a hundredth.
const LEAST_PART: u64 = 100;
/// Rates of smaller migrations tell nothing of the link.
const TELLING_BYTES: u64 = 16 << 20;
/// A guest that minds the power button has gone after this long.
const SHUTDOWN_MS: u64 = 5_000;
/// The launcher's own time beyond the guest's grace period.
const GRACE_MARGIN_MS: u64 = 15_000;
/// Seconds between the power button and the kill when the VMI does not say.
const GRACE_SECONDS: i64 = 30;

/// How long something takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Takes {
    /// In milliseconds, by corner.
    pub milliseconds: [u64; 3],
    /// Bytes to be copied at least once.
    pub bytes: u64,
    /// What it rests on.
    pub basis: DrainBasis,
}

impl Takes {
    /// How long at a corner.
    pub fn at(&self, corner: Corner) -> u64 {
        self.milliseconds.get(corner).copied().unwrap_or(FOREVER)
    }

    /// As the plan tells it.
    pub fn told(&self) -> DrainDuration {
        let [worst, likely, best] = self.milliseconds;
        DrainDuration { milliseconds: finite(likely), min_milliseconds: finite(best), max_milliseconds: finite(worst) }
    }
}

/// A time, unless it is for ever.
pub fn finite(milliseconds: u64) -> Option<u64> {
    (milliseconds < FOREVER).then_some(milliseconds)
}

/// What the cluster's finished migrations tell of those to come.
pub struct Known {
    /// From the turn to the first byte, measured: the longest, the median, the shortest.
    prepare: Option<[u64; 3]>,
    /// Bytes a second: the least, the median, the most.
    rate: Option<[u64; 3]>,
}

impl Known {
    /// Gathers it.
    pub fn of(world: &World) -> Self {
        let (mut prepare, mut rate) = (Vec::new(), Vec::new());
        for migration in world.migrations.iter().filter(|one| one.status.phase == MigrationPhase::Succeeded) {
            let entered = |phase: MigrationPhase| {
                let all = migration.status.phase_transition_timestamps.iter();
                let mut of = all.filter(|entry| entry.phase == phase);
                of.find_map(|entry| entry.phase_transition_timestamp.as_ref()).map(|time| time.0)
            };
            if let (Some(turn), Some(sends)) = (entered(MigrationPhase::Scheduling), entered(MigrationPhase::Running)) {
                // Times are in whole seconds.
                prepare.push(between(turn, sends).saturating_add(500));
            }
            let state = migration.status.migration_state.as_ref();
            let progress = state.filter(|state| copies(state)).and_then(|state| state.progress.as_ref());
            let sent = progress.and_then(|progress| progress.bytes_processed.zip(progress.total_milliseconds));
            rate.extend(sent.filter(|(bytes, _)| *bytes >= TELLING_BYTES).map(|(bytes, ms)| per_second(bytes, ms)));
        }
        // Bytes a second are the better the more there are.
        Self { prepare: spread(prepare), rate: spread(rate).map(|[most, median, least]| [least, median, most]) }
    }

    fn prepare(&self, vmi: &VirtualMachineInstance) -> [u64; 3] {
        let ours = vmi.status.qemu_version.is_some() || vmi.status.accelerator.is_some();
        let [worst, likely, best] = if ours { PREPARE_MS } else { PREPARE_KUBEVIRT_MS };
        match self.prepare {
            Some([longest, median, shortest]) => [worst.max(longest), median, best.min(shortest)],
            None => [worst, likely, best],
        }
    }

    /// Bytes a second that a migration gets.
    fn rate(&self, cap: Option<u64>) -> [u64; 3] {
        let link = self.rate.unwrap_or(UNKNOWN_LINK);
        let [least, _, most] = UNKNOWN_LINK;
        let [slow, likely, fast] = [link[0].min(least), link[1], link[2].max(most)];
        // What others got under a cap tells nothing of more than it.
        let likely = if self.rate.is_some() { likely } else { cap.unwrap_or(likely).min(likely) };
        [slow, likely, fast].map(|rate| cap.map_or(rate, |cap| rate.min(cap)).max(1))
    }
}

/// The greatest, the median and the least.
fn spread(mut all: Vec<u64>) -> Option<[u64; 3]> {
    all.sort_unstable();
    Some([*all.last()?, *all.get(all.len() / 2)?, *all.first()?])
}

fn between(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(to.duration_since(from).as_millis()).unwrap_or(0)
}

fn per_second(bytes: u64, milliseconds: u64) -> u64 {
    bytes.saturating_mul(1000) / milliseconds.max(1)
}

fn milliseconds(bytes: u64, rate: u64) -> u64 {
    bytes.saturating_mul(1000) / rate.max(1)
}

/// Whether a migration copied memory to another node.
fn copies(state: &State) -> bool {
    !state.is_local() && state.progress.as_ref().is_none_or(|progress| progress.memory.is_none())
}

/// How long the migration of a VMI takes from its turn on, with this configuration.
pub fn migration(vmi: &VirtualMachineInstance, configuration: &MigrationConfiguration, known: &Known) -> Takes {
    let bytes = config::bytes_to_copy(vmi);
    let prepare = known.prepare(vmi);
    let (copying, basis) = copying(vmi, configuration, known, bytes);
    let sum = |corner: Corner| {
        let (one, other) = (prepare.get(corner).copied(), copying.get(corner).copied());
        one.zip(other).map_or(FOREVER, |(one, other)| one.saturating_add(other).min(FOREVER))
    };
    Takes { milliseconds: CORNERS.map(sum), bytes, basis }
}

fn copying(
    vmi: &VirtualMachineInstance,
    configuration: &MigrationConfiguration,
    known: &Known,
    bytes: u64,
) -> ([u64; 3], DrainBasis) {
    // It is given up then, or ended in another way that is allowed.
    let limit = config::completion_timeout_seconds(configuration, bytes).map_or(FOREVER, |s| s.saturating_mul(1000));
    let cap = config::bandwidth_bytes(configuration);
    let last = vmi.status.migration_state.as_ref().filter(|state| copies(state));
    if let Some(likely) = last.and_then(|last| measured(last, cap, known)) {
        return (
            [likely.saturating_mul(3).saturating_add(1_000).min(limit), likely, likely / 2],
            DrainBasis::LastMigration,
        );
    }
    if let Some(forecast) = last.and_then(|last| last.forecast.as_ref())
        && let Some(times) = foretold(forecast, limit)
    {
        return (times, DrainBasis::Forecast);
    }
    let [_, likely, fast] = known.rate(cap);
    ([limit, milliseconds(bytes, likely), milliseconds(bytes / LEAST_PART, fast)], DrainBasis::Size)
}

/// What the last migration of the guest took, at the cap of now.
fn measured(last: &State, cap: Option<u64>, known: &Known) -> Option<u64> {
    if last.completed != Some(true) || last.failed == Some(true) {
        return None;
    }
    let progress = last.progress.as_ref();
    let total = progress.and_then(|progress| progress.total_milliseconds).or_else(|| {
        let (start, end) = (last.start_timestamp.as_ref()?, last.end_timestamp.as_ref()?);
        Some(between(start.0, end.0).saturating_add(500))
    })?;
    let before = last.migration_configuration.as_ref().map(config::bandwidth_bytes);
    let sent = progress.and_then(|progress| progress.bytes_processed);
    match (before, sent) {
        (Some(before), Some(sent)) if before != cap => {
            let [_, likely, _] = known.rate(cap);
            Some(milliseconds(sent, likely))
        }
        _ => Some(total),
    }
}

/// What the handler expected, by corner.
fn foretold(forecast: &MigrationForecast, limit: u64) -> Option<[u64; 3]> {
    let likely = forecast.duration_milliseconds.unwrap_or(limit);
    let worst = forecast.max_duration_milliseconds.unwrap_or(limit);
    let best = forecast.min_duration_milliseconds.unwrap_or(likely);
    (forecast.made_at.is_some()).then_some([worst.min(limit), likely.min(limit), best.min(limit)])
}

/// How long a migration that is under way takes from now on.
pub fn rest(
    vmi: &VirtualMachineInstance,
    configuration: &MigrationConfiguration,
    known: &Known,
    now: Timestamp,
) -> Takes {
    let whole = migration(vmi, configuration, known);
    let state = vmi.status.migration_state.as_ref().filter(|state| state.completed != Some(true));
    let progress = state.and_then(|state| state.progress.as_ref());
    let Some(likely) = progress.and_then(|progress| remaining(progress, now)) else { return whole };
    let worst = whole.at(WORST).max(likely);
    Takes { milliseconds: [worst, likely, likely / 2], bytes: whole.bytes, basis: DrainBasis::Progress }
}

fn remaining(progress: &MigrationProgress, now: Timestamp) -> Option<u64> {
    let told = progress.expected_end_timestamp.as_ref().map(|end| between(now, end.0));
    told.or_else(|| Some(milliseconds(progress.bytes_remaining?, progress.bytes_per_second.filter(|rate| *rate > 0)?)))
}

/// How long the shutdown of a VMI takes.
pub fn shutdown(vmi: &VirtualMachineInstance) -> Takes {
    let grace = vmi.spec.termination_grace_period_seconds.unwrap_or(GRACE_SECONDS).max(0);
    let grace = u64::try_from(grace).unwrap_or(0).saturating_mul(1000);
    let worst = grace.saturating_add(GRACE_MARGIN_MS).min(FOREVER);
    Takes {
        milliseconds: [worst, grace.min(SHUTDOWN_MS).saturating_add(500), 100],
        bytes: 0,
        basis: DrainBasis::GracePeriod,
    }
}
