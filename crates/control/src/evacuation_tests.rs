use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::evacuation::pause;
use crate::plan::{Effect, View};
use crate::testing::Cluster;
use crate::{Key, Kind, Name, Object, Ref, World, names};

fn name(name: &str) -> Name {
    Name::new("default", name)
}

/// Three nodes and a guest on the first, which is to be moved when it is to leave.
fn cluster() -> Cluster {
    let mut cluster = Cluster::new();
    for node in ["node1", "node2", "node3"] {
        cluster.add_node(node);
    }
    cluster.put(
        Kind::VirtualMachineInstance,
        json!({
            "metadata": {"name": "demo", "namespace": "default", "uid": "uid-demo"},
            "spec": {"evictionStrategy": "LiveMigrate", "domain": {"memory": {"guest": "128Mi"}, "devices": {}}},
            "status": {
                "phase": "Running", "nodeName": "node1", "runtimeUser": 0,
                "conditions": [{"type": "LiveMigratable", "status": "True"}],
            },
        }),
    );
    cluster.put(
        Kind::Pod,
        json!({
            "metadata": {
                "name": names::launcher_pod("demo", "uid-demo"), "namespace": "default",
                "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": "uid-demo"},
                "annotations": {"kubevirt.io/domain": "demo"},
            },
            "spec": {"nodeName": "node1", "containers": [{"name": "compute"}]},
        }),
    );
    cluster.run_kubelets();
    cluster.settle();
    cluster
}

fn vmi(cluster: &Cluster) -> Value {
    cluster.get(Kind::VirtualMachineInstance, &name("demo")).unwrap()
}

fn condition(cluster: &Cluster, type_: &str) -> Option<Value> {
    let vmi = vmi(cluster);
    vmi["status"]["conditions"].as_array().unwrap().iter().find(|one| one["type"] == type_).cloned()
}

fn set(cluster: &mut Cluster, patch: Value) {
    cluster.patch(Kind::VirtualMachineInstance, &name("demo"), patch);
}

fn mark(cluster: &mut Cluster) {
    set(cluster, json!({"status": {"evacuationNodeName": "node1"}}));
    cluster.settle();
}

fn node(cluster: &mut Cluster, spec: Value) {
    cluster.patch(Kind::Node, &Name::cluster("node1"), json!({"spec": spec}));
    cluster.settle();
}

fn configure(cluster: &mut Cluster, migrations: Value) {
    cluster.put(
        Kind::KubeVirt,
        json!({
            "metadata": {"name": "kubevirt", "namespace": "kubevirt"},
            "spec": {"configuration": {"migrations": migrations}},
        }),
    );
    cluster.settle();
}

/// Migrations that are not over, or not taken in yet.
fn open(world: &World) -> Vec<Value> {
    let all = world.migrations.iter().filter(|one| !one.is_final() || one.metadata.finalizers.is_some());
    all.map(|one| serde_json::to_value(one.as_ref()).unwrap()).collect()
}

fn pass_and_settle(cluster: &mut Cluster, seconds: i64) {
    cluster.pass(seconds);
    cluster.settle();
}

/// The attempt under way fails, as the handlers or nobody would say it.
fn fail(cluster: &mut Cluster) {
    let Some(attempt) = open(&cluster.world).into_iter().find(|one| one["status"]["phase"] != "Failed") else { return };
    let now = cluster.now.to_string();
    if vmi(cluster)["status"]["migrationState"]["migrationUid"] == attempt["metadata"]["uid"] {
        set(cluster, json!({"status": {"migrationState": {"failed": true, "completed": true, "endTimestamp": now}}}));
    }
    let stamps = json!([{"phase": "Failed", "phaseTransitionTimestamp": now}]);
    let status = json!({
        "phase": "Failed", "reason": "Unschedulable", "message": "No node takes it.", "phaseTransitionTimestamps": stamps,
    });
    let attempt = name(attempt["metadata"]["name"].as_str().unwrap());
    cluster.patch(Kind::Migration, &attempt, json!({"status": status}));
}

fn fail_and_settle(cluster: &mut Cluster) {
    fail(cluster);
    cluster.settle();
    cluster.run_kubelets();
    cluster.settle();
}

