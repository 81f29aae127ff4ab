//! What really exists: nodes, links, launchers with their QEMUs, guests, and memory on its way. Truth, not API.

use std::collections::{BTreeMap, BTreeSet};

use godwit_control::{Name, Object, Ref};

use crate::Step;
use crate::check::Rule;
use crate::event::{Answer, Event};
use crate::fence::Fence;
use crate::mutation::Mutation;
use crate::sim::{MS, SECOND, Sim};

/// A pre-copy ends when what remains can be sent in this many seconds.
const MAX_DOWNTIME: f64 = 0.3;
/// A connection on which nothing is acknowledged for so long is broken off (docs/hand-over.md).
const BROKEN_AFTER: u64 = 10 * SECOND;

/// A node and the memory of its agent (handler and kubelet).
pub struct Node {
    /// Its name.
    pub name: String,
    /// It is powered on.
    pub alive: bool,
    /// It reaches nothing and nobody.
    pub cut: bool,
    /// It does not reach the API server.
    pub deaf: bool,
    /// Until when its guests may run, and what that rests on.
    pub fence: Fence,
    /// How far its clock is ahead, in microseconds.
    pub skew: i64,
    /// The agent runs and has listed.
    pub up: bool,
    /// Counts the agent's lives.
    pub epoch: u64,
    /// Counts the node's lives.
    pub boot: u64,
    /// What the agent knows of the API.
    pub cache: BTreeMap<Ref, Object>,
    /// When the last piece of news on its way arrives.
    pub last_news: u64,
    /// Migrations that the handler listens for: port and launcher.
    pub listening: BTreeMap<String, (u64, u64)>,
    /// Migrations whose target the handler tries to reach since, and the port that it has reached.
    pub dialled: BTreeMap<String, (u64, Option<u64>)>,
    /// Answers to the go.
    pub answers: BTreeMap<String, Answer>,
    /// Writes under way.
    pub writing: BTreeSet<Ref>,
    /// Looks that are due.
    pub looks: BTreeMap<Name, u64>,
    /// Pods whose image is being pulled.
    pub pulling: BTreeSet<String>,
    /// When progress was last reported.
    pub reported: BTreeMap<String, u64>,
    /// Until when the agent stands still.
    pub stalled_until: u64,
}

impl Node {
    /// A node that has not booted.
    pub fn new(name: String) -> Self {
        Self {
            name,
            alive: false,
            cut: false,
            deaf: false,
            fence: Fence::new(),
            skew: 0,
            up: false,
            epoch: 0,
            boot: 0,
            cache: BTreeMap::new(),
            last_news: 0,
            listening: BTreeMap::new(),
            dialled: BTreeMap::new(),
            answers: BTreeMap::new(),
            writing: BTreeSet::new(),
            looks: BTreeMap::new(),
            pulling: BTreeSet::new(),
            reported: BTreeMap::new(),
            stalled_until: 0,
        }
    }

    /// Whether it reaches the API server, if there is one.
    pub fn reaches_api(&self) -> bool {
        self.alive && !self.cut && !self.deaf
    }

    /// The agent's memory is gone.
    pub fn forget(&mut self) {
        self.epoch += 1;
        self.up = false;
        self.stalled_until = 0;
        self.cache.clear();
        self.listening.clear();
        self.dialled.clear();
        self.answers.clear();
        self.writing.clear();
        self.looks.clear();
        self.reported.clear();
    }
}

/// What a launcher's QEMU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Domain {
    /// There is none yet.
    Undefined,
    /// The guest boots or runs.
    Running,
    /// Stopped for the switchover of an outgoing migration.
    Stopped,
    /// Waits for a guest to come in.
    Incoming,
    /// Has sent its guest away; never runs it again.
    MigratedAway,
    /// The same, in post-copy: a part of its memory is still here.
    Serving,
    /// Has the guest in post-copy, and a part of its memory never comes.
    Broken,
    /// The guest has ended by itself or as asked.
    Shutdown,
    /// QEMU has died.
    Crashed,
}

/// How an outgoing migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Memory is being sent.
    Active,
    /// Post-copy: the target has what it needs to run the guest, which is written down; the rest follows.
    HandedOver,
    /// The target has everything; written down.
    Completed,
    /// Did not work out.
    Failed,
    /// Was cancelled.
    Cancelled,
}

