//! How long it takes until a VM has left, as far as the API tells it.

use godwit_api::drain::{DrainBasis, DrainDuration, DrainVm};
use godwit_api::names::conditions;
use godwit_api::vmi::{
    DirtyRate, DirtySample, MigrationForecast, MigrationProgress, VirtualMachineInstanceMigrationState as State,
};
use godwit_api::{Condition, MigrationConfiguration, MigrationPhase, VirtualMachineInstance, config};
use godwit_forecast::{self as forecast, Guest, Terms, Written};
use jiff::Timestamp;

use super::link::{Bandwidth, Links};
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

const MIB: u64 = 1 << 20;

/// So many milliseconds are for ever: nobody can tell when it is over.
pub const FOREVER: u64 = u64::MAX / 4;

/// From the turn of a migration to its first byte: pod, launcher, QEMU, connections; in milliseconds.
const PREPARE_MS: [u64; 3] = [15_000, 1_500, 300];
/// The same where KubeVirt makes the pods.
const PREPARE_KUBEVIRT_MS: [u64; 3] = [60_000, 8_000, 3_000];
/// A guest's memory may be untouched but for this: a hundredth.
const LEAST_PART: u64 = 100;
/// The standstill that a migration allows itself when nobody has said how long (KubeVirt's), in milliseconds.
const MAX_DOWNTIME_MS: u64 = 300;
/// So often memory was sent when it is believed that its copying does not end: three passes, and what is then done about it
/// sends it once more; in its favour and to its disadvantage.
const SENT_UNTIL_DISRUPTED: [u64; 3] = [6, 4, 2];
/// Rates that differ by no more than this factor are about the same.
const ALIKE: u64 = 2;
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
    /// Of a migration: what it can use.
    pub bandwidth: Option<Bandwidth>,
    /// Bytes a second that the guest was measured to write.
    pub dirty: Option<u64>,
    /// What the model says of it.
    pub forecast: Option<forecast::Forecast>,
    /// What becomes of it when its copying does not end by itself.
    pub otherwise: &'static str,
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

    /// Fills in what it rests on.
    pub fn tell(&self, vm: &mut DrainVm) {
        vm.basis = Some(self.basis.clone());
        let Some(bandwidth) = &self.bandwidth else { return };
        vm.bytes = Some(self.bytes);
        vm.dirty_bytes_per_second = self.dirty;
        vm.bytes_per_second = Some(bandwidth.bytes_per_second);
        vm.bandwidth_basis = Some(bandwidth.basis.clone());
        let Some(forecast) = self.forecast.as_ref().filter(|_| self.basis == DrainBasis::DirtyRate) else { return };
        vm.converges = Some(forecast.converges);
        // What would end the copying is no standstill that is to be expected.
        vm.downtime = forecast.converges.then_some(DrainDuration {
            milliseconds: forecast.downtime.likely,
            min_milliseconds: forecast.downtime.least,
            max_milliseconds: forecast.downtime.most,
        });
        if !forecast.converges {
            let word = if forecast.certain { "does not" } else { "may not" };
            vm.reasons.push(format!(
                "it writes {} to its memory, and at {} the copying {word} end by itself: {}",
                rate(self.dirty.unwrap_or(0)),
                rate(bandwidth.bytes_per_second),
                self.otherwise
            ));
        }
    }
}

