//! The source's half of one migration's channels, from the first dial to the confirmed go.
//!
//! The go does not wait for the API: it is sent by this task, on the channel that is already open, as soon as the source's
//! launcher says `completed` (which it says only after it has written that down). It is repeated until the target says
//! that the guest runs, or that it never will.
//!
//! Memory goes through the launchers, where both ends know how; then this process only opens its connections, and one that comes
//! after it opens the control channel alone.
//!
//! In post-copy the guest's memory still follows it then. A link that breaks meanwhile is
//! followed by another one, before the go and after it, for as long as both QEMUs may live.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use godwit_launcher::carry::pump::Carried;
use godwit_launcher::client::Client;
use godwit_launcher::rpc::transport::{self, Single, Wish};
use godwit_launcher::rpc::{Ability, CarryOrder, DiskRoom, MigrationRole, Transport};
use tokio::net::UnixListener;
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinHandle};

use crate::channel::{self, Answer, ChannelError, Control, Credentials, Dialled, Place, Request, StreamKey, Target};
use crate::credentials::MigrationIdentity;
use crate::facts::{self, Go, Launcher, TargetSays};
use crate::lend;
use crate::migration_network::Underlay;
use crate::sockets::SocketDir;
use crate::source_streams;
use crate::tls::{Identity, TlsError, TlsPaths};

/// How long a dial may take.
pub(crate) const DIAL_LIMIT: Duration = Duration::from_secs(5);
/// How long the target may take to run the guest after the go, before it is asked again.
const GO_LIMIT: Duration = Duration::from_secs(10);
/// How long the target may take to say why the migration failed.
const WHY_LIMIT: Duration = Duration::from_secs(6);
/// How often it is asked again over a channel that breaks: for about a second and a half.
const WHY_ATTEMPTS: u32 = 8;
/// How long the launchers may take to break the old link and wait for another one.
const RECOVER_LIMIT: Duration = Duration::from_secs(15);
/// How long the two QEMUs may take to agree over another link on what the target has.
const AGREE_LIMIT: Duration = Duration::from_secs(30);
/// How long after its stream has ended QEMU may take to say why.
const END_LIMIT: Duration = Duration::from_secs(1);
/// The shortest and longest wait before the go is repeated.
const RETRY: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// Where the target listens, as published in the VMI; it changes when the target's handler restarts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// UID of the migration.
    pub migration_uid: String,
    /// The node that must answer.
    pub node: String,
    /// Its address.
    pub address: IpAddr,
    /// It is that of its interface for migrations, which is dialled from here.
    pub from: Option<Underlay>,
    /// Port of the control channel.
    pub control: u16,
    /// Inner port and port of each stream.
    pub streams: Vec<(i32, u16)>,
    /// They shall go in the clear, if the target agrees.
    pub plain: bool,
}

impl Endpoint {
    pub(crate) fn target(&self) -> Target {
        Target {
            migration_uid: self.migration_uid.clone(),
            node: self.node.clone(),
            address: self.address,
            from: self.from.clone(),
        }
    }
}

/// What the task has found out.
#[derive(Clone, Debug, Default)]
pub struct LinkState {
    /// Both channels are open.
    pub ready: bool,
    /// Why they are not.
    pub error: Option<String>,
    /// The target can receive in post-copy.
    pub post_copy_offered: bool,
    /// The target has the source's own memory.
    pub by_reference: bool,
    /// How memory is carried, as agreed with the target.
    pub transport: Transport,
    /// Why over one connection, where that was a choice.
    pub single: Option<Single>,
    /// What the target has for the disks that are copied, by volume.
    pub rooms: BTreeMap<String, DiskRoom>,
    /// Memory and disks go in the clear, as agreed with the target.
    pub plain: bool,
    /// How the go went.
    pub go: Go,
    /// Since when the target cannot be reached, though it has to be: the guest has left.
    pub unreached: Option<Instant>,
    /// What the target's end said after the migration had failed.
    pub target: TargetSays,
}

/// The source's launcher.
pub struct Local {
    /// What it says.
    pub states: watch::Receiver<Launcher>,
    /// For orders.
    pub client: Client,
    /// The folder of its sockets, where that is there.
    pub dir: Option<Arc<SocketDir>>,
}

