//! What becomes of a VM when its node is emptied, and why: the rules of evictions, with everything that blocks named.

use std::collections::BTreeSet;
use std::sync::Arc;

use godwit_api::drain::{DrainOutcome, DrainVm};
use godwit_api::migratability::{self, ClaimAccess};
use godwit_api::migration::MigrationPriority;
use godwit_api::names::conditions::{self, EVACUATION_STOPPED};
use godwit_api::vmi::EvictionStrategy;
use godwit_api::{
    Condition, MigrationPhase, RunStrategy, VirtualMachineInstance, VirtualMachineInstanceMigration, VmiPhase,
};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::expect::{self, Known};
use super::pods::{Budgets, Say};
use super::schedule::{Job, Work};
use super::stage;
use crate::object::{Name, Stored};
use crate::plan::View;
use crate::turns::Ticket;
use crate::world::World;
use crate::{evacuation, kubevirt, names, vm};

/// What becomes of a VM.
pub struct Verdict {
    /// As the plan tells it.
    pub vm: DrainVm,
    vmi: Arc<VirtualMachineInstance>,
    pod: Name,
    /// The migration that is under way, and the nodes that it may be going to.
    under_way: Option<BTreeSet<String>>,
    /// The migration that waits already.
    waits: Option<Arc<VirtualMachineInstanceMigration>>,
    /// It does not begin before, in milliseconds from now.
    ready: u64,
    /// It comes to this node just now, and can leave when it is there.
    arrives: bool,
}

/// Says what becomes of a VM that has a launcher pod on a node.
pub fn of(
    vmi: &Arc<VirtualMachineInstance>,
    pod: &Arc<Pod>,
    node: &str,
    view: &View<'_>,
    budgets: &mut Budgets<'_>,
) -> Option<Verdict> {
    let world = view.world;
    let key = vmi.key();
    let (strategy, own) = evacuation::strategy_and_source(vmi, world);
    let owner = world.vms.get(&key).filter(|vm| vm::is_owned_by(vmi, vm));
    let holder = world.turns().holders().values().find(|holder| holder.vmi == key);
    let here = vmi.status.node_name.as_deref() == Some(node);
    let leaves = holder.filter(|holder| holder.sources.contains(node) && !holder.targets.contains(node));
    let arrives = !here && pod.label(names::LABEL_MIGRATION_JOB_UID).is_some();
    if arrives && holder.is_none() {
        // What a migration that is over has left behind; it is tidied away.
        return None;
    }
    let mut verdict = Verdict {
        vm: DrainVm {
            namespace: vmi.namespace().to_owned(),
            name: Stored::name(vmi.as_ref()).to_owned(),
            node: node.to_owned(),
            eviction_strategy: Some(strategy.as_str().to_owned()),
            run_strategy: owner.map(|vm| vm.spec.effective_run_strategy().as_str().to_owned()),
            ..DrainVm::default()
        },
        vmi: vmi.clone(),
        pod: pod.key(),
        under_way: None,
        waits: None,
        ready: 0,
        arrives,
    };
    let strategy_said = match own {
        true => format!("evictionStrategy {}", strategy.as_str()),
        false if strategy == EvictionStrategy::None => "no evictionStrategy".to_owned(),
        false => format!("evictionStrategy {} (the cluster's)", strategy.as_str()),
    };
    let vm = &mut verdict.vm;
    if vmi.is_deleting() {
        return Some(verdict.shuts_down("it is being deleted".to_owned(), false));
    }
    if let Some(holder) = leaves.filter(|_| here) {
        let name = holder.migration.as_ref().map(|name| name.name.to_string());
        vm.reasons.push(format!("migration {} is under way", name.as_deref().unwrap_or("without a name")));
        vm.migration_name = name;
        vm.outcome = Some(DrainOutcome::Migrate);
        verdict.under_way = Some(holder.targets.clone());
        return Some(verdict);
    }
    if arrives {
        vm.reasons.push("it is just coming here, and is moved on when it has come".to_owned());
    }
    let migratable = vmi.condition(conditions::LIVE_MIGRATABLE);
    let can = migratable.is_some_and(Condition::is_true);
    match strategy {
        EvictionStrategy::LiveMigrate | EvictionStrategy::LiveMigrateIfPossible if can => {
            vm.reasons.push(strategy_said);
            verdict.moves(view);
        }
        EvictionStrategy::LiveMigrate => {
            vm.outcome = Some(DrainOutcome::Block);
            vm.reasons.push(format!("{strategy_said}, and it cannot be migrated"));
            vm.reasons.extend(blockers(vmi, world));
        }
        EvictionStrategy::External => {
            vm.outcome = Some(DrainOutcome::External);
            vm.reasons.push(format!("{strategy_said}: somebody else moves it"));
        }
        EvictionStrategy::LiveMigrateIfPossible => {
            vm.reasons.push(format!("{strategy_said}, and it cannot be migrated"));
            vm.reasons.extend(blockers(vmi, world));
            verdict.evicted(owner.map(|vm| vm.spec.effective_run_strategy()), pod, budgets);
        }
        _ => {
            vm.reasons.push(strategy_said);
            verdict.evicted(owner.map(|vm| vm.spec.effective_run_strategy()), pod, budgets);
        }
    }
    Some(verdict)
}

