//! KubeVirt's subresources (functions of `api`) as actions of the embedded API server.

use crate::admission::ByKind;
use godwit_api::names::{GROUP, KUBEVIRT_NAME, KUBEVIRT_NAMESPACE, OWN_USERS_PREFIX};
use godwit_api::subresources::{self, INSTANCES, MACHINES, Refusal, Write};
use godwit_apiserver::{ActionRequest, ActionWrite, Actions, Deed, Lookup, User};
use godwit_machinery::discovery;
use godwit_machinery::resource::{Columns, GroupVersion, Resource};
use godwit_machinery::status::{Cause, Status};
use serde_json::Value;

/// The plugin.
pub struct KubeVirtActions;

impl Actions for KubeVirtActions {
    fn resources(&self) -> Vec<Resource> {
        let kinds = [("VirtualMachine", MACHINES), ("VirtualMachineInstance", INSTANCES)];
        subresources::VERSIONS
            .iter()
            .flat_map(|version| kinds.map(|(kind, plural)| resource(version, kind, plural)))
            .collect()
    }

    fn act(&self, request: &ActionRequest<'_>) -> Result<Deed, Status> {
        let lookup = ByKind(request.lookup);
        let decided = subresources::decide(&subresources::Request {
            resource: request.resource,
            action: request.action,
            namespace: request.namespace,
            name: request.name,
            body: request.body,
            user: &request.user.name,
            lookup: &lookup,
        });
        let deed = decided.map_err(|refusal| status(refusal, request))?;
        Ok(Deed {
            code: deed.code,
            writes: deed.writes.into_iter().map(write).collect(),
            user: User::new(format!("{OWN_USERS_PREFIX}kubevirt-apiserver"), &["system:serviceaccounts"]),
            dry_run: deed.dry_run,
        })
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
        gettable: Vec::new(),
        storage: true,
    }
}