#[test]
fn a_marked_guest_is_migrated_and_that_is_said() {
    let mut cluster = cluster();
    assert!(open(&cluster.world).is_empty());
    mark(&mut cluster);
    let [attempt] = &open(&cluster.world)[..] else { panic!("one migration: {:?}", open(&cluster.world)) };
    let made = attempt["metadata"]["name"].as_str().unwrap();
    assert!(made.starts_with("kubevirt-evacuation-"), "{made}");
    assert_eq!(attempt["metadata"]["annotations"]["kubevirt.io/evacuationMigration"], "node1");
    assert_eq!(attempt["spec"], json!({"vmiName": "demo", "priority": "system-critical"}));
    let said = condition(&cluster, "EvictionRequested").unwrap();
    assert_eq!((&said["status"], &said["reason"]), (&json!("True"), &json!("EvictionRequested")));
    assert_eq!(said["message"], "VMI is marked for eviction");
    assert!(cluster.has_event("SuccessfulCreate", &format!("Created Migration {made}")));
    assert_eq!(vmi(&cluster)["status"]["evacuation"]["migrationName"], made);
    let pod = cluster.get(Kind::Pod, &name(&names::launcher_pod("demo", "uid-demo"))).unwrap();
    let key = "descheduler.alpha.kubernetes.io/eviction-in-progress";
    assert_eq!(pod["metadata"]["annotations"][key], "true");
    pass_and_settle(&mut cluster, 60);
    assert_eq!(open(&cluster.world).len(), 1);
}

#[test]
fn what_has_left_is_left_alone() {
    let mut cluster = cluster();
    set(&mut cluster, json!({"metadata": {"annotations": {"kubevirt.io/eviction-source": "descheduler"}}}));
    mark(&mut cluster);
    assert_eq!(open(&cluster.world)[0]["spec"]["priority"], "system-maintenance");
    cluster.run_kubelets();
    cluster.settle();
    let state = vmi(&cluster)["status"]["migrationState"].clone();
    let now = cluster.now.to_string();
    set(&mut cluster, json!({"status": {"migrationState": {"targetNodeAddress": "10.0.0.1", "startTimestamp": now}}}));
    cluster.settle();
    // The source is done, the target has not said so: no reason to make another.
    set(&mut cluster, json!({"status": {"migrationState": {"completed": true, "endTimestamp": now}}}));
    pass_and_settle(&mut cluster, 3600);
    assert_eq!(cluster.world.migrations.iter().count(), 1);
    set(&mut cluster, json!({"status": {"nodeName": state["targetNode"], "evacuationNodeName": null}}));
    cluster.settle();
    cluster.run_kubelets();
    pass_and_settle(&mut cluster, 3600);
    assert_eq!(cluster.world.migrations.iter().count(), 1);
    let after = vmi(&cluster);
    assert_eq!(after["status"]["evacuation"], Value::Null);
    assert_eq!(condition(&cluster, "EvictionRequested"), None);
    let key = "descheduler.alpha.kubernetes.io/eviction-in-progress";
    assert!(
        cluster.world.pods.iter().all(|pod| pod.metadata.annotations.as_ref().is_none_or(|all| !all.contains_key(key)))
    );
}

#[test]
fn a_mark_for_a_node_that_it_has_left_is_taken_away() {
    let mut cluster = cluster();
    let annotations = json!({"kubevirt.io/eviction-source": "descheduler"});
    set(&mut cluster, json!({"metadata": {"annotations": annotations}, "status": {"evacuationNodeName": "node9"}}));
    cluster.settle();
    assert!(open(&cluster.world).is_empty());
    let after = vmi(&cluster);
    assert_eq!(after["status"]["evacuationNodeName"], Value::Null);
    assert_eq!(after["metadata"]["annotations"]["kubevirt.io/eviction-source"], Value::Null);
}

