//! A small cluster for tests: carries out plans on a world the way an API server would.

use godwit_api::Installation;
use godwit_api::access::{self, Right};
use godwit_api::admission::eviction;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::plan::{Effect, EventRecord, Plan};
use crate::{Key, Kind, Name, Noun, Object, Ref, Settings, Source, View, World, kinds_for};

pub fn settings() -> Settings {
    Settings::standalone("/data")
}

pub fn view<'a>(world: &'a World, settings: &'a Settings) -> View<'a> {
    View { now: Timestamp::UNIX_EPOCH, world, settings }
}

/// A world that plans are carried out on.
#[derive(Clone)]
pub struct Cluster {
    pub world: World,
    pub settings: Settings,
    pub now: Timestamp,
    pub events: Vec<EventRecord>,
    revision: u64,
}

impl Cluster {
    /// An empty cluster whose ledger has been there for a while.
    pub fn new() -> Self {
        Self::of(Installation::default())
    }

    /// The same where godwit is installed there.
    pub fn of(installation: Installation) -> Self {
        let mut cluster = Self {
            world: World::of(installation),
            settings: settings(),
            now: Timestamp::from_second(1_000_000).unwrap(),
            events: Vec::new(),
            revision: 0,
        };
        let ledger = crate::turns::reference(cluster.world.installation()).name;
        cluster.put(
            Kind::ConfigMap,
            json!({"metadata": {
                "namespace": ledger.namespace, "name": ledger.name, "creationTimestamp": "1970-01-01T00:00:00Z",
            }}),
        );
        cluster
    }

    pub fn pass(&mut self, seconds: i64) {
        self.now += SignedDuration::from_secs(seconds);
    }

    pub fn get(&self, kind: Kind, name: &Name) -> Option<Value> {
        self.world.get(kind, name).map(|object| object.to_value().unwrap())
    }

    /// Stores an object as a server would: with a UID, a creation time and a new revision.
    pub fn put(&mut self, kind: Kind, mut value: Value) {
        self.revision += 1;
        self.world.set_clock(self.now);
        let revision = self.revision;
        let metadata = &mut value["metadata"];
        if metadata.get("uid").is_none() {
            metadata["uid"] = json!(format!("uid-{revision}"));
        }
        if metadata.get("creationTimestamp").is_none() {
            metadata["creationTimestamp"] = json!(self.now.to_string());
        }
        metadata["resourceVersion"] = json!(revision.to_string());
        let gone = metadata.get("deletionTimestamp").is_some_and(|at| !at.is_null())
            && metadata.get("finalizers").is_none_or(|all| all.as_array().is_none_or(Vec::is_empty));
        let object = Object::from_value(kind, value).unwrap();
        if gone && kind != Kind::Pod {
            self.world.delete(&object, Source::Watch);
        } else {
            self.world.apply(object, Source::Watch);
        }
    }

    /// Changes an object in place with a merge patch.
    pub fn patch(&mut self, kind: Kind, name: &Name, patch: Value) {
        let mut value = self.get(kind, name).unwrap();
        merge(&mut value, &patch);
        self.put(kind, value);
    }

    pub fn remove(&mut self, kind: Kind, name: &Name) {
        self.world.forget(kind, name);
    }

    /// Asks for deletion as a user would.
    pub fn delete(&mut self, target: &Ref) {
        let Some(mut value) = self.get(target.kind, &target.name) else { return };
        if value["metadata"].get("deletionTimestamp").is_none_or(Value::is_null) {
            value["metadata"]["deletionTimestamp"] = json!(self.now.to_string());
        }
        self.put(target.kind, value);
    }

    pub fn decide(&self, key: &Key) -> Plan {
        let plan = key.decide(&View { now: self.now, world: &self.world, settings: &self.settings });
        check_rights(key, &plan, self.world.installation());
        plan
    }

    /// Decides about a key and carries the plan out. Says whether anything was written.
    pub fn step(&mut self, key: &Key) -> bool {
        let plan = self.decide(key);
        let quiet = plan.is_quiet();
        self.carry_out(plan);
        !quiet
    }

    /// Decides about everything until nothing is written any more.
    pub fn settle(&mut self) {
        for _ in 0..200 {
            let mut wrote = false;
            for key in Key::all(&self.world) {
                wrote |= self.step(&key);
            }
            if !wrote {
                return;
            }
        }
        panic!(
            "decisions never come to rest: {:#?}",
            Key::all(&self.world).iter().map(|k| self.decide(k).effects).collect::<Vec<_>>()
        );
    }

