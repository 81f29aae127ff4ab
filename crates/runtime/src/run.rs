//! The loop: news in, decisions out.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::Duration;

use godwit_control::{
    Change, Effect, EventRecord, EventType, Key, Kind, Lane, Name, Noun, Packed, Ref, Source, View, World, kinds_for,
    names,
};
use jiff::Timestamp;
use kube::Client;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::execute::{Executor, Failure, Learned, Seen};
use crate::intake::{News, kind_api, watch_kind};
use crate::leftovers::{Leftovers, give_back};
use crate::scrape::{Counting, Scrapes, Standing};
use crate::{Error, Options, events, leader, scrape};
use godwit_control::queue::Queue;

/// How many pieces of news are taken in before decisions are made on them.
const BATCH: usize = 256;
/// How many objects are held ready to be read: some 10 KiB each.
const UNPACKED: usize = 512;
/// How many decisions are made before news, answers and the lease get their turn. A first look at a large cluster takes seconds, in
/// which the lease would run out, and the next leader would take as long.
const DECISIONS: usize = 64;
/// How many plans are carried out at once. A first look at a large cluster may find thousands, each with a request to hold.
const UNDER_WAY: usize = 64;
/// How long writes under way may take when the controllers stop.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long nothing is looked at when nothing happens.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// What became of a decision.
struct Outcome {
    key: Key,
    lane: Lane,
    seen: Seen,
    learned: Vec<Learned>,
    result: Result<(), Failure>,
}

/// Runs the controllers until `shutdown` ends. Decisions begin when every watched kind has been listed once.
pub async fn run(client: Client, mut options: Options, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    let (news_in, mut news) = mpsc::channel(BATCH);
    let (events_in, events_out) = mpsc::channel(1024);
    let mut background = JoinSet::new();
    let kinds = kinds_for(&options.nouns);
    for kind in &kinds {
        background.spawn(watch_kind(kind_api(&client, *kind, &options.installation), *kind, news_in.clone()));
    }
    drop(news_in);
    background.spawn(events::record(client.clone(), options.identity.clone(), events_out));

    let (tell_until, mut until) = watch::channel(None);
    let holder = options.lease.clone();
    let election =
        holder.as_ref().map(|holder| background.spawn(leader::elect(client.clone(), holder.clone(), tell_until)));

    let leads = holder.as_ref().map(|_| until.clone());
    let executor =
        Executor { client: client.clone(), controller: None, events: events_in.clone(), leads: leads.clone() };
    let scheduler = Executor {
        client: options.scheduler.clone().unwrap_or_else(|| client.clone()),
        controller: Some(client.clone()),
        events: events_in,
        leads,
    };
    let leads = if holder.is_some() { Leads::Not } else { Leads::Always };
    let mut scrapes = options.scrapes.take();
    let mut shell = Shell::new(options, kinds, executor, scheduler, leads);
    let mut shutdown = std::pin::pin!(shutdown);
    let mut batch = Vec::new();
    let mut is_more_due = false;
    loop {
        let timer = shell.until_next_wake();
        tokio::select! {
            () = &mut shutdown => break,
            count = news.recv_many(&mut batch, BATCH) => {
                if count == 0 {
                    break;
                }
                for piece in batch.drain(..) {
                    shell.take_in(piece)?;
                    shell.pack();
                }
            }
            Some(outcome) = shell.running.join_next() => match outcome {
                Ok(outcome) => shell.conclude(outcome),
                // A panic in the executor would be ours; the lane stays closed rather than being worked twice.
                Err(error) => warn!(%error, "a write ended abnormally"),
            },
            Ok(()) = until.changed(), if holder.is_some() => shell.lead(*until.borrow_and_update()),
            asking = Scrapes::next(&mut scrapes) => shell.counting.ask(asking, &shell.options.nouns, &shell.world),
            () = tokio::time::sleep(timer) => {}
            () = std::future::ready(()), if is_more_due => {}
        }
        is_more_due = shell.pump();
        shell.count();
        if shell.leftovers.take(Instant::now()) {
            // Beside this thread, which goes on as long as it needs no memory.
            tokio::task::spawn_blocking(give_back);
        }
        if is_more_due {
            tokio::task::yield_now().await;
        }
    }
    info!("controllers stop");
    if let Some(election) = election {
        election.abort();
    }
    let farewell = async {
        while shell.running.join_next().await.is_some() {}
        if let Some(holder) = holder
            && let Err(error) = leader::give_back(client, &holder).await
        {
            debug!(%error, "the lease is not given back, it ends by itself");
        }
    };
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
    Ok(())
}

