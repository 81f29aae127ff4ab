//! docs/metrics.md: every metric and every alert, from the code that tells and asks for them.

#![allow(clippy::unwrap_used)]

use std::fmt::Write;

use godwit_api::metrics::{ALL, MOST_SERIES, Metric, Teller};
use godwit_manifests::{HANDLER_METRICS_PORT, alerts};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md");

fn tellers(metric: &Metric) -> String {
    let name = |teller: &Teller| match teller {
        Teller::Controller => "virt-controller",
        Teller::Leader => "virt-controller that leads",
        Teller::Handler => "virt-handler",
        Teller::Api => "virt-api",
    };
    metric.tellers.iter().map(name).collect::<Vec<_>>().join(", ")
}

fn table(page: &mut String, prefix: &str) {
    page.push_str("\n| metric | labels | told by | |\n|---|---|---|---|\n");
    for metric in ALL.iter().filter(|metric| metric.name.starts_with(prefix)) {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let _ = writeln!(page, "| `{}` | {} | {} | {} |", metric.name, labels.join(" "), tellers(metric), metric.help);
    }
}

fn page() -> String {
    let mut page = format!(
        "# Metrics and alerts\n\n\
         Written from the code by a test of the crate `godwit-manifests`; after a change of it run\n\
         `GODWIT_BLESS=1 cargo test -p godwit-manifests --test metrics_page` to write it anew.\n\n\
         `virt-controller` answers `GET /metrics` over plain HTTP on port 8080 of its pods, where its probes are answered, too (`--health`), \
         `virt-handler` on port {HANDLER_METRICS_PORT} of its node; `virt-api`\ndoes on its port 8443, over HTTPS. The form is OpenMetrics' text. Nobody is asked who \
         they are: whoever reaches port 8080 of a controller reads the names of VMs, so let in whom you want\nby a NetworkPolicy (kubelets' probes \
         come in anyway). What a handler tells names no VM.\n\n\
         Everything is worked out when it is asked for, from the objects that the process knows at that moment; nothing is counted in between or \
         kept. So there are gauges only, a\ncontroller that takes over goes on where the one before it was, and what is told of a VM ends \
         with it. Of several controllers only the one that decides tells of the cluster. It looks at 64\nobjects at a time between two rounds of \
         decisions, so a scrape of a large cluster takes a moment (it shows that moment, not one instant) and holds up no decision.\n\n\
         A metric has at most {MOST_SERIES} series, however many VMs there are: of migrations and evacuations the newest, the longest or the worst, of others the \
         first by name.\nHow many are left out is told by `godwit_metrics_series_left_out`.\n\n\
         ## Metrics that KubeVirt has as well\n\n\
         Names, labels and meanings are KubeVirt's, so that dashboards go on. What KubeVirt tells per VM of CPU, memory, network and disks, of \
         its REST client and its work queues is not told here.\n\
         `kubevirt_info` has `kubeversion` and no `goversion`; `kubevirt_vmi_non_evictable` has no series of value 0; the data of a migration come from \
         the controller, not from virt-handler;\na phase that is neither running nor over counts as pending, not as failed.\n"
    );
    table(&mut page, "kubevirt_");
    page.push_str("\n## Metrics of godwit's own\n");
    table(&mut page, "godwit_");
    page.push_str(
        "\n## With the Prometheus Operator\n\n\
         ```sh\n\
         godwit manifests --monitoring --image registry.example.com/godwit:v0.1.0 | kubectl apply --server-side -f -\n\
         ```\n\n\
         adds, in the namespace `kubevirt` or that of `--namespace`, to what is installed ([install.md](install.md)): Services `virt-controller-metrics` and `virt-handler-metrics` without an \
         address, by which the pods are found; a\nServiceMonitor for each component; the PrometheusRule `godwit-monitoring` with the alerts below; and a Role that lets \
         Prometheus find the pods, bound to the account\n`monitoring/prometheus-k8s` (kube-prometheus'; `--monitoring-account NAMESPACE/NAME` for another one). The kinds \
         `monitoring.coreos.com/v1` have to be there. With kustomize it is\n`components: [https://github.com/YOUR/godwit//deploy/monitoring]` beside the base.\n\n\
         A Prometheus that takes only ServiceMonitors and rules with certain labels (the Helm chart kube-prometheus-stack: `release: NAME`) does not see these until they \
         have them:\n`kubectl -n kubevirt label servicemonitor,prometheusrule --all release=NAME`. Without the operator, scrape the pods with \
         `honor_labels: true`, as the ServiceMonitors do: the label\n`namespace` is the VM's.\n\n\
         Beside another KubeVirt, `godwit manifests --components maintenance --monitoring` adds the same for the controller of NodeMaintenances alone, with the alerts \
         `GodwitNodeMaintenance…`: it\ntells nothing else.\n\n\
         ## Alerts\n\n\
         Names that KubeVirt has mean what they mean there.\n\n\
         | alert | severity | when | for | what to do |\n|---|---|---|---|---|\n",
    );
    for alert in alerts("kubevirt") {
        let after = if alert.after.is_empty() { "at once" } else { alert.after };
        let _ = writeln!(
            page,
            "| `{}` | {} | `{}` | {after} | {} |",
            alert.name, alert.severity, alert.expression, alert.remedy
        );
    }
    page
}

#[test]
fn metrics_page() {
    let page = page();
    if std::env::var_os("GODWIT_BLESS").is_some() {
        std::fs::write(PAGE, &page).expect("docs/metrics.md can be written");
    }
    let written = std::fs::read_to_string(PAGE).unwrap_or_default();
    let behind =
        "docs/metrics.md is behind the code: GODWIT_BLESS=1 cargo test -p godwit-manifests --test metrics_page";
    assert!(written == page, "{behind}");
}
