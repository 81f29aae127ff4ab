//! Carrying out what was decided about one VMI.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_api::FailureCause;
use godwit_api::migratability::{self, ClaimAccess};
use godwit_api::names::events;
use godwit_api::vmi::{PersistentVolumeClaimInfo, VirtualMachineInstance, VolumeStatus};
use godwit_launcher::client::Error as LauncherError;
use godwit_launcher::rpc::transport::{Transport, Wish};
use godwit_launcher::rpc::{
    CarryOrder, DomainPhase, MigrationRole, Refusal, RunUntilOrder, SourceOrder, TargetOrder, TargetReady, VmOrder,
    VolumeFacts,
};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod as KubePod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use kube::api::Api;
use tokio::sync::OnceCell;

use super::{Meter, Order, Pod, Source, Stop, Target, Worker, limited};
use crate::channel::{BLOCKS, CONTROL, MEMORY, TargetChannels, TargetControl, TargetOptions};
use crate::decide::{Action, Change, Disruption, Failure, causes};
use crate::facts::{self, Facts, MigrationView};
use crate::fence::Fence;
use crate::frames::Relay;
use crate::lend::{self, Offered};
use crate::migration_network::Underlay;
use crate::networks;
use crate::ownership::{self, Peer};
use crate::recovery::Recoveries;
use crate::sockets::SocketDir;
use crate::source_link::{Endpoint, Local, SourceLink};
use crate::target_link::TargetAnswers;
use crate::tls::Identity;
use crate::worker::disks::sockets_of;
use crate::write::Migratable;

/// The machine revision that guests are started with. 1 exists (free-page hints) and migrates, but was measured to hold an idle
/// guest up for a second (docs/benchmarks.md); 2 has a place for disks that come while the guest runs; 3 has a screen; 4 has a
/// processor that other nodes can build.
const NEW_GUESTS: u32 = 4;

/// How long what is known of claims stays good.
const CLAIMS_GOOD_FOR: Duration = Duration::from_secs(30);

/// Where the target of `m` listens, if that is published whole.
pub(super) fn endpoint(m: &MigrationView, underlay: &Underlay) -> Option<Endpoint> {
    Some(Endpoint {
        migration_uid: m.uid.clone(),
        node: m.target_node.clone(),
        address: m.target_address.as_deref()?.parse().ok()?,
        from: m.over_own_network.then(|| underlay.clone()),
        control: m.port(CONTROL)?,
        streams: [MEMORY, BLOCKS].into_iter().filter_map(|inner| Some((inner, m.port(inner)?))).collect(),
        plain: m.disable_tls && underlay.may_be_plain(m.over_own_network),
    })
}

/// How long a pod's storage may take to be given to it before that is told.
const STORAGE_ANSWERS: Duration = Duration::from_secs(10);

/// The pod of a launcher, through the process that listens there.
async fn seen(folder: PathBuf) -> io::Result<ownership::Pod> {
    let sockets = SocketDir::open(folder)?;
    let peer = Peer::of(&sockets.connect("launcher.sock").await?)?;
    ownership::Pod::of(peer, &sockets)
}

