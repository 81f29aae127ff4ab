//! The VM: one task owns it, takes orders one after another, and publishes what is true.

mod disks;
mod end;
mod inside;
mod measure;
mod memory;
mod migration;
mod persistent;
mod reboot;
mod tpm;

use crate::carry::Carrier;
use crate::console::{self, Console};
use crate::fence::{self, Fence};
use crate::persistent::PersistentState;
use crate::plan::{self, Inputs, SERIAL, WritableDisk};
use crate::record::{self, Record};
use crate::rooms;
use crate::rpc::{
    Accelerator, Cause, DisksOrder, DomainPhase, EventRecord, GoOrder, GuestCpu, InterfaceOrder, LendOrder, LinkOrder,
    MACHINE_REVISION, MigrationRef, MigrationRole, Paths, Refusal, RunUntilOrder, ShutdownOrder, SourceOrder, State,
    TargetOrder, TargetReady, Transport, TransportOrder, VmOrder, VolumeFacts, VolumeState,
};
use godwit_api::VirtualMachineInstance;
use godwit_qemu::failure;
use godwit_qemu::instance::{self, Departed, Filling, Incoming, Outgoing, Prelaunch, Qemu, Running, Serving};
use godwit_qemu::machine::Efi;
use godwit_qemu::process::find_qemu;
use godwit_qemu::qmp::commands::RunState;
use godwit_qemu::qmp::{Event, Events};
use godwit_qemu::tpm::Tpm;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

/// Between two looks at a migration's numbers.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Between two looks at what moves slowly.
const IDLE_EVERY: Duration = Duration::from_secs(1);

/// An order and who waits for its answer.
pub struct Request {
    /// What to do.
    pub order: Order,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Result<Answer, Refused>>,
}

/// An order, see [`crate::rpc`].
#[allow(missing_docs)]
pub enum Order {
    Start(Box<VmOrder>),
    Target(Box<TargetOrder>),
    Disks(Box<DisksOrder>),
    Transport(TransportOrder),
    Lend(LendOrder),
    Source(SourceOrder),
    Cancel(MigrationRef),
    PostCopy(MigrationRef),
    PauseToMigrate(MigrationRef),
    Go(GoOrder),
    Recover(LinkOrder),
    Abandon(MigrationRef),
    Shutdown(ShutdownOrder),
    Pause,
    Reboot,
    Reset,
    Unpause,
    Measure,
    Events,
}

/// The answer to an order.
#[allow(missing_docs)]
pub enum Answer {
    State(Box<State>),
    Ready(TargetReady),
    Events(Vec<EventRecord>),
}

/// Why an order was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// For a program.
    pub reason: Refusal,
    /// For a person.
    pub message: String,
    /// What kind of failure of QEMU's it is, where it is one.
    pub cause: Option<Cause>,
}

pub(crate) use memory::meet;
pub(crate) use migration::check_name;

pub(crate) fn refused(reason: Refusal, message: impl Into<String>) -> Refused {
    Refused { reason, message: message.into(), cause: None }
}

impl From<plan::Error> for Refused {
    fn from(error: plan::Error) -> Self {
        let reason = match &error {
            plan::Error::Invalid(_) => Refusal::Invalid,
            plan::Error::Volume(e) if e.is_invalid() => Refusal::Invalid,
            plan::Error::Volume(_) => Refusal::Failed,
        };
        refused(reason, error.to_string())
    }
}

impl From<instance::Error> for Refused {
    fn from(error: instance::Error) -> Self {
        let reason = match &error {
            instance::Error::Machine(_) => Refusal::Invalid,
            instance::Error::State { .. } => Refusal::Conflict,
            instance::Error::Unsupported(_) => Refusal::Unsupported,
            _ => Refusal::Failed,
        };
        // The whole of QEMU's last words is for its log; the telling one is for people.
        let message = match &error {
            instance::Error::Ended(ended) => failure::of_end(ended).text,
            other => other.to_string(),
        };
        Refused { reason, message, cause: Some(error.cause()) }
    }
}

/// Where the QEMU stands. What may be done with it is in its type.
enum Stage {
    Empty,
    Running(Running),
    Outgoing(Outgoing),
    Serving(Serving),
    Incoming(Incoming),
    Filling(Filling),
    Departed(Departed),
    Ended,
}