/// Whether this controller decides.
#[derive(Clone, Copy)]
enum Leads {
    /// There is nobody else.
    Always,
    /// Somebody else does.
    Not,
    /// Until this moment, unless the lease is renewed.
    Until(Instant),
}

/// A list under way.
#[derive(Default)]
struct List {
    /// What was known before it was asked for, and has not been listed yet.
    missing: BTreeSet<Name>,
    /// What has been listed and is newer than what is known.
    newer: Vec<Packed>,
    /// The newest revision of what has been listed and is known.
    known_up_to: u64,
}

struct Shell {
    options: Options,
    world: World,
    queue: Queue,
    /// Kinds that have not been listed yet.
    unlisted: BTreeSet<Kind>,
    /// Lists under way. A list is taken in as a whole, since decisions rely on knowing all that is older than the newest known; the first of
    /// a kind as it comes, since nothing is decided before its end.
    lists: BTreeMap<Kind, List>,
    executor: Executor,
    scheduler: Executor,
    running: JoinSet<Outcome>,
    leads: Leads,
    counting: Counting,
    leftovers: Leftovers,
}

impl Shell {
    fn new(options: Options, kinds: Vec<Kind>, executor: Executor, scheduler: Executor, leads: Leads) -> Self {
        Self {
            world: World::of(options.installation.clone()),
            options,
            queue: Queue::default(),
            unlisted: kinds.into_iter().collect(),
            lists: BTreeMap::new(),
            executor,
            scheduler,
            running: JoinSet::new(),
            leads,
            counting: Counting::default(),
            leftovers: Leftovers::default(),
        }
    }

    /// The lease is held until then, or not.
    fn lead(&mut self, until: leader::Until) {
        if matches!(self.leads, Leads::Not) && until.is_some() && self.unlisted.is_empty() {
            // Whoever decided before may have left something undone.
            self.push_all();
        }
        self.leads = until.map_or(Leads::Not, Leads::Until);
    }

    /// Whether to decide now. A lease that has not been renewed in time is lost, whatever anybody says.
    fn decides(&mut self) -> bool {
        if let Leads::Until(until) = self.leads
            && Instant::now() >= until
        {
            warn!("the lease was not renewed in time, this controller decides no more");
            self.leads = Leads::Not;
        }
        !matches!(self.leads, Leads::Not) && self.unlisted.is_empty()
    }

    fn take_in(&mut self, piece: News) -> Result<(), Error> {
        self.world.set_clock(Timestamp::now());
        self.leftovers.add(1);
        match piece {
            News::Here(object) => {
                let change = self.world.apply(object, Source::Watch);
                self.touch(change);
            }
            News::Gone(object) => {
                let change = self.world.delete(&object, Source::Watch);
                self.touch(change);
            }
            News::ListBegins(kind, ready) => {
                let missing = self.world.names_of(kind).into_iter().collect();
                self.lists.insert(kind, List { missing, newer: Vec::new(), known_up_to: 0 });
                let _ = ready.send(());
            }
            News::Listed(object) => {
                let (kind, name) = (object.kind(), object.name());
                let list = self.lists.entry(kind).or_default();
                list.missing.remove(&name);
                if self.unlisted.contains(&kind) {
                    // No decision is made yet.
                    self.world.apply(object, Source::Watch);
                } else if self.world.knows(&object) {
                    // An answer to a write that is under way may be older, and count until the rest of the list is known.
                    list.known_up_to = list.known_up_to.max(object.revision());
                } else {
                    list.newer.push(object.packed());
                }
            }
            News::ListEnds(kind) => {
                let List { missing, newer, known_up_to } = self.lists.remove(&kind).unwrap_or_default();
                self.world.shown(kind, known_up_to);
                for packed in newer {
                    let object = match packed.object() {
                        Ok(object) => object,
                        Err(error) => {
                            warn!(kind = kind.kind(), %error, "a listed object cannot be unpacked and is left alone");
                            continue;
                        }
                    };
                    let change = self.world.apply(object, Source::Watch);
                    self.touch(change);
                    self.pack();
                }
                for name in missing {
                    let change = self.world.forget(kind, &name);
                    self.touch(change);
                }
                if self.unlisted.remove(&kind) && self.unlisted.is_empty() {
                    info!("all kinds listed, controllers begin");
                    if let Some(listed) = &self.options.listed {
                        listed.send_replace(true);
                    }
                    self.push_all();
                }
            }
            News::Ended(kind) => return Err(Error::WatchEnded(kind)),
        }
        Ok(())
    }

