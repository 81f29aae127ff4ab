use serde_json::{Value, json};

use super::*;
use crate::admission::testing::{World, vmi};

fn vm(strategy: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine",
        "metadata": {"name": "db", "namespace": "default", "uid": "uid-vm", "resourceVersion": "5"},
        "spec": {"runStrategy": strategy, "template": {"spec": vmi("db")["spec"]}},
        "status": {"created": true},
    })
}

/// The VM's VMI.
fn running() -> Value {
    let mut vmi = vmi("db");
    vmi["metadata"]["resourceVersion"] = json!("7");
    vmi["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": "db", "uid": "uid-vm"}]);
    vmi["spec"]["terminationGracePeriodSeconds"] = json!(30);
    vmi["status"]["nodeName"] = json!("node1");
    vmi
}

fn with(mut object: Value, path: &str, value: Value) -> Value {
    let (parent, key) = path.rsplit_once('/').unwrap();
    object.pointer_mut(parent).unwrap()[key] = value;
    object
}

fn ask(objects: &[&Value], resource: &str, action: &str, body: Value) -> Result<Deed, Refusal> {
    let world = World::new(objects.iter().map(|object| (*object).clone()).collect());
    let user = "alice";
    match decide(&Request { resource, action, namespace: "default", name: "db", body: &body, user, lookup: &world })? {
        Decision::Deed(deed) => Ok(deed),
        Decision::Errand(errand) => panic!("{errand:?}"),
    }
}

/// What the node is to do about the VMI.
fn of_node(objects: &[&Value], action: &str, body: Value) -> Result<Errand, Refusal> {
    let world = World::new(objects.iter().map(|object| (*object).clone()).collect());
    let user = "alice";
    let request =
        Request { resource: INSTANCES, action, namespace: "default", name: "db", body: &body, user, lookup: &world };
    match decide(&request)? {
        Decision::Errand(errand) => Ok(errand),
        Decision::Deed(deed) => panic!("{deed:?}"),
    }
}

#[test]
fn the_guests_node_is_asked_what_only_it_can_do() {
    let name = crate::names::launcher_pod("db", "uid-db");
    let pod = json!({"kind": "Pod", "metadata": {"name": name, "namespace": "default", "uid": "uid-pod",
        "labels": {"kubevirt.io/created-by": "uid-db"}}, "spec": {"containers": [], "nodeName": "node1"}});
    let condition = |type_: &str| json!([{"type": type_, "status": "True"}]);
    let paused = with(running(), "/status/conditions", condition("Paused"));
    let agent = with(running(), "/status/conditions", condition("AgentConnected"));
    let starting = with(running(), "/status/phase", json!("Scheduled"));
    let place = place::Place { node: "node1".to_owned(), pod_uid: "uid-pod".to_owned() };
    let said = |text: &str| Err(Refusal::Conflict(text.to_owned()));
    for (vmi, action) in [
        (&running(), "pause"),
        (&paused, "unpause"),
        (&running(), "reset"),
        (&agent, "softreboot"),
        (&running(), "softreboot"),
        (&agent, "guestosinfo"),
        (&agent, "userlist"),
        (&agent, "filesystemlist"),
        (&running(), "console"),
    ] {
        let errand = of_node(&[vmi, &pod], action, Value::Null).unwrap();
        assert_eq!((errand.action.as_str(), &errand.place, errand.dry_run), (action, &place, false));
        assert!(of_node(&[vmi, &pod], action, json!({"dryRun": ["All"]})).unwrap().dry_run || action == "console");
        assert_eq!(of_node(&[], action, Value::Null), Err(Refusal::NotFound("virtualmachineinstance")));
        assert!(matches!(of_node(&[vmi], action, Value::Null), Err(Refusal::Internal(_))), "no pod");
    }
    assert_eq!(of_node(&[&starting], "pause", Value::Null), said("VM is not running"));
    assert_eq!(of_node(&[&paused], "pause", Value::Null), said("VMI is already paused"));
    let probed = with(running(), "/spec/livenessProbe", json!({"tcpSocket": {"port": 80}}));
    assert!(matches!(of_node(&[&probed, &pod], "pause", Value::Null), Err(Refusal::Forbidden(_))));
    let pinged = with(running(), "/spec/livenessProbe", json!({"guestAgentPing": {}}));
    assert!(of_node(&[&pinged, &pod], "pause", Value::Null).is_ok());
    assert_eq!(of_node(&[&starting], "unpause", Value::Null), said("VMI is not running"));
    assert_eq!(of_node(&[&running()], "unpause", Value::Null), said("VMI is not paused"));
    assert!(matches!(of_node(&[&starting], "reset", Value::Null), Err(Refusal::Internal(_))));
    assert_eq!(of_node(&[&starting], "softreboot", Value::Null), said("VM is not running"));
    assert_eq!(of_node(&[&paused], "softreboot", Value::Null), said("VMI is paused"));
    let without = with(running(), "/spec/domain/features", json!({"acpi": {"enabled": false}}));
    let neither = "VMI neither have the agent connected nor the ACPI feature enabled";
    assert_eq!(of_node(&[&without], "softreboot", Value::Null), said(neither));
    for action in ["guestosinfo", "userlist", "filesystemlist"] {
        assert_eq!(of_node(&[&starting], action, Value::Null), said("VMI is not running"));
        assert_eq!(of_node(&[&running()], action, Value::Null), said("VMI does not have guest agent connected"));
    }
    let bad = |text: &str| Err(Refusal::BadRequest(text.to_owned()));
    assert_eq!(of_node(&[&starting], "console", Value::Null), bad("VMI is not running"));
    let failed = with(running(), "/status/phase", json!("Failed"));
    assert_eq!(of_node(&[&failed], "console", Value::Null), said("VMI is in failed status"));
    let older = "No graphics devices are present: the guest was started by an older version, which gave it none. Restart its VM";
    assert_eq!(of_node(&[&running(), &pod], "vnc", Value::Null), bad(older));
    let seen = with(running(), "/status/machineRevision", json!(3));
    assert_eq!(of_node(&[&seen, &pod], "vnc", Value::Null).unwrap().action, "vnc");
    let unseen = with(seen, "/spec/domain/devices/autoattachGraphicsDevice", json!(false));
    assert_eq!(of_node(&[&unseen, &pod], "vnc", Value::Null), bad("No graphics devices are present."));
    assert_eq!(of_node(&[&starting], "vnc", Value::Null), bad("VMI is not running"));
    let silent = with(running(), "/spec/domain/devices/autoattachSerialConsole", json!(false));
    assert_eq!(of_node(&[&silent], "console", Value::Null), bad("No serial consoles are present."));
}

