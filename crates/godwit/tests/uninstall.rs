//! What docs/install.md says of uninstalling, carried out as it stands there: afterwards nothing of godwit is left, and nothing waits for it.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::build::Build;
use common::moving::one_launcher_is_left;
use common::real::{API, CONTROLLER, Wishes};
use common::{Cluster, kubectls, rom_vmi, status, text};
use godwit_api::names::KUBEVIRT_NAMESPACE;
use godwit_guest_rom::Parameters;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

const GUEST: &str = "sitter";
/// How long a block of commands of the docs may take.
const COMMANDS_END_WITHIN: Duration = Duration::from_secs(240);
const PATIENCE: Duration = Duration::from_secs(30);
const MOMENT: Duration = Duration::from_millis(50);
/// Of Kubernetes' own controllers those that end what is deleted, and the one that opens nodes.
const KUBERNETES_OWN: [&str; 3] = ["namespace-controller", "garbage-collector-controller", "node-lifecycle-controller"];
/// What the tests' cluster has besides, which is called after what is godwit's.
const FURNITURE: [&str; 7] = [
    "CustomResourceDefinition network-attachment-definitions.k8s.cni.cncf.io",
    "ClusterRole godwit:engine-room",
    "ClusterRoleBinding godwit:engine-room",
    "ClusterRole godwit:node",
    "ClusterRoleBinding godwit:node",
    "StorageClass local",
    "StorageClass shared",
];

/// The blocks of commands in a section of docs/install.md.
fn blocks(section: &str) -> Vec<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/install.md");
    let page = std::fs::read_to_string(page).expect("docs/install.md");
    let heading = format!("\n## {section}\n");
    let (_, rest) = page.split_once(&heading).unwrap_or_else(|| panic!("no section {section}"));
    let section = rest.split("\n## ").next().unwrap_or_default();
    let blocks = section.split("```sh\n").skip(1);
    blocks.map(|block| block.split("```").next().unwrap_or_default().to_owned()).collect()
}

/// Commands at a shell; what still runs of them when this is dropped is killed.
struct Shell {
    child: Option<Child>,
    group: Pid,
}

impl Shell {
    /// Runs commands as somebody whose `kubectl` and `godwit` are these.
    fn start(cluster: &Cluster, kubectl: &Path, commands: &str) -> Self {
        let bin = cluster.data_dir().join("bin");
        if !bin.is_dir() {
            std::fs::create_dir(&bin).expect("a folder");
            symlink(kubectl, bin.join("kubectl")).expect("kubectl");
            symlink(env!("CARGO_BIN_EXE_godwit"), bin.join("godwit")).expect("godwit");
        }
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").expect("a PATH"));
        let limit = COMMANDS_END_WITHIN.as_secs().to_string();
        let child = Command::new("timeout")
            .args(["--kill-after=5", &limit, "bash", "-euxc", commands])
            .env("PATH", path)
            .env("KUBECONFIG", cluster.kubeconfig())
            .env("HOME", cluster.data_dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("bash starts");
        let pid = child.id().expect("it was started").cast_signed();
        Self { child: Some(child), group: Pid::from_raw(pid) }
    }

    /// Waits until they are through, which they have to be without an error.
    async fn succeeds(mut self, cluster: &Cluster) {
        let child = self.child.as_mut().expect("nobody has waited for it");
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let (mut stdout, mut stderr) = (child.stdout.take().expect("a pipe"), child.stderr.take().expect("a pipe"));
        let (status, ..) = tokio::join!(child.wait(), stdout.read_to_end(&mut out), stderr.read_to_end(&mut err));
        self.child = None;
        let said = format!("{}\n{}", text(&out), text(&err));
        println!("{said}");
        assert!(status.expect("it ends").success(), "{said}\n{}", cluster.words());
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        if self.child.is_some() {
            // It may be over already.
            let _ = killpg(self.group, Signal::SIGKILL);
        }
    }
}

/// Ends what stands for the pods of a workload when that has gone, as kubelets do.
async fn goes_with(cluster: &Cluster, kind: &str, workload: &str, processes: &[&str]) {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("apps", "v1", kind));
    let api: Api<DynamicObject> = Api::namespaced_with(cluster.client.clone(), KUBEVIRT_NAMESPACE, &resource);
    // Later than the commands end that delete it: what these have said then is told.
    let deadline = Instant::now() + COMMANDS_END_WITHIN + PATIENCE;
    while api.get_opt(workload).await.expect("get").is_some() {
        assert!(Instant::now() < deadline, "{kind} {workload} does not go\n{}", cluster.words());
        tokio::time::sleep(MOMENT).await;
    }
    let real = cluster.real.as_ref().expect("a real API server");
    for process in processes {
        real.end(process).await;
    }
}