    /// Holds of objects that nobody reads no more than their text. Beside a bare server they are all read time and again, by who
    /// collects garbage, and there are few.
    fn pack(&mut self) {
        if !self.is_beside_a_bare_server() {
            self.world.pack(UNPACKED);
        }
    }

    fn push(&mut self, key: Key) {
        if self.options.nouns.contains(&key.noun()) {
            self.queue.push(key);
        }
    }

    /// Whatever a change touches is decided again.
    fn touch(&mut self, change: Option<Change>) {
        // Before everything is known nothing is decided, and then everything is.
        if let Some(change) = change.filter(|_| self.unlisted.is_empty()) {
            let mut keys = Key::affected(&change, &self.world);
            if self.is_beside_a_bare_server() {
                keys.extend(Key::affected_beside_a_bare_server(&change, &self.world));
            }
            for key in keys {
                self.push(key);
            }
        }
    }

    fn push_all(&mut self) {
        let mut keys = Key::all(&self.world);
        if self.is_beside_a_bare_server() {
            keys.extend(Key::all_beside_a_bare_server(&self.world));
        }
        for key in keys {
            self.push(key);
        }
    }

    fn is_beside_a_bare_server(&self) -> bool {
        [Noun::Garbage, Noun::Disruption].iter().any(|noun| self.options.nouns.contains(noun))
    }

    /// Goes on with the figures that somebody has asked for.
    fn count(&mut self) {
        if self.counting.is_under_way() {
            let standing = Standing { ready: self.unlisted.is_empty(), leads: self.decides() };
            let version = format!("v{}", self.options.settings.version);
            self.counting.go_on(standing, &self.options.nouns, &version, &self.world);
            self.leftovers.add(scrape::SLICE);
            self.pack();
        }
    }

    fn until_next_wake(&self) -> Duration {
        if self.counting.is_under_way() {
            return Duration::ZERO;
        }
        let decision = match self.leads {
            Leads::Not => LONGEST_WAIT,
            _ => wait(self.queue.next_wake(), Timestamp::now()),
        };
        self.leftovers.due_in(Instant::now()).map_or(decision, |due| due.min(decision))
    }

    /// Decides about what is due, and starts carrying it out. Returns whether there may be more.
    fn pump(&mut self) -> bool {
        for _ in 0..DECISIONS {
            if !self.decides() {
                return false;
            }
            self.pack();
            let now = Timestamp::now();
            let world = &self.world;
            let next = self.queue.next_in_turn(now, UNDER_WAY, |key| key.lane(world));
            let Some((key, lane)) = next else { return false };
            self.leftovers.add(1);
            let plan = key.decide(&View { now, world, settings: &self.options.settings });
            if let Some(wake_at) = plan.wake_at {
                self.queue.push_at(key.clone(), wake_at);
            }
            if plan.effects.is_empty() {
                self.queue.succeeded(&key);
                self.queue.done(&key, &lane);
                continue;
            }
            trace(&key, &plan.effects);
            let executor = if key.noun() == Noun::Placement { &self.scheduler } else { &self.executor }.clone();
            let seen: Seen = targets(&plan.effects)
                .filter_map(|target| {
                    let held = world.get(target.kind, &target.name)?;
                    Some((target.clone(), held.metadata().resource_version.clone()?))
                })
                .collect();
            self.running.spawn(async move {
                let (learned, result) = executor.carry_out(plan.effects, &seen).await;
                Outcome { key, lane, seen, learned, result }
            });
        }
        true
    }