impl Stage {
    fn qemu(&self) -> Option<&Qemu> {
        match self {
            Stage::Running(r) => Some(r.qemu()),
            Stage::Outgoing(o) => Some(o.qemu()),
            Stage::Serving(s) => Some(s.qemu()),
            Stage::Incoming(i) => Some(i.qemu()),
            Stage::Filling(f) => Some(f.qemu()),
            Stage::Departed(d) => Some(d.qemu()),
            Stage::Empty | Stage::Ended => None,
        }
    }
}

/// An end that was ordered.
struct Ending {
    /// When patience ends.
    deadline: Instant,
    /// When the button is pressed again: a guest that is still booting misses it.
    press: Instant,
    /// Whether QEMU had to be ended by force.
    forced: bool,
}

/// A volume, and the SHA-256 of the image that its disk lies above.
type Digest = (String, String);

/// The VM of one launcher.
pub struct Vm {
    paths: Paths,
    uid: String,
    /// Kills QEMU when its time has passed.
    fence: Fence,
    /// The memory streams that go through this process.
    carrier: Carrier,
    tell: watch::Sender<State>,
    now: State,
    stage: Stage,
    events: Option<Events>,
    console: Option<Console>,
    /// The disks that can change; those that are not shared have to be copied.
    disks: Vec<WritableDisk>,
    /// Digests of the images that disks lie above, by volume, as they become known.
    bases: BTreeMap<String, String>,
    digests: (mpsc::UnboundedSender<Digest>, mpsc::UnboundedReceiver<Digest>),
    /// The images of disks that came while the guest ran, by volume: QEMU opens them through these.
    images: BTreeMap<String, OwnedFd>,
    /// There is a controller for such disks.
    takes_disks: bool,
    ready: Option<TargetReady>,
    /// Where it will be written down that the guest has left.
    record: Option<Record>,
    grace: Duration,
    ending: Option<Ending>,
    rebooting: Option<reboot::Rebooting>,
    /// QEMU's reason for its shutdown, once it announced one.
    shutdown_reason: Option<String>,
    inside: inside::Inside,
    /// Kept for its end: it goes with this.
    tpm: Option<Tpm>,
    /// What of the guest is on a claim.
    persistent: Option<PersistentState>,
    /// Its firmware's files.
    efi: Option<Efi>,
    measuring: measure::Measuring,
    /// When everything was over.
    over: Option<Instant>,
    /// Nobody has to learn the end any more.
    dismissed: bool,
}

/// How a machine is to be built, besides what its VMI says.
#[derive(Clone, Copy)]
struct Building<'a> {
    accelerator: Accelerator,
    /// The source's.
    machine_type: Option<&'a str>,
    /// What stands for the node's own processor.
    host_cpu: Option<&'a GuestCpu>,
    revision: u32,
    /// Whether this is a target.
    arriving: bool,
}

impl Vm {
    /// A launcher's VM before any order; `uid` is the VMI's it was started for.
    ///
    /// If the guest of this place has left with an earlier process, that is told again and nothing is started.
    pub fn new(
        paths: Paths,
        uid: String,
        fence: Fence,
        carrier: Carrier,
    ) -> std::io::Result<(Vm, watch::Receiver<State>)> {
        let mut now = State { vmi_uid: uid.clone(), carries_streams: true, ..State::default() };
        let mut stage = Stage::Empty;
        let mut over = None;
        if let Some(mut facts) = record::read_departed(&paths.ephemeral_disks)? {
            migration::end_unserved(&mut facts);
            now.phase = DomainPhase::MigratedAway;
            now.exit_reason = Some("the guest has migrated to another node".into());
            now.migration = Some(facts);
            stage = Stage::Ended;
            over = Some(Instant::now());
        }
        let (tell, states) = watch::channel(now.clone());
        let vm = Vm {
            paths,
            uid,
            fence,
            carrier,
            tell,
            now,
            stage,
            events: None,
            console: None,
            disks: Vec::new(),
            bases: BTreeMap::new(),
            digests: mpsc::unbounded_channel(),
            images: BTreeMap::new(),
            takes_disks: false,
            ready: None,
            record: None,
            grace: Duration::from_secs(30),
            ending: None,
            rebooting: None,
            shutdown_reason: None,
            inside: inside::Inside::default(),
            tpm: None,
            persistent: None,
            efi: None,
            measuring: measure::Measuring::default(),
            over,
            dismissed: false,
        };
        Ok((vm, states))
    }

