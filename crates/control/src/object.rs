//! The objects that decisions read, and how they are named.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use godwit_api::maintenance::{kubevirt, medik8s, oldest};
use godwit_api::{
    Installation, KubeVirt, MigrationPolicy, MigrationRecord, NetworkAttachmentDefinition, VirtualMachine,
    VirtualMachineInstance, VirtualMachineInstanceMigration,
};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, PodSpec, ResourceQuota,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use smol_str::SmolStr;

use crate::table;
use crate::world::vmi_of_pod;

/// Namespace and name of an object; the namespace is empty for cluster-scoped kinds. Short names lie in place: tens of
/// thousands of them are compared and copied with every piece of news.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// Namespace, empty for cluster-scoped objects.
    pub namespace: SmolStr,
    /// Name within the namespace.
    pub name: SmolStr,
}

impl Name {
    /// A name in a namespace (empty for cluster scope).
    pub fn new(namespace: impl Into<SmolStr>, name: impl Into<SmolStr>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// A cluster-scoped name.
    pub fn cluster(name: impl Into<SmolStr>) -> Self {
        Self { namespace: SmolStr::default(), name: name.into() }
    }

    /// A name as it is displayed.
    pub fn parse(text: &str) -> Self {
        let (namespace, name) = text.split_once('/').unwrap_or(("", text));
        Self::new(namespace, name)
    }

    /// The name that an object's metadata carries; missing parts are empty.
    pub fn of(meta: &ObjectMeta) -> Self {
        let part = |part: &Option<String>| part.as_deref().map(SmolStr::new).unwrap_or_default();
        Self { namespace: part(&meta.namespace), name: part(&meta.name) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

/// One object of the cluster, named well enough to write to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ref {
    /// What it is.
    pub kind: Kind,
    /// Which one.
    pub name: Name,
}

impl Ref {
    /// Reference to `name` of `kind`.
    pub fn new(kind: Kind, name: Name) -> Self {
        Self { kind, name }
    }
}

impl fmt::Display for Ref {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.kind(), self.name)
    }
}

/// An object that nobody reads for now, in as little memory as it takes.
#[derive(Clone, Debug)]
pub struct Packed(Lying);

#[derive(Clone, Debug)]
enum Lying {
    Text(Kind, Box<[u8]>),
    /// Its text would not be all of it.
    Object(Object),
}

impl Packed {
    /// What it is.
    pub fn kind(&self) -> Kind {
        match &self.0 {
            Lying::Text(kind, _) => *kind,
            Lying::Object(object) => object.kind(),
        }
    }

    /// The object as it was. It has been read back once before it was packed, so this does not fail.
    pub fn object(self) -> Result<Object, serde_json::Error> {
        match self.0 {
            Lying::Text(kind, text) => Object::from_text(kind, &text),
            Lying::Object(object) => Ok(object),
        }
    }
}

macro_rules! kinds {
    ($($variant:ident($ty:ty): $group:literal $version:literal $kind:literal $plural:literal $namespaced:literal;)*) => {
        /// The kinds that controllers watch and write.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $(#[doc = $kind] $variant,)*
        }

        impl Kind {
            /// Every kind, in a fixed order.
            pub const ALL: &'static [Kind] = &[$(Kind::$variant),*];

            /// API group, empty for the core group.
            pub fn group(self) -> &'static str {
                match self { $(Kind::$variant => $group,)* }
            }

            /// API version within the group.
            pub fn version(self) -> &'static str {
                match self { $(Kind::$variant => $version,)* }
            }

