//! Virtual time and the order of events.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

use godwit_api::MigrationPhase;
use godwit_control::{Name, Ref};
use jiff::{SignedDuration, Timestamp};

use crate::check::{Rule, Violation};
use crate::control_loop::{Controllers, Life};
use crate::emptied::Emptying;
use crate::event::{Event, Fault};
use crate::launchers::Launchers;
use crate::limits::Count;
use crate::machine::{Guest, Node, Why};
use crate::maintained::Maintained;
use crate::mutation::Mutation;
use crate::random::Random;
use crate::store::Store;
use crate::trace::Trace;
use crate::{Faults, Options, Report};

/// A millisecond of virtual time; its unit is the microsecond.
pub const MS: u64 = 1_000;
/// A second of virtual time.
pub const SECOND: u64 = 1_000_000;
/// After the faults stop everything must come to rest within this time. The longest wait of the controllers is for an abort of
/// a migration that runs far beyond its time limit.
const SETTLE_LIMIT: u64 = 5 * 3600 * SECOND;
/// Between two looks whether everything is at rest.
const REST_EVERY: u64 = 20 * SECOND;
/// When virtual time begins, in seconds since the epoch.
const BEGIN: i64 = 1_700_000_000;

/// Counts for the report.
#[derive(Default)]
pub struct Stats {
    /// See [`Report`].
    pub decisions: u64,
    /// See [`Report`].
    pub deciding: Duration,
    /// See [`Report`].
    pub longest_decision: Duration,
    /// See [`Report`].
    pub writes: u64,
    /// See [`Report`].
    pub conflicts: u64,
    /// See [`Report`].
    pub most_at_once: u32,
    /// See [`Report`].
    pub most_from_one_node: u32,
    /// See [`Report`].
    pub most_to_one_node: u32,
    /// See [`Report`].
    pub guests_killed: u64,
    /// See [`Report`].
    pub post_copies: u64,
    /// See [`Report`].
    pub fenced: u64,
    /// See [`Report`].
    pub rescued: u64,
}

impl Stats {
    /// A decision was taken, which took so long.
    pub fn decided(&mut self, took: Duration) {
        self.decisions += 1;
        self.deciding += took;
        self.longest_decision = self.longest_decision.max(took);
    }
}

/// When an event happens; of two at the same time the one that was asked for first comes first. The event itself lies in
/// `Sim::held`, so that what is sorted is small.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    at: u64,
    sequence: u64,
    place: usize,
}

/// One simulation.
pub struct Sim {
    /// Microseconds since the beginning.
    pub now: u64,
    sequence: u64,
    due: BinaryHeap<Reverse<Due>>,
    /// The events that are due, and places that are free.
    held: Vec<Option<Event>>,
    free: Vec<usize>,
    /// All that is left to chance.
    pub random: Random,
    /// The API server.
    pub store: Store,
    /// The API server answers nobody.
    pub store_down: bool,
    /// The controller processes.
    pub controllers: Vec<Controllers>,
    /// The nodes.
    pub nodes: Vec<Node>,
    /// Every launcher that ever started.
    pub launchers: Launchers,
    /// By node: what its agent watches.
    pub watched: BTreeMap<usize, BTreeSet<Ref>>,
    /// What the limits are about.
    pub counted: Count,
    /// Links that are cut, lower node first.
    pub cut_links: BTreeSet<(usize, usize)>,
    /// The guests, by VMI.
    pub guests: BTreeMap<Name, Guest>,
    /// What is simulated.
    pub options: Options,
    /// What happened.
    pub trace: Trace,
    /// Counts.
    pub stats: Stats,
    /// UIDs of VMIs and pods whose end a user has asked for.
    pub asked: BTreeSet<String>,
    /// The last phase of each migration, by UID.
    pub phases: BTreeMap<String, MigrationPhase>,
    /// How often something happened after which a lost node's VMs may need longer: a node died, or clocks jumped.
    pub disturbances: u64,
    /// The blow has landed.
    pub struck: bool,
    /// What the names of VMs begin with.
    pub prefix: &'static str,
    /// Migrations that users have asked for.
    pub asked_migrations: u64,
    /// A node is being emptied, or has been.
    pub emptying: Option<Emptying>,
    /// Nodes in maintenance.
    pub maintained: Maintained,
    calm: bool,
    rested: u32,
    violation: Option<Violation>,
    injections: u64,
}

