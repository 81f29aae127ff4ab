//! etcd and kube-apiserver under the tests' nodes, in the place of the embedded server.
//!
//! Both run in the cluster's namespace `fabric`, where their ports are free whatever else runs on the machine; a relay
//! makes the API server reachable on 127.0.0.1. What is started lives in the cluster's namespaces or has its record in `run/`,
//! so `godwit down` ends it, whatever became of the test.

mod nodes;

use super::build::Build;
use super::{kill_hard, text, words};
use godwit_api::{Installation, access};
use godwit_network::Namespace;
use godwit_standalone::{CONTROL_PLANE_ADDRESS, Cluster as Shape, FABRIC_API_PORT, Layout, Process, fabric, pki};
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::{Client, core::Request};
use nix::sys::signal::{Signal, kill};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Names of the processes, as their logs and records have them.
const ETCD: &str = "etcd";
const CONTROLLER_MANAGER: &str = "kube-controller-manager";
pub const API_SERVER: &str = "kube-apiserver";
pub const CONTROLLER: &str = "controller";
/// A second controller, in the tests that start one.
pub const STANDBY: &str = "standby";
/// `godwit api`, and a second one in the tests that start one.
pub const API: &str = "api";
pub const OTHER_API: &str = "api-2";
const CONTROLLER_ACCOUNT: &str = "kubevirt-controller";
const API_ACCOUNT: &str = "kubevirt-apiserver";
/// Where they listen, in the namespace of the API server.
pub const APIS: [(&str, u16); 2] = [(API, 8443), (OTHER_API, 8444)];
/// The Service by which the API server reaches it.
const API_SERVICE: &str = "virt-api";
/// The DaemonSet of handlers.
const HANDLER: &str = "virt-handler";
/// Where the controllers answer probes and scrapes, each on a port of its own.
const HEALTH_PORTS: [(&str, u16); 2] = [(CONTROLLER, 8080), (STANDBY, 8081)];
/// How long all of it may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const MOMENT: Duration = Duration::from_millis(50);

/// The folder with the two programs, when the environment names one that has them.
pub fn assets() -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os("KUBEBUILDER_ASSETS")?);
    [ETCD, API_SERVER].iter().all(|program| folder.join(program).is_file()).then_some(folder)
}

/// An API server of Kubernetes, and what makes a cluster of it.
pub struct Real {
    assets: PathBuf,
    layout: Layout,
    shape: Shape,
    switch: Namespace,
    relay: Relay,
    wishes: Wishes,
    /// What is started is of this build.
    build: Mutex<Arc<Build>>,
}

/// What is not to be as always.
#[derive(Default)]
pub struct Wishes {
    /// How long the CA lives, and what it signs.
    pub lifetimes: Option<[&'static str; 2]>,
    /// Where godwit is installed.
    pub installation: Installation,
    /// The build that is installed, by kubectl and as docs/install.md says, and of which everything is that is started, the handlers
    /// as processes of their own; kubelets are those under test. None: the one under test, in a quicker way.
    pub installed: Option<(Build, PathBuf)>,
    /// The nodes have a network for migrations, which their handlers know as `kubevirt/fast`.
    pub migration_network: bool,
}

impl Real {
    /// Starts everything and waits until the nodes take VMs.
    pub async fn start(assets: PathBuf, folder: &Path, nodes: usize, wishes: Wishes) -> (Self, Client) {
        let layout = Layout::open(folder).expect("layout");
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let names = (1..=nodes).map(|number| format!("node{number}")).collect();
        let api_port = port.local_addr().expect("its number").port();
        let shape = Shape { id: layout.id(), nodes: names, api_port, migration_network: wishes.migration_network };
        layout.save(&shape).expect("cluster.json");
        pki::ensure(&layout, &shape).expect("certificates");
        fabric::ensure(&shape).await.expect("the fabric");
        let switch = Namespace::open(&fabric::switch(&shape)).expect("the switch");
        let relay = Relay::start(port, switch.clone());
        let build = match &wishes.installed {
            Some((build, _)) => build.clone(),
            None => Build::under_test(wishes.installation.namespace()),
        };
        let real = Self { assets, layout, shape, switch, relay, wishes, build: Mutex::new(Arc::new(build)) };
        real.make_certificates();
        real.start_etcd();
        real.start_api_server();
        let client = godwit_standalone::client(&real.layout.kubeconfig()).await.expect("client");
        real.until_it_serves(&client).await;
        real.furnish(&client).await;
        real.start_api(&client).await;
        real.kubeconfig(&client, CONTROLLER_ACCOUNT, None).await;
        real.start_controller(CONTROLLER);
        if real.wishes.installed.is_some() {
            real.launch(&Build::under_test(real.installed_in()));
        }
        for (index, name) in real.shape.nodes.iter().enumerate() {
            real.join(&client, name, u8::try_from(index + 1).expect("few nodes")).await;
        }
        real.until_ready(&client).await;
        if real.wishes.installed.is_some() {
            real.launch(&real.build());
        }
        (real, client)
    }

