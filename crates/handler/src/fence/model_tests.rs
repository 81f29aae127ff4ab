//! The argument of docs/fencing.md, run: nodes with these rules, links and an API that come and go, answers that are late or
//! lost, and a controller that declares whom it may. Nobody that it declares runs guests, nor has for the margin.

use std::collections::BTreeSet;
use std::time::Duration;

use godwit_api::names::fence::{DURATION, MARGIN, RENEW_EVERY, STEADY_GAP};
use proptest::prelude::*;

use super::rules::{Peers, Rules, counts};

const NODES: usize = 4;
const TICK: Duration = Duration::from_millis(500);
/// How long a handler waits for an answer: when it tries again it hears none to what it sent before.
const LIMIT: Duration = Duration::from_secs(4);
/// News reaches the controller within this.
const NEWS: Duration = Duration::from_secs(3);

fn name(node: usize) -> String {
    format!("node{node}")
}

/// A renewal on its way: sent, taken by the API, answered.
#[derive(Clone)]
struct Renewal {
    sent: Duration,
    on: u32,
    peers: Peers,
    arrives: Duration,
    answer: Option<(Duration, u32)>,
    /// Whoever sent it is no more.
    deaf: bool,
}

struct Node {
    rules: Rules,
    /// What the next handler finds.
    kept: Rules,
    /// It has just started, and reads the lease first.
    begins: bool,
    revision: u32,
    next: Duration,
    renewals: Vec<Renewal>,
    reaches_api: bool,
    /// What it sends is taken, and the answer comes too late.
    hears_late: bool,
}

#[derive(Clone, Default)]
struct Lease {
    revision: u32,
    peers: Peers,
}

/// What the controller knows of a node.
#[derive(Clone, Default)]
struct Heard {
    lease: Lease,
    last: Duration,
    steady_since: Duration,
}

struct World {
    now: Duration,
    nodes: Vec<Node>,
    leases: Vec<Lease>,
    news: Vec<(Duration, usize, Lease)>,
    heard: Vec<Heard>,
    api: bool,
    between: [[bool; NODES]; NODES],
    declared: usize,
}

impl World {
    fn new() -> Self {
        let node = |_| Node {
            rules: Rules::new(Duration::ZERO),
            kept: Rules::new(Duration::ZERO),
            begins: false,
            revision: 0,
            next: Duration::ZERO,
            renewals: Vec::new(),
            reaches_api: true,
            hears_late: false,
        };
        Self {
            now: Duration::ZERO,
            nodes: (0..NODES).map(node).collect(),
            leases: vec![Lease::default(); NODES],
            news: Vec::new(),
            heard: vec![Heard::default(); NODES],
            api: true,
            between: [[true; NODES]; NODES],
            declared: 0,
        }
    }

    /// One tick; `late` and `named` are drawn anew for each.
    fn tick(&mut self, late: u8, named: u8) {
        self.now += TICK;
        let (now, late) = (self.now, TICK * u32::from(late % 5));
        for number in 0..NODES {
            let works = self.api && self.nodes[number].reaches_api;
            let node = &mut self.nodes[number];
            // The API takes what has arrived, on the revision that it has, and answers, unless that is lost.
            for renewal in node.renewals.iter_mut().filter(|renewal| renewal.answer.is_none() && renewal.arrives <= now)
            {
                if self.api && renewal.on == self.leases[number].revision {
                    let lease = &mut self.leases[number];
                    lease.revision += 1;
                    lease.peers.clone_from(&renewal.peers);
                    let more = if node.hears_late { LIMIT } else { Duration::ZERO };
                    renewal.answer = Some((now + late + more, lease.revision));
                    self.news.push((now + late.min(NEWS), number, lease.clone()));
                }
            }
            if works {
                let hears = |one: &&Renewal| {
                    let heard = one.answer.is_some_and(|(at, _)| at <= now && at < one.sent + LIMIT);
                    heard && !one.deaf && now < one.sent + LIMIT
                };
                let answered = node.renewals.iter().find(hears).cloned();
                if let Some(Renewal { sent, peers, answer: Some((_, revision)), .. }) = answered {
                    node.rules.answered(sent, now, peers);
                    node.kept = node.rules.clone();
                    node.revision = revision;
                    node.next = sent + RENEW_EVERY;
                    node.renewals.clear();
                }
            }
            if now >= node.next {
                // After a failure it reads the lease first.
                let read = self.leases[number].revision;
                if works && (node.begins || !node.renewals.is_empty()) && node.revision != read {
                    node.rules.finds_news(now);
                    node.revision = read;
                }
                node.begins &= !works;
                let others = (0..NODES).filter(|other| *other != number && named >> other & 1 == 1).map(name);
                let peers: Peers = (named < 250).then(|| others.collect::<BTreeSet<_>>());
                node.rules.sends(peers.clone());
                node.kept = node.rules.clone();
                let (on, arrives) = (node.revision, now + late);
                node.renewals.push(Renewal { sent: now, on, peers, arrives, answer: None, deaf: false });
                node.next = now + LIMIT;
            }
        }
        for number in 0..NODES {
            let rules = &self.nodes[number].rules;
            if counts(rules.silent_for(now))
                && let Some(peers) = rules.to_ask()
            {
                let silent =
                    |other: usize| self.between[number][other] && counts(self.nodes[other].rules.silent_for(now));
                let all = (0..NODES).filter(|other| peers.contains(&name(*other))).all(silent);
                if all {
                    let node = &mut self.nodes[number];
                    node.rules.put_off(now, now);
                    node.kept = node.rules.clone();
                }
            }
        }
        let (come, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.news).into_iter().partition(|(at, ..)| *at <= now);
        self.news = later;
        for (_, number, lease) in come {
            let heard = &mut self.heard[number];
            if now.saturating_sub(heard.last) > STEADY_GAP {
                heard.steady_since = now;
            }
            if lease.revision > heard.lease.revision {
                (heard.last, heard.lease) = (now, lease);
            }
        }
        self.declare();
    }

