//! Who may do what: the rules of each component's account, and KubeVirt's roles for users.
//!
//! One table for both: `godwit manifests` prints it, and the embedded API server gives its own components exactly this, so that
//! a right that is missing is missed by every end-to-end test.

mod components;
mod users;

pub use components::{API, CONTROLLER, HANDLER, MAINTAINER, PLANNER, components, engine_room, maintainer, planner};
pub use users::user_roles;

use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde_json::{Value, json};

const GROUP: &str = "rbac.authorization.k8s.io";

/// Where rules hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// In all namespaces, and for what is in none.
    Cluster,
    /// In the namespace of the installation.
    Own,
    /// In this namespace, which is made with them.
    In(&'static str),
    /// Those of a Role of another namespace that somebody else has made.
    Borrowed {
        /// The namespace.
        namespace: &'static str,
        /// The Role in it.
        role: &'static str,
    },
}

/// Rules, and where they hold. Those of a borrowed role are not said here.
#[derive(Clone, Debug, PartialEq)]
pub struct Grant {
    /// Where.
    pub scope: Scope,
    /// What.
    pub rules: Vec<PolicyRule>,
}

/// An account in the installation's namespace, and what it may do.
#[derive(Clone, Debug, PartialEq)]
pub struct Account {
    /// The service account's name.
    pub name: &'static str,
    /// The name of its roles and bindings; differs from the account's where it has several.
    pub role: &'static str,
    /// What it may do.
    pub grants: Vec<Grant>,
}

/// One thing that somebody wants to do with objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Right<'a> {
    /// `get`, `patch` …
    pub verb: &'a str,
    /// The API group, empty for the core group.
    pub group: &'a str,
    /// The plural.
    pub resource: &'a str,
    /// The subresource, mostly empty.
    pub subresource: &'a str,
    /// The namespace, empty for all or where there is none.
    pub namespace: &'a str,
}

impl Account {
    /// Whether the account may do this to objects of any name, where `namespace` is the installation's.
    pub fn may(&self, right: &Right<'_>, namespace: &str) -> bool {
        let here = |scope| match scope {
            Scope::Cluster => true,
            Scope::Own => right.namespace == namespace,
            Scope::In(given) => right.namespace == given,
            Scope::Borrowed { .. } => false,
        };
        let rules = self.grants.iter().filter(|grant| here(grant.scope)).flat_map(|grant| &grant.rules);
        let has = |list: &Option<Vec<String>>, one: &str| list.iter().flatten().any(|other| other == one);
        let resource = match right.subresource {
            "" => right.resource.to_owned(),
            subresource => format!("{}/{subresource}", right.resource),
        };
        rules.filter(|rule| rule.resource_names.is_none()).any(|rule| {
            rule.verbs.iter().any(|verb| verb == right.verb)
                && has(&rule.api_groups, right.group)
                && has(&rule.resources, &resource)
        })
    }

    /// The roles and bindings that say so, with the account in `namespace`, after namespaces of theirs that may not be there.
    pub fn objects(&self, namespace: &str) -> Vec<Value> {
        let namespaces = self.grants.iter().filter_map(|grant| match grant.scope {
            Scope::In(name) => Some(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})),
            _ => None,
        });
        let bound = |grant| role(self.role, grant, namespace).into_iter().chain([self.binding(grant, namespace)]);
        namespaces.chain(self.grants.iter().flat_map(bound)).collect()
    }

    fn binding(&self, grant: &Grant, namespace: &str) -> Value {
        let subjects = Some(vec![Subject {
            kind: "ServiceAccount".to_owned(),
            name: self.name.to_owned(),
            namespace: Some(namespace.to_owned()),
            api_group: None,
        }]);
        let role_ref = |kind: &str, name: &str| RoleRef {
            api_group: GROUP.to_owned(),
            kind: kind.to_owned(),
            name: name.to_owned(),
        };
        let metadata = metadata(self.role, grant.scope, namespace);
        match grant.scope {
            Scope::Cluster => {
                value(&ClusterRoleBinding { metadata, role_ref: role_ref("ClusterRole", self.role), subjects })
            }
            Scope::Own | Scope::In(_) => {
                value(&RoleBinding { metadata, role_ref: role_ref("Role", self.role), subjects })
            }
            Scope::Borrowed { role, .. } => {
                value(&RoleBinding { metadata, role_ref: role_ref("Role", role), subjects })
            }
        }
    }
}

/// The roles of this name that hold some grants, for whoever they will be bound to.
pub fn roles(name: &str, grants: &[Grant], namespace: &str) -> Vec<Value> {
    grants.iter().filter_map(|grant| role(name, grant, namespace)).collect()
}

