//! The fence of a node (docs/fencing.md): its handler renews the node's lease, and whoever cannot ends the node's guests, in time
//! before they may be started elsewhere.
//!
//! Nodes measure with clocks of their own, which run a little fast or slow. The launchers know until when their guests may run, and
//! end themselves when that has passed; the handler does the same, and ends the QEMU of a launcher that stands still.

use std::time::Duration;

use godwit_control::{Kind, Name, Object, Ref, fence, names};

use crate::check::Rule;
use crate::event::Event;
use crate::machine::{Launcher, Why};
use crate::mutation::Mutation;
use crate::sim::{MS, SECOND, Sim};

/// A time as the simulator counts it.
const fn micros(time: Duration) -> u64 {
    time.as_secs() * 1_000_000
}

const RENEW_EVERY: u64 = micros(names::fence::RENEW_EVERY);
const SILENCE: u64 = micros(names::fence::SILENCE);

/// A launcher that has not ended by so long after its time is ended by its handler.
const HELP_AFTER: u64 = SECOND;

/// What a node's fence knows.
#[derive(Clone, Copy, Debug)]
pub struct Fence {
    /// Until when the node's guests may run, as the launchers were told.
    pub until: u64,
    /// When a renewal was last answered.
    answered: u64,
    /// A second of this node's clock, in microseconds.
    second: u64,
    /// The launchers look at the time when it has come.
    watched: bool,
    /// When the node booted.
    booted: u64,
}

impl Fence {
    /// The fence of a node that has not booted.
    pub fn new() -> Self {
        Self { until: 0, answered: 0, second: 1_000_000, watched: false, booted: 0 }
    }

    /// The node's clock runs at another speed.
    pub fn set_speed(&mut self, second: u64) {
        self.second = second;
    }

    /// A handler that has started anew does not know how long it has had no answer.
    pub fn forget_answers(&mut self, now: u64) {
        self.answered = now;
    }

    fn lasting(&self, time: Duration) -> u64 {
        time.as_secs() * self.second
    }
}

impl Sim {
    /// Whether nodes have fences: in clusters of tens of thousands nobody dies.
    pub fn has_fences(&self) -> bool {
        !self.options.standing && self.prefix == crate::users::PREFIX
    }

    /// The node has booted: nothing runs there before its lease is its own.
    pub fn boot_fence(&mut self, index: usize, boot: u64) {
        let now = self.now;
        let has = self.has_fences();
        let Some(node) = self.nodes.get_mut(index) else { return };
        node.fence.until = if has { now } else { u64::MAX };
        node.fence.watched = false;
        node.fence.booted = now;
        if has {
            self.at(MS, Event::Renew { node: index, boot });
        }
    }

    /// Whether guests may be started on a node.
    pub fn may_run(&self, index: usize) -> bool {
        self.nodes.get(index).is_some_and(|node| self.now < node.fence.until)
    }

    /// The handler renews the lease, puts the fence off, or ends what runs.
    pub fn renew(&mut self, index: usize, boot: u64) {
        let now = self.now;
        let Some(node) = self.nodes.get(index).filter(|node| node.boot == boot && node.alive) else { return };
        let (name, up, until) = (node.name.clone(), node.up, node.fence.until);
        let reached = node.reaches_api() && !self.store_down;
        self.at(if up { RENEW_EVERY } else { 50 * MS }, Event::Renew { node: index, boot });
        if !up {
            return;
        }
        if now >= until {
            self.end_guests(index);
        }
        if !reached {
            if self.peers_are_silent(index)
                && let Some(node) = self.nodes.get_mut(index)
            {
                node.fence.until = node.fence.until.max(now + node.fence.lasting(names::fence::PUT_OFF));
                self.watch_fence(index, boot);
            }
            return;
        }
        let lease = Name::new(names::KUBEVIRT_NAMESPACE, format!("{}{name}", names::fence::LEASE_PREFIX));
        let target = Ref::new(Kind::Lease, lease);
        let lost = matches!(self.store.get(&target), Some(Object::Lease(lease)) if fence::says_lost(lease));
        if lost {
            self.note(format!("{name} finds that it counts as lost"));
            self.end_guests(index);
        }
        let peers: Vec<&str> =
            self.nodes.iter().map(|node| node.name.as_str()).filter(|other| *other != name).collect();
        let peers = if peers.is_empty() { names::FENCE_NO_PEERS.to_owned() } else { peers.join(",") };
        let time = self.node_time(index);
        self.store.renew_fence(&target, &name, &peers, time, &mut self.random);
        if let Some(node) = self.nodes.get_mut(index) {
            node.fence.answered = now;
            node.fence.until = now + node.fence.lasting(names::fence::DURATION);
        }
        self.watch_fence(index, boot);
        self.spread();
    }

