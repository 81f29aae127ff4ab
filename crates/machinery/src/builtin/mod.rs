//! The built-in kinds that are served, with Kubernetes' names, short names, scopes and schemas.

mod convert;
mod defaults;
mod merge;
mod rules;

pub use defaults::{initial_status, qos_class, set_defaults};
pub use rules::validate;

use crate::resource::{Columns, GroupVersion, Resource};
use crate::schema::Schema;
use convert::Definitions;
use k8s_openapi::api::{
    admissionregistration::v1 as admissionregistration, apps::v1 as apps, authentication::v1 as authentication,
    authorization::v1 as authorization, coordination::v1 as coordination, core::v1 as core, events::v1 as events,
    policy::v1 as policy, rbac::v1 as rbac, scheduling::v1 as scheduling, storage::v1 as storage,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1 as apiregistration;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

/// Everything known about built-in kinds, made once.
struct Table {
    resources: Vec<Resource>,
    definitions: BTreeMap<String, Arc<Schema>>,
}

static TABLE: LazyLock<Table> = LazyLock::new(build);

/// Every built-in resource, in the order in which discovery lists them.
pub fn resources() -> Vec<Resource> {
    TABLE.resources.clone()
}

/// A shared definition by its full name, such as `io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta`.
pub fn definition(name: &str) -> Option<Arc<Schema>> {
    TABLE.definitions.get(name).cloned()
}

/// Schema of `metadata`, the same for every kind.
pub fn object_meta() -> Arc<Schema> {
    definition("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta").unwrap_or_default()
}

/// Schema of a request body that is no resource of its own: `Binding`, `Eviction`, `TokenRequest`, `DeleteOptions`, `Scale` …
pub fn body(group: &str, version: &str, kind: &str) -> Option<Arc<Schema>> {
    let group = match group {
        "" => "core",
        other => other.split('.').next().unwrap_or(other),
    };
    [format!("io.k8s.api.{group}.{version}.{kind}"), format!("io.k8s.apimachinery.pkg.apis.meta.{version}.{kind}")]
        .iter()
        .find_map(|name| definition(name))
}

const NAMESPACED: bool = true;
const CLUSTER: bool = false;

struct Builder {
    definitions: Definitions,
    rows: Vec<(Resource, String)>,
}

impl Builder {
    fn add<K>(&mut self, plural: &str, namespaced: bool, short_names: &[&str]) -> &mut Resource
    where
        K: k8s_openapi::Resource + schemars::JsonSchema,
    {
        let definition = self.definitions.add::<K>();
        let strings = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let resource = Resource {
            gv: GroupVersion { group: K::GROUP.to_owned(), version: K::VERSION.to_owned() },
            kind: K::KIND.to_owned(),
            list_kind: format!("{}List", K::KIND),
            plural: plural.to_owned(),
            singular: K::KIND.to_ascii_lowercase(),
            short_names: strings(short_names),
            categories: Vec::new(),
            namespaced,
            status_subresource: false,
            subresources: Vec::new(),
            schema: Arc::default(),
            columns: Columns::Builtin,
            deprecation_warning: None,
            builtin: true,
            virtual_create_only: false,
            actions_only: false,
            gettable: Vec::new(),
            storage: true,
        };
        let at = self.rows.len();
        self.rows.push((resource, definition));
        &mut self.rows[at].0
    }

    fn review<K>(&mut self, plural: &str, namespaced: bool)
    where
        K: k8s_openapi::Resource + schemars::JsonSchema,
    {
        self.add::<K>(plural, namespaced, &[]).virtual_create_only = true;
    }
}

fn build() -> Table {
    let mut b = Builder { definitions: Definitions::new(), rows: Vec::new() };
    let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();

    b.add::<core::ConfigMap>("configmaps", NAMESPACED, &["cm"]);
    b.add::<core::Event>("events", NAMESPACED, &["ev"]);
    let namespace = b.add::<core::Namespace>("namespaces", CLUSTER, &["ns"]);
    namespace.status_subresource = true;
    namespace.subresources = names(&["finalize"]);
    b.add::<core::Node>("nodes", CLUSTER, &["no"]).status_subresource = true;
    b.add::<core::PersistentVolumeClaim>("persistentvolumeclaims", NAMESPACED, &["pvc"]).status_subresource = true;
    b.add::<core::PersistentVolume>("persistentvolumes", CLUSTER, &["pv"]).status_subresource = true;
    let pod = b.add::<core::Pod>("pods", NAMESPACED, &["po"]);
    pod.status_subresource = true;
    pod.subresources = names(&["binding", "eviction", "log"]);
    pod.categories = names(&["all"]);
    b.add::<core::ResourceQuota>("resourcequotas", NAMESPACED, &["quota"]).status_subresource = true;
    b.add::<core::Secret>("secrets", NAMESPACED, &[]);
    b.add::<core::ServiceAccount>("serviceaccounts", NAMESPACED, &["sa"]);
    let service = b.add::<core::Service>("services", NAMESPACED, &["svc"]);
    service.status_subresource = true;
    service.categories = names(&["all"]);

    let deployment = b.add::<apps::Deployment>("deployments", NAMESPACED, &["deploy"]);
    deployment.status_subresource = true;
    deployment.categories = names(&["all"]);
    let daemon_set = b.add::<apps::DaemonSet>("daemonsets", NAMESPACED, &["ds"]);
    daemon_set.status_subresource = true;
    daemon_set.categories = names(&["all"]);
    b.add::<admissionregistration::MutatingWebhookConfiguration>("mutatingwebhookconfigurations", CLUSTER, &[]);
    b.add::<admissionregistration::ValidatingWebhookConfiguration>("validatingwebhookconfigurations", CLUSTER, &[]);
    b.add::<admissionregistration::ValidatingAdmissionPolicy>("validatingadmissionpolicies", CLUSTER, &[])
        .status_subresource = true;
    b.add::<admissionregistration::ValidatingAdmissionPolicyBinding>("validatingadmissionpolicybindings", CLUSTER, &[]);
    b.add::<apiregistration::APIService>("apiservices", CLUSTER, &[]).status_subresource = true;
    b.add::<apiextensions::CustomResourceDefinition>("customresourcedefinitions", CLUSTER, &["crd", "crds"])
        .status_subresource = true;
    for (resource, _) in b.rows.iter_mut().rev().take(6) {
        resource.categories = names(&["api-extensions"]);
    }
    b.review::<authentication::SelfSubjectReview>("selfsubjectreviews", CLUSTER);
    b.review::<authorization::LocalSubjectAccessReview>("localsubjectaccessreviews", NAMESPACED);
    b.review::<authorization::SelfSubjectAccessReview>("selfsubjectaccessreviews", CLUSTER);
    b.review::<authorization::SelfSubjectRulesReview>("selfsubjectrulesreviews", CLUSTER);
    b.review::<authorization::SubjectAccessReview>("subjectaccessreviews", CLUSTER);
    b.add::<coordination::Lease>("leases", NAMESPACED, &[]);
    b.add::<events::Event>("events", NAMESPACED, &["ev"]);
    b.add::<policy::PodDisruptionBudget>("poddisruptionbudgets", NAMESPACED, &["pdb"]).status_subresource = true;
    b.add::<rbac::ClusterRoleBinding>("clusterrolebindings", CLUSTER, &[]);
    b.add::<rbac::ClusterRole>("clusterroles", CLUSTER, &[]);
    b.add::<rbac::RoleBinding>("rolebindings", NAMESPACED, &[]);
    b.add::<rbac::Role>("roles", NAMESPACED, &[]);
    b.add::<scheduling::PriorityClass>("priorityclasses", CLUSTER, &["pc"]);
    b.add::<storage::StorageClass>("storageclasses", CLUSTER, &["sc"]);

    // Bodies that are no resources of their own. TokenRequest and TokenReview are not served: who calls is known by
    // certificate only.
    b.definitions.add::<core::Binding>();
    b.definitions.add::<policy::Eviction>();
    b.definitions.add::<authentication::TokenRequest>();
    b.definitions.add::<meta::DeleteOptions>();
    b.definitions.add::<meta::Status>();
    b.definitions.add::<meta::ListMeta>();

    let definitions = b.definitions.resolve();
    let resources = b
        .rows
        .into_iter()
        .map(|(mut resource, name)| {
            resource.schema = definitions.get(&name).cloned().unwrap_or_default();
            resource
        })
        .collect();
    Table { resources, definitions }
}

#[cfg(test)]
pub(crate) fn check_merge_facts() {
    merge::check(&TABLE.definitions);
}
