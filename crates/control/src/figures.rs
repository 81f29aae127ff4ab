//! What the deciding controller tells Prometheus ([`godwit_api::metrics`]), worked out of what it knows.
//!
//! In a large cluster that is many objects, most of them packed. A [`Census`] looks at some at a time, so that decisions are made in between
//! and what was unpacked can be packed again. It is not one moment that it shows, but a second or so.

use std::collections::{BTreeMap, BTreeSet};

use godwit_api::maintenance::VmProgress;
use godwit_api::metrics::{self, Figures, Metric};
use godwit_api::names::conditions::{EVACUATION_STOPPED, LIVE_MIGRATABLE};
use godwit_api::vmi::{EvictionStrategy, VirtualMachineInstanceMigrationState};
use godwit_api::{
    Condition, FailureCause, MigrationPhase, VirtualMachineInstance, VirtualMachineInstanceMigration, VmiPhase,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::key::Noun;
use crate::object::{Name, Stored};
use crate::world::World;
use crate::{evacuation, fence, kubevirt, maintenance, workloads};

/// How its last migrations have ended, of a VMI of which at least one has failed.
#[derive(Default)]
struct Ends {
    /// When one last succeeded, in seconds since 1970.
    success: Option<i64>,
    /// When others failed.
    failures: Vec<i64>,
}

/// Figures in the making.
pub struct Census {
    /// Names of the VMIs and migrations that are still to be looked at.
    vmis: std::vec::IntoIter<Name>,
    migrations: std::vec::IntoIter<Name>,
    figures: Figures,
    phases: BTreeMap<(String, String), u64>,
    outdated: u64,
    evacuations: BTreeMap<(String, &'static str), u64>,
    migrating: BTreeMap<&'static str, (Metric, u64)>,
    waiting: BTreeMap<String, u64>,
    ends: BTreeMap<Name, Ends>,
}

impl Census {
    /// Begins one about what there is of these nouns: who only maintains nodes says nothing of VMs that are another KubeVirt's.
    pub fn begin(nouns: &[Noun], world: &World) -> Self {
        let decides = |noun| nouns.contains(&noun);
        let mut figures = Figures::default();
        if decides(Noun::Maintenance) {
            tell_maintenances(world, &mut figures);
        }
        if decides(Noun::Fence) {
            tell_handlers(world, &mut figures);
        }
        if decides(Noun::Evacuation) {
            tell_nodes(world, &mut figures);
        }
        let names = |all: Vec<Name>, wanted: bool| if wanted { all } else { Vec::new() }.into_iter();
        let phases = [
            metrics::MIGRATIONS_UNSET,
            metrics::MIGRATIONS_PENDING,
            metrics::MIGRATIONS_SCHEDULING,
            metrics::MIGRATIONS_RUNNING,
        ];
        let migrating = phases.into_iter().filter(|_| decides(Noun::Migration)).map(|one| (one.name, (one, 0)));
        Self {
            vmis: names(world.vmis.names().cloned().collect(), decides(Noun::Migration)),
            migrations: names(world.migrations.names().cloned().collect(), decides(Noun::Migration)),
            figures,
            phases: BTreeMap::new(),
            outdated: 0,
            evacuations: BTreeMap::new(),
            migrating: migrating.collect(),
            waiting: BTreeMap::new(),
            ends: BTreeMap::new(),
        }
    }

    /// Looks at so many more objects. The figures, once it has seen them all.
    pub fn go_on(&mut self, count: usize, world: &World) -> Option<Figures> {
        for _ in 0..count {
            if let Some(name) = self.vmis.next() {
                if let Some(vmi) = world.vmis.get(&name) {
                    self.look_at_vmi(vmi, world);
                }
            } else if let Some(name) = self.migrations.next() {
                if let Some(migration) = world.migrations.get(&name) {
                    self.look_at_migration(migration);
                }
            } else {
                return Some(self.conclude());
            }
        }
        None
    }

    fn conclude(&mut self) -> Figures {
        let mut figures = std::mem::take(&mut self.figures);
        for ((node, phase), count) in std::mem::take(&mut self.phases) {
            figures.tell(metrics::VMI_PHASES, [&node, &phase], count as f64);
        }
        for ((node, state), count) in std::mem::take(&mut self.evacuations) {
            figures.tell(metrics::EVACUATIONS, [&node, state], count as f64);
        }
        for (limit, count) in std::mem::take(&mut self.waiting) {
            figures.tell(metrics::MIGRATIONS_WAITING, [&limit], count as f64);
        }
        if !self.migrating.is_empty() {
            figures.tell(metrics::VMIS_OUTDATED, [], self.outdated as f64);
        }
        for (metric, count) in std::mem::take(&mut self.migrating).into_values() {
            figures.tell(metric, [], count as f64);
        }
        for (vmi, ends) in std::mem::take(&mut self.ends) {
            let since = |at: &&i64| ends.success.is_none_or(|success| **at > success);
            let count = ends.failures.iter().filter(since).count();
            if let Some(rank) = i64::try_from(count).ok().filter(|count| *count > 0) {
                let labels = [vmi.namespace.as_str(), vmi.name.as_str()];
                figures.tell_ranked(metrics::MIGRATION_FAILURES, labels, count as f64, rank);
            }
        }
        figures.conclude();
        figures
    }

    fn look_at_vmi(&mut self, vmi: &VirtualMachineInstance, world: &World) {
        let node = vmi.status.node_name.as_deref().unwrap_or_default();
        let key = vmi.key();
        let labels = [node, key.namespace.as_str(), key.name.as_str()];
        if vmi.status.phase != VmiPhase::Unset {
            let phase = vmi.status.phase.as_str().to_lowercase();
            *self.phases.entry((node.to_owned(), phase)).or_default() += 1;
        }
        if let Some(state) = &vmi.status.migration_state {
            tell_migration(state, labels, &mut self.figures, world);
        }
        if vmi.is_final() || node.is_empty() {
            return;
        }
        self.outdated += u64::from(workloads::is_labelled(vmi));
        let moves = evacuation::strategy(vmi, world) == EvictionStrategy::LiveMigrate;
        if moves && !vmi.condition(LIVE_MIGRATABLE).is_some_and(Condition::is_true) {
            self.figures.tell(metrics::VMI_NON_EVICTABLE, labels, 1.0);
        }
        if evacuation::is_touched(vmi) {
            self.look_at_evacuation(vmi, labels, world);
        }
    }

    fn look_at_evacuation(&mut self, vmi: &VirtualMachineInstance, labels: [&str; 3], world: &World) {
        let [node, namespace, name] = labels;
        let evacuation = vmi.status.evacuation.as_ref();
        let start = evacuation.and_then(|evacuation| evacuation.start_timestamp.as_ref()).map(second);
        let stopped = vmi.condition(EVACUATION_STOPPED).filter(|stopped| stopped.is_true());
        let leaves = |one: &VirtualMachineInstanceMigration| one.status.phase.is_running();
        let state = match (stopped, evacuation) {
            (Some(stopped), _) => {
                let reason = stopped.reason.as_deref().unwrap_or_default();
                let rank = start.map_or(i64::MIN, |start| -start);
                self.figures.tell_ranked(metrics::EVACUATION_BLOCKED, [node, namespace, name, reason], 1.0, rank);
                "blocked"
            }
            _ if world.migrations_of(&vmi.key()).any(|one| leaves(one)) => "migrating",
            // The evacuation of one that is not ours to move has no beginning.
            (None, Some(evacuation)) if evacuation.start_timestamp.is_none() => "external",
            _ => "waiting",
        };
        *self.evacuations.entry((node.to_owned(), state)).or_default() += 1;
        if let Some(start) = start {
            // Whoever is to leave for the longest is told first.
            self.figures.tell_ranked(metrics::EVACUATION_START, labels, start as f64, -start);
        }
        if let Some(failed) = evacuation.and_then(|evacuation| evacuation.failed_attempts).filter(|count| *count > 0) {
            self.figures.tell_ranked(metrics::EVACUATION_FAILED, labels, f64::from(failed), i64::from(failed));
        }
    }

    fn look_at_migration(&mut self, migration: &VirtualMachineInstanceMigration) {
        let phase = match &migration.status.phase {
            MigrationPhase::Succeeded | MigrationPhase::Failed => return self.look_at_end(migration),
            MigrationPhase::Unset => metrics::MIGRATIONS_UNSET,
            MigrationPhase::Scheduling => metrics::MIGRATIONS_SCHEDULING,
            phase if phase.is_running() => metrics::MIGRATIONS_RUNNING,
            _ => {
                if let Some(queue) = &migration.status.queue {
                    *self.waiting.entry(queue.limit.clone().unwrap_or_default()).or_default() += 1;
                }
                metrics::MIGRATIONS_PENDING
            }
        };
        self.migrating.entry(phase.name).or_insert((phase, 0)).1 += 1;
    }

    fn look_at_end(&mut self, migration: &VirtualMachineInstanceMigration) {
        let entered = migration.status.phase_transition_timestamps.iter();
        let entered = entered.filter(|entry| entry.phase == migration.status.phase);
        let at = entered.filter_map(|entry| entry.phase_transition_timestamp.as_ref()).map(second).next().unwrap_or(0);
        let key = migration.key();
        let failed = migration.status.phase == MigrationPhase::Failed;
        let metric = if failed { metrics::MIGRATION_FAILED } else { metrics::MIGRATION_SUCCEEDED };
        let labels = [migration.vmi_name(), key.name.as_str(), key.namespace.as_str()];
        self.figures.tell_ranked(metric, labels, 1.0, at);
        let vmi = Name::new(migration.namespace(), migration.vmi_name());
        if !failed {
            let ends = self.ends.entry(vmi).or_default();
            ends.success = ends.success.max(Some(at));
        } else if migration.status.reason.as_deref() != Some(FailureCause::Cancelled.as_str()) {
            self.ends.entry(vmi).or_default().failures.push(at);
        }
    }
}

/// A VMI's migration under way, or its last one.
fn tell_migration(
    state: &VirtualMachineInstanceMigrationState,
    labels: [&str; 3],
    figures: &mut Figures,
    world: &World,
) {
    let Some(start) = state.start_timestamp.as_ref().map(second) else { return };
    let [node, namespace, name] = labels;
    let migration = state.migration_uid.as_deref().and_then(|uid| world.migration_name(uid));
    let migration = migration.map(|migration| migration.name.as_str()).unwrap_or_default();
    figures.tell_ranked(metrics::MIGRATION_START, [node, namespace, name, migration], start as f64, start);
    let mut tell = |metric, value: Option<f64>, rank| {
        if let Some(value) = value {
            figures.tell_ranked(metric, labels, value, rank);
        }
    };
    let bytes = |count: Option<u64>| count.map(|count| count as f64);
    let seconds = |milliseconds: Option<u64>| milliseconds.map(|count| count as f64 / 1000.0);
    let forecast = state.forecast.as_ref();
    tell(metrics::FORECAST_DURATION, forecast.and_then(|one| seconds(one.duration_milliseconds)), start);
    tell(metrics::FORECAST_DOWNTIME, forecast.and_then(|one| seconds(one.downtime_milliseconds)), start);
    let progress = state.progress.as_ref();
    let Some(end) = state.end_timestamp.as_ref().map(second) else {
        if let Some(progress) = progress {
            tell(metrics::MIGRATION_DATA_TOTAL, bytes(progress.bytes_total), start);
            tell(metrics::MIGRATION_DATA_PROCESSED, bytes(progress.bytes_processed), start);
            tell(metrics::MIGRATION_DATA_REMAINING, bytes(progress.bytes_remaining), start);
            tell(metrics::MIGRATION_DIRTY_RATE, bytes(progress.dirty_bytes_per_second), start);
            tell(metrics::MIGRATION_RATE, bytes(progress.bytes_per_second), start);
            let end = progress.expected_end_timestamp.as_ref().map(|end| second(end) as f64);
            tell(metrics::MIGRATION_EXPECTED_END, end, start);
            tell(metrics::MIGRATION_CONVERGES, progress.converges.map(yes), start);
        }
        return;
    };
    let failed = state.failed == Some(true);
    if !failed {
        tell(metrics::MIGRATION_DURATION, progress.and_then(|one| seconds(one.total_milliseconds)), end);
        tell(metrics::MIGRATION_DOWNTIME, progress.and_then(|one| seconds(one.downtime_milliseconds)), end);
    }
    let status = if failed { "failed" } else { "succeeded" };
    figures.tell_ranked(metrics::MIGRATION_END, [node, namespace, name, migration, status], end as f64, end);
}

fn tell_maintenances(world: &World, figures: &mut Figures) {
    // Those of several groups may have the same name.
    let mut said = BTreeSet::new();
    for one in maintenance::every(world) {
        let node = one.spec.node_name.as_str();
        if !said.insert((one.name().to_owned(), node.to_owned())) {
            continue;
        }
        let labels = [one.name(), node];
        let status = one.status;
        figures.tell(metrics::MAINTENANCE, [one.name(), node, status.phase.as_str()], 1.0);
        if let Some(percent) = status.drain_progress {
            figures.tell(metrics::MAINTENANCE_DRAINED, labels, f64::from(percent) / 100.0);
        }
        figures.tell(metrics::MAINTENANCE_PODS, labels, status.pending_pods_refs.len() as f64);
        for state in [VmProgress::Migrating, VmProgress::Waiting, VmProgress::ShuttingDown, VmProgress::Blocked] {
            let count = status.virtual_machine_instances.iter().filter(|vmi| vmi.state == state).count();
            figures.tell(metrics::MAINTENANCE_VMIS, [one.name(), node, state.as_str()], count as f64);
        }
        if let Some(deadline) = &status.deadline {
            figures.tell(metrics::MAINTENANCE_DEADLINE, labels, second(deadline) as f64);
        }
        let plan = status.plan.as_ref().and_then(|plan| plan.duration.as_ref()?.milliseconds);
        if let Some(milliseconds) = plan {
            figures.tell(metrics::MAINTENANCE_FORECAST, labels, milliseconds as f64 / 1000.0);
        }
    }
}

fn tell_nodes(world: &World, figures: &mut Figures) {
    let configuration = kubevirt::migration_configuration(world);
    for node in world.nodes.iter() {
        let closed = evacuation::is_cordoned(node) || evacuation::is_drained(node, &configuration);
        figures.tell(metrics::NODE_CLOSED, [Stored::name(node.as_ref())], yes(closed));
    }
}

fn tell_handlers(world: &World, figures: &mut Figures) {
    for name in world.nodes.names() {
        let node = name.name.as_str();
        if fence::lease_of(node, world).is_some() {
            figures.tell(metrics::HANDLER_HEARD, [node], yes(!fence::has_lapsed(node, world)));
            figures.tell(metrics::NODE_FENCED, [node], yes(fence::is_lost(node, world)));
        }
    }
}

fn yes(yes: bool) -> f64 {
    f64::from(u8::from(yes))
}

fn second(time: &Time) -> i64 {
    time.0.as_second()
}

#[cfg(test)]
#[path = "figures_tests.rs"]
mod tests;
