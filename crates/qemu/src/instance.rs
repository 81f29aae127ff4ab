//! A QEMU and what may be asked of it, by the state it is in.
//!
//! The states are types, so that what must never happen cannot be written down:
//!
//! ```text
//! Prelaunch ──start──▶ Running ──migrate──▶ Outgoing ──settle──▶ Departed   only `quit` is left
//!                         ▲                     └─────settle──▶ Running     failed or cancelled: it never left
//! Incoming ──────go───────┘
//! ```
//!
//! `cont` is sent by three functions only: [`Prelaunch::start`], [`Incoming::go`] and [`Running::unpause`]. A [`Departed`] QEMU
//! (postmigrate) has none of them, since its guest may run elsewhere.

use crate::accelerator::Accelerator;
use crate::blocks::{self, Blocks, Mirrors};
use crate::machine::{self, Machine};
use crate::migration::{self, DowntimeRamp, Facts, Options, Tracker};
use crate::process::{Ended, Process};
use crate::qmp::commands::{self, CapabilityState, MigrationStatus, RunState, VersionTriple};
use crate::qmp::{self, Event, Events, Qmp};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long QEMU may take from its start to its monitor's answer.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long QEMU may take to reach the run state that follows from what it has announced.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// How long a guest is held at most while QEMU begins to send it.
const TRACKING_LIMIT: Duration = Duration::from_secs(1);
/// Bytes a second while it is held: a page or so in QEMU's slice of 100 ms.
const HELD_BANDWIDTH: u64 = 4096;
/// How long a target may take to say that it has loaded what the source knows it has.
const LOAD_LIMIT: Duration = Duration::from_secs(2);
/// How long the guest may stand still for the last blocks of its disks; then it runs on at the source.
const FINISH_LIMIT: Duration = Duration::from_secs(5);
/// "Unlimited": QEMU knows no such word, so more than any link carries.
const UNLIMITED: u64 = 1 << 40;

/// Why something was not done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The machine cannot be built.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// QEMU's program cannot be started.
    #[error("QEMU ({program}) cannot be started: {message}. `make deps` installs it; $GODWIT_QEMU names another")]
    Program {
        /// The program.
        program: PathBuf,
        /// What the system said.
        message: String,
    },
    /// QEMU ended before it was ready.
    #[error("{0}")]
    Ended(Ended),
    /// QEMU refused or did not answer.
    #[error(transparent)]
    Qmp(#[from] qmp::Error),
    /// QEMU is not in the state that this needs.
    #[error("{wanted}, but QEMU's state is `{state}`")]
    State {
        /// What was wanted.
        wanted: &'static str,
        /// The state.
        state: &'static str,
    },
}

/// What may be done with any QEMU, whatever its state. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Qemu {
    process: Process,
    qmp: Qmp,
    version: VersionTriple,
    machine_type: String,
    capabilities: Vec<String>,
    accelerator: Accelerator,
}

impl Qemu {
    async fn launch(program: &Path, machine: &Machine) -> Result<Qemu, Error> {
        let arguments = machine.arguments(jiff::Timestamp::now().as_second())?;
        tracing::debug!(?program, ?arguments, "starting QEMU");
        let process = Process::spawn(program, &arguments)
            .map_err(|e| Error::Program { program: program.into(), message: e.to_string() })?;
        let connected = tokio::select! {
            connected = Qmp::connect(&machine.monitor, START_LIMIT) => connected,
            ended = process.wait() => return Err(Error::Ended(ended)),
        };
        let qmp = match connected {
            Ok(qmp) => qmp,
            // Mostly it has ended in this moment, and then that is the reason to tell.
            Err(error) => match tokio::time::timeout(Duration::from_millis(500), process.wait()).await {
                Ok(ended) => return Err(Error::Ended(ended)),
                Err(_) => return Err(error.into()),
            },
        };
        let version = qmp.execute(&commands::QueryVersion {}).await?.qemu;
        let known = qmp.execute(&commands::QueryMigrateCapabilities {}).await?;
        let capabilities = known.into_iter().map(|c| c.capability).collect();
        // The versioned name behind an alias such as `q35`; both ends of a migration need the same.
        let get = commands::QomGet { path: "/machine".into(), property: "type".into() };
        let machine_type = qmp.execute(&get).await?;
        let machine_type = machine_type.as_str().unwrap_or(&machine.machine_type);
        let machine_type = machine_type.strip_suffix("-machine").unwrap_or(machine_type).to_string();
        Ok(Qemu { process, qmp, version, machine_type, capabilities, accelerator: machine.accelerator })
    }

