//! A launcher in a folder of its own, spoken to as a handler does.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(dead_code, reason = "each of the tests uses a part of it")]

use godwit_guest_rom::{Parameters, Story};
use godwit_launcher::client::{Client, Error};
use godwit_launcher::rpc::*;
use godwit_launcher::{Accelerator, serve};
use serde_json::json;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Generous: the machine is busy, and only a hang shall fail.
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const UID: &str = "0f0e0d0c-0000-4000-8000-000000000001";
pub const MIGRATION: &str = "11111111-0000-4000-8000-000000000001";

/// A pod of its own folder. QEMU goes with the launcher's task, which goes with this.
pub struct Pod {
    pub folder: tempfile::TempDir,
    pub client: Client,
    pub launcher: JoinHandle<Result<State, godwit_launcher::Error>>,
    pub terminate: mpsc::Sender<()>,
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.launcher.abort();
    }
}

impl Pod {
    pub fn paths(folder: &Path) -> Paths {
        Paths::under(folder)
    }

    pub async fn start() -> Pod {
        let folder = tempfile::tempdir().unwrap();
        let paths = Pod::paths(folder.path());
        std::fs::create_dir_all(&paths.kernel_boot).unwrap();
        let rom = godwit_guest_rom::image(Parameters { token: 7, pages_per_tick: 50, ..Parameters::default() });
        std::fs::write(paths.kernel_boot.join("rom.bin"), rom).unwrap();
        let (terminate, wishes) = mpsc::channel(1);
        let client = Client::new(paths.rpc_socket());
        let launcher = tokio::spawn(serve(UID.into(), paths, wishes));
        let pod = Pod { folder, client, launcher, terminate };
        while pod.client.state().await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        pod
    }

    pub async fn console(&self) -> Console {
        let socket = Pod::paths(self.folder.path()).sockets.join("console-serial0");
        Console { lines: BufReader::new(UnixStream::connect(socket).await.unwrap()).lines() }
    }

    /// Follows the state until it is as wanted.
    pub async fn until(&self, what: &str, wanted: impl Fn(&State) -> bool) -> State {
        let mut last = None;
        let work = async {
            let mut watch = self.client.watch().await.unwrap();
            while let Some(state) = watch.next().await.unwrap() {
                if wanted(&state) {
                    return state;
                }
                last = Some(state);
            }
            panic!("the launcher ended before {what}");
        };
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(state) => state,
            Err(_) => panic!("never {what}: {last:#?}"),
        }
    }

    pub async fn end(mut self) -> State {
        tokio::time::timeout(PATIENCE, &mut self.launcher).await.expect("the launcher does not end").unwrap().unwrap()
    }
}

pub struct Console {
    pub lines: tokio::io::Lines<BufReader<UnixStream>>,
}

impl Console {
    pub async fn hear(&mut self, story: &mut Story, beats: u32) {
        let goal = story.beats() + beats;
        let work = async {
            while story.beats() < goal {
                let line = self.lines.next_line().await.unwrap().expect("the console has ended");
                story.hear(&line);
            }
        };
        tokio::time::timeout(PATIENCE, work).await.expect("the guest does not beat");
        assert_eq!(story.complaint(), None);
    }

    pub async fn drain(&mut self, story: &mut Story) {
        while let Ok(Some(line)) = self.lines.next_line().await {
            story.hear(&line);
        }
        assert_eq!(story.complaint(), None);
    }
}

pub fn vmi(volumes: serde_json::Value, disks: serde_json::Value) -> godwit_api::VirtualMachineInstance {
    serde_json::from_value(json!({
        "metadata": {"name": "rom", "namespace": "default", "uid": UID},
        "spec": {
            "terminationGracePeriodSeconds": 20,
            "domain": {
                "memory": {"guest": "16Mi"},
                "firmware": {"kernelBoot": {"container": {"image": "rom", "kernelPath": "/rom.bin"}}},
                "devices": {"disks": disks}
            },
            "volumes": volumes
        },
        "status": {"machineRevision": MACHINE_REVISION}
    }))
    .unwrap()
}

