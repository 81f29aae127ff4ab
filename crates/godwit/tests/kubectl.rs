//! Unmodified kubectl, 1.27 to 1.33, against the embedded API server.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{Cluster, kubectls, status, text};
use std::path::{Path, PathBuf};

/// The seed's manifest, as a user has it.
const MIGRATION: &str = include_str!("../../../docs/examples/migration-job.yaml");
const NETWORK: &str = include_str!("../../../docs/examples/lab-network.yaml");
const VMI: &str = include_str!("../../../docs/examples/vmi.yaml");

fn example(name: &str) -> String {
    format!("{}/../../docs/examples/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Kernel and initramfs of the demo guest, made by `make guest`.
fn demo_guest() -> PathBuf {
    let folder = std::env::var_os("GODWIT_GUEST")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/demo-guest"), PathBuf::from);
    assert!(folder.join("vmlinuz").exists(), "{} has no guest: run `make guest`", folder.display());
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn the_walk_of_the_openshift_lab() {
    let Some(kubectl) = kubectls().pop() else { return };
    let cluster = Cluster::start(3).await;
    let guest = demo_guest();
    let pair = |file: &str| format!("{}:/boot/{file}", guest.join(file).display());
    let built =
        cluster.godwit(&["image", "build", "godwit.local/demo-guest:latest", &pair("vmlinuz"), &pair("initrd")]);
    assert!(built.status.success(), "{}", text(&built.stderr));
    let run = |arguments: &[&str]| cluster.kubectl(&kubectl, arguments);
    assert!(NETWORK.contains("NetworkAttachmentDefinition") && VMI.contains("rhel8-server-nfs"));
    run(&["apply", "-f", &example("lab-network.yaml"), "-f", &example("vmi.yaml")]);
    // Once more: the lists in it replace those that the server has completed.
    run(&["apply", "-f", &example("vmi.yaml")]);
    let ready = |vmi: &kube::api::DynamicObject| status(vmi, "interfaces/0/ipAddress") == "192.168.123.62";
    let before = cluster.wait(&cluster.vmis(), "rhel8-server-nfs", "it has its address", ready).await;

    let table = run(&["get", "vmi"]);
    let heading: Vec<&str> = table.lines().next().unwrap_or_default().split_whitespace().collect();
    assert_eq!(heading[..5], ["NAME", "AGE", "PHASE", "IP", "NODENAME"], "{table}");
    let row: Vec<&str> = table.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    assert_eq!((row[0], row[2], row[3]), ("rhel8-server-nfs", "Running", "192.168.123.62"), "{table}");
    let described = run(&["describe", "vmi", "rhel8-server-nfs"]);
    let says = |line: &str, value: &str| {
        described.lines().any(|l| l.trim().strip_prefix(line).is_some_and(|rest| rest.trim() == value))
    };
    assert!(says("Eviction Strategy:", "LiveMigrate"), "{described}");
    assert!(says("Migration Method:", "LiveMigration"), "{described}");

    let applied = cluster.try_kubectl(&kubectl, &["apply", "-f", "-"], Some(MIGRATION));
    let said = text(&applied.stdout);
    assert_eq!(
        said.trim(),
        "virtualmachineinstancemigration.kubevirt.io/migration-job created",
        "{}",
        text(&applied.stderr)
    );
    let again = cluster.try_kubectl(&kubectl, &["apply", "-f", "-"], Some(MIGRATION));
    assert_eq!(text(&again.stdout).trim(), "virtualmachineinstancemigration.kubevirt.io/migration-job unchanged");
    run(&["wait", "vmim/migration-job", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=120s"]);
    let yaml = run(&["get", "virtualmachineinstancemigration/migration-job", "-o", "yaml"]);
    assert!(yaml.contains("phase: Succeeded"), "{yaml}");
    for phase in ["Scheduling", "TargetReady"] {
        assert!(yaml.contains(&format!("phase: {phase}")), "{phase} is not in the transitions: {yaml}");
    }
    let after = cluster.wait(&cluster.vmis(), "rhel8-server-nfs", "it has its address", ready).await;
    assert_ne!(status(&before, "nodeName"), status(&after, "nodeName"));
    let table = run(&["get", "vmi"]);
    assert!(table.contains(&status(&after, "nodeName")) && table.contains("192.168.123.62"), "{table}");
    let described = run(&["describe", "vmi", "rhel8-server-nfs"]);
    for part in [
        "Migration State:",
        "Completed:",
        "Target Direct Migration Node Ports:",
        "Target Node Domain Detected:",
        "PreparingTarget",
        "Migration Target is listening at",
        "VirtualMachineInstance is migrating.",
        "The VirtualMachineInstance migrated to node",
    ] {
        assert!(described.contains(part), "no {part:?} in\n{described}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_verb_with_every_kubectl() {
    let kubectls = kubectls();
    if kubectls.is_empty() {
        return;
    }
    let cluster = Cluster::start(1).await;
    cluster.build_rom_image(godwit_guest_rom::Parameters::default());
    for kubectl in &kubectls {
        println!("with {}", kubectl.display());
        verbs(&cluster, kubectl).await;
    }
}

async fn verbs(cluster: &Cluster, kubectl: &Path) {
    let run = |arguments: &[&str]| cluster.kubectl(kubectl, arguments);
    let with = |arguments: &[&str], input: &str| {
        let output = cluster.try_kubectl(kubectl, arguments, Some(input));
        assert!(output.status.success(), "{arguments:?}: {}{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    };
    let resources = run(&["api-resources"]);
    for part in ["virtualmachineinstances", "vmim,vmims", "kubevirt.io/v1", "poddisruptionbudgets", "leases"] {
        assert!(resources.contains(part), "no {part} in\n{resources}");
    }
    assert!(run(&["explain", "vmi.spec.domain"]).contains("FIELD"));
    assert!(run(&["explain", "pod.spec.containers"]).contains("image"));

    // Custom resources.
    let vmi = common::rom_vmi("verbs").to_string();
    assert!(with(&["create", "-f", "-"], &vmi).contains("created"));
    let duplicate = cluster.try_kubectl(kubectl, &["create", "-f", "-"], Some(&vmi));
    assert!(text(&duplicate.stderr).contains("AlreadyExists"), "{}", text(&duplicate.stderr));
    run(&["wait", "vmi/verbs", "--for=jsonpath={.status.phase}=Running", "--timeout=60s"]);
    assert_eq!(run(&["get", "vmi", "verbs", "-o", "jsonpath={.status.nodeName}"]), "node1");
    assert!(run(&["get", "vmi", "-o", "wide"]).contains("LIVE-MIGRATABLE"));
    assert!(run(&["get", "vmi", "verbs", "-o", "json"]).contains("\"apiVersion\": \"kubevirt.io/v1\""));
    assert!(run(&["get", "vmi", "verbs", "-o", "yaml"]).contains("kind: VirtualMachineInstance"));
    run(&["label", "vmi", "verbs", "tier=test"]);
    assert!(run(&["get", "vmi", "-l", "tier in (test)", "--no-headers"]).contains("verbs"));
    run(&["annotate", "vmi", "verbs", "note=hello"]);
    run(&["patch", "vmi", "verbs", "--type=merge", "-p", r#"{"metadata":{"labels":{"tier":"patched"}}}"#]);
    run(&["patch", "vmi", "verbs", "--type=json", "-p", r#"[{"op":"remove","path":"/metadata/labels/tier"}]"#]);
    assert!(!run(&["get", "vmi", "verbs", "--show-labels"]).contains("tier="));
    let watched = run(&["get", "vmi", "verbs", "-w", "--request-timeout=1s", "--no-headers"]);
    assert!(watched.contains("verbs"), "{watched}");
    let deleted = run(&["delete", "vmi", "verbs", "--timeout=60s"]);
    assert!(deleted.contains("deleted"), "{deleted}");
    let gone = cluster.try_kubectl(kubectl, &["get", "vmi", "verbs"], None);
    assert!(text(&gone.stderr).contains("NotFound"), "{}", text(&gone.stderr));

    // Built-in kinds.
    let map = |value: &str| {
        format!(r#"{{"apiVersion":"v1","kind":"ConfigMap","metadata":{{"name":"m"}},"data":{{"k":"{value}"}}}}"#)
    };
    assert!(with(&["apply", "-f", "-"], &map("1")).contains("created"));
    assert!(with(&["apply", "-f", "-"], &map("1")).contains("unchanged"));
    assert!(with(&["apply", "-f", "-"], &map("2")).contains("configured"));
    assert!(with(&["replace", "-f", "-"], &map("3")).contains("replaced"));
    assert!(
        with(&["apply", "--server-side", "--force-conflicts", "-f", "-"], &map("4")).contains("serverside-applied")
    );
    assert_eq!(run(&["get", "cm", "m", "-o", "jsonpath={.data.k}"]), "4");
    run(&["patch", "cm", "m", "-p", r#"{"data":{"k":"5"}}"#]);
    run(&["delete", "cm", "m"]);
    run(&["create", "configmap", "typed", "--from-literal=a=b"]);
    run(&["create", "secret", "generic", "typed", "--from-literal=a=b"]);
    run(&["delete", "cm/typed", "secret/typed"]);
    // Beside a kube-apiserver alone nobody ends namespaces.
    if cluster.real.is_none() {
        run(&["create", "namespace", "typed"]);
        run(&["delete", "namespace", "typed", "--timeout=30s"]);
    }
    run(&["cordon", "node1"]);
    assert!(run(&["get", "nodes"]).contains("Ready,SchedulingDisabled"));
    run(&["uncordon", "node1"]);
    assert!(run(&["describe", "node", "node1"]).contains("Allocatable"));
    assert!(run(&["auth", "can-i", "delete", "vmi"]).contains("yes"));
    assert!(run(&["get", "kubevirt", "-n", "kubevirt"]).contains("Deployed"));
    let strict = cluster.try_kubectl(
        kubectl,
        &["apply", "-f", "-"],
        Some(r#"{"apiVersion":"kubevirt.io/v1","kind":"VirtualMachineInstance","metadata":{"name":"x"},"spec":{"nonsense":1,"domain":{"devices":{}}}}"#),
    );
    assert!(!strict.status.success());
    assert!(text(&strict.stderr).contains("nonsense"), "{}", text(&strict.stderr));
}
