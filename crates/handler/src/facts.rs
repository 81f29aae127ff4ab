//! What a handler knows when it decides about one VMI.

use std::collections::BTreeMap;
use std::time::Duration;

use godwit_api::FailureCause;
use godwit_launcher::rpc::transport::Single;
use godwit_launcher::rpc::{Cause, DomainPhase, MigrationFacts, MigrationMode, MigrationRole, State};
use jiff::Timestamp;

use crate::decide::Failure;
use crate::expect::Prediction;

/// Everything that counts for one VMI on this node, at one moment.
#[derive(Clone, Debug)]
pub struct Facts {
    /// This node.
    pub node: String,
    /// The time of the look.
    pub now: Timestamp,
    /// The VMI, as the API has it.
    pub vmi: VmiView,
    /// For how long this process has known of the VMI's present migration.
    pub known_for: Duration,
    /// For how long its migration runs, by a monotonic clock; a handler that has restarted goes on from `startTimestamp`.
    pub running_for: Option<Duration>,
    /// The VMI's launcher pods on this node, by name.
    pub pods: BTreeMap<String, PodView>,
    /// The source's launcher was asked to measure its guest for the present migration.
    pub measure_asked: bool,
    /// The channels that this process holds open as a migration's target.
    pub target: Option<TargetView>,
    /// The channels that this process holds open as a migration's source.
    pub source: Option<SourceView>,
    /// The migration's pod at the other end has ended, in words. It is asked for only while that is of use: the go is not
    /// confirmed, post-copy is under way, or the migration failed.
    pub peer_ended: Option<String>,
}

/// The part of a VMI that decisions need.
#[derive(Clone, Debug, Default)]
pub struct VmiView {
    /// `status.phase`.
    pub phase: String,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// `spec.terminationGracePeriodSeconds`, by default 30.
    pub grace_seconds: u64,
    /// `status.nodeName`.
    pub node_name: Option<String>,
    /// KubeVirt's test hook: no target of it is prepared.
    pub blocks_target: bool,
    /// It says already that the link of its post-copy is broken.
    pub link_broken: bool,
    /// KubeVirt's test hook: no migration of it succeeds.
    pub fails_migration: bool,
    /// Hotpluggable volumes of the spec.
    pub hotpluggable: Vec<String>,
    /// Those of them whose claims are on the guest's node, in the hands of an attachment pod.
    pub attached: Vec<String>,
    /// `status.migrationState`.
    pub migration: Option<MigrationView>,
}

impl VmiView {
    /// Whether the VMI's life is over.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self.phase.as_str(), "Succeeded" | "Failed")
    }
}

/// `status.migrationState`.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs, reason = "the fields are the API's, name by name")]
pub struct MigrationView {
    pub uid: String,
    pub source_node: String,
    pub target_node: String,
    pub source_pod: String,
    pub target_pod: String,
    pub target_address: Option<String>,
    /// `migrationNetworkType`: it goes over the network for migrations, or before the target listens, it may.
    pub over_own_network: bool,
    /// Published ports, TCP port → inner port.
    pub ports: BTreeMap<String, i32>,
    pub detected: bool,
    pub target_ready: bool,
    pub start: Option<Timestamp>,
    pub mode: Option<MigrationMode>,
    pub completed: bool,
    pub failed: bool,
    /// `failureCause`; before `failed` it says why a handler is giving the migration up.
    pub cause: Option<FailureCause>,
    pub abort_requested: bool,
    pub abort_status: Option<String>,
    /// `migrationConfiguration.bandwidthPerMigration` in bytes per second; 0 is unlimited.
    pub bandwidth: u64,
    /// `disableTLS`: memory and disks go in the clear.
    pub disable_tls: bool,
    /// `maxDowntimeMs`.
    pub max_downtime_ms: Option<u64>,
    /// `completionTimeoutPerGiB` times what is to be copied; none is for ever.
    pub completion_limit: Option<Duration>,
    /// `progressTimeout`; none is for ever.
    pub progress_limit: Option<Duration>,
    /// `allowAutoConverge`.
    pub allow_auto_converge: bool,
    /// `allowPostCopy`.
    pub allow_post_copy: bool,
    /// `failWhenNotConverging`.
    pub fail_when_not_converging: bool,
    /// `forecast` is there.
    pub has_forecast: bool,
    /// `allowWorkloadDisruption`, which follows `allowPostCopy` when it is not set.
    pub allow_workload_disruption: bool,
}

impl MigrationView {
    /// Whether it does not leave the node: both ends are this handler's.
    #[must_use]
    pub fn is_local(&self) -> bool {
        !self.source_node.is_empty() && self.source_node == self.target_node
    }

    /// The published TCP port of inner port `inner`.
    #[must_use]
    pub fn port(&self, inner: i32) -> Option<u16> {
        self.ports.iter().find(|(_, i)| **i == inner).and_then(|(port, _)| port.parse().ok())
    }
}

