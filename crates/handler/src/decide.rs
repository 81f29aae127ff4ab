//! What to do about one VMI, as a function of what is known: no IO, no clock, no memory.
//!
//! Everything is derived anew from the VMI, its pods' launchers and the channels in hand, so a handler that restarts goes on
//! where its predecessor stopped. The hand-over's states and why they are safe are in docs/hand-over.md.

use std::time::Duration;

use godwit_api::FailureCause;
use godwit_launcher::rpc::{DomainPhase, MigrationMode, MigrationRole};

use crate::expect::Prediction;
use crate::facts::{self, Facts, Launcher, MigrationView, PodView};

pub mod causes;
mod limits;
mod run;
mod source;
mod target;

#[cfg(test)]
mod tests;

/// One thing to do. A list of them is carried out in order; if one fails the rest is dropped and everything is looked at again.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Wire the pod's networks if this process has not done so (it also serves DHCP there).
    Wire {
        /// The pod.
        pod: String,
    },
    /// Order the launcher to define and start the VM.
    Start {
        /// The pod.
        pod: String,
    },
    /// Give the guest the disks that its VMI has got, and take away those that it has not any more.
    ChangeDisks {
        /// The pod.
        pod: String,
        /// The volumes that the guest lacks.
        missing: Vec<String>,
    },
    /// Order the launcher to receive, and open the channels meanwhile.
    PrepareTarget {
        /// The pod.
        pod: String,
        /// UID of the migration.
        uid: String,
    },
    /// Open the control channel again after a restart; the memory stream cannot be taken up again.
    OpenControl {
        /// The pod.
        pod: String,
        /// UID of the migration.
        uid: String,
    },
    /// Close the listening half.
    CloseTarget,
    /// Tell a waiting launcher that the guest stays where it is.
    Abandon {
        /// The pod.
        pod: String,
        /// UID of the migration that it waits for.
        uid: String,
    },
    /// Dial the target, anew if it was tried before.
    Dial {
        /// The pod.
        pod: String,
        /// Also open the memory channel and listen for QEMU.
        memory: bool,
    },
    /// Ask the launcher to measure how fast its guest writes.
    Measure {
        /// The pod.
        pod: String,
    },
    /// Order the outgoing migration.
    Migrate {
        /// The pod.
        pod: String,
    },
    /// Order another bandwidth of a migration that runs.
    Limit {
        /// The pod.
        pod: String,
    },
    /// Order its cancellation.
    Cancel {
        /// The pod.
        pod: String,
        /// UID of the migration.
        uid: String,
        /// Why, when it is this handler's wish.
        why: Option<Failure>,
    },
    /// Order what ends a migration that does not end by itself.
    Disrupt {
        /// The pod.
        pod: String,
        /// UID of the migration.
        uid: String,
        /// Post-copy, or the guest stands still.
        how: Disruption,
    },
    /// Close the dialling half.
    CloseSource,
    /// Order the launcher to end the guest.
    Shutdown {
        /// The pod.
        pod: String,
        /// 0 kills at once.
        grace_seconds: u64,
    },
    /// Remember that it has been told of a reboot, by when it was asked for, that the guest took no part in it.
    RebootTold {
        /// The pod.
        pod: String,
        /// When it was asked for, microseconds since the epoch.
        asked_us: i64,
    },
    /// Write into the VMI, all in one patch on the revision that was looked at.
    Write(Vec<Change>),
    /// Record an event about the VMI.
    Event {
        /// Warning instead of Normal.
        warning: bool,
        /// For a program.
        reason: &'static str,
        /// For a person.
        message: String,
    },
}

