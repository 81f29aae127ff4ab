//! KubeVirt's admission rules (functions of `api`) as a plugin of the embedded API server.

use godwit_api::Installation;
use godwit_api::admission as rules;
use godwit_api::admission::Lookup as _;
use godwit_api::admission::eviction::Answer;
use godwit_apiserver::{Admission, AdmissionRequest, EvictionVerdict, Lookup, MutateOutcome, Operation, OwnWrite};
use godwit_machinery::status::{Cause, Details, Status};
use serde_json::Value;

const GROUP: &str = "kubevirt.io";

/// The plugin.
pub struct KubeVirtAdmission;

impl Admission for KubeVirtAdmission {
    fn mutate(&self, request: &AdmissionRequest<'_>) -> Result<MutateOutcome, Status> {
        with(request, |rules_request| {
            let mutation = rules::mutate(rules_request).map_err(|denial| status(*denial, request))?;
            Ok(MutateOutcome {
                object: (!mutation.object.is_null()).then_some(mutation.object),
                warnings: mutation.warnings,
            })
        })
    }

    fn validate(&self, request: &AdmissionRequest<'_>) -> Result<Vec<String>, Status> {
        with(request, |rules_request| rules::validate(rules_request).map_err(|denial| status(*denial, request)))
    }

    fn evict(&self, request: &AdmissionRequest<'_>) -> EvictionVerdict {
        eviction(request)
    }
}

fn eviction(request: &AdmissionRequest<'_>) -> EvictionVerdict {
    let allowed = EvictionVerdict { verdict: Ok(Vec::new()), write: None };
    let Some(pod) = request.lookup.get("", "pods", request.namespace, request.name) else { return allowed };
    let Some(name) = rules::eviction::domain_of(&pod) else { return allowed };
    let vmi = request.lookup.get(GROUP, &plural("VirtualMachineInstance"), request.namespace, &name);
    let kubevirt = ByKind(request.lookup).kubevirt();
    let answer = rules::eviction::evict(&rules::eviction::Eviction {
        pod: &pod,
        vmi: vmi.as_deref().ok_or_else(|| rules::eviction::not_found(&name)),
        eviction: request.object.unwrap_or(&Value::Null),
        cluster_strategy: kubevirt.as_ref().and_then(|k| k["spec"]["configuration"]["evictionStrategy"].as_str()),
    });
    match answer {
        Answer::Allowed => allowed,
        Answer::Refused(denial) => EvictionVerdict { verdict: Err(status(*denial, request)), write: None },
        Answer::Marks(mark, denial) => EvictionVerdict {
            verdict: Err(status(*denial, request)),
            write: Some(OwnWrite {
                group: GROUP.to_owned(),
                plural: plural("VirtualMachineInstance"),
                namespace: mark.namespace,
                name: mark.name,
                patch: mark.patch,
                failure: status(*rules::eviction::not_marked(""), request),
            }),
        },
    }
}

fn with<T: Default>(
    request: &AdmissionRequest<'_>,
    rule: impl FnOnce(&rules::Request<'_>) -> Result<T, Status>,
) -> Result<T, Status> {
    let operation = match request.operation {
        Operation::Create => rules::Operation::Create,
        Operation::Update => rules::Operation::Update,
        Operation::Delete => rules::Operation::Delete,
        Operation::Connect => return Ok(T::default()),
    };
    if !rules::concerns(&request.resource.gv.group, &request.resource.kind) {
        return Ok(T::default());
    }
    let user = rules::User {
        name: request.user.name.clone(),
        groups: request.user.groups.clone(),
        extra: request.user.extra.clone(),
    };
    rule(&rules::Request {
        operation,
        group: &request.resource.gv.group,
        version: &request.resource.gv.version,
        kind: &request.resource.kind,
        resource: &request.resource.plural,
        subresource: request.subresource,
        namespace: request.namespace,
        name: request.name,
        object: request.object,
        old_object: request.old_object,
        user: &user,
        dry_run: request.dry_run,
        lookup: &ByKind(request.lookup),
    })
}

fn status(denial: rules::Denial, request: &AdmissionRequest<'_>) -> Status {
    let causes: Vec<Cause> = denial
        .causes
        .into_iter()
        .map(|cause| Cause { reason: cause.reason, message: cause.message, field: cause.field })
        .collect();
    let details = (!causes.is_empty()).then(|| {
        Box::new(Details {
            name: request.name.to_owned(),
            group: request.resource.gv.group.clone(),
            kind: request.resource.kind.clone(),
            causes,
            ..Details::default()
        })
    });
    Status { details, ..Status::new(denial.code, &denial.reason, denial.message) }
}

/// The rules name kinds, the store groups and plurals.
pub(crate) struct ByKind<'a>(pub(crate) &'a dyn Lookup);

fn plural(kind: &str) -> String {
    format!("{}s", kind.to_lowercase())
}

impl rules::Lookup for ByKind<'_> {
    fn installation(&self) -> &Installation {
        &Installation::USUAL
    }

    fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let (group, _, plural) = rules::resource_of(kind);
        self.0.get(group, &plural, namespace, name).map(|object| (*object).clone())
    }

    fn list(&self, kind: &str, namespace: &str, label: Option<(&str, &str)>) -> Vec<Value> {
        let (group, _, plural) = rules::resource_of(kind);
        let carries =
            |object: &Value| label.is_none_or(|(key, value)| object["metadata"]["labels"][key].as_str() == Some(value));
        let all = self.0.list(group, &plural, namespace);
        all.iter().filter(|object| carries(object)).map(|object| (**object).clone()).collect()
    }
}
