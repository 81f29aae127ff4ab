//! What the target's handler answers on the control channel.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use godwit_launcher::client::Client;
use godwit_launcher::rpc::{Ability, CarryOrder, DiskRoom, DomainPhase, GoOrder, MigrationRole, State, Transport};
use tokio::sync::{OnceCell, watch};

use crate::channel::{Answer, Request, TargetControl};
use crate::facts::{self, Launcher};
use crate::fence::Fence;
use crate::frames::{self, Inlets};
use crate::networks::{self, NetworkError, Port};
use crate::recovery::Recoveries;

/// How long to wait for the time of the resume after the launcher has taken the go.
const RESUME_LIMIT: Duration = Duration::from_secs(5);
/// How long to wait for the launcher to see why a migration failed.
const WHY_LIMIT: Duration = Duration::from_secs(2);

/// The launcher that receives, seen by the control channel.
pub struct TargetAnswers {
    /// UID of the migration.
    pub uid: String,
    /// The launcher.
    pub client: Client,
    /// Its QEMU can receive in post-copy.
    pub post_copy: bool,
    /// It has the source's own memory.
    pub by_reference: bool,
    /// How it could receive memory, within what this node can.
    pub ability: Ability,
    /// It can carry the memory stream.
    pub carries: bool,
    /// What there is for the disks that are copied, by volume.
    pub rooms: BTreeMap<String, DiskRoom>,
    /// How it does: set from the beginning where its QEMU listens already.
    pub agreed: OnceCell<Transport>,
    /// Its states.
    pub launcher: watch::Receiver<Launcher>,
    /// Its process, in whose network namespace the guest's links are.
    pub pid: u32,
    /// The guest's interfaces on segments.
    pub ports: Vec<Port>,
    /// The guest's taps hear their segments.
    pub joined: OnceCell<()>,
    /// Whether guests may run on this node.
    pub fence: Fence,
    /// Links that follow a broken one.
    pub recoveries: Arc<Recoveries>,
}

impl TargetControl for TargetAnswers {
    fn answer(self: Arc<Self>, request: Request) -> BoxFuture<'static, Answer> {
        Box::pin(async move {
            match request {
                Request::Clock => Answer::Time { now_us: jiff::Timestamp::now().as_microsecond() },
                Request::Offer => Answer::Offered {
                    post_copy: self.post_copy,
                    by_reference: self.by_reference,
                    ability: self.ability,
                    rooms: self.rooms.clone(),
                    carries: self.carries,
                },
                Request::Carry(wish) => match self.receive_by(wish).await {
                    Ok(stands) => Answer::Carries(stands),
                    Err(reason) => Answer::NotYet { reason },
                },
                Request::Go { paused } => self.go(paused).await,
                Request::Recover => self.recover().await,
                Request::Why => self.why().await,
                Request::Abandon => match self.client.abandon(&self.uid).await {
                    Ok(_) => Answer::Abandoned,
                    Err(error) => Answer::NotYet { reason: error.to_string() },
                },
                // What it opens is not here, but on its connection.
                Request::Frames => Answer::NotYet { reason: "frames come on a connection of their own".into() },
            }
        })
    }

    fn join(self: Arc<Self>) -> BoxFuture<'static, Result<Inlets, String>> {
        Box::pin(async move {
            self.join_segments().await.map_err(|e| e.to_string())?;
            frames::inlets(self.pid, &self.ports).await.map_err(|e| e.to_string())
        })
    }

    fn carry(self: Arc<Self>, order: CarryOrder) -> BoxFuture<'static, Result<(), String>> {
        Box::pin(async move { self.client.carry(&order).await.map(drop).map_err(|e| e.to_string()) })
    }

    fn transport(self: Arc<Self>) -> BoxFuture<'static, Result<Transport, String>> {
        Box::pin(async move { self.receive_by(Transport::default()).await })
    }
}

impl TargetAnswers {
    /// Orders the launcher to receive so, unless it is agreed already.
    async fn receive_by(&self, wish: Transport) -> Result<Transport, String> {
        let order = async {
            let state = self.client.receive_by(&self.uid, wish).await.map_err(|e| e.to_string())?;
            let facts = facts::migration(&state, &self.uid, MigrationRole::Target);
            let stands = facts.map(|f| f.transport).ok_or("the launcher knows nothing of this migration")?;
            tracing::info!(migration = %self.uid, channels = stands.channels, zstd = stands.zstd, "how memory comes is agreed");
            Ok::<_, String>(stands)
        };
        self.agreed.get_or_try_init(|| order).await.copied()
    }

    /// Once: the guest stands still when it is done again for the go.
    async fn join_segments(&self) -> Result<(), NetworkError> {
        self.joined.get_or_try_init(|| networks::join(self.pid, &self.ports)).await.copied()
    }

