//! What the tests of the contract do to a cluster and ask of it.

use crate::common::events::Said;
use crate::common::stopped::Stopped;
use crate::common::{Cluster, rom_vmi, status, text};
use godwit_guest_rom::{Line, Parameters, Story};
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PostParams};
use kube::client::Body;
use serde_json::{Value, json};
use std::process::Command;
use std::time::{Duration, Instant};

/// A link on which the ROM guest needs many seconds: whatever must happen meanwhile, does.
pub const NARROW: &str = "1mbit";

/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);
pub const MOMENT: Duration = Duration::from_millis(20);

/// The answer to a write: code, `Warning:` texts, body.
pub struct Answer {
    pub code: u16,
    pub warnings: Vec<String>,
    pub body: Value,
}

impl Answer {
    /// The message of a refusal with this code.
    #[track_caller]
    pub fn refused(&self, code: u16) -> &str {
        assert_eq!(self.code, code, "{}", self.body);
        assert_eq!(self.body["kind"], "Status", "{}", self.body);
        self.body["message"].as_str().expect("a message")
    }

    /// The UID of what was made.
    #[track_caller]
    pub fn made(&self) -> String {
        assert_eq!(self.code, 201, "{}", self.body);
        self.body["metadata"]["uid"].as_str().expect("uid").to_owned()
    }
}

pub fn migration(name: &str, vmi: &str) -> Value {
    json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
        "metadata": {"name": name}, "spec": {"vmiName": vmi}})
}

/// The same with an annotation.
pub fn annotated(mut object: Value, key: &str, value: &str) -> Value {
    object["metadata"]["annotations"][key] = value.into();
    object
}

pub fn phase(object: &DynamicObject) -> String {
    status(object, "phase")
}

pub fn is_over(migration: &DynamicObject) -> bool {
    ["Succeeded", "Failed"].contains(&phase(migration).as_str())
}

/// What the limits count: under way and not only waiting.
pub fn is_running(migration: &DynamicObject) -> bool {
    !is_over(migration) && !["", "Pending"].contains(&phase(migration).as_str())
}

pub fn uid(object: &DynamicObject) -> &str {
    object.metadata.uid.as_deref().expect("uid")
}

/// A condition of this type.
pub fn condition<'a>(object: &'a DynamicObject, type_: &str) -> Option<&'a Value> {
    let all = object.data.pointer("/status/conditions").and_then(Value::as_array);
    all.into_iter().flatten().find(|condition| condition["type"] == type_)
}

impl Cluster {
    /// A cluster whose ROM guests write to this many pages each 10 ms.
    pub async fn with_rom(nodes: usize, pages_per_tick: u32) -> Self {
        let cluster = Self::start(nodes).await;
        cluster.build_rom_image(Parameters { pages_per_tick, ..Parameters::default() });
        cluster
    }

    /// The same, whose pages take their size on the way, so that a narrow link holds a guest up however its memory is sent.
    pub async fn with_noisy_rom(nodes: usize, pages_per_tick: u32) -> Self {
        let cluster = Self::start(nodes).await;
        cluster.build_rom_image(Parameters { pages_per_tick, noise: true, ..Parameters::default() });
        cluster
    }

    /// Starts a guest on this node. It is not bound to it: the others only take nothing new meanwhile.
    pub async fn start_rom_guest_on(&self, name: &str, node: &str) {
        self.start_on(rom_vmi(name), node).await;
    }

    /// The same for any VMI.
    pub async fn start_on(&self, vmi: Value, node: &str) {
        let nodes = self.nodes().list(&Default::default()).await.expect("nodes");
        let open = |other: &&DynamicObject| other.data.pointer("/spec/unschedulable") != Some(&Value::Bool(true));
        let others = nodes.items.iter().filter(open).filter_map(|other| other.metadata.name.as_deref());
        let others: Vec<&str> = others.filter(|other| *other != node).collect();
        for other in &others {
            self.cordon(other, true).await;
        }
        let name = self.apply(vmi).await.expect("apply VMI").metadata.name.expect("a name");
        let vmi = self.wait(&self.vmis(), &name, "the VMI runs", |vmi| phase(vmi) == "Running").await;
        assert_eq!(status(&vmi, "nodeName"), node, "{}", vmi.data);
        for other in others {
            self.cordon(other, false).await;
        }
    }

