//! Objects through the generic handlers, in this process.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "common/api.rs"]
mod api;

use api::Api;
use godwit_apiserver::{Admission, AdmissionRequest, EvictionVerdict, MutateOutcome, Operation, OwnWrite, User};
use godwit_machinery::status::Status;
use godwit_store::Retention;
use http::Method;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const PODS: &str = "/api/v1/namespaces/default/pods";
const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"a": "b"}})
}

fn pod(name: &str, node: Option<&str>) -> Value {
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "x"}},
        "spec": {"containers": [{"name": "c", "image": "i"}]}});
    if let Some(node) = node {
        pod["spec"]["nodeName"] = json!(node);
    }
    pod
}

/// A definition like KubeVirt's of the VMI: two versions, no status subresource.
fn definition() -> Value {
    let schema = json!({"openAPIV3Schema": {"type": "object", "properties": {
        "spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}});
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "vms.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "vms", "kind": "Vm"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": schema},
                {"name": "v1alpha3", "served": true, "storage": false, "schema": schema}]}})
}

async fn with_definition() -> Api {
    let api = Api::start().await;
    api.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &definition()).await.ok();
    api
}

#[tokio::test]
async fn a_life() {
    let api = Api::start().await;
    let made = api.post(MAPS, &map("a")).await.ok();
    assert_eq!(made["metadata"]["namespace"], "default");
    assert!(made["metadata"]["uid"].as_str().is_some_and(|uid| uid.len() == 36));
    assert_eq!(api.get(&format!("{MAPS}/a")).await.ok(), made);
    assert_eq!(api.post(MAPS, &map("a")).await.fails(409), "configmaps \"a\" already exists");

    let mut changed = made.clone();
    changed["data"]["a"] = json!("c");
    changed["metadata"]["uid"] = Value::Null;
    let stored = api.put(&format!("{MAPS}/a"), &changed).await.ok();
    assert_eq!(stored["data"]["a"], "c");
    assert_eq!(stored["metadata"]["uid"], made["metadata"]["uid"]);
    let stale = api.put(&format!("{MAPS}/a"), &changed).await.fails(409);
    assert_eq!(
        stale,
        "Operation cannot be fulfilled on configmaps \"a\": the object has been modified; please apply your changes to the \
         latest version and try again"
    );
    // Nothing changed: nothing is written.
    let again = api.put(&format!("{MAPS}/a"), &stored).await.ok();
    assert_eq!(again["metadata"]["resourceVersion"], stored["metadata"]["resourceVersion"]);

    let deleted = api.delete(&format!("{MAPS}/a")).await.ok();
    assert_eq!((&deleted["status"], &deleted["details"]["uid"]), (&json!("Success"), &made["metadata"]["uid"]));
    assert_eq!(api.get(&format!("{MAPS}/a")).await.fails(404), "configmaps \"a\" not found");
}

#[tokio::test]
async fn names_are_generated_and_dry_runs_leave_nothing() {
    let api = Api::start().await;
    let mut object = map("");
    object["metadata"] = json!({"generateName": "x-"});
    let name = api.post(MAPS, &object).await.ok()["metadata"]["name"].as_str().unwrap().to_owned();
    assert!(name.starts_with("x-") && name.len() == 7, "{name}");
    api.post(&format!("{MAPS}?dryRun=All"), &map("dry")).await.ok();
    api.get(&format!("{MAPS}/dry")).await.fails(404);
    api.delete(&format!("{MAPS}/{name}?dryRun=All")).await.ok();
    api.get(&format!("{MAPS}/{name}")).await.ok();
    api.post(&format!("{MAPS}?dryRun=Some"), &map("dry")).await.fails(400);
}

