//! The same with the real launchers and QEMU, running the ROM guest.

use std::path::PathBuf;
use std::time::Duration;

use godwit_guest_rom::{Parameters, Story};
use godwit_launcher::client::Client;
use godwit_launcher::rpc::transport::channels_for;
use godwit_launcher::rpc::{DomainPhase, Paths, State};
use godwit_launcher::serve;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::flow::{Cluster, VMI_UID, VMIS, blocking, until};

/// Generous: the machine is busy, and only a hang shall fail.
const PATIENCE: Duration = Duration::from_secs(60);

/// A launcher in this process; its QEMU goes with its task, which goes with this.
struct Launcher {
    sockets: PathBuf,
    task: JoinHandle<Result<State, godwit_launcher::Error>>,
    _terminate: mpsc::Sender<()>,
}

impl Drop for Launcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Launcher {
    fn start(sockets: PathBuf) -> Self {
        let volumes = sockets.parent().unwrap().to_owned();
        let mut paths = Paths::under(&volumes.join("rest"));
        paths.sockets = sockets.clone();
        paths.ephemeral_disks = volumes.join("ephemeral-disks");
        std::fs::create_dir_all(&paths.kernel_boot).unwrap();
        std::fs::create_dir_all(&paths.ephemeral_disks).unwrap();
        let rom = godwit_guest_rom::image(Parameters { token: 9, pages_per_tick: 50, ..Parameters::default() });
        std::fs::write(paths.kernel_boot.join("rom.bin"), rom).unwrap();
        let (terminate, wishes) = mpsc::channel(1);
        Self { sockets, task: tokio::spawn(serve(VMI_UID.into(), paths, wishes)), _terminate: terminate }
    }

    async fn console(&self) -> Lines<BufReader<UnixStream>> {
        BufReader::new(UnixStream::connect(self.sockets.join("console-serial0")).await.unwrap()).lines()
    }
}

