//! Carries out the effects of a plan, and learns from the answers.

use godwit_control::names::LABEL_MIGRATION_JOB_UID;
use godwit_control::{Effect, EventRecord, EventType, Kind, Name, Object, Ref, Stored as _, VM_CONTROLLER};
use kube::Client;
use kube::core::Request;
use kube::core::params::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::response::Status;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::debug;

use crate::leader::Until;

/// Name under which the controllers write.
const FIELD_MANAGER: &str = "virt-controller";

/// What an answer taught about an object.
pub enum Learned {
    /// It exists in this state.
    Here(Object),
    /// It does not exist.
    Gone(Ref),
    /// The server would not make this target pod of a migration, in its own words.
    Refused(Ref, String),
    /// The server would not evict this pod with this UID now, in its own words.
    NotEvicted(Ref, String, String),
}

/// Why a plan was not carried out to its end.
pub enum Failure {
    /// Somebody else has written in between; the fresh state is among what was learned.
    Conflict,
    /// The server refused or could not be reached.
    Refused(String),
    /// The lease ran out before the plan's next effect: somebody else may decide by now.
    Deposed,
}

/// Writes to the API server.
#[derive(Clone)]
pub struct Executor {
    /// As who to write.
    pub client: Client,
    /// As who to write what a scheduler may not: the ledger of migrations. As `client` when there is none.
    pub controller: Option<Client>,
    /// Where events go.
    pub events: mpsc::Sender<EventRecord>,
    /// Until when this controller decides; none where nobody else does.
    pub leads: Option<watch::Receiver<Until>>,
}

/// The path of a kind's collection; in all namespaces when `namespace` is empty.
pub fn path(kind: Kind, namespace: &str) -> String {
    let root = if kind.group().is_empty() { "/api/v1".to_owned() } else { format!("/apis/{}", kind.api_version()) };
    match namespace {
        "" => format!("{root}/{}", kind.plural()),
        namespace => format!("{root}/namespaces/{namespace}/{}", kind.plural()),
    }
}

fn requests(target: &Ref) -> Request {
    Request::new(path(target.kind, &target.name.namespace))
}

fn status_of(error: &kube::Error) -> Option<&Status> {
    match error {
        kube::Error::Api(status) => Some(status),
        _ => None,
    }
}

fn is(error: &kube::Error, code: u16) -> bool {
    status_of(error).is_some_and(|status| status.code == code)
}

fn refused(what: &str, error: &kube::Error) -> Failure {
    Failure::Refused(format!("{what}: {error}"))
}

impl Executor {
    /// Carries out effects in order and stops at the first that fails. What was learned on the way is returned in any case.
    /// `seen` are the revisions on which the plan was decided.
    ///
    /// Every write of what exists carries a revision, so that nobody's writes succeed who decided on less than the others know:
    /// a leader that was stopped, or cut off, and has been deposed meanwhile. What is made has a name that follows from what it
    /// is made for, and is made once. What carries no revision (what is made, bindings and evictions) is not begun any more once the
    /// lease has run out, as nothing else is.
    pub async fn carry_out(&self, effects: Vec<Effect>, seen: &Seen) -> (Vec<Learned>, Result<(), Failure>) {
        let mut learned = Vec::new();
        for effect in effects {
            if !self.leads() {
                return (learned, Err(Failure::Deposed));
            }
            if let Err(failure) = self.carry_out_one(effect, seen, &mut learned).await {
                return (learned, Err(failure));
            }
        }
        (learned, Ok(()))
    }

    /// Whether this controller still decides.
    fn leads(&self) -> bool {
        let until = self.leads.as_ref().map(|leads| *leads.borrow());
        until.is_none_or(|until| until.is_some_and(|until| Instant::now() < until))
    }

    /// The same in the controller's name.
    fn as_controller(&self) -> Self {
        let client = self.controller.clone().unwrap_or_else(|| self.client.clone());
        Self { client, controller: None, ..self.clone() }
    }