    /// Lives until the VM's end has been told. `terminate` gives one item for each wish to end (SIGTERM).
    pub async fn run(mut self, mut orders: mpsc::Receiver<Request>, mut terminate: mpsc::Receiver<()>) -> State {
        loop {
            self.publish();
            if self.may_exit() {
                return self.now;
            }
            let process = self.stage.qemu().map(|q| q.process().clone());
            let ended = async {
                match &process {
                    Some(process) => process.wait().await,
                    None => std::future::pending().await,
                }
            };
            let wake = self.next_look();
            tokio::select! {
                Some(request) = orders.recv() => {
                    let answer = self.obey(request.order).await;
                    if answer.is_err() && matches!(self.stage, Stage::Empty) {
                        self.detach();
                    }
                    self.publish();
                    // Whoever asked may have given up; what was done is in the state.
                    let _ = request.reply.send(answer);
                }
                Some(event) = next_event(&mut self.events) => self.event(event).await,
                ended = ended => self.ended(ended).await,
                Some((volume, digest)) = self.digests.1.recv() => self.base_known(volume, digest),
                said = self.inside.next() => self.said(said),
                measured = self.measuring.next() => self.measured(measured),
                Some(()) = terminate.recv() => self.terminate().await,
                () = tokio::time::sleep_until(wake) => self.look().await,
            }
        }
    }

    fn publish(&mut self) {
        self.carrier.tell(&mut self.now);
        self.tell.send_if_modified(|told| {
            let changed = *told != self.now;
            if changed {
                told.clone_from(&self.now);
            }
            changed
        });
    }

    async fn obey(&mut self, order: Order) -> Result<Answer, Refused> {
        match order {
            Order::Start(order) => self.start(*order).await?,
            Order::Target(order) => return self.prepare_target(*order).await.map(Answer::Ready),
            Order::Disks(order) => self.change_disks(&order).await?,
            Order::Transport(order) => self.receive_by(&order).await?,
            Order::Lend(order) => self.lend(&order).await?,
            Order::Source(order) => self.migrate(order).await?,
            Order::Cancel(order) => self.cancel(&order.migration_uid).await?,
            Order::PostCopy(order) => self.switch_to_post_copy(&order.migration_uid).await?,
            Order::PauseToMigrate(order) => self.pause_to_migrate(&order.migration_uid).await?,
            Order::Go(order) => self.go(&order).await?,
            Order::Recover(order) => self.recover(&order).await?,
            Order::Abandon(order) => self.abandon(&order.migration_uid).await?,
            Order::Shutdown(order) => self.shut_down(Duration::from_secs(order.grace_seconds)).await,
            Order::Pause => self.pause(true).await?,
            Order::Reboot => self.reboot().await?,
            Order::Reset => self.reset().await?,
            Order::Unpause => self.pause(false).await?,
            Order::Measure => self.measure(true),
            Order::Events => return Ok(Answer::Events(self.event_records())),
        }
        self.carrier.tell(&mut self.now);
        Ok(Answer::State(Box::new(self.now.clone())))
    }

    fn check_uid(&self, vmi: &VirtualMachineInstance) -> Result<(), Refused> {
        if vmi.uid() == self.uid {
            return Ok(());
        }
        let message = format!("this launcher is for VMI uid {}, not for {}", self.uid, vmi.uid());
        Err(refused(Refusal::Conflict, message))
    }

