use super::*;
use crate::{builtin, crd, openapi};
use proptest::prelude::*;
use serde_json::json;

/// JSON of any shape; member names are often ones that schemas know.
fn any_json() -> impl Strategy<Value = Value> {
    let name = prop_oneof![
        prop::sample::select(vec![
            "apiVersion",
            "kind",
            "metadata",
            "name",
            "labels",
            "spec",
            "status",
            "containers",
            "type",
            "properties",
            "items",
            "versions",
            "schema",
            "openAPIV3Schema",
            "names",
            "plural",
            "group",
            "default",
            "enum",
            "required",
            "data",
            "resources",
            "limits",
            "cpu",
            "x-kubernetes-list-type",
            "x-kubernetes-list-map-keys",
            "pattern",
            "additionalProperties",
            "anyOf",
            "not",
            "served",
            "storage",
            "conversion",
            "additionalPrinterColumns",
        ])
        .prop_map(str::to_owned),
        any::<String>(),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        prop::sample::select(vec!["object", "array", "string", "integer", "map", "set", "1Gi", "(", "[a-z]+"])
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 96, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(name.clone(), inner, 0..8)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn nothing_that_is_sent_makes_it_panic(value in any_json(), pick in any::<prop::sample::Index>()) {
        let resources = builtin::resources();
        let resource = &resources[pick.index(resources.len())];
        let mut object = value.clone();
        let _ = builtin::validate(resource, &object);
        let _ = type_mismatch(&resource.schema, &object);
        builtin::set_defaults(resource, &mut object);
        let once = object.clone();
        builtin::set_defaults(resource, &mut object);
        prop_assert_eq!(&object, &once);
        let _ = builtin::initial_status(resource, &object);
        prune(&resource.schema, &mut object);
        prop_assert_eq!(unknown_fields(&resource.schema, &object), Vec::<String>::new());
    }

    #[test]
    fn no_definition_makes_it_panic(schema in any_json(), object in any_json()) {
        let schema = crd::root_schema(&schema);
        let _ = validate(&schema, &object);
        let mut value = object;
        prune(&schema, &mut value);
        prop_assert_eq!(unknown_fields(&schema, &value), Vec::<String>::new());
        apply_defaults(&schema, &mut value);
        let once = value.clone();
        apply_defaults(&schema, &mut value);
        prop_assert_eq!(value, once);
    }

    #[test]
    fn no_custom_resource_definition_makes_it_panic(value in any_json()) {
        let mut value = value;
        let _ = crd::resources_from_crd(&value);
        crd::set_defaults(&mut value);
        let _ = crd::established_status(&value, "2026-01-01T00:00:00Z");
    }

    #[test]
    fn any_definition_that_is_accepted_is_published(schema in any_json()) {
        let mut schema = schema;
        if let Value::Object(map) = &mut schema {
            map.insert("type".into(), json!("object"));
        }
        let definition = json!({"metadata": {"name": "as.b.c"}, "spec": {"group": "b.c", "scope": "Cluster",
            "names": {"plural": "as", "kind": "A"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}]}});
        if let Ok(resources) = crd::resources_from_crd(&definition) {
            let _ = openapi::v3_index(&resources);
            let document = openapi::v2_document(&resources);
            prop_assert!(!openapi::v2_protobuf(&document).is_empty());
        }
    }
}

#[test]
fn facts_of_kubernetes_are_in_the_schemas() {
    let pod = builtin::resources().into_iter().find(|r| r.kind == "Pod").unwrap();
    let at = |path: &str| pod.schema.at(&path.split('.').collect::<Vec<_>>()).unwrap();
    assert_eq!(at("spec.containers").patch_merge_key.as_deref(), Some("name"));
    assert_eq!(at("spec.containers.0.ports").list_map_keys, ["containerPort", "protocol"]);
    assert_eq!(at("spec.volumes").patch_strategy, ["merge", "retainKeys"]);
    assert_eq!(at("spec.tolerations").list_type, ListType::Atomic);
    assert_eq!(at("metadata.finalizers").list_type, ListType::Set);
    assert!(at("spec.containers.0.resources.limits.cpu").quantity);
    assert!(at("spec.containers.0.livenessProbe.httpGet.port").int_or_string);
    assert_eq!(at("metadata.creationTimestamp").format.as_deref(), Some("date-time"));
    assert!(at("metadata.managedFields.0.fieldsV1").preserve_unknown);
    assert_eq!(at("spec").definition.as_deref(), Some("io.k8s.api.core.v1.PodSpec"));
    assert!(at("spec.nodeSelector").additional.is_some());
    assert!(pod.schema.at(&["spec", "nope"]).is_none());
}

#[test]
fn merge_facts_name_members_that_exist() {
    builtin::check_merge_facts();
}

#[test]
fn wrong_types_are_told_as_a_decoder_tells_them() {
    let map = builtin::resources().into_iter().find(|r| r.kind == "ConfigMap").unwrap();
    let wrong = type_mismatch(&map.schema, &json!({"metadata": {"name": "a"}, "data": {"x": 1}})).unwrap();
    assert_eq!((wrong.path.as_str(), wrong.found, wrong.wanted.as_str()), ("data.x", "number", "string"));
    let wrong = type_mismatch(&map.schema, &json!({"metadata": []})).unwrap();
    assert_eq!(
        wrong.message("v1", "ConfigMap"),
        "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: json: cannot unmarshal array into Go struct \
         field ConfigMap.metadata of type v1.ObjectMeta"
    );
    assert_eq!(type_mismatch(&map.schema, &json!({"data": null})), None);
}

#[test]
fn our_own_definitions_are_good_ones() {
    let crds = godwit_api::crd::crds();
    assert!(!crds.is_empty());
    for definition in crds {
        let name = definition["metadata"]["name"].clone();
        assert_eq!(crd::validate_crd(&definition), [], "{name}");
        assert!(!crd::resources_from_crd(&definition).unwrap().is_empty());
        // A definition is itself an object of a built-in kind.
        let kind = builtin::resources().into_iter().find(|r| r.kind == "CustomResourceDefinition").unwrap();
        assert_eq!(builtin::validate(&kind, &definition), [], "{name}");
        assert_eq!(unknown_fields(&kind.schema, &definition), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn manifests_as_tools_write_them_are_accepted() {
    let vm = json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine",
        "metadata": {"name": "v", "namespace": "n", "creationTimestamp": null, "annotations": null},
        "spec": {"runStrategy": "Always", "template": {
            "metadata": {"creationTimestamp": null, "labels": {"a": "b"}},
            "spec": {"domain": {"memory": {"guest": "1Gi"}, "resources": {"requests": {"memory": "64M"}}, "devices": {
                "disks": [{"name": "d", "disk": {"bus": "virtio"}}], "interfaces": [{"name": "default", "masquerade": {}}]}},
                "networks": [{"name": "default", "pod": {}}],
                "volumes": [{"name": "d", "containerDisk": {"image": "x"}}]}}},
        "status": {}});
    let definition = godwit_api::crd::crds()
        .into_iter()
        .find(|crd| crd["metadata"]["name"] == "virtualmachines.kubevirt.io")
        .unwrap();
    for resource in crd::resources_from_crd(&definition).unwrap() {
        let mut object = vm.clone();
        prune(&resource.schema, &mut object);
        apply_defaults(&resource.schema, &mut object);
        assert_eq!(builtin::validate(&resource, &object), []);
        assert_eq!(object["spec"]["template"]["metadata"]["labels"]["a"], "b");
    }
}
