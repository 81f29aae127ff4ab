//! One VMI on this node: look, decide, act, and again whenever anything changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_api::vmi::VirtualMachineInstance;
use godwit_launcher::rpc::{MigrationRole, State};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod as ApiPod;
use kube::api::{Api, Patch, PatchParams};
use tokio::sync::{Notify, mpsc};

use crate::channel::TargetChannels;
use crate::context::Context;
use crate::decide::{self, Failure, Plan};
use crate::expect::{self, Prediction};
use crate::facts::{self, Facts, Go, Launcher, MigrationView, Ordered, PodView, SourceView, TargetView, VmiView};
use crate::follow::Follower;
use crate::frames::Relay;
use crate::migration_network::Underlay;
use crate::networks::Wired;
use crate::sockets::SocketDir;
use crate::source_link::SourceLink;
use crate::view::{self, LauncherPod};
use crate::write;

mod act;
mod disks;

/// After an error, before the next attempt: doubled each time between these.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Between two reads of a VMI that no watch of this node shows any more, while something is still to be done for it.
const REREAD: Duration = Duration::from_secs(1);

/// Between two looks at the pod at a migration's other end, while they are of use.
const LOOK_AT_PEER: Duration = Duration::from_secs(1);

/// How long the API may take. A node that is cut off from it must still be able to cancel what goes over the same link.
const API_LIMIT: Duration = Duration::from_secs(5);

/// Waits for the API, but not for ever.
async fn limited<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, String> {
    match tokio::time::timeout(API_LIMIT, call).await {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err(format!("the API does not answer within {API_LIMIT:?}")),
    }
}

/// What a worker is told.
#[derive(Debug)]
pub enum Input {
    /// The VMI as a watch shows it.
    Vmi(Arc<VirtualMachineInstance>),
    /// A watch does not show it any more: it is deleted, or has left this node.
    VmiUnseen,
    /// A launcher pod of it on this node.
    Pod(LauncherPod),
    /// That pod is deleted.
    PodGone(String),
}

/// A pod in hand.
struct Pod {
    pod: LauncherPod,
    follower: Follower,
    wired: Option<Wired>,
    /// What the pod must open is being given to it.
    giving: Option<tokio::task::JoinHandle<()>>,
    shutdown_ordered: Option<u64>,
    reboot_told: Option<i64>,
}

/// The listening half in hand.
struct Target {
    uid: String,
    /// It listens on the interface for migrations.
    over_own_network: bool,
    channels: TargetChannels,
}

/// The dialling half in hand.
struct Source {
    link: SourceLink,
    /// Where the guest goes.
    node: String,
    /// By the network for migrations, when it was dialled.
    over_own_network: bool,
    /// Where QEMU's streams are taken: inner port, folder, name.
    sockets: Vec<(i32, Arc<SocketDir>, String)>,
    /// Hands the guest's frames on in the last moments; none on networks where nothing comes in for it.
    relay: Option<Relay>,
    first_dialled: Instant,
    start_error: Option<Failure>,
    cancelled: Option<Failure>,
    post_copy: Order,
    pause: Order,
    reported: Option<Instant>,
    prediction: Option<Prediction>,
    /// What the link was seen to carry by the migration before, in bytes a second.
    known_rate: Option<u64>,
    meter: Meter,
}

/// An order to the launcher that is given once.
#[derive(Default)]
enum Order {
    #[default]
    Not,
    Given(Instant),
    Refused(String),
}

impl Order {
    fn view(&self) -> Ordered {
        match self {
            Self::Not => Ordered::Not,
            Self::Given(at) => Ordered::Given(at.elapsed()),
            Self::Refused(why) => Ordered::Refused(why.clone()),
        }
    }
}

/// Notices when nothing moves.
struct Meter {
    moved: (u64, Instant),
    low: (u64, Instant),
}

impl Meter {
    fn new() -> Self {
        Self { moved: (0, Instant::now()), low: (u64::MAX, Instant::now()) }
    }

    /// Something was done that should bring it nearer: it has its time again.
    fn restart(&mut self) {
        *self = Self::new();
    }

    /// Takes a look: bytes moved so far, bytes of memory that remain if memory is being sent.
    fn look(&mut self, moved: u64, remaining: Option<u64>) {
        if moved != self.moved.0 {
            self.moved = (moved, Instant::now());
        }
        match remaining {
            Some(remaining) if remaining >= self.low.0 => {}
            low => self.low = (low.unwrap_or(u64::MAX), Instant::now()),
        }
    }
}