            /// The kind as manifests spell it.
            pub fn kind(self) -> &'static str {
                match self { $(Kind::$variant => $kind,)* }
            }

            /// The resource name in URLs.
            pub fn plural(self) -> &'static str {
                match self { $(Kind::$variant => $plural,)* }
            }

            /// Whether objects of this kind live in a namespace.
            pub fn namespaced(self) -> bool {
                match self { $(Kind::$variant => $namespaced,)* }
            }
        }

        /// An object of a known kind; cheap to clone.
        #[derive(Clone, Debug)]
        pub enum Object {
            $(#[doc = $kind] $variant(Arc<$ty>),)*
        }

        impl Object {
            /// What it is.
            pub fn kind(&self) -> Kind {
                match self { $(Object::$variant(_) => Kind::$variant,)* }
            }

            /// Its metadata.
            pub fn metadata(&self) -> &ObjectMeta {
                match self { $(Object::$variant(object) => &object.metadata,)* }
            }

            /// Its metadata, to be changed; what others hold of the object stays as it is.
            pub fn metadata_mut(&mut self) -> &mut ObjectMeta {
                match self { $(Object::$variant(object) => &mut Arc::make_mut(object).metadata,)* }
            }

            /// A copy of its own.
            fn copied(&self) -> Object {
                match self { $(Object::$variant(object) => Object::$variant(Arc::new(object.as_ref().clone())),)* }
            }

            /// Whether both are the same in everything.
            pub fn same_as(&self, other: &Object) -> bool {
                match (self, other) {
                    $((Object::$variant(one), Object::$variant(other)) => Arc::ptr_eq(one, other) || one == other,)*
                    _ => false,
                }
            }

            /// The same in as little memory as it takes, for as long as nobody reads it.
            pub fn packed(self) -> Packed {
                let text = match &self { $(Object::$variant(object) => table::text_of(object.as_ref()),)* };
                Packed(match text {
                    Some(text) => Lying::Text(self.kind(), text),
                    None => Lying::Object(self),
                })
            }

            /// Reads an object of `kind` from its JSON text.
            pub fn from_text(kind: Kind, text: &[u8]) -> Result<Object, serde_json::Error> {
                Ok(match kind {
                    $(Kind::$variant => Object::$variant(Arc::new(serde_json::from_slice::<$ty>(text)?)),)*
                })
            }

            /// Reads an object of `kind` from its JSON form.
            pub fn from_value(kind: Kind, value: Value) -> Result<Object, serde_json::Error> {
                Ok(match kind {
                    $(Kind::$variant => Object::$variant(Arc::new(serde_json::from_value::<$ty>(value)?)),)*
                })
            }

            /// The JSON form, with `apiVersion` and `kind` set.
            pub fn to_value(&self) -> Result<Value, serde_json::Error> {
                let mut value = match self { $(Object::$variant(object) => serde_json::to_value(object.as_ref())?,)* };
                if let Value::Object(map) = &mut value {
                    map.insert("apiVersion".into(), self.kind().api_version().into());
                    map.insert("kind".into(), self.kind().kind().into());
                }
                Ok(value)
            }
        }

        $(impl From<$ty> for Object {
            fn from(object: $ty) -> Object {
                Object::$variant(Arc::new(object))
            }
        })*

        $(impl Stored for $ty {
            const KIND: Kind = Kind::$variant;
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn wrap(object: Arc<Self>) -> Object {
                Object::$variant(object)
            }
        })*
    };
}