impl Verdict {
    /// Its eviction starts a migration, unless that has come to its end already.
    fn moves(&mut self, view: &View<'_>) {
        let vm = &mut self.vm;
        vm.outcome = Some(DrainOutcome::Migrate);
        if let Some(stopped) = self.vmi.condition(EVACUATION_STOPPED).filter(|stopped| stopped.is_true()) {
            vm.outcome = Some(DrainOutcome::Block);
            vm.reasons.extend(stopped.message.clone());
            return;
        }
        if self.vmi.status.phase != VmiPhase::Running {
            vm.outcome = Some(DrainOutcome::Block);
            vm.reasons.push(format!("its guest does not run yet (phase {})", self.vmi.status.phase));
            return;
        }
        let key = self.vmi.key();
        let mut open = view.world.migrations_of(&key).filter(|one| !one.is_final() && !one.is_deleting());
        if let Some(waits) =
            open.find(|one| matches!(one.status.phase, MigrationPhase::Unset | MigrationPhase::Pending))
        {
            vm.migration_name = Some(Stored::name(waits.as_ref()).to_owned());
            vm.reasons.push(format!("migration {} waits already", Stored::name(waits.as_ref())));
            self.waits = Some(waits.clone());
        }
        let failed = self.vmi.status.evacuation.as_ref();
        if let Some(next) = failed.and_then(|state| state.next_attempt_timestamp.as_ref()) {
            let wait = u64::try_from(next.0.duration_since(view.now).as_millis()).unwrap_or(0);
            if wait > 0 {
                let count = failed.and_then(|state| state.failed_attempts).unwrap_or(0);
                vm.reasons.push(format!("{count} attempts have failed; the next one comes at {}", next.0));
                self.ready = wait;
            }
        }
    }

    /// Its eviction is granted, which ends the guest.
    fn evicted(&mut self, strategy: Option<RunStrategy>, pod: &Pod, budgets: &mut Budgets<'_>) {
        match budgets.ask(pod) {
            Say::Goes => {}
            Say::Later(why) => self.vm.reasons.push(why),
            Say::Never(why) => {
                self.vm.outcome = Some(DrainOutcome::Block);
                self.vm.reasons.push(why);
                return;
            }
        }
        let restarts = strategy == Some(RunStrategy::Always);
        self.vm.outcome = Some(DrainOutcome::ShutDown);
        self.vm.restarts = Some(restarts);
        self.vm.reasons.push(match strategy {
            Some(RunStrategy::Always) => "runStrategy Always starts it again".to_owned(),
            Some(strategy) => format!("runStrategy {strategy} does not start it again after a clean shutdown"),
            None => "it belongs to no VirtualMachine, so nobody starts it again".to_owned(),
        });
    }

