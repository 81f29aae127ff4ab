use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::testing::Cluster;
use crate::{Change, Key, Kind, Name, Object};

fn cluster() -> Cluster {
    let mut cluster = Cluster::new();
    for node in ["node1", "node2", "node3"] {
        cluster.add_node(node);
    }
    cluster
}

/// Places a pod of this spec; returns its node or the message.
fn place(cluster: &mut Cluster, spec: Value) -> Result<String, String> {
    let name = Name::new("default", "pod");
    let mut value =
        json!({"metadata": {"name": "pod", "namespace": "default", "labels": {"app": "web"}}, "spec": spec});
    value["spec"]["containers"] = value["spec"].get("containers").cloned().unwrap_or_else(|| json!([]));
    cluster.put(Kind::Pod, value);
    cluster.step(&Key::Placement(name.clone()));
    let pod = cluster.get(Kind::Pod, &name).unwrap();
    match pod["spec"]["nodeName"].as_str() {
        Some(node) => Ok(node.to_owned()),
        None => {
            let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
            assert_eq!(conditions.len(), 1, "{pod}");
            assert_eq!(conditions[0]["reason"], "Unschedulable");
            let message = conditions[0]["message"].as_str().unwrap().to_owned();
            assert!(cluster.has_event("FailedScheduling", &message));
            assert!(!cluster.step(&Key::Placement(name)), "the same is not said twice");
            Err(message)
        }
    }
}

fn resident(cluster: &mut Cluster, name: &str, node: &str, rest: Value) {
    let mut value = json!({
        "metadata": {"name": name, "namespace": "default", "labels": {"app": "db"}},
        "spec": {"nodeName": node, "containers": []},
    });
    for (key, part) in rest.as_object().unwrap() {
        value["spec"][key] = part.clone();
    }
    cluster.put(Kind::Pod, value);
}

fn asking(cpu: &str, memory: &str) -> Value {
    json!([{"name": "c", "resources": {"requests": {"cpu": cpu, "memory": memory}}}])
}

#[test]
fn pods_go_where_least_is_asked_for() {
    let mut cluster = cluster();
    resident(&mut cluster, "a", "node1", json!({"containers": asking("2", "1Gi")}));
    resident(&mut cluster, "b", "node2", json!({"containers": asking("1", "1Gi")}));
    resident(&mut cluster, "c", "node3", json!({"containers": asking("3", "1Gi")}));
    assert_eq!(place(&mut cluster, json!({"containers": asking("1", "1Gi")})), Ok("node2".into()));
    assert!(cluster.has_event("Scheduled", "Successfully assigned default/pod to node2"));
}

#[test]
fn every_reason_has_kubernetes_words() {
    let mut cluster = cluster();
    cluster.patch(Kind::Node, &Name::cluster("node1"), json!({"spec": {"unschedulable": true}}));
    let taint = json!([{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]);
    cluster.patch(Kind::Node, &Name::cluster("node2"), json!({"spec": {"taints": taint}}));
    resident(&mut cluster, "big", "node3", json!({"containers": asking("4", "8Gi")}));
    assert_eq!(
        place(&mut cluster, json!({"containers": asking("1", "1Gi")})),
        Err("0/3 nodes are available: 1 Insufficient cpu, 1 Insufficient memory, 1 node(s) had untolerated taint \
             {gpu: yes}, 1 node(s) were unschedulable."
            .into())
    );
    let toleration = json!([{"key": "gpu", "operator": "Exists"}]);
    assert_eq!(
        place(&mut cluster, json!({"containers": asking("1", "1Gi"), "tolerations": toleration})),
        Ok("node2".into())
    );
}

#[test]
fn selectors_and_affinity_are_kept() {
    let mut cluster = cluster();
    assert_eq!(place(&mut cluster, json!({"nodeSelector": {"kubernetes.io/hostname": "node3"}})), Ok("node3".into()));
    let message = "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.";
    assert_eq!(place(&mut cluster, json!({"nodeSelector": {"zone": "moon"}})), Err(message.into()));
    let not_first = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["node1"]}]},
    ]}}});
    assert_eq!(place(&mut cluster, json!({"affinity": not_first})), Ok("node2".into()));
}

