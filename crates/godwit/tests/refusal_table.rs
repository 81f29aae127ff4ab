//! The table of refusals (crates/api/fixtures/refusals.yaml), put to the embedded API server and to `godwit webhook`: both say
//! what it says, in the same words.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures::FutureExt;
use godwit_apiserver::{DirectDialer, Options, TlsFiles, serve};
use kube::Client;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use tempfile::TempDir;
use tokio::sync::oneshot;

#[path = "../src/admission.rs"]
mod admission;
#[path = "../../api/fixtures/refusals.rs"]
mod table;

use table::{Case, cases, merge};

const CONTROLLER: &str = "system:serviceaccount:kubevirt:kubevirt-controller";
const HANDLER: &str = "system:serviceaccount:kubevirt:kubevirt-handler";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Who asks: name, and the node it is bound to.
fn who(user: &str) -> (&str, Option<&str>) {
    let (name, node) = user.split_once('@').map_or((user, None), |(name, node)| (name, Some(node)));
    match name {
        "controller" => (CONTROLLER, node),
        "handler" => (HANDLER, node),
        other => (other, node),
    }
}

/// An API server without controllers, and the webhook server beside it.
struct Servers {
    folder: TempDir,
    authority: Issuer<'static, KeyPair>,
    url: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
    webhook: Option<(Child, String)>,
}

impl Drop for Servers {
    fn drop(&mut self) {
        if let Some((mut child, _)) = self.webhook.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the API server panicked");
        }
    }
}