/// An outgoing migration.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// The migration.
    pub uid: String,
    /// The launcher that receives.
    pub target: u64,
    /// How it stands.
    pub status: Status,
    /// When it began.
    pub started: u64,
    /// Why the handler cancelled it, if it did.
    pub why: Option<&'static str>,
    /// QEMU has sent what the target needs to run the guest; what was `Active` is not any more when that is written down.
    pub sent: bool,
    /// It goes in post-copy.
    pub post_copy: bool,
    /// How long the rest follows then.
    pub follows: u64,
    /// The guest stands still for the switchover: what was to be sent before has been.
    pub stands: bool,
    /// Marks the step that is awaited.
    token: u64,
    /// When the step is due; `None` while the link is cut, or when the guest writes faster than the link carries.
    due: Option<u64>,
    /// What is left of the step while the link is cut.
    left: u64,
    /// How long the copying takes on a link that is never cut.
    pub copy: u64,
    /// It will never converge.
    pub endless: bool,
    /// How long the switchover takes.
    switch: u64,
}

/// A launcher: the process of one pod.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// Where it runs.
    pub node: usize,
    /// Its pod.
    pub pod: Name,
    /// Its pod's UID.
    pub pod_uid: String,
    /// The VMI.
    pub vmi: Name,
    /// The VMI's UID.
    pub vmi_uid: String,
    /// The migration that it was made for.
    pub receives: Option<String>,
    /// What its QEMU does.
    pub domain: Domain,
    /// Guest memory is complete here.
    pub loaded: bool,
    /// When the guest that came in went on.
    pub resumed: Option<u64>,
    /// The last outgoing migration.
    pub sends: Option<Transfer>,
    /// The process has ended, well or badly.
    pub ended: Option<bool>,
    /// It was told to end.
    pub stopping: bool,
    /// It was told to start or to receive.
    pub ordered: bool,
    /// It ended before the handler that runs now could see it: nothing is known of it but its pod.
    pub forgotten: bool,
    /// The guest that is complete here is lost: the source died before it gave the go.
    pub orphaned: bool,
    /// Some of the memory of the guest that came in is still at the source.
    pub fills: bool,
    /// Until when its process stands still.
    pub stalled_until: u64,
    /// Until when its QEMU stands still.
    pub frozen_until: u64,
    /// While it stands still: what it was then, which is all that its handler knows of it.
    pub seen: Option<Box<Launcher>>,
}

impl Launcher {
    /// Whether it runs the guest, or would by itself.
    pub fn runs(&self) -> bool {
        self.ended.is_none() && matches!(self.domain, Domain::Running)
    }

    /// Whether it has written down that its guest has left.
    pub fn has_left(&self) -> bool {
        self.sends.as_ref().is_some_and(|one| matches!(one.status, Status::Completed | Status::HandedOver) || one.sent)
    }
}

/// How fast a guest writes and is copied. Bytes and bytes a second.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// Memory.
    pub memory: u64,
    /// What it writes.
    pub dirty: u64,
    /// What the link carries.
    pub bandwidth: u64,
}

/// Why a launcher ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// An injected fault.
    Fault,
    /// The fence of its node.
    Fence,
    /// Somebody has ordered it through the API.
    Order,
}

/// How far an outgoing migration has come, in bytes, bytes a second and rounds.
pub struct Copied {
    /// Sent so far, what was written again and sent again included.
    pub processed: u64,
    /// Not sent yet of this round.
    pub remaining: u64,
    /// The round, from 1.
    pub iteration: u64,
}

impl Transfer {
    /// The next step is awaited, in `after` from now if bytes flow.
    pub fn step(&mut self, token: u64, after: u64, now: u64, flows: bool) {
        self.token = token;
        self.left = after;
        self.due = flows.then_some(now + after);
    }

    /// How far it has come by now: rounds, each of which sends what was written during the one before.
    pub fn copied(&self, guest: &Guest, now: u64) -> Copied {
        let sent_for = match self.due {
            _ if self.stands => self.copy,
            _ if self.endless => now.saturating_sub(self.started),
            Some(due) => self.copy.saturating_sub(due.saturating_sub(now)),
            None => self.copy.saturating_sub(self.left),
        };
        let bandwidth = guest.bandwidth as f64;
        let (mut left, mut round, mut processed) = (sent_for as f64 / 1e6, guest.memory as f64, 0.0);
        let mut iteration = 1;
        while left > round / bandwidth && iteration < 10_000 {
            left -= round / bandwidth;
            processed += round;
            round = (guest.dirty as f64 * (round / bandwidth)).clamp(1.0, guest.memory as f64);
            iteration += 1;
        }
        let sent = (left * bandwidth).min(round);
        Copied { processed: (processed + sent) as u64, remaining: (round - sent) as u64, iteration }
    }
}

