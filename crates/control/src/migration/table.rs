//! The life of a migration as one table: in a phase, a fact leads to a phase by way of actions.
//!
//! `docs/migration-states.md` is rendered from this table. Phases and event texts are KubeVirt's.

use godwit_api::MigrationPhase as Phase;
use godwit_api::failure::FailureCause;
use godwit_api::names::events::{message, reason};

use crate::plan::EventType;

/// The one thing about a migration that counts at a moment; which one, [`observe`](super::observe) decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fact {
    /// The VMI does not exist.
    VmiGone,
    /// The VMI has ended or is being deleted.
    VmiFinal,
    /// The VMI has failed: the guest was lost where it ran.
    GuestLost,
    /// The VMI has failed at the target, to which the guest had moved already (post-copy).
    GuestLostAtTarget,
    /// The migration has been deleted by a user.
    Cancelled,
    /// Another migration of the same VMI is under way.
    OtherMigration,
    /// Nothing speaks against it.
    Eligible,
    /// The VMI says that it cannot be migrated.
    NotMigratable,
    /// No other node can give the guest its processor and machine.
    NoFittingNode,
    /// The guest does not run yet.
    GuestNotRunning,
    /// An earlier migration was handed over and never reported its end.
    EarlierUnresolved,
    /// Another launcher pod of the VMI has not ended yet.
    OldPodRemains,
    /// It is in the line, and the next decision about slots has not been made yet.
    AwaitsTurn,
    /// Every node that could take it receives as many migrations as it may.
    InboundLimit,
    /// As many migrations as the cluster may run are running.
    ClusterLimit,
    /// As many migrations as may leave the source node are leaving it.
    NodeLimit,
    /// The namespace's quota has no room for the target pod.
    QuotaExceeded,
    /// The namespace's quota has had no room for too long.
    QuotaExceededTooLong,
    /// The API server does not accept its target pod, for now.
    TargetPodRefused,
    /// The API server has not accepted its target pod for too long.
    TargetPodRefusedTooLong,
    /// It has waited for its turn for too long.
    WaitedTooLong,
    /// It has its slot: the target pod can be made.
    MayStart,
    /// The target pod exists.
    TargetPodCreated,
    /// The target pod is not ready yet.
    TargetPodStarting,
    /// An image of the target pod cannot be pulled, for now.
    TargetPodImage,
    /// A claim of the target pod is missing or not bound.
    TargetPodVolumes,
    /// The target pod is ready, but not for the disks that the guest was given while it ran.
    DisksNotReady,
    /// No node takes the target pod, for now.
    TargetPodUnschedulable,
    /// No node has taken the target pod for too long.
    TargetPodUnschedulableTooLong,
    /// The target pod has not become ready for too long.
    TargetPodPendingTooLong,
    /// The target pod is ready.
    TargetPodReady,
    /// The target pod has ended.
    TargetPodDown,
    /// The target pod was removed.
    TargetPodGone,
    /// The target's node is to be emptied, and the guest is not on its way there yet.
    TargetInMaintenance,
    /// The target pod is ready and the VMI does not know of the migration yet.
    ReadyToHandOver,
    /// The VMI could not be told of the migration for too long.
    HandOverTooLong,
    /// The VMI carries this migration.
    HandedOver,
    /// The VMI carries no migration any more.
    StateCleared,
    /// The VMI carries another migration.
    StateTakenOver,
    /// The target is being prepared.
    Preparing,
    /// The target's handler listens.
    TargetListening,
    /// The target has been in preparation for too long.
    PreparingTooLong,
    /// The source has not started yet.
    Starting,
    /// The source has not started for too long.
    StartTooLong,
    /// The source sends.
    Started,
    /// The migration is running.
    InFlight,
    /// The guest runs at the target, and the link over which its memory follows is broken.
    PostCopyLinkBroken,
    /// The migration runs far beyond its time limit.
    RunningTooLong,
    /// The source is done, the target has not reported the guest yet.
    Arriving,
    /// The migration has ended well.
    Completed,
    /// It has ended well although it was to be cancelled.
    CompletedDespiteCancel,
    /// The migration has ended badly; the guest runs at the source.
    SourceFailed,
    /// An abort has been asked for and is not answered yet.
    Aborting,
    /// An abort was asked for and the source says that it is too late for it.
    AbortTooLate,
    /// An abort was asked for before the start and nobody answered.
    AbortBeforeStartUnanswered,
    /// An abort was asked for while running and nobody answered.
    AbortUnanswered,
    /// The migration is over.
    Over,
}