#[test]
fn the_drain_taint_empties_a_node_and_the_strategy_decides() {
    for (strategy, of_cluster, migratable, moved) in [
        (json!("LiveMigrate"), None, "True", true),
        (json!("LiveMigrate"), None, "False", false),
        (json!("LiveMigrateIfPossible"), None, "True", true),
        (json!("LiveMigrateIfPossible"), None, "False", false),
        (json!("External"), None, "True", false),
        (json!("None"), Some("LiveMigrate"), "True", false),
        (Value::Null, None, "True", false),
        (Value::Null, Some("LiveMigrate"), "True", true),
    ] {
        let mut cluster = cluster();
        let configuration = json!({"evictionStrategy": of_cluster, "migrations": {"nodeDrainTaintKey": "empty-it"}});
        cluster.put(
            Kind::KubeVirt,
            json!({"metadata": {"name": "kubevirt", "namespace": "kubevirt"}, "spec": {"configuration": configuration}}),
        );
        let conditions = json!([{"type": "LiveMigratable", "status": migratable, "message": "disk a is local"}]);
        set(&mut cluster, json!({"spec": {"evictionStrategy": strategy}, "status": {"conditions": conditions}}));
        node(&mut cluster, json!({"taints": [{"key": "kubevirt.io/drain", "effect": "NoSchedule"}]}));
        assert!(open(&cluster.world).is_empty(), "that is not the key");
        node(&mut cluster, json!({"taints": [{"key": "empty-it", "effect": "NoExecute"}]}));
        assert!(open(&cluster.world).is_empty(), "that is not the effect");
        node(&mut cluster, json!({"taints": [{"key": "empty-it", "effect": "NoSchedule"}]}));
        assert_eq!(open(&cluster.world).len(), usize::from(moved), "{strategy} {of_cluster:?} {migratable}");
        assert_eq!(condition(&cluster, "EvictionRequested"), None, "nobody has asked for an eviction");
        let stopped = condition(&cluster, "EvacuationStopped");
        assert_eq!(stopped.is_some(), strategy == "LiveMigrate" && !moved);
        if let Some(stopped) = stopped {
            assert_eq!(stopped["reason"], "NotLiveMigratable");
            assert_eq!(stopped["message"], "It cannot be migrated away from node1: disk a is local");
        }
    }
}

#[test]
fn failures_are_followed_by_pauses_that_double() {
    let seconds = |failures: u32| pause(failures).as_secs();
    assert_eq!((1..=10).map(seconds).collect::<Vec<_>>(), [20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 7200]);
    assert_eq!((seconds(31), seconds(32), seconds(33), seconds(u32::MAX)), (7200, 7200, 7200, 7200));

    let mut cluster = cluster();
    mark(&mut cluster);
    let mut names = BTreeSet::new();
    for (failed, pause) in [(1, 20), (2, 40), (3, 80), (4, 160), (5, 320), (6, 640), (7, 1280)] {
        let attempt = open(&cluster.world).remove(0);
        assert!(names.insert(attempt["metadata"]["name"].to_string()), "a name of its own");
        cluster.events.clear();
        fail_and_settle(&mut cluster);
        let state = vmi(&cluster)["status"]["evacuation"].clone();
        assert_eq!((&state["failedAttempts"], &state["lastFailure"]), (&json!(failed), &json!("Unschedulable")));
        assert_eq!(state["lastMigrationUID"], attempt["metadata"]["uid"]);
        assert!(cluster.has_event("MigrationBackoff", "backoff migrating vmi default/demo"));
        let plan = cluster.decide(&Key::Evacuation(name("demo")));
        assert_eq!(plan.wake_at.map(|at| at.duration_since(cluster.now).as_secs()), Some(pause));
        pass_and_settle(&mut cluster, pause - 1);
        assert!(open(&cluster.world).is_empty(), "too early after {failed}");
        pass_and_settle(&mut cluster, 1);
        assert_eq!(open(&cluster.world).len(), 1, "after {failed}");
    }
    assert!(condition(&cluster, "EvictionRequested").is_some(), "it still is to leave");
    assert_eq!(cluster.world.migrations.iter().filter(|one| one.is_final()).count(), 5, "the others are collected");
    assert_eq!(cluster.world.records.iter().count(), 7);
}

#[test]
fn only_the_first_in_a_row_whose_target_was_closed_is_excused() {
    let mut cluster = cluster();
    mark(&mut cluster);
    let close = |cluster: &mut Cluster| {
        let attempt = name(open(&cluster.world)[0]["metadata"]["name"].as_str().unwrap());
        fail(cluster);
        cluster.patch(Kind::Migration, &attempt, json!({"status": {"reason": "TargetInMaintenance"}}));
        cluster.settle();
        cluster.run_kubelets();
        cluster.settle();
        let next: jiff::Timestamp = next_attempt(cluster).as_str().unwrap().parse().unwrap();
        let pause = next.duration_since(cluster.now).as_secs();
        let failed = vmi(cluster)["status"]["evacuation"]["failedAttempts"].clone();
        pass_and_settle(cluster, pause);
        (failed, pause)
    };
    assert_eq!(close(&mut cluster), (Value::Null, 5));
    // Some scheduler does not learn that the node is closed.
    assert_eq!(close(&mut cluster), (json!(1), 20));
    assert_eq!(close(&mut cluster), (json!(2), 40));
    fail_and_settle(&mut cluster);
    assert_eq!(vmi(&cluster)["status"]["evacuation"]["failedAttempts"], 3);
    pass_and_settle(&mut cluster, 80);
    assert_eq!(close(&mut cluster), (json!(3), 5), "something else came between");
    assert_eq!(close(&mut cluster), (json!(4), 160));
}

