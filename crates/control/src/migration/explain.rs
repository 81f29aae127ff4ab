//! Says in words what a migration waits for, or why it failed and what to do about it.

use godwit_api::failure::FailureCause;
use godwit_api::migration::NodeVerdict;
use godwit_api::vmi::{AbortStatus, MigrationMode};
use godwit_api::{Condition, MigrationPhase as Phase, VirtualMachineInstanceMigration, condition};
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::deadlines;
use super::observe::{Situation, is_unschedulable};
use super::table::{Blame, Fact, Row};
use crate::launcher_pod::{self, Role};
use crate::object::Stored;
use crate::world::{World, claims_of};
use crate::{names, placement, processor};
use crate::{turns, volumes};

/// Writes into the status what the migration waits for, why it failed, or how it went.
pub fn say(after: &mut VirtualMachineInstanceMigration, row: &Row, situation: &Situation<'_>, now: &Time) {
    // On entering a phase the first thing it waits for is said at once, which saves a write.
    let fact = if row.to == row.from || row.to.is_final() { Some(row.fact) } else { first_wait(&row.to) };
    // A fact that is acted on within its phase is over with the next decision: what was said stays.
    if row.to == row.from && !row.actions.is_empty() && row.fact != Fact::TargetPodUnschedulable {
        return;
    }
    let text = fact.map(|fact| match row.to {
        Phase::Failed => {
            let cause = cause(fact, situation);
            let text = format!("{} {}", sentence(fact, situation), cause.remedy());
            (Some(cause.to_string()), text)
        }
        // Success has no reason, unless it was not wanted.
        Phase::Succeeded if fact == Fact::Completed => (None, sentence(fact, situation)),
        _ => (Some(fact.word()), sentence(fact, situation)),
    });
    let status = &mut after.status;
    status.queue = match &row.to {
        Phase::Pending if fact.is_some_and(Fact::is_turn) => {
            let turn = turns::turn(situation.migration, &situation.view);
            turns::queue_place(situation.migration.status.queue.as_ref(), &turn)
        }
        _ => None,
    };
    status.nodes = fact.map_or_else(Vec::new, |fact| nodes(fact, situation));
    let quota = fact.filter(|fact| matches!(fact, Fact::QuotaExceeded | Fact::QuotaExceededTooLong));
    match quota.and(situation.refused()) {
        Some(why) => {
            let type_ = names::conditions::MIGRATION_REJECTED_BY_RESOURCE_QUOTA;
            let told = Condition::new(type_, true).because("ExceededQuota", why);
            condition::set(&mut status.conditions, told, now);
        }
        None => {
            let type_ = names::conditions::MIGRATION_REJECTED_BY_RESOURCE_QUOTA;
            condition::remove(&mut status.conditions, type_);
        }
    }
    let text = text.map(|(word, sentence)| match status.queue.as_ref().and_then(|queue| queue.position) {
        Some(1) => (word, format!("{sentence} First of those that wait.")),
        Some(place) => (word, format!("{sentence} Place {place} of those that wait.")),
        None => (word, sentence),
    });
    status.reason = text.as_ref().and_then(|(word, _)| word.clone());
    status.message = text.as_ref().map(|(_, sentence)| sentence.clone());
    condition::remove(&mut status.conditions, names::conditions::MIGRATION_WAITING);
    let Some((Some(word), sentence)) = text else { return };
    let type_ = match row.to {
        Phase::Failed => names::conditions::MIGRATION_FAILED,
        // The request to abort is what failed.
        Phase::Succeeded => names::conditions::MIGRATION_ABORT_REQUESTED,
        _ => names::conditions::MIGRATION_WAITING,
    };
    let mut said = Condition::new(type_, true).because(&word, sentence);
    // The time of a wait that goes on does not move.
    let before = situation.migration.condition(type_);
    let before = before.filter(|before| before.reason == said.reason || row.to == Phase::Succeeded);
    said.last_transition_time = before.map_or_else(|| Some(now.clone()), |before| before.last_transition_time.clone());
    condition::remove(&mut status.conditions, type_);
    status.conditions.push(said);
}