#[tokio::test]
async fn mistakes_are_explained() {
    let api = Api::start().await;
    let say = |body: &'static str, media: &'static str| {
        let api = &api;
        async move { api.raw(Method::POST, MAPS, &[("content-type", media)], body).await }
    };
    say("{", "application/json").await.fails(400);
    say("", "application/json").await.fails(400);
    say("[]", "application/json").await.fails(400);
    say("{}", "text/html").await.fails(415);
    say("k8s\0rubbish", "application/vnd.kubernetes.protobuf").await.fails(400);
    say("a: [", "application/yaml").await.fails(400);
    let missing = say("{}", "application/json").await.fails(422);
    assert!(missing.contains("name or generateName is required"), "{missing}");
    let kind = api.post(MAPS, &json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}})).await.fails(400);
    assert!(kind.contains("does not match the expected kind"), "{kind}");
    let ty = api.post(MAPS, &json!({"metadata": {"name": "a"}, "data": {"a": 1}})).await.fails(400);
    assert!(ty.contains("cannot unmarshal number"), "{ty}");
    let mut other = map("a");
    other["metadata"]["namespace"] = json!("other");
    api.post(MAPS, &other).await.fails(400);
    let mut odd = map("a");
    odd["odd"] = json!(1);
    let strict = api.post(&format!("{MAPS}?fieldValidation=Strict"), &odd).await.fails(400);
    assert!(strict.contains("unknown field \"odd\""), "{strict}");
    let warned = api.post(MAPS, &odd).await;
    assert_eq!(warned.headers["warning"], "299 - \"unknown field \\\"odd\\\"\"");
    assert!(warned.ok().get("odd").is_none());
    let big = format!("{{\"data\":{{\"a\":\"{}\"}}}}", "x".repeat(3 << 20));
    api.raw(Method::POST, MAPS, &[("content-type", "application/json")], big).await.fails(413);

    api.get("/api/v1/namespaces/default/nonsense").await.fails(404);
    api.get("/apis/no.group/v1/things").await.fails(404);
    api.get(&format!("{PODS}/a/nonsense")).await.fails(404);
    api.raw(Method::POST, "/api/v1/pods", &[], "{}").await.fails(405);
    api.raw(Method::PUT, MAPS, &[], "{}").await.fails(405);
    api.raw(Method::OPTIONS, MAPS, &[], "").await.fails(405);
    api.raw(Method::GET, MAPS, &[("accept", "application/vnd.kubernetes.protobuf")], "").await.fails(406);
    api.get(&format!("{MAPS}?limit=x")).await.fails(400);
    api.get(&format!("{MAPS}?fieldSelector=odd%3Dx")).await.fails(400);
    api.get(&format!("{MAPS}?labelSelector=%2Fx")).await.fails(400);
    api.get(&format!("{MAPS}?continue=x")).await.fails(400);
    api.get(&format!("{MAPS}?resourceVersion=x")).await.fails(422);
    api.get(&format!("{MAPS}?resourceVersion=999999")).await.fails(504);
    api.raw(Method::PATCH, &format!("{MAPS}/a"), &[("content-type", "text/plain")], "{}").await.fails(415);
    api.merge(&format!("{MAPS}/none"), &json!({})).await.fails(404);
    api.post(&format!("{PODS}/none/exec"), &json!({})).await.fails(501);
    api.post(MAPS, &map("p")).await.ok();
    let path = [("content-type", "application/json-patch+json")];
    let patch = r#"[{"op":"remove","path":"/data/none"}]"#;
    api.raw(Method::PATCH, &format!("{MAPS}/p"), &path, patch).await.fails(422);
    api.merge(&format!("{MAPS}/p"), &json!({"metadata": {"name": "q"}})).await.fails(400);
    api.merge(&format!("{MAPS}/p"), &json!({"metadata": {"resourceVersion": "1"}})).await.fails(409);
    api.merge(&format!("{MAPS}/p"), &json!({"metadata": {"labels": {"a b": "c"}}})).await.fails(422);
    assert_eq!(api.get("/nonsense").await.status, 404);
}

