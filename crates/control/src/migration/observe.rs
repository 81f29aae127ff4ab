//! Which fact about a migration counts now, and when time alone will change that.

use std::sync::Arc;

use godwit_api::MigrationPhase as Phase;
use godwit_api::vmi::{AbortStatus, VirtualMachineInstanceMigrationState as State};
use godwit_api::{
    FailureCause, MigrationConfiguration, VirtualMachineInstance, VirtualMachineInstanceMigration, VmiPhase,
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

use super::table::Fact;
use super::{deadlines, explain};
use crate::launcher_pod::{self, Role};
use crate::object::{Name, Stored};
use crate::plan::View;
use crate::turns::{Setting, Turn};
use crate::world::Refusal;
use crate::{hotplug, kubevirt, maintenance, names, node, placement, processor, quota, turns};

/// What counts about a migration, gathered once.
pub struct Situation<'a> {
    /// The migration.
    pub migration: &'a Arc<VirtualMachineInstanceMigration>,
    /// Its VMI.
    pub vmi: Option<&'a Arc<VirtualMachineInstance>>,
    /// Its target pod.
    pub pod: Option<&'a Arc<Pod>>,
    /// The configuration for it: as it was resolved at the hand-over, before that the one in force now.
    pub configuration: MigrationConfiguration,
    /// The MigrationPolicy that the configuration comes from, if one applies.
    pub policy: Option<String>,
    /// The view it was gathered from.
    pub view: View<'a>,
}

/// A fact, and when to look again although nothing changes.
pub struct Observation {
    /// The fact.
    pub fact: Fact,
    /// When time alone may bring another.
    pub until: Option<Timestamp>,
}

impl From<Fact> for Observation {
    fn from(fact: Fact) -> Self {
        Self { fact, until: None }
    }
}

impl<'a> Situation<'a> {
    /// Gathers what counts.
    pub fn of(migration: &'a Arc<VirtualMachineInstanceMigration>, view: &View<'a>) -> Self {
        let vmi = view.world.vmis.get(&Name::new(migration.namespace(), migration.vmi_name()));
        let pod = view.world.pods_of_migration(migration.uid()).next();
        let (configuration, policy) = match vmi.map(|vmi| kubevirt::migration_configuration_of(view.world, vmi)) {
            Some(resolved) => (resolved.configuration, resolved.policy),
            None => (kubevirt::migration_configuration(view.world), None),
        };
        let mut situation = Self { migration, vmi, pod, configuration, policy, view: *view };
        // What was resolved at the hand-over holds to the end.
        if let Some(configuration) = situation.own_state().and_then(|state| state.migration_configuration.clone()) {
            situation.configuration = configuration;
        }
        // Its own word on the bandwidth counts at any time.
        if let Some(bandwidth) = migration.bandwidth() {
            situation.configuration.bandwidth_per_migration = Some(bandwidth);
        }
        situation
    }