impl Worker {
    pub(super) async fn act(
        &mut self,
        vmi: &Arc<VirtualMachineInstance>,
        facts: &Facts,
        action: Action,
    ) -> Result<(), Stop> {
        let m = facts.vmi.migration.as_ref();
        match action {
            Action::Wire { pod } => self.wire(vmi, &pod).await,
            Action::Start { pod } => self.start_vm(vmi, &pod).await,
            Action::ChangeDisks { pod, missing } => self.change_disks(vmi, &pod, &missing).await,
            Action::PrepareTarget { pod, uid } => self.prepare_target(vmi, &pod, &uid, m).await,
            Action::OpenControl { pod, uid } => self.open_channels(vmi, &pod, &uid, m, None).await,
            Action::CloseTarget => {
                self.target = None;
                Ok(())
            }
            Action::Abandon { pod, uid } => {
                tracing::info!(vmi = self.name, migration = uid, pod, "target abandoned: the guest stays elsewhere");
                let result = self.pod(&pod)?.follower.client.abandon(&uid).await;
                result.map(drop).map_err(|e| failed("abandon the target", &e))
            }
            Action::Dial { pod, memory } => self.dial(vmi, &pod, memory, m).await,
            Action::Measure { pod } => self.measure(&pod, m),
            Action::Migrate { pod } => self.migrate(vmi, &pod, m).await,
            Action::Limit { pod } => self.limit(&pod, m).await,
            Action::Cancel { pod, uid, why } => self.cancel(&pod, &uid, why).await,
            Action::Disrupt { pod, uid, how } => self.disrupt(&pod, &uid, how).await,
            Action::CloseSource => {
                if let Some(source) = self.source.take() {
                    if let Some(rate) = source.link_rate() {
                        tracing::info!(
                            vmi = self.name,
                            node = source.node,
                            rate,
                            "what the link took, in bytes a second"
                        );
                        self.context.links.seen(&source.node, source.over_own_network, rate);
                    }
                    source.remove_sockets();
                    self.let_go(&source.link.uid, m, facts).await;
                }
                Ok(())
            }
            Action::Shutdown { pod, grace_seconds } => {
                tracing::info!(vmi = self.name, pod, grace_seconds, "ordering the guest's end");
                let result = self.pod(&pod)?.follower.client.shutdown(Duration::from_secs(grace_seconds)).await;
                result.map_err(|e| failed("shut the guest down", &e))?;
                self.pod(&pod)?.shutdown_ordered = Some(grace_seconds);
                Ok(())
            }
            Action::RebootTold { pod, asked_us } => {
                self.pod(&pod)?.reboot_told = Some(asked_us);
                Ok(())
            }
            Action::Write(changes) => {
                let current = self.vmi.clone().unwrap_or_else(|| vmi.clone());
                let written = self.write(&current, &changes).await?;
                if let Some(source) = &mut self.source
                    && changes.iter().any(|c| matches!(c, Change::Progress { .. }))
                {
                    source.reported = Some(Instant::now());
                }
                if written {
                    // Our own write may be all that there was to wait for.
                    self.wake.notify_one();
                }
                Ok(())
            }
            Action::Event { warning, reason, message } => {
                self.context.events.record(vmi, warning, reason, message);
                Ok(())
            }
        }
    }

    pub(super) fn pod(&mut self, name: &str) -> Result<&mut Pod, Stop> {
        self.pods.get_mut(name).ok_or_else(|| Stop::Failed(format!("pod {name} is gone")))
    }

    /// Says once, as event and condition, what does not work.
    pub(super) async fn complain(&mut self, what: String) -> Stop {
        if self.complaint.as_ref() != Some(&what)
            && let Some(vmi) = self.vmi.clone()
        {
            self.context.events.record(&vmi, true, "SyncFailed", what.clone());
            // Only the owner's trouble is the VMI's; a target that cannot be prepared leaves the guest as it is.
            if vmi.status.node_name.as_deref() == Some(&self.context.node)
                && let Err(stop) = self.write(&vmi, &[Change::Unsynchronized(what.clone())]).await
            {
                return stop;
            }
            self.complaint = Some(what.clone());
        }
        Stop::Failed(what)
    }

    async fn wire(&mut self, vmi: &VirtualMachineInstance, name: &str) -> Result<(), Stop> {
        let pod = self.pod(name)?;
        if pod.wired.is_some() {
            return Ok(());
        }
        let began = Instant::now();
        let phase = pod.follower.now().last().map(|state| state.phase);
        let awaited = pod.pod.migration_uid.is_some()
            && matches!(phase, None | Some(DomainPhase::Undefined | DomainPhase::Incoming));
        let folder = pod.follower.folder.clone();
        let seen = match seen(folder).await {
            Ok(seen) => Arc::new(seen),
            Err(error) => return Err(self.complain(format!("cannot look into pod {name}: {error}")).await),
        };
        // A guest that is there has opened what it needs.
        if matches!(phase, None | Some(DomainPhase::Undefined | DomainPhase::Incoming)) {
            self.give(vmi, name, &seen, awaited).await?;
        }
        match networks::wire(seen.network(), seen.peer().user.as_raw(), vmi, awaited).await {
            Ok(wired) => {
                self.pod(name)?.wired = Some(wired);
                let ms = began.elapsed().as_millis() as u64;
                tracing::info!(vmi = self.name, pod = name, ms, "networks are wired");
                Ok(())
            }
            Err(error) => Err(self.complain(format!("cannot set up the networks of pod {name}: {error}")).await),
        }
    }

    /// Gives a launcher what its guest is made of, where it is not root. Storage that hangs is waited for once, whoever asks how often.
    async fn give(
        &mut self,
        vmi: &VirtualMachineInstance,
        name: &str,
        seen: &Arc<ownership::Pod>,
        awaited: bool,
    ) -> Result<(), Stop> {
        let pod = self.pod(name)?;
        let giving = pod.giving.get_or_insert_with(|| {
            let (seen, vmi) = (seen.clone(), vmi.clone());
            tokio::task::spawn_blocking(move || seen.give(&vmi, awaited))
        });
        let trouble = match tokio::time::timeout(STORAGE_ANSWERS, &mut *giving).await {
            Ok(Ok(())) => {
                pod.giving = None;
                return Ok(());
            }
            Ok(Err(error)) => {
                pod.giving = None;
                format!("cannot give pod {name} what it must open: {error}")
            }
            Err(_) => format!(
                "pod {name} is not given what it must open: its storage does not answer within {} s; look at the servers of its claims",
                STORAGE_ANSWERS.as_secs()
            ),
        };
        Err(self.complain(trouble).await)
    }