    /// What is started now is of this build.
    pub fn build(&self) -> Arc<Build> {
        self.build.lock().expect("nobody panics with it").clone()
    }

    /// From now on what is started is of this build, but for launchers: see [`Self::launch`].
    pub fn install(&self, build: &Build) {
        *self.build.lock().expect("nobody panics with it") = Arc::new(build.clone());
    }

    fn file(&self, name: &str) -> PathBuf {
        self.layout.root().join("kubernetes").join(name)
    }

    /// A certificate authority of the API server's front proxy, and a key for service accounts.
    fn make_certificates(&self) {
        std::fs::create_dir_all(self.file("")).expect("a folder");
        let key = KeyPair::generate().expect("a key");
        std::fs::write(self.file("accounts.key"), key.serialize_pem()).expect("write");
        std::fs::write(self.file("accounts.pub"), key.public_key_pem()).expect("write");
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "front-proxy-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        std::fs::write(self.file("front-ca.crt"), params.self_signed(&key).expect("a CA").pem()).expect("write");
        let authority = Issuer::new(params, key);
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "front-proxy-client");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &authority).expect("a certificate");
        std::fs::write(self.file("front-proxy-client.crt"), certificate.pem()).expect("write");
        std::fs::write(self.file("front-proxy-client.key"), key.serialize_pem()).expect("write");
    }

    /// Starts a process in a namespace of the cluster, with a log and a record of its own.
    fn spawn(&self, name: &str, namespace: &Namespace, program: &Path, arguments: &[impl AsRef<OsStr> + Sync]) {
        for folder in ["log", "run"] {
            std::fs::create_dir_all(self.layout.root().join(folder)).expect("a folder");
        }
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.layout.log(name)).expect("a log");
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone().expect("the log")).stderr(log);
        command.process_group(0);
        let spawned = namespace.run(|| command.spawn()).expect("the namespace");
        let mut child = spawned.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let process = Process::of(i32::try_from(child.id()).expect("a pid")).expect("it runs");
        std::fs::write(self.layout.pid(name), format!("{} {}\n", process.pid, process.started)).expect("record it");
        std::thread::spawn(move || child.wait());
    }

    fn start_etcd(&self) {
        let arguments = [
            format!("--data-dir={}", self.file("etcd").display()),
            "--listen-client-urls=http://127.0.0.1:2379".to_owned(),
            "--advertise-client-urls=http://127.0.0.1:2379".to_owned(),
            "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
            "--log-level=warn".to_owned(),
            // Nobody pulls this machine's plug while a test runs.
            "--unsafe-no-fsync".to_owned(),
        ];
        self.spawn(ETCD, &self.switch, &self.assets.join(ETCD), &arguments);
    }

    /// Starts kube-apiserver, also anew after [`Self::kill`].
    pub fn start_api_server(&self) {
        let pair = |flags: [&str; 2], identity: &str| {
            let pair = pki::pair(&self.layout, identity);
            [format!("--{}={}", flags[0], pair.cert.display()), format!("--{}={}", flags[1], pair.key.display())]
        };
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.file(name).display());
        let ca = pki::ca(&self.layout);
        let mut arguments = vec![
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            format!("--secure-port={FABRIC_API_PORT}"),
            format!("--advertise-address={CONTROL_PLANE_ADDRESS}"),
            format!("--client-ca-file={}", ca.display()),
            format!("--kubelet-certificate-authority={}", ca.display()),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            file("service-account-key-file", "accounts.pub"),
            file("service-account-signing-key-file", "accounts.key"),
            "--authorization-mode=Node,RBAC".to_owned(),
            // As every cluster has it that has network plugins.
            "--allow-privileged=true".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            // What these two leave to kube-controller-manager, nobody would do.
            "--disable-admission-plugins=ServiceAccount,StorageObjectInUseProtection".to_owned(),
            "--enable-aggregator-routing=true".to_owned(),
            file("requestheader-client-ca-file", "front-ca.crt"),
            "--requestheader-allowed-names=front-proxy-client".to_owned(),
            "--requestheader-username-headers=X-Remote-User".to_owned(),
            "--requestheader-group-headers=X-Remote-Group".to_owned(),
            "--requestheader-uid-headers=X-Remote-Uid".to_owned(),
            "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
            file("proxy-client-cert-file", "front-proxy-client.crt"),
            file("proxy-client-key-file", "front-proxy-client.key"),
        ];
        arguments.extend(pair(["tls-cert-file", "tls-private-key-file"], pki::API_SERVER));
        arguments.extend(pair(["kubelet-client-certificate", "kubelet-client-key"], pki::KUBELET_CLIENT));
        self.spawn(API_SERVER, &self.switch, &self.assets.join(API_SERVER), &arguments);
    }

    /// The number of one of the processes.
    pub fn pid(&self, name: &str) -> nix::unistd::Pid {
        let process = godwit_standalone::find(&self.layout, name).unwrap_or_else(|| panic!("{name} does not run"));
        nix::unistd::Pid::from_raw(process.pid)
    }

    /// Whether it runs.
    pub fn runs(&self, name: &str) -> bool {
        godwit_standalone::find(&self.layout, name).is_some()
    }

    /// Tells it to end, and waits until it has.
    pub async fn end(&self, name: &str) {
        kill(self.pid(name), Signal::SIGTERM).expect("SIGTERM");
        let deadline = Instant::now() + PATIENCE;
        while self.runs(name) {
            assert!(Instant::now() < deadline, "{name} does not end\n{}", words(self.layout.root()));
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// `kill -9`.
    pub fn kill(&self, name: &str) {
        kill_hard(self.pid(name));
    }

    /// Starts the API server, the controllers and the nodes that do not run.
    pub async fn start_missing(&self, client: &Client) {
        if !self.runs(API_SERVER) {
            self.start_api_server();
            self.until_it_serves(client).await;
        }
        if !self.runs(CONTROLLER) {
            self.start_controller(CONTROLLER);
        }
        for node in self.shape.nodes.iter().filter(|node| !self.runs(node)) {
            self.start_node(node);
        }
    }

    /// Waits until the API server answers.
    pub async fn until_it_serves(&self, client: &Client) {
        let deadline = Instant::now() + PATIENCE;
        let ready = || http::Request::get("/readyz").body(Vec::new()).expect("request");
        let mut last = String::new();
        while Instant::now() < deadline {
            assert!(self.runs(API_SERVER), "kube-apiserver ended: {}", self.tail());
            match client.request_text(ready()).await {
                Ok(_) => return,
                Err(error) => last = error.to_string(),
            }
            tokio::time::sleep(MOMENT).await;
        }
        panic!("kube-apiserver does not serve: {last}\n{}", self.tail());
    }

    fn tail(&self) -> String {
        let log = std::fs::read(self.layout.log(API_SERVER)).unwrap_or_default();
        let log = text(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }

    /// What `godwit manifests` installs but its pods, which are processes here, and what the API asks them by; and beside it what
    /// others bring or grant.
    async fn furnish(&self, client: &Client) {
        let build = self.build();
        let definitions = godwit_api::crd::crds();
        let mut objects: Vec<Value> = match &self.wishes.installed {
            None => {
                let others = definitions.into_iter().chain(self.initial_objects());
                others.chain(build.quiet_objects().cloned()).collect()
            }
            Some((_, kubectl)) => {
                self.apply_manifests(kubectl, &build);
                let of_others = |object: &Value| {
                    object["kind"] == "StorageClass" || object["spec"]["group"].as_str() == Some("k8s.cni.cncf.io")
                };
                definitions.into_iter().chain(self.initial_objects()).filter(of_others).collect()
            }
        };
        objects.extend(rights(self.installed_in()));
        for object in &objects {
            apply(client, object).await;
        }
    }

    /// Applies what a build prints, as people do.
    pub fn apply_manifests(&self, kubectl: &Path, build: &Build) {
        let mut apply = Command::new(kubectl);
        apply.args(["apply", "--server-side", "-f", "-"]).env("KUBECONFIG", self.layout.kubeconfig());
        apply.env("HOME", self.layout.root()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = apply.spawn().expect("kubectl starts");
        let mut input = child.stdin.take().expect("stdin");
        let manifests = build.manifests();
        let written = std::thread::spawn(move || input.write_all(manifests.as_bytes()));
        let output = child.wait_with_output().expect("kubectl ends");
        assert!(output.status.success(), "{}", text(&output.stderr));
        written.join().expect("no panic").expect("write to kubectl");
    }

    /// A client with the token of a node's handler, which finds the API server as `kubeconfig` does.
    pub async fn handler_of(&self, node: &str, kubeconfig: &Path) -> Client {
        let read = |path: &Path| kube::config::Kubeconfig::read_from(path).expect("a kubeconfig");
        let handler = read(&self.handlers(node));
        let mut config = read(kubeconfig);
        config.auth_infos[0].auth_info.clone_from(&handler.auth_infos[0].auth_info);
        let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await.expect("a configuration");
        godwit_standalone::client_of(config).expect("client")
    }

    /// The namespace that godwit is installed in.
    fn installed_in(&self) -> &str {
        self.wishes.installation.namespace()
    }

    /// What a cluster begins with, the namespace of the installation and its KubeVirt object among them.
    fn initial_objects(&self) -> Vec<Value> {
        let own = self.installed_in();
        let mut objects = godwit_api::initial::initial_objects();
        for object in &mut objects {
            if object["kind"] == "Namespace" {
                object["metadata"]["name"] = json!(own);
            } else if object["metadata"]["namespace"].is_string() {
                object["metadata"]["namespace"] = json!(own);
            }
        }
        objects
    }

    /// By which processes are told of it. An older build may know of no namespace but the usual one.
    fn namespace_flag(&self) -> Option<String> {
        let own = self.installed_in();
        (own != Installation::USUAL.namespace()).then(|| format!("--namespace={own}"))
    }

    /// A command line as the build has it, with flags of ours.
    fn arguments(&self, workload: &str, ours: impl IntoIterator<Item = String>) -> Vec<String> {
        let ours: Vec<String> = ours.into_iter().chain(self.namespace_flag()).collect();
        self.build().arguments(workload, &ours, &self.shape.state())
    }

    /// A kubeconfig for a service account, for a handler bound to its node.
    async fn kubeconfig(&self, client: &Client, account: &str, node: Option<&DynamicObject>) -> PathBuf {
        self.kubeconfig_in(client, self.installed_in(), account, node).await
    }

    async fn kubeconfig_in(
        &self,
        client: &Client,
        namespace: &str,
        account: &str,
        node: Option<&DynamicObject>,
    ) -> PathBuf {
        let reference = node.map(|node| {
            let meta = &node.metadata;
            json!({"apiVersion": "v1", "kind": "Node", "name": meta.name, "uid": meta.uid})
        });
        let body = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"expirationSeconds": 86400, "audiences": [], "boundObjectRef": reference},
        });
        let request = Request::new(format!("/api/v1/namespaces/{namespace}/serviceaccounts"));
        let body = serde_json::to_vec(&body).expect("JSON");
        let request = request.create_subresource("token", account, &PostParams::default(), body).expect("request");
        let token: Value = client.request(request).await.expect("a token");
        let path = self.file(&match node {
            Some(node) => format!("{account}-{}.kubeconfig", node.metadata.name.clone().expect("a name")),
            None => format!("{account}.kubeconfig"),
        });
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://{CONTROL_PLANE_ADDRESS}:{FABRIC_API_PORT}"),
                "certificate-authority": pki::ca(&self.layout)}}],
            "users": [{"name": "test", "user": {"token": token["status"]["token"]}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        std::fs::write(&path, config.to_string()).expect("write");
        path
    }

    async fn start_api(&self, client: &Client) {
        self.kubeconfig(client, API_ACCOUNT, None).await;
        self.start_api_process(API);
        self.endpoint(client, API, true).await;
        if self.wishes.installed.is_none() {
            for object in self.build().routes() {
                apply(client, object).await;
            }
        }
        let deadline = Instant::now() + PATIENCE;
        let served = || http::Request::get("/apis/subresources.kubevirt.io/v1").body(Vec::new()).expect("request");
        while let Err(error) = client.request_text(served()).await {
            assert!(Instant::now() < deadline, "godwit api is not reached: {error}\n{}", words(self.layout.root()));
            tokio::time::sleep(MOMENT).await;
        }
        self.until_webhooks_are_known(client, deadline).await;
        if self.wishes.installed.is_some() {
            for object in self.initial_objects().iter().filter(|object| object["kind"] == "KubeVirt") {
                apply(client, object).await;
            }
        }
    }

    /// Waits until the API server is told by what it knows the webhooks, and asks them.
    async fn until_webhooks_are_known(&self, client: &Client, deadline: Instant) {
        let refused = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
            "metadata": {"name": "none", "namespace": "default"}, "spec": {"vmiName": "nobody"},
        });
        let create = || {
            let path = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstancemigrations?dryRun=All";
            let request = http::Request::post(path).header("content-type", "application/json");
            request.body(refused.to_string().into_bytes()).expect("request")
        };
        loop {
            let said = client.request_text(create()).await.expect_err("it is refused").to_string();
            if said.contains("admission webhook \"migration-create-validator.kubevirt.io\" denied the request") {
                return;
            }
            assert!(Instant::now() < deadline, "the webhooks are not asked: {said}\n{}", words(self.layout.root()));
            tokio::time::sleep(MOMENT).await;
        }
    }

    /// Starts a `godwit api`, also anew after [`Self::kill`].
    pub fn start_api_process(&self, name: &str) {
        let mut ours = vec![
            format!("--kubeconfig={}", self.file(&format!("{API_ACCOUNT}.kubeconfig")).display()),
            format!("--listen={CONTROL_PLANE_ADDRESS}:{}", port_of(name)),
        ];
        if let Some([authority, certificate]) = self.wishes.lifetimes {
            ours.push(format!("--ca-lifetime={authority}"));
            ours.push(format!("--certificate-lifetime={certificate}"));
        }
        self.spawn(name, &self.switch, &self.build().program, &self.arguments(API_SERVICE, ours));
    }

    /// Does what kubelets and Kubernetes' endpoint controllers would: says whether this `godwit api` is ready for requests.
    pub async fn endpoint(&self, client: &Client, name: &str, ready: bool) {
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("{API_SERVICE}-{name}"), "namespace": self.installed_in(),
                "labels": {"kubernetes.io/service-name": API_SERVICE}},
            "addressType": "IPv4",
            "ports": [{"name": "https", "port": port_of(name), "protocol": "TCP"}],
            "endpoints": [{"addresses": [CONTROL_PLANE_ADDRESS.to_string()], "conditions": {"ready": ready}}],
        });
        apply(client, &slice).await;
    }

    /// Starts the controllers, also anew after [`Self::kill`].
    pub fn start_controller(&self, name: &str) {
        self.start_controllers_of(name, &[]);
    }

    /// Starts the controllers, of some nouns only where some are named.
    pub fn start_controllers_of(&self, name: &str, nouns: &[&str]) {
        let [_, certificate] = self.wishes.lifetimes.unwrap_or(["90d", "10d"]);
        let mut ours = vec![
            format!("--launcher-image={}", self.build().image),
            format!("--identity={name}"),
            format!("--certificate-lifetime={certificate}"),
            format!("--kubeconfig={}", self.file(&format!("{CONTROLLER_ACCOUNT}.kubeconfig")).display()),
            format!("--bare-api-server={}", self.layout.root().display()),
        ];
        if !nouns.is_empty() {
            ours.push(format!("--nouns={}", nouns.join(",")));
        }
        ours.extend(health(name).map(|address| format!("--health={address}")));
        self.spawn(name, &self.switch, &self.build().program, &self.arguments("virt-controller", ours));
    }

    /// A connection to where a controller answers scrapes, from within the cluster's network.
    pub fn dial_health(&self, name: &str) -> std::net::TcpStream {
        let address = health(name).unwrap_or_else(|| panic!("{name} has no port for that"));
        self.switch.connect(address, Duration::from_secs(5)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// A connection to `godwit api`, which speaks TLS.
    pub fn dial_api(&self) -> std::net::TcpStream {
        let address = SocketAddr::from((CONTROL_PLANE_ADDRESS, port_of(API)));
        self.switch.connect(address, Duration::from_secs(5)).expect("godwit api")
    }

    /// Starts what `godwit manifests --components maintenance` has installed in a namespace, with its rights.
    pub async fn start_maintenance(&self, client: &Client, namespace: &str) {
        let account = access::MAINTAINER;
        let kubeconfig = self.kubeconfig_in(client, namespace, account, None).await;
        let mut arguments = vec![
            "controller".to_owned(),
            "--nouns=maintenance".to_owned(),
            format!("--lease={account}"),
            format!("--lease-namespace={namespace}"),
            "--launcher-image=none".to_owned(),
            format!("--kubeconfig={}", kubeconfig.display()),
        ];
        arguments.extend(self.namespace_flag());
        self.spawn(account, &self.switch, &self.build().program, &arguments);
    }

    /// Starts Kubernetes' own controllers of these names, where the folder has the program; whether it has, or a line that says so.
    pub async fn start_kubernetes_own(&self, client: &Client, controllers: &[&str]) -> bool {
        let program = self.assets.join(CONTROLLER_MANAGER);
        if !program.is_file() {
            println!("SKIPPED: {CONTROLLER_MANAGER} is not in {}", self.assets.display());
            return false;
        }
        let (namespace, name) = ("kube-system", CONTROLLER_MANAGER);
        for object in [
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"namespace": namespace, "name": name}}),
            json!({
                "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": name},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
                "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": name}],
            }),
        ] {
            apply(client, &object).await;
        }
        let kubeconfig = self.kubeconfig_in(client, namespace, name, None).await;
        let arguments = [
            format!("--controllers={}", controllers.join(",")),
            format!("--kubeconfig={}", kubeconfig.display()),
            "--leader-elect=false".to_owned(),
            format!("--cert-dir={}", self.file(CONTROLLER_MANAGER).display()),
        ];
        self.spawn(CONTROLLER_MANAGER, &self.switch, &program, &arguments);
        true
    }
}

