//! Whose turn it is: how many migrations may be under way at once, and in which order those that wait begin.
//!
//! A migration needs a slot before it makes its target pod. Slots are kept in a [`Ledger`], and given by one decision
//! that sees all who wait: the more urgent first, then the older. Who waits for a limit of its own node, or for room to
//! receive it, holds up nobody else.

mod index;
mod ledger;
#[cfg(test)]
mod race_tests;
mod ranked;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use godwit_api::migration::MigrationQueuePlace;
use godwit_api::{MigrationConfiguration, VirtualMachineInstanceMigration, config};
use jiff::SignedDuration;

pub use index::{Holder, Index, Ticket, hindrance, is_on_its_way, source_node};
pub use ledger::{LEDGER, Ledger, Slot, is_ledger, reference};

use crate::launcher_pod::{self, Role};
use crate::object::{Name, Stored};
use crate::placement::{self, Room};
use crate::plan::{Plan, View};
use crate::quota;

/// Slots in a new ledger are given only after this long: a controller that still acts on a lost one has then made the
/// pods that it was about to make, and they count.
const SETTLE: SignedDuration = SignedDuration::from_secs(2);
/// A ConfigMap holds one MiB; a slot takes about 250 bytes of it.
const MOST_SLOTS: u32 = 2_000;
/// So many that could start but for room at their targets or a quota are looked at in one decision; the rest wait behind
/// them until one of them gets on.
const MOST_LOOKS: usize = 256;
/// Up to this place in the line the place told is exact.
const EXACT_PLACES: u32 = 10;

/// What limits the number of migrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setting {
    /// Of the cluster.
    PerCluster,
    /// Leaving one node.
    OutboundPerNode,
    /// Going to one node.
    InboundPerNode,
}

impl Setting {
    /// The name of the setting.
    pub fn name(self) -> &'static str {
        match self {
            Setting::PerCluster => "parallelMigrationsPerCluster",
            Setting::OutboundPerNode => "parallelOutboundMigrationsPerNode",
            Setting::InboundPerNode => "parallelInboundMigrationsPerNode",
        }
    }
}

/// A limit that is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Which one.
    pub setting: Setting,
    /// Its value.
    pub value: u32,
    /// How many count against it now; more than the value when it was lowered meanwhile.
    pub in_use: u32,
    /// The node that it is about.
    pub node: Option<String>,
}

/// Where a pending migration stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It has its slot: the target pod can be made.
    Granted,
    /// It waits.
    Waits {
        /// For this limit; `None` when only the next decision about slots is waited for.
        limit: Option<Limit>,
        /// At this place of the line, 1 is next.
        place: u32,
    },
}

/// The limits in force.
#[derive(Clone, Copy, Debug)]
struct Limits {
    cluster: u32,
    outbound: u32,
    inbound: u32,
}

impl Limits {
    fn of(configuration: &MigrationConfiguration) -> Self {
        let cluster = configuration.parallel_migrations_per_cluster.unwrap_or(config::PARALLEL_MIGRATIONS_PER_CLUSTER);
        let outbound = configuration.parallel_outbound_migrations_per_node;
        Self {
            cluster: cluster.min(MOST_SLOTS),
            outbound: outbound.unwrap_or(config::PARALLEL_OUTBOUND_MIGRATIONS_PER_NODE),
            inbound: inbound_limit(configuration),
        }
    }
}

/// The limits in force: of the cluster, of those that leave a node, and of those that go to one.
pub(crate) fn limits(configuration: &MigrationConfiguration) -> (u32, u32, u32) {
    let Limits { cluster, outbound, inbound } = Limits::of(configuration);
    (cluster, outbound, inbound)
}