/// A launcher pod on this node.
#[derive(Clone, Debug)]
pub struct PodView {
    /// Its name.
    pub name: String,
    /// Label `kubevirt.io/migrationJobUID`: the migration that it was made for.
    pub migration_uid: Option<String>,
    /// Phase Succeeded or Failed: its processes are gone.
    pub terminal: bool,
    /// This process has ordered its guest's end, with at most this grace in seconds.
    pub shutdown_ordered: Option<u64>,
    /// The reboot, by when it was asked for, of which this process has told that the guest took no part in it.
    pub reboot_told: Option<i64>,
    /// What its launcher says.
    pub launcher: Launcher,
}

/// A launcher as seen over its socket.
#[derive(Clone, Debug)]
pub enum Launcher {
    /// Has not answered yet.
    Waiting,
    /// Answers now.
    Answers(Box<State>),
    /// Has answered and does no more; its last words.
    Gone(Box<State>),
}

impl Launcher {
    /// The state, if it answers now.
    #[must_use]
    pub fn state(&self) -> Option<&State> {
        match self {
            Self::Answers(state) => Some(state),
            _ => None,
        }
    }

    /// The last state that is known.
    #[must_use]
    pub fn last(&self) -> Option<&State> {
        match self {
            Self::Answers(state) | Self::Gone(state) => Some(state),
            Self::Waiting => None,
        }
    }
}

/// The facts of migration `uid`, seen from its `role`; those of another migration (a launcher keeps its last one) do not count.
#[must_use]
pub fn migration<'a>(state: &'a State, uid: &str, role: MigrationRole) -> Option<&'a MigrationFacts> {
    state.migration_of(uid, role)
}

/// Whether the guest will never run at this source again: its launcher has written that down.
#[must_use]
pub fn has_left(f: &MigrationFacts) -> bool {
    f.handed_over || f.status == "completed"
}

/// Whether post-copy has lost its link, or one of its ends.
#[must_use]
pub fn is_broken(f: &MigrationFacts) -> bool {
    matches!(f.status.as_str(), "postcopy-paused" | "failed") || f.broken_us.is_some()
}

/// Whether another link can follow one that broke, as far as this end knows.
#[must_use]
pub fn is_recoverable(f: &MigrationFacts) -> bool {
    f.recoverable && f.status != "failed"
}

/// Whether the guest is in this launcher's QEMU and is its only copy.
#[must_use]
pub fn is_alive(state: &State) -> bool {
    matches!(state.phase, DomainPhase::Running | DomainPhase::Paused)
}

/// The listening half of a migration in this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetView {
    /// UID of the migration.
    pub uid: String,
    /// Published address.
    pub address: String,
    /// It is that of the interface for migrations.
    pub over_own_network: bool,
    /// TCP port → inner port.
    pub ports: BTreeMap<String, i32>,
}

/// The dialling half of a migration in this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceView {
    /// UID of the migration.
    pub uid: String,
    /// Both channels are open, the start can be ordered.
    pub ready: bool,
    /// The target's end can receive in post-copy.
    pub post_copy_offered: bool,
    /// Why memory goes over one connection, where that was a choice.
    pub single: Option<Single>,
    /// Memory and disks go in the clear.
    pub plain: bool,
    /// Why it is not ready; `None` while it is being dialled.
    pub error: Option<String>,
    /// How long this half exists.
    pub age: Duration,
    /// Why the launcher refused to start the migration.
    pub start_error: Option<Failure>,
    /// Why this handler cancelled it (not asked for by the user).
    pub cancelled: Option<Failure>,
    /// How the order of post-copy went.
    pub post_copy: Ordered,
    /// How the order to hold the guest went.
    pub pause: Ordered,
    /// How long no byte has moved, by the count of this process and of QEMU.
    pub still: Duration,
    /// How long `remaining` has not reached a new low.
    pub stuck: Duration,
    /// How long ago progress was last written into the API.
    pub reported: Option<Duration>,
    /// How the go went.
    pub go: Go,
    /// For how long the target has not been reached over the network in hand, when it had to be after the guest had left.
    pub unreached: Option<Duration>,
    /// While that is so: this node's interface for migrations is there.
    pub own_network: bool,
    /// What the target's end said after the migration had failed.
    pub target: TargetSays,
    /// What the link to the target's node was seen to carry, in bytes a second.
    pub link_rate: Option<u64>,
    /// What it was expected to take before it began.
    pub prediction: Option<Prediction>,
}

/// How an order to the launcher went that is given once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Ordered {
    /// It was not given.
    #[default]
    Not,
    /// It was taken, so long ago.
    Given(Duration),
    /// It cannot be, and why.
    Refused(String),
}

/// What the target's end says of a migration that has failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TargetSays {
    /// It has not answered yet.
    #[default]
    Nothing,
    /// Its handler answers for it.
    Told {
        /// Its QEMU is not there any more.
        ended: bool,
        /// What went wrong there, if anything did.
        words: Option<String>,
        /// Of what kind that is.
        cause: Option<Cause>,
    },
    /// Its node answers, but no handler is there.
    NoHandler(String),
    /// It cannot be reached.
    Unreachable(String),
}

/// How the go went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Go {
    /// It was not due.
    #[default]
    NotDue,
    /// It is due and not confirmed yet; the last obstacle in words.
    Trying(String),
    /// The guest runs at the target since then (microseconds since the epoch, by this node's clock).
    Running(i64),
    /// What the target had received is gone for good.
    Lost(String),
}
