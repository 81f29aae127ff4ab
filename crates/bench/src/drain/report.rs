//! What emptying a node took, beside what bytes, bandwidth and limits allow.

use crate::migrate::figures::Spread;
use godwit_api::drain::DrainPlan;
use serde::Serialize;
use std::fmt::{Formatter, Result};

const MIB: f64 = (1_u64 << 20) as f64;
/// A bound is met when no more than this times of it was needed.
const MET: f64 = 1.1;

/// How many migrations may be under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// In the cluster.
    pub cluster: u32,
    /// From a node.
    pub outbound: u32,
    /// To a node.
    pub inbound: u32,
}

impl Limits {
    /// How many guests can be on their way from one node to so many others.
    #[must_use]
    pub fn at_once(&self, guests: usize, others: usize) -> usize {
        let to = usize::try_from(self.inbound).unwrap_or(usize::MAX).saturating_mul(others);
        let most = usize::try_from(self.outbound.min(self.cluster)).unwrap_or(usize::MAX);
        most.min(to).min(guests).max(1)
    }
}

/// What the plan said just before. Milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Estimate {
    /// VMs that it would migrate.
    pub migrate: usize,
    /// Until the last has left, as is likely.
    pub likely_ms: Option<u64>,
    /// No less.
    pub least_ms: Option<u64>,
    /// No more.
    pub most_ms: Option<u64>,
    /// What would bound it, the strongest first: setting, and for how long somebody waits for it.
    pub bounds: Vec<(String, Option<u64>)>,
}

impl From<&DrainPlan> for Estimate {
    fn from(plan: &DrainPlan) -> Self {
        let whole = plan.duration.clone().unwrap_or_default();
        let migrate = plan.vms.iter().filter(|vm| vm.is(&godwit_api::drain::DrainOutcome::Migrate)).count();
        Self {
            migrate,
            likely_ms: whole.milliseconds,
            least_ms: whole.min_milliseconds,
            most_ms: whole.max_milliseconds,
            bounds: plan.bounds.iter().map(|bound| (bound.limit.clone(), bound.milliseconds)).collect(),
        }
    }
}

/// How one guest left. Milliseconds from the moment at which the node began to be emptied.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Departure {
    /// Its VMI.
    pub vmi: String,
    /// When its migration had its turn.
    pub turn_ms: Option<f64>,
    /// When its memory began to be sent.
    pub sends_ms: Option<f64>,
    /// When its migration had succeeded.
    pub ends_ms: Option<f64>,
    /// Bytes: sent (real), or of its memory (simulated).
    pub bytes: Option<u64>,
    /// How long these take at its bandwidth. Unset without a cap.
    pub least_ms: Option<f64>,
    /// Its migrations that failed.
    pub failed: u32,
}

impl Departure {
    /// From its turn to the first byte: pod, launcher, QEMU, connections.
    fn preparing_ms(&self) -> Option<f64> {
        Some(self.sends_ms? - self.turn_ms?)
    }

    /// From the first byte to the end.
    fn sending_ms(&self) -> Option<f64> {
        Some(self.ends_ms? - self.sends_ms?)
    }

    fn own_ms(&self) -> Option<f64> {
        Some(self.ends_ms? - self.turn_ms?)
    }
}

/// What the time could have been, and where it went.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bounds {
    /// So many guests can be on their way at once.
    pub at_once: usize,
    /// All bytes at their bandwidth, so many at once. Unset without a cap.
    pub bytes_ms: Option<f64>,
    /// How many times of that was needed.
    pub bytes_ratio: Option<f64>,
    /// Every migration as long as it took from its turn to its end, so many at once.
    pub turns_ms: Option<f64>,
    /// How many times of that was needed.
    pub turns_ratio: Option<f64>,
    /// Where the time went of all that may be on their way at once; parts of one.
    pub parts: Option<Parts>,
    /// What the time was spent on, in a sentence.
    pub because: String,
}

/// Where the time of all turns went; together they are one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Parts {
    /// Pod, launcher, QEMU and connections.
    pub preparing: f64,
    /// Sending, as long as the bandwidth needs for the bytes.
    pub bytes: f64,
    /// Sending beyond that: below the bandwidth, what was written again, and the hand-over.
    pub beyond: f64,
    /// Nobody had the turn.
    pub idle: f64,
}

