use super::*;
use crate::schema::ListType;
use proptest::prelude::*;
use std::sync::Arc;

fn object(members: Vec<(&str, Schema)>) -> Schema {
    let properties = members.into_iter().map(|(name, schema)| (name.to_owned(), Arc::new(schema))).collect();
    Schema { properties, ..Schema::default() }
}

fn list(items: Schema, list_type: ListType, keys: &[&str]) -> Schema {
    let list_map_keys = keys.iter().map(|k| (*k).to_owned()).collect();
    Schema { items: Some(Arc::new(items)), list_type, list_map_keys, ..Schema::default() }
}

fn scalar() -> Schema {
    Schema::default()
}

fn schema() -> Schema {
    let port = object(vec![
        ("port", scalar()),
        ("protocol", Schema { default: Some(json!("TCP")), ..Schema::default() }),
        ("name", scalar()),
    ]);
    let container = object(vec![
        ("name", scalar()),
        ("image", scalar()),
        ("args", list(scalar(), ListType::Atomic, &[])),
        ("ports", list(port, ListType::Map, &["port", "protocol"])),
    ]);
    let text_map = Schema { additional: Some(Arc::new(scalar())), ..Schema::default() };
    object(vec![
        (
            "spec",
            object(vec![
                ("replicas", scalar()),
                ("containers", list(container, ListType::Map, &["name"])),
                ("tags", list(scalar(), ListType::Set, &[])),
                ("selector", Schema { atomic_map: true, ..text_map.clone() }),
                ("map", text_map),
                ("a", object(vec![("b", scalar()), ("c", scalar())])),
            ]),
        ),
        ("status", object(vec![("phase", scalar())])),
    ])
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_767_225_600 + second).unwrap()
}

fn writer(manager: &str, second: i64) -> Writer<'_> {
    Writer { manager, api_version: "v1", subresource: "", now: at(second) }
}

fn applied(live: Option<&Value>, spec: Value, manager: &str, force: bool) -> Result<Value, Status> {
    let config = json!({"apiVersion": "v1", "kind": "X", "metadata": {"name": "x"}, "spec": spec});
    apply(&schema(), live, &config, force, &writer(manager, 0))
}

