//! Limits are never exceeded: counted on the truth (what exists in the store), never on anybody's cache.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use godwit_control::{Kind, Name, Object, Ref, Stored, names, placement};

use crate::check::Rule;
use crate::sim::{SECOND, Sim};
use crate::store::Commit;

/// For so long after limits have been lowered a migration may still begin by the old ones: the news of it may be on their way,
/// a watch may have broken, and a controller may stand still with a decision taken before.
const OLD_LIMITS_HOLD: u64 = 25 * SECOND;

/// How many migrations may be under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// In the cluster.
    pub cluster: u32,
    /// From one node.
    pub outbound: u32,
    /// To one node.
    pub inbound: u32,
}

/// A migration that takes up room: past Pending, or with a target pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Slot {
    vmi: Name,
    source: Option<String>,
    targets: BTreeSet<String>,
}

/// What is counted; kept up with every write.
#[derive(Default)]
pub struct Count {
    slots: BTreeMap<String, Slot>,
    from: BTreeMap<String, u32>,
    to: BTreeMap<String, u32>,
    of: BTreeMap<Name, u32>,
    /// By migration: its target pods that have not ended, and where they are.
    targets: BTreeMap<String, BTreeMap<Ref, Option<String>>>,
    /// By VMI: migrations that take up room.
    by_vmi: BTreeMap<Name, BTreeSet<String>>,
    /// Limits, and until when those before the last may still be used.
    limits: VecDeque<(u64, Limits)>,
}

impl Sim {
    /// Takes in a write.
    pub fn count(&mut self, commit: &Commit) {
        match &commit.latest {
            Object::Migration(migration) => {
                let uid = migration.uid().to_owned();
                self.recount(&uid, commit.gone);
            }
            Object::Pod(pod) => {
                let Some(uid) = pod.label(names::LABEL_MIGRATION_JOB_UID).map(str::to_owned) else { return };
                let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
                let target = commit.latest.reference();
                if commit.gone || placement::is_finished(pod) {
                    if let Some(pods) = self.counted.targets.get_mut(&uid) {
                        pods.remove(&target);
                        if pods.is_empty() {
                            self.counted.targets.remove(&uid);
                        }
                    }
                } else {
                    self.counted.targets.entry(uid.clone()).or_default().insert(target, node);
                }
                self.recount(&uid, false);
            }
            Object::VirtualMachineInstance(vmi) => {
                let uids: Vec<String> = self.counted.by_vmi.get(&vmi.key()).into_iter().flatten().cloned().collect();
                for uid in uids {
                    self.recount(&uid, false);
                }
            }
            Object::KubeVirt(_) | Object::ConfigMap(_) => self.take_limits(),
            _ => {}
        }
    }

    fn take_limits(&mut self) {
        let mut found = None;
        for object in self.store.list(Kind::KubeVirt) {
            if let Object::KubeVirt(kubevirt) = object {
                let in_force = godwit_api::config::effective(Some(kubevirt), None);
                found = Some(Limits {
                    cluster: in_force.parallel_migrations_per_cluster.unwrap_or(0),
                    outbound: in_force.parallel_outbound_migrations_per_node.unwrap_or(0),
                    inbound: in_force.parallel_inbound_migrations_per_node.unwrap_or(0),
                });
            }
        }
        let Some(found) = found else { return };
        let until = self.now + OLD_LIMITS_HOLD;
        if let Some(last) = self.counted.limits.back_mut() {
            if last.1 == found {
                return;
            }
            last.0 = until;
        }
        self.counted.limits.push_back((u64::MAX, found));
    }

    /// The highest limits that may be used now.
    fn highest(&mut self) -> Limits {
        while self.counted.limits.front().is_some_and(|(until, _)| *until < self.now) {
            self.counted.limits.pop_front();
        }
        let all = &self.counted.limits;
        let most = |of: fn(&Limits) -> u32| all.iter().map(|(_, limits)| of(limits)).max().unwrap_or(u32::MAX);
        Limits {
            cluster: most(|one| one.cluster),
            outbound: most(|one| one.outbound),
            inbound: most(|one| one.inbound),
        }
    }

