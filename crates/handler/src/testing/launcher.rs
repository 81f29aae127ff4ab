//! A launcher without a QEMU: it speaks the RPC, sends and receives a stream, and keeps the promises of the hand-over.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use bytes::Bytes;
use futures::StreamExt;
use godwit_launcher::carry::Carrier;
use godwit_launcher::rpc::{
    self, Ability, CarryOrder, Cause, DomainPhase, ErrorBody, GoOrder, LinkOrder, MigrationFacts, MigrationMode,
    MigrationRef, MigrationRole, Refusal, ShutdownOrder, SourceOrder, State, TargetOrder, TargetReady, VmOrder,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, watch};

const STREAM: usize = 4 << 20;
/// Between two looks at what is carried.
const LOOK_EVERY: std::time::Duration = std::time::Duration::from_millis(50);
/// The byte that begins a second half that comes in post-copy.
const POST_COPY: u8 = 2;

/// One launcher; clones are the same one.
#[derive(Clone)]
pub struct Launcher(Arc<Inner>);

pub struct Inner {
    dir: PathBuf,
    state: watch::Sender<State>,
    /// The source sends half of its memory and then waits for this.
    pub finish: Notify,
    /// The source waits at all.
    pub slow: AtomicBool,
    /// The target refuses the go.
    pub deaf: AtomicBool,
    /// How often the source was told to take another link. It has not heard that there is anything wrong with the one it has.
    pub told: AtomicU32,
    /// The target refuses to prepare, in these words.
    pub refuses: std::sync::Mutex<Option<(Cause, &'static str)>>,
    cancel: Notify,
    carrier: Carrier,
    server: std::sync::Mutex<Option<tokio::task::JoinHandle<()>>>,
}

impl std::ops::Deref for Launcher {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(server) = self.server.lock().unwrap().take() {
            server.abort();
        }
    }
}

impl Launcher {
    /// Listens in `dir`.
    pub fn start(dir: PathBuf) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        let listener = UnixListener::bind(dir.join("launcher.sock")).unwrap();
        let launcher = Self(Arc::new(Inner {
            carrier: Carrier::new(dir.clone()),
            dir,
            state: watch::channel(State::default()).0,
            finish: Notify::new(),
            slow: AtomicBool::new(false),
            deaf: AtomicBool::new(false),
            told: AtomicU32::new(0),
            refuses: std::sync::Mutex::new(None),
            cancel: Notify::new(),
            server: std::sync::Mutex::new(None),
        }));
        let router = Router::new()
            .route("/v1/state", get(|Shared(l): Shared<Launcher>| async move { Json(l.now()) }))
            .route("/v1/watch", get(watch_states))
            .route("/v1/vm", put(vm))
            .route("/v1/migration/target", put(target))
            .route("/v1/migration/source", put(source))
            .route("/v1/migration/cancel", post(cancel))
            .route(rpc::MIGRATION_POST_COPY, post(post_copy))
            .route(rpc::MIGRATION_PAUSE, post(pause_to_migrate))
            .route(rpc::MIGRATION_CARRY, post(carry))
            .route("/v1/migration/go", post(go))
            .route(rpc::MIGRATION_RECOVER, post(recover))
            .route("/v1/migration/abandon", post(abandon))
            .route("/v1/shutdown", post(shutdown))
            .with_state(launcher.clone());
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        *launcher.server.lock().unwrap() = Some(server);
        launcher
    }

    pub fn now(&self) -> State {
        let mut state = self.state.borrow().clone();
        self.carrier.tell(&mut state);
        state
    }

    /// It knows how to carry memory.
    pub fn newer(self) -> Self {
        self.change(|s| s.carries_streams = true);
        self
    }

    /// How many bytes of memory have gone through it.
    pub fn carried(&self) -> u64 {
        self.now().migration.and_then(|m| m.carried).map_or(0, |carried| carried.out + carried.back)
    }

    /// Whether this launcher's guest executes.
    pub fn executes(&self) -> bool {
        self.now().phase == DomainPhase::Running && !self.is_held()
    }

    /// Whether it stands still for its migration.
    pub fn is_held(&self) -> bool {
        self.now().migration.is_some_and(|m| m.paused_by_migration)
    }

    /// Whether this launcher was told that its guest's departure is known.
    pub fn is_dismissed(&self) -> bool {
        let state = self.now();
        state.phase == DomainPhase::MigratedAway && state.exit_reason.is_some()
    }

    /// Somebody pauses the guest.
    pub fn pause(&self) {
        self.change(|s| s.phase = DomainPhase::Paused);
    }

    /// Its post-copy has lost its link.
    pub fn lose_link(&self) {
        self.facts(|f| {
            f.status = "postcopy-paused".into();
            f.cause = Some(Cause::LinkLost);
        });
    }

    /// Its post-copy could get over a broken link.
    pub fn recoverable(&self) {
        self.facts(|f| f.recoverable = true);
    }

    /// Whoever carries its memory breaks off.
    pub fn cut(&self) {
        self.carrier.cut();
    }

    /// What came could not be loaded; QEMU lives on.
    pub fn fail_to_load(&self) {
        self.facts(|f| {
            (f.status, f.loaded) = ("failed".into(), false);
            f.error = Some("error while loading state section id 1(ram)".into());
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) -> State {
        self.state.send_modify(change);
        self.now()
    }

    fn facts(&self, change: impl FnOnce(&mut MigrationFacts)) {
        self.state.send_modify(|s| change(s.migration.as_mut().unwrap()));
    }
}

fn us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}

