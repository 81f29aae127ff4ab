//! Two handlers, their launchers and an API: the whole way of a guest, also when somebody restarts in between.

use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use godwit_launcher::fence::Clock;
use godwit_launcher::rpc::DomainPhase;
use serde_json::{Value, json};

use super::Ca;
use super::api::Api;
use super::launcher::Launcher;
use crate::sockets::SocketDir;
use crate::tls::TlsPaths;
use crate::{Options, run};

pub(super) const VMIS: &str = "virtualmachineinstances";
pub(super) const VMI_UID: &str = "0f0e0d0c-0000-4000-8000-000000000001";

pub(super) struct Node {
    name: &'static str,
    root: PathBuf,
    tls: TlsPaths,
    handler: Option<tokio::task::JoinHandle<()>>,
}

impl Node {
    fn up(&mut self, api: &Api) {
        let options = Options {
            installation: Default::default(),
            client: api.client(),
            node_name: self.name.into(),
            node_ip: "127.0.0.1".parse().unwrap(),
            migration_interface: None,
            front_port: crate::front::PORT,
            kubelet_root: self.root.clone(),
            state: self.root.join("state"),
            clock: Clock::default(),
            tls: self.tls.clone(),
            cluster_id: "test".into(),
            device_plugins: None,
            accelerator: Some(godwit_launcher::rpc::Accelerator::Tcg),
        };
        self.handler = Some(tokio::spawn(async move { drop(run(options, std::future::pending()).await) }));
    }
}

pub(super) struct Cluster {
    pub(super) api: Api,
    nodes: [Node; 2],
    runtimes: Vec<tokio::runtime::Runtime>,
    _dir: tempfile::TempDir,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{:#}\n{:#?}", self.vm(), self.events());
        }
        for runtime in self.runtimes.drain(..) {
            runtime.shutdown_background();
        }
    }
}

impl Cluster {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::new();
        let api = Api::default();
        let node = |name: &'static str| {
            let root = dir.path().join(name);
            std::fs::create_dir_all(&root).unwrap();
            let tls = ca.issue(&root, &format!("system:node:{name}"), &[]);
            api.put("nodes", json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } }));
            Node { name, root, tls, handler: None }
        };
        let nodes = [node("node1"), node("node2")];
        Self { api, nodes, runtimes: Vec::new(), _dir: dir }
    }

    /// Starts the handler of a node in a runtime of its own, so that ending it ends everything it does, as a kill would.
    pub(super) fn up(&mut self, node: usize) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        {
            let _inside = runtime.enter();
            self.nodes[node].up(&self.api);
        }
        self.runtimes.push(runtime);
        let last = self.runtimes.len() - 1;
        self.runtimes.swap(node.min(last), last);
    }

    pub(super) fn kill(&mut self, node: usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        std::mem::replace(&mut self.runtimes[node], runtime).shutdown_background();
    }

    pub(super) fn restart(&mut self, node: usize) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        {
            let _inside = runtime.enter();
            self.nodes[node].up(&self.api);
        }
        std::mem::replace(&mut self.runtimes[node], runtime).shutdown_background();
    }

    /// The `sockets` volume of a pod.
    pub(super) fn sockets(&self, node: usize, name: &str) -> PathBuf {
        SocketDir::path_of(&self.nodes[node].root, &format!("uid-{name}"))
    }

    /// A pod in the API.
    pub(super) fn pod(&self, node: usize, name: &str, migration: Option<&str>) {
        let mut labels = json!({ "kubevirt.io": "virt-launcher", "kubevirt.io/created-by": VMI_UID,
                                 "vm.kubevirt.io/name": "vm" });
        if let Some(uid) = migration {
            labels["kubevirt.io/migrationJobUID"] = json!(uid);
        }
        self.api.put(
            "pods",
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": { "name": name, "namespace": "default", "uid": format!("uid-{name}"), "labels": labels,
                              "annotations": { "kubevirt.io/domain": "vm" } },
                "spec": { "nodeName": self.nodes[node].name, "containers": [] },
                "status": { "phase": "Running", "podIP": format!("10.244.{node}.5") },
            }),
        );
    }

    /// A VMI that the controller has placed on node1.
    pub(super) fn vmi(&self, domain: &Value) {
        self.pod(0, "one", None);
        self.api.put(
            VMIS,
            json!({
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
                "metadata": { "name": "vm", "namespace": "default", "uid": VMI_UID,
                              "labels": { "kubevirt.io/nodeName": "node1" } },
                "spec": { "domain": domain },
                "status": { "phase": "Scheduled", "nodeName": "node1", "runtimeUser": 0 },
            }),
        );
    }

    /// Waits until a migration sends, and kills and restarts these handlers then.
    async fn kill_in_flight(&mut self, nodes: &[usize], sends: impl Fn() -> bool) {
        until("it has started", || self.vm()["status"]["migrationState"]["startTimestamp"].is_string()).await;
        until("memory is sent", sends).await;
        nodes.iter().for_each(|node| self.kill(*node));
        nodes.iter().for_each(|node| self.restart(*node));
    }

    /// What the controller writes at hand-off, with a target's launcher without QEMU.
    pub(super) fn hand_off(&self) -> Launcher {
        self.hand_off_to(|launcher| launcher)
    }

    /// The same with such a launcher.
    fn hand_off_to(&self, kind: impl Fn(Launcher) -> Launcher) -> Launcher {
        let launcher = kind(Launcher::start(self.sockets(1, "two")));
        self.write_hand_off();
        launcher
    }

    /// What the controller writes at hand-off.
    pub(super) fn write_hand_off(&self) {
        self.write_hand_off_with(&json!({ "progressTimeout": 150, "completionTimeoutPerGiB": 800 }));
    }

    /// The same with this `migrationConfiguration`.
    pub(super) fn write_hand_off_with(&self, configuration: &Value) {
        self.pod(1, "two", Some("mig"));
        self.api.merge(
            VMIS,
            "vm",
            &json!({
                "metadata": { "labels": { "kubevirt.io/migrationTargetNodeName": "node2" } },
                "status": { "migrationState": {
                    "migrationUid": "mig", "sourceNode": "node1", "sourcePod": "one", "targetNode": "node2",
                    "targetPod": "two",
                    "migrationConfiguration": configuration,
                } },
            }),
        );
    }

    pub(super) fn vm(&self) -> Value {
        self.api.get(VMIS, "vm").unwrap()
    }

    pub(super) fn events(&self) -> Vec<String> {
        self.api
            .list("events")
            .iter()
            .map(|e| {
                let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
                format!("{} {}: {}", text(&e["source"]["host"]), text(&e["reason"]), text(&e["message"]))
            })
            .collect()
    }

    pub(super) fn has_event(&self, event: &str) -> bool {
        self.events().iter().any(|e| e.starts_with(event))
    }
}

