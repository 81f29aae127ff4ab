//! The RPC's door: HTTP on `launcher.sock`.

use crate::agent;
use crate::carry::Carrier;
use crate::fence::Fence;
use crate::rpc::{self, CarriedFacts, DomainPhase, ErrorBody, MigrationMode, Refusal, State};
use crate::vm::{Answer, Order, Refused, Request};
use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State as Shared};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use bytes::Bytes;
use http::{StatusCode, header};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

/// Most bytes of an order; a VMI is a few KiB.
const LARGEST_ORDER: usize = 4 << 20;
/// Between two looks of the watch at what is carried, where the VM's task says nothing: it may wait for a QEMU whose memory flows.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The watch sends changes of numbers no more often than this.
const PACE: Duration = Duration::from_millis(100);

#[derive(Clone)]
struct Door {
    orders: mpsc::Sender<Request>,
    state: watch::Receiver<State>,
    fence: Fence,
    carrier: Carrier,
    /// Where the guest agent is.
    agent: PathBuf,
}

/// The routes of docs/architecture.md, "Launcher RPC".
pub fn router(
    orders: mpsc::Sender<Request>,
    state: watch::Receiver<State>,
    fence: Fence,
    carrier: Carrier,
    agent: PathBuf,
) -> Router {
    Router::new()
        .route(rpc::STATE, get(state_now))
        .route(rpc::WATCH, get(watch_states))
        .route(rpc::EVENTS, get(|door: Shared<Door>| order(door, Order::Events)))
        .route(rpc::VM, put(|door, body| with(door, body, |o| Order::Start(Box::new(o)))))
        .route(rpc::DISKS, put(|door, body| with(door, body, |o| Order::Disks(Box::new(o)))))
        .route(rpc::MIGRATION_TARGET, put(|door, body| with(door, body, |o| Order::Target(Box::new(o)))))
        .route(rpc::MIGRATION_SOURCE, put(|door, body| with(door, body, Order::Source)))
        .route(rpc::MIGRATION_CANCEL, post(|door, body| with(door, body, Order::Cancel)))
        .route(rpc::MIGRATION_TRANSPORT, put(|door, body| with(door, body, Order::Transport)))
        .route(rpc::MIGRATION_LEND, post(|door, body| with(door, body, Order::Lend)))
        .route(rpc::MIGRATION_CARRY, post(carry))
        .route(rpc::MIGRATION_POST_COPY, post(|door, body| with(door, body, Order::PostCopy)))
        .route(rpc::MIGRATION_PAUSE, post(|door, body| with(door, body, Order::PauseToMigrate)))
        .route(rpc::MIGRATION_GO, post(|door, body| with(door, body, Order::Go)))
        .route(rpc::MIGRATION_RECOVER, post(|door, body| with(door, body, Order::Recover)))
        .route(rpc::MIGRATION_ABANDON, post(|door, body| with(door, body, Order::Abandon)))
        .route(rpc::SHUTDOWN, post(|door, body| with(door, body, Order::Shutdown)))
        .route(rpc::MEASURE, post(|door: Shared<Door>| order(door, Order::Measure)))
        .route(rpc::PAUSE, post(|door: Shared<Door>| order(door, Order::Pause)))
        .route(rpc::RUN_UNTIL, put(run_until))
        .route(rpc::UNPAUSE, post(|door: Shared<Door>| order(door, Order::Unpause)))
        .route(rpc::RESET, post(|door: Shared<Door>| order(door, Order::Reset)))
        .route(rpc::REBOOT, post(reboot))
        .route(rpc::GUEST, get(guest))
        .fallback(|| async { refuse(Refusal::NotFound, "no such call".into()) })
        .method_not_allowed_fallback(|| async { refuse(Refusal::NotFound, "no such method on this call".into()) })
        .layer(DefaultBodyLimit::max(LARGEST_ORDER))
        .with_state(Door { orders, state, fence, carrier, agent })
}

async fn with<T: DeserializeOwned>(door: Shared<Door>, body: Bytes, make: impl FnOnce(T) -> Order) -> Response {
    match serde_json::from_slice(&body) {
        Ok(parsed) => order(door, make(parsed)).await,
        Err(error) => refuse(Refusal::BadRequest, format!("the order cannot be read: {error}")),
    }
}