    async fn start(&mut self, order: VmOrder) -> Result<(), Refused> {
        self.check_uid(&order.vmi)?;
        match &self.stage {
            Stage::Empty => {}
            Stage::Incoming(_) => {
                return Err(refused(Refusal::Conflict, "this launcher receives the guest from another node"));
            }
            // Started already, here or elsewhere, or ended.
            _ => return Ok(()),
        }
        let VmOrder { vmi, interfaces, volumes, accelerator, host_cpu, machine_revision, shareable_memory, run_until } =
            order;
        self.may_run(run_until)?;
        let revision = machine_revision.min(MACHINE_REVISION);
        let (program, accelerator) = self.program(accelerator).await?;
        self.persistent = persistent::kept(PersistentState::resume(&self.paths, &vmi))?;
        let building =
            Building { accelerator, machine_type: None, host_cpu: host_cpu.as_ref(), revision, arriving: false };
        let mut plan = self.plan(&vmi, &interfaces, &volumes, building).await?;
        plan.machine.shared_memory = memory::shareable(shareable_memory, &plan.machine);
        self.start_tpm(&plan)?;
        let prelaunch = Prelaunch::launch(&program, &plan.machine).await?;
        self.attach(prelaunch.qemu(), accelerator, plan.machine.serial.is_some()).await?;
        // It took its time.
        self.may_run(None)?;
        let running = if vmi.starts_paused() { prelaunch.start_paused() } else { prelaunch.start().await? };
        self.grace = grace(&vmi);
        self.inside.clock_ahead(plan::wall_clock_offset(&vmi));
        self.stage = Stage::Running(running);
        self.learn_bases(&plan.writable);
        self.know_disks(plan.writable, plan.volumes).await;
        self.refresh().await;
        Ok(())
    }

    async fn prepare_target(&mut self, order: TargetOrder) -> Result<TargetReady, Refused> {
        self.check_uid(&order.vmi)?;
        match (&self.stage, &self.ready, &self.now.migration) {
            (Stage::Empty, ..) => {}
            (_, Some(ready), Some(m)) if m.uid == order.migration_uid && m.role == MigrationRole::Target => {
                return Ok(ready.clone());
            }
            _ => return Err(refused(Refusal::Conflict, "this launcher already has a VM")),
        }
        let TargetOrder {
            migration_uid,
            vmi,
            interfaces,
            volumes,
            accelerator,
            machine_type,
            allow_post_copy,
            transport_follows,
            shareable_memory,
            memory_socket,
            disk_sockets,
        } = order;
        let told = vmi.status.accelerator.as_deref().and_then(accelerator_named);
        let (program, accelerator) = self.program(accelerator.or(told)).await?;
        // As the guest was built, wherever that was.
        let revision = vmi.status.machine_revision.unwrap_or(0);
        if revision > MACHINE_REVISION {
            let message = format!(
                "the guest's machine is of revision {revision}, and this launcher builds up to {MACHINE_REVISION}; \
                 move it to a node whose launchers are as new as its own"
            );
            return Err(refused(Refusal::Invalid, message));
        }
        let machine_type = machine_type.as_deref();
        self.persistent = persistent::kept(PersistentState::receive(&self.paths, &vmi, &migration_uid))?;
        self.take_images(&disk_sockets).await?;
        let building = Building { accelerator, machine_type, host_cpu: None, revision, arriving: true };
        let mut plan = self.plan(&vmi, &interfaces, &volumes, building).await?;
        let borrowed = self.borrow_memory(memory_socket.as_deref(), &plan.machine).await;
        let by_reference = borrowed.is_some();
        plan.machine.shared_memory = borrowed.or_else(|| memory::shareable(shareable_memory, &plan.machine));
        let socket = format!("incoming-{}.sock", short(&migration_uid));
        let path = self.paths.sockets.join(&socket);
        let _ = std::fs::remove_file(&path);
        // While QEMU starts.
        self.learn_bases(&plan.writable);
        // See `Outgoing::can_post_copy`.
        let post_copy = allow_post_copy && !plan.writable.iter().any(is_copied_here);
        self.start_tpm(&plan)?;
        let mut incoming = match by_reference {
            true => Incoming::prepare_by_reference(&program, &plan.machine, &path).await?,
            false => Incoming::prepare(&program, &plan.machine, &path, post_copy).await?,
        };
        if !transport_follows {
            incoming.listen(Transport::default()).await?;
        }
        let ready = self.offer(&mut incoming, socket, &plan, &migration_uid).await?;
        let ready = TargetReady { awaits_transport: transport_follows, ..ready };
        self.attach(incoming.qemu(), accelerator, plan.machine.serial.is_some()).await?;
        self.grace = grace(&vmi);
        self.inside.clock_ahead(plan::wall_clock_offset(&vmi));
        self.ready = Some(ready.clone());
        self.stage = Stage::Incoming(incoming);
        self.know_disks(plan.writable, plan.volumes).await;
        self.arriving(migration_uid, by_reference);
        self.refresh().await;
        Ok(ready)
    }

