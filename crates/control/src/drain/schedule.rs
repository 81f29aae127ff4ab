//! The line of migrations in virtual time: who begins when, under the limits that hold for everybody.

use std::collections::{BTreeMap, BTreeSet};

use godwit_api::MigrationConfiguration;

use super::expect::{self, Corner, FOREVER, Known, Takes};
use super::quotas::{Quotas, Traffic};
use crate::kubevirt;
use crate::object::{Name, Stored};
use crate::plan::View;
use crate::turns::{self, Setting, Ticket};

/// So many that only wait for room at their targets are looked at in one go, as the controller does it.
const MOST_LOOKS: usize = 256;

/// What is done with a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// It is migrated.
    Move,
    /// It is shut down, and started again elsewhere or not.
    ShutDown {
        /// Whether it is started again.
        restarts: bool,
    },
}

/// One VM that leaves its node.
#[derive(Clone, Debug)]
pub struct Job {
    /// The VMI.
    pub vmi: Name,
    /// The node that it leaves.
    pub node: String,
    /// The pod that it leaves.
    pub pod: Option<Name>,
    /// Its place in the line.
    pub ticket: Ticket,
    /// What is done.
    pub work: Work,
    /// How long it takes once it has begun.
    pub takes: Takes,
    /// It does not begin before, in milliseconds from now.
    pub ready: u64,
    /// It has begun; these are the nodes that it may be going to.
    pub under_way: Option<BTreeSet<String>>,
}

/// The limits in force.
pub struct Limits {
    pub cluster: u32,
    pub outbound: u32,
    pub inbound: u32,
}

impl Limits {
    pub fn of(configuration: &MigrationConfiguration) -> Self {
        let (cluster, outbound, inbound) = turns::limits(configuration);
        Self { cluster, outbound, inbound }
    }

    pub fn value(&self, setting: Setting) -> u32 {
        match setting {
            Setting::PerCluster => self.cluster,
            Setting::OutboundPerNode => self.outbound,
            Setting::InboundPerNode => self.inbound,
        }
    }
}

/// What somebody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Limit {
    /// A limit of migrations; of a node, where one is named with it.
    Setting(Setting),
    /// The ResourceQuota that is named with it.
    Quota,
}

/// Where a VM can go.
pub enum Spot {
    /// Here; it counts there from now on.
    On(String),
    /// Only to nodes that receive enough, as this one.
    Full(String),
    /// Nowhere before this quota has room for its pod.
    NoQuota(String),
    /// Nowhere.
    Nowhere,
}

/// Who finds places.
pub trait Place {
    /// Time has passed.
    fn tick(&mut self) {}
    /// Finds one for a migration, when so many are `coming` to a node and `limit` may.
    fn find(&mut self, index: usize, job: &Job, coming: &dyn Fn(&str) -> u32, limit: u32) -> Spot;
    /// A VM has left its node; where it is started again, if it is.
    fn left(&mut self, index: usize, job: &Job) -> Option<String>;
}

/// When a VM left, and where to.
#[derive(Clone, Debug)]
pub struct Went {
    pub begin: u64,
    pub end: u64,
    pub target: Option<String>,
}

/// Who waited for a limit, and for how long somebody did.
#[derive(Clone, Debug, Default)]
pub struct Held {
    pub jobs: BTreeSet<usize>,
    pub milliseconds: u64,
}

/// How it went.
#[derive(Clone, Debug, Default)]
pub struct Course {
    /// By job; those that are not here stay.
    pub moves: BTreeMap<usize, Went>,
    /// What held them up.
    pub held: BTreeMap<(Limit, Option<String>), Held>,
}

/// The same places again.
pub struct Again<'a> {
    course: &'a Course,
    quotas: Quotas,
    pods: &'a Traffic,
}

impl<'a> Again<'a> {
    /// Those of a course, with the quotas as they are at the beginning, and the pods that these count.
    pub fn of(course: &'a Course, quotas: &Quotas, pods: &'a Traffic) -> Self {
        Self { course, quotas: quotas.clone(), pods }
    }
}