async fn controllers_end(cluster: &Cluster) {
    goes_with(cluster, "Deployment", "virt-controller", &[CONTROLLER]).await;
}

async fn others_end(cluster: &Cluster) {
    tokio::join!(
        goes_with(cluster, "Deployment", "virt-api", &[API]),
        goes_with(cluster, "DaemonSet", "virt-handler", &["node1-handler-1", "node2-handler-1"]),
    );
}

/// Every object of the cluster, but for events.
fn everything(cluster: &Cluster, kubectl: &Path) -> Vec<Value> {
    let kinds = cluster.kubectl(kubectl, &["api-resources", "--verbs=list", "-o", "name"]);
    let kinds: Vec<&str> = kinds.lines().filter(|kind| !kind.starts_with("events")).collect();
    let all = cluster.kubectl(kubectl, &["get", &kinds.join(","), "--all-namespaces", "-o", "json"]);
    let all: Value = serde_json::from_str(&all).expect("JSON");
    all["items"].as_array().expect("items").clone()
}

fn says_godwit(text: &str) -> bool {
    ["kubevirt", "godwit", "medik8s"].iter().any(|word| text.contains(word))
}

/// A cluster with guests, a finished migration and a node in maintenance; the kubectl that has installed it.
async fn in_use() -> Option<(Cluster, std::path::PathBuf)> {
    let kubectl = kubectls().pop()?;
    let build = Build::printed_by(Path::new(env!("CARGO_BIN_EXE_godwit")), KUBEVIRT_NAMESPACE, "new");
    let wishes = Wishes { installed: Some((build, kubectl.clone())), ..Wishes::default() };
    let cluster = Cluster::wished(2, wishes).await?;
    let real = cluster.real.as_ref().expect("a real API server");
    if !real.start_kubernetes_own(&cluster.client, &KUBERNETES_OWN).await {
        return None;
    }
    cluster.build_rom_image(Parameters::default());
    let vm = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "machine"},
        "spec": {"runStrategy": "Always", "template": {"spec": rom_vmi("machine")["spec"]}},
    });
    cluster.apply(vm).await.expect("apply VM");
    cluster.start_rom_guest(GUEST).await;
    cluster.wait(&cluster.vmis(), "machine", "it runs", |vmi| status(vmi, "phase") == "Running").await;
    cluster.migrate(GUEST, "before").await;
    cluster.wait(&cluster.migrations(), "before", "it has moved", |one| status(one, "phase") == "Succeeded").await;
    one_launcher_is_left(&cluster, GUEST).await;
    let kind = GroupVersionKind::gvk("nodemaintenance.medik8s.io", "v1beta1", "NodeMaintenance");
    let maintenances: Api<DynamicObject> = Api::all_with(cluster.client.clone(), &ApiResource::from_gvk(&kind));
    let maintenance = json!({
        "apiVersion": "nodemaintenance.medik8s.io/v1beta1", "kind": "NodeMaintenance", "metadata": {"name": "away"},
        "spec": {"nodeName": "node2"},
    });
    let maintenance: DynamicObject = serde_json::from_value(maintenance).expect("an object");
    maintenances.create(&Default::default(), &maintenance).await.expect("create");
    let closed = |one: &DynamicObject| !status(one, "phase").is_empty();
    cluster.wait(&maintenances, "away", "the node is being emptied", closed).await;
    Some((cluster, kubectl))
}