kinds! {
    VirtualMachine(VirtualMachine): "kubevirt.io" "v1" "VirtualMachine" "virtualmachines" true;
    VirtualMachineInstance(VirtualMachineInstance):
        "kubevirt.io" "v1" "VirtualMachineInstance" "virtualmachineinstances" true;
    Migration(VirtualMachineInstanceMigration):
        "kubevirt.io" "v1" "VirtualMachineInstanceMigration" "virtualmachineinstancemigrations" true;
    KubeVirt(KubeVirt): "kubevirt.io" "v1" "KubeVirt" "kubevirts" true;
    NetworkAttachmentDefinition(NetworkAttachmentDefinition):
        "k8s.cni.cncf.io" "v1" "NetworkAttachmentDefinition" "network-attachment-definitions" true;
    Pod(Pod): "" "v1" "Pod" "pods" true;
    Node(Node): "" "v1" "Node" "nodes" false;
    PersistentVolumeClaim(PersistentVolumeClaim): "" "v1" "PersistentVolumeClaim" "persistentvolumeclaims" true;
    PersistentVolume(PersistentVolume): "" "v1" "PersistentVolume" "persistentvolumes" false;
    StorageClass(StorageClass): "storage.k8s.io" "v1" "StorageClass" "storageclasses" false;
    ConfigMap(ConfigMap): "" "v1" "ConfigMap" "configmaps" true;
    Namespace(Namespace): "" "v1" "Namespace" "namespaces" false;
    ResourceQuota(ResourceQuota): "" "v1" "ResourceQuota" "resourcequotas" true;
    MigrationPolicy(MigrationPolicy):
        "migrations.kubevirt.io" "v1alpha1" "MigrationPolicy" "migrationpolicies" false;
    MigrationRecord(MigrationRecord): "godwit.io" "v1alpha1" "MigrationRecord" "migrationrecords" true;
    NodeMaintenance(medik8s::NodeMaintenance):
        "nodemaintenance.medik8s.io" "v1beta1" "NodeMaintenance" "nodemaintenances" false;
    KubeVirtNodeMaintenance(kubevirt::NodeMaintenance):
        "nodemaintenance.kubevirt.io" "v1beta1" "NodeMaintenance" "nodemaintenances" false;
    OldestNodeMaintenance(oldest::NodeMaintenance):
        "kubevirt.io" "v1alpha1" "NodeMaintenance" "nodemaintenances" false;
    Lease(Lease): "coordination.k8s.io" "v1" "Lease" "leases" true;
    PodDisruptionBudget(PodDisruptionBudget): "policy" "v1" "PodDisruptionBudget" "poddisruptionbudgets" true;
}

impl Kind {
    /// The only namespace whose objects of this kind matter; `None`: all of them do. Of ConfigMaps the configuration and the
    /// migrations' slots are read, and nobody else's.
    pub fn only_in(self, installation: &Installation) -> Option<&str> {
        (self == Kind::ConfigMap).then_some(installation.namespace())
    }

    /// `group/version`, or the version alone for the core group.
    pub fn api_version(self) -> String {
        match self.group() {
            "" => self.version().to_owned(),
            group => format!("{group}/{}", self.version()),
        }
    }
}

impl Object {
    /// Namespace and name.
    pub fn name(&self) -> Name {
        Name::of(self.metadata())
    }

    /// Kind, namespace and name.
    pub fn reference(&self) -> Ref {
        Ref::new(self.kind(), self.name())
    }

    /// The revision as a number; 0 when missing or opaque. Kubernetes promises comparable revisions since 1.35, and every
    /// server that we meet (etcd, ours) has always counted.
    pub fn revision(&self) -> u64 {
        revision(self.metadata())
    }
}

impl Object {
    /// The same without what no decision reads, in as little memory as it takes: of a large cluster every pod is kept.
    ///
    /// Writes are differences to what is held, so what is left out is never written. Lists are left out of only where no
    /// decision changes them.
    pub fn lean(mut self) -> Self {
        // Who wrote which field is a third of an object.
        self.metadata_mut().managed_fields = None;
        if let Object::Pod(pod) = &mut self {
            let is_launcher = vmi_of_pod(pod).is_some();
            if let Some(spec) = &mut Arc::make_mut(pod).spec {
                lean_pod(spec, is_launcher);
            }
        }
        // What was read grew by doubling; a copy has what it needs.
        self.copied()
    }
}

fn lean_pod(spec: &mut PodSpec, is_launcher: bool) {
    if let Some(volumes) = &mut spec.volumes {
        // Claims are what pods are found by; that something is lost with a pod is told by its first emptyDir. A launcher's
        // holds nothing that its guest would miss.
        let mut told = is_launcher;
        volumes.retain(|volume| {
            volume.persistent_volume_claim.is_some()
                || volume.empty_dir.is_some() && !std::mem::replace(&mut told, true)
        });
    }
    for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
        *container = Container {
            name: std::mem::take(&mut container.name),
            image: container.image.take(),
            resources: container.resources.take(),
            restart_policy: container.restart_policy.take(),
            ..Container::default()
        };
    }
}

