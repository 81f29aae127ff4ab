//! The executor and the recorder against a server that answers from a list.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use godwit_control::lease::Candidate;
use godwit_control::{Effect, EventRecord, EventType, Kind, Name, Object, Ref, VM_CONTROLLER};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::execute::{Executor, Failure, Learned, Seen};
use crate::{events, leader};

/// What was asked: method, path and body.
type Asked = Arc<Mutex<Vec<(String, String, Value)>>>;

/// A client whose server gives these answers in turn, and what it is asked.
fn server(answers: Vec<(u16, Value)>) -> (Client, Asked) {
    let asked = Asked::default();
    let answers = Arc::new(Mutex::new(VecDeque::from(answers)));
    let log = asked.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let (log, answers) = (log.clone(), answers.clone());
        async move {
            let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
            let body = request.into_body().collect().await.unwrap().to_bytes();
            log.lock().unwrap().push((method, path, serde_json::from_slice(&body).unwrap_or_default()));
            let (code, value) = answers.lock().unwrap().pop_front().expect("more is asked than was foreseen");
            let response = Response::builder().status(StatusCode::from_u16(code).unwrap());
            Ok::<_, std::convert::Infallible>(response.body(Body::from(value.to_string().into_bytes())).unwrap())
        }
    });
    (Client::new(service, "default"), asked)
}

fn refusal(code: u16, reason: &str) -> (u16, Value) {
    (
        code,
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": reason}),
    )
}

fn pod(owner: &str, revision: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "p", "namespace": "ns", "uid": "u", "resourceVersion": revision,
            "ownerReferences": [{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "name": "demo", "uid": owner, "controller": true}],
        },
        "spec": {"containers": []},
    })
}

fn the_pod() -> Ref {
    Ref::new(Kind::Pod, Name::new("ns", "p"))
}

async fn carry_out(
    effects: Vec<Effect>,
    answers: Vec<(u16, Value)>,
) -> (Vec<Learned>, Result<(), Failure>, Vec<(String, String, Value)>, Vec<EventRecord>) {
    carry_out_seen(effects, &Seen::new(), answers).await
}

/// The same for a plan that was decided on these revisions.
async fn carry_out_seen(
    effects: Vec<Effect>,
    seen: &Seen,
    answers: Vec<(u16, Value)>,
) -> (Vec<Learned>, Result<(), Failure>, Vec<(String, String, Value)>, Vec<EventRecord>) {
    let (client, asked) = server(answers);
    let (events, mut told) = mpsc::channel(8);
    let executor = Executor { client, controller: None, events, leads: None };
    let (learned, result) = executor.carry_out(effects, seen).await;
    let asked = asked.lock().unwrap().clone();
    let mut recorded = Vec::new();
    while let Ok(event) = told.try_recv() {
        recorded.push(event);
    }
    (learned, result, asked, recorded)
}

fn revisions(learned: &[Learned]) -> Vec<String> {
    let revision = |piece: &Learned| match piece {
        Learned::Here(object) => object.revision().to_string(),
        Learned::Gone(target) => format!("{target} gone"),
        Learned::Refused(target, why) => format!("{target} refused: {why}"),
        Learned::NotEvicted(target, uid, why) => format!("{target} {uid} not evicted: {why}"),
    };
    learned.iter().map(revision).collect()
}

fn event(message: &str) -> EventRecord {
    EventRecord {
        target: the_pod(),
        uid: "u".into(),
        resource_version: "1".into(),
        type_: EventType::Normal,
        reason: "Because".into(),
        message: message.into(),
        component: VM_CONTROLLER,
    }
}

#[tokio::test]
async fn a_conflict_ends_the_plan_and_brings_the_fresh_state() {
    let effects = vec![Effect::PatchStatus(the_pod(), json!({"status": {}})), Effect::Record(event("never told"))];
    let (learned, result, asked, told) = carry_out(effects, vec![refusal(409, "Conflict"), (200, pod("o", "7"))]).await;
    assert!(matches!(result, Err(Failure::Conflict)));
    assert_eq!(revisions(&learned), ["7"]);
    assert_eq!((asked[0].0.as_str(), asked[0].1.as_str()), ("PATCH", "/api/v1/namespaces/ns/pods/p/status"));
    assert_eq!(asked[1].0, "GET");
    assert!(told.is_empty());
}