    /// Whether every other node says that it has no contact to the API either.
    fn peers_are_silent(&self, index: usize) -> bool {
        let silent = |(other, node): (usize, &crate::machine::Node)| {
            let answers = self.reaches(index, other) && node.up && node.stalled_until <= self.now;
            other == index || answers && self.now - node.fence.answered >= SILENCE
        };
        self.nodes.iter().enumerate().all(silent)
    }

    fn watch_fence(&mut self, index: usize, boot: u64) {
        let now = self.now;
        let Some(node) = self.nodes.get_mut(index).filter(|node| !node.fence.watched) else { return };
        node.fence.watched = true;
        let after = node.fence.until - now;
        self.at(after, Event::FenceEnds { node: index, boot });
    }

    /// The time until which guests may run may have come.
    pub fn fence_ends(&mut self, index: usize, boot: u64) {
        let now = self.now;
        let Some(node) = self.nodes.get_mut(index).filter(|node| node.boot == boot && node.alive) else { return };
        node.fence.watched = false;
        if now < node.fence.until {
            return self.watch_fence(index, boot);
        }
        self.note(format!("{} is fenced", self.name_of(index)));
        self.end_guests(index);
    }

    /// All launchers of a node end, those that wait for a guest as well. One that stands still is ended by its handler after a moment,
    /// unless that stands still too.
    fn end_guests(&mut self, index: usize) {
        let now = self.now;
        let Some(node) = self.nodes.get(index) else { return };
        let (boot, agent) = (node.boot, node.stalled_until.max(node.fence.until + HELP_AFTER));
        let mut again: Option<u64> = None;
        for id in self.launchers.living_on(index) {
            let stalled = self.launchers.get(id).map_or(0, |launcher| launcher.stalled_until);
            let stalled = if self.wrong(Mutation::NoWatchdog) { agent } else { stalled.min(agent) };
            if stalled <= now {
                self.end_launcher(id, Why::Fence);
            } else {
                again = Some(again.map_or(stalled, |before| before.min(stalled)));
            }
        }
        if let Some(again) = again {
            self.at(again - now, Event::FenceEnds { node: index, boot });
        }
    }

    /// A node has died: its VMs have to run elsewhere in time, if that is to be checked, another node has been there for a while,
    /// none dies meanwhile and no clock jumps.
    pub fn expect_rescue(&mut self, index: usize) {
        self.disturbances += 1;
        let Some(within) = self.options.rescued_within else { return };
        let after = u64::try_from(within.as_micros()).unwrap_or(u64::MAX / 4);
        let (now, settled) = (self.now, 60 * SECOND);
        let other = |(other, node): (usize, &crate::machine::Node)| {
            other != index && node.alive && now - node.fence.booted >= settled.min(now)
        };
        if !self.nodes.iter().enumerate().any(other) {
            return;
        }
        let ran = self.launchers.living_on(index);
        let ran = ran.into_iter().filter_map(|id| self.launchers.get(id)).filter(|launcher| launcher.runs());
        let vmis: Vec<Name> = ran.map(|launcher| launcher.vmi.clone()).collect();
        for vmi in vmis {
            let disturbances = self.disturbances;
            self.at(after, Event::Rescued { vmi, disturbances });
        }
    }

    /// The VM has had its time.
    pub fn check_rescue(&mut self, vmi: &Name, disturbances: u64) {
        if self.disturbances != disturbances {
            return;
        }
        if self.launchers.living_of(vmi).any(|(_, launcher): (u64, &Launcher)| launcher.runs()) {
            self.stats.rescued += 1;
        } else {
            self.violate(Rule::Stuck, format!("{vmi} does not run again though its node died long ago"));
        }
    }
}
