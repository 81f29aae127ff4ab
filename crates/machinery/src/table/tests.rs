use super::*;
use crate::resource::GroupVersion;
use crate::schema::Schema;
use proptest::prelude::*;
use std::sync::Arc;

fn resource(group: &str, kind: &str, columns: Columns) -> Resource {
    Resource {
        gv: GroupVersion { group: group.to_owned(), version: "v1".to_owned() },
        kind: kind.to_owned(),
        list_kind: format!("{kind}List"),
        plural: format!("{}s", kind.to_lowercase()),
        singular: kind.to_lowercase(),
        short_names: vec![],
        categories: vec![],
        namespaced: true,
        status_subresource: true,
        subresources: vec![],
        schema: Arc::new(Schema::default()),
        columns,
        deprecation_warning: None,
        builtin: group.is_empty(),
        virtual_create_only: false,
        actions_only: false,
        gettable: Vec::new(),
        storage: true,
    }
}

fn now() -> Timestamp {
    "2026-01-01T01:00:00Z".parse().unwrap()
}

fn cells(group: &str, kind: &str, object: &Value) -> Vec<Value> {
    let table = render(&resource(group, kind, Columns::Builtin), &[object], Options::default(), now());
    let headings = table["columnDefinitions"].as_array().unwrap().len();
    let cells = table["rows"][0]["cells"].as_array().unwrap().clone();
    assert_eq!(headings, cells.len(), "{kind}");
    cells
}