impl Bounds {
    /// Of these departures.
    fn of(departures: &[Departure], at_once: usize, total_ms: Option<f64>) -> Self {
        let slots = at_once as f64;
        let sum = |of: &dyn Fn(&Departure) -> Option<f64>| departures.iter().map(of).sum::<Option<f64>>();
        let most = |of: &dyn Fn(&Departure) -> Option<f64>| departures.iter().filter_map(of).fold(0.0, f64::max);
        // No guest is on its way twice at once: the longest one bounds it too.
        let bound = |of: &dyn Fn(&Departure) -> Option<f64>| Some((sum(of)? / slots).max(most(of)));
        let (least, own) = (|one: &Departure| one.least_ms, |one: &Departure| one.own_ms());
        let (bytes_ms, turns_ms) = (bound(&least), bound(&own));
        let ratio = |bound: Option<f64>| Some(total_ms? / bound.filter(|bound| *bound > 0.0)?);
        let mut bounds = Self {
            at_once,
            bytes_ms,
            bytes_ratio: ratio(bytes_ms),
            turns_ms,
            turns_ratio: ratio(turns_ms),
            parts: None,
            because: "not all guests have left".to_owned(),
        };
        let preparing = sum(&|one| one.preparing_ms());
        if let (Some(total), Some(preparing), Some(sending)) = (total_ms, preparing, sum(&|one| one.sending_ms())) {
            let all = (total * slots).max(f64::MIN_POSITIVE);
            let bytes = sum(&least).unwrap_or(0.0).min(sending);
            let [preparing, bytes, beyond] = [preparing, bytes, sending - bytes].map(|part| part / all);
            let parts = Parts { preparing, bytes, beyond, idle: (1.0 - preparing - bytes - beyond).max(0.0) };
            bounds.parts = Some(parts);
            bounds.because = bounds.why(&parts);
        }
        bounds
    }

    fn why(&self, parts: &Parts) -> String {
        if self.bytes_ratio.is_some_and(|ratio| ratio <= MET) {
            return "bytes, bandwidth and limits: the bound is met".to_owned();
        }
        let Parts { preparing, bytes, beyond, idle } = *parts;
        let mut all = [
            (preparing, "what precedes the copying: pod, launcher, QEMU, connections"),
            (bytes, "the bytes at their bandwidth"),
            (beyond, "sending below the bandwidth, what was written again, and the hand-over"),
            (
                idle,
                "nobody: between one migration's end and the next one's turn, and before the first and after the last",
            ),
        ];
        all.sort_by(|(one, _), (other, _)| other.total_cmp(one));
        let [(part, first), (second_part, second), ..] = all;
        format!(
            "of the {} that may be on their way at once, {:.0}% of the time went to {first}; then ({:.0}%) {second}",
            self.at_once,
            part * 100.0,
            second_part * 100.0
        )
    }
}

/// A node that was emptied.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Drained {
    /// Guests on it.
    pub guests: usize,
    /// Nodes that took them.
    pub others: usize,
    /// How many may be on their way.
    pub limits: Limits,
    /// At what bandwidth each, in words.
    pub bandwidth: String,
    /// What the plan said.
    pub plan: Estimate,
    /// Until no guest was left on the node.
    pub total_ms: Option<f64>,
    /// From a guest's turn to its end; over all guests.
    pub guest_ms: Option<Spread>,
    /// The part of it before the first byte.
    pub preparing_ms: Option<Spread>,
    /// The part of it from then on.
    pub sending_ms: Option<Spread>,
    /// All guests' bytes.
    pub bytes: Option<u64>,
    /// What it could have been.
    pub bounds: Bounds,
    /// The guests.
    pub departures: Vec<Departure>,
}

impl Drained {
    /// What came of it.
    pub(crate) fn new(
        limits: Limits,
        others: usize,
        bandwidth: String,
        plan: &DrainPlan,
        total_ms: Option<f64>,
        departures: Vec<Departure>,
    ) -> Self {
        let guests = departures.len();
        let spread =
            |of: &dyn Fn(&Departure) -> Option<f64>| Spread::of(departures.iter().filter_map(of).collect::<Vec<f64>>());
        Self {
            guests,
            others,
            limits,
            bandwidth,
            plan: Estimate::from(plan),
            total_ms,
            guest_ms: spread(&|one| one.own_ms()),
            preparing_ms: spread(&|one| one.preparing_ms()),
            sending_ms: spread(&|one| one.sending_ms()),
            bytes: departures.iter().map(|one| one.bytes).sum(),
            bounds: Bounds::of(&departures, limits.at_once(guests, others), total_ms),
            departures,
        }
    }

