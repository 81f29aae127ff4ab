//! `godwit bench controller`: how much memory the controllers need in a large cluster.
//!
//! An embedded API server in this process is filled with nodes, VMs, their instances, launcher pods and finished migrations, as a
//! cluster that has been at work has them. Then `godwit controller` is started as a process of its own, watches all of
//! it, decides about all of it, and the kernel says what it holds.

use crate::args::{BenchController, Output};
use anyhow::Context;
use futures::{StreamExt, stream};
use godwit_api::VirtualMachineInstance;
use godwit_apiserver::{Prepared, User};
use godwit_control::{Settings, View, World, launcher_pod};
use godwit_standalone::{Layout, pki};
use jiff::Timestamp;
use kube::core::Request;
use kube::core::params::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// VMs on one node.
const PER_NODE: usize = 50;
/// Writes under way at once while the server is filled.
const WRITERS: usize = 32;
/// How often the controllers are asked for their figures.
const SCRAPES: usize = 10;
/// How long the controllers may take to come to rest.
const PATIENCE: Duration = Duration::from_secs(900);
/// So long the memory must not have changed much.
const REST: Duration = Duration::from_secs(10);

/// What the controllers' process holds, in MiB.
struct Held {
    /// Now.
    resident: f64,
    /// At most, since it was started.
    peak: f64,
}

