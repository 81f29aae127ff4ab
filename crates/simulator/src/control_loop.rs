//! The controllers' shell as crate `runtime` has it: news in, decisions out, answers learned before the next decision.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use godwit_api::drain::DrainPlan;
use godwit_control::{
    Change, Effect, Key, Kind, Lane, Name, Noun, Object, Ref, Settings, Source, View, World, drain, kinds_for,
};

use godwit_control::queue::Queue;
use jiff::{SignedDuration, Timestamp};

use crate::check::{self, Rule};
use crate::event::{Event, News};
use crate::mutation::Mutation;
use crate::sim::{MS, SECOND, Sim};
use crate::store::{Commit, Refusal};

/// As who the controllers write.
pub const CONTROLLER: &str = "system:serviceaccount:kubevirt:kubevirt-controller";

/// One life of one controller process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// Which process.
    pub who: usize,
    /// Counts its lives.
    pub generation: u64,
}

/// The state of a controller process; a restart loses all of it but `settings`.
pub struct Controllers {
    /// Which one, and which of its lives.
    pub life: Life,
    /// How far its clock is ahead, in microseconds.
    pub skew: i64,
    /// It stands still until then; what comes meanwhile is dealt with after.
    pub stalled_until: u64,
    world: World,
    queue: Queue,
    unlisted: BTreeSet<Kind>,
    /// Lists under way: the names that were known before and have not come up yet.
    lists: BTreeMap<Kind, BTreeSet<Name>>,
    chains: BTreeMap<u64, Chain>,
    next_chain: u64,
    wake_at: Option<u64>,
    feeds: BTreeMap<Kind, Feed>,
    settings: Settings,
    /// What is wrong with it on purpose.
    pub mutation: Option<Mutation>,
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
    NotEvicted(Ref, String, String),
}

impl Controllers {
    /// Controllers that have not started yet.
    pub fn new(who: usize) -> Self {
        Self {
            life: Life { who, generation: 0 },
            skew: 0,
            stalled_until: 0,
            world: World::default(),
            queue: Queue::default(),
            unlisted: BTreeSet::new(),
            lists: BTreeMap::new(),
            chains: BTreeMap::new(),
            next_chain: 0,
            wake_at: None,
            feeds: BTreeMap::new(),
            settings: Settings::standalone("/data"),
            mutation: None,
        }
    }

    /// The watches that are up.
    pub fn watched(&self) -> Vec<Kind> {
        self.feeds.iter().filter(|(_, feed)| !feed.broken).map(|(kind, _)| *kind).collect()
    }

    fn touch(&mut self, change: Option<Change>) {
        if let Some(change) = change.filter(|_| self.unlisted.is_empty()) {
            for key in Key::affected(&change, &self.world) {
                self.queue.push(key);
            }
        }
    }

    /// Whether nothing is being carried out and every kind has been listed.
    pub fn is_idle(&self) -> bool {
        self.chains.is_empty() && self.unlisted.is_empty() && self.feeds.values().all(|feed| !feed.broken)
    }
}

impl Sim {
    /// The process in this life, if it still lives.
    fn living(&mut self, life: Life) -> Option<&mut Controllers> {
        self.controllers.get_mut(life.who).filter(|one| one.life == life)
    }

    /// The time that a process reads off its clock.
    fn clock(&self, who: usize) -> Timestamp {
        let skew = self.controllers.get(who).map_or(0, |one| one.skew);
        self.time() + SignedDuration::from_micros(skew)
    }

    /// What would become of everything on a node if it were emptied now, as far as the first process knows.
    pub fn plan_drain(&self, node: &str) -> DrainPlan {
        let Some(one) = self.controllers.first() else { return DrainPlan::default() };
        let view = View { now: self.clock(0), world: &one.world, settings: &one.settings };
        // There are none here.
        let terms = drain::Terms { budgets: Some(&[]), ..drain::Terms::default() };
        drain::plan(&view, &[node], &terms)
    }