impl Sim {
    /// How often a node renews its lease (a third of the lease's time, which is about Kubernetes' 40 s).
    pub const HEARTBEAT: u64 = 13 * SECOND;

    /// A simulation that has not begun.
    pub fn new(options: Options) -> Self {
        let nodes = (1..=options.nodes).map(|number| Node::new(format!("node{number}"))).collect();
        Self {
            now: 0,
            sequence: 0,
            due: BinaryHeap::new(),
            held: Vec::new(),
            free: Vec::new(),
            random: Random::new(options.seed),
            store: Store::default(),
            store_down: false,
            controllers: (0..usize::try_from(options.controllers.max(1)).unwrap_or(1)).map(Controllers::new).collect(),
            nodes,
            launchers: Launchers::default(),
            watched: BTreeMap::new(),
            counted: Count::default(),
            cut_links: BTreeSet::new(),
            guests: BTreeMap::new(),
            trace: Trace::new(options.full_trace),
            options,
            stats: Stats::default(),
            asked: BTreeSet::new(),
            phases: BTreeMap::new(),
            disturbances: 0,
            struck: false,
            prefix: crate::users::PREFIX,
            asked_migrations: 0,
            emptying: None,
            maintained: Maintained::default(),
            calm: false,
            rested: 0,
            violation: None,
            injections: 0,
        }
    }

    /// The time of the moment.
    pub fn time(&self) -> Timestamp {
        self.moment(self.now)
    }

    /// The time of a moment.
    pub fn moment(&self, at: u64) -> Timestamp {
        let since = SignedDuration::from_micros(i64::try_from(at).unwrap_or(i64::MAX));
        Timestamp::from_second(BEGIN).unwrap_or_default().checked_add(since).unwrap_or(Timestamp::MAX)
    }

    /// The moment of a time, rounded up.
    pub fn microsecond(&self, time: Timestamp) -> u64 {
        let since = time.as_nanosecond() - i128::from(BEGIN) * 1_000_000_000;
        u64::try_from((since + 999) / 1000).unwrap_or(0)
    }

    /// Something happens later.
    pub fn at(&mut self, after: u64, event: Event) {
        self.sequence += 1;
        let (at, sequence) = (self.now.saturating_add(after), self.sequence);
        let place = self.free.pop().unwrap_or_else(|| {
            self.held.push(None);
            self.held.len() - 1
        });
        if let Some(held) = self.held.get_mut(place) {
            *held = Some(event);
        }
        self.due.push(Reverse(Due { at, sequence, place }));
    }

    /// Adds a line to the trace.
    pub fn note(&mut self, what: String) {
        self.trace.add(self.now, &what);
    }

    /// Whether a fault with this probability strikes now.
    pub fn faulty(&mut self, per_mille: impl Fn(&Faults) -> u32) -> bool {
        let per_mille = per_mille(&self.options.faults);
        !self.calm && self.random.chance(per_mille) && self.injects()
    }

    /// Whether a fault that would strike now does: each has a number, and some may be left out.
    pub fn injects(&mut self) -> bool {
        self.injections += 1;
        !self.options.without.contains(&self.injections)
    }

    /// Whether the nodes are wrong in this way, on purpose.
    pub fn wrong(&self, mutation: Mutation) -> bool {
        self.options.mutation == Some(mutation)
    }

    /// Something that must always hold does not; only the first counts.
    pub fn violate(&mut self, rule: Rule, what: String) {
        if self.options.unchecked.contains(&rule) {
            return;
        }
        self.trace.add(self.now, &format!("VIOLATION of {rule:?}: {what}"));
        self.violation.get_or_insert(Violation { rule, at: Duration::from_micros(self.now), what });
    }

    /// The first thing that did not hold.
    #[cfg(test)]
    pub fn violation(&self) -> Option<&str> {
        self.violation.as_ref().map(|violation| violation.what.as_str())
    }

