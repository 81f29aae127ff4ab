//! The receiving end.

use super::{Capabilities, Error, Qemu, Running, now_us};
use crate::blocks;
use crate::failure;
use crate::machine::Machine;
use crate::migration::{Facts, Tracker};
use crate::qmp::commands::{self, MigrationInfo, MigrationStatus, RunState, VersionTriple};
use crate::qmp::{self, Event};
use crate::transport::Transport;
use std::path::Path;
use std::time::Duration;
use tokio::task::JoinHandle;

/// How long a target may take to say that it has loaded what the source knows it has.
const LOAD_LIMIT: Duration = Duration::from_secs(2);
/// How long a QEMU in post-copy is asked: it does not answer while it waits itself for a page of the guest's.
const ASK_LIMIT: Duration = Duration::from_millis(500);

/// A target: built, stopped, receiving. The guest has not run here.
#[derive(Debug)]
pub struct Incoming {
    qemu: Qemu,
    tracker: Tracker,
    offers_blocks: bool,
    post_copy: bool,
    /// It has the source's own memory, and only the rest comes.
    by_reference: bool,
    /// Where it will receive, as long as it does not yet.
    waits: Option<String>,
    transport: Transport,
}

impl Incoming {
    /// Starts QEMU and listens on the unix socket `socket`.
    pub async fn launch(program: &Path, machine: &Machine, socket: &Path) -> Result<Incoming, Error> {
        Incoming::launch_for(program, machine, socket, false).await
    }

    /// The same, for a migration that may go over to post-copy, if this machine can receive so ([`Incoming::can_post_copy`]).
    pub async fn launch_for(
        program: &Path,
        machine: &Machine,
        socket: &Path,
        post_copy: bool,
    ) -> Result<Incoming, Error> {
        let mut incoming = Incoming::prepare(program, machine, socket, post_copy).await?;
        incoming.listen(Transport::default()).await?;
        Ok(incoming)
    }

    /// The same, but nobody can connect before [`Incoming::listen`]: how memory comes is not agreed yet.
    pub async fn prepare(program: &Path, machine: &Machine, socket: &Path, post_copy: bool) -> Result<Incoming, Error> {
        Incoming::prepare_with(program, machine, socket, post_copy, false).await
    }

    /// The same, where the machine's memory is the source's own ([`Machine::shared_memory`]): it does not come, it is there.
    /// QEMU maps it and touches nothing of it, and nothing of the guest runs, before the go. The source has to be told the
    /// same ([`crate::migration::Options::by_reference`]); pages that come all the same are refused.
    pub async fn prepare_by_reference(program: &Path, machine: &Machine, socket: &Path) -> Result<Incoming, Error> {
        if machine.shared_memory.is_none() {
            return Err(Error::Unsupported("memory comes by reference only where both QEMUs can map it"));
        }
        Incoming::prepare_with(program, machine, socket, false, true).await
    }

    async fn prepare_with(
        program: &Path,
        machine: &Machine,
        socket: &Path,
        post_copy: bool,
        by_reference: bool,
    ) -> Result<Incoming, Error> {
        let machine = Machine { incoming: true, ..machine.clone() };
        let qemu = Qemu::launch(program, &machine).await?;
        let mut can = post_copy;
        if let Err(error) = qemu.set_capabilities(Capabilities { post_copy, by_reference, ..Default::default() }).await
        {
            if !post_copy {
                return Err(error.into());
            }
            // Mostly userfaultfd(2), which needs root, CAP_SYS_PTRACE or a sysctl.
            tracing::warn!(%error, "this machine cannot receive in post-copy");
            can = false;
        }
        let waits = Some(format!("unix:{}", socket.display()));
        let tracker = Tracker::arriving();
        let transport = Transport::default();
        Ok(Incoming { qemu, tracker, offers_blocks: false, post_copy: can, by_reference, waits, transport })
    }

