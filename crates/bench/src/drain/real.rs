//! A node of real guests on a cluster of its own, emptied as `kubectl drain` does it: cordoned, and each pod evicted, again every
//! five seconds as long as that is refused.

use super::report::{Departure, Drained, Limits};
use super::{Error, Options};
use crate::migrate::Bandwidth;
use crate::witness::{Station, Witness, complaint};
use futures::StreamExt;
use godwit_api::{MigrationPhase, names};
use godwit_drain::{Manner, read};
use godwit_guest_rom::Parameters;
use godwit_images::{FileEntry, Store};
use godwit_standalone::{Up, impatient_client, up};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, ApiResource, DynamicObject, EvictParams, GroupVersionKind, ListParams, Patch, PatchParams};
use kube::runtime::watcher::{self, Event};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// The node that is emptied.
const NODE: &str = "node1";
/// Nodes: that one, and those that take its guests.
const NODES: usize = 3;
const IMAGE: &str = "godwit.local/drain-rom:latest";
/// The L2 segment whose frames the witness reads.
const NETWORK: &str = "witnessed";
/// A guest's memory.
const MEMORY: &str = "16Mi";
/// How long anything may take that is not measured.
const PATIENCE: Duration = Duration::from_secs(300);
/// Between two looks at what is not measured.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// kubectl asks again after this long.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// So many beats are a sign of life.
const ALIVE: usize = 3;

/// A cluster, which is taken down when this is dropped.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Result<Self, Error> {
        let folder = tempfile::Builder::new().prefix("godwit-bench-").tempdir_in("/var/tmp");
        let io = |source| Error::Io { what: "make a scratch folder in", path: PathBuf::from("/var/tmp"), source };
        Ok(Self { folder: folder.map_err(io)? })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = godwit_standalone::down(self.folder.path()) {
            eprintln!("bench: {error}; godwit down --data-dir {} tries again", self.folder.path().display());
        }
    }
}

/// Empties the node, and says what must not be.
pub async fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> Result<(Drained, Vec<String>), Error> {
    let place = Place::new()?;
    let data_dir = place.folder.path().to_owned();
    let up =
        up(&godwit_standalone::Options { data_dir, nodes: NODES, api_port: Some(0), ..Default::default() }).await?;
    build_image(&up)?;
    let client = impatient_client(&up.layout.kubeconfig()).await?;
    let witness = Witness::start(&up.cluster)?;
    let stage = Stage { client, others: up.cluster.nodes.iter().filter(|node| *node != NODE).cloned().collect() };
    stage.configure(options).await?;
    let guests: Vec<Guest> = (1..=options.guests).map(Guest::new).collect();
    tell(&format!("{} real guests start on {NODE}", guests.len()));
    stage.start(&guests, &witness).await?;

    let plan = read::cluster(&stage.client, None).await?.plan(&[NODE.to_owned()], Manner::default())?;
    tell("the node is emptied");
    let course = stage.empty(&guests, options.limit).await?;
    let total = course.empty.map(milliseconds);
    let mut wrong = course.refused.clone();
    let mut departures = Vec::new();
    for guest in &guests {
        let departure = stage.departure(guest, &course, options.bandwidth, &mut wrong).await?;
        wrong.extend(stage.whole(guest, &witness).await?);
        departures.push(departure);
    }
    let bandwidth = match options.bandwidth {
        Bandwidth::Unlimited => "no cap".to_owned(),
        Bandwidth::Mebibytes(mib) => format!("{} MiB/s each", mib.0),
    };
    let drained = Drained::new(options.limits(), stage.others.len(), bandwidth, &plan, total, departures);
    Ok((drained, wrong))
}

