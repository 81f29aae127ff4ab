//! Two controllers on caches that lag, restarts between any two writes, limits that change: no write breaks a limit.

use std::collections::{BTreeMap, VecDeque};

use godwit_api::Installation;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::migration::tests::{cluster, migrate, name, state, tell};
use crate::testing::Cluster;
use crate::{Effect, Key, Kind, Object, Ref, Source, View, World};

const VMIS: [(&str, &str); 7] =
    [("a", "node1"), ("b", "node1"), ("c", "node1"), ("d", "node2"), ("e", "node2"), ("f", "node3"), ("g", "node3")];
const WATCHED: [Kind; 6] =
    [Kind::Migration, Kind::VirtualMachineInstance, Kind::Pod, Kind::ConfigMap, Kind::KubeVirt, Kind::Node];

/// A controller: what it knows, what is on its way to it, and a plan that it has not carried out to its end.
struct Controller {
    world: World,
    news: BTreeMap<Kind, VecDeque<(Object, bool)>>,
    plan: VecDeque<Effect>,
    /// The limits that the plan was made by: one that is lowered afterwards counts from the next decision.
    limits: Limits,
}

impl Controller {
    fn knowing(world: World) -> Self {
        let limits = Limits::of(world.configuration());
        Self { world, news: BTreeMap::new(), plan: VecDeque::new(), limits }
    }
}

/// The truth, and two who see it late.
struct Race {
    truth: Cluster,
    told: BTreeMap<Ref, Object>,
    controllers: [Controller; 2],
    broken: Option<String>,
}

impl Race {
    fn new() -> Self {
        let mut truth = cluster(&VMIS);
        limits(&mut truth, 3, 2, 1);
        let controllers = [(); 2].map(|()| Controller::knowing(World::default()));
        let mut race = Self { truth, told: BTreeMap::new(), controllers, broken: None };
        race.spread();
        race.restart(0);
        race.restart(1);
        race
    }

    /// Every change of the truth is on its way to both.
    fn spread(&mut self) {
        let mut now = BTreeMap::new();
        for kind in WATCHED {
            for name in self.truth.world.names_of(kind) {
                let object = self.truth.world.get(kind, &name).unwrap();
                now.insert(object.reference(), object);
            }
        }
        let mut news: Vec<(u64, Object, bool)> = Vec::new();
        for (target, object) in &now {
            if self.told.get(target).is_none_or(|told| told.revision() < object.revision()) {
                news.push((object.revision(), object.clone(), false));
            }
        }
        for (target, object) in &self.told {
            if !now.contains_key(target) {
                news.push((object.revision(), object.clone(), true));
            }
        }
        news.sort_by_key(|(revision, ..)| *revision);
        for controller in &mut self.controllers {
            for (_, object, gone) in &news {
                controller.news.entry(object.kind()).or_default().push_back((object.clone(), *gone));
            }
        }
        self.told = now;
    }

    fn deliver(&mut self, who: usize, kind: Kind, count: usize) {
        let controller = &mut self.controllers[who];
        let Some(news) = controller.news.get_mut(&kind) else { return };
        for _ in 0..count {
            match news.pop_front() {
                Some((object, true)) => controller.world.delete(&object, Source::Watch),
                Some((object, false)) => controller.world.apply(object, Source::Watch),
                None => return,
            };
        }
    }

    /// Everything is forgotten and listed anew; the plan is cut off.
    fn restart(&mut self, who: usize) {
        let mut world = World::default();
        for object in self.told.values() {
            world.apply(object.clone(), Source::Watch);
        }
        self.controllers[who] = Controller::knowing(world);
    }

    fn decide(&mut self, who: usize, key: &Key) {
        let controller = &mut self.controllers[who];
        let view = View { now: self.truth.now, world: &controller.world, settings: &self.truth.settings };
        controller.plan = key.decide(&view).effects.into();
        controller.limits = Limits::of(controller.world.configuration());
    }

