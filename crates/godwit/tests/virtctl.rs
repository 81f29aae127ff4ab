//! KubeVirt's subresources, asked for as virtctl does, and what becomes of real guests.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{Cluster, qemus, status, text};
use godwit_guest_rom::Parameters;
use kube::api::{DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};

const VMS: &str = "virtualmachines";
const VMIS: &str = "virtualmachineinstances";

/// A VM whose guest would take ten minutes to end of its own.
fn vm(name: &str, strategy: &str) -> Value {
    let mut spec = common::rom_vmi(name)["spec"].clone();
    spec["terminationGracePeriodSeconds"] = json!(600);
    spec["evictionStrategy"] = json!("External");
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": name},
        "spec": {"runStrategy": strategy, "template": {"spec": spec}},
    })
}

async fn ask(cluster: &Cluster, resource: &str, name: &str, action: &str, options: Value) -> (u16, String) {
    cluster.put_action(None, (resource, name, action), &options).await
}

fn granted(answer: &(u16, String), code: u16) {
    assert_eq!(answer.0, code, "{}", answer.1);
}

/// The refusal of something that is asked of a VM.
fn conflict(name: &str, why: &str) -> (u16, String) {
    (409, format!("Operation cannot be fulfilled on virtualmachine.kubevirt.io \"{name}\": {why}"))
}

fn uid(object: &DynamicObject) -> String {
    object.metadata.uid.clone().unwrap_or_default()
}

fn condition<'a>(object: &'a DynamicObject, type_: &str) -> Option<&'a Value> {
    object.data["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == type_)
}

/// Waits until another VMI than this one runs.
async fn runs_anew(cluster: &Cluster, name: &str, before: &str) -> DynamicObject {
    let anew = |vmi: &DynamicObject| uid(vmi) != before && status(vmi, "phase") == "Running";
    cluster.wait(&cluster.vmis(), name, "it runs anew", anew).await
}

/// What a path of the group that is about no object answers.
async fn root(cluster: &Cluster, path: &str) -> (u16, Value) {
    let path = format!("/apis/subresources.kubevirt.io/v1/{path}");
    let request = http::Request::get(path).body(kube::client::Body::empty()).expect("request");
    let answer = cluster.client.send(request).await.expect("an answer");
    let code = answer.status().as_u16();
    let bytes = answer.into_body().collect_bytes().await.expect("a body");
    (code, serde_json::from_slice(&bytes).unwrap_or_default())
}

async fn is_introduced_to_virtctl(cluster: &Cluster) {
    let (code, version) = root(cluster, "version").await;
    assert_eq!(code, 200);
    assert!(version["gitVersion"].as_str().is_some_and(|version| version.starts_with('v')), "{version}");
    let (code, health) = root(cluster, "healthz").await;
    assert_eq!((code, &health["apiserver"]["connectivity"]), (200, &json!("ok")));
    // What there is not is refused by its name.
    let (code, said) = root(cluster, "guestfs").await;
    assert!(code == 501 && said["message"].to_string().contains("guestfs"), "{code} {said}");
    let (code, said) = ask(cluster, VMIS, "walker", "freeze", Value::Null).await;
    assert!(code == 501 && said.contains("virtualmachineinstances/freeze"), "{code} {said}");
    assert_eq!(root(cluster, "nonsense").await.0, 404);
    assert_eq!(ask(cluster, VMIS, "walker", "nonsense", Value::Null).await.0, 404);
}

/// Who edits in a namespace starts and stops its VMs, and does not move them.
async fn roles_are_kubevirts(cluster: &Cluster) {
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "editor"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "kubevirt.io:edit"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "editor"}]});
    cluster.apply(binding).await.expect("apply");
    let dry = json!({"dryRun": ["All"]});
    let editor = async |action: &str| cluster.put_action(Some("editor"), (VMS, "walker", action), &dry).await;
    granted(&editor("restart").await, 202);
    granted(&editor("evacuate/cancel").await, 200);
    let (code, said) = editor("migrate").await;
    assert!(code == 403 && said.contains("\"virtualmachines/migrate\""), "{code} {said}");
    assert_eq!(cluster.put_action(Some("nobody"), (VMS, "walker", "evacuate/cancel"), &dry).await.0, 403);
}