/// What a row of the table does besides moving on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Note the source pod in the migration's status.
    NoteSourcePod,
    /// Create the target pod.
    CreateTargetPod,
    /// Delete the target pod (it never ran the guest).
    DeleteTargetPod,
    /// Delete the target pod because a deadline has passed, with the event for it.
    GiveUpTargetPod,
    /// Write the migration into the VMI; from then on the handlers drive.
    HandOver,
    /// Write into the VMI that the migration failed before it started.
    FailOnVmi,
    /// Ask the source's handler, through the VMI, to abort.
    RequestAbort,
    /// Write into the VMI that the abort came too late.
    NoteLateAbort,
    /// Warn that no node takes the target pod, once.
    WarnUnschedulable,
    /// Warn on the VMI: reason and text.
    WarnVmi(&'static str, &'static str),
    /// Record an event on the migration.
    Tell(EventType, &'static str, &'static str),
}

/// One row.
#[derive(Debug)]
pub struct Row {
    /// In this phase
    pub from: Phase,
    /// this fact
    pub fact: Fact,
    /// leads to this phase
    pub to: Phase,
    /// and does this.
    pub actions: &'static [Action],
}

const fn row(from: Phase, fact: Fact, to: Phase, actions: &'static [Action]) -> Row {
    Row { from, fact, to, actions }
}

/// Who knows why a migration failed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Blame {
    /// The fact itself says it.
    Cause(FailureCause),
    /// Whoever wrote the failure into the VMI (`migrationState.failureCause`).
    Reported,
}

/// A migration failed: the event with its text.
const fn failed(text: &'static str) -> Action {
    Action::Tell(EventType::Warning, reason::FAILED_MIGRATION, text)
}

const ABORT: &[Action] = &[
    Action::RequestAbort,
    Action::Tell(EventType::Normal, reason::SUCCESSFUL_ABORT_MIGRATION, message::MIGRATION_ABORT),
];
const NO_VMI: Action = failed(message::MIGRATION_FAILED_NO_VMI);
const SHUTDOWN: Action = failed(message::MIGRATION_FAILED_VMI_SHUTDOWN);
const CANCELED: Action = failed(message::MIGRATION_FAILED_CANCELED);
const NOT_ELIGIBLE: Action = failed(message::MIGRATION_NOT_ELIGIBLE);
/// The event on the VMI is KubeVirt's.
const NO_NODE: &[Action] = &[
    Action::WarnVmi(
        reason::NO_SUITABLE_NODES_FOR_HOST_MODEL,
        "Migration cannot proceed: no other node offers the CPU and the machine type that the guest has.",
    ),
    failed("Migration failed because no other node offers the CPU and the machine type that the guest has."),
];
const POD_DOWN: Action = failed(message::MIGRATION_FAILED_TARGET_POD_SHUTDOWN);
const TARGET_CLOSED: Action =
    failed("Migration failed because its target node was put into maintenance before the guest was on its way.");
const POD_REMOVED: Action = failed(message::MIGRATION_FAILED_TARGET_POD_REMOVED);
const CLEARED: Action = failed(message::MIGRATION_FAILED_STATE_CLEARED);
const TAKEN_OVER: Action = failed(message::MIGRATION_FAILED_STATE_TAKEN_OVER);
const BY_SOURCE: Action = failed(message::MIGRATION_FAILED_BY_SOURCE);
const SUCCEEDED: Action = Action::Tell(EventType::Normal, reason::SUCCESSFUL_MIGRATION, message::MIGRATION_SUCCEEDED);
const TOO_LATE: Action = Action::Tell(
    EventType::Warning,
    reason::FAILED_ABORT_MIGRATION,
    "Migration could not be canceled: the guest had already moved to the target node.",
);
const HAND_OVER_FAILED: Action =
    Action::Tell(EventType::Warning, reason::FAILED_HAND_OVER, "Failed to set MigrationStat in VMI status. :timed out");
