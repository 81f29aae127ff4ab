//! Role-based access control, evaluated from the stored roles and bindings.

use crate::user::{User, service_account};
use godwit_store::{Store, Watch};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Where roles and bindings are stored.
pub(crate) const PREFIX: &str = "/registry/rbac.authorization.k8s.io/";

/// What someone wants to do.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Action<'a> {
    pub(crate) verb: &'a str,
    pub(crate) group: &'a str,
    pub(crate) resource: &'a str,
    pub(crate) subresource: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    /// If set, this is about a path and not about objects.
    pub(crate) path: &'a str,
}

/// One rule of a role.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Rule {
    pub(crate) verbs: Vec<String>,
    #[serde(rename = "nonResourceURLs", skip_serializing_if = "Vec::is_empty")]
    pub(crate) non_resource_urls: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) api_groups: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) resources: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) resource_names: Vec<String>,
}

fn any(list: &[String], wanted: &str) -> bool {
    list.iter().any(|item| item == "*" || item == wanted)
}

impl Rule {
    pub(crate) fn allows(&self, action: &Action<'_>) -> bool {
        if !any(&self.verbs, action.verb) {
            return false;
        }
        if !action.path.is_empty() {
            return self.non_resource_urls.iter().any(|url| match url.strip_suffix('*') {
                Some(start) => action.path.starts_with(start),
                None => action.path == url,
            });
        }
        let resource = self.resources.iter().any(|known| {
            if known == "*" {
                return true;
            }
            match known.split_once('/') {
                None => action.subresource.is_empty() && known == action.resource,
                Some(("*", sub)) => sub == action.subresource,
                Some((main, sub)) => main == action.resource && sub == action.subresource,
            }
        });
        resource
            && any(&self.api_groups, action.group)
            && (self.resource_names.is_empty() || self.resource_names.iter().any(|name| name == action.name))
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Subject {
    kind: String,
    name: String,
    namespace: String,
}

impl Subject {
    fn is(&self, user: &User, binding_namespace: &str) -> bool {
        match self.kind.as_str() {
            "User" => self.name == "*" || self.name == user.name,
            "Group" => user.groups.contains(&self.name),
            "ServiceAccount" => {
                let namespace = if self.namespace.is_empty() { binding_namespace } else { &self.namespace };
                service_account(&user.name) == Some((namespace, &self.name))
            }
            _ => false,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RoleRef {
    kind: String,
    name: String,
}

#[derive(Debug)]
struct Binding {
    name: String,
    subjects: Vec<Subject>,
    role: RoleRef,
}

type Rules = Arc<Vec<Rule>>;

/// All roles and bindings, parsed.
#[derive(Debug, Default)]
pub(crate) struct Index {
    cluster_roles: BTreeMap<String, Rules>,
    /// By namespace and name.
    roles: BTreeMap<(String, String), Rules>,
    cluster_bindings: Vec<Binding>,
    bindings: BTreeMap<String, Vec<Binding>>,
}

fn field<T: Default + for<'de> Deserialize<'de>>(object: &Value, name: &str) -> T {
    object.get(name).and_then(|value| T::deserialize(value).ok()).unwrap_or_default()
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

impl Index {
    fn build(store: &Store) -> Self {
        let mut index = Self::default();
        let mut aggregated = Vec::new();
        let mut labelled: Vec<(Value, Rules)> = Vec::new();
        for entry in store.list(PREFIX, None, 0).entries {
            let object = entry.json();
            let name = text(object, "/metadata/name").to_owned();
            let namespace = text(object, "/metadata/namespace").to_owned();
            let resource = entry.key.strip_prefix(PREFIX).and_then(|rest| rest.split('/').next()).unwrap_or_default();
            match resource {
                "clusterroles" => {
                    let rules: Rules = Arc::new(field(object, "rules"));
                    if let Some(selectors) = object.pointer("/aggregationRule/clusterRoleSelectors") {
                        aggregated.push((name.clone(), selectors.clone()));
                    }
                    if let Some(labels) = object.pointer("/metadata/labels") {
                        labelled.push((labels.clone(), rules.clone()));
                    }
                    index.cluster_roles.insert(name, rules);
                }
                "roles" => {
                    index.roles.insert((namespace, name), Arc::new(field(object, "rules")));
                }
                "clusterrolebindings" | "rolebindings" => {
                    let binding = Binding { name, subjects: field(object, "subjects"), role: field(object, "roleRef") };
                    match resource {
                        "rolebindings" => index.bindings.entry(namespace).or_default().push(binding),
                        _ => index.cluster_bindings.push(binding),
                    }
                }
                _ => {}
            }
        }
        for (name, selectors) in aggregated {
            let mut rules: Vec<Rule> = index.cluster_roles.get(&name).map(|own| own.to_vec()).unwrap_or_default();
            for (labels, more) in &labelled {
                let selected = selectors.as_array().into_iter().flatten().any(|selector| selects(selector, labels));
                if selected {
                    rules.extend(more.iter().filter(|rule| !rules.contains(rule)).cloned().collect::<Vec<_>>());
                }
            }
            index.cluster_roles.insert(name, Arc::new(rules));
        }
        index
    }

    /// Calls `visit` with each rule that applies to the user in the namespace (empty: cluster scope only), and the
    /// binding that brings it, until it returns true.
    fn visit(&self, user: &User, namespace: &str, mut visit: impl FnMut(&Rule, &Binding, &str) -> bool) -> bool {
        for binding in &self.cluster_bindings {
            if binding.subjects.iter().any(|subject| subject.is(user, ""))
                && let Some(rules) = self.cluster_roles.get(&binding.role.name)
                && rules.iter().any(|rule| visit(rule, binding, ""))
            {
                return true;
            }
        }
        if namespace.is_empty() {
            return false;
        }
        for binding in self.bindings.get(namespace).into_iter().flatten() {
            if !binding.subjects.iter().any(|subject| subject.is(user, namespace)) {
                continue;
            }
            let rules = match binding.role.kind.as_str() {
                "ClusterRole" => self.cluster_roles.get(&binding.role.name),
                _ => self.roles.get(&(namespace.to_owned(), binding.role.name.clone())),
            };
            if rules.is_some_and(|rules| rules.iter().any(|rule| visit(rule, binding, namespace))) {
                return true;
            }
        }
        false
    }

    /// Why the user may do this; none: not allowed.
    pub(crate) fn allowed(&self, user: &User, action: &Action<'_>) -> Option<String> {
        if user.is_master() {
            return Some(String::new());
        }
        let mut why = String::new();
        self.visit(user, action.namespace, |rule, binding, namespace| {
            if !rule.allows(action) {
                return false;
            }
            let (kind, of) = match namespace {
                "" => ("ClusterRoleBinding", binding.name.clone()),
                namespace => ("RoleBinding", format!("{}/{namespace}", binding.name)),
            };
            why = format!(
                "RBAC: allowed by {kind} {of:?} of {} {:?} to {}",
                binding.role.kind, binding.role.name, user.name
            );
            true
        })
        .then_some(why)
    }

    /// All rules that apply to the user in the namespace.
    pub(crate) fn rules(&self, user: &User, namespace: &str) -> Vec<Rule> {
        let mut rules: Vec<Rule> = Vec::new();
        if user.is_master() {
            let all = || vec!["*".to_owned()];
            rules.push(Rule { verbs: all(), api_groups: all(), resources: all(), ..Rule::default() });
            rules.push(Rule { verbs: all(), non_resource_urls: all(), ..Rule::default() });
        }
        self.visit(user, namespace, |rule, _, _| {
            if !rules.contains(rule) {
                rules.push(rule.clone());
            }
            false
        });
        rules
    }
}

/// Whether a LabelSelector with `matchLabels` (all that aggregation uses) selects these labels.
fn selects(selector: &Value, labels: &Value) -> bool {
    let wanted = selector.get("matchLabels").and_then(Value::as_object);
    wanted.is_some_and(|wanted| !wanted.is_empty() && wanted.iter().all(|(key, value)| labels.get(key) == Some(value)))
}

/// The index, rebuilt when a role or binding changed.
#[derive(Debug)]
pub(crate) struct Rbac {
    store: Store,
    state: Mutex<(Option<Watch>, Arc<Index>)>,
}

impl Rbac {
    pub(crate) fn new(store: Store) -> Self {
        Self { store, state: Mutex::new((None, Arc::default())) }
    }

    /// The rules as they stand now.
    pub(crate) fn index(&self) -> Arc<Index> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let fresh = match &mut state.0 {
            None => false,
            Some(watch) => !watch.has_changed() || watch.poll().is_ok_and(|batch| batch.events.is_empty()),
        };
        if !fresh {
            // The watch begins before the list, so a change in between is seen as one more change.
            state.0 = self.store.watch(PREFIX, self.store.revision()).ok();
            state.1 = Arc::new(Index::build(&self.store));
        }
        state.1.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    async fn store(objects: &[Value]) -> Store {
        let store = Store::memory().unwrap();
        for object in objects {
            let plural = format!("{}s", object["kind"].as_str().unwrap().to_lowercase());
            let namespace = object["metadata"]["namespace"].as_str().map(|ns| format!("{ns}/")).unwrap_or_default();
            let name = object["metadata"]["name"].as_str().unwrap();
            let value = object.to_string();
            let key = format!("{PREFIX}{plural}/{namespace}{name}");
            store.create(&key, Box::new(move |_| value.into())).await.unwrap();
        }
        store
    }

    fn action<'a>(verb: &'a str, resource: &'a str, namespace: &'a str, name: &'a str) -> Action<'a> {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        Action { verb, resource, subresource, namespace, name, ..Action::default() }
    }

    #[tokio::test]
    async fn rules_bindings_and_aggregation() {
        let store = store(&[
            json!({"kind": "ClusterRole", "metadata": {"name": "view"},
                "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"to-view": "true"}}]}, "rules": []}),
            json!({"kind": "ClusterRole", "metadata": {"name": "v1", "labels": {"to-view": "true"}},
                "rules": [{"apiGroups": [""], "resources": ["pods", "pods/log"], "verbs": ["get", "list"]}]}),
            json!({"kind": "Role", "metadata": {"name": "one", "namespace": "a"},
                "rules": [{"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["x"], "verbs": ["*"]}]}),
            json!({"kind": "ClusterRoleBinding", "metadata": {"name": "b"},
                "subjects": [{"kind": "Group", "name": "viewers"}], "roleRef": {"kind": "ClusterRole", "name": "view"}}),
            json!({"kind": "RoleBinding", "metadata": {"name": "b", "namespace": "a"},
                "subjects": [{"kind": "ServiceAccount", "name": "sa"}], "roleRef": {"kind": "Role", "name": "one"}}),
        ])
        .await;
        let rbac = Rbac::new(store.clone());
        let index = rbac.index();
        let viewer = User::new("v", &["viewers"]);
        assert!(index.allowed(&viewer, &action("get", "pods", "a", "p")).is_some());
        assert!(index.allowed(&viewer, &action("get", "pods/log", "", "p")).is_some());
        assert!(index.allowed(&viewer, &action("get", "pods/exec", "a", "p")).is_none());
        assert!(index.allowed(&viewer, &action("delete", "pods", "a", "p")).is_none());
        let account = User::new("system:serviceaccount:a:sa", &[]);
        assert!(index.allowed(&account, &action("delete", "secrets", "a", "x")).is_some());
        assert!(index.allowed(&account, &action("delete", "secrets", "a", "y")).is_none());
        assert!(index.allowed(&account, &action("delete", "secrets", "b", "x")).is_none());
        assert!(index.allowed(&User::system(), &action("delete", "secrets", "b", "x")).is_some());

        store.delete(&format!("{PREFIX}clusterrolebindings/b"), None).await.unwrap();
        assert!(rbac.index().allowed(&viewer, &action("get", "pods", "a", "p")).is_none());
    }

    #[test]
    fn paths_match_with_a_star() {
        let rule = Rule {
            verbs: vec!["get".into()],
            non_resource_urls: vec!["/healthz".into(), "/api/*".into()],
            ..Rule::default()
        };
        let path = |path| rule.allows(&Action { verb: "get", path, ..Action::default() });
        assert!(path("/healthz") && path("/api/v1") && !path("/healthz/x") && !path("/metrics"));
    }
}
