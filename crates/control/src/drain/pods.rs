//! What becomes of pods that are no VM's, by the rules of `kubectl drain` and of the Eviction API.

use std::collections::BTreeMap;

use godwit_api::drain::{DrainPod, PodOutcome};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;

use super::Manner;
use crate::object::{Name, Stored, labels};
use crate::selector;

/// Pods that the kubelet makes from files of its own.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// What PodDisruptionBudgets still allow, as evictions use them up.
pub struct Budgets<'a> {
    budgets: Option<&'a [PodDisruptionBudget]>,
    used: BTreeMap<Name, i32>,
}

/// What the budgets say to one more eviction.
pub enum Say {
    /// The pod may go.
    Goes,
    /// The pod may go when those that went before are healthy elsewhere; the sentence says which budget.
    Later(String),
    /// It may not; the sentence says why.
    Never(String),
}

impl<'a> Budgets<'a> {
    pub fn new(budgets: Option<&'a [PodDisruptionBudget]>) -> Self {
        Self { budgets, used: BTreeMap::new() }
    }

    /// Asks for the eviction of a pod.
    pub fn ask(&mut self, pod: &Pod) -> Say {
        // What does not run is evicted whatever the budgets say.
        if pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Pending") {
            return Say::Goes;
        }
        let mut meant = self.budgets.unwrap_or_default().iter().filter(|budget| {
            let wanted = budget.spec.as_ref().and_then(|spec| spec.selector.as_ref());
            budget.metadata.namespace == pod.metadata.namespace
                && wanted.is_some_and(|wanted| selector::matches(wanted, labels(&pod.metadata)))
        });
        let Some(budget) = meant.next() else { return Say::Goes };
        let name = Name::of(&budget.metadata);
        if let Some(other) = meant.next() {
            let other = Name::of(&other.metadata);
            return Say::Never(format!(
                "it has more than one PodDisruptionBudget ({name} and {other}), with which no pod can be evicted; leave it one"
            ));
        }
        let status = budget.status.as_ref();
        if !is_ready(pod) && healthy_without(budget) {
            return Say::Goes;
        }
        let allowed = status.map_or(0, |status| status.disruptions_allowed);
        let used = self.used.entry(name.clone()).or_default();
        *used = used.saturating_add(1);
        if *used <= allowed {
            return Say::Goes;
        }
        let (healthy, desired) = status.map_or((0, 0), |status| (status.current_healthy, status.desired_healthy));
        let says = format!("PodDisruptionBudget {name} needs {desired} healthy pods and has {healthy}");
        if allowed > 0 { Say::Later(says) } else { Say::Never(says) }
    }
}

/// Whether pods that are not ready may go: the budget is met without them, or says that they always may.
fn healthy_without(budget: &PodDisruptionBudget) -> bool {
    let policy = budget.spec.as_ref().and_then(|spec| spec.unhealthy_pod_eviction_policy.as_deref());
    let met = budget
        .status
        .as_ref()
        .is_some_and(|status| status.desired_healthy > 0 && status.current_healthy >= status.desired_healthy);
    policy == Some("AlwaysAllow") || met
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Says what becomes of a pod.
pub fn verdict(pod: &Pod, node: &str, manner: Manner, budgets: &mut Budgets<'_>) -> DrainPod {
    let (outcome, reasons) = match manner.of_pod(pod) {
        (PodOutcome::Evict, reasons) if !pod.deleting() => match budgets.ask(pod) {
            Say::Goes => (PodOutcome::Evict, reasons),
            Say::Later(why) => (PodOutcome::Wait, vec![why]),
            Say::Never(why) => (PodOutcome::Block, vec![why]),
        },
        (outcome, reasons) => (outcome, reasons),
    };
    DrainPod {
        namespace: pod.namespace().to_owned(),
        name: pod.name().to_owned(),
        node: node.to_owned(),
        outcome: Some(outcome),
        reasons,
    }
}

impl Manner {
    /// What becomes of a pod that is no VM's, and why, whatever the budgets say.
    pub fn of_pod(self, pod: &Pod) -> (PodOutcome, Vec<String>) {
        let owner = pod.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
        let daemon = owner.is_some_and(|owner| owner.kind == "DaemonSet");
        if pod.annotation(MIRROR).is_some() {
            return (PodOutcome::Ignore, vec!["it is made from a file on the node".to_owned()]);
        }
        if daemon && self.ignore_daemon_sets {
            return (PodOutcome::Ignore, vec!["it is of a DaemonSet".to_owned()]);
        }
        if pod.deleting() {
            return (PodOutcome::Evict, vec!["it is being deleted already".to_owned()]);
        }
        let mut against = Vec::new();
        if daemon {
            against.push("it is of a DaemonSet, which would make it again; use --ignore-daemonsets".to_owned());
        }
        let mut lost = Vec::new();
        if owner.is_none() {
            match self.force {
                true => lost.push("nobody makes it again elsewhere".to_owned()),
                false => {
                    against.push("nobody makes it again elsewhere; use --force to let it go all the same".to_owned());
                }
            }
        }
        if has_empty_dir(pod) {
            match self.delete_empty_dir_data {
                true => lost.push("its emptyDir is lost with it".to_owned()),
                false => against.push(
                    "its emptyDir is lost with it; use --delete-emptydir-data to let it go all the same".to_owned(),
                ),
            }
        }
        if against.is_empty() { (PodOutcome::Evict, lost) } else { (PodOutcome::Block, against) }
    }
}

fn has_empty_dir(pod: &Pod) -> bool {
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
    volumes.into_iter().flatten().any(|volume| volume.empty_dir.is_some())
}