pub fn vm_order() -> VmOrder {
    // A cloud-init disk is in it, so that both ends prove to make the same one.
    let vmi = vmi(
        json!([{"name": "seed", "cloudInitNoCloud": {"userData": "#cloud-config\n"}}]),
        json!([{"name": "seed", "disk": {"bus": "virtio"}}]),
    );
    VmOrder {
        vmi,
        interfaces: vec![],
        volumes: Default::default(),
        accelerator: Some(Accelerator::Tcg),
        host_cpu: Some(guest_cpu()),
        machine_revision: MACHINE_REVISION,
        shareable_memory: false,
        run_until: None,
    }
}

/// What the source's node has beyond a model that any translator has.
pub fn guest_cpu() -> GuestCpu {
    GuestCpu { model: "Opteron_G2".into(), features: ["avx", "bmi1", "xsave"].map(str::to_owned).to_vec() }
}

pub fn target_order() -> TargetOrder {
    let mut vmi = vm_order().vmi;
    vmi.status.guest_cpu = Some(guest_cpu());
    TargetOrder {
        migration_uid: MIGRATION.into(),
        vmi,
        interfaces: vec![],
        volumes: Default::default(),
        accelerator: Some(Accelerator::Tcg),
        machine_type: None,
        allow_post_copy: false,
        transport_follows: false,
        shareable_memory: false,
        memory_socket: None,
        disk_sockets: Default::default(),
    }
}

pub fn source_order(bandwidth: Option<u64>) -> SourceOrder {
    SourceOrder {
        migration_uid: MIGRATION.into(),
        socket: "outgoing.sock".into(),
        blocks_socket: None,
        bandwidth_bytes_per_second: bandwidth,
        max_downtime_ms: None,
        allow_auto_converge: false,
        allow_post_copy: false,
        by_reference: false,
        transport: Transport::default(),
        rooms: Default::default(),
    }
}

/// What the two handlers do between the launchers: carries bytes from `from`'s socket to `to`'s.
pub fn carry(from: &Pod, outgoing: &str, to: &Pod, incoming: &str) -> JoinHandle<()> {
    let listener = UnixListener::bind(Pod::paths(from.folder.path()).sockets.join(outgoing)).unwrap();
    let incoming = Pod::paths(to.folder.path()).sockets.join(incoming);
    tokio::spawn(async move {
        let mut carried = tokio::task::JoinSet::new();
        while let Ok((mut here, _)) = listener.accept().await {
            let incoming = incoming.clone();
            carried.spawn(async move {
                let mut there = UnixStream::connect(&incoming).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
            });
        }
    })
}

/// The same for memory of several connections: QEMU reads what a new one says first, and nothing else meanwhile; and the main
/// one has to be the first.
pub fn carry_memory(from: &Pod, outgoing: &str, to: &Pod, incoming: &str) -> JoinHandle<()> {
    let listener = UnixListener::bind(Pod::paths(from.folder.path()).sockets.join(outgoing)).unwrap();
    let incoming = Pod::paths(to.folder.path()).sockets.join(incoming);
    tokio::spawn(async move {
        let mut carried = tokio::task::JoinSet::new();
        while let Ok((mut here, _)) = listener.accept().await {
            here.readable().await.unwrap();
            let mut there = UnixStream::connect(&incoming).await.unwrap();
            carried.spawn(async move { tokio::io::copy_bidirectional(&mut here, &mut there).await });
        }
    })
}

/// Moves the guest of `from` to `to`, which waits at this socket, and runs it there. What carries it ends with the result.
pub async fn moves(from: &Pod, to: &Pod, incoming: &str) -> JoinHandle<()> {
    let carrier = carry(from, "outgoing.sock", to, incoming);
    from.client.migrate(&source_order(None)).await.unwrap();
    from.until("completed", |s| status(s) == "completed").await;
    to.client.go(MIGRATION).await.unwrap();
    carrier
}

pub fn refusal(result: Result<State, Error>) -> Refusal {
    result.expect_err("it should have been refused").refusal().expect("refused, not broken")
}

pub fn status(state: &State) -> &str {
    state.migration.as_ref().map_or("", |m| m.status.as_str())
}
