//! The migration's copy of what its VMI says of it.

use godwit_api::VirtualMachineInstanceMigration;
use godwit_api::vmi::VirtualMachineInstanceMigrationState as State;

use super::observe::Situation;

/// Copies what the VMI says of this migration. A controller that has just started, or a second one, may see an older VMI
/// than the one that the copy was made of: what has been said is not taken back.
pub fn take(after: &mut VirtualMachineInstanceMigration, situation: &Situation<'_>) {
    let Some(told) = situation.own_state() else { return };
    let held = after.status.migration_state.as_ref().filter(|held| held.migration_uid == told.migration_uid);
    if held.is_none_or(|held| !is_behind(told, held)) {
        after.status.migration_state = Some(told.clone());
    }
}

/// Whether `told` is an earlier state of a migration than `held`. In its life each of the marks only appears, and figures
/// only grow; a new mark counts for more than a figure.
fn is_behind(told: &State, held: &State) -> bool {
    let (now, before) = (marks(told), marks(held));
    if now != before {
        return now.iter().zip(before).any(|(now, before)| before && !now);
    }
    let less = |told: Option<u64>, held: Option<u64>| held.is_some_and(|held| told.is_none_or(|told| told < held));
    let (now, before) = (told.progress.as_ref(), held.progress.as_ref());
    less(now.and_then(|now| now.total_milliseconds), before.and_then(|before| before.total_milliseconds))
        || less(now.and_then(|now| now.bytes_processed), before.and_then(|before| before.bytes_processed))
        || less(now.and_then(|now| now.downtime_milliseconds), before.and_then(|before| before.downtime_milliseconds))
}

/// What has happened to a migration so far.
fn marks(state: &State) -> [bool; 8] {
    let set = |flag: Option<bool>| flag == Some(true);
    [
        state.target_node_address.is_some(),
        state.start_timestamp.is_some(),
        state.end_timestamp.is_some(),
        state.target_node_domain_ready_timestamp.is_some(),
        set(state.completed),
        set(state.failed),
        set(state.abort_requested),
        state.abort_status.is_some(),
    ]
}
