//! On etcd and kube-apiserver: `godwit api` behind kube-apiserver, all certificates replaced in the middle of everything, and its
//! processes one after the other.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::real::{API, OTHER_API, Wishes};
use common::streams::Console;
use common::terminal::Terminal;
use common::{Cluster, kubectls, status, text};
use godwit_guest_rom::{Line, Parameters};
use kube::api::DynamicObject;
use kube::config::{Config, Kubeconfig};
use serde_json::json;
use std::cell::Cell;
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
    // kube-apiserver merges what an aggregated API says of itself with its own.
    let start = "/apis/subresources.kubevirt.io/v1/namespaces/{namespace}/virtualmachines/{name}/start";
    for document in ["/openapi/v3/apis/subresources.kubevirt.io/v1", "/openapi/v2"] {
        let deadline = Instant::now() + Duration::from_secs(120);
        let request = || http::Request::get(document).body(Vec::new()).expect("request");
        loop {
            let said = cluster.client.request::<serde_json::Value>(request()).await.unwrap_or_default();
            if said["paths"][start]["put"].is_object() {
                break;
            }
            assert!(Instant::now() < deadline, "{start} is not in {document}\n{}", cluster.words());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    for kubectl in kubectls() {
        let raw = cluster.kubectl(&kubectl, &["get", "--raw", "/apis/subresources.kubevirt.io/v1"]);
        assert!(raw.contains("virtualmachineinstances/console"), "{raw}");
        // Neither finds fault with what they are told of it.
        for asked in [&["api-resources"][..], &["explain", "vmi.spec"], &["explain", "vm", "--recursive"]] {
            let output = cluster.try_kubectl(&kubectl, asked, None);
            assert!(output.status.success(), "{} {asked:?}: {}", kubectl.display(), text(&output.stderr));
            assert_eq!(text(&output.stderr), "", "{} {asked:?}", kubectl.display());
        }
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

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_and_nothing_is_refused_while_all_certificates_are_replaced() {
    let Some(cluster) = Cluster::rotating(2, ["100s", "20s"]).await else { return };
    let first = cluster.signing_ca().await;
    is_behind_the_api_server(&cluster).await;
    cluster.build_rom_image(Parameters { beat_ticks: 20, ..Parameters::default() });
    virtctl_works(&cluster, &common::real::assets().expect("it is there")).await;
    cluster.start_rom_guest("walker").await;
    cluster.wait(&cluster.vmis(), "walker", "it can be moved", |vmi| is(vmi, "LiveMigratable")).await;
    let console = Console::open(&cluster, "walker").await;
    let deadline = Instant::now() + Duration::from_secs(600);
    let mut turns = 0;
    // Until the CA of the beginning is over, and everything that it has signed.
    while cluster.published_cas().await.contains(first.trim()) {
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
    assert_ne!(cluster.signing_ca().await, first);
    console.hears(10, &cluster).await;
    console.is_complete();
    // Each node has asked several times, and nobody was refused.
    let (asked, signed) = cluster.node_certificates().await;
    assert!(signed >= 6, "{turns} migrations, {asked} requests");
    println!("{turns} migrations and {signed} node certificates while the CA was replaced");
}

/// As a rolling update replaces them: each says that it is not ready any more, and ends a moment later.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_refused_while_one_after_the_other_of_two_is_replaced() {
    let Some(mut cluster) = Cluster::wished(1, Wishes::default()).await else { return };
    // What is refused shall be seen here, and not be asked for again.
    let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig()).expect("kubeconfig");
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await.expect("config");
    config.default_retry = false;
    cluster.client = kube::Client::try_from(config).expect("client");
    let real = cluster.real.as_ref().expect("a real API server");
    real.start_api_process(OTHER_API);
    let asked = Cell::new(0);
    let asks = async || {
        loop {
            both_answer(&cluster).await;
            asked.set(asked.get() + 1);
        }
    };
    let replaced = async {
        cluster.is_asked(OTHER_API, true).await;
        for name in [API, OTHER_API, API] {
            let before = asked.get();
            let pid = cluster.pid(name);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("SIGTERM");
            cluster.is_asked(name, false).await;
            let deadline = Instant::now() + Duration::from_secs(120);
            while real.runs(name) {
                assert!(Instant::now() < deadline, "{name} does not end\n{}", cluster.words());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            println!("{} requests were answered while {name} went", asked.get() - before);
            let before = asked.get();
            real.start_api_process(name);
            cluster.is_asked(name, true).await;
            while asked.get() < before + 20 {
                assert!(Instant::now() < deadline, "nothing is answered\n{}", cluster.words());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    };
    tokio::select! {
        () = cluster.tells_endpoints() => {}
        () = asks() => {}
        () = asks() => {}
        () = replaced => {}
    }
}
