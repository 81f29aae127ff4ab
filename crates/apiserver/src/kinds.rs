//! What is served now: the built-in kinds and those of established CustomResourceDefinitions.

use crate::events;
use godwit_machinery::resource::{GroupVersion, Resource};
use godwit_machinery::{builtin, crd};
use godwit_store::{Store, Watch};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// Where CustomResourceDefinitions are stored.
pub(crate) const CRDS: &str = "/registry/apiextensions.k8s.io/customresourcedefinitions/";

/// One served version of a resource, and where and as what it is stored.
#[derive(Debug)]
pub(crate) struct Kind {
    pub(crate) resource: Resource,
    /// The version that objects are stored in.
    pub(crate) stored: GroupVersion,
    /// `/registry/<group>/<plural>/`
    pub(crate) prefix: String,
    /// Name of the CRD that defines it, empty for built-ins.
    pub(crate) crd: String,
}

impl Kind {
    /// `pods` or `virtualmachines.kubevirt.io`'s two halves, for Status messages.
    pub(crate) fn names(&self) -> (&str, &str) {
        (&self.resource.gv.group, &self.resource.plural)
    }

    pub(crate) fn api_version(&self) -> String {
        self.resource.gv.api_version()
    }

    /// Everything of this kind in a namespace (empty: in all, or cluster-scoped).
    pub(crate) fn folder(&self, namespace: &str) -> String {
        match (self.resource.namespaced, namespace) {
            (true, ns) if !ns.is_empty() => format!("{}{ns}/", self.prefix),
            _ => self.prefix.clone(),
        }
    }

    pub(crate) fn key(&self, namespace: &str, name: &str) -> String {
        format!("{}{name}", self.folder(namespace))
    }

    pub(crate) fn is(&self, group: &str, plural: &str) -> bool {
        self.resource.gv.group == group && self.resource.plural == plural
    }

    /// Events of the group events.k8s.io are core Events with other field names.
    fn other_shape(&self) -> bool {
        self.resource.plural == "events" && self.resource.gv.group == events::GROUP
    }

    /// Whether stored objects are served as they are.
    pub(crate) fn served_as_stored(&self) -> bool {
        self.resource.gv == self.stored
    }

    /// A stored object in this version.
    pub(crate) fn serve(&self, object: &mut Value) {
        if self.other_shape() {
            events::from_core(object);
        }
        self.name_version(object, &self.resource.gv);
    }

    /// An object of this version as it is stored.
    pub(crate) fn store(&self, object: &mut Value) {
        if self.other_shape() {
            events::to_core(object);
        }
        self.name_version(object, &self.stored);
    }

    fn name_version(&self, object: &mut Value, gv: &GroupVersion) {
        if let Some(map) = object.as_object_mut() {
            map.insert("apiVersion".to_owned(), Value::String(gv.api_version()));
            map.insert("kind".to_owned(), Value::String(self.resource.kind.clone()));
        }
    }
}

/// The table of kinds.
#[derive(Debug, Default)]
pub(crate) struct Kinds {
    by_path: BTreeMap<(String, String, String), Arc<Kind>>,
    /// In discovery's order.
    pub(crate) resources: Vec<Resource>,
    /// Differs between tables with different content.
    pub(crate) generation: u64,
}

