//! A cluster for one test: started in a scratch folder, taken down also when the test fails.

// Every test file uses another part of it.
#![allow(dead_code, clippy::expect_used, clippy::unwrap_used)]

pub mod authority;
pub mod build;
pub mod events;
pub mod flights;
pub mod linux;
pub mod moving;
pub mod outage;
pub mod real;
pub mod replicas;
pub mod stopped;
pub mod streams;
pub mod terminal;
pub mod witnessed;

use godwit_launcher::client as launcher;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::{Api, Client};
use real::Wishes;
use serde_json::{Value, json};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

pub const ROM_IMAGE: &str = "godwit.local/rom:latest";

pub struct Cluster {
    folder: tempfile::TempDir,
    pub client: Client,
    /// The API server, where it is not the embedded one.
    pub real: Option<real::Real>,
}

impl Cluster {
    /// Starts a cluster: `godwit up`, or nodes of ours on etcd and kube-apiserver where KUBEBUILDER_ASSETS names a folder with
    /// these.
    pub async fn start(nodes: usize) -> Self {
        let Some(assets) = real::assets() else { return Self::up(nodes).await };
        Self::of_assets(assets, nodes, Wishes::default()).await
    }

    /// Starts one on etcd and kube-apiserver, whose CA and certificates live so long; none, with a line that says so, where
    /// KUBEBUILDER_ASSETS does not name a folder with these.
    pub async fn rotating(nodes: usize, lifetimes: [&'static str; 2]) -> Option<Self> {
        Self::wished(nodes, Wishes { lifetimes: Some(lifetimes), ..Wishes::default() }).await
    }

    /// Starts one on etcd and kube-apiserver that is not as always; none, with a line that says so, where KUBEBUILDER_ASSETS does not
    /// name a folder with these.
    pub async fn wished(nodes: usize, wishes: Wishes) -> Option<Self> {
        let Some(assets) = real::assets() else {
            println!("SKIPPED: KUBEBUILDER_ASSETS names no folder with etcd and kube-apiserver");
            return None;
        };
        Some(Self::of_assets(assets, nodes, wishes).await)
    }

    async fn of_assets(assets: PathBuf, nodes: usize, wishes: Wishes) -> Self {
        let (folder, guard) = scratch();
        let (real, client) = real::Real::start(assets, folder.path(), nodes, wishes).await;
        std::mem::forget(guard);
        Self { folder, client, real: Some(real) }
    }

    /// Starts a cluster of `godwit up`, for tests of what only that does.
    pub async fn up(nodes: usize) -> Self {
        Self::up_with(Path::new(env!("CARGO_BIN_EXE_godwit")), nodes, &[]).await
    }

    /// The same with this binary.
    pub async fn up_by(program: &Path, nodes: usize) -> Self {
        Self::up_with(program, nodes, &[]).await
    }

    /// Starts a cluster as [`Self::start`] does, whose nodes have a second network, for migrations.
    pub async fn with_migration_network(nodes: usize) -> Self {
        let wishes = Wishes { migration_network: true, ..Wishes::default() };
        match real::assets() {
            Some(assets) => Self::of_assets(assets, nodes, wishes).await,
            None => Self::up_with(Path::new(env!("CARGO_BIN_EXE_godwit")), nodes, &["--migration-network"]).await,
        }
    }

    async fn up_with(program: &Path, nodes: usize, more: &[&str]) -> Self {
        let (folder, guard) = scratch();
        let mut up = Command::new(program);
        up.args(["up", "--api-port=0", "--detach"])
            .arg(format!("--nodes={nodes}"))
            .arg("--data-dir")
            .arg(folder.path())
            .args(more);
        let output = up.stdin(Stdio::null()).output().expect("godwit starts");
        assert!(output.status.success(), "godwit up: {}", text(&output.stderr));
        let client = godwit_standalone::client(&folder.path().join("kubeconfig")).await.expect("client");
        std::mem::forget(guard);
        Self { folder, client, real: None }
    }

    pub fn data_dir(&self) -> &Path {
        self.folder.path()
    }

    /// Name of one of the cluster's network namespaces.
    pub fn namespace(&self, what: &str) -> String {
        let layout = godwit_standalone::Layout::open(self.folder.path()).expect("layout");
        layout.load().expect("cluster.json").expect("a cluster").namespace(what)
    }

    /// Plugs a node's link for migrations into the switch, or pulls it out.
    pub async fn migration_link(&self, node: &str, up: bool) {
        self.uplink(&godwit_standalone::fabric::migration_port(node), up).await;
    }

    /// Plugs a node's link into the switch, or pulls it out.
    pub async fn uplink(&self, node: &str, up: bool) {
        let layout = godwit_standalone::Layout::open(self.folder.path()).expect("layout");
        let cluster = layout.load().expect("cluster.json").expect("a cluster");
        let switch = godwit_network::Namespace::open(&godwit_standalone::fabric::switch(&cluster)).expect("the switch");
        switch.links().expect("links").set_up(node, up).await.expect("set the port");
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    pub fn godwit(&self, arguments: &[&str]) -> Output {
        godwit(self.folder.path(), arguments)
    }

    /// Runs `kubectl`, which must succeed; its output.
    pub fn kubectl(&self, kubectl: &Path, arguments: &[&str]) -> String {
        let output = self.try_kubectl(kubectl, arguments, None);
        assert!(
            output.status.success(),
            "{} {}: {}{}",
            kubectl.display(),
            arguments.join(" "),
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// Runs `kubectl` with something on its standard input.
    pub fn try_kubectl(&self, kubectl: &Path, arguments: &[&str], input: Option<&str>) -> Output {
        let mut child = Command::new(kubectl)
            .args(arguments)
            .env("KUBECONFIG", self.kubeconfig())
            // A discovery cache of another cluster on the same port would mislead it.
            .env("HOME", self.folder.path())
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        if let Some(input) = input {
            use std::io::Write;
            child.stdin.take().expect("stdin").write_all(input.as_bytes()).expect("write to kubectl");
        }
        child.wait_with_output().expect("kubectl ends")
    }

    /// An image whose `/boot/rom.bin` is the ROM guest.
    pub fn build_rom_image(&self, parameters: godwit_guest_rom::Parameters) {
        let file = self.folder.path().join("rom.bin");
        std::fs::write(&file, godwit_guest_rom::image(parameters)).expect("write ROM");
        let pair = format!("{}:/boot/rom.bin", file.display());
        let output = self.godwit(&["image", "build", ROM_IMAGE, &pair]);
        assert!(output.status.success(), "image build: {}", text(&output.stderr));
    }

    pub fn api(&self, group: &str, version: &str, kind: &str) -> Api<DynamicObject> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        Api::default_namespaced_with(self.client.clone(), &resource)
    }

    pub fn vmis(&self) -> Api<DynamicObject> {
        self.api("kubevirt.io", "v1", "VirtualMachineInstance")
    }

    pub fn vms(&self) -> Api<DynamicObject> {
        self.api("kubevirt.io", "v1", "VirtualMachine")
    }

    pub fn migrations(&self) -> Api<DynamicObject> {
        self.api("kubevirt.io", "v1", "VirtualMachineInstanceMigration")
    }

    pub fn pods(&self) -> Api<DynamicObject> {
        self.api("", "v1", "Pod")
    }

    /// Server-side apply of any object with apiVersion, kind and metadata.name.
    pub async fn apply(&self, object: Value) -> Result<DynamicObject, kube::Error> {
        let object: DynamicObject = serde_json::from_value(object).expect("an object");
        let types = object.types.clone().expect("apiVersion and kind");
        let gvk = GroupVersionKind::try_from(&types).expect("apiVersion");
        let mut resource = ApiResource::from_gvk(&gvk);
        if gvk.kind == "NetworkAttachmentDefinition" {
            resource.plural = "network-attachment-definitions".to_owned();
        }
        let api: Api<DynamicObject> = Api::default_namespaced_with(self.client.clone(), &resource);
        let name = object.metadata.name.clone().expect("a name");
        api.patch(&name, &PatchParams::apply("test").force(), &Patch::Apply(&object)).await
    }

    /// A VMI that boots the ROM guest: up in a moment, 16 MiB, no network.
    pub async fn start_rom_guest(&self, name: &str) {
        self.apply(rom_vmi(name)).await.expect("apply VMI");
        self.wait(&self.vmis(), name, "the VMI runs", |vmi| status(vmi, "phase") == "Running").await;
    }

    pub async fn migrate(&self, vmi: &str, name: &str) {
        self.apply(json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
            "metadata": {"name": name}, "spec": {"vmiName": vmi},
        }))
        .await
        .expect("apply VMIM");
    }

    /// Asks for an action of KubeVirt's subresources, as (plural, name, action), as this user or the administrator: the answer's
    /// code, and its message when it is a refusal.
    pub async fn put_action(&self, user: Option<&str>, at: (&str, &str, &str), options: &Value) -> (u16, String) {
        let (resource, name, action) = at;
        let path = format!("/apis/subresources.kubevirt.io/v1/namespaces/default/{resource}/{name}/{action}");
        let mut request = http::Request::put(path).header("content-type", "application/json");
        if let Some(user) = user {
            request = request.header("impersonate-user", user);
        }
        let body = if options.is_null() { Vec::new() } else { options.to_string().into_bytes() };
        let request = request.body(kube::client::Body::from(body)).expect("request");
        let answer = self.client.send(request).await.expect("an answer");
        let code = answer.status().as_u16();
        let bytes = answer.into_body().collect_bytes().await.expect("a body");
        let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        (code, body["message"].as_str().unwrap_or_default().to_owned())
    }

    /// Asks for an action that tells something, as (plural, name, action): the answer's code, and the answer.
    pub async fn get_action(&self, at: (&str, &str, &str)) -> (u16, Value) {
        let (resource, name, action) = at;
        let path = format!("/apis/subresources.kubevirt.io/v1/namespaces/default/{resource}/{name}/{action}");
        let request = http::Request::get(path).body(kube::client::Body::empty()).expect("request");
        let answer = self.client.send(request).await.expect("an answer");
        let code = answer.status().as_u16();
        let bytes = answer.into_body().collect_bytes().await.expect("a body");
        (code, serde_json::from_slice(&bytes).unwrap_or_default())
    }

    /// Waits until the object is as wanted; panics with its last state after two minutes.
    pub async fn wait(
        &self,
        api: &Api<DynamicObject>,
        name: &str,
        what: &str,
        wanted: impl Fn(&DynamicObject) -> bool,
    ) -> DynamicObject {
        let deadline = Instant::now() + Duration::from_secs(120);
        let mut last = None;
        while Instant::now() < deadline {
            last = api.get_opt(name).await.expect("get");
            if let Some(object) = last.as_ref().filter(|object| wanted(object)) {
                return object.clone();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("waited two minutes for {name} until {what}; it is {}\n{}", json!(last), self.words());
    }

    /// Waits until the object is gone.
    pub async fn wait_gone(&self, api: &Api<DynamicObject>, name: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if api.get_opt(name).await.expect("get").is_none() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("waited a minute for {name} to go\n{}", self.words());
    }

    /// The launcher pods of a VMI that are not over, as (name, node).
    pub async fn launchers(&self, vmi: &str) -> Vec<(String, String)> {
        let list = self.pods().list(&Default::default()).await.expect("list pods");
        list.items
            .iter()
            .filter(|pod| pod.metadata.name.as_deref().is_some_and(|n| n.starts_with(&format!("virt-launcher-{vmi}-"))))
            .filter(|pod| !["Succeeded", "Failed"].contains(&status(pod, "phase").as_str()))
            .map(|pod| {
                let node = pod.data.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default();
                (pod.metadata.name.clone().unwrap_or_default(), node.to_owned())
            })
            .collect()
    }

    /// What the server says to the eviction of the pod that a VMI began in; empty when it is granted. By way of kubectl: kube's
    /// client does not tell of a 429 but asks again for minutes.
    pub async fn evict(&self, kubectl: &Path, vmi: &str, dry_run: bool) -> String {
        let launchers = self.launchers(vmi).await;
        let (pod, _) = launchers.iter().find(|(_, node)| !node.is_empty()).expect("a launcher on a node");
        let query = if dry_run { "?dryRun=All" } else { "" };
        let path = format!("/api/v1/namespaces/default/pods/{pod}/eviction{query}");
        let eviction = json!({
            "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": "default"},
        });
        let output = self.try_kubectl(kubectl, &["create", "--raw", &path, "-f", "-"], Some(&eviction.to_string()));
        if output.status.success() {
            return String::new();
        }
        let said = text(&output.stderr);
        let refusal = said.trim().strip_prefix("Error from server (TooManyRequests): ");
        refusal.unwrap_or_else(|| panic!("not a 429: {said}")).to_owned()
    }

    /// Does something with a pod's launcher, as its node would. (A socket's path must be short: it is reached through the
    /// open folder.)
    pub async fn with_launcher<T>(&self, pod: &str, what: impl AsyncFnOnce(launcher::Client) -> T) -> T {
        let pod = self.pods().get(pod).await.expect("pod");
        let node = pod.data["spec"]["nodeName"].as_str().expect("a node");
        let uid = pod.metadata.uid.as_deref().expect("uid");
        let sockets = self.data_dir().join("nodes").join(node).join("pods").join(uid);
        let folder = std::fs::File::open(sockets.join("volumes/kubernetes.io~empty-dir/sockets")).expect("the sockets");
        what(launcher::Client::new(format!("/proc/self/fd/{}/launcher.sock", folder.as_raw_fd()))).await
    }

    /// What the guest said on its console in this pod so far.
    pub async fn console(&self, pod: &str) -> String {
        let request = kube::core::Request::new("/api/v1/namespaces/default/pods")
            .logs(pod, &kube::api::LogParams { container: Some("compute".into()), ..Default::default() })
            .expect("request");
        self.client.request_text(request).await.unwrap_or_default()
    }

    /// The guest's lines in a launcher's log.
    pub async fn lines(&self, pod: &str) -> Vec<godwit_guest_rom::Line> {
        self.console(pod).await.lines().filter_map(godwit_guest_rom::Line::parse).collect()
    }

    /// The number of one of the cluster's processes: `control-plane` or a node's name, or a process of [`real`].
    pub fn pid(&self, process: &str) -> nix::unistd::Pid {
        if let Some(real) = &self.real {
            return real.pid(process);
        }
        let output = self.godwit(&["status", "-o", "json"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let all = said["processes"].as_array().expect("processes");
        let pid = all.iter().find(|p| p["name"] == process).and_then(|p| p["pid"].as_i64()).expect("it runs");
        nix::unistd::Pid::from_raw(pid.try_into().expect("a pid"))
    }

    /// Starts a node's process that was killed, and asks nobody whether the node is ready: the control plane may be away.
    pub fn start_node(&self, name: &str) {
        if let Some(real) = &self.real {
            return real.start_node(name);
        }
        use std::os::unix::process::CommandExt;
        let log =
            std::fs::OpenOptions::new().append(true).open(self.data_dir().join("log").join(format!("{name}.log")));
        let log = log.expect("its log");
        let mut node = Command::new(env!("CARGO_BIN_EXE_godwit"));
        node.args(["node", "--name", name, "--data-dir"]).arg(self.data_dir()).stdin(Stdio::null()).process_group(0);
        node.stdout(log.try_clone().expect("its log")).stderr(log);
        let mut node = node.spawn().expect("godwit starts");
        let process = godwit_standalone::Process::of(node.id() as i32).expect("it runs");
        let record = self.data_dir().join("run").join(format!("{name}.pid"));
        std::fs::write(record, format!("{} {}\n", process.pid, process.started)).expect("record it");
        std::thread::spawn(move || node.wait());
    }

    /// The ends of the cluster's logs, for messages.
    pub fn words(&self) -> String {
        words(self.folder.path())
    }
}

/// The ends of the logs of a data directory.
pub fn words(data_dir: &Path) -> String {
    let mut words = String::new();
    for entry in std::fs::read_dir(data_dir.join("log")).into_iter().flatten().flatten() {
        let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        words += &format!("--- {}\n{}\n", entry.path().display(), lines[lines.len().saturating_sub(40)..].join("\n"));
    }
    words
}

impl Cluster {
    /// What the API server has refused to the cluster's components: their rules are all that they need (`api::access`).
    fn refused(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.folder.path().join("log/control-plane.log")).unwrap_or_default();
        log.lines().filter(|line| line.contains("a component was refused")).map(str::to_owned).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let refused = self.refused();
        drop(Down(self.folder.path().to_owned()));
        assert!(refused.is_empty() || std::thread::panicking(), "components lack rights: {refused:#?}");
    }
}

/// A folder for a cluster that must go, whatever happens from here on.
fn scratch() -> (tempfile::TempDir, Down) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = tempfile::Builder::new().prefix("godwit-test-").tempdir_in("/var/tmp").expect("scratch folder");
    let guard = Down(folder.path().to_owned());
    (folder, guard)
}

struct Down(PathBuf);

impl Drop for Down {
    fn drop(&mut self) {
        let output = godwit(&self.0, &["down"]);
        if !output.status.success() {
            eprintln!("godwit down: {}", text(&output.stderr));
        }
    }
}

pub fn rom_vmi(name: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "domain": {
                "memory": {"guest": "16Mi"},
                "devices": {"autoattachPodInterface": false},
                "firmware": {"kernelBoot": {"container": {"image": ROM_IMAGE, "kernelPath": "/boot/rom.bin"}}},
            },
        },
    })
}

