//! What a ResourceQuota counts, and whether a new object still fits.

use crate::builtin::qos_class;
use crate::meta;
use crate::quantity::{Format, Quantity};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Amounts by the names that quotas use (`pods`, `requests.memory`, `count/virtualmachines.kubevirt.io`, …).
pub type Amounts = BTreeMap<String, Quantity>;

/// Core kinds that have a name of their own in quotas, beside `count/…`.
const COUNTED: [&str; 5] = ["configmaps", "persistentvolumeclaims", "resourcequotas", "secrets", "services"];
/// Amounts of containers that may be limited without `requests.` before them.
const COMPUTE: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];
/// What every container must state when it is limited (Kubernetes leaves the others to count as nothing).
const STATED: [&str; 6] = ["cpu", "limits.cpu", "limits.memory", "memory", "requests.cpu", "requests.memory"];
const BY_CLASS: &str = ".storageclass.storage.k8s.io/";

/// The kind (group, plural) whose objects a name in `spec.hard` counts; `None`: nobody counts that.
pub fn counts(name: &str) -> Option<(&str, &str)> {
    if let Some(kind) = name.strip_prefix("count/") {
        let (plural, group) = kind.split_once('.').unwrap_or((kind, ""));
        return Some((group, plural));
    }
    if let Some(kind) = COUNTED.iter().find(|kind| **kind == name) {
        return Some(("", *kind));
    }
    if name == "requests.storage" || name.contains(BY_CLASS) {
        return Some(("", "persistentvolumeclaims"));
    }
    if matches!(name, "services.nodeports" | "services.loadbalancers") {
        return Some(("", "services"));
    }
    let pods = name == "pods"
        || COMPUTE.contains(&name)
        || name.starts_with("hugepages-")
        || name.starts_with("requests.")
        || name.starts_with("limits.");
    pods.then_some(("", "pods"))
}

/// What one object takes up.
pub fn usage(group: &str, plural: &str, object: &Value) -> Amounts {
    let mut used = Amounts::new();
    let whole = if group.is_empty() { format!("count/{plural}") } else { format!("count/{plural}.{group}") };
    add(&mut used, &whole, count(1));
    if !group.is_empty() {
        return used;
    }
    if COUNTED.contains(&plural) {
        add(&mut used, plural, count(1));
    }
    match plural {
        // A pod that is over takes up nothing but its name.
        "pods" if !is_over(object) => pod(object, &mut used),
        "persistentvolumeclaims" => claim(object, &mut used),
        "services" => service(object, &mut used),
        _ => {}
    }
    used
}

/// Whether a pod has ended.
fn is_over(pod: &Value) -> bool {
    matches!(pod.pointer("/status/phase").and_then(Value::as_str), Some("Succeeded" | "Failed"))
}

fn count(n: usize) -> Quantity {
    Quantity::new(i64::try_from(n).unwrap_or(i64::MAX), Format::DecimalSi)
}

fn add(to: &mut Amounts, name: &str, amount: Quantity) {
    let sum = to.get(name).map_or(amount, |before| before.plus(amount));
    to.insert(name.to_owned(), sum);
}

/// Adds amounts to others.
pub fn add_all(to: &mut Amounts, other: &Amounts) {
    other.iter().for_each(|(name, amount)| add(to, name, *amount));
}

fn list<'a>(object: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    object.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

fn amounts(object: &Value, pointer: &str) -> Amounts {
    let map = object.pointer(pointer).and_then(Value::as_object);
    map.into_iter().flatten().filter_map(|(name, value)| Some((name.clone(), Quantity::of(value)?))).collect()
}

fn pod(object: &Value, used: &mut Amounts) {
    add(used, "pods", count(1));
    for (name, amount) in of_containers(object, "requests") {
        if COMPUTE.contains(&name.as_str()) || name.starts_with("hugepages-") {
            add(used, &name, amount);
        }
        add(used, &format!("requests.{name}"), amount);
    }
    for (name, amount) in of_containers(object, "limits") {
        add(used, &format!("limits.{name}"), amount);
    }
}

