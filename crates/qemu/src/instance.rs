//! A QEMU and what may be asked of it, by the state it is in.
//!
//! The states are types, so that what must never happen cannot be written down:
//!
//! ```text
//! Prelaunch ──start──▶ Running ──migrate──▶ Outgoing ──settle──▶ Departed        only `quit` is left
//!                         ▲  ▲                │  └────settle──▶ Running          failed or cancelled: it never left
//!                         │  │                └──hand_over──▶ Serving ──settle──▶ Departed     post-copy ⟲ take_up
//! Incoming ──────go───────┘  └─────────settle─────────┐
//!    └───────────go (post-copy)──▶ Filling ───────────┘
//! ```
//!
//! `cont` is sent by these only: [`Prelaunch::start`], [`Incoming::go`], [`Running::unpause`] and its like of [`Filling`],
//! [`Running::start_over`], and an [`Outgoing`] that has failed or lets a guest go on that it held. A [`Serving`] or [`Departed`] QEMU has no such
//! function, since its guest may run elsewhere.

mod incoming;
mod outgoing;
mod writes;

pub use incoming::{Arrived, Filling, GoError, Incoming};
pub use outgoing::{Departed, Outgoing, Serving, Settled};

use crate::accelerator::Accelerator;
use crate::blocks::Blocks;
use crate::failure::{self, Cause};
use crate::machine::{self, Disk, Efi, Machine};
use crate::memory::GuestMemory;
use crate::migration::{self, Options, Tracker};
use crate::process::{Ended, Process};
use crate::qmp::commands::{self, CapabilityState, MigrationStatus, RunState, VersionTriple};
use crate::qmp::{self, Event, Events, Qmp};
use crate::transport::{Ability, Transport, channels_for};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long QEMU may take from its start to its monitor's answer.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long QEMU may take to say that the link of its post-copy is broken, after it was told so.
const BREAK_LIMIT: Duration = Duration::from_secs(5);
/// How long QEMU may take to stop a guest that has powered off, and to reset it.
const START_OVER_LIMIT: Duration = Duration::from_secs(20);
/// How long QEMU may take to let go of a disk that was taken out.
const UNPLUG_LIMIT: Duration = Duration::from_secs(10);
/// How long QEMU may take to answer `quit`, and how long to end after that.
const QUIT_LIMIT: Duration = Duration::from_secs(5);

/// Why EFI variables could not be written to a file.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// QEMU did not do it.
    #[error(transparent)]
    Qmp(#[from] qmp::Error),
    /// The file.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The chip shows something else at this moment.
    #[error("the flash chip does not show the variables at this moment")]
    NotThere,
}

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
    /// Another link was to be taken up where there is none.
    #[error("there is no link to take up at {}", .0.display())]
    NoLink(PathBuf),
    /// This QEMU, or this migration as it was started, cannot do that.
    #[error("{0}")]
    Unsupported(&'static str),
}

impl Error {
    /// What kind of failure it is, by QEMU's words.
    pub fn cause(&self) -> Cause {
        match self {
            Error::Ended(ended) => failure::of_end(ended).cause,
            other => failure::cause(&other.to_string()),
        }
    }
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
    ability: Ability,
    /// Bytes of the guest's memory.
    memory: u64,
    /// That memory, if others can map it.
    shared_memory: Option<GuestMemory>,
}