/// Looks after one VMI; ends when neither VMI nor pods are left.
pub struct Worker {
    context: Arc<Context>,
    uid: String,
    namespace: String,
    name: String,
    wake: Arc<Notify>,
    inputs: mpsc::UnboundedReceiver<Input>,
    vmi: Option<Arc<VirtualMachineInstance>>,
    /// The VMI in hand may be outdated: no watch shows it.
    unseen: bool,
    pods: BTreeMap<String, Pod>,
    target: Option<Target>,
    source: Option<Source>,
    migratable: (Option<Instant>, write::Migratable),
    /// Of which claims, and how many volumes on their way to others.
    migratable_of: (Vec<String>, usize),
    /// Since when this process knows of the present migration.
    known: Option<(String, Instant)>,
    /// The migration for which the launcher was asked to measure its guest.
    measure_asked: Option<String>,
    /// The migration that runs, since when, and for how long it had run before this process knew of it.
    running: Option<(String, Instant, Duration)>,
    /// The migration whose pod at the other end was last looked at, when, and why it has ended if it has.
    peer_seen: Option<(String, Instant, Option<String>)>,
    /// What was complained about last, so that a complaint is not repeated at each attempt.
    complaint: Option<String>,
}

/// Why a round of actions ended early.
enum Stop {
    /// The VMI has changed meanwhile; `None`: read it anew.
    Stale,
    /// Something failed; try again after a while.
    Failed(String),
}

impl Worker {
    /// Starts a worker and returns the way to tell it things.
    pub fn start(context: Arc<Context>, uid: String, namespace: String, name: String) -> mpsc::UnboundedSender<Input> {
        let (sender, inputs) = mpsc::unbounded_channel();
        let worker = Self {
            context,
            uid,
            namespace,
            name,
            wake: Arc::new(Notify::new()),
            inputs,
            vmi: None,
            unseen: true,
            pods: BTreeMap::new(),
            target: None,
            source: None,
            migratable: (None, write::Migratable::default()),
            migratable_of: Default::default(),
            known: None,
            measure_asked: None,
            running: None,
            peer_seen: None,
            complaint: None,
        };
        tokio::spawn(worker.run());
        sender
    }

    async fn run(mut self) {
        let mut retry = RETRY.0;
        let mut wake_after = Some(Duration::ZERO);
        loop {
            let sleep = async {
                match wake_after {
                    Some(after) => tokio::time::sleep(after).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                input = self.inputs.recv() => match input {
                    Some(input) => self.take(input),
                    None => break,
                },
                () = self.wake.notified() => {}
                () = sleep => {}
            }
            while let Ok(input) = self.inputs.try_recv() {
                self.take(input);
            }
            if self.unseen
                && let Err(error) = self.read().await
            {
                tracing::warn!(vmi = self.name, %error, "cannot read the VMI");
                wake_after = Some(retry);
                retry = (retry * 2).min(RETRY.1);
                continue;
            }
            if self.pods.is_empty() && (self.vmi.is_none() || self.unseen) {
                // A new input for this uid starts a new worker.
                self.inputs.close();
                if self.inputs.is_empty() {
                    break;
                }
            }
            match self.round().await {
                Ok(wake) => {
                    retry = RETRY.0;
                    wake_after = wake;
                    if self.unseen && self.vmi.is_some() {
                        wake_after = Some(wake.map_or(REREAD, |w| w.min(REREAD)));
                    }
                }
                Err(Stop::Stale) => {
                    self.unseen = true;
                    wake_after = Some(Duration::ZERO);
                }
                Err(Stop::Failed(error)) => {
                    tracing::warn!(vmi = self.name, %error, "trying again");
                    wake_after = Some(retry);
                    retry = (retry * 2).min(RETRY.1);
                }
            }
        }
        tracing::debug!(vmi = self.name, uid = self.uid, "nothing left to look after");
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Vmi(vmi) => {
                let seen = |v: &VirtualMachineInstance| {
                    v.metadata.resource_version.as_deref().and_then(|r| r.parse::<u64>().ok())
                };
                // A watch may lag behind our own writes.
                let newer = match (self.vmi.as_deref().and_then(seen), seen(&vmi)) {
                    (Some(old), Some(new)) => new >= old,
                    _ => true,
                };
                if newer {
                    self.vmi = Some(vmi);
                }
                self.unseen = false;
            }
            Input::VmiUnseen => self.unseen = true,
            Input::Pod(pod) => match self.pods.get_mut(&pod.name) {
                Some(known) if known.pod.uid == pod.uid => known.pod = pod,
                _ => {
                    let folder = SocketDir::path_of(&self.context.kubelet_root, &pod.uid);
                    let guest = format!("{}/{}", self.namespace, self.name);
                    let follower = Follower::start(folder, self.wake.clone(), self.context.fence.clone(), guest);
                    let name = pod.name.clone();
                    self.pods.insert(
                        name,
                        Pod { pod, follower, wired: None, giving: None, shutdown_ordered: None, reboot_told: None },
                    );
                }
            },
            Input::PodGone(name) => {
                self.pods.remove(&name);
            }
        }
    }

