//! Guests with all that can be attached to them.

#![allow(clippy::expect_used, clippy::unwrap_used)]

#[path = "guests/agent.rs"]
mod agent;
mod common;
#[path = "guests/keep.rs"]
mod keep;
#[path = "guests/plain.rs"]
mod plain;
#[path = "guests/plug.rs"]
mod plug;
#[path = "guests/view.rs"]
mod view;

use common::linux::{build_demo_image, linux_vmi};
use common::{Cluster, qemus, rom_vmi, status, text};
use godwit_guest_rom::{Line, Parameters};
use godwit_network::Namespace;
use kube::api::{DynamicObject, Patch};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Where the guest answers: also at the ports by which KubeVirt calls a migration's streams, which are free for guests here.
const PORTS: [u16; 3] = [80, 49152, 49153];

/// What the demo guest says of itself on a port.
fn ask(namespace: &Namespace, address: IpAddr, port: u16, path: &str) -> Result<Value, String> {
    let mut stream = namespace
        .connect(SocketAddr::from((address, port)), Duration::from_secs(2))
        .map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(|error| error.to_string())?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).map_err(|error| error.to_string())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
    let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
    serde_json::from_str(body).map_err(|error| format!("{error} in {answer:?}"))
}

/// Asks at each of its ports until there is an answer, and what that is.
async fn facts(cluster: &Cluster, node: &str, vmi: &str) -> (IpAddr, Value) {
    for port in &PORTS[1..] {
        facts_at(cluster, node, vmi, *port).await;
    }
    facts_at(cluster, node, vmi, PORTS[0]).await
}

/// More than enough for a guest to boot, also one of eight virtual CPUs on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

