//! `godwit plan drain` and `godwit drain` on real guests.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::terminal::Terminal;
use common::{Cluster, rom_vmi, status, text};
use godwit_guest_rom::Parameters;
use k8s_openapi::api::core::v1::Node;
use kube::api::DynamicObject;
use kube::{Api, ResourceExt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A kubeconfig of somebody who may look at everything and write nothing.
async fn looker(cluster: &Cluster) -> PathBuf {
    cluster
        .apply_cluster(json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "looks"},
            "rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["get", "list"]}],
        }))
        .await;
    cluster
        .apply_cluster(json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "looks"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "looks"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "looker"}],
        }))
        .await;
    let text = std::fs::read_to_string(cluster.kubeconfig()).expect("kubeconfig");
    let mut config: Value = serde_saphyr::from_str(&text).expect("YAML");
    config["users"][0]["user"]["as"] = "looker".into();
    let path = cluster.data_dir().join("looker.kubeconfig");
    std::fs::write(&path, config.to_string()).expect("write");
    path
}

trait ApplyCluster {
    async fn apply_cluster(&self, object: Value);
}

impl ApplyCluster for Cluster {
    async fn apply_cluster(&self, object: Value) {
        let object: DynamicObject = serde_json::from_value(object).expect("an object");
        let gvk = kube::api::GroupVersionKind::try_from(object.types.as_ref().expect("types")).expect("apiVersion");
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &kube::api::ApiResource::from_gvk(&gvk));
        let params = kube::api::PatchParams::apply("test").force();
        api.patch(&object.name_any(), &params, &kube::api::Patch::Apply(&object)).await.expect("apply");
    }
}

fn godwit(kubeconfig: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_godwit"));
    command.args(arguments).arg("--kubeconfig").arg(kubeconfig);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(kubeconfig: &Path, arguments: &[&str]) -> Output {
    godwit(kubeconfig, arguments).output().expect("godwit starts")
}

fn plan(kubeconfig: &Path, nodes: &[&str]) -> (Option<i32>, Value) {
    let output = run(kubeconfig, &[&["plan", "drain", "-o", "json", "--force"], nodes].concat());
    let plan = serde_json::from_slice(&output.stdout);
    (output.status.code(), plan.unwrap_or_else(|error| panic!("{error}: {}", text(&output.stderr))))
}

/// A guest that is known to be migratable or not.
fn is_known(vmi: &DynamicObject) -> bool {
    let conditions = vmi.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
    status(vmi, "phase") == "Running" && conditions.iter().any(|condition| condition["type"] == "LiveMigratable")
}

fn vm(name: &str, run_strategy: &str, strategy: Option<&str>) -> Value {
    let mut spec = rom_vmi(name)["spec"].clone();
    if let Some(strategy) = strategy {
        spec["evictionStrategy"] = strategy.into();
    }
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": name},
        "spec": {"runStrategy": run_strategy, "template": {"spec": spec}},
    })
}

fn nodes(cluster: &Cluster) -> Api<Node> {
    Api::all(cluster.client.clone())
}

/// Starts these on one node.
async fn start_on(cluster: &Cluster, node: &str, objects: Vec<Value>) {
    let others: Vec<String> =
        ["node1", "node2", "node3"].iter().filter(|other| **other != node).map(|other| (*other).to_owned()).collect();
    for other in &others {
        nodes(cluster).cordon(other).await.expect("cordon");
    }
    let mut names = Vec::new();
    for object in objects {
        names.push(object["metadata"]["name"].as_str().unwrap().to_owned());
        cluster.apply(object).await.expect("apply");
    }
    for name in &names {
        let vmi = cluster.wait(&cluster.vmis(), name, "it runs and is known", is_known).await;
        assert_eq!(status(&vmi, "nodeName"), node);
    }
    for other in &others {
        nodes(cluster).uncordon(other).await.expect("uncordon");
    }
}

/// Ends a process when a test fails before it does.
struct Ends(Option<Pid>);

impl Drop for Ends {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

fn is_cordoned(node: &Node) -> bool {
    node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true)
}