#[test]
fn makes_custom_columns() {
    let column = |name: &str, ty: &str, path: &str, priority| Column {
        name: name.to_owned(),
        ty: ty.to_owned(),
        format: String::new(),
        description: String::new(),
        priority,
        json_path: path.to_owned(),
    };
    let columns = Columns::Custom(vec![
        column("Age", "date", ".metadata.creationTimestamp", 0),
        column("Phase", "string", ".status.phase", 0),
        column("IP", "string", ".status.interfaces[0].ipAddress", 0),
        column("Live-Migratable", "string", ".status.conditions[?(@.type=='LiveMigratable')].status", 1),
        column("N", "integer", ".status.n", 0),
        column("Bad", "string", ".status[", 0),
    ]);
    let vmi = json!({"metadata": {"name": "a", "creationTimestamp": "2026-01-01T00:00:00Z", "resourceVersion": "7"},
        "spec": {}, "status": {"phase": "Running", "n": 3.0, "conditions": [{"type": "LiveMigratable", "status": "True"}]}});
    let resource = resource("kubevirt.io", "VirtualMachineInstance", columns);
    let table = render(&resource, &[&vmi], Options::default(), now());
    assert_eq!(table["rows"][0]["cells"], json!(["a", "60m", "Running", null, "True", 3, null]));
    assert_eq!(table["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    assert_eq!(table["rows"][0]["object"].get("spec"), None);
    assert_eq!(table["metadata"], json!({"resourceVersion": "7"}));
    assert_eq!(table["columnDefinitions"][4]["priority"], 1);
    assert_eq!(table["columnDefinitions"][0]["format"], "name");
    let options = Options { include: Include::Object, version: "v1beta1", headers: false };
    let table = render(&resource, &[&vmi, &vmi], options, now());
    assert_eq!(table["apiVersion"], "meta.k8s.io/v1beta1");
    assert_eq!(table["columnDefinitions"], Value::Null);
    assert_eq!(table["rows"][1]["object"], vmi);
    assert_eq!(table["metadata"], json!({}));
}

#[test]
fn shows_age_when_a_definition_has_no_columns() {
    let object = json!({"metadata": {"name": "a", "creationTimestamp": "2026-01-01T00:59:50Z"}});
    let table = render(&resource("x.io", "X", Columns::Custom(vec![])), &[&object], Options::default(), now());
    assert_eq!(table["rows"][0]["cells"], json!(["a", "10s"]));
    assert_eq!(table["columnDefinitions"][1]["name"], "Age");
}

#[test]
fn shows_nodes() {
    let node = json!({"metadata": {"name": "n", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"node-role.kubernetes.io/worker": "", "node-role.kubernetes.io/control-plane": ""}},
        "spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "nodeInfo": {"kubeletVersion": "v1"},
            "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]}});
    assert_eq!(
        cells("", "Node", &node),
        *json!([
            "n",
            "Ready,SchedulingDisabled",
            "control-plane,worker",
            "60m",
            "v1",
            "10.0.0.1",
            "<none>",
            "<unknown>",
            "<unknown>",
            "<unknown>"
        ])
        .as_array()
        .unwrap()
    );
}

fn pod(status: Value) -> Value {
    json!({"metadata": {"name": "p", "creationTimestamp": "2026-01-01T00:59:55Z"},
        "spec": {"containers": [{"name": "c"}, {"name": "d"}], "initContainers": [{"name": "i"}]}, "status": status})
}

fn pod_status(status: Value) -> (String, String, String) {
    let row = cells("", "Pod", &pod(status));
    let text = |i: usize| row[i].as_str().unwrap().to_owned();
    (text(1), text(2), text(3))
}

fn triple(a: &str, b: &str, c: &str) -> (String, String, String) {
    (a.to_owned(), b.to_owned(), c.to_owned())
}

#[test]
fn shows_pods() {
    assert_eq!(pod_status(json!({"phase": "Pending"})), triple("0/2", "Pending", "0"));
    let container = |state: Value| {
        json!({"name": "c", "restartCount": 1, "ready": true, "state": state,
        "lastState": {"terminated": {"finishedAt": "2026-01-01T00:59:00Z"}}})
    };
    let running = container(json!({"running": {}}));
    assert_eq!(
        pod_status(json!({"phase": "Running", "containerStatuses": [running, running]})),
        triple("2/2", "Running", "2 (60s ago)")
    );
    let waiting = container(json!({"waiting": {"reason": "ErrImagePull"}}));
    assert_eq!(
        pod_status(json!({"phase": "Pending", "containerStatuses": [waiting, running]})),
        triple("1/2", "ErrImagePull", "2 (60s ago)")
    );
    let done = json!({"state": {"terminated": {"reason": "Completed", "exitCode": 0}}});
    assert_eq!(pod_status(json!({"phase": "Succeeded", "containerStatuses": [done]})), triple("0/2", "Completed", "0"));
    assert_eq!(pod_status(json!({"phase": "Running", "containerStatuses": [done, running]})).1, "NotReady");
    let failed = json!({"state": {"terminated": {"exitCode": 3}}});
    assert_eq!(pod_status(json!({"phase": "Failed", "containerStatuses": [failed]})).1, "ExitCode:3");
    let signalled = json!({"state": {"terminated": {"signal": 9}}});
    assert_eq!(pod_status(json!({"phase": "Failed", "containerStatuses": [signalled]})).1, "Signal:9");
    assert_eq!(pod_status(json!({"phase": "Failed", "reason": "Evicted"})).1, "Evicted");
    assert_eq!(
        pod_status(json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"running": {}}}]})).1,
        "Init:0/1"
    );
    assert_eq!(
        pod_status(json!({"phase": "Pending", "initContainerStatuses":
            [{"name": "i", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}]}))
        .1,
        "Init:Error"
    );
    let mut going = pod(json!({"phase": "Running", "podIP": "10.244.1.2"}));
    going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    going["spec"]["nodeName"] = json!("n1");
    let row = cells("", "Pod", &going);
    assert_eq!(row[2], "Terminating");
    assert_eq!(row[5..], [json!("10.244.1.2"), json!("n1"), json!("<none>"), json!("<none>")]);
}