    async fn go(&self, paused: bool) -> Answer {
        // Its announcement has to reach the segments. A guest without a network is better than none.
        if let Err(error) = self.join_segments().await {
            tracing::error!(migration = %self.uid, %error, "the guest's taps cannot be joined to their bridges");
        }
        let Some(until) = self.fence.held() else {
            let reason = "the target's handler does not hold its node's lease, so no guest may run there".into();
            return self.ended().unwrap_or(Answer::NotYet { reason });
        };
        let order = GoOrder { migration_uid: self.uid.clone(), paused, run_until: Some(until) };
        let answer = self.client.give_go(&order).await;
        match answer {
            Ok(state) => match resumed(&state, &self.uid) {
                Some(resume_us) => Answer::Running { resume_us },
                None => self.wait_resumed().await,
            },
            Err(error) => {
                let last = self.launcher.borrow().clone();
                match last.last() {
                    // A guest that was gone with has ended by itself since; that is no loss.
                    Some(state) if let Some(resume_us) = resumed(state, &self.uid) => Answer::Running { resume_us },
                    _ => self.ended().unwrap_or(Answer::NotYet { reason: error.to_string() }),
                }
            }
        }
    }

    /// Whatever link there was is over; QEMU waits for the next one.
    async fn recover(&self) -> Answer {
        let number = self.recoveries.begin(jiff::Timestamp::now().as_microsecond());
        let socket = format!("again-{number}.sock");
        match self.client.recover(&self.uid, &socket).await {
            Ok(_) => {
                tracing::info!(migration = %self.uid, number, "another link is waited for");
                self.recoveries.expect(number, socket);
                Answer::Recovering { number }
            }
            Err(error) => self.ended().unwrap_or(Answer::NotYet { reason: error.to_string() }),
        }
    }

    /// That the guest, which has left its source, cannot run here any more, if so: QEMU is gone, or it could not load what
    /// came and lives on (from 9.1 on; older ones end).
    fn ended(&self) -> Option<Answer> {
        let launcher = self.launcher.borrow();
        let state = launcher.last()?;
        if !matches!(state.phase, DomainPhase::Crashed | DomainPhase::Shutdown) {
            let f = facts::migration(state, &self.uid, MigrationRole::Target);
            let failed = f.filter(|f| f.status == "failed" && !f.gone)?;
            let words = failed.error.as_deref().unwrap_or("what came of it was cut off");
            return Some(Answer::Lost { reason: format!("the target's QEMU cannot load the guest: {words}") });
        }
        let reason = state.exit_reason.clone().unwrap_or_else(|| "QEMU has ended".into());
        Some(Answer::Lost { reason: format!("the target's QEMU is gone: {reason}") })
    }

    /// The source may see the stream end before the launcher here sees its QEMU end.
    async fn why(&self) -> Answer {
        let mut launcher = self.launcher.clone();
        let wait = launcher.wait_for(|l| l.last().is_some_and(|s| why(s, &self.uid).is_some()));
        let seen = tokio::time::timeout(WHY_LIMIT, wait).await;
        let answer = seen.ok().and_then(Result::ok).and_then(|l| l.last().and_then(|s| why(s, &self.uid)));
        answer.unwrap_or(Answer::Because { ended: false, words: None, cause: None })
    }

    async fn wait_resumed(&self) -> Answer {
        let mut launcher = self.launcher.clone();
        let wait = launcher.wait_for(|l| l.last().is_some_and(|s| resumed(s, &self.uid).is_some()));
        match tokio::time::timeout(RESUME_LIMIT, wait).await {
            Ok(Ok(launcher)) => match launcher.last().and_then(|s| resumed(s, &self.uid)) {
                Some(resume_us) => Answer::Running { resume_us },
                None => Answer::NotYet { reason: "the guest has not resumed yet".into() },
            },
            _ => Answer::NotYet { reason: "the launcher has not reported that the guest runs".into() },
        }
    }
}

/// When the guest resumed in this launcher after migration `uid`. One that stays paused has no such time: it is here now.
fn resumed(state: &State, uid: &str) -> Option<i64> {
    let f = facts::migration(state, uid, MigrationRole::Target).filter(|f| f.gone)?;
    let paused = (state.phase == DomainPhase::Paused).then(|| jiff::Timestamp::now().as_microsecond());
    f.resume_us.or(paused)
}

/// What went wrong in this launcher with migration `uid`, if anything did yet.
fn why(state: &State, uid: &str) -> Option<Answer> {
    let f = facts::migration(state, uid, MigrationRole::Target);
    let ended = state.phase.is_final();
    let failed = f.is_some_and(|f| f.status == "failed" || f.error.is_some());
    let words = f.and_then(|f| f.error.clone()).or_else(|| state.exit_reason.clone().filter(|_| ended));
    (ended || failed).then(|| Answer::Because { ended, words, cause: f.and_then(|f| f.cause) })
}