    /// QEMU's version.
    pub fn version(&self) -> VersionTriple {
        self.version
    }

    /// The machine type with its version, for example `pc-q35-7.2`.
    pub fn machine_type(&self) -> &str {
        &self.machine_type
    }

    /// Whether pages that the guest writes to are all seen while it is sent, pass after pass
    /// ([`migration::tracks_writes`]).
    pub fn tracks_writes(&self) -> bool {
        migration::tracks_writes(self.accelerator, self.version)
    }

    /// Whether this QEMU knows a migration capability.
    pub fn knows(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|c| c == capability)
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// All its events, from the start on.
    pub fn subscribe(&self) -> Events {
        self.qmp.subscribe()
    }

    /// The last 1024 events.
    pub fn events(&self) -> Vec<Event> {
        self.qmp.events()
    }

    /// Whether the guest runs, or why not.
    pub async fn status(&self) -> Result<RunState, qmp::Error> {
        Ok(self.qmp.execute(&commands::QueryStatus {}).await?.status)
    }

    /// Presses the power button.
    pub async fn power_button(&self) -> Result<(), qmp::Error> {
        self.qmp.execute(&commands::SystemPowerdown {}).await.map(drop)
    }

    /// Ends it in order (disks are flushed), by force if it does not answer, and waits until it was reaped.
    pub async fn quit(&self) -> Ended {
        let asked = self.qmp.execute(&commands::Quit {}).await;
        let patience = match asked {
            Ok(_) | Err(qmp::Error::Closed { .. }) => Duration::from_secs(5),
            Err(_) => Duration::ZERO,
        };
        match tokio::time::timeout(patience, self.process.wait()).await {
            Ok(ended) => ended,
            Err(_) => self.process.kill().await,
        }
    }

    /// Switches on what every migration here needs, the same on both ends.
    async fn set_capabilities(&self, auto_converge: bool, mirrors: bool) -> Result<(), qmp::Error> {
        // Without `return-path` a source may report a success for a guest that the target could not load.
        let wanted = [
            ("events", true),
            ("return-path", true),
            ("auto-converge", auto_converge),
            // The moment to end the mirrors of disks: the guest stands still and the disks are still the source's.
            ("pause-before-switchover", mirrors),
        ];
        let capabilities = wanted.map(|(name, state)| CapabilityState { capability: name.into(), state });
        self.qmp.execute(&commands::MigrateSetCapabilities { capabilities: capabilities.into() }).await.map(drop)
    }
}

/// Built, and stopped before its first instruction.
#[derive(Debug)]
pub struct Prelaunch {
    qemu: Qemu,
}

impl Prelaunch {
    /// Starts QEMU and waits for its monitor.
    pub async fn launch(program: &Path, machine: &Machine) -> Result<Prelaunch, Error> {
        let machine = Machine { incoming: false, ..machine.clone() };
        Ok(Prelaunch { qemu: Qemu::launch(program, &machine).await? })
    }

    /// The QEMU.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// Runs the guest.
    pub async fn start(self) -> Result<Running, Error> {
        self.qemu.qmp.execute(&commands::Cont {}).await?;
        Ok(Running { qemu: self.qemu, paused: false })
    }

    /// Leaves the guest stopped, to be unpaused later.
    pub fn start_paused(self) -> Running {
        Running { qemu: self.qemu, paused: true }
    }
}

/// The guest is here: it runs, or is paused.
#[derive(Debug)]
pub struct Running {
    qemu: Qemu,
    paused: bool,
}

impl Running {
    /// The QEMU.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// Whether it was paused.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Stops the guest's CPUs.
    pub async fn pause(&mut self) -> Result<(), qmp::Error> {
        self.qemu.qmp.execute(&commands::Stop {}).await?;
        self.paused = true;
        Ok(())
    }

    /// Runs the guest's CPUs again.
    pub async fn unpause(&mut self) -> Result<(), qmp::Error> {
        self.qemu.qmp.execute(&commands::Cont {}).await?;
        self.paused = false;
        Ok(())
    }