impl Place for Again<'_> {
    fn tick(&mut self) {
        self.quotas.tick();
    }

    fn find(&mut self, index: usize, job: &Job, coming: &dyn Fn(&str) -> u32, limit: u32) -> Spot {
        let Some(target) = self.course.moves.get(&index).and_then(|went| went.target.clone()) else {
            return Spot::Nowhere;
        };
        if coming(&target) >= limit {
            return Spot::Full(target);
        }
        let Some(pod) = self.pods.came.get(&index) else { return Spot::On(target) };
        if let Some(refusal) = self.quotas.ask(&job.vmi, pod) {
            return Spot::NoQuota(refusal.quota.to_string());
        }
        self.quotas.take(pod);
        Spot::On(target)
    }

    fn left(&mut self, index: usize, job: &Job) -> Option<String> {
        if let Some(pod) = self.pods.went.get(&index) {
            self.quotas.give_back(pod);
        }
        if let (Work::ShutDown { .. }, Some(pod)) = (job.work, self.pods.came.get(&index)) {
            self.quotas.take(pod);
        }
        self.course.moves.get(&index).and_then(|went| went.target.clone())
    }
}

/// The migrations that are no part of the drain but share its limits: under way, and in the line. Those of `ours` are known.
pub fn others(view: &View<'_>, ours: &BTreeSet<Name>, known: &Known) -> Vec<Job> {
    let world = view.world;
    let mut jobs = Vec::new();
    let takes = |vmi: &Name, under_way: bool| {
        let vmi = world.vmis.get(vmi)?;
        let configuration = kubevirt::migration_configuration_of(world, vmi).configuration;
        Some(match under_way {
            true => expect::rest(vmi, &configuration, known, view.now),
            false => expect::migration(vmi, &configuration, known, None),
        })
    };
    for holder in world.turns().holders().values().filter(|holder| !ours.contains(&holder.vmi)) {
        let migration = holder.migration.as_ref().and_then(|name| world.migrations.get(name));
        let Some(takes) = takes(&holder.vmi, true) else { continue };
        jobs.push(Job {
            vmi: holder.vmi.clone(),
            node: holder.sources.first().cloned().unwrap_or_default(),
            pod: None,
            ticket: migration.map(|migration| Ticket::of(migration)).unwrap_or_default(),
            work: Work::Move,
            takes,
            ready: 0,
            under_way: Some(holder.targets.clone()),
        });
    }
    for rank in 0..world.turns().waiting() {
        let Some(ticket) = world.turns().nth(rank) else { break };
        let Some(migration) = world.migrations.get(&ticket.name) else { continue };
        let name = Name::new(migration.namespace(), migration.vmi_name());
        let Some(vmi) = world.vmis.get(&name).filter(|_| !ours.contains(&name)) else { continue };
        let Some(takes) = takes(&name, false) else { continue };
        let node = vmi.status.node_name.clone().unwrap_or_default();
        let on = |pod: &k8s_openapi::api::core::v1::Pod| {
            pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) == Some(&node)
        };
        let pod = world.pods_of_vmi(vmi.uid()).find(|pod| on(pod)).map(|pod| pod.key());
        let ticket = ticket.clone();
        jobs.push(Job { vmi: name, node, pod, ticket, work: Work::Move, takes, ready: 0, under_way: None });
    }
    jobs
}

/// What is going on at a moment.
#[derive(Default)]
struct Now {
    leaving: BTreeMap<String, u32>,
    coming: BTreeMap<String, u32>,
    migrations: u32,
    /// By their ends.
    running: BTreeSet<(u64, usize)>,
    /// The nodes that those that were under way may be going to.
    bound_for: BTreeMap<usize, BTreeSet<String>>,
}

impl Now {
    fn begin(&mut self, index: usize, job: &Job, targets: BTreeSet<String>, end: u64) {
        self.running.insert((end, index));
        if job.work == Work::Move {
            self.migrations += 1;
            *self.leaving.entry(job.node.clone()).or_default() += 1;
            for target in &targets {
                *self.coming.entry(target.clone()).or_default() += 1;
            }
            self.bound_for.insert(index, targets);
        }
    }

