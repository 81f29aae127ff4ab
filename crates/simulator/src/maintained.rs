//! Administrators put nodes into maintenance, and take them out again: what they ask for, and what must hold of it.

use std::collections::{BTreeMap, BTreeSet};

use godwit_api::maintenance::{MaintenancePhase, OnDeadline, VmProgress};
use godwit_api::vmi::VirtualMachineInstanceMigrationState as State;
use godwit_control::maintenance::{self, Held, KINDS};
use godwit_control::{Kind, Name, Object, Ref, Stored, homecoming, names};
use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

use crate::check::Rule;
use crate::event::Event;
use crate::sim::{SECOND, Sim};
use crate::store::Commit;

/// So long after a node was put into maintenance, or the API server was back, every controller knows of it: one may have stood
/// still, restarted and missed the news before.
const KNOWN: u64 = 60 * SECOND;
/// So many looks in a row may find a maintenance that has something left to do when all else is at rest: ten minutes, in which leases run
/// out and pauses end.
const LOOKS: u32 = 30;
/// Taints of maintenances; nobody else sets them here.
const TAINTS: [&str; 2] = [names::TAINT_DRAIN, names::TAINT_DRAIN_MEDIK8S];

/// What is known of maintenances beside the store.
#[derive(Default)]
pub struct Maintained {
    /// Since when every controller that hears has been able to know that a node is in maintenance.
    since: BTreeMap<String, u64>,
    /// Nodes that an administrator has cordoned for good.
    kept: BTreeSet<String>,
    /// Nodes to which guests are to come back.
    homes: BTreeSet<String>,
    /// Guests that were expected at a node, and the node. That they are no more, a controller that stands still may not know.
    expected: BTreeSet<(Name, String)>,
    /// How often in a row all else was at rest, and a maintenance was not.
    waited: u32,
}

impl Sim {
    /// Maintenances will be asked for, and a node may have been cordoned before, for good.
    pub fn plan_maintenances(&mut self, duration: u64) {
        for number in 0..self.options.maintenances {
            let after = self.random.between(duration / 6, duration);
            self.at(after, Event::Maintain { number });
        }
        if self.options.maintenances > 0 && self.random.chance(300) {
            self.at(duration / 6, Event::CordonForGood { node: 0 });
        }
    }

    /// Whether an administrator has cordoned a node for good.
    pub fn is_kept(&self, index: usize) -> bool {
        self.maintained.kept.contains(self.name_of(index))
    }

    /// A node is cordoned and stays so, whatever else becomes of it.
    pub fn cordon_for_good(&mut self, index: usize) {
        let name = self.name_of(index).to_owned();
        let target = Ref::new(Kind::Node, Name::cluster(name.as_str()));
        let body = json!({"spec": {"unschedulable": true}});
        // One that is in maintenance, or was cordoned for a while, is closed already: nobody could tell whose cordon it is.
        let open = matches!(self.store.get(&target), Some(Object::Node(node)) if !is_cordoned(node));
        if self.store_down || !open || self.store.merge(&target, false, &body).is_err() {
            return;
        }
        self.note(format!("{name} is cordoned for good"));
        self.maintained.kept.insert(name);
        self.spread();
    }

    /// An administrator puts a node into maintenance. The last node stays out of it for long: the guests need one.
    pub fn maintain(&mut self, number: u32) {
        if self.store_down {
            return self.at(SECOND, Event::Maintain { number });
        }
        let last = self.nodes.len().saturating_sub(1);
        let node = usize::try_from(self.random.between(0, last as u64)).unwrap_or(0);
        let Some(kind) = self.random.pick(&KINDS).copied() else { return };
        let name = format!("maintenance{number}");
        let mut spec = json!({"nodeName": self.name_of(node), "reason": "a test"});
        let mut set = |field: &str, value: Value| {
            if let Some(spec) = spec.as_object_mut() {
                spec.insert(field.to_owned(), value);
            }
        };
        if self.random.chance(150) {
            set("dryRun", json!(true));
        }
        if self.random.chance(300) {
            set("deadline", json!(format!("{}s", self.random.between(5, 120))));
            if self.random.chance(500) {
                set("onDeadline", json!("Continue"));
            }
        }
        if self.random.chance(300) {
            set("maxParallel", json!(self.random.between(1, 2)));
        }
        if self.random.chance(500) {
            set("returnHome", json!(true));
        }
        let now = self.time();
        let said = spec.to_string();
        let body = json!({"metadata": {"name": name}, "spec": spec});
        match self.store.create(kind, body, "admin", now, &mut self.random) {
            Ok(_) => {
                self.note(format!("an administrator asks for {name} ({}): {said}", kind.group()));
            }
            Err(refusal) => return self.note(format!("{name} of {} is refused: {refusal:?}", self.name_of(node))),
        }
        self.spread();
        if node == last || self.random.chance(600) {
            let longest = if self.random.chance(300) { 5 * SECOND } else { 200 * SECOND };
            let after = self.random.between(SECOND / 10, longest);
            self.at(after, Event::EndMaintenance { target: Ref::new(kind, Name::cluster(name.as_str())) });
        }
    }

