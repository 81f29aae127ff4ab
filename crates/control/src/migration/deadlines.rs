//! How long each wait of a migration may last, and who says so.

use godwit_api::vmi::{MigrationMode, VirtualMachineInstanceMigrationState as State};
use godwit_api::{MigrationConfiguration, VirtualMachineInstance, VirtualMachineInstanceMigration};
use jiff::{SignedDuration, Timestamp};

use crate::names;

/// A migration may wait for its turn this long.
pub const QUEUE: SignedDuration = SignedDuration::from_hours(24);
/// A target pod that the server would not make is asked for again after this long, or when a quota changes.
pub const REFUSED: SignedDuration = SignedDuration::from_secs(30);
/// The hand-over is one write; it is given up after this long.
pub const HAND_OVER: SignedDuration = SignedDuration::from_mins(5);
/// The target's handler has this long to listen, the source's to start. The handlers give up earlier, and say why.
pub const PREPARE: SignedDuration = SignedDuration::from_mins(5);
/// A handler has this long to answer a request to abort.
pub const ABORT: SignedDuration = SignedDuration::from_mins(2);
/// The target has this long to report the guest after the source is done.
pub const ARRIVAL: SignedDuration = SignedDuration::from_secs(60);
/// The source's handler keeps the time limit of a running migration; the controller steps in this much later.
pub const HANDLER_MARGIN: SignedDuration = SignedDuration::from_mins(10);
/// A running migration without a time limit is given up when its source has said nothing for this long.
pub const SILENCE: SignedDuration = SignedDuration::from_hours(24);

/// A limit in seconds that the migration's annotation overrides. `None` is no limit: 0 switches it off. A value that is no
/// number of seconds is passed over.
fn annotated(migration: &VirtualMachineInstanceMigration, annotation: &str, default: i64) -> Option<SignedDuration> {
    let seconds = migration.annotation(annotation).and_then(|text| text.trim().parse::<i64>().ok());
    let seconds = seconds.filter(|seconds| (0..=i64::from(i32::MAX)).contains(seconds)).unwrap_or(default);
    (seconds != 0).then(|| SignedDuration::from_secs(seconds))
}

/// How long the target pod may be without a node.
pub fn unschedulable(migration: &VirtualMachineInstanceMigration) -> Option<SignedDuration> {
    let annotation = names::ANNOTATION_UNSCHEDULABLE_POD_TIMEOUT;
    annotated(migration, annotation, names::UNSCHEDULABLE_POD_TIMEOUT_SECONDS)
}

/// How long the target pod may take to be ready, whatever it waits for.
pub fn pending(migration: &VirtualMachineInstanceMigration) -> Option<SignedDuration> {
    annotated(migration, names::ANNOTATION_PENDING_POD_TIMEOUT, names::PENDING_POD_TIMEOUT_SECONDS)
}

/// The time limit of a running migration, as its handler keeps it; `None` is none.
pub fn completion(configuration: &MigrationConfiguration, vmi: Option<&VirtualMachineInstance>) -> Option<u64> {
    godwit_api::config::completion_timeout_seconds(configuration, vmi.map_or(0, godwit_api::config::bytes_to_copy))
}

/// When the controller gives up a running migration that its handler has not ended, in phase Running since `since`.
pub fn running(
    configuration: &MigrationConfiguration,
    vmi: Option<&VirtualMachineInstance>,
    state: &State,
    since: Timestamp,
) -> Option<Timestamp> {
    match completion(configuration, vmi) {
        // Post-copy cannot be taken back: the guest runs at the target already.
        Some(seconds) if state.mode != Some(MigrationMode::PostCopy) => {
            // Twice: the time is doubled when the guest is paused to let the migration end.
            let seconds = i64::try_from(seconds.saturating_mul(2)).unwrap_or(i64::MAX);
            since.checked_add(SignedDuration::from_secs(seconds).saturating_add(HANDLER_MARGIN)).ok()
        }
        _ => last_word(state, since).checked_add(SILENCE).ok(),
    }
}

/// When the source last told how far it has come.
fn last_word(state: &State, since: Timestamp) -> Timestamp {
    let elapsed = state.progress.as_ref().and_then(|progress| progress.total_milliseconds);
    let elapsed = SignedDuration::from_millis(i64::try_from(elapsed.unwrap_or(0)).unwrap_or(i64::MAX));
    let start = state.start_timestamp.as_ref().map_or(since, |start| start.0);
    start.checked_add(elapsed).map_or(since, |told| told.max(since))
}

/// The limits as rows of `docs/migration-states.md`: phase, what is limited, how long, what sets it.
pub fn rows() -> Vec<[String; 4]> {
    let seconds = |limit: SignedDuration| format!("{} s", limit.as_secs());
    let row =
        |phase: &str, what: &str, limit: String, set: &str| [phase.to_owned(), what.to_owned(), limit, set.to_owned()];
    let annotation = |key: &str| format!("annotation `{key}` of the migration; 0 switches it off");
    let given_up =
        "fixed; the handlers give up earlier; it counts while the source's node is in reach, and anew when it is back";
    vec![
        row("Pending", "wait for its turn, for the guest, for quota", seconds(QUEUE), "fixed"),
        row(
            "Pending",
            "target pod that the API server does not accept (for another reason than a quota)",
            format!("{} s", names::PENDING_POD_TIMEOUT_SECONDS),
            &annotation(names::ANNOTATION_PENDING_POD_TIMEOUT),
        ),
        row(
            "Scheduling",
            "target pod without a node",
            format!("{} s", names::UNSCHEDULABLE_POD_TIMEOUT_SECONDS),
            &annotation(names::ANNOTATION_UNSCHEDULABLE_POD_TIMEOUT),
        ),
        row(
            "Scheduling",
            "target pod not ready for any reason, no node among them",
            format!("{} s", names::PENDING_POD_TIMEOUT_SECONDS),
            &annotation(names::ANNOTATION_PENDING_POD_TIMEOUT),
        ),
        row("Scheduled", "telling the VMI", seconds(HAND_OVER), "fixed"),
        row("PreparingTarget", "handler of the target node", seconds(PREPARE), given_up),
        row("TargetReady", "handler of the source node", seconds(PREPARE), given_up),
        row(
            "Running",
            "no progress, measured against the best so far (kept by the source's handler)",
            "150 s".to_owned(),
            "`progressTimeout`; 0 switches it off",
        ),
        row(
            "Running",
            "copying (kept by the source's handler)",
            "800 s for each GiB to copy, rounded up".to_owned(),
            "`completionTimeoutPerGiB`; 0 switches it off",
        ),
        row(
            "Running",
            "copying (kept by the controller when the handler does not)",
            format!("twice that and {}", seconds(HANDLER_MARGIN)),
            "as above; without a limit, and in post-copy, 86400 s after the source's last word",
        ),
        row("Running", "answer to a request to abort", seconds(ABORT), "fixed"),
        row("Running", "the target's report of a guest that the source has sent", seconds(ARRIVAL), "fixed"),
    ]
}