pub(super) async fn until(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..4000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not within 20 s: {what}");
}

/// A cluster with a running VM on node1.
pub(super) async fn running() -> (Cluster, Launcher) {
    running_in(|launcher| launcher).await
}

/// The same in such a launcher.
pub(super) async fn running_in(kind: impl Fn(Launcher) -> Launcher) -> (Cluster, Launcher) {
    let mut cluster = Cluster::new();
    cluster.up(0);
    cluster.up(1);
    let source = kind(Launcher::start(cluster.sockets(0, "one")));
    cluster.vmi(&json!({ "devices": {}, "memory": { "guest": "64Mi" } }));
    until("the VM runs", || cluster.vm()["status"]["phase"] == "Running").await;
    assert!(source.executes());
    (cluster, source)
}

pub(super) fn blocking<F: Future<Output = ()>>(test: F) {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test);
}

#[test]
fn a_vm_starts_moves_and_leaves_nothing_behind() {
    blocking(async {
        let (cluster, source) = running().await;
        let target = cluster.hand_off();
        until("the migration is over", || cluster.vm()["status"]["migrationState"]["completed"] == true).await;
        until("the source has ended", || source.is_dismissed()).await;
        until("the arrival is written", || cluster.vm()["status"]["nodeName"] == "node2").await;
        assert!(target.executes() && !source.executes());
        let vm = cluster.vm();
        let m = &vm["status"]["migrationState"];
        assert_eq!(m.get("failed"), None, "{m:#}");
        assert_eq!(vm["metadata"]["labels"]["kubevirt.io/nodeName"], "node2");
        assert_eq!(vm["status"]["phase"], "Running");
        assert_eq!(m["targetNodeAddress"], "127.0.0.1");
        for field in ["startTimestamp", "endTimestamp", "targetNodeDomainReadyTimestamp"] {
            assert!(m[field].is_string(), "{field}: {m:#}");
        }
        assert_eq!(m["progress"]["percent"], 100);
        assert!(m["progress"]["downtimeMilliseconds"].is_u64(), "{m:#}");
        for event in [
            "node1 Created: VirtualMachineInstance defined.",
            "node1 Started: VirtualMachineInstance started.",
            "node2 PreparingTarget: VirtualMachineInstance Migration Target Prepared.",
            "node2 PreparingTarget: Migration Target is listening at 127.0.0.1, on ports: ",
            "node1 Migrating: VirtualMachineInstance is migrating.",
            "node1 Migrated: The VirtualMachineInstance migrated to node node2.",
            "node1 Deleted: Signaled Deletion",
            "node2 Created: VirtualMachineInstance defined.",
        ] {
            until(event, || cluster.has_event(event)).await;
        }
    });
}