    fn api(&self) -> Api<VirtualMachineInstance> {
        Api::namespaced(self.context.client.clone(), &self.namespace)
    }

    /// Reads the VMI, which no watch shows at present.
    async fn read(&mut self) -> Result<(), String> {
        let found = limited(self.api().get_opt(&self.name)).await?;
        // Another VMI of the same name is not ours.
        self.vmi = found.filter(|vmi| vmi.uid() == self.uid).map(Arc::new);
        Ok(())
    }

    /// One look, one decision, its actions.
    async fn round(&mut self) -> Result<Option<Duration>, Stop> {
        let Some(vmi) = self.vmi.clone() else { return Ok(None) };
        self.look_at_peer(&vmi).await;
        let facts = self.look(&vmi);
        let Plan { actions, wake } = decide::decide(&facts);
        for action in actions {
            // Logged by what it does; writes that change nothing are none.
            tracing::debug!(vmi = self.name, ?action, "acting");
            self.act(&vmi, &facts, action).await?;
        }
        Ok(wake)
    }

    /// Has the pod at the migration's other end ended? Then nobody is left there to say so.
    async fn look_at_peer(&mut self, vmi: &VirtualMachineInstance) {
        let view = view::vmi(vmi);
        let asked = view.migration.and_then(|m| self.peer_of_interest(&m).map(|peer| (m.uid, peer)));
        let Some((uid, (end, peer))) = asked else {
            self.peer_seen = None;
            return;
        };
        if let Some((seen, at, ended)) = &self.peer_seen
            && *seen == uid
            && (ended.is_some() || at.elapsed() < LOOK_AT_PEER)
        {
            return;
        }
        let api: Api<ApiPod> = Api::namespaced(self.context.client.clone(), &self.namespace);
        let ended = match limited(api.get_opt(&peer)).await {
            Ok(None) => Some(format!("the {end}'s pod {peer} is gone")),
            Ok(Some(pod)) => {
                let phase = pod.status.and_then(|status| status.phase).unwrap_or_default();
                view::is_terminal(&phase).then(|| format!("the {end}'s pod {peer} has ended ({phase})"))
            }
            Err(error) => {
                tracing::info!(vmi = self.name, migration = uid, error, "cannot look at the {end}'s pod");
                None
            }
        };
        if let Some(ended) = &ended {
            tracing::error!(vmi = self.name, migration = uid, ended, "the migration's other end is gone");
        }
        self.peer_seen = Some((uid, Instant::now(), ended));
    }

    /// Which end's pod is to be looked at, if that is of use now.
    fn peer_of_interest(&self, m: &MigrationView) -> Option<(&'static str, String)> {
        if m.completed {
            return None;
        }
        let state = |pod: &str| self.pods.get(pod).map(|pod| pod.follower.now());
        if m.source_node == self.context.node {
            let launcher = state(&m.source_pod)?;
            let sent = launcher.last().and_then(|state| facts::migration(state, &m.uid, MigrationRole::Source));
            let link = self.source.as_ref().filter(|source| source.link.uid == m.uid).map(|s| s.link.now());
            let of_use = match sent {
                // The go has met an obstacle, or a part of the guest's memory is still here.
                Some(f) if facts::has_left(f) => {
                    let go = link.map(|link| link.go);
                    matches!(go, None | Some(Go::Trying(_))) || f.status != "completed"
                }
                Some(f) => f.status == "failed",
                None => link.is_some_and(|link| link.error.is_some()),
            };
            return of_use.then(|| ("target", m.target_pod.clone()));
        }
        if m.target_node == self.context.node {
            let launcher = state(&m.target_pod)?;
            let received = launcher.last().and_then(|state| facts::migration(state, &m.uid, MigrationRole::Target));
            let of_use = received.is_some_and(|f| f.gone && facts::is_broken(f));
            return of_use.then(|| ("source", m.source_pod.clone()));
        }
        None
    }