fn conflict(message: &str) -> Response {
    let body = ErrorBody { reason: Refusal::Conflict, message: message.into(), cause: None };
    (StatusCode::CONFLICT, Json(body)).into_response()
}

async fn watch_states(Shared(launcher): Shared<Launcher>) -> Response {
    let mut states = launcher.state.subscribe();
    states.mark_changed();
    let lines = futures::stream::unfold((states, launcher), |(mut states, launcher)| async move {
        loop {
            match tokio::time::timeout(LOOK_EVERY, states.changed()).await {
                Ok(changed) => break changed.ok()?,
                // What is carried changes by itself.
                Err(_) if launcher.now().migration.is_some_and(|m| m.carried.is_some()) => break,
                Err(_) => {}
            }
        }
        states.mark_unchanged();
        let line = serde_json::to_string(&launcher.now()).unwrap() + "\n";
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(line)), (states, launcher)))
    });
    axum::body::Body::from_stream(lines.boxed()).into_response()
}

async fn vm(Shared(launcher): Shared<Launcher>, Json(order): Json<VmOrder>) -> Json<State> {
    Json(launcher.change(|s| {
        s.vmi_uid = order.vmi.uid().to_owned();
        s.phase = DomainPhase::Running;
    }))
}

async fn target(Shared(launcher): Shared<Launcher>, Json(order): Json<TargetOrder>) -> Response {
    if let Some((cause, message)) = *launcher.refuses.lock().unwrap() {
        let body = ErrorBody { reason: Refusal::Failed, message: message.into(), cause: Some(cause) };
        return (StatusCode::INTERNAL_SERVER_ERROR, Json(body)).into_response();
    }
    let path = launcher.dir.join("in.sock");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(path).unwrap();
    launcher.change(|s| {
        s.phase = DomainPhase::Incoming;
        s.migration = Some(MigrationFacts::new(order.migration_uid, MigrationRole::Target));
    });
    let ready = TargetReady {
        socket: "in.sock".into(),
        blocks_socket: None,
        post_copy: order.allow_post_copy,
        awaits_transport: false,
        by_reference: false,
        ability: Ability::default(),
        rooms: Default::default(),
    };
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        launcher.facts(|f| f.status = "active".into());
        let mut memory = vec![0; STREAM];
        // The first byte of the second half tells whether it comes in post-copy.
        if stream.read_exact(&mut memory[..=STREAM / 2]).await.is_err() {
            launcher.change(|s| s.phase = DomainPhase::Crashed);
            return;
        }
        if memory[STREAM / 2] == POST_COPY {
            launcher.facts(|f| {
                f.status = "postcopy-active".into();
                f.mode = MigrationMode::PostCopy;
                f.loaded = true;
            });
        }
        if stream.read_exact(&mut memory[STREAM / 2 + 1..]).await.is_err() {
            if !launcher.now().migration.is_some_and(|m| m.recoverable) {
                launcher.change(|s| s.phase = DomainPhase::Crashed);
            }
            return;
        }
        launcher.facts(|f| {
            f.status = "completed".into();
            f.loaded = true;
        });
        // The return path: the source may call it complete only now.
        let _ = stream.write_all(b"k").await;
    });
    Json(ready).into_response()
}

