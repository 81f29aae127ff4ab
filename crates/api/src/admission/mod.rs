//! Admission: what becomes of an object on its way in, and whether it may come in.
//!
//! These are KubeVirt's webhooks as functions on values (`reference/kubevirt-contract.md`, section 2). The embedded API server
//! calls them directly; a webhook server in a cluster would call them with the same request. Texts that clients compare are
//! KubeVirt's, the webhooks' names included.

mod clock;
pub mod eviction;
mod kubevirt;
mod maintenance;
mod migration;
mod policy;
pub mod routes;
pub(crate) mod spec;
mod vm;
mod vmi;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::Installation;
use crate::gates::Gates;
use crate::kubevirt::{KubeVirt, KubeVirtConfiguration};
use crate::maintenance::{GROUP_KUBEVIRT, GROUP_MEDIK8S, GROUPS};
use crate::names::{CONFIG_MAP_NAME, EXTRA_NODE_NAME, GROUP, GROUP_MIGRATIONS, KUBEVIRT_NAME};

/// What is being done to the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It is being made.
    Create,
    /// It is being changed.
    Update,
    /// It is being deleted.
    Delete,
}

/// Who does it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// The user's name.
    pub name: String,
    /// The user's groups.
    pub groups: Vec<String>,
    /// What else authentication said.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// The node of the pod whose service account this is, when authentication said it.
    pub fn node(&self) -> Option<&str> {
        self.extra.get(EXTRA_NODE_NAME)?.first().map(String::as_str).filter(|node| !node.is_empty())
    }
}

/// Other objects, as they are now.
pub trait Lookup {
    /// Where godwit is installed.
    fn installation(&self) -> &Installation;
    /// One object of a kind that [`resource_of`] knows, or none; without a namespace where the kind has none.
    fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value>;
    /// The objects of a kind in a namespace (all namespaces when empty) that carry the label, or all without one.
    fn list(&self, kind: &str, namespace: &str, label: Option<(&str, &str)>) -> Vec<Value>;

    /// All objects of a kind, for what is only worth a warning: there are none, too, while they cannot be read.
    fn list_to_warn(&self, kind: &str) -> Vec<Value> {
        self.list(kind, "", None)
    }

    /// The installation's KubeVirt object.
    fn kubevirt(&self) -> Option<Value> {
        self.get("KubeVirt", self.installation().namespace(), KUBEVIRT_NAME)
    }

    /// The installation's ConfigMap with its configuration in the old form.
    fn config_map(&self) -> Option<Value> {
        self.get("ConfigMap", self.installation().namespace(), CONFIG_MAP_NAME)
    }
}

/// Group, version and plural of a kind that the rules look up. A kind that several groups have is named with its group:
/// `NodeMaintenance.nodemaintenance.medik8s.io`.
pub fn resource_of(kind: &str) -> (&'static str, &'static str, String) {
    let (kind, group) = kind.split_once('.').map_or((kind, None), |(kind, group)| (kind, Some(group)));
    let (group, version) = match (kind, group) {
        ("ConfigMap" | "Pod" | "Node", _) => ("", "v1"),
        ("Lease", _) => ("coordination.k8s.io", "v1"),
        ("PodDisruptionBudget", _) => ("policy", "v1"),
        ("ClusterVersion", _) => ("config.openshift.io", "v1"),
        (_, Some(group)) => GROUPS.into_iter().find(|(known, _)| *known == group).unwrap_or((GROUP, "v1")),
        _ => (GROUP, "v1"),
    };
    (group, version, format!("{}s", kind.to_lowercase()))
}

/// A [`Lookup`] that finds nothing.
pub struct Nothing;

impl Lookup for Nothing {
    fn installation(&self) -> &Installation {
        &Installation::USUAL
    }

    fn get(&self, _: &str, _: &str, _: &str) -> Option<Value> {
        None
    }

    fn list(&self, _: &str, _: &str, _: Option<(&str, &str)>) -> Vec<Value> {
        Vec::new()
    }
}

/// One request. `object` is missing on deletion, `old_object` on creation.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// What is being done.
    pub operation: Operation,
    /// The API group.
    pub group: &'a str,
    /// The version of the request.
    pub version: &'a str,
    /// The kind.
    pub kind: &'a str,
    /// The plural.
    pub resource: &'a str,
    /// The subresource, empty for the object itself.
    pub subresource: &'a str,
    /// The namespace.
    pub namespace: &'a str,
    /// The name, empty while `generateName` has not been resolved.
    pub name: &'a str,
    /// The object as it shall be.
    pub object: Option<&'a Value>,
    /// The object as it is.
    pub old_object: Option<&'a Value>,
    /// Who asks.
    pub user: &'a User,
    /// Nothing will be written.
    pub dry_run: bool,
    /// Other objects.
    pub lookup: &'a dyn Lookup,
}

