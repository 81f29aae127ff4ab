use godwit_api::Installation;
use godwit_api::migration::MigrationQueuePlace;
use serde_json::{Value, json};

use super::*;
use crate::migration::tests::{cluster, migrate, name, state, tell};
use crate::testing::Cluster;
use crate::{Key, Kind, Ref};

fn limits(cluster: &mut Cluster, migrations: Value) {
    cluster.put(
        Kind::KubeVirt,
        json!({"metadata": {"namespace": "kubevirt", "name": "kubevirt"},
            "spec": {"configuration": {"migrations": migrations}}}),
    );
}

fn ask(cluster: &mut Cluster, job: &str, vmi: &str, priority: Option<&str>) {
    migrate(cluster, job, vmi);
    if let Some(priority) = priority {
        cluster.patch(Kind::Migration, &name(job), json!({"spec": {"priority": priority}}));
    }
    cluster.step(&Key::Migration(name(job)));
}

fn migration(cluster: &Cluster, job: &str) -> Value {
    cluster.get(Kind::Migration, &name(job)).unwrap()
}

fn phase(cluster: &Cluster, job: &str) -> String {
    migration(cluster, job)["status"]["phase"].as_str().unwrap_or_default().to_owned()
}

fn reason(cluster: &Cluster, job: &str) -> String {
    migration(cluster, job)["status"]["reason"].as_str().unwrap_or_default().to_owned()
}

/// The jobs that have a slot, without `uid-`.
fn slots(cluster: &Cluster) -> Vec<String> {
    let slots = &cluster.world.turns().ledger().slots;
    slots.keys().map(|uid| uid.trim_start_matches("uid-").to_owned()).collect()
}

fn slot(cluster: &Cluster, job: &str) -> Slot {
    cluster.world.turns().ledger().slots[&format!("uid-{job}")].clone()
}

fn pod_of(cluster: &Cluster, job: &str) -> Name {
    cluster.world.pods_of_migration(&format!("uid-{job}")).next().unwrap().key()
}

fn cancel(cluster: &mut Cluster, job: &str) {
    cluster.delete(&Ref::new(Kind::Migration, name(job)));
}

#[test]
fn the_more_urgent_goes_first_then_the_older() {
    let mut cluster = cluster(&[("a", "node1"), ("b", "node2"), ("c", "node3"), ("d", "node1"), ("e", "node2")]);
    limits(&mut cluster, json!({"parallelMigrationsPerCluster": 1}));
    for (job, vmi, priority) in [
        ("hand", "a", None),
        ("keep", "b", Some("system-maintenance")),
        ("user", "c", Some("user-triggered")),
        ("drain2", "d", Some("system-critical")),
        ("drain1", "e", Some("system-critical")),
    ] {
        ask(&mut cluster, job, vmi, priority);
        if job != "drain2" {
            cluster.pass(1);
        }
    }
    let mut order = Vec::new();
    for _ in 0..5 {
        cluster.settle();
        let [next] = &slots(&cluster)[..] else { panic!("{:?}", slots(&cluster)) };
        order.push(next.clone());
        // The same of age: by name.
        let place = migration(&cluster, "hand")["status"]["queue"]["position"].clone();
        assert_eq!(place, if next == "hand" { Value::Null } else { json!(5 - order.len()) });
        cancel(&mut cluster, &order[order.len() - 1]);
    }
    assert_eq!(order, ["drain1", "drain2", "user", "keep", "hand"]);
}

#[test]
fn what_runs_is_not_overtaken_and_a_place_is_told_by_its_limit() {
    let mut cluster = cluster(&[("a", "node1"), ("b", "node1"), ("c", "node2")]);
    limits(&mut cluster, json!({"parallelMigrationsPerCluster": 2, "parallelOutboundMigrationsPerNode": 1}));
    ask(&mut cluster, "first", "a", None);
    cluster.settle();
    ask(&mut cluster, "urgent", "b", Some("system-critical"));
    ask(&mut cluster, "other", "c", None);
    cluster.settle();
    // Its own node is full: it waits, and holds up nobody.
    assert_eq!(slots(&cluster), ["first", "other"]);
    let urgent = migration(&cluster, "urgent");
    assert_eq!(urgent["status"]["reason"], "NodeLimit");
    assert_eq!(urgent["status"]["queue"], json!({"position": 1, "limit": "parallelOutboundMigrationsPerNode"}));
    // Without a slot no pod.
    assert_eq!(cluster.world.pods_of_migration("uid-urgent").count(), 0);
    cancel(&mut cluster, "first");
    cluster.settle();
    assert_eq!(slots(&cluster), ["other", "urgent"]);
    assert!(migration(&cluster, "urgent")["status"].get("queue").is_none());
}

