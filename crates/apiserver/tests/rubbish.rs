//! Bytes thrown at every route: always an answer that a Kubernetes client understands, never a failure of the server.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "common/api.rs"]
mod api;

use api::Api;
use http::Method;
use proptest::prelude::*;
use serde_json::json;
use std::sync::OnceLock;

fn shared() -> &'static (tokio::runtime::Runtime, Api) {
    static SHARED: OnceLock<(tokio::runtime::Runtime, Api)> = OnceLock::new();
    SHARED.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let api = runtime.block_on(async {
            let api = Api::start().await;
            let schema = json!({"openAPIV3Schema": {"type": "object", "properties": {"spec": {"type": "object", "properties": {
                "list": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                    "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}},
                "n": {"type": "integer"}}}, "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}});
            let definition = json!({"metadata": {"name": "vms.example.com"}, "spec": {"group": "example.com",
                "scope": "Namespaced", "names": {"plural": "vms", "kind": "Vm"}, "versions": [
                    {"name": "v1", "served": true, "storage": true, "schema": schema, "subresources": {"status": {}}}]}});
            api.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &definition).await.ok();
            let pod = json!({"metadata": {"name": "x"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
            api.post("/api/v1/namespaces/default/pods", &pod).await.ok();
            let vm = json!({"apiVersion": "example.com/v1", "kind": "Vm", "metadata": {"name": "x"}, "spec": {"n": 1}});
            api.post("/apis/example.com/v1/namespaces/default/vms", &vm).await.ok();
            api
        });
        (runtime, api)
    })
}

fn routes() -> impl Strategy<Value = String> {
    let fixed = prop::sample::select(vec![
        "/",
        "/api",
        "/apis",
        "/api/v1",
        "/apis/example.com/v1",
        "/version",
        "/healthz",
        "/openapi/v3/api/v1",
        "/api/v1/namespaces",
        "/api/v1/namespaces/default/finalize",
        "/api/v1/namespaces/default/pods",
        "/api/v1/namespaces/default/pods/x",
        "/api/v1/namespaces/default/pods/x/status",
        "/api/v1/namespaces/default/pods/x/binding",
        "/api/v1/namespaces/default/pods/x/eviction",
        "/api/v1/namespaces/default/pods/x/log",
        "/api/v1/namespaces/default/pods/x/exec",
        "/api/v1/namespaces/default/events",
        "/apis/events.k8s.io/v1/namespaces/default/events",
        "/api/v1/nodes",
        "/api/v1/nodes/x",
        "/api/v1/namespaces/default/secrets",
        "/api/v1/namespaces/default/services",
        "/api/v1/namespaces/default/persistentvolumeclaims",
        "/api/v1/persistentvolumes",
        "/apis/policy/v1/namespaces/default/poddisruptionbudgets",
        "/apis/coordination.k8s.io/v1/namespaces/default/leases",
        "/apis/rbac.authorization.k8s.io/v1/clusterroles",
        "/apis/rbac.authorization.k8s.io/v1/clusterroles/view",
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        "/apis/authorization.k8s.io/v1/subjectaccessreviews",
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        "/apis/authentication.k8s.io/v1/selfsubjectreviews",
        "/apis/storage.k8s.io/v1/storageclasses",
        "/apis/example.com/v1/namespaces/default/vms",
        "/apis/example.com/v1/namespaces/default/vms/x",
        "/apis/example.com/v1/namespaces/default/vms/x/status",
        "/apis/example.com/v1/vms",
    ])
    .prop_map(str::to_owned);
    prop_oneof![8 => fixed, 1 => "/(api|apis)(/[a-z0-9.%]{0,9}){0,6}", 1 => "/[!-~&&[^#?\\\\\"<>^`{|}]]{0,30}"]
}

fn queries() -> impl Strategy<Value = String> {
    let keys = prop::sample::select(vec![
        "limit",
        "continue",
        "labelSelector",
        "fieldSelector",
        "resourceVersion",
        "resourceVersionMatch",
        "dryRun",
        "fieldManager",
        "fieldValidation",
        "force",
        "propagationPolicy",
        "gracePeriodSeconds",
        "includeObject",
        "container",
        "tailLines",
        "sendInitialEvents",
        "x",
    ]);
    let values = prop_oneof![
        prop::sample::select(vec![
            "",
            "0",
            "1",
            "-1",
            "true",
            "All",
            "Exact",
            "NotOlderThan",
            "a=b",
            "a%20in%20(b)",
            "Strict",
            "metadata.name%3Dx",
            "eyJydiI6MSwic3RhcnQiOiJhIn0",
            "Orphan",
            "Foreground",
            "18446744073709551615"
        ])
        .prop_map(str::to_owned),
        "[a-zA-Z0-9%=,()!._-]{0,20}",
    ];
    prop::collection::vec((keys, values), 0..4)
        .prop_map(|pairs| pairs.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join("&"))
}

/// JSON with the member names that handlers look at, in all the wrong shapes.
fn documents() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|b| json!(b)),
        any::<i64>().prop_map(|n| json!(n)),
        prop::sample::select(vec![
            "",
            "x",
            "v1",
            "Pod",
            "Vm",
            "example.com/v1",
            "default",
            "All",
            "2026-01-01T00:00:00Z",
            "1Gi"
        ])
        .prop_map(|s| json!(s)),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        let names = prop::sample::select(vec![
            "metadata",
            "spec",
            "status",
            "name",
            "namespace",
            "kind",
            "apiVersion",
            "labels",
            "annotations",
            "finalizers",
            "ownerReferences",
            "uid",
            "resourceVersion",
            "managedFields",
            "containers",
            "nodeName",
            "target",
            "rules",
            "roleRef",
            "subjects",
            "versions",
            "names",
            "group",
            "scope",
            "schema",
            "openAPIV3Schema",
            "properties",
            "type",
            "list",
            "n",
            "op",
            "path",
            "value",
            "$patch",
            "deleteOptions",
            "preconditions",
            "propagationPolicy",
            "selector",
            "matchLabels",
            "resourceAttributes",
            "stringData",
            "data",
            "conditions",
            "fieldsV1",
            "generateName",
            "deletionTimestamp",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|list| json!(list)),
            prop::collection::btree_map(names, inner, 0..6).prop_map(|map| json!(map)),
        ]
    })
}

