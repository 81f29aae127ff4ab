//! The handler of a node, at the level of facts: what crate `handler` decides and writes (docs/hand-over.md), without QEMU.

use std::sync::Arc;

use godwit_api::VmiPhase;
use godwit_api::vmi::{
    AbortStatus, MigrationMode, VirtualMachineInstance, VirtualMachineInstanceMigrationState as State,
};
use godwit_control::{Kind, Name, Object, Ref, Stored, names};
use serde_json::{Map, Value, json};

use crate::event::{Answer, Event, NodeWrite, Order};
use crate::machine::{Domain, Launcher, Status, Transfer};
use crate::mutation::Mutation;
use crate::sim::{MS, SECOND, Sim};
use crate::store::seconds;

/// How long the target may be out of reach before the start is given up.
const REACH_WITHIN: u64 = 30 * SECOND;
/// Between two attempts to reach it, or to give the go.
const REDIAL_AFTER: u64 = SECOND / 2;
/// The target reports the end when the source has not for so long.
const SOURCE_REPORTS_WITHIN: u64 = 30 * SECOND;
const ABORTED: &str = "Live migration has been aborted";

/// Changes of one VMI, written as one patch on the revision that was looked at.
#[derive(Default)]
struct Changes {
    status: Map<String, Value>,
    migration: Map<String, Value>,
    labels: Map<String, Value>,
}

impl Changes {
    fn phase(&mut self, phase: &str) {
        self.status.insert("phase".to_owned(), json!(phase));
    }

    fn state(&mut self, key: &str, value: Value) {
        self.migration.insert(key.to_owned(), value);
    }
}

/// The VMI as its handler on one node sees it.
struct Sight {
    index: usize,
    node: String,
    vmi: Arc<VirtualMachineInstance>,
}

impl Sight {
    fn own_node(&self) -> bool {
        self.vmi.status.node_name.as_deref() == Some(self.node.as_str())
    }
}

fn is(text: &Option<String>, wanted: &str) -> bool {
    text.as_deref() == Some(wanted)
}