/// One change of the VMI.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// `status.phase`, with its time.
    Phase(&'static str),
    /// Everything that follows from the launcher's state: conditions, interfaces, guest, machine (only what differs is written).
    Report {
        /// The pod in which the guest lives.
        pod: String,
    },
    /// Condition `Synchronized` is False, for this reason in words; a [`Change::Report`] takes it away.
    Unsynchronized(String),
    /// The same with a reason of its own: the guest waits for another link to the rest of its memory.
    LinkBroken {
        /// The node at the other end.
        node: String,
    },
    /// The guest lives here now: `status.nodeName`, the label, `targetNodeDomainReadyTimestamp`; evacuation is done.
    Arrived {
        /// When the guest resumed, microseconds since the epoch.
        resume_us: i64,
    },
    /// Where the target listens, and that its domain is there.
    Published,
    /// `migrationNetworkType`: from now on the network for migrations, or else the nodes' own, whatever it was.
    Network {
        /// That for migrations.
        own: bool,
    },
    /// `startTimestamp` and `mode`, microseconds since the epoch.
    Started(i64),
    /// `forecast`.
    Forecast(Box<Prediction>),
    /// `mode`: how it goes on.
    Mode(MigrationMode),
    /// `failureCause` of a migration that is being given up, so that it is known after a restart.
    GivingUp(FailureCause),
    /// `migrationState.progress` from the launcher in this pod.
    Progress {
        /// The pod.
        pod: String,
    },
    /// `abortStatus`.
    Abort(&'static str),
    /// `completed`, `endTimestamp`; the measured standstill with it.
    Completed {
        /// STOP to RESUME, if both are known.
        downtime_us: Option<i64>,
    },
    /// `failed`, `completed`, `endTimestamp`, `failureReason`, `failureCause`.
    Failed(Failure),
}

/// Why a migration failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Out of the closed list.
    pub cause: FailureCause,
    /// In words; KubeVirt's where it has some.
    pub reason: String,
}

impl Failure {
    /// This cause in these words.
    pub fn new(cause: FailureCause, reason: impl Into<String>) -> Self {
        Self { cause, reason: reason.into() }
    }
}

/// What ends a migration that does not end while the guest runs at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disruption {
    /// The guest runs at the target, its memory follows.
    PostCopy,
    /// The guest stands still until its memory is over.
    Pause,
}

/// What to do now, and when to look again if nothing happens before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// In this order.
    pub actions: Vec<Action>,
    /// At the latest after this time.
    pub wake: Option<Duration>,
}

impl Plan {
    fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn write(&mut self, changes: Vec<Change>) {
        if !changes.is_empty() {
            self.actions.push(Action::Write(changes));
        }
    }

    fn event(&mut self, reason: &'static str, message: impl Into<String>) {
        self.actions.push(Action::Event { warning: false, reason, message: message.into() });
    }

    fn warn(&mut self, reason: &'static str, message: impl Into<String>) {
        self.actions.push(Action::Event { warning: true, reason, message: message.into() });
    }

    fn wake(&mut self, after: Duration) {
        self.wake = Some(self.wake.map_or(after, |w| w.min(after)));
    }
}

/// The role of this node for a VMI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role<'a> {
    /// The guest belongs here (and may be about to leave).
    Owner {
        /// Its pod, if it is here.
        pod: Option<&'a str>,
    },
    /// The guest is to come here.
    Target,
    /// The guest has left from here.
    Departed,
    /// The guest is elsewhere and nothing is planned.
    Nobody,
}

/// Which role this node has.
#[must_use]
pub fn role(facts: &Facts) -> Role<'_> {
    let me = facts.node.as_str();
    let owns = facts.vmi.node_name.as_deref() == Some(me);
    let Some(m) = &facts.vmi.migration else {
        return if owns { Role::Owner { pod: only_pod(facts) } } else { Role::Nobody };
    };
    let (source, target) = (m.source_node == me, m.target_node == me);
    match (m.completed, m.failed) {
        (true, false) if target => Role::Owner { pod: Some(&m.target_pod) },
        (true, false) if source => Role::Departed,
        (true, true) if source => Role::Owner { pod: Some(&m.source_pod) },
        (false, _) if source => Role::Owner { pod: Some(&m.source_pod) },
        (false, _) if target => Role::Target,
        _ => Role::Nobody,
    }
}

/// The pod of a VMI that was never migrated: the one that was not made for a migration.
fn only_pod(facts: &Facts) -> Option<&str> {
    let mut pods = facts.pods.values().filter(|p| p.migration_uid.is_none());
    let first = pods.next();
    // A leftover beside it has ended.
    pods.find(|p| !p.terminal).or(first).map(|p| p.name.as_str())
}