/// A guest that writes about 1 MiB a second to 8 MiB of its memory, checks it, and beats ten times a second.
fn build_image(up: &Up) -> Result<(), Error> {
    let parameters = Parameters { last: 0x90_0000, frame_ticks: 10, ..Parameters::default() };
    let rom = up.layout.root().join("rom.bin");
    let written = std::fs::write(&rom, godwit_guest_rom::image(parameters));
    written.map_err(|source| Error::Io { what: "write", path: rom.clone(), source })?;
    let file = FileEntry { source: rom, destination: "/boot/rom.bin".into(), mode: 0o644 };
    Store::open(up.layout.images())?.build(IMAGE, &[file])?;
    Ok(())
}

/// A guest.
struct Guest {
    name: String,
    station: Station,
}

impl Guest {
    fn new(number: u32) -> Self {
        let [a, b, c, d] = number.to_be_bytes();
        Self { name: format!("guest-{number}"), station: [2, 0x67, a, b, c, d] }
    }

    fn vmi(&self) -> Value {
        let mac: Vec<String> = self.station.iter().map(|byte| format!("{byte:02x}")).collect();
        let interface = json!({"name": "w", "bridge": {}, "model": "rtl8139", "macAddress": mac.join(":")});
        json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": self.name},
            "spec": {
                "evictionStrategy": "LiveMigrate",
                "terminationGracePeriodSeconds": 0,
                "domain": {
                    "memory": {"guest": MEMORY},
                    // Many of them have room on a machine of few processors.
                    "resources": {"requests": {"cpu": "10m"}},
                    "devices": {"interfaces": [interface]},
                    "firmware": {"kernelBoot": {"container": {"image": IMAGE, "kernelPath": "/boot/rom.bin"}}},
                },
                "networks": [{"name": "w", "multus": {"networkName": NETWORK}}],
            },
        })
    }
}

/// When what happened, as the watches told it, counted from the beginning.
#[derive(Default)]
struct Course {
    /// No guest is left on the node.
    empty: Option<Duration>,
    /// By VMI.
    moves: BTreeMap<String, Move>,
    /// Evictions that were answered as they must not be.
    refused: Vec<String>,
}

#[derive(Default)]
struct Move {
    turn: Option<Duration>,
    sends: Option<Duration>,
    ends: Option<Duration>,
    failed: BTreeSet<String>,
}

impl Course {
    /// A migration was seen like this.
    fn take(&mut self, migration: &DynamicObject, since: Duration) {
        let one = self.moves.entry(text(migration, "/spec/vmiName")).or_default();
        let phase = MigrationPhase::from(text(migration, "/status/phase").as_str());
        if phase.is_running() {
            one.turn.get_or_insert(since);
        }
        match phase {
            MigrationPhase::Running => _ = one.sends.get_or_insert(since),
            MigrationPhase::Succeeded => _ = one.ends.get_or_insert(since),
            // The next attempt sends from the beginning.
            MigrationPhase::Failed => {
                one.sends = None;
                one.failed.insert(migration.uid().unwrap_or_default());
            }
            _ => {}
        }
    }
}

struct Stage {
    client: Client,
    others: Vec<String>,
}

impl Stage {
    fn api(&self, kind: &str) -> Api<DynamicObject> {
        Api::default_namespaced_with(self.client.clone(), &resource("kubevirt.io", kind))
    }