#[tokio::test]
async fn lists_page_consistently() {
    let api = Api::start().await;
    for i in 0..7 {
        let mut object = map(&format!("m{i}"));
        object["metadata"]["labels"] = json!({"odd": (i % 2 == 1).to_string()});
        api.post(MAPS, &object).await.ok();
    }
    let names = |list: &Value| -> Vec<String> {
        list["items"].as_array().unwrap().iter().map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let first = api.get(&format!("{MAPS}?limit=3")).await.ok();
    assert_eq!(
        (names(&first), &first["metadata"]["remainingItemCount"]),
        (vec!["m0".into(), "m1".into(), "m2".into()], &json!(4))
    );
    let next = first["metadata"]["continue"].as_str().unwrap();
    // Changes in between do not show.
    api.delete(&format!("{MAPS}/m3")).await.ok();
    api.post(MAPS, &map("m9")).await.ok();
    let rest = api.get(&format!("{MAPS}?limit=10&continue={next}")).await.ok();
    assert_eq!(names(&rest), ["m3", "m4", "m5", "m6"]);
    assert_eq!(rest["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    let odd = api.get(&format!("{MAPS}?limit=1&labelSelector=odd%3Dtrue")).await.ok();
    assert_eq!(names(&odd), ["m1"]);
    let next = odd["metadata"]["continue"].as_str().unwrap();
    assert_eq!(names(&api.get(&format!("{MAPS}?labelSelector=odd%3Dtrue&continue={next}")).await.ok()), ["m5"]);
    let by_name =
        api.get("/api/v1/configmaps?fieldSelector=metadata.name%3Dm4,metadata.namespace%3Ddefault").await.ok();
    assert_eq!(names(&by_name), ["m4"]);
    let exact = first["metadata"]["resourceVersion"].as_str().unwrap();
    let then = api.get(&format!("{MAPS}?resourceVersion={exact}&resourceVersionMatch=Exact")).await.ok();
    assert_eq!(names(&then).len(), 7);
    api.raw(Method::DELETE, &format!("{MAPS}?labelSelector=odd%3Dtrue"), &[], "").await.ok();
    assert_eq!(names(&api.get(MAPS).await.ok()), ["m0", "m2", "m4", "m6", "m9"]);
}

#[tokio::test]
async fn an_expired_page_offers_to_go_on() {
    let api = Api::with(Retention { events: 3, bytes: usize::MAX }, Vec::new()).await;
    for i in 0..4 {
        api.post(MAPS, &map(&format!("m{i}"))).await.ok();
    }
    let first = api.get(&format!("{MAPS}?limit=2")).await.ok();
    let next = first["metadata"]["continue"].as_str().unwrap().to_owned();
    for i in 4..9 {
        api.post(MAPS, &map(&format!("m{i}"))).await.ok();
    }
    let expired = api.get(&format!("{MAPS}?continue={next}")).await;
    assert_eq!(expired.status, 410);
    let token = expired.json()["metadata"]["continue"].as_str().unwrap().to_owned();
    let rest = api.get(&format!("{MAPS}?continue={token}")).await.ok();
    assert_eq!(rest["items"].as_array().unwrap().len(), 7);
}

#[tokio::test]
async fn custom_resources_have_versions_and_generations() {
    let api = with_definition().await;
    let vms = "/apis/example.com/v1alpha3/namespaces/default/vms";
    let vm = json!({"apiVersion": "example.com/v1alpha3", "kind": "Vm", "metadata": {"name": "a", "finalizers": ["simple"]},
        "spec": {"x": 1}, "status": {"phase": "Pending"}, "odd": 1});
    let made = api.post(vms, &vm).await.ok();
    // No status subresource: status is stored as it comes. What the schema does not know goes.
    assert_eq!((&made["status"]["phase"], made.get("odd")), (&json!("Pending"), None));
    assert_eq!((&made["apiVersion"], &made["metadata"]["generation"]), (&json!("example.com/v1alpha3"), &json!(1)));
    let v1 = "/apis/example.com/v1/namespaces/default/vms/a";
    assert_eq!(api.get(v1).await.ok()["apiVersion"], "example.com/v1");
    let changed = api.merge(v1, &json!({"status": {"phase": "Running"}})).await.ok();
    assert_eq!(changed["metadata"]["generation"], 2);
    assert_eq!(api.merge(v1, &json!({"metadata": {"labels": {"a": "b"}}})).await.ok()["metadata"]["generation"], 2);
    api.merge(&format!("{v1}/status"), &json!({})).await.fails(404);
    let mut unversioned = api.get(v1).await.ok();
    unversioned["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    assert!(api.put(v1, &unversioned).await.fails(422).contains("must be specified for an update"));

    // Finalizers hold it, and no new ones may come.
    let going = api.delete(v1).await.ok();
    assert!(going["metadata"]["deletionTimestamp"].is_string());
    api.merge(v1, &json!({"metadata": {"finalizers": ["simple", "more"]}})).await.fails(422);
    api.merge(v1, &json!({"metadata": {"finalizers": []}})).await.ok();
    api.get(v1).await.fails(404);
}

#[tokio::test]
async fn status_and_specification_have_doors_of_their_own() {
    let api = Api::start().await;
    let mut asked = pod("p", None);
    asked["status"] = json!({"phase": "Running"});
    assert_eq!(api.post(PODS, &asked).await.ok()["status"]["phase"], "Pending");
    let url = format!("{PODS}/p");
    assert_eq!(api.merge(&url, &json!({"status": {"phase": "Failed"}})).await.ok()["status"]["phase"], "Pending");
    let both = json!({"status": {"phase": "Running"}, "metadata": {"labels": {"app": "y"}}});
    let now = api.merge(&format!("{url}/status"), &both).await.ok();
    assert_eq!((&now["status"]["phase"], &now["metadata"]["labels"]["app"]), (&json!("Running"), &json!("x")));
}

#[tokio::test]
async fn pods_are_bound_once_and_deleted_gracefully() {
    let api = Api::start().await;
    api.post(PODS, &pod("p", None)).await.ok();
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n1"}});
    api.post(&format!("{PODS}/p/binding"), &json!({"target": {}})).await.fails(422);
    api.post(&format!("{PODS}/p/binding"), &binding).await.ok();
    let bound = api.get(&format!("{PODS}/p")).await.ok();
    assert_eq!(bound["spec"]["nodeName"], "n1");
    assert_eq!(bound["status"]["conditions"][0]["type"], "PodScheduled");
    let twice = api.post(&format!("{PODS}/p/binding"), &binding).await.fails(409);
    assert!(twice.contains("pod p is already assigned to node \"n1\""), "{twice}");

    let going = api.delete(&format!("{PODS}/p")).await.ok();
    assert_eq!(going["metadata"]["deletionGracePeriodSeconds"], 30);
    let sooner = json!({"gracePeriodSeconds": 5, "kind": "DeleteOptions", "apiVersion": "v1"});
    let json_body = [("content-type", "application/json")];
    let going = api.raw(Method::DELETE, &format!("{PODS}/p"), &json_body, sooner.to_string()).await.ok();
    assert_eq!(going["metadata"]["deletionGracePeriodSeconds"], 5);
    let wrong = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": "other"}});
    api.raw(Method::DELETE, &format!("{PODS}/p"), &json_body, wrong.to_string()).await.fails(409);
    api.delete(&format!("{PODS}/p?gracePeriodSeconds=0")).await.ok();
    api.get(&format!("{PODS}/p")).await.fails(404);
    // Nobody runs it: nothing to wait for.
    api.post(PODS, &pod("q", None)).await.ok();
    api.delete(&format!("{PODS}/q")).await.ok();
    api.get(&format!("{PODS}/q")).await.fails(404);
}

#[tokio::test]
async fn evictions_respect_budgets() {
    let api = Api::start().await;
    let budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    let budget =
        json!({"metadata": {"name": "b"}, "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "x"}}}});
    api.post(budgets, &budget).await.ok();
    for name in ["p", "q"] {
        api.post(PODS, &pod(name, Some("n1"))).await.ok();
        let ready = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
        api.merge(&format!("{PODS}/{name}/status"), &ready).await.ok();
    }
    let state = api.until(&format!("{budgets}/b"), |b| b["status"]["currentHealthy"] == 2).await;
    assert_eq!((&state["status"]["disruptionsAllowed"], &state["status"]["desiredHealthy"]), (&json!(1), &json!(1)));
    let evict = |name: &'static str| {
        let body = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}});
        let api = &api;
        async move { api.post(&format!("{PODS}/{name}/eviction"), &body).await }
    };
    evict("p").await.ok();
    let first = api.get(&format!("{PODS}/p")).await.ok();
    assert!(first["metadata"]["deletionTimestamp"].is_string());
    assert!(first["status"]["conditions"].as_array().unwrap().iter().any(|c| c["type"] == "DisruptionTarget"));
    let refused = evict("q").await;
    let causes = refused.json()["details"]["causes"].clone();
    assert_eq!(causes[0]["reason"], "DisruptionBudget");
    assert_eq!(refused.fails(429), "Cannot evict pod as it would violate the pod's disruption budget.");
}

/// As `kubectl drain` asks: for all at once.
#[tokio::test]
async fn evictions_at_once_take_no_more_than_the_budget_allows() {
    let api = Api::start().await;
    let budget =
        json!({"metadata": {"name": "b"}, "spec": {"minAvailable": 3, "selector": {"matchLabels": {"app": "x"}}}});
    api.post("/apis/policy/v1/namespaces/default/poddisruptionbudgets", &budget).await.ok();
    let names: Vec<String> = (0..6).map(|n| format!("p{n}")).collect();
    for name in &names {
        api.post(PODS, &pod(name, Some("n1"))).await.ok();
        let ready = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
        api.merge(&format!("{PODS}/{name}/status"), &ready).await.ok();
    }
    let evictions = names.iter().map(|name| {
        let body = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}});
        let api = &api;
        async move { api.post(&format!("{PODS}/{name}/eviction"), &body).await.status.as_u16() }
    });
    let mut codes = futures::future::join_all(evictions).await;
    codes.sort_unstable();
    assert_eq!(codes, [201, 201, 201, 429, 429, 429]);
}