    /// QEMU's program and the accelerator: the ordered one, or what this machine turns out to offer.
    async fn program(&mut self, ordered: Option<Accelerator>) -> Result<(PathBuf, Accelerator), Refused> {
        let Some(program) = find_qemu() else {
            let message = "QEMU is not installed (package qemu-system-x86; `make deps` installs it)";
            return Err(refused(Refusal::Failed, message));
        };
        let (accelerator, reason) = match ordered {
            Some(accelerator) => (accelerator, "as ordered".to_string()),
            None => {
                let probe = godwit_qemu::accelerator::probe(&program).await;
                (probe.accelerator, probe.reason)
            }
        };
        self.now.accelerator_reason = Some(reason);
        Ok((program, accelerator))
    }

    async fn plan(
        &mut self,
        vmi: &VirtualMachineInstance,
        interfaces: &[InterfaceOrder],
        volumes: &BTreeMap<String, VolumeFacts>,
        building: Building<'_>,
    ) -> Result<plan::Plan, Refused> {
        let Building { accelerator, machine_type, host_cpu, revision, arriving } = building;
        let (paths, persistent, images) = (&self.paths, self.persistent.as_ref(), &self.handed_over());
        let inputs = Inputs {
            vmi,
            interfaces,
            volumes,
            images,
            paths,
            accelerator,
            machine_type,
            revision,
            host_cpu,
            arriving,
            persistent,
        };
        let plan = plan::plan(&inputs).await?;
        self.takes_disks = plan.machine.has_scsi();
        self.now.machine_revision = Some(revision);
        self.now.guest_cpu.clone_from(&plan.guest_cpu);
        self.efi = plan.machine.efi.clone();
        // Sockets of a QEMU that could not be started the last time.
        let machine = &plan.machine;
        let sockets = [&machine.serial, &machine.guest_agent, &machine.screen].map(Option::as_ref);
        for stale in sockets.into_iter().flatten().chain([&machine.monitor]) {
            let _ = std::fs::remove_file(stale);
        }
        Ok(plan)
    }

    /// Listens to a QEMU that has not run its guest yet, so that nothing it says is lost.
    async fn attach(&mut self, qemu: &Qemu, accelerator: Accelerator, serial: bool) -> Result<(), Refused> {
        if serial {
            let from = self.paths.sockets.join(SERIAL);
            let console = Console::open(&from, &self.paths.sockets, console::to_stdout).await;
            let failed = |e| refused(Refusal::Failed, format!("the serial console {}: {e}", from.display()));
            self.console = Some(console.map_err(failed)?);
        }
        self.events = Some(qemu.subscribe());
        self.shutdown_reason = None;
        self.now.accelerator = Some(accelerator);
        self.now.qemu_version = Some(qemu.version().to_string());
        self.now.machine_type = Some(qemu.machine_type().to_string());
        self.now.shareable_memory = qemu.shared_memory().is_some();
        self.now.ability = qemu.ability();
        self.now.qemu_pid = Some(qemu.process().pid());
        self.fence.guard(qemu.process().pid());
        Ok(())
    }

    /// Refuses while this node may not run guests.
    fn may_run(&self, run_until: Option<RunUntilOrder>) -> Result<(), Refused> {
        if let Some(order) = run_until {
            self.fence.run_until(order.deadline());
        }
        match self.fence.allows() {
            true => Ok(()),
            false if self.fence.has_struck() => Err(refused(Refusal::Conflict, fence::REASON)),
            false => {
                let message = "the node's lease has not been renewed in time: no guest is run before it is";
                Err(refused(Refusal::Conflict, message))
            }
        }
    }