const HANDED_OVER: Action = Action::Tell(EventType::Normal, reason::SUCCESSFUL_HAND_OVER, message::HAND_OVER);
const DROP_POD: Action = Action::DeleteTargetPod;

/// The table.
pub static TABLE: &[Row] = &[
    // New: is it allowed at all?
    row(Phase::Unset, Fact::VmiGone, Phase::Failed, &[NO_VMI]),
    row(Phase::Unset, Fact::VmiFinal, Phase::Failed, &[SHUTDOWN]),
    row(Phase::Unset, Fact::GuestLost, Phase::Failed, &[SHUTDOWN]),
    row(Phase::Unset, Fact::Cancelled, Phase::Failed, &[CANCELED]),
    row(Phase::Unset, Fact::OtherMigration, Phase::Failed, &[NOT_ELIGIBLE]),
    row(Phase::Unset, Fact::NoFittingNode, Phase::Failed, NO_NODE),
    row(Phase::Unset, Fact::Eligible, Phase::Pending, &[Action::NoteSourcePod]),
    // Pending: waits for its turn, then makes the target pod.
    row(Phase::Pending, Fact::VmiGone, Phase::Failed, &[DROP_POD, NO_VMI]),
    row(Phase::Pending, Fact::VmiFinal, Phase::Failed, &[DROP_POD, SHUTDOWN]),
    row(Phase::Pending, Fact::GuestLost, Phase::Failed, &[DROP_POD, SHUTDOWN]),
    row(Phase::Pending, Fact::Cancelled, Phase::Failed, &[DROP_POD, CANCELED]),
    row(
        Phase::Pending,
        Fact::NotMigratable,
        Phase::Failed,
        &[failed("Migration failed because the VMI is not migratable.")],
    ),
    row(Phase::Pending, Fact::NoFittingNode, Phase::Failed, NO_NODE),
    row(Phase::Pending, Fact::GuestNotRunning, Phase::Pending, &[]),
    row(Phase::Pending, Fact::EarlierUnresolved, Phase::Pending, &[]),
    row(Phase::Pending, Fact::OldPodRemains, Phase::Pending, &[]),
    row(Phase::Pending, Fact::AwaitsTurn, Phase::Pending, &[]),
    row(Phase::Pending, Fact::InboundLimit, Phase::Pending, &[]),
    row(Phase::Pending, Fact::ClusterLimit, Phase::Pending, &[]),
    row(Phase::Pending, Fact::NodeLimit, Phase::Pending, &[]),
    row(Phase::Pending, Fact::QuotaExceeded, Phase::Pending, &[]),
    row(
        Phase::Pending,
        Fact::QuotaExceededTooLong,
        Phase::Failed,
        &[failed("Migration failed because the namespace's quota had no room for the target pod.")],
    ),
    row(
        Phase::Pending,
        Fact::WaitedTooLong,
        Phase::Failed,
        &[failed("Migration failed because it waited for its turn for too long.")],
    ),
    row(Phase::Pending, Fact::TargetPodRefused, Phase::Pending, &[]),
    row(
        Phase::Pending,
        Fact::TargetPodRefusedTooLong,
        Phase::Failed,
        &[failed("Migration failed because its target pod was not accepted by the API server.")],
    ),
    row(Phase::Pending, Fact::MayStart, Phase::Pending, &[Action::CreateTargetPod]),
    row(Phase::Pending, Fact::TargetPodCreated, Phase::Scheduling, &[]),
    // Scheduling: the target pod finds a node and starts.
    row(Phase::Scheduling, Fact::VmiGone, Phase::Failed, &[DROP_POD, NO_VMI]),
    row(Phase::Scheduling, Fact::VmiFinal, Phase::Failed, &[DROP_POD, SHUTDOWN]),
    row(Phase::Scheduling, Fact::GuestLost, Phase::Failed, &[DROP_POD, SHUTDOWN]),
    row(Phase::Scheduling, Fact::Cancelled, Phase::Failed, &[DROP_POD, CANCELED]),
    row(Phase::Scheduling, Fact::TargetPodGone, Phase::Failed, &[POD_REMOVED]),
    row(Phase::Scheduling, Fact::TargetPodDown, Phase::Failed, &[DROP_POD, POD_DOWN]),
    row(Phase::Scheduling, Fact::TargetInMaintenance, Phase::Failed, &[DROP_POD, TARGET_CLOSED]),
    row(Phase::Scheduling, Fact::TargetPodStarting, Phase::Scheduling, &[]),
    row(Phase::Scheduling, Fact::TargetPodImage, Phase::Scheduling, &[]),
    row(Phase::Scheduling, Fact::TargetPodVolumes, Phase::Scheduling, &[]),
    row(Phase::Scheduling, Fact::DisksNotReady, Phase::Scheduling, &[]),
    row(Phase::Scheduling, Fact::TargetPodUnschedulable, Phase::Scheduling, &[Action::WarnUnschedulable]),
    row(Phase::Scheduling, Fact::TargetPodUnschedulableTooLong, Phase::Failed, &[Action::GiveUpTargetPod, POD_REMOVED]),
    row(Phase::Scheduling, Fact::TargetPodPendingTooLong, Phase::Failed, &[Action::GiveUpTargetPod, POD_REMOVED]),
    row(Phase::Scheduling, Fact::TargetPodReady, Phase::Scheduled, &[]),
    // Scheduled: the VMI is told, from then on the handlers drive.
    row(Phase::Scheduled, Fact::VmiGone, Phase::Failed, &[DROP_POD, NO_VMI]),
    row(Phase::Scheduled, Fact::VmiFinal, Phase::Failed, &[DROP_POD, SHUTDOWN]),
    row(Phase::Scheduled, Fact::GuestLost, Phase::Failed, &[DROP_POD, SHUTDOWN]),
    row(Phase::Scheduled, Fact::Cancelled, Phase::Failed, &[DROP_POD, CANCELED]),
    row(Phase::Scheduled, Fact::TargetPodGone, Phase::Failed, &[POD_REMOVED]),
    row(Phase::Scheduled, Fact::TargetPodDown, Phase::Failed, &[DROP_POD, POD_DOWN]),
    row(Phase::Scheduled, Fact::TargetInMaintenance, Phase::Failed, &[DROP_POD, TARGET_CLOSED]),
    row(Phase::Scheduled, Fact::OtherMigration, Phase::Failed, &[DROP_POD, NOT_ELIGIBLE]),
    row(
        Phase::Scheduled,
        Fact::HandOverTooLong,
        Phase::Failed,
        &[DROP_POD, HAND_OVER_FAILED, failed("Migration failed because it could not be handed over in time.")],
    ),
    row(Phase::Scheduled, Fact::DisksNotReady, Phase::Scheduled, &[]),
    row(Phase::Scheduled, Fact::ReadyToHandOver, Phase::Scheduled, &[Action::HandOver, HANDED_OVER]),
    row(Phase::Scheduled, Fact::HandedOver, Phase::PreparingTarget, &[]),
    // PreparingTarget: the target's handler makes the target ready.
    row(Phase::PreparingTarget, Fact::VmiGone, Phase::Failed, &[NO_VMI]),
    row(Phase::PreparingTarget, Fact::VmiFinal, Phase::Failed, &[SHUTDOWN]),
    row(Phase::PreparingTarget, Fact::GuestLost, Phase::Failed, &[SHUTDOWN]),
    row(Phase::PreparingTarget, Fact::StateCleared, Phase::Failed, &[CLEARED]),
    row(Phase::PreparingTarget, Fact::StateTakenOver, Phase::Failed, &[TAKEN_OVER]),
    row(Phase::PreparingTarget, Fact::SourceFailed, Phase::Failed, &[BY_SOURCE]),
    row(Phase::PreparingTarget, Fact::TargetPodDown, Phase::PreparingTarget, &[Action::FailOnVmi]),
    row(Phase::PreparingTarget, Fact::Cancelled, Phase::PreparingTarget, ABORT),
    row(Phase::PreparingTarget, Fact::TargetInMaintenance, Phase::PreparingTarget, ABORT),
    row(Phase::PreparingTarget, Fact::Aborting, Phase::PreparingTarget, &[]),
    row(Phase::PreparingTarget, Fact::AbortBeforeStartUnanswered, Phase::PreparingTarget, &[Action::FailOnVmi]),
    row(Phase::PreparingTarget, Fact::PreparingTooLong, Phase::PreparingTarget, &[Action::FailOnVmi]),
    row(Phase::PreparingTarget, Fact::Preparing, Phase::PreparingTarget, &[]),
    row(Phase::PreparingTarget, Fact::TargetListening, Phase::TargetReady, &[]),
    // TargetReady: the source's handler connects and starts.
    row(Phase::TargetReady, Fact::VmiGone, Phase::Failed, &[NO_VMI]),
    row(Phase::TargetReady, Fact::VmiFinal, Phase::Failed, &[SHUTDOWN]),
    row(Phase::TargetReady, Fact::GuestLost, Phase::Failed, &[SHUTDOWN]),
    row(Phase::TargetReady, Fact::StateCleared, Phase::Failed, &[CLEARED]),
    row(Phase::TargetReady, Fact::StateTakenOver, Phase::Failed, &[TAKEN_OVER]),
    row(Phase::TargetReady, Fact::SourceFailed, Phase::Failed, &[BY_SOURCE]),
    row(Phase::TargetReady, Fact::TargetPodDown, Phase::TargetReady, &[Action::FailOnVmi]),
    row(Phase::TargetReady, Fact::Cancelled, Phase::TargetReady, ABORT),
    row(Phase::TargetReady, Fact::TargetInMaintenance, Phase::TargetReady, ABORT),
    row(Phase::TargetReady, Fact::Aborting, Phase::TargetReady, &[]),
    row(Phase::TargetReady, Fact::AbortBeforeStartUnanswered, Phase::TargetReady, &[Action::FailOnVmi]),
    row(Phase::TargetReady, Fact::StartTooLong, Phase::TargetReady, &[Action::FailOnVmi]),
    row(Phase::TargetReady, Fact::Starting, Phase::TargetReady, &[]),
    row(Phase::TargetReady, Fact::Started, Phase::Running, &[]),
    // Running: memory is on its way.
    row(Phase::Running, Fact::Completed, Phase::Succeeded, &[SUCCEEDED]),
    row(Phase::Running, Fact::CompletedDespiteCancel, Phase::Succeeded, &[Action::NoteLateAbort, SUCCEEDED, TOO_LATE]),
    row(Phase::Running, Fact::Arriving, Phase::Running, &[]),
    row(Phase::Running, Fact::SourceFailed, Phase::Failed, &[BY_SOURCE]),
    row(Phase::Running, Fact::VmiGone, Phase::Failed, &[NO_VMI]),
    row(Phase::Running, Fact::VmiFinal, Phase::Failed, &[SHUTDOWN]),
    row(Phase::Running, Fact::GuestLost, Phase::Failed, &[SHUTDOWN]),
    row(Phase::Running, Fact::GuestLostAtTarget, Phase::Failed, &[SHUTDOWN]),
    row(Phase::Running, Fact::StateCleared, Phase::Failed, &[CLEARED]),
    row(Phase::Running, Fact::StateTakenOver, Phase::Failed, &[TAKEN_OVER]),
    row(Phase::Running, Fact::Cancelled, Phase::Running, ABORT),
    row(Phase::Running, Fact::RunningTooLong, Phase::Running, ABORT),
    row(Phase::Running, Fact::Aborting, Phase::Running, &[]),
    row(Phase::Running, Fact::AbortTooLate, Phase::Running, &[]),
    row(
        Phase::Running,
        Fact::AbortUnanswered,
        Phase::Failed,
        &[failed("Migration failed because nobody answered the request to abort it.")],
    ),
    row(Phase::Running, Fact::InFlight, Phase::Running, &[]),
    row(Phase::Running, Fact::PostCopyLinkBroken, Phase::Running, &[]),
    // Final phases stay.
    row(Phase::Succeeded, Fact::Over, Phase::Succeeded, &[]),
    row(Phase::Failed, Fact::Over, Phase::Failed, &[]),
];

