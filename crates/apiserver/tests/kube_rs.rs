//! kube-rs against the server in this process: the same client path that the controllers use.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "common/api.rs"]
mod api;

use futures::{StreamExt, pin_mut};
use godwit_apiserver::User;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

fn named(name: &str) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name}, "data": {"a": "b"}})).unwrap()
}

#[tokio::test]
async fn a_client_in_the_same_process() {
    let server = api::Api::start().await.server;
    let client = Client::new(server.service(User::new("admin", &["system:masters"])), "default");
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let made = maps.create(&PostParams::default(), &named("a")).await.unwrap();
    assert!(made.uid().is_some());
    let patch = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"c": "d"}});
    let applied = maps.patch("a", &PatchParams::apply("me"), &Patch::Apply(&patch)).await.unwrap();
    assert_eq!(applied.data.unwrap().len(), 2);
    let refused = maps.create(&PostParams::default(), &named("a")).await.unwrap_err();
    assert!(matches!(refused, kube::Error::Api(status) if status.code == 409 && status.reason == "AlreadyExists"));
    let spaces: Api<Namespace> = Api::all(client.clone());
    assert!(spaces.list(&ListParams::default()).await.unwrap().iter().any(|ns| ns.name_any() == "kubevirt"));
    assert_eq!(client.apiserver_version().await.unwrap().major, "1");
    assert!(client.list_core_api_resources("v1").await.unwrap().resources.iter().any(|r| r.name == "pods/eviction"));
    maps.delete("a", &DeleteParams::default()).await.unwrap();
    assert!(maps.get_opt("a").await.unwrap().is_none());
}

#[tokio::test]
async fn watchers_of_both_kinds() {
    let server = api::Api::start().await.server;
    let client = Client::new(server.service(User::new("admin", &["system:masters"])), "default");
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    for (name, config) in
        [("list", watcher::Config::default()), ("stream", watcher::Config::default().streaming_lists())]
    {
        maps.create(&PostParams::default(), &named(name)).await.unwrap();
        let events = watcher(maps.clone(), config);
        pin_mut!(events);
        let mut initial = Vec::new();
        loop {
            match events.next().await.unwrap().unwrap() {
                Event::Init => {}
                Event::InitApply(object) => initial.push(object.name_any()),
                Event::InitDone => break,
                other => panic!("{other:?} before the end of the initial events"),
            }
        }
        assert!(initial.contains(&name.to_owned()), "{initial:?}");
        let later = format!("{name}-later");
        maps.create(&PostParams::default(), &named(&later)).await.unwrap();
        maps.delete(&later, &DeleteParams::default()).await.unwrap();
        assert!(matches!(events.next().await, Some(Ok(Event::Apply(o))) if o.name_any() == later));
        assert!(matches!(events.next().await, Some(Ok(Event::Delete(o))) if o.name_any() == later));
    }
}