    /// Begins to send the guest to the unix socket `socket`, after the disks that `blocks` names. On an error nothing was
    /// begun and the guest runs on.
    pub async fn migrate(
        self,
        socket: &Path,
        options: &Options,
        blocks: Option<&Blocks>,
    ) -> Result<Outgoing, (Running, Error)> {
        let blocks = blocks.filter(|b| !b.disks.is_empty());
        if let Err(error) = self.prepare(options, blocks.is_some()).await {
            return Err((self, error.into()));
        }
        let mirrors = match blocks {
            None => None,
            Some(blocks) => match Mirrors::start(&self.qemu.qmp, blocks).await {
                Ok(mirrors) => Some(mirrors),
                Err(error) => return Err((self, error.into())),
            },
        };
        let ramp = self.ramp(options);
        let mut tracker = Tracker::new(self.qemu.qmp.event_count());
        tracker.limit(ramp.limit_ms());
        let mut outgoing = Outgoing {
            bandwidth: cap(options),
            qemu: self.qemu,
            paused: self.paused,
            tracker,
            ramp,
            memory: Memory::Waits { uri: format!("unix:{}", socket.display()) },
            mirrors,
            cancelled: false,
            finish_by: None,
        };
        if outgoing.mirrors.is_some() {
            outgoing.tracker.blocks(0, 0, now_us());
            return Ok(outgoing);
        }
        match outgoing.begin_memory().await {
            Ok(()) => Ok(outgoing),
            Err(error) => Err((Running { qemu: outgoing.qemu, paused: outgoing.paused }, error.into())),
        }
    }

    async fn prepare(&self, options: &Options, mirrors: bool) -> Result<(), qmp::Error> {
        self.qemu.set_capabilities(options.auto_converge, mirrors).await?;
        let parameters = commands::MigrateSetParameters {
            max_bandwidth: Some(cap(options)),
            downtime_limit: Some(self.ramp(options).limit_ms()),
        };
        self.qemu.qmp.execute(&parameters).await.map(drop)
    }

    fn ramp(&self, options: &Options) -> DowntimeRamp {
        if self.qemu.tracks_writes() { DowntimeRamp::new(options.max_downtime_ms) } else { DowntimeRamp::one_pass() }
    }
}

fn cap(options: &Options) -> u64 {
    options.bandwidth.filter(|bandwidth| *bandwidth > 0).unwrap_or(UNLIMITED)
}

fn now_us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}

/// The guest is being sent; until it is settled, nobody knows where it will be.
#[derive(Debug)]
pub struct Outgoing {
    qemu: Qemu,
    paused: bool,
    /// Most bytes a second.
    bandwidth: u64,
    tracker: Tracker,
    ramp: DowntimeRamp,
    memory: Memory,
    mirrors: Option<Mirrors>,
    cancelled: bool,
    /// When the mirrors must have ended, once the guest stands still for that.
    finish_by: Option<tokio::time::Instant>,
}

/// How far the sending of memory is.
#[derive(Debug, PartialEq, Eq)]
enum Memory {
    /// For the disks.
    Waits { uri: String },
    /// QEMU was told to send it.
    Begun,
    /// QEMU was told to go on from `pre-switchover`.
    Continued,
    /// It was given up before it began.
    Never,
}

/// Where the guest is after a migration.
#[derive(Debug)]
pub enum Settled {
    /// The target has all of it. This QEMU is stopped for good.
    Departed(Departed),
    /// It never left; how the try went.
    Stays(Running, Facts),
    /// QEMU ended in the middle, or does not say.
    Unclear(Box<Outgoing>, Error),
}

impl Outgoing {
    /// The QEMU.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// What is known.
    pub fn facts(&self) -> &Facts {
        self.tracker.facts()
    }

    /// Takes an event of QEMU's.
    pub fn event(&mut self, event: &Event) {
        self.tracker.event(event);
        if let Some(mirrors) = &mut self.mirrors {
            mirrors.event(event);
        }
    }

