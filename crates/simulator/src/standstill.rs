//! Processes that stand still (SIGSTOP) and go on later, as if nothing had been: a node's agent, a launcher, a QEMU.
//!
//! What is meant for them waits and is dealt with in its order when they go on; what they have sent is on its way. Memory stands
//! still where one of the four that carry it does: both QEMUs and both agents. A QEMU does what it does without its launcher, which
//! learns of it later, and its handler later still.

use godwit_control::{Kind, Name};

use crate::event::{Event, Order, Still};
use crate::machine::{Domain, Launcher, Status};
use crate::mutation::Mutation;
use crate::sim::Sim;

impl Sim {
    /// How long an event has to wait because somebody whom it needs stands still.
    pub fn waits(&self, event: &Event) -> Option<u64> {
        let agent = |node: usize| self.nodes.get(node).map_or(0, |node| node.stalled_until);
        let until = match event {
            Event::NodeNews { node, .. }
            | Event::AgentLists { node, .. }
            | Event::Look { node, .. }
            | Event::Sync { node, .. }
            | Event::Write { node, .. }
            | Event::GoAnswered { node, .. }
            | Event::Pulled { node, .. }
            | Event::Renew { node, .. }
            | Event::Heartbeat { node, .. } => agent(*node),
            Event::Go { uid, target_node, .. } => {
                let target = self.launchers.receiving(uid).map_or(0, |(_, target)| target.obeys_at());
                agent(*target_node).max(target)
            }
            Event::Booted { launcher } | Event::Prepared { launcher, .. } | Event::Order { launcher, .. } => {
                self.launchers.get(*launcher).map_or(0, Launcher::obeys_at)
            }
            // A QEMU that does not end by itself is killed.
            Event::Ended { launcher } => self.launchers.get(*launcher).map_or(0, |launcher| launcher.stalled_until),
            _ => 0,
        };
        until.checked_sub(self.now).filter(|wait| *wait > 0)
    }

    /// Something stands still for so long.
    pub fn stand_still(&mut self, still: Still, id: u64, duration: u64) {
        let until = self.now + duration;
        match still {
            Still::Agent => {
                let Some(node) = usize::try_from(id).ok().and_then(|node| self.nodes.get_mut(node)) else { return };
                node.stalled_until = node.stalled_until.max(until);
                let name = node.name.clone();
                self.note(format!("the agent of {name} stands still for {duration} µs"));
            }
            Still::Launcher | Still::Qemu => {
                let Some(launcher) = self.launchers.living_mut(id) else { return };
                if still == Still::Qemu {
                    launcher.frozen_until = launcher.frozen_until.max(until);
                } else {
                    launcher.stalled_until = launcher.stalled_until.max(until);
                    if launcher.seen.is_none() {
                        launcher.seen = Some(Box::new(launcher.clone()));
                    }
                }
                let pod = launcher.pod.clone();
                self.note(format!("the {still:?} of {pod} stands still for {duration} µs"));
            }
        }
        self.links_changed();
        self.at(duration, Event::GoesOn { still, id });
    }

    /// It goes on, unless it stands still once more.
    pub fn goes_on(&mut self, still: Still, id: u64) {
        let now = self.now;
        if still == Still::Launcher
            && let Some(launcher) = self.launchers.living_mut(id)
            && launcher.stalled_until <= now
        {
            launcher.seen = None;
            let launcher = launcher.clone();
            self.note(format!("launcher {} goes on", launcher.pod));
            self.catch_up(id, &launcher);
            self.tell_agent(&launcher);
        }
        self.links_changed();
        if still == Still::Agent {
            self.act_on_old_news(id);
        }
    }

    /// An agent that goes on acts on what it knew before, and only then hears what has come meanwhile.
    fn act_on_old_news(&mut self, id: u64) {
        let Some((index, node)) = usize::try_from(id).ok().and_then(|at| Some((at, self.nodes.get(at)?))) else {
            return;
        };
        if node.stalled_until > self.now {
            return;
        }
        let (epoch, name) = (node.epoch, node.name.clone());
        let held = node.cache.keys().filter(|target| target.kind == Kind::VirtualMachineInstance);
        let vmis: Vec<Name> = held.map(|target| target.name.clone()).collect();
        self.note(format!("the agent of {name} goes on"));
        for vmi in vmis {
            self.look(index, epoch, &vmi);
        }
    }

    /// A launcher learns what its QEMU has done without it.
    fn catch_up(&mut self, id: u64, launcher: &Launcher) {
        let Some(transfer) = launcher.sends.as_ref() else { return };
        match transfer.status {
            Status::Active if transfer.sent => {
                if self.wrong(Mutation::RunsWhatHasLeft) {
                    return self.continue_guest(id);
                }
                self.write_down(id);
            }
            // What the launcher stopped only the launcher continues.
            Status::Failed | Status::Cancelled if launcher.domain == Domain::Stopped => self.continue_guest(id),
            _ => {}
        }
    }

    /// The guest runs again where it was.
    fn continue_guest(&mut self, id: u64) {
        let Some(launcher) = self.launchers.living_mut(id) else { return };
        launcher.domain = Domain::Running;
        let vmi = launcher.vmi.clone();
        self.check_guest(&vmi);
    }

    /// Whether bytes of an outgoing migration get from one QEMU to the other.
    pub fn flows(&self, id: u64) -> bool {
        let Some(source) = self.launchers.get(id) else { return false };
        let target = source.sends.as_ref().and_then(|transfer| self.launchers.get(transfer.target));
        let Some(target) = target else { return false };
        let awake = |node: usize| self.nodes.get(node).is_some_and(|node| node.stalled_until <= self.now);
        let runs = |launcher: &Launcher| launcher.frozen_until <= self.now;
        self.reaches(source.node, target.node)
            && awake(source.node)
            && awake(target.node)
            && runs(source)
            && runs(target)
    }

    /// An order to a launcher: carried out at once, or when it and its QEMU go on.
    pub fn order(&mut self, launcher: u64, order: Order) {
        let wait = self.launchers.get(launcher).map_or(0, Launcher::obeys_at).saturating_sub(self.now);
        match wait {
            0 => self.obey(launcher, order),
            wait => self.at(wait, Event::Order { launcher, order }),
        }
    }

    /// A launcher does what it was ordered to.
    pub fn obey(&mut self, launcher: u64, order: Order) {
        match order {
            Order::Send { uid, target } => self.send(launcher, &uid, target),
            Order::Cancel { uid, why } => self.cancel_transfer(launcher, &uid, why),
            Order::PostCopy { uid } => self.hold_for_post_copy(launcher, &uid),
        }
    }
}

impl Launcher {
    /// When it can do something with its QEMU; in the past if it can now.
    pub fn obeys_at(&self) -> u64 {
        self.stalled_until.max(self.frozen_until)
    }
}