    /// That a VMI's evacuation cannot go on, its `kubectl describe` shall say.
    fn tell_evacuated(&self, key: &Key, error: &str) {
        let Key::Evacuation(name) = key else { return };
        let Some(vmi) = self.world.vmis.get(name) else { return };
        let _ = self.executor.events.try_send(EventRecord {
            target: Ref::new(Kind::VirtualMachineInstance, name.clone()),
            uid: vmi.uid().to_owned(),
            resource_version: String::new(),
            type_: EventType::Warning,
            reason: names::events::reason::FAILED_CREATE.to_owned(),
            message: names::events::failed_to_create_migration(error),
            component: names::events::COMPONENT_EVACUATION,
        });
    }

    fn conclude(&mut self, outcome: Outcome) {
        let Outcome { key, lane, seen, learned, result } = outcome;
        for piece in learned {
            let change = match piece {
                Learned::Here(object) => self.world.apply(object, Source::Answer),
                Learned::Refused(target, why) => {
                    self.world.refuse(target.name, why, Timestamp::now());
                    None
                }
                Learned::NotEvicted(pod, uid, why) => {
                    self.world.refuse_eviction(&pod.name, &uid, why, Timestamp::now());
                    None
                }
                Learned::Gone(target) => {
                    // Under the same name something newer may have appeared by now.
                    let held = self.world.get(target.kind, &target.name).map_or(0, |object| object.revision());
                    let known = seen.iter().find(|(other, _)| *other == target);
                    let known = known.and_then(|(_, revision)| revision.parse().ok()).unwrap_or(0);
                    (held <= known).then(|| self.world.forget(target.kind, &target.name)).flatten()
                }
            };
            self.touch(change);
        }
        self.queue.done(&key, &lane);
        match result {
            Ok(()) => self.queue.succeeded(&key),
            Err(failure) => {
                let pause = self.queue.failed(key.clone(), Timestamp::now());
                match failure {
                    // What is fresh has been taken in, which decides again at once; the pause is the second net.
                    Failure::Conflict => debug!(%key, "decided on an old state, deciding again"),
                    Failure::Deposed => debug!(%key, "not carried out to its end, the lease has run out"),
                    Failure::Refused(error) => {
                        self.tell_evacuated(&key, &error);
                        warn!(%key, %error, retry_in_ms = pause.as_millis(), "could not be carried out");
                    }
                }
            }
        }
    }
}

/// How long to wait for the next timer.
fn wait(timer: Option<Timestamp>, now: Timestamp) -> Duration {
    let Some(timer) = timer else { return LONGEST_WAIT };
    Duration::try_from(timer.duration_since(now)).unwrap_or(Duration::ZERO).min(LONGEST_WAIT)
}

/// The objects that effects write to.
fn targets(effects: &[Effect]) -> impl Iterator<Item = &Ref> {
    effects.iter().filter_map(|effect| match effect {
        Effect::Patch(target, _)
        | Effect::PatchStatus(target, _)
        | Effect::Delete { target, .. }
        | Effect::Confirm { target, .. } => Some(target),
        Effect::Bind { pod, .. } | Effect::Evict { pod, .. } => Some(pod),
        Effect::Create(_) | Effect::Record(_) => None,
    })
}

fn trace(key: &Key, effects: &[Effect]) {
    for effect in effects {
        match effect {
            Effect::Create(object) => debug!(%key, object = %object.reference(), "create"),
            Effect::Patch(target, patch) => debug!(%key, %target, %patch, "patch"),
            Effect::PatchStatus(target, patch) => debug!(%key, %target, %patch, "patch status"),
            Effect::Delete { target, .. } => debug!(%key, %target, "delete"),
            Effect::Bind { pod, node, .. } => debug!(%key, %pod, node, "bind"),
            Effect::Confirm { target, .. } => debug!(%key, %target, "confirm"),
            Effect::Evict { pod, .. } => debug!(%key, %pod, "evict"),
            Effect::Record(event) => debug!(%key, reason = event.reason, message = event.message, "event"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_timer_is_waited_for() {
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!(wait(Some(at(90)), at(100)), Duration::ZERO);
        assert_eq!(wait(Some(at(130)), at(100)), Duration::from_secs(30));
        assert_eq!(wait(None, at(100)), LONGEST_WAIT);
    }
}

#[cfg(test)]
#[path = "intake_tests.rs"]
mod intake_tests;
