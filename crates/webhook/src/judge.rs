//! A review, put to the rules.

use godwit_api::admission::eviction::{self, Answer as Evicted, Eviction, Mark};
use godwit_api::admission::{self, Denial, Lookup, Operation, Request, User};
use kube::api::{Patch, PatchParams};
use serde_json::Value;

use crate::answer::Answer;
use crate::facts::{Cluster, api, ask};
use crate::review::Review;
use crate::routes::{Act, Route};

/// What becomes of the request that is reviewed.
pub async fn judge(cluster: &Cluster, route: &Route, review: &Review) -> Answer {
    let user = review.user();
    let verdict: Result<Result<Answer, Box<Denial>>, _> = match route.act {
        Act::Mutate => {
            ask(cluster, |lookup| {
                let mutation = admission::mutate(&request(review, &user, lookup))?;
                Ok(Answer::Changed(mutation.object, mutation.warnings))
            })
            .await
        }
        Act::Validate => {
            ask(cluster, |lookup| Ok(Answer::Allowed(admission::validate(&request(review, &user, lookup))?))).await
        }
        Act::Evict => return evict(cluster, review).await,
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

async fn evict(cluster: &Cluster, review: &Review) -> Answer {
    let mut last = String::new();
    for _ in 0..ATTEMPTS {
        match ask(cluster, |lookup| may_go(lookup, review)).await {
            Err(error) => return Answer::Failed(not_asked(&error)),
            Ok(Evicted::Allowed) => return Answer::Allowed(Vec::new()),
            Ok(Evicted::Refused(denial)) => return Answer::Denied(denial),
            Ok(Evicted::Marks(_, denial)) if review.dry_run() => return Answer::Denied(denial),
            Ok(Evicted::Marks(mark, denial)) => match write(cluster, &mark).await {
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
    let kubevirt = lookup.kubevirt().unwrap_or_default();
    eviction::evict(&Eviction {
        pod: &pod,
        vmi: vmi.as_ref().ok_or_else(|| eviction::not_found(&name)),
        eviction: review.object.as_ref().unwrap_or(&Value::Null),
        cluster_strategy: kubevirt.pointer("/spec/configuration/evictionStrategy").and_then(Value::as_str),
    })
}

async fn write(cluster: &Cluster, mark: &Mark) -> Result<(), kube::Error> {
    let vmis = api(&cluster.client, "VirtualMachineInstance", &mark.namespace);
    vmis.patch(&mark.name, &PatchParams::default(), &Patch::Merge(&mark.patch)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use godwit_api::Installation;
    use serde_json::json;

    use super::*;
    use crate::facts::tests::{at, cluster};
    use crate::routes;

    /// What becomes of the eviction of a guest without a strategy of its own, where the KubeVirt object in this namespace has one for
    /// all, and godwit is installed elsewhere.
    async fn of_eviction(configured_in: &str) -> Answer {
        let core = "/api/v1/namespaces/ns/pods/launcher".to_owned();
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "status": {"phase": "Running"}, "spec": {"nodeName": "node1"},
            "metadata": {"name": "launcher", "namespace": "ns", "labels": {"kubevirt.io": "virt-launcher"},
                "annotations": {"kubevirt.io/domain": "db"}},
        });
        let group = "/apis/kubevirt.io/v1/namespaces";
        let vmi = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
            "metadata": {"name": "db", "namespace": "ns", "resourceVersion": "7"}, "spec": {"domain": {"devices": {}}},
            "status": {"phase": "Running", "nodeName": "node1", "conditions": [{"type": "LiveMigratable", "status": "True"}]},
        });
        let kubevirt = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt", "metadata": {"name": "kubevirt", "namespace": configured_in},
            "spec": {"configuration": {"evictionStrategy": "LiveMigrate"}},
        });
        let objects = vec![
            (core, pod),
            (format!("{group}/ns/virtualmachineinstances/db"), vmi),
            (format!("{group}/{configured_in}/kubevirts/kubevirt"), kubevirt),
        ];
        let cluster = Cluster { installation: Installation::new("elsewhere"), ..cluster(objects, 404).await };
        let review: Review = serde_json::from_value(json!({
            "uid": "u", "kind": {"group": "policy", "version": "v1", "kind": "Eviction"},
            "resource": {"group": "", "version": "v1", "resource": "pods"}, "subResource": "eviction",
            "namespace": "ns", "name": "launcher", "operation": "CREATE", "userInfo": {"username": "jane"}, "dryRun": true,
        }))
        .unwrap();
        judge(&cluster, routes::of("/pod-eviction-validate").unwrap(), &review).await
    }

    #[tokio::test]
    async fn the_kubevirt_object_of_the_installation_counts_and_no_other() {
        let Answer::Denied(denial) = of_eviction("elsewhere").await else { panic!("it is granted") };
        assert!(denial.text().contains("Eviction triggered evacuation of VMI"), "{}", denial.text());
        assert!(matches!(of_eviction("kubevirt").await, Answer::Allowed(_)));
    }

    /// An installation's network for migrations can be set while its nodes cannot be read, of which it would be warned.
    #[tokio::test]
    async fn what_is_only_worth_a_warning_fails_no_review() {
        let kubevirt = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt", "metadata": {"name": "kubevirt", "namespace": "kubevirt"},
            "spec": {"configuration": {"migrations": {"network": "fast"}}},
        });
        let review: Review = serde_json::from_value(json!({
            "uid": "u", "kind": {"group": "kubevirt.io", "version": "v1", "kind": "KubeVirt"},
            "resource": {"group": "kubevirt.io", "version": "v1", "resource": "kubevirts"}, "namespace": "kubevirt",
            "name": "kubevirt", "operation": "UPDATE", "object": kubevirt, "oldObject": {"spec": {}},
        }))
        .unwrap();
        let update = routes::of("/kubevirt-validate-update").unwrap();
        let node =
            json!({"metadata": {"name": "node1", "annotations": {"kubevirt.io/heartbeat": "2026-11-23T03:00:00Z"}}});
        let nodes = json!({"apiVersion": "v1", "kind": "NodeList", "metadata": {}, "items": [node]});
        let readable = cluster(vec![("/api/v1/nodes".to_owned(), nodes)], 404).await;
        let Answer::Allowed(warnings) = judge(&readable, update, &review).await else { panic!("refused") };
        assert!(warnings.iter().any(|warning| warning.contains("kubevirt/fast: node1;")), "{warnings:?}");
        // It takes connections, and answers nothing.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for unreadable in
            [cluster(Vec::new(), 403).await, cluster(Vec::new(), 500).await, at(silent.local_addr().unwrap())]
        {
            let Answer::Allowed(warnings) = judge(&unreadable, update, &review).await else {
                panic!("refused or failed")
            };
            assert!(warnings.is_empty(), "{warnings:?}");
        }
    }
}
