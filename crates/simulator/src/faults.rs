//! What goes wrong.

use godwit_control::{Kind, Name, Object, Ref};

use crate::Blow;
use crate::event::{Event, Fault};
use crate::machine::Why;
use crate::sim::{MS, SECOND, Sim};

impl Sim {
    /// A fault strikes somewhere, and will again.
    pub fn strike_by_chance(&mut self, fault: Fault) {
        let Some(after) = self.interval(fault) else { return };
        self.at(after, Event::Fault(fault));
        let nodes: Vec<usize> = (0..self.nodes.len()).collect();
        let Some(node) = self.random.pick(&nodes).copied() else { return };
        match fault {
            Fault::WatchBreak => {
                let watched = self.controllers.watched();
                if let Some(kind) = self.random.pick(&watched).copied() {
                    self.note(format!("the watch of {} breaks", kind.kind()));
                    self.break_watch(kind);
                }
            }
            Fault::ControllerRestart => {
                let after = self.random.between(50 * MS, 10 * SECOND);
                self.restart_controllers(after);
            }
            Fault::AgentRestart => self.restart_agent(node),
            Fault::LauncherKill => {
                let living: Vec<u64> = nodes.iter().flat_map(|node| self.living_on(*node)).collect();
                if let Some(launcher) = self.random.pick(&living).copied() {
                    self.end_launcher(launcher, Why::Fault);
                }
            }
            Fault::NodeDeath => self.kill_node(node),
            Fault::NodeCut => self.cut_node(node),
            Fault::Cordon => self.cordon(node, true),
            Fault::LinkCut => {
                if let Some(other) = self.random.pick(&nodes).copied() {
                    let seconds = self.random.between(1, 60);
                    self.cut_link(node, other, seconds * SECOND);
                }
            }
        }
    }

    /// The source's QEMU is done: perhaps something breaks right now.
    pub fn strike_hand_over(&mut self, uid: &str, vmi: &Name) {
        if self.faulty(|faults| faults.hand_over_per_mille)
            && let Some(blow) = self.random.pick(&Blow::ALL).copied()
        {
            let after = self.random.between(0, 12 * MS);
            self.at(after, Event::Strike { uid: uid.to_owned(), vmi: vmi.clone(), blow });
        }
    }

    /// A blow lands on a migration, as far as it still has what is hit.
    pub fn strike(&mut self, uid: &str, vmi: &Name, blow: Blow) {
        let target = self.launchers.iter().find(|(_, launcher)| launcher.receives.as_deref() == Some(uid));
        let target = target.map(|(id, launcher)| (*id, launcher.node));
        let source = self.launchers.iter().find(|(_, launcher)| {
            let sends = launcher.sends.as_ref().is_some_and(|transfer| transfer.uid == uid);
            launcher.vmi == *vmi && (sends || launcher.runs())
        });
        let source = source.map(|(id, launcher)| (*id, launcher.node));
        self.note(format!("{blow:?} hits the migration of {vmi}"));
        match (blow, source, target) {
            (Blow::Cancel, ..) => {
                let found = self.store.list(Kind::Migration).find(|one| one.metadata().uid.as_deref() == Some(uid));
                if let Some(name) = found.map(Object::name) {
                    self.cancel_migration(&name);
                }
            }
            (Blow::DeleteTargetPod, _, Some((id, _))) => {
                let Some(launcher) = self.launchers.get(&id) else { return };
                let (pod, uid, now) = (launcher.pod.clone(), launcher.pod_uid.clone(), self.time());
                self.asked.insert(uid.clone());
                let _ = self.store.delete(&Ref::new(Kind::Pod, pod), &uid, None, now);
                self.spread();
            }
            (Blow::KillTarget, _, Some((id, _))) | (Blow::KillSource, Some((id, _)), _) => {
                self.end_launcher(id, Why::Fault);
            }
            (Blow::KillTargetNode, _, Some((_, node))) | (Blow::KillSourceNode, Some((_, node)), _) => {
                self.kill_node(node);
            }
            (Blow::CutLink, Some((_, one)), Some((_, other))) => self.cut_link(one, other, 30 * SECOND),
            (Blow::RestartController, ..) => {
                let after = self.random.between(50 * MS, 5 * SECOND);
                self.restart_controllers(after);
            }
            (Blow::CutSourceNode, Some((_, node)), _) | (Blow::CutTargetNode, _, Some((_, node))) => {
                self.cut_node(node);
            }
            (Blow::RestartSourceAgent, Some((_, node)), _) | (Blow::RestartTargetAgent, _, Some((_, node))) => {
                self.restart_agent(node);
            }
            _ => {}
        }
    }

