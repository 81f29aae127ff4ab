//! Where a guest is.

use k8s_openapi::api::core::v1::Pod;

use crate::VirtualMachineInstance;
use crate::names::{LABEL_CREATED_BY, launcher_pod};

/// A launcher pod and its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node.
    pub node: String,
    /// The pod's uid.
    pub pod_uid: String,
}

/// The name of the pod that holds the guest, or shall hold it: the target pod of the last migration when the VMI says that it
/// lives on the target node, else the pod it came from, else the pod that it started in. The VMI says it, and its UID: what
/// labels a pod carries is for everybody to choose who may make pods.
pub fn pod_name(vmi: &VirtualMachineInstance) -> String {
    let node = vmi.status.node_name.as_deref().filter(|node| !node.is_empty());
    if let (Some(state), Some(_)) = (&vmi.status.migration_state, node) {
        // The target's handler alone writes that it is there, and only when the guest runs there.
        let known = if vmi.has_arrived() { &state.target_pod } else { &state.source_pod };
        if let Some(name) = known.as_ref().filter(|name| !name.is_empty()) {
            return name.clone();
        }
    }
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    launcher_pod(&text(&vmi.metadata.name), &text(&vmi.metadata.uid))
}

/// The pod that holds the guest of a VMI; `pod` finds one of its namespace by name. While it moves, that is the source's until
/// the target's handler has written down that it has arrived.
pub fn of_guest(vmi: &VirtualMachineInstance, pod: impl Fn(&str) -> Option<Pod>) -> Option<Place> {
    vmi.status.node_name.as_deref().filter(|node| !node.is_empty())?;
    launcher(vmi, pod(&pod_name(vmi))?)
}

/// Where the guest goes, or has gone, when it has left the pod of this UID.
pub fn after(vmi: &VirtualMachineInstance, left: &str, pod: impl Fn(&str) -> Option<Pod>) -> Option<Place> {
    let state = vmi.status.migration_state.as_ref()?;
    let target = state.target_pod.as_deref().filter(|pod| !pod.is_empty())?;
    let place = launcher(vmi, pod(target)?)?;
    (place.pod_uid != left && state.failed != Some(true)).then_some(place)
}

fn launcher(vmi: &VirtualMachineInstance, pod: Pod) -> Option<Place> {
    let made_for = pod.metadata.labels.as_ref()?.get(LABEL_CREATED_BY)?;
    if vmi.metadata.uid.as_ref() != Some(made_for) {
        return None;
    }
    let node = pod.spec?.node_name.filter(|node| !node.is_empty())?;
    Some(Place { node, pod_uid: pod.metadata.uid? })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(name: &str, node: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "uid": format!("uid-{name}"), "labels": {"kubevirt.io/created-by": "uid-vmi"}},
            "spec": {"containers": [], "nodeName": node}, "status": {"phase": "Running"},
        }))
        .unwrap()
    }

    fn vmi(node: &str, state: Value) -> VirtualMachineInstance {
        let status = json!({"phase": "Running", "nodeName": node, "migrationState": state});
        serde_json::from_value(json!({"metadata": {"name": "vmi", "uid": "uid-vmi"}, "spec": {}, "status": status}))
            .unwrap()
    }

    fn by_name(pods: &[Pod]) -> impl Fn(&str) -> Option<Pod> {
        |name| pods.iter().find(|pod| pod.metadata.name.as_deref() == Some(name)).cloned()
    }

    #[test]
    fn a_guest_is_at_its_source_until_it_has_arrived() {
        let first = launcher_pod("vmi", "uid-vmi");
        let pods = [pod(&first, "node1"), pod("one", "node1"), pod("two", "node2")];
        let at = |vmi: &VirtualMachineInstance| of_guest(vmi, by_name(&pods)).map(|place| (place.node, place.pod_uid));
        let is = |node: &str, pod: &str| Some((node.to_owned(), format!("uid-{pod}")));
        let next = |vmi: &VirtualMachineInstance, left: &str| after(vmi, left, by_name(&pods));
        assert_eq!(at(&vmi("node1", Value::Null)), is("node1", &first));
        assert_eq!(at(&vmi("", Value::Null)), None);
        let mut moving = json!({"sourcePod": "one", "targetPod": "two", "sourceNode": "node1", "targetNode": "node2"});
        assert_eq!(at(&vmi("node1", moving.clone())), is("node1", "one"));
        assert_eq!(next(&vmi("node1", moving.clone()), "uid-one").unwrap().pod_uid, "uid-two");
        assert_eq!(next(&vmi("node1", moving.clone()), "uid-two"), None);
        assert_eq!(at(&vmi("node2", moving.clone())), is("node2", "two"));
        moving["failed"] = json!(true);
        assert_eq!(at(&vmi("node1", moving.clone())), is("node1", "one"));
        assert_eq!(next(&vmi("node1", moving), "uid-one"), None);
        assert_eq!(next(&vmi("node1", Value::Null), "uid-one"), None);
    }

    #[test]
    fn a_pod_is_no_launcher_for_saying_so() {
        let first = launcher_pod("vmi", "uid-vmi");
        // By name it would come first.
        let strangers = [pod("a-stranger", "node1")];
        assert_eq!(of_guest(&vmi("node1", Value::Null), by_name(&strangers)), None);
        let pods = [pod("a-stranger", "node1"), pod(&first, "node1")];
        let place = of_guest(&vmi("node1", Value::Null), by_name(&pods)).unwrap();
        assert_eq!(place.pod_uid, format!("uid-{first}"));
        // Another VMI's pod is not this one's.
        let mut other = pod(&first, "node1");
        other.metadata.labels = None;
        assert_eq!(of_guest(&vmi("node1", Value::Null), by_name(&[other])), None);
    }
}
