//! On etcd and kube-apiserver: `godwit api` behind kube-apiserver, and all certificates replaced in the middle of everything.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::streams::Console;
use common::terminal::Terminal;
use common::{Cluster, kubectls, status};
use godwit_guest_rom::{Line, Parameters};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Api;
use kube::api::DynamicObject;
use serde_json::json;
use std::time::{Duration, Instant};

/// What kube-apiserver says of the group, and of the answers of `godwit api`.
async fn is_behind_the_api_server(cluster: &Cluster) {
    let get = async |path: &str| {
        let request = http::Request::get(path).body(Vec::new()).expect("request");
        cluster.client.request::<serde_json::Value>(request).await.unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    for version in ["v1", "v1alpha3"] {
        let list = get(&format!("/apis/subresources.kubevirt.io/{version}")).await;
        let names: Vec<&str> =
            list["resources"].as_array().expect("a list").iter().filter_map(|one| one["name"].as_str()).collect();
        for name in ["virtualmachines/start", "virtualmachines/migrate", "virtualmachineinstances/console"] {
            assert!(names.contains(&name), "{version}: {names:?}");
        }
        let deadline = Instant::now() + Duration::from_secs(120);
        let service = format!("/apis/apiregistration.k8s.io/v1/apiservices/{version}.subresources.kubevirt.io");
        loop {
            let conditions = get(&service).await["status"]["conditions"].clone();
            let is = |one: &serde_json::Value| one["type"] == "Available" && one["status"] == "True";
            if conditions.as_array().into_iter().flatten().any(is) {
                break;
            }
            assert!(Instant::now() < deadline, "{conditions}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let version = get("/apis/subresources.kubevirt.io/v1/version").await;
    assert!(version["gitVersion"].as_str().is_some_and(|version| version.ends_with("+godwit")), "{version}");
    // kube-apiserver merges what an aggregated API says of its types with its own.
    let deadline = Instant::now() + Duration::from_secs(120);
    while !get("/openapi/v3").await["paths"]
        .as_object()
        .expect("paths")
        .contains_key("apis/subresources.kubevirt.io/v1")
    {
        assert!(Instant::now() < deadline, "the group is not in /openapi/v3");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for kubectl in kubectls() {
        let raw = cluster.kubectl(&kubectl, &["get", "--raw", "/apis/subresources.kubevirt.io/v1"]);
        assert!(raw.contains("virtualmachineinstances/console"), "{raw}");
    }
}

/// KubeVirt's own client, where the folder has it.
async fn virtctl_works(cluster: &Cluster, assets: &std::path::Path) {
    let virtctl = assets.join("virtctl");
    if !virtctl.is_file() {
        println!("virtctl is not tried: it is not in {}", assets.display());
        return;
    }
    let version = cluster.kubectl(&virtctl, &["version"]);
    assert!(version.contains("+godwit"), "{version}");
    let vm = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "flyer"},
        "spec": {"runStrategy": "Halted", "template": {"spec": common::rom_vmi("flyer")["spec"]}},
    });
    cluster.apply(vm).await.expect("apply VM");
    assert!(cluster.kubectl(&virtctl, &["start", "flyer"]).contains("scheduled to start"));
    let is_running = |vmi: &DynamicObject| status(vmi, "phase") == "Running" && is(vmi, "LiveMigratable");
    cluster.wait(&cluster.vmis(), "flyer", "it runs and can be moved", is_running).await;
    let kubeconfig = cluster.kubeconfig();
    let console = ["console", "flyer", "--kubeconfig", kubeconfig.to_str().expect("UTF-8")];
    let console = Terminal::run(&virtctl, &console, 120);
    console.shows("the guest talks", |lines| {
        lines.iter().any(|line| matches!(Line::parse(line), Some(Line::Beat { .. })))
    });
    drop(console);
    cluster.kubectl(&virtctl, &["pause", "vmi", "flyer"]);
    cluster.wait(&cluster.vmis(), "flyer", "it is paused", |vmi| is(vmi, "Paused")).await;
    cluster.kubectl(&virtctl, &["unpause", "vmi", "flyer"]);
    cluster.wait(&cluster.vmis(), "flyer", "it goes on", |vmi| !is(vmi, "Paused")).await;
    let before = status(&cluster.vmis().get("flyer").await.expect("VMI"), "nodeName");
    cluster.kubectl(&virtctl, &["migrate", "flyer"]);
    cluster.wait(&cluster.vmis(), "flyer", "it has moved", |vmi| status(vmi, "nodeName") != before).await;
    assert!(cluster.kubectl(&virtctl, &["stop", "flyer"]).contains("scheduled to stop"));
    cluster.wait_gone(&cluster.vmis(), "flyer").await;
}

fn is(vmi: &DynamicObject, condition: &str) -> bool {
    let all = vmi.data["status"]["conditions"].as_array();
    all.is_some_and(|all| all.iter().any(|one| one["type"] == condition && one["status"] == "True"))
}

/// A request that the webhooks refuse in their words, and one that the aggregated API answers.
async fn both_answer(cluster: &Cluster) {
    let migration = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
        "metadata": {"name": "none", "namespace": "default"}, "spec": {"vmiName": "nobody"},
    });
    let path = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstancemigrations?dryRun=All";
    let create = http::Request::post(path).header("content-type", "application/json");
    let create = create.body(migration.to_string().into_bytes()).expect("request");
    let refused = cluster.client.request_text(create).await.expect_err("there is no such VMI");
    let kube::Error::Api(refused) = refused else { panic!("{refused}\n{}", cluster.words()) };
    assert_eq!(
        refused.message,
        "admission webhook \"migration-create-validator.kubevirt.io\" denied the request: the VMI \"default/nobody\" does not exist",
        "{}",
        cluster.words()
    );
    let (code, said) = cluster.put_action(None, ("virtualmachineinstances", "nobody", "pause"), &json!({})).await;
    assert_eq!(
        (code, said.as_str()),
        (404, "virtualmachineinstance.kubevirt.io \"nobody\" not found"),
        "{}",
        cluster.words()
    );
}