    pub fn carry_out(&mut self, plan: Plan) {
        for effect in plan.effects {
            match effect {
                Effect::Create(object) => {
                    if self.world.get(object.kind(), &object.name()).is_none() {
                        self.put(object.kind(), object.to_value().unwrap());
                    }
                }
                Effect::Patch(target, patch) | Effect::PatchStatus(target, patch) => {
                    let Some(mut value) = self.get(target.kind, &target.name) else { continue };
                    let wanted = patch.pointer("/metadata/resourceVersion");
                    if wanted.is_some() && wanted != value.pointer("/metadata/resourceVersion") {
                        return; // conflict: the plan ends here
                    }
                    merge(&mut value, &patch);
                    self.put(target.kind, value);
                }
                // Nobody has to say that such a pod has ended.
                Effect::Delete { target, grace_seconds: Some(0), .. } if target.kind == Kind::Pod => {
                    self.remove(Kind::Pod, &target.name);
                }
                Effect::Delete { target, .. } => self.delete(&target),
                Effect::Bind { pod, node, .. } => self.patch(Kind::Pod, &pod.name, json!({"spec": {"nodeName": node}})),
                Effect::Evict { pod, uid, or_learn } => match self.refuses_eviction(&pod) {
                    Some(why) if or_learn => self.world.refuse_eviction(&pod.name, &uid, why, self.now),
                    Some(_) => return,
                    None => self.delete(&pod),
                },
                Effect::Confirm { target, revision } => {
                    let held = self.world.get(target.kind, &target.name);
                    if held.and_then(|held| held.metadata().resource_version.clone()) != revision {
                        return; // another one than was decided on: the plan ends here
                    }
                }
                Effect::Record(event) => self.events.push(event),
            }
        }
    }

    /// What the rules say to an eviction; they may mark the pod's VMI.
    fn refuses_eviction(&mut self, pod: &Ref) -> Option<String> {
        let pod = self.get(pod.kind, &pod.name)?;
        if let Some(why) = pod["metadata"]["annotations"]["test/budget"].as_str() {
            return Some(why.to_owned());
        }
        let vmi = eviction::domain_of(&pod)?;
        let name = Name::new(pod["metadata"]["namespace"].as_str().unwrap(), vmi.as_str());
        let vmi = self.get(Kind::VirtualMachineInstance, &name);
        let asked = eviction::Eviction {
            pod: &pod,
            vmi: vmi.as_ref().ok_or_else(|| eviction::not_found(&name.name)),
            eviction: &json!({}),
            cluster_strategy: None,
        };
        match eviction::evict(&asked) {
            eviction::Answer::Allowed => None,
            eviction::Answer::Refused(denial) => Some(denial.text().to_owned()),
            eviction::Answer::Marks(mark, denial) => {
                self.patch(Kind::VirtualMachineInstance, &name, mark.patch);
                Some(denial.text().to_owned())
            }
        }
    }

    pub fn has_event(&self, reason: &str, text: &str) -> bool {
        self.events.iter().any(|event| event.reason == reason && event.message.contains(text))
    }

    /// Plays the kubelet: starts pods that have a node, removes pods that are being deleted.
    pub fn run_kubelets(&mut self) {
        for name in self.world.names_of(Kind::Pod) {
            let pod = self.get(Kind::Pod, &name).unwrap();
            if pod["metadata"].get("deletionTimestamp").is_some_and(|at| !at.is_null()) {
                self.remove(Kind::Pod, &name);
            } else if pod["spec"]["nodeName"].is_string() && pod["status"]["phase"].is_null() {
                self.patch(Kind::Pod, &name, json!({"status": {
                    "phase": "Running",
                    "conditions": [{"type": "Ready", "status": "True"}, {"type": "PodScheduled", "status": "True"}],
                    "containerStatuses": [{"name": "compute", "ready": true, "image": "i", "imageID": "i", "restartCount": 0}],
                }}));
            }
        }
    }

    pub fn add_node(&mut self, name: &str) {
        self.put(Kind::Node, json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "kubevirt.io/schedulable": "true"}},
            "status": {
                "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"},
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }));
    }
}