#[test]
fn who_cannot_start_takes_no_slot() {
    let mut cluster = cluster(&[("a", "node1"), ("b", "node1"), ("c", "node2")]);
    limits(&mut cluster, json!({"parallelMigrationsPerCluster": 1}));
    cluster.patch(Kind::VirtualMachineInstance, &name("a"), json!({"status": {"phase": "Scheduled"}}));
    tell(&mut cluster, "b", json!({"migrationUid": "earlier", "targetNode": "node2"}));
    ask(&mut cluster, "job-a", "a", Some("system-critical"));
    ask(&mut cluster, "job-b", "b", Some("system-critical"));
    ask(&mut cluster, "job-c", "c", None);
    cluster.settle();
    assert_eq!(slots(&cluster), ["job-c"]);
    assert_eq!(
        (reason(&cluster, "job-a"), reason(&cluster, "job-b")),
        ("GuestNotRunning".into(), "EarlierUnresolved".into())
    );
    assert!(migration(&cluster, "job-a")["status"].get("queue").is_none(), "it is not in the line");
    cancel(&mut cluster, "job-c");
    cluster.patch(Kind::VirtualMachineInstance, &name("a"), json!({"status": {"phase": "Running"}}));
    cluster.settle();
    assert_eq!(slots(&cluster), ["job-a"]);
}

#[test]
fn a_node_that_receives_enough_keeps_its_migrations_waiting() {
    let mut cluster = cluster(&[("a", "node1"), ("b", "node1"), ("c", "node1"), ("d", "node2")]);
    limits(&mut cluster, json!({"parallelOutboundMigrationsPerNode": 5, "parallelInboundMigrationsPerNode": 1}));
    cluster.patch(Kind::Node, &Name::cluster("node3"), json!({"spec": {"unschedulable": true}}));
    for vmi in ["a", "b", "c", "d"] {
        ask(&mut cluster, &format!("job-{vmi}"), vmi, None);
        cluster.pass(1);
    }
    cluster.settle();
    // b and c wait for room on node2 and hold up nobody who goes to node1.
    assert_eq!(slots(&cluster), ["job-a", "job-d"]);
    assert_eq!((phase(&cluster, "job-b"), reason(&cluster, "job-b")), ("Pending".into(), "InboundLimit".into()));
    let queue = migration(&cluster, "job-c")["status"]["queue"].clone();
    assert_eq!(queue, json!({"position": 2, "limit": "parallelInboundMigrationsPerNode"}));
    let view = crate::View { now: cluster.now, world: &cluster.world, settings: &cluster.settings };
    let waiting = cluster.world.migrations.get(&name("job-b")).unwrap();
    let limit = Limit { setting: Setting::InboundPerNode, value: 1, in_use: 1, node: Some("node2".into()) };
    assert_eq!(turn(waiting, &view), Turn::Waits { limit: Some(limit), place: 1 });
    // More room anywhere is enough.
    cluster.patch(Kind::Node, &Name::cluster("node3"), json!({"spec": {"unschedulable": false}}));
    cluster.settle();
    assert_eq!(slots(&cluster), ["job-a", "job-b", "job-d"]);
    assert_eq!(slot(&cluster, "job-b").target.as_deref(), Some("node3"));
    cancel(&mut cluster, "job-a");
    cluster.settle();
    assert_eq!(slots(&cluster), ["job-b", "job-c", "job-d"]);
}