/// What a pod's containers ask for together: those that run side by side are added up, an init container that runs alone
/// counts with the sidecars started before it, and the larger of both is taken.
fn of_containers(pod: &Value, what: &str) -> Amounts {
    let pointer = format!("/resources/{what}");
    let mut together = Amounts::new();
    let mut alone = Amounts::new();
    for container in list(pod, "/spec/initContainers") {
        let own = amounts(container, &pointer);
        if container.get("restartPolicy").and_then(Value::as_str) == Some("Always") {
            add_all(&mut together, &own);
            continue;
        }
        let mut sum = together.clone();
        add_all(&mut sum, &own);
        raise(&mut alone, sum);
    }
    list(pod, "/spec/containers").for_each(|container| add_all(&mut together, &amounts(container, &pointer)));
    raise(&mut together, alone);
    let overhead = amounts(pod, "/spec/overhead");
    for (name, amount) in overhead {
        // Overhead makes a limit larger, but makes none.
        if what == "requests" || together.contains_key(&name) {
            add(&mut together, &name, amount);
        }
    }
    together
}

fn raise(to: &mut Amounts, other: Amounts) {
    for (name, amount) in other {
        let most = to.get(&name).map_or(amount, |before| amount.max(*before));
        to.insert(name, most);
    }
}

fn claim(object: &Value, used: &mut Amounts) {
    let class = object.pointer("/spec/storageClassName").and_then(Value::as_str).unwrap_or_default();
    if !class.is_empty() {
        add(used, &format!("{class}{BY_CLASS}persistentvolumeclaims"), count(1));
    }
    if let Some(asked) = object.pointer("/spec/resources/requests/storage").and_then(Quantity::of) {
        add(used, "requests.storage", asked);
        if !class.is_empty() {
            add(used, &format!("{class}{BY_CLASS}requests.storage"), asked);
        }
    }
}

fn service(object: &Value, used: &mut Amounts) {
    let ports = list(object, "/spec/ports").count();
    match object.pointer("/spec/type").and_then(Value::as_str) {
        Some("NodePort") => add(used, "services.nodeports", count(ports)),
        Some("LoadBalancer") => {
            add(used, "services.loadbalancers", count(1));
            if object.pointer("/spec/allocateLoadBalancerNodePorts") != Some(&Value::Bool(false)) {
                add(used, "services.nodeports", count(ports));
            }
        }
        _ => {}
    }
}

/// `spec.hard` of a quota.
pub fn hard(quota: &Value) -> Amounts {
    amounts(quota, "/spec/hard")
}

/// `status.used` of a quota.
pub fn taken(quota: &Value) -> Amounts {
    amounts(quota, "/status/used")
}

/// Kinds (group, plural) whose objects a quota counts.
pub fn kinds(quota: &Value) -> BTreeSet<(String, String)> {
    let hard = hard(quota);
    let kinds = hard.keys().filter_map(|name| counts(name));
    kinds.map(|(group, plural)| (group.to_owned(), plural.to_owned())).collect()
}

/// Whether a quota's scopes let it count this object; scopes speak of pods only.
pub fn in_scope(quota: &Value, group: &str, plural: &str, object: &Value) -> bool {
    let scopes = list(quota, "/spec/scopes").filter_map(Value::as_str).map(|name| (name, "Exists", Vec::new()));
    let chosen = list(quota, "/spec/scopeSelector/matchExpressions").map(|term| {
        let text = |key: &str| term.get(key).and_then(Value::as_str).unwrap_or_default();
        (text("scopeName"), text("operator"), list(term, "/values").filter_map(Value::as_str).collect::<Vec<_>>())
    });
    let mut all = scopes.chain(chosen);
    all.all(|(scope, operator, values)| {
        group.is_empty() && plural == "pods" && scope_matches(scope, operator, &values, object)
    })
}

/// Scopes that are understood.
pub const SCOPES: [&str; 5] = ["BestEffort", "NotBestEffort", "NotTerminating", "PriorityClass", "Terminating"];

fn scope_matches(scope: &str, operator: &str, values: &[&str], pod: &Value) -> bool {
    let ends = pod.pointer("/spec/activeDeadlineSeconds").and_then(Value::as_i64).is_some_and(|seconds| seconds >= 0);
    match scope {
        "Terminating" => ends,
        "NotTerminating" => !ends,
        "BestEffort" => qos_class(pod) == "BestEffort",
        "NotBestEffort" => qos_class(pod) != "BestEffort",
        "PriorityClass" => {
            let class = pod.pointer("/spec/priorityClassName").and_then(Value::as_str).unwrap_or_default();
            match operator {
                "In" => values.contains(&class),
                "NotIn" => !values.contains(&class),
                "DoesNotExist" => class.is_empty(),
                _ => !class.is_empty(),
            }
        }
        _ => false,
    }
}

