//! The processes: two Deployments and a DaemonSet.

use godwit_api::access;
use godwit_api::migration_network::NetworkName;
use godwit_api::names::{MIGRATION_INTERFACE, NETWORKS_ANNOTATION};
use serde_json::{Value, json};

use crate::{Error, HandlerNetwork, Options};

/// Where `godwit api` listens.
const API_PORT: u16 = 8443;
/// Where controllers say how they are, and tell their figures.
pub(crate) const HEALTH_PORT: u16 = 8080;
/// The name of that port.
pub(crate) const HEALTH_PORT_NAME: &str = "health";
/// Where `godwit api` asks a handler on its node's address (docs/architecture.md).
pub const HANDLER_PORT: u16 = 8186;
/// Where Prometheus does.
pub const HANDLER_METRICS_PORT: u16 = 8188;
/// Where it answers its kubelet: in a volume of its own pod.
const PROBED: &str = "/tmp/health.sock";
const BINARY: &str = "/usr/bin/godwit";
/// KubeVirt's.
const PRIORITY_CLASS: &str = "kubevirt-cluster-critical";

/// What KubeVirt's components are found by.
pub(crate) const KUBEVIRT_LABEL: &str = "kubevirt.io";
/// What everything else is found by.
pub(crate) const NAME_LABEL: &str = "app.kubernetes.io/name";

/// One kind of process.
struct Process<'a> {
    /// Its name: KubeVirt's, where it has one.
    name: &'a str,
    /// The label with its name that its pods are selected by.
    label: &'static str,
    account: &'a str,
    command: &'a [&'a str],
    options: &'a Options,
}

impl Process<'_> {
    fn labels(&self) -> Value {
        json!({
            self.label: self.name,
            NAME_LABEL: self.name,
            "app.kubernetes.io/part-of": "godwit",
        })
    }

    fn metadata(&self) -> Value {
        json!({"name": self.name, "namespace": self.options.namespace, "labels": self.labels()})
    }

    /// What selects its pods; can never be changed.
    fn selector(&self) -> Value {
        json!({"matchLabels": {self.label: self.name}})
    }

    fn container(&self, more: Value) -> Value {
        let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
        let mut container = json!({
            "name": self.name,
            "image": self.options.image,
            "command": self.command,
            "env": [
                field("POD_NAME", "metadata.name"),
                field("POD_NAMESPACE", "metadata.namespace"),
                field("POD_IP", "status.podIP"),
                field("NODE_NAME", "spec.nodeName"),
            ],
            "terminationMessagePolicy": "FallbackToLogsOnError",
        });
        merge(&mut container, more);
        container
    }

    fn pod(&self, container: Value, more: Value) -> Value {
        let mut spec = json!({
            "serviceAccountName": self.account,
            "priorityClassName": PRIORITY_CLASS,
            "containers": [container],
            // what the image is for
            "nodeSelector": {"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"},
        });
        merge(&mut spec, more);
        json!({"metadata": {"labels": self.labels()}, "spec": spec})
    }

    /// Two of them on two nodes, as Kubernetes' profile "restricted" has it. One stays while nodes are drained or the other is
    /// replaced.
    fn deployment(&self, container: Value) -> [Value; 2] {
        let mut container = self.container(container);
        merge(
            &mut container,
            json!({
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "capabilities": {"drop": ["ALL"]},
                    "readOnlyRootFilesystem": true,
                },
            }),
        );
        let spread = json!([{
            "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": self.selector(),
        }]);
        let template = self.pod(
            container,
            json!({
                "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
                "topologySpreadConstraints": spread,
                "tolerations": [{"key": "CriticalAddonsOnly", "operator": "Exists"}],
            }),
        );
        let deployment = json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": self.metadata(),
            "spec": {
                "replicas": 2,
                "selector": self.selector(),
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
                "template": template,
            },
        });
        let budget = json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": self.metadata(),
            "spec": {"minAvailable": 1, "selector": self.selector()},
        });
        [deployment, budget]
    }
}