    /// A controller process is gone; it is back at a later time.
    pub fn restart_controllers(&mut self, who: usize, after: u64) {
        let Some(old) = self.controllers.get(who) else { return };
        let life = Life { who, generation: old.life.generation + 1 };
        let cut = old.chains.values().filter(|chain| !chain.effects.is_empty()).count();
        let (skew, next_chain, mutation) = (old.skew, old.next_chain, old.mutation);
        self.note(format!("controller {who} restarts, {cut} plans cut off"));
        let unlisted = kinds_for(Noun::STANDALONE).into_iter().collect();
        if let Some(one) = self.controllers.get_mut(who) {
            *one = Controllers { life, skew, next_chain, unlisted, mutation, ..Controllers::new(who) };
        }
        self.at(after, Event::ControllersStart { life });
    }

    /// A controller process stands still, with a plan half carried out perhaps, and goes on as if nothing had been.
    pub fn stall_controllers(&mut self, who: usize, duration: u64) {
        self.note(format!("controller {who} stands still for {} ms", duration / MS));
        let until = self.now + duration;
        if let Some(one) = self.controllers.get_mut(who) {
            one.stalled_until = one.stalled_until.max(until);
        }
    }

    /// How long an event for a process has to wait because it stands still.
    pub fn stalled(&self, life: Life) -> Option<u64> {
        let one = self.controllers.get(life.who)?;
        one.stalled_until.checked_sub(self.now).filter(|wait| *wait > 0)
    }

    /// A process starts to watch.
    pub fn start_controllers(&mut self, life: Life) {
        if self.living(life).is_none() {
            return;
        }
        for kind in kinds_for(Noun::STANDALONE) {
            let after = self.random.between(MS, 40 * MS);
            if let Some(one) = self.living(life) {
                one.feeds.insert(kind, Feed { last: 0, broken: true });
            }
            self.at(after, Event::Relist { life, kind });
        }
    }

    /// A change is on its way to the controllers.
    pub fn feed_controllers(&mut self, commit: &Commit) {
        for who in 0..self.controllers.len() {
            self.feed(who, commit);
        }
    }

    fn feed(&mut self, who: usize, commit: &Commit) {
        let kind = commit.latest.kind();
        let Some(one) = self.controllers.get(who) else { return };
        let life = one.life;
        if one.feeds.get(&kind).is_none_or(|feed| feed.broken) {
            return;
        }
        let mut delay = self.random.between(MS / 2, 15 * MS);
        if self.faulty(|faults| faults.late_news_per_mille) {
            delay += self.random.between(50 * MS, 3_000 * MS);
        }
        let twice = self.faulty(|faults| faults.double_news_per_mille);
        let now = self.now;
        let Some(feed) = self.living(life).and_then(|one| one.feeds.get_mut(&kind)) else { return };
        feed.last = feed.last.max(now + delay);
        let after = feed.last - now;
        let object = commit.latest.clone();
        let news = if commit.gone { News::Gone(object) } else { News::Here(object) };
        if twice {
            self.at(after, Event::News { life, kind, news: news.clone() });
        }
        self.at(after, Event::News { life, kind, news });
    }

    /// A watch breaks (410, or the connection) and is taken up again later; what happens meanwhile is missed.
    pub fn break_watch(&mut self, who: usize, kind: Kind, after: u64) {
        let Some(one) = self.controllers.get_mut(who) else { return };
        let life = one.life;
        if let Some(feed) = one.feeds.get_mut(&kind)
            && !feed.broken
        {
            feed.broken = true;
            self.at(after, Event::Relist { life, kind });
        }
    }