    /// Until when guests may run on this node; nothing is begun while none may.
    async fn leased(&mut self, what: &str) -> Result<RunUntilOrder, Stop> {
        match self.context.fence.wait_held().await {
            Some(until) => Ok(until),
            None => {
                let why =
                    format!("cannot {what}: this node's handler does not hold its lease, so no guest may run here");
                Err(self.complain(why).await)
            }
        }
    }

    async fn start_vm(&mut self, vmi: &VirtualMachineInstance, name: &str) -> Result<(), Stop> {
        let began = Instant::now();
        self.leased("start the VM").await?;
        let mut ordered = vmi.clone();
        let volumes = self.volumes(&mut ordered).await?;
        // A guest keeps its processor for good: the moment after the handler's start is waited for.
        let host_cpu =
            self.context.host_cpu.clone().wait_for(Option::is_some).await.ok().and_then(|known| known.clone());
        let accelerator = *self.context.accelerator.borrow();
        // What went before may have taken long.
        let until = self.leased("start the VM").await?;
        let guest = format!("{}/{}", self.namespace, self.name);
        let fence = self.context.fence.clone();
        let pod = self.pod(name)?;
        // Before the guest is there: nobody else may get to say so.
        mark(&fence, &pod.follower.folder, &guest).await;
        let interfaces = pod.wired.as_ref().map(|w| w.interfaces.clone()).unwrap_or_default();
        let order = VmOrder {
            vmi: ordered,
            interfaces,
            volumes,
            accelerator,
            host_cpu: host_cpu.flatten(),
            machine_revision: NEW_GUESTS,
            shareable_memory: pod.pod.shareable_memory,
            run_until: Some(until),
        };
        match pod.follower.client.start(&order).await {
            Ok(state) => {
                pod.follower.learn(state);
                self.complaint = None;
                let ms = began.elapsed().as_millis() as u64;
                tracing::info!(vmi = self.name, pod = name, ms, "VM defined and started");
                self.wake.notify_one();
                Ok(())
            }
            Err(error) => Err(self.complain(format!("cannot start the VM: {error}")).await),
        }
    }

    async fn prepare_target(
        &mut self,
        vmi: &VirtualMachineInstance,
        name: &str,
        uid: &str,
        m: Option<&MigrationView>,
    ) -> Result<(), Stop> {
        let began = Instant::now();
        self.leased("prepare the migration target").await?;
        let mut ordered = vmi.clone();
        let volumes = self.volumes(&mut ordered).await?;
        if !vmi.status.migrated_volumes.is_empty() {
            self.check_claims(vmi, name).await?;
        }
        let node_accelerator = *self.context.accelerator.borrow();
        let lent = match m.filter(|m| m.is_local()) {
            Some(m) => self.lend(name, &m.source_pod, uid).await,
            None => None,
        };
        let images = match self.offer_late_disks(vmi, name).await {
            Ok(images) => images,
            Err(error) => return Err(self.complain(format!("cannot prepare the migration target: {error}")).await),
        };
        let guest = format!("{}/{}", self.namespace, self.name);
        let fence = self.context.fence.clone();
        let pod = self.pod(name)?;
        mark(&fence, &pod.follower.folder, &guest).await;
        let order = TargetOrder {
            migration_uid: uid.to_owned(),
            vmi: ordered,
            interfaces: pod.wired.as_ref().map(|w| w.interfaces.clone()).unwrap_or_default(),
            volumes,
            accelerator: vmi.status.accelerator.as_deref().and_then(accelerator).or(node_accelerator),
            machine_type: None,
            allow_post_copy: m.is_some_and(|m| m.allow_post_copy && m.allow_workload_disruption),
            transport_follows: true,
            shareable_memory: pod.pod.shareable_memory,
            memory_socket: lent.as_ref().map(|lent| lent.socket.clone()),
            disk_sockets: sockets_of(&images),
        };
        match pod.follower.client.prepare_target(&order).await {
            Ok(ready) => {
                self.complaint = None;
                let ms = began.elapsed().as_millis() as u64;
                tracing::info!(vmi = self.name, migration = uid, pod = name, ms, "target's QEMU waits");
                self.open_channels(vmi, name, uid, m, Some(ready)).await
            }
            Err(error) => {
                let refusal = error.refusal();
                let stop = self.complain(format!("cannot prepare the migration target: {error}")).await;
                if !matches!(refusal, Some(Refusal::Invalid | Refusal::Failed)) || !matches!(stop, Stop::Failed(_)) {
                    return Err(stop);
                }
                // It will not get better here, and nothing has begun: this end knows the reason and says it. The pod ends
                // when that is written.
                let cause = match (error.cause(), refusal) {
                    (None, Some(Refusal::Invalid)) => FailureCause::TargetRefusedMachine,
                    (cause, _) => causes::of_target(cause),
                };
                let reason = format!("Live migration failed: the target cannot receive the guest: {error}");
                let event = events::migration_failed(uid, &reason);
                self.write(vmi, &[Change::Failed(Failure { cause, reason })]).await?;
                self.context.events.record(vmi, true, "Migrated", event);
                self.wake.notify_one();
                Ok(())
            }
        }
    }