impl Qemu {
    async fn launch(program: &Path, machine: &Machine) -> Result<Qemu, Error> {
        let arguments = machine.arguments(jiff::Timestamp::now().as_second())?;
        tracing::debug!(?program, ?arguments, "starting QEMU");
        let keeps = machine.shared_memory.as_ref().map(GuestMemory::descriptor);
        let process = Process::spawn(program, &arguments, keeps)
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
        let capabilities: Vec<String> = known.into_iter().map(|c| c.capability).collect();
        let ability = match capabilities.iter().any(|c| c == MULTIFD) {
            true => Ability {
                channels: channels_for(cores()),
                zstd: knows_zstd(&qmp).await?,
                // Seen: 7.2 does not, 10.0 does.
                counts_compressed: version >= VersionTriple { major: 9, minor: 0, micro: 0 },
                tracks_writes: migration::tracks_writes(machine.accelerator, version),
                ..Ability::default()
            },
            false => Ability::default(),
        };
        // Before 8.0 it is connected at the beginning already, and the target takes whichever connection comes first for the
        // main one.
        let preempt = version >= VersionTriple { major: 8, minor: 0, micro: 0 };
        let ability = Ability { preempt: preempt && capabilities.iter().any(|c| c == PREEMPT), ..ability };
        // The versioned name behind an alias such as `q35`; both ends of a migration need the same.
        let get = commands::QomGet { path: "/machine".into(), property: "type".into() };
        let machine_type = qmp.execute(&get).await?;
        let machine_type = machine_type.as_str().unwrap_or(&machine.machine_type);
        let machine_type = machine_type.strip_suffix("-machine").unwrap_or(machine_type).to_string();
        let accelerator = machine.accelerator;
        let memory = machine.memory_mib.saturating_mul(1 << 20);
        let shared_memory = machine.shared_memory.clone();
        Ok(Qemu { process, qmp, version, machine_type, capabilities, accelerator, ability, memory, shared_memory })
    }

