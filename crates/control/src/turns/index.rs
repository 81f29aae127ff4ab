//! What the world keeps at hand about turns: who waits in which order, and who holds a slot where.
//!
//! It follows each change by itself, so that no decision has to look through all migrations.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_api::migration::MigrationPriority;
use godwit_api::{MigrationPhase, VirtualMachineInstance, VirtualMachineInstanceMigration, VmiPhase};
use jiff::Timestamp;

use super::ledger::{Ledger, Slot, is_ledger};
use super::ranked::Ranked;
use crate::migration::table::Fact;
use crate::names;
use crate::object::{Kind, Name, Object, Stored, revision};
use crate::placement;
use crate::world::{Change, World, vmi_of_pod};

/// A place in the line: the more urgent first, then the older, then by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket {
    urgency: Reverse<u8>,
    created: Option<Timestamp>,
    /// The migration.
    pub name: Name,
}

impl Ticket {
    /// The ticket of a migration.
    pub fn of(migration: &VirtualMachineInstanceMigration) -> Self {
        Self {
            urgency: Reverse(urgency(migration.spec.priority.as_ref())),
            created: migration.metadata.creation_timestamp.as_ref().map(|time| time.0),
            name: migration.key(),
        }
    }
}

/// KubeVirt's numbers (`reference/kubevirt-contract.md`, 3): who asked by hand waits longest.
fn urgency(priority: Option<&MigrationPriority>) -> u8 {
    match priority {
        Some(MigrationPriority::SystemCritical) => 100,
        Some(MigrationPriority::UserTriggered) => 50,
        Some(MigrationPriority::SystemMaintenance) => 20,
        Some(MigrationPriority::Other(_)) | None => 0,
    }
}

/// A migration that is under way or may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// The migration, if it is known.
    pub migration: Option<Name>,
    /// Its VMI.
    pub vmi: Name,
    /// The nodes that it may be leaving.
    pub sources: BTreeSet<String>,
    /// The nodes that it may be going to.
    pub targets: BTreeSet<String>,
}

/// Who waits, and who holds a slot.
#[derive(Clone, Debug, Default)]
pub struct Index {
    ledger: Ledger,
    /// All that wait for their turn and could start.
    line: Ranked<Ticket>,
    /// The same by the node that they leave.
    by_node: BTreeMap<String, BTreeSet<Ticket>>,
    /// The first of each node.
    heads: BTreeSet<(Ticket, String)>,
    /// What is in line, by migration.
    tickets: BTreeMap<Name, (Ticket, String)>,
    holders: BTreeMap<String, Holder>,
    holders_by_vmi: BTreeMap<Name, BTreeSet<String>>,
    from: BTreeMap<String, u32>,
    to: BTreeMap<String, u32>,
    /// Slots of migrations that are over.
    over: BTreeSet<String>,
    /// Slots of migrations that are not known.
    unknown: BTreeSet<String>,
}

impl Index {
    /// The ledger as last read.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// How many wait for their turn.
    pub fn waiting(&self) -> usize {
        self.line.len()
    }

    /// How many are before this migration among those that wait.
    pub fn before(&self, migration: &VirtualMachineInstanceMigration) -> usize {
        self.line.rank(&Ticket::of(migration))
    }

    /// The one that so many are before.
    pub fn nth(&self, rank: usize) -> Option<&Ticket> {
        self.line.nth(rank)
    }

    /// The first of each node that anybody waits to leave, in order.
    pub fn heads(&self) -> impl Iterator<Item = &(Ticket, String)> {
        self.heads.iter()
    }

