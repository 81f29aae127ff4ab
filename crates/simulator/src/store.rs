//! The API server as far as controllers and nodes can tell: revisions, optimistic concurrency, finalizers, graceful
//! deletion of pods, patches, and KubeVirt's admission (the real rules).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_api::Installation;
use godwit_api::admission::{self, Lookup, Operation, Request, User, eviction};
use godwit_control::{Kind, Name, Object, Ordered, Ref, Stored, has_status_subresource, names};
use godwit_machinery::patch;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use serde_json::{Value, json};

use crate::quick;
use crate::random::Random;

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 409: there is one of this name.
    Exists,
    /// 409: the revision or the UID is another one.
    Conflict,
    /// 404.
    NotFound,
    /// Anything else, with the reason.
    Invalid(String),
}

/// One change that watchers are told of.
#[derive(Clone, Debug)]
pub struct Commit {
    /// The state before.
    pub before: Option<Object>,
    /// The state after; the last one, at the revision of the deletion, when it is gone.
    pub latest: Object,
    /// It does not exist any more.
    pub gone: bool,
}

/// All objects, typed; the JSON form is made when a request needs it.
#[derive(Debug, Default)]
pub struct Store {
    objects: Ordered<Ref, Object>,
    by_uid: BTreeMap<String, Ref>,
    /// By the UID of an owner.
    owned: BTreeMap<String, BTreeSet<Ref>>,
    revision: u64,
    commits: Vec<Commit>,
}

impl Store {
    /// The object, if there is one.
    pub fn get(&self, target: &Ref) -> Option<&Object> {
        self.objects.get(target)
    }

    /// The object with this UID.
    pub fn get_by_uid(&self, uid: &str) -> Option<&Object> {
        self.by_uid.get(uid).and_then(|target| self.objects.get(target))
    }

    /// All objects of a kind, by name.
    pub fn list(&self, kind: Kind) -> impl Iterator<Item = &Object> {
        let start = Ref::new(kind, Name::default());
        self.objects.range(start..).take_while(move |(target, _)| target.kind == kind).map(|(_, object)| object)
    }

    /// The objects of an owner.
    pub fn owned_by(&self, uid: &str) -> impl Iterator<Item = &Object> {
        self.owned.get(uid).into_iter().flatten().filter_map(|target| self.objects.get(target))
    }

    /// Takes the changes since the last call.
    pub fn take_commits(&mut self) -> Vec<Commit> {
        std::mem::take(&mut self.commits)
    }

    /// Makes an object, by way of admission.
    pub fn create(
        &mut self,
        kind: Kind,
        value: Value,
        user: &str,
        now: Timestamp,
        random: &mut Random,
    ) -> Result<Object, Refusal> {
        if self.objects.contains_key(&Ref::new(kind, name_of(&value))) {
            return Err(Refusal::Exists);
        }
        let admitted =
            if admission::concerns(kind.group(), kind.kind()) { self.admit(kind, value, user)? } else { value };
        self.insert(kind, admitted, now, random)
    }

    /// Makes an object that has been admitted (before another one changed the answer, perhaps).
    pub fn insert(
        &mut self,
        kind: Kind,
        mut value: Value,
        now: Timestamp,
        random: &mut Random,
    ) -> Result<Object, Refusal> {
        let target = Ref::new(kind, name_of(&value));
        if self.objects.contains_key(&target) {
            return Err(Refusal::Exists);
        }
        if let Some(map) = value.as_object_mut() {
            map.insert("apiVersion".to_owned(), json!(kind.api_version()));
            map.insert("kind".to_owned(), json!(kind.kind()));
            if has_status_subresource(kind) && !matches!(kind, Kind::Node) {
                map.remove("status");
            }
        }
        set_metadata(&mut value, "uid", json!(random.uid()));
        set_metadata(&mut value, "creationTimestamp", seconds(now));
        set_metadata(&mut value, "generation", json!(1));
        self.put(target.clone(), read(&target, value)?)
    }

    /// Puts in an object as it is (of a cluster that stands already).
    pub fn adopt(&mut self, object: Object) {
        let _ = self.put(object.reference(), object);
    }