fn probes(port: &str, scheme: &str) -> Value {
    let get = |path: &str| json!({"path": path, "port": port, "scheme": scheme});
    json!({
        // Started anew after a minute of silence; sent no requests after ten seconds.
        "livenessProbe": {"httpGet": get("/livez"), "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
        "readinessProbe": {"httpGet": get("/readyz"), "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 2},
    })
}

/// What a kubelet runs within a handler's container to ask it for this path.
fn probe(path: &str) -> Value {
    json!({"command": [BINARY, "probe", format!("--socket={PROBED}"), path]})
}

fn health() -> String {
    format!("--health=0.0.0.0:{HEALTH_PORT}")
}

fn port(name: &str, number: u16) -> Value {
    json!({"name": name, "containerPort": number, "protocol": "TCP"})
}

/// `godwit api`: two, and the Service that Kubernetes' API server finds them by.
pub fn api(options: &Options) -> Vec<Value> {
    let listen = format!("--listen=0.0.0.0:{API_PORT}");
    let handlers = format!("--handler-port={}", options.handler_port);
    let process = Process {
        name: "virt-api",
        label: KUBEVIRT_LABEL,
        account: access::API,
        command: &[BINARY, "api", &listen, &handlers],
        options,
    };
    let mut container = json!({
        "ports": [port("https", API_PORT)],
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
    });
    merge(&mut container, probes("https", "HTTPS"));
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": process.metadata(),
        "spec": {
            "type": "ClusterIP",
            "selector": {KUBEVIRT_LABEL: process.name},
            "ports": [{"name": "https", "port": crate::routes::PORT, "protocol": "TCP", "targetPort": "https"}],
        },
    });
    let mut objects = vec![priority_class(), service];
    objects.extend(process.deployment(container));
    objects
}

/// `godwit controller`: two, of which the one with the lease decides.
pub fn controller(options: &Options) -> Vec<Value> {
    let health = health();
    let process = Process {
        name: "virt-controller",
        label: KUBEVIRT_LABEL,
        account: access::CONTROLLER,
        command: &[BINARY, "controller", &health],
        options,
    };
    let mut container = json!({
        "ports": [port(HEALTH_PORT_NAME, HEALTH_PORT)],
        // 5,000 VMIs in 150 MiB
        "resources": {"requests": {"cpu": "10m", "memory": "150Mi"}},
    });
    merge(&mut container, probes(HEALTH_PORT_NAME, "HTTP"));
    process.deployment(container).into()
}

/// The controller of NodeMaintenances alone, under a lease of its own: two, of which one decides.
pub fn maintenance(options: &Options) -> Vec<Value> {
    let (health, lease) = (health(), format!("--lease={}", access::MAINTAINER));
    let kubevirt = format!("--namespace={}", options.kubevirt);
    let process = Process {
        name: access::MAINTAINER,
        label: NAME_LABEL,
        account: access::MAINTAINER,
        command: &[BINARY, "controller", "--nouns=maintenance", &kubevirt, &lease, &health],
        options,
    };
    let mut container = json!({
        "ports": [port(HEALTH_PORT_NAME, HEALTH_PORT)],
        "resources": {"requests": {"cpu": "10m", "memory": "100Mi"}},
    });
    merge(&mut container, probes(HEALTH_PORT_NAME, "HTTP"));
    process.deployment(container).into()
}

