//! NodeMaintenance on its way in: the reference's rules (`reference/maintenance-hypershift.md`, 1.6).

use jiff::Timestamp;
use serde_json::Value;

use super::{Denial, Lookup, Operation, Request, Verdict, read};
use crate::maintenance::{GROUP_MEDIK8S, GROUPS, medik8s::NodeMaintenance};

const WEBHOOK: &str = "vnodemaintenance.kb.io";

pub(super) fn validate(request: &Request<'_>) -> Verdict {
    let Some(object) = request.object else { return Ok(Vec::new()) };
    let maintenance: NodeMaintenance = read(WEBHOOK, object)?;
    let refuse = |message: String| Err(Box::new(Denial::forbidden(WEBHOOK, message)));
    let node = &maintenance.spec.node_name;
    let dry = |value: &Value| value.pointer("/spec/dryRun").and_then(Value::as_bool).unwrap_or(false);
    let node_of =
        |value: &Value| value.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default().to_owned();
    let old = request.old_object.filter(|_| request.operation == Operation::Update);
    match old {
        Some(old) if node_of(old) != *node => return refuse("updating spec.NodeName isn't allowed".to_owned()),
        Some(old) if dry(object) && !dry(old) => {
            return refuse("a maintenance that has begun cannot become a dry run, delete it instead".to_owned());
        }
        Some(_) => {}
        None if request.lookup.get("Node", "", node).is_none() => {
            return refuse(format!("invalid nodeName, no node with name {node} found"));
        }
        None => {}
    }
    if !dry(object) && old.is_none_or(dry) {
        let own = |other: &Value| other.pointer("/metadata/uid") == object.pointer("/metadata/uid");
        let there = GROUPS.iter().any(|(group, _)| {
            let all = request.lookup.list(&format!("NodeMaintenance.{group}"), "", None);
            all.iter().any(|other| node_of(other) == *node && !dry(other) && !own(other))
        });
        if there {
            return refuse(format!("invalid nodeName, a NodeMaintenance for node {node} already exists"));
        }
    }
    if !dry(object)
        && old.is_none_or(dry)
        && let Some(text) = quorum(node, request.group == GROUP_MEDIK8S, request.lookup)
    {
        return refuse(text);
    }
    if let Err(wrong) = maintenance.spec.deadline_of(Timestamp::UNIX_EPOCH) {
        return refuse(format!("invalid deadline, {wrong}"));
    }
    Ok(Vec::new())
}

/// Labels of the nodes that etcd runs on.
const CONTROL_PLANE: [&str; 2] = ["node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master"];
/// Where OpenShift's etcd runs.
const ETCD: &str = "openshift-etcd";
/// The budgets that guard etcd's quorum: since OpenShift 4.11, and before.
const GUARDS: [&str; 2] = ["etcd-guard-pdb", "etcd-quorum-guard"];

/// Why a node of an OpenShift control plane cannot be taken away now: the others would be too few for etcd. Elsewhere, and without
/// a guard, nothing is said. The text is that of the operator of the group.
fn quorum(node: &str, medik8s: bool, lookup: &dyn Lookup) -> Option<String> {
    let labels = lookup.get("Node", "", node)?.pointer("/metadata/labels")?.clone();
    CONTROL_PLANE.iter().find(|key| labels.get(**key).is_some())?;
    // The one of every OpenShift.
    lookup.get("ClusterVersion", "", "version")?;
    let guard = GUARDS.iter().find_map(|name| lookup.get("PodDisruptionBudget", ETCD, name))?;
    if guard.pointer("/status/disruptionsAllowed").and_then(Value::as_i64).unwrap_or(0) > 0 {
        return None;
    }
    if !medik8s {
        let text = "can not put master node into maintenance at this moment, it would violate the master quorum";
        return Some(text.to_owned());
    }
    // A node whose guard is not ready is none of the quorum's already.
    let selected = guard.pointer("/spec/selector/matchLabels").and_then(Value::as_object);
    let pods = lookup.list("Pod", ETCD, None);
    let guards = pods.iter().filter(|pod| {
        let label = |key: &str| pod.pointer("/metadata/labels").and_then(|labels| labels.get(key));
        pod.pointer("/spec/nodeName").and_then(Value::as_str) == Some(node)
            && selected.is_some_and(|wanted| wanted.iter().all(|(key, value)| label(key) == Some(value)))
    });
    let ready = |pod: &Value| {
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
        let mut ready = conditions.into_iter().flatten().filter(|condition| condition["type"] == "Ready");
        ready.any(|condition| condition["status"] == "True" || condition["status"] == "Unknown")
    };
    guards.into_iter().any(ready).then(|| {
        format!(
            "can not put master/control-plane node into maintenance at this moment, disrupting node {node} will violate \
             etcd quorum"
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::testing::World;

    /// An OpenShift with a node of its control plane, what its guard allows, and whether the node's own guard is ready.
    fn openshift(allowed: i64, ready: Option<&str>) -> Vec<Value> {
        let conditions = json!([{"type": "Ready", "status": ready}]);
        let mut objects = vec![
            json!({"kind": "Node", "metadata": {"name": "master0", "labels": {"node-role.kubernetes.io/master": ""}}}),
            json!({"kind": "Node", "metadata": {"name": "worker0", "labels": {}}}),
            json!({"kind": "ClusterVersion", "metadata": {"name": "version"}}),
            json!({
                "kind": "PodDisruptionBudget", "metadata": {"namespace": ETCD, "name": "etcd-guard-pdb"},
                "spec": {"selector": {"matchLabels": {"app": "guard"}}}, "status": {"disruptionsAllowed": allowed},
            }),
            json!({
                "kind": "Pod", "metadata": {"namespace": ETCD, "name": "etcd-master0", "labels": {"app": "etcd"}},
                "spec": {"nodeName": "master0"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            }),
        ];
        if ready.is_some() {
            objects.push(json!({
                "kind": "Pod", "metadata": {"namespace": ETCD, "name": "etcd-guard-master0", "labels": {"app": "guard"}},
                "spec": {"nodeName": "master0"}, "status": {"conditions": conditions},
            }));
        }
        objects
    }

    #[test]
    fn a_node_that_etcd_cannot_do_without_is_kept() {
        let medik8s = "can not put master/control-plane node into maintenance at this moment, disrupting node master0 will \
                       violate etcd quorum";
        let before = "can not put master node into maintenance at this moment, it would violate the master quorum";
        let says = |objects: Vec<Value>, node: &str, medik8s| quorum(node, medik8s, &World::new(objects));
        for (allowed, ready, of_medik8s, of_others) in [
            (0, Some("True"), Some(medik8s), Some(before)),
            (0, Some("Unknown"), Some(medik8s), Some(before)),
            (0, Some("False"), None, Some(before)),
            (0, None, None, Some(before)),
            (1, Some("True"), None, None),
        ] {
            let said = |medik8s| says(openshift(allowed, ready), "master0", medik8s);
            assert_eq!((said(true).as_deref(), said(false).as_deref()), (of_medik8s, of_others), "{allowed} {ready:?}");
        }
        assert_eq!(says(openshift(0, Some("True")), "worker0", true), None);
        for missing in ["ClusterVersion", "PodDisruptionBudget"] {
            let mut objects = openshift(0, Some("True"));
            objects.retain(|object| object["kind"] != missing);
            assert_eq!(says(objects.clone(), "master0", true), None, "{missing}");
            assert_eq!(says(objects, "master0", false), None, "{missing}");
        }
    }
}