#[tokio::test]
async fn an_eviction_that_the_server_answers_with_an_error_keeps_no_other_from_being_asked_for() {
    let evict = |name: &str, or_learn| Effect::Evict {
        pod: Ref::new(Kind::Pod, Name::new("ns", name)),
        uid: format!("uid-{name}"),
        or_learn,
    };
    for code in [403, 429, 500, 503] {
        let two = |or_learn| vec![evict("p", or_learn), evict("q", or_learn)];
        let (learned, result, asked, _) = carry_out(two(true), vec![refusal(code, "no"), refusal(code, "")]).await;
        assert!(result.is_ok(), "{code}");
        assert_eq!(asked.len(), 2, "{code}");
        let silent = format!("Pod ns/q uid-q not evicted: the server answered {code}");
        assert_eq!(revisions(&learned), ["Pod ns/p uid-p not evicted: no".to_owned(), silent]);
        let (learned, result, ..) = carry_out(two(false), vec![refusal(code, "no")]).await;
        assert!(matches!(result, Err(Failure::Refused(_))) && learned.is_empty(), "{code}");
    }
}

#[tokio::test]
async fn what_is_there_already_is_fine_if_it_is_ours() {
    let ours = Object::from_value(Kind::Pod, pod("owner", "1")).unwrap();
    let create = || vec![Effect::Create(Box::new(ours.clone()))];
    let taken = refusal(409, "AlreadyExists");
    let (learned, result, ..) = carry_out(create(), vec![taken.clone(), (200, pod("owner", "5"))]).await;
    assert!(result.is_ok());
    assert_eq!(revisions(&learned), ["5"]);
    let (_, result, ..) = carry_out(create(), vec![taken, (200, pod("somebody", "5"))]).await;
    assert!(matches!(result, Err(Failure::Refused(text)) if text.contains("not ours")));
}

#[tokio::test]
async fn a_pod_that_is_refused_is_told_on_its_owner() {
    let wanted = Object::from_value(Kind::Pod, pod("owner", "1")).unwrap();
    let (learned, result, _, told) =
        carry_out(vec![Effect::Create(Box::new(wanted))], vec![refusal(403, "exceeded quota: small")]).await;
    assert!(matches!(result, Err(Failure::Refused(_))) && learned.is_empty());
    assert_eq!(told[0].message, "Error creating pod: exceeded quota: small");
    assert_eq!(told[0].target.name, Name::new("ns", "demo"));
}

#[tokio::test]
async fn why_a_target_pod_is_refused_is_learned() {
    let mut wanted = pod("owner", "1");
    wanted["metadata"]["labels"] = json!({"kubevirt.io/migrationJobUID": "m"});
    let wanted = Object::from_value(Kind::Pod, wanted).unwrap();
    let create = || vec![Effect::Create(Box::new(wanted.clone()))];
    let (learned, ..) = carry_out(create(), vec![refusal(403, "exceeded quota: small")]).await;
    assert_eq!(revisions(&learned), ["Pod ns/p refused: exceeded quota: small"]);
    // A server that is too busy has not refused it.
    let (learned, result, ..) = carry_out(create(), vec![refusal(503, "later")]).await;
    assert!(matches!(result, Err(Failure::Refused(_))) && learned.is_empty());
}

#[tokio::test]
async fn a_plan_goes_on_only_when_what_it_rests_on_is_confirmed() {
    let plan = |revision: Option<&str>| {
        let confirm = Effect::Confirm { target: the_pod(), revision: revision.map(str::to_owned) };
        vec![confirm, Effect::Delete { target: the_pod(), uid: "u".into(), grace_seconds: None }]
    };
    for (decided_on, found, goes_on) in [
        (Some("5"), (200, pod("o", "5")), true),
        (Some("4"), (200, pod("o", "5")), false),
        (None, (200, pod("o", "5")), false),
        (Some("5"), refusal(404, "NotFound"), false),
        (None, refusal(404, "NotFound"), true),
    ] {
        let (learned, result, asked, _) = carry_out(plan(decided_on), vec![found, refusal(404, "NotFound")]).await;
        assert_eq!(asked[0].0, "GET");
        assert_eq!(asked.len(), if goes_on { 2 } else { 1 }, "{decided_on:?}");
        assert_eq!(result.is_ok(), goes_on, "{decided_on:?}");
        assert!(!learned.is_empty(), "the fresh state is learned");
    }
}

