//! The controllers' shell as crate `runtime` has it: news in, decisions out, answers learned before the next decision.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use godwit_control::{
    Change, Effect, Key, Kind, Lane, Name, Noun, Object, Ref, Settings, Source, View, World, kinds_for,
};

use crate::event::{Event, News};
use crate::sim::{MS, Sim};
use crate::store::{Commit, Refusal};
use godwit_control::queue::Queue;

/// As who the controllers write.
pub const CONTROLLER: &str = "system:serviceaccount:kubevirt:kubevirt-controller";

/// The state of the controllers; a restart loses all of it but `settings`.
pub struct Controllers {
    /// Counts the lives.
    pub generation: u64,
    world: World,
    queue: Queue,
    unlisted: BTreeSet<Kind>,
    chains: BTreeMap<u64, Chain>,
    next_chain: u64,
    wake_at: Option<u64>,
    feeds: BTreeMap<Kind, Feed>,
    settings: Settings,
}

/// The watch of one kind.
#[derive(Default)]
struct Feed {
    /// When the last piece that is on its way arrives: news keep their order.
    last: u64,
    broken: bool,
}

/// A plan that is being carried out.
struct Chain {
    key: Key,
    lane: Lane,
    seen: Vec<(Ref, u64)>,
    effects: VecDeque<Effect>,
    learned: Vec<Learned>,
    failed: bool,
}

enum Learned {
    Here(Object),
    Gone(Ref),
}

impl Controllers {
    /// Controllers that have not started yet.
    pub fn new() -> Self {
        Self {
            generation: 0,
            world: World::default(),
            queue: Queue::default(),
            unlisted: BTreeSet::new(),
            chains: BTreeMap::new(),
            next_chain: 0,
            wake_at: None,
            feeds: BTreeMap::new(),
            settings: Settings::standalone("/data"),
        }
    }

    /// The watches that are up.
    pub fn watched(&self) -> Vec<Kind> {
        self.feeds.iter().filter(|(_, feed)| !feed.broken).map(|(kind, _)| *kind).collect()
    }

    /// Whether nothing is being carried out and every kind has been listed.
    pub fn is_idle(&self) -> bool {
        self.chains.is_empty() && self.unlisted.is_empty() && self.feeds.values().all(|feed| !feed.broken)
    }
}

impl Sim {
    /// The controllers are gone; they are back at a later time.
    pub fn restart_controllers(&mut self, after: u64) {
        let generation = self.controllers.generation + 1;
        let cut = self.controllers.chains.values().filter(|chain| !chain.effects.is_empty()).count();
        self.note(format!("controllers restart, {cut} plans cut off"));
        let fresh = Controllers { generation, next_chain: self.controllers.next_chain, ..Controllers::new() };
        self.controllers = fresh;
        self.controllers.unlisted = kinds_for(Noun::ALL).into_iter().collect();
        self.at(after, Event::ControllersStart { generation });
    }

    /// The controllers start to watch.
    pub fn start_controllers(&mut self, generation: u64) {
        if generation != self.controllers.generation {
            return;
        }
        for kind in kinds_for(Noun::ALL) {
            self.controllers.feeds.insert(kind, Feed { last: 0, broken: true });
            let after = self.random.between(MS, 40 * MS);
            self.at(after, Event::Relist { generation, kind });
        }
    }

    /// A change is on its way to the controllers.
    pub fn feed_controllers(&mut self, commit: &Commit) {
        let kind = commit.latest.kind();
        if !self.controllers.feeds.contains_key(&kind) {
            return;
        }
        let mut delay = self.random.between(MS / 2, 15 * MS);
        if self.faulty(|faults| faults.late_news_per_mille) {
            delay += self.random.between(50 * MS, 3_000 * MS);
        }
        let twice = self.faulty(|faults| faults.double_news_per_mille);
        let (generation, now) = (self.controllers.generation, self.now);
        let Some(feed) = self.controllers.feeds.get_mut(&kind) else { return };
        feed.last = feed.last.max(now + delay);
        let after = feed.last - now;
        let object = commit.latest.clone();
        let news = if commit.gone { News::Gone(object) } else { News::Here(object) };
        for _ in 0..=usize::from(twice) {
            self.at(after, Event::News { generation, kind, news: news.clone() });
        }
    }

    /// A watch breaks and is taken up again later.
    pub fn break_watch(&mut self, kind: Kind) {
        let generation = self.controllers.generation;
        if let Some(feed) = self.controllers.feeds.get_mut(&kind) {
            feed.broken = true;
            let after = self.random.between(10 * MS, 5_000 * MS);
            self.at(after, Event::Relist { generation, kind });
        }
    }

    /// The kind is listed; what is written from now on is watched.
    pub fn relist(&mut self, generation: u64, kind: Kind) {
        if generation != self.controllers.generation {
            return;
        }
        let delay = self.random.between(MS, 20 * MS);
        let objects: Vec<Object> = self.store.list(kind).cloned().collect();
        let now = self.now;
        let Some(feed) = self.controllers.feeds.get_mut(&kind) else { return };
        feed.broken = false;
        feed.last = feed.last.max(now + delay);
        let after = feed.last - now;
        self.at(after, Event::Listed { generation, kind, objects });
    }

