//! What the guest agent says: a small client of `qemu-ga`'s protocol (QEMU `docs/interop/qemu-ga-ref`).

use crate::rpc::{GuestAgentFacts, GuestAnswers, GuestInterface, GuestOs};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// How long the agent may take for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// How long it may take to set the clock: `qemu-ga` waits for `hwclock`, which waits for a full second of the hardware's.
const CLOCK_LIMIT: Duration = Duration::from_secs(20);
/// Most bytes of one answer: what a guest says is not trusted to be short.
const LONGEST_ANSWER: u64 = 1 << 20;

/// Why the agent gave no facts.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The channel does not work.
    #[error("the guest agent's channel: {0}")]
    Io(#[from] std::io::Error),
    /// No answer, mostly because no agent runs.
    #[error("the guest agent does not answer")]
    Silent,
    /// It said something else.
    #[error("the guest agent's answer cannot be read: {0}")]
    Unreadable(String),
    /// It does not do what it was asked for.
    #[error("the guest agent refuses {command}: {text}")]
    Refused {
        /// What it was asked for.
        command: &'static str,
        /// Its words.
        text: String,
        /// It does not know the command: asking again is for nothing.
        unknown: bool,
    },
}

/// Asks once for everything. What the agent of a guest does not know stays empty.
pub async fn ask(socket: &Path) -> Result<GuestAgentFacts, Error> {
    let mut agent = Agent::connect(socket).await?;
    let mut facts = GuestAgentFacts { connected: true, ..GuestAgentFacts::default() };
    if let Some(answer) = agent.ask("guest-get-host-name").await? {
        facts.hostname = answer.get("host-name").and_then(Value::as_str).map(str::to_owned);
    }
    if let Some(answer) = agent.ask("guest-get-osinfo").await? {
        facts.os = serde_json::from_value::<OsInfo>(answer).ok().map(Into::into);
    }
    if let Some(answer) = agent.ask("guest-network-get-interfaces").await? {
        let interfaces: Vec<Interface> = serde_json::from_value(answer).unwrap_or_default();
        facts.interfaces = interfaces.into_iter().filter(|i| i.name != "lo").map(Into::into).collect();
    }
    Ok(facts)
}

/// What is asked when somebody wants to know all that the agent can tell.
const QUESTIONS: [&str; 7] = [
    "guest-info",
    "guest-get-host-name",
    "guest-get-osinfo",
    "guest-get-timezone",
    "guest-get-users",
    "guest-get-fsinfo",
    "guest-fsfreeze-status",
];

/// The agent's own answers to all of it.
pub async fn answers(socket: &Path) -> Result<GuestAnswers, Error> {
    let mut agent = Agent::connect(socket).await?;
    let mut answers = GuestAnswers::new();
    for question in QUESTIONS {
        if let Some(answer) = agent.ask(question).await? {
            answers.insert(question.to_owned(), answer);
        }
    }
    Ok(answers)
}