/// `godwit COMMAND … --data-dir FOLDER …`
pub fn godwit(data_dir: &Path, arguments: &[&str]) -> Output {
    let words = if arguments.first() == Some(&"image") { 2 } else { 1 };
    let (command, rest) = arguments.split_at(words);
    Command::new(env!("CARGO_BIN_EXE_godwit"))
        .args(command)
        .arg("--data-dir")
        .arg(data_dir)
        .args(rest)
        .stdin(Stdio::null())
        .output()
        .expect("godwit starts")
}

/// Process and command line of every QEMU in the VMI's active pods. (The guest's name and UUID are in the command line, but
/// follow from the VMI's name: another test's guest may have the same.)
pub fn qemus(vmi: &DynamicObject) -> Vec<(i32, String)> {
    let pods = vmi.data.pointer("/status/activePods").and_then(Value::as_object).expect("activePods");
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let arguments = text(&arguments).replace('\0', " ");
        let groups = std::fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        if arguments.contains("qemu-system") && pods.keys().any(|uid| groups.contains(uid.as_str())) {
            found.push((pid, arguments));
        }
    }
    found
}

/// `kill -9`, and waits until nothing of it is left: its sockets stay open until its last thread has ended.
pub fn kill_hard(pid: nix::unistd::Pid) {
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kill");
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    // One that nobody collects stays a zombie.
    let lives = |task: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while threads().any(lives) {
        assert!(Instant::now() < deadline, "{pid} does not die");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A string out of the object's status, by name or pointer.
pub fn status(object: &DynamicObject, path: &str) -> String {
    let pointer = format!("/status/{path}");
    match object.data.pointer(&pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    }
}

/// Every kubectl between 1.27 and 1.33 on this machine; none is said, not hidden.
pub fn kubectls() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = (27..=33)
        .map(|minor| PathBuf::from(format!("/usr/lib/google-cloud-sdk/bin/kubectl.1.{minor}")))
        .filter(|path| path.exists())
        .collect();
    if found.is_empty() {
        found.extend(
            std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
                .map(|p| p.join("kubectl"))
                .find(|p| p.exists()),
        );
    }
    if found.is_empty() {
        println!("SKIPPED: no kubectl on this machine (looked for kubectl.1.27 … 1.33 and kubectl in PATH)");
    }
    found
}
