//! How fast migrations go, as those tell that have been.

use std::collections::BTreeMap;

use godwit_api::drain::BandwidthBasis;
use godwit_api::record::{MigrationRecordSpec, MigrationResult};
use godwit_api::vmi::VirtualMachineInstanceMigrationState as State;
use godwit_api::{MigrationPhase, config};
use godwit_forecast::{self as forecast, Link};
use jiff::Timestamp;

use super::expect::{copies, per_second};
use crate::world::World;

/// Rates of smaller migrations tell nothing of the link.
const TELLING_BYTES: u64 = 16 << 20;
/// So many of the last migrations count.
const RECENT: usize = 20;
/// Who got at least so many per cent of its cap was held up by it, not by the link.
const BY_CAP_PERCENT: u64 = 60;

/// What one migration got.
struct Carried {
    from: String,
    to: String,
    ended: Timestamp,
    seen: Seen,
}

/// What the link of a migration carries, in bytes a second.
#[derive(Clone, Copy)]
struct Seen {
    rate: u64,
    /// Or more: the cap was in the way.
    at_least: bool,
}

impl Seen {
    /// Whether it tells what a migration under this cap gets: not when it was itself held up by a lower one.
    fn tells(self, cap: Option<u64>) -> bool {
        !self.at_least || cap.is_some_and(|cap| cap <= self.rate)
    }
}

/// What the links of a cluster were seen to carry, the last first.
#[derive(Default)]
pub struct Links {
    pairs: BTreeMap<(String, String), Vec<Seen>>,
    /// Of migrations that left this node or went to it.
    nodes: BTreeMap<String, Vec<Seen>>,
    all: Vec<Seen>,
}

/// What a migration can use.
#[derive(Clone, Debug, PartialEq)]
pub struct Bandwidth {
    /// For the model.
    pub link: Link,
    /// As is likely.
    pub bytes_per_second: u64,
    /// What that rests on.
    pub basis: BandwidthBasis,
}

impl Links {
    /// Gathers it from finished migrations, and from the records of those whose objects are gone.
    pub fn of(world: &World) -> Self {
        let mut seen: BTreeMap<&str, Carried> = BTreeMap::new();
        for record in world.records.iter() {
            seen.extend(of_record(&record.spec).map(|carried| (record.spec.migration_uid.as_str(), carried)));
        }
        for migration in world.migrations.iter().filter(|one| one.status.phase == MigrationPhase::Succeeded) {
            let state = migration.status.migration_state.as_ref();
            if let (Some(uid), Some(carried)) = (migration.metadata.uid.as_deref(), state.and_then(of_state)) {
                seen.insert(uid, carried);
            }
        }
        let mut seen: Vec<Carried> = seen.into_values().collect();
        seen.sort_by_key(|one| std::cmp::Reverse(one.ended));
        let mut links = Self::default();
        for one in seen {
            links.all.push(one.seen);
            links.nodes.entry(one.from.clone()).or_default().push(one.seen);
            links.nodes.entry(one.to.clone()).or_default().push(one.seen);
            links.pairs.entry((one.from, one.to)).or_default().push(one.seen);
        }
        links
    }

    /// Whether something is known of just these two nodes.
    pub fn knows(&self, from: &str, to: &str) -> bool {
        self.pairs.contains_key(&(from.to_owned(), to.to_owned()))
    }

    /// What a migration gets that leaves a node for another, where that is known already, under a cap.
    pub fn bandwidth(&self, cap: Option<u64>, from: &str, to: Option<&str>) -> Bandwidth {
        let pair = to.and_then(|to| self.pairs.get(&(from.to_owned(), to.to_owned())));
        let measured = pair
            .and_then(|seen| Some((median(seen, cap)?, BandwidthBasis::Pair)))
            .or_else(|| Some((median(self.nodes.get(from)?, cap)?, BandwidthBasis::Node)))
            .or_else(|| Some((median(&self.all, cap)?, BandwidthBasis::Cluster)));
        let rate = measured.as_ref().map(|(rate, _)| *rate);
        // A link that was never used is taken to carry what is allowed.
        let link = forecast::usable(cap, rate, None);
        let basis = match (measured, cap) {
            (Some((rate, basis)), cap) if cap.is_none_or(|cap| rate < cap) => basis,
            (_, Some(_)) => BandwidthBasis::Configured,
            _ => BandwidthBasis::Assumed,
        };
        Bandwidth { link, bytes_per_second: link.running.likely.max(1), basis }
    }
}

/// Of the last that tell something of a migration under this cap.
fn median(seen: &[Seen], cap: Option<u64>) -> Option<u64> {
    let mut rates: Vec<u64> = seen.iter().filter(|one| one.tells(cap)).take(RECENT).map(|one| one.rate).collect();
    rates.sort_unstable();
    rates.get(rates.len() / 2).copied()
}

/// `cap`: none where it is not known, 0 where there was none.
fn carried(
    nodes: (Option<&str>, Option<&str>),
    ended: Option<Timestamp>,
    bytes: Option<u64>,
    milliseconds: Option<u64>,
    cap: Option<u64>,
) -> Option<Carried> {
    let (from, to) = (nodes.0?, nodes.1?);
    let bytes = bytes.filter(|bytes| *bytes >= TELLING_BYTES)?;
    let got = per_second(bytes, milliseconds?);
    let seen = match cap.filter(|cap| *cap > 0) {
        Some(cap) if got >= cap / 100 * BY_CAP_PERCENT => Seen { rate: got.max(cap), at_least: true },
        _ => Seen { rate: got, at_least: false },
    };
    (from != to).then(|| Carried {
        from: from.to_owned(),
        to: to.to_owned(),
        ended: ended.unwrap_or(Timestamp::UNIX_EPOCH),
        seen,
    })
}

fn of_record(record: &MigrationRecordSpec) -> Option<Carried> {
    if record.result != Some(MigrationResult::Succeeded) {
        return None;
    }
    let total = record.total_milliseconds?.saturating_sub(record.downtime_milliseconds.unwrap_or(0));
    let nodes = (record.source_node.as_deref(), record.target_node.as_deref());
    let ended = record.ended_at.as_ref().map(|time| time.0);
    carried(nodes, ended, record.bytes_processed, Some(total), record.bandwidth_bytes_per_second)
}

fn of_state(state: &State) -> Option<Carried> {
    let progress = state.progress.as_ref().filter(|_| copies(state))?;
    let total = progress.total_milliseconds?.saturating_sub(progress.downtime_milliseconds.unwrap_or(0));
    let nodes = (state.source_node.as_deref(), state.target_node.as_deref());
    let cap = state.migration_configuration.as_ref().map(|all| config::bandwidth_bytes(all).unwrap_or(0));
    carried(nodes, state.end_timestamp.as_ref().map(|time| time.0), progress.bytes_processed, Some(total), cap)
}