impl Kinds {
    fn build(store: &Store, actions: &[Resource], generation: u64) -> Self {
        let mut kinds = Kinds { generation, ..Self::default() };
        for resource in builtin::resources() {
            let core_event = resource.plural == "events";
            let stored = if core_event {
                GroupVersion { group: String::new(), version: "v1".to_owned() }
            } else {
                resource.gv.clone()
            };
            kinds.add(resource, stored, String::new());
        }
        for resource in actions {
            kinds.add(resource.clone(), resource.gv.clone(), String::new());
        }
        for entry in store.list(CRDS, None, 0).entries {
            let definition = entry.json();
            if !established(definition) {
                continue;
            }
            let name = definition.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
            match crd::resources_from_crd(definition) {
                Ok(resources) => {
                    let versions = definition.pointer("/spec/versions").and_then(Value::as_array);
                    let stored = versions.into_iter().flatten().find(|version| version["storage"] == true);
                    let Some(stored) = stored.and_then(|version| version["name"].as_str()) else { continue };
                    for resource in resources {
                        let stored = GroupVersion { group: resource.gv.group.clone(), version: stored.to_owned() };
                        kinds.add(resource, stored, name.to_owned());
                    }
                }
                Err(error) => tracing::warn!(crd = name, ?error, "a stored definition cannot be served"),
            }
        }
        kinds
    }

    fn add(&mut self, resource: Resource, stored: GroupVersion, crd: String) {
        let group = if stored.group.is_empty() { "core" } else { &stored.group };
        let prefix = format!("/registry/{group}/{}/", resource.plural);
        let path = (resource.gv.group.clone(), resource.gv.version.clone(), resource.plural.clone());
        self.resources.push(resource.clone());
        self.by_path.insert(path, Arc::new(Kind { resource, stored, prefix, crd }));
    }

    pub(crate) fn get(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Kind>> {
        self.by_path.get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
    }

    /// Any version of a resource, preferably the stored one.
    pub(crate) fn any_version(&self, group: &str, plural: &str) -> Option<&Arc<Kind>> {
        let mut all = self.by_path.values().filter(|kind| kind.is(group, plural));
        let first = all.next()?;
        if first.served_as_stored() {
            Some(first)
        } else {
            Some(all.find(|kind| kind.served_as_stored()).unwrap_or(first))
        }
    }

    /// Every stored kind once.
    pub(crate) fn stored(&self) -> impl Iterator<Item = &Arc<Kind>> {
        let mut seen = BTreeSet::new();
        let stored =
            self.by_path.values().filter(|kind| !kind.resource.virtual_create_only && !kind.resource.actions_only);
        stored.filter(move |kind| seen.insert(kind.prefix.as_str()))
    }

    /// The kind that a storage key belongs to, with namespace (empty if cluster-scoped) and name.
    pub(crate) fn of_key<'k>(&self, key: &'k str) -> Option<(&Arc<Kind>, &'k str, &'k str)> {
        let mut parts = key.strip_prefix("/registry/")?.splitn(3, '/');
        let (group, plural, rest) = (parts.next()?, parts.next()?, parts.next()?);
        let group = if group == "core" { "" } else { group };
        let kind = self.any_version(group, plural)?;
        let (namespace, name) = rest.split_once('/').unwrap_or(("", rest));
        Some((kind, namespace, name))
    }
}

fn established(definition: &Value) -> bool {
    let conditions = definition.pointer("/status/conditions").and_then(Value::as_array);
    conditions.into_iter().flatten().any(|c| c["type"] == "Established" && c["status"] == "True")
}

/// The table, rebuilt when a definition changed.
#[derive(Debug)]
pub(crate) struct Registry {
    store: Store,
    /// Beside built-in kinds and those of definitions.
    actions: Vec<Resource>,
    state: Mutex<(Option<Watch>, Arc<Kinds>)>,
}

impl Registry {
    pub(crate) fn new(store: Store, actions: Vec<Resource>) -> Self {
        Self { store, actions, state: Mutex::new((None, Arc::default())) }
    }

    /// The table as it stands now.
    pub(crate) fn kinds(&self) -> Arc<Kinds> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let fresh = match &mut state.0 {
            None => false,
            Some(watch) => !watch.has_changed() || watch.poll().is_ok_and(|batch| batch.events.is_empty()),
        };
        if !fresh {
            let generation = state.1.generation + 1;
            state.0 = self.store.watch(CRDS, self.store.revision()).ok();
            state.1 = Arc::new(Kinds::build(&self.store, &self.actions, generation));
        }
        state.1.clone()
    }
}
