//! Watches through the generic handlers, in this process.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "common/api.rs"]
mod api;

use api::Api;
use godwit_store::Retention;
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

async fn make(api: &Api, name: &str, color: &str) -> Value {
    let body = json!({"metadata": {"name": name, "labels": {"color": color}}, "data": {"a": "b"}});
    api.post(MAPS, &body).await.ok()
}

async fn paint(api: &Api, name: &str, color: &str) -> Value {
    api.merge(&format!("{MAPS}/{name}"), &json!({"metadata": {"labels": {"color": color}}})).await.ok()
}

fn version(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
}

#[tokio::test]
async fn from_now_from_then_and_from_the_start() {
    let api = Api::start().await;
    let a = make(&api, "a", "red").await;
    make(&api, "b", "red").await;
    let mut start = api.watch(&format!("{MAPS}?watch=1")).await;
    let mut then = api.watch(&format!("{MAPS}?watch=1&resourceVersion={}", version(&a))).await;
    paint(&api, "a", "blue").await;
    api.delete(&format!("{MAPS}/b")).await.ok();
    for wanted in ["ADDED a", "ADDED b", "MODIFIED a", "DELETED b"] {
        assert_eq!(start.brief().await, wanted);
    }
    for wanted in ["ADDED b", "MODIFIED a"] {
        assert_eq!(then.brief().await, wanted);
    }
    let gone = then.next().await.unwrap();
    // What is deleted carries the revision of its deletion.
    assert_eq!(version(&gone["object"]), api.store.revision());
    let elsewhere = api
        .watch("/api/v1/namespaces/kube-system/configmaps?watch=1&resourceVersion=1&timeoutSeconds=1")
        .await
        .brief()
        .await;
    assert_eq!(elsewhere, "end");
}

#[tokio::test]
async fn selections_turn_changes_into_comings_and_goings() {
    let api = Api::start().await;
    let rv = api.store.revision();
    let mut red = api.watch(&format!("{MAPS}?watch=1&resourceVersion={rv}&labelSelector=color%3Dred")).await;
    let mut one = api.watch(&format!("{MAPS}?watch=1&resourceVersion={rv}&fieldSelector=metadata.name%3Db")).await;
    make(&api, "a", "blue").await;
    make(&api, "b", "red").await;
    paint(&api, "a", "red").await;
    paint(&api, "b", "blue").await;
    paint(&api, "b", "green").await;
    paint(&api, "a", "red2").await;
    for wanted in ["ADDED b", "ADDED a", "DELETED b", "DELETED a"] {
        assert_eq!(red.brief().await, wanted);
    }
    for wanted in ["ADDED b", "MODIFIED b", "MODIFIED b"] {
        assert_eq!(one.brief().await, wanted);
    }
}

#[tokio::test]
async fn initial_events_end_with_a_bookmark() {
    let api = Api::start().await;
    make(&api, "a", "red").await;
    let query = "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let mut events = api.watch(&format!("{MAPS}?{query}")).await;
    assert_eq!(events.brief().await, "ADDED a");
    let mark = events.next().await.unwrap();
    assert_eq!(mark["type"], "BOOKMARK");
    assert_eq!(mark["object"]["kind"], "ConfigMap");
    assert_eq!(mark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    assert_eq!(version(&mark["object"]), api.store.revision());
    make(&api, "b", "red").await;
    assert_eq!(events.brief().await, "ADDED b");
    api.get(&format!("{MAPS}?watch=1&sendInitialEvents=true")).await.fails(422);
}

#[tokio::test]
async fn a_watch_ends_in_time_with_a_bookmark() {
    let api = Api::start().await;
    let mut events =
        api.watch(&format!("{MAPS}?watch=1&resourceVersion=1&allowWatchBookmarks=true&timeoutSeconds=1")).await;
    let mark = events.next().await.unwrap();
    assert_eq!((&mark["type"], version(&mark["object"])), (&json!("BOOKMARK"), api.store.revision()));
    assert_eq!(events.brief().await, "end");
}

#[tokio::test]
async fn too_old_is_an_event_and_slow_readers_are_cut() {
    let api = Api::with(Retention { events: 5, bytes: usize::MAX }, Vec::new()).await;
    let mut slow = api.watch(&format!("{MAPS}?watch=1&resourceVersion={}", api.store.revision())).await;
    for i in 0..20 {
        make(&api, &format!("m{i}"), "red").await;
    }
    let mut old = api.watch(&format!("{MAPS}?watch=1&resourceVersion=2")).await;
    for events in [&mut old, &mut slow] {
        let error = events.next().await.unwrap();
        assert_eq!(
            (&error["type"], &error["object"]["code"], &error["object"]["reason"]),
            (&json!("ERROR"), &json!(410), &json!("Expired"))
        );
        assert!(error["object"]["message"].as_str().unwrap().starts_with("too old resource version: "));
        assert_eq!(events.brief().await, "end");
    }
}

#[tokio::test]
async fn tables_flow_too() {
    let api = Api::start().await;
    make(&api, "a", "red").await;
    let accept = [("accept", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json")];
    let mut events = api.watch_with(&format!("{MAPS}?watch=1"), &accept).await;
    let first = events.next().await.unwrap();
    assert_eq!(first["object"]["kind"], "Table");
    assert_eq!(first["object"]["columnDefinitions"][0]["name"], "Name");
    assert_eq!(first["object"]["rows"][0]["cells"][0], "a");
    make(&api, "b", "red").await;
    let second = events.next().await.unwrap();
    assert_eq!(
        (&second["object"]["columnDefinitions"], &second["object"]["rows"][0]["cells"][0]),
        (&Value::Null, &json!("b"))
    );
}

#[tokio::test]
async fn hundreds_of_watches_see_the_same() {
    let api = Api::start().await;
    let rv = api.store.revision();
    let mut all = Vec::new();
    for _ in 0..300 {
        all.push(api.watch(&format!("{MAPS}?watch=1&resourceVersion={rv}")).await);
    }
    for i in 0..20 {
        make(&api, &format!("m{i}"), "red").await;
    }
    for events in &mut all {
        for i in 0..20 {
            assert_eq!(events.brief().await, format!("ADDED m{i}"));
        }
    }
    api.server.stop();
    for events in &mut all {
        assert_eq!(events.brief().await, "end");
    }
}
