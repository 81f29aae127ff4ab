//! What Prometheus is told where the Prometheus Operator (`monitoring.coreos.com/v1`) looks after it: what to scrape, and of what to warn.

use godwit_api::access;
use godwit_api::metrics::{self, Metric};
use godwit_api::names::CA_BUNDLE;
use serde_json::{Value, json};

use crate::workloads::{HEALTH_PORT, HEALTH_PORT_NAME, KUBEVIRT_LABEL, NAME_LABEL};

/// Under which key the ConfigMap [`CA_BUNDLE`] has the certificates.
const BUNDLE_KEY: &str = "ca-bundle.crt";
/// The Role by which Prometheus finds what is to be scraped, its binding, and the rules.
const NAME: &str = "godwit-monitoring";
const API_SERVICE: &str = "virt-api";

/// Whose account Prometheus has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prometheus {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub account: String,
}

impl Default for Prometheus {
    /// kube-prometheus'.
    fn default() -> Self {
        Self { namespace: "monitoring".to_owned(), account: "prometheus-k8s".to_owned() }
    }
}

/// A warning of the PrometheusRule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alert {
    /// Its name; KubeVirt's where it has one of the same meaning.
    pub name: &'static str,
    /// When it is to be given, in PromQL.
    pub expression: String,
    /// For how long that has to be so, in Prometheus' words; empty gives it at once.
    pub after: &'static str,
    /// `critical`: guests are in danger, or nothing can be done with them. `warning`: what was asked for does not come about.
    pub severity: &'static str,
    /// What is wrong, with what; a template of Prometheus.
    pub summary: &'static str,
    /// What to do about it.
    pub remedy: String,
}

