//! The commands this project uses, typed. Members that a QEMU may lack are `Option`; members unknown here are ignored.
//!
//! Names and meanings: QEMU's `qapi/*.json` (QMP reference manual).

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// A command with the type of its answer. Only this crate can send one.
pub trait Command: Serialize {
    /// QEMU's name of it.
    const NAME: &'static str;
    /// What comes back.
    type Answer: DeserializeOwned;
}

/// An answer whose content does not matter (`{}`).
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Value")]
pub struct Nothing;

impl From<Value> for Nothing {
    fn from(_: Value) -> Self {
        Nothing
    }
}

macro_rules! commands {
    ($($(#[$doc:meta])* $name:ident = $wire:literal -> $answer:ty $({ $($(#[$field_doc:meta])* $field:ident : $type:ty),* $(,)? })?;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, Serialize)]
            #[serde(rename_all = "kebab-case")]
            pub(crate) struct $name { $($(
                $(#[$field_doc])*
                pub(crate) $field: $type
            ),*)? }

            impl Command for $name {
                const NAME: &'static str = $wire;
                type Answer = $answer;
            }
        )*
    };
}

commands! {
    /// Ends the negotiation.
    QmpCapabilities = "qmp_capabilities" -> Nothing { enable: Vec<&'static str> };
    /// Which QEMU this is.
    QueryVersion = "query-version" -> Version;
    /// Whether the guest runs.
    QueryStatus = "query-status" -> Status;
    /// Reads a property of an object, for example the machine's type.
    QomGet = "qom-get" -> Value { path: String, property: String };
    /// The migration's numbers.
    QueryMigrate = "query-migrate" -> MigrationInfo;
    /// Which migration capabilities this QEMU knows.
    QueryMigrateCapabilities = "query-migrate-capabilities" -> Vec<CapabilityState>;
    /// Switches capabilities.
    MigrateSetCapabilities = "migrate-set-capabilities" -> Nothing { capabilities: Vec<CapabilityState> };
    /// Starts sending.
    Migrate = "migrate" -> Nothing { uri: String };
    /// Stops sending; the guest runs on.
    MigrateCancel = "migrate_cancel" -> Nothing;
    /// Goes over to post-copy as soon as QEMU can.
    MigrateStartPostcopy = "migrate-start-postcopy" -> Nothing;
    /// Breaks the link of a post-copy, so that another one can be taken.
    MigratePause = "migrate-pause" -> Nothing;
    /// Target: listens for another link of a post-copy whose link broke.
    MigrateRecover = "migrate-recover" -> Nothing { uri: String };
    /// Source: goes on over another link with a post-copy whose link broke.
    MigrateResume = "migrate" -> Nothing { uri: String, resume: bool };
    /// Goes on from `pre-switchover`.
    MigrateContinue = "migrate-continue" -> Nothing { state: &'static str };
    /// Stops the guest's CPUs.
    Stop = "stop" -> Nothing;
    /// Runs the guest's CPUs.
    Cont = "cont" -> Nothing;
    /// Ends QEMU.
    Quit = "quit" -> Nothing;
    /// Presses the reset button.
    SystemReset = "system_reset" -> Nothing;
    /// Presses the power button.
    SystemPowerdown = "system_powerdown" -> Nothing;
    /// What QEMU does when the guest has powered off: `poweroff` (it ends) or `pause`.
    SetAction = "set-action" -> Nothing { shutdown: &'static str };
    /// Starts QEMU's NBD server.
    NbdServerStart = "nbd-server-start" -> Nothing { addr: Value };
    /// Ends QEMU's NBD server.
    NbdServerStop = "nbd-server-stop" -> Nothing;
    /// Exports a block node.
    BlockExportAdd = "block-export-add" -> Nothing { r#type: &'static str, id: String, node_name: String, name: String, writable: bool };
    /// Adds an NBD client block node.
    BlockdevAddNbd = "blockdev-add" -> Nothing {
        driver: &'static str, node_name: String, server: Value, export: String, discard: &'static str
    };
    /// Removes a block node.
    BlockdevDel = "blockdev-del" -> Nothing { node_name: String };
    /// Takes a device out.
    DeviceDel = "device_del" -> Nothing { id: String };
    /// Copies a block node to another and keeps both the same.
    BlockdevMirror = "blockdev-mirror" -> Nothing {
        job_id: String, device: String, target: String, sync: &'static str, copy_mode: &'static str,
        /// Bytes in flight.
        buf_size: u64,
        auto_dismiss: bool, auto_finalize: bool
    };
    /// Changes a mirror that runs (QEMU 8.2 on).
    BlockJobChange = "block-job-change" -> Nothing { id: String, r#type: &'static str, copy_mode: &'static str };
    /// Ends a mirror: at once and clean when it is ready, unless forced.
    BlockJobCancel = "block-job-cancel" -> Nothing { device: String, force: bool };
    /// The block nodes, without what is behind them.
    QueryNamedBlockNodes = "query-named-block-nodes" -> Vec<BlockNode> { flat: bool };
    /// How the measuring of written pages stands.
    QueryDirtyRate = "query-dirty-rate" -> DirtyRateInfo;
    /// Writes a part of the guest's physical memory to a file.
    PhysicalMemorySave = "pmemsave" -> Nothing { val: u64, size: u64, filename: String };
    /// The block jobs.
    QueryBlockJobs = "query-block-jobs" -> Vec<BlockJob>;
    /// The processor models that this QEMU knows.
    QueryCpuDefinitions = "query-cpu-definitions" -> Vec<CpuDefinition>;
    /// What a model has: `static` spells out its features, `full` its properties.
    QueryCpuModelExpansion = "query-cpu-model-expansion" -> CpuModelExpansion { r#type: &'static str, model: CpuModel };
    /// The machine types that this QEMU knows.
    QueryMachines = "query-machines" -> Vec<MachineInfo>;
}

/// A processor model.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuDefinition {
    /// Its name.
    pub name: String,
    /// What of it this accelerator cannot give on this machine; empty when it can be had whole, missing when QEMU does not know.
    pub unavailable_features: Option<Vec<String>>,
}

/// A processor model with properties.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CpuModel {
    /// Its name.
    pub name: String,
    /// Properties beyond it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub props: BTreeMap<String, Value>,
}

/// Answer of `query-cpu-model-expansion`.
#[derive(Clone, Debug, Deserialize)]
pub struct CpuModelExpansion {
    /// The model, spelled out.
    pub model: CpuModel,
}

/// A machine type.
#[derive(Clone, Debug, Deserialize)]
pub struct MachineInfo {
    /// Its name, with its version.
    pub name: String,
    /// Its name without.
    pub alias: Option<String>,
}

/// Adds a block node of any kind.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct BlockdevAdd(pub(crate) Value);

impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Answer = Nothing;
}

/// Plugs a device in.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct DeviceAdd(pub(crate) Value);

impl Command for DeviceAdd {
    const NAME: &'static str = "device_add";
    type Answer = Nothing;
}

/// `migrate-incoming`, whose `exit-on-error` exists from QEMU 9.1 on.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct MigrateIncoming {
    pub(crate) uri: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) exit_on_error: Option<bool>,
}

impl Command for MigrateIncoming {
    const NAME: &'static str = "migrate-incoming";
    type Answer = Nothing;
}

/// `migrate-set-parameters`; what is none stays as it is.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct MigrateSetParameters {
    /// Bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_bandwidth: Option<u64>,
    /// Bytes a second of what nobody waits for, once in post-copy. (QEMU's default is no limit.)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_postcopy_bandwidth: Option<u64>,
    /// Milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) downtime_limit: Option<u64>,
    /// Connections of `multifd` beside the main one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) multifd_channels: Option<u8>,
    /// `none` or `zstd`; a QEMU that was built without it does not know that word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) multifd_compression: Option<&'static str>,
}

impl Command for MigrateSetParameters {
    const NAME: &'static str = "migrate-set-parameters";
    type Answer = Nothing;
}

/// `calc-dirty-rate`, by looking at some pages twice.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct CalcDirtyRate {
    pub(crate) calc_time: u64,
    /// `second` without it; exists from QEMU 8.2 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) calc_time_unit: Option<&'static str>,
    /// Pages a GiB.
    pub(crate) sample_pages: u64,
}

impl Command for CalcDirtyRate {
    const NAME: &'static str = "calc-dirty-rate";
    type Answer = Nothing;
}

/// How the measuring of written pages stands.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DirtyRateInfo {
    /// Whether it is over.
    pub status: DirtyRateStatus,
    /// MiB a second; there once it is over.
    #[serde(default)]
    pub dirty_rate: Option<i64>,
}