fn health(name: &str) -> Option<SocketAddr> {
    let (_, port) = HEALTH_PORTS.into_iter().find(|(known, _)| *known == name)?;
    Some(SocketAddr::from((CONTROL_PLANE_ADDRESS, port)))
}

/// Applies an object as its owner, whose kind may be a moment behind its definition.
async fn apply(client: &Client, value: &Value) -> DynamicObject {
    let object: DynamicObject = serde_json::from_value(value.clone()).expect("an object");
    let gvk = GroupVersionKind::try_from(object.types.as_ref().expect("a kind")).expect("apiVersion");
    let resource = ApiResource::from_gvk(&gvk);
    let api: Api<DynamicObject> = match &object.metadata.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let name = object.metadata.name.clone().expect("a name");
    let deadline = Instant::now() + PATIENCE;
    loop {
        match api.patch(&name, &PatchParams::apply("godwit").force(), &Patch::Apply(&object)).await {
            Ok(made) => return made,
            Err(kube::Error::Api(status)) if ![403, 404, 409, 429, 500, 503].contains(&status.code) => {
                panic!("{} {name}: {status}", gvk.kind)
            }
            Err(error) => assert!(Instant::now() < deadline, "{} {name}: {error}", gvk.kind),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What is nobody's right on a whole Kubernetes: to do what stands for its own controllers, and what our kubelets do beyond what
/// it lets its own do.
fn rights(namespace: &str) -> Vec<Value> {
    let mut all = access::engine_room().objects(namespace);
    let read = |group: &str, resources: &[&str]| json!({"apiGroups": [group], "resources": resources, "verbs": ["get", "list", "watch"]});
    all.push(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "godwit:node"},
        "rules": [
            read("", &["nodes", "pods", "persistentvolumeclaims", "persistentvolumes"]),
            read("k8s.cni.cncf.io", &["network-attachment-definitions"]),
        ],
    }));
    let nodes = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "system:nodes"});
    all.push(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "godwit:node"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "godwit:node"},
        "subjects": [nodes],
    }));
    all
}

/// Where it listens.
pub fn port_of(api: &str) -> u16 {
    APIS.iter().find(|(name, _)| *name == api).expect("one of them").1
}

/// Makes the API server reachable from outside of its namespace, for as long as the test lives.
struct Relay(Option<tokio::runtime::Runtime>);

impl Relay {
    fn start(listener: TcpListener, switch: Namespace) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        listener.set_nonblocking(true).expect("the socket");
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("the socket");
            while let Ok((mut outer, _)) = listener.accept().await {
                let switch = switch.clone();
                tokio::spawn(async move {
                    let to = SocketAddr::from((CONTROL_PLANE_ADDRESS, FABRIC_API_PORT));
                    let dial = move || switch.connect(to, Duration::from_secs(5));
                    let Ok(Ok(inner)) = tokio::task::spawn_blocking(dial).await else { return };
                    inner.set_nonblocking(true).expect("the socket");
                    let mut inner = tokio::net::TcpStream::from_std(inner).expect("the socket");
                    let _ = tokio::io::copy_bidirectional(&mut outer, &mut inner).await;
                });
            }
        });
        Self(Some(runtime))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
