//! MigrationRecord: what remains of a migration when its object is long gone. Godwit's own.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::failure::FailureCause;
use crate::vmi::MigrationMode;

/// How many records of a VMI (of its name, in its namespace) are kept.
pub const RECORDS_KEPT: usize = 50;
/// How long a record is kept, in hours: two weeks.
pub const RECORD_HOURS: i64 = 14 * 24;

/// One finished migration, named as the VirtualMachineInstanceMigration was with the start of its UID.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MigrationRecord {
    /// Standard object metadata.
    pub metadata: ObjectMeta,
    /// What happened; never changes.
    pub spec: MigrationRecordSpec,
}

kind!(MigrationRecord, "godwit.io", "v1alpha1", "migrationrecords", [spec]);

string_enum! {
    /// How a migration ended.
    MigrationResult default Succeeded {
        /// The guest runs at the target.
        Succeeded = "Succeeded",
        /// It does not.
        Failed = "Failed",
    }
}

always_or_default!(MigrationResult);

api_struct! {
    /// What happened.
    MigrationRecordSpec {
        /// The VMI.
        vmi_name: String,
        /// The VirtualMachineInstanceMigration's name.
        migration_name: String,
        /// Its UID.
        #[serde(rename = "migrationUID")]
        migration_uid: String,
        /// The user who asked, as the API server knew them.
        requested_by: Option<String>,
        /// For an evacuation: the node that was being emptied.
        evacuated_node: Option<String>,
        /// The node it left.
        source_node: Option<String>,
        /// The node it went to, as far as one was found.
        target_node: Option<String>,
        /// How it ended.
        result: Option<MigrationResult>,
        /// Why it failed.
        reason: Option<FailureCause>,
        /// The sentence that went with it.
        message: Option<String>,
        /// How the memory was sent.
        mode: Option<MigrationMode>,
        /// When it was asked for.
        requested_at: Option<Time>,
        /// When the source began to send.
        started_at: Option<Time>,
        /// When it was over.
        ended_at: Option<Time>,
        /// STOP at the source to RESUME at the target.
        downtime_milliseconds: Option<u64>,
        /// From start to end.
        total_milliseconds: Option<u64>,
        /// Bytes sent.
        bytes_processed: Option<u64>,
    }
}
