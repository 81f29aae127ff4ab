//! A guest in a namespace that lets in nothing but what fits Kubernetes' profile "restricted".

use super::keep::{keep_on, start};
use super::plug::{add_options, is_ready};
use super::view::hardware;
use super::{build_demo_image, claim, condition, facts, linux_vmi, runs, succeeds};
use crate::common::{Cluster, qemus, status};
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PostParams};
use serde_json::{Value, json};

/// Lets nothing else into the namespace `default` from now on.
async fn restrict(cluster: &Cluster) {
    let namespaces = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Namespace"));
    let api: Api<DynamicObject> = Api::all_with(cluster.client.clone(), &namespaces);
    let labels = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    api.patch("default", &Default::default(), &Patch::Merge(labels)).await.expect("patch");
    let root: DynamicObject = serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "root"},
        "spec": {"containers": [{"name": "root", "image": "godwit.local/host", "securityContext": {"runAsUser": 0}}]},
    }))
    .expect("a pod");
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    match cluster.pods().create(&dry, &root).await {
        Err(error) => assert!(error.to_string().contains("violates PodSecurity \"restricted"), "{error}"),
        Ok(_) => {
            assert!(cluster.real.is_none(), "a pod that is root was let in");
            println!(
                "SKIPPED: the embedded API server does not enforce PodSecurity; KUBEBUILDER_ASSETS names none that does"
            );
        }
    }
}

/// What the kernel says of the guest's QEMU.
fn kernels_word(vmi: &DynamicObject) -> String {
    let running = qemus(vmi);
    assert_eq!(running.len(), 1, "{running:?}");
    std::fs::read_to_string(format!("/proc/{}/status", running[0].0)).expect("its status")
}

/// The guest's QEMU is a user without any power, and is not to get one.
fn is_powerless(vmi: &DynamicObject) {
    let told = kernels_word(vmi);
    let line = |name: &str| told.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    for (name, wanted) in [
        ("Uid:", "107\t107\t107\t107"),
        ("Gid:", "107\t107\t107\t107"),
        ("CapPrm:", "0000000000000000"),
        ("CapEff:", "0000000000000000"),
        ("CapBnd:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
    ] {
        assert_eq!(line(name), Some(wanted), "{name} {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_lives_and_moves_where_only_restricted_pods_may_be() {
    let cluster = Cluster::start(2).await;
    build_demo_image(&cluster);
    restrict(&cluster).await;
    // Its targets would have to be root. Here they are not, and the guest comes in pre-copy.
    allow_post_copy(&cluster, true).await;
    let mut block = claim("block", "shared", "ReadWriteMany");
    block["spec"]["volumeMode"] = json!("Block");
    for object in [claim("files", "shared", "ReadWriteMany"), claim("late", "shared", "ReadWriteMany"), block] {
        cluster.apply(object).await.expect("apply");
    }
    let mut vmi = linux_vmi("plain", "masquerade");
    vmi["spec"]["domain"]["memory"] = json!({"guest": "256Mi"});
    vmi["spec"]["domain"]["devices"]["tpm"] = json!({});
    let disks = ["files", "block"].map(|name| json!({"name": name, "disk": {"bus": "virtio"}}));
    vmi["spec"]["domain"]["devices"]["disks"] = json!(disks);
    vmi["spec"]["volumes"] =
        json!(["files", "block"].map(|name| json!({"name": name, "persistentVolumeClaim": {"claimName": name}})));
    cluster.apply(vmi).await.expect("apply");
    is_powerless(&runs(&cluster, "plain").await);
    let (_, before) = facts(&cluster, "node1", "plain").await;

    let path = ("virtualmachineinstances", "plain", "addvolume");
    assert_eq!(cluster.put_action(None, path, &add_options("late")).await.0, 202);
    is_ready(&cluster, "plain", "late").await;

    for way in ["away", "home"] {
        is_powerless(&moves(&cluster, "plain", way).await);
        let (_, after) = facts(&cluster, "node1", "plain").await;
        assert_eq!(after["token"], before["token"], "it was started anew");
        assert_eq!(after["corruptPages"], 0, "{way}: {after}");
    }
}

/// Moves the guest, and waits until it is there and nowhere else.
async fn moves(cluster: &Cluster, vmi: &str, way: &str) -> DynamicObject {
    let can = |vmi: &DynamicObject| condition(vmi, "LiveMigratable")["status"] == "True";
    let from = status(&cluster.wait(&cluster.vmis(), vmi, "it can move", can).await, "nodeName");
    cluster.migrate(vmi, way).await;
    succeeds(cluster, way).await;
    let there = |vmi: &DynamicObject| {
        let pods = vmi.data["status"]["activePods"].as_object();
        status(vmi, "nodeName") != from && pods.is_some_and(|all| all.len() == 1)
    };
    cluster.wait(&cluster.vmis(), vmi, "it is there, and nowhere else", there).await
}

/// Whether targets of migrations are root from now on, as those of older versions were.
async fn allow_post_copy(cluster: &Cluster, allow: bool) {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
    let api: Api<DynamicObject> = Api::namespaced_with(cluster.client.clone(), "kubevirt", &resource);
    let patch = Patch::Merge(json!({"spec": {"configuration": {"migrations": {"allowPostCopy": allow}}}}));
    api.patch("kubevirt", &Default::default(), &patch).await.expect("patch");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_to_a_launcher_that_is_root_and_on_to_one_that_is_not() {
    let cluster = Cluster::start(2).await;
    build_demo_image(&cluster);
    keep_on(&cluster, "shared").await;
    // Long before the controller must know it.
    allow_post_copy(&cluster, true).await;
    let mut block = claim("block", "shared", "ReadWriteMany");
    block["spec"]["volumeMode"] = json!("Block");
    for object in [claim("files", "shared", "ReadWriteMany"), block] {
        cluster.apply(object).await.expect("apply");
    }
    start(&cluster, "mixed", |spec| {
        spec["domain"]["firmware"]["bootloader"] = json!({"efi": {"secureBoot": false, "persistent": true}});
        let disks = ["files", "block"].map(|name| json!({"name": name, "disk": {"bus": "virtio"}}));
        spec["domain"]["devices"]["disks"] = json!(disks);
        let claims = ["files", "block"].map(|name| json!({"name": name, "persistentVolumeClaim": {"claimName": name}}));
        spec["volumes"] = json!(claims);
    })
    .await;
    is_powerless(&runs(&cluster, "mixed").await);
    let mut before = hardware(&cluster, "mixed", "/keep", |_| true).await;
    for (way, as_root) in [("to-root", true), ("from-root", false)] {
        let vmi = moves(&cluster, "mixed", way).await;
        allow_post_copy(&cluster, false).await;
        if as_root {
            let told = kernels_word(&vmi);
            assert!(told.contains("Uid:\t0\t0\t0\t0"), "{told}");
        } else {
            is_powerless(&vmi);
        }
        // What it keeps is there, and goes on being kept.
        let kept = |hardware: &Value| (hardware["tpmKept"].clone(), hardware["efiKept"].clone());
        let after = hardware(&cluster, "mixed", "/hardware", |_| true).await;
        assert_eq!(kept(&after), kept(&before), "{way}");
        before = hardware(&cluster, "mixed", "/keep", |now| kept(now) != kept(&before)).await;
    }
}
