//! An older godwit, of which everything is replaced by the one under test, one after the other, under guests that move all the while;
//! and back. The older one is the binary that `GODWIT_OLD` names: `make test-upgrade` builds it.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::build::Build;
use common::flights::{Stage, TOKEN};
use common::moving::{guest_runs_on_in, one_launcher_is_left};
use common::real::{API, CONTROLLER, OTHER_API, STANDBY, Wishes};
use common::{Cluster, kill_hard, kubectls, qemus, rom_vmi, status, text};
use godwit_api::names::KUBEVIRT_NAMESPACE;
use godwit_guest_rom::Parameters;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A guest that stays in the launcher that the older version has made, until its workload is updated.
const SITTER: &str = "sitter";
/// A VM that the older version has stored, and nobody has started.
const HALTED: &str = "halted";

/// The build under test, under an image that tells its launchers from older ones.
fn new() -> Build {
    Build::printed_by(Path::new(env!("CARGO_BIN_EXE_godwit")), KUBEVIRT_NAMESPACE, "new")
}

fn vm(name: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": name},
        "spec": {"runStrategy": "Halted", "template": {"spec": rom_vmi(name)["spec"]}},
    })
}

fn is_paused(vmi: &DynamicObject) -> bool {
    vmi.data["status"]["conditions"].to_string().contains("\"Paused\"")
}

/// Moves the guest once.
async fn moves(stage: &Stage, what: &str) {
    println!("{what}");
    let flight = stage.depart().await;
    stage.arrive(&flight).await;
}

/// The webhooks and the subresources answer, and the handler of the guest's node does what is asked of it. More than once: of two
/// `godwit api`s either may be asked.
async fn all_answer(stage: &Stage) {
    let cluster = &stage.cluster;
    for _ in 0..4 {
        let wrong = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
            "metadata": {"name": "none"}, "spec": {"vmiName": "nobody"},
        });
        let refused = cluster.apply(wrong).await.expect_err("there is no such VMI").to_string();
        assert!(refused.contains("the VMI \"default/nobody\" does not exist"), "{refused}");
        for (action, wanted) in [("pause", true), ("unpause", false)] {
            let (code, said) = cluster.put_action(None, ("virtualmachineinstances", SITTER, action), &json!({})).await;
            assert_eq!(code, 200, "{action}: {said}\n{}", cluster.words());
            cluster.wait(&cluster.vmis(), SITTER, action, |vmi| is_paused(vmi) == wanted).await;
        }
    }
}

/// Each `godwit api` is replaced by one of the build that is installed now; requests go to both for a while.
async fn replace_apis(stage: &Stage) {
    let real = stage.real();
    real.start_api_process(OTHER_API);
    stage.cluster.is_asked(OTHER_API, true).await;
    println!("an api of each version");
    all_answer(stage).await;
    moves(stage, "with an api of each version").await;
    real.end(API).await;
    stage.cluster.is_asked(API, false).await;
    all_answer(stage).await;
    real.start_api_process(API);
    stage.cluster.is_asked(API, true).await;
    real.end(OTHER_API).await;
    stage.cluster.is_asked(OTHER_API, false).await;
}

/// The controller is replaced, while the guest is on its way, by one of the build that is installed now.
async fn replace_controller(stage: &Stage, before: &str, after: &str) {
    let real = stage.real();
    real.start_controller(after);
    stage.says(after, "all kinds listed").await;
    let flight = stage.depart().await;
    real.launch(&real.build());
    real.end(before).await;
    stage.leads(after).await;
    println!("a migration that one controller has begun and the other ends");
    stage.arrive(&flight).await;
    moves(stage, "to a launcher of the other version").await;
    all_answer(stage).await;
}

/// The handlers are replaced one after the other by those of the build that is installed now: that of the source while the guest is on
/// its way, then that of the target; in between it moves in both directions.
async fn replace_handlers(stage: &Stage, turn: usize) {
    let first = status(&stage.vmi().await, "nodeName");
    let flight = stage.depart().await;
    let second = status(&stage.vmi().await, "migrationState/targetNode");
    stage.roll(&first, turn).await;
    println!("the source's handler is replaced");
    stage.arrive(&flight).await;
    all_answer(stage).await;
    moves(stage, "from a handler of the version before to one of that which comes").await;
    moves(stage, "from a handler of the version that comes to one of that before").await;
    moves(stage, "and back").await;
    let flight = stage.depart().await;
    assert_eq!(flight.from, first);
    stage.roll(&second, turn).await;
    println!("the target's handler is replaced");
    stage.arrive(&flight).await;
    all_answer(stage).await;
}

fn kubevirt(cluster: &Cluster) -> kube::Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
    kube::Api::namespaced_with(cluster.client.clone(), KUBEVIRT_NAMESPACE, &resource)
}

