//! Status of PodDisruptionBudgets: how many pods they count and how many of them may go now. What Kubernetes' disruption
//! controller does; only where there is no kube-controller-manager.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::object::{Name, Stored, labels};
use crate::plan::{Plan, View, later};
use crate::world::{Change, World};
use crate::{placement, selector};

/// So long after an eviction was granted the pod counts as going, though nobody has seen it go (Kubernetes': 2 minutes).
const GRANTED_FOR: SignedDuration = SignedDuration::from_mins(2);

/// The budgets that a change may touch.
pub fn affected(change: &Change, world: &World) -> Vec<Name> {
    use crate::object::Object;
    match change.latest() {
        Some(Object::PodDisruptionBudget(budget)) => vec![budget.key()],
        Some(Object::Pod(pod)) => world.budgets.within(pod.namespace()).map(|budget| budget.key()).collect(),
        _ => Vec::new(),
    }
}

/// Decides about one budget.
pub fn decide(name: &Name, view: &View<'_>) -> Plan {
    let mut plan = Plan::nothing();
    let Some(budget) = view.world.budgets.get(name).filter(|budget| !budget.deleting()) else { return plan };
    let Some(spec) = &budget.spec else { return plan };
    let Some(wanted) = &spec.selector else { return plan };
    let mut after = PodDisruptionBudget::clone(budget);
    let status = after.status.get_or_insert_default();
    let counted: Vec<_> = view
        .world
        .pods
        .within(budget.namespace())
        .filter(|pod| selector::matches(wanted, labels(&pod.metadata)) && !placement::is_finished(pod))
        .collect();
    // What was granted and has not been seen to go yet.
    let mut granted = status.disrupted_pods.take().unwrap_or_default();
    granted.retain(|name, since| {
        let until = later(since.0, GRANTED_FOR);
        let stays = counted.iter().any(|pod| pod.name() == name && !pod.deleting()) && view.now < until;
        if stays {
            plan.wake(until);
        }
        stays
    });
    let is_healthy = |pod: &&&std::sync::Arc<Pod>| is_ready(pod) && !granted.contains_key(pod.name());
    let (expected, healthy) = (counted.len(), counted.iter().filter(is_healthy).count());
    let share = |value: &IntOrString| share(value, expected);
    let least = spec.min_available.as_ref().and_then(share);
    let most = spec.max_unavailable.as_ref().and_then(share);
    let desired = least.or_else(|| most.map(|most| expected.saturating_sub(most))).unwrap_or(0);
    let count = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
    let allowed = healthy.saturating_sub(desired);
    *status = PodDisruptionBudgetStatus {
        conditions: Some(vec![condition(status.conditions.as_deref(), allowed > 0, budget, view.now)]),
        current_healthy: count(healthy),
        desired_healthy: count(desired),
        disrupted_pods: (!granted.is_empty()).then_some(granted),
        disruptions_allowed: count(allowed),
        expected_pods: count(expected),
        observed_generation: budget.metadata.generation,
    };
    plan.update(budget.as_ref(), &after);
    plan
}