    /// What a migration takes up now.
    fn slot(&self, uid: &str) -> Option<Slot> {
        let Some(Object::Migration(migration)) = self.store.get_by_uid(uid) else { return None };
        let pods = self.counted.targets.get(uid);
        if migration.is_final() || !(migration.status.phase.is_running() || pods.is_some()) {
            return None;
        }
        let name = Name::new(migration.namespace(), migration.vmi_name());
        let mut source = None;
        if let Some(Object::VirtualMachineInstance(vmi)) =
            self.store.get(&Ref::new(Kind::VirtualMachineInstance, name.clone()))
        {
            let state = vmi.status.migration_state.as_ref();
            let own = state.filter(|state| state.migration_uid.as_deref() == Some(uid));
            source = own.and_then(|state| state.source_node.clone()).or_else(|| vmi.status.node_name.clone());
        }
        let targets = pods.into_iter().flatten().filter_map(|(_, node)| node.clone()).collect();
        Some(Slot { vmi: name, source, targets })
    }

    fn recount(&mut self, uid: &str, gone: bool) {
        let new = if gone { None } else { self.slot(uid) };
        let old = self.counted.slots.get(uid);
        if new.as_ref() == old {
            return;
        }
        let old = self.counted.slots.remove(uid);
        let limits = self.highest();
        let count = &mut self.counted;
        if let Some(old) = &old {
            for (counts, key) in
                old.source.iter().map(|node| (false, node)).chain(old.targets.iter().map(|node| (true, node)))
            {
                take_one(if counts { &mut count.to } else { &mut count.from }, key);
            }
            take_one(&mut count.of, &old.vmi);
            if let Some(uids) = count.by_vmi.get_mut(&old.vmi) {
                uids.remove(uid);
                if uids.is_empty() {
                    count.by_vmi.remove(&old.vmi);
                }
            }
        }
        let Some(new) = new else { return };
        let old = old.unwrap_or_default();
        let mut wrong = Vec::new();
        count.slots.insert(uid.to_owned(), new.clone());
        count.by_vmi.entry(new.vmi.clone()).or_default().insert(uid.to_owned());
        let total = u32::try_from(count.slots.len()).unwrap_or(u32::MAX);
        if old.vmi != new.vmi && total > limits.cluster {
            wrong.push((Rule::Limits, format!("{total} migrations are under way, {} may be", limits.cluster)));
        }
        let of = add_one(&mut count.of, &new.vmi);
        if of > 1 {
            wrong.push((Rule::OneAtATime, format!("{of} migrations of {} are under way at the same time", new.vmi)));
        }
        if let Some(node) = &new.source {
            let from = add_one(&mut count.from, node);
            self.stats.most_from_one_node = self.stats.most_from_one_node.max(from);
            if from > limits.outbound && old.source.as_ref() != Some(node) {
                wrong.push((Rule::Limits, format!("{from} migrations leave {node}, {} may", limits.outbound)));
            }
        }
        for node in &new.targets {
            let to = add_one(&mut count.to, node);
            self.stats.most_to_one_node = self.stats.most_to_one_node.max(to);
            if to > limits.inbound && !old.targets.contains(node) {
                wrong.push((Rule::Limits, format!("{to} migrations arrive on {node}, {} may", limits.inbound)));
            }
        }
        self.stats.most_at_once = self.stats.most_at_once.max(total);
        for (rule, what) in wrong {
            self.violate(rule, what);
        }
    }
}

fn add_one<K: Ord + Clone>(counts: &mut BTreeMap<K, u32>, key: &K) -> u32 {
    let count = counts.entry(key.clone()).or_default();
    *count += 1;
    *count
}

fn take_one<K: Ord>(counts: &mut BTreeMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(key);
        }
    }
}