#[tokio::test]
async fn each_write_carries_the_revision_that_it_was_decided_on_or_that_the_plan_has_made() {
    let seen = vec![(the_pod(), "4".to_owned())];
    let delete = || Effect::Delete { target: the_pod(), uid: "u".into(), grace_seconds: None };
    // The first write carries the revision that the decision gave it, the others what that has become.
    let plan = vec![
        Effect::Patch(the_pod(), json!({"metadata": {"resourceVersion": "4", "labels": {"a": "b"}}})),
        Effect::PatchStatus(the_pod(), json!({"status": {"phase": "Running"}})),
        delete(),
    ];
    let answers = vec![(200, pod("o", "5")), (200, pod("o", "6")), refusal(404, "NotFound")];
    let (_, result, asked, _) = carry_out_seen(plan, &seen, answers).await;
    assert!(result.is_ok());
    let carried = |at: usize, path: &str| asked[at].2.pointer(path).cloned().unwrap_or_default();
    assert_eq!(carried(0, "/metadata/resourceVersion"), "4");
    assert_eq!(carried(1, "/metadata/resourceVersion"), "5");
    assert_eq!(carried(2, "/preconditions/resourceVersion"), "6");
    assert_eq!(carried(2, "/preconditions/uid"), "u");
    // Alone it carries what was decided on, and ends the plan when that is not what there is.
    for alone in [delete(), Effect::PatchStatus(the_pod(), json!({"status": {"phase": "Failed"}}))] {
        let plan = vec![alone, Effect::Record(event("never told"))];
        let answers = vec![refusal(409, "Conflict"), (200, pod("o", "9"))];
        let (learned, result, asked, told) = carry_out_seen(plan, &seen, answers).await;
        assert!(matches!(result, Err(Failure::Conflict)) && told.is_empty());
        let carried = ["/preconditions/resourceVersion", "/metadata/resourceVersion"];
        assert!(carried.iter().any(|path| asked[0].2.pointer(path) == Some(&json!("4"))), "{:?}", asked[0]);
        assert_eq!(revisions(&learned), ["9"]);
    }
}

#[tokio::test]
async fn deleting_what_is_gone_is_done() {
    let effects = vec![Effect::Delete { target: the_pod(), uid: "u".into(), grace_seconds: Some(3) }];
    let (learned, result, asked, _) = carry_out(effects, vec![refusal(404, "NotFound")]).await;
    assert!(result.is_ok());
    assert_eq!(revisions(&learned), ["Pod ns/p gone"]);
    assert_eq!((&asked[0].2["preconditions"]["uid"], &asked[0].2["gracePeriodSeconds"]), (&json!("u"), &json!(3)));
}

#[tokio::test]
async fn binding_learns_where_the_pod_is_now() {
    let mut bound = pod("o", "9");
    bound["spec"]["nodeName"] = json!("node1");
    let effects = vec![Effect::Bind { pod: the_pod(), uid: "u".into(), node: "node1".into() }];
    let (learned, result, asked, _) =
        carry_out(effects, vec![(201, json!({"kind": "Status", "status": "Success"})), (200, bound)]).await;
    assert!(result.is_ok());
    assert_eq!(asked[0].1, "/api/v1/namespaces/ns/pods/p/binding");
    assert_eq!(asked[0].2["target"]["name"], "node1");
    assert_eq!(revisions(&learned), ["9"]);
}

