//! A migration as it is seen while it runs: the API's objects, and both launchers' own words. Only for choosing the moment and for
//! the report; who ran is told by the witness.

use super::guest::{Guest, LOOK_EVERY, Place};
use super::plan::Moment;
use super::stage::{Kind, Stage, text};
use godwit_launcher::client::Client;
use godwit_launcher::record;
use godwit_launcher::rpc::{DomainPhase, MigrationFacts, MigrationMode, MigrationRole, State};
use godwit_standalone::Process;
use kube::api::ListParams;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Between two attempts to reach a launcher.
const REACH_EVERY: Duration = Duration::from_millis(5);

/// A launcher's socket in its folder of sockets.
const SOCKET: &str = "launcher.sock";

/// What is known of one end.
#[derive(Clone, Debug, Default)]
pub struct End {
    /// Its pod.
    pub place: Option<Place>,
    /// The launcher's last word.
    pub state: Option<State>,
    /// The launcher.
    pub launcher: Option<Process>,
    /// The QEMU.
    pub qemu: Option<Process>,
}

/// What is known of a migration.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// UID of the migration, once it has been asked for.
    pub uid: Option<String>,
    /// Its phase.
    pub phase: String,
    /// Why it failed.
    pub reason: String,
    /// The end that the guest is to leave.
    pub source: End,
    /// The end that it is to come to.
    pub target: End,
    /// The source's launcher has said, or left a record, that the guest has left.
    pub handed_over: bool,
    /// The target's launcher has said that it has taken the go.
    pub gone: bool,
    /// When its launcher first said that its QEMU has read the devices' state.
    pub loaded_at: Option<Instant>,
    /// The source's QEMU has said in post-copy that nothing is left to be sent, and not yet that all has arrived.
    pub spent: bool,
    /// When its QEMU was seen to go on over another link.
    pub recovered: Vec<Instant>,
    /// QEMU's version at the target, in words.
    pub qemu_version: Option<String>,
    /// The guest went in post-copy.
    pub post_copy: bool,
    /// The source's QEMU has nothing more to send.
    pub whole: bool,
    /// The request is not in the API any more: it was cancelled, and is over.
    pub withdrawn: bool,
}

impl View {
    /// Whether the API says that it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.withdrawn || matches!(self.phase.as_str(), "Succeeded" | "Failed")
    }

    /// What an end says of this migration; a launcher keeps its last one.
    fn facts<'a>(&self, end: &'a End, role: MigrationRole) -> Option<&'a MigrationFacts> {
        let facts = end.state.as_ref()?.migration.as_ref()?;
        (facts.role == role && Some(&facts.uid) == self.uid.as_ref()).then_some(facts)
    }

    fn sent(&self) -> Option<&MigrationFacts> {
        self.facts(&self.source, MigrationRole::Source)
    }

    /// Keeps what must not be forgotten when a launcher has gone.
    fn learn(&mut self) {
        self.handed_over |= self.sent().is_some_and(|facts| facts.handed_over);
        self.post_copy |= self.sent().is_some_and(|facts| facts.mode == MigrationMode::PostCopy);
        self.spent |= self.sent().is_some_and(|facts| facts.status == "postcopy-active" && facts.remaining_bytes == 0);
        self.whole |= self.sent().is_some_and(|facts| facts.status == "completed");
        self.gone |= self.facts(&self.target, MigrationRole::Target).is_some_and(|facts| facts.gone);
        if let Some(facts) = self.facts(&self.target, MigrationRole::Target) {
            let (loaded, recoveries) = (facts.loaded, facts.recoveries);
            if loaded {
                self.loaded_at.get_or_insert_with(Instant::now);
            }
            while (self.recovered.len() as u64) < recoveries {
                self.recovered.push(Instant::now());
            }
        }
        let version = self.target.state.as_ref().and_then(|state| state.qemu_version.as_ref());
        if version.is_some() && version != self.qemu_version.as_ref() {
            self.qemu_version = version.cloned();
        }
    }

    /// How far it has come.
    #[must_use]
    pub fn moment(&self) -> Moment {
        let waits = |state: &State| state.phase == DomainPhase::Incoming;
        if self.is_over() {
            Moment::Over
        } else if self.gone {
            Moment::Gone
        } else if self.handed_over {
            Moment::HandedOver
        } else if self.sent().is_some_and(|facts| facts.stop_us.is_some()) {
            Moment::Stopped
        } else if self.sent().is_some() {
            Moment::Sending
        } else if self.target.state.as_ref().is_some_and(waits) {
            Moment::Waiting
        } else if self.target.place.is_some() {
            Moment::Placed
        } else if self.uid.is_some() {
            Moment::Asked
        } else {
            Moment::Before
        }
    }
}