    async fn carry_out_one(&self, effect: Effect, seen: &Seen, learned: &mut Vec<Learned>) -> Result<(), Failure> {
        match effect {
            Effect::Create(object) => self.create(&object, learned).await,
            Effect::Patch(target, patch) if target.kind == Kind::ConfigMap => {
                let patch = guarded(&target, patch, seen, learned);
                self.as_controller().patch(target, None, patch, learned).await
            }
            Effect::Patch(target, patch) => {
                let patch = guarded(&target, patch, seen, learned);
                self.patch(target, None, patch, learned).await
            }
            Effect::PatchStatus(target, patch) => {
                let patch = guarded(&target, patch, seen, learned);
                self.patch(target, Some("status"), patch, learned).await
            }
            Effect::Delete { target, uid, grace_seconds } => {
                let preconditions = Preconditions {
                    uid: Some(uid).filter(|uid| !uid.is_empty()),
                    resource_version: revision(&target, seen, learned),
                };
                self.delete(target, preconditions, grace_seconds, learned).await
            }
            Effect::Bind { pod, uid, node } => {
                let binding = json!({
                    "apiVersion": "v1",
                    "kind": "Binding",
                    "metadata": {"name": pod.name.name, "namespace": pod.name.namespace, "uid": uid},
                    "target": {"apiVersion": "v1", "kind": "Node", "name": node},
                });
                self.post_to(&pod, "binding", &binding, false, learned).await
            }
            Effect::Confirm { target, revision } => {
                let found = self.look(&target, learned).await?;
                let found = found.and_then(|object| object.metadata().resource_version.clone());
                if found == revision { Ok(()) } else { Err(Failure::Conflict) }
            }
            Effect::Evict { pod, uid, or_learn } => {
                let eviction = json!({
                    "apiVersion": "policy/v1",
                    "kind": "Eviction",
                    "metadata": {"name": pod.name.name, "namespace": pod.name.namespace},
                    "deleteOptions": {"preconditions": {"uid": uid}},
                });
                self.post_to(&pod, "eviction", &eviction, or_learn, learned).await
            }
            Effect::Record(event) => {
                // Events are told on the side; a full queue means that more is told than anybody reads.
                if self.events.try_send(event).is_err() {
                    debug!("event dropped: too many at once");
                }
                Ok(())
            }
        }
    }