/// Nothing is left that says godwit, and nothing of others waits for it.
async fn nothing_is_left(cluster: &Cluster, kubectl: &Path) {
    let groups = cluster.kubectl(kubectl, &["api-versions"]);
    assert!(!says_godwit(&groups), "{groups}");
    for node in everything(cluster, kubectl).iter().filter(|one| one["kind"] == "Node") {
        for field in ["labels", "annotations"] {
            assert!(!says_godwit(&node["metadata"][field].to_string()), "{node}");
        }
        assert!(!says_godwit(&node["metadata"]["finalizers"].to_string()), "{node}");
        assert!(node["spec"]["taints"].is_null() && node["spec"]["unschedulable"].is_null(), "{node}");
        for field in ["capacity", "allocatable", "conditions"] {
            assert!(!says_godwit(&node["status"][field].to_string()), "{node}");
        }
    }
    // Nodes say it by what their kubelets are, which here are godwit's too.
    let left: Vec<String> = everything(cluster, kubectl)
        .iter()
        .filter(|one| one["kind"] != "Node" && says_godwit(&one.to_string()))
        .map(|one| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let (kind, meta) = (text(&one["kind"]), &one["metadata"]);
            match meta["namespace"].as_str() {
                Some(namespace) => format!("{kind} {namespace}/{}", text(&meta["name"])),
                None => format!("{kind} {}", text(&meta["name"])),
            }
        })
        .filter(|name| !FURNITURE.contains(&name.as_str()))
        .collect();
    assert_eq!(left, Vec::<String>::new());
}

/// Other people's namespaces end, and their pods may be evicted, whatever they are called.
fn others_go_on(cluster: &Cluster, kubectl: &Path) {
    let manifest = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "others"}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kubevirt-config", "namespace": "others"}},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "virt-launcher-mine", "namespace": "others"},
            "spec": {"containers": [{"name": "one", "image": "none"}]}},
    ]});
    let applied = cluster.try_kubectl(kubectl, &["apply", "-f", "-"], Some(&manifest.to_string()));
    assert!(applied.status.success(), "{}", text(&applied.stderr));
    let eviction = json!({
        "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "virt-launcher-mine", "namespace": "others"},
    });
    let path = "/api/v1/namespaces/others/pods/virt-launcher-mine/eviction";
    let evicted = cluster.try_kubectl(kubectl, &["create", "--raw", path, "-f", "-"], Some(&eviction.to_string()));
    assert!(evicted.status.success(), "{}", text(&evicted.stderr));
    cluster.kubectl(kubectl, &["label", "nodes", "--all", "others=here"]);
    cluster.kubectl(kubectl, &["delete", "namespace", "others", "--timeout=60s"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_after_what_the_docs_say() {
    let Some((cluster, kubectl)) = in_use().await else { return };
    let [uninstall, unmark, _] = commands();
    let ending = Shell::start(&cluster, &kubectl, &uninstall).succeeds(&cluster);
    tokio::join!(ending, controllers_end(&cluster), others_end(&cluster));
    Shell::start(&cluster, &kubectl, &unmark).succeeds(&cluster).await;
    nothing_is_left(&cluster, &kubectl).await;
    others_go_on(&cluster, &kubectl);
}

/// The section's three blocks: how to, what stays on Nodes, and what to do when the controllers went first.
fn commands() -> [String; 3] {
    let blocks = blocks("Uninstall");
    blocks.try_into().unwrap_or_else(|blocks| panic!("three blocks of commands: {blocks:?}"))
}

/// The controllers are gone before the VMs.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_when_the_controllers_went_first() {
    let Some((cluster, kubectl)) = in_use().await else { return };
    let [uninstall, unmark, by_hand] = commands();
    let last = uninstall.trim_end().lines().last().expect("a command");
    cluster.kubectl(&kubectl, &["-n", KUBEVIRT_NAMESPACE, "delete", "deployment", "virt-controller"]);
    controllers_end(&cluster).await;
    let mut waits = std::pin::pin!(Shell::start(&cluster, &kubectl, last).succeeds(&cluster));
    tokio::select! {
        biased;
        () = &mut waits => panic!("it does not wait for the VMs"),
        () = others_end(&cluster) => {}
    }
    Shell::start(&cluster, &kubectl, &by_hand.replace("NODE", "node2")).succeeds(&cluster).await;
    waits.await;
    Shell::start(&cluster, &kubectl, &unmark).succeeds(&cluster).await;
    nothing_is_left(&cluster, &kubectl).await;
    others_go_on(&cluster, &kubectl);
}
