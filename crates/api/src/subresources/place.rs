//! Where a guest is.

use k8s_openapi::api::core::v1::Pod;

use crate::VirtualMachineInstance;
use crate::names::LABEL_CREATED_BY;

/// A launcher pod and its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node.
    pub node: String,
    /// The pod's uid.
    pub pod_uid: String,
}

/// The pod that holds the guest of a VMI, out of the pods of its namespace. While it moves, that is the source's until the
/// target's handler has written down that it has arrived.
pub fn of_guest<'a>(vmi: &VirtualMachineInstance, pods: impl IntoIterator<Item = &'a Pod>) -> Option<Place> {
    let node = vmi.status.node_name.as_deref().filter(|node| !node.is_empty())?;
    let state = vmi.status.migration_state.as_ref();
    let named = state.and_then(|state| {
        let failed = state.failed == Some(true) || !vmi.has_arrived();
        let pod = if failed { &state.source_pod } else { &state.target_pod };
        pod.as_deref().filter(|pod| !pod.is_empty())
    });
    let mine: Vec<&Pod> = launchers(vmi, pods).collect();
    let by_name = mine.iter().find(|pod| named.is_some() && pod.metadata.name.as_deref() == named);
    let mut here = mine.iter().filter(|pod| node_of(pod) == Some(node) && !is_over(pod));
    let pod = by_name.or_else(|| here.next())?;
    Some(Place { node: node_of(pod)?.to_owned(), pod_uid: pod.metadata.uid.clone()? })
}

/// Where the guest goes, or has gone, when it has left this pod.
pub fn after<'a>(vmi: &VirtualMachineInstance, left: &str, pods: impl IntoIterator<Item = &'a Pod>) -> Option<Place> {
    let state = vmi.status.migration_state.as_ref()?;
    let target = state.target_pod.as_deref().filter(|pod| !pod.is_empty())?;
    let pod = launchers(vmi, pods).find(|pod| pod.metadata.name.as_deref() == Some(target))?;
    let place = Place { node: node_of(pod)?.to_owned(), pod_uid: pod.metadata.uid.clone()? };
    (place.pod_uid != left && state.failed != Some(true)).then_some(place)
}

fn launchers<'a>(
    vmi: &VirtualMachineInstance,
    pods: impl IntoIterator<Item = &'a Pod>,
) -> impl Iterator<Item = &'a Pod> {
    let uid = vmi.metadata.uid.clone().unwrap_or_default();
    pods.into_iter().filter(move |pod| {
        let labels = pod.metadata.labels.as_ref();
        labels.and_then(|labels| labels.get(LABEL_CREATED_BY)).is_some_and(|made_for| *made_for == uid)
    })
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|node| !node.is_empty())
}

fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(name: &str, node: &str, phase: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "uid": format!("uid-{name}"), "labels": {"kubevirt.io/created-by": "uid-vmi"}},
            "spec": {"containers": [], "nodeName": node}, "status": {"phase": phase},
        }))
        .unwrap()
    }

    fn vmi(node: &str, state: Value) -> VirtualMachineInstance {
        let status = json!({"phase": "Running", "nodeName": node, "migrationState": state});
        serde_json::from_value(json!({"metadata": {"name": "vmi", "uid": "uid-vmi"}, "spec": {}, "status": status}))
            .unwrap()
    }

    #[test]
    fn a_guest_is_at_its_source_until_it_has_arrived() {
        let pods = [pod("old", "node1", "Succeeded"), pod("one", "node1", "Running"), pod("two", "node2", "Running")];
        let at = |vmi: &VirtualMachineInstance| of_guest(vmi, &pods).map(|place| (place.node, place.pod_uid));
        let is = |node: &str, pod: &str| Some((node.to_owned(), format!("uid-{pod}")));
        assert_eq!(at(&vmi("node1", Value::Null)), is("node1", "one"));
        assert_eq!(at(&vmi("", Value::Null)), None);
        let mut moving = json!({"sourcePod": "one", "targetPod": "two", "sourceNode": "node1", "targetNode": "node2"});
        assert_eq!(at(&vmi("node1", moving.clone())), is("node1", "one"));
        assert_eq!(after(&vmi("node1", moving.clone()), "uid-one", &pods).unwrap().pod_uid, "uid-two");
        assert_eq!(after(&vmi("node1", moving.clone()), "uid-two", &pods), None);
        assert_eq!(at(&vmi("node2", moving.clone())), is("node2", "two"));
        moving["failed"] = json!(true);
        assert_eq!(at(&vmi("node1", moving.clone())), is("node1", "one"));
        assert_eq!(after(&vmi("node1", moving), "uid-one", &pods), None);
        assert_eq!(after(&vmi("node1", Value::Null), "uid-one", &pods), None);
    }
}