impl Sim {
    /// The handler looks at a VMI and does what is to be done.
    pub fn look(&mut self, index: usize, epoch: u64, name: &Name) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        if node.epoch != epoch || !node.up || !node.alive {
            return;
        }
        if node.looks.get(name).is_some_and(|due| *due <= self.now) {
            node.looks.remove(name);
        }
        let target = Ref::new(Kind::VirtualMachineInstance, name.clone());
        // One write at a time: what is written now may change everything.
        if node.writing.contains(&target) {
            return;
        }
        let Some(Object::VirtualMachineInstance(vmi)) = node.cache.get(&target).cloned() else { return };
        let sight = Sight { index, node: node.name.clone(), vmi };
        let mut changes = Changes::default();
        self.act(&sight, &mut changes);
        self.end_strays(&sight);
        if changes.status.is_empty() && changes.migration.is_empty() && changes.labels.is_empty() {
            return;
        }
        let mut status = changes.status;
        if !changes.migration.is_empty() {
            status.insert("migrationState".to_owned(), Value::Object(changes.migration));
        }
        let mut metadata = match self.wrong(Mutation::HandlersWithoutRevisions) {
            true => json!({}),
            false => json!({"resourceVersion": sight.vmi.metadata.resource_version}),
        };
        if let (false, Some(metadata)) = (changes.labels.is_empty(), metadata.as_object_mut()) {
            metadata.insert("labels".to_owned(), Value::Object(changes.labels));
        }
        let patch = Some(json!({"metadata": metadata, "status": status}));
        let write = NodeWrite { target, uid: sight.vmi.uid().to_owned(), patch, status: false };
        self.send_write(index, write);
    }

    /// The launcher of a pod of the VMI on this node, if the handler knows the pod.
    fn pod_here(&self, sight: &Sight, pod: Option<&str>) -> Option<(u64, Launcher)> {
        let name = Name::new(sight.vmi.namespace(), pod?);
        let node = self.nodes.get(sight.index)?;
        let Some(Object::Pod(pod)) = node.cache.get(&Ref::new(Kind::Pod, name)) else { return None };
        if pod.label(names::LABEL_CREATED_BY) != Some(sight.vmi.uid()) {
            return None;
        }
        let found = self.launchers.of_pod(pod.uid()).filter(|(_, launcher)| !launcher.forgotten);
        // One that stands still tells nothing new; its end is seen by the kubelet.
        let known = |launcher: &Launcher| match (&launcher.seen, launcher.ended) {
            (Some(seen), None) => seen.as_ref().clone(),
            _ => launcher.clone(),
        };
        found.map(|(id, launcher)| (id, known(launcher)))
    }

    fn act(&mut self, sight: &Sight, changes: &mut Changes) {
        let state = sight.vmi.status.migration_state.clone().filter(|state| state.migration_uid.is_some());
        let Some(m) = state else {
            if sight.own_node() {
                let first = self.launchers.all_of(&sight.vmi.key()).find(|(_, launcher)| {
                    launcher.node == sight.index && launcher.vmi_uid == sight.vmi.uid() && launcher.receives.is_none()
                });
                let pod = first.map(|(_, launcher)| launcher.pod.name.clone());
                self.own_life(sight, pod.as_deref(), changes);
            }
            return;
        };
        let (source, target) = (is(&m.source_node, &sight.node), is(&m.target_node, &sight.node));
        match (m.completed == Some(true), m.failed == Some(true)) {
            (true, false) if target => {
                if let Some((_, launcher)) = self.pod_here(sight, m.target_pod.as_deref())
                    && launcher.resumed.is_some()
                    && (!sight.own_node() || m.target_node_domain_ready_timestamp.is_none())
                {
                    self.arrived(sight, changes);
                }
                self.own_life(sight, m.target_pod.as_deref(), changes);
            }
            (true, false) if source => self.departed(sight, &m),
            (true, true) if source => {
                // It left, and is lost: what remains of it here is of no use.
                let uid = m.migration_uid.as_deref().unwrap_or_default();
                if let Some((id, launcher)) = self.pod_here(sight, m.source_pod.as_deref())
                    && launcher.ended.is_none()
                    && launcher.sends.as_ref().is_some_and(|sent| sent.uid == uid)
                    && matches!(launcher.domain, Domain::MigratedAway | Domain::Serving)
                {
                    self.stop_launcher(id, MS);
                }
                self.own_life(sight, m.source_pod.as_deref(), changes);
            }
            (false, _) if source => {
                let goes_on = self.source(sight, &m, changes);
                if goes_on {
                    self.own_life(sight, m.source_pod.as_deref(), changes);
                }
            }
            (false, _) if target => self.target(sight, &m, changes),
            _ => {}
        }
    }

    /// The guest's own life on its node.
    fn own_life(&mut self, sight: &Sight, pod: Option<&str>, changes: &mut Changes) {
        let Some((id, launcher)) = self.pod_here(sight, pod) else { return };
        let (phase, deleting) = (&sight.vmi.status.phase, sight.vmi.deleting());
        if sight.vmi.is_final() {
            return;
        }
        let begun = matches!(phase, VmiPhase::Scheduled | VmiPhase::Running);
        match launcher.domain {
            Domain::Undefined if launcher.ended.is_some() => {}
            Domain::Undefined if deleting => self.stop_launcher(id, MS),
            Domain::Undefined if *phase == VmiPhase::Scheduled && !launcher.ordered => {
                if !self.may_run(sight.index) {
                    return self.look_after(sight.index, &sight.vmi.key(), SECOND);
                }
                if let Some(launcher) = self.launchers.get_mut(id) {
                    launcher.ordered = true;
                }
                let after = self.random.between(20 * MS, SECOND);
                self.at(after, Event::Booted { launcher: id });
            }
            Domain::Undefined if *phase == VmiPhase::Running && launcher.receives.is_none() => changes.phase("Failed"),
            Domain::Running if launcher.ended.is_none() => {
                if *phase == VmiPhase::Scheduled {
                    changes.phase("Running");
                }
                if sight.vmi.condition("LiveMigratable").is_none() {
                    let mut conditions = sight.vmi.status.conditions.clone();
                    conditions.push(godwit_api::Condition::new("LiveMigratable", true));
                    changes.status.insert("conditions".to_owned(), json!(conditions));
                    changes.status.insert("migrationMethod".to_owned(), json!("LiveMigration"));
                }
                if deleting {
                    self.stop_launcher(id, 10 * SECOND);
                }
            }
            Domain::Shutdown if begun => changes.phase("Succeeded"),
            Domain::Crashed if begun => changes.phase("Failed"),
            _ => {}
        }
    }

    /// The source half. Returns whether the guest's own life is to be looked after as well.
    fn source(&mut self, sight: &Sight, m: &State, changes: &mut Changes) -> bool {
        let Some(uid) = m.migration_uid.as_deref() else { return true };
        let Some((id, launcher)) = self.pod_here(sight, m.source_pod.as_deref()) else { return true };
        let sent = launcher.sends.clone().filter(|transfer| transfer.uid == uid);
        let left = |one: &&Transfer| {
            // In post-copy whatever comes after it: a link that breaks takes nothing back.
            one.status == Status::Completed || one.status == Status::HandedOver || one.post_copy && one.sent
        };
        if let Some(transfer) = sent.as_ref().filter(left) {
            self.hand_over(sight, m, id, transfer, changes);
            return false;
        }
        if sight.vmi.is_final() {
            return false;
        }
        if launcher.ended.is_some() {
            self.failed(sight, m, "the source's launcher is gone, and the guest with it", changes);
            return true;
        }
        match sent {
            None if launcher.domain != Domain::Running => {
                self.failed(sight, m, "the guest ended before the migration began", changes);
            }
            None => self.begin(sight, m, uid, id, changes),
            Some(transfer) if transfer.status == Status::Active => self.under_way(sight, m, id, &transfer, changes),
            Some(transfer) => {
                let wanted = m.abort_requested == Some(true) || m.abort_status.is_some();
                let reason = match transfer.why {
                    Some(why) => format!("{ABORTED}: {why}"),
                    None if wanted || transfer.status == Status::Cancelled => ABORTED.to_owned(),
                    None => "Live migration failed: the stream broke".to_owned(),
                };
                self.failed(sight, m, &reason, changes);
            }
        }
        true
    }

    /// Not started yet: reach the target, then start.
    fn begin(&mut self, sight: &Sight, m: &State, uid: &str, id: u64, changes: &mut Changes) {
        if m.abort_requested == Some(true) {
            return self.failed(sight, m, ABORTED, changes);
        }
        if sight.vmi.deleting() {
            return self.failed(sight, m, "Live migration has been aborted: the VMI is being deleted", changes);
        }
        if m.start_timestamp.is_some() {
            return self.failed(sight, m, "the launcher has no record of the migration that was started", changes);
        }
        let port = m.target_direct_migration_node_ports.keys().next().and_then(|port| port.parse::<u64>().ok());
        let (Some(port), Some(to)) = (port, m.target_node.as_deref()) else { return };
        let Some(to) = self.index_of(to) else { return };
        let listening = self.nodes.get(to).filter(|node| node.up).and_then(|node| node.listening.get(uid)).copied();
        let target = listening.filter(|(open, _)| *open == port && self.reaches(sight.index, to));
        let now = self.now;
        let Some(node) = self.nodes.get_mut(sight.index) else { return };
        let (since, reached) = *node.dialled.entry(uid.to_owned()).or_insert((now, None));
        match target {
            Some((_, target)) if reached == Some(port) => self.order(id, Order::Send { uid: uid.to_owned(), target }),
            Some(_) => {
                node.dialled.insert(uid.to_owned(), (since, Some(port)));
                let after = self.random.between(MS, 10 * MS);
                self.look_after(sight.index, &sight.vmi.key(), after);
            }
            None if now - since >= REACH_WITHIN => {
                self.failed(sight, m, "Live migration failed: the target cannot be reached", changes);
            }
            None => self.look_after(sight.index, &sight.vmi.key(), REDIAL_AFTER),
        }
    }

    /// Memory is being sent.
    fn under_way(&mut self, sight: &Sight, m: &State, id: u64, transfer: &Transfer, changes: &mut Changes) {
        let name = sight.vmi.key();
        if m.start_timestamp.is_none() {
            let (started, mode) = (seconds(self.moment(transfer.started)), json!("PreCopy"));
            changes.state("startTimestamp", started);
            changes.state("mode", mode);
            return;
        }
        if m.abort_requested == Some(true) && m.abort_status.is_none() {
            self.order(id, Order::Cancel { uid: transfer.uid.clone(), why: None });
            changes.state("abortStatus", json!("Aborting"));
            return;
        }
        let configuration = m.migration_configuration.clone().unwrap_or_default();
        let memory = self.guests.get(&name).map_or(0, |guest| guest.memory);
        let budget = godwit_api::config::completion_timeout_seconds(&configuration, memory).unwrap_or(0) * SECOND;
        let patience = u64::try_from(configuration.progress_timeout.unwrap_or(0)).unwrap_or(0) * SECOND;
        let elapsed = self.now - transfer.started;
        let cancel = |why| Order::Cancel { uid: transfer.uid.clone(), why: Some(why) };
        if sight.vmi.deleting() {
            return self.order(id, cancel("the VMI is being deleted"));
        }
        let spent = budget > 0 && elapsed > budget;
        let stuck = transfer.endless && patience > 0 && elapsed > patience;
        let aborting = m.abort_requested == Some(true) || m.abort_status.is_some();
        if (spent || stuck) && configuration.allow_post_copy == Some(true) && !transfer.post_copy && !aborting {
            self.order(id, Order::PostCopy { uid: transfer.uid.clone() });
            return self.look_after(sight.index, &name, REDIAL_AFTER);
        }
        if spent && !transfer.post_copy {
            return self.order(id, cancel("not completed in time"));
        }
        if stuck {
            return self.order(id, cancel("the guest writes faster than the link carries"));
        }
        let now = self.now;
        let Some(node) = self.nodes.get_mut(sight.index) else { return };
        let reported = node.reported.get(&transfer.uid).copied().unwrap_or(transfer.started);
        let every = u64::try_from(self.options.report_every.as_micros()).unwrap_or(SECOND);
        if now - reported >= every
            && let Some(guest) = self.guests.get(&name)
        {
            node.reported.insert(transfer.uid.clone(), now);
            let copied = transfer.copied(guest, now);
            let done = copied.processed * 100 / (copied.processed + copied.remaining).max(1);
            // As the real one: what was told once is not taken back, whatever a launcher says that has stood still.
            let before = m.progress.clone().unwrap_or_default();
            changes.state(
                "progress",
                json!({
                    "percent": u64::from(before.percent.unwrap_or(0)).max(done),
                    "bytesTotal": guest.memory,
                    "bytesProcessed": copied.processed.max(before.bytes_processed.unwrap_or(0)),
                    "bytesRemaining": copied.remaining,
                    "bytesPerSecond": guest.bandwidth,
                    "dirtyBytesPerSecond": guest.dirty,
                    "iteration": copied.iteration.max(before.iteration.unwrap_or(0)),
                    "totalMilliseconds": (elapsed / 1000).max(before.total_milliseconds.unwrap_or(0)),
                }),
            );
        }
        self.look_after(sight.index, &name, every);
    }

    /// The source's QEMU is done for good: only the go matters.
    fn hand_over(&mut self, sight: &Sight, m: &State, id: u64, transfer: &Transfer, changes: &mut Changes) {
        let answer = self.nodes.get(sight.index).and_then(|node| node.answers.get(&transfer.uid)).copied();
        let aborted = m.abort_requested == Some(true);
        let follows = transfer.status != Status::Completed;
        if aborted && follows && self.wrong(Mutation::CancelsWhatHasLeft) {
            self.order(id, Order::Cancel { uid: transfer.uid.clone(), why: None });
        }
        match answer {
            Some(Answer::Running) if follows && !sight.vmi.is_final() && self.target_ended_unseen(sight, m) => {
                changes.phase("Failed");
                self.failed(sight, m, "the guest was handed over and is lost with the target's pod", changes);
                if aborted {
                    changes.state("abortStatus", json!("Failed"));
                }
            }
            // A part of its memory is still to follow, and whoever has it knows when all is there, or never will be.
            Some(Answer::Running) if follows && !self.wrong(Mutation::EndsBeforeAllFollowed) => {
                if m.start_timestamp.is_none() {
                    let started = seconds(self.moment(transfer.started));
                    changes.state("startTimestamp", started);
                }
                if aborted && m.abort_status != Some(AbortStatus::Failed) {
                    changes.state("abortStatus", json!("Failed"));
                }
                if transfer.post_copy && m.mode != Some(MigrationMode::PostCopy) {
                    changes.state("mode", json!("PostCopy"));
                }
                if sight.vmi.is_final() {
                    self.failed(sight, m, "the guest was handed over and is lost", changes);
                } else {
                    self.look_after(sight.index, &sight.vmi.key(), SECOND);
                }
            }
            Some(Answer::Running) => {
                if m.start_timestamp.is_none() {
                    let started = seconds(self.moment(transfer.started));
                    changes.state("startTimestamp", started);
                }
                if aborted {
                    changes.state("abortStatus", json!("Failed"));
                }
                changes.state("completed", json!(true));
                let ended = seconds(self.node_time(sight.index));
                changes.state("endTimestamp", ended);
            }
            Some(Answer::Lost) => {
                if !sight.vmi.is_final() {
                    changes.phase("Failed");
                }
                self.failed(sight, m, "the guest was handed over and is lost", changes);
                if aborted {
                    changes.state("abortStatus", json!("Failed"));
                }
            }
            None if sight.vmi.is_final() => {
                self.failed(sight, m, "the target was lost after the guest had been handed over", changes);
            }
            None if self.target_ended_unseen(sight, m) => {
                changes.phase("Failed");
                self.failed(sight, m, "the guest was handed over and is lost with the target's pod", changes);
                if aborted {
                    changes.state("abortStatus", json!("Failed"));
                }
            }
            None => {
                self.give_go(id, &transfer.uid);
                self.look_after(sight.index, &sight.vmi.key(), REDIAL_AFTER);
            }
        }
    }

    /// Whether the API, if this node reaches it, says that the target's pod has ended and never that the guest was there.
    fn target_ended_unseen(&self, sight: &Sight, m: &State) -> bool {
        let reached = self.nodes.get(sight.index).is_some_and(|node| node.reaches_api());
        let arrived = m.target_node_domain_ready_timestamp.is_some() || sight.vmi.status.node_name == m.target_node;
        let Some(pod) = m.target_pod.as_deref().filter(|_| reached && !arrived) else { return false };
        match self.store.get(&Ref::new(Kind::Pod, Name::new(sight.vmi.namespace(), pod))) {
            Some(Object::Pod(pod)) => godwit_control::placement::is_finished(pod),
            _ => true,
        }
    }

    /// The target half.
    fn target(&mut self, sight: &Sight, m: &State, changes: &mut Changes) {
        let Some(uid) = m.migration_uid.as_deref() else { return };
        let Some((id, launcher)) = self.pod_here(sight, m.target_pod.as_deref()) else { return };
        if launcher.receives.as_deref() != Some(uid) {
            return;
        }
        if launcher.ended.is_some() {
            // In post-copy the guest has ended with it: a part of it was still elsewhere.
            if launcher.fills && !sight.vmi.is_final() {
                changes.phase("Failed");
                self.failed(sight, m, "VMI is irrecoverable due to failed post-copy migration", changes);
            }
            return;
        }
        let open = self.nodes.get(sight.index).and_then(|node| node.listening.get(uid)).copied();
        if let (Some(resumed), Domain::Running) = (launcher.resumed, launcher.domain) {
            if open.is_none() {
                self.listen(id, uid);
                self.publish(sight, uid, m, changes);
            }
            let waited = self.now - resumed;
            if m.target_node_domain_ready_timestamp.is_none() || !sight.own_node() {
                self.arrived(sight, changes);
            } else if launcher.fills {
                self.look_after(sight.index, &sight.vmi.key(), SECOND);
            } else if waited >= SOURCE_REPORTS_WITHIN {
                if m.abort_requested == Some(true) {
                    changes.state("abortStatus", json!("Failed"));
                }
                changes.state("completed", json!(true));
                let ended = seconds(self.node_time(sight.index));
                changes.state("endTimestamp", ended);
            } else {
                self.look_after(sight.index, &sight.vmi.key(), SOURCE_REPORTS_WITHIN - waited);
            }
            return;
        }
        if sight.vmi.is_final() {
            if launcher.domain == Domain::Incoming {
                self.stop_launcher(id, MS);
            }
            return;
        }
        match launcher.domain {
            // Whoever says that the guest is lost must know that it does not run.
            Domain::Broken => self.stop_launcher(id, MS),
            Domain::Incoming if launcher.loaded && self.wrong(Mutation::GivesUpLoaded) => self.stop_launcher(id, MS),
            Domain::Undefined if !launcher.ordered => {
                if !self.may_run(sight.index) {
                    return self.look_after(sight.index, &sight.vmi.key(), SECOND);
                }
                if let Some(launcher) = self.launchers.get_mut(id) {
                    launcher.ordered = true;
                }
                let after = self.random.between(30 * MS, 800 * MS);
                self.at(after, Event::Prepared { launcher: id, uid: uid.to_owned() });
            }
            Domain::Incoming => {
                if open.is_none() {
                    self.listen(id, uid);
                }
                self.publish(sight, uid, m, changes);
            }
            _ => {}
        }
    }

    /// Where the target listens.
    fn publish(&mut self, sight: &Sight, uid: &str, m: &State, changes: &mut Changes) {
        let Some((port, _)) = self.nodes.get(sight.index).and_then(|node| node.listening.get(uid)).copied() else {
            return;
        };
        let port = port.to_string();
        let published = &m.target_direct_migration_node_ports;
        if published.len() == 1 && published.contains_key(&port) && m.target_node_address.is_some() {
            return;
        }
        let mut ports: Map<String, Value> = published.keys().map(|old| (old.clone(), Value::Null)).collect();
        ports.insert(port, json!(0));
        changes.state("targetNodeAddress", json!(format!("10.88.0.{}", 11 + sight.index)));
        changes.state("targetDirectMigrationNodePorts", Value::Object(ports));
        changes.state("targetNodeDomainDetected", json!(true));
    }

    /// The guest lives here now.
    fn arrived(&mut self, sight: &Sight, changes: &mut Changes) {
        let at = seconds(self.node_time(sight.index));
        changes.labels.insert(names::LABEL_NODE_NAME.to_owned(), json!(sight.node));
        changes.status.insert("nodeName".to_owned(), json!(sight.node));
        changes.state("targetNodeDomainDetected", json!(true));
        changes.state("targetNodeDomainReadyTimestamp", at);
    }

    /// The guest has left: the launcher that sent it ends.
    fn departed(&mut self, sight: &Sight, m: &State) {
        if let Some((id, launcher)) = self.pod_here(sight, m.source_pod.as_deref())
            && launcher.domain == Domain::MigratedAway
            && launcher.ended.is_none()
        {
            self.stop_launcher(id, MS);
        }
    }

    /// Targets of migrations that did not happen end.
    fn end_strays(&mut self, sight: &Sight) {
        let m = sight.vmi.status.migration_state.as_ref();
        let strays: Vec<u64> = self
            .launchers
            .living_of(&sight.vmi.key())
            .filter(|(_, launcher)| launcher.node == sight.index && launcher.vmi_uid == sight.vmi.uid())
            .filter(|(_, launcher)| launcher.resumed.is_none())
            .filter(|(_, launcher)| {
                let Some(uid) = launcher.receives.as_deref() else { return false };
                let own = m.filter(|m| is(&m.migration_uid, uid));
                match launcher.domain {
                    // A migration that is over, or that another one has followed.
                    Domain::Incoming => match own {
                        Some(own) => own.completed == Some(true) && own.failed == Some(true),
                        None => true,
                    },
                    Domain::Undefined => own.is_some_and(|own| own.failed == Some(true)),
                    _ => false,
                }
            })
            .map(|(id, _)| id)
            .collect();
        for id in strays {
            self.stop_launcher(id, MS);
        }
    }

    /// The guest stays; say so.
    fn failed(&mut self, sight: &Sight, m: &State, reason: &str, changes: &mut Changes) {
        if m.abort_requested == Some(true) || m.abort_status == Some(AbortStatus::Aborting) {
            changes.state("abortStatus", json!("Succeeded"));
        }
        changes.state("completed", json!(true));
        changes.state("failed", json!(true));
        changes.state("failureReason", json!(reason));
        let ended = seconds(self.node_time(sight.index));
        changes.state("endTimestamp", ended);
    }
}