async fn hear(console: &mut Lines<BufReader<UnixStream>>, story: &mut Story, beats: u32) {
    let goal = story.beats() + beats;
    let work = async {
        while story.beats() < goal {
            story.hear(&console.next_line().await.unwrap().expect("the console has ended"));
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("the guest does not beat");
    assert_eq!(story.complaint(), None);
}

/// Whatever connections this launcher is to be handed, none can be.
fn keep_from_carrying(launcher: &Launcher) {
    for number in 0..64 {
        std::fs::create_dir(launcher.sockets.join(format!("hand-{number}.sock"))).unwrap();
    }
}

/// The connections of memory between two nodes that are this machine, for a guest that is translated there.
fn connections(vm: &Value) -> usize {
    // Older translators send in one pass, over one connection.
    let channels = if qemu(vm) < 9 { 0 } else { channels_for(std::thread::available_parallelism().unwrap().get()) };
    1 + usize::from(channels)
}

/// QEMU's major version.
fn qemu(vm: &Value) -> u32 {
    let version = vm["status"]["qemuVersion"].as_str().unwrap();
    version.split('.').next().unwrap().parse().unwrap()
}

/// A cluster with a running ROM guest on node1.
async fn running() -> (Cluster, Launcher) {
    let mut cluster = Cluster::new();
    cluster.up(0);
    cluster.up(1);
    let source = Launcher::start(cluster.sockets(0, "one"));
    cluster.vmi(&json!({
        "memory": { "guest": "16Mi" },
        "devices": {},
        "firmware": { "kernelBoot": { "container": { "image": "rom", "kernelPath": "/rom.bin" } } },
    }));
    until("the VM runs", || cluster.vm()["status"]["phase"] == "Running").await;
    (cluster, source)
}

/// Moves a guest from node1 to node2 under this `migrationConfiguration`; its memory arrives whole. The VMI after that.
async fn moved_under(configuration: &Value) -> (Value, Vec<String>) {
    let (cluster, source) = running().await;
    let mut story = Story::default();
    let mut here = source.console().await;
    hear(&mut here, &mut story, 20).await;
    let target = Launcher::start(cluster.sockets(1, "two"));
    cluster.write_hand_off_with(configuration);
    until("the migration is over", || cluster.vm()["status"]["migrationState"]["completed"] == true).await;
    while let Ok(Some(line)) = here.next_line().await {
        story.hear(&line);
    }
    let mut there = target.console().await;
    hear(&mut there, &mut story, 20).await;
    assert_eq!(cluster.vm()["status"]["migrationState"].get("failed"), None, "{:#}", cluster.vm());
    (cluster.vm(), cluster.events())
}

#[test]
fn memory_is_compressed_under_a_cap() {
    blocking(async {
        let (vm, events) = moved_under(&json!({ "bandwidthPerMigration": "8Mi" })).await;
        let m = &vm["status"]["migrationState"];
        assert_eq!(m["progress"]["connections"], connections(&vm), "{m:#}");
        let compressed = connections(&vm) > 1;
        assert_eq!(m["progress"].get("compression"), compressed.then(|| json!("zstd")).as_ref(), "{m:#}");
        // The map of ports is KubeVirt's, however many connections there are.
        let inner: Vec<_> = m["targetDirectMigrationNodePorts"].as_object().unwrap().values().cloned().collect();
        assert!(inner.len() == 2 && inner.contains(&json!(0)) && inner.contains(&json!(49152)), "{m:#}");
        assert!(!events.iter().any(|e| e.contains("one connection")), "{events:#?}");
    });
}

#[test]
fn where_post_copy_is_allowed_memory_has_one_connection_and_that_is_said() {
    blocking(async {
        let (vm, events) = moved_under(&json!({ "allowPostCopy": true })).await;
        let m = &vm["status"]["migrationState"];
        // One more for pages that are waited for, where QEMU opens it after the main one.
        assert_eq!(m["progress"]["connections"], 1 + u32::from(qemu(&vm) >= 8), "{m:#}");
        assert_eq!(m["progress"].get("compression"), None, "{m:#}");
        assert_eq!(
            events.iter().any(|e| e.contains("memory goes over one connection")),
            connections(&vm) > 1,
            "{events:#?}"
        );
    });
}

/// Memory in post-copy goes through the launchers, whatever becomes of the handlers.
#[test]
fn handlers_that_are_killed_in_post_copy_do_not_break_the_link() {
    killed_in_post_copy(true);
}

/// Where launchers cannot carry it, it goes through both handlers. The one that comes after a killed one takes it up again.
#[test]
fn handlers_that_are_killed_in_post_copy_cost_the_guest_no_page() {
    killed_in_post_copy(false);
}

fn killed_in_post_copy(by_launchers: bool) {
    blocking(async {
        let (mut cluster, source) = running().await;
        if !by_launchers {
            keep_from_carrying(&source);
        }
        let client = Client::new(source.sockets.join("launcher.sock"));
        let mut story = Story::default();
        let mut here = source.console().await;
        // Once through its memory, so that all of it is there to lose.
        hear(&mut here, &mut story, 20).await;
        let target = Launcher::start(cluster.sockets(1, "two"));
        // Its 4 MiB take half a minute at this rate: more than any of this needs.
        let configuration =
            json!({ "allowPostCopy": true, "completionTimeoutPerGiB": 1, "bandwidthPerMigration": "128Ki" });
        cluster.write_hand_off_with(&configuration);
        until("the guest runs at the target", || cluster.vm()["status"]["nodeName"] == "node2").await;
        for (number, node) in [1, 0].into_iter().enumerate() {
            let sent =
                |cluster: &Cluster| cluster.vm()["status"]["migrationState"]["progress"]["bytesProcessed"].as_u64();
            let before = sent(&cluster);
            cluster.kill(node);
            cluster.up(node);
            let recoveries = if by_launchers { Value::Null } else { json!(number + 1) };
            let goes_on = || cluster.vm()["status"]["migrationState"]["progress"]["recoveries"] == recoveries;
            until("its memory goes on", || goes_on() && sent(&cluster) > before).await;
            assert_eq!(cluster.vm()["status"]["migrationState"].get("completed"), None, "a part is missing still");
        }
        let connected = |vm: &Value| {
            let conditions = vm["status"]["conditions"].as_array().cloned().unwrap_or_default();
            !conditions.iter().any(|c| c["reason"] == "PostCopyLinkBroken")
        };
        until("the condition is gone", || connected(&cluster.vm())).await;
        let state = client.state().await.unwrap();
        let carried = state.migration.unwrap().carried;
        assert_eq!(carried.map(|carried| (carried.link, carried.flows)), by_launchers.then_some((0, true)));
        // The rest at once: a handler that has begun since can order that as well.
        let unlimited =
            json!({ "status": { "migrationState": { "migrationConfiguration": { "bandwidthPerMigration": "0" } } } });
        cluster.api.merge(VMIS, "vm", &unlimited);
        until("the migration is over", || cluster.vm()["status"]["migrationState"]["completed"] == true).await;
        let m = cluster.vm()["status"]["migrationState"].clone();
        assert_eq!((m.get("failed"), &m["mode"]), (None, &json!("PostCopy")), "{m:#}");
        assert_eq!(m["progress"].get("linkBrokenTimestamp"), None, "{m:#}");
        while let Ok(Some(line)) = here.next_line().await {
            story.hear(&line);
        }
        // Its pages are verified when it comes back to them.
        let mut there = target.console().await;
        hear(&mut there, &mut story, 40).await;
        println!("{:#}\n{:#?}", m["progress"], cluster.events());
    });
}

/// 20 MiB/s are written to 4 MiB, and 3 MiB/s carried: a pass leaves no less than the one before. The time for it is far from over.
#[test]
fn a_guest_that_would_never_get_there_goes_on_in_post_copy_after_its_first_passes() {
    blocking(async {
        let configuration = json!({ "allowPostCopy": true, "bandwidthPerMigration": "3Mi", "maxDowntimeMs": 50,
            "completionTimeoutPerGiB": 3600, "progressTimeout": 3600 });
        let (vm, events) = moved_under(&configuration).await;
        let m = &vm["status"]["migrationState"];
        println!("forecast {:#}\nprogress {:#}", m["forecast"], m["progress"]);
        assert!(m["forecast"]["madeAt"].is_string(), "{m:#}");
        assert!(m["forecast"]["downtimeMilliseconds"].as_u64().is_some_and(|ms| ms > 0), "{m:#}");
        if vm["status"]["qemuVersion"].as_str().unwrap().starts_with("7.") {
            println!("not shown here: the translator of QEMU before 9.0 sends in one pass, which always ends");
            assert_eq!((&m["mode"], &m["forecast"]["converges"]), (&json!("PreCopy"), &json!(true)), "{m:#}");
            return;
        }
        assert_eq!((&m["mode"], &m["forecast"]["converges"]), (&json!("PostCopy"), &json!(false)), "{m:#}");
        assert!(events.iter().any(|e| e.contains("goes on in post-copy")), "{events:#?}");
    });
}

#[test]
fn a_guest_on_a_real_qemu_moves_between_two_handlers() {
    blocking(async {
        let (cluster, mut source) = running().await;
        let mut story = Story::default();
        let mut here = source.console().await;
        hear(&mut here, &mut story, 3).await;

        let target = Launcher::start(cluster.sockets(1, "two"));
        cluster.write_hand_off();
        until("the migration is over", || cluster.vm()["status"]["migrationState"]["completed"] == true).await;
        let m = cluster.vm()["status"]["migrationState"].clone();
        assert_eq!(m.get("failed"), None, "{m:#}");
        while let Ok(Some(line)) = here.next_line().await {
            story.hear(&line);
        }
        let mut there = target.console().await;
        hear(&mut there, &mut story, 5).await;
        until("the arrival is written", || cluster.vm()["status"]["nodeName"] == "node2").await;

        // The source's launcher was told that it may end, and said last that its guest has left.
        let ended = tokio::time::timeout(PATIENCE, &mut source.task).await.expect("the source ends");
        assert_eq!(ended.unwrap().unwrap().phase, DomainPhase::MigratedAway);
        let vm = cluster.vm();
        assert_eq!(vm["status"]["phase"], "Running");
        assert_eq!(vm["status"]["accelerator"], "tcg");
        assert!(m["progress"]["bytesTotal"].as_u64().unwrap() > 0, "{m:#}");
        assert!(m["progress"]["downtimeMilliseconds"].is_u64(), "{m:#}");
        assert_eq!(m["progress"]["connections"], connections(&vm), "{m:#}");
        assert_eq!(m["progress"].get("compression"), None, "nothing is known of the link: {m:#}");
        println!("{:#}\n{:#?}", m["progress"], cluster.events());
    });
}