    async fn configure(&self, options: &Options) -> Result<(), Error> {
        let Limits { cluster, outbound, inbound } = options.limits();
        let bandwidth = match options.bandwidth {
            Bandwidth::Unlimited => "0".to_owned(),
            Bandwidth::Mebibytes(mib) => format!("{}Mi", mib.0),
        };
        let migrations = json!({
            "bandwidthPerMigration": bandwidth, "parallelMigrationsPerCluster": cluster,
            "parallelOutboundMigrationsPerNode": outbound, "parallelInboundMigrationsPerNode": inbound,
        });
        let patch = Patch::Merge(json!({"spec": {"configuration": {"migrations": migrations}}}));
        let kubevirts: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), names::KUBEVIRT_NAMESPACE, &resource("kubevirt.io", "KubeVirt"));
        let patched = kubevirts.patch(names::KUBEVIRT_NAME, &PatchParams::default(), &patch).await;
        patched.map_err(refused("configure migrations"))?;
        let config = json!({"cniVersion": "0.3.1", "name": NETWORK, "type": "bridge", "bridge": "br-witness"});
        let network = json!({
            "apiVersion": "k8s.cni.cncf.io/v1", "kind": "NetworkAttachmentDefinition",
            "metadata": {"name": NETWORK}, "spec": {"config": config.to_string()},
        });
        let kind = GroupVersionKind::gvk("k8s.cni.cncf.io", "v1", "NetworkAttachmentDefinition");
        let kind = ApiResource::from_gvk_with_plural(&kind, "network-attachment-definitions");
        self.apply(&Api::default_namespaced_with(self.client.clone(), &kind), NETWORK, &network).await
    }

    /// Server-side apply, repeated while the kind is not served yet.
    async fn apply(&self, api: &Api<DynamicObject>, name: &str, object: &Value) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match api.patch(name, &PatchParams::apply("godwit-bench").force(), &Patch::Apply(object)).await {
                Ok(_) => return Ok(()),
                Err(kube::Error::Api(status)) if status.code == 404 && Instant::now() < deadline => {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                Err(error) => return Err(refused(&format!("apply {name}"))(error)),
            }
        }
    }

    /// Starts the guests on the node, and waits until each beats and is known to be migratable.
    async fn start(&self, guests: &[Guest], witness: &Witness) -> Result<(), Error> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        for other in &self.others {
            nodes.cordon(other).await.map_err(refused(&format!("cordon {other}")))?;
        }
        let vmis = self.api("VirtualMachineInstance");
        for guest in guests {
            self.apply(&vmis, &guest.name, &guest.vmi()).await?;
        }
        let deadline = Instant::now() + PATIENCE;
        for guest in guests {
            loop {
                let vmi = vmis.get(&guest.name).await.map_err(refused(&format!("read {}", guest.name)))?;
                let beats = witness.beats(guest.station).len() >= ALIVE;
                if beats && text(&vmi, "/status/phase") == "Running" && is_migratable(&vmi) {
                    break;
                }
                if Instant::now() > deadline {
                    let what = format!("{} starts and beats", guest.name);
                    return Err(Error::Late { what, seconds: PATIENCE.as_secs(), last: vmi.data.to_string() });
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
        for other in &self.others {
            nodes.uncordon(other).await.map_err(refused(&format!("uncordon {other}")))?;
            // Its taint goes a moment after: who plans before that finds no room.
            loop {
                let node = nodes.get(other).await.map_err(refused(&format!("read {other}")))?;
                let taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
                if taints.is_empty() {
                    break;
                }
                if Instant::now() > deadline {
                    let (what, seconds) = (format!("{other} is open again"), PATIENCE.as_secs());
                    return Err(Error::Late { what, seconds, last: format!("{taints:?}") });
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
        Ok(())
    }

    /// Cordons the node, evicts its pods, and watches until no guest is left there.
    async fn empty(&self, guests: &[Guest], limit: Duration) -> Result<Course, Error> {
        let pods: Api<Pod> = Api::default_namespaced(self.client.clone());
        let launchers = format!("{}={}", names::LABEL_APP, names::APP_VIRT_LAUNCHER);
        let here = watcher::Config::default().labels(&launchers).fields(&format!("spec.nodeName={NODE}"));
        let mut pod_news = Box::pin(kube::runtime::watcher(pods.clone(), here));
        let mut migration_news =
            Box::pin(kube::runtime::watcher(self.api("VirtualMachineInstanceMigration"), watcher::Config::default()));
        let mut on_node = Pods::default();
        // Both watches stand before anything happens.
        while let Some(event) = pod_news.next().await {
            match event {
                Ok(event @ Event::InitDone) => {
                    on_node.take(event);
                    break;
                }
                Ok(event) => on_node.take(event),
                Err(_) => {}
            }
        }
        while !matches!(migration_news.next().await, Some(Ok(Event::InitDone)) | None) {}
        if on_node.left.len() != guests.len() {
            let what = format!("each of {} guests has a pod on {NODE}", guests.len());
            return Err(Error::Late { what, seconds: 0, last: format!("{:?}", on_node.left) });
        }

        let mut course = Course::default();
        let begun = Instant::now();
        let deadline = tokio::time::Instant::from_std(begun + limit);
        let nodes: Api<Node> = Api::all(self.client.clone());
        nodes.cordon(NODE).await.map_err(refused(&format!("cordon {NODE}")))?;
        let listed = pods.list(&ListParams::default().fields(&format!("spec.nodeName={NODE}"))).await;
        let mut evictions = JoinSet::new();
        for pod in listed.map_err(refused("list pods"))? {
            evictions.spawn(evict(pods.clone(), pod.name_any()));
        }
        // The last migration has succeeded a little before, or after, the last pod has ended.
        let left = |course: &Course| course.moves.values().filter(|one| one.ends.is_some()).count();
        while course.empty.is_none() || left(&course) < guests.len() {
            tokio::select! {
                Some(event) = pod_news.next() => if let Ok(event) = event { on_node.take(event) },
                Some(event) = migration_news.next() => {
                    if let Ok(Event::Apply(migration) | Event::InitApply(migration)) = event {
                        course.take(&migration, begun.elapsed());
                    }
                }
                Some(Ok(Err(why))) = evictions.join_next() => course.refused.push(why),
                () = tokio::time::sleep_until(deadline) => break,
            }
            if on_node.left.is_empty() {
                course.empty.get_or_insert_with(|| begun.elapsed());
            }
        }
        Ok(course)
    }

    /// How a guest left.
    async fn departure(
        &self,
        guest: &Guest,
        course: &Course,
        bandwidth: Bandwidth,
        wrong: &mut Vec<String>,
    ) -> Result<Departure, Error> {
        let vmi = self.api("VirtualMachineInstance").get(&guest.name).await;
        let vmi = vmi.map_err(refused(&format!("read {}", guest.name)))?;
        let node = text(&vmi, "/status/nodeName");
        if node == NODE || text(&vmi, "/status/phase") != "Running" {
            wrong.push(format!("{} is {} on {node}", guest.name, text(&vmi, "/status/phase")));
        }
        let bytes = vmi.data.pointer("/status/migrationState/progress/bytesProcessed").and_then(Value::as_u64);
        let least = bytes.zip(bandwidth.bytes()).map(|(bytes, rate)| bytes as f64 / rate as f64 * 1e3);
        let none = Move::default();
        let one = course.moves.get(&guest.name).unwrap_or(&none);
        Ok(Departure {
            vmi: guest.name.clone(),
            turn_ms: one.turn.map(milliseconds),
            sends_ms: one.sends.map(milliseconds),
            ends_ms: one.ends.map(milliseconds),
            bytes,
            least_ms: least,
            failed: u32::try_from(one.failed.len()).unwrap_or(u32::MAX),
        })
    }

    /// What the guest's own beats say against it, once it has been heard where it is now.
    async fn whole(&self, guest: &Guest, witness: &Witness) -> Result<Option<String>, Error> {
        let (since, deadline) = (std::time::SystemTime::now(), Instant::now() + PATIENCE);
        while witness.since(guest.station, since).beats < ALIVE {
            if Instant::now() > deadline {
                return Ok(Some(format!("{} is not heard any more", guest.name)));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(complaint(&witness.beats(guest.station)).map(|what| format!("{}: {what}", guest.name)))
    }
}

/// Evicts a pod as kubectl does, until that is granted.
async fn evict(pods: Api<Pod>, name: String) -> Result<(), String> {
    loop {
        match pods.evict(&name, &EvictParams::default()).await {
            Ok(_) => return Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
            Err(kube::Error::Api(status)) if status.code == 429 => tokio::time::sleep(ASK_AGAIN).await,
            Err(error) => return Err(format!("pod {name} cannot be evicted: {error}")),
        }
    }
}

/// The names of the node's pods that have not ended.
#[derive(Default)]
struct Pods {
    left: BTreeSet<String>,
    /// Those of a list that is not complete yet: the watch has broken, and begins again.
    listed: Option<BTreeSet<String>>,
}

impl Pods {
    fn take(&mut self, event: Event<Pod>) {
        match event {
            Event::Init => self.listed = Some(BTreeSet::new()),
            Event::InitDone => self.left = self.listed.take().unwrap_or_default(),
            Event::Delete(pod) => _ = self.left.remove(&pod.name_any()),
            Event::Apply(pod) | Event::InitApply(pod) => {
                let known = self.listed.as_mut().unwrap_or(&mut self.left);
                let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
                if matches!(phase, Some("Succeeded" | "Failed")) {
                    known.remove(&pod.name_any());
                } else {
                    known.insert(pod.name_any());
                }
            }
        }
    }
}

fn is_migratable(vmi: &DynamicObject) -> bool {
    let conditions = vmi.data.pointer("/status/conditions").and_then(Value::as_array);
    conditions.into_iter().flatten().any(|one| one["type"] == "LiveMigratable" && one["status"] == "True")
}

fn resource(group: &str, kind: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, "v1", kind))
}

fn refused(what: &str) -> impl FnOnce(kube::Error) -> Error {
    let what = what.to_owned();
    move |source| Error::Api { what, source: Box::new(source) }
}

/// A text in an object, by JSON pointer; empty where there is none.
fn text(object: &DynamicObject, pointer: &str) -> String {
    object.data.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(course: &mut Course, uid: &str, phase: &str, at: u64) {
        let migration = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration", "metadata": {"name": uid, "uid": uid},
            "spec": {"vmiName": "a"}, "status": {"phase": phase},
        });
        course.take(&serde_json::from_value(migration).unwrap(), Duration::from_secs(at));
    }

    #[test]
    fn a_migration_waits_has_its_turn_sends_and_ends() {
        let mut course = Course::default();
        for (at, phase) in
            ["Pending", "Scheduling", "Scheduled", "Running", "Running", "Succeeded", "Succeeded"].iter().enumerate()
        {
            seen(&mut course, "one", phase, at as u64);
        }
        let one = &course.moves["a"];
        let [turn, sends, ends] = [one.turn, one.sends, one.ends].map(|time| time.map(|time| time.as_secs()));
        assert_eq!((turn, sends, ends, one.failed.len()), (Some(1), Some(3), Some(5), 0));
    }

    #[test]
    fn a_node_is_not_empty_while_its_pods_are_listed_again() {
        let pod = |name: &str, phase: &str| -> Pod {
            serde_json::from_value(json!({"metadata": {"name": name}, "status": {"phase": phase}})).unwrap()
        };
        let mut pods = Pods::default();
        for event in
            [Event::Init, Event::InitApply(pod("a", "Running")), Event::InitApply(pod("b", "Running")), Event::InitDone]
        {
            pods.take(event);
        }
        pods.take(Event::Apply(pod("b", "Succeeded")));
        pods.take(Event::Init);
        assert_eq!(pods.left.len(), 1);
        pods.take(Event::InitDone);
        assert!(pods.left.is_empty());
    }

    #[test]
    fn an_attempt_that_fails_is_counted_once_and_the_next_one_sends_anew() {
        let mut course = Course::default();
        for (uid, phase, at) in [
            ("one", "Running", 1),
            ("one", "Failed", 2),
            ("one", "Failed", 3),
            ("two", "Running", 9),
            ("two", "Succeeded", 10),
        ] {
            seen(&mut course, uid, phase, at);
        }
        let one = &course.moves["a"];
        assert_eq!((one.sends, one.failed.len()), (Some(Duration::from_secs(9)), 1));
    }
}