impl Sim {
    /// Whether two nodes reach each other.
    pub fn reaches(&self, one: usize, other: usize) -> bool {
        let open = |node: usize| self.nodes.get(node).is_some_and(|node| node.alive && !node.cut);
        open(one) && open(other) && !self.cut_links.contains(&(one.min(other), one.max(other)))
    }

    /// A launcher ends. Checks that no guest is lost by an order that no user gave.
    pub fn end_launcher(&mut self, id: u64, why: Why) {
        let Some(launcher) = self.launchers.get(id).filter(|launcher| launcher.ended.is_none()).cloned() else {
            return;
        };
        let holds = self.holds_guest(&launcher);
        self.note(format!(
            "launcher {} on {} ends ({why:?}, {:?}{})",
            launcher.pod,
            self.name_of(launcher.node),
            launcher.domain,
            if holds { ", with the guest" } else { "" }
        ));
        if holds
            && why == Why::Order
            && !self.asked.contains(&launcher.vmi_uid)
            && !self.asked.contains(&launcher.pod_uid)
        {
            self.violate(
                Rule::NeverLost,
                format!(
                    "the guest of {} was ended in {} on {} although nobody asked for its end",
                    launcher.vmi,
                    launcher.pod,
                    self.name_of(launcher.node)
                ),
            );
        }
        if holds && why == Why::Fault {
            self.stats.guests_killed += 1;
        }
        if holds && why == Why::Fence {
            self.stats.fenced += 1;
        }
        let domain = match (why, launcher.domain) {
            (_, Domain::MigratedAway) => Domain::MigratedAway,
            (Why::Fault | Why::Fence, _) | (_, Domain::Broken) => Domain::Crashed,
            (Why::Order, _) => Domain::Shutdown,
        };
        self.launchers.end(id, why == Why::Order, domain);
        self.note_empty(launcher.node);
        // A guest whose source dies before the go is lost, and nobody's doing but the fault's (docs/hand-over.md).
        if let Some(transfer) = launcher.sends.as_ref().filter(|one| one.status == Status::Completed || one.sent)
            && let Some(target) = self.launchers.get_mut(transfer.target)
            && target.domain == Domain::Incoming
            && why != Why::Order
        {
            target.orphaned = true;
            self.stats.guests_killed += 1;
        }
        self.fail_transfers(|transfer, source| transfer.target == id || source == id);
        let serving = |one: &Launcher| one.sends.as_ref().is_some_and(|sent| sent.status == Status::HandedOver);
        let hit = |source: u64, one: &Launcher| source == id || one.sends.as_ref().is_some_and(|t| t.target == id);
        let lost: Vec<u64> = self
            .launchers
            .all_of(&launcher.vmi)
            .filter(|(source, one)| serving(one) && hit(*source, one))
            .map(|(source, _)| source)
            .collect();
        for source in lost {
            self.never_follows(source);
        }
        self.tell_agent(&launcher);
    }

    /// Whether the guest lives (or would live, when the go comes) in this launcher and nowhere else.
    fn holds_guest(&self, launcher: &Launcher) -> bool {
        match launcher.domain {
            Domain::Running | Domain::Stopped => true,
            Domain::Serving => launcher.sends.as_ref().is_some_and(|sent| sent.status == Status::HandedOver),
            Domain::Incoming => launcher.loaded && !launcher.orphaned,
            _ => false,
        }
    }

    /// The agent of the launcher's node notices a change.
    pub fn tell_agent(&mut self, launcher: &Launcher) {
        let after = self.random.between(MS / 5, 3 * MS);
        self.look_after(launcher.node, &launcher.vmi, after);
        let Some(epoch) = self.nodes.get(launcher.node).map(|node| node.epoch) else { return };
        self.at(after, Event::Sync { node: launcher.node, epoch, pod: launcher.pod.clone() });
    }

