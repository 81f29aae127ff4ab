//! What remains of migrations: one record each, written before the migration's object may go, kept for two weeks.

use std::sync::Arc;

use godwit_api::record::{MigrationRecordSpec, MigrationResult, RECORD_HOURS, RECORDS_KEPT};
use godwit_api::{FailureCause, MigrationPhase, MigrationRecord, VirtualMachineInstanceMigration, config};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

use crate::names;
use crate::object::{Name, Object, Stored};
use crate::plan::{Plan, View};
use crate::world::{Change, World};

/// Writes down how a migration has ended.
///
/// It has no owner: it outlives the migration and the VMI. Its name comes from the migration's UID, so that writing it twice
/// makes one.
///
/// `from` and `to` are the nodes of the VMI and of the target pod, for migrations that ended before the hand-over.
pub fn write_down(
    migration: &VirtualMachineInstanceMigration,
    from: Option<&str>,
    to: Option<&str>,
    view: &View<'_>,
    plan: &mut Plan,
) {
    // Nothing new may be made in a namespace that is going, and its migrations must not wait for that.
    let namespace = view.world.namespaces.get(&Name::cluster(migration.namespace()));
    if namespace.is_none_or(|namespace| !namespace.deleting()) {
        let mut record = record(migration, view.now);
        record.spec.source_node = record.spec.source_node.or_else(|| from.map(str::to_owned));
        record.spec.target_node = record.spec.target_node.or_else(|| to.map(str::to_owned));
        plan.create(record);
    }
}

fn record(migration: &VirtualMachineInstanceMigration, now: Timestamp) -> MigrationRecord {
    let status = &migration.status;
    let state = status.migration_state.as_ref();
    let failed = status.phase == MigrationPhase::Failed;
    let entered = status.phase_transition_timestamps.iter().find(|entry| entry.phase == status.phase);
    let over = entered.and_then(|entry| entry.phase_transition_timestamp.clone());
    let started = state.and_then(|state| state.start_timestamp.clone());
    let ended = state.and_then(|state| state.end_timestamp.clone()).or(over).unwrap_or(Time(now));
    let progress = state.and_then(|state| state.progress.as_ref());
    let forecast = state.and_then(|state| state.forecast.as_ref());
    let took = started.as_ref().map(|started| ended.0.duration_since(started.0).as_millis());
    let mut record = MigrationRecord {
        metadata: ObjectMeta {
            namespace: migration.metadata.namespace.clone(),
            name: Some(names::record(Stored::name(migration), migration.uid())),
            labels: Some([(names::LABEL_VMI_NAME.to_owned(), names::label_value(migration.vmi_name()))].into()),
            ..ObjectMeta::default()
        },
        spec: MigrationRecordSpec {
            vmi_name: migration.vmi_name().to_owned(),
            migration_name: Stored::name(migration).to_owned(),
            migration_uid: migration.uid().to_owned(),
            requested_by: migration.annotation(names::ANNOTATION_REQUESTED_BY).map(str::to_owned),
            evacuated_node: migration.annotation(names::ANNOTATION_EVACUATION_MIGRATION).map(str::to_owned),
            source_node: state.and_then(|state| state.source_node.clone()),
            target_node: state.and_then(|state| state.target_node.clone()),
            result: Some(if failed { MigrationResult::Failed } else { MigrationResult::Succeeded }),
            reason: status.reason.as_deref().filter(|_| failed).map(FailureCause::from),
            message: status.message.clone().filter(|_| failed),
            mode: state.and_then(|state| state.mode.clone()),
            requested_at: migration.metadata.creation_timestamp.clone(),
            total_milliseconds: progress
                .and_then(|progress| progress.total_milliseconds)
                .or_else(|| took.and_then(|took| u64::try_from(took).ok())),
            started_at: started,
            ended_at: Some(ended),
            downtime_milliseconds: progress.and_then(|progress| progress.downtime_milliseconds),
            forecast_downtime_milliseconds: forecast.and_then(|forecast| forecast.downtime_milliseconds),
            forecast_total_milliseconds: forecast.and_then(|forecast| forecast.duration_milliseconds),
            bytes_processed: progress.and_then(|progress| progress.bytes_processed),
            bandwidth_bytes_per_second: state
                .and_then(|state| state.migration_configuration.as_ref())
                .map(|configuration| config::bandwidth_bytes(configuration).unwrap_or(0)),
            ..MigrationRecordSpec::default()
        },
    };
    record.spec.fill_columns();
    record
}

/// When a record has been kept for long enough.
fn expiry(record: &MigrationRecord) -> Option<Timestamp> {
    let ended = record.spec.ended_at.as_ref().or(record.metadata.creation_timestamp.as_ref())?;
    ended.0.checked_add(SignedDuration::from_hours(RECORD_HOURS)).ok()
}

/// The VMIs that have records.
pub fn all(world: &World) -> impl Iterator<Item = Name> {
    world.guests_with_records()
}

/// The VMI whose records a change touches.
pub fn affected(change: &Change) -> impl Iterator<Item = Name> {
    let record = match change.latest() {
        Some(Object::MigrationRecord(record)) => Some(vmi_of(record)),
        _ => None,
    };
    record.into_iter()
}

fn vmi_of(record: &MigrationRecord) -> Name {
    Name::new(record.namespace(), record.spec.vmi_name.as_str())
}

/// Decides about the records of one VMI, which may be long gone: the last few stay, for two weeks.
pub fn decide(vmi: &Name, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let mut records: Vec<&Arc<MigrationRecord>> =
        view.world.records_of(vmi).filter(|record| !record.deleting()).collect();
    records.sort_by_key(|record| (expiry(record), record.key()));
    let surplus = records.len().saturating_sub(RECORDS_KEPT);
    for (index, record) in records.into_iter().enumerate() {
        let expiry = expiry(record);
        if index < surplus || expiry.is_some_and(|expiry| expiry <= view.now) {
            plan.delete(record.as_ref());
        } else if let Some(expiry) = expiry {
            // In order: this one is the next to go.
            plan.wake(expiry);
            break;
        }
    }
    plan
}
