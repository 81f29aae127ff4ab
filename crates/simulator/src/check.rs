//! What must always hold (design.md, section 2), and what must hold in the end.

use std::collections::BTreeMap;

use godwit_api::MigrationPhase as Phase;
use godwit_api::{VirtualMachineInstanceMigration as Migration, VmiPhase};
use godwit_control::migration::table::rank;
use godwit_control::{Kind, Name, Object, Ref, Stored, names, placement};

use crate::event::Event;
use crate::sim::{MS, SECOND, Sim};
use crate::store::Commit;

/// Limits in force (the defaults; the simulated KubeVirt object sets none).
const PER_CLUSTER: u32 = godwit_api::config::PARALLEL_MIGRATIONS_PER_CLUSTER;
const PER_NODE: u32 = godwit_api::config::PARALLEL_OUTBOUND_MIGRATIONS_PER_NODE;

impl Sim {
    /// Never two: no guest is executed by two launchers.
    pub fn check_guests(&mut self) {
        let mut running: BTreeMap<&Name, &Name> = BTreeMap::new();
        let mut two = None;
        for launcher in self.launchers.values().filter(|launcher| launcher.runs()) {
            if let Some(other) = running.insert(&launcher.vmi, &launcher.pod) {
                two = Some(format!("{} is executed twice: in {other} and in {}", launcher.vmi, launcher.pod));
            }
        }
        if let Some(two) = two {
            self.violate(two);
        }
    }

    /// What a write makes of the rules for migrations.
    pub fn check_commit(&mut self, commit: &Commit) {
        match &commit.latest {
            Object::Migration(migration) if !commit.gone => {
                let migration = migration.clone();
                self.check_phase(&migration);
                self.check_limits();
            }
            Object::Migration(migration) => {
                let uid = migration.uid().to_owned();
                if self.phases.get(&uid).is_some_and(|phase| !phase.is_final()) {
                    self.violate(format!("migration {} is gone without an end", migration.key()));
                }
            }
            Object::VirtualMachineInstance(_) => self.check_limits(),
            _ => {}
        }
    }

    fn check_phase(&mut self, migration: &Migration) {
        let (uid, phase) = (migration.uid().to_owned(), migration.status.phase.clone());
        let before = self.phases.insert(uid.clone(), phase.clone()).unwrap_or_default();
        if before == phase {
            return;
        }
        self.note(format!("{}: {} → {}", migration.key(), before.as_str(), phase.as_str()));
        if before.is_final() || rank(&phase) < rank(&before) {
            self.violate(format!("{} goes from {} to {}", migration.key(), before.as_str(), phase.as_str()));
        }
        if let Some((at, blow)) = self.options.blow.clone()
            && at == phase
            && !self.struck
        {
            self.struck = true;
            let longest = if phase == Phase::Running { 4 * SECOND } else { 30 * MS };
            let after = self.random.between(0, longest);
            let vmi = Name::new(migration.namespace(), migration.vmi_name());
            self.at(after, Event::Strike { uid, vmi, blow });
        }
    }

    /// Never more than one for a VMI, never more than the limits allow.
    fn check_limits(&mut self) {
        let mut by_vmi: BTreeMap<Name, u32> = BTreeMap::new();
        let mut by_node: BTreeMap<String, u32> = BTreeMap::new();
        let mut total = 0;
        for object in self.store.list(Kind::Migration) {
            let Object::Migration(migration) = object else { continue };
            if !migration.status.phase.is_running() {
                continue;
            }
            total += 1;
            *by_vmi.entry(Name::new(migration.namespace(), migration.vmi_name())).or_default() += 1;
            if let Some(Object::VirtualMachineInstance(vmi)) = self.vmi_of(migration) {
                let state = vmi.status.migration_state.as_ref();
                let own = state.filter(|state| state.migration_uid.as_deref() == Some(migration.uid()));
                let node = own.and_then(|state| state.source_node.clone()).or_else(|| vmi.status.node_name.clone());
                *by_node.entry(node.unwrap_or_default()).or_default() += 1;
            }
        }
        let most = by_node.values().copied().max().unwrap_or(0);
        self.stats.most_at_once = self.stats.most_at_once.max(total);
        self.stats.most_from_one_node = self.stats.most_from_one_node.max(most);
        if total > PER_CLUSTER {
            self.violate(format!("{total} migrations are under way, {PER_CLUSTER} may be"));
        }
        if most > PER_NODE {
            self.violate(format!("{most} migrations leave one node, {PER_NODE} may: {by_node:?}"));
        }
        if let Some((vmi, count)) = by_vmi.into_iter().find(|(_, count)| *count > 1) {
            self.violate(format!("{count} migrations of {vmi} are under way at the same time"));
        }
    }