fn term(app: &str) -> Value {
    json!({"requiredDuringSchedulingIgnoredDuringExecution": [
        {"labelSelector": {"matchLabels": {"app": app}}, "topologyKey": "kubernetes.io/hostname"},
    ]})
}

#[test]
fn neighbours_are_sought_and_avoided() {
    let mut cluster = cluster();
    resident(&mut cluster, "db", "node1", json!({}));
    assert_eq!(place(&mut cluster, json!({"affinity": {"podAffinity": term("db")}})), Ok("node1".into()));
    assert_eq!(place(&mut cluster, json!({"affinity": {"podAntiAffinity": term("db")}})), Ok("node2".into()));
    let nobody = "0/3 nodes are available: 3 node(s) didn't match pod affinity rules.";
    assert_eq!(place(&mut cluster, json!({"affinity": {"podAffinity": term("cache")}})), Err(nobody.into()));
    // The first of its own kind may go anywhere.
    assert_eq!(place(&mut cluster, json!({"affinity": {"podAffinity": term("web")}})), Ok("node2".into()));
    // Who is there already may object as well; who has ended does not.
    for (name, node) in [("x", "node1"), ("y", "node2"), ("z", "node3")] {
        resident(&mut cluster, name, node, json!({"affinity": {"podAntiAffinity": term("web")}}));
    }
    let unwelcome = "0/3 nodes are available: 3 node(s) didn't satisfy existing pods anti-affinity rules.";
    assert_eq!(place(&mut cluster, json!({})), Err(unwelcome.into()));
    cluster.patch(Kind::Pod, &Name::new("default", "z"), json!({"status": {"phase": "Succeeded"}}));
    assert_eq!(place(&mut cluster, json!({})), Ok("node3".into()));
}

#[test]
fn missing_nodes_claims_and_readiness_are_said() {
    let mut empty = Cluster::new();
    assert_eq!(place(&mut empty, json!({})), Err("no nodes available to schedule pods".into()));
    let mut cluster = cluster();
    for node in ["node1", "node2", "node3"] {
        let unknown = json!([{"type": "Ready", "status": "Unknown"}]);
        cluster.patch(Kind::Node, &Name::cluster(node), json!({"status": {"conditions": unknown}}));
    }
    assert_eq!(place(&mut cluster, json!({})), Err("0/3 nodes are available: 3 node(s) were not ready.".into()));
    let volumes = json!([{"name": "v", "persistentVolumeClaim": {"claimName": "nope"}}]);
    let message = "0/3 nodes are available: persistentvolumeclaim \"nope\" not found.";
    assert_eq!(place(&mut cluster, json!({"volumes": volumes})), Err(message.into()));
}

#[test]
fn only_pods_that_ask_for_us_are_placed() {
    let mut cluster = cluster();
    for spec in [
        json!({"schedulerName": "other", "containers": []}),
        json!({"schedulingGates": [{"name": "wait"}], "containers": []}),
    ] {
        cluster.put(Kind::Pod, json!({"metadata": {"name": "pod", "namespace": "default"}, "spec": spec}));
        assert!(!cluster.step(&Key::Placement(Name::new("default", "pod"))));
    }
}

