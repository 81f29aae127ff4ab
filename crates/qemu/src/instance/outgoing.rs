//! The sending end.

use super::{Capabilities, Error, Qemu, Running, now_us};
use crate::blocks::{Blocks, Mirrors, Writes, left_for_memory};
use crate::forecast::DowntimeRamp;
use crate::migration::{Facts, Mode, Options, Tracker};
use crate::qmp::commands::{self, MigrationStatus, RunState, VersionTriple};
use crate::qmp::{self, Event};
use crate::transport::Transport;
use std::path::Path;
use std::time::Duration;

/// How long QEMU may take to reach the run state that follows from what it has announced.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// How long it is asked without a pause, since the guest stands still: an answer takes a quarter of a millisecond.
const SOON: Duration = Duration::from_millis(5);
/// How long a guest is held at most while QEMU begins to send it; then it is not sent.
const TRACKING_LIMIT: Duration = Duration::from_secs(5);
/// Bytes a second while it is held: a page or so in QEMU's slice of 100 ms.
const HELD_BANDWIDTH: u64 = 4096;
/// How long the guest may stand still for the last blocks of its disks; then it runs on at the source.
const FINISH_LIMIT: Duration = Duration::from_secs(5);
/// "Unlimited": QEMU knows no such word, so more than any link carries.
const UNLIMITED: u64 = 1 << 40;
/// The least cap: QEMU counts in tenths of a second, and less than a byte in each is no cap at all to it.
const LEAST_BANDWIDTH: u64 = 10;

fn cap(bandwidth: Option<u64>) -> u64 {
    bandwidth.filter(|bandwidth| *bandwidth > 0).map_or(UNLIMITED, |bandwidth| bandwidth.max(LEAST_BANDWIDTH))
}

/// The guest is being sent; until it is settled, nobody knows where it will be.
#[derive(Debug)]
pub struct Outgoing {
    qemu: Qemu,
    /// By its user, before this began.
    paused: bool,
    /// By this migration. QEMU does not let a guest run on that it did not stop itself, so [`Outgoing::settle`] does.
    held: bool,
    /// Most bytes a second; none is unlimited.
    bandwidth: Option<u64>,
    /// Both ends were told that it may go over to post-copy.
    post_copy: bool,
    /// The target has the same memory, so it is not sent.
    by_reference: bool,
    /// QEMU was told to go over to post-copy.
    switching: bool,
    tracker: Tracker,
    ramp: DowntimeRamp,
    memory: Memory,
    mirrors: Option<Mirrors>,
    /// The guest's writes to its disks may be made to wait for their copies.
    slows_writes: bool,
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
    pub(super) async fn begin(
        running: Running,
        socket: &Path,
        options: &Options,
        blocks: Option<&Blocks>,
    ) -> Result<Outgoing, (Running, Error)> {
        let blocks = blocks.filter(|b| !b.disks.is_empty());
        let by_reference = options.by_reference;
        if by_reference && running.qemu.shared_memory.is_none() {
            let why = "this guest's memory is its QEMU's own, and cannot be handed on by reference";
            return Err((running, Error::Unsupported(why)));
        }
        // Nothing is sent that could be written to meanwhile.
        let tracks_writes = running.qemu.tracks_writes() || by_reference;
        let ramp = if tracks_writes { DowntimeRamp::new(options.max_downtime_ms) } else { DowntimeRamp::one_pass() };
        if let Err(error) = prepare(&running.qemu, options, &ramp, blocks.is_some()).await {
            return Err((running, error.into()));
        }
        // Where it cannot be changed later it has to be so from the beginning.
        let waits = options.auto_converge && !running.qemu.changes_mirrors();
        let writes = if waits { Writes::Wait } else { Writes::Follow };
        let mirrors = match blocks {
            None => None,
            Some(blocks) => match Mirrors::start(&running.qemu.qmp, blocks, options.bandwidth, writes).await {
                Ok(mirrors) => Some(mirrors),
                Err(error) => return Err((running, error.into())),
            },
        };
        let mut tracker = Tracker::new(running.qemu.qmp.event_count());
        tracker.limit(ramp.limit_ms());
        let mut outgoing = Outgoing {
            qemu: running.qemu,
            paused: running.paused,
            held: false,
            bandwidth: options.bandwidth,
            post_copy: options.post_copy && !by_reference,
            by_reference,
            switching: false,
            tracker,
            ramp,
            memory: Memory::Waits { uri: format!("unix:{}", socket.display()) },
            mirrors,
            slows_writes: options.auto_converge,
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

    /// The QEMU.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// What is known.
    pub fn facts(&self) -> &Facts {
        self.tracker.facts()
    }

    /// Whether its user had paused the guest before.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether the guest stands still because this migration wants it to.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// Most bytes a second; none is unlimited.
    pub fn bandwidth(&self) -> Option<u64> {
        self.bandwidth
    }

    /// Whether it could go over to post-copy now. Never while disks are copied: with `pause-before-switchover` QEMU (7.2 to
    /// 10.0) says `postcopy-active` before it has sent the devices, so nobody could tell that the target has all it needs.
    pub fn can_post_copy(&self) -> bool {
        self.post_copy
            && self.mirrors.is_none()
            && !self.switching
            && !self.cancelled
            && self.memory == Memory::Begun
            && self.facts().status == MigrationStatus::Active
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
            (Memory::Begun, Some(mirrors)) => {
                // The cap is for both together.
                let (total, copied) = mirrors.look(&self.qemu.qmp).await?;
                self.tracker.blocks_beside_memory(total, copied);
                if let (Some(bandwidth), Some(blocks)) = (self.bandwidth, mirrors.measure(now_us())) {
                    self.set_bandwidth(left_for_memory(cap(Some(bandwidth)), blocks)).await?;
                }
            }
            _ => {}
        }
        let info = self.qemu.qmp.execute(&commands::QueryMigrate {}).await?;
        self.tracker.look(&info, now_us());
        let facts = self.tracker.facts();
        let second_pass = facts.passes > 1 && info.status == MigrationStatus::Active;
        if second_pass
            && !(self.stands_still() || self.cancelled || self.by_reference || self.qemu.tracks_writes())
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
            let parameters = commands::MigrateSetParameters { downtime_limit: Some(limit), ..Default::default() };
            self.qemu.qmp.execute(&parameters).await?;
            self.tracker.limit(limit);
        }
        self.advance().await
    }