#[test]
fn shows_events_of_both_groups() {
    let old = json!({"metadata": {"name": "e"}, "type": "Normal", "reason": "Migrating", "message": "m ",
        "involvedObject": {"kind": "VirtualMachineInstance", "name": "a"}, "source": {"component": "c", "host": "h"},
        "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:59:00Z", "count": 3});
    assert_eq!(
        json!(cells("", "Event", &old)),
        json!(["60s", "Normal", "Migrating", "virtualmachineinstance/a", "", "c, h", "m", "60m", 3, "e"])
    );
    let new = json!({"metadata": {"name": "e"}, "eventTime": "2026-01-01T00:59:00.000000Z", "note": "n",
        "lastTimestamp": null, "regarding": {"kind": "Pod", "name": "p"}, "reportingController": "c"});
    assert_eq!(
        json!(cells("events.k8s.io", "Event", &new)),
        json!(["60s", "", "", "pod/p", "", "c", "n", "60s", 1, "e"])
    );
}

#[test]
fn shows_storage() {
    let claim = json!({"metadata": {"name": "c", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"volumeName": "v", "storageClassName": "shared"},
        "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"]}});
    assert_eq!(
        json!(cells("", "PersistentVolumeClaim", &claim)),
        json!(["c", "Bound", "v", "1Gi", "RWX", "shared", "<unset>", "60m", "<unset>"])
    );
    let volume = json!({"metadata": {"name": "v"}, "spec": {"capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteOnce"], "claimRef": {"namespace": "n", "name": "c"}}, "status": {"phase": "Bound"}});
    assert_eq!(cells("", "PersistentVolume", &volume)[5], "n/c");
    let class = json!({"metadata": {"name": "s", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": "p"});
    assert_eq!(
        json!(cells("storage.k8s.io", "StorageClass", &class)),
        json!(["s (default)", "p", "Delete", "Immediate", false, "<unknown>"])
    );
}

#[test]
fn shows_the_rest() {
    let object = json!({"metadata": {"name": "x", "creationTimestamp": "2026-01-01T00:00:00Z"}, "data": {"a": "b"},
        "type": "Opaque", "spec": {"minAvailable": 1, "holderIdentity": "h"}, "status": {"phase": "Active"},
        "roleRef": {"kind": "Role", "name": "r"}, "subjects": [{"kind": "User", "name": "u"},
            {"kind": "ServiceAccount", "name": "s", "namespace": "n"}]});
    let row = |group: &str, kind: &str| json!(cells(group, kind, &object));
    assert_eq!(row("", "Namespace"), json!(["x", "Active", "60m"]));
    assert_eq!(row("", "ConfigMap"), json!(["x", 1, "60m"]));
    assert_eq!(row("", "Secret"), json!(["x", "Opaque", 1, "60m"]));
    assert_eq!(row("", "ServiceAccount"), json!(["x", 0, "60m"]));
    assert_eq!(row("coordination.k8s.io", "Lease"), json!(["x", "h", "60m"]));
    assert_eq!(row("policy", "PodDisruptionBudget"), json!(["x", "1", "N/A", 0, "60m"]));
    let rbac = "rbac.authorization.k8s.io";
    assert_eq!(row(rbac, "Role"), json!(["x", "2026-01-01T00:00:00Z"]));
    assert_eq!(row(rbac, "RoleBinding"), json!(["x", "Role/r", "60m", "u", "", "n/s"]));
    assert_eq!(row("apiextensions.k8s.io", "CustomResourceDefinition"), json!(["x", "2026-01-01T00:00:00Z"]));
}

#[test]
fn reads_include() {
    assert_eq!(Include::parse("Object"), Ok(Include::Object));
    assert_eq!(Include::parse("x").unwrap_err().code, 400);
}

proptest! {
    #[test]
    fn never_panics(key in "status|spec|metadata|involvedObject|data|subjects", inner in
        "conditions|containers|labels|addresses|accessModes|initContainerStatuses|containerStatuses|creationTimestamp",
        leaf in prop_oneof![Just(json!(null)), Just(json!([1, {"state": 3}, null])), Just(json!({"a": []})), Just(json!("é"))])
    {
        let object = json!({key: {inner: leaf}});
        for (group, kind) in [("", "Pod"), ("", "Node"), ("", "Event"), ("", "PersistentVolumeClaim"),
            ("rbac.authorization.k8s.io", "RoleBinding"), ("x", "y")]
        {
            cells(group, kind, &object);
        }
    }
}