#[test]
fn without_any_right_node_the_pod_is_made_and_says_why() {
    let mut cluster = cluster(&[("a", "node1")]);
    for node in ["node2", "node3"] {
        cluster.patch(Kind::Node, &Name::cluster(node), json!({"spec": {"unschedulable": true}}));
    }
    ask(&mut cluster, "job", "a", None);
    cluster.settle();
    assert_eq!((phase(&cluster, "job"), slot(&cluster, "job").target), ("Scheduling".into(), None));
    assert!(cluster.has_event("FailedScheduling", "2 node(s) were unschedulable"));
    // A node that is found later is written down before the pod is bound.
    cluster.patch(Kind::Node, &Name::cluster("node3"), json!({"spec": {"unschedulable": false, "taints": null}}));
    let pod = pod_of(&cluster, "job");
    let plan = cluster.decide(&Key::Placement(pod.clone()));
    assert!(
        matches!(&plan.effects[0], crate::Effect::Patch(target, _) if *target == reference(&Installation::USUAL)),
        "{plan:?}"
    );
    cluster.carry_out(plan);
    assert_eq!(slot(&cluster, "job").target.as_deref(), Some("node3"));
    assert_eq!(cluster.get(Kind::Pod, &pod).unwrap()["spec"]["nodeName"], "node3");
}

#[test]
fn a_target_that_does_not_fit_any_more_is_changed_and_counts_until_the_pod_is_bound() {
    let mut cluster = cluster(&[("a", "node1")]);
    ask(&mut cluster, "job", "a", None);
    cluster.step(&Key::Turns);
    cluster.step(&Key::Migration(name("job")));
    let reserved = slot(&cluster, "job").target.unwrap();
    cluster.patch(Kind::Node, &Name::cluster(reserved.clone()), json!({"spec": {"unschedulable": true}}));
    let plan = cluster.decide(&Key::Placement(pod_of(&cluster, "job")));
    let mut first = plan.clone();
    first.effects.truncate(1);
    cluster.carry_out(first);
    let moved = slot(&cluster, "job");
    assert_ne!(moved.target.as_ref(), Some(&reserved));
    assert_eq!(moved.also, std::slice::from_ref(&reserved));
    assert_eq!((cluster.world.turns().coming(&reserved), cluster.world.turns().coming("node1")), (1, 0));
    cluster.settle();
    assert_eq!(slot(&cluster, "job").also, Vec::<String>::new());
    assert_eq!(cluster.world.turns().coming(&reserved), 0);
}

#[test]
fn limits_change_while_migrations_run() {
    let mut cluster = cluster(&[("a", "node1"), ("b", "node2"), ("c", "node3"), ("d", "node1")]);
    for vmi in ["a", "b", "c", "d"] {
        ask(&mut cluster, &format!("job-{vmi}"), vmi, None);
        cluster.pass(1);
    }
    limits(&mut cluster, json!({"parallelMigrationsPerCluster": 3}));
    cluster.settle();
    assert_eq!(slots(&cluster).len(), 3);
    limits(&mut cluster, json!({"parallelMigrationsPerCluster": 1}));
    cluster.settle();
    assert_eq!(slots(&cluster).len(), 3, "what runs goes on");
    for job in ["job-a", "job-b"] {
        cancel(&mut cluster, job);
        cluster.settle();
    }
    assert_eq!(slots(&cluster), ["job-c"]);
    limits(&mut cluster, json!({"parallelMigrationsPerCluster": 2}));
    cluster.settle();
    assert_eq!(slots(&cluster), ["job-c", "job-d"]);
}

#[test]
fn a_missing_ledger_begins_with_the_truth_and_gives_nothing_at_first() {
    let mut cluster = cluster(&[("a", "node1"), ("b", "node1"), ("c", "node1")]);
    ask(&mut cluster, "job-a", "a", None);
    cluster.settle();
    cluster.remove(Kind::ConfigMap, &reference(&Installation::USUAL).name);
    ask(&mut cluster, "job-b", "b", None);
    ask(&mut cluster, "job-c", "c", None);
    assert!(cluster.step(&Key::Turns));
    assert_eq!(slots(&cluster), ["job-a"]);
    assert_eq!(slot(&cluster, "job-a").source, "node1");
    assert!(slot(&cluster, "job-a").target.is_some(), "where its pod is bound");
    let plan = cluster.decide(&Key::Turns);
    assert!(plan.effects.is_empty());
    assert_eq!(plan.wake_at, Some(cluster.now + SETTLE));
    cluster.pass(2);
    cluster.settle();
    assert_eq!(slots(&cluster), ["job-a", "job-b"], "two may leave a node");
}

