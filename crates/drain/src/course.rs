//! How a drain goes: which pods are to be evicted next, where each VM stands, and when it is over. Pure; [`crate::run`] does
//! what is said here.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use godwit_api::drain::{DrainOutcome, DrainPlan, PodOutcome};
use godwit_api::migration::VirtualMachineInstanceMigration;
use godwit_api::names::conditions::{EVACUATION_STOPPED, LIVE_MIGRATABLE};
use godwit_api::{VirtualMachineInstance, names};
use godwit_control::drain::Manner;
use godwit_control::placement::is_finished;
use godwit_control::{Name, Stored, hotplug, vmi_of_pod};
use k8s_openapi::api::core::v1::Pod;

use crate::watch::Facts;

/// Whoever is refused is asked again after this long, or when something of it changes (kubectl's).
pub const ASK_AGAIN: Duration = Duration::from_secs(5);

/// What the server said to an eviction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is not answered yet.
    Asked,
    /// The pod may go.
    Granted,
    /// It may not now, in the server's words.
    Refused(String),
    /// It may not, and that does not change by itself: whoever asks has no right to it, or the server does not understand.
    Denied(String),
}

/// A pod that was asked to go.
#[derive(Clone, Debug)]
struct Asked {
    answer: Answer,
    /// When it was answered.
    at: Duration,
    /// The revision of the VMI that was known then.
    revision: Option<String>,
}

/// Where a VM stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its turn has not come.
    Waits,
    /// It is marked, or its migration waits: why, if that is said.
    Queued(Option<String>),
    /// It is being migrated.
    Moves {
        /// The migration's phase.
        phase: String,
        /// To this node, as far as that is known.
        target: Option<String>,
        /// How much of it has been sent.
        percent: Option<u32>,
        /// When it is expected to be over.
        end: Option<jiff::Timestamp>,
    },
    /// Its guest is being shut down.
    ShutsDown,
    /// It runs on this node already, and the pod that it was in goes by itself.
    Arrived(String),
    /// It has left; where to, and for how long the guest stood still, in milliseconds.
    Left(Option<String>, Option<u64>),
    /// It has ended, and runs nowhere now.
    Ended,
    /// It is not let go: why, and whether that will not change by itself.
    Stays(String, bool),
}

/// A drain under way.
pub struct Course {
    nodes: BTreeSet<String>,
    manner: Manner,
    /// The VMs in the order of the plan, and others as they turn up.
    pub order: Vec<Name>,
    /// Those that are shut down, or moved by somebody else: they take no place in the line.
    aside: BTreeSet<Name>,
    /// Those that no node takes: they are not asked to leave, for their migrations would only wait.
    homeless: BTreeMap<Name, String>,
    /// How many may be on their way, or in line, at the same time.
    window: usize,
    asked: BTreeMap<Name, Asked>,
}

/// What to do now.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Next {
    /// Evict these pods, by name and UID.
    pub evict: Vec<(Name, String)>,
    /// Pods that have not gone.
    pub left: usize,
    /// Nothing remains but what will not go by itself; these are the reasons.
    pub stuck: Vec<String>,
}

impl Course {
    /// A drain that goes by this plan.
    pub fn new(plan: &DrainPlan, manner: Manner, window: usize) -> Self {
        let name = |vm: &godwit_api::drain::DrainVm| Name::new(vm.namespace.as_str(), vm.name.as_str());
        // What blocks for another reason than room is refused by the server, who knows better if it has changed since.
        let homeless =
            plan.vms.iter().filter(|vm| vm.is(&DrainOutcome::Block) && vm.duration.is_none() && vm.bytes.is_some());
        let aside = |vm: &godwit_api::drain::DrainVm| vm.is(&DrainOutcome::ShutDown) || vm.is(&DrainOutcome::External);
        Self {
            nodes: plan.nodes.iter().cloned().collect(),
            manner,
            order: plan.vms.iter().map(name).collect(),
            aside: plan.vms.iter().filter(|vm| aside(vm)).map(name).collect(),
            homeless: homeless.map(|vm| (name(vm), vm.reasons.last().cloned().unwrap_or_default())).collect(),
            window: window.max(1),
            asked: BTreeMap::new(),
        }
    }

    /// The server has answered.
    pub fn answered(&mut self, pod: &Name, answer: Answer, now: Duration, facts: &Facts) {
        let revision = facts.pods.get(pod).and_then(|pod| revision(pod, facts));
        self.asked.insert(pod.clone(), Asked { answer, at: now, revision });
    }