    /// Who waits after this one to leave the same node.
    pub fn next_of(&self, node: &str, ticket: &Ticket) -> Option<&Ticket> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.by_node.get(node)?.range((Excluded(ticket), Unbounded)).next()
    }

    /// Those that wait in one namespace, by name.
    pub fn waiting_in(&self, namespace: &str) -> impl Iterator<Item = &Name> {
        let names = self.tickets.range(Name::new(namespace, "")..).map(|(name, _)| name);
        names.take_while(move |name| name.namespace == namespace)
    }

    /// All that are or may be under way, by UID.
    pub fn holders(&self) -> &BTreeMap<String, Holder> {
        &self.holders
    }

    /// Whether a migration of this VMI is or may be under way.
    pub fn is_held(&self, vmi: &Name) -> bool {
        self.holders_by_vmi.contains_key(vmi)
    }

    /// How many are or may be leaving a node.
    pub fn leaving(&self, node: &str) -> u32 {
        self.from.get(node).copied().unwrap_or(0)
    }

    /// How many are or may be going to a node.
    pub fn coming(&self, node: &str) -> u32 {
        self.to.get(node).copied().unwrap_or(0)
    }

    /// The nodes that anything is or may be going to, with how many.
    pub fn destinations(&self) -> &BTreeMap<String, u32> {
        &self.to
    }

    /// Slots that can be taken back: their migration has ended, or it is gone. It is gone when it is not known and the
    /// watch has come beyond the state that the slot was given for.
    pub fn spent<'a>(&'a self, world: &'a World) -> impl Iterator<Item = &'a String> {
        let gone = move |uid: &&String| {
            self.ledger.slots.get(*uid).is_some_and(|slot| world.horizon(Kind::Migration) >= slot.seen())
        };
        self.over.iter().chain(self.unknown.iter().filter(gone))
    }

    /// Takes in a change; `world` is the world after it.
    pub(crate) fn refresh(&mut self, change: &Change, world: &World) {
        let mut uids = BTreeSet::new();
        let mut vmis = BTreeSet::new();
        let mut names = BTreeSet::new();
        for side in change.sides() {
            match side {
                Object::Migration(migration) => {
                    uids.insert(migration.uid().to_owned());
                    names.insert(migration.key());
                    vmis.insert(vmi_name(migration));
                }
                Object::VirtualMachineInstance(vmi) => {
                    vmis.insert(vmi.key());
                }
                Object::Pod(pod) => {
                    uids.extend(pod.label(names::LABEL_MIGRATION_JOB_UID).map(str::to_owned));
                    vmis.extend(vmi_of_pod(pod));
                }
                Object::ConfigMap(_) => {}
                _ => return,
            }
        }
        if let Some(Object::ConfigMap(map)) = change.latest() {
            if !is_ledger(&map.key(), world.installation()) {
                return;
            }
            let read = match &change.after {
                Some(Object::ConfigMap(map)) => Ledger::read(Some(map)),
                _ => Ledger::default(),
            };
            uids = read.differences(&self.ledger);
            self.ledger = read;
        } else if let Some(Object::VirtualMachineInstance(vmi)) = change.latest() {
            let name = vmi.key();
            let migrations = world.migrations_of(&name).filter(|migration| !migration.is_final());
            uids.extend(migrations.map(|migration| migration.uid().to_owned()));
        }
        for uid in uids {
            let (before, after) = (self.holders.get(&uid), self.holder(&uid, world));
            vmis.extend(before.map(|holder| holder.vmi.clone()));
            vmis.extend(after.as_ref().map(|holder| holder.vmi.clone()));
            if let Some(migration) = world.migration_by_uid(&uid) {
                names.insert(migration.key());
            }
            self.hold(&uid, after);
            let is_known = world.migration_by_uid(&uid).is_some();
            let has_slot = self.ledger.slots.contains_key(&uid);
            set(&mut self.unknown, &uid, has_slot && !is_known);
            set(&mut self.over, &uid, has_slot && is_known && !self.holders.contains_key(&uid));
        }
        for vmi in vmis {
            names.extend(world.migrations_of(&vmi).map(|migration| migration.key()));
        }
        for name in names {
            self.stand(&name, world);
        }
    }

    /// What the migration of this UID holds.
    fn holder(&self, uid: &str, world: &World) -> Option<Holder> {
        let slot = self.ledger.slots.get(uid);
        let Some(migration) = world.migration_by_uid(uid) else {
            return slot.map(|slot| Holder {
                migration: None,
                vmi: Name::new(
                    slot.migration.split_once('/').map_or("", |(namespace, _)| namespace),
                    slot.vmi.as_str(),
                ),
                sources: BTreeSet::from([slot.source.clone()]),
                targets: slot.targets().cloned().collect(),
            });
        };
        let pod = world.pods_of_migration(uid).next();
        let under_way = migration.status.phase.is_running() || pod.is_some();
        if migration.is_final() || (slot.is_none() && !under_way) {
            return None;
        }
        let bound = pod.and_then(|pod| pod.spec.as_ref()?.node_name.clone()).filter(|node| !node.is_empty());
        let targets = match bound {
            // A pod never changes its node.
            Some(node) => BTreeSet::from([node]),
            None => slot.into_iter().flat_map(Slot::targets).cloned().collect(),
        };
        let mut sources: BTreeSet<String> = slot.map(|slot| slot.source.clone()).into_iter().collect();
        sources.extend(source_node(migration, world));
        Some(Holder { migration: Some(migration.key()), vmi: vmi_name(migration), sources, targets })
    }

    fn hold(&mut self, uid: &str, holder: Option<Holder>) {
        if self.holders.get(uid) == holder.as_ref() {
            return;
        }
        if let Some(old) = self.holders.remove(uid) {
            old.sources.iter().for_each(|node| subtract(&mut self.from, node));
            old.targets.iter().for_each(|node| subtract(&mut self.to, node));
            if let Some(uids) = self.holders_by_vmi.get_mut(&old.vmi) {
                uids.remove(uid);
                if uids.is_empty() {
                    self.holders_by_vmi.remove(&old.vmi);
                }
            }
        }
        if let Some(new) = holder {
            new.sources.iter().for_each(|node| *self.from.entry(node.clone()).or_default() += 1);
            new.targets.iter().for_each(|node| *self.to.entry(node.clone()).or_default() += 1);
            self.holders_by_vmi.entry(new.vmi.clone()).or_default().insert(uid.to_owned());
            self.holders.insert(uid.to_owned(), new);
        }
    }

    /// Puts a migration where it belongs in the line, if anywhere.
    fn stand(&mut self, name: &Name, world: &World) {
        let place = world.migrations.get(name).and_then(|migration| self.place_of(migration, world));
        if self.tickets.get(name) == place.as_ref() {
            return;
        }
        if let Some((ticket, node)) = self.tickets.remove(name) {
            self.line.remove(&ticket);
            self.change_node(node, |tickets| {
                tickets.remove(&ticket);
            });
        }
        if let Some((ticket, node)) = place {
            self.line.insert(ticket.clone());
            self.change_node(node.clone(), |tickets| {
                tickets.insert(ticket.clone());
            });
            self.tickets.insert(name.clone(), (ticket, node));
        }
    }

    fn change_node(&mut self, node: String, change: impl FnOnce(&mut BTreeSet<Ticket>)) {
        let tickets = self.by_node.entry(node.clone()).or_default();
        let before = tickets.first().cloned();
        change(tickets);
        let after = tickets.first().cloned();
        if after.is_none() {
            self.by_node.remove(&node);
        }
        if before != after {
            if let Some(ticket) = before {
                self.heads.remove(&(ticket, node.clone()));
            }
            if let Some(ticket) = after {
                self.heads.insert((ticket, node));
            }
        }
    }

    fn place_of(&self, migration: &VirtualMachineInstanceMigration, world: &World) -> Option<(Ticket, String)> {
        let waits = migration.status.phase == MigrationPhase::Pending
            && !migration.is_deleting()
            && !self.holders.contains_key(migration.uid())
            && !self.ledger.slots.contains_key(migration.uid());
        let name = vmi_name(migration);
        let vmi = world.vmis.get(&name).filter(|_| waits)?;
        let may_move = !vmi.is_final()
            && !vmi.is_deleting()
            && !vmi.condition(names::conditions::LIVE_MIGRATABLE).is_some_and(|condition| condition.is_false())
            && hindrance(vmi, world).is_none()
            && !self.is_held(&name);
        let node = vmi.status.node_name.clone().filter(|_| may_move)?;
        Some((Ticket::of(migration), node))
    }
}