    /// Begins to read the images that disks lie above, beside everything else: a large one takes seconds.
    fn learn_bases(&self, disks: &[WritableDisk]) {
        for disk in disks {
            let Some(base) = disk.base.clone() else { continue };
            let (volume, tell) = (disk.volume.clone(), self.digests.0.clone());
            tokio::task::spawn_blocking(move || match rooms::digest(&base) {
                // Nobody waits for it any more at the launcher's end.
                Ok(digest) => drop(tell.send((volume, digest))),
                Err(error) => tracing::warn!(%error, volume, "reading the image below; the disk is copied whole"),
            });
        }
    }

    fn base_known(&mut self, volume: String, digest: String) {
        if let Some(state) = self.now.volumes.iter_mut().find(|state| state.name == volume) {
            state.base = Some(digest.clone());
        }
        self.bases.insert(volume, digest);
    }

    /// Keeps what is known of the disks, with the sizes that QEMU says.
    async fn know_disks(&mut self, disks: Vec<WritableDisk>, mut volumes: Vec<VolumeState>) {
        self.disks = disks;
        for volume in &mut volumes {
            volume.base = self.bases.get(&volume.name).cloned();
        }
        self.now.volumes = volumes;
        self.learn_sizes().await;
    }

    /// Forgets a QEMU that could not be started.
    fn detach(&mut self) {
        self.console = None;
        self.events = None;
        self.tpm = None;
        self.fence.release();
        self.discard_state();
        self.now =
            State { vmi_uid: self.uid.clone(), launcher_rss_bytes: self.now.launcher_rss_bytes, ..State::default() };
    }

    async fn pause(&mut self, pause: bool) -> Result<(), Refused> {
        let running = match &mut self.stage {
            Stage::Running(running) => running,
            // QEMU may itself wait for a page of the guest's.
            Stage::Filling(filling) if filling.is_broken() => {
                let message =
                    "the guest cannot be paused or unpaused: it waits for the link to the source of its memory";
                return Err(refused(Refusal::Conflict, message));
            }
            Stage::Filling(filling) => filling.running(),
            other => {
                let what = if matches!(other, Stage::Outgoing(_)) { "it is migrating" } else { "no guest runs here" };
                return Err(refused(Refusal::Conflict, format!("the guest cannot be paused or unpaused: {what}")));
            }
        };
        let done = if pause { running.pause().await } else { running.unpause().await };
        done.map_err(|e| refused(Refusal::Failed, e.to_string()))?;
        if !pause {
            self.inside.stood_still();
            self.keep_state().await;
        }
        self.refresh().await;
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), Refused> {
        let Stage::Running(running) = &self.stage else {
            let what = if matches!(self.stage, Stage::Empty | Stage::Ended) {
                "no guest runs here"
            } else {
                "it is migrating"
            };
            return Err(refused(Refusal::Conflict, format!("the guest cannot be reset: {what}")));
        };
        running.reset().await.map_err(|e| refused(Refusal::Failed, e.to_string()))
    }

    fn event_records(&self) -> Vec<EventRecord> {
        let events = self.stage.qemu().map(Qemu::events).unwrap_or_default();
        events.into_iter().map(|e| EventRecord { at_us: e.at_us, event: e.name, data: e.data }).collect()
    }

    async fn event(&mut self, event: Event) {
        match event.name.as_str() {
            // The first one is why: a QEMU that stays without its guest says another when it is ended.
            "SHUTDOWN" => {
                let reason = event.text("reason").unwrap_or("unknown");
                self.shutdown_reason.get_or_insert_with(|| reason.to_string());
            }
            "VSERPORT_CHANGE" => {
                self.agent_opened(event.data.get("open").and_then(serde_json::Value::as_bool).unwrap_or(false));
            }
            // A guest that runs has not shut down.
            "RESUME" => self.shutdown_reason = None,
            _ => {}
        }
        self.reboot_event(&event).await;
        self.migration_event(&event).await;
        // A guest that stands still for the switchover does not wait for answers that nothing depends on: what follows from them
        // is the end, and is asked for then.
        let turn = matches!(event.name.as_str(), "STOP" | "MIGRATION");
        let switches = turn && matches!(&self.stage, Stage::Outgoing(o) if !o.is_held() && o.facts().stop_us.is_some());
        let changes = matches!(event.name.as_str(), "RESUME" | "SUSPEND" | "WAKEUP" | "BLOCK_IO_ERROR");
        if changes || (turn && !switches) {
            self.refresh().await;
        }
    }