impl Request<'_> {
    /// Whether one of godwit's own accounts asks: they may write a VMI's status.
    pub fn is_own(&self) -> bool {
        self.lookup.installation().has_user(&self.user.name)
    }

    /// Whether this account of godwit's own asks.
    fn is_of(&self, account: &str) -> bool {
        self.lookup.installation().is_user(&self.user.name, account)
    }
}

/// What a mutation makes of the object.
#[derive(Clone, Debug, PartialEq)]
pub struct Mutation {
    /// The object to go on with; null on deletion.
    pub object: Value,
    /// Texts for `Warning:` headers.
    pub warnings: Vec<String>,
}

/// A refusal, with what a Kubernetes Status needs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Denial {
    /// The webhook that refuses, as KubeVirt names it.
    pub webhook: String,
    /// The HTTP status.
    pub code: u16,
    /// The Status reason: `BadRequest`, `Invalid` or `Forbidden`.
    pub reason: String,
    /// The complete message, beginning with `admission webhook "…" denied the request: `.
    pub message: String,
    /// What is wrong, field by field; empty for a plain refusal.
    pub causes: Vec<Cause>,
    /// Texts for `Warning:` headers.
    pub warnings: Vec<String>,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The Status cause's reason, as `FieldValueInvalid`.
    pub reason: String,
    /// The sentence.
    pub message: String,
    /// The field's path.
    pub field: String,
}

impl Cause {
    /// A value that cannot be.
    pub(crate) fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: "FieldValueInvalid".to_owned(), message: message.into(), field: field.into() }
    }

    /// A value that is missing.
    pub(crate) fn required(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: "FieldValueRequired".to_owned(), message: message.into(), field: field.into() }
    }

    /// A value that appears twice.
    pub(crate) fn duplicate(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: "FieldValueDuplicate".to_owned(), message: message.into(), field: field.into() }
    }

    /// A value that is not supported.
    pub(crate) fn unsupported(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: "FieldValueNotSupported".to_owned(), message: message.into(), field: field.into() }
    }
}