    /// Why the cluster is not at rest yet, if it is not.
    pub fn unrest(&self) -> Option<String> {
        if !self.controllers.is_idle() {
            return Some("the controllers are at work".to_owned());
        }
        for object in self.store.list(Kind::Migration) {
            let Object::Migration(migration) = object else { continue };
            if !migration.is_final() || migration.is_deleting() {
                let (phase, reason) = (migration.status.phase.as_str(), migration.status.reason.as_deref());
                return Some(format!("migration {} is {phase} ({})", migration.key(), reason.unwrap_or("no reason")));
            }
        }
        for object in self.store.list(Kind::VirtualMachine) {
            let vmi = Ref::new(Kind::VirtualMachineInstance, object.name());
            let Some(Object::VirtualMachineInstance(vmi)) = self.store.get(&vmi) else {
                return Some(format!("{} has no VMI", object.name()));
            };
            let node = vmi.status.node_name.as_deref().unwrap_or_default();
            if vmi.deleting() || vmi.status.phase != VmiPhase::Running {
                return Some(format!("VMI {} is {} on {node:?}", vmi.key(), vmi.status.phase.as_str()));
            }
            let mut running = self.launchers.values().filter(|one| one.runs() && one.vmi_uid == vmi.uid());
            match (running.next(), running.next()) {
                (Some(launcher), None) if self.name_of(launcher.node) == node => {}
                (Some(launcher), None) => {
                    let real = self.name_of(launcher.node);
                    return Some(format!("VMI {} runs on {real} and its status says {node}", vmi.key()));
                }
                _ => return Some(format!("VMI {} is Running and no launcher executes it", vmi.key())),
            }
            if vmi.label(names::LABEL_MIGRATION_TARGET_NODE_NAME).is_some() {
                return Some(format!("VMI {} still has the label of a target", vmi.key()));
            }
            let pods = self.store.list(Kind::Pod).filter(|pod| match pod {
                Object::Pod(pod) => {
                    pod.label(names::LABEL_CREATED_BY) == Some(vmi.uid()) && !placement::is_finished(pod)
                }
                _ => false,
            });
            let count = pods.count();
            if count != 1 {
                return Some(format!("VMI {} has {count} launcher pods", vmi.key()));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::Options;
    use crate::machine::{Domain, Launcher, Why};

    fn sim() -> Sim {
        Sim::new(Options::default())
    }

    fn launcher(node: usize, domain: Domain) -> Launcher {
        Launcher {
            node,
            pod: Name::new("default", format!("pod{node}")),
            pod_uid: format!("pod{node}"),
            vmi: Name::new("default", "vm"),
            vmi_uid: "vmi".to_owned(),
            receives: None,
            domain,
            loaded: false,
            resumed: None,
            sends: None,
            ended: None,
            stopping: false,
            ordered: false,
            forgotten: false,
            orphaned: false,
        }
    }

    fn put_migration(sim: &mut Sim, name: &str, vmi: &str, phase: &str) {
        let now = sim.time();
        let body = json!({"metadata": {"namespace": "default", "name": name}, "spec": {"vmiName": vmi}});
        let object = sim.store.insert(Kind::Migration, body, now, &mut sim.random).unwrap();
        say(sim, &object.reference(), phase);
    }

    fn say(sim: &mut Sim, target: &Ref, phase: &str) {
        sim.store.merge(target, true, &json!({"status": {"phase": phase}})).unwrap();
        sim.spread();
    }

    #[test]
    fn two_launchers_of_one_guest_are_seen() {
        let mut sim = sim();
        sim.launchers.insert(1, launcher(0, Domain::Running));
        sim.launchers.insert(2, launcher(1, Domain::Incoming));
        sim.check_guests();
        assert_eq!(sim.violation(), None);
        sim.launchers.insert(3, launcher(2, Domain::Running));
        sim.check_guests();
        assert!(sim.violation().is_some_and(|what| what.contains("executed twice")));
    }

    #[test]
    fn a_guest_that_is_ended_unasked_is_seen() {
        for (domain, why, asked, bad) in [
            (Domain::Running, Why::Order, false, true),
            (Domain::Running, Why::Order, true, false),
            (Domain::Running, Why::Fault, false, false),
            (Domain::MigratedAway, Why::Order, false, false),
        ] {
            let mut sim = sim();
            sim.launchers.insert(1, launcher(0, domain));
            if asked {
                sim.asked.insert("vmi".to_owned());
            }
            sim.end_launcher(1, why);
            assert_eq!(sim.violation().is_some(), bad, "{domain:?} {why:?} {asked}");
        }
    }

    #[test]
    fn phases_that_go_back_are_seen() {
        for (path, bad) in [
            (vec!["Pending", "Running", "Succeeded"], false),
            (vec!["Scheduled", "Scheduling"], true),
            (vec!["Failed", "Succeeded"], true),
        ] {
            let mut sim = sim();
            put_migration(&mut sim, "m", "vm", "");
            for phase in &path {
                say(&mut sim, &Ref::new(Kind::Migration, Name::new("default", "m")), phase);
            }
            assert_eq!(sim.violation().is_some(), bad, "{path:?}");
        }
    }

    #[test]
    fn too_many_migrations_are_seen() {
        let mut sim = sim();
        for number in 0..PER_CLUSTER {
            put_migration(&mut sim, &format!("m{number}"), &format!("vm{number}"), "Running");
        }
        assert_eq!(sim.violation(), None);
        put_migration(&mut sim, "more", "more", "Scheduling");
        assert!(sim.violation().is_some_and(|what| what.contains("under way")));

        let mut sim = super::tests::sim();
        put_migration(&mut sim, "one", "vm", "Running");
        put_migration(&mut sim, "two", "vm", "Pending");
        assert_eq!(sim.violation(), None);
        put_migration(&mut sim, "three", "vm", "Scheduling");
        assert!(sim.violation().is_some_and(|what| what.contains("default/vm")));
    }

    #[test]
    fn what_is_stuck_is_seen() {
        let mut sim = sim();
        assert_eq!(sim.unrest(), None);
        put_migration(&mut sim, "m", "vm", "Scheduling");
        assert!(sim.unrest().is_some_and(|what| what.contains("default/m is Scheduling")));
        say(&mut sim, &Ref::new(Kind::Migration, Name::new("default", "m")), "Failed");
        assert_eq!(sim.unrest(), None);
    }
}