    /// Active transfers break; their guests go on at the source.
    pub fn fail_transfers(&mut self, hit: impl Fn(&Transfer, u64) -> bool) {
        let (now, mut told) = (self.now, Vec::new());
        let sending: Vec<u64> = self.launchers.sending().collect();
        for id in sending {
            let Some(launcher) = self.launchers.get_mut(id) else { continue };
            // A QEMU that has sent everything never goes back.
            let breaks = |one: &&mut Transfer| one.status == Status::Active && !one.sent && hit(one, id);
            let Some(transfer) = launcher.sends.as_mut().filter(breaks) else { continue };
            transfer.status = Status::Failed;
            transfer.token += 1;
            // What QEMU stopped it continues; what the launcher stopped only the launcher does.
            let by_itself = !transfer.post_copy || launcher.stalled_until <= now;
            if launcher.ended.is_none() && launcher.domain == Domain::Stopped && by_itself {
                launcher.domain = Domain::Running;
            }
            let launcher = launcher.clone();
            self.launchers.note_sending(id);
            self.check_guest(&launcher.vmi);
            told.push(launcher);
        }
        for launcher in told {
            self.note(format!("migration of {} from {} breaks", launcher.vmi, self.name_of(launcher.node)));
            self.tell_agent(&launcher);
        }
    }

    /// The guest boots.
    pub fn boot_guest(&mut self, id: u64) {
        if let Some(launcher) = self.launchers.living_mut(id)
            && launcher.domain == Domain::Undefined
            && launcher.receives.is_none()
        {
            launcher.domain = Domain::Running;
            let launcher = launcher.clone();
            self.note(format!("{} runs in {} on {}", launcher.vmi, launcher.pod, self.name_of(launcher.node)));
            self.check_guest(&launcher.vmi);
            self.tell_agent(&launcher);
        }
    }

    /// A target's QEMU waits.
    pub fn prepared(&mut self, id: u64, uid: &str) {
        let Some(launcher) = self.launchers.living_mut(id) else { return };
        if launcher.domain == Domain::Undefined && launcher.receives.as_deref() == Some(uid) {
            launcher.domain = Domain::Incoming;
        }
        let launcher = launcher.clone();
        self.listen(id, uid);
        self.tell_agent(&launcher);
    }

    /// The handler of a launcher's node listens for a migration, on a port of its own.
    pub fn listen(&mut self, id: u64, uid: &str) {
        let port = self.random.between(20_000, 60_000);
        let node = self.launchers.get(id).map(|launcher| launcher.node);
        if let Some(node) = node.and_then(|node| self.nodes.get_mut(node)).filter(|node| node.alive && node.up) {
            node.listening.insert(uid.to_owned(), (port, id));
        }
    }

    /// The source's QEMU begins to send.
    pub fn send(&mut self, id: u64, uid: &str, target: u64) {
        // Once for a migration, whatever a handler that knows no better says.
        let fit = |one: &&Launcher| {
            let known = one.sends.as_ref().is_some_and(|transfer| transfer.uid == uid);
            one.ended.is_none() && one.domain == Domain::Running && !known
        };
        let Some(launcher) = self.launchers.get(id).filter(fit).cloned() else { return };
        let Some(guest) = self.guests.get(&launcher.vmi).copied() else { return };
        let bandwidth = guest.bandwidth as f64;
        let (mut bytes, mut seconds) = (guest.memory as f64, 0.0);
        for _ in 0..100 {
            seconds += bytes / bandwidth;
            bytes = (guest.dirty as f64 * (bytes / bandwidth)).min(guest.memory as f64);
            if bytes / bandwidth <= MAX_DOWNTIME {
                break;
            }
        }
        let endless = bytes / bandwidth > MAX_DOWNTIME;
        let copy = (seconds * 1e6) as u64;
        let switch = (bytes / bandwidth * 1e6) as u64 + self.random.between(2 * MS, 20 * MS);
        let token = self.random.next();
        let (now, node) = (self.now, launcher.node);
        self.note(format!(
            "{} is sent from {} ({copy} µs{})",
            launcher.vmi,
            self.name_of(node),
            if endless { ", endless" } else { "" }
        ));
        let transfer = Transfer {
            uid: uid.to_owned(),
            target,
            status: Status::Active,
            started: now,
            why: None,
            sent: false,
            post_copy: false,
            follows: 0,
            stands: false,
            token,
            due: (!endless).then_some(now + copy),
            left: copy,
            copy,
            endless,
            switch,
        };
        if let Some(launcher) = self.launchers.get_mut(id) {
            launcher.sends = Some(transfer);
        }
        self.launchers.note_sending(id);
        if !endless {
            self.at(copy, Event::Transfer { launcher: id, token });
        }
        if !self.flows(id) {
            self.links_changed();
        }
        self.reached(uid, &launcher.vmi, Step::Sends);
        self.tell_agent(&launcher);
    }