    /// What admission makes of an object.
    pub fn admit(&self, kind: Kind, value: Value, user: &str) -> Result<Value, Refusal> {
        let refused = |denial: Box<admission::Denial>| Refusal::Invalid(denial.message.clone());
        let user = User { name: user.to_owned(), ..User::default() };
        let name = name_of(&value);
        let version = kind.version();
        let request = |object| Request {
            operation: Operation::Create,
            group: kind.group(),
            version,
            kind: kind.kind(),
            resource: kind.plural(),
            subresource: "",
            namespace: &name.namespace,
            name: &name.name,
            object: Some(object),
            old_object: None,
            user: &user,
            dry_run: false,
            lookup: self,
        };
        let mutated = admission::mutate(&request(&value)).map_err(refused)?.object;
        admission::validate(&request(&mutated)).map_err(refused)?;
        Ok(mutated)
    }

    /// Carries out a merge patch, of the status alone or of everything else.
    pub fn merge(&mut self, target: &Ref, status: bool, body: &Value) -> Result<Object, Refusal> {
        let old = self.objects.get(target).ok_or(Refusal::NotFound)?;
        if let Some(expected) = body.pointer("/metadata/resourceVersion").and_then(Value::as_str)
            && old.metadata().resource_version.as_deref() != Some(expected)
        {
            return Err(Refusal::Conflict);
        }
        match quick::patch(old, status, body) {
            Some(new) if new.same_as(old) => Ok(new),
            Some(new) => self.keep_or_release(target, new),
            None => self.change(target, status, |old| {
                patch::merge_patch(old, body).map_err(|status| Refusal::Invalid(format!("{status:?}")))
            }),
        }
    }

    /// Carries out a JSON patch of everything but the status.
    pub fn json(&mut self, target: &Ref, body: &Value) -> Result<Object, Refusal> {
        self.change(target, false, |old| {
            patch::json_patch(old, body).map_err(|status| Refusal::Invalid(format!("{status:?}")))
        })
    }

    /// Renews a node's lease, or makes it.
    pub fn renew_lease(&mut self, target: &Ref, holder: &str, seconds: i32, now: Timestamp, random: &mut Random) {
        let mut lease = match self.objects.get(target) {
            Some(Object::Lease(lease)) => Arc::clone(lease),
            _ => {
                let body =
                    json!({"metadata": {"namespace": target.name.namespace, "name": target.name.name}, "spec": {}});
                match self.insert(target.kind, body, now, random) {
                    Ok(Object::Lease(lease)) => lease,
                    _ => return,
                }
            }
        };
        let spec = Arc::make_mut(&mut lease).spec.get_or_insert_default();
        spec.renew_time = Some(MicroTime(now));
        spec.lease_duration_seconds = Some(seconds);
        spec.holder_identity = Some(holder.to_owned());
        let _ = self.put(target.clone(), Object::Lease(lease));
    }

    /// Renews the fence lease of a node, or makes it. The mark of a lost node goes with it.
    pub fn renew_fence(&mut self, target: &Ref, node: &str, peers: &str, now: Timestamp, random: &mut Random) {
        if let Some(Object::Lease(held)) = self.objects.get(target) {
            let mut lease = Arc::clone(held);
            let after = Arc::make_mut(&mut lease);
            let annotations = after.metadata.annotations.get_or_insert_default();
            annotations.remove(names::ANNOTATION_NODE_LOST);
            after.spec.get_or_insert_default().renew_time = Some(MicroTime(now));
            let _ = self.put(target.clone(), Object::Lease(lease));
            return;
        }
        let body = json!({
            "metadata": {
                "namespace": target.name.namespace, "name": target.name.name,
                "annotations": {names::ANNOTATION_FENCE_PEERS: peers},
            },
            "spec": {
                "holderIdentity": node, "leaseDurationSeconds": names::fence::DURATION.as_secs(), "renewTime": format!("{now:.6}"),
            },
        });
        let _ = self.insert(target.kind, body, now, random);
    }

