//! ResourceQuotas: what fits, what does not, and what is said about it.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "common/api.rs"]
mod api;

use api::Api;
use serde_json::{Value, json};

const PODS: &str = "/api/v1/namespaces/default/pods";
const QUOTAS: &str = "/api/v1/namespaces/default/resourcequotas";

fn pod(name: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "i",
        "resources": {"requests": {"memory": "64Mi", "cpu": "100m"}}}]}})
}

async fn with_quota(hard: Value) -> Api {
    let api = Api::start().await;
    api.post(QUOTAS, &json!({"metadata": {"name": "q"}, "spec": {"hard": hard}})).await.ok();
    api
}

async fn used(api: &Api, wanted: Value) {
    api.until(&format!("{QUOTAS}/q"), |quota| quota["status"]["used"] == wanted).await;
}

#[tokio::test]
async fn what_does_not_fit_is_refused_until_there_is_room() {
    let api = with_quota(json!({"pods": "3", "requests.memory": "128Mi"})).await;
    used(&api, json!({"pods": "0", "requests.memory": "0"})).await;
    api.post(PODS, &pod("a")).await.ok();
    api.post(PODS, &pod("b")).await.ok();
    // Whoever has been told that its pod is there finds it counted.
    let quota = api.get(&format!("{QUOTAS}/q")).await.ok();
    assert_eq!(quota["status"]["used"], json!({"pods": "2", "requests.memory": "128Mi"}));
    assert_eq!(quota["status"]["hard"], json!({"pods": "3", "requests.memory": "128Mi"}));
    let why = "pods \"c\" is forbidden: exceeded quota: q, requested: requests.memory=64Mi, used: \
               requests.memory=128Mi, limited: requests.memory=128Mi";
    assert_eq!(api.post(PODS, &pod("c")).await.fails(403), why);
    assert_eq!(api.post(&format!("{PODS}?dryRun=All"), &pod("c")).await.fails(403), why);
    let mut silent = pod("silent");
    silent["spec"]["containers"][0]["resources"] = json!({});
    let why = "pods \"silent\" is forbidden: failed quota: q: must specify requests.memory for: c";
    assert_eq!(api.post(PODS, &silent).await.fails(403), why);

    // A pod that is over no longer counts, nor one that is gone.
    api.merge(&format!("{PODS}/a/status"), &json!({"status": {"phase": "Succeeded"}})).await.ok();
    used(&api, json!({"pods": "1", "requests.memory": "64Mi"})).await;
    api.post(&format!("{PODS}?dryRun=All"), &pod("c")).await.ok();
    used(&api, json!({"pods": "1", "requests.memory": "64Mi"})).await;
    api.post(PODS, &pod("c")).await.ok();
    api.delete(&format!("{PODS}/b")).await.ok();
    used(&api, json!({"pods": "1", "requests.memory": "64Mi"})).await;

    // More room is there at once.
    api.post(PODS, &pod("d")).await.ok();
    api.post(PODS, &pod("e")).await.fails(403);
    api.merge(&format!("{QUOTAS}/q"), &json!({"spec": {"hard": {"requests.memory": "1Gi"}}})).await.ok();
    api.post(PODS, &pod("e")).await.ok();
    let why = "pods \"f\" is forbidden: exceeded quota: q, requested: pods=1, used: pods=3, limited: pods=3";
    assert_eq!(api.post(PODS, &pod("f")).await.fails(403), why);
}

#[tokio::test]
async fn the_last_place_is_taken_once() {
    let api = with_quota(json!({"count/pods": "5", "pods": "5"})).await;
    let all = futures::future::join_all((0..20).map(|n| {
        let api = &api;
        async move { api.post(PODS, &pod(&format!("p{n}"))).await.status.as_u16() }
    }))
    .await;
    assert_eq!(all.iter().filter(|code| **code == 201).count(), 5, "{all:?}");
    assert_eq!(all.iter().filter(|code| **code == 403).count(), 15, "{all:?}");
    used(&api, json!({"count/pods": "5", "pods": "5"})).await;
}

#[tokio::test]
async fn any_kind_can_be_counted() {
    let api = with_quota(json!({"configmaps": "2", "count/leases.coordination.k8s.io": "0"})).await;
    // The namespace has kube-root-ca.crt or not; one more than there is fits.
    let quota = api.until(&format!("{QUOTAS}/q"), |quota| quota["status"]["used"].is_object()).await;
    let taken: usize = quota["status"]["used"]["configmaps"].as_str().unwrap().parse().unwrap();
    let maps = "/api/v1/namespaces/default/configmaps";
    for n in taken..2 {
        api.post(maps, &json!({"metadata": {"name": format!("m{n}")}})).await.ok();
    }
    let why = "configmaps \"more\" is forbidden: exceeded quota: q, requested: configmaps=1, used: configmaps=2, limited: \
               configmaps=2";
    assert_eq!(api.post(maps, &json!({"metadata": {"name": "more"}})).await.fails(403), why);
    let leases = "/apis/coordination.k8s.io/v1/namespaces/default/leases";
    let why = "leases.coordination.k8s.io \"l\" is forbidden: exceeded quota: q, requested: \
               count/leases.coordination.k8s.io=1, used: count/leases.coordination.k8s.io=0, limited: \
               count/leases.coordination.k8s.io=0";
    assert_eq!(api.post(leases, &json!({"metadata": {"name": "l"}})).await.fails(403), why);
    let odd = json!({"metadata": {"name": "odd"}, "spec": {"hard": {"podz": "1"}}});
    assert!(api.post(QUOTAS, &odd).await.fails(422).contains("must be a standard resource for quota"));
}
