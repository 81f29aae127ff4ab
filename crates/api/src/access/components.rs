//! What each component does, right by right.

use k8s_openapi::api::rbac::v1::PolicyRule;

use super::{Account, Grant, Scope, named, rule};
use crate::admission::routes::{MUTATING, VALIDATING};
use crate::maintenance::{GROUP_KUBEVIRT, GROUP_MEDIK8S};
use crate::names::{
    API_SERVICES, CA_BUNDLE, CA_SECRET, CONFIG_MAP_NAME, GROUP, GROUP_MIGRATIONS, MAINTENANCE_LEASES_KUBEVIRT,
    MAINTENANCE_LEASES_MEDIK8S, NODE_SIGNER,
};

/// The account of `godwit api`.
pub const API: &str = "kubevirt-apiserver";
/// The account of `godwit controller`.
pub const CONTROLLER: &str = "kubevirt-controller";
/// The account of `godwit handler`.
pub const HANDLER: &str = "kubevirt-handler";
/// The account of `godwit controller --nouns=maintenance` beside another KubeVirt.
pub const MAINTAINER: &str = "godwit-maintenance";
/// The role of whoever calls `godwit plan drain`.
pub const PLANNER: &str = "godwit:plan";

const OWN_GROUP: &str = "godwit.io";
const LEASES: &str = "coordination.k8s.io";
const ANNOUNCED: &[&str] = &["admissionregistration.k8s.io"];
const CERTIFICATES: &str = "certificates.k8s.io";
const STORAGE: &str = "storage.k8s.io";
const POLICY: &str = "policy";

const GET: &[&str] = &["get"];
/// What a watch needs.
const SEE: &[&str] = &["get", "list", "watch"];
/// What a merge patch of an object that is known needs.
const PATCH: &[&str] = &["patch"];

/// The accounts of a cluster's components, with nothing that they do not use.
pub fn components() -> Vec<Account> {
    vec![api(), controller(), handler()]
}

fn account(name: &'static str, cluster: Vec<PolicyRule>, own: Vec<PolicyRule>) -> Account {
    let grants = vec![Grant { scope: Scope::Cluster, rules: cluster }, Grant { scope: Scope::Own, rules: own }];
    Account { name, role: name, grants }
}

/// Events of core, wherever the objects are that they tell of.
fn events() -> PolicyRule {
    rule(&[""], &["events"], &["create", "patch"])
}

/// Webhooks and `subresources.kubevirt.io`: reads what rules ask for, writes what virtctl asks for.
fn api() -> Account {
    let cluster = vec![
        // what the rules of admission look up
        rule(&[GROUP], &["virtualmachines", "virtualmachineinstances", "kubevirts"], &["get", "list"]),
        rule(&[GROUP], &["virtualmachineinstancemigrations"], &["get", "list"]),
        rule(&[GROUP, GROUP_KUBEVIRT, GROUP_MEDIK8S], &["nodemaintenances"], &["get", "list"]),
        rule(&[""], &["nodes", "pods"], &["get", "list"]),
        rule(&[POLICY], &["poddisruptionbudgets"], GET),
        // whether this is OpenShift, whose etcd has a quorum to be kept
        rule(&["config.openshift.io"], &["clusterversions"], GET),
        // what subresources and the marks of evictions write
        rule(&[GROUP], &["virtualmachines", "virtualmachines/status", "virtualmachineinstances"], PATCH),
        rule(&[GROUP], &["virtualmachineinstancemigrations"], &["create"]),
        // the aggregated API answers for whoever may ask
        rule(&["authorization.k8s.io"], &["subjectaccessreviews"], &["create"]),
        // its authority, which it tells those who call it
        named(ANNOUNCED, &["mutatingwebhookconfigurations"], &[MUTATING], &["get", "patch"]),
        named(ANNOUNCED, &["validatingwebhookconfigurations"], &VALIDATING, &["get", "patch"]),
        named(&["apiregistration.k8s.io"], &["apiservices"], &API_SERVICES, &["get", "patch"]),
    ];
    let own = vec![
        named(&[""], &["configmaps"], &[CONFIG_MAP_NAME], GET),
        // The authority: there is no name to an object that is still to be made.
        rule(&[""], &["secrets", "configmaps"], &["create"]),
        named(&[""], &["secrets"], &[CA_SECRET], &["get", "update"]),
        named(&[""], &["configmaps"], &[CA_BUNDLE], &["get", "patch"]),
        // the handlers' addresses
        rule(&[LEASES], &["leases"], GET),
    ];
    let mut account = account(API, cluster, own);
    // whom the API server's certificate for the aggregated API must be of
    let role = "extension-apiserver-authentication-reader";
    account.grants.push(Grant { scope: Scope::Borrowed { namespace: "kube-system", role }, rules: Vec::new() });
    account
}