/// Every warning, of an installation in this namespace.
pub fn alerts(own: &str) -> Vec<Alert> {
    let none = |metric: Metric| format!("(sum({}) or vector(0)) == 0", metric.name);
    let name = |metric: Metric| metric.name;
    let mut alerts = vec![
        Alert {
            name: "NoLeadingVirtController",
            expression: none(metrics::CONTROLLER_LEADING),
            after: "2m",
            severity: "critical",
            summary: "No virt-controller decides: no VM is started or moved, and no node emptied",
            remedy: format!(
                "kubectl -n {own} get pods -l kubevirt.io=virt-controller; kubectl -n {own} describe lease virt-controller"
            ),
        },
        Alert {
            name: "NoReadyVirtApi",
            expression: none(metrics::API_READY),
            after: "1m",
            severity: "critical",
            summary: "No virt-api answers: VMs cannot be made or changed, and no launcher pod be evicted, until one does",
            remedy: format!(
                "kubectl -n {own} get pods -l kubevirt.io=virt-api; GET /readyz of one says what it lacks"
            ),
        },
        Alert {
            name: "VirtHandlerDown",
            // A node that is empty may be switched off.
            expression: format!(
                "{} == 0 unless on (node) {}{{phase=\"Succeeded\"}} == 1",
                name(metrics::HANDLER_HEARD),
                name(metrics::MAINTENANCE)
            ),
            after: "1m",
            severity: "critical",
            summary: "The virt-handler of node {{ $labels.node }} does not renew its lease: the node's guests end, or have ended",
            remedy: "See whether the node runs and reaches the API server; then its virt-handler's log. docs/lost-nodes.md says what becomes of the guests".to_owned(),
        },
        Alert {
            name: "GodwitNodeFenced",
            expression: format!("{} == 1", name(metrics::NODE_FENCED)),
            after: "",
            severity: "critical",
            summary: "Node {{ $labels.node }} was not heard, so its guests were ended and are started elsewhere by their run strategies",
            remedy: "kubectl describe node {{ $labels.node }}. It ends when the node's virt-handler is heard again; delete the Node if it does not come back".to_owned(),
        },
        Alert {
            name: "VMCannotBeEvicted",
            expression: format!("{} > 0", name(metrics::VMI_NON_EVICTABLE)),
            after: "1m",
            severity: "warning",
            summary: "VMI {{ $labels.namespace }}/{{ $labels.name }} on {{ $labels.node }} cannot be migrated though its evictionStrategy is LiveMigrate: its node cannot be emptied",
            remedy: "Its condition LiveMigratable names all that stands in the way. Change that, or its evictionStrategy, before the node is to be emptied".to_owned(),
        },
        Alert {
            name: "GodwitDrainBlocked",
            expression: format!(
                "{} > 0 and on (node) {} == 1",
                name(metrics::VMI_NON_EVICTABLE),
                name(metrics::NODE_CLOSED)
            ),
            after: "5m",
            severity: "critical",
            summary: "Node {{ $labels.node }} is closed and does not become empty: VMI {{ $labels.namespace }}/{{ $labels.name }} cannot be migrated, and its eviction is refused",
            remedy: "Its condition LiveMigratable names all that stands in the way. Change that, or shut the VM down, or open the node again".to_owned(),
        },
        Alert {
            name: "GodwitEvacuationBlocked",
            expression: format!("{} == 1", name(metrics::EVACUATION_BLOCKED)),
            after: "1m",
            severity: "critical",
            summary: "Node {{ $labels.node }} does not become empty: VMI {{ $labels.namespace }}/{{ $labels.name }} is not moved any more ({{ $labels.reason }})",
            remedy: "kubectl -n {{ $labels.namespace }} describe vmi {{ $labels.name }}: its condition EvacuationStopped says why, and what to do".to_owned(),
        },
        Alert {
            name: "GodwitEvacuationTakesLong",
            expression: format!("time() - {} > 3600", name(metrics::EVACUATION_START)),
            after: "5m",
            severity: "warning",
            summary: "VMI {{ $labels.namespace }}/{{ $labels.name }} is to leave {{ $labels.node }} for more than an hour",
            remedy: "kubectl -n {{ $labels.namespace }} get vmim: the message of its migration says what it waits for; godwit plan drain {{ $labels.node }} says how long it takes".to_owned(),
        },
        Alert {
            name: "GodwitMigrationFailsRepeatedly",
            expression: format!("{} >= 3", name(metrics::MIGRATION_FAILURES)),
            after: "",
            severity: "warning",
            summary: "The last {{ $value }} migrations of VMI {{ $labels.namespace }}/{{ $labels.name }} have failed",
            remedy: "kubectl -n {{ $labels.namespace }} get mrec: the reason of each; docs/failures.md has the remedy for each reason".to_owned(),
        },
        Alert {
            name: "GodwitMigrationDoesNotConverge",
            expression: format!("{} == 0", name(metrics::MIGRATION_CONVERGES)),
            after: "5m",
            severity: "warning",
            summary: "The migration of VMI {{ $labels.namespace }}/{{ $labels.name }} does not come to its end by itself: the guest writes faster than the link carries",
            remedy: "Give it more bandwidth (annotation godwit.io/bandwidth-per-migration on the migration), or allow auto-converge or post-copy in a MigrationPolicy".to_owned(),
        },
        Alert {
            name: "GodwitCertificateExpires",
            expression: format!("{} - time() < 86400", name(metrics::CERTIFICATE_END)),
            after: "10m",
            severity: "critical",
            summary: "The certificate \"{{ $labels.certificate }}\" of {{ $labels.pod }} ends within a day, and was not renewed in time",
            remedy: "The log of {{ $labels.pod }} says why it is not renewed; docs/certificates.md says who makes it. Lifetimes of less than three days make this alert useless: take it out".to_owned(),
        },
    ];
    alerts.extend(maintenance_alerts());
    alerts
}

/// The warnings about NodeMaintenances: all that the controller tells that stands alone beside another KubeVirt.
pub fn maintenance_alerts() -> Vec<Alert> {
    let name = |metric: Metric| metric.name;
    vec![
        Alert {
            name: "GodwitNodeMaintenanceBlocked",
            expression: format!("{}{{state=\"Blocked\"}} > 0", name(metrics::MAINTENANCE_VMIS)),
            after: "5m",
            severity: "warning",
            summary: "{{ $value }} VMIs cannot leave {{ $labels.node }}, which the NodeMaintenance {{ $labels.maintenance }} is to empty",
            remedy: "kubectl describe nodemaintenance {{ $labels.maintenance }}: status.virtualMachineInstances has each with what holds it".to_owned(),
        },
        Alert {
            name: "GodwitNodeMaintenanceOverdue",
            expression: format!(
                "time() > {} and on (maintenance, node) {}{{phase=\"Running\"}} == 1",
                name(metrics::MAINTENANCE_DEADLINE),
                name(metrics::MAINTENANCE)
            ),
            after: "1m",
            severity: "warning",
            summary: "Node {{ $labels.node }} is not empty at the deadline of the NodeMaintenance {{ $labels.maintenance }}",
            remedy: "kubectl describe nodemaintenance {{ $labels.maintenance }} says which pods are left, and what they wait for".to_owned(),
        },
        Alert {
            name: "GodwitNodeMaintenanceFailed",
            expression: format!("{}{{phase=\"Failed\"}} == 1", name(metrics::MAINTENANCE)),
            after: "",
            severity: "warning",
            summary: "The NodeMaintenance {{ $labels.maintenance }} was given up: node {{ $labels.node }} takes pods again",
            remedy: "Its status.lastError says why. Delete it, remove the cause, and make it anew".to_owned(),
        },
    ]
}

