//! Ordinary pods: what is in them, how they end, what is left.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{Cluster, kubectls, status, text};
use kube::api::{DynamicObject, LogParams};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const BUSYBOX: &str = "godwit.local/busybox:1";

/// An image of the machine's own static busybox.
fn build_busybox(cluster: &Cluster) {
    let output = cluster.godwit(&["image", "build", BUSYBOX, "/bin/busybox:/bin/busybox"]);
    assert!(output.status.success(), "busybox-static is installed by `make deps`: {}", text(&output.stderr));
}

/// A pod with one container `main` that runs a shell script.
fn pod(name: &str, restart: &str, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "restartPolicy": restart,
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": BUSYBOX, "command": ["/bin/busybox", "sh", "-c", script]}],
        },
    })
}

fn main_status<'a>(pod: &'a DynamicObject, path: &str) -> &'a Value {
    pod.data.pointer(&format!("/status/containerStatuses/0/{path}")).unwrap_or(&Value::Null)
}

async fn log(cluster: &Cluster, pod: &str, previous: bool) -> String {
    let wanted = LogParams { container: Some("main".into()), previous, ..Default::default() };
    let request = kube::core::Request::new("/api/v1/namespaces/default/pods").logs(pod, &wanted).expect("request");
    cluster.client.request_text(request).await.expect("log")
}

