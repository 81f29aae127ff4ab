//! Coming home: VMs that a maintenance has moved off its node (`returnHome`) come back when it has ended.
//!
//! While the maintenance lasts its VMIs carry the annotation [`ANNOTATION_HOME`](names::ANNOTATION_HOME) with the node's name. What
//! follows is decided for each home by itself, so that its VMs come one after the other: with the lowest priority, under the
//! limits of all migrations, and only while nobody wants the node empty. A VM that somebody else has moved meanwhile, or that
//! its home does not take any more, stays where it is.

use std::sync::Arc;

use godwit_api::migration::MigrationPriority;
use godwit_api::names::conditions::LIVE_MIGRATABLE;
use godwit_api::names::events::{COMPONENT_MAINTENANCE, created_migration, maintenance as told, reason};
use godwit_api::{
    Condition, FailureCause, MigrationPhase, VirtualMachineInstance, VirtualMachineInstanceMigration, VmiPhase,
};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use smol_str::SmolStr;

use crate::launcher_pod::{self, Role};
use crate::object::{Name, Object, Stored};
use crate::placement::{self, Room};
use crate::plan::{EventType, Plan, View};
use crate::world::{Change, World};
use crate::{evacuation, kubevirt, maintenance, names, turns};

/// The node that a VM is to come back to.
pub fn home_of(vmi: &VirtualMachineInstance) -> Option<&str> {
    vmi.annotation(names::ANNOTATION_HOME).filter(|home| !home.is_empty())
}

/// All nodes that VMs are to come back to.
pub fn all(world: &World) -> impl Iterator<Item = SmolStr> {
    world.homes().map(SmolStr::new)
}

/// The homes that a change touches.
pub fn affected(change: &Change, world: &World) -> Vec<SmolStr> {
    let home = |name: &str| world.expected_at(name).next().is_some().then(|| SmolStr::new(name));
    change
        .sides()
        .filter_map(|object| match object {
            Object::VirtualMachineInstance(vmi) => home_of(vmi).map(SmolStr::new),
            Object::Node(node) => home(Stored::name(node.as_ref())),
            Object::Migration(migration) => {
                let vmi = world.vmis.get(&Name::new(migration.namespace(), migration.vmi_name()))?;
                home_of(vmi).map(SmolStr::new)
            }
            other => maintenance::node_of(other).and_then(home),
        })
        .collect()
}

/// Decides who comes home to this node.
pub fn decide(home: &str, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    if maintenance::of(home, view.world).is_some() {
        return plan;
    }
    if !view.settings.moves_guests {
        return plan;
    }
    let node = view.world.nodes.get(&Name::cluster(home));
    let all: Vec<_> = view.world.expected_at(home).filter(|vmi| !vmi.is_deleting()).collect();
    let mut busy = false;
    let mut waiting = Vec::new();
    for vmi in all {
        let migrations: Vec<_> = view.world.migrations_of(&vmi.key()).collect();
        if migrations.iter().any(|one| !one.is_final() || one.has_finalizer(names::FINALIZER_MIGRATION)) {
            busy |=
                migrations.iter().any(|one| !one.is_final() && one.annotation(names::ANNOTATION_HOMECOMING).is_some());
            continue;
        }
        let there = vmi.status.node_name.as_deref() == Some(home);
        if there || vmi.is_final() || node.is_none() || !was_evacuated(vmi, view.world) {
            // It has come, never left, cannot come, or somebody else has moved it meanwhile.
            stay(vmi, &mut plan);
        } else if failed(&migrations) {
            plan.record(
                vmi.as_ref(),
                COMPONENT_MAINTENANCE,
                EventType::Warning,
                told::STAYS_AWAY.0,
                told::STAYS_AWAY.1,
            );
            stay(vmi, &mut plan);
        } else {
            waiting.push(vmi);
        }
    }
    let closed = |vmi: &VirtualMachineInstance| node.and_then(|node| closed(node, vmi, view.world));
    for vmi in &waiting {
        tell_wait(vmi, closed(vmi).as_deref(), &mut plan);
    }
    let next = waiting.iter().find(|vmi| closed(vmi).is_none());
    let Some(vmi) = next.filter(|_| !busy && plan.effects.is_empty()) else { return plan };
    let migratable = vmi.condition(LIVE_MIGRATABLE).is_some_and(Condition::is_true);
    if !migratable || vmi.status.phase != VmiPhase::Running || turns::is_on_its_way(vmi) {
        if !migratable {
            stay(vmi, &mut plan);
        }
        return plan;
    }
    let migration = journey(vmi, home, view.world);
    let mut probe = migration.clone();
    probe.metadata.uid = Some(String::new());
    let pod = launcher_pod::build(vmi, Role::Receive(&probe), view);
    if placement::room(&pod, view.world, |_| 0, u32::MAX) == Room::Nowhere {
        plan.record(vmi.as_ref(), COMPONENT_MAINTENANCE, EventType::Warning, told::STAYS_AWAY.0, told::STAYS_AWAY.1);
        stay(vmi, &mut plan);
        return plan;
    }
    let text = created_migration(Stored::name(&migration));
    plan.create(migration);
    plan.record(vmi.as_ref(), COMPONENT_MAINTENANCE, EventType::Normal, reason::SUCCESSFUL_CREATE, text);
    plan
}