    /// Its handler dies, and another one starts.
    fn restart(&mut self, number: usize) {
        let (now, node) = (self.now, &mut self.nodes[number]);
        node.rules = if node.kept.is_held(now) { node.kept.clone() } else { Rules::new(now) };
        node.renewals.iter_mut().for_each(|renewal| renewal.deaf = true);
        (node.begins, node.next) = (true, now);
    }

    fn declare(&mut self) {
        let (now, window) = (self.now, DURATION + MARGIN);
        for number in 0..NODES {
            let heard = &self.heard[number];
            let steady = |other: usize| {
                let other = &self.heard[other];
                now.saturating_sub(other.last) <= STEADY_GAP && now.saturating_sub(other.steady_since) >= window
            };
            let witness = match &heard.lease.peers {
                Some(peers) => (0..NODES).any(|other| peers.contains(&name(other)) && steady(other)),
                None => (0..NODES).any(|other| other != number && steady(other)),
            };
            let on_its_revision = heard.lease.revision == self.leases[number].revision && heard.lease.revision > 0;
            if self.api && on_its_revision && witness && now.saturating_sub(heard.last) >= window {
                let until = self.nodes[number].rules.until().unwrap_or_default();
                assert!(until + MARGIN <= now, "{} is declared at {now:?} and runs until {until:?}", name(number));
                self.declared += 1;
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Turn {
    Api(bool),
    Uplink(usize, bool),
    Between(usize, usize, bool),
    Late(usize, bool),
    Restart(usize),
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        any::<bool>().prop_map(Turn::Api),
        (0..NODES, any::<bool>()).prop_map(|(node, up)| Turn::Uplink(node, up)),
        (0..NODES, 0..NODES, any::<bool>()).prop_map(|(one, other, up)| Turn::Between(one, other, up)),
        (0..NODES, any::<bool>()).prop_map(|(node, late)| Turn::Late(node, late)),
        (0..NODES).prop_map(Turn::Restart),
    ]
}

proptest! {
    #[test]
    fn whoever_is_declared_dead_is_dead_for_the_margin(
        turns in proptest::collection::vec((turn(), proptest::collection::vec((0..5_u8, any::<u8>()), 1..90)), 1..25)
    ) {
        let mut world = World::new();
        for (turn, ticks) in turns {
            match turn {
                Turn::Api(up) => world.api = up,
                Turn::Uplink(node, up) => world.nodes[node].reaches_api = up,
                Turn::Between(one, other, up) => (world.between[one][other], world.between[other][one]) = (up, up),
                Turn::Late(node, late) => world.nodes[node].hears_late = late,
                Turn::Restart(node) => world.restart(node),
            }
            for (late, named) in ticks {
                world.tick(late, named);
            }
        }
    }
}

#[test]
fn a_node_that_is_cut_off_is_declared_and_one_that_all_are_like_is_not() {
    let everybody = 0b1111;
    let mut world = World::new();
    (0..40).for_each(|_| world.tick(0, everybody));
    world.nodes[0].reaches_api = false;
    (0..70).for_each(|_| world.tick(0, everybody));
    assert!(world.declared > 0);

    let mut world = World::new();
    (0..40).for_each(|_| world.tick(0, everybody));
    world.api = false;
    (0..200).for_each(|_| world.tick(0, everybody));
    assert!(world.nodes.iter().all(|node| node.rules.is_held(world.now)), "no guest is fenced");
    world.api = true;
    (0..200).for_each(|_| world.tick(0, everybody));
    assert_eq!(world.declared, 0);
}

#[test]
fn handlers_that_restart_while_the_api_is_away_for_all_cost_no_guest() {
    let everybody = 0b1111;
    let mut world = World::new();
    (0..40).for_each(|_| world.tick(0, everybody));
    world.api = false;
    for number in (0..NODES).cycle().take(20) {
        (0..20).for_each(|_| world.tick(0, everybody));
        world.restart(number);
    }
    assert!(world.nodes.iter().all(|node| node.rules.is_held(world.now)), "no guest is fenced");
    world.api = true;
    (0..200).for_each(|_| world.tick(0, everybody));
    assert_eq!(world.declared, 0);
}

#[test]
fn nodes_that_hear_no_answer_in_time_and_yet_renew_do_not_say_that_they_have_no_contact() {
    let everybody = 0b1111;
    let mut world = World::new();
    (0..40).for_each(|_| world.tick(0, everybody));
    world.nodes[0].reaches_api = false;
    (1..NODES).for_each(|other| world.nodes[other].hears_late = true);
    (0..120).for_each(|_| world.tick(0, everybody));
    assert!(world.declared > 0, "they are heard steadily");
}
