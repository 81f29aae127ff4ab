//! Status never goes backwards: each write of a VMI or a migration is compared with what stood there before.

use godwit_api::VmiPhase;
use godwit_api::vmi::VirtualMachineInstanceMigrationState as State;
use godwit_control::Object;

/// What a write takes back, if it takes something back.
pub fn taken_back(before: &Object, after: &Object) -> Option<String> {
    match (before, after) {
        (Object::VirtualMachineInstance(before), Object::VirtualMachineInstance(after)) => {
            let (old, new) = (&before.status, &after.status);
            if vmi_rank(&new.phase) < vmi_rank(&old.phase) || (before.is_final() && new.phase != old.phase) {
                return Some(format!("phase {} after {}", new.phase.as_str(), old.phase.as_str()));
            }
            state(old.migration_state.as_ref()?, new.migration_state.as_ref()?)
        }
        (Object::Migration(before), Object::Migration(after)) => {
            let (old, new) = (&before.status, &after.status);
            for entry in &old.phase_transition_timestamps {
                if !new.phase_transition_timestamps.contains(entry) {
                    return Some(format!("the time of phase {} is gone or another", entry.phase.as_str()));
                }
            }
            // What the migration said before it was handed over is no part of the VMI's state yet.
            let old = old.migration_state.as_ref().filter(|state| state.migration_uid.is_some())?;
            match &new.migration_state {
                Some(new) => state(old, new),
                None => Some("the state of the migration is gone".to_owned()),
            }
        }
        _ => None,
    }
}

fn vmi_rank(phase: &VmiPhase) -> u8 {
    match phase {
        VmiPhase::Unset => 0,
        VmiPhase::Pending => 1,
        VmiPhase::Scheduling => 2,
        VmiPhase::Scheduled => 3,
        VmiPhase::Succeeded | VmiPhase::Failed => 5,
        _ => 4,
    }
}

/// What the state of one migration takes back.
fn state(old: &State, new: &State) -> Option<String> {
    if old.migration_uid != new.migration_uid {
        return None;
    }
    for (name, old, new) in [
        ("startTimestamp", &old.start_timestamp, &new.start_timestamp),
        ("endTimestamp", &old.end_timestamp, &new.end_timestamp),
        (
            "targetNodeDomainReadyTimestamp",
            &old.target_node_domain_ready_timestamp,
            &new.target_node_domain_ready_timestamp,
        ),
    ] {
        if old.is_some() && old != new {
            return Some(format!("{name} {new:?} after {old:?}"));
        }
    }
    for (name, old, new) in [
        ("completed", old.completed, new.completed),
        ("failed", old.failed, new.failed),
        ("abortRequested", old.abort_requested, new.abort_requested),
    ] {
        if old == Some(true) && new != Some(true) {
            return Some(format!("{name} {new:?} after true"));
        }
    }
    for (name, old, new) in [
        ("sourceNode", &old.source_node, &new.source_node),
        ("targetNode", &old.target_node, &new.target_node),
        ("targetPod", &old.target_pod, &new.target_pod),
    ] {
        if old.is_some() && old != new {
            return Some(format!("{name} {new:?} after {old:?}"));
        }
    }
    let Some(before) = &old.progress else { return None };
    let Some(after) = &new.progress else { return Some("the progress is gone".to_owned()) };
    for (name, old, new) in [
        ("percent", u64::from(before.percent.unwrap_or(0)), u64::from(after.percent.unwrap_or(0))),
        ("bytesProcessed", before.bytes_processed.unwrap_or(0), after.bytes_processed.unwrap_or(0)),
        ("iteration", before.iteration.unwrap_or(0), after.iteration.unwrap_or(0)),
        ("totalMilliseconds", before.total_milliseconds.unwrap_or(0), after.total_milliseconds.unwrap_or(0)),
    ] {
        if new < old {
            return Some(format!("progress.{name} {new} after {old}"));
        }
    }
    None
}