    /// Offers the source's own memory to the target on the same node. Whatever is in the way, it can be copied.
    async fn lend(&mut self, target: &str, source: &str, uid: &str) -> Option<Offered> {
        let source = self.pods.get(source)?;
        if !source.follower.now().state().is_some_and(|state| state.shareable_memory) {
            tracing::info!(vmi = self.name, migration = uid, "the guest's memory is its QEMU's own, and is copied");
            return None;
        }
        let open = |pod: &Pod| SocketDir::open(pod.follower.folder.clone()).map_err(|e| e.to_string());
        let offered = async {
            let memory = lend::borrow(&source.follower.client, &open(source)?, uid).await?;
            let dir = Arc::new(open(self.pods.get(target).ok_or("the target's pod is gone")?)?);
            lend::offer(memory, dir, uid).map_err(|e| e.to_string())
        };
        let offered: Result<Offered, String> = offered.await;
        offered
            .inspect_err(|error| {
                tracing::warn!(
                    vmi = self.name,
                    migration = uid,
                    error,
                    "the guest's memory cannot be handed on; it is copied"
                );
            })
            .ok()
    }

    async fn open_channels(
        &mut self,
        vmi: &VirtualMachineInstance,
        name: &str,
        uid: &str,
        m: Option<&MigrationView>,
        ready: Option<TargetReady>,
    ) -> Result<(), Stop> {
        let Some(m) = m.filter(|m| m.uid == uid) else { return Err(Stop::Stale) };
        let context = self.context.clone();
        let pod = self.pod(name)?;
        let awaits = ready.as_ref().is_some_and(|ready| ready.awaits_transport);
        let ability = ready.as_ref().filter(|_| awaits).map(|ready| ready.ability.within(cores()));
        let recoveries = Arc::new(Recoveries::default());
        let control = TargetAnswers {
            uid: uid.to_owned(),
            client: pod.follower.client.clone(),
            post_copy: ready.as_ref().is_some_and(|ready| ready.post_copy),
            by_reference: ready.as_ref().is_some_and(|ready| ready.by_reference),
            ability: ability.unwrap_or_default(),
            rooms: ready.as_ref().map(|ready| ready.rooms.clone()).unwrap_or_default(),
            carries: pod.follower.now().last().is_some_and(|state| state.carries_streams),
            // A launcher that receives already knows how.
            agreed: OnceCell::new_with((ready.is_some() && !awaits).then(Transport::default)),
            joined: OnceCell::new(),
            launcher: pod.follower.subscribe(),
            pid: pod.follower.pid(),
            fence: context.fence.clone(),
            ports: networks::ports(vmi),
            recoveries: recoveries.clone(),
        };
        let folder = &pod.follower.folder;
        let dir = SocketDir::open(folder.clone())
            .map_err(|e| Stop::Failed(format!("cannot open {}: {e}", folder.display())))?;
        let dir = Arc::new(dir);
        let mut sockets = Vec::new();
        match ready {
            Some(ready) => {
                sockets.push((MEMORY, ready.socket));
                sockets.extend(ready.blocks_socket.map(|socket| (BLOCKS, socket)));
            }
            // Its stream goes through the launcher, or broke with this process's predecessor; in post-copy another link may follow.
            None => sockets.push((MEMORY, String::new())),
        }
        if let Some((_, bad)) = sockets.iter().find(|(_, socket)| !socket.is_empty() && !SocketDir::is_name(socket)) {
            return Err(Stop::Failed(format!("the launcher names {bad:?} as its socket, which is no file name")));
        }
        let streams: Vec<_> = sockets.into_iter().map(|(inner, socket)| (inner, dir.clone(), socket)).collect();
        let identity = Identity::load(&context.tls).map_err(|e| Stop::Failed(e.to_string()))?;
        let control: Arc<dyn TargetControl> = Arc::new(control);
        let open = async |(address, over_own_network): (IpAddr, bool)| {
            let options = TargetOptions {
                migration_uid: uid.to_owned(),
                source_node: m.source_node.clone(),
                plain: m.disable_tls && context.underlay.may_be_plain(over_own_network),
                address,
                streams: streams.clone(),
                control: control.clone(),
                recoveries: recoveries.clone(),
            };
            TargetChannels::open(&identity, options).await
        };
        let mut place = context.underlay.to_listen(m.over_own_network);
        let mut channels = open(place).await;
        // An address that is there need not be usable (one of IPv6 that somebody else has, say).
        if let (Err(error), (address, true)) = (&channels, place) {
            tracing::warn!(%address, %error, "cannot listen there: this migration goes over the node's own network");
            place = context.underlay.to_listen(false);
            channels = open(place).await;
        }
        let channels = channels.map_err(|e| Stop::Failed(e.to_string()))?;
        let (_, over_own_network) = place;
        tracing::info!(
            vmi = self.name,
            migration = uid,
            address = %channels.address,
            over_own_network,
            ports = ?channels.ports,
            "target listens"
        );
        self.target = Some(Target { uid: uid.to_owned(), over_own_network, channels });
        self.wake.notify_one();
        Ok(())
    }