    async fn begin_memory(&mut self) -> Result<(), qmp::Error> {
        let Memory::Waits { uri } = std::mem::replace(&mut self.memory, Memory::Begun) else { return Ok(()) };
        self.tracker.memory_from(self.qemu.qmp.event_count());
        let hold = !(self.qemu.tracks_writes() || self.by_reference || self.stands_still());
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
            if begun.is_ok() && !self.wait_for_tracking().await {
                // What it writes from now on may never be sent.
                self.cancelled = true;
                let why = format!("QEMU did not begin to send the guest within {TRACKING_LIMIT:?}; try again");
                if let Err(error) = self.give_up(why).await {
                    tracing::warn!(%error, "giving the migration up");
                }
            }
            self.qemu.qmp.execute(&commands::Cont {}).await?;
            self.set_bandwidth(cap(self.bandwidth)).await?;
        }
        begun
    }

    async fn set_bandwidth(&self, bytes_per_second: u64) -> Result<(), qmp::Error> {
        let parameters = commands::MigrateSetParameters { max_bandwidth: Some(bytes_per_second), ..Default::default() };
        self.qemu.qmp.execute(&parameters).await.map(drop)
    }

    /// Allows another bandwidth from now on; none is unlimited.
    pub async fn limit_bandwidth(&mut self, bandwidth: Option<u64>) -> Result<(), qmp::Error> {
        limit_bandwidth(&self.qemu, bandwidth, self.post_copy).await?;
        self.bandwidth = bandwidth;
        Ok(())
    }

    fn stands_still(&self) -> bool {
        self.paused || self.held
    }

    /// Stops the guest, so that no more is written and the copying comes to an end. It runs again at the target, or here if
    /// the migration does not succeed.
    pub async fn hold(&mut self) -> Result<(), Error> {
        if self.facts().is_final() || self.cancelled {
            return Err(self.not_possible("a guest is held only while it is sent"));
        }
        self.stop().await?;
        self.tracker.mode(Mode::Paused);
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), qmp::Error> {
        if !self.stands_still() {
            // Noted first: whatever becomes of the answer, it may have to be let go on.
            self.held = true;
            self.qemu.qmp.execute(&commands::Stop {}).await?;
        }
        Ok(())
    }

    fn not_possible(&self, wanted: &'static str) -> Error {
        Error::State { wanted, state: self.facts().status.as_str() }
    }

    /// Goes over to post-copy: the guest runs at the target before all of its memory is there. Whether and when that has
    /// come about, [`Outgoing::hand_over`] tells.
    ///
    /// The guest is stopped here before QEMU is told, so that nobody but this program can let it run on: a QEMU that stops a
    /// guest by itself also resumes it by itself after a failure, and at that moment the target may have it.
    pub async fn switch_to_post_copy(&mut self) -> Result<(), Error> {
        if self.switching {
            return Ok(());
        }
        if !self.post_copy {
            return Err(Error::Unsupported("post-copy was not allowed when this migration began"));
        }
        if self.mirrors.is_some() {
            return Err(Error::Unsupported("there is no post-copy while disks are copied"));
        }
        if !self.can_post_copy() {
            return Err(self.not_possible("memory must be under way to go over to post-copy"));
        }
        let stood = self.stands_still();
        self.stop().await?;
        self.switching = true;
        match self.qemu.qmp.execute(&commands::MigrateStartPostcopy {}).await {
            // No answer is no refusal.
            Ok(_) | Err(qmp::Error::Timeout { .. } | qmp::Error::Unreadable { .. }) => Ok(()),
            Err(error) => {
                self.switching = false;
                if !stood && !self.facts().is_final() {
                    self.qemu.qmp.execute(&commands::Cont {}).await?;
                    self.held = false;
                }
                Err(error.into())
            }
        }
    }

    /// After [`Outgoing::switch_to_post_copy`]: the serving rest, once the target has all it needs to run the guest.
    ///
    /// QEMU (7.2 to 10.0) holds its big lock from the moment the run state is `finish-migrate` until the devices' state is
    /// sent, and says `failed` if that went wrong. So both answers, in this order, mean that it is sent.
    pub async fn hand_over(mut self) -> Result<Serving, Box<Outgoing>> {
        if !self.switching || self.cancelled {
            return Err(Box::new(self));
        }
        let sent = match self.qemu.status().await {
            Ok(RunState::FinishMigrate) => match self.qemu.qmp.execute(&commands::QueryMigrate {}).await {
                Ok(info) => {
                    self.tracker.look(&info, now_us());
                    info.status.is_post_copy()
                }
                Err(_) => false,
            },
            _ => false,
        };
        if !sent {
            return Err(Box::new(self));
        }
        for event in self.qemu.qmp.events() {
            self.event(&event);
        }
        Ok(Serving { qemu: self.qemu, tracker: self.tracker, bandwidth: self.bandwidth, paused: self.paused, deaf: 0 })
    }

    /// Whether QEMU was told to go over to post-copy.
    pub fn is_switching(&self) -> bool {
        self.switching
    }

    /// Until QEMU has begun to note the pages that the guest writes to; what is written in between would be lost where
    /// [`Qemu::tracks_writes`] says no. False: it has not.
    async fn wait_for_tracking(&self) -> bool {
        let end = tokio::time::Instant::now() + TRACKING_LIMIT;
        while tokio::time::Instant::now() < end {
            match self.qemu.qmp.execute(&commands::QueryMigrate {}).await {
                Ok(info) if !matches!(info.status, MigrationStatus::None | MigrationStatus::Setup) => return true,
                Ok(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                // It is asked again by whoever follows it.
                Err(_) => return true,
            }
        }
        false
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
                // While memory follows what the guest writes must not pile up again: it stands still until that is copied.
                if self.slows_writes && (mirrors.are_ready() || mirrors.are_outrun()) {
                    mirrors.make_writes_wait(&qmp).await?;
                }
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
                    let total = mirrors.total();
                    self.tracker.blocks_beside_memory(total, total);
                    self.memory = Memory::Continued;
                    qmp.execute(&commands::MigrateContinue { state: "pre-switchover" }).await?;
                    mirrors.close(&qmp).await;
                } else if now > finish_by {
                    let (total, copied) = mirrors.look(&qmp).await?;
                    let why = format!(
                        "the guest writes to its disks faster than they are copied beside its memory: after {} s of \
                         standstill {} bytes were left; raise the bandwidth, or allow auto-converge, which has its writes wait",
                        FINISH_LIMIT.as_secs(),
                        total.saturating_sub(copied)
                    );
                    self.give_up(why).await?;
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
            Memory::Begun | Memory::Continued => {
                self.tracker.cancel();
                self.qemu.qmp.execute(&commands::MigrateCancel {}).await.map(drop)
            }
            Memory::Never => Ok(()),
        }
    }

    /// After QEMU's last word (see [`Facts::is_final`]): where the guest is.
    pub async fn settle(mut self) -> Settled {
        let began = tokio::time::Instant::now();
        let (soon, end) = (began + SOON, began + SETTLE_LIMIT);
        loop {
            let qemu = self.qemu.clone();
            // The guest stands still meanwhile, so both are asked at once.
            let state = match tokio::join!(self.look(), qemu.status()) {
                (Ok(()), Ok(state)) => state,
                (Err(error), _) | (_, Err(error)) => return self.settle_without_answer(error),
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
                (MigrationStatus::Failed | MigrationStatus::Cancelled, state) if self.held && is_stopped(state) => {
                    // The target, if it has taken the disks already, lets go of them only when it ends.
                    if let Err(error) = self.qemu.qmp.execute(&commands::Cont {}).await {
                        return Settled::Unclear(Box::new(self), error.into());
                    }
                    self.held = false;
                }
                (status @ (MigrationStatus::Failed | MigrationStatus::Cancelled), state)
                    if is_here(state, self.paused) =>
                {
                    if status == MigrationStatus::Failed {
                        self.tracker.fail("QEMU gave no reason; the target may know it".into());
                    }
                    let facts = self.tracker.facts().clone();
                    return Settled::Stays(Running { qemu: self.qemu, paused: self.paused }, facts);
                }
                // QEMU announces its last word a moment before it gets there.
                _ if tokio::time::Instant::now() < soon => tokio::task::yield_now().await,
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

async fn prepare(qemu: &Qemu, options: &Options, ramp: &DowntimeRamp, mirrors: bool) -> Result<(), qmp::Error> {
    let &Options { by_reference, .. } = options;
    let (auto_converge, post_copy) = (options.auto_converge && !by_reference, options.post_copy && !by_reference);
    let transport = if by_reference { Transport::default() } else { options.transport };
    qemu.set_capabilities(Capabilities { auto_converge, mirrors, post_copy, by_reference, transport }).await?;
    limit_bandwidth(qemu, options.bandwidth, options.post_copy).await?;
    let parameters = commands::MigrateSetParameters { downtime_limit: Some(ramp.limit_ms()), ..Default::default() };
    qemu.qmp.execute(&parameters).await.map(drop)
}

async fn limit_bandwidth(qemu: &Qemu, bandwidth: Option<u64>, post_copy: bool) -> Result<(), qmp::Error> {
    let max_postcopy_bandwidth = post_copy.then(|| cap(bandwidth));
    let max_bandwidth = Some(cap(bandwidth));
    let parameters = commands::MigrateSetParameters { max_bandwidth, max_postcopy_bandwidth, ..Default::default() };
    qemu.qmp.execute(&parameters).await.map(drop)
}

/// A guest that was stopped before its migration is left so by QEMU, in one of these states.
fn is_stopped(state: RunState) -> bool {
    matches!(state, RunState::Paused | RunState::Prelaunch | RunState::Postmigrate)
}

fn is_here(state: RunState, paused: bool) -> bool {
    match state {
        RunState::Running => !paused,
        state if is_stopped(state) => paused,
        // Stopped for a reason of its own, which a migration neither made nor mends.
        RunState::IoError
        | RunState::InternalError
        | RunState::GuestPanicked
        | RunState::Shutdown
        | RunState::Suspended => true,
        _ => false,
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

/// A source in post-copy: the guest runs at the target or will, and this QEMU serves the memory that it has not got yet.
#[derive(Debug)]
pub struct Serving {
    qemu: Qemu,
    tracker: Tracker,
    bandwidth: Option<u64>,
    paused: bool,
    /// So often in a row it was told that its link is broken, answered, and did not act on it.
    deaf: u32,
}

/// QEMU that has sent everything only waits for the target's last word. When the link breaks then, 10.0 says `failed`; before 8.2 it
/// does not hear of it. So often it is told.
const DEAF_AFTER: u32 = 3;

impl Serving {
    /// The QEMU.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// What is known. `postcopy-paused` means that the link broke ([`Serving::take_up`]), `failed` that the guest is lost.
    pub fn facts(&self) -> &Facts {
        self.tracker.facts()
    }

    /// Goes on over another link, by way of the unix socket `socket`, where the target must be waited for
    /// ([`super::Filling::take_up`]). A link that QEMU still holds for whole is broken.
    ///
    /// # Errors
    /// [`Error::NoLink`] where there is no such socket. QEMU is not asked to dial it: it dials by the way, and what it learns of a failure
    /// after another link has been taken up ends it (7.2).
    pub async fn take_up(&mut self, socket: &Path) -> Result<(), Error> {
        if !socket.exists() {
            return Err(Error::NoLink(socket.to_owned()));
        }
        if let Err(error) = self.qemu.break_link(&mut self.tracker).await {
            self.listen(&error).await;
            return Err(error);
        }
        self.deaf = 0;
        self.explain();
        let uri = format!("unix:{}", socket.display());
        self.qemu.qmp.execute(&commands::MigrateResume { uri, resume: true }).await?;
        Ok(())
    }

    /// Whether it is one that will never go on over another link.
    async fn listen(&mut self, error: &Error) {
        let answered = matches!(error, Error::State { .. }) && self.look().await.is_ok();
        let (status, remaining) = (self.facts().status, self.facts().remaining_bytes);
        let hears = self.qemu.version() >= VersionTriple { major: 8, minor: 2, micro: 0 };
        self.deaf = match answered && !hears && status == MigrationStatus::PostcopyActive && remaining == 0 {
            true => self.deaf + 1,
            false => 0,
        };
        if self.deaf >= DEAF_AFTER {
            let text = "the link broke when all of the guest's memory had been sent and not all had arrived: QEMU does not go on over \
                        another one then"
                .to_owned();
            self.tracker.link_lost(&text);
            self.tracker.end(MigrationStatus::Failed, Some(text), now_us());
        }
    }

    /// Whether its user had paused the guest before.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Most bytes a second; none is unlimited.
    pub fn bandwidth(&self) -> Option<u64> {
        self.bandwidth
    }

    /// Allows another bandwidth from now on; none is unlimited.
    pub async fn limit_bandwidth(&mut self, bandwidth: Option<u64>) -> Result<(), qmp::Error> {
        limit_bandwidth(&self.qemu, bandwidth, true).await?;
        self.bandwidth = bandwidth;
        Ok(())
    }

    /// Takes an event of QEMU's.
    pub fn event(&mut self, event: &Event) {
        self.tracker.event(event);
        self.explain();
    }

    /// Looks at the numbers.
    pub async fn look(&mut self) -> Result<(), qmp::Error> {
        let info = self.qemu.qmp.execute(&commands::QueryMigrate {}).await?;
        // They are ahead of the answer, also where whoever brings them is not.
        for event in self.qemu.qmp.events() {
            self.tracker.event(&event);
        }
        self.tracker.look(&info, now_us());
        self.explain();
        Ok(())
    }

    fn explain(&mut self) {
        if self.facts().status == MigrationStatus::PostcopyPaused {
            self.tracker.link_lost("the link to the target broke while the guest's memory followed it (post-copy)");
        }
    }

    /// The departure, once the target has everything.
    pub fn settle(self) -> Result<Departed, Box<Serving>> {
        if self.facts().status != MigrationStatus::Completed {
            return Err(Box::new(self));
        }
        Ok(Departed { facts: self.tracker.facts().clone(), qemu: self.qemu })
    }
}