    /// A list arrives.
    pub fn take_list(&mut self, generation: u64, kind: Kind, objects: Vec<Object>) {
        if generation != self.controllers.generation {
            return;
        }
        let mut missing: BTreeSet<Name> = self.controllers.world.names_of(kind).into_iter().collect();
        for object in objects {
            missing.remove(&object.name());
            let change = self.controllers.world.apply(object, Source::Watch);
            self.touch(change);
        }
        for name in missing {
            let change = self.controllers.world.forget(kind, &name);
            self.touch(change);
        }
        if self.controllers.unlisted.remove(&kind) && self.controllers.unlisted.is_empty() {
            for key in Key::all(&self.controllers.world) {
                self.controllers.queue.push(key);
            }
        }
        self.pump();
    }

    /// News arrive.
    pub fn take_news(&mut self, generation: u64, kind: Kind, news: News) {
        let controllers = &mut self.controllers;
        if generation != controllers.generation || controllers.feeds.get(&kind).is_none_or(|feed| feed.broken) {
            return;
        }
        let change = match news {
            News::Here(object) => controllers.world.apply(object, Source::Watch),
            News::Gone(object) => controllers.world.delete(&object, Source::Watch),
        };
        self.touch(change);
        self.pump();
    }

    fn touch(&mut self, change: Option<Change>) {
        let controllers = &mut self.controllers;
        if let Some(change) = change.filter(|_| controllers.unlisted.is_empty()) {
            for key in Key::affected(&change, &controllers.world) {
                controllers.queue.push(key);
            }
        }
    }

    /// A wake-up.
    pub fn wake_controllers(&mut self, generation: u64) {
        if generation == self.controllers.generation {
            self.controllers.wake_at = None;
            self.pump();
        }
    }

    /// Decides about everything that is due.
    fn pump(&mut self) {
        let generation = self.controllers.generation;
        while self.controllers.unlisted.is_empty() {
            let now = self.time();
            let controllers = &mut self.controllers;
            let world = &controllers.world;
            let Some((key, lane)) = controllers.queue.next(now, |key| key.lane(world)) else { break };
            self.stats.decisions += 1;
            let plan = key.decide(&View { now, world, settings: &controllers.settings });
            if let Some(wake_at) = plan.wake_at {
                controllers.queue.push_at(key.clone(), wake_at);
            }
            if plan.effects.is_empty() {
                controllers.queue.succeeded(&key);
                controllers.queue.done(&key, &lane);
                continue;
            }
            let seen = plan
                .effects
                .iter()
                .filter_map(written)
                .filter_map(|target| Some((target.clone(), world.get(target.kind, &target.name)?.revision())))
                .collect();
            let id = controllers.next_chain;
            controllers.next_chain += 1;
            let chain = Chain { key, lane, seen, effects: plan.effects.into(), learned: Vec::new(), failed: false };
            controllers.chains.insert(id, chain);
            self.schedule_effect(generation, id);
        }
        let Some(wake) = self.controllers.queue.next_wake() else { return };
        let at = self.microsecond(wake).max(self.now);
        if self.controllers.wake_at.is_none_or(|before| at < before) {
            self.controllers.wake_at = Some(at);
            let after = at - self.now;
            self.at(after, Event::Wake { generation });
        }
    }

    fn schedule_effect(&mut self, generation: u64, chain: u64) {
        let after = self.random.between(MS / 2, 6 * MS);
        self.at(after, Event::Effect { generation, chain });
    }

    /// Carries out the next write of a plan.
    pub fn carry_out_next(&mut self, generation: u64, id: u64) {
        if generation != self.controllers.generation {
            return;
        }
        let Some(chain) = self.controllers.chains.get_mut(&id) else { return };
        // Events are told on the side.
        while let Some(Effect::Record(_)) = chain.effects.front() {
            if let Some(Effect::Record(event)) = chain.effects.pop_front() {
                let (now, reason, target) = (self.now, event.reason, event.target);
                self.trace.add(now, &format!("  event {reason} on {target}: {}", event.message));
            }
        }
        let Some(effect) = chain.effects.pop_front() else {
            let after = self.random.between(MS / 2, 3 * MS);
            return self.at(after, Event::Conclude { generation, chain: id });
        };
        let key = chain.key.clone();
        let mut learned = Vec::new();
        let mut good = self.carry_out(&key, effect, &mut learned);
        if good && self.faulty(|faults| faults.lost_answers_per_mille) {
            self.note("  the answer is lost".to_owned());
            learned.clear();
            good = false;
        }
        let Some(chain) = self.controllers.chains.get_mut(&id) else { return };
        chain.learned.extend(learned);
        if good && !chain.effects.is_empty() {
            return self.schedule_effect(generation, id);
        }
        chain.failed = !good;
        let after = self.random.between(MS / 2, 3 * MS);
        self.at(after, Event::Conclude { generation, chain: id });
    }