    async fn dial(
        &mut self,
        vmi: &VirtualMachineInstance,
        name: &str,
        memory: bool,
        m: Option<&MigrationView>,
    ) -> Result<(), Stop> {
        let Some(m) = m else { return Err(Stop::Stale) };
        let Some(endpoint) = endpoint(m, &self.context.underlay) else {
            return Err(Stop::Failed("the target's address or ports cannot be read".into()));
        };
        let context = self.context.clone();
        let first_dialled = self.source.as_ref().filter(|s| s.link.uid == m.uid).map(|s| s.first_dialled);
        if let Some(old) = self.source.take() {
            old.remove_sockets();
        }
        let wake = self.wake.clone();
        let wish = Wish {
            post_copy: m.allow_post_copy && m.allow_workload_disruption,
            by_reference: m.is_local(),
            bandwidth: Some(m.bandwidth).filter(|b| *b > 0),
            measured: context.links.to(&m.target_node, m.over_own_network),
        };
        let pod = self.pod(name)?;
        let ability = pod.follower.now().last().map(|state| state.ability.within(cores())).unwrap_or_default();
        let mut listeners = Vec::new();
        let mut sockets = Vec::new();
        if memory {
            let folder = pod.follower.folder.clone();
            let dir =
                SocketDir::open(folder).map_err(|e| Stop::Failed(format!("cannot open the sockets folder: {e}")))?;
            let dir = Arc::new(dir);
            for (inner, _) in &endpoint.streams {
                let file = format!("out-{}-{inner}.sock", m.uid.get(..8).unwrap_or(&m.uid));
                if !SocketDir::is_name(&file) {
                    return Err(Stop::Failed(format!("migration uid {:?} is no uid", m.uid)));
                }
                let listener = dir
                    .listen(&file)
                    .map_err(|e| Stop::Failed(format!("cannot listen on {file} in {}: {e}", dir.path().display())))?;
                listeners.push((*inner, file.clone(), listener));
                sockets.push((*inner, dir.clone(), file));
            }
        }
        let launcher = Local {
            states: pod.follower.subscribe(),
            client: pod.follower.client.clone(),
            dir: SocketDir::open(pod.follower.folder.clone()).ok().map(Arc::new),
        };
        let link = SourceLink::start(context.tls.clone(), endpoint, listeners, launcher, wake, ability, wish);
        // What was begun by another process; otherwise it comes with the order to send.
        let sent = pod.follower.now().last().and_then(|s| facts::migration(s, &m.uid, MigrationRole::Source).cloned());
        let relay = if memory || sent.is_none_or(|f| f.is_final() || facts::has_left(&f)) {
            None
        } else {
            let ends = (link.endpoint(), pod.follower.subscribe());
            Relay::start(&context.tls, ends, pod.follower.pid(), networks::ports(vmi)).await
        };
        self.source = Some(Source {
            link,
            node: m.target_node.clone(),
            over_own_network: m.over_own_network,
            sockets,
            relay,
            first_dialled: first_dialled.unwrap_or_else(Instant::now),
            start_error: None,
            cancelled: None,
            post_copy: Order::default(),
            pause: Order::default(),
            reported: None,
            prediction: None,
            known_rate: context.links.to(&m.target_node, m.over_own_network),
            meter: Meter::new(),
        });
        Ok(())
    }