    fn change(
        &mut self,
        target: &Ref,
        status: bool,
        patched: impl FnOnce(&Value) -> Result<Value, Refusal>,
    ) -> Result<Object, Refusal> {
        let entry = self.objects.get(target).ok_or(Refusal::NotFound)?;
        let old = &write(entry)?;
        let mut new = patched(old)?;
        if status {
            let changed = new.get("status").cloned();
            new = old.clone();
            set(&mut new, "status", changed);
        } else if has_status_subresource(target.kind) {
            set(&mut new, "status", old.get("status").cloned());
        }
        // What only the server writes.
        for field in
            ["uid", "creationTimestamp", "resourceVersion", "generation", "deletionTimestamp", "name", "namespace"]
        {
            let kept = old.pointer(&format!("/metadata/{field}")).cloned();
            if let Some(metadata) = new.get_mut("metadata") {
                set(metadata, field, kept);
            }
        }
        if new == *old {
            return Ok(entry.clone());
        }
        if new.get("spec") != old.get("spec") {
            let generation = old.pointer("/metadata/generation").and_then(Value::as_u64).unwrap_or(0);
            set_metadata(&mut new, "generation", json!(generation + 1));
        }
        let new = read(target, new)?;
        if new.same_as(entry) {
            return Ok(new);
        }
        self.keep_or_release(target, new)
    }

    /// An object that was only waiting for its finalizers goes with the last of them.
    fn keep_or_release(&mut self, target: &Ref, new: Object) -> Result<Object, Refusal> {
        let released = target.kind != Kind::Pod && is_deleting(&new) && !has_finalizers(&new);
        if released { self.remove(target, new) } else { self.put(target.clone(), new) }
    }

    /// Asks for deletion. `None`: it is gone. Pods on a node stay until their kubelet deletes them with grace 0.
    pub fn delete(
        &mut self,
        target: &Ref,
        uid: &str,
        grace: Option<u32>,
        now: Timestamp,
    ) -> Result<Option<Object>, Refusal> {
        let mut object = self.objects.get(target).ok_or(Refusal::NotFound)?.clone();
        if !uid.is_empty() && object.metadata().uid.as_deref() != Some(uid) {
            return Err(Refusal::Conflict);
        }
        let at_once = match &object {
            Object::Pod(pod) => {
                let unbound = pod.spec.as_ref().is_none_or(|spec| spec.node_name.is_none());
                unbound || grace == Some(0) || godwit_control::placement::is_finished(pod)
            }
            _ => true,
        };
        if at_once && !has_finalizers(&object) {
            return self.remove(target, object).map(|_| None);
        }
        if is_deleting(&object) {
            return Ok(Some(object));
        }
        object.metadata_mut().deletion_timestamp = Some(Time(whole_seconds(now)));
        self.put(target.clone(), object).map(Some)
    }

    /// What the rules say to the eviction of a pod, if they do not let it go; they may mark its VMI.
    pub fn refuses_eviction(&mut self, pod: &Ref, uid: &str) -> Option<String> {
        let found = self.objects.get(pod).filter(|pod| pod.metadata().uid.as_deref() == Some(uid))?;
        let found = found.to_value().ok()?;
        let vmi = eviction::domain_of(&found)?;
        let target = Ref::new(Kind::VirtualMachineInstance, Name::new(pod.name.namespace.clone(), vmi.as_str()));
        let vmi = self.objects.get(&target).and_then(|vmi| vmi.to_value().ok());
        let asked = eviction::Eviction {
            pod: &found,
            vmi: vmi.as_ref().ok_or_else(|| eviction::not_found(&target.name.name)),
            eviction: &Value::Null,
            cluster_strategy: None,
        };
        match eviction::evict(&asked) {
            eviction::Answer::Allowed => None,
            eviction::Answer::Refused(denial) => Some(denial.text().to_owned()),
            eviction::Answer::Marks(mark, denial) => {
                // Nothing comes between here: the store is asked and written in one go.
                let _ = self.merge(&target, false, &mark.patch);
                Some(denial.text().to_owned())
            }
        }
    }

    /// Binds a pod to a node.
    pub fn bind(&mut self, pod: &Ref, uid: &str, node: &str) -> Result<Object, Refusal> {
        let Some(Object::Pod(found)) = self.objects.get(pod) else { return Err(Refusal::NotFound) };
        let bound = found.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        if found.uid() != uid || bound || found.deleting() {
            return Err(Refusal::Conflict);
        }
        let mut new = found.as_ref().clone();
        new.spec.get_or_insert_default().node_name = Some(node.to_owned());
        new.status = Some(PodStatus {
            phase: Some("Pending".to_owned()),
            conditions: Some(vec![PodCondition {
                type_: "PodScheduled".to_owned(),
                status: "True".to_owned(),
                ..PodCondition::default()
            }]),
            ..PodStatus::default()
        });
        self.put(pod.clone(), Object::from(new))
    }