    /// Tells everybody of what has been written.
    pub fn spread(&mut self) {
        loop {
            let commits = self.store.take_commits();
            if commits.is_empty() {
                return;
            }
            for commit in commits {
                self.feed_controllers(&commit);
                self.feed_nodes(&commit);
                self.check_commit(&commit);
                self.check_maintenance(&commit);
                let owner = commit.latest.metadata().uid.clone().unwrap_or_default();
                if commit.gone && self.store.owned_by(&owner).next().is_some() {
                    let after = self.random.between(10 * MS, 500 * MS);
                    self.at(after, Event::Collect { owner });
                }
            }
        }
    }

    /// Runs to the end.
    pub fn run(mut self) -> Report {
        let events = self.drive();
        self.report(events)
    }

    /// Founds the cluster and lets time pass until the end. Returns the number of events.
    pub fn drive(&mut self) -> u64 {
        self.found();
        let duration = u64::try_from(self.options.duration.as_micros()).unwrap_or(u64::MAX / 4);
        self.at(duration, Event::Calm);
        let mut events = 0;
        while let Some(Reverse(Due { at, place, .. })) = self.due.pop() {
            self.free.push(place);
            let Some(event) = self.held.get_mut(place).and_then(Option::take) else { continue };
            self.now = at;
            events += 1;
            self.handle(event);
            if self.violation.is_some() || self.rested > 1 {
                break;
            }
            if at > duration.saturating_add(SETTLE_LIMIT) {
                let stuck = self.unrest().unwrap_or_else(|| "nothing".to_owned());
                self.violate(Rule::Stuck, format!("not at rest long after the last fault: {stuck}"));
                break;
            }
        }
        events
    }

    fn report(self, events: u64) -> Report {
        let of = |wanted: MigrationPhase| self.phases.values().filter(|phase| **phase == wanted).count() as u64;
        Report {
            seed: self.options.seed,
            succeeded: of(MigrationPhase::Succeeded),
            failed: of(MigrationPhase::Failed),
            violation: self.violation,
            trace_hash: self.trace.hash(),
            virtual_time: Duration::from_micros(self.now),
            events,
            decisions: self.stats.decisions,
            deciding: self.stats.deciding,
            longest_decision: self.stats.longest_decision,
            writes: self.stats.writes,
            conflicts: self.stats.conflicts,
            most_at_once: self.stats.most_at_once,
            most_from_one_node: self.stats.most_from_one_node,
            most_to_one_node: self.stats.most_to_one_node,
            injections: self.injections,
            guests_killed: self.stats.guests_killed,
            post_copies: self.stats.post_copies,
            fenced: self.stats.fenced,
            rescued: self.stats.rescued,
            emptied: self.emptying.map(Emptying::told),
            trace: self.trace.into_lines(),
        }
    }