    /// What must not be.
    pub(crate) fn wrong(&self, whose: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.total_ms.is_none() {
            wrong.push(format!("the node of {whose} guests was not emptied"));
        }
        for one in &self.departures {
            if one.ends_ms.is_none() {
                wrong.push(format!("{whose} guest {} did not leave", one.vmi));
            }
            if one.failed > 0 {
                wrong.push(format!("{} migrations of {whose} guest {} failed", one.failed, one.vmi));
            }
        }
        wrong
    }
}

/// A time for people.
fn time(ms: Option<f64>) -> String {
    match ms {
        None => "-".to_owned(),
        Some(ms) if ms < 120_000.0 => format!("{:.1} s", ms / 1e3),
        Some(ms) => format!("{:.1} min", ms / 60e3),
    }
}

fn whole(ms: Option<u64>) -> String {
    time(ms.map(|ms| ms as f64))
}

fn spread(spread: Option<&Spread>) -> String {
    spread.map_or_else(
        || "-".to_owned(),
        |all| format!("{} ({} to {})", time(Some(all.median)), time(Some(all.min)), time(Some(all.max))),
    )
}

impl std::fmt::Display for Drained {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Limits { cluster, outbound, inbound } = self.limits;
        writeln!(
            f,
            "{} guests on a node, {} other nodes; at once: {outbound} from a node, {cluster} in the cluster, {inbound} to a node; {}",
            self.guests, self.others, self.bandwidth
        )?;
        let (plan, bounds) = (&self.plan, &self.bounds);
        let (least, most) = (whole(plan.least_ms), whole(plan.most_ms));
        line(f, "empty after", &time(self.total_ms))?;
        line(
            f,
            "the plan said",
            &format!("{} ({least} to {most}), {} to migrate", whole(plan.likely_ms), plan.migrate),
        )?;
        let (preparing, sending) = (spread(self.preparing_ms.as_ref()), spread(self.sending_ms.as_ref()));
        line(
            f,
            "a guest, median",
            &format!("{}: preparing {preparing}, sending {sending}", spread(self.guest_ms.as_ref())),
        )?;
        let bytes = self.bytes.map_or_else(|| "-".to_owned(), |bytes| format!("{:.0} MiB", bytes as f64 / MIB));
        line(f, "bytes", &bytes)?;
        let needed =
            |ratio: Option<f64>| ratio.map(|ratio| format!(", {ratio:.2} times that was needed")).unwrap_or_default();
        let by_bytes = match bounds.bytes_ms {
            Some(_) => format!("{}: the bytes at their bandwidth, {} at once", time(bounds.bytes_ms), bounds.at_once),
            None => "none: there is no cap".to_owned(),
        };
        line(f, "bound by bytes", &(by_bytes + &needed(bounds.bytes_ratio)))?;
        let by_turns = format!("{}: each as long as it took, {} at once", time(bounds.turns_ms), bounds.at_once);
        line(f, "bound by turns", &(by_turns + &needed(bounds.turns_ratio)))?;
        if let Some(Parts { preparing, bytes, beyond, idle }) = bounds.parts {
            let [preparing, bytes, beyond, idle] = [preparing, bytes, beyond, idle].map(|part| part * 100.0);
            let text = format!(
                "{preparing:.0}% preparing, {bytes:.0}% sending at the bandwidth, {beyond:.0}% sending beyond that, {idle:.0}% nobody's"
            );
            line(f, "the turns' time", &text)?;
        }
        line(f, "what bounds it", &bounds.because)
    }
}

fn line(f: &mut Formatter<'_>, what: &str, text: &str) -> Result {
    writeln!(f, "  {what:<16} {text}")
}

/// A simulated node that was emptied, and what deciding cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Simulated {
    /// In virtual time.
    #[serde(flatten)]
    pub drained: Drained,
    /// Decides about everything that is left open.
    pub seed: u64,
    /// Decisions of the controllers, from the cluster's beginning until it was at rest again.
    pub decisions: u64,
    /// How long they took together; real time, as all that follows.
    pub deciding_ms: f64,
    /// The longest of them.
    pub longest_decision_ms: f64,
    /// How long the plan took.
    pub planning_ms: f64,
    /// How long the whole simulation took.
    pub wall_ms: f64,
}

impl std::fmt::Display for Simulated {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        self.drained.fmt(f)?;
        let each = self.deciding_ms / (self.decisions.max(1) as f64);
        let decisions = format!(
            "{} in {}, {each:.3} ms each, the longest {:.1} ms (real time)",
            self.decisions,
            time(Some(self.deciding_ms)),
            self.longest_decision_ms
        );
        line(f, "decisions", &decisions)?;
        let (plan, wall) = (time(Some(self.planning_ms)), time(Some(self.wall_ms)));
        line(f, "real time", &format!("{plan} for the plan, {wall} for the whole simulation (seed {})", self.seed))
    }
}

