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
        /// What `downtimeMilliseconds` was expected to be when it began.
        forecast_downtime_milliseconds: Option<u64>,
        /// What `totalMilliseconds` was expected to be when it began; unset also where it was not expected to end.
        forecast_total_milliseconds: Option<u64>,
        /// Bytes sent.
        bytes_processed: Option<u64>,
        /// What it was allowed when it was over (`bandwidthPerMigration`), in bytes a second; 0 is no limit, unset not known.
        bandwidth_bytes_per_second: Option<u64>,
        /// For people: the downtime with its unit, e.g. `73 ms`.
        downtime: Option<String>,
        /// For people: the bytes sent, e.g. `116 MiB`.
        sent: Option<String>,
    }
}

impl MigrationRecordSpec {
    /// Makes the columns' texts from the numbers; to be called on every record before it is written.
    pub fn fill_columns(&mut self) {
        self.downtime = self.downtime_milliseconds.map(|ms| format!("{ms} ms"));
        self.sent = self.bytes_processed.map(readable);
    }
}

/// An amount of bytes for people: rounded to whole KiB or MiB, from a GiB on cut to tenths.
fn readable(bytes: u64) -> String {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    let rounded = |unit: u64| bytes / unit + u64::from(bytes % unit >= unit / 2);
    match bytes {
        0..KIB => format!("{bytes} B"),
        KIB..MIB => format!("{} KiB", rounded(KIB)),
        MIB..GIB => format!("{} MiB", rounded(MIB)),
        _ => {
            let tenths = u128::from(bytes) * 10 / u128::from(GIB);
            format!("{}.{} GiB", tenths / 10, tenths % 10)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_for_people() {
        let mut spec = MigrationRecordSpec::default();
        spec.fill_columns();
        assert_eq!((spec.downtime.as_deref(), spec.sent.as_deref()), (None, None), "nothing was measured");
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "2 KiB"),
            (121_634_816, "116 MiB"),
            (1 << 30, "1.0 GiB"),
            (1_717_986_919, "1.6 GiB"),
            (u64::MAX, "17179869183.9 GiB"),
        ] {
            spec.bytes_processed = Some(bytes);
            spec.downtime_milliseconds = Some(73);
            spec.fill_columns();
            assert_eq!((spec.downtime.as_deref(), spec.sent.as_deref()), (Some("73 ms"), Some(text)));
        }
    }
}