/// The running half. Dropping it closes its channels.
pub struct SourceLink {
    /// UID of the migration.
    pub uid: String,
    /// Bytes of the memory stream so far.
    pub carried: Arc<Carried>,
    state: Arc<Mutex<LinkState>>,
    endpoint: watch::Sender<Endpoint>,
    unserved: watch::Sender<bool>,
    task: JoinHandle<()>,
    streams: Arc<Mutex<Vec<AbortHandle>>>,
}

impl Drop for SourceLink {
    fn drop(&mut self) {
        self.task.abort();
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            stream.abort();
        }
    }
}

impl SourceLink {
    /// Begins to dial. QEMU's streams are taken from `listeners` (by inner port, with their names); without any only the control
    /// channel is opened. `ability`: how this end could send memory. `wish`: what is known beforehand; whether the target could do its
    /// part of post-copy is asked.
    #[must_use]
    pub fn start(
        tls: TlsPaths,
        endpoint: Endpoint,
        listeners: Vec<(i32, String, UnixListener)>,
        launcher: Local,
        wake: Arc<Notify>,
        ability: Ability,
        wish: Wish,
    ) -> Self {
        let uid = endpoint.migration_uid.clone();
        let state = Arc::new(Mutex::new(LinkState::default()));
        let carried = Arc::new(Carried::default());
        let (sender, receiver) = watch::channel(endpoint);
        let streams = Arc::new(Mutex::new(Vec::new()));
        let (unserved, told) = watch::channel(false);
        let run = Run {
            uid: uid.clone(),
            tls,
            endpoint: receiver,
            launcher: launcher.states,
            client: launcher.client,
            dir: launcher.dir,
            state: state.clone(),
            carried: carried.clone(),
            wake,
            streams: streams.clone(),
            offset_us: 0,
            ability,
            wish,
            unserved: told,
            flow: watch::Sender::new(Flow::Over),
            by_launchers: true,
            own: None,
        };
        let task = tokio::spawn(run.run(listeners));
        Self { uid, carried, state, endpoint: sender, unserved, task, streams }
    }

    /// The source's QEMU is gone for certain: nobody serves the rest of the guest's memory any more.
    pub fn unserved(&self) {
        self.unserved.send_if_modified(|told| !std::mem::replace(told, true));
    }

    /// What is known now.
    #[must_use]
    pub fn now(&self) -> LinkState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where the target listens, now and later.
    pub(crate) fn endpoint(&self) -> watch::Receiver<Endpoint> {
        self.endpoint.subscribe()
    }

    /// The target has published another place, or is to listen in another network: that has its time.
    pub fn moved(&self, endpoint: Endpoint) {
        let moved = self.endpoint.send_if_modified(|old| {
            let moved = *old != endpoint;
            *old = endpoint;
            moved
        });
        if moved {
            self.state.lock().unwrap_or_else(PoisonError::into_inner).unreached = None;
        }
    }
}

struct Run {
    uid: String,
    tls: TlsPaths,
    endpoint: watch::Receiver<Endpoint>,
    launcher: watch::Receiver<Launcher>,
    client: Client,
    dir: Option<Arc<SocketDir>>,
    state: Arc<Mutex<LinkState>>,
    carried: Arc<Carried>,
    wake: Arc<Notify>,
    streams: Arc<Mutex<Vec<AbortHandle>>>,
    /// By how much the target's clock is ahead.
    offset_us: i64,
    ability: Ability,
    wish: Wish,
    /// What the streams are known by, once it is made.
    own: Option<Arc<MigrationIdentity>>,
    unserved: watch::Receiver<bool>,
    /// How far the memory stream that goes through this process is.
    flow: watch::Sender<Flow>,
    /// No launcher has refused to carry it.
    by_launchers: bool,
}

/// A memory stream that goes through this process.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// QEMU has yet to come for it.
    Awaited,
    /// It flows.
    Begun,
    /// There is none.
    Over,
}

/// What is to be done about the memory of a guest that was handed over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rest {
    /// The target has all of it.
    Whole,
    /// It flows, for all that is known.
    Flows,
    /// It needs another link.
    Broken,
    /// Nobody sends it any more.
    Unserved,
    /// Nothing: the launcher is older and knows no other link, or does not answer.
    Nothing,
}