/// What came of all.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// On real guests; unset when none were asked for.
    pub real: Option<Drained>,
    /// In the simulator; unset when none were asked for.
    pub simulated: Option<Simulated>,
    /// Everything that must not be.
    pub wrong: Vec<String>,
}

impl Report {
    /// Whether every guest left, whole.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.wrong.is_empty()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        if let Some(real) = &self.real {
            write!(f, "real: {real}")?;
        }
        if let Some(simulated) = &self.simulated {
            write!(f, "simulated: {simulated}")?;
        }
        self.wrong.iter().try_for_each(|wrong| writeln!(f, "WRONG: {wrong}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { cluster: 5, outbound: 2, inbound: 2 };

    /// Each is prepared for a second and sent for one, of which its bytes need a half.
    fn departures(turns: &[f64]) -> Vec<Departure> {
        let one = |turn: &f64| Departure {
            vmi: format!("default/at-{turn}"),
            turn_ms: Some(*turn),
            sends_ms: Some(turn + 1000.0),
            ends_ms: Some(turn + 2000.0),
            bytes: Some(32 << 20),
            least_ms: Some(500.0),
            failed: 0,
        };
        turns.iter().map(one).collect()
    }

    fn drained(total_ms: Option<f64>, departures: Vec<Departure>) -> Drained {
        Drained::new(LIMITS, 2, "64 MiB/s each".to_owned(), &DrainPlan::default(), total_ms, departures)
    }

    #[test]
    fn the_limit_that_is_least_says_how_many_go_at_once() {
        assert_eq!(LIMITS.at_once(20, 2), 2);
        assert_eq!(Limits { outbound: 9, ..LIMITS }.at_once(20, 2), 4);
        assert_eq!(Limits { outbound: 9, inbound: 9, ..LIMITS }.at_once(20, 2), 5);
        assert_eq!((LIMITS.at_once(1, 2), LIMITS.at_once(0, 0)), (1, 1));
    }

    #[test]
    fn where_the_time_went_is_told_in_parts() {
        let all = drained(Some(5000.0), departures(&[0.0, 0.0, 2000.0, 2000.0]));
        let bounds = &all.bounds;
        assert_eq!((bounds.bytes_ms, bounds.bytes_ratio), (Some(1000.0), Some(5.0)));
        assert_eq!((bounds.turns_ms, bounds.turns_ratio), (Some(4000.0), Some(1.25)));
        let Parts { preparing, bytes, beyond, idle } = bounds.parts.unwrap();
        assert_eq!([preparing, bytes, beyond], [0.4, 0.2, 0.2]);
        assert!(
            (idle - 0.2).abs() < 1e-9 && bounds.because.contains("40% of the time went to what precedes"),
            "{bounds:?}"
        );
        let text = all.to_string();
        for part in [
            "empty after      5.0 s",
            "128 MiB",
            "1.0 s: the bytes at their bandwidth, 2 at once, 5.00 times",
            "20% nobody's",
        ] {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
        assert!(all.wrong("real").is_empty());
    }

    #[test]
    fn a_bound_that_is_met_needs_no_other_reason() {
        let met = drained(Some(525.0), departures(&[-1500.0, -1500.0]));
        assert!(met.bounds.because.contains("the bound is met"), "{:?}", met.bounds);
    }

    #[test]
    fn a_guest_that_stays_is_wrong_and_bounds_are_not_told() {
        let mut stays = departures(&[0.0, 0.0]);
        (stays[1].ends_ms, stays[1].failed) = (None, 2);
        let all = drained(None, stays);
        assert_eq!((all.bounds.turns_ms, all.bounds.parts), (None, None));
        let wrong = all.wrong("real").join("; ");
        for part in
            ["was not emptied", "guest default/at-0 did not leave", "2 migrations of real guest default/at-0 failed"]
        {
            assert!(wrong.contains(part), "no {part:?} in {wrong}");
        }
        let report = Report { real: Some(all), simulated: None, wrong: vec![wrong] };
        assert!(!report.is_good() && report.to_string().contains("WRONG: the node of real guests"), "{report}");
    }

    #[test]
    fn without_a_cap_there_is_no_bound_by_bytes() {
        let mut free = departures(&[0.0]);
        free[0].least_ms = None;
        let all = drained(Some(2000.0), free);
        assert_eq!((all.bounds.bytes_ms, all.bounds.turns_ratio), (None, Some(1.0)));
        assert!(all.to_string().contains("none: there is no cap"), "{all}");
    }
}