/// Past the VM's task, which may be waiting for a QEMU that hangs.
async fn run_until(Shared(door): Shared<Door>, body: Bytes) -> Response {
    match serde_json::from_slice::<rpc::RunUntilOrder>(&body) {
        Ok(order) => door.fence.run_until(order.deadline()),
        Err(error) => return refuse(Refusal::BadRequest, format!("the order cannot be read: {error}")),
    }
    state_now(Shared(door)).await
}

/// Past it too: QEMU and the guest have no part in it.
async fn carry(Shared(door): Shared<Door>, body: Bytes) -> Response {
    let order = match serde_json::from_slice::<rpc::CarryOrder>(&body) {
        Ok(order) => order,
        Err(error) => return refuse(Refusal::BadRequest, format!("the order cannot be read: {error}")),
    };
    match door.carrier.carry(order, door.state.clone()).await {
        Ok(()) => state_now(Shared(door)).await,
        Err(Refused { reason, message, cause }) => refuse_for(reason, message, cause),
    }
}

async fn order(Shared(door): Shared<Door>, order: Order) -> Response {
    let (reply, answer) = oneshot::channel();
    let gone = || refuse(Refusal::Failed, "the launcher is ending".into());
    if door.orders.send(Request { order, reply }).await.is_err() {
        return gone();
    }
    match answer.await {
        Ok(Ok(Answer::State(state))) => json(StatusCode::OK, &*state),
        Ok(Ok(Answer::Ready(ready))) => json(StatusCode::OK, &ready),
        Ok(Ok(Answer::Events(events))) => json(StatusCode::OK, &events),
        Ok(Err(Refused { reason, message, cause })) => refuse_for(reason, message, cause),
        Err(_) => gone(),
    }
}