/// The image of a VMI's only launcher, and its node.
async fn launcher_of(cluster: &Cluster, vmi: &str) -> (String, String, Value) {
    one_launcher_is_left(cluster, vmi).await;
    let (pod, node) = cluster.launchers(vmi).await.remove(0);
    let object = cluster.pods().get(&pod).await.expect("pod");
    let containers = object.data["spec"]["containers"].as_array().expect("containers");
    let compute = containers.iter().find(|one| one["name"] == "compute").expect("its container");
    (pod, node, compute["image"].clone())
}

/// The guests that run in launchers of an older image get new ones, and stay where they are.
async fn update_workloads(stage: &Stage, old: &Build, new: &Build) {
    let cluster = &stage.cluster;
    let (_, home, image) = launcher_of(cluster, SITTER).await;
    assert_eq!(image, old.image.as_str());
    let outdated = |vmi: &DynamicObject| {
        vmi.metadata.labels.as_ref().is_some_and(|all| all.contains_key("kubevirt.io/outdatedLauncherImage"))
    };
    cluster.wait(&cluster.vmis(), SITTER, "it is known to be outdated", outdated).await;
    let strategy = json!({"spec": {"workloadUpdateStrategy": {"workloadUpdateMethods": ["LiveMigrate"]},
        "configuration": {"migrations": {"bandwidthPerMigration": null}}}});
    kubevirt(cluster).patch("kubevirt", &Default::default(), &Patch::Merge(strategy)).await.expect("patch");
    let moved = |vmi: &DynamicObject| status(vmi, "migrationState/completed") == "true" && !outdated(vmi);
    let vmi = cluster.wait(&cluster.vmis(), SITTER, "its launcher is replaced", moved).await;
    let (pod, node, image) = launcher_of(cluster, SITTER).await;
    assert_eq!(image, new.image.as_str());
    assert_eq!(node, home, "{}", vmi.data);
    assert_eq!(status(&vmi, "migrationState/progress/memory"), "ByReference", "{}", vmi.data);
    guest_runs_on_in(cluster, &pod, TOKEN).await;
    let none = |kubevirt: &DynamicObject| status(kubevirt, "outdatedVirtualMachineInstanceWorkloads") == "0";
    cluster.wait(&kubevirt(cluster), "kubevirt", "no launcher is outdated", none).await;
    let back = json!({"spec": {"workloadUpdateStrategy": null, "configuration": {"migrations": {"bandwidthPerMigration": "1"}}}});
    kubevirt(cluster).patch("kubevirt", &Default::default(), &Patch::Merge(back)).await.expect("patch");
}

/// A VM is started and stopped.
async fn starts_and_stops(cluster: &Cluster, name: &str) {
    for (action, phase) in [("start", "Running"), ("stop", "")] {
        let (code, said) = cluster.put_action(None, ("virtualmachines", name, action), &Value::Null).await;
        assert_eq!(code, 202, "{action}: {said}");
        match phase {
            "" => cluster.wait_gone(&cluster.vmis(), name).await,
            phase => drop(cluster.wait(&cluster.vmis(), name, phase, |vmi| status(vmi, "phase") == phase).await),
        }
    }
}

/// Asserts that a process is of this build.
fn is_of(cluster: &Cluster, process: &str, build: &Build) {
    let program = std::fs::read_link(format!("/proc/{}/exe", cluster.pid(process))).expect("its program");
    assert_eq!(program, build.program.canonicalize().expect("a path"), "{process}");
}

/// Asserts that a guest's launcher, under which its QEMU runs, is of this build.
async fn launcher_is_of(cluster: &Cluster, vmi: &str, build: &Build) {
    let vmi = cluster.vmis().get(vmi).await.expect("VMI");
    let (mut pid, _) = qemus(&vmi).remove(0);
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
        let (_, rest) = stat.rsplit_once(") ").expect("a name");
        pid = rest.split(' ').nth(1).expect("its parent").parse().expect("a number");
        assert!(pid > 1, "no godwit above the QEMU");
        let program = PathBuf::from(format!("/proc/{pid}/exe"));
        if std::fs::read_link(&program).is_ok_and(|path| path.ends_with("godwit")) {
            // It is a copy.
            let size = |path: &Path| std::fs::metadata(path).expect("a file").len();
            assert_eq!(size(&program), size(&build.program));
            return;
        }
    }
}