#[tokio::test]
async fn garbage_goes_with_its_owner() {
    let api = Api::start().await;
    let owner = api.post(MAPS, &map("owner")).await.ok();
    let other = api.post(MAPS, &map("other")).await.ok();
    let reference = |o: &Value, block: bool| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "name": o["metadata"]["name"], "uid": o["metadata"]["uid"],
            "blockOwnerDeletion": block})
    };
    let child = |name: &str, owners: Vec<Value>| {
        let mut object = map(name);
        object["metadata"]["ownerReferences"] = json!(owners);
        object
    };
    api.post(MAPS, &child("only", vec![reference(&owner, false)])).await.ok();
    let grand = api.get(&format!("{MAPS}/only")).await.ok();
    api.post(MAPS, &child("grandchild", vec![reference(&grand, false)])).await.ok();
    api.post(MAPS, &child("shared", vec![reference(&owner, false), reference(&other, false)])).await.ok();
    api.delete(&format!("{MAPS}/owner")).await.ok();
    api.gone(&format!("{MAPS}/grandchild")).await;
    let shared =
        api.until(&format!("{MAPS}/shared"), |o| o["metadata"]["ownerReferences"].as_array().unwrap().len() == 1).await;
    assert_eq!(shared["metadata"]["ownerReferences"][0]["name"], "other");

    api.delete(&format!("{MAPS}/other?propagationPolicy=Orphan")).await.ok();
    api.gone(&format!("{MAPS}/other")).await;
    assert!(api.get(&format!("{MAPS}/shared")).await.ok()["metadata"].get("ownerReferences").is_none());

    let last = api.post(MAPS, &map("last")).await.ok();
    let mut held = child("held", vec![reference(&last, true)]);
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    api.post(MAPS, &held).await.ok();
    let going = api.delete(&format!("{MAPS}/last?propagationPolicy=Foreground")).await.ok();
    assert_eq!(going["metadata"]["finalizers"], json!(["foregroundDeletion"]));
    api.until(&format!("{MAPS}/held"), |o| o["metadata"]["deletionTimestamp"].is_string()).await;
    api.get(&format!("{MAPS}/last")).await.ok();
    api.merge(&format!("{MAPS}/held"), &json!({"metadata": {"finalizers": []}})).await.ok();
    api.gone(&format!("{MAPS}/last")).await;
    api.gone(&format!("{MAPS}/held")).await;

    // An owner that never was.
    let nobody = json!({"metadata": {"name": "x", "uid": "gone"}});
    api.post(MAPS, &child("lost", vec![reference(&nobody, false)])).await.ok();
    api.gone(&format!("{MAPS}/lost")).await;
}