#[test]
fn as_long_as_no_other_node_has_the_processor_it_is_looked_for_again_and_not_given_up() {
    let mut cluster = cluster();
    configure(&mut cluster, json!({"maxAttempts": 1}));
    let says = |cluster: &mut Cluster, node: &str, model: &str| {
        let has = ["cpu-model", "cpu-model-migration"].map(|kind| format!("{kind}.node.kubevirt.io/{model}"));
        let has: std::collections::BTreeMap<_, _> = has.into_iter().map(|label| (label, "true")).collect();
        cluster.patch(Kind::Node, &Name::cluster(node), json!({"metadata": {"labels": has}}));
    };
    for (node, model) in [("node1", "Westmere"), ("node2", "Penryn"), ("node3", "Penryn")] {
        says(&mut cluster, node, model);
    }
    set(&mut cluster, json!({"status": {"guestCpu": {"model": "Westmere", "features": []}, "machineRevision": 4}}));
    mark(&mut cluster);
    for _ in 0..3 {
        let state = &vmi(&cluster)["status"]["evacuation"];
        assert_eq!((&state["lastFailure"], &state["failedAttempts"]), (&json!("TargetRefusedCPU"), &Value::Null));
        assert!(condition(&cluster, "EvacuationStopped").is_none());
        pass_and_settle(&mut cluster, 60);
    }
    says(&mut cluster, "node3", "Westmere");
    pass_and_settle(&mut cluster, 60);
    assert_eq!(open(&cluster.world)[0]["status"]["phase"], "Scheduling");
    // One that came to a target which refused the processor is a failure like another.
    fail(&mut cluster);
    let attempt = name(open(&cluster.world)[0]["metadata"]["name"].as_str().unwrap());
    let stamps: Vec<Value> = ["Scheduling", "Failed"]
        .map(|phase| json!({"phase": phase, "phaseTransitionTimestamp": cluster.now.to_string()}))
        .into();
    let status = json!({"reason": "TargetRefusedCPU", "phaseTransitionTimestamps": stamps});
    cluster.patch(Kind::Migration, &attempt, json!({"status": status}));
    cluster.settle();
    assert_eq!(vmi(&cluster)["status"]["evacuation"]["failedAttempts"], 1);
}

#[test]
fn it_gives_up_and_says_why_until_that_changes() {
    let mut cluster = cluster();
    configure(&mut cluster, json!({"maxAttempts": 2}));
    node(&mut cluster, json!({"unschedulable": true}));
    mark(&mut cluster);
    fail_and_settle(&mut cluster);
    assert_eq!(condition(&cluster, "EvacuationStopped"), None);
    pass_and_settle(&mut cluster, 20);
    cluster.events.clear();
    fail_and_settle(&mut cluster);
    let stopped = condition(&cluster, "EvacuationStopped").unwrap();
    assert_eq!((&stopped["status"], &stopped["reason"]), (&json!("True"), &json!("AttemptsUsedUp")));
    let text = stopped["message"].as_str().unwrap();
    let why = "All 2 attempts to move it away from node1 have failed, the last one with Unschedulable: No node takes it. \
               Remove the cause, then uncordon node1 and drain it again";
    assert!(text.starts_with(why), "{text}");
    assert!(cluster.has_event("EvacuationStopped", why) && !cluster.has_event("MigrationBackoff", ""));
    pass_and_settle(&mut cluster, 1_000_000);
    assert!(open(&cluster.world).is_empty());
    assert_eq!(cluster.events.iter().filter(|event| event.reason == "EvacuationStopped").count(), 1);
    // More attempts are allowed: on it goes, with what was counted.
    configure(&mut cluster, json!({"maxAttempts": 3}));
    assert_eq!((open(&cluster.world).len(), condition(&cluster, "EvacuationStopped")), (1, None));
    fail_and_settle(&mut cluster);
    assert!(condition(&cluster, "EvacuationStopped").is_some());
    // The node is opened: it need not leave any more, and another drain begins anew.
    node(&mut cluster, json!({"unschedulable": null}));
    let after = vmi(&cluster);
    assert_eq!((&after["status"]["evacuationNodeName"], &after["status"]["evacuation"]), (&Value::Null, &Value::Null));
    assert_eq!((condition(&cluster, "EvacuationStopped"), condition(&cluster, "EvictionRequested")), (None, None));
    node(&mut cluster, json!({"unschedulable": true}));
    mark(&mut cluster);
    assert_eq!(open(&cluster.world).len(), 1);
    assert_eq!(vmi(&cluster)["status"]["evacuation"]["failedAttempts"], Value::Null);
    // With a higher limit it goes on for longer.
    configure(&mut cluster, json!({"maxAttempts": 13}));
    for _ in 0..12 {
        fail_and_settle(&mut cluster);
        pass_and_settle(&mut cluster, 7200);
    }
    assert_eq!((open(&cluster.world).len(), condition(&cluster, "EvacuationStopped")), (1, None));
}