/// Why the nodes do not take the target pod, while that is what it waits for or why it was given up.
fn nodes(fact: Fact, situation: &Situation<'_>) -> Vec<NodeVerdict> {
    match (fact, situation.pod, situation.vmi) {
        (
            Fact::TargetPodUnschedulable | Fact::TargetPodUnschedulableTooLong | Fact::TargetPodPendingTooLong,
            Some(pod),
            _,
        ) if is_unschedulable(pod) => placement::verdicts(pod, &situation.view).nodes,
        (Fact::InboundLimit, _, Some(vmi)) => {
            // Thousands may wait for this: the nodes are looked at once a wait.
            let held = &situation.migration.status;
            if held.reason.as_deref() == Some(fact.word().as_str()) {
                return held.nodes.clone();
            }
            let pod = launcher_pod::build(vmi, Role::Receive(situation.migration), &situation.view);
            placement::verdicts(&pod, &situation.view).nodes
        }
        (Fact::NoFittingNode, _, Some(vmi)) => processor::verdicts(vmi, situation.view.world),
        _ => Vec::new(),
    }
}

/// What a migration waits for on entering a phase.
fn first_wait(phase: &Phase) -> Option<Fact> {
    Some(match phase {
        Phase::Pending => Fact::AwaitsTurn,
        Phase::Scheduling => Fact::TargetPodStarting,
        Phase::Scheduled => Fact::ReadyToHandOver,
        Phase::PreparingTarget => Fact::Preparing,
        Phase::TargetReady => Fact::Starting,
        Phase::Running => Fact::InFlight,
        _ => return None,
    })
}

/// Why a migration that this fact ends has failed.
pub fn cause(fact: Fact, situation: &Situation<'_>) -> FailureCause {
    match fact.blame() {
        Some(Blame::Cause(cause)) => cause,
        Some(Blame::Reported) | None => reported(situation),
    }
}

/// The cause as the handler says it; where it does not, what can be told from the rest.
fn reported(situation: &Situation<'_>) -> FailureCause {
    let Some(state) = situation.own_state() else { return FailureCause::StateTaken };
    let cancelled = state.abort_status == Some(AbortStatus::Succeeded);
    let cause = match &state.failure_cause {
        Some(cause) if cause.is_known() => cause.clone(),
        _ if cancelled => FailureCause::Cancelled,
        _ if situation.vmi.is_some_and(|vmi| vmi.is_final()) => FailureCause::SourceLost,
        _ => FailureCause::HypervisorError,
    };
    // An abort that nobody asked for by deleting the migration was asked for by the controller: its target was closed, or its
    // time was up.
    let timed_out = state.abort_requested == Some(true) && !situation.migration.is_deleting();
    match cause {
        FailureCause::Cancelled if timed_out && target_was_closed(situation) => FailureCause::TargetInMaintenance,
        FailureCause::Cancelled if timed_out => FailureCause::OutOfTime,
        cause => cause,
    }
}

/// Whether the controller asked for the abort because the target's node was put into maintenance.
fn target_was_closed(situation: &Situation<'_>) -> bool {
    let asked = situation.migration.condition(names::conditions::MIGRATION_ABORT_REQUESTED);
    let word = Fact::TargetInMaintenance.word();
    asked.is_some_and(|asked| asked.reason.as_deref() == Some(word.as_str()))
}

/// What keeps a target pod from becoming ready.
pub enum Trouble {
    /// The kubelet's words about an image.
    Image(String),
    /// What is wrong with which claim.
    Claim(String),
    /// The kubelet's words about something else.
    Other(String),
}

impl Trouble {
    fn text(&self) -> &str {
        match self {
            Self::Image(text) | Self::Claim(text) | Self::Other(text) => text,
        }
    }
}

/// Reasons of waiting containers that speak of an image, as Kubernetes' kubelet gives them.
const IMAGE_REASONS: [&str; 7] = [
    "ErrImagePull",
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "InvalidImageName",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
];

/// What keeps a pod from becoming ready, as far as the kubelet and the claims tell.
pub fn trouble(pod: &Pod, world: &World) -> Option<Trouble> {
    let status = pod.status.as_ref();
    let containers = status.into_iter().flat_map(|status| {
        status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten())
    });
    let waiting =
        containers.filter_map(|container| Some((container, container.state.as_ref()?.waiting.as_ref()?))).find(
            |(_, waiting)| !matches!(waiting.reason.as_deref(), None | Some("ContainerCreating" | "PodInitializing")),
        );
    if let Some((container, waiting)) = waiting {
        let reason = waiting.reason.as_deref().unwrap_or_default();
        let message = waiting.message.as_deref().unwrap_or("no more is said");
        let text = format!("container {}: {reason}: {message}", container.name);
        let image = IMAGE_REASONS.contains(&reason);
        return Some(if image { Trouble::Image(text) } else { Trouble::Other(text) });
    }
    claims_of(pod).find_map(|claim| match world.claims.get(&claim) {
        None => Some(Trouble::Claim(format!("claim {claim} does not exist"))),
        Some(found) if !volumes::is_bound(found) => {
            Some(Trouble::Claim(format!("claim {claim} is not bound to a volume")))
        }
        Some(_) => None,
    })
}