    fn end(&mut self, index: usize, job: &Job) {
        if job.work == Work::Move {
            self.migrations -= 1;
            subtract(&mut self.leaving, &job.node);
            for target in self.bound_for.remove(&index).unwrap_or_default() {
                subtract(&mut self.coming, &target);
            }
        }
    }
}

fn subtract(counts: &mut BTreeMap<String, u32>, node: &str) {
    if let Some(count) = counts.get_mut(node) {
        *count = count.saturating_sub(1);
    }
}

/// Lets time pass until nothing happens any more.
pub fn run(jobs: &[Job], corner: Corner, limits: &Limits, places: &mut dyn Place) -> Course {
    let mut course = Course::default();
    let mut now = Now::default();
    let mut time = 0_u64;
    let mut waiting: Vec<usize> = Vec::new();
    for (index, job) in jobs.iter().enumerate() {
        let targets = match (job.work, &job.under_way) {
            (Work::Move, None) => {
                waiting.push(index);
                continue;
            }
            (_, targets) => targets.clone().unwrap_or_default(),
        };
        let begin = if job.under_way.is_some() { 0 } else { job.ready };
        let end = begin.saturating_add(job.takes.at(corner)).min(FOREVER);
        course.moves.insert(index, Went { begin, end, target: targets.first().cloned() });
        now.begin(index, job, targets, end);
    }
    let ticket = |index: &usize| jobs.get(*index).map(|job| (&job.ticket, *index));
    waiting.sort_by(|one, other| ticket(one).cmp(&ticket(other)));
    loop {
        let mut held: BTreeMap<(Limit, Option<String>), Vec<usize>> = BTreeMap::new();
        let mut next = None::<u64>;
        let mut looks = 0;
        places.tick();
        waiting.retain(|index| {
            let Some(job) = jobs.get(*index) else { return false };
            if job.ready > time {
                next = Some(next.map_or(job.ready, |next| next.min(job.ready)));
                return true;
            }
            let mut hold_up = |limit, of| held.entry((limit, of)).or_default().push(*index);
            let mut hold = |setting, node| hold_up(Limit::Setting(setting), node);
            // Where several limits hold, the nearer one is the more telling.
            if now.leaving.get(&job.node).is_some_and(|leaving| *leaving >= limits.outbound) {
                hold(Setting::OutboundPerNode, Some(job.node.clone()));
                return true;
            }
            if now.migrations >= limits.cluster {
                hold(Setting::PerCluster, None);
                return true;
            }
            if looks >= MOST_LOOKS {
                return true;
            }
            let coming = |node: &str| now.coming.get(node).copied().unwrap_or(0);
            match places.find(*index, job, &coming, limits.inbound) {
                Spot::On(target) => {
                    let end = time.saturating_add(job.takes.at(corner)).min(FOREVER);
                    course.moves.insert(*index, Went { begin: time, end, target: Some(target.clone()) });
                    now.begin(*index, job, BTreeSet::from([target]), end);
                    false
                }
                Spot::Full(node) => {
                    looks += 1;
                    hold(Setting::InboundPerNode, Some(node));
                    true
                }
                // No look: the first of a namespace answers for all, and those of others are not to wait behind them.
                Spot::NoQuota(quota) => {
                    hold_up(Limit::Quota, Some(quota));
                    true
                }
                Spot::Nowhere => false,
            }
        });
        let ends = now.running.first().map(|(end, _)| *end);
        let Some(then) = ends.into_iter().chain(next).min() else { break };
        for (limit, indexes) in held {
            let held = course.held.entry(limit).or_default();
            held.milliseconds = held.milliseconds.saturating_add(then.saturating_sub(time));
            held.jobs.extend(indexes);
        }
        time = time.max(then);
        while let Some((_, index)) = now.running.first().copied().filter(|(end, _)| *end <= time) {
            now.running.pop_first();
            let Some(job) = jobs.get(index) else { continue };
            now.end(index, job);
            let started = places.left(index, job);
            if let (Work::ShutDown { restarts: true }, Some(went)) = (job.work, course.moves.get_mut(&index)) {
                went.target = started;
            }
        }
    }
    course
}
