//! KubeVirt's subresources (functions of `api`) as actions of the embedded API server.

use crate::admission::ByKind;
use crate::console::{self, Guest};
use godwit_api::names::{GROUP, KUBEVIRT_NAME, KUBEVIRT_NAMESPACE, OWN_USERS_PREFIX};
use godwit_api::subresources::{self, CONSOLE, Decision, Errand, INSTANCES, MACHINES, Refusal, Write};
use godwit_apiserver::{ActionRequest, ActionWrite, Actions, Answer, Deed, Lookup, Outcome, User};
use godwit_handler::front::{CallError, FrontClient, Spot};
use godwit_machinery::discovery;
use godwit_machinery::resource::{Columns, GroupVersion, Resource};
use godwit_machinery::status::{Cause, Status};
use http::Method;
use serde_json::Value;

/// The plugin.
pub struct KubeVirtActions {
    front: FrontClient,
}

impl KubeVirtActions {
    /// With the way to the handlers.
    pub fn new(front: FrontClient) -> Self {
        Self { front }
    }
}

impl Actions for KubeVirtActions {
    fn resources(&self) -> Vec<Resource> {
        let kinds = [("VirtualMachine", MACHINES), ("VirtualMachineInstance", INSTANCES)];
        subresources::VERSIONS
            .iter()
            .flat_map(|version| kinds.map(|(kind, plural)| resource(version, kind, plural)))
            .collect()
    }

    fn act(&self, request: &ActionRequest<'_>) -> Result<Outcome, Status> {
        let lookup = ByKind(request.lookup.as_ref());
        let decided = subresources::decide(&subresources::Request {
            resource: request.resource,
            action: request.action,
            namespace: request.namespace,
            name: request.name,
            body: request.body,
            user: &request.user.name,
            lookup: &lookup,
        });
        match decided.map_err(|refusal| status(refusal, request))? {
            Decision::Deed(deed) => Ok(Outcome::Write(Deed {
                code: deed.code,
                writes: deed.writes.into_iter().map(write).collect(),
                user: User::new(format!("{OWN_USERS_PREFIX}kubevirt-apiserver"), &["system:serviceaccounts"]),
                dry_run: deed.dry_run,
            })),
            Decision::Errand(errand) if errand.action == CONSOLE => {
                let guest = Guest {
                    namespace: request.namespace.to_owned(),
                    name: request.name.to_owned(),
                    uid: errand.vmi_uid,
                    lookup: request.lookup.clone(),
                };
                Ok(Outcome::Stream(console::stream(self.front.clone(), guest, errand.place)?))
            }
            Decision::Errand(errand) => {
                let spot = console::spot(request.lookup.as_ref(), errand.place.clone())?;
                let about = (request.resource.to_owned(), request.name.to_owned());
                Ok(Outcome::Call(Box::pin(run(self.front.clone(), errand, spot, about))))
            }
        }
    }

    fn root(&self, path: &str, lookup: &dyn Lookup) -> Option<Result<Value, Status>> {
        let installation = lookup.get(GROUP, "kubevirts", KUBEVIRT_NAMESPACE, KUBEVIRT_NAME);
        let answer = subresources::root(path, &discovery::version(), installation.as_deref());
        answer.map(Ok).or_else(|| self.unknown("", path).map(Err))
    }

    fn unknown(&self, resource: &str, action: &str) -> Option<Status> {
        let text = subresources::is_missing(resource, action).then(|| subresources::missing(resource, action));
        text.map(|text| Status::new(501, "NotImplemented", text))
    }
}

/// Has the guest's node carry something out.
async fn run(front: FrontClient, errand: Errand, spot: Spot, about: (String, String)) -> Result<Answer, Status> {
    let at = (spot.node.as_str(), spot.address);
    let failed = |error: CallError| match error {
        CallError::Refused { status: 409, message } => {
            let (resource, name) = &about;
            Status::conflict_because(GROUP, resource.strip_suffix('s').unwrap_or(resource), name, &message)
        }
        other => Status::internal_error(other),
    };
    if errand.dry_run {
        return Ok(Answer { code: 200, body: None });
    }
    if !subresources::read(INSTANCES).contains(&errand.action.as_str()) {
        front.call(at, Method::PUT, &spot.pod_uid, &errand.action).await.map_err(failed)?;
        return Ok(Answer { code: 200, body: None });
    }
    let told = front.call(at, Method::GET, &spot.pod_uid, "guest").await.map_err(failed)?;
    let answers = serde_json::from_value(told).map_err(Status::internal_error)?;
    Ok(Answer { code: 200, body: subresources::guest::answer(&errand.action, &answers) })
}

fn write(write: Write) -> ActionWrite {
    let group = GROUP.to_owned();
    match write {
        Write::Patch(patch) => ActionWrite::Patch {
            group,
            plural: patch.resource.to_owned(),
            name: patch.name,
            status: patch.status,
            patch: patch.patch,
        },
        Write::Create { resource, object } => ActionWrite::Create { group, plural: resource.to_owned(), object },
    }
}

fn status(refusal: Refusal, request: &ActionRequest<'_>) -> Status {
    let (resource, name) = (request.resource, request.name);
    match refusal {
        Refusal::BadRequest(why) => Status::bad_request(why),
        Refusal::NotFound(singular) => Status::not_found(GROUP, singular, name),
        Refusal::Conflict(why) => {
            Status::conflict_because(GROUP, resource.strip_suffix('s').unwrap_or(resource), name, &why)
        }
        Refusal::Invalid(causes) => {
            let cause = |cause: godwit_api::admission::Cause| Cause {
                reason: cause.reason,
                message: cause.message,
                field: cause.field,
            };
            let kind = if resource == INSTANCES { "VirtualMachineInstance" } else { "VirtualMachine" };
            Status::invalid(GROUP, kind, name, causes.into_iter().map(cause).collect())
        }
        Refusal::Forbidden(why) => Status::forbidden(GROUP, resource.strip_suffix('s').unwrap_or(resource), name, &why),
        Refusal::Internal(why) => Status::internal_error(why),
    }
}

fn resource(version: &str, kind: &str, plural: &str) -> Resource {
    Resource {
        gv: GroupVersion { group: subresources::GROUP.to_owned(), version: version.to_owned() },
        kind: kind.to_owned(),
        list_kind: format!("{kind}List"),
        plural: plural.to_owned(),
        singular: kind.to_lowercase(),
        short_names: Vec::new(),
        categories: Vec::new(),
        namespaced: true,
        status_subresource: false,
        subresources: subresources::served(plural).iter().map(|action| (*action).to_owned()).collect(),
        schema: Default::default(),
        columns: Columns::Builtin,
        deprecation_warning: None,
        builtin: true,
        virtual_create_only: false,
        actions_only: true,
        gettable: subresources::read(plural).iter().map(|action| (*action).to_owned()).collect(),
        storage: true,
    }
}