#[test]
fn without_the_taint_no_further_attempt() {
    let mut cluster = cluster();
    node(&mut cluster, json!({"taints": [{"key": "kubevirt.io/drain", "effect": "NoSchedule"}]}));
    assert_eq!(open(&cluster.world).len(), 1);
    node(&mut cluster, json!({"taints": null}));
    assert_eq!(vmi(&cluster)["status"]["evacuation"], Value::Null);
    fail_and_settle(&mut cluster);
    pass_and_settle(&mut cluster, 10_000);
    assert!(open(&cluster.world).is_empty());
}

#[test]
fn a_node_that_was_open_all_the_time_ends_no_evacuation() {
    let mut cluster = cluster();
    mark(&mut cluster);
    cluster.patch(Kind::Node, &Name::cluster("node1"), json!({"metadata": {"labels": {"a": "b"}}}));
    cluster.settle();
    fail_and_settle(&mut cluster);
    pass_and_settle(&mut cluster, 20);
    assert_eq!(open(&cluster.world).len(), 1);
}

#[test]
fn the_mark_of_one_that_is_not_moved_goes_when_the_node_is_opened() {
    let gone = |cluster: &Cluster| {
        let status = vmi(cluster)["status"].clone();
        assert_eq!((&status["evacuationNodeName"], &status["evacuation"]), (&Value::Null, &Value::Null), "{status}");
        assert_eq!(condition(cluster, "EvictionRequested"), None);
    };
    // Somebody else is to move it.
    let mut external = cluster();
    set(&mut external, json!({"spec": {"evictionStrategy": "External"}}));
    node(&mut external, json!({"unschedulable": true}));
    mark(&mut external);
    assert!(open(&external.world).is_empty() && condition(&external, "EvictionRequested").is_some());
    node(&mut external, json!({"unschedulable": null}));
    gone(&external);

    // It could be moved at first.
    let mut cluster = cluster();
    set(&mut cluster, json!({"spec": {"evictionStrategy": "LiveMigrateIfPossible"}}));
    node(&mut cluster, json!({"unschedulable": true}));
    mark(&mut cluster);
    let first = open(&cluster.world).remove(0);
    fail_and_settle(&mut cluster);
    assert_eq!(vmi(&cluster)["status"]["evacuation"]["failedAttempts"], 1);
    set(&mut cluster, json!({"status": {"conditions": [{"type": "LiveMigratable", "status": "False"}]}}));
    pass_and_settle(&mut cluster, 60);
    assert_eq!(vmi(&cluster)["status"]["evacuation"], json!({"nodeName": "node1", "cordoned": true}));
    assert!(open(&cluster.world).is_empty());
    let mut again = cluster.clone();
    set(&mut again, json!({"status": {"conditions": [{"type": "LiveMigratable", "status": "True"}]}}));
    again.settle();
    let second = open(&again.world).remove(0);
    assert_ne!(first["metadata"]["name"], second["metadata"]["name"], "a migration of its own");
    assert_eq!(vmi(&again)["status"]["evacuation"]["failedAttempts"], Value::Null);
    node(&mut cluster, json!({"unschedulable": null}));
    gone(&cluster);
}