fn role(name: &str, grant: &Grant, namespace: &str) -> Option<Value> {
    let metadata = metadata(name, grant.scope, namespace);
    let rules = Some(grant.rules.clone());
    match grant.scope {
        Scope::Cluster => Some(value(&ClusterRole { metadata, rules, aggregation_rule: None })),
        Scope::Own | Scope::In(_) => Some(value(&Role { metadata, rules })),
        Scope::Borrowed { .. } => None,
    }
}

fn metadata(name: &str, scope: Scope, own: &str) -> ObjectMeta {
    let namespace = match scope {
        Scope::Cluster => None,
        Scope::Own => Some(own.to_owned()),
        Scope::In(namespace) | Scope::Borrowed { namespace, .. } => Some(namespace.to_owned()),
    };
    ObjectMeta { name: Some(name.to_owned()), namespace, ..ObjectMeta::default() }
}

fn value(object: &impl Serialize) -> Value {
    serde_json::to_value(object).unwrap_or_default()
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// A rule about resources.
fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> PolicyRule {
    PolicyRule {
        api_groups: Some(owned(groups)),
        resources: Some(owned(resources)),
        verbs: owned(verbs),
        ..PolicyRule::default()
    }
}

/// A rule about the resources of these names alone.
fn named(groups: &[&str], resources: &[&str], names: &[&str], verbs: &[&str]) -> PolicyRule {
    PolicyRule { resource_names: Some(owned(names)), ..rule(groups, resources, verbs) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_hold_where_they_are_given() {
        let right = |verb, group, resource, namespace| Right { verb, group, resource, subresource: "", namespace };
        let of = |name| components().into_iter().find(|account| account.name == name).unwrap();
        let may = |account: &Account, right| account.may(&right, "kubevirt");
        let handler = of(HANDLER);
        assert!(may(&handler, right("update", "coordination.k8s.io", "leases", "kubevirt")));
        assert!(!may(&handler, right("update", "coordination.k8s.io", "leases", "kube-node-lease")));
        assert!(may(&handler, right("patch", "kubevirt.io", "virtualmachineinstances", "any")));
        assert!(!may(&handler, right("delete", "kubevirt.io", "virtualmachineinstances", "any")));
        let controller = of(CONTROLLER);
        assert!(may(&controller, Right { subresource: "eviction", ..right("create", "", "pods", "any") }));
        assert!(!may(&controller, Right { subresource: "binding", ..right("create", "", "pods", "any") }));
        assert!(!may(&controller, right("get", "", "secrets", "kubevirt")), "the one of a name only");
        // The leases of nodes are the kubelets', those of kube-system elect leaders.
        for account in [controller, maintainer()] {
            for (namespace, writes) in [
                ("kube-node-lease", false),
                ("kube-system", false),
                ("medik8s-leases", true),
                ("node-maintenance", true),
            ] {
                for verb in ["create", "patch", "delete"] {
                    let lease = right(verb, "coordination.k8s.io", "leases", namespace);
                    assert_eq!(may(&account, lease), writes, "{} {lease:?}", account.name);
                }
                assert!(may(&account, right("watch", "coordination.k8s.io", "leases", namespace)));
            }
        }
    }

    #[test]
    fn nobody_may_do_everything() {
        for account in components().iter().chain([&engine_room()]) {
            for rule in account.grants.iter().flat_map(|grant| &grant.rules) {
                let words =
                    rule.verbs.iter().chain(rule.resources.iter().flatten()).chain(rule.api_groups.iter().flatten());
                assert!(words.clone().all(|word| word != "*"), "{} has {rule:?}", account.name);
                let escalates = ["escalate", "bind", "impersonate"];
                assert!(words.clone().all(|word| !escalates.contains(&word.as_str())), "{rule:?}");
                assert!(!rule.api_groups.iter().flatten().any(|group| group == GROUP), "{rule:?}");
            }
        }
    }

    #[test]
    fn roles_and_bindings_go_together() {
        for account in components().iter().chain([&engine_room()]) {
            let objects = account.objects("elsewhere");
            let names = |kind: &str| -> Vec<Value> {
                objects.iter().filter(|one| one["kind"] == kind).map(|one| one["metadata"].clone()).collect()
            };
            for binding in objects.iter().filter(|one| one["kind"].as_str().unwrap().ends_with("Binding")) {
                assert_eq!(binding["subjects"][0]["namespace"], "elsewhere", "{binding}");
                assert_eq!(binding["subjects"][0]["name"], account.name, "{binding}");
                let role = binding["roleRef"]["kind"].as_str().unwrap();
                let borrowed = binding["metadata"]["namespace"] == "kube-system";
                let made = names(role).iter().any(|one| one["name"] == binding["roleRef"]["name"]);
                assert!(made || borrowed, "{binding}");
            }
        }
    }
}