/// The record in a source's pod, if it says that the guest has left with this migration.
#[must_use]
pub fn departed(stage: &Stage, source: &Place, uid: &str) -> Option<MigrationFacts> {
    let folder = source.volume(stage, "ephemeral-disks");
    record::read_departed(&folder).ok().flatten().filter(|facts| facts.uid == uid)
}

/// Looks on until it is dropped.
pub struct Sight {
    view: watch::Receiver<View>,
    asked: watch::Sender<Option<(String, String)>>,
    tasks: Vec<JoinHandle<()>>,
    logs: Logs,
}

impl Drop for Sight {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// The launchers' logs, held open: they can be read when their pods have been removed.
type Logs = Arc<std::sync::Mutex<Vec<(String, File)>>>;

impl Sight {
    /// Begins to look at the guest, which lives at `source`.
    #[must_use]
    pub fn open(stage: &Arc<Stage>, guest: &Guest, source: Place) -> Self {
        let (tell, view) = watch::channel(View::default());
        let tell = Arc::new(tell);
        let (asked, migration) = watch::channel(None);
        let logs = Logs::default();
        let sight = Looking { stage: stage.clone(), guest: guest.clone(), tell, logs: logs.clone() };
        let tasks = vec![tokio::spawn(sight.run(source, migration))];
        Self { view, asked, tasks, logs }
    }

    /// The migration has been asked for: its name and uid.
    pub fn asked(&self, name: &str, uid: &str) {
        self.asked.send_replace(Some((name.to_owned(), uid.to_owned())));
    }

    /// What is known now.
    #[must_use]
    pub fn now(&self) -> View {
        self.view.borrow().clone()
    }

    /// Waits until it is as wanted; false if that was not within `limit`.
    pub async fn until(&mut self, limit: Duration, wanted: impl FnMut(&View) -> bool) -> bool {
        matches!(tokio::time::timeout(limit, self.view.wait_for(wanted)).await, Ok(Ok(_)))
    }

