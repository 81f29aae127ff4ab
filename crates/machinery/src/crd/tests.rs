use super::*;
use crate::schema::{apply_defaults, prune, unknown_fields, validate};

fn crd() -> Value {
    serde_json::from_str(
        r#"{
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "birds.example.org"},
        "spec": {
            "group": "example.org", "scope": "Namespaced",
            "names": {"plural": "birds", "kind": "Bird", "shortNames": ["bd"], "categories": ["all"]},
            "versions": [
                {"name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                 "additionalPrinterColumns": [
                     {"name": "Wing", "type": "integer", "jsonPath": ".spec.wing"},
                     {"name": "Far", "type": "string", "jsonPath": ".spec.far", "priority": 1}],
                 "schema": {"openAPIV3Schema": {"type": "object", "required": ["spec"], "properties": {
                     "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"},
                     "spec": {"type": "object", "required": ["wing"], "properties": {
                         "wing": {"type": "integer", "minimum": 1, "maximum": 500},
                         "colour": {"type": "string", "enum": ["red", "brown"], "default": "brown"},
                         "note": {"type": "string", "nullable": true, "maxLength": 3, "pattern": "^[a-z]*$"},
                         "size": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
                         "any": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                         "stops": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                             "maxItems": 2, "items": {"type": "object", "required": ["name"], "properties": {
                                 "name": {"type": "string"}, "days": {"type": "integer", "default": 1}}}},
                         "tags": {"type": "object", "additionalProperties": {"type": "string"}}
                     }}}}}},
                {"name": "v1alpha3", "served": true, "storage": false, "deprecated": true,
                 "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}},
                {"name": "v0", "served": false, "storage": false,
                 "schema": {"openAPIV3Schema": {"type": "object"}}}
            ]
        }
    }"#,
    )
    .unwrap()
}

fn errors(object: &Value) -> Vec<String> {
    let schema = resources_from_crd(&crd()).unwrap().remove(0).schema;
    validate(&schema, object).into_iter().map(|e| format!("{}: {}", e.field, e.message)).collect()
}

#[test]
fn every_served_version_is_a_resource() {
    let found = resources_from_crd(&crd()).unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].gv.api_version(), "example.org/v1");
    assert_eq!((found[0].singular.as_str(), found[0].list_kind.as_str()), ("bird", "BirdList"));
    assert!(found[0].status_subresource && found[0].namespaced && found[0].storage && !found[0].builtin);
    assert!(!found[1].status_subresource && !found[1].storage);
    assert_eq!(found[1].deprecation_warning.as_deref(), Some("example.org/v1alpha3 Bird is deprecated"));
    let Columns::Custom(columns) = &found[0].columns else { panic!("columns") };
    assert_eq!((columns[1].name.as_str(), columns[1].priority), ("Far", 1));
    let Columns::Custom(columns) = &found[1].columns else { panic!("columns") };
    assert_eq!(columns[0].name, "Age");
}

#[test]
fn errors_are_kubernetes_ones() {
    assert_eq!(errors(&json!({})), ["spec: Required value"]);
    assert_eq!(errors(&json!({"spec": {}})), ["spec.wing: Required value"]);
    let bad = json!({"spec": {"wing": "x", "colour": "blue", "note": "LONG", "size": true, "tags": {"a": 1}, "stops": [
        {"name": "a"}, {"name": "a"}, {}]}});
    assert_eq!(
        errors(&bad),
        [
            "spec.colour: Unsupported value: \"blue\": supported values: \"red\", \"brown\"",
            "spec.note: Too long: may not be more than 3 bytes",
            "spec.note: Invalid value: \"LONG\": spec.note in body should match '^[a-z]*$'",
            "spec.size: Invalid value: \"boolean\": spec.size in body must be of type integer,string: \"boolean\"",
            "spec.stops: Too many: 3: must have at most 2 items",
            "spec.stops[2].name: Required value",
            "spec.stops[1]: Duplicate value: {\"name\":\"a\"}",
            "spec.tags.a: Invalid value: \"integer\": spec.tags.a in body must be of type string: \"integer\"",
            "spec.wing: Invalid value: \"string\": spec.wing in body must be of type integer: \"string\"",
        ]
    );
    assert_eq!(
        errors(&json!({"spec": {"wing": 0, "note": null}})),
        ["spec.wing: Invalid value: 0: spec.wing in body should be greater than or equal to 1"]
    );
    let null = "spec.colour: Invalid value: \"null\": spec.colour in body must be of type string: \"null\"";
    assert_eq!(errors(&json!({"spec": {"wing": 1, "colour": null}}))[0], null);
}