/// The VMs of a plan: outcome and target.
fn told(plan: &Value) -> BTreeMap<String, (String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let vms = plan["vms"].as_array().cloned().unwrap_or_default();
    vms.iter().map(|vm| (text(&vm["name"]), (text(&vm["outcome"]), text(&vm["targetNode"])))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_plan_foretells_is_what_the_drain_does() {
    let cluster = Cluster::start(3).await;
    // 40 MiB a second to 12 of the 16 MiB that they have.
    cluster.build_rom_image(Parameters { pages_per_tick: 100, last: 0xd0_0000, ..Parameters::default() });
    cluster
        .apply(json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "own"},
            "spec": {"storageClassName": "local", "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "1Mi"}}},
        }))
        .await
        .expect("claim");
    let mut stuck = rom_vmi("stuck");
    stuck["spec"]["evictionStrategy"] = "LiveMigrate".into();
    stuck["spec"]["volumes"] = json!([{"name": "data", "persistentVolumeClaim": {"claimName": "own"}}]);
    stuck["spec"]["domain"]["devices"]["disks"] = json!([{"name": "data", "disk": {"bus": "virtio"}}]);
    let guests = vec![
        vm("mover", "Always", Some("LiveMigrate")),
        vm("willing", "Always", Some("LiveMigrateIfPossible")),
        vm("again", "Always", None),
        vm("once", "RerunOnFailure", Some("None")),
        stuck,
    ];
    start_on(&cluster, "node1", guests).await;
    // Nobody has moved them, and what they write is known.
    for name in ["mover", "willing"] {
        let measured = |vmi: &DynamicObject| !vmi.data["status"]["dirtyRate"].is_null();
        let vmi = cluster.wait(&cluster.vmis(), name, "it is measured", measured).await;
        let rate = &vmi.data["status"]["dirtyRate"];
        assert!(rate["bytesPerSecond"].as_u64().is_some_and(|rate| rate > 0), "{rate}");
        assert_eq!(rate["memoryBytes"], 16 << 20, "{rate}");
    }

    // Somebody who may only look gets the plan; whatever it wrote would be refused.
    let eyes = looker(&cluster).await;
    let (code, blocked) = plan(&eyes, &["node1"]);
    assert_eq!(code, Some(2), "{blocked}");
    let outcomes = told(&blocked);
    let outcome = |name: &str| outcomes[name].0.as_str();
    assert_eq!(
        ["mover", "willing", "again", "once", "stuck"].map(outcome),
        ["Migrate", "Migrate", "ShutDown", "ShutDown", "Block"],
        "{blocked}"
    );
    let why =
        blocked["vms"].as_array().unwrap().iter().find(|vm| vm["name"] == "stuck").unwrap()["reasons"].to_string();
    assert!(why.contains("volume data") && why.contains("PVC own is not shared"), "{why}");
    assert!(blocked["duration"]["milliseconds"].as_u64().is_some_and(|ms| ms > 0), "{blocked}");
    let measured =
        |name: &str| blocked["vms"].as_array().unwrap().iter().find(|vm| vm["name"] == name).unwrap().clone();
    for name in ["mover", "willing"] {
        let vm = measured(name);
        assert_eq!((&vm["basis"], &vm["bandwidthBasis"]), (&json!("DirtyRate"), &json!("Configured")), "{vm}");
        assert!(vm["dirtyBytesPerSecond"].as_u64().is_some_and(|rate| rate > 0), "{vm}");
        assert!(vm["duration"]["milliseconds"].as_u64().is_some_and(|ms| ms > 0), "{vm}");
    }
    assert!(!is_cordoned(&nodes(&cluster).get("node1").await.unwrap()));
    let people = text(&run(&eyes, &["plan", "drain", "node1"]).stdout);
    assert!(people.contains("default/stuck") && people.contains("BLOCK"), "{people}");
    let line = |name: &str| people.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    assert!(line("default/mover").contains(" measured "), "{people}");
    assert!(people.contains("bandwidth: 64 MiB/s for 2 VMs: what is allowed"), "{people}");
    let unknown = run(&eyes, &["plan", "drain", "node7"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("there is no node node7; the cluster has node1, node2, node3"));

    // Something blocks: without a word nothing is begun, with one the rest leaves, and it is said what stays and why.
    let own = cluster.kubeconfig();
    let refused = run(&own, &["drain", "node1"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(!is_cordoned(&nodes(&cluster).get("node1").await.unwrap()));
    let partly = tokio::task::block_in_place(|| run(&own, &["drain", "node1", "--yes", "--timeout", "300s"]));
    let said = text(&partly.stdout) + &text(&partly.stderr);
    assert_eq!(partly.status.code(), Some(2), "{said}\n{}", cluster.words());
    assert!(said.contains("stays: default/stuck: VMI stuck is configured with an eviction strategy"), "{said}");
    assert!(said.contains("PVC own is not shared"), "{said}");
    assert!(is_cordoned(&nodes(&cluster).get("node1").await.unwrap()));
    let runs_on = |vmi: &DynamicObject| match status(vmi, "phase").as_str() {
        "Running" => status(vmi, "nodeName"),
        _ => String::new(),
    };
    // Which of the two each goes to depends on when `again` is started there.
    for name in ["mover", "willing"] {
        let (came, foretold) = (runs_on(&cluster.vmis().get(name).await.unwrap()), &outcomes[name].1);
        for node in [&came, foretold] {
            assert!(["node2", "node3"].contains(&node.as_str()), "{name}: {came}, foretold: {foretold}\n{said}");
        }
    }
    // What was foretold, and what came: for whoever reads this.
    let records = cluster.api("godwit.io", "v1alpha1", "MigrationRecord");
    for name in ["mover", "willing"] {
        let record = record_of(&records, name).await;
        let came = &record.data["spec"];
        assert_eq!(came["bandwidthBytesPerSecond"], 64 << 20, "{came}");
        assert!(came["totalMilliseconds"].as_u64().is_some(), "{came}");
        let foretold = measured(name);
        eprintln!(
            "{name}: foretold {} and standstill {}; came {} ms, {} ms, {}",
            foretold["duration"],
            foretold["downtime"],
            came["totalMilliseconds"],
            came["downtimeMilliseconds"],
            came["sent"]
        );
    }
    let vmi = cluster.wait(&cluster.vmis(), "again", "it is started again", |vmi| !runs_on(vmi).is_empty()).await;
    assert_ne!(runs_on(&vmi), "node1");
    assert_eq!(runs_on(&cluster.vmis().get("stuck").await.unwrap()), "node1");
    // Its pod is gone; that it has ended is written down in its own time.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let Some(once) = cluster.vmis().get_opt("once").await.unwrap() else { break };
        if status(&once, "phase") == "Succeeded" {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "once has not ended: {}\n{}", once.data, cluster.words());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }

    // Without it the node is empty, and the drain has nothing left to do.
    cluster.vmis().delete("stuck", &Default::default()).await.expect("delete");
    cluster.wait_gone(&cluster.vmis(), "stuck").await;
    let empty = tokio::task::block_in_place(|| run(&own, &["drain", "node1", "--timeout", "300s"]));
    assert_eq!(empty.status.code(), Some(0), "{}{}", text(&empty.stdout), text(&empty.stderr));
    assert_eq!(plan(&eyes, &["node1"]).1["vms"], Value::Null);
}

/// What is written down of a VMI's migration, which comes in its own time.
async fn record_of(records: &Api<DynamicObject>, vmi: &str) -> DynamicObject {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let all = records.list(&Default::default()).await.expect("list").items;
        if let Some(record) = all.into_iter().find(|record| record.data["spec"]["vmiName"] == vmi) {
            return record;
        }
        assert!(std::time::Instant::now() < deadline, "nothing is written down of {vmi}'s migration");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Looks at the live lines, and breaks the drain off with Ctrl-C.
fn at_a_terminal(cluster: &Cluster, columns: u16) {
    let own = cluster.kubeconfig();
    let arguments = ["drain", "node1", "--yes", "--kubeconfig", own.to_str().unwrap()];
    let mut terminal = Terminal::run(Path::new(env!("CARGO_BIN_EXE_godwit")), &arguments, columns);
    // The plan above them has rows as well, with the node that is left.
    let of = |lines: &[String], name: &str| -> Vec<String> {
        let live = |line: &&String| line.split_whitespace().next() == Some(name) && !line.contains(" node1 ");
        lines.iter().filter(live).cloned().collect()
    };
    // It is slow enough to be seen, and one waits for its turn.
    let seen = terminal.shows("somebody who moves", |lines| {
        let moves = |name: &&str| of(lines, name).iter().any(|line| line.contains("%"));
        ["default/a", "default/b", "default/c"].iter().any(moves)
            && lines.last().is_some_and(|line| line.starts_with("0 of 4 have left, "))
    });
    for name in ["a", "b", "c", "held"] {
        assert_eq!(of(&seen, &format!("default/{name}")).len(), 1, "one line each: {seen:#?}");
    }
    terminal.press("\x03");
    let (code, last) = terminal.end();
    assert_eq!(code, Some(130), "{last:#?}\n{}", cluster.words());
    // What was seen then stays above.
    let interrupted = last.iter().position(|line| line.starts_with("interrupted: everything is taken back"));
    let last = last[interrupted.unwrap_or_else(|| panic!("{last:#?}"))..].to_vec();
    for name in ["a", "b", "c", "held"] {
        let lines = of(&last, &format!("default/{name}"));
        assert_eq!(lines.len(), 1, "{name}: {last:#?}");
        assert!(lines[0].contains("stays where it is"), "{last:#?}");
    }
    assert!(last.iter().any(|line| line.starts_with("taken back: no VM is to leave")), "{last:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_is_broken_off_leaves_nothing_behind() {
    let cluster = Cluster::start(3).await;
    cluster.build_rom_image(Parameters::default());
    let names = ["a", "b", "c", "held"];
    let guests = names.iter().map(|name| {
        let mut vmi = rom_vmi(name);
        // Nobody moves the last one, so the drain never comes to its end by itself.
        vmi["spec"]["evictionStrategy"] = if *name == "held" { "External" } else { "LiveMigrate" }.into();
        vmi
    });
    start_on(&cluster, "node1", guests.collect()).await;
    let kubevirts: Api<DynamicObject> = Api::namespaced_with(
        cluster.client.clone(),
        "kubevirt",
        &kube::api::ApiResource::from_gvk(&kube::api::GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt")),
    );
    // Slowly, so that something is under way when it is broken off.
    let slow = json!({"spec": {"configuration": {"migrations": {"bandwidthPerMigration": "1Ki"}}}});
    let merge = kube::api::Patch::Merge(&slow);
    kubevirts.patch("kubevirt", &Default::default(), &merge).await.expect("configure");

    let drain = godwit(&cluster.kubeconfig(), &["drain", "node1"]).spawn().expect("godwit starts");
    let pid = Pid::from_raw(i32::try_from(drain.id()).unwrap());
    let mut guard = Ends(Some(pid));
    let all = cluster.migrations();
    let evacuated = |migration: &DynamicObject| {
        migration.annotations().get("kubevirt.io/evacuationMigration").is_some_and(|node| node == "node1")
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    loop {
        let list = all.list(&Default::default()).await.expect("list").items;
        let held = cluster.vmis().get("held").await.expect("VMI");
        if list.iter().any(evacuated) && status(&held, "evacuationNodeName") == "node1" {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "no migration runs: {}", cluster.words());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(is_cordoned(&nodes(&cluster).get("node1").await.unwrap()));
    kill(pid, Signal::SIGINT).expect("SIGINT");
    guard.0 = None;
    let output = tokio::task::block_in_place(|| drain.wait_with_output().expect("it ends"));
    let said = text(&output.stdout) + &text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{said}\n{}", cluster.words());
    assert!(said.contains("taken back: no VM is to leave, and node1 may take pods again"), "{said}");

    assert!(!is_cordoned(&nodes(&cluster).get("node1").await.unwrap()), "{said}");
    for migration in all.list(&Default::default()).await.expect("list").items {
        assert!(["Succeeded", "Failed"].contains(&status(&migration, "phase").as_str()), "{migration:?}");
    }
    for name in names {
        let vmi = cluster.vmis().get(name).await.unwrap();
        assert_eq!(status(&vmi, "phase"), "Running");
        assert_eq!(status(&vmi, "evacuationNodeName"), "", "{said}");
    }
    // The same at a terminal, also at a narrow one.
    for columns in [80, 40] {
        tokio::task::block_in_place(|| at_a_terminal(&cluster, columns));
    }
    // What was cordoned before is so afterwards.
    nodes(&cluster).cordon("node1").await.expect("cordon");
    let timed = tokio::task::block_in_place(|| run(&cluster.kubeconfig(), &["drain", "node1", "--timeout", "1s"]));
    let said = text(&timed.stdout) + &text(&timed.stderr);
    assert_eq!(timed.status.code(), Some(130), "{said}\n{}", cluster.words());
    assert!(said.contains("what was cordoned before is (node1)"), "{said}");
    assert!(is_cordoned(&nodes(&cluster).get("node1").await.unwrap()));
    for name in names {
        assert_eq!(status(&cluster.vmis().get(name).await.unwrap(), "evacuationNodeName"), "", "{said}");
    }
}