/// Good objects in which one thing is wrong.
fn bent() -> impl Strategy<Value = serde_json::Value> {
    let good = prop::sample::select(vec![
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "y", "labels": {"a": "b"}, "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u"}], "finalizers": ["a/b"], "annotations": {"c": "d"}}, "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "i", "env": [{"name": "A", "value": "b"}], "ports": [{"containerPort": 80}], "resources": {"limits": {"cpu": "1"}}}], "volumes": [{"name": "v", "emptyDir": {}}], "tolerations": [{"operator": "Exists"}]}, "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}),
        json!({"apiVersion": "example.com/v1", "kind": "Vm", "metadata": {"name": "x", "managedFields": [{"manager": "m", "operation": "Apply", "apiVersion": "example.com/v1", "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {"f:n": {}, "f:list": {"k:{\"name\":\"a\"}": {".": {}, "f:name": {}}}}}}]}, "spec": {"n": 1, "list": [{"name": "a"}, {"name": "b"}]}, "status": {"phase": "x"}}),
        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "odds.example.com"}, "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "odds", "kind": "Odd"}, "versions": [{"name": "v1", "served": true, "storage": true, "additionalPrinterColumns": [{"name": "A", "type": "string", "jsonPath": ".spec.a"}], "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": {"type": "object", "additionalProperties": {"type": "string"}, "x-kubernetes-validations": [{"rule": "true"}]}}}}}]}}),
        json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "b"}, "spec": {"minAvailable": "50%", "selector": {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}}}),
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "view"}, "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}], "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"a": "b"}}]}}),
        json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "x", "namespace": "default"}, "lastTimestamp": "2026-01-01T00:00:00Z", "count": 1, "source": {"component": "c"}}),
        json!([{"op": "replace", "path": "/spec/n", "value": 2}, {"op": "test", "path": "/metadata/name", "value": "x"}, {"op": "move", "from": "/spec/list/0", "path": "/spec/list/1"}]),
        json!({"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 1, "propagationPolicy": "Foreground", "preconditions": {"uid": "u"}, "dryRun": ["All"]}),
        json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}}}),
    ]);
    (good, documents(), any::<prop::sample::Index>()).prop_map(|(mut good, piece, at)| {
        let mut places = vec![String::new()];
        let mut next = 0;
        while let Some(place) = places.get(next).cloned() {
            match good.pointer(&place) {
                Some(serde_json::Value::Object(map)) => {
                    places
                        .extend(map.keys().map(|key| format!("{place}/{}", key.replace('~', "~0").replace('/', "~1"))));
                }
                Some(serde_json::Value::Array(list)) => places.extend((0..list.len()).map(|i| format!("{place}/{i}"))),
                _ => {}
            }
            next += 1;
        }
        if let Some(slot) = good.pointer_mut(&places[at.index(places.len())]) {
            *slot = piece;
        }
        good
    })
}

fn bodies() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        9 => bent().prop_map(|document| document.to_string().into_bytes()),
        4 => documents().prop_map(|document| document.to_string().into_bytes()),
        1 => documents().prop_map(|d| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": d}).to_string().into_bytes()),
        1 => documents().prop_map(|d| json!({"apiVersion": "example.com/v1", "kind": "Vm", "metadata": d, "spec": {}}).to_string().into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..200),
        1 => prop::collection::vec(any::<u8>(), 0..100).prop_map(|tail| [b"k8s\0".to_vec(), tail].concat()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(1500), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_route_answers_rubbish(
        method in prop::sample::select(vec![Method::GET, Method::POST, Method::POST, Method::POST, Method::PUT, Method::PATCH, Method::PATCH, Method::PATCH, Method::DELETE, Method::OPTIONS, Method::HEAD]),
        route in routes(),
        query in queries(),
        media in prop::sample::select(vec![
            "", "application/json", "application/yaml", "application/vnd.kubernetes.protobuf", "application/json-patch+json",
            "application/merge-patch+json", "application/strategic-merge-patch+json", "application/apply-patch+yaml", "text/x",
        ]),
        accept in prop::sample::select(vec!["*/*", "application/json;as=Table;v=v1;g=meta.k8s.io", "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io", "text/html", ""]),
        body in bodies(),
    ) {
        let (runtime, api) = shared();
        let uri = format!("{route}?{query}");
        prop_assume!(uri.parse::<http::Uri>().is_ok());
        let answer = runtime.block_on(api.raw(method.clone(), &uri, &[("content-type", media), ("accept", accept)], body));
        let code = answer.status.as_u16();
        let said = String::from_utf8_lossy(&answer.bytes).into_owned();
        prop_assert!(code != 500 && code < 502 || code == 504, "{method} {uri}: {code} {said}");
        if code >= 400 && !said.starts_with("404 page not found") {
            let status: serde_json::Value = serde_json::from_slice(&answer.bytes).unwrap();
            prop_assert_eq!((&status["kind"], &status["code"]), (&json!("Status"), &json!(code)), "{} {}", method, uri);
        }
    }
}