    /// The migration that the VMI carries.
    pub fn state(&self) -> Option<&'a State> {
        self.vmi.and_then(|vmi| vmi.status.migration_state.as_ref())
    }

    /// The migration that the VMI carries, if it is this one.
    pub fn own_state(&self) -> Option<&'a State> {
        let uid = self.migration.uid();
        self.state().filter(|state| !uid.is_empty() && state.migration_uid.as_deref() == Some(uid))
    }

    /// Since when the migration has been in its phase.
    pub fn since(&self) -> Timestamp {
        let status = &self.migration.status;
        let entered = status.phase_transition_timestamps.iter().find(|entry| entry.phase == status.phase);
        let entered = entered.and_then(|entry| entry.phase_transition_timestamp.as_ref());
        entered.or(self.migration.metadata.creation_timestamp.as_ref()).map_or(self.view.now, |time| time.0)
    }

    /// `late` once `limit` after `from` has passed, else `otherwise` until then.
    fn within(&self, from: Timestamp, limit: SignedDuration, otherwise: Fact, late: Fact) -> Observation {
        // A limit beyond the end of time never passes.
        let Ok(end) = from.checked_add(limit) else { return otherwise.into() };
        if self.view.now >= end { late.into() } else { Observation { fact: otherwise, until: Some(end) } }
    }

    /// Which fact counts now.
    pub fn observe(&self) -> Observation {
        match self.migration.status.phase {
            Phase::Unset => self.unseen(),
            Phase::Pending => self.pending(),
            Phase::Scheduling => self.scheduling(),
            Phase::Scheduled => self.scheduled(),
            Phase::PreparingTarget | Phase::TargetReady => self.handed_over(),
            Phase::Running => self.running(),
            _ => Fact::Over.into(),
        }
    }

    /// What ends a migration as long as the guest has not been touched.
    fn before_hand_over(&self) -> Option<Fact> {
        match self.vmi {
            None => Some(Fact::VmiGone),
            Some(vmi) if vmi.is_deleting() => Some(Fact::VmiFinal),
            Some(vmi) if vmi.is_final() => Some(end_of(vmi)),
            _ if self.migration.is_deleting() => Some(Fact::Cancelled),
            _ => None,
        }
    }

    fn unseen(&self) -> Observation {
        if let Some(fact) = self.before_hand_over() {
            return fact.into();
        }
        match self.rival() {
            Some(_) => Fact::OtherMigration.into(),
            None if self.fits_nowhere() => Fact::NoFittingNode.into(),
            None => Fact::Eligible.into(),
        }
    }

    /// Whether no other node can give the guest what it has; a launcher that is only renewed stays where that is.
    fn fits_nowhere(&self) -> bool {
        let Some(vmi) = self.vmi else { return false };
        !launcher_pod::may_stay(vmi, self.migration) && processor::is_nowhere_else(vmi, self.view.world)
    }

    /// Another unfinished migration of the same VMI that goes first: one that is past its first phase, or an older one.
    fn rival(&self) -> Option<&'a Arc<VirtualMachineInstanceMigration>> {
        let age = |migration: &VirtualMachineInstanceMigration| {
            (migration.metadata.creation_timestamp.clone(), migration.uid().to_owned())
        };
        let name = Name::new(self.migration.namespace(), self.migration.vmi_name());
        self.view.world.migrations_of(&name).find(|other| {
            other.uid() != self.migration.uid()
                && !other.is_final()
                && (other.status.phase != Phase::Unset || age(other) < age(self.migration))
        })
    }

    fn pending(&self) -> Observation {
        if let Some(fact) = self.before_hand_over() {
            return fact.into();
        }
        if self.pod.is_some() {
            return Fact::TargetPodCreated.into();
        }
        let Some(vmi) = self.vmi else { return Fact::VmiGone.into() };
        let wait = if vmi.condition("LiveMigratable").is_some_and(|condition| condition.is_false()) {
            return Fact::NotMigratable.into();
        } else if let Some(hindrance) = turns::hindrance(vmi, self.view.world) {
            hindrance
        } else {
            match turns::turn(self.migration, &self.view) {
                Turn::Granted => return self.granted(vmi),
                Turn::Waits { .. } if self.quota().is_some() => Fact::QuotaExceeded,
                Turn::Waits { limit, .. } => match limit.map(|limit| limit.setting) {
                    Some(Setting::OutboundPerNode) => Fact::NodeLimit,
                    Some(Setting::PerCluster) => Fact::ClusterLimit,
                    Some(Setting::InboundPerNode) => Fact::InboundLimit,
                    None => Fact::AwaitsTurn,
                },
            }
        };
        let late = if wait == Fact::QuotaExceeded { Fact::QuotaExceededTooLong } else { Fact::WaitedTooLong };
        self.within(self.since(), deadlines::QUEUE, wait, late)
    }

    /// It is its turn; whether the API server takes the target pod is another matter.
    fn granted(&self, vmi: &VirtualMachineInstance) -> Observation {
        // Nodes come and go while it waits.
        if self.fits_nowhere() {
            return Fact::NoFittingNode.into();
        }
        let Some(refusal) = self.refusal(vmi) else { return Fact::MayStart.into() };
        let mut observation = match deadlines::pending(self.migration) {
            _ if refusal.is_quota() => {
                self.within(self.since(), deadlines::QUEUE, Fact::QuotaExceeded, Fact::QuotaExceededTooLong)
            }
            Some(limit) => self.within(refusal.first, limit, Fact::TargetPodRefused, Fact::TargetPodRefusedTooLong),
            None => Fact::TargetPodRefused.into(),
        };
        let again = refusal.last + deadlines::REFUSED;
        if observation.until.is_some() || observation.fact == Fact::TargetPodRefused {
            if self.view.now >= again {
                return Fact::MayStart.into();
            }
            observation.until = Some(observation.until.map_or(again, |end| end.min(again)));
        }
        observation
    }

    /// What the API server said when it would not make the target pod.
    fn refusal(&self, vmi: &VirtualMachineInstance) -> Option<&'a Refusal> {
        let pod = launcher_pod::name(vmi, Role::Receive(self.migration));
        self.view.world.refusal(&Name::new(self.migration.namespace(), pod))
    }

    /// Why the target pod cannot be made, in the server's words: it said so, or would say so.
    pub fn refused(&self) -> Option<String> {
        let refusal = self.vmi.and_then(|vmi| self.refusal(vmi));
        refusal.map(|refusal| refusal.message.clone()).or_else(|| self.quota())
    }

    /// Which quota the target pod would exceed, in Kubernetes' words.
    fn quota(&self) -> Option<String> {
        // Making the pod takes a while, and most namespaces have no quota.
        self.view.world.quotas.within(self.migration.namespace()).next()?;
        let pod = launcher_pod::build(self.vmi?, Role::Receive(self.migration), &self.view);
        quota::exceeded(&pod, self.view.world)
    }

    fn scheduling(&self) -> Observation {
        if let Some(fact) = self.before_hand_over() {
            return fact.into();
        }
        let Some(pod) = self.pod.filter(|pod| !pod.deleting()) else { return Fact::TargetPodGone.into() };
        if placement::is_finished(pod) {
            return Fact::TargetPodDown.into();
        }
        if self.is_target_leaving() {
            return Fact::TargetInMaintenance.into();
        }
        let ready = is_ready(pod);
        if ready && self.disks_missing().is_none() {
            return Fact::TargetPodReady.into();
        }
        let created = self.target_pod_since(pod);
        let unplaced = is_unschedulable(pod);
        let fact = match explain::trouble(pod, self.view.world) {
            _ if ready => Fact::DisksNotReady,
            _ if unplaced => Fact::TargetPodUnschedulable,
            Some(explain::Trouble::Image(_)) => Fact::TargetPodImage,
            Some(explain::Trouble::Claim(_)) => Fact::TargetPodVolumes,
            Some(explain::Trouble::Other(_)) | None => Fact::TargetPodStarting,
        };
        let limits = [
            deadlines::unschedulable(self.migration)
                .filter(|_| unplaced)
                .map(|limit| (limit, Fact::TargetPodUnschedulableTooLong)),
            deadlines::pending(self.migration).map(|limit| (limit, Fact::TargetPodPendingTooLong)),
        ];
        match limits.into_iter().flatten().min_by_key(|(limit, _)| *limit) {
            Some((limit, late)) => self.within(created, limit, fact, late),
            None => fact.into(),
        }
    }

    /// Whether the target pod has a node that is to be emptied: the guest would have to leave it at once.
    fn is_target_leaving(&self) -> bool {
        let node = self.pod.and_then(|pod| pod.spec.as_ref()).and_then(|spec| spec.node_name.as_deref());
        node.is_some_and(|node| maintenance::of(node, self.view.world).is_some())
    }

    /// Since when there has been a target pod.
    pub fn target_pod_since(&self, pod: &Pod) -> Timestamp {
        pod.metadata.creation_timestamp.as_ref().map_or_else(|| self.since(), |time| time.0)
    }

    fn scheduled(&self) -> Observation {
        // Once the VMI carries it, it is handed over, whatever else is true.
        if self.own_state().is_some_and(|state| state.target_node.is_some()) {
            return Fact::HandedOver.into();
        }
        if let Some(fact) = self.before_hand_over() {
            return fact.into();
        }
        let Some(pod) = self.pod.filter(|pod| !pod.deleting()) else { return Fact::TargetPodGone.into() };
        if placement::is_finished(pod) {
            return Fact::TargetPodDown.into();
        }
        if self.vmi.is_some_and(|vmi| turns::is_on_its_way(vmi)) {
            return Fact::OtherMigration.into();
        }
        if self.is_target_leaving() {
            return Fact::TargetInMaintenance.into();
        }
        let fact = if self.disks_missing().is_none() { Fact::ReadyToHandOver } else { Fact::DisksNotReady };
        self.within(self.since(), deadlines::HAND_OVER, fact, Fact::HandOverTooLong)
    }

    /// What is missing of the disks that the guest was given while it ran, for a target that is ready otherwise.
    pub fn disks_missing(&self) -> Option<String> {
        hotplug::for_target(self.vmi?, self.pod?, self.view.world).err()
    }

    /// What can have happened to a handed-over migration in any phase.
    fn ended(&self) -> Result<&'a State, Fact> {
        let Some(vmi) = self.vmi else { return Err(Fact::VmiGone) };
        let Some(state) = self.own_state() else {
            let other = self.state().and_then(|state| state.migration_uid.as_deref()).unwrap_or("");
            return Err(if other.is_empty() { Fact::StateCleared } else { Fact::StateTakenOver });
        };
        if state.failed == Some(true) {
            // A handler gives a migration up when its VMI is being deleted. One that has failed is deleted to be started again.
            let blamed = !matches!(state.failure_cause, None | Some(FailureCause::GuestEnded));
            let lost = vmi.status.phase == VmiPhase::Failed && blamed;
            return Err(if vmi.is_deleting() && !lost { Fact::VmiFinal } else { Fact::SourceFailed });
        }
        // The end of the guest after a completed migration is the guest's own affair.
        if vmi.is_final() && state.completed != Some(true) {
            let moved = self.migration.status.phase == Phase::Running && vmi.has_arrived();
            return Err(match end_of(vmi) {
                Fact::GuestLost if moved => Fact::GuestLostAtTarget,
                end => end,
            });
        }
        Ok(state)
    }

    fn handed_over(&self) -> Observation {
        let state = match self.ended() {
            Ok(state) => state,
            Err(fact) => return fact.into(),
        };
        let preparing = self.migration.status.phase == Phase::PreparingTarget;
        if preparing && state.target_node_address.as_deref().is_some_and(|address| !address.is_empty()) {
            return Fact::TargetListening.into();
        }
        // Where the guest is known to have arrived, its source could not say that it started.
        let arrived = state.target_node_domain_ready_timestamp.is_some();
        if arrived || state.start_timestamp.is_some() || state.completed == Some(true) {
            return if preparing { Fact::TargetListening } else { Fact::Started }.into();
        }
        // One that is only being deleted may run the guest: its source may be cut off, and have handed it over.
        if self.pod.is_none_or(|pod| placement::is_finished(pod)) {
            return Fact::TargetPodDown.into();
        }
        // That the condition is missing says that it could not be written with the request: it is written now.
        let deleted = self.migration.metadata.deletion_timestamp.as_ref();
        let asked = deleted.map_or(self.view.now, |time| time.0.max(self.since()));
        if let Some(observation) = self.abort(state, asked, Fact::AbortBeforeStartUnanswered) {
            return observation;
        }
        if self.is_target_leaving() {
            return Fact::TargetInMaintenance.into();
        }
        let (waiting, late) =
            if preparing { (Fact::Preparing, Fact::PreparingTooLong) } else { (Fact::Starting, Fact::StartTooLong) };
        self.unless_cut_off(state, self.since(), deadlines::PREPARE, waiting, late)
    }

    /// As [`Self::within`], for what only the source knows: the time counts while its node is in reach, and anew when it is back.
    fn unless_cut_off(
        &self,
        state: &State,
        from: Timestamp,
        limit: SignedDuration,
        otherwise: Fact,
        late: Fact,
    ) -> Observation {
        let source = state.source_node.as_deref().and_then(|node| self.view.world.nodes.get(&Name::cluster(node)));
        match source {
            Some(source) if node::is_silent(source) => {
                Observation { fact: otherwise, until: Some(self.view.now + node::LOOK_AGAIN) }
            }
            _ => {
                let reachable = source.and_then(|source| node::reachable_since(source)).unwrap_or(Timestamp::MIN);
                self.within(from.max(reachable), limit, otherwise, late)
            }
        }
    }

    /// What an abort that was asked for, or is to be, makes of the migration. `latest` is when it was asked for if the
    /// migration does not say so.
    fn abort(&self, state: &State, latest: Timestamp, unanswered: Fact) -> Option<Observation> {
        if state.abort_requested == Some(true) {
            let asked = self.migration.condition(names::conditions::MIGRATION_ABORT_REQUESTED);
            let asked = asked.and_then(|condition| condition.last_transition_time.as_ref());
            let asked = asked.map_or(latest, |time| time.0);
            return Some(match unanswered {
                Fact::AbortBeforeStartUnanswered => {
                    self.unless_cut_off(state, asked, deadlines::ABORT, Fact::Aborting, unanswered)
                }
                _ => self.within(asked, deadlines::ABORT, Fact::Aborting, unanswered),
            });
        }
        self.migration.is_deleting().then(|| Fact::Cancelled.into())
    }

    fn running(&self) -> Observation {
        let state = match self.ended() {
            Ok(state) => state,
            Err(fact) => return fact.into(),
        };
        if state.completed == Some(true) {
            let cancelled = self.migration.is_deleting() || state.abort_requested == Some(true);
            let completed = if cancelled { Fact::CompletedDespiteCancel } else { Fact::Completed };
            let arrived = self.vmi.is_some_and(|vmi| vmi.has_arrived() || vmi.is_final());
            if arrived {
                return completed.into();
            }
            let end = state.end_timestamp.as_ref().map_or_else(|| self.since(), |time| time.0);
            return self.within(end, deadlines::ARRIVAL, Fact::Arriving, completed);
        }
        let vmi = self.vmi.map(AsRef::as_ref);
        let end = deadlines::running(&self.configuration, vmi, state, self.since());
        // Too late to abort: the guest is on its way, and how that ends will be told.
        let too_late = state.abort_status == Some(AbortStatus::Failed);
        if !too_late && let Some(observation) = self.abort(state, end.unwrap_or(self.view.now), Fact::AbortUnanswered) {
            return observation;
        }
        let fact = match too_late {
            _ if vmi.is_some_and(is_link_broken) => Fact::PostCopyLinkBroken,
            true => Fact::AbortTooLate,
            false => Fact::InFlight,
        };
        match end {
            Some(end) if self.view.now < end => Observation { fact, until: Some(end) },
            Some(_) if too_late => Fact::AbortUnanswered.into(),
            Some(_) => Fact::RunningTooLong.into(),
            // A limit beyond the end of time never passes.
            None => fact.into(),
        }
    }
}