    /// Carries out the next write of a plan.
    fn write(&mut self, who: usize) {
        let Some(effect) = self.controllers[who].plan.pop_front() else { return };
        let value = |target: &Ref| self.truth.get(target.kind, &target.name);
        let (target, done) = match &effect {
            Effect::Create(object) => (object.reference(), value(&object.reference()).is_none()),
            Effect::Patch(target, patch) | Effect::PatchStatus(target, patch) => {
                let wanted = patch.pointer("/metadata/resourceVersion").filter(|wanted| !wanted.is_null());
                let held = value(target);
                let fits = held.as_ref().is_some_and(|held| {
                    wanted.is_none_or(|wanted| held.pointer("/metadata/resourceVersion") == Some(wanted))
                });
                (target.clone(), fits)
            }
            Effect::Delete { target, uid, .. } => {
                let held = value(target);
                (target.clone(), held.is_some_and(|held| uid.is_empty() || held["metadata"]["uid"] == json!(uid)))
            }
            Effect::Bind { pod, uid, .. } | Effect::Evict { pod, uid, .. } => {
                let held = value(pod);
                let free = held
                    .is_some_and(|held| held["metadata"]["uid"] == json!(uid) && held["spec"]["nodeName"].is_null());
                (pod.clone(), free)
            }
            Effect::Confirm { target, revision } => {
                let held = value(target);
                let seen = held.as_ref().and_then(|held| held.pointer("/metadata/resourceVersion")?.as_str());
                (target.clone(), seen == revision.as_deref())
            }
            Effect::Record(_) => return,
        };
        let before = self.truth.world.turns().ledger().clone();
        if done {
            self.truth.carry_out(crate::Plan { effects: vec![effect], wake_at: None });
            self.spread();
            if target == reference(&Installation::USUAL) {
                self.check_gain(who, &before);
            }
        } else {
            self.controllers[who].plan.clear();
        }
        if let Some(object) = self.truth.world.get(target.kind, &target.name) {
            self.controllers[who].world.apply(object, Source::Answer);
        }
    }

    fn unfinished(&self, uid: &str) -> bool {
        self.truth.world.migration_by_uid(uid).is_some_and(|migration| !migration.is_final())
    }

    /// A write of the ledger that adds anything keeps to the limits that its writer knew when it decided.
    fn check_gain(&mut self, who: usize, before: &Ledger) {
        let limits = self.controllers[who].limits;
        let after = self.truth.world.turns().ledger().clone();
        let alive: Vec<(&String, &Slot)> = after.slots.iter().filter(|(uid, _)| self.unfinished(uid)).collect();
        let mut wrong = Vec::new();
        let added: Vec<&(&String, &Slot)> = alive.iter().filter(|(uid, _)| !before.slots.contains_key(*uid)).collect();
        if !added.is_empty() && count(alive.len()) > limits.cluster {
            wrong.push(format!("{} slots, {} may be", alive.len(), limits.cluster));
        }
        for (uid, slot) in added {
            let leaving = alive.iter().filter(|(_, other)| other.source == slot.source).count();
            if count(leaving) > limits.outbound {
                wrong.push(format!("{leaving} leave {}", slot.source));
            }
            let migration = self.truth.world.migration_by_uid(uid).unwrap();
            let real = source_node(migration, &self.truth.world);
            if real.as_ref() != Some(&slot.source) {
                wrong.push(format!("{uid} leaves {real:?}, not {}", slot.source));
            }
        }
        for (uid, slot) in &alive {
            let old = before.slots.get(*uid);
            for node in slot.targets().filter(|node| !old.is_some_and(|old| old.targets().any(|other| other == *node)))
            {
                let coming = alive.iter().filter(|(_, other)| other.targets().any(|target| target == node)).count();
                if count(coming) > limits.inbound {
                    wrong.push(format!("{coming} come to {node}"));
                }
            }
        }
        if !wrong.is_empty() {
            self.broken.get_or_insert(wrong.join(", "));
        }
    }