/// What the API server has refused to a component, by their logs.
fn refusals(cluster: &Cluster) -> Vec<String> {
    let logs = std::fs::read_dir(cluster.data_dir().join("log")).expect("logs").flatten();
    let ours = logs.filter(|log| {
        let name = log.file_name().to_string_lossy().into_owned();
        [API, OTHER_API, CONTROLLER, STANDBY].contains(&name.trim_end_matches(".log")) || name.contains("-handler-")
    });
    let lines = ours.flat_map(|log| {
        let text = std::fs::read_to_string(log.path()).unwrap_or_default();
        let name = log.file_name().to_string_lossy().into_owned();
        text.lines().map(|line| format!("{name}: {line}")).collect::<Vec<_>>()
    });
    lines.filter(|line| line.to_lowercase().contains("forbidden")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_replaced_by_the_next_version_and_back_under_guests_that_move() {
    let Some(old) = Build::old() else { return };
    let Some(kubectl) = kubectls().pop() else { return };
    let new = new();
    let wishes = Wishes { installed: Some((old.clone(), kubectl.clone())), ..Wishes::default() };
    let Some(cluster) = Cluster::wished(2, wishes).await else { return };
    let stage = Stage::of(cluster).await;
    let cluster = &stage.cluster;
    let rolls = async {
        cluster.is_asked(API, true).await;
        let mut sitter = rom_vmi(SITTER);
        sitter["metadata"]["annotations"] = json!({"godwit.io/guest-memory": "shareable"});
        cluster.apply(sitter).await.expect("apply VMI");
        cluster.wait(&cluster.vmis(), SITTER, "it runs", |vmi| status(vmi, "phase") == "Running").await;
        cluster.apply(vm(HALTED)).await.expect("apply VM");
        moves(&stage, "all is old").await;
        all_answer(&stage).await;
        for process in [API, CONTROLLER, "node1-handler-1", "node2-handler-1"] {
            is_of(cluster, process, &old);
        }
        launcher_is_of(cluster, SITTER, &old).await;

        let flight = stage.depart().await;
        stage.real().apply_manifests(&kubectl, &new);
        stage.real().install(&new);
        println!("the new manifests are applied under a migration");
        stage.arrive(&flight).await;
        replace_apis(&stage).await;
        replace_controller(&stage, CONTROLLER, STANDBY).await;
        replace_handlers(&stage, 1).await;
        moves(&stage, "all is new").await;
        starts_and_stops(cluster, HALTED).await;
        update_workloads(&stage, &old, &new).await;
        for process in [API, STANDBY, "node1-handler-2", "node2-handler-2"] {
            is_of(cluster, process, &new);
        }
        launcher_is_of(cluster, SITTER, &new).await;
        cluster.apply(vm("later")).await.expect("apply VM");

        println!("and back");
        stage.real().apply_manifests(&kubectl, &old);
        stage.real().install(&old);
        replace_handlers(&stage, 2).await;
        replace_controller(&stage, STANDBY, CONTROLLER).await;
        replace_apis(&stage).await;
        for process in [API, CONTROLLER, "node1-handler-3", "node2-handler-3"] {
            is_of(cluster, process, &old);
        }
        for name in ["later", HALTED] {
            starts_and_stops(cluster, name).await;
        }
    };
    tokio::select! {
        () = cluster.tells_endpoints() => {}
        () = rolls => {}
    }
    assert_eq!(refusals(cluster), Vec::<String>::new());
}

/// What `godwit up` has started goes on, and is replaced by what the next version's `godwit up` starts.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_on_one_machine_is_replaced_process_by_process() {
    let Some(old) = Build::old() else { return };
    let new = new();
    let mut cluster = Cluster::up_by(&old.program, 2).await;
    cluster.build_rom_image(Parameters { token: TOKEN, ..Parameters::default() });
    cluster.start_rom_guest(SITTER).await;
    cluster.apply(vm(HALTED)).await.expect("apply VM");
    let nodes = ["node1", "node2"];
    for process in ["control-plane", "node1", "node2"] {
        is_of(&cluster, process, &old);
        // By SIGTERM, kubelets before this version may take their guests with them.
        kill_hard(cluster.pid(process));
        let output = cluster.godwit(&["up", "--nodes", "2", "--detach"]);
        assert!(output.status.success(), "godwit up: {}", text(&output.stderr));
        cluster.reconnect().await;
        is_of(&cluster, process, &new);
        // There and back: with nodes of both versions.
        for turn in nodes {
            let name = format!("{process}-{turn}");
            cluster.migrate(SITTER, &name).await;
            let over = |one: &DynamicObject| ["Succeeded", "Failed"].contains(&status(one, "phase").as_str());
            let migration = cluster.wait(&cluster.migrations(), &name, "it is over", over).await;
            assert_eq!(status(&migration, "phase"), "Succeeded", "{}\n{}", migration.data, cluster.words());
            one_launcher_is_left(&cluster, SITTER).await;
            let vmi = cluster.vmis().get(SITTER).await.expect("VMI");
            guest_runs_on_in(&cluster, &status(&vmi, "migrationState/targetPod"), TOKEN).await;
        }
    }
    starts_and_stops(&cluster, HALTED).await;
}