async fn ended(cluster: &Cluster, name: &str) -> DynamicObject {
    let over = |pod: &DynamicObject| ["Succeeded", "Failed"].contains(&status(pod, "phase").as_str());
    cluster.wait(&cluster.pods(), name, "it is over", over).await
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_run_end_and_go() {
    let cluster = Cluster::start(1).await;
    build_busybox(&cluster);

    // Exit codes and phases.
    cluster.apply(pod("good", "Never", "echo to be read; echo also >&2")).await.expect("apply");
    cluster.apply(pod("bad", "Never", "echo oh dear; exit 7")).await.expect("apply");
    cluster.apply(pod("again", "OnFailure", "echo once more; exit 3")).await.expect("apply");
    cluster.apply(pod("always", "Always", "echo I was here")).await.expect("apply");
    let good = ended(&cluster, "good").await;
    assert_eq!(status(&good, "phase"), "Succeeded", "{}", good.data);
    assert_eq!(main_status(&good, "state/terminated/exitCode"), 0);
    assert_eq!(main_status(&good, "state/terminated/reason"), "Completed");
    let said = log(&cluster, "good", false).await;
    assert!(said.contains("to be read\n") && said.contains("also\n"), "{said}");
    let bad = ended(&cluster, "bad").await;
    assert_eq!(status(&bad, "phase"), "Failed", "{}", bad.data);
    assert_eq!(main_status(&bad, "state/terminated/exitCode"), 7);
    assert_eq!(main_status(&bad, "state/terminated/reason"), "Error");
    if let Some(kubectl) = kubectls().pop() {
        assert_eq!(cluster.kubectl(&kubectl, &["logs", "bad"]), "oh dear\n");
        assert!(cluster.kubectl(&kubectl, &["get", "pod", "bad"]).contains("Error"));
    }

    // Both are started again: one because it failed, the other in any case.
    for (name, exit, words) in [("again", 3, "once more\n"), ("always", 0, "I was here\n")] {
        let restarted = |pod: &DynamicObject| main_status(pod, "restartCount").as_i64() >= Some(1);
        let pod = cluster.wait(&cluster.pods(), name, "it was started again", restarted).await;
        assert_eq!(main_status(&pod, "lastState/terminated/exitCode"), exit, "{}", pod.data);
        assert_eq!(status(&pod, "phase"), "Running", "{}", pod.data);
        assert_eq!(log(&cluster, name, true).await, words);
        cluster.pods().delete(name, &Default::default()).await.expect("delete");
        cluster.wait_gone(&cluster.pods(), name).await;
    }

    // One that does not want to end is ended when its time is up.
    cluster.apply(pod("stubborn", "Never", "trap '' TERM; echo up; while :; do sleep 1; done")).await.expect("apply");
    let runs = |pod: &DynamicObject| status(pod, "phase") == "Running" && main_status(pod, "ready") == true;
    let stubborn = cluster.wait(&cluster.pods(), "stubborn", "it runs", runs).await;
    let uid = stubborn.metadata.uid.clone().expect("uid");
    cluster.pods().delete("stubborn", &Default::default()).await.expect("delete");
    cluster.wait_gone(&cluster.pods(), "stubborn").await;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.contains(&uid), "{mounts}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_has_what_its_spec_says() {
    let cluster = Cluster::start(1).await;
    build_busybox(&cluster);
    let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config"},
        "data": {"colour": "green", "size": "small"}});
    cluster.apply(config).await.expect("apply");
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "secret"},
        "stringData": {"word": "sesame"}});
    cluster.apply(secret).await.expect("apply");
    let script = r#"
        echo "config=$(cat /config/colour),$(ls /config | tr '\n' ' ')"
        echo "secret=$(cat /secret/word)"
        echo "item=$(cat /one/deep/size)"
        echo "handed=$(cat /scratch/note)"
        echo "env=$COLOUR,$WORD,$NODE,$PLAIN"
        echo x > /config/colour 2>/dev/null && echo "configMap is writable"
        echo "host=$(hostname)"
        echo "ip=$(ip -4 -o address show dev eth0 | sed 's/.*inet \([0-9.]*\).*/\1/')"
        echo "memory=$(cat /proc/self/cgroup | sed -n 's/^[0-9]*:\(memory\|\):\(.*\)/\2/p' | head -n 1)"
        sleep 1000
    "#;
    let shell = |script: &str| json!(["/bin/busybox", "sh", "-c", format!("/bin/busybox --install -s /bin; {script}")]);
    cluster
        .apply(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "full"},
            "spec": {
                "terminationGracePeriodSeconds": 0,
                "initContainers": [{
                    "name": "first", "image": BUSYBOX, "command": shell("echo from the first > /scratch/note"),
                    "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
                }],
                "containers": [{
                    "name": "main", "image": BUSYBOX, "command": shell(script),
                    "resources": {"limits": {"memory": "32Mi", "cpu": "500m"}, "requests": {"cpu": "100m"}},
                    "env": [
                        {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "config", "key": "colour"}}},
                        {"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "word"}}},
                        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                        {"name": "PLAIN", "value": "$(COLOUR)ish"},
                    ],
                    "volumeMounts": [
                        {"name": "config", "mountPath": "/config"},
                        {"name": "secret", "mountPath": "/secret", "readOnly": true},
                        {"name": "one", "mountPath": "/one"},
                        {"name": "scratch", "mountPath": "/scratch"},
                    ],
                }],
                "volumes": [
                    {"name": "config", "configMap": {"name": "config"}},
                    {"name": "secret", "secret": {"secretName": "secret"}},
                    {"name": "one", "configMap": {"name": "config", "items": [{"key": "size", "path": "deep/size"}]}},
                    {"name": "scratch", "emptyDir": {}},
                ],
            },
        }))
        .await
        .expect("apply");
    let runs = |pod: &DynamicObject| status(pod, "phase") == "Running";
    let full = cluster.wait(&cluster.pods(), "full", "it runs", runs).await;
    let deadline = Instant::now() + Duration::from_secs(60);
    let said = loop {
        let said = log(&cluster, "full", false).await;
        assert!(Instant::now() < deadline, "it does not say all: {said}\n{}", cluster.words());
        if said.contains("memory=") {
            break said;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    for line in [
        "config=green,colour size ",
        "secret=sesame",
        "item=small",
        "handed=from the first",
        "env=green,sesame,node1,greenish",
        "host=full",
        &format!("ip={}", status(&full, "podIP")),
    ] {
        assert!(said.lines().any(|said| said == line), "no {line:?} in\n{said}");
    }
    assert!(!said.contains("writable"), "{said}");
    assert_eq!(full.data.pointer("/status/qosClass").and_then(Value::as_str), Some("Burstable"));
    assert_memory_limit(&said, 32 << 20);

    // A limit that is passed ends the container, and says why.
    let mut greedy = pod("greedy", "Never", "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done");
    greedy["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": "16Mi"}});
    cluster.apply(greedy).await.expect("apply");
    let greedy = ended(&cluster, "greedy").await;
    assert_eq!(main_status(&greedy, "state/terminated/exitCode"), 137, "{}", greedy.data);
    assert_eq!(main_status(&greedy, "state/terminated/reason"), "OOMKilled", "{}", greedy.data);
}

/// The kernel holds the container to its limit. The path is the container's own view of its cgroup.
fn assert_memory_limit(said: &str, wanted: u64) {
    let path = said.lines().find_map(|line| line.strip_prefix("memory=")).expect("a cgroup");
    let files =
        [format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"), format!("/sys/fs/cgroup{path}/memory.max")];
    let found = files.iter().find_map(|file| std::fs::read_to_string(file).ok());
    assert_eq!(found.as_deref().map(str::trim), Some(wanted.to_string().as_str()), "{files:?}");
}
