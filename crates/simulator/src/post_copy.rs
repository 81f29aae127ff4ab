//! Post-copy (docs/hand-over.md): the guest runs at the target while a part of its memory follows.

use crate::event::Event;
use crate::machine::{Domain, Status};
use crate::sim::{MS, Sim};

impl Sim {
    /// The launcher stops the guest and tells QEMU to switch, once, as long as the guest runs here.
    pub fn hold_for_post_copy(&mut self, id: u64, uid: &str) {
        let (now, token, switch) = (self.now, self.random.next(), self.random.between(5 * MS, 60 * MS));
        let flows = self.flows(id);
        let Some(launcher) = self.launchers.living_mut(id).filter(|launcher| launcher.domain == Domain::Running) else {
            return;
        };
        let Some(guest) = self.guests.get(&launcher.vmi) else { return };
        let Some(transfer) = launcher.sends.as_mut() else { return };
        if transfer.uid != uid || transfer.status != Status::Active || transfer.sent {
            return;
        }
        let remaining = transfer.copied(guest, now).remaining.max(guest.memory / 10);
        if transfer.endless {
            transfer.copy = now.saturating_sub(transfer.started);
        }
        transfer.stands = true;
        transfer.post_copy = true;
        transfer.endless = false;
        transfer.follows = remaining.saturating_mul(1_000_000) / guest.bandwidth.max(1);
        launcher.domain = Domain::Stopped;
        let (vmi, pod) = (launcher.vmi.clone(), launcher.pod.clone());
        if let Some(transfer) = launcher.sends.as_mut() {
            transfer.step(token, switch, now, flows);
        }
        self.note(format!("{vmi} is held in {pod} for post-copy"));
        self.reached(uid, &vmi, crate::Step::Stands);
        if flows {
            self.at(switch, Event::Transfer { launcher: id, token });
        }
    }

    /// The devices' state was sent and that is written down: the guest is the target's, and its memory follows.
    pub fn begin_to_follow(&mut self, id: u64) {
        let (now, token, flows) = (self.now, self.random.next(), self.flows(id));
        let Some(launcher) = self.launchers.get_mut(id) else { return };
        launcher.domain = Domain::Serving;
        let Some(transfer) = launcher.sends.as_mut() else { return };
        transfer.status = Status::HandedOver;
        let follows = transfer.follows;
        transfer.step(token, follows, now, flows);
        self.stats.post_copies += 1;
        if flows {
            self.at(follows, Event::Transfer { launcher: id, token });
        }
    }

    /// All memory has followed.
    pub fn is_whole(&mut self, id: u64) {
        let Some(launcher) = self.launchers.get_mut(id) else { return };
        launcher.domain = Domain::MigratedAway;
        let Some(transfer) = launcher.sends.as_mut() else { return };
        transfer.status = Status::Completed;
        let target = transfer.target;
        let launcher = launcher.clone();
        self.launchers.note_sending(id);
        self.note(format!("all of {} has followed from {}", launcher.vmi, self.name_of(launcher.node)));
        if let Some(target) = self.launchers.get_mut(target) {
            target.fills = false;
            let target = target.clone();
            self.tell_agent(&target);
        }
        self.tell_agent(&launcher);
    }

    /// What was still to follow never will: the guest cannot run anywhere any more.
    pub fn never_follows(&mut self, id: u64) {
        let Some(launcher) = self.launchers.get_mut(id) else { return };
        let Some(transfer) = launcher.sends.as_mut().filter(|one| one.status == Status::HandedOver) else { return };
        transfer.status = Status::Failed;
        let target = transfer.target;
        let launcher = launcher.clone();
        self.launchers.note_sending(id);
        self.note(format!("the rest of {} never follows from {}", launcher.vmi, self.name_of(launcher.node)));
        if let Some(target) = self.launchers.living_mut(target).filter(|target| target.fills) {
            target.domain = Domain::Broken;
            self.stats.guests_killed += 1;
        }
        if let Some(target) = self.launchers.get(target).cloned() {
            self.tell_agent(&target);
        }
        self.tell_agent(&launcher);
    }
}