    /// For how long the migration runs.
    fn running_for(&mut self, m: Option<&MigrationView>) -> Option<Duration> {
        let m = m.filter(|m| !m.completed)?;
        if let Some((uid, since, before)) = &self.running
            && *uid == m.uid
        {
            return Some(*before + since.elapsed());
        }
        // The orders that this process gives set it at once; this one was given by its predecessor.
        let before = Timestamp::now().duration_since(m.start?);
        let before = Duration::try_from(before).unwrap_or_default();
        self.running = Some((m.uid.clone(), Instant::now(), before));
        Some(before)
    }

    fn look(&mut self, vmi: &VirtualMachineInstance) -> Facts {
        let view = view::vmi(vmi);
        let uid = view.migration.as_ref().map(|m| &m.uid);
        if self.known.as_ref().map(|(known, _)| known) != uid {
            self.known = uid.map(|uid| (uid.clone(), Instant::now()));
        }
        let mut pods = BTreeMap::new();
        for (name, pod) in &self.pods {
            let view = PodView {
                name: name.clone(),
                migration_uid: pod.pod.migration_uid.clone(),
                terminal: pod.pod.terminal,
                shutdown_ordered: pod.shutdown_ordered,
                reboot_told: pod.reboot_told,
                launcher: pod.follower.now(),
            };
            pods.insert(name.clone(), view);
        }
        if let (Some(source), Some(m)) = (&mut self.source, &view.migration)
            && let Some(sent) = pods
                .get(&m.source_pod)
                .and_then(|p| p.launcher.last())
                .and_then(|s| facts::migration(s, &m.uid, MigrationRole::Source))
        {
            if let Some(carried) = &sent.carried {
                source.link.carried.tell((carried.out, carried.back, carried.writing_us));
            }
            let carried = source.link.carried.total();
            // While disks are copied nothing of the memory is sent yet; that is not being stuck.
            let remaining = (sent.status == "active" && sent.total_bytes > 0).then_some(sent.remaining_bytes);
            source.meter.look(carried.wrapping_add(sent.processed_bytes), remaining);
            if let Some(endpoint) = act::endpoint(m, &self.context.underlay) {
                source.link.moved(endpoint);
            }
            // The kubelet says that its processes are gone.
            if pods.get(&m.source_pod).is_some_and(|pod| pod.terminal) {
                source.link.unserved();
            }
        }
        self.predict(&view, &pods);
        let running_for = self.running_for(view.migration.as_ref());
        Facts {
            node: self.context.node.clone(),
            now: Timestamp::now(),
            running_for,
            vmi: view,
            known_for: self.known.as_ref().map(|(_, since)| since.elapsed()).unwrap_or_default(),
            measure_asked: self.measure_asked.is_some()
                && self.measure_asked.as_ref() == self.known.as_ref().map(|(uid, _)| uid),
            pods,
            target: self.target.as_ref().map(Target::view),
            source: self.source.as_ref().map(|source| source.view(&self.context.underlay)),
            peer_ended: self.peer_seen.as_ref().and_then(|(_, _, ended)| ended.clone()),
        }
    }

    /// Tells what the migration will take, again and again until it has begun; then that stands. What was measured too late for
    /// that counts during the first pass, while nothing of how it goes is known yet.
    fn predict(&mut self, view: &VmiView, pods: &BTreeMap<String, PodView>) {
        let (Some(source), Some(m)) = (&mut self.source, &view.migration) else { return };
        let Some(state) = pods.get(&m.source_pod).and_then(|pod| pod.launcher.last()) else { return };
        let begun = facts::migration(state, &m.uid, MigrationRole::Source);
        let open = match begun {
            None => true,
            Some(f) => source.prediction.is_none() && f.iteration <= 1 && !f.is_final(),
        };
        // Nothing of its memory is sent where both ends have it.
        if open && source.link.uid == m.uid && !source.link.now().by_reference {
            source.prediction =
                expect::before(state, m, source.known_rate, source.link.now().transport.zstd, Timestamp::now());
        }
    }