    /// An administrator deletes a maintenance.
    pub fn end_maintenance(&mut self, target: Ref) {
        if self.store_down {
            return self.at(SECOND, Event::EndMaintenance { target });
        }
        self.note(format!("an administrator deletes {target}"));
        let now = self.time();
        let _ = self.store.delete(&target, "", None, now);
        self.spread();
    }

    /// The API server is back: what was written before is known to all after a while.
    pub fn maintenances_are_heard_of(&mut self) {
        let now = self.now;
        self.maintained.since.values_mut().for_each(|since| *since = now);
    }

    fn maintenances(&self) -> impl Iterator<Item = Held<'_>> {
        KINDS.into_iter().flat_map(|kind| self.store.list(kind)).filter_map(maintenance::of_object)
    }

    /// Whether everybody knows that a node is in maintenance.
    fn is_closed(&self, node: &str) -> bool {
        self.maintained.since.get(node).is_some_and(|since| self.now >= since.saturating_add(KNOWN))
    }

    /// What a write makes of the rules for maintenances.
    pub fn check_maintenance(&mut self, commit: &Commit) {
        if self.options.maintenances == 0 {
            return;
        }
        let before = commit.before.as_ref();
        match &commit.latest {
            object if maintenance::node_of(object).is_some() => self.note_maintenance(object),
            Object::Pod(pod) if !commit.gone => {
                let node = |object: &Object| match object {
                    Object::Pod(pod) => pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
                    _ => None,
                };
                let bound = node(&commit.latest).filter(|_| before.is_none_or(|before| node(before).is_none()));
                if let Some(node) = bound.filter(|node| self.is_closed(node)) {
                    let what = format!("pod {} is bound to {node}, which is in maintenance", pod.key());
                    self.violate(Rule::Maintenance, what);
                }
            }
            Object::VirtualMachineInstance(vmi) if !commit.gone => {
                if let Some(home) = homecoming::home_of(vmi) {
                    if !self.maintained.homes.contains(home) {
                        let what = format!("{} is expected at {home}, which nobody asked for", vmi.key());
                        self.violate(Rule::Maintenance, what);
                    }
                    self.maintained.expected.insert((vmi.key(), home.to_owned()));
                }
                let begun = |state: Option<&State>| {
                    let state = state.filter(|state| state.start_timestamp.is_some())?;
                    Some((state.migration_uid.clone()?, state.target_node.clone()?))
                };
                let earlier = match before {
                    Some(Object::VirtualMachineInstance(vmi)) => begun(vmi.status.migration_state.as_ref()),
                    _ => None,
                };
                let begun = begun(vmi.status.migration_state.as_ref()).filter(|now| earlier.as_ref() != Some(now));
                if let Some((_, node)) = begun.filter(|(_, node)| self.is_closed(node)) {
                    let what = format!("{} begins to move to {node}, which is in maintenance", vmi.key());
                    self.violate(Rule::Maintenance, what);
                }
            }
            Object::Node(node) if self.maintained.kept.contains(node.name()) && !is_cordoned(node) => {
                let what = format!("{} was cordoned for good and is open", node.name());
                self.violate(Rule::Maintenance, what);
            }
            Object::Migration(migration) if before.is_none() => {
                let vmi = Name::new(migration.namespace(), migration.vmi_name());
                let expected = |home: &&str| self.maintained.expected.contains(&(vmi.clone(), (*home).to_owned()));
                let home = migration.annotation(names::ANNOTATION_HOMECOMING);
                if let Some(home) = home.filter(|home| !expected(home)) {
                    let what = format!("{vmi} goes home to {home}, where it was never expected");
                    self.violate(Rule::Maintenance, what);
                }
            }
            _ => {}
        }
    }

    /// Which nodes are in maintenance.
    fn note_maintenance(&mut self, changed: &Object) {
        let now = self.now;
        if let Some(one) = maintenance::of_object(changed).filter(|one| one.spec.return_home == Some(true)) {
            self.maintained.homes.insert(one.spec.node_name.clone());
        }
        let nodes: BTreeSet<String> =
            self.maintenances().filter(Held::is_in_force).map(|one| one.spec.node_name.clone()).collect();
        self.maintained.since.retain(|node, _| nodes.contains(node));
        for node in nodes {
            self.maintained.since.entry(node).or_insert(now);
        }
    }

    /// An eviction that a maintenance asked for was granted: an administrator has asked for the end of this guest.
    pub fn evicted_by(&mut self, key: &godwit_control::Key, pod_uid: &str) {
        if matches!(key, godwit_control::Key::Maintenance(..)) {
            self.asked.insert(pod_uid.to_owned());
        }
    }

    /// Whether every maintenance is as it promises, when all else is at rest; when it does not come to be, that is a violation.
    /// `unrest` says that something else goes on.
    pub fn is_maintained(&mut self, unrest: bool) -> bool {
        let wrong = if unrest { None } else { self.unrest_of_maintenances() };
        self.maintained.waited = if wrong.is_some() { self.maintained.waited + 1 } else { 0 };
        match wrong {
            Some(wrong) if self.maintained.waited > LOOKS => self.violate(Rule::Maintenance, wrong),
            Some(_) => {}
            None => return true,
        }
        false
    }

    fn unrest_of_maintenances(&self) -> Option<String> {
        if self.options.maintenances == 0 {
            return None;
        }
        let all: Vec<_> = self.maintenances().collect();
        let closed: BTreeSet<&str> =
            all.iter().filter(|one| one.is_in_force()).map(|one| one.spec.node_name.as_str()).collect();
        if let Some(wrong) = all.iter().find_map(|one| self.breaks(one)) {
            return Some(wrong);
        }
        for object in self.store.list(Kind::Node) {
            let Object::Node(node) = object else { continue };
            if let Some(left) = left_behind(node).filter(|_| !closed.contains(node.name())) {
                return Some(format!("{} is in no maintenance and still has {left}", node.name()));
            }
            if !closed.contains(node.name()) && is_cordoned(node) && !self.maintained.kept.contains(node.name()) {
                return Some(format!("{} is in no maintenance and still cordoned", node.name()));
            }
        }
        for object in self.store.list(Kind::VirtualMachineInstance) {
            let Object::VirtualMachineInstance(vmi) = object else { continue };
            let on = |node: Option<&str>| node.is_some_and(|node| closed.contains(node));
            let marked = vmi.status.evacuation_node_name.as_deref();
            if marked.is_some() && !on(marked) {
                return Some(format!("{} is still marked, and {marked:?} is in no maintenance", vmi.key()));
            }
            let home = homecoming::home_of(vmi);
            if let Some(home) = home.filter(|home| !closed.contains(home) && !self.maintained.kept.contains(*home)) {
                return Some(format!("{} is expected at {home}, which is open, and does not come", vmi.key()));
            }
        }
        None
    }

    /// What a maintenance that is at rest does not keep.
    fn breaks(&self, one: &Held<'_>) -> Option<String> {
        let (name, node, status) = (one.name(), one.spec.node_name.as_str(), one.status);
        if one.meta.deletion_timestamp.is_some() {
            return Some(format!("{name} is deleted and still there"));
        }
        if one.spec.dry_run == Some(true) {
            let touched = one.meta.finalizers.as_ref().is_some_and(|all| !all.is_empty());
            return (touched || status.plan.is_none())
                .then(|| format!("{name} is a dry run without a plan, or with more"));
        }
        let says = status.last_error.as_ref().is_some_and(|text| !text.is_empty());
        let here = self.store.list(Kind::VirtualMachineInstance).filter_map(|object| match object {
            Object::VirtualMachineInstance(vmi) => {
                vmi.status.node_name.as_deref().filter(|at| *at == node && !vmi.is_final()).map(|_| vmi)
            }
            _ => None,
        });
        let here: Vec<_> = here.collect();
        match status.phase {
            MaintenancePhase::Failed => (!says).then(|| format!("{name} has failed and does not say why")),
            MaintenancePhase::Succeeded => {
                (!here.is_empty()).then(|| format!("{name} has succeeded and {node} is not empty"))
            }
            MaintenancePhase::Running => {
                let late =
                    status.deadline.as_ref().is_some_and(|end| end.0 < self.moment(self.now.saturating_sub(KNOWN)));
                if late && one.spec.on_deadline != Some(OnDeadline::Continue) {
                    return Some(format!("{name} goes on beyond its deadline"));
                }
                let told = |vmi: &&std::sync::Arc<godwit_api::VirtualMachineInstance>| {
                    let mut all = status.virtual_machine_instances.iter();
                    all.any(|vm| {
                        let speaks = vm.message.as_ref().is_some_and(|text| !text.is_empty());
                        let its = Name::new(vm.namespace.as_str(), vm.name.as_str()) == vmi.key();
                        its && (speaks || vm.state == VmProgress::Migrating)
                    })
                };
                let silent = here.iter().find(|vmi| !told(vmi));
                match silent {
                    Some(vmi) => Some(format!("{name} does not say why {} is still on {node}", vmi.key())),
                    None => here.is_empty().then(|| format!("{node} is empty and {name} does not say so")),
                }
            }
            MaintenancePhase::Unset | MaintenancePhase::Other(_) => Some(format!("{name} has not begun")),
        }
    }
}

fn is_cordoned(node: &Node) -> bool {
    node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true)
}

/// What a maintenance has left of itself on a node.
fn left_behind(node: &Node) -> Option<&'static str> {
    if node.annotation(names::ANNOTATION_MAINTENANCE).is_some() {
        return Some("the annotation of one");
    }
    if node.label(names::LABEL_EXCLUDE_FROM_REMEDIATION).is_some() {
        return Some("the label of one");
    }
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    let ours = |key: &str| TAINTS.contains(&key);
    taints.into_iter().flatten().any(|taint| ours(&taint.key)).then_some("the taint of one")
}