    /// The kind is listed, in pages; what is written from now on is watched. A list whose revision has expired between two
    /// pages (410) is begun again.
    pub fn relist(&mut self, life: Life, kind: Kind) {
        if self.living(life).is_none() {
            return;
        }
        if self.store_down {
            return self.at(SECOND / 2, Event::Relist { life, kind });
        }
        let objects: Vec<Object> = self.store.list(kind).cloned().collect();
        let pages = if self.options.faults.expired_lists_per_mille == 0 { 1 } else { self.random.between(1, 4) };
        let size = objects.len().div_ceil(usize::try_from(pages).unwrap_or(1)).max(1);
        let mut rest = objects;
        let mut first = true;
        loop {
            let delay = self.random.between(MS, 20 * MS);
            let expired = !first && self.faulty(|faults| faults.expired_lists_per_mille);
            let now = self.now;
            let Some(feed) = self.living(life).and_then(|one| one.feeds.get_mut(&kind)) else { return };
            feed.last = feed.last.max(now + delay);
            feed.broken = expired;
            let after = feed.last - now;
            if expired {
                self.note(format!("the list of {} for controller {} expires between two pages", kind.kind(), life.who));
                return self.at(after + 10 * MS, Event::Relist { life, kind });
            }
            let page = rest.drain(..rest.len().min(size)).collect();
            let last = rest.is_empty();
            self.at(after, Event::Listed { life, kind, objects: page, first, last });
            if last {
                return;
            }
            first = false;
        }
    }

    /// A page of a list arrives.
    pub fn take_list(&mut self, life: Life, kind: Kind, objects: Vec<Object>, first: bool, last: bool) {
        let now = self.clock(life.who);
        let Some(one) = self.living(life) else { return };
        one.world.set_clock(now);
        if first {
            one.lists.insert(kind, one.world.names_of(kind).into_iter().collect());
        }
        let mut missing = one.lists.remove(&kind).unwrap_or_default();
        for object in objects {
            missing.remove(&object.name());
            let change = one.world.apply(object, Source::Watch);
            one.touch(change);
        }
        if last {
            for name in missing {
                let change = one.world.forget(kind, &name);
                one.touch(change);
            }
            if one.unlisted.remove(&kind) && one.unlisted.is_empty() {
                for key in Key::all(&one.world) {
                    one.queue.push(key);
                }
            }
        } else {
            one.lists.insert(kind, missing);
        }
        self.pump(life);
    }

    /// News arrive.
    pub fn take_news(&mut self, life: Life, kind: Kind, news: News) {
        let now = self.clock(life.who);
        let Some(one) = self.living(life).filter(|one| one.feeds.get(&kind).is_some_and(|feed| !feed.broken)) else {
            return;
        };
        one.world.set_clock(now);
        let change = match news {
            News::Here(object) => one.world.apply(object, Source::Watch),
            News::Gone(object) => one.world.delete(&object, Source::Watch),
        };
        one.touch(change);
        self.pump(life);
    }

    /// A wake-up.
    pub fn wake_controllers(&mut self, life: Life) {
        if let Some(one) = self.living(life) {
            one.wake_at = None;
            self.pump(life);
        }
    }

