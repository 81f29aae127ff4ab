//! What is installed on a Kubernetes cluster: every object as data (pure).
//!
//! `godwit manifests` prints [`documents`]; `deploy/` holds the same as a kustomize base, one file a [`Part`], and a test holds the
//! two equal. Names, labels and accounts are KubeVirt's, so that what looks for its components finds them.

mod beside;
mod monitoring;
mod policies;
mod routes;
mod workloads;

use godwit_api::names::{KUBEVIRT_NAMESPACE, MAINTENANCE_LEASES_KUBEVIRT, MAINTENANCE_LEASES_MEDIK8S};
use godwit_api::{access, crds};
use serde_json::{Value, json};

pub use monitoring::{Alert, Prometheus, alerts, maintenance_alerts};
pub use workloads::{HANDLER_METRICS_PORT, HANDLER_PORT};

/// The image of all components unless another one is named; a registry has to be named by whoever pushes it somewhere.
pub const IMAGE: &str = concat!("godwit:v", env!("CARGO_PKG_VERSION"));

/// What is to be installed.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where components and their own objects live.
    pub namespace: String,
    /// The image of all components, and of launchers.
    pub image: String,
    /// Where the KubeVirt is installed that the components work beside.
    pub kubevirt: String,
    /// What of godwit; all of it when empty.
    pub components: Vec<Component>,
    /// What a Prometheus needs that the Prometheus Operator looks after, with this account; nothing when there is none.
    pub monitoring: Option<Prometheus>,
    /// In which network handlers are.
    pub handler_network: HandlerNetwork,
    /// Where a handler does what is asked of guests, on the address that it has there.
    pub handler_port: u16,
    /// Where it answers Prometheus.
    pub handler_metrics_port: u16,
}

/// In which network handlers, and with them the connections of migrations, are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandlerNetwork {
    /// Their nodes': connections outlive the handler that has opened them.
    Node {
        /// The interface of each node that migrations go over, if they have one of their own.
        migrations: Option<String>,
    },
    /// Their pods': connections break when a handler's pod is replaced.
    Pod,
    /// The same, and migrations go over a network that their pods are attached to: the NetworkAttachmentDefinition
    /// `[NAMESPACE/]NAME`. (Multus attaches nothing to a pod in its node's network.)
    Attached(String),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            namespace: KUBEVIRT_NAMESPACE.to_owned(),
            image: IMAGE.to_owned(),
            kubevirt: KUBEVIRT_NAMESPACE.to_owned(),
            components: Vec::new(),
            monitoring: None,
            handler_network: HandlerNetwork::Node { migrations: None },
            handler_port: HANDLER_PORT,
            handler_metrics_port: HANDLER_METRICS_PORT,
        }
    }
}

/// A part of godwit that works beside an existing KubeVirt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Component {
    /// `godwit plan drain`: the roles of whoever calls it.
    Plan,
    /// NodeMaintenance.
    Maintenance,
    /// Node pools.
    NodePool,
}

/// Why something cannot be installed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No namespace can have this name (RFC 1123, a label).
    #[error(
        "{0:?} cannot be a namespace: 1 to 63 lowercase letters, digits and '-', the first and the last of them no '-'; \
         give --namespace and --kubevirt-namespace such names"
    )]
    Name(String),
    /// Godwit's accounts have roles of their names there already, with other rules.
    #[error(
        "cannot install into the namespace {0}, which is shared with others: godwit's accounts have rights of their own there; \
         give --namespace another one, which nobody else uses"
    )]
    Shared(String),
    /// No NetworkAttachmentDefinition can have this name.
    #[error("{0:?} cannot be a NetworkAttachmentDefinition: give --migration-network its NAME, or NAMESPACE/NAME")]
    Network(String),
    /// Something that is not built yet.
    #[error("cannot install {0}: {1}")]
    Missing(&'static str, &'static str),
}

/// Objects that belong together: a file of `deploy/`.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The file's name, without `.yaml`.
    pub name: &'static str,
    /// What is in it, for a comment at its head.
    pub title: &'static str,
    /// Its objects.
    pub objects: Vec<Value>,
}