#[tokio::test]
async fn namespaces_end_when_they_are_empty() {
    let api = Api::start().await;
    let made = api.post("/api/v1/namespaces", &json!({"metadata": {"name": "team"}})).await.ok();
    assert_eq!((&made["status"]["phase"], &made["spec"]["finalizers"]), (&json!("Active"), &json!(["kubernetes"])));
    assert_eq!(made["metadata"]["labels"]["kubernetes.io/metadata.name"], "team");
    api.until("/api/v1/namespaces/team/serviceaccounts/default", |o| o["kind"] == "ServiceAccount").await;
    let mut held = map("held");
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    let maps = "/api/v1/namespaces/team/configmaps";
    api.post(maps, &held).await.ok();
    let going = api.delete("/api/v1/namespaces/team").await.ok();
    assert_eq!(going["status"]["phase"], "Terminating");
    let late = api.post(maps, &map("late")).await.fails(403);
    assert!(late.contains("unable to create new content in namespace team because it is being terminated"), "{late}");
    api.until(&format!("{maps}/held"), |o| o["metadata"]["deletionTimestamp"].is_string()).await;
    assert_eq!(api.get("/api/v1/namespaces/team").await.ok()["status"]["phase"], "Terminating");
    api.merge(&format!("{maps}/held"), &json!({"metadata": {"finalizers": null}})).await.ok();
    api.gone("/api/v1/namespaces/team").await;
    assert_eq!(api.store.count("/registry/core/configmaps/team/"), 0);
    assert_eq!(api.post(maps, &map("x")).await.fails(404), "namespaces \"team\" not found");
}