fn of_vm(objects: &[&Value], action: &str, body: Value) -> Result<Deed, Refusal> {
    ask(objects, MACHINES, action, body)
}

/// What is written: the plural with `/status` where it is the status, and the patch.
fn written(deed: Result<Deed, Refusal>) -> Vec<(String, Value)> {
    let deed = deed.expect("granted");
    let of = |write| match write {
        Write::Patch(patch) => {
            (format!("{}{}", patch.resource, if patch.status { "/status" } else { "" }), patch.patch)
        }
        Write::Create { resource, object } => (resource.to_owned(), object),
    };
    deed.writes.into_iter().map(of).collect()
}

fn requests(changes: Value) -> (String, Value) {
    let status = json!({ "stateChangeRequests": changes, "startFailure": null });
    ("virtualmachines/status".to_owned(), json!({ "metadata": {"resourceVersion": "5"}, "status": status }))
}

fn spec(field: &str, value: Value) -> (String, Value) {
    let mut patch = json!({ "metadata": {"resourceVersion": "5"}, "spec": {} });
    patch["spec"][field] = value;
    ("virtualmachines".to_owned(), patch)
}

fn grace(seconds: i64) -> (String, Value) {
    let spec = json!({ "terminationGracePeriodSeconds": seconds });
    ("virtualmachineinstances".to_owned(), json!({ "metadata": {"uid": "uid-db"}, "spec": spec }))
}

fn said(text: &str) -> Result<Deed, Refusal> {
    Err(Refusal::Conflict(text.to_owned()))
}

#[test]
fn a_vm_is_started_as_its_strategy_has_it() {
    let start = |objects: &[&Value]| of_vm(objects, "start", Value::Null);
    assert_eq!(start(&[]), Err(Refusal::NotFound("virtualmachine")));
    assert_eq!(written(start(&[&vm("Halted")])), [spec("runStrategy", json!("Always"))]);
    let mut older = vm("Halted");
    older["spec"] = json!({ "running": false, "template": older["spec"]["template"] });
    assert_eq!(written(start(&[&older])), [spec("running", json!(true))]);
    for strategy in ["Manual", "RerunOnFailure"] {
        assert_eq!(written(start(&[&vm(strategy)])), [requests(json!([{"action": "Start"}]))]);
        assert_eq!(start(&[&vm(strategy), &running()]), said("VM is already running"));
    }
    for strategy in ["Always", "Once"] {
        let text = format!("{strategy} does not support manual start requests");
        assert_eq!(start(&[&vm(strategy)]), said(&text));
    }
    // What is left of an earlier run goes first.
    let ended = with(running(), "/status/phase", json!("Succeeded"));
    let again = || requests(json!([{"action": "Stop", "uid": "uid-db"}, {"action": "Start"}]));
    for strategy in ["Manual", "RerunOnFailure"] {
        assert_eq!(written(start(&[&vm(strategy), &ended])), [again()]);
    }
    let failed = with(running(), "/status/phase", json!("Failed"));
    assert_eq!(written(start(&[&vm("Manual"), &failed])), [again()]);
    let text = "RerunOnFailure does not support starting VM from failed state";
    assert_eq!(start(&[&vm("RerunOnFailure"), &failed]), said(text));
    // Paused, the controller has to see to it.
    for strategy in ["Halted", "Manual"] {
        let deed = of_vm(&[&vm(strategy)], "start", json!({"paused": true}));
        assert_eq!(written(deed), [requests(json!([{"action": "Start", "data": {"paused": "true"}}]))]);
    }
}

