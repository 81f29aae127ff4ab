//! The nodes: kubelets of ours, and their handlers.

use super::{HANDLER, PATIENCE, Real, apply, words};
use crate::common::build::{self, Build};
use godwit_network::Namespace;
use godwit_standalone::{Cluster as Shape, fabric, pki};
use kube::Client;
use kube::api::Api;
use serde_json::json;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

impl Real {
    /// From now on launchers are of this build, as with controllers whose image has it. The kubelets' own image is their nodes' system
    /// with the binary that they were started from: what is at its path when a pod is started is what runs in it.
    pub fn launch(&self, build: &Build) {
        let next = self.host().with_extension("next");
        std::fs::create_dir_all(next.parent().expect("a folder")).expect("a folder");
        std::fs::copy(&build.program, &next).expect("copy godwit");
        std::fs::rename(next, self.host()).expect("put it in place");
    }

    /// Where the kubelets' binary is, if it is not that under test for ever.
    fn host(&self) -> PathBuf {
        self.file("host/godwit")
    }

    /// Makes the node's object, for its handler's token to be bound to, and starts the node.
    pub(super) async fn join(&self, client: &Client, name: &str, number: u8) {
        let range = Shape::pod_range(number);
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "spec": {"podCIDR": range, "podCIDRs": [range]},
        });
        let node = apply(client, &node).await;
        self.kubeconfig(client, "kubevirt-handler", Some(&node)).await;
        if self.wishes.installed.is_none() {
            return self.start_node(name);
        }
        self.start_node_with(name, &["--without-handler".to_owned()]);
        self.start_handler(name, 1).await;
    }

    /// Starts a node's process, also anew after it was killed.
    pub fn start_node(&self, name: &str) {
        let handler = [format!("--handler-kubeconfig={}", self.handlers(name).display())];
        self.start_node_with(name, &[handler.as_slice(), &["--request-certificate".to_owned()]].concat());
    }

    pub(super) fn handlers(&self, node: &str) -> PathBuf {
        self.file(&format!("kubevirt-handler-{node}.kubeconfig"))
    }

    fn start_node_with(&self, name: &str, more: &[String]) {
        let pair = pki::pair(&self.layout, &pki::node_file(name));
        let mut arguments = vec![
            "node".to_owned(),
            format!("--name={name}"),
            format!("--data-dir={}", self.layout.root().display()),
            format!("--kubeconfig={}", pki::kubeconfig(&self.layout, &pki::node_file(name)).display()),
            format!("--network-namespace={}", self.shape.namespace(name)),
            format!("--tls-ca={}", pki::ca(&self.layout).display()),
            format!("--tls-cert={}", pair.cert.display()),
            format!("--tls-key={}", pair.key.display()),
        ];
        arguments.extend(self.namespace_flag());
        if self.wishes.migration_network && !more.iter().any(|word| word == "--without-handler") {
            arguments.push(format!("--migration-interface={}", fabric::MIGRATIONS));
            arguments.push("--migration-network=kubevirt/fast".to_owned());
        }
        arguments.extend_from_slice(more);
        let origin = Namespace::current().expect("the test's namespace");
        let program = Some(self.host()).filter(|host| host.is_file());
        let program = program.unwrap_or_else(|| env!("CARGO_BIN_EXE_godwit").into());
        self.spawn(name, &origin, &program, &arguments);
    }

    /// Has each node's handler be a process of its own from now on, as the DaemonSet's pods are; their names.
    pub async fn take_handlers_apart(&self) -> Vec<String> {
        let mut handlers = Vec::new();
        for node in &self.shape.nodes {
            self.kill(node);
            self.start_node_with(node, &["--without-handler".to_owned()]);
            handlers.push(self.start_handler(node, 1).await);
        }
        handlers
    }

    /// Starts a handler of a node, as the DaemonSet has it, in its node's network: beside the one that it is to replace, if there is one.
    /// Returns its name when it is ready, by what its kubelet would run.
    pub async fn start_handler(&self, node: &str, turn: usize) -> String {
        let name = format!("{node}-handler-{turn}");
        let number = self.shape.number_of(node).expect("a node of the cluster");
        let build = self.build();
        // Sockets' paths must be short.
        let scratch = self.shape.state().join(format!("h{turn}-{node}"));
        std::fs::create_dir_all(&scratch).expect("a folder");
        let ours = [
            format!("--node-name={node}"),
            format!("--kubeconfig={}", self.handlers(node).display()),
            format!("--address={}", Shape::node_address(number)),
            format!("--kubelet-root={}", self.layout.node(node).display()),
            format!("--state={}", self.shape.state().join(node).display()),
        ];
        let ours: Vec<String> = ours.into_iter().chain(self.namespace_flag()).collect();
        let arguments = build.arguments(HANDLER, &ours, &scratch);
        let namespace = Namespace::open(&self.shape.namespace(node)).expect("the node's namespace");
        self.spawn(&name, &namespace, &build.program, &arguments);
        let deadline = Instant::now() + PATIENCE;
        while !is_ready(&build, &namespace, Shape::node_address(number), &scratch) {
            assert!(Instant::now() < deadline, "{name} is not ready\n{}", words(self.layout.root()));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        name
    }

    pub(super) async fn until_ready(&self, client: &Client) {
        let deadline = Instant::now() + PATIENCE;
        let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(client.clone());
        loop {
            let list = nodes.list(&Default::default()).await.expect("nodes").items;
            let untainted =
                |node: &k8s_openapi::api::core::v1::Node| node.spec.as_ref().is_none_or(|spec| spec.taints.is_none());
            if list.iter().filter(|node| godwit_standalone::is_ready(node) && untainted(node)).count()
                == self.shape.nodes.len()
            {
                return;
            }
            assert!(Instant::now() < deadline, "the nodes are not ready: {list:?}\n{}", words(self.layout.root()));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// What the kubelet asks a handler, which has this address and its files here.
fn is_ready(build: &Build, namespace: &Namespace, address: Ipv4Addr, scratch: &Path) -> bool {
    let container = build.container(HANDLER);
    let probe = &container["readinessProbe"];
    if !probe["exec"].is_null() {
        let words = build::words(&probe["exec"]["command"], scratch);
        let words: Vec<&str> = words.iter().skip(1).map(String::as_str).collect();
        return build.run(&words).status.success();
    }
    let (path, port) = (probe["httpGet"]["path"].as_str().expect("a path"), &probe["httpGet"]["port"]);
    let ports = container["ports"].as_array().expect("ports");
    let port = ports.iter().find(|one| one["name"] == *port).expect("its port")["containerPort"].as_u64();
    let to = SocketAddr::from((address, u16::try_from(port.expect("a number")).expect("a port")));
    let Ok(mut stream) = namespace.connect(to, Duration::from_secs(5)) else { return false };
    let mut answer = String::new();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: handler\r\nConnection: close\r\n\r\n").expect("write");
    stream.read_to_string(&mut answer).is_ok() && answer.starts_with("HTTP/1.1 200 ")
}
