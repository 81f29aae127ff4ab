use std::sync::Arc;
use std::time::Duration;

use godwit_api::drain::{DrainOutcome, DrainPlan, DrainVm};
use godwit_control::Name;
use godwit_control::drain::Manner;
use serde_json::{Value, json};

use crate::course::{ASK_AGAIN, Answer, Course, Standing};
use crate::watch::Facts;

fn name(name: &str) -> Name {
    Name::new("default", name)
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value).unwrap())
}

/// A guest on node1, with its pod.
fn guest(facts: &mut Facts, vmi: &str) {
    put(facts, vmi, json!({"phase": "Running", "nodeName": "node1"}), "1");
    let pod = read(json!({
        "metadata": {
            "name": format!("virt-launcher-{vmi}"), "namespace": "default", "uid": format!("pod-{vmi}"),
            "labels": {"kubevirt.io": "virt-launcher"}, "annotations": {"kubevirt.io/domain": vmi},
        },
        "spec": {"nodeName": "node1", "containers": []},
        "status": {"phase": "Running"},
    }));
    facts.pods.insert(name(&format!("virt-launcher-{vmi}")), pod);
}

fn put(facts: &mut Facts, vmi: &str, status: Value, revision: &str) {
    let value = json!({
        "metadata": {"name": vmi, "namespace": "default", "uid": vmi, "resourceVersion": revision}, "spec": {}, "status": status,
    });
    facts.vmis.insert(name(vmi), read(value));
}