    /// Nothing is under way without a slot, or where its slot does not say.
    fn check(&mut self) {
        let ledger = self.truth.world.turns().ledger();
        let mut wrong = Vec::new();
        for migration in self.truth.world.migrations.iter().filter(|migration| !migration.is_final()) {
            let pods: Vec<_> = self.truth.world.pods_of_migration(migration.uid()).collect();
            let slot = ledger.slots.get(migration.uid());
            if slot.is_none() && (migration.status.phase.is_running() || !pods.is_empty()) {
                wrong.push(format!("{} is under way without a slot", migration.key()));
            }
            for node in pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.as_ref()) {
                if slot.is_some_and(|slot| slot.targets().all(|target| target != node)) {
                    wrong.push(format!("the pod of {} is on {node}: {slot:?}", migration.key()));
                }
            }
        }
        if !wrong.is_empty() {
            self.broken.get_or_insert(wrong.join(", "));
        }
    }

    /// What is kept from change to change is what it would be if it were made anew.
    fn check_index(&mut self) {
        let mut fresh = World::default();
        for kind in WATCHED {
            for name in self.truth.world.names_of(kind) {
                fresh.apply(self.truth.world.get(kind, &name).unwrap(), Source::Watch);
            }
        }
        let line = |world: &World| (0..).map_while(|rank| world.turns().nth(rank).cloned()).collect::<Vec<_>>();
        let heads = |world: &World| world.turns().heads().cloned().collect::<Vec<_>>();
        let coming = |world: &World| world.turns().destinations().clone();
        let (kept, anew) = (&self.truth.world, &fresh);
        let loads = |world: &World| ["node1", "node2", "node3"].map(|node| world.loads().of(node));
        let same = line(kept) == line(anew)
            && heads(kept) == heads(anew)
            && coming(kept) == coming(anew)
            && kept.turns().holders() == anew.turns().holders()
            && loads(kept) == loads(anew);
        if !same {
            self.broken.get_or_insert(format!("{:?} and anew {:?}", kept.turns(), anew.turns()));
        }
    }

    /// What the handlers of a VMI's migration do next.
    fn advance(&mut self, vmi: &str, well: bool) {
        let told = state(&self.truth, vmi);
        if !told["migrationUid"].is_string() || told["completed"] == true {
            return;
        }
        let now = self.truth.now.to_string();
        if !well {
            tell(&mut self.truth, vmi, json!({"failed": true, "completed": true, "failureReason": "link broke"}));
        } else if told["targetNodeAddress"].is_null() {
            tell(&mut self.truth, vmi, json!({"targetNodeAddress": "10.0.0.1"}));
        } else if told["startTimestamp"].is_null() {
            tell(&mut self.truth, vmi, json!({"startTimestamp": now}));
        } else {
            let node = told["targetNode"].clone();
            tell(&mut self.truth, vmi, json!({"completed": true, "endTimestamp": now}));
            let patch = json!({"metadata": {"labels": {"kubevirt.io/nodeName": node}}, "status": {"nodeName": node}});
            self.truth.patch(Kind::VirtualMachineInstance, &name(vmi), patch);
        }
    }
}

fn limits(cluster: &mut Cluster, in_cluster: u32, outbound: u32, inbound: u32) {
    let migrations = json!({
        "parallelMigrationsPerCluster": in_cluster,
        "parallelOutboundMigrationsPerNode": outbound,
        "parallelInboundMigrationsPerNode": inbound,
    });
    let spec = json!({"configuration": {"migrations": migrations}});
    cluster.put(Kind::KubeVirt, json!({"metadata": {"namespace": "kubevirt", "name": "kubevirt"}, "spec": spec}));
}

#[derive(Clone, Debug)]
enum Step {
    Ask(usize, usize),
    Cancel(usize),
    Deliver(usize, usize, usize),
    /// A controller decides, and carries out so many writes at once; the rest later, or never.
    Decide(usize, usize, usize),
    Turns(usize, usize),
    Write(usize),
    Restart(usize),
    Limits(u32, u32, u32),
    Cordon(usize, bool),
    Kubelets,
    Advance(usize, bool),
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..2_usize;
    prop_oneof![
        4 => (0..VMIS.len(), 0..4_usize).prop_map(|(vmi, priority)| Step::Ask(vmi, priority)),
        1 => (0..16_usize).prop_map(Step::Cancel),
        10 => (who.clone(), 0..WATCHED.len(), 1..8_usize).prop_map(|(who, kind, count)| Step::Deliver(who, kind, count)),
        12 => (who.clone(), any::<u16>(), 0..4_usize).prop_map(|(who, key, writes)| Step::Decide(who, key.into(), writes)),
        6 => (who.clone(), 0..2_usize).prop_map(|(who, writes)| Step::Turns(who, writes)),
        4 => who.clone().prop_map(Step::Write),
        1 => who.prop_map(Step::Restart),
        1 => (0..5_u32, 0..4_u32, 0..3_u32).prop_map(|(a, b, c)| Step::Limits(a, b, c)),
        1 => (0..3_usize, any::<bool>()).prop_map(|(node, off)| Step::Cordon(node, off)),
        3 => Just(Step::Kubelets),
        6 => (0..VMIS.len(), (0..8_u8).prop_map(|luck| luck > 0)).prop_map(|(vmi, well)| Step::Advance(vmi, well)),
    ]
}