    pub async fn migration(&self, name: &str) -> DynamicObject {
        self.migrations().get(name).await.expect("VMIM")
    }

    /// Waits until a migration is in this phase.
    pub async fn comes_to(&self, name: &str, wanted: &str) -> DynamicObject {
        let there = |m: &DynamicObject| phase(m) == wanted || is_over(m);
        let m = self.wait(&self.migrations(), name, &format!("it is {wanted}"), there).await;
        assert_eq!(phase(&m), wanted, "{}\n{}", m.data, self.words());
        m
    }

    /// Deletes a migration and waits until it is gone.
    pub async fn cancel(&self, name: &str) {
        self.migrations().delete(name, &Default::default()).await.expect("delete");
        self.wait_gone(&self.migrations(), name).await;
    }

    pub fn kubevirt(&self) -> Api<DynamicObject> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
        Api::namespaced_with(self.client.clone(), "kubevirt", &resource)
    }

    /// Changes the cluster's migration settings.
    pub async fn configure(&self, migrations: Value) {
        // It is made a moment after the cluster is up.
        self.wait(&self.kubevirt(), "kubevirt", "it is there", |_| true).await;
        let patch = Patch::Merge(json!({"spec": {"configuration": {"migrations": migrations}}}));
        self.kubevirt().patch("kubevirt", &Default::default(), &patch).await.expect("patch the KubeVirt CR");
    }

    pub fn nodes(&self) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Node")))
    }

    pub async fn cordon(&self, node: &str, cordoned: bool) {
        let patch = Patch::Merge(json!({"spec": {"unschedulable": cordoned}}));
        self.nodes().patch(node, &Default::default(), &patch).await.expect("patch the node");
    }

    fn tc(&self, node: &str, arguments: &[&str]) {
        let namespace = self.namespace(node);
        let output = Command::new("ip")
            .args(["netns", "exec", &namespace, "tc", "qdisc"])
            .args(arguments)
            .output()
            .expect("ip starts");
        assert!(output.status.success(), "tc {arguments:?}: {}", text(&output.stderr));
    }

    /// Lets no more than `rate` (as `tc` takes it) out of a node.
    pub fn narrow(&self, node: &str, rate: &str) {
        let link = ["dev", "eth0", "root", "tbf", "rate", rate, "burst", "16kb", "latency", "400ms"];
        self.tc(node, &[&["replace"], &link[..]].concat());
    }

    /// Takes back [`Cluster::narrow`].
    pub fn widen(&self, node: &str) {
        self.tc(node, &["del", "dev", "eth0", "root"]);
    }

    fn route(&self, from: &str, to: &str, verb: &str) {
        let layout = godwit_standalone::Layout::open(self.data_dir()).expect("layout");
        let cluster = layout.load().expect("cluster.json").expect("a cluster");
        let address = godwit_standalone::Cluster::node_address(cluster.number_of(to).expect("a node")).to_string();
        let output = Command::new("ip")
            .args(["netns", "exec", &self.namespace(from), "ip", "route", verb, "blackhole", &address])
            .output()
            .expect("ip starts");
        assert!(output.status.success(), "ip route {verb}: {}", text(&output.stderr));
    }

    /// Cuts one node off from another one; both still reach the API.
    pub fn cut(&self, from: &str, to: &str) {
        self.route(from, to, "add");
    }

    /// Takes back [`Cluster::cut`].
    pub fn mend(&self, from: &str, to: &str) {
        self.route(from, to, "del");
    }

    /// Makes a node's kubelet and handler stand still; its guests go on.
    pub fn freeze(&self, node: &str) -> Stopped {
        Stopped::stop(self.pid(node))
    }

    /// Creates an object, as somebody if `user` is not empty; whatever the answer is.
    pub async fn post(&self, path: &str, object: &Value, user: &str) -> Answer {
        let mut request = kube::core::Request::new(path)
            .create(&PostParams::default(), serde_json::to_vec(object).expect("JSON"))
            .expect("request");
        if !user.is_empty() {
            request.headers_mut().insert("Impersonate-User", user.parse().expect("a header"));
        }
        let answer = self.client.send(request.map(Body::from)).await.expect("answer");
        let code = answer.status().as_u16();
        let warnings = answer.headers().get_all("warning").iter();
        let warnings = warnings.map(|value| value.to_str().expect("text").to_owned()).collect();
        let body = answer.into_body().collect_bytes().await.expect("body");
        Answer { code, warnings, body: serde_json::from_slice(&body).expect("JSON") }
    }

    /// Asks for a migration; whatever the answer is.
    pub async fn ask(&self, migration: &Value) -> Answer {
        self.post("/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstancemigrations", migration, "").await
    }

    /// Waits until this was said about a migration by its controller.
    pub async fn is_told(&self, migration: &str, type_: &str, reason: &str, message: &str) {
        self.is_told_what(migration, type_, reason, |said| said == message).await;
    }

    /// The same for words that the test cannot know wholly.
    pub async fn is_told_what(&self, migration: &str, type_: &str, reason: &str, message: impl Fn(&str) -> bool) {
        let said = |event: &Said| event.reason == reason && message(&event.message);
        let event = self.hears_of("VirtualMachineInstanceMigration", migration, reason, said).await;
        assert_eq!((event.type_.as_str(), event.component.as_str()), (type_, "virtualmachine-controller"));
    }

    /// The guest goes on in this pod: it was not started again, lost no memory, and beats.
    pub async fn beats_in(&self, pod: &str) {
        let before = beats(&self.lines(pod).await);
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let console = self.console(pod).await;
            let mut story = Story::default();
            console.lines().for_each(|line| story.hear(line));
            assert_eq!(story.complaint(), None, "{console}");
            if beats(&self.lines(pod).await) >= before + 3 {
                return;
            }
            tokio::time::sleep(MOMENT).await;
        }
        panic!("no more than {before} beats in {pod}: {}\n{}", self.console(pod).await, self.words());
    }

    /// The VMI's one launcher pod that is not over, once there is only one.
    pub async fn only_launcher(&self, vmi: &str) -> (String, String) {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let mut launchers = self.launchers(vmi).await;
            if launchers.len() == 1 {
                return launchers.remove(0);
            }
            tokio::time::sleep(MOMENT).await;
        }
        panic!("{vmi} has {:?}\n{}", self.launchers(vmi).await, self.words());
    }

    /// A migration that was given up has left the guest alone: same node, same pod, running, on its way nowhere.
    pub async fn stays(&self, vmi: &str, node: &str, pod: &str) -> DynamicObject {
        assert_eq!(self.only_launcher(vmi).await, (pod.to_owned(), node.to_owned()));
        let idle = |vmi: &DynamicObject| {
            let labels = vmi.metadata.labels.clone().unwrap_or_default();
            !labels.contains_key("kubevirt.io/migrationTargetNodeName")
        };
        let object = self.wait(&self.vmis(), vmi, "it is on its way nowhere", idle).await;
        assert_eq!((phase(&object).as_str(), status(&object, "nodeName").as_str()), ("Running", node));
        self.beats_in(pod).await;
        object
    }

    /// As KubeVirt's tests confirm that a guest has moved; where to.
    pub async fn has_moved(&self, vmi: &str, name: &str) -> String {
        let migration = self.wait(&self.migrations(), name, "it is over", is_over).await;
        assert_eq!(phase(&migration), "Succeeded", "{}\n{}", migration.data, self.words());
        let object = self.vmis().get(vmi).await.expect("VMI");
        let state = |field: &str| status(&object, &format!("migrationState/{field}"));
        for field in ["startTimestamp", "endTimestamp", "targetNodeDomainReadyTimestamp", "targetNodeAddress"] {
            assert_ne!(state(field), "", "{field}: {}", object.data);
        }
        let node = status(&object, "nodeName");
        assert_eq!(state("targetNode"), node);
        assert_ne!(state("sourceNode"), node);
        assert_eq!((state("completed").as_str(), state("failed").as_str()), ("true", ""), "{}", object.data);
        assert_eq!(state("migrationUid"), uid(&migration));
        assert_eq!(phase(&object), "Running");
        let target = state("targetPod");
        self.beats_in(&target).await;
        let anew = self.lines(&target).await.iter().any(|line| matches!(line, Line::Start { .. }));
        assert!(!anew, "it was started anew: {}", self.console(&target).await);
        node
    }
}

fn beats(lines: &[Line]) -> usize {
    lines.iter().filter(|line| matches!(line, Line::Beat { .. })).count()
}