/// The controllers: all of KubeVirt's objects, launchers' pods, nodes in maintenance.
fn controller() -> Account {
    let maintenance = &[GROUP, GROUP_KUBEVIRT, GROUP_MEDIK8S];
    let cluster = vec![
        rule(&[GROUP], &["virtualmachines", "kubevirts"], &["get", "list", "watch", "patch"]),
        rule(&[GROUP], &["virtualmachineinstances"], &["get", "list", "watch", "create", "patch", "delete"]),
        rule(&[GROUP], &["virtualmachineinstancemigrations"], &["get", "list", "watch", "create", "patch", "delete"]),
        rule(
            &[GROUP],
            &["virtualmachines/status", "virtualmachineinstancemigrations/status", "kubevirts/status"],
            PATCH,
        ),
        // what is made for a VM, a VMI or its pod has it as an owner whose deletion waits (OwnerReferencesPermissionEnforcement)
        rule(&[GROUP], &["virtualmachines/finalizers", "virtualmachineinstances/finalizers"], &["update"]),
        rule(&[""], &["pods/finalizers"], &["update"]),
        rule(maintenance, &["nodemaintenances"], &["get", "list", "watch", "patch"]),
        rule(maintenance, &["nodemaintenances/status"], PATCH),
        rule(&[GROUP_MIGRATIONS], &["migrationpolicies"], SEE),
        rule(&[OWN_GROUP], &["migrationrecords"], &["get", "list", "watch", "create", "delete"]),
        rule(&[""], &["pods"], &["get", "list", "watch", "create", "patch", "delete"]),
        // the readiness gate
        rule(&[""], &["pods/status"], PATCH),
        rule(&[""], &["pods/eviction"], &["create"]),
        // claims for TPMs and EFI variables
        rule(&[""], &["persistentvolumeclaims"], &["get", "list", "watch", "create", "patch", "delete"]),
        // cordon, taints and marks of a maintenance
        rule(&[""], &["nodes"], &["get", "list", "watch", "patch"]),
        rule(&[""], &["namespaces", "resourcequotas"], SEE),
        rule(&[STORAGE], &["storageclasses"], SEE),
        // those of kubelets, handlers and maintenances
        rule(&[LEASES], &["leases"], SEE),
        events(),
        // nodes' certificates
        rule(&[CERTIFICATES], &["certificatesigningrequests"], &["get", "list", "watch", "delete"]),
        rule(
            &[CERTIFICATES],
            &["certificatesigningrequests/approval", "certificatesigningrequests/status"],
            &["update"],
        ),
        named(&[CERTIFICATES], &["signers"], &[NODE_SIGNER], &["approve", "sign"]),
    ];
    let own = vec![
        named(&[""], &["secrets"], &[CA_SECRET], GET),
        // the configuration and the migrations' slots
        rule(&[""], &["configmaps"], &["get", "list", "watch", "create", "patch"]),
        // the controllers' own lease, and what handlers hold and what comes of it
        rule(&[LEASES], &["leases"], &["create", "update", "patch", "delete"]),
    ];
    with_maintenance_leases(account(CONTROLLER, cluster, own))
}

/// Maintenances hold a lease of their node, in namespaces that all maintenance operators share.
fn with_maintenance_leases(mut account: Account) -> Account {
    for namespace in [MAINTENANCE_LEASES_MEDIK8S, MAINTENANCE_LEASES_KUBEVIRT] {
        let rules = vec![rule(&[LEASES], &["leases"], &["create", "patch", "delete"])];
        account.grants.push(Grant { scope: Scope::In(namespace), rules });
    }
    account
}

/// The controller of NodeMaintenances alone, beside a KubeVirt that moves the guests: it closes nodes and evicts what is on them.
pub fn maintainer() -> Account {
    let maintenance = &[GROUP, GROUP_KUBEVIRT, GROUP_MEDIK8S];
    let cluster = vec![
        rule(maintenance, &["nodemaintenances"], &["get", "list", "watch", "patch"]),
        rule(maintenance, &["nodemaintenances/status"], PATCH),
        rule(&[GROUP], &["virtualmachines", "kubevirts"], SEE),
        // marks of evacuations that are called off
        rule(&[GROUP], &["virtualmachineinstances"], &["get", "list", "watch", "patch"]),
        // evacuations that still wait are called off with the maintenance
        rule(&[GROUP], &["virtualmachineinstancemigrations"], &["get", "list", "watch", "delete"]),
        rule(&[GROUP_MIGRATIONS], &["migrationpolicies"], SEE),
        rule(&[""], &["pods", "persistentvolumeclaims", "resourcequotas"], SEE),
        rule(&[""], &["pods/eviction"], &["create"]),
        // cordon, taints and marks
        rule(&[""], &["nodes"], &["get", "list", "watch", "patch"]),
        rule(&[""], &["namespaces"], SEE),
        rule(&[LEASES], &["leases"], SEE),
        events(),
    ];
    // its own lease
    let own = vec![rule(&[LEASES], &["leases"], &["create", "update"])];
    with_maintenance_leases(account(MAINTAINER, cluster, own))
}