/// Bytes a second, for people.
pub fn rate(bytes: u64) -> String {
    match bytes {
        0..MIB => format!("{} KiB/s", bytes >> 10),
        _ => format!("{} MiB/s", bytes >> 20),
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
    /// What their links carry.
    pub links: Links,
}

impl Known {
    /// Gathers it.
    pub fn of(world: &World) -> Self {
        let mut prepare = Vec::new();
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
        }
        Self { prepare: spread(prepare), links: Links::of(world) }
    }

    fn prepare(&self, vmi: &VirtualMachineInstance) -> [u64; 3] {
        let ours = vmi.status.qemu_version.is_some() || vmi.status.accelerator.is_some();
        let [worst, likely, best] = if ours { PREPARE_MS } else { PREPARE_KUBEVIRT_MS };
        match self.prepare {
            Some([longest, median, shortest]) => [worst.max(longest), median, best.min(shortest)],
            None => [worst, likely, best],
        }
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

pub(super) fn per_second(bytes: u64, milliseconds: u64) -> u64 {
    bytes.saturating_mul(1000) / milliseconds.max(1)
}

fn milliseconds(bytes: u64, rate: u64) -> u64 {
    bytes.saturating_mul(1000) / rate.max(1)
}

/// Whether a migration copied memory to another node.
pub(super) fn copies(state: &State) -> bool {
    !state.is_local() && state.progress.as_ref().is_none_or(|progress| progress.memory.is_none())
}

/// How long the migration of a VMI takes from its turn on, with this configuration, to this node where it is known.
pub fn migration(
    vmi: &VirtualMachineInstance,
    configuration: &MigrationConfiguration,
    known: &Known,
    target: Option<&str>,
) -> Takes {
    let mut takes = copying(vmi, configuration, known, target);
    let prepare = known.prepare(vmi);
    for (all, more) in takes.milliseconds.iter_mut().zip(prepare) {
        *all = all.saturating_add(more).min(FOREVER);
    }
    takes
}

fn copying(
    vmi: &VirtualMachineInstance,
    configuration: &MigrationConfiguration,
    known: &Known,
    target: Option<&str>,
) -> Takes {
    let bytes = config::bytes_to_copy(vmi);
    // It is given up then, or ended in another way that is allowed.
    let limit = config::completion_timeout_seconds(configuration, bytes).map_or(FOREVER, |s| s.saturating_mul(1000));
    let cap = config::bandwidth_bytes(configuration);
    let source = vmi.status.node_name.as_deref().unwrap_or_default();
    let bandwidth = known.links.bandwidth(cap, source, target);
    let dirty = vmi.status.dirty_rate.as_ref();
    let forecast = dirty.and_then(|dirty| foretell(vmi, dirty, configuration, &bandwidth));
    let last = vmi.status.migration_state.as_ref().filter(|state| copies(state));
    let rate = bandwidth.bytes_per_second;
    let mut takes = Takes {
        milliseconds: [limit, milliseconds(bytes, rate), milliseconds(bytes / LEAST_PART, bandwidth.link.running.most)],
        bytes,
        basis: DrainBasis::Size,
        dirty: dirty.and_then(|dirty| dirty.bytes_per_second),
        forecast,
        bandwidth: Some(bandwidth),
        otherwise: otherwise(configuration, limit),
    };
    let of_now = |last: &&State| forecast.is_none() || is_alike(last, dirty, cap, rate);
    if let Some(likely) = last.filter(of_now).and_then(|last| measured(last, cap, rate)) {
        takes.milliseconds = [likely.saturating_mul(3).saturating_add(1_000).min(limit), likely, likely / 2];
        takes.basis = DrainBasis::LastMigration;
    } else if let Some(forecast) = &forecast {
        takes.milliseconds = corners(forecast, &takes, dirty, configuration, limit);
        takes.basis = DrainBasis::DirtyRate;
    } else if let Some(times) = last.and_then(|last| foretold(last.forecast.as_ref()?, limit)) {
        takes.milliseconds = times;
        takes.basis = DrainBasis::Forecast;
    }
    takes
}

/// What is done about a migration whose copying does not end by itself.
fn otherwise(configuration: &MigrationConfiguration, limit: u64) -> &'static str {
    let post_copy = configuration.allow_post_copy == Some(true);
    if configuration.allow_workload_disruption.unwrap_or(post_copy) {
        return if post_copy { "post-copy ends it" } else { "the guest is paused to end it" };
    }
    if configuration.fail_when_not_converging == Some(true) {
        return "it fails, and is tried again";
    }
    if limit == FOREVER { "nothing ends it" } else { "it is given up when its time is over, and tried again" }
}

/// What the model says of a guest as it was measured.
fn foretell(
    vmi: &VirtualMachineInstance,
    dirty: &DirtyRate,
    configuration: &MigrationConfiguration,
    bandwidth: &Bandwidth,
) -> Option<forecast::Forecast> {
    let sample =
        |one: &DirtySample| Written { within_ms: one.within_milliseconds, bytes: one.bytes, margin: one.margin_bytes };
    let memory = dirty.memory_bytes.filter(|bytes| *bytes > 0)?;
    let guest = Guest {
        memory,
        present: dirty.present_bytes.unwrap_or(memory),
        written: dirty.samples.iter().map(sample).collect(),
        passes: Vec::new(),
        stands_still: vmi.condition(conditions::PAUSED).is_some_and(Condition::is_true),
    };
    let terms = Terms {
        max_downtime_ms: configuration.max_downtime_ms.filter(|ms| *ms > 0).unwrap_or(MAX_DOWNTIME_MS),
        one_pass: dirty.one_pass == Some(true),
        auto_converge: configuration.allow_auto_converge == Some(true),
        throttled_percent: 0,
        disks: config::bytes_to_copy(vmi).saturating_sub(config::memory_bytes(vmi)),
    };
    forecast::forecast(&guest, bandwidth.link, terms, None)
}

/// What it says, by corner; what does not end by itself is ended or given up.
fn corners(
    told: &forecast::Forecast,
    takes: &Takes,
    dirty: Option<&DirtyRate>,
    configuration: &MigrationConfiguration,
    limit: u64,
) -> [u64; 3] {
    let disrupted = configuration.allow_workload_disruption.or(configuration.allow_post_copy) == Some(true);
    let present = dirty.and_then(|dirty| dirty.present_bytes).unwrap_or(takes.bytes);
    let rate = takes.bandwidth.as_ref().map_or(1, |bandwidth| bandwidth.bytes_per_second);
    let expected = [told.duration.most, told.duration.likely, told.duration.least];
    let mut times = [0; 3];
    for ((time, expected), sent) in times.iter_mut().zip(expected).zip(SENT_UNTIL_DISRUPTED) {
        *time = match expected {
            Some(expected) => expected.min(limit),
            None if disrupted => milliseconds(present, rate).saturating_mul(sent).min(limit),
            None => limit,
        };
    }
    // What ends it early may take less than what it takes by itself at worst.
    let [worst, likely, best] = times;
    [worst.max(likely), likely, best.min(likely)]
}

/// Whether the guest does what it did at its last migration, under the same cap.
fn is_alike(last: &State, dirty: Option<&DirtyRate>, cap: Option<u64>, rate: u64) -> bool {
    let before = last.forecast.as_ref().and_then(|forecast| forecast.dirty_bytes_per_second);
    let (Some(before), Some(now)) = (before, dirty.and_then(|dirty| dirty.bytes_per_second)) else { return false };
    // What is little beside the bandwidth takes little time, however much more or less it is.
    let (less, more) = (before.min(now), before.max(now));
    let alike = more <= less.saturating_mul(ALIKE) || more < rate / 8;
    alike && last.migration_configuration.as_ref().map(config::bandwidth_bytes) == Some(cap)
}

/// What the last migration of the guest took, at the cap of now.
fn measured(last: &State, cap: Option<u64>, rate: u64) -> Option<u64> {
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
        (Some(before), Some(sent)) if before != cap => Some(milliseconds(sent, rate)),
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
    let target = vmi.status.migration_state.as_ref().and_then(|state| state.target_node.as_deref());
    let whole = migration(vmi, configuration, known, target);
    let state = vmi.status.migration_state.as_ref().filter(|state| state.completed != Some(true));
    let progress = state.and_then(|state| state.progress.as_ref());
    let Some(likely) = progress.and_then(|progress| remaining(progress, now)) else { return whole };
    let worst = whole.at(WORST).max(likely);
    Takes { milliseconds: [worst, likely, likely / 2], basis: DrainBasis::Progress, ..whole }
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
        bandwidth: None,
        dirty: None,
        forecast: None,
        otherwise: "",
    }
}