#[tokio::test]
async fn events_have_two_faces() {
    let api = Api::start().await;
    let core = json!({"metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "p", "namespace": "default"},
        "reason": "Because", "message": "m", "type": "Normal", "source": {"component": "c"}});
    api.post("/api/v1/namespaces/default/events", &core).await.ok();
    let new = api.get("/apis/events.k8s.io/v1/namespaces/default/events/e").await.ok();
    assert_eq!((&new["note"], &new["regarding"]["name"]), (&json!("m"), &json!("p")));
    let found = api.get("/api/v1/events?fieldSelector=involvedObject.name%3Dp,involvedObject.kind%3DPod").await.ok();
    assert_eq!(found["items"].as_array().unwrap().len(), 1);
}

/// Labels new config maps, refuses one name, and forbids deleting another.
struct Plugin;

impl Admission for Plugin {
    fn mutate(&self, request: &AdmissionRequest<'_>) -> Result<MutateOutcome, Status> {
        if request.resource.kind != "ConfigMap" || request.operation != Operation::Create {
            return Ok(MutateOutcome::default());
        }
        let mut object = request.object.cloned().unwrap_or_default();
        object["metadata"]["labels"]["by"] = json!(request.user.name);
        object["metadata"]["uid"] = json!("forged");
        Ok(MutateOutcome { object: Some(object), warnings: vec!["labelled".to_owned()] })
    }

    fn validate(&self, request: &AdmissionRequest<'_>) -> Result<Vec<String>, Status> {
        let twin = request.lookup.get("", "configmaps", "default", "first").is_some();
        match (request.operation, request.name) {
            (Operation::Create, "second") if !twin => Err(Status::forbidden("", "configmaps", "second", "no first")),
            (Operation::Delete, "first") => Err(Status::forbidden("", "configmaps", "first", "it stays")),
            _ => Ok(Vec::new()),
        }
    }
}

#[tokio::test]
async fn admission_changes_refuses_and_warns() {
    let api = Api::with(Retention::default(), vec![Arc::new(Plugin)]).await;
    assert_eq!(api.post(MAPS, &map("second")).await.fails(403), "configmaps \"second\" is forbidden: no first");
    let first = api.post(MAPS, &map("first")).await;
    assert_eq!(first.headers["warning"], "299 - \"labelled\"");
    let first = first.ok();
    assert_eq!(first["metadata"]["labels"]["by"], "admin");
    assert_ne!(first["metadata"]["uid"], "forged");
    api.post(MAPS, &map("second")).await.ok();
    api.delete(&format!("{MAPS}/first")).await.fails(403);
    api.delete(&format!("{MAPS}/second")).await.ok();
}

/// Refuses evictions and marks the config map `mark`. Its first write is decided on a state that has gone by.
struct Marker(AtomicUsize);