fn json(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(bytes) => (status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn refuse(reason: Refusal, message: String) -> Response {
    refuse_for(reason, message, None)
}

fn refuse_for(reason: Refusal, message: String, cause: Option<rpc::Cause>) -> Response {
    let status = match reason {
        Refusal::BadRequest => StatusCode::BAD_REQUEST,
        Refusal::NotFound => StatusCode::NOT_FOUND,
        Refusal::Conflict => StatusCode::CONFLICT,
        Refusal::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
        Refusal::Unsupported => StatusCode::NOT_IMPLEMENTED,
        Refusal::Failed => StatusCode::INTERNAL_SERVER_ERROR,
    };
    json(status, &ErrorBody { reason, message, cause })
}

/// A guest whose agent can be talked to. The channel carries one talk at a time; QEMU lets the next one wait.
fn has_agent(door: &Door) -> Result<(), Box<Response>> {
    let why = {
        let state = door.state.borrow();
        match state.phase {
            DomainPhase::Running if state.guest_agent.connected => return Ok(()),
            DomainPhase::Running => "its guest agent does not answer",
            DomainPhase::Paused => "the guest is paused",
            _ => "no guest runs here",
        }
    };
    Err(Box::new(refuse(Refusal::Conflict, format!("the guest agent cannot be asked: {why}"))))
}

async fn reboot(Shared(door): Shared<Door>) -> Response {
    if has_agent(&door).is_err() {
        return order(Shared(door), Order::Reboot).await;
    }
    match agent::reboot(&door.agent).await {
        Ok(()) => state_now(Shared(door)).await,
        Err(agent::Error::Refused { unknown: true, .. }) => order(Shared(door), Order::Reboot).await,
        Err(error) => refuse(Refusal::Failed, error.to_string()),
    }
}

async fn guest(Shared(door): Shared<Door>) -> Response {
    if let Err(refused) = has_agent(&door) {
        return *refused;
    }
    match agent::answers(&door.agent).await {
        Ok(answers) => json(StatusCode::OK, &answers),
        Err(error) => refuse(Refusal::Failed, error.to_string()),
    }
}

async fn state_now(Shared(door): Shared<Door>) -> Response {
    let mut state = door.state.borrow().clone();
    door.carrier.tell(&mut state);
    json(StatusCode::OK, &state)
}

async fn watch_states(Shared(door): Shared<Door>) -> Response {
    // The first line is the state now.
    let mut states = Told { states: door.state, carrier: door.carrier };
    states.states.mark_changed();
    let lines = futures::stream::unfold((states, None), |(mut states, last)| async move {
        let state = states.next(last.as_ref()).await?;
        let mut line = serde_json::to_vec(&state).ok()?;
        line.push(b'\n');
        let sent = Sent { phase: state.phase, turn: turn(&state), carried: carried(&state), at: Instant::now() };
        Some((Ok::<_, Infallible>(Bytes::from(line)), (states, Some(sent))))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

struct Sent {
    phase: DomainPhase,
    turn: Turn,
    carried: Option<CarriedFacts>,
    at: Instant,
}

/// The parts of a migration that somebody waits for, as opposed to its numbers.
type Turn = Option<(String, String, [bool; 5], MigrationMode)>;

fn turn(state: &State) -> Turn {
    state.migration.as_ref().map(|m| {
        let flags = [m.loaded, m.gone, m.handed_over, m.paused_by_migration, m.resume_us.is_some()];
        (m.uid.clone(), m.status.clone(), flags, m.mode)
    })
}

fn carried(state: &State) -> Option<CarriedFacts> {
    state.migration.as_ref().and_then(|m| m.carried.clone())
}

/// What the watch tells.
struct Told {
    states: watch::Receiver<State>,
    carrier: Carrier,
}

impl Told {
    fn now(&mut self) -> State {
        let mut state = self.states.borrow_and_update().clone();
        self.carrier.tell(&mut state);
        state
    }

    /// The next state worth a line: turns at once, numbers at a pace. `None` at the launcher's end, after its last state.
    async fn next(&mut self, last: Option<&Sent>) -> Option<State> {
        let Some(last) = last else {
            self.states.changed().await.ok()?;
            return Some(self.now());
        };
        loop {
            match tokio::time::timeout(LOOK_EVERY, self.states.changed()).await {
                Ok(changed) => break changed.ok()?,
                Err(_) => {
                    let state = self.now();
                    if carried(&state) != last.carried {
                        return Some(state);
                    }
                }
            }
        }
        loop {
            let state = self.now();
            if state.phase != last.phase || turn(&state) != last.turn {
                return Some(state);
            }
            // Whatever comes within the pace replaces this; after it, this is sent.
            match tokio::time::timeout_at(last.at + PACE, self.states.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Some(state),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> (watch::Sender<State>, Told) {
        let (tell, mut states) = watch::channel(State::default());
        states.mark_changed();
        (tell, Told { states, carrier: Carrier::new(PathBuf::new()) })
    }

    #[tokio::test]
    async fn the_watch_tells_turns_at_once_and_the_last_state_before_the_end() {
        let (tell, mut states) = told();
        assert_eq!(states.next(None).await.unwrap().phase, DomainPhase::Undefined);
        let sent = Sent { phase: DomainPhase::Undefined, turn: None, carried: None, at: Instant::now() };
        tell.send_modify(|s| s.launcher_rss_bytes = Some(1));
        tell.send_modify(|s| s.phase = DomainPhase::Running);
        assert_eq!(states.next(Some(&sent)).await.unwrap().phase, DomainPhase::Running);
        tell.send_modify(|s| s.phase = DomainPhase::Shutdown);
        drop(tell);
        let sent = Sent { phase: DomainPhase::Running, ..sent };
        assert_eq!(states.next(Some(&sent)).await.unwrap().phase, DomainPhase::Shutdown);
        assert!(states.next(Some(&Sent { phase: DomainPhase::Shutdown, ..sent })).await.is_none());
    }

    #[tokio::test]
    async fn numbers_come_at_a_pace_and_none_is_lost() {
        let (tell, mut states) = told();
        states.next(None).await.unwrap();
        let sent = Sent { phase: DomainPhase::Undefined, turn: None, carried: None, at: Instant::now() };
        for n in 1..=5 {
            tell.send_modify(|s| s.launcher_rss_bytes = Some(n));
        }
        assert_eq!(states.next(Some(&sent)).await.unwrap().launcher_rss_bytes, Some(5));
    }
}
