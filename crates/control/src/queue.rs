//! What is to be decided next: each key once, lanes kept apart, failures backed off, wake-ups in time.
#![expect(clippy::disallowed_types, reason = "these maps are asked and never walked, so their order is never seen")]

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use foldhash::fast::FixedState;
use jiff::{SignedDuration, Timestamp};

use crate::{Key, Lane};

/// The first pause after a failure; it doubles with each further one.
const FIRST_PAUSE_MS: i64 = 50;
/// The longest pause.
const LONGEST_PAUSE_MS: i64 = 30_000;

/// The work queue.
#[derive(Debug, Default)]
pub struct Queue {
    ready: VecDeque<Key>,
    /// Keys in `ready` or in `parked`.
    queued: HashSet<Key, FixedState>,
    /// Keys whose lane was busy when their turn came.
    parked: HashMap<Lane, VecDeque<Key>, FixedState>,
    busy: HashMap<Lane, Key, FixedState>,
    /// Keys that are being carried out, and the lane that they hold, whatever lane they would be in by now.
    running: HashMap<Key, Lane, FixedState>,
    timers: BTreeSet<(Timestamp, Key)>,
    wake: HashMap<Key, Timestamp, FixedState>,
    failures: HashMap<Key, u32, FixedState>,
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
            Some(other) if *other <= at => return,
            Some(other) => {
                self.timers.remove(&(*other, key.clone()));
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

    /// The next key whose lane is free. It holds the lane until [`Queue::done`].
    pub fn next(&mut self, now: Timestamp, lane_of: impl Fn(&Key) -> Lane) -> Option<(Key, Lane)> {
        while self.timers.first().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, key)) = self.timers.pop_first() {
                self.wake.remove(&key);
                self.push(key);
            }
        }
        while let Some(key) = self.ready.pop_front() {
            let lane = lane_of(&key);
            if self.busy.contains_key(&lane) {
                self.parked.entry(lane).or_default().push_back(key);
                continue;
            }
            if let Some(held) = self.running.get(&key) {
                // It changes lanes while it is carried out: wait in the lane that it holds.
                self.parked.entry(held.clone()).or_default().push_back(key);
                continue;
            }
            self.queued.remove(&key);
            // The decision to come replaces any wake-up of an earlier one.
            if let Some(at) = self.wake.remove(&key) {
                self.timers.remove(&(at, key.clone()));
            }
            self.busy.insert(lane.clone(), key.clone());
            self.running.insert(key.clone(), lane.clone());
            return Some((key, lane));
        }
        None
    }

    /// The decision about a key has been carried out (or nothing was to do): its lane is free again.
    pub fn done(&mut self, key: &Key, lane: &Lane) {
        self.busy.remove(lane);
        self.running.remove(key);
        if let Some(parked) = self.parked.remove(lane) {
            for key in parked.into_iter().rev() {
                self.ready.push_front(key);
            }
        }
    }

    /// It went well: the next failure is a first one.
    pub fn succeeded(&mut self, key: &Key) {
        self.failures.remove(key);
    }

    /// It failed: decide again after a pause that grows. Returns the pause.
    pub fn failed(&mut self, key: Key, now: Timestamp) -> SignedDuration {
        let failures = self.failures.entry(key.clone()).or_default();
        let doubled = FIRST_PAUSE_MS.saturating_mul(1_i64 << (*failures).min(20));
        *failures = failures.saturating_add(1);
        let pause = SignedDuration::from_millis(doubled.min(LONGEST_PAUSE_MS));
        self.push_at(key, now + pause);
        pause
    }
}

#[cfg(test)]
mod tests {
    use crate::Name;

    use super::*;

    fn key(name: &str) -> Key {
        Key::Vm(Name::new("ns", name))
    }

    fn own(key: &Key) -> Lane {
        Lane::Own(key.clone())
    }

    fn at(millisecond: i64) -> Timestamp {
        Timestamp::from_millisecond(millisecond).unwrap()
    }

    #[test]
    fn a_key_is_queued_once_and_again_while_it_runs() {
        let mut queue = Queue::default();
        queue.push(key("a"));
        queue.push(key("a"));
        let (first, lane) = queue.next(at(0), own).unwrap();
        assert_eq!(queue.next(at(0), own), None);
        queue.push(key("a"));
        assert_eq!(queue.next(at(0), own), None, "not twice at the same time");
        queue.done(&first, &lane);
        assert_eq!(queue.next(at(0), own).unwrap().0, key("a"), "news during the run are not lost");
    }

    #[test]
    fn one_at_a_time_in_a_lane() {
        let mut queue = Queue::default();
        queue.push(key("a"));
        queue.push(key("b"));
        let shared = |_: &Key| Lane::Turns;
        let (first, lane) = queue.next(at(0), shared).unwrap();
        assert_eq!((first.clone(), queue.next(at(0), shared)), (key("a"), None));
        queue.done(&first, &lane);
        assert_eq!(queue.next(at(0), shared).unwrap().0, key("b"));
    }

    #[test]
    fn a_key_that_changes_lanes_is_not_run_twice() {
        let mut queue = Queue::default();
        queue.push(key("a"));
        let (first, lane) = queue.next(at(0), |_| Lane::Turns).unwrap();
        queue.push(key("a"));
        assert_eq!(queue.next(at(0), own), None);
        queue.done(&first, &lane);
        assert_eq!(queue.next(at(0), own).unwrap().0, key("a"));
    }

    #[test]
    fn the_earliest_timer_counts() {
        let mut queue = Queue::default();
        queue.push_at(key("a"), at(200));
        queue.push_at(key("a"), at(100));
        queue.push_at(key("a"), at(300));
        assert_eq!(queue.next_wake(), Some(at(100)));
        assert_eq!(queue.next(at(99), own), None);
        assert!(queue.next(at(100), own).is_some());
        assert_eq!(queue.next_wake(), None);
    }

    #[test]
    fn pauses_double_up_to_a_limit_and_start_anew() {
        let mut queue = Queue::default();
        let pauses: Vec<i128> = (0..12).map(|_| queue.failed(key("a"), at(0)).as_millis()).collect();
        assert_eq!(pauses[..4], [50, 100, 200, 400]);
        assert_eq!(pauses[11], 30_000);
        queue.succeeded(&key("a"));
        assert_eq!(queue.failed(key("a"), at(0)).as_millis(), 50);
    }
}