    /// Handler and kubelet of a node restart; launchers live on, the memory streams through the handler break.
    fn restart_agent(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index).filter(|node| node.alive) else { return };
        node.forget();
        let epoch = node.epoch;
        self.note(format!("the agent of {} restarts", self.name_of(index)));
        self.break_streams(index);
        let after = self.random.between(100 * MS, 5 * SECOND);
        self.at(after, Event::AgentLists { node: index, epoch });
    }

    fn break_streams(&mut self, index: usize) {
        let there: Vec<u64> =
            self.launchers.iter().filter(|(_, launcher)| launcher.node == index).map(|(id, _)| *id).collect();
        self.fail_transfers(|transfer, source| there.contains(&source) || there.contains(&transfer.target));
    }

    /// A node dies with all that runs on it.
    fn kill_node(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index).filter(|node| node.alive) else { return };
        node.alive = false;
        node.forget();
        self.note(format!("{} dies", self.name_of(index)));
        for launcher in self.living_on(index) {
            self.end_launcher(launcher, Why::Fault);
        }
        self.links_changed();
        let after = self.random.between(30 * SECOND, 400 * SECOND);
        self.at(after, Event::Boot { node: index });
    }

    /// A node boots.
    pub fn boot_node(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        node.forget();
        node.alive = true;
        node.boot += 1;
        node.pulling.clear();
        let (epoch, boot) = (node.epoch, node.boot);
        self.note(format!("{} boots", self.name_of(index)));
        self.at(MS, Event::Heartbeat { node: index, boot });
        let after = self.random.between(10 * MS, SECOND);
        self.at(after, Event::AgentLists { node: index, epoch });
    }

    /// A node cannot reach anything; what runs on it runs on.
    fn cut_node(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index).filter(|node| node.alive && !node.cut) else { return };
        node.cut = true;
        let name = node.name.clone();
        self.note(format!("{name} is cut off"));
        self.links_changed();
        let after = self.random.between(SECOND, 150 * SECOND);
        self.at(after, Event::NodeHeals { node: index });
    }

    /// A node is reached again.
    pub fn heal_node(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        node.cut = false;
        let epoch = node.epoch;
        self.note(format!("{} is reached again", self.name_of(index)));
        self.links_changed();
        let after = self.random.between(10 * MS, SECOND);
        self.at(after, Event::AgentLists { node: index, epoch });
    }

    fn cut_link(&mut self, one: usize, other: usize, duration: u64) {
        let link = (one.min(other), one.max(other));
        if one != other && self.cut_links.insert(link) {
            self.note(format!("the link {} – {} is cut", self.name_of(one), self.name_of(other)));
            self.links_changed();
            self.at(duration, Event::LinkHeals { link });
        }
    }

    /// The VMI of a migration.
    pub fn vmi_of(&self, migration: &godwit_api::VirtualMachineInstanceMigration) -> Option<&Object> {
        let namespace = migration.metadata.namespace.clone().unwrap_or_default();
        self.store.get(&Ref::new(Kind::VirtualMachineInstance, Name::new(namespace, migration.vmi_name())))
    }
}