    fn shuts_down(mut self, why: String, restarts: bool) -> Self {
        self.vm.outcome = Some(DrainOutcome::ShutDown);
        self.vm.restarts = Some(restarts);
        self.vm.reasons.push(why);
        self
    }

    /// What is to be done for it, and how long that takes. Fills in what the plan tells of it.
    pub fn job(&mut self, known: &Known, view: &View<'_>) -> Option<Job> {
        let resolved = kubevirt::migration_configuration_of(view.world, &self.vmi);
        let whole = || expect::migration(&self.vmi, &resolved.configuration, known, None);
        let (work, takes) = match self.vm.outcome.as_ref()? {
            DrainOutcome::Migrate if self.under_way.is_some() => {
                (Work::Move, expect::rest(&self.vmi, &resolved.configuration, known, view.now))
            }
            DrainOutcome::Migrate => (Work::Move, whole()),
            DrainOutcome::ShutDown => {
                (Work::ShutDown { restarts: self.vm.restarts == Some(true) }, expect::shutdown(&self.vmi))
            }
            _ => return None,
        };
        let ready = match self.arrives {
            true => expect::rest(&self.vmi, &resolved.configuration, known, view.now).at(expect::LIKELY),
            false => 0,
        };
        if work == Work::Move {
            self.vm.migration_policy_name.clone_from(&resolved.policy);
        }
        Some(Job {
            vmi: self.vmi.key(),
            node: self.vm.node.clone(),
            pod: Some(self.pod.clone()),
            ticket: self.ticket(view),
            work,
            takes,
            ready: self.ready.max(ready),
            under_way: self.under_way.clone(),
        })
    }

    /// Whether the migration that it leaves with is there already.
    pub fn has_migration(&self) -> bool {
        self.under_way.is_some() || self.waits.is_some()
    }

    /// Its place in the line: that of the migration that waits, or of the one that would be made now.
    fn ticket(&self, view: &View<'_>) -> Ticket {
        if let Some(waits) = &self.waits {
            return Ticket::of(waits);
        }
        let mut migration = stage::migration(&self.vmi.key(), "");
        let tidied = self.vmi.annotation(names::ANNOTATION_EVICTION_SOURCE) == Some(names::DESCHEDULER);
        let priority = if tidied { MigrationPriority::SystemMaintenance } else { MigrationPriority::SystemCritical };
        migration.spec.priority = Some(priority);
        migration.metadata.creation_timestamp = Some(Time(view.now));
        Ticket::of(&migration)
    }
}

/// Everything that keeps a VMI from being migrated: what its condition says, and what its parts do.
fn blockers(vmi: &VirtualMachineInstance, world: &World) -> Vec<String> {
    let claim = |name: &str| {
        let Some(claim) = world.claims.get(&Name::new(vmi.namespace(), name)) else { return ClaimAccess::Unknown };
        let spec = claim.spec.as_ref().and_then(|spec| spec.access_modes.clone());
        ClaimAccess::Modes(spec.unwrap_or_default())
    };
    let Some(told) = vmi.condition(conditions::LIVE_MIGRATABLE) else {
        return vec![format!("whether it can be is not known yet (phase {})", vmi.status.phase)];
    };
    let found = migratability::migratability(vmi, true, &claim);
    let reason = told.reason.as_deref().unwrap_or_default();
    let mut said: Vec<String> = Vec::new();
    if !found.iter().any(|blocker| blocker.reason == reason) {
        let message = told.message.as_deref().unwrap_or("LiveMigratable is False");
        said.push(if reason.is_empty() { message.to_owned() } else { format!("{reason}: {message}") });
    }
    said.extend(found.into_iter().map(|blocker| match blocker.what.as_str() {
        "" => format!("{}: {}", blocker.reason, blocker.message),
        what => format!("{what}: {} ({})", blocker.message, blocker.reason),
    }));
    said
}