/// An eviction marks the VMI; the mark goes when that is asked for, unless the node is being drained.
async fn an_evacuation_is_cancelled(cluster: &Cluster) {
    let Some(kubectl) = common::kubectls().pop() else { return };
    let node = status(&cluster.vmis().get("walker").await.expect("VMI"), "nodeName");
    let pods = cluster.launchers("walker").await;
    let (pod, _) = pods.iter().find(|(_, at)| *at == node).expect("a launcher");
    let path = format!("/api/v1/namespaces/default/pods/{pod}/eviction");
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}});
    let options = json!({"evacuationNodeName": node});
    let marked = |vmi: &DynamicObject| {
        status(vmi, "evacuationNodeName") == node && condition(vmi, "EvictionRequested").is_some()
    };
    let free = |vmi: &DynamicObject| {
        status(vmi, "evacuationNodeName").is_empty() && condition(vmi, "EvictionRequested").is_none()
    };
    for resource in [VMS, VMIS] {
        let refused =
            cluster.try_kubectl(&kubectl, &["create", "--raw", &path, "-f", "-"], Some(&eviction.to_string()));
        assert!(text(&refused.stderr).contains("Eviction triggered evacuation"), "{}", text(&refused.stderr));
        cluster.wait(&cluster.vmis(), "walker", "it is marked", marked).await;
        let (code, said) = ask(cluster, resource, "walker", "evacuate/cancel", Value::Null).await;
        assert_eq!((code, said.as_str()), (400, "No body"));
        assert_eq!(
            ask(cluster, resource, "walker", "evacuate/cancel", json!({"evacuationNodeName": "x"})).await.0,
            409
        );
        let dry = json!({"evacuationNodeName": node, "dryRun": ["All"]});
        granted(&ask(cluster, resource, "walker", "evacuate/cancel", dry).await, 200);
        assert!(marked(&cluster.vmis().get("walker").await.expect("VMI")), "a dry run changes nothing");
        granted(&ask(cluster, resource, "walker", "evacuate/cancel", options.clone()).await, 200);
        cluster.wait(&cluster.vmis(), "walker", "nothing is asked of it", free).await;
    }
    let nodes = kube::Api::<k8s_openapi::api::core::v1::Node>::all(cluster.client.clone());
    let taint = json!({"spec": {"taints": [{"key": "kubevirt.io/drain", "effect": "NoSchedule"}]}});
    nodes.patch(&node, &PatchParams::default(), &Patch::Merge(&taint)).await.expect("taint");
    let (code, said) = ask(cluster, VMIS, "walker", "evacuate/cancel", options).await;
    let text = format!("Node \"{node}\" has NodeDrainTaintKey \"kubevirt.io/drain:NoSchedule\"");
    assert_eq!((code, said), (400, text));
    let none = json!({"spec": {"taints": null}});
    nodes.patch(&node, &PatchParams::default(), &Patch::Merge(&none)).await.expect("untaint");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_started_moved_restarted_and_stopped() {
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(Parameters::default());
    cluster.apply(vm("walker", "Halted")).await.expect("apply");
    is_introduced_to_virtctl(&cluster).await;

    let (code, said) = ask(&cluster, VMS, "nobody", "start", Value::Null).await;
    assert_eq!((code, said.as_str()), (404, "virtualmachine.kubevirt.io \"nobody\" not found"));
    assert_eq!(ask(&cluster, VMS, "walker", "stop", Value::Null).await, conflict("walker", "VM is not running"));
    granted(&ask(&cluster, VMS, "walker", "start", json!({"dryRun": ["All"]})).await, 202);
    let strategy = async || cluster.vms().get("walker").await.expect("VM").data["spec"]["runStrategy"].clone();
    assert_eq!(strategy().await, "Halted", "a dry run changes nothing");
    granted(&ask(&cluster, VMS, "walker", "start", json!({})).await, 202);
    assert_eq!(strategy().await, "Always");
    let first = runs_anew(&cluster, "walker", "").await;
    cluster.wait(&cluster.vms(), "walker", "it knows of its VMI", |vm| status(vm, "created") == "true").await;
    assert_eq!(ask(&cluster, VMS, "walker", "start", json!({})).await, conflict("walker", "VM is already running"));
    roles_are_kubevirts(&cluster).await;

    let migratable = |vmi: &DynamicObject| condition(vmi, "LiveMigratable").is_some_and(|one| one["status"] == "True");
    let from = cluster.wait(&cluster.vmis(), "walker", "it can be moved", migratable).await;
    granted(&ask(&cluster, VMS, "walker", "migrate", json!({"dryRun": ["All"]})).await, 202);
    assert!(cluster.migrations().list(&Default::default()).await.expect("list").items.is_empty(), "a dry run");
    granted(&ask(&cluster, VMS, "walker", "migrate", json!({})).await, 202);
    let moved = |vmi: &DynamicObject| status(vmi, "nodeName") != status(&from, "nodeName");
    cluster.wait(&cluster.vmis(), "walker", "it has moved", moved).await;
    let migrations = cluster.migrations().list(&Default::default()).await.expect("list").items;
    let [migration] = &migrations[..] else { panic!("one migration: {migrations:?}") };
    assert!(migration.metadata.name.as_deref().is_some_and(|name| name.starts_with("kubevirt-migrate-vm-")));
    assert_eq!(
        migration.metadata.annotations.as_ref().expect("annotations")["godwit.io/requested-by"],
        "kubernetes-admin"
    );
    let name = migration.metadata.name.clone().expect("a name");
    cluster.wait(&cluster.migrations(), &name, "it is over", |m| status(m, "phase") == "Succeeded").await;
    an_evacuation_is_cancelled(&cluster).await;

    // Forced, it does not wait for the guest.
    let (code, said) = ask(&cluster, VMS, "walker", "restart", json!({"gracePeriodSeconds": 5})).await;
    assert_eq!((code, said.as_str()), (400, "For force restart, only gracePeriod=0 is supported for now"));
    granted(&ask(&cluster, VMS, "walker", "restart", json!({"gracePeriodSeconds": 0})).await, 202);
    let second = runs_anew(&cluster, "walker", &uid(&first)).await;

    // This guest hears the power button.
    granted(&ask(&cluster, VMS, "walker", "stop", json!({})).await, 202);
    assert_eq!(strategy().await, "Halted");
    let stopped = |vm: &DynamicObject| status(vm, "printableStatus") == "Stopped" && status(vm, "created") == "false";
    cluster.wait(&cluster.vms(), "walker", "it is stopped", stopped).await;

    // Paused, it does not: a stop waits for it, until a shorter one comes.
    granted(&ask(&cluster, VMS, "walker", "start", json!({"paused": true})).await, 202);
    let third = runs_anew(&cluster, "walker", &uid(&second)).await;
    let paused = |vmi: &DynamicObject| condition(vmi, "Paused").is_some_and(|one| one["status"] == "True");
    cluster.wait(&cluster.vmis(), "walker", "it is paused", paused).await;
    assert_eq!(strategy().await, "Always");
    granted(&ask(&cluster, VMS, "walker", "stop", json!({})).await, 202);
    let stopping = |vm: &DynamicObject| status(vm, "printableStatus") == "Stopping";
    cluster.wait(&cluster.vms(), "walker", "it is stopping", stopping).await;
    let shorter = "Halted only supports manual stop requests with a shorter graceperiod";
    assert_eq!(ask(&cluster, VMS, "walker", "stop", json!({})).await, conflict("walker", shorter));
    assert_eq!(qemus(&third).len(), 1);
    granted(&ask(&cluster, VMS, "walker", "stop", json!({"gracePeriod": 0})).await, 202);
    cluster.wait(&cluster.vms(), "walker", "it is stopped", stopped).await;
    assert_eq!(qemus(&third), Vec::new());
    let vmis = cluster.vmis().list(&Default::default()).await.expect("list").items;
    assert!(vmis.is_empty(), "{vmis:?}");
}
