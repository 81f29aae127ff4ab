use super::*;
use std::collections::BTreeSet;

fn references(value: &Value, out: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(target)) = map.get("$ref") {
                out.insert(target.rsplit('/').next().unwrap().to_owned());
            }
            map.values().for_each(|v| references(v, out));
        }
        Value::Array(items) => items.iter().for_each(|v| references(v, out)),
        _ => {}
    }
}

#[test]
fn every_reference_leads_somewhere() {
    let resources = crate::builtin::resources();
    let mut documents =
        vec![("v2".to_owned(), v2_document(&resources)["definitions"].clone(), v2_document(&resources))];
    for gv in group_versions(&resources) {
        let document = v3_document(&resources, &gv).unwrap();
        documents.push((gv.path(), document["components"]["schemas"].clone(), document));
    }
    for (name, definitions, document) in documents {
        let mut targets = BTreeSet::new();
        references(&document, &mut targets);
        assert!(!targets.is_empty());
        for target in targets {
            assert!(definitions.get(&target).is_some_and(Value::is_object), "{name}: {target}");
        }
    }
}

#[test]
fn patch_says_what_kubectl_looks_for() {
    let resources = crate::builtin::resources();
    let document = v3_document(&resources, &GroupVersion::parse("v1")).unwrap();
    let patch = &document["paths"]["/api/v1/namespaces/{namespace}/configmaps/{name}"]["patch"];
    let names: Vec<&str> =
        patch["parameters"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["dryRun", "fieldManager", "fieldValidation", "force"]);
    assert_eq!(patch["x-kubernetes-group-version-kind"], json!({"group": "", "version": "v1", "kind": "ConfigMap"}));
    assert!(patch["requestBody"]["content"].get("application/strategic-merge-patch+json").is_some());
    let spec = &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"];
    assert_eq!(spec["properties"]["containers"]["x-kubernetes-patch-merge-key"], "name");
    assert_eq!(spec["properties"]["volumes"]["x-kubernetes-patch-strategy"], "merge,retainKeys");
    assert!(v3_document(&resources, &GroupVersion::parse("nope/v1")).is_none());
}

#[test]
fn the_index_names_each_version_with_its_hash() {
    let resources = crate::builtin::resources();
    let index = v3_index(&resources);
    let url = index["paths"]["apis/rbac.authorization.k8s.io/v1"]["serverRelativeURL"].as_str().unwrap();
    let document = v3_document(&resources, &GroupVersion::parse("rbac.authorization.k8s.io/v1")).unwrap();
    assert_eq!(url, format!("/openapi/v3/apis/rbac.authorization.k8s.io/v1?hash={}", hash(&document)));
}

#[test]
fn the_protobuf_has_the_document_in_it() {
    let bytes = v2_protobuf(&v2_document(&crate::builtin::resources()));
    // Field 1 (swagger), length-delimited, "2.0".
    assert_eq!(&bytes[..5], b"\x0a\x032.0");
    let has = |needle: &[u8]| bytes.windows(needle.len()).any(|w| w == needle);
    assert!(has(b"io.k8s.api.core.v1.PodSpec") && has(b"fieldValidation"));
}
