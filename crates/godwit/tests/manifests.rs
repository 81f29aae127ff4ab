//! What `godwit manifests` prints is taken by an API server, field by field, and `deploy/` is the same.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{Cluster, kubectls, text};
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, ValidationDirective};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn manifests(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_godwit")).arg("manifests").args(arguments).output().expect("godwit starts")
}

/// What it prints without any option.
fn printed() -> String {
    let output = manifests(&[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

fn documents(text: &str) -> Vec<Value> {
    let documents = text.split("\n---\n").map(|document| document.trim_start_matches("---\n"));
    documents.map(|document| serde_saphyr::from_str(document).unwrap_or_else(|e| panic!("{e}: {document}"))).collect()
}

async fn apply(cluster: &Cluster, object: &Value, dry_run: bool) -> Result<DynamicObject, kube::Error> {
    let typed: DynamicObject = serde_json::from_value(object.clone()).expect("an object");
    let gvk = GroupVersionKind::try_from(typed.types.as_ref().expect("apiVersion and kind")).expect("apiVersion");
    let mut resource = ApiResource::from_gvk(&gvk);
    if gvk.kind == "PriorityClass" {
        resource.plural = "priorityclasses".to_owned();
    }
    let api: Api<DynamicObject> = match &typed.metadata.namespace {
        Some(namespace) => Api::namespaced_with(cluster.client.clone(), namespace, &resource),
        None => Api::all_with(cluster.client.clone(), &resource),
    };
    let parameters = PatchParams {
        dry_run,
        force: true,
        field_manager: Some("test".to_owned()),
        field_validation: Some(ValidationDirective::Strict),
    };
    api.patch(typed.metadata.name.as_deref().expect("a name"), &parameters, &Patch::Apply(object)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_takes_them_all_with_strict_validation() {
    let cluster = Cluster::start(1).await;
    let printed = printed();
    let objects = documents(&printed);
    // In a dry run none is made, and what is in one is refused where it is not there.
    for namespace in objects.iter().filter(|one| one["kind"] == "Namespace" && one["metadata"]["name"] != "kubevirt") {
        apply(&cluster, namespace, false).await.expect("apply a namespace");
    }
    for object in &objects {
        if let Err(error) = apply(&cluster, object, true).await {
            panic!("{} {}: {error}", object["kind"], object["metadata"]["name"]);
        }
    }
    // The validation is one: what is not known is refused, in every kind that has a spec of its own.
    for kind in ["Deployment", "DaemonSet", "Service", "PodDisruptionBudget", "APIService"] {
        let mut wrong = objects.iter().find(|one| one["kind"] == kind).expect("one of them").clone();
        wrong["spec"]["sepc"] = json!({});
        let refusal = apply(&cluster, &wrong, true).await.expect_err("it is refused").to_string();
        assert!(refusal.contains("sepc"), "{kind}: {refusal}");
    }
    // As people apply them.
    for kubectl in kubectls().iter().rev().take(1) {
        let apply = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "--force-conflicts", "-f", "-"];
        let output = cluster.try_kubectl(kubectl, &apply, Some(&printed));
        assert!(output.status.success(), "{}", text(&output.stderr));
        let lines = text(&output.stdout).lines().filter(|line| line.ends_with("(server dry run)")).count();
        assert_eq!(lines, objects.len(), "{}", text(&output.stdout));
    }
}

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

/// The kustomize base in `deploy/` is what is printed.
#[test]
fn base() {
    let parts = godwit_manifests::parts(&godwit_manifests::Options::default()).unwrap();
    let mut files: Vec<(String, String)> = parts
        .iter()
        .map(|part| {
            (format!("{}.yaml", part.name), format!("# {}\n{}", part.title, godwit_manifests::documents(&part.objects)))
        })
        .collect();
    files.push(("kustomization.yaml".to_owned(), godwit_manifests::kustomization(&parts)));
    let (part, component) = godwit_manifests::component();
    let monitoring = format!("# {}\n{}", part.title, godwit_manifests::documents(&part.objects));
    files.push((format!("monitoring/{}.yaml", part.name), monitoring));
    files.push(("monitoring/kustomization.yaml".to_owned(), component));
    if std::env::var_os("GODWIT_BLESS").is_some() {
        std::fs::create_dir_all(deploy().join("monitoring")).unwrap();
        for (name, text) in &files {
            std::fs::write(deploy().join(name), text).unwrap();
        }
    }
    let behind =
        "deploy/ is behind the crate godwit-manifests: GODWIT_BLESS=1 cargo test -p godwit --test manifests base";
    for (name, text) in &files {
        assert!(std::fs::read_to_string(deploy().join(name)).unwrap_or_default() == *text, "{name}: {behind}");
    }
    let within = |folder: &str| -> Vec<String> {
        let all = std::fs::read_dir(deploy().join(folder)).unwrap().flatten();
        all.filter(|entry| entry.path().is_file())
            .map(|entry| Path::new(folder).join(entry.file_name()).to_str().unwrap().to_owned())
            .collect()
    };
    let there: BTreeSet<String> = within("").into_iter().chain(within("monitoring")).collect();
    let wanted: BTreeSet<String> = files.into_iter().map(|(name, _)| name).collect();
    assert_eq!(there, wanted, "{behind}");
}

/// What kustomize makes of a folder.
fn built(kubectl: &Path, folder: &Path) -> Vec<Value> {
    let output = Command::new(kubectl).arg("kustomize").arg(folder).output().expect("kubectl starts");
    assert!(output.status.success(), "{}", text(&output.stderr));
    sorted(documents(&text(&output.stdout)))
}

/// What kustomize makes of a kustomization outside of the base, which is told by what path the base is reached.
fn built_over(kubectl: &Path, kustomization: impl Fn(&str) -> Value) -> Vec<Value> {
    let folder = tempfile::tempdir().expect("a folder");
    let base = deploy().canonicalize().expect("deploy/");
    let path = relative(&folder.path().canonicalize().expect("a path"), &base);
    let text = kustomization(path.to_str().expect("UTF-8")).to_string();
    std::fs::write(folder.path().join("kustomization.yaml"), text).expect("write");
    built(kubectl, folder.path())
}

/// Both ways of installing install the same.
#[test]
fn kustomize_makes_the_same_of_the_base() {
    let Some(kubectl) = kubectls().pop() else { return };
    assert_eq!(built(&kubectl, &deploy()), sorted(documents(&printed())));
    // The image is named in one place.
    let overlay = |base: &str| {
        json!({
            "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [base],
            "images": [{"name": "godwit", "newName": "registry.example.com/godwit", "newTag": "v9"}],
        })
    };
    let output = manifests(&["--image", "registry.example.com/godwit:v9"]);
    assert_eq!(built_over(&kubectl, overlay), sorted(documents(&text(&output.stdout))));
    // And the monitoring is one more line.
    let overlay = |base: &str| {
        json!({
            "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
            "resources": [base], "components": [format!("{base}/monitoring")],
        })
    };
    let output = manifests(&["--monitoring"]);
    assert_eq!(built_over(&kubectl, overlay), sorted(documents(&text(&output.stdout))));
}

/// The way from one folder to another; kustomize takes no absolute ones.
fn relative(from: &Path, to: &Path) -> PathBuf {
    from.components().skip(1).map(|_| "..").collect::<PathBuf>().join(to.strip_prefix("/").expect("absolute"))
}

fn sorted(mut objects: Vec<Value>) -> Vec<Value> {
    objects.sort_by_key(|one| {
        ["kind", "namespace", "name"].map(|field| match field {
            "kind" => one["kind"].to_string(),
            field => one["metadata"][field].to_string(),
        })
    });
    objects
}

#[test]
fn what_cannot_be_installed_is_said() {
    for (arguments, words) in [
        (&["--namespace", "kube-system"][..], "cannot install into the namespace kube-system"),
        (&["--namespace", "Mine"], "\"Mine\" cannot be a namespace"),
        (&["--components", "nodepool"], "node pools are not built yet"),
        (&["--components", "plan", "--monitoring"], "cannot install monitoring"),
        (&["--monitoring", "--monitoring-account", "prometheus"], "is no NAMESPACE/NAME"),
        (&["--migration-network", "Fast Lane"], "\"Fast Lane\" cannot be a NetworkAttachmentDefinition"),
        (&["--migration-network", "fast", "--migration-interface", "eth1"], "cannot be used with"),
        (&["--handler-in-pod-network", "--migration-interface", "eth1"], "cannot be used with"),
    ] {
        let output = manifests(arguments);
        assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}");
        assert!(text(&output.stderr).contains(words), "{}", text(&output.stderr));
    }
}