/// What these objects take up of what a quota limits: a value for every name in `spec.hard` that anybody counts.
pub fn used<'a>(quota: &Value, objects: impl Iterator<Item = (&'a str, &'a str, &'a Value)>) -> Amounts {
    let hard = hard(quota);
    let mut sum: Amounts =
        hard.iter().filter(|(name, _)| counts(name).is_some()).map(|(name, _)| (name.clone(), count(0))).collect();
    for (group, plural, object) in objects {
        if !in_scope(quota, group, plural, object) {
            continue;
        }
        for (name, amount) in usage(group, plural, object) {
            if let Some(before) = sum.get_mut(&name) {
                *before = before.plus(amount);
            }
        }
    }
    sum
}

/// Why a new object may not be created under a quota of which `used` is taken, in Kubernetes' words.
pub fn refusal(quota: &Value, used: &Amounts, group: &str, plural: &str, object: &Value) -> Option<String> {
    if !in_scope(quota, group, plural, object) {
        return None;
    }
    let (name, hard) = (meta::name(quota), hard(quota));
    if group.is_empty() && plural == "pods" {
        let missing = unstated(&hard, object);
        if !missing.is_empty() {
            return Some(format!("failed quota: {name}: must specify {}", missing.join("; ")));
        }
    }
    let wanted = usage(group, plural, object);
    let nothing = count(0);
    let over: Vec<_> = wanted
        .iter()
        .filter(|(_, amount)| **amount > nothing)
        .filter_map(|(name, amount)| Some((name, amount, used.get(name).unwrap_or(&nothing), hard.get(name)?)))
        .filter(|(_, amount, used, hard)| used.plus(**amount) > **hard)
        .collect();
    if over.is_empty() {
        return None;
    }
    let (mut requested, mut taken, mut limited) = (Vec::new(), Vec::new(), Vec::new());
    for (name, amount, used, hard) in over {
        requested.push(format!("{name}={amount}"));
        taken.push(format!("{name}={used}"));
        limited.push(format!("{name}={hard}"));
    }
    Some(format!(
        "exceeded quota: {name}, requested: {}, used: {}, limited: {}",
        requested.join(","),
        taken.join(","),
        limited.join(",")
    ))
}