    /// Nothing comes of the connections that the source's launcher has got, if it has not begun to send.
    async fn let_go(&mut self, uid: &str, m: Option<&MigrationView>, facts: &Facts) {
        let Some(m) = m else { return };
        let Some(pod) = facts.pods.get(&m.source_pod) else { return };
        let carries = pod.launcher.state().is_some_and(|state| {
            state.carries_streams && facts::migration(state, uid, MigrationRole::Source).is_none()
        });
        let Some(pod) = self.pods.get(&m.source_pod).filter(|_| carries) else { return };
        if let Err(error) = pod.follower.client.carry(&CarryOrder::none(uid, 0)).await {
            tracing::debug!(migration = uid, %error, "the launcher keeps the connections that it was given");
        }
    }

    /// Nothing waits for it; a launcher that cannot is not asked again.
    fn measure(&mut self, name: &str, m: Option<&MigrationView>) -> Result<(), Stop> {
        let client = self.pod(name)?.follower.client.clone();
        self.measure_asked = m.map(|m| m.uid.clone());
        tokio::spawn(async move {
            if let Err(error) = client.measure().await {
                tracing::debug!(%error, "asking the launcher to measure its guest");
            }
        });
        Ok(())
    }

    async fn migrate(
        &mut self,
        vmi: &VirtualMachineInstance,
        name: &str,
        m: Option<&MigrationView>,
    ) -> Result<(), Stop> {
        let (Some(m), Some(source)) = (m, &mut self.source) else { return Err(Stop::Stale) };
        let order = source.order(m);
        let began = Instant::now();
        source.meter.restart();
        self.running = Some((m.uid.clone(), began, Duration::ZERO));
        let pod = self.pods.get_mut(name).ok_or_else(|| Stop::Failed(format!("pod {name} is gone")))?;
        if source.relay.is_none() {
            let ends = (source.link.endpoint(), pod.follower.subscribe());
            source.relay = Relay::start(&self.context.tls, ends, pod.follower.pid(), networks::ports(vmi)).await;
        }
        match pod.follower.client.migrate(&order).await {
            Ok(state) => {
                pod.follower.learn(state);
                let ms = began.elapsed().as_millis() as u64;
                tracing::info!(vmi = self.name, migration = m.uid, ms, "outgoing migration started");
                self.wake.notify_one();
                Ok(())
            }
            // It was asked to reboot in this moment, and is sent when it has done so (`decide::source`).
            Err(LauncherError::Refused { reason: Refusal::Conflict, .. })
                if pod.follower.client.state().await.is_ok_and(|state| state.is_rebooting()) =>
            {
                self.wake.notify_one();
                Ok(())
            }
            // Refused for good: the migration fails with these words. Anything else may have begun: look again.
            Err(LauncherError::Refused { message, cause, .. }) => {
                source.start_error = Some(Failure::new(causes::of_target(cause), message));
                self.wake.notify_one();
                Ok(())
            }
            Err(error) => Err(self.complain(format!("cannot start the migration: {error}")).await),
        }
    }

    /// Orders another bandwidth of the migration that runs.
    async fn limit(&mut self, name: &str, m: Option<&MigrationView>) -> Result<(), Stop> {
        let (Some(m), Some(source)) = (m, &self.source) else { return Ok(()) };
        let order = source.order(m);
        if let Some(relay) = &source.relay {
            relay.hasten();
        }
        let pod = self.pods.get_mut(name).ok_or_else(|| Stop::Failed(format!("pod {name} is gone")))?;
        let state = pod.follower.client.migrate(&order).await;
        pod.follower.learn(state.map_err(|e| failed("change the migration's bandwidth", &e))?);
        tracing::info!(vmi = self.name, migration = m.uid, bytes_per_second = m.bandwidth, "bandwidth changed");
        Ok(())
    }

    /// Orders once what makes a migration end; a launcher that cannot is not asked again.
    async fn disrupt(&mut self, name: &str, uid: &str, how: Disruption) -> Result<(), Stop> {
        let client = self.pod(name)?.follower.client.clone();
        if let Some(relay) = self.source.as_ref().and_then(|source| source.relay.as_ref()) {
            relay.hasten();
        }
        let answer = match how {
            Disruption::PostCopy => client.post_copy(uid).await,
            Disruption::Pause => client.pause_to_migrate(uid).await,
        };
        let order = match answer {
            Ok(_) => Order::Given(Instant::now()),
            Err(LauncherError::Refused { message, .. }) => Order::Refused(message),
            Err(error) => return Err(failed("end the migration by force", &error)),
        };
        if let Order::Refused(why) = &order {
            tracing::warn!(vmi = self.name, migration = uid, ?how, why, "the launcher cannot do this");
        } else {
            tracing::info!(vmi = self.name, migration = uid, ?how, "the migration does not end by itself");
        }
        if let Some(source) = &mut self.source {
            if matches!(order, Order::Given(_)) {
                source.meter.restart();
            }
            match how {
                Disruption::PostCopy => source.post_copy = order,
                Disruption::Pause => source.pause = order,
            }
        }
        self.wake.notify_one();
        Ok(())
    }