/// `DirtyRateStatus` in qapi/migration.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateStatus {
    /// Never begun.
    Unstarted,
    /// Under way.
    Measuring,
    /// Over.
    Measured,
    /// Something newer.
    #[serde(other)]
    Other,
}

/// Which QEMU it is.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Version {
    /// The numbers.
    pub qemu: VersionTriple,
    /// The distribution's name of the package.
    #[serde(default)]
    pub package: String,
}

/// A version's numbers; compares as one expects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct VersionTriple {
    /// Major.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Micro.
    pub micro: u32,
}

impl std::fmt::Display for VersionTriple {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Whether the guest runs.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// Whether its CPUs run.
    #[serde(default)]
    pub running: bool,
    /// Why or why not.
    pub status: RunState,
}

/// QEMU's run state (`RunState` in qapi/run-state.json), as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Started with `-S`, never run.
    Prelaunch,
    /// Waits for or receives a migration.
    Inmigrate,
    /// Runs.
    Running,
    /// Stopped by command.
    Paused,
    /// Stopped for the switchover.
    FinishMigrate,
    /// Its guest has left.
    Postmigrate,
    /// The guest has powered off.
    Shutdown,
    /// Stopped on a disk error.
    IoError,
    /// Stopped on an error of its own.
    InternalError,
    /// The guest has crashed.
    GuestPanicked,
    /// Suspended by the guest.
    Suspended,
    /// A state that does not matter here, or a newer one.
    #[serde(other)]
    Other,
}