    /// The awaited step of an outgoing migration: first the switchover begins, then the target has what it needs, and in post-copy
    /// the rest at last.
    pub fn step_transfer(&mut self, id: u64, token: u64) {
        let now = self.now;
        let Some(launcher) = self.launchers.living_mut(id) else { return };
        let (domain, vmi) = (launcher.domain, launcher.vmi.clone());
        let Some(transfer) = launcher.sends.as_mut() else { return };
        if transfer.token != token || transfer.due.is_none() {
            return;
        }
        if transfer.status == Status::HandedOver {
            return self.is_whole(id);
        }
        if transfer.status != Status::Active || transfer.sent {
            return;
        }
        let uid = transfer.uid.clone();
        if domain == Domain::Running {
            launcher.domain = Domain::Stopped;
            transfer.stands = true;
            transfer.due = Some(now + transfer.switch);
            let after = transfer.switch;
            self.reached(&uid, &vmi, Step::Stands);
            return self.at(after, Event::Transfer { launcher: id, token });
        }
        let (target, post_copy) = (transfer.target, transfer.post_copy);
        let receives = self
            .launchers
            .get(target)
            .is_some_and(|target| target.ended.is_none() && target.domain == Domain::Incoming);
        if !receives {
            return self.fail_transfers(|_, source| source == id);
        }
        if let Some(target) = self.launchers.get_mut(target) {
            target.loaded = true;
            target.fills = post_copy;
            let target = target.clone();
            self.tell_agent(&target);
        }
        let Some(launcher) = self.launchers.get_mut(id) else { return };
        if let Some(transfer) = launcher.sends.as_mut() {
            transfer.sent = true;
            transfer.due = None;
        }
        // A launcher that stands still writes it down when it goes on; until then nobody may know.
        if launcher.stalled_until <= now {
            self.write_down(id);
        } else if self.wrong(Mutation::GoesUnwritten) {
            self.give_go(id, &uid);
        }
    }

    /// The source's launcher has seen what its QEMU has sent, and writes down that the guest has left. The point of no return.
    pub fn write_down(&mut self, id: u64) {
        let Some(launcher) = self.launchers.living_mut(id) else { return };
        let (node, vmi) = (launcher.node, launcher.vmi.clone());
        let Some(transfer) = launcher.sends.as_mut().filter(|one| one.sent && one.status == Status::Active) else {
            return;
        };
        let (uid, post_copy) = (transfer.uid.clone(), transfer.post_copy);
        if post_copy {
            self.begin_to_follow(id);
        } else {
            transfer.status = Status::Completed;
            launcher.domain = Domain::MigratedAway;
        }
        let Some(launcher) = self.launchers.get(id).cloned() else { return };
        self.launchers.note_sending(id);
        self.note(format!(
            "{vmi} has left {}: {}",
            self.name_of(node),
            if post_copy { "post-copy" } else { "completed" }
        ));
        self.strike_hand_over(&uid, &vmi);
        self.reached(&uid, &vmi, Step::Left);
        if self.nodes.get(node).is_some_and(|node| node.up && node.stalled_until <= self.now) {
            self.give_go(id, &uid);
        }
        self.tell_agent(&launcher);
    }

    /// A cut link has lasted for too long.
    pub fn break_transfer(&mut self, id: u64, token: u64) {
        self.fail_transfers(|transfer, source| source == id && transfer.token == token);
        let sends = self.launchers.get(id).and_then(|launcher| launcher.sends.as_ref());
        if sends.is_some_and(|transfer| transfer.status == Status::HandedOver && transfer.token == token) {
            self.never_follows(id);
        }
    }

    /// The handler cancels. Returns whether it came in time.
    pub fn cancel_transfer(&mut self, id: u64, uid: &str, why: Option<&'static str>) {
        let blind = self.wrong(Mutation::CancelsWhatHasLeft);
        let Some(launcher) = self.launchers.living_mut(id) else { return };
        // What has been sent is too late to be cancelled: the answer says so.
        let open = |one: &&mut Transfer| {
            one.uid == uid && (one.status == Status::Active && !one.sent || blind && one.status == Status::HandedOver)
        };
        let Some(transfer) = launcher.sends.as_mut().filter(open) else { return };
        transfer.status = Status::Cancelled;
        transfer.why = why;
        transfer.token += 1;
        launcher.domain = Domain::Running;
        let launcher = launcher.clone();
        self.launchers.note_sending(id);
        self.check_guest(&launcher.vmi);
        self.note(format!("sending {} from {} is cancelled", launcher.vmi, self.name_of(launcher.node)));
        self.tell_agent(&launcher);
    }