    /// Whether a mirror that runs can be changed.
    fn changes_mirrors(&self) -> bool {
        self.version >= VersionTriple { major: 8, minor: 2, micro: 0 }
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

    /// The guest's memory, if other QEMUs on this machine can map it.
    pub fn shared_memory(&self) -> Option<&GuestMemory> {
        self.shared_memory.as_ref()
    }

    /// How it can carry memory on this machine.
    pub fn ability(&self) -> Ability {
        self.ability
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

    /// How many bytes the guest sees of each of the machine's disks, by the number of the disk.
    pub async fn disk_sizes(&self) -> Result<BTreeMap<usize, u64>, qmp::Error> {
        let nodes = self.qmp.execute(&commands::QueryNamedBlockNodes { flat: true }).await?;
        let number = |name: &str| name.strip_prefix(machine::NODE_PREFIX).and_then(|n| n.parse().ok());
        Ok(nodes.iter().filter_map(|n| Some((number(&n.node_name)?, n.image.virtual_size))).collect())
    }

    /// Writes what the guest has in its flash chip of EFI variables to a file. QEMU itself writes that to the chip's own file only when
    /// a guest that has come from elsewhere begins to run.
    ///
    /// Errors: also where the firmware is about to write to the chip, which then answers with its state.
    pub async fn save_efi_variables(&self, efi: &Efi, file: &Path) -> Result<(), SaveError> {
        let size = |file: &Path| std::fs::metadata(file).map(|file| file.len());
        let (code, variables) = (size(&efi.code)?, size(&efi.variables)?);
        // The first chip ends where the first 4 GiB do, the second one lies below it.
        let val = (1 << 32) - code - variables;
        let filename = file.to_str().ok_or(SaveError::NotThere)?.to_owned();
        self.qmp.execute(&commands::PhysicalMemorySave { val, size: variables, filename }).await?;
        // A firmware volume has this mark after its zeros, its kind and its length (PI specification, volume 3, 3.2.1).
        let mark = std::fs::read(file)?.get(40..44).is_some_and(|mark| mark == b"_FVH");
        if mark { Ok(()) } else { Err(SaveError::NotThere) }
    }

    /// Presses the power button.
    pub async fn power_button(&self) -> Result<(), qmp::Error> {
        self.qmp.execute(&commands::SystemPowerdown {}).await.map(drop)
    }

    /// Ends it in order (disks are flushed), by force if it does not answer, and waits until it was reaped.
    pub async fn quit(&self) -> Ended {
        let asked = tokio::time::timeout(QUIT_LIMIT, self.qmp.execute(&commands::Quit {})).await;
        let patience = match asked {
            Ok(Ok(_) | Err(qmp::Error::Closed { .. })) => QUIT_LIMIT,
            Ok(Err(_)) | Err(_) => Duration::ZERO,
        };
        match tokio::time::timeout(patience, self.process.wait()).await {
            Ok(ended) => ended,
            Err(_) => self.process.kill().await,
        }
    }

    /// Breaks the link of its post-copy, unless that has broken by itself, and waits until QEMU says so. Without its main loop,
    /// which may itself wait for a page of the guest's.
    async fn break_link(&self, tracker: &mut Tracker) -> Result<(), Error> {
        let end = tokio::time::Instant::now() + BREAK_LIMIT;
        let mut told = false;
        loop {
            for event in self.qmp.events() {
                tracker.event(&event);
            }
            let status = tracker.facts().status;
            match status {
                MigrationStatus::PostcopyPaused => return Ok(()),
                // QEMU before 8.2 refuses it while both ends compare what the target has.
                MigrationStatus::PostcopyActive | MigrationStatus::PostcopyRecover if !told => {
                    told = true;
                    match self.qmp.execute_now(&commands::MigratePause {}).await {
                        // It may have broken by itself in this moment.
                        Ok(_) | Err(qmp::Error::Refused { .. }) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                status if !status.is_post_copy() || tokio::time::Instant::now() > end => {
                    let wanted = "the link of a post-copy must be broken before another one can be taken";
                    return Err(Error::State { wanted, state: status.as_str() });
                }
                _ => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    }

    /// Target: listens on the unix socket `socket` for another link of a post-copy.
    async fn take_up(&self, tracker: &mut Tracker, socket: &Path) -> Result<(), Error> {
        self.break_link(tracker).await?;
        let uri = format!("unix:{}", socket.display());
        self.qmp.execute_now(&commands::MigrateRecover { uri }).await?;
        Ok(())
    }

    /// Switches on what every migration here needs, the same on both ends.
    async fn set_capabilities(&self, wanted: Capabilities) -> Result<(), qmp::Error> {
        // Without `return-path` a source may report a success for a guest that the target could not load.
        let mut on = vec![
            ("events", true),
            ("return-path", true),
            ("auto-converge", wanted.auto_converge),
            ("postcopy-ram", wanted.post_copy),
            // The moment to end the mirrors of disks: the guest stands still and the disks are still the source's.
            ("pause-before-switchover", wanted.mirrors),
        ];
        let Transport { channels, zstd, preempt } = wanted.transport;
        if self.knows(PREEMPT) {
            on.push((PREEMPT, preempt && wanted.post_copy));
        }
        if wanted.by_reference || self.knows(IGNORE_SHARED) {
            on.push((IGNORE_SHARED, wanted.by_reference));
        }
        if channels > 0 || self.knows(MULTIFD) {
            on.push((MULTIFD, channels > 0));
        }
        let capabilities = on.into_iter().map(|(name, state)| CapabilityState { capability: name.into(), state });
        self.qmp.execute(&commands::MigrateSetCapabilities { capabilities: capabilities.collect() }).await?;
        if channels > 0 {
            let parameters = commands::MigrateSetParameters {
                multifd_channels: Some(channels),
                multifd_compression: Some(if zstd { ZSTD } else { UNCOMPRESSED }),
                ..Default::default()
            };
            self.qmp.execute(&parameters).await?;
        }
        Ok(())
    }
}

/// What is switched on beside what every migration needs.
#[derive(Clone, Copy, Debug, Default)]
struct Capabilities {
    auto_converge: bool,
    mirrors: bool,
    post_copy: bool,
    /// Both ends map the same memory, so that it is not sent.
    by_reference: bool,
    transport: Transport,
}

/// QEMU's name for leaving memory that is shared where it is. A target that has it on refuses pages of such memory.
const IGNORE_SHARED: &str = "x-ignore-shared";
/// QEMU's name for several connections.
const MULTIFD: &str = "multifd";
/// QEMU's name for a connection of their own for pages that are waited for.
const PREEMPT: &str = "postcopy-preempt";
/// QEMU's names of compressions.
const ZSTD: &str = "zstd";
const UNCOMPRESSED: &str = "none";

/// The cores that this process, and a QEMU that it starts, may use.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A QEMU that was built without it refuses the word.
async fn knows_zstd(qmp: &Qmp) -> Result<bool, qmp::Error> {
    let set = |name| commands::MigrateSetParameters { multifd_compression: Some(name), ..Default::default() };
    match qmp.execute(&set(ZSTD)).await {
        Ok(_) => qmp.execute(&set(UNCOMPRESSED)).await.map(|_| true),
        Err(qmp::Error::Refused { .. }) => Ok(false),
        Err(error) => Err(error),
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

    /// Presses the machine's reset button: the guest starts over without being asked.
    pub async fn reset(&self) -> Result<(), qmp::Error> {
        self.qemu.qmp.execute(&commands::SystemReset {}).await.map(drop)
    }

    /// Whether this QEMU stays when the guest powers off, so that it can [start over](Running::start_over), or ends with it.
    pub async fn outlive_power_off(&self, stay: bool) -> Result<(), qmp::Error> {
        let shutdown = if stay { "pause" } else { "poweroff" };
        self.qemu.qmp.execute(&commands::SetAction { shutdown }).await.map(drop)
    }

    /// Boots a guest that has powered off in a QEMU that [stays](Running::outlive_power_off), unless its user has paused it
    /// meanwhile; from here on QEMU ends with the guest again. May be repeated after an error.
    pub async fn start_over(&mut self) -> Result<(), Error> {
        // QEMU announces the power-off a moment before it stops the guest.
        self.leaves(&[RunState::Running], "a guest that has powered off is to be stopped").await?;
        self.outlive_power_off(false).await?;
        self.reset().await?;
        // The reset comes after its answer.
        self.leaves(&[RunState::Shutdown, RunState::Paused], "a guest that has powered off is to be reset").await?;
        if !self.paused {
            self.qemu.qmp.execute(&commands::Cont {}).await?;
        }
        Ok(())
    }

    /// Waits until QEMU is in none of these states.
    async fn leaves(&self, states: &[RunState], wanted: &'static str) -> Result<(), Error> {
        let end = tokio::time::Instant::now() + START_OVER_LIMIT;
        loop {
            let state = self.qemu.status().await?;
            if !states.contains(&state) {
                return Ok(());
            }
            if tokio::time::Instant::now() > end {
                return Err(Error::State { wanted, state: state.as_str() });
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Gives the guest a disk, at its [`Disk::place`].
    pub async fn plug(&mut self, disk: &Disk) -> Result<(), Error> {
        let Some(place) = disk.place else { return Err(Error::Unsupported("this disk is there from the start")) };
        let (node, device) = disk.plugging(place)?;
        let qmp = &self.qemu.qmp;
        qmp.execute(&commands::BlockdevAdd(node)).await?;
        if let Err(error) = qmp.execute(&commands::DeviceAdd(device)).await {
            let node_name = machine::node_name(machine::plugged_number(place));
            if let Err(error) = qmp.execute(&commands::BlockdevDel { node_name }).await {
                tracing::warn!(%error, "a disk that could not be plugged in stays open");
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes the disk at this place away from the guest, and returns when nothing of QEMU's uses its file any more.
    pub async fn unplug(&mut self, place: u32) -> Result<(), Error> {
        let qmp = &self.qemu.qmp;
        let taken = qmp.execute(&commands::DeviceDel { id: machine::plugged_id(place) }).await;
        let node_name = machine::node_name(machine::plugged_number(place));
        let end = tokio::time::Instant::now() + UNPLUG_LIMIT;
        // The device is let go of a moment after the answer.
        loop {
            match (qmp.execute(&commands::BlockdevDel { node_name: node_name.clone() }).await, &taken) {
                (Ok(_), _) => return Ok(()),
                // It was taken out before.
                (Err(qmp::Error::Refused { .. }), Err(error)) => return Err(error.clone().into()),
                (Err(qmp::Error::Refused { .. }), Ok(_)) if tokio::time::Instant::now() < end => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                (Err(error), _) => return Err(error.into()),
            }
        }
    }

    /// Begins to send the guest to the unix socket `socket`, after the disks that `blocks` names. On an error nothing was
    /// begun and the guest runs on.
    pub async fn migrate(
        self,
        socket: &Path,
        options: &Options,
        blocks: Option<&Blocks>,
    ) -> Result<Outgoing, (Running, Error)> {
        Outgoing::begin(self, socket, options, blocks).await
    }
}

fn now_us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}