/// Measures, and says whether it is within the limit.
pub async fn run(wanted: BenchController) -> anyhow::Result<ExitCode> {
    // It goes with this future, also when that is broken off.
    let folder = tempfile::Builder::new().prefix("godwit-bench-controller-").tempdir().context("make a folder")?;
    let Measured { held, churned, scraped, scrape, bytes } = measure(&wanted, folder.path()).await?;
    let (vmis, kibibytes) = (wanted.vmis, bytes / 1024);
    let good = held.peak.max(churned.peak).max(scraped.peak) < f64::from(wanted.limit);
    match wanted.output {
        Output::Text => {
            println!(
                "{vmis} VMs, each with its instance, launcher pod and a finished migration, on {} nodes",
                nodes(vmis)
            );
            println!(
                "after all was listed and decided: {:.0} MiB resident, at most {:.0} MiB",
                held.resident, held.peak
            );
            println!(
                "after each instance has changed:  {:.0} MiB resident, at most {:.0} MiB",
                churned.resident, churned.peak
            );
            println!(
                "after {SCRAPES} scrapes:               {:.0} MiB resident, at most {:.0} MiB; one took {} ms at most and gave {kibibytes} KiB",
                scraped.resident,
                scraped.peak,
                scrape.as_millis(),
            );
            println!("{} the limit of {} MiB", if good { "within" } else { "beyond" }, wanted.limit);
        }
        Output::Json => {
            let of = |held: &Held| json!({"residentMiB": held.resident, "peakMiB": held.peak});
            let mut report =
                json!({"vmis": vmis, "listed": of(&held), "changed": of(&churned), "scraped": of(&scraped)});
            report["scrape"] = json!({"milliseconds": scrape.as_millis(), "bytes": bytes});
            report["limitMiB"] = json!(wanted.limit);
            report["good"] = json!(good);
            println!("{}", serde_json::to_string_pretty(&report)?);
        }
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn nodes(vmis: usize) -> usize {
    vmis.div_ceil(PER_NODE)
}

/// What was measured.
struct Measured {
    /// When all was listed and decided.
    held: Held,
    /// When each instance had changed.
    churned: Held,
    /// When Prometheus had asked for figures.
    scraped: Held,
    /// How long an answer took at most.
    scrape: Duration,
    /// Its size.
    bytes: usize,
}

async fn measure(wanted: &BenchController, folder: &Path) -> anyhow::Result<Measured> {
    let begun = Instant::now();
    let tell = |what: &str| eprintln!("{:>6.0} s  {what}", begun.elapsed().as_secs_f64());
    let layout = Layout::open(folder)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let cluster =
        godwit_standalone::Cluster { id: layout.id(), api_port: listener.local_addr()?.port(), ..Default::default() };
    pki::ensure(&layout, &cluster)?;
    let pair = pki::pair(&layout, pki::API_SERVER);
    let options = godwit_apiserver::Options {
        store: godwit_store::Store::open(layout.store())?,
        listeners: vec![listener],
        tls: godwit_apiserver::TlsFiles { ca: pki::ca(&layout), cert: pair.cert, key: pair.key },
        kubelet_client: None,
        // What it is filled with was admitted long ago.
        admission: Vec::new(),
        actions: Vec::new(),
        dialer: Arc::new(godwit_apiserver::DirectDialer),
        roles: crate::control_plane::roles(),
    };
    let prepared = Prepared::new(options).await.context("API server")?;
    let admin = kube::Client::new(prepared.server.service(User::new("godwit", &["system:masters"])), "default");
    crate::control_plane::furnish(&admin).await?;
    // Ends with it.
    let mut server = JoinSet::new();
    server.spawn(prepared.serve(std::future::pending()));
    tell("an API server runs");
    fill(&admin, wanted.vmis).await?;
    tell("it is filled");
    let mut controller = Controllers::start(&pki::kubeconfig(&layout, pki::CONTROLLER), folder)?;
    let held = controller.at_rest().await?;
    tell("the controllers are at rest");
    let patch = json!({"metadata": {"annotations": {"bench.godwit.io/changed": "yes"}}});
    each(0..wanted.vmis, async |number| {
        let request = Request::new("/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstances");
        let request = request.patch(&vm_name(number), &PatchParams::default(), &Patch::Merge(&patch))?;
        admin.request::<Value>(request).await?;
        Ok(())
    })
    .await?;
    tell("each instance has changed");
    let churned = controller.at_rest().await?;
    let (mut scrape, mut bytes) = (Duration::ZERO, 0);
    for _ in 0..SCRAPES {
        let begun = Instant::now();
        bytes = controller.scrape().await?;
        scrape = scrape.max(begun.elapsed());
    }
    tell("its figures were asked for");
    let scraped = controller.held()?;
    drop(controller);
    server.shutdown().await;
    Ok(Measured { held, churned, scraped, scrape, bytes })
}

async fn each(numbers: std::ops::Range<usize>, work: impl AsyncFn(usize) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut done = stream::iter(numbers).map(|number| work(number)).buffer_unordered(WRITERS);
    while let Some(one) = done.next().await {
        one?;
    }
    Ok(())
}

/// `godwit controller`, for as long as this lives.
struct Controllers {
    child: Child,
    /// Where it is asked for its figures.
    health: SocketAddr,
    log: std::path::PathBuf,
}

impl Drop for Controllers {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Controllers {
    fn start(kubeconfig: &Path, folder: &Path) -> anyhow::Result<Self> {
        let log = folder.join("controller.log");
        let output = std::fs::File::create(&log)?;
        // Free again in a moment.
        let health = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let child = Command::new(std::env::current_exe()?)
            .args(["controller", "--identity=bench", "--launcher-image=registry.local/godwit:1"])
            .arg(format!("--health={health}"))
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .spawn()
            .context("start godwit controller")?;
        Ok(Self { child, health, log })
    }

    fn held(&self) -> anyhow::Result<Held> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let mebibytes = |field: &str| -> anyhow::Result<f64> {
            let line =
                status.lines().find_map(|line| line.strip_prefix(field)).context("the controllers have ended")?;
            let kibibytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
            Ok(kibibytes / 1024.0)
        };
        Ok(Held { resident: mebibytes("VmRSS:")?, peak: mebibytes("VmHWM:")? })
    }

    /// Processor time that it has used, in ticks.
    fn ticks(&self) -> anyhow::Result<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
        let of = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        Ok(of(11) + of(12))
    }

    /// Waits until it knows everything and has nothing more to do.
    async fn at_rest(&mut self) -> anyhow::Result<Held> {
        let deadline = Instant::now() + PATIENCE;
        let (mut since, mut before) = (Instant::now(), 0);
        loop {
            anyhow::ensure!(Instant::now() < deadline, "the controllers do not come to rest: {}", self.words());
            anyhow::ensure!(self.child.try_wait()?.is_none(), "the controllers have ended: {}", self.words());
            let ticks = self.ticks()?;
            // A twentieth of a processor is its watches and its lease.
            if ticks > before + 5 || !self.words().contains("all kinds listed") {
                since = Instant::now();
            } else if since.elapsed() > REST {
                return self.held();
            }
            before = ticks;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Asks for its figures; how many bytes that is.
    async fn scrape(&self) -> anyhow::Result<usize> {
        let mut stream = TcpStream::connect(self.health).await.context("ask the controllers for their figures")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        anyhow::ensure!(head.starts_with("HTTP/1.1 200 "), "the controllers do not tell their figures: {head}");
        Ok(body.len())
    }

    fn words(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

fn vm_name(number: usize) -> String {
    format!("vm-{number:05}")
}

/// Makes the objects.
async fn fill(admin: &kube::Client, vmis: usize) -> anyhow::Result<()> {
    each(0..nodes(vmis), async |number| {
        create(admin, "/api/v1/nodes", node(number)).await?;
        create(admin, "/apis/coordination.k8s.io/v1/namespaces/kubevirt/leases", lease(number)).await.map(drop)
    })
    .await?;
    each(0..vmis, async |number| machine(admin, number).await).await
}

async fn create(admin: &kube::Client, path: &str, object: Value) -> anyhow::Result<Value> {
    let request = Request::new(path).create(&PostParams::default(), serde_json::to_vec(&object)?)?;
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    admin.request(request).await.with_context(|| format!("make {path}/{name}"))
}

async fn write_status(admin: &kube::Client, path: &str, name: &str, status: &Value) -> anyhow::Result<()> {
    let patch = Patch::Merge(json!({"status": status}));
    let request = Request::new(path).patch_subresource("status", name, &PatchParams::default(), &patch)?;
    admin.request::<Value>(request).await.with_context(|| format!("write the status of {path}/{name}"))?;
    Ok(())
}

fn node(number: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": format!("node{number:03}"),
            "labels": {"kubernetes.io/hostname": format!("node{number:03}"), "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64", "kubevirt.io/schedulable": "true"},
            "annotations": {"kubevirt.io/heartbeat": Timestamp::now().to_string()},
        },
        "spec": {},
        "status": {
            "allocatable": {"cpu": "128", "memory": "1Ti", "pods": "250"},
            "capacity": {"cpu": "128", "memory": "1Ti", "pods": "250"},
            "addresses": [{"type": "InternalIP", "address": format!("10.0.{}.{}", number / 250, number % 250 + 1)}],
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady",
                "message": "kubelet is posting ready status", "lastHeartbeatTime": "2026-11-22T10:00:00Z",
                "lastTransitionTime": "2026-11-22T10:00:00Z"}],
        },
    })
}