/// Why the node does not take this guest for now, as far as itself says. Taints that the guest tolerates do not count, but
/// for the drain taint: the guest would have to leave at once.
fn closed(node: &Node, vmi: &VirtualMachineInstance, world: &World) -> Option<String> {
    let name = Stored::name(node);
    if evacuation::is_cordoned(node) {
        return Some(format!("{name} is cordoned"));
    }
    if !placement::is_ready(node) {
        return Some(format!("{name} is not ready"));
    }
    if evacuation::is_drained(node, &kubevirt::migration_configuration(world)) {
        return Some(format!("{name} carries the drain taint"));
    }
    let taint = placement::repelling_taint(node, &vmi.spec.tolerations)?;
    Some(format!("{name} has the taint {}, which it does not tolerate", taint.key))
}

/// Says once of each reason that it has to wait, and what for.
fn tell_wait(vmi: &Arc<VirtualMachineInstance>, why: Option<&str>, plan: &mut Plan) {
    if vmi.annotation(names::ANNOTATION_HOME_CLOSED) == why {
        return;
    }
    let mut after = vmi.as_ref().clone();
    let annotations = after.metadata.annotations.get_or_insert_default();
    match why {
        Some(why) => annotations.insert(names::ANNOTATION_HOME_CLOSED.to_owned(), why.to_owned()),
        None => annotations.remove(names::ANNOTATION_HOME_CLOSED),
    };
    plan.update(vmi.as_ref(), &after);
    if let Some(why) = why {
        let (reason, text) = (told::WAITS_TO_RETURN, told::waits_to_return(why));
        plan.record(vmi.as_ref(), COMPONENT_MAINTENANCE, EventType::Normal, reason, text);
    }
}

/// Whether an evacuation has brought it where it is: nobody else has moved it since.
fn was_evacuated(vmi: &VirtualMachineInstance, world: &World) -> bool {
    let Some(state) = &vmi.status.migration_state else { return false };
    let Some(uid) = state.migration_uid.as_deref() else { return false };
    match world.migration_by_uid(uid) {
        Some(last) => last.annotation(names::ANNOTATION_EVACUATION_MIGRATION).is_some() || is_homecoming(last),
        None => {
            let key = vmi.key();
            let mut records = world.records_of(&key);
            records.any(|record| record.spec.migration_uid == uid && record.spec.evacuated_node.is_some())
        }
    }
}

fn is_homecoming(migration: &VirtualMachineInstanceMigration) -> bool {
    migration.annotation(names::ANNOTATION_HOMECOMING).is_some()
}

/// Whether a journey home since it was evacuated did not end there. It is not tried again: nothing depends on it.
fn failed(migrations: &[&Arc<VirtualMachineInstanceMigration>]) -> bool {
    let made = |one: &VirtualMachineInstanceMigration| one.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let evacuations = migrations.iter().filter(|one| one.annotation(names::ANNOTATION_EVACUATION_MIGRATION).is_some());
    let left = evacuations.map(|one| made(one)).max();
    // That its home was closed meanwhile is no reason to stay away when it is open again.
    let closed = Some(FailureCause::TargetInMaintenance.as_str());
    migrations.iter().any(|one| {
        let failed = one.status.phase == MigrationPhase::Failed && one.status.reason.as_deref() != closed;
        is_homecoming(one) && failed && Some(made(one)) >= left
    })
}

/// It is expected nowhere any more.
fn stay(vmi: &Arc<VirtualMachineInstance>, plan: &mut Plan) {
    let mut after = vmi.as_ref().clone();
    if let Some(annotations) = &mut after.metadata.annotations {
        annotations.remove(names::ANNOTATION_HOME);
        annotations.remove(names::ANNOTATION_HOME_CLOSED);
    }
    plan.update(vmi.as_ref(), &after);
}

fn journey(vmi: &VirtualMachineInstance, home: &str, world: &World) -> VirtualMachineInstanceMigration {
    let last = vmi.status.migration_state.as_ref().and_then(|state| state.migration_uid.as_deref()).unwrap_or_default();
    // One that was called off before the VMI knew of it is there still, perhaps among older ones. Its UID makes the next
    // name another. Creation times are in whole seconds: of those that tie only the latest has not lent a name yet.
    let key = vmi.key();
    let made = |one: &VirtualMachineInstanceMigration| one.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let mut earlier: Vec<_> = world.migrations_of(&key).filter(|one| is_homecoming(one)).collect();
    earlier.sort_by_key(|one| std::cmp::Reverse((made(one), one.uid())));
    let name = |after: &str| names::homecoming(&format!("{}/{home}/{last}/{after}", vmi.uid()));
    let is_free = |name: &String| world.migrations.get(&Name::new(vmi.namespace(), name.as_str())).is_none();
    // The same for the same journey: made twice, it is one.
    let free = earlier.iter().map(|one| name(one.uid())).find(is_free).unwrap_or_else(|| name(""));
    let mut migration = VirtualMachineInstanceMigration {
        metadata: ObjectMeta {
            namespace: vmi.metadata.namespace.clone(),
            name: Some(free),
            annotations: Some([(names::ANNOTATION_HOMECOMING.to_owned(), home.to_owned())].into()),
            ..ObjectMeta::default()
        },
        ..VirtualMachineInstanceMigration::default()
    };
    migration.spec.vmi_name = vmi.metadata.name.clone();
    migration.spec.priority = Some(MigrationPriority::SystemMaintenance);
    migration.spec.added_node_selector.insert(names::HOSTNAME.to_owned(), home.to_owned());
    migration
}