fn condition(before: Option<&[Condition]>, allows: bool, budget: &PodDisruptionBudget, now: Timestamp) -> Condition {
    let (status, reason) = if allows { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
    let same = before.unwrap_or_default().iter().find(|one| one.type_ == "DisruptionAllowed" && one.status == status);
    Condition {
        type_: "DisruptionAllowed".to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: String::new(),
        last_transition_time: same.map_or(Time(now), |one| one.last_transition_time.clone()),
        observed_generation: budget.metadata.generation,
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    !pod.deleting()
        && conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// A number of pods, or a share of all (rounded up).
fn share(value: &IntOrString, of: usize) -> Option<usize> {
    match value {
        IntOrString::Int(count) => usize::try_from(*count).ok(),
        IntOrString::String(text) => {
            let percent: usize = text.strip_suffix('%')?.parse().ok()?;
            Some(percent.checked_mul(of)?.div_ceil(100))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::Cluster;
    use crate::{Key, Kind};

    fn pod(cluster: &mut Cluster, name: &str, ready: bool) {
        let status = if ready { "True" } else { "False" };
        cluster.put(
            Kind::Pod,
            json!({
                "metadata": {"namespace": "default", "name": name, "uid": name, "labels": {"app": "web"}},
                "spec": {"containers": [], "nodeName": "node1"},
                "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": status}]},
            }),
        );
    }

    fn settle(cluster: &mut Cluster) -> Value {
        let name = Name::new("default", "web");
        let plan = cluster.decide(&Key::Budget(name.clone()));
        cluster.carry_out(plan);
        assert!(cluster.decide(&Key::Budget(name.clone())).effects.is_empty(), "once is enough");
        cluster.get(Kind::PodDisruptionBudget, &name).unwrap()["status"].clone()
    }

    #[test]
    fn pods_are_counted_by_what_the_budget_asks_for() {
        for (spec, counts) in [
            (json!({"minAvailable": 2}), [3, 2, 2, 0]),
            (json!({"minAvailable": "50%"}), [3, 2, 2, 0]),
            (json!({"maxUnavailable": 1}), [3, 2, 2, 0]),
            (json!({"maxUnavailable": 2}), [3, 2, 1, 1]),
            (json!({"maxUnavailable": "100%"}), [3, 2, 0, 2]),
        ] {
            let mut cluster = Cluster::new();
            for (name, ready) in [("a", true), ("b", true), ("c", false)] {
                pod(&mut cluster, name, ready);
            }
            let mut spec = spec;
            spec["selector"] = json!({"matchLabels": {"app": "web"}});
            let meta = json!({"namespace": "default", "name": "web", "generation": 3});
            cluster.put(Kind::PodDisruptionBudget, json!({"metadata": meta, "spec": spec}));
            let status = settle(&mut cluster);
            let of = |field: &str| status[field].as_i64().unwrap();
            let found = ["expectedPods", "currentHealthy", "desiredHealthy", "disruptionsAllowed"].map(of);
            assert_eq!((found, of("observedGeneration")), (counts, 3), "{spec}");
            let told = if counts[3] > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
            let condition = &status["conditions"][0];
            assert_eq!((condition["status"].as_str(), condition["reason"].as_str()), (Some(told.0), Some(told.1)));
        }
    }

    #[test]
    fn a_pod_whose_eviction_was_granted_counts_as_going_until_it_has_gone_or_stayed() {
        let mut cluster = Cluster::new();
        pod(&mut cluster, "a", true);
        pod(&mut cluster, "b", true);
        let spec = json!({"minAvailable": 1, "selector": {"matchLabels": {"app": "web"}}});
        let meta = json!({"namespace": "default", "name": "web", "generation": 1});
        let status = json!({"disruptedPods": {"a": cluster.now.to_string(), "gone": cluster.now.to_string()},
            "currentHealthy": 2, "desiredHealthy": 1, "disruptionsAllowed": 0, "expectedPods": 2});
        cluster.put(Kind::PodDisruptionBudget, json!({"metadata": meta, "spec": spec, "status": status}));
        let status = settle(&mut cluster);
        assert_eq!((&status["disruptionsAllowed"], &status["currentHealthy"]), (&json!(0), &json!(1)));
        assert!(status["disruptedPods"]["a"].is_string() && status["disruptedPods"]["gone"].is_null(), "{status}");
        let woken = cluster.decide(&Key::Budget(Name::new("default", "web"))).wake_at;
        assert_eq!(woken, Some(cluster.now + GRANTED_FOR));
        cluster.pass(120);
        let status = settle(&mut cluster);
        assert_eq!((&status["disruptionsAllowed"], &status["disruptedPods"]), (&json!(1), &Value::Null));
    }
}
