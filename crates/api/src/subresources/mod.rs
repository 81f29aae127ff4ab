//! KubeVirt's group `subresources.kubevirt.io`: what virtctl asks for, decided as functions on values
//! (`reference/kubevirt-contract.md`, 2.7).
//!
//! A decision says what is to be written; whoever serves the group carries it out. Codes and texts are KubeVirt's.

mod evacuation;
pub mod guest;
pub mod hotplug;
mod lifecycle;
mod node;
pub mod place;
#[cfg(test)]
mod tests;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::admission::{Cause, Lookup};
use crate::{VirtualMachine, VirtualMachineInstance};

/// The group.
pub const GROUP: &str = "subresources.kubevirt.io";
/// The versions in which it is served, the preferred one first.
pub const VERSIONS: [&str; 2] = ["v1", "v1alpha3"];
/// The plural of VMs.
pub const MACHINES: &str = "virtualmachines";
/// The plural of VMIs.
pub const INSTANCES: &str = "virtualmachineinstances";

const EVACUATE_CANCEL: &str = "evacuate/cancel";
/// The serial console, a stream.
pub const CONSOLE: &str = "console";
/// The screen (VNC), a stream.
pub const VNC: &str = "vnc";
/// The websocket subprotocol of KubeVirt's streams: the bytes as they are, in binary messages.
pub const PLAIN: &str = "plain.kubevirt.io";
/// What can be asked of a VM.
const OF_MACHINES: &[&str] = &["start", "stop", "restart", "migrate", hotplug::ADD, hotplug::REMOVE, EVACUATE_CANCEL];
/// What can be asked of a VMI.
const OF_INSTANCES: &[&str] = &[
    "pause",
    "unpause",
    "reset",
    "softreboot",
    "guestosinfo",
    "userlist",
    "filesystemlist",
    CONSOLE,
    VNC,
    hotplug::ADD,
    hotplug::REMOVE,
    EVACUATE_CANCEL,
];
/// Those that are asked with GET.
const READ: &[&str] = &["guestosinfo", "userlist", "filesystemlist", CONSOLE, VNC];
/// What KubeVirt serves besides, and godwit does not.
const NOT_OF_MACHINES: &[&str] = &["memorydump", "removememorydump", "expand-spec", "objectgraph", "portforward"];
const NOT_OF_INSTANCES: &[&str] = &[
    "freeze",
    "unfreeze",
    "backup",
    "redefine-checkpoint",
    "usbredir",
    "vsock",
    "portforward",
    "vnc/screenshot",
    "objectgraph",
    "sev/fetchcertchain",
    "sev/querylaunchmeasurement",
    "sev/setupsession",
    "sev/injectlaunchsecret",
];
/// Paths of KubeVirt's that are about no object, and that godwit does not serve.
const NOT_ROOTS: &[&str] =
    &["guestfs", "expand-vm-spec", "start-cluster-profiler", "stop-cluster-profiler", "dump-cluster-profiler"];

/// The actions that are served for a plural ([`MACHINES`] or [`INSTANCES`]).
pub fn served(resource: &str) -> &'static [&'static str] {
    match resource {
        MACHINES => OF_MACHINES,
        INSTANCES => OF_INSTANCES,
        _ => &[],
    }
}

/// Those of [`served`] that are asked with GET: they tell something, or are streams.
pub fn read(resource: &str) -> &'static [&'static str] {
    if resource == INSTANCES { READ } else { &[] }
}

/// Whether KubeVirt serves an action (or with an empty `resource` a path about no object) that godwit does not: the answer then
/// says so by name.
pub fn is_missing(resource: &str, action: &str) -> bool {
    let list = match resource {
        MACHINES => NOT_OF_MACHINES,
        INSTANCES => NOT_OF_INSTANCES,
        "" => NOT_ROOTS,
        _ => &[],
    };
    list.contains(&action)
}

/// The sentence for what [`is_missing`].
pub fn missing(resource: &str, action: &str) -> String {
    let at = if resource.is_empty() { String::new() } else { format!("{resource}/") };
    format!("{at}{action} of {GROUP} is not implemented by godwit (docs/virtctl.md tells what is)")
}

/// What is answered to a path of the group that is about no object: `version` (what `virtctl version` shows, and every command
/// compares with its own) and `healthz`. `kubernetes` is the server's own version, `configuration` the KubeVirt object.
pub fn root(path: &str, kubernetes: &Value, configuration: Option<&Value>) -> Option<Value> {
    match path {
        "version" => Some(json!({
            "gitVersion": concat!("v", env!("CARGO_PKG_VERSION"), "+godwit"),
            "gitCommit": "",
            "gitTreeState": "clean",
            "buildDate": "1970-01-01T00:00:00Z",
            "goVersion": "",
            "compiler": "rustc",
            "platform": kubernetes.get("platform"),
        })),
        "healthz" => Some(json!({
            "apiserver": {"connectivity": "ok", "version": kubernetes},
            "config-resource-version":
                configuration.and_then(|object| object.pointer("/metadata/resourceVersion")).unwrap_or(&json!("")),
        })),
        _ => None,
    }
}

/// Why a request is not granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 400.
    BadRequest(String),
    /// 403, about the object that was asked for.
    Forbidden(String),
    /// 404: there is none of that name. The singular of what there is not.
    NotFound(&'static str),
    /// 409, about the object that was asked for.
    Conflict(String),
    /// 422.
    Invalid(Vec<Cause>),
    /// 500, where KubeVirt answers so.
    Internal(String),
}