    /// Asks QEMU for its state, and derives the phase from it.
    async fn refresh(&mut self) {
        // In post-copy QEMU may itself wait for a page of the guest's, for ever if the source is gone: it is not asked.
        if let Stage::Filling(filling) = &self.stage {
            let (phase, status) = match filling.is_paused() {
                true => (DomainPhase::Paused, RunState::Paused),
                false => (DomainPhase::Running, RunState::Running),
            };
            self.now.phase = phase;
            self.now.qemu_status = Some(status.as_str().to_string());
            return;
        }
        let Some(qemu) = self.stage.qemu() else { return };
        let Ok(status) = qemu.status().await else { return };
        self.now.qemu_status = Some(status.as_str().to_string());
        self.now.phase = match &self.stage {
            // It is about to start over.
            Stage::Running(running)
                if status == RunState::Shutdown && self.rebooting.is_some() && !running.is_paused() =>
            {
                DomainPhase::Running
            }
            // Nobody starts it over: QEMU may have carried out an order to stay whose answer did not come in time.
            Stage::Running(running) if status == RunState::Shutdown && self.rebooting.is_none() => {
                tracing::warn!("the guest has powered down and its QEMU has stayed; it is ended");
                let qemu = running.qemu().clone();
                tokio::spawn(async move { qemu.quit().await });
                self.now.phase
            }
            Stage::Running(_) if matches!(status, RunState::Running | RunState::Suspended) => DomainPhase::Running,
            Stage::Running(_) => DomainPhase::Paused,
            Stage::Outgoing(outgoing) if outgoing.is_paused() => DomainPhase::Paused,
            // The standstill of the switchover is not a pause, and neither is that of a guest held for its migration.
            Stage::Outgoing(_) => DomainPhase::Running,
            Stage::Serving(_) => DomainPhase::HandedOver,
            Stage::Incoming(_) => DomainPhase::Incoming,
            Stage::Departed(_) => DomainPhase::MigratedAway,
            Stage::Filling(_) | Stage::Empty | Stage::Ended => self.now.phase,
        };
    }

    fn next_look(&self) -> Instant {
        let migrating = matches!(self.stage, Stage::Outgoing(_) | Stage::Serving(_));
        let soon = migrating || self.ending.is_some() || self.rebooting.is_some() || self.inside.is_due();
        let wait = if soon { LOOK_EVERY } else { IDLE_EVERY };
        Instant::now() + wait
    }

    async fn look(&mut self) {
        self.look_at_migration().await;
        self.measure(false);
        self.look_at_ending().await;
        self.look_at_reboot().await;
        self.look_at_tpm();
        self.keep_state().await;
        self.now.launcher_rss_bytes = own_rss();
        self.ask_inside();
    }
}

async fn next_event(events: &mut Option<Events>) -> Option<Event> {
    match events {
        Some(stream) => {
            let event = stream.next().await;
            if event.is_none() {
                *events = None;
            }
            event
        }
        None => std::future::pending().await,
    }
}

/// Whether a target gets the disk's content from the source.
fn is_copied_here(disk: &WritableDisk) -> bool {
    !disk.shared || disk.comes
}

fn accelerator_named(name: &str) -> Option<Accelerator> {
    [Accelerator::Kvm, Accelerator::Tcg].into_iter().find(|a| a.as_str() == name)
}

fn grace(vmi: &VirtualMachineInstance) -> Duration {
    let seconds = vmi.spec.termination_grace_period_seconds.unwrap_or(30);
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// The first letters of a uid, fit for a file's name.
fn short(uid: &str) -> String {
    uid.chars().filter(char::is_ascii_alphanumeric).take(12).collect()
}

/// This process's resident memory (`/proc/self/statm`, second field, in pages).
fn own_rss() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    Some(pages.saturating_mul(u64::try_from(page).ok()?))
}