    async fn cancel(&mut self, name: &str, uid: &str, why: Option<Failure>) -> Result<(), Stop> {
        let reason = why.as_ref().map(|why| why.reason.as_str());
        tracing::info!(vmi = self.name, migration = uid, why = reason, "cancelling the migration");
        if let (Some(source), Some(why)) = (&mut self.source, why) {
            source.cancelled = Some(why);
        }
        match self.pod(name)?.follower.client.cancel(uid).await {
            Ok(_) => Ok(()),
            Err(error) => {
                // Not cancelled: it can be tried again.
                if let Some(source) = &mut self.source {
                    source.cancelled = None;
                }
                Err(failed("cancel the migration", &error))
            }
        }
    }

    /// What the launcher has to know about claims.
    pub(super) async fn volumes(
        &self,
        vmi: &mut VirtualMachineInstance,
    ) -> Result<BTreeMap<String, VolumeFacts>, Stop> {
        let mut volumes = BTreeMap::new();
        let mut found = Vec::new();
        for volume in &vmi.spec.volumes {
            let Some(source) = &volume.persistent_volume_claim else { continue };
            let claim = limited(self.claims().get_opt(&source.claim_name))
                .await
                .map_err(|e| Stop::Failed(format!("cannot read PersistentVolumeClaim {}: {e}", source.claim_name)))?;
            let capacity_bytes = claim.as_ref().and_then(|claim| {
                let bound = claim.status.as_ref().and_then(|s| s.capacity.as_ref()).and_then(|c| c.get("storage"));
                let asked = claim.spec.as_ref().and_then(|s| s.resources.as_ref()).and_then(|r| r.requests.as_ref());
                let quantity = bound.or_else(|| asked.and_then(|r| r.get("storage")))?;
                godwit_api::Quantity(quantity.0.clone()).bytes().ok()
            });
            volumes.insert(volume.name.clone(), VolumeFacts { capacity_bytes });
            // The launcher tells shared claims from local ones by this; the API may not have it yet.
            found.push((volume.name.clone(), claim_info(&source.claim_name, &claim.unwrap_or_default())));
        }
        for (name, info) in found {
            let known = &mut vmi.status.volume_status;
            match known.iter_mut().find(|status| status.name == name) {
                Some(status)
                    if status
                        .persistent_volume_claim_info
                        .as_ref()
                        .is_some_and(|i| i.claim_name == info.claim_name) => {}
                Some(status) => status.persistent_volume_claim_info = Some(info),
                None => known.push(VolumeStatus {
                    name,
                    persistent_volume_claim_info: Some(info),
                    ..VolumeStatus::default()
                }),
            }
        }
        Ok(volumes)
    }

    /// A target pod that was made before the VMI's volumes were changed has the claims that the guest uses now; what is on
    /// them must not be written over.
    async fn check_claims(&mut self, vmi: &VirtualMachineInstance, pod: &str) -> Result<(), Stop> {
        let pods: Api<KubePod> = Api::namespaced(self.context.client.clone(), &self.namespace);
        let found = limited(pods.get(pod)).await.map_err(|e| Stop::Failed(format!("cannot read pod {pod}: {e}")))?;
        let volumes = found.spec.and_then(|spec| spec.volumes).unwrap_or_default();
        let has = |claim: &str| {
            volumes.iter().any(|v| v.persistent_volume_claim.as_ref().is_some_and(|held| held.claim_name == claim))
        };
        let mut wanted =
            vmi.status.migrated_volumes.iter().filter_map(|m| m.destination_pvc_info.as_ref()?.claim_name.as_deref());
        match wanted.find(|claim| !has(claim)) {
            None => Ok(()),
            Some(claim) => {
                Err(Stop::Failed(format!("pod {pod} was made without claim {claim}, to which a volume moves")))
            }
        }
    }

    fn claims(&self) -> Api<PersistentVolumeClaim> {
        Api::namespaced(self.context.client.clone(), &self.namespace)
    }

