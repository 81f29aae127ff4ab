//! From a request to what is done about it.

use crate::console::{self, Guest};
use crate::objects::Objects;
use crate::screen;
use godwit_api::access::API;
use godwit_api::admission::Lookup;
use godwit_api::names::GROUP;
use godwit_api::subresources::{self, CONSOLE, Decision, Errand, INSTANCES, MACHINES, Refusal, Request, VNC, Write};
use godwit_handler::front::{CallError, FrontClient, Spot};
use godwit_machinery::resource::{Columns, GroupVersion, Resource};
use godwit_machinery::status::{Cause, Status};
use godwit_serving::actions::{ActionWrite, Answer, Deed, Outcome};
use godwit_serving::user::User;
use http::Method;
use serde_json::Value;
use std::sync::Arc;

/// What discovery says of the group, in all of its versions.
pub fn resources() -> Vec<Resource> {
    let kinds = [("VirtualMachine", MACHINES), ("VirtualMachineInstance", INSTANCES)];
    subresources::VERSIONS
        .iter()
        .flat_map(|version| kinds.map(|(kind, plural)| resource(version, kind, plural)))
        .collect()
}

/// What is answered to a path right below a version of the group, such as `version`; none where there is nothing. `kubernetes`
/// is what the API server says of its own version.
pub fn root(path: &str, kubernetes: &Value, lookup: &dyn Lookup) -> Option<Result<Value, Status>> {
    let installation = lookup.kubevirt();
    let answer = subresources::root(path, kubernetes, installation.as_ref());
    answer.map(Ok).or_else(|| unknown("", path).map(Err))
}

/// What is answered to what KubeVirt serves and godwit does not, instead of a plain 404.
pub fn unknown(resource: &str, action: &str) -> Option<Status> {
    let text = subresources::is_missing(resource, action).then(|| subresources::missing(resource, action));
    text.map(|text| Status::new(501, "NotImplemented", text))
}

/// What a request comes to.
#[derive(Clone, Debug)]
pub enum Plan {
    /// Objects are changed.
    Deed(subresources::Deed),
    /// The guest's node carries it out, or knows the answer, at this place.
    Errand(Errand, Spot),
}

/// Decides about a request.
///
/// # Errors
/// The request, or the object as it is, does not allow it.
pub fn plan(request: &Request<'_>) -> Result<Plan, Status> {
    let about = (request.resource, request.name);
    match subresources::decide(request).map_err(|refusal| status(refusal, about))? {
        Decision::Deed(deed) => Ok(Plan::Deed(deed)),
        Decision::Errand(errand) => {
            let spot = console::spot(request.lookup, errand.place.clone())?;
            Ok(Plan::Errand(errand, spot))
        }
    }
}

/// Whose request it is that was decided about.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// `virtualmachines` or `virtualmachineinstances`.
    pub resource: &'a str,
    /// The object's namespace.
    pub namespace: &'a str,
    /// The object's name.
    pub name: &'a str,
    /// The query's parameters.
    pub query: &'a [(String, String)],
}

/// What follows from a plan. `objects` is where a stream looks for its guest.
pub fn outcome(front: &FrontClient, plan: Plan, asked: Asked<'_>, objects: Arc<dyn Objects>) -> Outcome {
    let front = front.clone();
    match plan {
        Plan::Deed(deed) => Outcome::Write(Deed {
            code: deed.code,
            writes: deed.writes.into_iter().map(write).collect(),
            user: User::new(objects.installation().user(API), &["system:serviceaccounts"]),
            dry_run: deed.dry_run,
        }),
        Plan::Errand(errand, spot) if [CONSOLE, VNC].contains(&errand.action.as_str()) => {
            let guest = Guest {
                namespace: asked.namespace.to_owned(),
                name: asked.name.to_owned(),
                uid: errand.vmi_uid,
                objects,
            };
            if errand.action == CONSOLE {
                return Outcome::Stream(console::stream(front, guest, spot));
            }
            let preserve = asked.query.iter().any(|(key, value)| key == "preserveSession" && value == "true");
            Outcome::Stream(screen::stream(front, guest, spot, preserve))
        }
        Plan::Errand(errand, spot) => {
            let about = (asked.resource.to_owned(), asked.name.to_owned());
            Outcome::Call(Box::pin(run(front, errand, spot, about)))
        }
    }
}

/// Has the guest's node carry something out.
async fn run(front: FrontClient, errand: Errand, spot: Spot, about: (String, String)) -> Result<Answer, Status> {
    let at = (spot.node.as_str(), spot.address);
    let failed = |error: CallError| match error {
        CallError::Refused { status: 409, message } => {
            let (resource, name) = &about;
            Status::conflict_because(GROUP, singular(resource), name, &message)
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

fn singular(resource: &str) -> &str {
    resource.strip_suffix('s').unwrap_or(resource)
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

fn status(refusal: Refusal, (resource, name): (&str, &str)) -> Status {
    match refusal {
        Refusal::BadRequest(why) => Status::bad_request(why),
        Refusal::NotFound(singular) => Status::not_found(GROUP, singular, name),
        Refusal::Conflict(why) => Status::conflict_because(GROUP, singular(resource), name, &why),
        Refusal::Invalid(causes) => {
            let cause = |cause: godwit_api::admission::Cause| Cause {
                reason: cause.reason,
                message: cause.message,
                field: cause.field,
            };
            let kind = if resource == INSTANCES { "VirtualMachineInstance" } else { "VirtualMachine" };
            Status::invalid(GROUP, kind, name, causes.into_iter().map(cause).collect())
        }
        Refusal::Forbidden(why) => Status::forbidden(GROUP, singular(resource), name, &why),
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