#[tokio::test]
async fn a_plan_ends_where_the_lease_does() {
    let bind = || Effect::Bind { pod: the_pod(), uid: "u".into(), node: "node1".into() };
    let now = Instant::now();
    for (until, asked_for) in [(None, 0), (Some(now), 0), (Some(now + Duration::from_secs(3600)), 4)] {
        let made = (201, json!({"kind": "Status", "status": "Success"}));
        let (client, asked) = server(vec![made.clone(), (200, pod("o", "8")), made, (200, pod("o", "9"))]);
        let (events, _told) = mpsc::channel(8);
        let executor = Executor { client, controller: None, events, leads: Some(watch::channel(until).1) };
        let (_, result) = executor.carry_out(vec![bind(), bind()], &Seen::new()).await;
        assert_eq!(matches!(result, Err(Failure::Deposed)), asked_for == 0, "{until:?}");
        assert_eq!(asked.lock().unwrap().len(), asked_for, "{until:?}");
    }
    // It is looked at before each effect: here it is lost while the first is carried out.
    let (tell, leads) = watch::channel(Some(now + Duration::from_secs(3600)));
    let asked = Asked::default();
    let log = asked.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        log.lock().unwrap().push((request.method().to_string(), request.uri().path().to_owned(), Value::Null));
        tell.send_replace(None);
        let response = Response::new(Body::from(pod("o", "9").to_string().into_bytes()));
        async move { Ok::<_, std::convert::Infallible>(response) }
    });
    let (events, _told) = mpsc::channel(8);
    let executor = Executor { client: Client::new(service, "default"), controller: None, events, leads: Some(leads) };
    let patch = || Effect::PatchStatus(the_pod(), json!({"status": {}}));
    let (learned, result) = executor.carry_out(vec![patch(), bind()], &Seen::new()).await;
    assert!(matches!(result, Err(Failure::Deposed)));
    assert_eq!((revisions(&learned), asked.lock().unwrap().len()), (vec!["9".to_owned()], 1));
}

#[tokio::test]
async fn the_same_event_again_raises_its_count() {
    let made = (201, json!({}));
    let (client, asked) = server(vec![made.clone(), (200, json!({})), made.clone(), refusal(404, "NotFound"), made]);
    let (tell, told) = mpsc::channel(8);
    for message in ["one", "one", "two", "one"] {
        tell.send(event(message)).await.unwrap();
    }
    drop(tell);
    events::record(client, "me".into(), told).await;
    let asked = asked.lock().unwrap().clone();
    let methods: Vec<&str> = asked.iter().map(|(method, ..)| method.as_str()).collect();
    // The fourth finds that the first has expired meanwhile, and begins anew.
    assert_eq!(methods, ["POST", "PATCH", "POST", "PATCH", "POST"]);
    assert_eq!(asked[0].2["involvedObject"]["uid"], "u");
    assert_eq!(asked[0].2["source"]["component"], "virtualmachine-controller");
    assert_eq!((&asked[1].2["count"], &asked[3].2["count"], &asked[4].2["count"]), (&json!(2), &json!(3), &json!(1)));
}

fn lease(holder: &str, revision: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "virt-controller", "namespace": "kubevirt", "resourceVersion": revision},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 15},
    })
}

/// What comes of the first look at the lease.
async fn first_look(answers: Vec<(u16, Value)>) -> (bool, Vec<(String, String, Value)>) {
    let (client, asked) = server(answers);
    let (tell, mut until) = tokio::sync::watch::channel(None);
    let election = tokio::spawn(leader::elect(client, Candidate::new("me"), tell));
    until.changed().await.unwrap();
    let leads = until.borrow().is_some();
    election.abort();
    let asked = asked.lock().unwrap().clone();
    (leads, asked)
}

#[tokio::test]
async fn the_lease_is_made_taken_back_and_left_to_others() {
    let (leads, asked) = first_look(vec![refusal(404, "NotFound"), (201, lease("me", "1"))]).await;
    assert!(leads);
    assert_eq!(asked[1].0, "POST");
    assert_eq!(asked[1].2["spec"]["holderIdentity"], "me");
    // After a restart nobody waits for the own lease to end.
    let (leads, asked) = first_look(vec![(200, lease("me", "7")), (200, lease("me", "8"))]).await;
    assert!(leads);
    assert_eq!((asked[1].0.as_str(), &asked[1].2["metadata"]["resourceVersion"]), ("PUT", &json!("7")));
    let (leads, asked) = first_look(vec![(200, lease("other", "7"))]).await;
    assert_eq!((leads, asked.len()), (false, 1));
}

#[tokio::test]
async fn the_lease_is_given_back_by_its_holder_only() {
    let (client, asked) = server(vec![(200, lease("me", "7")), (200, lease("", "8")), (200, lease("other", "9"))]);
    let me = Candidate::new("me");
    leader::give_back(client.clone(), &me).await.unwrap();
    leader::give_back(client, &me).await.unwrap();
    let asked = asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 3);
    assert_eq!((asked[1].0.as_str(), &asked[1].2["spec"]["holderIdentity"]), ("PUT", &json!("")));
}