#[test]
fn a_silent_node_is_marked_and_welcomed_back() {
    let mut cluster = cluster();
    let lease = Name::new("kube-node-lease", "node1");
    let now = cluster.now;
    cluster.put(
        Kind::Lease,
        json!({
            "metadata": {"name": "node1", "namespace": "kube-node-lease"},
            "spec": {"leaseDurationSeconds": 40, "renewTime": format!("{now:.6}")},
        }),
    );
    let node = Name::cluster("node1");
    let key = Key::Node("node1".into());
    assert!(!cluster.step(&key));
    assert_eq!(cluster.decide(&key).wake_at.unwrap().duration_since(now).as_secs(), 40);
    cluster.pass(40);
    assert!(cluster.step(&key));
    let silent = cluster.get(Kind::Node, &node).unwrap();
    assert_eq!(silent["status"]["conditions"][0]["status"], "Unknown");
    assert_eq!(silent["spec"]["taints"].as_array().unwrap().len(), 2);
    assert!(!cluster.step(&key), "once is enough");
    // The kubelet is back: it renews its lease and says that it is ready.
    let again = cluster.now;
    cluster.patch(Kind::Lease, &lease, json!({"spec": {"renewTime": format!("{again:.6}")}}));
    cluster.patch(Kind::Node, &node, json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}}));
    cluster.step(&key);
    assert!(cluster.get(Kind::Node, &node).unwrap()["spec"].get("taints").is_none());
}

#[test]
fn a_renewal_of_a_node_that_lives_asks_for_no_decision() {
    let mut cluster = cluster();
    let lease = |at: Timestamp, seconds: i32| {
        let value = json!({
            "metadata": {"name": "node1", "namespace": "kube-node-lease"},
            "spec": {"leaseDurationSeconds": seconds, "renewTime": format!("{at:.6}")},
        });
        Object::from_value(Kind::Lease, value).unwrap()
    };
    let key = Key::Node("node1".into());
    let asked = |cluster: &Cluster, before: Option<Object>, after: Option<Object>| {
        Key::affected(&Change { before, after }, &cluster.world).contains(&key)
    };
    let begin = cluster.now;
    let first = lease(begin, 40);
    let renewed = lease(begin + SignedDuration::from_secs(13), 40);
    assert!(asked(&cluster, None, Some(first.clone())), "the first word of a node");
    assert!(!asked(&cluster, Some(first.clone()), Some(renewed.clone())), "it lives, and goes on living");
    assert!(asked(&cluster, Some(first.clone()), Some(lease(begin, 20))), "silent earlier than it was");
    assert!(!asked(&cluster, Some(renewed.clone()), Some(first.clone())), "its clock was set back, and it lives");
    assert!(asked(&cluster, Some(renewed.clone()), None));

    // The decision before the renewal has asked to be woken; the one after the wake-up asks for the rest of the time.
    cluster.put(Kind::Lease, first.to_value().unwrap());
    assert_eq!(cluster.decide(&key).wake_at, Some(begin + SignedDuration::from_secs(40)));
    let name = Name::new("kube-node-lease", "node1");
    cluster.pass(13);
    cluster.patch(Kind::Lease, &name, json!({"spec": renewed.to_value().unwrap()["spec"]}));
    cluster.pass(27);
    assert!(!cluster.step(&key));
    assert_eq!(cluster.decide(&key).wake_at, Some(begin + SignedDuration::from_secs(53)));
    cluster.pass(13);
    assert!(cluster.step(&key), "silent at last");
    let last = lease(cluster.now, 40);
    assert!(asked(&cluster, Some(renewed), Some(last)), "one that was found silent is welcomed back at once");
}

#[test]
fn a_node_without_a_handler_takes_no_vms() {
    let mut cluster = cluster();
    let node = Name::cluster("node1");
    let now = cluster.now.to_string();
    cluster.patch(Kind::Node, &node, json!({"metadata": {"annotations": {"kubevirt.io/heartbeat": now}}}));
    cluster.pass(299);
    assert!(!cluster.step(&Key::Node("node1".into())));
    cluster.pass(1);
    assert!(cluster.step(&Key::Node("node1".into())));
    assert_eq!(cluster.get(Kind::Node, &node).unwrap()["metadata"]["labels"]["kubevirt.io/schedulable"], "false");
    assert!(cluster.has_event("NodeUnresponsive", "virt-handler is not responsive"));
}