/// What goes with the controller of NodeMaintenances alone.
pub fn maintenance(namespace: &str, prometheus: &Prometheus) -> Vec<Value> {
    let pods = Pods { label: NAME_LABEL, component: access::MAINTAINER, namespace };
    let mut objects = vec![pods.service()];
    objects.extend(role(namespace, prometheus));
    objects.extend([pods.monitor(plain()), rules(namespace, maintenance_alerts())]);
    objects
}

/// Everything of that kind.
pub fn objects(namespace: &str, prometheus: &Prometheus, handler_port: u16) -> Vec<Value> {
    let of = |component| Pods { label: KUBEVIRT_LABEL, component, namespace };
    // Handlers' pods declare no port, so none has a name.
    let mut objects =
        vec![of("virt-controller").service(), of("virt-handler").service_at(handler_port, &json!(handler_port))];
    objects.extend(role(namespace, prometheus));
    objects.push(of("virt-controller").monitor(plain()));
    let mut handlers = plain();
    // An alert about a node's certificate names the node.
    handlers["relabelings"] = json!([{"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "node"}]);
    objects.push(of("virt-handler").monitor(handlers));
    objects.push(of(API_SERVICE).monitor(json!({
        "port": "https", "path": "/metrics", "scheme": "https", "honorLabels": true,
        "tlsConfig": {
            "serverName": format!("{API_SERVICE}.{namespace}.svc"),
            "ca": {"configMap": {"name": CA_BUNDLE, "key": BUNDLE_KEY}},
        },
    })));
    objects.push(rules(namespace, alerts(namespace)));
    objects
}

/// The label `namespace` is that of a VM, and not that of the pod which tells of it.
fn plain() -> Value {
    json!({"port": "metrics", "path": "/metrics", "scheme": "http", "honorLabels": true})
}

/// The pods of a component.
struct Pods<'a> {
    /// The label with the component's name that they are selected by.
    label: &'static str,
    component: &'a str,
    namespace: &'a str,
}

impl Pods<'_> {
    fn metadata(&self, name: &str) -> Value {
        let labels =
            json!({self.label: self.component, NAME_LABEL: self.component, "app.kubernetes.io/part-of": "godwit"});
        json!({"name": name, "namespace": self.namespace, "labels": labels})
    }

    /// By this Prometheus finds the pods; nobody else asks it for an address.
    fn service(&self) -> Value {
        self.service_at(HEALTH_PORT, &json!(HEALTH_PORT_NAME))
    }

    fn service_at(&self, port: u16, target: &Value) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": self.metadata(&format!("{}-metrics", self.component)),
            "spec": {
                "type": "ClusterIP", "clusterIP": "None",
                "selector": {self.label: self.component},
                // Also of those that are not ready.
                "publishNotReadyAddresses": true,
                "ports": [{"name": "metrics", "port": port, "protocol": "TCP", "targetPort": target}],
            },
        })
    }

    fn monitor(&self, endpoint: Value) -> Value {
        json!({
            "apiVersion": "monitoring.coreos.com/v1", "kind": "ServiceMonitor", "metadata": self.metadata(self.component),
            "spec": {"selector": {"matchLabels": {self.label: self.component}}, "endpoints": [endpoint]},
        })
    }
}

/// What Prometheus needs to find the pods of a namespace.
fn role(namespace: &str, prometheus: &Prometheus) -> [Value; 2] {
    let metadata = json!({"name": NAME, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "godwit"}});
    let see = ["get", "list", "watch"];
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": metadata,
        "rules": [
            {"apiGroups": [""], "resources": ["services", "endpoints", "pods"], "verbs": see},
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": see},
        ],
    });
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": metadata,
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": NAME},
        "subjects": [{"kind": "ServiceAccount", "namespace": prometheus.namespace, "name": prometheus.account}],
    });
    [role, binding]
}

fn rules(namespace: &str, alerts: Vec<Alert>) -> Value {
    let rule = |alert: Alert| {
        let mut rule = json!({
            "alert": alert.name,
            "expr": alert.expression,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "description": alert.remedy},
        });
        if !alert.after.is_empty() {
            rule["for"] = json!(alert.after);
        }
        rule
    };
    let rules: Vec<Value> = alerts.into_iter().map(rule).collect();
    json!({
        "apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule",
        "metadata": {"name": NAME, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "godwit"}},
        "spec": {"groups": [{"name": "godwit", "rules": rules}]},
    })
}
