//! The life of a migration, from the wish to the end of it.
//!
//! [`table`] is the whole of it; [`observe`] finds the fact that counts, this module carries out what the table says.

mod act;
mod document;
mod limits;
mod observe;
pub mod table;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod walk_tests;

use godwit_api::condition;
use godwit_api::migration::MigrationPhaseTransitionTimestamp;
use godwit_api::{Condition, MigrationPhase as Phase, VirtualMachineInstanceMigration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

pub use document::render;
pub use observe::{is_ready, is_unresolved, is_unschedulable};

use crate::names;
use crate::object::Name;
use crate::plan::{Plan, View};
use observe::Situation;
use table::Fact;

/// Decides about one migration.
pub fn decide(name: &Name, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let Some(migration) = view.world.migrations.get(name) else { return plan };
    let situation = Situation::of(migration, view);
    if migration.is_final() {
        act::finish(&situation, &mut plan);
        return plan;
    }
    let observation = situation.observe();
    plan.wake_at = observation.until;
    // Every observation of a phase is in the table (a test goes through them all).
    let Some(row) = table::lookup(&migration.status.phase, observation.fact) else { return plan };

    let mut after = migration.as_ref().clone();
    let mut events = Plan::nothing();
    for action in row.actions {
        act::carry_out(*action, observation.fact, &situation, &mut after, &mut plan, &mut events);
    }
    let now = Time(view.now);
    if row.to != row.from {
        enter(&mut after, &row.to, &now);
    }
    if migration.is_deleting() {
        let asked = Condition::new(names::conditions::MIGRATION_ABORT_REQUESTED, true);
        condition::set(&mut after.status.conditions, asked, &now);
    }
    explain(&mut after, row, &situation, &now);
    plan.update(migration.as_ref(), &after);
    plan.effects.append(&mut events.effects);
    plan
}

fn enter(migration: &mut VirtualMachineInstanceMigration, phase: &Phase, now: &Time) {
    let status = &mut migration.status;
    status.phase = phase.clone();
    if !status.phase_transition_timestamps.iter().any(|entry| entry.phase == *phase) {
        status.phase_transition_timestamps.push(MigrationPhaseTransitionTimestamp {
            phase: phase.clone(),
            phase_transition_timestamp: Some(now.clone()),
        });
    }
}

/// Says in the status what the migration waits for or why it failed.
fn explain(after: &mut VirtualMachineInstanceMigration, row: &table::Row, situation: &Situation<'_>, now: &Time) {
    // On entering a phase the first thing it waits for is said at once, which saves a write.
    let fact = if row.to == row.from || row.to == Phase::Failed { Some(row.fact) } else { first_wait(&row.to) };
    // A fact that is acted on within its phase is over with the next decision: what was said stays.
    if row.to == row.from && !row.actions.is_empty() && row.fact != Fact::TargetPodUnschedulable {
        return;
    }
    let status = &mut after.status;
    let text = fact.map(|fact| (fact.word(), act::sentence(fact, situation)));
    status.reason = text.as_ref().map(|(word, _)| word.clone());
    status.message = text.as_ref().map(|(_, sentence)| sentence.clone());
    condition::remove(&mut status.conditions, names::conditions::MIGRATION_WAITING);
    let Some((word, sentence)) = text else { return };
    let type_ = if row.to == Phase::Failed {
        names::conditions::MIGRATION_FAILED
    } else {
        names::conditions::MIGRATION_WAITING
    };
    let mut said = Condition::new(type_, true).because(&word, sentence);
    // The time of a wait that goes on does not move.
    let before = situation.migration.condition(type_).filter(|before| before.reason == said.reason);
    said.last_transition_time = before.map_or_else(|| Some(now.clone()), |before| before.last_transition_time.clone());
    status.conditions.push(said);
}

/// What a migration waits for on entering a phase.
fn first_wait(phase: &Phase) -> Option<Fact> {
    Some(match phase {
        Phase::Pending => Fact::MayStart,
        Phase::Scheduling => Fact::TargetPodStarting,
        Phase::Scheduled => Fact::ReadyToHandOver,
        Phase::PreparingTarget => Fact::Preparing,
        Phase::TargetReady => Fact::Starting,
        Phase::Running => Fact::InFlight,
        _ => return None,
    })
}
