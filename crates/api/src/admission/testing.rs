//! A small world for the tests.

use serde_json::{Value, json};

use crate::Installation;

use super::{Denial, Lookup, Operation, Request, User, mutate, validate};

pub(crate) struct World {
    pub objects: Vec<Value>,
    pub installation: Installation,
    pub user: User,
}

/// Whether an object is of a kind as lookups name it.
fn is(object: &Value, kind: &str) -> bool {
    let (kind, group) = kind.split_once('.').map_or((kind, None), |(kind, group)| (kind, Some(group)));
    let of = object["apiVersion"].as_str().and_then(|version| version.split_once('/')).map(|(group, _)| group);
    object["kind"] == kind && (group.is_none() || group == of)
}

impl Lookup for World {
    fn installation(&self) -> &Installation {
        &self.installation
    }

    fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let found = |o: &&Value| {
            is(o, kind)
                && o["metadata"]["namespace"].as_str().unwrap_or_default() == namespace
                && o["metadata"]["name"] == name
        };
        self.objects.iter().find(found).cloned()
    }

    fn list(&self, kind: &str, namespace: &str, label: Option<(&str, &str)>) -> Vec<Value> {
        let found = |o: &&Value| {
            is(o, kind)
                && (namespace.is_empty() || o["metadata"]["namespace"] == namespace)
                && label.is_none_or(|(key, value)| o["metadata"]["labels"][key] == value)
        };
        self.objects.iter().filter(found).cloned().collect()
    }
}

impl World {
    pub fn new(objects: Vec<Value>) -> Self {
        let user = User { name: "admin".into(), groups: vec!["system:masters".into()], ..User::default() };
        Self { objects, installation: Installation::default(), user }
    }

    pub fn request<'a>(
        &'a self,
        operation: Operation,
        object: Option<&'a Value>,
        old_object: Option<&'a Value>,
    ) -> Request<'a> {
        let one = object.or(old_object).unwrap_or(&Value::Null);
        Request {
            operation,
            group: "kubevirt.io",
            version: "v1",
            kind: one["kind"].as_str().unwrap_or("VirtualMachineInstance"),
            resource: "",
            subresource: "",
            namespace: "default",
            name: one["metadata"]["name"].as_str().unwrap_or_default(),
            object,
            old_object,
            user: &self.user,
            dry_run: false,
            lookup: self,
        }
    }

    /// Mutates and validates, as the API server does.
    pub fn admit(
        &self,
        operation: Operation,
        object: &Value,
        old: Option<&Value>,
    ) -> Result<(Value, Vec<String>), Box<Denial>> {
        let mutation = mutate(&self.request(operation, Some(object), old))?;
        let warnings = validate(&self.request(operation, Some(&mutation.object), old))?;
        Ok((mutation.object, warnings))
    }

    pub fn create(&self, object: &Value) -> Result<(Value, Vec<String>), Box<Denial>> {
        self.admit(Operation::Create, object, None)
    }
}

pub(crate) fn vmi(name: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": { "name": name, "namespace": "default", "uid": format!("uid-{name}") },
        "spec": {
            "domain": {
                "memory": { "guest": "128Mi" },
                "devices": { "disks": [{ "name": "root", "disk": { "bus": "virtio" } }] },
            },
            "volumes": [{ "name": "root", "persistentVolumeClaim": { "claimName": "root" } }],
        },
        "status": { "phase": "Running" },
    })
}

pub(crate) fn vmim(name: &str, vmi: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstanceMigration",
        "metadata": { "name": name, "namespace": "default", "uid": format!("uid-{name}") },
        "spec": { "vmiName": vmi },
    })
}