fn lease(number: usize) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": format!("virt-handler-node{number:03}"), "namespace": "kubevirt"},
        "spec": {"holderIdentity": format!("node{number:03}/1-1"), "leaseDurationSeconds": 30,
            "renewTime": "2026-11-22T10:00:00.000000Z"},
    })
}

/// A VM with its instance, launcher pod and the migration that brought it where it is.
async fn machine(admin: &kube::Client, number: usize) -> anyhow::Result<()> {
    let name = vm_name(number);
    let node = format!("node{:03}", number / PER_NODE);
    let spec = json!({
        "domain": {
            "cpu": {"cores": 2, "sockets": 1, "threads": 1, "model": "host-model"},
            "memory": {"guest": "4Gi"},
            "resources": {"requests": {"memory": "4Gi"}},
            "machine": {"type": "q35"},
            "firmware": {"uuid": uuid(number), "serial": uuid(number)},
            "features": {"acpi": {"enabled": true}},
            "devices": {
                "disks": [
                    {"name": "root", "disk": {"bus": "virtio"}},
                    {"name": "data", "disk": {"bus": "virtio"}},
                    {"name": "cloud-init", "disk": {"bus": "virtio"}},
                ],
                "interfaces": [{"name": "default", "masquerade": {}, "model": "virtio"}],
                "rng": {},
            },
        },
        "evictionStrategy": "LiveMigrate",
        "networks": [{"name": "default", "pod": {}}],
        "terminationGracePeriodSeconds": 180,
        "volumes": [
            {"name": "root", "containerDisk": {"image": "registry.local/fedora:42", "imagePullPolicy": "IfNotPresent"}},
            {"name": "data", "emptyDisk": {"capacity": "10Gi"}},
            {"name": "cloud-init", "cloudInitNoCloud": {"userData":
                "#cloud-config\npassword: fedora\nchpasswd: {expire: false}\nssh_pwauth: true\npackages: [qemu-guest-agent]\n"}},
        ],
    });
    let labels = json!({"app": format!("app-{}", number % 100), "kubevirt.io/vm": name});
    let machines = "/apis/kubevirt.io/v1/namespaces/default/virtualmachines";
    let vm = create(
        admin,
        machines,
        json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": name, "labels": labels},
            "spec": {"runStrategy": "Always", "template": {"metadata": {"labels": labels}, "spec": spec}},
        }),
    )
    .await?;
    let owner = json!({"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": name,
        "uid": vm["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true});
    let instances = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstances";
    let mut instance_labels = labels.clone();
    instance_labels["kubevirt.io/nodeName"] = json!(node);
    let mut instance = create(
        admin,
        instances,
        json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
            "metadata": {"name": name, "labels": instance_labels, "ownerReferences": [owner],
                "finalizers": ["foregroundDeleteVirtualMachine"]},
            "spec": spec,
        }),
    )
    .await?;
    let typed: VirtualMachineInstance = serde_json::from_value(instance.clone())?;
    let (world, settings) = (World::default(), Settings::cluster());
    let view = View { now: Timestamp::now(), world: &world, settings: &settings };
    let mut pod = serde_json::to_value(launcher_pod::build(&typed, launcher_pod::Role::Start, &view))?;
    pod["spec"]["nodeName"] = json!(node);
    let pods = "/api/v1/namespaces/default/pods";
    let pod = create(admin, pods, pod).await?;
    let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let address = format!("10.244.{}.{}", number / 250, number % 250 + 2);
    let since = "2026-11-22T10:00:00Z";
    let condition = |type_: &str| json!({"type": type_, "status": "True", "lastTransitionTime": since});
    let mut gate = condition("kubevirt.io/virtual-machine-unpaused");
    gate["reason"] = json!("NotPaused");
    gate["message"] = json!("the virtual machine is not paused");
    let pod_status = json!({
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "hostIP": "10.0.0.1", "startTime": since,
        "qosClass": "Burstable",
        "conditions": [condition("PodScheduled"), condition("Initialized"), condition("ContainersReady"),
            condition("Ready"), gate],
        "containerStatuses": [{"name": "compute", "ready": true, "started": true, "restartCount": 0,
            "image": "registry.local/godwit:1", "imageID": "registry.local/godwit@sha256:1234",
            "containerID": format!("containerd://{}", uuid(number)), "state": {"running": {"startedAt": since}}}],
    });
    write_status(admin, pods, pod_name, &pod_status).await?;
    let pod_uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
    let migrations = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstancemigrations";
    let migration = create(
        admin,
        migrations,
        json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
            "metadata": {"name": format!("{name}-move"), "labels": {"kubevirt.io/vmi-name": name}},
            "spec": {"vmiName": name},
        }),
    )
    .await?;
    let state = json!({
        "migrationUid": migration["metadata"]["uid"], "sourceNode": "node999", "targetNode": node, "targetPod": pod_name,
        "targetNodeAddress": "10.0.0.1", "targetNodeDomainDetected": true, "startTimestamp": since, "endTimestamp": since,
        "completed": true, "mode": "PreCopy", "targetNodeDomainReadyTimestamp": since,
        "targetDirectMigrationNodePorts": {"30001": 0, "30002": 49152},
    });
    let passed = |phases: &[&str]| -> Vec<Value> {
        phases.iter().map(|phase| json!({"phase": phase, "phaseTransitionTimestamp": since})).collect()
    };
    let phases = ["Pending", "Scheduling", "Scheduled", "PreparingTarget", "TargetReady", "Running", "Succeeded"];
    let migration_status =
        json!({"phase": "Succeeded", "migrationState": state, "phaseTransitionTimestamps": passed(&phases)});
    write_status(admin, migrations, &format!("{name}-move"), &migration_status).await?;
    instance["status"] = json!({
        "phase": "Running", "nodeName": node, "activePods": {pod_uid: node}, "migrationMethod": "BlockMigration",
        "migrationTransport": "Unix", "qosClass": "Burstable", "launcherContainerImageVersion": "registry.local/godwit:1",
        "migrationState": state, "machine": {"type": "pc-q35-7.2"},
        "phaseTransitionTimestamps": passed(&["Pending", "Scheduling", "Scheduled", "Running"]),
        "conditions": [condition("Ready"), condition("LiveMigratable"), condition("StorageLiveMigratable"),
            condition("AgentConnected")],
        "interfaces": [{"name": "default", "ipAddress": address, "ipAddresses": [address], "mac": "02:00:00:00:00:01",
            "interfaceName": "enp1s0", "infoSource": "domain, guest-agent", "podInterfaceName": "eth0"}],
        "volumeStatus": [{"name": "root", "target": "vda"}, {"name": "data", "target": "vdb"},
            {"name": "cloud-init", "target": "vdc"}],
        "guestOSInfo": {"id": "fedora", "kernelRelease": "6.12.5-200.fc42.x86_64", "machine": "x86_64",
            "name": "Fedora Linux", "prettyName": "Fedora Linux 42 (Cloud Edition)", "version": "42", "versionId": "42"},
    });
    let patch = Patch::Merge(json!({"status": instance["status"]}));
    let request = Request::new(instances).patch(&name, &PatchParams::default(), &patch)?;
    admin.request::<Value>(request).await.with_context(|| format!("write the status of {name}"))?;
    let vm_status = json!({"created": true, "ready": true, "printableStatus": "Running",
        "conditions": [condition("Ready"), condition("LiveMigratable"), condition("StorageLiveMigratable")]});
    write_status(admin, machines, &name, &vm_status).await
}

fn uuid(number: usize) -> String {
    format!("5f0e2c1a-0000-4000-8000-{number:012x}")
}
