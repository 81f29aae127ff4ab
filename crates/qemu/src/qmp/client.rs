//! The connection: one task reads, one writes, callers wait for their id.

use super::commands::{self, Command};
use super::{Error, Event, Line};
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

/// How many events are kept for [`Qmp::events`] and for subscribers that come later.
const KEPT_EVENTS: usize = 1024;
/// How long a command may take; QEMU answers within a millisecond unless its main loop is stuck on a disk.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// QEMU's word for commands that do not wait for its main loop.
const OUT_OF_BAND: &str = "oob";

/// A client of one QEMU's monitor. Cheap to clone.
///
/// It has no public way to send an arbitrary command: what must never be said (a `cont` to a QEMU whose guest has left) can be
/// said only by the types of [`crate::instance`] that know it to be right.
#[derive(Clone)]
pub struct Qmp {
    shared: Arc<Mutex<Shared>>,
    lines: mpsc::UnboundedSender<Vec<u8>>,
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qmp").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Shared {
    next_id: u64,
    waiting: BTreeMap<u64, oneshot::Sender<Result<Value, super::Refusal>>>,
    next_event: u64,
    events: VecDeque<Event>,
    subscribers: Vec<mpsc::UnboundedSender<Event>>,
    closed: bool,
    /// QEMU takes commands that do not wait for its main loop.
    oob: bool,
}

/// A poisoned lock only means that a caller panicked; the data are whole, since nothing in between can fail.
fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The events from the first one kept on, in order.
#[derive(Debug)]
pub struct Events {
    receiver: mpsc::UnboundedReceiver<Event>,
}

impl Events {
    /// The next event; `None` when the monitor has closed.
    pub async fn next(&mut self) -> Option<Event> {
        self.receiver.recv().await
    }

    /// The next event if it is there already.
    pub fn try_next(&mut self) -> Option<Event> {
        self.receiver.try_recv().ok()
    }
}

impl Qmp {
    /// Connects to the monitor's socket and negotiates. Tries again until `limit` has passed, since QEMU makes the socket a
    /// moment after it starts.
    pub async fn connect(socket: &Path, limit: Duration) -> Result<Qmp, Error> {
        let failed = |message: String| Error::Connect { socket: socket.into(), message };
        let work = async {
            loop {
                match UnixStream::connect(socket).await {
                    Ok(stream) => return Qmp::over(stream).await,
                    Err(e)
                        if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) =>
                    {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    Err(e) => return Err(failed(e.to_string())),
                }
            }
        };
        match tokio::time::timeout(limit, work).await {
            Ok(result) => result,
            Err(_) => Err(failed(format!("no answer within {limit:?}"))),
        }
    }