/// Whether one of its handlers says that post-copy has no link: the source's tells it with the progress.
pub fn is_link_broken(vmi: &VirtualMachineInstance) -> bool {
    let told = vmi.condition(names::conditions::SYNCHRONIZED);
    let progress = vmi.status.migration_state.as_ref().and_then(|state| state.progress.as_ref());
    told.is_some_and(|told| told.reason.as_deref() == Some(names::conditions::POST_COPY_LINK_BROKEN))
        || progress.is_some_and(|told| told.link_broken_timestamp.is_some())
}

/// How a VMI has ended, for its migration.
fn end_of(vmi: &VirtualMachineInstance) -> Fact {
    if vmi.status.phase == VmiPhase::Failed { Fact::GuestLost } else { Fact::VmiFinal }
}

/// Whether a handed-over migration has not reported its end.
pub fn is_unresolved(state: &State) -> bool {
    state.migration_uid.as_deref().is_some_and(|uid| !uid.is_empty()) && state.completed != Some(true)
}

/// Whether the launcher in the pod can take orders.
pub fn is_ready(pod: &Pod) -> bool {
    let Some(status) = &pod.status else { return false };
    let bound = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).is_some_and(|node| !node.is_empty());
    let conditions = status.conditions.iter().flatten();
    let ready = conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let containers = status.container_statuses.as_deref().unwrap_or_default();
    let compute = containers.iter().any(|container| container.name == names::COMPUTE_CONTAINER && container.ready);
    bound && status.phase.as_deref() == Some("Running") && (ready || compute)
}

/// Whether the scheduler says that no node takes the pod.
pub fn is_unschedulable(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| {
        condition.type_ == "PodScheduled"
            && condition.status == "False"
            && condition.reason.as_deref() == Some(placement::UNSCHEDULABLE)
    })
}