/// What the source's launcher says of the migration.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sent {
    Open,
    /// The guest has left, paused by its user or not.
    Left {
        paused: bool,
    },
    Failed,
    Cancelled,
}

impl Run {
    fn set(&self, change: impl FnOnce(&mut LinkState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_one();
    }

    fn sent(&mut self) -> Sent {
        let launcher = self.launcher.borrow_and_update();
        let facts = launcher.last().and_then(|s| facts::migration(s, &self.uid, MigrationRole::Source));
        match facts {
            Some(f) if facts::has_left(f) => Sent::Left { paused: f.guest_paused },
            Some(f) if f.status == "failed" => Sent::Failed,
            Some(f) if f.status == "cancelled" => Sent::Cancelled,
            _ => Sent::Open,
        }
    }

    async fn run(mut self, listeners: Vec<(i32, String, UnixListener)>) {
        let began = Instant::now();
        let follows = listeners.is_empty() && self.is_under_way();
        let mut control = match self.open(listeners).await {
            Ok(control) => Some(control),
            Err(error) if matches!(self.sent(), Sent::Left { .. }) => {
                self.set(|s| s.go = Go::Trying(error.to_string()));
                None
            }
            // What was opened before this process goes on, and the target's handler may be on its way too.
            Err(error) if follows => {
                tracing::warn!(migration = %self.uid, %error, "cannot open the control channel; dialling again when needed");
                None
            }
            Err(error) => {
                tracing::warn!(migration = %self.uid, %error, "cannot open the channels to the target");
                self.set(|s| s.error = Some(error.to_string()));
                return;
            }
        };
        if control.is_some() {
            tracing::info!(migration = %self.uid, ms = began.elapsed().as_millis() as u64, "channels to the target are open");
        }
        self.set(|s| s.ready = true);
        loop {
            match self.sent() {
                Sent::Left { paused } => return self.go(control, paused).await,
                Sent::Failed => return self.abandon(control, true).await,
                Sent::Cancelled => return self.abandon(control, false).await,
                Sent::Open => {}
            }
            let changed = match &mut control {
                Some(open) => tokio::select! {
                    changed = self.launcher.changed() => changed.is_ok(),
                    () = open.closed() => {
                        tracing::warn!(migration = %self.uid, "control channel to the target is lost; dialling again when needed");
                        control = None;
                        true
                    }
                },
                None => self.launcher.changed().await.is_ok(),
            };
            if !changed {
                return;
            }
        }
    }

    /// The migration began before this process did; what was agreed then is what its launcher says.
    fn is_under_way(&self) -> bool {
        let launcher = self.launcher.borrow();
        let Some(f) = launcher.last().and_then(|s| facts::migration(s, &self.uid, MigrationRole::Source)) else {
            return false;
        };
        self.set(|s| {
            (s.transport, s.by_reference, s.post_copy_offered) = (f.transport, f.by_reference, f.post_copy_possible);
        });
        true
    }

    /// The node's certificate as it is now, and the identity that was made for this migration.
    fn credentials(&mut self) -> Result<Credentials, TlsError> {
        let own = match &self.own {
            Some(own) => own.clone(),
            None => self.own.insert(Arc::new(MigrationIdentity::new(&self.uid, "source")?)).clone(),
        };
        Ok(Credentials { node: Identity::load(&self.tls)?, own: Some(own), plain: self.endpoint.borrow().plain })
    }

    /// Opens what is needed for the start.
    async fn open(&mut self, listeners: Vec<(i32, String, UnixListener)>) -> Result<Control, ChannelError> {
        let endpoint = self.endpoint.borrow_and_update().clone();
        let target = endpoint.target();
        let mut control = Control::connect(&target, &self.credentials()?, endpoint.control, DIAL_LIMIT).await?;
        let key = control.key.clone();
        self.set(|s| s.plain = key.is_plain());
        // Dialled ahead, so that QEMU's first byte finds an open channel.
        let mut memory = None;
        let mut blocks = None;
        for (inner, name, listener) in listeners {
            let port = endpoint.streams.iter().find(|(i, _)| *i == inner).map(|(_, port)| *port);
            match (inner, port) {
                (channel::MEMORY, Some(port)) => memory = Some((port, name, listener)),
                (_, Some(port)) => blocks = Some((port, listener)),
                (_, None) => {}
            }
        }
        let agreed = match memory {
            Some(_) => self.agree(&mut control, blocks.is_some()).await?,
            None => Agreed::default(),
        };
        if let Some((port, socket, _)) = &memory
            && agreed.carries
        {
            match self.hand_over(&control, &target, *port, (0, socket, agreed.transport)).await {
                // The launcher has QEMU's socket.
                Ok(()) => memory = None,
                Err(error) if self.is_refused(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let dialled = async {
            match &memory {
                Some((port, ..)) => {
                    let dial = |number| target.dial_stream(&key, (channel::MEMORY, *port), number, DIAL_LIMIT);
                    futures::future::try_join_all(numbers(agreed.transport).map(dial)).await
                }
                None => Ok(Vec::new()),
            }
        };
        let (offset_us, dialled) = tokio::try_join!(control.clock_offset_us(DIAL_LIMIT), dialled)?;
        self.offset_us = offset_us;
        if let Some((_, _, listener)) = memory {
            self.carry(listener, dialled);
        }
        if let Some((port, listener)) = blocks {
            let (uid, carried) = (self.uid.clone(), self.carried.clone());
            let (launcher, cap) = (self.launcher.clone(), self.wish.bandwidth);
            let to = (target, port, key);
            let task = tokio::spawn(source_streams::carry_blocks(uid, listener, to, launcher, cap, carried));
            self.streams.lock().unwrap_or_else(PoisonError::into_inner).push(task.abort_handle());
        }
        Ok(control)
    }

    /// Whether the launcher here can carry memory to one at the other end that is known.
    fn can_carry(&self, control: &Control) -> bool {
        let known = control.key.is_plain() || control.peer.is_some();
        known
            && self.by_launchers
            && self.dir.is_some()
            && self.launcher.borrow().last().is_some_and(|state| state.carries_streams)
    }

    /// Dials the connections of link `number` and has the launcher carry QEMU's memory from `socket` over them. Only the
    /// connections are this process's work: it may end then.
    async fn hand_over(
        &self,
        control: &Control,
        target: &Target,
        port: u16,
        (number, socket, transport): (u64, &str, Transport),
    ) -> Result<(), ChannelError> {
        let refused = |e: &dyn std::fmt::Display| ChannelError::Launcher(e.to_string());
        let dir = self.dir.clone().ok_or_else(|| refused(&"its sockets cannot be reached"))?;
        let secured = match (&control.key, &self.own, &control.peer) {
            (StreamKey::Secret(_), ..) => None,
            (StreamKey::Tls(_), Some(own), Some(peer)) => Some(own.lend(peer)),
            (StreamKey::Tls(_), ..) => return Err(refused(&"the other end has no identity for this migration")),
        };
        // What an earlier process has opened, and QEMU has not begun with, is in the way at the target.
        let none = CarryOrder::none(&self.uid, number);
        self.client.carry(&none).await.map_err(|e| refused(&e))?;
        let recovery = (number > 0).then_some(number);
        let dial = |stream| {
            target.dial_for_launcher(&control.key, (channel::MEMORY, port), Place { stream, recovery }, DIAL_LIMIT)
        };
        let connections = futures::future::try_join_all(numbers(transport).map(dial)).await?;
        let handed = lend::hand(connections, dir).map_err(|e| refused(&e))?;
        let order = CarryOrder {
            streams: numbers(transport).collect(),
            socket: socket.to_owned(),
            handed: handed.socket.clone(),
            transport,
            secured,
            ..none
        };
        self.client.carry(&order).await.map_err(|e| refused(&e))?;
        tracing::info!(migration = %self.uid, link = number, "memory goes through the launchers");
        Ok(())
    }

    /// Whether a launcher will have none of it. Then it is the handlers' again.
    fn is_refused(&mut self, error: &ChannelError) -> bool {
        let refused = matches!(error, ChannelError::Launcher(_) | ChannelError::Refused { .. });
        if refused {
            tracing::warn!(migration = %self.uid, %error, "memory goes through the handlers instead");
            self.by_launchers = false;
        }
        refused
    }

    /// Agrees with the target on how memory is carried.
    async fn agree(&self, control: &mut Control, disks: bool) -> Result<Agreed, ChannelError> {
        let can_carry = self.can_carry(control);
        let plainly = self.ability == Ability::default() && !can_carry;
        if plainly && !self.wish.post_copy && !self.wish.by_reference && !disks {
            return Ok(Agreed::default());
        }
        let Answer::Offered { post_copy, by_reference, ability, rooms, carries } =
            control.ask(Request::Offer, DIAL_LIMIT).await?
        else {
            return Ok(Agreed::default());
        };
        let post_copy = self.wish.post_copy && post_copy && !by_reference;
        let wish = Wish { post_copy, by_reference, ..self.wish };
        let (mut transport, mut single) = transport::choose(self.ability, ability, &wish);
        // A target that does not know of this says so by being able to nothing, and is not asked.
        if ability != Ability::default() {
            match control.ask(Request::Carry(transport), DIAL_LIMIT).await? {
                Answer::Carries(stands) if stands != transport => (transport, single) = (stands, None),
                Answer::Carries(_) => {}
                Answer::NotYet { reason } => return Err(control.refused(reason)),
                other => return Err(control.refused(format!("unexpected answer {other:?}"))),
            }
        }
        tracing::info!(
            migration = %self.uid,
            channels = transport.channels,
            zstd = transport.zstd,
            single = single.map(Single::as_str),
            by_reference,
            by_launchers = carries && can_carry,
            "how memory is carried is agreed"
        );
        self.set(|s| {
            // What has channels has no post-copy, whatever was agreed before this process.
            s.post_copy_offered = wish.post_copy && transport.channels == 0;
            s.by_reference = by_reference;
            s.transport = transport;
            s.single = single;
            s.rooms = rooms;
        });
        Ok(Agreed { transport, carries: carries && can_carry })
    }

    /// Dials the control channel at the place that is published now.
    async fn redial(&mut self) -> Result<Control, ChannelError> {
        let endpoint = self.endpoint.borrow_and_update().clone();
        let credentials = self.credentials()?;
        let mut control = Control::connect(&endpoint.target(), &credentials, endpoint.control, DIAL_LIMIT).await?;
        self.offset_us = control.clock_offset_us(DIAL_LIMIT).await?;
        Ok(control)
    }

    /// The source is stopped for good: the target has to run the guest, and to get all of its memory, whatever it takes.
    async fn go(mut self, mut control: Option<Control>, paused: bool) {
        let began = Instant::now();
        let mut wait = RETRY.0;
        let mut confirmed = false;
        let mut ended = None;
        let mut flow = self.flow.subscribe();
        loop {
            flow.mark_unchanged();
            let rest = self.rest(&mut ended);
            let mut obstacle = None;
            if !confirmed {
                match self.give(&mut control, paused, rest).await {
                    Ok(resume_us) => {
                        let ms = began.elapsed().as_millis() as u64;
                        tracing::info!(migration = %self.uid, ms, "go confirmed: the guest runs at the target");
                        confirmed = true;
                        wait = RETRY.0;
                        self.set(|s| s.go = Go::Running(resume_us));
                    }
                    Err(Obstacle::Lost(reason)) => return self.lost(reason),
                    Err(Obstacle::NotYet(reason)) => {
                        tracing::warn!(migration = %self.uid, obstacle = reason, "the go is not confirmed yet; trying again");
                        self.set(|s| s.go = Go::Trying(reason));
                        obstacle = Some(());
                    }
                }
            }
            match rest {
                Rest::Broken => match self.recover(&mut control).await {
                    Ok(()) => {
                        wait = RETRY.0;
                        ended = None;
                    }
                    // A guest that ran there: its node knows how it ended, and says so.
                    Err(Obstacle::Lost(_)) if confirmed => return,
                    Err(Obstacle::Lost(reason)) => return self.lost(reason),
                    Err(Obstacle::NotYet(reason)) => {
                        tracing::warn!(migration = %self.uid, obstacle = reason, "no other link for the guest's memory yet; trying again");
                        obstacle = Some(());
                    }
                },
                Rest::Whole | Rest::Unserved if confirmed => {
                    if let Some(open) = control {
                        open.close(DIAL_LIMIT).await;
                    }
                    return;
                }
                _ => {}
            }
            if obstacle.is_some() {
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    _ = self.endpoint.changed() => control = None,
                }
                wait = (wait * 2).min(RETRY.1);
                continue;
            }
            let lost = async {
                match &mut control {
                    Some(open) => open.closed().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.launcher.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                _ = flow.changed() => {}
                _ = self.unserved.changed() => {}
                _ = self.endpoint.changed() => control = None,
                // What goes through this process goes through the same one there.
                () = lost => {
                    control = None;
                    self.cut();
                }
                () = tokio::time::sleep(END_LIMIT), if ended.is_some() => {}
            }
        }
    }

    fn lost(&self, reason: String) {
        tracing::error!(migration = %self.uid, %reason, "the guest is lost at the target");
        self.set(|s| s.go = Go::Lost(reason));
    }

    /// Gives the go, once; when the guest resumed. A target whose missing memory nobody has any more is ended instead, unless
    /// it was given the go already.
    async fn give(&mut self, control: &mut Option<Control>, paused: bool, rest: Rest) -> Result<i64, Obstacle> {
        if rest == Rest::Unserved
            && let Answer::Abandoned = self.ask(control, Request::Abandon, GO_LIMIT).await?
        {
            let reason = "the source's QEMU ended before all of the guest's memory had followed it";
            return Err(Obstacle::Lost(reason.into()));
        }
        match self.ask(control, Request::Go { paused }, GO_LIMIT).await? {
            Answer::Running { resume_us } => Ok(resume_us.saturating_sub(self.offset_us)),
            other => Err(Obstacle::of(other)),
        }
    }

    /// Asks over the channel that is open, or over another one.
    async fn ask(
        &mut self,
        control: &mut Option<Control>,
        request: Request,
        limit: Duration,
    ) -> Result<Answer, Obstacle> {
        let began = Instant::now();
        let answer = match control.as_mut() {
            Some(open) => open.ask(request, limit).await,
            None => match self.redial().await {
                Ok(open) => control.insert(open).ask(request, limit).await,
                Err(error) => Err(error),
            },
        };
        // An answer that did not come was waited for, too; but what was asked at another place says nothing of this one.
        self.set(|s| {
            let failed = answer.is_err() && !self.endpoint.has_changed().unwrap_or(true);
            s.unreached = failed.then(|| s.unreached.unwrap_or(began));
        });
        answer.map_err(|error| {
            *control = None;
            Obstacle::NotYet(error.to_string())
        })
    }

    /// What the source's launcher says of the memory. `ended`: since when its stream has ended here and QEMU does not say why.
    fn rest(&mut self, ended: &mut Option<Instant>) -> Rest {
        let unserved = *self.unserved.borrow_and_update();
        let launcher = self.launcher.borrow_and_update();
        let Some(f) = launcher.last().and_then(|s| facts::migration(s, &self.uid, MigrationRole::Source)) else {
            return Rest::Nothing;
        };
        // One that QEMU has not come for is none: it may never come, if it does not know that the last one broke.
        let carried = f.carried.as_ref().is_some_and(|carried| carried.flows && !carried.awaits_qemu);
        let flowing = carried || *self.flow.borrow() == Flow::Begun;
        let answers = launcher.state().is_some();
        if flowing {
            *ended = None;
        }
        match f.status.as_str() {
            "completed" => Rest::Whole,
            "failed" => Rest::Unserved,
            _ if unserved => Rest::Unserved,
            _ if !f.recoverable || !answers => Rest::Nothing,
            "postcopy-paused" => Rest::Broken,
            _ if flowing => Rest::Flows,
            _ if ended.get_or_insert_with(Instant::now).elapsed() >= END_LIMIT => Rest::Broken,
            _ => Rest::Flows,
        }
    }

    /// The memory stream that goes through this process, if any, is over.
    fn cut(&self) {
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            stream.abort();
        }
        self.flow.send_replace(Flow::Over);
    }

    /// Another link for the guest's memory: the target waits for it, then it is dialled, then the source's QEMU goes on.
    async fn recover(&mut self, control: &mut Option<Control>) -> Result<(), Obstacle> {
        let not_yet = |error: &dyn std::fmt::Display| Obstacle::NotYet(error.to_string());
        self.cut();
        let number = match self.ask(control, Request::Recover, RECOVER_LIMIT).await? {
            Answer::Recovering { number } => number,
            other => return Err(Obstacle::of(other)),
        };
        let endpoint = self.endpoint.borrow().clone();
        let port = endpoint.streams.iter().find(|(inner, _)| *inner == channel::MEMORY).map(|(_, port)| *port);
        let port = port.ok_or_else(|| not_yet(&"the target has not published where memory goes"))?;
        let dir = self.dir.clone().ok_or_else(|| not_yet(&"the launcher's sockets cannot be reached"))?;
        let open = control.as_mut().ok_or_else(|| not_yet(&"the control channel is lost"))?;
        let key = open.key.clone();
        // As many as the first link had, which the launcher knows, also where another process has dialled that one.
        let target = endpoint.target();
        let socket = format!("again-{number}.sock");
        let before = self.recoveries();
        let by_launchers = self.can_carry(open)
            && matches!(open.ask(Request::Offer, DIAL_LIMIT).await, Ok(Answer::Offered { carries: true, .. }));
        if by_launchers {
            let link = (number, socket.as_str(), self.transport());
            if let Err(error) = self.hand_over(open, &target, port, link).await {
                self.is_refused(&error);
                return Err(not_yet(&error));
            }
        } else {
            let dial = |stream| {
                let place = Place { stream, recovery: Some(number) };
                target.dial_stream(&key, (channel::MEMORY, port), place, DIAL_LIMIT)
            };
            let dialled = numbers(self.transport()).map(dial);
            let dialled = futures::future::try_join_all(dialled).await.map_err(|e| not_yet(&e))?;
            let listener = dir.listen(&socket).map_err(|e| not_yet(&e))?;
            self.carry(listener, dialled);
        }
        // QEMU may dial after it has answered.
        let _listens = Listens { dir, socket: socket.clone() };
        let went_on = self.go_on(&socket, number, before, by_launchers).await;
        if went_on.is_err() {
            self.let_go(number).await;
        }
        went_on
    }

    /// The source's QEMU goes on over the link that waits for it.
    async fn go_on(&self, socket: &str, number: u64, before: u64, by_launchers: bool) -> Result<(), Obstacle> {
        let not_yet = |error: &dyn std::fmt::Display| Obstacle::NotYet(error.to_string());
        self.client.recover(&self.uid, socket).await.map_err(|e| not_yet(&e))?;
        let mut launcher = self.launcher.clone();
        let mut flow = self.flow.subscribe();
        let uid = self.uid.clone();
        let goes_on = launcher.wait_for(|l| {
            let f = l.last().and_then(|s| facts::migration(s, &uid, MigrationRole::Source));
            f.is_none_or(|f| f.recoveries > before || f.is_final()) || l.state().is_none()
        });
        let mut carrier = self.launcher.clone();
        let broke = async {
            if !by_launchers {
                let _ = flow.wait_for(|flow| *flow == Flow::Over).await;
                return;
            }
            let _ = carrier
                .wait_for(|l| {
                    let f = l.last().and_then(|s| facts::migration(s, &self.uid, MigrationRole::Source));
                    f.and_then(|f| f.carried.as_ref()).is_some_and(|carried| carried.link == number && !carried.flows)
                })
                .await;
        };
        tokio::select! {
            _ = goes_on => {
                tracing::info!(migration = %self.uid, number, "the guest's memory goes on over another link");
                Ok(())
            }
            () = broke => Err(not_yet(&"the other link broke as well")),
            () = tokio::time::sleep(AGREE_LIMIT) => Err(not_yet(&"the QEMUs do not agree over the other link")),
        }
    }

    /// Gives link `number` up if QEMU has not come for it. One that it has begun with stays: before 8.2 the target's QEMU does not
    /// survive that a link breaks while the two compare what is there.
    async fn let_go(&self, number: u64) {
        if *self.flow.borrow() == Flow::Awaited {
            self.cut();
        }
        let launcher = self.launcher.borrow().last().is_some_and(|state| state.carries_streams);
        if !launcher {
            return;
        }
        if let Err(error) = self.client.carry(&CarryOrder::none(&self.uid, number)).await {
            tracing::debug!(migration = %self.uid, number, %error, "the launcher keeps the connections that it was given");
        }
    }

    /// How memory is carried, as its launcher was told.
    fn transport(&self) -> Transport {
        let launcher = self.launcher.borrow();
        let f = launcher.last().and_then(|s| facts::migration(s, &self.uid, MigrationRole::Source));
        f.map(|f| f.transport).unwrap_or_default()
    }

    fn recoveries(&self) -> u64 {
        let launcher = self.launcher.borrow();
        let f = launcher.last().and_then(|s| facts::migration(s, &self.uid, MigrationRole::Source));
        f.map_or(0, |f| f.recoveries)
    }

    /// Carries QEMU's memory over these connections.
    fn carry(&self, listener: UnixListener, dialled: Vec<Dialled>) {
        let (flow, launcher) = (self.flow.clone(), self.launcher.clone());
        flow.send_replace(Flow::Awaited);
        let come = flow.clone();
        let begins = move || {
            come.send_replace(Flow::Begun);
        };
        let (uid, carried) = (self.uid.clone(), self.carried.clone());
        let carry = source_streams::carry_memory(uid, listener, dialled, launcher, carried, begins);
        let task = tokio::spawn(async move {
            carry.await;
            flow.send_replace(Flow::Over);
        });
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).push(task.abort_handle());
    }

    /// The guest stays here; the waiting target may go. The API says so as well, so once is enough. Before that, after a
    /// failure, the target says what it knows of it.
    async fn abandon(mut self, mut control: Option<Control>, ask_why: bool) {
        if ask_why {
            let heard = tokio::time::timeout(WHY_LIMIT, self.ask_why(&mut control)).await;
            let heard =
                heard.unwrap_or_else(|_| TargetSays::Unreachable("the target's handler does not answer".into()));
            tracing::info!(migration = %self.uid, ?heard, "what the target knows of the failure");
            self.set(|s| s.target = heard);
        }
        let mut control = match control {
            Some(control) => control,
            None => match self.redial().await {
                Ok(control) => control,
                Err(_) => return,
            },
        };
        if let Err(error) = control.ask(Request::Abandon, DIAL_LIMIT).await {
            tracing::info!(migration = %self.uid, %error, "the target could not be told that the guest stays");
        }
        control.close(DIAL_LIMIT).await;
    }

    /// A channel that breaks is dialled again: a handler that ends takes a moment, and then its node refuses, which tells more
    /// than a broken channel does.
    async fn ask_why(&mut self, control: &mut Option<Control>) -> TargetSays {
        let mut wait = RETRY.0;
        let mut attempts = 0;
        loop {
            let answer = match control.as_mut() {
                Some(open) => open.ask(Request::Why, WHY_LIMIT).await,
                None => match self.redial().await {
                    Ok(open) => control.insert(open).ask(Request::Why, WHY_LIMIT).await,
                    Err(error) => Err(error),
                },
            };
            let error = match answer {
                Ok(Answer::Because { ended, words, cause }) => return TargetSays::Told { ended, words, cause },
                Ok(_) => return TargetSays::Told { ended: false, words: None, cause: None },
                Err(error) => error,
            };
            *control = None;
            attempts += 1;
            if error.is_answered() || attempts > WHY_ATTEMPTS {
                return unheard(&error);
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY.1);
        }
    }
}

/// What was agreed with the target of how memory is carried.
#[derive(Clone, Copy, Default)]
struct Agreed {
    transport: Transport,
    /// By the launchers.
    carries: bool,
}

/// The connections that QEMU opens, from 0.
fn numbers(transport: Transport) -> std::ops::Range<u8> {
    0..u8::try_from(transport.connections()).unwrap_or(u8::MAX)
}

/// A socket that goes with this.
struct Listens {
    dir: Arc<SocketDir>,
    socket: String,
}

impl Drop for Listens {
    fn drop(&mut self) {
        self.dir.remove(&self.socket);
    }
}

/// Why something that has to come about has not.
enum Obstacle {
    /// It is tried again.
    NotYet(String),
    /// It never will.
    Lost(String),
}

impl Obstacle {
    fn of(answer: Answer) -> Self {
        match answer {
            Answer::Lost { reason } => Self::Lost(reason),
            Answer::NotYet { reason } => Self::NotYet(reason),
            other => Self::NotYet(format!("unexpected answer {other:?}")),
        }
    }
}

fn unheard(error: &ChannelError) -> TargetSays {
    if error.is_answered() {
        TargetSays::NoHandler(error.to_string())
    } else {
        TargetSays::Unreachable(error.to_string())
    }
}