    /// Negotiates over a stream that is connected already.
    pub async fn over<S>(stream: S) -> Result<Qmp, Error>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read, mut write) = tokio::io::split(stream);
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (lines, mut queue) = mpsc::unbounded_channel::<Vec<u8>>();
        let (greeted, greeting) = oneshot::channel::<Vec<String>>();
        // Lines are written whole by a task of their own: a caller that gives up half-way cannot leave half a line behind.
        tokio::spawn(async move {
            while let Some(line) = queue.recv().await {
                if write.write_all(&line).await.is_err() {
                    break;
                }
            }
        });
        tokio::spawn(read_all(read, Arc::downgrade(&shared), greeted));
        let qmp = Qmp { shared, lines };
        let Ok(offers) = greeting.await else { return Err(Error::Closed { command: "greeting".into() }) };
        let oob = offers.iter().any(|offer| offer == OUT_OF_BAND);
        qmp.execute(&commands::QmpCapabilities { enable: oob.then_some(OUT_OF_BAND).into_iter().collect() }).await?;
        lock(&qmp.shared).oob = oob;
        Ok(qmp)
    }

    /// Sends a command and waits for its answer.
    pub(crate) async fn execute<C: Command>(&self, command: &C) -> Result<C::Answer, Error> {
        self.send("execute", command).await
    }

    /// The same for a command that must not wait for QEMU's main loop, where QEMU can (`exec-oob`).
    pub(crate) async fn execute_now<C: Command>(&self, command: &C) -> Result<C::Answer, Error> {
        let how = if lock(&self.shared).oob { "exec-oob" } else { "execute" };
        self.send(how, command).await
    }

    async fn send<C: Command>(&self, how: &str, command: &C) -> Result<C::Answer, Error> {
        let unreadable = |e: serde_json::Error| Error::Unreadable { command: C::NAME.into(), message: e.to_string() };
        let arguments = serde_json::to_value(command).map_err(unreadable)?;
        let answer = self.call(how, C::NAME, arguments).await?;
        serde_json::from_value(answer).map_err(unreadable)
    }

    async fn call(&self, how: &str, command: &str, arguments: Value) -> Result<Value, Error> {
        let closed = || Error::Closed { command: command.into() };
        let (tell, told) = oneshot::channel();
        let id = {
            let mut shared = lock(&self.shared);
            if shared.closed {
                return Err(closed());
            }
            shared.next_id += 1;
            let id = shared.next_id;
            shared.waiting.insert(id, tell);
            id
        };
        let mut line = json!({how: command, "arguments": arguments, "id": id}).to_string().into_bytes();
        line.push(b'\n');
        tracing::trace!(command, %arguments, "to QEMU");
        if self.lines.send(line).is_err() {
            lock(&self.shared).waiting.remove(&id);
            return Err(closed());
        }
        match tokio::time::timeout(ANSWER_LIMIT, told).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(refusal))) => {
                Err(Error::Refused { command: command.into(), class: refusal.class, description: refusal.desc })
            }
            Ok(Err(_)) => Err(closed()),
            Err(_) => {
                lock(&self.shared).waiting.remove(&id);
                Err(Error::Timeout { command: command.into(), after: ANSWER_LIMIT })
            }
        }
    }

    /// All events from the first one kept on, then each as it comes.
    pub fn subscribe(&self) -> Events {
        let (tell, receiver) = mpsc::unbounded_channel();
        let mut shared = lock(&self.shared);
        for event in &shared.events {
            let _ = tell.send(event.clone());
        }
        if !shared.closed {
            shared.subscribers.push(tell);
        }
        Events { receiver }
    }

    /// The events kept so far.
    pub fn events(&self) -> Vec<Event> {
        lock(&self.shared).events.iter().cloned().collect()
    }

    /// How many events there have been: the number that the next one will get.
    pub fn event_count(&self) -> u64 {
        lock(&self.shared).next_event
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        lock(&self.shared).closed
    }
}

async fn read_all(
    read: impl AsyncRead + Unpin,
    shared: std::sync::Weak<Mutex<Shared>>,
    greeted: oneshot::Sender<Vec<String>>,
) {
    let mut greeted = Some(greeted);
    let mut lines = BufReader::new(read).split(b'\n');
    // A last line without its end is half a message of a QEMU that died: `split` would hand it out, parsing refuses it.
    while let Ok(Some(line)) = lines.next_segment().await {
        let Some(shared) = shared.upgrade() else { return };
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match serde_json::from_slice::<Line>(&line) {
            Ok(line) => take(&shared, line, &mut greeted),
            Err(error) => {
                tracing::warn!(%error, line = %String::from_utf8_lossy(&line), "a line of QEMU's monitor cannot be read");
            }
        }
    }
    if let Some(shared) = shared.upgrade() {
        let mut shared = lock(&shared);
        shared.closed = true;
        shared.waiting.clear();
        shared.subscribers.clear();
    }
}