/// One request.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// [`MACHINES`] or [`INSTANCES`].
    pub resource: &'a str,
    /// The action, as `start` or `evacuate/cancel`.
    pub action: &'a str,
    /// The object's namespace.
    pub namespace: &'a str,
    /// The object's name.
    pub name: &'a str,
    /// What the client sent; null when that was nothing.
    pub body: &'a Value,
    /// The user who asks.
    pub user: &'a str,
    /// Other objects.
    pub lookup: &'a dyn Lookup,
}

/// What a request comes to.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Objects are changed.
    Deed(Deed),
    /// The guest's node carries it out, or knows the answer. The answer is 200.
    Errand(Errand),
}

/// Something that is for the node of the guest to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Errand {
    /// The action.
    pub action: String,
    /// The VMI's uid.
    pub vmi_uid: String,
    /// Where the guest is.
    pub place: place::Place,
    /// Everything is checked and nothing is done.
    pub dry_run: bool,
}

/// A change of objects. It is decided on objects as they are: when the first write finds its object changed it is not made, and
/// the whole is decided anew. The others follow from it, whatever has changed since; what is gone by then does not need them.
#[derive(Clone, Debug, PartialEq)]
pub struct Deed {
    /// The HTTP code of the answer.
    pub code: u16,
    /// To be written, in this order.
    pub writes: Vec<Write>,
    /// Everything is checked and nothing is written.
    pub dry_run: bool,
}

/// One write, in the namespace of the request.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// Changes an object.
    Patch(Patch),
    /// Makes an object.
    Create {
        /// The plural, in the group `kubevirt.io`.
        resource: &'static str,
        /// The object.
        object: Value,
    },
}

/// A change of an object of the group `kubevirt.io`.
#[derive(Clone, Debug, PartialEq)]
pub struct Patch {
    /// The plural.
    pub resource: &'static str,
    /// The name.
    pub name: String,
    /// It is the status that changes, of a kind that has it apart.
    pub status: bool,
    /// A merge patch that carries the `metadata.resourceVersion` that it was decided on, or the `metadata.uid` of the only
    /// object that it is for.
    pub patch: Value,
}

/// Decides what a request comes to.
///
/// # Errors
/// When the request, or the object as it is, does not allow it.
pub fn decide(request: &Request<'_>) -> Result<Decision, Refusal> {
    let deed = match (request.resource, request.action) {
        (MACHINES, "start") => lifecycle::start(request),
        (MACHINES, "stop") => lifecycle::stop(request),
        (MACHINES, "restart") => lifecycle::restart(request),
        (MACHINES, "migrate") => lifecycle::migrate(request),
        (MACHINES | INSTANCES, EVACUATE_CANCEL) => evacuation::cancel(request),
        (MACHINES | INSTANCES, hotplug::ADD | hotplug::REMOVE) => hotplug::decide(request),
        (INSTANCES, _) => return node::decide(request).map(Decision::Errand),
        (resource, action) => Err(Refusal::Internal(missing(resource, action))),
    };
    deed.map(Decision::Deed)
}

impl Request<'_> {
    /// The VM of the request's name.
    fn machine(&self) -> Result<Found<VirtualMachine>, Refusal> {
        self.find("VirtualMachine")?.ok_or(Refusal::NotFound("virtualmachine"))
    }

    /// The VMI of the request's name.
    fn instance(&self) -> Result<Found<VirtualMachineInstance>, Refusal> {
        self.maybe_instance()?.ok_or(Refusal::NotFound("virtualmachineinstance"))
    }

    fn maybe_instance(&self) -> Result<Option<Found<VirtualMachineInstance>>, Refusal> {
        self.find("VirtualMachineInstance")
    }

    fn find<T: DeserializeOwned>(&self, kind: &str) -> Result<Option<Found<T>>, Refusal> {
        let Some(object) = self.lookup.get(kind, self.namespace, self.name) else { return Ok(None) };
        let read = serde_json::from_value(object.clone())
            .map_err(|error| Refusal::Internal(format!("{kind} {}: {error}", self.name)))?;
        Ok(Some(Found { read, raw: object }))
    }

    /// The options of the request, as their type.
    fn options<T: DeserializeOwned + Default>(&self) -> Result<T, Refusal> {
        if self.body.is_null() {
            return Ok(T::default());
        }
        if !self.body.is_object() {
            return Err(bad("Can not unmarshal Request body to struct, error: it is no object"));
        }
        serde_json::from_value(self.body.clone())
            .map_err(|error| bad(format!("Can not unmarshal Request body to struct, error: {error}")))
    }
}

/// An object, as it is stored and as its type.
struct Found<T> {
    read: T,
    raw: Value,
}

impl<T> Found<T> {
    /// A change of the object that is made after another one, as long as it is this object.
    fn follow_up(&self, resource: &'static str, mut patch: Value) -> Write {
        let name = self.raw.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        patch["metadata"] = json!({ "uid": self.raw.pointer("/metadata/uid") });
        Write::Patch(Patch { resource, name: name.to_owned(), status: false, patch })
    }

    /// A change of the object as it was found.
    fn patch(&self, resource: &'static str, status: bool, mut patch: Value) -> Write {
        let name = self.raw.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        patch["metadata"] = json!({ "resourceVersion": self.raw.pointer("/metadata/resourceVersion") });
        Write::Patch(Patch { resource, name: name.to_owned(), status, patch })
    }
}

/// Whether nothing is to be written, from the `dryRun` of options.
fn dry_run(values: &[String]) -> Result<bool, Refusal> {
    match values.iter().find(|value| *value != "All") {
        None => Ok(!values.is_empty()),
        Some(odd) => Err(bad(format!("dryRun: Unsupported value: {odd:?}: supported values: \"All\""))),
    }
}

fn bad(message: impl Into<String>) -> Refusal {
    Refusal::BadRequest(message.into())
}

fn conflict(message: impl Into<String>) -> Refusal {
    Refusal::Conflict(message.into())
}