/// A node's handler: the VMIs of its node, and what it has to know of their pods and claims.
fn handler() -> Account {
    let cluster = vec![
        rule(&[GROUP], &["virtualmachineinstances"], &["get", "list", "watch", "patch"]),
        rule(&[""], &["pods"], SEE),
        rule(&[""], &["persistentvolumeclaims"], GET),
        // heartbeat and labels of its node
        rule(&[""], &["nodes"], &["get", "patch"]),
        events(),
        // its node's certificate
        rule(&[CERTIFICATES], &["certificatesigningrequests"], &["create", "get"]),
    ];
    let own = vec![
        // its node's lease, and the addresses of the other nodes
        rule(&[LEASES], &["leases"], &["get", "list", "create", "update"]),
        named(&[""], &["configmaps"], &[CA_BUNDLE], GET),
    ];
    account(HANDLER, cluster, own)
}

/// What the controllers need besides where they do Kubernetes' own work too, because nobody else is there: placing pods,
/// volumes, nodes that are silent, garbage, budgets.
pub fn engine_room() -> Account {
    // what garbage may be, and what may own it, beyond what the controllers write anyway
    let collect = &["delete", "patch"];
    let cluster = vec![
        rule(&[GROUP], &["virtualmachines", "kubevirts", "nodemaintenances"], collect),
        rule(&[GROUP_KUBEVIRT, GROUP_MEDIK8S], &["nodemaintenances"], collect),
        rule(&[GROUP_MIGRATIONS], &["migrationpolicies"], collect),
        rule(&[OWN_GROUP], &["migrationrecords"], collect),
        rule(&["k8s.cni.cncf.io"], &["network-attachment-definitions"], &["get", "delete", "patch"]),
        rule(&[""], &["nodes", "namespaces", "resourcequotas"], collect),
        // beside a bare server nobody has applied the manifests
        rule(&[""], &["namespaces"], &["create"]),
        rule(&[LEASES], &["leases"], &["create", "delete", "patch"]),
        rule(&[""], &["configmaps"], &["get", "delete", "patch"]),
        rule(&[STORAGE], &["storageclasses"], collect),
        rule(&[POLICY], &["poddisruptionbudgets"], &["get", "list", "watch", "delete", "patch"]),
        rule(&[POLICY], &["poddisruptionbudgets/status"], PATCH),
        rule(&[""], &["pods/binding"], &["create"]),
        rule(&[""], &["nodes/status", "persistentvolumeclaims/status", "persistentvolumes/status"], PATCH),
        rule(&[""], &["persistentvolumes"], &["get", "list", "watch", "create", "patch", "delete"]),
    ];
    let grants = vec![Grant { scope: Scope::Cluster, rules: cluster }];
    Account { name: CONTROLLER, role: "godwit:engine-room", grants }
}

/// What `godwit plan drain` reads.
pub fn planner() -> Vec<Grant> {
    let list = &["list"];
    let cluster = vec![
        rule(
            &[GROUP],
            &[
                "virtualmachines",
                "virtualmachineinstances",
                "virtualmachineinstancemigrations",
                "kubevirts",
                "nodemaintenances",
            ],
            list,
        ),
        rule(&[GROUP_KUBEVIRT, GROUP_MEDIK8S], &["nodemaintenances"], list),
        rule(&[GROUP_MIGRATIONS], &["migrationpolicies"], list),
        rule(&[OWN_GROUP], &["migrationrecords"], list),
        rule(
            &[""],
            &["pods", "nodes", "persistentvolumeclaims", "persistentvolumes", "namespaces", "resourcequotas"],
            list,
        ),
        rule(&[STORAGE], &["storageclasses"], list),
        rule(&[POLICY], &["poddisruptionbudgets"], list),
    ];
    let own = vec![rule(&[""], &["configmaps"], list)];
    vec![Grant { scope: Scope::Cluster, rules: cluster }, Grant { scope: Scope::Own, rules: own }]
}