impl Admission for Marker {
    fn evict(&self, request: &AdmissionRequest<'_>) -> EvictionVerdict {
        let asked = self.0.fetch_add(1, Ordering::SeqCst);
        let mark = request.lookup.get("", "configmaps", "default", "mark");
        let revision = mark.map(|mark| mark["metadata"]["resourceVersion"].clone());
        let revision = if asked == 0 { Some(json!("1")) } else { revision };
        let write = OwnWrite {
            group: String::new(),
            plural: "configmaps".to_owned(),
            namespace: "default".to_owned(),
            name: "mark".to_owned(),
            patch: json!({"metadata": {"resourceVersion": revision}, "data": {"marked": "yes"}}),
            failure: Status::too_many_requests("cannot mark: ", 0, None),
        };
        let refusal = Status::too_many_requests("it is being moved", 0, None);
        EvictionVerdict { verdict: Err(refusal), write: Some(write) }
    }
}

#[tokio::test]
async fn an_eviction_may_be_refused_with_a_write() {
    let marker = Arc::new(Marker(AtomicUsize::new(0)));
    let api = Api::with(Retention::default(), vec![marker.clone()]).await;
    api.post(PODS, &pod("p", None)).await.ok();
    let path = format!("{PODS}/p/eviction");
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "p"}});
    let missing = api.post(&path, &eviction).await.fails(429);
    assert_eq!(missing, "cannot mark: configmaps \"mark\" not found");
    api.post(MAPS, &map("mark")).await.ok();
    let before = api.get(&format!("{MAPS}/mark")).await.ok();
    assert_eq!(api.post(&format!("{path}?dryRun=All"), &eviction).await.fails(429), "it is being moved");
    assert_eq!(api.get(&format!("{MAPS}/mark")).await.ok(), before, "a dry run writes nothing");
    marker.0.store(0, Ordering::SeqCst);
    assert_eq!(api.post(&path, &eviction).await.fails(429), "it is being moved");
    assert_eq!(marker.0.load(Ordering::SeqCst), 2, "asked again on the newer state");
    let after = api.get(&format!("{MAPS}/mark")).await.ok();
    assert_eq!(after["data"]["marked"], "yes");
    assert_ne!(after["metadata"]["resourceVersion"], before["metadata"]["resourceVersion"]);
    assert_eq!(api.get(&format!("{PODS}/p")).await.ok()["metadata"]["deletionTimestamp"], Value::Null);
}

#[tokio::test]
async fn who_may_what() {
    let api = Api::start().await;
    let nobody = api.user(User::anonymous());
    assert_eq!(nobody.get("/healthz").await.status, 200);
    let refused = nobody.get(MAPS).await.fails(403);
    assert!(refused.starts_with("configmaps is forbidden: User \"system:anonymous\" cannot list"), "{refused}");
    nobody.raw(Method::GET, MAPS, &[("authorization", "Bearer x")], "").await.fails(401);
    let node = api.user(User::new("system:node:n1", &["system:nodes"]));
    node.post("/api/v1/nodes", &json!({"metadata": {"name": "n1"}})).await.ok();
    node.get("/api/v1/pods?fieldSelector=spec.nodeName%3Dn1").await.ok();
    node.delete("/api/v1/nodes/n1").await.fails(403);
    let viewer = api.user(User::new("v", &[]));
    viewer.get(PODS).await.fails(403);
    let binding = json!({"metadata": {"name": "b"}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
        "name": "view"}, "subjects": [{"kind": "User", "name": "v", "apiGroup": "rbac.authorization.k8s.io"}]});
    api.post("/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings", &binding).await.ok();
    viewer.get(PODS).await.ok();
    viewer.post(PODS, &pod("p", None)).await.fails(403);
    viewer.get("/api/v1/pods").await.fails(403);
}