    fn put(&mut self, target: Ref, mut object: Object) -> Result<Object, Refusal> {
        self.stamp(&mut object);
        let before = self.objects.insert(target.clone(), object.clone());
        if before.as_ref().is_none_or(|before| before.metadata().owner_references != object.metadata().owner_references)
        {
            self.index(&target, before.as_ref(), Some(&object));
        }
        self.commits.push(Commit { before, latest: object.clone(), gone: false });
        Ok(object)
    }

    fn remove(&mut self, target: &Ref, mut latest: Object) -> Result<Object, Refusal> {
        self.stamp(&mut latest);
        let before = self.objects.remove(target);
        self.index(target, before.as_ref(), None);
        self.commits.push(Commit { before, latest: latest.clone(), gone: true });
        Ok(latest)
    }

    fn index(&mut self, target: &Ref, before: Option<&Object>, after: Option<&Object>) {
        fn owners(object: Option<&Object>) -> impl Iterator<Item = &String> {
            object
                .into_iter()
                .flat_map(|object| object.metadata().owner_references.iter().flatten())
                .map(|one| &one.uid)
        }
        if let Some(uid) = before.and_then(|before| before.metadata().uid.as_deref()) {
            self.by_uid.remove(uid);
        }
        for owner in owners(before) {
            if let Some(all) = self.owned.get_mut(owner) {
                all.remove(target);
                if all.is_empty() {
                    self.owned.remove(owner);
                }
            }
        }
        if let Some(uid) = after.and_then(|after| after.metadata().uid.clone()) {
            self.by_uid.insert(uid, target.clone());
        }
        for owner in owners(after) {
            self.owned.entry(owner.clone()).or_default().insert(target.clone());
        }
    }

    fn stamp(&mut self, object: &mut Object) {
        self.revision += 1;
        object.metadata_mut().resource_version = Some(self.revision.to_string());
    }
}

/// The kind that a rule looks up; where several groups have it, it is named with its group.
fn kind_of(wanted: &str) -> Option<Kind> {
    let (kind, group) = wanted.split_once('.').map_or((wanted, None), |(kind, group)| (kind, Some(group)));
    Kind::ALL.iter().copied().find(|known| known.kind() == kind && group.is_none_or(|group| known.group() == group))
}

impl Lookup for Store {
    fn installation(&self) -> &Installation {
        &Installation::USUAL
    }

    fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let kind = kind_of(kind)?;
        self.objects.get(&Ref::new(kind, Name::new(namespace, name))).and_then(|object| object.to_value().ok())
    }

    fn list(&self, kind: &str, namespace: &str, label: Option<(&str, &str)>) -> Vec<Value> {
        let Some(kind) = kind_of(kind) else { return Vec::new() };
        let carries = |object: &Object| {
            label.is_none_or(|(key, wanted)| {
                let labels = object.metadata().labels.as_ref();
                labels.and_then(|labels| labels.get(key)).is_some_and(|value| value == wanted)
            })
        };
        let start = Ref::new(kind, Name::new(namespace, ""));
        self.objects
            .range(start..)
            .take_while(|(target, _)| {
                target.kind == kind && (namespace.is_empty() || target.name.namespace == namespace)
            })
            .filter(|(_, object)| carries(object))
            .filter_map(|(_, object)| object.to_value().ok())
            .collect()
    }
}

fn read(target: &Ref, value: Value) -> Result<Object, Refusal> {
    Object::from_value(target.kind, value)
        .map_err(|error| Refusal::Invalid(format!("{target} cannot be read: {error}")))
}

fn write(object: &Object) -> Result<Value, Refusal> {
    object.to_value().map_err(|error| Refusal::Invalid(format!("{} cannot be written: {error}", object.reference())))
}

fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

/// A time as Kubernetes writes it: whole seconds.
pub fn seconds(at: Timestamp) -> Value {
    json!(whole_seconds(at).to_string())
}