#[test]
fn a_slot_of_what_is_not_known_is_kept_until_the_watch_is_beyond_it() {
    let mut cluster = cluster(&[("a", "node1")]);
    limits(&mut cluster, json!({"parallelMigrationsPerCluster": 1}));
    let entry = |seen: u64| json!({"migration": "default/x", "vmi": "x", "source": "node1", "seen": seen.to_string()});
    let ahead = cluster.world.horizon(Kind::Migration) + 1_000;
    cluster.patch(
        Kind::ConfigMap,
        &reference(&Installation::USUAL).name,
        json!({"data": {"uid-x": entry(ahead).to_string()}}),
    );
    ask(&mut cluster, "job", "a", None);
    cluster.settle();
    assert_eq!((slots(&cluster), reason(&cluster, "job")), (vec!["x".to_owned()], "ClusterLimit".to_owned()));
    let known = cluster.world.horizon(Kind::Migration);
    cluster.patch(
        Kind::ConfigMap,
        &reference(&Installation::USUAL).name,
        json!({"data": {"uid-x": entry(known).to_string()}}),
    );
    cluster.settle();
    assert_eq!(slots(&cluster), ["job"]);
}

#[test]
fn what_an_older_controller_began_counts() {
    let mut cluster = cluster(&[("a", "node1"), ("b", "node2")]);
    limits(&mut cluster, json!({"parallelMigrationsPerCluster": 1}));
    migrate(&mut cluster, "old", "a");
    let now = cluster.now.to_string();
    cluster.patch(Kind::Migration, &name("old"), json!({"status": {"phase": "Running"}}));
    tell(
        &mut cluster,
        "a",
        json!({"migrationUid": "uid-old", "sourceNode": "node1", "targetNode": "node3", "startTimestamp": now}),
    );
    ask(&mut cluster, "new", "b", None);
    cluster.step(&Key::Turns);
    assert_eq!((slots(&cluster), slot(&cluster, "old").source.as_str()), (vec!["old".to_owned()], "node1"));
    cluster.step(&Key::Turns);
    assert_eq!(slots(&cluster), ["old"]);
}

#[test]
fn one_slot_for_a_vmi() {
    let mut cluster = cluster(&[("a", "node1")]);
    for job in ["one", "two"] {
        migrate(&mut cluster, job, "a");
        cluster.patch(Kind::Migration, &name(job), json!({"status": {"phase": "Pending"}}));
    }
    cluster.step(&Key::Turns);
    assert_eq!(slots(&cluster), ["one"]);
    assert!(!cluster.step(&Key::Turns));
}

#[test]
fn a_vmi_that_may_live_elsewhere_by_now_waits() {
    let mut cluster = cluster(&[("a", "node1")]);
    // The end of an earlier migration is known before what it has made of the VMI.
    migrate(&mut cluster, "earlier", "a");
    let told = json!({"phase": "Succeeded", "migrationState": {"migrationUid": "uid-earlier", "targetNode": "node2"}});
    cluster.patch(Kind::Migration, &name("earlier"), json!({"status": told}));
    ask(&mut cluster, "job", "a", None);
    cluster.settle();
    assert_eq!((slots(&cluster), reason(&cluster, "job")), (Vec::new(), "EarlierUnresolved".to_owned()));
    tell(&mut cluster, "a", json!({"migrationUid": "uid-earlier", "targetNode": "node2", "completed": true}));
    cluster.patch(Kind::VirtualMachineInstance, &name("a"), json!({"status": {"nodeName": "node2"}}));
    cluster.step(&Key::Turns);
    assert_eq!(slot(&cluster, "job").source, "node2");
    assert_eq!(state(&cluster, "a")["completed"], true);
}