#[test]
fn an_abort_in_mid_flight_leaves_the_guest_where_it_was() {
    blocking(async {
        let (cluster, source) = running().await;
        source.slow.store(true, SeqCst);
        let target = cluster.hand_off();
        until("it has started", || cluster.vm()["status"]["migrationState"]["startTimestamp"].is_string()).await;
        cluster.api.merge(VMIS, "vm", &json!({ "status": { "migrationState": { "abortRequested": true } } }));
        until("it has failed", || cluster.vm()["status"]["migrationState"]["failed"] == true).await;
        let vm = cluster.vm();
        let m = &vm["status"]["migrationState"];
        assert_eq!(m["abortStatus"], "Succeeded");
        assert_eq!(m["failureReason"], "Live migration has been aborted");
        assert_eq!(m["failureCause"], "Cancelled");
        assert_eq!(vm["status"]["nodeName"], "node1");
        until("the target is gone", || target.now().phase.is_final()).await;
        assert!(source.executes() && !target.executes());
    });
}

#[test]
fn a_target_handler_killed_in_mid_flight_fails_the_migration_and_nothing_else() {
    blocking(async {
        let (mut cluster, source) = running().await;
        source.slow.store(true, SeqCst);
        let target = cluster.hand_off();
        until("it has started", || cluster.vm()["status"]["migrationState"]["startTimestamp"].is_string()).await;
        cluster.kill(1);
        until("it has failed", || cluster.vm()["status"]["migrationState"]["failed"] == true).await;
        assert!(source.executes() && !target.executes());
        assert_eq!(cluster.vm()["status"]["phase"], "Running");
        let cause = cluster.vm()["status"]["migrationState"]["failureCause"].clone();
        assert_eq!(cause, "TargetUnresponsive", "its node answers, its handler does not");
        cluster.restart(1);
        until("the target is gone", || target.now().phase.is_final()).await;
        assert!(source.executes());
    });
}

/// Memory goes through the launchers, which live on.
#[test]
fn a_copy_outlives_the_handlers_that_opened_its_way() {
    for nodes in [&[0][..], &[1], &[0, 1]] {
        blocking(async {
            let (mut cluster, source) = running_in(Launcher::newer).await;
            source.slow.store(true, SeqCst);
            let target = cluster.hand_off_to(Launcher::newer);
            let ports =
                |cluster: &Cluster| cluster.vm()["status"]["migrationState"]["targetDirectMigrationNodePorts"].clone();
            until("the target listens", || ports(&cluster).is_object()).await;
            let before = ports(&cluster);
            cluster.kill_in_flight(nodes, || source.carried() > 1 << 20 && target.carried() > 1 << 20).await;
            let begun = source.now().migration.unwrap();
            if nodes.contains(&1) {
                until("the target listens anew", || ports(&cluster) != before).await;
            }
            source.finish.notify_one();
            until("the migration is over", || cluster.vm()["status"]["migrationState"]["completed"] == true).await;
            let m = cluster.vm()["status"]["migrationState"].clone();
            assert_eq!(m.get("failed"), None, "{nodes:?}: {m:#}");
            until("the arrival is written", || cluster.vm()["status"]["nodeName"] == "node2").await;
            assert!(target.executes() && !source.executes());
            // One stream, from its beginning to its end.
            assert_eq!(source.now().migration.unwrap().start_us, begun.start_us);
            assert_eq!((source.carried(), target.carried()), ((4 << 20) + 1, (4 << 20) + 1), "{nodes:?}");
        });
    }
}

/// What a handler that has come since can do besides looking on.
#[test]
fn a_copy_can_be_cancelled_by_a_handler_that_has_begun_since() {
    blocking(async {
        let (mut cluster, source) = running_in(Launcher::newer).await;
        source.slow.store(true, SeqCst);
        let target = cluster.hand_off_to(Launcher::newer);
        cluster.kill_in_flight(&[0], || source.carried() > 0).await;
        cluster.api.merge(VMIS, "vm", &json!({ "status": { "migrationState": { "abortRequested": true } } }));
        until("it has failed", || cluster.vm()["status"]["migrationState"]["failed"] == true).await;
        assert_eq!(cluster.vm()["status"]["migrationState"]["failureCause"], "Cancelled");
        until("the target is gone", || target.now().phase.is_final()).await;
        assert!(source.executes() && !target.executes());
    });
}

