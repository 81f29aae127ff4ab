//! What goes wrong.

use godwit_control::{Kind, Name, Object, Ref};

use crate::control_loop::Controllers;
use crate::event::{Event, Fault, Still};
use crate::machine::Why;
use crate::sim::{MS, SECOND, Sim};
use crate::{Blow, Step};

impl Sim {
    /// A fault strikes somewhere, and will again.
    pub fn strike_by_chance(&mut self, fault: Fault) {
        let Some(after) = self.interval(fault) else { return };
        self.at(after, Event::Fault(fault));
        let struck = self.injects();
        let nodes: Vec<usize> = (0..self.nodes.len()).collect();
        let Some(node) = self.random.pick(&nodes).copied().filter(|_| struck) else { return };
        let processes: Vec<usize> = (0..self.controllers.len()).collect();
        let Some(process) = self.random.pick(&processes).copied() else { return };
        match fault {
            Fault::WatchBreak => {
                let watched = self.controllers.get(process).map(Controllers::watched).unwrap_or_default();
                if let Some(kind) = self.random.pick(&watched).copied() {
                    self.note(format!("the watch of {} by controller {process} breaks", kind.kind()));
                    // After 410 the list follows at once, after a broken connection when it is back.
                    let longest = if self.random.chance(500) { 20 * MS } else { 5_000 * MS };
                    let after = self.random.between(10 * MS, longest);
                    self.break_watch(process, kind, after);
                }
            }
            Fault::ControllerRestart => {
                let after = self.random.between(50 * MS, 10 * SECOND);
                self.restart_controllers(process, after);
            }
            Fault::ControllerStall => {
                let duration = self.random.between(100 * MS, 20 * SECOND);
                self.stall_controllers(process, duration);
            }
            Fault::StoreRestart => {
                // Mostly it is back before anybody's lease has run out.
                let longest = if self.random.chance(800) { 20 * SECOND } else { 100 * SECOND };
                self.restart_store(longest);
            }
            Fault::LimitChange => self.change_limits(),
            Fault::AgentRestart => self.restart_agent(node),
            Fault::LauncherKill => {
                let living = self.launchers.living();
                if let Some(launcher) = self.random.pick(&living).copied() {
                    self.end_launcher(launcher, Why::Fault);
                }
            }
            Fault::NodeDeath => self.kill_node(node),
            Fault::NodeCut => self.cut_node(node),
            Fault::ApiCut => self.deafen(node),
            Fault::Cordon => self.cordon(node, true),
            Fault::AgentStall => {
                let duration = self.standstill();
                self.stand_still(Still::Agent, node as u64, duration);
            }
            Fault::LauncherStall | Fault::QemuStall => {
                let living = self.launchers.living();
                let still = if fault == Fault::QemuStall { Still::Qemu } else { Still::Launcher };
                if let Some(launcher) = self.random.pick(&living).copied() {
                    let duration = self.standstill();
                    self.stand_still(still, launcher, duration);
                }
            }
            Fault::LinkCut => {
                if let Some(other) = self.random.pick(&nodes).copied() {
                    let seconds = self.random.between(1, 60);
                    self.cut_link(node, other, seconds * SECOND);
                }
            }
        }
    }

    /// How long something stands still: mostly shorter than anybody waits, or longer.
    fn standstill(&mut self) -> u64 {
        let longest = if self.random.chance(700) { 3 * SECOND } else { 60 * SECOND };
        self.random.between(5 * MS, longest)
    }

    /// A migration has come to a step of its hand-over.
    pub fn reached(&mut self, uid: &str, vmi: &Name, step: Step) {
        if let Some((at, blow)) = self.options.blow_at_step
            && at == step
            && !self.struck
        {
            self.struck = true;
            let longest = if step == Step::Sends { SECOND } else { 20 * MS };
            let after = self.random.between(0, longest);
            self.at(after, Event::Strike { uid: uid.to_owned(), vmi: vmi.clone(), blow });
        }
    }

    /// The API server goes, and is back within seconds with all that was written; every watch has to be taken up again.
    fn restart_store(&mut self, longest: u64) {
        if self.store_down {
            return;
        }
        self.note("the API server restarts".to_owned());
        self.store_down = true;
        for who in 0..self.controllers.len() {
            for kind in self.controllers.get(who).map(Controllers::watched).unwrap_or_default() {
                let after = self.random.between(10 * MS, 2_000 * MS);
                self.break_watch(who, kind, after);
            }
        }
        let after = self.random.between(100 * MS, longest);
        self.at(after, Event::StoreUp);
    }

    /// The API server is back: agents list what they have missed.
    pub fn store_is_back(&mut self) {
        self.note("the API server is back".to_owned());
        self.store_down = false;
        self.maintenances_are_heard_of();
        for index in 0..self.nodes.len() {
            let Some(epoch) = self.nodes.get(index).filter(|node| node.reaches_api()).map(|node| node.epoch) else {
                continue;
            };
            let after = self.random.between(10 * MS, SECOND);
            self.at(after, Event::AgentLists { node: index, epoch });
        }
    }

