//! KubeVirt's subresources (functions of `api`) as actions of the embedded API server.

use godwit_api::admission::hotplug::{self, Machine, Refusal};
use godwit_api::names::{GROUP, OWN_USERS_PREFIX};
use godwit_apiserver::{ActionRequest, Actions, Deed, User};
use godwit_machinery::resource::{Columns, GroupVersion, Resource};
use godwit_machinery::status::{Cause, Status};

const INSTANCES: &str = "virtualmachineinstances";
const MACHINES: &str = "virtualmachines";

/// The plugin.
pub struct KubeVirtActions;

impl Actions for KubeVirtActions {
    fn resources(&self) -> Vec<Resource> {
        let kinds = [("VirtualMachine", MACHINES), ("VirtualMachineInstance", INSTANCES)];
        hotplug::VERSIONS
            .iter()
            .flat_map(|version| kinds.map(|(kind, plural)| resource(version, kind, plural)))
            .collect()
    }

    fn act(&self, request: &ActionRequest<'_>) -> Result<Deed, Status> {
        let ActionRequest { resource, namespace, name, .. } = *request;
        let singular = resource.strip_suffix('s').unwrap_or(resource);
        let found = request.lookup.get(GROUP, resource, namespace, name);
        let object = found.ok_or_else(|| Status::not_found(GROUP, singular, name))?;
        let machine = if resource == INSTANCES { Machine::Instance(&object) } else { Machine::Vm(&object) };
        let patch = hotplug::patch(machine, request.action, request.body).map_err(|refusal| match refusal {
            Refusal::BadRequest(why) => Status::bad_request(why),
            Refusal::Conflict(why) => Status::conflict_because(GROUP, singular, name, &why),
            Refusal::Invalid(causes) => {
                let cause = |cause: godwit_api::admission::Cause| Cause {
                    reason: cause.reason,
                    message: cause.message,
                    field: cause.field,
                };
                let kind = if resource == INSTANCES { "VirtualMachineInstance" } else { "VirtualMachine" };
                Status::invalid(GROUP, kind, name, causes.into_iter().map(cause).collect())
            }
        })?;
        let dry_run = request.body.get("dryRun").and_then(|value| value.as_array());
        Ok(Deed {
            group: GROUP.to_owned(),
            plural: resource.to_owned(),
            patch,
            user: User::new(format!("{OWN_USERS_PREFIX}kubevirt-apiserver"), &["system:serviceaccounts"]),
            dry_run: dry_run.is_some_and(|values| values.iter().any(|value| value == "All")),
        })
    }
}

fn resource(version: &str, kind: &str, plural: &str) -> Resource {
    Resource {
        gv: GroupVersion { group: hotplug::GROUP.to_owned(), version: version.to_owned() },
        kind: kind.to_owned(),
        list_kind: format!("{kind}List"),
        plural: plural.to_owned(),
        singular: kind.to_lowercase(),
        short_names: Vec::new(),
        categories: Vec::new(),
        namespaced: true,
        status_subresource: false,
        subresources: [hotplug::ADD, hotplug::REMOVE].map(str::to_owned).into(),
        schema: Default::default(),
        columns: Columns::Builtin,
        deprecation_warning: None,
        builtin: true,
        virtual_create_only: false,
        actions_only: true,
        storage: true,
    }
}