    /// Listens for memory that comes in this way; the first that was said stands, and is what is answered. With several
    /// channels it cannot receive in post-copy any more ([`crate::transport`]). What comes by reference has no need of any.
    pub async fn listen(&mut self, transport: Transport) -> Result<Transport, Error> {
        let Some(uri) = self.waits.clone() else { return Ok(self.transport) };
        let by_reference = self.by_reference;
        let transport = if by_reference { Transport::default() } else { transport };
        let post_copy = self.post_copy && transport.channels == 0;
        // QEMU wants to know of channels before it listens.
        let wanted = Capabilities { post_copy, by_reference, transport, ..Default::default() };
        self.qemu.set_capabilities(wanted).await?;
        // Older ones exit when they cannot load; their last words are the reason then.
        let exit_on_error = (self.qemu.version >= VersionTriple { major: 9, minor: 1, micro: 0 }).then_some(false);
        self.qemu.qmp.execute(&commands::MigrateIncoming { uri, exit_on_error }).await?;
        self.waits = None;
        self.post_copy = post_copy;
        self.transport = transport;
        Ok(transport)
    }

    /// How memory comes, as far as it is agreed.
    pub fn transport(&self) -> Transport {
        self.transport
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

    /// Whether it can receive in post-copy, and was allowed to.
    pub fn can_post_copy(&self) -> bool {
        self.post_copy
    }

    /// Whether it has the source's own memory.
    pub fn is_by_reference(&self) -> bool {
        self.by_reference
    }

    /// Takes an event of QEMU's.
    pub fn event(&mut self, event: &Event) {
        self.tracker.event(event);
    }

    /// Looks at the numbers.
    pub async fn look(&mut self) -> Result<(), qmp::Error> {
        let info = self.qemu.qmp.execute(&commands::QueryMigrate {}).await?;
        self.tracker.look(&info, now_us());
        if self.facts().status == MigrationStatus::Failed {
            // QEMU's answer often is only what followed from what it has written before.
            let said = self.qemu.process.last_words();
            let lines = said.iter().map(String::as_str).chain(info.error_desc.as_deref());
            if let Some(explained) = failure::explain(lines) {
                self.tracker.explained(explained);
            }
        }
        Ok(())
    }

    /// Whether it has all that a go needs: everything, or in post-copy everything but a part of the memory.
    pub async fn is_loaded(&mut self) -> Result<bool, qmp::Error> {
        let qemu = self.qemu.clone();
        // The guest stands still meanwhile, so both are asked at once.
        let (looked, state) = tokio::join!(self.look(), qemu.status());
        looked?;
        let enough = matches!(self.facts().status, MigrationStatus::Completed | MigrationStatus::PostcopyActive);
        Ok(enough && state? == RunState::Paused)
    }

    /// Listens on the unix socket `socket` for another link of a post-copy whose link broke before the go.
    pub async fn take_up(&mut self, socket: &Path) -> Result<(), Error> {
        self.qemu.take_up(&mut self.tracker, socket).await
    }

    /// Runs the guest, unless it is to stay `paused`. Only for the one who knows that the source is stopped for good.
    ///
    /// Refused while not enough is loaded; a load that is under way is given [`LOAD_LIMIT`] to end, since the source can
    /// know of its end a moment before this QEMU says so.
    pub async fn go(mut self, paused: bool) -> Result<Arrived, GoError> {
        let end = tokio::time::Instant::now() + LOAD_LIMIT;
        loop {
            match self.is_loaded().await {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => return Err(GoError { incoming: self, may_run: false, error: error.into() }),
            }
            let status = self.facts().status;
            let ending = matches!(
                status,
                MigrationStatus::Active | MigrationStatus::PostcopyActive | MigrationStatus::Completed
            );
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
        if paused {
            return Ok(self.arrived(true));
        }
        match self.qemu.qmp.execute(&commands::Cont {}).await {
            Ok(_) => Ok(self.arrived(false)),
            Err(error) => {
                let may_run = !matches!(error, qmp::Error::Refused { .. });
                Err(GoError { incoming: self, may_run, error: error.into() })
            }
        }
    }

    /// After a go that was not answered: the running guest, if it runs.
    pub async fn running(self) -> Result<Arrived, Incoming> {
        match self.qemu.status().await {
            Ok(RunState::Running) => Ok(self.arrived(false)),
            _ => Err(self),
        }
    }

    fn arrived(self, paused: bool) -> Arrived {
        let whole = self.facts().status == MigrationStatus::Completed;
        let running = Running { qemu: self.qemu, paused };
        if whole {
            Arrived::Whole(running, self.tracker.facts().clone())
        } else {
            Arrived::Filling(Filling { running, tracker: self.tracker, asked: None })
        }
    }
}

/// What a go has made of a target.
#[derive(Debug)]
pub enum Arrived {
    /// The guest is here with all it has, and how it came.
    Whole(Running, Facts),
    /// The guest is here and a part of its memory still comes (post-copy).
    Filling(Filling),
}

/// The guest is here, and a part of its memory is still at the source. It cannot be sent on.
#[derive(Debug)]
pub struct Filling {
    running: Running,
    tracker: Tracker,
    /// A question that QEMU has not answered yet. More than a few of them, and QEMU would hear nothing any more, not even the
    /// commands that need no main loop.
    asked: Option<JoinHandle<Result<MigrationInfo, qmp::Error>>>,
}

impl Filling {
    /// The QEMU.
    pub fn qemu(&self) -> &Qemu {
        self.running.qemu()
    }

    /// What is known. `postcopy-paused` means that the link broke ([`Filling::take_up`]), `failed` that the guest is lost.
    pub fn facts(&self) -> &Facts {
        self.tracker.facts()
    }

    /// Listens on the unix socket `socket` for another link, which [`super::Serving::take_up`] then takes. A link that QEMU
    /// still holds for whole is broken. May be repeated.
    pub async fn take_up(&mut self, socket: &Path) -> Result<(), Error> {
        let taken = self.running.qemu.take_up(&mut self.tracker, socket).await;
        self.explain();
        taken
    }

    /// The guest, to be paused and unpaused.
    pub fn running(&mut self) -> &mut Running {
        &mut self.running
    }

    /// Takes an event of QEMU's.
    pub fn event(&mut self, event: &Event) {
        self.tracker.event(event);
        self.explain();
    }

    /// Looks at the numbers, if QEMU answers soon. Turns come as events all the same. A QEMU without a link is not asked: it
    /// may wait itself for a page of the guest's.
    pub async fn look(&mut self) -> Result<(), qmp::Error> {
        self.take_events();
        if self.is_broken() {
            return Ok(());
        }
        let qmp = self.running.qemu.qmp.clone();
        let ask = || tokio::spawn(async move { qmp.execute(&commands::QueryMigrate {}).await });
        let asked = self.asked.get_or_insert_with(ask);
        if let Ok(answered) = tokio::time::timeout(ASK_LIMIT, asked).await {
            self.asked = None;
            self.take_events();
            if let Ok(info) = answered {
                self.tracker.look(&info?, now_us());
            }
            self.explain();
        }
        Ok(())
    }

    /// They are ahead of answers, also where whoever brings them is not.
    fn take_events(&mut self) {
        for event in self.running.qemu.qmp.events() {
            self.tracker.event(&event);
        }
        self.explain();
    }

    /// Whether its memory has no link at present to come over.
    pub fn is_broken(&self) -> bool {
        self.facts().broken_us.is_some()
    }

    /// Whether the rest of the guest's memory will not come any more.
    pub fn is_lost(&self) -> bool {
        self.facts().status == MigrationStatus::Failed
    }

    /// Whether its user had paused the guest.
    pub fn is_paused(&self) -> bool {
        self.running.is_paused()
    }

    fn explain(&mut self) {
        if self.facts().status == MigrationStatus::PostcopyPaused {
            self.tracker
                .link_lost("the link to the source broke before all of the guest's memory was here (post-copy)");
        }
    }

    /// The whole guest, once everything is here.
    pub fn settle(self) -> Result<Running, Box<Filling>> {
        if self.facts().status == MigrationStatus::Completed { Ok(self.running) } else { Err(Box::new(self)) }
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
