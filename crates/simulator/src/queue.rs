//! The controllers' work queue as crate `runtime` has it: each key once, lanes kept apart, failures backed off, wake-ups in
//! time. (The runtime's own belongs to a crate that does IO; the two are to become one in `control`.)

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use godwit_control::{Key, Lane};
use jiff::{SignedDuration, Timestamp};

const FIRST_PAUSE_MS: i64 = 50;
const LONGEST_PAUSE_MS: i64 = 30_000;

/// The queue.
#[derive(Debug, Default)]
pub struct Queue {
    ready: VecDeque<Key>,
    queued: BTreeSet<Key>,
    parked: BTreeMap<Lane, VecDeque<Key>>,
    busy: BTreeMap<Lane, Key>,
    running: BTreeSet<Key>,
    timers: BTreeSet<(Timestamp, Key)>,
    wake: BTreeMap<Key, Timestamp>,
    failures: BTreeMap<Key, u32>,
}

impl Queue {
    /// Decide about this soon.
    pub fn push(&mut self, key: Key) {
        if self.queued.insert(key.clone()) {
            self.ready.push_back(key);
        }
    }

    /// Decide about this at a time, or earlier if that was asked for already.
    pub fn push_at(&mut self, key: Key, at: Timestamp) {
        match self.wake.get(&key) {
            Some(earlier) if *earlier <= at => return,
            Some(later) => {
                self.timers.remove(&(*later, key.clone()));
            }
            None => {}
        }
        self.timers.insert((at, key.clone()));
        self.wake.insert(key, at);
    }

    /// When the next timer is due.
    pub fn next_wake(&self) -> Option<Timestamp> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// The next key whose lane is free; it holds the lane until [`Queue::done`].
    pub fn next(&mut self, now: Timestamp, lane_of: impl Fn(&Key) -> Lane) -> Option<(Key, Lane)> {
        while self.timers.first().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, key)) = self.timers.pop_first() {
                self.wake.remove(&key);
                self.push(key);
            }
        }
        while let Some(key) = self.ready.pop_front() {
            let mut lane = lane_of(&key);
            let mut free = !self.busy.contains_key(&lane);
            if free && self.running.contains(&key) {
                // It changed lanes while it is carried out: it waits in the lane that it holds.
                if let Some((held, _)) = self.busy.iter().find(|(_, holder)| **holder == key) {
                    (lane, free) = (held.clone(), false);
                }
            }
            if !free {
                self.parked.entry(lane).or_default().push_back(key);
                continue;
            }
            self.queued.remove(&key);
            if let Some(at) = self.wake.remove(&key) {
                self.timers.remove(&(at, key.clone()));
            }
            self.busy.insert(lane.clone(), key.clone());
            self.running.insert(key.clone());
            return Some((key, lane));
        }
        None
    }

    /// The decision has been carried out: its lane is free again.
    pub fn done(&mut self, key: &Key, lane: &Lane) {
        self.busy.remove(lane);
        self.running.remove(key);
        for key in self.parked.remove(lane).unwrap_or_default().into_iter().rev() {
            self.ready.push_front(key);
        }
    }

    /// The next failure is a first one.
    pub fn succeeded(&mut self, key: &Key) {
        self.failures.remove(key);
    }

    /// Decide again after a pause that grows.
    pub fn failed(&mut self, key: Key, now: Timestamp) {
        let failures = self.failures.entry(key.clone()).or_default();
        let pause = FIRST_PAUSE_MS.saturating_mul(1 << (*failures).min(20)).min(LONGEST_PAUSE_MS);
        *failures = failures.saturating_add(1);
        self.push_at(key, now + SignedDuration::from_millis(pause));
    }
}
