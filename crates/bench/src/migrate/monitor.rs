//! A QEMU monitor that takes any command. [`godwit_qemu::qmp`] does not, on purpose: there the types see to it that a guest never
//! runs twice. Here a person's hand is played, with nothing between it and QEMU.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

use super::Error;
use super::figures::{Moved, Sample};

/// How long QEMU may take from its start to its monitor's greeting, and for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// An event of QEMU's.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// QEMU's stamp, in microseconds since the Unix epoch.
    pub at_us: i64,
    /// Its name.
    pub name: String,
    /// The `status` in its data, if there is one.
    pub status: String,
}

type Waiting = Arc<Mutex<BTreeMap<u64, oneshot::Sender<Value>>>>;

/// A connection to one QEMU's monitor.
#[derive(Debug)]
pub struct Monitor {
    who: String,
    write: OwnedWriteHalf,
    waiting: Waiting,
    events: mpsc::UnboundedReceiver<Event>,
    next: u64,
}

impl Monitor {
    /// Connects and negotiates; `who` names the QEMU in messages. Tries again while the socket is not there yet.
    pub async fn connect(socket: &Path, who: &str) -> Result<Self, Error> {
        let failed = |message: String| Error::Monitor { who: who.to_owned(), message };
        let connected = tokio::time::timeout(PATIENCE, async {
            loop {
                match UnixStream::connect(socket).await {
                    Ok(stream) => return stream,
                    Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
                }
            }
        });
        let stream = connected.await.map_err(|_| failed(format!("no monitor after {} s", PATIENCE.as_secs())))?;
        let (read, write) = stream.into_split();
        let waiting = Waiting::default();
        let (tell, events) = mpsc::unbounded_channel();
        tokio::spawn(read_all(read, waiting.clone(), tell));
        let mut monitor = Self { who: who.to_owned(), write, waiting, events, next: 0 };
        monitor.execute("qmp_capabilities", json!({})).await?;
        Ok(monitor)
    }

    /// Sends a command and waits for its answer.
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let failed = |who: &str, message: String| Error::Monitor { who: who.to_owned(), message };
        self.next += 1;
        let (tell, told) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(self.next, tell);
        let line = json!({"execute": command, "arguments": arguments, "id": self.next}).to_string() + "\n";
        self.write.write_all(line.as_bytes()).await.map_err(|e| failed(&self.who, format!("`{command}`: {e}")))?;
        match tokio::time::timeout(PATIENCE, told).await {
            Ok(Ok(answer)) => match answer.get("error") {
                None => Ok(answer.get("return").cloned().unwrap_or_default()),
                Some(error) => Err(failed(&self.who, format!("refused `{command}`: {}", text(error, "desc")))),
            },
            Ok(Err(_)) => Err(failed(&self.who, format!("ended before it answered `{command}`"))),
            Err(_) => Err(failed(&self.who, format!("no answer to `{command}` in {} s", PATIENCE.as_secs()))),
        }
    }

    /// Switches migration capabilities on.
    pub async fn capabilities(&mut self, names: &[&str]) -> Result<(), Error> {
        let list: Vec<Value> = names.iter().map(|name| json!({"capability": name, "state": true})).collect();
        self.execute("migrate-set-capabilities", json!({"capabilities": list})).await.map(drop)
    }

    /// The next event; none when QEMU has ended.
    pub async fn event(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// An event that is there already.
    pub fn try_event(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }
}

fn text(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

async fn read_all(read: OwnedReadHalf, waiting: Waiting, events: mpsc::UnboundedSender<Event>) {
    let mut lines = BufReader::new(read).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Ok(message) = serde_json::from_str::<Value>(&line) else { continue };
        if let Some(event) = event(&message) {
            let _ = events.send(event);
        } else if let Some(id) = message.get("id").and_then(Value::as_u64) {
            let one = waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            if let Some(one) = one {
                let _ = one.send(message);
            }
        }
    }
    // Whoever waits learns that nothing will come.
    waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

fn event(message: &Value) -> Option<Event> {
    let name = message.get("event")?.as_str()?.to_owned();
    let number =
        |field: &str| message.pointer(&format!("/timestamp/{field}")).and_then(Value::as_i64).unwrap_or_default();
    let status = message.get("data").map(|data| text(data, "status")).unwrap_or_default();
    Some(Event { at_us: number("seconds") * 1_000_000 + number("microseconds"), name, status })
}

impl Moved {
    /// Notes a step that a QEMU tells of.
    pub fn note(&mut self, who: &str, event: &Event) {
        let name = match event.name.as_str() {
            "MIGRATION" => event.status.as_str(),
            "STOP" | "RESUME" => event.name.as_str(),
            _ => return,
        };
        self.steps.push((format!("{who} {name}"), (event.at_us - self.asked_us) as f64 / 1e3));
    }

    /// Takes the source's answer to `query-migrate`, given at this moment.
    pub fn look(&mut self, info: &Value, at_us: i64) {
        let at_ms = (at_us - self.sending_us.unwrap_or(self.asked_us)) as f64 / 1e3;
        self.samples.extend(sample(info, at_ms));
        self.passes = number(info, "/ram/dirty-sync-count").unwrap_or(self.passes);
    }

    /// The same when all is sent.
    pub fn last_look(&mut self, info: &Value, at_us: i64) {
        self.look(info, at_us);
        self.qemu_downtime_ms = number(info, "/downtime");
        self.qemu_bytes = number(info, "/ram/transferred");
    }
}

fn number(info: &Value, pointer: &str) -> Option<u64> {
    info.pointer(pointer).and_then(Value::as_u64)
}

fn sample(info: &Value, at_ms: f64) -> Option<Sample> {
    let page = number(info, "/ram/page-size").unwrap_or(4096);
    Some(Sample {
        at_ms,
        sent_bytes: number(info, "/ram/transferred")?,
        remaining_bytes: number(info, "/ram/remaining").unwrap_or_default(),
        dirty_bytes_per_second: number(info, "/ram/dirty-pages-rate").unwrap_or_default() * page,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_before_the_numbers_are_there_is_none() {
        assert_eq!(sample(&json!({"status": "setup"}), 1.0), None);
        let info = json!({"ram": {"transferred": 5, "remaining": 7, "dirty-pages-rate": 2, "page-size": 4096}});
        let seen = sample(&info, 1.0).unwrap();
        assert_eq!((seen.sent_bytes, seen.remaining_bytes, seen.dirty_bytes_per_second), (5, 7, 8192));
    }

    #[test]
    fn events_are_told_from_answers() {
        let line =
            json!({"timestamp": {"seconds": 3, "microseconds": 14}, "event": "MIGRATION", "data": {"status": "setup"}});
        let seen = event(&line).unwrap();
        assert_eq!((seen.at_us, seen.name.as_str(), seen.status.as_str()), (3_000_014, "MIGRATION", "setup"));
        assert_eq!(event(&json!({"return": {}, "id": 1})), None);
    }
}