    /// Links have been cut or work again: transfers stand still or go on.
    pub fn links_changed(&mut self) {
        let now = self.now;
        let mut later = Vec::new();
        let ids: Vec<u64> = self.launchers.sending().collect();
        for id in ids {
            let Some(launcher) = self.launchers.get(id).filter(|launcher| launcher.ended.is_none()) else { continue };
            if launcher.sends.as_ref().is_none_or(|one| one.sent && one.status == Status::Active) {
                continue;
            }
            let open = self.flows(id);
            let Some(transfer) = self.launchers.get_mut(id).and_then(|launcher| launcher.sends.as_mut()) else {
                continue;
            };
            match transfer.due {
                Some(due) if !open => {
                    transfer.left = due.saturating_sub(now);
                    transfer.due = None;
                    later.push((BROKEN_AFTER, Event::Broken { launcher: id, token: transfer.token }));
                }
                None if open && !transfer.endless => {
                    transfer.token += 1;
                    transfer.due = Some(now + transfer.left);
                    later.push((transfer.left, Event::Transfer { launcher: id, token: transfer.token }));
                }
                None if !open && transfer.endless => {
                    later.push((BROKEN_AFTER, Event::Broken { launcher: id, token: transfer.token }));
                }
                None if open => transfer.token += 1,
                _ => {}
            }
        }
        for (after, event) in later {
            self.at(after, event);
        }
    }

    /// The source's handler tells the target's to go on, if it reaches it. Lost messages are repeated by the handler.
    pub fn give_go(&mut self, source: u64, uid: &str) {
        let Some(launcher) = self.launchers.get(source) else { return };
        let node = launcher.node;
        let Some(target) = launcher.sends.as_ref().and_then(|transfer| self.launchers.get(transfer.target)) else {
            return;
        };
        let target_node = target.node;
        if self.reaches(node, target_node) && self.nodes.get(target_node).is_some_and(|node| node.up) {
            let Some(epoch) = self.nodes.get(node).map(|node| node.epoch) else { return };
            let after = self.random.between(MS / 5, 3 * MS);
            self.at(after, Event::Go { uid: uid.to_owned(), source, epoch, target_node });
        }
    }

    /// The go arrives.
    pub fn take_go(&mut self, uid: &str, source: u64, epoch: u64, target_node: usize) {
        let Some(from) = self.launchers.get(source).map(|launcher| launcher.node) else { return };
        if !self.reaches(from, target_node) {
            return;
        }
        let Some(node) = self.nodes.get(target_node).filter(|node| node.up) else { return };
        let Some((_, id)) = node.listening.get(uid).copied() else { return };
        let now = self.now;
        let Some(launcher) = self.launchers.get_mut(id) else { return };
        let answer = match launcher.domain {
            _ if launcher.ended.is_some() => Answer::Lost,
            Domain::Incoming if launcher.loaded => {
                launcher.domain = Domain::Running;
                launcher.resumed = Some(now);
                let launcher = launcher.clone();
                self.reached(uid, &launcher.vmi, Step::Runs);
                self.note(format!("{} goes on in {} on {}", launcher.vmi, launcher.pod, self.name_of(target_node)));
                self.check_guest(&launcher.vmi);
                self.tell_agent(&launcher);
                Answer::Running
            }
            Domain::Running => Answer::Running,
            _ => Answer::Lost,
        };
        let after = self.random.between(MS / 5, 3 * MS);
        self.at(after, Event::GoAnswered { uid: uid.to_owned(), node: from, epoch, from: target_node, answer });
    }

    /// The answer arrives.
    pub fn take_answer(&mut self, uid: String, node: usize, epoch: u64, from: usize, answer: Answer) {
        if !self.reaches(node, from) {
            return;
        }
        let vmi = self.launchers.receiving(&uid).map(|(_, launcher)| launcher.vmi.clone());
        if let Some(node) = self.nodes.get_mut(node).filter(|node| node.epoch == epoch) {
            node.answers.insert(uid, answer);
        }
        if let Some(vmi) = vmi {
            self.look_after(node, &vmi, MS / 2);
        }
    }
}