#[test]
fn a_vm_is_stopped_with_the_grace_that_is_asked_for() {
    let stop = |objects: &[&Value], body: Value| of_vm(objects, "stop", body);
    let wish = || requests(json!([{"action": "Stop", "uid": "uid-db"}]));
    for strategy in ["Always", "Once"] {
        let halted = || spec("runStrategy", json!("Halted"));
        assert_eq!(written(stop(&[&vm(strategy), &running()], Value::Null)), [halted()]);
        assert_eq!(written(stop(&[&vm(strategy)], json!({"gracePeriod": 3}))), [halted()]);
        let deed = stop(&[&vm(strategy), &running()], json!({"gracePeriod": 0, "dryRun": ["All"]}));
        assert!(deed.as_ref().unwrap().dry_run);
        assert_eq!(written(deed), [halted(), grace(0)]);
    }
    for strategy in ["Manual", "RerunOnFailure"] {
        assert_eq!(written(stop(&[&vm(strategy), &running()], Value::Null)), [wish()]);
        assert_eq!(stop(&[&vm(strategy)], Value::Null), said("VM is not running"));
    }
    let shorter = "Halted only supports manual stop requests with a shorter graceperiod";
    assert_eq!(stop(&[&vm("Halted"), &running()], Value::Null), said(shorter));
    assert_eq!(stop(&[&vm("Halted"), &running()], json!({"gracePeriod": 30})), said(shorter));
    assert_eq!(written(stop(&[&vm("Halted"), &running()], json!({"gracePeriod": 29}))), [wish(), grace(29)]);
    assert_eq!(stop(&[&vm("Halted")], Value::Null), said("VM is not running"));
    // A stop takes the place of what was wished for.
    let starting = with(vm("Manual"), "/status/stateChangeRequests", json!([{"action": "Start"}]));
    assert_eq!(written(stop(&[&starting, &running()], Value::Null)), [wish()]);
    for odd in [json!({"gracePeriod": "soon"}), json!({"gracePeriod": -1}), json!({"dryRun": ["Some"]}), json!([1])] {
        let refused = stop(&[&vm("Manual"), &running()], odd.clone());
        assert!(matches!(refused, Err(Refusal::BadRequest(_))), "{odd}: {refused:?}");
    }
}

#[test]
fn a_restart_is_a_stop_and_a_start() {
    let restart = |objects: &[&Value], body: Value| of_vm(objects, "restart", body);
    let both = || requests(json!([{"action": "Stop", "uid": "uid-db"}, {"action": "Start"}]));
    for strategy in ["Always", "Manual", "RerunOnFailure"] {
        assert_eq!(written(restart(&[&vm(strategy), &running()], Value::Null)), [both()]);
        let forced = restart(&[&vm(strategy), &running()], json!({"gracePeriodSeconds": 0}));
        assert_eq!(written(forced), [both(), grace(1)]);
        assert_eq!(restart(&[&vm(strategy)], Value::Null), said("VM is not running: Halted"));
    }
    for strategy in ["Halted", "Once"] {
        let text = format!("RunStategy {strategy} does not support manual restart requests");
        assert_eq!(restart(&[&vm(strategy), &running()], Value::Null), said(&text));
    }
    let bad = |text: &str| Err(Refusal::BadRequest(text.to_owned()));
    let refused = restart(&[&vm("Always"), &running()], json!({"gracePeriodSeconds": 5}));
    assert_eq!(refused, bad("For force restart, only gracePeriod=0 is supported for now"));
    let busy = with(vm("Manual"), "/status/stateChangeRequests", json!([{"action": "Stop", "uid": "uid-db"}]));
    let refused = restart(&[&busy, &running()], Value::Null);
    let text = "unable to complete request: stop/start already underway".to_owned();
    assert_eq!(refused, Err(Refusal::Internal(text)));
}