    /// Looks up, now and then, whether the VM could be migrated.
    pub(super) async fn learn_migratability(&mut self, vmi: &VirtualMachineInstance) {
        let sources = vmi.spec.volumes.iter().filter_map(|volume| volume.persistent_volume_claim.as_ref());
        let names: Vec<String> = sources.map(|source| source.claim_name.clone()).collect();
        let of = (names, vmi.status.migrated_volumes.len());
        if self.migratable_of == of && self.migratable.0.is_some_and(|at| at.elapsed() < CLAIMS_GOOD_FOR) {
            return;
        }
        self.migratable_of = of;
        let mut claims = BTreeMap::new();
        for volume in &vmi.spec.volumes {
            let Some(source) = &volume.persistent_volume_claim else { continue };
            if let Ok(Some(claim)) = limited(self.claims().get_opt(&source.claim_name)).await {
                claims.insert(source.claim_name.clone(), claim_info(&source.claim_name, &claim));
            }
        }
        let claim = |name: &str| {
            claims.get(name).map_or(ClaimAccess::Unknown, |info| ClaimAccess::Modes(info.access_modes.clone()))
        };
        let blockers = migratability::migratability(vmi, CAN_MIRROR, &claim);
        let method = migratability::migration_method(vmi);
        let known = Migratable {
            claims: claims.clone(),
            conditions: migratability::conditions(vmi, &blockers).into(),
            method: Some(method.as_str().to_owned()),
        };
        if let Some(blocker) = blockers.first()
            && known != self.migratable.1
            && wants_migration(vmi)
        {
            let message = events::not_migratable(&blocker.message);
            self.context.events.record(vmi, true, "Migrated", message);
        }
        self.migratable = (Some(Instant::now()), known);
    }
}

impl Source {
    /// The order to send; the same order with another bandwidth changes that.
    fn order(&self, m: &MigrationView) -> SourceOrder {
        let link = self.link.now();
        SourceOrder {
            migration_uid: m.uid.clone(),
            // One that runs has its sockets, and takes what else is in it.
            socket: self.socket(MEMORY).unwrap_or_default(),
            blocks_socket: self.socket(BLOCKS),
            bandwidth_bytes_per_second: Some(m.bandwidth).filter(|b| *b > 0),
            max_downtime_ms: m.max_downtime_ms,
            allow_auto_converge: m.allow_auto_converge,
            // Both ends have to be able to.
            allow_post_copy: m.allow_post_copy && m.allow_workload_disruption && link.post_copy_offered,
            by_reference: link.by_reference,
            transport: link.transport,
            rooms: link.rooms,
        }
    }
}

/// Puts a guest under the node's lease before it is there.
async fn mark(fence: &Fence, folder: &Path, guest: &str) {
    if let Err(error) = fence.mark(folder, guest).await {
        // It is fenced all the same while this process lives, and whoever tells it its time tries again.
        tracing::warn!(%error, guest, folder = %folder.display(), "cannot mark a guest as leased");
    }
}

/// The cores that this handler may use; they encrypt what the launchers' QEMUs send.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Disks that are local to a node can be copied while the guest runs: launchers mirror them over the blocks channel.
const CAN_MIRROR: bool = true;

/// What the API shows of a claim in `volumeStatus`.
fn claim_info(name: &str, claim: &PersistentVolumeClaim) -> PersistentVolumeClaimInfo {
    let amounts = |of: Option<&BTreeMap<String, ApiQuantity>>| {
        of.into_iter().flatten().map(|(key, q)| (key.clone(), godwit_api::Quantity(q.0.clone()))).collect()
    };
    let spec = claim.spec.as_ref();
    PersistentVolumeClaimInfo {
        claim_name: Some(name.to_owned()),
        access_modes: spec.and_then(|s| s.access_modes.clone()).unwrap_or_default(),
        volume_mode: spec.map(|s| s.volume_mode.clone().unwrap_or_else(|| "Filesystem".into())),
        capacity: amounts(claim.status.as_ref().and_then(|s| s.capacity.as_ref())),
        requests: amounts(spec.and_then(|s| s.resources.as_ref()).and_then(|r| r.requests.as_ref())),
    }
}

fn wants_migration(vmi: &VirtualMachineInstance) -> bool {
    serde_json::to_value(&vmi.spec.eviction_strategy).is_ok_and(|s| s == "LiveMigrate")
}

fn accelerator(name: &str) -> Option<godwit_launcher::rpc::Accelerator> {
    serde_json::from_value(serde_json::Value::String(name.to_owned())).ok()
}

fn failed(what: &str, error: &LauncherError) -> Stop {
    Stop::Failed(format!("cannot {what}: {error}"))
}