/// Everything to be applied, in an order in which it can be.
///
/// # Errors
/// What cannot be installed, and why.
pub fn parts(options: &Options) -> Result<Vec<Part>, Error> {
    for name in [&options.namespace, &options.kubevirt] {
        if !is_label(name) {
            return Err(Error::Name(name.clone()));
        }
    }
    if SHARED.contains(&options.namespace.as_str()) {
        return Err(Error::Shared(options.namespace.clone()));
    }
    if !options.components.is_empty() {
        return beside::parts(options);
    }
    let own = &options.namespace;
    let accounts = access::components();
    let mut rbac: Vec<Value> = accounts.iter().map(|account| service_account(account.name, own)).collect();
    rbac.extend(accounts.iter().flat_map(|account| account.objects(own)));
    let mut users = access::user_roles();
    users.extend(access::roles(access::PLANNER, &access::planner(), own));
    let mut parts = vec![
        Part { name: "crds", title: "The kinds, generated from the Rust types.", objects: definitions() },
        Part { name: "namespace", title: "Where godwit's components live.", objects: vec![namespace(own)] },
        Part { name: "rbac", title: "What each component may do, and nothing that it does not use.", objects: rbac },
        Part {
            name: "policies",
            title: "What roles cannot say: a handler writes what is of its own node.",
            objects: policies::objects(own).into(),
        },
        Part {
            name: "users",
            title: "KubeVirt's roles for users, to be bound to whoever shall have them.",
            objects: users,
        },
        Part { name: "api", title: "Webhooks and subresources.kubevirt.io.", objects: workloads::api(options) },
        Part { name: "controller", title: "The controllers.", objects: workloads::controller(options) },
        Part { name: "handler", title: "What runs on each node.", objects: workloads::handler(options)? },
        Part {
            name: "routes",
            title: "Where Kubernetes' API server asks godwit's; godwit's puts the authority of its certificate in.",
            objects: routes::objects(own),
        },
    ];
    let handler_port = options.handler_metrics_port;
    let objects = options.monitoring.as_ref().map(|prometheus| monitoring::objects(own, prometheus, handler_port));
    parts.extend(objects.map(monitoring));
    Ok(parts)
}

/// Namespaces in which accounts of godwit have other rights than in its own.
const SHARED: [&str; 3] = ["kube-system", MAINTENANCE_LEASES_KUBEVIRT, MAINTENANCE_LEASES_MEDIK8S];

/// Whether a namespace can have this name.
fn is_label(name: &str) -> bool {
    let within = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(within) && !name.starts_with('-') && !name.ends_with('-')
}

fn monitoring(objects: Vec<Value>) -> Part {
    Part {
        name: "monitoring",
        title: "What Prometheus scrapes, and of what it warns; needs the kinds of the Prometheus Operator.",
        objects,
    }
}

/// The kinds that a cluster does not have by itself. NetworkAttachmentDefinitions are Multus', which brings their definition.
fn definitions() -> Vec<Value> {
    crds().into_iter().filter(|crd| crd["spec"]["group"] != "k8s.cni.cncf.io").collect()
}

/// The handler is privileged, and Kubernetes may be set up to refuse such pods elsewhere.
fn namespace(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "privileged"}},
    })
}

fn service_account(name: &str, namespace: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": name, "namespace": namespace, "labels": {"kubevirt.io": ""}},
    })
}

/// Objects as YAML documents.
pub fn documents<'a>(objects: impl IntoIterator<Item = &'a Value>) -> String {
    let document = |object: &Value| format!("---\n{}", serde_saphyr::to_string(object).unwrap_or_default());
    objects.into_iter().map(document).collect()
}

/// `kustomization.yaml` of the base with these parts.
pub fn kustomization(parts: &[Part]) -> String {
    let files: String = parts.iter().map(|part| format!("  - {}.yaml\n", part.name)).collect();
    format!(
        "# Godwit on a Kubernetes cluster: docs/install.md. The files are written by a test, which \
         holds them\n# equal to what `godwit manifests` prints: change the crate godwit-manifests, then\n#   GODWIT_BLESS=1 cargo test -p godwit \
         --test manifests base\napiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n{files}"
    )
}

/// The part of a kustomize component that adds the monitoring to the base, and its `kustomization.yaml`.
pub fn component() -> (Part, String) {
    let part = monitoring(monitoring::objects(KUBEVIRT_NAMESPACE, &Prometheus::default(), HANDLER_METRICS_PORT));
    let text = format!(
        "# What Prometheus needs, for a kustomization with the base ../: docs/metrics.md. Written by the test that writes the base.\n\
         apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\nresources:\n  - {}.yaml\n",
        part.name
    );
    (part, text)
}

#[cfg(test)]
#[path = "monitoring_tests.rs"]
mod monitoring_tests;
#[cfg(test)]
mod tests;