    /// Clocks go wrong: of some nodes by up to ten minutes, of some controllers by up to half a minute.
    pub fn skew_clocks(&mut self) {
        for index in 0..self.nodes.len() + self.controllers.len() {
            if !self.faulty(|faults| faults.skewed_clocks_per_mille) {
                continue;
            }
            let longest = if index < self.nodes.len() { 600 * SECOND } else { 30 * SECOND };
            let drawn = i64::try_from(self.random.between(0, 2 * longest)).unwrap_or(0);
            let skew = drawn - i64::try_from(longest).unwrap_or(0);
            let nodes = self.nodes.len();
            let second = self.random.between(980_000, 1_020_000);
            if let Some(node) = self.nodes.get_mut(index) {
                node.skew = skew;
                node.fence.set_speed(second);
            } else if let Some(one) = self.controllers.get_mut(index - nodes) {
                one.skew = skew;
            }
        }
    }

    /// Somebody sets all clocks.
    pub fn set_clocks_right(&mut self) {
        self.disturbances += 1;
        for node in &mut self.nodes {
            node.skew = 0;
        }
        for one in &mut self.controllers {
            one.skew = 0;
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
        let target = self.launchers.receiving(uid).map(|(id, launcher)| (id, launcher.node));
        let source = self.launchers.all_of(vmi).find(|(_, launcher)| {
            launcher.runs() || launcher.sends.as_ref().is_some_and(|transfer| transfer.uid == uid)
        });
        let source = source.map(|(id, launcher)| (id, launcher.node));
        self.note(format!("{blow:?} hits the migration of {vmi}"));
        match (blow, source, target) {
            (Blow::Cancel, ..) => {
                if let Some(name) = self.store.get_by_uid(uid).map(Object::name) {
                    self.cancel_migration(&name);
                }
            }
            (Blow::DeleteTargetPod, _, Some((id, _))) => {
                let Some(launcher) = self.launchers.get(id) else { return };
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
                for who in 0..self.controllers.len() {
                    let after = self.random.between(50 * MS, 5 * SECOND);
                    self.restart_controllers(who, after);
                }
            }
            (Blow::CutSourceNode, Some((_, node)), _) | (Blow::CutTargetNode, _, Some((_, node))) => {
                self.cut_node(node);
            }
            (Blow::DeafenSourceNode, Some((_, node)), _) | (Blow::DeafenTargetNode, _, Some((_, node))) => {
                self.deafen(node);
            }
            (Blow::StopApiServer, ..) => self.restart_store(100 * SECOND),
            (Blow::RestartSourceAgent, Some((_, node)), _) | (Blow::RestartTargetAgent, _, Some((_, node))) => {
                self.restart_agent(node);
            }
            (Blow::StallSourceAgent, Some((_, node)), _) | (Blow::StallTargetAgent, _, Some((_, node))) => {
                let duration = self.standstill();
                self.stand_still(Still::Agent, node as u64, duration);
            }
            (Blow::StallSourceLauncher, Some((id, _)), _) | (Blow::StallTargetLauncher, _, Some((id, _))) => {
                let duration = self.standstill();
                self.stand_still(Still::Launcher, id, duration);
            }
            (Blow::StallSourceQemu, Some((id, _)), _) | (Blow::StallTargetQemu, _, Some((id, _))) => {
                let duration = self.standstill();
                self.stand_still(Still::Qemu, id, duration);
            }
            _ => {}
        }
    }

    /// Handler and kubelet of a node restart; launchers live on, the memory streams of the node break, as when the handler's pod is
    /// replaced.
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
        let node_of = |id: u64| self.launchers.get(id).map(|launcher| launcher.node);
        let broken: Vec<u64> = self
            .launchers
            .sending()
            .filter(|id| {
                let sends = self.launchers.get(*id).and_then(|launcher| launcher.sends.as_ref());
                node_of(*id) == Some(index) || sends.and_then(|sends| node_of(sends.target)) == Some(index)
            })
            .collect();
        self.fail_transfers(|_, source| broken.contains(&source));
        for source in broken {
            self.never_follows(source);
        }
    }

    /// A node dies with all that runs on it.
    fn kill_node(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index).filter(|node| node.alive) else { return };
        node.alive = false;
        node.forget();
        self.expect_rescue(index);
        self.note(format!("{} dies", self.name_of(index)));
        for launcher in self.launchers.living_on(index) {
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
        self.boot_fence(index, boot);
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

    /// A node does not reach the API server any more.
    fn deafen(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index).filter(|node| node.alive && !node.deaf) else { return };
        node.deaf = true;
        let name = node.name.clone();
        self.note(format!("{name} does not reach the API server"));
        let after = self.random.between(SECOND, 150 * SECOND);
        self.at(after, Event::NodeHears { node: index });
    }

    /// A node reaches the API server again.
    pub fn undeafen(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        node.deaf = false;
        let epoch = node.epoch;
        self.note(format!("{} reaches the API server again", self.name_of(index)));
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
}
