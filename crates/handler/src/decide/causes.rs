//! Which of the closed list of causes a failed migration had, from what both ends say.

use godwit_api::FailureCause;
use godwit_launcher::rpc::{Cause, MigrationFacts};

use super::Failure;
use crate::facts::TargetSays;

/// KubeVirt's words for every migration that was cancelled.
pub const ABORTED: &str = "Live migration has been aborted";

/// The cause when a target's QEMU fails in this way.
#[must_use]
pub fn of_target(cause: Option<Cause>) -> FailureCause {
    match cause {
        Some(Cause::RefusedCpu) => FailureCause::TargetRefusedCpu,
        Some(Cause::NoSpace) => FailureCause::TargetOutOfSpace,
        Some(Cause::RefusedStorage) => FailureCause::TargetRefusedStorage,
        Some(Cause::RefusedMachine) => FailureCause::TargetRefusedMachine,
        Some(Cause::Killed) => FailureCause::TargetLost,
        Some(Cause::LinkLost) => FailureCause::LinkLost,
        Some(Cause::Other) | None => FailureCause::HypervisorError,
    }
}

/// A migration that QEMU calls failed and nobody wanted to end. `None` while the target's end has yet to be heard.
///
/// The source's QEMU mostly says only that the stream broke; what broke it the target's end knows, if it can be asked.
pub(super) fn of_failure(f: &MigrationFacts, says: &TargetSays, target_ended: Option<&str>) -> Option<Failure> {
    // What is more than the end of a stream is the source's own trouble, unless the target is gone.
    let own = f.cause.filter(|cause| *cause != Cause::LinkLost);
    let (cause, more) = match (says, target_ended) {
        (TargetSays::Told { ended, words, cause }, _) => {
            let refused = cause.map(|cause| of_target(Some(cause))).filter(|cause| {
                !matches!(cause, FailureCause::LinkLost | FailureCause::HypervisorError | FailureCause::TargetLost)
            });
            let cause = match (refused, *ended, *cause) {
                (Some(refused), _, _) => refused,
                // A QEMU whose stream breaks ends as well.
                (None, true, Some(Cause::LinkLost)) => own.map_or(FailureCause::LinkLost, |own| of_target(Some(own))),
                (None, true, _) => FailureCause::TargetLost,
                (None, false, _) => own.map_or(FailureCause::LinkLost, |own| of_target(Some(own))),
            };
            (cause, words.as_deref())
        }
        // Its QEMU ends with a stream that breaks, and where only the network for migrations is cut its node can say so at once.
        (_, Some(ended)) => match f.carried.as_ref().is_some_and(|carried| carried.timed_out) {
            true => (FailureCause::LinkLost, Some(ended)),
            false => (FailureCause::TargetLost, Some(ended)),
        },
        _ if own.is_some() => (of_target(own), None),
        (TargetSays::NoHandler(error), None) => (FailureCause::TargetUnresponsive, Some(error.as_str())),
        (TargetSays::Unreachable(error), None) => (FailureCause::LinkLost, Some(error.as_str())),
        (TargetSays::Nothing, None) => return None,
    };
    let own = f.error.as_deref().unwrap_or("QEMU gave no reason");
    let more = more.filter(|more| *more != own).map(|more| format!("; at the target: {more}")).unwrap_or_default();
    Some(Failure::new(cause, format!("Live migration failed: {own}{more}")))
}

/// The words for a cause that a predecessor of this process wrote down when it gave the migration up.
pub(super) fn remembered(cause: &FailureCause) -> Failure {
    let words = match cause {
        FailureCause::Cancelled => return Failure::new(FailureCause::Cancelled, ABORTED),
        FailureCause::NoProgress => "stuck: what remains to be sent has become no less (progressTimeout)",
        FailureCause::OutOfTime => "not completed in time (completionTimeoutPerGiB)",
        FailureCause::NotConverging => "not completed in time: the guest writes faster than the link carries",
        FailureCause::LinkLost => "no byte moved any more; the link to the target may be cut",
        FailureCause::GuestEnded => "the VirtualMachineInstance is being deleted",
        other => other.as_str(),
    };
    Failure::new(cause.clone(), format!("{ABORTED}: {words}"))
}