    async fn send(
        &self,
        request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<Value, kube::Error> {
        let request = request.map_err(kube::Error::BuildRequest)?;
        self.client.request::<Value>(request).await
    }

    /// Reads the fresh state of an object.
    async fn look(&self, target: &Ref, learned: &mut Vec<Learned>) -> Result<Option<Object>, Failure> {
        match self.send(requests(target).get(&target.name.name, &Default::default())).await {
            Ok(value) => {
                let object = Object::from_value(target.kind, value)
                    .map_err(|error| Failure::Refused(format!("{target} cannot be read: {error}")))?
                    .lean();
                learned.push(Learned::Here(object.clone()));
                Ok(Some(object))
            }
            Err(error) if is(&error, 404) => {
                learned.push(Learned::Gone(target.clone()));
                Ok(None)
            }
            Err(error) => Err(refused(&format!("reading {target}"), &error)),
        }
    }

    fn learn(&self, kind: Kind, value: Value, learned: &mut Vec<Learned>) {
        // An answer that is no object of the kind (a Status) teaches nothing; the watch will.
        if let Ok(object) = Object::from_value(kind, value)
            && !object.name().name.is_empty()
        {
            learned.push(Learned::Here(object.lean()));
        }
    }

    async fn create(&self, object: &Object, learned: &mut Vec<Learned>) -> Result<(), Failure> {
        let target = object.reference();
        let failed = |error: String| Failure::Refused(format!("creating {target}: {error}"));
        let value = object.to_value().map_err(|error| failed(error.to_string()))?;
        let body = serde_json::to_vec(&value).map_err(|error| failed(error.to_string()))?;
        let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
        match self.send(requests(&target).create(&params, body)).await {
            Ok(value) => {
                self.learn(target.kind, value, learned);
                Ok(())
            }
            Err(error) if is(&error, 409) => match self.look(&target, learned).await? {
                Some(found) if same_owner(object, &found) => Ok(()),
                Some(_) => Err(failed("the name is taken by an object that is not ours".to_owned())),
                None => Err(Failure::Conflict),
            },
            Err(error) => {
                self.tell_owner(object, &error);
                // What only asking again may change is no refusal.
                let refusal = status_of(&error).filter(|status| matches!(status.code, 400 | 403 | 422));
                if let (Object::Pod(pod), Some(status)) = (object, refusal)
                    && pod.label(LABEL_MIGRATION_JOB_UID).is_some()
                {
                    learned.push(Learned::Refused(target.clone(), status.message.clone()));
                }
                Err(refused(&format!("creating {target}"), &error))
            }
        }
    }

    /// That a pod cannot be made, the owner's `kubectl describe` shall say.
    fn tell_owner(&self, object: &Object, error: &kube::Error) {
        let (Object::Pod(pod), Some(status)) = (object, status_of(error)) else { return };
        let owners = pod.metadata.owner_references.iter().flatten();
        for owner in owners.filter(|owner| owner.kind == Kind::VirtualMachineInstance.kind()) {
            let _ = self.events.try_send(EventRecord {
                target: Ref::new(Kind::VirtualMachineInstance, Name::new(pod.namespace(), owner.name.as_str())),
                uid: owner.uid.clone(),
                resource_version: String::new(),
                type_: EventType::Warning,
                reason: "FailedCreate".to_owned(),
                message: format!("Error creating pod: {}", status.message),
                component: VM_CONTROLLER,
            });
        }
    }

    async fn patch(
        &self,
        target: Ref,
        subresource: Option<&str>,
        patch: Value,
        learned: &mut Vec<Learned>,
    ) -> Result<(), Failure> {
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let (patch, name) = (Patch::Merge(patch), target.name.name.as_str());
        let request = match subresource {
            Some(subresource) => requests(&target).patch_subresource(subresource, name, &params, &patch),
            None => requests(&target).patch(name, &params, &patch),
        };
        match self.send(request).await {
            Ok(value) => {
                self.learn(target.kind, value, learned);
                Ok(())
            }
            Err(error) if is(&error, 409) => {
                debug!(%target, "written by somebody else in between");
                self.look(&target, learned).await?;
                Err(Failure::Conflict)
            }
            Err(error) if is(&error, 404) => {
                learned.push(Learned::Gone(target));
                Err(Failure::Conflict)
            }
            Err(error) => Err(refused(&format!("writing {target}"), &error)),
        }
    }

    async fn delete(
        &self,
        target: Ref,
        preconditions: Preconditions,
        grace_seconds: Option<u32>,
        learned: &mut Vec<Learned>,
    ) -> Result<(), Failure> {
        let params = DeleteParams {
            grace_period_seconds: grace_seconds,
            preconditions: Some(preconditions),
            ..DeleteParams::background()
        };
        match self.send(requests(&target).delete(&target.name.name, &params)).await {
            Ok(value) if value.get("kind").and_then(Value::as_str) == Some("Status") => {
                // Gone, or going: only a look tells.
                self.look(&target, learned).await.map(|_| ())
            }
            Ok(value) => {
                // The answer may be the last state of an object that is gone already.
                let going = value.pointer("/metadata/deletionTimestamp").is_some_and(|at| !at.is_null());
                if going {
                    self.look(&target, learned).await.map(|_| ())
                } else {
                    learned.push(Learned::Gone(target));
                    Ok(())
                }
            }
            Err(error) if is(&error, 404) => {
                learned.push(Learned::Gone(target));
                Ok(())
            }
            Err(error) if is(&error, 409) => {
                self.look(&target, learned).await?;
                Err(Failure::Conflict)
            }
            Err(error) => Err(refused(&format!("deleting {target}"), &error)),
        }
    }

    async fn post_to(
        &self,
        pod: &Ref,
        subresource: &str,
        body: &Value,
        or_learn: bool,
        learned: &mut Vec<Learned>,
    ) -> Result<(), Failure> {
        let what = format!("{subresource} of {pod}");
        let uid = body.pointer("/deleteOptions/preconditions/uid").and_then(Value::as_str).unwrap_or_default();
        let uid = uid.to_owned();
        let body = serde_json::to_vec(body).map_err(|error| Failure::Refused(format!("{what}: {error}")))?;
        let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
        let request = requests(pod).create_subresource(subresource, &pod.name.name, &params, body);
        match self.send(request).await {
            // The answer is no pod, and the next decision must know.
            Ok(_) => self.look(pod, learned).await.map(|_| ()),
            // It has gone by itself, or is another one by now: nobody need be asked.
            Err(error) if or_learn && (is(&error, 409) || is(&error, 404)) => self.look(pod, learned).await.map(|_| ()),
            Err(error) if is(&error, 409) || is(&error, 404) => {
                self.look(pod, learned).await?;
                Err(Failure::Conflict)
            }
            Err(error) => match status_of(&error).filter(|_| or_learn) {
                // Also what it calls its own fault (a pod with two budgets): the pods after this one are not to wait for it.
                Some(status) => {
                    let why = match status.message.as_str() {
                        "" => format!("the server answered {}", status.code),
                        why => why.to_owned(),
                    };
                    learned.push(Learned::NotEvicted(pod.clone(), uid, why));
                    Ok(())
                }
                None => Err(refused(&what, &error)),
            },
        }
    }
}

/// The revisions of the objects that a plan is to write, as they were known when it was decided.
pub type Seen = Vec<(Ref, String)>;

/// The revision that a write is to carry: the one that an earlier write of the plan has made, else the one that was decided on.
fn revision(target: &Ref, seen: &Seen, learned: &[Learned]) -> Option<String> {
    let made = learned.iter().rev().find_map(|piece| match piece {
        Learned::Here(object) if object.reference() == *target => object.metadata().resource_version.clone(),
        _ => None,
    });
    made.or_else(|| seen.iter().find(|(other, _)| other == target).map(|(_, revision)| revision.clone()))
}

/// A patch with the revision that it is to carry, unless the decision has given it one.
fn guarded(target: &Ref, mut patch: Value, seen: &Seen, learned: &[Learned]) -> Value {
    if patch.pointer("/metadata/resourceVersion").is_none()
        && let Some(revision) = revision(target, seen, learned)
    {
        patch["metadata"]["resourceVersion"] = revision.into();
    }
    patch
}

/// Whether an object that exists already is the one that was to be made.
fn same_owner(wanted: &Object, found: &Object) -> bool {
    let controller = |object: &Object| {
        let owners = object.metadata().owner_references.iter().flatten();
        owners.filter(|owner| owner.controller == Some(true)).map(|owner| owner.uid.clone()).next()
    };
    controller(wanted) == controller(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert_eq!(path(Kind::Pod, "default"), "/api/v1/namespaces/default/pods");
        assert_eq!(path(Kind::Node, ""), "/api/v1/nodes");
        assert_eq!(path(Kind::KubeVirt, "kubevirt"), "/apis/kubevirt.io/v1/namespaces/kubevirt/kubevirts");
    }
}