fn owned(object: &Value, manager: &str) -> Value {
    let list = object["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    list.iter().find(|e| e["manager"] == manager).map(|e| e["fieldsV1"].clone()).unwrap_or_default()
}

#[test]
fn creates_and_repeats() {
    let spec = json!({"replicas": 1, "containers": [{"name": "a", "image": "i", "args": ["x"]}], "tags": ["t"],
        "selector": {"k": "v"}, "map": {"m": "n"}});
    let first = applied(None, spec.clone(), "me", false).unwrap();
    assert_eq!(
        owned(&first, "me"),
        json!({"f:spec": {"f:replicas": {}, "f:tags": {"v:\"t\"": {}}, "f:selector": {}, "f:map": {"f:m": {}},
            "f:containers": {"k:{\"name\":\"a\"}": {".": {}, "f:name": {}, "f:image": {}, "f:args": {}}}}})
    );
    let entry = &first["metadata"]["managedFields"][0];
    assert_eq!(
        (entry["operation"].as_str(), entry["time"].as_str(), entry["fieldsType"].as_str()),
        (Some("Apply"), Some("2026-01-01T00:00:00Z"), Some("FieldsV1"))
    );
    let config = json!({"apiVersion": "v1", "kind": "X", "metadata": {"name": "x"}, "spec": spec});
    let second = apply(&schema(), Some(&first), &config, false, &writer("me", 60)).unwrap();
    assert_eq!(second, first);
}

#[test]
fn takes_away_what_is_no_longer_applied() {
    let first = applied(
        None,
        json!({"replicas": 1, "containers": [{"name": "a", "image": "i"}, {"name": "b"}], "tags": ["t", "u"],
            "map": {"m": "n"}, "a": {"b": 1}}),
        "me",
        false,
    )
    .unwrap();
    let mut live = first.clone();
    live["spec"]["a"]["c"] = json!("server's");
    let second = applied(Some(&live), json!({"containers": [{"name": "a"}], "tags": ["u"]}), "me", false).unwrap();
    assert_eq!(second["spec"], json!({"containers": [{"name": "a"}], "tags": ["u"], "a": {"c": "server's"}}));
}

#[test]
fn leaves_what_others_own() {
    let first =
        applied(None, json!({"replicas": 1, "containers": [{"name": "a", "image": "i"}]}), "me", false).unwrap();
    let both = applied(Some(&first), json!({"replicas": 1, "containers": [{"name": "a"}]}), "you", false).unwrap();
    let third = applied(Some(&both), json!({"map": {"k": "v"}}), "me", false).unwrap();
    assert_eq!(third["spec"], json!({"replicas": 1, "containers": [{"name": "a"}], "map": {"k": "v"}}));
    assert_eq!(owned(&third, "me"), json!({"f:spec": {"f:map": {"f:k": {}}}}));
    let gone = applied(Some(&third), json!({}), "you", false).unwrap();
    assert_eq!(gone["spec"], json!({"map": {"k": "v"}}));
}

#[test]
fn says_who_owns_what() {
    let first =
        applied(None, json!({"replicas": 1, "containers": [{"name": "a", "image": "i"}]}), "me", false).unwrap();
    let status = applied(Some(&first), json!({"replicas": 2}), "you", false).unwrap_err();
    assert_eq!(
        (status.code, status.reason.as_str(), status.message.as_str()),
        (409, "Conflict", "Apply failed with 1 conflict: conflict with \"me\": .spec.replicas")
    );
    let cause = &status.details.as_ref().unwrap().causes[0];
    assert_eq!(
        (cause.reason.as_str(), cause.message.as_str(), cause.field.as_str()),
        ("FieldManagerConflict", "conflict with \"me\"", ".spec.replicas")
    );
    let mut edited = first.clone();
    edited["spec"]["replicas"] = json!(5);
    track_update(&schema(), Some(&first), &mut edited, &writer("edit", 1));
    let change = json!({"replicas": 2, "containers": [{"name": "a", "image": "j"}]});
    let status = applied(Some(&edited), change.clone(), "you", false).unwrap_err();
    assert_eq!(
        status.message,
        "Apply failed with 2 conflicts: conflicts with \"edit\" using v1 at 2026-01-01T00:00:01Z:\n- .spec.replicas\n\
         conflicts with \"me\":\n- .spec.containers[name=\"a\"].image"
    );
    let forced = applied(Some(&edited), change, "you", true).unwrap();
    assert_eq!(forced["spec"]["replicas"], 2);
    assert_eq!(owned(&forced, "edit"), Value::Null);
    assert_eq!(
        owned(&forced, "me"),
        json!({"f:spec": {"f:containers": {"k:{\"name\":\"a\"}": {".": {}, "f:name": {}}}}})
    );
    assert!(applied(Some(&forced), json!({"replicas": 2}), "me", false).is_ok(), "the same value is no conflict");
}

#[test]
fn tracks_ordinary_writes() {
    let mut created = json!({"apiVersion": "v1", "kind": "X",
        "metadata": {"name": "x", "uid": "u", "labels": {"a": "b"}, "finalizers": ["x/y"]},
        "spec": {"containers": [{"name": "a", "ports": [{"port": 1}]}]}});
    track_update(&schema(), None, &mut created, &writer("create", 0));
    assert_eq!(
        owned(&created, "create"),
        json!({"f:metadata": {"f:finalizers": {".": {}, "v:\"x/y\"": {}}, "f:labels": {".": {}, "f:a": {}}},
            "f:spec": {".": {}, "f:containers": {".": {}, "k:{\"name\":\"a\"}": {".": {}, "f:name": {}, "f:ports": {".": {},
                "k:{\"port\":1,\"protocol\":\"TCP\"}": {".": {}, "f:port": {}}}}}}})
    );
    let mut updated = created.clone();
    updated["metadata"]["labels"] = json!({"c": "d"});
    updated["status"] = json!({"phase": "Running"});
    track_update(&schema(), Some(&created), &mut updated, &Writer { subresource: "status", ..writer("ctl", 5) });
    assert_eq!(
        owned(&updated, "ctl"),
        json!({"f:metadata": {"f:labels": {"f:c": {}}}, "f:status": {".": {}, "f:phase": {}}})
    );
    assert_eq!(owned(&updated, "create")["f:metadata"]["f:labels"], json!({}), "the map is still its creator's");
    let mut same = updated.clone();
    track_update(&schema(), Some(&updated), &mut same, &writer("other", 9));
    assert_eq!(same, updated);
    let mut reset = updated.clone();
    reset["metadata"]["managedFields"] = json!([{}]);
    track_update(&schema(), Some(&updated), &mut reset, &writer("other", 9));
    assert_eq!(reset["metadata"].get("managedFields"), None);
}

#[test]
fn follows_the_schemas_of_kubernetes() {
    let pods = crate::builtin::resources().into_iter().find(|r| r.plural == "pods" && r.gv.group.is_empty()).unwrap();
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "p", "namespace": "n", "labels": {"a": "b"},
            "ownerReferences": [{"uid": "u", "name": "o", "kind": "K", "apiVersion": "v1"}]},
        "spec": {"containers": [{"name": "c", "image": "i", "command": ["x"], "resources": {"limits": {"cpu": "1"}},
                "env": [{"name": "E", "value": "1"}]}],
            "nodeSelector": {"k": "v"}, "tolerations": [{"key": "t"}], "terminationGracePeriodSeconds": 30}});
    track_update(&pods.schema, None, &mut pod, &writer("kubectl-create", 0));
    assert_eq!(
        owned(&pod, "kubectl-create"),
        json!({
            "f:metadata": {"f:labels": {".": {}, "f:a": {}},
                "f:ownerReferences": {".": {}, "k:{\"uid\":\"u\"}": {}}},
            "f:spec": {"f:containers": {"k:{\"name\":\"c\"}": {".": {}, "f:name": {}, "f:image": {}, "f:command": {},
                    "f:resources": {".": {}, "f:limits": {".": {}, "f:cpu": {}}},
                    "f:env": {".": {}, "k:{\"name\":\"E\"}": {".": {}, "f:name": {}, "f:value": {}}}}},
                "f:nodeSelector": {}, "f:tolerations": {}, "f:terminationGracePeriodSeconds": {}}
        })
    );
}