fn set(set: &mut BTreeSet<String>, uid: &str, is_in: bool) {
    if is_in {
        set.insert(uid.to_owned());
    } else {
        set.remove(uid);
    }
}

fn subtract(counts: &mut BTreeMap<String, u32>, node: &str) {
    if let Some(count) = counts.get_mut(node) {
        *count -= 1;
        if *count == 0 {
            counts.remove(node);
        }
    }
}

fn vmi_name(migration: &VirtualMachineInstanceMigration) -> Name {
    Name::new(migration.namespace(), migration.vmi_name())
}

/// The node that a migration leaves.
pub fn source_node(migration: &VirtualMachineInstanceMigration, world: &World) -> Option<String> {
    let vmi = world.vmis.get(&vmi_name(migration))?;
    let state = vmi.status.migration_state.as_ref();
    let own = state.filter(|state| state.migration_uid.as_deref() == Some(migration.uid()));
    own.and_then(|state| state.source_node.clone()).or_else(|| vmi.status.node_name.clone())
}

/// What keeps the migration of a VMI out of the line, so that it neither takes a slot nor holds up others.
pub fn hindrance(vmi: &Arc<VirtualMachineInstance>, world: &World) -> Option<Fact> {
    if vmi.status.phase != VmiPhase::Running || vmi.status.node_name.as_deref().unwrap_or("").is_empty() {
        return Some(Fact::GuestNotRunning);
    }
    if is_on_its_way(vmi) || is_behind(vmi, world) {
        return Some(Fact::EarlierUnresolved);
    }
    let pods = world.pods_of_vmi(vmi.uid()).filter(|pod| !placement::is_finished(pod));
    (pods.count() > 1).then_some(Fact::OldPodRemains)
}

/// Whether an earlier migration is not over for the guest: its end is not reported, or it went well and the target's
/// handler has not said yet that the guest is there.
pub fn is_on_its_way(vmi: &VirtualMachineInstance) -> bool {
    vmi.status.migration_state.as_ref().is_some_and(|state| {
        let arrives = state.completed == Some(true) && state.failed != Some(true);
        let unresolved =
            state.migration_uid.as_deref().is_some_and(|uid| !uid.is_empty()) && state.completed != Some(true);
        unresolved || arrives && !vmi.has_arrived()
    })
}

/// Whether what is known of the VMI is older than the end of one of its migrations, so that it may live elsewhere.
fn is_behind(vmi: &VirtualMachineInstance, world: &World) -> bool {
    let known = vmi.status.migration_state.as_ref().and_then(|state| state.migration_uid.as_deref());
    world.migrations_of(&vmi.key()).any(|migration| {
        let state = migration.status.migration_state.as_ref();
        let target = state.and_then(|state| state.target_node.as_ref());
        let stayed = state.is_some_and(|state| state.is_local());
        migration.status.phase == MigrationPhase::Succeeded
            && known != Some(migration.uid())
            && target.is_some_and(|target| stayed || Some(target) != vmi.status.node_name.as_ref())
            && revision(&vmi.metadata) < revision(&migration.metadata)
    })
}