    /// Writes changes in one patch on the revision in hand.
    async fn write(&mut self, vmi: &VirtualMachineInstance, changes: &[decide::Change]) -> Result<bool, Stop> {
        if changes.iter().any(|c| matches!(c, decide::Change::Report { .. })) {
            self.learn_migratability(vmi).await;
        }
        let mut launchers: BTreeMap<String, State> = BTreeMap::new();
        let mut addresses = BTreeMap::new();
        for (name, pod) in &self.pods {
            match pod.follower.now() {
                Launcher::Answers(state) | Launcher::Gone(state) => {
                    launchers.insert(name.clone(), *state);
                }
                Launcher::Waiting => {}
            }
            addresses.insert(name.clone(), pod.pod.addresses.clone());
        }
        let target = self.target.as_ref().map(Target::view);
        let sources = write::Sources {
            node: &self.context.node,
            now: Timestamp::now(),
            launchers: &launchers,
            addresses: &addresses,
            target: target.as_ref(),
            link_rate: self.source.as_ref().and_then(Source::rate),
            migratable: &self.migratable.1,
        };
        let Some(patch) = write::patch(vmi, changes, &sources) else { return Ok(false) };
        let began = Instant::now();
        let api = self.api();
        let (params, merge) = (PatchParams::default(), Patch::Merge(&patch));
        let Ok(answer) = tokio::time::timeout(API_LIMIT, api.patch(&self.name, &params, &merge)).await else {
            return Err(Stop::Failed(format!(
                "cannot write the VMI's status: the API does not answer within {API_LIMIT:?}"
            )));
        };
        match answer {
            Ok(written) => {
                tracing::debug!(vmi = self.name, ms = began.elapsed().as_millis() as u64, %patch, "written");
                self.vmi = Some(Arc::new(written));
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => Err(Stop::Stale),
            Err(error) => Err(Stop::Failed(format!("cannot write the VMI's status: {error}"))),
        }
    }
}

impl Target {
    fn view(&self) -> TargetView {
        let ports = self.channels.ports.iter().map(|(port, inner)| (port.to_string(), *inner)).collect();
        TargetView {
            uid: self.uid.clone(),
            address: self.channels.address.to_string(),
            over_own_network: self.over_own_network,
            ports,
        }
    }
}

impl Source {
    fn view(&self, underlay: &Underlay) -> SourceView {
        let state = self.link.now();
        SourceView {
            uid: self.link.uid.clone(),
            ready: state.ready,
            post_copy_offered: state.post_copy_offered,
            single: state.single,
            plain: state.plain,
            error: state.error,
            age: self.first_dialled.elapsed(),
            start_error: self.start_error.clone(),
            cancelled: self.cancelled.clone(),
            post_copy: self.post_copy.view(),
            pause: self.pause.view(),
            still: self.meter.moved.1.elapsed(),
            stuck: self.meter.low.1.elapsed(),
            reported: self.reported.map(|at| at.elapsed()),
            go: state.go,
            unreached: state.unreached.map(|since| since.elapsed()),
            own_network: state.unreached.is_some() && underlay.is_there(),
            target: state.target,
            link_rate: self.rate(),
            prediction: self.prediction.clone(),
        }
    }

    /// What the link to its node took, if that can be told.
    fn link_rate(&self) -> Option<u64> {
        self.link.carried.link_rate(u64::from(self.link.now().transport.channels))
    }

    /// The same, or what it took the last time.
    fn rate(&self) -> Option<u64> {
        self.link_rate().or(self.known_rate)
    }

    fn remove_sockets(&self) {
        for (_, dir, name) in &self.sockets {
            dir.remove(name);
        }
    }

    /// The name of the socket for inner port `inner`.
    fn socket(&self, inner: i32) -> Option<String> {
        self.sockets.iter().find(|(i, _, _)| *i == inner).map(|(_, _, name)| name.clone())
    }
}

/// Whether the listening half carried anything, for the log.
impl Drop for Target {
    fn drop(&mut self) {
        tracing::info!(
            migration = %self.uid,
            bytes = self.channels.carried.total(),
            refused = self.channels.refused.count(),
            "target's channels closed"
        );
    }
}