    /// Looks at the numbers, allows a longer standstill if it no longer comes nearer the end, and goes on (see
    /// [`Outgoing::advance`]).
    pub async fn look(&mut self) -> Result<(), qmp::Error> {
        match (&self.memory, &mut self.mirrors) {
            (Memory::Waits { .. }, Some(mirrors)) => {
                let (total, copied) = mirrors.look(&self.qemu.qmp).await?;
                self.tracker.blocks(total, copied, now_us());
                return self.advance().await;
            }
            (Memory::Never, _) => return Ok(()),
            _ => {}
        }
        let info = self.qemu.qmp.execute(&commands::QueryMigrate {}).await?;
        self.tracker.look(&info, now_us());
        let facts = self.tracker.facts();
        let second_pass = facts.passes > 1 && info.status == MigrationStatus::Active;
        if second_pass
            && !(self.paused || self.cancelled || self.qemu.tracks_writes())
            && self.qemu.status().await? == RunState::Running
        {
            // It must not happen (see `DowntimeRamp::one_pass`), and what is at the target must not be used if it does.
            self.cancelled = true;
            self.give_up("this QEMU began a second pass, of which it loses pages; try again".into()).await?;
            return Ok(());
        }
        if facts.status == MigrationStatus::Active
            && let Some(limit) = self.ramp.look(facts.passes, facts.remaining_bytes)
        {
            tracing::debug!(limit, passes = facts.passes, "allowing a longer standstill");
            let parameters = commands::MigrateSetParameters { downtime_limit: Some(limit), max_bandwidth: None };
            self.qemu.qmp.execute(&parameters).await?;
            self.tracker.limit(limit);
        }
        self.advance().await
    }

    async fn begin_memory(&mut self) -> Result<(), qmp::Error> {
        let Memory::Waits { uri } = std::mem::replace(&mut self.memory, Memory::Begun) else { return Ok(()) };
        self.tracker.memory_from(self.qemu.qmp.event_count());
        let hold = !self.qemu.tracks_writes() && !self.paused;
        if hold {
            // So slow that it cannot come to an end while the guest is held.
            self.set_bandwidth(HELD_BANDWIDTH).await?;
            self.qemu.qmp.execute(&commands::Stop {}).await?;
        }
        let begun = match self.qemu.qmp.execute(&commands::Migrate { uri }).await {
            // No answer is no refusal: it may be on its way, so it is followed.
            Ok(_) | Err(qmp::Error::Timeout { .. } | qmp::Error::Unreadable { .. }) => Ok(()),
            Err(error) => {
                self.memory = Memory::Never;
                Err(error)
            }
        };
        if hold {
            if begun.is_ok() {
                self.wait_for_tracking().await;
            }
            self.qemu.qmp.execute(&commands::Cont {}).await?;
            self.set_bandwidth(self.bandwidth).await?;
        }
        begun
    }

    async fn set_bandwidth(&self, bytes_per_second: u64) -> Result<(), qmp::Error> {
        let parameters = commands::MigrateSetParameters { max_bandwidth: Some(bytes_per_second), downtime_limit: None };
        self.qemu.qmp.execute(&parameters).await.map(drop)
    }