    /// Decides about everything that is due.
    fn pump(&mut self, life: Life) {
        let now = self.clock(life.who);
        let (clock, packed) = (self.options.clock, self.options.packed);
        while let Some(one) = self.living(life).filter(|one| one.unlisted.is_empty()) {
            if packed {
                one.world.pack(0);
            }
            let world = &one.world;
            let Some((key, lane)) = one.queue.next(now, |key| key.lane(world)) else { break };
            let view = View { now, world, settings: &one.settings };
            let began = clock.map(|clock| clock());
            let plan = match one.mutation {
                None => key.decide(&view),
                Some(mutation) => mutation.decide(&key, &view),
            };
            let took = clock.zip(began).map(|(clock, began)| clock().saturating_sub(began)).unwrap_or_default();
            let asleep = plan.effects.is_empty() && plan.wake_at.is_none() && check::needs_wake(&key, world);
            if let Some(wake_at) = plan.wake_at {
                one.queue.push_at(key.clone(), wake_at);
            }
            if plan.effects.is_empty() {
                one.queue.succeeded(&key);
                one.queue.done(&key, &lane);
                self.stats.decided(took);
                if asleep {
                    self.violate(Rule::Stuck, format!("nothing will ever wake the decision about {key}"));
                }
                continue;
            }
            let seen = plan
                .effects
                .iter()
                .filter_map(written)
                .filter_map(|target| Some((target.clone(), world.get(target.kind, &target.name)?.revision())))
                .collect();
            let id = one.next_chain;
            one.next_chain += 1;
            let chain = Chain { key, lane, seen, effects: plan.effects.into(), learned: Vec::new(), failed: false };
            one.chains.insert(id, chain);
            self.stats.decided(took);
            self.schedule_effect(life, id);
        }
        let Some(one) = self.living(life) else { return };
        let Some(wake) = one.queue.next_wake() else { return };
        let (skew, before) = (one.skew, one.wake_at);
        let at = self.microsecond(wake - SignedDuration::from_micros(skew)).max(self.now);
        if before.is_none_or(|before| at < before) {
            if let Some(one) = self.living(life) {
                one.wake_at = Some(at);
            }
            let after = at - self.now;
            self.at(after, Event::Wake { life });
        }
    }

    fn schedule_effect(&mut self, life: Life, chain: u64) {
        let after = self.random.between(MS / 2, 6 * MS);
        self.at(after, Event::Effect { life, chain });
    }

    /// Carries out the next write of a plan.
    pub fn carry_out_next(&mut self, life: Life, id: u64) {
        let Some(chain) = self.living(life).and_then(|one| one.chains.get_mut(&id)) else { return };
        // Events are told on the side.
        let mut told = Vec::new();
        while let Some(Effect::Record(_)) = chain.effects.front() {
            if let Some(Effect::Record(event)) = chain.effects.pop_front() {
                told.push(format!("  event {} on {}: {}", event.reason, event.target, event.message));
            }
        }
        let effect = chain.effects.pop_front();
        let key = chain.key.clone();
        for line in told {
            self.note(line);
        }
        let Some(effect) = effect else {
            let after = self.random.between(MS / 2, 3 * MS);
            return self.at(after, Event::Conclude { life, chain: id });
        };
        let mut learned = Vec::new();
        let mut good = self.carry_out(life, &key, effect, &mut learned);
        if good && self.faulty(|faults| faults.lost_answers_per_mille) {
            self.note("  the answer is lost".to_owned());
            learned.clear();
            good = false;
        }
        let Some(chain) = self.living(life).and_then(|one| one.chains.get_mut(&id)) else { return };
        chain.learned.extend(learned);
        if good && !chain.effects.is_empty() {
            return self.schedule_effect(life, id);
        }
        chain.failed = !good;
        let after = self.random.between(MS / 2, 3 * MS);
        self.at(after, Event::Conclude { life, chain: id });
    }

