//! What must always hold (design.md, section 2), and what must hold in the end.

use std::fmt;
use std::time::Duration;

use godwit_api::MigrationPhase as Phase;
use godwit_api::vmi::{AbortStatus, VirtualMachineInstanceMigrationState};
use godwit_api::{VirtualMachineInstanceMigration as Migration, VmiPhase};
use godwit_control::migration::table::rank;
use godwit_control::{Key, Kind, Name, Object, Ref, Stored, World, names, placement};

use crate::backwards;
use crate::event::Event;
use crate::machine::{Domain, Launcher};
use crate::sim::{MS, SECOND, Sim};
use crate::store::Commit;

/// What must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// No guest is executed by two launchers.
    NeverTwo,
    /// No guest is ended by an order that no user gave.
    NeverLost,
    /// Nothing waits for ever.
    Stuck,
    /// Limits are never exceeded.
    Limits,
    /// One migration of a VMI at a time.
    OneAtATime,
    /// Nothing goes to a node in maintenance, what was cordoned before stays so, and nobody goes home unasked; what has ended leaves
    /// nothing behind, and what has not says why.
    Maintenance,
    /// Status never goes backwards.
    Backwards,
    /// The simulation itself is not as it should be.
    Simulation,
}

/// Something that must hold and did not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What must hold.
    pub rule: Rule,
    /// When, since the beginning.
    pub at: Duration,
    /// What happened.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:.6} s: {}", self.rule, self.at.as_secs_f64(), self.what)
    }
}

/// Whether a decision must ask to be woken when it writes nothing: what is not over has a deadline.
pub fn needs_wake(key: &Key, world: &World) -> bool {
    match key {
        Key::Migration(name) => world.migrations.get(name).is_some_and(|one| !one.is_final()),
        _ => false,
    }
}

/// Whether a cancellation has its answer.
fn answered(state: &VirtualMachineInstanceMigrationState) -> bool {
    matches!(state.abort_status, Some(AbortStatus::Succeeded | AbortStatus::Failed))
}

impl Sim {
    /// Never two: no guest is executed by two launchers, or by one while another may still go on with it, or by one that has written
    /// down that it has left. Asked whenever one begins to execute it.
    pub fn check_guest(&mut self, vmi: &Name) {
        let may = |launcher: &&Launcher| launcher.runs() || launcher.domain == Domain::Stopped;
        let mut holders = self.launchers.living_of(vmi).map(|(_, launcher)| launcher).filter(may);
        let two = match (holders.next(), holders.next()) {
            (Some(one), Some(other)) => {
                Some(format!("{vmi} is executed twice, or may be: in {} and in {}", one.pod, other.pod))
            }
            (Some(one), None) if one.runs() && one.has_left() => {
                Some(format!("{vmi} is executed in {}, where it is written down that it has left", one.pod))
            }
            _ => None,
        };
        drop(holders);
        if let Some(two) = two {
            self.violate(Rule::NeverTwo, two);
        }
    }

    /// What a write makes of the rules for migrations.
    pub fn check_commit(&mut self, commit: &Commit) {
        match &commit.latest {
            Object::Migration(migration) if !commit.gone => {
                let migration = migration.clone();
                self.check_phase(&migration);
            }
            Object::Migration(migration) => {
                let uid = migration.uid().to_owned();
                if self.phases.get(&uid).is_some_and(|phase| !phase.is_final()) {
                    self.violate(Rule::Backwards, format!("migration {} is gone without an end", migration.key()));
                }
            }
            _ => {}
        }
        self.count(commit);
        if let Some(before) = commit.before.as_ref().filter(|_| !commit.gone)
            && let Some(what) = backwards::taken_back(before, &commit.latest)
        {
            self.violate(Rule::Backwards, format!("{}: {what}", commit.latest.reference()));
        }
    }

    fn check_phase(&mut self, migration: &Migration) {
        let (uid, phase) = (migration.uid().to_owned(), migration.status.phase.clone());
        let before = self.phases.insert(uid.clone(), phase.clone()).unwrap_or_default();
        if before == phase {
            return;
        }
        self.note(format!("{}: {} → {}", migration.key(), before.as_str(), phase.as_str()));
        self.note_leaving(&Name::new(migration.namespace(), migration.vmi_name()), &phase);
        if before.is_final() || rank(&phase) < rank(&before) {
            self.violate(
                Rule::Backwards,
                format!("{} goes from {} to {}", migration.key(), before.as_str(), phase.as_str()),
            );
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

    /// Why the cluster is not at rest yet, if it is not.
    pub fn unrest(&self) -> Option<String> {
        if self.store_down || self.controllers.iter().any(|one| !one.is_idle()) {
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
            let name = vmi.key();
            let running = self.launchers.living_of(&name).map(|(_, one)| one);
            let mut running = running.filter(|one| one.runs() && one.vmi_uid == vmi.uid());
            match (running.next(), running.next()) {
                (Some(launcher), None) if self.name_of(launcher.node) == node => {}
                (Some(launcher), None) => {
                    let real = self.name_of(launcher.node);
                    return Some(format!("VMI {} runs on {real} and its status says {node}", vmi.key()));
                }
                _ => return Some(format!("VMI {} is Running and no launcher executes it", vmi.key())),
            }
            let state = vmi.status.migration_state.as_ref();
            if state.is_some_and(|m| m.abort_requested == Some(true) && m.completed == Some(true) && !answered(m)) {
                return Some(format!("VMI {} does not say what came of the cancellation", vmi.key()));
            }
            if vmi.label(names::LABEL_MIGRATION_TARGET_NODE_NAME).is_some() {
                return Some(format!("VMI {} still has the label of a target", vmi.key()));
            }
            let pods = self.store.owned_by(vmi.uid()).filter(|pod| match pod {
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
    use crate::machine::Why;

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
            fills: false,
            stalled_until: 0,
            frozen_until: 0,
            seen: None,
        }
    }

    fn found_kubevirt(sim: &mut Sim) {
        let now = sim.time();
        let body = json!({"metadata": {"namespace": "kubevirt", "name": "kubevirt"}, "spec": {}});
        sim.store.insert(Kind::KubeVirt, body, now, &mut sim.random).unwrap();
        sim.spread();
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
        let vmi = Name::new("default", "vm");
        sim.launchers.insert(launcher(0, Domain::Running));
        sim.launchers.insert(launcher(1, Domain::Incoming));
        sim.check_guest(&vmi);
        assert_eq!(sim.violation(), None);
        sim.launchers.insert(launcher(2, Domain::Running));
        sim.check_guest(&vmi);
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
            let id = sim.launchers.insert(launcher(0, domain));
            if asked {
                sim.asked.insert("vmi".to_owned());
            }
            sim.end_launcher(id, why);
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
        found_kubevirt(&mut sim);
        for number in 0..godwit_api::config::PARALLEL_MIGRATIONS_PER_CLUSTER {
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