    /// Until QEMU has begun to note the pages that the guest writes to; what is written in between would be lost where
    /// [`Qemu::tracks_writes`] says no.
    async fn wait_for_tracking(&self) {
        let end = tokio::time::Instant::now() + TRACKING_LIMIT;
        while tokio::time::Instant::now() < end {
            match self.qemu.qmp.execute(&commands::QueryMigrate {}).await {
                Ok(info) if !matches!(info.status, MigrationStatus::None | MigrationStatus::Setup) => return,
                Ok(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                Err(_) => return,
            }
        }
    }

    /// Does what is due: memory after the disks, the mirrors' end when the guest stands still. To be called after events.
    pub async fn advance(&mut self) -> Result<(), qmp::Error> {
        let Some(mut mirrors) = self.mirrors.take() else { return Ok(()) };
        let kept = self.advance_with(&mut mirrors).await;
        if matches!(kept, Ok(true) | Err(_)) {
            self.mirrors = Some(mirrors);
        }
        kept.map(drop)
    }

    /// Whether the mirrors are still needed.
    async fn advance_with(&mut self, mirrors: &mut Mirrors) -> Result<bool, qmp::Error> {
        let qmp = self.qemu.qmp.clone();
        match self.facts().status {
            MigrationStatus::Completed => return Ok(false),
            MigrationStatus::Failed | MigrationStatus::Cancelled => {
                mirrors.abandon(&qmp).await;
                return Ok(false);
            }
            _ => {}
        }
        match (&self.memory, mirrors.failure()) {
            (Memory::Waits { .. }, failure) if self.cancelled || failure.is_some() => {
                mirrors.abandon(&qmp).await;
                self.memory = Memory::Never;
                let status = if self.cancelled { MigrationStatus::Cancelled } else { MigrationStatus::Failed };
                self.tracker.end(status, failure, now_us());
                return Ok(false);
            }
            (Memory::Waits { .. }, _) => {
                if mirrors.are_ready()
                    && let Err(error) = self.begin_memory().await
                {
                    mirrors.abandon(&qmp).await;
                    self.tracker.end(MigrationStatus::Failed, Some(error.to_string()), now_us());
                    return Ok(false);
                }
            }
            (Memory::Begun, Some(why)) => self.give_up(why).await?,
            (Memory::Begun, None) if self.facts().status == MigrationStatus::PreSwitchover => {
                let now = tokio::time::Instant::now();
                let finish_by = *self.finish_by.get_or_insert(now + FINISH_LIMIT);
                mirrors.finish(&qmp).await?;
                if mirrors.are_done() {
                    self.memory = Memory::Continued;
                    qmp.execute(&commands::MigrateContinue { state: "pre-switchover" }).await?;
                    mirrors.close(&qmp).await;
                } else if now > finish_by {
                    self.give_up("the copies of the disks could not be finished in time".into()).await?;
                }
            }
            _ => {}
        }
        Ok(true)
    }

    async fn give_up(&mut self, why: String) -> Result<(), qmp::Error> {
        self.tracker.fail(why);
        self.qemu.qmp.execute(&commands::MigrateCancel {}).await.map(drop)
    }

    /// Asks QEMU to cancel. It may be too late: only [`Outgoing::settle`] tells.
    pub async fn cancel(&mut self) -> Result<(), qmp::Error> {
        self.cancelled = true;
        match self.memory {
            Memory::Waits { .. } => self.advance().await,
            Memory::Begun | Memory::Continued => self.qemu.qmp.execute(&commands::MigrateCancel {}).await.map(drop),
            Memory::Never => Ok(()),
        }
    }

    /// After QEMU's last word (see [`Facts::is_final`]): where the guest is.
    pub async fn settle(mut self) -> Settled {
        let end = tokio::time::Instant::now() + SETTLE_LIMIT;
        loop {
            if let Err(error) = self.look().await {
                return self.settle_without_answer(error);
            }
            let state = match self.qemu.status().await {
                Ok(state) => state,
                Err(error) => return self.settle_without_answer(error),
            };
            // The answer may have overtaken whoever brings the events; they are all there.
            for event in self.qemu.qmp.events() {
                self.event(&event);
            }
            match (self.facts().status, state) {
                (MigrationStatus::Completed, RunState::Postmigrate) => {
                    return Settled::Departed(Departed { qemu: self.qemu, facts: self.tracker.facts().clone() });
                }
                // QEMU lets the guest run on by itself after it has announced the failure.
                (MigrationStatus::Failed | MigrationStatus::Cancelled, state) if is_here(state, self.paused) => {
                    let facts = self.tracker.facts().clone();
                    return Settled::Stays(Running { qemu: self.qemu, paused: self.paused }, facts);
                }
                (_, state) if tokio::time::Instant::now() > end => {
                    let error = Error::State { wanted: "the guest should have left or run on", state: state.as_str() };
                    self.tracker.fail(error.to_string());
                    return Settled::Unclear(Box::new(self), error);
                }
                _ => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    }

    /// The monitor is gone, so QEMU is. If it had said `completed`, the target has everything and nothing runs here.
    fn settle_without_answer(mut self, error: qmp::Error) -> Settled {
        for event in self.qemu.qmp.events() {
            self.event(&event);
        }
        if self.facts().status == MigrationStatus::Completed && self.qemu.process.ended().is_some() {
            let facts = self.tracker.facts().clone();
            return Settled::Departed(Departed { qemu: self.qemu, facts });
        }
        Settled::Unclear(Box::new(self), error.into())
    }
}

fn is_here(state: RunState, paused: bool) -> bool {
    match state {
        RunState::Running => !paused,
        RunState::Paused | RunState::Prelaunch => paused,
        // Stopped for a reason of its own, which a migration neither made nor mends.
        RunState::IoError
        | RunState::InternalError
        | RunState::GuestPanicked
        | RunState::Shutdown
        | RunState::Suspended => true,
        RunState::Inmigrate | RunState::FinishMigrate | RunState::Postmigrate | RunState::Other => false,
    }
}

/// The guest has left this QEMU for good. There is nothing to do but to end it.
#[derive(Debug)]
pub struct Departed {
    qemu: Qemu,
    facts: Facts,
}

impl Departed {
    /// The QEMU.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// The flight.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }
}

/// A target: built, stopped, receiving. The guest has not run here.
#[derive(Debug)]
pub struct Incoming {
    qemu: Qemu,
    tracker: Tracker,
    offers_blocks: bool,
}

impl Incoming {
    /// Starts QEMU and listens on the unix socket `socket`.
    pub async fn launch(program: &Path, machine: &Machine, socket: &Path) -> Result<Incoming, Error> {
        let machine = Machine { incoming: true, ..machine.clone() };
        let qemu = Qemu::launch(program, &machine).await?;
        qemu.set_capabilities(false, false).await?;
        let tracker = Tracker::arriving();
        // Older ones exit when they cannot load; their last words are the reason then.
        let exit_on_error = (qemu.version >= VersionTriple { major: 9, minor: 1, micro: 0 }).then_some(false);
        let uri = format!("unix:{}", socket.display());
        qemu.qmp.execute(&commands::MigrateIncoming { uri, exit_on_error }).await?;
        Ok(Incoming { qemu, tracker, offers_blocks: false })
    }

    /// Offers disks (numbers in the machine, and names) behind the unix socket `socket`, for the source to copy its own to.
    pub async fn offer_blocks(&mut self, socket: &Path, disks: &[(usize, String)]) -> Result<(), Error> {
        self.offers_blocks = true;
        Ok(blocks::offer(&self.qemu.qmp, socket, disks).await?)
    }

    /// The QEMU.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// What is known.
    pub fn facts(&self) -> &Facts {
        self.tracker.facts()
    }

    /// Takes an event of QEMU's.
    pub fn event(&mut self, event: &Event) {
        self.tracker.event(event);
    }

    /// Looks at the numbers.
    pub async fn look(&mut self) -> Result<(), qmp::Error> {
        let info = self.qemu.qmp.execute(&commands::QueryMigrate {}).await?;
        self.tracker.look(&info, jiff::Timestamp::now().as_microsecond());
        Ok(())
    }

    /// Whether everything is loaded, which is what a go needs.
    pub async fn is_loaded(&mut self) -> Result<bool, qmp::Error> {
        self.look().await?;
        Ok(self.facts().status == MigrationStatus::Completed && self.qemu.status().await? == RunState::Paused)
    }

    /// Runs the guest. Only for the one who knows that the source is stopped for good.
    ///
    /// Refused while not everything is loaded; a load that is under way is given [`LOAD_LIMIT`] to end, since the source can
    /// know of its end a moment before this QEMU says so.
    pub async fn go(mut self) -> Result<Running, GoError> {
        let end = tokio::time::Instant::now() + LOAD_LIMIT;
        loop {
            match self.is_loaded().await {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => return Err(GoError { incoming: self, may_run: false, error: error.into() }),
            }
            let status = self.facts().status;
            let ending = matches!(status, MigrationStatus::Active | MigrationStatus::Completed);
            if !ending || tokio::time::Instant::now() > end {
                let wanted = "the guest's state must be loaded before it can run here";
                let error = Error::State { wanted, state: status.as_str() };
                return Err(GoError { incoming: self, may_run: false, error });
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if self.offers_blocks {
            if let Err(error) = blocks::stop(&self.qemu.qmp).await {
                return Err(GoError { incoming: self, may_run: false, error: error.into() });
            }
            self.offers_blocks = false;
        }
        match self.qemu.qmp.execute(&commands::Cont {}).await {
            Ok(_) => Ok(Running { qemu: self.qemu, paused: false }),
            Err(error) => {
                let may_run = !matches!(error, qmp::Error::Refused { .. });
                Err(GoError { incoming: self, may_run, error: error.into() })
            }
        }
    }

    /// After a go that was not answered: the running guest, if it runs.
    pub async fn running(self) -> Result<Running, Incoming> {
        match self.qemu.status().await {
            Ok(RunState::Running) => Ok(Running { qemu: self.qemu, paused: false }),
            _ => Err(self),
        }
    }
}

/// A go that did not succeed.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct GoError {
    /// The target, as it was.
    pub incoming: Incoming,
    /// The guest may run nevertheless: QEMU got the command and did not answer.
    pub may_run: bool,
    /// Why.
    pub error: Error,
}