#[test]
fn remembers_what_was_there_before_the_first_apply() {
    let live = json!({"metadata": {"name": "x"}, "spec": {"replicas": 3}});
    let status = applied(Some(&live), json!({"replicas": 1}), "me", false).unwrap_err();
    assert!(status.message.contains("\"before-first-apply\" using v1"), "{}", status.message);
    let both = applied(Some(&live), json!({"replicas": 3}), "me", false).unwrap();
    assert_eq!(both["metadata"]["managedFields"].as_array().unwrap().len(), 2);
}

#[test]
fn keeps_the_order_of_lists() {
    let live =
        json!({"metadata": {"name": "x"}, "spec": {"containers": [{"name": "s"}, {"name": "a"}, {"name": "t"}]}});
    let result = applied(Some(&live), json!({"containers": [{"name": "n"}, {"name": "a"}]}), "me", true).unwrap();
    let names: Vec<&Value> = result["spec"]["containers"].as_array().unwrap().iter().map(|c| &c["name"]).collect();
    assert_eq!(names, ["n", "s", "a", "t"]);
}

#[test]
fn refuses_nonsense() {
    let code = |spec: Value| applied(None, spec, "me", false).unwrap_err();
    assert_eq!(
        code(json!({"containers": [{"name": "a"}, {"name": "a"}]})).message,
        "failed to create typed patch object: .spec.containers: duplicate entries for key [name=\"a\"]"
    );
    assert_eq!(code(json!({"containers": [{"image": "a"}]})).code, 400);
    assert_eq!(code(json!({"tags": ["a", "a"]})).code, 400);
    let config = json!({"metadata": {"managedFields": [{}]}});
    let status = apply(&schema(), None, &config, false, &writer("me", 0)).unwrap_err();
    assert_eq!(status.message, "metadata.managedFields must be nil");
    assert_eq!(apply(&schema(), None, &json!([]), false, &writer("me", 0)).unwrap_err().code, 400);
    assert!(check_manager("", true, "PatchOptions").unwrap_err().message.contains("is required for apply patch"));
    assert!(check_manager("a\n", false, "PatchOptions").is_err());
    assert_eq!(default_manager("kubectl/v1.33 (linux)"), "kubectl");
}

#[test]
fn gathers_ancient_writers() {
    let mut object = json!({"metadata": {"name": "x"}, "spec": {}});
    for i in 0..15 {
        let old = object.clone();
        object["spec"]["map"][format!("k{i}")] = json!(i.to_string());
        track_update(&schema(), Some(&old), &mut object, &writer(&format!("m{i}"), i));
    }
    let list = object["metadata"]["managedFields"].as_array().unwrap();
    assert_eq!(list.len(), 10);
    assert!(list.iter().any(|e| e["manager"] == "ancient-changes"));
    let every: Vec<&str> = list
        .iter()
        .filter_map(|e| e["fieldsV1"]["f:spec"]["f:map"].as_object())
        .flat_map(|m| m.keys())
        .filter(|k| *k != ".")
        .map(String::as_str)
        .collect();
    assert_eq!(every.len(), 15);
}

