//! What would happen if nodes were emptied now: the rules of evictions, of the line of migrations and of placement, followed
//! through to the end on a copy of the world. Nothing is written.
//!
//! [`verdict`] says of each VM what becomes of it, [`pods`] of everything else, [`expect`] how long each takes, and
//! [`schedule`] in which order, where to, and how long the whole.

mod expect;
mod link;
mod pods;
mod quotas;
mod schedule;
mod stage;
#[cfg(test)]
mod tests;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};

use godwit_api::drain::{DrainBound, DrainDuration, DrainOutcome, DrainPlan, DrainVm, PodOutcome};
use godwit_api::{config, names};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::object::{Name, Stored};
use crate::plan::View;
use crate::world::World;
use crate::{hotplug, kubevirt, placement};
pub use expect::rate;
use expect::{CORNERS, LIKELY};
use quotas::Quotas;
use schedule::{Again, Course, Job, Limit, Work};
use stage::Stage;

/// How a drain goes about pods that are no VM's, as the flags of `kubectl drain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// Leave pods of DaemonSets alone; otherwise they block.
    pub ignore_daemon_sets: bool,
    /// Evict pods whose emptyDir is lost with them; otherwise they block.
    pub delete_empty_dir_data: bool,
    /// Evict pods that nobody makes again; otherwise they block.
    pub force: bool,
}

impl Default for Manner {
    /// As a NodeMaintenance does it: everything goes but what belongs to the node.
    fn default() -> Self {
        Self { ignore_daemon_sets: true, delete_empty_dir_data: true, force: true }
    }
}

/// What is known beside the world.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms<'a> {
    /// How the drain goes about other pods.
    pub manner: Manner,
    /// All PodDisruptionBudgets; `None` where they are not known, which the plan says.
    pub budgets: Option<&'a [PodDisruptionBudget]>,
}

/// What would become of everything on these nodes if they were emptied now, all at the same time.
///
/// It costs about as much as placing each of the VMs: not to be asked for with every piece of news.
pub fn plan(view: &View<'_>, nodes: &[&str], terms: &Terms<'_>) -> DrainPlan {
    let empty: BTreeSet<&str> = nodes.iter().copied().collect();
    let mut plan = DrainPlan {
        nodes: empty.iter().map(|node| (*node).to_owned()).collect(),
        made_at: Some(Time(view.now)),
        ..DrainPlan::default()
    };
    let mut budgets = pods::Budgets::new(terms.budgets);
    let mut vms = Vec::new();
    for node in &empty {
        let mut seen = BTreeSet::new();
        let mut others = Vec::new();
        for pod in view.world.pods_on(node).filter(|pod| !placement::is_finished(pod)) {
            if hotplug::launcher_of(pod).is_some() {
                // It goes with its launcher.
                continue;
            }
            let launcher = pod.label(names::LABEL_APP) == Some(names::APP_VIRT_LAUNCHER);
            let of = pod.label(crate::names::LABEL_CREATED_BY).filter(|_| launcher);
            match of.and_then(|uid| view.world.vmi_by_uid(uid)) {
                Some(vmi) if vmi.is_final() => {}
                Some(vmi) => {
                    if seen.insert(vmi.key()) {
                        vms.extend(verdict::of(vmi, pod, node, view, &mut budgets));
                    }
                }
                None => others.push(pod),
            }
        }
        plan.pods.extend(others.into_iter().map(|pod| pods::verdict(pod, node, terms.manner, &mut budgets)));
    }
    if terms.budgets.is_none() {
        plan.notes.push("PodDisruptionBudgets were not looked at".to_owned());
    }
    follow(view, &empty, vms, &mut plan);
    let stays = plan.vms.iter().any(|vm| vm.is(&DrainOutcome::Block));
    plan.blocked = Some(stays || plan.pods.iter().any(|pod| pod.is(&PodOutcome::Block)));
    plan
}

/// How many VMs should be on their way or in line at the same time, so that the limits are used up and the line is short: one
/// more than may leave, for each node.
pub fn window(world: &World, nodes: usize) -> usize {
    let limits = schedule::Limits::of(world.configuration());
    let outbound = usize::try_from(limits.outbound).unwrap_or(usize::MAX).saturating_add(1);
    outbound.saturating_mul(nodes).min(usize::try_from(limits.cluster).unwrap_or(usize::MAX).saturating_add(1))
}

