//! A node of a standing cluster is emptied, as an administrator does it: it is cordoned and gets the drain taint, and its guests
//! leave. What that takes, and of which parts.

use std::collections::BTreeMap;
use std::time::Duration;

use godwit_api::MigrationPhase as Phase;
use godwit_api::drain::DrainPlan;
use godwit_control::{Kind, Name, Ref, names};
use serde_json::json;

use crate::check::Rule;
use crate::event::Event;
use crate::sim::{SECOND, Sim};

/// When it begins: by then the controllers have listed everything.
const BEGIN: u64 = 5 * SECOND;

/// How a node was emptied. Times are virtual where nothing else is said.
#[derive(Clone, Debug, Default)]
pub struct Emptied {
    /// What a plan made just before said.
    pub plan: DrainPlan,
    /// How long making it took, by [`crate::Options::clock`].
    pub planning: Duration,
    /// From the taint until no launcher was left on the node; unset when that did not come.
    pub after: Option<Duration>,
    /// Its guests, by their VMIs' names.
    pub guests: Vec<Leaving>,
}

/// How a guest left. Times count from the taint.
#[derive(Clone, Debug, Default)]
pub struct Leaving {
    /// Its VMI.
    pub vmi: String,
    /// Bytes of its memory.
    pub memory: u64,
    /// Bytes a second at which it is copied.
    pub bandwidth: u64,
    /// When its migration had its turn.
    pub turn: Option<Duration>,
    /// When its memory began to be sent.
    pub sends: Option<Duration>,
    /// When its migration had succeeded.
    pub ends: Option<Duration>,
    /// Migrations of it that failed.
    pub failed: u32,
}

/// A node that is being emptied.
pub struct Emptying {
    node: usize,
    begun: u64,
    plan: DrainPlan,
    planning: Duration,
    after: Option<Duration>,
    guests: BTreeMap<Name, Leaving>,
}

impl Emptying {
    /// What is told of it.
    pub fn told(self) -> Emptied {
        let Self { plan, planning, after, guests, .. } = self;
        Emptied { plan, planning, after, guests: guests.into_values().collect() }
    }
}

impl Sim {
    /// The node that is to be emptied, if any.
    pub fn to_be_emptied(&self) -> Option<usize> {
        self.options.empty.and_then(|node| usize::try_from(node).ok()).filter(|node| *node < self.nodes.len())
    }

    /// It will be.
    pub fn plan_to_empty(&mut self) {
        if let Some(node) = self.to_be_emptied() {
            self.at(BEGIN, Event::Empty { node });
        }
    }

    /// A plan is made, and the node is cordoned and tainted.
    pub fn empty_node(&mut self, node: usize) {
        let name = self.name_of(node).to_owned();
        let began = self.options.clock.map(|clock| clock());
        let plan = self.plan_drain(&name);
        let planning = self.options.clock.zip(began).map(|(clock, began)| clock().saturating_sub(began));
        let mut guests = BTreeMap::new();
        for id in self.launchers.living_on(node) {
            let Some(vmi) = self.launchers.get(id).map(|launcher| launcher.vmi.clone()) else { continue };
            let Some(guest) = self.guests.get(&vmi) else { continue };
            let (memory, bandwidth) = (guest.memory, guest.bandwidth);
            guests.insert(vmi.clone(), Leaving { vmi: vmi.to_string(), memory, bandwidth, ..Leaving::default() });
        }
        self.note(format!("{name} is to be emptied of {} guests", guests.len()));
        let planning = planning.unwrap_or_default();
        self.emptying = Some(Emptying { node, begun: self.now, plan, planning, after: None, guests });
        let taints = json!([{"key": names::TAINT_DRAIN, "effect": "NoSchedule"}]);
        let body = json!({"spec": {"unschedulable": true, "taints": taints}});
        if self.store.merge(&Ref::new(Kind::Node, Name::cluster(name.as_str())), false, &body).is_err() {
            self.violate(Rule::Simulation, format!("{name} cannot be tainted"));
        }
        self.spread();
        self.note_empty(node);
    }

    /// A migration of this VMI comes to a phase.
    pub fn note_leaving(&mut self, vmi: &Name, phase: &Phase) {
        let now = self.now;
        let Some(emptying) = &mut self.emptying else { return };
        let since = Duration::from_micros(now - emptying.begun);
        let Some(leaving) = emptying.guests.get_mut(vmi) else { return };
        if phase.is_running() {
            leaving.turn.get_or_insert(since);
        }
        match phase {
            Phase::Running => leaving.sends = Some(since),
            Phase::Succeeded => leaving.ends = Some(since),
            Phase::Failed => leaving.failed += 1,
            _ => {}
        }
    }

    /// A launcher on this node has ended: perhaps it was the last one.
    pub fn note_empty(&mut self, node: usize) {
        let now = self.now;
        let awaited = self.emptying.as_ref().is_some_and(|one| one.node == node && one.after.is_none());
        if !awaited || !self.launchers.living_on(node).is_empty() {
            return;
        }
        if let Some(emptying) = &mut self.emptying {
            emptying.after = Some(Duration::from_micros(now - emptying.begun));
        }
        self.note(format!("{} is empty", self.name_of(node)));
        self.at(0, Event::Calm);
    }
}