#[tokio::test]
async fn everything_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let start = || async {
        let store = godwit_store::Store::open(&path).unwrap();
        godwit_apiserver::Server::start(godwit_apiserver::Parts::new(store)).await.unwrap()
    };
    let call = |server: &godwit_apiserver::Server, method: Method, uri: &str, body: String| {
        let service = server.service(User::new("admin", &["system:masters"]));
        let request = http::Request::builder()
            .method(method)
            .uri(uri)
            .body(http_body_util::Full::<bytes::Bytes>::from(body))
            .unwrap();
        async move {
            use http_body_util::BodyExt;
            let response = tower::ServiceExt::oneshot(service, request).await.unwrap();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            serde_json::from_slice::<Value>(&body).unwrap()
        }
    };
    let server = start().await;
    call(&server, Method::POST, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition().to_string())
        .await;
    let vm = json!({"apiVersion": "example.com/v1", "kind": "Vm", "metadata": {"name": "a"}, "spec": {"x": 1}});
    let made = call(&server, Method::POST, "/apis/example.com/v1/namespaces/default/vms", vm.to_string()).await;
    assert_eq!(made["kind"], "Vm", "{made}");
    drop(server);
    // Housekeeping tasks are told to end and let the store go.
    for _ in 0..200 {
        if godwit_store::Store::open(&path).is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let server = start().await;
    assert_eq!(call(&server, Method::GET, "/apis/example.com/v1/namespaces/default/vms/a", String::new()).await, made);
}

#[tokio::test]
async fn roles_of_an_older_server_gain_what_they_lack() {
    const ROLE: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles/example-controller";
    const BINDING: &str = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/example-controller";
    let roles = || {
        let (group, subject) =
            ("rbac.authorization.k8s.io", json!({"kind": "ServiceAccount", "namespace": "a", "name": "c"}));
        vec![
            json!({"apiVersion": format!("{group}/v1"), "kind": "ClusterRole", "metadata": {"name": "example-controller"},
                "rules": [{"apiGroups": ["godwit.io"], "resources": ["migrationrecords"], "verbs": ["list"]}]}),
            json!({"apiVersion": format!("{group}/v1"), "kind": "ClusterRoleBinding", "metadata": {"name": "example-controller"},
                "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "example-controller"}, "subjects": [subject]}),
            json!({"apiVersion": format!("{group}/v1"), "kind": "Role", "metadata": {"name": "one", "namespace": "kube-system"},
                "rules": [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}]}),
        ]
    };
    let api = Api::start().await;
    let api = Api::over(api.store.clone(), roles()).await;
    let mut role = api.get("/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/roles/one").await.ok();
    assert_eq!(role["metadata"]["annotations"]["rbac.authorization.kubernetes.io/autoupdate"], "true", "{role}");
    let records = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
    let review = json!({"spec": {"user": "system:serviceaccount:a:c", "resourceAttributes":
        {"verb": "list", "group": "godwit.io", "resource": "migrationrecords"}}});
    let whole = api.get(ROLE).await.ok();
    let mine = json!({"apiGroups": ["example.com"], "resources": ["things"], "verbs": ["get"]});
    let old = json!({"apiGroups": ["kubevirt.io"], "resources": ["*"], "verbs": ["*"]});
    api.merge(ROLE, &json!({"rules": [old, mine]})).await.ok();
    api.merge(BINDING, &json!({"subjects": []})).await.ok();
    let user = json!([{"kind": "User", "name": "u", "apiGroup": "rbac.authorization.k8s.io"}]);
    let viewers = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/system:basic-user";
    api.merge(
        viewers,
        &json!({"metadata": {"annotations": {"rbac.authorization.kubernetes.io/autoupdate": "false"}},
        "subjects": user}),
    )
    .await
    .ok();
    assert_eq!(api.post(records, &review).await.ok()["status"]["allowed"], false);

    let api = Api::over(api.store.clone(), roles()).await;
    assert_eq!(api.post(records, &review).await.ok()["status"]["allowed"], true);
    role = api.get(ROLE).await.ok();
    let rules = role["rules"].as_array().unwrap();
    assert!(rules.contains(&mine) && rules.contains(&old), "{role}");
    assert!(whole["rules"].as_array().unwrap().iter().all(|rule| rules.contains(rule)), "{role}");
    assert_eq!(api.get(viewers).await.ok()["subjects"], user, "its owner wants it so");
    // A third start finds nothing to do.
    let api = Api::over(api.store.clone(), roles()).await;
    assert_eq!(api.get(ROLE).await.ok(), role);
}
