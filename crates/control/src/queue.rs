//! What is to be decided next: each key once, lanes kept apart, failures backed off, wake-ups in time.
#![expect(clippy::disallowed_types, reason = "these maps are asked and never walked, so their order is never seen")]

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use foldhash::fast::FixedState;
use jiff::{SignedDuration, Timestamp};

use crate::{Key, Lane, Noun};

/// The first pause after a failure; it doubles with each further one.
const FIRST_PAUSE_MS: i64 = 50;
/// The longest pause.
const LONGEST_PAUSE_MS: i64 = 30_000;

/// So many keys of each noun may be carried out at any time, whatever others are.
const ALWAYS: usize = 8;
/// Room for so many keys is kept when there are none.
const KEPT_ROOM: usize = 1024;

/// The work queue.
#[derive(Debug, Default)]
pub struct Queue {
    /// Keys in the order of their numbers.
    ready: BTreeMap<Noun, VecDeque<(i64, Key)>>,
    first: i64,
    last: i64,
    /// Keys in `ready` or in `parked`.
    queued: HashSet<Key, FixedState>,
    /// Keys whose lane was busy when their turn came.
    parked: HashMap<Lane, VecDeque<Key>, FixedState>,
    busy: HashMap<Lane, Key, FixedState>,
    /// Keys that are being carried out, and the lane that they hold, whatever lane they would be in by now.
    running: HashMap<Key, Lane, FixedState>,
    /// How many are being carried out, by noun.
    under_way: BTreeMap<Noun, usize>,
    timers: BTreeSet<(Timestamp, Key)>,
    wake: HashMap<Key, Timestamp, FixedState>,
    failures: HashMap<Key, u32, FixedState>,
}

impl Queue {
    /// Decide about this soon.
    pub fn push(&mut self, key: Key) {
        if self.queued.insert(key.clone()) {
            self.last += 1;
            self.ready.entry(key.noun()).or_default().push_back((self.last, key));
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

    /// The next key whose lane is free, the oldest first. It holds the lane until [`Queue::done`].
    pub fn next(&mut self, now: Timestamp, lane_of: impl Fn(&Key) -> Lane) -> Option<(Key, Lane)> {
        self.take_timers(now);
        self.take(lane_of, |queue| {
            let heads = queue.ready.iter().filter_map(|(noun, keys)| Some((keys.front()?.0, *noun)));
            heads.min().map(|(_, noun)| noun)
        })
    }

    /// The same when no more than `most` keys are to be carried out at once. Each noun gets its turn: first comes the one of which
    /// the fewest keys are being carried out, and a few of each always may, so that no noun keeps others waiting, however many keys it has
    /// and however long they take.
    pub fn next_in_turn(&mut self, now: Timestamp, most: usize, lane_of: impl Fn(&Key) -> Lane) -> Option<(Key, Lane)> {
        self.take_timers(now);
        self.take(lane_of, |queue| {
            let is_full = queue.running.len() >= most;
            let heads = queue.ready.iter().filter_map(|(noun, keys)| {
                let under_way = queue.under_way.get(noun).copied().unwrap_or(0);
                let may = !is_full || under_way < ALWAYS;
                may.then_some((under_way, keys.front()?.0, *noun))
            });
            heads.min().map(|(.., noun)| noun)
        })
    }

    fn take_timers(&mut self, now: Timestamp) {
        while self.timers.first().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, key)) = self.timers.pop_first() {
                self.wake.remove(&key);
                self.push(key);
            }
        }
    }

    fn take(&mut self, lane_of: impl Fn(&Key) -> Lane, turn: impl Fn(&Self) -> Option<Noun>) -> Option<(Key, Lane)> {
        while let Some(noun) = turn(self) {
            let key = self.pop(noun)?;
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
            *self.under_way.entry(noun).or_default() += 1;
            return Some((key, lane));
        }
        if self.queued.is_empty() {
            // The first look at a large cluster has tens of thousands of keys.
            self.queued.shrink_to(KEPT_ROOM);
        }
        None
    }

    fn pop(&mut self, noun: Noun) -> Option<Key> {
        let keys = self.ready.get_mut(&noun)?;
        let (_, key) = keys.pop_front()?;
        if keys.is_empty() {
            self.ready.remove(&noun);
        }
        Some(key)
    }

    /// The decision about a key has been carried out (or nothing was to do): its lane is free again.
    pub fn done(&mut self, key: &Key, lane: &Lane) {
        self.busy.remove(lane);
        if self.running.remove(key).is_some()
            && let Some(under_way) = self.under_way.get_mut(&key.noun())
        {
            *under_way = under_way.saturating_sub(1);
        }
        for key in self.parked.remove(lane).into_iter().flatten().rev() {
            self.first -= 1;
            self.ready.entry(key.noun()).or_default().push_front((self.first, key));
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
    fn a_crowd_of_one_noun_keeps_no_other_waiting() {
        let migration = |number: usize| Key::Migration(Name::new("ns", number.to_string()));
        let mut queue = Queue::default();
        for number in 0..1000 {
            queue.push(key(&number.to_string()));
        }
        // Nobody else wants anything: they take all there is.
        let next = |queue: &mut Queue| queue.next_in_turn(at(0), 64, own).map(|(key, _)| key);
        let under_way: Vec<Key> = std::iter::from_fn(|| next(&mut queue)).collect();
        assert_eq!((under_way.len(), under_way[0].clone()), (64, key("0")));
        // None of them ends, and yet a few migrations are decided at once, and those whose time has come.
        (0..20).for_each(|number| queue.push(migration(number)));
        queue.push_at(Key::Turns, at(0));
        let moved: Vec<Key> = std::iter::from_fn(|| next(&mut queue)).collect();
        assert_eq!(moved, (0..ALWAYS).map(migration).collect::<Vec<_>>());
        assert_eq!(queue.next_wake(), None, "no timer is overdue, which nobody would wait for");
        // Of the places that become free the migrations get the first, until they have as many as the others.
        for key in &under_way[..40] {
            queue.done(key, &own(key));
        }
        let free: Vec<Key> = std::iter::from_fn(|| next(&mut queue)).collect();
        assert_eq!(free.len(), 64 - 24 - ALWAYS);
        let moved = free.iter().filter(|key| key.noun() == Noun::Migration).count();
        assert_eq!(moved, 21 - ALWAYS, "all twenty, and who has a turn");
    }

    #[test]
    fn what_waited_in_a_lane_comes_before_what_came_later() {
        let mut queue = Queue::default();
        let lane = |key: &Key| if matches!(key, Key::Node(_)) { own(key) } else { Lane::Turns };
        for key in [key("a"), key("b"), Key::Volume(Name::cluster("c"))] {
            queue.push(key);
        }
        let (first, held) = queue.next(at(0), lane).unwrap();
        assert_eq!((first.clone(), queue.next(at(0), lane)), (key("a"), None));
        queue.push(Key::Node("n".into()));
        queue.push(key("d"));
        queue.done(&first, &held);
        let order: Vec<Key> = std::iter::from_fn(|| {
            let (key, lane) = queue.next(at(0), lane)?;
            queue.done(&key, &lane);
            Some(key)
        })
        .collect();
        assert_eq!(order, [key("b"), Key::Volume(Name::cluster("c")), Key::Node("n".into()), key("d")]);
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