fn course(vms: &[(&str, DrainOutcome)], window: usize) -> Course {
    let vms = vms.iter().map(|(vmi, outcome)| DrainVm {
        namespace: "default".into(),
        name: (*vmi).into(),
        node: "node1".into(),
        outcome: Some(outcome.clone()),
        ..DrainVm::default()
    });
    let plan = DrainPlan { nodes: vec!["node1".into()], vms: vms.collect(), ..DrainPlan::default() };
    Course::new(&plan, Manner::default(), window)
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn asked(course: &mut Course, seconds: u64, facts: &Facts) -> Vec<String> {
    let next = course.next(at(seconds), facts);
    next.evict.into_iter().map(|(pod, _)| pod.name.trim_start_matches("virt-launcher-").to_owned()).collect()
}

#[test]
fn no_more_are_asked_for_than_may_be_on_their_way() {
    let mut facts = Facts::default();
    for vmi in ["a", "b", "c", "ends", "external"] {
        guest(&mut facts, vmi);
    }
    use DrainOutcome::{External, Migrate, ShutDown};
    let plan = [("b", Migrate), ("a", Migrate), ("c", Migrate), ("ends", ShutDown), ("external", External)];
    let mut course = course(&plan, 2);
    let first = asked(&mut course, 0, &facts);
    assert_eq!(
        first,
        ["b", "a", "ends", "external"],
        "in the order of the plan, and who takes no place in the line at once"
    );
    assert_eq!(asked(&mut course, 0, &facts), [""; 0], "nobody is asked twice at the same time");
    for vmi in ["a", "b", "external"] {
        course.answered(&name(&format!("virt-launcher-{vmi}")), Answer::Refused("triggered".into()), at(0), &facts);
        put(&mut facts, vmi, json!({"phase": "Running", "nodeName": "node1", "evacuationNodeName": "node1"}), "2");
    }
    assert_eq!(asked(&mut course, 60, &facts), [""; 0], "who is marked is not asked again, and holds its place");
    // One has arrived: it is not shut down with the pod that it was in, of which nobody asks anything more.
    put(&mut facts, "a", json!({"phase": "Running", "nodeName": "node2"}), "3");
    assert_eq!(course.standing(&name("a"), &facts), Standing::Arrived("node2".into()));
    assert_eq!(asked(&mut course, 60, &facts), ["c"], "it has its place no more");
    assert_eq!(course.next(at(60), &facts).left, 5, "the node is not empty yet");
    // One has left: its pod is over.
    facts.pods.remove(&name("virt-launcher-a"));
    assert_eq!(asked(&mut course, 60, &facts), [""; 0]);
    assert_eq!(course.standing(&name("a"), &facts), Standing::Left(Some("node2".into()), None));
}

#[test]
fn who_is_refused_is_asked_again_after_a_while_or_when_something_changes() {
    let mut facts = Facts::default();
    guest(&mut facts, "a");
    let mut course = course(&[("a", DrainOutcome::Migrate)], 1);
    assert_eq!(asked(&mut course, 0, &facts), ["a"]);
    course.answered(&name("virt-launcher-a"), Answer::Refused("budget".into()), at(0), &facts);
    assert_eq!(asked(&mut course, 1, &facts), [""; 0]);
    put(&mut facts, "a", json!({"phase": "Running", "nodeName": "node1"}), "2");
    assert_eq!(asked(&mut course, 1, &facts), ["a"], "the VMI has changed");
    course.answered(&name("virt-launcher-a"), Answer::Refused("budget".into()), at(1), &facts);
    assert_eq!(asked(&mut course, 1, &facts), [""; 0]);
    assert_eq!(asked(&mut course, 1 + ASK_AGAIN.as_secs(), &facts), ["a"], "some time has passed");
}

#[test]
fn it_ends_when_only_that_remains_which_does_not_go_by_itself() {
    let mut facts = Facts::default();
    guest(&mut facts, "a");
    guest(&mut facts, "b");
    let blocked = json!([{"type": "LiveMigratable", "status": "False", "message": "PVC own is not shared"}]);
    put(&mut facts, "b", json!({"phase": "Running", "nodeName": "node1", "conditions": blocked}), "1");
    let mut course = course(&[("a", DrainOutcome::Migrate), ("b", DrainOutcome::Block)], 2);
    assert_eq!(asked(&mut course, 0, &facts), ["a", "b"], "the server knows better than the plan");
    course.answered(&name("virt-launcher-b"), Answer::Refused("it cannot".into()), at(0), &facts);
    course.answered(&name("virt-launcher-a"), Answer::Refused("a budget".into()), at(0), &facts);
    assert_eq!(course.next(at(1), &facts).stuck, [""; 0], "a budget may allow it later");
    facts.pods.remove(&name("virt-launcher-a"));
    let next = course.next(at(1), &facts);
    assert_eq!((next.left, next.stuck), (1, vec!["default/b: it cannot: PVC own is not shared".to_owned()]));
    facts.pods.clear();
    assert_eq!(course.next(at(1), &facts).left, 0);
}

#[test]
fn who_has_no_place_to_go_is_not_asked() {
    let mut facts = Facts::default();
    guest(&mut facts, "a");
    let vm = DrainVm {
        namespace: "default".into(),
        name: "a".into(),
        outcome: Some(DrainOutcome::Block),
        bytes: Some(1),
        reasons: vec!["LiveMigrate".into(), "0/1 nodes are available".into()],
        ..DrainVm::default()
    };
    let plan = DrainPlan { nodes: vec!["node1".into()], vms: vec![vm], ..DrainPlan::default() };
    let mut course = Course::new(&plan, Manner::default(), 2);
    let next = course.next(at(0), &facts);
    assert_eq!((next.evict.len(), next.stuck), (0, vec!["default/a: 0/1 nodes are available".to_owned()]));
}

#[test]
fn who_was_granted_and_is_there_all_the_same_is_asked_again() {
    let mut facts = Facts::default();
    guest(&mut facts, "a");
    let mut course = course(&[("a", DrainOutcome::ShutDown)], 1);
    assert_eq!(asked(&mut course, 0, &facts), ["a"]);
    course.answered(&name("virt-launcher-a"), Answer::Granted, at(0), &facts);
    assert_eq!(course.standing(&name("a"), &facts), Standing::ShutsDown);
    assert_eq!(asked(&mut course, 1, &facts), [""; 0]);
    assert_eq!(asked(&mut course, ASK_AGAIN.as_secs(), &facts), ["a"]);
    // A pod that is being deleted is left alone, for as long as it takes.
    course.answered(&name("virt-launcher-a"), Answer::Granted, at(5), &facts);
    let mut pod = facts.pods[&name("virt-launcher-a")].as_ref().clone();
    pod.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
    facts.pods.insert(name("virt-launcher-a"), Arc::new(pod));
    assert_eq!(asked(&mut course, 600, &facts), [""; 0]);
}

#[test]
fn who_is_denied_for_good_does_not_keep_it_going() {
    let mut facts = Facts::default();
    guest(&mut facts, "a");
    guest(&mut facts, "b");
    let pod = read(json!({
        "metadata": {"name": "web", "namespace": "default", "uid": "pod-web", "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs", "controller": true},
        ]},
        "spec": {"nodeName": "node1", "containers": []}, "status": {"phase": "Running"},
    }));
    facts.pods.insert(name("web"), pod);
    let mut course = course(&[("a", DrainOutcome::Migrate), ("b", DrainOutcome::Migrate)], 2);
    assert_eq!(asked(&mut course, 0, &facts), ["a", "b", "web"]);
    course.answered(&name("virt-launcher-a"), Answer::Denied("you may not".into()), at(0), &facts);
    course.answered(&name("virt-launcher-b"), Answer::Refused("a budget".into()), at(0), &facts);
    course.answered(&name("web"), Answer::Denied("nor this".into()), at(0), &facts);
    assert_eq!(course.next(at(1), &facts).stuck, [""; 0], "one of them may go later");
    facts.pods.remove(&name("virt-launcher-b"));
    let next = course.next(at(1), &facts);
    let stuck = ["default/a: you may not", "default/web: nor this"].map(str::to_owned);
    assert_eq!((next.evict.len(), next.left, next.stuck), (0, 2, stuck.to_vec()));
}