impl RunState {
    /// QEMU's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            RunState::Prelaunch => "prelaunch",
            RunState::Inmigrate => "inmigrate",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::FinishMigrate => "finish-migrate",
            RunState::Postmigrate => "postmigrate",
            RunState::Shutdown => "shutdown",
            RunState::IoError => "io-error",
            RunState::InternalError => "internal-error",
            RunState::GuestPanicked => "guest-panicked",
            RunState::Suspended => "suspended",
            RunState::Other => "other",
        }
    }
}

/// A capability and whether it is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapabilityState {
    /// QEMU's name of it.
    pub capability: String,
    /// On or off.
    pub state: bool,
}

/// A migration's state as QEMU names it (`MigrationStatus` in qapi/migration.json).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// There has been none.
    #[default]
    None,
    /// Set up.
    Setup,
    /// Being cancelled.
    Cancelling,
    /// Cancelled; the guest runs on.
    Cancelled,
    /// Memory is being copied.
    Active,
    /// Memory is being copied and the guest runs at the target.
    PostcopyActive,
    /// Post-copy with a broken link.
    PostcopyPaused,
    /// Post-copy with a broken link, another one being dialled (9.1 on).
    PostcopyRecoverSetup,
    /// Post-copy over another link: both ends compare what the target has.
    PostcopyRecover,
    /// Source: everything is sent and acknowledged. Target: everything is loaded.
    Completed,
    /// Failed; the guest runs on at the source.
    Failed,
    /// The guest is stopped, before the devices are sent.
    PreSwitchover,
    /// The devices are being sent.
    Device,
    /// Something newer.
    #[serde(other)]
    Other,
}

impl MigrationStatus {
    /// QEMU's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            MigrationStatus::None => "none",
            MigrationStatus::Setup => "setup",
            MigrationStatus::Cancelling => "cancelling",
            MigrationStatus::Cancelled => "cancelled",
            MigrationStatus::Active => "active",
            MigrationStatus::PostcopyActive => "postcopy-active",
            MigrationStatus::PostcopyPaused => "postcopy-paused",
            MigrationStatus::PostcopyRecoverSetup => "postcopy-recover-setup",
            MigrationStatus::PostcopyRecover => "postcopy-recover",
            MigrationStatus::Completed => "completed",
            MigrationStatus::Failed => "failed",
            MigrationStatus::PreSwitchover => "pre-switchover",
            MigrationStatus::Device => "device",
            MigrationStatus::Other => "other",
        }
    }

    /// Whether it is past the switch to post-copy, and not at its end.
    pub fn is_post_copy(self) -> bool {
        matches!(
            self,
            MigrationStatus::PostcopyActive
                | MigrationStatus::PostcopyPaused
                | MigrationStatus::PostcopyRecoverSetup
                | MigrationStatus::PostcopyRecover
        )
    }

    /// The state that QEMU names so, in an event for instance.
    pub fn from_name(name: &str) -> Self {
        serde_json::from_value(Value::String(name.into())).unwrap_or(MigrationStatus::Other)
    }
}