fn take(shared: &Mutex<Shared>, line: Line, greeted: &mut Option<oneshot::Sender<Vec<String>>>) {
    if let Some(greeting) = line.greeting {
        if let Some(greeted) = greeted.take() {
            let offers = greeting.get("capabilities").cloned().unwrap_or_default();
            let _ = greeted.send(serde_json::from_value(offers).unwrap_or_default());
        }
        return;
    }
    if let Some(name) = line.event {
        let at_us = line.timestamp.map_or(0, |t| t.seconds.saturating_mul(1_000_000).saturating_add(t.microseconds));
        let mut shared = lock(shared);
        let event = Event { number: shared.next_event, at_us, name, data: line.data.unwrap_or(Value::Null) };
        tracing::debug!(event = %event.name, data = %event.data, "from QEMU");
        shared.next_event += 1;
        if shared.events.len() == KEPT_EVENTS {
            shared.events.pop_front();
        }
        shared.events.push_back(event.clone());
        shared.subscribers.retain(|s| s.send(event.clone()).is_ok());
        return;
    }
    let waiting = line.id.as_ref().and_then(Value::as_u64).and_then(|id| lock(shared).waiting.remove(&id));
    let result = match (line.answer, line.error) {
        (_, Some(refusal)) => Err(refusal),
        (Some(answer), None) => Ok(answer),
        (None, None) => return,
    };
    match (waiting, result) {
        (Some(waiting), result) => {
            let _ = waiting.send(result);
        }
        (None, Err(refusal)) => tracing::warn!(class = refusal.class, desc = refusal.desc, "QEMU reports an error"),
        (None, Ok(_)) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::DuplexStream;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";

    /// Plays QEMU: greets, accepts the negotiation, and hands the rest to the test.
    async fn pair() -> (Qmp, BufReader<DuplexStream>) {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let mut qemu = BufReader::new(theirs);
        let (qmp, ()) = tokio::join!(Qmp::over(ours), async {
            qemu.write_all(GREETING.as_bytes()).await.unwrap();
            let asked = receive(&mut qemu).await;
            assert_eq!(asked["execute"], "qmp_capabilities");
            assert_eq!(asked["arguments"], json!({"enable": ["oob"]}));
            qemu.write_all(format!("{{\"return\": {{}}, \"id\": {}}}\n", asked["id"]).as_bytes()).await.unwrap();
        });
        (qmp.unwrap(), qemu)
    }

    async fn receive(qemu: &mut BufReader<DuplexStream>) -> Value {
        let mut line = String::new();
        qemu.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    #[tokio::test]
    async fn answers_find_their_commands_out_of_order_and_around_events() {
        let (qmp, mut qemu) = pair().await;
        let (one, two, ()) = tokio::join!(
            qmp.call("execute", "a", json!({})),
            qmp.call("execute", "b", json!({})),
            async {
                let (a, b) = (receive(&mut qemu).await, receive(&mut qemu).await);
                let text = format!(
                    "{{\"return\": \"{}\", \"id\": {}, \"news\": 1}}\n{{\"event\":\"STOP\",\"timestamp\":{{\"seconds\":2,\
                 \"microseconds\":5}}}}\n{{\"return\": \"{}\", \"id\": {}}}\n",
                    b["execute"].as_str().unwrap(),
                    b["id"],
                    a["execute"].as_str().unwrap(),
                    a["id"]
                );
                // Byte by byte: lines need not come whole.
                for byte in text.bytes() {
                    qemu.write_all(&[byte]).await.unwrap();
                }
            }
        );
        assert_eq!((one.unwrap(), two.unwrap()), (json!("a"), json!("b")));
        let events = qmp.events();
        assert_eq!((events.len(), events[0].at_us, events[0].name.as_str()), (1, 2_000_005, "STOP"));
    }

    #[tokio::test]
    async fn a_refusal_names_command_class_and_sentence() {
        let (qmp, mut qemu) = pair().await;
        let (answer, ()) = tokio::join!(qmp.call("execute", "cont", json!({})), async {
            let asked = receive(&mut qemu).await;
            let line = format!(
                "{{\"id\": {}, \"error\": {{\"class\": \"GenericError\", \"desc\": \"no lock\"}}}}\n",
                asked["id"]
            );
            qemu.write_all(line.as_bytes()).await.unwrap();
        });
        assert_eq!(answer.unwrap_err().to_string(), "QEMU refused `cont`: no lock (GenericError)");
    }

    #[tokio::test]
    async fn a_closed_monitor_fails_waiting_and_later_commands_and_ends_subscriptions() {
        let (qmp, mut qemu) = pair().await;
        let mut events = qmp.subscribe();
        let (answer, ()) = tokio::join!(qmp.call("execute", "query-status", json!({})), async {
            receive(&mut qemu).await;
            qemu.write_all(b"{\"event\": \"SHUTD").await.unwrap();
            drop(qemu);
        });
        assert!(answer.unwrap_err().is_closed());
        assert!(events.next().await.is_none());
        assert!(qmp.call("execute", "query-status", json!({})).await.unwrap_err().is_closed());
        assert!(qmp.is_closed());
    }

    #[tokio::test]
    async fn a_late_subscriber_sees_every_event_once_and_in_order() {
        let (qmp, mut qemu) = pair().await;
        for n in 0..3 {
            qemu.write_all(format!("{{\"event\":\"E{n}\"}}\nnot json\n").as_bytes()).await.unwrap();
        }
        let mut early = qmp.subscribe();
        for n in 0..3 {
            assert_eq!(early.next().await.unwrap().name, format!("E{n}"));
        }
        let mut late = qmp.subscribe();
        qemu.write_all(b"{\"event\":\"E3\", \"data\": {\"status\": \"x\"}}\n").await.unwrap();
        for n in 0..4 {
            let event = late.next().await.unwrap();
            assert_eq!((event.name, event.number), (format!("E{n}"), n));
        }
        assert_eq!(early.next().await.unwrap().text("status"), Some("x"));
    }
}