    /// The launcher pods of a VM that hold it on the nodes.
    fn pods_of<'a>(&'a self, vmi: &'a Name, facts: &'a Facts) -> impl Iterator<Item = &'a Pod> {
        let here = facts.pods.values().filter(|pod| !is_finished(pod));
        here.map(AsRef::as_ref).filter(move |pod| vmi_of_pod(pod).as_ref() == Some(vmi))
    }

    /// Where a VM stands.
    pub fn standing(&self, vmi: &Name, facts: &Facts) -> Standing {
        let known = facts.vmis.get(vmi);
        let runs = known.filter(|known| !known.is_final()).and_then(|known| known.status.node_name.clone());
        let elsewhere = runs.filter(|node| !self.nodes.contains(node));
        let Some(pod) = self.pods_of(vmi, facts).next() else {
            return match elsewhere {
                Some(node) => {
                    let state = known.and_then(|known| known.status.migration_state.as_ref());
                    let progress = state.and_then(|state| state.progress.as_ref());
                    Standing::Left(Some(node), progress.and_then(|progress| progress.downtime_milliseconds))
                }
                None => Standing::Ended,
            };
        };
        if let Some(migration) = open_migration(vmi, facts) {
            return moving(migration, known.map(AsRef::as_ref));
        }
        if let Some(node) = elsewhere.filter(|node| !node.is_empty()) {
            return Standing::Arrived(node);
        }
        if pod.deleting() {
            return Standing::ShutsDown;
        }
        let marked = known.is_some_and(|known| known.status.evacuation_node_name.is_some());
        let refusal = match self.asked.get(&pod.key()).map(|asked| &asked.answer) {
            Some(Answer::Refused(why)) => Some((why, false)),
            Some(Answer::Denied(why)) => Some((why, true)),
            Some(Answer::Granted) => return Standing::ShutsDown,
            _ => None,
        };
        if let Some(stopped) = known.and_then(|known| known.condition(EVACUATION_STOPPED)).filter(|one| one.is_true()) {
            return Standing::Stays(stopped.message.clone().unwrap_or_default(), true);
        }
        if marked {
            let failed = known.and_then(|known| known.status.evacuation.as_ref());
            return Standing::Queued(failed.and_then(|state| state.last_failure_message.clone()));
        }
        match refusal {
            Some((why, for_good)) => {
                let cannot = known.and_then(|known| known.condition(LIVE_MIGRATABLE)).filter(|one| one.is_false());
                match cannot {
                    Some(cannot) => {
                        Standing::Stays(format!("{why}: {}", cannot.message.as_deref().unwrap_or_default()), true)
                    }
                    None => Standing::Stays(why.clone(), for_good),
                }
            }
            None => match self.homeless.get(vmi) {
                Some(why) => Standing::Stays(why.clone(), true),
                None => Standing::Waits,
            },
        }
    }

    /// What to do now, and whether it is over.
    pub fn next(&mut self, now: Duration, facts: &Facts) -> Next {
        let mut next = Next::default();
        for vmi in facts.pods.values().filter(|pod| !is_finished(pod)).filter_map(|pod| vmi_of_pod(pod)) {
            if !self.order.contains(&vmi) {
                self.order.push(vmi);
            }
        }
        let standings: Vec<(Name, Standing)> =
            self.order.iter().map(|vmi| (vmi.clone(), self.standing(vmi, facts))).collect();
        let on_the_way = |(vmi, standing): &&(Name, Standing)| {
            matches!(standing, Standing::Queued(_) | Standing::Moves { .. }) && !self.aside.contains(vmi)
        };
        let mut held = standings.iter().filter(on_the_way).count();
        // Who is being asked this very moment has a place as well.
        for (vmi, _) in
            standings.iter().filter(|(vmi, standing)| *standing == Standing::Waits && !self.aside.contains(vmi))
        {
            let is_asked = |pod: &Pod| self.asked.get(&pod.key()).is_some_and(|asked| asked.answer == Answer::Asked);
            held += usize::from(self.pods_of(vmi, facts).any(is_asked));
        }
        let mut room = self.window.saturating_sub(held);
        let mut goes_on = false;
        for (vmi, standing) in &standings {
            let pods: Vec<&Pod> = self.pods_of(vmi, facts).collect();
            next.left += pods.len();
            match standing {
                Standing::Left(..) | Standing::Ended => continue,
                Standing::Stays(why, true) => next.stuck.push(format!("{vmi}: {why}")),
                _ => goes_on = true,
            }
            let wanted = match standing {
                Standing::Waits => !self.homeless.contains_key(vmi),
                Standing::Stays(..) => !self.homeless.contains_key(vmi),
                // It was granted, and the pod is there all the same.
                Standing::ShutsDown => true,
                _ => false,
            };
            if !wanted {
                continue;
            }
            let is_aside = self.aside.contains(vmi) || *standing == Standing::ShutsDown;
            for pod in pods.into_iter().filter(|pod| !pod.deleting()) {
                if !self.may_ask(pod, now, facts) || (!is_aside && room == 0) {
                    continue;
                }
                // Who is refused again and again takes nobody's place.
                if !is_aside && *standing == Standing::Waits {
                    room -= 1;
                }
                next.evict.push((pod.key(), pod.uid().to_owned()));
            }
        }
        // What holds a launcher's disks goes with it.
        let other = |pod: &Pod| !is_finished(pod) && vmi_of_pod(pod).is_none() && hotplug::launcher_of(pod).is_none();
        for pod in facts.pods.values().filter(|pod| other(pod)) {
            match self.manner.of_pod(pod) {
                (PodOutcome::Ignore, _) => continue,
                (PodOutcome::Block, why) => {
                    next.left += 1;
                    next.stuck.push(format!("{}: {}", pod.key(), why.join("; ")));
                    continue;
                }
                _ => {}
            }
            next.left += 1;
            match self.asked.get(&pod.key()).map(|asked| &asked.answer) {
                Some(Answer::Denied(why)) if !pod.deleting() => next.stuck.push(format!("{}: {why}", pod.key())),
                _ => goes_on = true,
            }
            if !pod.deleting() && self.may_ask(pod, now, facts) {
                next.evict.push((pod.key(), pod.uid().to_owned()));
            }
        }
        if goes_on {
            next.stuck.clear();
        }
        for (pod, _) in &next.evict {
            self.answered(pod, Answer::Asked, now, facts);
        }
        next
    }

    /// What other pods were told last, in the server's words.
    pub fn refusals<'a>(&'a self, facts: &'a Facts) -> impl Iterator<Item = (&'a Name, &'a str)> {
        self.asked.iter().filter_map(|(pod, asked)| match &asked.answer {
            Answer::Refused(why) | Answer::Denied(why) if facts.pods.get(pod).is_some_and(|pod| !is_finished(pod)) => {
                Some((pod, why.as_str()))
            }
            _ => None,
        })
    }

    /// Whether a pod may be asked (again) to go.
    fn may_ask(&self, pod: &Pod, now: Duration, facts: &Facts) -> bool {
        match self.asked.get(&pod.key()) {
            None => true,
            Some(Asked { answer: Answer::Asked, .. }) => false,
            // It may have been made anew under its name, or the deletion been lost.
            Some(Asked { answer: Answer::Granted, at, .. }) => now.saturating_sub(*at) >= ASK_AGAIN && !pod.deleting(),
            Some(Asked { answer: Answer::Refused(_) | Answer::Denied(_), at, revision: known }) => {
                now.saturating_sub(*at) >= ASK_AGAIN || *known != revision(pod, facts)
            }
        }
    }
}