#[test]
fn a_quota_is_asked_before_a_slot_is_given() {
    let mut cluster = cluster(&[("a", "node1"), ("b", "node2")]);
    limits(&mut cluster, json!({"parallelMigrationsPerCluster": 1}));
    let quota = |used: &str| {
        json!({
            "metadata": {"name": "small", "namespace": "default"}, "spec": {"hard": {"pods": "3"}},
            "status": {"hard": {"pods": "3"}, "used": {"pods": used}},
        })
    };
    cluster.put(Kind::ResourceQuota, quota("3"));
    ask(&mut cluster, "job-a", "a", None);
    ask(&mut cluster, "job-b", "b", None);
    cluster.settle();
    assert_eq!((slots(&cluster), reason(&cluster, "job-a")), (Vec::new(), "QuotaExceeded".to_owned()));
    let said = migration(&cluster, "job-a")["status"]["message"].as_str().unwrap().to_owned();
    assert!(said.contains("exceeded quota: small, requested: pods=1, used: pods=3, limited: pods=3"), "{said}");
    // There is room for one, and both limits would let two go.
    limits(&mut cluster, json!({}));
    cluster.put(Kind::ResourceQuota, quota("2"));
    cluster.step(&Key::Turns);
    assert_eq!(slots(&cluster), ["job-a"], "the pod that is about to be made counts");
    assert!(!cluster.step(&Key::Turns));
}

#[test]
fn places_are_exact_in_front_and_coarse_behind() {
    let waits = |place| Turn::Waits { limit: None, place };
    let told = |position: u32| MigrationQueuePlace { position: Some(position), limit: None };
    let place = |before: u32, now: u32| queue_place(Some(&told(before)), &waits(now)).unwrap().position.unwrap();
    for (before, now, expected) in
        [(5, 4, 4), (11, 10, 10), (40, 39, 40), (40, 21, 40), (40, 20, 40), (40, 19, 40), (40, 80, 40), (40, 81, 81)]
    {
        let still = expected == before;
        assert_eq!(
            place(before, now),
            if still && before > now / 2 && before < now * 2 { before } else { now },
            "{before} {now}"
        );
    }
    assert_eq!((place(40, 39), place(40, 20), place(12, 11)), (40, 20, 12));
    assert_eq!(queue_place(None, &waits(77)).unwrap().position, Some(77));
    assert_eq!(queue_place(None, &Turn::Granted), None);
}

#[test]
fn few_are_told_that_the_line_has_moved() {
    let vmis: Vec<String> = (0..100).map(|number| format!("v{number:02}")).collect();
    let vmis: Vec<(&str, &str)> = vmis.iter().map(|vmi| (vmi.as_str(), "node1")).collect();
    let mut cluster = cluster(&vmis);
    limits(&mut cluster, json!({"parallelMigrationsPerCluster": 0}));
    for (vmi, _) in &vmis {
        ask(&mut cluster, &format!("job-{vmi}"), vmi, None);
    }
    assert_eq!(cluster.world.turns().waiting(), 100);
    let told: Vec<String> = to_tell(cluster.world.turns()).map(|name| name.name.to_string()).collect();
    assert_eq!(told.len(), 13);
    assert_eq!((told[0].as_str(), told[9].as_str(), told[12].as_str()), ("job-v00", "job-v09", "job-v80"));
}

#[test]
fn who_is_overtaken_is_told() {
    let mut cluster = cluster(&[("a", "node1"), ("b", "node2"), ("c", "node3")]);
    limits(&mut cluster, json!({"parallelMigrationsPerCluster": 1}));
    ask(&mut cluster, "first", "c", None);
    cluster.settle();
    ask(&mut cluster, "hand", "a", None);
    cluster.settle();
    assert_eq!(migration(&cluster, "hand")["status"]["queue"]["position"], 1);
    migrate(&mut cluster, "urgent", "b");
    cluster.patch(Kind::Migration, &name("urgent"), json!({"spec": {"priority": "system-critical"}}));
    let before = cluster.world.get(Kind::Migration, &name("urgent"));
    cluster.step(&Key::Migration(name("urgent")));
    let after = cluster.world.get(Kind::Migration, &name("urgent"));
    let keys = Key::affected(&crate::Change { before, after }, &cluster.world);
    assert!(keys.contains(&Key::Migration(name("hand"))), "{keys:?}");
    cluster.step(&Key::Migration(name("hand")));
    assert_eq!(migration(&cluster, "hand")["status"]["queue"]["position"], 2);
}