/// How many migrations may go to one node at once.
pub fn inbound_limit(configuration: &MigrationConfiguration) -> u32 {
    configuration.parallel_inbound_migrations_per_node.unwrap_or(config::PARALLEL_INBOUND_MIGRATIONS_PER_NODE)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Where this pending migration stands, and why.
pub fn turn(migration: &VirtualMachineInstanceMigration, view: &View<'_>) -> Turn {
    let turns = view.world.turns();
    if turns.ledger().slots.contains_key(migration.uid()) {
        return Turn::Granted;
    }
    let place = count(turns.before(migration)).saturating_add(1);
    let limits = Limits::of(view.world.configuration());
    let wait =
        |setting, value, in_use, node| Turn::Waits { limit: Some(Limit { setting, value, in_use, node }), place };
    // Where several limits hold, the nearer one is the more telling.
    if let Some(node) = source_node(migration, view.world) {
        let leaving = turns.leaving(&node);
        if leaving >= limits.outbound {
            return wait(Setting::OutboundPerNode, limits.outbound, leaving, Some(node));
        }
    }
    let under_way = count(turns.holders().len());
    if under_way >= limits.cluster {
        return wait(Setting::PerCluster, limits.cluster, under_way, None);
    }
    if turns.destinations().values().any(|coming| *coming >= limits.inbound)
        && let Some(Room::Full(node)) = room(migration, view, |node| turns.coming(node), limits.inbound)
    {
        return wait(Setting::InboundPerNode, limits.inbound, turns.coming(&node), Some(node));
    }
    Turn::Waits { limit: None, place }
}

/// What to say of a place in the line, given what was said `before`. Exact for the first few; further back a place is
/// told anew only when it has halved or doubled, so that thousands who wait are not written to for each one that starts.
pub fn queue_place(before: Option<&MigrationQueuePlace>, turn: &Turn) -> Option<MigrationQueuePlace> {
    let Turn::Waits { limit, place } = turn else { return None };
    let told = before.and_then(|before| before.position);
    let still_right =
        |told: u32| told == *place || (*place > EXACT_PLACES && told > *place / 2 && told < place.saturating_mul(2));
    let limit = match limit {
        Some(limit) => Some(limit.setting.name().to_owned()),
        None => before.and_then(|before| before.limit.clone()),
    };
    Some(MigrationQueuePlace { position: Some(told.filter(|told| still_right(*told)).unwrap_or(*place)), limit })
}

/// Those that wait whose place has probably become another one to tell, now that the line has moved.
pub fn to_tell(index: &Index) -> impl Iterator<Item = &Name> {
    let exact = 0..usize::try_from(EXACT_PLACES).unwrap_or(0);
    let further = std::iter::successors(Some(2 * exact.end), |rank| rank.checked_mul(2))
        .take_while(|rank| *rank < index.waiting());
    exact.chain(further).filter_map(|rank| index.nth(rank)).map(|ticket| &ticket.name)
}

/// Where the target pod of a migration could go now.
fn room(
    migration: &VirtualMachineInstanceMigration,
    view: &View<'_>,
    coming: impl Fn(&str) -> u32,
    limit: u32,
) -> Option<Room> {
    let vmi = view.world.vmis.get(&Name::new(migration.namespace(), migration.vmi_name()))?;
    let pod = launcher_pod::build(vmi, Role::Receive(migration), view);
    Some(placement::room(&pod, view.world, coming, limit))
}

/// Decides about the slots.
pub fn decide(view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let turns = view.world.turns();
    let ledger = turns.ledger();
    let Some(meta) = &ledger.meta else {
        // It begins with the truth and gives nothing: the next decision does, on what the server has made of this.
        plan.create(ledger::begin(&adopted(view), view.world.installation()));
        return plan;
    };
    let mut changes: BTreeMap<String, Option<Slot>> = turns.spent(view.world).map(|uid| (uid.clone(), None)).collect();
    changes.extend(adopted(view).into_iter().map(|(uid, slot)| (uid, Some(slot))));
    changes.extend(settled(view));
    let settled_at = meta.creation_timestamp.as_ref().and_then(|time| time.0.checked_add(SETTLE).ok());
    match settled_at.filter(|at| view.now < *at) {
        Some(at) if turns.waiting() > 0 => plan.wake(at),
        Some(_) => {}
        None => grant(view, &mut changes),
    }
    if !changes.is_empty() {
        plan.push(ledger.write(&changes, view.world.installation()));
    }
    plan
}

/// Slots for migrations that are under way without one: of an older controller, or of a ledger that was deleted.
fn adopted(view: &View<'_>) -> BTreeMap<String, Slot> {
    let turns = view.world.turns();
    let without = turns.holders().iter().filter(|(uid, _)| !turns.ledger().slots.contains_key(*uid));
    let slot = |holder: &Holder| {
        let migration = holder.migration.as_ref().and_then(|name| view.world.migrations.get(name))?;
        let mut targets = holder.targets.iter().cloned();
        let source = holder.sources.first().cloned().unwrap_or_default();
        let slot = new_slot(migration, source, targets.next());
        Some(Slot { also: targets.collect(), ..slot })
    };
    without.filter_map(|(uid, holder)| Some((uid.clone(), slot(holder)?))).collect()
}

fn new_slot(migration: &VirtualMachineInstanceMigration, source: String, target: Option<String>) -> Slot {
    Slot {
        migration: migration.key().to_string(),
        vmi: migration.vmi_name().to_owned(),
        source,
        target,
        also: Vec::new(),
        seen: migration.metadata.resource_version.clone().unwrap_or_default(),
    }
}

/// Slots whose pod has been bound and that name another node, or more than one.
fn settled(view: &View<'_>) -> BTreeMap<String, Option<Slot>> {
    let turns = view.world.turns();
    let mut out = BTreeMap::new();
    for (uid, slot) in &turns.ledger().slots {
        let bound = view.world.pods_of_migration(uid).find_map(|pod| pod.spec.as_ref()?.node_name.clone());
        let Some(node) = bound.filter(|node| !node.is_empty() && turns.holders().contains_key(uid)) else { continue };
        if slot.target.as_ref() != Some(&node) || !slot.also.is_empty() {
            out.insert(uid.clone(), Some(Slot { target: Some(node), also: Vec::new(), ..slot.clone() }));
        }
    }
    out
}

/// Gives slots in the order of the line as far as the limits go.
fn grant(view: &View<'_>, changes: &mut BTreeMap<String, Option<Slot>>) {
    let world = view.world;
    let turns = world.turns();
    let limits = Limits::of(world.configuration());
    // Slots of migrations that are not known count, unless this very write takes them back.
    let held = turns.holders().keys().filter(|uid| !matches!(changes.get(*uid), Some(None)));
    let mut under_way = count(held.count());
    let mut leaving: BTreeMap<&str, u32> = BTreeMap::new();
    let mut coming: BTreeMap<String, u32> = BTreeMap::new();
    let mut vmis: BTreeSet<Name> = BTreeSet::new();
    let mut quotas = quota::Headroom::new(view);
    let mut looks = 0;

    let mut heads = turns.heads().map(|(ticket, node)| (ticket, node.as_str())).peekable();
    // Those behind a head whose turn has come, one of a node.
    let mut behind: BTreeSet<(&Ticket, &str)> = BTreeSet::new();
    while under_way < limits.cluster && looks < MOST_LOOKS {
        let from_behind = match (heads.peek(), behind.first()) {
            (Some(head), Some(other)) => other < head,
            (None, Some(_)) => true,
            (Some(_), None) => false,
            (None, None) => break,
        };
        let next = if from_behind { behind.pop_first() } else { heads.next() };
        let Some((ticket, node)) = next else { break };
        if turns.leaving(node) + leaving.get(node).copied().unwrap_or(0) >= limits.outbound {
            continue;
        }
        behind.extend(turns.next_of(node, ticket).map(|ticket| (ticket, node)));
        let Some(migration) = world.migrations.get(&ticket.name) else { continue };
        let vmi = Name::new(migration.namespace(), migration.vmi_name());
        if vmis.contains(&vmi) || !quotas.takes(migration) {
            continue;
        }
        let counted = |node: &str| turns.coming(node) + coming.get(node).copied().unwrap_or(0);
        let target = match room(migration, view, counted, limits.inbound) {
            Some(Room::On(target)) => Some(target),
            // No node is right for it, room or not: the pod will say why.
            Some(Room::Nowhere) => None,
            Some(Room::Full(_)) => {
                looks += 1;
                continue;
            }
            None => continue,
        };
        quotas.take(migration);
        if let Some(target) = &target {
            *coming.entry(target.clone()).or_default() += 1;
        }
        *leaving.entry(node).or_default() += 1;
        under_way += 1;
        vmis.insert(vmi);
        changes.insert(migration.uid().to_owned(), Some(new_slot(migration, node.to_owned(), target)));
    }
}