/// The revision of the VMI that a pod is of, or of the pod.
fn revision(pod: &Pod, facts: &Facts) -> Option<String> {
    match vmi_of_pod(pod) {
        Some(vmi) => facts.vmis.get(&vmi).and_then(|vmi| vmi.metadata.resource_version.clone()),
        None => pod.metadata.resource_version.clone(),
    }
}

/// The migration of a VMI that is not over.
fn open_migration<'a>(vmi: &Name, facts: &'a Facts) -> Option<&'a VirtualMachineInstanceMigration> {
    let own = facts.migrations.values().filter(|one| {
        one.metadata.namespace.as_deref() == Some(vmi.namespace.as_str())
            && one.spec.vmi_name.as_deref() == Some(vmi.name.as_str())
    });
    own.map(AsRef::as_ref).find(|one| !one.status.phase.is_final())
}

fn moving(migration: &VirtualMachineInstanceMigration, vmi: Option<&VirtualMachineInstance>) -> Standing {
    let phase = &migration.status.phase;
    if !phase.is_running() {
        return Standing::Queued(migration.status.message.clone());
    }
    // The VMI tells more than the migration, whose copy of it may be older.
    let own = |state: &&godwit_api::vmi::VirtualMachineInstanceMigrationState| {
        state.migration_uid.as_deref() == Some(migration.uid())
    };
    let state = vmi.and_then(|vmi| vmi.status.migration_state.as_ref()).filter(own);
    let state = state.or(migration.status.migration_state.as_ref());
    let progress = state.and_then(|state| state.progress.as_ref());
    Standing::Moves {
        phase: phase.as_str().to_owned(),
        target: state.and_then(|state| state.target_node.clone()),
        percent: progress.and_then(|progress| progress.percent),
        end: progress.and_then(|progress| progress.expected_end_timestamp.as_ref()).map(|end| end.0),
    }
}

/// Whether a migration is one that the emptying of these nodes has made.
pub fn is_evacuation(migration: &VirtualMachineInstanceMigration, nodes: &[String]) -> bool {
    let node = migration.annotation(names::ANNOTATION_EVACUATION_MIGRATION);
    node.is_some_and(|node| nodes.iter().any(|one| one == node))
}