#[test]
fn an_attempt_at_the_end_of_time_is_waited_for() {
    let mut cluster = cluster();
    set(
        &mut cluster,
        json!({"status": {"evacuationNodeName": "node1", "evacuation": {
            "nodeName": "node1", "migrationName": "not-there", "attemptTimestamp": "9999-12-30T22:00:00Z",
        }}}),
    );
    cluster.settle();
    assert!(open(&cluster.world).is_empty());
}

#[test]
fn a_migration_of_a_user_comes_first() {
    let mut cluster = cluster();
    cluster.put(
        Kind::Migration,
        json!({
            "metadata": {"name": "own", "namespace": "default", "finalizers": ["kubevirt.io/migrationJobFinalize"]},
            "spec": {"vmiName": "demo"},
        }),
    );
    cluster.settle();
    mark(&mut cluster);
    assert_eq!(open(&cluster.world).len(), 1);
    fail_and_settle(&mut cluster);
    let now = open(&cluster.world);
    assert!(now.len() == 1 && now[0]["metadata"]["name"] != "own", "{now:?}");
    assert_eq!(vmi(&cluster)["status"]["evacuation"]["failedAttempts"], Value::Null, "that was not an attempt of ours");
}

#[test]
fn a_migration_that_the_server_refuses_is_asked_for_now_and_then() {
    let mut cluster = cluster();
    set(&mut cluster, json!({"status": {"evacuationNodeName": "node1"}}));
    let key = Key::Evacuation(name("demo"));
    let refused = |cluster: &mut Cluster| {
        let mut plan = cluster.decide(&key);
        let asked = plan.effects.iter().any(|effect| matches!(effect, Effect::Create(_)));
        plan.effects.retain(|effect| !matches!(effect, Effect::Create(_)));
        let wake = plan.wake_at;
        cluster.carry_out(plan);
        (asked, wake.map(|at| at.duration_since(cluster.now).as_secs()))
    };
    for _ in 0..3 {
        assert_eq!(refused(&mut cluster), (true, None));
        assert_eq!(refused(&mut cluster), (false, Some(10)));
        cluster.pass(10);
    }
    cluster.settle();
    assert_eq!(open(&cluster.world).len(), 1);
}

#[test]
fn a_cancelled_attempt_counts() {
    let mut cluster = cluster();
    mark(&mut cluster);
    let attempt = name(open(&cluster.world)[0]["metadata"]["name"].as_str().unwrap());
    cluster.delete(&Ref::new(Kind::Migration, attempt.clone()));
    cluster.settle();
    assert!(cluster.get(Kind::Migration, &attempt).is_none());
    assert_eq!(vmi(&cluster)["status"]["evacuation"]["failedAttempts"], 1);
}

/// Something that happens.
#[derive(Clone, Debug)]
enum Happening {
    Pass(u16),
    Kubelets,
    /// The attempt under way fails.
    Fail,
    /// A user deletes the attempt under way, or one that is over.
    Delete(u8),
    /// A decision; the controller dies after so many of its writes.
    Decide(u8, u8),
    /// Another controller sees the world as it is.
    Look,
    /// The other controller decides on what it last saw.
    DecideLate(u8, u8),
    Settle,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        3 => (0u16..400).prop_map(Happening::Pass),
        2 => Just(Happening::Kubelets),
        4 => Just(Happening::Fail),
        1 => any::<u8>().prop_map(Happening::Delete),
        12 => (any::<u8>(), 0u8..6).prop_map(|(key, writes)| Happening::Decide(key, writes)),
        2 => Just(Happening::Look),
        6 => (any::<u8>(), 0u8..6).prop_map(|(key, writes)| Happening::DecideLate(key, writes)),
        2 => Just(Happening::Settle),
    ]
}

/// What really happened, seen from outside.
#[derive(Default)]
struct Truth {
    /// Attempts that were seen to exist, by UID.
    made: BTreeSet<String>,
    /// Attempts that were seen to have failed.
    failed: BTreeSet<String>,
}

