//! Every launcher that ever started, found by its pod, node, VMI and migration.

use std::collections::{BTreeMap, BTreeSet};

use godwit_control::Name;

use crate::machine::{Domain, Launcher, Status};

/// The launchers, by number.
#[derive(Default)]
pub struct Launchers {
    all: BTreeMap<u64, Launcher>,
    by_pod: BTreeMap<String, u64>,
    by_pod_name: BTreeMap<Name, Vec<u64>>,
    receiving: BTreeMap<String, u64>,
    /// By VMI, those that have not ended.
    living_of: BTreeMap<Name, BTreeSet<u64>>,
    /// By node, those that have not ended.
    living_on: BTreeMap<usize, BTreeSet<u64>>,
    /// Those that a handler may not know yet to have ended, by node.
    ended_on: BTreeMap<usize, BTreeSet<u64>>,
    /// By VMI, those that have ended.
    ended_of: BTreeMap<Name, BTreeSet<u64>>,
    /// Those that send.
    sending: BTreeSet<u64>,
    next: u64,
}

impl Launchers {
    /// A launcher starts. Returns its number.
    pub fn insert(&mut self, launcher: Launcher) -> u64 {
        self.next += 1;
        let id = self.next;
        self.by_pod.insert(launcher.pod_uid.clone(), id);
        self.by_pod_name.entry(launcher.pod.clone()).or_default().push(id);
        if let Some(migration) = launcher.receives.clone() {
            self.receiving.entry(migration).or_insert(id);
        }
        self.living_of.entry(launcher.vmi.clone()).or_default().insert(id);
        self.living_on.entry(launcher.node).or_default().insert(id);
        self.all.insert(id, launcher);
        id
    }

    /// A launcher.
    pub fn get(&self, id: u64) -> Option<&Launcher> {
        self.all.get(&id)
    }

    /// A launcher, to be changed; its end is for [`Launchers::end`], its sending for [`Launchers::note_sending`].
    pub fn get_mut(&mut self, id: u64) -> Option<&mut Launcher> {
        self.all.get_mut(&id)
    }

    /// A launcher that has not ended, to be changed.
    pub fn living_mut(&mut self, id: u64) -> Option<&mut Launcher> {
        self.all.get_mut(&id).filter(|launcher| launcher.ended.is_none())
    }

    /// A launcher has ended, well or badly.
    pub fn end(&mut self, id: u64, well: bool, domain: Domain) {
        let Some(launcher) = self.all.get_mut(&id) else { return };
        launcher.ended = Some(well);
        launcher.domain = domain;
        if let Some(living) = self.living_of.get_mut(&launcher.vmi) {
            living.remove(&id);
        }
        if let Some(living) = self.living_on.get_mut(&launcher.node) {
            living.remove(&id);
        }
        self.ended_on.entry(launcher.node).or_default().insert(id);
        self.ended_of.entry(launcher.vmi.clone()).or_default().insert(id);
    }

    /// The handler of a node starts anew: of launchers that have ended it will only know the pods.
    pub fn forget_ended_on(&mut self, node: usize) {
        for id in self.ended_on.remove(&node).unwrap_or_default() {
            if let Some(launcher) = self.all.get_mut(&id) {
                launcher.forgotten = true;
            }
        }
    }

    /// A launcher begins to send, or has stopped.
    pub fn note_sending(&mut self, id: u64) {
        let sends = self.all.get(&id).and_then(|launcher| launcher.sends.as_ref());
        if sends.is_some_and(|transfer| matches!(transfer.status, Status::Active | Status::HandedOver)) {
            self.sending.insert(id);
        } else {
            self.sending.remove(&id);
        }
    }

    /// Those that send.
    pub fn sending(&self) -> impl Iterator<Item = u64> + '_ {
        self.sending.iter().copied()
    }

    /// The launcher of a pod.
    pub fn of_pod(&self, pod_uid: &str) -> Option<(u64, &Launcher)> {
        let id = *self.by_pod.get(pod_uid)?;
        self.all.get(&id).map(|launcher| (id, launcher))
    }

    /// The launchers of pods of a name, one after another.
    pub fn named(&self, pod: &Name) -> impl Iterator<Item = (u64, &Launcher)> {
        self.pick(self.by_pod_name.get(pod).into_iter().flatten())
    }

    /// The launcher that was made for a migration.
    pub fn receiving(&self, migration: &str) -> Option<(u64, &Launcher)> {
        let id = *self.receiving.get(migration)?;
        self.all.get(&id).map(|launcher| (id, launcher))
    }

    /// Launchers of a VMI that have not ended.
    pub fn living_of(&self, vmi: &Name) -> impl Iterator<Item = (u64, &Launcher)> {
        self.pick(self.living_of.get(vmi).into_iter().flatten())
    }

    /// All launchers of a VMI.
    pub fn all_of(&self, vmi: &Name) -> impl Iterator<Item = (u64, &Launcher)> {
        self.pick(self.ended_of.get(vmi).into_iter().flatten().chain(self.living_of.get(vmi).into_iter().flatten()))
    }

    /// Launchers on a node that have not ended.
    pub fn living_on(&self, node: usize) -> Vec<u64> {
        self.living_on.get(&node).into_iter().flatten().copied().collect()
    }

    /// How many have not ended.
    pub fn living(&self) -> Vec<u64> {
        self.living_on.values().flatten().copied().collect()
    }

    fn pick<'a>(&'a self, ids: impl Iterator<Item = &'a u64>) -> impl Iterator<Item = (u64, &'a Launcher)> {
        ids.filter_map(|id| self.all.get(id).map(|launcher| (*id, launcher)))
    }
}