async fn facts_at(cluster: &Cluster, node: &str, vmi: &str, port: u16) -> (IpAddr, Value) {
    let namespace = Namespace::open(&cluster.namespace(node)).expect("the node's namespace");
    let deadline = Instant::now() + PATIENCE;
    let mut last = String::new();
    while Instant::now() < deadline {
        let object = cluster.vmis().get(vmi).await.expect("VMI");
        if let Ok(address) = status(&object, "interfaces/0/ipAddress").parse() {
            let namespace = namespace.clone();
            match tokio::task::spawn_blocking(move || ask(&namespace, address, port, "/")).await.expect("ask") {
                Ok(facts) => return (address, facts),
                Err(error) => last = error,
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let object = cluster.vmis().get(vmi).await.expect("VMI");
    panic!("{vmi} does not answer {node} on port {port}: {last}; it is {}\n{}", object.data, cluster.words());
}

async fn succeeds(cluster: &Cluster, migration: &str) {
    let over = |m: &DynamicObject| ["Succeeded", "Failed"].contains(&status(m, "phase").as_str());
    let migration = cluster.wait(&cluster.migrations(), migration, "it is over", over).await;
    assert_eq!(status(&migration, "phase"), "Succeeded", "{}\n{}", migration.data, cluster.words());
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_masquerade_a_guest_is_reached_before_and_after_its_move() {
    let cluster = Cluster::start(2).await;
    build_demo_image(&cluster);
    let mut inner = linux_vmi("inner", "masquerade");
    inner["spec"]["terminationGracePeriodSeconds"] = json!(180);
    let ports = PORTS.map(|port| json!({"port": port}));
    inner["spec"]["domain"]["devices"]["interfaces"][0]["ports"] = json!(ports);
    cluster.apply(inner).await.expect("apply");
    let (address, before) = facts(&cluster, "node1", "inner").await;
    let (_, same) = facts(&cluster, "node2", "inner").await;
    assert_eq!(before["token"], same["token"], "both nodes reach the one guest");
    let from = status(&cluster.vmis().get("inner").await.expect("VMI"), "nodeName");

    cluster.migrate("inner", "move").await;
    succeeds(&cluster, "move").await;
    let moved = |vmi: &DynamicObject| {
        status(vmi, "nodeName") != from
            && status(vmi, "interfaces/0/ipAddress").parse::<IpAddr>().is_ok_and(|now| now != address)
    };
    let vmi = cluster.wait(&cluster.vmis(), "inner", "it has its new pod's address", moved).await;
    let pod = cluster.pods().get(&status(&vmi, "migrationState/targetPod")).await.expect("pod");
    assert_eq!(status(&vmi, "interfaces/0/ipAddress"), status(&pod, "podIP"));
    assert_eq!(status(&vmi, "interfaces/0/ipAddresses/0"), status(&pod, "podIPs/0/ip"));
    for node in ["node1", "node2"] {
        let (now, after) = facts(&cluster, node, "inner").await;
        assert_ne!(now, address);
        assert_eq!(after["token"], before["token"], "it was started anew");
        assert_eq!(after["corruptPages"], 0, "{after}");
        assert!(after["uptimeMilliseconds"].as_u64() > before["uptimeMilliseconds"].as_u64(), "{before} {after}");
    }

    // Told to end, it turns itself off: its grace is longer than the wait. (An old guest may not: `make guest`.)
    cluster.vmis().delete("inner", &Default::default()).await.expect("delete");
    cluster.wait_gone(&cluster.vmis(), "inner").await;
}

/// Says a word over a connection to the guest's echo service, and hears it again.
fn echo(stream: &mut std::net::TcpStream, word: &[u8]) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(word)?;
    let mut heard = vec![0; word.len()];
    stream.read_exact(&mut heard)?;
    assert_eq!(heard, word);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bridged_to_the_pod_network_a_guest_takes_its_address_along_where_that_is_allowed() {
    let cluster = Cluster::start(2).await;
    build_demo_image(&cluster);
    let mut rooted = rom_vmi("rooted");
    rooted["spec"]["domain"]["devices"] = json!({"interfaces": [{"name": "default", "bridge": {}}]});
    rooted["spec"]["networks"] = json!([{"name": "default", "pod": {}}]);
    cluster.build_rom_image(Parameters::default());
    let mut free = linux_vmi("free", "bridge");
    free["metadata"]["annotations"] = json!({"kubevirt.io/allow-pod-bridge-network-live-migration": ""});
    for vmi in [rooted, free] {
        cluster.apply(vmi).await.expect("apply");
    }

    // Without the annotation a guest runs, and stays.
    let vmi = runs(&cluster, "rooted").await;
    let told = condition(&vmi, "LiveMigratable");
    let message =
        "cannot migrate VMI which does not use masquerade or a migratable plugin to connect to the pod network";
    assert_eq!((told["status"].as_str(), told["reason"].as_str()), (Some("False"), Some("InterfaceNotLiveMigratable")));
    assert_eq!(told["message"], message);
    let refused = cluster
        .apply(json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
            "metadata": {"name": "stays"}, "spec": {"vmiName": "rooted"}}))
        .await
        .expect_err("refused");
    let kube::Error::Api(answer) = refused else { panic!("{refused}") };
    assert_eq!(
        answer.message,
        format!(
            "admission webhook \"migration-create-validator.kubevirt.io\" denied the request: Cannot migrate VMI, \
             Reason: InterfaceNotLiveMigratable, Message: {message}"
        )
    );

    // With it the guest has its pod's address, and keeps it.
    let (address, before) = facts(&cluster, "node1", "free").await;
    let pod = cluster.launchers("free").await.remove(0).0;
    assert_eq!(status(&cluster.pods().get(&pod).await.expect("pod"), "podIP"), address.to_string());
    let from = status(&cluster.vmis().get("free").await.expect("VMI"), "nodeName");
    let nodes = ["node1", "node2"].map(|node| Namespace::open(&cluster.namespace(node)).expect("namespace"));
    let mut streams = nodes.map(|node| node.connect((address, 7).into(), Duration::from_secs(10)).expect("connect"));
    for stream in &mut streams {
        echo(stream, b"before").expect("echo");
    }
    for (name, there) in [("away", true), ("home", false)] {
        cluster.migrate("free", name).await;
        succeeds(&cluster, name).await;
        let vmi = cluster.vmis().get("free").await.expect("VMI");
        assert_eq!(status(&vmi, "nodeName") != from, there, "{}", vmi.data);
        for stream in &mut streams {
            echo(stream, name.as_bytes()).unwrap_or_else(|e| panic!("{name}: {e}\n{}", cluster.words()));
        }
        let pod = status(&vmi, "migrationState/targetPod");
        assert_eq!(status(&cluster.pods().get(&pod).await.expect("pod"), "podIP"), address.to_string());
        for node in ["node1", "node2"] {
            let (now, after) = facts(&cluster, node, "free").await;
            assert_eq!((now, &after["token"]), (address, &before["token"]), "{name}");
        }
    }
}

fn claim(name: &str, class: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
        "spec": {
            "storageClassName": class, "accessModes": [mode],
            "resources": {"requests": {"storage": "8Mi"}},
        },
    })
}