/// `limits.cpu for: a,b`: what is limited and which containers do not state it.
fn unstated(hard: &Amounts, pod: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for wanted in STATED.iter().filter(|name| hard.contains_key(**name)) {
        let (what, resource) = wanted.split_once('.').unwrap_or(("requests", wanted));
        let pointer = format!("/resources/{what}/{resource}");
        let silent: BTreeSet<&str> = ["/spec/containers", "/spec/initContainers"]
            .iter()
            .flat_map(|containers| list(pod, containers))
            .filter(|container| container.pointer(&pointer).is_none())
            .filter_map(|container| container.get("name").and_then(Value::as_str))
            .collect();
        if !silent.is_empty() {
            found.push(format!("{wanted} for: {}", silent.into_iter().collect::<Vec<_>>().join(",")));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn quota(spec: Value) -> Value {
        json!({"metadata": {"name": "q"}, "spec": spec})
    }

    fn container(name: &str, cpu: &str, memory: &str) -> Value {
        json!({"name": name, "resources": {"requests": {"cpu": cpu, "memory": memory}}})
    }

    fn pod_of(containers: Value) -> Value {
        json!({"metadata": {"name": "p"}, "spec": {"containers": containers}})
    }

    fn said(amounts: &Amounts) -> Vec<String> {
        amounts.iter().map(|(name, amount)| format!("{name}={amount}")).collect()
    }

    #[test]
    fn a_pod_counts_what_runs_together_or_what_its_start_needs() {
        let mut pod = pod_of(json!([container("a", "250m", "64Mi"), container("b", "1", "64Mi")]));
        pod["spec"]["initContainers"] = json!([
            {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "100m"}}},
            {"name": "init", "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}}},
        ]);
        pod["spec"]["overhead"] = json!({"memory": "1Mi"});
        let wanted =
            ["count/pods=1", "cpu=1350m", "memory=1025Mi", "pods=1", "requests.cpu=1350m", "requests.memory=1025Mi"];
        assert_eq!(said(&usage("", "pods", &pod)), wanted);
        pod["status"] = json!({"phase": "Succeeded"});
        assert_eq!(said(&usage("", "pods", &pod)), ["count/pods=1"]);
    }

    #[test]
    fn claims_services_and_other_kinds_count() {
        let claim = json!({"spec": {"storageClassName": "fast", "resources": {"requests": {"storage": "1Gi"}}}});
        let used = said(&usage("", "persistentvolumeclaims", &claim));
        for entry in ["requests.storage=1Gi", "fast.storageclass.storage.k8s.io/requests.storage=1Gi"] {
            assert!(used.contains(&entry.to_owned()), "{used:?}");
        }
        let balancer = json!({"spec": {"type": "LoadBalancer", "ports": [{"port": 1}, {"port": 2}]}});
        let used = said(&usage("", "services", &balancer));
        assert_eq!(used, ["count/services=1", "services=1", "services.loadbalancers=1", "services.nodeports=2"]);
        assert_eq!(said(&usage("kubevirt.io", "virtualmachines", &json!({}))), ["count/virtualmachines.kubevirt.io=1"]);
        assert_eq!(counts("count/virtualmachines.kubevirt.io"), Some(("kubevirt.io", "virtualmachines")));
        assert_eq!(counts("requests.storage"), Some(("", "persistentvolumeclaims")));
        assert_eq!(counts("odd"), None);
    }

    #[test]
    fn what_does_not_fit_is_named_with_its_figures() {
        let quota = quota(json!({"hard": {"pods": "2", "requests.memory": "100Mi", "requests.cpu": "4"}}));
        let pod = pod_of(json!([container("a", "1", "64Mi")]));
        let none = used(&quota, std::iter::empty());
        assert_eq!(said(&none), ["pods=0", "requests.cpu=0", "requests.memory=0"]);
        assert_eq!(refusal(&quota, &none, "", "pods", &pod), None);
        let one = used(&quota, [("", "pods", &pod)].into_iter());
        assert_eq!(
            refusal(&quota, &one, "", "pods", &pod).as_deref(),
            Some(
                "exceeded quota: q, requested: requests.memory=64Mi, used: requests.memory=64Mi, limited: requests.memory=100Mi"
            )
        );
        let two = used(&quota, [("", "pods", &pod), ("", "pods", &pod)].into_iter());
        assert_eq!(
            refusal(&quota, &two, "", "pods", &pod).as_deref(),
            Some(
                "exceeded quota: q, requested: pods=1,requests.memory=64Mi, used: pods=2,requests.memory=128Mi, limited: \
                 pods=2,requests.memory=100Mi"
            )
        );
        // Other kinds are none of its business.
        assert_eq!(refusal(&quota, &two, "", "configmaps", &json!({})), None);
    }

    #[test]
    fn what_is_limited_must_be_stated() {
        let quota = quota(json!({"hard": {"limits.cpu": "1", "memory": "1Gi"}}));
        let pod = pod_of(json!([container("b", "1", "1Mi"), {"name": "a"}]));
        assert_eq!(
            refusal(&quota, &Amounts::new(), "", "pods", &pod).as_deref(),
            Some("failed quota: q: must specify limits.cpu for: a,b; memory for: a")
        );
    }

    #[test]
    fn scopes_choose_pods() {
        let counted = |spec: Value, pod: &Value| in_scope(&quota(spec), "", "pods", pod);
        let (plain, mut rich) = (pod_of(json!([{"name": "a"}])), pod_of(json!([container("a", "1", "1Mi")])));
        rich["spec"]["activeDeadlineSeconds"] = json!(5);
        rich["spec"]["priorityClassName"] = json!("high");
        assert!(counted(json!({"scopes": ["BestEffort", "NotTerminating"]}), &plain));
        assert!(!counted(json!({"scopes": ["BestEffort"]}), &rich));
        assert!(counted(json!({"scopes": ["NotBestEffort", "Terminating"]}), &rich));
        let class = |operator: &str| {
            json!({"scopeSelector": {"matchExpressions": [
                {"scopeName": "PriorityClass", "operator": operator, "values": ["high"]}]}})
        };
        assert!(counted(class("In"), &rich) && !counted(class("In"), &plain));
        assert!(counted(class("NotIn"), &plain) && !counted(class("NotIn"), &rich));
        assert!(!in_scope(&quota(json!({"scopes": ["BestEffort"]})), "", "configmaps", &json!({})));
        assert!(in_scope(&quota(json!({})), "", "configmaps", &json!({})));
    }
}