impl Truth {
    fn look(&mut self, cluster: &Cluster, not_before: &Value) {
        let mut under_way = 0;
        for one in cluster.world.migrations.iter() {
            if self.made.insert(one.uid().to_owned()) {
                let early = not_before.as_str().is_some_and(|at| cluster.now < at.parse().unwrap());
                assert!(!early, "an attempt at {} although it may not begin before {not_before}", cluster.now);
            }
            match one.is_final() {
                true => {
                    self.failed.insert(one.uid().to_owned());
                }
                false => under_way += 1,
            }
        }
        assert!(under_way <= 1, "two attempts at once");
        let counted = vmi(cluster)["status"]["evacuation"]["failedAttempts"].as_u64().unwrap_or(0);
        assert!(counted <= self.failed.len() as u64, "{counted} counted of {:?}", self.failed);
        assert!(cluster.world.records.iter().count() <= self.failed.len());
    }
}

fn next_attempt(cluster: &Cluster) -> Value {
    vmi(cluster)["status"]["evacuation"]["nextAttemptTimestamp"].clone()
}

fn settle(cluster: &mut Cluster, truth: &mut Truth) {
    for _ in 0..200 {
        let mut wrote = false;
        for key in Key::all(&cluster.world) {
            let before = next_attempt(cluster);
            wrote |= cluster.step(&key);
            truth.look(cluster, &before);
        }
        if !wrote {
            return;
        }
    }
    panic!("decisions never come to rest");
}

fn happen(cluster: &mut Cluster, late: &mut World, truth: &mut Truth, what: &Happening) {
    match what {
        Happening::Pass(seconds) => cluster.pass(i64::from(*seconds)),
        Happening::Kubelets => cluster.run_kubelets(),
        Happening::Fail => fail(cluster),
        Happening::Delete(index) => {
            let all = cluster.world.names_of(Kind::Migration);
            if let Some(one) = all.get(usize::from(*index) % all.len().max(1)) {
                cluster.delete(&Ref::new(Kind::Migration, one.clone()));
            }
        }
        Happening::Decide(key, writes) => {
            let keys = Key::all(&cluster.world);
            let mut plan = cluster.decide(&keys[usize::from(*key) % keys.len()]);
            plan.effects.truncate(usize::from(*writes));
            cluster.carry_out(plan);
        }
        Happening::Look => *late = cluster.world.clone(),
        Happening::DecideLate(key, writes) => {
            // What is this module's: evacuations, and the ends of migrations.
            let is_final = |key: &Key| match key {
                Key::Evacuation(_) => true,
                Key::Migration(name) => late.migrations.get(name).is_some_and(|one| one.is_final()),
                _ => false,
            };
            let keys: Vec<Key> = Key::all(late).into_iter().filter(is_final).collect();
            if let Some(key) = keys.get(usize::from(*key) % keys.len().max(1)) {
                let mut plan = key.decide(&View { now: cluster.now, world: late, settings: &cluster.settings });
                plan.effects.truncate(usize::from(*writes));
                cluster.carry_out(plan);
            }
        }
        Happening::Settle => settle(cluster, truth),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Controllers die between any two writes and decide on old states; users delete migrations; the world forgets all but
    /// five of them: each failure is counted once and written down once, and no attempt begins before its time.
    #[test]
    fn no_failure_is_lost_or_counted_twice(happenings in proptest::collection::vec(happening(), 1..120)) {
        let mut cluster = cluster();
        configure(&mut cluster, json!({"maxAttempts": 1000}));
        mark(&mut cluster);
        let mut late = cluster.world.clone();
        let mut truth = Truth::default();
        truth.look(&cluster, &Value::Null);
        for happening in &happenings {
            let before = next_attempt(&cluster);
            happen(&mut cluster, &mut late, &mut truth, happening);
            truth.look(&cluster, &before);
        }
        settle(&mut cluster, &mut truth);
        let state = vmi(&cluster)["status"]["evacuation"].clone();
        prop_assert_eq!(state["failedAttempts"].as_u64().unwrap_or(0), truth.failed.len() as u64);
        let written: BTreeSet<String> =
            cluster.world.records.iter().map(|record| record.spec.migration_uid.clone()).collect();
        prop_assert_eq!(&written, &truth.failed);
        prop_assert_eq!(cluster.world.records.iter().count(), truth.failed.len());
        let finals = cluster.world.migrations.iter().filter(|one| one.is_final()).count();
        prop_assert!(finals <= names::FINISHED_MIGRATIONS_KEPT);
        let objects = cluster.world.names_of(Kind::MigrationRecord);
        prop_assert!(objects.iter().all(|one| matches!(
            cluster.world.get(Kind::MigrationRecord, one), Some(Object::MigrationRecord(_)))));
    }
}