#[test]
fn unknown_members_go_and_defaults_come() {
    let schema = resources_from_crd(&crd()).unwrap().remove(0).schema;
    let mut bird = json!({"apiVersion": "example.org/v1", "kind": "Bird", "extra": 1,
        "metadata": {"name": "x", "labels": {"a": "b"}, "creationTimestamp": null, "nonsense": 1},
        "spec": {"wing": 1, "colour": null, "foo": 1, "any": {"x": {"y": 1}}, "stops": [{"name": "a", "q": 1}]}});
    assert_eq!(
        unknown_fields(&schema, &bird),
        [
            "unknown field \"extra\"",
            "unknown field \"metadata.nonsense\"",
            "unknown field \"spec.foo\"",
            "unknown field \"spec.stops[0].q\""
        ]
    );
    prune(&schema, &mut bird);
    apply_defaults(&schema, &mut bird);
    assert_eq!(
        bird,
        json!({"apiVersion": "example.org/v1", "kind": "Bird", "metadata": {"name": "x", "labels": {"a": "b"}},
            "spec": {"wing": 1, "colour": "brown", "any": {"x": {"y": 1}}, "stops": [{"name": "a", "days": 1}]}})
    );
}

#[test]
fn bad_definitions_are_refused_with_the_field() {
    let with = |pointer: &str, value: Value| {
        let mut crd = crd();
        *crd.pointer_mut(pointer).unwrap() = value;
        validate_crd(&crd).into_iter().map(|e| format!("{}: {}", e.field, e.message)).collect::<Vec<_>>()
    };
    assert_eq!(validate_crd(&crd()), []);
    assert_eq!(
        with("/metadata/name", json!("x")),
        ["metadata.name: Invalid value: \"x\": must be spec.names.plural+\".\"+spec.group"]
    );
    assert_eq!(
        with("/spec/versions/0/schema", json!(null)),
        ["spec.versions[0].schema.openAPIV3Schema: Required value: schemas are required"]
    );
    assert!(
        with("/spec/versions/0/storage", json!(false))[0].ends_with("exactly one version marked as storage version")
    );
    assert!(with("/spec/scope", json!("Galaxy"))[0].starts_with("spec.scope: Unsupported value: \"Galaxy\""));
    let spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec";
    assert_eq!(
        with(spec, json!({"properties": {}})),
        [
            "spec.versions[0].schema.openAPIV3Schema.properties[spec].type: Required value: must not be empty for specified object fields"
        ]
    );
    assert!(with(spec, json!({"type": "array"}))[0].contains("properties[spec].items: Required value"));
    let status = resources_from_crd(&json!({"metadata": {"name": "x"}})).unwrap_err();
    assert_eq!((status.code, status.reason.as_str()), (422, "Invalid"));
}

#[test]
fn an_accepted_definition_keeps_its_times() {
    let first = established_status(&crd(), "2026-01-01T00:00:00Z");
    assert_eq!(first["status"]["storedVersions"], json!(["v1"]));
    assert_eq!(first["status"]["acceptedNames"]["listKind"], "BirdList");
    assert_eq!(first["status"]["conditions"][1]["type"], "Established");
    let second = established_status(&first, "2027-01-01T00:00:00Z");
    assert_eq!(first, second);
}

#[test]
fn defaults_must_fit_and_what_is_not_done_is_said() {
    let mut crd = crd();
    let spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    crd.pointer_mut(spec).unwrap()["colour"]["default"] = json!("blue");
    let errors = validate_crd(&crd);
    assert_eq!(errors.len(), 1);
    assert_eq!(errors[0].field, "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties[colour].default");
    assert!(errors[0].message.starts_with("Unsupported value: \"blue\""));
    assert_eq!(warnings(&crd), Vec::<String>::new());
    crd.pointer_mut(spec).unwrap()["note"]["x-kubernetes-validations"] = json!([{"rule": "self != 'x'"}]);
    crd.pointer_mut(spec).unwrap()["note"]["pattern"] = json!("(");
    crd["spec"]["versions"][0]["subresources"]["scale"] = json!({});
    assert_eq!(
        warnings(&crd),
        [
            "version v1: the scale subresource is not served by this server",
            "version v1: x-kubernetes-validations are not evaluated by this server",
            "version v1: pattern \"(\" cannot be evaluated by this server",
        ]
    );
}