/// Has the agent reboot the guest. It says nothing when it does.
pub async fn reboot(socket: &Path) -> Result<(), Error> {
    let mut agent = Agent::connect(socket).await?;
    match agent.call("guest-shutdown", json!({"mode": "reboot"})).await {
        Err(Error::Refused { command, text, unknown }) => Err(Error::Refused { command, text, unknown }),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Sets the guest's clock to this host's, and `ahead_seconds` ahead of it.
pub async fn set_clock(socket: &Path, ahead_seconds: i64) -> Result<(), Error> {
    let mut agent = Agent::connect(socket).await?;
    agent.limit = CLOCK_LIMIT;
    let now = jiff::Timestamp::now().as_nanosecond() + i128::from(ahead_seconds) * 1_000_000_000;
    let time = i64::try_from(now).map_err(|e| Error::Unreadable(e.to_string()))?;
    agent.call("guest-set-time", json!({"time": time})).await.map(drop)
}

struct Agent {
    limit: Duration,
    read: BufReader<tokio::net::unix::OwnedReadHalf>,
    write: tokio::net::unix::OwnedWriteHalf,
}

impl Agent {
    /// Connects and throws away whatever an earlier conversation has left in the channel.
    async fn connect(socket: &Path) -> Result<Agent, Error> {
        let (read, write) = UnixStream::connect(socket).await?.into_split();
        let mut agent = Agent { limit: ANSWER_LIMIT, read: BufReader::new(read), write };
        let id =
            u64::from(std::process::id()) << 16 | (jiff::Timestamp::now().as_microsecond().unsigned_abs() & 0xffff);
        let sync = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}}).to_string();
        // 0xff makes the agent's parser forget half a command; it answers with 0xff first.
        agent.write.write_all(&[&[0xff], sync.as_bytes(), b"\n"].concat()).await?;
        let mut old = Vec::new();
        agent.until(0xff, &mut old).await?;
        let answer = agent.line().await?;
        if answer.get("return").and_then(Value::as_u64) != Some(id) {
            return Err(Error::Unreadable("it answers another question".into()));
        }
        Ok(agent)
    }

    /// `None` when the agent does not know the command or fails at it.
    async fn ask(&mut self, command: &'static str) -> Result<Option<Value>, Error> {
        match self.call(command, json!({})).await {
            Ok(answer) => Ok(Some(answer)),
            Err(Error::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn call(&mut self, command: &'static str, arguments: Value) -> Result<Value, Error> {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.write.write_all(&[line.as_bytes(), b"\n"].concat()).await?;
        let mut answer = self.line().await?;
        if let Some(answer) = answer.get_mut("return") {
            return Ok(answer.take());
        }
        let word = |name| answer.pointer(name).and_then(Value::as_str).unwrap_or_default();
        let unknown = word("/error/class") == "CommandNotFound";
        Err(Error::Refused { command, text: word("/error/desc").into(), unknown })
    }

    async fn line(&mut self) -> Result<Value, Error> {
        let mut line = Vec::new();
        self.until(b'\n', &mut line).await?;
        serde_json::from_slice(&line).map_err(|e| Error::Unreadable(e.to_string()))
    }

    async fn until(&mut self, end: u8, into: &mut Vec<u8>) -> Result<(), Error> {
        let mut limited = (&mut self.read).take(LONGEST_ANSWER);
        match tokio::time::timeout(self.limit, limited.read_until(end, into)).await {
            Err(_) => Err(Error::Silent),
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(_)) if into.last() != Some(&end) => Err(Error::Silent),
            Ok(Ok(_)) => Ok(()),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[derive(Default)]
struct OsInfo {
    id: String,
    name: String,
    pretty_name: String,
    version: String,
    version_id: String,
    kernel_release: String,
    kernel_version: String,
    machine: String,
}

impl From<OsInfo> for GuestOs {
    fn from(i: OsInfo) -> Self {
        GuestOs {
            id: i.id,
            name: i.name,
            pretty_name: i.pretty_name,
            version: i.version,
            version_id: i.version_id,
            kernel_release: i.kernel_release,
            kernel_version: i.kernel_version,
            machine: i.machine,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Interface {
    #[serde(default)]
    name: String,
    hardware_address: Option<String>,
    #[serde(default)]
    ip_addresses: Vec<Address>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Address {
    #[serde(default)]
    ip_address: String,
}

impl From<Interface> for GuestInterface {
    fn from(i: Interface) -> Self {
        GuestInterface {
            name: i.name,
            mac: i.hardware_address,
            addresses: i.ip_addresses.into_iter().map(|a| a.ip_address).filter(|a| !a.is_empty()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn agent(listener: UnixListener, answers: impl Fn(&Value) -> String) {
        let (read, mut write) = listener.accept().await.unwrap().0.into_split();
        let mut read = BufReader::new(read);
        loop {
            let mut line = Vec::new();
            if read.read_until(b'\n', &mut line).await.unwrap() == 0 {
                return;
            }
            let asked: Value = serde_json::from_slice(line.strip_prefix(&[0xff]).unwrap_or(&line)).unwrap();
            let answer = match asked["execute"].as_str().unwrap() {
                "guest-sync-delimited" => {
                    write.write_all(b"{\"return\": \"left over\"}\n\xff").await.unwrap();
                    json!({"return": asked["arguments"]["id"]}).to_string()
                }
                _ => answers(&asked),
            };
            write.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn facts_are_read_and_what_the_agent_lacks_stays_empty() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qga");
        let listener = UnixListener::bind(&socket).unwrap();
        let answers = |asked: &Value| match asked["execute"].as_str().unwrap() {
            "guest-get-host-name" => r#"{"return": {"host-name": "flyer"}}"#.to_string(),
            "guest-network-get-interfaces" => r#"{"return": [
                {"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1", "prefix": 8}]},
                {"name": "eth0", "hardware-address": "02:00:00:00:00:01",
                 "ip-addresses": [{"ip-address": "10.0.2.2", "ip-address-type": "ipv4"}]}]}"#
                .replace('\n', " "),
            _ => r#"{"error": {"class": "CommandNotFound", "desc": "x"}}"#.to_string(),
        };
        let (facts, ()) = tokio::join!(ask(&socket), agent(listener, answers));
        let facts = facts.unwrap();
        assert!(facts.connected && facts.os.is_none());
        assert_eq!(facts.hostname.as_deref(), Some("flyer"));
        assert_eq!((facts.interfaces.len(), facts.interfaces[0].addresses[0].as_str()), (1, "10.0.2.2"));
    }

    #[tokio::test]
    async fn all_answers_are_handed_on_and_a_reboot_may_be_refused() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qga");
        let listener = UnixListener::bind(&socket).unwrap();
        let said = |asked: &Value| match asked["execute"].as_str().unwrap() {
            "guest-info" => r#"{"return": {"version": "7.2.0"}}"#.to_string(),
            "guest-get-users" => r#"{"return": [{"user": "root", "login-time": 12.5}]}"#.to_string(),
            _ => r#"{"error": {"class": "CommandNotFound", "desc": "x"}}"#.to_string(),
        };
        let (answers, ()) = tokio::join!(answers(&socket), agent(listener, said));
        let answers = answers.unwrap();
        assert_eq!(answers.keys().collect::<Vec<_>>(), ["guest-get-users", "guest-info"]);
        assert_eq!(answers["guest-info"]["version"], "7.2.0");

        std::fs::remove_file(&socket).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let (refused, ()) = tokio::join!(reboot(&socket), agent(listener, said));
        assert!(matches!(refused, Err(Error::Refused { unknown: true, .. })), "{refused:?}");
    }

    #[tokio::test]
    async fn a_clock_is_set_to_the_hosts_and_a_refusal_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qga");
        let listener = UnixListener::bind(&socket).unwrap();
        let heard = std::sync::Mutex::new(Value::Null);
        let answers = |asked: &Value| {
            *heard.lock().unwrap() = asked["arguments"]["time"].clone();
            r#"{"return": {}}"#.to_string()
        };
        let before = jiff::Timestamp::now().as_nanosecond();
        let (done, ()) = tokio::join!(set_clock(&socket, 7200), agent(listener, answers));
        done.unwrap();
        let heard = i128::from(heard.lock().unwrap().as_i64().unwrap());
        let ahead = 7200 * 1_000_000_000;
        assert!((before + ahead..=jiff::Timestamp::now().as_nanosecond() + ahead).contains(&heard), "{before} {heard}");

        std::fs::remove_file(&socket).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let answers = |_: &Value| r#"{"error": {"class": "CommandNotFound", "desc": "not here"}}"#.to_string();
        let (done, ()) = tokio::join!(set_clock(&socket, 0), agent(listener, answers));
        let error = done.unwrap_err();
        assert!(matches!(error, Error::Refused { unknown: true, .. }), "{error:?}");
        assert_eq!(error.to_string(), "the guest agent refuses guest-set-time: not here");
    }

    #[tokio::test]
    async fn a_guest_without_an_agent_is_silent_and_one_that_talks_nonsense_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(ask(&folder.path().join("none")).await, Err(Error::Io(_))));
        let socket = folder.path().join("qga");
        let listener = UnixListener::bind(&socket).unwrap();
        let nonsense = async {
            let mut stream = listener.accept().await.unwrap().0;
            stream.write_all(b"\xffhello\n").await.unwrap();
            stream
        };
        let (facts, _stream) = tokio::join!(ask(&socket), nonsense);
        assert!(matches!(facts, Err(Error::Unreadable(_))), "{facts:?}");
    }
}
