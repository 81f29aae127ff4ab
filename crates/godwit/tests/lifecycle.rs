//! `godwit up`, `status`, `down`: what is there, what survives, what is left.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{Cluster, godwit, text};
use serde_json::{Value, json};
use std::process::Command;

fn status_of(cluster: &Cluster) -> Value {
    let output = cluster.godwit(&["status", "-o", "json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

async fn config_map(cluster: &Cluster, name: &str) -> Option<Value> {
    let found = cluster.api("", "v1", "ConfigMap").get_opt(name).await.expect("get");
    found.map(|object| object.data["data"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_survive_kill_and_down_and_up_again() {
    let cluster = Cluster::up(2).await;
    let make =
        |name: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": name}});
    cluster.apply(make("one")).await.expect("apply");
    let before = status_of(&cluster);
    assert_eq!(before["nodes"].as_array().expect("nodes").len(), 2);
    let pid = before["processes"][0]["pid"].as_i64().expect("pid of the control plane");
    let nodes: Vec<Value> = before["processes"].as_array().expect("processes")[1..].to_vec();
    // Straight after it: `up` itself waits until the port is free.
    let process = nix::unistd::Pid::from_raw(pid.try_into().expect("pid"));
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL).expect("kill");
    let output = cluster.godwit(&["up", "--nodes", "2", "--detach"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let after = status_of(&cluster);
    assert_ne!(after["processes"][0]["pid"].as_i64(), Some(pid));
    assert_eq!(after["processes"].as_array().expect("processes")[1..], nodes, "the nodes were not disturbed");
    let client = godwit_standalone::client(&cluster.kubeconfig()).await.expect("client");
    let cluster = Reconnected { cluster, client };
    assert_eq!(cluster.config_map("one").await, Some(json!({"k": "one"})));

    let output = cluster.cluster.godwit(&["down"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = cluster.cluster.godwit(&["up", "--nodes", "2", "--detach"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let client = godwit_standalone::client(&cluster.cluster.kubeconfig()).await.expect("client");
    let cluster = Reconnected { client, ..cluster };
    assert_eq!(cluster.config_map("one").await, Some(json!({"k": "one"})));
}

/// A cluster whose API server may have another port by now.
struct Reconnected {
    cluster: Cluster,
    client: kube::Client,
}

impl Reconnected {
    async fn config_map(&self, name: &str) -> Option<Value> {
        let api: kube::Api<k8s_openapi::api::core::v1::ConfigMap> = kube::Api::default_namespaced(self.client.clone());
        api.get_opt(name).await.expect("get").map(|object| json!(object.data))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kubevirt_is_deployed_from_the_start() {
    let cluster = Cluster::up(1).await;
    let api: kube::Api<kube::api::DynamicObject> = kube::Api::namespaced_with(
        cluster.client.clone(),
        "kubevirt",
        &kube::api::ApiResource::from_gvk(&kube::api::GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt")),
    );
    let kubevirt = api.get("kubevirt").await.expect("it is there as soon as `godwit up` has said ready");
    assert_eq!(common::status(&kubevirt, "phase"), "Deployed");
    assert_eq!(config_map(&cluster, "nothing").await, None);
}

/// An object of the cluster's own, by its kind.
fn own(client: &kube::Client, group: &str, kind: &str) -> kube::Api<kube::api::DynamicObject> {
    let version = kube::api::GroupVersionKind::gvk(group, "v1", kind);
    let mut resource = kube::api::ApiResource::from_gvk(&version);
    if kind == "StorageClass" {
        resource.plural = "storageclasses".to_owned();
    }
    match kind {
        "KubeVirt" => kube::Api::namespaced_with(client.clone(), "kubevirt", &resource),
        _ => kube::Api::all_with(client.clone(), &resource),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_data_directory_is_brought_up_to_date() {
    let cluster = Cluster::up(1).await;
    let crds = ("apiextensions.k8s.io", "CustomResourceDefinition", "migrationrecords.godwit.io");
    let controller = ("rbac.authorization.k8s.io", "ClusterRole", "kubevirt-controller");
    let migrate = ("rbac.authorization.k8s.io", "ClusterRole", "kubevirt.io:migrate");
    let class = ("storage.k8s.io", "StorageClass", "shared");
    let kubevirt = ("kubevirt.io", "KubeVirt", "kubevirt");
    let default = "storageclass.kubernetes.io/is-default-class";
    let mine = json!({"apiGroups": ["example.com"], "resources": ["things"], "verbs": ["get"]});
    // Without a right that nobody needs meanwhile.
    let mut rules =
        own(&cluster.client, controller.0, controller.1).get(controller.2).await.expect("get").data["rules"].take();
    let rules_of = rules.as_array_mut().expect("rules");
    rules_of.retain(|rule| !rule.to_string().contains("pods/eviction"));
    rules_of.push(mine.clone());
    let old = json!({"name": "v1alpha1", "served": true, "storage": true,
        "additionalPrinterColumns": [{"name": "Bytes", "type": "integer", "jsonPath": ".spec.bytesProcessed"}],
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": {"type": "object"}}}}});
    let changes = [
        (crds, json!({"spec": {"versions": [old]}})),
        (controller, json!({"rules": rules})),
        (migrate, json!({"rules": []})),
        (class, json!({"metadata": {"annotations": {default: "false"}}})),
        (kubevirt, json!({"spec": {"configuration": {"migrations": {"parallelMigrationsPerCluster": 7}}}})),
    ];
    for ((group, kind, name), change) in changes {
        let patch = kube::api::Patch::Merge(change);
        own(&cluster.client, group, kind).patch(name, &Default::default(), &patch).await.expect("patch");
    }
    for arguments in [&["down"][..], &["up", "--nodes", "1", "--detach"]] {
        let output = cluster.godwit(arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    let client = godwit_standalone::client(&cluster.kubeconfig()).await.expect("client");
    let get = async |(group, kind, name): (&str, &str, &str)| own(&client, group, kind).get(name).await.expect("get");
    let rules = get(controller).await.data["rules"].clone();
    let rules = rules.as_array().expect("rules");
    assert!(rules.contains(&mine) && json!(rules).to_string().contains("pods/eviction"), "{rules:?}");
    assert!(get(migrate).await.data.to_string().contains("virtualmachineinstancemigrations"));
    let version = get(crds).await.data["spec"]["versions"][0].clone();
    assert!(version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["sent"].is_object(), "{version}");
    let columns = version["additionalPrinterColumns"].as_array().expect("columns");
    assert!(columns.iter().any(|column| column["name"] == "Bytes" && column["type"] == "string"), "{columns:?}");
    let annotations = get(class).await.metadata.annotations.expect("annotations");
    assert_eq!(annotations[default], "false", "the user's");
    let migrations = get(kubevirt).await.data["spec"]["configuration"]["migrations"].clone();
    assert_eq!(migrations["parallelMigrationsPerCluster"], 7, "the user's");
}

#[tokio::test(flavor = "multi_thread")]
async fn down_leaves_nothing_behind() {
    let cluster = Cluster::up(2).await;
    cluster.build_rom_image(godwit_guest_rom::Parameters::default());
    cluster.start_rom_guest("left").await;
    let id = status_of(&cluster)["id"].as_str().expect("id").to_owned();
    let prefix = format!("gw-{id}-");
    let namespaces = || -> Vec<String> {
        std::fs::read_dir("/run/netns")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with(&prefix))
            .collect()
    };
    assert!(!namespaces().is_empty());
    let folder = cluster.data_dir().display().to_string();
    let output = cluster.godwit(&["down"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(namespaces(), Vec::<String>::new());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.contains(&folder), "{mounts}");
    // Every process of the cluster carries the data directory or one of its pods' paths in its arguments.
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        assert!(!text(&arguments).contains(&folder), "{} is left: {}", entry.path().display(), text(&arguments));
    }
    let again = cluster.godwit(&["down"]);
    assert_eq!(text(&again.stdout).trim(), "nothing was up");
}

#[test]
fn without_root_it_says_so_in_one_line() {
    let folder = tempfile::tempdir().expect("folder");
    // A copy that nobody may run: the build directory may be closed to others.
    let program = folder.path().join("godwit");
    std::fs::copy(env!("CARGO_BIN_EXE_godwit"), &program).expect("copy");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).expect("chmod");
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .args(["up", "--data-dir", "/tmp/godwit-nobody"])
        .output()
        .expect("setpriv (util-linux) starts");
    assert!(!output.status.success());
    let said = text(&output.stderr);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("needs root"), "{said}");
}

#[test]
fn status_without_a_cluster_says_what_to_do() {
    let folder = tempfile::tempdir().expect("folder");
    let output = godwit(folder.path(), &["status"]);
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("godwit up"), "{}", text(&output.stderr));
}
