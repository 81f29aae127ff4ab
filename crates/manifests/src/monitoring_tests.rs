//! Whether Prometheus would find what the rules ask for.

use std::collections::BTreeSet;

use godwit_api::metrics;
use promql_parser::parser::{Expr, VectorSelector, parse};

use super::*;

fn objects() -> Vec<Value> {
    let options = Options { monitoring: Some(Prometheus::default()), ..Options::default() };
    let parts = parts(&options).unwrap();
    let last = parts.last().unwrap();
    assert_eq!(last.name, "monitoring");
    last.objects.clone()
}

fn of<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects.iter().find(|one| one["kind"] == kind && one["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// The selectors in an expression.
fn selectors<'a>(expression: &'a Expr, found: &mut Vec<&'a VectorSelector>) {
    match expression {
        Expr::Aggregate(one) => selectors(&one.expr, found),
        Expr::Unary(one) => selectors(&one.expr, found),
        Expr::Binary(one) => {
            selectors(&one.lhs, found);
            selectors(&one.rhs, found);
        }
        Expr::Paren(one) => selectors(&one.expr, found),
        Expr::Subquery(one) => selectors(&one.expr, found),
        Expr::VectorSelector(one) => found.push(one),
        Expr::MatrixSelector(one) => found.push(&one.vs),
        Expr::Call(one) => one.args.args.iter().for_each(|argument| selectors(argument, found)),
        Expr::NumberLiteral(_) | Expr::StringLiteral(_) => {}
        other => panic!("nobody looks into {other:?}"),
    }
}

/// What a template says `$labels.…` of.
fn labels_of(template: &str) -> impl Iterator<Item = &str> {
    template.split("$labels.").skip(1).map(|rest| rest.split([' ', '}']).next().unwrap_or_default())
}

#[test]
fn every_expression_is_promql_about_metrics_that_are_told() {
    for alert in alerts("kubevirt") {
        let parsed =
            parse(&alert.expression).unwrap_or_else(|why| panic!("{}: {why}: {}", alert.name, alert.expression));
        let mut found = Vec::new();
        selectors(&parsed, &mut found);
        assert!(!found.is_empty(), "{}", alert.name);
        // Prometheus' own, of who told it.
        let mut labels = BTreeSet::from(["pod"]);
        for selector in found {
            let name = selector.name.as_deref().unwrap();
            let metric = metrics::ALL.iter().find(|metric| metric.name == name);
            let metric = metric.unwrap_or_else(|| panic!("{}: nobody tells {name}", alert.name));
            for matcher in &selector.matchers.matchers {
                assert!(metric.labels.contains(&matcher.name.as_str()), "{}: {matcher:?}", alert.name);
            }
            labels.extend(metric.labels);
        }
        for label in labels_of(alert.summary).chain(labels_of(&alert.remedy)) {
            assert!(labels.contains(label), "{}: {label}", alert.name);
        }
        assert!(["critical", "warning"].contains(&alert.severity), "{}", alert.name);
    }
    assert!(parse("sum(").is_err(), "it is a parser");
}

#[test]
fn every_alert_is_in_the_rules_once() {
    let objects = objects();
    let rules = of(&objects, "PrometheusRule", "godwit-monitoring")["spec"]["groups"][0]["rules"].as_array().unwrap();
    let names: BTreeSet<&str> = rules.iter().map(|rule| rule["alert"].as_str().unwrap()).collect();
    let wanted: BTreeSet<&str> = alerts("kubevirt").iter().map(|alert| alert.name).collect();
    assert_eq!((names.len(), names), (rules.len(), wanted));
    let blocked = rules.iter().find(|rule| rule["alert"] == "GodwitEvacuationBlocked").unwrap();
    assert_eq!((&blocked["expr"], &blocked["for"]), (&json!("godwit_vmi_evacuation_blocked == 1"), &json!("1m")));
    let fenced = rules.iter().find(|rule| rule["alert"] == "GodwitNodeFenced").unwrap();
    assert_eq!(fenced.get("for"), None, "it is told at once");
}

#[test]
fn prometheus_finds_each_component() {
    let options = Options { monitoring: Some(Prometheus::default()), ..Options::default() };
    let all: Vec<Value> = parts(&options).unwrap().into_iter().flat_map(|part| part.objects).collect();
    assert_eq!(found(&all), 3);
    let api = of(&all, "ServiceMonitor", "virt-api");
    assert_eq!(api["spec"]["endpoints"][0]["tlsConfig"]["serverName"], "virt-api.kubevirt.svc");
}

/// Beside another KubeVirt: its controller, by no label that is KubeVirt's, and warnings about nothing that nobody tells.
#[test]
fn prometheus_finds_the_controller_of_node_maintenances_alone() {
    let account = Prometheus { namespace: "mine".to_owned(), account: "prometheus".to_owned() };
    let options = Options {
        namespace: "maintenance".to_owned(),
        components: vec![Component::Plan, Component::Maintenance],
        monitoring: Some(account),
        ..Options::default()
    };
    let parts = parts(&options).unwrap();
    let added = &parts.last().unwrap().objects;
    assert!(added.iter().all(|one| one["metadata"]["namespace"] == "maintenance"), "{added:?}");
    let text = Value::from(added.clone()).to_string();
    assert!(!text.contains("kubevirt") && !text.contains("virt-"), "{text}");
    assert_eq!(of(added, "RoleBinding", "godwit-monitoring")["subjects"][0]["namespace"], "mine");
    let all: Vec<Value> = parts.iter().flat_map(|part| part.objects.clone()).collect();
    assert_eq!(found(&all), 1);
    // Of all warnings those that need nothing but what is said of NodeMaintenances.
    let needs_no_more = |alert: &Alert| {
        let parsed = parse(&alert.expression).unwrap();
        let mut found = Vec::new();
        selectors(&parsed, &mut found);
        found.iter().all(|one| one.name.as_deref().unwrap().starts_with("godwit_node_maintenance"))
    };
    let wanted: Vec<Alert> = alerts("maintenance").into_iter().filter(needs_no_more).collect();
    assert_eq!((wanted.len(), &wanted), (3, &maintenance_alerts()));
    let rules = of(added, "PrometheusRule", "godwit-monitoring")["spec"]["groups"][0]["rules"].as_array().unwrap();
    let names: Vec<&str> = rules.iter().map(|rule| rule["alert"].as_str().unwrap()).collect();
    assert_eq!(names, wanted.iter().map(|alert| alert.name).collect::<Vec<_>>());
}

/// How many ServiceMonitors there are: from each a Service, its pods and their port are found.
fn found(all: &[Value]) -> usize {
    let has = |object: &Value, wanted: &Value| {
        wanted.as_object().unwrap().iter().all(|(key, value)| object["metadata"]["labels"][key] == *value)
    };
    let monitors: Vec<&Value> = all.iter().filter(|one| one["kind"] == "ServiceMonitor").collect();
    for monitor in &monitors {
        let endpoint = &monitor["spec"]["endpoints"][0];
        assert_eq!(endpoint["honorLabels"], true, "the namespace is the VM's");
        let services: Vec<&Value> = all
            .iter()
            .filter(|one| one["kind"] == "Service" && has(one, &monitor["spec"]["selector"]["matchLabels"]))
            .filter(|one| one["spec"]["ports"][0]["name"] == endpoint["port"])
            .collect();
        let [service] = services.as_slice() else { panic!("{}: {services:?}", monitor["metadata"]["name"]) };
        let selector = service["spec"]["selector"].as_object().unwrap();
        let pods: Vec<&Value> = all
            .iter()
            .filter_map(|one| one.pointer("/spec/template"))
            .filter(|pod| selector.iter().all(|(key, value)| pod["metadata"]["labels"][key] == *value))
            .collect();
        let [pod] = pods.as_slice() else { panic!("{}: {pods:?}", monitor["metadata"]["name"]) };
        let container = &pod["spec"]["containers"][0];
        let target = &service["spec"]["ports"][0]["targetPort"];
        match container["ports"].as_array() {
            Some(ports) => assert!(ports.iter().any(|port| port["name"] == *target), "{ports:?}"),
            // A handler's, of its node.
            None => assert!(container["command"].as_array().unwrap().contains(&json!(format!("--health={target}")))),
        }
    }
    monitors.len()
}

#[test]
fn prometheus_may_find_pods_and_nothing_else() {
    let account = Prometheus { namespace: "mine".to_owned(), account: "prometheus".to_owned() };
    let options = Options { monitoring: Some(account), ..Options::default() };
    let objects = parts(&options).unwrap().pop().unwrap().objects;
    let subjects = &of(&objects, "RoleBinding", "godwit-monitoring")["subjects"];
    assert_eq!(*subjects, json!([{"kind": "ServiceAccount", "namespace": "mine", "name": "prometheus"}]));
    for rule in of(&objects, "Role", "godwit-monitoring")["rules"].as_array().unwrap() {
        assert_eq!(rule["verbs"], json!(["get", "list", "watch"]));
        assert!(!rule["resources"].as_array().unwrap().contains(&json!("secrets")));
    }
}

#[test]
fn without_being_asked_for_nothing_of_it_is_there() {
    let plain: Vec<Value> = parts(&Options::default()).unwrap().into_iter().flat_map(|part| part.objects).collect();
    assert!(plain.iter().all(|one| one["apiVersion"] != "monitoring.coreos.com/v1"));
    let options =
        Options { components: vec![Component::Plan], monitoring: Some(Prometheus::default()), ..Options::default() };
    assert!(parts(&options).unwrap_err().to_string().contains("nothing of these components runs in the cluster"));
}