fn name_of(value: &Value) -> Name {
    let text = |path: &str| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    Name::new(text("/metadata/namespace"), text("/metadata/name"))
}

/// Writes a field of the metadata.
fn set_metadata(value: &mut Value, key: &str, to: Value) {
    if !value.get("metadata").is_some_and(Value::is_object) {
        set(value, "metadata", Some(json!({})));
    }
    if let Some(metadata) = value.get_mut("metadata") {
        set(metadata, key, Some(to));
    }
}

fn set(value: &mut Value, key: &str, to: Option<Value>) {
    if !value.is_object() {
        *value = json!({});
    }
    if let Some(map) = value.as_object_mut() {
        match to {
            Some(to) => {
                map.insert(key.to_owned(), to);
            }
            None => {
                map.remove(key);
            }
        }
    }
}

fn is_deleting(object: &Object) -> bool {
    object.metadata().deletion_timestamp.is_some()
}

fn has_finalizers(object: &Object) -> bool {
    object.metadata().finalizers.as_ref().is_some_and(|all| !all.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store_with(kind: Kind, value: Value) -> (Store, Ref) {
        let mut store = Store::default();
        let object = store.create(kind, value, "test", Timestamp::UNIX_EPOCH, &mut Random::new(1)).unwrap();
        let target = object.reference();
        store.take_commits();
        (store, target)
    }

    #[test]
    fn a_patch_on_an_old_revision_is_refused() {
        let (mut store, target) = store_with(Kind::ConfigMap, json!({"metadata": {"namespace": "n", "name": "c"}}));
        let revision = store.get(&target).unwrap().metadata().resource_version.clone();
        let body = |text: &str| json!({"metadata": {"resourceVersion": revision}, "data": {"a": text}});
        store.merge(&target, false, &body("1")).unwrap();
        assert_eq!(store.merge(&target, false, &body("2")).unwrap_err(), Refusal::Conflict);
        assert_eq!(store.take_commits().len(), 1);
        store.merge(&target, false, &json!({"data": {"a": "1"}})).unwrap();
        assert!(store.take_commits().is_empty(), "nothing changed, nothing is told");
    }

    #[test]
    fn finalizers_hold_what_is_deleted() {
        let object = json!({"metadata": {"namespace": "n", "name": "c", "finalizers": ["x/y"]}});
        let (mut store, target) = store_with(Kind::ConfigMap, object);
        assert!(store.delete(&target, "other", None, Timestamp::UNIX_EPOCH).is_err());
        assert!(store.delete(&target, "", None, Timestamp::UNIX_EPOCH).unwrap().is_some());
        assert!(store.get(&target).unwrap().metadata().deletion_timestamp.is_some());
        store.json(&target, &json!([{"op": "remove", "path": "/metadata/finalizers"}])).unwrap();
        assert!(store.get(&target).is_none());
        assert!(store.take_commits().last().unwrap().gone);
    }

    #[test]
    fn a_pod_on_a_node_waits_for_its_kubelet() {
        let pod = json!({"metadata": {"namespace": "n", "name": "p"}, "spec": {"containers": []}});
        let (mut store, target) = store_with(Kind::Pod, pod);
        let uid = store.get(&target).unwrap().metadata().uid.clone().unwrap();
        store.bind(&target, &uid, "node1").unwrap();
        assert_eq!(store.bind(&target, &uid, "node2").unwrap_err(), Refusal::Conflict);
        assert!(store.delete(&target, "", None, Timestamp::UNIX_EPOCH).unwrap().is_some());
        assert!(store.delete(&target, "", Some(0), Timestamp::UNIX_EPOCH).unwrap().is_none());
    }

    #[test]
    fn status_and_the_rest_are_written_apart() {
        let pod = json!({"metadata": {"namespace": "n", "name": "p"}, "spec": {"containers": []}});
        let (mut store, target) = store_with(Kind::Pod, pod);
        store
            .merge(&target, true, &json!({"metadata": {"labels": {"a": "b"}}, "status": {"phase": "Running"}}))
            .unwrap();
        let Some(Object::Pod(pod)) = store.get(&target) else { panic!() };
        assert_eq!(pod.status.as_ref().unwrap().phase.as_deref(), Some("Running"));
        assert!(pod.metadata.labels.is_none());
    }
}