fn any_spec() -> impl Strategy<Value = Value> {
    let word = "[a-c]";
    let container = ("[a-c]", proptest::option::of("[ij]"), proptest::collection::vec("[xy]", 0..2)).prop_map(
        |(name, image, args)| {
            let mut c = json!({"name": name, "args": args});
            if let Some(image) = image {
                c["image"] = json!(image);
            }
            c
        },
    );
    (
        proptest::option::of(0..3i64),
        proptest::collection::btree_map(word, container, 0..3),
        proptest::collection::btree_set(word, 0..3),
        proptest::collection::btree_map(word, word, 0..3),
        proptest::option::of(proptest::collection::btree_map("[bc]", 0..2i64, 0..2)),
        any::<bool>(),
    )
        .prop_map(|(replicas, containers, tags, map, a, reverse)| {
            let mut containers: Vec<Value> = containers
                .into_iter()
                .map(|(name, mut c)| {
                    c["name"] = json!(name);
                    c
                })
                .collect();
            if reverse {
                containers.reverse();
            }
            let mut spec = json!({"containers": containers, "tags": tags, "map": map, "selector": map});
            if let Some(replicas) = replicas {
                spec["replicas"] = json!(replicas);
            }
            if let Some(a) = a {
                spec["a"] = json!(a);
            }
            spec
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn applying_twice_is_applying_once(specs in proptest::collection::vec((any_spec(), 0..3usize), 1..5)) {
        let managers = ["a", "b", "c"];
        let mut live: Option<Value> = None;
        for (spec, who) in specs {
            let once = applied(live.as_ref(), spec.clone(), managers[who], true).unwrap();
            let twice = applied(Some(&once), spec.clone(), managers[who], false).unwrap();
            prop_assert_eq!(&twice, &once);
            // Everything that was applied is there.
            let merged = walk::merge(&schema(), &once, &json!({"spec": spec}));
            prop_assert_eq!(&merged, &once);
            live = Some(once);
        }
    }

    #[test]
    fn a_lone_applier_gets_exactly_what_it_says(before in any_spec(), after in any_spec()) {
        let once = applied(None, before, "me", false).unwrap();
        let twice = applied(Some(&once), after.clone(), "me", false).unwrap();
        let fresh = applied(None, after, "me", false).unwrap();
        prop_assert_eq!(&twice["metadata"], &fresh["metadata"]);
        // Empty containers may stay behind or not; what they hold may not.
        let difference = walk::difference(&schema(), &twice, &fresh);
        prop_assert!(difference.changed.is_empty(), "{:?}", difference.changed.paths());
    }

    #[test]
    fn every_field_has_an_owner_after_updates(specs in proptest::collection::vec((any_spec(), 0..3usize), 1..5)) {
        let managers = ["a", "b", "c"];
        let mut live: Option<Value> = None;
        for (spec, who) in specs {
            let mut new = json!({"metadata": {"name": "x"}, "spec": spec});
            track_update(&schema(), live.as_ref(), &mut new, &writer(managers[who], 0));
            let owned = managers::read(&new).unwrap_or_default().iter()
                .fold(FieldSet::default(), |all, entry| all.union(&entry.fields));
            let fields = strip(walk::fields_of(&schema(), &new));
            prop_assert!(fields.difference(&owned).is_empty(), "{:?}", fields.difference(&owned).paths());
            live = Some(new);
        }
    }

    #[test]
    fn survives_forged_owners(entries in proptest::collection::vec(("Apply|Update|Fly", "a|b", "f:spec|f:map|k:\\{|v:|.|f:",
        crate::patch::tests::any_json()), 0..4), spec in any_spec(), force in any::<bool>())
    {
        let entries: Vec<Value> = entries.into_iter().map(|(operation, manager, key, fields)|
            json!({"operation": operation, "manager": manager, "fieldsV1": {"f:spec": {key: fields}, ".": {}}})).collect();
        let live = json!({"metadata": {"name": "x", "managedFields": entries}, "spec": spec});
        let _ = applied(Some(&live), json!({"map": {"x": "y"}}), "a", force);
        let mut new = live.clone();
        new["spec"]["map"] = json!({"z": "z"});
        track_update(&schema(), Some(&live), &mut new, &writer("a", 0));
        prop_assert_eq!(&new["spec"]["map"], &json!({"z": "z"}));
    }

    #[test]
    fn never_panics(live in crate::patch::tests::any_json(), config in crate::patch::tests::any_json()) {
        let live = json!({"spec": live, "metadata": live, "status": live});
        let config = json!({"spec": config, "metadata": config});
        let _ = apply(&schema(), Some(&live), &config, true, &writer("me", 0));
        let mut new = config.clone();
        track_update(&schema(), Some(&live), &mut new, &writer("me", 0));
    }
}