/// A typed object that the [`World`](crate::World) keeps.
pub trait Stored: Clone + PartialEq + Serialize + DeserializeOwned {
    /// Its kind.
    const KIND: Kind;
    /// Its metadata.
    fn meta(&self) -> &ObjectMeta;
    /// The untyped form.
    fn wrap(object: Arc<Self>) -> Object;

    /// Namespace and name.
    fn key(&self) -> Name {
        Name::of(self.meta())
    }
    /// Kind, namespace and name.
    fn reference(&self) -> Ref {
        Ref::new(Self::KIND, self.key())
    }
    /// The UID, empty when missing.
    fn uid(&self) -> &str {
        self.meta().uid.as_deref().unwrap_or_default()
    }
    /// The name, empty when missing.
    fn name(&self) -> &str {
        self.meta().name.as_deref().unwrap_or_default()
    }
    /// The namespace, empty when missing.
    fn namespace(&self) -> &str {
        self.meta().namespace.as_deref().unwrap_or_default()
    }
    /// The value of a label.
    fn label(&self, key: &str) -> Option<&str> {
        self.meta().labels.as_ref().and_then(|labels| labels.get(key)).map(String::as_str)
    }
    /// The value of an annotation.
    fn annotation(&self, key: &str) -> Option<&str> {
        self.meta().annotations.as_ref().and_then(|map| map.get(key)).map(String::as_str)
    }
    /// Whether deletion has been asked for.
    fn deleting(&self) -> bool {
        self.meta().deletion_timestamp.is_some()
    }
    /// Whether the object carries this finalizer.
    fn has_finalizer(&self, finalizer: &str) -> bool {
        self.meta().finalizers.as_ref().is_some_and(|all| all.iter().any(|one| one == finalizer))
    }
}

/// The revision in some metadata as a number; 0 when missing or opaque.
pub fn revision(meta: &ObjectMeta) -> u64 {
    meta.resource_version.as_deref().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Labels as a map, empty when missing.
pub fn labels(meta: &ObjectMeta) -> &BTreeMap<String, String> {
    static EMPTY: BTreeMap<String, String> = BTreeMap::new();
    meta.labels.as_ref().unwrap_or(&EMPTY)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_lean_pod_has_what_decisions_read() {
        let pod = |labels: Value| {
            let value = json!({
                "metadata": {"name": "p", "namespace": "ns", "labels": labels, "managedFields": [{"manager": "m"}]},
                "spec": {
                    "nodeName": "node1",
                    "containers": [{"name": "c", "image": "i", "command": ["sh"], "env": [{"name": "A", "value": "b"}],
                        "resources": {"requests": {"cpu": "1"}}, "volumeMounts": [{"name": "one", "mountPath": "/one"}]}],
                    "volumes": [{"name": "one", "emptyDir": {}}, {"name": "two", "emptyDir": {}}, {"name": "three", "secret": {}},
                        {"name": "four", "persistentVolumeClaim": {"claimName": "claim"}}],
                },
                "status": {"phase": "Running"},
            });
            Object::from_value(Kind::Pod, value).unwrap().lean().to_value().unwrap()
        };
        let other = pod(json!({}));
        let names = |pod: &Value| -> Vec<String> {
            let volumes = pod["spec"]["volumes"].as_array().unwrap().iter();
            volumes.map(|volume| volume["name"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(names(&other), ["one", "four"]);
        assert_eq!(names(&pod(json!({"kubevirt.io": "virt-launcher"}))), ["four"]);
        assert!(other["metadata"].get("managedFields").is_none());
        assert_eq!(other["spec"]["nodeName"], "node1");
        assert_eq!(other["status"]["phase"], "Running");
        let container = json!({"name": "c", "image": "i", "resources": {"requests": {"cpu": "1"}}});
        assert_eq!(other["spec"]["containers"], json!([container]));
    }
}
