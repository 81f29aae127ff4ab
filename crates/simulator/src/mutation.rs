//! Faults of the controllers, handlers and launchers themselves, put in on purpose: what the checks are worth shows in whether they see them.

use godwit_api::MigrationPhase as Phase;
use godwit_control::{
    Effect, Key, Kind, Name, Object, Plan, Ref, Source, Stored, View, World, fence, maintenance, names, vmi,
};
use jiff::SignedDuration;

/// Something that is wrong with the controllers, or with the agents and launchers of all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Their writes carry no revision.
    NoRevisions,
    /// The target pod of a migration that is over badly goes at once, although the guest may be there.
    DropsUnresolvedTarget,
    /// A migration begins beside a pod of the VMI that is still alive, and beside one that is not resolved.
    StartsBesideOthers,
    /// Every pod of a VMI but the one that its status names goes, also while a migration is not resolved.
    SweepsUnresolved,
    /// Every limit counts one too many.
    LimitOffByOne,
    /// Decisions ask for no wake-up.
    NeverWakes,
    /// A failed migration is tried again under the same name.
    FailedBeginsAgain,
    /// A source's handler gives the go before its launcher has written down that the guest has left.
    GoesUnwritten,
    /// A launcher that stood still goes on with the guest that its QEMU has sent meanwhile.
    RunsWhatHasLeft,
    /// A cancellation in post-copy after the hand-over is passed on, and the launcher obeys and runs the guest.
    CancelsWhatHasLeft,
    /// A target's handler gives a loaded guest up when no go comes within seconds.
    GivesUpLoaded,
    /// A source's handler writes the end of a post-copy when the guest runs, though its memory is still to follow.
    EndsBeforeAllFollowed,
    /// Launchers do not look at the time until which their guests may run; their handler alone does.
    NoWatchdog,
    /// A node counts as lost as soon as its lease has run out, without a margin and whoever is heard.
    NoMargin,
    /// A node counts as lost by the time that is written in its lease.
    LostByTimestamps,
    /// Pods are placed as if no node were closed or in maintenance.
    PlacesOnClosed,
    /// Migrations go on to a node that is put into maintenance before their memory is sent.
    GoesToClosed,
    /// A maintenance that ends opens its node, whoever closed it.
    UncordonsAlways,
    /// A maintenance that ends leaves its node as it is.
    LeavesMarks,
    /// A maintenance asks for no evictions.
    EmptiesSilently,
    /// Nobody is brought home.
    NeverReturns,
    /// Guests are brought home to another node than the one that they have left.
    ReturnsElsewhere,
    /// Handlers write on no revision: what one decided before it stood still is carried out when it goes on.
    HandlersWithoutRevisions,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Mutation; 23] = [
        Mutation::NoRevisions,
        Mutation::DropsUnresolvedTarget,
        Mutation::StartsBesideOthers,
        Mutation::SweepsUnresolved,
        Mutation::LimitOffByOne,
        Mutation::NeverWakes,
        Mutation::FailedBeginsAgain,
        Mutation::GoesUnwritten,
        Mutation::RunsWhatHasLeft,
        Mutation::CancelsWhatHasLeft,
        Mutation::GivesUpLoaded,
        Mutation::EndsBeforeAllFollowed,
        Mutation::NoWatchdog,
        Mutation::NoMargin,
        Mutation::LostByTimestamps,
        Mutation::PlacesOnClosed,
        Mutation::GoesToClosed,
        Mutation::UncordonsAlways,
        Mutation::LeavesMarks,
        Mutation::EmptiesSilently,
        Mutation::NeverReturns,
        Mutation::ReturnsElsewhere,
        Mutation::HandlersWithoutRevisions,
    ];

    /// What controllers that are wrong in this way decide.
    pub fn decide(self, key: &Key, view: &View<'_>) -> Plan {
        let mut plan = match self {
            Mutation::StartsBesideOthers => self.decide_without_others(key, view),
            Mutation::LimitOffByOne => self.decide_with_one_more(key, view),
            Mutation::PlacesOnClosed if matches!(key, Key::Turns | Key::Placement(_)) => decide_as_if_open(key, view),
            Mutation::GoesToClosed if matches!(key, Key::Migration(_)) => decide_as_if_open(key, view),
            Mutation::NeverReturns if matches!(key, Key::Homecoming(_)) => Plan::nothing(),
            _ => key.decide(view),
        };
        let world = view.world;
        match (self, key) {
            (Mutation::DropsUnresolvedTarget, Key::Migration(name)) => {
                let over = world.migrations.get(name).filter(|one| one.is_final() && one.status.phase == Phase::Failed);
                for pod in over.into_iter().flat_map(|one| world.pods_of_migration(one.uid())) {
                    if !pod.deleting() {
                        plan.delete(pod.as_ref());
                    }
                }
            }
            (Mutation::SweepsUnresolved, Key::Vmi(name)) => {
                let Some(vmi) = world.vmis.get(name) else { return plan };
                let Some(current) = vmi::current_pod(vmi, world) else { return plan };
                for pod in world.pods_of_vmi(vmi.uid()) {
                    let migration = pod.label(names::LABEL_MIGRATION_JOB_UID);
                    let waited_for =
                        world.migrations_of(name).any(|one| Some(one.uid()) == migration && !one.is_final());
                    if pod.name() != current.name() && !pod.deleting() && !waited_for {
                        plan.delete(pod.as_ref());
                    }
                }
            }
            (Mutation::EmptiesSilently, Key::Maintenance(..)) => {
                plan.effects.retain(|effect| !matches!(effect, Effect::Evict { .. }));
            }
            // Nor does anybody find what was left.
            (Mutation::LeavesMarks, Key::Closure(name)) => {
                let node = world.nodes.get(&Name::cluster(name.as_str()));
                let from = node.and_then(|node| maintenance::orphaned_from(node, world));
                if from.is_some_and(|from| view.now >= from) {
                    plan = Plan::nothing();
                }
            }
            (Mutation::LeavesMarks | Mutation::UncordonsAlways, Key::Maintenance(kind, name)) => {
                let found = world.get(*kind, &Name::cluster(name.as_str()));
                let Some(one) = found.filter(|one| one.metadata().deletion_timestamp.is_some()) else { return plan };
                if self == Mutation::LeavesMarks {
                    let of_node =
                        |effect: &Effect| matches!(effect, Effect::Patch(target, _) if target.kind == Kind::Node);
                    plan.effects.retain(|effect| !of_node(effect));
                } else if let Some(node) = maintenance::node_of(&one) {
                    let open = serde_json::json!({"spec": {"unschedulable": null}});
                    let node = Ref::new(Kind::Node, Name::cluster(node));
                    plan.effects.insert(0, Effect::Patch(node, open));
                }
            }
            (Mutation::ReturnsElsewhere, Key::Homecoming(home)) => {
                let Some(other) = world.nodes.names().find(|node| node.name != *home) else { return plan };
                for effect in &mut plan.effects {
                    let Effect::Create(object) = effect else { continue };
                    let Object::Migration(migration) = object.as_mut() else { continue };
                    let mut elsewhere = migration.as_ref().clone();
                    let annotations = elsewhere.metadata.annotations.get_or_insert_default();
                    annotations.insert(names::ANNOTATION_HOMECOMING.to_owned(), other.name.to_string());
                    elsewhere.spec.added_node_selector.insert(names::HOSTNAME.to_owned(), other.name.to_string());
                    *migration = elsewhere.into();
                }
            }
            (Mutation::NeverWakes, _) => plan.wake_at = None,
            (Mutation::NoMargin | Mutation::LostByTimestamps, Key::Fence(node)) => {
                self.lose_too_soon(node, view, &mut plan);
            }
            (Mutation::FailedBeginsAgain, Key::Migration(name)) => {
                if let Some(one) = world.migrations.get(name).filter(|one| one.status.phase == Phase::Failed) {
                    let again = serde_json::json!({"status": {"phase": "Pending"}});
                    plan.effects.insert(0, Effect::PatchStatus(one.reference(), again));
                }
            }
            _ => {}
        }
        plan
    }

    /// Says that a node is lost before that is known.
    fn lose_too_soon(self, node: &str, view: &View<'_>, plan: &mut Plan) {
        let (Some(lease), Some(heard)) = (fence::lease_of(node, view.world), view.world.fence_heard(node)) else {
            return;
        };
        let Some(time) = lease.spec.as_ref().and_then(|spec| spec.renew_time.as_ref()) else { return };
        let from = if self == Mutation::NoMargin { heard.last } else { time.0 };
        let end = from + SignedDuration::try_from(names::fence::DURATION).unwrap_or_default();
        if fence::says_lost(lease) {
            return;
        }
        if view.now < end {
            return plan.wake(end);
        }
        let mut after = lease.as_ref().clone();
        let annotations = after.metadata.annotations.get_or_insert_default();
        annotations.insert(names::ANNOTATION_NODE_LOST.to_owned(), format!("{:.6}", time.0));
        plan.update(lease.as_ref(), &after);
    }

    /// As if the VMI's other pods were not there, and its last migration were resolved.
    fn decide_without_others(self, key: &Key, view: &View<'_>) -> Plan {
        let Key::Migration(name) = key else { return key.decide(view) };
        let Some(one) = view.world.migrations.get(name).filter(|one| !one.status.phase.is_running()) else {
            return key.decide(view);
        };
        let vmi_name = Name::new(one.namespace(), one.vmi_name());
        let Some(vmi) = view.world.vmis.get(&vmi_name) else { return key.decide(view) };
        let mut world: World = view.world.clone();
        let current = vmi::current_pod(vmi, view.world).map(|pod| pod.key());
        for pod in view.world.pods_of_vmi(vmi.uid()) {
            if Some(pod.key()) != current {
                world.forget(Kind::Pod, &pod.key());
            }
        }
        let mut resolved = vmi.as_ref().clone();
        if let Some(state) = &mut resolved.status.migration_state {
            state.completed = Some(true);
            state.failed = Some(true);
        }
        world.forget(Kind::VirtualMachineInstance, &vmi_name);
        world.apply(Object::from(resolved), Source::Watch);
        key.decide(&View { world: &world, ..*view })
    }

    /// As if every limit were one higher.
    fn decide_with_one_more(self, key: &Key, view: &View<'_>) -> Plan {
        let held = view.world.kubevirts.iter().next();
        let (Key::Turns | Key::Migration(_), Some(held)) = (key, held) else { return key.decide(view) };
        let in_force = godwit_api::config::effective(Some(held.as_ref()), None);
        let mut raised = held.as_ref().clone();
        let migrations = raised.spec.configuration.migrations.get_or_insert_default();
        let one_more = |limit: Option<u32>| limit.map(|limit| limit + 1);
        migrations.parallel_migrations_per_cluster = one_more(in_force.parallel_migrations_per_cluster);
        migrations.parallel_outbound_migrations_per_node = one_more(in_force.parallel_outbound_migrations_per_node);
        migrations.parallel_inbound_migrations_per_node = one_more(in_force.parallel_inbound_migrations_per_node);
        let mut world: World = view.world.clone();
        world.forget(Kind::KubeVirt, &held.key());
        world.apply(Object::from(raised), Source::Watch);
        key.decide(&View { world: &world, ..*view })
    }
}

/// As if no node were cordoned or tainted, and none in maintenance.
fn decide_as_if_open(key: &Key, view: &View<'_>) -> Plan {
    let mut world: World = view.world.clone();
    for kind in maintenance::KINDS {
        for name in world.names_of(kind) {
            world.forget(kind, &name);
        }
    }
    let nodes: Vec<_> = world.nodes.iter().cloned().collect();
    for node in nodes {
        let mut open = node.as_ref().clone();
        if let Some(spec) = &mut open.spec {
            (spec.unschedulable, spec.taints) = (None, None);
        }
        world.forget(Kind::Node, &node.key());
        world.apply(Object::from(open), Source::Watch);
    }
    key.decide(&View { world: &world, ..*view })
}