    /// Writes what the launchers have said into files in `folder`.
    pub fn keep_logs(&self, folder: &Path) {
        for (name, file) in self.logs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter_mut() {
            let mut said = Vec::new();
            if file.read_to_end(&mut said).is_ok() {
                let _ = std::fs::write(folder.join(format!("{name}.log")), said);
            }
        }
    }
}

struct Looking {
    stage: Arc<Stage>,
    guest: Guest,
    tell: Arc<watch::Sender<View>>,
    logs: Logs,
}

/// Which end.
#[derive(Clone, Copy)]
enum Side {
    Source,
    Target,
}

impl Side {
    fn of(self, view: &mut View) -> &mut End {
        match self {
            Side::Source => &mut view.source,
            Side::Target => &mut view.target,
        }
    }
}

impl Looking {
    async fn run(self, source: Place, migration: watch::Receiver<Option<(String, String)>>) {
        // End with this task.
        let mut followers = tokio::task::JoinSet::new();
        followers.spawn(self.follow(source.clone(), Side::Source));
        let mut target_known = false;
        loop {
            let asked = migration.borrow().clone();
            if let Some((name, uid)) = asked {
                self.tell.send_if_modified(|view| {
                    let new = view.uid.is_none();
                    if new {
                        view.uid = Some(uid.clone());
                        // The API's answer may have come long after the launchers have begun.
                        view.learn();
                    }
                    new
                });
                if let Some(facts) = departed(&self.stage, &source, &uid) {
                    let post_copy = facts.mode == MigrationMode::PostCopy;
                    self.tell.send_if_modified(|view| {
                        view.post_copy |= post_copy;
                        !std::mem::replace(&mut view.handed_over, true)
                    });
                }
                if !target_known && let Some(target) = self.target(&uid).await {
                    target_known = true;
                    followers.spawn(self.follow(target, Side::Target));
                }
                let asked = self.stage.api(Kind::Migration).get_opt(&name).await;
                if let Ok(None) = asked {
                    self.tell.send_if_modified(|view| !std::mem::replace(&mut view.withdrawn, true));
                }
                if let Ok(Some(object)) = asked {
                    let phase = text(&object, "/status/phase");
                    let reason = text(&object, "/status/migrationState/failureReason");
                    self.tell.send_if_modified(|view| {
                        let new = view.phase != phase || view.reason != reason;
                        (view.phase, view.reason) = (phase, reason);
                        new
                    });
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// The migration's target pod, once it has a node.
    async fn target(&self, uid: &str) -> Option<Place> {
        let made_for = ListParams::default().labels(&format!("kubevirt.io/migrationJobUID={uid}"));
        let pods = self.stage.api(Kind::Pod).list(&made_for).await.ok()?;
        let pod = pods.items.into_iter().find(|pod| !text(pod, "/spec/nodeName").is_empty())?;
        Some(Place { node: text(&pod, "/spec/nodeName"), uid: pod.metadata.uid? })
    }

    /// Listens to a launcher, whenever it answers.
    fn follow(&self, place: Place, side: Side) -> impl Future<Output = ()> + Send + 'static {
        let (tell, logs) = (self.tell.clone(), self.logs.clone());
        let sockets = place.volume(&self.stage, "sockets");
        let log = place.folder(&self.stage).join("containers/compute/log");
        let name = format!("{}-{}-{}", self.guest.name, place.node, place.uid);
        tell.send_modify(|view| side.of(view).place = Some(place));
        async move {
            loop {
                if let Some(launcher) = peer(&sockets).await
                    && let Ok(mut states) = Client::new(sockets.join(SOCKET)).watch().await
                {
                    if let Ok(file) = File::open(&log) {
                        logs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((name.clone(), file));
                    }
                    tell.send_modify(|view| side.of(view).launcher = Some(launcher));
                    while let Ok(Some(state)) = states.next().await {
                        tell.send_modify(|view| take(view, side, state));
                    }
                }
                tokio::time::sleep(REACH_EVERY).await;
            }
        }
    }
}

fn take(view: &mut View, side: Side, state: State) {
    let end = side.of(view);
    // The launcher numbers it as its own process namespace does.
    if state.qemu_pid.is_some() && end.qemu.is_none() {
        end.qemu = end.launcher.and_then(qemu_of);
    }
    end.state = Some(state);
    view.learn();
}

/// Who listens on a launcher's socket.
async fn peer(sockets: &Path) -> Option<Process> {
    // The whole path can be longer than a socket address takes.
    let folder = File::open(sockets).ok()?;
    let socket = format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd());
    let stream = UnixStream::connect(socket).await.ok()?;
    Process::of(stream.peer_cred().ok()?.pid()?)
}

/// The launcher's child.
fn qemu_of(launcher: Process) -> Option<Process> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", launcher.pid)).ok()?;
    let children = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let pids: Vec<i32> =
        children.flat_map(|list| list.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
    let is_qemu = |pid: &i32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("qemu-system"))
    };
    pids.into_iter().find(is_qemu).and_then(Process::of)
}