impl Denial {
    /// KubeVirt's plain refusal: 400.
    fn plain(webhook: &str, message: impl AsRef<str>) -> Self {
        Self {
            webhook: webhook.to_owned(),
            code: 400,
            reason: "BadRequest".to_owned(),
            message: format!("admission webhook \"{webhook}\" denied the request: {}", message.as_ref()),
            causes: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// The refusal of a webhook that only says no: 403.
    fn forbidden(webhook: &str, message: impl AsRef<str>) -> Self {
        Self { code: 403, reason: "Forbidden".to_owned(), ..Self::plain(webhook, message) }
    }

    /// The message without the webhook's name before it: what a webhook answers, for the API server puts the name there.
    pub fn text(&self) -> &str {
        let prefix = format!("admission webhook \"{}\" denied the request: ", self.webhook);
        self.message.strip_prefix(&prefix).unwrap_or(&self.message)
    }

    /// KubeVirt's refusal with causes: 422. The message is that of all causes.
    fn causes(webhook: &str, causes: Vec<Cause>) -> Self {
        let messages: Vec<&str> = causes.iter().map(|cause| cause.message.as_str()).collect();
        let message = format!("admission webhook \"{webhook}\" denied the request: {}", messages.join(", "));
        Self {
            webhook: webhook.to_owned(),
            code: 422,
            reason: "Invalid".to_owned(),
            message,
            causes,
            warnings: Vec::new(),
        }
    }
}

/// The result of a validation: warnings or a refusal.
pub type Verdict = Result<Vec<String>, Box<Denial>>;

/// Changes the object on its way in: defaults, finalizers, labels. Kinds that godwit does not know pass unchanged.
///
/// # Errors
/// Nothing is refused here today; what is wrong is left to [`validate`], which sees it in full.
pub fn mutate(request: &Request<'_>) -> Result<Mutation, Box<Denial>> {
    let mut object = request.object.cloned().unwrap_or(Value::Null);
    if request.group == GROUP && object.is_object() {
        match (request.kind, request.subresource) {
            ("VirtualMachineInstance", "") => vmi::mutate(request, &mut object),
            ("VirtualMachineInstanceMigration", "") => migration::mutate(request, &mut object),
            ("VirtualMachine", "") => vm::mutate(request, &mut object),
            _ => {}
        }
    }
    Ok(Mutation { object, warnings: Vec::new() })
}

/// Whether there are rules for a resource of this group.
pub fn concerns(group: &str, kind: &str) -> bool {
    matches!(group, GROUP | GROUP_MIGRATIONS | GROUP_KUBEVIRT | GROUP_MEDIK8S)
        || (group.is_empty() && kind == "ConfigMap")
}

/// Says whether the object may come in. Kinds that godwit does not know may.
///
/// # Errors
/// The refusal, as KubeVirt's webhooks word it.
pub fn validate(request: &Request<'_>) -> Verdict {
    // deletion is never refused: deleting a VMIM cancels it
    if !request.subresource.is_empty() || request.operation == Operation::Delete {
        return Ok(Vec::new());
    }
    match (request.group, request.kind) {
        (GROUP, "VirtualMachineInstance") => vmi::validate(request),
        (GROUP, "VirtualMachineInstanceMigration") => migration::validate(request),
        (GROUP, "VirtualMachine") => vm::validate(request),
        (GROUP, "KubeVirt") => kubevirt::validate(request),
        (GROUP_MIGRATIONS, "MigrationPolicy") => policy::validate(request),
        (GROUP | GROUP_KUBEVIRT | GROUP_MEDIK8S, "NodeMaintenance") => maintenance::validate(request),
        ("", "ConfigMap")
            if (request.namespace, request.name) == (request.lookup.installation().namespace(), CONFIG_MAP_NAME) =>
        {
            kubevirt::config_map(request)
        }
        _ => Ok(Vec::new()),
    }
}

/// What the installation says.
struct Configured {
    configuration: Option<KubeVirtConfiguration>,
    gates: Gates,
}

fn configured(request: &Request<'_>) -> Configured {
    let kubevirt = request.lookup.kubevirt();
    let kubevirt = kubevirt.and_then(|object| serde_json::from_value::<KubeVirt>(object).ok());
    let map = request.lookup.config_map();
    let data = map.and_then(|map| serde_json::from_value(map.get("data")?.clone()).ok());
    let gates = Gates::of(kubevirt.as_ref(), data.as_ref());
    let configuration = kubevirt.map(|kubevirt| {
        let cpu_model = kubevirt.default_cpu_model().map(str::to_owned);
        KubeVirtConfiguration { cpu_model, ..kubevirt.spec.configuration }
    });
    Configured { configuration, gates }
}

/// Reads the object as its type; a failure names the place.
fn read<T: serde::de::DeserializeOwned>(webhook: &str, object: &Value) -> Result<T, Box<Denial>> {
    serde_json::from_value(object.clone())
        .map_err(|error| Box::new(Denial::plain(webhook, format!("the object cannot be read: {error}"))))
}

/// A member of an object as an object, made where it is missing; none where something else is in its place.
pub(crate) fn object_at<'a>(value: &'a mut Value, key: &str) -> Option<&'a mut Value> {
    let entry = value.as_object_mut()?.entry(key).or_insert(Value::Null);
    if entry.is_null() {
        *entry = Value::Object(serde_json::Map::new());
    }
    entry.is_object().then_some(entry)
}

/// Sets a member where it is missing, null or an empty string.
fn set_default(value: &mut Value, key: &str, default: Value) {
    if let Some(object) = value.as_object_mut() {
        let unset = object.get(key).is_none_or(|old| old.is_null() || old == "");
        if unset {
            object.insert(key.to_owned(), default);
        }
    }
}

/// Adds a finalizer where it is missing.
fn add_finalizer(object: &mut Value, finalizer: &str) {
    let Some(metadata) = object_at(object, "metadata").and_then(Value::as_object_mut) else { return };
    let list = metadata.entry("finalizers").or_insert(Value::Null);
    if list.is_null() {
        *list = Value::Array(Vec::new());
    }
    if let Some(list) = list.as_array_mut()
        && !list.iter().any(|one| one == finalizer)
    {
        list.push(Value::from(finalizer));
    }
}

/// A label's value.
fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object.get("metadata")?.get("labels")?.get(key)?.as_str()
}

#[cfg(test)]
mod table_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