/// Lets time pass until everything that can leave has left.
fn follow(view: &View<'_>, empty: &BTreeSet<&str>, vms: Vec<verdict::Verdict>, plan: &mut DrainPlan) {
    let known = expect::Known::of(view.world);
    let mut jobs = Vec::new();
    let mut told: Vec<DrainVm> = Vec::new();
    // Which VM of the plan a job is of.
    let mut owner: BTreeMap<usize, usize> = BTreeMap::new();
    // Those whose migration is there already; it is not looked at once more.
    let mut ours: BTreeSet<Name> = BTreeSet::new();
    for mut verdict in vms {
        if let Some(job) = verdict.job(&known, view) {
            if verdict.has_migration() {
                ours.insert(job.vmi.clone());
            }
            owner.insert(jobs.len(), told.len());
            jobs.push(job);
        }
        told.push(verdict.vm);
    }
    jobs.extend(schedule::others(view, &ours, &known));

    let limits = schedule::Limits::of(view.world.configuration());
    let quotas = Quotas::of(view);
    let mut stage = Stage::new(view, empty, quotas.clone());
    let likely = schedule::run(&jobs, LIKELY, &limits, &mut stage);
    let pods = stage.traffic();
    // Where each goes to is known now, and with it what the link carries.
    let mut better = false;
    for (index, went) in &likely.moves {
        if let Some(job) = jobs.get_mut(*index) {
            better |= know_target(job, went.target.as_deref(), view, &known);
        }
    }
    let likely = match better {
        true => schedule::run(&jobs, LIKELY, &limits, &mut Again::of(&likely, &quotas, pods)),
        false => likely,
    };
    let corners: [Course; 3] = CORNERS.map(|corner| match corner {
        LIKELY => likely.clone(),
        _ => schedule::run(&jobs, corner, &limits, &mut Again::of(&likely, &quotas, pods)),
    });
    let [worst, _, best] = &corners;

    let mut order: Vec<(Option<u64>, usize)> = (0..told.len()).map(|index| (None, index)).collect();
    for (job, index) in &owner {
        let (Some(vm), Some(work)) = (told.get_mut(*index), jobs.get(*job)) else { continue };
        work.takes.tell(vm);
        match likely.moves.get(job) {
            Some(went) => {
                if let Some(entry) = order.get_mut(*index) {
                    entry.0 = Some(went.begin);
                }
                vm.target_node = went.target.clone();
                let begin = |course: &Course| course.moves.get(job).map(|went| went.begin);
                vm.start = Some(DrainDuration {
                    milliseconds: Some(went.begin),
                    min_milliseconds: begin(best),
                    max_milliseconds: begin(worst).and_then(expect::finite),
                });
                vm.duration = Some(work.takes.told());
                if vm.is(&DrainOutcome::ShutDown) && vm.restarts == Some(true) && vm.target_node.is_none() {
                    let why = stage.nowhere(*job).unwrap_or_default();
                    vm.reasons.push(format!("it would not be started again, for no node takes it: {why}"));
                }
            }
            None => {
                vm.outcome = Some(DrainOutcome::Block);
                vm.reasons.push(
                    stage
                        .nowhere(*job)
                        .unwrap_or_else(|| "No node takes it as long as the limits are as they are.".to_owned()),
                );
            }
        }
    }
    let mine = |course: &Course| {
        course.moves.iter().filter(|(job, _)| owner.contains_key(job)).map(|(_, went)| went.end).max()
    };
    if let Some(end) = mine(&likely) {
        plan.duration = Some(DrainDuration {
            milliseconds: Some(end),
            min_milliseconds: mine(best),
            max_milliseconds: mine(worst).and_then(expect::finite),
        });
    }
    plan.bounds = bounds(view, &likely, &limits, &jobs, &owner);
    // Those that do not leave come last.
    order.sort_by_key(|(begin, index)| (begin.is_none(), *begin, *index));
    let mut told: Vec<Option<DrainVm>> = told.into_iter().map(Some).collect();
    plan.vms = order.into_iter().filter_map(|(_, index)| told.get_mut(index)?.take()).collect();
}

/// Takes into account where a migration goes to; whether that tells something of how long it takes.
fn know_target(job: &mut Job, target: Option<&str>, view: &View<'_>, known: &expect::Known) -> bool {
    let Some(target) = target.filter(|target| known.links.knows(&job.node, target)) else { return false };
    if job.work != Work::Move || job.under_way.is_some() {
        return false;
    }
    let Some(vmi) = view.world.vmis.get(&job.vmi) else { return false };
    let configuration = kubevirt::migration_configuration_of(view.world, vmi).configuration;
    job.takes = expect::migration(vmi, &configuration, known, Some(target));
    true
}

fn bounds(
    view: &View<'_>,
    likely: &Course,
    limits: &schedule::Limits,
    jobs: &[Job],
    owner: &BTreeMap<usize, usize>,
) -> Vec<DrainBound> {
    let held = likely.held.iter().map(|((limit, of), held)| {
        let bound = match limit {
            Limit::Setting(setting) => DrainBound {
                limit: setting.name().to_owned(),
                value: Some(u64::from(limits.value(*setting))),
                node: of.clone(),
                ..DrainBound::default()
            },
            Limit::Quota => {
                DrainBound { limit: "ResourceQuota".to_owned(), quota: of.clone(), ..DrainBound::default() }
            }
        };
        let milliseconds = Some(held.milliseconds);
        DrainBound { vms: u32::try_from(held.jobs.len()).ok(), milliseconds, ..bound }
    });
    let mut bounds: Vec<DrainBound> = held.filter(|bound| bound.milliseconds > Some(0)).collect();
    // The link out of each node: all bytes over what may go at once.
    if let Some(bandwidth) = config::bandwidth_bytes(view.world.configuration()) {
        let mut bytes: BTreeMap<&str, (u64, u32)> = BTreeMap::new();
        for (_, job) in
            jobs.iter().enumerate().filter(|(index, job)| owner.contains_key(index) && job.work == Work::Move)
        {
            let sum = bytes.entry(job.node.as_str()).or_default();
            *sum = (sum.0.saturating_add(job.takes.bytes), sum.1 + 1);
        }
        for (node, (bytes, vms)) in bytes {
            let at_once = u64::from(limits.outbound.min(limits.cluster).min(vms).max(1));
            let milliseconds = bytes.saturating_mul(1000) / bandwidth.saturating_mul(at_once).max(1);
            bounds.push(DrainBound {
                limit: "bandwidthPerMigration".to_owned(),
                value: Some(bandwidth),
                node: Some(node.to_owned()),
                vms: Some(vms),
                milliseconds: Some(milliseconds),
                ..DrainBound::default()
            });
        }
    }
    bounds.sort_by_key(|bound| std::cmp::Reverse(bound.milliseconds));
    bounds
}