/// The decision.
#[must_use]
pub fn decide(facts: &Facts) -> Plan {
    let mut plan = Plan::default();
    let migration = facts.vmi.migration.as_ref();
    let role = role(facts);
    let mut used: Vec<&str> = Vec::new();
    let mut receives = role == Role::Target;
    match &role {
        Role::Owner { pod } => {
            used.extend(*pod);
            if let Some(m) = migration.filter(|m| m.completed && !m.failed) {
                run::arrived(facts, m, &mut plan);
            }
            let leaving = migration.filter(|m| !m.completed);
            let goes_on = match (leaving, pod.and_then(|name| facts.pods.get(name))) {
                (Some(m), Some(pod)) => source::decide(facts, m, pod, &mut plan),
                _ => true,
            };
            if leaving.is_none() && facts.source.is_some() {
                plan.act(Action::CloseSource);
            }
            // It left, and is lost: what remains of it here is of no use.
            if let Some(pod) = pod.and_then(|name| facts.pods.get(name))
                && migration.is_some_and(|m| m.completed && m.failed && m.source_pod == pod.name && left(pod, m))
                && !pod.terminal
            {
                end(pod, 0, &mut plan);
            }
            if let (true, Some(pod)) = (goes_on, pod.and_then(|name| facts.pods.get(name))) {
                run::decide(facts, pod, &mut plan);
            }
            // A guest that does not leave its node: this is the other end as well.
            if let Some(m) = migration.filter(|m| m.is_local()) {
                if !m.completed {
                    receives = true;
                    if let Some(pod) = facts.pods.get(&m.target_pod) {
                        used.push(&m.target_pod);
                        target::decide(facts, m, pod, &mut plan);
                    }
                } else if !m.failed
                    && let Some(pod) = facts.pods.get(&m.source_pod)
                {
                    used.push(&m.source_pod);
                    departed(facts, m, pod, &mut plan);
                }
            }
        }
        Role::Target => {
            if let Some((m, pod)) = migration.and_then(|m| Some((m, facts.pods.get(&m.target_pod)?))) {
                used.push(&m.target_pod);
                target::decide(facts, m, pod, &mut plan);
            }
        }
        Role::Departed => {
            if let Some((m, pod)) = migration.and_then(|m| Some((m, facts.pods.get(&m.source_pod)?))) {
                used.push(&m.source_pod);
                departed(facts, m, pod, &mut plan);
            }
        }
        Role::Nobody => {}
    }
    if facts.target.is_some() && !receives {
        plan.act(Action::CloseTarget);
    }
    for pod in facts.pods.values().filter(|p| !used.contains(&p.name.as_str()) && !p.terminal) {
        stray(pod, migration, &mut plan);
    }
    plan
}

/// The guest has left: end what remains of it here, once the API says so.
fn departed(facts: &Facts, m: &MigrationView, pod: &PodView, plan: &mut Plan) {
    if facts.source.is_some() {
        plan.act(Action::CloseSource);
    }
    // Only a QEMU that is known to have handed over is ended here; anything else is not this migration's source. Its launcher
    // stays to tell of the hand-over until it hears this.
    if left(pod, m) && !pod.terminal {
        end(pod, 0, plan);
    }
}

/// Whether a launcher that answers says that its guest has left in migration `m`.
fn left(pod: &PodView, m: &MigrationView) -> bool {
    let facts = pod.launcher.state().and_then(|state| facts::migration(state, &m.uid, MigrationRole::Source));
    facts.is_some_and(facts::has_left)
}

/// Orders the end of a pod's guest, once for each shorter grace.
fn end(pod: &PodView, grace_seconds: u64, plan: &mut Plan) {
    if pod.shutdown_ordered.is_some_and(|ordered| ordered <= grace_seconds) {
        return;
    }
    plan.act(Action::Shutdown { pod: pod.name.clone(), grace_seconds });
    if grace_seconds > 0 {
        plan.event("ShuttingDown", "Signaled Graceful Shutdown");
    } else {
        plan.event("Deleted", "Signaled Deletion");
    }
}

/// A pod that no role claims: the target of a migration that did not happen.
fn stray(pod: &PodView, migration: Option<&MigrationView>, plan: &mut Plan) {
    let (Some(uid), Launcher::Answers(state)) = (&pod.migration_uid, &pod.launcher) else { return };
    let over = migration.is_none_or(|m| m.uid != *uid || m.completed);
    if !over {
        return;
    }
    match state.phase {
        DomainPhase::Incoming => plan.act(Action::Abandon { pod: pod.name.clone(), uid: uid.clone() }),
        // It would wait for ever.
        DomainPhase::Undefined if migration.is_some_and(|m| m.uid == *uid && m.failed) => end(pod, 0, plan),
        _ => {}
    }
}