    fn handle(&mut self, event: Event) {
        // What comes for a process that stands still is dealt with when it goes on, in the same order.
        if let Some(wait) = life_of(&event).and_then(|life| self.stalled(life)) {
            return self.at(wait, event);
        }
        if let Some(wait) = self.waits(&event) {
            return self.at(wait, event);
        }
        match event {
            Event::News { life, kind, news } => self.take_news(life, kind, news),
            Event::Relist { life, kind } => self.relist(life, kind),
            Event::Listed { life, kind, objects, first, last } => self.take_list(life, kind, objects, first, last),
            Event::Wake { life } => self.wake_controllers(life),
            Event::Effect { life, chain } => self.carry_out_next(life, chain),
            Event::Conclude { life, chain } => self.conclude(life, chain),
            Event::ControllersStart { life } => self.start_controllers(life),
            Event::StoreUp => self.store_is_back(),
            Event::NodeNews { node, epoch, target, object } => self.take_node_news(node, epoch, target, object),
            Event::AgentLists { node, epoch } => self.agent_lists(node, epoch),
            Event::Look { node, epoch, vmi } => self.look(node, epoch, &vmi),
            Event::Sync { node, epoch, pod } => self.sync_pod(node, epoch, &pod),
            Event::Write { node, epoch, write } => self.take_write(node, epoch, write),
            Event::Pulled { node, boot, pod, uid } => self.pulled(node, boot, pod, uid),
            Event::Booted { launcher } => self.boot_guest(launcher),
            Event::Prepared { launcher, uid } => self.prepared(launcher, &uid),
            Event::Transfer { launcher, token } => self.step_transfer(launcher, token),
            Event::Broken { launcher, token } => self.break_transfer(launcher, token),
            Event::Go { uid, source, epoch, target_node } => self.take_go(&uid, source, epoch, target_node),
            Event::GoAnswered { uid, node, epoch, from, answer } => self.take_answer(uid, node, epoch, from, answer),
            Event::Ended { launcher } => self.end_launcher(launcher, Why::Order),
            Event::Order { launcher, order } => self.obey(launcher, order),
            Event::GoesOn { still, id } => self.goes_on(still, id),
            Event::Heartbeat { node, boot } => self.heartbeat(node, boot),
            Event::Renew { node, boot } => self.renew(node, boot),
            Event::FenceEnds { node, boot } => self.fence_ends(node, boot),
            Event::Rescued { vmi, disturbances } => self.check_rescue(&vmi, disturbances),
            Event::NodeHears { node } => self.undeafen(node),
            Event::Collect { owner } => self.collect(&owner),
            Event::AskMigration { vmi } => self.ask_migration(&vmi),
            Event::CancelMigration { name } => self.cancel_migration(&name),
            Event::Fault(fault) => self.strike_by_chance(fault),
            Event::Strike { uid, vmi, blow } => self.strike(&uid, &vmi, blow),
            Event::Boot { node } => self.boot_node(node),
            Event::NodeHeals { node } => self.heal_node(node),
            Event::Uncordon { node } => self.cordon(node, false),
            Event::LinkHeals { link } => {
                self.cut_links.remove(&link);
                self.links_changed();
            }
            Event::Empty { node } => self.empty_node(node),
            Event::Maintain { number } => self.maintain(number),
            Event::EndMaintenance { target } => self.end_maintenance(target),
            Event::CordonForGood { node } => self.cordon_for_good(node),
            // A node that is empty brings it about before its time.
            Event::Calm if self.calm => {}
            Event::Calm => {
                self.calm = true;
                self.set_clocks_right();
                self.note("users and faults stop".to_owned());
                self.at(REST_EVERY, Event::AtRest);
            }
            Event::AtRest => {
                let unrest = self.unrest().is_some();
                self.rested = if self.is_maintained(unrest) && !unrest { self.rested + 1 } else { 0 };
                self.at(REST_EVERY, Event::AtRest);
            }
        }
    }

    /// How long until the next of something that happens so often in an hour; `None` for never.
    pub fn interval(&mut self, fault: Fault) -> Option<u64> {
        let faults = &self.options.faults;
        let per_hour = match fault {
            Fault::WatchBreak => faults.watch_breaks_per_hour,
            Fault::ControllerRestart => faults.controller_restarts_per_hour,
            Fault::ControllerStall => faults.controller_stalls_per_hour,
            Fault::StoreRestart => faults.store_restarts_per_hour,
            Fault::LimitChange => faults.limit_changes_per_hour,
            Fault::AgentRestart => faults.agent_restarts_per_hour,
            Fault::LauncherKill => faults.launcher_kills_per_hour,
            Fault::NodeDeath => faults.node_deaths_per_hour,
            Fault::NodeCut => faults.node_cuts_per_hour,
            Fault::ApiCut => faults.api_cuts_per_hour,
            Fault::LinkCut => faults.link_cuts_per_hour,
            Fault::Cordon => faults.cordons_per_hour,
            Fault::AgentStall => faults.handler_stalls_per_hour,
            Fault::LauncherStall => faults.launcher_stalls_per_hour,
            Fault::QemuStall => faults.qemu_stalls_per_hour,
        };
        let mean = (3600 * SECOND).checked_div(u64::from(per_hour))?;
        (!self.calm).then(|| self.random.between(0, 2 * mean))
    }
}

/// The controller process that an event is for.
fn life_of(event: &Event) -> Option<Life> {
    match event {
        Event::News { life, .. }
        | Event::Relist { life, .. }
        | Event::Listed { life, .. }
        | Event::Wake { life }
        | Event::Effect { life, .. }
        | Event::Conclude { life, .. } => Some(*life),
        _ => None,
    }
}