async fn source(Shared(launcher): Shared<Launcher>, Json(order): Json<SourceOrder>) -> Response {
    if launcher.now().migration.is_some_and(|m| m.uid == order.migration_uid) {
        return conflict("this migration has run before");
    }
    let state = launcher.change(|s| {
        let mut facts = MigrationFacts::new(order.migration_uid, MigrationRole::Source);
        facts.status = "active".into();
        facts.start_us = Some(us());
        facts.total_bytes = STREAM as u64;
        facts.remaining_bytes = STREAM as u64;
        facts.post_copy_possible = order.allow_post_copy;
        facts.guest_paused = s.phase == DomainPhase::Paused;
        s.migration = Some(facts);
    });
    tokio::spawn(async move {
        let sending = async {
            let mut stream = UnixStream::connect(launcher.dir.join(&order.socket)).await?;
            stream.write_all(&vec![1; STREAM / 2]).await?;
            let mut left = STREAM / 2;
            if launcher.slow.load(Ordering::SeqCst) {
                let mut byte = [0];
                let mut states = launcher.state.subscribe();
                let switched = async { states.wait_for(|s| s.phase == DomainPhase::HandedOver).await.map(drop) };
                tokio::select! {
                    () = launcher.finish.notified() => {}
                    _ = switched => {
                        stream.write_all(&[POST_COPY]).await?;
                        left -= 1;
                        tokio::select! {
                            () = launcher.finish.notified() => {}
                            _ = stream.read(&mut byte) => {
                                if launcher.now().migration.is_some_and(|m| m.recoverable) {
                                    drop(stream);
                                    return std::future::pending().await;
                                }
                                launcher.finish.notified().await;
                            }
                        }
                    }
                    _ = stream.read(&mut byte) => return Err(std::io::ErrorKind::BrokenPipe.into()),
                }
            }
            stream.write_all(&vec![1; left]).await?;
            launcher.facts(|f| f.stop_us = f.stop_us.or(Some(us())));
            stream.read_exact(&mut [0]).await.map(drop)
        };
        tokio::select! {
            sent = sending => match sent {
                Ok(()) => {
                    launcher.change(|s| {
                        s.phase = DomainPhase::MigratedAway;
                        if let Some(f) = &mut s.migration {
                            f.status = "completed".into();
                            f.handed_over = true;
                            f.paused_by_migration = false;
                            f.remaining_bytes = 0;
                            f.end_us = Some(us());
                        }
                    });
                }
                Err(error) => launcher.facts(|f| {
                    f.status = "failed".into();
                    f.cause = Some(Cause::LinkLost);
                    f.end_us = Some(us());
                    f.error = Some(error.to_string());
                }),
            },
            () = launcher.cancel.notified() => launcher.facts(|f| f.status = "cancelled".into()),
        }
    });
    Json(state).into_response()
}

async fn carry(Shared(launcher): Shared<Launcher>, Json(order): Json<CarryOrder>) -> Response {
    match launcher.carrier.carry(order, launcher.state.subscribe()).await {
        Ok(()) => Json(launcher.now()).into_response(),
        Err(refused) => conflict(&refused.message),
    }
}

async fn cancel(Shared(launcher): Shared<Launcher>, Json(_): Json<MigrationRef>) -> Json<State> {
    launcher.cancel.notify_one();
    Json(launcher.now())
}

async fn post_copy(Shared(launcher): Shared<Launcher>, Json(_): Json<MigrationRef>) -> Json<State> {
    Json(launcher.change(|s| {
        s.phase = DomainPhase::HandedOver;
        if let Some(f) = &mut s.migration {
            f.status = "postcopy-active".into();
            f.mode = MigrationMode::PostCopy;
            f.handed_over = true;
            f.stop_us = Some(us());
        }
    }))
}

async fn pause_to_migrate(Shared(launcher): Shared<Launcher>, Json(_): Json<MigrationRef>) -> Json<State> {
    Json(launcher.change(|s| {
        // As the real one has it: the phase is what the user wanted.
        if let Some(f) = &mut s.migration {
            f.mode = MigrationMode::Paused;
            f.paused_by_migration = true;
            f.stop_us = Some(us());
        }
    }))
}

async fn go(Shared(launcher): Shared<Launcher>, Json(order): Json<GoOrder>) -> Response {
    let Some(facts) = launcher.now().migration.filter(|m| m.uid == order.migration_uid) else {
        return conflict("no such migration");
    };
    if !facts.loaded || launcher.deaf.load(Ordering::SeqCst) {
        return conflict("not now");
    }
    if !facts.gone {
        let phase = if order.paused { DomainPhase::Paused } else { DomainPhase::Running };
        launcher.change(|s| s.phase = phase);
        launcher.facts(|f| {
            f.gone = true;
            f.resume_us = (!order.paused).then(us);
        });
    }
    Json(launcher.now()).into_response()
}

/// The target waits for another link. The source's QEMU, before 8.2, thinks that it has one, and is given up in the end.
async fn recover(Shared(launcher): Shared<Launcher>, Json(_): Json<LinkOrder>) -> Response {
    if launcher.now().migration.is_some_and(|m| m.role == MigrationRole::Target) {
        launcher.cut();
        return Json(launcher.now()).into_response();
    }
    if launcher.told.fetch_add(1, Ordering::SeqCst) == 2 {
        launcher.facts(|f| {
            f.status = "failed".into();
            f.cause = Some(Cause::LinkLost);
        });
    }
    conflict("the link of a post-copy must be broken before another one can be taken")
}

async fn abandon(Shared(launcher): Shared<Launcher>, Json(_): Json<MigrationRef>) -> Response {
    if launcher.now().migration.is_some_and(|m| m.gone) {
        return conflict("the guest runs here");
    }
    Json(launcher.change(|s| s.phase = DomainPhase::Shutdown)).into_response()
}

async fn shutdown(Shared(launcher): Shared<Launcher>, Json(_): Json<ShutdownOrder>) -> Json<State> {
    Json(launcher.change(|s| {
        if s.phase != DomainPhase::MigratedAway {
            s.phase = DomainPhase::Shutdown;
        }
        s.exit_reason = Some("told to end".into());
    }))
}