fn with_claim(name: &str, claim: &str) -> Value {
    let mut vmi = rom_vmi(name);
    vmi["spec"]["domain"]["devices"]["disks"] = json!([{"name": "data", "disk": {"bus": "virtio"}}]);
    vmi["spec"]["volumes"] = json!([{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]);
    vmi
}

fn condition<'a>(object: &'a DynamicObject, type_: &str) -> &'a Value {
    let all = object.data.pointer("/status/conditions").and_then(Value::as_array);
    all.and_then(|all| all.iter().find(|condition| condition["type"] == type_)).unwrap_or(&Value::Null)
}

async fn runs(cluster: &Cluster, vmi: &str) -> DynamicObject {
    let ready = |vmi: &DynamicObject| status(vmi, "phase") == "Running" && !condition(vmi, "LiveMigratable").is_null();
    cluster.wait(&cluster.vmis(), vmi, "it runs", ready).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_with_every_kind_of_volume() {
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(Parameters::default());
    let disk = cluster.data_dir().join("disk.img");
    std::fs::File::create(&disk).and_then(|file| file.set_len(4 << 20)).expect("disk");
    let pair = format!("{}:/disk/disk.img", disk.display());
    let built = cluster.godwit(&["image", "build", "godwit.local/disk:1", &pair]);
    assert!(built.status.success(), "{}", text(&built.stderr));
    for object in [
        claim("shared", "shared", "ReadWriteMany"),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config"}, "data": {"a": "b"}}),
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "secret"}, "stringData": {"word": "x"}}),
    ] {
        cluster.apply(object).await.expect("apply");
    }
    let volumes = json!([
        {"name": "root", "containerDisk": {"image": "godwit.local/disk:1"}},
        {"name": "scratch", "emptyDisk": {"capacity": "4Mi"}},
        {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}},
        {"name": "seed", "cloudInitNoCloud": {"userData": "#cloud-config\nhostname: all\n"}},
        {"name": "config", "configMap": {"name": "config"}},
        {"name": "secret", "secret": {"secretName": "secret"}},
    ]);
    let names: Vec<String> = volumes.as_array().expect("list").iter().map(|v| v["name"].to_string()).collect();
    let names: Vec<&str> = names.iter().map(|name| name.trim_matches('"')).collect();
    let mut vmi = rom_vmi("all");
    vmi["spec"]["domain"]["devices"]["disks"] =
        names.iter().map(|name| json!({"name": name, "disk": {"bus": "virtio"}})).collect();
    vmi["spec"]["volumes"] = volumes;
    cluster.apply(vmi).await.expect("apply");
    let before = runs(&cluster, "all").await;
    assert_eq!(condition(&before, "LiveMigratable")["status"], "True", "{}", before.data);
    assert_eq!(status(&before, "migrationMethod"), "BlockMigration");
    let running = qemus(&before);
    assert_eq!(running.len(), 1, "{running:?}");
    for name in &names {
        assert!(running[0].1.contains(name), "no {name} in {}", running[0].1);
    }

    cluster.migrate("all", "move").await;
    succeeds(&cluster, "move").await;
    let after = runs(&cluster, "all").await;
    assert_ne!(status(&before, "nodeName"), status(&after, "nodeName"));
    assert_eq!(status(&after, "migrationState/mode"), "PreCopy", "{}", after.data);
    let target = status(&after, "migrationState/targetPod");
    let beats = |line: &Line| matches!(line, Line::Beat { errors: 0, .. });
    let deadline = Instant::now() + Duration::from_secs(60);
    while !cluster.lines(&target).await.iter().any(beats) {
        assert!(Instant::now() < deadline, "no beats: {}\n{}", cluster.console(&target).await, cluster.words());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!cluster.lines(&target).await.iter().any(|line| matches!(line, Line::Start { .. })), "it started anew");
    // The source's QEMU goes with its pod.
    while !qemus(&before).is_empty() {
        assert!(Instant::now() < deadline, "{:?}\n{}", qemus(&before), cluster.words());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(qemus(&after).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_on_a_local_claim_stays() {
    let cluster = Cluster::start(2).await;
    cluster.build_rom_image(Parameters::default());
    cluster.apply(claim("own", "local", "ReadWriteOnce")).await.expect("apply");
    cluster.apply(with_claim("homely", "own")).await.expect("apply");
    let vmi = runs(&cluster, "homely").await;
    let told = condition(&vmi, "LiveMigratable");
    let message = "cannot migrate VMI: PVC own is not shared, live migration requires that all PVCs must be shared \
                   (using ReadWriteMany access mode)";
    assert_eq!((told["status"].as_str(), told["reason"].as_str()), (Some("False"), Some("DisksNotLiveMigratable")));
    assert_eq!(told["message"], message);
    let refused = cluster
        .apply(json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
            "metadata": {"name": "move"}, "spec": {"vmiName": "homely"}}))
        .await
        .expect_err("refused");
    let kube::Error::Api(answer) = refused else { panic!("{refused}") };
    assert_eq!(
        answer.message,
        format!(
            "admission webhook \"migration-create-validator.kubevirt.io\" denied the request: Cannot migrate VMI, \
             Reason: DisksNotLiveMigratable, Message: {message}"
        )
    );
    assert_eq!(answer.code, 400);
    assert!(cluster.migrations().get_opt("move").await.expect("get").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_guest_changes_its_claim_where_there_is_no_other_node() {
    let cluster = Cluster::start(1).await;
    cluster.build_rom_image(Parameters { disk_blocks: 64, disk_stride: 16, ..Parameters::default() });
    for name in ["old", "new"] {
        cluster.apply(claim(name, "local", "ReadWriteOnce")).await.expect("apply");
    }
    let vm = |claim: &str| {
        json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "settler"},
        "spec": {
            "runStrategy": "Always", "updateVolumesStrategy": "Migration",
            "template": {"metadata": {}, "spec": with_claim("settler", claim)["spec"]},
        }})
    };
    cluster.apply(vm("old")).await.expect("apply");
    let before = runs(&cluster, "settler").await;
    let source = cluster.launchers("settler").await.remove(0).0;
    let wrote = |lines: &[Line]| lines.iter().any(|line| matches!(line, Line::Beat { count, .. } if *count > 10));
    let beats = async |pod: &str| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !wrote(&cluster.lines(pod).await) {
            assert!(Instant::now() < deadline, "no beats: {}\n{}", cluster.console(pod).await, cluster.words());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    beats(&source).await;

    cluster.apply(vm("new")).await.expect("apply");
    let there = |vmi: &DynamicObject| {
        status(vmi, "migratedVolumes").is_empty()
            && condition(vmi, "VolumesChange").is_null()
            && status(vmi, "migrationState/completed") == "true"
    };
    let after = cluster.wait(&cluster.vmis(), "settler", "it is on the other claim", there).await;
    assert_eq!(after.metadata.uid, before.metadata.uid, "it was not started anew");
    assert_eq!(status(&after, "nodeName"), status(&before, "nodeName"));
    let made = cluster.migrations().list(&Default::default()).await.expect("list").items;
    assert_eq!(made.len(), 1);
    succeeds(&cluster, made[0].metadata.name.as_deref().expect("a name")).await;
    // It goes on with what it wrote, and the old claim is free.
    let target = status(&after, "migrationState/targetPod");
    assert_ne!(target, source);
    beats(&target).await;
    let wrong = |line: &Line| !matches!(line, Line::Beat { errors: 0, .. });
    let lines = cluster.lines(&target).await;
    assert!(!lines.iter().any(wrong), "{:?}", lines.iter().find(|line| wrong(line)));
    cluster.wait_gone(&cluster.pods(), &source).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_guest_moves_from_a_local_claim_to_a_shared_one() {
    let cluster = Cluster::start(2).await;
    // It writes to its disk all the time, and checks each block before it writes it again.
    cluster.build_rom_image(Parameters { disk_blocks: 64, disk_stride: 16, ..Parameters::default() });
    cluster.apply(claim("here", "local", "ReadWriteOnce")).await.expect("apply");
    cluster.apply(claim("everywhere", "shared", "ReadWriteMany")).await.expect("apply");
    let vm = |claim: &str| {
        json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "mover"},
        "spec": {
            "runStrategy": "Always", "updateVolumesStrategy": "Migration",
            "template": {"metadata": {}, "spec": with_claim("mover", claim)["spec"]},
        }})
    };
    cluster.apply(vm("here")).await.expect("apply");
    let before = runs(&cluster, "mover").await;
    let source = cluster.launchers("mover").await.remove(0).0;
    let wrote = |lines: &[Line]| lines.iter().any(|line| matches!(line, Line::Beat { count, .. } if *count > 10));
    let deadline = Instant::now() + Duration::from_secs(60);
    while !wrote(&cluster.lines(&source).await) {
        assert!(Instant::now() < deadline, "no beats: {}\n{}", cluster.console(&source).await, cluster.words());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    cluster.apply(vm("everywhere")).await.expect("apply");
    let there = |vmi: &DynamicObject| {
        status(vmi, "nodeName") != status(&before, "nodeName")
            && status(vmi, "migratedVolumes").is_empty()
            && condition(vmi, "VolumesChange").is_null()
    };
    let after = cluster.wait(&cluster.vmis(), "mover", "it is on the other claim", there).await;
    assert_eq!(after.metadata.uid, before.metadata.uid, "it was not started anew");
    let claim = after.data.pointer("/spec/volumes/0/persistentVolumeClaim/claimName").and_then(Value::as_str);
    assert_eq!(claim, Some("everywhere"));
    let over = |vm: &DynamicObject| status(vm, "volumeUpdateState").is_empty();
    cluster.wait(&cluster.vms(), "mover", "the change is over", over).await;
    let made = cluster.migrations().list(&Default::default()).await.expect("list").items;
    assert_eq!(made.len(), 1);
    let label = made[0].metadata.labels.as_ref().and_then(|l| l.get("kubevirt.io/volume-update-in-progress"));
    assert_eq!(label.map(String::as_str), Some("mover"));
    succeeds(&cluster, made[0].metadata.name.as_deref().expect("a name")).await;
    let shared = |vmi: &DynamicObject| condition(vmi, "LiveMigratable")["status"] == "True";
    cluster.wait(&cluster.vmis(), "mover", "it can be moved on", shared).await;

    // What it wrote at the source it finds at the target; and on again over the claim that both see.
    cluster.migrate("mover", "on").await;
    succeeds(&cluster, "on").await;
    let last = status(&cluster.vmis().get("mover").await.expect("VMI"), "migrationState/targetPod");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !wrote(&cluster.lines(&last).await) {
        assert!(Instant::now() < deadline, "no beats: {}\n{}", cluster.console(&last).await, cluster.words());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let wrong = |line: &Line| !matches!(line, Line::Beat { errors: 0, .. });
    let lines = cluster.lines(&last).await;
    assert!(!lines.iter().any(wrong), "{:?}", lines.iter().find(|line| wrong(line)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_keeps_its_guest_running_until_it_is_halted() {
    let cluster = Cluster::start(1).await;
    cluster.build_rom_image(Parameters::default());
    let template = json!({"metadata": {"labels": {"app": "kept"}}, "spec": rom_vmi("kept")["spec"]});
    cluster
        .apply(json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "kept"},
            "spec": {"runStrategy": "Always", "template": template}}))
        .await
        .expect("apply");
    let other =
        |uid: Option<String>| move |vmi: &DynamicObject| status(vmi, "phase") == "Running" && vmi.metadata.uid != uid;
    let first = cluster.wait(&cluster.vmis(), "kept", "it runs", other(None)).await;
    assert_eq!(first.metadata.labels.as_ref().and_then(|l| l.get("app")).map(String::as_str), Some("kept"));
    assert_eq!(first.metadata.owner_references.as_ref().map(|owners| owners[0].kind.as_str()), Some("VirtualMachine"));
    let runs = |vm: &DynamicObject| status(vm, "printableStatus") == "Running" && status(vm, "ready") == "true";
    cluster.wait(&cluster.vms(), "kept", "it is ready", runs).await;

    // A user deletes the guest.
    cluster.vmis().delete("kept", &Default::default()).await.expect("delete");
    let second = cluster.wait(&cluster.vmis(), "kept", "it runs again", other(first.metadata.uid)).await;
    // Its QEMU dies.
    let running = qemus(&second);
    assert_eq!(running.len(), 1, "{running:?}");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(running[0].0), nix::sys::signal::Signal::SIGKILL).expect("kill");
    let third = cluster.wait(&cluster.vmis(), "kept", "it runs once more", other(second.metadata.uid)).await;

    let halt = Patch::Merge(json!({"spec": {"runStrategy": "Halted"}}));
    cluster.vms().patch("kept", &Default::default(), &halt).await.expect("patch");
    cluster.wait_gone(&cluster.vmis(), "kept").await;
    let stopped = |vm: &DynamicObject| status(vm, "printableStatus") == "Stopped" && status(vm, "created") == "false";
    cluster.wait(&cluster.vms(), "kept", "it is stopped", stopped).await;
    assert_eq!(qemus(&third), Vec::new());
}