    fn carry_out(&mut self, key: &Key, effect: Effect, learned: &mut Vec<Learned>) -> bool {
        let now = self.time();
        let spurious = self.faulty(|faults| faults.conflicts_per_mille);
        let target = match (&effect, written(&effect)) {
            (Effect::Create(object), _) => object.reference(),
            (_, Some(target)) => target.clone(),
            _ => return true,
        };
        if spurious {
            self.note(format!("[{key}] write to {target} meets a conflict by chance"));
            self.stats.conflicts += 1;
            self.look_up(&target, learned);
            return false;
        }
        let what = describe(&effect);
        let answer = match effect {
            Effect::Create(object) => match object.to_value() {
                Ok(value) => {
                    self.store.create(target.kind, value, CONTROLLER, now, &mut self.random).map(Some).or_else(
                        |refusal| match (refusal, self.store.get(&target)) {
                            (Refusal::Exists, Some(found)) if owner(&object) == owner(found) => Ok(Some(found.clone())),
                            (refusal, _) => Err(refusal),
                        },
                    )
                }
                Err(error) => Err(Refusal::Invalid(error.to_string())),
            },
            Effect::Patch(_, patch) => self.store.merge(&target, false, &patch).map(Some),
            Effect::PatchStatus(_, patch) => self.store.merge(&target, true, &patch).map(Some),
            Effect::Delete { uid, grace_seconds, .. } => match self.store.delete(&target, &uid, grace_seconds, now) {
                Err(Refusal::NotFound) => Ok(None),
                answer => answer,
            },
            Effect::Bind { uid, node, .. } => self.store.bind(&target, &uid, &node).map(Some),
            Effect::Evict { uid, .. } => self.store.delete(&target, &uid, None, now),
            Effect::Record(_) => return true,
        };
        match &answer {
            Ok(_) => {
                self.stats.writes += 1;
                self.note(format!("[{key}] {what} {target}"));
            }
            Err(refusal) => self.note(format!("[{key}] {what} {target}: {refusal:?}")),
        }
        self.spread();
        match answer {
            Ok(Some(object)) => learned.push(Learned::Here(object)),
            Ok(None) | Err(Refusal::NotFound) => learned.push(Learned::Gone(target)),
            Err(Refusal::Conflict | Refusal::Exists) => {
                self.stats.conflicts += 1;
                self.look_up(&target, learned);
                return false;
            }
            Err(Refusal::Invalid(_)) => return false,
        }
        true
    }

    fn look_up(&self, target: &Ref, learned: &mut Vec<Learned>) {
        learned.push(match self.store.get(target) {
            Some(object) => Learned::Here(object.clone()),
            None => Learned::Gone(target.clone()),
        });
    }

    /// What was learned is taken in, and the lane is free again.
    pub fn conclude(&mut self, generation: u64, id: u64) {
        if generation != self.controllers.generation {
            return;
        }
        let Some(chain) = self.controllers.chains.remove(&id) else { return };
        for piece in chain.learned {
            let world = &mut self.controllers.world;
            let change = match piece {
                Learned::Here(object) => world.apply(object, Source::Answer),
                Learned::Gone(target) => {
                    let held = world.get(target.kind, &target.name).map_or(0, |object| object.revision());
                    let known = chain.seen.iter().find(|(other, _)| *other == target).map_or(0, |(_, seen)| *seen);
                    (held <= known).then(|| world.forget(target.kind, &target.name)).flatten()
                }
            };
            self.touch(change);
        }
        let now = self.time();
        let queue = &mut self.controllers.queue;
        queue.done(&chain.key, &chain.lane);
        if chain.failed {
            queue.failed(chain.key, now);
        } else {
            queue.succeeded(&chain.key);
        }
        self.pump();
    }
}

/// The object that an effect changes.
fn written(effect: &Effect) -> Option<&Ref> {
    match effect {
        Effect::Patch(target, _) | Effect::PatchStatus(target, _) | Effect::Delete { target, .. } => Some(target),
        Effect::Bind { pod, .. } | Effect::Evict { pod, .. } => Some(pod),
        Effect::Create(_) | Effect::Record(_) => None,
    }
}

fn describe(effect: &Effect) -> String {
    match effect {
        Effect::Create(_) => "creates".to_owned(),
        Effect::Patch(_, patch) | Effect::PatchStatus(_, patch) => {
            let phase = patch.pointer("/status/phase").and_then(|phase| phase.as_str());
            let state = patch.pointer("/status/migrationState").filter(|_| matches!(effect, Effect::Patch(..)));
            match (phase, state) {
                (Some(phase), _) => format!("says {phase} of"),
                (None, Some(state)) => format!("writes migrationState {} to", crate::trace::keys(state)),
                (None, None) => "writes".to_owned(),
            }
        }
        Effect::Delete { .. } => "deletes".to_owned(),
        Effect::Bind { node, .. } => format!("binds to {node}"),
        Effect::Evict { .. } => "evicts".to_owned(),
        Effect::Record(_) => "tells of".to_owned(),
    }
}

fn owner(object: &Object) -> Option<String> {
    let owners = object.metadata().owner_references.iter().flatten();
    owners.filter(|owner| owner.controller == Some(true)).map(|owner| owner.uid.clone()).next()
}
