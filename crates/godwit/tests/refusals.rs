//! What is not done is said, in words that name it.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{Cluster, rom_vmi, status, text};
use kube::api::PostParams;
use kube::client::Body;
use serde_json::{Value, json};
use std::process::Command;

const WEBHOOK: &str = r#"admission webhook "migration-create-validator.kubevirt.io" denied the request: "#;

/// Creates an object; code, warnings and body of the answer.
async fn create(cluster: &Cluster, plural: &str, object: &Value) -> (u16, Vec<String>, Value) {
    let path = format!("/apis/kubevirt.io/v1/namespaces/default/{plural}");
    let request = kube::core::Request::new(path)
        .create(&PostParams::default(), serde_json::to_vec(object).expect("JSON"))
        .expect("request");
    let answer = cluster.client.send(request.map(Body::from)).await.expect("answer");
    let code = answer.status().as_u16();
    let warnings = answer.headers().get_all("warning").iter();
    let warnings = warnings.map(|value| value.to_str().expect("text").to_owned()).collect();
    let body = answer.into_body().collect_bytes().await.expect("body");
    (code, warnings, serde_json::from_slice(&body).expect("JSON"))
}

fn migration(name: &str, vmi: &str) -> Value {
    json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
        "metadata": {"name": name}, "spec": {"vmiName": vmi}})
}

#[tokio::test(flavor = "multi_thread")]
async fn unsupported_fields_are_answered_by_name() {
    let cluster = Cluster::start(1).await;
    let mut harmless = rom_vmi("harmless");
    harmless["spec"]["domain"]["cpu"] = json!({"dedicatedCpuPlacement": true});
    harmless["spec"]["domain"]["devices"]["video"] = json!({"type": "vga"});
    let (code, warnings, body) = create(&cluster, "virtualmachineinstances", &harmless).await;
    assert_eq!(code, 201, "{body}");
    for field in ["spec.domain.cpu.dedicatedCpuPlacement", "spec.domain.devices.video"] {
        let told = |warning: &&String| warning.starts_with("299 ") && warning.contains(field);
        assert_eq!(warnings.iter().filter(told).count(), 1, "{field} in {warnings:?}");
    }
    let (code, warnings, body) = create(&cluster, "virtualmachineinstances", &rom_vmi("plain")).await;
    assert_eq!((code, warnings), (201, Vec::new()), "{body}");

    let mut other = rom_vmi("other");
    other["spec"]["domain"]["devices"]["sound"] = json!({});
    other["spec"]["domain"]["cpu"] = json!({"features": [{"name": "apic"}]});
    let (code, _, body) = create(&cluster, "virtualmachineinstances", &other).await;
    assert_eq!(code, 422, "{body}");
    for field in ["spec.domain.devices.sound", "spec.domain.cpu.features"] {
        assert!(body["message"].as_str().is_some_and(|message| message.contains(field)), "{field}: {body}");
        let causes = body["details"]["causes"].as_array().expect("causes");
        assert!(causes.iter().any(|cause| cause["field"] == field), "{field}: {body}");
    }
    // The same within a VM's template.
    let template = json!({"spec": other["spec"]});
    let vm = json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "other"},
        "spec": {"runStrategy": "Halted", "template": template}});
    let (code, _, body) = create(&cluster, "virtualmachines", &vm).await;
    assert_eq!(code, 422, "{body}");
    assert!(body["message"].as_str().is_some_and(|m| m.contains("spec.template.spec.domain.devices.sound")), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_are_refused_in_kubevirts_words() {
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(godwit_guest_rom::Parameters::default());
    let migrations = "virtualmachineinstancemigrations";
    let (code, _, body) = create(&cluster, migrations, &migration("none", "missing")).await;
    assert_eq!(code, 400, "{body}");
    assert_eq!(body["message"], format!("{WEBHOOK}the VMI \"default/missing\" does not exist"));
    assert_eq!((&body["kind"], &body["reason"]), (&json!("Status"), &json!("BadRequest")), "{body}");
    let (code, _, body) = create(&cluster, migrations, &migration("empty", "")).await;
    assert_eq!(code, 422, "{body}");
    assert_eq!(body["message"], format!("{WEBHOOK}vmiName is missing"));

    cluster.start_rom_guest("busy").await;
    // The way out is too narrow for it to be over soon.
    let node = status(&cluster.vmis().get("busy").await.expect("VMI"), "nodeName");
    let narrow = Command::new("ip")
        .args(["netns", "exec", &cluster.namespace(&node), "tc", "qdisc", "add", "dev", "eth0", "root", "tbf"])
        .args(["rate", "4mbit", "burst", "16kb", "latency", "400ms"])
        .output()
        .expect("ip starts");
    assert!(narrow.status.success(), "{}", text(&narrow.stderr));
    let (code, _, first) = create(&cluster, migrations, &migration("first", "busy")).await;
    assert_eq!(code, 201, "{first}");
    let (code, _, body) = create(&cluster, migrations, &migration("second", "busy")).await;
    assert_eq!(code, 400, "{body}");
    let uid = first["metadata"]["uid"].as_str().expect("uid");
    assert_eq!(
        body["message"],
        format!(
            "{WEBHOOK}in-flight migration detected. Active migration job ({uid}) is currently already in progress for \
             VMI busy."
        )
    );
    // What it is about cannot be changed either.
    let patch = kube::api::Patch::Merge(json!({"spec": {"vmiName": "another"}}));
    let error = cluster.migrations().patch("first", &Default::default(), &patch).await.expect_err("refused");
    assert!(error.to_string().contains("update of Migration object's spec is restricted"), "{error}");
    cluster.migrations().delete("first", &Default::default()).await.expect("delete");
    cluster.wait_gone(&cluster.migrations(), "first").await;
}
