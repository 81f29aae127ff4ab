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

/// Whether `told` is an earlier state of a migration than `held`: in its life each of these only appears, or grows.
fn is_behind(told: &State, held: &State) -> bool {
    let gone = |told: bool, held: bool| held && !told;
    let set = |flag: Option<bool>| flag == Some(true);
    let less = |told: Option<u64>, held: Option<u64>| held.is_some_and(|held| told.is_none_or(|told| told < held));
    let (now, before) = (told.progress.as_ref(), held.progress.as_ref());
    gone(told.target_node_address.is_some(), held.target_node_address.is_some())
        || gone(told.start_timestamp.is_some(), held.start_timestamp.is_some())
        || gone(told.end_timestamp.is_some(), held.end_timestamp.is_some())
        || gone(told.target_node_domain_ready_timestamp.is_some(), held.target_node_domain_ready_timestamp.is_some())
        || gone(set(told.completed), set(held.completed))
        || gone(set(told.failed), set(held.failed))
        || gone(set(told.abort_requested), set(held.abort_requested))
        || gone(told.abort_status.is_some(), held.abort_status.is_some())
        || less(now.and_then(|now| now.total_milliseconds), before.and_then(|before| before.total_milliseconds))
        || less(now.and_then(|now| now.bytes_processed), before.and_then(|before| before.bytes_processed))
        || less(now.and_then(|now| now.downtime_milliseconds), before.and_then(|before| before.downtime_milliseconds))
}