/// Answer of `query-migrate`. Almost everything is missing at some time.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// Where it stands.
    pub status: MigrationStatus,
    /// The numbers; missing during `setup`.
    pub ram: Option<RamInfo>,
    /// Milliseconds since the start.
    pub total_time: Option<u64>,
    /// Milliseconds of standstill as this end counts them, at the end.
    pub downtime: Option<u64>,
    /// Milliseconds of standstill as this end expects them, on the way.
    pub expected_downtime: Option<u64>,
    /// Why it failed.
    pub error_desc: Option<String>,
    /// How much the guest is slowed down, in per cent.
    pub cpu_throttle_percentage: Option<u64>,
}

/// Numbers about the guest's memory.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamInfo {
    /// Bytes of memory.
    pub total: u64,
    /// Bytes to send.
    pub remaining: u64,
    /// Bytes sent.
    pub transferred: u64,
    /// Pages a second that the guest writes to.
    pub dirty_pages_rate: u64,
    /// Passes.
    pub dirty_sync_count: u64,
    /// Bytes of a page.
    pub page_size: u64,
}

/// A block node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct BlockNode {
    /// Its name.
    pub node_name: String,
    /// What it shows.
    pub image: BlockImage,
}

/// What a block node shows.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct BlockImage {
    /// Bytes that the guest sees.
    pub virtual_size: u64,
}

/// A job on a block node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct BlockJob {
    /// Its id.
    pub device: String,
    /// Bytes to copy.
    pub len: u64,
    /// Bytes copied.
    pub offset: u64,
    /// Whether both nodes are the same.
    pub ready: bool,
    /// Where it stands.
    pub status: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn query_migrate_is_read_in_every_phase() {
        let none: MigrationInfo = serde_json::from_value(json!({})).unwrap();
        assert_eq!(none.status, MigrationStatus::None);
        let setup: MigrationInfo = serde_json::from_value(json!({"status": "setup", "blocked": false})).unwrap();
        assert!(setup.ram.is_none());
        let active: MigrationInfo = serde_json::from_value(json!({
            "status": "active", "expected-downtime": 300, "setup-time": 2, "total-time": 90,
            "ram": {"total": 100, "remaining": 40, "transferred": 60, "dirty-sync-count": 2, "mbps": 1.5, "page-size": 4096,
                    "dirty-pages-rate": 7, "brand-new": {}}
        }))
        .unwrap();
        let ram = active.ram.unwrap();
        assert_eq!((ram.remaining, ram.dirty_sync_count, ram.dirty_pages_rate), (40, 2, 7));
    }

    #[test]
    fn words_unknown_here_are_not_errors() {
        let status: Status = serde_json::from_value(json!({"status": "quantum", "running": false})).unwrap();
        assert_eq!(status.status, RunState::Other);
        assert_eq!(MigrationStatus::from_name("wait-unplug"), MigrationStatus::Other);
        assert_eq!(MigrationStatus::from_name("pre-switchover"), MigrationStatus::PreSwitchover);
    }

    #[test]
    fn arguments_have_qemus_names() {
        let parameters = MigrateSetParameters { max_bandwidth: Some(5), ..Default::default() };
        assert_eq!(serde_json::to_value(parameters).unwrap(), json!({"max-bandwidth": 5}));
        let export =
            BlockExportAdd { r#type: "nbd", id: "e".into(), node_name: "n".into(), name: "x".into(), writable: true };
        assert_eq!(
            serde_json::to_value(export).unwrap(),
            json!({"type": "nbd", "id": "e", "node-name": "n", "name": "x", "writable": true})
        );
        assert_eq!(serde_json::to_value(Cont {}).unwrap(), json!({}));
    }
}