    fn carry_out(&mut self, life: Life, key: &Key, effect: Effect, learned: &mut Vec<Learned>) -> bool {
        let now = self.time();
        let who = life.who;
        let spurious = self.faulty(|faults| faults.conflicts_per_mille);
        let target = match (&effect, written(&effect)) {
            (Effect::Create(object), _) => object.reference(),
            (_, Some(target)) => target.clone(),
            _ => return true,
        };
        if self.store_down {
            self.note(format!("{who} [{key}] finds no API server for {target}"));
            return false;
        }
        if spurious {
            self.note(format!("{who} [{key}] write to {target} meets a conflict by chance"));
            self.stats.conflicts += 1;
            self.look_up(&target, learned);
            return false;
        }
        if let Effect::Confirm { revision, .. } = &effect {
            self.look_up(&target, learned);
            let found = self.store.get(&target).and_then(|object| object.metadata().resource_version.as_ref());
            let same = found == revision.as_ref();
            if !same {
                self.stats.conflicts += 1;
                self.note(format!("{who} [{key}] decided on another {target} than there is"));
            }
            return same;
        }
        let what = describe(&effect);
        let unguarded = self.controllers.get(who).is_some_and(|one| one.mutation == Some(Mutation::NoRevisions));
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
            Effect::Patch(_, patch) if unguarded => {
                self.store.merge(&target, false, &without_revision(patch)).map(Some)
            }
            Effect::PatchStatus(_, patch) if unguarded => {
                self.store.merge(&target, true, &without_revision(patch)).map(Some)
            }
            Effect::Patch(_, patch) => self.store.merge(&target, false, &patch).map(Some),
            Effect::PatchStatus(_, patch) => self.store.merge(&target, true, &patch).map(Some),
            Effect::Delete { uid, grace_seconds, .. } => match self.store.delete(&target, &uid, grace_seconds, now) {
                Err(Refusal::NotFound) => Ok(None),
                answer => answer,
            },
            Effect::Bind { uid, node, .. } => self.store.bind(&target, &uid, &node).map(Some),
            Effect::Evict { uid, or_learn, .. } => {
                if let Some(why) = self.store.refuses_eviction(&target, &uid) {
                    self.note(format!("{who} [{key}] may not evict {target}: {why}"));
                    self.spread();
                    learned.push(Learned::NotEvicted(target, uid, why));
                    return or_learn;
                }
                self.evicted_by(key, &uid);
                match self.store.delete(&target, &uid, None, now) {
                    Err(Refusal::NotFound) => Ok(None),
                    answer => answer,
                }
            }
            Effect::Confirm { .. } | Effect::Record(_) => return true,
        };
        match &answer {
            Ok(_) => {
                self.stats.writes += 1;
                self.note(format!("{who} [{key}] {what} {target}"));
            }
            Err(refusal) => self.note(format!("{who} [{key}] {what} {target}: {refusal:?}")),
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
    pub fn conclude(&mut self, life: Life, id: u64) {
        let now = self.clock(life.who);
        let Some(one) = self.living(life) else { return };
        let Some(chain) = one.chains.remove(&id) else { return };
        for piece in chain.learned {
            let world = &mut one.world;
            let change = match piece {
                Learned::Here(object) => world.apply(object, Source::Answer),
                Learned::NotEvicted(pod, uid, why) => {
                    world.refuse_eviction(&pod.name, &uid, why, now);
                    None
                }
                Learned::Gone(target) => {
                    let held = world.get(target.kind, &target.name).map_or(0, |object| object.revision());
                    let known = chain.seen.iter().find(|(other, _)| *other == target).map_or(0, |(_, seen)| *seen);
                    (held <= known).then(|| world.forget(target.kind, &target.name)).flatten()
                }
            };
            one.touch(change);
        }
        one.queue.done(&chain.key, &chain.lane);
        if chain.failed {
            one.queue.failed(chain.key, now);
        } else {
            one.queue.succeeded(&chain.key);
        }
        self.pump(life);
    }
}

fn without_revision(mut patch: serde_json::Value) -> serde_json::Value {
    if let Some(metadata) = patch.get_mut("metadata").and_then(|metadata| metadata.as_object_mut()) {
        metadata.remove("resourceVersion");
    }
    patch
}

/// The object that an effect changes.
fn written(effect: &Effect) -> Option<&Ref> {
    match effect {
        Effect::Patch(target, _)
        | Effect::PatchStatus(target, _)
        | Effect::Delete { target, .. }
        | Effect::Confirm { target, .. } => Some(target),
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
        Effect::Confirm { .. } => "confirms".to_owned(),
        Effect::Record(_) => "tells of".to_owned(),
    }
}

fn owner(object: &Object) -> Option<String> {
    let owners = object.metadata().owner_references.iter().flatten();
    owners.filter(|owner| owner.controller == Some(true)).map(|owner| owner.uid.clone()).next()
}
