//! The life of a migration, from the wish to the end of it.
//!
//! [`table`] is the whole of it; [`observe`] finds the fact that counts, this module carries out what the table says.

mod act;
mod deadlines;
mod document;
mod explain;
#[cfg(test)]
mod life_tests;
mod mirror;
mod observe;
pub mod table;
#[cfg(test)]
mod target_closed_tests;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod waiting_tests;
#[cfg(test)]
mod walk_tests;

use godwit_api::condition;
use godwit_api::migration::MigrationPhaseTransitionTimestamp;
use godwit_api::{Condition, MigrationPhase as Phase, VirtualMachineInstanceMigration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

pub use document::render;
pub use observe::{is_link_broken, is_ready, is_unresolved, is_unschedulable};

use crate::launcher_pod::Role;
use crate::names;
use crate::object::Name;
use crate::persistent_state;
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
    // From the hand-over on the migration shows what the VMI says of it, and its last write shows all of it.
    mirror::take(&mut after, &situation);
    for action in row.actions {
        act::carry_out(*action, observation.fact, &situation, &mut after, &mut plan, &mut events);
    }
    // The server may not have taken the target's claim when the pod was made.
    if let (Some(vmi), Phase::Scheduling) = (situation.vmi, &migration.status.phase) {
        let _ = persistent_state::provide(vmi, Role::Receive(migration), view, &mut plan);
    }
    // What a row of the table tells the VMI goes first.
    if plan.effects.is_empty() {
        act::set_bandwidth(&situation, &mut plan);
    }
    let now = Time(view.now);
    if row.to != row.from {
        enter(&mut after, &row.to, &now);
    }
    // Before the start nobody else asks for an abort: also when this could not be written with the request.
    let closed = match observation.fact {
        Fact::TargetInMaintenance => true,
        Fact::Aborting | Fact::AbortBeforeStartUnanswered => migration.status.phase != Phase::Running,
        _ => false,
    };
    if closed && !migration.is_deleting() {
        let asked = Condition::new(names::conditions::MIGRATION_ABORT_REQUESTED, true);
        let text = explain::sentence(Fact::TargetInMaintenance, &situation);
        let asked = asked.because(&Fact::TargetInMaintenance.word(), text);
        condition::set(&mut after.status.conditions, asked, &now);
    }
    if migration.is_deleting() {
        let mut asked = Condition::new(names::conditions::MIGRATION_ABORT_REQUESTED, true);
        asked.last_probe_time = migration.metadata.deletion_timestamp.clone();
        condition::set(&mut after.status.conditions, asked, &now);
    }
    explain::say(&mut after, row, &situation, &now);
    after.status.fill_columns();
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