#[test]
fn a_migration_is_made_in_the_name_of_who_asks() {
    let migrate = |objects: &[&Value], body: Value| of_vm(objects, "migrate", body);
    let body = json!({"addedNodeSelector": {"zone": "b"}, "dryRun": ["All"]});
    let deed = migrate(&[&vm("Always"), &running()], body).unwrap();
    assert_eq!((deed.code, deed.dry_run), (202, true));
    let [(resource, object)] = &written(Ok(deed))[..] else { panic!("one write") };
    assert_eq!(resource, "virtualmachineinstancemigrations");
    assert_eq!(object["metadata"]["generateName"], "kubevirt-migrate-vm-");
    assert_eq!(object["metadata"]["annotations"]["godwit.io/requested-by"], "alice");
    assert_eq!(object["spec"], json!({"vmiName": "db", "addedNodeSelector": {"zone": "b"}}));
    assert_eq!(migrate(&[&vm("Always")], Value::Null), Err(Refusal::NotFound("virtualmachineinstance")));
    assert_eq!(migrate(&[&running()], Value::Null), Err(Refusal::NotFound("virtualmachine")));
    let starting = with(running(), "/status/phase", json!("Scheduled"));
    assert_eq!(migrate(&[&vm("Always"), &starting], Value::Null), said("VM is not running"));
}

#[test]
fn an_evacuation_is_cancelled_by_the_name_of_the_node() {
    let node = |taints: Value| json!({"kind": "Node", "metadata": {"name": "node1", "namespace": ""}, "spec": {"taints": taints}});
    let free = node(json!([{"key": "kubevirt.io/drain", "effect": "NoExecute"}]));
    let marked = with(running(), "/status/evacuationNodeName", json!("node1"));
    let named = || json!({"evacuationNodeName": "node1"});
    let clear = json!({"metadata": {"resourceVersion": "7"}, "status": {"evacuationNodeName": null}});
    for resource in [INSTANCES, MACHINES] {
        let cancel = |objects: &[&Value], body: Value| ask(objects, resource, "evacuate/cancel", body);
        let deed = cancel(&[&vm("Always"), &marked, &free], named());
        assert_eq!(deed.as_ref().unwrap().code, 200);
        assert_eq!(written(deed), [("virtualmachineinstances".to_owned(), clear.clone())]);
        // Nothing is asked of it: nothing to take back.
        assert_eq!(written(cancel(&[&vm("Always"), &running(), &free], named())), []);
        let refused = cancel(&[&vm("Always"), &marked], Value::Null);
        assert_eq!(refused, Err(Refusal::BadRequest("No body".to_owned())));
        let other = cancel(&[&vm("Always"), &marked], json!({"evacuationNodeName": "node2"}));
        assert!(
            matches!(&other, Err(Refusal::Conflict(why)) if why.contains("node1") && why.contains("node2")),
            "{other:?}"
        );
        let drained = node(json!([{"key": "kubevirt.io/drain", "effect": "NoSchedule"}]));
        let text = "Node \"node1\" has NodeDrainTaintKey \"kubevirt.io/drain:NoSchedule\"".to_owned();
        for vmi in [&marked, &running()] {
            let refused = cancel(&[&vm("Always"), vmi, &drained], named());
            assert_eq!(refused, Err(Refusal::BadRequest(text.clone())));
        }
        let configured = json!({"kind": "KubeVirt", "metadata": {"name": "kubevirt", "namespace": "kubevirt"},
            "spec": {"configuration": {"migrations": {"nodeDrainTaintKey": "own"}}}});
        assert!(cancel(&[&vm("Always"), &marked, &drained, &configured], named()).is_ok());
        assert_eq!(cancel(&[&vm("Always")], named()), Err(Refusal::NotFound("virtualmachineinstance")));
    }
    let stopped = with(vm("Halted"), "/status/created", json!(false));
    assert_eq!(of_vm(&[&stopped], "evacuate/cancel", named()), said("VMI is not started"));
}

#[test]
fn what_is_not_served_is_known_by_name() {
    for (resource, action) in
        [(INSTANCES, "freeze"), (INSTANCES, "vnc/screenshot"), (MACHINES, "memorydump"), ("", "guestfs")]
    {
        assert!(is_missing(resource, action));
        assert!(missing(resource, action).contains(action));
    }
    for resource in [MACHINES, INSTANCES] {
        assert!(served(resource).iter().all(|action| !is_missing(resource, action)));
    }
    assert!(!is_missing(INSTANCES, "nonsense"));
}

#[test]
fn the_roots_tell_versions() {
    let kubernetes = json!({"gitVersion": "v1.33.0", "platform": "linux/amd64"});
    let version = root("version", &kubernetes, None).unwrap();
    assert!(version["gitVersion"].as_str().unwrap().starts_with('v'));
    assert_eq!(version["platform"], "linux/amd64");
    let installation = json!({"metadata": {"resourceVersion": "12"}});
    let health = root("healthz", &kubernetes, Some(&installation)).unwrap();
    assert_eq!(health["apiserver"]["connectivity"], "ok");
    assert_eq!(health["config-resource-version"], "12");
    assert_eq!(root("guestfs", &kubernetes, None), None);
}