impl Servers {
    async fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "test-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        std::fs::write(folder.path().join("ca.crt"), params.self_signed(&key).unwrap().pem()).unwrap();
        let authority = Issuer::new(params, key);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let mut servers = Self { folder, authority, url, stop: None, thread: None, webhook: None };
        let tls = servers.pair("server", "kube-apiserver", None);
        let options = Options {
            store: godwit_store::Store::open(servers.folder.path().join("store.redb")).unwrap(),
            listeners: vec![listener],
            kubelet_client: None,
            tls,
            admission: vec![Arc::new(admission::KubeVirtAdmission)],
            actions: Vec::new(),
            dialer: Arc::new(DirectDialer),
            roles: Vec::new(),
        };
        let (stop, stopped) = oneshot::channel();
        servers.stop = Some(stop);
        servers.thread = Some(std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(serve(options, async { drop(stopped.await) })).unwrap();
        }));
        let admin = servers.client("admin").await;
        for object in godwit_api::crds().into_iter().chain(godwit_api::initial_objects()) {
            servers.apply(&admin, &object).await;
        }
        servers.start_webhook();
        servers
    }

    /// A certificate pair; everybody may do everything, so that only the rules refuse.
    fn pair(&self, file: &str, user: &str, node: Option<&str>) -> TlsFiles {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        params.distinguished_name.push(DnType::OrganizationName, "system:masters");
        if let Some(node) = node {
            params.distinguished_name.push(DnType::OrganizationalUnitName, node);
        }
        params.subject_alt_names.push(SanType::IpAddress(Ipv4Addr::LOCALHOST.into()));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        let path = |ending: &str| self.folder.path().join(format!("{file}.{ending}"));
        std::fs::write(path("crt"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        TlsFiles { ca: self.folder.path().join("ca.crt"), cert: path("crt"), key: path("key") }
    }

    fn kubeconfig(&self, file: &str, server: &str) -> PathBuf {
        let path = self.folder.path().join(format!("{file}.kubeconfig"));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [{"name": "x", "cluster": {"server": server, "certificate-authority": "ca.crt"}}],
            "users": [{"name": "x", "user": {
                "client-certificate": format!("{file}.crt"), "client-key": format!("{file}.key")}}],
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        });
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    async fn client(&self, user: &str) -> Client {
        let (name, node) = who(user);
        self.pair(user, name, node);
        client_of(&self.kubeconfig(user, &self.url)).await
    }

    fn start_webhook(&mut self) {
        self.pair("webhook", CONTROLLER, None);
        let config = self.kubeconfig("webhook", &self.url);
        let file = |ending: &str| self.folder.path().join(format!("webhook.{ending}"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_godwit"))
            .args(["webhook", "--listen", "127.0.0.1:0"])
            .arg("--kubeconfig")
            .arg(config)
            .arg("--tls-cert")
            .arg(file("crt"))
            .arg("--tls-key")
            .arg(file("key"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("godwit webhook starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("stdout")).read_line(&mut line).expect("a line");
        let url = line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("{line:?}")).to_owned();
        self.webhook = Some((child, url));
    }

    /// A client of the webhook's server.
    async fn reviewer(&self) -> Client {
        let url = self.webhook.as_ref().expect("the webhook runs").1.clone();
        self.pair("reviewer", "reviewer", None);
        client_of(&self.kubeconfig("reviewer", &url)).await
    }

    async fn apply(&self, client: &Client, object: &Value) {
        let path = format!("{}/{}", collection(object, ""), object["metadata"]["name"].as_str().unwrap());
        // the server may be a moment behind its listener, and a kind behind its definition
        for _ in 0..500 {
            let patch = format!("{path}?fieldManager=test&force=true");
            if let Ok((200 | 201, _)) = send(client, "PATCH", &patch, "application/apply-patch+yaml", object).await {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("{path} cannot be made");
    }
}

async fn client_of(path: &Path) -> Client {
    let config = Kubeconfig::read_from(path).unwrap();
    let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

/// The path of the collection that an object belongs to.
fn collection(object: &Value, namespace: &str) -> String {
    let version = object["apiVersion"].as_str().unwrap();
    let root = if version.contains('/') { format!("/apis/{version}") } else { format!("/api/{version}") };
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or(namespace);
    let plural = plural(object["kind"].as_str().unwrap());
    if namespace.is_empty() || table::is_cluster_scoped(object) {
        format!("{root}/{plural}")
    } else {
        format!("{root}/namespaces/{namespace}/{plural}")
    }
}

fn plural(kind: &str) -> String {
    let lower = kind.to_lowercase();
    if lower.ends_with("ss") {
        return format!("{lower}es");
    }
    lower.strip_suffix('y').map_or_else(|| format!("{lower}s"), |stem| format!("{stem}ies"))
}

async fn send(
    client: &Client,
    method: &str,
    path: &str,
    content: &str,
    body: &Value,
) -> Result<(u16, Value), kube::Error> {
    raw(client, method, path, content, body.to_string().into_bytes())
        .await
        .map(|(code, bytes)| (code, serde_json::from_slice(&bytes).unwrap_or_default()))
}

async fn raw(
    client: &Client,
    method: &str,
    path: &str,
    content: &str,
    body: Vec<u8>,
) -> Result<(u16, Vec<u8>), kube::Error> {
    let request = http::Request::builder().method(method).uri(path).header("content-type", content);
    let answer = client.send(request.body(Body::from(body)).expect("request")).await?;
    let code = answer.status().as_u16();
    let bytes = answer.into_body().collect_bytes().await?;
    Ok((code, bytes.to_vec()))
}

const JSON: &str = "application/json";
const MERGE: &str = "application/merge-patch+json";

async fn ok(client: &Client, method: &str, path: &str, content: &str, body: &Value) -> Value {
    let (code, answer) = send(client, method, path, content, body).await.expect("an answer");
    assert!(code < 300, "{method} {path}: {code} {answer}");
    answer
}

struct Test {
    servers: Servers,
    admin: Client,
    reviewer: Client,
    clients: BTreeMap<String, Client>,
}

impl Test {
    async fn start() -> Self {
        let servers = Servers::start().await;
        let mut clients = BTreeMap::new();
        for user in ["admin", "controller", "handler", "handler@node01", "handler@node02", "handler@node03"] {
            clients.insert(user.to_owned(), servers.client(user).await);
        }
        let (admin, reviewer) = (clients["admin"].clone(), servers.reviewer().await);
        Self { servers, admin, reviewer, clients }
    }

    /// Makes an object with the status that it is to have.
    async fn make(&self, namespace: &str, object: &Value) -> Value {
        let controller = &self.clients["controller"];
        let mut object = object.clone();
        let status = object["status"].take();
        object.as_object_mut().unwrap().remove("status");
        let collection = collection(&object, namespace);
        let made = ok(controller, "POST", &collection, JSON, &object).await;
        if status.is_null() {
            return made;
        }
        let name = object["metadata"]["name"].as_str().unwrap();
        // a VMI has no status subresource
        let part = if object["kind"] == "VirtualMachineInstance" { "" } else { "/status" };
        ok(controller, "PATCH", &format!("{collection}/{name}{part}"), MERGE, &json!({ "status": status })).await
    }

    /// What the installation says, as the case has it.
    async fn configure(&self, case: &Case) {
        let path = "/apis/kubevirt.io/v1/namespaces/kubevirt/kubevirts/kubevirt";
        let mut kubevirt = ok(&self.admin, "GET", path, JSON, &json!({})).await;
        kubevirt["metadata"]["annotations"] = case.annotations.clone().unwrap_or_default();
        kubevirt["spec"]["configuration"] = case.configuration.clone().unwrap_or(json!({}));
        ok(&self.admin, "PUT", path, JSON, &kubevirt).await;
        let maps = "/api/v1/namespaces/kubevirt/configmaps";
        let _ = send(&self.admin, "DELETE", &format!("{maps}/kubevirt-config"), JSON, &json!({})).await;
        if let Some(data) = &case.config {
            let map =
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kubevirt-config"}, "data": data});
            ok(&self.admin, "POST", maps, JSON, &map).await;
        }
    }

    async fn review(&self, path: &str, request: &Value) -> Value {
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request});
        let (code, answer) = send(&self.reviewer, "POST", path, JSON, &review).await.expect("an answer");
        assert_eq!(code, 200, "{path}: {answer}");
        assert_eq!(answer["kind"], "AdmissionReview");
        assert_eq!(answer["response"]["uid"], request["uid"]);
        answer["response"].clone()
    }

    /// The webhooks' answer to the request: the mutated object, or webhook and refusal.
    async fn webhooks(&self, mut request: Value) -> Result<Value, (&'static str, Value)> {
        let here = |route: &&godwit_webhook::routes::Route| {
            request["resource"]["resource"] == route.resource
                && request["resource"]["group"] == route.group
                && request["operation"].as_str().is_some_and(|operation| route.operations.contains(&operation))
        };
        let (mutating, validating): (Vec<&godwit_webhook::routes::Route>, Vec<_>) = godwit_webhook::routes::ROUTES
            .iter()
            .filter(here)
            .partition(|route| route.act == godwit_webhook::routes::Act::Mutate);
        for route in mutating {
            let response = self.review(route.path, &request).await;
            assert_eq!(response["allowed"], true, "{response}");
            if let Some(patch) = response["patch"].as_str() {
                assert_eq!(response["patchType"], "JSONPatch");
                let patch = BASE64_STANDARD.decode(patch).expect("base64");
                let patch: json_patch::Patch = serde_json::from_slice(&patch).expect("a JSON patch");
                json_patch::patch(&mut request["object"], &patch).expect("the patch fits");
            }
        }
        assert!(!validating.is_empty(), "no webhook for {}", request["resource"]);
        for route in validating {
            let response = self.review(route.path, &request).await;
            if response["allowed"] != true {
                return Err((route.webhook, response["status"].clone()));
            }
        }
        Ok(request["object"].clone())
    }

    async fn run(&self, number: usize, case: &Case) {
        let namespace = format!("case-{number}");
        let at = format!("{} ({namespace})", case.name);
        ok(&self.admin, "POST", "/api/v1/namespaces", JSON, &json!({"metadata": {"name": namespace}})).await;
        self.configure(case).await;
        // what the case before had beside its namespace
        for path in [
            "/api/v1/nodes",
            "/apis/nodemaintenance.medik8s.io/v1beta1/nodemaintenances",
            "/apis/nodemaintenance.kubevirt.io/v1beta1/nodemaintenances",
            "/apis/kubevirt.io/v1alpha1/nodemaintenances",
        ] {
            ok(&self.admin, "DELETE", path, JSON, &json!({})).await;
        }
        let mut uids = BTreeMap::new();
        for part in &case.world {
            let made = self.make(&namespace, &part.object).await;
            let name = made["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            uids.insert(format!("<uid:{name}>"), made["metadata"]["uid"].as_str().unwrap_or_default().to_owned());
        }
        let client = &self.clients[&case.user];
        let (old, object, answer) = match &case.old {
            None => {
                let path = format!("{}?dryRun=All", collection(&case.object, &namespace));
                (None, case.object.clone(), send(client, "POST", &path, JSON, &case.object).await)
            }
            Some(old) => {
                let singleton = case.kind == "KubeVirt";
                let path = format!("{}/{}", collection(old, &namespace), old["metadata"]["name"].as_str().unwrap());
                if !singleton {
                    self.make(&namespace, old).await;
                }
                let stored = ok(&self.admin, "GET", &path, JSON, &json!({})).await;
                let mut object = stored.clone();
                merge(&mut object, &case.object);
                let answer = send(client, "PATCH", &format!("{path}?dryRun=All"), MERGE, &case.object).await;
                (Some(stored), object, answer)
            }
        };
        let (code, body) = answer.expect("an answer");
        let reviewed = self.webhooks(request(case, &namespace, &object, old.as_ref())).await;
        let Some(says) = &case.says else {
            assert!(code < 300, "{at}: {code} {body}");
            let changed = reviewed.unwrap_or_else(|refused| panic!("{at}: {refused:?}"));
            for part in ["/spec", "/metadata/labels", "/metadata/annotations", "/metadata/finalizers"] {
                // an empty map and none say the same
                let said = |object: &Value| object.pointer(part).filter(|value| **value != json!({})).cloned();
                assert_eq!(said(&changed), said(&body), "{at}: {part}");
            }
            return;
        };
        let mut says = says.replace("<namespace>", &namespace);
        for (mark, uid) in &uids {
            says = says.replace(mark, uid);
        }
        let message = format!("admission webhook \"{}\" denied the request: {says}", case.webhook);
        let (expected, reason) = case.refused_with();
        assert_eq!((code, body["message"].as_str()), (expected, Some(message.as_str())), "{at}");
        assert_eq!(body["reason"], reason, "{at}");
        let fields = |causes: &Value| -> Vec<String> {
            let causes = causes.as_array().into_iter().flatten();
            causes.map(|cause| cause["field"].as_str().unwrap_or_default().to_owned()).collect()
        };
        assert_eq!(fields(&body["details"]["causes"]), case.field.iter().cloned().collect::<Vec<_>>(), "{at}");
        let (webhook, status) = reviewed.expect_err(&at);
        let told =
            format!("admission webhook \"{webhook}\" denied the request: {}", status["message"].as_str().unwrap());
        assert_eq!(told, message, "{at}: webhook");
        assert_eq!((&status["code"], &status["reason"]), (&body["code"], &body["reason"]), "{at}: webhook");
        let said = |causes: &Value| -> Vec<(String, String)> {
            let causes = causes.as_array().into_iter().flatten();
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            causes.map(|cause| (text(&cause["reason"]), text(&cause["message"]))).collect()
        };
        assert_eq!(said(&status["details"]["causes"]), said(&body["details"]["causes"]), "{at}: webhook");
        assert_eq!(fields(&status["details"]["causes"]), fields(&body["details"]["causes"]), "{at}: webhook");
    }
}

/// The request's half of a review, as the API server would send it.
fn request(case: &Case, namespace: &str, object: &Value, old: Option<&Value>) -> Value {
    let (group, version) = object["apiVersion"].as_str().unwrap().split_once('/').expect("a group");
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or(namespace);
    let mut object = object.clone();
    if !table::is_cluster_scoped(&object) {
        object["metadata"]["namespace"] = json!(namespace);
    }
    let (name, node) = who(&case.user);
    let mut user = json!({"username": name, "groups": ["system:masters", "system:authenticated"]});
    if let Some(node) = node {
        user["extra"] = json!({NODE_NAME: [node]});
    }
    json!({
        "uid": format!("review of {}", case.name),
        "kind": {"group": group, "version": version, "kind": case.kind},
        "resource": {"group": group, "version": version, "resource": plural(&case.kind)},
        "name": object["metadata"]["name"], "namespace": namespace,
        "operation": if old.is_some() { "UPDATE" } else { "CREATE" },
        "userInfo": user, "object": object, "oldObject": old, "dryRun": true,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_server_and_the_webhook_say_what_the_table_says() {
    let test = Test::start().await;
    let mut wrong = Vec::new();
    for (number, case) in cases().iter().enumerate() {
        if std::panic::AssertUnwindSafe(test.run(number, case)).catch_unwind().await.is_err() {
            wrong.push(case.name.clone());
        }
    }
    assert!(wrong.is_empty(), "not as the table says (each is told above): {wrong:#?}");
    // all of it was a dry run
    let left =
        ok(&test.admin, "GET", "/apis/migrations.kubevirt.io/v1alpha1/migrationpolicies", JSON, &json!({})).await;
    assert_eq!(left["items"], json!([]));
    assert!(test.servers.webhook.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_webhook_survives_what_is_no_review() {
    let test = Test::start().await;
    let path = "/migration-validate-create";
    let post = async |path: &str, body: &[u8]| {
        let (code, text) = raw(&test.reviewer, "POST", path, JSON, body.to_vec()).await.expect("an answer");
        (code, String::from_utf8_lossy(&text).into_owned())
    };
    for (body, said) in [
        (&b"rubbish"[..], "the body is no AdmissionReview"),
        (b"", "the body is no AdmissionReview"),
        (b"\xff\xfe\x00", "the body is no AdmissionReview"),
        (b"{}", "not AdmissionReview of admission.k8s.io/v1"),
        (br#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}"#, "the review has no request"),
    ] {
        let (code, text) = post(path, body).await;
        assert_eq!(code, 400, "{text}");
        assert!(text.contains(said), "{text}");
    }
    assert_eq!(post("/nowhere", b"{}").await.0, 404);
    // The answer is read and the connection good for the next request, however far the client was with writing.
    for _ in 0..8 {
        assert_eq!(post(path, &vec![b' '; 9 << 20]).await.0, 413);
        let (code, _) = raw(&test.reviewer, "GET", path, JSON, Vec::new()).await.expect("an answer");
        assert_eq!(code, 405);
    }
    let (code, _) = raw(&test.reviewer, "GET", "/healthz", JSON, Vec::new()).await.expect("an answer");
    assert_eq!(code, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_webhook_marks_a_vmi_whose_pod_is_evicted() {
    let test = Test::start().await;
    let vmi = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": "db"},
        "spec": {
            "evictionStrategy": "LiveMigrate",
            "domain": {"memory": {"guest": "128Mi"}, "devices": {}},
        },
        "status": {"nodeName": "node01", "conditions": [{"type": "LiveMigratable", "status": "True"}]},
    });
    test.make("default", &vmi).await;
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "virt-launcher-db-abcde",
            "labels": {"kubevirt.io": "virt-launcher"}, "annotations": {"kubevirt.io/domain": "db"},
        },
        "spec": {"nodeName": "node01", "containers": [{"name": "compute", "image": "x"}]},
    });
    ok(&test.admin, "POST", "/api/v1/namespaces/default/pods", JSON, &pod).await;
    let ask = |dry_run: bool| {
        json!({
            "uid": "u", "kind": {"group": "policy", "version": "v1", "kind": "Eviction"},
            "resource": {"group": "", "version": "v1", "resource": "pods"}, "subResource": "eviction",
            "name": "virt-launcher-db-abcde", "namespace": "default", "operation": "CREATE", "dryRun": dry_run,
            "userInfo": {"username": "admin"},
            "object": {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "virt-launcher-db-abcde"}},
        })
    };
    let marked = async || {
        let path = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstances/db";
        ok(&test.admin, "GET", path, JSON, &json!({})).await["status"]["evacuationNodeName"].clone()
    };
    let triggered = "Eviction triggered evacuation of VMI \"default/db\"";
    for (dry_run, mark, said) in [
        (true, Value::Null, triggered.to_owned()),
        (false, json!("node01"), triggered.to_owned()),
        (false, json!("node01"), format!("Evacuation in progress: {triggered}")),
    ] {
        let response = test.review("/pod-eviction-validate", &ask(dry_run)).await;
        assert_eq!(response["allowed"], false);
        assert_eq!((&response["status"]["code"], &response["status"]["message"]), (&json!(429), &json!(said)));
        assert_eq!(marked().await, mark, "dry run: {dry_run}");
    }
}