impl Race {
    fn happen(&mut self, step: &Step, jobs: &mut usize) {
        match step {
            Step::Ask(vmi, priority) => {
                // Admission refuses a second one.
                let vmi = VMIS[*vmi].0;
                if self.truth.world.migrations_of(&name(vmi)).any(|migration| !migration.is_final()) {
                    return;
                }
                *jobs += 1;
                let job = format!("job{jobs:03}");
                migrate(&mut self.truth, &job, vmi);
                if let Some(priority) = ["system-critical", "user-triggered", "system-maintenance"].get(*priority) {
                    self.truth.patch(Kind::Migration, &name(&job), json!({"spec": {"priority": priority}}));
                }
            }
            Step::Cancel(index) => {
                let open = self.truth.world.migrations.iter().filter(|migration| !migration.is_final());
                let target = open.map(|migration| migration.reference()).nth(*index);
                if let Some(target) = target {
                    self.truth.delete(&target);
                }
            }
            Step::Deliver(who, kind, count) => self.deliver(*who, WATCHED[*kind], *count),
            Step::Decide(who, key, writes) => {
                let keys: Vec<Key> = Key::all(&self.controllers[*who].world)
                    .into_iter()
                    .filter(|key| matches!(key, Key::Migration(_) | Key::Placement(_) | Key::Vmi(_)))
                    .collect();
                if let Some(key) = keys.get(key % keys.len().max(1)) {
                    self.decide(*who, key);
                    (0..*writes).for_each(|_| self.write(*who));
                }
            }
            Step::Turns(who, writes) => {
                self.decide(*who, &Key::Turns);
                (0..*writes).for_each(|_| self.write(*who));
            }
            Step::Write(who) => self.write(*who),
            Step::Restart(who) => {
                self.restart(*who);
                self.check_index();
            }
            Step::Limits(in_cluster, outbound, inbound) => limits(&mut self.truth, *in_cluster, *outbound, *inbound),
            Step::Cordon(node, off) => {
                let node = Name::cluster(format!("node{}", node + 1));
                self.truth.patch(Kind::Node, &node, json!({"spec": {"unschedulable": off}}));
            }
            Step::Kubelets => self.truth.run_kubelets(),
            Step::Advance(vmi, well) => self.advance(VMIS[*vmi].0, *well),
        }
        self.spread();
        self.check();
    }
}

/// Found by `no_write_breaks_a_limit`: three go by a limit of three, and the limit falls to one while they are written down.
/// They count as begun before it fell, as those that run do; nobody joins them until there is room.
#[test]
fn a_limit_lowered_between_the_decision_and_its_write_counts_from_the_next() {
    let mut race = Race::new();
    let mut jobs = 0;
    let mut play = |race: &mut Race, steps: &[Step]| steps.iter().for_each(|step| race.happen(step, &mut jobs));
    let all_news: Vec<Step> = (0..WATCHED.len()).map(|kind| Step::Deliver(1, kind, 100)).collect();
    play(&mut race, &[Step::Ask(0, 3), Step::Ask(3, 3), Step::Ask(5, 3), Step::Ask(6, 3)]);
    play(&mut race, &all_news);
    for job in ["job001", "job002", "job003", "job004"] {
        race.decide(1, &Key::Migration(name(job)));
        race.write(1);
    }
    play(&mut race, &[Step::Turns(1, 0), Step::Limits(1, 2, 1)]);
    play(&mut race, &all_news);
    play(&mut race, &[Step::Write(1)]);
    assert_eq!(race.truth.world.turns().ledger().slots.len(), 3);
    play(&mut race, &all_news);
    play(&mut race, &[Step::Turns(1, 1)]);
    assert_eq!(race.truth.world.turns().ledger().slots.len(), 3);
    assert_eq!(race.broken, None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_write_breaks_a_limit(steps in proptest::collection::vec(step(), 1..400)) {
        let mut race = Race::new();
        let mut jobs = 0;
        for step in &steps {
            race.happen(step, &mut jobs);
            prop_assert!(race.broken.is_none(), "{}", race.broken.unwrap_or_default());
        }
        // Once both know everything, all end and every slot comes back.
        limits(&mut race.truth, 3, 2, 1);
        for node in 0..3 {
            race.happen(&Step::Cordon(node, false), &mut jobs);
        }
        for _ in 0..60 {
            race.truth.run_kubelets();
            race.truth.settle();
            VMIS.iter().for_each(|(vmi, _)| race.advance(vmi, true));
            race.truth.pass(1);
            if race.truth.world.migrations.iter().all(|migration| migration.is_final()) {
                break;
            }
        }
        race.truth.settle();
        let open: Vec<Value> = race.truth.world.migrations.iter().filter(|one| !one.is_final()).map(|one| json!({
            "name": one.key().to_string(), "phase": one.status.phase.as_str(), "reason": one.status.reason,
        })).collect();
        prop_assert!(open.is_empty(), "{open:?}");
        prop_assert!(race.truth.world.turns().ledger().slots.is_empty());
        prop_assert_eq!((race.truth.world.turns().waiting(), race.truth.world.turns().holders().len()), (0, 0));
    }
}