/// `godwit handler` on each node. It is privileged, as KubeVirt's is, and docs/install.md says what for.
///
/// # Errors
/// A network for migrations that cannot be.
pub fn handler(options: &Options) -> Result<Vec<Value>, Error> {
    let (front, socket) = (format!("--port={}", options.handler_port), format!("--health-socket={PROBED}"));
    let health = format!("--health={}", options.handler_metrics_port);
    let mut command = vec![BINARY, "handler", &front, &health, &socket];
    let (attached, network, interface);
    let multus = match &options.handler_network {
        HandlerNetwork::Attached(name) => {
            attached = NetworkName::parse(name, &options.namespace).ok_or_else(|| Error::Network(name.clone()))?;
            interface = format!("--migration-interface={MIGRATION_INTERFACE}");
            network = format!("--migration-network={attached}");
            command.extend([interface.as_str(), network.as_str()]);
            Some(attached.as_interface(MIGRATION_INTERFACE))
        }
        HandlerNetwork::Node { migrations: Some(name) } => {
            interface = format!("--migration-interface={name}");
            command.push(&interface);
            None
        }
        HandlerNetwork::Node { migrations: None } | HandlerNetwork::Pod => None,
    };
    let process =
        Process { name: "virt-handler", label: KUBEVIRT_LABEL, account: access::HANDLER, command: &command, options };
    // path, what the kubelet makes sure of, name, how mounts go over
    let paths = [
        // the launchers' sockets, which come and go with their pods
        ("/var/lib/kubelet/pods", "Directory", "pods", Some("HostToContainer")),
        // where the kubelet and its device plugins find each other
        ("/var/lib/kubelet/device-plugins", "Directory", "device-plugins", None),
        // what a handler leaves to its successor; in memory, so gone when the node starts anew
        ("/run/godwit", "DirectoryOrCreate", "state", None),
        // The runtime gives a privileged container the devices that are there when it starts; those of modules that are loaded later
        // would never be seen.
        ("/dev", "Directory", "dev", None),
    ];
    let volume = |(path, kind, name, _): &(&str, &str, &str, Option<&str>)| json!({"name": name, "hostPath": {"path": path, "type": kind}});
    let mount = |(path, _, name, propagation): &(&str, &str, &str, Option<&str>)| {
        let mut mount = json!({"name": name, "mountPath": path});
        if let Some(propagation) = propagation {
            mount["mountPropagation"] = json!(propagation);
        }
        mount
    };
    let mut volumes: Vec<Value> = paths.iter().map(volume).collect();
    volumes.push(json!({"name": "scratch", "emptyDir": {"medium": "Memory"}}));
    let mut mounts: Vec<Value> = paths.iter().map(mount).collect();
    mounts.push(json!({"name": "scratch", "mountPath": "/tmp"}));
    // No port is declared: of the node's network it would be the node's, which two pods cannot have at once, and the next handler's would
    // wait for a place for ever.
    let container = json!({
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
        "volumeMounts": mounts,
        "securityContext": {"privileged": true, "runAsUser": 0, "readOnlyRootFilesystem": true},
        // At the node's address the one before answers, as long as it is there.
        "livenessProbe": {"exec": probe("/livez"), "periodSeconds": 20, "timeoutSeconds": 5, "failureThreshold": 3},
        "readinessProbe": {"exec": probe("/readyz"), "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 2},
    });
    let mut spec = json!({
        // Launchers are known by the processes at the other end of their sockets.
        "hostPID": true,
        // Wherever a guest may be, also while its node is cordoned, drained or not ready.
        "tolerations": [{"operator": "Exists"}],
        "volumes": volumes,
    });
    if matches!(options.handler_network, HandlerNetwork::Node { .. }) {
        // Connections are of the network that they were opened in, and that of a pod goes with it: what guests are sent over is to outlive
        // the handler that has opened it.
        merge(&mut spec, json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"}));
    }
    let mut template = process.pod(process.container(container), spec);
    if let Some(network) = multus {
        template["metadata"]["annotations"] = json!({NETWORKS_ANNOTATION: network});
    }
    let daemon_set = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": process.metadata(),
        "spec": {
            "selector": process.selector(),
            // One that ends soon after its start stops the rollout while most nodes have the one before.
            "minReadySeconds": 10,
            // A node whose handler is away for 20 s ends its guests (docs/fencing.md): the next one is there, with its image, before
            // the old one goes.
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": template,
        },
    });
    Ok(vec![daemon_set])
}

/// Godwit's own pods go last when a node runs short.
fn priority_class() -> Value {
    json!({
        "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": PRIORITY_CLASS},
        "value": 1_000_000_000,
        "globalDefault": false,
        "description": "For the components that run virtual machines.",
    })
}

/// Puts the members of an object into another one.
fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}
