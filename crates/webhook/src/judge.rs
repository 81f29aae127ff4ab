//! A review, put to the rules.

use godwit_api::admission::eviction::{self, Answer as Evicted, Eviction, Mark};
use godwit_api::admission::{self, Denial, Lookup, Operation, Request, User};
use godwit_api::names::{KUBEVIRT_NAME, KUBEVIRT_NAMESPACE};
use kube::Client;
use kube::api::{Patch, PatchParams};
use serde_json::Value;

use crate::answer::Answer;
use crate::facts::{api, ask};
use crate::review::Review;
use crate::routes::{Act, Route};

/// What becomes of the request that is reviewed.
pub async fn judge(client: &Client, route: &Route, review: &Review) -> Answer {
    let user = review.user();
    let verdict: Result<Result<Answer, Box<Denial>>, _> = match route.act {
        Act::Mutate => {
            ask(client, |lookup| {
                let mutation = admission::mutate(&request(review, &user, lookup))?;
                Ok(Answer::Changed(mutation.object, mutation.warnings))
            })
            .await
        }
        Act::Validate => {
            ask(client, |lookup| Ok(Answer::Allowed(admission::validate(&request(review, &user, lookup))?))).await
        }
        Act::Evict => return evict(client, review).await,
    };
    match verdict {
        Ok(Ok(answer)) => answer,
        Ok(Err(denial)) => Answer::Denied(denial),
        Err(error) => Answer::Failed(not_asked(&error)),
    }
}

fn request<'a>(review: &'a Review, user: &'a User, lookup: &'a dyn Lookup) -> Request<'a> {
    Request {
        operation: review.operation(),
        group: &review.kind.group,
        version: &review.kind.version,
        kind: &review.kind.kind,
        resource: &review.resource.resource,
        subresource: &review.sub_resource,
        namespace: &review.namespace,
        name: &review.name,
        object: review.object.as_ref(),
        old_object: review.old_object.as_ref().filter(|_| review.operation() == Operation::Update),
        user,
        dry_run: review.dry_run(),
        lookup,
    }
}

fn not_asked(error: &crate::facts::Error) -> String {
    format!("godwit's rules could not be asked: {error}; try again")
}

/// How often a mark is decided anew because somebody else wrote the VMI meanwhile.
const ATTEMPTS: usize = 5;

async fn evict(client: &Client, review: &Review) -> Answer {
    let mut last = String::new();
    for _ in 0..ATTEMPTS {
        match ask(client, |lookup| may_go(lookup, review)).await {
            Err(error) => return Answer::Failed(not_asked(&error)),
            Ok(Evicted::Allowed) => return Answer::Allowed(Vec::new()),
            Ok(Evicted::Refused(denial)) => return Answer::Denied(denial),
            Ok(Evicted::Marks(_, denial)) if review.dry_run() => return Answer::Denied(denial),
            Ok(Evicted::Marks(mark, denial)) => match write(client, &mark).await {
                Ok(()) => return Answer::Denied(denial),
                Err(kube::Error::Api(status)) if status.code == 409 => last = status.message,
                Err(error) => return Answer::Denied(eviction::not_marked(&error.to_string())),
            },
        }
    }
    Answer::Denied(eviction::not_marked(&last))
}

fn may_go(lookup: &dyn Lookup, review: &Review) -> Evicted {
    let Some(pod) = lookup.get("Pod", &review.namespace, &review.name) else { return Evicted::Allowed };
    let Some(name) = eviction::domain_of(&pod) else { return Evicted::Allowed };
    let vmi = lookup.get("VirtualMachineInstance", &review.namespace, &name);
    let kubevirt = lookup.get("KubeVirt", KUBEVIRT_NAMESPACE, KUBEVIRT_NAME).unwrap_or_default();
    eviction::evict(&Eviction {
        pod: &pod,
        vmi: vmi.as_ref().ok_or_else(|| eviction::not_found(&name)),
        eviction: review.object.as_ref().unwrap_or(&Value::Null),
        cluster_strategy: kubevirt.pointer("/spec/configuration/evictionStrategy").and_then(Value::as_str),
    })
}

async fn write(client: &Client, mark: &Mark) -> Result<(), kube::Error> {
    let vmis = api(client, "VirtualMachineInstance", &mark.namespace);
    vmis.patch(&mark.name, &PatchParams::default(), &Patch::Merge(&mark.patch)).await.map(drop)
}