async fn signing(cluster: &Cluster) -> String {
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), "kubevirt");
    let secret = secrets.get("godwit-ca").await.expect("the CA");
    String::from_utf8(secret.data.expect("data")["ca.crt"].0.clone()).expect("PEM")
}

async fn published(cluster: &Cluster) -> String {
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "kubevirt");
    maps.get("godwit-ca-bundle").await.expect("the bundle").data.expect("data")["ca-bundle.crt"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_and_nothing_is_refused_while_all_certificates_are_replaced() {
    let Some(cluster) = Cluster::rotating(2, ["100s", "20s"]).await else { return };
    let first = signing(&cluster).await;
    is_behind_the_api_server(&cluster).await;
    cluster.build_rom_image(Parameters { beat_ticks: 20, ..Parameters::default() });
    virtctl_works(&cluster, &common::real::assets().expect("it is there")).await;
    cluster.start_rom_guest("walker").await;
    cluster.wait(&cluster.vmis(), "walker", "it can be moved", |vmi| is(vmi, "LiveMigratable")).await;
    let console = Console::open(&cluster, "walker").await;
    let deadline = Instant::now() + Duration::from_secs(600);
    let mut turns = 0;
    // Until the CA of the beginning is over, and everything that it has signed.
    while published(&cluster).await.contains(first.trim()) {
        assert!(
            Instant::now() < deadline,
            "after {turns} migrations the first CA is still published\n{}",
            cluster.words()
        );
        turns += 1;
        let name = format!("turn-{turns}");
        cluster.migrate("walker", &name).await;
        loop {
            both_answer(&cluster).await;
            let migration = cluster.migrations().get(&name).await.expect("migration");
            match status(&migration, "phase").as_str() {
                "Succeeded" => break,
                "Failed" => panic!("{}\n{}", migration.data, cluster.words()),
                _ => {}
            }
        }
    }
    assert_ne!(signing(&cluster).await, first);
    console.hears(10, &cluster).await;
    console.is_complete();
    // Each node has asked several times, and nobody was refused.
    let requests: Api<CertificateSigningRequest> = Api::all(cluster.client.clone());
    let requests = requests.list(&Default::default()).await.expect("requests").items;
    let signed = requests.iter().filter(|one| one.status.as_ref().is_some_and(|status| status.certificate.is_some()));
    assert!(signed.count() >= 6, "{turns} migrations, {} requests", requests.len());
    println!("{turns} migrations and {} node certificates while the CA was replaced", requests.len());
}