/// A time span for people.
fn span(seconds: i64) -> String {
    match seconds {
        86_400.. => format!("{} days", seconds / 86_400),
        _ => format!("{seconds} s"),
    }
}

/// The scheduler's words about a pod that no node takes.
fn scheduler_says(pod: Option<&Pod>) -> &str {
    let conditions = pod.and_then(|pod| pod.status.as_ref()).and_then(|status| status.conditions.as_ref());
    let scheduled = conditions.into_iter().flatten().find(|condition| condition.type_ == "PodScheduled");
    let text = scheduled.and_then(|condition| condition.message.as_deref()).unwrap_or("the scheduler does not say why");
    text.trim_end_matches('.')
}

/// The fact as a sentence for people.
pub fn sentence(fact: Fact, situation: &Situation<'_>) -> String {
    let configuration = &situation.configuration;
    let migration = situation.migration;
    let vmi_name = migration.vmi_name();
    let vmi = situation.vmi;
    let state = situation.own_state();
    let pod = situation.pod.map(AsRef::as_ref);
    let pod_name = pod.map_or("", Stored::name);
    let pod_node = pod.and_then(|pod| pod.spec.as_ref()).and_then(|spec| spec.node_name.as_deref());
    let source = state.and_then(|state| state.source_node.as_deref());
    let source = source.or_else(|| vmi.and_then(|vmi| vmi.status.node_name.as_deref())).unwrap_or("unknown");
    let target = state.and_then(|state| state.target_node.as_deref()).or(pod_node).unwrap_or("unknown");
    let secs = |limit: SignedDuration| limit.as_secs();
    let waited = |pod: &Pod| span(secs(situation.view.now.duration_since(situation.target_pod_since(pod))));
    let target_closed =
        || format!("The target node {target} was put into maintenance; the guest stays on node {source}.");
    match fact {
        Fact::VmiGone => {
            format!("The VMI {vmi_name:?} does not exist in namespace {:?}.", migration.namespace())
        }
        Fact::VmiFinal => format!("The VMI {vmi_name:?} was shut down or deleted."),
        Fact::GuestLost | Fact::GuestLostAtTarget => {
            let why = vmi.and_then(|vmi| vmi.status.reason.as_deref()).map(|why| format!(" ({why})"));
            let node = if fact == Fact::GuestLost { source } else { target };
            format!("The VMI {vmi_name:?} failed on node {node}{}.", why.unwrap_or_default())
        }
        Fact::Cancelled => "The migration was deleted before it was handed over; the guest was not touched.".to_owned(),
        Fact::OtherMigration => format!("Another migration of the VMI {vmi_name:?} is in progress."),
        Fact::NotMigratable => {
            let condition = vmi.and_then(|vmi| vmi.condition(names::conditions::LIVE_MIGRATABLE));
            let (reason, message) = condition.map_or((None, None), |c| (c.reason.as_deref(), c.message.as_deref()));
            let (reason, message) = (reason.unwrap_or("unknown"), message.unwrap_or("none given"));
            format!("Cannot migrate VMI, Reason: {reason}, Message: {}.", message.trim_end_matches('.'))
        }
        Fact::NoFittingNode => {
            let has = vmi.map(|vmi| processor::describe(vmi)).unwrap_or_default();
            format!("No other node offers what the guest of the VMI {vmi_name:?} has ({has}); it stays on node {source}.")
        }
        Fact::GuestNotRunning => format!("Waits until the guest of the VMI {vmi_name:?} runs."),
        Fact::EarlierUnresolved => {
            "Waits until the handlers of both nodes report the end of an earlier migration of this VMI; check that they \
             run and reach the API."
                .to_owned()
        }
        Fact::OldPodRemains => "Waits until another launcher pod of the VMI has ended.".to_owned(),
        Fact::AwaitsTurn => "Waits for its turn.".to_owned(),
        Fact::InboundLimit => format!(
            "Waits for its turn: every node that could take it receives {} migrations already, which is the limit \
             (parallelInboundMigrationsPerNode).",
            configuration.parallel_inbound_migrations_per_node.unwrap_or_default()
        ),
        Fact::ClusterLimit => format!(
            "Waits for its turn: {} migrations run in the cluster, which is the limit (parallelMigrationsPerCluster).",
            configuration.parallel_migrations_per_cluster.unwrap_or_default()
        ),
        Fact::NodeLimit => format!(
            "Waits for its turn: {} migrations leave node {source}, which is the limit \
             (parallelOutboundMigrationsPerNode).",
            configuration.parallel_outbound_migrations_per_node.unwrap_or_default()
        ),
        Fact::QuotaExceeded => format!(
            "The target pod does not fit into the namespace's quota: {}. Waits until there is room.",
            situation.refused().as_deref().unwrap_or("no more is said").trim_end_matches('.')
        ),
        Fact::QuotaExceededTooLong => format!(
            "The target pod did not fit into the namespace's quota for {}: {}.",
            span(secs(deadlines::QUEUE)),
            situation.refused().as_deref().unwrap_or("no more is said").trim_end_matches('.')
        ),
        Fact::TargetPodRefused | Fact::TargetPodRefusedTooLong => format!(
            "The API server does not accept the target pod: {}.",
            situation.refused().as_deref().unwrap_or("no more is said").trim_end_matches('.')
        ),
        Fact::WaitedTooLong => match &migration.status.message {
            Some(last) => format!("Waited for its turn for {}. Last: {last}", span(secs(deadlines::QUEUE))),
            None => format!("Waited for its turn for {}.", span(secs(deadlines::QUEUE))),
        },
        Fact::Eligible | Fact::MayStart => "Makes the target pod.".to_owned(),
        Fact::TargetPodCreated | Fact::TargetPodStarting => match (pod, pod_node) {
            (Some(pod), Some(node)) => match trouble(pod, situation.view.world) {
                Some(trouble) => format!("Waits until the target pod on node {node} is ready: {}.", trouble.text()),
                None => format!("Waits until the target pod on node {node} is ready."),
            },
            _ => "Waits until the target pod has a node and is ready.".to_owned(),
        },
        Fact::TargetPodImage | Fact::TargetPodVolumes => {
            let trouble = pod.and_then(|pod| trouble(pod, situation.view.world));
            let trouble = trouble.as_ref().map_or("no more is said", Trouble::text);
            let what = if fact == Fact::TargetPodImage { "an image" } else { "its volumes" };
            format!("The target pod waits for {what}: {trouble}.")
        }
        Fact::DisksNotReady => {
            let missing = situation.disks_missing().unwrap_or_else(|| "nothing any more".to_owned());
            format!("Waits for the disks that the guest was given while it ran: {missing}.")
        }
        Fact::TargetPodUnschedulable => {
            let limit = deadlines::unschedulable(migration).into_iter().chain(deadlines::pending(migration)).min();
            let limit = limit.map_or_else(String::new, |limit| format!(" Given up after {} s.", secs(limit)));
            format!("No node takes the target pod: {}.{limit}", scheduler_says(pod))
        }
        Fact::TargetPodUnschedulableTooLong => {
            let waited = pod.map_or_else(String::new, waited);
            format!("No node took the target pod {pod_name} within {waited}: {}.", scheduler_says(pod))
        }
        Fact::TargetPodPendingTooLong => {
            let waited = pod.map_or_else(String::new, waited);
            let trouble = pod.and_then(|pod| trouble(pod, situation.view.world));
            let why = match (&trouble, pod_node) {
                (Some(trouble), _) => trouble.text().to_owned(),
                (None, Some(node)) => format!("the kubelet of node {node} does not say why"),
                (None, None) => scheduler_says(pod).to_owned(),
            };
            format!("The target pod {pod_name} did not become ready within {waited}: {why}.")
        }
        Fact::TargetPodReady | Fact::ReadyToHandOver => "Tells the VMI of the migration.".to_owned(),
        Fact::TargetPodDown => {
            let status = pod.and_then(|pod| pod.status.as_ref());
            let why = status.and_then(|status| status.message.as_deref().or(status.reason.as_deref()));
            let why = why.map(|why| format!(": {}", why.trim_end_matches('.'))).unwrap_or_default();
            format!("The target pod {pod_name} on node {target} has ended{why}; the guest stays on node {source}.")
        }
        Fact::TargetPodGone => format!("The target pod was removed; the guest stays on node {source}."),
        Fact::TargetInMaintenance => target_closed(),
        Fact::SourceFailed if cause(fact, situation) == FailureCause::TargetInMaintenance => target_closed(),
        Fact::HandOverTooLong => {
            format!("The VMI {vmi_name:?} could not be told of the migration within {} s.", secs(deadlines::HAND_OVER))
        }
        Fact::HandedOver | Fact::Preparing => {
            format!("Waits until the handler of the target node {target} is ready to receive.")
        }
        Fact::PreparingTooLong => format!(
            "The handler of the target node {target} was not ready to receive within {} s; the guest stays on node {source}.",
            secs(deadlines::PREPARE)
        ),
        Fact::StateCleared => format!("The VMI {vmi_name:?} does not carry the migration any more."),
        Fact::StateTakenOver => {
            let other = situation.state().and_then(|state| state.migration_uid.as_deref()).unwrap_or("unknown");
            format!("The VMI {vmi_name:?} carries another migration (UID {other}).")
        }
        Fact::TargetListening | Fact::Starting => {
            format!("Waits until the handler of the source node {source} starts to send.")
        }
        Fact::StartTooLong => format!(
            "The handler of the source node {source} did not start to send within {} s; the guest stays there.",
            secs(deadlines::PREPARE)
        ),
        Fact::InFlight if state.is_some_and(|state| state.mode == Some(MigrationMode::PostCopy)) => {
            format!("The guest runs on node {target}; the rest of its memory follows from node {source} (post-copy).")
        }
        Fact::PostCopyLinkBroken => {
            let broken = state.and_then(|state| state.progress.as_ref()).and_then(|told| told.link_broken_timestamp.as_ref());
            let since = broken.map(|at| format!(" since {}", at.0)).unwrap_or_default();
            format!(
                "The link between nodes {source} and {target} is broken{since}, and a part of the guest's memory has yet to \
                 follow it (post-copy). The guest stands still when it needs what is missing, and goes on when the link is back."
            )
        }
        Fact::Started | Fact::InFlight => {
            let limit = deadlines::completion(configuration, vmi.map(AsRef::as_ref));
            let limit =
                limit.map(|limit| format!("; given up after {limit} s (completionTimeoutPerGiB)")).unwrap_or_default();
            format!("The guest's memory is being sent from node {source} to node {target}{limit}.")
        }
        Fact::RunningTooLong => {
            let ran = span(secs(situation.view.now.duration_since(situation.since())));
            format!("The migration from node {source} to node {target} was not over after {ran}.")
        }
        Fact::Arriving => format!("Waits until the handler of the target node {target} reports the guest."),
        Fact::Completed => match state.and_then(|state| state.progress.as_ref()) {
            Some(progress) => {
                let total = progress.total_milliseconds.map(|ms| format!(" in {ms} ms"));
                let downtime = progress.downtime_milliseconds.map(|ms| format!("; it stood still for {ms} ms"));
                let (total, downtime) = (total.unwrap_or_default(), downtime.unwrap_or_default());
                format!("The guest moved from node {source} to node {target}{total}{downtime}.")
            }
            None => format!("The guest moved from node {source} to node {target}."),
        },
        Fact::CompletedDespiteCancel => format!(
            "The request to cancel came too late: the guest had already moved from node {source} to node {target}."
        ),
        Fact::AbortTooLate => format!(
            "The request to cancel came too late: the guest is on its way to node {target}. Waits until it has arrived."
        ),
        Fact::Over => "The migration is over.".to_owned(),
        Fact::SourceFailed => {
            let reason = state.and_then(|state| state.failure_reason.as_deref());
            let reason = reason.unwrap_or("The source reported a failure").trim_end_matches('.');
            // A guest that was lost after it had been handed over stays nowhere.
            match vmi.is_some_and(|vmi| vmi.is_final()) {
                true => format!("{reason}."),
                false => format!("{reason}; the guest stays on node {source}."),
            }
        }
        Fact::Aborting => format!("Waits until the handler of the source node {source} has aborted."),
        Fact::AbortBeforeStartUnanswered => format!(
            "The migration was {} before it started, and given up without an answer of the handler of the source \
             node {source} within {} s; the guest stays there.",
            if migration.is_deleting() { "deleted" } else { "called off" },
            secs(deadlines::ABORT)
        ),
        Fact::AbortUnanswered => format!(
            "The handler of the source node {source} did not answer the request to abort within {} s.",
            secs(deadlines::ABORT)
        ),
    }
}