/// The row for a fact in a phase.
pub fn lookup(from: &Phase, fact: Fact) -> Option<&'static Row> {
    TABLE.iter().find(|row| row.from == *from && row.fact == fact)
}

impl Fact {
    /// Facts that time alone brings about; each non-final phase but the first has one that ends it or gives it up.
    pub fn is_timeout(self) -> bool {
        matches!(
            self,
            Fact::WaitedTooLong
                | Fact::QuotaExceededTooLong
                | Fact::TargetPodRefusedTooLong
                | Fact::TargetPodUnschedulableTooLong
                | Fact::TargetPodPendingTooLong
                | Fact::HandOverTooLong
                | Fact::PreparingTooLong
                | Fact::StartTooLong
                | Fact::RunningTooLong
                | Fact::AbortBeforeStartUnanswered
                | Fact::AbortUnanswered
        )
    }

    /// Facts about a migration that is in the line and waits for its turn.
    pub fn is_turn(self) -> bool {
        matches!(self, Fact::AwaitsTurn | Fact::InboundLimit | Fact::ClusterLimit | Fact::NodeLimit)
    }

    /// The word for it in the API, while it is what the migration waits for (`status.reason`).
    pub fn word(self) -> String {
        format!("{self:?}")
    }

    /// Why a migration that this fact ends has failed; `None` for facts that end none.
    pub fn blame(self) -> Option<Blame> {
        Some(Blame::Cause(match self {
            Fact::VmiGone => FailureCause::VmiNotFound,
            Fact::VmiFinal => FailureCause::GuestEnded,
            Fact::GuestLost => FailureCause::SourceLost,
            Fact::Cancelled | Fact::AbortBeforeStartUnanswered => FailureCause::Cancelled,
            Fact::OtherMigration => FailureCause::OtherMigration,
            Fact::NotMigratable => FailureCause::NotMigratable,
            Fact::NoFittingNode => FailureCause::TargetRefusedCpu,
            Fact::QuotaExceededTooLong => FailureCause::QuotaExceeded,
            Fact::WaitedTooLong => FailureCause::WaitedTooLong,
            Fact::TargetPodUnschedulableTooLong => FailureCause::Unschedulable,
            Fact::TargetPodRefusedTooLong | Fact::TargetPodPendingTooLong => FailureCause::TargetNotReady,
            Fact::TargetPodDown | Fact::TargetPodGone | Fact::GuestLostAtTarget => FailureCause::TargetLost,
            Fact::TargetInMaintenance => FailureCause::TargetInMaintenance,
            Fact::HandOverTooLong => FailureCause::NotHandedOver,
            Fact::StateCleared | Fact::StateTakenOver => FailureCause::StateTaken,
            Fact::PreparingTooLong => FailureCause::TargetUnresponsive,
            Fact::StartTooLong | Fact::AbortUnanswered => FailureCause::SourceUnresponsive,
            Fact::RunningTooLong => FailureCause::OutOfTime,
            Fact::SourceFailed => return Some(Blame::Reported),
            _ => return None,
        }))
    }
}

/// The place of a phase in a life; it never decreases.
pub fn rank(phase: &Phase) -> u8 {
    match phase {
        Phase::Unset => 0,
        Phase::Pending => 1,
        Phase::Scheduling => 2,
        Phase::Scheduled => 3,
        Phase::PreparingTarget => 4,
        Phase::TargetReady => 5,
        Phase::Running => 6,
        _ => 7,
    }
}