#[test]
fn a_launcher_that_cannot_carry_memory_has_it_carried_by_the_handlers() {
    for newer in [[true, false], [false, true]] {
        blocking(async {
            let kind = |newer: bool| move |launcher: Launcher| if newer { launcher.newer() } else { launcher };
            let (cluster, source) = running_in(kind(newer[0])).await;
            let target = cluster.hand_off_to(kind(newer[1]));
            until("the migration is over", || cluster.vm()["status"]["migrationState"]["completed"] == true).await;
            assert_eq!(cluster.vm()["status"]["migrationState"].get("failed"), None, "{newer:?}");
            assert_eq!((source.carried(), target.carried()), (0, 0), "{newer:?}");
        });
    }
}

#[test]
fn a_go_is_given_although_both_handlers_restart_in_between() {
    blocking(async {
        let (mut cluster, source) = running().await;
        source.slow.store(true, SeqCst);
        let target = cluster.hand_off();
        target.deaf.store(true, SeqCst);
        until("it has started", || cluster.vm()["status"]["migrationState"]["startTimestamp"].is_string()).await;
        source.finish.notify_one();
        until("the source has completed", || source.now().migration.is_some_and(|m| m.status == "completed")).await;
        assert!(!source.executes() && !target.executes(), "between the two");
        let ports = || cluster.vm()["status"]["migrationState"]["targetDirectMigrationNodePorts"].clone();
        let before = ports();
        cluster.kill(0);
        cluster.kill(1);
        assert_ne!(cluster.vm()["status"]["migrationState"]["completed"], true, "nobody has said so");
        cluster.restart(1);
        let ports = || cluster.vm()["status"]["migrationState"]["targetDirectMigrationNodePorts"].clone();
        until("the target listens anew", || ports() != before).await;
        cluster.restart(0);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!source.executes() && !target.executes());
        target.deaf.store(false, SeqCst);
        until("the migration is over", || cluster.vm()["status"]["migrationState"]["completed"] == true).await;
        assert_eq!(cluster.vm()["status"]["migrationState"].get("failed"), None);
        until("the arrival is written", || cluster.vm()["status"]["nodeName"] == "node2").await;
        until("the source has ended", || source.is_dismissed()).await;
        assert!(target.executes() && !source.executes());
    });
}

#[test]
fn a_target_that_ends_unseen_after_the_hand_over_is_a_lost_guest() {
    blocking(async {
        let (mut cluster, source) = running().await;
        source.slow.store(true, SeqCst);
        let target = cluster.hand_off();
        target.deaf.store(true, SeqCst);
        until("it has started", || cluster.vm()["status"]["migrationState"]["startTimestamp"].is_string()).await;
        source.finish.notify_one();
        until("the source has completed", || source.now().migration.is_some_and(|m| m.status == "completed")).await;
        // The node dies; when it is back, its kubelet says that the pod has failed, and its handler knows nothing.
        cluster.kill(1);
        drop(target);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(cluster.vm()["status"]["phase"], "Running", "it may yet be reached");
        cluster.api.merge("pods", "two", &json!({ "status": { "phase": "Failed" } }));
        cluster.restart(1);
        until("it is given up", || cluster.vm()["status"]["phase"] == "Failed").await;
        let vm = cluster.vm();
        let m = &vm["status"]["migrationState"];
        assert_eq!((&m["failed"], &m["completed"]), (&json!(true), &json!(true)));
        let reason = m["failureReason"].as_str().unwrap();
        assert!(reason.contains("the target's pod two has ended (Failed)"), "{reason}");
        assert!(!source.executes(), "what is there is stale");
    });
}

#[test]
fn a_deleted_vmi_is_shut_down() {
    blocking(async {
        let (cluster, source) = running().await;
        cluster.api.merge(VMIS, "vm", &json!({ "metadata": { "deletionTimestamp": "2026-11-20T20:00:00Z" } }));
        until("it has ended", || cluster.vm()["status"]["phase"] == "Succeeded").await;
        assert_eq!(source.now().phase, DomainPhase::Shutdown);
        until("the event", || cluster.has_event("node1 ShuttingDown: Signaled Graceful Shutdown")).await;
    });
}
