//! How many migrations may run at once, and whose turn it is.

use std::collections::BTreeMap;

use godwit_api::{MigrationConfiguration, MigrationPhase, VirtualMachineInstanceMigration, VmiPhase};

use super::table::Fact;
use crate::object::{Name, Stored};
use crate::world::World;

/// Default of `parallelMigrationsPerCluster`.
const PER_CLUSTER: u32 = 5;
/// Default of `parallelOutboundMigrationsPerNode`.
const PER_NODE: u32 = 2;

/// The node that a migration leaves.
fn source_node(migration: &VirtualMachineInstanceMigration, world: &World) -> Option<String> {
    let vmi = world.vmis.get(&Name::new(migration.namespace(), migration.vmi_name()))?;
    let state = vmi.status.migration_state.as_ref();
    let own = state.filter(|state| state.migration_uid.as_deref() == Some(migration.uid()));
    own.and_then(|state| state.source_node.clone()).or_else(|| vmi.status.node_name.clone())
}

/// Whether this pending migration may make its target pod now, or which limit it waits for.
///
/// Slots go to the oldest first; one that waits for its own node's limit holds up nobody who leaves another node.
pub fn admit(
    migration: &VirtualMachineInstanceMigration,
    configuration: &MigrationConfiguration,
    world: &World,
) -> Result<(), Fact> {
    let per_cluster = configuration.parallel_migrations_per_cluster.unwrap_or(PER_CLUSTER);
    let per_node = configuration.parallel_outbound_migrations_per_node.unwrap_or(PER_NODE);
    let mut in_cluster: u32 = 0;
    let mut on_node: BTreeMap<String, u32> = BTreeMap::new();
    let mut queue = Vec::new();
    for other in world.migrations.iter().filter(|other| !other.is_final()) {
        let counts = other.status.phase.is_running() || world.pods_of_migration(other.uid()).next().is_some();
        if counts {
            in_cluster += 1;
            if let Some(node) = source_node(other, world) {
                *on_node.entry(node).or_default() += 1;
            }
        } else if other.status.phase == MigrationPhase::Pending && !other.is_deleting() {
            let vmi = world.vmis.get(&Name::new(other.namespace(), other.vmi_name()));
            // Those that could not start anyway do not hold up the others.
            if vmi.is_some_and(|vmi| vmi.status.phase == VmiPhase::Running) {
                queue.push((other.metadata.creation_timestamp.clone(), other.key(), other));
            }
        }
    }
    queue.sort_by(|one, two| (&one.0, &one.1).cmp(&(&two.0, &two.1)));
    for (_, _, other) in queue {
        let own = other.uid() == migration.uid();
        if in_cluster >= per_cluster {
            break;
        }
        let taken = on_node.entry(source_node(other, world).unwrap_or_default()).or_default();
        if *taken >= per_node {
            if own {
                return Err(Fact::NodeLimit);
            }
            continue;
        }
        if own {
            return Ok(());
        }
        *taken += 1;
        in_cluster += 1;
    }
    // Where both limits hold, the nearer one is the more telling.
    let own_node = source_node(migration, world).unwrap_or_default();
    let node_is_full = on_node.get(&own_node).is_some_and(|taken| *taken >= per_node);
    Err(if node_is_full { Fact::NodeLimit } else { Fact::ClusterLimit })
}
