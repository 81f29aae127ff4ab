//! A node's agent: its view of the API, its writes, and the kubelet's half of its work.

use std::collections::BTreeSet;

use godwit_control::{Kind, Name, Object, Ref, Stored, names};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::event::{Event, NodeWrite};
use crate::machine::{Domain, Launcher, Why};
use crate::sim::{MS, SECOND, Sim};
use crate::store::{Commit, Refusal};

/// How long a node may be silent, in seconds.
const LEASE_SECONDS: i32 = 39;

impl Sim {
    /// The name of a node.
    pub fn name_of(&self, node: usize) -> &str {
        self.nodes.get(node).map_or("?", |node| node.name.as_str())
    }

    /// The time that a node reads off its clock.
    pub fn node_time(&self, index: usize) -> Timestamp {
        let skew = self.nodes.get(index).map_or(0, |node| node.skew);
        self.time() + SignedDuration::from_micros(skew)
    }

    /// The number of a node.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        let number: usize = name.strip_prefix("node")?.parse().ok()?;
        number.checked_sub(1).filter(|index| *index < self.nodes.len())
    }

    /// Which nodes watch an object: pods by their node, VMIs by the handler's two labels (docs/architecture.md). A handler that
    /// still has a launcher of a VMI reads it though no label shows it any more.
    fn watchers(&self, object: &Object) -> Vec<usize> {
        let names: [Option<&str>; 2] = match object {
            Object::Pod(pod) => [pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()), None],
            Object::VirtualMachineInstance(vmi) => {
                [vmi.label(names::LABEL_NODE_NAME), vmi.label(names::LABEL_MIGRATION_TARGET_NODE_NAME)]
            }
            _ => [None, None],
        };
        let mut nodes: Vec<usize> = names.into_iter().flatten().filter_map(|name| self.index_of(name)).collect();
        if let Object::VirtualMachineInstance(vmi) = object {
            let name = vmi.key();
            let launchers = self.launchers.living_of(&name).filter(|(_, one)| one.vmi_uid == vmi.uid());
            nodes.extend(launchers.map(|(_, launcher)| launcher.node));
        }
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// A change is on its way to the nodes that watch the object.
    pub fn feed_nodes(&mut self, commit: &Commit) {
        if !matches!(commit.latest, Object::Pod(_) | Object::VirtualMachineInstance(_)) {
            return;
        }
        let now_seen = if commit.gone { Vec::new() } else { self.watchers(&commit.latest) };
        let seen_before = commit.before.as_ref().map(|before| self.watchers(before)).unwrap_or_default();
        if now_seen != seen_before {
            let target = commit.latest.reference();
            for node in &seen_before {
                if let Some(watched) = self.watched.get_mut(node) {
                    watched.remove(&target);
                }
            }
            for node in &now_seen {
                self.watched.entry(*node).or_default().insert(target.clone());
            }
        }
        let mut nodes: Vec<usize> = now_seen.iter().chain(&seen_before).copied().collect();
        nodes.sort_unstable();
        nodes.dedup();
        for index in nodes {
            let delay = self.random.between(MS / 2, 15 * MS);
            let now = self.now;
            let Some(node) = self.nodes.get_mut(index) else { continue };
            node.last_news = node.last_news.max(now + delay);
            let (after, epoch) = (node.last_news - now, node.epoch);
            let object = now_seen.contains(&index).then(|| commit.latest.clone());
            self.at(after, Event::NodeNews { node: index, epoch, target: commit.latest.reference(), object });
        }
    }

    /// News arrive at a node.
    pub fn take_node_news(&mut self, index: usize, epoch: u64, target: Ref, object: Option<Object>) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        if node.epoch != epoch || !node.up || !node.reaches_api() || self.store_down {
            return;
        }
        match object {
            Some(object) => {
                let held = node.cache.get(&target).map_or(0, Object::revision);
                if held < object.revision() {
                    node.cache.insert(target.clone(), object);
                }
            }
            None => {
                node.cache.remove(&target);
            }
        }
        self.consider(index, &target);
    }

    /// The agent lists what it watches.
    pub fn agent_lists(&mut self, index: usize, epoch: u64) {
        let current = self.nodes.get(index).is_some_and(|node| node.epoch == epoch && node.reaches_api());
        if !current || self.store_down {
            return;
        }
        // A launcher that lives here shows its VMI though no label does.
        let held = self.launchers.living_on(index);
        let held = held.iter().filter_map(|id| self.launchers.get(*id)).map(|launcher| launcher.vmi.clone());
        let mut wanted: BTreeSet<Ref> = held.map(|vmi| Ref::new(Kind::VirtualMachineInstance, vmi)).collect();
        wanted.extend(self.watched.get(&index).into_iter().flatten().cloned());
        let mine: Vec<Object> = wanted
            .iter()
            .filter_map(|target| self.store.get(target))
            .filter(|object| self.watchers(object).contains(&index))
            .cloned()
            .collect();
        let Some(node) = self.nodes.get_mut(index) else { return };
        if !node.up {
            self.launchers.forget_ended_on(index);
            node.fence.forget_answers(self.now);
        }
        let mut targets: Vec<Ref> = node.cache.keys().cloned().collect();
        node.cache = mine.into_iter().map(|object| (object.reference(), object)).collect();
        node.up = true;
        targets.extend(node.cache.keys().cloned());
        for id in self.launchers.living_on(index) {
            if let Some(launcher) = self.launchers.get(id) {
                targets.push(Ref::new(Kind::Pod, launcher.pod.clone()));
            }
        }
        targets.sort();
        targets.dedup();
        for target in targets {
            self.consider(index, &target);
        }
    }

    /// Looks again at what an object is about.
    fn consider(&mut self, index: usize, target: &Ref) {
        let Some(node) = self.nodes.get(index) else { return };
        let epoch = node.epoch;
        let vmi = match (target.kind, node.cache.get(target)) {
            (Kind::VirtualMachineInstance, _) => Some(target.name.clone()),
            (_, Some(Object::Pod(pod))) => {
                pod.annotation(names::ANNOTATION_DOMAIN).map(|vmi| Name::new(pod.namespace(), vmi))
            }
            _ => None,
        };
        if let Some(vmi) = vmi {
            self.look_after(index, &vmi, MS / 2);
        }
        if target.kind == Kind::Pod {
            self.at(MS / 2, Event::Sync { node: index, epoch, pod: target.name.clone() });
        }
    }

    /// The handler of a node looks at a VMI after a while, or earlier if it is going to anyway.
    pub fn look_after(&mut self, index: usize, vmi: &Name, after: u64) {
        let at = self.now + after;
        let Some(node) = self.nodes.get_mut(index) else { return };
        if node.looks.get(vmi).is_some_and(|due| *due <= at && *due > self.now) {
            return;
        }
        node.looks.insert(vmi.clone(), at);
        let epoch = node.epoch;
        self.at(after, Event::Look { node: index, epoch, vmi: vmi.clone() });
    }

    /// A write sets out; one at a time for each object.
    pub fn send_write(&mut self, index: usize, write: NodeWrite) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        if node.writing.insert(write.target.clone()) {
            let epoch = node.epoch;
            let after = self.random.between(MS, 10 * MS);
            self.at(after, Event::Write { node: index, epoch, write });
        }
    }

    /// A write of a node arrives.
    pub fn take_write(&mut self, index: usize, epoch: u64, write: NodeWrite) {
        let now = self.time();
        let Some(node) = self.nodes.get_mut(index).filter(|node| node.epoch == epoch) else { return };
        node.writing.remove(&write.target);
        let (name, reached) = (node.name.clone(), node.reaches_api() && !self.store_down);
        if !reached {
            return self.retry(index, epoch, &write.target, SECOND);
        }
        let same =
            self.store.get(&write.target).is_some_and(|object| object.metadata().uid.as_deref() == Some(&write.uid));
        let answer = match (&write.patch, same) {
            (_, false) => Err(Refusal::NotFound),
            (Some(patch), true) => self.store.merge(&write.target, write.status, patch).map(Some),
            (None, true) => self.store.delete(&write.target, &write.uid, Some(0), now),
        };
        match &answer {
            Ok(_) => {
                let what = write.patch.as_ref().and_then(|patch| patch.get("status"));
                let what = what.map_or_else(|| "deletes".to_owned(), brief);
                self.note(format!("[{name}] {what} of {}", write.target));
            }
            Err(refusal) => self.note(format!("[{name}] writes {}: {refusal:?}", write.target)),
        }
        self.spread();
        let fresh = match answer {
            Ok(object) => object,
            Err(Refusal::Conflict) => self.store.get(&write.target).cloned(),
            Err(_) => return,
        };
        if let Some(node) = self.nodes.get_mut(index) {
            match fresh {
                Some(object)
                    if node.cache.get(&write.target).is_some_and(|held| held.revision() < object.revision()) =>
                {
                    node.cache.insert(write.target.clone(), object);
                }
                Some(_) => {}
                None => {
                    node.cache.remove(&write.target);
                }
            }
        }
        self.retry(index, epoch, &write.target, MS / 2);
    }

    fn retry(&mut self, index: usize, epoch: u64, target: &Ref, after: u64) {
        match target.kind {
            Kind::Pod => self.at(after, Event::Sync { node: index, epoch, pod: target.name.clone() }),
            _ => self.look_after(index, &target.name.clone(), after),
        }
    }

    /// The kubelet makes a pod what it shall be.
    pub fn sync_pod(&mut self, index: usize, epoch: u64, name: &Name) {
        let Some(node) = self.nodes.get(index) else { return };
        if node.epoch != epoch || !node.up || !node.alive {
            return;
        }
        let target = Ref::new(Kind::Pod, name.clone());
        let pod = match node.cache.get(&target) {
            Some(Object::Pod(pod)) => pod.clone(),
            _ => {
                // Pods that the API does not know are ended.
                let gone = self.launchers.named(name).filter(|(_, launcher)| launcher.node == index);
                let gone: Vec<u64> = gone.map(|(id, _)| id).collect();
                for id in gone {
                    self.end_launcher(id, Why::Order);
                }
                return;
            }
        };
        let (boot, pulling) = (node.boot, node.pulling.contains(pod.uid()));
        let found = self.launchers.of_pod(pod.uid()).map(|(id, launcher)| (id, launcher.clone()));
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
        let finished = godwit_control::placement::is_finished(&pod);
        match found {
            None if pod.deleting() => self.write_pod(index, &pod, None),
            None if phase == "Running" => self.write_pod(index, &pod, Some(status("Failed", false))),
            None if !finished && !pulling => {
                let slow = self.faulty(|faults| faults.slow_pulls_per_mille);
                let after =
                    if slow { self.random.between(SECOND, 400 * SECOND) } else { self.random.between(20 * MS, SECOND) };
                if let Some(node) = self.nodes.get_mut(index) {
                    node.pulling.insert(pod.uid().to_owned());
                }
                self.at(after, Event::Pulled { node: index, boot, pod: name.clone(), uid: pod.uid().to_owned() });
            }
            None => {}
            Some((id, launcher)) if launcher.ended.is_none() && pod.deleting() => self.stop_launcher(id, 10 * SECOND),
            Some((_, launcher)) => match launcher.ended {
                None if phase != "Running" => self.write_pod(index, &pod, Some(status("Running", true))),
                Some(well) if !finished => {
                    self.write_pod(index, &pod, Some(status(if well { "Succeeded" } else { "Failed" }, false)));
                }
                Some(_) if pod.deleting() => self.write_pod(index, &pod, None),
                _ => {}
            },
        }
    }

    /// A launcher is told to end, within so long.
    pub fn stop_launcher(&mut self, id: u64, within: u64) {
        if let Some(launcher) = self.launchers.get_mut(id)
            && !launcher.stopping
            && launcher.ended.is_none()
        {
            launcher.stopping = true;
            let quick = !matches!(launcher.domain, Domain::Running);
            let after =
                if quick { self.random.between(MS, 20 * MS) } else { self.random.between(MS, within.max(2 * MS)) };
            self.at(after, Event::Ended { launcher: id });
        }
    }

    /// A pod's image is there: its launcher starts, unless the pod is not wanted any more.
    pub fn pulled(&mut self, index: usize, boot: u64, name: Name, uid: String) {
        let Some(node) = self.nodes.get_mut(index).filter(|node| node.boot == boot && node.alive) else { return };
        node.pulling.remove(&uid);
        let Some(Object::Pod(pod)) = node.cache.get(&Ref::new(Kind::Pod, name.clone())).cloned() else { return };
        let epoch = node.epoch;
        if pod.uid() != uid || pod.deleting() || !node.up {
            return self.at(MS, Event::Sync { node: index, epoch, pod: name });
        }
        self.launchers.insert(Launcher {
            node: index,
            vmi: Name::new(pod.namespace(), pod.annotation(names::ANNOTATION_DOMAIN).unwrap_or_default()),
            vmi_uid: pod.label(names::LABEL_CREATED_BY).unwrap_or_default().to_owned(),
            receives: pod.label(names::LABEL_MIGRATION_JOB_UID).map(str::to_owned),
            pod: name.clone(),
            pod_uid: uid,
            domain: Domain::Undefined,
            loaded: false,
            resumed: None,
            sends: None,
            ended: None,
            stopping: false,
            ordered: false,
            forgotten: false,
            orphaned: false,
            fills: false,
            stalled_until: 0,
            frozen_until: 0,
            seen: None,
        });
        self.note(format!("launcher {name} starts on {}", self.name_of(index)));
        self.at(MS, Event::Sync { node: index, epoch, pod: name });
    }

    fn write_pod(&mut self, index: usize, pod: &Pod, patch: Option<Value>) {
        let write = NodeWrite { target: pod.reference(), uid: pod.uid().to_owned(), patch, status: true };
        self.send_write(index, write);
    }

    /// The node says that it lives.
    pub fn heartbeat(&mut self, index: usize, boot: u64) {
        let now = self.node_time(index);
        let Some(node) = self.nodes.get(index).filter(|node| node.boot == boot && node.alive) else { return };
        let (name, reached) = (node.name.clone(), node.reaches_api() && !self.store_down);
        self.at(Sim::HEARTBEAT, Event::Heartbeat { node: index, boot });
        if !reached {
            return;
        }
        let lease = Ref::new(Kind::Lease, Name::new(godwit_control::node::LEASES, name.as_str()));
        self.store.renew_lease(&lease, &name, LEASE_SECONDS, now, &mut self.random);
        let target = Ref::new(Kind::Node, Name::cluster(name.as_str()));
        let ready = match self.store.get(&target) {
            Some(Object::Node(node)) => godwit_control::placement::is_ready(node),
            _ => true,
        };
        if !ready {
            let conditions = json!([{"type": "Ready", "status": "True", "lastHeartbeatTime": crate::store::seconds(now),
                    "lastTransitionTime": crate::store::seconds(now)}]);
            let _ = self.store.merge(&target, true, &json!({"status": {"conditions": conditions}}));
        }
        self.spread();
    }
}

/// A pod's status as a kubelet writes it.
fn status(phase: &str, ready: bool) -> Value {
    let ready_word = if ready { "True" } else { "False" };
    json!({"status": {
        "phase": phase,
        "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": ready_word}],
        "containerStatuses":
            [{"name": "compute", "ready": ready, "image": "i", "imageID": "i", "restartCount": 0}],
    }})
}

/// A status patch in short.
fn brief(status: &Value) -> String {
    let mut parts = Vec::new();
    for (key, value) in status.as_object().into_iter().flatten() {
        match (key.as_str(), value) {
            ("phase" | "nodeName", value) => parts.push(format!("{key}={value}")),
            ("migrationState", value) => parts.push(format!("{key}={}", crate::trace::keys(value))),
            _ => {}
        }
    }
    format!("writes {}", if parts.is_empty() { "status".to_owned() } else { parts.join(" ") })
}