/// Nothing is decided that the controllers' account may not do, where Kubernetes does its own work.
fn check_rights(key: &Key, plan: &Plan, installation: &Installation) {
    let may = |effect: &Effect| may(&effect.right(), key.noun(), installation);
    assert!(plan.effects.iter().all(may), "{key}: not all of this is allowed to {}: {plan:?}", access::CONTROLLER);
}

/// Whether the controllers' account has this right, for decisions of this noun.
fn may(right: &Right<'_>, noun: Noun, installation: &Installation) -> bool {
    let namespace = installation.namespace();
    let account = access::components().into_iter().find(|account| account.name == access::CONTROLLER).unwrap();
    // The manifests bring the namespaces of leases; beside a bare server nobody has applied them.
    let kubernetes_own = !Noun::CLUSTER.contains(&noun) || noun == Noun::Node || right.resource == "namespaces";
    account.may(right, namespace) || (kubernetes_own && access::engine_room().may(right, namespace))
}

#[test]
fn all_that_is_watched_may_be_seen() {
    let seen = |kind: Kind, noun| {
        let namespace = kind.only_in(&Installation::USUAL).unwrap_or_default();
        let right = |verb| Right { verb, group: kind.group(), resource: kind.plural(), subresource: "", namespace };
        ["get", "list", "watch"].into_iter().all(|verb| may(&right(verb), noun, &Installation::USUAL))
    };
    for kind in kinds_for(Noun::CLUSTER) {
        assert!(seen(kind, Noun::Vm), "{}", kind.plural());
    }
    for kind in kinds_for(Noun::BARE) {
        assert!(seen(kind, Noun::Placement), "{}", kind.plural());
    }
}

fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let map = target.as_object_mut().unwrap();
    for (key, value) in patch {
        if value.is_null() {
            map.remove(key);
        } else {
            merge(map.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// Kubernetes' profile "restricted", rule by rule, without those about what the pod never has (host ports, sysctls, Windows …),
/// which are refused as a whole: only what is known here may be in a pod at all.
pub fn breaks_restricted(pod: &Pod) -> Vec<String> {
    let spec = serde_json::to_value(pod.spec.as_ref().unwrap()).unwrap();
    let mut broken = Vec::new();
    let mut rule = |holds: bool, rule: &str| {
        if !holds {
            broken.push(rule.to_owned());
        }
    };
    let volumes = [
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    ];
    for volume in spec["volumes"].as_array().unwrap() {
        let kinds = volume.as_object().unwrap().keys().filter(|key| *key != "name");
        rule(kinds.into_iter().all(|kind| volumes.contains(&kind.as_str())), "restricted volume types");
    }
    for host in ["hostNetwork", "hostPID", "hostIPC"] {
        rule(spec[host].as_bool() != Some(true), host);
    }
    let whole = &spec["securityContext"];
    let known = ["runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy", "seccompProfile"];
    rule(whole.as_object().unwrap().keys().all(|key| known.contains(&key.as_str())), "another field of the pod");
    rule(spec["initContainers"].is_null(), "other containers");
    for container in spec["containers"].as_array().unwrap() {
        let own = &container["securityContext"];
        let known = ["allowPrivilegeEscalation", "privileged", "capabilities"];
        rule(
            own.as_object().unwrap().keys().all(|key| known.contains(&key.as_str())),
            "another field of the container",
        );
        rule(own["allowPrivilegeEscalation"] == json!(false), "allowPrivilegeEscalation != false");
        rule(own["privileged"] != json!(true), "privileged");
        rule(
            own["capabilities"]["drop"].as_array().is_some_and(|drop| drop.contains(&json!("ALL"))),
            "capabilities.drop",
        );
        let added = own["capabilities"]["add"].as_array().into_iter().flatten();
        rule(added.into_iter().all(|name| name == "NET_BIND_SERVICE"), "unrestricted capabilities");
        let ports = container["ports"].as_array().into_iter().flatten();
        rule(ports.into_iter().all(|port| port["hostPort"].is_null()), "host ports");
    }
    rule(whole["runAsNonRoot"] == json!(true), "runAsNonRoot != true");
    rule(whole["runAsUser"] != json!(0), "runAsUser=0");
    rule(whole["seccompProfile"]["type"] == "RuntimeDefault", "seccompProfile");
    broken
}
